"""The rival: GPT-2 of tiny's geometry, trained on the shards with transformers' Trainer as most people would.

    python experiments/rivals/gpt2.py --data DIR --steps N --out FOLDER

A sample is DialoGPT's: every turn of context and response with the end token behind it, and all of it is
predicted. FOLDER becomes what `save_pretrained` writes (`--speaker dialogpt:FOLDER`), and has `trained.json`.
The same command continues after a kill.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from plan import RATE
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from plato2.data.shards import read_index, read_shard
from plato2.data.tokenizer import EOS_ID, PAD_ID, UNK_ID, Tokenizer

BATCH_SAMPLES = 64
"""About 4,250 tokens: as near to the 4,096 of the other rows as a round number comes."""
WARM_UP = 0.05
SAVE_STEPS = 200
FIRST_STEPS = 10
"""Their time is told apart: they compile kernels, and a pace is measured without them."""
QUOTES = {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2014": "-"}
Sample = tuple[list[int], list[int]]
"""Ids of a context, (turn END)*, and of a response, which has an END unless it was cut."""


def fast_tokenizer(folder: str | Path) -> Any:
    """Our SentencePiece tokenizer as one of transformers', with the same ids.

    Its pieces are BPE merges in the order of their ids: a piece is made of any two that it consists of.
    """
    ours = Tokenizer.load(folder)
    lines = (Path(folder) / "vocab.txt").read_text(encoding="utf-8").split("\n")
    names = [line.split("\t")[0] for line in lines[: ours.vocab_size]]
    ids = {name: number for number, name in enumerate(names)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in names[EOS_ID + 1 : ours.n_pieces]
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    unknown, end = names[UNK_ID], names[EOS_ID]
    core = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True))
    steps = [normalizers.NFKD(), normalizers.StripAccents()]
    steps += [normalizers.Replace(*pair) for pair in QUOTES.items()]
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    steps += [normalizers.Lowercase()] if ours.lower_case else []
    core.normalizer = normalizers.Sequence(steps)
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=unknown, pad_token=unknown, eos_token=end
    )


def read_samples(data: str | Path, split: str) -> list[Sample]:
    """The samples of a split, in the order of the shards."""
    found: list[Sample] = []
    for shard in read_index(data).splits[split].shards:
        samples = read_shard(data, shard)
        ids, offsets = samples.token_ids.tolist(), samples.offsets.tolist()
        for first, last, length in zip(offsets, offsets[1:], samples.context_len.tolist(), strict=False):
            found.append((ids[first + 1 : first + length], ids[first + length + 1 : last]))  # without [CLS]
    return found


def tiny(vocab_size: int, positions: int) -> Any:
    """GPT-2 with conf/model/tiny.yaml's layers, heads, width and dropout, from random weights."""
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=positions, n_embd=256, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=EOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


class Spent(transformers.TrainerCallback):
    """CPU seconds of the steps, as `perf/cpu_s` counts them: without loading, saving and measuring."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.began = seconds, 0.0
        self.first: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock."""
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Counts the step."""
        self.seconds += time.process_time() - self.began
        if state.global_step == FIRST_STEPS:
            self.first = self.seconds

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Marks the checkpoint as whole: this is the last file that is written into it."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / "spent.json").write_text(json.dumps({"cpu_s": self.seconds}), encoding="utf-8")


def newest_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in a folder."""
    whole = [path.parent for path in folder.glob("checkpoint-*/spent.json") if path.read_text().endswith("}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


@torch.no_grad()
def perplexity(model: Any, samples: Sequence[Sample]) -> float:
    """Of a token of the responses, their ends included, after the contexts: as `val/ppl` of stage 1."""
    nll, n_tokens = 0.0, 0
    model.eval()
    for first in range(0, len(samples), BATCH_SAMPLES):
        part = samples[first : first + BATCH_SAMPLES]
        width = max(len(context) + len(response) for context, response in part)
        labels = torch.full((len(part), width), -100)
        ids = torch.zeros_like(labels)
        for row, (context, response) in enumerate(part):
            length = len(context) + len(response)
            ids[row, :length] = torch.tensor([*context, *response])
            labels[row, len(context) : length] = torch.tensor(response)
        mask = (torch.arange(width) < torch.tensor([[len(c) + len(r)] for c, r in part])).long()
        targets = int((labels >= 0).sum())
        nll += float(model(input_ids=ids, attention_mask=mask, labels=labels).loss) * targets
        n_tokens += targets
    return math.exp(nll / n_tokens)


def train(
    data: str | Path, out: Path, steps: int, seed: int, rate: float = RATE, bf16: bool = False
) -> dict[str, Any]:
    """Trains to the last step, or goes on with it; what is finished is left alone.

    Args:
        data: a prepared corpus.
        out: the folder of the model.
        steps: optimizer steps; the rate falls to nothing at the last one.
        seed: of the weights and the order of the samples.
        rate: the highest learning rate.
        bf16: whether to compute in bfloat16 under autocast.

    Returns:
        What is in `trained.json`.
    """
    done, work = out / "trained.json", out / "trainer"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    tokenizer, samples = fast_tokenizer(Path(data) / "tokenizer"), read_samples(data, "train")
    positions = max(len(context) + len(response) for context, response in samples)
    transformers.set_seed(seed)  # before the weights are drawn
    options = transformers.TrainingArguments(
        output_dir=str(work), max_steps=steps, per_device_train_batch_size=BATCH_SAMPLES,
        learning_rate=rate, lr_scheduler_type="linear", warmup_steps=round(WARM_UP * steps),
        train_sampling_strategy="group_by_length", seed=seed, bf16=bf16, use_cpu=True,
        save_steps=SAVE_STEPS, save_total_limit=2, logging_steps=min(50, steps), report_to=[],
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    checkpoint = newest_checkpoint(work)
    before = json.loads((checkpoint / "spent.json").read_text())["cpu_s"] if checkpoint else 0.0
    spent = Spent(before)
    trainer = transformers.Trainer(
        model=tiny(len(tokenizer), max(positions, 128)), args=options, callbacks=[spent],
        train_dataset=[{"input_ids": context + response} for context, response in samples],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {
        "steps": trainer.state.global_step, "cpu_s": spent.seconds, "rate": rate, "bf16": bf16, "seed": seed,
        "samples": trainer.state.global_step * BATCH_SAMPLES, "loss": losses[-1],
        "first_cpu_s": spent.first, "ppl": perplexity(trainer.model, read_samples(data, "valid")),
        "parameters": trainer.model.num_parameters(),
    }  # fmt: skip
    done.with_suffix(".part").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    done.with_suffix(".part").replace(done)
    shutil.rmtree(work)
    return found


def main() -> None:
    """Trains one model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="the prepared corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=RATE, help="highest learning rate")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    given = parser.parse_args()
    print(json.dumps(train(given.data, given.out, given.steps, given.seed, given.rate, given.bf16)))


if __name__ == "__main__":
    main()
