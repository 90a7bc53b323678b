"""Make the linearized computational graph of a traced program.

JAX's forward mode is run once; its program computes primals and tangents side by side. Calls are opened, tangents are
told from primals by following the dependencies, and each step of the tangent part becomes an edge: elementwise ones are
eliminated into coefficients (see ``elementwise``), contractions keep the operand in which their pullback is linear,
control flow is separated body by body, and all the rest is left to JAX. Since forward mode itself makes the tangent
part, every primitive with a JVP is covered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from numpyro_rad.ad import _jax, elementwise, rules, scalars
from numpyro_rad.ad.elementwise import ONE, Coefficients, LinearForm
from numpyro_rad.ad.graph import Atom, Constant, Edge, Equation, Graph, Split, Value
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
    """The LCG of a program, given that of its primals and tangents (:func:`with_tangents`)."""
    is_tangent = [False] * len(active) + [True] * sum(active)
    graph, results, coefficients = split(both, is_tangent)
    n_outs = len(has_tangent)
    tangents = iter(tangent for _, tangent in results[n_outs:])
    graph.outputs = [atom for atom, _ in results[:n_outs]]  # type: ignore[misc]
    graph.tangent_outputs = [next(tangents) if on else None for on in has_tangent]
    scalars.collect(graph.finish(), coefficients, free=graph.inputs)
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
        pairs.append((None, builder.materialize(tangent)) if isinstance(tangent, Value) else (atom, None))
    primal_inputs = [v for v, t in zip(inputs, is_tangent, strict=True) if not t]
    tangent_inputs = [v for v, t in zip(inputs, is_tangent, strict=True) if t]
    graph = Graph(primal_inputs, builder.equations, [], tangent_inputs, builder.edges, [])
    return graph, pairs, builder.coefficients


@dataclasses.dataclass(eq=False, slots=True)
class _Step:
    """An equation of the jaxpr with its calls opened: operands and results are our values."""

    equation: Any
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

    def value(self, aval: Any) -> Value:
        self.n_values += 1
        return Value(aval, self.n_values)

    def read(self, jaxpr: _jax.Jaxpr, inputs: Sequence[Atom]) -> list[Atom]:
        """Append the steps of ``jaxpr`` at ``inputs``; returns its outputs."""
        open_jaxpr = jaxpr.jaxpr
        env: dict[Any, Atom] = dict(zip(open_jaxpr.invars, inputs, strict=True))
        env.update((v, Constant(c)) for v, c in zip(open_jaxpr.constvars, jaxpr.consts, strict=True))

        def look_up(atom: Any) -> Atom:
            return Constant(atom.val) if isinstance(atom, _jax.Literal) else env[atom]

        for equation in open_jaxpr.eqns:
            operands = [look_up(a) for a in equation.invars]
            flags = [o in self.tangents for o in operands]
            inner = _jax.inlined_jaxpr(equation)
            if inner is not None and (self.whole or any(flags) or not rules.is_cheap(equation)):
                env.update(zip(equation.outvars, self.read(inner, operands), strict=True))
                continue
            results = [self.value(v.aval) for v in equation.outvars]
            if any(flags):
                tangent = _tangent_results(equation, flags)
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
        self.forms: dict[Value, LinearForm] = {}  # tangents not yet given a vertex of their own
        self.lines: dict[Value, str] = {}
        self.coefficients = Coefficients(self.equations, flat.value)
        self.n_splits = 0
        steps = flat.needed(results)
        self.fusible_uses: dict[Value, list[bool]] = {}  # for each use, whether the user is elementwise
        for step in steps:
            for operand in step.operands:
                if isinstance(operand, Value) and operand in flat.tangents:
                    self.fusible_uses.setdefault(operand, []).append(self.is_elementwise(step))
        for atom in results:
            if isinstance(atom, Value):
                self.fusible_uses.setdefault(atom, []).append(False)
        for step in steps:
            if not step.mixed:
                self.add_primal(step)
            elif self.is_elementwise(step):
                self.add_elementwise(step)
            elif step.name in rules.MIXED and not any(map(_jax.has_references, _jax.inner_jaxprs(step.equation))):
                self.add_split(step)
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
                rules.is_cheap(equation),
                line,
                draws_bits=rules.draws_bits(equation),
                nanoseconds=rules.nanoseconds(equation),
                acts=_jax.acts(equation),
                within=_jax.distribution(equation),
            )
        )

    # -- tangent program: elementwise vertices are eliminated ---------------------------------------------------------

    def is_elementwise(self, step: _Step) -> bool:
        """Whether the step has a diagonal Jacobian that can be fused with its neighbours'."""
        if not step.mixed or step.name not in elementwise.LINEAR:
            return False
        out = step.results[0].aval
        moving = [o for o in step.operands if isinstance(o, Value) and self.is_tangent(o)]
        if not rules.is_real_float(out.dtype) or any(m.aval.shape != out.shape for m in moving):
            return False
        return step.name in elementwise.SUMS or len(moving) == 1

    def form(self, tangent: Value) -> LinearForm:
        return self.forms.get(tangent) or {tangent: ONE}

    def add_elementwise(self, step: _Step) -> None:
        line = _jax.source_line(step.equation)
        (out,) = step.results
        self.lines[out] = line
        form: LinearForm = {}
        for position, operand in enumerate(step.operands):
            if isinstance(operand, Value) and self.is_tangent(operand):
                local = self.coefficients.local(step.name, step.operands, position, line)
                for source, term in self.form(operand).items():
                    product = self.coefficients.product(local, term, line)
                    form[source] = self.coefficients.sum(form.get(source), product, out.aval.dtype, line)
        self.forms[out] = form
        uses = self.fusible_uses[out]
        sources = len(form)
        pure_sum = sources > 1 and all(t.residual is None for t in form.values())
        # A vertex is worth keeping where eliminating it would multiply coefficients: when somebody needs it anyway,
        # when it only adds, and when several sources meet several users.
        if not all(uses) or pure_sum or (len(uses) > 1 and sources > 1):
            self.materialize(out)

    def materialize(self, tangent: Value) -> Value:
        """Give ``tangent`` a vertex: the edge that combines its sources. Returns the vertex (or what it equals)."""
        form = self.forms.get(tangent)
        if form is None:
            return tangent
        if len(form) == 1:
            source, term = next(iter(form.items()))
            if term == ONE:
                return source
        del self.forms[tangent]
        self.edges.append(elementwise.combination(form, tangent, self.lines.get(tangent, "")))
        return tangent

    # -- tangent program: everything else --------------------------------------------------------------------------

    def operands_of(self, step: _Step) -> tuple[list[Value], list[Value], tuple[tuple[str, Any], ...]]:
        """Tangent operands, residual operands, and for each operand of the step where it comes from."""
        tangents: list[Value] = []
        residuals: list[Value] = []
        sources: list[tuple[str, Any]] = []
        for operand in step.operands:
            if isinstance(operand, Constant):
                sources.append(("constant", operand.value))
            elif self.is_tangent(operand):
                tangents.append(self.materialize(operand))
                sources.append(("tangent", len(tangents) - 1))
            else:
                if operand not in residuals:
                    residuals.append(operand)
                sources.append(("residual", residuals.index(operand)))
        return tangents, residuals, tuple(sources)

    def add_linear(self, step: _Step) -> None:
        tangents, residuals, sources = self.operands_of(step)
        bilinear = step.name in rules.BILINEAR and len(tangents) == 1
        moving = [i for i, (kind, _) in enumerate(sources) if kind == "tangent"]
        known = bilinear or step.name in rules.STRUCTURAL or step.name in elementwise.LINEAR
        self.edges.append(
            Edge(
                step.name,
                tuple(tangents),
                tuple(step.results),
                tuple(residuals),
                tuple(bilinear and rules.is_real_float(r.aval.dtype) for r in residuals),
                partial(_apply, step.equation, sources),
                _jax.source_line(step.equation),
                anchor=step.name not in rules.STRUCTURAL and step.name not in elementwise.LINEAR,
                default=not known,
                entries=tuple(rules.jacobian_entries(step.equation, i) for i in moving),
            )
        )

    def add_opaque(self, step: _Step) -> None:
        """A call that mixes primal and tangent work and that we cannot look into: it is run again on the way back."""
        tangents, residuals, sources = self.operands_of(step)
        moves = [self.is_tangent(r) for r in step.results]
        primal_out = tuple(r for r, m in zip(step.results, moves, strict=True) if not m)
        tangent_out = tuple(r for r, m in zip(step.results, moves, strict=True) if m)
        run = partial(_apply, step.equation, sources)

        def results(arrays: Sequence[Any], moving: Sequence[Any], wanted: bool) -> list[Any]:
            return [o for o, m in zip(run(arrays, moving), moves, strict=True) if m == wanted]

        def zeros() -> list[Any]:
            return [jax.numpy.zeros(t.aval.shape, t.aval.dtype) for t in tangents]

        def pull(arrays: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
            def moved(*moving: Any) -> list[Any]:
                outs = _apply(step.equation, sources, arrays, moving, _jax.run_again)
                return [o for o, m in zip(outs, moves, strict=True) if m]

            _, pullback = jax.vjp(moved, *zeros())
            return list(pullback(list(cotangents)))

        line = _jax.source_line(step.equation)
        self.equations.append(
            Equation(
                step.name,
                tuple(residuals),
                primal_out,
                lambda *arrays: results(arrays, zeros(), False),
                False,
                line,
                nanoseconds=rules.nanoseconds(step.equation),
                acts=_jax.acts(step.equation),
            )
        )
        self.edges.append(
            Edge(
                step.name,
                tuple(tangents),
                tangent_out,
                tuple(residuals),
                (False,) * len(residuals),
                lambda arrays, moving: results(arrays, moving, True),
                line,
                anchor=True,
                default=True,
                pull=pull,
            )
        )

    def add_split(self, step: _Step) -> None:
        flags = [self.is_tangent(o) for o in step.operands]
        divide = _split_scan if step.name == "scan" else _split_cond
        bodies, params, primal_at, tangent_at, moves = divide(step.equation, flags)
        operands = tuple(step.operands[i] for i in primal_at)
        tangents: list[Value | None] = []
        for i in tangent_at:  # an operand in a tangent's place that is no tangent is a zero
            operand = step.operands[i]
            moving = isinstance(operand, Value) and self.is_tangent(operand)
            tangents.append(self.materialize(operand) if moving else None)  # type: ignore[arg-type]
        primal_out = tuple(r for r, m in zip(step.results, moves, strict=True) if not m)
        tangent_out = tuple(r for r, m in zip(step.results, moves, strict=True) if m)
        self.n_splits += 1
        node = Split(step.name, bodies, params, operands, tuple(tangents), self.n_splits)
        line = _jax.source_line(step.equation)
        acts = _jax.acts(step.equation)
        self.equations.append(Equation(step.name, operands, primal_out, _no_run, False, line, split=node, acts=acts))
        self.edges.append(
            Edge(
                step.name,
                tuple(dict.fromkeys(t for t in tangents if t is not None)),
                tangent_out,
                (),
                (),
                _no_run,
                line,
                anchor=True,
                split=node,
            )
        )


def _no_run(*_: Any) -> list[Any]:
    raise NotImplementedError("control flow is run by the sweeps")


def _tangent_results(equation: Any, flags: list[bool]) -> list[bool]:
    """Which results of an equation with some tangent operands are tangents; calls are followed into their bodies."""
    name = equation.primitive.name
    if name == "scan":
        return _scan_tangents(equation, flags)[1]
    if name == "cond":
        return _cond_tangents(equation, flags)
    if name == "while":
        return _while_tangents(equation, flags)
    inner = _jax.inner_jaxprs(equation)
    if len(inner) == 1 and len(inner[0].jaxpr.invars) == len(flags):
        moves = _tangent_outputs(inner[0], flags)
        if len(moves) == len(equation.outvars):
            return moves
    return [True] * len(equation.outvars)


def _tangent_outputs(jaxpr: _jax.Jaxpr, flags: Sequence[bool]) -> list[bool]:
    """Which outputs of a mixed jaxpr depend on its tangent inputs."""
    moving = {v for v, t in zip(jaxpr.jaxpr.invars, flags, strict=True) if t}

    def moves(atom: Any) -> bool:
        return not isinstance(atom, _jax.Literal) and atom in moving

    for equation in jaxpr.jaxpr.eqns:
        operands = [moves(a) for a in equation.invars]
        if any(operands):
            results = _tangent_results(equation, operands)
            moving.update(o for o, t in zip(equation.outvars, results, strict=True) if t)
    return [moves(a) for a in jaxpr.jaxpr.outvars]


def _while_tangents(equation: Any, flags: list[bool]) -> list[bool]:
    n_cond, n_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    body = _jax.closed(equation.params["body_jaxpr"])
    consts, carry = flags[n_cond : n_cond + n_body], flags[n_cond + n_body :]
    for _ in carry:
        carry = [a or b for a, b in zip(carry, _tangent_outputs(body, consts + carry), strict=True)]
    return carry


def _cond_tangents(equation: Any, flags: list[bool]) -> list[bool]:
    branches = [_tangent_outputs(b, flags[1:]) for b in _jax.cond_branches(equation)]
    return [any(b) for b in zip(*branches, strict=True)]


def _scan_tangents(equation: Any, flags: Sequence[bool]) -> tuple[list[bool], list[bool]]:
    """Fixed point of which operands and results of a scan are tangents."""
    body, n_consts, n_carry = _jax.scan_parts(equation)
    ins = list(flags)
    while True:
        outs = _tangent_outputs(body, ins)
        carry = [a or b for a, b in zip(ins[n_consts : n_consts + n_carry], outs[:n_carry], strict=True)]
        if carry == ins[n_consts : n_consts + n_carry]:
            return ins, carry + outs[n_carry:]
        ins[n_consts : n_consts + n_carry] = carry


def split_body(body: _jax.Jaxpr, ins: Sequence[bool], outs: Sequence[bool], in_loop: bool = True) -> Graph:
    """The graph of a part of a program, given which of its inputs and outputs are tangents.

    :param in_loop: whether it runs several times before the backward sweep, so that its inputs are residuals, too.
    """
    graph, results, coefficients = split(body, ins)
    graph.outputs = [p for (p, _), t in zip(results, outs, strict=True) if not t]  # type: ignore[misc]
    graph.tangent_outputs = [v for (_, v), t in zip(results, outs, strict=True) if t]
    scalars.collect(graph.finish(), coefficients, free=() if in_loop else graph.inputs)
    return graph.finish()


def _split_scan(equation: Any, flags: Sequence[bool]) -> tuple:
    body, n_consts, n_carry = _jax.scan_parts(equation)
    ins, outs = _scan_tangents(equation, flags)
    consts, carry = ins[:n_consts], ins[n_consts : n_consts + n_carry]
    primal_at = [i for i, t in enumerate(ins) if not t]
    tangent_at = [i for i, t in enumerate(ins) if t]
    params = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    params["primal_counts"] = (consts.count(False), carry.count(False))
    params["tangent_counts"] = (consts.count(True), carry.count(True))
    return (split_body(body, ins, outs),), params, primal_at, tangent_at, outs


def _split_cond(equation: Any, flags: Sequence[bool]) -> tuple:
    ins, outs = list(flags[1:]), _cond_tangents(equation, list(flags))
    graphs = tuple(split_body(b, ins, outs) for b in _jax.cond_branches(equation))
    primal_at = [0] + [i + 1 for i, t in enumerate(ins) if not t]
    tangent_at = [i + 1 for i, t in enumerate(ins) if t]
    return graphs, {}, primal_at, tangent_at, outs


def _apply(
    equation: Any,
    fixed: Sequence[tuple],
    residuals: Sequence[Any],
    tangents: Sequence[Any],
    run: Callable[[Any, Sequence[Any]], list[Any]] = _jax.bind,
) -> list[Any]:
    """Evaluate a jaxpr equation with operands drawn from tangents, residuals and constants."""
    sources = {"tangent": tangents, "residual": residuals}
    args = [what if kind == "constant" else sources[kind][what] for kind, what in fixed]
    return run(equation, args)
