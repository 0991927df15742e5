"""deconv_ext.tf against what TensorFlow and Keras answered: see tensorflow_results.py."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import profile
from torch.testing import assert_close

import tensorflow_results as theirs
from deconv_ext import ConvTranspose1d, ConvTranspose2d
from deconv_ext.functional import conv_transpose2d
from deconv_ext.tf import conv2d_transpose, from_keras

with np.load(theirs.FILE) as file:
    RESULTS = dict(file)
CONFIGURATIONS = json.loads(str(RESULTS["keras configurations"]))


def operands(call):
    dtype = getattr(torch, call.dtype)
    x, w = (torch.from_numpy(a).to(dtype) for a in call.operands())
    if call.has_gradients and dtype.is_floating_point:
        x.requires_grad_(), w.requires_grad_()
    return x, w


def assert_is_theirs(name, call):
    """The value and both gradients, to the bit."""
    x, w = operands(call)
    y = conv2d_transpose(x, w, **call.keywords)
    got = [y]
    if call.has_gradients:
        dy = torch.from_numpy(theirs.pattern(tuple(y.shape), 3, 2)).to(y.dtype)
        got += torch.autograd.grad(y, [x, w], dy)
    flat = torch.cat([t.detach().double().flatten() for t in got])
    want = torch.from_numpy(RESULTS[name]).double()
    assert y.dtype == x.dtype
    assert torch.equal(flat, want), name
    if len(call.output_shape) == 4:
        assert tuple(y.shape) == tuple(call.output_shape)


def test_the_results_are_there():
    assert set(theirs.TAKEN) <= set(RESULTS) and not set(theirs.REFUSED) & set(RESULTS)
    taken = [name for name in dict(theirs.sweep()) if name in RESULTS]
    assert len(taken) > 60 and len(CONFIGURATIONS) > 90


@pytest.mark.parametrize("name", theirs.TAKEN)
def test_what_tensorflow_takes(name):
    assert_is_theirs(name, theirs.TAKEN[name])


@pytest.mark.parametrize("name", theirs.REFUSED)
def test_what_tensorflow_refuses(name):
    call = theirs.REFUSED[name]
    argument = name.split()[0].rstrip(",")
    words = argument if argument in ("output_shape", "strides", "dilations", "padding") else "must"
    with pytest.raises((ValueError, TypeError), match=words):
        conv2d_transpose(*operands(call), **call.keywords)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_every_size_is_taken_or_refused_as_there(padding):
    """Five kernels, three strides, dilation 1 and 2, every output size near those that fit."""
    for name, call in theirs.sweep():
        if call.padding != padding:
            continue
        if name in RESULTS:
            assert_is_theirs(name, call)
        else:
            with pytest.raises(ValueError, match="output_shape"):
                conv2d_transpose(*operands(call), **call.keywords)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding_of_ours_is_the_default_size_of_keras(padding):
    """`conv_transpose2d(padding="same")` against TensorFlow's result for a size of theirs."""
    compared = 0
    for name, call in theirs.sweep():
        x, w = operands(call)
        extent = (call.dilations or 1) * (call.filters[0] - 1) + 1
        stride = call.strides if len(call.strides) == 2 else call.strides[1:3]
        fits = 3 * stride[0] if padding == "same" else 2 * stride[0] + max(extent, stride[0])
        if call.padding != padding.upper() or call.output_shape[1] != fits or name not in RESULTS:
            continue
        y = conv_transpose2d(
            x.permute(0, 3, 1, 2),
            w.permute(3, 2, 0, 1),
            stride=stride,
            padding=padding,
            dilation=call.dilations or 1,
        ).permute(0, 2, 3, 1)
        if tuple(y.shape) == call.output_shape:
            want = torch.from_numpy(RESULTS[name][: y.numel()]).float()
            assert torch.equal(y.flatten(), want), name
            compared += 1
    assert compared >= 15


def test_more_refusals():
    x, w = torch.zeros(2, 4, 5, 3), torch.zeros(3, 3, 6, 3)
    y = (2, 8, 10, 6)
    for error, words, args in (
        (TypeError, "input must be a Tensor", (x.numpy(), w, y, 2)),
        (TypeError, "filters must have the dtype of input", (x, w.double(), y, 2)),
        (TypeError, "strides must be integers.*2.5", (x, w, y, 2.5)),
        (
            TypeError,
            "padding must be integers.*0.5",
            (x, w, y, 2, ((0, 0), (0.5, 1), (0, 1), (0, 0))),
        ),
        (ValueError, "filters must have a size > 0", (x, w[:0], y, 2)),
    ):
        with pytest.raises(error, match=words):
            conv2d_transpose(*args)


def test_tensors_and_arrays_for_numbers():
    x, w = operands(theirs.BASE)
    want = conv2d_transpose(x, w, (2, 8, 10, 6), 2)
    for kind in (torch.tensor, np.array, torch.Size, list):
        assert torch.equal(conv2d_transpose(x, w, kind((2, 8, 10, 6)), kind((2, 2))), want)
    assert torch.equal(conv2d_transpose(x, w, want.shape, np.int64(2), name="layer"), want)


@pytest.mark.parametrize("shape", [(2, 9, 11, 8), (1, 1, 1, 8), (2, 9, 11, 1)], ids=str)
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_nhwc_is_not_copied(shape, gradients):
    """No operator that copies runs, and the result and the gradient are plain NHWC tensors."""
    n, h, w, c = shape
    x = torch.randn(shape, requires_grad=gradients)
    filters = torch.randn(4, 4, 6, c, requires_grad=gradients)

    def run():
        y = conv2d_transpose(x, filters, (n, 2 * h, 2 * w, 6), 2)
        return y, *(torch.autograd.grad(y, [x, filters], torch.ones_like(y)) if gradients else ())

    run()
    with profile(profile_memory=True) as recorded:
        y, *grads = run()
    names = {event.key for event in recorded.key_averages()}
    copies = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::to", "aten::_to_copy"}
    assert not names & copies, names
    assert any("empty" in name for name in names), "the profiler saw nothing"
    assert y.is_contiguous()
    if gradients:
        assert grads[0].is_contiguous()


def test_nhwc_reaches_the_kernels_where_it_lies(monkeypatch):
    x, filters = torch.randn(2, 5, 6, 8), torch.randn(3, 3, 4, 8)
    seen = []
    extension = sys.modules["deconv_ext.autograd"].extension()

    def forward(*args):
        seen.append((args[0], extension.recorded_forward(*args)))
        return seen[-1][1]

    double = SimpleNamespace(recorded_forward=forward, compiled=extension.compiled)
    monkeypatch.setattr("deconv_ext.functional.extension", lambda: double)
    with torch.no_grad():
        y = conv2d_transpose(x, filters, (2, 10, 12, 4), 2)
    ((given, result),) = seen
    assert given.data_ptr() == x.data_ptr() and given.stride() == (240, 1, 48, 8)
    assert given.is_contiguous(memory_format=torch.channels_last)
    assert y.data_ptr() == result.data_ptr() and y.stride() == (480, 48, 4, 1)


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_derivatives(data_format):
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    shape = (2, 5, 8, 3)
    if data_format == "NCHW":
        x, shape = x.detach().permute(0, 3, 1, 2).contiguous().requires_grad_(), (2, 3, 5, 8)
    w = torch.randn(3, 3, 3, 2, dtype=torch.float64, requires_grad=True)

    def function(x, w):
        return conv2d_transpose(x, w, shape, 2, data_format=data_format)

    assert gradcheck(function, (x, w), fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, (x, w), fast_mode=True)


# --- Keras ---------------------------------------------------------------------------------------


def keras_layer(name, **changes):
    """What `from_keras` uses of a layer: the recorded configuration, the weights of the script."""
    config = CONFIGURATIONS[name] | changes
    kernel = [*config["kernel_size"], theirs.KERAS_FILTERS, theirs.KERAS_X[-1]]
    shapes = [tuple(kernel), (theirs.KERAS_FILTERS,)][: 1 + config["use_bias"]]
    weights = [theirs.pattern(s, 2 + i).astype(np.float32) for i, s in enumerate(shapes)]
    return SimpleNamespace(get_config=lambda: config, get_weights=lambda: weights)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k4", "k5", "dilated", "no bias", "1-D"])
def test_keras_layers(kind):
    names = [name for name in CONFIGURATIONS if name.startswith(kind)]
    assert len(names) >= 2
    for name in names:
        layer = keras_layer(name)
        if f"keras {name}" not in RESULTS:
            with pytest.raises(ValueError, match="output_padding=0.*refuses"):
                from_keras(layer)
            continue
        module = from_keras(layer)
        dims = len(layer.get_config()["kernel_size"])
        assert type(module) is (ConvTranspose2d if dims == 2 else ConvTranspose1d)
        x = torch.from_numpy(
            theirs.pattern(theirs.KERAS_X[-dims - 2 :] if dims == 2 else theirs.KERAS_X[1:], 1)
        ).float()
        y = module(x.movedim(-1, 1)).movedim(1, -1)
        assert torch.equal(y.flatten(), torch.from_numpy(RESULTS[f"keras {name}"]).float()), name
        again = from_keras(layer.get_config(), layer.get_weights())
        assert_close(again.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_a_keras_layer_that_cannot_be_converted():
    name = "k3 s2 same output_padding None"
    for words, layer in (
        ("activation='relu'", keras_layer(name, activation="relu")),
        ("groups=2", keras_layer(name, groups=2)),
        (
            "got 2 arrays",
            keras_layer(name, use_bias=True)
            and SimpleNamespace(
                get_config=lambda: CONFIGURATIONS[name] | {"use_bias": False},
                get_weights=keras_layer(name).get_weights,
            ),
        ),
        ("padding='full'", keras_layer(name, padding="full")),
        ("weights must be given", CONFIGURATIONS[name]),
    ):
        with pytest.raises(ValueError, match=words):
            from_keras(layer)
    with pytest.raises(ValueError, match="kernel must be"):
        from_keras(CONFIGURATIONS[name] | {"use_bias": False}, [np.zeros((3, 3))])


def test_an_activation_may_be_left_to_the_caller():
    name = "k3 s2 same output_padding None"
    module = from_keras(keras_layer(name, activation="relu"), without_activation=True)
    assert_close(module.state_dict(), from_keras(keras_layer(name)).state_dict())


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("tensorflow"), reason="needs tensorflow-cpu")
def test_tensorflow_still_answers_the_same():
    done = subprocess.run(
        [sys.executable, theirs.__file__, "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
