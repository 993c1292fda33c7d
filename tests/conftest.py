import os

# Before any test imports a library that reads them: small problems are fastest on one thread, and no test may
# reach for a hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import random
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def notes(tmp_path_factory) -> Path:
    """A folder of small text files, as a person's notes might be."""
    folder = tmp_path_factory.mktemp("notes")
    words = "the run of a small model on an old machine is slow but it ends with a loss that we can read"
    rng = random.Random(0)
    for number in range(40):
        (folder / f"note{number:02}.txt").write_text(" ".join(rng.choices(words.split(), k=300)))
    return folder


@pytest.fixture(scope="session")
def tiny(notes, tmp_path_factory) -> list[str]:
    """Overrides that make a run of seconds."""
    values = {
        "data.source": str(notes),
        "data.cache_dir": str(tmp_path_factory.mktemp("cache")),
        "data.vocab_size": 300,
        "data.sequence_length": 16,
        "data.validation_fraction": 0.1,
        "model.hidden_size": 16,
        "model.intermediate_size": 32,
        "model.layers": 2,
        "model.heads": 2,
        "model.kv_heads": 1,
        "batch.size": 4,
        "train.steps": 12,
        "train.evaluate_every": 5,
        "train.evaluate_batches": 2,
        "train.compile": False,
        "train.threads": 1,
        "train.device": "cpu",
        "train.precision": "fp32",
        "checkpoint.every": 4,
        "sample.tokens": 3,
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
