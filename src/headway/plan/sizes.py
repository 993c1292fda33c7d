"""The ladder of model sizes that a plan chooses from, and what a step of each costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["LADDER", "LR_TIMES_WIDTH", "Size", "size_named"]

# The usual scaling of Adam's rate with the width (as in maximal-update parametrisation); measured at two widths.
LR_TIMES_WIDTH = 0.256


@dataclass(frozen=True)
class Size:
    """A Llama with tied embeddings: width d, MLP width m, L layers, heads of 16 to 64 channels.

    >>> LADDER[0].parameters(vocab_size=2048)
    282048
    """

    name: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int

    def body(self) -> int:
        """Parameters without the embedding: per layer 4 d^2 + 3 d m + 2 d, and the last norm's d."""
        d, m = self.hidden_size, self.intermediate_size
        return self.layers * (4 * d * d + 3 * d * m + 2 * d) + d

    def parameters(self, vocab_size: int) -> int:
        """All parameters."""
        return self.body() + vocab_size * self.hidden_size

    def flops_per_token(self, vocab_size: int, sequence_length: int) -> float:
        """Floating-point operations per token of a training step: 6 per matrix entry, and the attention's products.

        The attention's two products take 2 T d operations each per layer and token, three times with the backward
        pass, computed for the whole square.
        """
        matrices = self.body() + vocab_size * self.hidden_size
        return 6.0 * matrices + 12.0 * self.layers * sequence_length * self.hidden_size

    def learning_rate(self) -> float:
        """The peak rate of AdamW: 0.256 / d, so 0.004 at the smallest width, where twice as much was worse."""
        return LR_TIMES_WIDTH / self.hidden_size

    def section(self) -> dict[str, Any]:
        """The keys of `[model]`."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "layers": self.layers,
            "heads": self.heads,
            "kv_heads": self.heads,
        }


LADDER = (
    Size("xxs", 64, 176, 3, 4),
    Size("xs", 128, 352, 4, 4),
    Size("s", 192, 512, 4, 4),
    Size("m", 256, 704, 6, 4),
    Size("l", 384, 1024, 8, 6),
    Size("xl", 512, 1376, 12, 8),
    Size("2xl", 768, 2048, 12, 12),
    Size("3xl", 1024, 2816, 24, 16),
)
"""From the smallest to the largest; each has two to four times the parameters of the one before."""


def size_named(name: str) -> Size:
    """The size of this name.

    Raises:
        ValueError: there is none.

    >>> size_named("s").layers
    4
    """
    for size in LADDER:
        if size.name == name:
            return size
    raise ValueError(f"model size must be auto or one of {', '.join(size.name for size in LADDER)}, got {name!r}")
