"""The definition that the other tests compare with, itself compared with loops and torch."""

import itertools

import pytest
import torch

from deconv_ext.testing import EDGE, random_case
from support import OPERATIONS, assert_equal, define, exact, run_torch


def loops(op: str, case, t) -> torch.Tensor:
    """The scatter form, one multiply-add at a time."""
    shape = {"forward": case.y_shape, "grad_input": case.x_shape, "grad_weight": case.w_shape}[op]
    result = torch.zeros(shape, dtype=torch.int64)
    if op == "forward":
        result += t.bias.view(-1, 1, 1)
    channels_in, channels_out = case.c_in // case.groups, case.c_out // case.groups
    x, w, dy = t.x.tolist(), t.w.tolist(), t.dy.tolist()
    for n, ci, co, h, v, kh, kw in itertools.product(
        *map(range, (case.batch, case.c_in, channels_out, *case.input_size, *case.kernel))
    ):
        oh = h * case.stride[0] + kh * case.dilation[0] - case.padding[0]
        ow = v * case.stride[1] + kw * case.dilation[1] - case.padding[2]
        if not (0 <= oh < case.output_size[0] and 0 <= ow < case.output_size[1]):
            continue
        out = ci // channels_in * channels_out + co
        if op == "forward":
            result[n, out, oh, ow] += x[n][ci][h][v] * w[ci][co][kh][kw]
        elif op == "grad_input":
            result[n, ci, h, v] += dy[n][out][oh][ow] * w[ci][co][kh][kw]
        else:
            result[ci, co, kh, kw] += x[n][ci][h][v] * dy[n][out][oh][ow]
    return result


@pytest.mark.parametrize("op", OPERATIONS)
def test_definition_is_the_scatter_loop(op: str) -> None:
    cases = [case for case in (*EDGE, *map(random_case, range(40))) if case.macs < 1500]
    assert len(cases) > 20
    for case in cases:
        operands, results = exact(case, False)
        assert_equal(results[op], loops(op, case, operands), case)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("is_complex", (False, True))
def test_definition_is_torchs(op: str, is_complex: bool) -> None:
    dtype = torch.complex128 if is_complex else torch.float64
    cases = [case for case in (*EDGE, *map(random_case, range(60))) if case.is_symmetric]
    assert len(cases) > 60
    for index, case in enumerate(cases):
        t = case.operands(index, dtype)
        torch.testing.assert_close(run_torch(op, case, t), define(op, case, t), msg=str(case))
