"""What a report says: runs, the paper's tables with ours beside, every evaluation, dialogues, provenance.

It names what is missing, with the command that would bring it, instead of leaving a hole.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from plato2.config import UserError
from plato2.evaluate.dialogues import Dialogue, read_dialogues
from plato2.evaluate.results import Figure, Measure, Result, picture, text
from plato2.evaluate.runs import Run, compare, curves, text_of
from plato2.report import paper, sweep, training
from plato2.report.curriculum import PARTS, Part, best_validation, part_of
from plato2.report.found import Found
from plato2.report.page import Block, Dialogues, Paragraph, Picture, Section, Table
from plato2.report.ranks import rank_sections
from plato2.runs.console import number, say
from plato2.runs.folder import RunFolder, fingerprint

KINDS = {
    "dialogues": (
        "self-chats and chats with people",
        "plato2 evaluate dialogues chats.jsonl --out dialogues.json",
    ),
    "replies": ("static replies", "plato2 evaluate replies replies.jsonl --out replies.json"),
    "selection": ("response selection", "plato2 evaluate selection set.jsonl --out selection.json"),
    "latents": ("the latents", "plato2 evaluate latents --generation RUN --data DATA --out latents.json"),
    "human": ("people's ratings", "plato2 evaluate human report tasks.json ratings.jsonl --out human.json"),
    "audit": ("what the metrics are worth", "plato2 evaluate audit rated.jsonl --out audit.json"),
    "judge": (
        "an LLM as a judge",
        "plato2 evaluate judge a.jsonl b.jsonl --url URL --model NAME --out judge.json",
    ),
}
"""Kind of evaluation: what it is, and how to have one."""
SIDE_BY_SIDE = 3
"""Start utterances whose dialogues are shown."""
Figures = Mapping[str, Mapping[str, Figure]]


def sections(found: Found) -> list[Section]:
    """All of the page."""
    runs = compare(found.runs) if found.runs else []
    made = [
        *(sweep.section(one) for one in found.sweeps),
        _overview(found),
        _curriculum(found.runs),
        _runs(runs),
        *rank_sections(found.runs),
        training.section(found.runs),
        _paper(found),
        *(_evaluation(path, result) for path, result in found.results),
        _dialogues(found.results),
        _provenance(found),
    ]
    return [section for section in made if section.blocks]


# ---------------------------------------------------------------------------------------- what lies there


def _overview(found: Found) -> Section:
    kinds = [result.kind for _, result in found.results]
    rows = [["runs", str(len(found.runs))]]
    rows += [[KINDS.get(kind, (kind,))[0], str(kinds.count(kind))] for kind in dict.fromkeys(kinds)]
    blocks: list[Block] = [Table(["what was found", "number"], rows)]
    missing = [[what, command] for kind, (what, command) in KINDS.items() if kind not in kinds]
    judged = {name for _, result in found.results if result.kind == "human" for name in result.systems}
    talking = {name for _, result in found.results if result.kind == "dialogues" for name in result.systems}
    if judged and (unjudged := sorted(map(_name, talking - judged))):
        missing.append([f"people's ratings of {', '.join(unjudged)}", KINDS["human"][1]])
    if missing:
        blocks.append(Table(["what is missing", "how to have it"], missing))
    return Section("What is here", blocks)


def _curriculum(runs: Sequence[Path]) -> Section:
    """The newest run of each part, with its best validation."""
    newest: dict[Part, Path] = {}
    lineages = {run: RunFolder(run).lineage() for run in runs}
    for run in sorted(runs, key=lambda run: lineages[run].get("status") == "pruned"):  # newest first
        part = part_of(lineages[run].get("use") or {})
        if part and part not in newest:
            newest[part] = run
    rows = []
    for part, run in ((part, newest[part]) for part in PARTS if part in newest):
        try:
            best = best_validation(run, part)
        except UserError as error:
            say(f"warning: skipped: {error}")
            continue
        shown = (best.get(name) for name in ("nll", "ppl", "coherence_acc", "p1", "z_mutual_information"))
        rows.append(
            [best["stage"], _name(run), f"{best['step']:,}", *("" if v is None else number(v) for v in shown)]
        )
    header = ["stage", "run", "step", "loss (nll)", "perplexity", "accuracy", "P@1 of 10", "nats of z"]
    blocks: list[Block] = [Table(header, rows, "the newest run of each stage at its best validation")]
    return Section("The curriculum", blocks if rows else [])


def _runs(runs: Sequence[Run]) -> Section:
    if not runs:
        return Section("Runs")
    rows = [
        [
            _name(run.path),
            run.stage,
            run.status,
            "" if run.step is None else f"{run.step:,}",
            run.monitor,
            "" if run.best is None else number(run.best),
            " ".join(f"{key}={text_of(value)}" for key, value in run.differs.items()),
        ]
        for run in runs
    ]
    blocks: list[Block] = [
        Table(["run", "stage", "status", "steps", "measure", "best", "what differs"], rows)
    ]
    if spread := _over_seeds(runs):
        blocks.append(spread)
    if any(run.best is not None for run in runs):
        alt = "validation curves of " + ", ".join(sorted({run.stage for run in runs}))
        blocks.append(Picture(curves(runs), alt))
    return Section("Runs", blocks)


def _over_seeds(runs: Sequence[Run]) -> Table | None:
    """Mean and standard deviation of runs that differ in nothing but their seed."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        if run.best is not None and (group := seedless(run.path)) is not None:
            groups[run.stage, group].append(run)
    rows = [
        [
            f"{stage}: {Path(same[0].path).parent.name}, {len(same)} seeds",
            " ".join(f"{key}={text_of(v)}" for key, v in same[0].differs.items() if key != "seed"),
            same[0].monitor,
            number(mean(_bests(same))),
            number(stdev(_bests(same))),
        ]
        for (stage, _), same in groups.items()
        if len(same) > 1
    ]
    header = [
        "runs that differ in their seed",
        "what else is theirs",
        "measure",
        "mean",
        "standard deviation",
    ]
    if not any(row[1] for row in rows):
        header, rows = header[:1] + header[2:], [row[:1] + row[2:] for row in rows]
    return Table(header, rows) if rows else None


def _name(run: str | Path) -> str:
    """Enough of a run's path to know it; the whole one stands at the end of the page."""
    return "/".join(Path(run).parts[-2:])


def _bests(runs: Iterable[Run]) -> list[float]:
    return [run.best for run in runs if run.best is not None]


def seedless(path: str) -> str | None:
    """What a run is apart from its seed; None for what is no run."""
    try:
        config = RunFolder(Path(path)).lineage().get("config")
    except UserError:
        return None
    return fingerprint({key: value for key, value in config.items() if key != "seed"}) if config else None


# ----------------------------------------------------------------------------------------- the paper's tables


def _paper(found: Found) -> Section:
    talk, static, choice = _ours(found.results)
    blocks: list[Block] = []
    if talk:
        blocks += [_beside(paper.TALK, talk)]
    if static:
        blocks.append(_beside(paper.STATIC, static))
    for _, result in found.results:
        blocks += _pairs(result)
    if choice:
        blocks += [_beside(paper.SELECTION, choice), Paragraph(paper.SELECTION.note)]
    if blocks:
        blocks.insert(
            0,
            Paragraph(
                "The paper's rows are its models, trained and rated as it describes; ours are what was found "
                "here. With other raters, start utterances or tokenizations, digits are not comparable."
            ),
        )
    return Section("Beside the paper", blocks)


def _ours(results: Sequence[tuple[Path, Result]]) -> tuple[Figures, Figures, Figures]:
    """Figures of talking (table 1), of static replies (table 3) and of selection (table 8) by system."""
    talk: dict[str, dict[str, Figure]] = defaultdict(dict)
    static: dict[str, dict[str, Figure]] = defaultdict(dict)
    choice: dict[str, dict[str, Figure]] = defaultdict(dict)
    for _, result in sorted(results, key=lambda pair: pair[1].created):
        for system, figures in result.systems.items():
            if result.kind == "dialogues" or (result.kind == "human" and "humanness" in result.measures):
                talk[system] |= figures
            elif result.kind == "human" and "coherence" in result.measures:
                static[system] |= figures
            elif result.kind == "selection":
                for name, figure in figures.items():  # SET/MEASURE
                    of_set, _, measure = name.rpartition("/")
                    choice[f"{system} ({of_set})" if of_set else system][measure] = figure
    return _seeds_together(talk), _seeds_together(static), dict(choice)


def _seeds_together(by_system: Mapping[str, Mapping[str, Figure]]) -> Figures:
    """Systems that are runs which differ in their seed become one: the mean, and the spread as a note."""
    groups: dict[str, list[str]] = defaultdict(list)
    for system in by_system:
        groups[seedless(system) or system].append(system)
    found: dict[str, Mapping[str, Figure]] = {}
    for same in groups.values():
        if len(same) == 1:
            found[same[0]] = by_system[same[0]]
            continue
        name = f"{Path(same[0]).parent.name} ({len(same)} seeds)"
        figures: dict[str, Figure] = {}
        for measure in dict.fromkeys(measure for system in same for measure in by_system[system]):
            values = [
                figure.value
                for system in same
                if (figure := by_system[system].get(measure)) is not None and figure.value is not None
            ]
            if values:
                spread = f"± {stdev(values):.3f} over {len(values)} seeds" if len(values) > 1 else "one seed"
                figures[measure] = Figure(value=mean(values), note=spread)
        found[name] = figures
    return found


def _beside(table: paper.PaperTable, ours: Figures) -> Table:
    """The paper's rows, then ours."""
    shown = [name for name in ours if any(measure in ours[name] for measure in table.measures)]
    rows = [
        [system, *(_digits(value, measure) for measure, value in zip(table.measures, values, strict=True))]
        for system, values in table.rows.items()
    ]
    for name in shown:
        cells = []
        for measure in table.measures:
            figure = ours[name].get(measure)
            told = text(figure, Measure(label="", digits=paper.DIGITS.get(measure, 3)))
            note = (
                f" {figure.note}" if figure is not None and figure.value is not None and figure.note else ""
            )
            cells.append(f"{told}{note}" if figure is not None else "not measured")
        rows.append([name, *cells])
    header = ["system", *(paper.LABELS[measure] for measure in table.measures)]
    first = len(table.rows)
    caption = f"The paper's table {table.number}. {table.title}"
    return Table(header, rows, caption, frozenset(range(first, first + len(shown))))


def _digits(value: float, measure: str) -> str:
    return f"{value:.{paper.DIGITS.get(measure, 3)}f}"


def _pairs(result: Result) -> list[Block]:
    """Tables 4 and 5: wins, ties and losses, where people compared two systems."""
    pairs = [pair for pair in result.details.get("comparisons", []) if pair.get("of") == "pair"]
    if result.kind != "human" or not pairs:
        return []
    header = ["question", "first", "second", "first wins", "tie", "second wins", "p (sign test)"]
    rows = [
        [f"{pair.question} (table {pair.number})", *pair.systems, *map(str, pair.counts), ""]
        for pair in paper.PAIRS
    ]
    ours = [
        [
            *(str(pair[key]) for key in ("question", "system", "other", "wins", "ties", "losses")),
            f"{pair['p']:.3g}",
        ]
        for pair in pairs
    ]
    first = len(rows)
    caption = "The paper's tables 4 and 5: two systems side by side"
    return [Table(header, [*rows, *ours], caption, frozenset(range(first, first + len(ours))))]


# --------------------------------------------------------------------------------------------- evaluations


def _evaluation(path: Path, result: Result) -> Section:
    what = KINDS.get(result.kind, (result.kind,))[0]
    title = f"{what[:1].upper()}{what[1:]}: {path.name}"
    withheld = result.details.get("withheld") or []
    blocks: list[Block] = []
    if result.kind == "judge":
        blocks.append(Paragraph("An LLM's verdicts, which are not people's."))
    for why in withheld:
        blocks.append(Paragraph(f"withheld: {why}", strong=True))
    alarm = result.details.get("alarm")
    if isinstance(alarm, str) and alarm:
        blocks.append(Paragraph(alarm, strong=True))
    shown = {
        name: measure
        for name, measure in result.measures.items()
        if any(name in figures for figures in result.systems.values())
    }
    if result.systems and shown:
        with_chance = any(measure.chance is not None for measure in shown.values())
        header = ["measure", *(["chance"] if with_chance else []), *result.systems, "n"]
        rows = []
        for name, measure in shown.items():
            chance = "" if measure.chance is None else f"{measure.chance:.{measure.digits}f}"
            figures = [figures.get(name) for figures in result.systems.values()]
            n = dict.fromkeys(
                f"{figure.n:,}" for figure in figures if figure is not None and figure.n is not None
            )
            rows.append(
                [
                    measure.label,
                    *([chance] if with_chance else []),
                    *(text(figure, measure) for figure in figures),
                    " / ".join(n),
                ]
            )
        blocks.append(Table(header, rows))
        if any(_is_number(figure) for figures in result.systems.values() for figure in figures.values()):
            blocks.append(Picture(picture(result), f"{title}: each measure with its interval"))
    if agreement := _agreement(result):
        blocks.append(agreement)
    return Section(title, blocks)


def _is_number(figure: Figure) -> bool:
    return figure.value is not None and math.isfinite(figure.value)


def _agreement(result: Result) -> Table | None:
    """How far raters agree, beside the paper's."""
    found = result.details.get("agreement")
    if result.kind != "human" or not isinstance(found, dict):
        return None
    rows = [["the paper, all questions", f"{paper.KAPPA:.3f}", "", ""]]
    for name, one in found.items():
        values = (one.get(key) for key in ("fleiss_kappa", "krippendorff_alpha", "plain"))
        rows.append([name, *("n/a" if value is None else f"{value:.3f}" for value in values)])
    header = ["agreement of raters", "Fleiss' kappa", "Krippendorff's alpha", "plain agreement"]
    return Table(header, rows, ours=frozenset(range(1, len(rows))))


# ------------------------------------------------------------------------------------------------ dialogues


def _dialogues(results: Sequence[tuple[Path, Result]]) -> Section:
    """Dialogues of several systems that began alike, side by side."""
    by_start: dict[str, dict[str, Dialogue]] = defaultdict(dict)
    gone: list[str] = []
    for _, result in results:
        if result.kind not in ("dialogues", "replies"):
            continue
        for given in result.inputs:
            if not Path(given.path).is_file():
                gone.append(given.path)
                continue
            try:
                dialogues = read_dialogues(given.path)
            except UserError as error:
                say(f"warning: skipped: {error}")
                continue
            for dialogue in dialogues:
                names = [turn.model for turn in dialogue.turns if turn.model is not None]
                if names:
                    by_start[dialogue.start].setdefault(names[0], dialogue)
    most = sorted(by_start.values(), key=len, reverse=True)[:SIDE_BY_SIDE]
    blocks: list[Block] = [
        Dialogues(
            list(same),
            [
                [(turn.model or turn.speaker or "given", turn.text) for turn in dialogue.turns]
                for dialogue in same.values()
            ],
        )
        for same in most
    ]
    if gone:
        blocks.append(Paragraph(f"Not there any more, so not shown: {', '.join(dict.fromkeys(gone))}."))
    return Section("Dialogues", blocks)


# ------------------------------------------------------------------------------------------------ provenance


def _provenance(found: Found) -> Section:
    blocks: list[Block] = []
    if found.results:
        rows = [
            [
                str(path),
                result.created,
                result.plato2,
                json.dumps(result.settings, ensure_ascii=False),
                "; ".join(f"{given.path} {(given.sha256 or '')[:12]}".strip() for given in result.inputs),
            ]
            for path, result in found.results
        ]
        blocks.append(Table(["result", "created", "plato2", "settings", "inputs, SHA-256"], rows))
    if found.runs:
        rows = []
        for path in found.runs:
            lineage = RunFolder(path).lineage()
            packages = lineage.get("packages") or {}
            data = lineage.get("data") or {}
            git = lineage.get("git") or {}
            rows.append(
                [
                    str(path),
                    str(lineage.get("created", ""))[:19],
                    str((lineage.get("config") or {}).get("seed", "")),
                    f"{git.get('commit', '')[:12]}{' and changes' if git.get('dirty') else ''}",
                    " ".join(f"{name} {version}" for name, version in packages.items()),
                    " ".join(f"{key}={value}" for key, value in data.items()),
                ]
            )
        blocks.append(Table(["run", "created", "seed", "commit", "packages", "data"], rows))
    return Section("Settings, versions, hashes", blocks)
