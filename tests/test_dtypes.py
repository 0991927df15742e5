"""Every dtype that torch's operator takes, with the accumulation that keeps its promise."""

import pytest
import torch

from deconv_ext.testing import make_case
from support import (
    DTYPES,
    OPERATIONS,
    C,
    assert_equal,
    cast,
    define,
    each_dtype,
    exact,
    implementations,
    run,
    run_if_accepted,
    run_torch,
    use_isa,
)

CASE = make_case("all_features", (2, 6, 5, 4), 9, (3, 4), (2, 3), (1, 0), (1, 2), (2, 1), 3)
#: The layer of a report that half precision differs by 736 between two devices.
REPORTED = make_case("report_736", (9, 9, 20, 52), 11, (12, 84), 1, 12)


@each_dtype()
@pytest.mark.parametrize("op", OPERATIONS)
def test_dtype_is_kept(op: str, dtype: torch.dtype) -> None:
    operands, results = exact(CASE, dtype.is_complex)
    got = run(op, CASE, cast(operands, dtype))
    assert got.dtype == dtype
    assert_equal(got, results[op].to(dtype), CASE)
    assert C.grad_bias(operands.dy.to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    "dtype", (torch.int32, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn), ids=str
)
def test_other_dtypes_are_refused_as_torch_refuses_them(dtype: torch.dtype) -> None:
    t = [torch.ones(shape).to(dtype) for shape in (CASE.x_shape, CASE.w_shape, (9,), CASE.y_shape)]
    t = type(CASE.operands(0))(*t)
    with pytest.raises(NotImplementedError, match="not implemented for"):
        run_torch("forward", CASE, t)
    for op in OPERATIONS:
        with pytest.raises(NotImplementedError, match="not implemented for"):
            run(op, CASE, t)
    with pytest.raises(NotImplementedError, match="not implemented for"):
        C.grad_bias(t.dy)


@each_dtype(torch.float16, torch.bfloat16)
@implementations()
def test_half_accumulates_in_float32(op: str, algo: str, isa: str, dtype: torch.dtype) -> None:
    """1023 ones on top of 4096: each would vanish in a sum of half precision."""
    channels = make_case("over_channels", (1, 1024, 1, 1), 1024, 1)
    pixels = make_case("over_pixels", (1, 8, 32, 32), 8, 63, 1, 31, groups=8)  # all reach all
    neighbours = make_case("neighbours", (1, 1024, 1, 6), 1024, (1, 2))
    accepted = 0
    for case in (channels, neighbours, pixels):
        t = case.operands(0, dtype, "channels_last" if case.groups > 1 else "contiguous")
        for tensor in t:
            tensor.fill_(1)
        t.bias.zero_()
        if case is pixels:
            t.x[..., 0, 0] = t.dy[..., 0, 0] = 4096
        else:
            t.x[:, 0] = t.dy[:, 0] = 4096
        if op == "grad_weight":  # sums over pixels alone, and only the tap in the middle over all
            t.dy.fill_(1)
        with use_isa(isa):
            got = run_if_accepted(op, case, t, algo)
        if got is not None and (case is pixels or op != "grad_weight"):
            accepted += 1
            got = got[..., 31:32, 31:32] if op == "grad_weight" else got
            taps = 2 if case is neighbours else 1
            got = got[..., 1:-1] if case is neighbours else got
            assert_equal(got, torch.full_like(got, taps * (4096 + 1023)), (op, algo, isa))
    assert accepted > 0


@pytest.mark.parametrize("op", OPERATIONS)
def test_half_precision_of_a_long_sum(op: str) -> None:
    """Values from -1 to 13 and -2 to -1 under 84-wide kernels: exact but for one rounding."""
    t = REPORTED.operands(0, torch.float16)
    for tensor, low, high in ((t.x, -1, 13), (t.w, -2, -1), (t.dy, -1, 2)):
        tensor.copy_(torch.randint(low, high + 1, tensor.shape))
    want = define(op, REPORTED, t)
    assert want.abs().max() > 4096  # where halves are 4 apart
    assert_equal(run(op, REPORTED, t), want.half(), REPORTED)


@each_dtype(torch.complex64, torch.complex128)
@pytest.mark.parametrize("op", OPERATIONS)
def test_complex_is_linear_in_each_operand(op: str, dtype: torch.dtype) -> None:
    """i*x gives i*y, for both operands: parts are not swapped, and nothing is conjugated."""
    t = cast(exact(CASE, True)[0], dtype)._replace(bias=torch.zeros(9, dtype=dtype))
    y = run(op, CASE, t)
    assert_equal(
        run(op, CASE, t._replace(x=1j * t.x, dy=t.dy if op != "grad_input" else 1j * t.dy)),
        1j * y,
        op,
    )
    other = t._replace(dy=1j * t.dy) if op == "grad_weight" else t._replace(w=1j * t.w)
    assert_equal(run(op, CASE, other), 1j * y, op)


def test_integers_wrap_as_torchs_do() -> None:
    t = exact(CASE, False)[0]
    large = t._replace(x=t.x + (1 << 62), w=t.w * 3)
    assert_equal(run("forward", CASE, large), run_torch("forward", CASE, large), CASE)


@each_dtype(*DTYPES)
def test_no_operation_promotes(dtype: torch.dtype) -> None:
    t = cast(exact(CASE, False)[0], dtype)
    others = {torch.float64: torch.float32, torch.complex64: torch.complex128}
    other = others.get(dtype, torch.complex64 if dtype.is_complex else torch.float64)
    for changed in (t._replace(w=t.w.to(other)), t._replace(x=t.x.to(other), dy=t.dy.to(other))):
        with pytest.raises(RuntimeError, match="should be the same"):
            run("forward", CASE, changed)
        with pytest.raises(RuntimeError, match="should be the same"):
            run("grad_input", CASE, changed)
    with pytest.raises(RuntimeError, match="should be the same"):
        run("grad_weight", CASE, t._replace(dy=t.dy.to(other)))
    with pytest.raises(RuntimeError, match="should be the same"):
        run("forward", CASE, t._replace(bias=t.bias.to(other)))
