"""The networks that are measured: ours with random weights, and Hugging Face's GPT-2 of the same geometry."""

from __future__ import annotations

from typing import Any

from plato2.config import ModelConfig, UserError
from plato2.data.tokenizer import BOS_ID, EOS_ID
from plato2.model.backbone import initialize
from plato2.model.heads import Head
from plato2.model.networks import EvaluationNetwork, GenerationNetwork


def random_networks(
    model: ModelConfig, *heads: Head
) -> tuple[GenerationNetwork, tuple[EvaluationNetwork, ...]]:
    """Networks of a geometry: one with latents, and one of an evaluation model for each head."""
    generation = GenerationNetwork(model, has_latents=True)
    evaluations = tuple(EvaluationNetwork(model, head) for head in heads)
    for network in (generation, *evaluations):
        initialize(network)
        network.eval()
    return generation, evaluations


def gpt2(model: ModelConfig, attention: str, **options: Any) -> Any:
    """Hugging Face's `GPT2LMHeadModel` with random weights.

    Args:
        model: the geometry.
        attention: `eager` or `sdpa`.
        options: more fields of its `GPT2Config`.

    Raises:
        UserError: transformers is not installed.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise UserError(
            "this compares with Hugging Face's GPT-2, and transformers is not installed: "
            "pip install transformers"
        ) from error
    geometry: dict[str, Any] = {
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_embd": model.hidden_size,
        "vocab_size": model.vocab_size,
        "n_positions": model.max_position,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "attn_implementation": attention,
    }
    return GPT2LMHeadModel(GPT2Config(**geometry, **options))
