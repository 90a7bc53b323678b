"""``Batches``: whatever gives minibatches, read ahead on a thread and put on the device while a step runs.

A source is an iterable of batches. What can be iterated again (a list, a data set object, an array whose rows are the
batches) starts again with every epoch; a callable ``epoch -> iterable`` makes each epoch anew, for example reshuffled;
an iterator (a generator) is read once and then there are no more batches.

A batch is a tuple or list (arguments of model and guide), a mapping (keyword arguments) or one array. Its arrays are
copied, so a source may reuse its buffers. Batches may differ in size (the last of an epoch usually does) but not in
structure, dtype or number of axes: each size is compiled once.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from numpyro_rad.annotations import Kwargs, PyTree

_AHEAD = 2  # batches that wait on the device

_STRUCTURE = "its structure"

_POLL_SECONDS = 0.1  # how soon a closed reader and an interrupted run notice


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch on the device.

    :ivar epoch: pass over the source, from 0.
    :ivar index: position in the epoch, from 0.
    :ivar args: positional arguments of model and guide.
    :ivar kwargs: keyword arguments of them.
    """

    epoch: int
    index: int
    args: tuple
    kwargs: Kwargs

    @property
    def name(self) -> str:
        """As messages call it, counting from 1."""
        return f"batch {self.index + 1} of epoch {self.epoch + 1}"


class Batches:
    """Batches from a source, in order, read ahead by a thread; a context manager that ends the thread.

    What the source raises is raised by :meth:`next` when its turn comes, with its traceback.

    :param source: an iterable of batches, or a callable ``epoch -> iterable``.
    :param most: how many batches to read at most; an iterator is not read further.
    :param epoch: the epoch to start with.
    :param index: how many batches of it to pass over, for a run that goes on. A source has to repeat itself for this.
    :ivar first: the first batch of that epoch, for its shapes; it is not taken from what :meth:`next` gives.
    :raises TypeError: if the source is neither.
    :raises ValueError: if it is empty.
    """

    def __init__(self, source: Any, most: int, epoch: int = 0, index: int = 0) -> None:
        if (not callable(source) and not hasattr(source, "__iter__")) or isinstance(source, (str, bytes, Mapping)):
            raise TypeError(
                f"batches={type(source).__name__}: an iterable of batches is expected (a list of tuples, an array "
                "whose rows are batches, a data loader, a generator), or a function epoch -> iterable."
            )
        self._source, self._most, self._start = source, most, (epoch, index)
        self._queue: queue.Queue = queue.Queue(_AHEAD)
        self._closed = threading.Event()
        self._next: list[Batch | BaseException] = []
        self._ended = False
        # settings of JAX that hold for the calling thread alone
        self._settings = bool(jax.config.jax_enable_x64), jax.config.jax_default_device  # type: ignore
        self._thread = threading.Thread(target=self._produce, name="numpyro_rad-batches", daemon=True)
        self._thread.start()
        try:
            self.first: Batch = self.next()  # type: ignore
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next(self, give_up: Callable[[], bool] = lambda: False) -> Batch | None:
        """The next batch; None when there are no more, or when ``give_up()`` while waiting for one."""
        item = self._next.pop(0) if self._next else self._take(give_up)
        if isinstance(item, BaseException):
            raise item
        return item

    def peek(self, n: int) -> list[Batch]:
        """The next batches, up to ``n`` of them, which stay the next ones; errors wait for their turn."""
        while len(self._next) < n and (item := self._take(lambda: False)) is not None:
            self._next.append(item)
        return [x for x in self._next[:n] if isinstance(x, Batch)]

    def close(self) -> None:
        """End the thread; one that hangs inside of the source is left to it."""
        self._closed.set()
        self._thread.join(timeout=5.0)

    # -- the calling thread ----------------------------------------------------------------------------------------

    def _take(self, give_up: Callable[[], bool]) -> Any:
        while not self._ended:
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if give_up():
                    return None
                continue
            self._ended = item is None or isinstance(item, BaseException)
            return item
        return None

    # -- the reading thread ----------------------------------------------------------------------------------------

    def _produce(self) -> None:
        x64, device = self._settings
        try:
            with jax.enable_x64(x64), jax.default_device(device):
                for batch in self._walk():
                    if not self._put(batch):
                        return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: object) -> bool:
        """Whether it was taken; not so after ``close``."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def _walk(self) -> Iterator[Batch]:
        """The first batch for its shapes, then all that are to be had."""
        start, skip = self._start
        reference, given = None, 0
        for epoch in itertools.count(start):
            iterable = self._epoch(epoch)
            iterator, index = iter(iterable), -1
            for index, item in enumerate(iterator):
                if reference is None or index >= skip:
                    batch = _on_device(item, epoch, index)
                    if reference is None:
                        reference = batch
                        yield reference
                        if self._most < 1:
                            return
                    _check(batch, reference)
                    if index >= skip:
                        yield batch
                        given += 1
                        if given == self._most:
                            return
            _check_length(index + 1, skip, epoch, start)
            if iterator is iterable and not callable(self._source):
                return
            skip = 0

    def _epoch(self, epoch: int) -> Iterable:
        again = hasattr(self._source, "__iter__")
        iterable: Any = self._source if again else self._source(epoch)
        if not hasattr(iterable, "__iter__") or isinstance(iterable, (str, bytes, Mapping)):
            raise TypeError(
                f"batches({epoch}) returned {type(iterable).__name__}: the function has to return an iterable of "
                "batches, for example a list of tuples, or be a generator function."
            )
        return iterable


def _check_length(length: int, skip: int, epoch: int, start: int) -> None:
    if length == 0 and epoch == start:
        raise ValueError(
            f"batches: there is no batch in epoch {epoch + 1}, it is empty. If it is an iterator that was read before, "
            "make a new one; if it drops the last small batch, the data may be smaller than one batch."
        )
    if length == 0:
        raise ValueError(
            f"batches: epoch {epoch + 1} is empty although the one before was not, so this object can be read only "
            "once. Pass a list, or a function epoch -> iterable that makes a new one for every epoch."
        )
    if length < skip:
        raise ValueError(
            f"batches: epoch {epoch + 1} has {length} batches, but the run to be resumed had taken {skip} of it. "
            "Resuming reads the same batches again: pass the source as it was at the beginning."
        )


def _on_device(item: Any, epoch: int, index: int) -> Batch:
    args: tuple = ()
    kwargs: Kwargs = {}
    if isinstance(item, Mapping):
        kwargs = dict(item)
    else:
        args = tuple(item) if isinstance(item, (tuple, list)) else (item,)
    name = Batch(epoch, index, (), {}).name
    if (len(args) == 1 and isinstance(args[0], (str, bytes))) or not (args or kwargs):
        raise TypeError(
            f"batches: {name} is {item!r}. A batch is a tuple (arguments of model and guide), a dictionary (keyword "
            "arguments) or one array."
        )
    return Batch(epoch, index, *jax.tree.map(lambda x: _leaf(x, name), (args, kwargs)))


def _leaf(x: Any, name: str) -> Any:
    """An array on the device; strings, flags and whole numbers (sizes) stay as they are and are compiled in."""
    if isinstance(x, jax.Array) or (isinstance(x, (str, bytes, bool, int)) and not isinstance(x, np.generic)):
        return x
    if not (isinstance(x, (float, complex)) or hasattr(x, "__array__")):
        return x
    array = np.array(x)  # a copy: the source may reuse its buffer, and rows of a memmap are read here
    if array.dtype.hasobject or array.dtype.kind in "USMm":
        raise TypeError(
            f"batches: {name} has an array of dtype {array.dtype}, which JAX does not have. Convert it to numbers."
        )
    return jax.device_put(array)


def _check(batch: Batch, reference: Batch) -> None:
    """Complain of a batch that is no other size of the first one."""
    found, expected = _outline(batch), _outline(reference)
    if found == expected:
        return
    entries = [k for k in (*expected, *found) if k != _STRUCTURE]  # they say more than the structure
    where = next(k for k in (*entries, _STRUCTURE) if found.get(k) != expected.get(k))
    raise ValueError(
        f"batches: {batch.name} differs from {reference.name} in {where}: expected "
        f"{expected.get(where, 'nothing there')}, got {found.get(where, 'nothing there')}. Batches may differ in size "
        "but not in structure, dtype or number of axes."
    )


def _outline(batch: Batch) -> dict[str, str]:
    """What batches have to have in common: for each entry, in words, what it is."""
    entries, treedef = jax.tree_util.tree_flatten_with_path((batch.args, batch.kwargs))
    outline = {}
    for (part, *path), leaf in entries:
        where = ("argument " if part.idx == 0 else "keyword argument ") + jax.tree_util.keystr(tuple(path))
        array = hasattr(leaf, "dtype")
        outline[where] = f"{leaf.dtype} of {leaf.ndim} axes" if array else type(leaf).__name__
    return {**outline, _STRUCTURE: str(treedef)}


def word(x: Any) -> str:
    """An argument in words that are the same in another process."""
    if hasattr(x, "dtype"):
        return f"{x.dtype}{list(x.shape)}"
    return repr(x) if isinstance(x, (str, bytes, bool, int, float)) else type(x).__name__


def words(tree: PyTree) -> dict[str, str]:
    """Entries of a pytree, by name, in words."""
    entries, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): word(x) for path, x in entries}


# -- where arguments come from -----------------------------------------------------------------------------------------


class Fixed:
    """The same arguments for every step."""

    def __init__(self, args: tuple, kwargs: Kwargs) -> None:
        self.first = self.last = args, kwargs
        self.position = (0, 0)
        self.name = ""

    def next(self, give_up: Callable[[], bool]) -> tuple[tuple, Kwargs]:
        return self.first

    def next_few(self, n: int) -> list[tuple[tuple, Kwargs]]:
        return []

    def samples(self, n: int) -> list[tuple[tuple, Kwargs]]:
        return [self.first]


class Varying:
    """A batch for every step, behind arguments that stay."""

    def __init__(self, reader: Batches, args: tuple, kwargs: Kwargs) -> None:
        self._reader, self._args, self._kwargs = reader, args, kwargs
        self.first = self.last = self._joined(reader.first)
        self.position = (reader.first.epoch, 0)
        self.name = reader.first.name

    def next(self, give_up: Callable[[], bool]) -> tuple[tuple, Kwargs] | None:
        batch = self._reader.next(give_up)
        if batch is None:
            return None
        self.position, self.name = (batch.epoch, batch.index + 1), batch.name
        self.last = self._joined(batch)
        if batch.index == 0:  # as a run that is resumed in this epoch finds it
            self.first = self.last
        return self.last

    def next_few(self, n: int) -> list[tuple[tuple, Kwargs]]:
        return [self._joined(batch) for batch in self._reader.peek(n)]

    def samples(self, n: int) -> list[tuple[tuple, Kwargs]]:
        """Up to ``n`` of the present batch and the next ones, all of the usual size if there are any.

        They follow from the position alone, so a run that is resumed looks at the same ones.
        """
        there = [self.last, *self.next_few(n)]
        usual = [given for given in there if words(given) == words(self.first)]
        return usual[:n] or [self.last]

    def _joined(self, batch: Batch) -> tuple[tuple, Kwargs]:
        twice = sorted(set(self._kwargs) & set(batch.kwargs))
        if twice:
            raise TypeError(f"run: {', '.join(twice)} is given both to run and by {batch.name}. Leave out one.")
        return (*self._args, *batch.args), {**self._kwargs, **batch.kwargs}
