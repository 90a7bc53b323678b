"""How the errors of codes travel back through a program: what many of them add to the gradient together.

The gradient is linear in each coded residual r_j, so codes r_j + e_j with independent errors add, exactly,

    tr Cov(g) = sum over sets S of residuals of  E |D_S g [e_j, j in S]|^2,

D_S being the mixed derivative. The terms of one residual are what ``calibrate`` measures. In those of several, the
error that one code makes is multiplied by the errors of the codes behind it on its way to the gradient. Of an error
that has nothing to do with the residual it meets, r_j + e_j lets pass 1 + v_j times the energy that r_j does, with
v_j = E|e_j|^2 / |r_j|^2, so that

    tr Cov(g) = sum over residuals of  c_i A_i,        A_i = reach of i with codes / reach of i without,

where the *reach* of a place is the energy that one unit of unstructured error there has when it comes to the gradient.
Reaches follow from one another, from the gradient on, by the energies of the Jacobians in between. They, and the energy
U_j that comes to each residual from the codes before it, are what :class:`ErrorPropagation` computes: the sum is linear
in each c_j and v_j, and changes with them by A_j and U_j.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Protocol

import numpy as np

from numpyro_rad.ad.codecs import Codec
from numpyro_rad.ad.edges import Diagonal
from numpyro_rad.ad.graph import ControlFlowEdge, Edge, Graph, Path, Place, Scan, Value
from numpyro_rad.ad.plan import Plan, carrier_of

HUGE = 1e100
"""Energies beyond this are not told apart."""

TINY = 1e-30
"""Nor are those below this."""

MASK = 0.5
"""Mean square of a mask of which nothing is known."""


class VarianceModel(Protocol):
    """What the codes of a program do to its gradient. Residuals are named by their paths.

    :cvar knows_energies: whether it can tell what a step makes of the energy of an error. If not, a step is taken to
        share it out to its routes.
    """

    knows_energies: ClassVar[bool]

    def alone(self, path: Path, value: Value, codec: Codec) -> float:
        """What one code adds if all others are exact, relative to the variance of the exact gradient."""
        ...

    def relative(self, path: Path, value: Value, codec: Codec) -> float:
        """The variance of the code, relative to its squared norm."""
        ...

    def mean_square(self, path: Path) -> float | None:
        """Of the entries of the residual, or None if it is not known."""
        ...

    def reach(self, position: int) -> float:
        """Mean square of the derivative of the parameters of the optimizer in the differentiated input."""
        ...


class EqualShares:
    """The variance model without data: every code has an equal share in the gradient.

    If all residuals were coded with relative variance v each, the gradient would get v times its squared norm, which
    is also taken for the variance of the exact gradient (on image classification at usual batch sizes it is).
    """

    knows_energies: ClassVar[bool] = False

    def __init__(self, graph: Graph) -> None:
        self._n_residuals = max(1, len({r for g in graph.walk() for e in g.edges for r in e.residuals}))

    def alone(self, path: Path, value: Value, codec: Codec) -> float:
        return codec.relative_variance(value.aval.shape) / self._n_residuals

    def relative(self, path: Path, value: Value, codec: Codec) -> float:
        return codec.relative_variance(value.aval.shape)

    def mean_square(self, path: Path) -> float | None:
        return None

    def reach(self, position: int) -> float:
        return 1.0


@dataclasses.dataclass(frozen=True)
class CodeNoise:
    """A code of one residual: what it adds alone, and its variance relative to its squared norm."""

    alone: float
    relative: float


@dataclasses.dataclass(frozen=True)
class Effects:
    """What the codes of a plan do together.

    :ivar total: what they add to the variance of the gradient, relative to that of the exact one.
    :ivar amplified: for each residual, by how much what its code adds is multiplied by the codes behind it.
    :ivar arriving: for each residual, what its code would add per unit of its relative variance by multiplying the
        errors of the codes before it.
    """

    total: float
    amplified: dict[Path, float]
    arriving: dict[Path, float]

    def change(self, path: Path, code: CodeNoise) -> float:
        """What a code of one residual changes, all others being those of the plan."""
        return code.alone * self.amplified[path] + code.relative * self.arriving[path]

    def towards(self, other: Effects, weight: float) -> Effects:
        """On the way to the effects of another plan, in the geometric mean."""

        def mean(a: float, b: float) -> float:
            return math.exp((1 - weight) * math.log(max(a, TINY)) + weight * math.log(max(b, TINY)))

        return Effects(
            mean(self.total, other.total),
            {path: mean(a, other.amplified[path]) for path, a in self.amplified.items()},
            {path: mean(a, other.arriving[path]) for path, a in self.arriving.items()},
        )


@dataclasses.dataclass(eq=False, slots=True)
class _Route:
    """From an output of an edge to one of its inputs, in the direction of cotangents.

    :ivar gain: how much of the energy of an error comes out.
    :ivar residual: the path of the residual that it meets and that may be coded.
    :ivar repeat: how often it is gone.
    """

    source: Value
    target: Value
    gain: float
    residual: Path | None
    repeat: int

    def passed(self, energy: float, relative: Mapping[Path, float]) -> float:
        """What comes out of so much energy, with codes of such relative variances."""
        variance = 0.0 if self.residual is None else relative.get(self.residual, 0.0)
        return min(energy * self.gain * (1 + variance), HUGE)


class ErrorPropagation:
    """How the errors of codes travel through a program.

    :param graph: the program.
    :param model: what is known about its residuals.
    """

    def __init__(self, graph: Graph, model: VarianceModel) -> None:
        self._graph, self._model = graph, model
        self._routes = {
            edge: list(_routes(place, edge, model))
            for place in graph.places()
            for edge in place.graph.edges
            if not isinstance(edge, ControlFlowEdge)
        }
        self._at_end = [model.reach(i) for i in range(len(graph.tangent_inputs))]
        self._damping: dict[Scan, float] = {}
        self._plain = self._reaches({})
        signal = self._energies({}, {}, 1.0)
        through: dict[Path, list[tuple[_Route, float]]] = {}
        for route in itertools.chain(*self._routes.values()):
            if route.residual is not None:
                energy = route.passed(signal[route.source], {}) * self._plain[route.target]
                through.setdefault(route.residual, []).append((route, energy))
        self._shares = {path: _normalized(routes) for path, routes in through.items()}

    def code(self, path: Path, value: Value, codec: Codec) -> CodeNoise:
        """What a code of a residual does."""
        return CodeNoise(self._model.alone(path, value, codec), self._model.relative(path, value, codec))

    def effects(self, codes: Mapping[Path, CodeNoise]) -> Effects:
        """What codes do together.

        :param codes: those of a plan, by the paths of the residuals; the rest is exact.
        """
        relative = {path: code.relative for path, code in codes.items()}
        reaches = self._reaches(relative)
        made: dict[_Route, float] = {}
        amplified: dict[Path, float] = {}
        for path, routes in self._shares.items():
            parts = [(r, s, self._plain[r.target]) for r, s in routes if self._plain[r.target] > 0]
            amplified[path] = sum(s * reaches[r.target] / plain for r, s, plain in parts) if parts else 1.0
            if path in codes:
                for route, share, plain in parts:
                    made[route] = min(codes[path].alone * share / plain, HUGE)
        energies = self._energies(relative, made)
        arriving = {
            path: min(sum(energies[r.source] * r.gain * reaches[r.target] * r.repeat for r, _ in routes), HUGE)
            for path, routes in self._shares.items()
        }
        total = sum(code.alone * amplified[path] for path, code in codes.items())
        return Effects(total, amplified, arriving)

    # -- from the gradient on: the reach of every place

    def _reaches(self, relative: Mapping[Path, float]) -> dict[Value, float]:
        """Of each tangent; in loops the mean over the iterations."""
        found: dict[Value, float] = {}
        self._reach_through(self._graph, self._at_end, relative, found)
        return found

    def _reach_through(
        self, graph: Graph, at_inputs: list[float], relative: Mapping[Path, float], found: dict[Value, float]
    ) -> list[float]:
        """From the inputs of a graph to its outputs; those of the tangents in between are added to ``found``."""
        found.update(dict.fromkeys((t for e in graph.edges for t in e.outputs), 0.0))
        found.update(zip(graph.tangent_inputs, at_inputs, strict=True))
        for edge in graph.edges:
            if not isinstance(edge, ControlFlowEdge):
                for route in self._routes[edge]:
                    found[route.source] = min(found[route.source] + route.passed(found[route.target], relative), HUGE)
                continue
            node = edge.node
            inside = [0.0 if t is None else found[t] for t in node.tangents]
            if isinstance(node, Scan):
                outs = self._reach_through_scan(node, inside, relative, found)
            else:
                branches = [self._reach_through(body, inside, relative, found) for body in node.bodies]
                outs = [sum(out) / len(branches) for out in zip(*branches, strict=True)]
            found.update(zip(edge.outputs, outs, strict=True))
        return [0.0 if t is None else found[t] for t in graph.tangent_outputs]

    def _reach_through_scan(
        self, node: Scan, inside: list[float], relative: Mapping[Path, float], found: dict[Value, float]
    ) -> list[float]:
        body, length, n_carry = node.body, node.length, node.tangent.n_carry
        step = self._step(node, relative)
        consts, carry, xs = node.tangent.of(inside)
        each = self._reach_through(body, [*consts, *[0.0] * n_carry, *xs], relative, {})[:n_carry]
        last, total = _repeated(step, np.array(carry), np.array(each), length)
        mean = [*consts, *(total / max(1, length)).tolist(), *xs]
        outs = self._reach_through(body, mean, relative, found)
        return [*last.tolist(), *outs[n_carry:]]

    def _step(self, node: Scan, relative: Mapping[Path, float]) -> np.ndarray:
        """What one iteration of a loop makes of the reaches of its carry. Mean gains above one say nothing about
        thousands of iterations: without codes the carry is taken not to grow.
        """
        n_consts, n_carry = node.tangent
        n_rest = len(node.body.tangent_inputs) - n_consts - n_carry
        columns = []
        for unit in np.eye(n_carry).tolist():
            outs = self._reach_through(node.body, [*[0.0] * n_consts, *unit, *[0.0] * n_rest], relative, {})
            columns.append(outs[:n_carry])
        step = np.array(columns, float).reshape(n_carry, n_carry).T
        if node not in self._damping:
            self._damping[node] = 1 / max(1.0, _growth(step))
        return step * self._damping[node]

    # -- towards the gradient: the energy that comes to every place

    def _energies(
        self, relative: Mapping[Path, float], made: Mapping[_Route, float], at_outputs: float = 0.0
    ) -> dict[Value, float]:
        """Of the error in the cotangent of each tangent; in loops the mean over the iterations.

        :param made: energies of the errors that codes make, on the routes that meet them.
        """
        found: dict[Value, float] = {}
        self._pull_through(self._graph, [at_outputs] * len(self._graph.tangent_outputs), relative, made, found)
        return found

    def _pull_through(
        self,
        graph: Graph,
        at_outputs: list[float],
        relative: Mapping[Path, float],
        made: Mapping[_Route, float],
        found: dict[Value, float],
        times: float = 1.0,
    ) -> list[float]:
        """From the outputs of a graph to its inputs. ``times``: what is made is divided by this."""
        found.update(dict.fromkeys((t for e in graph.edges for t in (*e.inputs, *e.outputs)), 0.0))
        found.update(dict.fromkeys(graph.tangent_inputs, 0.0))
        for tangent, energy in zip(graph.tangent_outputs, at_outputs, strict=True):
            if tangent is not None:
                found[tangent] = found.get(tangent, 0.0) + energy
        for edge in reversed(graph.edges):
            if not isinstance(edge, ControlFlowEdge):
                for route in self._routes[edge]:
                    found[route.target] += route.passed(found[route.source], relative) + made.get(route, 0.0) / times
                continue
            node = edge.node
            outs = [found[t] for t in edge.outputs]
            if isinstance(node, Scan):
                pulled = self._pull_through_scan(node, outs, relative, made, found, times)
            else:
                share = [out / len(node.bodies) for out in outs]
                branches = [self._pull_through(b, share, relative, made, found, times) for b in node.bodies]
                pulled = [sum(p) for p in zip(*branches, strict=True)]
            for tangent, energy in zip(node.tangents, pulled, strict=True):
                if tangent is not None:
                    found[tangent] += energy
        return [found[t] for t in graph.tangent_inputs]

    def _pull_through_scan(
        self,
        node: Scan,
        outs: list[float],
        relative: Mapping[Path, float],
        made: Mapping[_Route, float],
        found: dict[Value, float],
        times: float,
    ) -> list[float]:
        body, length, n_carry = node.body, node.length, node.tangent.n_carry
        step, runs = self._step(node, relative).T, max(1, length)
        ys = [y / runs for y in outs[n_carry:]]
        each = self._pull_through(body, [*[0.0] * n_carry, *ys], relative, made, {}, times * runs)
        added = np.array(node.tangent.of(each)[1])
        first, total = _repeated(step, np.array(outs[:n_carry]), added, length)
        mean = [*(total / runs).tolist(), *ys]
        pulled = self._pull_through(body, mean, relative, made, found, times * runs)
        consts, _, xs = node.tangent.of(pulled)
        return [*(c * length for c in consts), *first.tolist(), *(x * length for x in xs)]


def _routes(place: Place, edge: Edge, model: VarianceModel) -> Iterator[_Route]:
    """The routes through an edge that is no control flow."""
    share = 1 / max(1, len(edge.inputs))
    arrays = iter(edge.residuals)
    for position, (target, entries) in enumerate(zip(edge.inputs, edge.entries, strict=True)):
        scale, residual = 1.0, None
        if isinstance(edge, Diagonal):
            term = edge.terms[position]
            scale, residual = term.scale**2, next(arrays) if term.residual is not None else None
        elif any(edge.linear):
            residual = edge.residuals[edge.linear.index(True)]
        name, square = None, 1.0 if model.knows_energies else None
        if residual is not None:
            name = (*place.path, carrier_of(place.graph, residual).number)
            square = MASK if square and residual.aval.dtype == bool else model.mean_square(name)
        for source in edge.outputs:
            gain = share if square is None else scale * square * entries / max(1, source.aval.size)
            yield _Route(source, target, gain if math.isfinite(gain) else share, name, place.repeats)


def _normalized(routes: list[tuple[_Route, float]]) -> list[tuple[_Route, float]]:
    total = sum(share for _, share in routes)
    return [(route, share / total if total > 0 else 1 / len(routes)) for route, share in routes]


def _growth(step: np.ndarray) -> float:
    """The largest modulus of the eigenvalues of a matrix of energies."""
    return float(np.abs(np.linalg.eigvals(step)).max(initial=0.0))


def _repeated(step: np.ndarray, start: np.ndarray, each: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """x_0 = start, x_(k+1) = step x_k + each: x_length, and the sum of all before it (none above ``HUGE``)."""
    size = len(start)
    if not size or not length:
        return start, start * length
    limit = HUGE ** (1 / length)
    step = step * min(1.0, limit / max(_growth(step), 1e-300))
    affine = np.block([[step, each[:, None]], [np.zeros((1, size)), np.ones((1, 1))]])
    both = np.block([[affine, np.eye(size + 1)], [np.zeros_like(affine), np.eye(size + 1)]])
    power = np.linalg.matrix_power(both, length)
    begin = np.append(start, 1.0)
    last, total = (np.minimum(part @ begin, HUGE)[:size] for part in np.split(power[: size + 1], 2, axis=1))
    return last, total


def effects_of(plan: Plan, model: VarianceModel) -> Effects:
    """What the codes of a plan do together."""
    propagation = ErrorPropagation(plan.graph, model)
    coded = [((*p.path, v.number), v, e.codec) for p in plan.walk() for v, e in p.encoded.items()]
    return propagation.effects({path: propagation.code(path, value, codec) for path, value, codec in coded})
