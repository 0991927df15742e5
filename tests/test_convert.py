"""convert() swaps the layers of a model in place and reports; revert() puts everything back."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

from deconv_ext import ConvTranspose2d, convert, revert
from support import kernel_calls


class Named(nn.ConvTranspose2d):
    """A subclass that adds what does not matter here."""

    def double_channels(self):
        return 2 * self.out_channels


class Scaled(nn.ConvTranspose2d):
    """A subclass with a forward of its own."""

    def forward(self, input, output_size=None):
        return 2 * super().forward(input, output_size)


class Model(nn.Module):
    """Layers of every kind: plain, shared, tied, hooked, parametrized, derived, batch-normed."""

    def __init__(self):
        super().__init__()
        self.stem = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(nn.ConvTranspose2d(6, 6, 3, padding=1, groups=2), nn.ReLU(True))
        self.again = self.blocks[0]
        self.tied = nn.ConvTranspose2d(6, 6, 3, padding=1, groups=2)
        self.tied.weight = self.again.weight
        self.hooked = nn.ConvTranspose2d(6, 4, 2, 2)
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        self.parametrized = parametrizations.weight_norm(nn.ConvTranspose2d(4, 4, 2))
        self.named = Named(4, 4, 1)
        self.scaled = Scaled(4, 4, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        x = self.norm(self.stem(x))
        x = self.tied(self.again(self.blocks(x)))
        x = self.hooked(x, output_size=[2 * s for s in x.shape[2:]])
        return self.dropout(self.scaled(self.named(self.parametrized(x)))) * scale


CONVERTED = ["stem", "blocks.0", "tied", "hooked", "parametrized", "named"]


def snapshot(model):
    """All that is attached to the modules, down to the identity of every object."""
    return [
        (
            name,
            id(module),
            type(module),
            {k: id(v) for k, v in vars(module).items() if not isinstance(v, (bool, dict))},
            [{k: id(v) for k, v in d.items()} for d in vars(module).values() if type(d) is dict],
            module.training,
        )
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def test_values_are_those_of_torch():
    model = Model().eval()
    x = torch.randn(2, 4, 5, 6)
    want = model(x)
    report = convert(model)
    assert [layer.name for layer in report.layers if layer.converted] == CONVERTED
    assert_close(model(x), want)
    for name in CONVERTED:
        assert isinstance(model.get_submodule(name), ConvTranspose2d)
    assert type(model.stem) is ConvTranspose2d
    assert isinstance(model.named, Named) and model.named.double_channels() == 8
    assert model.again is model.blocks[0] and model.tied.weight is model.again.weight


def test_our_kernels_compute():
    model = Model().eval()
    convert(model)
    calls = kernel_calls(lambda: model(torch.randn(2, 4, 5, 6)))
    assert calls == ["forward"] * 7  # six layers, one of them called twice


def test_everything_is_kept_and_reverted():
    model = Model()
    before = snapshot(model)
    convert(model, torch.randn(2, 4, 5, 6))
    after = snapshot(model)
    assert [(entry[1], entry[-1]) for entry in after] == [(e[1], e[-1]) for e in before]
    assert revert(model) == len(CONVERTED)
    assert snapshot(model) == before
    assert revert(model) == 0


def test_converting_twice_changes_nothing():
    model = Model()
    convert(model)
    once = snapshot(model)
    again = convert(model)
    assert snapshot(model) == once
    assert {r.reason for r in again.layers if r.name in CONVERTED} == {"already one of ours"}
    revert(model)
    assert type(model.stem) is nn.ConvTranspose2d


def test_a_layer_of_ours_is_not_reverted():
    model = nn.Sequential(ConvTranspose2d(3, 3, 2), nn.ConvTranspose2d(3, 3, 2))
    convert(model)
    assert revert(model) == 1
    assert [type(m) for m in model] == [ConvTranspose2d, nn.ConvTranspose2d]


def test_the_model_itself_may_be_a_layer():
    layer = nn.ConvTranspose2d(3, 3, 2)
    report = convert(layer)
    assert type(layer) is ConvTranspose2d and "(the model)" in str(report)
    revert(layer)
    assert type(layer) is nn.ConvTranspose2d


@pytest.mark.parametrize("training", [False, True])
def test_sample_leaves_no_trace(training):
    model = Model().train(training)
    x = torch.randn(2, 4, 5, 6)
    state = copy.deepcopy(model.state_dict())
    rng, kept = torch.get_rng_state(), x.clone()
    report = convert(model, (x,))
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(x, kept)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(module.training == training for module in model.modules())
    assert 0 <= report.max_abs < 1e-5 and 0 <= report.max_rel < 1e-5
    for layer in report.layers:
        assert (layer.max_abs is not None) == layer.converted
        assert not layer.converted or layer.max_rel < 1e-5


def test_sample_of_keywords():
    report = convert(Model(), {"x": torch.randn(2, 4, 5, 6), "scale": 1e3})
    assert report.max_rel < 1e-5


def test_report_tells_a_wrong_layer(monkeypatch):
    """The differences are those of the run: here of one that adds 1 to each output."""
    forward = ConvTranspose2d.forward
    monkeypatch.setattr(
        ConvTranspose2d, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs) + 1
    )
    report = convert(nn.Sequential(nn.ConvTranspose2d(3, 3, 2)), torch.randn(1, 3, 4, 4))
    assert report.max_abs == pytest.approx(1, abs=1e-5)
    assert report.layers[0].max_abs == pytest.approx(1, abs=1e-5)


def test_report_prints_a_table():
    lines = str(convert(Model(), torch.randn(2, 4, 5, 6))).splitlines()
    assert len(lines) == 2 + len(CONVERTED) + 1 + 1
    column = lines[0].index("status")
    for line in lines[2:-1]:
        assert line[column - 2 : column] == "  "
        assert line[column:].startswith(("converted", "left alone"))
    (scaled,) = (line for line in lines if line.startswith("scaled"))
    assert "left alone: Scaled overrides forward" in scaled
    assert lines[-1].startswith("6 of 7 layers converted; largest difference")


def test_what_is_left_alone():
    from torch.ao.nn.quantized import ConvTranspose2d as Quantized

    model = nn.ModuleDict(
        {
            "lazy": nn.LazyConvTranspose2d(3, 3),
            "replaced": nn.ConvTranspose2d(3, 3, 3),
            "quantised": Quantized(3, 3, 3),
            "one_dimensional": nn.ConvTranspose1d(3, 3, 3),
            "unwanted": nn.ConvTranspose2d(3, 3, 3),
        }
    )
    model["replaced"].forward = lambda x: x
    report = convert(model, where=lambda name, module: name != "unwanted")
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert report.converted == 0 and reasons.keys() == model.keys() - {"one_dimensional"}
    for name, word in {
        "lazy": "lazy",
        "replaced": "on the instance",
        "quantised": "is no nn.ConvTranspose2d",
        "unwanted": "excluded",
    }.items():
        assert word in reasons[name]
    assert type(model["unwanted"]) is nn.ConvTranspose2d
    model["lazy"](torch.randn(1, 2, 4, 4))
    assert convert(model["lazy"]).converted == 1


def test_copies_of_a_converted_model():
    model = Model().eval()
    convert(model)
    x = torch.randn(2, 4, 5, 6)
    copied = copy.deepcopy(model)
    assert_close(copied(x), model(x), rtol=0, atol=0)
    assert revert(copied) == len(CONVERTED)
    assert type(copied.named) is Named and type(model.named) is not Named

    plain = nn.Sequential(nn.ConvTranspose2d(4, 4, 2), Named(4, 4, 2))
    convert(plain)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        loaded = pickle.loads(pickle.dumps(plain, protocol))
        assert [type(m) for m in loaded] == [type(m) for m in plain]
        assert_close(loaded(x), plain(x), rtol=0, atol=0)
        assert revert(loaded) == 2
        assert [type(m) for m in loaded] == [nn.ConvTranspose2d, Named]


def test_training_goes_on_in_the_same_optimizer():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2), nn.ConvTranspose2d(4, 1, 3)).double()
    twin = copy.deepcopy(model)
    for net in (model, twin):
        optimizer = torch.optim.Adam(net.parameters())
        torch.manual_seed(0)
        for step in range(4):
            if step == 1 and net is model:
                convert(net)
            if step == 3 and net is model:
                revert(net)
            optimizer.zero_grad()
            net(torch.randn(2, 3, 5, 5, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
    assert_close(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("base", [nn.ConvTranspose2d, Named])
def test_parametrization_before_and_after(base):
    """Whatever order things are done and undone in, the class that remains is the right one."""

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    x = torch.randn(1, 3, 4, 4)
    layer = base(3, 3, 2)
    want = layer(x)
    parametrize.register_parametrization(layer, "weight", Double())
    convert(layer)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert isinstance(layer, (base, ConvTranspose2d))
    revert(layer)
    assert type(layer) is base

    convert(layer)
    parametrize.register_parametrization(layer, "bias", Double())
    revert(layer)
    assert type(layer).__bases__ == (base,)
    parametrize.remove_parametrizations(layer, "bias", leave_parametrized=False)
    assert type(layer) is base
    assert_close(layer(x), want)

    parametrize.register_parametrization(layer, "weight", Double())
    convert(layer)
    parametrize.register_parametrization(layer, "bias", Double())
    doubled = layer(x)
    revert(layer)
    assert parametrize.is_parametrized(layer, "weight")
    assert parametrize.is_parametrized(layer, "bias")
    assert_close(layer(x), doubled)
    assert_close(doubled, 2 * want)


def test_revert_refuses_a_class_changed_by_others():
    model = nn.Sequential(nn.ConvTranspose2d(3, 3, 2), nn.ConvTranspose2d(3, 3, 2))
    convert(model)
    model[1].__class__ = type("Wrapped", (ConvTranspose2d,), {})
    with pytest.raises(RuntimeError, match="layer '1' has become a Wrapped"):
        revert(model)
    assert type(model[0]) is ConvTranspose2d
