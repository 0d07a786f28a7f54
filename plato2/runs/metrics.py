"""`metrics.csv`: every logged number of a run as a row `step,metric,value`.

Tidy rows need no header that grows, so the file is only ever appended to. A resumed run first drops what was
logged after its checkpoint: the file is that of an uninterrupted run.
"""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from plato2.bounded import read_file
from plato2.files import replaced
from plato2.runs.saved import HEADER, METRICS_BYTES


class MetricsCsv(Logger):
    """Lightning logger that appends to `metrics.csv`.

    Args:
        folder: the run folder.
        resumed_step: rows of later steps are dropped; None = a new run.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self.resumed_step = resumed_step
        self.prepared = False

    @property
    def name(self) -> str:
        """Lightning's name for the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Unused: a run has one file."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends one row per metric; on disk when it returns."""
        if not self.prepared:
            self._prepare()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows(
                (step, name, repr(float(value))) for name, value in metrics.items() if name != "epoch"
            )

    def _prepare(self) -> None:
        self.prepared = True
        kept = []
        if self.resumed_step is not None and self.path.exists():
            text = read_file(self.path, METRICS_BYTES, "move it away").decode("utf-8", "replace")
            lines = csv.reader(io.StringIO(text, newline=""))
            rows = [row for row in lines if len(row) == len(HEADER) and row[0].isdigit()]
            kept = [row for row in rows if int(row[0]) <= self.resumed_step]
        with replaced(self.path) as new, new.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([HEADER, *kept])
