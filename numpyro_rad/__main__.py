"""``python -m numpyro_rad``: the report of a saved fit; of one that is still to be made, the plan and advice."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import optax

from numpyro_rad import report
from numpyro_rad.ad.plan import BudgetError
from numpyro_rad.annotations import Kwargs
from numpyro_rad.codecs import StochasticRound
from numpyro_rad.elbo import RAD_ELBO
from numpyro_rad.fits import SVI, SVIState, with_loss
from numpyro_rad.mistakes import shown
from numpyro_rad.planning.explain import explain
from numpyro_rad.training.advice import advise, step_memory
from numpyro_rad.training.arguments import check_parts

_RETURNS = "(svi, args), (svi, args, kwargs), (model, guide, args) or (model, guide, args, kwargs)"

_TARGET = """
TARGET is module:function or path/to/file.py:function, a function without
arguments that returns one of

    (svi, args)           an SVI of NumPyro or RAD_SVI, and a tuple of what
    (svi, args, kwargs)   model and guide are called with
    (model, guide, args)
    (model, guide, args, kwargs)

The module is imported, also from the working folder. For example network.py:

    def fit():
        x = jnp.ones((4096, 64))  # arrays in the shapes of your data
        return model, AutoNormal(model), (x, x[:, 0])
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    :param arguments: the words behind ``python -m numpyro_rad``; default: those of this process.
    :return: the exit status: 0, 1 with a message on standard error, or 2 with one where the command is not used as it
        should be. Options that do not exist exit with 2. Errors of the module that a target names are raised.
    """
    chosen = _parser().parse_args(arguments)
    try:
        given = _fit(chosen) if "target" in chosen else ()
    except (_Misuse, BudgetError) as error:
        return _failed(error, 2 if isinstance(error, _Misuse) else 1)
    try:
        for text in chosen.run(chosen, *given):
            print(text, flush=True)
    except (OSError, ValueError, TypeError, ImportError) as error:
        return _failed(error, 1)
    return 0


def _failed(error: Exception, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m numpyro_rad", description="Randomized gradients for NumPyro's SVI."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[..., Iterator[str]], told: str, after: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=told,
            description=told[0].upper() + told[1:] + ".",
            epilog=after,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    saved = command("report", _report, "show or write the report of a saved fit")
    saved.add_argument("result", metavar="RESULT", help="the fit, saved as JSON")
    saved.add_argument("-o", "--output", metavar="FILE", help=".html, .md or .txt; without it, print a table")

    example = "\n    python -m numpyro_rad {}\n".format
    told = "show what one step of a fit stores, computes again and rounds, and the memory that it takes"
    plan = command("explain", _explain, told, _TARGET + example("explain network:fit --memory-budget 64MiB"))
    plan.add_argument("--memory-budget", metavar="SIZE", help="as RAD_ELBO(memory_budget=...), such as 64MiB")
    plan.add_argument("--exact", action="store_true", default=None, help="no codes, as RAD_ELBO(exact=True)")
    plan.add_argument(
        "--codec-bits", type=int, choices=(1, 2, 4, 8), metavar="N", help="round to N bits: 1, 2, 4 or 8"
    )  # fmt: skip
    plan.add_argument("--slices", type=int, metavar="N", help="run in N slices, as RAD_ELBO(slices=N)")
    plan.add_argument("--table", action="store_true", help="the residuals one by one")
    plan.add_argument("--no-compile", action="store_true", help="leave out the memory: nothing is compiled")

    told = "compare Trace_ELBO, RAD_ELBO and a few budgets on one step of a fit"
    advice = command("advise", _advise, told, _TARGET + example("advise network:fit"))
    advice.add_argument("--budget", action="append", metavar="SIZE", help="a budget to try, such as 64MiB; repeatable")
    for added in (plan, advice):
        added.add_argument("target", metavar="TARGET", help="module:function or path/to/file.py:function, see below")
        added.add_argument("--seed", type=int, default=0, help="of the initial state (default 0)")
    return parser


# -- commands ----------------------------------------------------------------------------------------------------------


def _report(chosen: argparse.Namespace) -> Iterator[str]:
    record = report.load(chosen.result)
    if chosen.output is None:
        yield report.terminal(record).rstrip("\n")
    else:
        yield f"wrote {report.write(record, chosen.output)}"


def _explain(chosen: argparse.Namespace, svi: SVI, state: SVIState, args: tuple, kwargs: Kwargs) -> Iterator[str]:
    found = explain(svi, state, *args, **kwargs)
    yield found.table() if chosen.table else str(found)
    if not chosen.no_compile:
        yield step_memory(svi, state, *args, **kwargs)


def _advise(chosen: argparse.Namespace, svi: SVI, state: SVIState, args: tuple, kwargs: Kwargs) -> Iterator[str]:
    yield str(advise(svi, state, *args, budgets=chosen.budget, **kwargs))


# -- targets -----------------------------------------------------------------------------------------------------------


class _Misuse(Exception):
    """A command that does not say what it should."""


class _Fit(NamedTuple):
    """A fit before its first step."""

    svi: SVI
    state: SVIState
    args: tuple
    kwargs: Kwargs


def _fit(chosen: argparse.Namespace) -> _Fit:
    """The fit that a target names, with the options of the command.

    :raises _Misuse: for mistakes in the command and in what the function returns; whatever the user's own code raises
        is raised.
    """
    made = _function(chosen.target)()
    entries, kwargs = (made, {}) if isinstance(made, tuple) else ((), {})
    if entries and isinstance(entries[-1], dict):
        *entries, kwargs = entries
    try:
        match entries:
            case [SVI() as svi, tuple() | list() as args]:
                if chosen.command == "explain":
                    svi = with_loss(svi, _with_options(svi.loss, _options(chosen)))
            case [model, guide, tuple() | list() as args] if callable(model) and callable(guide):
                check_parts(model, guide, None, None, None, None)
                svi = SVI(model, guide, optax.adam(1e-3), RAD_ELBO(**_options(chosen)))
            case _:
                got = f"({', '.join(map(shown, made))})" if isinstance(made, tuple) else shown(made)
                raise TypeError(f"{chosen.target} has to return {_RETURNS}, with the arguments in a tuple, not {got}.")
    except (TypeError, ValueError) as error:
        raise _Misuse(str(error)) from error
    return _Fit(svi, svi.init(jax.random.key(chosen.seed), *args, **kwargs), tuple(args), kwargs)


def _options(chosen: argparse.Namespace) -> dict[str, Any]:
    """The options of an ELBO that a command names."""
    named = {name: getattr(chosen, name, None) for name in ("memory_budget", "exact", "slices")}
    bits = getattr(chosen, "codec_bits", None)
    named["codec"] = None if bits is None else StochasticRound(bits)
    return {name: value for name, value in named.items() if value is not None}


def _with_options(loss: Any, options: dict[str, Any]) -> RAD_ELBO:
    if isinstance(loss, RAD_ELBO):
        return loss.replace(**options)
    return RAD_ELBO(base=loss, **options)


def _function(target: str) -> Callable[[], Any]:
    """The function that a target names."""
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise _Misuse(
            f"{target!r} does not name a function. Write MODULE:FUNCTION, for example network:fit, or "
            "path/to/file.py:FUNCTION."
        )
    found = getattr(_module(place), name, None)
    if not callable(found):
        raise _Misuse(f"{place} has no function {name!r}.")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise _Misuse(f"{target} has to be a function without arguments: {error}.") from error
    except ValueError:  # of some built-in functions
        pass
    return found


def _module(place: str) -> ModuleType:
    """A module by its name, also in the working folder, or by its file, whose neighbours it may import."""
    if not place.endswith(".py"):
        _search_first(os.getcwd())
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # of one that it imports
            raise _Misuse(f"{error}. For a file write path/to/file.py:FUNCTION.") from error
    file = Path(place).resolve()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise _Misuse(f"there is no file {place}.")
    _search_first(str(file.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    spec.loader.exec_module(module)
    return module


def _search_first(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


if __name__ == "__main__":
    sys.exit(main())
