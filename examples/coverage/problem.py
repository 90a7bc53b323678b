"""What a model of the coverage table is: a factory of one SVI problem, and the table of all factories.

A factory takes ``small=True`` for the size that the tests use. Data are drawn with NumPy from fixed seeds when the
factory is called; importing a file of models makes no array and needs no optional package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclass(frozen=True)
class Problem:
    """The arguments of ``SVI`` without the ELBO, and those of model and guide.

    :ivar args: array arguments of model and guide.
    :ivar settings: their keyword arguments, which are not traced.
    :ivar elbo: options that both ELBOs get, such as ``num_particles``.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    optimizer: Any = None
    elbo: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """One row of the table.

    :ivar source: the example or tutorial of NumPyro that has this kind of model.
    :ivar needs: packages that are no dependency of the library.
    """

    name: str
    source: str
    make: Callable[..., Problem]
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Packages that are needed and not installed."""
        return [package for package in self.needs if importlib.util.find_spec(package) is None]


MODELS: dict[str, Example] = {}
"""All examples by name, in the order of their definition."""


def example(source: str, needs: tuple[str, ...] = ()) -> Callable[[Callable[..., Problem]], Callable[..., Problem]]:
    """Enter a factory ``make(small=False)`` in ``MODELS`` under its own name."""

    def enter(make: Callable[..., Problem]) -> Callable[..., Problem]:
        name = make.__name__
        if name in MODELS:
            raise ValueError(f"two examples are called {name}; rename one of them")
        MODELS[name] = Example(name, source, make, needs)
        return make

    return enter


def adam(rate: float = 1e-2) -> optax.GradientTransformation:
    """The optimizer of nearly every example: clipped Adam."""
    return optax.chain(optax.clip_by_global_norm(100.0), optax.adam(rate))


def arrays(*values: Any) -> tuple[jax.Array, ...]:
    """JAX arrays in 32 bits."""
    return tuple(jnp.asarray(v, jnp.float32 if np.asarray(v).dtype.kind == "f" else jnp.int32) for v in values)


def sigmoid(x: Any) -> Any:
    """NumPy's side of a logistic model."""
    return 1.0 / (1.0 + np.exp(-x))
