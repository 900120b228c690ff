"""CREST: mini-batch coresets for training deep networks."""

from torchcrest.baselines import (
    Craig,
    CraigConfig,
    Glister,
    GlisterConfig,
    GradMatch,
    GradMatchConfig,
    InfoBatch,
    InfoBatchConfig,
    RandomBatches,
)
from torchcrest.config import CrestConfig
from torchcrest.crest import Crest
from torchcrest.difficulty import Difficulty
from torchcrest.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError, RankError, TorchcrestError
from torchcrest.objectives import Classification, Objective, Projecting, Regression, Trimming
from torchcrest.solvers import coreset, facility_location
from torchcrest.tokens import CausalLM, TokenClassification
from torchcrest.types import BatchLoader, Stats, WeightedBatch

__version__ = "0.1.0"
__all__ = [
    "BatchLoader",
    "CausalLM",
    "CheckpointError",
    "Classification",
    "ConfigError",
    "Craig",
    "CraigConfig",
    "Crest",
    "CrestConfig",
    "DataError",
    "Difficulty",
    "Glister",
    "GlisterConfig",
    "GradMatch",
    "GradMatchConfig",
    "InfoBatch",
    "InfoBatchConfig",
    "NonFiniteLossError",
    "Objective",
    "Projecting",
    "RandomBatches",
    "RankError",
    "Regression",
    "Stats",
    "TokenClassification",
    "TorchcrestError",
    "Trimming",
    "WeightedBatch",
    "coreset",
    "facility_location",
]
