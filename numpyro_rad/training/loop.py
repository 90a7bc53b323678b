"""The loop of ``RAD_SVI.run``: steps, and what happens between them.

A call of the compiled loop takes steps until something is due (a look at the noise, a checkpoint, a fetch of losses).
Nothing of that depends on the clock but how many steps a call takes, which changes no number; what is done at a step
depends on its number alone, so that a run that is resumed does the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_rad.ad import _jax
from numpyro_rad.annotations import Kwargs
from numpyro_rad.diagnostics.quality import Iterates
from numpyro_rad.diagnostics.records import Alarm, FitRecord, Track, Validation, from_dict, to_dict
from numpyro_rad.diagnostics.tracking import Tracker
from numpyro_rad.elbo import RAD_ELBO
from numpyro_rad.fits import SVI, SVIState
from numpyro_rad.planning.calibration import Calibration
from numpyro_rad.training import results
from numpyro_rad.training.batches import Fixed
from numpyro_rad.training.checkpoints import (
    Checkpoint,
    CheckpointError,
    Snapshot,
    Store,
    check_same_run,
    from_host,
    to_host,
)
from numpyro_rad.training.fingerprint import data, fingerprint
from numpyro_rad.training.progress import Progress
from numpyro_rad.training.results import RAD_SVIRunResult
from numpyro_rad.training.steps import Steps
from numpyro_rad.training.validation import Plateau, Validator
from numpyro_rad.wording import size_text

CALIBRATION_DRAWS = 3

_INTERVAL = 100  # steps between two callbacks where nothing is tracked

_CHUNK_SECONDS = 0.2  # between two looks of the host: the progress bar moves, Ctrl-C is noticed

_IN_FLIGHT = 2  # calls that are handed to the device before the first one has to be done

_EARLY_END = "early end"

_ITERATES = 1000  # that are remembered of a run, at most

Stop = str | Plateau | Callable[[int, np.ndarray], bool]


@dataclasses.dataclass(frozen=True, eq=False)
class CallbackInfo:
    """What a callback of ``RAD_SVI.run`` gets.

    :ivar step: steps taken.
    :ivar state: the state of SVI after them, a copy that may be kept.
    :ivar loss: of the last step.
    :ivar losses: of all steps.
    :ivar track: noise of the gradient so far, None if it is not tracked.
    :ivar alarms: what was noticed so far.
    :ivar validation: loss on held-out data so far, None without ``validate``.
    """

    step: int
    state: SVIState
    loss: float
    losses: np.ndarray
    track: Track | None
    alarms: tuple[Alarm, ...]
    validation: Validation | None = None


class Fit:
    """A run: its state, what happened so far, and what is to be done between steps."""

    def __init__(
        self,
        svi: Any,
        state: SVIState,
        num_steps: int,
        feed: Any,
        options: dict[str, bool],
        store: Store | None,
        checkpoint: Checkpoint | None,
        snapshot: Snapshot | None,
        start: dict[str, Any],
        validator: Validator | None,
        progress: Progress,
    ) -> None:
        self.svi, self.num_steps, self.feed, self.options = svi, num_steps, feed, options
        self.store, self.checkpoint, self.validator = store, checkpoint, validator
        self.progress, self.created = progress, results.now()
        self.state = jax.tree.map(jnp.copy, state)  # steps are given their memory
        self.step, self.used, self.pace = 0, 0, 1
        self.fetched: list[np.ndarray] = []
        self.alarms: list[Alarm] = []
        self.diagnosed = self.stopped = self.interrupted = False
        self.stopped_at: int | None = None
        self.saved: int | None = None  # the step of the newest checkpoint
        self.ending = "all steps were taken"
        tracking = (
            None if options["forward_mode_differentiation"] else svi.tracking
        )  # its gradients are of reverse mode
        self.interval = _INTERVAL if tracking is None else tracking.interval
        self.tracker = None if tracking is None else Tracker(svi, tracking)
        self.iterates = Iterates(max(1, num_steps // _ITERATES))
        self.sketches: list[tuple[int, jax.Array]] = []
        self._sketch = jax.jit(lambda optim_state: Iterates.sketch(svi.optim.get_params(optim_state)))
        self.plans: dict[str, dict[str, Any]] = {}
        self.resumed = snapshot is not None
        self.fingerprint = fingerprint(svi, self.state, options, feed.first, start) if store is not None else {}
        self.epoch = feed.position[0]  # whose first batch the fingerprint is of
        if snapshot is not None:
            self._restore(snapshot)
        self.steps = self._new_steps()
        self.last_good = self._copy() if self.tracker is not None else None
        self.last_good_step = self.step

    def _new_steps(self) -> Steps:
        stable, forward = (self.options[name] for name in ("stable_update", "forward_mode_differentiation"))

        def update(svi: SVI, state: SVIState, args: tuple, kwargs: Kwargs) -> tuple[SVIState, jax.Array]:
            step = svi.stable_update if stable else svi.update
            return step(state, *args, forward_mode_differentiation=forward, **kwargs)

        return Steps(self.svi, update, isinstance(self.feed, Fixed), self.plans, self.progress.doing)

    def _copy(self) -> SVIState:
        return jax.tree.map(jnp.copy, self.state)

    @property
    def losses(self) -> np.ndarray:
        """Of all steps whose losses were fetched."""
        if len(self.fetched) != 1:
            self.fetched = [np.concatenate(self.fetched) if self.fetched else np.zeros(0, np.float32)]
        return self.fetched[0]

    @property
    def held_out(self) -> Validation | None:
        """Loss on held-out data so far."""
        return None if self.validator is None else self.validator.record

    def go(self, callbacks: tuple, stop: Stop | None) -> None:
        """Take the steps."""
        if self._nothing_left(stop):
            return
        losses = self.steps.buffer(self.state, *self.feed.first)
        flying: deque = deque()
        flushed = time.perf_counter()
        bar = self.progress.bar
        with _deferred_interrupt() as asked:
            while self.step < self.num_steps and self.stopped_at is None:
                try:
                    given = None if asked.is_set() else self.feed.next(asked.is_set)
                except BaseException:  # of the source of the batches: what was done until then is saved
                    self._flush(losses, bar, 1.0)
                    if self.store is not None:
                        self._save()
                    raise
                if given is None:
                    break
                n = self._steps_until_something()
                self.state, losses, last = self.steps(self.state, losses, self.used, n, *given)
                n = min(n, self.steps.most)
                self.step, self.used = self.step + n, self.used + n
                if self.iterates.wants(self.step):
                    self.sketches.append((self.step, self._sketch(self.state.optim_state)))
                flying.append((self.step, last, given, self.feed.name))
                while len(flying) > _IN_FLIGHT:
                    self._landed(*flying.popleft())
                looks = self.step % self.interval == 0
                saves = self.checkpoint is not None and self.step % self.checkpoint.every == 0
                late = time.perf_counter() - flushed > _CHUNK_SECONDS
                if looks or saves or late or self.used == losses.size or self.step == self.num_steps:
                    while flying:
                        self._landed(*flying.popleft())
                    self._flush(losses, bar, time.perf_counter() - flushed)
                    if looks:
                        self._look(callbacks, stop)
                    if saves and self.step < self.num_steps:
                        self._save()
                    flushed = time.perf_counter()
            while flying:
                self._landed(*flying.popleft())
            self._flush(losses, bar, time.perf_counter() - flushed)
            self._end(asked, stop)
            if self.store is not None:
                self._save()

    def _nothing_left(self, stop: Stop | None) -> bool:
        """Whether the run had ended before it was resumed, which is said."""
        if not self.resumed or not (self.step == self.num_steps or (self.stopped and stop is not None)):
            return False
        assert self.store is not None
        how = f"all {self.step} steps were taken"
        if self.stopped and stop is not None:
            self.stopped_at, how = self.step, f"a rule stopped it after step {self.step}"
        self.ending = f"nothing was left to do: {how} before"
        warnings.warn(
            f"run: nothing is left to do. The checkpoint in {self.store.folder} is of this very run, and {how} before; "
            "its result is returned. Ask for more steps in all to go on, or choose another folder to train again.",
            stacklevel=4,
        )
        return True

    def _end(self, asked: threading.Event, stop: Stop | None) -> None:
        """Say why the run ended before its last step, if it did, and why it did not although it was asked to."""
        if self.stopped_at is not None:
            return
        if self.step == self.num_steps:
            if stop == "converged" and not self.iterates.converged():
                self.ending = "all steps were taken, and the iterates had not converged"
                warnings.warn(
                    f'run: stop="converged", but all {self.step} steps were taken: {self.iterates.describe()}. Ask for '
                    "more steps, or raise the learning rate if the loss fell slowly.",
                    stacklevel=4,
                )
            return
        if asked.is_set():
            self.interrupted, self.ending = True, f"interrupted after step {self.step}"
            return
        self.stopped_at, self.ending = self.step, f"the batches ended after step {self.step}"
        message = (
            f"The batches ended after step {self.step} of {self.num_steps}: they are an iterator, which is read once. "
            "Pass a list, or a function epoch -> iterable, for more than one epoch."
        )
        self.alarms.append(Alarm(self.step, _EARLY_END, "", message))
        warnings.warn(f"run: {message}", stacklevel=4)

    def _steps_until_something(self) -> int:
        """How many steps the next call takes."""
        if not isinstance(self.feed, Fixed):
            return 1
        every = [self.interval, self.iterates.stride]
        every += [self.checkpoint.every] if self.checkpoint is not None else []
        until = min(e - self.step % e for e in every)
        return max(1, min(until, self.num_steps - self.step, self.steps.most - self.used, self.pace))

    def _landed(self, step: int, last: jax.Array, given: tuple[tuple, Kwargs], name: str) -> None:
        """Wait for a call; look at a loss that is not finite while its batch is known."""
        loss = float(last)
        if name and not np.isfinite(loss):
            self._diagnose(step, given, name, loss)

    def _flush(self, losses: jax.Array, bar: Any, seconds: float) -> None:
        """Fetch losses, remember iterates, move the progress bar."""
        if not self.used:
            return
        new = np.asarray(losses)[: self.used].copy()
        bad = np.flatnonzero(~np.isfinite(new))
        if len(bad) and not self.feed.name:
            self._diagnose(self.step - self.used + 1 + int(bad[0]), self.feed.first, "", float(new[bad[0]]))
        self.fetched.append(new)
        self.pace = int(np.clip(self.used * _CHUNK_SECONDS / max(seconds, 1e-9), 1, 8 * self.pace))
        if self.sketches:
            first = self.step - self.used + 1
            steps = np.array([s for s, _ in self.sketches])
            self.iterates.record(steps, np.stack([np.asarray(x) for _, x in self.sketches]), new[steps - first])
            self.sketches = []
        bar.update(self.used)
        self.used = 0
        if not bar.disable:
            bar.set_postfix_str(self._postfix(new), refresh=False)

    def _postfix(self, new: np.ndarray) -> str:
        valid = new[np.isfinite(new)] if self.options["stable_update"] else new
        parts = [f"loss {valid.mean() if len(valid) else np.nan:.4g}"]
        if self.tracker is not None and self.tracker.rho is not None and np.isfinite(self.tracker.rho):
            parts.append(f"ρ {self.tracker.rho:.2g}")
        if self.held_out is not None:
            parts.append(f"held out {self.held_out.mean[-1]:.4g}")
        if self.steps.plan is not None:
            parts.append(f"residuals {size_text(self.steps.plan[0].stored_bytes)}")
        elif self.steps.temporary_bytes is not None:
            parts.append(f"temporary {size_text(self.steps.temporary_bytes)}")
        return ", ".join(parts)

    # -- what happens between steps --------------------------------------------------------------------------------

    def _look(self, callbacks: tuple, stop: Stop | None) -> None:
        if self.tracker is not None:
            (args, kwargs), *others = self.feed.samples(2)
            other = others[0] if others else None
            with self.progress.doing("looking at the noise"):
                seconds = self.progress.total
                self.alarms += self.tracker.look(self.step, self.state, args, kwargs, seconds=seconds, other=other)
            if np.isfinite(self.losses[-1]):
                self.last_good, self.last_good_step = self._copy(), self.step
            if self.tracker.wants_replan:
                self._replan()
        if self.validator is not None:
            with self.progress.doing("held-out data"):
                self.validator.look(self.step, self.state)
        if callbacks:
            track = None if self.tracker is None else self.tracker.track
            noticed = track, tuple(self.alarms), self.held_out
            seen = CallbackInfo(self.step, self._copy(), float(self.losses[-1]), self.losses, *noticed)
            with self.progress.doing("callbacks"):
                answers = [callback(seen) for callback in callbacks]
            if any(answer is True for answer in answers):
                self.stopped_at, self.ending = self.step, f"a callback ended it after step {self.step}"
        if stop is not None and self.stopped_at is None:
            why = self._reason(stop)
            if why:
                self.stopped, self.stopped_at = True, self.step
                self.ending = f"stopped after step {self.step}: {why}"

    def _reason(self, stop: Stop) -> str:
        """Why to stop here; empty to go on."""
        if isinstance(stop, str):
            return "the iterates had converged" if self.iterates.converged() else ""
        if isinstance(stop, Plateau):
            reached = self.held_out is not None and stop.reached(self.held_out.mean)
            return f"the loss on held-out data had not fallen for {stop.patience} looks" if reached else ""
        return "the rule said so" if stop(self.step, self.losses) else ""

    def _replan(self) -> None:
        """Measure variances at the current state, plan again, compile again."""
        elbo = self.svi.loss
        if not isinstance(elbo, RAD_ELBO):
            return
        (args, kwargs), *others = self.feed.samples(CALIBRATION_DRAWS)
        more = [a for a, k in others if not k]
        try:
            with self.progress.doing("calibrating"):
                options = {"batches": more, "draws": CALIBRATION_DRAWS}
                self.svi.plan_by(elbo.calibrate(self.svi, self.state, *args, **options, **kwargs))
        except Exception as error:
            if _jax.is_out_of_memory(error):
                why = "memory is too short to measure variances (see RAD_ELBO.calibrate)."
            elif isinstance(error, ValueError):  # a gradient that is not finite; the tracker tells of that
                why = str(error)
            else:
                raise
            self.alarms.append(Alarm(self.step, "replan", "", f"No new plan was made: {why}"))
            return
        self.plans = {}
        before = self.steps.plan
        self.steps = self._new_steps()
        now, _ = self.svi.loss.plan_of_update(self.svi, self.state, *args, **kwargs)
        sizes = f"{size_text(now.stored_bytes)} of residuals are stored"
        sizes += f", before it were {size_text(before[0].stored_bytes)}" if before is not None else ""
        message = f"Variances were measured again and a new plan was made: {sizes}."
        self.alarms.append(Alarm(self.step, "replan", "", message))

    def _diagnose(self, step: int, given: tuple[tuple, Kwargs], name: str, loss: float) -> None:
        """Say, once, where a loss that is not finite comes from."""
        if self.diagnosed or self.options["stable_update"]:
            return
        self.diagnosed = True
        of = f" It was {name}." if name else ""
        if self.tracker is not None:
            found = self.tracker.diagnose(step, self._state_before(step), *given, loss)
            self.alarms += [dataclasses.replace(a, message=a.message + of) for a in found]
        else:
            message = f"The loss is {loss}. Look at the data and the learning rate.{of}"
            self.alarms.append(Alarm(step, "nonfinite", "", message))

    def _state_before(self, step: int) -> SVIState:
        """The state before a step: the last good one, and the same steps from there on if their batches are known."""
        state, at = jax.tree.map(jnp.copy, self.last_good), self.last_good_step
        if self.feed.name:
            return state
        losses = self.steps.buffer(state, *self.feed.first)
        while at < step - 1:
            n = min(self.steps.most, step - 1 - at)
            state, losses, _ = self.steps(state, losses, 0, n, *self.feed.first)
            at += n
        return state

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        assert self.store is not None
        if self.step == self.saved:
            return
        elbo = self.svi.loss
        calibration = elbo.planner.calibration if isinstance(elbo, RAD_ELBO) else None
        if self.epoch != self.feed.position[0]:
            self.epoch, self.fingerprint["data"] = self.feed.position[0], data(self.svi, self.feed.first)
        meta = {
            "fingerprint": self.fingerprint,
            "position": list(self.feed.position),
            "seconds": self.progress.split(),
            "alarms": to_dict(self.alarms),
            "tracker": None if self.tracker is None else self.tracker.to_dict(),
            "iterates": self.iterates.to_dict(),
            "validation": None if self.validator is None else self.validator.to_dict(),
            "calibration": None if calibration is None else calibration.to_dict(),
            "plans": self.plans,
            "stopped": self.stopped,
            "diagnosed": self.diagnosed,
        }
        try:
            with self.progress.doing("saving"):
                self.store.save(Snapshot(self.step, [*to_host(self.state), self.losses], meta))
        except CheckpointError as error:  # the fit itself is well: nothing of it is to be lost
            warnings.warn(f"{error} The run goes on without it.", stacklevel=4)
            self.alarms.append(Alarm(self.step, "checkpoint", "", str(error)))
        else:
            self.saved = self.step

    def _restore(self, snapshot: Snapshot) -> None:
        assert self.store is not None
        meta = snapshot.meta
        check_same_run(self.store.folder, meta["fingerprint"], self.fingerprint, bool(self.feed.name))
        *leaves, losses = snapshot.arrays
        self.state = from_host(leaves, self.state)
        self.step, self.fetched, self.saved = snapshot.step, [losses], snapshot.step
        self.progress.go_on(self.step, meta["seconds"])
        self.alarms = [from_dict(Alarm, a) for a in meta["alarms"] if a["kind"] != _EARLY_END]  # it goes on now
        self.iterates = Iterates.restore(meta["iterates"])
        if self.validator is not None:
            self.validator.restore(meta.get("validation"))
        self.plans, self.stopped, self.diagnosed = meta["plans"], meta["stopped"], meta["diagnosed"]
        if isinstance(self.svi.loss, RAD_ELBO) and meta["calibration"] is not None:
            self.svi.plan_by(Calibration.from_dict(meta["calibration"]))
        if self.tracker is not None and meta["tracker"] is not None:
            self.tracker.restore(meta["tracker"])  # it watches the plan of the loss that is there

    # -- the result ------------------------------------------------------------------------------------------------

    def result(self, stop: Stop | None) -> RAD_SVIRunResult:
        """What there is now."""
        svi = self.svi
        result = RAD_SVIRunResult(svi.get_params(self.state), self.state, jnp.asarray(self.losses))
        params = jax.tree.leaves(svi.optim.get_params(self.state.optim_state))
        plan, (args, kwargs) = self.steps.plan, self.feed.last
        if plan is None and params and isinstance(svi.loss, RAD_ELBO):  # all steps were taken before it was resumed
            plan = svi.loss.plan_of_update(svi, self.state, *args, **kwargs)
        activities = self.progress.split()
        result.record = FitRecord(
            title=results.title(svi),
            created=self.created,
            versions=results.versions(),
            options=self._told(stop),
            num_steps=self.step,
            num_params=sum(x.size for x in params),
            seconds=sum(activities.values()),
            activities=activities,
            losses=self.losses,
            alarms=tuple(self.alarms),
            plan=None if plan is None else results.plan_record(*plan, self.steps.temporary_bytes),
            track=None if self.tracker is None else self.tracker.track,
            validation=None if self.validator is None else self.validator.record_until(self.step, self.state),
            convergence=results.convergence_record(self.iterates),
        )
        result.interrupted, result.stopped_at, result.iterates = self.interrupted, self.stopped_at, self.iterates
        result.svi, result.args, result.kwargs = svi, args, kwargs
        return result

    def _told(self, stop: Stop | None) -> dict[str, str]:
        told = {
            "ELBO": results.described(self.svi.loss),
            "tracking": "off" if self.svi.tracking is None else repr(self.svi.tracking),
            "steps asked for": str(self.num_steps),
            "ending": self.ending,
        }
        told |= {k: "yes" for k, on in self.options.items() if on}
        told |= {"batches": f"{self.feed.position[0] + 1} epochs"} if not isinstance(self.feed, Fixed) else {}
        told |= {"stop": "a rule of the caller" if callable(stop) else str(stop)} if stop is not None else {}
        told |= {"checkpoint": str(self.checkpoint.folder)} if self.checkpoint is not None else {}
        return told


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """The event that Ctrl-C sets while this runs; a second one raises as ever."""
    asked = threading.Event()
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield asked  # somebody else decides what Ctrl-C means
        return

    def handler(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
