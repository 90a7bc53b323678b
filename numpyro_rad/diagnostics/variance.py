"""``gradient_variance``: how noisy a gradient of SVI is, and where the noise comes from.

A gradient g(m, u, p) depends on a minibatch m, on what guide and model draw (u), and on the codes of the residuals (p).
By the law of total variance

    tr Cov(g) = E tr Var_p(g)  +  E tr Var_u(E_p g)  +  tr Var_m(E_up g)
                    path               guide                minibatch.

Each replicate takes four gradients that share less and less (a staggered nested design, Bainbridge 1965):

    a = g(m, u, p),   b = g(m, u, p'),   c = g(m, u', p''),   d = g(m', u'', p''').

Squared differences of them have the parts as their expectations (see ``_replicate``), so that a replicate is reduced to
four numbers for each parameter array at once: memory is that of four gradients, whatever the number of replicates.

**References:** Bainbridge, *Staggered nested designs for estimating variance components*, 1965. McCandlish et al., *An
empirical model of large-batch training*, 2018 (the noise scale). Fieller, *Some problems in interval estimation*, 1954
(the interval of a ratio).
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpyro.infer import ELBO, SVI
from scipy.special import stdtrit

from numpyro_rad.ad import _jax
from numpyro_rad.annotations import Key, Kwargs, PyTree
from numpyro_rad.diagnostics.records import BlockVariance, Estimate, GradientVariance
from numpyro_rad.elbo import RAD_ELBO, draws_minibatches, loss_by_keys
from numpyro_rad.fits import SVIState, state_of
from numpyro_rad.mistakes import check_initialised, kwargs_checked
from numpyro_rad.planning.planner import VarianceWarning
from numpyro_rad.subsampling import NoiseKeys
from numpyro_rad.tracing import Compiled
from numpyro_rad.transform import named_leaves, site_leaves

_TAG = 0x52414423  # folded into the state's key: the draws of gradient_variance

_PILOT = 16  # replicates from which the number of replicates is computed

_TIMINGS = 9  # of each gradient, interleaved

PATH, GUIDE, MINIBATCH, NORM = range(4)  # columns of what a replicate is reduced to

_PARTS = (PATH, GUIDE, MINIBATCH)


@kwargs_checked
def gradient_variance(
    svi: SVI,
    svi_state: SVIState,
    *args: Any,
    batches: Sequence[tuple] = (),
    draws: int | None = None,
    relative_error: float = 0.1,
    max_draws: int = 400,
    blocks: str | Callable[[str], str] = "site",
    key: Key | None = None,
    costs: bool | str = False,
    **kwargs: Any,
) -> GradientVariance:
    """The variance of the gradient that the optimizer sees, split by source and by block of parameters.

    Gradients are those in the unconstrained parameters, with a ``RAD_ELBO`` or with any other ELBO of NumPyro, for
    which the path part is zero. One function is compiled (two, if plates draw minibatches under a ``RAD_ELBO``: path
    noise is measured in the program of the training, the other parts in one where plates have a key of their own). At
    most four gradients are held at a time. Estimates of the parts are unbiased for any number of draws; where a part
    is small they may be negative.

    :param svi: an initialised ``SVI``.
    :param svi_state: its state, or the result of its run, at whose parameters the gradient is taken. It is not changed.
    :param args: arguments of model and guide, as in ``svi.update``.
    :param batches: further tuples of such arguments, of the same shapes; the minibatch is then drawn from all of them,
        ``args`` included, each with the same probability.
    :param draws: number of replicates of up to four gradients (six in the case of two functions), at least 2. If it
        is None, as many as it takes for ``relative_error``.
    :param relative_error: standard error of the total variance, and of ρ, to be reached, relative to themselves.
    :param max_draws: at most so many replicates.
    :param blocks: ``"site"`` for one block for each site of the guide (or each module), ``"parameter"`` for one for
        each parameter array, or a function from the name of a parameter array (``"w_auto_loc"``) to that of its block.
    :param key: a PRNG key for the draws; by default it is derived from that of the state, so that the same state gives
        the same result.
    :param costs: whether to measure time and memory of one gradient, ``"randomized"`` to leave out the exact one where
        it is too large for the memory. Compiles the exact gradient.
    :param kwargs: keyword arguments of model and guide.
    :return: variances, their standard errors over the replicates, and what follows from them; print it for a table.
        The interval of ρ is Fieller's, which needs streaming moments only and stays right where the denominator is
        noisy (it is then unbounded); standard errors of ratios are by linearization.
    :raises ValueError: for fewer than 2 draws, if there are no parameters, if batches differ in shape, if ``svi`` is
        not initialised, or if a gradient is not finite (its parameters are named).

    Example::

        found = gradient_variance(svi, result.state, x, y)
        print(found)
        found.rho.value  # path variance / variance of the exact gradient
    """
    needed = max_draws if draws is None else draws
    if needed < 2:
        option = "max_draws" if draws is None else "draws"
        raise ValueError(f"{option}={needed}: a variance and its error take at least 2 replicates. Try 30.")
    if draws is None and not relative_error > 0:
        raise ValueError(f"relative_error={relative_error!r} is not positive. Try 0.1 for 10 %.")
    if not (blocks in ("site", "parameter") or callable(blocks)):
        raise ValueError(f"blocks={blocks!r} is neither 'site', 'parameter' nor a function from a name to a block's.")
    if costs not in (False, True, "randomized"):
        raise ValueError(f"costs={costs!r} is not one of True, False and 'randomized'.")
    svi_state = state_of(svi, svi_state, "gradient_variance")
    sampler = _Sampler(svi, svi_state, [args, *batches], kwargs, key)
    moments = _Moments(sampler.block_names(blocks), sampler.sizes)
    while moments.count < (draws or _PILOT):
        moments.add(sampler.replicate())
        if draws is None and moments.count >= max_draws:
            break
    while draws is None and moments.count < max_draws:
        still = moments.still_needed(relative_error)
        if still == 0:
            break
        for _ in range(min(still, max_draws - moments.count)):
            moments.add(sampler.replicate())
    seconds, memory = sampler.costs(costs == "randomized") if costs else ({}, {})
    return _result(moments, predicted_rho(svi, svi_state, args, kwargs), seconds, memory)


def predicted_rho(svi: SVI, svi_state: SVIState, args: tuple, kwargs: Kwargs) -> float | None:
    """What the plan of ``svi.loss`` predicts for path variance / variance of the exact gradient; None if it does not.

    For an ELBO that stores no codes it is zero.
    """
    elbo = svi.loss
    if not isinstance(elbo, RAD_ELBO):
        return 0.0
    with _quiet():
        plan, _ = elbo.plan_of_update(svi, svi_state, *args, **kwargs)
    known = elbo.planner.calibration
    if not any(p.encoded for p in plan.walk()):
        return 0.0
    if known is not None and known.program == plan.graph.fingerprint():
        return known.predicted(plan) if known.reference_variance == known.gradient_variance else None
    return None if plan.predicted is None else plan.predicted.added_variance


class Gradient:
    """The gradient of an SVI in its unconstrained parameters, under keys of one's choice, compiled once.

    Arrays among the arguments of model and guide are arguments of the compiled function, all else is part of it, as in
    ``jax.jit(svi.update)``; where a model looks at its arrays these are part of it too, as in ``svi.run``.

    :param svi: an initialised ``SVI``.
    :param elbo: the ELBO, by default that of ``svi``.
    """

    def __init__(self, svi: SVI, elbo: ELBO | None = None) -> None:
        check_initialised("Gradient", svi)
        self._svi, self._elbo = svi, svi.loss if elbo is None else elbo
        self._compiled = Compiled(self._at)

    def __call__(self, svi_state: SVIState, keys: NoiseKeys, args: tuple, kwargs: Kwargs) -> PyTree:
        """The gradient at the parameters of a state, as a pytree like these."""
        run, operands = self.program(svi_state, keys, args, kwargs)
        return run(*operands)

    def program(self, svi_state: SVIState, keys: NoiseKeys, args: tuple, kwargs: Kwargs) -> tuple[Any, tuple]:
        """The compiled function and its operands."""
        point = self._svi.optim.get_params(svi_state.optim_state), svi_state.mutable_state, keys
        with contextlib.nullcontext() if self._compiled.knows(args, kwargs, *point) else _quiet():
            run, parts = self._compiled.of(args, kwargs, *point)
        return run, (parts.arrays((args, kwargs)), *point)

    def temporary_bytes(self, svi_state: SVIState, keys: NoiseKeys, args: tuple, kwargs: Kwargs) -> int | None:
        """Temporary memory of the compiled function; None where the compiler does not say."""
        run, operands = self.program(svi_state, keys, args, kwargs)
        sizes = _jax.compiled_bytes(run.lower(*operands).compile())
        return None if sizes is None else sizes.temporary

    def _at(self, free: PyTree, mutable: PyTree, keys: NoiseKeys, args: tuple, kwargs: Kwargs) -> PyTree:
        svi = self._svi

        def loss(free: PyTree) -> jax.Array:
            constrained = svi.constrain_fn(free)  # type: ignore[misc]
            options = {**kwargs, **svi.static_kwargs}
            return loss_by_keys(self._elbo, keys, constrained, mutable, svi.model, svi.guide, args, options)

        return jax.grad(loss)(free)


def moments_of(a: PyTree, b: PyTree, c: PyTree, d: PyTree = None) -> tuple[jax.Array, jax.Array]:
    """Unbiased estimates of the parts of the variance from four gradients, of which b and d may be missing.

    With h = (a + b) / 2 and k = (h + c) / 2, the expectations are

        |a - b|^2 = 2 path,    |h - c|^2 = 2 guide + 3/2 path,    |k - d|^2 = 2 minibatch + 3/2 guide + 11/8 path

    and <k, d> has that of the squared norm of the mean gradient. Without b (no codes) the path part is zero, without d
    (no minibatches) the minibatch part is.

    :return: the four numbers of each array, shape (arrays, 4), and whether all gradients are finite there, (arrays,).
    """
    rows, finite = [], []
    a, b, c, d = (None if g is None else jax.tree.leaves(g) for g in (a, b, c, d))
    for i, (x, z) in enumerate(zip(a, c, strict=True)):  # type: ignore[arg-type]
        y, w = None if b is None else b[i], None if d is None else d[i]
        half = x if y is None else (x + y) / 2
        path = jnp.zeros(()) if y is None else _squared(x - y) / 2
        guide = _squared(half - z) / 2 - 0.75 * path
        last, mean = (z, half) if w is None else (w, (half + z) / 2)
        minibatch = jnp.zeros(()) if w is None else (_squared(mean - w) - 1.5 * guide - 1.375 * path) / 2
        rows.append(jnp.stack([path, guide, minibatch, _inner(mean, last)]))
        finite.append(jnp.stack([jnp.isfinite(g).all() for g in (x, y, z, w) if g is not None]).all())
    return jnp.stack(rows), jnp.stack(finite)


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.vdot(x.astype(wide), y.astype(wide)).real


def _squared(x: jax.Array) -> jax.Array:
    return _inner(x, x)


reduce_gradients = jax.jit(moments_of)


class _Sampler:
    """Draws replicates at one state."""

    def __init__(self, svi: SVI, svi_state: SVIState, pool: list[tuple], kwargs: Kwargs, key: Key | None) -> None:
        self._gradient = Gradient(svi)
        self._svi, self._state, self._pool, self._kwargs = svi, svi_state, pool, kwargs
        free = svi.optim.get_params(svi_state.optim_state)
        named = named_leaves(free)
        if not named:
            raise ValueError(
                "there is no gradient: neither model nor guide has a parameter. Use a guide with parameters, for "
                "example AutoNormal(model)."
            )
        self.names, self.sizes = [name for name, _ in named], [int(np.size(leaf)) for _, leaf in named]
        self._sites = [site for site, _ in site_leaves(free)]
        _check_shapes(pool)
        options = {**kwargs, **svi.static_kwargs}
        params, mutable = svi.get_params(svi_state), svi_state.mutable_state
        self._plates = draws_minibatches(svi, params, mutable, pool[0], options)
        self._codes = isinstance(svi.loss, RAD_ELBO)
        self._separate = Gradient(svi, _for_another_program(svi.loss)) if self._plates else self._gradient
        own = svi_state.rng_key  # keys of its kind make the program that trains, whose plan is known
        self._stream = jax.random.fold_in(own, _TAG) if key is None else _jax.key_like(key, own)
        words = np.asarray(jax.random.bits(jax.random.fold_in(self._stream, _TAG), (4,), jnp.uint32))
        self._choice = np.random.default_rng(words.tolist())
        self._keys = jax.jit(_keys, static_argnums=2)
        self._drawn = 0

    def block_names(self, blocks: str | Callable[[str], str]) -> list[str]:
        """The block of each parameter array."""
        if callable(blocks):
            return [str(blocks(name)) for name in self.names]
        return self.names if blocks == "parameter" else self._sites

    def replicate(self) -> np.ndarray:
        """The four numbers of each parameter array from one replicate, shape (arrays, 4)."""
        keys = self._keys(self._stream, self._drawn, self._plates)
        self._drawn += 1
        here, there = (self._pool[i] for i in self._choice.integers(len(self._pool), size=2))
        at = partial(self._separate, self._state)
        a = at(keys["a"], here, self._kwargs)
        b = at(keys["b"], here, self._kwargs) if self._codes else None
        c = at(keys["c"], here, self._kwargs)
        d = at(keys["d"], there, self._kwargs) if self._plates or len(self._pool) > 1 else None
        parts = self._checked(*reduce_gradients(a, b, c, d))
        if self._plates and self._codes:
            del a, b, c, d
            a, b = (self._gradient(self._state, keys[name], here, self._kwargs) for name in ("path", "other path"))
            parts[:, PATH] = self._checked(*reduce_gradients(a, b, b))[:, PATH]
        return parts

    def _checked(self, parts: Any, finite: Any) -> np.ndarray:
        parts, finite = np.array(parts, np.float64), np.asarray(finite)
        if not finite.all():
            bad = ", ".join(name for name, good in zip(self.names, finite, strict=True) if not good)
            raise ValueError(
                f"gradient_variance: the gradient in {bad} is not finite in replicate {self._drawn}: there is no "
                "variance to measure. Look at the loss (svi.evaluate), the data and the parameters."
            )
        if not np.isfinite(parts).all():
            bad = ", ".join(n for n, row in zip(self.names, parts, strict=True) if not np.isfinite(row).all())
            raise ValueError(
                f"gradient_variance: the square of the gradient in {bad} overflows; scale the loss, for example with "
                "numpyro.handlers.scale, or use double precision."
            )
        return parts

    def costs(self, randomized_only: bool) -> tuple[dict[str, float], dict[str, int]]:
        """Seconds (median of interleaved calls) and temporary bytes of one gradient, exact and randomized."""
        gradients = {}
        if not (self._codes and randomized_only):
            gradients["exact"] = Gradient(self._svi, self._svi.loss.base) if self._codes else self._gradient
        if self._codes:
            gradients["randomized"] = self._gradient
        key = self._stream
        case = (self._state, NoiseKeys(key, None, key), self._pool[0], self._kwargs)
        sizes = {name: gradient.temporary_bytes(*case) for name, gradient in gradients.items()}
        memory = {name: size for name, size in sizes.items() if size is not None}
        times: dict[str, list[float]] = {name: [] for name in gradients}
        for i in range(_TIMINGS + 1):
            for name, gradient in gradients.items():
                begin = time.perf_counter()
                jax.block_until_ready(gradient(*case))
                if i > 0:  # the first one compiles
                    times[name].append(time.perf_counter() - begin)
        return {name: float(np.median(t)) for name, t in times.items()}, memory


def _keys(stream: Key, number: ArrayLike, plates: bool) -> dict[str, NoiseKeys]:
    """Keys of the gradients of one replicate."""
    key = jax.random.split(jax.random.fold_in(stream, number), 12)
    m, other_m = (key[0], key[1]) if plates else (None, None)
    return {
        "a": NoiseKeys(key[2], m, key[5]),
        "b": NoiseKeys(key[2], m, key[6]),
        "c": NoiseKeys(key[3], m, key[7]),
        "d": NoiseKeys(key[4], other_m, key[8]),
        "path": NoiseKeys(key[9], None, key[10]),  # minibatch and guide from one key: the program of the training
        "other path": NoiseKeys(key[9], None, key[11]),
    }


def _check_shapes(pool: list[tuple]) -> None:
    """All batches have the structure and the shapes of the first."""

    def shapes(batch: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(batch)
        return [(x.shape, str(x.dtype)) if hasattr(x, "dtype") else type(x) for x in leaves], treedef

    for i, batch in enumerate(pool[1:]):
        if not isinstance(batch, (tuple, list)):
            raise ValueError(
                f"batches[{i}] is not a tuple of arguments of model and guide: write batches=[(x, y), ...]."
            )
        if shapes(tuple(batch)) != shapes(pool[0]):
            raise ValueError(
                f"batches[{i}] has other shapes than the arguments: {shapes(tuple(batch))[0]}, not "
                f"{shapes(pool[0])[0]}. Gradients of batches that differ in size do not have one variance; leave the "
                "last, smaller one out."
            )


def _for_another_program(elbo: ELBO) -> ELBO:
    """``elbo``, such that it can plan a program that its plan or calibration was not made for.

    What guide and minibatch add does not depend on the plan.
    """
    if not isinstance(elbo, RAD_ELBO):
        return elbo
    return elbo.replace(calibration=None) if elbo.planner.plan is None else RAD_ELBO(base=elbo.base)


@contextlib.contextmanager
def _quiet():
    """Without the word about a budget that is too small: here it is measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VarianceWarning)
        yield


class _Moments:
    """Running means and covariances of the four numbers of each block and of all together (Welford 1962).

    :ivar count: number of replicates.
    """

    def __init__(self, of: Sequence[str], sizes: Sequence[int]) -> None:
        """The block and the size of each parameter array."""
        self.names = ["total", *dict.fromkeys(of)]
        members = np.array([[True] * len(of), *([own == name for own in of] for name in self.names[1:])])
        self.sizes = (members @ np.array(sizes)).tolist()
        self._members = members.astype(float)  # (blocks, arrays)
        self.count = 0
        self._mean = np.zeros((len(self.names), 4))
        self._comoment = np.zeros((len(self.names), 4, 4))

    def add(self, parts: np.ndarray) -> None:
        """One replicate: the numbers of each array, shape (arrays, 4)."""
        rows = self._members @ parts
        self.count += 1
        before = rows - self._mean
        self._mean += before / self.count
        self._comoment += before[:, :, None] * (rows - self._mean)[:, None, :]

    def of(self, block: int, columns: Sequence[int]) -> tuple[float, np.ndarray]:
        """Mean of the sum of some columns, and as a vector their weights in it."""
        weights = np.zeros(4)
        weights[list(columns)] = 1.0
        return float(self._mean[block] @ weights), weights

    def covariance_of_mean(self, block: int) -> np.ndarray:
        """Of the mean of the four numbers, shape (4, 4)."""
        return self._comoment[block] / (self.count - 1) / self.count

    def estimate(self, block: int, *columns: int) -> Estimate:
        """Sum of some columns."""
        value, weights = self.of(block, columns)
        return Estimate(value, math.sqrt(max(weights @ self.covariance_of_mean(block) @ weights, 0.0)))

    def ratio(self, over: Sequence[int], under: Sequence[int]) -> tuple[Estimate, tuple[float, float]]:
        """Ratio of two sums of columns of the total, with its standard error and its 95 % interval (Fieller)."""
        (x, first), (y, second) = self.of(0, over), self.of(0, under)
        covariance = self.covariance_of_mean(0)
        xx, xy, yy = (float(p @ covariance @ q) for p, q in ((first, first), (first, second), (second, second)))
        if x == 0 and xx == 0:
            return Estimate(0.0, 0.0), (0.0, 0.0)
        if y == 0:
            return Estimate(math.copysign(math.inf, x), math.nan), (0.0, math.inf)
        value = x / y
        error = math.sqrt(max(xx - 2 * value * xy + value**2 * yy, 0.0)) / abs(y)
        t2 = float(stdtrit(self.count - 1, 0.975)) ** 2
        square, linear, constant = y * y - t2 * yy, x * y - t2 * xy, x * x - t2 * xx
        root = linear * linear - square * constant
        if square <= 0 or root < 0:  # the denominator may be zero: any ratio is possible
            return Estimate(value, error), (0.0, math.inf)
        low, high = ((linear + sign * math.sqrt(root)) / square for sign in (-1, 1))
        return Estimate(value, error), (max(low, 0.0), high)

    def still_needed(self, relative_error: float) -> int:
        """So many further replicates reach the relative error of the total and of ρ, by those that there are."""
        total, (rho, _) = self.estimate(0, *_PARTS), self.ratio((PATH,), (GUIDE, MINIBATCH))
        floor = 1e-9 * abs(self.of(0, (NORM,))[0])  # what rounding leaves of a gradient without noise
        reached = [total.standard_error / max(abs(total.value), floor, 1e-300)]
        if rho.value != 0 and total.value > floor and math.isfinite(rho.value):
            reached.append(rho.standard_error / abs(rho.value))
        share = max(reached) / relative_error
        wanted = min(1.1 * self.count * share**2, 4.0 * self.count)
        return 0 if share <= 1 else max(math.ceil(wanted) - self.count, 4)


def _result(
    moments: _Moments, predicted: float | None, seconds: dict[str, float], memory: dict[str, int]
) -> GradientVariance:
    found = [
        BlockVariance(
            name,
            moments.sizes[i],
            minibatch=moments.estimate(i, MINIBATCH),
            guide=moments.estimate(i, GUIDE),
            path=moments.estimate(i, PATH),
            total=moments.estimate(i, *_PARTS),
            squared_norm=moments.estimate(i, NORM),
        )
        for i, name in enumerate(moments.names)
    ]
    rho, interval = moments.ratio((PATH,), (GUIDE, MINIBATCH))
    exact = moments.of(0, (GUIDE, MINIBATCH))[0]
    variances = {"exact": exact, "randomized": moments.of(0, _PARTS)[0]}
    return GradientVariance(
        total=found[0],
        blocks=tuple(found[1:]),
        rho=rho,
        rho_interval=interval,
        predicted_rho=predicted,
        signal_to_noise=moments.ratio((NORM,), _PARTS)[0],
        noise_scale=moments.ratio(_PARTS, (NORM,))[0],
        draws=moments.count,
        seconds=seconds,
        temporary_bytes=memory,
        efficiency=_relative_efficiency(variances, seconds),
        memory_efficiency=_relative_efficiency(variances, memory),
    )


def _relative_efficiency(variances: dict[str, float], prices: Mapping[str, float]) -> dict[str, float]:
    """1 / (variance x price), relative to that of the exact gradient; nothing where it was not measured."""
    if "exact" not in prices or variances["exact"] <= 0:
        return {}
    work = {name: variances[name] * price for name, price in prices.items()}
    return {name: work["exact"] / w if w > 0 else math.inf for name, w in work.items()}
