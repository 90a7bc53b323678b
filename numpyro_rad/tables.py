"""Tables that print as text, and show as tables in a notebook."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A table of text, with lines below it.

    :ivar header: names of its columns.
    :ivar rows: its cells.
    :ivar right: the columns that are aligned on the right, by number.
    :ivar below: what is said of it, a paragraph each.
    :ivar last: a row that stands apart, of sums; empty for none.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: frozenset[int]
    below: Sequence[str] = ()
    last: Sequence[str] = ()

    def __str__(self) -> str:
        every = [self.header, *self.rows, *([self.last] if self.last else [])]
        widths = [max(map(len, column)) for column in zip(*every, strict=True)]

        def line(cells: Sequence[str]) -> str:
            padded = enumerate(zip(cells, widths, strict=True))
            return "  ".join(c.rjust(w) if i in self.right else c.ljust(w) for i, (c, w) in padded)

        rule = "-" * len(line(self.header))
        total = [rule, line(self.last)] if self.last else []
        lines = [line(self.header), rule, *map(line, self.rows), *total, *self.below]
        return "\n".join(text.rstrip() for text in lines)

    def html(self) -> str:
        """The same as HTML, in the colours of the page that it is shown on; a wide one scrolls.

        Pages know the class ``dataframe``, from pandas, as that of tables that are computed.
        """

        def row(cells: Sequence[str], tag: str) -> str:
            sides = ("right;white-space:nowrap" if i in self.right else "left" for i in range(len(cells)))
            styles = (f'style="padding:.2em .5em;text-align:{side}"' for side in sides)
            shown = (f"<{tag} {style}>{escape(c)}</{tag}>" for c, style in zip(cells, styles, strict=True))
            return f"<tr>{''.join(shown)}</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        total = f"<tfoot>{row(self.last, 'th')}</tfoot>" if self.last else ""
        table = f"<thead>{row(self.header, 'th')}</thead><tbody>{body}</tbody>{total}"
        below = "".join(f"<p>{escape(text)}</p>" for text in self.below)
        shown = f'<table class="dataframe" style="margin:0">{table}</table>'
        return f'<div style="margin:.5em 0;overflow-x:auto">{shown}</div>{below}'
