"""A teacher, or an ensemble of them, into one model: by text that they sample, or token by token.

Source: "Pre-training under infinite compute", Kim, Kotha, Liang, Hashimoto, arXiv 2509.14786.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from headway.constraints import Constraint, Range, check_arguments
from headway.snapshot import rng_state, set_rng_state

__all__ = ["MixedDataset", "distillation_loss", "sample_teachers"]

_POSITIVE = Range(low=0, low_open=True)
_COUNT = Range(low=1, integer=True)
_SHARE = Range(low=0, high=1)
_SEED = Range(low=0, integer=True)


class MixedDataset(Dataset[Any]):
    """Real and synthetic rows mixed at random, with a fixed share in expectation.

    Every item is synthetic with probability w. Each source is passed over in a new random order as often as needed,
    so that no row comes twice before all have come once, and neither source runs dry. Item i is a function of
    (seed, epoch, i): any sampler, worker or rank sees the same rows.

    Args:
        real: a map-style dataset or sequence, not empty unless w = 1.
        synthetic: the same, of the teacher's samples, not empty unless w = 0.
        synthetic_weight: w in [0, 1]. Default 0.9, the paper's for an 8-member teacher; 0.75 for self-distillation.
        length: items per epoch >= 1. Default: about one pass over the real rows, ceil(len(real) / (1 - w)); with
            w = 1 one over the synthetic ones.
        seed: of the draws, >= 0.

    Raises:
        ValueError: an argument out of its range, or a needed source is empty.

    Source: arXiv 2509.14786. Text that the teacher has memorised from validation data spoils the validation.

    >>> mixed = MixedDataset(range(100), range(1000, 1050), synthetic_weight=0.5, length=1000)
    >>> 400 < sum(mixed[i] >= 1000 for i in range(len(mixed))) < 600
    True
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "synthetic_weight": _SHARE,
        "length": Range(low=1, integer=True, optional=True),
        "seed": _SEED,
    }

    def __init__(
        self, real: Any, synthetic: Any, synthetic_weight: float = 0.9, *, length: int | None = None, seed: int = 0
    ) -> None:
        check_arguments(self.constraints, synthetic_weight=synthetic_weight, length=length, seed=seed)
        for name, source, weight in (
            ("real", real, 1 - synthetic_weight),
            ("synthetic", synthetic, synthetic_weight),
        ):
            if weight > 0 and not len(source):
                raise ValueError(
                    f"{name} must hold at least one row at synthetic_weight = {synthetic_weight}, got none"
                )
        self.real = real
        self.synthetic = synthetic
        self.synthetic_weight = synthetic_weight
        if length is None:
            length = len(synthetic) if synthetic_weight == 1 else math.ceil(len(real) / (1 - synthetic_weight))
        self.length = length
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the mixture and the orders of another epoch >= 0."""
        check_arguments({"epoch": _SEED}, epoch=epoch)
        # One generator seed per (seed, epoch): neighbouring seeds must not share epochs.
        words = np.random.SeedSequence([self.seed, epoch]).generate_state(2)
        generator = torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        self._is_synthetic = torch.rand(self.length, generator=generator) < self.synthetic_weight
        self._row = torch.empty(self.length, dtype=torch.int64)
        for source, chosen in ((self.real, ~self._is_synthetic), (self.synthetic, self._is_synthetic)):
            needed = int(chosen.sum())
            passes = math.ceil(needed / max(len(source), 1))
            orders = [torch.randperm(len(source), generator=generator) for _ in range(passes)]
            if needed:
                self._row[chosen] = torch.cat(orders)[:needed]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if not -self.length <= index < self.length:
            raise IndexError(f"index must be in [{-self.length}, {self.length}), got {index}")
        source = self.synthetic if self._is_synthetic[index] else self.real
        return source[int(self._row[index])]


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, weight: float = 0.9, temperature: float = 1.0
) -> Tensor:
    r"""Token-level distillation: the divergence from the teacher, mixed with the loss on the data.

        loss = w T^2 KL(softmax(z_teacher / T) || softmax(z_student / T)) + (1 - w) CE(z_student, targets)

    both as means over the tokens whose target is not -100 (zero if there is none); T^2 keeps the gradient's size
    independent of T. No gradient goes to the teacher. The arithmetic is in float32.

    Args:
        student_logits: (..., V).
        teacher_logits: (..., V), of `LogitEnsemble` for an ensemble.
        targets: class numbers (...); -100 is ignored.
        weight: w in [0, 1]. Default 0.9, the paper's share of an 8-member teacher's text.
        temperature: T > 0. Default 1.

    Raises:
        ValueError: an argument out of its range, or shapes that do not fit.

    Source: the token-level alternative to the paper's (arXiv 2509.14786) training on sampled text.

    >>> logits, targets = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    >>> round(float(distillation_loss(logits, logits, targets, weight=1.0)), 6)
    0.0
    """
    check_arguments({"weight": _SHARE, "temperature": _POSITIVE}, weight=weight, temperature=temperature)
    if student_logits.shape != teacher_logits.shape or student_logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"teacher_logits must have the shape of student_logits, and targets that less the last: got "
            f"{tuple(teacher_logits.shape)}, {tuple(student_logits.shape)} and {tuple(targets.shape)}"
        )
    classes = student_logits.shape[-1]
    student, teacher = (z.float().reshape(-1, classes) for z in (student_logits, teacher_logits.detach()))
    labels = targets.reshape(-1)
    kept = labels != -100
    wanted = (teacher / temperature).log_softmax(-1)
    given = (student / temperature).log_softmax(-1)
    divergence = functional.kl_div(given, wanted, reduction="none", log_target=True).sum(-1)
    entropy = functional.cross_entropy(student, labels, reduction="none")  # zero where ignored
    each = weight * temperature**2 * divergence + (1 - weight) * entropy
    return torch.where(kept, each, 0.0).sum() / kept.sum().clamp(min=1)


def sample_teachers(
    models: Sequence[Any],
    documents: int,
    length: int,
    *,
    bos_token_id: int | None = None,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
) -> list[Tensor]:
    """Text that the teachers make up from nothing: the synthetic part of a `MixedDataset`.

    Every teacher gives an equal part (the first ones one more where it does not divide), sampled token by token from
    its full distribution after the start token, up to its end token.

    Args:
        models: causal models of transformers, of one vocabulary.
        documents: number of documents >= 1, over all teachers.
        length: the most tokens per document, >= 2, with the start token.
        bos_token_id: the start token. Default: that of the first model's config.
        temperature: > 0. Default 1, the model's own distribution.
        batch_size: documents sampled at once. Default 32.
        seed: of the samples, >= 0. The global generators, which `generate` draws from, are put back.

    Returns:
        `documents` tensors of int64 on the CPU, start and (if reached) end token included, teacher after teacher.

    Raises:
        ValueError: no model, no start token, or an argument out of its range.

    Source: arXiv 2509.14786, sequence-level distillation; that the ensemble's text is a mixture of the members' own
    samples is read from the names in the authors' code.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> sizes = dict(vocab_size=11, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=10)
    >>> text = sample_teachers([GPT2LMHeadModel(GPT2Config(**sizes))], documents=3, length=6)
    >>> len(text), all(int(tokens[0]) == 0 and len(tokens) <= 6 for tokens in text)
    (3, True)
    """
    ranges = {"documents": _COUNT, "length": Range(low=2, integer=True), "temperature": _POSITIVE}
    check_arguments(ranges, documents=documents, length=length, temperature=temperature)
    check_arguments({"batch_size": _COUNT, "seed": _SEED}, batch_size=batch_size, seed=seed)
    if not models:
        raise ValueError("models must hold at least one model, got none")
    start = models[0].config.bos_token_id if bos_token_id is None else bos_token_id
    if start is None:
        raise ValueError("bos_token_id must be given: the first model's config names none")
    texts: list[Tensor] = []
    before = rng_state()
    try:
        torch.manual_seed(seed)
        for number, model in enumerate(models):
            left = documents // len(models) + (number < documents % len(models))
            training = model.training
            model.eval()
            try:
                while left > 0:
                    rows = min(left, batch_size)
                    texts += _sample(model, torch.full((rows, 1), start), length, temperature)
                    left -= rows
            finally:
                model.train(training)
    finally:
        set_rng_state(before)
    return texts


@torch.no_grad()
def _sample(model: Any, prompt: Tensor, length: int, temperature: float) -> list[Tensor]:
    end = model.generation_config.eos_token_id
    ends = torch.tensor([] if end is None else [end] if isinstance(end, int) else end, dtype=torch.int64)
    prompt = prompt.to(model.device)
    rows = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_length=length,
        # What follows the end token is cut off below: any filler will do.
        pad_token_id=int(ends[0]) if len(ends) else None,
    ).cpu()
    # The start token may be the end token too: only tokens after it end the text.
    stops = torch.isin(rows[:, 1:], ends)
    lengths = torch.where(stops.any(1), stops.int().argmax(1) + 2, rows.shape[1])
    return [row[:size].clone() for row, size in zip(rows, lengths.tolist(), strict=True)]
