"""``RAD_ELBO``: NumPyro's ``Trace_ELBO`` with a randomized reverse-mode gradient.

The loss is NumPyro's own, traced and handed to :class:`numpyro_rad.transform.Program`; nothing of the model or the
guide changes. The key of the path randomness is folded out of the loss's key, which is then split as ever, so the value
under one key is the value of ``Trace_ELBO`` under that key.
"""

from __future__ import annotations

from typing import Any

import jax
from numpyro.infer import Trace_ELBO

from numpyro_rad import _jax
from numpyro_rad.codecs import Codec
from numpyro_rad.plan import Plan
from numpyro_rad.transform import Program, path_seed, plan_of, planner

_PATH_TAG = 0x52414421  # folded into the loss's key: the stream of the path randomness


class RAD_ELBO(Trace_ELBO):
    """Evidence lower bound whose gradient stores little: a drop-in for ``numpyro.infer.Trace_ELBO``.

    The value is exact. The gradient has the expectation of ``Trace_ELBO``'s (over the path randomness, for any fixed
    noise of guide, model and subsampling) and a variance that is larger by a little; :func:`numpyro_rad.explain` says
    where and by how much. Without options every residual that may be coded is rounded stochastically to 4 bits.

    Gradients here are random even for a fixed key of guide and data, so line searches (``numpyro.optim.Minimize``) need
    ``codec=Keep()``. Forward-mode differentiation does not exist for it: use ``Trace_ELBO`` there.

    :param num_particles: number of samples of the guide that estimate the ELBO.
    :param vectorize_particles: ``True`` for ``jax.vmap`` over particles, ``False`` for ``jax.lax.map``, or a callable.
    :param multi_sample_guide: whether the guide proposes several samples at once.
    :param sum_sites: whether to sum the contributions of all sites or return them by name (values only).
    :param memory_budget: the most bytes that may be stored between the two sweeps of one gradient, all particles
        together, an int or a string such as ``"64MiB"``. Codes, scales and kept values count; parameters and data do
        not.
    :param codec: one codec wherever a code is unbiased and smaller; ``Keep()`` for exact gradients, by recomputation
        and fused derivatives alone.
    :raises TypeError: for a wrong ``codec`` or ``memory_budget``.
    :raises ValueError: for a budget that cannot be read, or for both options at once.
    :raises BudgetError: by the first gradient, if no plan meets the budget; it names the smallest that does.

    The loss raises ``ValueError`` where there are no parameters (unless ``codec`` is exact) and ``NotImplementedError``
    under forward-mode differentiation.

    **Reference:** Oktay, McGreivy, Aduol, Beatson, Adams, *Randomized Automatic Differentiation*, ICLR 2021.

    Example::

        svi = SVI(model, guide, optax.adam(1e-3), RAD_ELBO(memory_budget="256MiB"))
    """

    def __init__(
        self,
        num_particles: int = 1,
        vectorize_particles: Any = True,
        multi_sample_guide: bool = False,
        sum_sites: bool = True,
        *,
        memory_budget: int | str | None = None,
        codec: Codec | None = None,
    ) -> None:
        super().__init__(num_particles, vectorize_particles, multi_sample_guide, sum_sites)
        planner(codec, memory_budget)  # complain now rather than in the first step
        self.memory_budget = memory_budget
        self.codec = codec

    def loss_with_mutable_state(
        self, rng_key: Any, param_map: Any, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Negative ELBO and mutable state, as ``Trace_ELBO`` returns them; ``rng_key`` seeds the paths too."""
        path_key = jax.random.fold_in(rng_key, _PATH_TAG)
        return self._randomized(path_key, rng_key, param_map, model, guide, args, kwargs)

    def loss_with_path_key(
        self, path_key: Any, rng_key: Any, param_map: Any, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The loss with a path key of its own: what is drawn from ``rng_key`` can be held fixed while it changes.

        :param path_key: key of the path randomness; the value does not depend on it, the gradient's noise does.
        :param rng_key: key of guide, model and subsampling.
        :return: the negative ELBO.
        """
        return self._randomized(path_key, rng_key, param_map, model, guide, args, kwargs)["loss"]

    def plan(
        self, rng_key: Any, param_map: Any, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> tuple[Plan, list]:
        """The plan for gradients with respect to ``param_map``, and the names of its arrays in order."""
        self._check(param_map)
        return plan_of(
            lambda params: self._exact(rng_key, params, model, guide, args, kwargs), param_map, self._planner()
        )

    def _randomized(
        self, path_key: Any, rng_key: Any, param_map: Any, model: Any, guide: Any, args: tuple, kwargs: dict
    ) -> Any:
        self._check(param_map)
        program = Program(lambda: self._exact(rng_key, param_map, model, guide, args, kwargs), (), self._planner())
        return program(path_seed(path_key))

    def _planner(self) -> Any:
        return planner(self.codec, self.memory_budget)

    def _exact(self, rng_key: Any, param_map: Any, model: Any, guide: Any, args: tuple, kwargs: dict) -> Any:
        """NumPyro's loss. The mutable state is an output without a cotangent."""
        result = super().loss_with_mutable_state(rng_key, param_map, model, guide, *args, **kwargs)
        return {**result, "mutable_state": jax.lax.stop_gradient(result["mutable_state"])}

    def _check(self, param_map: Any) -> None:
        leaves = jax.tree.leaves(param_map)
        if not leaves and not (self.codec is not None and self.codec.exact):
            raise ValueError(
                "there is nothing to differentiate: param_map is empty, so neither model nor guide has a parameter. "
                "Use a guide with parameters, for example AutoNormal(model), or Trace_ELBO for the value alone."
            )
        if any(_jax.is_forward_mode(x) for x in leaves):
            raise NotImplementedError(
                "RAD_ELBO randomizes reverse-mode differentiation and has no forward mode "
                "(forward_mode_differentiation=True). Forward mode stores no residuals, so there is nothing to save: "
                "use numpyro.infer.Trace_ELBO for it."
            )
