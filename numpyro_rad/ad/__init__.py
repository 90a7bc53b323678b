"""Randomized automatic differentiation: programs as linearized graphs, and two sweeps over what a plan stores of them.

A program is traced (``_jax``, the only module that knows JAX's internals) and linearized into a ``graph`` of edges
(``linearize``, with ``coefficients`` and ``elimination`` for what is pointwise), by what is known of ``primitives``. A
``plan`` says which ``codecs`` store which residuals; ``sweep`` runs the program forward, encoding, and backward,
decoding.
"""
