"""Builds, finds and loads the binary module ``deconv_ext._C``.

The same code serves ahead of time (``setup.py``) and just in time (first use). `build` compiles
``csrc`` with `torch.utils.cpp_extension.load` in a child process, which keeps the compiler's
environment and any crash out of the caller's. A record appended to the library tells what it was
made from and holds a checksum, so that a stale, foreign or truncated one is found out unloaded.

Importing this file needs neither torch nor the rest of the package. Environment variables:

* ``DECONV_EXT_CACHE``: directory of just-in-time builds; the default is ``TORCH_EXTENSIONS_DIR``,
  then the user's cache directory, then ``TMPDIR``: the first that can be written
* ``DECONV_EXT_CUDA``: ``auto`` (default), ``1`` (fail rather than leave CUDA out), ``0`` (no CUDA)
* ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``, ``CXX``, ``CUDA_HOME``: as in torch
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from . import toolchain
from .toolchain import BuildError, Toolkit

# torch adds -fPIC, its include directories and the language standard that its headers need.
CXX_FLAGS = ["-O3", "-fopenmp", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-lineinfo", "-Xcompiler=-fopenmp,-fvisibility=hidden"]
SOURCE_SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}
# To compile on one processor, measured; for the progress line. torch's headers cost the most.
SECONDS = {"bindings.cpp": 50, ".cpp": 15, ".cu": 30}
# After a change of branch the library of the other one is often wanted again.
LIBRARIES_KEPT = 4
RECORD_MARK = b"\ndeconv_ext build record "

_module: ModuleType | None = None
_how = "not built yet"
_notes: list[str] = []
_load_lock = threading.RLock()


# ---- what is compiled ----------------------------------------------------------------------------


def source_dir() -> Path:
    """``csrc``: inside the package where it is installed, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    for directory in (package / "csrc", package.parent / "csrc"):
        if (directory / "bindings.cpp").is_file():
            return directory
    mend = f"{sys.executable} -m pip install --force-reinstall --no-deps deconv_ext"
    raise BuildError(f"the C++ sources are missing beside {package}; to mend it: {mend}")


def source_files(compiled: bool = False, with_cuda: bool = True) -> list[Path]:
    """All files of ``csrc``, sorted; those `compiled`, ``csrc/cuda`` only `with_cuda`."""
    suffixes = {".cpp", ".cu"} if compiled else SOURCE_SUFFIXES
    cuda = source_dir() / "cuda"
    return [
        path
        for path in sorted(source_dir().rglob("*"))
        if path.suffix in suffixes and (with_cuda or cuda not in path.parents)
    ]


def file_hashes() -> dict[str, str]:
    """A hash of the content of every source file."""
    return {
        path.relative_to(source_dir()).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in source_files()
    }


def source_hash() -> str:
    """A hash of all sources and flags."""
    facts = [file_hashes(), CXX_FLAGS, NVCC_FLAGS]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _runtime() -> dict[str, str]:
    """What a library must have been made for in order to be loaded here."""
    import torch

    return {
        "torch": torch.__version__,
        "cxx11_abi": str(torch.compiled_with_cxx11_abi()),
        "python": sysconfig.get_config_var("EXT_SUFFIX"),
        "machine": platform.machine(),
    }


def cuda_toolkit() -> tuple[Toolkit | None, str]:
    """The CUDA toolkit to build with; or None, and the reason."""
    import torch

    wanted = os.environ.get("DECONV_EXT_CUDA", "auto")
    toolkit = None
    if wanted not in ("0", "1", "auto"):
        raise BuildError(f"DECONV_EXT_CUDA must be 0, 1 or auto, not {wanted!r}")
    if wanted == "0":
        reason = "DECONV_EXT_CUDA=0"
    elif not torch.version.cuda:
        reason = "torch is built without CUDA"
    elif not any(path.suffix == ".cu" for path in source_files()):
        reason = "there are no CUDA sources"
    else:
        toolkit, reason = toolchain.find_toolkit(torch.version.cuda.split(".")[0])
    if wanted == "1" and not toolkit:
        raise BuildError(f"DECONV_EXT_CUDA=1, but {reason}")
    return toolkit, reason


def _configuration(toolkit: Toolkit | None, portable: bool) -> dict[str, str]:
    """Everything but the sources that the library depends on."""
    return {
        **_runtime(),
        "cxx": " ".join(toolchain.cxx_compiler()),
        "nvcc": " ".join(reversed(toolkit)) if toolkit else "",
        "cuda_archs": " ".join(toolchain.cuda_archs(toolkit, portable)) if toolkit else "",
    }


# ---- the record in the library -------------------------------------------------------------------


def _with_record(library: bytes, facts: dict[str, Any]) -> bytes:
    facts = {**facts, "checksum": hashlib.sha256(library).hexdigest()}
    return library + RECORD_MARK + json.dumps(facts).encode()


def read_record(path: Path) -> dict[str, Any]:
    """What the library at `path` was made from; {} if there is none or it is not whole."""
    try:
        library, mark, facts = path.read_bytes().rpartition(RECORD_MARK)
        record: dict[str, Any] = json.loads(facts) if mark else {}
    except (OSError, ValueError):
        return {}
    return record if hashlib.sha256(library).hexdigest() == record.get("checksum") else {}


def _mismatch(path: Path) -> str:
    """Why the library at `path` may not be loaded here; "" if it may."""
    record = read_record(path)
    for fact, value in {"source_hash": source_hash(), **_runtime()}.items():
        if record.get(fact) != value:
            return f"it is of {fact} {record[fact]}, not {value}" if record else "it is broken"
    wanted = os.environ.get("DECONV_EXT_CUDA", "auto")
    if wanted != "auto" and bool(int(wanted)) != bool(record["nvcc"]):
        return f"DECONV_EXT_CUDA={wanted}"
    return ""


# ---- where libraries are kept --------------------------------------------------------------------


def prebuilt_path() -> Path:
    """Where ``setup.py`` puts the library."""
    return Path(__file__).resolve().with_name("_C" + sysconfig.get_config_var("EXT_SUFFIX"))


def cache_dirs() -> list[Path]:
    """Where just-in-time builds are looked for; they are made in the first that can be written."""
    env = os.environ
    dirs = [env["DECONV_EXT_CACHE"]] if env.get("DECONV_EXT_CACHE") else []
    for parent in (env.get("TORCH_EXTENSIONS_DIR"), env.get("XDG_CACHE_HOME"), "~/.cache"):
        dirs += [os.path.join(parent, "deconv_ext")] if parent else []
    dirs += [os.path.join(tempfile.gettempdir(), f"deconv_ext-{os.getuid()}")]
    return [Path(path).expanduser().absolute() for path in dirs]


def _make_writable(directory: Path) -> bool:
    """Create `directory`; False if files cannot be made there, or if it is another user's."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory.stat().st_uid == os.getuid()
    except OSError:
        return False


def _places(configuration: dict[str, str], cache: Path | None) -> list[tuple[Path, Path]]:
    """Working directories and libraries of this configuration and these sources."""
    key = hashlib.sha256(json.dumps(configuration).encode()).hexdigest()[:16]
    return [
        (directory / key, directory / key / f"_C-{source_hash()}.so")
        for directory in ([cache] if cache else cache_dirs())
    ]


def _plan(cache: Path | None) -> tuple[dict[str, str], Toolkit | None]:
    """What to build here; without CUDA if nvcc turned out to be unusable in an earlier build."""
    toolkit, _ = cuda_toolkit()
    configuration = _configuration(toolkit, portable=cache is not None)
    if os.environ.get("DECONV_EXT_CUDA") != "1":
        for work, _library in _places(configuration, cache):
            if failure := toolchain.read_text(work / "nvcc-failure"):
                _note(f"no CUDA: nvcc {configuration['nvcc']} cannot be used: {failure}")
                return _configuration(None, portable=cache is not None), None
    return configuration, toolkit


def find_library() -> Path | None:
    """The library that this process may load, if it exists; compiles nothing."""
    prebuilt = prebuilt_path()
    usable = False
    if prebuilt.exists():
        reason = _mismatch(prebuilt)
        usable = not reason
        if reason:
            _note(f"the prebuilt {prebuilt.name} is not used: {reason}")
    try:
        # One that was built later, with the CUDA kernels that the prebuilt lacks, is better.
        if usable and (read_record(prebuilt)["nvcc"] or not cuda_toolkit()[0]):
            return prebuilt
        cached = _places(_plan(None)[0], None)
    except BuildError:
        cached = []
    return next((lib for _, lib in cached if not _mismatch(lib)), prebuilt if usable else None)


# ---- compiling -----------------------------------------------------------------------------------

# Runs in a child process. torch guesses the toolkit wrongly if nvcc is a wrapper script, and quotes
# its include directories but not the one of its libraries, which may hold spaces as well.
_COMPILE = """
import json, shlex, sys
from torch.utils import cpp_extension
job = json.loads(sys.argv[1])
cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)
cpp_extension.CUDA_HOME = job.pop("cuda_home")
cpp_extension.load(name="_C", verbose=True, **job)
"""


def build(cache: Path | None = None, force: bool = False) -> Path:
    """Compile the library unless it exists, and return its path.

    With `cache`, a directory, the library is made there and for the usual GPUs rather than for
    this machine's alone. `force` discards what is there. Raises `BuildError`.
    """
    toolchain.require_tools()
    configuration, toolkit = _plan(cache)
    places = _places(configuration, cache)
    for _, library in places:
        if not force and not _mismatch(library):
            return library
    usable = [place for place in places if _make_writable(place[0])]
    if not usable:
        tried = ", ".join(str(work.parent) for work, _ in places)
        mend = "export DECONV_EXT_CACHE=<a directory that can be written>"
        raise BuildError(f"none of {tried} can be written; to mend it: {mend}")
    work, library = usable[0]
    with _locked(work) as lock:
        if not force and not _mismatch(library):
            return library
        failure = toolchain.nvcc_failure(toolkit) if toolkit else ""
        if failure and os.environ.get("DECONV_EXT_CUDA") == "1":
            raise BuildError(f"DECONV_EXT_CUDA=1, but nvcc cannot be used:\n{failure}")
        if failure:
            (work / "nvcc-failure").write_text(failure)
        else:
            _discard_stale_objects(work, force)
            _run_compiler(work, library, configuration, toolkit, lock)
    # Without a library: either nvcc failed, and the next plan leaves CUDA out, or a source was
    # edited while it was compiled.
    return library if library.exists() else build(cache)


@contextmanager
def _locked(work: Path) -> Iterator[int]:
    """Hold the lock of a working directory. The system lets go of it when its holders are dead."""
    with open(work / "building", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for the build of another process in {work}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _discard_stale_objects(work: Path, force: bool) -> None:
    """ninja goes by the times of files: a source that changed but became no younger fools it."""
    last = work / "sources.json"
    now, before = file_hashes(), json.loads(toolchain.read_text(last) or "{}")
    changed = [source_dir() / name for name in now if before.get(name) != now[name]]
    if last.exists():
        started = last.stat().st_mtime
        force = force or any(path.stat().st_mtime <= started for path in changed)
    if force:
        for path in [*work.glob("*.o"), *work.glob(".ninja*"), *work.glob("*.so")]:
            path.unlink()
    last.write_text(json.dumps(now))


def _run_compiler(
    work: Path, library: Path, configuration: dict[str, str], toolkit: Toolkit | None, lock: int
) -> None:
    """Compile in the child, which also loads the result as a check; then publish it."""
    files = source_files(compiled=True, with_cuda=toolkit is not None)
    facts = {**configuration, "source_hash": source_hash()}
    archs, jobs = configuration["cuda_archs"], toolchain.jobs()
    seconds = sum(SECONDS.get(path.name, SECONDS[path.suffix]) for path in files) / jobs
    cuda = f"CUDA {toolkit.version} ({archs})" if toolkit else "no CUDA"
    about = max(seconds, SECONDS["bindings.cpp"])
    _say(f"building for torch {facts['torch']}, {cuda} (about {about:.0f} s, once)")

    defines = ["-DDECONV_WITH_CUDA", f"-DDECONV_CUDA_ARCHS='\"{archs}\"'"] if toolkit else []
    link = toolchain.openmp_link_flags()
    job = {
        "sources": [str(path) for path in files],
        "extra_cflags": CXX_FLAGS + defines,
        "extra_cuda_cflags": NVCC_FLAGS + defines + toolchain.gencode_flags(archs.split()),
        "extra_ldflags": link + (toolchain.cuda_link_flags(toolkit, work) if toolkit else []),
        "extra_include_paths": [str(source_dir())],
        "build_directory": str(work),
        "with_cuda": toolkit is not None,
        "cuda_home": toolkit and toolkit.home,
    }
    env = {**os.environ, "PATH": toolchain.tool_path(), "MAX_JOBS": str(jobs)}
    env["CXX"] = toolchain.cxx_compiler()[0]
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    (work / "lock").unlink(missing_ok=True)  # torch's own: left by a killed build, it would block
    start = time.monotonic()
    with open(work / "build.log", "w") as log:
        failed = subprocess.run(
            [sys.executable, "-c", _COMPILE, json.dumps(job)],
            cwd=work,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock],  # if this process is killed, the next one waits for the compilers
        ).returncode
    if failed:
        mend = "to build without CUDA: export DECONV_EXT_CUDA=0\n" if toolkit else ""
        lines = toolchain.error_lines(toolchain.read_text(work / "build.log"))
        raise BuildError(f"compiling failed, see {work}/build.log\n{mend}{lines}")
    _say(f"built in {time.monotonic() - start:.0f} s")
    if source_hash() == facts["source_hash"]:
        whole = work / "whole"
        whole.write_bytes(_with_record((work / "_C.so").read_bytes(), facts))
        whole.replace(library)
    by_age = sorted(work.glob("_C-*.so"), key=lambda path: path.stat().st_mtime)
    for old in by_age[:-LIBRARIES_KEPT]:
        old.unlink()


# ---- loading -------------------------------------------------------------------------------------


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


def _load(path: Path | None) -> ModuleType | None:
    """The module in the library at `path`; None if there is none or it does not load."""
    global _how
    if path is None:
        return None
    import torch  # noqa: F401  its libraries must be in the process before ours

    spec = importlib.util.spec_from_file_location("deconv_ext._C", path)
    assert spec and spec.loader
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        _note(f"{path} does not load: {error}")
        return None
    _how = "aot" if path == prebuilt_path() else "jit"
    sys.modules["deconv_ext._C"] = module
    return module


def _say(text: str) -> None:
    print(f"deconv_ext: {text}", file=sys.stderr, flush=True)


def _note(text: str) -> None:
    if text not in _notes:
        _notes.append(text)


def build_info() -> dict[str, Any]:
    """Versions, how the binary module was made, and what it can do. Compiles nothing.

    Keys: ``version``, ``torch``, ``built`` ("aot": by the installation, "jit": at first use, or
    "not built yet"), ``path``, ``cxx``, ``nvcc``, ``cuda_archs``, ``cpu_isa`` (in use),
    ``cpu_isas`` (usable here, best first), ``openmp`` (runtimes in this process),
    ``source_hash``, ``cache``, ``notes`` (list of str: why there is no more).
    """
    import torch

    from . import __version__

    global _module
    if _module is None:
        with _load_lock:
            _module = _load(find_library())
    record = read_record(Path(_module.__file__ or "")) if _module else {}
    notes = list(_notes)
    info: dict[str, Any] = {
        "version": __version__,
        "torch": torch.__version__,
        "built": _how,
        "path": _module.__file__ if _module else None,
        "cxx": record.get("cxx"),
        "nvcc": record.get("nvcc") or None,
        "cuda_archs": record.get("cuda_archs", "").split(),
        "cpu_isa": None,
        "cpu_isas": _module.cpu_isas() if _module else [],
        "openmp": toolchain.openmp_runtimes(),
        "source_hash": source_hash(),
        "cache": str(cache_dirs()[0]),
        "notes": notes,
    }
    try:
        info["cpu_isa"] = _module.cpu_isa() if _module else None
        if not record.get("nvcc"):
            toolkit, reason = cuda_toolkit()
            mend = f"to build with it: {sys.executable} -m deconv_ext build"
            notes.append(f"no CUDA: {reason or f'nvcc {toolkit} was not used; {mend}'}")
    except RuntimeError as error:  # an environment variable with an unknown value
        notes.append(str(error))
    if len(info["openmp"]) > 1:
        notes.append(f"more than one OpenMP runtime in this process: {', '.join(info['openmp'])}")
    return info
