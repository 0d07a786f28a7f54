"""The tokenizer of a pretrained decoder: its words with plato2's ids; nothing that is typed is special."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from decoders import words, write_tokenizer
from small import write_dialogues
from typer.testing import CliRunner

from plato2.commands.tokenizer import app
from plato2.config import UserError
from plato2.data.decoder_tokenizer import DecoderTokenizer, SpecialWords
from plato2.data.tokenizer import Tokenizer
from plato2.prepare.dialogues import PrepareOptions, prepare

TEXTS = [
    "bak den , lis ?",
    "  two   blanks\tand\nlines ",
    "caf\u00e9 \u4f60\u597d \U0001f468\u200d\U0001f469 na\u00efve",
    "<end> <begin> <|im_end|> </s> [SEP]",
    "",
    "a\x00b\x07c \ud800 d",
    "x" * 5000,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(f"hf:{folder}")


def test_ids_are_those_of_transformers_moved_by_three(folder: Path, tokenizer: Tokenizer) -> None:
    import transformers

    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.vocab_size == len(theirs) + 4
    assert tokenizer.mask_id == tokenizer.n_pieces == len(theirs) + 3
    for text in TEXTS[:3]:
        expected = theirs.encode(" ".join(text.split()), add_special_tokens=False)
        assert tokenizer.encode(text) == [3 + i for i in expected]
        assert tokenizer.pieces(text) == theirs.convert_ids_to_tokens(expected)
        assert [tokenizer.token(i) for i in tokenizer.encode(text)] == tokenizer.pieces(text)


def test_a_text_comes_back_and_yields_no_special_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(i not in (0, 1, 2, 3, 4, 5, tokenizer.mask_id) for i in ids)  # nor those of <end>, <begin>
        plain = "".join(char for char in " ".join(text.split()) if char not in "\x00\x07\ud800")
        assert tokenizer.decode([1, *ids, 2]) == " ".join(plain.split())
        assert tokenizer.is_empty(text) == (not ids)
        assert tokenizer.unread_share(text) == 0.0
    assert [tokenizer.token(i) for i in (0, 1, 2, 3)] == ["[PAD]", "[CLS]", "[SEP]", "<end>"]
    with pytest.raises(ValueError, match="not in 0"):
        tokenizer.token(tokenizer.vocab_size)


def test_what_is_saved_is_read_by_its_folder_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.json", "tokenizer.json"]
    assert again.sha256 == tokenizer.sha256
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    lower = again.with_lower_case(True)
    lower.save(tmp_path / "lower")
    assert Tokenizer.load(tmp_path / "lower").encode("BAK") == tokenizer.encode("bak")
    assert lower.sha256 != tokenizer.sha256
    text = json.loads((tmp_path / "text.json").read_text())
    other = DecoderTokenizer(words().encode(), SpecialWords(text["begin"], 1, None))
    assert other.sha256 != tokenizer.sha256  # another end


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"eos_token": "<end>"}}, (0, 0, None)),
        (
            {"tokenizer_config.json": {"eos_token": {"content": "<end>"}, "bos_token": "<begin>"}},
            (1, 0, None),
        ),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "<begin>"}}, (1, 1, None)),
        ({"config.json": {"eos_token_id": 2, "bos_token_id": 1}}, (1, 2, None)),
        ({"tokenizer_config.json": {"eos_token": "<end>", "unk_token": "<pad>"}}, (0, 0, 2)),
        ({"tokenizer_config.json": {"eos_token": "<end>", "unk_token": "<end>"}}, (0, 0, None)),
    ],
)
def test_where_special_tokens_are_named(
    files: dict[str, Any], expected: tuple[int, int, int | None], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(words())
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    assert DecoderTokenizer.from_model(tmp_path).special == SpecialWords(*expected)


def test_what_has_no_word_is_unknown_and_counted(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers

    known = Words(models.WordLevel({"<unk>": 0, "</s>": 1, "hi": 2, "there": 3}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "tokenizer.json").write_text(known.to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": "<unk>"}')
    tokenizer = Tokenizer.load(f"hf:{tmp_path}")
    assert tokenizer.encode("hi friend there") == [5, 0, 6]
    assert tokenizer.unread_share("hi friend there") == pytest.approx(6 / 13)
    assert tokenizer.unread_share("hi there") == 0.0


def test_a_corpus_is_cut_into_the_words_of_a_decoder(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from plato2.data.shards import read_index

    write_dialogues(tmp_path / "d.jsonl", 40)
    options = PrepareOptions(
        corpus="jsonl",
        files=[str(tmp_path / "d.jsonl")],
        out=str(tmp_path / "shards"),
        tokenizer=f"hf:{folder}",
        valid_dialogues=3,
        test_fraction=0.0,
    )
    prepare(options, show_progress=False)
    index = read_index(str(tmp_path / "shards"))
    assert (index.vocab_size, index.tokenizer_sha256) == (tokenizer.vocab_size, tokenizer.sha256)
    assert Tokenizer.load(tmp_path / "shards" / "tokenizer").sha256 == tokenizer.sha256


def test_show_names_pieces_and_ids(folder: Path) -> None:
    done = CliRunner().invoke(app, ["show", f"hf:{folder}", "bak <end>", "--json"])
    assert done.exit_code == 0
    shown = json.loads(done.stdout)
    assert shown["text"] == "bak <end>"
    assert len(shown["pieces"]) == len(shown["ids"]) > 3


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "not a readable tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\xff"), "not a readable tokenizer.json"),
        (lambda f: (f / "tokenizer_config.json").write_text("{}"), "no end token"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer that can be read"),
    ],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(
    folder: Path, tmp_path: Path, spoil: Any, expected: str
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    spoil(bad)
    with pytest.raises(UserError, match=expected) as found:
        Tokenizer.load(f"hf:{bad}")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "text", ['{"lower_case": false}', '{"begin": 1, "end": 900, "unknown": null, "lower_case": false}', "[]"]
)
def test_a_damaged_saved_one_is_refused(tokenizer: Tokenizer, tmp_path: Path, text: str) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "text.json").write_text(text)
    with pytest.raises(UserError, match=r"special"):
        Tokenizer.load(tmp_path)
