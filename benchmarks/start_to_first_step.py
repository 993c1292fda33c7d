"""Time from process start to the end of the first step, caches warm: `headway train` against a hand-written script.

    python benchmarks/start_to_first_step.py [--rounds 5]

Both train the default model on the default data. The script does the least that such a loop must: import
torch and transformers, map the tokens, build and compile the model, do one step. Ratios are taken within a
round. Also measured: `import headway` and `headway --help`, the best of several.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = """
import sys, numpy as np, torch, torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
tokens = np.memmap(sys.argv[1], dtype=np.uint16, mode="r")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
@torch.compile
def loss_of(x, y):
    return F.cross_entropy(model(input_ids=x, use_cache=False).logits.float().flatten(0, 1), y.flatten())
starts = np.random.default_rng(0).integers(0, len(tokens) - 257, 8)
block = torch.from_numpy(np.stack([tokens[s : s + 257] for s in starts]).astype(np.int64))
with torch.autocast("cpu", torch.bfloat16, enabled=sys.argv[2] == "bf16"):
    loss = loss_of(block[:, :-1].contiguous(), block[:, 1:].contiguous())
loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
print("first step", loss.item(), flush=True)
"""


def until(command: list[str], sign: str) -> float:
    """Seconds from start until a line of output contains `sign`; the process is then ended."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if sign in line:
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise SystemExit(f"{command[0]} ended before its first step")


def best(command: list[str], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    import torch

    from headway.config import load
    from headway.train.display import Display
    from headway.train.loop import _precision
    from headway.train.session import prepare_corpus
    from machine import describe, median_and_spread

    config = load()
    corpus = prepare_corpus(config, Display(quiet=True))
    precision = _precision("auto", torch.device("cpu"), Display(quiet=True))
    print(f"machine: {describe()}; training in {precision}")
    headway = str(Path(sys.executable).with_name("headway"))
    ours, hand = [], []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "by_hand.py"
        script.write_text(SCRIPT)
        for round_ in range(options.rounds + 1):
            run = [headway, "train", "--out", f"{folder}/run{round_}"]
            by_hand = [sys.executable, str(script), str(corpus.path / "train.bin"), precision]
            first, second = until(run, "step 1/"), until(by_hand, "first step")
            if round_:  # the first round warms the caches
                ours.append(first)
                hand.append(second)
                print(f"round {round_}: headway {first:.2f} s, by hand {second:.2f} s", flush=True)
    ratios = [a / b for a, b in zip(ours, hand, strict=True)]
    print(f"headway / by hand: median {median_and_spread(ratios)}, wanted <= 1.25")
    print(json.dumps({"import headway": best([sys.executable, "-c", "import headway"], 7), "wanted": 0.2}))
    print(json.dumps({"headway --help": best([headway, "--help"], 7), "wanted": 0.6}))


if __name__ == "__main__":
    main()
