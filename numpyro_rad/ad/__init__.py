"""Randomized automatic differentiation: programs as linearized graphs, and two sweeps over what a plan stores of them.

A program is traced (``_jax``, the only module that knows JAX's internals) and linearized into a ``graph`` of edges
(``linearize``, with ``elementwise`` and ``scalars`` for what is pointwise and ``rules`` for the rest). A ``plan`` says
which ``codecs`` store which residuals; ``sweep`` runs the program forward, encoding, and backward, decoding.
"""
