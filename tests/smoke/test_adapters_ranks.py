"""A pretrained decoder over several gloo processes, whole and low-rank: the numbers of one process."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from decoders import rounded, write_decoder
from forks import Forks
from small import ROOT, write_dialogues
from test_adapters_cli import ADAPTER
from test_parallel import RANKS
from test_pretrained_cli import STEPS, plato2

from plato2.runs.saved import read_checkpoint, read_metrics

SHARES = "strategy.strategy.save_distributed_checkpoint=true"


class Ranks:
    """train.py with `strategy.devices=N` in N processes."""

    def __init__(self, forks: Forks, places: list[str], folder: Path) -> None:
        self.forks, self.places, self.folder = forks, places, folder

    def begin(self, run_id: str, n: int, *overrides: str) -> int:
        """Starts one; the pid of rank 0, which leads the group of all."""
        given = [*STEPS, "data.unit_tokens=256", "stage=2_gen", "init_from=scratch", *self.places]
        given += ["trainer.max_steps=4", "trainer.val_check_interval=2", f"output_dir={self.folder}/runs"]
        given += ["sample_replies=0", "latent_contexts=0", "strategy.precision=32-true", *overrides]
        if n == 1:
            return self.forks.begin(ROOT / "train.py", *given, folder=self.folder, RUN_ID=run_id)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        world = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        world |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "GROUP_RANK": "0"}
        script = self.folder / "ranks.py"
        script.write_text(RANKS)
        given += ["strategy.accelerator=cpu", f"strategy.devices={n}"]
        return self.forks.begin(script, *given, folder=self.folder, RUN_ID=run_id, **world)

    def __call__(self, run_id: str, n: int, *overrides: str) -> str:
        """Its output."""
        self.begin(run_id, n, *overrides)
        code, _, output = self.forks.end()
        assert code == 0, output
        return output

    def run(self, run_id: str) -> Path:
        return self.folder / "runs" / "pretrained-2_gen" / run_id

    def losses(self, run_id: str) -> dict[tuple[int, str], float]:
        rows = read_metrics(self.run(run_id) / "metrics.csv")
        names = ("train/nll", "train/bow", "train/grad_norm", "val/nll", "val/bow")
        return {(step, name): value for step, name, value in rows if name in names}

    def assert_same(self, run_id: str, other: str) -> None:
        """The same losses and weights but for the order of sums."""
        own, expected = self.losses(run_id), self.losses(other)
        assert own.keys() == expected.keys()
        assert len(own) > 12
        assert own == pytest.approx(expected, rel=1e-5, abs=1e-5)
        weights, known = (
            read_checkpoint(self.run(name) / "checkpoints/last.ckpt")["state_dict"]
            for name in (run_id, other)
        )
        assert weights.keys() == known.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, known[name], atol=2e-4, rtol=0)  # Adam: 4 steps of 1e-3


def prepared(decoder: Path, folder: Path) -> list[str]:
    """Conversations in the decoder's words; both as keys of the command line."""
    conversations = write_dialogues(folder / "d.jsonl", 60)
    limits = ("--max-context", 48, "--max-response", 48, "--valid-dialogues", 10, "--test-fraction", 0)
    code, _, errors = plato2(
        "prepare", "jsonl", conversations, "--out", folder / "data", "--tokenizer", f"hf:{decoder}", *limits
    )
    assert code == 0, errors
    return [f"model.path={decoder}", f"data.path={folder / 'data'}"]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "adapter"), [("qwen2", []), ("llama", ADAPTER)], ids=["whole", "lora"])
def test_ranks_train_a_decoder_as_one_process_does(
    forks: Forks, tmp_path: Path, family: str, adapter: list[str]
) -> None:
    """Qwen 2's word table is also its output table; Llama's are two. Runs go on with other ranks."""
    decoder = write_decoder(tmp_path / "decoder", family)
    ranks = Ranks(forks, [*prepared(decoder, tmp_path), *adapter], tmp_path)
    ranks("one", 1)
    ranks("ddp", 2, "strategy=ddp")
    ranks.assert_same("ddp", "one")
    ranks("fsdp2", 2, "strategy=fsdp", "trainer.max_steps=2")
    ranks("fsdp2", 2, "strategy=fsdp")
    ranks.assert_same("fsdp2", "one")
    ranks("fsdp4", 4, "strategy=fsdp", SHARES, "trainer.max_steps=2")
    ranks("fsdp4", 1)
    ranks.assert_same("fsdp4", "one")


@pytest.mark.slow
def test_ranks_share_a_base_in_bfloat16(forks: Forks, tmp_path: Path) -> None:
    """FSDP2 gathers weights in bfloat16 anyway: what it trains is the same, number for number."""
    decoder = rounded(write_decoder(tmp_path / "a"), tmp_path / "b")
    ranks = Ranks(forks, [*prepared(decoder, tmp_path), *ADAPTER], tmp_path)
    short = ["trainer.max_steps=2", "strategy.precision=bf16-mixed"]
    for strategy in ("ddp", "fsdp"):
        ranks(f"{strategy}-whole", 2, f"strategy={strategy}", *short)
        ranks(strategy, 2, f"strategy={strategy}", *short, "model.base_dtype=bfloat16")
        assert ranks.losses(strategy) == ranks.losses(f"{strategy}-whole")
