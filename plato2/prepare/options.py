"""Every option of `plato2 prepare` and of a data config's `prepare:` node."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from plato2.config import UserError, check_options, did_you_mean, expand_path, option
from plato2.prepare.clean import CleanRules, Policy

Background = Literal["ignore", "context"]


@dataclass
class PrepareOptions:
    """All that decides what `prepare` writes.

    Raises:
        UserError: an impossible value; names the key.
    """

    corpus: str = option(
        help="The reader of the corpus, or the dotted name of a module with a read function."
    )
    out: str = option(help="Folder to write.")
    files: list[str] = option(factory=list, help="Paths or globs, local or remote; chitchat needs none.")
    reader: dict[str, Any] = option(
        factory=dict, help="Options of the reader, such as the column of hf_datasets."
    )
    max_dialogues: int | None = option(
        None, help="Take only this many dialogues, from the start, to try something out.", ge=1
    )
    tokenizer: str | None = option(
        None,
        help="Folder of a tokenizer to use: to continue from a model, that model's; hf:FOLDER is a "
        "pretrained decoder's; default: one is trained.",
    )
    vocab_pieces: int = option(
        8000, help="Pieces of a tokenizer to train; the paper: 8,000 for English, 30,000 for Chinese.", ge=4
    )
    character_coverage: float = option(
        0.9995, help="Share of the characters a trained tokenizer knows; 0.9995 also suits Chinese."
    )
    lower_case: bool | None = option(None, help="Lower-case all text; default: as the tokenizer does.")
    max_context: int = option(128, help="Ids of a context, special ids included.", ge=3, le=65535)
    max_response: int = option(128, help="Ids of a response, special ids included.", ge=3)
    cut_turn: bool = option(
        False,
        help="Cut a last context turn that is too long by itself (its end stays); otherwise the sample "
        "is lost.",
    )
    background: Background = option(
        "ignore",
        help="context: persona of the responding speaker, then knowledge of the response, open the context.",
    )
    policy: Policy = option(
        "split",
        help="What a turn that fails a rule leaves: a new conversation after it (split), nothing after it "
        "(subtree), or itself as context (response).",
    )
    clean: CleanRules = option(factory=CleanRules, help="The cleaning rules.")
    valid_fraction: float = option(
        0.02, help="Share of the dialogues, the latest ones, for validation; above 0 and below 1."
    )
    valid_dialogues: int | None = option(
        None, help="Number of validation dialogues, instead of a share.", ge=1
    )
    test_fraction: float = option(
        0.02,
        help="Share of the dialogues, random ones of those before validation, that are held out for test; "
        "0: none.",
    )
    test_dialogues: int | None = option(None, help="Number of test dialogues, instead of a share.", ge=1)
    without: list[str] = option(
        factory=list,
        help="Evaluation sets: training samples that have to do with their texts are removed.",
    )
    without_words: int = option(
        13, help="Words in a row that a sample may not share with an evaluation set.", ge=1
    )
    without_similarity: float = option(
        0.8,
        help="Jaccard index of runs of three words from which a sample is a near-duplicate of a text.",
        ge=0,
        le=1,
        means={0: "none is"},
    )
    seed: int = option(11, help="Seeds the order of the samples.")
    strict: bool = option(False, help="Stop at the first broken record, instead of counting it.")
    force: bool = option(False, help="Replace an existing prepared corpus.")
    shard_samples: int = option(16384, help="Samples per shard.", ge=1)

    def __post_init__(self) -> None:
        """Check the values."""
        self.out = expand_path(self.out, "out")
        for key in ("files", "without"):
            files = [getattr(self, key)] if isinstance(getattr(self, key), str) else getattr(self, key)
            setattr(self, key, [expand_path(file, key) for file in files])
        self.reader = {
            key: expand_path(value, f"reader.{key}") if isinstance(value, str) else value
            for key, value in self.reader.items()
        }
        if self.tokenizer is not None:
            self.tokenizer = expand_path(self.tokenizer, "tokenizer")
        if "://" in self.out:
            raise UserError(f"out={self.out}: prepare writes to a local folder; copy the folder afterwards")
        check_options(self)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}: must be at least 0 and below 2**63")
        if not 0 < self.valid_fraction < 1:
            raise UserError(f"valid_fraction={self.valid_fraction}: must be between 0 and 1")
        if not 0 <= self.test_fraction < 1:
            raise UserError(f"test_fraction={self.test_fraction}: must be at least 0 and below 1")

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
