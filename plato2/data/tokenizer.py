"""Text to ids and back: SentencePiece behind Knover's text path (docs/spec.md, Ids and text).

A tokenizer is a folder with two files, the same two that Knover publishes:

- `spm.model`: a SentencePiece model with the pieces 0 `<unk>`, 1 `<s>`, 2 `</s>`, 3 ...;
- `vocab.txt`: `token TAB id` for every piece, `[MASK]` with the id after the last piece, and the aliases
  `[UNK]` 0, `[PAD]` 0, `[CLS]` 1, `[SEP]` 2.

Ours add `text.json` with the one choice the two files cannot hold: whether text is lower-cased.
Padding and unknown share id 0, as in Knover; an unknown character is therefore printed as `[PAD]`.
Text never yields a special id: `[SEP]` or `</s>` typed by a person is ordinary text.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import textwrap
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import sentencepiece

from plato2.bounded import read_file
from plato2.config import UserError

PAD_ID = UNK_ID = 0
BOS_ID = 1
EOS_ID = 2
WORD_START = "\u2581"

_ALIASES = (("[UNK]", UNK_ID), ("[PAD]", PAD_ID), ("[CLS]", BOS_ID), ("[SEP]", EOS_ID))
_QUOTES = {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2014": "-"}
_MOST_WORDS = 500_000
"""Words whose ids are kept, about 60 MB; then they are collected anew."""
_ID_BYTES = 4
SENTENCE_BYTES = 4192
"""Longest text that SentencePiece trains on. Longer ones, and those with its own sign for what is unknown, it
silently leaves out; so they are cut, and the sign is removed."""
MOST_UNREAD = 0.3
"""Share of a message's letters that may be unreadable before it is said."""
_SENTENCE_CHARACTERS = SENTENCE_BYTES // 4
_SIGN_OF_UNKNOWN = "\u2585"
_FILE_BYTES = 1 << 26
"""A model of a million pieces is smaller."""
DECODER = "hf:"
"""Before the folder of a pretrained decoder whose tokenizer is meant."""
_CURE = "give a folder with spm.model and vocab.txt (plato2 tokenizer train writes one)"


class _MarkTable(dict[int, str | None]):
    """`str.translate` table that drops combining marks; filled as characters are seen."""

    def __missing__(self, code: int) -> str | None:
        self[code] = None if unicodedata.combining(chr(code)) else chr(code)
        return self[code]


class _CleanTable(dict[int, str | None]):
    """`str.translate` table: quotes and dash to ASCII, control characters dropped, spaces to a blank."""

    def __missing__(self, code: int) -> str | None:
        char = chr(code)
        category = unicodedata.category(char)
        clean: str | None = _QUOTES.get(char, char)
        if category == "Zs":
            clean = " "
        elif category.startswith("C"):
            clean = None
        self[code] = clean
        return clean


_MARKS = _MarkTable()
_CLEAN = _CleanTable()


def preprocess(text: str, lower_case: bool = False) -> str:
    """White space collapsed, NFKD, combining marks dropped, optionally lower case."""
    text = " ".join(text.split())
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text).translate(_MARKS)
    return text.lower() if lower_case else text


def normalize(text: str, lower_case: bool = False) -> str:
    """The text that SentencePiece sees: `preprocess`, then quotes, dash, control characters and spaces."""
    text = preprocess(text, lower_case)
    if text.isascii() and text.isprintable():
        return text  # nothing left to map: most English text, much faster
    return text.translate(_CLEAN)


class Tokenizer:
    """A SentencePiece model with the special ids of docs/spec.md, Ids and text.

    `vocab_size` counts the rows a model's word table needs: every piece and [MASK] (8,000 + 1).
    """

    def __init__(self, model: bytes, vocab: bytes | None = None, lower_case: bool = False) -> None:
        """Take the bytes of `spm.model` and `vocab.txt`; without `vocab` the list of the model is used.

        Raises:
            UserError: the model cannot be read or the two do not belong together.
        """
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, OSError) as error:
            raise UserError(f"spm.model is not a readable SentencePiece model; {_CURE}") from error
        self.lower_case = lower_case
        self._word_ids: dict[str, bytes] = {}
        self._model = model
        try:
            pieces = self._processor.id_to_piece(list(range(self._processor.get_piece_size())))
        except UnicodeDecodeError as error:
            raise UserError(f"spm.model is damaged (a piece is not UTF-8); {_CURE}") from error
        self._pieces: list[str] = pieces
        own = "".join(f"{token}\t{index}\n" for token, index in self._vocabulary()).encode()
        self._vocab = own if vocab is None else vocab
        if vocab is not None and vocab.strip(b"\n") != own.strip(b"\n"):
            raise UserError(_vocab_difference(vocab, self._vocabulary()))
        self._processor_ids = (self._processor.unk_id(), self._processor.bos_id(), self._processor.eos_id())
        if self._processor_ids != (UNK_ID, BOS_ID, EOS_ID):
            raise UserError(
                f"spm.model has the ids (unk, bos, eos) = {self._processor_ids}, plato2 needs "
                f"{(UNK_ID, BOS_ID, EOS_ID)}; train one with plato2 tokenizer train"
            )

    def _vocabulary(self) -> list[tuple[str, int]]:
        tokens = [(piece, index) for index, piece in enumerate(self._pieces)]
        return [*tokens, ("[MASK]", len(self._pieces)), *_ALIASES]

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer from its folder, or from the path of its `spm.model`.

        `hf:FOLDER` is that of a pretrained decoder; what came of it is read like any other.

        Raises:
            UserError: a file is missing, unreadable, or `vocab.txt` does not match the model.
        """
        from plato2.data.decoder_tokenizer import DecoderTokenizer

        if str(path).startswith(DECODER):
            return DecoderTokenizer.from_model(str(path).removeprefix(DECODER))
        folder = Path(path)
        if (folder / "tokenizer.json").is_file() and not (folder / "spm.model").exists():
            return DecoderTokenizer.read(folder)
        if folder.suffix == ".model":
            folder = folder.parent
        for name in ("spm.model", "vocab.txt"):
            if not (folder / name).is_file():
                raise UserError(f"no tokenizer at {path}: {folder / name} is missing; {_CURE}")
        lower_case = False
        if (folder / "text.json").is_file():
            lower_case = _read_lower_case(folder / "text.json")
        model, vocab = (read_file(folder / name, _FILE_BYTES, _CURE) for name in ("spm.model", "vocab.txt"))
        try:
            return cls(model, vocab, lower_case)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Write `spm.model`, `vocab.txt` and `text.json` into a folder, made if missing or behind a link."""
        folder = Path(os.path.realpath(folder))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spm.model").write_bytes(self._model)
        (folder / "vocab.txt").write_bytes(self._vocab)
        (folder / "text.json").write_text(
            json.dumps({"lower_case": self.lower_case}) + "\n", encoding="utf-8"
        )

    def with_lower_case(self, lower_case: bool) -> Tokenizer:
        """The same pieces with lower-casing on or off (Knover's 32L models lower-case what 24L do not)."""
        return Tokenizer(self._model, self._vocab, lower_case)

    @property
    def n_pieces(self) -> int:
        """Pieces of the SentencePiece model, its three special ones included."""
        return len(self._pieces)

    @property
    def vocab_size(self) -> int:
        """Rows of the word table: the pieces and [MASK]."""
        return len(self._pieces) + 1

    @property
    def mask_id(self) -> int:
        """The id of [MASK], the last row of the word table."""
        return len(self._pieces)

    pad_id = PAD_ID
    unk_id = UNK_ID
    bos_id = BOS_ID
    eos_id = EOS_ID

    @cached_property
    def sha256(self) -> str:
        """Hash of `spm.model` and `vocab.txt` (and of the lower-casing, when it is on)."""
        return hashlib.sha256(self._model + self._vocab + b"lower_case" * self.lower_case).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without special ids."""
        ids: list[int] = self._processor.encode(normalize(text, self.lower_case), out_type=int)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts: the same as `encode` for each, many times faster."""
        ids, offsets = self.encode_flat(texts)
        flat, bounds = ids.tolist(), offsets.tolist()
        return [flat[start:end] for start, end in pairwise(bounds)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts one after the other, int32; offsets): text i is `ids[offsets[i]:offsets[i + 1]]`.

        English repeats its words: the ids of a word are found once and kept. Texts with other than ASCII
        characters are encoded whole.

        Raises:
            TypeError: one text instead of a list.
        """
        if isinstance(texts, str):
            raise TypeError("encode_batch and encode_flat take a list of texts; encode takes one text")
        normalized = [self._normalize(text) for text in texts]
        if not self._splits_at_blanks:
            encoded = self._encode_bytes(normalized)
        else:
            words = [text.split() if text.isascii() else None for text in normalized]
            if len(self._word_ids) > _MOST_WORDS:
                self._word_ids.clear()
            new = list(set().union(*filter(None, words)).difference(self._word_ids))
            self._word_ids.update(zip(new, self._encode_bytes(new), strict=True))
            whole = iter(self._encode_bytes([text for text in normalized if not text.isascii()]))
            find = self._word_ids.__getitem__
            encoded = [next(whole) if found is None else b"".join(map(find, found)) for found in words]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)) // _ID_BYTES, out=offsets[1:])
        return np.frombuffer(b"".join(encoded), dtype=np.int32), offsets

    def _normalize(self, text: str) -> str:
        return normalize(text, self.lower_case)

    def _encode_bytes(self, normalized: list[str]) -> list[bytes]:
        """Ids of each text as the bytes of int32."""
        return [array("i", ids).tobytes() for ids in self._encode_whole(normalized)]

    def _encode_whole(self, normalized: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(normalized, out_type=int)
        return ids

    @cached_property
    def _splits_at_blanks(self) -> bool:
        """Whether an ASCII text's ids are those of its words, one after the other.

        So it is when merges go by rank (BPE; its scores are 0, -1, -2, ...) and no piece has a blank inside.
        The blank itself must be a piece: a run of unknown characters is one id, and ends at a known one.
        """
        normal = range(EOS_ID + 1, len(self._pieces))
        by_rank = all(self._processor.get_score(index) == EOS_ID + 1 - index for index in normal)
        inside = any(WORD_START in piece[1:] for piece in self._pieces)
        a, b = self._encode_whole(["a"])[0], self._encode_whole(["b"])[0]
        by_words = by_rank and not inside and WORD_START in self._pieces
        return by_words and self._encode_whole(["a b", " a  b "]) == [a + b, a + b]

    def pieces(self, text: str) -> list[str]:
        """The pieces `text` is split into; an unknown run of characters stands as itself."""
        found: list[str] = self._processor.encode(normalize(text, self.lower_case), out_type=str)
        return found

    def is_empty(self, text: str) -> bool:
        """Whether a text has no ids; found without cutting it into pieces."""
        return not self._processor.normalize(normalize(text, self.lower_case))

    def unread_share(self, text: str, ids: Sequence[int] | None = None) -> float:
        """Share of a text's letters and numbers that have no piece: the model cannot see them.

        Symbols and emoji are not language; they count only where there is nothing else.

        Args:
            text: the text.
            ids: its ids, if they are known already.
        """
        ids = self.encode(text) if ids is None else ids
        if UNK_ID not in ids:
            return 0.0
        whole = self._processor.normalize(normalize(text, self.lower_case)).replace(WORD_START, "")
        read = "".join(self._pieces[index] for index in ids if index != UNK_ID).replace(WORD_START, "")
        if any(map(str.isalnum, whole)):
            n_whole, n_read = (sum(map(str.isalnum, each)) for each in (whole, read))
        else:
            n_whole, n_read = len(whole), len(read)
        return (n_whole - n_read) / max(1, n_whole)

    def token(self, index: int) -> str:
        """The token of an id by its last alias: 0 is [PAD], 1 [CLS], 2 [SEP].

        Raises:
            ValueError: no such id.
        """
        if not 0 <= index <= self.mask_id:
            raise ValueError(f"token id {index} is not in 0..{self.mask_id}")
        special = {PAD_ID: "[PAD]", BOS_ID: "[CLS]", EOS_ID: "[SEP]", self.mask_id: "[MASK]"}
        return special.get(index) or self._pieces[index]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: a piece that starts with U+2581 opens a word, the others are glued to it."""
        words: list[str] = []
        for index in ids:
            token = self.token(int(index))
            if token.startswith(WORD_START):
                words.append(token[1:])
            elif words:
                words[-1] += token
            else:
                words.append(token)
        return " ".join(word for word in words if word)


def train_tokenizer(
    texts: Iterable[str],
    n_pieces: int = 8000,
    *,
    character_coverage: float = 0.9995,
    lower_case: bool = False,
) -> Tokenizer:
    """Train a BPE tokenizer; the same texts in the same order give the same bytes.

    Args:
        texts: one message each, however long; read once, never all held here.
        n_pieces: pieces of the model, three special ones included (the paper: 8,000; Chinese: 30,000). Too
            little text for this many gives fewer.
        character_coverage: share of the characters that get a piece; the rest become unknown.
        lower_case: lower-case all text, now and whenever this tokenizer is used.

    Raises:
        UserError: no text, or fewer pieces than its characters alone need (the message says how many).
        TypeError: one text instead of several.
        What reading the texts raises, Ctrl-C included.
    """
    if n_pieces < 4:
        raise UserError(f"vocab_pieces={n_pieces}: at least 4 (three are special); the paper uses 8000")
    if not 0.98 <= character_coverage <= 1.0:  # SentencePiece's own limits
        raise UserError(f"character_coverage={character_coverage}: must be in [0.98, 1.0]; 0.9995 is usual")
    if isinstance(texts, str):
        raise TypeError("train_tokenizer takes many texts, not one")
    model = io.BytesIO()
    failed: list[BaseException] = []

    def read() -> Iterator[str]:
        try:
            yield from _sentences(texts, lower_case)
        except (Exception, KeyboardInterrupt) as error:
            failed.append(error)  # SentencePiece makes a RuntimeError of whatever it is
            raise

    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=read(),
            model_writer=model,
            model_type="bpe",
            vocab_size=n_pieces,
            hard_vocab_limit=False,
            character_coverage=character_coverage,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failed:
            raise failed[0] from None
        raise UserError(_training_problem(str(error), n_pieces)) from error
    return Tokenizer(model.getvalue(), lower_case=lower_case)


def fewer_pieces(vocab_size: int, n_pieces: int) -> str | None:
    """What to say when a trained tokenizer has fewer pieces than were asked for."""
    if vocab_size - 1 >= n_pieces:
        return None
    return (
        f"the corpus gives {vocab_size - 1:,} pieces, not {n_pieces:,}: its models have "
        f"model.vocab_size={vocab_size}"
    )


def _sentences(texts: Iterable[str], lower_case: bool) -> Iterator[str]:
    """Texts as SentencePiece takes them, long ones in parts that end at blanks where they can."""
    for text in texts:
        sentence = normalize(text, lower_case).replace(_SIGN_OF_UNKNOWN, " ")
        if len(sentence) > _SENTENCE_CHARACTERS and len(sentence.encode("utf-8", "replace")) > SENTENCE_BYTES:
            yield from textwrap.wrap(sentence, _SENTENCE_CHARACTERS, break_on_hyphens=False)
        else:
            yield sentence


def _training_problem(message: str, n_pieces: int) -> str:
    """SentencePiece's failure in words that say what to change."""
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_pieces={n_pieces}: the characters of the corpus alone need {smallest[1]} pieces; use more"
            " pieces or a lower character_coverage"
        )
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on: the corpus is empty"
    return f"the tokenizer could not be trained with vocab_pieces={n_pieces}: {message}"


def _read_lower_case(path: Path) -> bool:
    cure = f'{path} must hold {{"lower_case": true|false}}: fix it or delete it'
    try:
        value = json.loads(read_file(path, 1000, cure))["lower_case"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(cure) from error
    if not isinstance(value, bool):
        raise UserError(cure)
    return value


def _vocab_difference(vocab: bytes, expected: list[tuple[str, int]]) -> str:
    """Where `vocab.txt` and the model part ways."""
    lines = vocab.decode("utf-8", errors="replace").strip("\n").split("\n")
    for number, (token, index) in enumerate(expected, start=1):
        found = lines[number - 1] if number <= len(lines) else "nothing"
        if found.rstrip("\r") != f"{token}\t{index}":
            return (
                f"vocab.txt does not match spm.model: line {number} is {found!r} instead of {token!r} TAB "
                f"{index}; take both files from the same place"
            )
    return f"vocab.txt has {len(lines)} lines, not {len(expected)}; take both files from the same place"
