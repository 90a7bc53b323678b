"""Running SVI: the loop over steps and batches with looks, callbacks, checkpoints and what is known at its end."""
