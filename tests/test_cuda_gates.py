"""What nvcc makes of the kernels, without a GPU: no warning, no spill, no local memory, registers
within the budget, and the instructions that were meant. Read from the objects of the build.

    PYTHONPATH=. python tests/test_cuda_gates.py      prints each kernel's registers and occupancy

Needs a build with CUDA, and cuobjdump and nvdisasm, which torch's CUDA builds for Linux bring along
with Triton.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from deconv_ext import compiler, toolchain

ROOT = Path(__file__).parents[1]
ARCHS = ("sm_80", "sm_90a")

REGISTER_FILE = 65536  # of a multiprocessor, in words; sm_80 and sm_90
# A kernel that needs more registers than this leaves room for less than one block of 256 threads;
# the hardware's limit is 255 a thread.
MAX_REGISTERS = 255
PRODUCTS = {  # of the gemm kernels: source file -> instruction of the tensor cores
    "gemm_float16": r"HMMA\.16816\.F32(?!\.BF16)",
    "gemm_bfloat16": r"HMMA\.16816\.F32\.BF16",
    "gemm_tf32": r"HMMA\.1688\.F32\.TF32",
    "gemm_float64": r"DMMA\.(884|8x8x4)",
    "gemm_float32": r"FFMA",
}


class Kernel(NamedTuple):
    """One compiled kernel: what it takes, and its instructions."""

    source: str
    arch: str
    name: str
    registers: int
    stack: int  # bytes of a thread; what is spilled lies there too
    static_shared: int
    instructions: list[str]

    def blocks(self, threads: int = 256) -> int:
        """Blocks that a multiprocessor holds at once, as far as registers decide."""
        rounded = -(-self.registers // 8) * 8
        return REGISTER_FILE // (rounded * threads)


@functools.cache
def cuobjdump() -> str | None:
    places = [f"{root}/triton/backends/nvidia/bin" for root in sys.path]
    places += [f"{root}/nvidia/cu13/bin" for root in sys.path]
    path = os.pathsep.join([*places, os.environ.get("PATH", "")])
    if not shutil.which("nvdisasm", path=path):
        return None
    return shutil.which("cuobjdump", path=path)


@functools.cache
def objects() -> Path | None:
    """The directory of the objects that this build of the sources was linked from."""
    try:
        if not compiler.cuda_toolkit()[0]:
            return None
        works = [work for work, _ in compiler.plan().places]
    except compiler.BuildError:
        return None
    for work in (*works, *(ROOT / "build" / "native").glob("*")):
        if (work / f"_C-{compiler.source_hash()}.so").exists() and list(work.glob("gemm*.cuda.o")):
            return work
    return None


needs_objects = pytest.mark.skipif(
    not (objects() and cuobjdump()), reason="needs a build with CUDA, cuobjdump and nvdisasm"
)


def _dump(option: str, path: Path, arch: str) -> str:
    tool = str(cuobjdump())
    env = {**os.environ, "PATH": f"{Path(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [tool, option, "-arch", arch, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


@functools.cache
def compiled() -> list[Kernel]:
    """All kernels for all architectures."""
    work = objects()
    assert work
    return [
        kernel
        for path in sorted(work.glob("*.cuda.o"))
        for arch in ARCHS
        for kernel in _kernels(path, arch)
    ]


def _kernels(path: Path, arch: str) -> list[Kernel]:
    usage = re.findall(
        r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        _dump("-res-usage", path, arch),
    )
    parts = re.split(r"^\s*Function : (\w+)", _dump("-sass", path, arch), flags=re.MULTILINE)[1:]
    line = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    code = {name: line.findall(text) for name, text in zip(parts[::2], parts[1::2])}
    return [
        Kernel(
            path.name.removesuffix(".cuda.o"),
            arch,
            name,
            int(registers),
            int(stack) + int(local),
            int(shared),
            code[name],
        )
        for name, registers, stack, shared, local in usage
    ]


def words(name: str) -> str:
    """The name of a kernel as C++ spells it, without namespaces and arguments."""
    plain = toolchain.output("c++filt", name).strip() or name
    return re.sub(r"deconv::|cuda::|\(anonymous namespace\)::|^void |\(.*?\)$", "", plain)


def holding(kernels: list[Kernel], pattern: str) -> set[str]:
    return {k.name for k in kernels if any(re.match(pattern, i) for i in k.instructions)}


@needs_objects
def test_no_warning() -> None:
    work = objects()
    assert work
    log = (work / "build.log").read_text()
    assert "[1/" in log and not re.findall(r".*csrc/cuda/.*\bwarning\b.*", log)


@needs_objects
@pytest.mark.parametrize("arch", ARCHS)
def test_no_local_memory(arch: str) -> None:
    """Registers hold everything: no spill, no array that is indexed at run time."""
    kernels = [k for k in compiled() if k.arch == arch]
    assert len(kernels) > 20 and all(k.instructions for k in kernels)
    bad = [f"{words(k.name)}: {k.stack}" for k in kernels if k.stack]
    assert not bad, bad
    assert not holding(kernels, r"(LDL|STL)\b")
    # Every block of a generic kernel is reserved 1 KiB on sm_90; what is ours is dynamic.
    assert not any(k.static_shared > 1024 for k in kernels)
    crowded = [words(k.name) for k in kernels if k.registers > MAX_REGISTERS or not k.blocks()]
    assert not crowded, crowded


@needs_objects
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", PRODUCTS)
def test_tensor_cores(source: str, arch: str) -> None:
    """Every kernel of products has the instruction of its type, fed by 128-bit copies."""
    kernels = [k for k in compiled() if (k.source, k.arch) == (source, arch)]
    products = [k for k in kernels if re.search(r"gather_kernel|weight_kernel", k.name)]
    assert products
    names = {k.name for k in products}
    assert holding(products, PRODUCTS[source]) == names
    assert holding(products, r"LDGSTS\S*\.128") == names
    for k in products:  # a step of the main loop; scalar products only mend what came out as NaN
        assert sum(bool(re.match(PRODUCTS[source], i)) for i in k.instructions) >= 8, words(k.name)
    if source in ("gemm_float16", "gemm_bfloat16"):
        assert holding(products, r"LDSM\.16\.M(T?)88") == names


@needs_objects
@pytest.mark.parametrize("source", ("wgmma_float16", "wgmma_bfloat16"))
def test_products_of_warpgroups(source: str) -> None:
    """On sm_90a they follow each other without a wait, and copies are asynchronous; elsewhere the
    kernels are empty."""
    kernels = [k for k in compiled() if k.source == source and "wgmma_kernel" in k.name]
    empty = [k for k in kernels if k.arch != "sm_90a"]
    full = [k for k in kernels if k.arch == "sm_90a"]
    assert len(full) == len(empty) >= 5
    assert max(len(k.instructions) for k in empty) < 64
    for k in full:
        # What the roles get (setmaxnreg) adds up to this; more would be waited for in vain.
        assert k.registers == 168, words(k.name)
        kind = r"HGMMA\.64x\d+x16\.F32" + (r"\.BF16" if "bfloat16" in source else r"(?!\.BF16)")
        at = [i for i, word in enumerate(k.instructions) if re.match(kind, word)]
        assert len(at) >= 8, words(k.name)
        between = k.instructions[at[0] : at[-1]]
        division = [i for i in between if re.match(r"(I2F|F2I|MUFU|CALL|LDL|STL|HMMA)\b", i)]
        assert not division, words(k.name)
        # One of a step and one of a tile: the compiler has put none between products.
        assert sum(i.startswith("WARPGROUP.DEPBAR") for i in k.instructions) == 2, words(k.name)
        for pattern in (
            r"UBLKCP",  # cp.async.bulk
            r"LDGSTS\S*\.128",
            r"SYNCS\.PHASECHK",  # mbarrier.try_wait
            r"FENCE\.VIEW\.ASYNC",  # fence.proxy.async
            r"USETMAXREG",
        ):
            assert holding([k], pattern), (words(k.name), pattern)


def main() -> None:
    print(f"{'kernel':90} {'arch':7} registers blocks of 256")
    for k in sorted(compiled(), key=lambda k: (k.source, k.name, k.arch)):
        print(f"{k.source + ' ' + words(k.name):90.90} {k.arch:7} {k.registers:9} {k.blocks():6}")


if __name__ == "__main__":
    main()
