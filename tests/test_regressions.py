"""Mistakes that users met in transposed convolutions elsewhere, each as the call that showed it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import deconv_ext
from deconv_ext.functional import conv_transpose2d


def check(x: Tensor, w: Tensor, bias: Tensor | None = None, **arguments) -> Tensor:
    """Values and gradients against torch's operator in float64; returns the values."""
    operands = [t for t in (x, w, bias) if t is not None]
    ours = [t.detach().requires_grad_() for t in operands]
    exact = [t.detach().double().contiguous().requires_grad_() for t in operands]
    y, want = conv_transpose2d(*ours, **arguments), F.conv_transpose2d(*exact, **arguments)
    assert y.dtype == x.dtype and y.shape == want.shape
    dy = torch.randn(want.shape, dtype=torch.float64).to(x.dtype)
    grads = torch.autograd.grad(y, ours, dy)
    wanted = torch.autograd.grad(want, exact, dy.double())
    for got, truth in zip((y, *grads), (want, *wanted)):
        terms = max(t.numel() for t in (x, w, dy))  # at most, in a sum
        eps = 2 * torch.finfo(x.dtype).eps + torch.finfo(torch.float32).eps * terms**0.5
        torch.testing.assert_close(got.double(), truth, rtol=0, atol=eps * truth.abs().max().item())
    return y.detach()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def test_two_identical_forward_calls_agree() -> None:
    """pytorch 109453: 192 channels, 5x5, stride 2, on 19x27."""
    layer = deconv_ext.ConvTranspose2d(192, 192, 5, 2)
    torch.nn.init.normal_(layer.weight)
    x = random(1, 192, 19, 27)
    with torch.no_grad():
        first = layer(x)
        assert all(torch.equal(layer(x), first) for _ in range(10))


def test_training_of_a_vae_decoder_is_stable() -> None:
    """pytorch 16610: 1024 -> 128 -> 64 -> 32 -> 3 channels, kernels 5, 5, 6, 6, stride 2."""

    def decoder(layer: type[torch.nn.Module]) -> torch.nn.Sequential:
        torch.manual_seed(0)
        shapes = (1024, 128, 5), (128, 64, 5), (64, 32, 6), (32, 3, 6)
        layers = [module for shape in shapes for module in (layer(*shape, 2), torch.nn.ReLU())]
        return torch.nn.Sequential(*layers[:-1])

    z, target = random(4, 1024, 1, 1), torch.rand(4, 3, 64, 64)
    losses = []
    for model in (decoder(deconv_ext.ConvTranspose2d), decoder(torch.nn.ConvTranspose2d)):
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        losses.append([])
        for _ in range(4):
            loss = (model(z) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][-1] < losses[0][0]


def test_half_channels_last_pointwise_backward() -> None:
    """pytorch 45172, 51185: 28 -> 28 channels, 1x1, half precision, on 108x108."""
    x = random(6, 28, 108, 108, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    y = check(x, random(28, 28, 1, 1, dtype=torch.float16) / 5, random(28, dtype=torch.float16))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_backward_with_dilation_and_output_padding() -> None:
    """pytorch 5112: 4 -> 1 channels, 3x3, output_padding 1, dilation 2, one pixel: a crash."""
    check(random(1, 4, 1, 1), random(4, 1, 3, 3), output_padding=1, dilation=2)


def test_gradient_of_a_pointwise_kernel_with_stride() -> None:
    """pytorch 63314: 1x1, stride 2, two pixels: the second gradient was 0."""
    x, w = random(1, 1, 1, 2).requires_grad_(), random(1, 1, 1, 1)
    dy = torch.tensor([1.5, 0.0, 0.7]).view(1, 1, 1, 3)
    (dx,) = torch.autograd.grad(conv_transpose2d(x, w, stride=2), x, dy)
    assert torch.equal(dx, torch.tensor([1.5, 0.7]).view(1, 1, 1, 2) * w)


@pytest.mark.parametrize("batch", ((), (1,)))
def test_output_size_of_unbatched_input(batch: tuple[int, ...]) -> None:
    """pytorch 75889: 16x16, stride 16, padding 7, output_size ignored without a batch."""
    layer = deconv_ext.ConvTranspose2d(1, 1, 16, 16, 7)
    y = layer(random(*batch, 1, 15, 13), output_size=(240, 200))
    assert y.shape == (*batch, 1, 240, 200)


def test_output_size_with_dilation() -> None:
    """pytorch 14272, 43793: dilation was ignored in what output_size asks for."""
    layer = deconv_ext.ConvTranspose2d(2, 3, 3, 2, 1, dilation=2)
    x = random(2, 2, 5, 6)
    for extra in (0, 1):
        size = [11 + extra, 13 + extra]
        want = F.conv_transpose2d(x, layer.weight, layer.bias, 2, 1, extra, 1, 2)
        assert list(want.shape[2:]) == size
        torch.testing.assert_close(layer(x, output_size=size), want)
    with pytest.raises(ValueError, match="output size"):
        layer(x, output_size=[13, 14])


@pytest.mark.parametrize(
    "size,kernel,arguments",
    (
        ((2, 2), 2, {"stride": 2, "padding": 2}),
        ((1, 1), 2, {"padding": 1}),
        ((2, 2), 2, {"stride": 2, "padding": 3}),
    ),
)
def test_an_empty_output_is_refused(size: tuple[int, int], kernel: int, arguments: dict) -> None:
    """pytorch 88647, 157909, 144013: refused here, empty there. As torch does on this device."""
    x, w = random(1, 1, *size), random(1, 1, kernel, kernel)
    for function in (conv_transpose2d, F.conv_transpose2d):
        with pytest.raises(RuntimeError, match="Output size is too small"):
            function(x, w, **arguments)


def test_no_output_channels() -> None:
    """pytorch 142466: torch fails inside a library; the weight is named here."""
    x, w = random(2, 3, 4, 4), random(3, 0, 3, 3)
    with pytest.raises(RuntimeError):
        F.conv_transpose2d(x, w)
    with pytest.raises(RuntimeError, match=r"weight of size \[3, 0, 3, 3\]"):
        conv_transpose2d(x, w)


@pytest.mark.parametrize("batch", (0, 1))
@pytest.mark.parametrize("output_padding", (1, 2))
def test_output_padding_as_large_as_the_stride(batch: int, output_padding: int) -> None:
    """pytorch 169236, 186524, 195599: accepted on some devices, unchecked for empty inputs."""
    with pytest.raises(RuntimeError, match="output padding must be smaller"):
        conv_transpose2d(random(batch, 1, 3, 3), random(1, 1, 2, 2), output_padding=output_padding)


def test_negative_output_padding() -> None:
    """pytorch 964: accepted, to fail later."""
    with pytest.raises(RuntimeError, match="negative output_padding is not supported"):
        conv_transpose2d(random(1, 1, 3, 3), random(1, 1, 3, 3), stride=2, output_padding=-1)


@pytest.mark.parametrize("name", ("dilation", "stride"))
@pytest.mark.parametrize("value", (1879048192, 1 << 31, (1 << 62) + 1, (1 << 63) - 1))
def test_enormous_arguments(name: str, value: int) -> None:
    """pytorch 142457: dilation 1879048192 freed memory twice. No memory for it is an error, too."""
    with pytest.raises((RuntimeError, MemoryError)):
        conv_transpose2d(random(1, 1, 2, 2), random(1, 1, 2, 2), **{name: value})


def test_half_precision_of_long_sums() -> None:
    """pytorch 153276: (9, 9, 20, 52) by 12x84, padding 12: two devices differed by 736."""
    x = torch.randint(-1, 14, (9, 9, 20, 52)).half()
    w = torch.randint(-2, 0, (9, 11, 12, 84)).half()
    want = F.conv_transpose2d(x.double(), w.double(), padding=12)
    assert want.abs().max() > 10000
    assert torch.equal(conv_transpose2d(x, w, padding=12), want.half())


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.bfloat16))
def test_infinite_weights(dtype: torch.dtype) -> None:
    """pytorch 165744: 3x3 of inf on 4x4; zeros around the image turned infinities into NaN."""
    x, w = random(1, 1, 4, 4, dtype=dtype), torch.full((1, 1, 3, 3), torch.inf, dtype=dtype)
    y = conv_transpose2d(x, w, padding=1)
    for h, v in ((h, v) for h in range(4) for v in range(4)):
        signs = x[0, 0, max(h - 1, 0) : h + 2, max(v - 1, 0) : v + 2].sign()
        want = torch.inf * signs.flatten()[0].item() if len(signs.unique()) == 1 else torch.nan
        assert torch.equal(y[0, 0, h, v].float().isnan(), torch.tensor(want).isnan()), (h, v)
        assert y[0, 0, h, v].isnan() or y[0, 0, h, v].item() == want, (h, v)
    x = x.abs() + 1
    assert conv_transpose2d(x, w, padding=1).isposinf().all()


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize(
    "shapes",
    (
        ((2, 16, 4, 4), (16, 16, 3, 3), 1),
        ((2, 8, 5, 5), (8, 3, 1, 1), 1),
        ((2, 8, 5, 5), (8, 3, 3, 3), 4),
    ),
)
def test_a_fake_tensor_foretells_shape_and_memory_format(shapes, layout) -> None:
    """pytorch 172711, 184026: channels or strides of the traced output were not the real ones."""
    x_shape, w_shape, groups = shapes
    arguments = dict(stride=2, padding=1, output_padding=1, groups=groups)
    x, w = random(*x_shape).contiguous(memory_format=layout), random(*w_shape)
    y = conv_transpose2d(x, w, **arguments)
    with FakeTensorMode() as mode:
        fake = conv_transpose2d(mode.from_tensor(x), mode.from_tensor(w), **arguments)
    assert fake.shape == y.shape and y.shape[1] == w.shape[1] * groups
    assert fake.stride() == y.stride()


def test_output_padding_beyond_the_stride_with_dilation() -> None:
    """pytorch 100846: legal as long as it is below the dilation."""
    check(random(2, 3, 4, 5), random(3, 2, 3, 3), random(2), output_padding=2, dilation=3)


def test_transposed_input() -> None:
    """pytorch 3512: an input whose axes were swapped."""
    x = random(2, 1024, 3, 6).transpose(2, 3)
    assert not x.is_contiguous()
    check(x, random(1024, 3, 3, 2), random(3), stride=2)


def test_double_backward_of_an_expanded_weight() -> None:
    """pytorch 4500: huge errors of the second derivative."""
    x = random(2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    small = random(3, 1, 3, 3, dtype=torch.float64).requires_grad_()

    def function(x: Tensor, small: Tensor) -> Tensor:
        return conv_transpose2d(x, small.expand(3, 4, 3, 3), stride=2, padding=1)

    assert torch.autograd.gradcheck(function, (x, small))
    assert torch.autograd.gradgradcheck(function, (x, small))


def test_backward_of_a_permuted_weight() -> None:
    """torch's own backward refuses some permuted weights."""
    w = random(3, 3, 5, 4).permute(3, 2, 0, 1)
    check(random(2, 4, 6, 5), w, stride=2, padding=1)


def test_groups_as_large_as_the_batch() -> None:
    """stylegan2-pytorch 30: one weight for each sample, folded into groups."""
    x, w = random(4, 8, 9, 9), random(4, 8, 6, 3, 3)
    y = check(x.reshape(1, 32, 9, 9), w.reshape(32, 6, 3, 3), stride=2, groups=4)
    for n in range(4):
        alone = F.conv_transpose2d(x[n : n + 1], w[n], stride=2)
        torch.testing.assert_close(y[:, 6 * n : 6 * n + 6], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "x,w,arguments",
    (
        pytest.param(
            (2, 64, 32, 32), (64, 1, 8, 8), dict(stride=4, padding=2, groups=64), id="rocm_587"
        ),
        pytest.param((1, 1, 3, 3), (1, 1, 2, 2), {}, id="nntrainer_4347"),
        pytest.param((1, 1, 3, 5), (1, 1, 2, 4), {}, id="nntrainer_4347_rectangular"),
        pytest.param(
            (1, 16, 7, 7),
            (16, 3, 3, 3),
            dict(stride=2, padding=1, output_padding=1),
            id="tvm_19524",
        ),
        pytest.param(
            (1, 1, 3, 3), (1, 1, 3, 3), dict(stride=2, padding=2, dilation=2), id="mxnet_13876"
        ),
        pytest.param(
            (1, 1, 8, 8),
            (1, 3, 2, 2),
            dict(padding=3, dilation=2, output_padding=1),
            id="ort_14208",
        ),
        pytest.param((1, 1, 1, 5), (1, 1, 1, 1), dict(stride=(1, 2)), id="mps_82711"),
        pytest.param((1, 1, 1, 5), (1, 1, 1, 2), dict(stride=(1, 2)), id="mps_82711_two_taps"),
        pytest.param((1, 1, 1, 2), (1, 65537, 1, 2), {}, id="mps_129207_outputs"),
        pytest.param((1, 65537, 1, 2), (65537, 1, 1, 2), {}, id="mps_129207_inputs"),
        pytest.param(
            (1, 512, 1, 32),
            (512, 1, 1, 6),
            dict(stride=3, padding=(0, 2), groups=512),
            id="pytorch_47341",
        ),
    ),
)
def test_wrong_values_elsewhere(x: tuple, w: tuple, arguments: dict) -> None:
    check(random(*x), random(*w), random(w[1] * arguments.get("groups", 1)), **arguments)


def test_inverse_fourier_transform() -> None:
    """pytorch 120982: 1026 channels by 1x1024, stride 256, took minutes to prepare."""
    x, w = random(1, 1026, 1, 60), random(1026, 1, 1, 1024) / 32
    want = F.conv_transpose2d(x.double(), w.double(), stride=(1, 256))
    got = conv_transpose2d(x, w, stride=(1, 256))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)


def test_groups_come_before_dilation() -> None:
    """bayesian-torch 34: the order of positional arguments is not that of conv2d."""
    x, w, bias = random(1, 4, 5, 5), random(4, 3, 3, 3), random(6)
    got = conv_transpose2d(x, w, bias, 1, 0, 0, 2, 1)
    torch.testing.assert_close(got, F.conv_transpose2d(x, w, bias, groups=2, dilation=1))
    assert got.shape == (1, 6, 7, 7)
