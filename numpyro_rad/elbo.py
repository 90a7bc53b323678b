"""``RAD_ELBO``: NumPyro's ELBOs with a randomized reverse-mode gradient.

The loss is NumPyro's own, traced and handed to :func:`numpyro_rad.transform.randomized`; nothing of the model or the
guide changes. The key of the path randomness is folded out of the loss's key, which is then split as ever, so the value
under one key is the value of the ELBO that is wrapped under that key.
"""

from __future__ import annotations

import copy
import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.elbo import ELBO
from numpyro.infer.svi import SVIRunResult

from numpyro_rad.ad import _jax
from numpyro_rad.ad.codecs import Codec
from numpyro_rad.ad.plan import Plan
from numpyro_rad.annotations import Key, Kwargs, Params, PyTree
from numpyro_rad.fits import Fit, is_result, on_device, params_of, state_of, watched_state, with_loss
from numpyro_rad.mistakes import is_key, kwargs_checked, misspelt, names_checked, shown
from numpyro_rad.planning.calibration import Calibration
from numpyro_rad.planning.costs import CostModel
from numpyro_rad.planning.planner import Planner, Rule, parse_bytes
from numpyro_rad.subsampling import NoiseKeys, PlateWatch, with_minibatch_key
from numpyro_rad.transform import Closure, path_seed, randomized, site_leaves
from numpyro_rad.tuning import calibrated, fitting_budget
from numpyro_rad.wording import arguments_text, call_text

_OWN = ("num_particles", "vectorize_particles", "multi_sample_guide", "sum_sites")  # arguments of Trace_ELBO

_PATH_TAG = 0x52414421  # folded into the loss's key: the stream of the path randomness


class RAD_ELBO(Trace_ELBO):
    """Evidence lower bound whose gradient stores little: a drop-in for ``numpyro.infer.Trace_ELBO``.

    The value is exact. The gradient has the expectation of ``Trace_ELBO``'s (over the path randomness, for any fixed
    noise of guide, model and subsampling) and a variance that is larger by a little; :func:`numpyro_rad.explain` says
    where and by how much.

    Any other ELBO of NumPyro, or of yours, is wrapped by ``base=``; its attributes are found here too.

    Gradients here are random even for a fixed key of guide and data, so line searches (``numpyro.optim.Minimize``) need
    ``codec=Keep()``. Forward-mode differentiation does not exist for it: use ``Trace_ELBO`` there.

    :param num_particles: number of samples of the guide that estimate the ELBO.
    :param vectorize_particles: ``True`` for ``jax.vmap`` over particles, ``False`` for ``jax.lax.map``, or a callable.
    :param multi_sample_guide: whether the guide proposes several samples at once.
    :param sum_sites: whether to sum the contributions of all sites or return them by name (values only).
    :param base: the ELBO to take the value from instead of ``Trace_ELBO``: an instance of ``TraceMeanField_ELBO``,
        ``RenyiELBO``, ``TraceGraph_ELBO``, ``TraceEnum_ELBO`` or any subclass of ``numpyro.infer.elbo.ELBO``. The four
        arguments above belong to ``Trace_ELBO`` and are then set on the base.
    :param memory_budget: the most bytes that may be held between the two sweeps of one gradient, such as ``"256MiB"``,
        all particles together (codes, scales and kept values count; parameters, data and their gradients, which are
        results, do not). Without this and the options that follow, a program with less than 16 MiB of residuals is left
        to JAX's own reverse mode, as with ``Trace_ELBO``, and a larger one runs in slices or is rounded to 4 bits,
        where that is worth the time.
    :param codec: as in :class:`numpyro_rad.planning.Planner`, like all that follow.
    :param added_variance: the most variance that may be added, as a share of the exact gradient's own.
    :param plan: a saved plan.
    :param exact: no codes: recompute and keep only.
    :param slices: in how many slices to run what can be run in slices.
    :param objective: what is least within a budget.
    :param offload: whether exact values may wait in the memory of the host.
    :param overrides: what to do with some residuals.
    :param calibration: measured prices of codes, from :meth:`calibrate`.
    :param costs: what work costs on the device that the program shall run on.
    :raises TypeError: for a wrong ``base``, option or number of particles.
    :raises ValueError: for an option that cannot be read, for two that exclude each other, or for a ``base`` together
        with an argument that belongs on it.
    :raises BudgetError: by the first gradient, if no plan meets the budget; it names the smallest that does.

    The loss raises ``NotImplementedError`` under forward-mode differentiation. An ELBO does not change once it is made:
    :meth:`replace` makes another one, and :class:`numpyro_rad.RAD_SVI` puts what it learns into a copy of its own.

    **Reference:** Oktay, McGreivy, Aduol, Beatson, Adams, *Randomized Automatic Differentiation*, ICLR 2021.

    Example::

        svi = SVI(model, guide, optax.adam(1e-3), RAD_ELBO(memory_budget="256MiB"))
        svi = SVI(model, guide, optax.adam(1e-3), RAD_ELBO(base=TraceMeanField_ELBO(num_particles=8)))
    """

    @names_checked
    def __init__(
        self,
        num_particles: int = 1,
        vectorize_particles: Any = True,
        multi_sample_guide: bool = False,
        sum_sites: bool = True,
        *,
        base: ELBO | None = None,
        codec: Codec | None = None,
        memory_budget: int | str | None = None,
        added_variance: float | None = None,
        plan: Mapping[str, Any] | None = None,
        exact: bool = False,
        slices: int | None = None,
        objective: str = "balanced",
        offload: bool = False,
        overrides: Mapping[Rule, Codec] = {},
        calibration: Calibration | None = None,
        costs: CostModel | None = None,
    ) -> None:
        planner = Planner(  # complains now rather than in the first step
            codec=codec,
            memory_budget=memory_budget,
            added_variance=added_variance,
            plan=plan,
            exact=exact,
            slices=slices,
            objective=objective,
            offload=offload,
            overrides=overrides,
            calibration=calibration,
            costs=costs,
        )
        self._hold(_base_of(base, num_particles, vectorize_particles, multi_sample_guide, sum_sites), planner)

    def _hold(self, base: ELBO, planner: Planner) -> None:
        can = base.can_infer_discrete  # the class has one of its own
        vars(self).update(base=base, planner=planner, can_infer_discrete=can)

    def replace(self, **options: Any) -> RAD_ELBO:
        """A copy of this ELBO with other options; this one stays as it is.

        :param options: those of the constructor, by name. What is not named stays; ``num_particles`` and its kin can be
            changed where there is no ``base=``.
        :raises TypeError: as the constructor, and for an option that does not exist.
        :raises ValueError: as the constructor.

        Example::

            svi.loss = svi.loss.replace(memory_budget=svi.loss.fit_step(svi, state, "8GiB", x, y))
        """
        own = {name: options[name] for name in _OWN if name in options}
        planned = {field.name for field in dataclasses.fields(Planner)}
        for name in options:
            if name not in (*_OWN, "base", *planned):
                raise misspelt("RAD_ELBO.replace", name, (*_OWN, "base", *planned))
        base = options.get("base", self.base)
        if own and "base" not in options and type(base) is Trace_ELBO:
            base, own = None, {name: getattr(self.base, name) for name in _OWN} | own
        found = copy.copy(self)
        planner = dataclasses.replace(self.planner, **{name: options[name] for name in planned & options.keys()})
        found._hold(_base_of(base, **own), planner)
        return found

    def __repr__(self) -> str:
        """The call that makes it; measured variances are left out."""
        plain = type(self.base) is Trace_ELBO
        base = arguments_text(self.base) if plain else [f"base={call_text(self.base)}"]
        return call_text(self, [*base, *self.planner.settings()])

    def __getattr__(self, name: str) -> Any:
        """What ``SVI`` and users ask of an ELBO (``num_particles``, ``max_plate_nesting``, ...) is the base's."""
        if name == "base" or name.startswith("__"):  # copies and unpickled objects ask before there is a base
            raise AttributeError(name)
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("base", "planner") or ("base" in vars(self) and hasattr(self.base, name)):
            known = name in _OWN or name in ("base", *(field.name for field in dataclasses.fields(Planner)))
            another = f"{name}=..." if known else "base=..."
            raise AttributeError(
                f"{name} cannot be set: an ELBO does not change once it is made. elbo.replace({another}) makes another "
                "one, for example for svi.loss."
            )
        object.__setattr__(self, name, value)

    def loss(self, rng_key: Key, param_map: Params, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Any:
        """Negative ELBO as the base returns it; ``rng_key`` seeds the paths too."""
        _check_object(self)
        path_key = jax.random.fold_in(rng_key, _PATH_TAG)
        return self._randomized(path_key, self.base.loss, rng_key, param_map, model, guide, args, kwargs)

    def loss_with_mutable_state(
        self, rng_key: Key, param_map: Params, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        """Negative ELBO and mutable state, as the base returns them; ``rng_key`` seeds the paths too."""
        _check_object(self)
        path_key = jax.random.fold_in(rng_key, _PATH_TAG)
        return self._randomized(
            path_key, partial(_loss_and_state, self.base), rng_key, param_map, model, guide, args, kwargs
        )

    def loss_with_keys(
        self, keys: NoiseKeys, param_map: Params, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        """The loss with a key of its own for each source of noise, for instance to tell their variances apart.

        :param keys: keys of guide, minibatch and path noise. Particles draw their own minibatches as under the base
            (those of ``RenyiELBO`` share one). Plates in the body of a ``numpyro.contrib.control_flow.scan`` draw from
            the guide's key.
        :return: the negative ELBO; for a model without subsampling it is that of ``loss`` under the guide's key.

        Example::

            gradient = jax.grad(lambda params, path: elbo.loss_with_keys(
                NoiseKeys(guide_key, minibatch_key, path), params, model, guide, x, y))
            draws = jax.vmap(gradient, (None, 0))(params, jax.random.split(key, 100))  # path noise alone
        """
        return loss_by_keys(self, keys, param_map, None, model, guide, args, kwargs)

    def plan(
        self,
        rng_key: Key,
        param_map: Mapping[str, PyTree] | SVIRunResult,
        model: Callable,
        guide: Callable,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Plan, list[str]]:
        """The plan for gradients with respect to ``param_map``, and the sites of its arrays in order.

        :param param_map: the constrained parameters, or the result of ``svi.run``. Mutable state among them is not
            differentiated.
        :raises TypeError: for arguments in another order.
        :raises ValueError: if there is no parameter, or if mutable state is missing.
        :raises BudgetError: if no plan meets the budget.
        """
        _check_operands(rng_key, param_map, model, guide)
        params, mutable = params_of(param_map)
        if not jax.tree.leaves(params):
            raise ValueError(
                "there is nothing to differentiate: param_map is empty, so neither model nor guide has a parameter and "
                "no gradient has a plan. Use a guide with parameters, for example AutoNormal(model)."
            )
        with watched_state({**params, **(mutable or {})}, "explain") as names:
            taken = self._closure(rng_key, params, model, guide, args, kwargs, mutable)
        held = {name: params.pop(name) for name in names & params.keys()}
        if held:  # it came among the parameters, and is not differentiated
            taken = self._closure(rng_key, params, model, guide, args, kwargs, held)
        return taken.plan, taken.labels

    def plan_of_update(self, svi: SVI, svi_state: Fit, *args: Any, **kwargs: Any) -> tuple[Plan, list[str]]:
        """The plan of one ``svi.update``, and the sites of the arrays that it differentiates in order.

        :param svi: the ``SVI`` that this ELBO is the loss of.
        :param svi_state: its state, the result of its run, or constrained parameters.
        :param args: arguments of model and guide, as in ``svi.update``.
        :raises ValueError: if there is no parameter.
        :raises BudgetError: if no plan meets the budget.
        """
        if isinstance(svi_state, Mapping) and hasattr(svi, "static_kwargs"):
            options = {**kwargs, **svi.static_kwargs}
            return self.plan(jax.random.key(0), svi_state, svi.model, svi.guide, *args, **options)
        svi_state = state_of(svi, svi_state, "plan_of_update")
        params, options = svi.get_params(svi_state), {**kwargs, **svi.static_kwargs}
        if not jax.tree.leaves(params):
            raise ValueError("there is nothing to differentiate: neither model nor guide has a parameter.")
        operands = (svi_state.rng_key, params, svi.model, svi.guide, args, options, svi_state.mutable_state)
        taken = self._closure(*operands)
        return taken.plan, taken.labels

    def with_plan(self, plan: Plan | Mapping[str, Any]) -> RAD_ELBO:
        """A copy of this ELBO with that very plan for its gradients, instead of one that is chosen anew.

        :param plan: of the program that will be differentiated, or what its ``to_dict`` returned; for another program
            the gradient raises ``ValueError``.
        """
        found = copy.copy(self)
        found._hold(self.base, self.planner.pinned(plan.to_dict() if isinstance(plan, Plan) else plan))
        return found

    @kwargs_checked
    def calibrate(
        self,
        svi: SVI,
        svi_state: Fit,
        *args: Any,
        batches: Sequence[tuple] = (),
        draws: int = 3,
        most_bytes: int | str | None = None,
        **kwargs: Any,
    ) -> Calibration:
        """Measure what codes add to the variance of the gradient; a copy of this ELBO with it plans by it.

        Call it between ``svi.init`` and the first (compiled) ``svi.update``, and again whenever variances may have
        changed. Nothing changes but ``svi.loss``, where you assign the copy. It takes ``draws`` gradients under keys of
        their own, each at about twice the time and memory of an exact gradient; where that memory is not there,
        calibrate on the host
        (``with jax.default_device(jax.devices("cpu")[0])``). Variances are those of the gradient that the optimizer
        sees, in the unconstrained parameters.

        :param svi: the ``SVI`` that this ELBO is the loss of.
        :param svi_state: its state, or the result of its run.
        :param args: arguments of model and guide, as in ``svi.update``.
        :param batches: further tuples of such arguments, of the same shapes: one for each draw after the first. Without
            them the noise of minibatches that the caller draws is no part of the variance of the exact gradient.
        :param draws: number of gradients, at least 2. Three price the codes against one another; what they add in
            relation to the exact gradient's own variance is known as badly as that, and better from a dozen.
        :param most_bytes: temporary memory that one draw may take, an int or a string such as ``"2GiB"``; None for any.
        :return: what was measured, for :meth:`replace`.
        :raises ValueError: if a gradient is not finite, or for fewer than 2 draws.
        :raises BudgetError: if a draw takes more than ``most_bytes``; none was made then.

        Example::

            state = svi.init(key, x, y)
            svi.loss = svi.loss.replace(calibration=svi.loss.calibrate(svi, state, x, y))
            result = svi.run(key, 1000, x, y, init_state=state)
        """
        if draws < 2:
            raise ValueError(f"draws={draws}: a variance takes at least 2 gradients. Try 3.")
        svi_state = state_of(svi, svi_state, "calibrate")
        constrained, options = svi.get_params(svi_state), {**kwargs, **svi.static_kwargs}
        operands = (svi_state.rng_key, constrained, svi.model, svi.guide, args, options, svi_state.mutable_state)
        limit = None if most_bytes is None else parse_bytes(most_bytes)
        return calibrated(self._closure(*operands), svi, svi_state, (args, *batches), options, draws, limit)

    @kwargs_checked
    def fit_step(self, svi: SVI, svi_state: Fit, total: int | str, *args: Any, **kwargs: Any) -> int:
        """The ``memory_budget`` with which one whole ``svi.update`` fits into so much memory.

        Arguments (parameters, optimizer state, data), results and everything temporary count, as the compiler says
        after compiling the step; a few candidates are compiled, each as long as the step itself takes to compile.

        :param svi: the ``SVI`` that this ELBO is the loss of.
        :param svi_state: its state, or the result of its run.
        :param total: bytes, an int or a string such as ``"8GiB"``.
        :param args: arguments of model and guide, as in ``svi.update``.
        :return: the budget in bytes, for :meth:`replace`; an ELBO with ``codec``, ``added_variance`` or ``plan`` is
            asked without these.
        :raises BudgetError: if no budget makes the step fit; ``smallest_bytes`` is the smallest step that was seen.
        :raises NotImplementedError: where the compiler does not say what a step takes.

        Example::

            budget = svi.loss.fit_step(svi, state, "8GiB", x, y)
            svi.loss = svi.loss.replace(memory_budget=budget)  # before the first compiled svi.update
        """
        svi_state = state_of(svi, svi_state, "fit_step")

        def with_budget(budget: int) -> SVI:
            elbo = self.replace(memory_budget=budget, codec=None, added_variance=None, plan=None)
            return with_loss(svi, elbo)

        return fitting_budget(total, with_budget, svi_state, args, kwargs)

    def _closure(
        self,
        rng_key: Key,
        param_map: Params,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: Kwargs,
        mutable: Params | None = None,
    ) -> Closure:
        """The program of the loss of ``(param_map, rng_key, mutable, args, kwargs)`` as ``jax.jit(svi.update)`` would
        see it.

        :param mutable: the mutable state, if there is any apart from ``param_map``.
        """

        def loss(params: Params, rng_key: Key, mutable: Params | None, args: tuple, kwargs: Kwargs) -> Any:
            if not jax.tree.leaves(mutable):
                return self.base.loss(rng_key, params, model, guide, *args, **kwargs)
            return _loss_and_state(self.base, rng_key, {**params, **(mutable or {})}, model, guide, *args, **kwargs)

        labels = [site for site, _ in site_leaves(param_map)]
        return Closure(loss, param_map, self.planner, rng_key, mutable, args, kwargs, labels=labels)

    def _randomized(
        self,
        path_key: Key,
        exact: Callable,
        rng_key: Key,
        param_map: Params,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: Kwargs,
    ) -> Any:
        if any(_jax.is_forward_mode(x) for x in jax.tree.leaves(param_map)):
            raise NotImplementedError(
                "RAD_ELBO randomizes reverse-mode differentiation and has no forward mode "
                "(forward_mode_differentiation=True). Forward mode stores no residuals, so there is nothing to save: "
                "use numpyro.infer.Trace_ELBO for it."
            )
        seed, param_map = path_seed(path_key), on_device(param_map)
        run = partial(exact, rng_key, param_map, model, guide, *args, **kwargs)
        if not _jax.is_traced((seed, rng_key, param_map, args, kwargs)):
            value = run()  # outside of any transformation a model may look at its numbers
            if not _jax.is_traced(value):
                return value
        return randomized(run, self.planner, seed, site_leaves(param_map))


def _check_operands(rng_key: Any, param_map: Any, model: Any, guide: Any) -> None:
    """The first arguments of the loss, where a person hands them over."""
    expected = (
        "The order is rng_key, param_map, model, guide, *args, with parameters from svi.get_params(state); explain and "
        "plan_figure also take (svi, svi_state, *args)."
    )
    if not is_key(rng_key):
        raise TypeError(f"rng_key={shown(rng_key)}: a JAX PRNG key is expected. {expected}")
    if not (isinstance(param_map, Mapping) or is_result(param_map)):
        raise TypeError(f"param_map={shown(param_map)}: the dictionary of parameters is expected. {expected}")
    for name, fn in (("model", model), ("guide", guide)):
        if not callable(fn):
            raise TypeError(f"{name}={shown(fn)}: a function is expected. {expected}")


def _check_object(elbo: Any) -> None:
    if not isinstance(elbo, RAD_ELBO):  # SVI calls what it was given: the class, for instance, with a key as its self
        raise TypeError("the loss is the class RAD_ELBO itself. Make one: SVI(model, guide, optim, RAD_ELBO()).")


def _base_of(
    base: ELBO | None,
    num_particles: int = 1,
    vectorize_particles: Any = True,
    multi_sample_guide: bool = False,
    sum_sites: bool = True,
) -> ELBO:
    """The ELBO that is wrapped, from the arguments of ``RAD_ELBO`` that belong to it."""
    own = (num_particles, vectorize_particles, multi_sample_guide, sum_sites)
    if base is None:
        base = Trace_ELBO(*own)
    elif own != (1, True, False, True):
        raise ValueError(
            "num_particles, vectorize_particles, multi_sample_guide and sum_sites are set on the base: write "
            f"RAD_ELBO(base={type(base).__name__}(num_particles=...))."
        )
    if not isinstance(base, ELBO) or isinstance(base, RAD_ELBO):
        raise TypeError(
            f"base={shown(base)} is not an instance of one of NumPyro's ELBOs. Pass one, for example "
            "base=TraceMeanField_ELBO(), or nothing for Trace_ELBO."
        )
    _check_particles(base)
    return base


def _check_particles(base: ELBO) -> None:
    """Complain of arguments that NumPyro takes without a look and stumbles over in the first step."""
    particles = getattr(base, "num_particles", 1)
    whole = isinstance(particles, numbers.Integral) and not isinstance(particles, bool)
    if not whole or particles < 1:
        advice = " A size is an option: RAD_ELBO(memory_budget=...)." if isinstance(particles, str) else ""
        raise (ValueError if whole else TypeError)(
            f"num_particles={shown(particles)}: a number of samples of the guide is expected, at least 1.{advice}"
        )
    for name in ("multi_sample_guide", "sum_sites"):
        if not isinstance(getattr(base, name, False), bool):
            raise TypeError(f"{name}={shown(getattr(base, name))}: True or False is expected.")


def loss_by_keys(
    elbo: ELBO,
    keys: NoiseKeys,
    param_map: Params,
    mutable: Params | None,
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: Kwargs,
) -> Any:
    """The loss of any ELBO, as ``svi.update`` takes it, with a key of its own for each source of noise.

    :param elbo: a ``RAD_ELBO``, or another one, for which the key of the paths has no meaning.
    :param mutable: the mutable state, or None.
    """
    base = elbo.base if isinstance(elbo, RAD_ELBO) else elbo
    if keys.minibatch is not None:
        base, model, guide = with_minibatch_key(base, keys.minibatch, model, guide)
    exact: Any = base.loss
    if jax.tree.leaves(mutable):
        param_map, exact = {**param_map, **jax.lax.stop_gradient(mutable or {})}, partial(_loss_and_state, base)
    if isinstance(elbo, RAD_ELBO):
        result = elbo._randomized(keys.path, exact, keys.guide, param_map, model, guide, args, kwargs)
    else:
        result = exact(keys.guide, param_map, model, guide, *args, **kwargs)
    return result["loss"] if jax.tree.leaves(mutable) else result


def training_keys(rng_key: Key) -> NoiseKeys:
    """The keys with which :func:`loss_by_keys` does what ``loss`` does under one key."""
    return NoiseKeys(rng_key, None, jax.random.fold_in(rng_key, _PATH_TAG))


def draws_minibatches(svi: SVI, param_map: Params, mutable: Params | None, args: tuple, kwargs: Kwargs) -> bool:
    """Whether a plate of model or guide draws a minibatch.

    Plates in the body of a ``numpyro.contrib.control_flow.scan`` do not count: they draw from the guide's key.
    """
    watch = PlateWatch()
    base = svi.loss.base if isinstance(svi.loss, RAD_ELBO) else svi.loss
    both = watch.watched(svi.model), watch.watched(svi.guide)

    def loss(params: Params) -> Any:
        keys = training_keys(jax.random.key(0))
        return loss_by_keys(base, keys, params, mutable, *both, args, kwargs)

    jax.eval_shape(loss, param_map)
    return watch.found


def _loss_and_state(base: ELBO, *operands: Any, **options: Any) -> Any:
    """The base's loss and mutable state, of which only the former is differentiated."""
    result = base.loss_with_mutable_state(*operands, **options)
    return {**result, "mutable_state": jax.lax.stop_gradient(result["mutable_state"])}
