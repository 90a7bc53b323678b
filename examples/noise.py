"""How noisy is my gradient? One Bayesian neural network within two memory budgets, and the report of each fit.

    python -m examples.noise
    python -m examples.noise --budgets 512KiB,2MiB --steps 1000 --folder reports

The model is that of ``bnn.py`` on scikit-learn's digits. In slices of rows either budget would be met without any
noise; this is about the noise of codes, so there are none (``slices=1``). The smaller budget is too small: its report
says so. What the two reports say is told in ``docs/noise.md``.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from numpyro.infer import init_to_sample
from numpyro.infer.autoguide import AutoNormal

from examples import bnn
from numpyro_rad import RAD_ELBO, RAD_SVI, Tracking
from numpyro_rad.errors import TrackingWarning
from numpyro_rad.training import RAD_SVIRunResult


def main(arguments: list[str] | None = None) -> dict[str, RAD_SVIRunResult]:
    """Fit within each budget, write the reports, and print what they say first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--budgets", default="256KiB,1MiB", help="memory budgets (default: %(default)s)")
    parser.add_argument("--steps", type=bnn.positive_int, default=300, help="of each fit (default: %(default)s)")
    parser.add_argument("--interval", type=bnn.positive_int, default=20, help="steps between two looks at the noise")
    parser.add_argument("--hidden", type=bnn.positive_int, default=256, help="units of a layer (default: %(default)s)")
    parser.add_argument("--layers", type=bnn.positive_int, default=6, help="hidden layers (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the reports go (default: here)")
    options = parser.parse_args(arguments)
    settings, dataset = bnn.parse_arguments(["--hidden", str(options.hidden), "--layers", str(options.layers)])
    model = bnn.make_model(dataset, settings)
    data = jnp.asarray(dataset.x_train), jnp.asarray(dataset.y_train)
    options.folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for budget in options.budgets.split(","):
        guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.03)
        tracking = Tracking(interval=options.interval)
        svi = RAD_SVI(model, guide, optax.adam(3e-3), RAD_ELBO(memory_budget=budget, slices=1), tracking=tracking)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrackingWarning)  # it is in the report
            result = svi.run(jax.random.key(0), options.steps, *data, progress_bar=False)
        results[budget] = result.assess()
        path = options.folder / f"noise_{budget}.html"
        result.report(path)
        result.save(path.with_suffix(".json"))
        print(result.report(format="terminal"))
        print(f"\nReport: {path}\n")
    return results


if __name__ == "__main__":
    main()
