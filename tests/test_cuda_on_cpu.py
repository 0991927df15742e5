"""The CUDA kernels, run on the CPU: every algorithm, configuration, dtype and layout.

Besides the numbers, each launch is checked for what hardware would not forgive, in an order of
blocks, warps and lanes of its own; see cuda_on_cpu/emulation.h.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from deconv_ext import toolchain
from deconv_ext.activation import FUNCTIONS
from deconv_ext.testing import (
    EDGE,
    TINY,
    Case,
    Operands,
    load_layers,
    make_case,
    random_case,
)
from emulator import (
    ACTIVATIONS,
    DTYPES,
    HERE,
    OPERATIONS,
    Emulator,
    build,
    bytes_written,
    define,
    dtype_of,
)
from support import assert_equal, assert_same_bits, cast, dtype_name, exact

pytestmark = pytest.mark.usefixtures("one_thread")
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
DECLINES = "cannot take this problem"
FORMATS = ("float32", "tf32", "float64", "float16", "bfloat16", "int64")

each_algorithm = pytest.mark.parametrize(
    "op,algo", FORCED, ids=[f"{op}-{algo.replace(':', '-')}" for op, algo in FORCED]
)


def scaled_down(layer: Case) -> Case:
    """Its kernel, stride and kind of groups, with few channels and a small image. Of the largest
    kernel the height is enough."""
    groups = min(layer.groups, 3)
    c_in, c_out = (groups * min(c // layer.groups, 10) for c in (layer.c_in, layer.c_out))
    image = {"batch": min(layer.batch, 2), "h": min(layer.h, 3), "w": min(layer.w, 5)}
    thinner = max(1, layer.kernel[0] * layer.kernel[1] // 256)
    size = {
        name: (getattr(layer, name)[0], max(1, getattr(layer, name)[1] // thinner))
        for name in ("kernel", "stride")
    }
    return dataclasses.replace(layer, c_in=c_in, c_out=c_out, groups=groups, **size, **image)


SMALL_LAYERS = tuple(map(scaled_down, load_layers("gpu")))


def run_if_accepted(
    op: str, case: Case, t: Operands, algo: str, *arguments: Any
) -> torch.Tensor | None:
    """None where the forced algorithm says which condition of it the problem does not meet."""
    try:
        return MACHINE.run(op, case, t, algo, *arguments)
    except ValueError as declined:
        assert re.search(DECLINES, str(declined)), (case, declined)
        return None


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
            got = run_if_accepted(op, case, t, algo, True, fmt == "tf32")
            if got is None:
                continue
            assert_equal(got, results[op].to(got.dtype), (case, layout, fmt))
            accepted += 1
            if accepted == 4:
                break
        total += accepted
    assert total


@each_algorithm
def test_every_layer(op: str, algo: str) -> None:
    """Each layer of layers.csv, scaled down: exact, or declined; formats and layouts in turns."""
    first = FORCED.index((op, algo))
    for index, case in enumerate(SMALL_LAYERS, first):
        operands, results = exact(case, False)
        fmt, layout = FORMATS[index % 5], LAYOUTS[index // 5 % 2]
        MACHINE.seed(index)
        t = cast(operands, dtype_of(fmt), layout)
        got = run_if_accepted(op, case, t, algo, True, fmt == "tf32")
        if got is None:
            assert algo != "generic", case
            continue
        assert_equal(got, results[op].to(got.dtype), (case, layout, fmt))


@pytest.mark.parametrize(
    "fmt,layout", [("bfloat16", "contiguous"), ("tf32", "channels_last")], ids=str
)
def test_long_sums_that_blocks_share(fmt: str, layout: str) -> None:
    """Of a kernel so large that its taps are split: right, and the same for a sample alone."""
    case = make_case("long_sums", (2, 5, 2, 3), 9, (64, 24), (32, 12))
    t, tf32 = case.operands(0, dtype_of(fmt), layout), fmt == "tf32"
    _, share, combine = MACHINE.plan("grad_input", case, t.w.dtype, "gemm", layout, tf32)
    assert share["blocks"] > combine["blocks"]
    MACHINE.seed(1)
    got = MACHINE.run("grad_input", case, t, "gemm", allow_tf32=tf32)
    want = define("grad_input", case, t)
    limit = (2**-8 if fmt == "bfloat16" else 2**-10) * float(want.abs().mean())
    assert_close(got.double(), want, rtol=2**-8, atol=limit)
    MACHINE.seed(2)
    one, one_t = dataclasses.replace(case, batch=1), t._replace(x=t.x[:1], dy=t.dy[:1])
    alone = MACHINE.run("grad_input", one, one_t, "gemm", allow_tf32=tf32)
    assert_same_bits(alone, got[:1], case)


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


PROBLEMS = tuple(
    (case, dtype, layout)
    for case in (
        make_case("dense", (2, 32, 6, 8), 32, 4, 2, 1),
        make_case("depthwise", (2, 16, 6, 8), 16, 4, 2, 1, groups=16),
    )
    for dtype, layout in ((torch.float32, "contiguous"), (torch.float16, "channels_last"))
)


@each_algorithm
def test_repeatable_and_written_once(op: str, algo: str) -> None:
    """The same bits whatever the order of blocks, warps and lanes; and every byte of the result
    leaves the processor once, and no more than once."""
    taken = 0
    for case, dtype, layout in PROBLEMS:
        t = case.operands(0, dtype, layout)
        MACHINE.seed(1)
        with MACHINE.counting() as launches:
            first = run_if_accepted(op, case, t, algo)
        if first is None:
            continue
        assert bytes_written(launches, op) == first.numel() * first.itemsize, case
        MACHINE.seed(2)
        assert_same_bits(first, MACHINE.run(op, case, t, algo), case)
        taken += 1
    assert taken, "one of these problems is for this algorithm"


ACTIVATED = (
    make_case("planes", (2, 8, 5, 9), 19, 4, 2, 1),
    make_case("depthwise", (1, 6, 5, 8), 6, 4, 2, 1, groups=6),
    make_case("gaps", (1, 4, 3, 4), 5, 2, 3, 0, 1),
)


@pytest.mark.parametrize(
    "algo", [algo for op, algo in FORCED if op == "forward"], ids=lambda a: a.replace(":", "-")
)
def test_activations(algo: str) -> None:
    """Each algorithm applies each activation to the sum with its bias, before the rounding."""
    accepted = 0
    for i, (name, case) in enumerate(itertools.product(ACTIVATIONS[1:], ACTIVATED)):
        fmt = ("float32", "bfloat16", "float64", "float16", "tf32")[i % 5]
        layout = ("contiguous", "channels_last")[i // 3 % 2]
        t = cast(exact(case, False)[0], dtype_of(fmt), layout)
        t = t._replace(x=t.x / 64, w=t.w / 16)  # sums near zero, exact still
        want = FUNCTIONS[name](define("forward", case, t), 0.2).to(t.x.dtype)
        got = run_if_accepted("forward", case, t, algo, True, fmt == "tf32", name, 0.2)
        if got is None:
            continue
        limit = torch.finfo(got.dtype).eps * (8 if got.itemsize > 2 else 1)
        assert_close(got, want, rtol=limit, atol=limit)
        accepted += 1
    assert accepted >= 2


def test_activations_of_nan_and_infinity() -> None:
    """NaN that padding makes is mended before the activation, NaN that is true stays."""
    case = make_case("image", (1, 4, 3, 8), 8, 3, 2, 1)
    t = case.operands(0)
    t.w[0, 0, 0, 0] = t.w[1, 1, 1, 1] = float("inf")
    t.x[0, 2, 1, 1] = float("nan")
    z = define("forward", case, t)
    assert z.isnan().any() and z.isposinf().any() and z.isneginf().any()
    for name in ACTIVATIONS[1:]:
        want = FUNCTIONS[name](z, 0.2)
        for algo in ("gemm", "direct", "generic"):
            got = MACHINE.run("forward", case, t, algo, activation=name, negative_slope=0.2)
            assert_close(got.double(), want, equal_nan=True, rtol=1e-4, atol=1e-5)


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
names = "dilation_2_stride_4 odd_channels depthwise_gaps asymmetric_groups kernel_is_image".split()
cases = [case for case in EDGE if case.name in names]
assert len(cases) == len(names)
sys.exit(check(Emulator(Path({str(build(sanitize=True))!r})), cases=cases))
"""
    done = sanitized(script)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count(" right") > 100


def test_sanitizers_find_a_planted_mistake() -> None:
    planted = HERE / "planted"
    sources = (*sorted(planted.glob("*.cu")), *sorted(planted.glob("*.cpp")))
    library = build(sources, sanitize=True)
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
