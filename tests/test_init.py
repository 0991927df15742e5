"""Initial weights do what they promise: equal phases, interpolation, kept variance."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import deconv_ext
from deconv_ext import init
from deconv_ext.checkerboard import dc_share, spectral_share

OPERATORS = pytest.mark.parametrize(
    "operator", [nn.ConvTranspose2d, deconv_ext.ConvTranspose2d], ids=["torch", "ours"]
)


@OPERATORS
@pytest.mark.parametrize(
    "kernel,stride,groups",
    [(2, 2, 1), (3, 3, 2), (4, 2, 1), (4, 2, 4), (6, 2, 1), (6, 3, 1), ((4, 3), (2, 3), 1)],
)
def test_icnr_enlarges_a_stride_1_result_by_nearest_neighbours(operator, kernel, stride, groups):
    layer = init.icnr_(operator(8, 12, kernel, stride, groups=groups, dtype=torch.float64))
    (step_h, step_w), x = layer.stride, torch.randn(2, 8, 5, 6, dtype=torch.float64)
    part = layer.weight[:, :, ::step_h, ::step_w]
    small = F.conv_transpose2d(x, part, groups=groups)
    assert small.std() > 0.1
    assert_close(layer(x), small.repeat_interleave(step_h, 2).repeat_interleave(step_w, 3))


def test_icnr_with_kernel_equal_to_the_stride_has_equal_taps():
    weight = init.icnr_(nn.ConvTranspose2d(5, 7, 3, 3)).weight
    assert torch.equal(weight, weight[..., :1, :1].expand_as(weight))


@pytest.mark.parametrize(
    "kernel,stride,padding,dilation",
    [(3, 2, 1, 1), (5, 2, 2, 1), (9, 2, 4, 1), (5, 3, 0, 1), (7, 4, 1, 1), (3, 2, 0, 3)],
)
def test_icnr_answers_a_constant_alike_in_every_phase(kernel, stride, padding, dilation):
    arguments = {"padding": padding, "dilation": dilation, "dtype": torch.float64}
    layer = nn.ConvTranspose2d(6, 4, kernel, stride, **arguments)
    assert dc_share(layer) > 0.1
    init.icnr_(layer)
    constant = torch.randn(1, 6, 1, 1, dtype=torch.float64).expand(1, 6, 24, 24)
    margin = dilation * (kernel - 1)  # beyond it every tap finds an input
    inside = layer(constant)[..., margin:-margin, margin:-margin]
    assert inside.numel() >= 4 * stride**2
    assert_close(inside, inside[..., :1, :1].expand_as(inside))
    assert inside.abs().min() > 1e-3
    assert dc_share(layer) < 1e-12


def test_icnr_takes_the_pattern_out_of_a_smooth_image():
    ramp = torch.linspace(0, 1, 32).expand(1, 8, 32, 32) + 1
    layer = nn.ConvTranspose2d(8, 8, 4, 2, 1, bias=False)
    before = spectral_share(layer(ramp)[..., 4:-4, 4:-4], 2)
    after = spectral_share(init.icnr_(layer)(ramp)[..., 4:-4, 4:-4], 2)
    assert before > 0.5 and after < 0.01


@pytest.mark.parametrize(
    "kernel,stride,dilation", [(1, 2, 1), (2, 3, 1), (4, 2, 2)], ids=["1s2", "2s3", "common"]
)
def test_icnr_refuses_a_phase_without_taps(kernel, stride, dilation):
    layer = nn.ConvTranspose2d(2, 2, kernel, stride, dilation=dilation)
    with pytest.raises(ValueError, match=rf"a tap in every phase.*stride=\({stride}, {stride}\)"):
        init.icnr_(layer)


@OPERATORS
@pytest.mark.parametrize("groups", [1, 3, 6], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8, (2, 3)], ids=str)
def test_bilinear_is_interpolation_inside(operator, stride, groups):
    steps = stride if isinstance(stride, tuple) else (stride, stride)
    kernel = tuple(2 * s - s % 2 for s in steps)
    padding = tuple((k - s) // 2 for k, s in zip(kernel, steps))
    layer = init.bilinear_(operator(6, 6, kernel, steps, padding, groups=groups))
    x = torch.randn(2, 6, 7, 8)
    got = layer(x)
    want = F.interpolate(x, scale_factor=steps, mode="bilinear", align_corners=False)
    assert got.shape == want.shape
    inside = (..., slice(steps[0], -steps[0]), slice(steps[1], -steps[1]))
    assert_close(got[inside], want[inside])


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((2, 3, 4, 2), "in_channels=2, out_channels=3"),
        ((2, 2, 2, 2), r"kernel_size >= 2 \* stride - 1 \(best 4 for stride=2\)"),
        ((2, 2, 4, 2, 0, 0, 1, True, 2), r"dilation=\(2, 2\)"),
    ],
)
def test_bilinear_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        init.bilinear_(nn.ConvTranspose2d(*arguments))


@pytest.mark.parametrize(
    "kernel,stride,groups", [(4, 2, 1), (3, 2, 1), (4, 4, 2), (5, 3, 4), (3, 1, 1)]
)
def test_kaiming_keeps_the_variance_through_a_relu(kernel, stride, groups):
    layer = init.kaiming_(
        nn.ConvTranspose2d(64, 64, kernel, stride, groups=groups), nonlinearity="relu"
    )
    x = torch.randn(4, 64, 14, 14).relu()
    y = layer(x)[..., kernel:-kernel, kernel:-kernel]
    y = y[..., : y.shape[-2] // stride * stride, : y.shape[-1] // stride * stride]
    assert float(y.square().mean()) == pytest.approx(1, rel=0.12)


def test_kaiming_fan_out_keeps_the_variance_of_gradients():
    layer = init.kaiming_(nn.ConvTranspose2d(96, 32, 4, 2), mode="fan_out", nonlinearity="linear")
    x = torch.randn(4, 96, 12, 12, requires_grad=True)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert float(gradient.square().mean()) == pytest.approx(1, rel=0.1)


def test_fans_are_those_of_a_transposed_convolution():
    layer = nn.ConvTranspose2d(8, 12, (4, 6), (2, 3), groups=2)
    assert init.fans(layer) == (4 * 24 / 6, 6 * 24)


@pytest.mark.parametrize("function", [init.kaiming_, init.icnr_, init.bilinear_])
def test_bias_layer_and_gradient_state(function):
    layer = nn.ConvTranspose2d(4, 4, 4, 2, dtype=torch.bfloat16)
    assert function(layer) is layer
    assert not layer.bias.any() and layer.weight.dtype == torch.bfloat16
    assert layer.weight.requires_grad and layer.weight.grad_fn is None
    assert function(nn.ConvTranspose2d(4, 4, 4, 2, bias=False)).bias is None
    with pytest.raises(TypeError, match="needs an nn.ConvTranspose2d, but got layer=Conv2d"):
        function(nn.Conv2d(4, 4, 4))
    with pytest.raises(ValueError, match="parametrized"):
        function(nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(4, 4, 4, 2)))


@pytest.mark.parametrize("function", [init.kaiming_, init.icnr_])
def test_a_generator_decides_the_numbers(function):
    first, second, other = (
        function(nn.ConvTranspose2d(4, 4, 4, 2), generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode='fan_avg'"):
        init.kaiming_(nn.ConvTranspose2d(1, 1, 2, 2), mode="fan_avg")
