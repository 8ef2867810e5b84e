"""Model folders that lie: each reader says which file is wrong and how, in little time and memory."""

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from gateway.model_files import read_model_files
from gateway.tokens import Tokens
from kvstore.server.model_layout import model_layout
from services.worker.model.checkpoint import stored_tensors
from services.worker.model.identity import inspect_model
from services.worker.model.load import load_model

Checkpoints = Callable[[str], Path]
Reader = Callable[[Path], object]
_MOST_MIB = 32


def _worker(folder: Path) -> object:
    return inspect_model(folder, "float32")


def _store(folder: Path) -> object:
    return model_layout(str(folder), "float32")


def _gateway(folder: Path) -> object:
    return Tokens(read_model_files(str(folder)))


READERS: dict[str, Reader] = {"worker": _worker, "store": _store, "gateway": _gateway}


@pytest.fixture
def folder(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen2"), tmp_path / "model"))


@contextmanager
def refused(match: str) -> Iterator[None]:
    """A ConfigError that says so, and no memory to speak of was taken until then."""
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=match) as error:
            yield
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < _MOST_MIB * 2**20
    assert len(str(error.value)) < 1500, "an error is for people"


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


LIES: list[tuple[str, Any]] = [
    *(("num_hidden_layers", value) for value in (-1, 0, 2**31, 1e9, "two", True, [], float("nan"))),
    *(("num_attention_heads", value) for value in (-4, 0, 2**63, "x", {})),
    *(("num_key_value_heads", value) for value in (-1, 0, 2**40, 1.5)),
    *(("hidden_size", value) for value in (0, -64, 2**62, float("inf"), "64")),
    *(("head_dim", value) for value in (-1, 0, 2**31, float("nan"), "16")),
    *(("vocab_size", value) for value in (0, -5, 2**62, True, "many")),
    *(("max_position_embeddings", value) for value in (0, -1, 2**63, float("inf"))),
    *(("rms_norm_eps", value) for value in (float("nan"), float("inf"), -1, "small")),
    *(("layer_types", value) for value in (5, "full_attention", [None], [[]])),
]


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_sizes_that_no_model_has_are_named(folder: Path, reader: Reader) -> None:
    before = (folder / "config.json").read_text()
    for field, lie in LIES:
        rewrite(folder, **{field: lie})
        with refused(rf"config\.json: {field} is "):
            reader(folder)
        (folder / "config.json").write_text(before)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe{}", b"[]", b"null", b"[" * 200_000, b'{"a":' * 100_000, b'{"vocab_size": ' + b"9" * 10_000 + b"}"],
    ids=["empty", "utf16", "list", "null", "deep-lists", "deep-objects", "long-number"],
)
def test_a_config_that_is_none_is_refused(folder: Path, reader: Reader, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with refused(r"config\.json: cannot be read"):
        reader(folder)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_a_config_that_is_no_plain_or_a_huge_file_is_refused_at_once(folder: Path, reader: Reader) -> None:
    path = folder / "config.json"
    os.truncate(path, 2**40)
    with refused(r"config\.json: cannot be read .*at most 64"):
        reader(folder)
    path.unlink()
    os.mkfifo(path)
    with refused(r"config\.json"):
        reader(folder)


OTHERS = (
    *("model_type", "architectures", "rope_parameters", "rope_scaling", "rope_theta", "dtype", "torch_dtype"),
    *("hidden_act", "tie_word_embeddings", "sliding_window", "text_config", "quantization_config", "eos_token_id"),
    *("use_sliding_window", "max_window_layers", "attention_bias", "auto_map", "num_labels", "id2label"),
)


@pytest.mark.long
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(OTHERS),
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
        max_leaves=6,
    ),
)
def test_any_value_of_any_other_field_is_taken_or_refused(folder: Path, name: str, value: Any) -> None:
    before = (folder / "config.json").read_text()
    rewrite(folder, **{name: value})
    for reader in READERS.values():
        try:
            reader(folder)
        except ConfigError as error:
            assert str(error)
    (folder / "config.json").write_text(before)


def write_weights(folder: Path, header: bytes, *, length: int | None = None, n_bytes: int = 64) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(n_bytes))
    return path


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_HEADERS: list[tuple[Any, str]] = [
    ({"a": entry([4], [0, 16]), "b": entry([4], [8, 24])}, "overlap"),
    ({"a": entry([4], [-16, 0])}, "lies at"),
    ({"a": entry([4], [16, 0])}, "lies at"),
    ({"a": entry([4], [0, 2**63])}, "lies at"),
    ({"a": entry([2**40], [0, 2**42])}, "cut short"),
    ({"a": entry([2**62, 2**62], [0, 16])}, "shape"),
    ({"a": entry([-4], [0, 16])}, "shape"),
    ({"a": entry([1.0, 4], [0, 16])}, "shape"),
    ({"a": entry([1] * 100_000, [0, 4])}, "shape"),
    ({"a": entry("4", [0, 16])}, "shape"),
    ({"a": entry([4], [0, 16], "F33")}, "dtype"),
    ({"a": entry([4], [0, 16], ["F32"])}, "dtype"),
    ({"a": entry([4], [0, 16, 32])}, "ValueError"),
    ({"a": entry([4], "ab")}, "lies at"),
    ({"a": None}, "TypeError"),
    ({"a": {}}, "KeyError"),
    ([], "TypeError|AttributeError"),
    (12345, "AttributeError"),
]


@pytest.mark.parametrize(("header", "says"), BAD_HEADERS, ids=[str(i) for i in range(len(BAD_HEADERS))])
def test_a_header_that_no_writer_writes_is_refused(tmp_path: Path, header: Any, says: str) -> None:
    write_weights(tmp_path, json.dumps(header).encode())
    with refused(f"model.safetensors.*({says})"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize(
    "header",
    [b"{" * 100, b'{"a":' * 100_000, b"[" * 200_000, b"\xff" * 40, b'{"a":NaN}', b'{"a":1,"a":1}', b"\0" * 64],
)
def test_header_bytes_that_are_no_json_are_refused(tmp_path: Path, header: bytes) -> None:
    write_weights(tmp_path, header)
    with refused(r"model\.safetensors: (unreadable|is not)"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 2**20, 90 * 2**20, 2**32, 2**63, 2**64 - 1])
def test_a_header_of_any_length_that_is_not_there_takes_no_memory(tmp_path: Path, length: int) -> None:
    write_weights(tmp_path, b"{}", length=length)
    with refused(r"model\.safetensors: is not a safetensors file, or is cut short"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "/etc/passwd"}, "own folder"),
        ({"a": "../model.safetensors"}, "own folder"),
        ({"a": "sub/../../x.safetensors"}, "own folder"),
        ({"a": "..safetensors"}, "own folder"),
        ({"a": "x\0.safetensors"}, "own folder"),
        ({"a": "x.bin"}, "own folder"),
        ({"a": ""}, "own folder"),
        ({"a": 5}, "own folder"),
        ({"a": None}, "own folder"),
        ({"a": ["x.safetensors"]}, "not a safetensors index"),
        ({"a": "x.safetensors", "b": 5}, "not a safetensors index"),
        ({}, "names no file"),
        ([], "not a safetensors index"),
        ({"a": "gone.safetensors"}, "not there: gone.safetensors"),
    ],
)
def test_an_index_leads_nowhere_but_into_its_folder(tmp_path: Path, weight_map: Any, says: str) -> None:
    root = tmp_path / "model"
    root.mkdir()
    write_weights(tmp_path, json.dumps({"a": entry([4], [0, 16])}).encode())  # there, beside the folder
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with refused(says):
        stored_tensors(root)


def test_a_tensor_that_lies_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_weights(tmp_path, json.dumps({"a": entry([4], [0, 16])}).encode()).rename(
            tmp_path / f"{name}.safetensors"
        )
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("in another file too, one is a"):
        stored_tensors(tmp_path)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.randoms(use_true_random=False))
def test_a_damaged_header_is_read_or_refused(tmp_path: Path, seed: Any) -> None:
    good = json.dumps(
        {"a": entry([4], [0, 16]), "b": entry([2, 2], [16, 32]), "__metadata__": {"format": "pt"}}
    ).encode()
    whole = bytearray(struct.pack("<Q", len(good)) + good + bytes(32))
    for _ in range(seed.randint(1, 4)):
        whole[seed.randrange(len(whole) - 32)] = seed.choice([0, 0xFF, ord("9"), ord("-"), ord('"'), ord("]")])
    (tmp_path / "model.safetensors").write_bytes(whole)
    try:
        stored_tensors(tmp_path)
    except ConfigError as error:
        assert "model.safetensors" in str(error)


def test_weights_that_are_quantised_are_not_taken_for_plain_ones(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (n_bytes,) = struct.unpack("<Q", raw[:8])
    tensors = json.loads(raw[8 : 8 + n_bytes])
    norm = tensors["model.norm.weight"]
    norm["dtype"] = "I32"  # as long as F32
    header = json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + n_bytes :])
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is in I32"):
        load_model(folder)


def test_a_config_of_which_no_model_can_be_made_is_refused(folder: Path) -> None:
    rewrite(folder, hidden_act="banana")
    with pytest.raises(ConfigError, match=r"config\.json.*banana"):
        load_model(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\xff\xff",
        b"[" * 200_000,
        b'{"model":{"type":"BPE","vocab":{"a":-1},"merges":[["b","c"]]}}',
        b"\0" * 99,
    ],
)
def test_a_tokenizer_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with refused(r"tokenizer\.json is no tokenizer"):
        _gateway(folder)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("chat_template.jinja", b"\xff\xfe", r"chat_template\.jinja"),
        ("chat_template.jinja", b"{% for %}", "template"),
        ("generation_config.json", b'{"eos_token_id": "end"}', "eos_token_id"),
        ("generation_config.json", b'{"eos_token_id": [1, null]}', "eos_token_id"),
        ("generation_config.json", b"[" * 100_000, "nested too deep"),
        ("tokenizer_config.json", b"3", "JSON object"),
    ],
)
def test_what_lies_beside_the_tokenizer_is_refused_by_name(folder: Path, name: str, content: bytes, says: str) -> None:
    (folder / name).write_bytes(content)
    with refused(says):
        _gateway(folder)


@pytest.mark.parametrize("template", [[None], [5, {"name": "default"}], 5, {}, [{"name": []}]])
def test_a_template_that_is_none_counts_as_not_there(folder: Path, template: Any) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert read_model_files(str(folder)).chat_template is None
