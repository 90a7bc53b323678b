"""What a plan is asked for: which codes may be used where, by which prices, and what shall be small."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from numpyro_rad.ad import _jax, primitives
from numpyro_rad.ad.codecs import Codec
from numpyro_rad.ad.graph import Graph, Path, Value
from numpyro_rad.ad.rounding import StochasticRound
from numpyro_rad.ad.work import Multiplications
from numpyro_rad.planning.costs import CPU, CostModel
from numpyro_rad.planning.noise import ErrorPropagation

Codecs = Callable[[Path, Value, int], tuple[Codec, ...]]
"""From a residual's path (loop numbers, then its own) and its number of repetitions to the codecs that it may have
besides being exact."""

MayOffload = Callable[[Path, Value], bool]
"""From a value's path and the value to whether it may wait on the host."""

LEAST_WHOLE, MOST_WHOLE = 128, 4096
"""Rows of so many entries share a scale where groups are to be whole rows: shorter ones would be mostly scales, and the
range of longer ones is wide."""

OBJECTIVES = {"balanced": (1.0, 1.0), "time": (1.0, 1e-3), "variance": (1e-3, 1.0)}
"""What to make small: by name, the weights of time and of variance."""


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """What plans are chosen from, and by what.

    :ivar codecs: what each residual may be coded with.
    :ivar costs: what work costs. Where it does not matter, for plans that nothing chooses, it need not be said.
    :ivar propagation: what codes do to the gradient; None for the model without data.
    :ivar offload: which values of the program, outside of its loops, may wait in the memory of the host.
    :ivar objective: ``"balanced"`` for the sum of added time and added variance; ``"time"`` or ``"variance"`` for that
        one, the other deciding between equals.
    :ivar first: what they may be coded with where that is enough to meet a budget.
    """

    codecs: Codecs
    costs: CostModel = CPU
    propagation: ErrorPropagation | None = None
    objective: str = "balanced"
    offload: MayOffload = lambda path, value: False
    first: Codecs | None = None

    @property
    def at_first(self) -> PlanRequest:
        """What to try first."""
        return self if self.first is None else dataclasses.replace(self, codecs=self.first, first=None)

    @property
    def weights(self) -> tuple[float, float]:
        """Of time and of variance."""
        return OBJECTIVES[self.objective]


def uniform(codec: Codec, least_bytes: int = 0) -> Codecs:
    """One codec wherever it may be used and saves something; everything else exact."""
    return any_of((codec,), least_bytes)


def in_whole_rows(codecs: Codecs) -> Codecs:
    """The same codecs with groups of whole rows, where these are neither short nor very long."""

    def choices(path: Path, value: Value, repeat: int) -> tuple[Codec, ...]:
        found, row = codecs(path, value, repeat), value.aval.shape[-1] if value.aval.shape else 1
        if not LEAST_WHOLE <= row <= MOST_WHOLE:
            return found
        group = -(-row // 8) * 8
        return tuple(dataclasses.replace(c, group=group) if isinstance(c, StochasticRound) else c for c in found)

    return choices


def any_of(codecs: tuple[Codec, ...], least_bytes: int = 0) -> Codecs:
    """All codecs wherever they may be used and save something.

    :param least_bytes: residuals below this size (over all iterations of the loops around them) stay exact.
    """

    def choices(path: Path, value: Value, repeat: int) -> tuple[Codec, ...]:
        worth_it = _jax.aval_bytes(value.aval) * repeat >= least_bytes
        return tuple(c for codec in codecs for c in forced(codec, value)) if worth_it else ()

    return choices


LONG_LOOP = 100
"""In loops of so many iterations nobody can tell what codes do without data. Errors may grow from step to step: where a
Kalman filter begins with a vague covariance, 4 bits made the error of the gradient a hundred times as long as the
gradient, and the model without data expected a thousandth of the variance."""


def not_in_long_loops(codecs: Codecs) -> Codecs:
    """These, and none in long loops."""
    return lambda path, value, repeat: codecs(path, value, repeat) if repeat < LONG_LOOP else ()


_NARROWS = frozenset(("log", "log1p"))
_SUMS = frozenset(("add", "add_any", "sub", "max", "min"))


def ranges_widely(graph: Graph) -> bool:
    """Whether a product reads what follows, entry by entry, from an exponential: attention, kernels.

    Its entries range over many powers of ten, and what comes back to them does, too: levels that are evenly spaced
    are too coarse for the small ones. In four blocks of attention at NumPyro's default initial values 4 bits added half
    of the squared gradient, where the model without data expected less than a hundredth. What something else was added
    to (a location, to noise times the exponential of a scale) does not count.
    """
    for body in graph.walk():
        wide: set[Value] = set()
        for equation in body.equations:
            operands = [a in wide for a in equation.inputs if isinstance(a, Value)]
            if any(operands) and isinstance(equation.work, Multiplications):
                return True
            traits = primitives.of(equation.name)
            follows = all(operands) if equation.name in _SUMS else any(operands)
            follows = follows and (traits.elementwise or traits.rearranges) and equation.name not in _NARROWS
            if equation.name in ("exp", "exp2") or (operands and follows):
                wide.update(equation.outputs)
    return False


def forced(codec: Codec, value: Value) -> tuple[Codec, ...]:
    """This codec, or nothing where it is exact, cannot code the value or saves no bytes."""
    shape, dtype = value.aval.shape, value.aval.dtype
    fits = not codec.exact and codec.supports(shape, dtype)
    return (codec,) if fits and codec.stored_bytes(shape, dtype) < _jax.aval_bytes(value.aval) else ()
