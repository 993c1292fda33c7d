"""What the statistics for an adaptive batch cost: a step that looks at its micro-batches against one that does not.

    python benchmarks/batch_probe.py [--rounds 15]

The model and batch of `headway train`'s defaults in two micro-batches, uncompiled, the two kinds of step in turns;
medians and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time

from headway.config import load
from headway.train.display import Display
from headway.train.loop import Trainer
from headway.train.session import prepare_corpus
from machine import describe


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=15)
    arguments = options.parse_args()
    config = load(
        overrides=[
            "train.compile=false",
            "batch.name=adadagrad",
            "batch.micro_batch=4",
            "batch.max_batch=64",
            "batch.eta=1000.0",  # never grows
        ]
    )
    trainer = Trainer(config, prepare_corpus(config, Display(quiet=True)), display=Display(quiet=True))
    kinds = {"plain": trainer._backward, "looking": trainer._probing_backward}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(arguments.rounds + 1):
        for name, backward in kinds.items():
            start = time.perf_counter()
            backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            if turn:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    share = medians["looking"] / medians["plain"] - 1
    print(f"{describe()}\nlooking / plain: {1 + share:.3f}; at test_interval = 10: {share / 10:.2%} of the time")


if __name__ == "__main__":
    main()
