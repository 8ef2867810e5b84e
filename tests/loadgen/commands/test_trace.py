import json
from pathlib import Path

import pytest

from loadgen.commands.trace import main


def mooncake(path: Path) -> Path:
    rows = [
        {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 2000, "input_length": 1024, "output_length": 7, "hash_ids": [1, 3]},
        {"timestamp": 4000, "input_length": 0, "output_length": 7, "hash_ids": []},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_info_shows_counts_lengths_and_what_a_cache_could_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(mooncake(tmp_path / "t.jsonl"))], {}) == 0
    shown = capsys.readouterr().out
    assert "1,012 / 1,012 / 1,022 / 1,024" in shown
    assert "25.0%" in shown
    assert "Left out: without prompt or answer" in shown


def test_a_trace_goes_to_our_form_and_back(tmp_path: Path) -> None:
    source, ours, back = mooncake(tmp_path / "t.jsonl"), tmp_path / "ours.jsonl", tmp_path / "back.jsonl"
    assert main(["convert", str(source), "--to", "penstock", str(ours)], {}) == 0
    assert main(["convert", str(ours), "--to", "mooncake", str(back)], {}) == 0
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    assert [json.loads(line) for line in back.read_text().splitlines()] == rows[:2]


def test_scale_writes_our_form_at_another_speed(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["scale", str(mooncake(tmp_path / "t.jsonl")), "--speed", "4", "--scale-isl", "0.125", str(out)]
    assert main(arguments, {}) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["t"], row["isl"], row["block"]) for row in rows] == [(0.0, 125, 64), (0.5, 128, 64)]


def test_make_writes_as_many_requests_as_asked_for_and_the_same_again(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for out in (one, two):
        assert (
            main(["make", "--shape", "react", "--num-requests", "30", "--rate", "2", "--seed", "4", str(out)], {}) == 0
        )
    assert one.read_bytes() == two.read_bytes()
    assert len(one.read_text().splitlines()) == 30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("info nowhere", "nowhere: No such file"),
        ("info", "required: FILE"),
        ("convert {file} --to azure out", "invalid choice"),
        ("convert {file} --to penstock {file}", "name another file"),
        ("convert {file} --to penstock --out-block 8 out", "--out-block"),
        ("convert {file} --to penstock nowhere/out", "nowhere/out: No such file"),
        ("scale {file} --start 5 --end 4 out", "--end=4"),
        ("make --dataset mooncake --dataset-path {file} --rate 1 out", "is a trace already"),
        ("make --rate 0 out", "above 0"),
        ("info {file} --format azure", "no column TIMESTAMP"),
    ],
)
def test_what_cannot_be_done_is_said_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    file = mooncake(tmp_path / "t.jsonl")
    before = file.read_bytes()
    assert main(arguments.format(file=file).split(), {}) == 2
    assert said in capsys.readouterr().err
    assert file.read_bytes() == before
