"""The data card of a corpus from Reddit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plato2.data.reddit.nodes import Counts
from plato2.data.reddit.shard_parts import ShardPart, month_of
from plato2.data.shards import ShardIndex
from plato2.data.statistics import SplitStatistics


@dataclass(frozen=True)
class FunnelFacts:
    """What became of every message that was read; the counts of a month add up to what was read in it."""

    months: dict[str, dict[str, int]]
    """By month: `read`, then what was removed for which reason, then `samples`."""
    hits: dict[str, dict[str, int]]
    """By month and rule: messages that break it, whether another rule removed them or not."""
    subreddits: dict[str, dict[str, int]]
    """`read` and `kept` (by stage 1)."""
    tokens: int
    """BPE tokens of the messages that stage 1 kept."""
    quarantined: list[str]
    """Forums that the dumps flag."""
    n_broken: int
    broken_examples: list[str]
    n_candidates: int
    """Samples after the cut-off; those that are not for validation are left out."""
    n_valid: int

    @classmethod
    def of(
        cls,
        comments: Counts,
        titles: Counts | None,
        repeated: Mapping[int, int],
        repeat_rule: str | None,
        overlap_rule: str | None,
        shards: Sequence[ShardPart],
        n_candidates: int,
        n_valid: int,
    ) -> FunnelFacts:
        """Put together what the stages counted."""
        counts = Counts()
        for part in (titles, comments):
            if part is not None:
                counts.add(part)
        months = {month: Counter(funnel) for month, funnel in counts.funnel.items()}
        tokens = sum(funnel.pop("tokens", 0) for funnel in months.values())
        for funnel in months.values():
            funnel.pop("kept", 0)
        for month, n in repeated.items():
            months[month_of(month)][str(repeat_rule)] += n
        for shard in shards:
            for name, lost in shard.lost.items():
                for reason, n in lost.items():
                    months[name][str(overlap_rule) if reason == "rule 6" else reason] += n
            for name, n in shard.samples.items():
                months[name]["samples"] += n
        return cls(
            months={month: dict(months[month]) for month in sorted(months)},
            hits={month: dict(hits) for month, hits in sorted(counts.hits.items())},
            subreddits={name: dict(forum) for name, forum in counts.subreddits.items()},
            tokens=tokens,
            quarantined=counts.quarantined,
            n_broken=counts.n_broken,
            broken_examples=counts.broken_examples,
            n_candidates=n_candidates,
            n_valid=n_valid,
        )

    def totals(self) -> Counter[str]:
        """The funnel over all months."""
        return sum((Counter(month) for month in self.months.values()), Counter[str]())

    def plain(self) -> dict[str, Any]:
        """For index.json."""
        return {"counts": dict(self.totals()), **dataclasses.asdict(self)}


def write_card(
    folder: Path, index: ShardIndex, facts: FunnelFacts, statistics: Mapping[str, SplitStatistics]
) -> None:
    """Write the card."""
    (folder / "card.md").write_text(str(facts.totals()))
