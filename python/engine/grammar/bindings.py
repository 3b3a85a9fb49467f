"""xgrammar's native module, without the Python package around it.

`import xgrammar` imports torch, transformers and pydantic: 2.5 s and 300 MB in the helper process,
a second of a busy interpreter in the engine. The classes that the library registers with tvm_ffi
are all that is needed here; they are those of the version pinned in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

RAW_VOCABULARY = 0
"""`VocabType.RAW`: tokens are given as the bytes that they stand for."""


def load_bindings(*, without_torch: bool = False) -> Any:
    """The module with TokenizerInfo, GrammarCompiler and GrammarMatcher.

    Its `from_dlpack` makes of an array what the library's calls take without a conversion each time.

    `without_torch`: for a process of its own that never needs torch, which tvm_ffi would import.
    """
    if without_torch:
        sys.modules["torch"] = None  # type: ignore[assignment]
    from tvm_ffi import from_dlpack
    from tvm_ffi.libinfo import load_lib_module

    spec = importlib.util.find_spec("xgrammar")
    if spec is None or spec.origin is None:
        raise ImportError("xgrammar is not installed")
    directory = Path(spec.origin).parent
    load_lib_module("xgrammar", "xgrammar_bindings", extra_lib_paths=[directory])
    module: Any = _load_file(directory / "tvm_ffi_binding" / "_ffi_api.py")
    module.from_dlpack = from_dlpack
    return module


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_xgrammar_bindings", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
