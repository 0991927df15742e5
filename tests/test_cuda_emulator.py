"""The emulator of CUDA (cuda_on_cpu/) finds the mistakes it is there for, and no others.

Each planted kernel exists with its mistake and without; what a warp does together is compared with
plain matrix products.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from deconv_ext.testing import Operands, make_case
from emulator import HERE, Emulator, KernelError, build

PLANTED = HERE / "planted"
SEEDS = range(5)


@pytest.fixture(scope="module")
def machine() -> Emulator:
    return Emulator(build((*sorted(PLANTED.glob("*.cu")), *sorted(PLANTED.glob("*.cpp")))))


def call(machine: Emulator, kernel: str, x: Tensor, w: Tensor, y_size: tuple[int, int]) -> Tensor:
    """What the kernel makes of two matrices: a matrix."""
    case = make_case("planted", (1, 1, *y_size), 1, 1)
    x, w = (t.reshape(1, 1, *t.shape) for t in (x, w))
    t = Operands(x, w, torch.empty(0, dtype=w.dtype), torch.empty(0))
    return machine.run("forward", case, t, kernel, bias=False)[0, 0]


MISTAKES: dict[str, str] = {
    "missing_barrier": r"race: reads byte \d+ of shared memory, which thread \d+ has written|"
    r"reads byte \d+ of shared memory, which is uninitialised",
    "missing_second_barrier": r"race: writes byte \d+ of shared memory, which thread \d+ has read|"
    r"race: reads byte \d+ of shared memory, which thread \d+ has written",
    "missing_warp_barrier": r"race: reads|uninitialised",
    "out_of_bounds_store": r"out of bounds: writes 4 bytes at byte 512 of y, which has 512",
    "out_of_bounds_load": r"out of bounds: reads 4 bytes at byte -4 of x",
    "out_of_bounds_shared": r"out of bounds: writes 4 bytes 256 bytes into the 256 bytes of shared",
    "misaligned_vector": r"misaligned: reads 16 bytes at byte \d+ of x",
    "misaligned_element": r"misaligned: reads 4 bytes at byte \d+ of x",
    "early_read": r"reads byte \d+ of shared memory, whose asynchronous copy is in flight",
    "wait_for_too_few": r"reads byte \d+ of shared memory, whose asynchronous copy is in flight",
    "copy_without_barrier": r"race: reads|in flight|uninitialised",
    "copy_never_awaited": r"ends with asynchronous copies in flight",
    "misaligned_copy": r"misaligned: copies 16 bytes",
    "uninitialised_shared": r"reads byte 28 of shared memory, which is uninitialised",
    "uninitialised_output": r"reads byte \d+ of y, which is uninitialised",
    "divergent_barrier": r"waits at a barrier, but other threads have ended",
    "two_barriers": r"waits at a barrier, but other threads wait at another one",
    "return_before_barrier": r"waits at a barrier, but other threads have ended",
    "divergent_shuffle": r"waits at a collective that other lanes of its warp or warpgroup do",
    "partial_mask": r"the mask of a collective is 65535, not full",
    "two_blocks_write_one_address": r"race: writes byte 20 of y, which block \d, thread \d+ has",
    "two_threads_write_one_address": r"race: writes byte \d+ of y, which block \d, thread \d+ has",
    "read_of_another_block": r"race: reads byte \d+ of y, which block|uninitialised",
    "write_to_input": r"writes to x, an input",
}


@pytest.mark.parametrize("seed", SEEDS, ids="seed_{}".format)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_finds(machine: Emulator, mistake: str, seed: int) -> None:
    """In any order of threads, and says where."""
    machine.seed(seed)
    x = torch.randn(1, 128)
    with pytest.raises(KernelError, match=MISTAKES[mistake]) as caught:
        call(machine, mistake, x, x, (1, 128))
    assert re.search(rf"planted: block \d+, thread \d+: .*, seed {seed}", str(caught.value))
    where = re.search(r"mistakes.cu:(\d+)", str(caught.value))
    if mistake != "copy_never_awaited":  # which is nowhere
        assert where, caught.value
        line = (PLANTED / "mistakes.cu").read_text().splitlines()[int(where[1]) - 1]
        assert line.startswith("  "), line


@pytest.mark.parametrize("seed", SEEDS, ids="seed_{}".format)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_passes_the_kernel_without_the_mistake(machine: Emulator, mistake: str, seed: int) -> None:
    machine.seed(seed)
    x = torch.randn(1, 128)
    assert torch.equal(call(machine, f"{mistake}_right", x, x, (1, 128)), x)


def test_every_planted_mistake_is_tested(machine: Emulator) -> None:
    names = {name.removesuffix("_right") for name in machine.algorithms("forward")}
    assert names == {*MISTAKES, "wrong_lane"}


def test_a_wrong_lane_gives_wrong_numbers(machine: Emulator) -> None:
    x = torch.randn(1, 128)
    assert torch.equal(call(machine, "wrong_lane_right", x, x, (1, 128)), x)
    assert not torch.equal(call(machine, "wrong_lane", x, x, (1, 128)), x)


# ---- fragments ----------------------------------------------------------------------------------

PRODUCTS = {  # (M, K) of the instruction; N is 8
    torch.float16: (16, 16),
    torch.bfloat16: (16, 16),
    torch.float32: (16, 8),
    torch.float64: (8, 4),
}


def product(machine: Emulator, kernel: str, a: Tensor, b: Tensor) -> Tensor:
    columns = 8 * max(1, 4 // a.itemsize)  # 16-bit operands, sums of 32 bits
    c = call(machine, kernel, a, b, (a.shape[0], columns))
    return c.view(torch.float32) if a.itemsize == 2 else c


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-16, 17, shape).to(dtype)


@pytest.mark.parametrize("variant", ("", "_ldmatrix"), ids=("by_element", "by_ldmatrix"))
@pytest.mark.parametrize("dtype", PRODUCTS, ids=lambda dtype: str(dtype)[6:])
def test_mma_is_a_matrix_product(machine: Emulator, dtype: torch.dtype, variant: str) -> None:
    if variant and dtype.itemsize != 2:
        dtype = torch.bfloat16
    m, k = PRODUCTS[dtype]
    a, b = integers(m, k, dtype=dtype), integers(k, 8, dtype=dtype)
    got = product(machine, f"mma_{str(dtype)[6:]}{variant}", a, b)
    assert torch.equal(got.double(), a.double() @ b.double())


def test_a_wrong_fragment_index_gives_wrong_numbers(machine: Emulator) -> None:
    a, b = integers(16, 16, dtype=torch.float16), integers(16, 8, dtype=torch.float16)
    got = product(machine, "mma_float16_wrong", a, b)
    assert not torch.equal(got.double(), a.double() @ b.double())


def test_tf32_rounds_its_operands(machine: Emulator) -> None:
    """To 10 bits, ties away from zero: 1 + 2^-11 becomes 1 + 2^-10, a little less becomes 1."""
    a, b = torch.zeros(16, 8), torch.zeros(8, 8)
    a[0, 0], a[1, 0], a[2, 0], b[0, 0] = 1 + 2**-11, 1 + 2**-11 - 2**-23, -1 - 2**-11, 1
    got = product(machine, "mma_float32", a, b)[:3, 0].tolist()
    assert got == [1 + 2**-10, 1, -1 - 2**-10]


@pytest.mark.parametrize("transposed", (False, True), ids=("plain", "transposed"))
@pytest.mark.parametrize("matrices", (1, 2, 4))
def test_ldmatrix(machine: Emulator, matrices: int, transposed: bool) -> None:
    x = torch.arange(256.0).half().reshape(32, 8)
    kernel = f"ldmatrix_{matrices}" + "_transposed" * transposed
    got = call(machine, kernel, x, x, (32, 8)).reshape(4, 8, 8)
    want = x.reshape(4, 8, 8).transpose(1, 2) if transposed else x.reshape(4, 8, 8)
    assert torch.equal(got[:matrices], want[:matrices])
    assert not got[matrices:].any()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=lambda dtype: str(dtype)[6:])
def test_conversions_keep_every_number(machine: Emulator, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).short().view(dtype)
    numbers = torch.where(every.isnan(), 0, every).reshape(-1, 1, 64)
    for x in numbers[::16]:
        got = call(machine, f"conversions_{str(dtype)[6:]}", x, x, (1, 64))
        assert torch.equal(got.view(torch.short), x.view(torch.short))


# ---- sm_90a -------------------------------------------------------------------------------------

ASYNCHRONOUS: dict[str, str] = {
    "bulk_not_waited_for": r"reads byte \d+ of shared memory, (whose|which is uninit)",
    "bulk_wrong_parity": r"reads byte \d+ of shared memory, (whose|which is uninit)",
    "bulk_too_many_bytes_expected": r"deadlock: waits for phase 0 of the mbarrier at byte 512 of "
    r"shared memory, which lacks 0 of 1 arrivals and 16 bytes",
    "bulk_too_many_arrivals_expected": r"deadlock: .* lacks 1 of 2 arrivals and 0 bytes",
    "bulk_arrives_twice": r"arrives at an mbarrier where all 1 arrivals of the phase were|"
    r"deadlock|reads byte",
    "bulk_no_barrier_after_init": r"uses an mbarrier that (is not|thread 0 has) initialised",
    "bulk_no_fence_after_init": r"it was initialised without a proxy fence since",
    "bulk_misaligned": r"misaligned: copies 512 bytes",
    "bulk_not_awaited": r"copies bytes that nobody waits for",
    "ring_never_empty": r"deadlock: waits for phase \d|race: writes byte",
    "ring_empty_too_early": r"race: (writes|reads) byte",
    "ring_without_warp_barrier": r"race: reads byte \d+ of shared memory, which thread \d+ has",
    "product_no_proxy_fence": r"without a barrier and a proxy fence in between",
    "product_no_barrier": r"without a barrier and a proxy fence in between|uninitialised",
    "product_no_fence": r"multiplies without wgmma.fence since registers were in use",
    "product_early_read": r"reads sums of a product that it has not waited for",
    "product_waits_for_too_few": r"reads sums of a product that it has not waited for",
    "product_never_awaited": r"ends with products in flight",
    "product_overwritten": r"writes byte \d+ of shared memory, which a product of warp \d reads",
    "product_overwritten_by_others": r"writes byte \d+ of shared memory, which (a product|warp)",
    "product_divergent": r"waits at a collective that other lanes of its warp or warpgroup do not",
    "product_out_of_bounds": r"out of bounds: multiplies row 255 of B at byte 10240",
    "product_of_copy_early": r"multiplies byte \d+ of shared memory, whose (asynchronous|bulk)",
    "product_offsets_exchanged": r"out of bounds: multiplies row \d+ of B",
}


def asynchronous(machine: Emulator, kernel: str) -> tuple[Tensor, Tensor]:
    """What the kernel makes, and what it should."""
    family, _, which = kernel.partition("_")
    if family != "product":
        x = torch.randn(1, 128)
        y = call(machine, kernel, x, x, (1, 128))
        return y, x if family == "bulk" else x.view(64, 2).flip(1).view(1, 128)
    dtype = torch.bfloat16 if which.startswith("bfloat16") else torch.float16
    columns = {"128": 128, "256": 256, "bounds": 256}.get(which.rpartition("_")[2], 64)
    a, b = integers(64, 16, dtype=dtype), integers(16, columns, dtype=dtype)
    # The copy engine brings a matrix that lies as it shall.
    x = a.view(64, 2, 8).transpose(0, 1).reshape(64, 16) if which.startswith("of_copy") else a
    y = call(machine, kernel, x, b, (64, 2 * columns)).view(torch.float32)
    return y.double(), a.double() @ b.double()


@pytest.mark.parametrize("mistake", ASYNCHRONOUS)
def test_finds_among_asynchronous(machine: Emulator, mistake: str) -> None:
    for seed in SEEDS:
        machine.seed(seed)
        with pytest.raises(KernelError, match=ASYNCHRONOUS[mistake]) as caught:
            asynchronous(machine, mistake)
        where = re.search(r"asynchronous.cu:(\d+)", str(caught.value))
        assert where, caught.value
        line = (PLANTED / "asynchronous.cu").read_text().splitlines()[int(where[1]) - 1]
        assert line.startswith("  "), line


@pytest.mark.parametrize(
    "kernel",
    (
        *("bulk_right", "ring_right", "product_float16_64", "product_float16_128"),
        *("product_float16_256", "product_bfloat16_64", "product_bfloat16_256", "product_of_copy"),
        *("product_transposed_64", "product_transposed_256"),
    ),
)
def test_passes_asynchronous_kernels(machine: Emulator, kernel: str) -> None:
    for seed in SEEDS:
        machine.seed(seed)
        got, want = asynchronous(machine, kernel)
        assert torch.equal(got, want)


def test_offsets_of_transposed_matrices_have_their_places(machine: Emulator) -> None:
    got, want = asynchronous(machine, "product_transposed_wrong_64")
    assert not torch.equal(got, want)


# ---- counters -----------------------------------------------------------------------------------


def traffic(machine: Emulator, kernel: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    x = torch.randn(2, 1024)
    with machine.counting() as launches:
        y = call(machine, kernel, x, x, (2, 1024))
    (launch,) = launches
    assert (launch["kernel"], launch["blocks"]) == ("traffic", 2)
    return x, y, launch


def test_counts_bank_conflicts(machine: Emulator) -> None:
    x, y, launch = traffic(machine, "transpose_pitch_33")
    assert torch.equal(y.view(2, 32, 32), x.view(2, 32, 32).transpose(1, 2))
    read = launch["memory"]["read shared"]
    assert (read["requests"], read["passes"], read["ideal"]) == (64, 64, 64)
    assert launch["conflicts"] == {}

    _, _, launch = traffic(machine, "transpose_pitch_32")
    assert launch["memory"]["read shared"]["passes"] == 64 * 32
    assert launch["memory"]["write shared"]["passes"] == 64
    (place,) = launch["conflicts"]
    line = int(place.partition("traffic.cu:")[2].split()[0])
    assert "s[lane * kPitch + row]" in (PLANTED / "traffic.cu").read_text().splitlines()[line - 1]


@pytest.mark.parametrize(
    ("kernel", "requests", "sectors"),
    [("copy_columns", 64, 64 * 32), ("copy_vectors", 16, 256), ("transpose_pitch_33", 64, 256)],
)
def test_counts_sectors(machine: Emulator, kernel: str, requests: int, sectors: int) -> None:
    launch = traffic(machine, kernel)[2]
    for way in ("read x", "write y"):
        count = launch["memory"][way]
        assert (count["requests"], count["bytes"]) == (requests, 8192)
        assert count["sectors"] == sectors
