"""Mistakes of callers: each is told at the earliest moment, in words that say what was meant."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO

import numpyro_rad
from numpyro_rad import RAD_ELBO, Checkpoint, Keep, Planner, StochasticRound, Tracking, rad, value_and_grad
from numpyro_rad.mistakes import shown
from numpyro_rad.planning.planner import Options

# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [RAD_ELBO, rad, numpyro_rad.grad, value_and_grad])
def test_options_are_those_of_the_planner(f):
    """One source: what ``help`` and completion show, and what type checkers know, is what ``Planner`` takes."""
    shown = {name: p for name, p in inspect.signature(f).parameters.items() if p.kind is p.KEYWORD_ONLY}
    shown.pop("base", None)
    fields = {field.name: field for field in dataclasses.fields(Planner)}
    assert list(shown) == list(fields)
    assert {n: p.annotation for n, p in shown.items()} == {n: field.type for n, field in fields.items()}
    assert {n: p.default for n, p in shown.items()} == {n: getattr(Planner(), n) for n in fields}
    assert {n: hint.__forward_arg__ for n, hint in Options.__annotations__.items()} == {
        n: field.type for n, field in fields.items()
    }


@pytest.mark.parametrize(
    ("make", "name", "advice"),
    [
        (RAD_ELBO, "memory_buget", "Did you mean memory_budget="),
        (RAD_ELBO, "budget", "Did you mean memory_budget="),
        (RAD_ELBO, "particles", "Did you mean num_particles="),
        (RAD_ELBO, "Codec", "Did you mean codec="),
        (RAD_ELBO, "xyz", "There are .*base=, codec=, memory_budget="),
        (lambda **kw: rad(jnp.sum, **kw), "added_varience", "Did you mean added_variance="),
        (lambda **kw: numpyro_rad.grad(jnp.sum, **kw), "argnum", "Did you mean argnums="),
        (Planner, "override", "Did you mean overrides="),
        (Tracking, "intervall", "Did you mean interval="),
        (lambda **kw: Checkpoint("fit", **kw), "evry", "Did you mean every="),
        (StochasticRound, "bit", "Did you mean bits="),
    ],
)
def test_misspelt_options_name_the_one_that_was_meant(make, name, advice):
    with pytest.raises(TypeError, match=f" has no option {name}=.*{advice}"):
        make(**{name: 1})


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (("64MiB",), TypeError, r"num_particles='64MiB': a number of samples.*RAD_ELBO\(memory_budget="),
        ((1.5,), TypeError, "num_particles=1.5: a number of samples"),
        ((True,), TypeError, "num_particles=True"),
        ((0,), ValueError, "num_particles=0: .* at least 1"),
        ((1, True, "64MiB"), TypeError, "multi_sample_guide='64MiB': True or False"),
    ],
)
def test_arguments_of_numpyros_own(args, error, message):
    for make in (RAD_ELBO, lambda *args: RAD_ELBO(base=Trace_ELBO(*args))):
        with pytest.raises(error, match=message):
            make(*args)
    RAD_ELBO(np.int32(3))


@pytest.mark.parametrize(
    ("elbo", "text"),
    [
        (RAD_ELBO(), "RAD_ELBO()"),
        (RAD_ELBO(8, memory_budget="1MiB"), "RAD_ELBO(num_particles=8, memory_budget='1MiB')"),
        (RAD_ELBO(codec=Keep(), offload=False), "RAD_ELBO(codec=Keep())"),
        (RAD_ELBO(base=TraceMeanField_ELBO(4)), "RAD_ELBO(base=TraceMeanField_ELBO(num_particles=4))"),
        (RAD_ELBO(base=RenyiELBO(alpha=0.5), exact=True), "RAD_ELBO(base=RenyiELBO(alpha=0.5), exact=True)"),
        (RAD_ELBO(overrides={"w*": Keep()}), "RAD_ELBO(overrides={'w*': Keep()})"),
        (Planner(added_variance=0.1), "Planner(added_variance=0.1)"),
    ],
    ids=str,
)
def test_settings_are_shown(elbo, text):
    assert repr(elbo) == text


def test_values_in_messages_are_short():
    state = {"auto_loc": jnp.zeros(1000), "rng_key": jax.random.key(0)}
    assert shown(state) == "a dict of 2 entries"
    assert shown(jnp.zeros((3, 2))) == "a float32 array of shape (3, 2)"
    assert shown(np.zeros(3, np.int32)) == "an int32 array of shape (3,)"
    assert shown(jax.random.key(0)) == "a JAX PRNG key"
    assert shown(print) == "the function print" and shown(Planner) == "the class Planner"
    assert (
        shown("64MiB") == "'64MiB'"
        and shown([1, 2]) == "[1, 2]"
        and shown(list(range(1000))) == "a list of 1000 entries"
    )
    assert shown(object()) == "an object"
