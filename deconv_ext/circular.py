"""`padding_mode="circular"`: a transposed convolution of periodic signals.

On each axis, with a period of `size * stride` outputs,

    y[(i*stride + k*dilation - pad_begin) mod (size*stride)]  +=  x[i] * w[k]

which is the adjoint (the gradient) of the convolution of y with circular padding, as `nn.Conv2d`
has it, and commutes with shifts: x rolled by one is y rolled by `stride`. torch has no such mode
for transposed convolutions and raises ValueError.

Equivalently x repeats with period `size` for ever and one period of the output is looked at, so
the input is extended by the few pixels that reach into that period, and the padding crops more.
To wrap the margins of the whole output around would give the same; but the input is `stride` times
smaller on each axis, so extending it copies less, and every output stays one sum in one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """The arguments of a transposed convolution along one axis."""

    extent: int  # pixels that the kernel spans: dilation * (kernel - 1) + 1
    stride: int
    begin: int
    end: int
    output_padding: int

    @property
    def surplus(self) -> int:
        """How far the output size is from `size * stride`."""
        return self.extent - self.stride - self.begin - self.end + self.output_padding


def extend(input: Tensor, axes: Sequence[Axis]) -> tuple[Tensor, list[tuple[int, int]], list[int]]:
    """The input, padding and output_padding of the zero-padded operation with the same result.

    Args:
        input: its last dimensions are those of `axes`.

    Raises:
        ValueError: an output that is not `size * stride`: it could not be one period.
    """
    padding, output_padding = [], []
    for dim, axis in enumerate(axes, start=-len(axes)):
        if axis.surplus:
            raise ValueError(
                f"padding_mode='circular' needs an output of size * stride, here that "
                f"padding (begin + end) - output_padding is {axis.extent - axis.stride}, "
                f"but got padding=({axis.begin}, {axis.end}) and "
                f"output_padding={axis.output_padding} in dimension {dim}"
            )
        # Input i reaches the outputs i * stride - begin + {0, ..., extent - 1}.
        before = max((axis.extent - 1 - axis.begin) // axis.stride, 0)
        after = -(-axis.begin // axis.stride)
        input = _wrap(input, dim, before, after)
        end = axis.extent + (after - 1) * axis.stride - axis.begin
        padding.append((axis.begin + before * axis.stride, max(end, 0)))
        output_padding.append(max(-end, 0))
    return input, padding, output_padding


def _wrap(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """x with its last `before` and first `after` elements repeated around it, however many."""
    size = x.shape[dim]
    if size == 0 or before == after == 0:
        return x
    (whole, part), (more, rest) = divmod(before, size), divmod(after, size)
    middle = [x] * (whole + 1 + more)
    return torch.cat([x.narrow(dim, size - part, part), *middle, x.narrow(dim, 0, rest)], dim)
