"""The first ten steps of small models of each stage, against the losses they had when they were recorded.

Everything is fixed (weights, samples, masks, noise, dropout), so a change here is a change of the numbers of
every run. When it is wanted, record the curves again, say so in CHANGELOG.md and commit them:

    PYTHONPATH=. python tests/unit/test_golden.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from steps import STEP_TOKENS, train_steps
from units import BATCHES, write_answers

from plato2.config import ModelConfig, OptimConfig
from plato2.stages import known_stages

STAGES = known_stages()

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden.json"
CASES = [f"{name} dropout={dropout}" for name in BATCHES for dropout in (0.0, 0.1)]
VOCAB_SIZE = 301
N_STEPS = 10


def curve(case: str, corpus: Path) -> dict[str, list[float]]:
    """Every logged number of each step: loss and its terms, metrics, gradient norm, learning rate."""
    name, dropout = case.split(" dropout=")
    model = ModelConfig(
        n_layer=3,
        n_head=4,
        hidden_size=64,
        vocab_size=VOCAB_SIZE,
        max_position=64,
        n_latent=6,
        dropout=float(dropout),
    )
    optim = OptimConfig(lr=0.004, warmup_steps=4)
    stage = STAGES[name](model, optim, seed=11)
    metrics = train_steps(name, corpus, STEP_TOKENS // 2, n_steps=N_STEPS, stage=stage).metrics
    return {key: [step[key] for step in metrics] for key in sorted(metrics[0])}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    write_answers(folder, 200, vocab_size=VOCAB_SIZE)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_loss_curve_is_the_recorded_one(case: str, corpus: Path) -> None:
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))[case]
    found = curve(case, corpus)
    assert found.keys() == recorded.keys()
    for metric, values in recorded.items():
        assert found[metric] == pytest.approx(values, rel=1e-4, abs=1e-6), metric
    assert recorded["train/loss"][-1] < recorded["train/loss"][0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_answers(folder, 200, vocab_size=VOCAB_SIZE)
        curves = {case: curve(case, Path(folder)) for case in CASES}
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    for case, values in curves.items():
        print(f"{case}: loss {values['train/loss'][0]:.4f} -> {values['train/loss'][-1]:.4f}")
