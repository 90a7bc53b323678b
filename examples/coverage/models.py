"""All models of the coverage table: importing this file fills ``MODELS``.

The models are written anew after the kinds that NumPyro's examples and tutorials show. Each has realistic sizes (a few
are tiny on purpose), and a small size for the tests.
"""

import guide_models  # noqa: F401
import latent_models  # noqa: F401
import neural_models  # noqa: F401
import regression_models  # noqa: F401
import series_models  # noqa: F401
from problem import MODELS, Example, Problem

__all__ = ["MODELS", "Example", "Problem"]
