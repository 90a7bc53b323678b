"""``Planner``: from what a user asks for to a plan.

The options of ``RAD_ELBO`` and ``rad`` are those of ``Planner``. It finds out what each residual may become
(``Override`` rules, by site, line or predicate), how codes are priced (a calibration, or the model without data), and
asks ``plans`` for it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import numbers
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from numpyro_rad.ad import _jax, bounds
from numpyro_rad.ad.codecs import Codec
from numpyro_rad.ad.graph import ControlFlowEdge, Graph, Path, Value, sites
from numpyro_rad.ad.linearize import linearize
from numpyro_rad.ad.plan import Plan, carrier_of, kept_bytes
from numpyro_rad.ad.rounding import StochasticRound
from numpyro_rad.mistakes import fields_checked, shown
from numpyro_rad.planning import costs, strategies, ways
from numpyro_rad.planning.calibration import Calibration
from numpyro_rad.planning.costs import CostModel
from numpyro_rad.planning.noise import EqualShares, ErrorPropagation
from numpyro_rad.planning.request import (
    OBJECTIVES,
    Codecs,
    PlanRequest,
    any_of,
    forced,
    in_whole_rows,
    not_in_long_loops,
    ranges_widely,
    uniform,
)
from numpyro_rad.planning.ways import Way
from numpyro_rad.wording import arguments_text, call_text

DEFAULT_CODEC = StochasticRound(bits=4)
"""Four bits: an eighth of the bytes, for less than 1 % more variance of SVI's gradient (docs/benchmarks.md, P1)."""

LEAST_OFFLOADED_BYTES = 2**20
"""Smaller values are not worth the time that a transfer takes to start."""

_UNITS = {"": 1, "B": 1} | {f"{p}{u}": b**e for u, b in (("B", 1000), ("iB", 1024)) for e, p in enumerate("kMGT", 1)}
_UNITS |= {"KB": 1000, "KiB": 1024}


def parse_bytes(size: int | str, name: str = "memory_budget") -> int:
    """A number of bytes from an int or a string such as ``"64MiB"`` or ``"1.5 GB"``.

    :param name: of the argument, for messages.
    :raises TypeError: if ``size`` is neither.
    :raises ValueError: if it is negative or cannot be read.
    """
    if isinstance(size, bool) or not isinstance(size, (numbers.Integral, str)):
        raise TypeError(
            f"{name}={shown(size)}: a number of bytes is expected. Pass an int, or a string such as '256MiB'."
        )
    if not isinstance(size, str):
        number, unit = int(size), ""
    else:
        match = re.fullmatch(r"\s*([-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)\s*", size)
        if match is None or match[2] not in _UNITS or math.isinf(float(match[1])):
            raise ValueError(
                f"{name}={shown(size)} cannot be read as a number of bytes. Write a number and one of the units "
                "B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024), for example '256MiB'."
            )
        number, unit = float(match[1]), match[2]
    if number < 0:
        raise ValueError(f"{name}={size!r} is negative: no plan stores less than nothing. Try '64MiB'.")
    return int(number * _UNITS[unit])


class VarianceWarning(UserWarning):
    """Codes add more variance than the gradient has: within a budget, or wherever it was measured."""


@dataclasses.dataclass(frozen=True)
class Residual:
    """What a rule may look at to recognize a residual.

    :ivar site: the site (or differentiated argument) whose parameter enters last on the way to it.
    :ivar line: the user's file and line, as in ``"model.py:12"``; empty if unknown.
    :ivar operation: the linear operation that reads it.
    :ivar shape: its shape, loops around it not counted.
    :ivar dtype: its dtype.
    """

    site: str
    line: str
    operation: str
    shape: tuple[int, ...]
    dtype: str


Rule = str | Callable[[Residual], bool]


class Options(TypedDict, total=False):
    """The fields of :class:`Planner`, for type checkers of functions that take them as options."""

    codec: Codec | None
    memory_budget: int | str | None
    added_variance: float | None
    plan: Mapping[str, Any] | None
    exact: bool
    slices: int | None
    objective: str
    offload: bool
    overrides: Mapping[Rule, Codec]
    calibration: Calibration | None
    costs: CostModel | None


@fields_checked
@dataclasses.dataclass(frozen=True)
class Planner:
    """How to choose a plan; at most one of the first four.

    :param codec: one codec wherever a code is unbiased and smaller, at the fewest bytes; ``Keep()`` for exact gradients
        by recomputation and fused derivatives alone.
    :param memory_budget: the most bytes that may be held between the two sweeps of one gradient, an int or a string
        such as ``"64MiB"``. Of the plans that fit, the one of least added time and variance. On a single device the
        compiler is asked what temporary memory a step takes: where that fits without a plan, JAX's own reverse
        mode is left alone, and where it exceeds the budget, a few smaller plans are tried.
    :param added_variance: the most variance that may be added, as a share of the exact gradient's own. Of these plans
        the one of fewest bytes. More than 10 counts as 10: nobody can use such a gradient.
    :param plan: a saved plan (the dictionary of :meth:`Plan.to_dict`), for the program that it was made for.
    :param exact: no codes: recompute and keep only. Gradients are then exact.
    :param slices: in how many slices to run the part of the model in which an axis, of rows or of particles for
        instance, stays to itself until it is summed up; forward and backward together, so that only one slice's
        residuals are alive. 1 for none. By default what slices and other plans cost chooses, on a single device,
        where there is a memory budget or no option at all. Values and gradients are equal up to the rounding of sums.
        Where there is no such part nothing is cut.
    :param objective: with a budget, ``"balanced"`` for the least sum of added time and variance, ``"time"`` or
        ``"variance"`` for the least of one.
    :param offload: whether exact values of 1 MiB or more, outside of loops, may wait in the memory of the host, where
        the device has a memory of its own. They do not count against a budget; their transfer is dear.
    :param overrides: what to do with some residuals: from a site's name or a glob of it (``"layer*"``), a file and line
        (``"model.py:12"``), or a predicate of a :class:`Residual`, to a codec; ``Keep()`` for exact. The first that
        fits holds. A rule that fits nothing warns.
    :param calibration: measured prices of codes, from :meth:`RAD_ELBO.calibrate`.
    :param costs: what work costs on the device that the program shall run on, a ``planning.costs.CostModel``. By
        default that of JAX's default device: measured on a CPU, predicted from data sheets on GPUs and TPUs.
    :raises TypeError: if an option is not what it should be.
    :raises ValueError: if it cannot be read, or if options exclude one another.
    """

    codec: Codec | None = None
    memory_budget: int | str | None = None
    added_variance: float | None = None
    plan: Mapping[str, Any] | None = None
    exact: bool = False
    slices: int | None = None
    objective: str = "balanced"
    offload: bool = False
    overrides: Mapping[Rule, Codec] = dataclasses.field(default_factory=dict)
    calibration: Calibration | None = None
    costs: CostModel | None = None

    def __post_init__(self) -> None:
        if self.codec is not None and not isinstance(self.codec, Codec):
            raise TypeError(
                f"codec={self.codec!r} is not a codec. Pass an instance of one in numpyro_rad.codecs, such as "
                "StochasticRound(bits=4), or Keep() for exact gradients."
            )
        asked = [
            name for name in ("codec", "memory_budget", "added_variance", "plan") if getattr(self, name) is not None
        ]
        if len(asked) > 1:
            raise ValueError(
                f"{'= and '.join(asked)}= exclude each other: each of them alone chooses the plan. Pass one of them."
            )
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
        if self.added_variance is not None:
            share = self.added_variance
            if isinstance(share, bool) or not isinstance(share, numbers.Real):
                raise TypeError(f"added_variance={share!r}: a number is expected, such as 0.05 for 5 %.")
            if not 0 <= share < math.inf:
                raise ValueError(
                    f"added_variance={share!r}: it is a share of the variance of the exact gradient. Try 0.05."
                )
        if self.plan is not None and not isinstance(self.plan, Mapping):
            raise TypeError(
                f"plan={self.plan!r} is not a saved plan. Pass the dictionary that Plan.to_dict() returned."
            )
        for name in ("exact", "offload"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: True or False is expected.")
        if self.slices is not None:
            if isinstance(self.slices, bool) or not isinstance(self.slices, numbers.Integral):
                raise TypeError(f"slices={self.slices!r}: a number of slices is expected, such as 8; 1 for none.")
            if self.slices < 1:
                raise ValueError(f"slices={self.slices}: there is at least 1 slice, which is the whole.")
            if self.plan is not None:
                raise ValueError("plan= and slices= exclude each other: a saved plan knows its slices.")
        if self.calibration is not None and not isinstance(self.calibration, Calibration):
            raise TypeError(
                f"calibration={shown(self.calibration)} is not a Calibration. Pass what RAD_ELBO.calibrate returned."
            )
        if self.costs is not None and not isinstance(self.costs, CostModel):
            raise TypeError(
                f"costs={shown(self.costs)} is not a CostModel. Pass one of numpyro_rad.planning.costs, such as H100, "
                "or one that dataclasses.replace made of it."
            )
        if self.objective not in tuple(OBJECTIVES):  # what is passed may not be hashable
            raise ValueError(f"objective={self.objective!r} is not one of {', '.join(OBJECTIVES)}.")
        if self.exact and (self.codec is not None or self.added_variance is not None or self.plan is not None):
            raise ValueError("exact=True goes with memory_budget= alone: exact gradients add no variance.")
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"overrides={self.overrides!r}: a dictionary from rules to codecs is expected.")
        for rule, codec in self.overrides.items():
            if not (isinstance(rule, str) or callable(rule)):
                raise TypeError(f"overrides: {rule!r} is neither a name, a glob, a line nor a predicate.")
            if not isinstance(codec, Codec):
                raise TypeError(f"overrides[{rule!r}]={codec!r} is not a codec. Pass one, or Keep() for exact.")

    def __repr__(self) -> str:
        return call_text(self, self.settings())

    def settings(self) -> list[str]:
        """The options that differ from their defaults, as text; measured variances are left out."""
        return arguments_text(self, without=["calibration"])

    def pinned(self, saved: Mapping[str, Any]) -> Planner:
        """This planner with a saved plan (:meth:`Plan.to_dict`) in the place of whatever chooses one."""
        return dataclasses.replace(
            self, plan=saved, codec=None, memory_budget=None, added_variance=None, exact=False, slices=None
        )

    def leaves_at_sight(self, jaxpr: _jax.Jaxpr, active: Sequence[bool]) -> bool:
        """Whether a program is left to JAX without a look at its graph: where its residuals cannot be many, or a budget
        would hold twice all that it computes."""
        if not self._may_leave:
            return False
        computed, most = bounds.computed_bytes(jaxpr), self.prices.untouched_bytes
        if self._budget_bytes is not None:
            return computed < most and 2 * computed <= self._budget_bytes
        return computed < most or bounds.residual_bytes(jaxpr, active) < most

    @property
    def prices(self) -> CostModel:
        """What work costs."""
        return costs.default() if self.costs is None else self.costs

    @property
    def _budget_bytes(self) -> int | None:
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)

    @property
    def _may_leave(self) -> bool:
        """Whether no option asks for more than a budget."""
        chosen = (self.codec, self.added_variance, self.plan)
        free = all(option is None for option in chosen) and self.slices in (None, 1)
        return free and not (self.exact or self.offload or self.overrides)

    def planned(
        self,
        jaxpr: _jax.Jaxpr,
        active: Sequence[bool],
        names: Sequence[str],
        taken: Callable[[Plan], int | None],
        at_sight: bool,
    ) -> Planned:
        """A program, linearized and, once that is asked for, planned.

        :param active: which of its inputs are differentiated.
        :param names: the site or argument that each of them belongs to.
        :param taken: from a plan to the temporary memory of the compiled gradient; None where nobody knows.
        :param at_sight: whether it is left to JAX at sight.
        """
        if at_sight:
            graph = linearize(jaxpr, active)
            return Planned(self, Way(graph, plan=strategies.untouched_plan(graph)), names)
        return Planned(self, self._way(jaxpr, active, names, taken), names)

    def _way(
        self, jaxpr: _jax.Jaxpr, active: Sequence[bool], names: Sequence[str], taken: Callable[[Plan], int | None]
    ) -> Way:
        """How to go through a program. A calibration, which is made for one graph, has no part in it."""
        number = self.slices if self.plan is None else self.plan.get("slices", 1)
        budget = self._budget_bytes
        if number is not None or (budget is None and not self._may_leave):
            return dataclasses.replace(ways.in_slices(jaxpr, active, number or 1, self.prices), held_bytes=budget)

        def request(graph: Graph) -> PlanRequest:
            with warnings.catch_warnings():  # what there is to say of rules is said once there is a plan
                warnings.simplefilter("ignore")
                return self._request(graph, dict(zip(graph.tangent_inputs, names, strict=True)))

        return ways.Search(jaxpr, active, budget, request, self.prices, taken).way(self._may_leave)

    def __call__(self, graph: Graph, names: Mapping[Value, str] | None = None) -> Plan:
        """The plan for a program.

        :param graph: a linearized computational graph.
        :param names: for each tangent input the site or argument that it belongs to.
        :raises BudgetError: if no plan meets the budget.
        """
        return self._along(Way(graph, self._budget_bytes), names)

    def _along(self, way: Way, names: Mapping[Value, str] | None = None) -> Plan:
        """The plan for a way through a program; see :meth:`__call__`."""
        graph = way.graph
        as_known = self.calibration is None and not (self.overrides or self.offload)
        if way.plan is not None and (way.plan.untouched or as_known):
            return way.plan if way.plan.untouched else self._warned(way.plan)
        if self.plan is not None:
            return strategies.restored(graph, self.plan)
        model = EqualShares(graph) if self.calibration is None else self.calibration.variance_model(graph)
        request = dataclasses.replace(self._request(graph, names or {}), propagation=ErrorPropagation(graph, model))
        if self.offload:
            if not _jax.has_host_memory(self.prices.platform):
                raise ValueError(
                    f"offload=True: the devices of backend '{self.prices.platform}' have no memory apart from the "
                    "host's, so nothing is gained. Leave it out here."
                )
            request = dataclasses.replace(request, offload=lambda _, value: kept_bytes(value) >= LEAST_OFFLOADED_BYTES)
        return way.timed(self._warned(self._chosen(way, request)), self.prices)

    def _chosen(self, way: Way, request: PlanRequest) -> Plan:
        """The plan for a way, by what was asked for."""
        graph = way.graph
        if self.memory_budget is None and self._may_leave and graph.slices is None:
            plan = strategies.untouched_plan(graph)
            if plan.stored_bytes < self.prices.untouched_bytes:
                return plan
        if self.added_variance is not None:
            return strategies.plan_for_variance(graph, self.added_variance, request)
        if way.held_bytes is not None:
            return strategies.plan_within(graph, way.held_bytes, request)
        if self.exact or self.codec is not None:
            return strategies.make_plan(graph, request)
        return strategies.balanced_plan(graph, request)

    def _warned(self, plan: Plan) -> Plan:
        """A plan, with a word where it is a bad bargain that nobody asked for. Without a budget only what was measured
        counts: the model without data knows little of a codec that was chosen for all."""
        assert plan.predicted is not None
        added, known = plan.predicted.added_variance, self.calibration is not None
        if added > 1 and self.added_variance is None and (known or self.memory_budget is not None):
            by = "by the calibration" if known else "by the model without data (RAD_ELBO.calibrate measures it)"
            why, more = "", "More bits"
            if self.memory_budget is not None:
                why, more = f"memory_budget={self.memory_budget!r} is so small that ", "A larger budget"
            warnings.warn(
                f"{why}codes add {added:.2g} times the variance of the exact gradient, {by}. {more}, a smaller "
                "minibatch or exact=True will train faster.",
                VarianceWarning,
                stacklevel=2,
            )
        return plan

    def _request(self, graph: Graph, names: Mapping[Value, str]) -> PlanRequest:
        """What a plan is chosen from, the overrides applied. Outside of slices codes are taken only where a budget
        cannot be met without: they would hold the compiler to an order in which more is alive. In long loops, and
        without a budget where values range widely, they are, unless they were measured or chosen, for safety.
        """
        special = self._special(graph, names) if self.overrides else {}

        def overridden(general: Codecs) -> Codecs:
            def codecs(path: Path, value: Value, repeat: int) -> tuple[Codec, ...]:
                codec = special.get(path)
                return general(path, value, repeat) if codec is None else forced(codec, value)

            return codecs if special else general

        first = None
        if graph.slices is not None and not self.exact:
            first = overridden(any_of(()))
        elif self.calibration is None and self.codec is None and self.added_variance is None and not self.exact:
            # with a budget codes have been asked for
            nowhere = self.memory_budget is None and ranges_widely(graph)
            first = overridden(any_of(()) if nowhere else not_in_long_loops(self._general))
        return PlanRequest(overridden(self._general), self.prices, objective=self.objective, first=first)

    @property
    def _general(self) -> Codecs:
        """What residuals may be coded with where no rule says otherwise."""
        if self.exact:
            return any_of(())
        if self.memory_budget is not None or self.added_variance is not None:
            several = strategies.LADDER if self.calibration is None else self.calibration.codecs
            return self._for_device(any_of(several, self.prices.least_encoded_bytes))
        if self.codec is not None:
            return uniform(self.codec, self.prices.least_encoded_bytes)
        return self._for_device(uniform(DEFAULT_CODEC, self.prices.least_encoded_bytes))

    def _for_device(self, codecs: Codecs) -> Codecs:
        """The codecs that a plan may choose, in the form in which the device has them."""
        return in_whole_rows(codecs) if self.prices.whole_rows else codecs

    def _special(self, graph: Graph, names: Mapping[Value, str]) -> dict[Path, Codec]:
        """What the overrides say, by residual."""
        residuals = dict(_residuals(graph, names, ()))
        special: dict[Path, Codec] = {}
        for path, seen in residuals.items():
            for rule, codec in self.overrides.items():
                if any(_fits(rule, residual) for residual in seen):
                    special[path] = codec
                    break
        for rule in self.overrides:
            if not any(_fits(rule, residual) for seen in residuals.values() for residual in seen):
                known = sorted({r.site for seen in residuals.values() for r in seen if r.site})
                warnings.warn(
                    f"overrides: {rule!r} matches no residual of this program. Its sites are {', '.join(known)}; "
                    "explain(...) prints all residuals with their lines.",
                    stacklevel=2,
                )
        return special


class Planned:
    """A program as a planner takes it.

    The graph is known before the plan: a calibration is made for the one and priced in the other.

    :ivar graph: the linearized graph of the program, with the part in slices that shall be.
    """

    def __init__(self, planner: Planner, way: Way, names: Sequence[str]) -> None:
        self._planner, self._way, self._names, self.graph = planner, way, names, way.graph

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan of the program.

        :raises BudgetError: if no plan meets the budget.
        """
        return self._planner._along(self._way, dict(zip(self.graph.tangent_inputs, self._names, strict=True)))


def _fits(rule: Rule, residual: Residual) -> bool:
    if callable(rule):
        return bool(rule(residual))
    return fnmatch.fnmatchcase(residual.site, rule) or rule == residual.line


def _residuals(graph: Graph, names: Mapping[Value, str], path: Path) -> list[tuple[Path, list[Residual]]]:
    """Every stored value that may be estimated, by its path, as each of its readers sees it."""
    found: dict[Path, list[Residual]] = {}
    labels = sites(graph, names)
    for edge in graph.edges:
        for residual, linear in zip(edge.residuals, edge.linear, strict=True):
            if linear:
                carrier = carrier_of(graph, residual)
                producer = graph.producer.get(residual)
                line = producer.line if producer is not None and producer.line else edge.line
                seen = Residual(labels.get(edge, ""), line, edge.name, residual.aval.shape, str(residual.aval.dtype))
                found.setdefault((*path, carrier.number), []).append(seen)
        if not isinstance(edge, ControlFlowEdge):
            continue
        for number, body in enumerate(edge.node.bodies):
            pairs = zip(body.tangent_inputs, edge.node.tangents, strict=True)
            inner = {tangent: labels[outer] for tangent, outer in pairs if outer in labels}
            found.update(_residuals(body, inner, (*path, edge.node.number, number)))
    return list(found.items())
