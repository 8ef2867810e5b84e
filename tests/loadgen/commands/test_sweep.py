import json
import re
from pathlib import Path

import pytest

from tests.loadgen.commands.bench import FEW, bench, result_of
from tests.loadgen.fake_server import Answer, steady

EASY = ("--goodput", "ttft:60000")


def test_every_rate_of_a_list_is_one_run_with_prompts_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, fake = bench(steady(), *FEW, "--rates", "200,400", "--out", tmp_path, "--seed", 3, command="sweep")
    assert code == 0
    assert len({str(seen.body["prompt"]) for seen in fake.seen}) == 20
    assert [result_of(tmp_path / f"run-{number:02}")["request_rate"] for number in (1, 2)] == [200.0, 400.0]
    assert (tmp_path / "report.html").is_file()
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1:3]] == ["200", "400"]
    assert "all 2 rates were measured" in rows[3]


def test_a_search_ends_with_the_highest_rate_that_met_its_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--find-goodput", *EASY, "--start-rate", 300, "--attainment", 0.5, "--max-runs", 2, "--no-html")
    assert bench(steady(), *FEW, *flags, "--out", tmp_path, command="sweep")[0] == 0
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert [point["request_rate"] for point in found["points"]] == [300.0, 600.0]
    assert found["best_rate"] == 600.0
    assert re.search(r"highest rate found .* 600 req/s \(2 runs are used up\)", capsys.readouterr().out)


def test_targets_that_no_rate_meets_are_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    refusing = Answer((b"full",), status=503)
    flags = ("--find-goodput", *EASY, "--start-rate", 300, "--max-runs", 3)
    assert bench(lambda number, body: refusing, *FEW, *flags, command="sweep")[0] == 1
    assert "no rate met the targets" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ((), "give --rates .* or --find-goodput"),
        (("--rates", "1", "--find-goodput"), "exactly one"),
        (("--find-goodput",), "needs --goodput"),
        (("--rates", "1,x"), "must be rates above 0 such as 1,2,4"),
        (("--rates", "1", "--rate", "2"), "--rate"),
        (("--rates", "1", "--concurrency", "2"), "--concurrency"),
        (("--find-goodput", *EASY, "--max-concurrency", "2"), "hides overload"),
        (("--rates", "1", "--assert", "failed<1"), "--assert belongs to"),
        (("--find-goodput", *EASY, "--attainment", "0"), "must be above 0"),
    ],
)
def test_bad_settings_end_with_two_and_say_what_is_wrong(
    flags: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, fake = bench(steady(), *flags, command="sweep")
    assert code == 2
    assert re.search(text, capsys.readouterr().err)
    assert fake.seen == []


def test_a_rate_that_is_answered_nothing_is_a_failure_and_one_that_overloads_is_none() -> None:
    def sparse(number: int, body: dict[str, object]) -> Answer:
        return Answer((b"full",), status=503) if number % 2 else steady()(number, body)

    assert bench(sparse, *FEW, "--rates", "300", command="sweep")[0] == 0
    assert bench(lambda number, body: Answer((b"full",), status=503), *FEW, "--rates", "300", command="sweep")[0] == 1


def test_a_sweep_that_breaks_off_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def vanishing(number: int, body: dict[str, object]) -> Answer:
        return steady()(number, body)

    pages = {
        "/v1/models": lambda: (
            404 if seen.append("asked") or len(seen) > 1 else json.dumps({"data": [{"id": "m"}]}).encode()
        )
    }
    assert bench(vanishing, *FEW, "--rates", "300,400", "--out", tmp_path, command="sweep", pages=pages)[0] == 2
    assert len(json.loads((tmp_path / "sweep.json").read_text())["points"]) == 1


def test_a_folder_with_other_runs_in_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run-07").mkdir()
    assert bench(steady(), *FEW, "--rates", "300", "--out", tmp_path, command="sweep")[0] == 2
    assert "is not empty" in capsys.readouterr().err
