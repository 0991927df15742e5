"""Every code block of docs/recipes.md runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(
    r"^```python *(\w*)\n(.*?)^```$", (ROOT / "docs/recipes.md").read_text(), re.M | re.S
)


def test_python_blocks(tmp_path, monkeypatch):
    """In one namespace; what needs the packages of ONNX where they are."""
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    namespace = {}
    for kind, code in BLOCKS:
        if kind != "torchrun" and (kind != "onnx" or has_onnx()):
            exec(compile(code, "docs/recipes.md", "exec"), namespace)
    assert namespace["flops"] > 0 and (tmp_path / "compiled.pt2").exists()
    assert namespace["y"].shape == (2, 3, 32, 32)


def has_onnx():
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        return False
    return True


def test_torchrun_block(tmp_path):
    (script,) = (code for kind, code in BLOCKS if kind == "torchrun")
    (tmp_path / "train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(tmp_path / "train.py")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
