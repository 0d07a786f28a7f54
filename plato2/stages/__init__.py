"""The curriculum and one stage more: a LightningModule a file. `STAGES` maps a stage's name to its class."""

from plato2.stages.backward import BackwardGeneration
from plato2.stages.base import Stage
from plato2.stages.coarse import CoarseGeneration
from plato2.stages.evaluation import CoherenceEstimation
from plato2.stages.fine import FineGeneration

STAGES: dict[str, type[Stage]] = {
    stage.name: stage for stage in (CoarseGeneration, FineGeneration, CoherenceEstimation, BackwardGeneration)
}

__all__ = [
    "STAGES",
    "BackwardGeneration",
    "CoarseGeneration",
    "CoherenceEstimation",
    "FineGeneration",
    "Stage",
]
