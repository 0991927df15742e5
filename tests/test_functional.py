"""Arguments: whatever torch takes for a number is taken, and refused with torch's type of error."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from deconv_ext.functional import conv_transpose2d

theirs = torch.nn.functional.conv_transpose2d


def operands():
    return [torch.randn(s) for s in ((2, 4, 5, 5), (4, 3, 3, 3), (3,))]


def outcome(function, *args, **kwargs):
    """The result, or the error and its words."""
    try:
        return function(*args, **kwargs), ""
    except Exception as error:
        return type(error), str(error)


NUMBERS = [
    2, 1, 0, -1, True, 2.0, 0.5, (2,), [1], (1, 2), [2, 1], (1, 1, 1), (), (1.0, 1), (1, 2.0),
    (True, 1),
    np.int64(2), np.int8(1), np.float32(2), np.array([1, 2]), np.bool_(True), (np.int32(2), 1),
    torch.tensor(2), torch.tensor(2.0), torch.tensor([1, 2]), (torch.tensor(1), 2),
    torch.Size((1, 2)),
    None, range(1, 3), {1, 2}, 2**70, -(2**70), 1j, (None, 1), ((1, 1), 1),
]  # fmt: skip


@pytest.mark.parametrize("value", NUMBERS, ids=lambda v: f"{type(v).__name__} {v}")
@pytest.mark.parametrize("name", ["stride", "padding", "output_padding", "dilation", "groups"])
def test_numbers(name, value):
    args, kwargs = operands(), {name: value}
    if name == "groups":
        args[2] = None
    if name == "output_padding":
        kwargs["stride"] = 3
    want, words = outcome(theirs, *args, **kwargs)
    got, ours = outcome(conv_transpose2d, *args, **kwargs)
    if name == "dilation" and type(value) is int and value == 0:
        assert issubclass(got, RuntimeError), "oneDNN is what fails in torch here"
    elif isinstance(want, torch.Tensor):
        assert isinstance(got, torch.Tensor), ours
        assert_close(got, want)
    else:
        assert got is want, (ours, words)
        assert name in ours or "channels" in ours or "weight" in ours


X, W, B = (torch.zeros(s) for s in ((2, 4, 5, 5), (4, 3, 3, 3), (3,)))
BAD_CALLS = {
    "no tensor": ((None, W), {}, "input"),
    "a list": (([[1.0]], W), {}, "input"),
    "an array": ((X.numpy(), W), {}, "input"),
    "no weight": ((X, None), {}, "weight"),
    "a list for the bias": ((X, W, [1.0, 2.0, 3.0]), {}, "bias"),
    "missing weight": ((X,), {}, "weight"),
    "unknown argument": ((X, W), {"strides": 2}, "strides"),
    "too many": ((X, W, B, 1, 0, 0, 1, 1, 1), {}, "conv_transpose2d"),
    "argument given twice": ((X, W, B, 1), {"stride": 1}, "stride"),
    "2-D input": ((X[0, 0], W), {}, r"4D \(batched\).*\[5, 5\]"),
    "5-D input": ((X[None], W), {}, r"4D \(batched\).*\[1, 2, 4, 5, 5\]"),
    "3-D weight": ((X, W[0]), {}, r"weight|stride"),
    "5-D weight": ((X, W[None]), {}, r"weight|stride"),
    "dtype of weight": ((X, W.double()), {}, "(?i)float.*double"),
    "dtype of bias": ((X, W, B.double()), {}, "bias.*(?i:double)"),
    "channels": ((X[:, :3], W), {}, "4 channels.* 3 channels"),
    "channels, unbatched": ((X[0, :3], W), {}, "4 channels.* 3 channels"),
    "length of bias": ((X, W, B[:2]), {}, r"bias.*3 elements.*\[2\]"),
    "bias of two dimensions": ((X, W, B[None]), {}, r"bias.*3 elements.*\[1, 3\]"),
    "groups": ((X, W), {"groups": 3}, "3.*weight.*4"),
    "too many groups": ((X, W), {"groups": 8}, "8.*weight.*4"),
    "no groups": ((X, W), {"groups": 0}, "groups"),
    "stride 0": ((X, W, B, 0), {}, "stride"),
    "negative padding": ((X, W, B, 1, -1), {}, "padding"),
    "negative output_padding": ((X, W, B, 2, 0, -1), {}, "output_padding"),
    "output_padding as large as stride": ((X, W, B, 2, 0, 2), {}, "output.padding.*2"),
    "negative dilation": ((X, W, B, 1, 0, 0, 1, -1), {}, "dilation"),
    "empty input": ((X[:, :, :0], W), {}, r"0, 5\]"),
    "padding of all": ((X, W, B, 1, 9), {}, "."),
    "sparse input": ((X.to_sparse(), W), {}, "."),
    "bool tensors": ((X.bool(), W.bool()), {}, "Bool"),
    "int32 tensors": ((X.int(), W.int()), {}, "Int"),
}  # fmt: skip


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
@pytest.mark.filterwarnings("ignore:deconv_ext")  # a sparse tensor is torch's to refuse
def test_bad_calls(call):
    args, kwargs, words = call
    want, _ = outcome(theirs, *args, **kwargs)
    got, said = outcome(conv_transpose2d, *args, **kwargs)
    assert isinstance(want, type) and got is want, said
    with pytest.raises(got, match=words):
        conv_transpose2d(*args, **kwargs)


@pytest.mark.parametrize(
    "padding,error",
    [
        ("full", ValueError),
        ("", ValueError),
        (((1, 2), (3,)), RuntimeError),
        (((1, 2), 3), TypeError),
        (((1, 2), (3, 4), (5, 6)), RuntimeError),
        (((1, 2), (3, 4.0)), TypeError),
        (((1, -1), (0, 0)), RuntimeError),
    ],
    ids=str,
)
def test_bad_two_sided_and_named_paddings(padding, error):
    with pytest.raises(error, match="padding"):
        conv_transpose2d(*operands(), padding=padding)


def test_named_padding_leaves_no_room_for_output_padding():
    with pytest.raises(ValueError, match="output_padding=.1, 1."):
        conv_transpose2d(*operands(), stride=2, padding="same", output_padding=1)


def test_named_padding_with_a_weight_of_wrong_dimensions():
    for weight in (W[0], W[None], W[0, 0, 0, 0]):
        with pytest.raises(RuntimeError, match="weight"):
            conv_transpose2d(X, weight, padding="same")


def test_order_and_names_of_arguments():
    """groups comes before dilation, as nowhere else."""
    x, w, b = torch.randn(2, 4, 5, 4), torch.randn(4, 3, 3, 2), torch.randn(6)
    want = theirs(x, w, b, 3, 1, 2, 2, 4)
    assert_close(conv_transpose2d(x, w, b, 3, 1, 2, 2, 4), want)
    assert_close(
        conv_transpose2d(
            input=x, weight=w, bias=b, stride=3, padding=1, output_padding=2, groups=2, dilation=4
        ),
        want,
    )


def test_unbatched():
    x, w, b = operands()
    for args in ((w, b), (w,)):
        y = conv_transpose2d(x[0], *args, stride=2)
        assert y.dim() == 3
        assert_close(y, theirs(x[0], *args, stride=2))
