"""What the judges said of themselves and of the systems, from the files of plato2 evaluate judge.

python experiments/judge/collect.py outputs/judge
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from plato2.evaluate.results import Result, read_result
from plato2.runs.folder import provenance

HERE = Path(__file__).parent
JUDGES = ("smollm2", "words", "coherence")
SETTINGS = ("question", "speaker", "pairs", "controls", "seed", "temperature", "max_tokens")


def figures(result: Result) -> dict[str, Any]:
    """Controls, and the table where it was not withheld."""
    return {
        "controls": {one["name"]: one["figures"] for one in result.details["controls"]},
        "withheld": result.details["withheld"],
        "judge": result.details["judge"],
        "systems": {
            system: {name: figure.model_dump() for name, figure in found.items()}
            for system, found in result.systems.items()
        },
    }


def main() -> None:
    """Writes results.json."""
    found: dict[str, Any] = {"about": provenance(), "settings": {}, "judges": {}}
    for judge in JUDGES:
        result = read_result(Path(sys.argv[1]) / f"{judge}.json")
        found["settings"] = {name: result.settings[name] for name in SETTINGS}
        found["judges"][judge] = figures(result)
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
