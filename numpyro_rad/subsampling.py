"""The noise of minibatches by itself: whether a plate draws one, and a key of their own for plates.

NumPyro's handlers draw everything from one key. Here the plates draw from another, so that the noise of a minibatch can
be held while that of the guide is redrawn, and the other way round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from numpyro.handlers import seed
from numpyro.infer import RenyiELBO
from numpyro.infer.elbo import ELBO
from numpyro.primitives import Messenger

from numpyro_rad.annotations import Key


class NoiseKeys(NamedTuple):
    """Keys of the three sources of noise in a gradient of SVI; any of them can be held fixed while others are redrawn.

    All are JAX PRNG keys, typed or raw, and independent of one another. A pytree, so ``jax.vmap`` maps over it.

    :ivar guide: noise of the guide's samples, and whatever else model and guide draw (dropout, ...).
    :ivar minibatch: indices that ``numpyro.plate(..., subsample_size=...)`` draws; None to draw them from the guide's
        key, as ``loss`` does. The program is then that of ``loss`` too, so plans and calibrations for it stay valid.
    :ivar path: the codes of the residuals; the value of the loss does not depend on it.
    """

    guide: Key
    minibatch: Key | None
    path: Key


def with_minibatch_key(base: ELBO, key: Key, model: Callable, guide: Callable) -> tuple[ELBO, Callable, Callable]:
    """An ELBO, model and guide such that plates draw from ``key``, each particle with its own share of it."""
    wrapped = _PlateSeeded(model, key), _PlateSeeded(guide, key)

    def set_key(key: Key) -> None:
        for number, fn in enumerate(wrapped):  # a plate of the guide and another of the model are independent
            fn.key = jax.random.fold_in(key, number)

    set_key(key)
    if isinstance(base, RenyiELBO):  # its particles share a minibatch, by definition of the bound
        return base, *wrapped
    vectorize = base.vectorize_particles_fn

    def vectorize_with_keys(particle: Callable, keys: Key) -> Any:
        def of_pair(pair: tuple[Key, Key]) -> Any:
            set_key(pair[1])
            return particle(pair[0])

        return vectorize(of_pair, (keys, jax.random.split(key, len(keys))))

    base = copy.copy(base)
    base.vectorize_particles_fn = vectorize_with_keys
    return base, *wrapped


class _PlateSeeded:
    """A model or guide whose plates draw from a key of their own.

    It is a callable rather than a handler around one so that the key may change from particle to particle.
    """

    def __init__(self, fn: Callable, key: Key) -> None:
        self.fn, self.key = fn, key

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return seed(self.fn, self.key, hide_types=["sample", "prng_key", "control_flow"])(*args, **kwargs)


class PlateWatch(Messenger):
    """Notices plates that draw a minibatch, in functions that it wraps.

    Plates in the body of a ``numpyro.contrib.control_flow.scan`` do not count: they draw from the guide's key.

    :ivar found: whether there was one.
    """

    found = False

    def watched(self, fn: Callable) -> Callable:
        """A model or guide in which plates are noticed."""
        return partial(self._run, fn)

    def _run(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        with self:
            return fn(*args, **kwargs)

    def process_message(self, msg: Any) -> None:
        """Look at a plate."""
        if msg["type"] == "plate":
            size, subsample_size = msg["args"]
            self.found = self.found or subsample_size not in (None, size)
