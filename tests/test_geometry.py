"""The tap table and the output size, against counting: the index equations live in one place."""

import itertools
import random
from typing import NamedTuple

import pytest

from support import C


class Axis(NamedTuple):
    size: int
    kernel: int
    stride: int
    dilation: int
    pad_begin: int
    pad_end: int
    output_padding: int

    @property
    def out(self) -> int:
        """Counted: the length of the scattered signal, cropped."""
        last = max(
            i * self.stride + k * self.dilation
            for i in range(self.size)
            for k in range(self.kernel)
        )
        return last + 1 + self.output_padding - self.pad_begin - self.pad_end

    def pairs(self) -> set[tuple[int, int, int]]:
        """All (output, input, tap) of the definition."""
        scattered = (
            (i * self.stride + k * self.dilation - self.pad_begin, i, k)
            for i in range(self.size)
            for k in range(self.kernel)
        )
        return {pair for pair in scattered if 0 <= pair[0] < self.out}


def table_pairs(axis: Axis, table: dict) -> list[tuple[int, int, int]]:
    """All (output, input, tap) that a kernel working through the table sums."""
    return [
        (output, output // axis.stride + offset, k)
        for output in range(max(table["out"], 0))
        for k, offset in table["phases"][output % axis.stride]
        if 0 <= output // axis.stride + offset < axis.size
    ]


def check(axis: Axis) -> None:
    table = C.tap_table(*axis)
    pairs = table_pairs(axis, table)
    assert table["out"] == axis.out, axis
    assert len(table["phases"]) == axis.stride, axis
    assert len(pairs) == len(set(pairs)), f"{axis}: a product is counted twice"
    assert set(pairs) == axis.pairs(), axis


def test_small_arguments_exhaustively() -> None:
    ranges = range(1, 5), range(1, 5), range(1, 5), range(1, 5), range(3), range(3), range(3)
    count = 0
    for axis in itertools.starmap(Axis, itertools.product(*ranges)):
        check(axis)
        count += 1
    assert count == 4**4 * 3**3


@pytest.mark.parametrize("block", range(4))
def test_random_arguments(block: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(2000):
        stride, dilation = rng.randint(1, 12), rng.randint(1, 12)
        check(
            Axis(
                size=rng.randint(1, 9),
                kernel=rng.randint(1, 9),
                stride=stride,
                dilation=dilation,
                pad_begin=rng.randint(0, 20),
                pad_end=rng.randint(0, 20),
                output_padding=rng.randrange(max(stride, dilation)),
            )
        )


def test_the_random_arguments_meet_every_kind_of_trouble(seed: int) -> None:
    """Kernel < stride, gcd > 1, phases without taps, asymmetric padding, empty results: by name."""
    for axis, empty_phases in (
        (Axis(4, 2, 5, 1, 0, 0, 0), {2, 3, 4}),
        (Axis(4, 3, 2, 2, 0, 0, 1), {1}),
        (Axis(4, 3, 2, 2, 1, 0, 1), {0}),
        (Axis(3, 3, 6, 4, 1, 2, 5), {0, 2, 4}),
        (Axis(3, 1, 1, 7, 0, 0, 6), set()),
    ):
        check(axis)
        phases = C.tap_table(*axis)["phases"]
        assert {r for r, taps in enumerate(phases) if not taps} == empty_phases, axis
    for axis in (Axis(2, 2, 2, 1, 2, 2, 0), Axis(1, 3, 1, 1, 4, 9, 0)):
        check(axis)
        assert axis.out <= 0 and not table_pairs(axis, C.tap_table(*axis))


def test_far_from_the_origin() -> None:
    """Sizes of 2^40 do not overflow, where 32-bit arithmetic would."""
    size, stride = 1 << 40, 3
    table = C.tap_table(size, 4, stride, 1, 1, 1, 0)
    assert table["out"] == (size - 1) * stride - 2 + 3 + 1
    # o = 3j + r reads i = j + offset through k = r + 1 - 3*offset.
    want = [{(1, 0)}, {(2, 0)}, {(0, 1), (3, 0)}]
    assert [set(map(tuple, taps)) for taps in table["phases"]] == want


def test_output_size_of_both_axes(seed: int) -> None:
    rng = random.Random(seed)
    counted = 0
    while counted < 2000:
        size, kernel, stride, dilation, extra, pads = (
            tuple(rng.randint(low, high) for _ in range(count))
            for low, high, count in (
                (1, 9, 2),
                (1, 9, 2),
                (1, 9, 2),
                (1, 9, 2),
                (0, 8, 2),
                (0, 20, 4),
            )
        )
        axes = [
            Axis(*row) for row in zip(size, kernel, stride, dilation, pads[::2], pads[1::2], extra)
        ]
        if all(axis.out > 0 and axis.output_padding < max(axis[2:4]) for axis in axes):
            want = tuple(axis.out for axis in axes)
            assert tuple(C.output_size(size, kernel, stride, pads, extra, dilation)) == want, axes
            counted += 1
