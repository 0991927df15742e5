"""What nvcc makes of the kernels, without a GPU: no warning, no spill, no local memory, registers
within the budget, and the instructions that were meant. Read from the objects of the build.

    PYTHONPATH=. python tests/test_cuda_gates.py      prints each kernel's registers, shared memory
                                                      in the layers of layers.csv, and occupancy

Needs a build with CUDA, and cuobjdump and nvdisasm, which torch's CUDA builds for Linux bring along
with Triton.
"""

from __future__ import annotations

import functools
import itertools
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
SHARED_BYTES = {"sm_80": 164 << 10, "sm_90a": 228 << 10}  # of a multiprocessor
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


# What an integer division by a variable begins with, in place or called: the divisor in floating
# point, rounded up. (Reciprocals alone belong to activations.)
DIVISION = re.compile(r"CALL division|I2F\.\S*RP")


# The kernels of products, each tile one.
TILES = re.compile("gather_kernel|weight_kernel|wgmma_kernel")


class Kernel(NamedTuple):
    """One compiled kernel: what it takes, and its instructions."""

    source: str
    arch: str
    name: str
    registers: int
    stack: int  # bytes of a thread; what is spilled lies there too
    static_shared: int
    instructions: list[str]
    loops: list[list[str]]  # the instructions of each, from its head to its branch back

    def blocks(self, threads: int = 256, shared: int = 0) -> int:
        """Blocks that a multiprocessor holds at once, with so much dynamic shared memory each."""
        rounded = -(-self.registers // 8) * 8
        each = shared + max(self.static_shared, 1024)  # one KiB is the system's
        return min(
            REGISTER_FILE // (rounded * -(-threads // 32) * 32),
            SHARED_BYTES[self.arch] // each,
            2048 // threads,
            32,
        )


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
    code = {name: _code(text) for name, text in zip(parts[::2], parts[1::2])}
    return [
        Kernel(
            path.name.removesuffix(".cuda.o"),
            arch,
            name,
            int(registers),
            int(stack) + int(local),
            int(shared),
            *code[name],
        )
        for name, registers, stack, shared, local in usage
    ]


def _code(text: str) -> tuple[list[str], list[list[str]]]:
    """Instructions, and those of each loop: of what a branch back encloses."""
    line = re.compile(
        r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(?: .*?\b(0x[0-9a-f]+))?.*"
    )
    found = [(int(at, 16), name, target) for at, name, target in line.findall(text)]
    names, places = [name for _, name, _ in found], {at: i for i, (at, _, _) in enumerate(found)}
    loops = []
    for i, (_, name, target) in enumerate(found):
        head = places.get(int(target or "0", 16), 0)
        if name.startswith("CALL"):  # on sm_80 the end of a loop may be one too, which ends in EXIT
            body = itertools.takewhile(lambda each: each[:3] not in ("RET", "EXI"), names[head:])
            names[i] = "CALL division" if any(map(DIVISION.match, body)) else name
    for i, (at, name, target) in enumerate(found):
        head = int(target or "0", 16)
        if name.startswith("BRA") and target and head < at:  # the last one branches to itself
            loops.append(names[places[head] : i + 1])
    return names, loops


@functools.cache
def words(name: str) -> str:
    """The name of a kernel as C++ spells it, without namespaces and arguments."""
    plain = toolchain.output("c++filt", name).strip() or name
    return re.sub(
        r"deconv::|cuda::|direct::|\(anonymous namespace\)::|^void |\([^()]*\)$", "", plain
    )


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
    products = [k for k in kernels if TILES.search(k.name)]
    assert products
    names = {k.name for k in products}
    assert holding(products, PRODUCTS[source]) == names
    assert holding(products, r"LDGSTS\S*\.128") == names
    for k in products:  # a step of the main loop; scalar products only mend what came out as NaN
        assert sum(bool(re.match(PRODUCTS[source], i)) for i in k.instructions) >= 8, words(k.name)
    if source in ("gemm_float16", "gemm_bfloat16"):
        assert holding(products, r"LDSM\.16\.M(T?)88") == names


@needs_objects
@pytest.mark.parametrize("arch", ARCHS)
def test_no_division_in_main_loops(arch: str) -> None:
    """Of the matrix kernels: the loop over steps, with products, copies and the barrier. Of the
    direct ones: loops that multiply."""
    kernels = [k for k in compiled() if k.arch == arch]
    for k in (k for k in kernels if k.source in PRODUCTS and TILES.search(k.name)):
        product, copies = PRODUCTS[k.source], r"LDGSTS|UBLKCP|UTMALDG"
        steps = [
            loop
            for loop in k.loops
            if any(re.match(product, i) for i in loop)
            and any(re.match(copies, i) for i in loop)
            and any(i.startswith("BAR") for i in loop)
        ]
        assert steps, words(k.name)
        step = min(steps, key=len)  # larger ones go over groups of taps, and list pixels
        assert not [i for i in step if DIVISION.match(i)], words(k.name)
    direct = [k for k in kernels if "gather_direct_kernel" in k.name]
    assert direct
    for k in direct:
        inner = [loop for loop in k.loops if any(re.match("[FD]FMA", i) for i in loop)]
        assert inner, words(k.name)
        assert not [i for i in min(inner, key=len) if DIVISION.match(i)], words(k.name)


@needs_objects
@pytest.mark.parametrize("source", ("wgmma_float16", "wgmma_bfloat16"))
def test_products_of_warpgroups(source: str) -> None:
    """On sm_90a they follow each other without a wait, and copies are asynchronous; elsewhere the
    kernels are empty."""
    kernels = [k for k in compiled() if k.source == source and TILES.search(k.name)]
    empty = [k for k in kernels if k.arch != "sm_90a"]
    full = [k for k in kernels if k.arch == "sm_90a"]
    assert len(full) == len(empty) >= 9
    assert max(len(k.instructions) for k in empty) < 64
    for k in full:
        # What the roles get (setmaxnreg) adds up to this; more would be waited for in vain.
        assert k.registers == 168, words(k.name)
        kind = r"HGMMA\.64x\d+x16\.F32" + (r"\.BF16" if "bfloat16" in source else r"(?!\.BF16)")
        at = [i for i, word in enumerate(k.instructions) if re.match(kind, word)]
        assert len(at) >= 4, words(k.name)
        between = k.instructions[at[0] : at[-1]]
        division = [i for i in between if re.match(r"(I2F|F2I|MUFU|CALL|LDL|STL|HMMA)\b", i)]
        assert not division, words(k.name)
        # One of a step and one of a tile: the compiler has put none between products.
        assert sum(i.startswith("WARPGROUP.DEPBAR") for i in k.instructions) == 2, words(k.name)
        # cp.async.bulk, of packed weights
        assert bool(holding([k], "UBLKCP")) == ("weight" not in k.name), words(k.name)
        for pattern in (
            r"LDGSTS\S*\.128",
            r"SYNCS\.PHASECHK",  # mbarrier.try_wait
            r"FENCE\.VIEW\.ASYNC",  # fence.proxy.async
            r"USETMAXREG",
        ):
            assert holding([k], pattern), (words(k.name), pattern)


def launches(arch: str) -> dict[str, set[tuple[int, int]]]:
    """{kernel: its (threads, dynamic shared memory)} in the layers, by every configuration."""
    from deconv_ext.testing import load_layers
    from emulator import DTYPES, OPERATIONS, Emulator, build

    machine = Emulator(build())
    machine.set_device(*{"sm_80": (108, (8, 0), 163 << 10), "sm_90a": (132, (9, 0))}[arch])
    found: dict[str, set[tuple[int, int]]] = {}
    for op, case, dtype, layout in itertools.product(
        OPERATIONS, load_layers("gpu"), DTYPES[:4], ("contiguous", "channels_last")
    ):
        for algo, tf32 in itertools.product(machine.algorithms(op), (False, True)):
            try:
                plan = machine.plan(op, case, dtype, algo, layout, tf32)
            except ValueError:
                continue
            for launch in plan:
                name = words(machine.symbol(launch["address"]))
                found.setdefault(name, set()).add((launch["threads"], launch["shared"]))
    return found


def main() -> None:
    """The kernels that the layers can use: from the smallest of their launches to the largest."""
    head = "kernel", "arch", "registers", "threads", "shared memory", "blocks", "warps of 64"
    print("{:80} {:7} {:>9} {:>7} {:>15} {:>7} {:>11}".format(*head))
    used = {arch: launches(arch) for arch in ARCHS}
    for k in sorted(compiled(), key=lambda k: (k.source, k.name, k.arch)):
        name = words(k.name)
        if name not in used[k.arch]:
            continue
        ends = min(used[k.arch][name]), max(used[k.arch][name])
        blocks = [k.blocks(*launch) for launch in ends]
        warps = [count * -(-launch[0] // 32) for count, launch in zip(blocks, ends)]
        columns = [
            f"{first}-{last}" if first != last else str(last)
            for first, last in (*zip(*ends), blocks, warps)
        ]
        print(
            f"{k.source + ' ' + name:80.80} {k.arch:7} {k.registers:9} "
            "{:>7} {:>15} {:>7} {:>11}".format(*columns)
        )


if __name__ == "__main__":
    main()
