"""Models that answer as one: train K of them, average their logits, see what each further member brings.

    z = (1/K) sum_k z_k / T

Source: "Pre-training under infinite compute", Kim, Kotha, Liang, Hashimoto, arXiv 2509.14786.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.snapshot import rng_state, set_rng_state

__all__ = ["LogitEnsemble", "ensemble_curve", "train_ensemble"]

_COUNT = Range(low=1, integer=True)
_SEED = Range(low=0, integer=True)


class LogitEnsemble(nn.Module):
    r"""K models that answer as one: the mean of their logits.

        z = (1/K) sum_k z_k / T

    Its cross-entropy is at most the mean of the members' on every batch, since log-sum-exp is convex. The K logits are
    never held together: a running mean in float32 takes them one by one. A forward costs K forwards.

    Args:
        models: K >= 1 modules whose forward returns logits (..., V), or an object with `.logits` (causal models of
            transformers), over one vocabulary.
        temperature: T > 0. Default 1, the paper's.
        reduce: "mean"; "max" or "min" of the logits, also in the authors' code; or "probability", the logarithm of
            the mean of the members' probabilities, for comparison.
        sequential: bring every member to the device of the inputs for its forward and back to where it was, so that
            members can wait in CPU memory; not for training. Default False: inputs go to the members, which may sit on
            different devices.

    Raises:
        ValueError: no model, an argument out of its range, or (in forward) logits of different shapes.

    Source: arXiv 2509.14786; the logits are averaged, not the probabilities.

    >>> models = [nn.Linear(4, 3) for _ in range(2)]
    >>> x = torch.ones(5, 4)
    >>> torch.allclose(LogitEnsemble(models)(x), (models[0](x) + models[1](x)) / 2)
    True
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "temperature": Range(low=0, low_open=True),
        "reduce": OneOf("mean", "max", "min", "probability"),
        "sequential": OneOf(False, True),
    }

    def __init__(
        self, models: Iterable[nn.Module], temperature: float = 1.0, reduce: str = "mean", *, sequential: bool = False
    ) -> None:
        check_arguments(self.constraints, temperature=temperature, reduce=reduce, sequential=sequential)
        super().__init__()
        self.models = nn.ModuleList(models)
        if not len(self.models):
            raise ValueError("models must hold at least one module, got none")
        self.temperature = temperature
        self.reduce = reduce
        self.sequential = sequential

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The logits (..., V) of the ensemble in float32, on the device of the first tensor among the arguments."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        home = tensors[0].device if tensors else None
        total: Tensor | None = None
        for number, model in enumerate(self.models):
            logits = self._member(model, home, args, kwargs).float() / self.temperature
            if home is not None:
                logits = logits.to(home)
            if self.reduce == "probability":
                logits = logits.log_softmax(-1)
            if total is None:
                total = logits
            elif logits.shape != total.shape:
                raise ValueError(
                    f"models must give logits of one shape, got {tuple(logits.shape)} from model {number} "
                    f"after {tuple(total.shape)}"
                )
            elif self.reduce == "mean":
                total = total + logits
            else:
                join = {"max": torch.maximum, "min": torch.minimum, "probability": torch.logaddexp}[self.reduce]
                total = join(total, logits)
        assert total is not None
        if self.reduce == "mean":
            return total / len(self.models)
        return total - math.log(len(self.models)) if self.reduce == "probability" else total

    def _member(
        self, model: nn.Module, home: torch.device | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor:
        first = next(model.parameters(), None)
        here = home if first is None else first.device
        moved = self.sequential and here != home and home is not None
        if moved:
            model.to(home)
        target = home if moved else here

        def sent(value: Any) -> Any:
            return value.to(target) if isinstance(value, Tensor) and target is not None else value

        try:
            output = model(*map(sent, args), **{name: sent(value) for name, value in kwargs.items()})
        finally:
            if moved:
                model.to(here)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise ValueError(f"models must return logits or an object with .logits, got {type(output).__name__}")
        return logits


def train_ensemble(
    make_model: Callable[[int], nn.Module],
    train_fn: Callable[[nn.Module, int], object],
    k: int,
    seeds: Sequence[int] | None = None,
) -> list[nn.Module]:
    """Make and train K members that differ in nothing but their seed.

    The global generators are set to the member's seed for both calls and put back afterwards, so that a member
    is a function of its seed.

    Args:
        make_model: seed -> a new model; draws its initial weights.
        train_fn: (model, seed) trains the model in place; draws the order of its data from the seed.
        k: number of members >= 1.
        seeds: k different whole numbers >= 0. Default 0 ... k-1.

    Raises:
        ValueError: k is not >= 1, or the seeds are not k different ones.

    >>> members = train_ensemble(lambda seed: nn.Linear(2, 2), lambda model, seed: None, 2)
    >>> bool((members[0].weight == members[1].weight).any())
    False
    """
    check_arguments({"k": _COUNT}, k=k)
    chosen = list(range(k)) if seeds is None else list(seeds)
    if len(chosen) != k or len(set(chosen)) != k or not all(_SEED.accepts(seed) for seed in chosen):
        raise ValueError(f"seeds must be {k} different whole numbers >= 0, got {chosen}")
    members = []
    before = rng_state()
    try:
        for seed in chosen:
            random.seed(seed)
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            model = make_model(seed)
            train_fn(model, seed)
            members.append(model)
    finally:
        set_rng_state(before)
    return members


def ensemble_curve(
    logits_list: Sequence[Tensor], targets: Tensor, repeats: int = 100, *, seed: int = 0
) -> tuple[list[int], list[float]]:
    """The loss of mean-logit ensembles of 1 ... K members, from the logits of K members.

        L_k = mean over subsets S of k members of CE(mean_{i in S} z_i)

    With all subsets (as soon as there are at most `repeats` of a size) L_k cannot rise with k.

    Args:
        logits_list: K tensors (..., V) of logits on the same rows.
        targets: class numbers (...); -100 is ignored.
        repeats: subsets drawn per size >= 1, with replacement. Default 100: all subsets up to K = 8.
        seed: of the draw, >= 0.

    Returns:
        The sizes 1 ... K and the losses in nats, ready for `PowerLawAsymptote().fit`.

    Raises:
        ValueError: no logits, logits of different shape, or an argument out of its range.

    >>> logits = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])]
    >>> sizes, losses = ensemble_curve(logits, torch.tensor([0]))
    >>> sizes, [round(loss, 4) for loss in losses]
    ([1, 2], [0.41, 0.3133])
    """
    check_arguments({"repeats": _COUNT, "seed": _SEED}, repeats=repeats, seed=seed)
    shapes = sorted({tuple(logits.shape) for logits in logits_list})
    if len(shapes) != 1:
        raise ValueError(f"logits_list must hold tensors of one shape, got {shapes}")
    stacked = torch.stack([logits.detach().float() for logits in logits_list])  # [K, ..., V]
    generator = torch.Generator().manual_seed(seed)
    members, losses = len(stacked), []
    for size in range(1, members + 1):
        if math.comb(members, size) <= repeats:
            subsets = [list(subset) for subset in combinations(range(members), size)]
        else:
            subsets = [torch.randperm(members, generator=generator)[:size].tolist() for _ in range(repeats)]
        each = [_cross_entropy(stacked[subset].mean(0), targets) for subset in subsets]
        losses.append(float(torch.stack(each).double().mean()))
    return list(range(1, members + 1)), losses


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
