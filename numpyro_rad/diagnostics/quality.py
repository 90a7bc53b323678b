"""How good is a fit, and did the randomized gradients do harm?

* :func:`fit_quality` evaluates the ELBO, with its Monte Carlo error, and by how much importance weights correct the
  guide: k-hat, the shape of the tail of p(z, x) / q(z) (Yao, Vehtari, Simpson, Gelman, *Yes, but Did It Work?:
  Evaluating Variational Inference*, ICML 2018). Beside them it puts what :class:`Iterates` says about convergence.
* :func:`shadow` runs SVI twice on the same keys, with randomized and with exact gradients, and compares.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import block, replay, seed, substitute, trace
from numpyro.infer import (
    SVI,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    psis_diagnostic,
)
from numpyro.infer.elbo import ELBO
from numpyro.infer.util import log_density

from numpyro_rad.ad import _jax
from numpyro_rad.ad.plan import BudgetError
from numpyro_rad.annotations import Key, Kwargs, Params, PyTree
from numpyro_rad.diagnostics.convergence import IterateAverage, Iterates
from numpyro_rad.diagnostics.plates import on_all_data
from numpyro_rad.diagnostics.records import Estimate, FitQuality
from numpyro_rad.elbo import RAD_ELBO
from numpyro_rad.fits import Fit, SVIState, values_of, watched_state
from numpyro_rad.mistakes import kwargs_checked
from numpyro_rad.tracing import with_arguments
from numpyro_rad.wording import number, signed_text

__all__ = ["IterateAverage", "Iterates", "Shadow", "fit_quality", "shadow"]

_CHUNK = 100  # particles of one call: the pilot that says how many are needed

_K_HAT_PARTICLES = 1000  # NumPyro's default; the tail that is fitted has 95 of them

# Standard deviation of log weights, in nats. Beyond it the smaller weights of the tail are zero in double precision,
# and what is fitted to the few that are left may even look harmless.
_MOST_SPREAD = 100.0

_FEWER = "Pass fewer rows, or assess on a machine with more memory."

_BLOCKS = 20  # of steps over which a shadow run averages


@kwargs_checked
def fit_quality(
    svi: SVI,
    fit: Fit,
    *args: Any,
    key: Key,
    standard_error: float = 0.1,
    max_particles: int = 1000,
    pareto_k: bool = True,
    iterates: Iterates | None = None,
    **kwargs: Any,
) -> FitQuality:
    """ELBO with its error, Pareto k-hat and convergence of a fit.

    The ELBO is that of the loss of ``svi`` (of the base of ``RAD_ELBO``) on the arguments that are given: pass the full
    data. Plates that draw minibatches take all of it here. Draws of one particle are averaged, one at a time, so it
    takes the memory of one evaluation without a gradient. A bound that is defined by its particles (``RenyiELBO``)
    keeps them.

    k-hat below 0.5 means that importance sampling would correct what the guide lacks, above 0.7 that the guide misses
    too much of the posterior for expectations under it to be trusted. It looks at all latent variables jointly, and is
    nearly always above 0.7 for a Bayesian neural network, however good its predictions: judge those on held-out data.
    It takes 1000 evaluations, one at a time: in all, no more memory than the ELBO.

    A number for which memory is short is left out, with a note.

    :param svi: the ``SVI`` of the fit; what is needed of it is its model, guide and loss.
    :param fit: the result of ``svi.run``, an ``SVIState`` (after ``svi.init``), or the dictionary of constrained
        parameters.
    :param args: arguments of model and guide.
    :param key: JAX PRNG key; the result is a function of it.
    :param standard_error: of the ELBO, in nats: as many particles are drawn as 100 of them say that it takes.
    :param max_particles: at most so many are drawn, at least 2.
    :param pareto_k: whether to compute k-hat.
    :param iterates: of the fit, for ``r_hat``, ``mcse`` and ``converged``, which are None without them.
    :param kwargs: keyword arguments of model and guide.
    :return: a :class:`~numpyro_rad.diagnostics.records.FitQuality`; what could not be computed is None and ``notes``
        says why.
    :raises ValueError: for a state before ``svi.init``, or a ``standard_error`` or ``max_particles`` that makes no
        sense.
    :raises TypeError: if ``fit`` is none of these.

    Example::

        result = svi.run(jax.random.key(0), 5000, x, y)
        print(fit_quality(svi, result, x, y, key=jax.random.key(1)))
    """
    if not standard_error > 0 or max_particles < 2:
        raise ValueError(
            f"standard_error={standard_error}, max_particles={max_particles}: the error of the ELBO is positive, and "
            "it takes at least 2 particles to know it. Leave both at their defaults, or raise them."
        )
    params, kwargs = values_of(svi, fit, "fit_quality"), {**kwargs, **svi.static_kwargs}
    elbo_key, k_key = jax.random.split(key)
    notes: list[str] = []
    with watched_state(params, "fit_quality"):
        svi, plates, subsampled = on_all_data(svi, params, args, kwargs)
    if subsampled:
        notes.append(
            f"The ELBO is that of minibatches, and so is its error: the arguments hold fewer rows than {plates} "
            "has. Pass the full data."
        )
    elif plates:
        notes.append(f"Here {plates}, which draw minibatches in training, took all data.")
    try:
        with watched_state(params, "fit_quality"):
            draws = _elbo_draws(svi, params, args, kwargs, elbo_key, standard_error, max_particles)
    except Exception as error:
        if not _jax.is_out_of_memory(error):
            raise
        draws = np.full(2, math.nan)
        notes.append(f"No ELBO: memory is too short for one evaluation on these data. {_FEWER}")
    with np.errstate(invalid="ignore"):
        spread = float(draws.std(ddof=1))
    elbo = Estimate(float(draws.mean()), spread / math.sqrt(len(draws)))
    if len(draws) > 2 and not math.isfinite(elbo.value):
        notes.append(
            "The ELBO is not finite: some draw of the guide has no density under the model, or a parameter is NaN. "
            "Look at the parameters, and at the support of each site of the guide."
        )
    r_hat = None if iterates is None else iterates.r_hat()
    if iterates is not None and r_hat is None:
        notes.append(f"Convergence is unknown: {len(iterates)} iterates were recorded, and it takes 100.")
    k_hat = None
    if pareto_k and subsampled:
        notes.append("No Pareto k-hat: with minibatches there are no importance weights.")
    elif pareto_k and spread > _MOST_SPREAD:
        k_hat = math.inf
        notes.append(
            f"Pareto k-hat is out of reach: log weights spread by {spread:.0f} nats, so that one draw outweighs all "
            "others together. It would be far above 0.7."
        )
    elif pareto_k:
        k_hat, reason = _pareto_k(svi, params, args, kwargs, k_key)
        notes += [f"No Pareto k-hat: {reason}"] if reason else []
    return FitQuality(
        elbo=elbo,
        pareto_k=k_hat,
        r_hat=r_hat,
        mcse=None if iterates is None else iterates.mcse(),
        converged=None if iterates is None or r_hat is None else iterates.converged(),
        notes=tuple(notes),
    )


def loss_of_one_particle(loss: ELBO) -> Any:
    """The exact loss whose mean over draws is the objective, with as few particles as that allows."""
    single = copy.copy(loss.base if isinstance(loss, RAD_ELBO) else loss)
    if isinstance(single, (Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)):
        single.num_particles = 1
    if hasattr(single, "sum_sites"):
        single.sum_sites = True  # type: ignore[attr-defined]
    return single


def _elbo_draws(
    svi: SVI, params: Params, args: tuple, kwargs: Kwargs, key: Key, standard_error: float, max_particles: int
) -> np.ndarray:
    """As many draws of the ELBO as it takes for a standard error."""
    loss, chunk = loss_of_one_particle(svi.loss), min(_CHUNK, max_particles)

    def one_by_one(keys: Key, params: PyTree, args: tuple, kwargs: Kwargs) -> jax.Array:
        return jax.lax.map(lambda k: -loss.loss(k, params, svi.model, svi.guide, *args, **kwargs), keys)

    draw = with_arguments(one_by_one, args, kwargs, jax.random.split(key, chunk), params)

    def draws(number: int) -> np.ndarray:
        return np.asarray(draw(jax.random.split(jax.random.fold_in(key, number), chunk), params), float)

    found = draws(0)
    with np.errstate(invalid="ignore"):
        needed = found.var(ddof=1) / standard_error**2
        needed = min(needed, max_particles) if np.isfinite(needed) else 0  # more draws do not make it finite
        chunks = min(math.ceil(needed / chunk), max_particles // chunk)
        return np.concatenate([found, *(draws(i) for i in range(1, chunks))])


def _pareto_k(svi: SVI, params: Params, args: tuple, kwargs: Kwargs, key: Key) -> tuple[float | None, str]:
    """k-hat, or why there is none."""
    reason = _no_importance_weights(svi, params, args, kwargs, key)
    if reason:
        return None, reason
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Not enough tail samples")
            k_hat = psis_diagnostic(
                key, {}, _weighted(svi, params, args, kwargs), _nothing, num_particles=_K_HAT_PARTICLES
            )
    except Exception as error:  # a diagnostic that NumPyro has not for this model must not lose the others
        if _jax.is_out_of_memory(error):
            return None, f"memory is too short for one evaluation on these data. {_FEWER}"
        return None, f"numpyro.infer.psis_diagnostic does not work for this model and guide: {error!r}"
    if not math.isfinite(k_hat):
        return None, (
            "the importance weights have no tail to fit. They are all equal, so that the guide is the posterior, or "
            "not finite: then the guide reaches where the model has no density."
        )
    return float(k_hat), ""


def _weighted(svi: SVI, params: Params, args: tuple, kwargs: Kwargs) -> Callable[..., Any]:
    """A model whose only density is the importance weight of a draw from the guide.

    ``psis_diagnostic`` evaluates a model for all draws at once, which takes the memory of all of them. It may do so
    here, since what it maps over is evaluated one by one.
    """

    def log_weight(key: Key, params: Params, args: tuple, kwargs: Kwargs) -> jax.Array | float:
        guide_key, model_key = jax.random.split(key)
        with block():  # the model below is not to have these sites, wherever this is traced
            log_guide, drawn = log_density(seed(svi.guide, guide_key), args, kwargs, params)
            log_model, _ = log_density(replay(seed(svi.model, model_key), drawn), args, kwargs, params)
        return log_model - log_guide

    weigh = with_arguments(log_weight, args, kwargs, jax.random.key(0), params)
    one_by_one = jax.custom_batching.sequential_vmap(weigh)

    def model() -> None:
        numpyro.factor("weight", one_by_one(numpyro.prng_key(), params))

    return model


def _nothing() -> None:
    """A guide without sites."""


def _no_importance_weights(svi: SVI, params: Params, args: tuple, kwargs: Kwargs, key: Key) -> str:
    """Why p(z, x) / q(z) is no importance weight here, empty if it is one."""
    if getattr(svi.loss, "multi_sample_guide", False):
        return "the guide proposes several samples at once, and importance weights belong to one."
    guide_trace = trace(substitute(seed(svi.guide, key), data=params)).get_trace(*args, **kwargs)
    model = substitute(replay(seed(svi.model, key), guide_trace), data=params)
    model_trace = trace(model).get_trace(*args, **kwargs)
    latent = {n for n, s in model_trace.items() if s["type"] == "sample" and not s["is_observed"]}
    missing = sorted(latent - guide_trace.keys())
    if missing:
        return f"the guide does not sample {', '.join(missing)} (summed over, or taken from the prior)."
    drawn = [s["fn"] for s in guide_trace.values() if s["type"] == "sample" and not s["is_observed"]]
    if all(_is_point(fn) for fn in drawn):
        return "the guide is a point, not a distribution: there are no importance weights."
    return ""


def _is_point(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


# -- beside exact gradients --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Shadow:
    """Two runs of SVI, with randomized and with exact gradients, that share their keys; for each of several seeds.

    :ivar randomized_losses: of each step, shape (seeds, steps).
    :ivar exact_losses: of each step, shape (seeds, steps).
    :ivar steps: the last step of each block of steps that is averaged over, shape (blocks,).
    :ivar difference: of the ELBOs, randomized - exact, in nats, mean over a block and the seeds, shape (blocks,).
    :ivar standard_error: of it, from the spread of the paired differences over seeds, shape (blocks,).
    :ivar distance: between the unconstrained parameters at the end of the two runs, shape (seeds,).
    :ivar travelled: by the parameters of the exact run, from its start to its end, shape (seeds,).
    """

    randomized_losses: np.ndarray
    exact_losses: np.ndarray
    steps: np.ndarray
    difference: np.ndarray
    standard_error: np.ndarray
    distance: np.ndarray
    travelled: np.ndarray

    @property
    def final(self) -> Estimate:
        """Difference of the ELBOs in the last block of steps."""
        return Estimate(float(self.difference[-1]), float(self.standard_error[-1]))

    def __str__(self) -> str:
        seeds, steps = self.exact_losses.shape
        final = signed_text(self.final.value, self.final.standard_error)
        moved = self.travelled > 0
        apart = float(np.mean(self.distance[moved] / self.travelled[moved])) if moved.any() else math.nan
        parameters = f"are apart by {number(100 * apart)} % of the way they went" if moved.any() else "did not move"
        return (
            f"after {steps} steps the difference of the ELBOs, randomized - exact gradients, is {final} nats ({seeds} "
            f"seeds); the parameters {parameters}"
        )


@kwargs_checked
def shadow(svi: SVI, rng_key: Key, num_steps: int, *args: Any, num_seeds: int = 4, **kwargs: Any) -> Shadow:
    """Run SVI with the randomized ELBO and with its exact base, from the same start and on the same keys.

    Both draw the same noise of the guide and the same minibatches, so their losses differ by what the codes did to the
    parameters until then, and by nothing else. The exact run makes residuals again rather than store more than twice
    what the randomized one stores, so far as that can be. Neither ``svi`` nor any state of it changes.

    :param svi: an ``SVI`` whose loss is a ``RAD_ELBO``.
    :param rng_key: JAX PRNG key, split into one for each seed.
    :param num_steps: of each run.
    :param args: arguments of model and guide, the same in every step.
    :param num_seeds: pairs of runs, at least 2; two compilations serve them all.
    :param kwargs: keyword arguments of model and guide.
    :raises TypeError: if the loss is not a ``RAD_ELBO``.
    :raises ValueError: for fewer than 2 seeds or no step.

    Example::

        print(shadow(svi, jax.random.key(0), 1000, x, y))
    """
    if not isinstance(svi.loss, RAD_ELBO):
        raise TypeError(
            f"shadow compares a randomized ELBO with its exact base, and the loss is a {type(svi.loss).__name__}, "
            "whose gradients are exact. Pass an SVI with RAD_ELBO()."
        )
    if num_seeds < 2 or num_steps < 1:
        raise ValueError(
            f"num_seeds={num_seeds}, num_steps={num_steps}: an error takes at least 2 seeds, a run at least one step."
        )
    keys = jax.random.split(rng_key, num_seeds)
    losses, starts, ends = zip(
        *(_runs(svi, loss, keys, num_steps, args, kwargs) for loss in (svi.loss, None)), strict=True
    )
    blocks = np.array_split(np.arange(num_steps), min(_BLOCKS, num_steps))
    gain = np.stack([(losses[1] - losses[0])[:, block].mean(1) for block in blocks])  # (blocks, seeds)
    return Shadow(
        randomized_losses=losses[0],
        exact_losses=losses[1],
        steps=np.asarray([block[-1] + 1 for block in blocks]),
        difference=gain.mean(1),
        standard_error=gain.std(1, ddof=1) / math.sqrt(num_seeds),
        distance=np.linalg.norm(ends[0] - ends[1], axis=1),
        travelled=np.linalg.norm(ends[1] - starts[1], axis=1),
    )


def _exact_in_little_memory(svi: SVI, state: SVIState, args: tuple, kwargs: Kwargs) -> ELBO:
    """The exact twin of the loss, with about the memory of it."""
    loss: Any = svi.loss
    if not jax.tree.leaves(svi.optim.get_params(state.optim_state)):
        return loss.base
    plan, _ = loss.plan_of_update(svi, state, *args, **kwargs)
    exact = RAD_ELBO(base=loss.base, exact=True, memory_budget=2 * plan.stored_bytes)
    try:
        exact.plan_of_update(svi, state, *args, **kwargs)
    except BudgetError as error:
        exact = RAD_ELBO(base=loss.base, exact=True, memory_budget=error.smallest_bytes)
    return exact


def _runs(
    svi: SVI, loss: Any, keys: Key, num_steps: int, args: tuple, kwargs: Kwargs
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses, and flattened parameters at start and end, of one run for each key: each of shape (keys, ...).

    :param loss: None for the exact base.
    """
    twin = SVI(svi.model, svi.guide, svi.optim, svi.loss if loss is None else loss, **svi.static_kwargs)

    def steps(state: SVIState, args: tuple, kwargs: Kwargs) -> PyTree:
        return jax.lax.scan(lambda s, _: twin.update(s, *args, **kwargs), state, None, length=num_steps)

    first = twin.init(keys[0], *args, **kwargs)
    if loss is None:
        twin.loss = _exact_in_little_memory(twin, first, args, kwargs)
    elif jax.tree.leaves(twin.optim.get_params(first.optim_state)):
        twin.loss = loss.with_plan(loss.plan_of_update(twin, first, *args, **kwargs)[0])  # the one that trains
    run = with_arguments(steps, args, kwargs, first)

    def flat(state: SVIState) -> np.ndarray:
        leaves = jax.device_get(jax.tree.leaves(twin.optim.get_params(state.optim_state)))
        return np.concatenate([np.ravel(x).astype(float) for x in leaves])

    rows = []
    for key in keys:
        start = twin.init(key, *args, **kwargs)
        end, losses = run(start)
        rows.append((np.asarray(losses, float), flat(start), flat(end)))
    losses, starts, ends = (np.stack(column) for column in zip(*rows, strict=True))
    return losses, starts, ends
