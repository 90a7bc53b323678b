"""``python -m numpyro_rad report RESULT -o FILE``: the report of a saved fit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from numpyro_rad import report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    :param arguments: the words behind ``python -m numpyro_rad``; default: those of this process.
    :return: the exit status: 0, or 1 with a message on standard error. Wrong usage exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m numpyro_rad", description="Randomized gradients for NumPyro's SVI."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    told = "show or write the report of a saved fit"
    command = commands.add_parser("report", help=told, description=told.capitalize() + ".")
    command.add_argument("result", metavar="RESULT", help="the fit, saved as JSON")
    command.add_argument("-o", "--output", metavar="FILE", help=".html, .md or .txt; without it, print a table")
    chosen = parser.parse_args(arguments)
    try:
        record = report.load(chosen.result)
        if chosen.output is None:
            sys.stdout.write(report.terminal(record))
        else:
            print(f"wrote {report.write(record, chosen.output)}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
