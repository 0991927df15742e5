"""Five ways to say what a transposed convolution computes, and what it is not.

They give the same numbers, shown for one small case:

1. zero insertion: stride - 1 zeros between the pixels of the input, kernel - 1 - padding around it,
   then an ordinary convolution with the kernel flipped;
2. matrix: the transpose of the matrix C of the convolution with the same arguments;
3. overlap-add: every input pixel adds a weighted copy of the kernel, patches `stride` apart;
4. phases: outputs with one remainder modulo the stride are an ordinary convolution with a part of
   the kernel; nothing is inserted and no zero is multiplied: what the kernels of this package do;
5. the operator itself.

`<output>/principle.png` draws them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import deconv_ext
from deconv_ext import phases

SIZE, KERNEL, STRIDE, PADDING = 3, 3, 2, 1
TOLERANCE = 1e-12


def zero_insertion(x: Tensor, w: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """(the output, the input with its zeros) for one channel; x [H, W], w [kH, kW]."""
    spread = x.new_zeros([(side - 1) * stride + 1 for side in x.shape])
    spread[::stride, ::stride] = x
    margin = w.shape[0] - 1 - padding
    spread = F.pad(spread, [margin] * 4)
    # torch's conv2d correlates, so that the flip is all that is left of "the kernel is flipped":
    # it belongs to this view, and to no other.
    return F.conv2d(spread[None, None], w.flip(0, 1)[None, None])[0, 0], spread


def convolution_matrix(w: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """C of the convolution [size, size] -> with kernel w: y.flatten() = C @ x.flatten()."""
    pixels = torch.eye(size * size, dtype=w.dtype).view(size * size, 1, size, size)
    return F.conv2d(pixels, w[None, None], stride=stride, padding=padding).flatten(1).T


def overlap_add(x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    """Every pixel of x [H, W] adds its copy of w [kH, kW]; the padding is cropped."""
    full = x.new_zeros([(n - 1) * stride + k for n, k in zip(x.shape, w.shape, strict=True)])
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            top, left = i * stride, j * stride
            full[top : top + w.shape[0], left : left + w.shape[1]] += x[i, j] * w
    return full[padding : full.shape[0] - padding, padding : full.shape[1] - padding]


def by_phases(x: Tensor, w: Tensor, stride: int) -> Tensor:
    """An ordinary convolution for each phase, interleaved; without padding, as `full` above."""
    full = x.new_zeros([(n - 1) * stride + k for n, k in zip(x.shape, w.shape, strict=True)])
    parts = phases.split(w, stride)  # [stride, stride, taps, taps]
    for r in range(stride):
        for c in range(stride):
            part = parts[r, c]
            target = full[r::stride, c::stride]
            whole = F.conv2d(
                F.pad(x, [part.shape[1] - 1] * 2 + [part.shape[0] - 1] * 2)[None, None],
                part.flip(0, 1)[None, None],
            )[0, 0]
            target += whole[: target.shape[0], : target.shape[1]]
    return full


def principle() -> dict[str, Any]:
    """The results of all five views, the matrix and the input with zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 10, (SIZE, SIZE), generator=generator).double()
    w = torch.randint(1, 10, (KERNEL, KERNEL), generator=generator).double()
    operator = deconv_ext.functional.conv_transpose2d(
        x[None, None], w[None, None], stride=STRIDE, padding=PADDING
    )[0, 0]
    inserted, spread = zero_insertion(x, w, STRIDE, PADDING)
    matrix = convolution_matrix(w, operator.shape[0], STRIDE, PADDING)
    full = by_phases(x, w, STRIDE)
    return {
        "x": x,
        "w": w,
        "spread": spread,
        "matrix": matrix,
        "views": {
            "zero insertion, flipped kernel": inserted,
            "transpose of the matrix": (matrix.T @ x.flatten()).view_as(operator),
            "overlap-add": overlap_add(x, w, STRIDE, PADDING),
            "phases": full[PADDING:-PADDING, PADDING:-PADDING],
            "deconv_ext": operator,
        },
    }


def statements() -> list[tuple[str, bool]]:
    """What is often told wrong, each with whether the check of it holds."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    w = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    y = F.conv2d(x, w, stride=2, padding=1)
    back = deconv_ext.functional.conv_transpose2d(y, w, None, 2, 1, output_padding=1)
    (gradient,) = torch.autograd.grad(
        F.conv2d(x.requires_grad_(), w, stride=2, padding=1), x, y, create_graph=False
    )
    try:
        deconv_ext.functional.conv_transpose2d(y, w, stride=0.5)
        refused = False
    except TypeError as error:
        refused = "a stride is an integer >= 1" in str(error)
    sizes = {
        extra: deconv_ext.functional.conv_transpose2d(y, w, None, 2, 1, extra).shape[-1]
        for extra in (0, 1)
    }
    plain = deconv_ext.functional.conv_transpose2d(y, w, None, 2, 1)
    same = deconv_ext.functional.conv_transpose2d(y, w, None, 2, "same")
    return [
        ("it is the gradient (transpose) of a convolution", bool(torch.allclose(back, gradient))),
        (
            "it is not its inverse: the shape comes back, the values do not",
            back.shape == x.shape and not torch.allclose(back, x, atol=0.1),
        ),
        ("stride is an integer >= 1; 0.5 is refused", refused),
        (
            "output_padding adds a row and a column at the end, no zeros among the values",
            sizes == {0: 5, 1: 6} and torch.equal(back[..., :5, :5], plain),
        ),
        (
            "TensorFlow's SAME makes size * stride: a 3x3 kernel is cropped at the end alone",
            same.shape[-1] == 3 * 2 and torch.allclose(same[..., 1:, 1:], plain),
        ),
    ]


def draw(found: dict[str, Any], path: Path) -> None:
    """Input, kernel, the input with zeros, the matrix and the output."""
    y = found["views"]["deconv_ext"]
    panels = [
        ("input x", found["x"]),
        ("kernel w", found["w"]),
        ("x with zeros, stride - 1 between,\nkernel - 1 - padding around", found["spread"]),
        ("output y (all five views)", y),
    ]
    figure = Figure(figsize=(15, 3.9), layout="constrained")
    axes = figure.subplots(1, 5, width_ratios=[1, 1, 1.3, 1.3, 2.2])
    for axis, (title, values) in zip(axes, panels, strict=False):
        axis.imshow(values, cmap="Blues", vmin=0, vmax=1.6 * float(values.max()))
        for (row, column), value in ((at, values[at]) for at in _places(values)):
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="column", ylabel="row")
        axis.set_xticks(range(values.shape[1]))
        axis.set_yticks(range(values.shape[0]))
    matrix = found["matrix"].T
    axes[4].imshow(matrix, cmap="Blues", aspect="auto", interpolation="nearest")
    axes[4].set_title("transposed matrix: y.flatten() = C.T @ x.flatten()", fontsize=10)
    axes[4].set(xlabel="pixel of x", ylabel="pixel of y")
    axes[4].set_xticks(range(matrix.shape[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def _places(values: Tensor) -> list[tuple[int, int]]:
    return [(row, column) for row in range(values.shape[0]) for column in range(values.shape[1])]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison and draw it; 0 if all views agree and every statement holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    options = parser.parse_args(argv)
    found = principle()
    want = found["views"]["deconv_ext"]
    right = True
    print(f"kernel {KERNEL}, stride {STRIDE}, padding {PADDING}; input {SIZE}x{SIZE}")
    for name, result in found["views"].items():
        difference = float((result - want).abs().max())
        right &= result.shape == want.shape and difference < TOLERANCE
        print(f"{name:32} {tuple(result.shape)}  largest difference {difference:.1e}")
    for text, holds in statements():
        right &= holds
        print(f"{'true ' if holds else 'FALSE'}  {text}")
    draw(found, options.output / "principle.png")
    print(f"wrote {options.output / 'principle.png'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
