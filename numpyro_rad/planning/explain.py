"""``explain``: what a plan does with each residual, as a table in the user's terms; ``compare``: the same for two.

A row is a residual of the backward sweep, or a value kept so that residuals can be made from it. Sites are found by
following the tangents of the parameters through the graph: a residual belongs to the site whose parameter enters last.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from numpyro_rad.ad import _jax
from numpyro_rad.ad.codecs import Codec
from numpyro_rad.ad.graph import ControlFlowEdge, Graph, Path, Scan, Slices, Value, sites
from numpyro_rad.ad.plan import Plan, Prediction
from numpyro_rad.mistakes import is_key, kwargs_checked, shown
from numpyro_rad.planning.worth import UNTOUCHED
from numpyro_rad.tables import TextTable
from numpyro_rad.wording import LITTLE, NO_LINE, change_text, saving_text, size_text


@dataclasses.dataclass(frozen=True)
class Row:
    """One residual.

    :ivar line: the user's file and line, empty if unknown.
    :ivar site: the site (or differentiated argument) whose parameter enters last on the way to it.
    :ivar operation: the linear operation that reads it.
    :ivar shape: its shape, the length of scans around it first.
    :ivar dtype: its dtype.
    :ivar decision: ``alive`` (an input of the program), ``recompute``, ``keep``, ``1-bit mask``, or the codec; for all
        residuals of a part that runs in slices, in how many.
    :ivar exact_bytes: its bytes if it were stored exactly; 0 for inputs, which are not stored, and for gradients that
        slices add up where a result goes.
    :ivar stored_bytes: what the plan stores for it; a copy shared with an earlier row counts there.
    :ivar relative_variance: predicted variance of its estimate divided by its squared norm; 0 if exact.
    :ivar path: its name in the program, see ``Plan.to_dict``.
    :ivar within: the method of a distribution that it is computed in, as in ``Normal.log_prob``; empty elsewhere.
    """

    line: str
    site: str
    operation: str
    shape: tuple[int, ...]
    dtype: str
    decision: str
    exact_bytes: int
    stored_bytes: int
    relative_variance: float
    path: Path = ()
    within: str = ""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A plan in a few rows; ``print`` it. :meth:`table` has all of them.

    :ivar rows: one for each residual, in the order of the program.
    :ivar stored_bytes: bytes held for the backward sweep at any time: codes, scales, keys and kept values. The sum of
        all rows, unless a chain of layers is cut into segments, of which one is held at a time, or there are branches,
        which share memory.
    :ivar exact_bytes: bytes of the same residuals stored exactly, elementwise derivatives already fused.
    :ivar defaults: operations that took the safe default (the primitive's own derivative from exact inputs), with
        lines.
    :ivar program: the fingerprint of the program, in one go.
    :ivar predicted: what the plan is expected to cost; None where nothing is predicted.
    :ivar untouched: whether the program is left to JAX's own reverse mode. The rows are then what there is to store;
        JAX may store other arrays in their place, before the compiler drops those that it makes again.
    :ivar slices: the part of the program that runs slice by slice, if there is one. Of that part the rows have the
        gradient in what it takes.
    :ivar peak_bytes: the most that is held at any time of a step, as far as the two sweeps know: ``stored_bytes`` and
        what a slice holds while it runs. What the compiled step takes besides, :func:`numpyro_rad.advise` asks the
        compiler.
    :ivar priced_for: whose prices the plan was chosen by, and where they are from; empty where nobody says.
    """

    rows: tuple[Row, ...]
    stored_bytes: int
    exact_bytes: int
    defaults: tuple[str, ...]
    program: str = ""
    predicted: Prediction | None = None
    untouched: bool = False
    slices: Slices | None = None
    peak_bytes: int = 0
    priced_for: str = ""

    def __str__(self) -> str:
        """A summary: residuals by line and site, the largest first, those under 1 % of all together in one row."""
        return str(self._summary())

    def _repr_html_(self) -> str:
        return self._summary().html()

    def _summary(self) -> TextTable:
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.line, row.site), []).append(row)
        stored, exact = sum(r.stored_bytes for r in self.rows), max(1, self.exact_bytes)
        total = max(1, stored)
        large, small = [], []
        for rows in groups.values():
            sizes = _exact_bytes(rows), sum(r.stored_bytes for r in rows)
            (large if sizes[0] >= exact / 100 or sizes[1] >= total / 100 else small).append((sizes, rows))
        large.sort(key=lambda group: (-group[0][1], -group[0][0]))
        body = [_summary(rows, sizes, exact, total) for sizes, rows in large]
        if small:
            sizes = tuple(sum(s[i] for s, _ in small) for i in (0, 1))
            body.append((f"{len(small)} more, each under 1 %", "", "", "", *_shared(sizes, exact, total)))
        header = ("where", "site", "what", "how", "exact", "share", "stored", "share")
        saving = saving_text(self.exact_bytes, self.stored_bytes)
        last = ("total", "", "", saving, size_text(self.exact_bytes), "", size_text(self.stored_bytes), "")
        below = "The residuals one by one: explain(...).table()."
        return TextTable(header, body, frozenset({4, 5, 6, 7}), [below, *self._outlook()], last)

    def table(self) -> str:
        """All residuals, one row each, in the order of the program."""
        header = ("where", "site", "read by", "shape", "dtype", "decision", "exact", "stored", "rel. variance")
        body = [
            (
                r.line or NO_LINE,
                r.site,
                r.operation,
                "x".join(map(str, r.shape)) or "scalar",
                r.dtype,
                r.decision,
                size_text(r.exact_bytes),
                size_text(r.stored_bytes),
                f"{r.relative_variance:.1e}" if r.relative_variance else "0",
            )
            for r in self.rows
        ]
        sizes = size_text(self.exact_bytes), size_text(self.stored_bytes)
        total = ("total", "", "", "", "", saving_text(self.exact_bytes, self.stored_bytes), *sizes, "")
        below = []
        if any(r.relative_variance for r in self.rows):
            below.append("rel. variance: of a residual's code, relative to the squared norm of the residual.")
        if self.defaults:
            below.append(
                "Kept exactly by the safe default (no rule, or none that is unbiased): " + ", ".join(self.defaults)
            )
        return str(TextTable(header, body, frozenset({6, 7, 8}), [*below, *self._outlook()], total))

    def _outlook(self) -> list[str]:
        """What is said of the plan as a whole, below its rows."""
        if self.untouched:
            return [UNTOUCHED]
        told = [] if self.slices is None else [self._slices_text(self.slices)]
        if self.predicted is None:
            return told
        if self.priced_for:
            told.append(f"Priced for: {self.priced_for}.")
        return [*told, "Predicted: " + _prediction(self.predicted)]

    def _slices_text(self, slices: Slices) -> str:
        how = "Slices run forward and backward together, and the gradient in what they take is stored, where it is not "
        how += "a result"
        if slices.again:
            how = "Slices run forward, and once more on the way back if they do not end in one number"
        return (
            f"{how}: each holds {size_text(slices.bytes_each)} while it runs. Most is held while a slice runs, "
            f"{size_text(self.peak_bytes)}; an exact step in one go holds {size_text(self.exact_bytes)}."
        )


def _how_sliced(slices: Slices) -> str:
    return f"in {slices.number} slices"


def _in_slices(slices: Slices) -> Row:
    """A row for all residuals of the part that runs in slices."""
    how, size = _how_sliced(slices), slices.exact_bytes
    return Row(
        ", ".join(filter(None, dict.fromkeys(slices.lines))),
        "",
        f"axis of {slices.axis_size}",
        (slices.axis_size,),
        "",
        how,
        size,
        0,
        0.0,
    )


def _exact_bytes(rows: Sequence[Row]) -> int:
    return sum(r.exact_bytes for r in rows if r.operation != _SOURCE)


def _summary(rows: Sequence[Row], sizes: tuple[int, int], exact: int, total: int) -> tuple[str, ...]:
    """Residuals of one line and site, as one row."""
    first = rows[0]
    what = dict.fromkeys(r.within or r.operation for r in sorted(rows, key=lambda r: -r.exact_bytes))
    how: dict[str, int] = {}
    for r in rows:
        how[r.decision] = how.get(r.decision, 0) + max(1, r.exact_bytes)
    said = [_few(list(what)), _few(sorted(how, key=lambda d: -how[d]))]
    return (first.line or NO_LINE, first.site, *said, *_shared(sizes, exact, total))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _shared(sizes: Sequence[int], exact: int, total: int) -> tuple[str, ...]:
    """Exact and stored bytes, each with its share of all."""
    return tuple(
        text
        for size, whole in zip(sizes, (exact, total), strict=True)
        for text in (size_text(size), f"{100 * size / whole:.0f} %" if size else "")
    )


def _prediction(predicted: Prediction) -> str:
    """What a plan costs, in words."""
    time, variance = (
        change_text(predicted.added_seconds, "time"),
        change_text(predicted.added_variance, "variance"),
    )
    text = f"{time} and {variance}, relative to the time of the exact step and the variance of its gradient"
    if predicted.gap is not None:
        best = predicted.gap < LITTLE
        less = "less" if best else f"{100 * predicted.gap:.1f} % less"
        text += f"; no plan for these bytes takes {less} of both"
    return text + "."


@kwargs_checked
def explain(target: Any, *args: Any, argnums: int | Sequence[int] = 0, **kwargs: Any) -> Explanation:
    """What the plan for ``target`` stores, recomputes and encodes. Traces the program and runs nothing.

    :param target: an initialised ``SVI`` whose loss is a ``RAD_ELBO``, such an ELBO alone, or what
        :func:`numpyro_rad.rad` returned.
    :param args: for an ``SVI`` the result of its run, a state or parameters, and the arguments of model and guide; for
        an ELBO ``rng_key, param_map, model, guide`` and these arguments, as in its ``loss``, where ``param_map`` may be
        a result too (and has to hold the mutable state, if there is any); for ``rad(f)`` a key and the arguments of
        ``f``.
    :param argnums: for ``rad(f)``, the arguments of ``f`` to differentiate; an ELBO is differentiated with respect to
        all its parameters.
    :return: an object that prints as a table.
    :raises TypeError: if ``target`` is none of these, and for arguments in another order.
    :raises ValueError: for a model and guide without parameters.
    :raises BudgetError: if no plan meets the budget.

    Example::

        print(explain(svi, state, x, y))
        print(explain(RAD_ELBO(), key, svi.get_params(state), model, guide, x, y))
    """
    plan, labels = plan_of(target, args, argnums, kwargs)
    found = explained(plan, dict(zip(plan.graph.tangent_inputs, labels, strict=True)))
    return dataclasses.replace(found, priced_for=planner_of(target).prices.name)


def plan_of(target: Any, args: tuple, argnums: int | Sequence[int], kwargs: dict[str, Any]) -> tuple[Plan, list[str]]:
    """The plan for ``target`` and the sites (or arguments) of its arrays; parameters as for :func:`explain`."""
    if _is_svi(target) and _is_elbo(target.loss):
        return target.loss.plan_of_update(target, *(args or (None,)), **kwargs)
    if _is_elbo(target):
        return target.plan(*args, **kwargs)
    if hasattr(target, "planned"):
        if not (args and is_key(args[0])):
            got = shown(args[0]) if args else "nothing"
            raise TypeError(f"a JAX PRNG key comes first, as in the call of rad(f), and here is {got}.")
        return target.planned(args[1:], kwargs, argnums)
    loss = target.loss if _is_svi(target) else target
    raise TypeError(
        f"explain needs a RAD_ELBO, an SVI that has one, or the result of rad(f), got {shown(loss)}. For NumPyro's own "
        "ELBOs there is no plan to explain; wrap a plain function as rad(f)."
    )


def planner_of(target: Any) -> Any:
    """The planner of what :func:`explain` takes."""
    return target.loss.planner if _is_svi(target) else target.planner


def _is_svi(target: Any) -> bool:
    return hasattr(target, "constrain_fn")


def _is_elbo(target: Any) -> bool:
    return hasattr(target, "loss_with_keys")


def explained(plan: Plan, labels: dict[Value, str]) -> Explanation:
    """The explanation of a plan; ``labels`` are the sites of its tangent inputs."""
    rows = tuple(_rows(plan, labels))
    if plan.graph.slices is not None:
        rows = (_in_slices(plan.graph.slices), *rows)
    exact_bytes = sum(r.exact_bytes for r in rows if r.operation != _SOURCE)
    slices, defaults = plan.graph.slices, tuple(_defaults(plan))
    fixed = plan.graph.fingerprint() if slices is None else slices.program, plan.predicted, plan.untouched
    return Explanation(rows, plan.stored_bytes, exact_bytes, defaults, *fixed, slices, plan.peak_bytes)


@dataclasses.dataclass(frozen=True)
class Difference:
    """A residual with which two plans do something else; pairs are of the first plan and of the second.

    :ivar row: the residual, as in the plan that has a row for it.
    :ivar decisions: what becomes of it; empty where a plan stores nothing and needs nothing there.
    :ivar stored_bytes: what is stored for it.
    :ivar relative_variance: predicted variance of its estimate divided by its squared norm.
    """

    row: Row
    decisions: tuple[str, str]
    stored_bytes: tuple[int, int]
    relative_variance: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two plans of one program side by side; ``print`` it.

    :ivar rows: residuals with different decisions, in the order of the program.
    :ivar plans: both plans.
    """

    rows: tuple[Difference, ...]
    plans: tuple[Explanation, Explanation]

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> TextTable:
        told = ("stored", "rel. variance")
        header = ("where", "site", "read by", "shape", "first plan", *told, "second plan", *told)
        body = [
            (
                d.row.line or NO_LINE,
                d.row.site,
                d.row.operation,
                "x".join(map(str, d.row.shape)) or "scalar",
                *(
                    cell
                    for decision, size, variance in zip(d.decisions, d.stored_bytes, d.relative_variance, strict=True)
                    for cell in (decision or "-", size_text(size), f"{variance:.1e}" if variance else "0")
                ),
            )
            for d in self.rows
        ]
        totals = [cell for plan in self.plans for cell in ("", size_text(plan.stored_bytes), "")]
        below = [] if self.rows else ["Both plans do the same with every residual."]
        for name, plan in zip(("First", "Second"), self.plans, strict=True):
            expected = _prediction(plan.predicted) if plan.predicted is not None else "nothing is predicted."
            below.append(f"{name} plan: {expected}")
        return TextTable(header, body, frozenset({5, 6, 8, 9}), below, ("total", "", "", "", *totals))


def compare(a: Explanation | Plan, b: Explanation | Plan) -> Comparison:
    """Two plans of one program side by side: where they differ, and what each of them is expected to cost.

    :param a: what :func:`explain` returned, or a plan (whose table knows no sites).
    :param b: the same for the other plan.
    :return: an object that prints as a table.
    :raises TypeError: if one of them is neither.
    :raises ValueError: if they are plans of different programs.

    Example::

        arguments = key, result, model, guide, x, y
        print(compare(explain(RAD_ELBO(), *arguments), explain(RAD_ELBO(memory_budget="64MiB"), *arguments)))
    """
    for plan in (a, b):
        if not isinstance(plan, (Explanation, Plan)):
            raise TypeError(
                f"compare needs two results of explain, or two plans, got {type(plan).__name__}. Pass "
                "explain(elbo, ...) for each ELBO."
            )
    first, second = (explained(p, {}) if isinstance(p, Plan) else p for p in (a, b))
    if first.program != second.program:
        raise ValueError(
            f"compare: these are plans of different programs (fingerprints {first.program} and {second.program}). The "
            "model, the guide, the shapes of the data, the ELBO and the differentiated arguments have to be the same."
        )
    # In slices the values of a program have other names: there rows are known by what they are.
    key_of = _path if first.slices == second.slices else _place
    groups = [_grouped(plan.rows, key_of) for plan in (first, second)]
    sliced = ["" if plan.slices is None else _how_sliced(plan.slices) for plan in (first, second)]
    found = []
    for key in _merged(*groups):
        pair = [group.get(key, []) for group in groups]
        decisions = tuple(
            " and ".join(dict.fromkeys(r.decision for r in rows)) or how for rows, how in zip(pair, sliced, strict=True)
        )
        if decisions[0] != decisions[1]:
            row = next(r for rows in pair for r in rows)
            stored = tuple(sum(r.stored_bytes for r in rows) for rows in pair)
            variance = tuple(max((r.relative_variance for r in rows), default=0.0) for rows in pair)
            found.append(Difference(row, decisions, stored, variance))  # type: ignore[arg-type]
    return Comparison(tuple(found), (first, second))


def _path(row: Row) -> Hashable:
    return row.path


def _place(row: Row) -> Hashable:
    return row.line, row.site, row.operation, row.shape


def _grouped(rows: Iterable[Row], key_of: Callable[[Row], Hashable]) -> dict[Hashable, list[Row]]:
    """The rows of each residual: more than one if some readers take an estimate and others do not."""
    found: dict[Hashable, list[Row]] = {}
    for row in rows:
        found.setdefault(key_of(row), []).append(row)
    return found


def _merged(a: dict[Hashable, list[Row]], b: dict[Hashable, list[Row]]) -> list[Hashable]:
    """All keys, those of ``b`` alone behind the one that they follow there."""
    order = list(a)
    previous: Hashable | None = None
    for key in b:
        if key not in a:
            order.insert(order.index(previous) + 1 if previous is not None else 0, key)
        previous = key
    return order


_SOURCE = "recomputation"


def _rows(plan: Plan, labels: dict[Value, str]) -> Iterable[Row]:
    """Rows of a plan and of the plans inside it, in the order of the program."""
    graph = plan.graph
    found = sites(graph, labels)
    counted: set[Value] = set()
    seen: set[tuple[Value, str]] = set()
    for edge in graph.edges:
        for residual, linear in zip(edge.residuals, edge.linear, strict=True):
            decision, storage = _decision(plan, residual, linear)
            if (residual, decision) in seen:
                continue
            seen.add((residual, decision))
            stored = 0
            if storage is not None and storage not in counted:
                counted.add(storage)
                stored = plan.encoded[storage].stored_bytes if storage in plan.encoded else plan.kept_bytes(storage)
            yield _row(plan, residual, found.get(edge, ""), edge.name, decision, stored, linear)
        if not isinstance(edge, ControlFlowEdge):
            continue
        node = edge.node
        for body, child in zip(node.bodies, plan.children[node], strict=True):
            pairs = zip(body.tangent_inputs, node.tangents, strict=True)
            yield from _rows(child, {inner: found.get(outer, "") for inner, outer in pairs if outer is not None})
        if isinstance(node, Scan) and node in plan.segments:
            yield _segments_row(plan, node, found.get(edge, ""), edge.line)
    for value in plan.kept:
        if value not in counted:
            yield _row(plan, value, "", _SOURCE, _stored(plan, value, plan.kept[value]), plan.kept_bytes(value), False)


def _row(plan: Plan, value: Value, site: str, operation: str, decision: str, stored: int, linear: bool) -> Row:
    equation = plan.graph.producer.get(value)
    aval = value.aval
    shape = aval.shape if plan.repeat == 1 else (plan.repeat, *aval.shape)
    carrier = plan.carrier.get(value)
    variance = 0.0
    if linear and carrier in plan.encoded:
        variance = plan.encoded[carrier].codec.relative_variance(carrier.aval.shape)
    anyway = decision == "alive" or value in plan.graph.gradients
    exact = 0 if anyway else _jax.aval_bytes(aval) * plan.repeat
    line = equation.line if equation is not None else ""
    path = (*plan.path, value.number)
    within = _within(plan.graph, value)
    size = stored * plan.held
    return Row(line, site, operation, shape, str(aval.dtype), decision, exact, size, variance, path, within)


def _within(graph: Graph, value: Value) -> str:
    """The method of a distribution that a value is computed in. A derivative of a density, on the line of the density,
    belongs to it.
    """
    first = graph.producer.get(value)
    if first is None or first.within:
        return first.within if first is not None else ""
    todo, seen, line = [first], {first}, first.line
    while todo:
        equation = todo.pop(0)
        line = line or equation.line
        if equation.within.endswith(".log_prob"):
            return equation.within
        makers = [graph.producer[a] for a in equation.inputs if a in graph.producer]  # type: ignore[index]
        near = [e for e in makers if e.cheap and (not line or e.line in ("", line)) and e not in seen]
        seen.update(near)
        todo += near
    return ""


def _segments_row(plan: Plan, node: Scan, site: str, line: str) -> Row:
    """The carries that a loop stores at the beginnings of its segments."""
    lengths, stored = plan.segments[node], plan.boundary_bytes(node) * plan.held
    counts = [-(-a // b) for a, b in itertools.pairwise((node.length, *lengths))]
    decision = f"{' x '.join(map(str, counts))} segments of {lengths[-1]}"
    path = (*plan.path, node.number, -1)  # unlike that of any value
    return Row(line, site, _SOURCE, (sum(counts),), "carry", decision, 0, stored, 0.0, path)


def _decision(plan: Plan, residual: Value, linear: bool) -> tuple[str, Value | None]:
    """What happens to a residual, and the stored value that stands for it (None: nothing is stored for it)."""
    if linear and plan.estimated(residual):
        carrier = plan.carrier[residual]
        return _stored(plan, carrier, plan.encoded[carrier].codec), carrier
    if residual in plan.kept:
        return _stored(plan, residual, plan.kept[residual]), residual
    return ("alive" if residual in plan.reads else "recompute"), None


def _stored(plan: Plan, value: Value, codec: Codec) -> str:
    """How a value is stored, and with which segment of a chain: those of one segment are held at a time."""
    where = f", segment {plan.segment_of[value] + 1} of {plan.n_chain_segments}" if value in plan.segment_of else ""
    return f"{codec}{where}"


def _defaults(plan: Plan) -> list[str]:
    """Operations under the safe default, each once."""
    edges = (edge for graph in plan.graph.walk() for edge in graph.edges if not edge.known)
    return list(dict.fromkeys(f"{edge.name} ({edge.line})" if edge.line else edge.name for edge in edges))
