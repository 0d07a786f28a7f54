"""The curriculum on a pretrained decoder, as a person starts it: from a folder and a corpus to a reply."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import write_decoder
from forks import Forks
from small import ROOT, Done, assert_one_line, stopped_at, train_in_process, write_dialogues
from test_resume import Start, assert_same
from typer.testing import CliRunner

from plato2.commands import app
from plato2.runs.folder import RunFolder
from plato2.runs.saved import read_metrics

STEPS = [
    "model=pretrained",
    "model.max_position=96",
    "model.n_latent=4",
    "data=shards",
    "data.row_length=128",
    "data.unit_tokens=512",
    "data.valid_units=2",
    "optim.batch_tokens=1024",
    "optim.lr=1e-3",
    "optim.warmup_steps=0",
    "optim.schedule=inverse_sqrt",
    "strategy=cpu",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    "selection=10",
    "human_rank=0",
]


class Training(Start):
    """`python train.py` on a decoder, to be killed."""

    def __init__(self, forks: Forks, output_dir: Path, *overrides: str, **variables: str) -> None:
        output_dir.parent.mkdir(exist_ok=True)
        given = [*STEPS, f"output_dir={output_dir}", *overrides]
        self.forks = forks
        self.pid = forks.begin(ROOT / "train.py", *given, folder=output_dir.parent, **variables)


def plato2(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A decoder, and conversations in its words, as keys of the command line."""
    base = tmp_path_factory.mktemp("pretrained")
    decoder = write_decoder(base / "decoder")
    conversations = write_dialogues(base / "d.jsonl", 150)
    limits = ("--max-context", 48, "--max-response", 48, "--valid-dialogues", 15, "--test-fraction", 0)
    code, _, errors = plato2(
        "prepare", "jsonl", conversations, "--out", base / "data", "--tokenizer", f"hf:{decoder}", *limits
    )
    assert code == 0, errors
    return [f"model.path={decoder}", f"data.path={base / 'data'}"]


@pytest.mark.slow
def test_three_stages_from_a_folder_to_a_reply(forks: Forks, places: list[str], tmp_path: Path) -> None:
    """Killed twice, each stage is what it would have been; the second ones start from the first; all talk."""
    decoder = Path(places[0].removeprefix("model.path="))
    whole, killed = tmp_path / "whole" / "runs", tmp_path / "killed" / "runs"
    for stage in ("1_coarse", "2_gen", "2_eval"):
        given = [*places, f"stage={stage}"]
        Training(forks, whole, *given, RUN_ID="a").finish()
        run = killed / f"pretrained-{stage}" / "a"
        for at_step in (2, 4):
            process = Training(forks, killed, *given, RUN_ID="a")
            process.wait_for_step(run, at_step)
            os.kill(process.pid, signal.SIGKILL)
            process.finish(expect=-signal.SIGKILL)
        assert "resuming" in Training(forks, killed, *given, RUN_ID="a").finish()
        assert_same(whole / f"pretrained-{stage}" / "a", run)
        lineage = RunFolder(run).lineage()
        assert lineage["status"] == "finished"
        assert (lineage["parent"] is None) == (stage == "1_coarse")
        losses = [value for _, metric, value in read_metrics(run / "metrics.csv") if metric == "train/loss"]
        assert losses[-1] < losses[0]
    # what stage 2.1 starts from is what stage 1 learned, not what the folder holds
    first, second = (
        torch.load(whole / f"pretrained-{stage}/a/checkpoints/best.ckpt", weights_only=True)
        for stage in ("1_coarse", "2_gen")
    )
    assert (
        first["hyper_parameters"]["model"]["architecture"]
        == second["hyper_parameters"]["model"]["architecture"]
    )
    shutil.move(decoder, tmp_path / "elsewhere")  # a run needs it no longer
    try:
        runs = ["--generation", whole / "pretrained-2_gen/a", "--evaluation", whole / "pretrained-2_eval/a"]
        code, out, errors = plato2("reply", *runs, "--max-tokens", 6, "--json", "bon kan", "dus")
        assert code == 0, errors
        candidates = json.loads(out)["candidates"]
        assert sorted(candidate["latent"] for candidate in candidates) == [0, 1, 2, 3]
        assert all(0 < candidate["coherence"] < 1 for candidate in candidates)
        code, _, errors = plato2("export", "knover", runs[0], runs[1], "--out", tmp_path / "out")
        assert code != 0
        assert "Knover has no format; use plato2 export hf" in errors
    finally:
        shutil.move(tmp_path / "elsewhere", decoder)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_run_goes_on_where_its_decoder_has_been_moved(
    places: list[str], tmp_path: Path, adapter: str
) -> None:
    """Begun with a relative path, resumed from another folder, and the next stage with yet another path."""
    path, data = places
    decoder = Path(path.removeprefix("model.path="))
    if adapter == "lora":
        pytest.importorskip("peft", reason="needs the extra lora")
    there, here = tmp_path / "a" / "there", tmp_path / "b" / "here"
    for folder in (there, here):
        folder.mkdir(parents=True)
    shutil.copytree(decoder, there / "decoder")

    def train(cwd: Path, *overrides: str, expect: int = 0) -> Done:
        given = [*STEPS, data, f"output_dir={tmp_path}/runs", f"model.adapter={adapter}", "sample_replies=0"]
        last = {item.split("=", 1)[0]: item for item in [*given, *overrides]}
        done: Done = train_in_process(list(last.values()), cwd, ROOT / "train.py")
        assert done.returncode == expect, done.stderr
        return done

    with stopped_at(2):
        train(there, "model.path=decoder")
    (run,) = tmp_path.glob("runs/pretrained-1_coarse/*")
    with stopped_at(4):
        assert f"resuming {run} from step" in train(here, "model.path=../../a/there/decoder").stderr
    done = train(here, "model.path=decoder", expect=2)
    assert_one_line(done.stderr, f"model.path=decoder: no such folder in {here}; give the folder of a")
    (there / "decoder").rename(here / "moved")
    assert f"resuming {run} from step" in train(here, "model.path=moved").stderr
    train(tmp_path, path, f"output_dir={tmp_path}/whole", "run_id=whole")
    found, known = (
        torch.load(one / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for one in (run, tmp_path / "whole" / "pretrained-1_coarse" / "whole")
    )
    assert all(torch.equal(found[name], known[name]) for name in known if name != "validation")
    assert f"init_from=auto: {run}" in train(tmp_path, path, "stage=2_gen", "trainer.max_steps=1").stderr
    other = write_decoder(tmp_path / "other", initializer_range=0.1)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    for given in (f"resume={run}", f"run_id={run.name}"):
        done = train(here, f"model.path={other}", given, "trainer.max_steps=9", expect=2)
        assert_one_line(done.stderr, f"model.path={other}: the weights there (sha256", "put those back")
    done = train(here, f"model.path={other}", "stage=2_gen", "trainer.max_steps=1", expect=2)
    assert_one_line(done.stderr, "init_from=auto: no finished 1_coarse run", "model.base_sha256=")


@pytest.mark.slow
def test_what_does_not_belong_together_is_said_before_anything_is_trained(
    corpus: Path, places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def refused(*overrides: str) -> str:
        done: Done = train_in_process([*STEPS, "output_dir=runs", *overrides], tmp_path, ROOT / "train.py")
        assert done.returncode == 2
        assert not list(tmp_path.glob("runs/*/*/checkpoints"))
        return done.stderr

    path, data = places
    assert_one_line(refused(data), f"model.path=FOLDER: no such folder in {tmp_path}; give the folder of a")
    assert_one_line(refused(data, "model.path=nowhere"), "model.path=nowhere: no such folder")
    assert_one_line(refused(*places, "model.adapter_rank=0"), "model.adapter_rank=0: must be at least 1")
    assert_one_line(refused(*places, "model.max_position=200"), "has 128 positions; use at most 128")
    assert_one_line(
        refused(*places, "model.n_layer=3"), "model.n_layer=3: the decoder in", "has 2; leave it out"
    )
    assert_one_line(refused(*places, "model.context_mask=both"), "model.context_mask=both: use one of")
    assert_one_line(refused(path, f"data.path={corpus}"), "model.vocab_size=304: the tokenizer of", "301 ids")
    other: Any = write_decoder(tmp_path / "other")
    config = json.loads((other / "tokenizer.json").read_text())
    config["model"]["merges"].reverse()
    (other / "tokenizer.json").write_text(json.dumps(config))
    assert_one_line(
        refused(f"model.path={other}", data),
        "is not that of the decoder in",
        f"prepare --tokenizer hf:{other}",
    )
