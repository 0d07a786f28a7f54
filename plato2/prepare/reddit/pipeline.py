"""Reddit dumps to a prepared corpus, stage by stage.

    tokenizer       on a sample of the messages, unless one is given
    1. nodes        every message that passes rules 1-5 and 8-10 (nodes.py); submissions first, when there are
                    any, because they say which forums are quarantined
    2. repeated     the messages of rule 7
    3. shards       the samples of the threads (threads.py); those before `valid_from` are for training, but
                    for communities held out for test
    4. the rest     validation and test samples with the lowest keys, index, data card

Stages 1 to 3 leave their parts in the work folder, so the same command resumes after any interruption.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from math import exp
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from plato2 import __version__
from plato2.config import UserError
from plato2.data.shards import (
    Samples,
    ShardIndex,
    ShardInfo,
    SplitIndex,
    write_index,
    write_shard,
)
from plato2.data.tokenizer import Tokenizer, train_tokenizer
from plato2.files import new_folder
from plato2.prepare.clean import message_key
from plato2.prepare.dialogues import check_target
from plato2.prepare.reddit.card import FunnelFacts, write_card
from plato2.prepare.reddit.dumps import Dump, DumpReader, find_dumps
from plato2.prepare.reddit.node_parts import (
    Advance,
    NodeJob,
    SampledText,
    SampleJob,
    lowest,
    read_reports,
)
from plato2.prepare.reddit.nodes import Counts, node_schema, parse_lines
from plato2.prepare.reddit.options import RedditOptions
from plato2.prepare.reddit.rules import RedditRules, lists_sha256
from plato2.prepare.reddit.shard_parts import ShardJob, ShardPart, read_part, samples_digest
from plato2.prepare.reddit.threads import ORPHANS, TreeOptions
from plato2.prepare.reddit.work import clear_errors, open_work, part_metadata, stage_folder, write_text
from plato2.prepare.splits import held_out, sample_keys
from plato2.prepare.statistics import SplitStatistics, unigram_nll
from plato2.prepare.without import Removed, WithoutOptions, check_sets, evaluation_texts

_COMMAND = "plato2 prepare reddit"
_VALID_SHARES = (0.02, 0.05, 0.1, 0.25, 0.5)
"""Share of the comments, the latest, that are left for validation when `valid_from` is not given: the first
share that has a sample. In all but tiny corpora that is 2 %."""


class Engine(Protocol):
    """Where the stages run and how the nodes of a shard come together."""

    name: str
    settings: dict[str, Any]
    versions: dict[str, str]

    def sample(self, job: SampleJob, dumps: list[Dump], advance: Advance) -> Iterator[list[SampledText]]:
        """The sampled messages of every dump, in any order."""

    def make_nodes(self, job: NodeJob, dumps: list[Dump], advance: Advance) -> None:
        """Stage 1: write the parts of these dumps that are not there yet."""

    def find_repeated(self, parts: list[Path], max_repeats: int, out: Path) -> None:
        """Stage 2: write the `text_key`s of messages that occur more often to one part."""

    def build_shards(
        self,
        job: ShardJob,
        parts: list[Path],
        repeated: Path | None,
        n_shards: int,
        missing: list[int],
        advance: Advance,
    ) -> None:
        """Stage 3: write the samples of the shards in `missing` (rising numbers)."""


def prepare_reddit(options: RedditOptions, *, show_progress: bool = True) -> Path:
    """Turn Reddit dumps into a folder of shards with index, tokenizer and data card.

    Returns:
        The folder, `options.out`.

    Raises:
        UserError: anything the user can fix; finished parts stay in the work folder.
    """
    out = Path(options.out)
    check_target(out, options.force)
    check_sets(options.without, options.without_similarity)
    comments = find_dumps(options.comments, "comments")
    submissions = find_dumps(options.submissions, "submissions") if options.submissions else []
    given = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    beside = Path(os.path.realpath(out))  # a link is followed to its disk
    work_folder = Path(options.work) if options.work else beside.with_name(f"{beside.name}.work")
    with (
        open_work(work_folder.absolute(), _COMMAND) as work,
        _engine(options, work) as engine,
        _Bars(show_progress) as bars,
    ):
        _Run(options, work, engine, bars, comments, submissions).make(given, out)
    if not options.keep_work:
        shutil.rmtree(work_folder, ignore_errors=True)
    return out


@contextmanager
def _engine(options: RedditOptions, work: Path) -> Iterator[Engine]:
    """The engine, until the end of the run."""
    if options.engine == "spark":
        from plato2.prepare.reddit.spark import SparkEngine

        with SparkEngine(work, options.spark_master, options.spark_conf, options.workers) as engine:
            yield engine
    else:
        from plato2.prepare.reddit.local import LocalEngine

        yield LocalEngine(work, options.workers, options.memory)


class _Bars(Progress):
    """One progress bar per stage, on stderr."""

    def __init__(self, show: bool) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        super().__init__(*columns, *times, console=Console(stderr=True), disable=not show)

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Advance]:
        """A bar that is full when the block ends."""
        task = self.add_task(description, total=max(1, total))
        yield lambda n: self.update(task, advance=n)
        self.update(task, completed=max(1, total))


@dataclass
class _Run:
    """One run: what all stages share."""

    options: RedditOptions
    work: Path
    engine: Engine
    bars: _Bars
    comments: list[Dump]
    submissions: list[Dump]

    def make(self, given: Tokenizer | None, out: Path) -> None:
        """All stages."""
        options = self.options
        tokenizer = self.tokenizer(given)
        titles = self.nodes(tokenizer, self.submissions, frozenset()) if self.submissions else None
        flagged = frozenset(titles.counts.quarantined) if titles else frozenset()
        nodes = self.nodes(tokenizer, self.comments, flagged)
        if not nodes.counts.total("kept"):
            raise UserError(_nothing_left(options, nodes))
        parts = [*(titles.parts if titles else []), *nodes.parts]
        n_nodes = nodes.counts.total("kept") + (titles.counts.total("kept") if titles else 0)
        hashes = [nodes.folder.name, *sorted(dump.key for dump in [*self.submissions, *self.comments])]
        repeated = self.repeated(parts, hashes)
        communities = _held_out(nodes.counts, options.test_fraction)
        starts = [options.valid_time] if options.valid_time else _last_hours(nodes.counts.hours)
        for valid_from in starts:
            folder, shards = self.shards(tokenizer, parts, repeated, n_nodes, valid_from, communities, hashes)
            if any(part.n_candidates for part in shards):
                break
        with clear_errors(out, "--out", _COMMAND), new_folder(out) as target:
            self.finish(target, tokenizer, titles, nodes, repeated, folder, shards, valid_from, communities)

    # -- the tokenizer ------------------------------------------------------------------------------------

    def tokenizer(self, given: Tokenizer | None) -> Path:
        """A folder of this run with the tokenizer: the given one, or one trained on a sample."""
        options = self.options
        if given is not None:
            folder = stage_folder(self.work, "tokenizer", given.sha256)
            given.save(folder)
            return folder
        pieces = options.pieces
        job = SampleJob(_alone(options.rules), options.tokenizer_messages, options.on_broken)
        settings = [pieces, options.character_coverage, options.lower_case, _plain(job), _keys(self.comments)]
        settings.append(lists_sha256(job.rules))
        folder = stage_folder(self.work, "tokenizer", settings)
        done = folder / "done.json"
        if done.exists():
            return folder
        texts: list[SampledText] = []
        with self.bars.bar("sampling messages for a tokenizer", _bytes(self.comments)) as advance:
            for sample in self.engine.sample(job, self.comments, advance):
                texts = lowest(texts + sample, job.n_messages)[1]
        if not texts:
            raise UserError(_no_text(options, self.comments))
        texts.sort()
        with self.bars.bar(f"training {pieces:,} pieces on {len(texts):,} messages", 1):
            train_tokenizer(
                (text for _, text in texts),
                pieces,
                character_coverage=options.character_coverage,
                lower_case=options.lower_case,
            ).save(folder)
        write_text(done, json.dumps({"messages": len(texts)}))
        return folder

    # -- stage 1 ------------------------------------------------------------------------------------------

    def nodes(self, tokenizer: Path, dumps: list[Dump], flagged: frozenset[str]) -> _Nodes:
        """The nodes of the dumps."""
        options = self.options
        rules = _alone(options.rules)
        identity = [_plain(rules), lists_sha256(rules), Tokenizer.load(tokenizer).sha256, sorted(flagged)]
        identity.append(node_schema(Tokenizer.load(tokenizer).vocab_size).names)
        folder = stage_folder(self.work, "nodes", [*identity, options.on_broken])
        job = NodeJob(str(folder), str(tokenizer), rules, flagged, options.on_broken)
        with self.bars.bar(f"cleaning {dumps[0].kind}", _bytes(dumps)) as advance:
            unfinished = [dump for dump in dumps if not job.is_finished(dump)]
            advance(_bytes(dumps) - _bytes(unfinished))
            self.engine.make_nodes(job, unfinished, advance)
        return _Nodes(folder, *read_reports(job, dumps))

    # -- stage 2 ------------------------------------------------------------------------------------------

    def repeated(self, parts: list[Path], hashes: list[str]) -> Path | None:
        """A part with the messages of rule 7; None: the rule is off."""
        most = self.options.rules.max_repeats
        if most is None:
            return None
        path = stage_folder(self.work, "repeated", [*hashes, most]) / "repeated.parquet"
        if not path.exists():
            with self.bars.bar("counting repeated messages", 1):
                self.engine.find_repeated(parts, most, path)
        return path

    # -- stage 3 ------------------------------------------------------------------------------------------

    def shards(
        self,
        tokenizer: Path,
        parts: list[Path],
        repeated: Path | None,
        n_nodes: int,
        valid_from: int,
        communities: list[str],
        hashes: list[str],
    ) -> tuple[Path, list[ShardPart]]:
        """(folder of the samples, what is known of each shard)."""
        options = self.options
        without = self.without()
        n_shards = -(-n_nodes // options.shard_nodes)
        trees = TreeOptions(
            max_overlap=options.rules.max_overlap,
            orphans=options.orphans,
            max_context=options.max_context,
            max_response=options.max_response,
            cut_turn=options.cut_turn,
        )
        identity = [
            *hashes,
            options.rules.max_repeats,
            _plain(trees),
            n_shards,
            valid_from,
            options.valid_samples,
            options.test_time,
            options.test_samples,
            communities,
            without.identity() if without else None,
        ]
        folder = stage_folder(self.work, "shards", identity)
        vocab_size = Tokenizer.load(tokenizer).vocab_size
        job = ShardJob(
            str(folder),
            trees,
            vocab_size,
            valid_from,
            options.valid_samples,
            options.test_time,
            options.test_samples,
            tuple(_keys_of(communities).view(np.int64).tolist()),
            str(tokenizer),
            without,
        )
        missing = [number for number in range(n_shards) if not (folder / f"{number:05d}.json").exists()]
        with self.bars.bar("building samples", n_nodes) as advance:
            advance(round(n_nodes * (1 - len(missing) / n_shards)))
            if missing:
                self.engine.build_shards(job, parts, repeated, n_shards, missing, advance)
        return folder, [read_part(folder / f"{number:05d}.json") for number in range(n_shards)]

    def without(self) -> WithoutOptions | None:
        """The evaluation sets, copied to where every worker sees them."""
        options = self.options
        if not options.without:
            return None
        limits = (options.without_words, options.without_similarity, tuple(options.without))
        try:
            identity = WithoutOptions(tuple(options.without), *limits).identity()
            folder = stage_folder(self.work, "without", identity)
            files = [
                folder / f"{number:03d}-{Path(file).name}" for number, file in enumerate(options.without)
            ]
            for source, copy in zip(options.without, files, strict=True):
                shutil.copyfile(source, copy)
        except OSError as error:
            raise UserError(f"without={error.filename}: cannot be read ({error.strerror})") from None
        return WithoutOptions(tuple(map(str, files)), *limits)

    # -- stage 4 ------------------------------------------------------------------------------------------

    def finish(
        self,
        target: Path,
        tokenizer_folder: Path,
        titles: _Nodes | None,
        nodes: _Nodes,
        repeated: Path | None,
        folder: Path,
        shards: list[ShardPart],
        valid_from: int,
        communities: list[str],
    ) -> None:
        """Validation and test samples, index and card; the training shards are taken as they are."""
        options = self.options
        tokenizer = Tokenizer.load(tokenizer_folder)
        tokenizer.save(target / "tokenizer")
        sizes = (options.max_context, options.max_response, tokenizer.vocab_size)
        statistics = {"train": SplitStatistics(*sizes)}
        train: list[ShardInfo] = []
        for part in shards:
            part.add_to(statistics["train"])
            if part.train is not None:
                _link(folder / part.train.file, target / part.train.file)
                train.append(part.train)
        valid = _choose(folder, "valid", options.valid_samples)
        test = _choose(folder, "test", options.test_samples)
        n_nodes = sum((Counter(part.n_nodes) for part in shards), Counter())
        _check_splits(options, valid_from, len(valid), statistics["train"].n_samples, len(test), n_nodes)
        splits = {"train": SplitIndex(tuple(train))}
        drawn = {"valid": valid, "test": test} if len(test) else {"valid": valid}
        for split, samples in drawn.items():
            statistics[split] = SplitStatistics(*sizes)
            statistics[split].add(samples.token_ids, samples.offsets, samples.context_len)
            info = write_shard(target, f"{split}-00000.parquet", samples, tokenizer.vocab_size)
            splits[split] = SplitIndex((info,))
        nll = unigram_nll(statistics["train"].targets, statistics["valid"].targets)
        facts = FunnelFacts.of(
            comments=nodes.counts,
            titles=titles.counts if titles else None,
            repeated=dict(json.loads(part_metadata(repeated)["months"])) if repeated else {},
            rules=options.rules,
            shards=shards,
            n_valid=len(valid),
            n_test=len(test),
            held_out=communities,
            repeated_in_train=_repeated(folder, drawn),
            removed=self.removed(tokenizer_folder, shards, drawn),
        )
        index = ShardIndex(
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            max_context=options.max_context,
            max_response=options.max_response,
            splits=splits,
            unigram={"nll": nll, "ppl": exp(nll)},
            prepare=options.plain(),
            source=self.source([*(titles.reports if titles else []), *nodes.reports], valid_from),
            extra={"digest": _digest(shards, drawn.values()), "facts": facts.plain()},
        )
        write_card(target, index, facts, statistics)
        write_index(target, index)

    def removed(self, tokenizer: Path, shards: list[ShardPart], drawn: Mapping[str, Samples]) -> Removed:
        """What was removed for evaluation sets, and what of the other splits has to do with them."""
        removed = Removed(self.options.without)
        for part in shards:
            removed.merge(part.removed, part.removed_examples)
        if without := self.without():
            texts = evaluation_texts(without, str(tokenizer))
            for split, samples in drawn.items():
                for match in texts.matches(np.split(samples.token_ids, samples.offsets[1:-1])):
                    if match is not None:
                        removed.add(split, match, "")
        return removed

    def source(self, reports: list[Any], valid_from: int) -> dict[str, Any]:
        """What the corpus was made of, when and by what."""
        return {
            "corpus": "reddit",
            "files": [dataclasses.asdict(report) for report in reports],
            "prepared": datetime.now(UTC).isoformat(timespec="seconds"),
            "plato2": __version__,
            "engine": self.engine.settings,
            "versions": self.engine.versions,
            "valid_from": datetime.fromtimestamp(valid_from, UTC).isoformat(),
        }


@dataclass(frozen=True)
class _Nodes:
    """Stage 1, finished."""

    folder: Path
    reports: list[Any]
    parts: list[Path]
    counts: Counts


def _alone(rules: RedditRules) -> RedditRules:
    """The rules of stage 1: without 6 and 7, so that another threshold there does not repeat it."""
    return dataclasses.replace(rules, max_overlap=None, max_repeats=None)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value)


def _keys(dumps: list[Dump]) -> list[str]:
    return [dump.key for dump in dumps]


def _bytes(dumps: list[Dump]) -> int:
    return sum(dump.size for dump in dumps)


def _last_hours(hours: Counter[str]) -> list[int]:
    """Where validation may start, in seconds since 1970: hours that leave about `_VALID_SHARES` for it."""
    numbers = np.array(sorted(map(int, hours)))
    after = np.cumsum([hours[str(hour)] for hour in numbers[::-1]])[::-1]  # comments from each hour on
    starts = [
        numbers[np.argmax(after <= share * after[0])]
        for share in _VALID_SHARES
        if after[-1] <= share * after[0]
    ]
    return list(dict.fromkeys(3600 * int(hour) for hour in [*starts, numbers[-1]]))


def _held_out(counts: Counts, fraction: float) -> list[str]:
    """The communities that are held out for test, with that share of the comments; sorted names."""
    kept = {name: forum["kept"] for name, forum in counts.subreddits.items() if name and forum["kept"]}
    sizes = np.array(list(kept.values()), dtype=np.int64)
    chosen = held_out(_keys_of(kept), sizes, round(fraction * counts.total("kept")))
    return sorted(name for name, is_chosen in zip(kept, chosen.tolist(), strict=True) if is_chosen)


def _keys_of(communities: Iterable[str]) -> np.ndarray:
    """(n,) uint64, as stage 1 writes them."""
    return np.array([message_key(name) for name in communities], dtype=np.uint64)


def _repeated(folder: Path, drawn: Mapping[str, Samples]) -> dict[str, int]:
    """By split: samples that are, word for word, in the training split as well."""
    keys = {name: sample_keys(one.token_ids, one.offsets, one.context_len) for name, one in drawn.items()}
    found = {name: np.zeros(len(one), dtype=bool) for name, one in keys.items()}
    for path in sorted(folder.glob("keys-*.parquet")):
        train = pq.read_table(path).column("key").to_numpy()
        for name, one in keys.items():
            found[name] |= np.isin(one, train)
    return {name: int(is_found.sum()) for name, is_found in found.items()}


def _choose(folder: Path, split: str, most: int) -> Samples:
    """The samples of a split: of all candidates those with the lowest keys, in the order of these."""
    paths = sorted(folder.glob(f"{split}-*.parquet"))
    keys = [pq.read_table(path, columns=["key"]).column("key").to_numpy() for path in paths]
    together = np.concatenate([np.zeros(0, dtype=np.uint64), *keys])
    highest = np.partition(together, most - 1)[most - 1] if len(together) > most else None
    chosen: list[tuple[int, np.ndarray, int]] = []
    for path, of_path in zip(paths, keys, strict=True):
        if highest is not None and of_path[0] > highest:
            continue
        table = pq.read_table(path)
        ids = table.column("token_ids").combine_chunks()
        values, offsets = ids.values.to_numpy(), ids.offsets.to_numpy()
        n_context = table.column("context_len").to_numpy()
        for row, key in enumerate(of_path.tolist()):
            if highest is None or key <= highest:
                chosen.append((key, values[offsets[row] : offsets[row + 1]], int(n_context[row])))
    chosen.sort(key=lambda sample: sample[0])
    records = [record for _, record, _ in chosen]
    offsets = np.concatenate([[0], np.cumsum([len(record) for record in records], dtype=np.int64)])
    token_ids = np.concatenate([np.zeros(0, dtype=np.int32), *records])
    return Samples(
        token_ids, offsets, np.array([n for _, _, n in chosen], dtype=np.int64), np.arange(len(chosen))
    )


def _digest(shards: list[ShardPart], drawn: Iterable[Samples]) -> str:
    """One hash of all samples; the same whatever the engine and its workers."""
    digests = [part.digest for part in shards]
    digests += [samples_digest(one.token_ids, one.offsets, one.context_len) for one in drawn]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _link(source: Path, target: Path) -> None:
    """The same file in two places, copied where the disk cannot do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _nothing_left(options: RedditOptions, nodes: _Nodes) -> str:
    counts = nodes.counts
    n_read = counts.total("read")
    if not n_read:
        cut = [f"{report.path}: {report.cut}" for report in nodes.reports if report.cut]
        broken = "".join(f"; {reason}" for reason in [*counts.broken_examples, *cut][:1])
        return f"comments={', '.join(options.comments)}: no comment in them{broken}"
    removed = Counter[str]()
    for month in counts.funnel.values():
        removed.update(month)
    rule, n = max(((name, n) for name, n in removed.items() if name != "read"), key=lambda pair: pair[1])
    return (
        f"of {n_read:,} comments, none passes the rules; {n:,} fail at '{rule}': change it with --rule, or "
        "see what the rules say about one message with plato2 prepare explain"
    )


def _no_text(options: RedditOptions, dumps: list[Dump]) -> str:
    """Why there is nothing to train a tokenizer on.

    Raises:
        UserError: a line that is no comment, which is then the reason.
    """
    for dump in dumps:
        for block in DumpReader(dump, options.on_broken).blocks():
            for _ in parse_lines(dump, block, options.on_broken, Counts()):
                pass
    return (
        f"comments={', '.join(options.comments)}: there is no message to train a tokenizer on, or none that "
        "passes the rules: change them with --rule, or name a --tokenizer"
    )


def _check_splits(
    options: RedditOptions,
    valid_from: int,
    n_valid: int,
    n_train: int,
    n_test: int,
    n_nodes: Counter[str],
) -> None:
    day = datetime.fromtimestamp(valid_from, UTC).isoformat(sep=" ")[:16]
    if not n_train:
        of = f"of {n_nodes.total():,} messages that pass the rules {n_nodes[ORPHANS]:,} have {ORPHANS}"
        raise UserError(
            f"no sample is left to train on before {day} (UTC): {of}; give more dumps, --orphans root, "
            "a later --valid-from or fewer rules"
        )
    if not n_valid:
        raise UserError(
            f"no sample is left for validation from {day} (UTC) on: name an earlier --valid-from, or give "
            "more dumps"
        )
    if options.test_from is not None and not n_test:
        raise UserError(
            f"test_from={options.test_from!r}: no sample is left for test from then on; name an earlier day, "
            "or give more dumps"
        )
