"""Codecs: how a residual is stored, as ``RAD_ELBO(codec=...)``, ``overrides=`` and a plan name it."""

from numpyro_rad.ad.codecs import (
    BitMask,
    Codec,
    DitheredRound,
    Keep,
    RandomProjection,
    SampleAxis,
    SampledRound,
    StochasticRound,
)

__all__ = [
    "BitMask",
    "Codec",
    "DitheredRound",
    "Keep",
    "RandomProjection",
    "SampleAxis",
    "SampledRound",
    "StochasticRound",
]
