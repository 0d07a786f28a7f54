"""The tokenizer of a pretrained decoder, with plato2's ids: `prepare --tokenizer hf:FOLDER`.

Word i of the decoder has the id 3 + i; 0, 1 and 2 are unknown, [CLS] and [SEP] as everywhere, and [MASK] is
the last one. The decoder's own begin, end and unknown tokens stand for them (model/pretrained.py), and a text
never yields these: `<|im_end|>` typed by a person is ordinary text. No chat template is used. White space is
collapsed, control characters are dropped, and nothing else of a text is changed.

Read are `tokenizer.json`, or files that transformers can turn into one, and which tokens are special. Saved
are `tokenizer.json` and `text.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from plato2.bounded import read_file
from plato2.config import UserError, install
from plato2.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer

FIRST_WORD = 3
"""The id of the decoder's word 0."""
_CURE = "give the folder of a Hugging Face model with tokenizer.json and tokenizer_config.json"
_FILE_BYTES = 1 << 27
"""Gemma's tokenizer of 262,144 pieces has 33 MB."""
_CONFIG_BYTES = 1 << 24


@dataclass(frozen=True)
class SpecialWords:
    """Words of the decoder that stand for plato2's special ids."""

    begin: int
    """The end token where there is no begin token."""
    end: int
    unknown: int | None
    """None where every text can be written, byte by byte if need be."""


class DecoderTokenizer(Tokenizer):
    """A fast tokenizer of Hugging Face's."""

    def __init__(self, data: bytes, special: SpecialWords, lower_case: bool = False, name: str = "") -> None:
        """Take the bytes of `tokenizer.json`; `name` is its place, for messages.

        Raises:
            UserError: it cannot be read, the special words are not in it, or `tokenizers` is not installed.
        """
        self._data, self.special, self.lower_case, self._name = data, special, lower_case, name
        self._words = _parsed(data, name)
        self._words.no_truncation()
        self._words.no_padding()
        self._words.encode_special_tokens = True  # what a person types is never a special token
        self.n_words = max(self._words.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        words = [word for word in (special.begin, special.end, special.unknown) if word is not None]
        if not all(0 <= word < self.n_words for word in words):
            raise UserError(f"{name}: its special tokens are not among its {self.n_words:,} words; {_CURE}")

    @classmethod
    def from_model(cls, folder: str | Path) -> DecoderTokenizer:
        """The tokenizer of a pretrained decoder's folder.

        Raises:
            UserError: no such folder, no tokenizer in it, or one without an end token.
        """
        folder, name = Path(folder).expanduser(), f"hf:{folder}"
        if not folder.is_dir():
            raise UserError(f"{name}: no such folder; {_CURE}")
        if (folder / "tokenizer.json").is_file():
            data = read_file(folder / "tokenizer.json", _FILE_BYTES, _CURE)
        else:
            data = _converted(folder, name)
        known = _parsed(data, name).get_vocab(with_added_tokens=True)
        return cls(data, _special_words(folder, name, known), name=name)

    @classmethod
    def read(cls, folder: Path) -> DecoderTokenizer:
        """What `save` wrote.

        Raises:
            UserError: it is damaged.
        """
        file, cure = folder / "text.json", "restore the folder, or prepare the corpus again"
        values = _json(file, cure)
        words = [values.get(name) for name in ("begin", "end", "unknown")]
        if not all(isinstance(word, int) for word in words[:2]) or not isinstance(words[2], int | None):
            raise UserError(f"{file}: does not say which tokens are special; {cure}")
        if not isinstance(lower_case := values.get("lower_case"), bool):
            raise UserError(f"{file}: lower_case must be true or false; {cure}")
        data = read_file(folder / "tokenizer.json", _FILE_BYTES, cure)
        return cls(data, SpecialWords(*words), lower_case, str(folder))  # type: ignore[arg-type]

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `text.json` into a folder, made if missing or behind a link."""
        folder = Path(os.path.realpath(folder))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes(self._data)
        (folder / "text.json").write_text(json.dumps(self._text()) + "\n", encoding="utf-8")

    def _text(self) -> dict[str, Any]:
        words = {"begin": self.special.begin, "end": self.special.end, "unknown": self.special.unknown}
        return {"lower_case": self.lower_case, **words}

    def with_lower_case(self, lower_case: bool) -> DecoderTokenizer:
        """The same words with lower-casing on or off."""
        return DecoderTokenizer(self._data, self.special, lower_case, self._name)

    @property
    def n_pieces(self) -> int:
        """Words of the decoder and the three special ids before them."""
        return FIRST_WORD + self.n_words

    @property
    def vocab_size(self) -> int:
        """Ids: the words, unknown, [CLS], [SEP] and [MASK]."""
        return self.n_pieces + 1

    @property
    def mask_id(self) -> int:
        """The id of [MASK], the last one."""
        return self.n_pieces

    @cached_property
    def sha256(self) -> str:
        """Hash of all that decides which ids a text has."""
        return hashlib.sha256(self._data + json.dumps(self._text(), sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without special ids."""
        return self._encode_whole([self._normalize(text)])[0]

    def _normalize(self, text: str) -> str:
        text = " ".join(text.split())
        if not text.isprintable():
            text = "".join(char for char in text if unicodedata.category(char) not in ("Cc", "Cs"))
        return text.lower() if self.lower_case else text

    def _encode_whole(self, normalized: list[str]) -> list[list[int]]:
        found = self._words.encode_batch_fast(normalized, add_special_tokens=False)
        unknown = self.special.unknown
        return [[UNK_ID if i == unknown else FIRST_WORD + i for i in each.ids] for each in found]

    @property
    def _splits_at_blanks(self) -> bool:
        return False

    def pieces(self, text: str) -> list[str]:
        """The pieces `text` is split into, as `tokenizer.json` writes them."""
        found: list[str] = self._words.encode(self._normalize(text), add_special_tokens=False).tokens
        return found

    def is_empty(self, text: str) -> bool:
        """Whether a text has no ids."""
        return not self._normalize(text)

    def unread_share(self, text: str, ids: Sequence[int] | None = None) -> float:
        """Share of a text's letters and numbers that have no word; see `Tokenizer`."""
        ids = self.encode(text) if ids is None else ids
        if UNK_ID not in ids:
            return 0.0
        whole = self._normalize(text).replace(" ", "")
        read = self.decode(ids).replace(" ", "")
        if any(map(str.isalnum, whole)):
            n_whole, n_read = (sum(map(str.isalnum, each)) for each in (whole, read))
        else:
            n_whole, n_read = len(whole), len(read)
        return max(0, n_whole - n_read) / max(1, n_whole)

    def token(self, index: int) -> str:
        """The token of an id: 0 is [PAD], 1 [CLS], 2 [SEP].

        Raises:
            ValueError: no such id.
        """
        if not 0 <= index <= self.mask_id:
            raise ValueError(f"token id {index} is not in 0..{self.mask_id}")
        special = {PAD_ID: "[PAD]", BOS_ID: "[CLS]", EOS_ID: "[SEP]", self.mask_id: "[MASK]"}
        return special.get(index) or self._words.id_to_token(index - FIRST_WORD) or f"[{index}]"

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special ids have none."""
        words = [int(i) - FIRST_WORD for i in ids if FIRST_WORD <= i < self.mask_id]
        text: str = self._words.decode(words, skip_special_tokens=True)
        return " ".join(text.split())


def _parsed(data: bytes, name: str) -> Any:
    """A `tokenizers.Tokenizer`.

    Raises:
        UserError: it cannot be read, or `tokenizers` is not installed.
    """
    tokenizers = _imported("tokenizers")
    try:
        return tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises bare exceptions
        raise UserError(f"{name}: not a readable tokenizer.json ({_line(error)}); {_CURE}") from None


def _special_words(folder: Path, name: str, known: dict[str, int]) -> SpecialWords:
    """What tokenizer_config.json, special_tokens_map.json or else config.json says.

    Raises:
        UserError: none of them names an end token.
    """
    files = [
        _json(folder / file, _CURE) if (folder / file).is_file() else {}
        for file in ("tokenizer_config.json", "special_tokens_map.json", "config.json")
    ]

    def word(kind: str) -> int | None:
        for values in files[:2]:
            token = values.get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in known:
                return known[token]
        found = files[2].get(f"{kind}_token_id")
        return found if isinstance(found, int) else None

    end, begin, unknown = word("eos"), word("bos"), word("unk")
    if end is None:
        raise UserError(
            f"{name}: its tokenizer has no end token, so a response could not end; name one as eos_token in "
            "tokenizer_config.json"
        )
    begin = end if begin is None else begin
    return SpecialWords(begin, end, None if unknown in (begin, end) else unknown)


def _converted(folder: Path, name: str) -> bytes:
    """tokenizer.json of a folder that has only the files of a slow tokenizer, such as vocab.json, merges.txt.

    Raises:
        UserError: there are none, or transformers is not installed.
    """
    transformers = _imported("transformers")
    try:
        found = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        return str(found.backend_tokenizer.to_str()).encode()
    except Exception as error:  # many kinds
        raise UserError(f"{name}: has no tokenizer that can be read ({_line(error)}); {_CURE}") from None


def _imported(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError:
        raise UserError(f"the tokenizer of a decoder needs {package}: {install('huggingface')}") from None


def _json(file: Path, cure: str) -> dict[str, Any]:
    try:
        found = json.loads(read_file(file, _CONFIG_BYTES, cure))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({_line(error)}); {cure}") from None
    return found if isinstance(found, dict) else {}


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
