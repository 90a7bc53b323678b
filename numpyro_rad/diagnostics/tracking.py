"""``Tracker``: the noise of the gradient while SVI runs, and alarms.

Every so many steps a *look* takes three gradients at the current parameters,

    a = g(u, p),   b = g(u, p'),   c = g(u', p''),

with codes p and all other noise u (guide and minibatch), and reduces them to unbiased estimates for each parameter
array: path variance |a - b|^2 / 2, total variance, squared norm of the mean gradient <(a + b) / 2, c>. One look is
noisy; what is judged are running averages of these numbers, and ratios are taken of averages only, never averaged.

The keys of a look are folded out of the state's key, which training splits as ever: it does not notice that it is
watched. A look costs three gradients and some reductions, at every 200th step about 1.5 % of the time.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_rad.ad import _jax
from numpyro_rad.annotations import Key, Kwargs, PyTree
from numpyro_rad.diagnostics.records import Alarm, Track, from_dict, to_dict
from numpyro_rad.diagnostics.variance import GUIDE, NORM, PATH, Gradient, reduce_gradients
from numpyro_rad.elbo import RAD_ELBO, training_keys
from numpyro_rad.fits import SVI, SVIState, state_of
from numpyro_rad.mistakes import check_initialised, fields_checked
from numpyro_rad.subsampling import NoiseKeys
from numpyro_rad.transform import named_leaves

_TAG = 0x52414424  # folded into the state's key: the draws of a look

_DECAY = 0.95  # of the running averages, for each look

_LEAST_LOOKS = 5  # before an average is judged

_CERTAIN = 3.0  # standard errors

_HARMLESS = 0.01  # path variance below this share of the squared norm of the gradient does no harm


class TrackingWarning(UserWarning):
    """A fit has a problem that its user should know of."""


@fields_checked
@dataclasses.dataclass(frozen=True)
class Tracking:
    """How to watch a fit.

    :param interval: steps from one look to the next. A look costs about three gradients, so that 200 steps make 1.5 %.
    :param rho_max: alarm if the codes add more than this times the variance of the exact gradient. At 0.5 a fit takes
        up to half as many steps again.
    :param snr_min: alarm if squared norm / variance of the gradient of a site falls below this. Gradients of a fit that
        has converged are noise alone too, so that this alarm is recorded without a warning.
    :param replan: a band (low, high) of ρ; outside of it, by more than chance, :attr:`Tracker.wants_replan` is true.
        None for never.
    :param on_alarm: ``"warn"`` for a :class:`TrackingWarning`, ``"record"`` to keep silent, or a function of an
        :class:`~numpyro_rad.diagnostics.records.Alarm`.
    :raises ValueError: for an option that makes no sense.

    Example::

        Tracking(interval=50, replan=(0.01, 0.3))
    """

    interval: int = 200
    rho_max: float = 0.5
    snr_min: float = 1e-3
    replan: tuple[float, float] | None = None
    on_alarm: str | Callable[[Alarm], None] = "warn"

    def __post_init__(self) -> None:
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"interval={self.interval!r} is not a positive number of steps. Try 200.")
        for name in ("rho_max", "snr_min"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} is not a number from 0 up.")
        if self.replan is not None and not (len(self.replan) == 2 and 0 <= self.replan[0] < self.replan[1]):
            raise ValueError(f"replan={self.replan!r} is not a band (low, high) of ρ. Try (0.01, 0.3), or None.")
        if not (self.on_alarm in ("warn", "record") or callable(self.on_alarm)):
            raise ValueError(f"on_alarm={self.on_alarm!r} is neither 'warn', 'record' nor a function of an alarm.")


class Tracker:
    """What is known about the noise of one run.

    :param svi: an initialised ``SVI`` with any ELBO; ρ of those without codes is zero.
    :param tracking: options.
    :ivar track: all looks so far, a :class:`~numpyro_rad.diagnostics.records.Track`.

    Example::

        tracker = Tracker(svi, Tracking(interval=100))
        for step in range(num_steps):
            state, loss = update(state, x, y)
            if (step + 1) % tracker.tracking.interval == 0:
                tracker.look(step + 1, state, (x, y), {})
    """

    def __init__(self, svi: SVI, tracking: Tracking | None = None) -> None:
        check_initialised("Tracker", svi)
        self.svi, self.tracking = svi, Tracking() if tracking is None else tracking
        self._names: tuple[str, ...] = ()
        self._steps: list[int] = []
        self._looks: list[list[list[float]]] = []  # (looks, 3, names)
        self._rho: list[float] = []
        self._seconds: list[float] = []
        self._issued: set[tuple[str, str]] = set()
        self._too_large = False  # for the memory that there is
        self._start()

    def _start(self) -> None:
        """Begin to watch a plan."""
        self._gradient = Gradient(self.svi)
        self._planner = getattr(self.svi.loss, "planner", None)
        self._keys = jax.jit(_keys)
        self._average = _Running()
        self._judged: dict[str, _Running] = {}

    def look(
        self,
        step: int,
        svi_state: SVIState,
        args: tuple,
        kwargs: Kwargs | None = None,
        seconds: float = math.nan,
        other: tuple[tuple, dict] | None = None,
    ) -> tuple[Alarm, ...]:
        """Take three gradients (two, for an ELBO without codes) at the parameters of a state.

        :param step: steps that were taken so far.
        :param svi_state: the state, or a result; it is not changed.
        :param args: arguments of model and guide.
        :param kwargs: their keyword arguments.
        :param seconds: wall time since the fit began.
        :param other: ``(args, kwargs)`` of another minibatch, of the same shapes, for the third gradient. Without it
            the noise of minibatches that the caller draws is no part of what is measured; that of plates always is.
        :return: alarms that were not raised before.
        """
        if self._too_large:
            return ()
        kwargs = {} if kwargs is None else kwargs
        svi_state = state_of(self.svi, svi_state, "Tracker.look")
        self._forget_other_plans()
        if not self._names:
            self._names = tuple(name for name, _ in named_leaves(self.svi.optim.get_params(svi_state.optim_state)))
        try:
            numbers, finite = self._measured(svi_state, args, kwargs, other)
        except Exception as error:
            if not _jax.is_out_of_memory(error):
                raise
            return self._give_up(step)
        numbers = numbers.astype(np.float64)
        path, total, norm = numbers[:, PATH], numbers[:, PATH] + numbers[:, GUIDE], numbers[:, NORM]
        look = np.where(finite, np.stack([path, total, norm]), math.nan)  # (3, names)
        self._steps.append(int(step))
        self._looks.append(look.tolist())
        self._seconds.append(float(seconds))
        alarms = self._not_finite(step, finite)
        if np.isfinite(look).all():
            self._average.add(look)
            alarms += self._judge(step, look)
        self._rho.append(self.rho)
        return self._issue(alarms)

    def _measured(
        self, svi_state: SVIState, args: tuple, kwargs: Kwargs, other: tuple[tuple, dict] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Three gradients, reduced to numbers of each array, and whether they are finite."""
        keys = self._keys(svi_state.rng_key)
        a = self._gradient(svi_state, keys[0], args, kwargs)
        b = self._gradient(svi_state, keys[1], args, kwargs) if isinstance(self.svi.loss, RAD_ELBO) else None
        other_args, other_kwargs = (args, kwargs) if other is None else other
        c = self._gradient(svi_state, keys[2], other_args, other_kwargs)
        numbers, finite = jax.device_get(reduce_gradients(a, b, c))
        return np.asarray(numbers), np.asarray(finite)

    def _give_up(self, step: int) -> tuple[Alarm, ...]:
        """Where memory is short, training goes on without looks."""
        self._too_large = True
        message = (
            f"at step {step} memory was too short for a look at the noise, three gradients beside the fit: there are "
            "no more looks. Leave more memory free (a smaller memory_budget), or pass tracking=None."
        )
        return self._issue([Alarm(int(step), "memory", "", message)])

    def _forget_other_plans(self) -> None:
        if self._is_replanned:
            self._start()  # what is known about another plan says nothing about this one
            self._issued -= {found for found in self._issued if found[0] == "rho"}

    def diagnose(
        self, step: int, svi_state: SVIState, args: tuple, kwargs: Kwargs | None, loss: float | jax.Array
    ) -> tuple[Alarm, ...]:
        """Say where a loss that is NaN or infinite comes from, the first time.

        :param step: the step that returned it.
        :param svi_state: the state before that step if it is at hand (the gradient is then that of the step), or after.
        :param args: arguments of model and guide in that step.
        :param kwargs: their keyword arguments.
        :param loss: the loss.
        :return: alarms, one for the loss that names the arrays that are not finite among the arguments and among the
            parameters, and parameters whose gradient is not.
        """
        if ("nonfinite", "loss") in self._issued:
            return ()
        self._issued.add(("nonfinite", "loss"))
        kwargs = {} if kwargs is None else kwargs
        svi_state = state_of(self.svi, svi_state, "Tracker.diagnose")
        data = _not_finite_in({**{f"args[{i}]": x for i, x in enumerate(args)}, **kwargs})
        params = _not_finite_in(self.svi.optim.get_params(svi_state.optim_state))
        step_key = jax.random.split(svi_state.rng_key)[1]  # as svi.update
        gradient = _not_finite_in(self._gradient(svi_state, training_keys(step_key), args, kwargs))
        found = [
            f"{what}: {', '.join(where)}"
            for what, where in (
                ("NaN or infinite values in the data", data),
                ("parameters that are not finite", params),
                ("gradients that are not finite", gradient),
            )
            if where
        ]
        if data:
            advice = "Clean the data, or mask what is missing (numpyro.handlers.mask)."
        elif params:
            advice = "The parameters diverged before: try a smaller learning rate, clipped gradients or stable_update."
        elif gradient:
            advice = "Look at the scales and supports of these sites; try a smaller learning rate or double precision."
        else:
            found, advice = (
                ["data, parameters and gradients are finite at this state"],
                ("It takes these very draws: try stable_update, a smaller learning rate or double precision."),
            )
        message = f"the loss of step {step} is {float(loss)}; {'; '.join(found)}. {advice}"
        return self._issue([Alarm(int(step), "nonfinite", ", ".join(gradient or params), message)])

    @property
    def rho(self) -> float:
        """Running ratio of path variance to the variance of the exact gradient; NaN before the first look."""
        if not self._average.weight:
            return math.nan
        path, total, _ = self._average.mean.sum(1)
        if path == 0:
            return 0.0
        return float(path / (total - path)) if total > path else math.inf  # codes drown what else there is

    @property
    def wants_replan(self) -> bool:
        """Whether ρ has left its band by more than chance, over at least 5 looks at the plan that is in use."""
        return (
            self.tracking.replan is not None
            and not self._is_replanned
            and any(name in self._judged and self._judged[name].is_positive() for name in ("above", "below"))
        )

    @property
    def _is_replanned(self) -> bool:
        return getattr(self.svi.loss, "planner", None) is not self._planner

    @property
    def track(self) -> Track:
        """All looks so far."""
        looks = np.asarray(self._looks, float).reshape(len(self._looks), 3, len(self._names))
        steps, others = np.asarray(self._steps, int), (np.asarray(x, float) for x in (self._rho, self._seconds))
        return Track(self._names, steps, looks[:, 0], looks[:, 1], looks[:, 2], *others, rho_max=self.tracking.rho_max)

    def to_dict(self) -> dict[str, Any]:
        """All that :meth:`restore` needs, for ``json.dumps``."""
        self._forget_other_plans()
        return {
            "track": to_dict(self.track),
            "issued": sorted(map(list, self._issued)),
            "average": self._average.to_dict(),
            "judged": {name: running.to_dict() for name, running in self._judged.items()},
        }

    def restore(self, data: dict[str, Any]) -> None:
        """Go on where the tracker was that :meth:`to_dict` took apart; ``svi.loss`` has to be the one that is tracked.

        :raises ValueError: if ``data`` is not that of a tracker.
        """
        try:
            track = from_dict(Track, data["track"])
            issued = {(str(kind), str(site)) for kind, site in data["issued"]}
            average = _Running.from_dict(data["average"])
            judged = {name: _Running.from_dict(running) for name, running in data["judged"].items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"this is not what Tracker.to_dict() returned: {error!r}") from error
        self._start()
        self._names, self._issued, self._average, self._judged = track.names, issued, average, judged
        self._steps, self._rho, self._seconds = track.steps.tolist(), track.rho.tolist(), track.seconds.tolist()
        self._looks = [list(map(list, rows)) for rows in zip(*(x.tolist() for x in _columns(track)), strict=True)]

    def _not_finite(self, step: int, finite: np.ndarray) -> list[Alarm]:
        bad = [
            n for n, good in zip(self._names, finite, strict=True) if not good and ("nonfinite", n) not in self._issued
        ]
        self._issued.update(("nonfinite", name) for name in bad)
        message = (
            f"at step {step} the gradient is not finite in {', '.join(bad)}. Look at the data, and at scales and "
            "supports of these sites; try a smaller learning rate, clipped gradients or stable_update."
        )
        return [Alarm(int(step), "nonfinite", ", ".join(bad), message)] if bad else []

    def _judge(self, step: int, look: np.ndarray) -> list[Alarm]:
        """Add a look to what is tested, and what is certain by now."""
        (path, total, norm), options = look, self.tracking
        sums = path.sum(), total.sum() - path.sum(), _HARMLESS * norm.sum()
        tests = {
            "rho": _share(*sums, options.rho_max),
            "signal": _relative(np.where(total > 0, options.snr_min * total - norm, 0.0), total, norm),
        }
        if options.replan is not None:
            low, high = options.replan
            tests |= {"above": _share(*sums, high), "below": -_share(*sums[:2], 0.0, low)}
        for name, value in tests.items():
            self._judged.setdefault(name, _Running()).add(np.asarray(value))
        alarms = []
        if self._judged["rho"].is_positive() and ("rho", "") not in self._issued:
            self._issued.add(("rho", ""))
            times = f"{self.rho:.2g}" if math.isfinite(self.rho) else "many"
            message = (
                f"the codes of the residuals add {times} times the variance of the exact gradient (bound "
                f"{options.rho_max:g}), averaged over the looks up to step {step}: training takes that much longer. "
                "Try a larger memory_budget, more bits (codec=StochasticRound(bits=8)), or RAD_ELBO.calibrate at the "
                "present parameters."
            )
            alarms.append(Alarm(int(step), "rho", "", message))
        lost = np.atleast_1d(self._judged["signal"].is_positive())
        lost = [i for i, on in enumerate(lost) if on and ("signal", self._names[i]) not in self._issued]
        if lost:
            names = [self._names[i] for i in lost]
            self._issued.update(("signal", name) for name in names)
            _, totals, norms = self._average.mean
            each = ", ".join(f"{self._names[i]} ({norms[i] / totals[i]:.1g})" for i in lost)
            message = (
                f"the gradient is lost in its noise, squared norm / variance is below {options.snr_min:g}, in {each}. "
                "If the loss has levelled off that is what convergence looks like. If not, try more particles, a "
                "larger minibatch or a smaller learning rate."
            )
            alarms.append(Alarm(int(step), "signal", ", ".join(names), message))
        return alarms

    def _issue(self, alarms: Sequence[Alarm]) -> tuple[Alarm, ...]:
        on_alarm = self.tracking.on_alarm
        for alarm in alarms:
            if callable(on_alarm):
                on_alarm(alarm)
            elif on_alarm == "warn" and alarm.kind != "signal":
                warnings.warn(alarm.message, TrackingWarning, stacklevel=3)
        return tuple(alarms)


def _share(path: float, exact: float, harmless: float, rho: float) -> np.ndarray:
    """By how much codes add more than ``rho`` times the variance of the exact gradient, relative to what a look saw.

    Gradients may shrink a hundredfold over a fit. Looks have to count alike: as they are, the first ones would decide
    the average and its spread.
    """
    return _relative(path - rho * (exact + harmless), path, exact + path, rho * harmless)


def _relative(value: ArrayLike, *sizes: ArrayLike) -> np.ndarray:
    size = sum(map(np.abs, sizes))
    return np.where(size > 0, value / np.where(size > 0, size, 1.0), 0.0)


class _Running:
    """Exponentially weighted mean of arrays, and of their squares for its standard error.

    Both are divided by the sum of the weights, so that early averages are those of what was seen.
    """

    def __init__(self) -> None:
        self.count, self.weight, self._squared_weights = 0, 0.0, 0.0
        self._sum: Any = 0.0
        self._squares: Any = 0.0

    def add(self, value: np.ndarray) -> None:
        self.count += 1
        self.weight = _DECAY * self.weight + 1
        self._squared_weights = _DECAY**2 * self._squared_weights + 1
        self._sum = _DECAY * self._sum + value
        self._squares = _DECAY * self._squares + value**2

    @property
    def mean(self) -> Any:
        return self._sum / self.weight

    def is_positive(self) -> Any:
        """Whether the expectation is above zero with certainty; an array of bools for arrays."""
        if self.count < _LEAST_LOOKS:
            return np.zeros(np.shape(self._sum), bool)
        size = self.weight**2 / self._squared_weights  # of a sample with equal weights that is as good
        variance = np.maximum(self._squares / self.weight - self.mean**2, 0.0)
        return self.mean > _CERTAIN * np.sqrt(variance / (size - 1))

    def to_dict(self) -> dict[str, Any]:
        numbers = [self.count, self.weight, self._squared_weights]
        return {
            "weights": numbers,
            "sum": to_dict(np.asarray(self._sum)),
            "squares": to_dict(np.asarray(self._squares)),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> _Running:
        self = cls()
        self.count, self.weight, self._squared_weights = int(data["weights"][0]), *map(float, data["weights"][1:])
        self._sum, self._squares = (np.asarray(data[name], float) for name in ("sum", "squares"))
        return self


def _keys(rng_key: Key) -> tuple[NoiseKeys, NoiseKeys, NoiseKeys]:
    """Keys of the three gradients: the second shares all but the codes with the first."""
    u, p, other_u, other_p, third_p = jax.random.split(jax.random.fold_in(rng_key, _TAG), 5)
    return NoiseKeys(u, None, p), NoiseKeys(u, None, other_p), NoiseKeys(other_u, None, third_p)


def _columns(track: Track) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return track.path, track.total, track.squared_norm


def _not_finite_in(tree: PyTree) -> list[str]:
    """Names of the floating-point arrays in a pytree that are not finite."""
    found = []
    for name, leaf in named_leaves(tree):
        inexact = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)  # no keys, no integers
        if inexact and not bool(jnp.isfinite(leaf).all()):
            found.append(name)
    return found
