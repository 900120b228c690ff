"""The methods CREST is compared with, under the same protocol and on the same streams of examples."""

from torchcrest.baselines.craig import Craig, CraigConfig
from torchcrest.baselines.glister import Glister, GlisterConfig
from torchcrest.baselines.gradmatch import GradMatch, GradMatchConfig
from torchcrest.baselines.infobatch import InfoBatch, InfoBatchConfig
from torchcrest.baselines.random import RandomBatches

__all__ = [
    "Craig",
    "CraigConfig",
    "Glister",
    "GlisterConfig",
    "GradMatch",
    "GradMatchConfig",
    "InfoBatch",
    "InfoBatchConfig",
    "RandomBatches",
]
