"""Make the linearized computational graph of a traced program.

JAX's forward mode is run once; its program computes primals and tangents side by side. Calls are opened, tangents are
told from primals by following the dependencies, and each step of the tangent part becomes an edge: elementwise ones are
eliminated (``elimination``), the others get the kind that their primitive asks for (``edges``), and control flow is
separated body by body. Since forward mode itself makes the tangent
part, every primitive with a JVP is covered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NoReturn

from numpyro_rad.ad import _jax, primitives, tangents
from numpyro_rad.ad.coefficients import Coefficients
from numpyro_rad.ad.edges import Opaque, Operands, linear_edge
from numpyro_rad.ad.elimination import Forms, collect
from numpyro_rad.ad.graph import (
    Atom,
    Cond,
    Constant,
    ControlFlow,
    ControlFlowEdge,
    Edge,
    Equation,
    Graph,
    LoopOperands,
    Scan,
    Value,
)
from numpyro_rad.ad.invariants import hoist


def linearize(jaxpr: _jax.Jaxpr, active: Sequence[bool]) -> Graph:
    """The LCG of ``jaxpr`` with respect to the active ones among its inputs.

    :param jaxpr: a traced program.
    :param active: one flag for each input: whether its cotangent is wanted.
    :return: a graph whose tangent outputs are aligned with the program's outputs (None: no or zero tangent).
    """
    return graph_of_both(*with_tangents(jaxpr, active), active)


def with_tangents(jaxpr: _jax.Jaxpr, active: Sequence[bool]) -> tuple[_jax.Jaxpr, list[bool]]:
    """The program of primals and tangents of ``jaxpr``, and which of its outputs have a tangent."""
    return _jax.jvp_jaxpr(hoist(jaxpr), active)


def graph_of_both(both: _jax.Jaxpr, has_tangent: Sequence[bool], active: Sequence[bool]) -> Graph:
    """The LCG of a program, given that of its primals and tangents (:func:`with_tangents`).

    :param both: its outputs, their tangents, and then perhaps values that are in the place of gradients.
    """
    is_tangent = [False] * len(active) + [True] * sum(active)
    graph, results, coefficients = split(both, is_tangent)
    n_outs, n_tangents = len(has_tangent), sum(has_tangent)
    tangents = iter(tangent for _, tangent in results[n_outs:])
    graph.outputs = [atom for atom, _ in results[:n_outs]]  # type: ignore[misc]
    graph.tangent_outputs = [next(tangents) if on else None for on in has_tangent]
    graph.gradients = frozenset(atom for atom, _ in results[n_outs + n_tangents :] if isinstance(atom, Value))
    collect(graph.finish(), coefficients, free=graph.inputs)
    return graph.finish()


def split(
    jaxpr: _jax.Jaxpr, is_tangent: Sequence[bool]
) -> tuple[Graph, list[tuple[Atom | None, Value | None]], Coefficients]:
    """Separate a mixed primal and tangent jaxpr, given which inputs are tangents.

    :return: the graph (outputs still to be set by the caller), for each output of the jaxpr the pair (primal atom or
        None, tangent or None), and what adds coefficients to the primal program.
    """
    flat = Flat()
    inputs = [flat.value(v.aval) for v in jaxpr.jaxpr.invars]
    flat.tangents.update(v for v, t in zip(inputs, is_tangent, strict=True) if t)
    results = flat.read(jaxpr, inputs)
    builder = _Builder(flat, results)
    pairs = []
    for atom in results:
        tangent = atom if atom in flat.tangents else None
        pairs.append((None, builder.forms.vertex(tangent)) if isinstance(tangent, Value) else (atom, None))
    primal_inputs = [v for v, t in zip(inputs, is_tangent, strict=True) if not t]
    tangent_inputs = [v for v, t in zip(inputs, is_tangent, strict=True) if t]
    graph = Graph(primal_inputs, builder.equations, [], tangent_inputs, builder.edges, [])
    return graph, pairs, builder.coefficients


@dataclasses.dataclass(eq=False, slots=True)
class _Step:
    """An equation of the jaxpr with its calls opened: operands and results are our values."""

    equation: _jax.JaxprEquation
    operands: list[Atom]
    results: list[Value]
    mixed: bool  # whether an operand is a tangent

    @property
    def name(self) -> str:
        return self.equation.primitive.name


class Flat:
    """A jaxpr as one list of steps, calls opened, and which of its values are tangents.

    :param whole: whether cheap calls without tangents are opened, too.
    """

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole
        self.steps: list[_Step] = []
        self.tangents: set[Atom] = set()
        self.n_values = 0

    def value(self, aval: _jax.Aval) -> Value:
        self.n_values += 1
        return Value(aval, self.n_values)

    def read(self, jaxpr: _jax.Jaxpr, inputs: Sequence[Atom]) -> list[Atom]:
        """Append the steps of ``jaxpr`` at ``inputs``; returns its outputs."""
        open_jaxpr = jaxpr.jaxpr
        env: dict[_jax.Variable, Atom] = dict(zip(open_jaxpr.invars, inputs, strict=True))
        env.update((v, Constant(c)) for v, c in zip(open_jaxpr.constvars, jaxpr.consts, strict=True))

        def look_up(atom: _jax.Variable) -> Atom:
            return Constant(atom.val) if isinstance(atom, _jax.Literal) else env[atom]

        for equation in open_jaxpr.eqns:
            operands = [look_up(a) for a in equation.invars]
            flags = [o in self.tangents for o in operands]
            inner = _jax.inlined_jaxpr(equation)
            if inner is not None and (self.whole or any(flags) or not primitives.is_cheap(equation)):
                env.update(zip(equation.outvars, self.read(inner, operands), strict=True))
                continue
            results = [self.value(v.aval) for v in equation.outvars]
            if any(flags):
                tangent = tangents.tangent_results(equation, flags)
                self.tangents.update(r for r, t in zip(results, tangent, strict=True) if t)
            self.steps.append(_Step(equation, operands, results, any(flags)))
            env.update(zip(equation.outvars, results, strict=True))
        return [look_up(a) for a in open_jaxpr.outvars]

    def needed(self, results: list[Atom]) -> list[_Step]:
        """The steps that reach a result (those with effects count as needed)."""
        live = set(results)
        kept = []
        for step in reversed(self.steps):
            if step.equation.effects or any(r in live for r in step.results):
                live.update(step.operands)
                kept.append(step)
        return kept[::-1]


class _Builder:
    """Emits the equations and edges of a flat program, in order."""

    def __init__(self, flat: Flat, results: list[Atom]) -> None:
        self.flat = flat
        self.equations: list[Equation] = []
        self.edges: list[Edge] = []
        self.coefficients = Coefficients(self.equations, flat.value)
        self.forms = Forms(self.coefficients, self.edges)
        self.n_nodes = 0
        steps = flat.needed(results)
        self.fuses: dict[Value, list[bool]] = {}  # for each use of a tangent, whether it is elementwise
        for step in steps:
            for operand in step.operands:
                if isinstance(operand, Value) and operand in flat.tangents:
                    self.fuses.setdefault(operand, []).append(self.is_elementwise(step))
        for atom in results:
            if isinstance(atom, Value):
                self.fuses.setdefault(atom, []).append(False)
        for step in steps:
            if not step.mixed:
                self.add_primal(step)
            elif self.is_elementwise(step):
                self.add_elementwise(step)
            elif self.is_split(step):
                self.add_control_flow(step)
            elif any(r not in flat.tangents for r in step.results):
                self.add_opaque(step)
            else:
                self.add_linear(step)

    def is_tangent(self, atom: Atom) -> bool:
        return atom in self.flat.tangents

    # -- primal program --------------------------------------------------------------------------------------------

    def add_primal(self, step: _Step) -> None:
        equation, line = step.equation, _jax.source_line(step.equation)
        self.equations.append(
            Equation(
                step.name,
                tuple(step.operands),
                tuple(step.results),
                lambda *arrays: _jax.bind(equation, arrays),
                primitives.is_cheap(equation),
                line,
                draws_bits=primitives.draws_bits(equation),
                work=primitives.work(equation),
                acts=_jax.acts(equation),
                within=_jax.distribution(equation),
            )
        )

    # -- tangent program: elementwise vertices are eliminated ---------------------------------------------------------

    def is_elementwise(self, step: _Step) -> bool:
        """Whether the step has a diagonal Jacobian that can be fused with its neighbours'."""
        traits = primitives.of(step.name)
        if not step.mixed or traits.coefficient is None:
            return False
        out, moving = step.results[0].aval, self.moving(step)
        if not primitives.is_real_float(out.dtype) or any(m.aval.shape != out.shape for m in moving.values()):
            return False
        return traits.sums or len(moving) == 1

    def is_split(self, step: _Step) -> bool:
        """Whether the step is control flow that has a primal and a tangent part."""
        inner = _jax.inner_jaxprs(step.equation)
        return primitives.of(step.name).splits and not any(map(_jax.has_references, inner))

    def moving(self, step: _Step) -> dict[int, Value]:
        """The tangents among the operands of a step, by position."""
        pairs = enumerate(step.operands)
        return {i: o for i, o in pairs if isinstance(o, Value) and self.is_tangent(o)}

    def add_elementwise(self, step: _Step) -> None:
        (out,) = step.results
        line = _jax.source_line(step.equation)
        self.forms.add(step.name, step.operands, self.moving(step), out, line, self.fuses[out])

    # -- tangent program: everything else --------------------------------------------------------------------------

    def operands_of(self, step: _Step) -> Operands:
        return Operands.of(step.equation, step.operands, self.is_tangent, self.forms.vertex)

    def add_linear(self, step: _Step) -> None:
        line = _jax.source_line(step.equation)
        self.edges.append(linear_edge(step.name, self.operands_of(step), step.results, line))

    def add_opaque(self, step: _Step) -> None:
        """A call that mixes primal and tangent work and that we cannot look into."""
        operands, line = self.operands_of(step), _jax.source_line(step.equation)
        primal_out, tangent_out = self.parted(step.results)
        moves = tuple(self.is_tangent(r) for r in step.results)
        exact = (False,) * len(operands.residuals)
        edge = Opaque(step.name, operands.tangents, tangent_out, operands.residuals, exact, line, operands, moves)
        self.equations.append(
            Equation(
                step.name,
                operands.residuals,
                primal_out,
                edge.primal,
                False,
                line,
                work=primitives.work(step.equation),
                acts=_jax.acts(step.equation),
            )
        )
        self.edges.append(edge)

    def parted(self, results: Sequence[Value]) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
        """The results that are no tangents, and those that are."""
        flags = [self.is_tangent(r) for r in results]
        pairs = list(zip(results, flags, strict=True))
        return tuple(r for r, moves in pairs if not moves), tuple(r for r, moves in pairs if moves)

    def add_control_flow(self, step: _Step) -> None:
        self.n_nodes += 1
        flags = [self.is_tangent(o) for o in step.operands]
        node = (_scan if step.name == "scan" else _cond)(step.equation, self.n_nodes, step.operands, flags, self.vertex)
        primal_out, tangent_out = self.parted(step.results)
        operands = (node.index, *node.operands) if isinstance(node, Cond) else node.operands
        line, acts = _jax.source_line(step.equation), _jax.acts(step.equation)
        self.equations.append(Equation(step.name, operands, primal_out, _no_run, False, line, node=node, acts=acts))
        sources = tuple(dict.fromkeys(t for t in node.tangents if t is not None))
        self.edges.append(ControlFlowEdge(step.name, sources, tangent_out, (), (), line, node))

    def vertex(self, operand: Atom) -> Value | None:
        """The vertex of an operand in a tangent's place; one that is no tangent is a zero."""
        moves = isinstance(operand, Value) and self.is_tangent(operand)
        return self.forms.vertex(operand) if moves else None  # type: ignore[arg-type]


def _no_run(*_: object) -> NoReturn:
    raise NotImplementedError("control flow is run by the sweeps")


def split_body(body: _jax.Jaxpr, ins: Sequence[bool], outs: Sequence[bool], in_loop: bool = True) -> Graph:
    """The graph of a part of a program, given which of its inputs and first outputs, which are all that is wanted, are
    tangents.

    :param in_loop: whether it runs several times before the backward sweep, so that its inputs are residuals, too.
    """
    graph, results, coefficients = split(body, ins)
    graph.outputs = [p for (p, _), t in zip(results, outs, strict=False) if not t]  # type: ignore[misc]
    graph.tangent_outputs = [v for (_, v), t in zip(results, outs, strict=False) if t]
    collect(graph.finish(), coefficients, free=() if in_loop else graph.inputs)
    return graph.finish()


def _scan(
    equation: _jax.JaxprEquation,
    number: int,
    operands: Sequence[Atom],
    flags: Sequence[bool],
    vertex: Callable[[Atom], Value | None],
) -> ControlFlow:
    """A loop, given which of its operands are tangents."""
    body, n_consts, n_carry = _jax.scan_parts(equation)
    ins, outs = tangents.scan_tangents(equation, flags)
    consts, carry, _ = LoopOperands(n_consts, n_carry).of(ins)
    return Scan(
        number,
        (split_body(body, ins, outs),),
        tuple(o for o, t in zip(operands, ins, strict=True) if not t),
        tuple(vertex(o) for o, t in zip(operands, ins, strict=True) if t),
        equation.params["length"],
        equation.params["reverse"],
        equation.params["unroll"],
        LoopOperands(consts.count(False), carry.count(False)),
        LoopOperands(consts.count(True), carry.count(True)),
    )


def _cond(
    equation: _jax.JaxprEquation,
    number: int,
    operands: Sequence[Atom],
    flags: Sequence[bool],
    vertex: Callable[[Atom], Value | None],
) -> ControlFlow:
    """A choice, given which of its operands are tangents."""
    index, *taken = operands
    ins, outs = list(flags[1:]), tangents.cond_tangents(equation, list(flags))
    return Cond(
        number,
        tuple(split_body(b, ins, outs) for b in _jax.cond_branches(equation)),
        tuple(o for o, t in zip(taken, ins, strict=True) if not t),
        tuple(vertex(o) for o, t in zip(taken, ins, strict=True) if t),
        index,
    )
