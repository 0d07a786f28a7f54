"""Knover's parameter names and ours: one table, read in both directions (spec section 10)."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_BLOCK = {
    "pre_att_layer_norm_scale": "attention_norm.weight",
    "pre_att_layer_norm_bias": "attention_norm.bias",
    "multi_head_att_query_fc": "attention.query",
    "multi_head_att_key_fc": "attention.key",
    "multi_head_att_value_fc": "attention.value",
    "multi_head_att_output_fc": "attention.output",
    "pre_ffn_layer_norm_scale": "feed_forward_norm.weight",
    "pre_ffn_layer_norm_bias": "feed_forward_norm.bias",
    "ffn_fc_0": "feed_forward_in",
    "ffn_fc_1": "feed_forward_out",
}
_REST = {
    "word_embedding": "backbone.word.weight",
    "pos_embedding": "backbone.position.weight",
    "sent_embedding": "backbone.token_type.weight",
    "role_embedding": "backbone.role.weight",
    "post_encoder_layer_norm_scale": "backbone.final_norm.weight",
    "post_encoder_layer_norm_bias": "backbone.final_norm.bias",
    "mask_lm_trans_fc": "backbone.lm_transform.linear",
    "mask_lm_trans_layer_norm_scale": "backbone.lm_transform.norm.weight",
    "mask_lm_trans_layer_norm_bias": "backbone.lm_transform.norm.bias",
    "mask_lm_out_fc.b_0": "backbone.lm_bias",
    "latent_embedding": "recognition.latent_embedding",
    "recognition_fc": "recognition.transform",
    "recognition_bias": "recognition.bias",
    "bow_trans_fc": "bag_of_words.transform.linear",
    "bow_trans_layer_norm_scale": "bag_of_words.transform.norm.weight",
    "bow_trans_layer_norm_bias": "bag_of_words.transform.norm.bias",
    "bow_out_fc.b_0": "bag_of_words.bias",
    "pooled_fc": "coherence.pool",
    "next_sent_fc": "coherence.classifier",
}


def parameter_names(n_layer: int) -> dict[str, str]:
    """Knover's name -> ours, for all parameters of all three models with `n_layer` blocks."""
    names = {
        f"encoder_layer_{layer}_{theirs}": f"backbone.blocks.{layer}.{ours}"
        for layer in range(n_layer)
        for theirs, ours in _BLOCK.items()
    } | _REST
    table: dict[str, str] = {}
    for theirs, ours in names.items():
        if theirs.endswith(("_fc", "fc_0", "fc_1")):  # a linear layer: matrix w_0 and bias b_0
            table |= {f"{theirs}.w_0": f"{ours}.weight", f"{theirs}.b_0": f"{ours}.bias"}
        else:
            table[theirs] = ours
    return table


def state_dict_from_knover(arrays: Mapping[str, np.ndarray], n_layer: int) -> dict[str, Tensor]:
    """Knover's arrays under our names; the matrices of linear layers are [in, out] there and are transposed.

    Raises:
        KeyError: a name that is not in the table.
    """
    names = parameter_names(n_layer)
    state: dict[str, Tensor] = {}
    for theirs, array in arrays.items():
        tensor = torch.from_numpy(np.ascontiguousarray(array.T if theirs.endswith(".w_0") else array))
        state[names[theirs]] = tensor
    return state
