"""`python -m chanopt.solve`: an instance as JSON on standard input, its solution as JSON on standard output."""

from __future__ import annotations

import argparse
import sys

from chanopt.errors import ChanoptError
from chanopt.solve import Instance, solve


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m chanopt.solve", description=__doc__)
    parser.add_argument("--time-limit", type=float, default=10.0, metavar="S", help="seconds (default: 10)")
    args = parser.parse_args()
    try:
        print(solve(Instance.from_json(sys.stdin.read()), time_limit=args.time_limit).to_json())
    except ChanoptError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
