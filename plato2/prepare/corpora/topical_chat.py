"""Topical-Chat (Amazon, CDLA-Sharing-1.0): chats of people who have just read about the same few topics.

    {"t_a2b769a0": {"config": "B", "article_url": "...", "content": [
       {"agent": "agent_1", "message": "Are you a football fan?", "sentiment": "Neutral",
        "knowledge_source": ["FS1", "AS2", "Personal Knowledge"], "turn_rating": "Good"}, ...]}}

`knowledge_source` names sections of what this agent had read; the texts are in the reading sets:

    {"t_a2b769a0": {"config": "B",
       "agent_1": {"FS1": {"entity": "Football", "shortened_wiki_lead_section": "Football is ...",
                           "fun_facts": ["The first ball ...", ...]}, "FS2": {...}, "FS3": {...}},
       "agent_2": {...},
       "article": {"url": "...", "headline": "...", "AS1": "...", "AS2": "...", "AS3": "...", "AS4": "..."}}}

With the option `reading_sets` these texts are the turn's knowledge: of FS* the wiki section, then the fun
facts; of AS* that section of the article; nothing of `Personal Knowledge`. The released sets (`pre-build`)
hold numbers in place of the texts. The corpus's build.py fetches all texts (it needs Reddit credentials); the
option `wiki` (the corpus's `src/wiki/wiki.json`) fills in the wiki sections alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from plato2.config import UserError
from plato2.data.samples import Dialogue, Turn
from plato2.prepare.corpora import ReadReport, expand, merge_speakers, read_dialogues, read_json

AGENTS = ("agent_1", "agent_2")
WIKI = ("shortened_wiki_lead_section", "summarized_wiki_lead_section")
ARTICLE = ("AS1", "AS2", "AS3", "AS4")
_THREAD = re.compile(r"t3_[0-9a-z]+")
"""A fun fact's Reddit thread, which stands in place of its text until build.py has fetched it."""

Sections = dict[str, dict[str, list[str]]]
"""Texts by agent and section name."""


def read(
    files: Sequence[str], report: ReadReport, reading_sets: str | None = None, wiki: str | None = None
) -> Iterator[Dialogue]:
    """Yield the conversations of `conversations/*.json`.

    Args:
        files: the files.
        report: counts conversations of another form or without a reading set.
        reading_sets: file or glob of reading sets; None: turns have no knowledge.
        wiki: the corpus's `wiki.json`, for reading sets that were not built; their fun facts and articles
            are left out.
    """
    if wiki is not None and reading_sets is None:
        raise UserError("reader.wiki fills in reading sets: give reader.reading_sets, too")
    sets = None if reading_sets is None else _load_sets(reading_sets, wiki)

    def parse_grounded(record: Any, name: str) -> Dialogue:
        if sets is not None and name not in sets:
            raise ValueError(f"not in reading_sets={reading_sets}")
        return parse(record, name, {} if sets is None else sets[name])

    yield from read_dialogues(files, report, parse_grounded)


def parse(record: Any, name: str, sections: Sections) -> Dialogue:
    """A dialogue from one value of a conversations file.

    Raises:
        ValueError: it has another form; says which.
    """
    if not isinstance(record, dict) or not isinstance(record.get("content"), list):
        raise ValueError('not a conversation of the form {"content": [...]}')
    turns = []
    for i, message in enumerate(record["content"]):
        if not isinstance(message, dict) or not isinstance(message.get("message"), str):
            raise ValueError(f'message {i} is not of the form {{"agent": ..., "message": ...}}')
        agent, sources = message.get("agent"), message.get("knowledge_source", [])
        if agent not in AGENTS:
            raise ValueError(f"message {i}: agent {agent!r} is neither agent_1 nor agent_2")
        if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
            raise ValueError(f"message {i}: knowledge_source is not a list of texts")
        own = sections.get(agent, {})
        texts = [text for source in sources for text in own.get(source, [])]
        turns.append(Turn(message["message"], agent, knowledge=texts))
    merged = merge_speakers(turns)
    for turn in merged:  # two sections may hold the same fact, as may two messages
        turn.knowledge = list(dict.fromkeys(turn.knowledge))
    return Dialogue(merged, id=name)


def _load_sets(pattern: str, wiki: str | None) -> dict[str, Sections]:
    """Reading sets by conversation. A text that stands in many sets is held once."""
    wiki_texts = None if wiki is None else _load_wiki(wiki)
    held: dict[str, str] = {}
    sets: dict[str, Sections] = {}
    for file in expand([pattern], "reader.reading_sets"):
        for line, keys, record in read_json(file, lambda depth, _: depth == 0):
            try:
                article = record.get("article") or {}
                shared = {name: [article[name]] for name in ARTICLE if isinstance(article.get(name), str)}
                sections: Sections = {}
                for agent in AGENTS:
                    own = {name: _texts(section, wiki_texts) for name, section in record[agent].items()}
                    sections[agent] = {
                        name: [held.setdefault(text, text) for text in texts]
                        for name, texts in (own | shared).items()
                    }
                sets[keys[0]] = sections
            except (LookupError, AttributeError, TypeError) as error:
                raise UserError(
                    f"reader.reading_sets={file}:{line}: not of the form {{ID: {{agent_1, agent_2}}}}; "
                    "name a file of Topical-Chat's reading_sets"
                ) from error
            except ValueError as error:
                raise UserError(f"reader.reading_sets={file}:{line}: {error}") from error
    return sets


def _texts(section: dict[str, Any], wiki_texts: dict[int, str] | None) -> list[str]:
    """The wiki text of a factual section, then its fun facts.

    Raises:
        ValueError: they are not there, only the numbers of them.
    """
    texts = []
    for value in [*(section[name] for name in WIKI if name in section), *section.get("fun_facts", [])]:
        is_text = isinstance(value, str) and not _THREAD.fullmatch(value)
        if is_text:
            texts.append(value)
        elif wiki_texts is None:
            raise ValueError(
                f"{value!r} stands in place of a text; name the sets that Topical-Chat's build.py has "
                "written (post-build), or give its wiki.json as reader.wiki for the wiki sections alone"
            )
        elif isinstance(value, int):
            if value not in wiki_texts:
                raise ValueError(f"wiki section {value} is not in the file given as reader.wiki")
            texts.append(wiki_texts[value])
    return texts


def _load_wiki(path: str) -> dict[int, str]:
    """Texts of wiki sections by number: the file has {"shortened_wiki_lead_section": {TEXT: NUMBER}, ...}."""
    texts: dict[int, str] = {}
    for file in expand([path], "reader.wiki"):
        for _, keys, number in read_json(file, lambda depth, _: depth < 2):
            if len(keys) != 2 or keys[0] not in WIKI or not isinstance(number, int):
                raise UserError(
                    f"reader.wiki={file} is not Topical-Chat's src/wiki/wiki.json; name that file"
                )
            texts[number] = keys[1]
    return texts
