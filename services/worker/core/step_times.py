"""When the step that the engine computes began. Pure."""

from services.worker.core.plan import StepPlan


class StepTimes:
    """Owns one reading: of the oldest step in flight. One planned ahead begins when the one before it ends."""

    def __init__(self) -> None:
        self._number, self._began_ms = 0, 0.0

    def note(self, oldest: StepPlan | None, now_ms: float) -> None:
        """What the oldest step in flight is now: after each plan, and after each end."""
        if oldest is not None and oldest.number != self._number:
            self._number, self._began_ms = oldest.number, now_ms

    def began_ms(self, oldest: StepPlan | None, now_ms: float) -> float:
        """When it began; `now_ms` of one that was never noted."""
        return self._began_ms if oldest is not None and oldest.number == self._number else now_ms
