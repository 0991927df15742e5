"""Which algorithm takes a problem: each declines with a reason, and "auto" always finds one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from deconv_ext.build import extension
from deconv_ext.testing import Case, make_case
from support import define, run

PLAIN = ((1, 1), (0, 0, 0, 0), (0, 0), (1, 1), 1)


def test_lists_end_with_the_reference() -> None:
    kernels = extension()
    for op in ("forward", "grad_input", "grad_weight"):
        winograd = ["winograd"] if op != "grad_weight" else []
        assert kernels.list_algorithms(op) == [
            *("depthwise", "direct"),
            *winograd,
            *("gemm", "reference"),
        ]
    with pytest.raises(ValueError, match="grad_input"):
        kernels.list_algorithms("backward")


def test_unknown_name() -> None:
    x, w = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    with pytest.raises(
        RuntimeError, match="depthwise, direct, winograd, gemm, reference, but got 'fast'"
    ):
        extension().forward(x, w, None, *PLAIN, algo="fast")


@pytest.mark.parametrize("algo", ["depthwise", "direct", "winograd", "gemm"])
def test_integers_belong_to_the_reference(algo: str) -> None:
    x, w = torch.ones(1, 1, 2, 2).long(), torch.ones(1, 1, 2, 2).long()
    with pytest.raises(RuntimeError, match="floating point"):
        extension().forward(x, w, None, *PLAIN, algo=algo)
    assert extension().forward(x, w, None, *PLAIN)[0, 0, 1, 1] == 4


@pytest.mark.parametrize(
    ("channels", "groups", "memory_format", "reason"),
    [
        (4, 2, torch.channels_last, "groups == in_channels"),
        (4, 4, torch.contiguous_format, "channels_last"),
    ],
)
def test_depthwise_declines(
    channels: int, groups: int, memory_format: torch.memory_format, reason: str
) -> None:
    x = torch.ones(1, channels, 3, 3).contiguous(memory_format=memory_format)
    w = torch.ones(channels, channels // groups, 2, 2)
    with pytest.raises(RuntimeError, match=reason):
        extension().forward(x, w, None, (1, 1), (0, 0, 0, 0), (0, 0), (1, 1), groups, "depthwise")


def test_strides_of_hundreds() -> None:
    """No table of a million phases: the rows are computed directly."""
    torch.manual_seed(0)
    x, w, b = torch.randn(1, 16, 2, 2), torch.randn(16, 3, 3, 3), torch.randn(3)
    geometry = ((700, 900), (1, 1, 1, 1), (0, 0), (1, 1), 1)
    with pytest.raises(RuntimeError, match="4096"):
        extension().forward(x, w, b, *geometry, algo="gemm")
    y = extension().forward(x, w, b, *geometry)
    expected = F.conv_transpose2d(x.double(), w.double(), b.double(), (700, 900), 1)
    assert y.shape == expected.shape and torch.allclose(y.double(), expected, atol=1e-5)
    assert torch.equal(y, extension().forward(x, w, b, *geometry, algo="direct"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_winograd_by_default(layout: str) -> None:
    """For neighbouring taps and many positions, unless it is switched off; not for few."""
    many, few = (
        make_case("many", (1, 128, 32, 32), 128, 4, 2, 1),
        make_case("few", (1, 64, 4, 4), 64, 4, 2, 1),
    )
    for op in ("forward", "grad_input"):
        t = many.operands(0, torch.float32, layout)
        by_default = run(op, many, t)
        assert torch.equal(by_default, run(op, many, t, "winograd"))
        assert not torch.equal(by_default, run(op, many, t, "gemm"))  # it rounds otherwise
        t = few.operands(0, torch.float32, layout)
        assert torch.equal(run(op, few, t), run(op, few, t, "gemm"))


@pytest.mark.parametrize(
    ("op", "case", "algo"),
    [
        ("forward", make_case("few", (2, 3, 9, 18), 16, 4, 2, 1), "direct"),
        ("forward", make_case("shared taps", (2, 16, 9, 18), 5, 3, 2, 1, 1), "direct"),
        ("forward", make_case("many", (2, 17, 9, 18), 5, 3, 2, 1, 1), "gemm"),
        ("forward", make_case("short rows", (2, 3, 10, 3), 16, 4, 2, 1), "gemm"),
        ("forward", make_case("phases without taps", (2, 3, 9, 18), 16, 4, 2, 1, 0, 2), "gemm"),
        ("forward", make_case("two planes", (2, 8, 9, 18), 2, 4, 2, 1), "gemm"),
        ("grad_input", make_case("two", (2, 16, 9, 18), 2, 2, 2), "direct"),
        ("grad_input", make_case("groups", (2, 64, 9, 18), 32, 4, 2, 1, groups=4), "direct"),
        ("grad_input", make_case("many, with a step", (2, 16, 9, 18), 9, 4, 2, 1), "gemm"),
        ("grad_input", make_case("step three", (2, 56, 9, 18), 2, 9, 3, 4), "direct"),
        ("grad_input", make_case("few uses", (2, 56, 9, 18), 2, 3, 3), "gemm"),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_few_channels_by_default(op: str, case: Case, algo: str) -> None:
    """Where pixels are contiguous, few channels are summed without a matrix product."""
    t = case.operands(0)
    chosen = run(op, case, t, "auto")
    same = {name: torch.equal(chosen, run(op, case, t, name)) for name in ("direct", "gemm")}
    assert same == {"direct": algo == "direct", "gemm": algo == "gemm"}
    t = case.operands(0, torch.float32, "channels_last")
    assert torch.equal(run(op, case, t, "auto"), run(op, case, t, "gemm"))


def test_winograd_switched_off() -> None:
    code = """
import torch
from deconv_ext.testing import Case, make_case
from deconv_ext.build import extension
case = make_case("many", (1, 128, 32, 32), 128, 4, 2, 1)
t = case.operands(0, torch.float32)
y, g = (extension().forward(t.x, t.w, t.bias, *case.geometry, algo=a) for a in ("auto", "gemm"))
print(torch.equal(y, g))
"""
    for value, equal in (("0", "True"), ("1", "False")):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"DECONV_EXT_WINOGRAD": value},
            check=True,
            capture_output=True,
            text=True,
        )
        assert out.stdout.strip() == equal


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "reason"),
    [
        (2, 2, 1, "follow each other"),
        (3, 1, 2, "follow each other"),
        (17, 1, 1, "256 elements"),
        (9, 9, 1, "stride_h"),
    ],
)
def test_winograd_declines(kernel: int, stride: int, dilation: int, reason: str) -> None:
    case = make_case("declined", (1, 4, 5, 5), 4, kernel, stride, 0, dilation=dilation)
    for op in ("forward", "grad_input"):
        with pytest.raises(RuntimeError, match=f"'winograd' cannot take this problem.*{reason}"):
            run(op, case, case.operands(0, torch.float32), "winograd")


def test_winograd_overflow() -> None:
    """Neighbours whose difference is no float32 any more."""
    case = make_case("overflow", (1, 2, 6, 6), 3, 4, 2, 1)
    t = case.operands(0, torch.float32)
    t.x.fill_(3e38)[..., ::2] *= -1
    t.w.fill_(1e-3)[..., ::2] *= -2
    t.dy.copy_(torch.where(torch.arange(12) % 4 < 2, 3e38, -3e38).expand_as(t.dy))
    for op in ("forward", "grad_input"):
        got, want = run(op, case, t, "winograd"), define(op, case, t)
        assert got.isfinite().all() and torch.allclose(got.double(), want, rtol=1e-6)
