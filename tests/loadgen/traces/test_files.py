import re
from pathlib import Path

import pytest

from common.errors import ConfigError
from loadgen.traces.files import TraceFile, read_trace, recognised
from loadgen.workload.lengths import Fixed


@pytest.mark.parametrize(
    ("beginning", "found"),
    [
        ('{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [1]}\n', "mooncake"),
        ('{"prompt": "mention of input_length", "osl": 5}\n', "custom"),
        ('{"messages": [], "output_tokens": 4}\n', "custom"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023", "azure"),
        ("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n", "burstgpt"),
        ('\n[{"id": "x", "conversations": [', "sharegpt"),
        ('{"id": "x", "conversations": [{"from": "human"', "sharegpt"),
    ],
)
def test_a_format_is_told_by_the_content(beginning: str, found: str) -> None:
    assert recognised(beginning, "f") == found


def test_a_file_of_no_known_format_is_refused_with_its_beginning() -> None:
    for beginning in ("hello", "[build-system]"):
        with pytest.raises(ConfigError, match=f"begins with '{re.escape(beginning)}'"):
            recognised(f"{beginning}\n", "f")


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_bytes(b"\xef\xbb\xbfTIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:00:00.0,5,6\r\n")
    assert read_trace(TraceFile(path=str(path))).n_requests == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), (b"\xff\xfe\x00", "UTF-8"), (b"TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request")],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "trace"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"trace: .*{said}"):
        read_trace(TraceFile(path=str(path)))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "custom",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.0,5,6\n",
            "looks like azure, not custom",
        ),
        ("azure", '{"prompt": "a", "osl": 5}\n', "looks like custom, not azure"),
        ("mooncake", '{"conversations": []}\n', "looks like sharegpt, not mooncake"),
        ("custom", "hello\n", "looks like none of .*: it begins with 'hello'"),
    ],
)
def test_a_file_of_another_format_is_told_what_it_looks_like(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    path = tmp_path / "trace"
    path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_trace(TraceFile(path=str(path), format=name))


def test_answers_of_traces_that_have_them_are_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.0,5,6\n")
    with pytest.raises(ConfigError, match="--osl is for custom and sharegpt"):
        read_trace(TraceFile(path=str(path), output_lengths=Fixed(4)))


def test_settings_that_a_format_does_not_use_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{"isl": 5, "osl": 6}\n')
    with pytest.raises(ConfigError, match="--block"):
        read_trace(TraceFile(path=str(path), block_tokens=16))
