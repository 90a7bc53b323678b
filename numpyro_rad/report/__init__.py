"""Reports of a fit: as HTML, Markdown or text, and saved as JSON, from which a report can be made later.

``verdict`` draws conclusions from the numbers, ``sections`` puts them into tables and ``charts``, ``document`` writes
them down. ``archive`` hands the fit to ArviZ.
"""

from numpyro_rad.report.archive import to_arviz
from numpyro_rad.report.document import html, load, markdown, save, terminal, write

__all__ = ["html", "load", "markdown", "save", "terminal", "to_arviz", "write"]
