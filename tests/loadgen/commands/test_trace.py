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


def ours(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_info_judges_sharing_by_the_block_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = list(range(32))
    file = ours(tmp_path / "t.jsonl", {"prompt": prompt, "osl": 1}, {"prompt": [*prompt[:24], *prompt], "osl": 1})
    shares = []
    for block in ((), ("--block", "8"), ("--block", "32")):
        assert main(["info", str(file), *block], {}) == 0
        shown = capsys.readouterr().out
        shares.append(next(line for line in shown.splitlines() if "Ideal hit share" in line).split()[1:-1])
    assert [(words[-3], words[-1]) for words in shares] == [("16", "16.7%"), ("8", "27.3%"), ("32", "0.0%")]


def test_turns_that_follow_answers_have_the_span_of_their_pauses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"t": 0, "session": "s", "isl": 5, "osl": 5}
    file = ours(tmp_path / "t.jsonl", first, {"session": "s", "isl": 5, "osl": 5, "think_s": 4.0})
    assert main(["info", str(file)], {}) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Span (s), plus waits for answers │ 4.0" in shown
    assert "Mean rate (req/s), at most │ 0.500" in shown


def test_other_blocks_than_mooncakes_are_said_after_converting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ours(tmp_path / "t.jsonl", {"t": 0, "prompt": list(range(40)), "osl": 1})
    assert main(["convert", str(file), "--to", "mooncake", str(tmp_path / "out")], {}) == 0
    assert "--block 16" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out").read_text())["hash_ids"]) == 3


def test_questions_alone_become_a_trace_with_osl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ours(tmp_path / "t.jsonl", {"messages": [{"role": "user", "content": "why?"}]})
    assert main(["info", str(file)], {}) == 2
    assert "t.jsonl:1: does not say how long to answer" in capsys.readouterr().err
    assert main(["info", str(file), "--osl", "9"], {}) == 0
    assert "9 / 9 / 9 / 9" in capsys.readouterr().out


def test_a_trace_goes_to_our_form_and_back(tmp_path: Path) -> None:
    source, ours, back = mooncake(tmp_path / "t.jsonl"), tmp_path / "ours.jsonl", tmp_path / "back.jsonl"
    assert main(["convert", str(source), "--to", "custom", str(ours)], {}) == 0
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
        ("convert {file} --to custom {file}", "name another file"),
        ("convert {file} --to custom --out-block 8 out", "--out-block"),
        ("convert {file} --to custom nowhere/out", "nowhere/out: No such file"),
        ("scale {file} --start 5 --end 4 out", "--end=4"),
        ("make --dataset mooncake --dataset-path {file} --rate 1 out", "is a trace already"),
        ("make --rate 0 out", "above 0"),
        ("info {file} --format azure", "no column TIMESTAMP"),
        ("info {file} --format azure", "looks like mooncake, not azure"),
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
