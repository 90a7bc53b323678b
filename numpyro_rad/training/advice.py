"""Is it worth it? ``advise`` compiles the step of a fit in several ways and says which one to take.

What counts is what a user pays: temporary memory of the compiled step, its seconds, and the variance that codes add.
For a model that fits anyway the answer is often ``Trace_ELBO``, and then it says so.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from numpyro.infer import ELBO
from numpyro.infer.svi import SVI

from numpyro_rad.ad import _jax
from numpyro_rad.ad.plan import BudgetError, Plan
from numpyro_rad.annotations import Kwargs
from numpyro_rad.elbo import RAD_ELBO
from numpyro_rad.fits import SVIState, with_loss
from numpyro_rad.mistakes import check_fit, kwargs_checked, shown
from numpyro_rad.planning.explain import explained
from numpyro_rad.planning.planner import VarianceWarning
from numpyro_rad.planning.worth import SMALL_BYTES, Option, percent, recommended
from numpyro_rad.tables import TextTable
from numpyro_rad.tracing import taking_arrays
from numpyro_rad.wording import call_text, saving_text, size_text

_SHARES = (0.2, 0.1, 0.05)  # of the exact residuals, for the budgets that are tried


@dataclasses.dataclass(frozen=True)
class Advice:
    """What a step takes under several losses, and which to take; ``print`` it.

    :ivar options: NumPyro's own ELBO first.
    :ivar chosen: the option that is recommended.
    :ivar sentence: the recommendation in words.
    """

    options: tuple[Option, ...]
    chosen: Option
    sentence: str

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> TextTable:
        header = ("loss", "temporary", "held", "step", "compile", "added variance")
        first = self.options[0]
        rows = []
        for option in self.options:
            temporary = "?" if option.temporary_bytes is None else size_text(option.temporary_bytes)
            held = "" if option.held_bytes is None else size_text(option.held_bytes)
            seconds = option.note or "?"
            if option.seconds is not None:
                seconds = f"{option.seconds:.3g} s"
                if option is not first and first.seconds:
                    seconds += f" ({option.seconds / first.seconds:.2f}x)"
            variance = percent(option.added_variance) if option.added_variance else "none"
            rows.append((option.loss, temporary, held, seconds, f"{option.compile_seconds:.1f} s", variance))
        return TextTable(header, rows, frozenset(range(1, len(header))), [self.sentence])


@kwargs_checked
def advise(
    svi: SVI,
    svi_state: SVIState,
    *args: Any,
    budgets: Sequence[int | str] | None = None,
    repeats: int = 5,
    **kwargs: Any,
) -> Advice:
    """Whether randomized gradients are worth it for a model, and with which budget, before anything is trained.

    Compiles ``svi.update`` with the exact ELBO of ``svi`` (the base of a ``RAD_ELBO``) and with ``RAD_ELBO``'s default;
    where the exact step takes 8 MiB or more, also with exact gradients at the fewest bytes and with a few budgets. Some
    steps of each are timed, in turn. ``svi`` and its state stay as they are. It takes the time of compiling all that,
    about a minute for a large network, and the memory of the exact step: what does not fit is reported as such.

    :param svi: an initialised ``SVI``, of NumPyro or this library, with any ELBO.
    :param svi_state: its state.
    :param args: arguments of model and guide, as in ``svi.update``.
    :param budgets: to try, as ``memory_budget``; by default a fifth, a tenth and a twentieth of the exact residuals.
    :param repeats: steps of each that are timed; 0 to compile only.
    :param kwargs: keyword arguments of model and guide.
    :return: the options and a recommendation: the one of least memory that takes at most 1.1 times the time and adds at
        most 5 % to the variance, if it is at least 1.5 times smaller than the exact step.
    :raises TypeError: if ``svi`` or ``svi_state`` are not what they should be, or a budget cannot be read.
    :raises ValueError: before ``svi.init``, for a negative ``repeats`` and where there is no parameter.

    Example::

        state = svi.init(jax.random.key(0), x, y)
        print(advise(svi, state, x, y))
    """
    check_fit("advise", svi, svi_state)
    if not isinstance(repeats, int) or repeats < 0:
        raise ValueError(f"repeats={shown(repeats)}: the number of steps to time is expected, 0 not to time any.")
    ours = svi.loss if isinstance(svi.loss, RAD_ELBO) else None
    base = svi.loss if ours is None else ours.base
    name = type(base).__name__
    wrapped = "" if name == "Trace_ELBO" else f"base={name}(), "
    known = {"calibration": ours.planner.calibration} if ours is not None else {}

    def rad(**options: Any) -> _Trial:
        inner = wrapped + ", ".join(f"{k}={v!r}" for k, v in options.items())
        loss = RAD_ELBO(base=base, **options, **known)
        return _Trial(f"RAD_ELBO({inner.removesuffix(', ')})", loss, svi, svi_state, args, kwargs)

    trials = [_Trial(f"{name}()", base, svi, svi_state, args, kwargs), rad()]
    if budgets is None and not trials[0].is_small:
        residuals = trials[1].residual_bytes
        budgets = [_rounded(share * residuals) for share in _SHARES] if residuals else []
        trials.append(rad(exact=True))
    trials += [rad(memory_budget=budget) for budget in budgets or ()]
    for _ in range(repeats):
        for trial in trials:
            trial.time()
    options = tuple(trial.option() for trial in trials)
    chosen, sentence = recommended(options)
    return Advice(options, chosen, sentence)


@kwargs_checked
def step_memory(svi: SVI, svi_state: SVIState, *args: Any, **kwargs: Any) -> str:
    """What the compiled step takes with the ``RAD_ELBO`` of ``svi`` and with the ELBO that it wraps, in a sentence.

    :param svi: an initialised ``SVI`` whose loss is a ``RAD_ELBO``.
    :param svi_state: its state.
    :param args: arguments of model and guide, as in ``svi.update``.
    :param kwargs: keyword arguments of model and guide.
    """
    named = (call_text(svi.loss.base), svi.loss.base), (repr(svi.loss), svi.loss)
    trials = [_Trial(name, loss, svi, svi_state, args, kwargs) for name, loss in named]
    exact, ours = (trial.temporary_bytes for trial in trials)
    taken = [f"{_taken(trial)} with {trial.told}" for trial in trials]
    saving = f" ({saving_text(exact, ours)})" if exact and ours else ""
    return f"Temporary memory of the compiled step: {taken[0]}, {taken[1]}{saving}."


def _taken(trial: _Trial) -> str:
    return trial.note or ("unknown" if trial.temporary_bytes is None else size_text(trial.temporary_bytes))


class _Trial:
    """A step under one loss, compiled, and how long it took."""

    def __init__(self, told: str, loss: ELBO, svi: SVI, svi_state: SVIState, args: tuple, kwargs: Kwargs) -> None:
        self.told, self.note = told, ""
        self.times: list[float] = []
        self.temporary_bytes: int | None = None
        self.held_bytes: int | None = None
        self.residual_bytes = 0
        self.added_variance = 0.0
        twin = with_loss(svi, loss)
        begun = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VarianceWarning)  # the table says it
                if isinstance(loss, RAD_ELBO):
                    self._look_at(loss.plan_of_update(twin, svi_state, *args, **kwargs)[0])
                self._compile(twin, svi_state, args, kwargs)
        except BudgetError as error:
            self.note = f"not possible below {size_text(error.smallest_bytes)}"
        except Exception as error:
            self._does_not_fit(error)
        self.compile_seconds = time.perf_counter() - begun

    @property
    def is_small(self) -> bool:
        return not self.note and self.temporary_bytes is not None and self.temporary_bytes < SMALL_BYTES

    def _look_at(self, plan: Plan) -> None:
        self.held_bytes = plan.stored_bytes
        self.residual_bytes = explained(plan, {}).exact_bytes
        self.added_variance = plan.predicted.added_variance if plan.predicted is not None else 0.0

    def _compile(self, svi: SVI, svi_state: SVIState, args: tuple, kwargs: Kwargs) -> None:
        def step(state: SVIState, args: tuple, kwargs: Kwargs) -> tuple[SVIState, jax.Array]:
            return SVI.update(svi, state, *args, **kwargs)

        run, arrays = taking_arrays(step, args, kwargs, svi_state)
        compiled = run.lower(arrays, svi_state).compile()
        sizes = _jax.compiled_bytes(compiled)
        self.temporary_bytes = None if sizes is None else sizes.temporary
        self.run = partial(compiled, arrays, svi_state)

    def time(self) -> None:
        """Take one step."""
        if self.note:
            return
        begun = time.perf_counter()
        try:
            jax.block_until_ready(self.run())
        except Exception as error:
            self._does_not_fit(error)
        else:
            self.times.append(time.perf_counter() - begun)

    def _does_not_fit(self, error: Exception) -> None:
        """What does not fit is an answer; any other error is not."""
        if not _jax.is_out_of_memory(error):
            raise error
        self.note, self.times = "does not fit", []

    def option(self) -> Option:
        seconds = statistics.median(self.times) if self.times else None
        sizes = self.temporary_bytes, self.held_bytes
        return Option(self.told, *sizes, seconds, self.compile_seconds, self.added_variance, self.note)


def _rounded(size: float) -> str:
    """A number of bytes as one would write it."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if size >= 10 * scale:
            return f"{round(size / scale)}{unit}"
    return f"{max(1, round(size))}B"
