"""``calibrate``: what each code adds to the variance of the gradient, on the user's own data.

A code replaces a residual r by r + e, E[e] = 0, and the gradient is linear in r, so to first order in the errors

    tr Cov(g) = sum over residuals of E_z Var <s, e>,        s = d <z, g(r)> / d r,

with z of independent random signs, one for each parameter (Hutchinson 1990): the square of the derivative of a random
projection of the gradient is, on average, the sum of the squares of the derivatives of its components. One reverse
sweep over the backward sweep gives s for all residuals at once, and each codec knows Var <s, e> in closed form. Of
large residuals that is computed for a random part of the rows. How such errors multiply is up to ``noise``, which takes
two more numbers of each residual from here: its mean square, and the variance of its codes relative to that.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_rad.ad import _jax
from numpyro_rad.ad.codecs import Codec
from numpyro_rad.ad.graph import Graph, Path, Value
from numpyro_rad.ad.plan import BudgetError, Plan
from numpyro_rad.ad.rounding import StochasticRound
from numpyro_rad.ad.seeds import signs
from numpyro_rad.ad.sweep import Tape, backward, forward
from numpyro_rad.annotations import Key, PyTree
from numpyro_rad.planning import strategies
from numpyro_rad.planning.noise import EqualShares, VarianceModel, effects_of

MOST_ENTRIES = 65536
"""Of larger residuals, all iterations of the loops around them counted, a part of so many entries is looked at."""

MOST_ITERATIONS = 32
"""Of the iterations of a loop, at most so many are in that part, to leave each a few thousand entries."""

ROWS_TOGETHER = 8
"""Rows that stay neighbours in such a part: some codecs let short rows share a group."""

LEAST_ROW = 256
"""Trailing axes are kept whole up to this many entries, so that the groups of codes stay what they are."""


@dataclasses.dataclass(frozen=True)
class ResidualNoise:
    """What was measured of one residual.

    :ivar added: the variance that each codec adds to the gradient if all else is exact.
    :ivar relative: the variance of each code, relative to its squared norm.
    :ivar mean_square: of its entries.
    """

    added: tuple[float, ...]
    relative: tuple[float, ...]
    mean_square: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Measured variances; pass it to ``Planner(calibration=...)``.

    :ivar program: the program that it was made for.
    :ivar gradient_variance: tr Cov of the exact gradient over the draws of guide and minibatch.
    :ivar gradient_norm: its root mean square norm.
    :ivar codecs: the codecs that were measured.
    :ivar residuals: what was measured of each residual, by its path.
    :ivar reach: for each differentiated input the mean square of the derivative of the parameters in it.
    :ivar n_draws: gradients that were taken.
    """

    program: str
    gradient_variance: float
    gradient_norm: float
    codecs: tuple[Codec, ...]
    residuals: dict[Path, ResidualNoise]
    reach: tuple[float, ...]
    n_draws: int

    def variance_model(self, graph: Graph) -> VarianceModel:
        """Prices for the codes of ``graph``: added variance / variance of the exact gradient.

        For another program than that of the calibration it warns and falls back to the model without data.
        """
        if graph.fingerprint() != self.program:
            warnings.warn(
                "the calibration was made for another program (other shapes, model, guide or ELBO); plans are priced "
                "without it. Calibrate again.",
                stacklevel=2,
            )
            return EqualShares(graph)
        return _Measured(self)

    @property
    def reference_variance(self) -> float:
        """The variance of the exact gradient, or its squared norm where guide and minibatch draw nothing."""
        negligible = 1e-9 * self.gradient_norm**2
        return self.gradient_variance if self.gradient_variance > negligible else max(self.gradient_norm**2, 1e-30)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as what ``json.dumps`` takes; :meth:`from_dict` gives the same to the bit."""
        codecs = [{"name": type(c).__name__, **dataclasses.asdict(c)} for c in self.codecs]
        residuals = [
            [list(path), *map(list, (r.added, r.relative)), r.mean_square] for path, r in self.residuals.items()
        ]
        return {**vars(self), "codecs": codecs, "residuals": residuals, "reach": list(self.reach)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """The calibration that :meth:`to_dict` took apart.

        :raises ValueError: if ``data`` is not from there.
        """
        try:
            codecs = tuple(strategies.codec_from(dict(fields)) for fields in data["codecs"])
            residuals = {
                tuple(path): ResidualNoise(tuple(added), tuple(relative), mean_square)
                for path, added, relative, mean_square in data["residuals"]
            }
            return cls(**{**data, "codecs": codecs, "residuals": residuals, "reach": tuple(data["reach"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"this is not what Calibration.to_dict() gave: {error!r}. Calibrate again if it is lost."
            ) from error

    def predicted(self, plan: Plan) -> float:
        """Variance that the codes of a plan add, relative to that of the exact gradient."""
        return effects_of(plan, self.variance_model(plan.graph)).total


@dataclasses.dataclass(frozen=True)
class _Measured:
    """The prices of a calibration."""

    knows_energies: ClassVar[bool] = True
    calibration: Calibration

    def alone(self, path: Path, value: Value, codec: Codec) -> float:
        return self._of("added", path, value, codec) / self.calibration.reference_variance

    def relative(self, path: Path, value: Value, codec: Codec) -> float:
        return self._of("relative", path, value, codec)

    def mean_square(self, path: Path) -> float | None:
        known = self.calibration.residuals.get(path)
        return None if known is None else known.mean_square

    def reach(self, position: int) -> float:
        return self.calibration.reach[position]

    def _of(self, kind: str, path: Path, value: Value, codec: Codec) -> float:
        residual, codecs = self.calibration.residuals.get(path), self.calibration.codecs
        if residual is None:
            return 0.0  # nothing that was differentiated depends on it
        known = getattr(residual, kind)
        if codec in codecs:
            return known[codecs.index(codec)]
        shape, near = value.aval.shape, next((i for i, c in enumerate(codecs) if _differ_in_groups(c, codec)), 0)
        return known[near] * codec.relative_variance(shape) / max(codecs[near].relative_variance(shape), 1e-30)


def _differ_in_groups(one: Codec, other: Codec) -> bool:
    """Whether two codecs differ in nothing but how many entries share a scale."""
    if not (isinstance(one, StochasticRound) and isinstance(other, StochasticRound)):
        return False
    return dataclasses.replace(one, group=other.group) == other


def probe(
    graph: Graph, codecs: Sequence[Codec]
) -> tuple[Callable[..., tuple[list[jax.Array], jax.Array, jax.Array]], list[Path]]:
    """A function that measures one gradient and all its codes, and the paths of these.

    :return: ``(key, operands, signs) -> (gradient, squares, variances)``, the gradient of the first output of the graph
        in its tangent inputs; ``signs`` are aligned with these. ``squares[i]`` is the mean square of residual i,
        ``variances[0, i, j]`` what codec j adds by it, ``variances[1, i, j]`` the variance of the code for each entry.
        The key draws the rows of large residuals, and the signs along which codes are looked at.
    """
    plan = strategies.all_coded(graph)
    paths = [(*p.path, v.number) for p, v in _coded(plan)]

    def measure(
        key: Key, operands: Sequence[jax.Array], signs: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        seed = jnp.zeros(2, jnp.uint32)
        _, tape = forward(plan, seed, operands, quiet=True)  # it is not a step of the user's
        reads = {v: a for v, a in zip(graph.inputs, operands, strict=True) if v in plan.reads}
        cotangents = [None if t is None else jnp.ones(t.aval.shape, t.aval.dtype) for t in graph.tangent_outputs]

        def projection(arrays: list[tuple[jax.Array, ...]]) -> tuple[ArrayLike, list[jax.Array]]:
            pulled = backward(plan, seed, _with_arrays(plan, tape, iter(arrays)), reads, cotangents)
            gradient = [
                jnp.zeros(t.aval.shape, t.aval.dtype) if p is None else p
                for p, t in zip(pulled, graph.tangent_inputs, strict=True)
            ]
            return sum(jnp.vdot(z, g).real for z, g in zip(signs, gradient, strict=True)), gradient

        arrays = list(_arrays(plan, tape))
        directions, gradient = jax.grad(projection, has_aux=True)(arrays)
        values = [value for _, value in _coded(plan)]
        squares = jnp.stack([jnp.mean(jnp.square(x.astype(jnp.float32))) for x, *_ in arrays])
        return gradient, squares, _variances(key, codecs, values, arrays, directions)

    return measure, paths


def _part(words: jax.Array, value: Value, x: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array, float]:
    """A residual and a direction as (iterations of the loops around it, *its shape), or where that is large a random
    part of it: every so many iterations, and of each every so many blocks of rows, beginning anywhere and going round,
    so that all are as likely. Last, how often the part goes into the whole.

    :param words: two random ``uint32``; what draws more takes long to compile, hundreds of times.
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

    def every(word: jax.Array, length: int, n: int) -> jax.Array | np.ndarray:
        return (np.arange(n) * length // n + (word % np.uint32(length)).astype(np.int32)) % length

    taken, starts = every(words[0], len(x), iterations), every(words[1], rows, blocks)
    chosen = (starts[:, None] + np.arange(block)).ravel() % rows

    def part(a: jax.Array) -> jax.Array:
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
    key: Key,
    codecs: Sequence[Codec],
    values: Sequence[Value],
    arrays: Sequence[tuple[jax.Array, ...]],
    directions: Sequence[tuple[jax.Array, ...]],
) -> jax.Array:
    """(2, residuals, codecs): what all the codes of each residual add, and the variance of one for each entry, which is
    that along random signs. Residuals of the same shape go through one loop: there may be hundreds, and each codec
    takes a while to compile.
    """
    alike: dict[
        tuple[tuple[int, ...], np.dtype, tuple[int, ...]], list[tuple[int, jax.Array, jax.Array, float, int]]
    ] = {}
    words = jax.random.bits(key, (len(values), 2), jnp.uint32)
    for i, (value, draws, along) in enumerate(zip(values, arrays, directions, strict=True)):
        parts = [_part(words[i], value, x, s) for x, s in zip(draws, along, strict=True)]
        x = parts[0][0]
        found = alike.setdefault((value.aval.shape, value.aval.dtype, x.shape), [])
        found += [(i, x, s, times, 0) for x, s, times in parts]
        found.append((i, x, signs(words[i], x.shape, x.dtype), 1 / max(x.size, 1), 1))
    table = jnp.zeros((2, len(values), len(codecs)))
    for (shape, dtype, _), found in alike.items():
        able = [j for j, codec in enumerate(codecs) if codec.supports(shape, dtype)]
        owners, xs, along, times, kinds = zip(*found, strict=True)
        ends = np.cumsum([len(x) for x in xs])[:-1]

        def added(pair: tuple[jax.Array, jax.Array], able: list[int] = able) -> jax.Array:
            return jnp.stack([codecs[j].variance_along(*pair).astype(jnp.float32) for j in able])

        if able:
            one_by_one = jax.lax.map(added, (jnp.concatenate(xs), jnp.concatenate(along)))
            sums = jnp.stack([a.sum(0) for a in jnp.split(one_by_one, ends)])
            sums = sums * np.asarray(times, np.float32)[:, None]
            table = table.at[np.asarray(kinds)[:, None], np.asarray(owners)[:, None], np.asarray(able)].add(sums)
    return table


def _coded(plan: Plan) -> Iterator[tuple[Plan, Value]]:
    """Coded residuals of a plan and of the plans inside it."""
    for value in plan.encoded:
        yield plan, value
    for children in plan.children.values():
        for child in children:
            yield from _coded(child)


def _arrays(plan: Plan, tape: Tape) -> Iterator[tuple[jax.Array, ...]]:
    """The stored arrays of :func:`_coded`, one for each draw."""
    for codes in tape.encoded:
        yield tuple(code for (code,) in codes)
    for children, tapes in zip(plan.children.values(), tape.children, strict=True):
        for child, inner in zip(children, tapes, strict=True):
            yield from _arrays(child, inner)


def _with_arrays(plan: Plan, tape: Tape, arrays: Iterator[tuple[jax.Array, ...]]) -> Tape:
    """``tape`` with other arrays in place of those."""
    encoded = tuple(tuple((code,) for code in next(arrays)) for _ in tape.encoded)
    children = tuple(
        tuple(_with_arrays(child, inner, arrays) for child, inner in zip(bodies, tapes, strict=True))
        for bodies, tapes in zip(plan.children.values(), tape.children, strict=True)
    )
    return Tape(tape.kept, encoded, children)


class Calibrator:
    """Gathers draws of the gradient of a program and of what its codes add to it.

    :param most_bytes: temporary memory that a draw may take, None for any. It binds where the
        compiler says what that is.
    """

    def __init__(self, graph: Graph, codecs: Sequence[Codec], most_bytes: int | None = None) -> None:
        self._graph, self._codecs, self._most_bytes = graph, tuple(codecs), most_bytes
        measure, self._paths = probe(graph, codecs)
        self._measure: Callable = jax.jit(measure)
        self._gradients: list[list[np.ndarray]] = []
        self._tables: list[np.ndarray] = []
        self._squares: list[np.ndarray] = []
        self._reaches: list[list[float]] = []

    def add(
        self,
        key: Key,
        operands: Sequence[jax.Array],
        signs: Sequence[jax.Array],
        pull: Callable[[list[jax.Array]], PyTree],
    ) -> list[jax.Array]:
        """One draw.

        :param key: a PRNG key.
        :param operands: those of the program.
        :param signs: the tangent along which it is projected, for each differentiated operand.
        :param pull: from the gradient in these operands to the gradient whose variance counts.
        :return: the gradient in the differentiated operands.
        :raises BudgetError: if the draw would take too much memory.
        """
        if self._most_bytes is not None and not self._gradients:
            compiled = self._measure.lower(key, operands, signs).compile()
            sizes = _jax.compiled_bytes(compiled)
            if sizes is not None and sizes.temporary > self._most_bytes:
                raise BudgetError(
                    f"calibrate: a draw takes {sizes.temporary} bytes, and most_bytes={self._most_bytes}. Raise it, "
                    "use a smaller minibatch, or plan without measured variances.",
                    sizes.temporary,
                )
            self._measure = compiled
        gradient, squares, table = self._measure(key, operands, signs)
        self._gradients.append([np.asarray(x) for x in jax.tree.leaves(pull(gradient))])
        self._tables.append(np.asarray(table))
        self._squares.append(np.asarray(squares))
        self._reaches.append([float(jnp.mean(jnp.square(s))) if s.size else 0.0 for s in signs])
        return gradient

    def result(self) -> Calibration:
        """The calibration from all draws."""
        n_draws = len(self._gradients)
        squares = sum(float(np.vdot(x, x).real) for gradient in self._gradients for x in gradient) / n_draws
        means = [sum(parts) / n_draws for parts in zip(*self._gradients, strict=True)]
        apart = (np.abs(x - m) ** 2 for gradient in self._gradients for x, m in zip(gradient, means, strict=True))
        added, variances = np.stack(self._tables).astype(np.float64).mean(axis=0)
        mean_squares = np.stack(self._squares).astype(np.float64).mean(axis=0)
        relative = variances / np.maximum(mean_squares, 1e-300)[:, None]
        measured = zip(added.tolist(), relative.tolist(), mean_squares.tolist(), strict=True)
        noises = [ResidualNoise(tuple(a), tuple(r), m) for a, r, m in measured]
        return Calibration(
            self._graph.fingerprint(),
            sum(float(a.sum()) for a in apart) / (n_draws - 1),
            squares**0.5,
            self._codecs,
            dict(zip(self._paths, noises, strict=True)),
            tuple(np.array(self._reaches).mean(axis=0).tolist()),
            n_draws,
        )
