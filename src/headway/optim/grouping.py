"""Hidden matrices of a model, the weights that methods for matrices are meant for, and batches of equal shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["batches_of_one_shape", "hidden_matrices", "split_parameters"]

_HEADS = frozenset({"classifier", "cls", "embed_out", "head", "lm_head", "qa_outputs", "score"})


def hidden_matrices(
    model: nn.Module, target_modules: str | Sequence[str] | None = None, include_head: bool = False
) -> set[int]:
    """The ids of the weights of all linear layers (`nn.Linear`, GPT-2's `Conv1D`) except the output head.

    In a transformer these are attention and MLP. The head is what `model.get_output_embeddings()` returns, modules
    below a name such as `lm_head`, `classifier` or `head`, and a weight tied to an embedding.

    Args:
        model: any module; Hugging Face models included.
        target_modules: name or names; linear layers whose qualified name contains one of them, and no others.
        include_head: the head too.

    Raises:
        ValueError: no linear layer's name contains any of `target_modules`.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    >>> hidden_matrices(model) == {id(model[1].weight)}
    True
    """
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    chosen: set[int] = set()
    found = False
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            weight = module.weight
            head = module is output or not _HEADS.isdisjoint(name.split(".")) or id(weight) in embeddings
            named = targets is not None and any(target in name for target in targets)
            found = found or named
            if named or (head and include_head) or (not head and targets is None):
                chosen.add(id(weight))
    if targets is not None and not found:
        raise ValueError(f"target_modules must name linear layers of the model, got {target_modules!r}")
    return chosen


def split_parameters(
    model: nn.Module, target_modules: str | Sequence[str] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The trainable parameters that are `hidden_matrices`, and all others, each in the model's order."""
    chosen = hidden_matrices(model, target_modules)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in trainable if id(p) in chosen], [p for p in trainable if id(p) not in chosen]


def batches_of_one_shape(params: Iterable[Tensor], elements: int = 2**22) -> Iterator[list[Tensor]]:
    """Parameters of one shape, device and dtype, at most `elements` entries (or one parameter) at a time.

    >>> import torch
    >>> shapes = [(2, 2), (4, 1), (2, 2), (2, 2)]
    >>> [len(batch) for batch in batches_of_one_shape(map(torch.zeros, shapes), elements=8)]
    [2, 1, 1]
    """
    kinds: dict[Any, list[Tensor]] = {}
    for p in params:
        kinds.setdefault((p.device, p.dtype, p.shape), []).append(p)
    for members in kinds.values():
        size = max(1, elements // max(1, members[0].numel()))
        for first in range(0, len(members), size):
            yield members[first : first + size]
