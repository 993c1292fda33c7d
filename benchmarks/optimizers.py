"""Every optimizer of the catalogue on the same problems, and the time and memory of its step.

    python benchmarks/optimizers.py [--write docs/benchmarks] [--only SLUG ...] [--seeds 2] [--processes 2]

1. Tuning: on each problem every optimizer runs at every learning rate of one grid, with every seed; the rate falls to
   zero in a line. The best mean final loss counts.
   - `text`: a Llama of 0.2 M parameters on the source text of the Python standard library, tokenised to 1024 tokens;
   - `digits`: a network 64-128-10 on scikit-learn's digits;
   - `quadratic`: 1/2 x^T H x in 100 dimensions, condition number 1e4, with noise of 0.01 in the gradient.
2. Time: each optimizer's whole training step on each problem, in turns within one process, so that other load on the
   machine meets all of them; "seconds to AdamW" is steps to AdamW's final loss times that.
3. The step alone and the bytes of state on the parameters of a 12-layer Llama (46 M), also in turns, as ratios to
   AdamW(fused=True). Peers are measured in the same turns where they are installed: `pip install pytorch-optimizer
   bitsandbytes`.

Losses are rounded, never chosen: losers are in the table.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway import catalogue
from headway.plots import Panel, save
from machine import describe

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
SMOOTH = 10  # losses of so many batches are averaged for "steps to"
REFERENCE = "adamw"


@dataclass
class Problem:
    """A model with its batches; `loss(step)` is the training loss of a step's batch, `final()` the one reported."""

    model: nn.Module
    outputs: Callable[[int], tuple[Tensor, Callable[[Tensor], Tensor]]]
    final: Callable[[], float]
    steps: int

    def loss(self, step: int) -> Tensor:
        z, loss = self.outputs(step)
        return loss(z)


def text(seed: int) -> Problem:
    from transformers import LlamaConfig, LlamaForCausalLM

    from headway.config import load
    from headway.train.display import Display
    from headway.train.session import prepare_corpus

    config = load(overrides=["data.vocab_size=1024", "data.sequence_length=64"])
    corpus = prepare_corpus(config, Display(quiet=True))
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=corpus.vocab_size,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attn_implementation="eager",
        )
    )

    def outputs(step: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        inputs, targets = corpus.batch(step, batch_size=8, seed=seed, rank=0, world_size=1)
        logits = model(input_ids=inputs, use_cache=False).logits
        return logits, lambda z: F.cross_entropy(z.flatten(0, 1), targets.flatten())

    def final() -> float:
        with torch.no_grad():
            parts = [
                F.cross_entropy(model(input_ids=x, use_cache=False).logits.flatten(0, 1), y.flatten()).item()
                for x, y in corpus.validation_batches(16, 8)
            ]
        return statistics.mean(parts)

    return Problem(model, outputs, final, steps=100)


def digits(seed: int) -> Problem:
    from sklearn.datasets import load_digits

    data = load_digits()
    X, y = torch.from_numpy(data.data / 16).float(), torch.from_numpy(data.target).long()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))

    def outputs(step: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        batch = torch.randint(len(X), (128,), generator=torch.Generator().manual_seed(1000 * seed + step))
        return model(X[batch]), lambda z: F.cross_entropy(z, y[batch])

    def final() -> float:
        with torch.no_grad():
            return F.cross_entropy(model(X), y).item()

    return Problem(model, outputs, final, steps=300)


class Point(nn.Module):
    """A vector in the shape of a 10 x 10 matrix, so that rules for matrices apply."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 10, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(10, 10, generator=torch.Generator().manual_seed(seed)))


def quadratic(seed: int) -> Problem:
    generator = torch.Generator().manual_seed(7)
    Q = torch.linalg.qr(torch.randn(100, 100, generator=generator, dtype=torch.float64)).Q
    H = ((Q * torch.logspace(-4, 0, 100, dtype=torch.float64)) @ Q.T).float()
    model = Point(seed)

    def value(z: Tensor) -> Tensor:
        return z @ H @ z / 2

    def outputs(step: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        noise = 0.01 * torch.randn(100, generator=torch.Generator().manual_seed(1000 * seed + step))
        return model.layer.weight.flatten(), lambda z: value(z) + noise @ z

    def final() -> float:
        with torch.no_grad():
            return value(model.layer.weight.flatten()).item()

    return Problem(model, outputs, final, steps=300)


PROBLEMS: dict[str, Callable[[int], Problem]] = {"text": text, "digits": digits, "quadratic": quadratic}

# What a method is not made for, or cannot be driven by.
LEFT_OUT = {
    ("consensus-based-optimization", "text"): "for some hundred parameters",
    ("consensus-based-optimization", "digits"): "for some hundred parameters",
    ("gradient-normalized-smoothness", "text"): "dense Newton systems, full batches",
    ("gradient-normalized-smoothness", "digits"): "dense Newton systems, full batches",
    ("target-surrogate", "text"): "losses per sample in a small output space",
    ("normalized-logistic-gd", "text"): "separates two classes",
    ("normalized-logistic-gd", "digits"): "separates two classes",
    ("normalized-logistic-gd", "quadratic"): "separates two classes",
    ("mkor", "quadratic"): "needs layers with inputs",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "adagrad-accelerated": {"mode": "diag", "variant": "averaging"},
    "sgd": {"momentum": 0.9},
    "frugal": {"projection": "columns"},
    "coordinate-clipping": {"inner": "sgd", "momentum": 0.9},
    "last-iterate-mirror-descent": {"schedule": "constant"},
    "optimistic-mirror-descent": {"D": 1e3, "G": 1e3},
    "gradient-normalized-smoothness": {},
}
NO_RATE = ("gradient-normalized-smoothness",)


def slugs() -> list[str]:
    rows = [*catalogue.baselines(), *catalogue.methods()]
    return [row.slug for row in rows if row.role == "optimizer"]


def build(slug: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    cls = catalogue.get(slug, "optimizer").load()
    options = dict(OPTIONS.get(slug, {}))
    if slug not in NO_RATE:
        options["lr"] = lr
    if slug == "fira":
        options["rank"] = 8
    if hasattr(cls, "for_model"):
        return cls.for_model(model, **options)
    return cls(model.parameters(), **options)


def step(problem: Problem, optimizer: Any, number: int) -> float:
    """One training step in the optimizer's own way; returns the loss before it."""
    protocol = getattr(type(optimizer), "step_protocol", "gradients")
    if protocol == "outputs":
        seen = []

        @torch.enable_grad()
        def target_gradient(z: Tensor) -> Tensor:
            z = z.detach().requires_grad_()
            loss = problem.outputs(number)[1](z)
            seen.append(loss.item())
            (gradient,) = torch.autograd.grad(loss, z)
            return gradient * len(z) if z.ndim > 1 else gradient  # of the sum over samples

        optimizer.step(lambda: problem.outputs(number)[0], target_gradient)
        return seen[0]
    if protocol in ("loss", "graph"):
        return float(optimizer.step(lambda: problem.loss(number)))
    optimizer.zero_grad()
    loss = problem.loss(number)
    loss.backward()
    optimizer.step()
    return loss.item()


def run(name: str, slug: str, lr: float, seed: int) -> dict[str, Any]:
    """One training run: the losses of the batches, the final loss and the bytes of state."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    problem = PROBLEMS[name](seed)
    losses: list[float] = []
    state = 0
    try:
        optimizer = build(slug, problem.model, lr)
        schedule = None
        if slug not in NO_RATE:
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / problem.steps)
        for number in range(problem.steps):
            losses.append(step(problem, optimizer, number))
            if not math.isfinite(losses[-1]) or losses[-1] > 1e6:
                raise FloatingPointError("diverged")
            if schedule is not None and number + 1 < problem.steps:
                schedule.step()
        state = state_bytes(optimizer)
        if hasattr(optimizer, "eval"):
            optimizer.eval()
        final = problem.final()
    except (FloatingPointError, torch.linalg.LinAlgError):
        final = math.inf
    return {
        "lr": lr,
        "seed": seed,
        "losses": losses,
        "final": final if math.isfinite(final) else math.inf,
        "state": state,
    }


def state_bytes(optimizer: Any) -> int:
    def tensors(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(map(tensors, value.values()))
        return sum(map(tensors, value)) if isinstance(value, list | tuple) else 0

    return tensors(optimizer.state_dict()["state"])


def smooth(losses: list[float]) -> list[float]:
    return [statistics.mean(losses[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(losses))]


def tune(chosen: list[str], problems: list[str], seeds: int, processes: int) -> dict[str, dict[str, Any]]:
    jobs = [
        (name, slug, lr, seed)
        for name in problems
        for slug in chosen
        if (slug, name) not in LEFT_OUT
        for lr in (RATES if slug not in NO_RATE else RATES[:1])
        for seed in range(seeds)
    ]
    random.Random(0).shuffle(jobs)
    found: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {job: pool.submit(run, *job) for job in jobs}
        for count, ((name, slug, lr, _), future) in enumerate(futures.items(), 1):
            try:
                found.setdefault((name, slug, lr), []).append(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            print(f"\r{count} of {len(jobs)} runs", end="", flush=True)
    print()
    results: dict[str, dict[str, Any]] = {}
    for name in problems:
        results[name] = {}
        for slug in chosen:
            if (slug, name) in LEFT_OUT:
                continue
            grid = {
                lr: statistics.mean(r["final"] for r in found[name, slug, lr])
                for lr in RATES
                if (name, slug, lr) in found
            }
            best = min(grid, key=grid.__getitem__)
            runs = found[name, slug, best]
            full = [r["losses"] for r in runs if math.isfinite(r["final"])]
            mean = smooth([statistics.mean(values) for values in zip(*full, strict=False)]) if full else []
            results[name][slug] = {
                "lr": best,
                "final": grid[best],
                "grid": grid,
                "state": runs[0]["state"],
                "losses": mean,
            }
        mark = results[name][REFERENCE]["losses"][-1]
        for entry in results[name].values():
            below = [i + 1 for i, loss in enumerate(entry["losses"]) if i + 1 >= SMOOTH and loss <= mark]
            entry["steps_to_reference"] = below[0] if below else None
    return results


def time_steps(results: dict[str, dict[str, Any]], rounds: int = 30) -> None:
    """Add `step_seconds`, the median time of a whole training step, by turns."""
    for name, entries in results.items():
        problems = {slug: PROBLEMS[name](0) for slug in entries}
        made = {slug: build(slug, problems[slug].model, entry["lr"]) for slug, entry in entries.items()}
        times: dict[str, list[float]] = {slug: [] for slug in made}
        for turn in range(rounds):
            for slug in random.Random(turn).sample(list(made), len(made)):
                start = time.perf_counter()
                step(problems[slug], made[slug], turn)
                times[slug].append(time.perf_counter() - start)
        for slug, entry in entries.items():
            entry["step_seconds"] = statistics.median(times[slug][3:])


def llama_46m() -> nn.Module:
    """The parameters of a Llama of 12 layers, hidden size 512: modules only, no forward pass needed."""
    layers = []
    for _ in range(12):
        block = nn.ModuleDict({f"attention_{part}": nn.Linear(512, 512, bias=False) for part in "qkvo"})
        block.update({"gate": nn.Linear(512, 1376, bias=False), "up": nn.Linear(512, 1376, bias=False)})
        block.update({"down": nn.Linear(1376, 512, bias=False), "norm1": nn.RMSNorm(512), "norm2": nn.RMSNorm(512)})
        layers.append(block)
    model = nn.ModuleDict({"embed": nn.Embedding(16384, 512), "layers": nn.ModuleList(layers), "norm": nn.RMSNorm(512)})
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = 1e-2 * torch.randn(p.shape, generator=generator)
    return model


def peers() -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    """Other libraries' versions, where they are installed."""
    made: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {}
    try:
        import pytorch_optimizer

        for name in ("DiffGrad", "SPAM", "Fira", "SWAN", "AdaHessian"):
            if hasattr(pytorch_optimizer, name) and name != "AdaHessian":
                cls = getattr(pytorch_optimizer, name)
                made[f"pytorch-optimizer {name}"] = lambda model, cls=cls: _peer(cls, model)
    except ImportError:
        pass
    try:
        import bitsandbytes

        made["bitsandbytes AdamW8bit"] = lambda model: bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-4)
    except ImportError:
        pass
    return made


def _peer(cls: Any, model: nn.Module) -> torch.optim.Optimizer:
    if cls.__name__ == "Fira":
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        return cls(
            [
                {"params": rest},
                {"params": matrices, "rank": 128, "update_proj_gap": 200, "scale": 1.0, "projection_type": "std"},
            ],
            lr=1e-4,
        )
    return cls(model.parameters(), lr=1e-4)


# name -> slug or torch class, and options of the timed configuration
TIMED: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW fused": ("adamw", {"fused": True}),
    "AdamW foreach": ("adamw", {"foreach": True}),
    "diffgrad": ("diffgrad", {}),
    "diffgrad, foreach": ("diffgrad", {"fused": False}),
    "spam": ("spam", {}),
    "spam, foreach": ("spam", {"fused": False}),
    "spam, density 0.25": ("spam", {"density": 0.25}),
    "adagrad-accelerated, norm": ("adagrad-accelerated", {"mode": "norm", "variant": "averaging"}),
    "adagrad-accelerated, diag": ("adagrad-accelerated", {"mode": "diag", "variant": "averaging"}),
    "coordinate-clipping, first moment": ("coordinate-clipping", {"target": "first_moment", "fraction": 0.5}),
    "coordinate-clipping, gradient": ("coordinate-clipping", {"inner": "adamw"}),
    "perpgrad-stablemax": ("perpgrad-stablemax", {}),
    "opposing-signals": ("opposing-signals", {}),
    "blockwise-8bit": ("blockwise-8bit", {}),
    "frugal, blocks": ("frugal", {}),
    "frugal, columns": ("frugal", {"projection": "columns"}),
    "frugal, 8-bit state": ("frugal", {"state_bits": 8}),
    "fira, rank 128": ("fira", {"rank": 128}),
    "swan": ("swan", {}),
    "last-iterate-mirror-descent": ("last-iterate-mirror-descent", {"schedule": "constant"}),
    "optimistic-mirror-descent": ("optimistic-mirror-descent", {"D": 1e3, "G": 1e3}),
}


def time_llama(rounds: int, chosen: list[str] | None) -> dict[str, dict[str, float]]:
    makers: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {}
    known = set(slugs())
    for name, (slug, options) in TIMED.items():
        if slug in known and (chosen is None or slug in chosen or slug == REFERENCE):
            makers[name] = lambda model, slug=slug, options=options: _timed(slug, model, options)
    makers.update(peers())
    model = llama_46m()  # one model for all: two hundred megabytes of parameters and gradients, and each one's state
    made, first = {}, {}
    for name, maker in makers.items():
        made[name] = maker(model)
        start = time.perf_counter()
        made[name].step()
        first[name] = time.perf_counter() - start
    slow = {name for name, seconds in first.items() if seconds > 1.5}
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(made), len(made)):
            if name in slow and turn >= 3:
                continue
            start = time.perf_counter()
            made[name].step()
            times[name].append(time.perf_counter() - start)
    base = times["AdamW fused"]
    return {
        name: {
            "ratio": statistics.median(own / other for own, other in zip(values, base, strict=False)),
            "milliseconds": 1e3 * statistics.median(values),
            "state_bytes": state_bytes(made[name]),
        }
        for name, values in times.items()
    }


def _timed(slug: str, model: nn.Module, options: dict[str, Any]) -> torch.optim.Optimizer:
    cls = catalogue.get(slug, "optimizer").load()
    if slug == "coordinate-clipping" or slug == "perpgrad-stablemax":
        return cls.for_model(model, lr=1e-5, **options)
    if hasattr(cls, "for_model"):
        return cls.for_model(model, lr=1e-5, **options)
    return cls(model.parameters(), lr=1e-5, **options)


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]])


def report(results: dict[str, dict[str, Any]], llama: dict[str, dict[str, float]], machine: str, seeds: int) -> str:
    parts = [f"Measured on: {machine}. Rates {', '.join(f'{lr:g}' for lr in RATES)}; seeds: {seeds}.\n"]
    for name, entries in results.items():
        base = entries[REFERENCE]
        rows = []
        for slug, e in sorted(entries.items(), key=lambda item: item[1]["final"]):
            to = e["steps_to_reference"]
            relative = e["step_seconds"] / base["step_seconds"]
            seconds = to * e["step_seconds"] / (base["steps_to_reference"] * base["step_seconds"]) if to else None
            rows.append(
                [
                    f"`{slug}`",
                    f"{e['final']:.4g}" if math.isfinite(e["final"]) else "diverged",
                    "none" if slug in NO_RATE else f"{e['lr']:g}",
                    str(to) if to else "-",
                    f"{seconds:.2f}" if seconds else "-",
                    f"{relative:.2f}",
                    f"{e['state']:,}",
                ]
            )
        header = [
            "optimizer",
            "final loss",
            "rate",
            "steps to AdamW's loss",
            "time to it / AdamW's",
            "training step / AdamW's",
            "bytes of state",
        ]
        parts += [f"### {name}\n", table(header, rows), ""]
    left = [f"`{slug}` on {name} ({why})" for (slug, name), why in LEFT_OUT.items()]
    parts.append("Left out: " + "; ".join(left) + ".\n")
    if llama:
        rows = [
            [
                name,
                f"{e['ratio']:.2f}",
                f"{e['ratio'] / llama['AdamW foreach']['ratio']:.2f}",
                f"{e['state_bytes'] / llama['AdamW fused']['state_bytes']:.3f}",
                f"{int(e['state_bytes']):,}",
            ]
            for name, e in llama.items()
        ]
        header = ["optimizer", "step / AdamW fused", "step / AdamW foreach", "state / AdamW", "bytes of state"]
        parts += ["### The step alone, 12-layer Llama, 46 M parameters\n", table(header, rows), ""]
    return "\n".join(parts)


def pictures(results: dict[str, dict[str, Any]], folder: Path) -> None:
    for name, entries in results.items():
        ordered = sorted((slug for slug in entries if entries[slug]["losses"]), key=lambda s: entries[s]["final"])
        shown = [REFERENCE, *(slug for slug in ordered if slug != REFERENCE)][:8]
        panels = [
            Panel(
                f"{name}: AdamW and the seven lowest final losses",
                "step",
                "training loss (mean of 10 batches)",
                {s: (list(range(1, len(entries[s]["losses"]) + 1)), entries[s]["losses"]) for s in shown},
                log_y=name != "text",
            ),
            Panel(
                f"{name}: final loss by learning rate",
                "learning rate",
                "final loss",
                {
                    s: (
                        list(entries[s]["grid"]),
                        [v if math.isfinite(v) else math.nan for v in entries[s]["grid"].values()],
                    )
                    for s in shown
                    if len(entries[s]["grid"]) > 1
                },
                log_x=True,
                log_y=True,
            ),
        ]
        save(panels, folder / f"optimizers-{name}.svg")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="*", help="slugs; AdamW is always there")
    options.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--rounds", type=int, default=15, help="turns of the 46 M step; 0 leaves it out")
    options.add_argument("--write", type=Path, help="folder for the table, the figures and the pictures")
    arguments = options.parse_args()
    warnings.simplefilter("ignore")
    chosen = [slug for slug in slugs() if arguments.only is None or slug in arguments.only or slug == REFERENCE]
    threads = torch.get_num_threads()
    results = tune(chosen, arguments.problems, arguments.seeds, arguments.processes) if arguments.problems else {}
    torch.set_num_threads(1)
    time_steps(results)
    torch.set_num_threads(threads)
    llama = time_llama(arguments.rounds, arguments.only) if arguments.rounds else {}
    measured = results
    kept_file = arguments.write / "optimizers.json" if arguments.write else None
    if kept_file is not None and kept_file.is_file():  # a part that was left out stays as it was measured before
        before = json.loads(kept_file.read_text())
        results = {**before["tuned"], **results}
        llama = {**before["llama"], **llama}
    text_ = report(results, llama, describe(), arguments.seeds)
    print(text_)
    if arguments.write:
        arguments.write.mkdir(parents=True, exist_ok=True)
        (arguments.write / "optimizers.md").write_text(text_)
        kept = {
            name: {slug: {k: v for k, v in e.items() if k != "losses"} for slug, e in entries.items()}
            for name, entries in results.items()
        }
        (arguments.write / "optimizers.json").write_text(
            json.dumps({"machine": describe(), "tuned": kept, "llama": llama}, indent=1)
        )
        pictures(measured, arguments.write)


if __name__ == "__main__":
    main()
