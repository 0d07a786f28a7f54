"""A corpus to shards: read, clean, encode, split, shuffle, write, describe.

Two passes over the corpus, and one more when a tokenizer is trained:

1. count: dialogues, their times, how often each message occurs (8 bytes per message);
2. encode the turns, apply the rules, cut the dialogues into (context, response) samples and shuffle them.

Text is never held: memory is some bytes for each message and sample, and one bucket of samples. Everything is
written to a hidden sibling of the target, which takes its name at the very end: a killed run leaves nothing
half-done.
The same corpus, options and seed give the same bytes in every shard.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from math import exp
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from plato2 import __version__
from plato2.config import UserError
from plato2.data.samples import Dialogue, encode_context, encode_response
from plato2.data.shards import (
    FORMAT,
    INDEX_FILE,
    ShardIndex,
    ShardWriter,
    SplitIndex,
    read_index,
    write_index,
)
from plato2.data.tokenizer import SENTENCE_BYTES, UNK_ID, Tokenizer, fewer_pieces, train_tokenizer
from plato2.files import new_folder
from plato2.prepare.card import CARD_FILES, CardFacts, losses, removals, write_card
from plato2.prepare.clean import Cleaner, conversations
from plato2.prepare.corpora import ReadReport, read_corpus
from plato2.prepare.options import PrepareOptions
from plato2.prepare.shuffle import DiskShuffle
from plato2.prepare.splits import n_repeated, sample_keys
from plato2.prepare.statistics import SplitStatistics, unigram_nll
from plato2.prepare.survey import Survey
from plato2.prepare.without import EvaluationTexts, Removed, WithoutOptions, check_sets

__all__ = ["PrepareOptions", "prepare", "summary"]

T = TypeVar("T")
TOKENIZER_MESSAGES = 1_000_000
"""Messages a tokenizer is trained on at most, evenly spread over the corpus: SentencePiece holds them all."""
_ENCODE_TURNS = 4096
SPLITS = ("train", "valid", "test")
_MOST_UNREAD = 0.05
"""Share of unknown tokens that is not warned about: emoji, rare characters."""


def prepare(options: PrepareOptions, *, show_progress: bool = True) -> Path:
    """Turn a corpus into a folder of shards with index, tokenizer and data card.

    Returns:
        The folder, `options.out`.

    Raises:
        UserError: anything the user can fix; the target folder is then as it was before.
    """
    out = Path(options.out)
    check_target(out, options.force)
    read_corpus(options.corpus, options.files, ReadReport(), options.reader)  # a wrong name fails at once
    check_sets(options.without, options.without_similarity)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(
        *columns, TimeElapsedColumn(), console=Console(stderr=True), disable=not show_progress
    )
    try:
        with progress, new_folder(out) as folder:
            _prepare(options, folder, progress)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    return out


def summary(folder: Path) -> list[str]:
    """What came of it, in lines for a person: samples, all that was dropped and why, the data card."""
    index = read_index(folder)
    facts, samples = index.extra["facts"], {name: split.samples for name, split in index.splits.items()}
    n_pairs, n_samples = facts["counts"]["pairs"], sum(samples.values())
    lines = [
        f"{folder}: {samples['train']:,} samples to train on, {samples['valid']:,} for validation and "
        f"{samples.get('test', 0):,} for test, {n_samples / n_pairs:.1%} of {n_pairs:,} pairs; unigram "
        f"perplexity {index.unigram['ppl']:.1f}"
    ]
    if "test" not in samples and index.prepare.get("test_fraction"):
        lines.append(
            "no dialogue is held out for test: the corpus is small; --test-dialogues sets a number (in a run "
            "data.prepare.test_dialogues)"
        )
    for split, n in facts.get("repeated", {}).items():  # corpora prepared before have none
        if n:
            lines.append(
                f"{n:,} of the {samples[split]:,} {split} samples are word for word in train as well"
            )
    if index.prepare.get("without"):
        lines.append(f"removed from training for the evaluation sets: {removals(facts['removed'])}")
    if dropped := losses(facts["counts"], facts["rules"]):
        lines.append(f"left out of the pairs: {dropped}")
    if n_broken := facts["counts"]["broken"]:
        n_records = n_broken + facts["counts"]["dialogues"]
        most = "warning: most records are lost: " if 2 * n_broken > n_records else ""
        lines.append(f"{most}{n_broken:,} of {n_records:,} could not be read; the first of them:")
        lines += [f"  {example}" for example in facts["broken_examples"]]
    lines += [f"{n:,} records were left out: {reason}" for reason, n in facts["skipped"].items()]
    lines += facts.get("notes", [])  # corpora prepared before have none
    if index.prepare["tokenizer"] is None:
        lines += filter(None, [fewer_pieces(index.vocab_size, index.prepare["vocab_pieces"])])
    if (unread := facts["unread_share"]) > _MOST_UNREAD:
        lines.append(
            f"warning: {unread:.0%} of the tokens of the responses are unknown to the tokenizer: the model "
            "will learn to say nothing there; use one that was trained on this language"
        )
    return [*lines, f"the data card: {folder / 'card.md'}"]


def _prepare(options: PrepareOptions, folder: Path, progress: Progress) -> None:
    given = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    survey = _survey(options, progress)
    chosen = survey.choose_splits(options)
    tokenizer = _tokenizer(options, given, survey, chosen["valid"], progress)
    tokenizer.save(folder / "tokenizer")
    repeated = survey.messages.above(options.clean.max_repeats) if options.clean.max_repeats else frozenset()
    cleaner = Cleaner(options.clean, repeated)
    writer = _SampleWriter(options, folder, tokenizer, survey, chosen)
    split_of = np.select([chosen[split] for split in SPLITS], np.arange(len(SPLITS)))
    with ExitStack() as stack:
        for shuffle in writer.shuffles.values():
            stack.enter_context(shuffle)
        dialogues = _read(options, progress, "encoding", survey.n_dialogues)
        for numbered in _encoded(dialogues, tokenizer, options.background == "context"):
            _cut(numbered, cleaner, options, writer, SPLITS[split_of[numbered.number]])
        splits = {split: writer.finish(split, progress) for split in SPLITS}
    if not splits["test"].samples and options.test_dialogues is None:
        splits.pop("test")
    if options.without:
        writer.counts["pairs_of_evaluation_sets"] = writer.removed.total("train")
    _check_not_empty(splits, survey, writer.counts, cleaner.hits)
    statistics = {split: writer.statistics[split] for split in splits}
    targets = statistics["train"].targets
    nll = unigram_nll(targets, statistics["valid"].targets)
    facts = CardFacts(
        counts=survey.counts() | {key: int(n) for key, n in writer.counts.items()},
        removed=writer.removed.rows(),
        removed_examples=writer.removed.examples,
        rules=dict(cleaner.hits),
        n_messages_judged=cleaner.n_messages,
        n_messages_failing=cleaner.n_failing,
        broken_examples=survey.report.examples,
        skipped=dict(survey.report.skipped),
        notes=survey.report.notes,
        dates=survey.dates(),
        split_by="time" if survey.has_times() else "order in the corpus",
        unread_share=float(targets[UNK_ID] / targets.sum()),
        repeated=writer.repeated(splits),
    )
    index = ShardIndex(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        max_context=options.max_context,
        max_response=options.max_response,
        splits=splits,
        unigram={"nll": nll, "ppl": exp(nll)},
        prepare=options.plain(),
        source={
            "corpus": options.corpus,
            "files": list(options.files),
            "prepared": datetime.now(UTC).isoformat(timespec="seconds"),
            "plato2": __version__,
            **facts.dates,
        },
        extra={"facts": dataclasses.asdict(facts)},
    )
    write_card(folder, index, facts, statistics)
    write_index(folder, index)


# -- pass 1 ---------------------------------------------------------------------------------------------


def _survey(options: PrepareOptions, progress: Progress) -> Survey:
    survey = Survey(options.strict)
    for dialogue in _read(options, progress, "reading", None, survey.report):
        survey.add(dialogue)
    if not survey.n_dialogues:
        where = f" in {', '.join(options.files)}" if options.files else ""
        dropped = f"; {survey.report.sentence()}" if survey.report.sentence() else ""
        raise UserError(f"the corpus {options.corpus} is empty: no dialogue{where}{dropped}")
    if not survey.n_pairs:
        n_joined = survey.n_joined
        joined = f"; {n_joined:,} turn(s) joined to the one before, of the same speaker" if n_joined else ""
        dropped = f"; {survey.report.sentence()}" if survey.report.sentence() else ""
        raise UserError(
            f"the corpus {options.corpus} has no dialogue with two or more turns to learn from "
            f"({survey.n_dialogues:,} dialogue(s) read{joined}){dropped}"
        )
    return survey


def _read(
    options: PrepareOptions,
    progress: Progress,
    verb: str,
    total: int | None,
    report: ReadReport | None = None,
) -> Iterator[Dialogue]:
    dialogues = read_corpus(options.corpus, options.files, report or ReadReport(), options.reader)
    return _track(progress, islice(dialogues, options.max_dialogues), f"{verb} {options.corpus}", total)


def _track(progress: Progress, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and move a progress bar; its total is known at the end at the latest."""
    task = progress.add_task(description, total=total)
    n = 0
    for n, item in enumerate(items, start=1):
        yield item
        if n % 64 == 0:
            progress.update(task, completed=n)
    progress.update(task, completed=n, total=n)


def _tokenizer(
    options: PrepareOptions,
    given: Tokenizer | None,
    survey: Survey,
    is_valid: np.ndarray,
    progress: Progress,
) -> Tokenizer:
    """The given tokenizer, or one trained on the training dialogues."""
    if given is not None:
        return given if options.lower_case is None else given.with_lower_case(options.lower_case)
    every = -(-len(survey.messages) // TOKENIZER_MESSAGES)
    dialogues = _read(options, progress, f"training {options.vocab_pieces} pieces on", survey.n_dialogues)
    texts = (turn.text for i, dialogue in enumerate(dialogues) if not is_valid[i] for turn in dialogue.turns)
    few_are_long = survey.n_long < len(survey.messages) / 2
    if options.clean.max_chars is not None and few_are_long:  # they weigh much, and rule 2 removes them
        longest = max(options.clean.max_chars, SENTENCE_BYTES)
        texts = (text for text in texts if len(text) <= longest)
    return train_tokenizer(
        islice(texts, 0, None, every),
        options.vocab_pieces,
        character_coverage=options.character_coverage,
        lower_case=bool(options.lower_case),
    )


# -- pass 2 ---------------------------------------------------------------------------------------------


@dataclass
class _Encoded:
    """A dialogue and the ids of its texts."""

    number: int
    dialogue: Dialogue
    turn_ids: list[list[int]]
    background_ids: dict[str, list[int]]
    """Ids of persona and knowledge, by text."""


def _encoded(dialogues: Iterator[Dialogue], tokenizer: Tokenizer, background: bool) -> Iterator[_Encoded]:
    """Encode some thousand turns at a time: much faster than one by one."""
    waiting: list[tuple[int, Dialogue, list[str]]] = []
    n_texts = 0
    for number, dialogue in enumerate(dialogues):
        extra = _background_texts(dialogue) if background else []
        waiting.append((number, dialogue, extra))
        n_texts += len(dialogue.turns) + len(extra)
        if n_texts >= _ENCODE_TURNS:
            yield from _encode(waiting, tokenizer)
            waiting, n_texts = [], 0
    yield from _encode(waiting, tokenizer)


def _encode(waiting: list[tuple[int, Dialogue, list[str]]], tokenizer: Tokenizer) -> Iterator[_Encoded]:
    texts = [text for _, dialogue, extra in waiting for text in [*(t.text for t in dialogue.turns), *extra]]
    ids = iter(tokenizer.encode_batch(texts))
    for number, dialogue, extra in waiting:
        turn_ids = list(islice(ids, len(dialogue.turns)))
        yield _Encoded(number, dialogue, turn_ids, dict(zip(extra, islice(ids, len(extra)), strict=True)))


def _background_texts(dialogue: Dialogue) -> list[str]:
    texts = [text for sentences in dialogue.persona.values() for text in sentences]
    return [*texts, *(text for turn in dialogue.turns for text in turn.knowledge)]


def _cut(
    encoded: _Encoded, cleaner: Cleaner, options: PrepareOptions, writer: _SampleWriter, split: str
) -> None:
    """Cut one dialogue into samples and hand them to the writer."""
    samples: list[tuple[list[int], list[int]]] = []
    is_cut: list[bool] = []
    turns, turn_ids = encoded.dialogue.turns, encoded.turn_ids
    first_response = max(1, encoded.dialogue.first_response)
    passing = cleaner.check([turn.text for turn in turns], [len(ids) for ids in turn_ids])
    writer.counts["pairs_failing_response"] += passing[first_response:].count(False)
    for part in conversations(passing, options.policy):
        for i in part[1:]:
            if i < first_response or not passing[i]:
                continue
            background = _background(encoded, i) if encoded.background_ids else []
            oldest = max(part.start, i - options.max_context)  # every turn takes at least one id
            turns_before = [*background, *turn_ids[oldest:i]]
            context = encode_context(turns_before, options.max_context, cut_turn=options.cut_turn)
            if context is None:
                writer.counts["pairs_long_context_turn"] += 1
                continue
            samples.append((context, encode_response(turn_ids[i], options.max_response)))
            is_cut.append(len(turn_ids[i]) + 2 > options.max_response)
    writer.add(split, samples, is_cut)


def _background(encoded: _Encoded, i: int) -> list[list[int]]:
    """Ids of the persona of whoever speaks turn `i` and of that turn's knowledge."""
    turn, persona = encoded.dialogue.turns[i], encoded.dialogue.persona
    texts = [*persona.get(None, [])]
    if turn.speaker is not None:
        texts += persona.get(turn.speaker, [])
    return [encoded.background_ids[text] for text in [*texts, *turn.knowledge]]


class _SampleWriter:
    """Shuffles the samples of all splits on disk and writes them as shards."""

    def __init__(
        self,
        options: PrepareOptions,
        folder: Path,
        tokenizer: Tokenizer,
        survey: Survey,
        chosen: dict[str, np.ndarray],
    ) -> None:
        self._options, self._folder, self._vocab_size = options, folder, tokenizer.vocab_size
        size = (options.max_context, options.max_response, tokenizer.vocab_size)
        self.statistics = {split: SplitStatistics(*size) for split in SPLITS}
        self.counts: Counter[str] = Counter()
        without = WithoutOptions(tuple(options.without), options.without_words, options.without_similarity)
        self._texts = EvaluationTexts(without, tokenizer) if options.without else None
        self.removed = Removed(options.without)
        self._tokenizer = tokenizer
        self.keys: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        """Of the samples written, to count those of one split that are in another."""

        n_usable = len(survey.usable())
        n_expected = {split: round(survey.n_pairs * int(chosen[split].sum()) / n_usable) for split in SPLITS}
        n_expected["train"] = survey.n_pairs
        self.shuffles = {
            split: DiskShuffle(folder / f"{split}.buckets", n, options.shard_samples, [options.seed, number])
            for number, (split, n) in enumerate(n_expected.items())
        }

    def add(self, split: str, samples: list[tuple[list[int], list[int]]], is_cut: list[bool]) -> None:
        """Take the samples of a dialogue, but from training those of evaluation sets."""
        records = [[*context, *response] for context, response in samples]
        found = self._texts.matches(records) if self._texts else [None] * len(records)
        for (context, response), record, cut, match in zip(samples, records, is_cut, found, strict=True):
            if match is not None:
                self.removed.add(split, match, self._tokenizer.decode(response[1:-1]))
                if split == "train":
                    continue
            self.counts[f"{split}_samples"] += 1
            self.counts["samples_response_cut"] += cut
            self.shuffles[split].add(record, len(context))

    def finish(self, split: str, progress: Progress) -> SplitIndex:
        """Write the shards of a split."""
        writer = ShardWriter(self._folder, split, self._vocab_size, self._options.shard_samples)
        buckets = self.shuffles[split].buckets()
        for records, context_len in _track(progress, buckets, f"writing {split} shards"):
            if records:
                lengths = [len(record) for record in records]
                offsets = np.concatenate([[0], np.cumsum(lengths)])
                arrays = (np.concatenate(records), offsets, np.array(context_len))
                self.statistics[split].add(*arrays)
                self.keys[split].append(sample_keys(*arrays))
            writer.write(records, context_len)
        return SplitIndex(tuple(writer.close()))

    def repeated(self, splits: Iterable[str]) -> dict[str, int]:
        """By split: samples that are, word for word, in the training split as well."""
        train = np.concatenate(self.keys["train"])
        others = (split for split in splits if split != "train")
        return {split: n_repeated(np.concatenate(self.keys[split]), train) for split in others}


# -- checks ---------------------------------------------------------------------------------------------


def check_target(out: Path, force: bool) -> None:
    """Refuse to touch a folder that is not ours, or is and was not meant to be replaced.

    Raises:
        UserError: it is; the message says what to do.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        is_ours = json.loads((out / INDEX_FILE).read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        is_ours = False
    if not is_ours:
        raise UserError(f"out={out} exists and is not a prepared corpus: name another folder")
    if not force:
        raise UserError(
            f"out={out} is already a prepared corpus: use it, name another, or replace it with force=true"
        )
    ours = {INDEX_FILE, "tokenizer", *CARD_FILES}
    foreign = sorted(
        path.name
        for path in out.iterdir()
        if path.name not in ours and path.suffix not in (".parquet", ".png")
    )
    if foreign:
        raise UserError(
            f"out={out} also holds {', '.join(foreign)}, which is not replaced: move it away first"
        )


def _check_not_empty(
    splits: dict[str, SplitIndex], survey: Survey, counts: Counter[str], rules: Counter[str]
) -> None:
    for split, index in splits.items():
        if not index.samples:
            read = f"; {survey.report.sentence()}" if survey.report.sentence() else ""
            raise UserError(
                f"no sample is left for {split}: of {survey.n_pairs:,} pairs of context and response: "
                f"{losses(survey.counts() | counts, rules) or 'too few'}{read}; switch rules off "
                "(--rule NAME=off), or change policy, valid_fraction or valid_dialogues, test_fraction or "
                "test_dialogues"
            )
