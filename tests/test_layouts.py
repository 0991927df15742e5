"""Any strides and lazy bits, for every operand; results lie in memory as torch's do."""

import itertools

import pytest
import torch
from torch import Tensor

from deconv_ext.testing import LAYOUTS, Operands, make_case, relayout
from support import (
    OPERATIONS,
    C,
    assert_equal,
    cast,
    define,
    dtype_name,
    each_dtype,
    exact,
    implementations,
    run,
    run_if_accepted,
    run_torch,
    use_isa,
)

CASES = (
    make_case("k4_s2", (2, 5, 6, 7), 9, 4, 2, 1),
    make_case("k2_s2", (3, 4, 4, 5), 5, 2, 2),
    make_case("k3_s1", (2, 17, 5, 6), 6, 3, 1, 1),
    make_case("groups", (2, 6, 4, 5), 10, 3, 2, 1, 1, groups=2),
    make_case("depthwise", (2, 9, 5, 6), 9, 4, 2, 1, groups=9),
    make_case("c_out_1", (2, 7, 5, 4), 1, 5, 3, 2),
)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def permuted(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same values with the axes in another order in memory."""
    inverse = [order.index(axis) for axis in range(tensor.dim())]
    return tensor.permute(order).contiguous().permute(inverse)


@each_dtype(torch.float32, torch.bfloat16, torch.complex64, torch.int64)
@implementations()
def test_every_layout_of_every_operand(op: str, algo: str, isa: str, dtype: torch.dtype) -> None:
    """All pairs of layouts of the two operands."""
    with use_isa(isa):
        for index, case in enumerate(CASES):
            operands, results = exact(case, dtype.is_complex)
            want = results[op].to(dtype)
            laid = {layout: cast(operands, dtype, layout) for layout in LAYOUTS}
            for first, second in itertools.product(LAYOUTS, repeat=2):
                if (LAYOUTS.index(first) + LAYOUTS.index(second)) % 2 == index % 2:
                    t = laid[second]._replace(x=laid[first].x)
                    t = t._replace(dy=laid[first].dy if op == "grad_input" else t.dy)
                    got = run_if_accepted(op, case, t, algo)
                    if got is not None:
                        assert_equal(got, want, (case, first, second))


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_order_of_axes(op: str) -> None:
    """All 24 orders in memory, for x, w and dy; torch fails its own backward for some weights."""
    for case in CASES:
        operands, results = exact(case, False)
        t = cast(operands, torch.float32)
        for order in itertools.permutations(range(4)):
            x, w, dy = (permuted(tensor, order) for tensor in (t.x, t.w, t.dy))
            for changed in (t._replace(x=x, dy=dy), t._replace(w=w), Operands(x, w, t.bias, dy)):
                assert_equal(run(op, case, changed), results[op].float(), (case, order))


@each_dtype(torch.float32, torch.float16, torch.complex64, torch.int64)
@implementations()
def test_expanded(op: str, algo: str, isa: str, dtype: torch.dtype) -> None:
    """Strides of 0 along each axis in turn: one number read for many."""
    with use_isa(isa):
        for case, axis in itertools.product(CASES, range(4)):
            t = cast(exact(case, dtype.is_complex)[0], dtype)
            x, w, dy = (tensor.narrow(axis, 0, 1).expand_as(tensor) for tensor in (t.x, t.w, t.dy))
            expanded = Operands(x, w, t.bias[:1].expand_as(t.bias), dy)
            assert 0 in (x.stride(axis), x.shape[axis] - 1)
            got = run_if_accepted(op, case, expanded, algo)
            if got is not None:
                assert_equal(got, define(op, case, expanded).to(dtype), (case, axis))


@each_dtype(torch.float32, torch.bfloat16, torch.complex64, torch.int64)
def test_bias_layouts(dtype: torch.dtype) -> None:
    for case in CASES:
        operands, results = exact(case, dtype.is_complex)
        t = cast(operands, dtype)
        want = results["forward"].to(dtype)
        for layout in ("sliced", "negative", "conjugate"):
            bias = relayout(t.bias, layout)
            assert_equal(run("forward", case, t._replace(bias=bias)), want, (case, layout))


def test_lazy_bits_are_set() -> None:
    """The layouts are what they are called, or nothing above would be tested."""
    t = CASES[0].operands(0, torch.complex64)
    assert relayout(t.x, "negative").is_neg() and relayout(t.x, "conjugate").is_conj()
    assert min(relayout(t.x, "sliced").stride()) > 1
    assert relayout(t.x, "channels_last").stride(1) == 1
    assert not relayout(t.x, "transposed").is_contiguous()
    for layout in LAYOUTS:
        assert torch.equal(relayout(t.x, layout), t.x)


@pytest.mark.parametrize("x_format", FORMATS)
@pytest.mark.parametrize("w_format", FORMATS)
@each_dtype()
def test_memory_format_of_the_output(x_format: str, w_format: str, dtype: torch.dtype) -> None:
    """torch's rule: channels_last if x or w is, also where the format is ambiguous."""
    ambiguous = (
        make_case("pointwise", (2, 4, 5, 5), 4, 1, groups=4),
        make_case("one_pixel", (2, 4, 1, 1), 6, 3),
        make_case("one_channel_in", (2, 1, 5, 5), 4, 3, 2),
        make_case("one_channel", (2, 1, 5, 5), 1, 3, 2),
        make_case("one_sample", (1, 3, 5, 4), 2, 3, 2),
    )
    for case in (*CASES, *ambiguous):
        t = case.operands(1, dtype if dtype != torch.int64 else torch.int64, exact=True)
        t = t._replace(
            x=t.x.contiguous(memory_format=FORMATS[x_format]),
            w=t.w.contiguous(memory_format=FORMATS[w_format]),
        )
        got, torchs = run("forward", case, t), run_torch("forward", case, t)
        for memory_format in FORMATS.values():
            ours, theirs = (y.is_contiguous(memory_format=memory_format) for y in (got, torchs))
            assert ours == theirs, (case, memory_format, got.stride(), torchs.stride())


@pytest.mark.parametrize("layout", ("transposed", "sliced"))
def test_memory_format_of_other_layouts(layout: str) -> None:
    for case in CASES:
        t = case.operands(1, layout=layout)
        got, torchs = run("forward", case, t), run_torch("forward", case, t)
        assert got.stride() == torchs.stride(), (case, got.stride(), torchs.stride())


@pytest.mark.parametrize("op", OPERATIONS)
def test_operands_stay_as_they_are(op: str) -> None:
    """Nothing is written to an operand, nor to the memory between its elements."""
    for case, layout in itertools.product(CASES, ("contiguous", "channels_last", "sliced")):
        t = case.operands(2, layout=layout)
        buffers = [tensor if tensor._base is None else tensor._base for tensor in t]
        before = [buffer.clone() for buffer in buffers]
        run(op, case, t)
        for buffer, copy in zip(buffers, before):
            assert_equal(buffer, copy, (case, layout, op))


def test_results_are_new_tensors() -> None:
    for dtype in (torch.float32, torch.int64):
        t = cast(exact(CASES[0], False)[0], dtype)
        for op in OPERATIONS:
            got = run(op, CASES[0], t)
            assert got.data_ptr() not in [tensor.data_ptr() for tensor in t], dtype_name(dtype)
            assert not got.requires_grad and got.is_contiguous()
        assert C.grad_bias(t.dy).shape == (CASES[0].c_out,)
