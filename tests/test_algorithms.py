"""Which algorithm takes a problem: each declines with a reason, and "auto" always finds one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deconv_ext.build import extension

PLAIN = ((1, 1), (0, 0, 0, 0), (0, 0), (1, 1), 1)


def test_lists_end_with_the_reference() -> None:
    kernels = extension()
    for op in ("forward", "grad_input", "grad_weight"):
        assert kernels.list_algorithms(op) == ["depthwise", "direct", "gemm", "reference"]
    with pytest.raises(ValueError, match="grad_input"):
        kernels.list_algorithms("backward")


def test_unknown_name() -> None:
    x, w = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    with pytest.raises(RuntimeError, match="depthwise, direct, gemm, reference, but got 'fast'"):
        extension().forward(x, w, None, *PLAIN, algo="fast")


@pytest.mark.parametrize("algo", ["depthwise", "direct", "gemm"])
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
