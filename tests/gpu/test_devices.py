"""The CUDA build on a machine with a GPU."""

import pytest
import torch

from engine import _native

pytestmark = pytest.mark.gpu


def test_the_build_has_cuda_and_sees_the_gpus_that_torch_sees():
    assert _native.cuda_is_compiled()
    assert _native.num_cuda_devices() == torch.cuda.device_count() > 0
