"""Experiments say what they found: tables are those of results.json, the text has no numbers of its own."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from small import ROOT

EXPERIMENTS = ROOT / "experiments"
TABLES = runpy.run_path(str(EXPERIMENTS / "tables.py"))
NAMES = sorted(path.parent.name for path in EXPERIMENTS.glob("*/README.md"))
DOCUMENTS: list[Path] = TABLES["documents"]()


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_tables_are_those_of_the_results(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == TABLES["filled"](text), "python experiments/tables.py fills the tables"


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if EXPERIMENTS in path.parents], ids=names)
def test_numbers_of_the_text_stand_in_the_tables(path: Path) -> None:
    """Numbers with a point, such as 0.714; where a table gives more digits, the text may round them."""
    assert stray_numbers(path.read_text(encoding="utf-8")) == []


def stray_numbers(text: str) -> list[str]:
    """Numbers with a point in the text around the tables that none of the tables has."""
    place: re.Pattern[str] = TABLES["PLACE"]
    known = [float(n) for found in place.finditer(text) for n in re.findall(r"\d+\.\d+", found[0])]
    # Versions and file names have letters or more points beside them; `2.1` is a stage.
    around = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", place.sub(" ", text), flags=re.S)
    around = re.sub(r"\b([Ss]tages?|section|BY-NC-SA) \d\.\d( and \d\.\d)?", " ", around)
    said = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\w)", around)
    return [n for n in said if not any(f"{x:.{len(n.partition('.')[2])}f}" == n for x in known)]


def test_results_say_nothing_of_the_machine_that_they_were_made_on() -> None:
    """No value is an absolute path."""
    kept = [path for kind in ("json", "yaml") for path in EXPERIMENTS.rglob(f"*.{kind}")]
    assert len(kept) > 50
    found = {
        path: re.findall(r"[\"' ](/[\w.-]+/[\w./-]*)", path.read_text(encoding="utf-8")) for path in kept
    }
    assert {names(path): paths for path, paths in found.items() if paths} == {}


def test_the_check_itself_finds_a_number_of_its_own() -> None:
    place = "<!-- results: x y -->\n\n| 0.7142 | 0.5 |\n\n<!-- end -->\n"
    assert stray_numbers(f"{place} of stage 2.1: 0.714, 0.71, 0.5") == []
    assert stray_numbers(f"{place} 0.715 and 0.6, 0.7142.") == ["0.715", "0.6"]


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_can_be_found_and_repeated(name: str) -> None:
    assert f"({name}/README.md)" in (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    text = (EXPERIMENTS / name / "README.md").read_text(encoding="utf-8")
    assert (EXPERIMENTS / name / "results.json").exists() != ("Not run yet." in text)
    assert (EXPERIMENTS / name / "run.sh").exists()
