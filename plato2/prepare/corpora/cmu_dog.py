"""CMU_DoG (EMNLP 2018): chats about a film while one or both of the speakers read its Wikipedia article.

    {"date": "2018-03-01T00:11:05.970Z", "rating": 2, "wikiDocumentIdx": 11, "whoSawDoc": ["user1", "user2"],
     "history": [{"docIdx": 0, "uid": "user2", "text": "Hey there !", "utcTimestamp": "2018-03-01T00:11:35Z"},
                 ...]}

One conversation per file (`Conversations/train/*.json`, as released), or one per line (`.jsonl`). The option
`wikidata` names the articles: `WikiData/*.json`, or one JSON object of them all by film.

    {"wikiDocumentIdx": 11, "0": {"movieName": "Mean Girls", "year": "2004", "cast": ["...", ...],
     "introduction": "...", ...}, "1": "Cady Heron ...", "2": "...", "3": "..."}

With it, a turn of a speaker who saw the article has the section shown at that time (`docIdx`) as knowledge:
section 0 as one text per field (`director: Mark Waters`), a scene of the plot (1 to 3) as one text per
sentence, for as a whole it would rarely fit into a context. Messages that one speaker sends in a row are one
turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from plato2.config import UserError
from plato2.data.samples import Dialogue, Turn
from plato2.prepare.corpora import (
    ReadReport,
    expand,
    in_folders,
    merge_speakers,
    parse_time,
    read_dialogues,
    read_json,
)

FIELDS = {
    "critical_response": "critics",
    "rating": "rating",
    "cast": "cast",
    "genre": "genre",
    "director": "director",
    "year": "year",
    "movieName": "film",
}
"""Fields of section 0 after the introduction, and their names; the last ones stay longest in a context."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")

Article = dict[int, list[str]]
"""Texts by section."""


def read(files: Sequence[str], report: ReadReport, wikidata: str | None = None) -> Iterator[Dialogue]:
    """Yield the conversations of folders, JSON files (one conversation each) or JSON lines.

    Args:
        files: folders or files.
        report: counts conversations of another form or without an article.
        wikidata: file, folder or glob of the articles; None: turns have no knowledge.
    """
    articles = None if wikidata is None else _load_articles(wikidata)

    def parse_grounded(record: Any, name: str) -> Dialogue:
        return parse(record, name, articles)

    yield from read_dialogues(in_folders(files, "*.json"), report, parse_grounded, one_each=True)


def parse(record: Any, name: str, articles: dict[int, Article] | None = None) -> Dialogue:
    """A dialogue from a conversation.

    Raises:
        ValueError: it has another form or no article; says which.
    """
    if not isinstance(record, dict) or not isinstance(record.get("history"), list):
        raise ValueError('not a conversation of the form {"history": [...]}')
    readers = record.get("whoSawDoc", ["user1", "user2"])
    if not isinstance(readers, list):
        raise ValueError("whoSawDoc is not a list")
    article: Article | None = None
    if articles is not None:
        number = record.get("wikiDocumentIdx")
        if not isinstance(number, int) or number not in articles:
            raise ValueError(f"the article of its wikiDocumentIdx {number!r} is not in wikidata")
        article = articles[number]
    turns = []
    for i, message in enumerate(record["history"]):
        if not isinstance(message, dict) or not isinstance(message.get("text"), str):
            raise ValueError(f'message {i} is not of the form {{"uid": ..., "text": ..., "docIdx": ...}}')
        speaker, section = message.get("uid"), message.get("docIdx")
        if not isinstance(speaker, str):
            raise ValueError(f"message {i}: uid {speaker!r} is not a text")
        turn = Turn(message["text"], speaker, parse_time(message.get("utcTimestamp")))
        if article is not None and speaker in readers:
            if not isinstance(section, int) or section not in article:
                raise ValueError(f"message {i}: the article has no section {section!r} (docIdx)")
            turn.knowledge = list(article[section])
        turns.append(turn)
    merged = merge_speakers(turns)
    for turn in merged:  # messages in a row mostly come with the same section
        turn.knowledge = list(dict.fromkeys(turn.knowledge))
    return Dialogue(merged, id=str(record.get("_file", name)))


def _load_articles(pattern: str) -> dict[int, Article]:
    """The articles by wikiDocumentIdx."""
    articles = {}
    for file in expand(in_folders([pattern], "*.json"), "reader.wikidata"):
        for _, _, content in read_json(file, lambda *_: False):
            values = content.values() if isinstance(content, dict) and "0" not in content else [content]
            try:
                for article in values:
                    articles[int(article["wikiDocumentIdx"])] = _sections(article)
            except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise UserError(
                    f"reader.wikidata={file} is not an article of CMU_DoG; name its folder WikiData"
                ) from error
    return articles


def _sections(article: dict[str, Any]) -> Article:
    sections = {
        int(key): _SENTENCE_END.split(text.strip()) for key, text in article.items() if key in ("1", "2", "3")
    }
    facts = article["0"]
    texts = _SENTENCE_END.split(facts["introduction"].strip()) if "introduction" in facts else []
    for field, name in FIELDS.items():
        value = facts.get(field, [])
        if field == "critical_response":  # whole opinions; the other lists are of single words
            texts += [f"{name}: {opinion.strip()}" for opinion in value]
        elif value:
            words = value if isinstance(value, list) else [value]
            texts.append(f"{name}: {', '.join(word.strip() for word in words)}")
    return sections | {0: texts}
