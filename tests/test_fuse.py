"""fuse() folds batch norms and activations for inference, and leaves alone what it cannot prove."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from deconv_ext import ConvTranspose2d, LazyConvTranspose2d, convert, fuse, revert


def settle(model):
    """In eval mode, with statistics and parameters that are not those of a new batch norm."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    nn.init.normal_(tensor)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.2, 3)
    return model.eval()


def pair(*args, norm=None, cls=ConvTranspose2d, **kwargs):
    layer = cls(*args, **kwargs)
    return nn.Sequential(layer, norm or nn.BatchNorm2d(layer.out_channels))


class Block(nn.Module):
    """Pairs of which a trace shows that they are pairs, and some that are none."""

    def __init__(self):
        super().__init__()
        self.up = ConvTranspose2d(4, 6, 4, 2, 1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.skip = ConvTranspose2d(6, 6, 3, padding=1)
        self.skip_norm = nn.BatchNorm2d(6)
        self.shared = ConvTranspose2d(6, 6, 1)
        self.shared_norm = nn.BatchNorm2d(6)
        self.one_norm = nn.BatchNorm2d(6)
        self.first = ConvTranspose2d(6, 6, 1)
        self.second = ConvTranspose2d(6, 6, 1)
        self.read = ConvTranspose2d(6, 6, 1)
        self.read_norm = nn.BatchNorm2d(6)
        self.last = ConvTranspose2d(6, 2, 2, 2, bias=False)
        self.last_norm = nn.BatchNorm2d(2, affine=False)
        self.alone = ConvTranspose2d(2, 2, 1)

    def forward(self, x):
        x = torch.relu(self.norm(self.up(x)))
        y = self.skip(x)
        x = self.skip_norm(y) + y
        x = self.shared(self.shared_norm(self.shared(x)))
        x = self.one_norm(self.second(torch.relu(self.one_norm(self.first(x)))))
        x = self.read_norm(self.read(x)) * self.read.weight.mean()
        return self.alone(self.last_norm(self.last(x)))


LEFT_ALONE = {
    "skip": "its output is used elsewhere too",
    "shared": "it is called more than once",
    "first": "the batch norm is called more than once",
    "second": "the batch norm is called more than once",
    "read": "its parameters or the batch norm's are used elsewhere too",
    "alone": "no batch norm or activation takes its output",
}


PAIRS = {
    "plain": (4, 6, 3, 2, 1),
    "groups": (4, 6, 3, 2, 1, 1, 2),
    "depthwise": (6, 6, 4, 2, 1, 0, 6),
    "several outputs a channel": (3, 9, 4, 2, 1, 0, 3),
    "asymmetric padding": (4, 6, 3, 2, ((0, 1), (2, 0))),
    "same": (4, 6, 3, 2, "same"),
    "no bias": (4, 6, 3, 2, 1, 0, 2, False),
}


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
@pytest.mark.parametrize("name", PAIRS)
def test_one_pair(name, affine):
    args = PAIRS[name]
    model = settle(pair(*args, norm=nn.BatchNorm2d(args[1], eps=0.1, affine=affine)).double())
    x = torch.randn(2, args[0], 5, 4, dtype=torch.float64)
    want = model(x)
    report = fuse(model, x)
    assert_close(model(x), want)
    assert report.fused == 1 and type(model[1]) is nn.Identity
    assert not any("running" in key for key in model.state_dict())
    assert 0 <= report.max_abs < 1e-12 and 0 <= report.pairs[0].max_abs < 1e-12


def test_circular_padding_and_output_size():
    for kwargs in ({"padding_mode": "circular"}, {"output_size": (11, 9)}):
        args = (4, 6, 4, 2, 1) if "padding_mode" in kwargs else (4, 6, 3, 2, 0)
        model, x = settle(pair(*args, **kwargs)), torch.randn(2, 4, 5, 4)
        want = model(x)
        assert fuse(model).fused == 1
        assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def test_a_trace_decides():
    model = settle(Block().double())
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    want = model(x)
    before = {name: id(module) for name, module in model.named_modules()}
    report = fuse(model, x)
    assert_close(model(x), want)
    rows = {row.layer: row for row in report.pairs}
    assert {name for name, row in rows.items() if row.fused} == {"up", "last"}
    assert {name: rows[name].reason for name in LEFT_ALONE} == LEFT_ALONE
    for name in LEFT_ALONE:
        assert id(model.get_submodule(name)) == before[name]
    assert isinstance(model.skip_norm, nn.BatchNorm2d) and type(model.norm) is nn.Identity
    assert not report.note and report.max_rel < 1e-12
    assert fuse(model).fused == 0


@pytest.mark.parametrize("ours", [True, False], ids=["converted", "torch's"])
def test_torchs_layers_too(ours):
    model = settle(nn.Sequential(pair(4, 6, 3, cls=nn.ConvTranspose2d), nn.ReLU(),
                                 pair(6, 2, 2, 2, cls=nn.ConvTranspose2d)))  # fmt: skip
    if ours:
        convert(model)
    x = torch.randn(2, 4, 5, 6)
    want = model(x)
    report = fuse(model, x)
    assert [row.layer for row in report.pairs if row.fused] == ["0.0", "2.0"]
    assert_close(model(x), want, rtol=1e-4, atol=1e-5)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*pair(4, 6, 4, 2, 1), nn.ReLU(), *pair(6, 2, 3))
        self.shared = ConvTranspose2d(2, 2, 1)
        self.one = nn.Sequential(self.shared, nn.BatchNorm2d(2))
        self.two = nn.Sequential(self.shared, nn.BatchNorm2d(2))
        self.loose, self.loose_norm = ConvTranspose2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x):
        if x.sum() > 1e9:  # control flow that depends on numbers
            return x
        return self.loose_norm(self.loose(self.two(self.one(self.blocks(x)))))


def test_a_model_that_cannot_be_traced():
    model = settle(Untraceable().double())
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    want = model(x)
    report = fuse(model, x)
    assert_close(model(x), want)
    assert [row.layer for row in report.pairs if row.fused] == ["blocks.0", "blocks.3"]
    reasons = {row.layer: row.reason for row in report.pairs}
    assert reasons["shared"] == "it or the batch norm stands elsewhere too"
    assert reasons["loose"] == "no batch norm or activation takes its output"
    assert model.blocks[0].activation == "relu" and type(model.blocks[2]) is nn.Identity
    assert "TraceError" in report.note and "only neighbours in nn.Sequential" in str(report)


class Doubling(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


def obstacles():
    hooked = pair(4, 6, 3)
    hooked[0].register_forward_hook(lambda module, args, output: output + 1)
    hooked_norm = pair(4, 6, 3)
    hooked_norm[1].register_forward_pre_hook(lambda module, args: None)
    replaced = pair(4, 6, 3)
    replaced[0].forward = lambda x: x.repeat(1, 2, 1, 1)[:, :6]
    training = pair(4, 6, 3)
    parametrized = pair(4, 6, 3)
    parametrizations.weight_norm(parametrized[0])
    yield "it has hooks", hooked
    yield "the batch norm has hooks", hooked_norm
    yield "it has a forward of its own", replaced
    yield "the batch norm has a forward of its own", pair(4, 6, 3, norm=Doubling(6))
    yield "it has parametrizations", parametrized
    yield "no running statistics", pair(4, 6, 3, norm=nn.BatchNorm2d(6, track_running_stats=False))
    yield "it is lazy", nn.Sequential(LazyConvTranspose2d(6, 3), nn.BatchNorm2d(6))
    yield "in training mode", training


@pytest.mark.parametrize(
    "words,model", list(obstacles()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_what_is_left_alone(words, model):
    settle(model)
    if words == "in training mode":
        model[1].train()
    norm = model[1]
    report = fuse(model)
    assert report.fused == 0 and words in report.pairs[0].reason
    assert model[1] is norm


def test_training_mode_is_an_error():
    with pytest.raises(RuntimeError, match=r"training=True: call model.eval\(\)"):
        fuse(pair(4, 6, 3))


def test_other_norms_and_other_layers_are_none_of_its_business():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), ConvTranspose2d(4, 4, 1), nn.GroupNorm(2, 4)
    ).eval()
    report = fuse(model)
    assert [(row.layer, row.fused) for row in report.pairs] == [("2", False)]
    assert isinstance(model[1], nn.BatchNorm2d)


def test_tied_weights_stay_as_they_are_elsewhere():
    model = settle(nn.Sequential(*pair(6, 6, 3, padding=1), ConvTranspose2d(6, 6, 3, padding=1)))
    model[2].weight = model[0].weight
    x = torch.randn(2, 6, 5, 5)
    want, weight = model(x), model[2].weight.clone()
    fuse(model)
    assert torch.equal(model[2].weight, weight)
    assert_close(model(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtype_layout_and_requires_grad_are_kept(dtype):
    model = settle(pair(4, 6, 3)).to(dtype, memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    fuse(model)
    weight, bias = model[0].weight, model[0].bias
    assert weight.dtype == bias.dtype == dtype
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(weight, nn.Parameter) and not weight.requires_grad


def test_report_prints_a_table():
    model = settle(Block())
    lines = str(fuse(model, torch.randn(2, 4, 5, 6))).splitlines()
    heads = "layer batch norm activation status max abs diff max rel diff"
    assert lines[0].split() == heads.split()
    column = lines[0].index("status")
    rows = [line for line in lines[2:-1]]
    assert all(row[column:].startswith(("fused", "left alone: ")) for row in rows)
    assert lines[-1].startswith("2 of 8 layers fused; largest difference of the model's output: ")


def test_report_tells_a_wrong_fusion(monkeypatch):
    """The differences are those of the run: here of a fusion that forgets the norm."""
    monkeypatch.setattr(sys.modules["deconv_ext.fuse"], "_fold", lambda layer, norm: None)
    model = settle(pair(4, 6, 3))
    twin, x = copy.deepcopy(model), torch.randn(2, 4, 5, 6)
    report = fuse(model, x)
    want = (twin[0](x) - twin(x)).abs().max().item()
    assert report.max_abs == pytest.approx(want) and report.max_abs > 0.1
    assert report.pairs[0].max_abs == pytest.approx(want)


def test_sample_leaves_no_trace():
    model = settle(nn.Sequential(*pair(4, 6, 3), nn.Dropout(0.5)))
    x, state = torch.randn(2, 4, 5, 6), torch.get_rng_state()
    kept = x.clone()
    fuse(model, {"input": x})
    assert torch.equal(x, kept) and torch.equal(torch.get_rng_state(), state)
    assert not model.training and not any(m._forward_hooks for m in model.modules())


# --- activations ---------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": nn.ReLU(inplace=True),
    "leaky_relu": nn.LeakyReLU(0.3),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
}


@pytest.mark.parametrize("norm", [True, False], ids=["after a norm", "without a norm"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, norm):
    layers = pair(4, 6, 3, 2) if norm else [ConvTranspose2d(4, 6, 3, 2)]
    model = settle(nn.Sequential(*layers, ACTIVATIONS[name]).double())
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    want = model(x)
    report = fuse(model, x)
    assert_close(model(x), want)
    assert model[0].activation == name and all(type(m) is nn.Identity for m in model[1:])
    (row,) = report.pairs
    assert (row.norm, row.activation) == (("1", "2") if norm else ("", "1"))
    assert 0 <= report.max_abs < 1e-12 and 0 <= row.max_abs < 1e-12 and not row.reason
    if name == "leaky_relu":
        assert model[0].negative_slope == 0.3


class Swish(nn.SiLU):
    def forward(self, input):
        return input


def left_alone():
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    yield "hooks", [ConvTranspose2d(4, 6, 3), hooked]
    yield "already", [ConvTranspose2d(4, 6, 3, activation="tanh"), nn.ReLU()]
    yield "already", [ConvTranspose2d(4, 6, 3, activation="tanh"), nn.BatchNorm2d(6)]
    yield "convert()", [nn.ConvTranspose2d(4, 6, 3), nn.ReLU()]
    yield "approximate='tanh'", [ConvTranspose2d(4, 6, 3), nn.GELU(approximate="tanh")]
    yield "no batch norm or activation", [ConvTranspose2d(4, 6, 3), nn.ReLU6()]
    yield "", [ConvTranspose2d(4, 6, 3), Swish()]
    yield "torch.complex64", [ConvTranspose2d(4, 6, 3, dtype=torch.complex64), nn.Tanh()]


@pytest.mark.parametrize("words,layers", list(left_alone()), ids=lambda v: v if v else "")
def test_activations_that_are_left_alone(words, layers):
    model = nn.Sequential(*layers).eval()
    x = torch.randn(1, 4, 3, 3, dtype=layers[0].weight.dtype)
    want, before = model(x), layers[0].activation if hasattr(layers[0], "activation") else None
    report = fuse(model)
    assert report.fused == 0 and words in report.pairs[0].reason and model[1] is layers[1]
    assert getattr(layers[0], "activation", None) == before
    assert_close(model(x), want)


def test_a_norm_without_its_activation():
    model = settle(nn.Sequential(*pair(4, 6, 3, cls=nn.ConvTranspose2d), nn.ReLU()))
    report = fuse(model)
    assert report.fused == 1 and isinstance(model[2], nn.ReLU)
    assert "fused, but not the activation: torch's own layer" in str(report)


def test_a_converted_layer_with_an_activation_cannot_go_back():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.ReLU()).eval()
    convert(model)
    fuse(model)
    with pytest.raises(RuntimeError, match="layer '0' has got activation='relu'"):
        revert(model)
