"""The rivals: what they read, how they decode and rank, and that a reply does not depend on the batch."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the rivals need pip install '.[eval]'")

import rivals
from rivals import END, USER_FIRST

from plato2.config import DecodeConfig, UserError
from plato2.evaluate.pretrained import (
    BLENDER,
    CHAT,
    DIALOGPT,
    OPENING,
    Blender,
    ChatModel,
    DialoGPT,
    sample,
)
from plato2.evaluate.speakers import Log, read_speaker
from plato2.talk.speaker import Speaker

DATA = Path(__file__).parents[3] / "shared" / "data"
HISTORIES = [["hello there"], ["hi", "what do you do for a living ?", "i like music"], ["a", "old films ."]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("models")
    return {
        "gpt2": rivals.gpt2(at / "gpt2"),
        "reverse": rivals.gpt2(at / "reverse", seed=1),
        "llama": rivals.llama(at / "llama"),
        "blenderbot": rivals.blenderbot(at / "blenderbot"),
        "small": rivals.blenderbot_small(at / "small"),
    }


SPEAKERS: dict[str, Callable[[dict[str, Path]], Speaker]] = {
    "dialogpt": lambda of: DialoGPT(of["gpt2"]),
    "mmi": lambda of: DialoGPT(of["gpt2"], of["reverse"], replace(DIALOGPT, n_samples=5)),
    "hf": lambda of: ChatModel(of["llama"], replace(CHAT, n_samples=3)),
    "blender": lambda of: Blender(of["blenderbot"]),
    "blender 90M": lambda of: Blender(of["small"]),
}


@pytest.mark.parametrize("kind", SPEAKERS)
def test_a_reply_does_not_depend_on_the_batch(folders: dict[str, Path], kind: str) -> None:
    speaker = SPEAKERS[kind](folders)
    together = speaker.reply_batch(HISTORIES, [1, 2, 3])
    for history, seed, said in zip(HISTORIES, [1, 2, 3], together, strict=True):
        (alone,) = speaker.reply_batch([history], [seed])
        assert [c["text"] for c in alone.candidates] == [c["text"] for c in said.candidates]
        for key in ("log_prob", "backward"):
            assert [c.get(key) for c in alone.candidates] == pytest.approx(
                [c.get(key) for c in said.candidates], abs=1e-5
            )
        assert said.text == said.candidates[0]["text"]
        assert speaker.reads(said.text)
    assert not speaker.reads(" ")
    assert json.loads(json.dumps([speaker.settings, speaker.describe()]))


@pytest.mark.parametrize("kind", ["dialogpt", "hf"])
def test_seeds_make_the_difference_in_what_is_sampled(folders: dict[str, Path], kind: str) -> None:
    speaker = SPEAKERS[kind](folders)
    one, two, again = speaker.reply_batch([["hello"]] * 3, [1, 2, 1])
    assert one == again
    assert one.text != two.text


def log_softmax_after(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)  # (T, V)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_samples_have_the_probabilities_of_a_slow_loop(folders: dict[str, Path], name: str) -> None:
    """Of one row without padding, all at once: so positions, masks and the cache are right."""
    model = (DialoGPT if name == "gpt2" else ChatModel)(folders[name]).model.model
    contexts, ends = [[9, 8, 7, 6, 5, 4], [11, 12], [7]], [0]
    config = DecodeConfig(max_tokens=12, n_samples=3, temperature=0.8)
    for context, samples in zip(contexts, sample(model, contexts, config, [1, 2, 3], ends), strict=True):
        for one in samples:
            ids = [*one.ids, 0] if len(one.ids) < 12 else one.ids
            rows = log_softmax_after(model, [*context, *ids])[len(context) - 1 :]
            rows[0, 0] = -torch.inf  # not the end at once
            tempered = (rows / 0.8).log_softmax(-1)
            slow = sum(float(tempered[n, token]) for n, token in enumerate(ids)) / len(ids)
            assert one.log_prob == pytest.approx(slow, abs=1e-4)
            best = [tempered[n].topk(10).indices.tolist() for n in range(len(ids))]
            assert all(token in best[n] for n, token in enumerate(ids) if n > 0)
    greedy = sample(model, contexts, replace(config, n_samples=1, temperature=0.0), [1, 2, 3], ends)
    for context, (one,) in zip(contexts, greedy, strict=True):
        ids = list(context)
        for n in range(len(one.ids)):
            row = log_softmax_after(model, ids)[-1]
            row[0] = row[0] if n else -torch.inf
            ids.append(int(row.argmax()))
        assert ids == [*context, *one.ids]


# ---------------------------------------------------------------------------------------------- DialoGPT


def test_dialogpt_s_turns_each_end_with_its_end_token(folders: dict[str, Path]) -> None:
    speaker = DialoGPT(folders["gpt2"], decode=replace(DIALOGPT, max_tokens=20))
    tokenizer = speaker.model.tokenizer
    hi, you = tokenizer.encode("hi"), tokenizer.encode("you ?")
    end = tokenizer.eos_token_id
    assert speaker.read(["hi", "you ?"]) == [*hi, end, *you, end] == tokenizer.encode(f"hi{END}you ?{END}")
    assert speaker.read([f"hi{END}"]).count(end) == 1  # what looks like the token is text
    assert speaker.room == 44
    assert speaker.read(["bb" * 30, "hi", "you ?"]) == [*hi, end, *you, end]  # whole turns, from the right
    long = tokenizer.encode("xyz" * 30)
    assert speaker.read(["hi", "xyz" * 30]) == [*long[-42:], end]


def test_the_reverse_model_ranks_by_what_a_slow_loop_finds(folders: dict[str, Path]) -> None:
    """log p(c|r): the reply, then the turns from the last to the first; the mean over their tokens."""
    decode = replace(DIALOGPT, n_samples=6, max_tokens=10)
    speaker = DialoGPT(folders["gpt2"], folders["reverse"], decode)
    assert speaker.reverse is not None
    history, end, encode = ["hi there", "old films"], speaker.end, speaker.model.encode
    (said,) = speaker.reply_batch([history], [7])
    (samples,) = sample(speaker.model.model, [speaker.read(history)], decode, [7], [end])
    source = [*encode("old films"), end, *encode("hi there"), end]
    slow = {}
    for one in samples:
        words = [token for token in one.ids if token != end]
        rows = log_softmax_after(speaker.reverse.model, [*words, end, *source])
        score = sum(float(rows[len(words) + n, token]) for n, token in enumerate(source)) / len(source)
        slow[speaker.model.decode(one.ids)] = score
    assert [c["text"] for c in said.candidates] == sorted(slow, key=lambda text: -slow[text])
    assert [c["backward"] for c in said.candidates] == pytest.approx(sorted(slow.values())[::-1], abs=1e-4)
    log_probs = [c["log_prob"] for c in said.candidates]
    assert log_probs != sorted(log_probs, reverse=True)
    (plain,) = DialoGPT(folders["gpt2"], decode=decode).reply_batch([history], [7])
    assert [c["log_prob"] for c in plain.candidates] == sorted(log_probs, reverse=True)
    assert DialoGPT(folders["gpt2"], folders["reverse"]).decode.n_samples == 16


# ----------------------------------------------------------------------------------------------- Blender


def test_blender_s_turns_are_joined_as_parlai_does(folders: dict[str, Path]) -> None:
    large, small = Blender(folders["blenderbot"]), Blender(folders["small"])
    encode = large.model.tokenizer.encode
    hi, how = (encode(text, add_special_tokens=False) for text in (" hi", " how are"))
    (blanks,) = {tuple(encode("  hi", add_special_tokens=False)[: -len(hi)])}
    assert large.read(["hi", "how are"]) == [*hi, *blanks, *blanks, *how, 2]
    tokens = small.model.tokenizer.convert_ids_to_tokens(small.read(["hi, you", "ho"]))
    assert tokens == ["h@@", "i", ",", "y@@", "o@@", "u", "__newln__", "h@@", "o"]
    for speaker in (large, small):
        assert len(speaker.read(["hello there"] * 20)) == 48  # its end
        assert speaker.read(["hello there"] * 20)[-3:] == speaker.read(["hello there"])[-3:]
    assert small.model.decode(small.read(["hi, you", "ho"])) == "hi , you ho"


def three_in_a_row(ids: list[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[n : n + 3]) for n in range(len(ids) - 2)]


@pytest.mark.parametrize("name", ["blenderbot", "small"])
def test_blender_is_long_enough_and_repeats_nothing(folders: dict[str, Path], name: str) -> None:
    speaker = Blender(folders[name])
    assert speaker.decode == replace(BLENDER, max_tokens=47)
    free = Blender(folders[name], replace(BLENDER, min_tokens=1, no_repeat_ngram=0))
    (found,) = free.search([speaker.read(HISTORIES[1])])
    best = found[0].ids
    context = [*best[:-1][-20:], *speaker.read(HISTORIES[1])][-48:]  # what it would say stands in the history
    for beams in (
        *speaker.search([context]),
        *speaker.search([speaker.read(history) for history in HISTORIES]),
    ):
        assert len(beams) == 10
        for beam in beams:
            words = [token for token in beam.ids if token != 2]
            assert len(words) >= 20
            assert len(set(three_in_a_row(words))) == len(words) - 2
    for beam in speaker.search([context])[0]:
        assert not {*three_in_a_row(beam.ids)} & {*three_in_a_row(context)}
    assert any(len(set(three_in_a_row(one.ids))) < len(one.ids) - 2 or len(one.ids) < 20 for one in found)


def test_blender_s_scores_are_those_of_a_slow_loop(folders: dict[str, Path]) -> None:
    speaker = Blender(folders["small"])
    contexts = [speaker.read(history) for history in HISTORIES]
    for context, beams in zip(contexts, speaker.search(contexts), strict=True):
        for beam in beams[:3]:
            given, read = torch.tensor([context]), torch.tensor([[1, *beam.ids[:-1]]])
            with torch.no_grad():
                rows = speaker.model.model(input_ids=given, decoder_input_ids=read).logits[0].log_softmax(-1)
            slow = sum(float(rows[n, token]) for n, token in enumerate(beam.ids)) / len(beam.ids)
            assert beam.log_prob == pytest.approx(slow, abs=1e-4)


# ------------------------------------------------------------------------------------------- likelihoods

GIVEN = [
    "fine thanks",
    "",
    "i like music and old films . what do you do ?",
    "yes",
    *(f"no {n}" for n in range(6)),
]


def loss(model: Any, context: list[int], target: list[int]) -> float:
    """The loss of transformers, of one row without padding: the mean over the target."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return float(model(torch.tensor([context]), labels=torch.tensor([target])).loss)
        labels = torch.tensor([[-100] * len(context) + target])
        return float(model(torch.tensor([context + target]), labels=labels).loss)


@pytest.mark.parametrize("kind", ["dialogpt", "hf", "blender", "blender 90M"])
@pytest.mark.parametrize("history", HISTORIES)
def test_given_replies_are_as_probable_as_by_transformers_loss(
    folders: dict[str, Path], kind: str, history: list[str]
) -> None:
    speaker: Any = SPEAKERS[kind](folders)
    blank = " " if kind == "blender" else ""
    end = 2 if "blender" in kind else speaker.ends[0]
    encode = speaker.model.encode
    for text, (log_p, n) in zip(GIVEN, speaker.likelihoods()["forward"](history, GIVEN), strict=True):
        target = [*(encode(blank + text) if text else []), end]
        assert n == len(target)
        assert log_p / n == pytest.approx(-loss(speaker.model.model, speaker.read(history), target), abs=1e-4)


def test_the_reverse_model_reads_given_replies(folders: dict[str, Path]) -> None:
    speaker: Any = SPEAKERS["mmi"](folders)
    history, end, encode = ["hi there", "old films"], speaker.end, speaker.model.encode
    source = [*encode("old films"), end, *encode("hi there"), end]
    found = speaker.likelihoods()
    for text, (log_p, n) in zip(GIVEN, found["backward"](history, GIVEN), strict=True):
        assert n == len(source)
        slow = loss(speaker.reverse.model, [*encode(text), end], source)
        assert log_p / n == pytest.approx(-slow, abs=1e-4)
    assert found["forward"](history, GIVEN) == DialoGPT(folders["gpt2"]).log_probs(history, GIVEN)
    assert "backward" not in DialoGPT(folders["gpt2"]).likelihoods()


def test_a_reply_may_end_with_any_end_and_is_cut_as_its_own(folders: dict[str, Path]) -> None:
    speaker = ChatModel(folders["llama"], replace(CHAT, max_tokens=4))
    (one, n), (cut, n_cut) = speaker.log_probs(["hi"], ["yes", "i like old films"])
    model, context, words = speaker.model.model, speaker.read(["hi"]), speaker.model.encode("yes")
    speaker.ends = [*speaker.ends, 0]
    ((both, _),) = speaker.log_probs(["hi"], ["yes"])
    rows = log_softmax_after(model, context + words)
    either = float(rows[-1, speaker.ends].logsumexp(0) - rows[-1, speaker.ends[0]])
    assert both - one == pytest.approx(either, abs=1e-4)
    assert (n, n_cut) == (len(words) + 1, 4)
    ids = speaker.model.encode("i like old films")[:4]
    assert cut / 4 == pytest.approx(-loss(model, context, ids), abs=1e-4)


# ------------------------------------------------------------------------------------------- chat models


def test_a_chat_model_reads_its_template(folders: dict[str, Path], tmp_path: Path) -> None:
    speaker = ChatModel(folders["llama"])
    text = "<|im_start|>assistant\nhi<|im_end|>\n<|im_start|>user\nyou ?<|im_end|>\n<|im_start|>assistant\n"
    assert speaker.read(["hi", "you ?"]) == speaker.model.tokenizer.encode(text)
    assert len(speaker.read(["hi", "abc" * 60, "you ?"])) <= 48
    assert speaker.read(["abc" * 60, "hi", "you ?"]) == speaker.read(
        ["hi", "you ?"]
    )  # the oldest are dropped
    assert len(speaker.read(["abc" * 60])) == 48
    strict = ChatModel(rivals.llama(tmp_path / "strict", USER_FIRST + rivals.TEMPLATE, 256))
    first = f"<|im_start|>user\n{OPENING}<|im_end|>\n"
    assert strict.read(["hi", "you ?"]) == strict.model.tokenizer.encode(first + text)
    refusing = ChatModel(rivals.llama(tmp_path / "refusing", "{{ raise_exception('never') }}"))
    with pytest.raises(UserError, match=r"its chat template refuses a conversation \(never\)"):
        refusing.reply_batch([["hi"]], [1])


# --------------------------------------------------------------------------------------------------- logs


def test_a_log_says_what_it_said(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    turns = [
        {"speaker": "A", "model": None, "text": "hi  there"},
        {"speaker": "B", "model": "x", "text": "yo"},
    ]
    more = {"speaker": "A", "model": "y", "text": "well"}
    other = [turns[0], {"speaker": "B", "model": "x", "text": "hello"}]
    lines = [{"turns": [*turns, more]}, {"turns": other}]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    log = Log(file)
    said = log.reply_batch([["hi there"], ["hi there"], ["hi there", "yo"], ["yo"], []], [0, 1, 5, 5, 5])
    assert [one.text for one in said] == ["yo", "hello", "well", "", ""]
    assert log.describe() == Log(str(file)).describe() != {}


def test_meena_s_and_xiaoice_s_transcripts_are_played_again() -> None:
    if not (DATA / "meena").exists():
        pytest.skip("no meena here")
    for name, context in (("meena", ["Hi!"]), ("xiaoice", ["你好\uff01"])):
        speaker = read_speaker(f"log:{DATA}/meena/{name}.txt", "--speaker")
        (said,) = speaker.reply_batch([context], [1])
        assert speaker.reads(said.text)
        assert not speaker.reply_batch([[*context, said.text]], [1])[0].candidates  # a person's turn


# --------------------------------------------------------------------------------------------- what is typed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blendr:x", "--speaker blendr:x: must be KIND:WHERE, and blendr is no kind; did you mean blender?"),
        ("hf:", "--speaker 'hf:': no FOLDER after the colon; give hf:FOLDER, without a blank in between"),
        ("a=log: ", "--speaker 'a=log: ': no FILE after the colon; give log:FILE"),
        ("blender: nix", "--speaker blender: nix: there is no config.json in it"),
        ("plato2:{tmp}/none", "--speaker plato2: {tmp}/none: no such run folder"),
        ("plato2:{tmp}/none,evaluation=x,length_penalty=1", "length_penalty=1: no such setting"),
        ("hf:{tmp}/none", "--speaker hf: {tmp}/none: there is no config.json in it; give a folder that"),
        ("dialogpt:{blenderbot}", "{blenderbot}: its model_type is blenderbot, not gpt2"),
        ("blender:{gpt2}", "{gpt2}: its model_type is gpt2, not blenderbot or blenderbot-small"),
        ("hf:{gpt2}", "{gpt2}: its tokenizer has no chat template; give a model that was made to chat"),
        (
            "dialogpt:{gpt2},reverse={tmp}/none",
            "--speaker dialogpt: {tmp}/none: there is no config.json in it",
        ),
        ("dialogpt:{gpt2},reverse={short}", "reverse={short}: has another vocabulary, or fewer positions"),
        ("dialogpt:{gpt2},top_q=5", "--speaker dialogpt: top_q=5: no such setting; did you mean top_p?"),
        ("dialogpt:{gpt2},top_k=five", "--speaker dialogpt: top_k=five: must be a whole number"),
        ("dialogpt:{gpt2},top_k=0", "--speaker dialogpt: top_k=0: must be at least 1 (1 = greedy)"),
        ("blender:{small},beam_size=0", "beam_size=0: must be at least 1"),
        ("openai:localhost:8000#x", "must be openai:URL#MODEL, as openai:http://127.0.0.1:8000/v1#tiny"),
        ("openai:http://localhost/v1", "must be openai:URL#MODEL"),
        (
            "openai:http://me:secret@localhost/v1#x",
            "the address holds a password; set OPENAI_API_KEY instead",
        ),
        ("log:{tmp}/none.jsonl", "--speaker log: {tmp}/none.jsonl: no such file"),
        ("log:x,top_k=5", "top_k=5: no such setting; there are none"),
        ("hf:{damaged}", "{damaged}: cannot be loaded ("),
        ("hf:{own}", "{own}: cannot be loaded ("),
        ("hf:{pickled}", "{pickled}: cannot be loaded (UnpicklingError"),
    ],
)
def test_mistakes_are_one_line(folders: dict[str, Path], tmp_path: Path, text: str, message: str) -> None:
    paths = {name: str(path) for name, path in folders.items()} | {"tmp": str(tmp_path)}
    paths |= {name: str(tmp_path / name) for name in ("short", "damaged", "own", "pickled")}
    if "short" in text:
        rivals.gpt2(tmp_path / "short", n_positions=32)
    for name in ("damaged", "own", "pickled"):
        if name in text:
            folder = rivals.llama(tmp_path / name)
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:100])
    if "own" in text:  # code that comes with a model
        own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
        (folder / "config.json").write_text(json.dumps(own), encoding="utf-8")
        (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    if "pickled" in text:
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(tmp_path / "ran"), protocol=2))
    with pytest.raises(UserError) as caught:
        read_speaker(text.format(**paths), "--speaker", "cpu")
    assert message.format(**paths) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


class Runs:
    """Makes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


def test_settings_are_typed_behind_the_folder(folders: dict[str, Path]) -> None:
    text = f"dialogpt:{folders['gpt2']},reverse={folders['reverse']},top_k=5,temperature=0.7"
    speaker = read_speaker(text, "--speaker", "cpu")
    assert (speaker.settings["top_k"], speaker.settings["temperature"]) == (5, 0.7)
    assert speaker.settings["n_samples"] == 16
    assert speaker.name == text
    assert (
        read_speaker(f"blender:{folders['small']},length_penalty=1", "--speaker").settings["length_penalty"]
        == 1
    )
