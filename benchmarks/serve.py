"""`python -m benchmarks.serve`: requests a second and waiting times with one client and with many.

A real `plato2 serve` process and clients in threads of this one, each of which sends its next request when
it has the answer to the last. Random weights; contexts of about 48 tokens, 24 new tokens, 20 candidates.
"""

from __future__ import annotations

import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.client import HTTPConnection, HTTPException
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.networks import random_networks
from benchmarks.report import Command, Say, Target, machine, progress, report, show, table
from plato2.commands import main
from plato2.config import ModelConfig, UserError
from plato2.data.tokenizer import Tokenizer
from plato2.runs.parallel import best_precision
from plato2.stages import CoherenceEstimation, FineGeneration, Stage
from plato2.weights.model_folder import Lazy, Part, write_model_folder

TARGETS: dict[str, Target] = {
    "throughput_of_16_clients_over_1": (">=", 4.0),
    "failed_requests": ("<=", 0.0),
}
"""What the project holds itself to, the first for the 93M geometry."""
NAME = "bench"
START_S, ANSWER_S = 120.0, 120.0
"""Seconds after which a server that does not start, or an answer that does not come, is an error."""
WORDS = "i you like to read play music today with my friends and then we go home it was really good"


@dataclass(frozen=True)
class Load:
    """A geometry and how many requests it gets."""

    model: ModelConfig
    alone: int
    """Requests of one client."""
    together: int
    """Requests of all `clients`."""
    clients: int = 16
    context_words: int = 44
    new_tokens: int = 24


FULL = {
    "93m": Load(ModelConfig(dropout=0.0), alone=8, together=64),
    "small": Load(ModelConfig(2, 2, 64, dropout=0.0), alone=50, together=5000, new_tokens=8),
}
SMALLEST = Load(ModelConfig(1, 2, 32, n_latent=3, dropout=0.0), alone=2, together=8, clients=4, new_tokens=4)
QUICK = {"93m": SMALLEST, "small": SMALLEST}


@dataclass
class Answers:
    """What clients saw."""

    seconds: list[float] = field(default_factory=list)
    """From a request to the end of its answer."""
    statuses: Counter[str] = field(default_factory=Counter)
    wall_s: float = 0.0

    def summary(self) -> dict[str, Any]:
        """The part for the report."""
        ordered = sorted(self.seconds)
        return {
            "requests": len(ordered),
            "statuses": dict(self.statuses),
            "requests_per_s": round(len(ordered) / self.wall_s, 3),
            "median_s": round(statistics.median(ordered), 4),
            "p99_s": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 4),
        }


def write_random_model(out: Path, model: ModelConfig) -> None:
    """A model folder of random weights with both models, and the tokenizer that comes with plato2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generation, (evaluation,) = random_networks(model, "first")
    stages: dict[str, type[Stage]] = {"generation": FineGeneration, "evaluation": CoherenceEstimation}
    parts = {
        name: Part(
            stages[name].name,
            stages[name].use,
            {"model": asdict(model)},
            {
                key: Lazy(tuple(tensor.shape), torch.float32, lambda tensor=tensor: tensor)  # type: ignore[misc]
                for key, tensor in network.state_dict().items()
            },
        )
        for name, network in (("generation", generation), ("evaluation", evaluation))
    }
    with resources.as_file(resources.files("plato2.weights") / "knover_english") as folder:
        write_model_folder(out, parts, Tokenizer.load(folder), "Random weights.\n")


@contextmanager
def serving(folder: Path, precision: str) -> Iterator[int]:
    """A server process; gives its port.

    Raises:
        UserError: it does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    options = ["--port", str(port), "--name", NAME, "--precision", precision, "--timeout", str(ANSWER_S)]
    command = [sys.executable, "-m", "plato2", "serve", str(folder), *options]
    with tempfile.TemporaryFile("w+") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + START_S
            while not _is_ready(port):
                if server.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise UserError(f"plato2 serve did not start: {output.read().strip()}")
                time.sleep(0.1)
            yield port
        finally:
            server.terminate()
            server.wait(timeout=START_S)


def _is_ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def ask(port: int, load: Load, n_clients: int, n_requests: int) -> Answers:
    """Sends requests from this many clients at once; each waits for its answer before it sends the next."""
    answers, numbers, lock = Answers(), iter(range(n_requests)), threading.Lock()

    def client() -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                connection.close()
                return
            words = random.Random(number).choices(WORDS.split(), k=load.context_words)
            body = {
                "model": NAME,
                "messages": [{"role": "user", "content": " ".join(words)}],
                "max_tokens": load.new_tokens,
                "seed": number,
                "plato2": {"min_tokens": load.new_tokens},
            }
            begin = time.perf_counter()
            try:
                connection.request(
                    "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
                )
                response = connection.getresponse()
                found = json.loads(response.read())
                status = str(response.status)
                if status == "200" and not found["choices"][0]["message"]["content"]:
                    status = "empty"
            except (OSError, HTTPException, ValueError) as error:
                status = type(error).__name__
                connection.close()
            with lock:
                answers.seconds.append(time.perf_counter() - begin)
                answers.statuses[status] += 1

    threads = [threading.Thread(target=client) for _ in range(n_clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers.wall_s = time.perf_counter() - begin
    return answers


def bench_serve(quick: bool = False, say: Say = lambda text: None) -> dict[str, Any]:
    """Throughput, waiting times and failures, the machine and the settings.

    Args:
        quick: a smoke test of a few seconds whose numbers mean nothing.
        say: told what is being measured.

    Raises:
        UserError: the server does not start; it says why.
    """
    loads, begin = QUICK if quick else FULL, time.monotonic()
    precision = "bfloat16" if best_precision("cpu") == "bf16-mixed" else "float32"
    parts: dict[str, Any] = {}
    ratios: dict[str, float | None] = {}
    failed = 0
    for name, load in loads.items():
        with tempfile.TemporaryDirectory(prefix="plato2-bench-") as folder:
            say(f"{name}, starting")
            write_random_model(Path(folder) / NAME, load.model)
            with serving(Path(folder) / NAME, precision) as port:
                ask(port, load, load.clients, load.clients)  # kernels for new shapes do not count
                say(f"{name}, 1 client")
                alone = ask(port, load, 1, load.alone)
                say(f"{name}, {load.clients} clients")
                together = ask(port, load, load.clients, load.together)
        parts[name] = {"alone": alone.summary(), "together": together.summary(), "clients": load.clients}
        rates = [part["requests_per_s"] for part in (parts[name]["together"], parts[name]["alone"])]
        ratios[f"{name}_throughput_ratio"] = round(rates[0] / rates[1], 3)
        failed += sum(
            n for each in (alone, together) for status, n in each.statuses.items() if status != "200"
        )
    ratios["throughput_of_16_clients_over_1"] = ratios.pop("93m_throughput_ratio")
    ratios["failed_requests"] = failed
    return {
        **report(ratios, TARGETS),
        "parts": parts,
        "machine": machine(),
        "settings": {
            "loads": {name: asdict(load) for name, load in loads.items()},
            "precision": precision,
            "quick": quick,
        },
        "wall_s": round(time.monotonic() - begin, 1),
    }


# ---------------------------------------------------------------------------------------- the command line

HELP = r"""Requests a second and waiting times of a real server, with 1 client and with 16.

Needs what plato2 serve needs (pip install '.\[serve]') and about ten minutes.

[bold]Examples[/]

python -m benchmarks.serve

python -m benchmarks.serve --json
"""
app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command(cls=Command, help=HELP)
def run(
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test; its numbers mean nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """`python -m benchmarks.serve`."""
    with progress() as say:
        found = bench_serve(quick, say)
    show(found, as_json, "Ratios", details(found["parts"]))


def details(parts: dict[str, Any]) -> Iterator[Table]:
    """Rates, waiting times and statuses."""
    rows = table(
        "Closed loop: a client sends its next request when it has its answer",
        ("model",),
        ("clients", "requests", "a second", "median s", "99 % s"),
    )
    rows.add_column("statuses")
    for name, part in parts.items():
        for clients, each in ((1, part["alone"]), (part["clients"], part["together"])):
            statuses = ", ".join(f"{status}: {n}" for status, n in each["statuses"].items())
            rate, median, p99 = (f"{each[key]:.2f}" for key in ("requests_per_s", "median_s", "p99_s"))
            rows.add_row(name, str(clients), f"{each['requests']:,}", rate, median, p99, statuses)
    yield rows


if __name__ == "__main__":
    main(app, "python -m benchmarks.serve")
