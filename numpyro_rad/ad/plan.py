"""What a program stores between its two sweeps: the plan, as the sweeps read it.

Each residual of the backward sweep is *alive* (an input of the program, there in both sweeps), *recomputed* from what
is there, *kept* exactly, or *encoded* by a random code that is right on average. ``decision`` makes plans, ``sweep``
carries them out, ``explain`` prints them.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_rad.ad import _jax, primitives
from numpyro_rad.ad.codecs import BitMask, Codec, Keep, Offload
from numpyro_rad.ad.graph import ControlFlow, Edge, Graph, Path, Scan, Value
from numpyro_rad.ad.loops import n_boundaries


class BudgetError(ValueError):
    """No plan stores as little as the budget asks for.

    :ivar int smallest_bytes: the smallest budget that is feasible.
    """

    def __init__(self, message: str, smallest_bytes: int):
        super().__init__(message)
        self.smallest_bytes = smallest_bytes

    def __reduce__(self):
        return type(self), (self.args[0], self.smallest_bytes)


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A stored random code: one draw for each group of readers, no two of which lie on one path."""

    codec: Codec
    readers: tuple[frozenset[Edge], ...]
    bytes_each: int

    @property
    def stored_bytes(self) -> int:
        return self.bytes_each * len(self.readers)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a plan is expected to cost, in its own model of time and variance.

    :ivar added_seconds: time for encoding, decoding, storing and recomputing, less what the exact step spends on
        storing its residuals, relative to the time of the exact step. Negative where the plan is faster.
    :ivar added_variance: variance added to the gradient, relative to that of the exact gradient.
    :ivar gap: how much less time and variance together another plan for the same bytes could take at best, relative to
        what this one takes for both (before the time of the exact step is deducted); None where the plan was not chosen
        by its cost.
    """

    added_seconds: float
    added_variance: float
    gap: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What one graph stores between its sweeps, and the plans of the bodies of its control flow.

    :ivar kept: values stored exactly and how (``BitMask`` for booleans, ``Offload`` for what waits on the host).
    :ivar encoded: values stored as random codes.
    :ivar carrier: for each residual that may be estimated, the value that stands for it in storage: itself, or a
        smaller one of which it is a linear rearrangement.
    :ivar segments: loops that store their carry at the beginning of each segment instead of a tape for every iteration,
        with the numbers of iterations in a segment, in the segments of that (if it is cut again), and so on; the
        backward sweep runs a segment again when it comes to it.
    :ivar segment_of: stored values that are not stored by the forward sweep but when the backward sweep comes to their
        segment of the program, which then runs again; with the numbers of these segments.
    :ivar n_chain_segments: the number of such segments of the program; 0 if it was not cut.
    :ivar reads: inputs of the graph that the backward sweep needs.
    :ivar repeat: how often the graph runs in one call (the product of the lengths of the scans around it).
    :ivar held: of how many of these runs the tape is held at once.
    :ivar apart: whether the tapes of the bodies of a branch lie side by side, to be looked at; they share arrays
        otherwise, for one of them is filled.
    :ivar untouched: whether the program is left to JAX's own reverse mode, which stores every residual. What it stores
        are not quite the residuals here, of which elementwise derivatives are fused.
    """

    graph: Graph
    repeat: int
    held: int
    path: Path
    kept: dict[Value, Codec]
    encoded: dict[Value, Encoded]
    carrier: dict[Value, Value]
    children: dict[ControlFlow, tuple[Plan, ...]]
    segments: dict[Scan, tuple[int, ...]]
    segment_of: dict[Value, int]
    n_chain_segments: int
    reads: frozenset[Value]
    predicted: Prediction | None = None
    untouched: bool = False
    apart: bool = False

    @property
    def runs_again(self) -> dict[int, list[Value]]:
        """The segments that the backward sweep runs again, and what is stored then; all but the last one."""
        found: dict[int, list[Value]] = {s: [] for s in range(self.n_chain_segments - 1)}
        for value, segment in self.segment_of.items():
            if segment in found:
                found[segment].append(value)
        return {segment: values for segment, values in found.items() if values}

    @functools.cached_property
    def computed_bytes(self) -> int:
        """Bytes of all that one run of the graph's own equations computes."""
        return sum(kept_bytes(o) for e in self.graph.equations for o in e.outputs)

    def kept_bytes(self, value: Value) -> int:
        """Bytes that a kept value takes on the device."""
        return self.kept[value].stored_bytes(value.aval.shape, value.aval.dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes held for the backward sweep at any time of one call, on the device; inputs and the path key are not
        counted.
        """
        sizes = [(v, self.kept_bytes(v)) for v in self.kept] + [(v, e.stored_bytes) for v, e in self.encoded.items()]
        early = sum(size for v, size in sizes if v not in self.segment_of)
        late = [sum(size for v, size in sizes if self.segment_of.get(v) == s) for s in set(self.segment_of.values())]
        own = early + max(late, default=0) + sum(self.boundary_bytes(node) for node in self.segments)
        return own * self.held + sum(map(self.tapes_bytes, self.children))

    def tapes_bytes(self, node: ControlFlow) -> int:
        """Bytes of the tapes of control flow."""
        plans = self.children[node]
        if isinstance(node, Scan) or self.apart:
            return sum(plan.stored_bytes for plan in plans)
        return self.held * sum(number * size for (_, _, size), number in _shared(plans).items())

    @functools.cached_property
    def _arrays(self) -> Counter[tuple[Any, ...]]:
        """The arrays that one run stores: how many of each shape, dtype and size."""
        found: Counter[tuple[Any, ...]] = Counter()
        for value, codec in self.kept.items():
            found.update(_types(codec, value.aval.shape, value.aval.dtype))
        for value, entry in self.encoded.items():
            found.update(_types(entry.codec, value.aval.shape, value.aval.dtype) * len(entry.readers))
        for node, plans in self.children.items():
            if isinstance(node, Scan):
                stacked = {((node.length, *a), b, node.length * c): n for (a, b, c), n in plans[0]._arrays.items()}
                found.update(stacked)
            else:
                found.update(_shared(plans))
        return found

    @property
    def peak_bytes(self) -> int:
        """Bytes held at any time of one call: :attr:`stored_bytes`, with what one slice holds while it runs."""
        return self.stored_bytes + (0 if self.graph.slices is None else self.graph.slices.bytes_each)

    def boundary_bytes(self, node: Scan) -> int:
        """Bytes of the carries at the beginnings of the segments of a loop."""
        return n_boundaries(node.length, self.segments[node]) * node.carry_bytes

    def walk(self) -> Iterator[Plan]:
        """This plan and all plans inside it."""
        yield self
        for plans in self.children.values():
            for plan in plans:
                yield from plan.walk()

    def to_dict(self) -> dict[str, Any]:
        """The plan's choices, for JSON; ``RAD_ELBO(plan=...)`` takes them for the same program at the same shapes."""
        kept = [((*plan.path, v.number), codec) for plan in self.walk() for v, codec in plan.kept.items()]
        encoded = [
            {"path": (*plan.path, v.number), "codec": {"name": type(e.codec).__name__, **dataclasses.asdict(e.codec)}}
            for plan in self.walk()
            for v, e in plan.encoded.items()
        ]
        segments = [
            {"path": (*p.path, node.number), "lengths": m} for p in self.walk() for node, m in p.segments.items()
        ]
        return {
            "program": self.graph.fingerprint(),
            "stored_bytes": self.stored_bytes,
            "predicted": dataclasses.asdict(self.predicted) if self.predicted is not None else None,
            "kept": [path for path, codec in kept if not isinstance(codec, Offload)],
            "offloaded": [path for path, codec in kept if isinstance(codec, Offload)],
            "encoded": encoded,
            "segments": segments,
            "chain": self.n_chain_segments,
            "untouched": self.untouched,
            "slices": 1 if self.graph.slices is None else self.graph.slices.number,
        }

    def estimated(self, residual: Value) -> bool:
        """Whether readers that may take an estimate of ``residual`` get one."""
        return self.carrier.get(residual) in self.encoded


def _shared(plans: Sequence[Plan]) -> Counter[tuple[Any, ...]]:
    """The arrays that the bodies of a branch share: of each kind as many as the one with most of them stores."""
    return functools.reduce(operator.or_, (plan._arrays for plan in plans), Counter())


@functools.lru_cache(4096)
def _types(codec: Codec, shape: tuple[int, ...], dtype: Any) -> tuple[tuple[Any, ...], ...]:
    """Shape, dtype and size of each array that a codec stores for one of this type."""
    seed = jax.ShapeDtypeStruct((2,), jnp.uint32)
    like = jax.ShapeDtypeStruct(shape, dtype)
    code = jax.eval_shape(lambda seed, x: codec.encode(seed, _jax.to_raw(x)), seed, like)
    return tuple((x.shape, str(x.dtype), x.size * x.dtype.itemsize) for x in code)


def carrier_of(graph: Graph, residual: Value) -> Value:
    """The smallest value of which ``residual`` is a linear rearrangement (the earliest among equals)."""
    best = value = residual
    while True:
        equation = graph.producer.get(value)
        if equation is None or not primitives.of(equation.name).passes_estimate:
            return best
        operands = [a for a in equation.inputs if isinstance(a, Value)]
        if len(operands) != 1 or len(equation.inputs) != 1 or not primitives.is_real_float(operands[0].aval.dtype):
            return best
        if jnp.promote_types(operands[0].aval.dtype, value.aval.dtype) != value.aval.dtype:
            return best  # rounding an estimate to a narrower dtype would bias it
        (value,) = operands
        if value.aval.dtype.itemsize >= best.aval.dtype.itemsize and value.aval.size <= best.aval.size:
            best = value


def kept_bytes(value: Value) -> int:
    """Bytes of ``value`` stored exactly."""
    return keep_codec(value).stored_bytes(value.aval.shape, value.aval.dtype)


def keep_codec(value: Value) -> Codec:
    """The exact codec for a value: one bit for a boolean."""
    return BitMask() if value.aval.dtype == bool else Keep()
