"""Have the iterates of a fit converged?

With a constant learning rate the parameters of SVI end up in a stationary random process around the optimum, so the
tools of Markov chains apply to them: split R-hat says whether the process is stationary, and the Monte Carlo standard
error of its mean,

    MCSE  =  spread / sqrt(effective sample size),

whether it was watched for long enough. :class:`Iterates` remembers what that takes, random projections of the
parameters. The mean of a stationary process is nearer to the optimum than any one iterate: :class:`IterateAverage`.

**References:** Dhaka, Catalina, Andersen, Magnusson, Huggins, Vehtari, *Robust, Accurate Stochastic Optimization for
Variational Inference*, NeurIPS 2020. Welandawe, Andersen, Vehtari, Huggins, *A Framework for Improving the Reliability
of Black-box Variational Inference*, arXiv 2203.15945: several windows, a least effective sample size.
"""

from __future__ import annotations

import base64
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_rad.ad import seeds
from numpyro_rad.annotations import PyTree

PROJECTIONS = 64

R_HAT_LIMIT = 1.1

R_HAT_ANYWHERE = 1.3  # of the windows that are not judged: the judged one is picked, and chance has a share in that

MCSE_LIMIT = 0.25  # of the slowest projection: 16 independent iterates

_WINDOWS = 0.5, 0.65, 0.8  # shares of the iterates, the last ones, of which the most stationary is judged

_FASTEST = 0.25  # share of the projections that have to be known to the tolerance: those that move fastest

_STREAM = 0x736B6574  # of the hash that signs and places the entries of a sketch

_CAPACITY = 1024  # rows; after a thinning the judged half still has 256, enough for an MCSE of 0.1 in every column

_FEWEST_ROWS = 100  # half of them may be judged, split in two: below that, chance alone moves R-hat past its limit

_PERIOD = 4096  # entries that far apart in one array share their place in a sketch


class Iterates:
    """What is remembered of the iterates of a fit to judge whether they have converged: random projections and losses.

    The parameters are projected onto 64 numbers by a count-sketch, each entry with a random sign into one random
    bucket: one pass over the parameters, and squared distances are kept on average. A drift of a few parameters
    competes with 1/64 of all the noise, in its own bucket, where a dense projection would add up all of it; one that is
    far below the noise of its bucket is not seen. The loss is judged beside the projections.

    The rule is that of Dhaka et al. 2020 with refinements. Judged are the last 50, 65 or 80 % of the iterates,
    whichever have the smallest R-hat, the largest over projections and loss. They are *stationary* if it is below 1.1,
    and below 1.3 for the other two shares, and have *converged* if, besides, the relative MCSE is below 0.25 in every
    projection and below a tolerance, 0.1, in the quarter where it is smallest. MCSE is relative to the spread of the
    iterates, since a projection has no unit: 0.1 means 100 independent iterates, 0.25 means 16. An optimizer has slow
    directions and fast ones (scales of a guide and its locations, say): sixteen turns of the slow ones tell that they
    move about one place, and while those pass, hundreds of the fast ones do, so that a drift is seen. The theory is for
    a constant learning rate: where it decays, iterates that hardly move may be far from the optimum.

    How reliable that is, in traces of 10,000 steps where it is asked every 200 (``tests/stats/traces.py``; 30 traces of
    4 projections, 6 of 64; a false alarm is a stop while some projection is still a spread away from where it goes;
    none: most did not stop):

    ::

        | trace                              | false alarms, 4 | 64    | stops at step, 4 | 64    |
        | independent                        |                 |       | 1,400            | 1,200 |
        | AR(1), 20 steps                    |                 |       | 2,600            | 2,600 |
        | AR(1), 60 steps                    |                 |       | 7,000            | 6,200 |
        | AR(1), half 4 and half 150 steps   |                 |       | 3,400            | 7,800 |
        | heavy tails (Student t, 2 degrees) |                 |       | 1,400            | 1,200 |
        | fast periodic                      |                 |       | 3,800            | 3,400 |
        | transient, 300 steps               | 0 %             | 0 %   | 3,200            | 3,200 |
        | transient, 1000 steps              | 0 %             | 0 %   | 5,600            | 6,200 |
        | transient, 2500 steps, in one      | 0 %             | 0 %   | none             | none  |
        | step at 900                        | 0 %             | 0 %   | 3,200            | 3,000 |
        | drift, 10 spreads                  | 0 %             | 0 %   | none             | none  |
        | drift, 20 spreads, in one          | 0 %             | 0 %   | none             | none  |
        | drift, 10 spreads, in one          | 20 %            | 50 %  | none             | none  |
        | staircase, in one                  | 0 %             | 0 %   | none             | none  |
        | slow periodic                      | 0 %             | 0 %   | none             | none  |
        | random walk                        | 0 %             | 0 %   | none             | none  |
        | random walk in one, below noise    | 70 %            | 100 % | none             | none  |

    What it cannot see is a motion that is small against the spread of the iterates for as long as it watches them, as
    in two of these kinds. A linear regression with five latent variables, ``AutoNormal`` and Adam stops after 3,200
    steps at a learning rate of 0.03, and after 6,600 at 0.01, where its slowest scale settles at 3,500 (medians of 8
    seeds).

    Memory is bounded, about half a MiB: whenever 1024 rows are full every second one is dropped, and from then on only
    every second step is recorded. Which steps are kept depends on nothing but their numbers.

    :param every: record steps whose number is a multiple of this.
    :raises ValueError: if ``every`` is not positive.

    Example::

        iterates = Iterates()
        for step in range(num_steps):
            state, loss = update(state)
            if iterates.wants(step):
                iterates.record(step, svi.optim.get_params(state.optim_state), loss)
        iterates.converged()
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every={every}: steps are recorded at multiples of it; use 1 or more.")
        self.stride = every
        self.steps = np.zeros(0, np.int64)
        self.rows = np.zeros((0, PROJECTIONS + 1))  # projections, then the loss

    def __len__(self) -> int:
        return len(self.steps)

    @staticmethod
    def sketch(params: PyTree, seed: int = 0) -> jax.Array:
        """Projections of unconstrained parameters, to be called under ``jax.jit`` (inside ``lax.scan``, for example).

        :param params: a pytree of arrays, as from ``svi.optim.get_params(svi_state.optim_state)``.
        :param seed: other projections for another one.
        :return: array of shape (64,). Linear in ``params``; its squared norm is that of ``params`` on average over
            seeds.

        Entries whose positions in one array differ by a multiple of 4096 share a bucket (not a sign). So nearly all of
        the work is a sum over an axis, which compiles to one loop, where a scatter takes several times as long.
        """
        words = seeds.fold(np.asarray([_STREAM, 0], np.uint32), seed)
        leaves = [jnp.ravel(x) for x in jax.tree.leaves(params)]
        total = jnp.zeros(PROJECTIONS, jnp.result_type(jnp.float32, *(x.dtype for x in leaves)))
        for i, leaf in enumerate(leaves):
            whole = leaf.size // _PERIOD * _PERIOD
            parts = leaf[:whole].reshape(-1, _PERIOD), leaf[whole:].reshape(1, -1)
            for j, part in enumerate(parts):
                if not part.size:
                    continue
                bits = seeds.hash_words(seeds.fold(words, i, j), seeds.linear_index(part.shape))
                signed = jnp.where(bits >> seeds.u32(31) == 0, part, -part).astype(total.dtype)
                place_seed = seeds.fold(words, i, len(parts) + j)
                places = seeds.hash_words(place_seed, seeds.linear_index(part.shape[1:])) >> seeds.u32(26)  # below 64
                total = total.at[places.astype(jnp.int32)].add(signed.sum(0))
        return total

    def wants(self, step: int) -> bool:
        """Whether this step is to be recorded; what else :meth:`record` is given it drops."""
        return step % self.stride == 0

    def record(self, step: ArrayLike, sketch: ArrayLike, loss: ArrayLike) -> None:
        """Remember an iterate, or many at once.

        :param step: number of steps taken, an int or an array of shape (n,), increasing from call to call.
        :param sketch: as from :meth:`sketch`, shape (64,) or (n, 64), or the dictionary of unconstrained parameters.
        :param loss: of that step, shape () or (n,).
        :raises ValueError: for shapes that do not fit or steps that do not increase; nothing is recorded then.
        """
        if isinstance(sketch, dict):
            sketch = _jitted_sketch(sketch)
        steps = np.atleast_1d(np.asarray(step, np.int64))
        row = np.column_stack([np.atleast_2d(np.asarray(sketch, float)), np.asarray(loss, float).reshape(-1, 1)])
        if row.shape != (len(steps), PROJECTIONS + 1):
            raise ValueError(
                f"record: {len(steps)} steps need sketches of shape ({len(steps)}, {PROJECTIONS}) and as many losses, "
                f"got shapes {np.shape(sketch)} and {np.shape(loss)}. Pass Iterates.sketch(params) of each step."
            )
        if np.any(np.diff(np.concatenate([self.steps[-1:], steps])) <= 0):
            raise ValueError(
                f"record: steps {steps.tolist()[:10]} after {self.steps[-1:].tolist()} do not increase. Start a new "
                "Iterates for a new fit, or restore() the one of the fit that goes on."
            )
        kept = steps % self.stride == 0
        self.steps, self.rows = np.concatenate([self.steps, steps[kept]]), np.vstack([self.rows, row[kept]])
        while len(self) >= _CAPACITY:
            self.stride *= 2
            kept = self.steps % self.stride == 0
            self.steps, self.rows = self.steps[kept], self.rows[kept]

    def r_hat(self) -> float | None:
        """The largest split R-hat, over projections and loss, of the judged iterates.

        Infinite if the last half of the iterates is not finite, None with fewer than 100 recorded.
        """
        return None if len(self) < _FEWEST_ROWS else min((r_hat for r_hat, _ in self._windows()), default=np.inf)

    def mcse(self, quantile: float = 1.0) -> float | None:
        """Monte Carlo standard error of the mean of the judged iterates, relative to their spread.

        Infinite if the last half of the iterates is not finite, None with fewer than 100 recorded.

        :param quantile: over the projections; by default the largest, that of the loss included.
        """
        if len(self) < _FEWEST_ROWS:
            return None
        windows = self._windows()
        if not windows:
            return np.inf
        _, window = min(windows, key=lambda pair: pair[0])
        moving = _moves(window)
        errors = 1 / np.sqrt(effective_sample_size(window[:, moving]))
        if quantile < 1 and len(errors) > 1 and moving[-1]:
            errors = errors[:-1]  # losses of neighbouring steps have little in common, whatever the parameters do
        return float(np.quantile(errors, quantile)) if len(errors) else 0.0

    def stationary(self) -> bool:
        """Whether R-hat is below 1.1: from here on the mean of the iterates is better than the last one."""
        r_hats = [r_hat for r_hat, _ in self._windows()]
        return bool(r_hats) and min(r_hats) < R_HAT_LIMIT and max(r_hats) < R_HAT_ANYWHERE

    def converged(self, tolerance: float = 0.1) -> bool:
        """Whether the iterates are stationary and watched for long enough.

        :param tolerance: of the relative MCSE in the quarter of the projections where it is smallest; in all of them it
            has to be below 0.25, or below the tolerance if that is larger.
        """
        if not self.stationary():
            return False
        slowest, fast = self.mcse(), self.mcse(_FASTEST)
        assert slowest is not None and fast is not None
        return slowest < max(MCSE_LIMIT, tolerance) and fast < tolerance

    def describe(self, tolerance: float = 0.1) -> str:
        """The numbers that :meth:`converged` goes by and their limits, in words."""
        slowest, fast = self.mcse(), self.mcse(_FASTEST)
        r_hats = [r_hat for r_hat, _ in self._windows()]
        if slowest is None or fast is None:
            return f"{len(self)} iterates were recorded, and it takes {_FEWEST_ROWS} to judge them"
        if not r_hats:
            return "some of the last half of the iterates are NaN or infinite"
        return (
            f"the largest split R-hat is {min(r_hats):.3g} (has to be below {R_HAT_LIMIT}; {max(r_hats):.3g} in the "
            f"worst window, below {R_HAT_ANYWHERE}), the relative MCSE {slowest:.2g} in the slowest projection (below "
            f"{max(MCSE_LIMIT, tolerance):.2g}) and {fast:.2g} in the fastest quarter of them (below {tolerance:.2g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, as what ``json.dumps`` takes; :meth:`restore` gives the same to the bit."""
        return {
            "stride": self.stride,
            "steps": self.steps.tolist(),
            "rows": base64.b64encode(self.rows.astype("<f8").tobytes()).decode(),
        }

    @classmethod
    def restore(cls, data: dict[str, Any]) -> Iterates:
        """The iterates that :meth:`to_dict` took apart.

        :raises ValueError: if ``data`` is not from there.
        """
        try:
            restored = cls(data["stride"])
            restored.steps = np.asarray(data["steps"], np.int64)
            rows = np.frombuffer(base64.b64decode(data["rows"], validate=True), "<f8").astype(float)
            restored.rows = rows.reshape(len(restored), PROJECTIONS + 1)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"this is not what Iterates.to_dict() gave: {error!r}. Start a new Iterates if it is lost."
            ) from error
        return restored

    def _windows(self) -> list[tuple[float, np.ndarray]]:
        """The last iterates, more and less of them, with their largest R-hat; no window that is not finite."""
        if len(self) < _FEWEST_ROWS:
            return []
        windows = [self.rows[int(len(self) * (1 - share)) :] for share in _WINDOWS]
        finite = [window for window in windows if np.isfinite(window).all()]
        return [(float(split_r_hat(window[:, _moves(window)]).max(initial=1.0)), window) for window in finite]


_jitted_sketch = jax.jit(Iterates.sketch)


def _moves(window: np.ndarray) -> np.ndarray:
    """Which columns vary by more than rounding in single precision does."""
    return window.std(0) > 4 * np.finfo(np.float32).eps * np.abs(window).max(0)


def split_r_hat(chain: np.ndarray) -> np.ndarray:
    """Split R-hat of each column: sqrt of the variance, pooled over both halves, over that within them.

    :param chain: shape (draws, columns), at least 4 draws; a first odd one is dropped.
    :return: shape (columns,); near 1 for a stationary chain.

    **Reference:** Gelman et al., *Bayesian Data Analysis*, third edition, section 11.4.
    """
    half = len(chain) // 2
    halves = chain[len(chain) - 2 * half :].reshape(2, half, -1)
    within = halves.var(1, ddof=1).mean(0)
    between = halves.mean(1).var(0, ddof=1)
    with np.errstate(divide="ignore"):
        return np.sqrt((half - 1) / half + between / within)


def effective_sample_size(chain: np.ndarray) -> np.ndarray:
    """Independent draws whose mean would be as precise as that of each column, draws / (1 + 2 sum of correlations).

    The sum stops where a pair of neighbouring correlations is negative and pairs may not increase (Geyer, *Practical
    Markov Chain Monte Carlo*, Statistical Science 1992).

    :param chain: shape (draws, columns), each column not constant.
    :return: shape (columns,).
    """
    draws = len(chain)
    centred = chain - chain.mean(0)
    spectrum = np.fft.rfft(centred, 2 * draws, axis=0)
    covariance = np.fft.irfft(np.abs(spectrum) ** 2, axis=0)[: draws // 2 * 2]
    pairs = (covariance / covariance[0]).reshape(draws // 2, 2, chain.shape[1]).sum(1)
    pairs = np.minimum.accumulate(np.maximum(pairs, 0), axis=0)  # the first that is negative ends the sum
    return draws / np.maximum(2 * pairs.sum(0) - 1, 1 / np.log10(draws))


class IterateAverage(NamedTuple):
    """Running mean of iterates, a pytree: costs one copy of the parameters and one pass over them for each update.

    Once :meth:`Iterates.stationary` says so, start it, and update it after every step.

    :ivar mean: of the unconstrained parameters, in at least single precision.
    :ivar count: number of iterates in it.

    Example::

        average = IterateAverage.start(svi.optim.get_params(state.optim_state))
        average = average.update(svi.optim.get_params(state.optim_state))  # jittable
        params = svi.constrain_fn(average.mean)
    """

    mean: PyTree
    count: jax.Array

    @classmethod
    def start(cls, params: PyTree) -> IterateAverage:
        """The mean of one iterate."""
        mean = jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)), params)
        return cls(mean, jnp.ones((), jnp.int32))

    def update(self, params: PyTree) -> IterateAverage:
        """The mean with one more iterate."""
        count = self.count + 1
        mean = jax.tree.map(lambda m, x: m + (x.astype(m.dtype) - m) / count.astype(m.dtype), self.mean, params)
        return IterateAverage(mean, count)
