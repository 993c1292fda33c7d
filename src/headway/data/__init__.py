"""Text sources, tokenizer, packed token files and the order of training.

Importing this package loads numpy only; torch, transformers, tokenizers, pyarrow and datasets are loaded by the
functions that need them.
"""

from headway.data.corpus import Corpus, DamagedCorpusError
from headway.data.packed import Progress, default_cache_dir, prepare
from headway.data.permutation import permute
from headway.data.sources import DataError, FileEntry, Listing, documents, listing
from headway.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "Corpus",
    "DamagedCorpusError",
    "DataError",
    "FileEntry",
    "Listing",
    "Progress",
    "default_cache_dir",
    "documents",
    "listing",
    "load_tokenizer",
    "permute",
    "prepare",
    "train_tokenizer",
]
