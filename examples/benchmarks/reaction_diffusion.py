"""P4: Bayesian control of a reaction-diffusion equation, the last experiment of the RAD paper (Oktay et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro

from examples.benchmarks.layers import VARIANTS, Apply, Block, Layer, loop
from examples.benchmarks.workload import Arrays, MeanFieldWorkload, weight

DIFFUSIVITY = 0.25
# 4 D dt / dx^2; explicit Euler steps in two dimensions are stable up to 1.
DIFFUSION_NUMBER = 0.25


def euler_step(density: jax.Array, source: jax.Array) -> jax.Array:
    """``u + dt (D laplace(u) + s u)`` inside the unit square, and 0 on its border.

    :param density: u, ``(batch, side, side)``.
    :param source: s as ``(3,)`` amplitudes of the modes 1, sin(2 pi x) and cos(2 pi x).
    """
    dx = 1.0 / (density.shape[-1] - 1)
    dt = DIFFUSION_NUMBER * dx**2 / (4.0 * DIFFUSIVITY)
    angle = 2.0 * np.pi * dx * np.arange(1, density.shape[-1] - 1)
    modes = np.stack([np.ones_like(angle), np.sin(angle), np.cos(angle)])  # (3, columns)
    inside = density[:, 1:-1, 1:-1]
    neighbours = density[:, :-2, 1:-1] + density[:, 2:, 1:-1] + density[:, 1:-1, :-2] + density[:, 1:-1, 2:]
    diffused = inside + DIFFUSION_NUMBER / 4.0 * (neighbours - 4.0 * inside)
    return jnp.pad(diffused + dt * (source @ jnp.asarray(modes, source.dtype)) * inside, ((0, 0), (1, 1), (1, 1)))


def controlled_step(
    layers: tuple[Apply, ...], density: jax.Array, source: jax.Array, target: jax.Array, precision: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One time step, and the mean square of the standardized distance from the target after it, ``(batch,)``."""
    step, square = layers
    density = step(density, source)
    return density, square(density, precision, target * precision).mean((1, 2))


@dataclass(frozen=True, kw_only=True)
class ReactionDiffusion(MeanFieldWorkload):
    """P4: control coefficients of a source, such that the density of neutrons follows a target.

        du/dt = D laplace(u) + s(x, t) u,   u = 0 on the border of the unit square,   u(0) = sin(pi x) sin(pi y)
        s = c0 + c1 sin(pi t) + c2 cos(pi t) + (c3 sin(pi t) + c4 cos(pi t)) sin(2 pi x) + (c5 ... + c6 ...) cos(2 pi x)
        target(t) = u(0) + 0.25 sin(2 pi x) sin(pi y) sin(pi t)
        c ~ Normal((c*, 0, ..., 0), prior_scale)
        log likelihood = - integral of mean (u - target)^2 dt / (2 noise_scale^2)

    Explicit Euler steps with 4 D dt / dx^2 = 0.25; c* keeps u(0) as it is. There are no rows to draw from: the one row
    of the data is the initial density with the amplitude of the target's oscillation. The step is linear in u and in s,
    but it needs u to know what s did, so every rival's question is how to have all these densities on the way back.

    :param side: points of the grid along each axis, the border included.
    :param steps: number of time steps; the time is ``steps dx^2 / 4``.
    :param prior_scale: over 10 units of time, a constant error of 0.1 in the source becomes a factor of e in u.
    """

    side: int
    steps: int
    prior_scale: float = 0.1
    noise_scale: float = 0.1
    batch: int = 1
    micro_batches: int = 1
    initial_gain: float = 1.0
    initial_scale: float = 0.01
    learning_rate: float = 1e-2
    data: str = "none"

    layer: ClassVar[Block] = Block(
        (Layer(euler_step), Layer(jnp.multiply, jnp.square, jnp.negative)), controlled_step, looped=True
    )
    # One row cannot be cut, no product is worth saving by name, and bfloat16 cannot hold u + dt du/dt.
    without: ClassVar[tuple[str, ...]] = (
        "small_batch",
        "ours_4slices",
        "ours_8slices",
        "accumulate",
        "accumulate_unrolled",
        "checkpoint_dots",
        "bf16_compute",
    )

    @property
    def time_step(self) -> float:
        """dt."""
        return DIFFUSION_NUMBER / (4.0 * DIFFUSIVITY * (self.side - 1) ** 2)

    def prior_mean(self) -> np.ndarray:
        """The coefficients under which the discrete equation stands still, ``(7,)``; c0 is about 2 pi^2 D."""
        intervals = self.side - 1
        decay = 8.0 * DIFFUSIVITY * intervals**2 * np.sin(np.pi / (2 * intervals)) ** 2
        return np.array([decay, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])

    def dataset(self, seed: int, data_dir: Path | None) -> tuple[str, Arrays]:
        """The initial density and the amplitude of the target's oscillation, ``(1, side, side)`` each."""
        x = jnp.linspace(0.0, 1.0, self.side)
        border = jnp.zeros((self.side, self.side)).at[1:-1, 1:-1].set(1.0)
        initial = border * jnp.sin(jnp.pi * x[:, None]) * jnp.sin(jnp.pi * x)
        amplitude = border * 0.25 * jnp.sin(jnp.pi * x[:, None]) * jnp.sin(2.0 * jnp.pi * x)
        return "none", (initial[None], amplitude[None])

    def sources(self, control: jax.Array) -> jax.Array:
        """The amplitudes of the three spatial modes at the start of each step, ``(steps, 3)``."""
        time = np.pi * self.time_step * np.arange(self.steps)
        sine, cosine = (jnp.asarray(wave, control.dtype) for wave in (np.sin(time), np.cos(time)))
        waves = [control[i] * sine + control[i + 1] * cosine for i in (1, 3, 5)]
        return jnp.stack([control[0] + waves[0], waves[1], waves[2]], axis=1)

    def misfit(self, control: jax.Array, initial: jax.Array, amplitude: jax.Array, apply: Apply) -> jax.Array:
        """Time integral of the mean square distance from the target, in units of ``noise_scale``: ``(batch,)``."""
        oscillation = np.sin(np.pi * self.time_step * np.arange(1, self.steps + 1))
        precision = jnp.asarray(1.0 / self.noise_scale, control.dtype)

        def step(density: jax.Array, at: Arrays) -> Arrays:
            source, sine = at
            return apply(density, source, initial + amplitude * sine, precision)

        xs = (self.sources(control), jnp.asarray(oscillation, control.dtype))
        _, distances = loop(apply, step, initial, xs)
        return self.time_step * distances.sum(0)

    def model(self, variant: str = "plain") -> Callable[..., None]:
        apply = VARIANTS[variant](self.layer)

        def model(x: jax.Array, y: jax.Array) -> None:
            control = weight("control", (7,), self.prior_scale, jnp.asarray(self.prior_mean(), x.dtype))
            misfit = self.misfit(control, x, y, apply)
            with numpyro.plate("data", self.data_size, subsample_size=x.shape[0]):
                numpyro.factor("target", -0.5 * misfit)

        return model
