"""The dashboard in Weights & Biases, as code: the panels of runs/panels.py as a workspace, or as a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from plato2.config import UserError, install
from plato2.files import replace_text
from plato2.runs.panels import PANELS, USAGE, Panel

if TYPE_CHECKING:
    import wandb_workspaces.workspaces as workspaces

COLUMNS = (
    "run:displayName",
    "run:state",
    *(f"config:run.{key}" for key in ("curriculum", "stage", "size", "seed", "parent")),
    *(f"summary:val/{name}" for name in ("ppl", "coherence_acc", "z_mutual_information")),
)
"""Of the table of runs."""


def workspace(project: str, entity: str, name: str) -> workspaces.Workspace:
    """The dashboard, not yet saved; no network is used.

    Runs are grouped by curriculum and stage, so that a line is the mean of a stage's seeds.

    Args:
        project: of the runs.
        entity: the user or team that it belongs to.
        name: of the view.

    Raises:
        UserError: the package is not installed, or the name is none that W&B takes.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError(f"plato2 dashboard needs wandb-workspaces: {install('dashboard')}") from None
    try:
        return ws.Workspace(
            entity=entity,
            project=project,
            name=name,
            sections=[
                ws.Section(name=section, panels=[_chart(panel) for panel in panels], is_open=True)
                for section, panels in PANELS.items()
            ],
            runset_settings=ws.RunsetSettings(
                groupby=[ws.Metric("Group"), ws.Metric("JobType")], pinned_columns=list(COLUMNS)
            ),
        )
    except ValueError as error:  # pydantic's
        raise UserError(f"--name {name}: {str(error).splitlines()[-1].strip()}; choose another one") from None


def _chart(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as reports

    if panel.kind == "replies":
        layout = reports.Layout(w=24, h=10)
        return reports.WeavePanelSummaryTable(table_name=panel.metrics[0], layout=layout)
    lines: dict[str, Any] = {"y": list(panel.metrics)}
    if panel.kind == "latents":
        lines = {"metric_regex": f"^{USAGE}$"}
    return reports.LinePlot(
        title=panel.title, x="Step", title_x="step", title_y=panel.unit, log_y=panel.log or None, **lines
    )


def write(file: Path, made: workspaces.Workspace) -> None:
    """Writes what would be saved, as JSON.

    Raises:
        UserError: it cannot be written.
    """
    text = made._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2)
    try:
        replace_text(file, text + "\n")
    except OSError as error:
        raise UserError(f"--out {file}: cannot be written ({error.strerror}); name another file") from None


def save(made: workspaces.Workspace) -> str:
    """Saves the dashboard as a view of the project; returns its address.

    Raises:
        UserError: no key, no network, or the server refuses it.
    """
    import wandb

    try:
        if not made.entity:
            made.entity = str(wandb.Api(timeout=30).default_entity)
        made.save()
    except Exception as error:  # W&B's, requests' and GraphQL's have nothing in common
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"plato2 dashboard: not saved ({reason}); log in with `wandb login`, or write it with --out "
            "dashboard.json, which needs no network"
        ) from None
    return str(made.url)
