"""Scores of painted pictures."""

from icsd.evaluation.attributes import AttributeScore, evaluate_attributes, format_scores

__all__ = ["AttributeScore", "evaluate_attributes", "format_scores"]
