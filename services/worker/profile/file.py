"""The file that `penstock profile` writes and workers start from: measured steps, and of what they are."""

import math
from dataclasses import dataclass
from pathlib import Path

import msgspec

from common.cost.step_cost import StepCost
from common.cost.step_fit import StepFit, StepWork, TimedStep
from common.errors import ConfigError
from common.messages.liveness import ModelIdentity, difference

_FORMAT = "penstock-profile-1"


class ProfilePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One point of the grid, as in StepWork, and each time that it was measured."""

    new_tokens: int
    pairs: float
    rows: int
    kv_tokens: int
    measured_ms: tuple[float, ...]

    @property
    def work(self) -> StepWork:
        """In the terms of the cost model."""
        return StepWork(self.new_tokens, self.pairs, self.rows, self.kv_tokens)


class EngineIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What computed. Costs of another model or kind of device say nothing; those of another size give proportions."""

    model: ModelIdentity
    device: str
    """Type of the torch device: cpu or cuda."""
    processor: str
    """Its name, as far as the system knows one."""
    threads: int


class StepProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file."""

    format: str = _FORMAT
    engine: EngineIdentity
    points: tuple[ProfilePoint, ...]
    cost: StepCost
    """Fitted to the points."""


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """A fit that knows what a profile says."""

    fit: StepFit
    only_proportions: str
    """Why the profile's times are not taken as they are; empty if they are."""


def fit_points(points: tuple[ProfilePoint, ...], chunk_tokens: int, prior: StepCost | None = None) -> StepFit:
    """A fit of everything that was measured."""
    fit = StepFit(chunk_tokens, prior)
    fit.recall(TimedStep(point.work, ms) for point in points for ms in point.measured_ms)
    return fit


def write_profile(path: Path, profile: StepProfile) -> None:
    """Whole or not at all. Raises ConfigError if it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"--out={path}: cannot be written ({error.strerror})") from error


def read_profile(path: str, model: ModelIdentity, device: str) -> StepProfile:
    """The profile, if it is one of this model on this type of device. Raises ConfigError that says what differs."""
    try:
        profile = msgspec.json.decode(Path(path).expanduser().read_bytes(), type=StepProfile)
    except OSError as error:
        raise ConfigError(f"--cost-profile={path}: cannot be read ({error.strerror})") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--cost-profile={path}: is not a file of `penstock profile` ({error})") from error
    if profile.format != _FORMAT:
        raise ConfigError(f"--cost-profile={path}: has format {profile.format!r}; this version reads {_FORMAT!r}")
    theirs = profile.engine
    differing = [difference(model, msgspec.structs.replace(theirs.model, name=model.name))]
    if theirs.device != device.partition(":")[0]:
        differing.append(f"device: {device.partition(':')[0]!r} here, {theirs.device!r} there")
    if text := "; ".join(part for part in differing if part):
        raise ConfigError(f"--cost-profile={path}: was taken of something else ({text}); make one of this worker's own")
    if not any(ms > 0.0 and math.isfinite(ms) for point in profile.points for ms in point.measured_ms):
        raise ConfigError(f"--cost-profile={path}: holds no measured step")
    return profile


def start_from(profile: StepProfile, engine: EngineIdentity, chunk_tokens: int) -> StartingPoint:
    """Measured by an engine just like this one: known. With other threads or another processor: right in proportion."""
    theirs = profile.engine
    rows = [
        f"{name}: {here!r} here, {there!r} there"
        for name, here, there in (
            ("threads", engine.threads, theirs.threads),
            ("processor", engine.processor, theirs.processor),
        )
        if here != there
    ]
    if rows:
        return StartingPoint(StepFit(chunk_tokens, profile.cost), "; ".join(rows))
    return StartingPoint(fit_points(profile.points, chunk_tokens, profile.cost), "")
