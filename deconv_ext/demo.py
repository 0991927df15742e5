"""``python -m deconv_ext demo``: run the examples of the source checkout, one after the other."""

from __future__ import annotations

import argparse
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def main(argv: Sequence[str] | None = None) -> int:
    """Run text detection and super-resolution; 0 if both got what they promise."""
    parser = argparse.ArgumentParser(prog="python -m deconv_ext demo", description=__doc__)
    parser.add_argument("--output", default="demo_output", help="folder for the pictures")
    parser.add_argument("--seconds", default="60", help="training time at most")
    options = parser.parse_args(argv)
    if not EXAMPLES.is_dir():
        print(
            "the demo is part of the source checkout, not of an installed package: "
            "run `make demo` there",
            file=sys.stderr,
        )
        return 2
    failed = 0
    for name, arguments in (
        ("text_detection", []),
        ("super_resolution", ["--seconds", options.seconds]),
    ):
        print(f"--- {name} ---", flush=True)
        start = time.perf_counter()
        try:
            example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        except ModuleNotFoundError as error:
            print(f"{error}; the demo needs: pip install -e '.[demo]'", file=sys.stderr)
            return 2
        failed |= example["main"](["--output", options.output, *arguments])
        print(f"{name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
