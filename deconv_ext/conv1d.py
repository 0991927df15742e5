"""`conv_transpose1d` with the signature of torch's: the 2-D operator on images of height 1."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import functional


def conv_transpose1d(
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
    """The transposed convolution, as `torch.nn.functional.conv_transpose1d` defines it.

    Args:
        input: [N, C_in, L] or unbatched [C_in, L].
        weight: [C_in, C_out/groups, K].
        bias: [C_out] or None.
        stride, output_padding, dilation: an int, or a sequence of one.
        padding: also ((left, right),), or "same" or "valid" as `functional.conv_transpose2d`
            has them.
        groups: number of independent blocks of channels.
        activation, negative_slope: as `functional.conv_transpose2d` has them.

    Returns:
        [N, C_out, OL], without N if the input has none, where
        `OL = (L - 1) * stride - left - right + dilation * (K - 1) + output_padding + 1`.

    Raises:
        TypeError, ValueError, RuntimeError: as `functional.conv_transpose2d`.
    """
    for name, tensor, dims in (("input", input, (2, 3)), ("weight", weight, (3,))):
        if isinstance(tensor, Tensor) and tensor.dim() not in dims:
            expected = "2D (unbatched) or 3D (batched)" if name == "input" else "3D"
            raise RuntimeError(
                f"Expected {expected} {name} to conv_transpose1d, "
                f"but got {name} of size: {list(tensor.shape)}"
            )
    x, w = (t.unsqueeze(-2) if isinstance(t, Tensor) else t for t in (input, weight))
    arguments = plane(stride, padding, output_padding, dilation)
    stride, padding, output_padding, dilation = arguments
    try:
        y = functional.conv_transpose2d(
            x,
            w,
            bias,
            stride,
            padding,
            output_padding,
            groups,
            dilation,
            activation=activation,
            negative_slope=negative_slope,
        )
    except (TypeError, ValueError) as error:
        raise _renamed(error) from None
    return y.squeeze(-2)


def plane(stride: Any, padding: Any, output_padding: Any, dilation: Any) -> tuple[Any, ...]:
    """The same arguments, in this order, for the 2-D operator on images of height 1."""
    if functional.is_two_sided(padding):
        if len(padding) != 1 or len(padding[0]) != 2:
            raise RuntimeError(
                f"expected padding to be an int or ((left, right),), but got padding={padding}"
            )
        padding = (0, 0), padding[0]
    elif not isinstance(padding, str):
        padding = 0, single("padding", padding)
    return (
        (1, single("stride", stride)),
        padding,
        (0, single("output_padding", output_padding)),
        (1, single("dilation", dilation)),
    )


def single(name: str, value: Any) -> int:
    """The int, also of a sequence of one, by torch's rules and with its errors."""
    if isinstance(value, (tuple, list)) and len(value) != 1:
        raise RuntimeError(
            f"expected {name} to be a single integer value or a list of 1 values to match "
            f"the convolution dimensions, but got {name}={list(value)}"
        )
    try:
        return functional.pair(name, value)[0]
    except (TypeError, ValueError) as error:
        raise _renamed(error) from None


def _renamed(error: Exception) -> Exception:
    """The error of the 2-D operator, with the name of this one."""
    return type(error)(str(error).replace("conv_transpose2d", "conv_transpose1d"))
