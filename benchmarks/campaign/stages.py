"""The stages that look at the machine and at the build (1, 2), and those that time (5, 6)."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from deconv_ext import bench_table
from deconv_ext.bench_contenders import (
    LAYOUTS,
    OPERATIONS,
    cudnn_search,
    measure,
    operands,
    precision_setting,
    product,
    torch_product,
)
from deconv_ext.bench_machine import command_output, gpu_state
from deconv_ext.build import find_library
from deconv_ext.testing import Case

from .context import PRODUCTS, Context, algorithms, by_value
from .journal import Job, Row, context_lives

# --- 1: environment ------------------------------------------------------------------------------


def launched(function: Any, device: torch.device) -> list[list[Any]]:
    """[name, microseconds] of each kernel of a call, in order; on the CPU, of each operator."""
    on_gpu = device.type == "cuda"
    function()  # chooses a plan
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        function()
        if on_gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    return [
        [event.name[:160], event.time_range.elapsed_us()]
        for event in profiler.events()
        if event.device_type == kind
    ]


def environment(context: Context, compare: str) -> None:
    """The machine, its ceilings, and the kernels that torch launches for each layer."""
    journal = context.journal(
        "1-environment",
        machine=context.ceilings(),
        nvidia_smi=command_output("nvidia-smi"),
        nvcc_version=command_output("nvcc", "--version"),
        torch_config=torch.__config__.show(),
    )

    def kernels(case: Case, op: str, precision: str, layout: str) -> Iterator[Row]:
        with precision_setting(precision), cudnn_search(compare == "tuned"):
            t = operands(case, precision, layout, context.device)
            found = launched(torch_product(case, op, t), context.device)
        names = {"layer": case.name, "op": op, "dtype": precision, "layout": layout}
        yield names | {"compare": compare, "kernels": found}

    def jobs() -> Iterator[Job]:
        choices = by_value(PRODUCTS, context.layers())
        for (precision, op, case), layout in itertools.product(choices, LAYOUTS):
            name = f"kernels {compare} {precision} {op} {case} {layout}"
            yield name, lambda c=(case, op, precision, layout): kernels(*c)

    journal.run(context.some(jobs()))


# --- 2: build ------------------------------------------------------------------------------------


def build(context: Context, _: str) -> None:
    """How long the build takes, from nothing except in a dry run."""
    journal = context.journal("2-build")

    def compile() -> Iterator[Row]:
        existing = find_library()
        command = [sys.executable, "-m", "deconv_ext", "build"]
        if not context.dry:
            command.append("--force")
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        yield {
            "seconds": time.monotonic() - start,
            "from_nothing": not context.dry or existing is None,
            "returncode": done.returncode,
            "stdout": done.stdout[-2000:],
            "stderr": done.stderr[-4000:],
        }
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-300:])

    journal.run([("build", compile)])
    journal.facts = context.facts()  # with the compilers, now that there is a binary
    journal.save()


# --- 5: timings ----------------------------------------------------------------------------------


def timings(context: Context, compare: str) -> None:
    """Every layer against torch; see deconv_ext.bench, whose rows these are."""
    facts: dict[str, Any] = {"machine": context.ceilings(), "dtype": "each", "algo": "auto"}
    journal = context.journal("5-timings", **facts)
    timer = context.timer(100, 0.1)
    print(bench_table.machine_line(journal.facts), bench_table.HEADER, sep="\n", flush=True)

    def rows(case: Case, op: str, precision: str) -> Iterator[Row]:
        for row in measure(case, op, precision, LAYOUTS, timer, compare=compare):
            print(bench_table.line(row, journal.facts), flush=True)
            yield dataclasses.asdict(row)

    def jobs() -> Iterator[Job]:
        for precision, op, case in by_value(OPERATIONS, context.layers()):
            name = f"{compare} {precision} {op} {case}"
            yield name, lambda c=(case, op, precision): rows(*c)

    journal.run(context.some(jobs()))
    journal.facts["state_at_end"] = gpu_state()
    journal.save()


# --- 6: tuning -----------------------------------------------------------------------------------


def tuning(context: Context, _: str) -> None:
    """Every configuration of every algorithm on every layer, to choose from."""
    journal = context.journal("6-tuning")
    timer = context.timer(20, 0.05)

    def times(case: Case, op: str, precision: str, layout: str) -> Iterator[Row]:
        declined: dict[str, str] = {}
        with precision_setting(precision):
            first = operands(case, precision, layout, context.device)
            for algo in algorithms(op, context.device):
                try:
                    product(case, op, first, algo)()
                except RuntimeError as error:
                    declined[algo] = str(error).splitlines()[0]
                    if not context_lives():
                        raise
            taking = [algo for algo in algorithms(op, context.device) if algo not in declined]

            def make(copy: int) -> dict[str, Any]:
                t = operands(case, precision, layout, context.device, copy)
                return {algo: product(case, op, t, algo) for algo in taking}

            found = {algo: timing.us for algo, timing in timer.compare(make).items()}
        best = min(found, key=lambda algo: found[algo])
        names = {"layer": case.name, "op": op, "dtype": precision, "layout": layout}
        print(f"{case} {op} {precision} {layout}: {found[best]:.1f} us with {best}", flush=True)
        yield names | {"us": found, "best": best, "declined": declined}

    def jobs() -> Iterator[Job]:
        choices = by_value(PRODUCTS, context.layers())
        for (precision, op, case), layout in itertools.product(choices, LAYOUTS):
            name = f"{precision} {op} {case} {layout}"
            yield name, lambda c=(case, op, precision, layout): times(*c)

    journal.run(context.some(jobs()))
