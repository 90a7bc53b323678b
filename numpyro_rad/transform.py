"""``rad``, ``grad`` and ``value_and_grad``: a function with the same value and a randomized reverse-mode derivative.

The function is traced once. Called without being differentiated, it runs as it is. Differentiated, its linearized graph
is planned and the two sweeps become the two halves of one ``jax.custom_vjp``. Everything that the function closes over
is lifted to an argument of that ``custom_vjp``, so the result composes with ``jit``, ``vmap``, ``scan``,
``jax.checkpoint`` and with differentiation with respect to anything.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from numpyro_rad import _jax
from numpyro_rad.codecs import Codec, StochasticRound
from numpyro_rad.graph import Graph
from numpyro_rad.linearize import linearize
from numpyro_rad.plan import Plan, balanced_plan, make_plan, plan_within, uniform
from numpyro_rad.seeds import seed_words
from numpyro_rad.sweep import backward, forward

DEFAULT_CODEC = StochasticRound(bits=4)
"""Four bits: an eighth of the bytes, for less than 1 % more variance of SVI's gradient (README, "Measured")."""

_UNITS = {"": 1, "B": 1} | {f"{p}{u}": b**e for u, b in (("B", 1000), ("iB", 1024)) for e, p in enumerate("kMGT", 1)}
_UNITS |= {"KB": 1000, "KiB": 1024}


def parse_bytes(size: int | str) -> int:
    """A number of bytes from an int or a string such as ``"64MiB"`` or ``"1.5 GB"``.

    :raises TypeError: if ``size`` is neither.
    :raises ValueError: if it is negative or cannot be read.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(
            f"memory_budget={size!r}: a number of bytes is expected. Pass an int, or a string such as '256MiB'."
        )
    if isinstance(size, int):
        number, unit = float(size), ""
    else:
        match = re.fullmatch(r"\s*([-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)\s*", size)
        if match is None or match[2] not in _UNITS or math.isinf(float(match[1])):
            raise ValueError(
                f"memory_budget={size!r} cannot be read as a number of bytes. Write a number and one of the units "
                "B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024), for example '256MiB'."
            )
        number, unit = float(match[1]), match[2]
    if number < 0:
        raise ValueError(f"memory_budget={size!r} is negative: no plan stores less than nothing. Try '64MiB'.")
    return int(number * _UNITS[unit])


Planner = Callable[[Graph], Plan]


def planner(codec: Codec | None = None, memory_budget: int | str | None = None) -> Planner:
    """The function from graph to plan that the two options ask for.

    :raises TypeError: if ``codec`` is no codec or the budget is neither int nor string.
    :raises ValueError: if both are given, or the budget cannot be read.
    """
    if codec is not None and not isinstance(codec, Codec):
        raise TypeError(
            f"codec={codec!r} is not a codec. Pass an instance such as StochasticRound(bits=4), SampleAxis(keep=0.1), "
            "RandomProjection(keep=0.1), or Keep() for exact gradients."
        )
    if memory_budget is None:
        codecs = uniform(DEFAULT_CODEC if codec is None else codec)
        return partial(balanced_plan if codec is None else make_plan, codecs=codecs)
    if codec is not None:
        raise ValueError("codec= and memory_budget= exclude each other: a budget chooses its codecs. Pass one of them.")
    budget = parse_bytes(memory_budget)
    return partial(plan_within, budget_bytes=budget)


class Program:
    """A traced function and, once it is differentiated, its plan.

    The operands of the program are what the function closes over, tracers of outer transformations included, followed
    by its arguments. They are passed in and never kept: what ``custom_vjp`` remembers of a program holds no array.

    """

    @classmethod
    def trace(cls, f: Callable, args: Sequence[Any], make_plan: Planner) -> tuple[Program, list[Any]]:
        """The program of ``f``, and what ``f`` closes over.

        :param f: a function of arrays; whatever else it needs it closes over.
        :param args: its arguments, of which only shapes and dtypes matter.
        :param make_plan: from graph to plan.
        """
        jaxpr, closed_over, shapes = _jax.trace(f, *args)
        return cls(jaxpr, jax.tree.structure(shapes), make_plan), closed_over

    def __init__(self, jaxpr: _jax.Jaxpr, out_tree: Any, make_plan: Planner) -> None:
        self._jaxpr, self._out_tree, self._make_plan = jaxpr, out_tree, make_plan
        self._plans: dict[tuple[bool, ...], Plan] = {}

    def plan(self, active: tuple[bool, ...]) -> Plan:
        """The plan for the differentiated ones among the operands."""
        if active not in self._plans:
            self._plans[active] = self._make_plan(linearize(self._jaxpr, active))
        return self._plans[active]

    def __call__(self, seed: Any, *operands: Any) -> Any:
        """The function's value at ``operands``, with a derivative whose randomness comes from ``seed``."""

        def value(seed: Any, *operands: Any) -> list[Any]:
            return _as_arrays(_jax.evaluate(self._jaxpr, operands))

        def sweep_forward(seed: Any, *operands: Any) -> tuple[list[Any], _Stored]:
            active = tuple(
                bool(o.perturbed) and jnp.issubdtype(jax.typeof(o.value).dtype, jnp.inexact) for o in operands
            )
            plan = self.plan(active)
            arrays = [o.value for o in operands]
            outs, tape = forward(plan, seed.value, arrays)
            reads = [a for v, a in zip(plan.graph.inputs, arrays, strict=True) if v in plan.reads]
            return _as_arrays(outs), _Stored((seed.value, tape, reads), active)

        def sweep_backward(stored: _Stored, cotangents: Sequence[Any]) -> tuple[Any, ...]:
            plan = self.plan(stored.active)
            seed, tape, arrays = stored.arrays
            reads = dict(zip([v for v in plan.graph.inputs if v in plan.reads], arrays, strict=True))
            arriving = [None if isinstance(c, SymbolicZero) else c for c in cotangents]
            pulled = iter(backward(plan, seed, tape, reads, arriving))
            gradients = [next(pulled) if on else None for on in stored.active]
            avals = [v.aval for v in plan.graph.inputs]
            return None, *(None if g is None else _jax.as_weak_as(g, a) for g, a in zip(gradients, avals, strict=True))

        run = jax.custom_vjp(value)
        run.defvjp(sweep_forward, sweep_backward, symbolic_zeros=True)
        return jax.tree.unflatten(self._out_tree, run(seed, *operands))


def randomized(f: Callable, make: Planner, seed: Any) -> Any:
    """The value of ``f()``, with a derivative in all that it closes over whose randomness comes from ``seed``."""
    program, operands = Program.trace(f, (), make)
    return program(seed, *operands)


def _as_arrays(results: Sequence[Any]) -> list[Any]:
    """Results of a program, of which a constant one is a literal until here."""
    return [r if isinstance(r, jax.Array) else jnp.asarray(r) for r in results]


@jax.tree_util.register_pytree_node_class
class _Stored:
    """What ``custom_vjp`` carries from one sweep to the other: arrays, and which operands were differentiated."""

    def __init__(self, arrays: Any, active: tuple[bool, ...]) -> None:
        self.arrays, self.active = arrays, active

    def tree_flatten(self) -> tuple[tuple[Any], tuple[bool, ...]]:
        return (self.arrays,), self.active

    @classmethod
    def tree_unflatten(cls, active: tuple[bool, ...], children: Any) -> _Stored:
        return cls(children[0], active)


def rad(f: Callable, *, codec: Codec | None = None, memory_budget: int | str | None = None) -> Callable:
    """``f`` with a randomized reverse-mode derivative that stores less (Oktay et al., ICLR 2021).

    The value is that of ``f``. Under ``jax.grad`` and its kin the residuals are recomputed where that is cheap and
    stored as unbiased random codes elsewhere, so that the expectation of the gradient over ``key`` is the exact
    gradient.

    :param f: a function of arrays (any pytree) that JAX can differentiate in reverse mode.
    :param codec: one codec wherever a code is unbiased and smaller; ``Keep()`` for exact gradients by recomputation and
        fused derivatives alone. Default: ``StochasticRound(bits=4)``.
    :param memory_budget: instead of ``codec``, the most bytes that may be stored between the sweeps, an int or a string
        such as ``"64MiB"``; codes, scales and kept values count, the arguments of ``f`` do not.
    :return: a function ``g(key, *args, **kwargs)``. ``key`` is one JAX PRNG key, typed or raw, from which only the
        derivative draws: use a fresh one for every call.
    :raises TypeError: for a wrong ``codec``, ``memory_budget`` or key.
    :raises ValueError: for a budget that cannot be read, or both options at once.
    :raises BudgetError: on differentiation, if no plan meets the budget.

    Example::

        g = rad(loss, codec=StochasticRound(bits=2))
        value, gradient = jax.value_and_grad(g, argnums=1)(key, params, batch)
    """
    make = planner(codec, memory_budget)

    @functools.wraps(f)
    def with_key(key: Any, /, *args: Any, **kwargs: Any) -> Any:
        return randomized(lambda: f(*args, **kwargs), make, path_seed(key))

    with_key.planned = partial(_planned, f, make)  # type: ignore[attr-defined]
    return with_key


def _planned(f: Callable, make: Planner, args: tuple, kwargs: dict[str, Any], argnums: int | Sequence[int]) -> tuple:
    """Plan of ``f`` for differentiation with respect to ``argnums``, and the names of the differentiated arrays."""
    positions = [range(len(args))[i] for i in ((argnums,) if isinstance(argnums, int) else argnums)]

    def of_chosen(chosen: dict[int, Any]) -> Any:
        return f(*(chosen.get(i, a) for i, a in enumerate(args)), **kwargs)

    return plan_of(of_chosen, {i: args[i] for i in positions}, make)


def plan_of(f: Callable, tree: Any, make: Planner) -> tuple[Plan, list[str]]:
    """The plan of ``f`` for differentiation with respect to the floating-point arrays of ``tree``, and their names."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [leaf for _, leaf in paths]
    program, closed_over = Program.trace(lambda *leaves: f(jax.tree.unflatten(treedef, leaves)), leaves, make)
    moving = [bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact)) for x in leaves]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    plan = program.plan((*[False] * len(closed_over), *moving))
    return plan, [name for name, on in zip(names, moving, strict=True) if on]


def path_seed(key: Any) -> Any:
    """The codecs' seed from a user's key.

    :raises TypeError: if ``key`` is not one JAX PRNG key.
    """
    try:
        return seed_words(key)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"the first argument must be one JAX PRNG key, got {type(key).__name__}: only the derivative draws "
            "from it. Pass jax.random.key(seed), or jax.vmap over a batch of keys."
        ) from error


def value_and_grad(
    f: Callable,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    codec: Codec | None = None,
    memory_budget: int | str | None = None,
) -> Callable:
    """Value and randomized gradient: ``jax.value_and_grad`` of :func:`rad`, key first.

    :param f: a scalar function; with ``has_aux`` it returns ``(scalar, anything)``.
    :param argnums: the arguments of ``f`` to differentiate, counted without the key.
    :param codec: see :func:`rad`.
    :param memory_budget: see :func:`rad`.
    :return: a function ``(key, *args, **kwargs) -> (value, gradient)``; the value is exact, the gradient unbiased.
    :raises TypeError: if ``f`` does not return a real scalar.

    Example::

        value, gradient = value_and_grad(loss)(jax.random.key(0), params, batch)
    """
    with_key = rad(f, codec=codec, memory_budget=memory_budget)

    @functools.wraps(f)
    def checked(key: Any, /, *args: Any, **kwargs: Any) -> Any:
        out = with_key(key, *args, **kwargs)
        value = out[0] if has_aux else out
        if not (hasattr(value, "shape") and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating)):
            kind = f"shape {value.shape}, dtype {value.dtype}" if hasattr(value, "shape") else type(value).__name__
            raise TypeError(
                f"grad needs a function with a real scalar value, but {getattr(f, '__name__', 'f')} returned {kind}. "
                "Sum or average it, or use rad(f) with jax.vjp."
            )
        return out

    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    shifted = tuple(i + 1 if i >= 0 else i for i in positions)  # past the key; from the end nothing shifts
    shifted = shifted[0] if isinstance(argnums, int) else shifted
    return jax.value_and_grad(checked, shifted, has_aux)


def grad(
    f: Callable,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    codec: Codec | None = None,
    memory_budget: int | str | None = None,
) -> Callable:
    """Randomized gradient: ``jax.grad`` of :func:`rad`, key first. Parameters as in :func:`value_and_grad`.

    :return: a function ``(key, *args, **kwargs) -> gradient``, or ``(gradient, aux)`` with ``has_aux``.

    Example::

        gradient = grad(loss, memory_budget="64MiB")(jax.random.key(0), params, batch)
    """
    both = value_and_grad(f, argnums, has_aux, codec=codec, memory_budget=memory_budget)

    @functools.wraps(f)
    def gradient(key: Any, /, *args: Any, **kwargs: Any) -> Any:
        value, result = both(key, *args, **kwargs)
        return (result, value[1]) if has_aux else result

    return gradient
