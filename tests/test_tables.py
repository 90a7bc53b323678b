"""What prints as a table shows as one in a notebook, and a report as a page."""

import html
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import pytest
from fits import good

from numpyro_rad import compare, explain, rad, report
from numpyro_rad.planning.worth import Option
from numpyro_rad.tables import TextTable
from numpyro_rad.training import Advice

KEY, X = jax.random.key(0), jnp.ones((16, 16))


class Cells(HTMLParser):
    """The text of a piece of HTML, and of the cells of its tables; every tag has to be closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def network(w):
    return (jnp.tanh(jnp.tanh(X @ w) @ w) ** 2).sum()


def explained(**options):
    return explain(rad(network, **options), KEY, X)


def test_a_table_is_the_same_as_text_and_in_a_notebook():
    table = TextTable(("where", "n"), [("<lambda>", "1"), ("b & c", "20")], frozenset({1}), ["a < b"], ("all", "21"))
    assert str(table).splitlines() == [
        "where      n",
        "------------",
        "<lambda>   1",
        "b & c     20",
        "------------",
        "all       21",
        "a < b",
    ]
    shown = Cells(table.html())
    assert shown.cells == ["where", "n", "<lambda>", "1", "b & c", "20", "all", "21"] and shown.text.endswith("a < b")
    assert str(TextTable(("a",), [("1",)], frozenset())).splitlines() == ["a", "-", "1"]


@pytest.mark.parametrize(
    "make",
    (
        explained,
        lambda: compare(explained(), explained(exact=True)),
        lambda: good().gradient_variance,
        lambda: Advice(
            options=(
                Option("Trace_ELBO()", 2**20, None, 0.1, 1.0, 0.0),
                Option("RAD_ELBO()", 2**10, 10, 0.2, 1.0, 0.1),
            ),
            chosen=Option("RAD_ELBO()", 2**10, 10, 0.2, 1.0, 0.1),
            sentence="Take RAD_ELBO().",
        ),
    ),
    ids=("explain", "compare", "gradient_variance", "advise"),
)
def test_results_are_tables_in_a_notebook(make):
    result = make()
    text, shown = str(result), Cells(result._repr_html_())
    cells = [cell for cell in shown.cells if cell]
    assert len(cells) > 6 and all(cell in text for cell in cells)
    assert text.splitlines()[-1] in shown.text


def test_a_report_is_a_page_in_a_notebook():
    page = report.html(good())
    assert isinstance(page, str)
    shown = page._repr_html_()
    assert shown.startswith("<iframe ") and shown.count('"') == 6  # what is quoted does not end its attribute
    assert html.unescape(shown.split('srcdoc="')[1].removesuffix('"></iframe>')) == page
