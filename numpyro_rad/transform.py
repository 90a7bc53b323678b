"""``rad``, ``grad`` and ``value_and_grad``: a function with the same value and a randomized reverse-mode derivative.

The function is traced once. Called without being differentiated, it runs as it is. Differentiated, its linearized graph
is planned and the two sweeps become the two halves of one ``jax.custom_vjp``. Everything that the function closes over
is lifted to an argument of that ``custom_vjp``, so the result composes with ``jit``, ``vmap``, ``scan``,
``jax.checkpoint`` and with differentiation with respect to anything.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar, Unpack

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.typing import ArrayLike

from numpyro_rad.ad import _jax
from numpyro_rad.ad.graph import Graph, site_name
from numpyro_rad.ad.plan import Plan
from numpyro_rad.ad.seeds import seed_words
from numpyro_rad.ad.sweep import backward, forward
from numpyro_rad.annotations import Key, Kwargs, Params, PyTree
from numpyro_rad.mistakes import options_of
from numpyro_rad.planning.planner import Options, Planned, Planner
from numpyro_rad.tracing import Parts, traced_or_constant

T = TypeVar("T")


class Recent(Generic[T]):
    """What was found for the keys that were asked for last.

    :param most: so many are remembered.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: dict[str, T] = {}

    def of(self, key: str, find: Callable[[], T]) -> T:
        """What was found for a key, or is found now."""
        found = self._found.pop(key) if key in self._found else find()
        self._found[key] = found  # last in the order of the dictionary
        while len(self._found) > self._most:
            del self._found[next(iter(self._found))]
        return found


TEMPORARY_BYTES: Recent[int | None] = Recent(256)
"""What the compiler said of programs and plans. A program is traced again by each function that looks at it, to explain
it, to compile a step, for the next fit, so that it has no owner but the process. Each answer takes a compilation; one
that was forgotten takes another."""


class Program:
    """A traced function and, once it is differentiated, its plan.

    The operands of the program are what the function closes over, tracers of outer transformations included, followed
    by its arguments. They are passed in and never kept: what ``custom_vjp`` remembers of a program holds no array.
    """

    @classmethod
    def trace(
        cls, f: Callable[..., PyTree], args: Sequence[PyTree], planner: Planner, names: Mapping[int, str] | None = None
    ) -> tuple[Program, list[jax.Array]]:
        """The program of ``f``, and what ``f`` closes over.

        :param f: a function of arrays; whatever else it needs it closes over.
        :param args: its arguments, of which only shapes and dtypes matter.
        :param planner: from graph to plan.
        :param names: what to call an operand, by its ``id``.
        """
        jaxpr, closed_over, shapes = _jax.trace(f, *args)
        called = [(names or {}).get(id(operand), "") for operand in (*closed_over, *args)]
        return cls(jaxpr, jax.tree.structure(shapes), planner, called), closed_over

    def __init__(self, jaxpr: _jax.Jaxpr, out_tree: Any, planner: Planner, names: Sequence[str]) -> None:
        self._jaxpr, self._out_tree, self._planner, self._names = jaxpr, out_tree, planner, names
        self._at_sight: dict[tuple[bool, ...], bool] = {}
        self._planned: dict[tuple[bool, ...], Planned] = {}

    def planned(self, active: tuple[bool, ...]) -> Planned:
        """Its graph and plan for the differentiated ones among the operands."""
        if active not in self._planned:
            names = [name for name, on in zip(self._names, active, strict=True) if on]
            taken = partial(self._temporary_bytes, active)
            self._planned[active] = self._planner.planned(
                self._jaxpr, active, names, taken, self._left_at_sight(active)
            )
        return self._planned[active]

    def _temporary_bytes(self, active: tuple[bool, ...], plan: Plan) -> int | None:
        """Temporary memory of a step with a plan, compiled by itself; None where the compiler does not say.

        Whose step it is nobody here knows: it is taken to be that of an optimizer with two moments, and all that is
        differentiated to be constrained, as scales are. A gradient that slices add up is in the place of a result only
        where there are the results of a step.
        """
        types = [v.aval for v in self._jaxpr.jaxpr.invars]
        moving = [aval for aval, on in zip(types, active, strict=True) if on]

        def step(seed: jax.Array, *arrays: jax.Array) -> PyTree:
            n = len(moving)
            first, second, given = arrays[:n], arrays[n : 2 * n], arrays[2 * n :]
            sweeps = None if plan.untouched else plan
            operands = [jnp.exp(x) if on else x for x, on in zip(given, active, strict=True)]
            outs, stored = self._forward(sweeps, active, seed, operands)
            pulled = self._backward(sweeps, stored, [jnp.ones_like(o) if _floats(o) else None for o in outs])
            moved = ((raw, x) for raw, x, on in zip(given, operands, active, strict=True) if on)
            rows = zip(moved, pulled, first, second, strict=True)
            return outs, [_stepped(raw, g * x, m, v) for (raw, x), g, m, v in rows if g is not None]

        elsewhere = self._planner.prices.platform != jax.default_backend()  # compiled ahead of time
        if elsewhere or _jax.names_axes(self._jaxpr):
            return None
        key = hashlib.sha256(json.dumps(plan.to_dict()).encode()).hexdigest()  # with the fingerprint of the program
        operands = (jax.ShapeDtypeStruct((2,), jnp.uint32), *moving, *moving, *types)
        return TEMPORARY_BYTES.of(key, lambda: _jax.temporary_bytes(step, operands))

    def _left_at_sight(self, active: tuple[bool, ...]) -> bool:
        if active not in self._at_sight:
            self._at_sight[active] = self._planner.leaves_at_sight(self._jaxpr, active)
        return self._at_sight[active]

    def _sweeps(self, active: tuple[bool, ...]) -> Plan | None:
        """The plan of the sweeps; None where JAX's own reverse mode differentiates. What is left at sight is not even
        linearized."""
        if self._left_at_sight(active):
            return None
        plan = self.planned(active).plan
        return None if plan.untouched else plan

    def _forward(
        self, plan: Plan | None, active: tuple[bool, ...], seed: jax.Array, operands: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], _Stored]:
        """Values of the program, and what the backward sweep needs."""
        if plan is None:
            outs, pullback = _jax.vjp(self._jaxpr, active, operands)
            return outs, _Stored(pullback, active)
        outs, tape = forward(plan, seed, operands)
        reads = [a for v, a in zip(plan.graph.inputs, operands, strict=True) if v in plan.reads]
        return _jax.as_arrays(outs), _Stored((seed, tape, reads), active)

    def _backward(
        self, plan: Plan | None, stored: _Stored, arriving: Sequence[jax.Array | None]
    ) -> Sequence[jax.Array | None]:
        """Cotangents of the differentiated operands.

        :param arriving: cotangents of the values; None for zero.
        """
        if plan is None:
            return _jax.pull_back(stored.arrays, arriving, [v.aval for v in self._jaxpr.jaxpr.outvars])
        seed, tape, arrays = stored.arrays
        reads = dict(zip([v for v in plan.graph.inputs if v in plan.reads], arrays, strict=True))
        return backward(plan, seed, tape, reads, arriving)

    def __call__(self, seed: jax.Array, *operands: jax.Array) -> PyTree:
        """The function's value at ``operands``, with a derivative whose randomness comes from ``seed``."""

        def value(seed: jax.Array, *operands: jax.Array) -> list[jax.Array]:
            return _jax.as_arrays(_jax.evaluate(self._jaxpr, operands))

        def sweep_forward(seed: CustomVJPPrimal, *operands: CustomVJPPrimal) -> tuple[list[jax.Array], _Stored]:
            active = tuple(
                bool(o.perturbed) and jnp.issubdtype(jax.typeof(o.value).dtype, jnp.inexact) for o in operands
            )
            return self._forward(self._sweeps(active), active, seed.value, [o.value for o in operands])

        def sweep_backward(
            stored: _Stored, cotangents: Sequence[jax.Array | SymbolicZero]
        ) -> tuple[ArrayLike | None, ...]:
            arriving = [None if isinstance(c, SymbolicZero) else c for c in cotangents]
            pulled = iter(self._backward(self._sweeps(stored.active), stored, arriving))
            gradients = [next(pulled) if on else None for on in stored.active]
            avals = [v.aval for v in self._jaxpr.jaxpr.invars]
            return None, *(None if g is None else _jax.as_weak_as(g, a) for g, a in zip(gradients, avals, strict=True))

        run = jax.custom_vjp(value)
        run.defvjp(sweep_forward, sweep_backward, symbolic_zeros=True)
        return jax.tree.unflatten(self._out_tree, run(seed, *operands))


def randomized(
    f: Callable[[], PyTree], planner: Planner, seed: jax.Array, labels: Iterable[tuple[str, jax.Array]] = ()
) -> PyTree:
    """The value of ``f()``, with a derivative in all that it closes over whose randomness comes from ``seed``.

    :param labels: what to call some of the arrays that ``f`` closes over, and these.
    """
    program, operands = Program.trace(f, (), planner, {id(leaf): name for name, leaf in labels})
    return program(seed, *operands)


def named_leaves(tree: PyTree) -> list[tuple[str, jax.Array]]:
    """The leaves of a pytree with their paths in words, no two of them the same."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    short = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    often = Counter(short)  # {"a.b": x, "a": {"b": y}} has two of one name
    names = [n if often[n] == 1 else jax.tree_util.keystr(path) for n, (path, _) in zip(short, paths, strict=True)]
    return [(name, leaf) for name, (_, leaf) in zip(names, paths, strict=True)]


def site_leaves(params: Params) -> list[tuple[str, jax.Array]]:
    """The leaves of parameters, each with the site that it belongs to: a parameter may be a pytree, of a network's
    weights for instance."""
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    return [(site_name(jax.tree_util.keystr(path[:1], simple=True)), leaf) for path, leaf in paths]


@jax.tree_util.register_pytree_node_class
class _Stored:
    """What ``custom_vjp`` carries from one sweep to the other: arrays, and which operands were differentiated."""

    def __init__(self, arrays: PyTree, active: tuple[bool, ...]) -> None:
        self.arrays, self.active = arrays, active

    def tree_flatten(self) -> tuple[tuple[PyTree], tuple[bool, ...]]:
        return (self.arrays,), self.active

    @classmethod
    def tree_unflatten(cls, active: tuple[bool, ...], children: tuple[PyTree]) -> _Stored:
        return cls(children[0], active)


@options_of(Planner)
def rad(f: Callable, **options: Unpack[Options]) -> Callable:
    """``f`` with a randomized reverse-mode derivative that stores less (Oktay et al., ICLR 2021).

    The value is that of ``f``. Under ``jax.grad`` and its kin the residuals are recomputed where that is cheap and
    stored as unbiased random codes elsewhere, so that the expectation of the gradient over ``key`` is the exact
    gradient.

    :param f: a function of arrays (any pytree) that JAX can differentiate in reverse mode.
    :param options: those of :class:`numpyro_rad.planning.Planner`, above all ``memory_budget="64MiB"``, the most bytes
        that may be held between the sweeps (the arguments of ``f`` do not count), or ``codec=``. Without any, a program
        with less than 16 MiB of residuals is left to JAX's own reverse mode, and a larger one runs in slices or is
        rounded to 4 bits where the bytes saved are worth the time.
    :return: a function ``g(key, *args, **kwargs)``. ``key`` is one JAX PRNG key, typed or raw, from which only the
        derivative draws: use a fresh one for every call.
    :raises TypeError: for a wrong option or key.
    :raises ValueError: for an option that cannot be read, or for two that exclude each other.
    :raises BudgetError: on differentiation, if no plan meets the budget.

    Example::

        g = rad(loss, memory_budget="64MiB")
        value, gradient = jax.value_and_grad(g, argnums=1)(key, params, batch)
    """
    planner = Planner(**options)

    @functools.wraps(f)
    def with_key(key: Key, /, *args: Any, **kwargs: Any) -> PyTree:
        labels = named_leaves({**{str(i): arg for i, arg in enumerate(args)}, **kwargs})
        return randomized(lambda: f(*args, **kwargs), planner, path_seed(key), labels)

    with_key.planned = partial(_planned, f, planner)  # type: ignore[attr-defined]
    with_key.planner = planner  # type: ignore[attr-defined]
    return with_key


def _planned(
    f: Callable[..., PyTree], planner: Planner, args: tuple, kwargs: Kwargs, argnums: int | Sequence[int]
) -> tuple[Plan, list[str]]:
    """Plan of ``f`` for differentiation with respect to ``argnums``, and the names of the differentiated arrays."""
    positions = [range(len(args))[i] for i in ((argnums,) if isinstance(argnums, int) else argnums)]

    def of_chosen(chosen: dict[int, PyTree]) -> PyTree:
        return f(*(chosen.get(i, a) for i, a in enumerate(args)), **kwargs)

    taken = Closure(of_chosen, {i: args[i] for i in positions}, planner)
    return taken.plan, taken.labels


class Closure:
    """The program that :func:`randomized` makes of ``f(tree, *others)`` when ``tree`` is differentiated, outside of it.

    :ivar program: the program.
    :ivar operands: its operands, as they are.
    :ivar active: which of them are differentiated.
    :ivar leaves: the positions of the differentiated arrays among the leaves of ``tree``, in the order of the operands.
    :ivar labels: what they are called, in the same order.
    """

    def __init__(
        self,
        f: Callable[..., PyTree],
        tree: PyTree,
        planner: Planner,
        *others: PyTree,
        labels: Sequence[str] | None = None,
    ) -> None:
        """Trace ``f(tree, *others)``.

        :param others: what ``f`` gets besides; its arrays are traced too, unless ``f`` looks at their numbers, and the
            rest is handed over as it is.
        :param labels: what to call the leaves of ``tree``, by default their paths.
        """
        self._f, self._planner = f, planner
        self._labels = [name for name, _ in named_leaves(tree)] if labels is None else labels
        self._parts, self.program, self._origins = traced_or_constant(
            lambda parts: (parts, *self._trace(parts, tree, others)), others
        )
        self.operands = self._operands(self._origins, tree, others)
        leaves = jax.tree.leaves(tree)
        moves = [at is not None and at < len(leaves) and _floats(leaves[at]) for at, _ in self._origins]
        self.active = tuple(moves)
        self.leaves = [at for (at, _), on in zip(self._origins, moves, strict=True) if on and at is not None]
        self.labels = [self._labels[at] for at in self.leaves]

    def _trace(self, parts: Parts, tree: PyTree, others: tuple) -> tuple[Program, list[tuple[int | None, Any]]]:
        """The program, and where each of its operands is from: its place among leaves and arrays, or the operand."""
        leaves, treedef = jax.tree.flatten(tree)
        found: list[tuple[Program, list[tuple[int | None, Any]]]] = []

        def body(*arrays: jax.Array) -> None:
            moving = arrays[: len(leaves)]
            whole, rest = treedef.unflatten(moving), parts.merge(arrays[len(leaves) :])
            called = {id(x): label for x, label in zip(moving, self._labels, strict=True)}
            program, closed_over = Program.trace(lambda: self._f(whole, *rest), (), self._planner, called)
            places = {id(x): i for i, x in enumerate(arrays)}
            found.append((program, [(places.get(id(c)), None if id(c) in places else c) for c in closed_over]))

        jax.eval_shape(body, *leaves, *parts.arrays(others))
        return found[0]

    def _operands(self, origins: list[tuple[int | None, Any]], tree: PyTree, others: tuple) -> list[jax.Array]:
        values = [*jax.tree.leaves(tree), *self._parts.arrays(others)]
        return [value if at is None else values[at] for at, value in origins]

    def operands_at(self, tree: PyTree, *others: PyTree) -> list[jax.Array]:
        """The operands at another ``tree`` and other ``others`` of the same structure, shapes and dtypes."""
        origins = self._origins
        if others and not self._parts.has_arrays:  # these are constants, of another program of the same graph
            _, origins = self._trace(Parts(others, traced=False), tree, others)
        return self._operands(origins, tree, others)

    @property
    def graph(self) -> Graph:
        """The linearized graph of the program."""
        return self.program.planned(self.active).graph

    @property
    def plan(self) -> Plan:
        """The plan of the program."""
        return self.program.planned(self.active).plan


def _floats(x: ArrayLike) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact))


def _stepped(x: jax.Array, gradient: jax.Array, first: jax.Array, second: jax.Array) -> list[jax.Array]:
    """A parameter and its moments after a step of Adam (Kingma and Ba, 2015), about."""
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient**2
    return [x - 1e-3 * first / (jnp.sqrt(second) + 1e-8), first, second]


def path_seed(key: Key) -> jax.Array:
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


@options_of(Planner)
def value_and_grad(
    f: Callable,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **options: Unpack[Options],
) -> Callable:
    """Value and randomized gradient: ``jax.value_and_grad`` of :func:`rad`, key first.

    :param f: a scalar function; with ``has_aux`` it returns ``(scalar, anything)``.
    :param argnums: the arguments of ``f`` to differentiate, counted without the key.
    :param options: see :func:`rad`.
    :return: a function ``(key, *args, **kwargs) -> (value, gradient)``; the value is exact, the gradient unbiased.
    :raises TypeError: if ``f`` does not return a real scalar.

    Example::

        value, gradient = value_and_grad(loss)(jax.random.key(0), params, batch)
    """
    with_key = rad(f, **options)

    @functools.wraps(f)
    def checked(key: Key, /, *args: Any, **kwargs: Any) -> PyTree:
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


@options_of(Planner)
def grad(
    f: Callable,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **options: Unpack[Options],
) -> Callable:
    """Randomized gradient: ``jax.grad`` of :func:`rad`, key first. Parameters as in :func:`value_and_grad`.

    :return: a function ``(key, *args, **kwargs) -> gradient``, or ``(gradient, aux)`` with ``has_aux``.

    Example::

        gradient = grad(loss, memory_budget="64MiB")(jax.random.key(0), params, batch)
    """
    both = value_and_grad(f, argnums, has_aux, **options)

    @functools.wraps(f)
    def gradient(key: Key, /, *args: Any, **kwargs: Any) -> PyTree:
        value, result = both(key, *args, **kwargs)
        return (result, value[1]) if has_aux else result

    return gradient
