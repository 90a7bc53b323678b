"""What a compiled program does, read off its text: kernels, bytes and copies, the iterations of loops counted.

XLA's own cost analysis counts the body of a loop once, and an array of which an iteration takes a slice as a whole.
Here bodies count as often as loops run, and of an array what is taken from it or put into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

# Not computed: what only names values that are there.
_FREE = frozenset("parameter tuple get-tuple-element constant bitcast after-all partition-id replica-id".split())
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_ITEM_BYTES = {"token": 0, "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_ITEM_BYTES |= {"f64": 8, "s64": 8, "u64": 8}

LARGE_COPY_BYTES = 2**20


class Program(NamedTuple):
    """What one run of a compiled program does.

    :ivar kernels: instructions that are started.
    :ivar bytes_accessed: read and written by them: what stays inside of a fusion is not.
    :ivar large_copies: instructions that only copy, of 1 MiB and more.
    """

    kernels: int
    bytes_accessed: int
    large_copies: int

    def times(self, n: int) -> Program:
        return Program(n * self.kernels, n * self.bytes_accessed, n * self.large_copies)

    def and_then(self, other: Program) -> Program:
        return Program(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class _Instruction:
    is_root: bool
    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    rest: str  # what follows the operands

    def called(self, role: str) -> str:
        """The computation that it calls in this role."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.rest)
        if found is None:
            raise ValueError(f"{self.name}: no {role}= in {self.rest[:200]}")
        return found[1]

    @property
    def size(self) -> int:
        """Bytes of its result, of all arrays of a tuple."""
        arrays = _ARRAY.findall(self.shape)
        return sum(_ITEM_BYTES.get(kind, 4) * prod(int(n) for n in axes.split(",") if n) for kind, axes in arrays)


Computation = dict[str, _Instruction]


def read(text: str) -> Program:
    """Read the text of an optimized module."""
    computations, entry = _parsed(text)

    def trips(loop: _Instruction) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known is not None:
            return int(known[1])
        # else a counter from zero, compared with a constant
        limits = [re.match(r"\d+", i.rest) for i in reached(loop.called("condition")) if i.operation == "constant"]
        return max((int(limit[0]) for limit in limits if limit is not None), default=1)

    def reached(name: str) -> list[_Instruction]:
        own = list(computations[name].values())
        return own + [i for o in own if o.operation == "fusion" for i in reached(o.called("calls"))]

    @cache
    def of(name: str) -> Program:
        total = Program(0, 0, 0)
        for i in computations[name].values():
            if i.operation == "while":
                total = total.and_then(of(i.called("body")).times(trips(i)))
            elif i.operation == "call":
                total = total.and_then(of(i.called("to_apply")))
            elif i.operation not in _FREE and not i.operation.endswith("-done"):
                large = i.operation in ("copy", "copy-start") and i.size >= LARGE_COPY_BYTES
                total = total.and_then(Program(1, _accessed(i, computations[name], computations), int(large)))
        return total

    return of(entry)


def _parsed(text: str) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the name of the one that a program starts with."""
    computations: dict[str, Computation] = {}
    entry = current = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        head = None if line.startswith(" ") else _HEAD.match(line)
        if head is not None:
            current = head[2]
            computations[current] = {}
            entry = current if head[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            root, name, shape, operation, rest = found.groups()
            operands, _, after = rest.partition(")")
            # constants have their value where others have operands, parameters their number
            tail = operands if operation in ("constant", "parameter") else after
            names = tuple(re.findall(r"%([\w.\-]+)", operands))
            computations[current][name] = _Instruction(root is not None, name, shape, operation, names, tail)
    return computations, entry


def _accessed(i: _Instruction, around: Computation, computations: dict[str, Computation]) -> int:
    """Bytes that an instruction reads and writes."""
    sizes = [around[name].size if name in around else 0 for name in i.operands]
    if i.operation == "dynamic-slice":
        return 2 * i.size
    if i.operation == "dynamic-update-slice":
        return 2 * sizes[1]
    if i.operation == "copy-start":  # its result has the operand beside the copy
        return 2 * sizes[0]
    if i.operation not in ("fusion", "fusion-start"):
        return sum(sizes) + i.size
    inside = computations[i.called("calls")]
    parameters = sorted((p for p in inside.values() if p.operation == "parameter"), key=lambda p: int(p.rest))
    taken = sum(_taken(p, size, inside) for p, size in zip(parameters, sizes, strict=True))
    root = next(r for r in inside.values() if r.is_root)
    results = [inside[name] for name in root.operands] if root.operation == "tuple" else [root]
    return taken + sum(_written(r, inside) for r in results)


def _readers(value: _Instruction, inside: Computation) -> Iterable[tuple[_Instruction, int]]:
    """Who reads a value inside of a fusion, and as which operand; what renames it is passed through."""
    for i in inside.values():
        for place, name in enumerate(i.operands):
            if name == value.name:
                yield from _readers(i, inside) if i.operation == "bitcast" else [(i, place)]


def _taken(parameter: _Instruction, size: int, inside: Computation) -> int:
    """Bytes of an operand that a fusion reads."""
    total = 0
    for reader, place in _readers(parameter, inside):
        if place or reader.operation not in ("dynamic-slice", "dynamic-update-slice"):
            return size
        total += reader.size if reader.operation == "dynamic-slice" else 0
    return min(total, size)


def _written(result: _Instruction, inside: Computation) -> int:
    """Bytes that a fusion writes of a result: of an array that is updated in its place, those of the update."""
    while result.operation == "bitcast":
        result = inside[result.operands[0]]
    return inside[result.operands[1]].size if result.operation == "dynamic-update-slice" else result.size
