"""The curriculum: one LightningModule a file. `STAGES` maps a stage's name to its class."""

from plato2.stages.base import Stage
from plato2.stages.coarse import CoarseGeneration
from plato2.stages.evaluation import CoherenceEstimation
from plato2.stages.fine import FineGeneration

STAGES: dict[str, type[Stage]] = {
    stage.name: stage for stage in (CoarseGeneration, FineGeneration, CoherenceEstimation)
}

__all__ = ["STAGES", "CoarseGeneration", "CoherenceEstimation", "FineGeneration", "Stage"]
