"""Everything that a GPU can tell about this project, in stages, in a given number of minutes.

Results are written as they are measured. A stage that crashes or hangs is started again behind the
job that it did not survive; one that was cut goes on where it was when the same command is given
again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from deconv_ext.bench_machine import commit, device_name

from . import activations, correctness, probes, report, sanitizer, stages
from .context import Context
from .journal import RESTART

ROOT = Path(__file__).resolve().parents[2]


class Part(NamedTuple):
    """A process: its stage, function, and argument; share of the time; the longest job."""

    stage: int
    name: str
    argument: str
    share: float
    longest: float = 180.0  # seconds without news after which it is taken for hanging

    @property
    def file(self) -> str:
        return next(name for name in report.FILES if name.startswith(str(self.stage)))


FUNCTIONS = {
    "environment": stages.environment,
    "build": stages.build,
    "correctness": correctness.correctness,
    "suite": correctness.suite,
    "sanitizer": sanitizer.sanitizer,
    "timings": stages.timings,
    "tuning": stages.tuning,
    "probes": probes.probes,
    "activations": activations.activations,
}
FOREVER = 1e9
#: In the order of value. torch's plans with and without cuDNN's search need a process each.
PARTS = (
    Part(1, "environment", "torch", 6),
    Part(2, "build", "", 10, FOREVER),
    Part(3, "correctness", "", 16),
    Part(3, "suite", "", 8, FOREVER),
    Part(4, "sanitizer", "", 10, FOREVER),
    Part(5, "timings", "tuned", 28),
    Part(6, "tuning", "", 10),
    Part(7, "probes", "", 3),
    Part(8, "activations", "", 2),
    Part(5, "timings", "torch", 8),
    Part(1, "environment", "tuned", 4),
)
SECOND_PASS = PARTS[-2:]
NEEDS_GPU = """needs a GPU, and is left out of a dry run:
  1 driver, clocks, names of cuDNN's kernels (the CPU's operators stand in)
  2 a build from nothing (the cached one stands in)
  3 matrix and checks on CUDA (the CPU's kernels stand in); graph replay, streams, two devices
  4 compute-sanitizer (the same calls run without it)
  5, 6, 7, 8 CUDA events and graphs, cuDNN's search (the clock and torch's CPU operator stand in)"""
STAGES = range(1, 9)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def chosen(text: str) -> set[int]:
        try:
            found = {int(each) for each in text.split(",")}
        except ValueError:
            found = set()
        if not found or not found <= set(STAGES):
            every = ",".join(map(str, STAGES))
            raise argparse.ArgumentTypeError(f"want some of {every}, got {text!r}")
        return found

    parser = argparse.ArgumentParser(prog="gpu_campaign.sh", description=__doc__)
    parser.add_argument("minutes", nargs="?", type=float, default=30.0, help="in all (30)")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--stages", type=chosen, default=set(STAGES), metavar="1,3,5")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)  # one process of the campaign
    options = parser.parse_args(argv)
    if not options.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry runs on the CPU what can be run there")
    place = os.environ.get("OUT") or ROOT / "benchmarks" / "results" / folder_name(options.dry)
    options.out = Path(place)
    return options


def folder_name(dry: bool) -> str:
    """The device and the commit, as a file name."""
    device = device_name(torch.device("cpu" if dry else "cuda"))
    name = f"{device}-{commit() or 'unknown'}{'-dry' if dry else ''}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_part(part: Part, options: argparse.Namespace, seconds: float) -> None:
    """Start the part's process, again if it asks for it, until it has ended by itself."""
    deadline = time.monotonic() + seconds
    marker = options.out / f"{part.file}.running"
    while True:
        left = deadline - time.monotonic()
        command = [sys.executable, "-m", "campaign", str(left / 60)]
        command += ["--part", str(PARTS.index(part)), *(["--dry"] if options.dry else [])]
        env = {**os.environ, "OUT": str(options.out)}
        process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
        try:
            code = watch(process, marker, left + 60 + min(part.longest, 600), part.longest)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code == 0:
            return
        print(f"{part.name} {part.argument}: exit code {code}", flush=True)
        # A marker tells which job did it; without one, trying again would do the same.
        again = code == RESTART or marker.exists()
        if not again or time.monotonic() > deadline:
            return


def watch(
    process: subprocess.Popen[bytes], marker: Path, limit: float, longest: float
) -> int | None:
    """The exit code; None if it took longer than `limit`, or `longest` without news."""
    start = time.time()
    while time.time() - start < limit:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1)
        with contextlib.suppress(FileNotFoundError):
            if time.time() - max(start, marker.stat().st_mtime) > longest:
                return None
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """The whole campaign, or in a process of its own one part of it."""
    options = parse(argv)
    end = time.monotonic() + 60 * options.minutes
    if options.part is not None:
        part = PARTS[options.part]
        FUNCTIONS[part.name](Context(options.out, options.dry, end), part.argument)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells of every start
    print(f"results: {options.out}", flush=True)
    if options.dry:
        print(NEEDS_GPU, flush=True)
    parts = [part for part in PARTS if part.stage in options.stages]
    if options.dry:  # without cuDNN a second pass would do the same again
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        parts = [part for part in parts if part not in SECOND_PASS]
    for index, part in enumerate(parts):
        left = end - time.monotonic()
        shares = sum(each.share for each in parts[index:])
        seconds = left if part.name == "build" else left * part.share / shares
        if left <= 0:
            print(f"time is over before {part.name} {part.argument}", flush=True)
            continue
        print(f"--- {part.stage} {part.name} {part.argument}: {seconds:.0f} s", flush=True)
        run_part(part, options, seconds)
        report.write(options.out)
    print(report.summary(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
