"""``calibrate``: what each code adds to the variance of the gradient, on the user's own data.

A code replaces a residual r by r + e, E[e] = 0, and the gradient is linear in r, so to first order in the errors

    tr Cov(g) = sum over residuals of E_z Var <s, e>,        s = d <z, g(r)> / d r,

with z of independent random signs, one for each parameter (Hutchinson 1990): the square of the derivative of a random
projection of the gradient is, on average, the sum of the squares of the derivatives of its components. One reverse
sweep over the backward sweep gives s for all residuals at once, and each codec knows Var <s, e> in closed form. Of
large residuals that is computed for a random part of the rows.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_rad.ad.codecs import Codec
from numpyro_rad.ad.graph import Graph, Value
from numpyro_rad.ad.plan import Path, Plan
from numpyro_rad.ad.sweep import Tape, backward, forward
from numpyro_rad.planning import decision, plans

MOST_ENTRIES = 65536
"""Of larger residuals, all iterations of the loops around them counted, a part of so many entries is looked at."""

MOST_ITERATIONS = 32
"""Of the iterations of a loop, at most so many are in that part, to leave each a few thousand entries."""

ROWS_TOGETHER = 8
"""Rows that stay neighbours in such a part: some codecs let short rows share a group."""

LEAST_ROW = 256
"""Trailing axes are kept whole up to this many entries, so that the groups of codes stay what they are."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Measured variances; pass it to ``Planner(calibration=...)``.

    :ivar program: the program that it was made for.
    :ivar gradient_variance: tr Cov of the exact gradient over the draws of guide and minibatch.
    :ivar gradient_norm: its root mean square norm.
    :ivar codecs: the codecs that were measured.
    :ivar added: for each residual the variance that each of these codecs adds.
    :ivar n_draws: gradients that were taken.
    """

    program: str
    gradient_variance: float
    gradient_norm: float
    codecs: tuple[Codec, ...]
    added: dict[Path, tuple[float, ...]]
    n_draws: int

    def variance_model(self, graph: Graph) -> decision.VarianceModel:
        """Prices for the codes of ``graph``: added variance / variance of the exact gradient.

        For another program than that of the calibration it warns and falls back to the model without data.
        """
        if graph.fingerprint() != self.program:
            warnings.warn(
                "the calibration was made for another program (other shapes, model, guide or ELBO); plans are priced "
                "without it. Calibrate again.",
                stacklevel=2,
            )
            return decision.equal_shares(graph)
        unit = self.reference_variance

        def variance(path: Path, value: Value, codec: Codec, n_draws: int) -> float:
            known = self.added.get(path)
            if known is None:
                return 0.0  # nothing that was differentiated depends on it
            if codec in self.codecs:
                return known[self.codecs.index(codec)] / unit
            shape, first = value.aval.shape, self.codecs[0]
            return known[0] / unit * codec.relative_variance(shape) / max(first.relative_variance(shape), 1e-30)

        return variance

    @property
    def reference_variance(self) -> float:
        """The variance of the exact gradient, or its squared norm where guide and minibatch draw nothing."""
        negligible = 1e-9 * self.gradient_norm**2
        return self.gradient_variance if self.gradient_variance > negligible else max(self.gradient_norm**2, 1e-30)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as what ``json.dumps`` takes; :meth:`from_dict` gives the same to the bit."""
        codecs = [{"name": type(c).__name__, **dataclasses.asdict(c)} for c in self.codecs]
        added = [[list(path), list(variances)] for path, variances in self.added.items()]
        return {**vars(self), "codecs": codecs, "added": added}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """The calibration that :meth:`to_dict` took apart.

        :raises ValueError: if ``data`` is not from there.
        """
        try:
            codecs = tuple(plans.codec_from(dict(fields)) for fields in data["codecs"])
            added = {tuple(path): tuple(variances) for path, variances in data["added"]}
            return cls(**{**data, "codecs": codecs, "added": added})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"this is not what Calibration.to_dict() gave: {error!r}. Calibrate again if it is lost."
            ) from error

    def predicted(self, plan: Plan) -> float:
        """Variance that the codes of a plan add, relative to that of the exact gradient."""
        model = self.variance_model(plan.graph)
        return sum(
            model((*p.path, v.number), v, e.codec, len(e.readers)) for p in plan.walk() for v, e in p.encoded.items()
        )


def probe(graph: Graph, codecs: Sequence[Codec]) -> tuple[Callable[..., Any], list[Path]]:
    """A function that measures one gradient and all its codes, and the paths of these.

    :return: ``(key, operands, signs) -> (gradient, variances)``, the gradient of the first output of the graph in its
        tangent inputs; ``signs`` are aligned with these. ``variances[i, j]`` is what codec j adds by residual i. The
        key draws the rows of large residuals.
    """
    plan = plans.all_coded(graph)
    paths = [(*p.path, v.number) for p, v in _coded(plan)]

    def measure(key: Any, operands: Sequence[Any], signs: Sequence[Any]) -> tuple[list[Any], Any]:
        seed = jnp.zeros(2, jnp.uint32)
        _, tape = forward(plan, seed, operands)
        reads = {v: a for v, a in zip(graph.inputs, operands, strict=True) if v in plan.reads}
        cotangents = [None if t is None else jnp.ones(t.aval.shape, t.aval.dtype) for t in graph.tangent_outputs]

        def projection(arrays: list[tuple[Any, ...]]) -> tuple[Any, list[Any]]:
            pulled = backward(plan, seed, _with_arrays(plan, tape, iter(arrays)), reads, cotangents)
            gradient = [
                jnp.zeros(t.aval.shape, t.aval.dtype) if p is None else p
                for p, t in zip(pulled, graph.tangent_inputs, strict=True)
            ]
            return sum(jnp.vdot(z, g).real for z, g in zip(signs, gradient, strict=True)), gradient

        arrays = list(_arrays(plan, tape))
        directions, gradient = jax.grad(projection, has_aux=True)(arrays)
        values = [value for _, value in _coded(plan)]
        return gradient, _variances(key, codecs, values, arrays, directions)

    return measure, paths


def _part(key: Any, value: Value, x: Any, direction: Any) -> tuple[Any, Any, float]:
    """A residual and a direction as (iterations of the loops around it, *its shape), or where that is large a random
    part of it: every so many iterations, and of each every so many blocks of rows, beginning anywhere and going round,
    so that all are as likely. Last, how often the part goes into the whole.
    """
    shape = value.aval.shape
    x, direction = x.reshape(-1, *shape), direction.reshape(-1, *shape)
    trailing = _trailing(shape)
    inner, size = math.prod(trailing), x.size
    if size <= MOST_ENTRIES or not inner:
        return x, direction, 1.0
    iterations = min(len(x), MOST_ITERATIONS)
    rows = x[0].size // inner
    block = min(ROWS_TOGETHER, rows)
    blocks = min(rows // block, -(-MOST_ENTRIES // (iterations * block * inner)))
    keys = jax.random.split(key)

    def every(key: Any, length: int, n: int) -> Any:
        return (np.arange(n) * length // n + jax.random.randint(key, (), 0, length)) % length

    taken, starts = every(keys[0], len(x), iterations), every(keys[1], rows, blocks)
    chosen = (starts[:, None] + np.arange(block)).ravel() % rows

    def part(a: Any) -> Any:
        return a[taken].reshape(iterations, -1)[:, : rows * inner].reshape(iterations, rows, *trailing)[:, chosen]

    return part(x), part(direction), size / (iterations * blocks * block * inner)


def _trailing(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The last axes of a shape that together make rows of some length, at least the last one; of a vector, a row of
    that length."""
    if len(shape) == 1:
        return (min(shape[0], LEAST_ROW),)
    axis = len(shape) - 1
    while axis > 1 and math.prod(shape[axis:]) < LEAST_ROW:
        axis -= 1
    return shape[axis:]


def _variances(
    key: Any,
    codecs: Sequence[Codec],
    values: Sequence[Value],
    arrays: Sequence[tuple[Any, ...]],
    directions: Sequence[tuple[Any, ...]],
) -> Any:
    """(residuals, codecs): what all the codes of each residual add. Residuals of the same shape go through one loop:
    there may be hundreds, and each codec takes a while to compile.
    """
    alike: dict[tuple[Any, ...], list[tuple[int, Any, Any, float]]] = {}
    for i, (value, draws, along) in enumerate(zip(values, arrays, directions, strict=True)):
        for x, s in zip(draws, along, strict=True):
            x, s, times = _part(jax.random.fold_in(key, i), value, x, s)
            alike.setdefault((value.aval.shape, value.aval.dtype, x.shape), []).append((i, x, s, times))
    table = jnp.zeros((len(values), len(codecs)))
    for (shape, dtype, _), found in alike.items():
        able = [j for j, codec in enumerate(codecs) if codec.supports(shape, dtype)]
        owners, xs, along, times = zip(*found, strict=True)
        ends = np.cumsum([len(x) for x in xs])[:-1]

        def added(pair: tuple[Any, Any], able: list[int] = able) -> Any:
            return jnp.stack([codecs[j].variance_along(*pair).astype(jnp.float32) for j in able])

        if able:
            one_by_one = jax.lax.map(added, (jnp.concatenate(xs), jnp.concatenate(along)))
            sums = jnp.stack([a.sum(0) for a in jnp.split(one_by_one, ends)])
            sums = sums * np.asarray(times, np.float32)[:, None]
            table = table.at[np.asarray(owners)[:, None], np.asarray(able)].add(sums)
    return table


def _coded(plan: Plan) -> Iterator[tuple[Plan, Value]]:
    """Coded residuals of a plan and of the plans inside it."""
    for value in plan.encoded:
        yield plan, value
    for children in plan.children.values():
        for child in children:
            yield from _coded(child)


def _arrays(plan: Plan, tape: Tape) -> Iterator[tuple[Any, ...]]:
    """The stored arrays of :func:`_coded`, one for each draw."""
    for codes in tape.encoded:
        yield tuple(code for (code,) in codes)
    for children, tapes in zip(plan.children.values(), tape.children, strict=True):
        for child, inner in zip(children, tapes, strict=True):
            yield from _arrays(child, inner)


def _with_arrays(plan: Plan, tape: Tape, arrays: Iterator[tuple[Any, ...]]) -> Tape:
    """``tape`` with other arrays in place of those."""
    encoded = tuple(tuple((code,) for code in next(arrays)) for _ in tape.encoded)
    children = tuple(
        tuple(_with_arrays(child, inner, arrays) for child, inner in zip(bodies, tapes, strict=True))
        for bodies, tapes in zip(plan.children.values(), tape.children, strict=True)
    )
    return Tape(tape.kept, encoded, children)


class Calibrator:
    """Gathers draws of the gradient of a program and of what its codes add to it."""

    def __init__(self, graph: Graph, codecs: Sequence[Codec]) -> None:
        self._graph, self._codecs = graph, tuple(codecs)
        measure, self._paths = probe(graph, codecs)
        self._measure = jax.jit(measure)
        self._gradients: list[list[np.ndarray]] = []
        self._tables: list[np.ndarray] = []

    def add(
        self, key: Any, operands: Sequence[Any], signs: Sequence[Any], pull: Callable[[list[Any]], Any]
    ) -> list[Any]:
        """One draw.

        :param key: a PRNG key.
        :param operands: those of the program.
        :param signs: the tangent along which it is projected, for each differentiated operand.
        :param pull: from the gradient in these operands to the gradient whose variance counts.
        :return: the gradient in the differentiated operands.
        """
        gradient, table = self._measure(key, operands, signs)
        self._gradients.append([np.asarray(x) for x in jax.tree.leaves(pull(gradient))])
        self._tables.append(np.asarray(table))
        return gradient

    def result(self) -> Calibration:
        """The calibration from all draws."""
        n_draws = len(self._gradients)
        squares = sum(float(np.vdot(x, x).real) for gradient in self._gradients for x in gradient) / n_draws
        means = [sum(parts) / n_draws for parts in zip(*self._gradients, strict=True)]
        apart = (np.abs(x - m) ** 2 for gradient in self._gradients for x, m in zip(gradient, means, strict=True))
        return Calibration(
            self._graph.fingerprint(),
            sum(float(a.sum()) for a in apart) / (n_draws - 1),
            squares**0.5,
            self._codecs,
            dict(zip(self._paths, map(tuple, np.mean(self._tables, axis=0).tolist()), strict=True)),
            n_draws,
        )
