"""What annotations mean by a key, by arguments, by parameters and by a pytree."""

from __future__ import annotations

from typing import Any

import jax

Key = jax.Array
"""One PRNG key of JAX, typed or raw."""

PyTree = Any
"""Containers of JAX, nested in any way, of arrays and of whatever else is said."""

Params = dict[str, PyTree]
"""Parameters of model and guide by name: arrays, or pytrees of arrays such as the weights of a network."""

Kwargs = dict[str, Any]
"""Keyword arguments of a model and its guide: pytrees, and whatever else they take."""
