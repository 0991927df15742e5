"""Integers come out exact, for every algorithm, instruction set, dtype and layout.

The operands are integers of at most 16, so float32 sums them without error and only the rounding of
the result to its dtype may act, once: `definition.to(dtype)` is the one right answer.
"""

import functools
import itertools

import pytest
import torch

from deconv_ext.testing import EDGE, TINY, Case, Operands, make_case, random_case
from support import (
    DTYPES,
    C,
    assert_equal,
    cast,
    dtype_name,
    each_dtype,
    exact,
    implementations,
    run,
    run_if_accepted,
    stream_results,
    use_isa,
)

CASES = (*TINY, *EDGE, *(random_case(seed) for seed in range(80)))


@functools.lru_cache(2 * len(CASES))
def arranged(case: Case, dtype: torch.dtype, layout: str) -> Operands:
    """Made once for all implementations, which run one after the other."""
    return cast(exact(case, dtype.is_complex)[0], dtype, layout)


@implementations()
@each_dtype()
def test_exact(op: str, algo: str, isa: str, dtype: torch.dtype) -> None:
    """Accepted problems are right, and the problems that the algorithm is for are accepted."""
    accepted = 0
    with use_isa(isa):
        for index, case in enumerate(CASES):
            want = exact(case, dtype.is_complex)[1][op].to(dtype)
            turn = index + DTYPES.index(dtype)  # every case in every layout, but not in every dtype
            usual = ("contiguous", "channels_last")[turn % 2]
            for layout in (usual, ("sliced", "transposed", "negative", "conjugate")[turn % 4]):
                got = run_if_accepted(op, case, arranged(case, dtype, layout), algo)
                if got is not None:
                    accepted += 1
                    assert_equal(got, want, (case, layout))
    assert accepted > 0 or dtype == torch.int64 or (algo == "depthwise" and dtype.is_complex)


@each_dtype()
@pytest.mark.parametrize("op", ("forward", "grad_input", "grad_weight"))
def test_exact_by_default(op: str, dtype: torch.dtype) -> None:
    """What a user gets: the choice of algorithm accepts everything, in mixed layouts too."""
    layouts = itertools.cycle(
        itertools.product(("contiguous", "channels_last", "sliced"), repeat=3)
    )
    for case, (x, w, dy) in zip(CASES, layouts):
        operands, results = exact(case, dtype.is_complex)
        mixed = [cast(operands, dtype, layout) for layout in (x, w, dy)]
        t = mixed[0]._replace(w=mixed[1].w, dy=mixed[2].dy)
        assert_equal(run(op, case, t), results[op].to(dtype), (case, x, w, dy))


@implementations("forward", "grad_input")
@each_dtype(torch.float64, torch.float32, torch.float16, torch.bfloat16)
def test_exact_past_the_caches(op: str, algo: str, isa: str, dtype: torch.dtype) -> None:
    with use_isa(isa), stream_results():
        for case in (*EDGE, *WIDE):
            got = run_if_accepted(op, case, arranged(case, dtype, "contiguous"), algo)
            if got is not None:
                assert_equal(got, exact(case, False)[1][op].to(dtype), case)


WIDE = [
    make_case("halves", (1, 9, 2, 4500), 2, 4, 2, 1),
    make_case("thirds", (1, 2, 2, 3100), 9, 5, 3, 2, 1),
    make_case("eighths", (2, 2, 1, 1200), 3, 16, 8, 4),
    make_case("sixteenths", (1, 2, 1, 700), 3, 33, 16, 0),
    make_case("depthwise", (1, 3, 2, 4500), 3, 4, 2, 1, groups=3),
    make_case("spread", (1, 2, 1, 5000), 2, (1, 3), 1, (0, 70), dilation=(1, 150)),
]


# Several blocks and images, whose taps share few channels.
FEW = [
    make_case("few of dy", (3, 20, 40, 37), 3, 4, 2, 1),
    make_case("steps", (2, 17, 23, 50), 2, (5, 7), (2, 3), (2, 3)),
    make_case("groups", (2, 32, 30, 33), 4, 5, 2, 2, groups=2),
    make_case("one", (1, 70, 50, 64), 1, 9, 3, 4, 2),
    make_case("few of x", (2, 3, 60, 41), 24, 4, 2, 1),
    make_case("dilated", (2, 3, 30, 41), 24, 3, 1, 2, dilation=2),
    make_case("few of y", (3, 70, 20, 30), 2, 3, 1, 1),
    make_case("wide", (2, 40, 9, 600), 1, 5, 1, 2),
    # Taps of one residue so far apart that each has a copy of the rows, as many as residues.
    make_case("two far", (2, 2, 9, 150), 2, (1, 2), (1, 2), dilation=(1, 200)),
    make_case("four far", (1, 2, 3, 400), 3, (2, 4), (1, 4), 0, (0, 1), (3, 300)),
    # Sums of one to four terms: of dy, at edges, of x with a bias, of groups.
    make_case("one term", (2, 64, 21, 37), 1, 1, 1),
    make_case("two terms", (2, 48, 21, 37), 1, (1, 2), (1, 2)),
    make_case("three terms", (2, 32, 21, 37), 3, 1, 2, output_padding=1),
    make_case("four terms", (3, 64, 40, 50), 1, 2, 2),
    make_case("four overlapping terms", (3, 32, 40, 50), 1, 2, 1, 1),
    make_case("four of x", (2, 4, 31, 29), 48, 1, 1),
    make_case("four of each group", (2, 96, 19, 23), 2, 2, 2, groups=2),
]


@implementations()
@pytest.mark.parametrize("case", [*WIDE, *FEW], ids=str)
def test_long_rows_and_many_rows(op: str, algo: str, isa: str, case: Case) -> None:
    """Rows are handled in pieces of a few thousand pixels, with taps that reach over their ends;
    images in blocks that end anywhere."""
    operands, results = exact(case, False)
    with use_isa(isa):
        for layout in ("contiguous", "channels_last"):
            got = run_if_accepted(op, case, cast(operands, torch.float32, layout), algo)
            if got is not None:
                assert_equal(got, results[op].to(torch.float32), (case, layout))


@each_dtype()
def test_forward_without_bias(dtype: torch.dtype) -> None:
    for case in CASES:
        operands, results = exact(case, dtype.is_complex)
        t = cast(operands, dtype)
        want = (results["forward"] - operands.bias.view(-1, 1, 1)).to(dtype)
        assert_equal(C.forward(t.x, t.w, None, *case.geometry), want, case)


@each_dtype()
def test_grad_bias(dtype: torch.dtype) -> None:
    for case, layout in itertools.product(
        CASES, ("contiguous", "channels_last", "sliced", "transposed")
    ):
        operands, _ = exact(case, dtype.is_complex)
        want = operands.dy.sum((0, 2, 3)).to(dtype)
        assert_equal(C.grad_bias(cast(operands, dtype, layout).dy), want, (case, layout))


def test_the_answers_are_not_trivial() -> None:
    """A kernel that returns zeros, or the bias alone, would be found out."""
    for case in CASES:
        operands, results = exact(case, False)
        if case.macs > 50:
            for op, result in results.items():
                assert result.count_nonzero() > result.numel() // 20, (op, case)
                assert result.unique().numel() > 1, (op, case)
            assert not torch.equal(
                results["forward"], operands.bias.view(-1, 1, 1).expand(case.y_shape)
            )


def test_half_rounds_once() -> None:
    """Some exact sums are no bfloat16: rounding before adding the bias would give other numbers."""
    found = 0
    for case in CASES:
        operands, results = exact(case, False)
        y = results["forward"]
        bias = operands.bias.view(-1, 1, 1)
        twice = (y - bias).bfloat16() + bias.bfloat16()
        found += int((twice != y.bfloat16()).sum())
    assert found > 100, dtype_name(torch.bfloat16)


@pytest.mark.parametrize("kernel", (2, 4, (1, 2), (3, 4)))
@pytest.mark.parametrize("isa", C.cpu_isas())
def test_exact_where_phases_take_turns(isa: str, kernel: int | tuple[int, int]) -> None:
    """Kernel = stride in NCHW: rows of pixels that divide vectors or not, many channels, groups."""
    shapes = ((2, 16, 9, 48), (3, 6, 14, 14), (1, 700, 5, 37), (2, 12, 4, 5), (5, 24, 1, 64))
    for shape, c_out, groups in itertools.product(shapes, (1, 7, 24), (1, 2)):
        case = make_case("turns", shape, c_out * groups, kernel, kernel, groups=groups)
        operands, results = exact(case, False)
        for dtype in (torch.float32, torch.float64):
            t = cast(operands, dtype)
            with use_isa(isa):
                assert_equal(run("forward", case, t), results["forward"].to(dtype), case)
                no_bias = C.forward(t.x, t.w, None, *case.geometry, algo="auto")
            assert_equal(no_bias + t.bias[:, None, None], results["forward"].to(dtype), case)


@pytest.mark.parametrize("padding", (0, 3, (1, 5)))
@pytest.mark.parametrize("isa", C.cpu_isas())
def test_exact_where_the_taps_of_a_row_are_one_copy(
    isa: str, padding: int | tuple[int, int]
) -> None:
    """grad_input of large kernels in NCHW, whose taps fill a panel or not; channels, groups."""
    shapes = ((2, 21, 7, 6), (1, 50, 3, 19), (9, 4, 5, 5))
    kernels = ((16, 8), (9, 9), ((40, 31), (17, 16)), ((3, 24), (3, 9)))
    for shape, (kernel, stride), c_out, groups in itertools.product(
        shapes, kernels, (2, 5), (1, 2)
    ):
        channels = (shape[0], shape[1] * groups, *shape[2:])
        case = make_case("runs", channels, c_out * groups, kernel, stride, padding, groups=groups)
        operands, results = exact(case, False)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            with use_isa(isa):
                got = run("grad_input", case, cast(operands, dtype))
            assert_equal(got, results["grad_input"].to(dtype), case)
