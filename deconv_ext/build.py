"""Finds and loads the binary module ``deconv_ext._C``, and builds it if need be.

Environment variables:

* ``DECONV_EXT_CACHE``: directory of just-in-time builds; the default is ``TORCH_EXTENSIONS_DIR``,
  then the user's cache directory, then ``TMPDIR``: the first that can be written
* ``DECONV_EXT_CUDA``: ``auto`` (default), ``1`` (fail rather than leave CUDA out), ``0`` (no CUDA)
* ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``, ``CXX``, ``CUDA_HOME``: as in torch
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # its libraries must be in the process before ours

from . import compiler, toolchain
from .compiler import build
from .toolchain import BuildError

__all__ = ["BuildError", "build", "build_info", "extension", "find_library"]

_module: ModuleType | None = None
_load_lock = threading.RLock()
_notes: list[str] = []  # why a library that exists was not used


def extension() -> ModuleType:
    """The binary module, loaded, and first built if need be. Raises `BuildError`."""
    global _module
    if _module is None:
        with _load_lock:
            if _module is None:
                _module = _load(find_library()) or _load(build()) or _load(build(force=True))
            if _module is None:
                raise BuildError(_notes[-1])
    return _module


def find_library() -> Path | None:
    """The library that this process may load, if it exists; compiles nothing."""
    prebuilt = compiler.prebuilt_path()
    usable = prebuilt.exists()
    if usable and (reason := compiler.mismatch(prebuilt)):
        _note(f"{prebuilt} is not used: {reason}")
        usable = False
    try:
        # One that was built later, with the CUDA kernels that the prebuilt lacks, is better.
        if usable and compiler.complete(prebuilt):
            return prebuilt
        cached = [library for _, library in compiler.plan().places]
    except BuildError:  # no compiler, which does not matter if it has done its work
        name = f"*/_C-{compiler.source_hash()}.so"
        cached = [path for root in compiler.cache_dirs() for path in root.glob(name)]
    good = (library for library in cached if not compiler.mismatch(library))
    return next(good, prebuilt if usable else None)


def _load(path: Path | None) -> ModuleType | None:
    """The module in the library at `path`; None if there is none or it does not load."""
    if path is None:
        return None
    spec = importlib.util.spec_from_file_location("deconv_ext._C", path)
    assert spec and spec.loader
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        _note(f"{path} does not load: {error}")
        return None
    sys.modules["deconv_ext._C"] = module
    return module


def _note(text: str) -> None:
    if text not in _notes:
        _notes.append(text)


def build_info() -> dict[str, Any]:
    """Versions, how the binary module was made, and what it can do. Compiles nothing.

    Keys: ``version``, ``torch``, ``built`` ("aot": by the installation, "jit": at first use, or
    "not built yet"), ``path``, ``cxx``, ``nvcc``, ``cuda_archs``, ``cpu_isa`` (in use),
    ``cpu_isas`` (usable here, best first), ``openmp`` (runtimes in this process),
    ``source_hash``, ``cache``, ``notes`` (list of str: what is amiss, why there is no more).
    """
    from . import __version__

    global _module
    with _load_lock:
        module = _module = _module or _load(find_library())
    path = Path(module.__file__ or "") if module else None
    record = compiler.read_record(path) if path else {}
    built = "aot" if path == compiler.prebuilt_path() else "jit" if path else "not built yet"
    info: dict[str, Any] = {
        "version": __version__,
        "torch": torch.__version__,
        "built": built,
        "path": str(path) if path else None,
        "cxx": record.get("cxx"),
        "nvcc": record.get("nvcc") or None,
        "cuda_archs": record.get("cuda_archs", "").split(),
        "cpu_isa": None,
        "cpu_isas": list(module.cpu_isas()) if module else [],
        "openmp": toolchain.openmp_runtimes(),
        "source_hash": compiler.source_hash(),
        "cache": str(compiler.cache_dirs()[0]),
        "notes": list(_notes),
    }
    try:
        info["cpu_isa"] = module.cpu_isa() if module else None
        if not info["nvcc"]:
            mend = f"to build with CUDA: {sys.executable} -m deconv_ext build"
            info["notes"].append(f"no CUDA: {compiler.plan().why_no_cuda or mend}")
    except RuntimeError as error:  # an environment variable with an unknown value, or no compiler
        info["notes"].append(str(error))
    if len(info["openmp"]) > 1:
        info["notes"].append(f"more than one OpenMP runtime: {', '.join(info['openmp'])}")
    return info
