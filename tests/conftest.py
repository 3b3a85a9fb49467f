"""Settings of every test run."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis

# References are computed by torch, whose threads would fight the engine's own for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says more of what else the machine does than of what is tested.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

# Triton reads this where a kernel is defined: in whichever order tests are imported, that comes later.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ["TRITON_INTERPRET"] = "1"
