"""Compiles the C++ and CUDA sources into the library of ``deconv_ext._C``.

The same code serves ahead of time (``setup.py``) and just in time (first use). `build` compiles
``csrc`` with `torch.utils.cpp_extension.load` in a child process, which keeps the compiler's
environment and any crash out of the caller's. A record appended to the library tells what it was
made from and holds a checksum, so that a stale, foreign or truncated one is found out unloaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from . import toolchain
from .toolchain import BuildError, Toolkit

# torch adds -fPIC, its include directories and the language standard that its headers need.
CXX_FLAGS = ["-O3", "-fopenmp", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-lineinfo", "-Xcompiler=-fopenmp,-fvisibility=hidden"]
SOURCE_SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}
# To compile on one processor, measured; for the progress line. torch's headers cost the most.
SECONDS = {
    "bindings.cpp": 40,
    "autograd.cpp": 40,
    "operators.cpp": 30,
    ".cpp": 15,
    ".cu": 50,
    "direct.cu": 150,
}
# After a change of branch the library of the other one is often wanted again.
LIBRARIES_KEPT = 4
RECORD_MARK = b"\ndeconv_ext build record "


class Plan(NamedTuple):
    """What `build` makes."""

    facts: dict[str, str]  # everything but the sources that the library depends on
    toolkit: Toolkit | None
    why_no_cuda: str
    places: list[tuple[Path, Path]]  # (working directory, library), the preferred first


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
    """All files of ``csrc``, sorted; those `compiled`; ``csrc/cuda`` only `with_cuda`."""
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
    return _hash([file_hashes(), CXX_FLAGS, NVCC_FLAGS])


def _hash(facts: Any) -> str:
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


def _wanted_cuda() -> bool | None:
    """``DECONV_EXT_CUDA``; None for "auto"."""
    wanted = os.environ.get("DECONV_EXT_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise BuildError(f"DECONV_EXT_CUDA must be 0, 1 or auto, not {wanted!r}")
    return None if wanted == "auto" else wanted == "1"


def cuda_toolkit() -> tuple[Toolkit | None, str]:
    """The CUDA toolkit to build with; or None, and the reason."""
    import torch

    wanted, toolkit = _wanted_cuda(), None
    if wanted is False:
        reason = "DECONV_EXT_CUDA=0"
    elif not torch.version.cuda:
        reason = "torch is built without CUDA"
    elif not any(path.suffix == ".cu" for path in source_files()):
        reason = "there are no CUDA sources"
    else:
        toolkit, reason = toolchain.find_toolkit(torch.version.cuda)
    if wanted and not toolkit:
        raise BuildError(f"DECONV_EXT_CUDA=1, but {reason}")
    return toolkit, reason


def plan(cache: Path | None = None) -> Plan:
    """What `build` makes here. Raises `BuildError` if a compiler, or what is asked for, lacks."""
    toolkit, why = cuda_toolkit()
    facts = {**_runtime(), "cxx": toolchain.cxx_compiler()[1], "nvcc": "", "cuda_archs": ""}
    if not toolkit:
        return Plan(facts, None, why, _places(facts, cache))
    archs = toolchain.cuda_archs(toolkit, portable=cache is not None)
    with_cuda = {**facts, "nvcc": " ".join(reversed(toolkit)), "cuda_archs": " ".join(archs)}
    places = _places(with_cuda, cache)
    for work, _ in places:
        failure = toolchain.read_text(work / "nvcc-failure")  # left by an earlier `build`
        if failure and not _wanted_cuda():
            why = f"nvcc in {toolkit.home} cannot be used: {failure}"
            return Plan(facts, None, why, _places(facts, cache))
    return Plan(with_cuda, toolkit, "", places)


# ---- where libraries are, and what they are ------------------------------------------------------


def prebuilt_path() -> Path:
    """Where ``setup.py`` puts the library."""
    return Path(__file__).resolve().with_name("_C" + sysconfig.get_config_var("EXT_SUFFIX"))


def cache_dirs() -> list[Path]:
    """Where just-in-time builds are looked for; they are made in the first that can be written."""
    env = os.environ
    dirs = [env["DECONV_EXT_CACHE"]] if env.get("DECONV_EXT_CACHE") else []
    for parent in (env.get("TORCH_EXTENSIONS_DIR"), env.get("XDG_CACHE_HOME"), "~/.cache"):
        dirs += [os.path.join(parent, "deconv_ext")] if parent else []
    temporary = Path(tempfile.gettempdir(), f"deconv_ext-{os.getuid()}")
    if not temporary.exists() or temporary.stat().st_uid == os.getuid():  # not laid by another user
        dirs.append(str(temporary))
    return [Path(path).expanduser().absolute() for path in dirs]


def _places(facts: dict[str, str], cache: Path | None) -> list[tuple[Path, Path]]:
    works = [root / _hash(facts) for root in ([cache] if cache else cache_dirs())]
    return [(work, work / f"_C-{source_hash()}.so") for work in works]


def _make_writable(directory: Path) -> bool:
    """Create `directory`; False if files cannot be made there."""
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def with_record(library: bytes, facts: dict[str, str]) -> bytes:
    """`library` with a record of what it was made from; the loader of the system ignores it."""
    facts = {**facts, "checksum": hashlib.sha256(library).hexdigest()}
    return library + RECORD_MARK + json.dumps(facts).encode()


def read_record(path: Path) -> dict[str, str]:
    """What the library at `path` was made from; {} if there is none or it is not whole."""
    try:
        library, mark, facts = path.read_bytes().rpartition(RECORD_MARK)
        record: dict[str, str] = json.loads(facts) if mark else {}
    except (OSError, ValueError):
        return {}
    return record if hashlib.sha256(library).hexdigest() == record.get("checksum") else {}


def mismatch(path: Path) -> str:
    """Why the library at `path` may not be loaded here; "" if it may."""
    record = read_record(path)
    if not record:
        return "it is missing or broken"
    for fact, value in {"source_hash": source_hash(), **_runtime()}.items():
        if record.get(fact) != value:
            return f"its {fact} is {record.get(fact)}, not {value}"
    wanted = _wanted_cuda()
    if wanted is not None and wanted != bool(record["nvcc"]):
        return f"DECONV_EXT_CUDA={int(wanted)}"
    return ""


def complete(library: Path) -> bool:
    """Whether compiling here would give no more than `library`, which matches, has."""
    return bool(read_record(library)["nvcc"]) or not cuda_toolkit()[0]


# ---- compiling -----------------------------------------------------------------------------------


def build(cache: Path | None = None, force: bool = False) -> Path:
    """Compile the library unless it exists, and return its path.

    With `cache`, a directory, the library is made there and for the usual GPUs rather than for
    this machine's alone. `force` discards what is there. Raises `BuildError`.
    """
    toolchain.require_tools()
    todo = plan(cache)
    if not force:
        for _, library in todo.places:
            if not mismatch(library):
                return library
    for work, library in todo.places:  # noqa: B007  what comes after uses the first usable one
        if _make_writable(work):
            break
    else:
        tried = ", ".join(str(work.parent) for work, _ in todo.places)
        mend = "export DECONV_EXT_CACHE=<a directory that can be written>"
        raise BuildError(f"none of {tried} can be written; to mend it: {mend}")
    with _locked(work) as lock:
        if not force and not mismatch(library):
            return library
        failure = toolchain.nvcc_failure(todo.toolkit) if todo.toolkit else ""
        if failure and _wanted_cuda():
            raise BuildError(f"DECONV_EXT_CUDA=1, but nvcc cannot be used:\n{failure}")
        if failure:
            (work / "nvcc-failure").write_text(failure)
        else:
            _discard_stale_objects(work, force)
            _run_compiler(todo, work, library, lock)
    # There is none if nvcc failed, and then the next plan leaves CUDA out, or if a source was
    # edited while it was compiled.
    return build(cache) if mismatch(library) else library


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


def _run_compiler(todo: Plan, work: Path, library: Path, lock: int) -> None:
    """Compile in the child, which also loads the result as a check; then publish it."""
    toolkit, archs, jobs = todo.toolkit, todo.facts["cuda_archs"], toolchain.jobs()
    files = source_files(compiled=True, with_cuda=toolkit is not None)
    facts = {**todo.facts, "source_hash": source_hash()}
    seconds = sum(SECONDS.get(path.name, SECONDS[path.suffix]) for path in files) / jobs
    about = max(seconds, SECONDS["bindings.cpp"])
    cuda = f"CUDA {toolkit.version} ({archs})" if toolkit else "no CUDA"
    _say(f"building for torch {facts['torch']}, {cuda} (about {about:.0f} s, once)")

    defines = ["-DDECONV_WITH_CUDA", f"-DDECONV_CUDA_ARCHS='\"{archs}\"'"] if toolkit else []
    gencode = toolchain.gencode_flags(archs.split())
    link = toolchain.openmp_link_flags()
    job = {
        "sources": [str(path) for path in files],
        "extra_cflags": CXX_FLAGS + defines,
        "extra_cuda_cflags": NVCC_FLAGS + defines + gencode,
        "extra_ldflags": link + (toolchain.cuda_link_flags(toolkit, work) if toolkit else []),
        "extra_include_paths": [str(source_dir())],
        "build_directory": str(work),
        "with_cuda": toolkit is not None,
        "cuda_home": toolkit.home if toolkit else None,
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
        whole.write_bytes(with_record((work / "_C.so").read_bytes(), facts))
        whole.replace(library)
    by_age = sorted(work.glob("_C-*.so"), key=lambda path: path.stat().st_mtime)
    for old in by_age[:-LIBRARIES_KEPT]:
        old.unlink()


def _say(text: str) -> None:
    print(f"deconv_ext: {text}", file=sys.stderr, flush=True)
