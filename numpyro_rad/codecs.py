"""Codecs: how a residual is stored, as ``RAD_ELBO(codec=...)``, ``overrides=`` and a plan name it."""

from numpyro_rad.ad.codecs import BitMask, Codec, Keep
from numpyro_rad.ad.floating import FloatRound
from numpyro_rad.ad.rotation import RotatedRound
from numpyro_rad.ad.rounding import DitheredRound, SampledRound, StochasticRound
from numpyro_rad.ad.sampling import RandomProjection, SampleAxis

__all__ = [
    "BitMask",
    "Codec",
    "DitheredRound",
    "FloatRound",
    "Keep",
    "RandomProjection",
    "RotatedRound",
    "SampleAxis",
    "SampledRound",
    "StochasticRound",
]
