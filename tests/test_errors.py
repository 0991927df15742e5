"""What the binary module refuses, and that each message names the argument and its value."""

import pytest
import torch

from support import C

GEOMETRY = dict(
    stride=(2, 2), padding=(1, 1, 1, 1), output_padding=(0, 0), dilation=(1, 1), groups=1
)
X, W, BIAS, DY = (2, 4, 5, 5), (4, 6, 3, 3), (6,), (2, 6, 9, 9)


def forward(x=X, w=W, bias=BIAS, **changed):
    tensors = (
        t if isinstance(t, torch.Tensor) or t is None else torch.ones(t) for t in (x, w, bias)
    )
    return C.forward(*tensors, **{**GEOMETRY, **changed})


def grad_input(dy=DY, w=W, size=(5, 5), **changed):
    return C.grad_input(torch.ones(dy), torch.ones(w), size, **{**GEOMETRY, **changed})


def grad_weight(x=X, dy=DY, kernel=(3, 3), **changed):
    return C.grad_weight(torch.ones(x), torch.ones(dy), kernel, **{**GEOMETRY, **changed})


def test_the_unchanged_arguments_are_accepted() -> None:
    """So every refusal below is about what it changes."""
    assert forward().shape == DY
    assert grad_input().shape == X
    assert grad_weight().shape == W


@pytest.mark.parametrize(
    "changed,message",
    (
        ({"stride": (0, 1)}, r"non-positive stride is not supported.*\[0, 1\]"),
        ({"stride": (2, -1)}, r"non-positive stride is not supported.*\[2, -1\]"),
        ({"padding": (0, -1, 0, 0)}, r"negative padding is not supported.*\[0, -1, 0, 0\]"),
        ({"output_padding": (-1, 0)}, r"negative output_padding is not supported.*\[-1, 0\]"),
        (
            {"output_padding": (0, 2)},
            r"output padding must be smaller than either stride or dil.*\[0, 2\]",
        ),
        ({"dilation": (1, 0)}, r"dilation should be greater than zero.*\[1, 0\]"),
        ({"groups": 0}, "non-positive groups is not supported"),
        ({"groups": -2}, "non-positive groups is not supported"),
        (
            {"padding": (6, 6, 0, 0)},
            r"output size per channel: \(-1 x 11\). Output size is too small",
        ),
        ({"stride": (1 << 62, 1)}, r"overflow.*height 5.*stride 4611686018427387904"),
        ({"dilation": (1, 1 << 61)}, r"overflow.*width 5.*dilation 2305843009213693952"),
        ({"padding": (1 << 62, 1 << 62, 0, 0)}, "overflow.*padding"),
        ({"algo": "magic"}, "algo must be one of auto, .*reference, but got 'magic'"),
    ),
)
@pytest.mark.parametrize("call", (forward, grad_input, grad_weight))
def test_arguments(call, changed: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(**changed)


@pytest.mark.parametrize(
    "call,changed,message",
    (
        (forward, {"x": (4, 5, 5)}, r"Expected 4D \(batched\) input.*\[4, 5, 5\]"),
        (forward, {"w": (4, 6, 3)}, r"4-dimensional weight.*\[4, 6, 3\]"),
        (
            forward,
            {"w": (5, 6, 3, 3)},
            r"weight of size \[5, 6, 3, 3\].* to have 5 channels, but got 4",
        ),
        (forward, {"w": (4, 6, 0, 3)}, "kernel size should be greater than zero.*kernel_height: 0"),
        (
            forward,
            {"w": (0, 6, 3, 3), "x": (2, 0, 5, 5)},
            r"expected weight to be at least 1 at dim.*0",
        ),
        (forward, {"w": (4, 0, 3, 3), "bias": (0,)}, r"non-empty weight.*\[4, 0, 3, 3\]"),
        (forward, {"groups": 3}, r"groups=3.*divisible by 3 at dimension 0.*\[4, 6, 3, 3\]"),
        (forward, {"groups": 8}, r"groups=8.*at least 8 at dimension 0.*\[4, 6, 3, 3\]"),
        (forward, {"bias": (5,)}, r"bias to be 1-dimensional with 6 elements.*\[5\]"),
        (forward, {"bias": (6, 1)}, r"bias to be 1-dimensional with 6 elements.*\[6, 1\]"),
        (forward, {"x": (2, 4, 0, 5)}, "Only zero batch or zero channel inputs are supported"),
        (
            forward,
            {"w": torch.ones(W).double()},
            r"Input type \(Float\) and weight type \(Double\)",
        ),
        (
            forward,
            {"bias": torch.ones(BIAS).half()},
            r"Input type \(Float\) and bias type \(Half\)",
        ),
        (
            forward,
            {"w": torch.ones(W, device="meta")},
            "same device.*input is on cpu.*weight is on meta",
        ),
        (grad_input, {"dy": (2, 6, 9, 8)}, r"grad_output of size \[2, 6, 9, 9\].*\[2, 6, 9, 8\]"),
        (grad_input, {"dy": (2, 5, 9, 9)}, r"grad_output of size \[2, 6, 9, 9\].*\[2, 5, 9, 9\]"),
        (grad_input, {"dy": (6, 9, 9)}, r"grad_output.*\[6, 9, 9\]"),
        (grad_input, {"size": (5, 6)}, r"grad_output of size \[2, 6, 9, 11\].*\[2, 6, 9, 9\]"),
        (grad_weight, {"kernel": (4, 3)}, r"grad_output of size \[2, 6, 10, 9\].*\[2, 6, 9, 9\]"),
        (grad_weight, {"dy": (3, 6, 9, 9)}, r"grad_output of size \[2, 6, 9, 9\].*\[3, 6, 9, 9\]"),
        (grad_weight, {"groups": 3}, "groups=3.*channels of input and grad_output.*4 and 6"),
        (grad_weight, {"kernel": (0, 3)}, "kernel size should be greater than zero"),
    ),
)
def test_shapes(call, changed: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(**changed)


def test_grad_bias_wants_four_dimensions() -> None:
    with pytest.raises(RuntimeError, match=r"grad_output.*\[6, 9, 9\]"):
        C.grad_bias(torch.ones(6, 9, 9))


@pytest.mark.parametrize(
    "algo", [name for name in C.list_algorithms("forward") if name != "reference"]
)
def test_a_forced_algorithm_says_what_it_cannot_take(algo: str) -> None:
    integers = [torch.ones(shape, dtype=torch.int64) for shape in (X, W)]
    with pytest.raises(RuntimeError, match=f"algo='{algo}' cannot take this problem: .*dtype"):
        C.forward(*integers, None, **GEOMETRY, algo=algo)


def test_algorithms_are_listed_best_first() -> None:
    for op in ("forward", "grad_input", "grad_weight"):
        assert C.list_algorithms(op)[-1] == "reference"
        assert len(set(C.list_algorithms(op))) == len(C.list_algorithms(op)) > 1
    with pytest.raises(ValueError, match="op must be .* but got 'backward'"):
        C.list_algorithms("backward")


def test_unknown_instruction_set() -> None:
    before = C.cpu_isa()
    with pytest.raises(RuntimeError, match="portable.* but got 'mmx'"):
        C.set_cpu_isa("mmx")
    assert C.cpu_isa() == before


def test_output_size_refuses_what_the_operations_refuse() -> None:
    for arguments, message in (
        (((5, 5), (3, 3), (0, 1), (0, 0, 0, 0), (0, 0), (1, 1)), "non-positive stride"),
        (((5, 5), (3, 3), (1, 1), (9, 9, 0, 0), (0, 0), (1, 1)), "Output size is too small"),
        (((5, 5), (3, 3), (1, 1), (0, 0, 0, 0), (1, 1), (1, 1)), "output padding must be smaller"),
    ):
        with pytest.raises(RuntimeError, match=message):
            C.output_size(*arguments)
