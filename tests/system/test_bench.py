"""`penstock bench` starting systems of its own: what a person types, whole."""

import json
from pathlib import Path

import psutil
import pytest

from loadgen.__main__ import main
from loadgen.output.files import load
from tests.support.lateness import nobody_is_late  # noqa: F401 - of all tests here

pytestmark = pytest.mark.system


def children() -> list[str]:
    found = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    return [line for line in found if "services.launcher" in line]


def test_a_cluster_is_measured_beside_its_mixed_baseline_on_the_same_work_and_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--cluster 1P1D --baseline mixed --dataset multi-turn --turns 3 --isl 40 --osl 6 --think-time 0"
    code = main(["run", *flags.split(), "--concurrency", "2", "--num-requests", "12", "--out", str(tmp_path)])
    assert code == 0, capsys.readouterr()
    apart, mixed = load(tmp_path / "1P1D"), load(tmp_path / "2M")
    for result in (apart, mixed):
        assert result.summary.completed == 12
        assert result.server.leak_check is not None and not result.server.leak_check.held
        assert all(record.phases_ms and record.workers for record in result.records)
    assert {record.workers["decode"] for record in apart.records} == {"decode-0"}
    assert [one.prompt_tokens for one in sorted(apart.records, key=lambda one: one.request_id[-5:])] == [
        one.prompt_tokens for one in sorted(mixed.records, key=lambda one: one.request_id[-5:])
    ]
    assert "1P1D beside 2M" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()
    assert children() == []


def test_a_papers_experiment_ends_with_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "memserve --workloads react --systems separated+caching --requests 4 --capacity-requests 4 --scale 0.05"
    code = main(["paper", *flags.split(), "--model", str(tiny(tmp_path)), "--out", str(tmp_path / "out")])
    assert code == 0, capsys.readouterr()
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| react | separated+caching |" in table
    command = json.loads((tmp_path / "out" / "react-separated+caching-0" / "result.json").read_text())["command"]
    assert command[:3] == ["penstock", "bench", "run"] and "--shape" in command
    assert children() == []


def tiny(folder: Path) -> Path:
    from services.worker.model.make import make_model

    return make_model("tiny", folder / "tiny")
