"""deconv_ext.ConvTranspose2d where torch.nn.ConvTranspose2d is expected."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, parametrize
from torch.testing import assert_close

from deconv_ext import ConvTranspose2d
from deconv_ext.functional import conv_transpose2d

CONFIGURATIONS = [
    ((4, 6, 3), {}),
    ((4, 6, 3, 2, 1, 1), {}),
    ((4, 6, (2, 5)), {"stride": (3, 2), "padding": (0, 1), "output_padding": (2, 0), "groups": 2}),
    ((6, 6, 3), {"groups": 6, "bias": False, "dilation": (1, 2)}),
    ((4, 2, 1), {"stride": 2, "dtype": torch.float64}),
    ((4, 6, [3, 2]), {"stride": [2, 1], "padding_mode": "zeros", "device": "cpu"}),
]


@pytest.fixture(params=CONFIGURATIONS, ids=str)
def layers(request, seed):
    """Ours and torch's, made with the same arguments under the same seed."""
    args, kwargs = request.param
    torch.manual_seed(seed)
    ours = ConvTranspose2d(*args, **kwargs)
    torch.manual_seed(seed)
    return ours, nn.ConvTranspose2d(*args, **kwargs)


def sample(layer, *size):
    return torch.randn(2, layer.in_channels, *(size or (5, 4)), dtype=layer.weight.dtype)


def assert_same_layer(a, b, x):
    assert_close(a(x), b(x))
    states = a.state_dict(), b.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(s, t) for s, t in zip(*(s.values() for s in states), strict=True))


def test_is_torchs(layers):
    ours, theirs = layers
    assert isinstance(ours, nn.ConvTranspose2d)
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    assert_same_layer(ours, theirs, sample(ours))


def test_arguments_are_torchs():
    """Ours come after them, and by keyword only."""
    ours, theirs = (
        list(inspect.signature(c).parameters.values())
        for c in (ConvTranspose2d, nn.ConvTranspose2d)
    )
    extra = ours[len(theirs) :]
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    assert {p.kind for p in extra} == {inspect.Parameter.KEYWORD_ONLY}
    assert [(p.name, p.default) for p in extra] == [
        ("output_size", None),
        ("activation", None),
        ("negative_slope", 0.01),
    ]


def test_state_dict_both_ways(layers):
    ours, theirs = layers
    for source, target in ((ours, theirs), (theirs, ours)):
        nn.init.normal_(source.weight)
        target.load_state_dict(source.state_dict())
        assert_same_layer(ours, theirs, sample(ours))


def test_copies(layers):
    ours, _ = layers
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
        ours._replicate_for_data_parallel(),
    ):
        assert type(other) is ConvTranspose2d and other is not ours
        if not getattr(other, "_is_replica", False):
            assert_same_layer(other, ours, sample(ours))


def test_replica_of_data_parallel(layers):
    ours, _ = layers
    replica = ours._replicate_for_data_parallel()
    for name, parameter in ours._parameters.items():  # as torch.nn.parallel.replicate does
        setattr(replica, name, None if parameter is None else parameter * 2)
    x = sample(ours)
    assert_close(replica(x), 2 * ours(x))
    replica(x).sum().backward()
    assert ours.weight.grad is not None


def test_output_size(layers):
    ours, theirs = layers
    x = sample(ours)
    smallest = torch.tensor(ours(x).shape[-2:]) - torch.tensor(ours.output_padding)
    for extra in torch.cartesian_prod(*(torch.arange(s) for s in ours.stride)):
        h, w = (smallest + extra).tolist()
        if any(e >= max(s, d) for e, s, d in zip(extra, ours.stride, ours.dilation, strict=True)):
            continue
        for size in ([h, w], (h, w), [9, 9, h, w], torch.Size((h, w))):
            got = ours(x, output_size=size)
            assert got.shape[-2:] == (h, w)
            assert_close(got, theirs(x, output_size=size))
        for size in ([h, w], [9, h, w]):
            assert_close(ours(x[0], output_size=size), theirs(x[0], output_size=size))


@pytest.mark.parametrize("size", [(8, 9), (12, 9), (9,), (1, 1, 1, 9, 9), ()], ids=str)
def test_wrong_output_size(size):
    """8 x 9 and 12 x 9 are just beyond the sizes from 9 x 7 to 11 x 8 that there are."""
    args = (4, 6, 3, (3, 2), (2, 1))
    x = torch.randn(2, 4, 4, 4)
    errors = []
    for cls in (ConvTranspose2d, nn.ConvTranspose2d):
        with pytest.raises(ValueError) as caught:
            cls(*args)(x, output_size=size)
        errors.append(caught)
    assert errors[0].type is errors[1].type


def test_dtype_and_memory_format():
    layer = ConvTranspose2d(4, 6, 3).to(memory_format=torch.channels_last).double()
    reference = nn.ConvTranspose2d(4, 6, 3).double()
    reference.load_state_dict(layer.state_dict())
    x = sample(layer).to(memory_format=torch.channels_last)
    assert_same_layer(layer, reference, x)


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_norms_by_hooks(layers, wrap, seed):
    check_wrapped(layers, wrap, seed)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_norms_by_parametrization(layers, wrap, seed):
    ours, _ = check_wrapped(layers, wrap, seed)
    parametrize.remove_parametrizations(ours, "weight")
    assert type(ours) is ConvTranspose2d


def check_wrapped(layers, wrap, seed):
    wrapped, x = [], sample(layers[0])  # a look at a wrapped weight may change it
    for layer in layers:
        torch.manual_seed(seed)
        wrapped.append(wrap(layer))
    results = [layer(x) for layer in wrapped]
    assert_close(*results)
    for y in results:
        y.square().sum().backward()
    for a, b in zip(*(layer.parameters() for layer in wrapped), strict=True):
        assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    return wrapped


def test_fusing_batch_norm():
    layer = ConvTranspose2d(4, 6, 3, 2, 1).double().eval()
    norm = nn.BatchNorm2d(6).double().eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    plain = nn.ConvTranspose2d(4, 6, 3, 2, 1).double().eval()
    plain.load_state_dict(layer.state_dict())
    fused = fuse_conv_bn_eval(layer, norm, transpose=True)
    assert type(fused) is ConvTranspose2d
    x = sample(layer)
    assert_close(fused(x), norm(layer(x)))
    assert_close(fused(x), fuse_conv_bn_eval(plain, norm, transpose=True)(x))


def test_training_is_torchs(seed):
    """A few steps of an optimiser lead to the same weights."""
    weights = []
    for cls in (ConvTranspose2d, nn.ConvTranspose2d):
        torch.manual_seed(seed)
        model = nn.Sequential(cls(3, 8, 4, 2, 1), nn.ReLU(), cls(8, 1, 3, groups=1)).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        weights.append([p.detach() for p in model.parameters()])
    assert_close(*weights)


# --- output_size in the constructor --------------------------------------------------------------


def test_output_size_of_the_constructor(seed):
    """Inside nn.Sequential, which passes a layer nothing but its input."""
    plain = ConvTranspose2d(4, 6, 3, 2, 1)
    x = sample(plain)
    for size, full in (((10, 8), (10, 8)), ([9, 7], (9, 7))):
        torch.manual_seed(seed)
        layer = ConvTranspose2d(4, 6, 3, 2, 1, output_size=size)
        plain.load_state_dict(layer.state_dict())
        assert torch.equal(nn.Sequential(layer)(x), plain(x, output_size=full))
        assert torch.equal(layer(x, output_size=(9, 8)), plain(x, output_size=(9, 8)))
        assert f"output_size={full}" in repr(layer) and "output_size" not in repr(plain)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), layer(x)) and repr(other) == repr(layer)
        assert list(layer.state_dict()) == ["weight", "bias"]
    square = ConvTranspose2d(4, 6, 3, 2, 1, output_size=10)
    assert square(torch.randn(4, 5, 5)).shape == (6, 10, 10)
    with pytest.raises(ValueError, match="output size"):
        ConvTranspose2d(4, 6, 3, 2, 1, output_size=11)(x)


# --- padding beyond torch's ----------------------------------------------------------------------

OWN_PADDINGS = [((0, 1), (2, 0)), ((1, 1), (1, 1)), [[1, 0], [0, 1]], "same", "valid"]


@pytest.mark.parametrize("padding", OWN_PADDINGS, ids=str)
def test_own_padding_is_kept(padding):
    layer = ConvTranspose2d(4, 6, 3, 2, padding=padding)
    x = sample(layer)
    want = conv_transpose2d(x, layer.weight, layer.bias, 2, padding)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), want)
        assert f"padding={layer.padding}" in repr(other)


def test_asymmetric_padding_crops_the_sides_it_names():
    x, w, b = torch.randn(2, 4, 5, 4), torch.randn(4, 6, 3, 2), torch.randn(6)
    full = conv_transpose2d(x, w, b, 2)
    got = conv_transpose2d(x, w, b, 2, padding=((2, 1), (0, 3)), output_padding=(1, 0))
    longer = nn.functional.conv_transpose2d(x, w, b, 2, output_padding=(1, 0))
    assert_close(got, longer[:, :, 2 : full.shape[2], : full.shape[3] - 3])
    layer = ConvTranspose2d(4, 6, (3, 2), 2, padding=((2, 1), (0, 3)))
    layer.load_state_dict({"weight": w, "bias": b})
    sizes = full.shape[2] - 3 + 1, full.shape[3] - 3
    assert torch.equal(layer(x, output_size=sizes), got)
    with pytest.raises(ValueError, match="output size"):
        layer(x, output_size=(sizes[0] + 1, sizes[1]))


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
def test_named_padding_is_tensorflows(kernel, stride, dilation):
    """Same: size * stride, the smaller half of the excess cropped first; valid: nothing cropped."""
    extent = dilation * (kernel - 1) + 1
    x, w, b = torch.randn(2, 3, 4, 5), torch.randn(3, 2, kernel, kernel), torch.randn(2)
    full = nn.functional.conv_transpose2d(x, w, None, stride, dilation=dilation)
    tail = max(stride - extent, 0)  # the pixels that a kernel shorter than its stride leaves
    full = nn.functional.pad(full, (0, tail, 0, tail)) + b[:, None, None]
    crop = max(extent - stride, 0) // 2
    same = full[:, :, crop:, crop:][:, :, : 4 * stride, : 5 * stride]
    for name, want in (("same", same), ("valid", full)):
        layer = ConvTranspose2d(3, 2, kernel, stride, name, dilation=dilation)
        layer.load_state_dict({"weight": w, "bias": b})
        assert_close(layer(x), want)
        assert torch.equal(layer(x, output_size=want.shape[2:]), layer(x))
        with pytest.raises(ValueError, match="by itself|output size"):
            layer(x, output_size=(want.shape[2] + 1, want.shape[3]))


@pytest.mark.parametrize(
    "kwargs,error,words",
    [
        ({"stride": 0.5}, TypeError, "stride.*0.5.*integer >= 1"),
        ({"stride": (2, 1.5)}, TypeError, "stride.*1.5.*integer >= 1"),
        ({"padding": 1.0}, TypeError, "padding.*float"),
        ({"output_padding": "same"}, TypeError, "output_padding.*str"),
        ({"dilation": None}, TypeError, "dilation.*NoneType"),
        ({"stride": (1, 2, 3)}, RuntimeError, r"stride.*list of 2 values.*\[1, 2, 3\]"),
        ({"padding": "full"}, ValueError, "'same' or 'valid'.*'full'"),
        ({"padding": ((1, 2), (3,))}, RuntimeError, r"\(top, bottom\), \(left, right\)"),
        ({"padding": "same", "stride": 2, "output_padding": 1}, ValueError, "output_padding"),
        ({"groups": 3}, ValueError, "divisible by groups"),
        ({"groups": 0}, ValueError, "positive"),
        ({"padding_mode": "reflect"}, ValueError, "padding mode.*'reflect'"),
        ({"output_size": 0}, ValueError, "output_size.*0"),
        ({"output_size": (9, 9, 9)}, RuntimeError, r"output_size.*\[9, 9, 9\]"),
        ({"output_size": 9.5}, TypeError, "output_size.*float"),
    ],
    ids=str,
)
def test_impossible_arguments(kwargs, error, words):
    with pytest.raises(error, match=words):
        ConvTranspose2d(4, 6, 3, **kwargs)
