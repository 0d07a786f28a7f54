"""The curriculum and two more stages: one LightningModule per file."""

from plato2.config import UserError
from plato2.stages.backward import BackwardGeneration
from plato2.stages.base import Stage
from plato2.stages.coarse import CoarseGeneration
from plato2.stages.evaluation import CoherenceEstimation
from plato2.stages.fine import FineGeneration
from plato2.stages.plato import Plato

__all__ = [
    "BackwardGeneration",
    "CoarseGeneration",
    "CoherenceEstimation",
    "FineGeneration",
    "Plato",
    "Stage",
    "known_stages",
    "stage_class",
]


def known_stages() -> dict[str, type[Stage]]:
    """Name -> class of every stage that has been imported, wherever it is defined."""
    known: dict[str, type[Stage]] = {}
    classes = [Stage]
    while classes:
        classes += (parent := classes.pop(0)).__subclasses__()
        known |= {parent.name: parent} if "name" in vars(parent) else {}
    return known


def stage_class(name: str) -> type[Stage]:
    """The class of a stage.

    Raises:
        UserError: none of that name has been imported.
    """
    if name not in (known := known_stages()):
        raise UserError(
            f"stage {name!r} is not known; there are {', '.join(sorted(known))}. If it is your own, "
            "import the module that defines it first"
        )
    return known[name]
