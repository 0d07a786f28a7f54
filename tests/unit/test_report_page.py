"""`plato2 report`: one page from runs and results, as HTML, Markdown and on the terminal."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import wandb
from runs import make_run, write_metrics
from small import ROOT, assert_one_line, environment
from typer.testing import CliRunner
from wandb_server import WandbServer

from plato2.commands import app
from plato2.config import UserError
from plato2.evaluate.results import Figure, Measure, Result, inputs, write_result
from plato2.report import paper, training
from plato2.report.found import find
from plato2.report.page import Table
from plato2.report.sections import sections
from plato2.runs.folder import RunFolder
from plato2.runs.panels import PANELS, tensorboard_layout
from plato2.runs.traces import Trace

EVIL = "<script>alert(1)</script> | *b* [x](javascript:alert(2)) \x1b[31m"
"""A reply that wants to be more than text, in HTML, in Markdown and on a terminal."""


def figures(**values: float) -> dict[str, Figure]:
    return {
        name: Figure(value=value, low=value - 0.01, high=value + 0.01, n=200)
        for name, value in values.items()
    }


def measures(*names: str) -> dict[str, Measure]:
    return {name: Measure(label=paper.LABELS.get(name, name)) for name in names}


def chats(path: Path, system: str, reply: str) -> Path:
    turns = [{"speaker": "A", "model": None, "text": "do you drink ?"}]
    turns.append({"speaker": "B", "model": system, "text": reply})
    path.write_text(json.dumps({"turns": turns}) + "\n")
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two seeds of a run, a run of another stage, and results of several kinds."""
    folder = tmp_path / "work"
    for seed in (1, 2):
        run = make_run(folder / "outputs" / "tiny-2_gen" / f"seed-{seed}", "2_gen")
        write_metrics(run, [(2, "val/loss", 5.0 + seed), (2, "val/nll", 4.0 + seed), (2, "val/ppl", 50.0)])
        config = {"seed": seed, "model": {"n_layer": 2}}
        RunFolder(run).write_lineage(created=f"2026-01-0{seed}", curriculum="one", config=config)
    results = folder / "results"
    results.mkdir()
    names = [str(folder / "outputs" / "tiny-2_gen" / f"seed-{seed}") for seed in (1, 2)]
    files = [
        chats(results / f"{n}.jsonl", name, reply)
        for n, (name, reply) in enumerate(zip((*names, "rival"), (EVIL, "yes", "no"), strict=True))
    ]
    talking = Result(
        kind="dialogues",
        inputs=inputs(*files),
        settings={"seed": 7},
        measures=measures("distinct_1", "distinct_2", "length"),
        systems={
            names[0]: figures(distinct_1=0.1, distinct_2=0.5, length=9),
            names[1]: figures(distinct_1=0.2, distinct_2=0.5, length=11),
            "rival": figures(distinct_1=0.3, distinct_2=0.6),
        },
    )
    write_result(results / "dialogues.json", talking)
    pairs = {"question": "engagingness", "of": "pair", "system": "stage 1", "other": "stage 2"}
    pairs |= {"wins": 4, "ties": 5, "losses": 6, "p": 0.75}
    human = Result(
        kind="human",
        measures=measures("coherence", "humanness"),
        systems={"rival": figures(coherence=1.5, humanness=1.25)},
        details={
            "comparisons": [pairs],
            "agreement": {"coherence": {"fleiss_kappa": 0.5, "krippendorff_alpha": None, "plain": 0.75}},
        },
    )
    write_result(results / "human.json", human)
    choice = Result(
        kind="selection",
        measures=measures("dev/map", "dev/mrr", "dev/p1"),
        systems={"shared words": figures(**{"dev/map": 0.79, "dev/mrr": 0.94, "dev/p1": 0.9})},
    )
    write_result(results / "selection.json", choice)
    judge = Result(kind="judge", measures={}, systems={}, details={"withheld": ["it takes the first"]})
    write_result(results / "judge.json", judge)
    (results / "broken.json").write_text((results / "human.json").read_text()[:-40])
    (results / "other.json").write_text('{"a": 1}')
    return folder


def run(*arguments: str | Path) -> Any:
    """`plato2 report`; the fixture stands for its two folders."""
    given: list[str] = []
    for argument in arguments:
        of_fixture = isinstance(argument, Path) and argument.name == "work"
        given += [str(argument / "outputs"), str(argument / "results")] if of_fixture else [str(argument)]
    return CliRunner().invoke(app, ["report", *given], env={"COLUMNS": "250"})


class Page(HTMLParser):
    """What a browser makes of it: tags, and the texts of table cells by row."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.rows[-1][-1] += data


def row(rows: list[list[str]], first: str) -> list[str]:
    return next([cell.strip() for cell in found] for found in rows if found and found[0].strip() == first)


def test_a_page_of_everything(place: Path) -> None:
    out = place / "report.html"
    done = run(place, "--out", out)
    assert done.exit_code == 0, done.output
    assert "broken.json: not valid JSON" in done.stderr
    assert "other.json" not in done.stderr
    page = Page(out)
    # the paper's table 1, its numbers, and ours: two seeds are one line
    assert row(page.rows, "PLATO-2 1.6B")[1:] == [
        "1.920",
        "1.892",
        "1.840",
        "1.740",
        "0.169",
        "0.613",
        "15.7",
    ]
    seeds = row(page.rows, "tiny-2_gen (2 seeds)")
    assert seeds[1:5] == ["not measured"] * 4
    assert seeds[5] == "0.150 ± 0.071 over 2 seeds"
    rival = row(page.rows, "rival")
    assert rival[1] == "1.500 (1.490 to 1.510)"
    assert rival[2] == "not measured"
    # tables 4 and 5, agreement, the judge, what is missing
    assert row(page.rows, "engagingness (table 5)")[1:6] == [
        "PLATO-2 stage 1",
        "PLATO-2 stage 2",
        "3",
        "31",
        "16",
    ]
    assert row(page.rows, "engagingness")[1:] == ["stage 1", "stage 2", "4", "5", "6", "0.75"]
    assert row(page.rows, "the paper, all questions")[1] == "0.466"
    assert row(page.rows, "coherence")[1:] == ["0.500", "n/a", "0.750"]
    text = out.read_text(encoding="utf-8")
    assert "withheld: it takes the first" in text
    assert row(page.rows, "the latents")[1].startswith("plato2 evaluate latents")
    assert row(page.rows, "shared words (dev)")[1] == "0.790 (0.780 to 0.800)"
    missing = next(cells[0] for cells in page.rows if cells and cells[0].startswith("people's ratings of"))
    assert missing.count("seed-") == 2
    assert "rival" not in missing
    # runs, their spread, provenance
    assert row(page.rows, "2_gen: tiny-2_gen, 2 seeds")[1:] == ["val/nll", "5.5", "0.7071"]
    assert '{"seed": 7}' in "".join("".join(cells) for cells in page.rows)


def test_the_curriculum_in_its_order_and_what_it_was_made_with(tmp_path: Path) -> None:
    """A heading stands over its numbers, also where the first run has none of them."""
    for n, (stage, metric) in enumerate(
        [("2_eval", "val/coherence_acc"), ("2_gen", "val/nll"), ("1_coarse", "val/loss")]
    ):
        run_folder = make_run(tmp_path / f"tiny-{stage}" / "a", stage)
        write_metrics(run_folder, [(2, metric, 0.5), (2, "val/z_mutual_information", 0.25)])
        git = {"commit": "0123456789abcdef", "dirty": stage == "2_gen"}
        created = f"2026-01-0{n + 1}T23:30:05.049420+00:00"
        RunFolder(run_folder).write_lineage(created=created, git=git)
    out = tmp_path / "r.html"
    assert run(tmp_path, "--out", out).exit_code == 0
    rows = Page(out).rows
    place = next(n for n, found in enumerate(rows) if found and found[-1].strip() == "nats of z")
    assert [found[0].strip() for found in rows[place + 1 : place + 4]] == ["1_coarse", "2_gen", "2_eval"]
    assert '<th scope="col" class="number">accuracy</th>' in out.read_text()
    commits = {found[3].strip() for found in rows if found[1].strip().endswith("T23:30:05")}
    assert commits == {"0123456789ab", "0123456789ab and changes"}


def test_nothing_on_the_page_is_from_elsewhere_or_runs(place: Path) -> None:
    out = place / "report.html"
    run(place, "--out", out)
    page, text = Page(out), out.read_text(encoding="utf-8")
    assert EVIL.partition(" | ")[0] not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "\x1b" not in text
    assert {"script", "iframe", "link", "img", "object"}.isdisjoint(tag for tag, _ in page.tags)
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "xlink:href", "src"):
                assert (value or "").startswith("#")
    assert "default-src 'none'" in text


def test_markdown(place: Path) -> None:
    out = place / "report.md"
    done = run(place, "--out", out, "--title", "A *title*")
    assert done.exit_code == 0, done.output
    text = out.read_text(encoding="utf-8")
    assert text.startswith("# A \\*title\\*\n")
    assert "| PLATO-2 1.6B | 1.920 |" in text
    assert "\\<script\\>alert(1)\\</script\\>" in text
    assert not re.search(r"(?<!\\)\]\(javascript", text)
    assert "\x1b" not in text
    pictures = re.findall(r"!\[[^\]]*\]\((report_pictures/\d+\.svg)\)", text)
    assert len(pictures) >= 3
    assert all((place / picture).read_text().startswith("<svg") for picture in pictures)
    for block in re.split(r"\n\n", text):
        if block.startswith("| ") and "\n|:---" in block:
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(widths) == 1, block


def test_the_terminal(place: Path) -> None:
    done = run(place)
    assert done.exit_code == 0, done.output
    assert "PLATO-2 1.6B" in done.stdout
    assert "\x1b[31m" not in done.stdout


def test_json(place: Path) -> None:
    found = json.loads(run(place, "--json", "--out", place / "r.html").stdout)
    assert len(found["runs"]) == 2
    assert [result["kind"] for result in found["results"]] == ["dialogues", "human", "judge", "selection"]
    assert found["written"] == [str(place / "r.html")]


def test_json_of_ranks_says_what_the_page_says(tmp_path: Path) -> None:
    stopped = make_run(tmp_path / "outputs" / "tiny-1_coarse" / "stopped", "1_coarse")
    make_run(tmp_path / "outputs" / "tiny-1_coarse" / "alone", "1_coarse")
    for rank in (0, 1):
        trace = Trace(stopped, rank, 4, "first")
        trace.write("step", 120, "between")
    trace.write("late", 120, "step", waited_s=100.4, collectives=9, moves=241)
    entry = {
        "profiling_name": "gloo:all_reduce",
        "collective_seq_id": 9,
        "process_group": ["0", "default_pg"],
    }
    entry |= {"input_sizes": [[3, 4]], "frames": ["of the stack"]}
    trace.flight.write_text(json.dumps({"entries": [entry], "pg_status": {}}))
    (found,) = json.loads(run(tmp_path / "outputs", "--json").stdout)["ranks"]
    assert found["run"] == str(stopped)
    assert found["summary"] in run(stopped).stdout
    assert found["summary"].startswith("ranks 0, 2-3 of 4")
    assert (found["world"], found["without_a_trace"], found["nccl_records"]) == (4, [2, 3], [])
    first, second = found["ranks"]
    assert (first["rank"], first["event"], first["step"], first["last_collective"]) == (0, "step", 120, None)
    assert (second["event"], second["phase"], second["waited_s"]) == ("late", "step", 100.4)
    del entry["frames"]
    assert (second["collectives"], second["last_collective"]) == (9, entry)


def test_the_last_curriculum_without_arguments(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = make_run(place / "outputs" / "tiny-1_coarse" / "late", "1_coarse")
    write_metrics(later, [(2, "val/nll", 4.5), (2, "val/loss", 4.5)])
    RunFolder(later).write_lineage(created="2026-02-01", curriculum="two", config={"seed": 1})
    monkeypatch.chdir(place)
    assert json.loads(run("--json").stdout)["runs"] == ["outputs/tiny-1_coarse/late"]


def test_a_result_file_alone_and_dialogues_that_are_gone(place: Path) -> None:
    for file in (place / "results").glob("*.jsonl"):
        file.unlink()
    found = find([place / "results" / "dialogues.json"])
    made = {section.title: section.blocks for section in sections(found)}
    assert found.runs == []
    assert "Not there any more" in made["Dialogues"][0].text  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "empty: no runs and no results in it"),
        (["work/results", "--out", "r.pdf"], "--out r.pdf: give a file that ends in .html or .md"),
        (["work/results/other.json"], "other.json: "),
        (["--coarse", "x"], "--coarse: give the corpus of the runs too"),
        (["work/results", "--data", "d"], "--data d: looks closer at one curriculum"),
        (["work/results", "--out", "none/r.html"], "--out none/r.html: cannot be written"),
    ],
)
def test_bad_input(place: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.parent)
    Path("empty").mkdir()
    done = run(*arguments)
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr


@pytest.mark.slow
def test_weights_and_biases_offline(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()  # another test of this process may have used it, and it reads its variables once
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(place))
    monkeypatch.setenv("WANDB_SILENT", "true")
    done = run(place, "--wandb", "evaluations", "--out", place / "r.html")
    assert done.exit_code == 0, done.output
    (folder,) = (place / "wandb").glob("offline-run-*")
    (page,) = folder.glob("files/media/html/*.html")
    assert "PLATO-2 1.6B" in page.read_text(encoding="utf-8")
    summary = folder / "files" / "wandb-summary.json"
    if summary.exists():
        assert json.loads(summary.read_text())["dialogues/rival/distinct_1"] == 0.3


def test_the_papers_tables_are_whole() -> None:
    for table in (paper.TALK, paper.STATIC, paper.SELECTION):
        assert {*table.measures} <= {*paper.LABELS}
        assert all(len(values) == len(table.measures) for values in table.rows.values())
    assert all(sum(pair.counts) == 50 for pair in paper.PAIRS)


@pytest.fixture
def curves(tmp_path: Path) -> Path:
    """Two curriculum runs with what training logs, and replies that want to be more than text."""
    for stage, seed in (("2_gen", 1), ("2_gen", 2), ("2_eval", 1)):
        run = make_run(tmp_path / "outputs" / f"tiny-{stage}" / f"<i>{seed}&", stage)
        RunFolder(run).write_lineage(created=f"2026-01-0{seed}", curriculum="one", config={"seed": seed})
        rows = [(step, "train/loss", 9.0 / step) for step in range(1, 1001)]
        rows += [(step, "train/grad_norm", 1.0) for step in range(1, 1001)]
        if stage == "2_gen":
            rows += [(1000, f"val/z_usage_{z:02d}", z / 10) for z in range(5)] + [(1000, "val/ppl", 30.0)]
            reply = {"step": 1000, "context": ["hi", EVIL], "reference": EVIL, "candidates": [{"text": EVIL}]}
            (run / "replies.jsonl").write_text(json.dumps(reply) + "\n")
        else:
            rows += [(500, "val/coherence_acc", 0.6), (1000, "val/coherence_acc", 0.7)]
        write_metrics(run, rows)
    return tmp_path / "outputs"


def test_the_dashboard_without_a_network(curves: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    done = run(curves, "--out", out)
    assert done.exit_code == 0, done.output
    page, text = Page(out), out.read_text(encoding="utf-8")
    pictures = [given["aria-label"] for tag, given in page.tags if tag == "figure"]
    told = {str(label).partition(": ")[0] for label in pictures}
    assert {"loss, all terms", "perplexity", "share of each latent", "gradient norm, before clipping"} <= told
    assert "loss, all terms: train/loss of 3 runs" in pictures
    assert "perplexity: val/ppl of 2 runs" in pictures
    assert "tokens a second" not in told  # nothing is logged of it
    assert text.count("&lt;i&gt;1&amp;") >= 2  # names in the legend are text, as replies are
    assert not any(tag in ("script", "i", "link", "img") for tag, _ in page.tags)
    assert not re.search(r"""(src|href)=["']?https?:""", text)
    replies = [cells for cells in page.rows if len(cells) == 5 and cells[1] == "1000"]
    assert len(replies) == 2
    assert all("<script>alert(1)</script>" in cells[4] and "\x1b" not in cells[4] for cells in replies)
    assert len(text) < 400_000  # 1,000 points of a line are not drawn


def test_a_long_line_is_thinned_without_bias() -> None:
    line = [(step, float(step % 7)) for step in range(1, 10_001)]
    thin = training.thinned(line)
    assert len(thin) <= training.POINTS
    assert [step for step, _ in thin] == sorted(step for step, _ in thin)
    assert 2.8 < sum(value for _, value in thin) / len(thin) < 3.2  # the mean is 3
    assert training.thinned(line[:100]) == line[:100]


def test_damaged_metrics_and_replies_leave_the_others(
    curves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = sorted(curves.glob("tiny-2_gen/*"))
    (first / "metrics.csv").write_text("not,ours\n")
    (second / "replies.jsonl").write_text('{"step": 1000, "conte')
    found = training.section([first, second])
    assert [type(block).__name__ for block in found.blocks] == [
        "Paragraph",
        "Legend",
        *["Gallery"] * 4,
        "Table",
    ]
    told = capsys.readouterr().err
    assert str(first / "metrics.csv") in told
    assert str(second / "replies.jsonl") in told


def test_one_definition_of_the_panels(tmp_path: Path, curves: Path) -> None:
    """W&B's dashboard as a file, TensorBoard's layout and the page show the same."""
    pytest.importorskip("wandb_workspaces")
    file = tmp_path / "dashboard.json"
    done = CliRunner().invoke(app, ["dashboard", "--out", str(file)])
    assert done.exit_code == 0, done.output
    spec = json.loads(file.read_text())["spec"]["section"]
    sections = {part["name"]: part["panels"] for part in spec["panelBankConfig"]["sections"]}
    assert [*sections] == [*PANELS]
    for name, panels in PANELS.items():
        for panel, made in zip(panels, sections[name], strict=True):
            if panel.kind == "replies":
                assert '"replies"' in json.dumps(made)
                continue
            config = made["config"]
            assert config["chartTitle"] == panel.title
            if panel.kind == "latents":
                assert re.fullmatch(config["metricRegex"], "val/z_usage_07")
            else:
                assert config["metrics"] == list(panel.metrics)
    (runset,) = spec["runSets"]
    assert [one["name"] for one in runset["grouping"]] == ["group", "jobType"]
    laid_out = tensorboard_layout("2_gen")
    for name, charts in laid_out.items():
        assert [*charts] == [panel.title for panel in PANELS[name] if panel.about("2_gen")]


@pytest.mark.slow
def test_the_dashboard_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    key = {"WANDB_API_KEY": "a" * 40, "WANDB_SILENT": "true", "WANDB_CONFIG_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "plato2", "dashboard", "--project", "chat", "--entity", "someone"]
    given = {"capture_output": True, "text": True, "timeout": 200}
    with WandbServer() as server:
        online = environment(**key, WANDB_BASE_URL=server.address, PYTHONPATH=str(ROOT), WANDB_MODE="online")
        done = subprocess.run(command, env=online, **given)
        assert done.returncode == 0, done.stderr
        (view,) = server.views
        assert (view["entityName"], view["projectName"], view["displayName"]) == (
            "someone",
            "chat",
            "PLATO-2",
        )
        assert "perf/mfu" in view["spec"]
        assert done.stdout.startswith("saved: http")
    gone = subprocess.run(command, env=online, **given)
    assert gone.returncode == 2
    assert_one_line(gone.stderr, "plato2 dashboard: not saved", "--out dashboard.json")


@pytest.mark.slow
def test_the_dashboard_in_a_browser(curves: Path, tmp_path: Path) -> None:
    """No words below 8 pixels, and nothing wider than the screen, on a desk and on a telephone."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    out = tmp_path / "r.html"
    run(curves, "--out", out)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width in (1280, 390):
            tab = browser.new_page(viewport={"width": width, "height": 844})
            asked: list[str] = []
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.on("dialog", lambda dialog: pytest.fail(dialog.message))
            tab.goto(out.as_uri())
            assert asked == [out.as_uri()]
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            heights = tab.evaluate(
                "[...document.querySelectorAll('.gallery svg')].flatMap(svg => "
                "[...svg.querySelectorAll('text')].map(text => "
                "parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a))"
            )
            assert len(heights) > 20
            wide = "[...document.querySelectorAll('table')].filter(t => t.scrollWidth > t.clientWidth).length"
            assert width < 1280 or tab.evaluate(wide) == 0  # a printed page has no scroll bar
            assert min(heights) >= 8
            columns = tab.evaluate(
                "new Set([...document.querySelectorAll('.gallery figure')]"
                ".map(figure => figure.getBoundingClientRect().left)).size"
            )
            assert columns == (2 if width == 1280 else 1)
        browser.close()


@pytest.mark.slow
def test_the_page_in_a_browser(place: Path) -> None:
    """Nothing is wider than the page, also where it is narrow; printed it has no navigation."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium on the PATH")
    out = place / "report.html"
    run(place, "--out", out)
    for width in (1280, 390):
        shot = place / f"{width}.png"
        command = [
            chromium,
            "--headless",
            "--no-sandbox",
            f"--window-size={width},2400",
            f"--screenshot={shot}",
        ]
        subprocess.run([*command, out.as_uri()], check=True, capture_output=True, timeout=120)
        assert shot.stat().st_size > 20_000


def test_a_table_of_a_measure_that_nobody_has() -> None:
    assert Table(["a"], []).ours == frozenset()
    with pytest.raises(UserError, match="no such folder"):
        find([Path("nowhere")])
