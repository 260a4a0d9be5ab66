"""Perturbations that a model was not trained on, known to it by their features.

Apart from the predictor because it changes what the model knows before anything is predicted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scale.data.features import FeatureTable, describe_names, feature_rows
from scale.types import Vocabulary

if TYPE_CHECKING:
    from scale.model.model import ScaleModel


def learn_features(model: ScaleModel, vocabulary: Vocabulary, path: Path) -> Vocabulary:
    """Give a model the features of a file; return the vocabulary with its names.

    What was trained keeps the features of the training.

    Raises
    ------
    ValueError
        If the model was trained without features.
    SourceError, PlanError
        If the file cannot be read, or its numbers are not those of the training.
    """
    table = FeatureTable.read(path)
    if not vocabulary.num_features:
        raise ValueError(
            f"the model was trained without features of perturbations and cannot read {path}; "
            "train one with data.perturbation_features"
        )
    known = describe_names(vocabulary, table, table.names)
    feature_CV = torch.from_numpy(feature_rows(table, known))
    held, num_trained = model.condition.features, len(vocabulary.components)
    assert held is not None, "a vocabulary with features belongs to a model with them"
    feature_CV[:num_trained] = held.feature_CV[:num_trained]
    for name in set(vocabulary.described) - set(table.names):
        feature_CV[known.row_of[name]] = held.feature_CV[vocabulary.row_of[name]]
    model.condition.set_features(feature_CV)
    return known
