"""Which values of a program of primals and tangents are tangents: whatever depends on one.

Calls and control flow are followed into their bodies, loops to a fixed point.
"""

from __future__ import annotations

from collections.abc import Sequence

from numpyro_rad.ad import _jax


def tangent_results(equation: _jax.JaxprEquation, flags: list[bool]) -> list[bool]:
    """Which results of an equation with some tangent operands are tangents; calls are followed into their bodies."""
    name = equation.primitive.name
    if name == "scan":
        return scan_tangents(equation, flags)[1]
    if name == "cond":
        return cond_tangents(equation, flags)
    if name == "while":
        return _while_tangents(equation, flags)
    inner = [] if name == _jax.PULLED_BY else _jax.inner_jaxprs(equation)
    if len(inner) == 1 and len(inner[0].jaxpr.invars) == len(flags):
        moves = tangent_outputs(inner[0], flags)
        if len(moves) == len(equation.outvars):
            return moves
    return [True] * len(equation.outvars)


def tangent_outputs(jaxpr: _jax.Jaxpr, flags: Sequence[bool]) -> list[bool]:
    """Which outputs of a mixed jaxpr depend on its tangent inputs."""
    moving = {v for v, t in zip(jaxpr.jaxpr.invars, flags, strict=True) if t}

    def moves(atom: _jax.Variable) -> bool:
        return not isinstance(atom, _jax.Literal) and atom in moving

    for equation in jaxpr.jaxpr.eqns:
        operands = [moves(a) for a in equation.invars]
        if any(operands):
            results = tangent_results(equation, operands)
            moving.update(o for o, t in zip(equation.outvars, results, strict=True) if t)
    return [moves(a) for a in jaxpr.jaxpr.outvars]


def _while_tangents(equation: _jax.JaxprEquation, flags: list[bool]) -> list[bool]:
    n_cond, n_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    body = _jax.closed(equation.params["body_jaxpr"])
    consts, carry = flags[n_cond : n_cond + n_body], flags[n_cond + n_body :]
    for _ in carry:
        carry = [a or b for a, b in zip(carry, tangent_outputs(body, consts + carry), strict=True)]
    return carry


def cond_tangents(equation: _jax.JaxprEquation, flags: list[bool]) -> list[bool]:
    """Which results of a choice are tangents: those that are in any of its branches."""
    branches = [tangent_outputs(b, flags[1:]) for b in _jax.cond_branches(equation)]
    return [any(b) for b in zip(*branches, strict=True)]


def scan_tangents(equation: _jax.JaxprEquation, flags: Sequence[bool]) -> tuple[list[bool], list[bool]]:
    """Fixed point of which operands and results of a scan are tangents."""
    body, n_consts, n_carry = _jax.scan_parts(equation)
    ins = list(flags)
    while True:
        outs = tangent_outputs(body, ins)
        carry = [a or b for a, b in zip(ins[n_consts : n_consts + n_carry], outs[:n_carry], strict=True)]
        if carry == ins[n_consts : n_consts + n_carry]:
            return ins, carry + outs[n_carry:]
        ins[n_consts : n_consts + n_carry] = carry
