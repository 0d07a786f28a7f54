"""Training, saving and damaging tokenizers (exactness against Knover is in tests/parity)."""

import gzip
import json
import shutil
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plato2.config import UserError
from plato2.data.tokenizer import BOS_ID, EOS_ID, Tokenizer, normalize, train_tokenizer

KNOVER = Path(__file__).parents[1] / "fixtures" / "knover"
SHARED = Path(__file__).parents[3] / "shared" / "data"
TEXTS = [
    f"{hello} {name} , how {verb} you {time} ?"
    for hello in ("hi", "hello", "good morning", "hey")
    for name in ("anna", "ben", "clara", "david", "emil")
    for verb in ("are", "were", "do")
    for time in ("today", "this evening", "on monday", "these days")
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXTS, 90)


def test_special_ids_of_a_trained_tokenizer(trained):
    assert (trained.n_pieces, trained.vocab_size, trained.mask_id) == (90, 91, 90)
    assert [trained.token(i) for i in (0, 1, 2, 90)] == ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    with pytest.raises(ValueError, match="token id 91"):
        trained.token(91)


def test_the_same_texts_give_the_same_bytes(trained, tmp_path):
    again = train_tokenizer(iter(TEXTS), 90)
    again.save(tmp_path / "b")
    trained.save(tmp_path / "a")
    for name in ("spm.model", "vocab.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert again.sha256 == trained.sha256


def test_vocab_txt_has_the_form_of_knovers(trained, tmp_path):
    trained.save(tmp_path)
    ours = (tmp_path / "vocab.txt").read_text().splitlines()
    knover = (KNOVER / "vocab.txt").read_text().splitlines()
    assert ours[:3] == knover[:3]
    assert ours[-4:] == knover[-4:]
    assert ours[-5] == "[MASK]\t90"
    assert len(ours) == 90 + 5


@pytest.mark.parametrize("path", ["", "spm.model"])
def test_saved_and_loaded(trained, tmp_path, path):
    trained.save(tmp_path)
    loaded = Tokenizer.load(tmp_path / path)
    assert loaded.sha256 == trained.sha256
    assert loaded.encode(TEXTS[0]) == trained.encode(TEXTS[0])


def test_lower_case_travels_with_the_tokenizer(tmp_path):
    lower = train_tokenizer((text.upper() for text in TEXTS), 90, lower_case=True)
    lower.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("HELLO Anna") == loaded.encode("hello anna")
    assert loaded.sha256 == lower.sha256 != loaded.with_lower_case(False).sha256


@given(st.text(alphabet=st.characters(), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_yields_ordinary_ids_and_decodes(text):
    tokenizer = KNOVER_TOKENIZER
    ids = tokenizer.encode(text)
    assert not {BOS_ID, EOS_ID, tokenizer.mask_id} & set(ids)
    assert tokenizer.encode_batch([text, text]) == [ids, ids]
    assert isinstance(tokenizer.decode(ids), str)


@given(st.text(alphabet=string.ascii_letters + " ", max_size=60))
def test_known_characters_come_back(text):
    assert KNOVER_TOKENIZER.decode(KNOVER_TOKENIZER.encode(text)) == " ".join(text.split())


KNOVER_TOKENIZER = Tokenizer.load(KNOVER)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("zero\u200dwidth\x00 and\x7f control", "zerowidth and control"),
        ("lone \ud800 surrogate", "lone  surrogate"),
        ("wide\u3000blank", "wide blank"),
        ("Ünïcödé", "Unicode"),
    ],
)
def test_normalize(text, clean):
    assert normalize(text) == clean


def test_chinese_is_glued_again():
    if not SHARED.exists():
        pytest.skip("needs ../shared/data (Chinese conversations)")
    path = SHARED / "chatterbot" / "chinese.jsonl"
    texts = [turn for line in path.read_text().splitlines() for turn in json.loads(line)["turns"]]
    tokenizer = train_tokenizer(texts, 3000, character_coverage=0.9995)
    assert tokenizer.decode(tokenizer.encode("你是什么语言编写的")) == "你是什么语言编写的"


@pytest.mark.parametrize(
    ("texts", "pieces", "message"),
    [
        (TEXTS, 8000, r"vocab_pieces=8000: the corpus gives at most \d+ pieces"),
        (TEXTS, 10, r"the characters of the corpus alone need \d+ pieces"),
        ([], 100, "the corpus is empty"),
        (["", " "], 100, "the corpus is empty"),
        (TEXTS, 3, "vocab_pieces=3: at least 4"),
    ],
)
def test_impossible_vocabularies_say_what_is_possible(texts, pieces, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, pieces)


def test_the_largest_vocabulary_it_names_works():
    with pytest.raises(UserError) as caught:
        train_tokenizer(TEXTS, 8000)
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert train_tokenizer(TEXTS, largest).n_pieces == largest


@pytest.fixture
def copy(tmp_path):
    for name in ("spm.model", "vocab.txt"):
        shutil.copy(KNOVER / name, tmp_path)
    return tmp_path


def test_missing_files(copy):
    (copy / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"vocab\.txt is missing"):
        Tokenizer.load(copy)
    with pytest.raises(UserError, match=r"spm\.model is missing"):
        Tokenizer.load(copy / "nowhere")


@pytest.mark.parametrize("damage", [lambda b: b[:1000], lambda b: b"", lambda b: gzip.compress(b)])
def test_damaged_model(copy, damage):
    model = copy / "spm.model"
    model.write_bytes(damage(model.read_bytes()))
    with pytest.raises(UserError, match=str(copy)):
        Tokenizer.load(copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:5], "other\t5", *lines[6:]], r"line 6 is 'other\\t5'"),
        (lambda lines: lines[:-3], "line 8003 is 'nothing'"),
        (lambda lines: [*lines, "more\t9000"], "8006 lines, not 8005"),
    ],
)
def test_vocab_of_another_model(copy, damage, message):
    vocab = copy / "vocab.txt"
    vocab.write_text("\n".join(damage(vocab.read_text().splitlines())) + "\n")
    with pytest.raises(UserError, match=message):
        Tokenizer.load(copy)
