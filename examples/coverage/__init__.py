"""Models of the kinds in NumPyro's examples, and the table of them: ``python -m examples.coverage.run``."""
