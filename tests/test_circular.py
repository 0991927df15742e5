"""padding_mode="circular": periodic outputs, the adjoint of a convolution with circular padding."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from deconv_ext import ConvTranspose1d, ConvTranspose2d

#: kernel, stride, padding, output_padding, dilation; all with outputs of size * stride
GEOMETRIES = {
    "k4 s2": (4, 2, 1, 0, 1),
    "k3 s2": (3, 2, 1, 1, 1),
    "k3 s1": (3, 1, 1, 0, 1),
    "k2 s2, nothing wraps": (2, 2, 0, 0, 1),
    "k1 s3, gaps": (1, 3, 0, 2, 1),
    "k5 s3": (5, 3, 2, 2, 1),
    "k5 s2, all crop at the end": (5, 2, ((0, 3), (0, 3)), 0, 1),
    "k5 s2, all crop at the beginning": (5, 2, ((3, 0), (3, 0)), 0, 1),
    "dilation": (3, 1, 2, 0, 2),
    "dilation and stride": (3, 2, 2, 1, 2),
    "rectangular": ((4, 3), (2, 1), (1, 1), 0, 1),
    "same": (4, 3, "same", 0, 1),
    "same, odd excess": (3, 2, "same", 0, 1),
    "same, kernel below stride": (2, 5, "same", 0, 1),
}


def layer_of(name, groups=1, **kwargs):
    kernel, stride, padding, extra, dilation = GEOMETRIES[name]
    return ConvTranspose2d(
        4, 6, kernel, stride, padding, extra, groups, True, dilation, "circular",
        dtype=torch.float64, **kwargs,
    )  # fmt: skip


def begins(layer):
    """Where the padding begins on each axis."""
    return [axis.begin for axis in layer._axes(layer.padding, layer.output_padding)]


def defined(layer, x):
    """y[(i*stride + k*dilation - begin) mod (size*stride)] += x[i] * w[k], index by index."""
    period = [n * s for n, s in zip(x.shape[2:], layer.stride, strict=True)]
    y = torch.zeros(x.shape[0], layer.out_channels, *period, dtype=x.dtype)
    y += layer.bias[:, None, None]
    groups = layer.groups
    w = layer.weight.unflatten(0, (groups, -1))
    for i, j in itertools.product(*map(range, x.shape[2:])):
        pixel = x[:, :, i, j].unflatten(1, (groups, -1))
        for k, m in itertools.product(*map(range, layer.kernel_size)):
            o, p = (
                (index * s + tap * d - begin) % n
                for index, tap, s, d, begin, n in zip(
                    (i, j), (k, m), layer.stride, layer.dilation, begins(layer), period, strict=True
                )
            )
            y[:, :, o, p] += torch.einsum("ngc,gcd->ngd", pixel, w[..., k, m]).flatten(1)
    return y


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("size", [(6, 5), (1, 2)], ids=["wraps once", "wraps many times"])
def test_definition(name, groups, size):
    layer = layer_of(name, groups)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    with torch.no_grad():
        assert_close(layer(x), defined(layer, x))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_adjoint_of_the_convolution_with_circular_padding(name):
    """<conv(y), x> = <y, deconv(x)>, the left side by torch's convolution and torch's padding."""
    layer = layer_of(name, groups=2, output_size=None)
    nn.init.zeros_(layer.bias)
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    y = torch.randn(2, 6, *(n * s for n, s in zip((6, 7), layer.stride)), dtype=torch.float64)
    y.requires_grad_()
    top, left = layer._axes(layer.padding, layer.output_padding)
    sides = [max(v, 0) for v in (left.begin, left.end, top.begin, top.end)]
    padded = nn.functional.pad(y, sides, mode="circular")
    convolved = nn.functional.conv2d(
        padded, layer.weight, None, layer.stride, 0, layer.dilation, layer.groups
    )
    assert convolved.shape == x.shape
    (want,) = torch.autograd.grad(convolved, y, x)
    assert_close(layer(x), want)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_shifts_with_its_input(name):
    layer = layer_of(name)
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    shift = (2, -3)
    moved = [a * s for a, s in zip(shift, layer.stride)]
    assert_close(layer(x.roll(shift, (2, 3))), layer(x).roll(moved, (2, 3)))


def test_the_shape_is_that_of_zeros_and_so_is_the_middle():
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    layer = layer_of("k4 s2")
    plain = copy.deepcopy(layer)
    plain.padding_mode = "zeros"
    assert_close(layer(x)[:, :, 2:-2, 2:-2], plain(x)[:, :, 2:-2, 2:-2])
    assert layer(x).shape == plain(x).shape and not torch.allclose(layer(x), plain(x))


@pytest.mark.parametrize("name", ["k4 s2", "k3 s2", "dilation", "same, odd excess"])
def test_derivatives(name):
    layer = layer_of(name)
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x, *parameters):
        names = dict(layer.named_parameters())
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    operands = (x, *layer.parameters())
    assert gradcheck(
        function, operands, fast_mode=True, check_forward_ad=True, check_batched_grad=True
    )
    assert gradgradcheck(function, operands, fast_mode=True, check_fwd_over_rev=True)


def test_vmap_and_layouts():
    layer = layer_of("k4 s2")
    x = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        want = torch.stack([layer(sample) for sample in x])
        assert_close(torch.func.vmap(layer)(x), want)
        last = x[0].to(memory_format=torch.channels_last)
        assert_close(layer(last), want[0])
        assert layer(last).is_contiguous(memory_format=torch.channels_last)
        assert_close(layer(x[0, 0]), want[0, 0])


def test_one_dimension():
    layer = ConvTranspose1d(4, 6, 4, 2, 1, padding_mode="circular", dtype=torch.float64)
    plane = ConvTranspose2d(
        4, 6, (1, 4), (1, 2), (0, 1), padding_mode="circular", dtype=torch.float64
    )
    plane.load_state_dict({"weight": layer.weight[:, :, None], "bias": layer.bias})
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    assert_close(layer(x), plane(x[:, :, None])[:, :, 0])
    assert_close(layer(x.roll(1, 2)), layer(x).roll(2, 2))


def test_output_size_chooses_the_output_padding():
    """3x3 with stride 2 gives an odd size by itself, which is no period."""
    layer = ConvTranspose2d(4, 6, 3, 2, 1, padding_mode="circular")
    x = torch.randn(2, 4, 5, 6)
    with pytest.raises(ValueError, match="size . stride.*padding.* 1, .*output_padding=0"):
        layer(x)
    with pytest.raises(ValueError, match="size . stride"):
        layer(x, output_size=(10, 11))
    twin = ConvTranspose2d(4, 6, 3, 2, 1, 1, padding_mode="circular", output_size=(10, 12))
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, output_size=(10, 12)), twin(x))


@pytest.mark.parametrize(
    "args,kwargs",
    [
        ((3,), {}),
        ((4, 2), {}),
        ((3, 1, 2), {}),
        ((5, 2, 1), {}),
        ((3, 1, ((2, 1), (1, 1))), {}),
        ((4, 2, "valid"), {}),
    ],
    ids=str,
)
def test_where_no_output_padding_gives_a_period(args, kwargs):
    with pytest.raises(ValueError, match="padding_mode='circular'.*size . stride"):
        ConvTranspose2d(4, 6, *args, padding_mode="circular", **kwargs)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "", None])
def test_other_modes_are_refused_as_by_torch(mode):
    with pytest.raises(ValueError, match="padding mode"):
        ConvTranspose2d(4, 6, 4, 2, 1, padding_mode=mode)
    layer = ConvTranspose2d(4, 6, 4, 2, 1)
    layer.padding_mode = mode
    with pytest.raises(ValueError, match="padding mode"):
        layer(torch.randn(2, 4, 5, 6))


def test_torch_has_no_such_mode():
    """If torch gets one, ours must be compared with it."""
    with pytest.raises(ValueError, match='Only "zeros"'):
        nn.ConvTranspose2d(4, 6, 4, 2, 1, padding_mode="circular")


def test_state_repr_and_copies():
    layer, zeros = layer_of("k4 s2"), ConvTranspose2d(4, 6, 4, 2, 1, dtype=torch.float64)
    assert list(layer.state_dict()) == list(zeros.state_dict())
    assert "padding_mode=circular" in repr(layer) and "padding_mode" not in repr(zeros)
    zeros.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    assert not torch.allclose(zeros(x), layer(x))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.padding_mode == "circular" and torch.equal(other(x), layer(x))


def test_empty_batch_and_empty_image():
    layer = layer_of("k4 s2")
    assert layer(torch.zeros(0, 4, 5, 6, dtype=torch.float64)).shape == (0, 6, 10, 12)
    with pytest.raises(RuntimeError, match="Only zero batch or zero channel"):
        layer(torch.zeros(2, 4, 0, 6, dtype=torch.float64))
