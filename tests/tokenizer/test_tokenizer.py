"""Encoding, decoding, the incremental detokenizer, and what a model folder may hold."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_cases import CHATML, SPECIAL, byte_level, sentencepiece, write_folder
from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from engine.errors import ContextTooLong, InvalidCheckpoint, InvalidRequest
from engine.tokenizer import CHARS_PER_TOKEN, Tokenizer

BACKEND = byte_level()
NAMES = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
BYTE_LEVEL = Tokenizer(byte_level(), names=NAMES)
SENTENCEPIECE = Tokenizer(sentencepiece(), names={"bos_token": "<s>", "eos_token": "</s>"})
EMOJI = "🙂".encode()


def tokens_of_bytes(tokenizer: Tokenizer) -> dict[int, int]:
    """The token of each single byte."""
    singles = ((tokenizer.token_bytes(token), token) for token in reversed(range(tokenizer.vocab_size)))
    return {data[0]: token for data, token in singles if len(data) == 1}


SINGLE = tokens_of_bytes(BYTE_LEVEL)
ids_of_byte_level = st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 5))
texts = st.text(st.characters(exclude_categories=("Cs",)))


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None, *, skip_special: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt or [], skip_special=skip_special)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@given(texts)
def test_text_survives_encoding(text: str) -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text), skip_special=False) == text


@given(texts)
def test_encoding_is_the_librarys_own(text: str) -> None:
    assert BYTE_LEVEL.encode(text) == BACKEND.encode(text).ids


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
@pytest.mark.parametrize("add_special", [True, False])
def test_a_long_text_is_encoded_like_a_short_one(tokenizer: Tokenizer, add_special: bool) -> None:
    text = "the cat 🙂 sat</s>\n" * 1000
    assert tokenizer.encode(text, add_special) == tokenizer._backend.encode(text, add_special_tokens=add_special).ids
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode(text + "\ud83d")


@given(ids_of_byte_level, ids_of_byte_level, st.booleans())
def test_streamed_text_is_the_decoded_text(ids: list[int], prompt: list[int], skip: bool) -> None:
    assert "".join(streamed(BYTE_LEVEL, ids, prompt, skip_special=skip)) == BYTE_LEVEL.decode(ids, skip)


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁")))  # which stands for a space
def test_streamed_sentencepiece_is_the_decoded_text(text: str) -> None:
    ids = SENTENCEPIECE.encode(text)
    assert "".join(streamed(SENTENCEPIECE, ids)) == SENTENCEPIECE.decode(ids) == text


def test_a_sentencepiece_answer_keeps_the_space_after_its_prompt() -> None:
    prompt, answer = SENTENCEPIECE.encode("cd"), SENTENCEPIECE.encode("ab")
    assert "".join(streamed(SENTENCEPIECE, answer, prompt)) == " ab"
    assert SENTENCEPIECE.decode([*prompt, *answer]) == "cd ab"


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
def test_a_character_appears_once_and_whole(tokenizer: Tokenizer) -> None:
    single = tokens_of_bytes(tokenizer)
    pushes = streamed(tokenizer, [single[byte] for byte in EMOJI], prompt=[0])
    assert pushes == ["", "", "", "🙂", ""]


def test_a_character_cut_short_shows_at_the_end() -> None:
    ids = [SINGLE[byte] for byte in EMOJI[:3]]
    assert streamed(BYTE_LEVEL, ids) == ["", "", "", "\ufffd"]
    assert BYTE_LEVEL.decode(ids) == "\ufffd"


def test_a_prompt_that_ends_inside_a_character_does_not_swallow_the_answer() -> None:
    prompt = [SINGLE[byte] for byte in EMOJI[:2]]
    answer = [SINGLE[byte] for byte in EMOJI[2:]] + BYTE_LEVEL.encode(" the cat")
    text = "".join(streamed(BYTE_LEVEL, answer, prompt))
    assert text == BYTE_LEVEL.decode(answer) == "\ufffd\ufffd the cat"


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = BYTE_LEVEL.encode("the</s>cat<think>")
    assert "".join(streamed(BYTE_LEVEL, ids)) == "thecat<think>"
    assert "".join(streamed(BYTE_LEVEL, ids, skip_special=False)) == "the</s>cat<think>"


def test_tags_of_tool_calls_are_always_shown() -> None:
    backend = byte_level()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in ("<tool_call>", "</tool_call>")])
    tokenizer = Tokenizer(backend)
    detokenizer = tokenizer.detokenizer()
    ids = tokenizer.encode("<tool_call>{}</tool_call><|im_end|>", add_special=False)
    assert "".join(map(detokenizer.push, ids)) == "<tool_call>{}</tool_call>"
    assert tokenizer.special_ids.isdisjoint(ids[:-1])


def test_one_token_as_text_and_bytes() -> None:
    eos, cat = BYTE_LEVEL.encode("</s>")[0], BYTE_LEVEL.encode(" cat")
    assert BYTE_LEVEL.token_text(eos) == "</s>"
    assert b"".join(map(BYTE_LEVEL.token_bytes, cat)) == b" cat"
    assert BYTE_LEVEL.token_text(SINGLE[0x80]) == "\ufffd"
    assert BYTE_LEVEL.token_bytes(SINGLE[0x80]) == b"\x80"
    assert SENTENCEPIECE.token_bytes(SENTENCEPIECE.encode("\n")[-1]) == b"\n"
    for beyond in (-1, BYTE_LEVEL.vocab_size, 2**31, 2**70):
        assert BYTE_LEVEL.token_bytes(beyond) == b""
        assert BYTE_LEVEL.token_text(beyond) == ""


def test_special_strings_in_a_plain_prompt_are_special_tokens() -> None:
    for text in SPECIAL:
        assert BYTE_LEVEL.token_text(BYTE_LEVEL.encode(text)[0]) in SPECIAL


def test_far_too_long_a_text_is_refused_unread() -> None:
    fits = "a" * (10 * CHARS_PER_TOKEN)
    assert BYTE_LEVEL.encode(fits, max_tokens=10)
    with pytest.raises(ContextTooLong) as caught:
        BYTE_LEVEL.encode(fits + "a", max_tokens=10, param="input")
    assert caught.value.param == "input"


def test_half_a_surrogate_pair_is_the_clients_fault() -> None:
    with pytest.raises(InvalidRequest, match="surrogate") as caught:
        BYTE_LEVEL.encode("a\ud83d")
    assert caught.value.param == "prompt"


def test_control_characters_are_text() -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode("a\x00b\x7f\ufeff")) == "a\x00b\x7f\ufeff"


def test_threads_share_a_tokenizer() -> None:
    lines = [f"{n} the cat naïve 日本語 🙂</s>{n}" for n in range(300)]
    fresh = Tokenizer(byte_level(), names=NAMES)

    def there_and_back(line: str) -> tuple[list[int], str]:
        ids = fresh.encode(line)
        return ids, "".join(streamed(fresh, ids, skip_special=False))

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(there_and_back, lines))
    assert together == [(BYTE_LEVEL.encode(line), line) for line in lines]


def test_a_folder_says_what_begins_and_ends_a_text(tmp_path: Path) -> None:
    write_folder(tmp_path, byte_level(), bos_token={"content": "<s>"}, eos_token="<|im_end|>", pad_token=None)
    ends = byte_level().token_to_id("<|im_end|>"), byte_level().token_to_id("</s>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ends[1], ends[0]]}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.bos_id == byte_level().token_to_id("<s>")
    assert tokenizer.eos_ids == ends
    assert tokenizer.chat_template is None


def test_ends_added_to_a_text_are_those_of_transformers(tmp_path: Path) -> None:
    """tokenizer.json alone decides; `add_bos_token` in the config is a relic."""
    backend = byte_level()
    ends = [(text, backend.token_to_id(text)) for text in ("<s>", "</s>")]
    for single in (["<s>", "$A"], ["<s>", "$A", "</s>"], ["$A"]):
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
        folder = write_folder(tmp_path, backend, bos_token="<s>", eos_token="</s>", add_bos_token=True)
        ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
        assert ours.encode("the cat") == theirs.encode("the cat")
        assert ours.encode("the cat", add_special=False) == theirs.encode("the cat", add_special_tokens=False)


def test_a_named_token_is_special_even_where_the_vocabulary_does_not_say_so(tmp_path: Path) -> None:
    backend = byte_level()
    folder = write_folder(tmp_path, backend, eos_token="Ġthe")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_ids == (backend.token_to_id("Ġthe"),)
    assert tokenizer.decode([*tokenizer.encode("cat"), *tokenizer.eos_ids]) == "cat"


def test_a_stored_truncation_is_not_obeyed(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    tokenizer = Tokenizer.load(write_folder(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("the cat sat on the mat")) == "the cat sat on the mat"
    assert len(tokenizer.encode("a")) == 1


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
    for name, broken, told in [
        ("tokenizer.json", '{"version": "1.0"}', r"tokenizer\.json is not a tokenizer"),
        ("tokenizer_config.json", "[1]", r"tokenizer_config\.json must contain a JSON object"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: Expecting"),
        ("tokenizer_config.json", "[" * 100_000, r"tokenizer_config\.json: .*recursion"),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default"}]}), "chat_template is malformed"),
        ("tokenizer_config.json", json.dumps({"chat_template": "a\n{% if %}"}), "chat template 'default': .* line 2"),
        ("chat_template.jinja", "{% for %}", "chat template 'default': .* line 1"),
    ]:
        folder = write_folder(tmp_path / "model", byte_level())
        (folder / name).write_text(broken)
        with pytest.raises(InvalidCheckpoint, match=told):
            Tokenizer.load(folder)


def test_a_tokenizer_of_another_family_is_refused() -> None:
    backend = Backend(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(InvalidCheckpoint, match="decoder"):
        Tokenizer(backend)


def test_no_heavy_module_is_loaded(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level(), chat_template=CHATML)
    script = (
        "import sys, engine.tokenizer\n"
        "assert not {'tokenizers', 'jinja2', 'numpy'} & sys.modules.keys()\n"
        f"engine.tokenizer.Tokenizer.load({str(folder)!r}).render_chat([{{'role': 'user', 'content': 'a'}}])\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
