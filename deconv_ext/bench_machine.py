"""The machine that a figure belongs to: what it is, and what torch reaches on it."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .bench_contenders import PRECISIONS, precision_setting
from .bench_timing import EventTimer
from .build import build_info


def device_name(device: torch.device) -> str:
    """The model of the processor or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def command_output(*command: str) -> str | None:
    """What a command prints; None if there is none or it fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip()
    return None


def commit() -> str | None:
    """The commit of the checkout; `DECONV_EXT_COMMIT` says it where there is no repository."""
    folder = str(Path(__file__).parent)
    describe = ("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return os.environ.get("DECONV_EXT_COMMIT") or command_output("git", "-C", folder, *describe)


def gpu_state() -> dict[str, str] | None:
    """Clocks, temperature and power at this moment, and the driver, as nvidia-smi tells them."""
    if not shutil.which("nvidia-smi"):
        return None
    names = (
        *("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
        *("temperature.gpu", "power.draw", "power.limit", "clocks_throttle_reasons.active"),
    )
    for fields in (names, names[:-1]):  # the name of the last one depends on the driver
        query = f"--query-gpu={','.join(fields)}"
        answer = command_output("nvidia-smi", query, "--format=csv,noheader", "--id=0")
        if answer:
            return dict(zip(fields, re.split(r",\s*", answer.splitlines()[0])))
    return None


def environment(device: torch.device, **more: Any) -> dict[str, Any]:
    """What a figure is worth nothing without, and `more`."""
    info = build_info()
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "commit": commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "deconv_ext": __version__,
        "isa": info["cpu_isa"],
        "compiler": info["cxx"],
        "source_hash": info["source_hash"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2_cache": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvcc": info["nvcc"],
            "cuda_archs": info["cuda_archs"],
            "gpu": gpu_state(),
        }
    return facts | more


def ceilings(
    device: torch.device,
    precisions: Sequence[str] = tuple(PRECISIONS),
    side: int | None = None,
    megabytes: int | None = None,
    seconds: float = 0.5,
) -> dict[str, Any]:
    """What torch reaches here: GB/s of `copy_` (read and written), GFLOP/s of `matmul`.

    The matrix product stands in for the rate of multiply-adds: a yardstick, which a convolution may
    surpass, not a bound. `side` is that of its matrices, `megabytes` the size of what is copied.
    """
    on_gpu = device.type == "cuda"
    timer = EventTimer(device, 1, 0)

    def fastest(function: Callable[[], object]) -> float:
        best, deadline = math.inf, time.perf_counter() + seconds
        for _ in range(20):  # the first one warms up, unless it is so slow that it will do
            best = min(best, timer.sample(function, 0))
            if time.perf_counter() > deadline:
                break
        return best

    def rate(precision: str) -> float:
        short = PRECISIONS[precision].itemsize == 2 or precision == "tf32"
        n = side or ((8192 if short else 4096) if on_gpu else 1024)
        with precision_setting(precision):
            a, b = torch.randn(2, n, n, device=device).to(PRECISIONS[precision])
            return 2e-9 * n**3 / fastest(lambda: torch.matmul(a, b))

    count = (megabytes or (1024 if on_gpu else 64)) << 20
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copied = 2e-9 * count / fastest(lambda: target.copy_(source))
    return {"gbs": copied, "gflops": {precision: rate(precision) for precision in precisions}}
