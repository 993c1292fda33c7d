import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.data import DataError, Progress, documents, listing, packed, prepare, train_tokenizer
from headway.data.sources import SUFFIXES

WORDS = ["model", "gradient", "step", "loss", "tensor", "batch", "shape", "layer", "weight", "token"]


def text_of(number):
    return "".join(f"{WORDS[(number * 7 + i * i) % 10]} {i + number} " for i in range(40)) + "\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:03}.txt").write_text(text_of(number))
    return folder


@pytest.fixture
def run(tmp_path):
    """`prepare` with a cache of this test's own."""

    def run(source, **changes):
        keywords = {"sequence_length": 16, "vocab_size": 300, "cache_dir": tmp_path / "cache"} | changes
        return prepare(source, **keywords)

    run.cache = tmp_path / "cache"
    return run


@pytest.fixture
def builds(monkeypatch):
    """The folders that were built."""
    built = []
    real = packed._build

    def counted(found, into, *arguments):
        built.append(into)
        real(found, into, *arguments)

    monkeypatch.setattr(packed, "_build", counted)
    return built


def texts_of(corpus, name):
    """The documents of a token file, cut at the ends of text."""
    tokenizer = corpus.tokenizer()
    tokens = np.fromfile(corpus.path / name, dtype=corpus.meta["dtype"])
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


def unfinished(cache):
    return [path for path in cache.iterdir() if path.name.endswith(".partial")]


def test_the_two_files_hold_every_document_once_with_its_end(run, folder):
    corpus = run(folder, validation_fraction=0.3)
    train, validation = texts_of(corpus, "train.bin"), texts_of(corpus, "val.bin")
    assert sorted(train + validation) == sorted(documents(folder))
    assert len(train) == corpus.meta["train_documents"]
    assert len(validation) == corpus.meta["validation_documents"]
    assert corpus.meta["train_bytes"] == sum(len(text.encode()) for text in train)


def test_sizes_and_hashes_are_those_of_the_files(run, folder):
    corpus = run(folder)
    assert (corpus.path / "train.bin").stat().st_size == 2 * corpus.train_tokens
    assert (corpus.path / "val.bin").stat().st_size == 2 * corpus.validation_tokens
    assert corpus.vocab_size == len(corpus.tokenizer()) == 300
    assert corpus.fingerprint == listing(folder).fingerprint
    assert len(corpus.content_hash) == 64


def test_a_document_stays_on_its_side_when_others_come(run, folder):
    before = set(texts_of(run(folder, validation_fraction=0.3), "val.bin"))
    for number in range(60, 90):
        (folder / f"{number:03}.txt").write_text(text_of(number))
    after = run(folder, validation_fraction=0.3)
    assert before < set(texts_of(after, "val.bin"))
    assert not before & set(texts_of(after, "train.bin"))


def test_copies_of_a_document_stay_on_one_side(run, folder):
    for number in range(60):
        (folder / f"copy{number:03}.txt").write_text(text_of(number))
    corpus = run(folder, validation_fraction=0.3)
    train, validation = texts_of(corpus, "train.bin"), texts_of(corpus, "val.bin")
    assert len(train) + len(validation) == 120
    assert not set(train) & set(validation)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_is_ever_empty(run, folder, fraction):
    for copy in range(3):
        for number in range(4):
            (folder / f"copy{copy}{number:03}.txt").write_text(text_of(number))
    corpus = run(folder, validation_fraction=fraction, sequence_length=2)
    train, validation = texts_of(corpus, "train.bin"), texts_of(corpus, "val.bin")
    assert sorted(train + validation) == sorted(documents(folder))
    assert len(set(validation if fraction < 0.5 else train)) == 1
    assert not set(train) & set(validation)


def test_a_single_long_file_is_split_too(run, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(map(text_of, range(200))))
    corpus = run(path)
    share = corpus.validation_tokens / (corpus.train_tokens + corpus.validation_tokens)
    assert 0 < share < 0.3


def test_a_single_document_cannot_be_split(run, tmp_path):
    (tmp_path / "one.txt").write_text("short")
    with pytest.raises(DataError, match=r"holds a single document.* at least 2 are needed"):
        run(tmp_path / "one.txt")
    (tmp_path / "copies").mkdir()
    for number in range(3):
        (tmp_path / "copies" / f"{number}.txt").write_text("the same")
    with pytest.raises(DataError, match="copies are counted once"):
        run(tmp_path / "copies")
    assert [path for path in run.cache.iterdir() if path.suffix != ".lock"] == []


def test_too_little_text_for_one_sequence_says_so(run, folder):
    with pytest.raises(DataError, match=r"its training split has \d+ tokens, sequence_length 100000 needs .* 100001$"):
        run(folder, sequence_length=100_000)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sequence_length", 0), ("vocab_size", 256), ("validation_fraction", 0), ("validation_fraction", 1)],
)
def test_numbers_outside_their_range_are_refused_before_anything_is_read(run, name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        run("no/such/source", **{name: value})


class TestTokenizers:
    def test_an_existing_one_is_used_and_kept_with_the_corpus(self, run, folder, tmp_path):
        train_tokenizer(map(text_of, range(5)), 280).save_pretrained(tmp_path / "mine")
        corpus = run(folder, tokenizer=tmp_path / "mine", vocab_size=5000)
        assert corpus.vocab_size == 280
        assert sorted(texts_of(corpus, "train.bin") + texts_of(corpus, "val.bin")) == sorted(documents(folder))

    def test_truncation_padding_and_added_tokens_of_one_do_not_reach_the_corpus(self, run, folder, tmp_path):
        from tokenizers import processors

        tokenizer = train_tokenizer(map(text_of, range(5)), 280)
        backend = tokenizer.backend_tokenizer
        backend.enable_truncation(5)
        backend.enable_padding(length=1000)
        end = tokenizer.eos_token_id
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
        )
        backend.save(str(tmp_path / "tokenizer.json"))
        corpus = run(folder, tokenizer=tmp_path / "tokenizer.json")
        assert sorted(texts_of(corpus, "train.bin") + texts_of(corpus, "val.bin")) == sorted(documents(folder))

    def test_a_vocabulary_beyond_two_bytes_is_written_in_four(self, run, folder, tmp_path):
        description = json.loads(train_tokenizer(map(text_of, range(5)), 280).backend_tokenizer.to_str())
        description["model"]["vocab"] |= {f"unused{i}": i for i in range(280, 65_536)}
        (tmp_path / "tokenizer.json").write_text(json.dumps(description))
        corpus = run(folder, tokenizer=tmp_path / "tokenizer.json")
        assert corpus.meta["dtype"] == "uint32"
        assert corpus.vocab_size == 65_536
        assert (corpus.path / "train.bin").stat().st_size == 4 * corpus.train_tokens


class TestCache:
    def test_a_second_call_finds_the_first(self, run, folder, builds):
        first, second = run(folder), run(folder, sequence_length=8)
        assert len(builds) == 1
        assert first.path == second.path
        assert first.content_hash == second.content_hash

    def test_a_second_process_reads_no_text_and_imports_nothing_heavy(self, run, folder):
        run(folder)
        program = f"""
            import sys
            from headway.data import packed
            def refuse(*arguments, **keywords):
                raise AssertionError("the corpus was read")
            packed.documents = refuse
            packed.prepare({str(folder)!r}, sequence_length=16, vocab_size=300, cache_dir={str(run.cache)!r})
            heavy = {{"torch", "transformers", "tokenizers", "datasets", "pyarrow"}} & set(sys.modules)
            assert not heavy, heavy
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)

    @pytest.mark.parametrize(
        "change", [{"vocab_size": 310}, {"validation_fraction": 0.2}, {"text_field": "body"}, {"tokenizer": "saved"}]
    )
    def test_other_settings_are_another_corpus(self, run, folder, builds, tmp_path, monkeypatch, change):
        monkeypatch.chdir(tmp_path)
        run(folder).tokenizer().save_pretrained(tmp_path / "saved")
        run(folder, **change)
        assert len(builds) == 2

    def test_changed_files_are_another_corpus(self, run, folder, builds):
        run(folder)
        (folder / "000.txt").write_text("something else")
        run(folder)
        assert len(builds) == 2

    def test_equal_content_has_equal_hash_and_files_wherever_it_is_built(self, run, folder, tmp_path):
        first = run(folder)
        second = run(folder, cache_dir=tmp_path / "elsewhere")
        assert first.content_hash == second.content_hash
        assert (first.path / "train.bin").read_bytes() == (second.path / "train.bin").read_bytes()
        (folder / "000.txt").write_text("something else")
        assert run(folder).content_hash != first.content_hash

    @pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json", "tokenizer/tokenizer.json"])
    def test_a_damaged_one_is_built_again_and_says_so(self, run, folder, builds, name):
        whole = run(folder)
        damaged = whole.path / name
        original = damaged.read_bytes()
        damaged.write_bytes(original[: len(original) // 2]) if not name.startswith("tok") else damaged.unlink()
        reports = []
        corpus = run(folder, report=reports.append)
        assert len(builds) == 2
        assert len(reports) == 1
        assert reports[0].startswith("building the corpus again: ")
        assert corpus.content_hash == whole.content_hash
        assert (corpus.path / name).read_bytes() == original
        assert unfinished(run.cache) == []

    def test_is_in_the_users_cache_by_default(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert packed.default_cache_dir() == tmp_path / "headway" / "data"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert packed.default_cache_dir() == tmp_path / "home" / ".cache" / "headway" / "data"

    def test_a_cache_that_cannot_be_written_is_named(self, run, folder, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match=r"cannot write the prepared corpus to .*file") as caught:
            run(folder, cache_dir=tmp_path / "file" / "cache")
        assert "\n" not in str(caught.value)


class TestInterruptions:
    @pytest.mark.parametrize("limit", [1_000, 60_000])  # within the tokenizer's files, within train.bin
    def test_a_full_disk_is_one_line_and_leaves_nothing(self, run, folder, limit):
        for number in range(40):
            (folder / f"large{number}.txt").write_text(hashlib.shake_256(bytes([number])).hexdigest(2000))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(DataError, match="cannot write the prepared corpus") as caught:
                run(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(caught.value)
        assert [path for path in run.cache.iterdir() if path.suffix != ".lock"] == []

    def test_ctrl_c_leaves_nothing(self, run, folder):
        def interrupt(progress):
            if progress.stage == "tokens":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(folder, progress=interrupt)
        assert [path for path in run.cache.iterdir() if path.suffix != ".lock"] == []

    def test_a_killed_build_is_not_taken_for_a_finished_one_and_is_cleaned_up(self, run, folder, builds):
        program = f"""
            import os, signal
            from headway.data import prepare
            def kill(progress):
                if progress.stage == "tokens":
                    os.kill(os.getpid(), signal.SIGKILL)
            prepare({str(folder)!r}, sequence_length=16, vocab_size=300, cache_dir={str(run.cache)!r}, progress=kill)
        """
        killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)])
        assert killed.returncode == -signal.SIGKILL
        assert len(unfinished(run.cache)) == 1
        run(folder, vocab_size=310)  # a build of another corpus cleans up as well
        assert unfinished(run.cache) == []
        run(folder)
        assert len(builds) == 2

    def test_a_build_in_progress_is_not_cleaned_up_by_others(self, run, folder):
        seen = []

        def another(progress):
            if progress.stage == "tokens" and not seen:
                (mine,) = unfinished(run.cache)
                run(folder, vocab_size=310)
                seen.append(mine.exists())

        run(folder, progress=another)
        assert seen == [True]

    def test_builders_of_one_corpus_at_the_same_time_build_it_once(self, run, folder, builds):
        corpora, reports = [], []
        threads = [
            threading.Thread(target=lambda: corpora.append(run(folder, report=reports.append))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(corpora) == 3
        assert len({corpus.path for corpus in corpora}) == 1
        assert len(builds) == 1
        assert all(line.startswith("waiting for another process") for line in reports)


def test_progress_ends_at_the_whole_text(run, folder):
    seen = []
    run(folder, progress=seen.append)
    total = listing(folder).text_bytes
    assert {entry.stage for entry in seen} == {"tokenizer", "tokens"}
    assert seen[-1] == Progress("tokens", total, total)
    assert all(entry.done <= total for entry in seen)


def test_skipped_files_are_reported_once(run, folder):
    (folder / "binary.txt").write_bytes(b"\0")
    reports = []
    run(folder, report=reports.append)
    assert reports == ["skipped 1 of 61 files that are not UTF-8 text (first: 'binary.txt')"]


def test_memory_does_not_grow_with_the_corpus(run, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "BATCH_CHARACTERS", 16 * 1024)
    train_tokenizer(map(text_of, range(5)), 280).save_pretrained(tmp_path / "mine")
    peaks = {}
    for size in (300, 400, 2_000):  # the first is for what is imported and cached once
        path = tmp_path / f"{size}.jsonl"
        with path.open("w") as file:
            for number in range(size):
                file.write(json.dumps({"text": text_of(number)}) + "\n")
        tracemalloc.start()
        run(path, tokenizer=tmp_path / "mine")
        peaks[size] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[2_000] < 1.2 * peaks[400]
    assert peaks[2_000] < 0.8 * (tmp_path / "2000.jsonl").stat().st_size


def test_no_batch_exceeds_its_limit_by_more_than_a_document():
    texts = ["x" * (hashlib.sha256(str(i).encode()).digest()[0] * 400) for i in range(500)]
    batches = list(packed._batches(texts))
    assert [text for batch in batches for text in batch] == texts
    for batch in batches:
        assert sum(map(len, batch[:-1])) < packed.BATCH_CHARACTERS


@given(data=st.lists(st.binary(max_size=60), min_size=1, max_size=4), suffix=st.sampled_from(SUFFIXES))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_a_corpus_or_one_line(tmp_path_factory, data, suffix):
    root = tmp_path_factory.mktemp("any")
    for number, content in enumerate(data):
        (root / f"{number}{suffix}").write_bytes(content)
    outcome = corpus_or_message(root)
    if isinstance(outcome, str):
        assert "\n" not in outcome
    else:
        assert outcome.batch(0, batch_size=1, seed=0)[0].shape == (1, 2)


def corpus_or_message(root):
    try:
        return prepare(root, sequence_length=2, vocab_size=257, cache_dir=root / "cache", report=lambda line: None)
    except DataError as caught:
        return str(caught)


def test_the_users_umask_decides_who_may_read_the_cache(run, folder):
    before = os.umask(0o022)
    try:
        corpus = run(folder)
    finally:
        os.umask(before)
    assert corpus.path.stat().st_mode & 0o777 == 0o755
    assert Path(corpus.path / "train.bin").stat().st_mode & 0o777 == 0o644
