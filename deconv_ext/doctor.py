"""``python -m deconv_ext doctor``: what there is, whether it computes right, and what to mend."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import build, functional, toolchain
from .testing import Case, make_case

DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.complex64, torch.complex128, torch.int64),
)
OPERATIONS = ("forward", "grad_input", "grad_weight", "grad_bias")
# Wide, depthwise, and with every argument.
CASES = (
    make_case("wide", (2, 32, 15, 17), 24, 4, 2, 1),
    make_case("depthwise", (2, 16, 13, 11), 16, 3, 2, 1, 1, groups=16),
    make_case("everything", (1, 12, 9, 7), 18, (3, 4), (2, 3), (2, 1), (1, 2), (2, 1), groups=3),
)


def self_test(device: str) -> Iterator[tuple[torch.dtype, str, float, float]]:
    """(dtype, operation, error, torch's own error) on `device`, relative to the largest value.

    The truth is what torch's CPU operator makes of the same, already rounded, operands in 64 bits.
    """
    torch_operator = torch.nn.functional.conv_transpose2d
    for dtype in DTYPES if device == "cpu" else DTYPES[:-1]:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        worst: dict[str, tuple[float, float]] = {}
        for case in CASES:
            truth = _results(torch_operator, case, "cpu", dtype, wide)
            ours = _results(functional.conv_transpose2d, case, device, dtype, dtype)
            theirs = _results(torch_operator, case, device, dtype, dtype)
            for name, right, *results in zip(OPERATIONS, truth, ours, theirs):
                errors = [
                    (r.cpu().to(wide) - right).abs().max() / right.abs().max() for r in results
                ]
                before = torch.tensor(worst.get(name, (0.0, 0.0)))
                mine, torchs = torch.maximum(before, torch.stack(errors).float()).tolist()
                worst[name] = mine, torchs
        for name, (mine, torchs) in worst.items():
            yield dtype, name, mine, torchs


def _results(
    operator: Callable[..., Tensor], case: Case, device: str, dtype: torch.dtype, wide: torch.dtype
) -> list[Tensor]:
    """In the order of `OPERATIONS`, from operands of `dtype` widened to `wide`; without gradients
    if that is an integer."""
    operands = case.operands(seed=0, dtype=dtype, exact=dtype is torch.int64)
    *variables, dy = (operand.to(device, wide) for operand in operands)
    if wide is torch.int64:
        return [operator(*variables, **case.torch_arguments)]
    variables = [variable.requires_grad_() for variable in variables]
    y = operator(*variables, **case.torch_arguments)
    return [y.detach(), *torch.autograd.grad(y, variables, dy)]


def _tolerance(dtype: torch.dtype) -> float:
    """What rounding explains: once to `dtype`, and a long sum in what it accumulates in."""
    if dtype is torch.int64:
        return 0.0
    accumulator = dtype if torch.finfo(dtype).bits == 64 else torch.float32
    return torch.finfo(dtype).eps + 64 * torch.finfo(accumulator).eps


def _passes(device: str) -> bool:
    """Print the self-test; true if rounding explains every error."""
    print(f"\nself-test on {device}: error against 64 bits (torch's own)")
    passed = True
    for dtype, name, ours, theirs in self_test(device):
        good = ours <= _tolerance(dtype)  # false for NaN
        passed = passed and good
        dtype_name = str(dtype).removeprefix("torch.")
        verdict = "ok" if good else "WRONG"
        print(f"  {dtype_name:<11}{name:<12}{ours:8.1e} ({theirs:.1e})  {verdict}")
    return passed


def _report(info: dict[str, Any]) -> None:
    host = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    print(f"deconv_ext {info['version']}, torch {info['torch']}, {host}")
    for name, value in (
        ("binary", f"{info['built']} {info['path'] or ''}"),
        ("C++ compiler", info["cxx"]),
        ("CPU kernels", f"{info['cpu_isa']} (usable here: {', '.join(info['cpu_isas'])})"),
        ("OpenMP", ", ".join(info["openmp"])),
        ("nvcc", info["nvcc"]),
        ("CUDA kernels", " ".join(info["cuda_archs"])),
        ("cache", info["cache"]),
    ):
        print(f"  {name:<13} {value or 'none'}")
    for note in info["notes"]:
        print(f"  note: {note}")


def _to_mend() -> list[str]:
    """What this machine lacks, each with the command that mends it."""
    missing = toolchain.missing_tools()
    if toolchain.visible_archs() and not torch.version.cuda:
        mend = f"{sys.executable} -m pip install --force-reinstall torch  # its CUDA build"
        missing.append(f"there is a GPU, but this torch is built without CUDA; to mend it: {mend}")
    return missing


def main() -> int:
    """0 only if the self-test passed."""
    failure = ""
    try:
        build.extension().cpu_isa()
    except RuntimeError as error:  # of the build, or of an unknown DECONV_EXT_CPU_ISA
        failure = str(error)
    info = build.build_info()
    _report(info)
    passed = not failure
    if failure:
        print(f"\nno kernels: {failure}")
    else:
        passed = _passes("cpu")
        if torch.cuda.is_available() and info["nvcc"]:
            passed = _passes("cuda") and passed
    for line in _to_mend():
        print(f"\nmissing: {line}")
    print("\nself-test passed" if passed else "\nself-test FAILED")
    return 0 if passed else 1
