"""Training, saving and damaging tokenizers (exactness against Knover is in tests/parity)."""

import gzip
import io
import json
import shutil
import string
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from plato2.config import UserError
from plato2.data.tokenizer import (
    BOS_ID,
    EOS_ID,
    SENTENCE_BYTES,
    Tokenizer,
    fewer_pieces,
    normalize,
    train_tokenizer,
)

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
    assert tokenizer.is_empty(text) == (not ids)
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
        (TEXTS, 10, r"the characters of the corpus alone need \d+ pieces"),
        ([], 100, "the corpus is empty"),
        (["", " "], 100, "the corpus is empty"),
        (TEXTS, 3, "vocab_pieces=3: at least 4"),
    ],
)
def test_impossible_vocabularies_say_what_is_possible(texts, pieces, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, pieces)


def test_few_texts_give_the_vocabulary_that_they_can_fill():
    found = train_tokenizer(TEXTS, 8000)
    assert 90 < found.n_pieces < 8000
    again = train_tokenizer(TEXTS, found.n_pieces)
    assert [again.token(i) for i in range(again.vocab_size)] == [
        found.token(i) for i in range(found.vocab_size)
    ]
    assert fewer_pieces(found.vocab_size, 8000).endswith(f"have model.vocab_size={found.vocab_size}")
    assert fewer_pieces(again.vocab_size, again.n_pieces) is None


@pytest.mark.parametrize("blank", [" ", ""], ids=["words", "no blanks"])
def test_long_texts_are_trained_on(blank):
    text = blank.join(["abcdefg", "qrstuv", "wxyz", "数据", "分词"]) + blank
    long = text * (3 * SENTENCE_BYTES // len(text))
    found = train_tokenizer([long, "short text"], 60, character_coverage=1.0)
    assert found.unread_share(long) == 0
    only = train_tokenizer([long], 60, character_coverage=1.0)
    assert only.decode(only.encode(text)) == text.strip()


def test_texts_with_sentencepieces_own_sign_are_trained_on():
    found = train_tokenizer(["\u2585 bars \u2585\u2585 and words"] * 3, 30, character_coverage=1.0)
    assert found.unread_share("bars and words") == 0


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), UserError("line 3: not UTF-8")])
def test_what_reading_the_texts_raises_is_raised(raised):
    """SentencePiece makes a RuntimeError of it, with lines of a traceback."""

    def texts():
        yield "a text"
        raise raised

    with pytest.raises(type(raised)) as found:
        train_tokenizer(texts(), 100)
    assert found.value is raised


def test_what_a_tokenizer_cannot_read(trained):
    assert trained.unread_share("hi anna") == trained.unread_share("") == trained.unread_share(" ") == 0
    assert trained.unread_share("你好吗") == 1
    assert trained.unread_share("hi 你好") == 0.5
    assert trained.unread_share("hi 😀😀😀 →") == 0
    assert trained.unread_share("你好 😀") == trained.unread_share("😀") == 1


def test_one_text_is_not_a_list_of_its_letters(trained):
    for take in (trained.encode_batch, trained.encode_flat, train_tokenizer):
        with pytest.raises(TypeError, match="text"):
            take("hello")


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


# -- many texts at once ----------------------------------------------------------------------------------

SHIPPED = Tokenizer.load(str(files("plato2.weights") / "knover_english"))
RARE = train_tokenizer([*TEXTS, "x ~ q # z"], 60, character_coverage=0.98)  # not all letters have a piece
WITHOUT_BLANK = train_tokenizer(["abab" * 50 + "c"] * 10, 8, character_coverage=0.98)  # U+2581 is no piece
ENGLISH = st.sampled_from(
    ["I", "the", "The", "sea", "don't", "sea.", "~", "~~", "a~b", "q", "#", "<s>", "</s>"]
)
CONTROL = st.sampled_from([" ", "  ", "\n", "\t", "\x00", "\x1c", "\x1f", "\x7f", "\x85", "\u00a0", "\u200b"])
FOREIGN = st.sampled_from(
    ["é", "e\u0301", "\u00a8", "\u2019", "—", "汉字", "ﬁ", "Ⅻ", "½", "\u3000", "\ud800", "😂", "▁"]
)
MIXED = st.lists(ENGLISH | CONTROL | FOREIGN | st.text(max_size=5), max_size=12).map("".join)
ASCII = st.text(st.characters(max_codepoint=127), max_size=50)
ENGLISH_ONLY = st.lists(ENGLISH | CONTROL, max_size=20).map("".join)


def trained_by_sentencepiece(**options: object) -> Tokenizer:
    """A model that `train_tokenizer` does not make but a user may bring."""
    model = io.BytesIO()
    given = {"vocab_size": 120, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS), model_writer=model, **{**given, "model_type": "bpe", **options}
    )
    return Tokenizer(model.getvalue())


OTHER_MODELS: dict[str, dict[str, object]] = {
    "pieces across blanks": {"split_by_whitespace": False},
    "unigram": {"model_type": "unigram", "vocab_size": 38},
    "character": {"model_type": "char", "vocab_size": 27},
    "word": {"model_type": "word", "vocab_size": 25},
    "bytes of unknown characters": {"byte_fallback": True, "vocab_size": 330},
    "pieces of the user": {"user_defined_symbols": ["how are", "~~"]},
    "blank at the end": {"treat_whitespace_as_suffix": True},
    "no blank before the first word": {"add_dummy_prefix": False},
    "blanks are kept": {"remove_extra_whitespaces": False},
    "all as it is": {"normalization_rule_name": "identity"},
    "lower case": {"normalization_rule_name": "nmt_nfkc_cf"},
}
WHOLE_TEXTS = {name: trained_by_sentencepiece(**options) for name, options in OTHER_MODELS.items()}
BY_WORDS = {
    "shipped": SHIPPED,
    "lower": SHIPPED.with_lower_case(True),
    "own": train_tokenizer(TEXTS, 90),
    "rare": RARE,
}
TOKENIZERS = {**BY_WORDS, **WHOLE_TEXTS, "without blank": WITHOUT_BLANK}


def assert_same_ids(tokenizer: Tokenizer, texts: list[str]) -> None:
    expected = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    ids, offsets = tokenizer.encode_flat(texts)
    assert (ids.dtype, offsets.dtype) == (np.int32, np.int64)
    assert ids.tolist() == [index for text in expected for index in text]
    assert np.diff(offsets).tolist() == list(map(len, expected))
    assert offsets[0] == 0


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=st.lists(ASCII | ENGLISH_ONLY | MIXED, max_size=6))
@settings(max_examples=60, deadline=None)
def test_many_texts_at_once_have_the_ids_of_each(name, texts):
    assert_same_ids(TOKENIZERS[name], texts)


def test_which_models_are_encoded_by_words():
    """The fast way must not fall asleep, nor be taken where a word's ids depend on its neighbours."""
    assert all(tokenizer._splits_at_blanks for tokenizer in BY_WORDS.values())
    never = {"pieces across blanks", "unigram", "pieces of the user", "blank at the end", "blanks are kept"}
    assert not any(WHOLE_TEXTS[name]._splits_at_blanks for name in never)
    assert any("\u2581" in piece[1:] for piece in WHOLE_TEXTS["pieces across blanks"]._pieces)
    assert "\u2581" not in WITHOUT_BLANK._pieces


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_with_runs_of_unknown_characters(name):
    runs = [
        "~",
        "~~",
        "~ ~",
        "~~ ~ ~~ a",
        "a ~ ~",
        "how are ~ how are you",
        "~\u200b~",
        "汉 字",
        "汉字 ~ 汉字",
    ]
    assert_same_ids(TOKENIZERS[name], [*runs, " ".join(runs)])
    assert 0 in TOKENIZERS["own"].encode("~")


def test_no_text_and_empty_texts():
    for tokenizer in TOKENIZERS.values():
        assert_same_ids(tokenizer, [])
        assert_same_ids(tokenizer, [""])
        assert_same_ids(tokenizer, ["", " ", "\x00", "hi", "", "\u200b"])


def test_words_that_are_kept_are_collected_anew(monkeypatch):
    monkeypatch.setattr("plato2.data.tokenizer._MOST_WORDS", 10)
    tokenizer = Tokenizer.load(KNOVER)
    for number in range(8):
        assert_same_ids(tokenizer, [f"word {number} of a text", "the same again", f"{number}{number} new"])
        assert len(tokenizer._word_ids) <= 10 + 9
    assert_same_ids(tokenizer, [f"w{number}" for number in range(100)])


def test_a_long_text_is_encoded_by_words():
    """0.2 s for 0.9 MB; as a whole it takes SentencePiece seven times as long."""
    ids = KNOVER_TOKENIZER.encode_batch([" ".join(TEXTS * 100)])[0]
    assert ids == KNOVER_TOKENIZER.encode(" ".join(TEXTS)) * 100


@pytest.mark.parametrize("coverage", [0.9, 0.979, 1.1])
def test_a_coverage_that_sentencepiece_refuses(coverage):
    with pytest.raises(UserError, match=rf"character_coverage={coverage}: must be in \[0\.98, 1\.0\]"):
        train_tokenizer(TEXTS, 90, character_coverage=coverage)
    assert train_tokenizer(TEXTS, 60, character_coverage=0.98).n_pieces == 60
