"""What a caller's mistake is told in: values in a few words, and the option that was meant where a name is misspelt.

A message says what was handed over, so it has to be short whatever that is: :func:`shown`. Functions with options are
decorated with :func:`names_checked`, :func:`options_of` where a dataclass says what the options are, or
:func:`kwargs_checked` where all other names belong to the model.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from numpyro_rad.annotations import Kwargs

F = TypeVar("F", bound=Callable[..., Any])

T = TypeVar("T")

_MOST_LETTERS = 60  # of a value in a message; longer ones are named by their type

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def shown(x: Any) -> str:
    """A value in a message: as Python writes it where that is short, otherwise what it is."""
    if isinstance(x, type):
        return f"the class {x.__name__}"
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        dtype, shape = str(x.dtype), tuple(x.shape)
        if dtype.startswith("key<"):
            return "a JAX PRNG key" if shape == () else f"JAX PRNG keys of shape {shape}"
        return f"{'an' if dtype[0] in 'aeio' else 'a'} {dtype} array of shape {shape}"
    if inspect.isroutine(x):
        return f"the function {getattr(x, '__name__', '?')}"
    text = repr(x)
    if len(text) <= _MOST_LETTERS and "\n" not in text and " at 0x" not in text:
        return text
    entries = f" of {len(x)} entries" if isinstance(x, (list, tuple, set, Mapping)) and not _is_named(x) else ""
    name = type(x).__name__
    vowel = name[0] in "AEIOaeio" or (name[:3].isupper() and name[0] in "FHLMNSX")  # as in SVIState
    return f"{'an' if vowel else 'a'} {name}{entries}"


def _is_named(x: object) -> bool:
    return hasattr(x, "_fields")


def is_key(x: Any) -> bool:
    """Whether it is one PRNG key of JAX, typed or raw."""
    if not (hasattr(x, "dtype") and hasattr(x, "shape")):
        return False
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x.shape == ()
    return x.dtype == jnp.uint32 and len(x.shape) == 1


def check_fit(where: str, svi: Any, svi_state: Any) -> None:
    """Whether these are an initialised ``SVI`` and its state.

    :param where: the function that needs them.
    :raises TypeError: if they are not.
    :raises ValueError: before ``svi.init``, which learns the constraints of the parameters.
    """
    if not hasattr(svi, "constrain_fn"):
        swapped = "svi and svi_state are swapped: write" if hasattr(svi_state, "constrain_fn") else "Write"
        raise TypeError(f"{where}: svi is {shown(svi)}, not an SVI. {swapped} {where}(svi, svi_state, ...).")
    check_state(where, svi_state)
    check_initialised(where, svi)


def check_initialised(where: str, svi: Any) -> None:
    """Whether an ``SVI`` knows the constraints of its parameters.

    :raises ValueError: before ``svi.init``.
    """
    if svi.constrain_fn is None:
        raise ValueError(
            f"{where}: this SVI has not been initialised and does not know the constraints of its parameters. Call "
            "svi.init(rng_key, *args) first, also if a state is at hand."
        )


def check_state(where: str, svi_state: Any) -> None:
    """Whether it is a state of SVI.

    :raises TypeError: if it is not.
    """
    if not hasattr(svi_state, "optim_state"):
        inner = hasattr(getattr(svi_state, "state", None), "optim_state")
        advice = "Pass its .state." if inner else "Pass what svi.init or svi.update returned, before the arguments."
        raise TypeError(f"{where}: svi_state is {shown(svi_state)}, not a state of SVI. {advice}")


def meant(name: str, known: Iterable[str]) -> str:
    """A question that names what is known and closest to a misspelt name; empty if nothing is close."""
    close = difflib.get_close_matches(name.lower(), list(known), 1)
    return f"Did you mean {close[0]}=?" if close else ""


def misspelt(where: str, name: str, known: Iterable[str]) -> TypeError:
    """What to raise for an option that does not exist."""
    known = list(known)
    advice = meant(name, known) or f"There are {', '.join(f'{k}=' for k in known)}."
    return TypeError(f"{where} has no option {name}=. {advice}")


def names_checked(f: F, known: Iterable[str] = ()) -> F:
    """``f``, which names the option that was meant where one is misspelt.

    :param known: its options besides those that its signature names.
    """
    names = [p.name for p in inspect.signature(f).parameters.values() if p.kind in _NAMED and p.name != "self"]
    names += [name for name in known if name not in names]
    called, taken = f.__qualname__.removesuffix(".__init__"), frozenset(names)

    @functools.wraps(f)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in taken:
                raise misspelt(called, name, names)
        return f(*args, **kwargs)

    return checked  # type: ignore[return-value]


def check_names(method: Callable[..., Any], fns: tuple[Callable[..., Any], ...], kwargs: Kwargs) -> None:
    """Keyword arguments for model and guide that are misspelt options.

    :param method: whose options they may have been meant for.
    :raises TypeError: if model or guide cannot take one that is spelled much like an option.
    """
    options = [p.name for p in inspect.signature(method).parameters.values() if p.kind in _NAMED and p.name != "self"]
    for name in kwargs:
        question = meant(name, options)
        refusing = next((fn for fn in fns if not _takes(fn, name)), None)
        if question and refusing is not None:
            called = method.__qualname__.removesuffix(".__init__")
            raise TypeError(f"{called} has no option {name}=, and {shown(refusing)} does not take it. {question}")


def _takes(fn: Callable[..., Any], name: str) -> bool:
    """Whether a keyword argument can be handed to it, as far as one can see."""
    try:
        parameters = inspect.signature(fn, follow_wrapped=False).parameters
    except (TypeError, ValueError):
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def kwargs_checked(f: F) -> F:
    """``f`` of an ``SVI`` whose ``**kwargs`` go to model and guide, with a word where one is a misspelt option.

    The ``SVI`` is one of the first two arguments, or what the first one has as ``svi``.
    """
    own = frozenset(p.name for p in inspect.signature(f).parameters.values() if p.kind in _NAMED)

    @functools.wraps(f)
    def checked(*args: Any, **kwargs: Any) -> Any:
        first = (*args[:2], *(getattr(x, "svi", None) for x in args[:1]), kwargs.get("svi"))
        svi = next((x for x in first if hasattr(x, "model") and hasattr(x, "guide")), None)
        if svi is not None:
            check_names(f, (svi.model, svi.guide), {name: x for name, x in kwargs.items() if name not in own})
        return f(*args, **kwargs)

    return checked  # type: ignore[return-value]


def fields_checked(cls: type[T]) -> type[T]:
    """A dataclass whose misspelt fields are told of."""
    cls.__init__ = names_checked(cls.__init__)
    return cls


def options_of(source: type) -> Callable[[F], F]:
    """A decorator of a function whose ``**options`` are the fields of a dataclass: its signature names each of them."""

    def spelled_out(f: F) -> F:
        more = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default if field.default is not dataclasses.MISSING else field.default_factory(),  # type: ignore
                annotation=field.type,
            )
            for field in dataclasses.fields(source)
        ]
        signature = inspect.signature(f)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        checked = names_checked(f, [p.name for p in more])
        checked.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return checked

    return spelled_out
