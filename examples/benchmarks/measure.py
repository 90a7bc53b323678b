"""What is measured about a rival: compiled memory, stored bytes, compile and step time, gradient error and variance.

The protocol of every number:

- **T**: ``temp_size_in_bytes`` of the compiled ``jit(svi.update)``, buffers that are neither argument nor result.
- **R**: bytes that ``numpyro_rad.explain`` says are stored between the two sweeps, inputs and parameters not counted.
- **compile**: tracing with lowering, and XLA's compilation, apart, with JAX's caches emptied before.
- **step**: wall time of one compiled step; all rivals take turns in one process, in a new random order each round, and
  the first round is dropped.
- **gradient**: with respect to the guide's unconstrained parameters, after a few exact training steps.
- **rho**: added variance of a randomized gradient / variance of the exact stochastic gradient, both over draws of guide
  and minibatch.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from examples.benchmarks.rivals import RIVALS, Rival
from examples.benchmarks.workload import Workload
from numpyro_rad import NoiseKeys

Gradient = Any  # a pytree of arrays, one per guide parameter


@dataclass(frozen=True)
class Step:
    """A rival's SVI on its own batch size, ready to be compiled."""

    rival: Rival
    svi: SVI
    state: SVIState
    batch: tuple[jax.Array, jax.Array]

    def constrain(self, params: Any) -> Any:
        """Guide parameters from their unconstrained values; ``svi.init`` has set the function."""
        return cast(Callable[..., Any], self.svi.constrain_fn)(params)

    def gradient(self) -> Callable[..., Gradient]:
        """``g(params, key, batch)``: the jitted gradient of the loss in the unconstrained guide parameters."""

        def loss(params: Any, key: jax.Array, batch: Sequence[jax.Array]) -> jax.Array:
            svi = self.svi
            return svi.loss.loss(key, self.constrain(params), svi.model, svi.guide, *batch)

        return jax.jit(jax.grad(loss))

    def gradient_with_path_key(self) -> Callable[..., Gradient]:
        """``g(params, path_key, key, batch)``: the same with the randomized rival's own key given."""

        def loss(params: Any, path_key: jax.Array, key: jax.Array, batch: Sequence[jax.Array]) -> jax.Array:
            svi = self.svi
            keys = NoiseKeys(guide=key, minibatch=key, path=path_key)
            return svi.loss.loss_with_keys(keys, self.constrain(params), svi.model, svi.guide, *batch)

        return jax.jit(jax.grad(loss))


def build(rival: Rival, workload: Workload, data: tuple[jax.Array, jax.Array], seed: int, rows: int) -> Step:
    """Set up the rival's SVI; every rival starts from the same parameters and sees the same first rows."""
    model = workload.model(rival.layer)
    svi = SVI(model, workload.guide(model, rival.layer), workload.optimizer(), rival.elbo(workload))
    key_init, key_batch = jax.random.split(jax.random.key(seed))
    batch = workload.minibatch(key_batch, data, rows)
    return Step(rival, svi, svi.init(key_init, *batch), batch)


@dataclass(frozen=True)
class Compiled:
    """A compiled ``svi.update`` with what its compilation cost."""

    step: Callable[..., Any]
    trace_and_lower_seconds: float
    compile_seconds: float
    cpu_seconds: float  # of both together, all threads: what other work on the machine changes least
    temp_bytes: int


def compile_step(step: Step) -> Compiled:
    """Compile ``jit(svi.update)`` for the step's state and batch, from empty caches."""
    return compile_update(step.svi.update, step.state, *step.batch)


def compile_update(update: Callable[..., Any], state: SVIState, *args: Any) -> Compiled:
    """Compile ``jit(update)`` for a state and the array arguments of the model, from empty caches."""
    jax.clear_caches()
    started, cpu_started = time.perf_counter(), time.process_time()
    lowered = jax.jit(update).lower(state, *args)
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    done, cpu_done = time.perf_counter(), time.process_time()
    return Compiled(compiled, lowered_at - started, done - lowered_at, cpu_done - cpu_started, temp_size(compiled))


def temp_size(compiled: Any) -> int:
    """T of a compiled function."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def rows_of_equal_memory(
    workload: Workload, data: tuple[jax.Array, jax.Array], seed: int, target_bytes: float
) -> dict[str, Any]:
    """The minibatch whose T is about ``target_bytes``, from a linear model of the exact step's T in the rows.

    T is measured at an eighth and at half of the batch. Where even one row needs more than the target (the weights
    alone take their share), the answer is one row, and ``reachable`` says so.
    """
    sizes = (max(workload.batch // 8, 1), max(workload.batch // 2, 2))
    probes = [build(RIVALS["small_batch"], workload, data, seed, rows) for rows in sizes]
    temps = [temp_size(jax.jit(p.svi.update).lower(p.state, *p.batch).compile()) for p in probes]
    slope = (temps[1] - temps[0]) / (sizes[1] - sizes[0])
    intercept = temps[0] - slope * sizes[0]
    rows = int((target_bytes - intercept) / slope)
    return {
        "rows": min(max(rows, 1), workload.batch),
        "target_bytes": int(target_bytes),
        "reachable": rows >= 1,
        "linear_model": {"bytes_per_row": slope, "bytes_at_zero_rows": intercept, "measured_rows": sizes},
    }


def interleaved_times(steps: dict[str, Callable[[], Any]], rounds: int, seed: int) -> dict[str, list[float]]:
    """Seconds per call of each function: all of them in every round, in a shuffled order, the first round dropped."""
    order, shuffle = list(steps), random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        shuffle(order)
        for name in order:
            started = time.perf_counter()
            jax.block_until_ready(steps[name]())
            seconds[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}


def summarize_times(seconds: list[float]) -> dict[str, Any]:
    """Median and interquartile range in seconds, and the raw values."""
    low, median, high = np.percentile(seconds, [25, 50, 75]).tolist()
    return {"median_seconds": median, "quartiles_seconds": [low, high], "all_seconds": [round(s, 6) for s in seconds]}


class Moments:
    """Streaming mean and total variance, tr Cov, of a vector held as a pytree (Welford's update)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Gradient = None
        self.squares = 0.0

    def add(self, value: Gradient) -> None:
        self.count += 1
        if self.mean is None:
            self.mean = value
        else:
            self.mean, added = _welford(self.mean, value, self.count)
            self.squares += float(added)

    @property
    def variance(self) -> float:
        return self.squares / (self.count - 1)


@jax.jit
def _welford(mean: Gradient, value: Gradient, count: int) -> tuple[Gradient, jax.Array]:
    new = jax.tree.map(lambda m, v: m + (v - m) / count, mean, value)
    added = jax.tree.map(lambda m, n, v: jnp.vdot(v - m, v - n), mean, new, value)
    return new, sum(jax.tree.leaves(added), jnp.zeros(()))


@jax.jit
def square_norm(tree: Gradient) -> jax.Array:
    """||g||^2 over all leaves."""
    return sum((jnp.vdot(x, x) for x in jax.tree.leaves(tree)), jnp.zeros(()))


@jax.jit
def max_abs(tree: Gradient) -> jax.Array:
    """The largest absolute entry over all leaves."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(tree)]))


def gradient_difference(gradient: Gradient, exact: Gradient) -> dict[str, Any]:
    """How far a deterministic gradient is from the exact one, absolutely and in relation to its size."""
    difference = jax.tree.map(jnp.subtract, gradient, exact)
    return {
        "max_abs_difference": float(max_abs(difference)),
        "max_abs_gradient": float(max_abs(exact)),
        "relative_difference": float(jnp.sqrt(square_norm(difference) / square_norm(exact))),
    }


def draws_of(
    workload: Workload, data: tuple[jax.Array, jax.Array], rows: int, seed: int, draws: int
) -> Iterator[tuple[jax.Array, tuple[jax.Array, ...]]]:
    """What an exact stochastic gradient depends on, drawn so many times: the guide's key and a minibatch."""
    pick = jax.jit(partial(workload.minibatch, size=rows))
    for key in jax.random.split(jax.random.key(seed + 1), draws):
        guide_key, batch_key = jax.random.split(key)
        yield guide_key, pick(batch_key, data)


def path_variance(
    gradient: Callable[..., Gradient], cases: Sequence[tuple[tuple, Gradient]], seed: int, draws: int
) -> dict[str, Any]:
    """E||g - g_exact||^2 over the path noise, with its standard error and a check for bias.

    :param gradient: function of the path key and of what a case holds fixed.
    :param cases: what is held fixed (guide noise and minibatch) in one draw after the other, in turns, and the exact
        gradient there. The added variance is its mean over these cases, as the variance of the exact gradient is.
    :return: the added variance, also divided by the mean of ||g_exact||^2, and ``bias_ratio`` = draws ||mean of
        g - g_exact||^2 / added variance, which is 1 on average for an unbiased estimator and grows with the draws for a
        biased one.
    """
    moments, errors = Moments(), []
    for i, key in enumerate(jax.random.split(jax.random.key(seed + 2), draws)):
        fixed, exact = cases[i % len(cases)]
        error = jax.tree.map(jnp.subtract, gradient(key, *fixed), exact)
        moments.add(error)
        errors.append(float(square_norm(error)))
    added, norm = float(np.mean(errors)), float(np.mean([square_norm(exact) for _, exact in cases]))
    return {
        "added_variance": added,
        "relative_variance": added / norm,
        "relative_variance_standard_error": float(np.std(errors, ddof=1) / draws**0.5 / norm),
        "bias_ratio": draws * float(square_norm(moments.mean)) / added if added else None,
    }
