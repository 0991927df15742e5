"""What the CPU kernels do besides computing: memory, floating-point environment, profile."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from deconv_ext import memory
from support import C


def large(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return C.forward(x, w, None, (2, 2), (1, 1, 1, 1), (0, 0), (1, 1), 1)


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 4, 160, 160), torch.randn(4, 4, 4, 4)  # the result has 1.6 MB


def test_memory_of_a_result_is_given_to_the_next_one() -> None:
    x, w = operands()
    want = F.conv_transpose2d(x, w, stride=2, padding=1)
    memory.empty_output_pool()
    first = large(x, w)
    place, size = first.data_ptr(), first.nbytes
    second = large(x, w)
    assert second.data_ptr() != place and memory.idle_output_bytes() == 0
    view = first[0, 1]
    del first
    assert memory.idle_output_bytes() == 0, "a view keeps it alive"
    view.fill_(float("nan"))
    del view
    assert size <= memory.idle_output_bytes() < 1.3 * size
    again = large(x, w)
    assert again.data_ptr() == place and memory.idle_output_bytes() == 0
    torch.testing.assert_close(again, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, want, rtol=1e-4, atol=1e-4)
    del again
    memory.empty_output_pool()
    assert memory.idle_output_bytes() == 0


def test_results_of_the_pool_are_tensors_like_others() -> None:
    y = large(*operands())
    assert y.resize_(5, 5).shape == (5, 5) and y.untyped_storage().resizable()
    y = large(*operands())
    assert torch.equal(y.clone().share_memory_(), y)
    assert y.to(memory_format=torch.channels_last).equal(y)


@pytest.mark.parametrize("algo", ("gemm", "direct"))
def test_every_thread_flushes_denormals_as_its_caller_does(algo: str) -> None:
    x, w = torch.full((4, 4, 64, 64), 1e-20), torch.full((4, 4, 2, 2), 1e-20)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for flush in (False, True, False):
            torch.set_flush_denormal(flush)
            y = C.forward(x, w, None, (2, 2), (0, 0, 0, 0), (0, 0), (1, 1), 1, algo)
            assert bool((y == 0).all() if flush else (y > 0).all())
            # Threads of the pool, which torch uses too, have got their own mode back.
            torch.set_flush_denormal(False)
            assert bool(((x.expand(64, 4, 4, 64, 64) * 1e-20) > 0).all())
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def test_profile(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """One line a call; what the phases take and waiting are the whole."""
    x, w = operands()
    large(x, w)
    assert "deconv_ext:" not in capfd.readouterr().err
    monkeypatch.setenv("DECONV_EXT_LOG", "profile")
    for algo in ("gemm", "direct"):
        C.forward(x, w, None, (2, 2), (1, 1, 1, 1), (0, 0), (1, 1), 1, algo)
        (line,) = capfd.readouterr().err.splitlines()
        assert re.match(rf"deconv_ext: forward {algo} \d+ us on \d+ threads, weights", line)
        shares = [float(share) for share in re.findall(r"(-?[\d.]+) %", line)]
        assert len(shares) == 5 and abs(sum(shares) - 100) < 0.5 and shares[2] > 0, line
