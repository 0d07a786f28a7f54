"""The memory table of docs/pretrained.md is what `plan=json` says, of folders without weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.decoder_memory import COLUMNS, DECODERS, WAYS, as_line, planned, rows, write_folder
from plato2.runs import plan

TABLE = (Path(__file__).parents[2] / "docs" / "pretrained.md").read_text(encoding="utf-8")
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}


def test_the_table_has_every_decoder_and_way() -> None:
    assert as_line(COLUMNS) in TABLE
    found = [tuple(line.split(" | ")[:2]) for line in TABLE.splitlines() if line.startswith("| ")]
    expected = [(f"| {name}", way) for name in DECODERS for way in WAYS]
    assert [pair for pair in found if pair in expected] == expected


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), [("SmolLM2-135M", "whole"), ("Qwen2.5-7B", "low-rank")])
def test_rows_are_what_a_plan_says(name: str, way: str) -> None:
    """Two of them; `python -m benchmarks.decoder_memory` makes all."""
    (cells,) = rows([name], [way])
    assert as_line(cells) in TABLE


def test_a_plan_needs_no_weights_and_counts_a_base_in_bfloat16(tmp_path: Path) -> None:
    """Of a frozen matrix 2 bytes in place of 4, and of 2 more for the copy of bf16-mixed."""
    geometry = {**DECODERS["SmolLM2-135M"], **TINY, "num_key_value_heads": 4, "vocab_size": 500}
    folder = write_folder(tmp_path / "d", geometry)
    half = planned(folder, *WAYS["low-rank"], "strategy=cpu", "strategy.precision=bf16-mixed")
    whole = planned(folder, "model=pretrained_lora", "strategy=cpu", "strategy.precision=bf16-mixed")
    linear = 4 * 64 * 64 + 3 * 64 * 128
    frozen = linear + 500 * 64
    for key in ("parameters", "trained_parameters", "flop_per_step"):
        assert half[key] == whole[key]
    own, known = half["memory_bytes"], whole["memory_bytes"]
    assert known["weights"] - own["weights"] == 2 * frozen
    assert known["weight_copies"] - own["weight_copies"] == 2 * linear
    assert own["optimizer"] == known["optimizer"]
    assert not list(folder.glob("*.safetensors"))


@pytest.mark.slow
def test_a_base_in_bfloat16_is_advised_where_it_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with it a plan says that a unit fits there: of GPUs with just that much memory."""
    geometry = {**DECODERS["SmolLM2-135M"], **TINY, "hidden_size": 256, "num_key_value_heads": 4}
    folder = write_folder(tmp_path / "d", {**geometry, "vocab_size": 4000})
    low_rank = "model=pretrained_lora"
    whole = planned(folder, low_rank)
    assert whole["total_memory_bytes_base_in_bfloat16"] is None  # all GPUs have room
    half = planned(folder, low_rank, "model.base_dtype=bfloat16")
    totals, known = half["total_memory_bytes"], whole["total_memory_bytes"]
    both = "with_checkpointing", "without_checkpointing"
    assert all(totals[way] < 0.9 * known[way] for way in both)
    assert totals["without_checkpointing"] < known["with_checkpointing"]
    fits = {
        "A": totals["without_checkpointing"] + 1,
        "B": totals["with_checkpointing"] + 1,
        "C": known["without_checkpointing"] * 1.05,
        "V100-32G": totals["without_checkpointing"] + 1,
        "E": known["without_checkpointing"] * 2,
    }
    gpus = {name: plan.Gpu(int(size / plan.USABLE), 1e14) for name, size in fits.items()}
    monkeypatch.setattr(plan, "GPUS", gpus)
    tight = planned(folder, low_rank)
    assert tight["total_memory_bytes_base_in_bfloat16"] == totals
    advice = "\n".join(tight["advice"])
    assert "A: a unit of 1,024 tokens does not fit; model.base_dtype=bfloat16 makes room\n" in advice
    cure = "model.base_dtype=bfloat16 and model.checkpoint_activations=true make room"
    assert f"B: a unit of 1,024 tokens does not fit; {cure}\n" in advice
    less = (known["without_checkpointing"] - totals["without_checkpointing"]) / 2**30
    assert f"C: a unit barely fits; model.base_dtype=bfloat16 takes {less:.1f} GiB less" in advice
    assert not [one for one in tight["advice"] if "base_dtype" in one and ("V100" in one or "E" in one)]
    assert not any("base_dtype" in one for one in planned(folder, "model=pretrained")["advice"])
