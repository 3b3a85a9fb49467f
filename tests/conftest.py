"""Settings of every test run."""

from __future__ import annotations

import os

# References are computed by torch, whose threads would fight the engine's own for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
