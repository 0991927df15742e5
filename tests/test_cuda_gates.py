"""What nvcc makes of the kernels, without a GPU: no warning, no spill, no local memory, registers
within the budget, and the instructions that were meant.

    PYTHONPATH=. python tests/test_cuda_gates.py      prints each kernel's registers and occupancy

Needs nvcc; the instructions need nvdisasm as well.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from deconv_ext import compiler, toolchain

SOURCES = sorted((Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))
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
    """One compiled kernel: what ptxas says, and its instructions (none without nvdisasm)."""

    source: str
    arch: str
    name: str
    registers: int
    stack: int
    spills: int
    static_shared: int
    instructions: list[str]

    def blocks(self, threads: int = 256) -> int:
        """Blocks that a multiprocessor holds at once, as far as registers decide."""
        rounded = -(-self.registers // 8) * 8
        return REGISTER_FILE // (rounded * threads)


@functools.cache
def nvcc() -> str | None:
    toolkit, _ = toolchain.find_toolkit(torch.version.cuda or "13")
    return f"{toolkit.home}/bin/nvcc" if toolkit else None


@functools.cache
def nvdisasm() -> str | None:
    """The toolkit's, or the one that comes with the Python packages of CUDA or of Triton."""
    places = [str(Path(nvcc() or "").parent)]
    places += [p for root in sys.path for p in (f"{root}/nvidia/cu13/bin",)]
    places += [f"{root}/triton/backends/nvidia/bin" for root in sys.path]
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=os.pathsep.join(places))


needs_nvcc = pytest.mark.skipif(not nvcc(), reason="needs nvcc")
needs_nvdisasm = pytest.mark.skipif(not (nvcc() and nvdisasm()), reason="needs nvdisasm")


@functools.cache
def compiled() -> list[Kernel]:
    """All kernels for all architectures. Raises if nvcc has as much as a warning."""
    pairs = [(source, arch) for source in SOURCES for arch in ARCHS]
    with ThreadPoolExecutor(toolchain.jobs()) as pool:
        return [kernel for found in pool.map(lambda p: _compile(*p), pairs) for kernel in found]


def _compile(source: Path, arch: str) -> list[Kernel]:
    cache = compiler.cache_dirs()[0] / "gates"
    cache.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(compiler.source_hash().encode() + f"{nvcc()}".encode()).hexdigest()[:16]
    cubin = cache / f"{source.stem}-{arch}-{digest}.cubin"
    log = cubin.with_suffix(".txt")
    if not log.exists():
        flags = [
            "-std=c++17",
            "-O3",
            "-cubin",
            f"-arch={arch}",
            "-Xptxas=-v",
            "-Werror=all-warnings",
        ]
        done = subprocess.run(
            [str(nvcc()), *flags, "-o", str(cubin), str(source)], capture_output=True, text=True
        )
        if done.returncode or "warning" in done.stderr:
            raise RuntimeError(f"{source.name} for {arch}:\n{done.stderr}")
        log.write_text(done.stderr)
    sections = re.split(r"Compiling entry function '(\w+)'", log.read_text())[1:]
    code = _instructions(cubin)
    kernels = []
    for name, text in zip(sections[::2], sections[1::2]):

        def number(pattern: str, text: str = text) -> int:
            found = re.search(pattern, text)
            return int(found[1]) if found else 0

        kernels.append(
            Kernel(
                source.stem,
                arch,
                name,
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
                number(r"(\d+) bytes smem"),
                code.get(name, []),
            )
        )
    return kernels


def _instructions(cubin: Path) -> dict[str, list[str]]:
    """Kernel -> its instructions with their modifiers, such as "LDG.E.128"."""
    if not nvdisasm():
        return {}
    listing = toolchain.output(str(nvdisasm()), "-c", str(cubin))
    parts = re.split(r"^\s*\.text\.(\w+):", listing, flags=re.MULTILINE)[1:]
    line = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    return {name: line.findall(text) for name, text in zip(parts[::2], parts[1::2])}


def words(name: str) -> str:
    """The name of a kernel as C++ spells it, without namespaces and arguments."""
    plain = toolchain.output("c++filt", name).strip() or name
    return re.sub(r"deconv::|cuda::|\(anonymous namespace\)::|^void |\(.*?\)$", "", plain)


def holding(kernels: list[Kernel], pattern: str) -> set[str]:
    return {k.name for k in kernels if any(re.match(pattern, i) for i in k.instructions)}


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_no_local_memory(arch: str) -> None:
    """Registers hold everything: no spill, no array that is indexed at run time."""
    kernels = [k for k in compiled() if k.arch == arch]
    assert len(kernels) > 20
    bad = [f"{words(k.name)}: {k.stack} {k.spills}" for k in kernels if k.stack or k.spills]
    assert not bad, bad
    assert not any(k.static_shared for k in kernels), "shared memory is dynamic"
    crowded = [words(k.name) for k in kernels if k.registers > MAX_REGISTERS or not k.blocks()]
    assert not crowded, crowded


@needs_nvdisasm
@pytest.mark.parametrize("arch", ARCHS)
def test_no_local_accesses(arch: str) -> None:
    kernels = [k for k in compiled() if k.arch == arch]
    assert all(k.instructions for k in kernels)
    assert not holding(kernels, r"(LDL|STL)\b")


@needs_nvdisasm
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
    if source != "gemm_float32":  # nothing is multiplied beside the tensor cores
        for k in products:
            matrix = sum(bool(re.match(PRODUCTS[source], i)) for i in k.instructions)
            scalar = sum(bool(re.match(r"(FFMA|DFMA|HFMA2)\b", i)) for i in k.instructions)
            assert scalar < matrix, words(k.name)
    if source in ("gemm_float16", "gemm_bfloat16"):
        assert holding(products, r"LDSM\.16\.M(T?)88") == names


def main() -> None:
    print(f"{'kernel':90} {'arch':7} registers blocks of 256")
    for k in sorted(compiled(), key=lambda k: (k.source, k.name, k.arch)):
        print(f"{k.source + ' ' + words(k.name):90.90} {k.arch:7} {k.registers:9} {k.blocks():6}")


if __name__ == "__main__":
    main()
