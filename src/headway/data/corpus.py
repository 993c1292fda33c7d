"""A prepared corpus: two files of token ids, and the order in which training reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from headway.constraints import Constraint, Range, check_arguments
from headway.data.permutation import permute
from headway.data.sources import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

__all__ = ["Corpus", "DamagedCorpusError"]

FORMAT_VERSION = 1


class DamagedCorpusError(DataError):
    """A folder that is not a complete prepared corpus."""


class Corpus:
    r"""Token files of a prepared corpus, read as blocks in a seeded order.

    With T = `sequence_length`, block k holds the tokens x[kT], ..., x[kT + T]: T inputs and, shifted by one, T
    targets. Neighbouring blocks share one token, so within an epoch every token but the first, and but the last
    `(train_tokens - 1) % T`, is a target exactly once. Sample n = step * batch_size + i of training is

        block pi(n mod blocks)   with the permutation pi of (seed, n div blocks),

    so an epoch visits every block once, the order is a function of (seed, step) alone - a run resumes at a step
    without replaying - and nothing is stored per block (see `permute`).

    Args:
        path: a folder made by `prepare`.
        sequence_length: T, whole number >= 1.

    Raises:
        DamagedCorpusError: the folder is not a complete corpus.
        DataError: the training split has fewer than T + 1 tokens.

    Example:
        >>> import tempfile, pathlib
        >>> from headway.data import prepare
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = pathlib.Path(folder, "squares.txt")
        ...     _ = text.write_text("".join(f"{i} squared is {i * i}\n" for i in range(2000)))
        ...     corpus = prepare(text, sequence_length=32, vocab_size=300, cache_dir=folder)
        ...     inputs, targets = corpus.batch(0, batch_size=8, seed=0)
        >>> inputs.shape, bool((inputs[:, 1:] == targets[:, :-1]).all())
        (torch.Size([8, 32]), True)
    """

    constraints: ClassVar[dict[str, Constraint]] = {
        "sequence_length": Range(low=1, integer=True),
        "step": Range(low=0, integer=True),
        "first": Range(low=0, integer=True),
        "count": Range(low=1, integer=True),
        "batch_size": Range(low=1, integer=True),
        "seed": Range(low=0, integer=True),
        "world_size": Range(low=1, integer=True),
        "rank": Range(low=0, integer=True),
        "limit": Range(low=1, integer=True, optional=True),
    }

    def __init__(self, path: str | os.PathLike[str], sequence_length: int) -> None:
        check_arguments(self.constraints, sequence_length=sequence_length)
        self.path = Path(path)
        self.sequence_length = sequence_length
        self.meta = _read_meta(self.path)
        self.blocks = (self.train_tokens - 1) // sequence_length
        if self.blocks < 1:
            raise DataError(
                f"source {self.meta['source']!r} is too small: its training split has {self.train_tokens} tokens, "
                f"sequence_length {sequence_length} needs at least {sequence_length + 1}"
            )

    def __repr__(self) -> str:
        return f"Corpus({str(self.path)!r}, sequence_length={self.sequence_length})"

    @property
    def train_tokens(self) -> int:
        """Tokens of the training split, ends of text included."""
        return self.meta["train_tokens"]

    @property
    def validation_tokens(self) -> int:
        """Tokens of the validation split, ends of text included."""
        return self.meta["validation_tokens"]

    @property
    def vocab_size(self) -> int:
        """Number of token ids: the largest that the tokenizer can give, plus one."""
        return self.meta["vocab_size"]

    @property
    def content_hash(self) -> str:
        """SHA-256 of the documents, the tokenizer and the split: equal hashes mean equal token files."""
        return self.meta["content_hash"]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the source's listing (`Listing.fingerprint`) at the time of preparation."""
        return self.meta["fingerprint"]

    @property
    def tokenizer_dir(self) -> Path:
        """Folder with the tokenizer, as `save_pretrained` wrote it."""
        return self.path / "tokenizer"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Load the tokenizer (imports transformers)."""
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(str(self.tokenizer_dir), trust_remote_code=False)
        return tokenizer

    def batch(
        self, step: int, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a training step.

        Args:
            step: step of the run, >= 0.
            batch_size: sequences of all ranks together, a multiple of `world_size`.
            seed: selects the order, >= 0.
            rank: which contiguous share of the batch is wanted, in [0, world_size).
            world_size: number of shares, >= 1.

        Returns:
            Two int64 tensors [batch_size / world_size, sequence_length].

        Raises:
            ValueError: an argument is outside its range.
        """
        check_arguments(self.constraints, step=step, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        if batch_size % world_size:
            raise ValueError(f"batch_size must be a multiple of world_size {world_size}, got {batch_size}")
        if rank >= world_size:
            raise ValueError(f"rank must be < world_size {world_size}, got {rank}")
        return self.samples(step * batch_size + rank * (batch_size // world_size), batch_size // world_size, seed=seed)

    def samples(self, first: int, count: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the samples `first`, ..., `first + count - 1` of the order that `seed` selects.

        Args:
            first: number of the first sample since the start of training, >= 0.
            count: samples, >= 1.
            seed: selects the order, >= 0.

        Returns:
            Two int64 tensors [count, sequence_length].

        Raises:
            ValueError: an argument is outside its range.
        """
        check_arguments(self.constraints, first=first, count=count, seed=seed)
        epoch, position = np.divmod(np.arange(first, first + count), self.blocks)
        blocks = permute(position, self.blocks, seed=seed, epoch=epoch)
        return _gather(self._train, blocks, self.sequence_length)

    def validation_batches(
        self, batch_size: int, limit: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Validation blocks in a fixed order, at most `limit` batches of them, spaced evenly over the split.

        The last batch can be smaller. A split shorter than one block gives one shorter sequence of all its tokens.

        Args:
            batch_size: sequences per batch, >= 1.
            limit: number of batches, >= 1; None for the whole split.
        """
        check_arguments(self.constraints, batch_size=batch_size, limit=limit)
        length = min(self.sequence_length, self.validation_tokens - 1)
        blocks = (self.validation_tokens - 1) // length
        count = blocks if limit is None else min(blocks, limit * batch_size)
        for first in range(0, count, batch_size):
            chosen = np.arange(first, min(first + batch_size, count)) * blocks // count
            yield _gather(self._validation, chosen, length)

    @cached_property
    def _train(self) -> NDArray[Any]:
        return self._open("train.bin")

    @cached_property
    def _validation(self) -> NDArray[Any]:
        return self._open("val.bin")

    def _open(self, name: str) -> NDArray[Any]:
        # As a plain array: indexing np.memmap goes through its slower subclass hooks.
        return np.asarray(np.memmap(self.path / name, dtype=self.meta["dtype"], mode="r"))


def _gather(tokens: NDArray[Any], blocks: NDArray[np.int64], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    window = tokens[blocks[:, None] * length + np.arange(length + 1)]  # [B, T + 1]
    sequences = torch.from_numpy(window.astype(np.int64))
    return sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()


META_TYPES = {
    "train_tokens": int,
    "validation_tokens": int,
    "train_documents": int,
    "validation_documents": int,
    "vocab_size": int,
    "dtype": str,
    "content_hash": str,
    "fingerprint": str,
    "source": str,
}


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads((path / "meta.json").read_bytes())
        if not isinstance(meta, dict) or meta.get("format") != FORMAT_VERSION:
            raise DamagedCorpusError(f"{str(path)!r}: meta.json is not of format {FORMAT_VERSION}")
        for name, kind in META_TYPES.items():
            if not isinstance(meta.get(name), kind):
                raise DamagedCorpusError(f"{str(path)!r}: meta.json has no {name}")
        if meta["dtype"] not in ("uint16", "uint32") or min(meta["train_tokens"], meta["validation_tokens"]) < 2:
            raise DamagedCorpusError(f"{str(path)!r}: meta.json has impossible values")
        for name, tokens in (("train.bin", meta["train_tokens"]), ("val.bin", meta["validation_tokens"])):
            expected = tokens * np.dtype(meta["dtype"]).itemsize
            size = (path / name).stat().st_size
            if size != expected:
                raise DamagedCorpusError(f"{str(path / name)!r} has {size} bytes instead of {expected}")
        if not (path / "tokenizer" / "tokenizer.json").is_file():
            raise DamagedCorpusError(f"{str(path)!r} has no tokenizer")
    except DamagedCorpusError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCorpusError(f"{str(path)!r} is not a prepared corpus: {error}") from error
    return meta
