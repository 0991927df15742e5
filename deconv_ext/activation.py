"""The activations that `conv_transpose2d` can apply in the store of its kernel.

The names, torch's functions of the same meaning, and their derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten

#: torch's function for each name, of a tensor and the slope (which "leaky_relu" alone uses).
FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, slope: F.relu(z),
    "leaky_relu": lambda z, slope: F.leaky_relu(z, slope),
    "silu": lambda z, slope: F.silu(z),
    "gelu": lambda z, slope: F.gelu(z),
    "tanh": lambda z, slope: torch.tanh(z),
    "sigmoid": lambda z, slope: torch.sigmoid(z),
}


def check(activation: Any, negative_slope: Any) -> None:
    """Raises what a wrong `activation` or `negative_slope` deserves; None is no activation."""
    if activation is not None and not isinstance(activation, str):
        raise TypeError(
            f"conv_transpose2d(): argument 'activation' must be str or None, "
            f"not {type(activation).__name__} (activation={activation!r})"
        )
    if activation is not None and activation not in FUNCTIONS:
        raise ValueError(
            f"activation must be None or one of {', '.join(map(repr, FUNCTIONS))}, "
            f"but got activation={activation!r}"
        )
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, (int, float)):
        raise TypeError(
            f"conv_transpose2d(): argument 'negative_slope' must be float, "
            f"not {type(negative_slope).__name__} (negative_slope={negative_slope!r})"
        )


def check_dtype(activation: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise NotImplementedError(
            f"activation={activation!r} needs a floating point dtype, but got input of type {dtype}"
        )


def is_known_by_output(activation: str, negative_slope: float) -> bool:
    """Whether the derivative can be told from the output alone, which is kept anyway."""
    if activation == "leaky_relu":
        return negative_slope >= 0
    return activation in ("relu", "tanh", "sigmoid")


def gradient(activation: str, negative_slope: float, dy: Tensor, value: Tensor) -> Tensor:
    """dy times the derivative; `value` is the output if `is_known_by_output`, else the input.

    By torch's own operators, which know their derivatives in turn.
    """
    result: Tensor
    if activation == "relu":
        result = _aten.threshold_backward(dy, value, 0)
    elif activation == "leaky_relu":
        result = _aten.leaky_relu_backward(dy, value, negative_slope, negative_slope >= 0)
    elif activation == "tanh":
        result = _aten.tanh_backward(dy, value)
    elif activation == "sigmoid":
        result = _aten.sigmoid_backward(dy, value)
    elif activation == "silu":
        result = _aten.silu_backward(dy, value)
    else:
        result = _aten.gelu_backward(dy, value)
    return result
