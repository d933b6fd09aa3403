"""Metrics of generated images."""

from icsd.evaluation.attributes import (
    AttributeClassifier,
    AttributeScore,
    attribute_classifier,
    evaluate_attributes,
    format_scores,
    train_classifier,
)

__all__ = [
    "AttributeClassifier",
    "AttributeScore",
    "attribute_classifier",
    "evaluate_attributes",
    "format_scores",
    "train_classifier",
]
