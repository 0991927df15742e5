"""NaN and infinities come out where the definition has them, and nowhere else.

Kernels that pad with zeros, multiply whole vectors or sum lanes that do not exist invent NaN out of
`0 * inf`, or spread one over its neighbours; and a NaN that should come out must not be lost.
"""

import itertools

import pytest
import torch

from deconv_ext.testing import EDGE, Case, Operands, make_case
from support import (
    FLOATS,
    OPERATIONS,
    C,
    define,
    each_dtype,
    implementations,
    run_if_accepted,
    use_isa,
)

CASES = (
    make_case("k4_s2", (2, 5, 6, 7), 9, 4, 2, 1),
    make_case("k3_s1", (1, 3, 5, 18), 17, 3, 1, 1),
    make_case("k2_s2", (2, 4, 4, 5), 5, 2, 2),
    make_case("k3_s2_op", (1, 18, 5, 4), 3, 3, 2, 1, 1),
    make_case("depthwise", (2, 11, 6, 5), 11, 4, 2, 1, groups=11),
    *(
        case
        for case in EDGE
        if case.name
        in ("k2_s5", "pad_is_kernel", "dilation_2_stride_2", "groups_wide", "one_pixel")
        or case.name in ("asymmetric_groups", "depthwise_gaps", "rectangular", "one_pixel_dilated")
    ),
)
VALUES = (float("nan"), float("inf"), float("-inf"))


def places(t: torch.Tensor) -> list[tuple[int, ...]]:
    """Corners of the tensor, an element of a border and one of the interior."""
    ends = [(0, size - 1) for size in t.shape]
    middle = tuple(size // 2 for size in t.shape)
    corners = list(itertools.product(*ends[-2:]))
    return [
        *((0, 0, *corner) for corner in corners),
        tuple(size - 1 for size in t.shape),
        (*middle[:-1], 0),
        (*middle[:-2], t.shape[-2] - 1, middle[-1]),
        middle,
    ]


def kinds(t: torch.Tensor) -> torch.Tensor:
    """0 finite, 1 NaN, 2 and 3 the infinities."""
    return t.isnan() + 2 * t.isposinf() + 3 * t.isneginf()


def poisoned(t: Operands, name: str) -> list[tuple[str, Operands]]:
    """The operands with one element of one of them replaced, and with all of them replaced."""
    clean = getattr(t, name)
    spots = [(slice(None),), *(places(clean) if clean.dim() == 4 else [(0,), (clean.numel() - 1,)])]
    changed = []
    for spot, value in itertools.product(spots, VALUES):
        tensor = clean.clone()
        tensor[spot] = value
        changed.append((f"{value} at {spot} of {name}", t._replace(**{name: tensor})))
    return changed


def check(op: str, case: Case, t: Operands, algo: str, what: object) -> bool:
    got = run_if_accepted(op, case, t, algo)
    if got is not None:
        want = kinds(define(op, case, t))
        wrong = kinds(got) != want
        assert not wrong.any(), (
            f"{what}: {int(wrong.sum())} of {wrong.numel()}, first at {wrong.nonzero()[0].tolist()}"
        )
    return got is not None


@each_dtype(torch.float32, torch.bfloat16)
@implementations()
def test_one_value(op: str, algo: str, isa: str, dtype: torch.dtype, seed: int) -> None:
    operands = {
        "forward": ("x", "w", "bias"),
        "grad_input": ("dy", "w"),
        "grad_weight": ("x", "dy"),
    }
    checked = 0
    with use_isa(isa):
        for index, case in enumerate(CASES):
            t = case.operands(
                seed % 1000 + index, dtype, ("channels_last", "contiguous")[index % 2]
            )
            for name in operands[op]:
                for what, changed in poisoned(t, name)[index % 3 :: 3]:
                    checked += check(op, case, changed, algo, (case, what))
    assert checked > 10


@each_dtype(*FLOATS)
@implementations()
def test_many_values(op: str, algo: str, isa: str, dtype: torch.dtype, seed: int) -> None:
    """Both infinities and NaN, strewn over all operands at once."""
    with use_isa(isa):
        for index, case in enumerate(CASES):
            layout = ("channels_last", "contiguous")[index % 2]
            t = case.operands(seed % 1000 + index, dtype, layout)
            for tensor, value in itertools.product(t, VALUES):
                places = torch.randint(tensor.numel(), (1 + tensor.numel() // 40,))
                tensor[torch.unravel_index(places, tensor.shape)] = value
            check(op, case, t, algo, case)


@pytest.mark.parametrize("value", VALUES)
def test_grad_bias(value: float) -> None:
    for place in places(dy := torch.randn(2, 5, 4, 19)):
        changed = dy.clone()
        changed[place] = value
        want = torch.zeros(5)
        want[place[1]] = value
        assert torch.equal(kinds(C.grad_bias(changed)), kinds(want)), place


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_definition_invents_nothing(op: str) -> None:
    """An infinite weight with a finite x: its outputs are infinite, none is NaN."""
    case = CASES[0]
    t = case.operands(3, torch.float64)
    t.w[0, 0, 0, 0] = t.x[0, 0, 0, 0] = float("inf")
    t.x[0, 0, 0, 0] = 1 if op != "grad_weight" else float("inf")
    found = kinds(define(op, case, t))
    assert not (found == 1).any() and (found > 1).any()
