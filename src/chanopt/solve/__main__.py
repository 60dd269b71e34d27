"""`python -m chanopt.solve`: instances as JSON on standard input, a line each; their solutions on standard output."""

from __future__ import annotations

import argparse
import sys

from chanopt.errors import ChanoptError
from chanopt.solve import Instance, solve


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m chanopt.solve", description=__doc__)
    parser.add_argument("--time-limit", type=float, default=10.0, metavar="S", help="seconds for each (default: 10)")
    args = parser.parse_args()
    try:
        for line in sys.stdin:
            print(solve(Instance.from_json(line), time_limit=args.time_limit).to_json(), flush=True)
    except ChanoptError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
