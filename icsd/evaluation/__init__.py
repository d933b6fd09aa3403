"""Scores of painted pictures."""

from icsd.evaluation.attributes import (
    AttributeClassifier,
    AttributeScore,
    evaluate_attributes,
    format_scores,
    train_classifier,
)

__all__ = ["AttributeClassifier", "AttributeScore", "evaluate_attributes", "format_scores", "train_classifier"]
