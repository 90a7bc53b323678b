"""Numbers and objects as text for people; whatever prints numbers has them from here.

A number that says nothing is not printed as one: an estimate within its own error of zero is "not distinguishable from
0", and what is too small to matter is "nothing" or "less than" something.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_MOST_LETTERS = 200  # of one argument

CERTAIN = 2.0
"""Standard errors beyond which an estimate is told from zero."""

LITTLE = 0.0005
"""A share below it is not worth a number: 0.05 %."""

NOTHING = 1e-6
"""A share below it is what rounding leaves."""

NO_LINE = "in NumPyro"
"""Where a value comes from no line of the user's: log densities and the guide's draws are computed when the model has
returned."""


# -- numbers -----------------------------------------------------------------------------------------------------------


def number(x: float | None) -> str:
    """Three digits, and all before the point."""
    if x is None or math.isnan(x):
        return "–"
    if math.isinf(x):
        return "unbounded"
    return f"{x:,.0f}" if 1e3 <= abs(x) < 1e9 else f"{x:.3g}"


def estimate_text(value: float, error: float) -> str:
    """An estimate and its standard error, both to the first or second digit of the error."""
    if not (math.isfinite(value) and math.isfinite(error)):
        return number(value)
    if error > 0 and max(abs(value), error) < 1e9 and error >= 1e-6:
        power = math.floor(math.log10(error))
        digits = max(0, -power + (error < 2 * 10.0**power))
        return f"{value:,.{digits}f} ± {error:,.{digits}f}"
    return f"{number(value)} ± {error:.1g}"


def is_told_from_zero(value: float, error: float) -> bool:
    """Whether an estimate says more than that it is small; one without a standard error does."""
    return math.isfinite(value) and (math.isnan(error) or abs(value) > CERTAIN * error)


def signed_text(value: float, error: float) -> str:
    """An estimate, of which even the sign may be unknown."""
    if is_told_from_zero(value, error) or not math.isfinite(value):
        return estimate_text(value, error)
    return "0" if error == 0 else f"not distinguishable from 0 (± {estimate_text(error, math.nan)})"


def positive_text(value: float, error: float) -> str:
    """An estimate of what cannot be negative: if it is not told from zero, the most that it may be."""
    if is_told_from_zero(value, error) and value > 0:
        return estimate_text(value, error)
    most = value + CERTAIN * error
    known = math.isfinite(most) and most > 0
    return "0" if value == 0 and error == 0 else "not distinguishable from 0" + f" (below {number(most)})" * known


def change_text(share: float, noun: str) -> str:
    """What is added to something, from a share of it."""
    if not math.isfinite(share):
        return f"unknown {noun}"
    if abs(share) < LITTLE:
        return f"no added {noun}" if abs(share) < NOTHING else f"next to no added {noun}"
    digits = max(0, 1 - math.floor(math.log10(abs(100 * share))))
    return f"{100 * share:+,.{digits}f} % {noun}"


def saving_text(exact_bytes: int, stored_bytes: int) -> str:
    """How much less is stored."""
    if not stored_bytes:
        return "nothing is stored"
    ratio = exact_bytes / stored_bytes
    if ratio >= 1000:
        return "hardly anything is stored"
    if ratio >= 1.05:
        return f"{ratio:.1f}x less" if ratio < 100 else f"{ratio:.0f}x less"
    return f"{1 / ratio:.1f}x more" if 0 < ratio <= 0.95 else "no saving"


def size_text(n_bytes: int) -> str:
    """A size for people; never 0 for what is not."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes} B"


def seconds_text(seconds: float) -> str:
    """A duration for people."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 90:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


# -- objects -----------------------------------------------------------------------------------------------------------


def call_text(x: Any, arguments: Iterable[str] | None = None) -> str:
    """An object as the call that makes it.

    :param arguments: what :func:`arguments_text` gives, if not for the object itself.
    """
    given = arguments_text(x) if arguments is None else arguments
    return f"{type(x).__name__}({', '.join(given)})"


def arguments_text(x: Any, without: Iterable[str] = ()) -> list[str]:
    """The arguments of an object's class that differ from their defaults, where the object remembers them."""
    found = []
    for p in inspect.signature(type(x)).parameters.values():
        value = getattr(x, p.name, p.default)
        if p.name in without or p.default is p.empty or _same(value, p.default):
            continue
        found.append(f"{p.name}={_value_text(value)}")
    return found


def _same(value: Any, default: Any) -> bool:
    if repr(default) == "<factory>":  # of a dataclass
        default = {}
    return value is default or (type(value) is type(default) and bool(value == default))


def _value_text(value: Any) -> str:
    if isinstance(value, Mapping) and value:
        text = "{" + ", ".join(f"{_value_text(k)}: {_value_text(v)}" for k, v in value.items()) + "}"
    elif isinstance(value, Callable) and hasattr(value, "__name__"):
        text = value.__name__
    else:
        text = repr(value)
    return text if len(text) <= _MOST_LETTERS else "..."
