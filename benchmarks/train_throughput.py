"""Tokens/s of `headway train` against Hugging Face `Trainer` at its defaults and against a loop written by hand.

    python benchmarks/train_throughput.py [--steps 30] [--profile]

The same model, batch and data for all three, each in a process of its own. The processes take turns, one step
each while the others wait, so that all meet the machine in the same state (a shared machine's speed can change
severalfold within a minute); ratios are taken within a turn and the median over the turns is reported. Each
process does some steps before its first turn (compilation, caches).

`--profile` prints instead where a step of `headway train` spends its time.

The hand-written loop is the best one we know: compiled, bf16 where the processor has it, fused AdamW,
pre-tokenised data. `Trainer` is timed from its `on_step_begin` to its `on_step_end`, so without its data loading.
"""

from __future__ import annotations

import argparse
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


class Turn:
    """One step's turn: waits for a line on the input, then tells the seconds on the output."""

    def __init__(self) -> None:
        self.start = 0.0
        self.warm_up = SKIPPED

    def begin(self) -> None:
        self.warm_up -= 1
        if self.warm_up < 0 and not sys.stdin.readline():
            raise SystemExit
        self.start = time.perf_counter()

    def end(self) -> None:
        seconds = time.perf_counter() - self.start
        if self.warm_up <= 0:
            print(f"turn {seconds if self.warm_up else 0}", flush=True)  # the last step of the warm-up: ready


def headway(steps: int) -> None:
    from headway.train.loop import Trainer
    from headway.train.run import RunFolder

    config, corpus, _ = parts(steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, corpus, RunFolder.create(f"{folder}/run", config))
        turn, one_step = Turn(), trainer._one_step

        def timed_step():
            turn.begin()
            one_step()
            turn.end()

        trainer._one_step = timed_step
        trainer.train()


def by_hand(steps: int) -> None:
    import torch
    import torch.nn.functional as F

    _, corpus, model = parts(steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    enabled = bf16()

    @torch.compile
    def loss_of(x, y):
        return F.cross_entropy(model(input_ids=x, use_cache=False).logits.float().flatten(0, 1), y.flatten())

    turn = Turn()
    for step in range(steps):
        turn.begin()
        x, y = corpus.batch(step, batch_size=BATCH, seed=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        turn.end()


def trainer(steps: int) -> None:
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
        turn = Turn()

        def on_step_begin(self, *args, **kwargs):
            self.turn.begin()

        def on_step_end(self, *args, **kwargs):
            self.turn.end()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, max_steps=steps, report_to="none", disable_tqdm=True
        )
        Trainer(model, arguments, train_dataset=Blocks(), callbacks=[Clock()]).train()


def profile(steps: int) -> None:
    """The shares of a step by operator; compiled element-wise code appears as its graph's own time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    from headway.train.loop import Trainer

    config, corpus, _ = parts(steps)
    trainer = Trainer(config, corpus)
    for _ in range(SKIPPED):
        trainer._one_step()
    with record(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            trainer._one_step()
    rows = sorted(recorded.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    for row in rows[:8]:
        print(f"{row.self_cpu_time_total / total:6.1%}  {row.key[:80]}")


CONTENDERS = {"headway": headway, "by hand": by_hand, "Trainer": trainer}


class Contender:
    """A contender's process, one step at a time."""

    def __init__(self, name: str, steps: int) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--one", name, "--steps", str(steps)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()

    def _answer(self) -> float:
        for line in self.process.stdout:
            if line.startswith("turn "):
                return float(line.split()[1])
        raise SystemExit(f"{self.name} ended early")

    def step(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.seconds.append(self._answer())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if options.profile:
        profile(options.steps)
        return
    if options.one:
        CONTENDERS[options.one](options.steps + SKIPPED + 1)
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
    contenders = {name: Contender(name, options.steps) for name in CONTENDERS}
    shares = []
    for turn in range(options.steps):
        order = list(contenders.values())
        for contender in order[turn % 3 :] + order[: turn % 3]:
            contender.step()
        shares.append(flops / contenders["headway"].seconds[-1] / matmul_rate(dtype, seconds=0.3))
    for contender in contenders.values():
        contender.process.kill()
        print(f"{contender.name}: {tokens / statistics.median(contender.seconds):,.0f} tokens/s (median)")
    for peer, wanted in (("Trainer", 2.0), ("by hand", 0.97)):
        ratios = [b / a for a, b in zip(contenders["headway"].seconds, contenders[peer].seconds, strict=True)]
        print(f"headway / {peer}: median {median_and_spread(ratios)}, wanted >= {wanted}")
    print(f"{count / 1e6:.2f} M parameters, {tokens} tokens per step, {flops / 1e9:.1f} GFLOP per step")
    print(f"share of the measured {dtype} matrix-product rate: median {median_and_spread(shares)}")


if __name__ == "__main__":
    main()
