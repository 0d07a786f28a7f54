"""Small models and real packed units in memory, for the tests of models, stages and losses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plato2.batch import n_targets
from plato2.config import ModelConfig, OptimConfig
from plato2.data.collate import BackwardBatch, CoherenceBatch, GenerationBatch, Items, JointBatch, Window
from plato2.data.order import Batching, lay_out
from plato2.data.packing import UnitLayout
from plato2.data.shards import Samples, ShardIndex, ShardWriter, SplitIndex, read_index, write_index
from plato2.data.stream import Batch
from plato2.stages import known_stages

STAGES = known_stages()

Unit = dict[str, Tensor]
MODEL = ModelConfig(
    n_layer=2, n_head=2, hidden_size=16, vocab_size=61, max_position=64, n_latent=5, dropout=0.0
)
BATCHES: dict[str, Batch] = {
    "1_coarse": GenerationBatch(),
    "2_gen": GenerationBatch(latent_slot=True),
    "2_eval": CoherenceBatch(mask_prob=0.3),
    "backward": BackwardBatch(),
    "plato": JointBatch(),
}


def make_stage(
    name: str,
    model: ModelConfig = MODEL,
    std: float = 0.2,
    optim: OptimConfig | None = None,
    **arguments: Any,
) -> Any:
    """A stage in training mode whose weights, biases and norms are all random and large enough to matter."""
    return make_stage_of(STAGES[name], model, std, optim, **arguments)


def make_stage_of(
    stage_class: type,
    model: ModelConfig = MODEL,
    std: float = 0.2,
    optim: OptimConfig | None = None,
    **arguments: Any,
) -> Any:
    """The same of a stage of one's own."""
    stage = stage_class(model, optim, **arguments)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in stage.named_parameters():
            parameter.normal_(0.0, std, generator=generator)
            if parameter_name.endswith("norm.weight"):
                parameter += 1.0
    return stage.train()


def make_window(n: int = 12, vocab_size: int = MODEL.vocab_size, seed: int = 0, longest: int = 9) -> Window:
    """n dialogues of random ids; the answers follow the turn before them: each id is that of the turn + 1."""
    rng = np.random.default_rng(seed)
    made, context_len = [], []
    for _ in range(n):
        context = [1]
        for _ in range(rng.integers(1, 4)):
            turn = rng.integers(3, vocab_size - 2, rng.integers(1, longest)).tolist()
            context += [*turn, 2]
        made.append([*context, 1, *(token + 1 for token in turn), 2])
        context_len.append(len(context))
    samples = Samples(
        token_ids=np.array([token for record in made for token in record], dtype=np.uint16),
        offsets=np.concatenate([[0], np.cumsum([len(record) for record in made])]),
        context_len=np.array(context_len, dtype=np.int64),
        sample_ids=np.arange(n) + 1000,
    )
    return Window(samples, 7, 0, 0, vocab_size - 1, 128)


@dataclass(frozen=True)
class Packed:
    """A window laid out in one unit, and the same samples one by one."""

    batch: Batch
    window: Window
    items: Items
    layout: UnitLayout

    @property
    def unit(self) -> Unit:
        """All samples of the window, several a row."""
        return self._unit(self.layout)

    def alone(self, sample: int, padding: int = 0) -> Unit:
        """Sample number `sample` of the unit in a row of its own."""
        item, zero = self.layout.items[[sample]], np.zeros(1, dtype=np.int64)
        return self._unit(UnitLayout(item, zero, zero, 1, int(self.items.slots[item][0]) + padding))

    def record(self, sample: int) -> tuple[list[int], list[int]]:
        """Context and response ids of sample number `sample` of the unit, straight from the window."""
        item, samples = self.layout.items[sample], self.window.samples
        context, response = self.items.contexts[item], self.items.responses[item]
        start, middle = samples.offsets[context], samples.offsets[context] + samples.context_len[context]
        answer = samples.offsets[response] + samples.context_len[response]
        return (
            samples.token_ids[start:middle].tolist(),
            samples.token_ids[answer : samples.offsets[response + 1]].tolist(),
        )

    def __len__(self) -> int:
        """Samples of the unit."""
        return len(self.layout.items)

    def _unit(self, layout: UnitLayout) -> Unit:
        unit = self.batch.unit(self.window, self.items, layout)
        totals = {"step_targets": n_targets(unit), "step_samples": len(layout.items)}
        return unit | {name: torch.tensor(total) for name, total in totals.items()}


def pack(batch: Batch, window: Window | None = None, row_length: int = 96) -> Packed:
    """The window in rows of `row_length`, all of them in one unit; rows hold two samples or more."""
    window = window or make_window()
    items = batch.items(window)
    n_rows = len(lay_out(items.slots, Batching(row_length=row_length, unit_tokens=row_length), 5, True))
    layout = lay_out(items.slots, Batching(row_length=row_length, unit_tokens=row_length * n_rows), 5, True)
    assert len(layout) == 1
    unit = layout.unit(0)
    assert np.bincount(unit.rows).max() >= 2
    return Packed(batch, window, items, unit)


def pack_for(name: str, window: Window | None = None, **options: Any) -> Packed:
    """The unit a stage reads."""
    return pack(replace(BATCHES[name], **options), window)


def write_answers(
    folder: Any, n_train: int, n_valid: int = 8, vocab_size: int = MODEL.vocab_size
) -> ShardIndex:
    """A prepared corpus of such dialogues, which a small model can learn."""
    splits = {}
    for seed, (split, n) in enumerate({"train": n_train, "valid": n_valid}.items()):
        samples = make_window(n, vocab_size, seed).samples
        writer = ShardWriter(folder, split, vocab_size, 64)
        writer.write(np.split(samples.token_ids, samples.offsets[1:-1]), samples.context_len.tolist())
        splits[split] = SplitIndex(tuple(writer.close()))
    write_index(folder, ShardIndex("a" * 64, vocab_size, 30, 20, splits))
    return read_index(folder)
