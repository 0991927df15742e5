"""What a stage has found so far, in a JSON file that is complete at any moment.

A stage is a list of jobs. A job whose name is in the file is not done again, so a stage that was
cut or crashed is simply started anew. While a job runs, a marker beside the file says which and
where: a process that finds one knows that the last one did not survive that job.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from deconv_ext.bench_table import dump

#: Exit code of a stage whose CUDA context is lost: it wants to be started again.
RESTART = 75
Row = dict[str, Any]
Job = tuple[str, Callable[[], Iterable[Row]]]  # its name, and what yields its rows


class Journal:
    """Reads and writes `path`; jobs are begun until `deadline`, by time.monotonic()."""

    def __init__(self, path: Path, facts: dict[str, Any], deadline: float) -> None:
        self.path, self.facts, self.deadline = path, facts, deadline
        self.marker = path.with_suffix(".running")
        self.rows: list[Row] = []
        self.jobs: dict[str, str] = {}  # what became of each
        if path.exists():
            content = json.loads(path.read_text())
            self.rows, self.jobs = content["rows"], content["jobs"]
        if self.marker.exists():
            name, _, detail = self.marker.read_text().partition("\n")
            self.finish(name, f"did not end (crash, hang or cut) {detail}".strip())
        self.save()

    def save(self) -> None:
        dump(self.path, {"facts": self.facts, "jobs": self.jobs, "rows": self.rows})

    def at(self, name: str, detail: str = "") -> None:
        """Say where in the job the process is; the driver also sees by it that it lives."""
        self.marker.write_text(f"{name}\n{detail}")

    def finish(self, name: str, status: str) -> None:
        self.jobs[name] = status
        self.save()
        self.marker.unlink(missing_ok=True)
        if status != "done":
            print(f"{name}: {status}", flush=True)

    def run(self, jobs: Iterable[Job]) -> None:
        """Do the jobs that are not done; leave the process if the CUDA context is lost."""
        begun, left = 0, 0
        for name, work in jobs:
            if name in self.jobs:
                continue
            if begun and time.monotonic() > self.deadline:  # one at least: no stage is all start-up
                left += 1
                continue
            begun += 1
            self.at(name)
            self.finish(name, self._attempt(work))
            if not context_lives():
                sys.exit(RESTART)
        if left:
            print(f"{self.path.stem}: time is over, {left} jobs left for another run", flush=True)

    def _attempt(self, work: Callable[[], Iterable[Row]]) -> str:
        try:
            for row in work():
                self.rows.append(row)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return "out of memory"
        except Exception as error:  # whatever it is, the next job shall have its turn
            traceback.print_exc()
            return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        return "done"


def context_lives() -> bool:
    """False after an illegal access of a kernel: every later CUDA call fails as well."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
