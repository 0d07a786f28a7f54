"""device.json, the results of benchmarks/device.sh: an entry a part, written as a whole each time.

    python -m benchmarks.device_results OUT ended PART EXIT_CODE LIMIT_S WALL_S     how a part ended
    python -m benchmarks.device_results OUT summary                                 a table; 1 if not all ok

Nothing but the standard library, so that a failed part is recorded whatever it failed of.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

TIMED_OUT = (124, 137)
"""Exit codes of `timeout`: told to end, and killed because it did not."""


class Results:
    """The file; every change is on disk when the call returns."""

    def __init__(self, out: Path) -> None:
        self.path = out / "device.json"

    def read(self) -> dict[str, Any]:
        """All of it; `parts` is there from the start."""
        if not self.path.exists():
            return {"parts": {}}
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return found

    def part(self, name: str) -> dict[str, Any]:
        """What a part has written so far."""
        found: dict[str, Any] = self.read()["parts"].get(name, {})
        return found

    def write(self, name: str, **values: Any) -> None:
        """Adds values to the entry of a part, or replaces those of the same name."""
        found = self.read()
        found["parts"].setdefault(name, {}).update(values)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def ended(results: Results, name: str, code: int, limit_s: int, wall_s: int) -> None:
    """Records how a part ended; what it had written before stays."""
    status = "ok" if code == 0 else "timed out" if code in TIMED_OUT else "failed"
    results.write(name, status=status, exit_code=code, limit_s=limit_s, wall_s=wall_s)


def summary(results: Results) -> str:
    """A line a part: its status, its time, and its main figures."""
    lines = []
    for name, part in results.read()["parts"].items():
        lines.append(f"{name:<14} {part['status']:<10} {part['wall_s']:>4} s  {main_figures(part)}".rstrip())
        lines += [f"  {stage:<14} {stage_figures(found)}" for stage, found in part.get("stages", {}).items()]
        lines += [
            f"  {n} contexts: {found['replies_per_s']:.2f} replies/s, {found['tokens_per_s']:,.0f} tokens/s, "
            f"rank {found['rank_s'] * 1000:.0f} ms"
            for n, found in part.get("batches", {}).items()
        ]
    return "\n".join(lines)


def main_figures(part: dict[str, Any]) -> str:
    """The one or two figures of a part that has no stages."""
    if "error" in part:
        return str(part["error"]).splitlines()[0][:100]
    shown = ("device", "passed", "failures", "model", "first_reply_s", "dialogues")
    return ", ".join(f"{name} {part[name]}" for name in shown if name in part)


def stage_figures(found: dict[str, Any]) -> str:
    """The figures of one stage of training."""
    if "tokens_per_s" in found:
        memory = f", {found['peak_memory_gib']:.1f} GiB" if found.get("peak_memory_gib") else ""
        return (
            f"{found['tokens_per_s']:,.0f} tokens/s, step {found['step_s']:.3f} s, MFU {found['mfu']:.1%}"
            f"{memory}, "
            f"loss {found['loss_first']:.2f} -> {found['loss_last']:.2f}"
        )
    if "error" in found:
        return str(found["error"]).splitlines()[0][:100]
    shown = {name: value for name, value in found.get("metrics", {}).items() if name in SHOWN}
    return f"{found['steps']} steps, " + ", ".join(f"{name} {value:.3g}" for name, value in shown.items())


SHOWN = ("val/ppl", "val/ppl_uniform", "val/z_mutual_information", "val/coherence_acc", "val/p1")
"""Figures of the curriculum that the summary shows."""


if __name__ == "__main__":
    found = Results(Path(sys.argv[1]))
    if sys.argv[2] == "ended":
        ended(found, sys.argv[3], *map(int, sys.argv[4:7]))
    else:
        print(summary(found))
        sys.exit(any(part["status"] != "ok" for part in found.read()["parts"].values()))
