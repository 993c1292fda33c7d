"""From text to token files, built once and found again.

A corpus is prepared into a folder of the cache named after everything that determines it: the source's listing and
the settings. The folder is built beside its place under another name and moved there when complete, so that an
interrupted build is never taken for a finished one.

    train.bin, val.bin   token ids, uint16 or uint32, native byte order, each document followed by the end of text
    tokenizer/           as `save_pretrained` writes it
    meta.json            counts, dtype, vocabulary, hashes
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from headway.constraints import Constraint, Range, check_arguments
from headway.data.corpus import FORMAT_VERSION, Corpus, DamagedCorpusError
from headway.data.sources import DataError, Listing, documents, listing, logger
from headway.data.tokenizer import (
    SMALLEST_VOCABULARY,
    largest_token,
    load_tokenizer,
    tokenizer_identity,
    train_tokenizer,
)

__all__ = ["Progress", "default_cache_dir", "prepare"]

# What is tokenised at once, and so what bounds the memory: an encoded token costs about a hundred bytes on the way.
BATCH_CHARACTERS = 1024 * 1024
BATCH_DOCUMENTS = 1024

constraints: dict[str, Constraint] = {
    "sequence_length": Range(low=1, integer=True),
    "vocab_size": Range(low=SMALLEST_VOCABULARY, integer=True),
    "validation_fraction": Range(low=0, high=1, low_open=True, high_open=True),
}


@dataclass(frozen=True)
class Progress:
    """How far a preparation is.

    Attributes:
        stage: "tokenizer" while its sample is read, "tokens" while documents are tokenised.
        done: bytes of text so far in this stage.
        total: bytes of text of the stage, or None where the source does not tell.
    """

    stage: str
    done: int
    total: int | None


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/headway/data`, or `~/.cache/headway/data` where that variable is not set."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "headway" / "data"


def prepare(
    source: str | os.PathLike[str] = "stdlib",
    *,
    sequence_length: int,
    vocab_size: int = 4096,
    tokenizer: str | os.PathLike[str] = "train",
    validation_fraction: float = 0.05,
    text_field: str = "text",
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> Corpus:
    """Tokenise `source` into memory-mapped files, or find them where an earlier call has left them.

    A document d goes to validation if h(d) < `validation_fraction`, where h in [0, 1) is a hash of its content: a
    document, and every copy of it, stays on its side when others come or go. Should a side be left empty, it gets
    the document whose hash is nearest. Documents are read, tokenised and written in batches; the memory needed does
    not depend on the size of the source.

    A finished corpus is found by listing the source (paths, sizes, times of change) without reading it. A dataset on
    the hub counts as unchanged while its name is the same. Several processes may prepare the same corpus: one builds
    and the others wait for it.

    Args:
        source: see `headway.data.listing`.
        sequence_length: tokens per training sequence, >= 1; not part of what is cached.
        vocab_size: tokens of a trained tokenizer, >= 257, default 4096; not used with an existing tokenizer.
        tokenizer: "train" (default), or an existing one: see `headway.data.load_tokenizer`.
        validation_fraction: share of the documents held out, in (0, 1), default 0.05.
        text_field: the field that holds the text of a row in .jsonl, .parquet and datasets.
        cache_dir: default `default_cache_dir()`.
        progress: called now and then while the corpus is built.
        report: receives lines worth telling the user (skipped files, a damaged cache); default the logger
            "headway.data".

    Raises:
        DataError: the source, the tokenizer or the cache cannot be used, or there is too little text.
        ValueError: a number is outside its range.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, text in [("a.txt", "to be or not to be"), ("b.txt", "that is the question")]:
        ...         _ = open(f"{folder}/{name}", "w").write(text)
        ...     corpus = prepare(folder, sequence_length=4, vocab_size=257, cache_dir=f"{folder}/cache")
        ...     corpus.train_tokens + corpus.validation_tokens
        40
    """
    check_arguments(
        constraints, sequence_length=sequence_length, vocab_size=vocab_size, validation_fraction=validation_fraction
    )
    if not isinstance(text_field, str):
        raise DataError(f"text_field must be the name of a field, got {text_field!r}")
    report = report or logger.warning
    found = listing(source)
    trained = tokenizer == "train"
    settings = {
        "format": FORMAT_VERSION,
        "tokenizer": ["train", int(vocab_size)] if trained else tokenizer_identity(tokenizer),
        "validation_fraction": float(validation_fraction),
        "text_field": text_field,
    }
    key = hashlib.sha256(json.dumps([found.fingerprint, settings]).encode()).hexdigest()[:32]
    folder = (default_cache_dir() if cache_dir is None else Path(os.path.expanduser(cache_dir))) / key

    def build(into: Path) -> None:
        _build(found, into, tokenizer, vocab_size, validation_fraction, text_field, progress, report)

    if folder.exists():
        try:
            return Corpus(folder, sequence_length)
        except DamagedCorpusError as error:
            report(f"building the corpus again: {error}")
    try:
        _build_once(folder, build, report)
    except OSError as error:  # what the source can raise is a DataError already
        reason = error.strerror or type(error).__name__
        raise DataError(
            f"cannot write the prepared corpus to {str(folder.parent)!r}: {reason}; make room or name another cache_dir"
        ) from error
    return Corpus(folder, sequence_length)


def _build_once(folder: Path, build: Callable[[Path], None], report: Callable[[str], None]) -> None:
    """Fill `folder` with what `build` writes, under the lock of its key."""
    from filelock import FileLock, Timeout

    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_lock_path(cache, folder.name))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"waiting for another process that prepares the same corpus in {str(cache)!r}")
        lock.acquire()
    try:
        _remove_abandoned(cache, folder.name)
        if _is_complete(folder):
            return
        partial, damaged = cache / f".{folder.name}.new.partial", cache / f".{folder.name}.damaged.partial"
        partial.mkdir()
        try:
            build(partial)
            _flush_tree(partial)
            if folder.exists():
                # Moved out of the way first: a folder can only be renamed onto an empty one.
                folder.rename(damaged)
            partial.rename(folder)
            _flush(cache)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(damaged, ignore_errors=True)
    finally:
        lock.release()


def _lock_path(cache: Path, key: str) -> Path:
    return cache / f".{key}.lock"


def _is_complete(folder: Path) -> bool:
    try:
        Corpus(folder, 1)
    except DataError:
        return False
    return True


def _remove_abandoned(cache: Path, own_key: str) -> None:
    """Remove what killed builds have left: a partial folder whose lock nobody holds."""
    from filelock import FileLock, Timeout

    for partial in cache.glob(".*.partial"):
        key = partial.name.split(".")[1]
        # The own lock is held here already.
        lock = contextlib.nullcontext() if key == own_key else FileLock(_lock_path(cache, key), timeout=0)
        with contextlib.suppress(Timeout), lock:
            shutil.rmtree(partial, ignore_errors=True)


def _flush_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _build(
    found: Listing,
    folder: Path,
    tokenizer_name: str | os.PathLike[str],
    vocab_size: int,
    validation_fraction: float,
    text_field: str,
    progress: Callable[[Progress], None] | None,
    report: Callable[[str], None],
) -> None:
    total = found.text_bytes
    if tokenizer_name == "train":
        texts = _counted(documents(found, text_field, report=lambda message: None), "tokenizer", total, progress)
        tokenizer = train_tokenizer(texts, vocab_size, total_bytes=sum(entry.size for entry in found.files) or None)
    else:
        tokenizer = load_tokenizer(tokenizer_name)
    try:
        tokenizer.save_pretrained(folder / "tokenizer")
    except OSError:
        raise
    except Exception as error:  # tokenizers reports a failed write as a bare Exception
        raise OSError(0, str(error)) from error

    from tokenizers import Tokenizer

    written = tokenizer.backend_tokenizer.to_str()
    backend = Tokenizer.from_str(written)  # a copy: the settings below are not the saved tokenizer's
    backend.no_truncation()
    backend.no_padding()
    vocabulary = largest_token(tokenizer) + 1
    dtype = np.dtype(np.uint16 if vocabulary < 65536 else np.uint32)
    content = hashlib.sha256(
        json.dumps([FORMAT_VERSION, written, tokenizer.eos_token_id, float(validation_fraction), text_field]).encode()
    )
    with (folder / "train.bin").open("wb") as train_file, (folder / "val.bin").open("wb") as validation_file:
        train, validation = _Side(train_file), _Side(validation_file)
        texts = _counted(documents(found, text_field, report=report), "tokens", total, progress)
        for batch in _batches(texts):
            for text, encoding in zip(batch, backend.encode_batch_fast(batch, add_special_tokens=False), strict=True):
                data = text.encode()
                digest = hashlib.blake2b(data, digest_size=16).digest()
                content.update(digest)
                h = int.from_bytes(digest[:8], "big") / 2**64
                document = _Document(
                    digest,
                    np.array([*encoding.ids, tokenizer.eos_token_id], dtype=dtype),
                    len(data),
                    abs(h - validation_fraction),
                )
                (validation if h < validation_fraction else train).add(document)
        _settle(train, validation, found.source)
    meta = {
        "format": FORMAT_VERSION,
        "source": found.source,
        "fingerprint": found.fingerprint,
        "content_hash": content.hexdigest(),
        "vocab_size": vocabulary,
        "dtype": dtype.name,
        "validation_fraction": float(validation_fraction),
        "text_field": text_field,
        **{f"train_{name}": value for name, value in train.counts.items()},
        **{f"validation_{name}": value for name, value in validation.counts.items()},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _counted(
    texts: Iterable[str], stage: str, total: int | None, progress: Callable[[Progress], None] | None
) -> Iterator[str]:
    done = reported = 0
    for text in texts:
        yield text
        done += len(text) if text.isascii() else len(text.encode())
        if progress is not None and done - reported >= BATCH_CHARACTERS // 4:
            reported = done
            progress(Progress(stage, done, total))
    if progress is not None:
        progress(Progress(stage, done, total))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@dataclass
class _Document:
    digest: bytes
    tokens: NDArray[Any]
    size: int
    distance: float  # |h - validation_fraction|: the nearest changes side first
    copies: int = 1


@dataclass
class _Side:
    """One split being written; it holds back its document nearest to the boundary, in case the other stays empty."""

    file: BinaryIO
    held: _Document | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"tokens": 0, "documents": 0, "bytes": 0})

    def add(self, document: _Document) -> None:
        if self.held is None:
            self.held = document
        elif document.digest == self.held.digest:
            self.held.copies += 1
        elif document.distance < self.held.distance:
            self.write(self.held)
            self.held = document
        else:
            self.write(document)

    def write(self, document: _Document) -> None:
        data = document.tokens.tobytes()
        for _ in range(document.copies):
            self.file.write(data)
        self.counts["tokens"] += document.tokens.size * document.copies
        self.counts["documents"] += document.copies
        self.counts["bytes"] += document.size * document.copies

    @property
    def empty(self) -> bool:
        return self.held is None and not self.counts["documents"]


def _settle(train: _Side, validation: _Side, source: str) -> None:
    """Write what was held back, to the other side where that is empty."""
    for side, other in ((train, validation), (validation, train)):
        if other.empty and not side.counts["documents"]:
            raise DataError(
                f"source {source!r} is too small: it holds a single document (copies are counted once), "
                "and at least 2 are needed, one of them for validation"
            )
    for side, other in ((train, validation), (validation, train)):
        if side.held is not None:
            (other if other.empty else side).write(side.held)
            side.held = None
    for name, side in (("training", train), ("validation", validation)):
        if side.counts["tokens"] < 2:
            raise DataError(f"source {source!r} is too small: its {name} split has {side.counts['tokens']} token")
