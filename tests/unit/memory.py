"""What a rank really holds at the peak of its steps, as PyTorch's profiler counts it (test_simulate.py).

    LOCAL_RANK=0 MASTER_ADDR=... MASTER_PORT=... python tests/unit/memory.py CORPUS OUT '{"stage": ...}'

trains a stage with the real Trainer, in this process or as one rank of two, and writes OUT-<rank>.json.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.profiler import ProfilerActivity, profile
from units import BATCHES, STAGES

from plato2.config import ModelConfig, OptimConfig
from plato2.data.module import DialogueDataModule
from plato2.runs.averaging import AveragedWeights
from plato2.runs.sharded import Sharded, precision_plugin
from plato2.runs.simulate import Ranks

WORDS = 2001
ROW = 64
MODEL = ModelConfig(n_head=4, hidden_size=128, vocab_size=WORDS, max_position=64, n_latent=5)


@dataclass(frozen=True)
class Case:
    """A run of three steps."""

    stage: str = "1_coarse"
    strategy: str = "single"
    """Or ddp or fsdp, of two processes."""
    half: bool = True
    checkpoint: bool = False
    n_layer: int = 4
    hidden_size: int = 128
    unit_tokens: int = 4096
    n_units: int = 1
    """Of a rank in a step."""
    decoder: str = ""
    """Folder of a pretrained decoder."""
    adapter: str = "none"
    averaged: bool = False
    """The weights have a moving average."""

    @property
    def model(self) -> ModelConfig:
        if self.decoder:
            return replace(
                read_decoder(Path(self.decoder)),
                adapter=self.adapter,
                checkpoint_activations=self.checkpoint,
            )
        geometry = {"n_layer": self.n_layer, "hidden_size": self.hidden_size}
        return replace(MODEL, **geometry, checkpoint_activations=self.checkpoint)

    @property
    def ranks(self) -> Ranks:
        n = 1 if self.strategy == "single" else 2
        fsdp = self.strategy == "fsdp"
        return Ranks(1 if fsdp else n, n if fsdp else 1, fsdp, self.half)

    def data(self, corpus: Path) -> DialogueDataModule:
        unit, batch = self.unit_tokens, BATCHES[self.stage]
        tokens = unit * self.n_units * self.ranks.n
        return DialogueDataModule(str(corpus), batch, tokens, unit_tokens=unit, row_length=ROW)


def write_decoder(folder: Path) -> Path:
    """A decoder without a tokenizer; its last word, the special one, is not in the corpus."""
    import transformers

    geometry = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    geometry |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": WORDS}
    geometry |= {"max_position_embeddings": 64, "tie_word_embeddings": True}
    config = transformers.AutoConfig.for_model("llama", **geometry)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def read_decoder(folder: Path) -> ModelConfig:
    """Its configuration, as `from_folder` makes it."""
    config = json.loads((folder / "config.json").read_text())
    own = {name: config[name] for name in ("hidden_size",)}
    own |= {"n_layer": config["num_hidden_layers"], "n_head": config["num_attention_heads"]}
    stored = {"begin": WORDS - 1, "end": WORDS - 1, "unknown": None, "config": config}
    return replace(
        MODEL, **own, vocab_size=WORDS + 4, path=str(folder), architecture=json.dumps(stored), dropout=0.0
    )


def measured(case: Case, corpus: Path) -> int:
    """Bytes at the peak, all that PyTorch has allocated since before there was a model."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    made: Any = {"single": "auto", "ddp": "ddp", "fsdp": Sharded()}[case.strategy]
    precision = "bf16-mixed" if case.half else "32-true"
    plugin = precision_plugin(precision, "cpu", case.ranks.fsdp)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        stage = STAGES[case.stage](case.model, OptimConfig())
        for weight in stage.parameters() if case.decoder else ():
            weight.data = weight.data.clone()  # read, it lies in a file that is mapped, which is not counted
        pl.Trainer(
            max_steps=3,
            max_epochs=-1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            accelerator="cpu",
            devices=case.ranks.n,
            strategy=made,
            **({"plugins": [plugin]} if plugin else {"precision": precision}),
            use_distributed_sampler=False,
            callbacks=[AveragedWeights()] if case.averaged else None,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(stage, case.data(corpus))
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


if __name__ == "__main__":
    corpus, out, case = Path(sys.argv[1]), Path(sys.argv[2]), Case(**json.loads(sys.argv[3]))
    torch.set_num_threads(1)
    peak = measured(case, corpus)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    out.with_name(f"{out.name}-{rank}.json").write_text(json.dumps({"peak": peak, "case": asdict(case)}))
