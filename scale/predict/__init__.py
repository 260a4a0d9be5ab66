"""A trained model applied to cells: query, predictor, output."""
