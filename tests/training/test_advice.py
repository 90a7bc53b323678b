"""Advice before a fit: what is compiled, what is said, and that nothing is changed by it."""

import dataclasses
import sys
from functools import partial

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import network_regression, wave
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_rad import RAD_ELBO, RAD_SVI, advise
from numpyro_rad.__main__ import main
from numpyro_rad.planning.worth import Option, recommended

EXACT = Option("Trace_ELBO()", 80 * 2**20, None, 1.0, 5.0, 0.0)


def better(**changes):
    ours = Option("RAD_ELBO()", 8 * 2**20, 6 * 2**20, 1.02, 9.0, 0.01)
    return dataclasses.replace(ours, **changes)


@pytest.mark.parametrize(
    "options, words",
    (
        ((EXACT, better()), "Use RAD_ELBO(): its step takes 8.0 MiB, 10.0 times less than the 80.0 MiB of Trace_ELBO(),"
         " at 1.02 times its time, and adds 1 % to the variance of the gradient."),
        ((EXACT, better(added_variance=0.0, seconds=None)), "with an exact gradient."),
        ((EXACT, better(added_variance=0.2)), "If memory is what you lack, RAD_ELBO() takes 8.0 MiB"),
        ((EXACT, better(seconds=1.5)), "Use Trace_ELBO() here: its step takes 80.0 MiB, that of RAD_ELBO() 8.0"),
        ((EXACT, better(temporary_bytes=70 * 2**20)), "its step takes 80.0 MiB, that of RAD_ELBO() 70.0 MiB."),
        ((EXACT, better(added_variance=12.0), better(added_variance=20.0)), "nothing takes much less for nothing."),
        ((dataclasses.replace(EXACT, temporary_bytes=2**19), better()), "its step takes 512.0 KiB, which is not worth"),
        ((dataclasses.replace(EXACT, note="does not fit"), better()), "Trace_ELBO() does not fit; RAD_ELBO() does"),
        ((dataclasses.replace(EXACT, note="does not fit"), better(note="does not fit")), "try a smaller minibatch"),
    ),
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)  # fmt: skip
def test_what_is_recommended(options, words):
    chosen, sentence = recommended(options)
    assert words in sentence
    assert chosen.loss in sentence and chosen in options
    assert (chosen is options[0]) == (f"Use {options[0].loss}" in sentence or "Neither" in sentence)


def fit(width, points, loss=None, of=SVI):
    model = partial(network_regression, hidden=(width, width))
    svi = of(model, AutoNormal(model, init_scale=0.05), optax.adam(1e-3), loss or Trace_ELBO())
    return svi, wave(points)


@pytest.mark.slow
def test_a_small_model_needs_nothing():
    svi, data = fit(4, 16)
    state = svi.init(jax.random.key(0), *data)
    found = advise(svi, state, *data, repeats=1)
    assert [o.loss for o in found.options] == ["Trace_ELBO()", "RAD_ELBO()"] and found.chosen is found.options[0]
    compiled = jax.jit(svi.update).lower(state, *data).compile().memory_analysis()
    assert found.options[0].temporary_bytes == compiled.temp_size_in_bytes
    assert str(found).endswith("which is not worth saving.") and "compile" in str(found)
    assert isinstance(svi.loss, Trace_ELBO) and svi.update(state, *data)


@pytest.mark.slow
def test_a_large_model_is_given_a_budget():
    base = TraceMeanField_ELBO()
    svi, data = fit(128, 8192, RAD_ELBO(base=base, memory_budget="64MiB"), RAD_SVI)
    state = SVI.init(svi, jax.random.key(0), *data)
    before = svi.loss.planner
    found = advise(svi, state, *data, budgets=("2MiB", "1kB"), repeats=0)
    exact, default, small, impossible = found.options
    assert exact.loss == "TraceMeanField_ELBO()" and default.loss == "RAD_ELBO(base=TraceMeanField_ELBO())"
    assert small.loss == "RAD_ELBO(base=TraceMeanField_ELBO(), memory_budget='2MiB')"
    assert small.held_bytes <= 2 * 2**20 and exact.held_bytes is None
    assert impossible.note.startswith("not possible below ")
    assert found.chosen.loss in found.sentence
    assert svi.loss.planner is before


@pytest.mark.slow
def test_what_does_not_fit_is_an_answer(monkeypatch):
    svi, data = fit(4, 16)
    state = svi.init(jax.random.key(0), *data)
    update = SVI.update

    def out_of_memory(self, *args, **kwargs):
        if isinstance(self.loss, RAD_ELBO):
            return update(self, *args, **kwargs)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(SVI, "update", out_of_memory)
    found = advise(svi, state, *data, budgets=(), repeats=1)
    assert "Trace_ELBO() does not fit; RAD_ELBO() does" in found.sentence and found.options[0].seconds is None
    monkeypatch.setattr(
        SVI, "update", lambda *a, **k: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: something else"))
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        advise(svi, state, *data)


def test_models_that_look_at_their_arguments_and_options_that_are_no_arrays():
    def model(x, n=None, name="y"):
        if float(x[0]) > 0 and n == 3:
            numpyro.sample(name, dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    svi = SVI(model, AutoNormal(model), optax.adam(0.1), RAD_ELBO())
    x = np.ones(5, np.float32)
    state = svi.init(jax.random.key(0), x, n=3, name="a b")
    assert advise(svi, state, x, n=3, name="a b", repeats=0).options[1].temporary_bytes is not None


def test_mistakes():
    svi, data = fit(4, 16)
    with pytest.raises(TypeError, match="swapped"):
        advise(svi.init(jax.random.key(0), *data), svi, *data)
    state = svi.init(jax.random.key(0), *data)
    with pytest.raises(ValueError, match="repeats=-1"):
        advise(svi, state, *data, repeats=-1)


def test_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "advised_fit.py").write_text(
        "import jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax\n"
        "from numpyro.infer import SVI, Trace_ELBO\n"
        "from numpyro.infer.autoguide import AutoNormal\n"
        "def model(x):\n"
        "    numpyro.sample('x', dist.Normal(numpyro.sample('z', dist.Normal(0, 1)), 1), obs=x)\n"
        "def fit():\n"
        "    return SVI(model, AutoNormal(model), optax.adam(0.1), Trace_ELBO()), (jnp.ones(3),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["advise", "advised_fit:fit"]) == 0
    assert "Use Trace_ELBO() here" in capsys.readouterr().out
