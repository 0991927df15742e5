"""The operators `torch.ops.deconv_ext.*`: for whatever traces, exports, compiles or counts calls.

The binary module defines them, with their kernels for CPU and CUDA (csrc/bindings.cpp); importing
this module loads it and adds what torch wants to know beside: fake kernels (shape, dtype, strides),
derivatives and vmap (the formulas of autograd.py), FLOP counts, ONNX translations and shardings.

    conv_transpose2d(input, weight, bias?, stride, padding, output_padding, dilation, groups)
    conv_transpose2d_activated(the same, activation, negative_slope)
    conv_transpose2d_grad_input(grad_output, weight, input_size, stride, ...)
    conv_transpose2d_grad_weight(input, grad_output, kernel_size, stride, ...)
    conv_transpose2d_grad_bias(grad_output)

Pairs are (h, w), padding is (top, bottom, left, right), tensors are 4-D. Import this module before
loading an exported program, a trace or an AOTInductor package that holds such operators.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import Function
from torch.utils import flop_counter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import activation, autograd
from .build import extension

extension()  # defines the operators

_Fake = TypeVar("_Fake", bound=Callable[..., Any])
_namespace = torch.ops.deconv_ext
#: The operators by the names of the binary module's functions.
OPERATORS: dict[str, Any] = {
    "forward": _namespace.conv_transpose2d.default,
    "forward_activated": _namespace.conv_transpose2d_activated.default,
    "grad_input": _namespace.conv_transpose2d_grad_input.default,
    "grad_weight": _namespace.conv_transpose2d_grad_weight.default,
    "grad_bias": _namespace.conv_transpose2d_grad_bias.default,
}
_FUNCTIONS: dict[str, type[Function]] = {
    "forward": autograd.Forward,
    "forward_activated": autograd.ForwardActivated,
    "grad_input": autograd.GradInput,
    "grad_weight": autograd.GradWeight,
    "grad_bias": autograd.GradBias,
}

# --- fake kernels: the result without its numbers ------------------------------------------------

_register_fake: Callable[[str], Callable[[_Fake], _Fake]] = torch.library.register_fake


def _empty(sizes: Sequence[Any], a: Tensor, b: Tensor) -> Tensor:
    """By torch's rule in channels_last if one of the two operands is."""
    formats = {suggest_memory_format(t.resolve_conj().resolve_neg()) for t in (a, b)}
    channels_last = torch.channels_last in formats
    return torch.empty(
        sizes,
        dtype=a.dtype,
        device=a.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _output_size(
    size: Sequence[Any], kernel: Sequence[Any], stride: Any, padding: Any, extra: Any, dilation: Any
) -> list[Any]:
    """OH = (H - 1) * stride - top - bottom + dilation * (kH - 1) + output_padding + 1, and OW."""
    out = [
        (size[i] - 1) * stride[i]
        - padding[2 * i]
        - padding[2 * i + 1]
        + dilation[i] * (kernel[i] - 1)
        + extra[i]
        + 1
        for i in (0, 1)
    ]
    torch._check(
        out[0] > 0 and out[1] > 0,
        lambda: (
            f"Given input size per channel: ({size[0]} x {size[1]}). Calculated output size per "
            f"channel: ({out[0]} x {out[1]}). Output size is too small"
        ),
    )
    return out


def _check_operands(name: str, other: Tensor, input: Tensor) -> None:
    torch._check(
        other.dtype == input.dtype,
        lambda: f"Input type ({input.dtype}) and {name} type ({other.dtype}) should be the same",
    )
    torch._check(
        input.dim() == 4 and other.dim() == 4,
        lambda: (
            f"Expected 4D (batched) input and {name} to conv_transpose2d, but got input of size: "
            f"{list(input.shape)} and {name} of size: {list(other.shape)}"
        ),
    )


@_register_fake("deconv_ext::conv_transpose2d")
def _fake_forward(
    x: Tensor, w: Tensor, bias: Tensor | None, stride: Any, padding: Any, extra: Any, dilation: Any,
    groups: Any,
) -> Tensor:  # fmt: skip
    _check_operands("weight", w, x)
    torch._check(
        x.shape[1] == w.shape[0],
        lambda: (
            f"Given transposed=1, weight of size {list(w.shape)}, expected input"
            f"{list(x.shape)} to have {w.shape[0]} channels, but got {x.shape[1]} channels instead"
        ),
    )
    c_out = w.shape[1] * groups
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.shape[0] == c_out and bias.dtype == x.dtype,
            lambda: (
                f"Given transposed=1, weight of size {list(w.shape)}, expected bias to be "
                f"1-dimensional with {c_out} elements of type {x.dtype}, but got bias of size "
                f"{list(bias.shape)} and type {bias.dtype} instead"
            ),
        )
    out = _output_size(x.shape[2:], w.shape[2:], stride, padding, extra, dilation)
    return _empty([x.shape[0], c_out, *out], x, w)


@_register_fake("deconv_ext::conv_transpose2d_activated")
def _(x: Tensor, w: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    *geometry, name, slope = geometry  # type: ignore[assignment]
    activation.check(name, slope)
    activation.check_dtype(name, x.dtype)
    return _fake_forward(x, w, bias, *geometry)


@_register_fake("deconv_ext::conv_transpose2d_grad_input")
def _(dy: Tensor, w: Tensor, size: Any, *geometry: Any) -> Tensor:
    _check_operands("weight", w, dy)
    return _empty([dy.shape[0], w.shape[0], *size], dy, w)


@_register_fake("deconv_ext::conv_transpose2d_grad_weight")
def _(x: Tensor, dy: Tensor, size: Any, *geometry: Any) -> Tensor:
    _check_operands("grad_output", dy, x)
    return _empty([x.shape[1], dy.shape[1] // geometry[-1], *size], x, dy)


@_register_fake("deconv_ext::conv_transpose2d_grad_bias")
def _(dy: Tensor) -> Tensor:
    return torch.empty([dy.shape[1]], dtype=dy.dtype, device=dy.device)


# --- derivatives and vmap ------------------------------------------------------------------------


def _gathered(args: Sequence[Any]) -> tuple[Any, ...]:
    """An operator's arguments as a Function takes them: those of the geometry in one tuple."""
    return tuple(args) if len(args) == 1 else (*args[:3], tuple(args[3:]))


def _register_transforms(name: str, function: Any) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.count = len(inputs)
        function.setup_context(ctx, _gathered(inputs), output)

    def backward(ctx: Any, *grads: Any) -> Any:
        result = function.backward(ctx, *grads)
        if not isinstance(result, tuple):
            return result
        return result[:3] + (None,) * (ctx.count - 3)

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        result: tuple[Tensor, int] = function.vmap(info, _gathered(in_dims), *_gathered(args))
        return result

    torch.library.register_autograd(OPERATORS[name], backward, setup_context=setup_context)
    torch.library.register_vmap(OPERATORS[name], vmap)


for _name, _function in _FUNCTIONS.items():
    _register_transforms(_name, _function)

# --- torch.utils.flop_counter --------------------------------------------------------------------


def _flops(
    shapes: Callable[..., tuple[Sequence[int], Sequence[int]]],
) -> Callable[..., int]:
    def count(*args: Any, out_shape: Any, **kwargs: Any) -> int:
        x, w = shapes(*args, out_shape)
        return 2 * math.prod(x) // x[1] * math.prod(w)

    return count


# Each of the three is 2 * N * H * W * (elements of the weight), told by shapes of x and w.
_FLOP_SHAPES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "forward": lambda x, w, *_: (x, w),
    "forward_activated": lambda x, w, *_: (x, w),
    "grad_input": lambda *args: (args[-1], args[1]),
    "grad_weight": lambda *args: (args[0], args[-1]),
}
for _name, _shapes in _FLOP_SHAPES.items():
    _packet = OPERATORS[_name].overloadpacket
    flop_counter.register_flop_formula(_packet)(_flops(_shapes))
    for _mode in _get_current_dispatch_mode_stack():  # one that counts already has its own list
        if _counter := getattr(_mode, "counter", None):
            _counter.flop_registry.setdefault(_packet, flop_counter.flop_registry[_packet])


# --- torch.onnx ----------------------------------------------------------------------------------


def onnx_translations() -> dict[Any, Any]:
    """For `torch.onnx.export(..., custom_translation_table=onnx_translations())`.

    The layer becomes one standard ConvTranspose node, asymmetric padding included, and the standard
    node of its activation (for silu and gelu the nodes of their definition). Needs the packages
    onnx and onnxscript, as the exporter itself does.
    """
    from onnxscript import opset18 as op

    def translate(
        input: Any, weight: Any, bias: Any = None, stride: Any = (1, 1),
        padding: Any = (0, 0, 0, 0), output_padding: Any = (0, 0), dilation: Any = (1, 1),
        groups: int = 1,
    ) -> Any:  # fmt: skip
        top, bottom, left, right = padding
        return op.ConvTranspose(
            input,
            weight,
            bias,
            strides=list(stride),
            pads=[top, left, bottom, right],
            output_padding=list(output_padding),
            dilations=list(dilation),
            group=groups,
        )

    def translate_activated(*args: Any) -> Any:
        *operands, name, slope = args
        z = translate(*operands)
        if name == "silu":
            return op.Mul(z, op.Sigmoid(z))
        if name == "gelu":
            tail = op.Add(1.0, op.Erf(op.Mul(z, math.sqrt(0.5))))
            return op.Mul(op.Mul(z, 0.5), tail)
        if name == "leaky_relu":
            return op.LeakyRelu(z, alpha=slope)
        return {"relu": op.Relu, "tanh": op.Tanh, "sigmoid": op.Sigmoid}[name](z)

    return {
        OPERATORS["forward"]: translate,
        OPERATORS["forward_activated"]: translate_activated,
    }


# --- torch.distributed.tensor --------------------------------------------------------------------


@functools.cache
def register_sharding() -> None:
    """Tell DTensor how the operators go over a mesh: all replicated, or the batch in shards."""
    from torch.distributed.tensor import Partial, Replicate, Shard, experimental

    batch: dict[str, tuple[Any, list[Any]]] = {  # result, operands
        "forward": (Shard(0), [Shard(0), Replicate(), Replicate()]),
        "forward_activated": (Shard(0), [Shard(0), Replicate(), Replicate()]),
        "grad_input": (Shard(0), [Shard(0), Replicate()]),
        "grad_weight": (Partial(), [Shard(0), Shard(0)]),
        "grad_bias": (Partial(), [Shard(0)]),
    }
    for name, (result, operands) in batch.items():

        def strategies(*args: Any, result: Any = result, operands: Any = operands) -> list[Any]:
            rest: list[Any] = [None] * (len(args) - len(operands))
            ways = [(Replicate(), [Replicate()] * len(operands)), (result, operands)]
            return [
                ([out], [p if a is not None else None for p, a in zip(places, args)] + rest)
                for out, places in ways
            ]

        experimental.register_sharding(OPERATORS[name])(strategies)
