import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.kv_layout import KvLayout
from kvstore.server.model_layout import model_layout

LLAMA = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 128,
    "torch_dtype": "bfloat16",
}
EXPECTED = KvLayout(layers=4, kv_heads=2, head_dim=16, dtype="bfloat16")


def folder(path: Path, config: dict[str, Any]) -> str:
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (LLAMA, EXPECTED),
        ({**LLAMA, "head_dim": 64}, KvLayout(layers=4, kv_heads=2, head_dim=64, dtype="bfloat16")),
        ({**LLAMA, "num_key_value_heads": None}, KvLayout(layers=4, kv_heads=8, head_dim=16, dtype="bfloat16")),
        ({"text_config": LLAMA}, EXPECTED),
        ({"text_config": {**LLAMA, "torch_dtype": None}, "dtype": "bfloat16"}, EXPECTED),
    ],
)
def test_the_layout_follows_from_the_config_alone(tmp_path: Path, config: dict[str, Any], layout: KvLayout) -> None:
    assert model_layout(folder(tmp_path, config), "auto") == layout


def test_a_dtype_that_is_given_wins(tmp_path: Path) -> None:
    assert model_layout(folder(tmp_path, LLAMA), "float32").dtype == "float32"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({**LLAMA, "torch_dtype": "int8"}, "its dtype is 'int8'"),
        ({**LLAMA, "num_hidden_layers": None}, "does not describe a decoder"),
        ({"torch_dtype": "float32"}, "does not describe a decoder"),
    ],
)
def test_a_config_without_a_layout_is_refused(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        model_layout(folder(tmp_path, config), "auto")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        model_layout(str(tmp_path), "auto")
