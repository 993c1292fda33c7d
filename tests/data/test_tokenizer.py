import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.data import DataError, load_tokenizer, train_tokenizer
from headway.data import tokenizer as module
from headway.data.tokenizer import tokenizer_identity

TEXTS = [f"def function_{i}(argument):\n    return argument * {i}\n" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=400)


any_text = st.text(st.characters(exclude_categories=["Cs"]))


@given(text=any_text)
@settings(deadline=None, max_examples=300)
def test_decode_undoes_encode_for_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", " ", "  two  spaces ", "\r\n\t\0", "don 't , stop .", "a<|endoftext|>b", "\ufeff", "naïve 😀", " x" * 1000],
)
def test_decode_undoes_encode_for_awkward_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_has_the_wanted_size_and_one_special_token(tokenizer):
    assert len(tokenizer) == 400
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    assert tokenizer.eos_token == "<|endoftext|>"


def test_spelled_out_end_of_text_is_read_as_one(tokenizer):
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.eos_token_id]


def test_training_twice_gives_the_same_tokenizer(tokenizer):
    again = train_tokenizer(iter(TEXTS), vocab_size=400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_learns_the_words_of_its_corpus(tokenizer):
    assert len(tokenizer.encode("    return argument")) <= 4


@pytest.mark.parametrize("vocab_size", [256, 0, -1, 300.5, None, True])
def test_a_vocabulary_smaller_than_the_bytes_is_refused(vocab_size):
    with pytest.raises(ValueError, match="vocab_size must be a whole number >= 257, got"):
        train_tokenizer(TEXTS, vocab_size=vocab_size)


def test_a_small_corpus_gives_fewer_tokens_than_wanted():
    assert 257 <= len(train_tokenizer(["abc"], vocab_size=5000)) < 270


class TestSample:
    def test_a_small_corpus_is_taken_whole(self):
        assert list(module._sample(TEXTS, sum(map(len, TEXTS)))) == TEXTS

    def test_of_unknown_size_the_beginning_is_taken(self, monkeypatch):
        monkeypatch.setattr(module, "SAMPLE_BYTES", 1000)
        taken = list(module._sample(TEXTS, None))
        assert taken == TEXTS[: len(taken)]
        assert 900 < sum(map(len, taken)) <= 1000

    def test_of_a_large_corpus_documents_are_drawn_evenly(self, monkeypatch):
        total = sum(map(len, TEXTS))
        monkeypatch.setattr(module, "SAMPLE_BYTES", total // 4)
        taken = list(module._sample(TEXTS, total))
        places = [TEXTS.index(text) for text in taken]
        assert sum(map(len, taken)) <= total // 4
        assert places == sorted(places)
        assert min(places) < 40
        assert max(places) > 120
        assert taken == list(module._sample(TEXTS, total))


class TestLoading:
    def test_a_saved_folder_and_its_file_give_the_same_tokens(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        text = TEXTS[3]
        for name in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
            loaded = load_tokenizer(name)
            assert loaded.encode(text) == tokenizer.encode(text)
            assert loaded.eos_token_id == tokenizer.eos_token_id

    def test_a_folder_with_nothing_but_tokenizer_json_works(self, tokenizer, tmp_path):
        tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
        loaded = load_tokenizer(tmp_path)
        assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
        assert loaded.eos_token == "<|endoftext|>"

    @pytest.mark.parametrize("name", ["./missing", "a/b/c", "missing.json", "~/missing", "a b", "", None, 3, "x\0"])
    def test_what_is_neither_a_path_nor_a_name_is_refused(self, name):
        with pytest.raises(DataError, match=r"accepted|must be 'train'"):
            load_tokenizer(name)

    def test_a_name_the_hub_does_not_give_is_one_line(self):
        with pytest.raises(DataError, match="cannot load the tokenizer 'owner/no-such-tokenizer'") as caught:
            load_tokenizer("owner/no-such-tokenizer")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("content", [b"", b"{}", b"\0\xff", b"[1]", b'{"model": {"type": "BPE"}}'])
    def test_a_broken_file_is_one_line(self, tmp_path, content):
        (tmp_path / "tokenizer.json").write_bytes(content)
        for name in (tmp_path, tmp_path / "tokenizer.json"):
            with pytest.raises(DataError, match="cannot load the tokenizer") as caught:
                load_tokenizer(name)
            assert "\n" not in str(caught.value)

    def test_an_empty_folder_is_one_line(self, tmp_path):
        with pytest.raises(DataError, match="cannot load the tokenizer"):
            load_tokenizer(tmp_path)

    def test_without_an_end_of_text_token_it_says_so(self, tmp_path):
        from tokenizers import Tokenizer, models

        Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(DataError, match="must have an end-of-text token"):
            load_tokenizer(tmp_path)


class TestIdentity:
    def test_of_local_files_is_their_content(self, tokenizer, tmp_path):
        for name in ("one", "two"):
            tokenizer.save_pretrained(tmp_path / name)
        assert tokenizer_identity(tmp_path / "one") == tokenizer_identity(tmp_path / "two")
        config = tmp_path / "two" / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"extra": 1}))
        assert tokenizer_identity(tmp_path / "one") != tokenizer_identity(tmp_path / "two")

    def test_of_a_name_on_the_hub_is_the_name(self):
        assert tokenizer_identity("owner/name") == "hub:owner/name"
