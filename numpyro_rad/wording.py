"""Numbers and objects as text for people; whatever prints numbers has them from here.

A number that says nothing is not printed as one: an estimate within its own error of zero is "not distinguishable from
0", and what is too small to matter is "nothing" or "less than" something.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_MOST_LETTERS = 200  # of one argument


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
