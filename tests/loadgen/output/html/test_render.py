"""The page stands alone, takes nothing from outside for its own, and has a place for every plot."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadgen.output.html.render import render, script_json
from loadgen.output.html.thin import LIMIT
from loadgen.results.result import Result
from tests.loadgen.records import record
from tests.loadgen.synthetic import Shape, run, sweep

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"
SCRIPT = re.compile(r'<script id="plotly">.*?</script>', re.DOTALL)


def page(*results: Result, title: str = "A run") -> str:
    """Without plotly's own script, which names addresses it never asks here."""
    whole = render(results, title)
    assert SCRIPT.search(whole) is not None
    return SCRIPT.sub("", whole)


SINGLE = page(run(Shape(n_requests=60)))
SWEEP = page(*sweep((2, 8), n_requests=20))


@pytest.mark.parametrize("html", [SINGLE, SWEEP], ids=["single", "sweep"])
def test_the_page_asks_for_no_other_file(html: str) -> None:
    assert re.findall(r"https?://[^\s<,]+", html) == ["http://127.0.0.1:8000"]  # the server measured, as text
    assert not re.search(r"\bsrc\s*=|<link|@import|url\(", html)


@pytest.mark.parametrize("html", [SINGLE, SWEEP], ids=["single", "sweep"])
def test_every_plot_has_its_figure_and_every_anchor_its_place(html: str) -> None:
    figures = json.loads(re.findall(r'id="figures">(.*?)</script>', html)[0])
    assert sorted(re.findall(r'data-figure="([^"]+)"', html)) == sorted(figures)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)


def test_colours_of_figures_are_variables_of_both_themes() -> None:
    css = re.findall(r"<style>(.*?)</style>", SWEEP, re.DOTALL)[0]
    light, dark = re.findall(r":root[^{]*\{(.*?)\}", css, re.DOTALL)
    used = set(re.findall(r'"\$([a-z0-9]+)"', SINGLE + SWEEP))
    assert used <= set(re.findall(r"--([a-z0-9]+):", light))
    assert used - {"clear"} <= set(re.findall(r"--([a-z0-9]+):", dark))


def test_nothing_from_outside_becomes_markup() -> None:
    plain = run(Shape(n_requests=20, failures=0.3))
    records = [replace(r, detail=EVIL, group=f"{EVIL}{r.index % 2}", workers={"prefill": EVIL}) for r in plain.records]
    named: dict[str, Any] = {"workers": {EVIL: plain.server.samples[0].workers["prefill-0"]}}
    named["memory"] = {EVIL: {EVIL: {EVIL: 5}}}
    samples = [replace(s, **named) for s in plain.server.samples]
    server = replace(plain.server, source=EVIL, samples=tuple(samples))
    facts = replace(plain.facts, model=EVIL, url=EVIL, command=(EVIL,), settings={EVIL: EVIL}, host={EVIL: EVIL})
    evil = replace(plain, facts=facts, records=records, server=server)
    other = replace(evil, facts=replace(facts, model=EVIL * 2))
    for html in (page(evil, title=EVIL), page(evil, other, title=EVIL)):
        assert "<img" not in html
        assert html.count("<script") == html.count("</script>") == 2  # figures, and what draws them
        figures = json.loads(re.findall(r'id="figures">(.*?)</script>', html)[0])
        shown = [trace[key] for f in figures.values() for trace in f["data"] for key in ("name",) if key in trace]
        assert any("&lt;img" in text for text in shown) and not any("<img" in text for text in shown)


def test_json_in_a_script_reads_back_and_cannot_end_it() -> None:
    text = script_json({"a": "</script><!--&"})
    assert json.loads(text) == {"a": "</script><!--&"}
    assert not set("<>&") & set(text)


def test_a_long_run_stays_small() -> None:
    plain = run(Shape(n_requests=1, told=False))
    records = [record(index=i, input_tokens=i, sent_s=1 + i / 9e3, end_s=9.0) for i in range(3 * LIMIT)]
    figures = json.loads(re.findall(r'id="figures">(.*?)</script>', page(replace(plain, records=records)))[0])
    longest = [len(trace["x"]) for figure in figures.values() for trace in figure["data"]]
    assert LIMIT / 2 < max(longest) <= LIMIT


def test_an_installed_package_has_all_files_of_the_page() -> None:
    root = Path(__file__).parents[4]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = root / "loadgen" / "output" / "html"
    assert sorted(listed["loadgen.output.html"]) == sorted(path.name for path in folder.glob("page.*"))


def test_a_report_needs_a_result() -> None:
    with pytest.raises(ValueError, match="needs a result"):
        render([], "nothing")
