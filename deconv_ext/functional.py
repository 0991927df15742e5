"""`conv_transpose2d` with the signature of torch's, on our kernels wherever there are some."""

from __future__ import annotations

import functools
import operator
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import activation as activations
from . import autograd
from .build import BuildError, extension

Pair = tuple[int, int]
Sides = tuple[int, int, int, int]  # top, bottom, left, right


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """The transposed convolution, as `torch.nn.functional.conv_transpose2d` defines it.

    Args:
        input: [N, C_in, H, W] or unbatched [C_in, H, W].
        weight: [C_in, C_out/groups, kH, kW].
        bias: [C_out] or None.
        stride, output_padding, dilation: an int, or one for each of (h, w).
        padding: also ((top, bottom), (left, right)), or "same" or "valid" with TensorFlow's
            meaning: the output is `size * stride`, or `(size - 1) * stride + max(extent, stride)`
            for a kernel that spans `extent = dilation * (kernel - 1) + 1` pixels.
        groups: number of independent blocks of channels.
        activation: "relu", "leaky_relu", "silu", "gelu" (the exact form), "tanh" or "sigmoid" of
            the result, as torch's functions of these names give it, but computed in the store of
            the kernel, before the rounding to the dtype. The backward of relu, leaky_relu (with a
            slope >= 0), tanh and sigmoid needs the output alone. Where gradients are recorded, the
            others are this operator, whose result is kept, and torch's activation; so are all of
            them under torch.func transforms and in forward mode.
        negative_slope: of "leaky_relu".

    Returns:
        [N, C_out, OH, OW], without N if the input has none, where
        `OH = (H - 1) * stride - top - bottom + dilation * (kH - 1) + output_padding + 1`.

    Raises:
        TypeError: an argument of the wrong type, such as a fractional stride.
        ValueError: an unknown name of a padding or an activation.
        NotImplementedError: an activation of numbers that are not floating point.
        RuntimeError: values or shapes that make no operator, as torch raises it; with
            DECONV_EXT_STRICT=1 also a device that has no kernels here. Otherwise torch's own
            operator serves such a device, after one warning.
    """
    if has_torch_function_variadic(input, weight, bias):
        epilogue: dict[str, Any] = {}  # the call as it was made: without what has its default
        if activation is not None:
            epilogue = {"activation": activation, "negative_slope": negative_slope}
        return handle_torch_function(
            conv_transpose2d,
            (input, weight, bias),
            input,
            weight,
            bias,
            stride,
            padding,
            output_padding,
            groups,
            dilation,
            **epilogue,
        )
    _check_tensor("input", 1, input)
    _check_tensor("weight", 2, weight)
    if bias is not None:
        _check_tensor("bias", 3, bias)
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    output_padding = pair("output_padding", output_padding)
    sides, output_padding = resolve_padding(padding, weight.shape, stride, output_padding, dilation)
    if type(groups) is not int or not -_INT64 <= groups < _INT64:
        groups = _integer("groups", "int", groups)
    geometry = (stride, sides, output_padding, dilation, groups)
    if activation is not None:
        activations.check(activation, negative_slope)
    elif not torch.compiler.is_dynamo_compiling() and not _obstacle(input.device, input.layout):
        # The shortest way, which takes most calls; the rest of this function is for the others.
        input, weight, bias = _autocast(input, weight, bias)
        result: Tensor | None = extension().recorded_forward(input, weight, bias, *geometry)
        if result is not None:
            return result

    if not _ours(input, weight, bias):
        y = _torch_operator(input, weight, bias, *geometry)
        return y if activation is None else activations.FUNCTIONS[activation](y, negative_slope)
    input, weight, bias = _autocast(input, weight, bias)
    apply: Callable[..., Tensor] = (
        _traced_forward if torch.compiler.is_dynamo_compiling() else autograd.forward
    )
    if activation is not None:
        activations.check_dtype(activation, input.dtype)
        apply = functools.partial(_activated, activation, negative_slope)
    if input.dim() == 3:
        return apply(input.unsqueeze(0), weight, bias, geometry).squeeze(0)
    return apply(input, weight, bias, geometry)


def _traced_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: autograd.Geometry
) -> Tensor:
    y: Tensor = torch.ops.deconv_ext.conv_transpose2d(input, weight, bias, *geometry)
    return y


def _activated(
    name: str,
    slope: float,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: autograd.Geometry,
) -> Tensor:
    slope = float(slope)
    if not torch.compiler.is_dynamo_compiling():
        return autograd.forward_activated(input, weight, bias, geometry, name, slope)
    if autograd.needs_value_between((input, weight, bias), name, slope):
        z = _traced_forward(input, weight, bias, geometry)
        return activations.FUNCTIONS[name](z, slope)
    y: Tensor = torch.ops.deconv_ext.conv_transpose2d_activated(
        input, weight, bias, *geometry, name, slope
    )
    return y


# --- arguments -----------------------------------------------------------------------------------


def pair(name: str, value: Any) -> Pair:
    """(h, w) of an int or of a sequence of one or two, by torch's rules and with its errors."""
    if type(value) is int and -_INT64 <= value < _INT64:
        return value, value
    if type(value) is tuple and len(value) == 2:
        h, w = value
        if type(h) is int and type(w) is int and -_INT64 <= h < _INT64 and -_INT64 <= w < _INT64:
            return value
    if isinstance(value, (tuple, list)):
        values = [_integer(name, "tuple of ints", v) for v in value]
        if len(values) not in (1, 2):
            raise RuntimeError(
                f"expected {name} to be a single integer value or a list of 2 values to match "
                f"the convolution dimensions, but got {name}={values}"
            )
        return values[0], values[-1]
    value = _integer(name, "tuple of ints", value)
    return value, value


def is_two_sided(padding: Any) -> bool:
    """Whether the padding is written ((top, bottom), (left, right))."""
    sequence = (tuple, list)
    if not isinstance(padding, sequence) or not padding or not isinstance(padding[0], sequence):
        return False  # most calls
    return all(isinstance(side, sequence) for side in padding)


def resolve_padding(
    padding: Any, weight_shape: Any, stride: Pair, output_padding: Pair, dilation: Pair
) -> tuple[Sides, Pair]:
    """(top, bottom, left, right) and output_padding for any way to write the padding."""
    if isinstance(padding, str):
        kernel_size = (*weight_shape, 1, 1, 1, 1)[2:4]  # of other dimensions it is refused later
        if torch._C._get_tracing_state() is not None:  # torch.jit.trace makes tensors of sizes
            kernel_size = tuple(map(int, kernel_size))
        return _named_padding(padding, kernel_size, stride, output_padding, dilation)
    if is_two_sided(padding):
        if [len(side) for side in padding] != [2, 2]:
            raise RuntimeError(
                f"expected padding to be an int, (h, w) or ((top, bottom), (left, right)), "
                f"but got padding={padding}"
            )
        (top, bottom), (left, right) = (pair("padding", side) for side in padding)
        return (top, bottom, left, right), output_padding
    h, w = pair("padding", padding)
    return (h, h, w, w), output_padding


def _named_padding(
    name: str, kernel_size: Any, stride: Pair, output_padding: Pair, dilation: Pair
) -> tuple[Sides, Pair]:
    """Padding and output_padding by which the output has the size that TensorFlow gives it."""
    if name not in ("same", "valid"):
        raise ValueError(
            f"padding must be an int, (h, w), ((top, bottom), (left, right)), 'same' or 'valid', "
            f"but got padding={name!r}"
        )
    if output_padding != (0, 0):
        raise ValueError(
            f"padding={name!r} decides the output size by itself, so output_padding must be 0, "
            f"but got output_padding={output_padding}"
        )
    # By how much the patches of neighbouring input pixels overlap (< 0: the gap between them).
    overlap = [d * (k - 1) + 1 - s for k, s, d in zip(kernel_size, stride, dilation, strict=True)]
    gap = (max(-overlap[0], 0), max(-overlap[1], 0))
    if name == "valid":
        return (0, 0, 0, 0), gap
    h, w = (max(o, 0) for o in overlap)
    return (h // 2, h - h // 2, w // 2, w - w // 2), gap


_INT64 = 2**63


def _integer(name: str, expected: str, value: Any) -> int:
    """An int of anything that torch takes for one: not a bool, not a float, even a whole one."""
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        hint = ""
        if name == "stride" and isinstance(value, float):
            hint = (
                ": a stride is an integer >= 1, the factor by which the output is larger "
                "(a convolution 'with stride 1/2' is stride=2 here)"
            )
        raise TypeError(
            f"conv_transpose2d(): argument '{name}' must be {expected}, "
            f"not {type(value).__name__} ({name}={value!r}){hint}"
        ) from None
    if not -_INT64 <= number < _INT64:
        raise ValueError(f"conv_transpose2d(): {name}={number} overflows a 64-bit integer")
    return number


def _check_tensor(name: str, position: int, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"conv_transpose2d(): argument '{name}' (position {position}) must be Tensor, "
            f"not {type(value).__name__}"
        )


def _autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of a convolution as torch.autocast gives them to it."""
    if not torch.is_autocast_enabled(device := input.device.type):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        floating = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if floating else tensor

    return cast(input), cast(weight), None if bias is None else cast(bias)


# --- what has no kernels here --------------------------------------------------------------------


def _ours(*tensors: Tensor | None) -> bool:
    """Whether our kernels or operators can take the tensors; if they should but cannot, warn."""
    if torch.compiler.is_dynamo_compiling():
        return all(
            _traced(tensor.device, tensor.layout) for tensor in tensors if tensor is not None
        )
    for tensor in tensors:
        if tensor is None:
            continue
        kind = type(tensor)
        if tensor.is_meta or not (autograd.holds_data(kind) or _knows_our_operators(kind)):
            return False
        if not _has_kernels(tensor.device, tensor.layout):
            return False
    return True


@functools.cache
def _knows_our_operators(kind: type[Tensor]) -> bool:
    """Whether a wrapper takes any operator that is registered; others know torch's alone."""
    names = {base.__name__ for base in kind.__mro__}
    if "DTensor" in names:
        from .ops import register_sharding

        register_sharding()
    return not names.isdisjoint({"FakeTensor", "FunctionalTensor", "DTensor"})


def _has_kernels(device: torch.device, layout: torch.layout) -> bool:
    """Whether there are kernels for such tensors; if not, one warning or an error."""
    return _accept(_obstacle(device, layout))


def _accept(reason: str) -> bool:
    """True without a reason against our operator; else one warning, or the error asked for."""
    if reason:
        if os.environ.get("DECONV_EXT_STRICT", "") not in ("", "0"):
            raise RuntimeError(f"deconv_ext: {reason}, and DECONV_EXT_STRICT is set")
        _warn_once(reason)
    return not reason


def _traced(device: torch.device, layout: torch.layout) -> bool:
    """As `_has_kernels`, for Dynamo, which needs the operators to be there before it goes on."""
    if device.type == "meta" or not _has_kernels(device, layout):
        return False
    # torch.library has no forward mode, and no reverse mode for torch.func: it would lose tangents.
    if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _accept("no torch.func transforms and no forward mode inside of torch.compile")
    return bool(autograd.operators())


# What torch.compiler.assume_constant_result does, without its import of all of Dynamo: the result
# depends on the installation and on constants alone, so Dynamo calls this instead of tracing it.
_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _obstacle(device: torch.device, layout: torch.layout) -> str:
    """Why there are no kernels for such tensors; empty if there are."""
    if device.type not in ("cpu", "cuda"):
        return f"no kernels for device type {device.type!r}"
    if layout is not torch.strided:
        return f"no kernels for tensors of layout {layout}"
    try:
        built = extension().compiled()
    except BuildError as error:
        return f"the binary module could not be built ({error})"
    if device.type == "cuda" and not built["with_cuda"]:
        return "the binary module was built without CUDA"
    return ""


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"deconv_ext: {reason}; torch's own operator is used", stacklevel=6)


def _torch_operator(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Pair,
    sides: Sides,
    output_padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """The same by torch's operator, which alone cannot crop asymmetrically."""
    top, bottom, left, right = sides
    apply = torch.nn.functional.conv_transpose2d
    if top == bottom and left == right:
        return apply(x, w, bias, stride, (top, left), output_padding, groups, dilation)
    y = apply(x, w, None, stride, 0, 0, groups, dilation)
    crop = (-left, output_padding[1] - right, -top, output_padding[0] - bottom)
    y = torch.nn.functional.pad(y, crop)
    return y if bias is None else y + bias[:, None, None]
