"""perpGrad's point: a network that has fitted its data goes on to generalise, without weight decay.

Addition modulo p (47) from 40 % of all pairs: one-hot inputs, a network 2p-200-200-p without biases, full batches,
learning rate 0.01, no weight decay. AdamW fits the training pairs and stays at chance on the others; the same with
perpGrad learns addition. And the softmax's collapse: at logits (20, 0, 0) in float32 cross-entropy has a gradient
of exactly zero, StableMax has not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from headway.claims import Check, Outcome, Panel
from headway.optim.perpgrad_stablemax import PerpGrad, stablemax_cross_entropy

__all__ = ["claim", "modular_addition", "train"]


@dataclass
class Run:
    """Accuracy on the training and on the other pairs, by step."""

    steps: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)


def modular_addition(p: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """One-hot pairs (p^2, 2p), their sums modulo p, and a random order of the pairs."""
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).T
    inputs = torch.cat([nn.functional.one_hot(a, p), nn.functional.one_hot(b, p)], dim=1).float()
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(seed))
    return inputs, (a + b) % p, order


def train(make: Callable[[nn.Module], Optimizer], p: int, steps: int, seed: int) -> Run:
    """Full-batch training with cross-entropy."""
    inputs, sums, order = modular_addition(p, seed)
    count = int(0.4 * p * p)
    seen, unseen = order[:count], order[count:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(2 * p, 200, bias=False),
            nn.ReLU(),
            nn.Linear(200, 200, bias=False),
            nn.ReLU(),
            nn.Linear(200, p, bias=False),
        )
    optimizer = make(model)
    run = Run()
    for step in range(steps + 1):
        logits = model(inputs[seen])
        if step % 10 == 0 or step == steps:
            with torch.no_grad():
                run.steps.append(float(step))
                run.train.append((logits.argmax(1) == sums[seen]).float().mean().item())
                run.test.append((model(inputs[unseen]).argmax(1) == sums[unseen]).float().mean().item())
        if step < steps:
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, sums[seen]).backward()
            optimizer.step()
    return run


def label_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The label's gradient at logits (20, 0, 0) in float32."""
    logits = torch.tensor([[20.0, 0.0, 0.0]], requires_grad=True)
    loss(logits, torch.tensor([0])).backward()
    assert logits.grad is not None
    return logits.grad[0, 0].item()


def claim(seed: int = 0, p: int = 47, steps: int = 300, project: bool = True) -> Outcome:
    """Measure the claim. Without `project` there is no projection and nothing left to claim."""

    def adamw(model: nn.Module) -> Optimizer:
        return AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-25, weight_decay=0.0)

    def perpgrad(model: nn.Module) -> Optimizer:
        inner = AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
        return PerpGrad(inner) if project else inner

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = {"AdamW": train(adamw, p, steps, seed), "perpGrad": train(perpgrad, p, steps, seed)}
    finally:
        torch.set_num_threads(threads)
    return Outcome(
        statement="Without any weight decay, gradients orthogonal to the weights turn a network that has memorised "
        "its training pairs into one that adds; and StableMax has a gradient where the softmax has collapsed.",
        paper="No figure in the abstract; the official script runs 300 epochs for addition modulo 113.",
        checks=[
            Check(
                "accuracy on unseen pairs, perpGrad with AdamW",
                runs["perpGrad"].test[-1],
                ">=",
                0.85,
                baseline=runs["AdamW"].test[-1],
            ),
            Check("accuracy on the training pairs, AdamW", runs["AdamW"].train[-1], ">=", 1.0),
            Check("accuracy on unseen pairs, AdamW", runs["AdamW"].test[-1], "<=", 0.10),
            Check(
                "StableMax's gradient of the label at logits (20, 0, 0), magnitude",
                abs(label_gradient(stablemax_cross_entropy)),
                ">=",
                0.004,
                baseline=abs(label_gradient(nn.functional.cross_entropy)),
            ),
        ],
        panels=[
            Panel(
                f"Addition modulo {p}: pairs not trained on",
                "step",
                "accuracy",
                {name: (run.steps, run.test) for name, run in runs.items()},
            ),
            Panel(
                "The training pairs",
                "step",
                "accuracy",
                {name: (run.steps, run.train) for name, run in runs.items()},
            ),
        ],
    )
