"""Automatic evaluation: against independent implementations, on real transcripts, on bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import KNOVER, make_run
from test_evaluated import SHARED, needs_data, write

from plato2.config import UserError
from plato2.data.tokenizer import Tokenizer
from plato2.evaluate.automatic import differences, evaluate
from plato2.evaluate.options import AutomaticOptions
from plato2.evaluate.results import Figure, Result
from plato2.evaluate.said import read_systems
from plato2.evaluate.scores import Kept, Likelihood, is_english, unwatched
from plato2.talk.score import score_lines
from plato2.weights.folder import load_generation
from plato2.words import split_words

pytest.importorskip("sacrebleu")
PLAIN = AutomaticOptions(embedding=False)


def reply(context: str, text: str, model: str = "m", **more: Any) -> dict[str, Any]:
    last = {"speaker": "B", "model": model, "text": text}
    if candidates := more.pop("candidates", None):
        last["candidates"] = [{"text": candidate} for candidate in candidates]
    return {"turns": [{"speaker": "A", "text": context}, last], **more}


def chat(*texts: str, model: str = "m") -> dict[str, Any]:
    """The first is given."""
    turns = [
        {"speaker": "AB"[number % 2], "model": model if number else None, "text": text}
        for number, text in enumerate(texts)
    ]
    return {"turns": turns}


def figures(kind: Any, *files: object, options: AutomaticOptions = PLAIN) -> dict[str, dict[str, Figure]]:
    return evaluate(kind, [str(file) for file in files], options).systems


def value(figure: Figure) -> float:
    assert figure.value is not None, figure.note
    return figure.value


# ---------------------------------------------------------------------------------------------------- systems


def test_only_what_a_system_said_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", chat("what is love ?", "a feeling", "i see", "do you ?"))
    (said,) = read_systems([str(path)], "dialogues")[0].values()
    assert [one.text for one in said] == ["a feeling", "i see", "do you ?"]
    assert said[1].before == ("what is love ?", "a feeling")
    (said,) = read_systems([str(path)], "dialogues", "B")[0].values()
    assert [one.text for one in said] == ["a feeling", "do you ?"]
    with pytest.raises(UserError, match=r"speaker=C: m in .* speaks as 'B', 'A'; name one, or both"):
        read_systems([str(path)], "dialogues", "C")


def test_names(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", reply("hi", "yes"))
    two = write(tmp_path / "b=c.jsonl", reply("hi", "yes"), reply("hi", "no", "n"))
    found, paths = read_systems([f"first={one}", f"second={two}", str(two)], "replies")
    assert list(found) == ["first", "second m", "second n", "m", "n"]
    assert paths == [one, two, two]
    with pytest.raises(UserError, match="another file has m, too; give each a name: NAME="):
        read_systems([str(one), str(one)], "replies")


def test_a_dialogue_is_no_reply(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", chat("hi", "you", "me"))
    with pytest.raises(UserError, match=r"a\.jsonl:1: m says 2 turns, .*use plato2 evaluate dialogues"):
        read_systems([str(path)], "replies")


def test_replies_to_one_context_are_one_case(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", reply("hi", "a b"), reply("hi", "a c"), reply("you ?", "d"))
    found = figures("replies", path)["m"]
    assert (found["utterances"].value, found["length"].n) == (3, 2)
    assert value(found["distinct_2"]) == 2 / 5


# ------------------------------------------------------------------------------------------- known numbers


CONTEXTS = ["hi", "how are you ?", "what ?", "where are you from", "and now ?"]
SAID = ["I am fine , thanks a lot", "the cat sat on the mat", "no idea what you mean", "", "from here"]
REFERENCES = [
    ["i am fine , thank you very much", "fine , thanks a lot"],
    ["a cat sat on the mat today", "the dog"],
    ["i have no idea what you mean by that"],
    ["nothing"],
    ["from there", "not from here at all"],
]


@pytest.fixture
def replies(tmp_path: Path) -> Path:
    lines = [
        reply(context, text, references=references, candidates=[text or "x", *references, "what ?"])
        for context, text, references in zip(CONTEXTS, SAID, REFERENCES, strict=True)
    ]
    return write(tmp_path / "replies.jsonl", *lines)


def test_overlap_is_that_of_torchmetrics_and_of_sacrebleu_over_the_corpus(replies: Path) -> None:
    from sacrebleu.metrics import BLEU, CHRF
    from torchmetrics.text import BLEUScore, CHRFScore

    found = figures("replies", replies)["m"]
    words = [" ".join(split_words(text)) for text in SAID]
    references = [[" ".join(split_words(text)) for text in texts] for texts in REFERENCES]
    streams = [[texts[n] if n < len(texts) else None for texts in references] for n in range(2)]
    assert value(found["bleu"]) == pytest.approx(BLEU(tokenize="none").corpus_score(words, streams).score)
    unsmoothed = 100 * float(BLEUScore()(words, references))
    assert value(found["bleu"]) == pytest.approx(unsmoothed, rel=1e-5)
    sentences = [
        CHRF(lowercase=True).sentence_score(s, r).score for s, r in zip(SAID, REFERENCES, strict=True)
    ]
    assert value(found["chrf"]) == pytest.approx(np.mean(sentences))
    other = CHRFScore(n_word_order=0, lowercase=True, return_sentence_level_score=True)
    _, by_sentence = other(SAID, REFERENCES)
    assert value(found["chrf"]) == pytest.approx(100 * float(by_sentence.mean()), abs=0.5)
    rouge = [
        max(slow_rouge_l(one.split(), reference.split()) for reference in several)
        for one, several in zip(words, references, strict=True)
    ]
    assert value(found["rouge_l"]) == pytest.approx(100 * np.mean(rouge), rel=1e-5)


def slow_rouge_l(a: list[str], b: list[str]) -> float:
    def common(i: int, j: int) -> int:
        if not (i and j):
            return 0
        return common(i - 1, j - 1) + 1 if a[i - 1] == b[j - 1] else max(common(i - 1, j), common(i, j - 1))

    n = common(len(a), len(b))
    return 2 * n / (len(a) + len(b)) if n else 0.0


def test_self_bleu_is_that_of_a_loop(replies: Path, tmp_path: Path) -> None:
    from sacrebleu import sentence_bleu

    found = figures("replies", replies)["m"]["candidates_self_bleu"]
    expected = []
    for text, references in zip(SAID, REFERENCES, strict=True):
        words = [" ".join(split_words(c)) for c in [text or "x", *references, "what ?"]]
        expected.append(
            np.mean(
                [
                    sentence_bleu(one, words[:n] + words[n + 1 :], tokenize="none").score
                    for n, one in enumerate(words)
                ]
            )
        )
    assert value(found) == pytest.approx(np.mean(expected))
    same = write(tmp_path / "same.jsonl", *[chat("hi", "i do not know what to say")] * 3)
    assert value(figures("dialogues", same)["m"]["self_bleu"]) == pytest.approx(100)


def test_equal_size_takes_the_length_out(tmp_path: Path) -> None:
    """Two systems that draw words from one distribution differ in distinct only by how much they say."""
    generator = np.random.default_rng(0)
    p = 1 / np.arange(1, 501)

    def said(n: int) -> list[dict[str, Any]]:
        words = generator.choice(500, (n, 10), p=p / p.sum())
        return [reply(f"c{i}", " ".join(f"w{word}" for word in row)) for i, row in enumerate(words)]

    little, much = write(tmp_path / "a.jsonl", *said(200)), write(tmp_path / "b.jsonl", *said(2000))
    result = evaluate("replies", [f"little={little}", f"much={much}"], PLAIN)
    a, b = result.systems["little"], result.systems["much"]
    assert value(a["distinct_1"]) > 2 * value(b["distinct_1"])
    assert value(a["matched_1"]) == pytest.approx(value(a["distinct_1"]))  # all of its words
    assert value(b["matched_1"]) == pytest.approx(value(a["matched_1"]), rel=0.1)
    assert result.settings["match_words"] == 2000
    assert result.measures["matched_1"].label == "distinct-1, 2,000 words each"
    fixed = AutomaticOptions(embedding=False, match_words=3000)
    assert (
        figures("replies", f"little={little}", options=fixed)["little"]["matched_1"].note == "only 2000 words"
    )


def test_the_seed_is_all_that_is_drawn(replies: Path) -> None:
    first, again = (evaluate("replies", [str(replies)], PLAIN) for _ in range(2))
    assert first.systems == again.systems
    other = AutomaticOptions(embedding=False, seed=1)
    drawn = figures("replies", replies, options=other)["m"]
    assert drawn != first.systems["m"]
    assert {n: f.value for n, f in drawn.items()} == {n: f.value for n, f in first.systems["m"].items()}


def test_offensive_by_lists_and_by_the_classifier(tmp_path: Path) -> None:
    rude = "you are a fucking idiot"
    lines = [
        reply("hi", rude),
        reply("you ?", "a nice day", candidates=["a nice day", rude]),
        reply("x", "y"),
    ]
    found = figures("replies", write(tmp_path / "a.jsonl", *lines))["m"]
    assert value(found["offensive_list"]) == pytest.approx(1 / 3)
    assert value(found["offensive_classifier"]) == pytest.approx(1 / 3)
    assert value(found["offensive_candidates"]) == 1 / 2
    chinese = figures("replies", write(tmp_path / "b.jsonl", reply("你好", "我很好"), reply("x", "你呢")))[
        "m"
    ]
    assert chinese["offensive_classifier"].note == "not English"
    assert value(chinese["distinct_2"]) == 3 / 5  # characters: 我很 很好 你呢


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "lines",
    [
        [reply("hi", "")],
        [reply("hi", "?!"), reply("you", "...")],
        [reply("hi", "same words"), reply("you", "same words")],
        [reply("", "")],
        [reply("hi", "yes", references=[])],
        [reply("hi", "", references=["", "?"], candidates=["", ""])],
        [reply("hi", "x", references=["x"], candidates=["x"])],
        [{"turns": [{"model": "m", "text": "alone"}]}],
        [reply("hi", "\U0001f600"), reply("hi", "\U0001f600")],
    ],
)
@pytest.mark.parametrize("kind", ["replies", "dialogues"])
def test_every_figure_of_bad_input_is_a_number_or_says_why(tmp_path: Path, lines: list, kind: Any) -> None:
    path = write(tmp_path / "a.jsonl", *lines)
    result = evaluate(kind, [str(path)], PLAIN)
    assert Result.model_validate_json(result.model_dump_json()) == result
    for name, figure in result.systems["m"].items():
        assert figure.note if figure.value is None else math.isfinite(figure.value), name
        assert (figure.low is None) == (figure.high is None)
        assert figure.low is None or figure.low <= value(figure) <= (figure.high or 0), name


def test_a_silent_system_does_not_shrink_the_others(tmp_path: Path) -> None:
    talks = write(tmp_path / "a.jsonl", reply("hi", "a b c"), reply("you", "d e"))
    silent = write(tmp_path / "b.jsonl", reply("hi", "", "quiet"))
    found = figures("replies", talks, silent)
    assert value(found["m"]["matched_1"]) == 1.0
    assert found["quiet"]["matched_1"].note == found["quiet"]["distinct_1"].note == "no words"


# ------------------------------------------------------------------------------------------------ likelihood


@pytest.mark.parametrize("stage", ["1_coarse", "2_gen"])
def test_nats_are_those_of_score(tmp_path: Path, stage: str) -> None:
    run = make_run(tmp_path / "run", stage)
    tokenizer = Tokenizer.load(KNOVER)
    pairs = [("hi", "how are you ?"), ("do you like music ?", "i play the piano"), ("what ?", "nothing")]
    path = write(tmp_path / "a.jsonl", *(reply(*pair) for pair in pairs))
    options = AutomaticOptions(embedding=False, model=run)
    found = figures("replies", path, options=options)["m"]
    lines = [f"{context}\t{text}".encode() for context, text in pairs]
    nats, tokens = 0.0, 0
    for scores in score_lines(lines, tokenizer, load_generation(run)):
        given_z = scores.get("nll_by_latent") or [scores["nll"]]
        nats -= math.log(sum(math.exp(-nll) for nll in given_z) / len(given_z))
        tokens += scores["n_tokens"]
    assert value(found["perplexity"]) == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert value(found["nats_word"]) == pytest.approx(nats / 8, rel=1e-4)
    assert value(found["nats_byte"]) == pytest.approx(nats / sum(len(text) for _, text in pairs), rel=1e-4)


def test_what_cannot_be_scored_is_left_out_and_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "1_coarse")
    model = Likelihood(run)
    found = model([(("hi",), "you"), ((), "no context"), (("hi",), "long " * 500), (("long " * 500,), "x")])
    assert np.isnan(found[:, 0]).tolist() == [False, True, True, False]
    path = write(tmp_path / "a.jsonl", reply("hi", "you"), reply("hi", "long " * 500))
    figure = figures("replies", path, options=AutomaticOptions(embedding=False, model=run))["m"]["perplexity"]
    assert figure.note == "1 of 2 left out: no context, or too long"


def test_what_was_computed_is_kept(tmp_path: Path) -> None:
    path, calls = tmp_path / "kept", []

    def lengths(texts: list[str]) -> np.ndarray:
        calls.extend(texts)
        if "stop" in texts:
            raise KeyboardInterrupt
        return np.array([[len(text), 1 / 3] for text in texts])

    texts = ["a", "bb", "a"]
    first = Kept(path, 2).of(texts, str, lengths, "", unwatched)
    assert first.tolist() == [[1, 1 / 3], [2, 1 / 3], [1, 1 / 3]]
    with pytest.raises(KeyboardInterrupt):
        Kept(path, 2).of(["stop"], str, lengths, "", unwatched)
    path.write_bytes(path.read_bytes() + b"half a record")
    again = Kept(path, 2).of([*texts, "ccc"], str, lengths, "", unwatched)
    assert again[:3].tolist() == first.tolist()
    assert calls == ["a", "bb", "stop", "ccc"]
    assert Kept(None, 2).of([], str, lengths, "", unwatched).shape == (0, 2)


# ------------------------------------------------------------------------------------------------ similarity


def test_english() -> None:
    assert is_english(["hello", "你好"])
    assert not is_english(["你好吗 , ok"])
    assert is_english(["?!", ""])


def test_similarity_and_coverage_with_the_real_encoder(tmp_path: Path) -> None:
    """One system's candidates say what the references say; the other's are about something else."""
    pytest.importorskip("all_minilm_l6_v2")
    contexts = {
        "what do you do on weekends ?": ["i go hiking in the mountains", "i watch films at home"],
        "what is your favourite food ?": ["i love pizza", "sushi is the best"],
    }
    good = {
        "what do you do on weekends ?": ["hiking in the mountains", "watching films at home", "no idea"],
        "what is your favourite food ?": ["pizza is what i love", "the best is sushi", "no idea"],
    }
    bad = ["my car is red", "it rains", "the bank is closed"]
    a = write(
        tmp_path / "a.jsonl",
        *(reply(c, good[c][0], references=r, candidates=good[c]) for c, r in contexts.items()),
    )
    b = write(
        tmp_path / "b.jsonl", *(reply(c, bad[0], references=r, candidates=bad) for c, r in contexts.items())
    )
    options = AutomaticOptions(near=0.6)
    result = evaluate("replies", [f"good={a}", f"bad={b}"], options, tmp_path / "out.json")
    good_figures, bad_figures = result.systems["good"], result.systems["bad"]
    assert value(good_figures["coverage"]) == 1.0
    assert value(bad_figures["coverage"]) == 0.0
    assert value(good_figures["similarity"]) > 0.8 > 0.4 > value(bad_figures["similarity"])
    chance = result.measures["similarity"].chance
    assert chance is not None
    assert chance < value(good_figures["similarity"])
    assert differences(result) == [
        "coverage of bad less that of good: -1.000 (-1.000 to -1.000), over 2 contexts"
    ]
    assert result.details["people"]["references"] == 4
    kept = tmp_path / "out.json.embeddings"
    assert kept.stat().st_size % (8 + 8 * 384) == 0
    talk = write(
        tmp_path / "c.jsonl",
        chat(
            "do you like dogs ?", "yes , i have two dogs", "my dog is old", "stocks fell on monday", "the sea"
        ),
        chat(
            "which bread do you bake ?", "i bake rye bread", "bread needs time", "my bike broke", "it snows"
        ),
    )
    topic = evaluate("dialogues", [str(talk)])
    assert value(topic.systems["m"]["topic"]) > (topic.measures["topic"].chance or 1)
    assert value(topic.systems["m"]["topic_late"]) < value(topic.systems["m"]["topic"])


# --------------------------------------------------------------------------------------- the real transcripts


@needs_data
def test_chinese_is_counted_in_characters() -> None:
    said = read_systems([str(SHARED / "meena" / "xiaoice.txt")], "dialogues")[0]["XiaoIce"]
    assert said[0].text == "你比我好"
    assert said[0].words == ("你", "比", "我", "好")


def test_json_of_a_result_has_no_nan(replies: Path) -> None:
    json.loads(evaluate("replies", [str(replies)], PLAIN).model_dump_json(), parse_constant=pytest.fail)
