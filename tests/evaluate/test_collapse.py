"""Mean collapse is named in the report of what has collapsed, and of nothing else."""

import numpy as np
import pytest
import scipy.sparse as sp
from small_screen import KEYS, draw, log_normalise, to_anndata

import scale
from scale.config import ProtocolConfig

DRUGS, CELLS, CONTROLS, GENES = 12, 60, 240, 80
LINES = ("L0", "L1", "L2")
ALARMS = ("COLLAPSED", "SHRUNK", "OVER-DISPERSED", "CONTROL COPY")


class Screen:
    """A screen whose law is known, so that every kind of prediction can be drawn from it."""

    def __init__(self, seed, *, common=0.5, own=0.8):
        self.generator = np.random.default_rng(seed)
        self.rate = {c: np.exp(self.generator.normal(0, 1, GENES)) for c in LINES}
        effect = own * self.generator.normal(0, 1, (DRUGS, GENES))
        effect *= self.generator.random((DRUGS, GENES)) < 0.4
        self.effect = effect + common * self.generator.normal(0, 1, GENES)
        self.observed = self.cells(lambda p: self.effect[p])
        number = self.observed.obs.groupby(["line", "drug"], observed=True).cumcount()
        fold = np.where(self.observed.obs["drug"] == "DMSO", number % 2, -1)
        self.observed.obs["control_fold"] = fold

    def cells(self, log_fold, *, name="d"):
        """Cells of every condition with the log fold change ``log_fold(drug number)``."""
        blocks, lines, drugs = [], [], []
        for line in LINES:
            for p in range(DRUGS):
                blocks.append(draw(self.rate[line] * np.exp(log_fold(p)), CELLS, self.generator))
                lines += [line] * CELLS
                drugs += [f"{name}{p}"] * CELLS
            blocks.append(draw(self.rate[line], CONTROLS, self.generator))
            lines += [line] * CONTROLS
            drugs += ["DMSO"] * CONTROLS
        return to_anndata(np.vstack(blocks), np.array(lines), np.array(drugs))

    def exact(self):
        """The true mean of every condition as each of its cells."""
        predicted = self.observed.copy()
        values = predicted.X.toarray()
        for line in LINES:
            for p in range(DRUGS):
                rows = self.rows(line, f"d{p}")
                many = draw(self.rate[line] * np.exp(self.effect[p]), 1000, self.generator)
                values[rows] = log_normalise(many).mean(axis=0)
        predicted.X = sp.csr_matrix(values)
        return predicted

    def copy_of_controls(self):
        """Control cells of the input half under the names of the drugs, as they are."""
        predicted = self.observed.copy()
        values = predicted.X.toarray()
        for line in LINES:
            inputs = self.rows(line, "DMSO")
            inputs = inputs[self.observed.obs["control_fold"].to_numpy()[inputs] == 0]
            for p in range(DRUGS):
                rows = self.rows(line, f"d{p}")
                values[rows] = values[self.generator.choice(inputs, len(rows))]
        predicted.X = sp.csr_matrix(values)
        return predicted

    def rows(self, line, drug):
        obs = self.observed.obs
        return np.flatnonzero((obs["line"] == line) & (obs["drug"] == drug))


def evaluated(predicted, screen, *, train=None, ceiling=True):
    protocol = ProtocolConfig(baselines=False, ceiling=ceiling, num_splits=2)
    return scale.evaluate(predicted, screen.observed, train=train, protocol=protocol, **KEYS)


@pytest.fixture(scope="module")
def examples():
    """One report of a repeat and of the predictions that each fail in their own way."""
    screen = Screen(3)
    mean = screen.effect.mean(axis=0)
    predicted = {
        "repeat": screen.cells(lambda p: screen.effect[p]),
        "one_response": screen.cells(lambda p: mean),
        "sixty_percent": screen.cells(lambda p: 0.6 * screen.effect[p]),
        "identical_cells": screen.exact(),
        "controls": screen.copy_of_controls(),
    }
    return evaluated(predicted, screen)


@pytest.mark.parametrize(
    ("model", "verdict"),
    [
        ("repeat", "no collapse"),
        ("one_response", "COLLAPSED ACROSS PERTURBATIONS"),
        ("sixty_percent", "SHRUNK"),
        ("identical_cells", "COLLAPSED WITHIN SETS"),
        ("controls", "CONTROL COPY"),
    ],
)
def test_each_kind_of_collapse_has_its_name(examples, model, verdict):
    """In words, in the report; a mean that is right as well as identical cells included."""
    assert examples.evaluation.collapse[model]["verdict"] == verdict
    summary, rest = (
        examples.markdown()
        .split("## Verdict")[1]
        .split("## Scores")[0]
        .split(" against the best baseline", 1)
    )
    told = next(line for line in summary.splitlines() if f"check of {model}: " in line)
    assert told.startswith(f"- Mean-collapse check of {model}: {verdict}")
    assert "; spread of the predicted responses" in told
    assert "Mean-collapse" not in rest
    is_alarmed = any(word in told for word in ALARMS)
    assert is_alarmed == (model != "repeat")


def test_the_ratios_are_those_of_the_law(examples):
    facts = examples.evaluation.collapse
    assert facts["repeat"]["spread_ratio"] == pytest.approx(1, abs=0.1)
    assert facts["identical_cells"]["spread_ratio"] == pytest.approx(1, abs=0.1)
    assert abs(facts["one_response"]["spread_ratio"]) < 0.03  # the raw variance of means is not
    # 60 % in counts; a little more than .36 in log1p
    assert 0.3 < facts["sixty_percent"]["spread_ratio"] < 0.48
    assert facts["repeat"]["within_variance_ratio"] == pytest.approx(1, abs=0.1)
    assert facts["identical_cells"]["within_variance_ratio"] == pytest.approx(0, abs=1e-6)
    assert facts["controls"]["copied_share"] == 1.0
    assert facts["repeat"]["copied_share"] == 0.0


def test_correlation_of_change_does_not_see_what_collapse_does(examples):
    table = examples.aggregate.query("form == 'cells' and metric == 'pearson_delta'")
    scores = dict(zip(table["method"], table["mean"], strict=True))
    assert scores["one_response"] > 0.4 * scores["repeat"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_repeat_of_a_screen_without_effect_has_not_collapsed(seed):
    screen = Screen(seed, common=0.0, own=0.0)
    report = evaluated(screen.cells(lambda p: screen.effect[p]), screen, ceiling=False)
    verdict = report.evaluation.collapse["model"]["verdict"]
    assert not any(word in verdict for word in ALARMS)
    assert "do not differ beyond noise" in verdict
    assert "do not differ beyond noise" in report.markdown()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_repeat_of_one_shared_response_has_not_collapsed(seed):
    screen = Screen(seed, common=0.6, own=0.0)
    report = evaluated(screen.cells(lambda p: screen.effect[p]), screen, ceiling=False)
    assert not any(word in report.evaluation.collapse["model"]["verdict"] for word in ALARMS)


def test_spread_that_is_noise_is_a_collapse_too():
    """Few source cells drawn again and again: sets differ, by nothing that is the drug's."""
    screen = Screen(5)
    mean = screen.effect.mean(axis=0)
    few = screen.cells(lambda p: mean)
    values = few.X.toarray()
    for line in LINES:
        for p in range(DRUGS):
            rows = screen.rows(line, f"d{p}")
            values[rows] = values[screen.generator.choice(rows[:6], len(rows))]
    few.X = sp.csr_matrix(values)
    others = screen.generator.normal(0, 0.5, (DRUGS, GENES)) + mean
    train = screen.cells(lambda p: others[p], name="other")
    repeat = screen.cells(lambda p: screen.effect[p])
    report = evaluated({"few": few, "repeat": repeat}, screen, train=train)
    facts = report.evaluation.collapse
    assert facts["repeat"]["verdict"] == "no collapse"
    assert facts["few"]["spread_ratio"] > 0.05
    assert facts["few"]["verdict"] == "COLLAPSED ACROSS PERTURBATIONS"
    assert "both hold the value of no skill" in report.markdown()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weak_effects_are_told_from_one_response(seed):
    """Where the observed spread stands out little, noise is no spread and a repeat no collapse."""
    screen = Screen(seed, common=0.0, own=0.2)
    mean = screen.effect.mean(axis=0)
    predicted = {
        "repeat": screen.cells(lambda p: screen.effect[p]),
        "one_response": screen.cells(lambda p: mean),
    }
    facts = evaluated(predicted, screen, ceiling=False).evaluation.collapse
    assert facts["repeat"]["verdict"] == "no collapse"
    assert facts["one_response"]["verdict"] == "COLLAPSED ACROSS PERTURBATIONS"
