"""`plato2 export`: models for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from plato2.commands.talking import fetches_models
from plato2.config import UserError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Write a trained or imported model for other programs.",
)

Generation = Annotated[
    Path | None, typer.Option(help="Run, checkpoint or model folder of 2_gen/1_coarse/plato.")
]
Evaluation = Annotated[
    Path | None,
    typer.Option(help="The same for 2_eval; default: the one in --generation, if that folder has both."),
]
Out = Annotated[Path, typer.Option(help="The folder to write.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: as stored.")]


def check_dtype(dtype: str | None, known: tuple[str, ...] = ("float32", "float16", "bfloat16")) -> None:
    """Refuses a precision that cannot be written.

    Raises:
        UserError: names those that can.
    """
    if dtype not in (None, *known):
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(known)}")


@app.callback()
def _group() -> None:
    """Write a trained or imported model for other programs."""


KNOVER_HELP = """Write the files Knover reads: OUT/Plato and OUT/NSP, one file per parameter.

[bold]Example[/]

plato2 export knover --generation outputs/24l-2_gen/RUN --evaluation outputs/24l-2_eval/RUN --out 24L
"""
HF_HELP = """Write a folder that transformers' AutoModel loads, offline and without plato2.

It is also a model folder of plato2: every verb takes it.

[bold]Example[/]

plato2 export hf --generation models/24L --out plato2-24l-hf --dtype bfloat16
"""
ADAPTER_HELP = """Write adapters of a pretrained decoder alone, some megabytes in files of peft's.

It is also a model folder of plato2: every verb takes it, with the decoder's folder linked as OUT/base.

[bold]Examples[/]

plato2 export adapter --generation outputs/pretrained-2_gen/RUN --out mine

plato2 export adapter --generation outputs/pretrained-2_gen/RUN --out mine --dtype bfloat16
"""


@app.command(help=KNOVER_HELP)
@fetches_models
def knover(
    out: Out, generation: Generation = None, evaluation: Evaluation = None, dtype: Dtype = None
) -> None:
    """Run the verb."""
    from plato2.weights.export import export_to_knover

    check_dtype(dtype, ("float32", "float16"))
    counts = export_to_knover(out, generation, evaluation, dtype)
    for folder, n in counts.items():
        Console(highlight=False).print(f"wrote {out / folder}: {n} parameters", soft_wrap=True)


@app.command(help=HF_HELP)
@fetches_models
def hf(out: Out, generation: Generation = None, evaluation: Evaluation = None, dtype: Dtype = None) -> None:
    """Run the verb."""
    from plato2.weights.export import export_to_huggingface

    check_dtype(dtype)
    parts = export_to_huggingface(out, generation, evaluation, dtype)
    Console(highlight=False).print(f"wrote {out}: {' and '.join(parts)}", soft_wrap=True)
    Console(highlight=False).print("README.md in it shows how to load and use it", soft_wrap=True)


@app.command(help=ADAPTER_HELP)
def adapter(
    out: Out, generation: Generation = None, evaluation: Evaluation = None, dtype: Dtype = None
) -> None:
    """Run the verb."""
    from plato2.weights.export import export_adapters

    check_dtype(dtype)
    base = export_adapters(out, generation, evaluation, dtype)
    console = Console(highlight=False, markup=False)
    gone = "" if base.exists() else " but is not there; put it back, or link to it"
    console.print(f"wrote {out}: adapters of {base}, which is linked as {out / 'base'}{gone}", soft_wrap=True)
