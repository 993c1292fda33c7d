import builtins
import json
import os
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from headway.data import DataError, documents, listing
from headway.data import sources as module


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)


def message_of(action):
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert message.strip()
    return message


def error(source, text_field="text"):
    return message_of(lambda: list(documents(source, text_field)))


def documents_or_message(source):
    try:
        return list(documents(source))
    except DataError as caught:
        return str(caught)


@pytest.fixture
def reports():
    return []


class TestStandardLibrary:
    def test_is_ten_odd_megabytes_of_python_without_installed_packages_and_tests(self):
        found = listing("stdlib")
        assert 5e6 < found.text_bytes < 40e6
        parts = {part for entry in found.files for part in entry.path.split("/")}
        assert not parts & {"site-packages", "dist-packages", "test", "__pycache__"}
        assert {"os.py", "json/decoder.py"} <= {entry.path for entry in found.files}

    def test_order_is_sorted(self):
        paths = [entry.path for entry in listing("stdlib").files]
        assert paths == sorted(paths)

    def test_is_the_running_interpreters_own_also_in_a_virtual_environment(self):
        assert listing("stdlib").root == Path(sysconfig.get_path("stdlib"))

    def test_a_folder_of_that_name_is_reached_by_its_path(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("stdlib").mkdir()
        Path("stdlib/a.txt").write_text("mine")
        assert list(documents("./stdlib")) == ["mine"]

    def test_an_interpreter_without_it_says_so(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
        assert "name another source" in error("stdlib")


class TestFilesFoldersAndGlobs:
    def test_a_folder_is_read_recursively_in_sorted_order(self, tmp_path):
        for name in ("b.txt", "a/z.md", "a/c.py", "C.TXT", "other.rst", ".hidden/x.txt"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(name)
        assert list(documents(tmp_path)) == ["C.TXT", "a/c.py", "a/z.md", "b.txt"]

    def test_a_glob_reads_what_it_matches(self, tmp_path):
        (tmp_path / "deep" / "er").mkdir(parents=True)
        for name in ("a.txt", "b.md", "deep/er/c.txt", "d.rst"):
            (tmp_path / name).write_text(name)
        assert list(documents(f"{tmp_path}/*.txt")) == ["a.txt"]
        assert list(documents(f"{tmp_path}/**/*.*")) == ["a.txt", "b.md", "deep/er/c.txt"]

    def test_a_relative_glob_and_folder_work(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("a.txt").write_text("a")
        assert list(documents("*.txt")) == list(documents(".")) == list(documents("a.txt")) == ["a"]

    def test_a_file_whose_name_looks_like_a_glob_is_that_file(self, tmp_path):
        (tmp_path / "[1].txt").write_text("one")
        assert list(documents(tmp_path / "[1].txt")) == ["one"]

    def test_text_is_kept_to_the_byte_except_for_the_byte_order_mark(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\n  \xc3\xa9")
        assert list(documents(tmp_path)) == ["one\r\ntwo\rthree\n\n  é"]

    def test_a_link_to_a_parent_folder_is_not_followed(self, tmp_path):
        (tmp_path / "a.txt").write_text("a")
        (tmp_path / "loop").symlink_to(tmp_path)
        (tmp_path / "broken.txt").symlink_to(tmp_path / "missing")
        assert list(documents(tmp_path)) == ["a"]

    def test_a_long_text_is_cut_at_line_ends_into_documents_that_join_to_it(self, tmp_path):
        text = "".join(f"line {i} of a long text\r\n" for i in range(20_000))
        (tmp_path / "long.txt").write_bytes(text.encode())
        pieces = list(documents(tmp_path / "long.txt"))
        assert "".join(pieces) == text
        assert 32 <= len(pieces) <= 64
        assert all(piece.endswith("\r\n") for piece in pieces)

    def test_a_single_endless_line_is_cut_too(self, tmp_path):
        (tmp_path / "line.txt").write_text("x" * 1_000_000)
        (tmp_path / "row.jsonl").write_text(json.dumps({"text": "y" * 1_000_000}))
        pieces = list(documents(tmp_path))
        assert "".join(pieces) == "x" * 1_000_000 + "y" * 1_000_000
        assert max(map(len, pieces)) <= 2 * listing(tmp_path).piece_characters

    def test_white_space_alone_is_no_document(self, tmp_path):
        (tmp_path / "a.txt").write_text(" \n\n")
        (tmp_path / "b.txt").write_text("")
        (tmp_path / "c.txt").write_text("c")
        assert list(documents(tmp_path)) == ["c"]

    def test_fingerprint_depends_on_paths_sizes_and_times_only(self, tmp_path):
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.txt").write_text("text")
            os.utime(tmp_path / name / "a.txt", ns=(1, 10**18))
        first = listing(tmp_path / "one").fingerprint
        assert first == listing(tmp_path / "two").fingerprint
        os.utime(tmp_path / "two" / "a.txt", ns=(1, 10**18 + 1))
        assert first != listing(tmp_path / "two").fingerprint


class TestRows:
    def test_each_row_of_jsonl_is_a_document(self, tmp_path):
        rows = [{"text": "one\ntwo", "id": 1}, {"text": "é"}, {"text": None}, {"text": ""}]
        (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
        assert list(documents(tmp_path / "a.jsonl")) == ["one\ntwo", "é"]

    def test_each_row_of_parquet_is_a_document(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", text=["one", None, "two"], id=[1, 2, 3])
        assert list(documents(tmp_path)) == ["one", "two"]

    def test_text_field_selects_the_field(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", content=["p"], text=["no"])
        (tmp_path / "b.jsonl").write_text('{"content": "j", "text": "no"}')
        assert list(documents(tmp_path, "content")) == ["p", "j"]

    def test_lone_surrogates_become_replacement_characters(self, tmp_path):
        (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b \ud83d\ude00"}')
        assert list(documents(tmp_path)) == ["a\ufffdb 😀"]

    @pytest.mark.parametrize(
        ("line", "part"),
        [
            ('{"body": "x"}', "no field 'text'; the row's fields: 'body'"),
            ("{}", "the row's fields: none"),
            ('{"text": 3}', "must be a string, got 3"),
            ("[1]", "must be an object"),
            ("{'text'", "not JSON"),
            ("[" * 100_000, "not JSON"),
            ("1" * 10_000, "line 2"),
        ],
    )
    def test_a_bad_row_is_named_by_its_line(self, tmp_path, line, part):
        (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line)
        message = error(tmp_path)
        assert part in message
        assert "a.jsonl' line 2" in message

    def test_a_parquet_file_without_the_field_names_its_fields(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", body=["x"], id=[1])
        message = error(tmp_path)
        assert "a.parquet" in message
        assert "no field 'text'; the row's fields: 'body', 'id'" in message

    def test_a_parquet_field_of_numbers_is_refused(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", text=[1, 2])
        assert "must be a string, got 1" in error(tmp_path)

    def test_a_truncated_parquet_file_is_refused(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", text=["x" * 1000] * 100)
        data = (tmp_path / "a.parquet").read_bytes()
        (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
        assert "as parquet" in error(tmp_path)

    def test_parquet_without_pyarrow_says_what_to_install(self, tmp_path, monkeypatch):
        write_parquet(tmp_path / "a.parquet", text=["x"])
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        assert 'pip install "headway[data]"' in error(tmp_path)


class TestBinaryFiles:
    def test_are_skipped_and_counted_in_one_line(self, tmp_path, reports):
        (tmp_path / "a.txt").write_bytes(b"nul \0 byte")
        (tmp_path / "b.py").write_bytes(b"latin \xe9")
        (tmp_path / "c.md").write_bytes("cut short é".encode()[:-1])
        (tmp_path / "d.jsonl").write_bytes(b'{"text": "\xff"}')
        (tmp_path / "e.txt").write_text("good")
        assert list(documents(tmp_path, report=reports.append)) == ["good"]
        assert reports == ["skipped 4 of 5 files that are not UTF-8 text (first: 'a.txt')"]

    def test_bad_bytes_far_inside_a_long_file_are_seen_before_its_first_document(self, tmp_path, reports):
        (tmp_path / "a.txt").write_bytes(b"good line\n" * 300_000 + b"\xff")
        (tmp_path / "b.txt").write_text("good")
        assert list(documents(tmp_path, report=reports.append)) == ["good"]
        assert len(reports) == 1

    def test_nothing_else_is_an_error(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"\0")
        assert "'a.txt' is binary" in error(tmp_path)
        (tmp_path / "b.txt").write_bytes(b"\xff")
        assert "all of its 2 files are binary" in error(tmp_path)


class TestBadSources:
    @pytest.mark.parametrize("source", ["", "  ", "a\0b", None, 3, b"bytes"])
    def test_what_names_nothing_is_refused_with_what_is_accepted(self, source):
        message = error(source)
        assert repr(source) in message
        assert "accepted" in message or "must be 'stdlib'" in message

    def test_a_missing_path_is_named_with_what_is_accepted(self):
        message = error("no/such/path.txt")
        assert "'no/such/path.txt' does not exist" in message
        assert ".jsonl" in message
        assert "hf:NAME" in message

    def test_a_name_that_could_be_a_dataset_never_goes_to_the_hub_without_prefix(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert "write 'hf:owner/name'" in error("owner/name")

    @pytest.mark.parametrize(
        "name", ["x" * 5000, "a.txt/b.txt", "*.nothing", "~no-such-user/x.txt", "\ud800", "hf:\ud800"]
    )
    def test_other_impossible_names_are_refused(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        Path("a.txt").write_text("a")
        error(name)

    def test_an_empty_folder_is_named(self, tmp_path):
        assert f"{str(tmp_path)!r} holds no file of .txt" in error(tmp_path)

    def test_an_empty_file_is_named(self, tmp_path):
        for name in ("a.txt", "b.jsonl"):
            (tmp_path / name).touch()
            assert "it is empty" in error(tmp_path / name)

    def test_another_suffix_is_refused(self, tmp_path):
        (tmp_path / "a.pdf").touch()
        assert ".parquet" in error(tmp_path / "a.pdf")

    def test_a_pipe_is_refused_and_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "a.txt")
        assert "not a file" in error(tmp_path / "a.txt")
        assert "holds no file" in error(tmp_path)

    def test_a_file_that_may_not_be_read_is_named(self, tmp_path, monkeypatch):
        (tmp_path / "a.txt").write_text("secret")

        def refuse(path, *arguments, **keywords):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "open", refuse)
        message = error(tmp_path)
        assert "a.txt" in message
        assert "Permission denied" in message

    def test_a_folder_that_may_not_be_read_is_named(self, tmp_path, monkeypatch):
        def refuse(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(module.os, "scandir", refuse)
        assert "Permission denied" in error(tmp_path)

    def test_a_file_that_vanishes_after_listing_is_named(self, tmp_path):
        (tmp_path / "a.txt").write_text("a")
        found = listing(tmp_path)
        (tmp_path / "a.txt").unlink()
        assert "a.txt" in error(found)


class TestHuggingFace:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": null}\n')
        return folder

    def test_a_local_dataset_is_streamed(self, folder):
        assert list(documents(f"hf:{folder}")) == ["one", "two"]

    def test_its_listing_follows_its_files(self, folder):
        before = listing(f"hf:{folder}").fingerprint
        os.utime(folder / "train.jsonl", ns=(1, 1))
        assert listing(f"hf:{folder}").fingerprint != before

    def test_a_configuration_is_part_of_the_name(self):
        assert listing("hf:owner/name:config").dataset == ("owner/name", "config")
        assert listing("hf:owner/name").dataset == ("owner/name", None)
        assert listing("hf:owner/name:config").fingerprint != listing("hf:owner/name").fingerprint

    def test_a_configuration_of_a_local_dataset_is_split_off(self, folder):
        assert listing(f"hf:{folder}:en").dataset == (str(folder), "en")

    def test_a_missing_field_names_the_fields(self, folder):
        assert "'text'" in error(f"hf:{folder}", "content")

    @pytest.mark.parametrize("name", ["hf:", "hf: ", "hf:/no/such/folder", "hf:a/b/c"])
    def test_impossible_names_are_refused(self, name):
        assert name.strip() in error(name)

    def test_a_dataset_that_cannot_be_loaded_is_one_line(self):
        assert "'hf:owner/no-such-dataset'" in error("hf:owner/no-such-dataset")

    def test_an_empty_folder_is_refused(self, tmp_path):
        assert "is empty" in error(f"hf:{tmp_path}")

    def test_without_datasets_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert 'pip install "headway[data]"' in error("hf:owner/name")


@given(data=st.binary(max_size=300), suffix=st.sampled_from(module.SUFFIXES))
@example(data=b"PAR1" + b"\x15\x04" * 20 + b"\x10\0\0\0PAR1", suffix=".parquet")
@example(data=b"PAR1PAR1", suffix=".parquet")
@example(data=b'{"text": "\\ud800"}', suffix=".jsonl")
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_documents_or_one_line(tmp_path, data, suffix):
    path = tmp_path / f"any{suffix}"
    path.write_bytes(data)
    outcome = documents_or_message(path)
    if isinstance(outcome, str):
        assert "\n" not in outcome
    else:
        assert outcome
        assert all(text.encode().decode() == text for text in outcome)


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_parquet_file_gives_documents_or_one_line(tmp_path, position, value):
    whole = tmp_path / "whole.parquet"
    if not whole.exists():
        write_parquet(whole, text=[f"row {i}" for i in range(50)])
    data = bytearray(whole.read_bytes())
    data[position % len(data)] = value
    (tmp_path / "damaged.parquet").write_bytes(data)
    outcome = documents_or_message(tmp_path / "damaged.parquet")
    if isinstance(outcome, str):
        assert "\n" not in outcome
    else:
        assert all(isinstance(text, str) for text in outcome)


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=20))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_come_back_as_written(tmp_path, texts):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in [*texts, "last"]))
    assert list(documents(path)) == [text for text in [*texts, "last"] if text and not text.isspace()]


def test_reading_does_not_import_what_it_does_not_need(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    real = builtins.__import__

    def guarded(name, *arguments, **keywords):
        assert name.split(".")[0] not in {"torch", "transformers", "tokenizers", "datasets", "pyarrow"}
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert list(documents(tmp_path)) == ["a"]
