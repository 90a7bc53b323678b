"""The loss on held-out data during a run, and ``Plateau``, the rule that stops by it.

What is evaluated is the exact ELBO without its gradient, so nothing is kept for a backward sweep. All looks of a run
draw the same samples of the guide: a difference between two of them is one of the parameters, and hardly one of luck.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.autoguide import AutoContinuous

from numpyro_rad.annotations import Key, Kwargs, Params
from numpyro_rad.diagnostics.quality import loss_of_one_particle
from numpyro_rad.diagnostics.records import Validation, from_dict, to_dict
from numpyro_rad.elbo import loss_by_keys
from numpyro_rad.fits import SVI, SVIState, on_device
from numpyro_rad.subsampling import NoiseKeys
from numpyro_rad.tracing import Compiled
from numpyro_rad.training.fingerprint import checksum

DRAWS = 8
"""Samples of the guide in one look; they follow one another, so that memory is that of one."""

_TAG = 0x52414426  # folded into the state's key: the draws of all looks

_ADVICE = (
    "Held-out data stand in the place of the training data: pass what model and guide take. A guide with a parameter "
    "for each row of the training data has none for other rows; make it compute them from the data, or sum these sites "
    "out of the model."
)


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Stop when the loss on held-out data no longer falls: ``run(..., validate=..., stop=Plateau())``.

    A look (there is one each ``tracking.interval`` steps) counts as progress if its loss is below the lowest one before
    it by more than a share of the fall since the first look.

    :param patience: so many looks in a row without progress end the run.
    :param relative: that share.
    :raises ValueError: if ``patience`` is not a positive whole number, or ``relative`` is not in [0, 1).

    Example::

        result = svi.run(key, 100_000, x, y, validate=(x_held_out, y_held_out), stop=Plateau(patience=20))
    """

    patience: int = 10
    relative: float = 1e-3

    def __post_init__(self) -> None:
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"Plateau: patience={self.patience!r}, a whole number of looks from 1 up is expected.")
        if not 0 <= self.relative < 1:
            raise ValueError(f"Plateau: relative={self.relative!r}, a share in [0, 1) is expected.")

    def reached(self, losses: np.ndarray) -> bool:
        """Whether the last looks were without progress.

        :param losses: of all looks, shape (looks,); one that is not finite is no progress.
        """
        first, lowest, waited = math.nan, math.inf, 0
        for loss in losses:
            fall = first - lowest if math.isfinite(lowest) else 0.0
            progress = math.isfinite(loss) and loss < lowest - self.relative * fall
            waited = 0 if progress else waited + 1
            if math.isfinite(loss):
                first, lowest = loss if math.isnan(first) else first, min(lowest, loss)
        return waited >= self.patience


def held_out(validate: Any, args: tuple, kwargs: Kwargs) -> list[tuple[tuple, Kwargs]]:
    """``(args, kwargs)`` of model and guide, for each batch of held-out data.

    :param validate: a batch (a tuple, a dictionary, an array) or a list of batches.
    :param args: positional arguments that come before those of a batch.
    :param kwargs: keyword arguments, those of a batch in the place of ones of the same name.
    :raises ValueError: for no batch.
    """
    given: list[tuple[tuple, Kwargs]] = []
    for batch in validate if isinstance(validate, list) else [validate]:
        if isinstance(batch, Mapping):
            given.append((args, {**kwargs, **batch}))
        else:
            given.append(((*args, *(batch if isinstance(batch, tuple) else (batch,))), kwargs))
    if not given:
        raise ValueError(
            "validate=[]: there are no held-out data. Pass a batch (a tuple, a dictionary or an array), or a list of "
            "them."
        )
    return given


class Validator:
    """Looks at the loss on held-out data.

    :param svi: an initialised ``SVI`` with any ELBO.
    :param state: the first state of the run, for its key.
    :param given: arguments of model and guide, for each batch.
    :raises ValueError: if the loss cannot be evaluated there.
    """

    def __init__(self, svi: SVI, state: SVIState, given: list[tuple[tuple, Kwargs]]) -> None:
        self._svi = svi
        self._loss = loss_of_one_particle(svi.loss)
        self._keys = jax.random.split(jax.random.fold_in(state.rng_key, _TAG), DRAWS)
        self._steps: list[int] = []
        self._losses: list[np.ndarray] = []
        self._compiled = Compiled(self._of_draws)
        for args, kwargs in given:
            _check_rows(svi, state, args, kwargs)
        self._functions = [self._function(state, args, kwargs) for args, kwargs in given]
        self._given = on_device(given)  # only now: the model may look at NumPy arrays, and has seen them

    @property
    def record(self) -> Validation | None:
        """All looks so far, None before the first."""
        if not self._steps:
            return None
        return Validation(np.asarray(self._steps), np.stack(self._losses))

    def look(self, step: int, state: SVIState) -> None:
        """Evaluate the loss at a state, which is not changed."""
        self._steps.append(step)
        self._losses.append(self._evaluated(state))

    def record_until(self, step: int, state: SVIState) -> Validation:
        """All looks so far and one at the end, which is not remembered: a run that goes on would not have taken it."""
        if self._steps[-1:] == [step]:
            return Validation(np.asarray(self._steps), np.stack(self._losses))
        return Validation(np.asarray([*self._steps, step]), np.stack([*self._losses, self._evaluated(state)]))

    def _evaluated(self, state: SVIState) -> np.ndarray:
        """The loss of each draw, shape (draws,)."""
        pairs = zip(self._functions, self._given, strict=True)
        return np.mean([np.asarray(f(state, *given), float) for f, given in pairs], 0)

    def to_dict(self) -> dict[str, Any]:
        """All that :meth:`restore` needs, for ``json.dumps``."""
        return {"record": to_dict(self.record), "data": self._checksums()}

    def restore(self, data: dict[str, Any] | None) -> None:
        """Go on where the validator was that :meth:`to_dict` took apart, if its data were these."""
        if data is None or data["record"] is None:
            return
        if data["data"] != self._checksums():
            warnings.warn(
                "validate= has other data than the run that goes on, so that the losses on held-out data begin here.",
                stacklevel=2,
            )
            return
        record = from_dict(Validation, data["record"])
        self._steps, self._losses = record.steps.tolist(), list(record.losses)

    def _checksums(self) -> list[str]:
        return [checksum(given) for given in self._given]

    def _function(self, state: SVIState, args: tuple, kwargs: Kwargs) -> Callable:
        """``(state, args, kwargs) -> losses`` of all draws, one for all batches of the same size."""
        try:
            run, parts = self._compiled.of(args, kwargs, state, self._keys)
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(
                f"validate: the loss on the held-out data cannot be evaluated: {error} {_ADVICE}"
            ) from error
        return lambda state, args, kwargs: run(parts.arrays((args, kwargs)), state, self._keys)

    def _of_draws(self, state: SVIState, keys: Key, args: tuple, kwargs: Kwargs) -> jax.Array:
        """The loss of each draw, one after the other."""
        svi = self._svi
        of = svi.get_params(state), state.mutable_state, svi.model, svi.guide, args, {**kwargs, **svi.static_kwargs}
        return jax.lax.map(lambda key: loss_by_keys(self._loss, NoiseKeys(key, None, key), *of), keys)


def _check_rows(svi: SVI, state: SVIState, args: tuple, kwargs: Kwargs) -> None:
    """Complain of a guide with parameters for each row of the training data: other rows are not what they are for."""
    params, options = svi.get_params(state), {**kwargs, **svi.static_kwargs}
    values = {**params, **(state.mutable_state or {})}
    sites: list[dict[str, Any]] = []

    def run(values: Params) -> None:
        for fn in (svi.model, svi.guide):
            sites.append(trace(substitute(seed(fn, jax.random.key(0)), values)).get_trace(*args, **options))

    try:
        jax.eval_shape(run, values)
    except Exception:  # whatever is the matter, the loss itself will say it better
        return
    model, guide = (site.values() for site in sites)
    data = {name for site in model if site["type"] == "sample" and site["is_observed"] for name in _plates(site)}
    bad = [site["name"] for site in guide if site["type"] == "param" and data & set(_plates(site))]
    if isinstance(svi.guide, AutoContinuous):  # one array for all latent sites
        bad += [s["name"] for s in model if s["type"] == "sample" and not s["is_observed"] and data & set(_plates(s))]
    if bad:
        raise ValueError(
            f"validate: the guide has parameters for each row of the training data ({', '.join(bad)} in the plate of "
            f"the data). {_ADVICE}"
        )


def _plates(site: dict[str, Any]) -> Iterator[str]:
    return (frame.name for frame in site["cond_indep_stack"])
