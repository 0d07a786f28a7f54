"""The report in Weights & Biases: the page, and every figure in the summary of one run."""

from __future__ import annotations

from plato2.report.found import Found


def log(project: str, title: str, page: str, found: Found) -> None:
    """Logs the page and the figures, `kind/system/measure`, as a run of its own.

    Offline mode (WANDB_MODE=offline) needs no network.

    Args:
        project: of the run.
        title: its name.
        page: HTML.
        found: the results that the page is made of.
    """
    import wandb

    figures = {
        f"{result.kind}/{system}/{name}": figure.value
        for _, result in found.results
        for system, by_name in result.systems.items()
        for name, figure in by_name.items()
        if figure.value is not None
    }
    with wandb.init(project=project, name=title, job_type="report", reinit="create_new") as run:
        run.log({"report": wandb.Html(page, inject=False)})
        run.summary.update(figures)
