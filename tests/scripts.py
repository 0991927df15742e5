"""Runs a script of the project as its command does, without the seconds that a process costs."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path

import pytest

from project import ROOT


def quick(script: str, output: Path) -> str:
    """What `python SCRIPT --quick --output OUTPUT` prints; it must end well."""
    path = ROOT / script
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.syspath_prepend(path.parent)
        patch.setattr(sys, "argv", [str(path), "--quick", "--output", str(output)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0, printed.getvalue()
    return printed.getvalue()
