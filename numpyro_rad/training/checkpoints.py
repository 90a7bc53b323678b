"""``Checkpoint``: where and how often a run of SVI is saved, and what makes sure that it is read back as it was.

Orbax writes; each checkpoint is a folder that gets its name only when it is complete, so a run that is killed at any
time leaves complete ones. A checksum of the arrays finds files that were damaged later, and the fingerprint of the run
(data, optimizer, parameters, options, program, key) finds checkpoints of another one. A folder is the run's own: old
checkpoints are deleted there, so one that holds anything else is not touched.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_rad.annotations import PyTree
from numpyro_rad.mistakes import fields_checked

_PREFIX = "array"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, cannot be read or belongs to another run."""


@fields_checked
@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a run is saved, and how often.

    :param folder: of this run alone; it is made where it does not exist.
    :param every: steps between two checkpoints; there is another one at the end.
    :param keep: how many of the newest stay.
    :raises ValueError: if ``every`` or ``keep`` is not positive.

    Example::

        svi.run(key, 100_000, x, y, checkpoint=Checkpoint("fit", every=5000))
    """

    folder: str | Path
    every: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.folder, (str, Path)):
            raise TypeError(f"Checkpoint: folder={self.folder!r} is not a path.")
        for name in ("every", "keep"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Checkpoint: {name}={value!r}, a whole number of at least 1 is expected.")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds: arrays, and the rest as what JSON takes."""

    step: int
    arrays: list[np.ndarray]
    meta: dict[str, Any]


class Store:
    """Reads and writes checkpoints of one folder; a context manager.

    :raises ImportError: if Orbax is not installed.
    :raises CheckpointError: if the folder cannot be written.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise ImportError(
                "checkpoints are written by orbax-checkpoint, which is not installed. Install it with "
                "pip install 'numpyro_rad[checkpoint]'."
            ) from error
        self._ocp, self.folder = ocp, Path(checkpoint.folder).expanduser().resolve()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
            others = sorted(p.name for p in self.folder.iterdir() if not _ours(p))
        except OSError as error:
            raise CheckpointError(
                f"checkpoint: the folder {self.folder} cannot be written ({error}). No step was taken. Choose another "
                "folder, or look at its permissions and at the free space."
            ) from error
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise CheckpointError(
                f"checkpoint: the folder {self.folder} holds what is no checkpoint of numpyro_rad: "
                f"{', '.join(others[:3])}{more}. A run needs a folder of its own, since its old checkpoints are "
                f"deleted. Try checkpoint={str(Path(checkpoint.folder) / 'checkpoints')!r}."
            )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=checkpoint.keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, in whole or not at all.

        :raises CheckpointError: if it cannot be written.
        """
        save = self._ocp.args
        arrays = {f"{_PREFIX}{i}": x for i, x in enumerate(snapshot.arrays) if x.size}  # Orbax takes no empty ones
        meta = {
            **snapshot.meta,
            "arrays": [[list(x.shape), str(x.dtype)] for x in snapshot.arrays],
            "checksum": _checksum(snapshot.arrays),
        }
        try:
            self._manager.save(
                snapshot.step,
                args=save.Composite(arrays=save.StandardSave(arrays), meta=save.JsonSave({"json": json.dumps(meta)})),
                force=True,
            )
        except Exception as error:  # whatever Orbax and the file system may raise
            raise CheckpointError(
                f"checkpoint: step {snapshot.step} could not be written to {self.folder} ({_line(error)}). Look at its "
                "permissions and at the free space."
            ) from error

    def newest(self) -> Snapshot | None:
        """The newest checkpoint that can be read, None if there is none; broken ones are renamed and warned of.

        :raises CheckpointError: if there are checkpoints and none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        broken = {}
        for step in steps:
            try:
                snapshot = self._read(step)
            except Exception as error:  # damaged files raise whatever the reader happens to stumble over
                broken[step] = _line(error)
                continue
            for bad, reason in broken.items():
                (self.folder / str(bad)).rename(self.folder / f"broken-{bad}")
                warnings.warn(
                    f"checkpoint: that of step {bad} in {self.folder} is damaged ({reason}) and was renamed to "
                    f"broken-{bad}; the run goes on from step {step}.",
                    stacklevel=4,
                )
            if broken:
                self._manager.reload()
            return snapshot
        if broken:
            raise CheckpointError(
                f"checkpoint: none of the {len(broken)} checkpoints in {self.folder} can be read; the newest, step "
                f"{steps[0]}: {broken[steps[0]]}. They are damaged, or of another program or version of numpyro_rad. "
                "Choose another folder, or delete this one to start again."
            )
        return None

    def _read(self, step: int) -> Snapshot:
        restore = self._ocp.args
        found = self._manager.restore(step, args=restore.Composite(meta=restore.JsonRestore()))
        meta = json.loads(found["meta"]["json"])
        like = {f"{_PREFIX}{i}": np.zeros(shape, dtype) for i, (shape, dtype) in enumerate(meta["arrays"])}
        wanted = {k: x for k, x in like.items() if x.size}
        found = self._manager.restore(step, args=restore.Composite(arrays=restore.StandardRestore(wanted)))
        arrays = [np.asarray(x) for x in {**like, **found["arrays"]}.values()]
        if _checksum(arrays) != meta["checksum"]:
            raise ValueError("the checksum of its arrays is wrong")
        return Snapshot(step, arrays, meta)


def _ours(path: Path) -> bool:
    """Whether a run may have put this into its folder; hidden files, which systems leave everywhere, do no harm."""
    if path.name.startswith("."):
        return True
    step, unfinished, _ = path.name.removeprefix("broken-").partition(".orbax-checkpoint-tmp")
    if not (step.isdigit() and path.is_dir()):
        return False
    inside = {p.name for p in path.iterdir()}
    # of an old one only marks of Orbax are left, or nothing, if the run was killed while it deleted it
    marks = {name for name in inside if name.startswith("_") or name == "commit_success.txt"}
    return bool(unfinished) or bool(inside & {"arrays", "meta"}) or inside == marks


_UPGRADES = {"program", "optimizer", "update"}  # may change with the versions of packages

_OTHER = {
    "program": "model, guide or ELBO compute something else",
    "update": "the optimizer computes something else",
    "rng_key": "it is another key",
}


def check_same_run(folder: Path, saved: dict[str, Any], here: dict[str, Any], batches: bool = False) -> None:
    """Complain of a checkpoint of another run.

    :param saved: the fingerprint in the checkpoint.
    :param here: that of the run that is to go on.
    :param batches: whether its data come from a loader.
    :raises CheckpointError: naming what differs.
    """
    if "data" not in saved:
        raise CheckpointError(
            f"checkpoint: {folder} was written by an older version of numpyro_rad, which did not say of which data and "
            "optimizer, so that it may be of another run. Choose another folder, or delete that one."
        )
    differs = [name for name in here if saved[name] != here[name] and name != "versions"]
    if "update" not in differs:  # optimizers change what they hold without a meaning, 100 to 100.0 for example
        differs = [name for name in differs if name != "optimizer"]
    if not differs:
        return
    old, new = saved["versions"], here["versions"]
    if set(differs) <= _UPGRADES and old != new:
        warnings.warn(
            f"checkpoint: {folder} was written with {old}, this is {new}; the compiled program may differ, so the run "
            "goes on from there but perhaps not bit for bit.",
            stacklevel=4,
        )
        return
    implied = {"data": "arguments", "program": "arguments", "update": "optimizer"}  # not said where the other one is
    told = [name for name in differs if implied.get(name) not in differs]
    details = "; ".join(f"{name}: {_difference(name, saved[name], here[name])}" for name in told)
    advice = ""
    if "data" in told and batches:
        advice = (
            " A loader that shuffles has to come to the same order again, for example from the number of the epoch."
        )
    raise CheckpointError(
        f"checkpoint: {folder} belongs to another run; they differ in {details}. Choose another folder for this run, "
        f"or delete that one.{advice}"
    )


def _difference(what: str, saved: Any, here: Any) -> str:
    """Of one entry of a fingerprint, in words."""
    if what in _OTHER:
        return _OTHER[what]
    if not isinstance(saved, dict):
        return f"{saved} in the checkpoint and {here} here"
    names = [k for k in dict.fromkeys((*saved, *here)) if saved.get(k) != here.get(k)]
    if what in ("data", "initial values"):
        both = {(True, True): "has other values", (True, False): "is not given here", (False, True): "is new"}
        return ", ".join(f"{name} {both[name in saved, name in here]}" for name in names)
    found = [f"{k} is {saved.get(k, 'not there')} in the checkpoint and {here.get(k, 'not there')} here" for k in names]
    return found[0] + (f", and {len(found) - 1} more" if found[1:] else "")


def _checksum(arrays: Sequence[np.ndarray]) -> int:
    total = 0
    for x in arrays:
        total = zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8), total)
    return total


def _line(error: Exception) -> str:
    """An error in one line."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"


# -- pytrees of arrays -------------------------------------------------------------------------------------------------


def to_host(tree: PyTree) -> list[np.ndarray]:
    """The leaves of a pytree of arrays as NumPy arrays; typed keys as their words."""
    return [np.asarray(jax.random.key_data(x) if _is_key(x) else x) for x in jax.tree.leaves(tree)]


def from_host(arrays: Sequence[np.ndarray], like: PyTree) -> PyTree:
    """The pytree that :func:`to_host` took apart, on the devices where the one that it is ``like`` is."""
    leaves, treedef = jax.tree.flatten(like)
    return treedef.unflatten([_placed(x, leaf) for x, leaf in zip(arrays, leaves, strict=True)])


def _placed(x: np.ndarray, like: PyTree) -> PyTree:
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(x), impl=jax.random.key_impl(like))
    one = not isinstance(like, jax.Array) or len(like.sharding.device_set) == 1
    return jnp.asarray(x) if one else jax.device_put(x, like.sharding)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
