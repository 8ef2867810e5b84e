from dataclasses import replace

import pytest

from common.settings import load
from loadgen.commands.paper import EXPERIMENTS, parse
from loadgen.flags.run import parse as parse_run
from loadgen.output.paper_table import paper_table
from loadgen.output.result_json import to_json
from loadgen.papers.experiment import Experiment
from loadgen.papers.memserve import MEMSERVE
from loadgen.results.result import Result
from loadgen.server.cluster_spec import parse_cluster
from services.launcher.settings import UpSettings
from tests.loadgen.synthetic import Shape, run


def timed(factor: float, seed: int = 1) -> Result:
    made = run(Shape(n_requests=40, seed=seed))
    summary = made.summary
    assert summary.e2e is not None
    return replace(made, summary=replace(summary, e2e=replace(summary.e2e, mean_s=factor)))


@pytest.mark.long
@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_every_claim_names_workloads_systems_and_numbers_of_the_experiment(experiment: Experiment) -> None:
    systems, workloads = {one.name for one in experiment.systems}, {one.name for one in experiment.workloads}
    assert experiment.capacity_of in systems
    for claim in experiment.claims:
        assert {claim.base, claim.other} <= systems
        assert claim.workload in workloads
        assert set(claim.changes) <= set(experiment.shown) <= set(to_json(run(Shape(n_requests=40))))


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_all_systems_have_the_same_number_of_workers_and_flags_that_start(experiment: Experiment) -> None:
    assert len({parse_cluster(system.cluster).workers for system in experiment.systems}) == 1
    for system in experiment.systems:
        load(UpSettings, system.flags, {})


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_flags_of_every_workload_are_understood(experiment: Experiment) -> None:
    for workload in experiment.workloads:
        closed = parse_run([*workload.flags, *experiment.flags, "--concurrency", "1", "--num-requests", "9"], {})
        assert closed.load.n_requests == 9


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
