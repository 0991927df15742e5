"""Errors against a longer arithmetic are no larger than torch's own on the same numbers.

Twice torch's, since the order of summation differs, and a rounding of the result is allowed on top,
so that a lucky torch sets no impossible mark. An algorithm forced on a problem that it was not made
for may sum in a worse order than torch: it is held to the error of adding term after term.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deconv_ext.testing import LAYERS, Case, Operands, make_case
from support import (
    FLOATS,
    OPERATIONS,
    C,
    define_wide,
    dtype_name,
    each_dtype,
    implementations,
    run,
    run_if_accepted,
    run_torch,
    use_isa,
)

LARGE = [layer.reduced(1_500_000) for layer in LAYERS]
# A few where sums are long, to force every implementation through.
LONG = (
    make_case("long_forward", (1, 1500, 4, 5), 10, 4, 2, 1),
    make_case("long_grad_input", (1, 6, 9, 9), 300, 5, 2, 2, 1),
    make_case("long_grad_weight", (4, 3, 40, 41), 5, 3, 2, 1, 1),
    make_case("long_depthwise", (2, 20, 33, 30), 20, 8, 4, 2, groups=20),
    make_case("short", (2, 7, 6, 5), 9, 3, 2, 1, 1),
)


@dataclasses.dataclass
class Error:
    """Largest and root-mean-square deviation from the definition."""

    largest: float
    rms: float

    @classmethod
    def of(cls, got: torch.Tensor, want: NDArray[Any]) -> Error:
        wide = got.float() if got.dtype in (torch.float16, torch.bfloat16) else got
        deviation = np.abs(wide.numpy() - want)
        return cls(float(deviation.max()), float(np.sqrt(np.mean(deviation**2))))


def check(what: object, got: torch.Tensor, want: NDArray[Any], torchs: torch.Tensor) -> None:
    ours, theirs = Error.of(got, want), Error.of(torchs, want)
    size, eps = np.abs(want), torch.finfo(got.dtype).eps
    assert ours.rms <= 2 * theirs.rms + eps / 4 * np.sqrt(np.mean(size**2)), (what, ours, theirs)
    assert ours.largest <= 2 * theirs.largest + eps * size.max(), (what, ours, theirs)


Problem = tuple[Operands, NDArray[Any], torch.Tensor]


def problem(op: str, case: Case, dtype: torch.dtype, seed: int) -> Problem:
    """Operands, the definition with more digits than the dtype has, and torch's result."""
    t = case.operands(seed, dtype)
    wide = {
        torch.float64: np.longdouble,
        torch.complex128: np.clongdouble,
        torch.complex64: np.complex128,
    }
    return t, define_wide(op, case, t, wide.get(dtype, np.float64)), run_torch(op, case, t)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize(
    "case,dtype",
    [
        pytest.param(case, dtype, id=f"{case}-{dtype_name(dtype)}")
        for index, case in enumerate(LARGE)
        for dtype in (torch.float32, torch.bfloat16, (torch.float64, torch.float16)[index % 2])
    ],
)
def test_layers(case: Case, op: str, dtype: torch.dtype, seed: int) -> None:
    """Layers of real networks, with all of their channels, by default."""
    t, want, torchs = problem(op, case, dtype, seed)
    check(case, run(op, case, t), want, torchs)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("dtype", (torch.complex64, torch.complex128), ids=dtype_name)
def test_complex(op: str, dtype: torch.dtype, seed: int) -> None:
    for case in LONG:
        t, want, torchs = problem(op, case, dtype, seed)
        check(case, run(op, case, t), want, torchs)


@each_dtype(*FLOATS)
@implementations()
def test_long_sums(op: str, algo: str, isa: str, dtype: torch.dtype, seed: int) -> None:
    """Every implementation: K terms added one after the other err by about eps * sqrt(K) / 5."""
    eps = torch.finfo(dtype).eps
    sum_eps = min(eps, torch.finfo(torch.float32).eps)  # half precision is summed in float32
    accepted = 0
    for case, (t, want) in zip(LONG, long_problems(op, dtype)):
        with use_isa(isa):
            got = run_if_accepted(op, case, t, algo)
        if got is None:
            continue
        accepted += 1
        error = Error.of(got, want)
        size = np.sqrt(np.mean(want**2))
        terms = case.macs / want.size
        assert error.rms <= (eps / 2 + sum_eps * np.sqrt(terms) / 2) * size, (case, error, size)
    assert accepted > 0


@functools.cache
def long_problems(op: str, dtype: torch.dtype) -> list[tuple[Operands, NDArray[Any]]]:
    """Operands and results of `LONG`, the same for every implementation."""
    layouts = ("contiguous" if case.groups == 1 else "channels_last" for case in LONG)
    operands = [
        case.operands(i, dtype, layout) for i, (case, layout) in enumerate(zip(LONG, layouts))
    ]
    return [(t, define_wide(op, case, t, np.longdouble)) for case, t in zip(LONG, operands)]


@each_dtype(*FLOATS)
def test_grad_bias(dtype: torch.dtype, seed: int) -> None:
    dy = torch.randn(3, 5, 71, 67, dtype=torch.float64).to(dtype)
    want = dy.double().numpy().astype(np.longdouble).sum((0, 2, 3))
    check(dtype, C.grad_bias(dy), want, dy.sum((0, 2, 3)))


def test_the_error_is_seen() -> None:
    """The bounds have teeth: a sum kept in bfloat16, or one lost product, exceeds them."""
    case = LONG[0]
    t, want, torchs = problem("forward", case, torch.bfloat16, 1)
    rounded = torch.zeros(case.y_shape, dtype=torch.bfloat16)
    for channel in range(300):
        part = t._replace(x=torch.zeros_like(t.x), bias=torch.zeros_like(t.bias))
        part.x[:, channel::300] = t.x[:, channel::300]
        rounded += run_torch("forward", case, part)
    with pytest.raises(AssertionError):
        check(case, rounded + t.bias.view(-1, 1, 1), want, torchs)

    t, want, torchs = problem("forward", case, torch.float32, 1)
    lost = torchs.clone()
    lost[0, 0, 0, 0] -= t.x[0, 0, 0, 0] * t.w[0, 0, 1, 1]
    with pytest.raises(AssertionError):
        check(case, lost, want, torchs)
