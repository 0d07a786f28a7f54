"""`plato2 import`: model folders from the weights of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # --help needs no torch
    from plato2.weights.knover import Imported

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Make a model folder from weights that others released.",
)

HELP = """Make a model folder from Knover's released weights.

PATH is a folder with Plato and/or NSP (one file per parameter), one of these two, a .tar or .tar.gz of it, or
PaddleNLP's .pdparams. Paddle is not needed, and nothing in the files is executed. The geometry follows from
the shapes; heads that only training needs may be absent.

[bold]Examples[/]

plato2 import knover 24L.tar --out models/24L

plato2 import knover 32L/ --out models/32L --lower-case --dtype float16

plato2 chat --generation models/24L --evaluation models/24L
"""


@app.callback()
def _group() -> None:
    """Make a model folder from weights that others released."""


@app.command(help=HELP)
def knover(
    path: Annotated[Path, typer.Argument(help="Folder, .tar, .tar.gz or .pdparams.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder with spm.model and vocab.txt; default: one next to the weights, else Knover's "
            "English one."
        ),
    ] = None,
    n_head: Annotated[
        int | None,
        typer.Option(
            help="Attention heads; default: from Knover's configuration next to the weights, else hidden "
            "/ 64."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Convert to float32, float16 or bfloat16; default: unchanged.")
    ] = None,
    lower_case: Annotated[
        bool | None,
        typer.Option("--lower-case/--no-lower-case", help="Lower-case all text, as Knover's 32L does."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Run the verb."""
    from plato2.commands.export import check_dtype
    from plato2.weights.knover import import_knover

    check_dtype(dtype)
    console = Console(stderr=True, highlight=False)
    with console.status("reading") as status:
        found = import_knover(path, out, tokenizer, n_head, dtype, lower_case, status.update)
    if as_json:
        typer.echo(json.dumps(_summary(found, out)))
        return
    out_console = Console(highlight=False)
    out_console.print(_table(found))
    out_console.print(f"heads from {found.heads_from}; tokenizer from {found.tokenizer_from}", soft_wrap=True)
    if found.left_alone:
        out_console.print(f"not weights, ignored: {', '.join(found.left_alone)}", soft_wrap=True)
    generation = f" --generation {out}" if "generation" in found.models else ""
    evaluation = f" --evaluation {out}" if "evaluation" in found.models else ""
    out_console.print(f"wrote {out}", soft_wrap=True)
    if generation:
        out_console.print(f"Next: plato2 chat{generation}{evaluation}", soft_wrap=True)


def _summary(found: Imported, out: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "stages": found.stages,
        "models": {part: vars(model) for part, model in found.models.items()},
        "absent": {part: list(names) for part, names in found.absent.items()},
        "left_alone": found.left_alone,
        "heads_from": found.heads_from,
        "tokenizer_from": found.tokenizer_from,
        "sha256": found.sha256,
    }


def _table(found: Imported) -> Table:
    """A row per model: its geometry, and the modules whose weights the files lack."""
    table = Table()
    for column in ("part", "stage", "layers", "heads", "hidden", "vocabulary", "K", "absent"):
        table.add_column(column, justify="left" if column in ("part", "stage", "absent") else "right")
    for part, model in found.models.items():
        numbers = (model.n_layer, model.n_head, model.hidden_size, model.vocab_size)
        k = str(model.n_latent) if found.uses[part].has_latents else ""
        lacking = {
            name.split(".")[0 if not name.startswith("backbone.") else 1] for name in found.absent[part]
        }
        table.add_row(part, found.stages[part], *map(str, numbers), k, ", ".join(sorted(lacking)))
    return table
