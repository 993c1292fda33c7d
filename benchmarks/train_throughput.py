"""Tokens/s of `headway train` against Hugging Face `Trainer` at its defaults and against a loop written by hand.

The same model, batch and data for all three, each in a process of its own (as a user would run it), in
alternation, several rounds; ratios are taken within a round and the median over rounds is reported.

    python benchmarks/train_throughput.py [--rounds 5] [--steps 12]

The hand-written loop is the best one we know: compiled, bf16 where the processor has it, fused AdamW,
pre-tokenised data. Steps before the third are left out of every rate (compilation, caches).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

SIZES = {"hidden_size": 256, "intermediate_size": 640, "layers": 4, "heads": 4, "kv_heads": 4}
BATCH, LENGTH, VOCABULARY = 16, 256, 2048
SKIPPED = 3


def overrides(steps: int) -> list[str]:
    values = {f"model.{key}": value for key, value in SIZES.items()}
    values |= {"batch.size": BATCH, "data.sequence_length": LENGTH, "data.vocab_size": VOCABULARY}
    values |= {"train.steps": steps, "train.evaluate_every": 0, "train.evaluate_batches": 1}
    return [f"{key}={value}" for key, value in values.items()]


def parts(steps: int):
    """Configuration, corpus and a fresh model, the same for all contenders."""
    from headway.config import load
    from headway.train.display import Display
    from headway.train.model import build_model
    from headway.train.session import prepare_corpus

    config = load(overrides=overrides(steps))
    corpus = prepare_corpus(config, Display(quiet=True))
    return config, corpus, build_model(config.model, corpus, seed=0)


def bf16() -> bool:
    import torch

    from headway.train.display import Display
    from headway.train.loop import _precision

    return _precision("auto", torch.device("cpu"), Display(quiet=True)) == "bf16"


def headway(steps: int) -> list[float]:
    from headway.train.loop import Trainer

    config, corpus, _ = parts(steps)
    with tempfile.TemporaryDirectory() as folder:
        from headway.train.run import RunFolder

        run = RunFolder.create(f"{folder}/run", config)
        Trainer(config, corpus, run).train()
        records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [BATCH * LENGTH / record["tokens_per_second"] for record in records if "loss" in record]


def by_hand(steps: int) -> list[float]:
    import torch
    import torch.nn.functional as F

    _, corpus, model = parts(steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    enabled = bf16()

    @torch.compile
    def loss_of(x, y):
        return F.cross_entropy(model(input_ids=x, use_cache=False).logits.float().flatten(0, 1), y.flatten())

    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        x, y = corpus.batch(step, batch_size=BATCH, seed=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - start)
    return seconds


def trainer(steps: int) -> list[float]:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    _, corpus, model = parts(steps)

    class Blocks(torch.utils.data.Dataset):
        def __len__(self):
            return steps * BATCH

        def __getitem__(self, index):
            x, _ = corpus.batch(index, batch_size=1, seed=0)
            return {"input_ids": x[0], "labels": x[0]}

    class Clock(TrainerCallback):
        def __init__(self):
            self.ticks = []

        def on_train_begin(self, *args, **kwargs):
            self.ticks.append(time.perf_counter())

        on_step_end = on_train_begin

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, per_device_train_batch_size=BATCH, max_steps=steps, report_to="none")
        Trainer(model, arguments, train_dataset=Blocks(), callbacks=[clock]).train()
    return [b - a for a, b in zip(clock.ticks, clock.ticks[1:], strict=False)]


CONTENDERS = {"headway": headway, "by hand": by_hand, "Trainer": trainer}


def measure(name: str, steps: int) -> float:
    done = subprocess.run(
        [sys.executable, __file__, "--one", name, "--steps", str(steps)], capture_output=True, text=True, check=True
    )
    return statistics.median(json.loads(done.stdout.splitlines()[-1])[SKIPPED:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(CONTENDERS[options.one](options.steps)))
        return

    import torch

    from machine import describe, matmul_rate, median_and_spread

    dtype = torch.bfloat16 if bf16() else torch.float32
    print(f"machine: {describe()}; training in {dtype}")
    _, _, model = parts(options.steps)
    count = sum(p.numel() for p in model.parameters())
    tokens = BATCH * LENGTH
    # 6 per parameter and token for the products (the tied embedding counts once, as the head), and the causal
    # scores and sums of attention at half their square.
    flops = 6 * count * tokens + 6 * SIZES["layers"] * SIZES["hidden_size"] * LENGTH * tokens
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    shares = []
    for round_ in range(options.rounds):
        # The peers change places from round to round, so that drift of the machine favours none.
        names = list(CONTENDERS)[round_ % 3 :] + list(CONTENDERS)[: round_ % 3]
        for name in names:
            seconds[name].append(measure(name, options.steps))
        shares.append(flops / seconds["headway"][-1] / matmul_rate(dtype))
        print(
            f"round {round_ + 1}: " + ", ".join(f"{name} {tokens / s[-1]:,.0f} tokens/s" for name, s in seconds.items())
        )
    for peer, wanted in (("Trainer", 2.0), ("by hand", 0.97)):
        ratios = [b / a for a, b in zip(seconds["headway"], seconds[peer], strict=True)]
        print(f"headway / {peer}: median {median_and_spread(ratios)}, wanted >= {wanted}")
    print(f"{count / 1e6:.2f} M parameters, {tokens} tokens per step, {flops / 1e9:.1f} GFLOP per step")
    print(f"share of the measured {dtype} matrix-product rate: median {median_and_spread(shares)}")


if __name__ == "__main__":
    main()
