"""Scores of generated images."""

from icsd.evaluation.attributes import (
    AttributeClassifier,
    AttributeScore,
    evaluate_attributes,
    format_scores,
    train_classifier,
)

__all__ = ["AttributeClassifier", "AttributeScore", "evaluate_attributes", "format_scores", "train_classifier"]
