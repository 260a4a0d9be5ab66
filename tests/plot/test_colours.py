"""Methods are told apart by colour, whatever one's eyes, and models stand out from baselines."""

from itertools import combinations, product

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from scale.evaluate.baselines import BASELINES
from scale.plot.canvas import (
    BASELINE_COLOURS,
    CONTROL,
    MODEL_COLOURS,
    OBSERVED,
    PAPER,
    REPLICATE,
    method_colours,
    method_name,
)

# Full-strength matrices of Machado, Oliveira and Fernandes (2009), for linear RGB.
EYES = {
    "usual": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def as_seen(colour, eyes):
    """CIELAB coordinates of a colour."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(np.array(EYES[eyes]) @ linear, 0, 1) / TO_XYZ.sum(axis=1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def least(pairs, eyes):
    return min(np.linalg.norm(as_seen(a, eyes) - as_seen(b, eyes)) for a, b in pairs)


@pytest.mark.parametrize("eyes", EYES)
def test_colours_stay_apart(eyes):
    baselines = list(BASELINE_COLOURS.values())
    assert least(combinations(MODEL_COLOURS, 2), eyes) > 11
    assert least(combinations(MODEL_COLOURS[:3], 2), eyes) > 16
    assert least(combinations(baselines, 2), eyes) > 9
    others = (OBSERVED, CONTROL, REPLICATE)
    assert least(product(MODEL_COLOURS, [*baselines, *others]), eyes) > 16
    assert least(product(baselines, [PAPER, OBSERVED, REPLICATE]), eyes) > 12


@pytest.mark.parametrize("eyes", EYES)
def test_models_are_darker_than_baselines(eyes):
    palest = max(as_seen(c, eyes)[0] for c in MODEL_COLOURS)
    assert palest < min(as_seen(c, eyes)[0] for c in BASELINE_COLOURS.values())


def test_every_baseline_has_a_colour_of_its_own_in_every_report():
    assert set(BASELINE_COLOURS) == set(BASELINES)
    few = method_colours(["mine"], ["additive", "context_mean"])
    many = method_colours(["mine", "other"], BASELINES)
    assert few.items() <= many.items()
    assert len({many[name] for name in BASELINES}) == len(BASELINES)


def test_a_model_keeps_the_name_it_was_given():
    assert [method_name(m) for m in ("my_model", "context_transfer", "oracle_mean")] == [
        "my_model",
        "context transfer",
        "oracle mean",
    ]
