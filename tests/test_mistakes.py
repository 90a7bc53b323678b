"""Mistakes of callers: each is told at the earliest moment, in words that say what was meant."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import linear
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoNormal

import numpyro_rad
from numpyro_rad import (
    RAD_ELBO,
    RAD_SVI,
    Checkpoint,
    Keep,
    StochasticRound,
    Tracking,
    explain,
    plan_figure,
    rad,
    value_and_grad,
)
from numpyro_rad.diagnostics import fit_quality, shadow
from numpyro_rad.mistakes import is_key, shown
from numpyro_rad.planning import Planner
from numpyro_rad.planning.planner import Options
from numpyro_rad.training.arguments import check_key

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


# -- RAD_SVI -----------------------------------------------------------------------------------------------------------


X, Y = np.ones((6, 3), np.float32), np.arange(6, dtype=np.float32)
KEY, OPTIM, GUIDE = jax.random.key(0), optax.adam(1e-2), AutoNormal(linear)


def small(**options):
    return RAD_SVI(linear, AutoNormal(linear), OPTIM, **{"tracking": None, **options})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((linear, GUIDE, OPTIM, "64MiB"), r"loss='64MiB' is not an ELBO.*RAD_ELBO\(memory_budget='64MiB'\)"),
        ((linear, GUIDE, OPTIM, 2**20), r"loss=1048576 is not an ELBO.*RAD_ELBO\(memory_budget=1048576\)"),
        ((linear, GUIDE, OPTIM, Planner()), r"loss=Planner\(\) is not an ELBO"),
        ((linear, GUIDE, OPTIM, RAD_ELBO), r"loss is the class RAD_ELBO itself\. Make one: loss=RAD_ELBO\(\)"),
        ((linear, GUIDE, OPTIM, Trace_ELBO), r"loss is the class Trace_ELBO itself"),
        ((linear, GUIDE, RAD_ELBO(), OPTIM), "optim and loss are swapped"),
        ((linear, AutoNormal, OPTIM), r"guide is the class AutoNormal itself\. .* AutoNormal\(model\)"),
        ((GUIDE, linear, OPTIM), "model is an AutoNormal and guide the function linear: they are swapped"),
        ((linear, {}, OPTIM), "guide is {}: a function is expected"),
    ],
)
def test_parts_of_svi(args, message):
    with pytest.raises(TypeError, match=message):
        RAD_SVI(*args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tracking": True}, r"tracking=True: a Tracking is expected"),
        ({"tracking": 100}, r"tracking=100: a Tracking is expected"),
        ({"calibrate": "yes"}, "calibrate='yes': True, False or None"),
        ({"calibrate": 0.5}, "calibrate=0.5: True, False or None"),
        ({"calbrate": True}, "RAD_SVI has no option calbrate=.* Did you mean calibrate=?"),
        ({"trackin": None}, "RAD_SVI has no option trackin=.* Did you mean tracking=?"),
        ({"los": None}, "RAD_SVI has no option los=.* Did you mean loss=?"),
    ],
)
def test_options_of_svi(options, message):
    with pytest.raises(TypeError, match=message):
        RAD_SVI(linear, GUIDE, OPTIM, **options)


def test_a_model_may_have_arguments_that_are_called_like_options():
    def model(x, y=None, los=1.0):
        return linear(x, y)

    RAD_SVI(model, AutoNormal(model), OPTIM, los=2.0)


def test_the_class_in_the_place_of_the_loss_of_numpyros_svi():
    svi = SVI(linear, AutoNormal(linear), OPTIM, RAD_ELBO)
    state = svi.init(KEY, X, Y)
    with pytest.raises(TypeError, match=r"the loss is the class RAD_ELBO itself\..*RAD_ELBO\(\)"):
        svi.update(state, X, Y)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((100, KEY, X, Y), "rng_key=100: one JAX PRNG key.* The key is argument 2 here and has to come first"),
        ((X, Y, KEY), r"rng_key=a float32 array of shape \(6, 3\).* The key is argument 3 here"),
        ((0, 100, X, Y), r"rng_key=0: .* Pass jax\.random\.key\(0\)"),
        ((None, 100, X, Y), r"rng_key=None: .* Pass jax\.random\.key\(0\)"),
        (("seed", 100, X, Y), r"rng_key='seed': .* It comes first: run\(rng_key, num_steps, \*args\)"),
        ((jax.random.split(KEY, 3), 100, X), r"rng_key=JAX PRNG keys of shape \(3,\).* one of them"),
        ((KEY, X, Y), r"num_steps=a float32 array of shape \(6, 3\): .* It comes second"),
        ((KEY, 1e3, X, Y), "num_steps=1000.0: a whole number of steps is expected. Write 1000"),
        ((KEY, "100", X, Y), "num_steps='100': a whole number"),
        ((KEY, True, X, Y), "num_steps=True"),
        (
            (KEY, 2, X.tolist(), Y),
            r"linear failed at its arguments \(AttributeError.*: x is a list of 6 .*jnp\.asarray",
        ),
        ((KEY, 2, [X.tolist()], Y), r"x is a list of 1 entries, .*jnp\.asarray"),
        ((KEY, 2, X.astype(str), Y), r"x is a <U32 array of shape \(6, 3\), whose dtype JAX does not have"),
    ],
    ids=range(13),
)
def test_arguments_of_run(args, message):
    with pytest.raises(TypeError, match=message):
        small().run(*args)


def test_keys_of_every_kind_are_keys():
    for key in (jax.random.PRNGKey(0), np.array([0, 1], np.uint32), jax.random.key(0, impl="rbg")):
        check_key(key, "init(rng_key)")
    assert not any(map(is_key, (0, None, "key", jax.random.split(KEY, 2), X, np.arange(2))))


@pytest.mark.parametrize("args", [(X, Y), (X, KEY), (0, X, Y), (None, X)])
def test_init_without_a_key(args):
    with pytest.raises(TypeError, match=r"rng_key=.*: one JAX PRNG key is expected"):
        small().init(*args)


def test_errors_of_models_are_their_own_where_data_are_right():
    with pytest.raises(TypeError, match=r"linear\(\) missing 1 required positional argument"):
        small().run(KEY, 2)
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'colour'"):
        small().run(KEY, 2, X, Y, colour=1)


class Callback:
    def __call__(self, look):
        raise AssertionError("never called")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"progres_bar": False}, "run has no option progres_bar=, .* Did you mean progress_bar=?"),
        ({"callback": []}, "Did you mean callbacks=?"),
        ({"batch": []}, "Did you mean batches=?"),
        ({"callbacks": print}, r"callbacks=the function print: a list of functions .* Write callbacks=\[print\]"),
        ({"callbacks": "print"}, "callbacks='print': a list of functions"),
        ({"callbacks": Callback}, "callbacks=the class Callback"),
        ({"callbacks": [Callback]}, r"callbacks\[0\] is the class Callback itself\. Make one: Callback"),
        ({"callbacks": ["print"]}, r"callbacks\[0\]='print'"),
        (
            {"callbacks": [Callback(), lambda step, loss: 0]},
            r"callbacks\[1\].* takes \(step, loss\) and gets one Callb",
        ),
        ({"callbacks": [lambda: 0]}, r"callbacks\[0\].* takes \(\) and gets one CallbackInfo"),
        ({"stop": lambda look: True}, r"stop=.* takes \(look\) and gets step and losses"),
        ({"checkpoint": True}, "checkpoint=True: the name of a folder"),
        ({"checkpoint": 100}, "checkpoint=100: the name of a folder"),
        ({"init_state": {}}, r"init_state.*: svi_state is {}, not a state of SVI"),
        ({"batches": (X, Y)}, r"batches is a tuple of arrays, float32\[6, 3\], float32\[6\].* batches=\[\(x, y\)\]"),
        ({"batches": [X, Y, Y]}, r"batches is a list of arrays.* batches=\[\(x, y\)\]"),
        ({"batches": {"x": X}}, r"batches=.*write batches=\[batch\]"),
        ({"batches": lambda: iter([])}, r"batches=.* takes \(\) and gets the number of the epoch"),
        ({"batches": list}, "batches is the class list itself"),
        ({"batches": X}, r"batches is a float32 array of shape \(6, 3\), of which each row.*batches=\[\(x,\)\]"),
    ],
    ids=range(20),
)
def test_options_of_run(options, message):
    args = () if "batches" in options else (X, Y)
    with pytest.raises(TypeError, match=message):
        small().run(KEY, 200, *args, **options)


def test_a_generator_function_without_the_epoch():
    def loader():
        yield X, Y

    with pytest.raises(TypeError, match=r"batches=lambda epoch: loader\(\), or batches=loader\(\) to read it once"):
        small().run(KEY, 2, batches=loader)


@pytest.mark.parametrize("name", ["update", "stable_update", "evaluate", "get_params"])
def test_before_init_and_without_a_state(name):
    svi = small()
    state = small().init(KEY, X, Y)
    args = () if name == "get_params" else (X, Y)
    with pytest.raises(ValueError, match=rf"{name}: this SVI has not been initialised.*svi\.init"):
        getattr(svi, name)(state, *args)
    svi.init(KEY, X, Y)
    for wrong, what in ((KEY, "a JAX PRNG key"), (None, "None"), (X, "a float32 array")):
        with pytest.raises(TypeError, match=f"{name}: svi_state is {what}.*what svi.init or svi.update returned"):
            getattr(svi, name)(wrong, *args)


@pytest.mark.parametrize("name", ["fit_step", "calibrate", "plan_of_update"])
def test_an_elbo_wants_svi_and_its_state(name):
    svi = small()
    state, elbo = svi.init(KEY, X, Y), svi.loss
    rest = ("8GiB", X, Y) if name == "fit_step" else (X, Y)
    method = getattr(elbo, name)
    with pytest.raises(
        TypeError, match=rf"{name}: svi is an SVIState, not an SVI\. .* swapped: write {name}\(svi, svi_s"
    ):
        method(state, svi, *rest)
    with pytest.raises(TypeError, match=f"{name}: svi_state is .*not a state of SVI"):
        method(svi, rest[0], state, *rest[1:])
    with pytest.raises(ValueError, match=f"{name}: this SVI has not been initialised"):
        method(small(), state, *rest)
    if name == "fit_step":
        with pytest.raises(TypeError, match=r"total=an? .*: a number of bytes is expected") as caught:
            method(svi, state, X, "8GiB")
        assert len(str(caught.value)) < 200


# -- explain and plan_figure -------------------------------------------------------------------------------------------


def test_explain_takes_an_svi():
    svi = small()
    state = svi.init(KEY, X, Y)
    expected = explain(svi.loss, state.rng_key, svi.get_params(state), svi.model, svi.guide, X, Y)
    assert explain(svi, state, X, Y) == expected
    assert {row.site for row in expected.rows} >= {"w"}
    pytest.importorskip("matplotlib")
    assert len(plan_figure(svi, state, X, Y, budgets=["1MiB"]).axes) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (linear, GUIDE, X, Y),
            "rng_key=the function linear: a JAX PRNG key.* order is rng_key, param_map, model, guide",
        ),
        ((KEY, linear, GUIDE, X, Y), "param_map=the function linear: the dictionary of parameters"),
        ((KEY, {"w": X}, X, Y), r"model=a float32 array of shape \(6, 3\): a function is expected"),
    ],
)
def test_explain_says_its_order(args, message):
    with pytest.raises(TypeError, match=message):
        explain(RAD_ELBO(), *args)


def test_explain_of_what_has_no_plan():
    svi = SVI(linear, AutoNormal(linear), OPTIM, Trace_ELBO())
    with pytest.raises(TypeError, match=r"explain needs .* got a Trace_ELBO"):
        explain(svi, svi.init(KEY, X, Y), X, Y)
    for args, what in (((), "nothing"), ((X,), "a float32 array")):
        with pytest.raises(TypeError, match=rf"a JAX PRNG key comes first.*{what}"):
            explain(rad(jnp.sum), *args)
    with pytest.raises(TypeError, match="svi_state is None"):
        explain(small(), None)


MISSPELT = {
    "gradient_variance": (numpyro_rad.gradient_variance, {"draw": 4}, "draws"),
    "shadow": (
        lambda svi, _, *args, **kwargs: shadow(svi, KEY, 2, *args, **kwargs),
        {"num_seed": 2},
        "num_seeds",
    ),
    "fit_quality": (fit_quality, {"max_particle": 4}, "max_particles"),
    "to_arviz": (numpyro_rad.to_arviz, {"key": KEY, "num_sample": 4}, "num_samples"),
    "advise": (numpyro_rad.advise, {"repeat": 1}, "repeats"),
    "explain": (numpyro_rad.explain, {"argnum": 1}, "argnums"),
    "plan_figure": (numpyro_rad.plan_figure, {"budget": ["1MiB"]}, "budgets"),
    "calibrate": (lambda svi, *rest, **kwargs: svi.loss.calibrate(svi, *rest, **kwargs), {"draw": 4}, "draws"),
    "fit_step": (lambda svi, *rest, **kwargs: svi.loss.fit_step(svi, *rest, **kwargs), {"totl": "1GiB"}, "total"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_misspelt_options_of_functions_whose_keywords_go_to_the_model(name):
    function, options, option = MISSPELT[name]
    svi = small()
    state = svi.init(KEY, X, Y)
    (wrong,) = options.keys() - {"key"}
    with pytest.raises(TypeError, match=rf"{name} has no option {wrong}=.*linear.* does not take it.*{option}="):
        function(svi, state, X, Y, **options)


def test_keywords_that_the_model_takes_are_its_own():
    def draw_counts(x, draw):
        numpyro.sample("w", dist.Normal(float(draw), 1.0))

    svi = RAD_SVI(draw_counts, AutoNormal(draw_counts), OPTIM, tracking=None)
    state = svi.init(KEY, X, draw=3)
    assert np.isfinite(numpyro_rad.gradient_variance(svi, state, X, draw=3, draws=2).total.total.value)
