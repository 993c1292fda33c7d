"""The model of a run: a Llama of given sizes, or an existing causal language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.train import TrainError

if TYPE_CHECKING:
    from headway.config.schema import ModelSection
    from headway.data import Corpus

__all__ = ["NextTokenLoss", "build_model", "one_line"]


def build_model(section: ModelSection, corpus: Corpus, seed: int) -> Any:
    """The causal language model of `[model]`, in float32, for the corpus's vocabulary.

    Raises:
        TrainError: `from` names no usable model, or one whose vocabulary is smaller than the tokenizer's.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the run has a display of its own
    if section.from_:
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(section.from_, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            raise TrainError(f"model.from: cannot load {section.from_!r}: {one_line(error)}") from error
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and corpus.sequence_length > longest:
            raise TrainError(f"data.sequence_length must be <= {longest} for this model, got {corpus.sequence_length}")
        known = model.config.get_text_config().vocab_size
        if corpus.vocab_size > known:
            raise TrainError(
                f"data.tokenizer has {corpus.vocab_size} tokens, model.from {section.from_!r} only {known}"
            )
        return model

    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = corpus.tokenizer()
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=corpus.vocab_size,
            hidden_size=section.hidden_size,
            intermediate_size=section.intermediate_size,
            num_hidden_layers=section.layers,
            num_attention_heads=section.heads,
            num_key_value_heads=section.kv_heads,
            max_position_embeddings=max(corpus.sequence_length, 2048),
            tie_word_embeddings=section.tie_embeddings,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


class NextTokenLoss(nn.Module):
    """Mean cross-entropy of the next token, in nats.

    loss = -1/(B T) sum_{b,t} log softmax(logits[b, t])[targets[b, t]]
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:  # [B, T], [B, T] -> []
        logits = self.model(input_ids=inputs, use_cache=False).logits  # [B, T, V]
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def one_line(error: BaseException) -> str:
    """An exception's message on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
