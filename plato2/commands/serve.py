"""`plato2 serve`: an HTTP server that speaks OpenAI's chat API."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from plato2.commands.talking import (
    DECODING,
    DEFAULT,
    MODELS,
    Backward,
    Device,
    Evaluation,
    Precision,
    Rank,
    SafetyInput,
    SafetyOutput,
    SafetyRules,
    decodes,
    load_bot,
    load_safety,
    say_if_unranked,
)
from plato2.config import DecodeConfig, UserError, install

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

SERVER, BATCHING, ACCESS = "Server", "Batching", "Access"
"""Groups of options in `--help`."""
EXTRAS = {"fastapi", "uvicorn", "starlette", "pydantic", "pydantic_core", "prometheus_client"}
"""Modules that the extra `serve` brings."""

HELP = """Serve a model over HTTP, as OpenAI's chat API.

GENERATION is a run folder, checkpoint or model folder of stage 2_gen (or 1_coarse). Programs that talk to
OpenAI's API can talk to http://127.0.0.1:8000/v1; requests that come together are decoded together. Options
of decoding are for requests that do not say otherwise. Ctrl-C finishes what was begun and ends.

[bold]Examples[/]

plato2 serve outputs/tiny-2_gen/RUN --evaluation outputs/tiny-2_eval/RUN

plato2 serve --generation models/24L --name plato2-24l --port 8080 --ui

plato2 serve models/24L --host 0.0.0.0 --safety words.txt --max-queue 64 --timeout 20
"""


@app.command(help=HELP)
@decodes
def serve(
    model: Annotated[
        Path | None, typer.Argument(metavar="GENERATION", help="The same as --generation.")
    ] = None,
    generation: Annotated[
        Path | None,
        typer.Option(
            help="Run folder, checkpoint or model folder of stage 2_gen (or 1_coarse).",
            rich_help_panel=MODELS,
        ),
    ] = None,
    evaluation: Evaluation = None,
    backward: Backward = None,
    name: Annotated[
        str | None, typer.Option(help="The model's id; else the folder's name.", rich_help_panel=MODELS)
    ] = None,
    device: Device = "auto",
    precision: Precision = "float32",
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at; 0.0.0.0 = every address of the machine.", rich_help_panel=SERVER
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen at; 0 takes a free one.", rich_help_panel=SERVER)
    ] = 8000,
    ui: Annotated[
        bool, typer.Option("--ui", help="Also a web page to talk on, at /.", rich_help_panel=SERVER)
    ] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request may wait for its reply.", rich_help_panel=SERVER)
    ] = 60.0,
    shutdown_timeout: Annotated[
        float,
        typer.Option(help="Seconds for what was begun when the server is stopped.", rich_help_panel=SERVER),
    ] = 30.0,
    max_body_kb: Annotated[int, typer.Option(help="Largest request.", rich_help_panel=SERVER)] = 1024,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Print a line for each request.", rich_help_panel=SERVER)
    ] = False,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="PLATO2_API_KEY",
            help="What requests to /v1 must send as Authorization: Bearer KEY. Better set the variable: "
            "others on the machine can see command lines.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="A web site whose scripts may talk to the server, such as https://example.org. May be given "
            "several times.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(help="Contexts decoded together, 16 at most.", rich_help_panel=BATCHING)
    ] = 16,
    batch_wait_ms: Annotated[
        float,
        typer.Option(
            help="How long an idle server waits for more after the first.", rich_help_panel=BATCHING
        ),
    ] = 5.0,
    max_queue: Annotated[
        int, typer.Option(help="Requests that may wait; others get 429.", rich_help_panel=BATCHING)
    ] = 256,
    decode: DecodeConfig = DEFAULT,
    seed: Annotated[
        int | None,
        typer.Option(help="Of requests without one; else a new one each time.", rich_help_panel=DECODING),
    ] = None,
    rank: Rank = None,
    safety: SafetyRules = None,
    safety_input: SafetyInput = "block",
    safety_output: SafetyOutput = "block",
) -> None:
    """Run the verb."""
    path = model or generation
    if path is None or (model and generation):
        raise UserError("give one model to serve: plato2 serve DIR, or plato2 serve --generation DIR")
    for option, value, least, most in (
        ("--port", port, 0, 65535),
        ("--timeout", timeout, 0.001, None),
        ("--shutdown-timeout", shutdown_timeout, 0, None),
        ("--max-body-kb", max_body_kb, 1, None),
        ("--max-batch", max_batch, 1, 16),
        ("--batch-wait-ms", batch_wait_ms, 0, None),
        ("--max-queue", max_queue, 1, None),
    ):
        if value < least or (most is not None and value > most):
            raise UserError(f"{option} {value}: use {least} {'or more' if most is None else f'to {most}'}")
    if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
        raise UserError("--api-key: use letters, digits and signs without blanks, or leave it out")
    try:
        from plato2.talk.server import Metrics, listen, make_app, run, url_of
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in EXTRAS:
            raise
        raise UserError(f"plato2 serve needs {error.name}: {install('serve')}") from None
    from plato2.talk.batching import Batcher

    if ui:
        from plato2.talk.page import mount_page
    listener = listen(host, port)
    bot = load_bot(
        path,
        evaluation,
        decode,
        device,
        precision,
        backward,
        rank,
        load_safety(safety, safety_input, safety_output),
    )
    say_if_unranked(bot)
    bot.reply_to_ids([bot.encode(["hi"])])  # the first reply takes longer than others
    metrics = Metrics()
    batcher = Batcher(bot, max_batch, max_queue, batch_wait_ms / 1000, metrics.count_batch)
    name = name or path.resolve().name
    served = make_app(
        bot,
        batcher,
        metrics,
        name,
        api_key=api_key,
        cors_origins=cors_origin or (),
        max_body=max_body_kb * 1024,
        timeout_s=timeout,
        seed=seed,
    )
    if ui:
        served = mount_page(served, bot, batcher, name, timeout)
        if api_key:
            typer.echo("--ui: the page at / asks for no key; let only those reach it who may", err=True)
    where = bot.generation.backbone.word.weight.device

    def say_ready() -> None:
        url = url_of(listener)
        typer.echo(f"{url}/v1 serves {name} on {where}; fields: docs/serve.md and {url}/openapi.json")
        sys.stdout.flush()

    run(
        served,
        listener,
        batcher,
        shutdown_s=shutdown_timeout,
        log_requests=log_requests,
        on_ready=say_ready,
    )
    if batcher.is_working:  # a batch that took too long; Python would wait for it or fall over it
        os._exit(0)
