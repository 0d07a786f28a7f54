"""CrossWOZ (Tsinghua, Apache-2.0): Chinese task-oriented dialogues over hotels, restaurants and sights.

    {"2303": {"goal": [...], "type": "...", "messages": [
       {"role": "usr", "content": "推荐一个餐馆。", "dialog_act": [...], "user_state": [...]},
       {"role": "sys", "content": "为您推荐鲜鱼口。", "dialog_act": [...], "sys_state": {
          "餐馆": {"推荐菜": "美食街", "评分": "", "selectedResults": ["鲜鱼口"]}, "酒店": {...}}}]}}

as `train.json`, or `train.json.zip` as released. `sys_state` is the last database query of a sys turn;
`selectedResults` is what the turn uses of its results. Each domain with such results gives one text, the
results first, then what was asked for:

    餐馆: 鲜鱼口, 推荐菜 美食街
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from plato2.data.samples import Dialogue, Turn
from plato2.prepare.corpora import ReadReport, merge_speakers, read_dialogues
from plato2.prepare.corpora.sgd import slot_values, with_results

RESULTS = "selectedResults"


def read(files: Sequence[str], report: ReadReport, knowledge: str = "results") -> Iterator[Dialogue]:
    """The dialogues of `train.json`, `val.json`, `test.json`, zipped or not.

    Args:
        files: the files.
        report: counts dialogues of another form.
        knowledge: `results` gives a sys turn the database results it uses; `none` nothing.
    """
    results = with_results(knowledge)
    return read_dialogues(files, report, lambda record, name: parse(record, name, results))


def parse(record: Any, name: str, results: bool) -> Dialogue:
    """A dialogue from one value of a file.

    Raises:
        ValueError: it has another form; says which.
    """
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ValueError('not a dialogue of the form {"messages": [...]}')
    turns = []
    for i, message in enumerate(record["messages"]):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f'message {i} is not of the form {{"role": ..., "content": ...}}')
        role = message.get("role")
        if role not in ("usr", "sys"):
            raise ValueError(f"message {i}: role {role!r} is neither usr nor sys")
        found = _results(message.get("sys_state"), i) if role == "sys" and results else []
        turns.append(Turn(message["content"], role, knowledge=found))
    return Dialogue(merge_speakers(turns), id=name)


def _results(state: Any, i: int) -> list[str]:
    if not isinstance(state or {}, dict):
        raise ValueError(f"message {i}: sys_state is not an object")
    texts = []
    for domain, query in (state or {}).items():
        results = query.get(RESULTS) if isinstance(query, dict) else None
        if not isinstance(results, list) or not all(isinstance(result, str) for result in results):
            raise ValueError(f"message {i}: sys_state of {domain} has no list of {RESULTS}")
        if results:
            asked = slot_values({slot: value for slot, value in query.items() if slot != RESULTS})
            found = " / ".join(result.strip() for result in results)
            texts.append(f"{domain}: {found}" + (f", {asked}" if asked else ""))
    return texts
