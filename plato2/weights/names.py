"""Names of parameters: ours, Knover's and PaddleNLP's, one table for all (docs/spec.md, Parameters).

Ours are those of a stage's `state_dict`: `backbone.blocks.0.attention.output.weight`. Knover names a file
after each parameter; PaddleNLP's re-release holds generation and evaluation model in one dict and has no
training-only heads. Both store the matrices of linear layers as [in, out], PyTorch as [out, in]. Both have
query, key and value apart; in our `attention.qkv` they stand one below the other.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from plato2.config import UserError

_BLOCK = {  # ours: Knover's, PaddleNLP's in the generation model, in the evaluation model
    "attention_norm": ("pre_att_layer_norm", "pre_norm_layer", "norm1"),
    "attention.query": ("multi_head_att_query_fc", "self_attn.q_proj", "self_attn.q_proj"),
    "attention.key": ("multi_head_att_key_fc", "self_attn.k_proj", "self_attn.k_proj"),
    "attention.value": ("multi_head_att_value_fc", "self_attn.v_proj", "self_attn.v_proj"),
    "attention.output": ("multi_head_att_output_fc", "self_attn.out_proj", "self_attn.out_proj"),
    "feed_forward_norm": ("pre_ffn_layer_norm", "post_norm_layer", "norm2"),
    "feed_forward_in": ("ffn_fc_0", "fc1", "linear1"),
    "feed_forward_out": ("ffn_fc_1", "fc2", "linear2"),
}
_MODULES = {  # with a weight and a bias
    "backbone.final_norm": (
        "post_encoder_layer_norm",
        "plato2_encoder.post_encoder_layer_norm",
        "nsp_predictor.encoder.norm",
    ),
    "backbone.lm_transform.linear": ("mask_lm_trans_fc", "logits_fc_layer", None),
    "backbone.lm_transform.norm": ("mask_lm_trans_layer_norm", "logits_layer_norm", None),
    "recognition.transform": ("recognition_fc", None, None),
    "bag_of_words.transform.linear": ("bow_trans_fc", None, None),
    "bag_of_words.transform.norm": ("bow_trans_layer_norm", None, None),
    "coherence.pool": ("pooled_fc", None, "nsp_predictor.fc1"),
    "coherence.classifier": ("next_sent_fc", None, "nsp_predictor.fc2"),
}
_SINGLE = {
    "backbone.word.weight": (
        "word_embedding",
        "plato2_encoder.word_embedding_layer.weight",
        "nsp_predictor.word_embedding_layer.weight",
    ),
    "backbone.position.weight": (
        "pos_embedding",
        "plato2_encoder.pos_embedding_layer.weight",
        "nsp_predictor.pos_embedding_layer.weight",
    ),
    "backbone.token_type.weight": (
        "sent_embedding",
        "plato2_encoder.sent_embedding_layer.weight",
        "nsp_predictor.sent_embedding_layer.weight",
    ),
    "backbone.role.weight": ("role_embedding", None, None),
    "backbone.lm_bias": ("mask_lm_out_fc.b_0", "logits_bias", None),
    "recognition.latent_embedding": ("latent_embedding", "latent_weight", None),
    "recognition.bias": ("recognition_bias", None, None),
    "bag_of_words.bias": ("bow_out_fc.b_0", None, None),
}
_BLOCK_PREFIX = ("encoder_layer_{}_", "plato2_encoder.layers.{}.", "nsp_predictor.encoder.layers.{}.")

_TABLES = (".word.", ".position.", ".token_type.", ".role.")


def released_apart(name: str) -> tuple[str, ...]:
    """What one of our parameters is called in released models: query, key and value, or the same name."""
    if ".qkv." not in name:
        return (name,)
    return tuple(name.replace(".qkv.", f".{part}.") for part in ("query", "key", "value"))


def released_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same for shapes: query, key and value have a third of the rows each."""
    apart = {name: released_apart(name) for name in shapes}
    return {
        part: (shapes[name][0] // len(parts), *shapes[name][1:])
        for name, parts in apart.items()
        for part in parts
    }


def refuse_apart(path: Path, names: Iterable[str]) -> None:
    """Refuses models of ours from before `attention.qkv`.

    Raises:
        UserError: query, key and value are separate.
    """
    if any(".attention.query." in name for name in names):
        raise UserError(
            f"{path}: written when query, key and value were three parameters; export it with the plato2 "
            "that wrote it (plato2 export knover), and import that here (plato2 import knover)"
        )


def knover_names(n_layer: int) -> dict[str, str]:
    """Our name, query, key and value apart -> Knover's, for all parameters of all three models."""
    return _names(n_layer, 0)


def paddlenlp_names(n_layer: int, part: str) -> dict[str, str]:
    """The same -> PaddleNLP's, for the parameters of its `generation` or `evaluation` model."""
    return _names(n_layer, 1 if part == "generation" else 2)


def is_transposed(name: str) -> bool:
    """Whether a parameter (our name) is the matrix of a linear layer, which Paddle stores as [in, out]."""
    is_matrix = name.endswith(".weight") and "norm." not in name
    return is_matrix and not any(table in name for table in _TABLES)


def n_layers(theirs: set[str]) -> int:
    """The number of blocks by the names of parameters (Knover's or PaddleNLP's); gaps count.

    Never more than there are names, whatever number appears in one of them.
    """
    found = [re.search(r"(?:encoder_layer_|\.layers\.)(\d{1,9})[_.]", name) for name in theirs]
    return min(len(theirs), 1 + max((int(match[1]) for match in found if match), default=-1))


def _names(n_layer: int, column: int) -> dict[str, str]:
    names = {ours: theirs[column] for ours, theirs in _SINGLE.items()}
    modules = {ours: theirs[column] for ours, theirs in _MODULES.items()}
    for layer in range(n_layer):
        prefix = _BLOCK_PREFIX[column].format(layer)
        modules |= {f"backbone.blocks.{layer}.{ours}": prefix + t[column] for ours, t in _BLOCK.items()}
    for ours, theirs in modules.items():
        for kind in ("weight", "bias"):
            names[f"{ours}.{kind}"] = None if theirs is None else _of_module(theirs, kind, column)
    return {ours: theirs for ours, theirs in names.items() if theirs is not None}


def _of_module(module: str, kind: str, column: int) -> str:
    """Knover's suffixes are `_scale` and `_bias` for norms, `.w_0` and `.b_0` for linear layers."""
    if column:
        return f"{module}.{kind}"
    if module.endswith("norm"):
        return module + {"weight": "_scale", "bias": "_bias"}[kind]
    return module + {"weight": ".w_0", "bias": ".b_0"}[kind]
