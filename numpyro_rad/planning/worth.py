"""Is it worth it? Which of several ways to take a step to choose, from their memory, time and variance, and why.

:func:`recommended` is what ``advise`` says before a fit and the report after it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from numpyro_rad.planning.costs import CostModel
from numpyro_rad.wording import size_text

SMALL_BYTES = 2**23
"""A step that takes less temporary memory than this (8 MiB) is not worth any trouble."""

UNTOUCHED = (
    "Left to JAX's own reverse mode: without options where residuals take less than "
    f"{size_text(CostModel.untouched_bytes)} or every plan takes much longer, with memory_budget= where all that the "
    "gradient takes fits. To store less, choose a memory_budget= (a smaller one), codec=, added_variance= or "
    "exact=True."
)

_WORTH_IT = 1.5  # times less memory than Trace_ELBO

_MOST_TIME, _MOST_VARIANCE = 1.1, 0.05  # of what is recommended, relative to Trace_ELBO


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to take the step.

    :ivar loss: the loss in words, as it is written in a program.
    :ivar temporary_bytes: temporary memory of the compiled step; None where the compiler does not say.
    :ivar held_bytes: bytes held between the two sweeps; None for NumPyro's own ELBO.
    :ivar seconds: of one step, the median of a few; None if it was not timed, or does not fit.
    :ivar compile_seconds: of tracing and compiling it.
    :ivar added_variance: predicted variance that codes add, relative to that of the exact gradient.
    :ivar note: what went wrong, empty if nothing did.
    """

    loss: str
    temporary_bytes: int | None
    held_bytes: int | None
    seconds: float | None
    compile_seconds: float
    added_variance: float
    note: str = ""


def recommended(options: Sequence[Option]) -> tuple[Option, str]:
    """Which option to take, and why."""
    first, *others = options
    if first.note:
        fitting = [o for o in others if not o.note]
        if not fitting:
            return first, f"Neither {first.loss} nor anything else fits: try a smaller minibatch or fewer particles."
        best = min(fitting, key=lambda o: (o.added_variance > _MOST_VARIANCE, o.seconds or 0.0))
        return best, f"{first.loss} {first.note}; {best.loss} does{_price(best, first)}."
    size = first.temporary_bytes
    if size is None:
        return first, "The compiler does not say what the steps take here, so there is nothing to choose by."
    if size < SMALL_BYTES:
        return first, f"Use {first.loss} here: its step takes {size_text(size)}, which is not worth saving."
    good = [o for o in others if not o.note and o.added_variance <= _MOST_VARIANCE]
    if first.seconds:
        good = [o for o in good if o.seconds is not None and o.seconds <= _MOST_TIME * first.seconds]
    usable = [o for o in others if not o.note and o.added_variance <= 1]
    best, least = (min(found, key=_temporary, default=first) for found in (good, usable))
    if size >= _WORTH_IT * (best.temporary_bytes or size):
        return best, (
            f"Use {best.loss}: its step takes {_less(best, size)} than the {size_text(size)} of {first.loss}"
            f"{_price(best, first)}."
        )
    sentence = f"Use {first.loss} here: its step takes {size_text(size)}, and nothing takes much less for nothing."
    if len(others) == 1:  # nothing else was tried
        taken = others[0].temporary_bytes
        sentence = f"Use {first.loss} here: its step takes {size_text(size)}"
        sentence += f", that of {others[0].loss} {size_text(taken)}." if taken is not None else "."
    if size >= _WORTH_IT * (least.temporary_bytes or size):
        sentence += f" If memory is what you lack, {least.loss} takes {_less(least, size)}{_price(least, first)}."
    return first, sentence


def _temporary(option: Option) -> float:
    return math.inf if option.temporary_bytes is None else option.temporary_bytes


def _less(option: Option, size: int) -> str:
    taken = option.temporary_bytes or 1
    return f"{size_text(taken)}, {size / taken:.1f} times less"


def _price(option: Option, first: Option) -> str:
    """What an option costs, as the end of a sentence."""
    parts = []
    if option.seconds is not None and first.seconds:
        parts.append(f"at {option.seconds / first.seconds:.2f} times its time")
    added = option.added_variance
    parts.append(f"and adds {percent(added)} to the variance of the gradient" if added else "with an exact gradient")
    return ", " + ", ".join(parts)


def percent(share: float) -> str:
    """A share that is added, as text."""
    return "less than 0.1 %" if 0 < share < 1e-3 else f"{100 * share:.2g} %"
