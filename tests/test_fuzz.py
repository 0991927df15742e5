"""Any arguments, legal or not: torch and we accept the same, with equal values and gradients."""

import contextlib

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from deconv_ext.functional import conv_transpose2d
from deconv_ext.testing import LAYOUTS, relayout
from support import in_memory

SETTINGS = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
NUMBERS = st.integers(-1, 4)
ANYTHING = st.one_of(
    NUMBERS,
    st.lists(NUMBERS, max_size=3),
    st.tuples(NUMBERS, NUMBERS),
    st.sampled_from([1.0, 2.5, True, None, "3", (1, 2.0), (2,), [True, 1], (1, None)]),
)


@st.composite
def problems(draw) -> dict:
    """A legal call: shapes of x, w and bias, and the other arguments."""
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    c_in, c_out = (groups * draw(st.integers(1, 3)) for _ in range(2))
    kernel, stride, dilation = (
        (draw(st.integers(1, 3)), draw(st.integers(1, 3))) for _ in range(3)
    )
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
    size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    padding = []
    for n, k, s, d, e in zip(size, kernel, stride, dilation, extra):
        padding.append(draw(st.integers(0, min(3, ((n - 1) * s + d * (k - 1) + e) // 2))))
    batch = draw(st.sampled_from(((), (0,), (1,), (2,), (3,))))
    return {
        "x": (*batch, c_in, *size),
        "w": (c_in, c_out // groups, *kernel),
        "bias": draw(st.sampled_from((None, (c_out,)))),
        "stride": stride,
        "padding": tuple(padding),
        "output_padding": extra,
        "groups": groups,
        "dilation": dilation,
    }


@st.composite
def mutations(draw) -> dict:
    """A legal call with one argument replaced by whatever comes."""
    problem = draw(problems())
    name = draw(st.sampled_from(tuple(problem)))
    if name in ("x", "w"):
        shape = list(problem[name])
        if draw(st.booleans()):
            shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 4))
        else:
            shape = draw(st.lists(st.integers(0, 4), max_size=5))
        problem[name] = tuple(shape)
    elif name == "bias":
        problem[name] = tuple(draw(st.lists(st.integers(0, 6), max_size=2)))
    else:
        problem[name] = draw(ANYTHING)
    return problem


def result(
    function,
    problem: dict,
    dtype: torch.dtype,
    layouts: tuple[str, ...] = (),
    fakes: FakeTensorMode | None = None,
) -> list | Exception:
    """Values and gradients, or the refusal; the numbers depend on the shapes alone.

    With `fakes` of tensors without numbers.
    """
    generator = torch.Generator().manual_seed(0)

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    named = dict(problem)
    operands = [
        tensor(shape) for shape in (named.pop(n) for n in ("x", "w", "bias")) if shape is not None
    ]
    for index, layout in enumerate(layouts):
        if operands[index].dim() == 4 or layout not in ("channels_last", "transposed"):
            operands[index] = relayout(operands[index], layout)
    if fakes:
        operands = [fakes.from_tensor(operand) for operand in operands]
    operands = [operand.requires_grad_() for operand in operands]
    try:
        with fakes or contextlib.nullcontext():
            y = function(*operands, **named)
            dy = torch.empty(y.shape, dtype=dtype) if fakes else tensor(y.shape)
            return [y.detach(), *torch.autograd.grad(y, operands, dy)]
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError) as error:
        return error


def judged_by_torch(problem: dict) -> list | Exception:
    """torch's result; for an empty batch, torch's verdict on the same call with one sample.

    With an empty batch torch checks next to nothing: it returns images without pixels, takes an
    output_padding beyond the stride, and stumbles over an empty weight with an IndexError.
    """
    if len(problem["x"]) == 4 and problem["x"][0] == 0:
        one = result(F.conv_transpose2d, {**problem, "x": (1, *problem["x"][1:])}, torch.float64)
        if isinstance(one, Exception):
            return one
    return result(F.conv_transpose2d, problem, torch.float64)


@settings(SETTINGS, max_examples=150)
@given(
    problems(),
    st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    st.sampled_from(("float64", "complex128")),
)
def test_legal_calls_agree(problem: dict, layouts: tuple[str, str], dtype: str) -> None:
    """In any layout; torch gets plain ones, as it fails its own backward for some."""
    want = result(F.conv_transpose2d, problem, getattr(torch, dtype))
    assert not isinstance(want, Exception), want
    got = result(conv_transpose2d, problem, getattr(torch, dtype), layouts)
    assert not isinstance(got, Exception), got
    event(f"{len(got) - 1} gradients")
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@settings(SETTINGS, max_examples=100)
@given(
    problems(),
    st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    st.sampled_from(("float32", "bfloat16", "complex64")),
)
def test_fake_tensors_foretell_results(problem: dict, layouts: tuple[str, str], dtype: str) -> None:
    """Shape, dtype and strides of the output and of every gradient."""
    real = result(conv_transpose2d, problem, getattr(torch, dtype), layouts)
    fake = result(conv_transpose2d, problem, getattr(torch, dtype), layouts, FakeTensorMode())
    assert not isinstance(real, Exception) and not isinstance(fake, Exception), (real, fake)
    assert [in_memory(t) for t in fake] == [in_memory(t) for t in real]


@SETTINGS
@given(mutations())
def test_torch_and_we_accept_the_same_calls(problem: dict) -> None:
    want, got = judged_by_torch(problem), result(conv_transpose2d, problem, torch.float64)
    refused = isinstance(want, Exception), isinstance(got, Exception)
    event(f"torch refuses: {refused[0]}")
    assert refused[0] == refused[1], f"torch: {want!r}\nours: {got!r}"
    if isinstance(problem["padding"], str):  # of which "same" and "valid" are legal here
        assert type(got) is ValueError
    elif refused[0]:
        assert type(got) is type(want), f"torch: {want!r}\nours: {got!r}"
    else:
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs)
