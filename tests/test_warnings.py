"""A whole fit, its report and its files, where every warning is an error: a fresh process, as users start one."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import numpyro_rad

SCRIPT = """
import sys, warnings

with warnings.catch_warnings():  # what other packages say of one another when they are imported
    warnings.simplefilter("ignore")
    import arviz, h5netcdf, numpyro, optax, orbax.checkpoint, tqdm
    from numpyro.infer.autoguide import AutoNormal

import jax, numpy as np, numpyro.distributions as dist
from numpyro_rad import RAD_ELBO, RAD_SVI, Plateau, Tracking, explain, to_arviz

def model(x, y=None):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([3]).to_event(1))
    with numpyro.plate("points", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

x = np.random.default_rng(0).standard_normal((24, 3)).astype(np.float32)
y = x.sum(1)
folder, key = sys.argv[1], jax.random.key(0)
svi = RAD_SVI(model, AutoNormal(model), optax.adam(1e-2), RAD_ELBO(added_variance=0.1), tracking=Tracking(10))
result = svi.run(key, 30, x, y, checkpoint=f"{folder}/run", validate=(x[:6], y[:6]), stop=Plateau(99))
result.assess(x, y, draws=2)
for suffix in ("html", "md", "txt", "json"):
    result.report(f"{folder}/fit.{suffix}")
result.save(f"{folder}/record.json")
str(explain(svi.loss, key, result.params, model, svi.guide, x, y))
data = to_arviz(svi, result, x, y, key=key, num_samples=4, record=result.record)
data.to_netcdf(f"{folder}/fit.nc")
print("done", len(result.losses))
"""


@pytest.mark.slow
def test_a_whole_fit_warns_of_nothing(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    path = os.pathsep.join([str(Path(numpyro_rad.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", str(script), str(tmp_path)]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.split() == ["done", "30"]
    assert "Warning" not in ended.stderr, ended.stderr[-3000:]  # of what cannot be raised: files that were not closed
