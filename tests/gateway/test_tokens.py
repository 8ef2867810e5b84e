"""Laws of text and tokens."""

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import ConfigError, InvalidRequest
from gateway.byte_level import piece_bytes
from gateway.model_files import read_model_files
from gateway.tokens import Tokens
from tests.gateway.model import CONTEXT_TOKENS, END_ID, NAME, TURN_ID, VOCAB_TOKENS, ids


@pytest.fixture
def tokens(model: Path) -> Tokens:
    return Tokens(read_model_files(str(model)))


@pytest.mark.parametrize("seed", range(20))
def test_streamed_text_equals_the_text_of_all_tokens(tokens: Tokens, seed: int) -> None:
    rng = random.Random(seed)
    source = [*ids("héllo 日本 😀 "), *range(32, 127), 0xC3, 0xE6, 0xF0, END_ID]
    answer = [rng.choice(source) for _ in range(60)]
    stream, text, start = tokens.stream(), "", 0
    while start < len(answer):
        end = start + rng.randrange(1, 4)
        text += stream.push(answer[start:end])
        start = end
    text += stream.finish()
    exact = b"".join(tokens.bytes_of(token) for token in answer if token != END_ID)
    assert text == exact.decode(errors="replace")


def test_a_character_waits_for_its_last_byte(tokens: Tokens) -> None:
    stream = tokens.stream()
    assert [stream.push((byte,)) for byte in "a😀".encode()] == ["a", "", "", "", "😀"]
    assert stream.finish() == ""


def test_special_tokens_have_no_text_and_one_tokens_bytes_are_exact(tokens: Tokens) -> None:
    assert tokens.stream().push((*ids("a"), TURN_ID, *ids("b"))) == "ab"
    assert tokens.text_of(END_ID) == "<end>"
    assert [tokens.bytes_of(byte) for byte in (0x61, 0xC3, 0xA9)] == [b"a", b"\xc3", b"\xa9"]
    assert piece_bytes("<0xE2>") == b"\xe2"
    assert piece_bytes("日") == "日".encode()


def test_long_and_short_texts_give_the_same_kind_of_ids(tokens: Tokens) -> None:
    text = "x" * 10_000
    assert asyncio.run(tokens.encode(text)) == ids(text)
    assert asyncio.run(tokens.encode("héllo")) == ids("héllo")


def test_a_template_that_refuses_says_so_in_its_own_words(tokens: Tokens) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(InvalidRequest, match="system must come first"):
        asyncio.run(tokens.encode_chat(messages, {}))


def test_a_model_folder_is_read_without_its_weights(model: Path) -> None:
    files = read_model_files(str(model))
    assert (files.name, files.vocab_tokens, files.context_tokens) == (NAME, VOCAB_TOKENS, CONTEXT_TOKENS)
    assert files.end_tokens == (END_ID,)


def test_the_generation_config_decides_what_ends_an_answer(model: Path, tmp_path: Path) -> None:
    folder = copy(model, tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [TURN_ID, END_ID]}))
    assert read_model_files(str(folder)).end_tokens == (TURN_ID, END_ID)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", "{", "cannot be read"),
        ("config.json", "[]", "JSON object"),
        ("config.json", "{}", "vocab_size"),
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{}", "is no tokenizer"),
        ("chat_template.jinja", "{% if %}", "does not compile"),
    ],
)
def test_a_broken_model_folder_is_refused_with_the_file(
    model: Path, tmp_path: Path, file: str, text: str | None, words: str
) -> None:
    folder = copy(model, tmp_path)
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(ConfigError, match=words):
        Tokens(read_model_files(str(folder)))


def copy(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_ids_templates_and_texts_equal_those_of_transformers(tiny_model: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer  # slow to import: only who needs it

    folder = tiny_model("llama")
    theirs, ours = AutoTokenizer.from_pretrained(str(folder)), Tokens(read_model_files(str(folder)))
    for text in ("Hello, world!", "héllo 日本 😀\n  two", "<|im_end|> inside", " leading"):
        encoded = asyncio.run(ours.encode(text))
        assert list(encoded) == theirs(text)["input_ids"]
        stream = ours.stream()
        assert stream.push(encoded) + stream.finish() == theirs.decode(encoded, skip_special_tokens=True)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "héllo"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert list(asyncio.run(ours.encode_chat(messages, {}))) == expected["input_ids"]
