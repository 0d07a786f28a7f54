"""Units against slow loops written from the specification, and against the batches Knover itself made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import records, window

from plato2.config import UserError
from plato2.data.collate import CoherenceBatch, GenerationBatch, Items, Unit, Window
from plato2.data.order import Batching, lay_out
from plato2.data.packing import UnitLayout

KNOVER = Path(__file__).parents[1] / "fixtures" / "knover"
MASK = 8000


def one_a_row(items: Items, row_length: int) -> UnitLayout:
    """All items of a window as Knover lays them out: one a row, padded to a common length."""
    rows = np.arange(len(items))
    return UnitLayout(rows, rows, np.zeros_like(rows), len(rows), row_length)


def units(
    batch: GenerationBatch | CoherenceBatch, held: Window, batching: Batching
) -> list[tuple[Unit, Any]]:
    items = batch.items(held)
    layout = lay_out(items.slots, batching, 5, True)
    return [(batch.unit(held, items, layout.unit(u)), layout.unit(u)) for u in range(len(layout))]


# ------------------------------------------------------------------- slow loops (docs/spec.md, Inputs)


def slow_positions(n_context: int, length: int, style: str, max_response: int) -> list[int]:
    if style == "continuous":
        return list(range(length))
    return [max_response + n_context - 1 - i if i < n_context else i - n_context for i in range(length)]


def slow_roles(record: list[int], n_context: int) -> list[int]:
    n_turns = record[:n_context].count(2)
    roles, turn = [], 0
    for i, token in enumerate(record):
        roles.append((n_turns - turn) % 2 if 0 < i < n_context else 0)
        turn += token == 2 and i < n_context
    return roles


def check_unit(
    unit: Unit, layout: UnitLayout, sources: list[tuple[list[int], int]], batch: Any, max_response: int
) -> None:
    """Every id of a generation unit, slot by slot.

    `sources`: record and context length of each item of the unit.
    """
    shape = (layout.n_rows, layout.row_length)
    names = ("token_ids", "type_ids", "pos_ids", "segment_ids", *(["role_ids"] if batch.roles else []))
    expected = {name: np.zeros(shape, dtype=np.int64) for name in names}
    front, segment_of_row = int(batch.latent_slot), [0] * layout.n_rows
    sample_index, targets = [], []
    for n, ((record, n_context), row, column) in enumerate(
        zip(sources, layout.rows.tolist(), layout.columns.tolist(), strict=True)
    ):
        inputs = record if batch.keep_eos else record[:-1]
        segment_of_row[row] += 1
        values = {
            "token_ids": inputs,
            "type_ids": [int(i >= n_context) for i in range(len(inputs))],
            "pos_ids": slow_positions(n_context, len(inputs), batch.positions, max_response),
            "segment_ids": [segment_of_row[row]] * len(inputs),
            "role_ids": slow_roles(record, n_context)[: len(inputs)],
        }
        start = column + front
        for name in names:
            expected[name][row, start : start + len(inputs)] = values[name]
        if front:
            expected["token_ids"][row, column], expected["segment_ids"][row, column] = (
                MASK,
                segment_of_row[row],
            )
        sample_index.append(row * layout.row_length + column)
        for i in range(n_context, len(record) - 1):
            targets.append((row * layout.row_length + start + i, record[i + 1], n))
    for name in names:
        assert np.array_equal(unit[name].numpy(), expected[name]), name
    assert unit["sample_index"].tolist() == sample_index
    found = zip(*(unit[f"target_{name}"].tolist() for name in ("index", "ids", "sample")), strict=True)
    assert list(found) == targets
    assert all(tensor.dtype == torch.int64 for tensor in unit.values())


@given(
    st.integers(1, 40),
    st.sampled_from(["packed", "buckets", "padded"]),
    st.builds(
        GenerationBatch,
        latent_slot=st.booleans(),
        keep_eos=st.booleans(),
        roles=st.booleans(),
        positions=st.sampled_from(["continuous", "relative"]),
    ),
)
@settings(deadline=None)
def test_generation_units_are_the_records(n: int, mode: str, batch: GenerationBatch) -> None:
    made, context_len = records(n, seed=n)
    held = window(made, context_len, max_response=30)
    seen = []
    n_targets = 0
    batching = Batching(mode, unit_tokens=192, row_length=64, pool_samples=16)  # type: ignore[arg-type]
    for unit, layout in units(batch, held, batching):
        sources = [(made[i], context_len[i]) for i in layout.items]
        check_unit(unit, layout, sources, batch, 30)
        assert unit["sample_ids"].tolist() == (layout.items + 1000).tolist()
        count = batch.count_targets(held, batch.items(held), layout.items)
        assert count == len(unit["target_ids"])
        seen += unit["sample_ids"].tolist()
        n_targets += count
    assert sorted(seen) == list(range(1000, 1000 + n))
    assert n_targets == sum(len(record) - c - 1 for record, c in zip(made, context_len, strict=True))


@given(st.integers(2, 40), st.booleans(), st.sampled_from(["continuous", "relative"]))
@settings(deadline=None)
def test_unmasked_coherence_units_are_the_pairs(n: int, roles: bool, positions: Any) -> None:
    made, context_len = records(n, seed=n)
    held = window(made, context_len, max_response=30)
    batch = CoherenceBatch(mask_prob=0.0, roles=roles, positions=positions)
    as_generation = GenerationBatch(keep_eos=True, roles=roles, positions=positions)
    items = batch.items(held)
    seen = []
    for unit, layout in units(batch, held, Batching(unit_tokens=192, row_length=64, pool_samples=16)):
        sources = []
        for item in layout.items:
            i, j = items.contexts[item], items.responses[item]
            sources.append((made[i][: context_len[i]] + made[j][context_len[j] :], context_len[i]))
        assert len(unit["target_ids"]) == 0
        labels = unit.pop("coherence_labels").tolist()
        assert labels == [int(items.contexts[i] == items.responses[i]) for i in layout.items]
        seen += zip(unit["sample_ids"].tolist(), labels, strict=True)
        for name in ("target_index", "target_ids", "target_sample"):
            del unit[name]
        unit |= expected_targets(sources, layout)
        check_unit(unit, layout, sources, as_generation, 30)
    assert sorted(seen) == sorted((i + 1000, label) for i in range(n) for label in (0, 1))


def expected_targets(sources: list[tuple[list[int], int]], layout: UnitLayout) -> Unit:
    """Generation's targets, so that `check_unit` can be used for all the rest of a coherence unit."""
    targets = [
        (layout.rows[n] * layout.row_length + layout.columns[n] + i, record[i + 1], n)
        for n, (record, n_context) in enumerate(sources)
        for i in range(n_context, len(record) - 1)
    ]
    columns = zip(*targets, strict=True)
    return {
        f"target_{name}": torch.tensor(np.array(column, dtype=np.int64))
        for name, column in zip(("index", "ids", "sample"), columns, strict=True)
    }


def test_an_empty_unit_is_rows_of_padding() -> None:
    held = window(*records(4))
    nothing = np.zeros(0, dtype=np.int64)
    for batch in (
        GenerationBatch(latent_slot=True, roles=True, positions="relative"),
        CoherenceBatch(roles=True),
    ):
        unit = batch.unit(held, batch.items(held), UnitLayout(nothing, nothing, nothing, 2, 8))
        assert all(unit[name].shape == (2, 8) for name in ("token_ids", "segment_ids", "role_ids"))
        assert all(not tensor.any() for tensor in unit.values())
        assert all(len(unit[f"{name}"]) == 0 for name in ("sample_index", "target_ids", "sample_key"))


# ------------------------------------------------------------------------------------- Knover's own batches


def knover_window(variant: str, chosen: list[int]) -> Window:
    all_records = json.loads((KNOVER / "records.json").read_text())[variant]
    kept = [all_records[i] for i in chosen]
    return window([r["token_ids"] for r in kept], [r["tgt_start_idx"] for r in kept])


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("stage", ["stage1", "stage21"])
def test_knover_generation_batches(stage: str, name: str) -> None:
    fixture = np.load(KNOVER / f"{stage}.npz", allow_pickle=False)
    knover = {k.split("/")[-1]: fixture[k] for k in fixture.files if k.startswith(f"{name}/in/")}
    held = knover_window("default", fixture[f"{name}/sample_idx"].tolist())
    batch = GenerationBatch(latent_slot=stage == "stage21")
    front = int(batch.latent_slot)
    length = knover["token_ids"].shape[1] + front
    items = batch.items(held)
    unit = batch.unit(held, items, one_a_row(items, length))
    for key in ("token_ids", "type_ids", "pos_ids"):
        assert np.array_equal(unit[key][:, front:].numpy(), knover[key][..., 0])
    rows, columns = knover["tgt_idx"].T
    assert unit["target_index"].tolist() == (rows * length + columns).tolist()
    assert unit["target_ids"].tolist() == knover["tgt_label"][:, 0].tolist()
    assert unit["target_sample"].tolist() == rows.tolist()
    if front:  # the bag-of-words targets: slot 0 of the row predicts every label
        assert (
            unit["sample_index"][unit["target_sample"]].tolist() == (knover["bow_idx"] @ [length, 1]).tolist()
        )
        assert unit["target_ids"].tolist() == knover["bow_label"][:, 0].tolist()


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_knover_evaluation_batches(name: str) -> None:
    """Its pairs of context and response (unmasked), laid out by our batch maker."""
    fixture = np.load(KNOVER / "stage22.npz", allow_pickle=False)
    knover = {k.split("/")[-1]: fixture[k][..., 0] for k in fixture.files if k.startswith(f"{name}/in/")}
    all_records = json.loads((KNOVER / "records.json").read_text())["default"]
    held = knover_window("default", list(range(len(all_records))))
    parts = [
        (r["token_ids"][: r["tgt_start_idx"]], r["token_ids"][r["tgt_start_idx"] :]) for r in all_records
    ]
    pairs = []
    for row in knover["unmasked_token_ids"].tolist():
        ids = np.trim_zeros(row, "b")
        pairs.append(next((i, j) for i in range(8) for j in range(8) if parts[i][0] + parts[j][1] == ids))
    contexts, responses = np.array(pairs).T
    assert (contexts == responses).astype(int).tolist() == knover["label"].tolist()
    slots = np.array([len(parts[i][0] + parts[j][1]) for i, j in pairs])
    items = Items(contexts, responses, knover["label"], slots)
    unit = CoherenceBatch(mask_prob=0.0).unit(held, items, one_a_row(items, knover["token_ids"].shape[1]))
    assert np.array_equal(unit["token_ids"].numpy(), knover["unmasked_token_ids"])
    for key in ("type_ids", "pos_ids"):
        assert np.array_equal(unit[key].numpy(), knover[key])
    assert unit["coherence_labels"].tolist() == knover["label"].tolist()


@pytest.mark.parametrize(
    ("variant", "batch"),
    [
        ("use_role", GenerationBatch(keep_eos=True, roles=True)),
        ("relative_position", GenerationBatch(keep_eos=True, positions="relative")),
    ],
)
def test_knover_roles_and_relative_positions(variant: str, batch: GenerationBatch) -> None:
    held = knover_window(variant, list(range(8)))
    items = batch.items(held)
    unit = batch.unit(held, items, one_a_row(items, int(items.slots.max())))
    for row, record in enumerate(json.loads((KNOVER / "records.json").read_text())[variant]):
        for key, ids in record.items():
            if key.endswith("_ids"):
                assert unit[key][row, : len(ids)].tolist() == ids


# ---------------------------------------------------------------------------------------- masks and negatives


def masked_tokens(
    held: Window, batch: CoherenceBatch, batching: Batching
) -> dict[tuple[int, int, int], tuple]:
    """(sample, label, place) -> (true id, id the model sees), whatever the layout."""
    found = {}
    for unit, layout in units(batch, held, batching):
        flat = unit["token_ids"].view(-1)
        for index, true_id, n in zip(
            *(unit[f"target_{name}"].tolist() for name in ("index", "ids", "sample")), strict=True
        ):
            place = index - int(unit["sample_index"][n])
            key = (int(unit["sample_ids"][n]), int(unit["coherence_labels"][n]), place)
            found[key] = (true_id, int(flat[index]))
        assert len(unit["target_ids"]) == batch.count_targets(held, batch.items(held), layout.items)
    return found


def test_masks_have_the_right_shares() -> None:
    made, context_len = records(2000)
    found = masked_tokens(window(made, context_len), CoherenceBatch(), Batching(unit_tokens=1024))
    true_ids, seen_ids = np.array(list(found.values())).T
    labels = np.array([label for _, label, _ in found])
    assert not np.isin(true_ids, [1, 2]).any()
    n_eligible = 2 * sum(token not in (1, 2) for record in made for token in record)
    to_mask, kept = (seen_ids == MASK).sum(), (seen_ids == true_ids).sum()
    random_ids = seen_ids[(seen_ids != MASK) & (seen_ids != true_ids)]
    for count, total, share in [
        (to_mask, len(found), 0.8),
        (kept, len(found), 0.1),
        (len(random_ids), len(found), 0.1),
        ((labels == 1).sum(), len(found), 0.5),
    ]:
        assert abs(count - total * share) < 5 * (total * share * (1 - share)) ** 0.5  # 5 sigma
    # Negatives repeat some responses and leave out others, so the number of eligible tokens is about this.
    assert abs(len(found) / n_eligible - 0.15) < 0.005
    assert random_ids.min() >= 3
    assert random_ids.max() < MASK
    assert abs(random_ids.mean() - (3 + MASK) / 2) < 5 * 2309 / len(random_ids) ** 0.5


def test_masks_hang_on_seed_epoch_sample_and_label_only() -> None:
    made, context_len = records(60)
    batch = CoherenceBatch()
    base = masked_tokens(window(made, context_len), batch, Batching(unit_tokens=128, row_length=128))
    other_layout = masked_tokens(window(made, context_len), batch, Batching("buckets", unit_tokens=300))
    assert base == other_layout
    for change in ({"seed": 8}, {"epoch": 1}):
        other = masked_tokens(window(made, context_len, **change), batch, Batching())  # type: ignore[arg-type]
        assert other.keys() != base.keys()
    in_context = [key for key in base if key[2] < context_len[key[0] - 1000]]
    positives, negatives = ({key[0::2] for key in in_context if key[1] == label} for label in (1, 0))
    assert positives != negatives


def test_tokens_outside_the_targets_are_untouched() -> None:
    made, context_len = records(50)
    held = window(made, context_len)
    for (unit, _), (clean, _) in zip(
        units(CoherenceBatch(), held, Batching()),
        units(CoherenceBatch(mask_prob=0), held, Batching()),
        strict=True,
    ):
        differs = torch.ones(unit["token_ids"].numel(), dtype=torch.bool)
        differs[unit["target_index"]] = False
        assert torch.equal(unit["token_ids"].view(-1)[differs], clean["token_ids"].view(-1)[differs])
        assert torch.equal(clean["token_ids"].view(-1)[unit["target_index"]], unit["target_ids"])


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(0, 3))
def test_negatives_never_have_the_true_text(texts: list[int], epoch: int) -> None:
    """Responses drawn from four texts, so that neighbours are often equal."""
    made = [[1, 10 + i, 2, 1, *[50] * (1 + text), 2] for i, text in enumerate(texts)]
    held = window(made, [3] * len(made), epoch=epoch)
    if len(set(texts)) == 1:
        with pytest.raises(UserError, match=f"all {len(texts)} responses of window 0 are equal"):
            CoherenceBatch().items(held)
        return
    items = CoherenceBatch().items(held)
    own, negatives = items.responses[::2], items.responses[1::2]
    assert (
        own.tolist() == items.contexts[::2].tolist() == items.contexts[1::2].tolist() == [*range(len(texts))]
    )
    assert all(texts[i] != texts[j] for i, j in enumerate(negatives))
    assert items.labels.tolist() == [1, 0] * len(texts)  # any part of a validation pass is balanced


def test_knovers_negatives_are_a_cycle() -> None:
    """reject_identical=False: the response of the next record in a shuffled cycle, equal or not."""
    made, context_len = records(30)
    negatives = CoherenceBatch(reject_identical=False).items(window(made, context_len)).responses[1::2]
    assert sorted(negatives.tolist()) == list(range(30))
    at, n_seen = 0, 0
    while not (at == 0 and n_seen):
        at, n_seen = negatives[at], n_seen + 1
    assert n_seen == 30


def test_negatives_and_noise_change_with_the_epoch() -> None:
    made, context_len = records(50)
    first, second = (window(made, context_len, epoch=epoch) for epoch in (0, 1))
    assert (CoherenceBatch().items(first).responses != CoherenceBatch().items(second).responses).any()
    for batch, n_items in ((GenerationBatch(), 50), (CoherenceBatch(), 100)):
        keys = [
            units(batch, held, Batching(unit_tokens=8192))[0][0]["sample_key"] for held in (first, second)
        ]
        assert len(set(torch.cat(keys).tolist())) == 2 * n_items


def test_mask_prob_is_a_probability() -> None:
    with pytest.raises(UserError, match=r"stage\.batch\.mask_prob=1\.5"):
        CoherenceBatch(mask_prob=1.5)
