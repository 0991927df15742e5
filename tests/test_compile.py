"""torch.compile: no graph break, static and dynamic, forward and backward, as in eager mode."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import deconv_ext
from deconv_ext.functional import conv_transpose2d


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **kwargs):
    return torch.compile(function, fullgraph=True, backend=backend, **kwargs)


def value_and_gradients(function, layer, x):
    x = x.detach().requires_grad_()
    y = function(x)
    return y, *torch.autograd.grad(y.sin().sum(), (x, *layer.parameters()))


LAYERS = {
    "k4 s2": {"kernel_size": 4, "stride": 2, "padding": 1},
    "groups": {"kernel_size": 3, "groups": 2, "bias": False},
    "dilation": {"kernel_size": (3, 2), "stride": 3, "dilation": (1, 2), "output_padding": 1},
    "asymmetric": {"kernel_size": 3, "stride": 2, "padding": ((0, 1), (2, 0))},
    "same": {"kernel_size": 3, "stride": 2, "padding": "same"},
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_layer(name, dynamic):
    layer = deconv_ext.ConvTranspose2d(4, 6, **LAYERS[name])
    x = torch.randn(2, 4, 5, 3)
    got = value_and_gradients(compiled(layer, dynamic=dynamic), layer, x)
    assert_close(got, value_and_gradients(layer, layer, x))
    assert "Generated" not in type(layer(x).grad_fn).__name__, "eager calls stay as they are"


def test_the_graph_holds_our_operator_once():
    layer = deconv_ext.ConvTranspose2d(4, 6, 3, 2, 1)
    graphs = []

    def backend(module, inputs):
        graphs.append([n.target for n in module.graph.nodes if n.op == "call_function"])
        return module

    compiled(layer, backend)(torch.randn(2, 4, 5, 3))
    assert graphs == [[torch.ops.deconv_ext.conv_transpose2d]]


@pytest.mark.parametrize(
    ("layout", "dynamic"),
    [
        (torch.contiguous_format, False),
        pytest.param(torch.contiguous_format, True, marks=pytest.mark.slow),
        pytest.param(torch.channels_last, False, marks=pytest.mark.slow),
        (torch.channels_last, True),
    ],
    ids=["static", "dynamic", "static-channels_last", "dynamic-channels_last"],
)
def test_inductor(layout, dynamic):
    """A network whose neighbours are fused into kernels of Inductor's, which trusts our strides."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        deconv_ext.ConvTranspose2d(4, 6, 4, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
    ).to(torch.float64, memory_format=layout)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64).to(memory_format=layout)
    want = value_and_gradients(model, model, x)
    got = value_and_gradients(compiled(model, "inductor", dynamic=dynamic), model, x)
    assert_close(got, want)
    assert got[0].stride() == want[0].stride()


@pytest.mark.parametrize("name", ["k4 s2", "same"])
def test_five_image_sizes_compile_at_most_twice(name):
    """Once for the first size, once with symbols when a second one comes."""
    layer = deconv_ext.ConvTranspose2d(4, 6, **LAYERS[name])
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(layer, counter)
    for size in ((5, 3), (6, 7), (9, 8), (4, 11), (12, 5)):
        x = torch.randn(2, 4, *size)
        assert_close(function(x), layer(x))
    assert counter.frame_count == 2


def test_dynamic_compiles_once_also_for_another_batch():
    layer = deconv_ext.ConvTranspose2d(4, 6, 3, 2, 1)
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(layer, counter, dynamic=True)
    for size in ((2, 5, 3), (3, 6, 7), (7, 9, 8), (5, 4, 11), (6, 12, 5)):
        x = torch.randn(size[0], 4, *size[1:])
        assert_close(function(x), layer(x))
    assert counter.frame_count == 1


def test_output_size_from_another_image():
    """As in a U-Net: output_padding is a symbol of the skip connection's size."""
    layer = deconv_ext.ConvTranspose2d(4, 6, 3, 2, 1)

    def up(x, skip):
        return layer(x, output_size=skip.shape[-2:])

    function = compiled(up, dynamic=True)
    for size, skip in (((5, 4), (10, 8)), ((6, 5), (11, 10)), ((3, 7), (6, 13))):
        x, other = torch.randn(2, 4, *size), torch.randn(2, 6, *skip)
        assert_close(function(x, other), up(x, other))


def test_unbatched_and_functional():
    x, w, b = torch.randn(4, 5, 3), torch.randn(4, 3, 3, 3), torch.randn(3)

    def function(x, w, b):
        return conv_transpose2d(x, w, b, 2, padding=(1, 0))

    assert_close(compiled(function)(x, w, b), function(x, w, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    layer, x = deconv_ext.ConvTranspose2d(4, 6, 3, 2), torch.randn(2, 4, 5, 3)

    def cast(x):
        with torch.autocast("cpu", dtype):
            return layer(x)

    got = value_and_gradients(compiled(cast), layer, x)
    assert got[0].dtype == dtype and got[2].dtype == torch.float32
    assert_close(got, value_and_gradients(cast, layer, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.int64], ids=str)
def test_other_dtypes(dtype):
    x, w = (torch.randint(-4, 5, s).to(dtype) for s in ((2, 4, 5, 3), (4, 3, 3, 3)))
    assert torch.equal(compiled(conv_transpose2d)(x, w), conv_transpose2d(x, w))


def test_gradient_penalty():
    """A derivative of a derivative inside of the compiled function's joint graph, as eager's."""
    layer = deconv_ext.ConvTranspose2d(4, 1, 3, 2)
    x = torch.randn(2, 4, 5, 3)

    def backward_of_backward(dy, w):
        dx = torch.ops.deconv_ext.conv_transpose2d_grad_input(
            dy, w, (5, 3), (2, 2), (0, 0, 0, 0), (0, 0), (1, 1), 1
        )
        return dx.pow(2).sum()

    dy = torch.randn_like(layer(x)).requires_grad_()
    got = torch.autograd.grad(compiled(backward_of_backward)(dy, layer.weight), (dy, layer.weight))
    want = torch.autograd.grad(backward_of_backward(dy, layer.weight), (dy, layer.weight))
    assert_close(got, want)


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sin().sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_inside(name):
    """torch.library has no rules for these, so torch's operator serves them, with a warning."""
    layer, x = deconv_ext.ConvTranspose2d(4, 6, 3, 2), torch.randn(2, 4, 5, 3)
    deconv_ext.functional._warn_once.cache_clear()

    def function(x):
        return TRANSFORMS[name](lambda x: layer(x), x)

    want = function(x)
    with pytest.warns(UserWarning, match="inside of torch.compile"):
        got = compiled(function)(x)
    assert_close(got, want)


def test_wrong_arguments_stay_errors():
    layer = deconv_ext.ConvTranspose2d(4, 6, 3)
    with pytest.raises(RuntimeError, match="channels"):
        compiled(layer)(torch.randn(2, 5, 5, 3))


FRESH_PROCESS = """
import sys, torch, deconv_ext
layer = deconv_ext.ConvTranspose2d(4, 6, 3)
assert "torch._dynamo" not in sys.modules and "deconv_ext._C" not in sys.modules
y = torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(1, 4, 5, 5))
assert y.shape == (1, 6, 7, 7)
"""


def test_the_first_call_of_a_process_may_be_a_compiled_one():
    done = subprocess.run([sys.executable, "-c", FRESH_PROCESS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def no_binary(monkeypatch):
    """As where there is no compiler; what later tests are told is the truth again."""
    from deconv_ext import functional
    from deconv_ext.build import BuildError

    def extension():
        raise BuildError("no compiler anywhere")

    def forget():
        functional._obstacle.cache_clear()
        functional._warn_once.cache_clear()

    forget()
    monkeypatch.delenv("DECONV_EXT_STRICT", raising=False)
    monkeypatch.setattr(functional, "extension", extension)
    yield
    forget()


def test_without_a_binary_torch_computes(no_binary):
    layer, x = deconv_ext.ConvTranspose2d(4, 6, 3, 2), torch.randn(2, 4, 5, 3)
    want = torch.nn.functional.conv_transpose2d(x, layer.weight, layer.bias, 2)
    with pytest.warns(UserWarning, match="no compiler anywhere"):
        assert_close(compiled(layer)(x), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_cuda(mode):
    """With CUDA graphs in the second mode."""
    layer = deconv_ext.ConvTranspose2d(4, 6, 4, 2, 1).cuda()
    x = torch.randn(2, 4, 8, 8, device="cuda")
    function = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(3):
        assert_close(function(x).clone(), layer(x))
