"""`penstock bench report`: which folders it takes, where it writes, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest

from loadgen.commands.report import main
from loadgen.output.files import save
from loadgen.results.metrics import summarize
from tests.loadgen.synthetic import Shape, run


def folder(path: Path, rate: float = 8.0) -> Path:
    save(run(Shape(n_requests=5, rate=rate)), path)
    return path


def test_one_folder_gets_its_page_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder(tmp_path / "run"))], {}) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h1>run</h1>" in page
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")


def test_a_sweep_is_taken_apart_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for rate in (10, 2):
        folder(tmp_path / f"rate-{rate}", rate)
    assert main([str(tmp_path), "--names", "folder"], {}) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.index("<summary>rate-2</summary>") < page.index("<summary>rate-10</summary>")


def test_place_and_title_can_be_given(tmp_path: Path) -> None:
    first, second = folder(tmp_path / "a"), folder(tmp_path / "b", 9.0)
    assert main([str(first), str(second), "--out", str(tmp_path / "x.html"), "--title", "A < B"], {}) == 0
    assert "<h1>A &lt; B</h1>" in (tmp_path / "x.html").read_text()


def test_a_result_without_a_measured_request_becomes_a_page_that_says_so(tmp_path: Path) -> None:
    plain = run(Shape(n_requests=5))
    nothing = replace(plain.summary, measured=0, completed=0, failed=0, cancelled=0, outcomes={}, ttft=None, tpot=None)
    save(replace(plain, records=(), summary=nothing), tmp_path / "sent")
    unmeasured = [replace(one, measured=False) for one in plain.records]
    save(replace(plain, records=unmeasured, summary=summarize(unmeasured)), tmp_path / "measured")
    for name, why in (("sent", "no request was sent"), ("measured", "5 requests ended, and each was warm-up")):
        assert main([str(tmp_path / name)], {}) == 0
        page = (tmp_path / name / "report.html").read_text()
        assert "Nothing was measured" in page
        assert why in page
    assert main([str(tmp_path)], {}) == 0
    assert "Nothing was measured in 8/s (1), 8/s (2)" in (tmp_path / "report.html").read_text()


def test_what_is_no_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = folder(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    cases = {
        (str(tmp_path / "none"),): "no such folder",
        (str(good), str(tmp_path / "empty")): "no result.json there",
        (str(good), "--out", str(tmp_path / "no" / "x.html")): "cannot be written",
        (): "required",
    }
    for arguments, text in cases.items():
        assert main(arguments, {}) == 2
        assert text in capsys.readouterr().err
    assert not (good / "report.html").exists()
