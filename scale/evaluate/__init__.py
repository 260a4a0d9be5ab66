"""Judging predictions: metrics, baselines, protocol, statistics and the report."""
