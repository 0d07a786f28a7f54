"""What became of every message of the dumps: the counts of all stages put together.

A message ends in one place: a reason why it is in no sample as a response, or a sample. So the counts of a
month add up to the messages read in it. Should they ever not, the difference has a line of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from plato2.prepare.reddit.nodes import Counts
from plato2.prepare.reddit.rules import Judge, RedditRules, overlap_rule, repeat_rule
from plato2.prepare.reddit.shard_parts import ShardPart, month_of
from plato2.prepare.without import Removed

N_SUBREDDITS = 100
"""Subreddits in index.json, those with most messages; there are over a million."""


@dataclass(frozen=True)
class Step:
    """A line of the funnel."""

    name: str
    n: int
    hundredths: int
    """Share of all messages read, in hundredths of a percent; rounded so that these add up as well."""
    kind: Literal["left", "lost", "part"]
    """What is left here, what is lost here, or a part of the samples."""

    @property
    def share(self) -> str:
        """In words, such as `12.34%`."""
        return f"{self.hundredths / 100:.2f}%"


@dataclass(frozen=True)
class FunnelFacts:
    """What became of every message that was read; the counts of a month add up to what was read in it."""

    months: dict[str, dict[str, int]]
    """By month: `read`, then what was removed for which reason, then `samples`."""
    kept: dict[str, int]
    """By month: messages that stage 1 kept."""
    alone: list[str]
    """Why stage 1 removes messages, each looked at alone, in this order."""
    together: list[str]
    """Why stages 2 and 3 remove messages, in this order."""
    hits: dict[str, dict[str, int]]
    """By month and rule: messages that break it, whether another rule removed them or not."""
    subreddits: dict[str, dict[str, int]]
    """`read` and `kept` (by stage 1)."""
    tokens: int
    """BPE tokens of the messages that stage 1 kept."""
    hours: list[str]
    """The first and the last hour with a message that stage 1 kept."""
    quarantined: list[str]
    """Forums that the dumps flag."""
    n_broken: int
    broken_examples: list[str]
    n_candidates: int
    """Samples after the cut-off; those that are not for validation are left out."""
    n_valid: int
    n_held_out: int
    """Samples of the communities and the time held out for test; those that are not chosen are left out."""
    n_test: int
    held_out: list[str]
    """Communities held out."""
    repeated_in_train: dict[str, int]
    """By split: samples that are, word for word, in the training split as well."""
    n_removed: int
    """Samples removed from training, because they have to do with an evaluation set."""
    removed: list[dict[str, Any]]
    """By evaluation set and rule: samples removed from train, and those that are in valid and test."""
    removed_examples: list[str]

    @classmethod
    def of(
        cls,
        comments: Counts,
        titles: Counts | None,
        repeated: Mapping[int, int],
        rules: RedditRules,
        shards: Sequence[ShardPart],
        n_valid: int,
        n_test: int,
        held_out: list[str],
        repeated_in_train: dict[str, int],
        removed: Removed,
    ) -> FunnelFacts:
        """Put together what the stages counted."""
        counts = Counts()
        for part in (titles, comments):
            if part is not None:
                counts.add(part)
        months = {month: Counter(funnel) for month, funnel in counts.funnel.items()}
        tokens = sum(funnel.pop("tokens", 0) for funnel in months.values())
        kept = {month: months[month].pop("kept", 0) for month in sorted(months)}
        rule6, rule7 = overlap_rule(rules), repeat_rule(rules)
        for month, n in repeated.items():
            months[month_of(month)][str(rule7)] += n
        for shard in shards:
            for name, lost in shard.lost.items():
                for reason, n in lost.items():
                    months[name][str(rule6) if reason == "rule 6" else reason] += n
            for name, n in shard.samples.items():
                months[name]["samples"] += n
        alone = ["no text", *Judge(rules).rules]
        reasons = dict.fromkeys(reason for shard in shards for reason in shard.n_nodes if reason != "samples")
        together = [rule7, *(rule6 if reason == "rule 6" else reason for reason in reasons)]
        in_use = [name for name in together if name is not None]
        order = ["read", *alone, *in_use, "samples"]
        times = [datetime.fromtimestamp(3600 * int(hour), UTC).isoformat() for hour in counts.hours]
        return cls(
            months={
                month: {name: months[month][name] for name in order if months[month][name]} for month in kept
            },
            kept=kept,
            alone=alone,
            together=in_use,
            hits={month: dict(hits) for month, hits in sorted(counts.hits.items())},
            subreddits={name: dict(forum) for name, forum in counts.subreddits.items()},
            tokens=tokens,
            hours=[min(times), max(times)] if times else [],
            quarantined=counts.quarantined,
            n_broken=counts.n_broken,
            broken_examples=counts.broken_examples,
            n_candidates=sum(shard.n_candidates for shard in shards),
            n_valid=n_valid,
            n_held_out=sum(shard.n_held_out for shard in shards),
            n_test=n_test,
            held_out=held_out,
            repeated_in_train=repeated_in_train,
            n_removed=removed.total("train"),
            removed=removed.rows(),
            removed_examples=removed.examples,
        )

    def totals(self) -> Counter[str]:
        """The counts over all months."""
        return sum((Counter(month) for month in self.months.values()), Counter[str]())

    @property
    def rules(self) -> list[str]:
        """The rules that are on; the other reasons have no number."""
        return [name for name in (*self.alone, *self.together) if name[0].isdigit()]

    def all_hits(self) -> Counter[str]:
        """The messages that break each rule of stage 1, over all months."""
        return sum((Counter(month) for month in self.hits.values()), Counter[str]())

    def steps(self) -> list[Step]:
        """The funnel: what is read, each loss, what is left after a stage, and the parts of the samples."""
        totals = self.totals()
        n_read = left = totals["read"]
        steps = [Step("messages read", n_read, 100_00, "left")]

        def take(name: str, n: int, kind: Literal["lost", "part"]) -> None:
            nonlocal left
            left -= n
            share = _hundredths(left + n, n_read) - _hundredths(left, n_read)
            steps.append(Step(name, n, share, kind))

        for name in self.alone:
            take(name, totals[name], "lost")
        if left != (n_kept := sum(self.kept.values())):
            take("not accounted for: please report this", left - n_kept, "lost")
        steps.append(Step("kept by the rules for one message", left, _hundredths(left, n_read), "left"))
        for name in self.together:
            take(name, totals[name], "lost")
        if left != totals["samples"]:
            take("not accounted for: please report this", left - totals["samples"], "lost")
        steps.append(Step("samples", left, _hundredths(left, n_read), "left"))
        take("for training", totals["samples"] - self.n_candidates - self.n_held_out - self.n_removed, "part")
        take("for validation", self.n_valid, "part")
        take("after the cut-off, not chosen", self.n_candidates - self.n_valid, "part")
        if self.n_removed:
            take("removed for evaluation sets", self.n_removed, "part")
        if self.n_held_out:
            take("for test", self.n_test, "part")
            take("held out for test, not chosen", self.n_held_out - self.n_test, "part")
        return steps

    def by_subreddit(self) -> list[tuple[str, int, int]]:
        """(name, messages read, kept by stage 1), those with most messages first."""
        rows = [(name, forum.get("read", 0), forum.get("kept", 0)) for name, forum in self.subreddits.items()]
        return sorted(rows, key=lambda row: (-row[1], row[0]))

    def plain(self) -> dict[str, Any]:
        """For index.json: all but the names of most subreddits, which are in subreddits.csv."""
        forums = self.by_subreddit()
        others, totals = forums[N_SUBREDDITS:], self.totals()
        return {
            "counts": {name: totals[name] for name in ("read", *self.alone, *self.together, "samples")},
            **vars(self),
            "held_out": len(self.held_out),
            "subreddits": {name: {"read": n, "kept": kept} for name, n, kept in forums[:N_SUBREDDITS]},
            "other_subreddits": {
                "subreddits": len(others),
                "read": sum(n for _, n, _ in others),
                "kept": sum(kept for _, _, kept in others),
            },
        }


def _hundredths(n: int, of: int) -> int:
    return round(100_00 * n / max(1, of))
