import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.data import Corpus, DamagedCorpusError, DataError
from headway.data.corpus import FORMAT_VERSION


def write_corpus(folder, train, validation=2, dtype="uint16"):
    """A prepared corpus whose training tokens count upwards, so that a token tells its place."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    np.arange(train).astype(dtype).tofile(folder / "train.bin")
    np.arange(validation).astype(dtype).tofile(folder / "val.bin")
    meta = {
        "format": FORMAT_VERSION,
        "source": "counting",
        "fingerprint": "f",
        "content_hash": "c",
        "vocab_size": 60_000,
        "dtype": dtype,
        "train_tokens": train,
        "validation_tokens": validation,
        "train_documents": 1,
        "validation_documents": 1,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    made = {}

    def corpus(train, length, validation=2):
        if (train, validation) not in made:
            made[train, validation] = write_corpus(tmp_path_factory.mktemp("corpus"), train, validation)
        return Corpus(made[train, validation], length)

    return corpus


def test_targets_are_inputs_shifted_by_one(counting):
    inputs, targets = counting(1000, 8).batch(3, batch_size=5, seed=1)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (5, 8)
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)


@given(train=st.integers(2, 400), length=st.integers(1, 40), seed=st.integers(0, 100))
@settings(deadline=None)
def test_an_epoch_predicts_every_token_once(counting, train, length, seed):
    if train <= length:
        return
    corpus = counting(train, length)
    targets = corpus.batch(0, batch_size=corpus.blocks, seed=seed)[1]
    assert sorted(targets.ravel().tolist()) == list(range(1, 1 + corpus.blocks * length))
    assert train - 1 - corpus.blocks * length < length


@given(batch_size=st.integers(1, 30), steps=st.integers(1, 12), seed=st.integers(0, 100))
@settings(deadline=None)
def test_batches_of_any_size_walk_the_same_order(counting, batch_size, steps, seed):
    corpus = counting(100, 7)  # 14 blocks: batches straddle epochs, and can hold several
    walked = torch.cat([corpus.batch(step, batch_size=batch_size, seed=seed)[0] for step in range(steps)])
    assert torch.equal(walked, corpus.batch(0, batch_size=batch_size * steps, seed=seed)[0])


def test_epochs_and_seeds_have_different_orders(counting):
    corpus = counting(1001, 10)
    orders = {
        tuple(corpus.batch(epoch, batch_size=100, seed=seed)[0][:, 0].tolist())
        for epoch in range(5)
        for seed in range(5)
    }
    assert len(orders) == 25
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(0, 1000, 10))}


@given(world_size=st.integers(1, 6), share=st.integers(1, 5), step=st.integers(0, 50))
@settings(deadline=None)
def test_ranks_together_read_the_single_process_batch(counting, world_size, share, step):
    corpus = counting(100, 7)
    settings = {"batch_size": world_size * share, "seed": 5}
    ranks = [corpus.batch(step, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    whole = corpus.batch(step, **settings)
    for part in (0, 1):
        assert torch.equal(torch.cat([batch[part] for batch in ranks]), whole[part])


def test_fewer_blocks_than_the_batch_repeat(counting):
    inputs, _ = counting(11, 10).batch(2, batch_size=4, seed=0)
    assert torch.equal(inputs, torch.arange(10).expand(4, 10))


def test_tokens_beyond_two_bytes_are_read(tmp_path):
    corpus = Corpus(write_corpus(tmp_path, 100_000, dtype="uint32"), 99_999)
    assert corpus.batch(0, batch_size=1, seed=0)[1][0, -1] == 99_999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step must be a whole number >= 0, got -1"),
        ({"step": 1.0}, "step must be a whole number >= 0, got 1.0"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"batch_size": 3, "world_size": 2}, "batch_size must be a multiple of world_size 2, got 3"),
        ({"rank": 1}, "rank must be < world_size 1, got 1"),
        ({"rank": -1}, "rank must be a whole number >= 0, got -1"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
    ],
)
def test_arguments_outside_their_range_are_refused(counting, change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        counting(100, 7).batch(**({"step": 0, "batch_size": 2, "seed": 0} | change))


class TestValidation:
    def test_whole_split_is_read_in_order(self, counting):
        batches = list(counting(100, 10, validation=96).validation_batches(4))
        assert [len(inputs) for inputs, _ in batches] == [4, 4, 1]
        assert torch.equal(torch.cat([targets for _, targets in batches]).ravel(), torch.arange(1, 91))

    def test_a_limit_spaces_its_blocks_evenly_and_the_same_every_time(self, counting):
        corpus = counting(100, 10, validation=1001)
        first = torch.cat([inputs for inputs, _ in corpus.validation_batches(5, limit=4)])[:, 0]
        assert torch.equal(first, torch.arange(0, 1000, 50))
        assert torch.equal(first, torch.cat([inputs for inputs, _ in corpus.validation_batches(5, limit=4)])[:, 0])

    def test_a_limit_beyond_the_split_reads_each_block_once(self, counting):
        batches = list(counting(100, 10, validation=41).validation_batches(3, limit=100))
        assert torch.cat([inputs for inputs, _ in batches])[:, 0].tolist() == [0, 10, 20, 30]

    def test_a_split_shorter_than_a_block_is_one_short_sequence(self, counting):
        ((inputs, targets),) = counting(100, 10, validation=4).validation_batches(8)
        assert inputs.tolist() == [[0, 1, 2]]
        assert targets.tolist() == [[1, 2, 3]]

    @pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"batch_size": 1, "limit": 0}])
    def test_arguments_outside_their_range_are_refused(self, counting, arguments):
        with pytest.raises(ValueError, match="must be"):
            next(counting(100, 7).validation_batches(**arguments))


class TestOpening:
    def test_too_few_tokens_say_how_many_are_needed(self, counting):
        with pytest.raises(
            DataError,
            match=r"^source 'counting' is too small: its training split has 10 tokens, "
            r"sequence_length 10 needs at least 11$",
        ):
            counting(10, 10)

    @pytest.mark.parametrize("length", [0, -1, 1.5, None])
    def test_an_impossible_sequence_length_is_refused(self, counting, length):
        with pytest.raises(ValueError, match="sequence_length must be a whole number >= 1"):
            counting(100, length)

    @pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json", "tokenizer/tokenizer.json"])
    def test_a_missing_file_is_damage(self, tmp_path, name):
        (write_corpus(tmp_path, 100) / name).unlink()
        with pytest.raises(DamagedCorpusError):
            Corpus(tmp_path, 10)

    @pytest.mark.parametrize("name", ["train.bin", "val.bin"])
    @pytest.mark.parametrize("change", [-1, 2])
    def test_token_files_of_another_size_are_damage(self, tmp_path, name, change):
        path = write_corpus(tmp_path, 100) / name
        data = path.read_bytes()
        path.write_bytes(data[:change] if change < 0 else data + bytes(change))
        with pytest.raises(DamagedCorpusError, match=rf"has {len(data) + change} bytes instead of {len(data)}"):
            Corpus(tmp_path, 10)

    @given(cut=st.integers(0, 1000))
    @settings(deadline=None, max_examples=30)
    def test_a_truncated_meta_is_damage(self, tmp_path_factory, cut):
        folder = write_corpus(tmp_path_factory.mktemp("cut"), 100)
        text = (folder / "meta.json").read_text()
        (folder / "meta.json").write_text(text[: cut % len(text)])
        with pytest.raises(DamagedCorpusError):
            Corpus(folder, 10)

    @pytest.mark.parametrize(
        "change", [{"format": 0}, {"dtype": "object"}, {"train_tokens": "100"}, {"train_tokens": 0, "dtype": "uint16"}]
    )
    def test_impossible_meta_is_damage(self, tmp_path, change):
        path = write_corpus(tmp_path, 100) / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(DamagedCorpusError):
            Corpus(tmp_path, 10)

    def test_nothing_is_not_a_corpus(self, tmp_path):
        with pytest.raises(DamagedCorpusError):
            Corpus(tmp_path / "missing", 10)
