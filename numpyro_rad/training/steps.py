"""``Steps``: ``svi.update`` compiled once for each size of the arguments, as a loop that takes any number of steps.

How many steps one call takes is an operand of the compiled loop, so the numbers of a run do not depend on where it is
cut into calls. The plan that is compiled in is kept: the solver may stop at its time limit, and a run that is resumed
has to use the same one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_rad.ad import _jax
from numpyro_rad.ad.plan import Plan
from numpyro_rad.annotations import Kwargs
from numpyro_rad.elbo import RAD_ELBO
from numpyro_rad.fits import SVI, SVIState, with_loss
from numpyro_rad.tracing import LOOKS, Parts, shapes, signature, traced_or_constant
from numpyro_rad.training.batches import words

CAPACITY = 1024
"""Losses that are collected on the device before they have to be fetched."""


class Steps:
    """Compiled steps of one run.

    :param svi: the ``SVI``.
    :param update: ``(svi, svi_state, args, kwargs) -> (svi_state, loss)``, of a copy of the ``SVI`` whose loss has the
        plan that is compiled in.
    :param fixed: whether arguments are the same for the whole run. If the model looks at their numbers they are then
        compiled in, as ``SVI.run`` does.
    :param plans: saved plans by signature of the arguments, of a run that goes on; new ones are added.
    :param doing: what is entered with the name of what is done, ``Progress.doing``.
    :ivar temporary_bytes: temporary memory of the largest compiled step, None where the compiler does not say.
    :ivar plan: the plan of the first one and the sites of what it differentiates, None for other ELBOs than RAD's.
    """

    def __init__(
        self,
        svi: SVI,
        update: Callable[[SVI, SVIState, tuple, Kwargs], tuple[SVIState, jax.Array]],
        fixed: bool,
        plans: dict[str, dict[str, Any]],
        doing: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self._svi, self._update, self._fixed, self.plans, self._doing = svi, update, fixed, plans, doing
        self.temporary_bytes: int | None = None
        self.plan: tuple[Plan, list[str]] | None = None
        self._loops = True
        self._loss_dtype: Any = None
        self._compiled: dict[Hashable, Callable[..., tuple[SVIState, jax.Array, jax.Array]]] = {}

    @property
    def most(self) -> int:
        """Steps that one call may take."""
        return CAPACITY if self._loops else 1

    def buffer(self, state: SVIState, args: tuple, kwargs: Kwargs) -> jax.Array:
        """Room for the losses."""
        if self._loss_dtype is None:
            with self._doing("tracing"):
                loss = shapes(lambda *a, **k: self._svi.evaluate(state, *a, **k), args, kwargs, self._fixed)
            self._loss_dtype = getattr(loss, "dtype", jnp.result_type(float))
        return jnp.zeros(CAPACITY, self._loss_dtype)

    def __call__(
        self, state: SVIState, losses: jax.Array, start: int, n: int, args: tuple, kwargs: Kwargs
    ) -> tuple[SVIState, jax.Array, jax.Array]:
        """Take ``n`` steps; ``state`` and ``losses`` are given up to them.

        :return: the state, the buffer with losses from ``start`` on, and the last loss.
        """
        key = self._known(state, losses, args, kwargs)
        if not self._loops:
            n = 1
        return self._compiled[key](state, losses, np.int32(start), np.int32(n), args, kwargs)

    def compile(self, state: SVIState, args: tuple, kwargs: Kwargs) -> None:
        """Compile the step for such arguments, and take none."""
        self._known(state, self.buffer(state, args, kwargs), args, kwargs)

    # -- compilation -----------------------------------------------------------------------------------------------

    def _known(self, state: SVIState, losses: jax.Array, args: tuple, kwargs: Kwargs) -> Hashable:
        """The key of the compiled step for such arguments."""
        key = jax.tree.structure(state), signature((args, kwargs))
        if key not in self._compiled:
            self._compiled[key] = self._compile(state, losses, args, kwargs)
        return key

    def _compile(
        self, state: SVIState, losses: jax.Array, args: tuple, kwargs: Kwargs
    ) -> Callable[..., tuple[SVIState, jax.Array, jax.Array]]:
        with self._doing("tracing"):
            pinned = self._pinned(state, args, kwargs)
            try:
                return self._lowered(pinned or self._svi, state, losses, args, kwargs)
            except ValueError:
                if pinned is None:
                    raise
        self.plans[_outline(args, kwargs)] = {}  # the program that is differentiated here is another: planned in place
        with self._doing("tracing"):
            return self._lowered(self._svi, state, losses, args, kwargs)

    def _lowered(
        self, svi: SVI, state: SVIState, losses: jax.Array, args: tuple, kwargs: Kwargs
    ) -> Callable[..., tuple[SVIState, jax.Array, jax.Array]]:
        """The compiled step: arguments traced if the model allows that, a loop if the optimizer does."""

        def lower(loops: bool, parts: Parts) -> tuple[Parts, Callable, jax.stages.Lowered]:
            arrays = parts.arrays((args, kwargs))
            step = jax.jit(self._step(svi, parts.merge, loops), donate_argnums=(0, 1))
            return parts, step, step.lower(state, losses, np.int32(0), np.int32(1), arrays)

        def lowered_step(loops: bool) -> tuple[Parts, Callable, jax.stages.Lowered]:
            return traced_or_constant(partial(lower, loops), (args, kwargs), self._fixed)

        try:
            parts, step, lowered = lowered_step(self._loops)
        except LOOKS as first:
            if not self._loops:
                raise
            try:
                parts, step, lowered = lowered_step(False)
            except LOOKS:
                raise first from None
            self._loops = False
        leaves = [x for x in jax.tree.leaves((state, parts.arrays((args, kwargs)))) if isinstance(x, jax.Array)]
        alone = all(len(x.sharding.device_set) == 1 for x in leaves)
        with self._doing("compiling"):
            compiled = lowered.compile()
        return self._callable(compiled, step if not alone else None, parts)

    def _callable(
        self, compiled: jax.stages.Compiled, jitted: Callable | None, parts: Parts
    ) -> Callable[..., tuple[SVIState, jax.Array, jax.Array]]:
        """The compiled step, or the jitted one where shardings may change after a step."""
        sizes = _jax.compiled_bytes(compiled)
        if sizes is not None:
            self.temporary_bytes = max(self.temporary_bytes or 0, sizes.temporary)
        runs = compiled if jitted is None else jitted

        def call(
            state: SVIState, losses: jax.Array, start: ArrayLike, n: ArrayLike, args: tuple, kwargs: Kwargs
        ) -> tuple[SVIState, jax.Array, jax.Array]:
            return runs(state, losses, start, n, parts.arrays((args, kwargs)))

        return call

    def _step(
        self, svi: SVI, merge: Callable[[list[jax.Array]], tuple[tuple, Kwargs]], loops: bool
    ) -> Callable[..., tuple[SVIState, jax.Array, jax.Array]]:
        def advance(
            state: SVIState, losses: jax.Array, start: ArrayLike, n: ArrayLike, arrays: list[jax.Array]
        ) -> tuple[SVIState, jax.Array, jax.Array]:
            args, kwargs = merge(arrays)

            def body(
                i: ArrayLike, carry: tuple[SVIState, jax.Array, jax.Array]
            ) -> tuple[SVIState, jax.Array, jax.Array]:
                state, losses, _ = carry
                state, loss = self._update(svi, state, args, kwargs)
                loss = loss.astype(losses.dtype)
                return state, losses.at[start + i].set(loss), loss

            carry = state, losses, jnp.zeros((), losses.dtype)
            return jax.lax.fori_loop(0, n, body, carry) if loops else body(0, carry)

        return advance

    def _pinned(self, state: SVIState, args: tuple, kwargs: Kwargs) -> SVI | None:
        """The ``SVI`` with the plan for these arguments, which is made where there is none; None without a plan."""
        elbo, plan = self._svi.loss, None
        if not isinstance(elbo, RAD_ELBO) or not jax.tree.leaves(state.optim_state):
            return None
        outline = _outline(args, kwargs)
        if outline not in self.plans:
            plan = self._planned(self._svi, state, args, kwargs)
            self.plans[outline] = plan[0].to_dict()
        saved = self.plans[outline]
        pinned = with_loss(self._svi, elbo.with_plan(saved)) if saved else None
        if self.plan is None:
            self.plan = plan or self._planned(pinned or self._svi, state, args, kwargs)
        return pinned

    def _planned(self, svi: SVI, state: SVIState, args: tuple, kwargs: Kwargs) -> tuple[Plan, list[str]]:
        with warnings.catch_warnings():
            if self.plans:  # the last batch of an epoch is smaller than those of the calibration, which is no mistake
                warnings.filterwarnings("ignore", "the calibration was made for another program")
            return svi.loss.plan_of_update(svi, state, *args, **kwargs)


def _outline(args: tuple, kwargs: Kwargs) -> str:
    """Arguments in words that are the same in another process."""
    return "; ".join(f"{name}: {what}" for name, what in words((args, kwargs)).items())
