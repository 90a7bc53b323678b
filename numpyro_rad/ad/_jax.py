"""The only module that knows JAX internals and versions.

Everything else works on what this module hands out: closed jaxprs, single equations that can be evaluated, and the
answers to a few questions about them (which jaxprs an equation calls, how a ``scan`` splits its operands, which line of
the user's program an equation comes from). A new JAX release should need changes here and nowhere else.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import importlib.util
import math
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import source_info_util  # no public way to read an equation's source line
from jax._src.core import (
    InternalMutableArrayEffect,
    JaxprEqnContext,
    NamedAxisEffect,
)  # no public way to tell effects apart
from jax._src.effects import JaxprInputEffect
from jax._src.interpreters.partial_eval import convert_constvars_jaxpr
from jax._src.lax.lax import _convert_element_type  # no public way to make an array of weak type
from jax._src.state.types import AbstractRef
from jax.core import ShapedArray as Aval
from jax.extend import core as jex_core
from jax.interpreters import ad, partial_eval
from jax.sharding import AxisType
from jax.typing import ArrayLike, DTypeLike

from numpyro_rad.annotations import Key, PyTree

Literal = jex_core.Literal
Primitive = jex_core.Primitive


class Variable(Protocol):
    """A variable of a program, or a literal."""

    @property
    def aval(self) -> Aval: ...


class JaxprEquation(Protocol):
    """An equation of a program."""

    @property
    def primitive(self) -> Primitive: ...
    @property
    def params(self) -> dict[str, Any]: ...
    @property
    def invars(self) -> Sequence[Variable]: ...
    @property
    def outvars(self) -> Sequence[Variable]: ...
    @property
    def effects(self) -> Collection[object]: ...
    @property
    def source_info(self) -> source_info_util.SourceInfo: ...
    @property
    def ctx(self) -> JaxprEqnContext: ...
    def replace(self, *, params: dict[str, Any]) -> JaxprEquation: ...


class OpenJaxpr(Protocol):
    """What a program is besides its constants."""

    @property
    def constvars(self) -> Sequence[Variable]: ...
    @property
    def invars(self) -> Sequence[Variable]: ...
    @property
    def outvars(self) -> Sequence[Variable]: ...
    @property
    def eqns(self) -> Sequence[JaxprEquation]: ...
    @property
    def effects(self) -> Collection[object]: ...


class Jaxpr(Protocol):
    """A program with its constants: ``ClosedJaxpr`` up to JAX 0.11, ``Jaxpr`` from 0.12 on."""

    @property
    def jaxpr(self) -> OpenJaxpr: ...
    @property
    def consts(self) -> Sequence[ArrayLike]: ...


A = TypeVar("A", bound=ArrayLike)

_VERSION = tuple(int(n) for n in jax.__version__.split(".")[:2])
_ADDRESS = re.compile(r"0x[0-9a-f]+")  # of an object in memory


def _folder(package: str) -> str:
    """The folder of an installed package, which need not be imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return os.path.dirname(os.path.abspath(spec.origin)) + os.sep


# Whose frames are nobody's model, and whose are only if there is no other
_MACHINERY = (_folder(__name__.split(".")[0]), *map(_folder, ("jax", "numpyro")))
_DISTRIBUTIONS = os.path.join(_MACHINERY[-1], "distributions") + os.sep
_AROUND = ("Distribution", "Independent", "ExpandedDistribution", "MaskedDistribution", "TransformedDistribution")
_METHOD = re.compile(r"([A-Z]\w*)\.(log_prob|sample|rsample|cdf|icdf|entropy)")
_INSTALLED = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def has_host_memory(platform: str) -> bool:
    """Whether arrays can wait in a memory of the host that is not the memory of the device itself."""
    if platform == "cpu" or platform != jax.default_backend():
        return platform != "cpu"  # of a device that is not here, all that is known is what others of its kind have
    return "pinned_host" in {memory.kind for memory in jax.local_devices()[0].addressable_memories()}


def trace(f: Callable[..., PyTree], *args: PyTree) -> tuple[Jaxpr, list[jax.Array], PyTree]:
    """The program of ``f`` at ``args``, what it closes over, and the pytree of its output shapes.

    What ``f`` closes over, tracers of outer transformations included, are the first inputs of the program; the program
    itself holds no array.
    """
    jaxpr, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    return closed(convert_constvars_jaxpr(jaxpr.jaxpr)), list(jaxpr.consts), shapes


def devices_of(types: Iterable[Any]) -> int:
    """Over how many devices values may be spread, as their types tell. Inside of ``jax.shard_map`` or ``jax.pmap`` each
    device runs a program of its own; what is put on devices by ``jit(in_shardings=...)`` alone is not known while a
    program is traced.
    """
    meshes = (aval.sharding.mesh for aval in types if hasattr(aval, "sharding"))
    return max((_shared_by_compiler(mesh) for mesh in meshes if not mesh.empty), default=1)


def _shared_by_compiler(mesh: Any) -> int:
    """Devices of a mesh along the axes that are not manual."""
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in kinds if kind != AxisType.Manual)


def digest(f: Callable[..., PyTree], *args: PyTree) -> str:
    """A hash of the program of ``f``, constants included: the same in every process.

    Compiled text and printed jaxprs are not, since their parts are named and shared by what is cached. Nor is the order
    of equations and of sums, since NumPyro adds up sites in the order of a set of names, which each process has its own
    of: the hash does not depend on it.
    """
    jaxpr, constants, _ = trace(f, *args)
    return _digest(jaxpr, [_hash(*_array_words(c)) for c in constants])


def _digest(jaxpr: Jaxpr, known: Sequence[str] = ()) -> str:
    """Hash of what the outputs of a program are computed from, whatever the order of its equations and sums.

    :param known: hashes of its first inputs.
    """
    inner = jaxpr.jaxpr
    constants = [_hash(*_array_words(c)) for c in jaxpr.consts]
    names: dict[Variable, str] = dict(zip(inner.constvars, constants, strict=False))
    for number, v in enumerate(inner.invars):
        names[v] = known[number] if number < len(known) else f"{number}:{v.aval}"

    def name(x: Variable | Literal) -> str:
        return f"={x.val}:{x.aval}" if isinstance(x, Literal) else names[x]

    summands: dict[Variable, list[str]] = {}
    for equation in inner.eqns:
        if equation.primitive.name in ("add", "add_any"):
            (out,) = equation.outvars
            terms = [summands.get(x, [name(x)]) if not isinstance(x, Literal) else [name(x)] for x in equation.invars]
            summands[out] = sorted(term for part in terms for term in part)
            names[out] = f"{_hash('sum', *summands[out])}:{out.aval}"
            continue
        called = inner_jaxprs(equation)
        # what calls another program has parameters that name it, in words that hold addresses; its numbers count (a
        # scan may be reversed)
        kinds = (int, enum.Enum) if called else (int, float, str, tuple, np.dtype, enum.Enum)
        simple = {k: v for k, v in equation.params.items() if isinstance(v, kinds)}
        words = [_digest(body) for body in called] + [_ADDRESS.sub("", str(sorted(simple.items())))]
        made = _hash(equation.primitive.name, *words, *map(name, equation.invars))
        for number, v in enumerate(equation.outvars):
            names[v] = f"{made}.{number}:{v.aval}"
    return _hash(*map(name, inner.outvars))


def _hash(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _array_words(x: ArrayLike) -> tuple[str, ...]:
    array = np.asarray(to_raw(x))
    return str(array.dtype), str(array.shape), hashlib.sha256(array.tobytes()).hexdigest()


def jvp_jaxpr(jaxpr: Jaxpr, active: Sequence[bool]) -> tuple[Jaxpr, list[bool]]:
    """Primal and tangent program of ``jaxpr`` in one: ``(primals, active tangents) -> (primals, tangents)``.

    Outputs whose dtype has no tangent have none here; the second result says which outputs have one.
    """
    avals = [v.aval for v in jaxpr.jaxpr.invars]
    _check_references(jaxpr)
    run = _runner(jaxpr)
    tangent_avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a, on in zip(avals, active, strict=True) if on]
    has_tangent: list[bool] = []

    def program(primals: Sequence[jax.Array], tangents: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        moving = [p for p, on in zip(primals, active, strict=True) if on]

        def of_active(*moving: jax.Array) -> list[jax.Array]:
            fresh = iter(moving)
            return run([next(fresh) if on else p for p, on in zip(primals, active, strict=True)])

        outs, out_tangents = jax.jvp(of_active, tuple(moving), tuple(tangents))
        has_tangent[:] = [t.dtype != jax.dtypes.float0 for t in out_tangents]
        return outs, [t for t, on in zip(out_tangents, has_tangent, strict=True) if on]

    return closed(jax.make_jaxpr(program)(_structs(avals), tangent_avals)), has_tangent


def _runner(jaxpr: Jaxpr) -> Callable[[Sequence[ArrayLike]], list[jax.Array]]:
    """A program as a function that JAX can differentiate."""
    return jax.jit(partial(evaluate, jaxpr)) if has_references(jaxpr) else partial(evaluate, jaxpr)


def vjp(
    jaxpr: Jaxpr, active: Sequence[bool], args: Sequence[jax.Array]
) -> tuple[list[jax.Array], Callable[[list], tuple]]:
    """Results of a program and its pullback to the active arguments, as JAX's own reverse mode makes it; a pytree."""
    run = _runner(jaxpr)

    def of_active(*moving: jax.Array) -> list[jax.Array]:
        fresh = iter(moving)
        return as_arrays(run([next(fresh) if on else x for x, on in zip(args, active, strict=True)]))

    return jax.vjp(of_active, *(x for x, on in zip(args, active, strict=True) if on))


def pull_back(
    pullback: Callable[[list], tuple], cotangents: Sequence[jax.Array | None], avals: Sequence[Aval]
) -> list[jax.Array]:
    """Cotangents of the active arguments of :func:`vjp`.

    :param cotangents: of the results; None for zero.
    :param avals: types of the results.
    """
    zeros = [ad.Zero(aval.to_tangent_aval()) for aval in avals]  # arrays of zeros would be pulled back
    return list(pullback([z if c is None else c for c, z in zip(cotangents, zeros, strict=True)]))


_QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of XLA's compilers for CPUs and GPUs: buffers are as always, and machine code is not polished."""


def temporary_bytes(f: Callable[..., PyTree], avals: Sequence[Aval | jax.ShapeDtypeStruct]) -> int | None:
    """Temporary memory of ``f`` compiled for operands of these types; None where the compiler does not say."""
    options = _QUICKLY if jax.default_backend() in ("cpu", "gpu") else None
    sizes = compiled_bytes(jax.jit(f).lower(*_structs(avals)).compile(compiler_options=options))
    return None if sizes is None else sizes.temporary


class CompiledBytes(NamedTuple):
    """Memory of a compiled function, in bytes.

    :ivar temporary: what it takes while it runs, besides these:
    :ivar arguments: of its operands.
    :ivar results: of what it returns.
    :ivar shared: of arguments that are given up to results.
    """

    temporary: int
    arguments: int
    results: int
    shared: int


def compiled_bytes(compiled: jax.stages.Compiled) -> CompiledBytes | None:
    """Memory of what ``jax.jit(f).lower(...).compile()`` returned; None where the compiler does not say."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return None
    own = sizes.argument_size_in_bytes, sizes.output_size_in_bytes, sizes.alias_size_in_bytes
    return CompiledBytes(int(sizes.temp_size_in_bytes), *map(int, own))


def names_axes(jaxpr: Jaxpr) -> bool:
    """Whether a program works along a mapped axis by its name: it cannot be compiled outside of that."""
    return any(isinstance(effect, NamedAxisEffect) for effect in jaxpr.jaxpr.effects)


def as_arrays(results: Sequence[ArrayLike]) -> list[jax.Array]:
    """Results of a program, of which a constant one is a literal until here."""
    return [r if isinstance(r, jax.Array) else jnp.asarray(r) for r in results]


def bind(equation: JaxprEquation, args: Sequence[ArrayLike]) -> list[jax.Array]:
    """Evaluate one equation on ``args`` under its own context and source line; always a list."""
    primitive = equation.primitive
    with context(equation):
        out = primitive.bind(*args, **primitive.get_bind_params(equation.params))
    return list(out) if primitive.multiple_results else [out]


def evaluate(
    jaxpr: Jaxpr,
    args: Sequence[ArrayLike],
    bind: Callable[[JaxprEquation, Sequence[ArrayLike]], list[jax.Array]] = bind,
) -> list[jax.Array]:
    """Run a program, each equation by ``bind``: under its own context and source line, unless that says otherwise."""
    open_jaxpr = jaxpr.jaxpr
    env: dict[Variable, Any] = dict(zip(open_jaxpr.invars, args, strict=True))
    env.update(zip(open_jaxpr.constvars, jaxpr.consts, strict=True))

    def read(atom: Variable) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for equation in open_jaxpr.eqns:
        outs = bind(equation, [read(a) for a in equation.invars])
        env.update(zip(equation.outvars, outs, strict=True))
    return [read(a) for a in open_jaxpr.outvars]


@contextlib.contextmanager
def context(equation: JaxprEquation) -> Iterator[None]:
    """Whatever is traced inside has the context and the source line of an equation."""
    info = equation.source_info
    names = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=names), equation.ctx.manager:
        yield


def literal(atom: Literal) -> np.ndarray:
    """The value of a literal, with its type."""
    return np.asarray(atom.val, atom.aval.dtype)  # pyright: ignore[reportAttributeAccessIssue]


def retrace(run: Callable[[Sequence[jax.Array]], Sequence[jax.Array]], jaxpr: Jaxpr) -> Jaxpr:
    """The program of ``run`` at inputs like those of ``jaxpr``."""
    return program(run, [v.aval for v in jaxpr.jaxpr.invars])


def program(
    run: Callable[[Sequence[jax.Array]], Sequence[jax.Array]], avals: Sequence[Aval | jax.ShapeDtypeStruct]
) -> Jaxpr:
    """The program of ``run`` at inputs of these types."""
    return closed(jax.make_jaxpr(lambda *args: run(args))(*_structs(avals)))


def needed_for(jaxpr: Jaxpr, outputs: Sequence[bool]) -> tuple[Jaxpr, list[bool]]:
    """What some outputs of a program need of it, and which of its inputs that takes."""
    pruned, takes = partial_eval.dce_jaxpr(jaxpr.jaxpr, list(outputs))  # pyright: ignore
    return jex_core.ClosedJaxpr(pruned, jaxpr.consts), takes  # pyright: ignore


def _structs(avals: Sequence[Aval | jax.ShapeDtypeStruct]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=getattr(a, "weak_type", False)) for a in avals]


def run_again(equation: JaxprEquation, args: Sequence[ArrayLike]) -> list[jax.Array]:
    """Evaluate an equation a second time, to differentiate it.

    Of ``jax.checkpoint`` that is its body: the call itself would run a third time, and so often would it print.
    """
    if equation.primitive.name in _CHECKPOINT:
        return evaluate(closed(equation.params["jaxpr"]), args)
    return bind(equation, args)


_CHECKPOINT = ("checkpoint", "remat2")  # by the version of JAX
_INLINED = {"jit": "jaxpr", "closed_call": "call_jaxpr", "eval_jaxpr": "call_jaxpr"}


def inlined_jaxpr(equation: JaxprEquation) -> Jaxpr | None:
    """The jaxpr of a call that is replaced by its body, else None: of ``jit`` and kin, and of a ``jax.checkpoint`` that
    holds a ``jax.custom_vjp``.
    """
    name = _INLINED.get(equation.primitive.name)
    if equation.primitive.name in _CHECKPOINT and _has_own_transpose(closed(equation.params["jaxpr"])):
        name = "jaxpr"
    body = None if name is None else closed(equation.params[name])
    return None if body is None or has_references(body) else body


def _has_own_transpose(jaxpr: Jaxpr) -> bool:
    """Whether there is the tangent of a ``jax.custom_vjp`` in a program: it can be transposed and nothing else, so that
    a program of it and of other work cannot be run again as a whole.
    """
    equations = jaxpr.jaxpr.eqns
    return any(e.primitive.name == "custom_lin" or any(map(_has_own_transpose, inner_jaxprs(e))) for e in equations)


_FOLLOWED = {"custom_jvp_call": "call_jaxpr", **dict.fromkeys(_CHECKPOINT, "jaxpr")}


def followed_jaxpr(equation: JaxprEquation) -> Jaxpr | None:
    """What a call computes that says how it is differentiated (``jax.custom_jvp``, ``jax.checkpoint``), else None."""
    name = _FOLLOWED.get(equation.primitive.name)
    return None if name is None else closed(equation.params[name])


def acts(equation: JaxprEquation) -> bool:
    """Whether an equation does something besides computing its results: it prints, calls back, complains.

    Names of mapped axes and mutable arrays are effects to JAX too, but nobody notices whether they happen.
    """
    silent = (NamedAxisEffect, JaxprInputEffect, InternalMutableArrayEffect)
    return any(not isinstance(effect, silent) for effect in equation.effects)


def has_references(jaxpr: Jaxpr) -> bool:
    """Whether a program works on mutable arrays (``jax.new_ref``): such a program is run as a whole or not at all."""
    return any(isinstance(v.aval, AbstractRef) for e in jaxpr.jaxpr.eqns for v in (*e.invars, *e.outvars))


def _check_references(jaxpr: Jaxpr) -> None:
    """Refuse mutable arrays where JAX cannot differentiate a program of tangents that works on them."""
    if _VERSION >= (0, 11):
        return
    if has_references(jaxpr):
        raise NotImplementedError(
            f"the program has a mutable array (jax.new_ref), which JAX {jax.__version__} cannot differentiate here. "
            "Write x.at[...].set(...) instead, or use JAX 0.11 or later."
        )
    for equation in jaxpr.jaxpr.eqns:
        for inner in inner_jaxprs(equation):
            _check_references(inner)


def closed(jaxpr: Any) -> Jaxpr:
    """A jaxpr that carries its constants, whatever an equation's parameter holds."""
    return jaxpr if hasattr(jaxpr, "consts") else jex_core.ClosedJaxpr(jaxpr, ())  # pyright: ignore


def inner_jaxprs(equation: JaxprEquation) -> list[Jaxpr]:
    """Every jaxpr among the parameters of an equation."""
    params = [p for value in equation.params.values() for p in (value if isinstance(value, (tuple, list)) else [value])]
    return [closed(p) for p in params if hasattr(p, "eqns")]


def with_inner_jaxprs(equation: JaxprEquation, change: Callable[[Jaxpr], Jaxpr]) -> JaxprEquation:
    """An equation with other programs of the same types among its parameters: of control flow and calls, whatever
    differentiates a call in its own way being left as it is.
    """

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(changed, value)) if any(hasattr(v, "consts") for v in value) else value
        return change(value) if hasattr(value, "consts") and hasattr(value, "eqns") else value

    return with_params(equation, **{name: changed(value) for name, value in equation.params.items()})


def with_params(equation: JaxprEquation, **params: Any) -> JaxprEquation:
    """An equation with some other parameters."""
    return equation.replace(params={**equation.params, **params})


def scan_parts(equation: JaxprEquation) -> tuple[Jaxpr, int, int]:
    """Body, number of constants, number of carries of a ``scan`` equation."""
    params = equation.params
    if "ft_in" in params:  # JAX 0.12
        consts, carry, _ = params["ft_in"].unpack()
        return closed(params["jaxpr"]), len(consts), len(carry)
    return closed(params["jaxpr"]), params["num_consts"], params["num_carry"]


def cond_branches(equation: JaxprEquation) -> list[Jaxpr]:
    return [closed(b) for b in equation.params["branches"]]


def linear_transpose(
    f: Callable[..., list[jax.Array]], avals: Sequence[Aval], cotangents: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """Cotangents of the inputs of a linear ``f`` (flat inputs, list output)."""
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    return jax.linear_transpose(f, *structs)(list(cotangents))


PULLED_BY = "slices"  # what plans call it, since nothing else is pulled back so
_PULLED_BY = Primitive(PULLED_BY)
_PULLED_BY.multiple_results = True
_PULLED_BY.def_abstract_eval(lambda *operands, pull, results: list(results))


def pulled_by(
    pull: Jaxpr, arrays: Sequence[jax.Array], tangents: Sequence[jax.Array], results: Sequence[Aval]
) -> list[jax.Array]:
    """A linear function of tangents, of which there is the transpose alone: it can be transposed, and not be run.

    :param pull: from ``arrays`` and cotangents of the results to cotangents of the tangents.
    :param results: types of the results.
    """
    return _PULLED_BY.bind(*arrays, *tangents, pull=pull, results=tuple(results))


def _pull(cotangents: Sequence[Any], *operands: Any, pull: Jaxpr, results: Sequence[Aval]) -> list[jax.Array | None]:
    """The transpose of :func:`pulled_by`: cotangents of the tangents among its operands."""
    n_arrays = len(pull.jaxpr.invars) - len(results)
    pulled = evaluate(pull, [*operands[:n_arrays], *map(ad.instantiate_zeros, cotangents)])
    given = [ad.is_undefined_primal(x) for x in operands[n_arrays:]]
    return [*[None] * n_arrays, *(g if on else None for g, on in zip(pulled, given, strict=True))]


ad.primitive_transposes[_PULLED_BY] = _pull


def is_traced(tree: PyTree) -> bool:
    """Whether some array of ``tree`` is being traced by a transformation."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))  # pyright: ignore[reportAttributeAccessIssue]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, of the host or of a device."""
    exhausted = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return exhausted or isinstance(error, MemoryError)


def is_forward_mode(x: object) -> bool:
    """Whether ``x`` is being differentiated in forward mode at this very level."""
    return isinstance(x, ad.JVPTracer)


# Up to this release XLA's CPU backend drops optimization barriers before it schedules, so that order needs a
# dependency. Among several devices it would cost collectives, so there the order is left to the compiler.
_BARRIERS_ARE_DROPPED = _VERSION < (0, 11)


def barrier(first: Sequence[jax.Array], then: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Both lists unchanged, but what is computed from either waits until all of ``first`` is there."""
    avals = [jax.typeof(v) for v in then]
    raw = [to_raw(v) for v in then]
    if _BARRIERS_ARE_DROPPED and jax.default_backend() == "cpu" and jax.device_count() == 1:
        raw = _tied(first, raw)
    done, raw = lax.optimization_barrier((list(first), raw)) if first or raw else ([], [])
    return done, [from_raw(r, a) for r, a in zip(raw, avals, strict=True)]


def _tied(first: Sequence[jax.Array], then: Sequence[jax.Array]) -> list[jax.Array]:
    """``then``, each array combined bit by bit with a zero that the compiler can only find out from ``first``."""
    words = [_bits(x.reshape(-1)[0]).astype(jnp.uint32) for x in first if x.size and _has_bits(x)]
    if not words:
        return list(then)
    word = reduce(jnp.add, words)
    zero = (word * (word + 1)) & 1  # one of two consecutive numbers is even
    return [_combined(x, zero) if _has_bits(x) else x for x in then]


@jax.custom_jvp
def _combined(x: jax.Array, zero: jax.Array) -> jax.Array:
    return _from_bits(_bits(x) ^ zero.astype(_bits(x).dtype), x.dtype)


@_combined.defjvp
def _combined_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _combined(*primals), tangents[0]  # bits have no derivative of their own: the identity has


def _has_bits(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == bool or jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(jnp.uint8) if x.dtype == bool else x
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _from_bits(bits: jax.Array, dtype: DTypeLike) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.bool_):
        return bits != 0
    return bits if bits.dtype == dtype else lax.bitcast_convert_type(bits, dtype)


def as_weak_as(x: jax.Array, aval: Aval) -> ArrayLike:
    """``x`` of a weak type if ``aval`` is one: the gradient in a number of Python yields to other dtypes as it does."""
    return _convert_element_type(x, weak_type=True) if getattr(aval, "weak_type", False) else x


def is_typed_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def key_like(key: Key, like: Key) -> Key:
    """``key`` as a typed key or as raw words, as ``like`` is one: programs that take keys differ by that."""
    if is_typed_key(key) == is_typed_key(like):
        return key
    return (
        jax.random.key_data(key) if is_typed_key(key) else jax.random.wrap_key_data(key, impl=jax.random.key_impl(like))
    )


def array_type(shape: tuple[int, ...], dtype: DTypeLike) -> Aval:
    """The type that JAX gives an array in a jaxpr."""
    return Aval(shape, dtype)


def aval_bytes(aval: Aval) -> int:
    """Bytes of an array of this type; typed keys count their raw words."""
    return aval.size * _entry_bytes(aval.dtype)


@functools.cache
def _entry_bytes(dtype: np.dtype) -> int:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raw = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype))
        return raw.size * raw.dtype.itemsize
    return dtype.itemsize


def source_line(equation: JaxprEquation) -> str:
    """``file.py:line`` of the innermost frame of the user (``In[4]:line`` in a notebook), empty if unknown.

    Frames of JAX, NumPyro and this package do not count. Those of other installed packages (a neural network's layers)
    count where there is no file of the user's own.
    """
    found = ""
    for frame in source_info_util.user_frames(equation.source_info.traceback):
        name = _whole_name(frame.file_name)
        if name.startswith(_MACHINERY):
            continue
        line = f"{_cell(frame.file_name) or os.path.basename(name)}:{frame.start_line}"
        if not name.startswith(_INSTALLED):
            return line
        found = found or line
    return found


def _cell(file_name: str) -> str:
    """What a notebook calls the cell that a file of its kernel holds, as in ``In[4]``; empty for other files."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    found = shell.compile.format_code_name(file_name) if shell is not None else None
    return "" if found is None else found[1]


@functools.lru_cache(4096)
def _whole_name(file_name: str) -> str:
    return os.path.abspath(file_name) if os.path.exists(file_name) else file_name


def distribution(equation: JaxprEquation) -> str:
    """The method of one of NumPyro's distributions that an equation belongs to, as in ``Normal.log_prob``, or empty."""
    for frame in source_info_util.user_frames(equation.source_info.traceback):
        if frame.file_name.startswith(_DISTRIBUTIONS):
            method = _METHOD.fullmatch(frame.function_name)
            if method is not None and method[1] not in _AROUND:
                return frame.function_name
    return ""


def to_raw(x: A) -> A | jax.Array:
    """Typed keys as their raw words, anything else as it is: what a tape may hold."""
    return jax.random.key_data(x) if is_typed_key(x) else x


def from_raw(raw: jax.Array, aval: Aval) -> jax.Array:
    """Inverse of :func:`to_raw` for a value of type ``aval``."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(raw, impl=aval.dtype._impl)
    return raw
