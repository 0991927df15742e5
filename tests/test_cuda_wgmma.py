"""The wgmma kernels (sm_90a), run on the CPU: every tile, exact, in few and in many blocks.

They have a file of their own, since a block of theirs has 384 threads, and roles. What each launch
is checked for is in cuda_on_cpu/emulation.h.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deconv_ext.testing import Case, Operands, make_case
from emulator import OPERATIONS, Emulator, build, bytes_written
from support import assert_equal, assert_same_bits, cast, exact

MACHINE = Emulator(build())
TILES = [name for name in MACHINE.algorithms("forward") if name.startswith("wgmma:")]
WEIGHT_TILES = [name for name in MACHINE.algorithms("grad_weight") if name.startswith("wgmma:")]
# A pair for each run: all eight meet every tile.
SETTINGS = [
    (dtype, layout)
    for dtype in (torch.float16, torch.bfloat16)
    for layout in ("contiguous", "channels_last", "sliced", "transposed")
]

CASES = (
    make_case("k4_s2", (2, 24, 9, 10), 40, 4, 2, 1, 1),
    make_case("k2_s2", (1, 16, 5, 17), 72, 2, 2),
    make_case("k3_s2_odd", (1, 13, 6, 7), 5, 3, 2, 1, (0, 1)),
    make_case("k3_s1", (3, 8, 10, 9), 8, 3, 1, 1),
    make_case("k1_s2", (2, 9, 4, 5), 8, 1, 2),
    make_case("k5_s4", (1, 8, 4, 9), 16, 5, 4, 2),
    make_case("k3_s3", (1, 17, 3, 9), 12, 3, 3),
    make_case("k2_far", (1, 8, 14, 13), 8, 2, 2, 4, 0, 24),
    make_case("groups", (1, 32, 5, 6), 24, 3, 2, 1, 1, groups=2),
    make_case("small_images", (7, 8, 2, 3), 8, 2, 1),
    make_case("chunks", (1, 200, 3, 9), 16, (3, 2), (1, 2)),
    make_case("rows", (1, 8, 4, 9), 264, 2, 2),
)

RUNS = [(op, algo) for op in OPERATIONS[:2] for algo in TILES]
RUNS += [("grad_weight", algo) for algo in WEIGHT_TILES]
each_run = pytest.mark.parametrize(("op", "algo"), RUNS, ids=lambda it: it.replace(":", "-"))
each_op = pytest.mark.parametrize("op", OPERATIONS[:2])


@pytest.fixture(autouse=True)
def _hopper() -> None:
    """Of few multiprocessors, so that a block takes one tile after another."""
    MACHINE.set_device(2)


def run(op: str, case: Case, t: Operands, algo: str, seed: int = 0) -> Tensor:
    MACHINE.seed(seed)
    return MACHINE.run(op, case, t, algo)


def test_there_are_tiles() -> None:
    assert len(TILES) >= 5 and TILES == [
        name for name in MACHINE.algorithms("grad_input") if name.startswith("wgmma:")
    ]
    assert len(WEIGHT_TILES) >= 3


@each_run
def test_exact(op: str, algo: str) -> None:
    for index, case in enumerate(CASES):
        dtype, layout = SETTINGS[(index + 3 * RUNS.index((op, algo))) % len(SETTINGS)]
        operands, results = exact(case, False)
        got = run(op, case, cast(operands, dtype, layout), algo, index)
        assert_equal(got, results[op].to(dtype), (case, dtype, layout))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@each_op
def test_two_buffers_are_enough(op: str, layout: str) -> None:
    """In as little shared memory as it takes, roles do not wait for each other in a circle."""
    case = make_case("long", (1, 200, 3, 9), 136, (3, 2), (1, 2))
    operands, results = exact(case, False)
    t = cast(operands, torch.bfloat16, layout)
    for kilobytes in range(40, 228, 4):  # less than any buffer has
        MACHINE.set_device(2, shared_bytes=kilobytes << 10)
        try:
            got = run(op, case, t, "wgmma:64x128x4")
        except ValueError:
            continue
        assert_equal(got, results[op].to(torch.bfloat16), kilobytes)
        assert kilobytes > 40
        return
    raise AssertionError("there is no room for it")


@each_run
def test_order_and_blocks_do_not_matter(op: str, algo: str) -> None:
    """The same bits whatever the order of threads and copies, and the tiles of a block."""
    case = make_case("order", (2, 40, 9, 9), 72, 3, 2, 1)
    t = case.operands(0, torch.float16, "channels_last" if "last" in algo else "contiguous")
    first = run(op, case, t, algo, 1)
    if op != "grad_weight":  # whose splits depend on them
        MACHINE.set_device(132)
    assert_same_bits(run(op, case, t, algo, 2), first, case)


@pytest.mark.parametrize("algo", WEIGHT_TILES)
def test_splits_are_exact(algo: str) -> None:
    """On many multiprocessors the pixels are split among blocks, whose sums are added."""
    case = make_case("splits", (5, 24, 19, 18), 40, 2, 2)
    operands, results = exact(case, False)
    MACHINE.set_device(132)
    with MACHINE.counting() as launches:
        got = run("grad_weight", case, cast(operands, torch.bfloat16, "channels_last"), algo)
    assert_equal(got, results["grad_weight"].to(torch.bfloat16), algo)
    assert [launch["kernel"] for launch in launches] == ["wgmma_weight", "gemm_weight_reduce"]


@each_run
def test_results_are_written_once(op: str, algo: str) -> None:
    case = make_case("once", (1, 16, 9, 9), 24, 4, 2, 1)
    t = case.operands(0, torch.bfloat16, "channels_last" if "last" in algo else "contiguous")
    with MACHINE.counting() as launches:
        result = run(op, case, t, algo)
    assert bytes_written(launches, op) == result.numel() * result.itemsize


@each_op
@pytest.mark.parametrize("algo", ("wgmma:128x128x2", "wgmma:128x128_last"))
def test_padding_does_not_meet_infinity(op: str, algo: str) -> None:
    """An infinite weight makes infinities where the definition has them, and NaN nowhere."""
    case = make_case("infinite", (1, 8, 4, 5), 8, 3, 2, 1)
    t = cast(exact(case, False)[0], torch.float16)
    t.x.abs_().add_(1)
    t.dy.abs_().add_(1)
    t.w.abs_()[3, 2, 0, 1] = float("inf")
    got = run(op, case, t, algo)
    assert not got.isnan().any() and got.isinf().any() and not got.isinf().all()


def test_says_what_it_is_not_for() -> None:
    case = make_case("declined", (1, 16, 6, 8), 16, 4, 2, 1)
    half, single = (case.operands(0, dtype) for dtype in (torch.float16, torch.float32))
    with pytest.raises(ValueError, match="only float16 and bfloat16 have wgmma kernels"):
        run("forward", case, single, "wgmma")
    for op in OPERATIONS:
        with pytest.raises(ValueError, match="it has no such tile"):
            run(op, case, half, "wgmma:17x17")
    for capability in ((8, 0), (10, 0)):
        MACHINE.set_device(2, capability)
        with pytest.raises(ValueError, match="needs a device of compute capability 9.0"):
            run("forward", case, half, "wgmma")


def launched(op: str, case: Case, dtype: torch.dtype, layout: str = "contiguous") -> str:
    with MACHINE.counting() as launches:
        MACHINE.run(op, case, case.operands(0, dtype, layout))
    return next(launch["kernel"] for launch in launches if launch["kernel"] != "gemm_pack")


@each_op
def test_is_taken_for_problems_that_fill_it(op: str) -> None:
    """... on devices that have it, whatever the batch."""
    case = make_case("large", (1, 64, 16, 16), 64, 1, 1)
    assert launched(op, case, torch.bfloat16) == "wgmma_gather"
    assert launched(op, case, torch.float32) == "gemm_gather"
    few = make_case("few_channels", (1, 16, 16, 16), 64, 1, 1)
    assert launched(op, few, torch.bfloat16) == "gemm_gather"
    MACHINE.set_device(2, (8, 0))
    assert launched(op, case, torch.bfloat16) == "gemm_gather"


def test_grad_weight_takes_it_where_channels_are_contiguous() -> None:
    case = make_case("large", (1, 96, 16, 16), 32, 1, 1)
    half = torch.bfloat16
    assert launched("grad_weight", case, half, "channels_last") == "wgmma_weight"
    assert launched("grad_weight", case, half) == "gemm_weight"
    few = make_case("few_channels", (1, 64, 16, 16), 32, 1, 1)
    assert launched("grad_weight", few, half, "channels_last") == "gemm_weight"
