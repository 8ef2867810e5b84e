"""From settings to a measured, fitted and written profile."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from common.cost.step_cost import StepCost
from common.errors import ConfigError
from kvstore.memory.page_memory import open_page_memory
from services.worker.engine.make import EngineLimits
from services.worker.engine.torch_options import configure_torch
from services.worker.engine.workspace import page_bytes_of
from services.worker.model.load import LoadedModel, load_model, require_device
from services.worker.profile.file import EngineIdentity, ProfilePoint, StepProfile, fit_points, write_profile
from services.worker.profile.grid import GridLimits, GridPoint, choose_grid
from services.worker.profile.measure import StepTimer, measure, processor_name
from services.worker.profile.settings import ProfileSettings

_ROUNDS, _QUICK_ROUNDS = 5, 3


def run_profile(settings: ProfileSettings, out: Path | None, table: TextIO, progress: TextIO) -> StepProfile:
    """Measure, fit, print, and write if there is an `out`. Raises ConfigError."""
    threads = configure_torch(settings.threads)
    model = load_model(settings.model, settings.dtype, settings.device)
    device = require_device(settings.device)
    page_bytes = page_bytes_of(settings.device_memory, device, model, _limits(settings, model))
    memory = open_page_memory(page_bytes, model.layout, device)
    try:
        points = _grid(settings, model, memory.pages.n_pages)
        measured = _measure(settings, StepTimer(model, memory.pages.tensor, _limits(settings, model)), points, progress)
    finally:
        memory.close()
    cost = fit_points(measured, settings.step_tokens_limit).cost
    assert cost is not None, "a measured grid has a fit"
    engine = EngineIdentity(
        model=model.identity, device=model.device.type, processor=processor_name(model.device), threads=threads
    )
    profile = StepProfile(engine=engine, points=measured, cost=cost)
    table.writelines(f"{line}\n" for line in profile_lines(profile))
    if out is not None:
        write_profile(out, profile)
        table.write(f"\nwritten to {out}; start workers with --cost-profile {out}\n")
    return profile


def _limits(settings: ProfileSettings, model: LoadedModel) -> EngineLimits:
    return EngineLimits(
        max_running=settings.running_limit,
        max_step_tokens=settings.step_tokens_limit,
        context_tokens=model.identity.context_tokens,
    )


def _grid(settings: ProfileSettings, model: LoadedModel, n_pages: int) -> list[GridPoint]:
    layout = model.layout
    limits = GridLimits(
        context_tokens=model.identity.context_tokens,
        pool_tokens=n_pages // layout.layers * layout.block_tokens,
        max_step_tokens=settings.step_tokens_limit,
        max_running=settings.running_limit,
    )
    points = choose_grid(limits, layout.block_tokens, quick=settings.quick)
    if not points:
        raise ConfigError(
            f"--device-memory={settings.device_memory}: holds {limits.pool_tokens} tokens of KV, "
            "too few to measure anything"
        )
    return points


def _measure(
    settings: ProfileSettings, timer: StepTimer, points: list[GridPoint], progress: TextIO
) -> tuple[ProfilePoint, ...]:
    rounds = _QUICK_ROUNDS if settings.quick else _ROUNDS

    def tell(number: int) -> None:
        what = f"round {number} of {rounds}" if number else "warming up"
        progress.write(f"{len(points)} kinds of steps: {what}\n")
        progress.flush()

    return measure(timer, points, rounds, tell)


def profile_lines(profile: StepProfile) -> Iterator[str]:
    """For people: each point measured and predicted, then the fitted numbers."""
    engine, cost = profile.engine, profile.cost
    yield f"{engine.model.name} in {engine.model.dtype} on {engine.processor}, {engine.threads} threads"
    yield ""
    yield f"{'STEP':<34}{'MEASURED ms':>12}{'PREDICTED ms':>14}{'ERROR':>8}"
    errors = []
    for point in profile.points:
        real_ms, predicted_ms = statistics.median(point.measured_ms), point.work.predict_ms(cost)
        errors.append(abs(predicted_ms / real_ms - 1.0))
        yield f"{_named(point):<34}{real_ms:>12.3f}{predicted_ms:>14.3f}{predicted_ms / real_ms - 1.0:>+8.0%}"
    yield ""
    yield f"median error {statistics.median(errors):.0%}, largest {max(errors):.0%}"
    yield _numbers_text(cost)


def _named(point: ProfilePoint) -> str:
    if point.rows:
        return f"decode {point.rows} x {point.kv_tokens // point.rows} tokens"
    cached = round((point.pairs - point.new_tokens * (point.new_tokens + 1) / 2) / point.new_tokens)
    return f"prefill {point.new_tokens} behind {cached}"


def _numbers_text(cost: StepCost) -> str:
    return (
        f"a step: {cost.base_ms:.3g} ms + {cost.token_ms:.3g} per prompt token + {cost.pair_ms:.3g} per attention pair "
        f"+ {cost.row_ms:.3g} per decoding sequence + {cost.kv_ms:.3g} per token of KV it reads"
    )
