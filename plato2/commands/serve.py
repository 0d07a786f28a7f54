"""`plato2 serve`: an HTTP server that speaks OpenAI's chat API."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Annotated, cast

import typer

from plato2.commands import needs
from plato2.commands.options import takes
from plato2.commands.talking import (
    DECODING,
    DEFAULT,
    MODELS,
    Backward,
    Device,
    Evaluation,
    Generation,
    Model,
    Precision,
    Rank,
    SafetyInput,
    SafetyOutput,
    SafetyRules,
    decodes,
    fetches_models,
    load_bot,
    load_safety,
    one_model,
    say_if_unranked,
)
from plato2.config import DecodeConfig, UserError

if TYPE_CHECKING:
    from plato2.serve.chat_api import System
    from plato2.talk.bot import PlatoBot

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

SERVER, BATCHING, ACCESS = "Server", "Batching", "Access"
"""Groups of options in `--help`."""
LIMITS: dict[str, tuple[float, float | None]] = {
    "timeout": (0.001, None),
    "shutdown_timeout": (0, None),
    "max_body_kb": (1, None),
    "receive_timeout": (0.001, None),
    "max_connections": (1, None),
    "max_batch": (1, 16),
    "batch_wait_ms": (0, None),
    "max_queue": (1, None),
}
"""Options that are numbers: the least and, where there is one, the most."""
EXTRAS = {"fastapi", "uvicorn", "starlette", "pydantic", "pydantic_core", "prometheus_client"}
"""Modules that the extra `serve` brings."""

HELP = """Serve a model over HTTP, as OpenAI's chat API.

GENERATION is a run folder, checkpoint or model folder of stage 2_gen (or 1_coarse). Programs that talk to
OpenAI's API can talk to http://127.0.0.1:8000/v1; requests that arrive together are decoded together.
Decoding options apply to requests that do not set their own. Ctrl-C finishes the requests in progress and
stops.

[bold]Examples[/]

plato2 serve outputs/tiny-2_gen/RUN --evaluation outputs/tiny-2_eval/RUN

plato2 serve --generation models/24L --name plato2-24l --port 8080 --ui

plato2 serve models/24L --host 0.0.0.0 --safety words.txt --max-queue 64 --timeout 20
"""


@dataclass
class ListenOptions:
    """Where a server listens, and what it is called; checks itself."""

    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; 0.0.0.0 = every address of the machine.", rich_help_panel=SERVER
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 picks a free one.", rich_help_panel=SERVER)
    ] = 8000
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A host name of the server, such as chat.example.org, besides localhost and its "
            "address; * = any. May be repeated.",
            rich_help_panel=ACCESS,
        ),
    ] = None

    def __post_init__(self) -> None:
        """Checks values.

        Raises:
            UserError: an impossible value.
        """
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port {self.port}: use 0 to 65535")
        for given in self.allow_host or ():
            if given != "*" and not re.fullmatch(
                r"[^\s/:@\[\]]+|[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*", given
            ):
                raise UserError(f"--allow-host {given}: give a name alone, such as chat.example.org, or *")

    def hosts(self) -> set[str]:
        """Names that the server answers to, besides those of this machine."""
        return {name.lower() for name in (self.host, *(self.allow_host or ()))}


@dataclass(repr=False)  # it has the key
class ServerOptions(ListenOptions):
    """What the server is told beside its model and how to decode; checks itself."""

    ui: Annotated[
        bool, typer.Option("--ui", help="Also serve a web page to talk on, at /.", rich_help_panel=SERVER)
    ] = False
    system: Annotated[
        str,
        typer.Option(
            help="What to do with system messages, which PLATO-2 does not have: ignore (with the header "
            "X-Plato2-Warning), refuse, or context (read as a turn).",
            rich_help_panel=SERVER,
        ),
    ] = "ignore"
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request may wait for its reply.", rich_help_panel=SERVER)
    ] = 60.0
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds to finish the requests in progress when the server is stopped.",
            rich_help_panel=SERVER,
        ),
    ] = 30.0
    max_body_kb: Annotated[int, typer.Option(help="Largest request.", rich_help_panel=SERVER)] = 1024
    receive_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds a client has to send its request, or to take some of the answer.",
            rich_help_panel=SERVER,
        ),
    ] = 20.0
    max_connections: Annotated[
        int,
        typer.Option(
            help="Open at the same time; fewer where the system allows fewer open files.",
            rich_help_panel=SERVER,
        ),
    ] = 1000
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Print a line for each request.", rich_help_panel=SERVER)
    ] = False
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="PLATO2_API_KEY",
            help="The key that requests to /v1 must send as Authorization: Bearer KEY. Better to set the "
            "variable: others on the machine can see command lines.",
            rich_help_panel=ACCESS,
        ),
    ] = None
    ui_login: Annotated[
        bool | None,
        typer.Option(
            "--ui-login/--ui-open",
            help="With a key: the page asks for it as the password, with any user name, or does not ask.",
            rich_help_panel=ACCESS,
            show_default=False,
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="A website whose scripts may talk to the server, such as https://example.org. May be "
            "repeated.",
            rich_help_panel=ACCESS,
        ),
    ] = None
    max_batch: Annotated[
        int, typer.Option(help="Contexts decoded together, at most 16.", rich_help_panel=BATCHING)
    ] = 16
    batch_wait_ms: Annotated[
        float,
        typer.Option(
            help="How long an idle server waits for more requests after the first.", rich_help_panel=BATCHING
        ),
    ] = 5.0
    max_queue: Annotated[
        int, typer.Option(help="Requests that may wait; further ones get 429.", rich_help_panel=BATCHING)
    ] = 256

    def __post_init__(self) -> None:
        """Checks values and fills in the key of the environment.

        Raises:
            UserError: an impossible value.
        """
        super().__post_init__()
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if not (isfinite(value) and value >= least and (most is None or value <= most)):
                bounds = f"{least} or more" if most is None else f"{least} to {most}"
                raise UserError(f"--{name.replace('_', '-')} {value}: use {bounds}")
        for given in self.cors_origin or ():
            if given != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/@?#]+", given):
                raise UserError(f"--cors-origin {given}: give scheme and name, such as https://example.org")
        if self.system not in ("ignore", "refuse", "context"):
            raise UserError(f"--system {self.system}: use ignore, refuse or context")
        if self.api_key is None:  # Typer takes an empty variable for none
            self.api_key = os.environ.get("PLATO2_API_KEY")
        self._check_key()

    def _check_key(self) -> None:
        """Whether the key is one, and whom the page asks for it."""
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise UserError(
                "--api-key: use letters, digits and symbols without spaces, or give none and unset "
                "PLATO2_API_KEY"
            )
        if self.ui_login is not None and not self.ui:
            raise UserError("--ui-login and --ui-open are for the page; give --ui as well, or leave them out")
        if self.ui_login and not self.api_key:
            raise UserError(
                "--ui-login: there is no key to ask for; set PLATO2_API_KEY, or leave --ui-login out"
            )
        if self.ui and self.api_key and self.ui_login is None:
            raise UserError(
                "--ui: the key does not guard the page; give --ui-login (the page asks for the key too) or "
                "--ui-open (anyone may use it)"
            )


@app.command(help=HELP)
@decodes
@takes(ServerOptions)
@fetches_models
def serve(
    *,
    model: Model = None,
    generation: Generation = None,
    evaluation: Evaluation = None,
    backward: Backward = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="The model's id; default: the name of its folder, or of a run's model and stage.",
            rich_help_panel=MODELS,
        ),
    ] = None,
    device: Device = "auto",
    precision: Precision = "float32",
    options: ServerOptions,
    decode: DecodeConfig = DEFAULT,
    seed: Annotated[
        int | None,
        typer.Option(
            help="For requests without one; default: a new one each time.", rich_help_panel=DECODING
        ),
    ] = None,
    rank: Rank = None,
    safety: SafetyRules = None,
    safety_input: SafetyInput = "block",
    safety_output: SafetyOutput = "block",
) -> None:
    """Run the verb."""
    path = one_model(model, generation, "serve", "serve")
    if name is not None and not (name.strip() and name.isprintable()):
        raise UserError(f"--name {name!r}: give a one-line name, such as tiny-2_gen")
    import_extras(options.ui)
    from plato2.serve.server import listen

    listener = listen(options.host, options.port)  # before a model is loaded in vain
    checks = load_safety(safety, safety_input, safety_output)
    bot = load_bot(path, evaluation, decode, device, precision, backward, rank, checks)
    say_if_unranked(bot)
    bot.reply_to_ids([bot.encode(["hi"])])  # the first reply takes longer than others
    answer_requests(bot, listener, name or model_name(path), seed, options)


def import_extras(ui: bool) -> None:
    """Imports what the server and the page need.

    Raises:
        UserError: it is not installed.
    """
    with needs("serve", "serve", EXTRAS):
        import plato2.serve.app
        import plato2.serve.server
    if ui:
        import plato2.serve.page  # noqa: F401


def answer_requests(
    bot: PlatoBot, listener: socket, name: str, seed: int | None, options: ServerOptions
) -> None:
    """Serves until a signal comes.

    Args:
        bot: who answers.
        listener: the server's socket.
        name: the model's id.
        seed: of requests without one.
        options: of the server.
    """
    from plato2.serve.app import make_app
    from plato2.serve.batching import Batcher
    from plato2.serve.metrics import Metrics
    from plato2.serve.server import make_server, room_for, run

    metrics = Metrics()
    most = max(1, room_for(options.max_connections) // 2)
    if options.max_queue > most:
        typer.echo(
            f"--max-queue {options.max_queue}: {most}, which leaves half of the connections for others",
            err=True,
        )
    wait_s = options.batch_wait_ms / 1000
    max_queue = min(options.max_queue, most)
    batcher = Batcher(bot, options.max_batch, max_queue, wait_s, metrics.count_batch)
    served = make_app(
        bot,
        batcher,
        metrics,
        name,
        api_key=options.api_key,
        page_key=bool(options.ui and options.ui_login),
        hosts=options.hosts(),
        cors_origins=options.cors_origin or (),
        max_body=options.max_body_kb * 1024,
        receive_s=options.receive_timeout,
        timeout_s=options.timeout,
        seed=seed,
        system=cast("System", options.system),
        log_requests=options.log_requests,
    )
    if options.ui:
        from plato2.serve.page import mount_page

        served = mount_page(served, bot, batcher, name, options.timeout)
    say_if_open(listener, options)
    server = make_server(
        served,
        batcher,
        receive_s=options.receive_timeout,
        max_connections=options.max_connections,
        shutdown_s=options.shutdown_timeout,
        on_ready=lambda: say_ready(bot, listener, name, options.ui),
    )
    run(server, listener)
    if batcher.is_working:  # a batch that took too long; Python would wait for it or fall over it
        os._exit(0)


def say_if_open(listener: socket, options: ServerOptions) -> None:
    """Warns on stderr when anyone may use the server."""
    from plato2.serve.guard import is_loopback

    if is_loopback(listener.getsockname()[0]):
        return
    if not options.api_key:
        text = f"--host {options.host}: anyone who can reach it may use it; PLATO2_API_KEY sets a key"
        typer.echo(text, err=True)
    elif options.ui and not options.ui_login:
        typer.echo(f"--host {options.host} --ui-open: anyone who can reach the page may use it", err=True)


def say_ready(bot: PlatoBot, listener: socket, name: str, ui: bool) -> None:
    """Where the server is, as soon as it takes connections."""
    from plato2.serve.server import url_of

    url, where = url_of(listener), bot.generation.backbone.device
    typer.echo(f"{url}/v1 serves {name} on {where}; fields: docs/serve.md and {url}/openapi.json")
    if ui:
        typer.echo(f"{url}/ is the page to talk on")
    sys.stdout.flush()


def model_name(path: Path) -> str:
    """A model's id: its folder's name; `tiny-2_gen` of a run whose own name is but a time or a number."""
    path = path.resolve()
    if path.is_file() and path.parent.name == "checkpoints":
        path = path.parent.parent
    if any(letter.isalpha() for letter in path.name):
        return path.name
    from plato2.runs.folder import RunFolder

    said = RunFolder(path).lineage()
    return f"{said['model']}-{said['stage']}" if said.get("model") and said.get("stage") else path.name
