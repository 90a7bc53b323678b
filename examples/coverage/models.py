"""All models of the coverage table: importing this file fills ``MODELS``.

The models are written anew after the kinds that NumPyro's examples and tutorials show. Each has realistic sizes (a few
are tiny on purpose), and a small size for the tests.
"""

from examples.coverage import (  # noqa: F401
    guide_models,
    latent_models,
    neural_models,
    regression_models,
    series_models,
)
from examples.coverage.problem import MODELS, Example, Problem

__all__ = ["MODELS", "Example", "Problem"]
