"""Configuration of an exported model for Hugging Face transformers (`plato2 export hf`)."""

from typing import Any

from transformers import PretrainedConfig


class Plato2Config(PretrainedConfig):
    """Which stages are in the folder, and their geometry.

    Args:
        generation: `{"stage": ..., "arguments": {"model": {...}}}` of a `2_gen` or `1_coarse` model, or None.
        evaluation: the same of a `2_eval` model, or None.
    """

    model_type = "plato2"

    def __init__(
        self,
        generation: dict[str, Any] | None = None,
        evaluation: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        self.generation, self.evaluation = generation, evaluation
        super().__init__(**others)
