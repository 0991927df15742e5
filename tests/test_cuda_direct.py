"""The direct CUDA kernels on the CPU: each unrolled pattern of columns, in every configuration,
with aligned and unaligned rows and both layouts; and that the layers meant for them get them."""

from __future__ import annotations

import pytest
import torch

from deconv_ext.testing import Case, make_case
from emulator import OPERATIONS, Emulator, build
from support import assert_equal, cast, exact

pytestmark = pytest.mark.usefixtures("one_thread")
MACHINE = Emulator(build())

# (batch, c_in, input size), c_out, kernel, stride, padding, output_padding
PATTERNS = (
    make_case("k2_s2", (2, 8, 4, 8), 3, 2, 2),
    make_case("k3_s2", (1, 4, 5, 9), 3, 3, 2, 1, 1),
    make_case("k4_s2", (2, 8, 5, 18), 3, 4, 2, 1),
    make_case("k9_s2", (1, 4, 5, 16), 1, 9, 2, 4, 1),
    make_case("k9_s3", (1, 4, 9, 7), 1, 9, 3, 4, 2),
    make_case("depthwise_k2_s2", (1, 4, 5, 16), 4, 2, 2, groups=4),
    make_case("depthwise_k3_s2", (1, 8, 5, 16), 8, 3, 2, 1, 1, groups=8),
    make_case("depthwise_k4_s2", (2, 6, 7, 17), 6, 4, 2, 1, groups=6),
    make_case("depthwise_k8_s4", (1, 8, 5, 8), 8, 8, 4, 2, groups=8),
    make_case("depthwise_k16_s8", (1, 5, 4, 6), 5, 16, 8, 4, groups=5),
)
OTHERS = (
    make_case("groups", (1, 8, 5, 6), 12, 4, 2, 1, groups=4),
    make_case("multiplier", (1, 4, 5, 16), 8, 4, 2, 1, groups=4),
    make_case("large_stride", (1, 3, 2, 3), 3, 64, 32),
    make_case("large_stride_overlapping", (1, 5, 3, 4), 5, 16, 8),
)
UNROLLED = "direct:one_channel"


@pytest.mark.parametrize("case", PATTERNS + OTHERS, ids=str)
@pytest.mark.parametrize("op", OPERATIONS)
def test_exact(op: str, case: Case) -> None:
    operands, results = exact(case, False)
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            t = cast(operands, dtype, layout)
            for algo in [a for a in MACHINE.algorithms(op) if a.startswith("direct")]:
                try:
                    got = MACHINE.run(op, case, t, algo)
                except ValueError as declined:
                    assert "cannot take this problem" in str(declined)
                    assert algo not in ("direct", "direct:any_one_channel"), declined
                    assert algo != UNROLLED or case in OTHERS, declined
                    continue
                assert_equal(got, results[op].to(dtype), (algo, dtype, layout))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_depthwise_moves_each_output_sector_once(layout: str) -> None:
    """32-byte sectors written are the bytes of y: whole rows, or whole pixels, without gaps."""
    case = make_case("depthwise", (2, 16, 8, 32), 16, 4, 2, 1, groups=16)
    operands, _ = exact(case, False)
    with MACHINE.counting() as launches:
        MACHINE.run("forward", case, cast(operands, torch.bfloat16, layout), "direct")
    (launch,) = launches
    written = launch["memory"]["write y"]
    assert written["sectors"] * 32 == written["bytes"] == 2 * operands.dy.numel()
