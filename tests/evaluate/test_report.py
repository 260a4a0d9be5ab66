"""Laws of the report: it says what the numbers say, in one file that needs nothing else."""

import dataclasses
import json
import re
import subprocess
import sys
from base64 import b64decode
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from example_evaluation import MODEL_QUALITY, THREE, example_evaluation, three_models
from small_screen import evaluate, hold_out, screen

from scale.evaluate import page as pages
from scale.evaluate import tables
from scale.evaluate.findings import Findings
from scale.evaluate.notices import banners
from scale.evaluate.pictures import Picture
from scale.evaluate.pictures.of_calibration import effect_sizes
from scale.evaluate.pictures.subject import Piece, Subject
from scale.evaluate.report import FILES, Report
from scale.evaluate.scaled import scaled_by_context
from scale.evaluate.verdict import Comparison, against_best_baseline, overall, sentence
from scale.plot.bars import number

BASELINES = ["control_copy", "perturbation_mean", "context_transfer", "additive"]
CLAIMS = ["residual_pearson", "retrieval_l2", "energy_ratio", "overlap_at_N"]


@cache
def evaluate_screen():
    """Scores of a model that knows half of every effect, from cells."""
    cells = screen(seed=2, lines=3, drugs=6, own=0.5)
    train, observed = hold_out(
        cells, [(f"L{c}", f"d{(2 * c + p) % 6}") for c in range(3) for p in (0, 1)]
    )
    predicted = observed.copy()
    mixed = screen(seed=3, lines=3, drugs=6, own=0.5)[: observed.n_obs].X
    predicted.X = (0.5 * observed.X + 0.5 * mixed).tocsr().astype(np.float32)
    is_control = (observed.obs["drug"] == "DMSO").to_numpy()
    rows = np.where(is_control[:, None], observed.X.toarray(), predicted.X.toarray())
    predicted.X = type(observed.X)(rows)
    return evaluate(predicted, observed, train, baselines=True, ceiling=True)


@pytest.fixture(scope="module")
def evaluation():
    return example_evaluation()


@pytest.fixture(scope="module")
def report(evaluation):
    step = np.arange(1, 301, 10)
    curves = pd.DataFrame({"step": step, "train/loss": 2 * np.exp(-step / 100) + 0.5})
    return Report(evaluation, title="Held-out <drugs> & lines", training_metrics=curves)


@pytest.fixture(scope="module")
def folder(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    assert report.save(path) == path / "report.html"
    return path


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains about tags that are not closed."""

    VOID = ("meta", "link", "img", "br", "hr")

    def __init__(self, text):
        super().__init__()
        self.tags, self.stack, self.words = [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split()).replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text())


# --- files --------------------------------------------------------------------------------------


def test_every_file_is_written_and_nothing_else(folder):
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES, "cell_eval"])


def test_tables_hold_the_scores(folder, evaluation):
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "scores.parquet"), evaluation.scores)
    aggregate = pd.read_csv(folder / "aggregate.csv")
    pd.testing.assert_frame_equal(aggregate, evaluation.aggregate)
    assert len(pd.read_csv(folder / "scores.csv")) == len(evaluation.scores)
    assert list(pd.read_csv(folder / "excluded.csv")["perturbation"]) == ["drug-99 <b>&"]


def test_summary_is_the_mean_of_each_method(folder, evaluation):
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == set(MODEL_QUALITY)
    for row in evaluation.aggregate.itertuples():
        assert summary[row.method][row.metric] == pytest.approx(row.mean)


def test_summary_takes_the_better_form(evaluation):
    other = evaluation.aggregate.query("method == 'additive'").assign(form="mean")
    other["mean"] += 0.1
    both = pd.concat([evaluation.aggregate, other])
    findings = Findings(_with(evaluation, aggregate=both))
    means = evaluation.aggregate.set_index(["method", "metric"])["mean"]
    summary = findings.summary()["additive"]
    assert summary["pearson_delta"] == pytest.approx(means["additive", "pearson_delta"] + 0.1)
    assert summary["mse"] == pytest.approx(means["additive", "mse"])
    assert [line.name for line in findings.lines if line.method == "additive"] == [
        "additive (cells)",
        "additive (mean)",
    ]


def _with(evaluation, **changes):
    if dataclasses.is_dataclass(evaluation):
        return dataclasses.replace(evaluation, **changes)
    return type(evaluation)(**{**vars(evaluation), **changes})


def test_undefined_numbers_are_null_in_json(evaluation, tmp_path):
    broken = evaluation.aggregate.copy()
    broken.loc[broken["metric"] == "mse", ["mean", "low", "high"]] = np.nan
    meta = {"floor": np.float64("nan"), "count": np.int64(3), "array": np.arange(2)}
    small = example_evaluation(num_contexts=1, num_perturbations=1, num_genes=60)
    page = Report(_with(small, aggregate=broken, meta=meta)).save(tmp_path)
    Page(page.read_text())  # a single condition makes a page, too
    assert json.loads((tmp_path / "summary.json").read_text())["model"]["mse"] is None
    written = json.loads((tmp_path / "meta.json").read_text())
    assert (written["floor"], written["count"], written["array"]) == (None, 3, [0, 1])


def test_a_report_is_never_overwritten_unasked(report, folder):
    before = (folder / "report.html").read_bytes()
    with pytest.raises(FileExistsError, match=r"report\.html exists"):
        report.save(folder)
    assert (folder / "report.html").read_bytes() == before


def test_equal_evaluations_make_equal_pages(report, folder):
    again = Report(
        example_evaluation(), title=report.title, training_metrics=report.training_metrics
    )
    assert again.html() == (folder / "report.html").read_text()


def test_every_number_of_the_text_stands_in_the_table(folder, evaluation):
    part = (folder / "report.md").read_text().split("## All metrics")[1].split("## Left out")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    known = evaluation.aggregate.assign(method=evaluation.aggregate["method"].str.replace("_", " "))
    means = known.set_index(["metric", "method"])["mean"]
    assert len(rows) * len(names[1:]) == len(means)
    for metric, *cells in rows:
        for method, cell in zip(names[1:], cells, strict=True):
            assert cell == number(means[metric.split()[0], method])


def test_wide_tables_are_the_scores_under_the_names_of_cell_eval(folder, evaluation):
    files = sorted(p.name for p in (folder / "cell_eval").iterdir())
    assert files == [f"LINE-{letter}_results.csv" for letter in "ABCDE"]
    wide = pd.read_csv(folder / "cell_eval" / files[0], index_col="perturbation")
    known = evaluation.scores.query("method == 'model' and context == 'LINE-A'")
    known = known.pivot(index="perturbation", columns="metric", values="value")
    assert set(wide) == set(known) - {"residual_pearson", "retrieval_l2", "energy_ratio"}
    pd.testing.assert_frame_equal(wide, known[list(wide)], check_names=False)


def test_several_models_have_wide_tables_of_their_own(evaluation):
    both = evaluation.scores.query("method == 'model'")
    both = pd.concat([both, both.assign(method="a/b", value=both["value"] + 1)])
    found = dict(tables.cell_eval_tables(both, ["model", "a/b"]))
    assert len(found) == 10
    names = ("model/LINE-A_results.csv", "a%2Fb/LINE-A_results.csv")
    first, second = (found[Path(name)].set_index("perturbation") for name in names)
    np.testing.assert_allclose(second, first + 1)


def test_ceiling_has_both_depths():
    evaluation = evaluate_screen()
    found = tables.ceiling(evaluation.aggregate).set_index("metric")
    rows = evaluation.aggregate.query("method == 'replicate'").set_index("metric")
    half = found.loc["pearson_delta", "half_depth"]
    assert half == rows.loc["pearson_delta", "mean"]
    assert half < found.loc["pearson_delta", "full_depth"] < 1
    assert found.loc["mse", "full_depth"] == pytest.approx(found.loc["mse", "half_depth"] / 2)
    assert np.isnan(found.loc["overlap_at_N", "full_depth"])


def test_scaled_scores_of_contexts_average_to_the_scaled_score():
    evaluation = evaluate_screen()
    found = scaled_by_context(evaluation.aggregate, evaluation.scores)
    keys = ["method", "form", "metric"]
    means = found.groupby([*keys, "unit"])["scaled"].mean().groupby(keys).mean()
    known = evaluation.aggregate.set_index(keys)["scaled"].dropna()
    assert len(known) > 10
    pd.testing.assert_series_equal(means.sort_index(), known.sort_index(), check_names=False)


def test_pooled_numbers_stand_beside_the_control_copy(tmp_path):
    each = example_evaluation(num_contexts=2, num_perturbations=3, num_genes=60)
    alone = each.aggregate.query("method in ('model', 'additive')")
    pooled = _with(
        each,
        aggregate=alone.assign(control_copy=0.929, mean=0.951),
        scores=each.scores.assign(control_copy=0.929),
    )
    made = Report(_with(each, pooled=pooled))
    page = made.save(tmp_path)
    for text in (made.markdown(), Page(page.read_text()).text):
        part = text.split("Pooled over contexts")[-1].split("Left out")[0]
        assert part.count("0.951") == part.count("0.929") == alone["metric"].nunique()
        assert "control copy" in part
        assert "Differences in the mix of contexts then count as an effect" in part
    assert "pooled over contexts" in made.subtitle()
    names = {p.name for p in tmp_path.iterdir()} - {*FILES, "cell_eval"}
    assert names == {"pooled_over_contexts_aggregate.csv", "pooled_over_contexts_scores.csv"}
    assert "control_copy" in pd.read_csv(tmp_path / "pooled_over_contexts_aggregate.csv")


def test_size_of_an_effect_is_without_the_noise():
    generator = np.random.default_rng(0)
    true = generator.normal(0, 0.2, (40, 300))
    sd = 0.15  # of a mean of all cells; that of a half is sqrt 2 larger
    halves = true + np.sqrt(2) * sd * generator.normal(size=(2, *true.shape))
    names = [f"drug-{p}" for p in range(40)]
    table = pd.DataFrame(true + sd * generator.normal(size=true.shape), index=names)
    replicate = pd.DataFrame(
        {
            "method": "replicate",
            "form": "cells",
            "context": "A",
            "perturbation": names,
            "metric": "mse_delta",
            "value": ((halves[0] - halves[1]) ** 2).mean(axis=1),
        }
    )
    aggregate = pd.DataFrame(
        [{"method": "replicate", "form": "cells", "metric": "mse_delta", "mean": 0.1}]
    ).assign(better="lower", low=0.0, high=1.0)
    evaluation = SimpleNamespace(
        deltas={("observed", "A"): table}, scores=replicate, aggregate=aggregate
    )
    found = effect_sizes(Subject(evaluation, ["model"], []))
    expected = np.linalg.norm(true, axis=1)
    assert found.mean() == pytest.approx(expected.mean(), rel=0.02)
    assert np.linalg.norm(table, axis=1).mean() > 1.2 * expected.mean()


def test_tables_come_without_matplotlib(tmp_path):
    # The parent of the test's folder holds the generated evaluation.
    script = (
        "import sys; sys.modules['matplotlib'] = None; "
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r}); "
        "from example_evaluation import example_evaluation; "
        "from scale.evaluate.report import Report; "
        f"print(Report(example_evaluation(num_contexts=1)).save({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.html").read_text()
    assert "<img" not in text
    assert "matplotlib is not installed" in Page(text).text
    assert "0.7" in Page(text).text
    assert not (tmp_path / "summary.png").exists()


# --- the page -----------------------------------------------------------------------------------


def test_page_is_one_small_file_without_network_or_script(folder, page):
    text = (folder / "report.html").read_text()
    assert (folder / "report.html").stat().st_size < 3_000_000
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), (tag, attributes[name][:80])
        assert not any(name.startswith("on") for name in attributes)


def test_links_inside_the_page_lead_somewhere(page):
    names = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = {a["href"].removeprefix("#") for t, a in page.tags if t == "a"}
    assert links
    assert links <= names


def test_pictures_are_whole_and_described(page):
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    figures = [attributes for tag, attributes in page.tags if tag == "figure"]
    described = [image["alt"] for image in images if image["alt"]]  # a figure's first piece
    assert len(figures) >= 10
    assert len(set(described)) == len(described) == len(figures)
    assert min(map(len, described)) > 40
    for image in images:
        data = b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert data.startswith(b"\x89PNG")
        assert data.endswith(b"IEND\xaeB`\x82")


def test_text_of_the_data_is_escaped(folder, page):
    text = (folder / "report.html").read_text()
    assert "drug-99 <b>&" in page.text
    assert "drug-99 <b>" not in text
    assert "Held-out <drugs> & lines" in page.text


def test_order_of_the_page(page):
    parts = ["Verdict", "Mean-collapse check", "Scores", "Figures", "Best and worst", "Left out"]
    text = page.text.split("How it was made", 1)[1]  # after the table of contents
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "How it was made" in text[places[-1] :]


def test_the_ceiling_stands_last_and_is_never_the_best(report):
    lines = report.findings.lines
    assert [line.kind for line in lines] == ["model", *["baseline"] * 4, "ceiling"]
    for metric in report.findings.headline:
        best = [line.method for line in lines if report.findings.is_best(line, metric)]
        assert best == ["model"]


def test_table_lines_up_in_a_terminal(report):
    table = report.table().splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[2].startswith("| model")
    assert "*" in table[2]
    assert table[-1].startswith("| replicate")


# --- what it says -------------------------------------------------------------------------------


def test_gain_is_the_paired_difference_over_units(evaluation):
    found = against_best_baseline(evaluation, "model", "pearson_delta", BASELINES)
    values = evaluation.scores.query("metric == 'pearson_delta'").pivot_table(
        index=["unit", "perturbation"], columns="method", values="value"
    )
    units = (values["model"] - values["additive"]).groupby("unit").mean()
    assert found.baseline == "additive"
    assert found.gain == pytest.approx(units.mean())
    half = 2.7764451051977987 * units.std(ddof=1) / np.sqrt(5)  # t of 4 degrees, 97.5 %
    assert found.low == pytest.approx(units.mean() - half)
    assert found.num_units == 5
    assert found.outcome == "better"


def test_gain_has_the_same_sign_where_lower_is_better(evaluation):
    found = against_best_baseline(evaluation, "model", "mse", BASELINES)
    assert found.value < found.baseline_value
    assert found.gain > 0


def test_the_best_baseline_is_taken_in_its_better_form(evaluation):
    extra = evaluation.scores.query("method == 'control_copy'").assign(form="mean", value=0.9)
    row = evaluation.aggregate.query("method == 'control_copy'").assign(form="mean", mean=0.9)
    changed = _with(
        evaluation,
        scores=pd.concat([evaluation.scores, extra]),
        aggregate=pd.concat([evaluation.aggregate, row]),
    )
    found = against_best_baseline(changed, "model", "pearson_delta", BASELINES)
    assert (found.baseline, found.baseline_form, found.outcome) == ("control_copy", "mean", "worse")


def test_an_equal_model_is_not_told_apart():
    equal = example_evaluation(quality={**MODEL_QUALITY, "model": 0.6}, seed=3)
    outcomes = [
        against_best_baseline(equal, "model", m, BASELINES).outcome
        for m in ("pearson_delta", "mse")
    ]
    assert "better" not in outcomes


@pytest.mark.parametrize(("num_contexts", "words"), [(1, "One independent"), (2, "2 independent")])
def test_few_units_give_no_interval_and_no_claim(num_contexts, words):
    few = example_evaluation(num_contexts=num_contexts, num_perturbations=6, num_genes=60)
    made = Report(few)
    text = made.markdown()
    assert words in text
    assert "none of this is established" in text
    assert f"{num_contexts} of {num_contexts} contexts" in text
    assert all(c.outcome == "open" for c in made.findings.comparisons["model"])


def test_without_baselines_nothing_is_claimed():
    alone = example_evaluation(quality={"model": 0.7}, num_perturbations=6, num_genes=60)
    text = Report(alone).markdown()
    assert "so nothing can be claimed" in text
    assert "no claim is possible" in text
    assert "No ceiling was computed" in text


def test_two_models_each_have_a_verdict_and_a_colour():
    both = example_evaluation(
        quality={"first": 0.8, **MODEL_QUALITY, "model": 0.2}, num_perturbations=6, num_genes=60
    )
    made = Report(both)
    assert made.findings.models == ["first", "model"]
    text = made.markdown()
    claims = "residual correlation, retrieval (L2), energy distance ratio, DE gene overlap"
    assert f"first beats the best baseline on 4 of 4 claim metrics: {claims}.\n" in text
    words = f"on 0 of 4 claim metrics. It is beaten on 4: {claims}.\n"
    assert f"model beats the best baseline {words}" in text
    assert made.subject.colours["first"] != made.subject.colours["model"]


# --- several models -----------------------------------------------------------------------------


def in_order(text, names=tuple(THREE)):
    """Whether all names stand in the text, first in this order."""
    places = [text.find(name) for name in names]
    return -1 not in places and places == sorted(places)


def test_three_models_stand_in_every_figure_and_table_in_one_order():
    report, html = three_models()
    page = Page(html)
    assert report.findings.models == list(THREE)
    alts = {
        attributes["alt"] for tag, attributes in page.tags if tag == "img" and attributes["alt"]
    }
    assert len(alts) >= 12
    assert not [alt for alt in alts if not in_order(alt)]
    for title in ("Verdict", "Scores", "Best and worst conditions"):
        part = page.text.split("How it was made", 1)[1].split(f" {title} ", 1)[1]
        assert in_order(part), title
    assert in_order(report.table())
    assert "<beta>" not in html
    assert len(html) < 3_000_000


def test_each_model_has_its_own_best_and_worst_conditions():
    report, html = three_models()
    part = html[html.index('<section id="conditions">') :]
    tables = part[: part.index("</section>")].split("<details")[1:]
    assert len(tables) == 3
    assert [table.startswith(" open") for table in tables] == [True, False, False]
    for table, model in zip(tables, THREE, strict=True):
        _, values = report.subject.ranking(model)
        rows = re.findall(r'<th scope="row">([^<]*)</th><td>([^<]*)</td>', table)
        known = [*values.index[:5], *values.index[-5:]]
        assert [name for name, _ in rows] == [report.subject.name(c) for c in known]
        assert [value for _, value in rows] == [number(values[c]) for c in known]
        examples = report.subject.examples(model)
        assert (examples["Best"], examples["Worst"]) == (values.index[0], values.index[-1])


def test_the_verdict_of_each_model_is_followed_by_its_collapse_check():
    report, html = three_models()
    told = {
        "model_v2": "No collapse; spread",
        "state <beta>": "SHRUNK (responses to different perturbations differ far less",
        "flat_model": "COLLAPSED ACROSS PERTURBATIONS (one response for every perturbation",
    }
    text = Page(html).text.split(" Verdict ", 2)[2]
    ends = [f"{model} beats the best baseline" for model in THREE]
    ends += [banners(report.findings)[0], "Scores"]
    for model, start, end in zip(told, ends, ends[1:], strict=False):
        part = text[text.index(start) : text.index(end)]
        assert f"Mean-collapse check. {told[model]}" in part
    lines = [line for line in report.markdown().splitlines() if line]
    for model, words in told.items():
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{model} beats"))
        check = f"- Mean-collapse check of {model}: {words}".lower()
        assert lines[place + 1].lower().startswith(check)


def test_models_that_figures_leave_out_are_named_and_stand_in_the_tables():
    many = {f"m{i}": 0.7 - 0.1 * i for i in range(5)}
    made = Report(
        example_evaluation(
            quality=many | {"additive": 0.5}, num_contexts=3, num_perturbations=3, num_genes=20
        )
    )
    figure = Picture(name="one", title="t", caption="c", alt="a", pieces=(Piece(b"", 1),))
    facts = {"title": "t", "subtitle": "s", "meta": made.meta}
    text = Page(pages.build(made.findings, made.subject, [figure], **facts)).text
    assert "genes and cells show m0, m1, m2; m3, m4 stand in the tables" in text
    assert text.count("Best and worst conditions of m") == 5


# --- where it comes from ------------------------------------------------------------------------

ALWAYS_TOLD = {
    "profile",
    "contexts",
    "control_rule",
    "control_floor",
    "undefined",
    "normalize",
    "target_sum",
    "genes_sha256",
    "split",
    "split_sha256",
    "observed_sha256",
    "predicted_sha256",
    "train_sha256",
    "held_out_controls_in_training",
    "genes_chosen_on",
    "checkpoint",
    "training_seed",
    "prediction_seed",
    "seed",
    "versions",
    "command",
    "num_conditions",
}


def test_every_fact_is_told_and_what_is_not_known_is_called_so():
    report = Report(evaluate_screen(), meta={"split": "mine.toml", "checkpoint": {"model": "ab12"}})
    assert set(report.meta) >= ALWAYS_TOLD
    unknown = {name for name, value in report.meta.items() if value == "unknown"}
    assert unknown == {
        "split_sha256",
        "part",
        "held_out_controls_in_training",
        "genes_chosen_on",
        "training_seed",
        "prediction_seed",
        "target_sum",
        "command",
    }
    part = report.markdown().split("## How it was made")[1]
    for line in (
        "protocol: strict",
        "controls of held-out contexts in training: unknown",
        "undefined values: left out for every method where the data has no answer",
        "normalised here: no: the files hold log1p values",
        "split: mine.toml",
        "weights, SHA-256: model ab12",
        f"gene list, SHA-256: {report.meta['genes_sha256']}",
    ):
        assert f"- {line}" in part
    facts = pages.in_words(report.meta)
    html = Page(
        pages.build(report.findings, report.subject, [], title="", subtitle="", meta=report.meta)
    )
    assert all(f"{name} {value}" in html.text for name, value in facts.items())


@pytest.mark.parametrize("num_units", [1, 2, 5])
def test_a_unit_is_called_by_no_other_name(num_units):
    """Units may be donors, and hold several contexts: nothing speaks of cell lines then."""
    made = example_evaluation(num_perturbations=4, num_genes=20)
    donor = {f"LINE-{letter}": f"donor {i % num_units}" for i, letter in enumerate("ABCDE")}
    made.scores["unit"] = made.scores["context"].map(donor)
    made.aggregate["reason"] = ""
    text = Report(made).markdown()
    assert "cell line" not in text.lower()
    unit = "contexts" if num_units == 5 else "independent units"
    assert f"of {num_units} {unit}" in text
    if num_units < 3:
        assert f"Fewer than 3 {unit}: no interval; gain by independent unit: donor 0 " in text
    if num_units == 1:
        assert "One independent unit only (donor 0)" in text
        assert "say nothing about another unit" in text


def test_an_evaluation_without_a_model_is_refused():
    none = example_evaluation(quality={"additive": 0.5}, num_perturbations=3, num_genes=60)
    with pytest.raises(ValueError, match="no model, only additive"):
        Report(none)


def test_many_long_labels_stay_small(tmp_path):
    many = example_evaluation(num_contexts=3, num_perturbations=40, num_genes=60)
    rename = {f"drug-{i:02d}": f"[('A rather long drug name {i}', 0.5, 'uM')]" for i in range(40)}
    many.scores["perturbation"] = many.scores["perturbation"].map(rename)
    for changes in (many.deltas, many.fold_changes):
        for table in changes.values():
            table.index = table.index.map(rename)
    path = Report(many).save(tmp_path)
    assert path.stat().st_size < 3_000_000
    assert "A rather long drug name 1" in Page(path.read_text()).text


def _comparison(**changes):
    facts = {
        "model": "model",
        "metric": "pearson_delta",
        "is_claim": True,
        "value": 0.5,
        "better": "higher",
        "baseline": "additive",
        "baseline_form": "mean",
        "baseline_value": 0.4,
        "ceiling": 0.6,
        "full_ceiling": 0.7,
        "gain": 0.1,
        "low": 0.05,
        "high": 0.15,
        "num_units": 5,
        "num_units_better": 5,
        "num_conditions": 50,
    }
    return Comparison(**{**facts, **changes})


def test_sentences_say_what_the_interval_allows():
    assert sentence(_comparison()) == (
        "0.500, better than the best baseline (additive, 0.400) in 5 of 5 contexts, paired gain "
        "+0.100 [+0.050, +0.150]. A replicate of half the cells reaches 0.600 (0.700 carried to "
        "all cells)."
    )
    assert "not told apart" in sentence(_comparison(low=-0.01, num_units_better=3))
    assert "worse than" in sentence(_comparison(gain=-0.1, low=-0.2, high=-0.05))
    assert "the best baseline is level with it" in sentence(_comparison(full_ceiling=0.39))
    assert "level with it" not in sentence(_comparison(ceiling=0.39))
    both = [_comparison(), _comparison(metric="mse", gain=-0.1, low=-0.2, high=-0.05)]
    assert overall("model", [*both, _comparison(metric="mae", low=-0.01)]) == (
        "model beats the best baseline on 1 of 3 claim metrics: correlation of change. It is "
        "beaten on 1: squared error. Not told apart on 1: absolute error."
    )


def test_no_claim_stands_where_the_collapse_check_fires(evaluation):
    assert "none of this is a claim" in overall("model", [_comparison()], "CONTROL COPY")
    fired = {"model": {"spread_ratio": 0.01, "verdict": "COLLAPSED ACROSS PERTURBATIONS"}}
    text = Report(_with(evaluation, collapse=fired)).markdown()
    assert "the mean-collapse check fires (COLLAPSED ACROSS PERTURBATIONS)" in text


def test_claim_metrics_are_fixed_beforehand(report):
    claims = [c.metric for c in report.findings.comparisons["model"] if c.is_claim]
    assert claims == CLAIMS
