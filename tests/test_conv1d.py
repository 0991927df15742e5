"""The 1-D operator and layer where torch's are expected."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from deconv_ext import ConvTranspose1d, conv_transpose1d, convert, revert
from support import kernel_calls

# Importing torch's test support forbids setting torch.backends.* flags, for the whole process.
vars(torch.backends)["__allow_nonbracketed_mutation_flag"] = True

OP = next(op for op in op_db if op.name == "nn.functional.conv_transpose1d")
MODULE = next(m for m in module_db if m.module_cls is nn.ConvTranspose1d)
NUMERICAL = (torch.float64, torch.complex128)
theirs = nn.functional.conv_transpose1d


def wide(tensor):
    if not isinstance(tensor, torch.Tensor):
        return tensor
    kept = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
    return kept.requires_grad_(tensor.requires_grad)


def samples(dtype, requires_grad=False):
    for sample in OP.sample_inputs("cpu", dtype, requires_grad=requires_grad):
        yield [sample.input, *sample.args], sample.kwargs


@pytest.mark.parametrize("dtype", sorted(OP.supported_dtypes("cpu"), key=str), ids=str)
def test_values_of_torchs_samples(dtype):
    assert len(list(samples(dtype))) >= 6
    for args, kwargs in samples(dtype):
        got = conv_transpose1d(*args, **kwargs)
        assert got.dtype == dtype
        assert_close(got, theirs(*map(wide, args), **kwargs).to(dtype))


@pytest.mark.parametrize("dtype", sorted(OP.supported_backward_dtypes("cpu"), key=str), ids=str)
def test_gradients_of_torchs_samples(dtype):
    for args, kwargs in samples(dtype, requires_grad=True):
        y = conv_transpose1d(*args, **kwargs)
        dy = torch.randn_like(y)
        tensors = [t for t in args if t is not None]
        got = torch.autograd.grad(y, tensors, dy)
        wide_args = list(map(wide, args))
        want = torch.autograd.grad(
            theirs(*wide_args, **kwargs), [t for t in wide_args if t is not None], wide(dy)
        )
        for a, b in zip(got, want, strict=True):
            assert_close(a, b.to(dtype))


@pytest.mark.parametrize("dtype", NUMERICAL, ids=str)
def test_gradcheck(dtype):
    for args, kwargs in samples(dtype, requires_grad=True):
        tensors = [t for t in args if t is not None]

        def function(*tensors, args=args, kwargs=kwargs):
            return conv_transpose1d(*tensors, *args[len(tensors) :], **kwargs)

        gradcheck(function, tensors, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
        gradgradcheck(function, tensors, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("dtype", NUMERICAL, ids=str)
def test_module_of_torchs_samples(dtype, seed):
    inputs = list(MODULE.module_inputs_func(MODULE, "cpu", dtype, True, True))
    assert inputs
    for case in inputs:
        build, call = case.constructor_input, case.forward_input
        results = []
        for cls in (ConvTranspose1d, nn.ConvTranspose1d):
            torch.manual_seed(seed)
            module = cls(*build.args, **build.kwargs, dtype=dtype)
            x = call.args[0].detach().requires_grad_()
            y = module(x, *call.args[1:], **call.kwargs)
            loss = (y * y.conj()).real.sum()
            results.append((y, torch.autograd.grad(loss, [x, *module.parameters()])))
        assert_close(*results)


#: HiFi-GAN's generators (V1 and V2, V3): upsampling of a spectrogram to sound, kernel = 2 strides.
#: https://github.com/jik876/hifi-gan, config_v1.json and config_v3.json
HIFI_GAN = [
    (512, 256, 16, 8), (256, 128, 16, 8), (128, 64, 4, 2), (64, 32, 4, 2),
    (256, 128, 16, 8), (128, 64, 16, 8), (64, 32, 8, 4),
]  # fmt: skip


@pytest.mark.parametrize("layer", HIFI_GAN, ids=str)
def test_layers_of_hifi_gan(layer, seed):
    c_in, c_out, kernel, stride = layer
    layers = []
    for cls in (ConvTranspose1d, nn.ConvTranspose1d):
        torch.manual_seed(seed)
        module = cls(c_in, c_out, kernel, stride, padding=(kernel - stride) // 2).double()
        layers.append(parametrizations.weight_norm(module))  # as that model has it
    x = torch.randn(2, c_in, 11, dtype=torch.float64)
    results = []
    for module in layers:
        y = module(x)
        assert y.shape == (2, c_out, 11 * stride)
        y.square().mean().backward()
        results.append((y, [p.grad for p in module.parameters()]))
    assert_close(*results)


def outcome(function, *args, **kwargs):
    try:
        return function(*args, **kwargs), ""
    except Exception as error:
        return type(error), str(error)


NUMBERS = [2, 1, 0, -1, True, 2.0, (2,), [1], (1, 2), (), (1.0,), None, "x", torch.tensor(2), 2**70]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda v: f"{type(v).__name__} {v}")
@pytest.mark.parametrize("name", ["stride", "padding", "output_padding", "dilation", "groups"])
def test_numbers(name, value):
    args, kwargs = [torch.randn(2, 4, 7), torch.randn(4, 3, 3), None], {name: value}
    if name == "output_padding":
        kwargs["stride"] = 3
    want, words = outcome(theirs, *args, **kwargs)
    got, ours = outcome(conv_transpose1d, *args, **kwargs)
    if name == "dilation" and type(value) is int and value == 0:
        assert issubclass(got, RuntimeError), "oneDNN is what fails in torch here"
    elif name == "padding" and value == "x":
        assert got is ValueError, "named paddings are ours"
    elif isinstance(want, torch.Tensor):
        assert isinstance(got, torch.Tensor), ours
        assert_close(got, want)
    else:
        assert got is want, (ours, words)
        assert name in ours or "channels" in ours or "weight" in ours
        assert "conv_transpose2d" not in ours


X, W = torch.zeros(2, 4, 7), torch.zeros(4, 3, 3)
BAD_CALLS = {
    "no tensor": ((None, W), {}, "conv_transpose1d.*input"),
    "1-D input": ((X[0, 0], W), {}, r"3D \(batched\) input to conv_transpose1d.*\[7\]"),
    "4-D input": ((X[None], W), {}, r"3D \(batched\) input to conv_transpose1d.*\[1, 2, 4, 7\]"),
    "2-D weight": ((X, W[0]), {}, r"weight.*\[3, 3\]"),
    "4-D weight": ((X, W[None]), {}, r"weight.*\[1, 4, 3, 3\]"),
    "dtype of weight": ((X, W.double()), {}, "(?i)float.*double"),
    "channels": ((X[:, :3], W), {}, "4 channels.* 3 channels"),
    "length of bias": ((X, W, torch.zeros(2)), {}, r"bias.*3 elements.*\[2\]"),
    "groups": ((X, W), {"groups": 3}, "3.*weight.*4"),
    "empty input": ((X[:, :, :0], W), {}, r"Only zero batch"),
    "padding of all": ((X, W), {"padding": 9}, "."),
    "unknown argument": ((X, W), {"strides": 2}, "strides"),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(call):
    args, kwargs, words = call
    want, _ = outcome(theirs, *args, **kwargs)
    with pytest.raises(want, match=words):
        conv_transpose1d(*args, **kwargs)


@pytest.mark.parametrize("padding", [((1, 2),), ((0, 3),), "same", "valid"], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_own_padding(padding, stride):
    x, w = torch.randn(2, 4, 7), torch.randn(4, 3, 4)
    full = theirs(x, w, stride=stride)
    begin, end = {"same": ((4 - stride) // 2, (5 - stride) // 2), "valid": (0, 0)}.get(
        padding, padding[0]
    )
    want = full[..., begin : full.shape[-1] - end]
    assert_close(conv_transpose1d(x, w, stride=stride, padding=padding), want)
    layer = ConvTranspose1d(4, 3, 4, stride, padding, bias=False)
    layer.load_state_dict({"weight": w})
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_close(other(x), want)
        assert_close(other(x, output_size=[want.shape[-1]]), want)


@pytest.mark.parametrize("padding", [((1, 2), (3, 4)), ((1, 2, 3),), "full"], ids=str)
def test_impossible_padding(padding):
    with pytest.raises((RuntimeError, ValueError), match="padding"):
        ConvTranspose1d(4, 3, 4, 2, padding)


def test_layer_is_torchs(seed):
    for args, kwargs in (
        ((4, 6, 3), {}),
        ((4, 6, 5, 3, 1, 2, 2, False, 2), {"dtype": torch.float64}),
    ):
        layers = []
        for cls in (ConvTranspose1d, nn.ConvTranspose1d):
            torch.manual_seed(seed)
            layers.append(cls(*args, **kwargs))
        ours, plain = layers
        assert repr(ours) == repr(plain) and vars(ours).keys() == vars(plain).keys()
        assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)
        x = torch.randn(2, 4, 9, dtype=kwargs.get("dtype"))
        for size in (None, [ours(x).shape[-1]], [2, 6, ours(x).shape[-1] - ours.output_padding[0]]):
            assert_close(ours(x, output_size=size), plain(x, output_size=size))
        assert_close(ours(x[0]), plain(x[0]))


@pytest.mark.parametrize("size", [(8,), (12,), (9, 9), (1, 2, 3, 4)], ids=str)
def test_wrong_output_size(size):
    errors = []
    for cls in (ConvTranspose1d, nn.ConvTranspose1d):
        with pytest.raises(ValueError) as caught:
            cls(4, 6, 3, 2, 1)(torch.randn(2, 4, 5), output_size=size)
        errors.append(str(caught.value))
    assert errors[0] == errors[1] or "valid sizes" in errors[0]


def test_output_size_of_the_constructor():
    layer = ConvTranspose1d(4, 6, 3, 2, 1, output_size=10)
    x = torch.randn(2, 4, 5)
    assert layer(x).shape == (2, 6, 10) and "output_size=(10,)" in repr(layer)
    assert torch.equal(nn.Sequential(layer)(x), layer(x, output_size=[10]))


def test_vmap_and_strided_inputs():
    x, w = torch.randn(3, 2, 4, 7), torch.randn(4, 3, 3)
    want = torch.stack([theirs(sample, w, stride=2) for sample in x])
    assert_close(torch.func.vmap(lambda x: conv_transpose1d(x, w, stride=2))(x), want)
    last = x[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(conv_transpose1d(last, w.flip(0), stride=2), theirs(last, w.flip(0), stride=2))


def test_our_kernels_compute():
    layer, x = ConvTranspose1d(4, 6, 3), torch.randn(2, 4, 7)
    assert kernel_calls(lambda: layer(x)) == ["forward"]


def test_convert_on_request():
    class Named(nn.ConvTranspose1d):
        pass

    model = nn.Sequential(
        nn.ConvTranspose1d(4, 4, 4, 2), Named(4, 4, 3), nn.LazyConvTranspose1d(4, 3), nn.Flatten(),
    )  # fmt: skip
    x = torch.randn(2, 4, 5)
    model(x)
    model[2] = nn.LazyConvTranspose1d(4, 3)
    plain = model[:2]
    want = plain(x)
    assert convert(model).layers == []
    report = convert(model, one_dimensional=True)
    assert [layer.converted for layer in report.layers] == [True, True, False]
    assert type(model[0]) is ConvTranspose1d and isinstance(model[1], (Named, ConvTranspose1d))
    assert_close(plain(x), want)
    assert_close(pickle.loads(pickle.dumps(model[0]))(x), model[0](x))
    assert revert(model) == 2 and type(model[0]) is nn.ConvTranspose1d and type(model[1]) is Named
    report = convert(plain, x, one_dimensional=True)
    assert 0 <= report.max_rel < 1e-5 and all(layer.max_rel < 1e-5 for layer in report.layers)
