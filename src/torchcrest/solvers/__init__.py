"""Solvers: which examples to pick, given how they compare."""

from torchcrest.solvers.facility import facility_location
from torchcrest.solvers.matching import match_gradients
from torchcrest.solvers.medoids import labels_of, medoids, pick, shares, weigh
from torchcrest.solvers.oneshot import Metric, coreset

__all__ = [
    "Metric",
    "coreset",
    "facility_location",
    "labels_of",
    "match_gradients",
    "medoids",
    "pick",
    "shares",
    "weigh",
]
