"""``python -m numpyro_rad``: the report of a saved fit, and advice about one that is still to be made."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from numpyro_rad import report
from numpyro_rad.training.advice import advise


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
    command.set_defaults(run=_report)
    told = "compare Trace_ELBO, RAD_ELBO and a few budgets on one step of a fit"
    command = commands.add_parser("advise", help=told, description=told.capitalize() + ".")
    command.add_argument(
        "fit", metavar="MODULE:FUNCTION", help="a function without arguments that returns (svi, args) or "
        "(svi, args, kwargs): an SVI of NumPyro or RAD_SVI, and the arguments of model and guide"
    )  # fmt: skip
    command.add_argument("--budget", action="append", metavar="SIZE", help="a budget to try, such as 64MiB; repeatable")
    command.add_argument("--seed", type=int, default=0, help="of the initial state (default 0)")
    command.set_defaults(run=_advise)
    chosen = parser.parse_args(arguments)
    try:
        sys.stdout.write(chosen.run(chosen) + "\n")
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _report(chosen: argparse.Namespace) -> str:
    record = report.load(chosen.result)
    if chosen.output is None:
        return report.terminal(record).rstrip("\n")
    return f"wrote {report.write(record, chosen.output)}"


def _advise(chosen: argparse.Namespace) -> str:
    svi, args, *rest = _made(_function(chosen.fit), chosen.fit)
    kwargs = rest[0] if rest else {}
    state = svi.init(jax.random.key(chosen.seed), *args, **kwargs)
    return str(advise(svi, state, *args, budgets=chosen.budget, **kwargs))


def _function(name: str) -> Callable[[], Any]:
    """The function that ``module:function`` names; modules of the working folder are found as Python finds them."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"{name!r} does not name a function. Write MODULE:FUNCTION, for example network:fit.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise ValueError(f"the module {module!r} has no function {function!r}.")
    return found


def _made(function: Callable[[], Any], name: str) -> tuple[Any, ...]:
    made = function()
    if not (isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[1], (tuple, list))):
        raise ValueError(f"{name} has to return (svi, args) or (svi, args, kwargs), with the arguments in a tuple.")
    return made


if __name__ == "__main__":
    sys.exit(main())
