"""Programs that show what the library does; run them from this folder's parent, as ``python -m examples.bnn``."""
