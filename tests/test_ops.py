"""The operators of torch's dispatcher: schema, fake kernels, derivatives, FLOP counts, profiles."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import deconv_ext
from deconv_ext.ops import OPERATORS
from deconv_ext.testing import LAYOUTS, Case, Operands, make_case, random_case
from support import SeenOperators, dtype_name, each_dtype, in_memory

CASES = (
    make_case("k4_s2", (2, 5, 6, 7), 9, 4, 2, 1),
    make_case("asymmetric", (2, 4, 4, 5), 6, (3, 2), (2, 1), (0, 1, 2, 0), groups=2),
    make_case("output_padding", (1, 2, 3, 3), 2, 3, (3, 2), 1, (2, 1), dilation=(1, 2)),
    make_case("one_channel", (2, 1, 5, 5), 1, 3, 2),
    make_case("pointwise", (2, 4, 1, 1), 4, 1, groups=4),
    make_case("no_batch", (0, 4, 5, 3), 6, 3),
    *(random_case(seed) for seed in range(5)),
)


def arguments(op: str, case: Case, t: Operands) -> tuple:
    return {
        "forward": (t.x, t.w, t.bias, *case.geometry),
        "forward_activated": (t.x, t.w, t.bias, *case.geometry, "tanh", 0.0),
        "grad_input": (t.dy, t.w, case.input_size, *case.geometry),
        "grad_weight": (t.x, t.dy, case.kernel, *case.geometry),
        "grad_bias": (t.dy,),
    }[op]


def each_operator(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Activations are of floating point numbers alone."""
    pairs = [
        pytest.param(op, dtype, id=f"{op}-{dtype_name(dtype)}")
        for op in OPERATORS
        for dtype in dtypes
        if op != "forward_activated" or dtype.is_floating_point
    ]
    return pytest.mark.parametrize("op,dtype", pairs)


@each_operator(torch.float32, torch.bfloat16, torch.complex64, torch.int64)
def test_fake_kernels_predict_shape_dtype_and_strides(op: str, dtype: torch.dtype) -> None:
    """Every pair of layouts, the cases in turns."""
    layouts = [name for name in LAYOUTS if dtype.is_complex or name != "conjugate"]
    pairs = list(itertools.product(layouts, layouts))
    for case, (first, second) in zip(itertools.cycle(CASES), 4 * pairs):
        t, other = (
            case.operands(0, dtype, layout, exact=dtype == torch.int64)
            for layout in (first, second)
        )
        t = t._replace(w=other.w, dy=other.dy if op == "grad_weight" else t.dy)
        args = arguments(op, case, t)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
            fake = OPERATORS[op](*fakes)
        real = OPERATORS[op](*args)
        assert in_memory(fake) == in_memory(real), (case, first, second)


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
@each_operator(torch.float64, torch.complex128)
def test_opcheck(op: str, case: Case, dtype: torch.dtype) -> None:
    """torch's own examination: schema, registration, fake kernel, AOT dispatch with symbols."""
    args = [
        a.requires_grad_() if isinstance(a, Tensor) else a
        for a in arguments(op, case, case.operands(0, dtype))
    ]
    torch.library.opcheck(OPERATORS[op], tuple(args))


BAD = {
    "channels": ((2, 5, 4, 4), (4, 3, 3, 3), (3,), "channels"),
    "bias": ((2, 4, 4, 4), (4, 3, 3, 3), (4,), "bias"),
    "too small": ((2, 4, 1, 1), (4, 3, 3, 3), (3,), "Output size is too small"),
    "dimensions": ((2, 4, 4), (4, 3, 3, 3), (3,), "4D"),
}


@pytest.mark.parametrize("name", BAD)
def test_fake_kernels_refuse_what_kernels_refuse(name: str) -> None:
    *shapes, words = BAD[name]
    geometry = ((1, 1), (2, 2, 2, 2), (0, 0), (1, 1), 1)
    for device in ("cpu", "meta"):
        operands = [torch.zeros(shape, device=device) for shape in shapes]
        with pytest.raises(RuntimeError, match=words):
            OPERATORS["forward"](*operands, *geometry)


def test_lists_of_another_length_are_refused() -> None:
    x, w = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 2, 2)
    with pytest.raises(RuntimeError, match="Expected 2 values of stride"):
        OPERATORS["forward"](x, w, None, (1, 1, 1), (0, 0, 0, 0), (0, 0), (1, 1), 1)


def counts(layer: nn.Module, x: Tensor) -> tuple[int, int]:
    """FLOPs of forward and of backward."""
    with FlopCounterMode(display=False) as forward:
        loss = layer(x).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("groups", [1, 2])
def test_flop_counter(groups: int) -> None:
    """As torch counts its own layer; of grouped weight gradients torch counts `groups` times more
    than there are."""
    x = torch.randn(2, 4, 5, 3, requires_grad=True)
    args = (4, 6, 3, 2, 1)
    ours = counts(deconv_ext.ConvTranspose2d(*args, groups=groups), x)
    one = 2 * x.shape[0] * 5 * 3 * (4 * 6 * 9 // groups)
    assert ours == (one, 2 * one)
    if groups == 1:
        assert ours == counts(nn.ConvTranspose2d(*args), x)


FIRST_CALL = """
import torch, deconv_ext
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    deconv_ext.ConvTranspose2d(4, 6, 3)(torch.randn(1, 4, 5, 5))
assert counter.get_total_flops() == 2 * 25 * 4 * 6 * 9, counter.get_total_flops()
"""


def test_flop_counter_around_the_first_call() -> None:
    """The operators come with the binary module, later than the counter."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_profiler_shows_names_and_shapes() -> None:
    layer = deconv_ext.ConvTranspose2d(4, 6, 3, 2)
    x = torch.randn(2, 4, 5, 3, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        layer(x).sum().backward()
    shapes = {event.key: event.input_shapes for event in profiled.key_averages(True)}
    y = [2, 6, 11, 7]
    assert shapes["deconv_ext::conv_transpose2d"][:3] == [[2, 4, 5, 3], [4, 6, 3, 3], [6]]
    assert shapes["deconv_ext::conv_transpose2d_grad_input"][:2] == [y, [4, 6, 3, 3]]
    assert shapes["deconv_ext::conv_transpose2d_grad_weight"][:2] == [[2, 4, 5, 3], y]
    assert shapes["deconv_ext::conv_transpose2d_grad_bias"][:1] == [y]


def test_eager_calls_do_without_the_dispatcher() -> None:
    """A call costs what tests/test_overhead.py allows: it goes straight to the binary module."""
    layer, x = deconv_ext.ConvTranspose2d(4, 6, 3), torch.randn(2, 4, 5, 3)
    for autocast in (False, True):
        with torch.autocast("cpu", enabled=autocast):
            name = layer(x).grad_fn.name()
        assert "CppNode" in name and "ConvTranspose2d" in name
    layer.activation = "relu"
    assert layer(x).grad_fn.name() == "ConvTranspose2dForwardActivatedBackward"


@each_dtype(torch.float32)
def test_modes_see_the_operators(dtype: torch.dtype) -> None:
    layer = nn.Sequential(
        deconv_ext.ConvTranspose2d(4, 6, 3, dtype=dtype),
        deconv_ext.ConvTranspose2d(6, 6, 3, dtype=dtype, activation="relu"),
    )
    x = torch.randn(2, 4, 5, 3, dtype=dtype, requires_grad=True)
    with SeenOperators() as mode:
        y = layer(x)
        y.sum().backward()
    assert [op for op in OPERATORS.values() if op not in mode.seen] == [], dtype_name(dtype)
    assert not [op for op in mode.seen if "aten::convolution" in op.name()]
    assert torch.equal(y, layer(x))
