"""``explain``: what a plan does with each residual, as a table in the user's terms.

A row is a residual of the backward sweep, or a value kept so that residuals can be made from it. Sites are found by
following the tangents of the parameters through the graph: a residual belongs to the site whose parameter enters last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from numpyro_rad import _jax
from numpyro_rad.graph import Edge, Split, Value, sites
from numpyro_rad.plan import Plan, Prediction, kept_bytes


@dataclasses.dataclass(frozen=True)
class Row:
    """One residual.

    :ivar line: the user's file and line, empty if unknown.
    :ivar site: the site (or differentiated argument) whose parameter enters last on the way to it.
    :ivar operation: the linear operation that reads it.
    :ivar shape: its shape, the length of scans around it first.
    :ivar dtype: its dtype.
    :ivar decision: ``alive`` (an input of the program), ``recompute``, ``keep``, ``1-bit mask``, or the codec.
    :ivar exact_bytes: its bytes if it were stored exactly; 0 for inputs, which are not stored.
    :ivar stored_bytes: what the plan stores for it; a copy shared with an earlier row counts there.
    :ivar relative_variance: predicted variance of its estimate divided by its squared norm; 0 if exact.
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


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A plan as a table; ``print`` it.

    :ivar rows: one for each residual, in the order of the program.
    :ivar stored_bytes: bytes stored between the sweeps by one gradient: codes, scales, keys and kept values.
    :ivar exact_bytes: bytes of the same residuals stored exactly, elementwise derivatives already fused.
    :ivar defaults: operations that took the safe default (the primitive's own derivative from exact inputs), with
        lines.
    :ivar program: the fingerprint of the program.
    :ivar predicted: what the plan is expected to cost; None where nothing is predicted.
    """

    rows: tuple[Row, ...]
    stored_bytes: int
    exact_bytes: int
    defaults: tuple[str, ...]
    program: str = ""
    predicted: Prediction | None = None

    def __str__(self) -> str:
        header = ("where", "site", "read by", "shape", "dtype", "decision", "exact", "stored", "rel. variance")
        body = [
            (
                r.line or "?",
                r.site,
                r.operation,
                "x".join(map(str, r.shape)) or "scalar",
                r.dtype,
                r.decision,
                _size(r.exact_bytes),
                _size(r.stored_bytes),
                f"{r.relative_variance:.1e}" if r.relative_variance else "0",
            )
            for r in self.rows
        ]
        ratio = self.exact_bytes / self.stored_bytes if self.stored_bytes else float("inf")
        total = ("total", "", "", "", "", f"{ratio:.1f}x less", _size(self.exact_bytes), _size(self.stored_bytes), "")
        table = [header, *body, total]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        right = {6, 7, 8}
        lines = [
            "  ".join(
                c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in table
        ]
        rule = "-" * len(lines[0])
        text = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        if self.defaults:
            text.append(
                "Kept exactly by the safe default (no rule, or none that is unbiased): " + ", ".join(self.defaults)
            )
        return "\n".join(line.rstrip() for line in text)


def _size(n_bytes: int) -> str:
    """A size for people; never 0 for what is not."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes} B"


def explain(target: Any, *args: Any, argnums: int | Sequence[int] = 0, **kwargs: Any) -> Explanation:
    """What the plan for ``target`` stores, recomputes and encodes. Traces the program and runs nothing.

    :param target: a ``RAD_ELBO``, or what :func:`numpyro_rad.rad` returned.
    :param args: for an ELBO ``rng_key, param_map, model, guide`` and the arguments of model and guide, as in its
        ``loss``; for ``rad(f)`` a key and the arguments of ``f``.
    :param argnums: for ``rad(f)``, the arguments of ``f`` to differentiate; an ELBO is differentiated with respect to
        all its parameters.
    :return: an object that prints as a table.
    :raises TypeError: if ``target`` is neither.
    :raises ValueError: for a model and guide without parameters.
    :raises BudgetError: if no plan meets the budget.

    Example::

        print(explain(RAD_ELBO(), key, svi.get_params(state), model, guide, x, y))
    """
    if hasattr(target, "loss_with_keys"):
        plan, names = target.plan(*args, **kwargs)
        names = [name.removesuffix("$params").split("_auto_")[0] for name in names]
    elif hasattr(target, "planned"):
        _, *rest = args
        plan, names = target.planned(tuple(rest), kwargs, argnums)
    else:
        raise TypeError(
            f"explain needs a RAD_ELBO or the result of rad(f), got {type(target).__name__}. For NumPyro's own ELBOs "
            "there is no plan to explain; wrap a plain function as rad(f)."
        )
    rows = tuple(_rows(plan, dict(zip(plan.graph.tangent_inputs, names, strict=True))))
    exact_bytes = sum(r.exact_bytes for r in rows if r.operation != _SOURCE)
    return Explanation(
        rows, plan.stored_bytes, exact_bytes, tuple(_defaults(plan)), plan.graph.fingerprint(), plan.predicted
    )


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
                stored = plan.encoded[storage].stored_bytes if storage in plan.encoded else kept_bytes(storage)
            yield _row(plan, residual, found.get(edge, ""), edge.name, decision, stored, linear)
        if edge.split is not None:
            for body, child in zip(edge.split.bodies, plan.children[edge.split], strict=True):
                inner = {
                    tangent: found.get(outer, "")  # type: ignore[arg-type]
                    for tangent, outer in zip(body.tangent_inputs, edge.split.tangents, strict=True)
                    if outer is not None
                }
                yield from _rows(child, inner)
        if edge.split in plan.segments:
            yield _segments_row(plan, edge.split, found.get(edge, ""), edge.line)
    for value in plan.kept:
        if value not in counted:
            yield _row(plan, value, "", _SOURCE, str(plan.kept[value]), kept_bytes(value), False)


def _row(plan: Plan, value: Value, site: str, operation: str, decision: str, stored: int, linear: bool) -> Row:
    equation = plan.graph.producer.get(value)
    aval = value.aval
    shape = aval.shape if plan.repeat == 1 else (plan.repeat, *aval.shape)
    carrier = plan.carrier.get(value)
    variance = 0.0
    if linear and carrier in plan.encoded:
        variance = plan.encoded[carrier].codec.relative_variance(carrier.aval.shape)
    exact = 0 if decision == "alive" else _jax.aval_bytes(aval) * plan.repeat
    line = equation.line if equation is not None else ""
    return Row(line, site, operation, shape, str(aval.dtype), decision, exact, stored * plan.held, variance)


def _segments_row(plan: Plan, node: Split, site: str, line: str) -> Row:
    """The carries that a loop stores at the beginnings of its segments."""
    n_segments, stored = plan.segments[node], plan.boundary_bytes(node) * plan.held
    decision = f"{n_segments} segments of {node.params['length'] // n_segments}"
    return Row(line, site, _SOURCE, (n_segments,), "carry", decision, 0, stored, 0.0)


def _decision(plan: Plan, residual: Value, linear: bool) -> tuple[str, Value | None]:
    """What happens to a residual, and the stored value that stands for it (None: nothing is stored for it)."""
    if linear and plan.estimated(residual):
        carrier = plan.carrier[residual]
        return str(plan.encoded[carrier].codec), carrier
    if residual in plan.kept:
        return str(plan.kept[residual]), residual
    return ("alive" if residual in plan.reads else "recompute"), None


def _defaults(plan: Plan) -> list[str]:
    """Operations under the safe default, each once."""
    found: dict[str, None] = {}
    for inner in plan.walk():
        edges: list[Edge] = inner.graph.edges
        for edge in edges:
            if edge.default:
                found[f"{edge.name} ({edge.line})" if edge.line else edge.name] = None
    return list(found)
