"""``fingerprint``: what has to be the same for a run of SVI to be the same one, in words that any process knows.

Arrays are told apart by a checksum of their bytes. The loss and the update of the optimizer are traced, so whatever
they compute with is covered, globals included. What is handed to the optimizer is found a second time in its closures
(optax and NumPyro build optimizers of nested functions), since only there it has a name: ``scale.update_fn.step_size``.
Nothing depends on addresses, on hashes of strings or on the order of sets.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import types
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_rad.ad import _jax
from numpyro_rad.annotations import Kwargs, PyTree
from numpyro_rad.elbo import RAD_ELBO
from numpyro_rad.fits import ELBO, SVI, SVIState
from numpyro_rad.tracing import Parts, traced_or_constant
from numpyro_rad.training import results
from numpyro_rad.training.batches import word, words
from numpyro_rad.training.checkpoints import to_host

_CHUNK_BYTES = 2**26  # of an array, for one thread

_DEEPEST = 24  # nested objects that are looked into

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def fingerprint(
    svi: SVI,
    state: SVIState,
    options: dict[str, bool],
    given: tuple[tuple, Kwargs],
    start: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What has to be the same for a run to be the same one.

    :param svi: an initialised ``SVI``.
    :param state: the first state.
    :param options: of the run.
    :param given: arguments of model and guide; of a run over batches, those of the first batch of the epoch.
    :param start: values that the run was told to start from, by name.
    :return: for each thing that counts a text, or texts by name.
    """
    args, kwargs = given
    installed = results.versions()
    names = ("numpyro_rad", "jax", "jaxlib", "numpyro", "optax", "python", "device")
    told = {name: value for name, value in (start or {}).items() if value is not None}
    return {
        "parameters": words(svi.optim.get_params(state.optim_state)),
        "state of the optimizer": words((state.optim_state, state.mutable_state)),
        "optimizer": inside(svi.optim),
        "ELBO": {"options": results.described(svi.loss), **_elbo(svi.loss)},
        "options": {**options, **_replanning(svi)},
        "rng_key": checksum(state.rng_key),
        "initial values": {name: checksum(value) for name, value in told.items()},
        "arguments": {name: word(x) for name, x in _named(svi, args, kwargs).items()},
        "data": data(svi, given),
        "program": _program(svi, state, args, kwargs),
        "update": _update(svi, state),
        "versions": ", ".join(f"{k} {installed[k]}" for k in names),
    }


def data(svi: SVI, given: tuple[tuple, Kwargs]) -> dict[str, str]:
    """A checksum of each array among the arguments, by the name that the model has for it."""
    return {name: _content(x) for name, x in _named(svi, *given).items() if not isinstance(x, _PLAIN)}


def checksum(tree: PyTree) -> str:
    """Of the bytes of all arrays of a pytree; keys are their words, numbers are arrays."""
    leaves = to_host(tree)
    digest = hashlib.sha256(str(jax.tree.structure(tree)).encode() if len(leaves) != 1 else b"")
    for x in leaves:
        digest.update(f"{x.dtype}{x.shape}".encode())
        raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        chunks = [raw[i : i + _CHUNK_BYTES] for i in range(0, raw.size, _CHUNK_BYTES)]
        if len(chunks) > 1:  # zlib lets other threads run
            with ThreadPoolExecutor() as pool:
                sums = list(pool.map(zlib.crc32, chunks))
        else:
            sums = [zlib.crc32(chunk) for chunk in chunks]
        digest.update(str(sums).encode())
    return digest.hexdigest()[:16]


def _content(x: Any) -> str:
    if hasattr(x, "dtype") and getattr(x.dtype, "kind", "") != "O":
        return checksum(x)
    return hashlib.sha256(repr(inside(x)).encode()).hexdigest()[:16]


def _named(svi: SVI, args: tuple, kwargs: Kwargs) -> dict[str, PyTree]:
    """Leaves of the arguments, by what a user calls them."""
    try:
        signature = inspect.signature(svi.model).parameters.values()
        parameters = [p.name for p in signature if p.kind <= p.POSITIONAL_OR_KEYWORD]
    except (TypeError, ValueError):  # of something that is called but has no signature
        parameters = []
    known = dict(enumerate(f" '{name}'" for name in parameters))
    tops = {f"argument {i + 1}{known.get(i, '')}": x for i, x in enumerate(args)}
    tops |= {f"keyword argument '{name}'": x for name, x in {**svi.static_kwargs, **kwargs}.items()}
    found = {}
    for name, x in tops.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(x)[0]:
            found[name + jax.tree_util.keystr(path)] = leaf
    return found


def _elbo(loss: ELBO) -> dict[str, str]:
    """Attributes of an ELBO that its description leaves out."""
    if not isinstance(loss, RAD_ELBO):
        return inside(vars(loss))
    plan = loss.planner.plan
    plans = {"plan": _content(plan)} if plan is not None else {}
    return {**inside(vars(loss.base)), **plans}


def _replanning(svi: SVI) -> dict[str, str]:
    """When new plans are made while the run goes on: other steps for them, other numbers."""
    tracking = getattr(svi, "tracking", None)
    if tracking is None or tracking.replan is None:
        return {}
    return {"replan": f"{tracking.replan} every {tracking.interval} steps"}


# -- programs ----------------------------------------------------------------------------------------------------------


def _program(svi: SVI, state: SVIState, args: tuple, kwargs: Kwargs) -> str:
    """Hash of the program of the loss, whatever is stored for its gradient."""

    def digest(parts: Parts) -> str:
        def loss(state: SVIState, arrays: list[jax.Array]) -> jax.Array:
            args, kwargs = parts.merge(arrays)
            return svi.evaluate(state, *args, **kwargs)

        return _jax.digest(loss, state, parts.arrays((args, kwargs)))

    return traced_or_constant(digest, (args, kwargs))


def _update(svi: SVI, state: SVIState) -> str:
    """Hash of the programs of the optimizer's first state and of its update, with a loss that stands for any."""

    def loss(params: PyTree) -> tuple[ArrayLike, None]:
        return sum((jnp.sum(x**2) for x in jax.tree.leaves(params)), jnp.zeros(())), None

    def both(params: PyTree, state: PyTree) -> PyTree:
        return svi.optim.init(params), svi.optim.eval_and_update(loss, state)

    return _jax.digest(both, svi.optim.get_params(state.optim_state), state.optim_state)


# -- objects -----------------------------------------------------------------------------------------------------------


def inside(x: Any) -> dict[str, str]:
    """Numbers, strings, arrays and functions that an object holds, by name: in closures, defaults, fields, attributes.

    A function is its name and a hash of its bytecode and constants. What is none of these is the name of its type.
    """
    found: dict[str, str] = {}
    _look_into("", x, found, {}, 0)
    return found


def _look_into(name: str, x: Any, found: dict[str, str], seen: dict[int, object], depth: int) -> None:
    text = _text(x)
    if text is not None:
        key, count = name or "value", 2
        while key in found:
            key, count = f"{name or 'value'} #{count}", count + 1
        found[key] = text
    if isinstance(x, (*_PLAIN, enum.Enum)) or id(x) in seen or depth == _DEEPEST:
        return
    seen[id(x)] = x  # kept, so that no other object gets its address
    for part, value in _parts(name, x):
        _look_into(part, value, found, seen, depth + 1)


def _text(x: Any) -> str | None:
    """What stands for an object without its parts; None for a container, which its parts stand for."""
    if isinstance(x, enum.Enum):
        return str(x)
    if isinstance(x, _PLAIN):
        return repr(x)
    if hasattr(x, "dtype") and hasattr(x, "shape") and not isinstance(x, type):
        return f"{word(x)} {checksum(x) if getattr(x.dtype, 'kind', '') != 'O' else ''}"
    if isinstance(x, np.dtype):
        return str(x)
    if isinstance(x, types.FunctionType):
        return f"{_called(x)}, code {_code(x.__code__)}"
    if isinstance(x, (type, types.BuiltinFunctionType, types.ModuleType)):
        return _called(x)
    if isinstance(x, (set, frozenset)):
        return str(sorted(repr(inside(part)) for part in x))
    if isinstance(x, (Mapping, tuple, list, functools.partial, types.MethodType)):
        return None
    return _called(type(x))


def _called(x: Any) -> str:
    return f"{getattr(x, '__module__', '')}.{getattr(x, '__qualname__', getattr(x, '__name__', ''))}"


def _code(code: types.CodeType) -> str:
    digest = hashlib.sha256(code.co_code + repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    for constant in code.co_consts:
        ordered = sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant
        digest.update((_code(constant) if isinstance(constant, types.CodeType) else repr(ordered)).encode())
    return digest.hexdigest()[:8]


def _parts(name: str, x: Any) -> list[tuple[str, Any]]:
    """What an object holds, with the names that a user may know it by."""
    dot = f"{name}." if name else ""
    if isinstance(x, types.FunctionType):
        owner = x.__qualname__.replace(".<locals>", "")
        cells = [(n, c) for n, c in zip(x.__code__.co_freevars, x.__closure__ or (), strict=True) if _filled(c)]
        parts = [(f"{owner}.{n}", c.cell_contents) for n, c in cells]
        signature = list(inspect.signature(x, follow_wrapped=False).parameters.values())
        return parts + [(f"{owner}.{p.name}", p.default) for p in signature if p.default is not p.empty]
    if isinstance(x, types.MethodType):
        return [(name, x.__func__), (f"{dot}self", x.__self__)]
    if isinstance(x, functools.partial):
        named = [(f"{dot}{i}", a) for i, a in enumerate(x.args)] + [(f"{dot}{k}", v) for k, v in x.keywords.items()]
        return [(name, x.func), *named]
    if isinstance(x, Mapping):
        return [(f"{dot}{k}", x[k]) for k in sorted(x, key=str)]
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return [(f"{dot}{field}", value) for field, value in zip(x._fields, x, strict=True)]  # type: ignore
    if isinstance(x, (tuple, list)):
        return [(f"{name}[{i}]", value) for i, value in enumerate(x)]
    if isinstance(x, (type, types.ModuleType, types.BuiltinFunctionType, set, frozenset)) or hasattr(x, "dtype"):
        return []
    if dataclasses.is_dataclass(x):
        return [(f"{dot}{f.name}", getattr(x, f.name, None)) for f in dataclasses.fields(x)]
    attributes = getattr(x, "__dict__", {})
    return [(f"{dot}{k}" if k != "__wrapped__" else name, attributes[k]) for k in sorted(attributes)]


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that is not bound yet
        return False
