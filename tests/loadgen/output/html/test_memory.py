"""The picture of memory: every process and tier has a plot, and its areas add up to what there is."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loadgen.output.html.run_view import RunView, views
from loadgen.output.html.section import Section
from loadgen.output.html.sections import memory
from loadgen.output.html.thin import LIMIT
from loadgen.results.timeline import ServerSample
from tests.loadgen.synthetic import Shape, run

PLAIN = run(Shape(n_requests=40))


def told(*samples: dict[str, dict[str, dict[str, int]]]) -> RunView:
    """A run whose server said this of its memory, once a second."""
    made = tuple(
        ServerSample(at_s=float(at_s), waiting=0, running=0, kv_used=None, memory=one)
        for at_s, one in enumerate(samples)
    )
    return views([replace(PLAIN, server=replace(PLAIN.server, samples=made))])[0]


def built(view: RunView) -> Section:
    section = memory.build(view)
    assert section is not None
    return section


def areas(section: Section, figure: int = 0) -> dict[str, Any]:
    return {trace["name"]: trace["y"] for trace in section.figures[figure].data}


@pytest.mark.parametrize("n_workers", [1, 8])
def test_every_process_and_tier_has_a_plot_of_its_own(n_workers: int) -> None:
    tiers = {"device": {"weights": 2**20}, "host": {"parked": 2**20}}
    section = built(told({f"w-{number}": tiers for number in range(n_workers)}))
    titles = [f"w-{number}, {tier}" for number in range(n_workers) for tier in ("device", "host")]
    assert [figure.title for figure in section.figures] == titles
    assert len({figure.name for figure in section.figures}) == len(titles)
    assert [key.name for key in section.keys] == ["weights", "KV of parked requests"], "keys are shared"


def test_stacked_areas_add_up_to_all_memory_at_every_moment() -> None:
    view = views([PLAIN])[0]
    section = built(view)
    for figure in section.figures:
        worker, tier = figure.title.split(", ")
        unit = 2**30 if figure.layout["yaxis"]["title"]["text"] == "GiB" else 2**20
        total = np.sum([trace["y"] for trace in figure.data], axis=0)
        sums = [sum(sample.memory[worker][tier].values()) / unit for sample in PLAIN.server.samples]
        assert total == pytest.approx(sums, abs=1e-3)
        assert {trace["stackgroup"] for trace in figure.data} == {"memory"}


def test_owners_stand_on_each_other_in_one_order_and_strangers_on_top() -> None:
    section = built(
        told({"w": {"device": {"new_owner": 5, "kv_free": 1, "kv_requests": 2, "weights": 3, "released": 0}}})
    )
    assert list(areas(section)) == ["weights", "KV of requests", "free", "new owner"], "nobody without memory"


def test_a_worker_that_is_gone_has_no_memory() -> None:
    one = {"device": {"weights": 2**20}}
    section = built(told({"a": one, "b": one}, {"a": one}, {"a": one, "b": one}))
    assert areas(section, 1) == {"weights": [1.0, 0.0, 1.0]}


def test_areas_of_a_long_run_keep_the_same_moments() -> None:
    rows = [{"w": {"device": {"kv_requests": at % 97 * 2**20, "kv_free": 2**30}}} for at in range(3 * LIMIT)]
    first, second = built(told(*rows)).figures[0].data
    assert first["x"] == second["x"] and len(first["x"]) == len(second["y"]) <= LIMIT
    assert max(first["y"]) == pytest.approx(96 / 1024, abs=1e-3), "peaks stay"


def test_a_server_that_tells_nothing_of_memory_has_no_such_section() -> None:
    assert memory.build(told({})) is None
