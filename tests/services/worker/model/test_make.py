"""Made checkpoints are whole, alike everywhere, and readable by the library's own loaders."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from common.errors import ConfigError
from services.worker.model.make import FAMILIES, main, make_model

Checkpoints = Callable[[str], Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_gives_back_what_it_was_given(family: str, checkpoint: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(family))
    text = "Hello, Zoë! 漢字 and\ttabs\n  and   spaces 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == 1536


def test_the_chat_template_opens_the_assistants_turn(checkpoint: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("qwen2"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_end_tokens_are_in_the_generation_config(checkpoint: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    ends = GenerationConfig.from_pretrained(checkpoint("llama")).eos_token_id
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|im_end|>"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(checkpoint: Checkpoints, tmp_path: Path) -> None:
    again = make_model("tiny", tmp_path / "again", family="qwen3")
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / file).read_bytes() == (checkpoint("qwen3") / file).read_bytes()
    other = make_model("tiny", tmp_path / "other", family="qwen3", seed=1)
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()


def test_a_folder_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    assert main(["--preset", "tiny", "--out", str(tmp_path / "mine")]) == 2
    assert "is already there" in capsys.readouterr().err
    assert [file.name for file in tmp_path.rglob("*")] == ["mine", "file"]


def test_unknown_names_are_refused_with_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tiny or mini or deep or small"):
        make_model("huge", tmp_path / "m")
    with pytest.raises(ConfigError, match="gemma3"):
        make_model("tiny", tmp_path / "m", family="gpt2")
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        make_model("tiny", tmp_path / "m", dtype="int4")
