"""Elimination of vertices, in two orders.

A path through a vertex of the linearized graph is a product of the edges before and behind it; with the vertex
eliminated there is one edge, with the product as its coefficient (Griewank and Walther 2008, ch. 9). Which order of
eliminations is best depends on what is wanted. Here it is few bytes of residuals:

*Forward* (``Forms``), while edges are made: a chain of elementwise steps has diagonal Jacobians, and its product is one
array, so a GELU stores one array where its dozen steps would store five.

*Scalars first* (``collect``), once they are made: the derivative of a scalar, such as a log density, has the shape of
what it is taken in, however many ways lead there: broadcasts, slices and gathers, terms of a likelihood and its
normalizer. Where forward elimination stops at such steps and leaves a coefficient on each of the ways, a symbolic
reverse sweep from the scalar,

    s = sum_i <c_i, t_i>,        c_i = d s / d t_i,

accumulates them in the primal program.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from numpyro_rad.ad import _jax, primitives
from numpyro_rad.ad.coefficients import ONE, Coefficients, LinearForm, Term
from numpyro_rad.ad.edges import Diagonal, WeightedSum, composed
from numpyro_rad.ad.graph import Atom, Edge, Equation, Graph, Value


class Forms:
    """Elementwise tangents, held as linear forms of earlier ones until somebody needs the tangent itself.

    :param coefficients: adds products and sums to the primal program.
    :param edges: where an edge is appended for each tangent that gets a vertex.
    """

    def __init__(self, coefficients: Coefficients, edges: list[Edge]) -> None:
        self._coefficients, self._edges = coefficients, edges
        self._forms: dict[Value, LinearForm] = {}  # of tangents without a vertex of their own
        self._lines: dict[Value, str] = {}

    def add(
        self,
        name: str,
        operands: Sequence[Atom],
        moving: Mapping[int, Value],
        out: Value,
        line: str,
        fuses: Sequence[bool],
    ) -> None:
        """Add the tangent that an elementwise step makes.

        :param moving: the tangents among the operands, by position.
        :param fuses: for each use of the tangent, whether it is elementwise, too.
        """
        form: LinearForm = {}
        for position, tangent in moving.items():
            local = self._coefficients.local(name, operands, position, line)
            for source, term in (self._forms.get(tangent) or {tangent: ONE}).items():
                product = self._coefficients.product(local, term, line)
                form[source] = self._coefficients.sum(form.get(source), product, out.aval.dtype, line)
        self._forms[out], self._lines[out] = form, line
        only_adds = len(form) > 1 and all(t.residual is None for t in form.values())
        # A vertex is worth keeping where eliminating it would multiply coefficients: when somebody needs it anyway,
        # when it only adds, and when several sources meet several users.
        if not all(fuses) or only_adds or (len(fuses) > 1 and len(form) > 1):
            self.vertex(out)

    def vertex(self, tangent: Value) -> Value:
        """Give a tangent a vertex, by the edge that combines its sources. Returns the vertex, or what it equals."""
        form = self._forms.get(tangent)
        if form is None:
            return tangent
        if len(form) == 1:
            source, term = next(iter(form.items()))
            if term == ONE:
                return source
        del self._forms[tangent]
        self._edges.append(Diagonal.of(form, tangent, self._lines[tangent]))
        return tangent


def collect(graph: Graph, coefficients: Coefficients, free: Iterable[Value]) -> None:
    """Let each array that reaches a scalar by cheap steps alone reach it by one coefficient, where that saves bytes.

    All the ways from arrays ``t_i`` to a scalar ``s`` add up to ``s = sum_i <c_i, t_i>``: one array of the shape of
    ``t_i`` however many there were. The coefficients are what a reverse sweep from ``s`` gives; its steps become cheap
    equations of the primal program, so the planner may still make them again from what they are made of. Steps at the
    far end that need no more bytes than the coefficient before them stay as they are.

    :param graph: its edges are replaced in place.
    :param coefficients: adds to its primal program.
    :param free: primal inputs that cost nothing to store.
    """
    prices = _Prices(graph.equations, free)
    replaced: dict[Edge, list[Edge]] = {}
    for scalar, edges in _regions(graph).items():
        inside = set(edges)
        elsewhere = {r for e in graph.edges if e not in inside for r in e.residuals}
        if all(r in elsewhere or not prices(r) for e in edges for r in e.residuals):
            continue
        region = _Region(scalar, edges, coefficients)
        region.trim(prices)
        before = sum(prices(r) for r in {r for e in region.edges for r in e.residuals} - elsewhere)
        sources = region.sources()
        if sum(prices(r) for r in {term.residual for term in sources.values()} if r is not None) < before:
            replaced.update((e, []) for e in region.edges)
            replaced[edges[-1]] = list(_weighted_sums(scalar, sources, coefficients, edges[-1].line))
    graph.edges = [new for edge in graph.edges for new in replaced.get(edge, [edge])]


class _Prices:
    """Bytes that a coefficient takes if it is stored exactly; none if it follows from what is there anyway."""

    def __init__(self, equations: list[Equation], free: Iterable[Value]) -> None:
        self._equations, self._n_seen = equations, 0
        self._free = set(free)
        self._carried: dict[Value, float] = {}  # of rearrangements of something smaller: what that takes

    def __call__(self, value: Value) -> float:
        for equation in self._equations[self._n_seen :]:
            operands = [a for a in equation.inputs if isinstance(a, Value)]
            if equation.cheap and all(a in self._free for a in operands):
                self._free.update(equation.outputs)
            elif primitives.of(equation.name).passes_estimate:
                self._carried[equation.outputs[0]] = min(map(self._bytes, (*operands, *equation.outputs)))
        self._n_seen = len(self._equations)
        return 0 if value in self._free else self._bytes(value)

    def _bytes(self, value: Value) -> float:
        exact = _jax.aval_bytes(value.aval)
        return self._carried.get(value, exact / 8 if value.aval.dtype == bool else exact)


def _regions(graph: Graph) -> dict[Value, list[Edge]]:
    """For each scalar the edges, in order, whose every way on leads to it by cheap steps.

    A scalar that a later value multiplies is an end of its own: a coefficient should not wait for that value.
    """
    readers: dict[Value, list[Edge]] = {}
    for edge in graph.edges:
        for tangent in edge.inputs:
            readers.setdefault(tangent, []).append(edge)
    outputs = set(graph.tangent_outputs)
    end: dict[Edge, Value | None] = {}
    regions: dict[Value, list[Edge]] = {}
    for edge in reversed(graph.edges):
        end[edge] = None
        if edge.expensive or len(edge.outputs) != 1:
            continue
        if not all(primitives.is_real_float(t.aval.dtype) for t in (*edge.inputs, *edge.outputs)):
            continue
        (out,) = edge.outputs
        ends = {None} if out in outputs else {end[e] for e in readers[out]}
        if len(ends) == 1 and (out.aval.size > 1 or all(e.is_constant_in(out) for e in readers.get(out, ()))):
            (end[edge],) = ends
        if end[edge] is None and out.aval.size == 1:
            end[edge] = out
        if (scalar := end[edge]) is not None:
            regions.setdefault(scalar, []).append(edge)
    return {scalar: edges[::-1] for scalar, edges in regions.items()}


class _Region:
    """Edges that all lead to one scalar, with the coefficients that a reverse sweep from it puts in front of each input
    of each edge.
    """

    def __init__(self, scalar: Value, edges: list[Edge], coefficients: Coefficients) -> None:
        self.edges = dict.fromkeys(edges)
        self._coefficients = coefficients
        self._parts: dict[Value, dict[tuple[Edge, int], Term]] = {}
        for edge in reversed(edges):
            (out,) = edge.outputs
            cotangent = ONE if out is scalar else self._total(out, edge.line)
            for i, (tangent, term) in enumerate(zip(edge.inputs, composed(edge, cotangent, coefficients), strict=True)):
                self._parts.setdefault(tangent, {})[edge, i] = term

    def _total(self, tangent: Value, line: str) -> Term:
        total = None
        for (edge, _), term in self._parts[tangent].items():
            if edge in self.edges:
                total = self._coefficients.sum(total, term, tangent.aval.dtype, line)
        assert total is not None
        return total

    def trim(self, prices: _Prices) -> None:
        """Leave out edges from the far end on while the coefficients before and behind them cost no less."""

        def price(tangent: Value, without: Edge | None = None) -> float:
            parts = self._parts.get(tangent, {}).items()
            terms = {t.residual for (e, _), t in parts if e in self.edges and e is not without}
            costly = [prices(r) for r in terms if r is not None and prices(r)]
            return max(_jax.aval_bytes(tangent.aval), *costly) if len(costly) > 1 else sum(costly)

        made = {o for e in self.edges for o in e.outputs}
        for edge in list(self.edges):
            inputs = set(edge.inputs)
            if inputs & made:
                continue
            own = sum(prices(r) for r in set(edge.residuals))
            if own + price(edge.outputs[0]) + sum(price(t, edge) for t in inputs) <= sum(map(price, inputs)):
                del self.edges[edge]
                made.remove(edge.outputs[0])

    def sources(self) -> LinearForm:
        """What the edges start from, each with its coefficient."""
        made = {o for e in self.edges for o in e.outputs}
        starts = dict.fromkeys((t, e.line) for e in self.edges for t in e.inputs if t not in made)
        return {tangent: self._total(tangent, line) for tangent, line in starts}


def _weighted_sums(scalar: Value, sources: LinearForm, coefficients: Coefficients, line: str) -> Iterable[Edge]:
    """Edges for ``scalar = sum_i <c_i, t_i>``. Each product has its own, so that each can be pulled back where the
    cotangent is needed.
    """
    form: LinearForm = {}
    for tangent, term in sources.items():
        if term.residual is None and tangent.aval.shape == scalar.aval.shape:
            form[tangent] = term
            continue
        part = coefficients.new_value(scalar.aval)
        yield WeightedSum.of(term, tangent, part, line)
        form[part] = ONE
    yield Diagonal.of(form, scalar, line)
