"""Lazy layers take in_channels from their first input, and become ordinary ones."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deconv_ext
from deconv_ext import ConvTranspose1d, ConvTranspose2d, LazyConvTranspose1d, LazyConvTranspose2d

PAIRS = {
    "1-D": (LazyConvTranspose1d, ConvTranspose1d, nn.LazyConvTranspose1d, (2, 4, 7)),
    "2-D": (LazyConvTranspose2d, ConvTranspose2d, nn.LazyConvTranspose2d, (2, 4, 5, 6)),
}
KEYWORDS = [
    {},
    {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
    {"bias": False, "dilation": 2, "dtype": torch.float64},
]


@pytest.fixture(params=PAIRS.values(), ids=PAIRS)
def kinds(request):
    return request.param


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kwargs", KEYWORDS, ids=str)
def test_same_as_torchs(kinds, kwargs, batched, seed):
    lazy, becomes, theirs, shape = kinds
    x = torch.randn(shape, dtype=kwargs.get("dtype"))
    x = x if batched else x[0]
    results = []
    for cls in (lazy, theirs):
        layer = cls(6, 3, **kwargs)
        assert layer.has_uninitialized_params()
        torch.manual_seed(seed)
        results.append(layer(x))
        if cls is lazy:
            assert type(layer) is becomes and layer.in_channels == 4
            assert not hasattr(layer, "_load_hook") and "Lazy" not in repr(layer)
    assert_close(*results)


def test_names_of_arguments(kinds):
    lazy, _, theirs, _ = kinds
    assert issubclass(lazy, theirs)
    for name, parameter in inspect.signature(theirs).parameters.items():
        if name != "padding_mode":
            default = parameter.default
            lazy(6, 3, **({} if default is inspect.Parameter.empty else {name: default}))
    with pytest.raises(TypeError, match="unexpected keyword"):
        lazy(6, 3, strides=2)


def test_our_extensions(kinds):
    lazy, becomes, _, shape = kinds
    dims = len(shape) - 2
    x = torch.randn(shape)
    full = [2 * n for n in shape[2:]]
    for kwargs in (
        {"padding": "same"},
        {"padding": ((0, 1),) * dims, "output_padding": 0},
        {"padding": 1, "output_padding": 1, "padding_mode": "circular"},
        {"padding": 1, "output_size": full},
    ):
        layer = lazy(6, 3, 2, **kwargs)
        y = layer(x)
        assert list(y.shape[2:]) == full, kwargs
        plain = becomes(4, 6, 3, 2, **kwargs)
        plain.load_state_dict(layer.state_dict())
        assert torch.equal(plain(x), y) and repr(plain) == repr(layer)


def test_state_dict_and_copies_before_the_first_call(kinds):
    lazy, becomes, _, shape = kinds
    x = torch.randn(shape)
    trained = becomes(4, 6, 3)
    for layer in (lazy(6, 3), copy.deepcopy(lazy(6, 3)), pickle.loads(pickle.dumps(lazy(6, 3)))):
        layer.load_state_dict(trained.state_dict())
        assert torch.equal(layer(x), trained(x)) and type(layer) is becomes
    late = becomes(4, 6, 3)
    with pytest.raises(RuntimeError, match="uninitialized"):
        late.load_state_dict(lazy(6, 3).state_dict())


def test_wrong_inputs(kinds):
    lazy, _, _, shape = kinds
    with pytest.raises(RuntimeError, match="unbatched.*batched"):
        lazy(6, 3)(torch.zeros(4))
    with pytest.raises(ValueError, match="divisible by groups"):
        lazy(6, 3, groups=3)(torch.zeros(shape))


def test_convert_leaves_it_alone():
    model = nn.Sequential(LazyConvTranspose2d(6, 3))
    assert deconv_ext.convert(model).converted == 0
    model(torch.zeros(1, 4, 5, 5))
    assert type(model[0]) is ConvTranspose2d
