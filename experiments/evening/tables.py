"""The tables of the evening as Markdown; see experiments/tables.py.

`results.json` is what run.sh made; search.json has the runs before it, which were started one by one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.tables import markdown

Results = dict[str, Any]
NAMES = {
    "tiny-1_coarse": "1, `1_coarse`",
    "tiny-2_gen": "2.1, `2_gen`",
    "tiny-2_eval_dual": "2.2, `2_eval_dual`",
    "tiny-2_eval": "2.2, `2_eval`",
}
SEARCHED = {
    "tiny-2_eval": "`first`, rate 3e-4",
    "tiny-2_eval first-9000": "`first`, twice as long",
    "tiny-2_eval first": "`first`, half copied turns",
    "tiny-2_eval_dual": "`dual`, rate 1e-3",
    "tiny-2_eval_dual dual-drop": "`dual`, dropout 0.1",
    "tiny-2_eval_dual dual-8192": "`dual`, dropout 0.1, units of 8,192",
    "tiny-2_eval_dual dual-8192-seed1": "the same, another seed",
}
VARIETY = {
    "greedy_different": "how many of 20 greedy candidates differ",
    "greedy_distinct_2": "distinct-2 of these",
    "distinct_2_between_z": "distinct-2 of 20 latents' samples",
    "distinct_2_within_z": "of 20 samples of one latent",
    "distinct_2_difference": "difference on the same contexts",
    "distinct_2_stage_1": "distinct-2 of 20 samples of stage 1",
}
ONE_PIECE = "in one piece"
BEFORE = "before, float32"


def times(results: Results) -> str:
    """Minutes of each run, and CPU minutes of its steps."""
    rows = []
    for name, run in results["runs"].items():
        last = [row for row in run["validations"] if "cpu_s" in row][-1]
        steps = f"{run['config']['trainer']['max_steps']:,}"
        rows.append([NAMES[name], steps, f"{run['minutes']:.1f}", f"{last['cpu_s'] / 60:.1f}"])
    total = sum(run["minutes"] for run in results["runs"].values())
    rows.append(["all four", "", f"{total:.1f}", ""])
    rows.append(
        ["`run.sh`, with the closing report and all of below", "", f"{results['about']['minutes']:.1f}", ""]
    )
    return markdown(["stage", "steps", "minutes, validations included", "CPU minutes of the steps"], rows)


def coarse(results: Results) -> str:
    """Perplexity of stage 1 by steps."""
    both = {ONE_PIECE: results, BEFORE: _search()}
    found = {
        label: {row["step"]: row["ppl"] for row in one["runs"]["tiny-1_coarse"]["validations"]}
        for label, one in both.items()
    }
    steps = list(found[BEFORE])
    rows = [[label, *(f"{by_step[step]:.1f}" for step in steps)] for label, by_step in found.items()]
    return markdown(["run", *(f"{step:,}" for step in steps)], rows)


def fine(results: Results) -> str:
    """Stage 2.1 by steps."""
    rows = [
        [
            label,
            f"{row['step']:,}",
            f"{row['z_mutual_information']:.2f}",
            f"{row['z_effective']:.1f}",
            f"{row['z_in_use']:.0f}",
            f"{row['ppl']:.1f}",
            f"{row['ppl_uniform']:.1f}",
            f"{row['greedy_different']:.1f}",
            f"{row['distinct_2_between_z']:.3f}",
            f"{row['distinct_2_within_z']:.3f}",
        ]
        for label, one in ((ONE_PIECE, results), (BEFORE, _search()))
        for row in one["runs"]["tiny-2_gen"]["validations"]
    ]
    head = ["run", "steps", "mutual information, nats", "latents in effect", "with 2 % or more"]
    head += ["perplexity, z from the posterior", "z uniform", "greedy: how many of 20 differ"]
    return markdown([*head, "distinct-2 of 20 latents", "of 20 samples of one latent"], rows)


def variety(results: Results) -> str:
    """What the latents do to candidates at the end, with intervals over contexts."""
    found = results["latents"]["variety"]
    rows = [
        [label, f"{found[name]['mean']:.3f} ({found[name]['low']:.3f} to {found[name]['high']:.3f})"]
        for name, label in VARIETY.items()
    ]
    return markdown([f"of {found['n_contexts']} contexts", "mean (95 %)"], rows)


def mixture(results: Results) -> str:
    """Perplexities of p(r|c) on every third validation sample."""
    ours, before = results["mixture"]["perplexity"], _search()["mixture"]["perplexity"]
    rows = [
        [ONE_PIECE, *(f"{ours[name]:.1f}" if name in ours else "" for name in before)],
        [BEFORE, *(f"{value:.1f}" for value in before.values())],
    ]
    return markdown(["run", *before], rows)


def heads(results: Results) -> str:
    """Both heads of stage 2.2 beside shared words."""
    one = results["runs"]
    last = one["tiny-2_eval_dual"]["validations"][-1]
    simple = [f"{last[f'overlap_{name}']:.3f}" for name in ("pair_acc", "p1", "p1_matched", "mrr")]
    rows = [["shared words", "", "", "", "", *simple, ""]]
    for name in ("tiny-2_eval", "tiny-2_eval_dual"):
        head = "`first`" if name == "tiny-2_eval" else "`dual`"
        rows += [[head, *_choosing(row)] for row in one[name]["validations"]]
    return markdown(HEADS, rows)


def searched(results: Results) -> str:
    """The runs before it."""
    del results
    runs = _search()["runs"]
    return markdown(HEADS, [[SEARCHED[name], *_choosing(runs[name]["validations"][-1])] for name in SEARCHED])


def controls(results: Results) -> str:
    """What the evaluation models find on texts that were spoilt."""
    found = results["controls"]["models"]
    models = {"`first`": "2_eval/", "`dual`": "2_eval_dual/"}
    columns = {
        label: next(rows for name, rows in found.items() if part in name) for label, part in models.items()
    }
    texts = list(columns["`dual`"])
    rows = [
        [text, *(", ".join(f"{by[text][key]:.3f}" for key in CONTROLS) for by in columns.values())]
        for text in texts
    ]
    simple = found["shared words"]["as they are"]
    rows.append(["shared words, as they are", ", ".join(f"{simple[key]:.3f}" for key in CONTROLS), ""])
    return markdown(["pair accuracy, P@1, P@1 same length", *columns], rows)


HEADS = ["head", "steps", "pairs read", "CPU s", "accuracy", "pair accuracy", "P@1", "P@1, same length"]
HEADS = [*HEADS, "MRR", "human first of 21 (95 %)"]
CONTROLS = ("pair_acc", "p1", "p1_matched")


def _choosing(row: dict[str, float]) -> list[str]:
    first = f"{row['human_first']:.3f} ({row['human_first_low']:.3f} to {row['human_first_high']:.3f})"
    figures = [f"{row[name]:.3f}" for name in ("coherence_acc", "pair_acc", "p1", "p1_matched", "mrr")]
    return [f"{row['step']:,}", f"{row['samples']:,.0f}", f"{row['cpu_s']:,.0f}", *figures, first]


def _search() -> Results:
    found: Results = json.loads((Path(__file__).parent / "search.json").read_text(encoding="utf-8"))
    return found
