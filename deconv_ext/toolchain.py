"""What this machine has to compile with: compilers, CUDA toolkit, processors, memory, OpenMP.

Whatever is missing raises `BuildError`, whose message ends with the one command that mends it.
Imports neither torch nor the rest of the package, so that ``setup.py`` can use it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

# Ampere and Hopper natively (90a: with the features of Hopper alone), and intermediate code that
# newer devices compile when they load it: Ampere's, which is there already, for what the kernels
# want of Hopper is not in that of newer devices. compute_90 would take half as long again.
DEFAULT_CUDA_ARCHS = ["sm_80", "compute_80", "sm_90a"]
# A compiler at work on torch's headers takes up to this much memory.
BYTES_PER_JOB = 2.5e9


class BuildError(RuntimeError):
    """There is no binary module and it cannot be built; the message names what mends it."""


class Toolkit(NamedTuple):
    """A CUDA toolkit: its root directory, and its version, such as ``13.0``."""

    home: str
    version: str


def output(*command: str) -> str:
    """What `command` prints, or "" if it does not run or fails."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def read_text(path: str | Path) -> str:
    """The content of `path`, or "" if it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def system_install(apt: str, dnf: str, conda: str) -> str:
    """The command that installs a package, named as each package manager names it."""
    sudo = "" if os.geteuid() == 0 else "sudo "
    if shutil.which("apt-get"):
        return f"{sudo}apt-get install -y {apt}"
    if shutil.which("dnf"):
        return f"{sudo}dnf install -y {dnf}"
    return f"conda install -y -c conda-forge {conda}"


def cxx_compiler() -> tuple[str, str]:
    """The C++ compiler, ``CXX`` or the first that runs: its command, and its path and version."""
    chosen = os.environ.get("CXX")
    for command in [chosen] if chosen else ["c++", "g++", "clang++"]:
        path = shutil.which(shlex.split(command)[0])
        version = _version_line(command, path) if path else ""
        if path and version:
            return command, f"{path}: {version}"
    if chosen:
        raise BuildError(f"the compiler named by CXX={chosen} does not run; to mend it: unset CXX")
    mend = system_install(apt="g++", dnf="gcc-c++", conda="gxx")
    raise BuildError(f"there is no C++ compiler; to mend it: {mend}")


@lru_cache
def _version_line(command: str, path: str) -> str:
    return output(*shlex.split(command), "--version").partition("\n")[0]


def missing_tools() -> list[str]:
    """What is missing without which nothing can be compiled, each with what mends it."""
    missing = []
    try:
        cxx_compiler()
    except BuildError as error:
        missing.append(str(error))
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        mend = system_install(apt="python3-dev", dnf="python3-devel", conda="python")
        missing.append(f"there is no Python.h; to mend it: {mend}")
    if not shutil.which("ninja", path=tool_path()):
        missing.append(f"there is no ninja; to mend it: {sys.executable} -m pip install ninja")
    return missing


def require_tools() -> None:
    """Raise `BuildError` if anything is missing without which nothing can be compiled."""
    if missing := missing_tools():
        raise BuildError("\n".join(missing))


def tool_path() -> str:
    """PATH with the ninja of the Python package, also when its environment is not activated."""
    path = os.environ.get("PATH", os.defpath)
    try:
        import ninja
    except ImportError:
        return path
    return os.pathsep.join([ninja.BIN_DIR, path])


def find_toolkit(version: str) -> tuple[Toolkit | None, str]:
    """A CUDA toolkit of the same major version as `version`; or None, and why there is none."""
    major = version.split(".")[0]
    packages = [p for p in sys.path if p.endswith("-packages")]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvccs = [f"{home}/bin/nvcc" for home in homes if home]
    nvccs += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    nvccs += [f"{p}/nvidia/cu{major}/bin/nvcc" for p in packages]
    found = [t for n in nvccs if os.access(n, os.X_OK) and (t := _toolkit_of(n))]
    for toolkit in found:
        if toolkit.version.split(".")[0] == major:
            return toolkit, ""
    if found:
        why = f"nvcc in {found[0].home} is of CUDA {found[0].version}, torch is of CUDA {version}"
    else:
        why = f"there is no usable nvcc of CUDA {major}"
    mend = f"export CUDA_HOME=<directory of a CUDA {major} toolkit>"
    if int(major) >= 13:  # the Python packages of older versions are not laid out as a toolkit
        mend = f'{sys.executable} -m pip install "cuda-toolkit[nvcc,cccl]=={version}.*"'
    return None, f"{why}; to mend it: {mend}"


@lru_cache
def _toolkit_of(nvcc: str) -> Toolkit | None:
    """The toolkit that `nvcc`, perhaps a wrapper script elsewhere, really runs."""
    version = re.search(r"release (\d+\.\d+)", output(nvcc, "--version"))
    dryrun = output(nvcc, "--dryrun", "-x", "cu", os.devnull)
    homes = [Path(nvcc).resolve().parents[1]]
    homes += [Path(top.strip()) for top in re.findall(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)]
    for home in homes:
        if version and (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return Toolkit(str(home.resolve()), version[1])
    return None


def nvcc_failure(toolkit: Toolkit) -> str:
    """Why nvcc and the C++ compiler cannot compile an empty kernel together; "" if they can."""
    host = ["-ccbin", os.environ["CC"]] if "CC" in os.environ else []
    done = subprocess.run(
        [f"{toolkit.home}/bin/nvcc", *host, "-x", "cu", "-c", "-o", os.devnull, "-"],
        input="#include <cuda_runtime.h>\n#include <vector>\n__global__ void kernel() {}\n",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
    )
    return error_lines(done.stdout) if done.returncode else ""


def error_lines(log: str) -> str:
    """The lines of a compiler's output that tell what is wrong."""
    lines = [line for line in log.splitlines() if re.search(r"\b(error|fatal|Error)\b", line)]
    return "\n".join((lines or log.splitlines()[-5:])[:8])


def visible_archs() -> list[str]:
    """Architectures of this machine's GPUs, e.g. ["sm_90a"]. Does not start CUDA: that would
    break every process forked afterwards."""
    listing = output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    numbers = sorted(set(re.findall(r"^(\d+)\.(\d)$", listing, re.MULTILINE)))
    return [f"sm_{major}{minor}".replace("sm_90", "sm_90a") for major, minor in numbers]


def cuda_archs(toolkit: Toolkit, portable: bool) -> list[str]:
    """What to compile for: ``TORCH_CUDA_ARCH_LIST`` (in torch's words), else the GPUs of this
    machine unless `portable`, else `DEFAULT_CUDA_ARCHS` (in nvcc's words)."""
    listed = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if listed not in ([""], ["native"]):
        return listed
    archs = [] if portable else visible_archs()
    known = output(f"{toolkit.home}/bin/nvcc", "--list-gpu-code").split() if archs else []
    return archs if archs and set(archs) <= set(known) else DEFAULT_CUDA_ARCHS


def gencode_flags(archs: list[str]) -> list[str]:
    """nvcc's flags; none for an architecture in torch's words, which torch translates itself."""
    return [f"-gencode=arch={a.replace('sm_', 'compute_')},code={a}" for a in archs if "_" in a]


def cuda_link_flags(toolkit: Toolkit, work: Path) -> list[str]:
    """Where the linker finds ``libcudart.so`` if the toolkit is one of Python packages, which lacks
    it: a link of that name, made in `work`, to the runtime that torch has loaded."""
    if any(Path(toolkit.home, lib, "libcudart.so").exists() for lib in ("lib64", "lib")):
        return []
    for runtime in _loaded("libcudart"):
        (work / "libcudart.so").unlink(missing_ok=True)
        (work / "libcudart.so").symlink_to(runtime)
    return ["-L" + shlex.quote(str(work))]


def openmp_link_flags() -> list[str]:
    """Binds to the OpenMP runtime that torch has loaded, under the very name it is loaded by."""
    return [shlex.quote(path) for path in openmp_runtimes()[:1]] or ["-fopenmp"]


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes loaded in this process, torch's own first (Linux only)."""
    return sorted(_loaded("lib(?:gomp|iomp5|omp)"), key=lambda path: "torch" not in path)


def _loaded(name: str) -> list[str]:
    maps = read_text("/proc/self/maps")
    found = re.findall(rf"(/\S.*/{name}\b[-\w]*\.so[.\d]*)$", maps, re.MULTILINE)
    return sorted({os.path.realpath(path) for path in found})


def jobs() -> int:
    """``MAX_JOBS``, or as many compilers as there are processors and room in memory for."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return int(os.environ["MAX_JOBS"])
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    meminfo = re.search(r"^MemAvailable:\s+(\d+) kB", read_text("/proc/meminfo"), re.MULTILINE)
    free = [int(meminfo[1]) * 1024] if meminfo else []
    limit = read_text("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        free.append(int(limit) - int(read_text("/sys/fs/cgroup/memory.current") or 0))
    return max(1, min([cpus or 1] + [int(size / BYTES_PER_JOB) for size in free]))
