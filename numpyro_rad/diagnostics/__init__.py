"""What can be measured of a fit: gradient variance and its parts, looks during training, convergence, quality.

All of it is written down in the plain data of ``records``, from which reports are made.
"""

from numpyro_rad.diagnostics.convergence import IterateAverage, Iterates
from numpyro_rad.diagnostics.quality import Shadow, fit_quality, shadow
from numpyro_rad.diagnostics.records import Alarm, FitQuality, FitRecord, GradientVariance, Track, Validation
from numpyro_rad.diagnostics.signal import gradient_signal, nonfinite_gradients, signal_to_noise
from numpyro_rad.diagnostics.tracking import Tracker, Tracking
from numpyro_rad.diagnostics.variance import gradient_variance

__all__ = [
    "Alarm",
    "FitQuality",
    "FitRecord",
    "GradientVariance",
    "IterateAverage",
    "Iterates",
    "Shadow",
    "Track",
    "Tracker",
    "Tracking",
    "Validation",
    "fit_quality",
    "gradient_signal",
    "gradient_variance",
    "nonfinite_gradients",
    "shadow",
    "signal_to_noise",
]
