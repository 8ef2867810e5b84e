from dataclasses import replace

import pytest

from loadgen.commands.paper import parse
from loadgen.flags.run import parse as parse_run
from loadgen.output.paper_table import paper_table
from loadgen.papers.memserve import MEMSERVE
from loadgen.results.result import Result
from loadgen.server.cluster_spec import parse_cluster
from tests.loadgen.synthetic import Shape, run


def timed(factor: float, seed: int = 1) -> Result:
    made = run(Shape(n_requests=40, seed=seed))
    summary = made.summary
    assert summary.e2e is not None
    return replace(made, summary=replace(summary, e2e=replace(summary.e2e, mean_s=factor)))


def test_every_claim_names_workloads_and_systems_of_the_experiment() -> None:
    systems, workloads = {one.name for one in MEMSERVE.systems}, {one.name for one in MEMSERVE.workloads}
    assert MEMSERVE.capacity_of in systems
    for claim in MEMSERVE.claims:
        assert {claim.base, claim.other} <= systems
        assert claim.workload in workloads


def test_all_systems_have_the_same_number_of_workers() -> None:
    assert {parse_cluster(system.cluster).workers for system in MEMSERVE.systems} == {2}


@pytest.mark.parametrize("workload", MEMSERVE.workloads, ids=lambda workload: workload.name)
def test_flags_of_every_workload_are_understood(workload) -> None:
    closed = parse_run([*workload.flags, "--concurrency", "1", "--think-time", "0"], {})
    assert closed.workload.shape == workload.flags[1]


def test_ratios_stand_beside_the_papers_and_spread_over_rounds_is_shown() -> None:
    cells = {
        ("sharegpt", "mixed"): [timed(2.0), timed(4.0)],
        ("sharegpt", "separated"): [timed(1.0), timed(3.0)],
    }
    table = paper_table(MEMSERVE, cells)
    assert "**0.62 [0.50, 0.75]** (0.70)" in table
    assert "| sharegpt | separated | separated+caching |" not in table  # was not run


def test_parts_of_the_experiment_can_be_chosen() -> None:
    chosen = parse(["memserve", "--out", "x", "--workloads", "react", "--systems", "mixed,separated"])
    assert [workload.name for workload in chosen.workloads] == ["react"]
    assert [system.name for system in chosen.systems] == ["mixed", "separated"]
