"""Several models in one report: each everywhere, in one order, with its own conditions."""

import re

from example_evaluation import MODEL_QUALITY, THREE, example_evaluation, three_models
from report_page import Page

from scale.evaluate import page as pages
from scale.evaluate.notices import banners
from scale.evaluate.pictures import Picture
from scale.evaluate.pictures.subject import Piece
from scale.evaluate.report import Report
from scale.plot.bars import number


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
