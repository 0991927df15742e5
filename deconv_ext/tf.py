"""TensorFlow's `tf.nn.conv2d_transpose` on torch tensors, and weights of Keras layers.

With SAME padding TensorFlow crops the smaller half of the excess at the beginning, torch the same
number of pixels at both ends. Where the excess is odd (3x3 with stride 2) no symmetric padding
gives TensorFlow's result: it lies one pixel further towards the end. Here the padding may differ
at the two ends, so the same kernels serve both.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .functional import conv_transpose2d
from .modules import ConvTranspose1d, ConvTranspose2d

#: As TensorFlow's operator has them.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32)


def conv2d_transpose(
    input: Tensor,
    filters: Tensor,
    output_shape: Any,
    strides: Any,
    padding: Any = "SAME",
    data_format: str | None = "NHWC",
    dilations: Any = None,
    name: str | None = None,
) -> Tensor:
    """`tf.nn.conv2d_transpose`: the gradient, by its input, of TensorFlow's `conv2d`.

    An NHWC tensor is a permuted channels_last one, and is computed on as such, without a copy.

    Args:
        input: [N, H, W, C_in], or [N, C_in, H, W] if data_format is "NCHW".
        filters: [kH, kW, C_out/groups, C_in]. The number of groups is C_out over its third size.
        output_shape: the shape of the result, or (OH, OW). Several sizes may lead to the same
            input by a strided convolution: any of them.
        strides, dilations: an int, or 1, 2 (h, w) or 4 (as the dimensions of the input) of them;
            None is 1. Those of batch and channels must be 1.
        padding: "SAME", "VALID", or ((begin, end), ...) for each of the four dimensions.
        data_format: "NHWC" or "NCHW".
        name: not used.

    Returns:
        A tensor of the shape output_shape, and of the input's data_format.

    Raises:
        ValueError, TypeError: whatever TensorFlow refuses on all of its devices, and strides or
            dilations that are no integers, which it would truncate.

    Source: https://www.tensorflow.org/api_docs/python/tf/nn/conv2d_transpose (TensorFlow 2.21).
    """
    data_format = "NHWC" if data_format is None else data_format
    if data_format not in ("NHWC", "NCHW"):
        raise ValueError(f"data_format must be 'NHWC' or 'NCHW', but got {data_format!r}")
    order = [data_format.index(letter) for letter in "NCHW"]
    _check_operands(input, filters)
    n, c_in, *size = (input.shape[i] for i in order)
    *kernel, depth, filters_in = filters.shape
    if filters_in != c_in:
        raise ValueError(
            f"filters must be [kH, kW, C_out, C_in] with the {c_in} channels of the input, "
            f"but got filters of shape {list(filters.shape)}"
        )
    stride = _spatial("strides", strides, order)
    dilation = _spatial("dilations", dilations, order)
    out = _output_size(output_shape, n, depth, order)
    c_out = out.pop(0)
    if c_out % depth or c_in % (c_out // depth):
        raise ValueError(
            f"the channels of output_shape, {c_out}, must be the third size of filters, {depth}, "
            f"times a number of groups that divides the {c_in} input channels"
        )

    sides, tail = [], []
    explicit = _explicit_padding(padding, order)
    for i in range(2):
        extent = dilation[i] * (kernel[i] - 1) + 1
        # What the scattered kernels cover beyond the output, before anything is cropped.
        excess = (size[i] - 1) * stride[i] + extent - out[i]
        begin, end = explicit[i] if explicit else (0, 0)
        if padding == "SAME":
            begin = max(excess, 0) // 2
            end = max(excess, 0) - begin
            expected = -(-out[i] // stride[i])
        else:
            expected = (out[i] + begin + end - extent) // stride[i] + 1
        if expected != size[i]:
            raise ValueError(
                f"output_shape with {out[i]} pixels in {'HW'[i]} belongs to an input of {expected} "
                f"for padding={padding!r} and strides={strides}, but the input has {size[i]}"
            )
        sides.append((begin, end))
        tail.append(begin + end - excess)

    x, w = input.permute(order), filters.permute(3, 2, 0, 1)
    if x.numel() and w.numel() and min(out):
        exact = x.dtype == torch.int32
        x, w = (x.long(), w.long()) if exact else (x, w)
        y = conv_transpose2d(x, w, None, stride, sides, tail, c_out // depth, dilation)
        y = y.int() if exact else y
    else:  # a sum of nothing, which is no operator to torch
        nothing = x[:0].sum(dtype=x.dtype) + w[:0].sum(dtype=x.dtype)
        y = nothing.expand(n, c_out, *out).contiguous(memory_format=torch.channels_last)
    return y.permute(["NCHW".index(letter) for letter in data_format])


def _check_operands(input: Tensor, filters: Tensor) -> None:
    for name, tensor in (("input", input), ("filters", filters)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, but got a {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, but got {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must have one of the dtypes {DTYPES}, but got {tensor.dtype}")
    if input.dtype != filters.dtype:
        raise TypeError(
            f"filters must have the dtype of input, {input.dtype}, but got {filters.dtype}"
        )
    if not all(filters.shape[:3]):
        raise ValueError(
            f"filters must have a size > 0 in dimensions 0 to 2, but got {list(filters.shape)}"
        )


def _integers(name: str, value: Any) -> list[int]:
    """A list of the ints in a number, a sequence or a tensor; whole floats are ints."""
    if isinstance(value, str):
        raise TypeError(f"{name} must be integers, but got {value!r}")
    values = value.tolist() if hasattr(value, "tolist") else value
    values = list(values) if isinstance(values, Sequence) else [values]
    try:
        return [
            int(v) if isinstance(v, float) and v.is_integer() else operator.index(v) for v in values
        ]
    except TypeError:
        raise TypeError(f"{name} must be integers, but got {value!r}") from None


def _spatial(name: str, value: Any, order: list[int]) -> list[int]:
    """(h, w) of what TensorFlow takes for strides or dilations."""
    values = [1] if value is None else _integers(name, value)
    if len(values) not in (1, 2, 4):
        raise ValueError(f"{name} must be of length 1, 2 or 4, but got {value!r}")
    if len(values) == 4:
        batch, channel, *values = (values[i] for i in order)
        if (batch, channel) != (1, 1):
            raise ValueError(f"{name} of batch and channels must be 1, but got {value!r}")
    if min(values) < 1:
        raise ValueError(f"{name} must be positive, but got {value!r}")
    return [values[0], values[-1]]


def _output_size(output_shape: Any, n: int, depth: int, order: list[int]) -> list[int]:
    """[C_out, OH, OW]."""
    shape = _integers("output_shape", output_shape)
    if isinstance(output_shape, Sequence) and any(isinstance(v, float) for v in output_shape):
        raise TypeError(f"output_shape must be integers, but got {output_shape!r}")
    if len(shape) not in (2, 4):
        raise ValueError(f"output_shape must have 2 or 4 elements, but got {output_shape!r}")
    batch, *size = [shape[i] for i in order] if len(shape) == 4 else [n, depth, *shape]
    if batch != n:
        raise ValueError(
            f"output_shape must have the batch size of the input, {n}, but got {output_shape!r}"
        )
    if size[0] < 1 or min(size) < 0:
        raise ValueError(
            f"output_shape must have channels and no negative size, but got {output_shape!r}"
        )
    return size


def _explicit_padding(padding: Any, order: list[int]) -> list[tuple[int, int]] | None:
    """((top, bottom), (left, right)), or None if the padding is named."""
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(
                f"padding must be 'SAME', 'VALID' or four pairs, but got padding={padding!r}"
            )
        return None
    if not isinstance(padding, (list, tuple)):
        raise TypeError(
            f"padding must be 'SAME', 'VALID' or four pairs, but got padding={padding!r}"
        )
    if len(padding) != 4 or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in padding):
        raise ValueError(f"explicit padding must be four pairs, but got padding={padding!r}")
    pairs = [tuple(_integers("padding", padding[i])) for i in order]
    if any(pair != (0, 0) for pair in pairs[:2]):
        raise ValueError(f"padding of batch and channels must be 0, but got padding={padding!r}")
    if any(side < 0 for pair in pairs for side in pair):
        raise ValueError(f"padding must not be negative, but got padding={padding!r}")
    return [(begin, end) for begin, end in pairs[2:]]


# --- Keras ---------------------------------------------------------------------------------------


def from_keras(
    layer: Any, weights: Sequence[Any] | None = None, *, without_activation: bool = False
) -> ConvTranspose2d | ConvTranspose1d:
    """Our module with the arguments and the weights of a Keras `Conv2DTranspose`.

    The module computes on channels first, [N, C, H, W], whatever the layer's data_format, which
    is about the layout of its tensors alone. Initializers, regularizers and constraints, which
    take part in training only, are left out. `Conv1DTranspose` gives a `ConvTranspose1d`.

    Args:
        layer: the layer, built; or its configuration, as from `layer.get_config()`.
        weights: with a configuration, [kernel] or [kernel, bias] as from `layer.get_weights()`:
            kernel [kH, kW, C_out, C_in], bias [C_out].
        without_activation: leave the layer's activation out, to be applied by the caller.

    Raises:
        ValueError: what our module cannot do: an activation, groups, an unbuilt layer, an
            output_padding whose output TensorFlow refuses.
    """
    if isinstance(layer, Mapping):
        config: Mapping[str, Any] = layer
        if weights is None:
            raise ValueError("weights must be given with a configuration, but got None")
    else:
        config, weights = layer.get_config(), layer.get_weights()
    use_bias = config.get("use_bias", True)
    if len(weights) != 1 + bool(use_bias):
        raise ValueError(
            f"weights must be the kernel{' and the bias' if use_bias else ''} of a built layer, "
            f"but got {len(weights)} arrays"
        )
    activation = config.get("activation")
    if activation not in (None, "linear") and not without_activation:
        raise ValueError(
            f"the layer has activation={activation!r}, which the module does not apply: convert "
            f"with without_activation=True and apply it to the module's output"
        )
    if config.get("groups", 1) != 1:
        raise ValueError(f"groups must be 1, but got groups={config['groups']}")

    kernel = torch.as_tensor(weights[0])
    dims = kernel.dim() - 2
    if dims not in (1, 2):
        raise ValueError(
            f"the kernel must be [kH, kW, C_out, C_in] or [k, C_out, C_in], "
            f"but got shape {list(kernel.shape)}"
        )
    *size, c_out, c_in = kernel.shape
    stride, dilation = (
        [config[name]] * dims if isinstance(config[name], int) else config[name]
        for name in ("strides", "dilation_rate")
    )
    padding, output_padding = _keras_padding(config, size, stride, dilation)
    cls: Any = ConvTranspose2d if dims == 2 else ConvTranspose1d
    module: ConvTranspose2d | ConvTranspose1d = cls(
        c_in,
        c_out,
        tuple(size),
        tuple(stride),
        padding,
        output_padding,
        bias=use_bias,
        dilation=tuple(dilation),
        dtype=kernel.dtype,
    )
    with torch.no_grad():
        module.weight.copy_(kernel.permute(-1, -2, *range(dims)))
        if module.bias is not None:
            module.bias.copy_(torch.as_tensor(weights[1]))
    return module


def _keras_padding(
    config: Mapping[str, Any], kernel: list[int], stride: Any, dilation: Any
) -> tuple[Any, Any]:
    """(padding, output_padding) of ours.

    Without output_padding, Keras has our meaning of "same" and "valid". With it the output size is
    `(size - 1) * stride + extent % 2 + output_padding` for "same", of which TensorFlow crops the
    excess as ever, and `(size - 1) * stride + extent + output_padding` for "valid".
    """
    name, extra = str(config["padding"]).lower(), config.get("output_padding")
    if extra is None:
        return name, 0
    extra = [extra] * len(kernel) if isinstance(extra, int) else extra
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if name == "valid":
        return 0, tuple(extra)
    if name != "same":
        raise ValueError(f"padding must be 'same' or 'valid', but got padding={name!r}")
    sides, tail = [], []
    for extent, s, o in zip(extents, stride, extra, strict=True):
        if not 1 <= extent % 2 + o <= s:
            raise ValueError(
                f"output_padding={o} with padding='same', strides={s} and a kernel over {extent} "
                f"pixels gives an output that TensorFlow refuses"
            )
        excess = extent - extent % 2 - o
        sides.append((max(excess, 0) // 2, max(excess, 0) - max(excess, 0) // 2))
        tail.append(max(-excess, 0))
    return tuple(sides), tuple(tail)
