"""The definition of transposed convolution, for comparison: NumPy, nothing of the extension.

    y[n, co, i*stride + k*dilation - pad] += x[n, ci, i] * w[ci, co, k]        (on both axes)

Sums are taken in the dtype of the operands: give longdouble, complex128 or int64 for a reference.
Pairs (i, k) whose output does not exist contribute nothing, not even NaN to a zero.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from deconv_ext.testing import Case

Array = NDArray[np.generic]
Slices = tuple[slice, slice]


def _axis(size: int, out: int, tap: int, stride: int, dilation: int, pad: int) -> Slices:
    """The inputs i, and their outputs i*stride + tap*dilation - pad, for which both exist."""
    inputs = [i for i in range(size) if 0 <= i * stride + tap * dilation - pad < out]
    if not inputs:
        return slice(0), slice(0)
    first, last = (i * stride + tap * dilation - pad for i in (inputs[0], inputs[-1]))
    return slice(inputs[0], inputs[-1] + 1), slice(first, last + 1, stride)


def _taps(case: Case) -> Iterator[tuple[Slices, Slices, Slices]]:
    """For each tap of the kernel: the tap, the inputs it reads and the outputs it adds to."""
    rows, columns = (
        [_axis(size, out, tap, stride, dilation, pad) for tap in range(kernel)]
        for size, out, kernel, stride, dilation, pad in zip(
            case.input_size,
            case.output_size,
            case.kernel,
            case.stride,
            case.dilation,
            case.padding[::2],
        )
    )
    for kh, (row, out_row) in enumerate(rows):
        for kw, (column, out_column) in enumerate(columns):
            yield (slice(kh, kh + 1), slice(kw, kw + 1)), (row, column), (out_row, out_column)


def _grouped(case: Case, x: Array, w: Array, y: Array) -> tuple[Array, Array, Array]:
    """With an axis for the groups: x [N, G, C, H, W], w [G, C, D, kH, kW], y [N, G, D, OH, OW]."""
    channels = case.c_in // case.groups, case.c_out // case.groups
    return (
        x.reshape(case.batch, case.groups, channels[0], *case.input_size),
        w.reshape(case.groups, *channels, *case.kernel),
        y.reshape(case.batch, case.groups, channels[1], *case.output_size),
    )


def forward(case: Case, x: Array, w: Array, bias: Array | None) -> Array:
    """y [N, C_out, OH, OW]."""
    y = np.zeros(case.y_shape, x.dtype)
    xg, wg, yg = _grouped(case, x, w, y)
    for tap, pixels, outputs in _taps(case):
        yg[(..., *outputs)] += np.einsum("ngchw,gcdkl->ngdhw", xg[(..., *pixels)], wg[(..., *tap)])
    return y if bias is None else y + bias.reshape(-1, 1, 1)


def grad_input(case: Case, dy: Array, w: Array) -> Array:
    """dx [N, C_in, H, W]: the sum of dy * w over the outputs that each x takes part in."""
    dx = np.zeros(case.x_shape, dy.dtype)
    xg, wg, yg = _grouped(case, dx, w, dy)
    for tap, pixels, outputs in _taps(case):
        xg[(..., *pixels)] += np.einsum("ngdhw,gcdkl->ngchw", yg[(..., *outputs)], wg[(..., *tap)])
    return dx


def grad_weight(case: Case, x: Array, dy: Array) -> Array:
    """dw [C_in, C_out/groups, kH, kW]: the sum of x * dy over the pixels that each tap connects."""
    dw = np.zeros(case.w_shape, x.dtype)
    xg, wg, yg = _grouped(case, x, dw, dy)
    for tap, pixels, outputs in _taps(case):
        product = np.einsum("ngchw,ngdhw->gcd", xg[(..., *pixels)], yg[(..., *outputs)])
        wg[(..., *tap)] = product[..., None, None]
    return dw
