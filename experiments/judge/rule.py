"""A judge that knows nothing of dialogue: it counts words that a line shares with the line before.

    python experiments/judge/rule.py PORT

It answers as an OpenAI-compatible API does, so that `plato2 evaluate judge` can put it to the same controls
as a language model. It shows what a control proves, and what it does not.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import fastapi
import uvicorn

app = fastapi.FastAPI()
LONG = 4
"""Letters of a word that counts: `the` and `you` are shared by all lines."""


def shared(dialogue: str) -> float:
    """The mean share of the judged speaker's long words that the line before has too."""
    lines = [line.partition(": ") for line in dialogue.strip().splitlines()]
    words = [set(re.findall(rf"[a-z']{{{LONG},}}", text.lower())) for _, _, text in lines]
    shares = [
        len(words[place] & words[place - 1]) / len(words[place])
        for place, (who, _, _) in enumerate(lines)
        if who == "Bot" and place and words[place]
    ]
    return sum(shares) / len(shares) if shares else 0.0


@app.post("/v1/chat/completions")
def answer(request: dict[str, Any]) -> dict[str, Any]:
    """A verdict on the two dialogues of the last message."""
    asked = request["messages"][-1]["content"]
    first, second = (
        shared(asked.partition(f"<{name}>")[2].partition(f"</{name}>")[0]) for name in ("first", "second")
    )
    verdict = "equal" if first == second else "first" if first > second else "second"
    text = f"Shared words: {first:.3f} and {second:.3f}.\nVerdict: {verdict}"
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
