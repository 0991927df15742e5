"""What the CUDA kernels make of memory: sectors written once, banks without conflicts, bytes read.

On aligned problems, counted by the emulator (cuda_on_cpu/counters.cpp): a sector counts for each
request of a warp that touches it, a pass for each turn that the banks of shared memory take.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deconv_ext.testing import Case, make_case
from emulator import Emulator, build, dtype_of

pytestmark = pytest.mark.usefixtures("one_thread")
MACHINE = Emulator(build())
LAYOUTS = ("contiguous", "channels_last")
FORMATS = ("bfloat16", "tf32", "float32", "float64")
WRITTEN = {"forward": "write y", "grad_input": "write x", "grad_weight": "write w"}
SOURCE = {"forward": "read x", "grad_input": "read y"}

DEPTHWISE = make_case("depthwise", (1, 16, 16, 32), 16, 4, 2, 1, groups=16)
DEPTHWISE_8 = make_case("depthwise_8", (1, 16, 16, 32), 16, 8, 4, 2, groups=16)
FEW = make_case("few_outputs", (1, 32, 16, 32), 3, 4, 2, 1)
DENSE = make_case("dense", (1, 32, 8, 16), 64, 4, 2, 1)
STRIDE_1 = make_case("stride_1", (1, 64, 8, 16), 64, 3, 1, 1)
KERNEL_IS_STRIDE = make_case("kernel_is_stride", (1, 32, 8, 16), 64, 2, 2)


def launches(
    op: str, case: Case, fmt: str, layout: str, algo: str
) -> tuple[dict[str, dict[str, Any]], torch.Tensor]:
    """{kernel: what `Emulator.counting` tells of it} and the result."""
    t = case.operands(0, dtype_of(fmt), layout)
    with MACHINE.counting() as launched:
        result = MACHINE.run(op, case, t, algo, allow_tf32=fmt == "tf32")
    return {launch["kernel"]: launch for launch in launched}, result


def times_written(launch: dict[str, Any], op: str, result: torch.Tensor) -> float:
    written = launch["memory"][WRITTEN[op]]
    size = result.numel() * result.itemsize
    assert written["bytes"] == size
    return written["sectors"] * 32 / size


def conflicts(launch: dict[str, Any], access: str) -> float:
    """Passes over the banks, in multiples of those without conflicts."""
    count = launch["memory"][f"{access} shared"]
    return count["passes"] / count["ideal"]


# ---- direct -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ("bfloat16", "float32"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", (DEPTHWISE, DEPTHWISE_8, FEW), ids=str)
@pytest.mark.parametrize("op", ("forward", "grad_input"))
def test_direct(op: str, case: Case, layout: str, fmt: str) -> None:
    """Each sector of the target is written once, and no bank is asked twice at a time.

    A row of the source is read for every row of the target that it meets (from L1 after the first
    time), by every unit of four target channels of its group, with the halo of each run of columns.
    """
    found, result = launches(op, case, fmt, layout, "direct")
    launch = found["gather_direct"]
    # Three channels side by side are neither a vector nor a sector.
    apart = case is FEW and layout == "channels_last" and op == "forward"
    assert times_written(launch, op, result) == 1 or apart
    assert launch["conflicts"] == {}
    source = case.x_shape if op == "forward" else case.y_shape
    size = torch.Size(source).numel() * dtype_of(fmt).itemsize
    rows = case.kernel[0] if op == "forward" else case.kernel[0] / case.stride[0]
    units = 8 if case is FEW and op == "grad_input" else 1
    positions = max(
        1, 16 // dtype_of(fmt).itemsize // case.stride[1]
    )  # of a run, for 16-byte stores
    halo = 1 + 2 / positions if op == "forward" else 1.5
    read = launch["memory"][SOURCE[op]]["bytes"]
    assert size < read <= rows * halo * units * size, (read / size, rows * halo * units)


# ---- gemm ---------------------------------------------------------------------------------------

TIMES_WRITTEN = {  # how often a sector of the target is written; the halves of one meet in L2
    # NCHW: a warp's run of a row is 8 positions x 1, 2 or 4 phases.
    ("forward", DENSE, "bfloat16", "contiguous"): 1,
    ("forward", KERNEL_IS_STRIDE, "bfloat16", "contiguous"): 1,
    ("forward", DENSE, "tf32", "contiguous"): 1,
    ("forward", DENSE, "float32", "contiguous"): 1,
    ("grad_input", DENSE, "tf32", "contiguous"): 1,
    ("grad_input", DENSE, "float32", "contiguous"): 1,
    ("grad_input", DENSE, "bfloat16", "contiguous"): 2,  # 8 positions are half a sector
    ("forward", STRIDE_1, "bfloat16", "contiguous"): 2,
    # channels_last: a thread's run is 8 rows, in stores of 16 bytes.
    ("forward", DENSE, "bfloat16", "channels_last"): 1,
    ("grad_input", DENSE, "bfloat16", "channels_last"): 1,
    ("forward", DENSE, "tf32", "channels_last"): 2,
    ("forward", DENSE, "float32", "channels_last"): 2,
}


@pytest.mark.parametrize(
    "problem", TIMES_WRITTEN, ids=lambda p: "-".join(map(str, p)) if isinstance(p, tuple) else p
)
def test_gemm_writes_each_sector(problem: tuple[str, Case, str, str]) -> None:
    op, *rest = problem
    found, result = launches(op, *rest, "gemm")
    assert times_written(found["gemm_gather"], op, result) == TIMES_WRITTEN[problem]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ("forward", "grad_input", "grad_weight"))
def test_gemm_meets_the_banks_evenly(op: str, layout: str, fmt: str) -> None:
    """The main loop (ldmatrix, or words) without conflicts; 16-byte stores of the loader too.

    What is copied element by element, 4 or 8 bytes to each 16, is the exception.
    """
    found, _ = launches(op, DENSE, fmt, layout, "gemm")
    launch = found["gemm_weight" if op == "grad_weight" else "gemm_gather"]
    # Pixels of the list are read 8 bytes at a time, over the ends of rows.
    almost = 1.02 if op == "grad_weight" else 1
    # 8-byte operands of neighbouring pixels lie 16 bytes apart.
    assert conflicts(launch, "read") <= (2 if fmt == "float64" else almost)
    by_element = layout == "contiguous" and fmt != "bfloat16"
    narrow_pitch = op == "grad_weight" and fmt != "bfloat16"  # chosen for reads by words
    assert conflicts(launch, "write") <= (4 if by_element or narrow_pitch else almost)
