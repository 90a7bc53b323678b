"""What may be handed to ``RAD_SVI``: each mistake is told where it is made, before anything is traced or compiled.

Whatever a model may want as data is let through: lists of sizes, strings, objects of one's own. If the model then fails
at something that looks like data in the wrong shape, :func:`blamed` says so beside the model's own error.
"""

from __future__ import annotations

import contextlib
import inspect
import numbers
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.elbo import ELBO

from numpyro_rad.annotations import Kwargs
from numpyro_rad.diagnostics.tracking import Tracking
from numpyro_rad.mistakes import is_key, shown
from numpyro_rad.planning.planner import parse_bytes
from numpyro_rad.training.checkpoints import Checkpoint
from numpyro_rad.training.validation import Plateau

_PARTS, _RUN = "RAD_SVI(model, guide, optim, loss)", "run(rng_key, num_steps, *args)"


def check_parts(model: Any, guide: Any, optim: Any, loss: Any, tracking: Any, calibrate: Any) -> None:
    """The arguments of ``RAD_SVI`` itself.

    :raises TypeError: for one of the wrong type.
    """
    if isinstance(model, AutoGuide) and callable(guide) and not isinstance(guide, (AutoGuide, type)):
        raise TypeError(f"model is {shown(model)} and guide {shown(guide)}: they are swapped. Write {_PARTS}.")
    for name, fn in (("model", model), ("guide", guide)):
        if isinstance(fn, type) and issubclass(fn, AutoGuide):
            raise TypeError(f"{name} is {shown(fn)} itself. Make a guide of your model: {fn.__name__}(model).")
        if not callable(fn):
            raise TypeError(f"{name} is {shown(fn)}: a function is expected. Write {_PARTS}.")
    if isinstance(optim, ELBO):
        raise TypeError(f"optim is {shown(optim)}, an ELBO: optim and loss are swapped. Write {_PARTS}.")
    if isinstance(loss, type):
        raise TypeError(f"loss is {shown(loss)} itself. Make one: loss={loss.__name__}().")
    if loss is not None and not callable(getattr(loss, "loss", None)):
        size = f" For a budget write RAD_ELBO(memory_budget={loss!r})." if isinstance(loss, (str, int)) else ""
        raise TypeError(f"loss={shown(loss)} is not an ELBO. Pass one, such as RAD_ELBO() or Trace_ELBO().{size}")
    if tracking is not None and not isinstance(tracking, Tracking):
        raise TypeError(
            f"tracking={shown(tracking)}: a Tracking is expected, such as Tracking(interval=200), or None for none."
        )
    if calibrate is not None and not isinstance(calibrate, bool):
        try:
            parse_bytes(calibrate, "calibrate")
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"calibrate={shown(calibrate)}: True, False or None is expected, or a size such as '2GiB'."
            ) from error


def check_key(key: Any, called: str, *others: Any) -> None:
    """One PRNG key comes first.

    :param called: what the caller should have written.
    :param others: the arguments behind it, among which the key may be.
    :raises TypeError: if ``key`` is not one.
    """
    if is_key(key):
        return
    where = next((i for i, x in enumerate(others) if is_key(x)), None)
    if hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        advice = "Pass one of them, or jax.vmap over all."
    elif where is not None:
        advice = f"The key is argument {where + 2} here and has to come first: {called}."
    elif isinstance(key, numbers.Integral) or key is None:
        advice = f"Pass jax.random.key({0 if key is None else key})."
    else:
        advice = f"It comes first: {called}, with jax.random.key(0) for example."
    raise TypeError(f"rng_key={shown(key)}: one JAX PRNG key is expected. {advice}")


def check_run(
    rng_key: Any, num_steps: Any, args: tuple, batches: Any, stop: Any, checkpoint: Any, validate: Any
) -> None:
    """The arguments of ``RAD_SVI.run`` that are not the model's.

    :raises TypeError: for one of the wrong type.
    :raises ValueError: for fewer than one step, or a rule to stop by that does not exist.
    """
    check_key(rng_key, _RUN, num_steps, *args)
    if isinstance(num_steps, bool) or not isinstance(num_steps, numbers.Integral):
        whole = isinstance(num_steps, float) and num_steps.is_integer()
        advice = f"Write {int(num_steps)}." if whole else f"It comes second: {_RUN}."
        raise TypeError(f"num_steps={shown(num_steps)}: a whole number of steps is expected. {advice}")
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: at least one step is needed.")
    if isinstance(stop, type):
        raise TypeError(f"stop is {shown(stop)} itself. Make one: stop={stop.__name__}().")
    if isinstance(stop, Plateau):
        if validate is None:
            raise ValueError(f"stop={stop}: it looks at held-out data, and there are none. Pass validate=(x, y).")
    elif isinstance(stop, str) or not (stop is None or callable(stop)):
        if stop != "converged":
            rules = '"converged", a Plateau or a function (step, losses) -> bool'
            raise ValueError(f"stop={shown(stop)}: {rules} is expected.")
    elif stop is not None:
        _check_call("stop", stop, 2, "step and losses", "lambda step, losses: ...")
    if not (checkpoint is None or isinstance(checkpoint, (Checkpoint, str, Path))):
        raise TypeError(
            f"checkpoint={shown(checkpoint)}: the name of a folder is expected, or Checkpoint(folder, every=...)."
        )
    if batches is not None:
        _check_batches(batches)


def checked_callbacks(callbacks: Any) -> tuple[Callable, ...]:
    """The callbacks of a run.

    :raises TypeError: if they are no functions of one argument.
    """
    expected = "a list of functions of a CallbackInfo is expected"
    if (
        isinstance(callbacks, (str, bytes, Mapping))
        or not hasattr(callbacks, "__iter__")
        or isinstance(callbacks, type)
    ):
        name = getattr(callbacks, "__name__", "f") if callable(callbacks) else "f"
        raise TypeError(f"callbacks={shown(callbacks)}: {expected}. Write callbacks=[{name}].")
    callbacks = tuple(callbacks)
    for i, callback in enumerate(callbacks):
        where = f"callbacks[{i}]"
        if isinstance(callback, type):
            raise TypeError(f"{where} is {shown(callback)} itself. Make one: {callback.__name__}(...).")
        if not callable(callback):
            raise TypeError(f"{where}={shown(callback)}: {expected}, such as lambda info: print(info.step, info.loss).")
        _check_call(where, callback, 1, "one CallbackInfo", "lambda info: f(info.step, info.loss)")
    return callbacks


def _check_call(where: str, f: Callable, number: int, gets: str, example: str) -> None:
    """Whether ``f`` takes so many arguments, as far as its signature says."""
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):  # of some built-in functions
        return
    try:
        signature.bind(*[None] * number)
    except TypeError as error:
        raise TypeError(f"{where}={shown(f)} takes {signature} and gets {gets}. Write {example}.") from error


def _check_batches(batches: Any) -> None:
    if isinstance(batches, type):
        raise TypeError(f"batches is {shown(batches)} itself. Make one: {batches.__name__}(...).")
    if isinstance(batches, Mapping):
        raise TypeError(
            f"batches={shown(batches)}: an iterable of batches is expected. If it is one batch, write batches=[batch]."
        )
    if callable(batches) and not hasattr(batches, "__iter__"):
        name = getattr(batches, "__name__", "f")
        once = f", or batches={name}() to read it once" if inspect.isgeneratorfunction(batches) else ""
        _check_call("batches", batches, 1, "the number of the epoch", f"batches=lambda epoch: {name}(){once}")
    if isinstance(batches, (tuple, list)) and len(batches) > 1 and all(hasattr(x, "dtype") for x in batches):
        kinds = {(str(x.dtype), len(x.shape)) for x in batches}
        if len(kinds) > 1:
            what = ", ".join(f"{x.dtype}{list(x.shape)}" for x in batches[:4])
            raise TypeError(
                f"batches is a {type(batches).__name__} of arrays, {what}, each of which would be a batch. Arguments "
                "of one batch belong into a tuple: batches=[(x, y)]. Without minibatches hand them to run: "
                "run(rng_key, num_steps, x, y)."
            )


@contextlib.contextmanager
def blamed(model: Any, args: tuple, kwargs: Kwargs, batches: Any = None) -> Iterator[None]:
    """Where a model fails, say what looks wrong about its arguments.

    :raises TypeError: from the model's error, if something looks wrong.
    """
    try:
        yield
    except (TypeError, AttributeError, ValueError, IndexError) as error:
        odd = [f"{name} is {shown(x)}, {why}" for name, x in _by_name(model, args, kwargs) if (why := _oddity(x))]
        if hasattr(batches, "dtype"):
            odd.append(
                f"batches is {shown(batches)}, of which each row is a batch: for all rows at once write "
                "batches=[(x,)], or hand them to run"
            )
        if not odd:
            raise
        raise TypeError(
            f"{getattr(model, '__name__', 'the model')} failed at its arguments ({type(error).__name__}: {error}): "
            f"{'; '.join(odd)}."
        ) from error


def _by_name(model: Any, args: tuple, kwargs: Kwargs) -> list[tuple[str, Any]]:
    try:
        return list(inspect.signature(model).bind(*args, **kwargs).arguments.items())
    except (TypeError, ValueError):
        return [*((f"argument {i + 1}", x) for i, x in enumerate(args)), *kwargs.items()]


def _oddity(x: Any) -> str:
    """What may be wrong about data that is no array; empty if nothing."""
    if hasattr(x, "dtype") and getattr(x.dtype, "kind", "f") in "OUSMm":
        return "whose dtype JAX does not have: convert it to numbers"
    if hasattr(x, "to_numpy"):
        return "which is no array: pass its .to_numpy()"
    if isinstance(x, (list, tuple)) and len(x) and not hasattr(x, "_fields") and _of_numbers(x):
        return "and models calculate with arrays: pass jnp.asarray of it"
    return ""


def _of_numbers(x: Any) -> bool:
    first = x[0]
    return _of_numbers(first) if isinstance(first, (list, tuple)) and len(first) else isinstance(first, numbers.Number)
