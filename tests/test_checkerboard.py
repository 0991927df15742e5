"""The checkerboard toolkit measures what it says, and its remedies keep the function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import deconv_ext
from deconv_ext import checkerboard, init
from deconv_ext.__main__ import main

F64 = torch.float64
OPERATORS = pytest.mark.parametrize(
    "operator", [nn.ConvTranspose2d, deconv_ext.ConvTranspose2d], ids=["torch", "ours"]
)


def model() -> nn.Sequential:
    """One layer of every verdict."""
    return nn.Sequential(
        nn.ConvTranspose2d(3, 8, 3, 2, 1, 1),
        nn.ReLU(),
        init.icnr_(deconv_ext.ConvTranspose2d(8, 8, 4, 2, 1)),
        nn.ReLU(),
        deconv_ext.ConvTranspose2d(8, 8, 2, 2),
        nn.ConvTranspose2d(8, 8, 3, 1),
        nn.ConvTranspose2d(8, 2, 1, 2),
    )


def model_and_sample() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return model(), torch.rand(1, 3, 12, 12)


# --- measures ------------------------------------------------------------------------------------


def test_overlap_map_of_the_textbook_case():
    row = torch.tensor([1, 1, 2, 1, 2, 1, 1])
    assert torch.equal(checkerboard.overlap_map(3, 2, size=3), torch.outer(row, row))
    cropped = checkerboard.overlap_map(3, 2, padding=1, output_padding=1, size=3)
    assert torch.equal(cropped, torch.outer(*[torch.tensor([1, 2, 1, 2, 1, 1])] * 2))
    assert checkerboard.overlap_map((4, 3), (2, 3), size=(5, 2)).shape == (12, 6)


@pytest.mark.parametrize("kernel", range(1, 8))
@pytest.mark.parametrize("stride", range(1, 5))
def test_unevenness_is_that_of_the_overlap_map(kernel, stride):
    period = checkerboard.overlap_map(kernel, stride, size=30)
    period = period[8 * stride : 9 * stride, 8 * stride : 9 * stride].double()
    want = float(period.std(correction=0) / period.mean())
    assert checkerboard.unevenness(kernel, stride) == pytest.approx(want)
    assert (want == 0) == (kernel % stride == 0)


def test_unevenness_sees_a_common_divisor_of_stride_and_dilation():
    assert checkerboard.unevenness(4, 2, dilation=2) == pytest.approx(3**0.5)  # 1 phase of 4
    assert checkerboard.unevenness(4, 2, dilation=3) == 0


@pytest.mark.parametrize("stride", [2, 3, (2, 4)], ids=str)
def test_spectral_share_is_the_energy_at_multiples_of_the_inverse_stride(stride):
    step_h, step_w = stride if isinstance(stride, tuple) else (stride, stride)
    image = torch.randn(2, 3, 24, 36, dtype=F64)
    image[..., ::step_h, 1::step_w] += 0.5
    power = torch.fft.fft2(image).abs().square().sum(dim=(0, 1))
    power[0, 0] = 0
    want = power[:: 24 // step_h, :: 36 // step_w].sum() / power.sum()
    assert 0.01 < want < 0.9
    assert checkerboard.spectral_share(image, stride) == pytest.approx(float(want))


def test_spectral_share_of_the_extremes():
    assert checkerboard.spectral_share(torch.ones(1, 4, 4), 2) == 0
    board = (torch.arange(9)[:, None] + torch.arange(8)) % 2.0
    assert checkerboard.spectral_share(board[None], 2) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 4 pixels"):
        checkerboard.spectral_share(torch.ones(3, 8), 4)


@OPERATORS
@pytest.mark.parametrize(
    "kernel,stride,padding,extra,dilation",
    [(3, 2, 1, 1, 1), (4, 2, 1, 0, 1), (5, 3, 2, 0, 2), (4, 2, 0, 0, 2), (1, 2, 0, 0, 1)],
)
def test_dc_share_and_gains_are_measured_on_real_outputs(
    operator, kernel, stride, padding, extra, dilation
):
    """All constant inputs one after the other: the layer's own outputs give the same figures."""
    arguments = (4, 5, kernel, stride, padding, extra, 1, False, dilation)
    layer = operator(*arguments, dtype=F64)
    constants = torch.eye(4, dtype=F64)[:, :, None, None].expand(4, 4, 16, 16)
    start = 6 * stride
    period = layer(constants)[..., start : start + stride, start : start + stride]
    energy = period.square().mean(dim=(-2, -1)).sum()
    want = 1 - period.mean(dim=(-2, -1)).square().sum() / energy
    assert checkerboard.dc_share(layer) == pytest.approx(float(want))
    gains = period.square().mean(dim=(0, 1)).sqrt()
    assert_close(checkerboard.phase_gains(layer), gains / gains.mean())


# --- remedies ------------------------------------------------------------------------------------


@OPERATORS
@pytest.mark.parametrize("extra", [0, 1, 2])
@pytest.mark.parametrize("padding", [0, 1, (2, 0)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3, (3, 4)], ids=str)
@pytest.mark.parametrize("kernel", [1, 2, 3, 5, (4, 7)], ids=str)
def test_widening_keeps_the_function(operator, kernel, stride, padding, extra):
    steps = stride if isinstance(stride, tuple) else (stride, stride)
    layer = operator(4, 6, kernel, stride, padding, groups=2, dtype=F64)
    layer.output_padding = tuple(min(extra, s - 1) for s in steps)
    x = torch.randn(1, 4, 5, 6, dtype=F64)
    wide = checkerboard.widen(layer)
    assert type(wide) is operator
    assert all(
        k % s == 0 and k - old < s for k, s, old in zip(wide.kernel_size, steps, layer.kernel_size)
    )
    assert checkerboard.unevenness(wide.kernel_size, steps) == 0
    assert_close(wide(x), layer(x))


@pytest.mark.parametrize("padding", ["same", "valid", ((1, 0), (0, 2))], ids=str)
def test_widening_a_layer_with_our_own_paddings(padding):
    layer = deconv_ext.ConvTranspose2d(2, 3, 3, 2, padding, dtype=F64)
    x = torch.randn(1, 2, 5, 6, dtype=F64)
    wide = checkerboard.widen(layer)
    assert wide.kernel_size == (4, 4)
    assert_close(wide(x), layer(x))


def test_a_widened_layer_is_a_copy_that_trains():
    layer = nn.ConvTranspose2d(2, 2, 3, 2, 1, 1)
    wide = checkerboard.widen(layer)
    assert (wide.kernel_size, wide.padding, wide.output_padding) == ((4, 4), (1, 1), (0, 0))
    wide(torch.randn(1, 2, 4, 4)).square().sum().backward()
    assert wide.weight.grad[..., 3, 3].all() and layer.weight.grad is None
    assert layer.kernel_size == (3, 3) and layer.weight.shape[-1] == 3
    with pytest.raises(ValueError, match="dilation=1"):
        checkerboard.widen(nn.ConvTranspose2d(2, 2, 3, 2, dilation=2))


@pytest.mark.parametrize(
    "arguments,want",
    [
        ((3, 2, 1, 1), (4, 1, 0, 0, 1)),
        ((3, 2), (4, 1, 1, 1, 0)),
        ((9, 2, 4, 1), (10, 4, 0, 0, 1)),
        ((5, 3), (6, 1, 1, 1, 0)),
        ((4, 2, 1), (4, 1, 0, 0, 0)),
    ],
)
def test_suggestions(arguments, want):
    new = checkerboard.suggest(*arguments)
    got = (new.kernel_size, new.padding, new.output_padding, new.before, new.after)
    assert got == tuple((value, value) for value in want)


def test_suggest_refuses_what_is_no_kernel():
    with pytest.raises(ValueError, match="kernel=0, stride=2"):
        checkerboard.suggest(0, 2)
    with pytest.raises(TypeError, match="stride is an integer >= 1"):
        checkerboard.suggest(3, 0.5)


@OPERATORS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("stride,groups", [(1, 1), (2, 1), (2, 3), (4, 1), (3, 6)])
def test_subpixel_convolution_is_the_same_function(operator, stride, groups, bias):
    layer = operator(6, 12, stride, stride, groups=groups, bias=bias, dtype=F64).eval()
    x = torch.randn(2, 6, 4, 5, dtype=F64)
    subpixel = checkerboard.to_subpixel(layer)
    assert [type(m) for m in subpixel] == [nn.Conv2d, nn.PixelShuffle] and not subpixel.training
    assert_close(subpixel(x), layer(x))


@pytest.mark.parametrize(
    "arguments", [(2, 2, 4, 2), (2, 2, (2, 3), (2, 3)), (2, 2, 2, 2, 1), (2, 2, 2, 2, 0, 1)]
)
def test_subpixel_refuses_what_is_not_exact(arguments):
    with pytest.raises(ValueError, match="kernel_size == stride, square"):
        checkerboard.to_subpixel(nn.ConvTranspose2d(*arguments))


@OPERATORS
@pytest.mark.parametrize(
    "kernel,stride,dilation", [(3, 2, 1), (5, 3, 1), ((3, 4), 2, 1), (3, 2, 3)]
)
def test_normalized_overlap_answers_equal_weights_evenly(operator, kernel, stride, dilation):
    layer = operator(3, 2, kernel, stride, padding=1, dilation=dilation, bias=False, dtype=F64)
    nn.init.constant_(layer.weight, 0.5)
    x = torch.ones(1, 3, 14, 14, dtype=F64)
    inside = (..., slice(12, -12), slice(12, -12))
    mean = layer(x)[0, 0, 12 : 12 + stride, 12 : 12 + stride].mean()
    assert layer(x)[inside].std() > 0.1
    assert checkerboard.normalize_overlap(layer) is layer
    assert_close(layer(x)[inside], mean.expand_as(layer(x)[inside]))
    want = layer(x)
    parametrize.remove_parametrizations(layer, "weight")
    assert_close(layer(x), want)
    assert type(layer) is operator


def test_normalized_overlap_trains_and_saves():
    layer = checkerboard.normalize_overlap(nn.ConvTranspose2d(2, 2, 3, 2))
    layer(torch.randn(1, 2, 3, 3)).sum().backward()
    assert layer.parametrizations.weight.original.grad.all()
    assert set(layer.state_dict()) == {"bias", "parametrizations.weight.original"}
    with pytest.raises(ValueError, match="parametrized"):
        checkerboard.normalize_overlap(layer)


# --- reports -------------------------------------------------------------------------------------


def test_diagnosis_names_the_faults_and_remedies():
    net, sample = model_and_sample()
    report = checkerboard.diagnose(net, sample)
    verdicts = {layer.name: layer.verdict for layer in report.layers}
    assert verdicts["0"] == "uneven overlap, 1 to 4 taps meet: a visible pattern"
    assert verdicts["2"] == "even"
    assert verdicts["4"].startswith("even overlap, but the weights of the phases differ")
    assert verdicts["5"].startswith("stride 1")
    assert verdicts["6"].startswith("holes: 3 of 4 phases")
    assert "kernel_size=(4, 4)" in report.layers[0].remedy
    assert "icnr_" in report.layers[2].remedy
    text = str(report)
    assert all(word in text for word in ("uneven overlap", "phase gains", "widen(layer)"))
    low, high = report.layers[1].gains.min(), report.layers[1].gains.max()
    assert_close(low, high)


def test_diagnosis_measures_the_output_of_the_layer():
    net, sample = model_and_sample()
    report = checkerboard.diagnose(net, sample)
    with torch.no_grad():
        y = net[:1](sample)
    assert_close(report.layers[0].output, y[0])
    inside = y[..., 2:-2, 2:-2]
    assert report.layers[0].output_share == checkerboard.spectral_share(inside, 2)
    assert net.training and checkerboard.diagnose(net).layers[0].output_share is None


def test_models_that_cannot_be_diagnosed():
    with pytest.raises(ValueError, match="expected a model with an nn.ConvTranspose2d"):
        checkerboard.diagnose(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="layer '0' is lazy"):
        checkerboard.diagnose(nn.Sequential(nn.LazyConvTranspose2d(2, 3)))


def test_effective_rank_of_known_weights():
    equal = init.icnr_(nn.ConvTranspose2d(8, 8, 4, 2))
    orthogonal = nn.ConvTranspose2d(4, 1, 2, 2)
    with torch.no_grad():
        orthogonal.weight.copy_(torch.eye(4).reshape(4, 1, 2, 2))
    zero = nn.ConvTranspose2d(2, 2, 2, 2)
    nn.init.zeros_(zero.weight)
    report = checkerboard.low_rank_report(nn.Sequential(equal, orthogonal, zero))
    ranks = [row[2] for row in report.layers]
    assert ranks == pytest.approx([1, 4, 0], abs=1e-4)
    assert [row[3] for row in report.layers] == pytest.approx([1, 0.25, 0])
    assert "effective rank" in str(report)


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo_of_one.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2), nn.ConvTranspose2d(4, 1, 4, 4))\n"
        "def nothing(): return None\n"
    )
    command = ["diagnose", "zoo_of_one:net", "--sample", "1,3,16,16", "--figure", "out/figure.png"]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "uneven overlap" in output and "effective rank" in output and "wrote" in output
    assert (tmp_path / "out/figure.png").read_bytes().startswith(b"\x89PNG")
    for name, word in {
        "zoo_of_one": "expected module:factory",
        "zoo_of_one:nothing": "expected a torch.nn.Module",
        "zoo_of_one:absent": "absent",
        "no_such_module:net": "No module named",
    }.items():
        assert main(["diagnose", name]) == 1
        assert word in capsys.readouterr().err


def test_overlap_map_is_torch_s_operator_on_ones():
    want = F.conv_transpose2d(
        torch.ones(1, 1, 6, 6), torch.ones(1, 1, 3, 5), None, (2, 3), 1, 1, 1, 2
    )
    got = checkerboard.overlap_map((3, 5), (2, 3), 1, 1, 2)
    assert_close(got, want[0, 0].long())
