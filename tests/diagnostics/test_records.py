"""Records of a fit survive the way through JSON, and what is none of them is refused."""

import dataclasses
import json

import numpy as np
import pytest

from numpyro_rad.diagnostics.records import (
    Alarm,
    BlockVariance,
    Estimate,
    FitQuality,
    FitRecord,
    GradientVariance,
    PlanRecord,
    PlanRow,
    Track,
    from_dict,
    to_dict,
)

ONE = Estimate(1.5, float("nan"))
BLOCK = BlockVariance("w", 3, ONE, ONE, ONE, ONE, Estimate(float("inf"), 0.25))
VARIANCE = GradientVariance(
    BLOCK, (BLOCK, BLOCK), ONE, (0.1, 0.2), None, ONE, ONE, 8, {"exact": 0.5}, {"exact": 100}, {"exact": 1.0}, {}
)
TRACK = Track(("a", "b"), np.array([10, 20]), *(np.arange(4.0).reshape(2, 2) for _ in range(3)), *np.ones((2, 2)))
PLAN = PlanRecord((PlanRow("m.py:3", "w", "mul", (2, 3), "keep", 8, 4, 0.1),), 4, 8, None, 0.1, 0.2, ((0.0, 1.0, 2.0),))
QUALITY = FitQuality(ONE, None, 1.01, 0.1, True)
RECORD = FitRecord(
    "model", "2026-01-01", {"jax": "0.12"}, {}, 20, 5, 1.25, np.array([3.0, np.nan]), (Alarm(3, "rho", "w", "!"),), PLAN
)
WHOLE = dataclasses.replace(RECORD, track=TRACK, gradient_variance=VARIANCE, quality=QUALITY)


@pytest.mark.parametrize(
    "record", [ONE, BLOCK, VARIANCE, TRACK, PLAN, QUALITY, RECORD, WHOLE], ids=lambda r: type(r).__name__
)
def test_a_record_survives_json(record):
    text = json.dumps(to_dict(record), allow_nan=False)
    again = from_dict(type(record), json.loads(text))
    assert json.dumps(to_dict(again), allow_nan=False) == text
    same = [type(getattr(again, f.name)) is type(getattr(record, f.name)) for f in dataclasses.fields(record)]
    assert all(same)


def test_integers_stay_integers():
    assert from_dict(Track, to_dict(TRACK)).steps.dtype.kind == "i"
    assert from_dict(Track, to_dict(TRACK)).path.dtype.kind == "f"


@pytest.mark.parametrize("data", [{}, None, [], {"value": "x", "standard_error": 1}, "text"])
def test_something_else_is_refused(data):
    with pytest.raises(ValueError, match="not the data of a Estimate"):
        from_dict(Estimate, data)


def test_rho_is_unknown_where_codes_hide_what_the_exact_gradient_varies():
    def variance(guide, path, error):
        told = {"minibatch": Estimate(0.0, 0.0), "guide": Estimate(guide, error), "path": Estimate(path, error)}
        total = dataclasses.replace(BLOCK, total=Estimate(guide + path, 2 * error), **told)
        return dataclasses.replace(VARIANCE, total=total, rho=Estimate(path / guide, 3.0))

    hidden, clear, nothing = variance(-20.0, 100.0, 30.0), variance(50.0, 100.0, 5.0), variance(50.0, 1e-3, 5.0)
    assert "not known" in hidden.rho_text and "no noise" not in hidden.signal_text
    assert "not known" not in clear.rho_text and "not known" not in nothing.rho_text
