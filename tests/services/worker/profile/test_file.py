"""The file of a profile: what it keeps, and when a worker refuses it or takes only its proportions."""

import math
from pathlib import Path

import msgspec
import pytest

from common.cost.step_cost import StepCost
from common.errors import ConfigError
from common.messages.liveness import ModelIdentity
from services.worker.profile.file import (
    EngineIdentity,
    ProfilePoint,
    StepProfile,
    fit_points,
    read_profile,
    start_from,
    write_profile,
)
from services.worker.profile.grid import GridLimits, choose_grid

TRUE = StepCost(2.0, 0.05, 2e-5, 0.3, 4e-4, chunk_tokens=512)
MODEL = ModelIdentity(
    name="m",
    fingerprint="f",
    architecture="a",
    dtype="float32",
    layers=2,
    kv_heads=1,
    head_dim=8,
    block_tokens=4,
    vocab_tokens=1000,
    context_tokens=1000,
)
ENGINE = EngineIdentity(model=MODEL, device="cpu", processor="P", threads=2)
LIMITS = GridLimits(context_tokens=4096, pool_tokens=70_000, max_step_tokens=512, max_running=64)


def measured() -> tuple[ProfilePoint, ...]:
    """A grid on an engine of known cost; the first round of every point was disturbed."""
    return tuple(
        ProfilePoint(
            new_tokens=work.new_tokens,
            pairs=work.pairs,
            rows=work.rows,
            kv_tokens=work.kv_tokens,
            measured_ms=tuple(work.predict_ms(TRUE) * factor for factor in (5.0, 1.0, 1.0, 1.0)),
        )
        for work in (point.work for point in choose_grid(LIMITS, 16, quick=False))
    )


@pytest.fixture
def profile() -> StepProfile:
    points = measured()
    cost = fit_points(points, 512).cost
    assert cost is not None
    return StepProfile(engine=ENGINE, points=points, cost=cost)


def same(cost: StepCost | None, scale: float = 1.0) -> bool:
    assert cost is not None
    ratios = (cost.exec_ms(900, 100) / TRUE.exec_ms(900, 100), cost.step_ms(16, 8000) / TRUE.step_ms(16, 8000))
    return all(math.isclose(ratio, scale, rel_tol=0.05) for ratio in ratios)


def test_a_grid_gives_back_the_cost_that_it_was_measured_on(profile: StepProfile) -> None:
    assert same(profile.cost) and profile.cost.n_samples == 4 * len(profile.points)


def test_a_file_reads_back_as_it_was_written(profile: StepProfile, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_profile(path, profile)
    assert read_profile(str(path), MODEL, "cpu") == profile
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]


def test_the_name_that_clients_use_does_not_matter(profile: StepProfile, tmp_path: Path) -> None:
    write_profile(tmp_path / "p.json", profile)
    assert read_profile(str(tmp_path / "p.json"), msgspec.structs.replace(MODEL, name="other"), "cpu") == profile


@pytest.mark.parametrize(
    ("changed", "device", "said"),
    [
        ({"fingerprint": "g"}, "cpu", "fingerprint: 'g' here, 'f' there"),
        ({"dtype": "bfloat16"}, "cpu", "dtype: 'bfloat16' here, 'float32' there"),
        ({}, "cuda:1", "device: 'cuda' here, 'cpu' there"),
    ],
)
def test_a_profile_of_something_else_is_refused_with_what_differs(
    changed: dict[str, str], device: str, said: str, profile: StepProfile, tmp_path: Path
) -> None:
    write_profile(tmp_path / "p.json", profile)
    with pytest.raises(ConfigError, match=said) as caught:
        read_profile(str(tmp_path / "p.json"), msgspec.structs.replace(MODEL, **changed), device)
    assert str(caught.value).startswith("--cost-profile=")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1", b'{"format": "x"}', b"\xff\xfe"])
def test_what_is_no_profile_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="--cost-profile="):
        read_profile(str(path), MODEL, "cpu")


def test_a_missing_file_an_older_format_and_an_empty_grid_are_refused(profile: StepProfile, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profile(str(path), MODEL, "cpu")
    write_profile(path, msgspec.structs.replace(profile, format="penstock-profile-0"))
    with pytest.raises(ConfigError, match="penstock-profile-0"):
        read_profile(str(path), MODEL, "cpu")
    write_profile(path, msgspec.structs.replace(profile, points=()))
    with pytest.raises(ConfigError, match="no measured step"):
        read_profile(str(path), MODEL, "cpu")


def test_an_engine_like_the_profiled_one_starts_from_its_times(profile: StepProfile) -> None:
    start = start_from(profile, ENGINE, 512)
    assert start.only_proportions == "" and same(start.fit.cost)
    assert start.fit.cost is not None and start.fit.cost.n_samples == 4 * len(profile.points)


def test_the_chunks_are_those_of_the_worker_that_starts(profile: StepProfile) -> None:
    for engine in (ENGINE, msgspec.structs.replace(ENGINE, threads=1)):
        cost = start_from(profile, engine, 256).fit.cost
        assert cost is not None and cost.chunk_tokens == 256


@pytest.mark.parametrize("changed", [{"threads": 1}, {"processor": "Q"}])
def test_with_other_threads_or_another_processor_the_first_own_steps_set_the_level(
    changed: dict[str, object], profile: StepProfile
) -> None:
    start = start_from(profile, msgspec.structs.replace(ENGINE, **changed), 512)
    assert next(iter(changed)) in start.only_proportions
    assert start.fit.cost is not None and start.fit.cost.n_samples == 0 and same(start.fit.cost)
    for point in profile.points[:3]:
        start.fit.learn(point.work, 3.0 * point.work.predict_ms(TRUE))
    assert same(start.fit.cost, 3.0)


def test_a_folder_that_cannot_be_written_to_is_a_setting_to_change(profile: StepProfile, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--out="):
        write_profile(tmp_path / "nowhere" / "p.json", profile)
