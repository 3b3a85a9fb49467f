"""What the machine can do at most, measured in the same run as what is compared with it.

The loops are C (limits.c), compiled by the system's compiler for this very machine.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path


class Limits:
    """Rates of reading and of multiplying with `num_threads` threads, best of several tries."""

    def __init__(self, num_threads: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "limits.so"
            source = Path(__file__).with_name("limits.c")
            command = [os.environ.get("CC", "cc"), "-O3", "-march=native", "-shared", "-fPIC"]
            # Sums in any order. -ffast-math would do so, too, and make the whole process flush subnormals.
            command += ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]
            prefer_wide = ["-mprefer-vector-width=512"] if os.uname().machine == "x86_64" else []
            subprocess.run([*command, *prefer_wide, "-pthread", "-o", library, source], check=True)
            self._library = ctypes.CDLL(str(library))
        for name in ("read_rate", "multiply_rate", "multiply_bf16_rate", "multiply_bytes_rate"):
            getattr(self._library, name).restype = ctypes.c_double
        self._num_threads = num_threads

    def read_gbps(self, num_bytes: int = 1 << 29) -> float:
        """10^9 bytes per second, from huge pages. Half a gigabyte is more than any cache holds."""
        rate = self._library.read_rate(ctypes.c_int64(num_bytes), self._num_threads, 3)
        return rate / 1e9

    def fp32_gflops(self) -> float:
        """10^9 fp32 multiplications and additions per second, all in registers."""
        return self._library.multiply_rate(self._num_threads, 100) / 1e9

    def bf16_gflops(self) -> float:
        """10^9 of the same of pairs of bfloat16 by vdpbf16ps; 0: this machine has it not."""
        return self._library.multiply_bf16_rate(self._num_threads, 100) / 1e9

    def int8_gops(self) -> float:
        """10^9 multiplications and additions of bytes per second, all in registers; 0: not known here."""
        return self._library.multiply_bytes_rate(self._num_threads, 100) / 1e9
