"""The ways to take one SVI step that the benchmarks compare.

A rival is a loss object, a layer variant of the model, and a batch size; everything else (data, guide, optimizer,
keys, starting point) is shared. ``RIVALS`` is the whole list, in the order of the tables. ``numpyro_rad`` is imported
only when one of its rivals is built, so the others also run without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax, random
from numpyro.handlers import seed, substitute
from numpyro.infer import Trace_ELBO
from numpyro.infer.util import compute_log_probs

from examples.benchmarks.layers import PRODUCT_NAME
from examples.benchmarks.workload import Workload

# exact: the gradient of Trace_ELBO to rounding.  rounded: deterministic, but not that gradient.
# randomized: an unbiased estimate of it, with a path key of its own.  small_batch: the exact gradient of fewer rows.
Kind = Literal["exact", "rounded", "randomized", "small_batch"]
Family = Literal["reference", "rival", "rad2021", "ours"]


class CheckpointELBO(Trace_ELBO):
    """``Trace_ELBO`` with the whole loss under ``jax.checkpoint``.

    :param policy: a ``jax.checkpoint`` policy that says what to save; None recomputes everything.
    """

    def __init__(self, policy: Callable[..., bool] | None = None) -> None:
        self.policy = policy
        super().__init__()

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs) -> Any:
        exact_loss = super().loss_with_mutable_state

        def loss(rng_key, param_map, args):
            return exact_loss(rng_key, param_map, model, guide, *args, **kwargs)["loss"]

        value = jax.checkpoint(loss, policy=self.policy)(rng_key, param_map, args)
        return {"loss": value, "mutable_state": None}


class AccumulatedELBO(Trace_ELBO):
    """``Trace_ELBO`` with gradient accumulation over micro-batches: the same value and gradient under the same key.

    The latent variables z are drawn once, from the same keys as in ``Trace_ELBO``. A scan over micro-batches adds up
    the log likelihood L and dL/dz, each step with its own short forward and backward sweep, so that nothing is computed
    twice and only one micro-batch's residuals are alive. The result enters the loss as ``L + <dL/dz, z - stop(z)>``,
    whose value is L and whose gradient is that of L; the guide and the prior are pulled back once, as always.

    It needs what accumulation always needs: positional arguments that split along their first axis, rows that are
    independent given z, a guide that does not look at them, and no ``numpyro.param`` or randomness inside the model.

    :param micro_batches: number of pieces, a divisor of the batch size.
    :param unrolled: whether the pieces follow each other in the program, each one waiting for the last, rather than in
        a scan, in which XLA's CPU compiler has slow code for the gradients of convolutions.
    """

    def __init__(self, micro_batches: int, unrolled: bool = False) -> None:
        self.micro_batches, self.unrolled = micro_batches, unrolled
        super().__init__()

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs) -> Any:
        _, guide_seed = random.split(rng_key)  # as in Trace_ELBO
        guide_terms, guide_trace = compute_log_probs(seed(guide, guide_seed), args, kwargs, param_map)
        latents = {name: site["value"] for name, site in guide_trace.items() if site["type"] == "sample"}
        fixed = jax.tree.map(lax.stop_gradient, latents)  # what the scan sees: nothing differentiates through it
        pieces = tuple(a.reshape(self.micro_batches, a.shape[0] // self.micro_batches, *a.shape[1:]) for a in args)

        def model_terms(z, piece):
            # The key goes to the indices of the subsampling plate only, which nobody reads.
            seeded = seed(substitute(model, data=z), random.key(0))
            terms, sites = compute_log_probs(seeded, piece, kwargs, param_map)
            observed = sum(jnp.sum(v) for name, v in terms.items() if sites[name]["is_observed"])
            prior = sum(jnp.sum(v) for name, v in terms.items() if not sites[name]["is_observed"])
            return observed, prior

        def add_piece(total, piece):
            # The plate scales each piece up to the whole data set, so the batch is the mean of its pieces.
            term = jax.value_and_grad(lambda z: model_terms(z, piece)[0] / self.micro_batches)(fixed)
            return jax.tree.map(jnp.add, total, term), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, fixed))
        if self.unrolled:
            likelihood, slope = zero
            for i in range(self.micro_batches):
                (likelihood, slope), fixed, pieces = lax.optimization_barrier(((likelihood, slope), fixed, pieces))
                (likelihood, slope), _ = add_piece((likelihood, slope), tuple(piece[i] for piece in pieces))
        else:
            (likelihood, slope), _ = lax.scan(add_piece, zero, pieces)
        likelihood += sum(jnp.vdot(slope[name], latents[name] - fixed[name]) for name in latents)
        prior = model_terms(latents, tuple(piece[0] for piece in pieces))[1]
        entropy = -sum(jnp.sum(v) for v in guide_terms.values())
        return {"loss": -(likelihood + prior + entropy), "mutable_state": None}


@dataclass(frozen=True)
class Rival:
    """One way to build the step.

    :param label: what the figure and the table call it.
    :param kind: what its gradient is to the exact one, which decides what is measured about it.
    :param elbo: makes the loss object for a workload.
    :param layer: the layer variant of the model, a key of ``layers.VARIANTS``.
    """

    name: str
    label: str
    family: Family
    kind: Kind
    elbo: Callable[[Workload], Trace_ELBO]
    layer: str = "plain"
    note: str = ""


def _dots_rival() -> Rival:
    """``dots_saveable`` where JAX still honours a policy that looks at primitives, else the same by name.

    In the newest ``jax.checkpoint`` (``jax_remat3``) a policy is asked about named values only. The layers' products
    are then named in the model, and only they are saved: that is the same set but for the small output layer, and with
    convolutions, which ``dots_saveable`` passes over.
    """
    policy = getattr(jax.checkpoint_policies, "dots_saveable", None)
    layer, note = "plain", "jax.checkpoint_policies.dots_saveable on the whole loss"
    if policy is None or getattr(jax.config, "jax_remat3", False):
        policy = jax.checkpoint_policies.save_only_these_names(PRODUCT_NAME)
        layer, note = "named_product", "save_only_these_names on the layers' products, on the whole loss"
    return Rival("checkpoint_dots", "checkpoint, dots", "rival", "exact", lambda _: CheckpointELBO(policy), layer, note)


def _rad(make_codec: Callable[[Any], Any] | None = None, **options: Any) -> Callable[[Workload], Trace_ELBO]:
    """A builder of ``RAD_ELBO`` with one codec everywhere, with other options, or with its defaults."""

    def elbo(_: Workload) -> Trace_ELBO:
        from numpyro_rad import RAD_ELBO, codecs  # late on purpose: see the module's docstring

        return RAD_ELBO(**options) if make_codec is None else RAD_ELBO(codec=make_codec(codecs))

    return elbo


def _sliced(number: int) -> Rival:
    elbo, note = _rad(slices=number, exact=True), f"RAD_ELBO(slices={number}, exact=True)"
    return Rival(f"ours_{number}slices", f"ours, exact, {number} slices", "ours", "exact", elbo, note=note)


def _rounding(bits: int) -> Rival:
    elbo = _rad(lambda codecs: codecs.StochasticRound(bits=bits))
    label = f"ours, {bits} bit" + ("s" if bits > 1 else "")
    return Rival(f"ours_{bits}bit", label, "ours", "randomized", elbo, note=f"StochasticRound(bits={bits})")


def _dithered(bits: int) -> Rival:
    plain, elbo = _rounding(bits), _rad(lambda codecs: codecs.DitheredRound(bits=bits))
    name, label = f"{plain.name}_dithered", f"{plain.label}, dithered"
    return Rival(name, label, "ours", "randomized", elbo, note=f"DitheredRound(bits={bits})")


def _rotated(bits: int) -> Rival:
    plain, elbo = _rounding(bits), _rad(lambda codecs: codecs.RotatedRound(bits=bits))
    name, label = f"{plain.name}_rotated", f"{plain.label}, rotated"
    return Rival(name, label, "ours", "randomized", elbo, note=f"RotatedRound(bits={bits})")


def _exact(_: Workload) -> Trace_ELBO:
    return Trace_ELBO()


_ALL = [
    Rival("exact", "Trace_ELBO", "reference", "exact", _exact, note="NumPyro's Trace_ELBO"),
    Rival(
        "bf16",
        "bfloat16 residuals",
        "rival",
        "rounded",
        _exact,
        "bfloat16_residuals",
        "layers with bfloat16 residuals, arithmetic in float32, written by hand",
    ),
    Rival(
        "bf16_compute",
        "bfloat16 arithmetic",
        "rival",
        "rounded",
        _exact,
        "bfloat16",
        "layers computed and stored in bfloat16 (mixed precision)",
    ),
    Rival(
        "checkpoint_step",
        "checkpoint, step",
        "rival",
        "exact",
        lambda _: CheckpointELBO(),
        note="jax.checkpoint on the whole loss",
    ),
    Rival(
        "checkpoint_layer",
        "checkpoint, layer",
        "rival",
        "exact",
        _exact,
        "checkpoint",
        "jax.checkpoint on each layer, or step of the scan",
    ),
    Rival(
        "checkpoint_sqrt",
        "checkpoint, segments",
        "rival",
        "exact",
        _exact,
        "checkpoint_sqrt",
        "the scan cut in about sqrt(steps) segments, jax.checkpoint on each",
    ),
    _dots_rival(),
    Rival("small_batch", "small batch", "rival", "small_batch", _exact, note="Trace_ELBO on fewer rows"),
    Rival(
        "accumulate",
        "accumulation",
        "rival",
        "exact",
        lambda workload: AccumulatedELBO(workload.micro_batches),
        note="exact gradient accumulated over micro-batches, one noise sample",
    ),
    Rival(
        "accumulate_unrolled",
        "accumulation, unrolled",
        "rival",
        "exact",
        lambda workload: AccumulatedELBO(workload.micro_batches, unrolled=True),
        note="the same without a loop, each micro-batch waiting for the last",
    ),
    Rival(
        "rad2021_sample",
        "RAD 2021 sampling",
        "rad2021",
        "randomized",
        _rad(lambda codecs: codecs.SampleAxis(0.1, per="row")),
        note='SampleAxis(0.1, per="row")',
    ),
    Rival(
        "rad2021_project",
        "RAD 2021 projection",
        "rad2021",
        "randomized",
        _rad(lambda codecs: codecs.RandomProjection(0.1)),
        note="RandomProjection(0.1)",
    ),
    Rival("ours_exact", "ours, exact", "ours", "exact", _rad(lambda codecs: codecs.Keep()), note="Keep()"),
    _sliced(4),
    _sliced(8),
    _rounding(8),
    _rounding(4),
    _rounding(2),
    _rounding(1),
    _dithered(4),
    _dithered(2),
    _dithered(1),
    _rotated(4),
    _rotated(2),
    _rotated(1),
    Rival("ours_default", "ours, default", "ours", "randomized", _rad(), note="RAD_ELBO()"),
]
RIVALS: dict[str, Rival] = {rival.name: rival for rival in _ALL}
