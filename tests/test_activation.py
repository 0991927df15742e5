"""`activation=`: bias and activation in the store of the kernel."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import runpy

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import deconv_ext
from deconv_ext.activation import FUNCTIONS
from deconv_ext.functional import conv_transpose2d
from deconv_ext.testing import EDGE, Case, Operands, make_case
from project import ROOT
from support import (
    FLOATS,
    C,
    assert_same_bits,
    define,
    dtype_name,
    each_dtype,
    implementations,
    must_accept,
    use_isa,
    use_threads,
)

NAMES = tuple(FUNCTIONS)
SLOPE = 0.2
EPS = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}
each_name = pytest.mark.parametrize("name", NAMES)

# Every way to store: planes, channels_last, phases without taps, tails, several blocks of rows.
CASES = (
    make_case("k4_s2", (2, 5, 6, 7), 9, 4, 2, 1),
    make_case("k2_s2", (2, 16, 4, 9), 24, 2, 2),
    make_case("k3_s1", (1, 3, 5, 18), 17, 3, 1, 1),
    make_case("gaps", (1, 8, 5, 6), 5, 2, 3, 0, 1),
    make_case("depthwise", (2, 19, 6, 7), 19, 4, 2, 1, groups=19),
    make_case("depthwise_gaps", (1, 8, 5, 6), 8, 2, 3, 0, 1, groups=8),
    *(c for c in EDGE if c.name in ("groups_wide", "k2_s5", "dilation_2_stride_4", "c_out_1")),
    *(c for c in EDGE if c.name in ("asymmetric_groups", "long_row", "batch_many", "batch_0")),
)


def forward(case: Case, t: Operands, name: str, algo: str = "auto", bias: bool = True) -> Tensor:
    b = t.bias if bias else None
    return C.forward_activated(t.x, t.w, b, *case.geometry, name, SLOPE, algo)


def bound(case: Case, t: Operands, dtype: torch.dtype) -> Tensor:
    """A limit on the error before the activation: of the terms' absolute values."""
    magnitude = define("forward", case, Operands(*(v.double().abs() for v in t)))
    wide = 2**-53 if dtype == torch.float64 else 2**-24
    return magnitude * wide * 64


# --- numbers -------------------------------------------------------------------------------------


@each_dtype(*FLOATS)
@implementations("forward")
def test_every_algorithm(op: str, algo: str, isa: str, dtype: torch.dtype, seed: int) -> None:
    """As the activation of the definition in float64, rounded once, in both layouts."""
    checked = 0
    with use_isa(isa):
        for i, case in enumerate(CASES):
            for layout in ("contiguous", "channels_last"):
                t = case.operands(seed % 1000 + i, dtype, layout)
                z = define("forward", case, t)
                limit = 1.2 * bound(case, t, dtype)
                for name in NAMES:
                    try:
                        y = forward(case, t, name, algo)
                    except RuntimeError as error:
                        assert "cannot take this problem" in str(error)
                        assert not must_accept(algo, case, t), (case, error)
                        break
                    want = FUNCTIONS[name](z, SLOPE)
                    error = (y.double() - want).abs()
                    wrong = error > limit + want.abs() * EPS[dtype] + 1e-7 * (dtype in FLOATS[2:])
                    assert y.dtype == dtype and not wrong.any(), (case, layout, name, error.max())
                    checked += 1
    assert checked > 10


@each_name
@each_dtype(torch.float32, torch.bfloat16)
def test_at_least_as_close_as_two_operators(name: str, dtype: torch.dtype) -> None:
    """One rounding instead of two: never much further from float64, and nearer on the whole."""
    case = make_case("layer", (2, 24, 9, 10), 20, 4, 2, 1)
    t = case.operands(3, dtype)
    want = FUNCTIONS[name](define("forward", case, t), SLOPE)
    one = (forward(case, t, name) - want).abs()
    two = (FUNCTIONS[name](C.forward(t.x, t.w, t.bias, *case.geometry), SLOPE) - want).abs()
    assert one.max() <= 1.5 * two.max() and one.mean() <= 1.1 * two.mean()


def values(dtype: torch.dtype) -> Tensor:
    """Numbers of every magnitude and both signs, and those at which something begins or ends."""
    info = torch.finfo(dtype)
    powers = 2.0 ** torch.arange(-160 if dtype == torch.float32 else -1080, 12, 0.37).double()
    dense = torch.linspace(-40, 40, 4001).double()
    special = torch.tensor([0.0, 88.72, 103.97, 104.0, 13.2, 14.1, 15.0, 38.5, 39.9, 709.8, 745.2])
    ends = torch.tensor([info.max, info.tiny, info.max / 2], dtype=torch.float64)
    x = torch.cat([powers, dense, special.double(), ends]).to(dtype)
    return torch.cat([x, -x])


def pointwise(x: Tensor, name: str, algo: str) -> Tensor:
    """The activation alone: a transposed convolution with one weight, 1."""
    one = torch.ones(1, 1, 1, 1, dtype=x.dtype)
    image = x.reshape(1, 1, 1, -1)
    geometry = ((1, 1), (0, 0, 0, 0), (0, 0), (1, 1), 1)
    return C.forward_activated(image, one, None, *geometry, name, SLOPE, algo).flatten()


def precisely(x: float, name: str) -> mpmath.mpf:
    v = mpmath.mpf(x)
    if name == "gelu":
        return v * mpmath.erfc(-v / mpmath.sqrt(2)) / 2
    if name == "tanh":
        return mpmath.tanh(v)
    sigmoid = 1 / (1 + mpmath.exp(-v))
    return {"sigmoid": sigmoid, "silu": v * sigmoid}[name]


@pytest.mark.parametrize("isa", C.cpu_isas())
@pytest.mark.parametrize("name", ["silu", "gelu", "tanh", "sigmoid"])
@each_dtype(torch.float32, torch.float64)
def test_vector_functions(name: str, dtype: torch.dtype, isa: str) -> None:
    """Within a few units in the last place of what 40 digits give, from end to end."""
    x = values(dtype)
    with use_isa(isa):
        got = pointwise(x, name, "gemm")
        assert_same_bits(got, pointwise(x, name, "direct"), "one function, whoever calls")
    if dtype == torch.float64:
        x, got = x[::7], got[::7]
    with mpmath.workdps(40):
        want = [precisely(v, name) for v in x.tolist()]
        error = [float(abs(mpmath.mpf(g) - w)) for g, w in zip(got.tolist(), want)]
    exact = torch.tensor([abs(float(w)) for w in want], dtype=torch.float64)
    # Below the normal numbers, and for products with such, digits are lost.
    unit = torch.finfo(dtype).eps * exact.clamp(min=torch.finfo(dtype).tiny * 1024)
    ulps = torch.tensor(error, dtype=torch.float64) / unit
    worst = int(ulps.argmax())
    assert ulps[worst] < 4, f"{ulps[worst]} at {x[worst].item()}: {got[worst].item()}"


@implementations("forward", best_isa=True)
@each_dtype(*FLOATS)
def test_nan_and_infinity(op: str, algo: str, isa: str, dtype: torch.dtype) -> None:
    """What torch's activations make of them, also where they come out of the sums themselves."""
    case = make_case("image", (1, 8, 4, 9), 8, 3, 2, 1, groups=8)
    layout = "channels_last" if algo == "depthwise" else "contiguous"
    t = case.operands(0, dtype, layout)
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        t.x[0, i, 1, 2], t.w[i + 3, 0, 0, 0], t.bias[6] = value, value, float("-inf")
    z = C.forward(t.x, t.w, t.bias, *case.geometry, algo=algo)
    for name in NAMES:
        want, got = FUNCTIONS[name](z.double(), SLOPE), forward(case, t, name, algo)
        assert torch.equal(got.isnan(), want.isnan()), name
        assert torch.equal(got.isposinf(), want.isposinf() & z.isinf()), name
        assert torch.equal(got.isneginf(), want.isneginf()), name


@each_name
def test_the_bits_do_not_depend_on_threads_or_on_the_batch(name: str) -> None:
    for case in (CASES[0], CASES[1], CASES[4]):
        for layout in ("contiguous", "channels_last"):
            t = case.operands(1, torch.float32, layout)
            with use_threads(1):
                want = forward(case, t, name)
            for threads in (2, 3, 7):
                with use_threads(threads):
                    assert_same_bits(forward(case, t, name), want, (case, layout, threads))
            single = forward(case, t._replace(x=t.x[1:]), name)
            assert_same_bits(single, want[1:], (case, layout, "alone"))


@implementations("forward")
@each_dtype(torch.float32, torch.float16)
def test_the_sums_are_those_without_one(op: str, algo: str, isa: str, dtype: torch.dtype) -> None:
    """leaky_relu with a slope of 1 is the identity: the same sums come out, to the bit."""
    with use_isa(isa):
        for case in CASES:
            t = case.operands(2, dtype, "channels_last" if algo == "depthwise" else "contiguous")
            if not must_accept(algo, case, t):
                continue
            plain = C.forward(t.x, t.w, t.bias, *case.geometry, algo=algo)
            same = C.forward_activated(t.x, t.w, t.bias, *case.geometry, "leaky_relu", 1.0, algo)
            assert_same_bits(same + 0.0, plain + 0.0, case)


# --- derivatives ---------------------------------------------------------------------------------


def small(dtype: torch.dtype = torch.float64, **kwargs) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = deconv_ext.ConvTranspose2d(4, 6, 3, 2, 1, groups=2, dtype=dtype, **kwargs)
    return layer, torch.randn(2, 4, 4, 3, dtype=dtype)


def separate(layer: nn.Module) -> nn.Module:
    """The layer and torch's activation after it."""
    plain = copy.deepcopy(layer)
    plain.activation = None

    class Activation(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return FUNCTIONS[layer.activation](x, layer.negative_slope)

    return nn.Sequential(plain, Activation())


KINDS = [
    *((name, {"activation": name}) for name in NAMES),
    ("leaky_relu slope -0.5", {"activation": "leaky_relu", "negative_slope": -0.5}),
    ("leaky_relu slope 0", {"activation": "leaky_relu", "negative_slope": 0}),
]
each_kind = pytest.mark.parametrize("kwargs", [k for _, k in KINDS], ids=[n for n, _ in KINDS])


@each_kind
def test_gradcheck(kwargs: dict) -> None:
    layer, x = small(**kwargs)
    weights = dict(layer.named_parameters())

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(weights, values)), x)

    inputs = (x.requires_grad_(), *(w.detach().requires_grad_() for w in weights.values()))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@each_kind
@each_dtype(torch.float64, torch.bfloat16)
def test_gradients_as_those_of_two_operators(kwargs: dict, dtype: torch.dtype) -> None:
    layer, x = small(dtype, **kwargs)
    both, results = separate(layer), []
    for module in (layer, both):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        grads = torch.autograd.grad(y.sin().sum(), (leaf, *module.parameters()))
        results.append((y, *grads))
    close = {} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.1}
    assert_close(results[0], results[1], **close)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "tanh", "sigmoid"])
def test_what_is_saved_is_the_output(name: str) -> None:
    """Backward needs x, w and the output: the value before the activation is never in memory."""
    layer, x = small(activation=name)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x.requires_grad_())
    assert "Activated" in type(y.grad_fn).__name__
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in (x, layer.weight, y))


@each_name
def test_a_training_step_has_one_pass_for_the_derivative(name: str) -> None:
    """And none for the activation where its derivative can be told from the output."""
    layer, x = small(activation=name)
    dy = layer(x.requires_grad_()).detach()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(layer(x), (x, *layer.parameters()), dy)
    names = [event.name for event in profile.events() if "::" in event.name]
    trivial = ("aten::empty", "aten::resolve_conj", "aten::resolve_neg")
    found = [n for n in names if n not in trivial and "autograd" not in n]
    between = name in ("silu", "gelu")
    derivative = "threshold" if name == "relu" else name
    assert sorted(found) == sorted(
        [
            "deconv_ext::conv_transpose2d" + "_activated" * (not between),
            *[f"aten::{name}"] * between,
            f"aten::{derivative}_backward",
            "deconv_ext::conv_transpose2d_grad_input",
            "deconv_ext::conv_transpose2d_grad_weight",
            "deconv_ext::conv_transpose2d_grad_bias",
        ]
    )


@pytest.mark.parametrize("name", ["tanh", "silu"])
def test_transforms(name: str) -> None:
    layer, x = small(activation=name)
    both = separate(layer)
    for function in (
        torch.vmap(lambda f, v: f(v), in_dims=(None, 0)),
        lambda f, v: torch.func.jvp(f, (v,), (v.cos(),)),
        lambda f, v: torch.func.grad(lambda u: f(u).sin().sum())(v),
        lambda f, v: torch.func.jacfwd(torch.func.jacrev(lambda u: f(u).sum()))(v[:1, :, :2, :2]),
    ):
        assert_close(function(layer, x), function(both, x))
    batch = x.expand(3, *x.shape) * torch.arange(1, 4).view(3, 1, 1, 1, 1)
    per_sample = torch.vmap(torch.func.grad(lambda v: layer(v).sin().sum()))(batch)
    assert_close(per_sample[2], torch.func.grad(lambda v: both(v).sin().sum())(batch[2]))


# --- the Python around it ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["leaky_relu", "gelu"])  # by the output, by the value before
def test_compile(name: str) -> None:
    torch._dynamo.reset()
    layer, x = small(activation=name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for module in (layer, compiled):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        grads = torch.autograd.grad(y.sin().sum(), (leaf, *layer.parameters()))
        if module is layer:
            want = y, *grads
    assert_close((y, *grads), want)
    with torch.no_grad():
        assert_same_bits(compiled(x), layer(x), name)
    torch._dynamo.reset()


def test_the_graph_holds_one_operator() -> None:
    """For inference, whatever the activation; in training, where it is enough."""
    fused = torch.ops.deconv_ext.conv_transpose2d_activated.default
    for name, grad in itertools.product(NAMES, (False, True)):
        layer, x = small(activation=name)
        with torch.set_grad_enabled(grad):
            program = torch.export.export(layer, (x,))
        targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
        assert (targets == [fused]) == (not grad or name not in ("silu", "gelu")), targets
        assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@each_name
def test_shapes_and_formats(name: str, layout: torch.memory_format) -> None:
    layer, x = small(activation=name)
    both = separate(layer)
    x = x.contiguous(memory_format=layout)
    y, want = layer(x), both(x)
    assert y.stride() == want.stride()
    assert_close(y, want)
    assert_close(layer(x[0]), both(x[0]))
    assert layer(x[:0]).shape == both(x[:0]).shape


@each_name
def test_autocast(name: str) -> None:
    layer, x = small(torch.float32, activation=name)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.requires_grad_())
        want = separate(layer)(x)
    assert y.dtype == want.dtype == torch.bfloat16
    assert_close(y, want, rtol=0.02, atol=0.01)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_relatives() -> None:
    x = torch.randn(2, 4, 9)
    layer = deconv_ext.ConvTranspose1d(4, 6, 4, 2, activation="tanh")
    assert_close(layer(x), torch.tanh(nn.ConvTranspose1d.forward(layer, x)))
    for lazy in (
        deconv_ext.LazyConvTranspose2d(6, 3, activation="leaky_relu", negative_slope=0.3),
        deconv_ext.LazyConvTranspose1d(6, 3, activation="leaky_relu", negative_slope=0.3),
    ):
        y = lazy(x if "1d" in type(lazy).__name__ else x[..., None])
        assert y.min() < 0 and "activation='leaky_relu', negative_slope=0.3" in repr(lazy)
    circular = deconv_ext.ConvTranspose2d(
        4, 6, 4, 2, 1, padding_mode="circular", activation="sigmoid"
    )
    image = torch.randn(1, 4, 5, 5)
    y, circular.activation = circular(image), None
    assert_close(y, torch.sigmoid(circular(image)))


def test_copies_and_state() -> None:
    layer, x = small(activation="leaky_relu", negative_slope=0.3)
    assert layer.state_dict().keys() == small()[0].state_dict().keys()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and repr(other) == repr(layer)
    assert "activation" not in repr(small()[0])
    assert "negative_slope" not in repr(small(activation="relu")[0])


def test_profile_and_flops() -> None:
    from torch.profiler import profile
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = small(activation="relu")
    with profile() as profiled, torch.no_grad():
        layer(x)
    assert "deconv_ext::conv_transpose2d_activated" in {e.key for e in profiled.key_averages()}
    counts = []
    for module in (layer, separate(layer)):
        with FlopCounterMode(display=False) as counter:
            module(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_onnx() -> None:
    """Standard nodes, in ONNX Runtime with our results; one model, for the exporter is slow."""
    import onnxruntime  # takes long

    from deconv_ext import ops

    layers = [
        deconv_ext.ConvTranspose2d(4, 4, 3, padding=1, activation=name, negative_slope=0.3)
        for name in NAMES
    ]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 4, 5, 3)
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            (x,),
            dynamo=True,
            custom_translation_table=ops.onnx_translations(),
            verbose=False,
        )
    nodes = program.model_proto.graph.node
    assert {node.domain for node in nodes} == {""}
    followers = [b.op_type for a, b in zip(nodes, nodes[1:]) if a.op_type == "ConvTranspose"]
    assert len(followers) == len(NAMES) and followers[:2] == ["Relu", "LeakyRelu"]
    assert followers[-2:] == ["Tanh", "Sigmoid"]
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_devices_without_kernels() -> None:
    layer, x = small(torch.float32, activation="relu")
    assert layer.to("meta")(x.to("meta")).shape == (2, 6, 7, 5)


# --- errors --------------------------------------------------------------------------------------

LEGAL = "'relu', 'leaky_relu', 'silu', 'gelu', 'tanh', 'sigmoid'"


def test_unknown_names() -> None:
    x, w = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    message = f"one of {LEGAL}, but got activation='swish'"
    with pytest.raises(ValueError, match=message):
        conv_transpose2d(x, w, activation="swish")
    with pytest.raises(ValueError, match=message):
        deconv_ext.ConvTranspose2d(1, 1, 2, activation="swish")
    geometry = ((1, 1), (0, 0, 0, 0), (0, 0), (1, 1), 1)
    with pytest.raises(ValueError, match=message):
        C.forward_activated(x, w, None, *geometry, "swish", 0.0)
    for kwargs, words in (
        ({"activation": torch.relu}, "argument 'activation' must be str or None"),
        ({"activation": "leaky_relu", "negative_slope": "0.1"}, "'negative_slope' must be float"),
    ):
        with pytest.raises(TypeError, match=words):
            conv_transpose2d(x, w, **kwargs)
        with pytest.raises(TypeError, match=words):
            deconv_ext.ConvTranspose2d(1, 1, 2, **kwargs)
    with pytest.raises(TypeError, match="positional"):
        conv_transpose2d(x, w, None, 1, 0, 0, 1, 1, "relu")


@each_dtype(torch.int64, torch.complex64)
def test_other_dtypes(dtype: torch.dtype) -> None:
    x, w = torch.ones(1, 1, 2, 2, dtype=dtype), torch.ones(1, 1, 2, 2, dtype=dtype)
    with pytest.raises(NotImplementedError, match="activation='relu' needs a floating point dtype"):
        conv_transpose2d(x, w, activation="relu")
    geometry = ((1, 1), (0, 0, 0, 0), (0, 0), (1, 1), 1)
    for call in (C.forward_activated, torch.ops.deconv_ext.conv_transpose2d_activated):
        with pytest.raises(NotImplementedError, match="needs a floating point dtype"):
            call(x, w, None, *geometry, "relu", 0.0)
    assert dtype_name(conv_transpose2d(x, w).dtype) == dtype_name(dtype)


# --- what is said of its speed -------------------------------------------------------------------


def test_the_table_in_the_documentation_is_the_recorded_run() -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks/activation.py"))
    (recorded,) = (ROOT / "benchmarks/results").glob("*/activation.json")
    content = json.loads(recorded.read_text())
    assert benchmark["markdown"](**content) in (ROOT / "docs/tuning.md").read_text()
    cells = {(row["layer"], row["op"], row["activation"]) for row in content["rows"]}
    assert len(cells) == len(benchmark["LAYER_NAMES"]) * 2 * len(NAMES)
