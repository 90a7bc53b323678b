"""Running SVI: the loop over steps and batches with looks, callbacks, checkpoints and what is known at its end."""

from numpyro_rad.training.advice import Advice, advise
from numpyro_rad.training.checkpoints import Checkpoint
from numpyro_rad.training.loop import CallbackInfo
from numpyro_rad.training.results import RAD_SVIRunResult, fit_record
from numpyro_rad.training.svi import RAD_SVI
from numpyro_rad.training.validation import Plateau

__all__ = [
    "RAD_SVI",
    "Advice",
    "CallbackInfo",
    "Checkpoint",
    "Plateau",
    "RAD_SVIRunResult",
    "advise",
    "fit_record",
]
