"""Laws of the report: it says what the numbers say, in one file that needs nothing else."""

import json
import re
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from example_evaluation import MODEL_QUALITY, example_evaluation
from report_page import Page, changed, evaluate_screen

from scale.evaluate import tables
from scale.evaluate.findings import Findings
from scale.evaluate.pictures.of_calibration import effect_sizes
from scale.evaluate.pictures.subject import Subject
from scale.evaluate.report import FILES, Report
from scale.evaluate.scaled import scaled_by_context
from scale.plot.bars import number


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
    findings = Findings(changed(evaluation, aggregate=both))
    means = evaluation.aggregate.set_index(["method", "metric"])["mean"]
    summary = findings.summary()["additive"]
    assert summary["pearson_delta"] == pytest.approx(means["additive", "pearson_delta"] + 0.1)
    assert summary["mse"] == pytest.approx(means["additive", "mse"])
    assert [line.name for line in findings.lines if line.method == "additive"] == [
        "additive (cells)",
        "additive (mean)",
    ]


def test_undefined_numbers_are_null_in_json(evaluation, tmp_path):
    broken = evaluation.aggregate.copy()
    broken.loc[broken["metric"] == "mse", ["mean", "low", "high"]] = np.nan
    meta = {"floor": np.float64("nan"), "count": np.int64(3), "array": np.arange(2)}
    small = example_evaluation(num_contexts=1, num_perturbations=1, num_genes=60)
    page = Report(changed(small, aggregate=broken, meta=meta)).save(tmp_path)
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
    pooled = changed(
        each,
        aggregate=alone.assign(control_copy=0.929, mean=0.951),
        scores=each.scores.assign(control_copy=0.929),
    )
    made = Report(changed(each, pooled=pooled))
    page = made.save(tmp_path)
    for text in (made.markdown(), Page(page.read_text()).text):
        part = text.split("Pooled over contexts")[-1].split("Left out")[0]
        assert part.count("0.951") == part.count("0.929") == alone["metric"].nunique()
        assert "control copy" in part
        assert "Differences in the mix of contexts then count as an effect" in part
    assert "pooled over contexts" in made.subtitle()
    verdict = made.markdown().split("## Verdict")[1].split("## Scores")[0]
    assert "Scores pooled over contexts stand in a section of their own" in verdict
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
