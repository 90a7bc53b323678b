"""``python -m numpyro_rad``: what a target may be, the plan of its step, and mistakes, each told in one line."""

import subprocess
import sys
import textwrap

import pytest

from numpyro_rad.__main__ import main

FITS = """
    import jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal
    from numpyro_rad import RAD_ELBO

    def model(x, y=None):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([8, 32]).to_event(2))
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ w).sum(-1), 1.0), obs=y)

    X, Y = jnp.ones((64, 8)), jnp.ones(64)

    def fit(): return model, AutoNormal(model), (X, Y)
    def by_name(): return model, AutoNormal(model), [X], {"y": Y}
    def plain(): return SVI(model, AutoNormal(model), optax.sgd(0.1), Trace_ELBO(num_particles=2)), (X, Y)
    def budget(): return SVI(model, AutoNormal(model), optax.sgd(0.1), RAD_ELBO(memory_budget="4KiB")), (X,), {"y": Y}

    def none(): return None
    def array(): return model, AutoNormal(model), X
    def guide_itself(): return model, AutoNormal, (X, Y)
    def nothing_to_learn(): return (lambda: None), (lambda: None), ()
    def of_size(n): return fit()
    def fails(): return undefined
    three = 3
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fits")
    (folder / "within").mkdir()
    for name, text in {
        "explained_fits.py": textwrap.dedent(FITS),
        "explained_import.py": "import no_such_module\n",
        "within/explained_neighbour.py": "from explained_name import fit\n",
        "within/explained_name.py": textwrap.dedent(FITS),
    }.items():
        (folder / name).write_text(text)
    yield folder
    for name in [name for name in sys.modules if name.startswith("explained_")]:
        del sys.modules[name]


@pytest.fixture
def folder(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return files


@pytest.mark.parametrize(
    ("target", "options", "told"),
    (
        ("fit", "--codec-bits 4", "4-bit"),
        ("by_name", "--slices 4", "in 4 slices"),
        ("plain", "--exact", "no added variance"),
        ("budget", "", "Priced for"),
        ("budget", "--memory-budget 1MiB --table", "rel. variance"),
    ),
)
def test_a_plan_is_shown(folder, capsys, target, options, told):
    assert main(["explain", f"explained_fits:{target}", "--no-compile", *options.split()]) == 0
    out = capsys.readouterr().out
    assert told in out and "explained_fits.py:" in out and "Temporary memory" not in out


def test_both_steps_are_compiled(folder, capsys):
    assert main(["explain", "explained_fits:plain", "--codec-bits", "8"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Temporary memory of the compiled step: ")
    assert " with Trace_ELBO(num_particles=2), " in last and " with RAD_ELBO(num_particles=2, codec=" in last


def test_a_file_is_a_target_and_finds_its_neighbours(folder, capsys):
    assert main(["explain", "within/explained_neighbour.py:fit", "--no-compile"]) == 0
    assert "Predicted: " in capsys.readouterr().out


@pytest.mark.parametrize("command", ("explain", "advise"))
@pytest.mark.parametrize(
    ("target", "told"),
    (
        ("explained_fits", "does not name a function. Write MODULE:FUNCTION"),
        ("explained_fits:", "does not name a function"),
        ("explained_fits:nothing", "explained_fits has no function 'nothing'"),
        ("explained_fits:three", "explained_fits has no function 'three'"),
        ("explained_fits:of_size", "has to be a function without arguments: missing a required argument: 'n'"),
        ("explained_fits:none", "has to return (svi, args), (svi, args, kwargs), (model, guide, args) or"),
        ("explained_fits:array", "in a tuple, not (the function model, an AutoNormal, a float32 array of shape"),
        ("explained_fits:guide_itself", "Make a guide of your model: AutoNormal(model)"),
        ("no_such_module:fit", "No module named 'no_such_module'"),
        ("explained_fits.part:fit", "No module named 'explained_fits.part'"),
        ("within/absent.py:fit", "there is no file within/absent.py"),
    ),
)
def test_mistakes_are_told_in_a_line(folder, capsys, command, target, told):
    assert main([command, target]) == 2
    out, err = capsys.readouterr()
    assert told in err and err.startswith("error: ") and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(
    ("target", "options", "status", "told"),
    (
        ("fit", "--memory-budget 4KiBs", 2, "memory_budget='4KiBs'"),
        ("fit", "--slices 0", 2, "slices=0"),
        ("budget", "--codec-bits 2", 2, "exclude each other"),
        ("fit", "--memory-budget 1B", 1, "memory_budget"),
        ("nothing_to_learn", "", 1, "there is nothing to differentiate"),
    ),
)
def test_options_that_cannot_be_met(folder, capsys, target, options, status, told):
    assert main(["explain", f"explained_fits:{target}", *options.split()]) == status
    err = capsys.readouterr().err
    assert told in err and err.startswith("error: ") and err.count("\n") == 1


def test_errors_of_the_users_code_are_raised(folder):
    with pytest.raises(NameError, match="undefined"):
        main(["explain", "explained_fits:fails"])
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        main(["explain", "explained_import:fit"])


def test_runs_as_a_module(folder):
    command = [sys.executable, "-m", "numpyro_rad", "explain"]
    wrong = subprocess.run([*command, "absent.py:fit"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "") and wrong.stderr == "error: there is no file absent.py.\n"
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "return model, AutoNormal(model), (x, x[:, 0])" in helped.stdout
