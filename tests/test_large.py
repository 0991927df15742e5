"""Tensors of more than 2^31 elements: every index is 64 bits wide."""

import pytest
import torch

from deconv_ext.testing import Case, Operands, make_case
from support import OPERATIONS, C, assert_equal, define, run, run_if_accepted

# 2 x 3 x 18928^2 outputs of 2 bytes: 4.3 GB; the inputs are 1/64 of it. The offset of the second
# sample, of its last channel and of its last rows do not fit 32 bits, signed or not.
CASE = make_case("large", (2, 2, 2366, 2366), 3, 8, 8)
LAYOUTS = ("contiguous", "channels_last")


def corners(case: Case) -> list[tuple[int, Case, tuple[slice, slice]]]:
    """(sample, problem of a few pixels, where it is in x): the ends of both samples."""
    small = make_case("corner", (1, case.c_in, 5, 7), case.c_out, case.kernel, case.stride)
    rows, columns = (
        (slice(0, 5), slice(case.h - 5, case.h)),
        (slice(0, 7), slice(case.w - 7, case.w)),
    )
    return [(n, small, (r, c)) for n in range(case.batch) for r in rows for c in columns]


def outputs(part: slice) -> slice:
    """The outputs of some inputs, for a kernel as large as its stride."""
    return slice(part.start * CASE.stride[0], part.stop * CASE.stride[0])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_two_to_the_31_elements(layout: str) -> None:
    elements = CASE.batch * CASE.c_out * CASE.output_size[0] * CASE.output_size[1]
    assert elements > 1 << 31
    memory_format = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
    x = torch.randint(-4, 5, CASE.x_shape, dtype=torch.int8).bfloat16()
    t = Operands(
        x.contiguous(memory_format=memory_format),
        torch.randint(-4, 5, CASE.w_shape).bfloat16(),
        torch.randint(-4, 5, (CASE.c_out,)).bfloat16(),
        torch.empty(0),
    )
    y = run("forward", CASE, t)
    assert y.shape == CASE.y_shape and y.is_contiguous(memory_format=memory_format)
    for n, small, (rows, columns) in corners(CASE):
        part = t._replace(x=t.x[n : n + 1, :, rows, columns])
        want = define("forward", small, part).bfloat16()
        assert_equal(y[n : n + 1, :, outputs(rows), outputs(columns)], want, (n, rows, columns))

    # A gradient that is zero but in those places, so that grad_weight has few terms to sum.
    dy = y.zero_()
    expected = torch.zeros(CASE.w_shape, dtype=torch.float64)
    parts = []
    for n, small, (rows, columns) in corners(CASE):
        patch = torch.randint(-2, 3, small.y_shape).bfloat16()
        dy[n : n + 1, :, outputs(rows), outputs(columns)] = patch
        part = Operands(t.x[n : n + 1, :, rows, columns], t.w, t.bias, patch)
        expected += define("grad_weight", small, part)
        parts.append((n, rows, columns, define("grad_input", small, part).bfloat16()))
    t = t._replace(dy=dy)
    assert_equal(run("grad_weight", CASE, t), expected.bfloat16(), layout)
    dx = run("grad_input", CASE, t)
    for n, rows, columns, want in parts:
        assert_equal(dx[n : n + 1, :, rows, columns], want, (n, rows, columns))


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("groups", (1, 2))
def test_strides_beyond_32_bits(op: str, axis: int, groups: int) -> None:
    """A small view of a large buffer: 2^31 elements and more from one index to the next."""
    case = make_case("far", (2, 2, 2, 2), 2, 2, 2, groups=groups)
    t = case.operands(0, torch.bfloat16, exact=True)

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with that stride in untouched virtual memory."""
        if tensor.shape[axis] == 1:
            return tensor
        stride = list(tensor.stride())
        stride[axis] = (1 << 31) + 64
        memory = torch.empty((tensor.shape[axis] - 1) * stride[axis] + 64, dtype=tensor.dtype)
        return memory.as_strided(tensor.shape, stride).copy_(tensor)

    want = define(op, case, t).bfloat16()
    for name in {"forward": "xw", "grad_input": ("dy", "w"), "grad_weight": ("x", "dy")}[op]:
        changed = t._replace(**{name: spread(getattr(t, name))})
        for algo in C.list_algorithms(op):
            got = run_if_accepted(op, case, changed, algo)
            if got is not None:
                assert_equal(got, want, (op, name, algo))
