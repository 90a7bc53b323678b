"""Reports of a fit that people want to read: one HTML file, Markdown, or a table for the terminal.

A report begins with a verdict in plain words (:mod:`numpyro_rad.report.verdict`) and shows the numbers behind it
(:mod:`numpyro_rad.report.sections`). It is made from a :class:`~numpyro_rad.diagnostics.records.FitRecord` alone,
which :func:`save` and :func:`load` keep in a JSON file, so that ``python -m numpyro_rad report`` can make it later and
elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from html import escape as quoted
from pathlib import Path

from numpyro_rad.diagnostics.records import FitRecord, from_dict, to_dict
from numpyro_rad.report.charts import STYLE, escape, shorten
from numpyro_rad.report.parts import Section, Table
from numpyro_rad.report.sections import sections, summary
from numpyro_rad.report.verdict import Finding, findings, headline

FORMAT, VERSION = "numpyro_rad fit record", 1

MAX_MARKDOWN_ROWS, MAX_TERMINAL_ROWS = 25, 12

_MARKS = {"problem": "✖", "warning": "▲", "note": "•", "good": "✔"}

# -- HTML --------------------------------------------------------------------------------------------------------------

_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:1280px;margin:0 auto;padding:20px 24px 60px}
@media (max-width:560px){main{padding:12px 12px 40px}}
h1{font-size:1.7rem;line-height:1.2;margin:.3em 0 0}h2{font-size:1.25rem;margin:2em 0 .4em}
p{margin:.5em 0;max-width:78ch}.made{color:var(--soft);margin:.2em 0 1em}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:8px;margin:16px 0}
dl div{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:8px 12px}
dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums}
.verdict{border:1px solid var(--line);border-left:6px solid var(--grey);border-radius:6px;padding:4px 16px 10px;
background:var(--panel)}
.verdict.problem{border-left-color:var(--red)}.verdict.warning{border-left-color:var(--red)}
.verdict.good{border-left-color:var(--green)}
.verdict h2{margin:.5em 0}.verdict ul{list-style:none;margin:0;padding:0}.verdict li{margin:.7em 0}
.level{font-weight:700}.level i{font-style:normal}.advice{color:var(--soft)}.verdict li>span{display:block}
@media (min-width:900px){.verdict li{display:grid;grid-template-columns:6rem 1fr 1fr;gap:0 24px}}
.problem>.level,.warning>.level{color:var(--red)}.note>.level{color:var(--blue)}.good>.level{color:var(--green)}
.flow{columns:2 460px;column-gap:24px}.flow>*{break-inside:avoid;margin:0 0 14px}
figure{border:1px solid var(--line);border-radius:6px;padding:10px}
figcaption{font-weight:600}.legend{font-size:.85rem;color:var(--soft);margin:2px 0 6px}
.key{display:inline-block;margin-right:14px}.swatch{display:inline-block;width:18px;height:8px;margin-right:5px}
.remark{font-size:.85rem;color:var(--soft);margin:4px 0 0}
.scroll{overflow-x:auto;margin:.4em 0 1em;background:
linear-gradient(90deg,var(--paper) 40%,transparent) 0 0/40px 100% no-repeat local,
linear-gradient(270deg,var(--paper) 40%,transparent) 100% 0/40px 100% no-repeat local,
linear-gradient(90deg,var(--shade),transparent) 0 0/16px 100% no-repeat scroll,
linear-gradient(270deg,var(--shade),transparent) 100% 0/16px 100% no-repeat scroll}
table{border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums;width:100%}
.title{font-weight:600;padding:4px 0;margin:0}.wide:before{content:"scrolls sideways →";float:right;display:none;
color:var(--blue);font-weight:400;padding-left:1em}
@media (max-width:560px){.wide:before{display:inline}}
th,td{padding:4px 10px;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;overflow-wrap:normal}
th{color:var(--soft);font-weight:600;vertical-align:bottom}.n{text-align:right}td.n{white-space:nowrap}
td:not(.n){min-width:9ch;overflow-wrap:break-word}
details{margin:.6em 0}summary{cursor:pointer}
summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--blue);outline-offset:2px}
@media print{details::details-content{content-visibility:visible}figure{break-inside:avoid}}
"""


class Page(str):
    """The text of an HTML file. A notebook shows the page, in a frame of its own."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        size = "width:100%;height:40rem;border:1px solid #8888;resize:vertical"
        return f'<iframe title="report" style="{size}" srcdoc="{quoted(self)}"></iframe>'


def html(record: FitRecord) -> Page:
    """A report as one HTML file that needs nothing else: style and figures are inside, no script, no network.

    :param record: what is known about the fit; sections without numbers are left out.
    :return: the text of the file, well below 2 MB however long the fit was: long series and tables are thinned. A
        notebook shows the page.

    Example::

        Path("report.html").write_text(report.html(record), encoding="utf-8")
    """
    found = findings(record)
    cards = "".join(f"<div><dt>{_shown(k)}</dt><dd>{_shown(v)}</dd></div>" for k, v in summary(record))
    body = "".join(_html_section(s) for s in sections(record))
    title = escape(record.title or "Fit")
    made = f'<p class="made">A fit by numpyro_rad, {escape(_moment(record.created))}</p>' if record.created else ""
    return Page(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{title}</title><style>{STYLE}{_STYLE}</style></head>\n<body><main><h1>{title}</h1>{made}"
        f"{_html_verdict(found)}<dl>{cards}</dl>\n{body}</main></body></html>\n"
    )


_WHOLE = re.compile(r"(?<=\d) (?=%|±|[KMG]iB\b|B\b|m?s\b|min\b|h\b|nats\b)|(?<=±) (?=\d)")


def _shown(text: object) -> str:
    """Text in HTML, where no line ends between a number and its unit or its error."""
    return _WHOLE.sub("\u00a0", escape(text))


def _html_verdict(found: tuple[Finding, ...]) -> str:
    items = "".join(
        f'<li class="{f.level}"><span class="level"><i aria-hidden="true">{_MARKS[f.level]} </i>'
        f"{f.level.capitalize()}</span> <span>{_shown(f.what)}</span>"
        + (f' <span class="advice">{_shown(f.advice)}</span>' if f.advice else "")
        + "</li>\n"
        for f in found
    )
    worst = next((f.level for f in found if f.level in ("problem", "warning", "good")), "note")
    return f'<section class="verdict {worst}"><h2>{escape(headline(found))}</h2><ul>{items}</ul></section>'


def _html_section(section: Section) -> str:
    """What is narrow flows in columns, as many as there is room for; wide and folded tables stand below."""
    text = "".join(f"<p>{_shown(t)}</p>" for t in section.text)
    narrow = [t for t in section.tables if not _is_wide(t)]
    parts = [f"<div>{text}</div>" if text else "", *(draw() for draw in section.figures), *map(_html_table, narrow)]
    flow = f'<div class="flow">{"".join(parts)}</div>' if any(parts) else ""
    wide = "".join(_html_table(t) for t in section.tables if _is_wide(t))
    return f"<section><h2>{escape(section.title)}</h2>{flow}{wide}</section>\n"


def _is_wide(table: Table) -> bool:
    """Whether it wants the whole width of a page."""
    return table.folded or len(table.header) > 5 or table.text_columns > 3


_PHONE = 48  # letters that stand side by side on a narrow screen, in the type of tables


def _letters(table: Table, column: int) -> int:
    """Letters of a column at its narrowest, a margin included: numbers are not broken, text is between words."""
    cells = [row[column] for row in table.rows] if column >= table.text_columns else []
    texts = [table.header[column], *(row[column] for row in table.rows)]
    words = [word for text in texts for word in text.split()]
    return 3 + max([9 * (column < table.text_columns), *map(len, cells), *map(len, words)])


def _html_table(table: Table) -> str:
    numbers = range(table.text_columns, len(table.header))
    classes = [' class="n"' if i in numbers else "" for i in range(len(table.header))]
    head = "".join(f'<th scope="col"{c}>{escape(h)}</th>' for h, c in zip(table.header, classes, strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{c}>{_shown(x)}</td>" for x, c in zip(row, classes, strict=True)) + "</tr>\n"
        for row in table.rows
    )
    scrolls = " wide" if sum(_letters(table, i) for i in range(len(table.header))) > _PHONE else ""
    title = escape(table.title)
    shown = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    if table.folded:
        return f'<details><summary class="title{scrolls}">{title}</summary>{shown}</details>'
    return f'<div><p class="title{scrolls}">{title}</p>{shown}</div>'


def _moment(created: str) -> str:
    return created.replace("T", " ").split(".")[0]


# -- Markdown ----------------------------------------------------------------------------------------------------------


def markdown(record: FitRecord) -> str:
    """A report as Markdown, for an issue or a wiki: the same words and tables, without figures.

    :param record: what is known about the fit.
    :return: the text; tables end after 25 rows.
    """
    found = findings(record)
    lines = [f"# {_plain(record.title or 'Fit')}", "", f"**{_plain(headline(found))}**", ""]
    lines += [
        f"- {_MARKS[f.level]} **{f.level.capitalize()}:** {_plain(f'{f.what} {f.advice}'.strip())}" for f in found
    ]
    lines += ["", *_markdown_table(Table("Summary", ("what", "value"), summary(record), 2))]
    for section in sections(record):
        lines += [f"## {_plain(section.title)}", ""]
        for text in section.text:
            lines += [_plain(text), ""]
        for table in section.tables:
            lines += [f"**{_plain(table.title)}**", "", *_markdown_table(table)]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(table: Table) -> Iterator[str]:
    yield _markdown_row(table.header)
    yield "|" + "|".join(" --- " if i < table.text_columns else " ---: " for i in range(len(table.header))) + "|"
    yield from (_markdown_row(row) for row in table.rows[:MAX_MARKDOWN_ROWS])
    yield ""
    if len(table.rows) > MAX_MARKDOWN_ROWS:
        yield f"… and {len(table.rows) - MAX_MARKDOWN_ROWS:,} more rows."
        yield ""


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(c) for c in cells) + " |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", " ".join(str(text).split()))


# -- terminal ----------------------------------------------------------------------------------------------------------


def terminal(record: FitRecord, width: int | None = None) -> str:
    """A report as plain text.

    :param record: what is known about the fit.
    :param width: columns of the terminal; None asks it, and takes 100 where there is none.
    :return: the text, no line longer than ``width``; tables end after 12 rows.
    """
    width = max(40, width if width is not None else shutil.get_terminal_size((100, 24)).columns)
    found = findings(record)
    lines = [*_wrapped(record.title or "Fit", width), *_wrapped(headline(found), width), ""]
    for f in found:
        lines += _wrapped(f"{_MARKS[f.level]} {f.what} {f.advice}".rstrip(), width, "  ")
    lines += ["", *_terminal_table(Table("", ("what", "value"), summary(record), 2), width)]
    for section in sections(record):
        for table in (t for t in section.tables if section.title != "Settings"):
            lines += ["", *_wrapped(table.title, width), *_terminal_table(table, width)]
    return "\n".join(lines) + "\n"


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(_one_line(text), width, subsequent_indent=indent) or [""]


def _one_line(text: str) -> str:
    """Text without line breaks and without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(text).split()))


def _terminal_table(table: Table, width: int) -> list[str]:
    """Columns are as wide as they need to be; if that is too wide, text gives first and then columns go below.

    Digits are never cut: columns of numbers that do not fit beside the text follow in a table of their own.
    """
    rows = [tuple(_one_line(c) for c in row) for row in (table.header, *table.rows[:MAX_TERMINAL_ROWS])]
    widths = [min(max(map(len, column)), width) for column in zip(*rows, strict=True)]
    text = range(min(table.text_columns, len(widths)))
    while _total(widths) > width and max((widths[i] for i in text), default=0) > _LEAST_TEXT:
        widths[max(text, key=lambda i: widths[i])] -= 1
    first = text[:1] if _total(widths) > width else text
    while _total([widths[i] for i in text]) > width:  # nothing but text, in many columns
        widths[max(text, key=lambda i: widths[i])] -= 1
    parts: list[list[int]] = [list(text)]
    for i in range(len(text), len(widths)):
        if _total([widths[j] for j in (*parts[-1], i)]) > width and len(parts[-1]) > len(first):
            parts.append(list(first))
        while _total([widths[j] for j in (*parts[-1], i)]) > width and widths[0] > 1:
            widths[0] -= 1
        parts[-1].append(i)
    more = len(table.rows) - MAX_TERMINAL_ROWS
    rest = [f"… and {more:,} more rows"] if more > 0 else []
    lines = [line for part in parts for line in (*_terminal_columns(rows, part, widths, len(text)), "")]
    return [*lines[:-1], *rest]


_LEAST_TEXT = 12  # letters of a column, before numbers go below


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _terminal_columns(rows: Sequence[tuple[str, ...]], part: Sequence[int], widths: Sequence[int], text: int) -> list:
    """Some columns of a table, a rule below the header."""
    shown = [
        "  ".join(
            shorten(row[i], widths[i]).ljust(widths[i]) if i < text else shorten(row[i], widths[i]).rjust(widths[i])
            for i in part
        ).rstrip()
        for row in rows
    ]
    return [shown[0], "-" * _total([widths[i] for i in part]), *shown[1:]]


# -- files -------------------------------------------------------------------------------------------------------------


def save(record: FitRecord, path: str | os.PathLike) -> None:
    """Write a record as JSON. The file appears whole or not at all, and an older one stays until then.

    :param record: what is known about a fit.
    :param path: the file.
    :raises OSError: if it cannot be written; the record is untouched.
    """
    data = {"format": FORMAT, "version": VERSION, "record": to_dict(record)}
    _write(json.dumps(data, allow_nan=False), Path(path))


def load(path: str | os.PathLike) -> FitRecord:
    """Read a record that :func:`save` wrote.

    :param path: the file.
    :raises FileNotFoundError: if there is none.
    :raises ValueError: if it is none of these files, damaged, or of another version.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: there is no such file. Save a result with report.save(record, path)."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text, so no saved fit record.") from error
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON or was cut off ({error}). Save the result again.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is JSON, but no saved fit record: it does not say “format”: “{FORMAT}”.")
    if data.get("version") != VERSION:
        raise ValueError(
            f"{path} is of version {data.get('version')!r} of the format, and this numpyro_rad reads {VERSION}. "
            "Read it with the version of numpyro_rad that wrote it."
        )
    try:
        return from_dict(FitRecord, data.get("record"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


_WRITERS = {".html": html, ".htm": html, ".md": markdown, ".txt": partial(terminal, width=100)}


def write(record: FitRecord, path: str | os.PathLike) -> Path:
    """Write a report in the format that the file's name asks for.

    :param record: what is known about a fit.
    :param path: the file: ``.html``, ``.md`` (Markdown), ``.txt`` (the terminal's table) or ``.json`` (the record).
    :return: the path.
    :raises ValueError: for any other suffix.
    :raises OSError: if the file cannot be written; a report that was there before stays.

    Example::

        report.write(record, "report.html")
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        save(record, path)
    elif suffix in _WRITERS:
        _write(_WRITERS[suffix](record), path)
    else:
        raise ValueError(f"{path}: the suffix “{suffix}” names no kind of report. Use .html, .md, .txt or .json.")
    return path


def _write(text: str, path: Path) -> None:
    """Write a whole file beside the old one and put it in its place."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name[:50]}.", suffix=".part", delete=False
        ) as file:
            temporary = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise OSError(
            f"{path} could not be written: {error.strerror or error}. Nothing is lost: name a file in a folder that "
            "exists and that you may write to."
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
