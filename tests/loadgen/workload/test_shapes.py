import math
from statistics import NormalDist

import pytest

from loadgen.workload.datasets import DATASETS, complete
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
