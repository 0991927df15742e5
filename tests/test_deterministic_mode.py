"""torch.use_deterministic_algorithms(True): never an error or a warning, and the same bits."""

import copy
import warnings

import pytest
import torch
from torch import nn

from deconv_ext import ConvTranspose1d, ConvTranspose2d, fuse, tf
from support import assert_same_bits

LAYERS = {
    "plain": (ConvTranspose2d, (8, 6, 4, 2, 1), {}),
    "groups": (ConvTranspose2d, (8, 6, 3, 2, 1, 1, 2), {}),
    "depthwise": (ConvTranspose2d, (8, 8, 4, 2, 1, 0, 8), {}),
    "asymmetric": (ConvTranspose2d, (8, 6, 3, 2, ((0, 1), (2, 0))), {}),
    "same": (ConvTranspose2d, (8, 6, 3, 2, "same"), {}),
    "circular": (ConvTranspose2d, (8, 6, 4, 2, 1), {"padding_mode": "circular"}),
    "1-D": (ConvTranspose1d, (8, 6, 4, 2, 1), {}),
    "1-D circular": (ConvTranspose1d, (8, 6, 4, 2, 1), {"padding_mode": "circular"}),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.fixture
def switch():
    """Turns the mode on and off; warnings, which is what it can give instead, are errors."""

    def use(on: bool) -> None:
        torch.use_deterministic_algorithms(on)

    assert torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield use
    use(False)


def derivatives(function, *operands):
    """The value, the gradients, and the gradients of their squares."""
    y = function(*operands)
    grads = torch.autograd.grad(y, operands, torch.ones_like(y), create_graph=True)
    squares = sum(g.square().sum() for g in grads)
    second = torch.autograd.grad(squares, operands, allow_unused=True)
    return [t for t in (y, *grads, *second) if t is not None]


def assert_the_mode_changes_nothing(switch, function, *operands):
    switch(False)
    want = derivatives(function, *operands)
    switch(True)
    for a, b in zip(derivatives(function, *operands), want, strict=True):
        assert_same_bits(a, b, "deterministic mode")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, layout, dtype, switch):
    cls, args, kwargs = LAYERS[name]
    layer = cls(*args, **kwargs, dtype=dtype)
    x = torch.randn(3, 8, *(5, 7)[: layer._dims], dtype=dtype)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x
    x.requires_grad_()

    def function(x, *parameters):
        names = dict(layer.named_parameters())
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert_the_mode_changes_nothing(switch, function, x, *layer.parameters())


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_tensorflows_operator(padding, switch):
    x, w = (torch.randn(s, requires_grad=True) for s in ((2, 4, 5, 8), (3, 3, 6, 8)))
    shape = (2, 8, 10, 6) if padding == "SAME" else (2, 9, 11, 6)
    assert_the_mode_changes_nothing(
        switch, lambda x, w: tf.conv2d_transpose(x, w, shape, 2, padding), x, w
    )


def test_training_and_fusion(switch):
    model = nn.Sequential(ConvTranspose2d(4, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
    x, results = torch.randn(2, 4, 6, 5), []
    for on in (False, True):
        switch(on)
        net = copy.deepcopy(model)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            fuse(net.eval(), x)
            results.append(net(x))
    assert_same_bits(*results, "deterministic mode")


def test_the_mode_is_on(switch):
    """An operator of torch's that has no deterministic form is refused, so the tests above test."""
    switch(True)
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.ones(4).index_fill(0, torch.tensor([0]), 1).put_(
            torch.tensor([0]), torch.tensor([2.0]), accumulate=False
        )
