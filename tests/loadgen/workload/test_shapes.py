import math
from statistics import NormalDist

import pytest

from loadgen.traces.facts import facts_of
from loadgen.traces.make import made_trace
from loadgen.workload.content import ContentSource
from loadgen.workload.datasets import DATASETS, Origin, complete
from loadgen.workload.lengths import P90_DEVIATIONS, LengthLaw, LogNormal
from loadgen.workload.shapes import SHAPES


def clipped_mean_tokens(law: LengthLaw | None) -> float:
    """Mean of a log-normal law whose upper tail becomes its most."""
    assert isinstance(law, LogNormal)
    assert law.most_tokens is not None
    deviation = math.log(law.p90_tokens / law.p50_tokens) / P90_DEVIATIONS
    normal, z = NormalDist(), math.log(law.most_tokens / law.p50_tokens) / deviation
    below = law.p50_tokens * math.exp(deviation**2 / 2) * normal.cdf(z - deviation)
    return below + law.most_tokens * (1 - normal.cdf(z))


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_a_dataset_with_options_that_it_takes(name: str) -> None:
    shape = SHAPES[name]
    assert name not in DATASETS
    assert complete(shape.dataset, shape.parsed()).given().items() >= shape.parsed().given().items()


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.mean_isl_tokens is not None])
def test_a_shape_fitted_to_a_mean_has_that_mean(name: str) -> None:
    options = SHAPES[name].parsed()
    assert clipped_mean_tokens(options.isl) == pytest.approx(SHAPES[name].mean_isl_tokens, rel=0.01)
    assert clipped_mean_tokens(options.osl) == pytest.approx(SHAPES[name].mean_osl_tokens, rel=0.01)


@pytest.mark.long
def test_mooncakes_synthetic_shape_hits_as_often_as_the_trace() -> None:
    """With one token for each of its blocks, and as many requests as it has."""
    shape = SHAPES["mooncake-synthetic"]
    source = ContentSource(last_token_id=30_000)
    origin = Origin(seed=1, source=source, scale_isl=0.002, scale_osl=0.01)
    workload = DATASETS[shape.dataset].build(complete(shape.dataset, shape.parsed()), origin)
    assert facts_of(made_trace(workload, 3993, 3.9, 1, 1)).ideal_hit_share == pytest.approx(0.64, abs=0.03)
