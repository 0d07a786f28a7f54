"""The ten rules of the paper's appendix A for Reddit, and what each of them says about one message.

Rules 2 to 5 and 8 to 10 look at a message alone, rule 1 at its ids, rule 6 at its parent's ids too, and
rule 7 at the whole corpus. In `funnel` counts a message is removed by the first rule that it breaks, in the
order of `Judge.rules`; in `hits` it counts for each.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from plato2.config import UserError
from plato2.data.tokenizer import Tokenizer
from plato2.prepare.clean import CleanRules, length_rules, letter_share, overlaps, text_rules
from plato2.prepare.reddit.messages import Message
from plato2.words import WordList, read_names

LANGUAGES = {"en": 8000, "zh": 30000}
"""Languages with a word list of their own, and the pieces of their tokenizer in the paper."""


@dataclass
class RedditRules(CleanRules):
    """The paper's rules and thresholds; None or False = off.

    Raises:
        UserError: a threshold that makes no sense, a list that cannot be read.
    """

    max_overlap: float | None = 0.8
    """Rule 6: a larger share of the message's BPE tokens stands in its parent."""
    max_repeats: int | None = 100
    """Rule 7: the same message occurs more often among those that pass the rules before."""
    offensive_words: str | None = "en"
    """Rule 8: the shipped list `en` or `zh`, or a file with one word or phrase per line."""
    quarantined: str | None = "quarantined"
    """Rule 9: the shipped list, or a file with one subreddit per line. Flags in the dumps count as well."""
    bots: str | None = "bots"
    """Rule 10: the shipped list, or a file with one author per line."""

    @classmethod
    def off(cls) -> RedditRules:
        """No rule at all."""
        return cls(None, None, None, None, None, False, False, None, None, None, None, None)


class Judge:
    """Rules 2-5 and 8-10 over messages, without their ids.

    `rules` are the names of the rules that are on, in the order in which they remove messages.
    """

    def __init__(self, rules: RedditRules, quarantined: frozenset[str] = frozenset()) -> None:
        """Read the lists; `quarantined` are further forums (lower case) flagged in the submissions' dumps."""
        checks: dict[str, Callable[[Message], bool]] = {}
        if rules.quarantined is not None:
            forums = read_names(rules.quarantined, "rule quarantined") | quarantined
            checks["9. a quarantined subreddit"] = lambda m: m.quarantined or m.subreddit.casefold() in forums
        if rules.bots is not None:
            bots = read_names(rules.bots, "rule bots")
            checks["10. written by a bot"] = lambda m: m.author.casefold() in bots
        self._of_message = checks
        self._of_text = text_rules(rules, "rule offensive_words")
        self.rules = [*checks, *self._of_text, *length_rules(rules)]

    def failing(self, message: Message) -> list[str]:
        """Names of the rules the message breaks, in their order."""
        text = message.text
        failing = [name for name, breaks in self._of_message.items() if breaks(message)]
        return failing + [name for name, breaks in self._of_text.items() if breaks(text)]


def lists_sha256(rules: RedditRules) -> str:
    """Hash of the content of the lists in use: a list may change while its name stays."""
    words = WordList.read(rules.offensive_words, "rule offensive_words") if rules.offensive_words else None
    names = [read_names(name, f"rule {key}") for key, name in _name_lists(rules).items() if name is not None]
    content = [sorted(words.entries) if words else [], *map(sorted, names)]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _name_lists(rules: RedditRules) -> dict[str, str | None]:
    return {"quarantined": rules.quarantined, "bots": rules.bots}


def overlap_rule(rules: RedditRules) -> str | None:
    """Name of rule 6; None: off."""
    share = rules.max_overlap
    return None if share is None else f"6. over {share:.0%} of its tokens in the parent"


def repeat_rule(rules: RedditRules) -> str | None:
    """Name of rule 7; None: off."""
    return None if rules.max_repeats is None else f"7. repeated more than {rules.max_repeats} times"


# -- one message under the lens -------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What one rule says about one message."""

    rule: str
    passes: bool | None
    """None: the rule cannot be judged on one message, or needs something that was not given."""
    found: str
    """What was measured or found, in words."""


def explain(
    message: Message, rules: RedditRules, tokenizer: Tokenizer | None, parent_text: str | None = None
) -> list[Verdict]:
    """What every rule that is on says about a message, in the order of the paper.

    Args:
        message: the message; author and subreddit may be empty.
        rules: thresholds and lists.
        tokenizer: counts tokens for rules 1 and 6; None: they are not judged.
        parent_text: what the message answers; None: rule 6 is not judged.
    """
    text = message.text
    judge = Judge(rules)
    failing = set(judge.failing(message))
    found = {
        "2. a": _longest_word(text),
        "2. m": f"{len(text)} characters",
        "3.": f"{letter_share(text):.0%} letters",
        "8.": _word_found(rules, text),
        "9.": f"r/{message.subreddit}" if message.subreddit else "no subreddit given",
        "10.": f"u/{message.author}" if message.author else "no author given",
    }
    verdicts = []
    lengths = length_rules(rules)
    for name in judge.rules:
        if name not in lengths:
            start = next((key for key in found if name.startswith(key)), "")
            verdicts.append(Verdict(name, name not in failing, found.get(start, "")))
    ids = tokenizer.encode(text) if tokenizer is not None else None
    for name, breaks in lengths.items():
        if ids is None:
            verdicts.append(Verdict(name, None, "no tokenizer given"))
        else:
            verdicts.append(Verdict(name, not breaks(len(ids)), f"{len(ids)} tokens"))
    if (name6 := overlap_rule(rules)) is not None:
        verdicts.append(_overlap_verdict(name6, ids, tokenizer, parent_text, rules.max_overlap or 0.0))
    if (name7 := repeat_rule(rules)) is not None:
        verdicts.append(Verdict(name7, None, "known only with the whole corpus"))
    return sorted(verdicts, key=lambda verdict: int(verdict.rule.split(".")[0]))


def _longest_word(text: str) -> str:
    longest = max(text.split(), key=len, default="")
    return f"the longest has {len(longest)}"


def _word_found(rules: RedditRules, text: str) -> str:
    if rules.offensive_words is None:
        return ""
    word = WordList.read(rules.offensive_words, "rule offensive_words").find(text)
    return "" if word is None else f"'{word}'"


def _overlap_verdict(
    name: str, ids: list[int] | None, tokenizer: Tokenizer | None, parent_text: str | None, max_overlap: float
) -> Verdict:
    if ids is None or tokenizer is None:
        return Verdict(name, None, "no tokenizer given")
    if parent_text is None:
        return Verdict(name, None, "no parent given")
    parent = tokenizer.encode(parent_text)
    share = (Counter(ids) & Counter(parent)).total() / max(1, len(ids))
    return Verdict(name, not overlaps(ids, parent, max_overlap), f"{share:.0%} of its tokens")


def check_language(language: str) -> None:
    """Refuse a language without settings.

    Raises:
        UserError: it names those there are and what to do for another one.
    """
    if language not in LANGUAGES:
        raise UserError(
            f"language={language!r}: there are settings for {', '.join(LANGUAGES)}; for another language use "
            "en with --rule offensive_words=FILE and --vocab-pieces"
        )
