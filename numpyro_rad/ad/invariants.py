"""Take out of loops what is the same in every iteration: it runs once, before its loop.

What the body of a ``scan`` computes from constants of the loop alone, or from carries that it hands on as they came,
belongs to no iteration. Inside, each iteration would store its residuals; outside there is one of each. Inner loops are
done first, so what is invariant of several leaves them all. What acts stays where it is, and so do rearrangements and
random bits that nothing else outside reads: the compiler makes them where they are used.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_rad.ad import _jax, primitives


class _Step(NamedTuple):
    """An equation of a body whose calls are opened, with operands and results of the body."""

    equation: _jax.JaxprEquation
    operands: tuple[Hashable, ...]
    results: tuple[Hashable, ...]


class _Name:
    """A result inside of a call that was opened."""


def hoist(jaxpr: _jax.Jaxpr) -> _jax.Jaxpr:
    """The same program with smaller loops."""
    if _jax.has_references(jaxpr) or not any(map(_loops, jaxpr.jaxpr.eqns)):
        return jaxpr
    return _jax.retrace(partial(_evaluate, jaxpr), jaxpr)


def _loops(equation: _jax.JaxprEquation) -> bool:
    """Whether there is a loop in an equation that can be looked into."""
    if equation.primitive.name == "scan":
        return not _jax.has_references(_jax.scan_parts(equation)[0])
    if equation.primitive.name == "cond":
        return any(_loops(e) for b in _jax.cond_branches(equation) for e in b.jaxpr.eqns)
    inner = _jax.inlined_jaxpr(equation)
    return inner is not None and any(map(_loops, inner.jaxpr.eqns))


def _evaluate(jaxpr: _jax.Jaxpr, args: Sequence[jax.Array]) -> list[jax.Array]:
    """Run a program with smaller loops."""
    steps, outs = _opened(jaxpr, jaxpr.jaxpr.invars, [])
    env: dict[Hashable, jax.Array] = dict(zip(jaxpr.jaxpr.invars, args, strict=True))
    _run(steps, env)
    return [_read(env, a) for a in outs]


def _opened(jaxpr: _jax.Jaxpr, operands: Sequence[Hashable], steps: list[_Step]) -> tuple[list[_Step], list[Hashable]]:
    """The steps of a program, those of calls in which there is a loop or which are not cheap among them; its outputs.

    A name of a value is a variable of the program, a ``_Name`` or, of what is known, a tuple of one.
    """
    inner = jaxpr.jaxpr
    names: dict[_jax.Variable, Hashable] = dict(zip(inner.invars, operands, strict=True))
    names.update((v, (c,)) for v, c in zip(inner.constvars, jaxpr.consts, strict=True))

    def name(atom: _jax.Variable) -> Hashable:
        return (_jax.literal(atom),) if isinstance(atom, _jax.Literal) else names[atom]

    for equation in inner.eqns:
        called = _jax.inlined_jaxpr(equation)
        taken = tuple(map(name, equation.invars))
        if called is not None and not primitives.is_cheap(equation):
            _, results = _opened(called, taken, steps)
        else:
            results = [_Name() for _ in equation.outvars]
            steps.append(_Step(equation, taken, tuple(results)))
        names.update(zip(equation.outvars, results, strict=True))
    return steps, [name(a) for a in inner.outvars]


def _read(env: dict[Hashable, jax.Array], name: Hashable) -> jax.Array:
    return name[0] if isinstance(name, tuple) else env[name]


def _run(steps: Sequence[_Step], env: dict[Hashable, jax.Array]) -> None:
    """Run steps, adding their results to ``env``."""
    for step in steps:
        arrays = [_read(env, o) for o in step.operands]
        if not _loops(step.equation):
            results = _jax.bind(step.equation, arrays)
        else:
            with _jax.context(step.equation):
                results = (_scan if step.equation.primitive.name == "scan" else _cond)(step.equation, arrays)
        env.update(zip(step.results, results, strict=True))


def _cond(equation: _jax.JaxprEquation, args: Sequence[jax.Array]) -> list[jax.Array]:
    branches = [partial(_branch, branch) for branch in _jax.cond_branches(equation)]
    return lax.switch(args[0], branches, *args[1:])


def _branch(jaxpr: _jax.Jaxpr, *args: jax.Array) -> list[jax.Array]:
    return _evaluate(jaxpr, args)


def _scan(equation: _jax.JaxprEquation, args: Sequence[jax.Array]) -> list[jax.Array]:
    """A loop, and before it what all of its iterations share."""
    body, n_consts, n_carry = _jax.scan_parts(equation)
    length = equation.params["length"]
    body = hoist(body)
    inputs, first = body.jaxpr.invars, n_consts + n_carry
    steps, outs = _opened(body, inputs, [])
    passed = {i for i in range(n_carry) if outs[i] is inputs[n_consts + i]}
    env: dict[Hashable, jax.Array] = dict(zip(inputs[:n_consts], args, strict=False))
    env |= {inputs[n_consts + i]: args[n_consts + i] for i in passed}
    moved = _invariant(steps, set(env))
    if not moved and not passed:
        return _jax.bind(equation, args)
    _run(moved, env)
    outside = set(map(id, moved))
    kept = [s for s in steps if id(s) not in outside]
    carries = [i for i in range(n_carry) if i not in passed]
    ys = [i for i in range(n_carry, len(outs)) if not (isinstance(outs[i], tuple) or outs[i] in env)]

    def iterate(carry: list[jax.Array], xs: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        inside = dict(env)
        inside.update(zip([inputs[n_consts + i] for i in carries], carry, strict=True))
        inside.update(zip(inputs[first:], xs, strict=True))
        _run(kept, inside)
        return [_read(inside, outs[i]) for i in carries], [_read(inside, outs[i]) for i in ys]

    order = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    begin = [args[n_consts + i] for i in carries]
    carry, stacked = lax.scan(iterate, begin, list(args[first:]), **order)
    found = dict(zip([*carries, *ys], [*carry, *stacked], strict=True))
    found |= {i: args[n_consts + i] for i in passed}
    return [found[i] if i in found else _stacked(_read(env, outs[i]), length) for i in range(len(outs))]


def _invariant(steps: Sequence[_Step], known: set[Hashable]) -> list[_Step]:
    """The steps to take before the loop, in order."""
    able = []
    for step in steps:
        if not step.equation.effects and all(isinstance(o, tuple) or o in known for o in step.operands):
            known.update(step.results)
            able.append(step)
    needed: set[Hashable] = set()
    moved = []
    for step in reversed(able):
        if any(r in needed for r in step.results) or not primitives.is_rearrangement(step.equation):
            needed.update(o for o in step.operands if not isinstance(o, tuple))
            moved.append(step)
    return moved[::-1]


def _stacked(array: jax.Array, length: int) -> jax.Array:
    """An array once for each iteration."""
    return jnp.broadcast_to(array, (length, *jnp.shape(array)))
