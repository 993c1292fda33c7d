"""From a configuration to a finished run: data, workers, the loop, and what is left behind."""

from __future__ import annotations

import gc
import json
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import headway
from headway.config import Config
from headway.data import Corpus, listing, prepare
from headway.train import TrainError
from headway.train.display import Display
from headway.train.run import RunFolder

if TYPE_CHECKING:
    from headway.train.loop import Result, Trainer
    from headway.train.workers import Workers

__all__ = ["check_data", "prepare_corpus", "run_worker"]


def check_data(config: Config) -> None:
    """Raise `headway.data.DataError` for a source that cannot be read, before anything starts."""
    listing(config.data.source)


def prepare_corpus(config: Config, display: Display) -> Corpus:
    """The corpus of `[data]`, tokenised now or found in the cache.

    A model that is fine-tuned brings its own tokenizer unless `data.tokenizer` names another.
    """
    data = config.data
    tokenizer = config.model.from_ if config.model.from_ and data.tokenizer == "train" else data.tokenizer
    try:
        return prepare(
            data.source,
            sequence_length=data.sequence_length,
            vocab_size=data.vocab_size,
            tokenizer=tokenizer,
            validation_fraction=data.validation_fraction,
            text_field=data.text_field,
            cache_dir=data.cache_dir or None,
            progress=display.data,
            report=display.warn,
        )
    finally:
        display.close()


def run_worker(config: Config, folder: str | Path | None, resume: bool) -> tuple[RunFolder, Result]:
    """Train as one of the workers that the environment describes (alone without torchrun).

    Arguments:
        config: the configuration, the same on all workers.
        folder: the run's folder; None lets the first worker choose one.
        resume: go on from the folder's newest checkpoint.
    """
    from headway.train.model import one_line
    from headway.train.workers import Workers

    workers = Workers.from_environment()
    workers.connect(workers.device(config.train.device))
    try:
        return _run_connected(config, folder, resume, workers)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # the frames hold the trainer
        if workers.count > 1 and isinstance(error, RuntimeError) and "gloo" in str(error):
            raise TrainError(f"the connection to another worker was lost: {one_line(error)}") from error
        raise
    finally:
        # The trainer must be gone before the group is: DistributedDataParallel's reducer, were it the group's last
        # owner, would wait for gloo's thread while holding the lock that this thread needs.
        gc.collect()
        workers.disconnect()


def _run_connected(
    config: Config, folder: str | Path | None, resume: bool, workers: Workers
) -> tuple[RunFolder, Result]:
    from headway.train.loop import Trainer

    display = Display(quiet=workers.rank > 0, log_every=config.train.log_every)
    # The first worker of each machine builds the corpus; the others then find it.
    if workers.local_rank == 0:
        corpus = prepare_corpus(config, display)
    workers.barrier()
    if workers.local_rank != 0:
        corpus = prepare_corpus(config, display)
    path = None
    if workers.rank == 0:
        theirs = folder is not None and workers.restarts > 0 and RunFolder(folder).config_file.is_file()
        path = folder if resume or theirs else RunFolder.create(folder, config).path
    run = RunFolder(workers.from_first(path))
    display.note(f"run folder: {run.path}")
    trainer = Trainer(config, corpus, run, workers, display)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    display.note(
        f"model: {parameters / 1e6:.2f} M parameters, {trainer.precision}; "
        f"data: {corpus.train_tokens:,} training tokens from {config.data.source}; "
        f"{config.budget}, {config.batch.size * config.data.sequence_length:,} tokens per step"
    )
    result = trainer.train()
    if workers.rank == 0:
        if not result.interrupted:
            _finish(trainer, run, display)
            # What this process did outside the loop, and all that the loop ever did: resumed runs add up.
            outside = time.perf_counter() - headway.started - trainer.elapsed_here
            run.write_json(
                run.environment_file,
                {**trainer.environment(), "whole command, seconds": round(outside + trainer.elapsed, 1)},
            )
        _report(run, display)
    workers.barrier()
    return run, result


def _finish(trainer: Trainer, run: RunFolder, display: Display) -> None:
    """Write the model and sample from it."""
    tokenizer = trainer.corpus.tokenizer()
    with trainer.evaluation_point():
        samples = [_sample(trainer, tokenizer, prompt) for prompt in trainer.config.sample.prompts]
        try:
            with run.samples_file.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(sample) + "\n" for sample in samples)
            trainer.model.save_pretrained(run.model)
            tokenizer.save_pretrained(run.model)
        except OSError as error:
            reason = error.strerror or error
            raise TrainError(
                f"the model was not written: {reason}; free space, then: headway train --resume"
            ) from error
    if samples:
        display.note(f"sample:\n{samples[0]['prompt']}{samples[0]['text']}")


def _sample(trainer: Trainer, tokenizer: Any, prompt: str) -> dict[str, Any]:
    from headway.train.generate import complete

    section = trainer.config.sample
    seed = trainer.config.train.seed
    text = complete(trainer.model, tokenizer, prompt, tokens=section.tokens, temperature=section.temperature, seed=seed)
    return {"step": trainer.step, "prompt": prompt, "text": text}


def _report(run: RunFolder, display: Display) -> None:
    from headway.train.report import write_report

    try:
        write_report(run.path)
    except OSError as error:
        display.warn(f"the report was not written: {error.strerror or error}")
