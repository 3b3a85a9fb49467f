"""What all tests here need."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _gpu() -> None:
    """One line for a test where there is none; helpers.pretend_gpu comes first, and pretends one."""
    if not torch.cuda.is_available():
        pytest.fail("torch sees no NVIDIA GPU", pytrace=False)
