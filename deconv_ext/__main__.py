"""``python -m deconv_ext doctor | build | demo | bench | diagnose``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deconv_ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is installed, whether it computes right, what to mend")
    build_parser = commands.add_parser("build", help="compile the binary module for this machine")
    build_parser.add_argument("--force", action="store_true", help="even if there is a good one")
    commands.add_parser("demo", help="convert a real model and train another", add_help=False)
    commands.add_parser("bench", help="time every layer against torch's", add_help=False)
    commands.add_parser("diagnose", help="look for checkerboards in a model", add_help=False)
    args, rest = parser.parse_known_args(argv)

    # The demonstration, the benchmark and the diagnosis read arguments of their own.
    if args.command == "demo":
        from .demo import main as demo

        return demo(rest) or 0
    if args.command == "bench":
        from .bench import main as bench

        return bench(rest) or 0
    if args.command == "diagnose":
        from .diagnose import main as diagnose

        return diagnose(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "doctor":
        from .doctor import main as doctor

        return doctor()
    from .build import BuildError, build, find_library
    from .compiler import complete

    try:
        library = None if args.force else find_library()
        print(library if library and complete(library) else build(force=args.force))
    except BuildError as error:
        print(f"deconv_ext: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
