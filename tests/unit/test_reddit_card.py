"""The data card of a Reddit corpus: no message is lost without a line, and no name from a dump is markup."""

import csv
import dataclasses
import gzip
import hashlib
import itertools
import json
import re
from collections import Counter
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.reddit_dumps import Shares, write_dumps
from plato2.config import UserError
from plato2.data.shards import read_index
from plato2.prepare.dialogues import check_target
from plato2.prepare.reddit import card, card_page
from plato2.prepare.reddit.funnel import FunnelFacts
from plato2.prepare.reddit.nodes import Counts
from plato2.prepare.reddit.options import RedditOptions
from plato2.prepare.reddit.pipeline import prepare_reddit
from plato2.prepare.reddit.rules import RedditRules
from plato2.prepare.without import Removed

ROOT = Path(__file__).parents[2]
KNOVER = ROOT / "tests" / "fixtures" / "knover"
REAL = ROOT.parent / "shared" / "data" / "reddit_pushshift"
START = 1_293_840_000  # 2011-01-01
EVIL = [
    '<script>alert("x")</script>',
    "--><img src=x onerror=alert(1)>",
    "a|b`c`**d**[e](f)",
    r"$\frac{1$",
    "two\nlines\x01",
    "#aebccd",
    "中文",
    "",
]


def prepare(comments: list, out: Path, **changes) -> Path:
    values = {"comments": [str(path) for path in comments], "out": str(out), "tokenizer": str(KNOVER)}
    return prepare_reddit(RedditOptions(**values | {"workers": 1} | changes), show_progress=False)


def comment(number: int, parent: str, text: str = "", **keys) -> dict:
    words = text or f"this is what comment number {number} has to say about the weather"
    line = {"id": f"c{number:05d}", "parent_id": parent, "link_id": "t3_abc", "body": words, "author": "ann"}
    return line | {"subreddit": "pics", "created_utc": START + 3600 * number} | keys


def chain(n: int, subreddits: list[str]) -> list[dict]:
    """Comments that reply to each other."""
    return [
        comment(i, f"t1_c{i - 1:05d}" if i else "t3_abc", subreddit=subreddits[i % len(subreddits)])
        for i in range(n)
    ]


def write(path: Path, lines: list) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def table(card: str, title: str, number: int = 0) -> list[list[str]]:
    """The rows of a table under a heading."""
    section = card.split(f"## {title}\n")[1].split("\n## ")[0]
    found = re.findall(r"(?:^\|.*\n?)+", section, re.M)[number]
    return [re.split(r"(?<!\\) ?\| ?", row.strip("| ")) for row in found.strip().split("\n")][2:]


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def hundredths(cell: str) -> int:
    return int(cell.removesuffix("%").replace(".", ""))


def check_adds_up(folder: Path, files: list[Path]) -> None:
    """Every line of the files is in the card once, in total and by month."""
    lines = []
    for path in files:
        data = path.read_bytes()
        lines += (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()
    per_month = Counter(
        f"{datetime.fromtimestamp(int(float(json.loads(line)['created_utc'])), UTC):%Y-%m}" for line in lines
    )
    facts = json.loads((folder / "index.json").read_text())["facts"]
    assert {month: counts["read"] for month, counts in facts["months"].items()} == per_month
    for counts in facts["months"].values():
        assert sum(counts.values()) == 2 * counts["read"]
    assert sum(facts["counts"].values()) == 2 * len(lines)
    by_stage_1 = sum(facts["counts"][name] for name in facts["alone"])
    assert by_stage_1 == len(lines) - sum(facts["kept"].values())
    assert sum(
        facts["hits"].get(month, {}).get(name, 0) for month in facts["months"] for name in facts["alone"]
    )

    card = (folder / "card.md").read_text()
    assert "not accounted for" not in card
    funnel = table(card, "From messages to samples")
    assert funnel[0] == ["= messages read", f"{len(lines):,}", "100.00%"]
    ends = [row for row in funnel if row[0].startswith(("- ", "of these "))]
    assert sum(number(row[1]) for row in ends) == len(lines)
    assert sum(hundredths(row[2]) for row in ends) == 100_00
    left = [number(row[1]) for row in funnel if row[0].startswith("= ")]
    index = read_index(folder)
    not_chosen = facts["n_candidates"] - facts["n_valid"]
    not_chosen += facts["n_held_out"] - facts["n_test"]
    assert left[2] == sum(split.samples for split in index.splits.values()) + not_chosen
    months = table(card, "Months")
    assert [row[0] for row in months] == [*sorted(per_month), "all"]
    for column, total in ((1, left[0]), (2, left[1]), (4, left[2])):
        assert sum(number(row[column]) for row in months[:-1]) == number(months[-1][column]) == total
    with (folder / "subreddits.csv").open(newline="") as file:
        forums = list(csv.DictReader(file))
    assert sum(int(row["read"]) for row in forums) == left[0]
    assert sum(int(row["kept"]) for row in forums) == left[1]


def test_adds_up_on_real_comments(tmp_path):
    files = sorted(REAL.glob("*comments.ndjson*"))
    if not files:
        pytest.skip("needs shared/data/reddit_pushshift")
    folder = prepare(files, tmp_path / "out")
    check_adds_up(folder, files)
    rows = table((folder / "card.md").read_text(), "Sources")
    hashes = [f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`" for path in files]
    assert [(row[0].replace("\\", ""), row[5]) for row in rows] == list(
        zip([path.name for path in files], hashes, strict=True)
    )


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> tuple[Path, list[Path]]:
    """A corpus of three months with everything a message can be lost for, and its dumps."""
    folder = tmp_path_factory.mktemp("generated")
    shares = Shares(cycles=0.005, duplicates=0.02, repeats=0.1)
    rules = RedditRules(max_repeats=8)
    dumps = write_dumps(folder, 1500, compression="gz", shares=shares, offensive_words=("hell",)).comments
    return prepare(dumps, folder / "out", rules=rules, valid_samples=5), dumps


def test_adds_up_on_generated_dumps(generated):
    folder, dumps = generated
    check_adds_up(folder, dumps)
    facts = json.loads((folder / "index.json").read_text())["facts"]
    losses = ("no text", "the same message again", "in or below a cycle", "7. repeated more than 8 times")
    for name in losses:
        assert facts["counts"][name], name
    assert facts["n_candidates"] > facts["n_valid"] == 5


def test_the_papers_corpus_is_that_of_the_language(generated, tmp_path, monkeypatch):
    for name in ("draw_lengths", "write_page"):  # pictures take most of the time
        monkeypatch.setattr(card, name, lambda path, *_: path.touch())
    english = (generated[0] / "card.md").read_text()
    assert "| paper (English, Reddit) | 684M |  |  |  |  | 2.78 | 26.3 |" in english
    text = "今天天气真好我们去公园散步吧"
    lines = [comment(i, f"t1_c{i - 1:05d}" if i else "t3_abc", text[i % 7 :] + text[:9]) for i in range(60)]
    dump = write(tmp_path / "RC_2011-01", lines)
    folder = prepare([dump], tmp_path / "out", language="zh", tokenizer=None, vocab_pieces=60)
    assert "| paper (Chinese) |  |  |  |  |  | 2.82 | 22.2 |" in (folder / "card.md").read_text()


def test_the_same_counts_give_the_same_card(generated, tmp_path):
    folder, dumps = generated
    again = prepare(dumps, tmp_path / "out", rules=RedditRules(max_repeats=8), valid_samples=5)
    for name in ("card.html", "subreddits.csv", "lengths.png"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    cards = [re.sub("prepared: .*", "", (path / "card.md").read_text()) for path in (folder, again)]
    assert cards[0] == cards[1]


def test_the_page_needs_nothing_else(generated):
    page = (generated[0] / "card.html").read_text()
    assert page.count("<svg ") == page.count("</svg>") == page.count('role="img" aria-label="') == 7
    assert "<script" not in page
    loaded = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert {address for address in loaded if not address.startswith("#")} == {
        "card.md",
        "index.json",
        "subreddits.csv",
    }
    assert not re.search(r"url\((?!#)", page)
    # every colour is one of the page's variables or of the stack, which suits light and dark
    assert not re.search("(fill|stroke): #(000000|1b2430|aebccd)", page)


@pytest.mark.parametrize("n_months", [1, 5, 6, 14, 30, 31, 84, 85, 164, 420])
def test_labels_of_months_do_not_overlap(n_months):
    figure = Figure(figsize=(card_page._WIDTH, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    card_page._label_months(axes, [f"{2005 + i // 12}-{i % 12 + 1:02d}" for i in range(11, 11 + n_months)])
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


class Reader(HTMLParser):
    """What a browser makes of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_names_are_text(tmp_path):
    name = '<script>alert(1)|`x`"&amp;.ndjson'
    lines = [*chain(40, EVIL), "<b>no JSON</b>", '{"body": 1, "id": "<i>"}', "", " "]
    folder = prepare(
        [write(tmp_path / name, lines)], tmp_path / "out", on_broken="skip", rules=RedditRules.off()
    )
    card = (folder / "card.md").read_text()
    outside_of_code = re.sub("```json\n.*?\n```|`[^`\n]*`", "", card, flags=re.S)
    assert not re.search(r"<[a-z/!]", outside_of_code)
    for title, n_cells in (("Sources", 6), ("Subreddits", 4)):
        for row in table(card, title):
            assert len(row) == n_cells, row
    assert [row[1] for row in table(card, "Sources", 1)] == ["44", "2", "2", "40"]
    assert str(tmp_path) not in card.split("## Options")[0]  # also not before the broken lines
    page = Reader((folder / "card.html").read_text())
    assert not page.tags & {"script", "img", "b", "i"}
    short = [" ".join(name.replace("\x01", " ").split()) or "(none)" for name in EVIL]
    assert set(short) <= set(page.texts)
    with (folder / "subreddits.csv").open(newline="") as file:
        assert {row["subreddit"] for row in csv.DictReader(file)} == set(EVIL)


def test_one_month_without_anything_broken_or_left_over(tmp_path):
    folder = prepare(
        [write(tmp_path / "one", chain(40, ["pics"]))], tmp_path / "out", rules=RedditRules.off()
    )
    card = (folder / "card.md").read_text()
    check = dict(row[:2] for row in table(card, "From messages to samples"))
    assert check["of these after the cut-off, not chosen"] == "0"
    assert check["= samples"] == "39"
    assert check["- first of its tree: context only"] == "1"
    assert table(card, "Sources", 1) == [
        ["lines read", "40"],
        ["- empty", "0"],
        ["- could not be read", "0"],
        ["= messages", "40"],
    ]
    assert "The first of the lines" not in card
    assert [row[0] for row in table(card, "Months")] == ["2011-01", "2011-02", "all"][::2]
    assert "of 2011-01 became 39 samples" in (folder / "card.html").read_text()


def test_a_file_that_was_cut_short_is_named(tmp_path):
    whole = gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in chain(3000, ["pics"])), 1)
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    card = (
        prepare([tmp_path / "cut.gz"], tmp_path / "out", on_broken="skip", rules=RedditRules.off())
        / "card.md"
    ).read_text()
    assert table(card, "Sources")[0][4] == "ends in the middle of its compressed stream"
    assert "**1 of 1 files were cut short.**" in card


def test_index_has_the_biggest_subreddits_only():
    forums = {f"forum{i:03d}": Counter(read=2 if i >= 100 else 1, kept=1) for i in range(150)}
    facts = FunnelFacts.of(
        Counts(subreddits=forums), None, {}, RedditRules.off(), [], 0, 0, [], {}, Removed([])
    ).plain()
    assert list(facts["subreddits"]) == [*list(forums)[100:], *list(forums)[:50]]
    assert facts["subreddits"]["forum149"] == {"read": 2, "kept": 1}
    assert facts["other_subreddits"] == {"subreddits": 50, "read": 50, "kept": 50}


def test_a_count_that_is_missing_has_a_line():
    counts = Counts(funnel={"2011-01": Counter(read=10, kept=7, **{"no text": 3})})
    facts = FunnelFacts.of(counts, None, {}, RedditRules.off(), [], 0, 0, [], {}, Removed([]))
    assert [(step.name[:8], step.n) for step in facts.steps() if step.n] == [
        ("messages", 10),
        ("no text", 3),
        ("kept by ", 7),
        ("not acco", 7),
    ]
    assert dataclasses.replace(facts, kept={"2011-01": 6}).steps()[2].n == 1


def test_a_corpus_is_replaced_with_its_card_and_nothing_else(generated):
    folder = generated[0]
    check_target(folder, force=True)
    foreign = folder / "mine.csv"
    foreign.touch()
    with pytest.raises(UserError, match=r"mine\.csv, which is not replaced"):
        check_target(folder, force=True)
    foreign.unlink()
