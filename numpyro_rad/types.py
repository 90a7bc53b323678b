"""What annotations mean by a key, by parameters and by a pytree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

Key = jax.Array
"""One PRNG key of JAX, typed or raw."""

PyTree = Any
"""Containers of JAX, nested in any way, of arrays and of whatever else is said."""

Params = Mapping[str, PyTree]
"""Parameters of model and guide by name: arrays, or pytrees of arrays such as the weights of a network."""
