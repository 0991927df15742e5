"""Two processes of torchrun, gloo: gradients and values are those of one process."""

import os
import subprocess
import sys
from pathlib import Path

from deconv_ext.build import extension

TESTS = Path(__file__).parent
CHECKS = ("ddp", "fsdp", "dtensor", "checkpoint")


def test_two_processes(tmp_path):
    extension()  # built before, not by both at once
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(TESTS / "distributed_worker.py"), str(tmp_path), *CHECKS],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    for check in CHECKS:
        assert done.stdout.count(f"{check} holds") == 2, done.stdout
