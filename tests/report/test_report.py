"""Reports say what the numbers say, no more and no less, and every file of theirs can be read by what it is for."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import fits
import numpy as np
import pytest

from numpyro_rad import report, wording
from numpyro_rad.__main__ import main
from numpyro_rad.diagnostics.records import Alarm, Estimate, FitRecord, from_dict, to_dict
from numpyro_rad.report import charts, document, sections, verdict

RECORDS = [fits.good, fits.small_budget, fits.diverged, fits.minimal]
EVIL = '<script src="http://x.y/z">&\'"|`*_\n\x00\x1b[31m'
VOID = {"meta"}


def evil():
    """A fit whose every text tries to be more than text."""
    record = fits.small_budget()
    blocks = tuple(dataclasses.replace(b, name=b.name + EVIL) for b in record.gradient_variance.blocks)
    return dataclasses.replace(
        record,
        title=EVIL,
        created=EVIL,
        versions={EVIL: EVIL},
        options={EVIL: EVIL * 5},
        alarms=(Alarm(1, EVIL, EVIL, EVIL),),
        plan=dataclasses.replace(
            record.plan,
            rows=tuple(dataclasses.replace(r, line=EVIL, site=EVIL, decision=EVIL) for r in record.plan.rows),
        ),
        track=dataclasses.replace(record.track, names=tuple(EVIL + n for n in record.track.names)),
        gradient_variance=dataclasses.replace(record.gradient_variance, blocks=blocks),
        posterior=dataclasses.replace(fits.posterior((EVIL, EVIL + "b")), notes=(EVIL,)),
    )


def without_numbers():
    """A fit whose every number is NaN or infinite."""
    record = fits.small_budget()

    def spoilt(data):
        if isinstance(data, dict):
            return {k: spoilt(v) for k, v in data.items()}
        if isinstance(data, list):
            return [spoilt(x) for x in data]
        return "nan" if isinstance(data, float) else data

    parts = {
        f: from_dict(type(getattr(record, f)), spoilt(to_dict(getattr(record, f))))
        for f in ("track", "gradient_variance", "quality", "posterior")
    }
    plan = dataclasses.replace(record.plan, timeline=(), rows=())
    return dataclasses.replace(record, losses=np.full(100, np.inf), plan=plan, **parts)


ALL = [*RECORDS, evil, without_numbers]


class Page(HTMLParser):
    """Checks that elements nest, and collects texts, attributes and elements."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


# -- HTML --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", ALL)
def test_page_is_well_formed_and_needs_nothing_else(record):
    text = report.html(record())
    page = Page(text)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "style"} & {name for _, name, _ in page.attributes}
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    ElementTree.fromstring(text.replace("<!DOCTYPE html>", ""))  # XML too, so every figure is


@pytest.mark.parametrize("record", [fits.good, evil])
def test_figures_can_be_read_without_seeing_them(record):
    figures = re.findall(r'<svg role="img".*?</svg>', report.html(record()), re.S)
    assert len(figures) == 8
    for figure in map(ElementTree.fromstring, figures):
        title, description = (figure.find(tag) for tag in ("title", "desc"))
        assert figure.get("aria-labelledby").split() == [title.get("id"), description.get("id")]
        assert title.text and description.text


def test_text_of_users_is_shown_as_it_is():
    page = Page(report.html(evil()))
    assert EVIL.replace("\x00", "\ufffd").replace("\x1b", "\ufffd") in page.text
    entity = dataclasses.replace(fits.minimal(), title="a &lt;b&gt;")
    assert r"# a \&lt;b\&gt;" in report.markdown(entity).splitlines()


def test_colours_have_contrast_in_light_and_dark():
    """At least 3 to 1 for figures and 4.5 to 1 for text (WCAG 2.2)."""
    light, dark = re.findall(r":root\{(.*?)\}", charts.STYLE, re.S)
    for block in (light, dark):
        colours = dict(re.findall(r"--(\w+):(#\w+)", block))
        for paper in ("paper", "panel"):
            for name, least in {"ink": 7, "soft": 4.5, "blue": 4.5, "green": 4.5, "red": 4.5, "grey": 3}.items():
                assert contrast(colours[name], colours[paper]) >= least, (name, paper)


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    channels = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ [
        0.2126,
        0.7152,
        0.0722,
    ]


def test_a_long_fit_of_a_large_model_stays_small():
    text = report.html(fits.huge())
    assert len(text.encode()) < 2e6
    for rest in ("4,800 others", "284 others", "100 others", "1,800 later ones"):
        assert rest in text
    Page(text)


def test_negative_estimates_are_shown_and_drawn_as_nothing():
    block = fits.block("w", 100.0, 50.0, -7.0)
    measured = dataclasses.replace(fits.gradient_variance(["w"], 0.1), total=block, blocks=(block,))
    text = report.html(dataclasses.replace(fits.minimal(), gradient_variance=measured))
    assert "-7.0 ± 0.3" in text
    widths = [float(w) for w in re.findall(r'<rect[^>]* width="([^"]*)"', text)]
    assert len(widths) == 4 and min(widths) > 0


# -- the verdict -------------------------------------------------------------------------------------------------------


def says(record, words):
    return [f.level for f in verdict.findings(record) if words in f.what]


def with_rho(rho, low, high):
    record = fits.good()
    measured = dataclasses.replace(
        record.gradient_variance, rho=Estimate(rho, 0.1), rho_interval=(low, high), predicted_rho=None
    )
    return dataclasses.replace(record, gradient_variance=measured)


@pytest.mark.parametrize(
    ("rho", "words", "level"),
    [
        ((3.0, 2.0, 4.0), "memory budget is too small", "problem"),
        ((1.2, 0.9, 1.5), "probably too small", "warning"),
        ((0.8, 0.5, 1.1), "is not certain", "note"),
        ((0.3, 0.2, 0.4), "multiply the gradient's variance by 1.3", "note"),
        ((0.05, 0.03, 0.07), "do no visible harm", "good"),
        ((0.001, 0.0005, 0.002), "larger than it has to be", "note"),
        ((-0.001, -0.004, 0.002), "larger than it has to be", "note"),
    ],
)
def test_one_sentence_about_codes(rho, words, level):
    sentences = ("too small", "is not certain", "multiply the", "no visible harm", "larger than it has to be")
    record = with_rho(*rho)
    assert says(record, words) == [level]
    assert sum(len(says(record, s)) for s in sentences) == (
        1 if level != "problem" else 2
    )  # "too small: codes multiply"


def test_rho_of_the_fit_stands_in_for_a_measured_one():
    record = dataclasses.replace(fits.small_budget(), gradient_variance=None)
    assert says(record, "memory budget is too small") == ["problem"]
    assert says(dataclasses.replace(record, track=None), "memory budget") == []


def test_exact_plans_have_no_path_noise():
    record = fits.good()
    rows = tuple(dataclasses.replace(r, relative_variance=0.0) for r in record.plan.rows)
    record = dataclasses.replace(record, plan=dataclasses.replace(record.plan, rows=rows))
    assert says(record, "no path noise") == ["good"]
    assert says(record, "ρ") == []


def test_prediction_far_from_measurement_is_said():
    record = fits.good()
    for predicted, expected in ((0.06, []), (0.01, ["note"]), (0.5, ["note"])):
        measured = dataclasses.replace(record.gradient_variance, predicted_rho=predicted)
        assert says(dataclasses.replace(record, gradient_variance=measured), "The plan predicted") == expected


def losses(fall, rise=0.0, noise=20.0, steps=2000):
    step = np.arange(steps) / steps
    return (
        1000 + 500 * np.exp(-8 * step) - fall * step + rise * step**4 + np.random.default_rng(7).normal(0, noise, steps)
    )


@pytest.mark.parametrize(
    ("series", "words", "level"),
    [
        (losses(0), "levelled off", "good"),
        (losses(200), "still falling", "warning"),
        (losses(200, noise=3000), "levelled off", "good"),  # nobody can tell
        (losses(0, rise=100), "rose", "warning"),
        (losses(0)[:20], "fall", None),
    ],
)
def test_trend_of_the_loss(series, words, level):
    record = dataclasses.replace(fits.minimal(), losses=series)
    assert says(record, words) == ([level] if level else [])
    assert sum(len(says(record, w)) for w in ("levelled off", "still falling", "rose")) == bool(level)


def test_flat_losses_rarely_seem_to_fall():
    """Of 400 series without a trend at most a handful have one beyond three standard errors by chance."""
    rng = np.random.default_rng(8)
    called = sum(any(verdict.trend(rng.normal(0, 1, 400))[2:]) for _ in range(400))
    assert called <= 6  # two-sided 3-sigma: 1.1 expected


def test_error_of_the_mean_ignores_a_trend():
    """The claimed error is σ / √n although the series climbs by ten σ, which a naive one would take for noise."""
    rng = np.random.default_rng(9)
    series = rng.normal(0, 1, (300, 500)) + np.linspace(0, 10, 500)
    errors = np.array([charts.mean_and_error(y)[1] for y in series])
    exact, spread = 1 / np.sqrt(500), errors.std() / np.sqrt(len(errors))
    assert abs(errors.mean() - exact) < 4 * spread
    assert series.std(1).mean() / np.sqrt(500) > exact + 100 * spread


@pytest.mark.parametrize(("k", "level"), [(0.3, "good"), (0.7, "good"), (0.71, "warning"), (None, None)])
def test_k_hat(k, level):
    record = fits.good()
    record = dataclasses.replace(record, quality=dataclasses.replace(record.quality, pareto_k=k))
    found = [f for f in verdict.findings(record) if "k-hat" in f.what]
    assert [f.level for f in found] == [level or "note"]
    if level == "warning":
        assert "Bayesian neural network" in found[0].advice


@pytest.mark.parametrize(
    ("r_hat", "converged", "words", "level"),
    [
        (1.02, True, "have converged", "good"),
        (1.6, False, "have not converged", "warning"),
        (1.05, False, "not precise yet", "warning"),
        (1.05, None, "have converged", "good"),
        (1.2, None, "have not converged", "warning"),
        (None, None, "iterates", None),
    ],
)
def test_convergence(r_hat, converged, words, level):
    record = fits.good()
    quality = dataclasses.replace(record.quality, r_hat=r_hat, converged=converged)
    assert says(dataclasses.replace(record, quality=quality), words) == ([level] if level else [])


def test_batches_of_a_loader_are_not_said_to_add_nothing():
    """The noise of one of them is measured: what they add to it is not known."""
    measured = fits.gradient_variance(["w"], 0.06)
    still = dataclasses.replace(measured.total, minibatch=Estimate(0.0, 0.0))
    record = dataclasses.replace(fits.good(), gradient_variance=dataclasses.replace(measured, total=still))
    loaded = dataclasses.replace(record, options={**record.options, "batches": "3 epochs"})
    whole, within = (report.html(r) for r in (record, loaded))
    assert "begin there" in whole and "Within one batch" not in whole
    assert "Within one batch" in within and "begin there" not in within


def test_little_signal_is_bad_news_only_while_the_loss_falls():
    record = dataclasses.replace(fits.good(), gradient_variance=fits.gradient_variance(["w"], 0.06, signal=0.001))
    assert says(record, "nearly all noise") == ["note"]
    falling = dataclasses.replace(record, losses=fits.small_budget().losses)
    assert says(falling, "nearly all noise") == ["warning"]
    assert says(fits.good(), "nearly all noise") == []


def test_the_largest_source_is_named():
    assert says(fits.good(), "comes from minibatches") == ["note"]
    assert says(fits.small_budget(), "comes from codes of residuals") == ["note"]


def test_nan_is_a_problem_with_its_step():
    assert says(fits.diverged(), "NaN or infinite from step 413") == ["problem"]
    values = fits.good().losses.copy()
    values[[10, 20]] = np.inf
    assert says(dataclasses.replace(fits.good(), losses=values), "2 of 5,000 losses") == ["warning"]
    assert says(fits.good(), "NaN") == []


def test_headlines_follow_the_worst_finding():
    heads = [verdict.headline(verdict.findings(record())) for record in RECORDS]
    assert [h.split()[0] for h in heads] == ["Nothing", "Do", "Do", "Too"]
    assert heads[1].endswith("1 problem and 3 warnings.")
    for record in RECORDS:
        levels = [verdict.LEVELS.index(f.level) for f in verdict.findings(record())]
        assert levels == sorted(levels)


def test_what_could_not_be_measured_is_said():
    record = fits.good()
    quality = dataclasses.replace(record.quality, notes=("No Pareto k-hat: plates draw subsamples.",))
    record = dataclasses.replace(record, quality=quality)
    for text in (report.html(record), report.markdown(record)):
        assert "plates draw subsamples." in text


def test_reports_do_not_take_draws_of_the_guide_for_convergence():
    assert "say nothing about the fit" in report.html(fits.good())


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (37920.4, 26.2, "37,920 ± 26"),
        (0.06, 0.003, "0.060 ± 0.003"),
        (3.2, 0.16, "3.20 ± 0.16"),
        (-7.0, 0.28, "-7.0 ± 0.3"),
        (1.5, float("nan"), "1.5"),
        (float("nan"), 1.0, "–"),
        (1e-9, 1e-10, "1e-09 ± 1e-10"),
    ],
)
def test_estimates_are_rounded_to_their_error(value, error, text):
    assert verdict.estimate(Estimate(value, error)) == text == str(Estimate(value, error))


# -- Markdown and terminal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", ALL)
def test_markdown_tables_are_whole(record):
    lines = report.markdown(record()).splitlines()
    assert lines[0].startswith("# ")
    tables = 0
    for above, line in itertools.pairwise(lines):
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line))
            tables += not above.startswith("|")
            assert line.endswith("|")
            assert cells == len(re.findall(r"(?<!\\)\|", above)) or not above.startswith("|")
    assert tables >= 1
    assert all(re.fullmatch(r"\|( -+:? \|)+", b) for _, b in itertools.pairwise(lines) if b.startswith("| --"))
    assert not any(re.search(r"(?<!\\)<script", line) for line in lines)


@pytest.mark.parametrize("record", ALL)
@pytest.mark.parametrize("width", [40, 72, 100, 200])
def test_terminal_lines_fit(record, width):
    text = report.terminal(record(), width)
    assert max(map(len, text.splitlines())) <= width
    assert all(c.isprintable() or c == "\n" for c in text)
    assert " ".join(verdict.headline(verdict.findings(record())).split()) in " ".join(text.split())


def test_terminal_asks_for_its_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert report.terminal(fits.good()) == report.terminal(fits.good(), 60)


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (10001, 10003), (-5e-5, 7e-5), (1, 1e7), (-3.2e9, 1.1e9), (0, 137), (0.1, 0.100001)]
)
def test_ticks_are_few_and_tell_apart(low, high):
    found = charts.ticks(low, high)
    assert 3 <= len(found) <= 8
    assert len({text for _, text in found}) == len(found)
    assert all(low - 1e-9 * abs(low) <= v <= high + 1e-9 * abs(high) for v, _ in found)


def test_thinning_keeps_peaks_and_means():
    rows = np.column_stack([np.arange(10_000.0), np.random.default_rng(1).normal(size=(10_000, 2))])
    kept = charts.decimated(rows)
    assert len(kept) < 1000
    np.testing.assert_array_equal(kept[:, 1:].max(0), rows[:, 1:].max(0))
    assert np.all(np.diff(kept[:, 0]) > 0)
    means = charts.binned(rows[:, 1])
    assert means.mean.mean() == pytest.approx(rows[:, 1].mean(), abs=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0, 1e6, "1.0 M"),
        (0, 7e6, "6 M"),
        (2e5, 8e5, "600 k"),
        (0, 5000, "5,000"),
        (10001, 10003, "10,002.5"),
        (0, 3e9, "3.0 G"),
    ],
)
def test_large_numbers_on_axes(low, high, shown):
    assert shown in [text for _, text in charts.ticks(low, high)]


@pytest.mark.parametrize(("low", "high"), [(1, 1e7), (9e5, 2e6), (2.1, 4.9), (1e-7, 1.2e-7), (3e3, 4e12)])
def test_logarithmic_ticks(low, high):
    found = charts._log_ticks(low, high)
    assert 2 <= len(found) <= 12
    assert len({text for _, text in found}) == len(found)
    assert not any(re.search(r"\d{4} ?[kMGT]", text) for _, text in found)
    assert all(low * 0.99 <= v <= high * 1.01 for v, _ in found)


def test_no_axis_says_1000k():
    record = dataclasses.replace(fits.good(), losses=np.linspace(4e6, 1e6, 1_200_000))
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", report.html(record))
    assert "1.0 M" in texts
    assert [t for t in texts if re.fullmatch(r"[\d.]{4,} ?[kMG]|\d{4,}", t)] == []


def figure(text, title):
    (found,) = re.findall(rf"<figure><figcaption>{title}</figcaption>.*?</figure>", text, re.S)
    return found


@pytest.mark.parametrize(("rho_max", "label"), [(0.5, "alarm at 0.5"), (2.0, "alarm at 2"), (float("inf"), None)])
def test_alarm_line_is_where_the_alarm_is(rho_max, label):
    """On a logarithmic axis: three equal factors are three equal distances."""
    record = fits.good()
    rho = np.geomspace(0.01, 10, 200)
    track = dataclasses.replace(record.track, rho=rho, rho_max=rho_max)
    shown = figure(report.html(dataclasses.replace(record, track=track)), "ρ over time")
    heights = {text: float(y) for y, text in re.findall(r'y="([\d.]+)">([\d.]+)</text>', shown)}
    assert heights["0.01"] - heights["0.1"] == pytest.approx(heights["0.1"] - heights["1"], abs=0.2)
    assert ("alarm at" in shown) == (label is not None)
    if label is not None:
        assert f">{label}</text>" in shown
        line = float(re.search(r'stroke-dasharray="2 3" d="M70 ([\d.]+)H', shown)[1])
        by_scale = heights["1"] - 4 + (heights["0.1"] - heights["1"]) * -np.log10(rho_max)
        assert line == pytest.approx(by_scale, abs=0.3)


def test_gaps_are_explained():
    record = fits.good()
    for values, words in ((-0.1, "Gaps in a curve: a value is not positive"), (np.nan, "there is no finite number")):
        rho = record.track.rho.copy()
        rho[50:80] = values
        text = report.html(dataclasses.replace(record, track=dataclasses.replace(record.track, rho=rho)))
        assert words in figure(text, "ρ over time")
        assert "Gaps" not in figure(text, "Variance over time")
    lost = record.losses.copy()
    lost[1000:1500] = np.nan
    shown = figure(report.html(dataclasses.replace(record, losses=lost)), "Loss")
    assert "Gaps in a curve: there is no finite number" in shown


def exact():
    """A fit with exact gradients, on all data: of three sources of noise there is one."""
    record = fits.good()
    none = Estimate(0.0, 0.0)

    def alone(b):
        return dataclasses.replace(b, minibatch=none, path=none)

    measured = record.gradient_variance
    measured = dataclasses.replace(measured, total=alone(measured.total), blocks=tuple(map(alone, measured.blocks)))
    track = dataclasses.replace(record.track, path=np.zeros_like(record.track.path), rho=np.zeros(200))
    return dataclasses.replace(record, plan=None, gradient_variance=measured, track=track)


def test_legends_name_what_is_there():
    text = report.html(exact())
    for title in ("Variance of the whole gradient", "Variance by block of parameters", "Variance over time"):
        assert not re.search(r"codes|path\)|% path", figure(text, title)), title
    assert "minibatches" not in figure(text, "Variance by block of parameters")
    assert "guide&#x27;s samples" in figure(text, "Variance by block of parameters")
    assert "ρ over time" not in text
    both = figure(report.html(fits.good()), "Variance over time")
    assert "minibatches and guide" in both and "codes of residuals (path)" in both


def test_tables_that_scroll_on_a_phone_say_so():
    text = report.html(fits.good())
    wide = re.findall(r'class="title wide">([^<]*)<', text)
    assert "Variance by block (± standard error)" in wide and "Plan, the noisiest residuals first" in wide
    assert "Quality" not in wide and "Loss along the run" not in wide
    assert re.search(r'\.wide:before\{content:"scrolls sideways', text)


# -- files and the command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [*RECORDS, evil])
def test_saved_records_come_back(record, tmp_path):
    report.save(record(), tmp_path / "fit.json")
    assert json.dumps(to_dict(report.load(tmp_path / "fit.json"))) == json.dumps(to_dict(record()))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no JSON or was cut off"),
        (b'{"format": "numpyro_rad fit rec', "no JSON or was cut off"),
        (b"\xff\xfe\x00", "no text"),
        (b"[1, 2]", "no saved fit record"),
        (b'{"format": "something"}', "no saved fit record"),
        (b'{"format": "numpyro_rad fit record", "version": 99, "record": {}}', "is of version 99"),
        (b'{"format": "numpyro_rad fit record", "version": 1, "record": {"title": 1}}', "not the data of a FitRecord"),
    ],
)
def test_what_is_no_record_is_refused(content, words, tmp_path, capsys):
    file = tmp_path / "fit.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        report.load(file)
    assert str(file) in str(error.value)
    assert main(["report", str(file)]) == 1
    assert words in capsys.readouterr().err


def test_a_file_that_cannot_be_written_loses_nothing(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    report.write(fits.minimal(), target)
    before = target.read_text(encoding="utf-8")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(document.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left on device"):
        report.write(fits.good(), target)
    assert target.read_text(encoding="utf-8") == before
    assert list(tmp_path.iterdir()) == [target]
    for folder in (tmp_path / "absent", target):
        with pytest.raises(OSError, match="could not be written"):
            report.save(fits.good(), folder / "fit.json")


def test_suffix_chooses(tmp_path):
    starts = {".html": "<!DOCTYPE html>", ".md": "# ", ".txt": "bayesian_network", ".json": '{"format"'}
    for suffix, start in starts.items():
        path = report.write(fits.good(), tmp_path / f"report{suffix}")
        assert path.read_text(encoding="utf-8").startswith(start)
    with pytest.raises(ValueError, match=r"“\.pdf” names no kind of report"):
        report.write(fits.good(), tmp_path / "report.pdf")


def test_command_line(tmp_path, capsys):
    saved, page = tmp_path / "fit.json", tmp_path / "report.html"
    report.save(fits.good(), saved)
    assert main(["report", str(saved), "-o", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == report.html(fits.good())
    assert main(["report", str(saved)]) == 0
    assert "Nothing that was looked at speaks against this fit." in capsys.readouterr().out
    assert main(["report", str(tmp_path / "absent.json")]) == 1
    assert "there is no such file" in capsys.readouterr().err
    assert main(["report", str(saved), "-o", str(tmp_path / "report.pdf")]) == 1
    assert "suffix" in capsys.readouterr().err
    for wrong in ([], ["reports"], ["report"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
        assert "usage: python -m numpyro_rad" in capsys.readouterr().err


def test_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "numpyro_rad", "report", "/absent"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: /absent")


# -- what the whole step takes -----------------------------------------------------------------------------------------


def with_steps(own, exact, **changes):
    """A fit whose compiled step takes so many bytes, and with exact gradients so many."""
    record = fits.good()
    plan = dataclasses.replace(record.plan, temporary_bytes=own, exact_temporary_bytes=exact, **changes)
    return dataclasses.replace(record, options={"ELBO": "RAD_ELBO(memory_budget='2MiB')"}, plan=plan)


def page(record):
    """A report in HTML, its numbers and units with plain spaces between them."""
    return report.html(record).replace("\u00a0", " ")


def everywhere(record):
    return [page(record), report.markdown(record).replace("\\", ""), report.terminal(record, 200)]


@pytest.mark.parametrize(
    ("own", "exact", "beside"),
    [(452 * 2**10, 445 * 2**10, "no saving"), (600 * 2**20, 445 * 2**20, "1.3x more"), (2**20, 2**20, "no saving")],
)
def test_no_saving_that_the_step_does_not_have(own, exact, beside):
    record = with_steps(own, exact)
    for text in everywhere(record):
        assert not re.search(r"2\.5x|x less", text)
        assert beside in text and wording.size_text(own) in text and wording.size_text(exact) in text
    assert says(record, "Use Trace_ELBO() here: its step takes") == ["note"]


def test_no_line_ends_between_a_number_and_its_unit_or_error():
    text = report.html(fits.good())
    for words in ("21,371 ± 12", "11.5 MiB", "6.9 min", "5 % of the steps"):
        whole = re.sub(r"(?<=\d) | (?=\d)", "\u00a0", words)
        assert whole in text and words not in text, words


def test_a_saving_of_the_whole_step():
    record = with_steps(12_100_000, 97_400_000)
    for text in everywhere(record):
        assert "11.5 MiB" in text and "8.0x less" in text and "2.5x less" in text
    assert "with Trace_ELBO() 92.9 MiB: 8.0x less" in page(record)
    noisy = with_rho(0.3, 0.2, 0.4)
    noisy = dataclasses.replace(record, gradient_variance=noisy.gradient_variance)
    (what,) = [f.what for f in verdict.findings(noisy) if "If memory is what you lack" in f.what]
    assert "RAD_ELBO(memory_budget='2MiB') takes 11.5 MiB, 8.0 times less" in what and "30 %" in what
    quiet = with_rho(0.01, 0.005, 0.02)
    quiet = dataclasses.replace(record, gradient_variance=quiet.gradient_variance)
    assert says(quiet, "Use RAD_ELBO(memory_budget='2MiB'): its step takes 11.5 MiB, 8.0 times less") == ["good"]


def test_an_unknown_step_is_not_spoken_of():
    for record in (with_steps(12_100_000, None), with_steps(None, None)):
        assert says(record, "its step takes") == []
    assert "what it takes with exact gradients was not measured" in report.html(with_steps(12_100_000, None))


def test_records_of_before_are_read():
    """JSON that was saved without what is newer."""
    data = to_dict(with_steps(12_100_000, 97_400_000))
    del data["plan"]["exact_temporary_bytes"], data["plan"]["exact_loss"], data["track"]["rho_max"]
    record = from_dict(FitRecord, data)
    assert record.plan.exact_temporary_bytes is None and record.track.rho_max == 0.5


# -- the posterior -----------------------------------------------------------------------------------------------------


def test_posterior_is_shown_everywhere():
    for text in everywhere(fits.good()):
        for words in (
            "Sites under the guide",
            "prec_obs",
            "12.3",
            "-1.2 to 5.8",
            "0.021 to 0.4",
            "91 %",
            "0.49 to 0.53",
        ):
            assert words in text, words
    assert "Posterior" not in report.html(fits.diverged())


@pytest.mark.parametrize(("inside", "level"), [(0.91, "good"), (0.85, "good"), (0.7, "warning")])
def test_data_that_are_not_predicted(inside, level):
    record = dataclasses.replace(fits.good(), posterior=fits.posterior(("a",), inside))
    assert says(record, f"{100 * inside:.0f} % of the observations of y lie in their 90 %") == [level]


def test_few_data_are_no_evidence():
    posterior = fits.posterior(("a",), 0.7)
    posterior = dataclasses.replace(posterior, checks=(dataclasses.replace(posterior.checks[0], size=10),))
    assert says(dataclasses.replace(fits.good(), posterior=posterior), "of the observations") == ["good"]


# -- numbers that say nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "signed", "positive"),
    [
        (-7.0, 32.0, "not distinguishable from 0 (± 32)", "not distinguishable from 0 (below 57)"),
        (-218.0, 678.0, "not distinguishable from 0 (± 678)", "not distinguishable from 0 (below 1,138)"),
        (100.0, 20.0, "100 ± 20", "100 ± 20"),
        (-100.0, 20.0, "-100 ± 20", "not distinguishable from 0"),
        (0.0, 0.0, "0", "0"),
        (5.0, float("nan"), "5", "5"),
    ],
)
def test_estimates_that_are_no_numbers(value, error, signed, positive):
    assert wording.signed_text(value, error) == signed
    assert wording.positive_text(value, error) == positive


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.31, "+31 % time"),
        (0.016, "+1.6 % time"),
        (-0.2, "-20 % time"),
        (4.07e-20, "no added time"),
        (0.0, "no added time"),
        (2e-5, "next to no added time"),
        (3.2, "+320 % time"),
        (float("nan"), "unknown time"),
    ],
)
def test_shares_that_are_added(share, text):
    assert wording.change_text(share, "time") == text


@pytest.mark.parametrize(
    ("exact", "stored", "text"),
    [
        (640, 100, "6.4x less"),
        (100, 100, "no saving"),
        (102, 100, "no saving"),
        (50, 100, "2.0x more"),
        (9, 0, "nothing"),
    ],
)
def test_savings_that_are_none(exact, stored, text):
    assert wording.saving_text(exact, stored).startswith(text)


def unmeasured():
    """A fit at its optimum: the mean gradient is lost in its noise and the plan saves nothing."""
    record = fits.good()
    measured = record.gradient_variance
    total = dataclasses.replace(measured.total, squared_norm=Estimate(-3.0, 40.0))
    measured = dataclasses.replace(
        measured,
        total=total,
        signal_to_noise=Estimate(-0.003, 0.04),
        noise_scale=Estimate(-218.0, 678.0),
        rho=Estimate(-0.001, 0.004),
        rho_interval=(0.0, float("inf")),
    )
    plan = dataclasses.replace(record.plan, stored_bytes=1000, exact_bytes=1010, added_seconds=4.07e-20)
    return dataclasses.replace(record, gradient_variance=measured, plan=plan)


def test_no_number_says_nothing():
    record = unmeasured()
    for text in (
        report.html(record),
        report.markdown(record),
        report.terminal(record, 200),
        str(record.gradient_variance),
    ):
        assert re.findall(r".{20}(?:-218 |e-20 |1\.0x|times less|\binf\b|\bnan\b|ρ = -)", text) == []
    text = report.html(record)
    for words in ("nor a gradient noise scale is known", "no added time", "no saving", "0 to unbounded"):
        assert words in text, words
    assert "gradient noise scale 50" in report.html(fits.good())


def test_a_level_loss_changes_by_nothing_that_is_known():
    record = dataclasses.replace(fits.minimal(), losses=losses(0, noise=300))
    (what,) = [f.what for f in verdict.findings(record) if "levelled off" in f.what]
    assert re.search(r"its change over the last 500 steps is not distinguishable from 0 \(± \d", what), what


@pytest.mark.parametrize(
    ("series", "r_hat", "converged", "words", "level"),
    [
        (losses(0), 1.02, True, ("levelled off", ", and the iterates have converged"), "good"),
        (
            losses(0),
            1.6,
            False,
            ("levelled off", ", but the iterates have not converged", "hardly depends on"),
            "warning",
        ),
        (losses(0), 1.05, False, ("levelled off", ", and the iterates have settled"), "warning"),
        (losses(200), 1.6, False, ("still falling", ", and the iterates have not converged"), "warning"),
        (losses(200), 1.02, True, ("still falling", ", but the iterates have converged"), "warning"),
    ],
)
def test_losses_and_iterates_have_one_verdict(series, r_hat, converged, words, level):
    record = fits.good()
    quality = dataclasses.replace(record.quality, r_hat=r_hat, converged=converged)
    found = verdict.findings(dataclasses.replace(record, losses=series, quality=quality))
    (one,) = [f for f in found if "loss" in f.what or "iterates" in f.what]
    assert one.level == level and all(w in one.what for w in words), one
    assert not ("hardly depends" in one.what and "rain longer" in one.advice)


@pytest.mark.parametrize("width", [40, 72, 100])
def test_terminal_cuts_no_digit(width):
    """Every cell of a column of numbers stands in the text as it is."""
    record = fits.good()
    big = fits.block("dense0.kernel", 16_031_512.0, 9.1e6, 1.2e6, error=0.02)
    measured = dataclasses.replace(record.gradient_variance, total=big, blocks=(big, *record.gradient_variance.blocks))
    record = dataclasses.replace(record, gradient_variance=measured)
    text = report.terminal(record, width)
    assert "16,031,512 ± 320,630" in text
    for section in sections.sections(record):
        for table in (t for t in section.tables if section.title != "Settings"):
            cells = [cell for row in table.rows[:12] for cell in row[table.text_columns :]]
            assert all(cell in text for cell in cells), [c for c in cells if c not in text]
