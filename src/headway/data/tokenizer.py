"""The tokenizer: byte-level BPE trained on the corpus, or any existing one.

transformers and tokenizers are imported by the functions that need them: they take seconds, and a prepared corpus is
opened without them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.constraints import Range, check_arguments
from headway.data.sources import HUB_NAME, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "END_OF_TEXT",
    "SAMPLE_BYTES",
    "SMALLEST_VOCABULARY",
    "load_tokenizer",
    "tokenizer_identity",
    "train_tokenizer",
]

END_OF_TEXT = "<|endoftext|>"
SAMPLE_BYTES = 64 * 1024 * 1024
SMALLEST_VOCABULARY = 257  # every byte and the end of text
ENDS_OF_TEXT = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[EOS]", "[SEP]")
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")

constraints = {"vocab_size": Range(low=SMALLEST_VOCABULARY, integer=True)}


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, total_bytes: int | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a sample of `texts`.

    The 256 bytes are its alphabet, so every text can be encoded and `decode(encode(x)) == x`. Merges are learned
    inside the words of GPT-2's pre-tokenisation. The only special token is `<|endoftext|>`; where a text spells it
    out, it is read as the end of a document.

    The sample is at most 64 MiB: all of a smaller corpus. Of a larger one whose size is known, documents are drawn
    evenly by a hash of their content; if the size is not known, it is the first 64 MiB.

    Args:
        texts: the documents.
        vocab_size: number of tokens wanted, >= 257. A small corpus can give fewer.
        total_bytes: size of all `texts` in bytes, if known.

    Raises:
        ValueError: `vocab_size` is too small.

    Source: Sennrich et al., arXiv 1508.07909, over bytes as in GPT-2.

    Example:
        >>> tokenizer = train_tokenizer(["low lower lowest", "new newer newest"], vocab_size=270)
        >>> tokenizer.decode(tokenizer.encode("newest: naïve 😀"))
        'newest: naïve 😀'
    """
    check_arguments(constraints, vocab_size=vocab_size)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_sample(texts, total_bytes), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False, add_prefix_space=False
    )


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Load an existing tokenizer.

    Args:
        name: a folder written by `save_pretrained`, a `tokenizer.json`, or a name on the Hugging Face hub.

    Raises:
        DataError: it does not exist, cannot be loaded, has no fast implementation or no end-of-text token.
    """
    path = _local(name)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer: Any
    try:
        if path is None:
            tokenizer = AutoTokenizer.from_pretrained(os.fspath(name), trust_remote_code=False)
        elif path.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False)
        elif (path / "tokenizer.json").is_file() and not (path / "tokenizer_config.json").is_file():
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_file=str(path / "tokenizer.json"), clean_up_tokenization_spaces=False
            )
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception, the hub client its own kinds
        raise DataError(f"cannot load the tokenizer {os.fspath(name)!r}: {error or type(error).__name__}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DataError(
            f"tokenizer {os.fspath(name)!r} must be one that the tokenizers library can run (tokenizer.json)"
        )
    if tokenizer.eos_token_id is None:
        vocabulary = tokenizer.get_vocab()
        known = [token for token in ENDS_OF_TEXT if token in vocabulary]
        if not known:
            raise DataError(
                f"tokenizer {os.fspath(name)!r} must have an end-of-text token: eos_token is not set, "
                f"and none of {' '.join(ENDS_OF_TEXT)} is in its vocabulary"
            )
        tokenizer.eos_token = known[0]
    return tokenizer


def tokenizer_identity(name: str | os.PathLike[str]) -> str:
    """What tells one tokenizer from another, without loading it: the content of local files, the name on the hub."""
    path = _local(name)
    if path is None:
        return f"hub:{os.fspath(name)}"
    digest = hashlib.sha256()
    try:
        files = [path] if path.is_file() else sorted({file for kind in TOKENIZER_FILES for file in path.glob(kind)})
        for file in files:
            digest.update(json.dumps([file.name, hashlib.sha256(file.read_bytes()).hexdigest()]).encode())
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {os.fspath(name)!r}: {error.strerror}") from error
    return f"local:{digest.hexdigest()}"


def _local(name: str | os.PathLike[str]) -> Path | None:
    """The path that `name` is, or None for a name on the hub."""
    accepted = "'train', a folder written by save_pretrained, a tokenizer.json, or a name on the Hugging Face hub"
    if not isinstance(name, str | os.PathLike) or not str(name).strip() or "\0" in str(name):
        raise DataError(f"tokenizer must be {accepted}, got {name!r}")
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        return path
    if isinstance(name, os.PathLike) or not re.fullmatch(HUB_NAME, name) or name.endswith(".json"):
        raise DataError(f"tokenizer {os.fspath(name)!r} does not exist; accepted: {accepted}")
    return None


def _sample(texts: Iterable[str], total_bytes: int | None) -> Iterator[str]:
    share = 1.0 if not total_bytes else SAMPLE_BYTES / total_bytes
    taken = 0
    for text in texts:
        data = text.encode()
        if share < 1 and int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >= share * 2**64:
            continue
        taken += len(data)
        if taken > SAMPLE_BYTES:
            return
        yield text


def largest_token(tokenizer: Any) -> int:
    """The largest token id that `tokenizer` can give; a vocabulary may have holes, so this is not its length - 1."""
    return max(tokenizer.get_vocab().values())
