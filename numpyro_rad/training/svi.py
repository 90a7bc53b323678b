"""``RAD_SVI``: NumPyro's ``SVI`` whose ``run`` plans, tracks its noise, reads batches, saves, resumes and reports.

``update`` is NumPyro's. What is new is the loop around it: one compiled function takes any number of steps, and between
two calls of it losses are fetched, the noise of the gradient is looked at and checkpoints are written. Nothing of that
changes a number, to the last bit. Parameters and losses are those of ``SVI.run`` with the same key up to rounding, no
more than its own two loops differ by.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import ELBO
from numpyro.infer.svi import SVI, SVIState

from numpyro_rad.ad import _jax
from numpyro_rad.ad.plan import BudgetError
from numpyro_rad.annotations import Key, Kwargs, Params, PyTree
from numpyro_rad.diagnostics.tracking import Tracking
from numpyro_rad.elbo import RAD_ELBO
from numpyro_rad.fits import is_result, on_device
from numpyro_rad.mistakes import check_fit, check_names, check_state, shown
from numpyro_rad.planning.calibration import Calibration
from numpyro_rad.planning.planner import VarianceWarning
from numpyro_rad.tracing import looks_at_numbers
from numpyro_rad.training.arguments import (
    blamed,
    check_key,
    check_parts,
    check_run,
    checked_callbacks,
)
from numpyro_rad.training.batches import Batches, Fixed, Varying, words
from numpyro_rad.training.checkpoints import Checkpoint, Snapshot, Store
from numpyro_rad.training.fingerprint import checksum, data
from numpyro_rad.training.loop import CALIBRATION_DRAWS, CallbackInfo, Fit, Stop
from numpyro_rad.training.optimizers import evaluations
from numpyro_rad.training.progress import Progress
from numpyro_rad.training.results import RAD_SVIRunResult
from numpyro_rad.training.validation import Validator, held_out

_DEFAULT_TRACKING = Tracking()


class RAD_SVI(SVI):
    """Stochastic variational inference in little memory that watches itself: a drop-in for ``numpyro.infer.SVI``.

    An ELBO that is passed in is never changed. What ``init`` and ``run`` measure for it, at the beginning, for a new
    plan or read from a checkpoint, goes into a copy of it, which is the ``loss`` of this object from then on
    (:meth:`plan_by`), as ``init`` sets ``constrain_fn``. So ``result.svi.loss`` is the ELBO that a run has used, and
    objects that were made with one ELBO know nothing of each other.

    :param model: as for ``SVI``.
    :param guide: as for ``SVI``.
    :param optim: as for ``SVI``.
    :param loss: an ELBO, by default ``RAD_ELBO()``. Those of NumPyro work too; they have no path noise to track.
    :param tracking: how ``run`` measures the noise of the gradient, None not to.
    :param calibrate: whether to measure what codes add to the variance before the first step
        (:meth:`RAD_ELBO.calibrate`). None: where plans are chosen by price, with ``memory_budget`` or
        ``added_variance``, and no calibration was given. A size such as ``"2GiB"``: if that takes no more temporary
        memory. Where memory is too short, plans are made without, with a warning.
    :param static_kwargs: as for ``SVI``.

    Example::

        svi = RAD_SVI(model, guide, optax.adam(1e-3), RAD_ELBO(memory_budget="256MiB"))
        result = svi.run(jax.random.key(0), 10_000, x, y)
        result.report("fit.html")
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: ELBO | None = None,
        *,
        tracking: Tracking | None = _DEFAULT_TRACKING,
        calibrate: bool | int | str | None = None,
        **static_kwargs: Any,
    ) -> None:
        check_names(RAD_SVI.__init__, (model, guide), static_kwargs)
        check_parts(model, guide, optim, loss, tracking, calibrate)
        super().__init__(model, guide, optim, RAD_ELBO() if loss is None else loss, **static_kwargs)
        self.tracking, self.calibrate, self._optim = tracking, calibrate, optim
        self._measured: _Measured | None = None  # by this object, so it is measured anew for another fit

    def init(self, rng_key: Key, *args: Any, init_params: Params | None = None, **kwargs: Any) -> SVIState:
        """The initial state, as in ``SVI``; with ``RAD_ELBO`` it also calibrates, if that is wanted, and plans.

        :raises BudgetError: if no plan meets the budget.
        """
        check_key(rng_key, "init(rng_key, *args)", *args)
        with blamed(self.model, args, kwargs):
            state = super().init(rng_key, *args, init_params=init_params, **kwargs)
        elbo, params = self.loss, self.optim.get_params(state.optim_state)
        if _is_transformed((state, args, kwargs)):
            return state
        self._check_optimizer(state, args, kwargs)
        if isinstance(elbo, RAD_ELBO) and jax.tree.leaves(params):
            self._calibrate(state, args, kwargs)
            self.loss.plan_of_update(self, state, *args, **kwargs)
        return state

    def plan_by(self, calibration: Calibration) -> None:
        """Plan by what was measured from now on: ``loss`` becomes a copy of it with that calibration.

        ``init`` and ``run`` call this themselves, and measure anew for another start or other data. An ELBO with a
        calibration of yours, ``RAD_ELBO(calibration=...)``, is left as it is.

        :param calibration: from ``svi.loss.calibrate``.
        :raises TypeError: if it is no calibration, or ``loss`` is an ELBO of NumPyro.
        """
        if not isinstance(self.loss, RAD_ELBO):
            raise TypeError(f"plan_by: the loss is {shown(self.loss)}, whose gradients have no plan. Pass RAD_ELBO().")
        self.loss = self.loss.replace(calibration=calibration)
        self._measured = _Measured(calibration)

    def _check_optimizer(self, state: SVIState, args: tuple, kwargs: Kwargs) -> None:
        """Refuse an optimizer that cannot take the steps; warn of one that searches along lines amid codes."""
        elbo = self.loss
        if not jax.tree.leaves(self.optim.get_params(state.optim_state)):
            return
        if evaluations(self.optim, state.optim_state, self._optim) > 1 and isinstance(elbo, RAD_ELBO):
            plan, _ = elbo.plan_of_update(self, state, *args, **kwargs)
            if any(part.encoded for part in plan.walk()):
                warnings.warn(
                    f"{type(self.optim).__name__} evaluates the loss several times in a step and compares its values "
                    "with gradients, which are random here. Pass RAD_ELBO(exact=True), or an optimizer such as "
                    "optax.adam(1e-3).",
                    stacklevel=3,
                )

    def update(self, svi_state: SVIState, *args: Any, **kwargs: Any) -> tuple[SVIState, jax.Array]:
        """One step, as in ``SVI``."""
        check_fit("update", self, svi_state)
        return super().update(svi_state, *args, **kwargs)

    def stable_update(self, svi_state: SVIState, *args: Any, **kwargs: Any) -> tuple[SVIState, jax.Array]:
        """One step that is not taken where it is not finite, as in ``SVI``."""
        check_fit("stable_update", self, svi_state)
        return super().stable_update(svi_state, *args, **kwargs)

    def evaluate(self, svi_state: SVIState, *args: Any, **kwargs: Any) -> jax.Array:
        """The loss under the key of the next step, as in ``SVI``, but with the mutable state, which that leaves out."""
        check_fit("evaluate", self, svi_state)
        mutable = svi_state.mutable_state
        if not mutable:
            return super().evaluate(svi_state, *args, **kwargs)
        key, options = jax.random.split(svi_state.rng_key)[1], {**kwargs, **self.static_kwargs}
        values = {**self.get_params(svi_state), **mutable}
        return self.loss.loss_with_mutable_state(key, values, self.model, self.guide, *args, **options)["loss"]

    def get_params(self, svi_state: SVIState) -> Params:
        """The constrained parameters, as in ``SVI``."""
        check_fit("get_params", self, svi_state)
        return super().get_params(svi_state)

    def _calibrate(self, state: SVIState, args: tuple, kwargs: Kwargs, batches: Sequence[tuple] = ()) -> None:
        """Measure variances where that is wanted and nobody else has, once for the same start and data: ``init`` does
        it, and a ``run`` with the same key after it begins at the same state."""
        elbo = self.loss
        if not isinstance(elbo, RAD_ELBO) or self.calibrate is False:
            return
        planner, known = elbo.planner, self._measured
        if self.calibrate is None and planner.memory_budget is None and planner.added_variance is None:
            return
        if planner.calibration is None or (known is not None and planner.calibration is known.calibration):
            at = checksum(state), words((args, kwargs)), *(data(self, (a, kwargs)) for a in (args, *batches))
            if planner.calibration is not None and known is not None and at == known.at:
                return
            if planner.memory_budget is not None:  # what is impossible is said before anything is measured
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", VarianceWarning)
                    plan, _ = elbo.replace(calibration=None).plan_of_update(self, state, *args, **kwargs)
                if plan.untouched or (plan.graph.slices is not None and not any(p.encoded for p in plan.walk())):
                    return  # it is met without codes, so there is none to price
            most = None if self.calibrate in (None, True) else self.calibrate
            options = {"batches": batches, "draws": CALIBRATION_DRAWS, "most_bytes": most}
            try:
                self.plan_by(elbo.calibrate(self, state, *args, **options, **kwargs))
            except Exception as error:
                if not (isinstance(error, BudgetError) or _jax.is_out_of_memory(error)):
                    raise
                why = error if isinstance(error, BudgetError) else "memory is too short for it (see RAD_ELBO.calibrate)"
                warnings.warn(f"Variances were not measured, plans are made without: {why}", stacklevel=3)
            else:
                self._measured = _Measured(self.loss.planner.calibration, at)

    def run(
        self,
        rng_key: Key,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        stable_update: bool = False,
        forward_mode_differentiation: bool = False,
        init_state: SVIState | None = None,
        init_params: Params | None = None,
        batches: Any = None,
        callbacks: Sequence[Callable[[CallbackInfo], object]] = (),
        stop: Stop | None = None,
        checkpoint: Checkpoint | str | Path | None = None,
        validate: Any = None,
        **kwargs: Any,
    ) -> RAD_SVIRunResult:
        """Fit, as ``SVI.run`` does: the same parameters, state and losses.

        Inside of ``jax.vmap``, ``jax.jit`` and the like it is ``SVI.run``, many fits at once for example: what the host
        does between steps (tracking, calibration, callbacks, files) does not exist there, and a warning says so.

        Ctrl-C ends the run after the steps that are under way and returns what there is; a second one raises.

        :param rng_key: JAX PRNG key.
        :param num_steps: steps to take, those of a resumed run included.
        :param args: arguments of model and guide; with ``batches`` they come before those of the batch.
        :param progress_bar: whether to show loss, ρ and memory while running.
        :param stable_update: whether a step with a NaN or infinite result is not taken.
        :param forward_mode_differentiation: for NumPyro's own ELBOs.
        :param init_state: state to go on from, or the earlier result.
        :param init_params: initial values of parameters.
        :param batches: one batch for each step: an iterable, read again for every epoch if it can be, or a function
            ``epoch -> iterable``. A batch is a tuple (arguments), a dictionary (keyword arguments) or one array, of
            NumPy or JAX; an iterator that ends, ends the run. Batches are read ahead on a thread. They may differ in
            size, not in structure, dtype or number of axes. Whole numbers and strings in them are compiled in.
        :param callbacks: functions of a :class:`numpyro_rad.training.CallbackInfo`, called whenever the noise is looked
            at (every ``tracking.interval`` steps, 100 without tracking); one that returns ``True`` ends the run.
        :param stop: ``"converged"`` to stop by the convergence of the iterates
            (:meth:`numpyro_rad.diagnostics.Iterates.converged`; a run that never does warns, and says how far it was),
            a :class:`Plateau` to stop by the loss on held-out data, or a function ``(step, losses) -> bool``. It is
            asked when callbacks are called.
        :param checkpoint: where to save the run, a folder of its own. If there is a checkpoint of it, the run goes on
            from there, to the same bits as if it had never ended; with other data or another optimizer it is refused.
            Batches have to come in the same order again, since they are read from the beginning of the epoch and passed
            over; the first one of the epoch is compared. In another process that takes the same ``PYTHONHASHSEED``:
            NumPyro adds up sites in the order of a set of names, and sums are rounded differently in another order.
        :param validate: held-out data: a batch (as in ``batches``) or a list of batches, whose losses are averaged.
            Whenever callbacks are called, and at the end, the exact loss with them in the place of the training data is
            evaluated: eight draws of the guide, the same ones each time and one at a time, without a gradient. With
            ``batches``, ``args`` come before those of the held-out batch, otherwise these take their place; ``kwargs``
            stay where the batch does not name them. Mutable state is used and not changed, and plates that draw
            minibatches draw the same ones each time. See :class:`numpyro_rad.diagnostics.records.Validation` for what
            the number means.
        :param kwargs: keyword arguments of model and guide.
        :return: result with the fields ``params``, ``state`` and ``losses``.
        :raises TypeError: for an argument of the wrong type.
        :raises ValueError: for fewer than one step, for batches that change or of which there are none, and for
            held-out data that the guide has no parameters for.
        :raises BudgetError: if no plan meets the budget.
        :raises CheckpointError: for a checkpoint of another run, a damaged one and a folder that cannot be written.

        Example::

            loader = lambda epoch: batches_of(x, y, 256, seed=epoch)
            result = svi.run(key, 20_000, batches=loader, stop="converged", checkpoint="fit")
        """
        check_names(RAD_SVI.run, (self.model, self.guide), kwargs)
        check_run(rng_key, num_steps, args, batches, stop, checkpoint, validate)
        called = checked_callbacks(callbacks)
        options = {"stable_update": stable_update, "forward_mode_differentiation": forward_mode_differentiation}
        if _is_transformed((rng_key, args, kwargs, init_state, init_params)):
            asked = {"batches": batches, "callbacks": called, "stop": stop, "checkpoint": checkpoint}
            start = {"init_state": init_state, "init_params": init_params}
            return self._run_transformed(
                {**asked, "validate": validate}, rng_key, num_steps, *args, **start, **options, **kwargs
            )
        if init_state is not None:
            init_state = on_device(init_state.state if is_result(init_state) else init_state)
            check_state("run(init_state=...)", init_state)
        if isinstance(checkpoint, (str, Path)):
            checkpoint = Checkpoint(checkpoint)
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(Progress(num_steps, progress_bar))
            store = stack.enter_context(Store(checkpoint)) if checkpoint is not None else None
            snapshot = store.newest() if store is not None else None
            done = _steps_of(snapshot, num_steps, store)
            validator, beside = None, (args if batches is not None else (), kwargs)
            if batches is None:
                feed: Any = Fixed(args, kwargs)
            else:
                args, kwargs = on_device((args, kwargs))
                position = snapshot.meta["position"] if snapshot is not None else (0, 0)
                reader = stack.enter_context(Batches(batches, num_steps - done, *position))
                feed = Varying(reader, args, kwargs)
            state, args, kwargs = init_state, *feed.first
            if state is None or self.constrain_fn is None:
                with progress.doing("initial values"), blamed(self.model, args, kwargs, batches):
                    fresh = on_device(SVI.init(self, rng_key, *args, init_params=init_params, **kwargs))
                state = fresh if state is None else state
            with progress.doing("tracing"):
                if batches is None:
                    args, kwargs = self._placed(state, args, kwargs)
                    feed = Fixed(args, kwargs)
                self._check_optimizer(state, args, kwargs)
            if snapshot is None:
                more = [a for a, k in feed.next_few(CALIBRATION_DRAWS)[1:] if not k and words(a) == words(args)]
                if init_state is None or self._measured is None:
                    with progress.doing("calibrating"):
                        self._calibrate(state, args, kwargs, more)
            if validate is not None:
                validator = Validator(self, state, held_out(validate, *beside))
            start = {"init_state": init_state, "init_params": init_params}
            fit = Fit(self, state, num_steps, feed, options, store, checkpoint, snapshot, start, validator, progress)
            fit.go(called, stop)
            return fit.result(stop)

    def _placed(self, state: SVIState, args: tuple, kwargs: Kwargs) -> tuple[tuple, Kwargs]:
        """Arguments with NumPy arrays put on the device once for all steps, unless the model looks at numbers in them:
        while a program is made that is possible with NumPy arrays alone."""
        there = any(isinstance(x, (np.ndarray, np.generic)) for x in jax.tree.leaves((args, kwargs)))
        if not there or looks_at_numbers(partial(self.evaluate, state), args, kwargs):
            return args, kwargs
        return on_device((args, kwargs))

    def _run_transformed(self, asked: dict[str, Any], *args: Any, **kwargs: Any) -> RAD_SVIRunResult:
        """``SVI.run`` as one program, of which ``asked`` is no part."""
        if asked["batches"] is not None:
            raise ValueError(
                "run(batches=...): the host reads batches between steps, and inside of jax.vmap, jax.jit or "
                "jax.lax.scan there is no host. Pass the data as arguments; plates may draw minibatches of them."
            )
        left_out = ["the progress bar"] + ["tracking of the noise"] * (self.tracking is not None)
        left_out += [f"{name}=" for name, given in asked.items() if given]
        if isinstance(self.loss, RAD_ELBO) and self.loss.planner.calibration is None and self.calibrate is not False:
            left_out += ["calibration"]
        warnings.warn(
            f"RAD_SVI.run inside of a transformation of JAX is SVI.run, without {', '.join(left_out)} and without a "
            "record for reports.",
            stacklevel=3,
        )
        return RAD_SVIRunResult(*super().run(*args, progress_bar=False, **kwargs))


class _Measured(NamedTuple):
    """A calibration that a ``RAD_SVI`` has measured or read.

    :ivar at: the start and the data that it was measured with; None where it is not that of the beginning of a fit.
    """

    calibration: Calibration
    at: tuple | None = None


def _is_transformed(tree: PyTree) -> bool:
    """Whether this runs inside of ``jax.jit``, ``jax.vmap`` or another transformation, as part of a program."""
    return _jax.is_traced((tree, jnp.zeros(())))


def _steps_of(snapshot: Snapshot | None, num_steps: int, store: Store | None) -> int:
    done = snapshot.step if snapshot is not None else 0
    if done > num_steps:
        assert store is not None
        raise ValueError(
            f"num_steps={num_steps}, but the checkpoint in {store.folder} has {done} steps already. Ask for more steps "
            "in all, or choose another folder."
        )
    return done
