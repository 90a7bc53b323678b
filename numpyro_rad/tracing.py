"""Tracing a function of arguments: which of them a program takes as operands, and which become a part of it.

Arrays are operands, as constants they would be copied into what is compiled, more than once. All else (whole numbers,
strings, functions) is part of the program. A model may look at the numbers in its data, as in ``int(group.max()) + 1``:
it fails where they are traced, with a ``TypeError`` of JAX. Its arrays are constants then. Whoever traces a model asks
here, so that all decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import TypeVar

import jax

from numpyro_rad.annotations import Kwargs, PyTree

T = TypeVar("T")

LOOKS = (TypeError, jax.errors.JAXTypeError)
"""What is raised where a function looks at the numbers in arrays that are traced, and by many another mistake."""


class Parts:
    """Arguments in two parts, the arrays and the rest; of the arrays it knows the places alone and keeps none alive.

    :param tree: the arguments, any pytree.
    :param traced: whether arrays are a part of their own; otherwise all arguments are kept here.
    """

    def __init__(self, tree: PyTree, traced: bool = True) -> None:
        leaves, self._treedef = jax.tree.flatten(tree)
        self._is_array = [traced and hasattr(x, "dtype") for x in leaves]
        self._rest = [None if on else x for x, on in zip(leaves, self._is_array, strict=True)]

    @property
    def has_arrays(self) -> bool:
        """Whether there are arrays as a part of their own."""
        return any(self._is_array)

    def arrays(self, tree: PyTree) -> list[jax.Array]:
        """The arrays among arguments of this structure."""
        return [x for x, on in zip(jax.tree.leaves(tree), self._is_array, strict=True) if on]

    def merge(self, arrays: Iterable[jax.Array]) -> PyTree:
        """The arguments with these arrays."""
        given = iter(arrays)
        pairs = zip(self._rest, self._is_array, strict=True)
        return self._treedef.unflatten([next(given) if on else x for x, on in pairs])


def traced_or_constant(attempt: Callable[[Parts], T], tree: PyTree, may_be_constant: bool = True) -> T:
    """What ``attempt`` returns for arguments whose arrays are traced or, if it looks at their numbers, are constants.

    :param attempt: traces something; it gets the parts of the arguments.
    :param tree: the arguments.
    :param may_be_constant: False to raise if it looks at numbers.
    """
    parts = Parts(tree)
    try:
        return attempt(parts)
    except LOOKS:
        if not (may_be_constant and parts.has_arrays):
            raise
    return attempt(Parts(tree, traced=False))


def shapes(f: Callable[..., PyTree], args: tuple, kwargs: Kwargs, may_be_constant: bool = True) -> PyTree:
    """Shapes and dtypes of ``f(*args, **kwargs)``; see :func:`traced_or_constant`."""

    def attempt(parts: Parts) -> PyTree:
        def call(arrays: list[jax.Array]) -> PyTree:
            args, kwargs = parts.merge(arrays)
            return f(*args, **kwargs)

        return jax.eval_shape(call, parts.arrays((args, kwargs)))

    return traced_or_constant(attempt, (args, kwargs), may_be_constant)


def looks_at_numbers(f: Callable[..., PyTree], args: tuple, kwargs: Kwargs) -> bool:
    """Whether ``f(*args, **kwargs)`` needs the numbers in its arrays, which are no operands of a program then."""
    try:
        shapes(f, args, kwargs, may_be_constant=False)
    except LOOKS:
        return True
    return False


class Compiled:
    """``f(*operands, args, kwargs)`` under ``jax.jit``, for any arguments: one function for those of one signature.

    Where ``f`` looks at the numbers in arguments there is one for these very arguments, which are kept as long as it.

    :param f: a function of arrays, and last of the arguments and keyword arguments of a model.
    """

    def __init__(self, f: Callable[..., PyTree]) -> None:
        self._f = f
        self._known: dict[Hashable, tuple[Callable[..., PyTree], Parts]] = {}
        self._constant: dict[Hashable, tuple[list, Callable[..., PyTree], Parts]] = {}
        self._looking: set[Hashable] = set()  # signatures of arguments whose numbers are looked at

    def knows(self, args: tuple, kwargs: Kwargs, *like: PyTree) -> bool:
        """Whether :meth:`of` traces nothing."""
        return self._key(args, kwargs, like) in self._known

    def of(self, args: tuple, kwargs: Kwargs, *like: PyTree) -> tuple[Callable[..., PyTree], Parts]:
        """The function of arrays and operands, and the parts of arguments that say which arrays.

        :param like: operands, of which only shapes and dtypes matter.
        """
        key, tree = self._key(args, kwargs, like), (args, kwargs)
        if key in self._known:
            return self._known[key]
        if key in self._looking:
            return self._of_these(tree, like)
        try:
            self._known[key] = self._traced(Parts(tree), tree, like)
        except LOOKS:
            found = self._of_these(tree, like)
            self._looking.add(key)
            return found
        return self._known[key]

    def _of_these(self, tree: PyTree, like: tuple) -> tuple[Callable[..., PyTree], Parts]:
        leaves = jax.tree.leaves(tree)
        name = *map(id, leaves), jax.tree.structure((tree, like))
        if name not in self._constant:
            self._constant[name] = leaves, *self._traced(Parts(tree, traced=False), tree, like)  # ids stay in use
        return self._constant[name][1:]

    def _traced(self, parts: Parts, tree: PyTree, like: tuple) -> tuple[Callable[..., PyTree], Parts]:
        run = jax.jit(lambda arrays, *operands: self._f(*operands, *parts.merge(arrays)))
        run.eval_shape(parts.arrays(tree), *like)  # complains now rather than when it is called
        return run, parts

    @staticmethod
    def _key(args: tuple, kwargs: Kwargs, like: tuple) -> Hashable:
        return signature((args, kwargs)), jax.tree.structure(like)


def taking_arrays(
    f: Callable[..., PyTree], args: tuple, kwargs: Kwargs, *like: PyTree
) -> tuple[Callable[..., PyTree], list[jax.Array]]:
    """``f(*operands, args, kwargs)`` under ``jax.jit``, as a function of arrays and operands; and these arrays, none
    where ``f`` looks at their numbers.

    :param like: operands, of which only shapes and dtypes matter.
    """
    run, parts = Compiled(f).of(args, kwargs, *like)
    return run, parts.arrays((args, kwargs))


def with_arguments(f: Callable[..., PyTree], args: tuple, kwargs: Kwargs, *like: PyTree) -> Callable[..., PyTree]:
    """``f(*operands, args, kwargs)`` compiled, as a function of the operands; see :func:`taking_arrays`."""
    run, arrays = taking_arrays(f, args, kwargs, *like)
    return partial(run, arrays)


def signature(tree: PyTree) -> Hashable:
    """What a compiled function of arguments depends on: structure, shapes, and the values of what is no array."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple((x.shape, str(x.dtype)) if hasattr(x, "dtype") else _hashable(x) for x in leaves)


def _hashable(x: object) -> Hashable:
    try:
        hash(x)
    except TypeError:
        return type(x), id(x)
    return type(x), x
