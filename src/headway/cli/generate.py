"""`headway generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headway.cli.failures import WRONG_INPUT, fail, failures


def generate(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a model's folder in Hugging Face form.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "def ",
    tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Selects the sample.")] = 0,
) -> None:
    """Stream text from a trained model.

    Example:
        headway generate runs/20261124-101500 --prompt "import os"
    """
    if tokens < 1:
        raise fail(f"--tokens must be >= 1, got {tokens}", WRONG_INPUT)
    if not 0 <= temperature < float("inf"):
        raise fail(f"--temperature must be >= 0, got {temperature}", WRONG_INPUT)
    if seed < 0:
        raise fail(f"--seed must be >= 0, got {seed}", WRONG_INPUT)
    with failures():
        from headway.train.generate import complete, load_model

        model, tokenizer = load_model(run)
        from transformers import TextStreamer

        typer.echo(prompt, nl=False)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        complete(model, tokenizer, prompt, tokens=tokens, temperature=temperature, seed=seed, streamer=streamer)
