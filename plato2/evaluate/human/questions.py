"""What raters and judges are asked, the only place of these texts: the presets, and the judge's questions.

The wording is ours, after the paper's (section 3.3.2, tables 4 and 7, appendix E), Meena's and ACUTE-Eval's.
"""

from __future__ import annotations

from plato2.evaluate.human.formats import PER, Level, Question

SIDE_BY_SIDE = {
    "engagingness": "Which speaker would you rather talk to in a long conversation?",
    "humanness": "Which speaker sounds more like a person?",
    "coherence": "Whose utterances fit better what was said before, without contradiction?",
    "informativeness": "Whose utterances say more that is specific and to the point?",
}
"""The paper's four measures where two dialogues are compared, by people (preset `acute`) or by a judge."""


def _scale(name: str, text: str, per: PER, *criteria: str) -> Question:
    levels = [
        Level(value=value, label=str(value), criterion=criterion) for value, criterion in enumerate(criteria)
    ]
    return Question(name=name, text=text, per=per, levels=levels)


def _choice(name: str, text: str, tie: bool = False) -> Question:
    sides = ["left", "tie", "right"] if tie else ["left", "right"]
    labels = {"left": "left", "tie": "no difference", "right": "right"}
    return Question(
        name=name, text=text, per="pair", levels=[Level(value=side, label=labels[side]) for side in sides]
    )


def _yes_no(name: str, text: str, per: PER, no: str, yes: str) -> Question:
    levels = [Level(value=0, label="no", criterion=no), Level(value=1, label="yes", criterion=yes)]
    return Question(name=name, text=text, per=per, levels=levels)


TABLE_7 = (
    _scale(
        "coherence",
        "Is the reply relevant to what was said before, and consistent with it?",
        "utterance",
        "It is not related to the context, only repeats it, clearly contradicts it, or is illogical in "
        "itself.",
        "It contradicts the context in a minor point, or has a minor logical flaw.",
        "It is coherent with the context.",
    ),
    _scale(
        "informativeness",
        "Does the reply say something, given what was said before?",
        "utterance",
        "It says nothing, or only repeats the context and adds nothing; also where coherence is 0.",
        "It conflicts with common sense, or has factual errors.",
        "It has appropriate and correct information.",
    ),
    _scale(
        "engagingness",
        "Would you like to talk with this speaker?",
        "dialogue",
        "I do not want to talk with this speaker.",
        "It is a bit boring, but it is still all right to talk with this speaker.",
        "I would like to talk with this speaker for a long conversation.",
    ),
    _scale(
        "humanness",
        "Is this speaker a human being?",
        "dialogue",
        "The speaker seems like a bot.",
        "Some replies are unnatural, and the speaker does not seem quite human.",
        "The speaker seems like a human being.",
    ),
)
"""Of each reply and of the dialogue, with the criteria of table 7."""
PRESETS: dict[str, tuple[Question, ...]] = {
    "plato": TABLE_7,
    "chat": TABLE_7,
    "topic": (
        _choice(
            "depth", "Which dialogue stays with what it began with and discusses it in more depth?", True
        ),
    ),
    "ssa": (
        _yes_no(
            "sensible",
            "Does the reply make sense in this context?",
            "utterance",
            "It is confusing, illogical, out of context, or factually wrong.",
            "It makes sense.",
        ),
        _yes_no(
            "specific",
            "Is the reply specific to this context?",
            "utterance",
            "It is vague, would fit many other contexts just as well, or does not make sense.",
            "It fits this context and few others.",
        ),
    ),
    "acute": (
        _choice("engagingness", SIDE_BY_SIDE["engagingness"]),
        _choice("humanness", SIDE_BY_SIDE["humanness"]),
    ),
    "candidates": (
        _yes_no(
            "fits",
            "Could this be the next reply?",
            "candidate",
            "It is not related to the context, contradicts it, or is illogical.",
            "It is a reply that makes sense here.",
        ),
    ),
}
"""What each preset asks."""
