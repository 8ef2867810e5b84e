"""What each section shows of a rich run, and that poor runs leave it out or say why."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loadgen.output.html.run_view import RunView, views
from loadgen.output.html.section import Section
from loadgen.output.html.sections import (
    cdf,
    curves,
    errors,
    facts,
    groups,
    lengths,
    memory,
    numbers,
    phases,
    timeline,
    turns,
    verdict,
)
from loadgen.output.html.thin import thin
from loadgen.output.html.wording import NBSP, latency, quantity, share, target_text
from loadgen.output.result_json import to_json
from loadgen.results.health import generator_health
from loadgen.results.metrics import summarize
from loadgen.results.records import Outcome
from loadgen.results.result import Result
from tests.loadgen.records import record
from tests.loadgen.synthetic import Shape, run, sweep

RICH = views([run()])[0]
BARE = views([run(Shape(n_requests=30, told=False, turns=1, failures=0))])[0]
ONE = views([run(Shape(n_requests=1, told=False, turns=1, failures=0))])[0]
FAILED = views([run(Shape(n_requests=20, told=False, turns=1, failures=1))])[0]
POOR = {"bare": BARE, "one": ONE, "failed": FAILED}


def made(*records: Any, **changes: Any) -> RunView:
    """A run of these records."""
    base = run(Shape(n_requests=1, told=False))
    health = generator_health(records, 0.0, cpu_s=(0.0,), wall_s=1.0)
    whole = Result(base.facts, summarize(records), health, records, base.server, None)
    return views([replace(whole, **changes)])[0]


def found(section: Section | None) -> Section:
    assert section is not None
    return section


def texts(section: Section | None) -> list[str]:
    one = found(section)
    return [cell for table in one.tables for row in table.rows for cell in row] + [one.note]


def test_a_rich_run_has_every_section() -> None:
    builders = (timeline.build, memory.build, phases.build, turns.build, lengths.build, groups.build)
    shown = [found(build(RICH)) for build in builders]
    shown += [found(build([RICH])) for build in (cdf.build, errors.build, facts.build, numbers.build)]
    assert all(section.figures or section.tables or section.facts for section in shown)
    names = [figure.name for section in shown for figure in section.figures]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", POOR)
def test_a_poor_run_has_no_section_without_content(name: str) -> None:
    poor = POOR[name]
    shown: list[Section | None] = [build(poor) for build in (timeline.build, phases.build, lengths.build, groups.build)]
    shown += [turns.build(poor), cdf.build([poor]), errors.build([poor]), facts.build([poor]), numbers.build([poor])]
    for section in shown:
        assert section is None or section.figures or section.tables or section.facts or section.note
    assert verdict.build([poor]).text


def test_what_a_reader_would_miss_is_explained() -> None:
    assert "does not tell phases" in found(phases.build(BARE)).note
    assert "told nothing of itself (no /status" in found(timeline.build(BARE)).note
    assert "Nothing was answered" in numbers.build([FAILED]).note
    same = made(record(index=0), record(index=1))
    assert "every prompt has 10 tokens" in found(lengths.build(same)).note


def test_a_curve_of_a_distribution_shows_its_samples_at_their_percentiles() -> None:
    figure = found(cdf.build([RICH])).figures[0]
    trace, values = figure.data[0], RICH.latencies_ms["ttft"]
    assert trace["y"][-1] == pytest.approx(values[-1], abs=1e-3)
    at_p90 = np.interp(1.0, trace["x"], trace["y"])  # -log10(1 - 0.9)
    assert at_p90 == pytest.approx(np.percentile(values, 90), rel=0.02)


def test_the_axis_turns_to_seconds_when_milliseconds_grow_long() -> None:
    slow = made(record(chunk_s=(13.0,), chunk_tokens=(1,), end_s=13.0))
    figure = found(cdf.build([slow])).figures[0]
    assert figure.layout["yaxis"]["title"]["text"] == "s"
    assert figure.data[0]["y"] == [12.0]


def test_phases_and_their_rest_add_up_to_the_time_to_first_token() -> None:
    means = phases.means_ms(RICH.answered)
    ttft_ms = np.mean([(one.ttft_s or 0) * 1e3 for one in RICH.answered])
    assert sum(means.values()) == pytest.approx(ttft_ms)
    assert list(means)[:2] == ["prefill_queue", "compute"] and list(means)[-1] == "rest"
    assert means["rest"] > 0


def test_phases_longer_than_the_time_to_first_token_leave_no_negative_rest() -> None:
    assert phases.means_ms([record(phases_ms={"compute": 5000.0})])["rest"] == 0.0


def test_a_phase_nobody_knows_is_shown_under_its_name() -> None:
    keys = [key.name for key in found(phases.build(made(record(phases_ms={"warp_drive": 9.0})))).keys]
    assert keys == ["warp drive", "gateway, network, client"]


def test_the_slowest_percent_is_slower_than_the_fastest_half() -> None:
    section = found(phases.build(RICH))
    totals = np.sum([trace["x"] for trace in section.figures[0].data], axis=0)
    assert section.figures[0].data[0]["y"] == ["all", "fastest 50 %", "50 to 90 %", "90 to 99 %", "slowest 1 %"]
    assert list(totals[1:]) == sorted(totals[1:])


def test_tokens_and_requests_of_the_timeline_add_up() -> None:
    bins = {trace["name"]: sum(trace["y"]) for trace in found(timeline.build(RICH)).figures[0].data}
    assert bins["requests"] == len(RICH.result.records)
    assert bins["tokens"] == sum(one.output_tokens for one in RICH.result.records)


def test_workers_have_the_colour_of_their_role() -> None:
    lines = {t["name"]: t["line"]["color"] for t in found(timeline.build(RICH)).figures[0].data if "line" in t}
    assert (lines["prefill-0"], lines["decode-1"]) == ("$blue", "$orange")


def test_turns_show_their_median_and_cached_share() -> None:
    rows = [record(index=i, turn=i % 2, cached_tokens=5 * (i % 2), chunk_s=(2.0 + i % 2,)) for i in range(8)]
    plain = [replace(one, chunk_tokens=(1,), output_tokens=1) for one in rows]
    ttft, cached = found(turns.build(made(*plain))).figures
    assert [trace["name"] for trace in ttft.data] == ["p50"], "p90 of 4 requests is one of them"
    assert ttft.data[0]["y"] == [1000.0, 2000.0]
    assert cached.data[0]["y"] == [0.0, 0.5]


def test_turns_of_a_few_requests_show_no_percentile_and_say_why() -> None:
    section = found(turns.build(made(*(record(index=i, turn=i, cached_tokens=5) for i in range(3)))))
    assert [figure.name for figure in section.figures] == ["turn-cached"]
    assert "No turn has the 4 answers" in section.note


def test_parts_on_the_page_are_those_of_result_json() -> None:
    told = to_json(RICH.result)
    tables = {table.title.partition(" (")[0]: table for table in found(groups.build(RICH)).tables}
    by_length = found(lengths.build(RICH)).tables[0]
    shown = [by_length.rows, tables["By group"].rows, tables["By worker"].rows]
    columns = (1, 1, 2)
    for name, rows, column in zip(("by_input_length", "by_group", "by_worker"), shown, columns, strict=True):
        assert [quantity(part["completed"]) for part in told[name] if part["completed"]] == [
            row[column] for row in rows
        ]
    medians = found(turns.build(RICH)).figures[0].data[1]["y"]
    assert medians == [pytest.approx(part["p50_ttft_ms"], abs=1e-3) for part in told["by_turn"]]


@pytest.mark.parametrize(("n_requests", "missing"), [(3, 4), (19, 3), (39, 2), (199, 1), (200, 0)])
def test_a_percentile_of_too_few_samples_is_not_shown(n_requests: int, missing: int) -> None:
    section = numbers.build([made(*(record(index=i, chunk_s=(2.0,), chunk_tokens=(1,)) for i in range(n_requests)))])
    cells = section.tables[0].rows[0]
    assert cells.count("–") == missing
    least = {4: "p50 is given from 4 samples on, p90 from 20, p95 from 40, p99 from 200.", 0: ""}
    assert section.note == least.get(missing, section.note)


def test_a_page_of_nothing_measured_says_so() -> None:
    warm_up = [record(index=i, measured=False) for i in range(5)]
    empty = made(*warm_up, record(index=9, outcome=Outcome.CANCELLED))
    assert "Nothing was measured" in verdict.build([empty]).text
    assert "6 requests ended" in verdict.build([empty]).text
    several = views([RICH.result, empty.result], ["full", "empty"])
    assert "Nothing was measured in empty" in verdict.build(several).text


def test_lengths_are_counted_in_powers_of_two() -> None:
    sizes = (1, 2, 3, 4, 5, 1024, 1025)
    rows = [record(index=i, input_tokens=size) for i, size in enumerate(sizes)]
    table = found(lengths.build(made(*rows))).tables[0]
    counts = [(row[0], row[1]) for row in table.rows]
    assert counts[:4] == [("1", "1"), ("2", "1"), ("3 – 4", "2"), ("5 – 8", "1")]
    assert counts[4:] == [("513 – 1,024", "1"), ("1,025 – 2,048", "1")]


def test_errors_are_counted_by_class_with_the_first_text() -> None:
    bad = [record(index=i, outcome=Outcome.TIMEOUT, detail=f"text {i // 3}", sent_s=float(i)) for i in range(12)]
    cells = texts(errors.build([made(*bad, record(index=99))]))
    assert cells[:5] == ["timeout", "3", f"0.0{NBSP}s", "–", "text 0"]
    assert "and 1 other text" in cells and "12 requests failed." in cells


def test_warm_up_counts_in_no_latency() -> None:
    view = made(record(index=0), record(index=1, measured=False, chunk_s=(9.0,), chunk_tokens=(1,)))
    assert list(view.latencies_ms["ttft"]) == [1000.0]


def test_saturated_runs_are_hollow_and_late_ones_crossed() -> None:
    runs = sweep((2, 8, 14), n_requests=220)
    late = replace(runs[1].health, lag_p50_s=1.0)
    section = found(curves.build(views([runs[0], replace(runs[1], health=late), runs[2]])))
    assert section.figures[0].data[0]["marker"]["symbol"] == ["circle", "x-open", "circle-open"]
    assert "Hollow: saturated" in section.note and "Crossed: the generator was late" in section.note


def test_two_kinds_of_runs_are_two_curves() -> None:
    runs = views(sweep((2, 8), n_requests=30) + sweep((2, 8), n_requests=30, cluster="4 mixed"))
    section = found(curves.build(runs))
    assert [run.name for run in runs] == ["2P2D, 2/s", "2P2D, 8/s", "4 mixed, 2/s", "4 mixed, 8/s"]
    assert [trace["legendgroup"] for trace in section.figures[-1].data] == ["2P2D", "4 mixed"]
    assert section.keys[2].name == "p90", "p99 of 30 requests is one of them"


def test_equal_loads_of_two_kinds_share_a_colour_and_differ_in_their_dashes() -> None:
    runs = views(sweep((2, 8), n_requests=20) + sweep((2, 8), n_requests=20, cluster="4 mixed"))
    assert [run.color for run in runs] == ["$blue", "$orange"] * 2
    assert [run.dash for run in runs] == ["solid", "solid", "dash", "dash"]
    assert len({(run.color, run.dash) for run in views([RICH.result] * 9)}) == 9


def test_runs_under_one_load_make_no_curve() -> None:
    runs = sweep((8,), n_requests=20) + sweep((8,), n_requests=20, cluster="4 mixed")
    assert curves.build(views(runs)) is None
    assert found(cdf.build(views(runs))).figures


def test_an_ab_of_two_clusters_is_named_by_them() -> None:
    runs = views([run(Shape(n_requests=40, cluster=cluster)) for cluster in ("1P1D", "2M")])
    assert [one.name for one in runs] == ["1P1D", "2M"]
    settings = dict(found(facts.build(runs)).facts)["Settings"]
    assert "1P1D" not in settings and "--turns 4" in settings, "only what they share"
    assert "Marks" not in numbers.build(runs).tables[0].head
    text = verdict.build(runs).text
    assert text.startswith("2 runs of Qwen/Qwen3-0.6B, at 8 requests per second")
    assert f"1P1D: {share(runs[0].attainment)} of the requests met TTFT" in text


def test_many_workers_share_the_key_of_their_role() -> None:
    sample = RICH.result.server.samples[0]
    crowd = {f"w{i:02}": replace(sample.workers["decode-0"], role=("prefill", "decode")[i % 2]) for i in range(12)}
    server = replace(RICH.result.server, samples=(replace(sample, workers=crowd),))
    keys = [key.name for key in found(timeline.build(made(record(), server=server))).keys]
    assert {"prefill workers", "decode workers"} <= set(keys) and "w00" not in keys


def test_the_verdict_names_the_last_load_before_the_targets_are_missed() -> None:
    text = verdict.build(views(sweep((2, 6, 14), n_requests=220))).text
    assert f"Up to 6/s at least 90 % of the requests met TTFT ≤ 500{NBSP}ms and TPOT ≤ 50{NBSP}ms" in text
    assert "from 14/s on the server was saturated" in text


def test_a_lucky_run_past_a_missed_load_does_not_count() -> None:
    good, bad = sweep((2, 14), n_requests=220)
    lucky = replace(good, facts=replace(good.facts, request_rate=20.0))
    assert "Up to 2/s at least 90 %" in verdict.build(views([good, bad, lucky])).text


def test_a_warning_of_several_runs_is_given_once() -> None:
    warnings = verdict.build(views(sweep((2, 6), n_requests=20))).warnings
    assert sum("still held after the run" in text for text in warnings) == 1


def test_equal_runs_get_names_of_their_own() -> None:
    assert [view.name for view in views([RICH.result, RICH.result])] == ["8/s (1)", "8/s (2)"]


@pytest.mark.parametrize("seed", range(5))
def test_thinning_keeps_the_ends_and_the_extremes(seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=50_000)
    kept = thin(values, 500)
    assert kept.size <= 500 and list(kept) == sorted(set(kept))
    assert {0, values.size - 1, values.argmin(), values.argmax()} <= set(kept)
    assert list(thin(values[:500], 500)) == list(range(500))


def test_numbers_are_written_for_people() -> None:
    assert [latency(value_s) for value_s in (0.00042, 0.0042, 0.1234, 9.9994, 12.34, None)] == [
        f"0.42{NBSP}ms", f"4.2{NBSP}ms", f"123{NBSP}ms", f"9,999{NBSP}ms", f"12.3{NBSP}s", "–",
    ]  # fmt: skip
    assert [quantity(value) for value in (0, 1234567, 7.361, 73.61)] == ["0", "1,234,567", "7.36", "73.6"]
    assert [share(part) for part in (0.0, 0.0001, 0.05, 0.5, 0.9999, 1.0)] == [
        f"{text}{NBSP}%" for text in ("0", "< 0.1", "5.0", "50", "99.9", "100")
    ]
    assert target_text(0.05) == f"50{NBSP}ms"


def test_runs_that_labels_tell_apart_are_named_by_them() -> None:
    runs = [with_settings(run(Shape(n_requests=40)), label={"system": name}, caching=name) for name in ("a", "b")]
    assert [view.name for view in views(runs)] == ["a", "b"]


def test_long_names_are_cut_and_stay_apart() -> None:
    runs = [with_settings(run(Shape(n_requests=40)), cluster_flags="x" * 90 + name) for name in ("a", "b")]
    names = [view.name for view in views(runs)]
    assert len(set(names)) == 2
    assert max(map(len, names)) < 80


def with_settings(result: Result, **settings: object) -> Result:
    return replace(result, facts=replace(result.facts, settings={**result.facts.settings, **settings}))
