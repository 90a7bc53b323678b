"""Plans name lines of the user's own program, wherever that program is."""

import linecache
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from IPython.core.compilerop import CachingCompiler
from numpyro.contrib.module import flax_module
from numpyro.infer import SVI, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import Adam

from numpyro_rad import RAD_ELBO, Keep, StochasticRound, explain

PROGRAM = """\
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

def model(x, y):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([4, 64]).to_event(2))
    v = numpyro.sample("v", dist.Normal(0, 1).expand([64]).to_event(1))
    h = jnp.tanh(x @ w)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(h @ v, 1.0), obs=y)
"""
LAYER = 1 + PROGRAM.splitlines().index("    h = jnp.tanh(x @ w)")

X, Y = jnp.linspace(-1.0, 1.0, 512).reshape(128, 4), jnp.zeros(128)


def model_in(name, on_disk):
    """The model of a program of that name, as an import, a notebook or ``exec`` makes it."""
    if on_disk:
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_text(PROGRAM)
    else:
        linecache.cache[name] = len(PROGRAM), None, PROGRAM.splitlines(True), name
    program = {}
    exec(compile(PROGRAM, str(name), "exec"), program)
    return program["model"]


def rows(elbo, model, *args):
    svi = SVI(model, AutoNormal(model), Adam(0.01), elbo)
    params = svi.get_params(svi.init(jax.random.key(0), *args))
    return explain(elbo, jax.random.key(1), params, svi.model, svi.guide, *args).rows


def lines(elbo, model, *args):
    return {row.line for row in rows(elbo, model, *args)}


@pytest.mark.parametrize(
    "place",
    (
        "network.py",
        "numpyro/examples/network.py",  # a folder that is called as the library is
        "jax/network.py",
        "numpyro_rad/network.py",
        "<ipython-input-3-0123456789ab>",
        "/ipykernel_17/network.py",
        "<string>",
    ),
)
def test_lines_of_a_model_through_the_elbo(place, tmp_path, encode_all):
    on_disk = place.endswith(".py") and not place.startswith("/")
    model = model_in(tmp_path / place if on_disk else place, on_disk)
    short = place.rsplit("/")[-1]
    found = lines(RAD_ELBO(codec=StochasticRound(4)), model, X, Y)
    assert f"{short}:{LAYER}" in found
    assert all(line == "" or line.startswith(f"{short}:") for line in found)


def test_lines_with_another_base(encode_all, tmp_path):
    model = model_in(tmp_path / "a" / "network.py", True)
    found = lines(RAD_ELBO(base=TraceMeanField_ELBO(), codec=StochasticRound(4)), model, X, Y)
    assert f"network.py:{LAYER}" in found and not any(line.startswith("elbo.py") for line in found)


def test_a_line_of_a_model_is_overridden(encode_all, tmp_path):
    model = model_in(tmp_path / "a" / "network.py", True)
    line = f"network.py:{LAYER}"
    coded = rows(RAD_ELBO(codec=StochasticRound(4)), model, X, Y)
    exact = rows(RAD_ELBO(codec=StochasticRound(4), overrides={line: Keep()}), model, X, Y)
    at_line = [[r.relative_variance for r in found if r.line == line] for found in (coded, exact)]
    assert any(v > 0 for v in at_line[0]) and at_line[1] and not any(at_line[1])


def test_layers_of_other_libraries_are_named_by_the_line_that_calls_them(encode_all):
    def model(x, y):
        network = flax_module("network", nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(1)]), input_shape=(4,))
        mean = network(x)[:, 0]  # the line
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    first = model.__code__.co_firstlineno
    found = lines(RAD_ELBO(codec=StochasticRound(4)), model, X, Y)
    assert f"test_lines.py:{first + 2}" in found
    assert all(line == "" or line.startswith("test_lines.py:") for line in found)


def test_layers_of_other_libraries_without_a_file_of_the_users(encode_all):
    """Where nothing but installed packages is on the stack, their innermost line is better than none."""
    from numpyro_rad.ad import _jax

    closed = jax.make_jaxpr(lambda x: jnp.sin(x))(1.0)
    (equation,) = closed.jaxpr.eqns
    installed = _jax._INSTALLED
    try:
        _jax._INSTALLED = (*installed, __file__)
        assert _jax.source_line(equation).startswith("test_lines.py:")
    finally:
        _jax._INSTALLED = installed


def test_a_cell_of_a_notebook_has_its_own_name(encode_all, monkeypatch):
    """As the notebook shows it, which is also what a rule of ``overrides=`` may name."""
    shell = types.SimpleNamespace(compile=CachingCompiler())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    program = {}
    exec(compile(PROGRAM, shell.compile.cache(PROGRAM, 4), "exec"), program)
    assert f"In[4]:{LAYER}" in lines(RAD_ELBO(codec=StochasticRound(4)), program["model"], X, Y)
