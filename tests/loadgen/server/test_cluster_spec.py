import pytest

from common.errors import ConfigError
from loadgen.server.cluster_spec import ClusterSpec, equal_mixed, parse_cluster


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("1P1D", ClusterSpec(prefill=1, decode=1)),
        ("2p3d", ClusterSpec(prefill=2, decode=3)),
        ("4M", ClusterSpec(mixed=4)),
        ("1P1D1M", ClusterSpec(prefill=1, decode=1, mixed=1)),
        ("2D1P", ClusterSpec(prefill=1, decode=2)),
        ("12M", ClusterSpec(mixed=12)),
    ],
)
def test_numbers_and_letters_name_workers(text: str, spec: ClusterSpec) -> None:
    assert parse_cluster(text) == spec
    assert parse_cluster(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be a number before each of P"),
        ("PD", "must be a number before each of P"),
        ("1P1D1X", "must be a number before each of P"),
        ("1P 1D", "must be a number before each of P"),
        ("-1M", "must be a number before each of P"),
        ("0M", "1 or more"),
        ("1P0D", "1 or more"),
        ("1P1D1P", "names P twice"),
        ("2P", "need each other"),
        ("1D2M", "need each other"),
    ],
)
def test_what_names_no_cluster_is_refused_with_what_would(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"--cluster='{text}': .*{words}"):
        parse_cluster(text)


def test_the_baseline_has_as_many_workers_all_mixed() -> None:
    assert equal_mixed(parse_cluster("2P1D1M")) == parse_cluster("4M")
