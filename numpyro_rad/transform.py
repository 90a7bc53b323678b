"""``rad``, ``grad`` and ``value_and_grad``: a function with the same value and a randomized reverse-mode derivative.

The function is traced once. When it is called without being differentiated nothing else happens. When it is, its linearized
graph is planned and the two sweeps become the two halves of one ``jax.custom_vjp``. Everything that the function closes over
is lifted to an argument, so the result composes with ``jit``, ``vmap``, ``scan``, ``jax.checkpoint`` and differentiation with
respect to anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from numpyro_rad import _jax
from numpyro_rad.codecs import Codec, StochasticRound, seed_words
from numpyro_rad.graph import linearize
from numpyro_rad.plan import Plan, make_plan, plan_within, uniform
from numpyro_rad.sweep import backward, forward

DEFAULT_CODEC = StochasticRound(bits=4)


def planner(codec: Codec | None, memory_budget: int | str | None) -> Callable[[Any], Plan]:
    """The function from graph to plan that the two options ask for."""
    if memory_budget is not None:
        budget = parse_bytes(memory_budget)
        return lambda graph: plan_within(graph, budget)
    policy = uniform(DEFAULT_CODEC if codec is None else codec)
    return lambda graph: make_plan(graph, policy)


def parse_bytes(size):
    return int(size)


class Program:
    """A traced function and, once asked for, its plan for a set of differentiated inputs."""

    def __init__(self, f: Callable, leaves: list[Any], tree: Any, make: Callable[[Any], Plan]) -> None:
        def flat(*leaves: Any) -> Any:
            args, kwargs = jax.tree.unflatten(tree, leaves)
            return f(*args, **kwargs)

        self.jaxpr, shapes = _jax.trace(flat, *leaves)
        self.out_tree = jax.tree.structure(shapes)
        self.consts = list(self.jaxpr.consts)
        self.make = make
        self.plans: dict[tuple[bool, ...], Plan] = {}

    def plan(self, active: tuple[bool, ...]) -> Plan:
        if active not in self.plans:
            self.plans[active] = self.make(linearize(self.jaxpr, self.consts, active))
        return self.plans[active]


def call(program: Program, seed: Any, leaves: list[Any]) -> Any:
    """Run a program under ``custom_vjp``."""
    n_consts = len(program.consts)
    chosen: list[tuple[bool, ...]] = []

    @jax.custom_vjp
    def run(seed: Any, *operands: Any) -> list[Any]:
        return _jax.eval_open(program.jaxpr, operands[:n_consts], operands[n_consts:])

    def run_forward(seed: Any, *operands: Any) -> tuple[list[Any], Any]:
        active = tuple(
            o.perturbed and jnp.issubdtype(jnp.result_type(o.value), jnp.inexact) for o in operands
        )
        chosen.append(active)
        plan = program.plan(active)
        arrays = [o.value for o in operands]
        outs, tape = forward(plan, seed.value, arrays)
        reads = [a for v, a in zip(plan.graph.inputs, arrays, strict=True) if v in plan.reads]
        return outs, (seed.value, tape, reads)

    def run_backward(stored: Any, cotangents: Any) -> tuple[Any, ...]:
        active = chosen[-1]
        plan = program.plan(active)
        seed, tape, reads = stored
        known = dict(zip([v for v in plan.graph.inputs if v in plan.reads], reads, strict=True))
        cts = [None if isinstance(c, SymbolicZero) else c for c in cotangents]
        pulled = iter(backward(plan, seed, tape, known, cts))
        return None, *(next(pulled) if on else None for on in active)

    run.defvjp(run_forward, run_backward, symbolic_zeros=True)
    outs = run(seed, *program.consts, *leaves)
    return jax.tree.unflatten(program.out_tree, outs)


def rad(f: Callable, *, codec: Codec | None = None, memory_budget: int | str | None = None) -> Callable:
    make = planner(codec, memory_budget)

    @functools.wraps(f)
    def randomized(key: Any, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        return call(Program(f, leaves, tree, make), seed_words(key), leaves)

    return randomized
