"""What must be known, fetched or saved before a prompt may take its pages. Pure; owns nothing."""

from services.worker.core.actions import Action
from services.worker.core.parts import Parts
from services.worker.core.waiting import WaitingPrompt


class Preparation:
    """Asked again at every event until the prompt has started."""

    def __init__(self, parts: Parts) -> None:
        self._cache, self._pool, self._scheduler = parts.cache, parts.pool, parts.scheduler
        self._shared = parts.shared

    def holds(self, prompt: WaitingPrompt) -> bool:
        """Whether a sibling is computing what the prompt lacks: then nothing is to be done for it, and others may pass."""
        return self._shared.holds(prompt)

    def advance(self, prompt: WaitingPrompt, now_ms: float) -> tuple[bool, list[Action]]:
        """Whether nothing is missing but room; begins what is: lookups elsewhere, saving what must go."""
        request, names = prompt.message.request, prompt.names
        if prompt.looked_up:
            actions = self._cache.refresh(prompt, now_ms)
        else:
            prompt.looked_up = True
            actions = self._cache.look_up(prompt, now_ms)
        if not self._cache.ready(request, names):
            return False, actions
        room, saving = self._cache.make_room(names, len(prompt.tokens), now_ms)
        return room, actions + saving

    def has_room(self, prompt: WaitingPrompt) -> bool:
        """Whether the prompt would start at once."""
        hits, pinned = self._pool.match(prompt.names), self._pool.pinned_run(prompt.names)
        loads = self._cache.take(prompt.message.request) is not None
        return self._scheduler.has_room(
            len(prompt.tokens), pinned_blocks=pinned, unpinned_blocks=hits - pinned, loads=loads
        )

    def has_room_for_all(self, prompt: WaitingPrompt) -> bool:
        """The same, with all of its layers."""
        pinned = self._pool.pinned_run(prompt.names)
        return self._scheduler.has_room_for_all(len(prompt.tokens), pinned_blocks=pinned)
