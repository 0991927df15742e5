"""Problems to test and to time: one list for the test suite, the benchmarks and the self-test.

A `Case` is one transposed convolution without its numbers. Groups of them:

* `LAYERS`  layers of real networks (layers.csv beside this file);
* `TINY`    a sweep of small sizes, so that every tail of every tile is met;
* `EDGE`    problems that have broken implementations, each with its reason in `note`;
* `random_case(seed)`  any legal problem.
"""

from __future__ import annotations

import csv
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]
Sides = tuple[int, int, int, int]  # top, bottom, left, right

#: Ways in which `relayout` can arrange a tensor in memory.
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "negative", "conjugate")


class Operands(NamedTuple):
    """x [N, C_in, H, W], w [C_in, C_out/groups, kH, kW], bias [C_out], dy [N, C_out, OH, OW]."""

    x: Tensor
    w: Tensor
    bias: Tensor
    dy: Tensor


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and arguments of one 2-D transposed convolution, in elements; pairs are (h, w)."""

    name: str
    batch: int
    c_in: int
    c_out: int
    h: int
    w: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Sides = (0, 0, 0, 0)
    output_padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    note: str = ""  # why the case is in its list: the network it is from, or the mistake it finds
    kind: str = ""  # class of the problem, e.g. "depthwise"

    def __str__(self) -> str:
        return self.name

    @property
    def input_size(self) -> Pair:
        return self.h, self.w

    @property
    def output_size(self) -> Pair:
        """(OH, OW); negative where the padding crops more than there is."""
        oh, ow = (
            (size - 1) * s - before - after + d * (k - 1) + extra + 1
            for size, s, before, after, d, k, extra in zip(
                self.input_size,
                self.stride,
                self.padding[::2],
                self.padding[1::2],
                self.dilation,
                self.kernel,
                self.output_padding,
            )
        )
        return oh, ow

    @property
    def x_shape(self) -> Sides:
        return self.batch, self.c_in, self.h, self.w

    @property
    def w_shape(self) -> Sides:
        return self.c_in, self.c_out // self.groups, *self.kernel

    @property
    def y_shape(self) -> Sides:
        return self.batch, self.c_out, *self.output_size

    @property
    def geometry(self) -> tuple[Pair, Sides, Pair, Pair, int]:
        """(stride, padding, output_padding, dilation, groups), the order of the binary module."""
        return self.stride, self.padding, self.output_padding, self.dilation, self.groups

    @property
    def is_symmetric(self) -> bool:
        """Whether torch's operator can express the padding."""
        top, bottom, left, right = self.padding
        return top == bottom and left == right

    @property
    def torch_arguments(self) -> dict[str, Pair | int]:
        """Keyword arguments for `torch.nn.functional.conv_transpose2d`."""
        if not self.is_symmetric:
            raise ValueError(f"{self}: torch has no asymmetric padding, got {self.padding}")
        return {
            "stride": self.stride,
            "padding": self.padding[::2],
            "output_padding": self.output_padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    @property
    def macs(self) -> int:
        """Multiply-adds of `forward`, or of a gradient; taps that fall outside do not count."""
        pairs = 1
        for axis in (0, 1):
            reach = range(self.output_size[axis])
            shift = -self.padding[2 * axis]
            pairs *= sum(
                i * self.stride[axis] + k * self.dilation[axis] + shift in reach
                for i in range(self.input_size[axis])
                for k in range(self.kernel[axis])
            )
        return self.batch * self.c_in * (self.c_out // self.groups) * pairs

    def min_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that any implementation moves: x, w and y once each, in either direction."""
        elements = 0
        for shape in (self.x_shape, self.w_shape, self.y_shape):
            elements += shape[0] * shape[1] * shape[2] * shape[3]
        return elements * dtype.itemsize

    def reduced(self, macs: int) -> Case:
        """The same layer, batch and image halved until it costs at most `macs`; channels stay."""
        case = self
        while case.macs > macs and (case.batch, case.h, case.w) != (1, 1, 1):
            if case.batch > 2 or max(case.input_size) <= 3:
                case = dataclasses.replace(case, batch=(case.batch + 1) // 2)
            else:
                case = dataclasses.replace(case, h=(case.h + 1) // 2, w=(case.w + 1) // 2)
            if case.batch == 1 and max(case.input_size) <= 3:
                break
        return case

    def operands(
        self,
        seed: int,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        exact: bool = False,
    ) -> Operands:
        """Random tensors, the same for the same seed whatever the dtype and the layout.

        Normally distributed; with `exact`, integers from -16 to 16, so that every sum of fewer than
        2^16 products is exact in float32, and only the last rounding to `dtype` can change it.
        x, w and dy are arranged as `layout` says, see `LAYOUTS`.
        """
        generator = torch.Generator().manual_seed(seed)

        def fill(*shape: int) -> Tensor:
            parts = [
                torch.randint(-16, 17, shape, generator=generator, dtype=torch.float64)
                if exact
                else torch.randn(shape, generator=generator, dtype=torch.float64)
                for _ in range(1 + dtype.is_complex)
            ]
            return (torch.complex(*parts) if dtype.is_complex else parts[0]).to(dtype)

        x, w = fill(*self.x_shape), fill(*self.w_shape)
        bias, dy = fill(self.c_out), fill(*self.y_shape)
        return Operands(relayout(x, layout), relayout(w, layout), bias, relayout(dy, layout))


def make_case(
    name: str,
    shape: Sides,
    c_out: int,
    kernel: int | Pair,
    stride: int | Pair = 1,
    padding: int | Pair | Sides = 0,
    output_padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    note: str = "",
    kind: str = "",
) -> Case:
    """A `Case` from the shape of x and torch's abbreviations: an int stands for both axes."""

    def pair(value: int | Pair) -> Pair:
        return (value, value) if isinstance(value, int) else value

    if isinstance(padding, int) or len(padding) == 2:
        top, left = pair(padding)
        padding = top, top, left, left
    return Case(
        name,
        *(shape[0], shape[1], c_out, shape[2], shape[3]),
        pair(kernel),
        pair(stride),
        padding,
        pair(output_padding),
        pair(dilation),
        groups,
        note,
        kind,
    )


def relayout(tensor: Tensor, layout: str) -> Tensor:
    """A tensor of the same values whose memory is arranged as `layout` (one of `LAYOUTS`) says.

    "sliced" takes every other element of a larger buffer, so no stride is 1, and what lies between
    is NaN (or a large integer); "negative" and "conjugate" carry torch's lazy bits.
    """
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        # Not contiguous(), which leaves a single channel as it is: ambiguous.
        return torch.empty_like(tensor, memory_format=torch.channels_last).copy_(tensor)
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        gap = float("nan") if tensor.dtype.is_floating_point or tensor.dtype.is_complex else 1 << 40
        buffer = torch.full([2 * size + 1 for size in tensor.shape], gap, dtype=tensor.dtype)
        return buffer[(slice(1, None, 2),) * tensor.dim()].copy_(tensor)
    if layout == "negative":
        return torch._neg_view(tensor.neg())
    if layout == "conjugate":
        return torch.conj_physical(tensor).conj()
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def load_layers(batch: str = "cpu") -> tuple[Case, ...]:
    """The layers of layers.csv, with the batch that suits a "cpu" or a "gpu"."""

    def read(row: dict[str, str]) -> Case:
        number = {key: int(value) for key, value in row.items() if value.isdigit()}
        return make_case(
            row["name"],
            (number[f"batch_{batch}"], number["c_in"], number["h"], number["w"]),
            number["c_out"],
            number["kernel"],
            number["stride"],
            number["padding"],
            number["output_padding"],
            number["dilation"],
            number["groups"],
            note=row["model"],
            kind=row["class"],
        )

    with Path(__file__).with_name("layers.csv").open(newline="") as file:
        return tuple(map(read, csv.DictReader(file)))


LAYERS = load_layers()

# Every kind of index arithmetic: (kernel, stride, padding, output_padding, dilation).
_GEOMETRIES = (
    (1, 1, 0, 0, 1),
    (2, 2, 0, 0, 1),
    (3, 1, 1, 0, 1),
    (3, 2, 1, 1, 1),
    (4, 2, 1, 0, 1),
    (5, 3, 2, 1, 1),
    (2, 3, 0, 2, 1),
    (3, 2, 2, 1, 2),
    (3, 4, 1, 1, 3),
)


def _tiny() -> Iterator[Case]:
    """c_in, c_out, h and w in turn over all sizes that can be the tail of a tile."""

    def small(name: str, shape: Sides, c_out: int, index: int, groups: int = 1) -> Case:
        geometry = _GEOMETRIES[index % len(_GEOMETRIES)]
        return dataclasses.replace(make_case(name, shape, c_out, *geometry), groups=groups)

    sizes = (*range(1, 20), 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65)
    for axis, name in enumerate(("c_in", "c_out", "h", "w")):
        for i, size in enumerate(sizes):
            c_in, c_out, h, w = (size if j == axis else 2 + (i + j) % 4 for j in range(4))
            yield small(f"{name}={size}", (1 + i % 3, c_in, h, w), c_out, i + axis)
    for i, channels in enumerate((1, 2, 7, 8, 9, 16, 17, 33)):
        for multiplier in (1, 2, 3):
            name, shape = f"depthwise={channels}x{multiplier}", (2, channels, 3 + i, 9 - i)
            yield small(name, shape, channels * multiplier, i + multiplier, channels)


TINY = tuple(_tiny())

_EDGES: tuple[tuple[str, Any, int, str], ...] = (  # name, for make_case, groups, why
    ("k1_s2", ((2, 3, 4, 5), 4, 1, 2), 1, "three of four phases have no tap: bias alone"),
    ("k2_s5", ((1, 2, 3, 3), 3, 2, 5, 0, 4), 1, "kernel < stride, and a tail from output_padding"),
    ("k1_s3_pad", ((1, 2, 4, 4), 2, 1, 3, 1, 2), 1, "the first rows and columns have no tap"),
    (
        "pad_is_kernel",
        ((2, 3, 6, 6), 3, 3, 2, 3),
        1,
        "padding >= kernel: whole pixels cropped away",
    ),
    ("pad_beyond_kernel", ((1, 2, 9, 8), 2, 2, 2, 5), 1, "some input pixels reach no output"),
    ("one_output", ((2, 3, 3, 3), 4, 3, 1, 2), 1, "a single output pixel"),
    ("output_padding", ((1, 3, 4, 4), 2, 3, 3, 0, 2), 1, "rows beyond the last tap"),
    ("output_padding_dilation", ((1, 2, 3, 3), 2, 2, 1, 0, 3, 4), 1, "output_padding >= stride"),
    ("dilation", ((2, 3, 5, 5), 4, 3, 1, 2, 0, 2), 1, "dilation with stride 1"),
    ("dilation_2_stride_2", ((2, 3, 5, 4), 4, 3, 2, 2, 1, 2), 1, "odd phases have no tap"),
    ("dilation_2_stride_4", ((1, 3, 4, 5), 4, 5, 4, 3, 1, 2), 1, "gcd 2: half of the phases"),
    ("dilation_4_stride_2", ((1, 3, 5, 4), 4, 3, 2, 4, 1, 4), 1, "stride divides dilation"),
    ("dilation_6_stride_4", ((1, 2, 5, 5), 3, 4, 4, 5, 3, 6), 1, "gcd 2, neither divides"),
    ("dilation_3_stride_2", ((1, 2, 5, 5), 3, 4, 2, 1, 0, 3), 1, "coprime, phases in odd order"),
    ("one_pixel", ((2, 5, 1, 1), 3, 4, 1), 1, "1x1 input: kernel becomes the image"),
    ("one_pixel_dilated", ((1, 4, 1, 1), 1, 3, 1, 0, 1, 2), 1, "1x1 input, all of dy is halo"),
    ("one_column", ((1, 3, 7, 1), 4, (3, 5), (2, 3), (1, 2), (1, 0)), 1, "a width of 1"),
    ("one_row", ((1, 3, 1, 7), 4, (5, 3), (3, 2), (2, 1), (0, 1)), 1, "a height of 1"),
    ("odd_channels", ((3, 13, 5, 7), 11, 3, 2, 1, 1), 1, "no channel count fits a vector"),
    ("one_channel", ((2, 1, 6, 5), 1, 4, 2, 1), 1, "c_in = c_out = 1: NCHW is channels_last"),
    ("c_out_1", ((1, 56, 7, 9), 1, 9, 2, 4, 1), 1, "many inputs, one output"),
    ("c_in_1", ((2, 1, 7, 5), 19, 5, 2, 2), 1, "one input, many outputs"),
    ("groups_2", ((2, 6, 4, 5), 10, 3, 2, 1), 2, "different channels in and out"),
    ("groups_c_out_1", ((1, 6, 4, 4), 3, 4, 2, 1), 3, "one output channel in a group"),
    ("groups_wide", ((1, 40, 4, 4), 70, 3, 2, 1, 1), 2, "tails inside each group"),
    ("depthwise", ((2, 19, 6, 7), 19, 4, 2, 1), 19, "one channel in and out"),
    ("depthwise_8x8_s4", ((1, 6, 9, 8), 6, 8, 4, 2), 6, "a large depthwise kernel"),
    ("depthwise_multiplier", ((2, 5, 6, 5), 15, 3, 2, 1, 1), 5, "3 outputs a channel"),
    ("depthwise_dilated", ((2, 7, 6, 5), 7, 3, 2, 2, 1, 2), 7, "dilation, gcd 2"),
    ("depthwise_gaps", ((1, 8, 5, 6), 8, 2, 3, 0, 1), 8, "phases without taps"),
    ("batch_0", ((0, 3, 4, 5), 4, 3, 2, 1), 1, "nothing to do, but dw and db must be 0"),
    ("batch_many", ((17, 3, 2, 3), 4, 3, 2, 1), 1, "more samples than pixels"),
    (
        "rectangular",
        ((2, 3, 4, 7), 5, (2, 5), (3, 2), (1, 2), (2, 1), (2, 1)),
        1,
        "h and w swapped",
    ),
    ("asymmetric", ((2, 3, 5, 6), 4, 3, 2, (0, 1, 1, 0)), 1, "another crop on each side"),
    ("asymmetric_top", ((1, 3, 5, 5), 2, 4, 2, (3, 0, 0, 2), (1, 0)), 1, "crop on one side only"),
    ("asymmetric_groups", ((1, 4, 5, 5), 6, 5, 3, (4, 1, 0, 3)), 2, "with groups"),
    ("asymmetric_depthwise", ((2, 9, 5, 4), 9, 3, 2, (0, 1, 2, 0)), 9, "depthwise"),
    ("kernel_is_image", ((1, 3, 4, 4), 2, 16, 16), 1, "large stride: 256 phases of one tap"),
    ("large_kernel", ((1, 2, 3, 4), 3, 31, 7, 11, 5), 1, "many taps a phase, most in the halo"),
    ("long_row", ((1, 2, 1, 300), 3, (1, 4), (1, 2), (0, 1)), 1, "several tiles in a row"),
    ("long_reduction", ((1, 700, 3, 2), 5, 3, 2, 1, 1), 1, "several blocks of input channels"),
    ("many_outputs", ((1, 3, 2, 3), 530, 3, 2, 1, 1), 1, "several blocks of output channels"),
    ("many_pixels", ((2, 3, 40, 37), 2, 3, 2, 1, 1), 1, "dw is a sum over many pixels"),
    ("channels_32", ((2, 96, 7, 9), 64, 4, 2, 1), 1, "what matrix instructions multiply at a time"),
    ("channels_32_groups", ((1, 64, 5, 6), 128, 3, 2, 1, 1), 2, "the same in groups"),
    ("channels_32_few", ((1, 32, 9, 40), 3, 4, 2, 1), 1, "the same, for a few rows of all phases"),
)
EDGE = tuple(
    dataclasses.replace(make_case(name, *arguments), groups=groups, note=note)
    for name, arguments, groups, note in _EDGES
)


def random_case(seed: int) -> Case:
    """A small legal problem with at least one output, also of kinds that torch cannot express."""
    rng = random.Random(seed)

    def two(high: int, low: int = 1) -> Pair:
        return rng.randint(low, high), rng.randint(low, high)

    while True:
        groups = rng.choice((1, 1, 1, 2, 3, 4, 8))
        c_in, c_out = (groups * size for size in two(rng.choice((1, 3, 9, 20))))
        shape = rng.randint(1, 3), c_in, *two(rng.choice((2, 6, 12)))
        kernel, stride, dilation = two(5), two(4), two(rng.choice((1, 1, 4)))
        extra_h, extra_w = (rng.randrange(max(s, d)) for s, d in zip(stride, dilation))
        padding: Pair | Sides = two(3, 0)
        if rng.random() < 0.3:
            padding = (*two(3, 0), *two(3, 0))
        case = make_case(
            f"random_{seed}",
            shape,
            c_out,
            kernel,
            stride,
            padding,
            (extra_h, extra_w),
            dilation,
            groups,
        )
        if min(case.output_size) > 0:
            return case
