"""The CUDA kernels, run on the CPU: every algorithm, configuration, dtype and layout.

Besides the numbers, each launch is checked for what hardware would not forgive, in an order of
blocks, warps and lanes of its own; see cuda_on_cpu/emulation.h.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from deconv_ext import toolchain
from deconv_ext.testing import EDGE, TINY, Case, Operands, make_case, random_case
from emulator import DTYPES, HERE, OPERATIONS, Emulator, build
from support import assert_equal, assert_same_bits, cast, dtype_name, exact

MACHINE = Emulator(build())
CASES = tuple(case for case in (*EDGE, *TINY, *map(random_case, range(60))) if case.macs <= 200_000)
LAYOUTS = ("contiguous", "channels_last", "contiguous", "channels_last", "sliced", "transposed")
# Of wgmma there is test_cuda_wgmma.
FORCED = [
    (op, algo)
    for op in OPERATIONS
    for algo in MACHINE.algorithms(op)
    if not algo.startswith("wgmma")
]
DECLINES = r"cannot take this problem|the tile '\S+' is not one of"
FORMATS = ("float32", "tf32", "float64", "float16", "bfloat16", "int64")

each_algorithm = pytest.mark.parametrize(
    "op,algo", FORCED, ids=[f"{op}-{algo.replace(':', '-')}" for op, algo in FORCED]
)


def dtype_of(fmt: str) -> torch.dtype:
    return torch.float32 if fmt == "tf32" else getattr(torch, fmt)


def rotated(op: str, algo: str, fmt: str) -> list[int]:
    """Indices of cases; all algorithms and formats together begin with all of them, repeatedly."""
    first = FORCED.index((op, algo)) * 7 + FORMATS.index(fmt) * 31
    return [(first + 29 * i) % len(CASES) for i in range(len(CASES) // 2)]


@each_algorithm
def test_exact(op: str, algo: str) -> None:
    """Integers come out exact, in every format: only the rounding to the dtype may act."""
    total = 0
    for fmt in FORMATS:
        accepted = 0
        for index in rotated(op, algo, fmt):
            case, layout = CASES[index], LAYOUTS[index % len(LAYOUTS)]
            operands, results = exact(case, False)
            MACHINE.seed(index)
            t = cast(operands, dtype_of(fmt), layout)
            try:
                got = MACHINE.run(op, case, t, algo, allow_tf32=fmt == "tf32")
            except ValueError as declined:
                assert re.search(DECLINES, str(declined)), (case, declined)
                continue
            assert_equal(got, results[op].to(got.dtype), (case, layout, fmt))
            accepted += 1
            if accepted == 6:
                break
        total += accepted
    assert total


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_exact_by_default(op: str, fmt: str) -> None:
    """What a user gets takes everything, with operands of different layouts."""
    dtype = dtype_of(fmt)
    for index, case in enumerate(CASES[FORMATS.index(fmt) :: 9]):
        operands, results = exact(case, False)
        mixed = [cast(operands, dtype, LAYOUTS[(index + i) % 5]) for i in range(3)]
        t = mixed[0]._replace(w=mixed[1].w, dy=mixed[2].dy)
        got = MACHINE.run(op, case, t, allow_tf32=fmt == "tf32")
        assert_equal(got, results[op].to(dtype), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_grad_bias_and_no_bias(dtype: torch.dtype) -> None:
    for index, case in enumerate(CASES[DTYPES.index(dtype) :: 9]):
        operands, results = exact(case, False)
        t = cast(operands, dtype, LAYOUTS[index % len(LAYOUTS)])
        assert_equal(MACHINE.grad_bias(t.dy), operands.dy.sum((0, 2, 3)).to(dtype), case)
        want = (results["forward"] - operands.bias.view(-1, 1, 1)).to(dtype)
        assert_equal(MACHINE.run("forward", case, t, bias=False), want, case)


def accepted_problems(op: str, algo: str) -> Iterator[tuple[Case, Operands]]:
    """Problems that the algorithm takes, of different formats and layouts."""
    found = False
    for case, dtype, layout in itertools.product(
        (
            make_case("dense", (2, 32, 6, 8), 32, 4, 2, 1),
            make_case("depthwise", (2, 16, 6, 8), 16, 4, 2, 1, groups=16),
        ),
        (torch.float32, torch.float16),
        ("contiguous", "channels_last"),
    ):
        t = case.operands(0, dtype, layout)
        try:
            MACHINE.run(op, case, t, algo)
        except ValueError as declined:
            assert re.search(DECLINES, str(declined)), (case, declined)
            continue
        found = True
        yield case, t
    assert found, "one of these problems is for this algorithm"


@each_algorithm
def test_order_does_not_matter(op: str, algo: str) -> None:
    """The same bits whatever the order of blocks, warps and lanes."""
    for case, t in accepted_problems(op, algo):
        results = []
        for seed in (1, 2):
            MACHINE.seed(seed)
            results.append(MACHINE.run(op, case, t, algo))
        assert_same_bits(results[0], results[1], case)


@each_algorithm
def test_results_are_written_once(op: str, algo: str) -> None:
    """Every byte of the result leaves the processor once, and no more than once."""
    name = {"forward": "write y", "grad_input": "write x", "grad_weight": "write w"}[op]
    for case, t in accepted_problems(op, algo):
        MACHINE.count(True)
        try:
            result = MACHINE.run(op, case, t, algo)
        finally:
            launches = MACHINE.counts()
            MACHINE.count(False)
        written = sum(launch["memory"].get(name, {"bytes": 0})["bytes"] for launch in launches)
        assert written == result.numel() * result.itemsize, case


def test_unknown_algorithm() -> None:
    case = make_case("one", (1, 1, 2, 2), 1, 1)
    with pytest.raises(ValueError, match="algo must be one of auto, .*, but got 'fast'"):
        MACHINE.run("forward", case, case.operands(0), "fast")


# ---- with AddressSanitizer and UndefinedBehaviorSanitizer ---------------------------------------


def sanitized(script: str) -> subprocess.CompletedProcess[str]:
    """A Python script in a process where AddressSanitizer watches the heap."""
    compiler = toolchain.cxx_compiler()[0]
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # which has to be there when the first throws
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parents[1])]),
    }
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )


def test_sanitizers_find_nothing() -> None:
    script = f"""
import sys
from pathlib import Path
from emulator import EDGE, Emulator, check
sys.exit(check(Emulator(Path({str(build(sanitize=True))!r})), cases=EDGE[::4]))
"""
    done = sanitized(script)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count(" right") > 100


def test_sanitizers_find_a_planted_mistake() -> None:
    planted = sorted([*(HERE / "planted").glob("*.cu"), *(HERE / "planted").glob("*.cpp")])
    library = build(planted, sanitize=True)
    script = f"""
import torch
from pathlib import Path
from emulator import Emulator
from test_cuda_emulator import call
x = torch.randn(1, 128)
machine = Emulator(Path({str(library)!r}))
assert torch.equal(call(machine, "out_of_bounds_load_right", x, x, (1, 128)), x)
print("the right one passes", flush=True)
call(machine, "out_of_bounds_load", x, x, (1, 128))
"""
    done = sanitized(script)
    assert "the right one passes" in done.stdout, done.stderr[-2000:]
    assert done.returncode != 0 and "AddressSanitizer: use-after-poison" in done.stderr
    assert "mistakes.cu" in done.stderr
