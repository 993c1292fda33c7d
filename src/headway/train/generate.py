"""Text from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from headway.train import TrainError
from headway.train.model import one_line
from headway.train.run import RunFolder

__all__ = ["complete", "load_model"]


def load_model(path: str | Path) -> tuple[Any, Any]:
    """Model and tokenizer of a run folder, of its `model/`, or of any folder in Hugging Face form.

    Raises:
        TrainError: there is no model there, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    run = RunFolder(path)
    if run.config_file.is_file() and not run.complete:
        raise TrainError(f"run {str(path)!r} has no model yet; finish it with: headway train --resume {path}")
    folder = run.model if run.complete else Path(path)
    if not (folder / "config.json").is_file():
        raise TrainError(f"no run and no model in {str(path)!r}")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise TrainError(f"cannot load the model in {str(folder)!r}: {one_line(error)}") from error


def complete(
    model: Any, tokenizer: Any, prompt: str, *, tokens: int, temperature: float, seed: int, streamer: Any = None
) -> str:
    """The continuation of `prompt` by at most `tokens` sampled tokens (the likeliest ones at temperature 0).

    The global random state is left as it was.
    """
    encoded = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt", add_special_tokens=False)
    inputs = encoded["input_ids"].to(model.device)
    if tokens == 0:
        return ""
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id,
            streamer=streamer,
            **sampling,
        )
    return tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
