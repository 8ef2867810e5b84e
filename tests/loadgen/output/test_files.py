"""A folder gives back the result that was written into it, or says what is wrong with it."""

import csv
import io
import json
import math
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from loadgen.output.files import REQUESTS, RESULT, TIMELINE, load, save
from loadgen.output.result_json import SCHEMA_VERSION
from loadgen.results.records import Outcome, RequestRecord
from loadgen.results.request_lines import from_line, to_csv, to_line
from loadgen.results.result import Result
from tests.loadgen.records import PLAIN, record
from tests.loadgen.synthetic import Shape, run

ONES = array("l", [1, 1, 1, 1])
RUN = run(Shape(n_requests=12))
times_s = st.floats(-1e3, 1e6, allow_nan=False)
names = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2)


@st.composite
def records(draw: st.DrawFn) -> RequestRecord:
    chunk_s = draw(st.lists(times_s, max_size=4))
    weights = st.lists(st.integers(1, 9), min_size=len(chunk_s), max_size=len(chunk_s))
    tokens = draw(st.none() | weights)
    return record(
        index=draw(st.integers(0, 9)),
        detail=draw(st.text()),
        group=draw(st.text()),
        outcome=draw(st.sampled_from(Outcome)),
        measured=draw(st.booleans()),
        held_s=draw(times_s),
        planned_s=draw(times_s),
        cached_tokens=draw(st.none() | st.integers(0, 99)),
        workers=draw(names),
        phases_ms=draw(st.dictionaries(st.text(max_size=5), times_s, max_size=2)),
        chunk_s=array("d", chunk_s),
        chunk_tokens=None if tokens is None else array("l", tokens),
    )


@given(records())
@settings(max_examples=15, deadline=None)
def test_a_line_gives_back_everything_of_its_request(one: RequestRecord) -> None:
    line = to_line(one)
    assert b"\n" not in line
    assert from_line(line) == one


def test_a_folder_gives_back_its_result(tmp_path: Path) -> None:
    save(RUN, tmp_path / "new" / "run")
    assert load(tmp_path / "new" / "run") == replace(RUN, records=tuple(RUN.records))


def test_infinite_rates_come_back(tmp_path: Path) -> None:
    facts = replace(RUN.facts, request_rate=math.inf, settings={"rate": math.inf})
    save(replace(RUN, facts=facts), tmp_path)
    assert load(tmp_path).facts == facts
    json.loads((tmp_path / RESULT).read_text(), parse_constant=pytest.fail)


def test_result_json_starts_with_the_keys_of_vllm_and_holds_no_requests(tmp_path: Path) -> None:
    save(RUN, tmp_path)
    found = json.loads((tmp_path / RESULT).read_text())
    assert list(found)[:3] == ["date", "backend", "model_id"]
    assert {"median_ttft_ms", "p99_itl_ms", "ttfts", "itls", "warnings", "send_lag_ms"} <= set(found)
    assert "requests" not in found


def test_a_second_result_replaces_the_first(tmp_path: Path) -> None:
    save(RUN, tmp_path)
    save(bare := run(Shape(n_requests=3, told=False)), tmp_path)
    assert load(tmp_path) == replace(bare, records=tuple(bare.records))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([RESULT, REQUESTS, TIMELINE])


def test_an_interrupted_write_leaves_no_result(tmp_path: Path) -> None:
    save(RUN, tmp_path)

    class FullDisk(Exception):
        pass

    def failing() -> Any:
        raise FullDisk

    class Failing(RequestRecord):
        send_lag_s = property(lambda self: failing())

    names = RequestRecord.__dataclass_fields__
    broken = Failing(**{name: getattr(RUN.records[0], name) for name in names})
    with pytest.raises(FullDisk):
        save(replace(RUN, records=[broken]), tmp_path)
    with pytest.raises(ConfigError, match="writing it was interrupted"):
        load(tmp_path)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DEEP = "[" * 100_000 + "]" * 100_000


def edit_line(path: Path, **changes: Any) -> None:
    """The first one."""
    first, *rest = path.read_text().splitlines()
    changed = json.dumps(json.loads(first) | changes).replace('"DEEP"', DEEP)
    path.write_text("\n".join([changed, *rest]) + "\n")


def damage_line(folder: Path) -> None:
    lines = (folder / REQUESTS).read_text().splitlines()
    lines[4] = lines[4][:40]
    (folder / REQUESTS).write_text("\n".join(lines) + "\n")


def drop_line(folder: Path) -> None:
    (folder / REQUESTS).write_text("".join((folder / REQUESTS).read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda folder: [path.unlink() for path in folder.iterdir()], "no result.json there; give a folder"),
        (lambda folder: (folder / RESULT).unlink(), "interrupted"),
        (lambda folder: (folder / RESULT).write_text("{"), "result.json: damaged"),
        (lambda folder: (folder / RESULT).write_text("{}"), "not written by penstock bench"),
        (lambda folder: edit(folder / RESULT, schema_version=SCHEMA_VERSION + 1), "is newer than .*update penstock"),
        (lambda folder: edit(folder / RESULT, schema_version=1), "is older than"),
        (lambda folder: edit(folder / RESULT, run={}), "result.json: damaged: run: "),
        (lambda folder: edit(folder / RESULT, run=7), "result.json: damaged: run: "),
        (damage_line, r"requests.jsonl:5: damaged"),
        (drop_line, r"requests.jsonl: 11 lines, but result.json speaks of 12"),
        (lambda folder: (folder / TIMELINE).unlink(), "timeline.jsonl: No such file"),
        (lambda folder: (folder / RESULT).write_text(f'{{"run": {DEEP}}}'), "result.json: damaged: .*recursion"),
        (lambda folder: edit(folder / RESULT, run=json.loads("[" * 200 + "]" * 200)), "deeper than 100 levels"),
        (lambda folder: edit_line(folder / REQUESTS, extra="DEEP"), "requests.jsonl:1: damaged: .*recursion"),
        (lambda folder: edit_line(folder / REQUESTS, chunk_s=[1.0] * 30, chunk_tokens=[10**6] * 30), "speaks of 30000"),
        (lambda folder: edit_line(folder / TIMELINE, at_s=1e300), "timeline.jsonl:1: damaged: a time"),
        (lambda folder: edit_line(folder / TIMELINE, waiting=10**30), "timeline.jsonl:1: damaged: .*requests beyond"),
        (
            lambda folder: edit_line(folder / TIMELINE, memory={"w": {"device": {"weights": 10**30}}}),
            "timeline.jsonl:1: damaged: a size of memory",
        ),
        (lambda folder: edit_line(folder / TIMELINE, extra="DEEP"), "timeline.jsonl:1: damaged: .*recursion"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_with_the_place(tmp_path: Path, harm: Any, text: str) -> None:
    save(RUN, tmp_path)
    harm(tmp_path)
    with pytest.raises(ConfigError, match=text):
        load(tmp_path)


def test_a_csv_has_a_line_per_request_and_runs_no_formula() -> None:
    evil = record(index=1, detail="=1+1", workers={"prefill": "p0"}, phases_ms={"compute": 2.5})
    rows = list(csv.DictReader(io.StringIO(to_csv([evil, record(index=0)]))))
    assert [row["index"] for row in rows] == ["0", "1"]
    assert (rows[1]["detail"], rows[1]["prefill_worker"], rows[1]["compute_ms"]) == ("'=1+1", "p0", "2.5")
    assert (rows[0]["ttft_s"], rows[0]["chunks"], rows[0]["compute_ms"]) == ("1.0", "4", "")


def test_loaded_numbers_are_those_that_were_measured(tmp_path: Path) -> None:
    """Not computed anew: another version of the bench may count differently."""
    changed: Result = replace(RUN, summary=replace(RUN.summary, completed=77))
    save(changed, tmp_path)
    assert load(tmp_path).summary.completed == 77


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in ("sent_s", "end_s", "planned_s", "held_s") for value in (1e308, -1e308)),
        *({name: value} for name in ("turn", "index", "output_tokens", "input_tokens") for value in (-1, 10**18)),
        {"asked_input_tokens": -1},
        {"cached_tokens": 2**40},
        {"phases_ms": {"queue": 1e308}},
        {"chunk_s": [1e308] * 4},
        *({"chunk_tokens": [1, 1, 1, tokens]} for tokens in (-1, 2**30, 2**62, 2**70)),
    ],
)
def test_numbers_that_no_run_writes_are_damage(changes: dict[str, Any]) -> None:
    fields = json.loads(to_line(record()))
    assert from_line(json.dumps(fields).encode()) == record(chunk_s=array("d", PLAIN.chunk_s), chunk_tokens=ONES)
    with pytest.raises(ValueError):
        from_line(json.dumps(fields | changes).encode())


def test_a_line_nested_too_deep_is_damage() -> None:
    deep = json.dumps(json.loads(to_line(record())) | {"extra": "DEEP"}).replace('"DEEP"', DEEP)
    with pytest.raises(ValueError, match="recursion"):
        from_line(deep.encode())
