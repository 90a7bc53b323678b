"""``RAD_ELBO``: NumPyro's ELBO with a randomized reverse-mode gradient."""

from __future__ import annotations

from typing import Any

import jax
from numpyro.infer import Trace_ELBO

from numpyro_rad.transform import Program, call, planner
from numpyro_rad.codecs import Codec, seed_words

_PATH = 0x52414445


class RAD_ELBO(Trace_ELBO):
    def __init__(self, num_particles=1, vectorize_particles=True, multi_sample_guide=False, sum_sites=True, *, memory_budget=None, codec=None):
        super().__init__(num_particles, vectorize_particles, multi_sample_guide, sum_sites)
        self.memory_budget, self.codec = memory_budget, codec

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        return self._run(jax.random.fold_in(rng_key, _PATH), rng_key, param_map, model, guide, args, kwargs)

    def loss_with_path_key(self, path_key, rng_key, param_map, model, guide, *args, **kwargs):
        return self._run(path_key, rng_key, param_map, model, guide, args, kwargs)["loss"]

    def _run(self, path_key, rng_key, param_map, model, guide, args, kwargs):
        leaves, tree = jax.tree.flatten((rng_key, param_map, args, kwargs))
        dynamic = [hasattr(x, "dtype") or isinstance(x, (float,)) for x in leaves]
        static = [None if d else x for x, d in zip(leaves, dynamic)]
        def f(*arrays):
            it = iter(arrays)
            ls = [next(it) if d else s for s, d in zip(static, dynamic)]
            rng_key, param_map, args, kwargs = jax.tree.unflatten(tree, ls)
            return Trace_ELBO.loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs)
        arrays = [x for x, d in zip(leaves, dynamic) if d]
        al, at = jax.tree.flatten((tuple(arrays), {}))
        return call(Program(f, al, at, planner(self.codec, self.memory_budget)), seed_words(path_key), al)
