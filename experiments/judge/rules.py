"""Judges that only compare a number, behind an OpenAI-compatible API as a language model is.

    python experiments/judge/rules.py words PORT
    python experiments/judge/rules.py coherence PORT

`words` counts words that a line shares with the line before, and knows nothing of dialogue. `coherence` is
the mean p(l=1|c,r) that the evaluation model of `small` gives the judged lines after those before them. Both
are put to the same controls as a language model, to see what passing them proves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import fastapi
import uvicorn

from plato2.evaluate.judge import NAME, Side
from plato2.evaluate.judge_controls import shared_words

Number = Callable[[Side], float]
"""Of a dialogue; the higher one is preferred."""


def coherence() -> Number:
    """The mean coherence of judged lines by the model that comes with plato2."""
    from plato2.config import SMALL
    from plato2.evaluate.scorers import Coherence
    from plato2.talk.bot import PlatoBot

    bot = PlatoBot.load(SMALL)
    assert bot.evaluation is not None
    score = Coherence(bot.evaluation, bot.tokenizer)

    def mean(shown: Side) -> float:
        texts = [text for _, text in shown.lines]
        scores = [
            score(texts[:place], texts[place : place + 1])[0]
            for place, (judged, text) in enumerate(shown.lines)
            if judged and place and text.strip()
        ]
        return sum(scores) / len(scores) if scores else 0.0

    return mean


def as_side(dialogue: str) -> Side:
    """A dialogue as the question shows it."""
    lines = [line.partition(": ") for line in dialogue.strip().splitlines()]
    return Side("", tuple((who == NAME, text) for who, _, text in lines))


def api(number: Number) -> fastapi.FastAPI:
    """The API: a verdict on the two dialogues of the last message."""
    app = fastapi.FastAPI()

    @app.post("/v1/chat/completions")
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        asked = request["messages"][-1]["content"]
        first, second = (
            number(as_side(asked.partition(f"<{name}>")[2].partition(f"</{name}>")[0]))
            for name in ("first", "second")
        )
        verdict = "equal" if first == second else "first" if first > second else "second"
        text = f"{first:.3f} and {second:.3f}.\nVerdict: {verdict}"
        return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}

    return app


if __name__ == "__main__":
    made = api(shared_words if sys.argv[1] == "words" else coherence())
    uvicorn.run(made, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
