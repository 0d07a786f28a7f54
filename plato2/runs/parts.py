"""The parts of a run, made of its configuration: the stage, its corpus, and its batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from plato2.config import TrainConfig, UserError
from plato2.runs.build import build, check_arguments, check_counts, find, hints

if TYPE_CHECKING:  # heavy imports wait until something is trained: --help and tab completion stay fast
    from plato2.data.module import DialogueDataModule
    from plato2.runs.corpus import CorpusOfRun
    from plato2.runs.length import RunLength
    from plato2.stages import Stage

NOT_LIGHTNINGS = (
    ("gradient_clip_val", 0, "optim.clip_norm"),
    ("accumulate_grad_batches", 1, "optim.batch_tokens (tokens of one optimizer step)"),
    ("limit_train_batches", 1.0, "trainer.max_steps"),
)
"""Arguments of the Trainer that it refuses for these stages, the value that is off, and the key for it."""


def build_parts(keys: TrainConfig) -> tuple[Stage, CorpusOfRun, DialogueDataModule]:
    """The stage, as yet without memory for its weights; its corpus, perhaps still to be made; its batches.

    Raises:
        UserError: values that the schemas cannot know to be wrong.
    """
    import pytorch_lightning as pl

    from plato2.runs.corpus import CorpusOfRun
    from plato2.runs.folder import several_processes
    from plato2.runs.parallel import check_devices, check_processes, check_replicas, n_ranks

    if keys.model.is_pretrained:
        from plato2.data.decoder_tokenizer import DecoderTokenizer
        from plato2.model.backbone import INIT_STD
        from plato2.model.decoder_folder import from_folder
        from plato2.model.pretrained import word_length
        from plato2.weights.base import with_base

        found = from_folder(keys.model, DecoderTokenizer.from_model, to_train=not keys.plan)
        found = replace(found, path=str(Path(found.path).absolute()))  # a run is read from any folder
        if not keys.plan:
            found = with_base(found)
            if found.latent_scale is None:
                found = replace(found, latent_scale=round(word_length(found) / INIT_STD, 2))
        keys.model = found
        if keys.model.base_dtype == "bfloat16" and (precision := precision_of(keys)) != "bf16-mixed":
            raise UserError(
                f"model.base_dtype=bfloat16: is for strategy.precision=bf16-mixed, not {precision}; give "
                "that, or leave it out"
            )
    check_arguments(pl.Trainer, {k: v for k, v in keys.strategy.items() if v != "auto"}, "strategy")
    check_arguments(pl.Trainer, keys.trainer, "trainer")
    check_counts(keys.trainer, ("max_steps", "val_check_interval", "log_every_n_steps"), "trainer")
    for name, off, cure in NOT_LIGHTNINGS:
        if keys.trainer.get(name) not in (None, off):
            raise UserError(
                f"trainer.{name}={keys.trainer[name]}: the stages do this themselves; use {cure}, and leave "
                "it out"
            )
    accelerator, devices = keys.strategy.get("accelerator", "auto"), keys.strategy["devices"]
    num_nodes = keys.strategy.get("num_nodes", 1)
    check_devices(accelerator, devices)
    if not keys.plan:
        check_processes(devices, num_nodes, accelerator)
        if is_sharded(keys):
            replicas = keys.strategy["strategy"].get("replicas", 1)
            check_replicas(replicas, num_nodes, n_ranks(devices, num_nodes, accelerator))
    batch_node = keys.stage.pop("batch")
    stage = build_stage(keys, "meta")  # first: what it refuses, such as a head, is not the batch's to name
    head = {"head": keys.stage["head"]} if "head" in keys.stage else {}
    if head:
        check_head(head["head"], batch_node)
    batch = build(head | batch_node, "stage.batch")
    if not hasattr(batch, "roles"):
        if keys.model.n_role:
            raise UserError(
                f"model.n_role={keys.model.n_role}: {type(batch).__name__} has no roles; use model.n_role=0"
            )
    elif batch.roles != (keys.model.n_role > 0):
        cure = "model.n_role=4" if batch.roles else "stage.batch.roles=true"
        raise UserError(
            f"stage.batch.roles={batch.roles}, model.n_role={keys.model.n_role}: roles take both; add {cure}"
        )
    if head and head["head"] != batch.head:
        raise UserError(
            f"stage.batch.head={batch.head}, stage.head={head['head']}: the batch is made for the head; "
            "leave out stage.batch.head"
        )
    prepare = keys.data.pop("prepare", None)
    check_arguments(CorpusOfRun, {"prepare": prepare}, "data")
    data = build(keys.data, "data", batch=batch, seed=keys.seed, batch_tokens=keys.optim.batch_tokens)
    # The plan of a stage takes no heed of the others', and ranks that are there compare what they have first.
    if not keys.plan and not several_processes():
        ranks = n_ranks(devices, num_nodes, accelerator)
        told = f"strategy.devices={devices}" + f" on {num_nodes} machines" * (num_nodes > 1)
        data.check_ranks(ranks, told)
    return stage, CorpusOfRun(data.path, prepare), data


def check_head(head: str, batch_node: Mapping[str, Any]) -> None:
    """Compares the head of stage 2.2 with those that the batch is for.

    Raises:
        UserError: names the stage that has the right batch.
    """
    target = find(batch_node["_target_"], "stage.batch._target_")
    heads = get_args(hints(target).get("head"))
    if heads and head not in heads:
        right = "2_eval" if head == "first" else f"2_eval_{head}"
        raise UserError(
            f"stage.head={head}: {target.__name__} is for {' or '.join(heads)}; use stage={right}"
        )


def build_stage(keys: TrainConfig, device: str) -> Stage:
    """The stage with its initial weights; on `meta` without them, to check options and to count parameters.

    Raises:
        UserError: values that the stage does not take.
    """
    import torch

    with torch.device(device):
        return build(keys.stage, "stage", model=keys.model, optim=keys.optim, seed=keys.seed)


def check_words(keys: TrainConfig, data: DialogueDataModule) -> None:
    """Refuses data that were not cut into the words of the pretrained decoder.

    Raises:
        UserError: they have another tokenizer.
    """
    from plato2.data.decoder_tokenizer import DecoderTokenizer

    if not keys.model.is_pretrained:
        return
    own, theirs = DecoderTokenizer.from_model(keys.model.path).sha256, data.tokenizer_sha256
    if own != theirs:
        raise UserError(
            f"data.path={data.path}: its tokenizer ({theirs[:12]}) is not that of the decoder in "
            f"{keys.model.path} ({own[:12]}); prepare it with plato2 prepare --tokenizer hf:{keys.model.path}"
        )


def precision_of(keys: TrainConfig) -> str:
    """The precision of the strategy; with `auto` what is best where the run will be."""
    from plato2.runs.parallel import best_precision

    precision = str(keys.strategy.get("precision", "32-true"))
    if precision != "auto":
        return precision
    if keys.plan:
        return "bf16-mixed" if on_gpus(keys) else best_precision("cpu")
    return best_precision(str(keys.strategy["accelerator"]))


def on_gpus(keys: TrainConfig) -> bool:
    """Whether a run is one on GPUs, of this machine or of another."""
    import torch

    accelerator = keys.strategy.get("accelerator", "auto")
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def is_sharded(keys: TrainConfig) -> bool:
    """Whether ranks share weights and optimizer state out: FSDP2, whose strategy is a node of its own."""
    return isinstance(keys.strategy.get("strategy"), dict)


def run_length(keys: TrainConfig, data: DialogueDataModule, done_steps: int) -> RunLength:
    """The tokens and epochs that a run has before it.

    Raises:
        UserError: the data cannot be read, or do not fit the options.
    """
    from plato2.runs.length import RunLength

    max_steps, tokens = keys.trainer["max_steps"], (data.batch_tokens, data.epoch_tokens)
    return RunLength(data.path, max_steps, done_steps, *tokens, model=keys.model_name)
