"""Stage 4: every algorithm on small problems under each tool of compute-sanitizer."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from deconv_ext.bench_contenders import PRECISIONS, precision_setting, product
from deconv_ext.testing import EDGE, TINY

from .context import PRODUCTS, Context, algorithms, arranged, conditions
from .journal import Row

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def find_tool() -> str | None:
    """On the PATH, or beside nvcc."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(str(Path(nvcc).resolve().parents[1]))
    places = [
        f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")
    ]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )


def workload(seconds: float, device: torch.device, limit: int = 1 << 30) -> int:
    """Run everything on one small case after the other, until the time is over; counts calls."""
    deadline, calls = time.monotonic() + seconds, 0
    cases = [case for pair in zip(EDGE, TINY[::2]) for case in pair if case.batch]
    for case, (precision, layout), op in itertools.product(cases, conditions(), PRODUCTS):
        t = arranged(case.operands(1, PRECISIONS[precision]), layout, device)
        for algo in algorithms(op, device):
            try:
                with precision_setting(precision):
                    product(case, op, t, algo)()
            except RuntimeError as error:
                if "cannot take this problem" not in str(error):
                    raise
                continue
            calls += 1
            if time.monotonic() > deadline or calls >= limit:
                return calls
    return calls


def run_tool(executable: str, tool: str, seconds: float, limit: float) -> Iterator[Row]:
    """The workload, of so many seconds, under one tool, for `limit` seconds at most."""
    command = [executable, "--tool", tool, "--print-limit", "20", "--error-exitcode", "86"]
    command += [sys.executable, "-m", "campaign.sanitizer", str(seconds)]
    # Each tensor is an allocation of its own, so that its end is guarded.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=env)
    except subprocess.TimeoutExpired:
        yield {"tool": tool, "errors": None, "why": f"cut after {limit:.0f} s"}
        return
    lines = (done.stdout + done.stderr).splitlines()
    summaries = [line for line in lines if " SUMMARY: " in line]
    counts = [int(each) for each in re.findall(r" SUMMARY: (\d+)", "\n".join(summaries))]
    row: Row = {"tool": tool, "errors": sum(counts) if counts else None, "summary": summaries}
    row |= {"returncode": done.returncode, "log": lines[:60] if done.returncode else lines[-5:]}
    yield row
    if done.returncode or not counts:
        raise RuntimeError(f"{tool}: {summaries or lines[-1:]}")


def sanitizer(context: Context, _: str) -> None:
    """A row for each tool; says so where it is not installed, or where there is no GPU."""
    journal = context.journal("4-sanitizer")
    found = find_tool()

    def run(tool: str, seconds: float) -> Iterator[Row]:
        row: Row = {"tool": tool, "errors": None}
        if context.dry:
            calls = workload(seconds, context.device, limit=100)
            yield row | {"why": "not run: needs a GPU; its calls ran on the CPU", "calls": calls}
        elif not found:
            yield row | {"why": "not run: no compute-sanitizer on the PATH or beside nvcc"}
        else:
            yield from run_tool(found, tool, seconds, max(60.0, context.left()))

    for index, tool in enumerate(TOOLS):
        share = max(5.0, context.left() / (len(TOOLS) - index) - 30)  # it starts slowly
        journal.run([(tool, lambda t=tool, s=share: run(t, s))])


if __name__ == "__main__":
    print(workload(float(sys.argv[1]), torch.device("cuda")), "calls")
    torch.cuda.synchronize()
