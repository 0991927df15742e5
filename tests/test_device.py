"""Where there are no kernels: torch's operator after one warning, or an error if that is wanted."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from deconv_ext import ConvTranspose2d, functional
from deconv_ext.build import BuildError, extension
from deconv_ext.functional import conv_transpose2d

KEYWORDS = {"stride": 2, "padding": (1, 0), "output_padding": (0, 1), "groups": 2}
theirs = nn.functional.conv_transpose2d


@pytest.fixture(autouse=True)
def forgotten():
    """Neither a warning nor a missing build of another test is remembered."""
    for cached in (functional._obstacle, functional._warn_once):
        cached.cache_clear()
    yield
    for cached in (functional._obstacle, functional._warn_once):
        cached.cache_clear()


def operands(**kwargs):
    return [torch.randn(s, **kwargs) for s in ((2, 4, 5, 3), (4, 3, 3, 2), (6,))]


def no_binary():
    raise BuildError("no compiler anywhere")


@pytest.fixture
def without_binary(monkeypatch):
    monkeypatch.setattr(functional, "extension", no_binary)
    monkeypatch.setattr(functional.autograd, "extension", no_binary)


@pytest.mark.parametrize("padding", [(1, 0), ((1, 2), (0, 1)), "same", "valid"], ids=str)
def test_without_a_binary_torch_computes(padding, without_binary):
    """Values and gradients by torch's operator are ours, for paddings that it lacks too."""
    x, w, b = operands(dtype=torch.float64, requires_grad=True)
    keywords = {"stride": 2, "padding": padding, "groups": 2, "dilation": (1, 3)}
    with pytest.warns(UserWarning, match="no compiler anywhere"):
        got = conv_transpose2d(x, w, b, **keywords)
    grads = torch.autograd.grad(got.sin().sum(), (x, w, b))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "extension", extension)
        patch.setattr(functional.autograd, "extension", extension)
        functional._obstacle.cache_clear()
        want = conv_transpose2d(x, w, b, **keywords)
        wanted_grads = torch.autograd.grad(want.sin().sum(), (x, w, b))
    assert type(want.grad_fn) is not type(got.grad_fn)
    assert_close((got, grads), (want, wanted_grads))


def test_one_warning_for_each_reason(without_binary, monkeypatch):
    x, w, b = operands()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            conv_transpose2d(x, w, b, **KEYWORDS)
            ConvTranspose2d(4, 6, 3)(x)
            conv_transpose2d(x.to_mkldnn(), w, b, stride=2, groups=2)
    ours = [str(w.message) for w in caught if "deconv_ext" in str(w.message)]
    assert len(ours) == 2 and "no compiler anywhere" in ours[0] and "torch._mkldnn" in ours[1]


def test_the_warning_points_at_the_caller(without_binary):
    with pytest.warns(UserWarning, match="torch's own operator is used") as caught:
        conv_transpose2d(*operands(), **KEYWORDS)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("value,strict", [("1", True), ("0", False), ("", False)])
def test_strict(value, strict, without_binary, monkeypatch):
    monkeypatch.setenv("DECONV_EXT_STRICT", value)
    for _ in range(2):
        if strict:
            with pytest.raises(RuntimeError, match="no compiler anywhere.*DECONV_EXT_STRICT"):
                conv_transpose2d(*operands(), **KEYWORDS)
    if not strict:
        with pytest.warns(UserWarning):
            conv_transpose2d(*operands(), **KEYWORDS)


def test_strict_lets_our_kernels_and_tensors_without_data_be(monkeypatch):
    monkeypatch.setenv("DECONV_EXT_STRICT", "1")
    conv_transpose2d(*operands(), **KEYWORDS)
    conv_transpose2d(*operands(device="meta"), **KEYWORDS)


def test_a_device_of_another_kind(monkeypatch):
    """torch's lazy device is one that needs no hardware."""
    import torch._lazy.ts_backend

    torch._lazy.ts_backend.init()
    x, w, b = operands()
    want = theirs(x, w, b, **KEYWORDS)
    lazy = [t.to("lazy") for t in (x, w, b)]
    with pytest.warns(UserWarning, match="no kernels for device type 'lazy'"):
        got = conv_transpose2d(*lazy, **KEYWORDS)
    assert got.device.type == "lazy"
    assert_close(got.cpu(), want)
    monkeypatch.setenv("DECONV_EXT_STRICT", "1")
    with pytest.raises(RuntimeError, match="device type 'lazy'"):
        conv_transpose2d(*lazy, **KEYWORDS)


def test_reasons_by_device(monkeypatch):
    """What is said of a CUDA tensor when the binary has no CUDA, told without one."""

    class Binary:
        with_cuda = False

        def compiled(self):
            return {"with_cuda": self.with_cuda}

    monkeypatch.setattr(functional, "extension", Binary)
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert functional._obstacle(cuda, torch.strided) == "the binary module was built without CUDA"
    assert functional._obstacle(cpu, torch.strided) == ""
    monkeypatch.setattr(Binary, "with_cuda", True)
    functional._obstacle.cache_clear()
    assert functional._obstacle(cuda, torch.strided) == ""
    assert "layout" in functional._obstacle(cuda, torch.sparse_coo)


# --- tensors without data, and who intercepts torch's operators ----------------------------------


@pytest.mark.parametrize("padding", [1, ((0, 1), (2, 0)), "same"], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_meta(padding, layout):
    layer = ConvTranspose2d(4, 6, 3, 2, padding).to(memory_format=layout)
    x = torch.randn(2, 4, 5, 3).to(memory_format=layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = copy.deepcopy(layer).to("meta")(x.to("meta"))
    assert got.is_meta and got.shape == layer(x).shape and got.dtype == torch.float32


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        layer = ConvTranspose2d(4, 6, 3, 2, 1)
        y = layer(torch.randn(2, 4, 5, 3))
        assert type(y) is type(mode.from_tensor(torch.empty(1))) and y.shape == (2, 6, 9, 5)
    y = layer(mode.from_tensor(torch.randn(2, 4, 5, 3)))  # outside of the mode
    assert y.shape == (2, 6, 9, 5)


@pytest.mark.parametrize("padding", [1, ((0, 1), (2, 0))], ids=str)
def test_tracing_records_an_operator(padding):
    """A trace is of the operator, not of the numbers it gave once."""
    layer = ConvTranspose2d(4, 6, 3, 2, padding).requires_grad_(False)
    x, other = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 5, 3)
    for traced in (make_fx(layer)(x), torch.fx.symbolic_trace(nn.Sequential(layer))):
        assert_close(traced(other), layer(other))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        assert_close(torch.jit.trace(layer, x)(other), layer(other))
    program = torch.export.export(layer, (x,), strict=False)
    assert_close(program.module()(other), layer(other))


def test_symbolic_trace_keeps_our_function():
    graph = torch.fx.symbolic_trace(nn.Sequential(ConvTranspose2d(4, 6, 3))).graph
    assert conv_transpose2d in [node.target for node in graph.nodes]


def test_compile_computes_the_same():
    layer = ConvTranspose2d(4, 6, 3, 2, 1)
    x = torch.randn(2, 4, 5, 3)
    got = torch.compile(layer, backend="eager")(x)
    assert_close(got, layer(x))
    got.sum().backward()
    assert layer.weight.grad is not None


class Tagged(torch.Tensor):
    """A subclass that goes by the torch-function protocol and notes what it was part of."""

    seen: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("which", [0, 1, 2])
def test_torch_function(which):
    Tagged.seen.clear()
    plain = operands()
    args = [t.as_subclass(Tagged) if i == which else t for i, t in enumerate(plain)]
    y = conv_transpose2d(*args, **KEYWORDS)
    assert type(y) is Tagged and Tagged.seen == [conv_transpose2d]
    assert_close(y.as_subclass(torch.Tensor), theirs(*plain, **KEYWORDS))


def test_torch_function_mode():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    args = operands()
    with Mode():
        y = conv_transpose2d(*args, **KEYWORDS)
    assert seen == [conv_transpose2d]
    assert_close(y, theirs(*args, **KEYWORDS))


def test_wrapper_subclass_is_not_read():
    """A tensor that only pretends to have memory reaches torch's operator, which unwraps it."""
    from torch.testing._internal.two_tensor import TwoTensor

    x, w, b = operands()
    y = conv_transpose2d(TwoTensor(x, 2 * x), w, b, **KEYWORDS)
    assert_close(y.a, theirs(x, w, b, **KEYWORDS))
    assert_close(y.b, theirs(2 * x, w, b, **KEYWORDS))


# --- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """As torch: everything but float64 is computed in the lower precision, gradients come back."""
    layer, x = ConvTranspose2d(4, 6, 3, 2), torch.randn(2, 4, 5, 3)
    rounded = [t.to(dtype).double() for t in (x, layer.weight, layer.bias)]
    want = theirs(*rounded, stride=2).to(dtype)
    for given in (x, x.to(dtype)):
        with torch.autocast("cpu", dtype):
            got = layer(given)
            assert theirs(given, layer.weight, layer.bias).dtype == got.dtype == dtype
        assert_close(got, want)
    got.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype):
        assert layer.double()(x.double()).dtype == torch.float64


WITHOUT_THE_BINARY = """
import copy, pickle, torch, deconv_ext
from deconv_ext import build, functional
build.extension = functional.extension = functional.autograd.extension = None  # not to be called
layer = torch.nn.ConvTranspose2d(4, 6, 3)
deconv_ext.convert(torch.nn.Sequential(layer))
print(copy.deepcopy(pickle.loads(pickle.dumps(layer))), deconv_ext.__version__)
assert "deconv_ext._C" not in sys.modules
"""


def test_importing_making_and_converting_need_no_binary():
    program = f"import sys\n{WITHOUT_THE_BINARY}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("ConvTranspose2d(4, 6"), done


def test_module_state_is_torchs():
    layer = pickle.loads(pickle.dumps(ConvTranspose2d(4, 6, 3)))
    assert vars(layer).keys() == vars(nn.ConvTranspose2d(4, 6, 3)).keys()
