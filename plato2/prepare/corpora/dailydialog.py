"""DailyDialog's text: one dialogue per line, every turn ends with `__eou__`; two people take turns.

    The taxi drivers are on strike again . __eou__ What for ? __eou__ They want more money . __eou__

The text is tokenised (blanks before punctuation) and stays so. Blanks around `__eou__` do not matter; two of
them in a row end one turn, and the last one may be missing. XDailyDialog is read, too: its lines go on with
<TAB>topic<TAB>acts<TAB>emotions, which are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from plato2.data.samples import Dialogue, Turn
from plato2.prepare.corpora import ReadReport, read_lines

END = "__eou__"
SPEAKERS = ("A", "B")


def read(files: Sequence[str], report: ReadReport) -> Iterator[Dialogue]:
    """Yield the dialogues of `dialogues_text.txt` and the like.

    Args:
        files: text files.
        report: counts lines without `__eou__`, or without a word.
    """
    for file, number, line in read_lines(files, report):
        if END not in line:
            report.broken(file, number, f"no {END}, which ends each turn")
            continue
        *turns, rest = line.split(END)
        turns.append(rest.split("\t")[0])  # a last turn without its end, XDailyDialog's labels
        texts = [turn.strip() for turn in turns if turn.strip()]
        if not texts:
            report.broken(file, number, f"no text, only {END}")
            continue
        yield Dialogue([Turn(text, SPEAKERS[i % 2]) for i, text in enumerate(texts)])
