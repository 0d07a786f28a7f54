"""What people look at while runs train: the panels of the dashboard, defined once.

Three pages are made of them: the one in Weights & Biases (report/dashboard.py), TensorBoard's custom scalars
(loggers.py), and the offline page of `plato2 report`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Panel:
    """One chart, or the table of replies."""

    title: str
    metrics: tuple[str, ...] = ()
    """Names, as they are logged; of `latents` and `replies` those that only W&B and TensorBoard have."""
    unit: str = ""
    """Of the vertical axis."""
    stages: tuple[str, ...] = ()
    """The stages that it is about; none = all."""
    log: bool = False
    """Whether the vertical axis is logarithmic."""
    kind: Literal["lines", "latents", "replies"] = "lines"
    """Lines over the steps; the share of each latent at a validation; a table of replies."""

    def about(self, stage: str) -> bool:
        """Whether a stage's runs belong into it."""
        return not self.stages or stage in self.stages


USAGE = r"val/z_usage_\d+"
"""The metrics of a panel of latents: the share of each."""
PANELS: Mapping[str, tuple[Panel, ...]] = {
    "losses": (
        Panel("loss, all terms", ("train/loss", "val/loss"), "nats"),
        Panel("1_coarse: loss", ("train/nll", "val/nll"), "nats", ("1_coarse",)),
        Panel("2_gen: loss", ("train/nll", "val/nll", "train/bow", "val/bow"), "nats", ("2_gen",)),
        Panel(
            "2_eval: loss",
            (
                *("train/rce", "val/rce", "train/mlm", "val/mlm", "train/contrast", "val/contrast"),
                *("train/nll", "val/nll", "train/nll_alone", "val/nll_alone"),
            ),
            "nats",
            ("2_eval",),
        ),
        Panel("backward: loss", ("train/nll", "val/nll"), "nats", ("backward",)),
        Panel(
            "plato: loss",
            ("train/nll", "val/nll", "train/bow", "val/bow", "train/rce", "val/rce"),
            "nats",
            ("plato",),
        ),
    ),
    "quality": (
        Panel("perplexity", ("val/ppl", "val/ppl_uniform"), "", log=True),
        Panel("coherence: accuracy", ("val/coherence_acc", "val/pair_acc"), "share"),
        Panel("coherence: first of ten", ("val/p1", "val/mrr"), "share"),
    ),
    "latents": (
        Panel("share of each latent", ("latent_usage",), "share", kind="latents"),
        Panel("latents in use", ("val/z_effective", "val/z_in_use"), "latents"),
        Panel("entropy and information of z", ("val/z_entropy", "val/z_mutual_information"), "nats"),
    ),
    "speed": (
        Panel("tokens a second", ("perf/tokens_per_s",), "tokens/s"),
        Panel("share of the device's peak (MFU)", ("perf/mfu",), "share"),
        Panel("memory", ("perf/memory_gib",), "GiB"),
        Panel("seconds of a step", ("perf/step_s",), "s"),
    ),
    "optimizer": (
        Panel("gradient norm, before clipping", ("train/grad_norm",), "", log=True),
        Panel("learning rate", ("train/lr",)),
        Panel("steps passed over (callbacks=spike_guard)", ("train/skipped",)),
    ),
    "replies": (Panel("replies", ("replies",), kind="replies"),),
}
"""Section -> its panels, in the order in which they are shown."""


def tensorboard_layout(stage: str) -> dict[str, dict[str, list[object]]]:
    """The panels about a stage as a layout of TensorBoard's custom scalars; tags are regular expressions."""
    layout: dict[str, dict[str, list[object]]] = {}
    for section, panels in PANELS.items():
        for panel in panels:
            if panel.kind == "replies" or not panel.about(stage):
                continue
            names = [USAGE] if panel.kind == "latents" else [re.escape(name) for name in panel.metrics]
            layout.setdefault(section, {})[panel.title] = ["Multiline", [f"^{name}$" for name in names]]
    return layout


def shown_metrics(panel: Panel, logged: Iterable[str]) -> list[str]:
    """The metrics of a panel that a run has logged, in the panel's order."""
    logged = set(logged)
    if panel.kind == "latents":
        return sorted(name for name in logged if re.fullmatch(USAGE, name))
    return [name for name in panel.metrics if name in logged]
