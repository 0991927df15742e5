"""The same bits from run to run, for any number of threads, and for a sample whatever the batch."""

import pytest
import torch

from deconv_ext.testing import LAYERS, Case, Operands, make_case
from support import (
    FLOATS,
    OPERATIONS,
    C,
    assert_same_bits,
    each_dtype,
    implementations,
    run,
    run_if_accepted,
    use_isa,
    use_threads,
)

#: The layer of a report that two identical forward calls differ.
REPORTED = make_case("compression_192", (1, 192, 19, 27), 192, 5, 2)
CASES = (
    make_case("k4_s2", (5, 20, 9, 11), 23, 4, 2, 1),
    make_case("k2_s2", (3, 33, 8, 9), 17, 2, 2),
    make_case("k3_s2_op", (4, 19, 13, 10), 40, 3, 2, 1, 1),
    make_case("k3_s1", (3, 9, 15, 14), 9, 3, 1, 1),
    make_case("groups", (3, 24, 9, 8), 36, 4, 2, 1, groups=4),
    make_case("depthwise", (5, 19, 14, 13), 19, 4, 2, 1, groups=19),
    make_case("few_outputs", (3, 30, 17, 19), 1, 9, 2, 4, 1),
    make_case("one_pixel", (6, 40, 1, 1), 30, 4),
    make_case("four_terms", (5, 64, 13, 17), 1, 2, 2),
    make_case("large_kernel", (3, 20, 6, 7), 5, 16, 8, 4),
    make_case("many_pixels", (2, 3, 61, 59), 2, 3, 2, 1, 1),
)
LAYOUTS = ("contiguous", "channels_last")


def sample(t: Operands, index: int) -> Operands:
    """One sample of the batch, where it lies."""
    return t._replace(x=t.x[index : index + 1], dy=t.dy[index : index + 1])


@each_dtype(*FLOATS, torch.complex64)
@pytest.mark.parametrize("layout", LAYOUTS)
@implementations(best_isa=True)  # threads are not its business
def test_runs_and_threads(
    op: str, algo: str, isa: str, layout: str, dtype: torch.dtype, seed: int
) -> None:
    with use_isa(isa):
        for case in CASES:
            t = case.operands(seed, dtype, layout)
            want = run_if_accepted(op, case, t, algo)
            if want is None:
                continue
            for threads in (1, 2, 3, 4, 5):
                with use_threads(threads):
                    assert_same_bits(run(op, case, t, algo), want, (case, threads))


@each_dtype(*FLOATS, torch.complex64)
@pytest.mark.parametrize("layout", LAYOUTS)
@implementations("forward", "grad_input")
def test_a_sample_alone_and_in_a_batch(
    op: str, algo: str, isa: str, layout: str, dtype: torch.dtype, seed: int
) -> None:
    with use_isa(isa):
        for case in CASES:
            t = case.operands(seed, dtype, layout)
            batch = run_if_accepted(op, case, t, algo)
            if batch is None:
                continue
            for index in range(case.batch):
                alone = run(op, case, sample(t, index), algo)
                assert_same_bits(alone, batch[index : index + 1], (case, index))
            same = t._replace(
                x=t.x.expand_as(t.x), dy=t.dy.clone(memory_format=torch.preserve_format)
            )
            assert_same_bits(run(op, case, same, algo), batch, case)


@each_dtype(*FLOATS, torch.complex64)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ("forward", "grad_input"))
def test_the_choice_of_algorithm_does_not_depend_on_the_batch(
    op: str, layout: str, dtype: torch.dtype, seed: int
) -> None:
    layers = [layer.reduced(2_000_000) for layer in LAYERS]
    for case in (*CASES, *layers):
        t = case.operands(seed, dtype, layout)
        batch = run(op, case, t)
        for index in {0, case.batch - 1}:
            with use_threads(1 + index % 3):
                alone = run(op, case, sample(t, index))
            assert_same_bits(alone, batch[index : index + 1], (case, index))


@pytest.mark.parametrize("op", OPERATIONS)
def test_reported_layer(op: str, seed: int) -> None:
    """192 -> 192 channels, 5x5, stride 2 on 19x27: twenty calls, threads changing, one result."""
    t = REPORTED.operands(seed)
    want = run(op, REPORTED, t)
    for call in range(20):
        with use_threads(1 + call % 5):
            assert_same_bits(run(op, REPORTED, t), want, call)


@each_dtype(*FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_bias(layout: str, dtype: torch.dtype, seed: int) -> None:
    for case in CASES:
        dy = case.operands(seed, dtype, layout).dy
        want = C.grad_bias(dy)
        for threads in (1, 2, 3, 4, 5):
            with use_threads(threads):
                assert_same_bits(C.grad_bias(dy), want, (case, threads))


def test_a_difference_in_the_last_bit_is_seen() -> None:
    want = torch.randn(3, 4, dtype=torch.bfloat16)
    for changed in (want.clone(), -0.0 * want):
        changed.view(torch.int16)[1, 2] ^= 1
        with pytest.raises(AssertionError):
            assert_same_bits(changed, want, "planted")


def test_case_names_are_unique() -> None:
    names = [case.name for case in CASES if isinstance(case, Case)]
    assert len(set(names)) == len(CASES)
