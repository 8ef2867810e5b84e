import json
from dataclasses import replace
from pathlib import Path

import pytest

from loadgen.commands.compare import compared, main
from loadgen.output.compare_table import title
from loadgen.output.files import save
from loadgen.stats import resampling
from loadgen.stats.assertions import parse
from loadgen.stats.saturation import Saturation
from tests.loadgen.synthetic import Shape, run


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "RESAMPLES", 100)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of a system and two of one whose prefill takes four times as long."""
    place = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        save(run(Shape(seed=seed, n_requests=60)), place / f"base{seed}")
        save(run(Shape(seed=seed, n_requests=60, ms_per_prompt_token=0.88, rate=4.0)), place / f"slow{seed}")
    return place


def test_folders_become_a_table_with_verdicts(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folders / "base1"), str(folders / "slow1")], {}) == 0
    lines = capsys.readouterr().out.splitlines()
    (mean_ttft,) = [line for line in lines if line.startswith("Mean TTFT (ms)")]
    assert mean_ttft.endswith("HIGHER")
    (p99,) = [line for line in lines if line.startswith("P99 E2EL (ms)")]
    assert p99.endswith("too few samples")
    assert any(line.startswith("warning: not the same work: request_rate: 8 | 4") for line in lines)
    assert any("one run on a side" in line for line in lines)


def test_groups_of_runs_are_pooled(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = ([str(folders / f"{name}{seed}") for seed in (1, 2)] for name in ("base", "slow"))
    assert main(["--base", *base, "--other", *other, "--format", "json"], {}) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["base_runs"], found["other_runs"]) == (2, 2)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["mean_ttft_ms"]["verdict"] == "higher"
    assert rows["mean_ttft_ms"]["ratio"]["low"] > 1
    assert rows["attainment"]["base"] is not None


def test_markdown_is_one_table(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folders / "base1"), str(folders / "base2"), "--format", "markdown"], {}) == 0
    table, remarks = capsys.readouterr().out.split("\n\n")
    assert {line.count("|") for line in table.splitlines()} == {6}
    assert all(line.startswith("- ") for line in remarks.splitlines())


@pytest.mark.parametrize(("gate", "code"), [("mean_ttft_ms<1.5x", 1), ("mean_ttft_ms>1.5x", 0), ("p99_ttft_ms<1e9", 1)])
def test_a_gate_that_fails_is_exit_code_1(
    folders: Path, capsys: pytest.CaptureFixture[str], gate: str, code: int
) -> None:
    assert main([str(folders / "base1"), str(folders / "slow1"), "--assert", "failed<60", "--assert", gate], {}) == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"assert: {gate}: {'failed' if code else 'holds'}")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["base1"], "give BASE and OTHER"),
        (["base1", "nowhere"], "no result.json there"),
        (["base1", "slow1", "--assert", "mean_ttf_ms<5"], "did you mean mean_ttft_ms"),
        (["base1", "slow1", "--assert", "mean_ttft_ms"], "must be like"),
        (["--base", "base1"], "each side needs a folder"),
        (["base1", "slow1", "--other", "slow1"], "counts once"),
        (["base1", "slow1", "--format", "pdf"], "--help"),
    ],
)
def test_bad_input_is_exit_code_2_with_the_reason(
    folders: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    why: str,
) -> None:
    monkeypatch.chdir(folders)
    assert main(arguments, {}) == 2
    assert why in capsys.readouterr().err


def test_a_gate_on_several_runs_is_about_their_mean() -> None:
    runs = [run(Shape(seed=seed, n_requests=40)) for seed in (1, 2)]
    means_s = [one.summary.e2e.mean_s for one in runs if one.summary.e2e is not None]
    between = sum(means_s) / 2 * 1e3
    gates = [parse(f"mean_e2el_ms>{between - 0.01}"), parse(f"mean_e2el_ms<{between + 0.01}")]
    assert [verdict.holds for verdict in compared(runs, runs, gates)[1]] == [True, True]


def test_saturated_and_late_runs_are_named() -> None:
    good = run(Shape(n_requests=40))
    late = replace(good.health, lag_p50_s=9.0, allowed_lag_s=1.0)
    bad = replace(good, saturation=Saturation(detected=True, why="it grew"), health=late)
    comparison, _ = compared([good], [good, bad], [])
    assert [warning.partition(":")[0] for warning in comparison.warnings] == ["other 2", "other 2"]


def test_titles_are_the_words_of_the_report() -> None:
    assert [title(name) for name in ("p99_ttft_ms", "mean_e2el_ms", "request_goodput")] == [
        "P99 TTFT (ms)",
        "Mean E2EL (ms)",
        "Request goodput (req/s)",
    ]
