"""``RAD_ELBO`` beside other ways to save memory: ``python -m examples.benchmarks.run p1 --quick``, and more of them."""
