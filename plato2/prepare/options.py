"""Every option of `plato2 prepare` and of a data config's `prepare:` node."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from plato2.config import UserError, did_you_mean, expand_path
from plato2.prepare.clean import POLICIES, CleanRules, Policy

Background = Literal["ignore", "context"]


@dataclass
class PrepareOptions:
    """All that decides what `prepare` writes.

    Raises:
        UserError: a value that cannot be; names the key.
    """

    corpus: str
    """A reader of `plato2.prepare.corpora`, or the dotted name of a module with a `read` function."""
    out: str
    """The folder to write."""
    files: list[str] = field(default_factory=list)
    """Paths or globs, local or remote; none for a corpus that comes from a package."""
    reader: dict[str, Any] = field(default_factory=dict)
    """Options of the reader, such as `column` of hf_datasets."""
    max_dialogues: int | None = None
    """Take only the first so many dialogues, to try something out; None: all."""
    tokenizer: str | None = None
    """Folder of a tokenizer to use; None trains one on the training dialogues."""
    vocab_pieces: int = 8000
    """Pieces of a tokenizer to train."""
    character_coverage: float = 0.9995
    """Share of the characters a trained tokenizer knows; 0.9995 also suits Chinese."""
    lower_case: bool | None = None
    """Lower-case all text; None: as the given tokenizer does, else no."""
    max_context: int = 128
    """Ids of a context, special ids included."""
    max_response: int = 128
    """Ids of a response, special ids included."""
    cut_turn: bool = False
    """Cut a last context turn that alone is too long (its end stays) instead of losing the sample."""
    background: Background = "ignore"
    """`context`: persona of the responding speaker, then knowledge of the response, open the context."""
    policy: Policy = "split"
    """What a failing turn does to its dialogue: split, subtree or response."""
    clean: CleanRules = field(default_factory=CleanRules)
    """The cleaning rules."""
    valid_fraction: float = 0.02
    """The latest share of the dialogues is for validation."""
    valid_dialogues: int | None = None
    """The number of validation dialogues, instead of a share."""
    seed: int = 11
    """Seeds the order of the samples."""
    strict: bool = False
    """Stop at the first broken record instead of counting it."""
    force: bool = False
    """Replace an existing prepared corpus."""
    shard_samples: int = 16384
    """Samples in a shard."""

    def __post_init__(self) -> None:
        """Check the values."""
        self.out = expand_path(self.out, "out")
        files = [self.files] if isinstance(self.files, str) else self.files
        self.files = [expand_path(file, "files") for file in files]
        self.reader = {
            key: expand_path(value, f"reader.{key}") if isinstance(value, str) else value
            for key, value in self.reader.items()
        }
        if self.tokenizer is not None:
            self.tokenizer = expand_path(self.tokenizer, "tokenizer")
        if "://" in self.out:
            raise UserError(f"out={self.out}: prepare writes to a local folder; copy the folder afterwards")
        if self.policy not in POLICIES:
            raise UserError(f"policy={self.policy!r}: must be one of {', '.join(POLICIES)}")
        if self.background not in get_args(Background):
            raise UserError(f"background={self.background!r}: must be ignore or context")
        at_least = {"max_context": 3, "max_response": 3, "shard_samples": 1, "vocab_pieces": 4}
        for key, least in at_least.items():
            if getattr(self, key) < least:
                raise UserError(f"{key}={getattr(self, key)}: must be at least {least}")
        if self.max_context > 65535:
            raise UserError(f"max_context={self.max_context}: must be at most 65535")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}: must be at least 0 and below 2**63")
        if not 0 < self.valid_fraction < 1:
            raise UserError(f"valid_fraction={self.valid_fraction}: must be between 0 and 1")
        for key in ("valid_dialogues", "max_dialogues"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}={value}: must be at least 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrepareOptions:
        """Options from plain values (a `prepare:` node of a config file); `clean` may be a dict, too.

        Raises:
            UserError: an unknown or missing key, named.
        """
        values = dict(values)
        clean = values.pop("clean", None)
        if isinstance(clean, Mapping):
            values["clean"] = CleanRules(**_known_keys(CleanRules, clean, "data.prepare.clean."))
        elif clean is not None:
            values["clean"] = clean
        values = _known_keys(cls, values, "data.prepare.")
        for key in ("corpus", "out"):
            if key not in values:
                raise UserError(f"data.prepare.{key} is missing")
        return cls(**values)

    def plain(self) -> dict[str, Any]:
        """The options that shape the samples, as plain values for the index."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if key not in ("out", "force", "strict")}


def _known_keys(kind: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    known = [item.name for item in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise UserError(f"{prefix}{key} is not an option; {did_you_mean(key, known)}")
    return dict(values)
