"""The request boundary, where no server is needed to see it."""

import asyncio
from typing import Any

import pytest

from gateway import border
from gateway.errors import BodyTooSlow, Unauthorized, error_response


class SlowRequest:
    """Announces a body and never sends the rest."""

    headers: dict[str, str] = {"content-length": "10"}

    async def stream(self) -> Any:
        yield b"half"
        await asyncio.Event().wait()


def test_a_body_that_never_ends_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(border, "BODY_TIMEOUT_S", 0.01)
    with pytest.raises(BodyTooSlow, match=r"0\.01 s"):
        asyncio.run(border.read_body(SlowRequest(), 1000))  # type: ignore[arg-type]


def test_a_missing_key_is_answered_with_how_to_give_one() -> None:
    answer = error_response(Unauthorized("no key"))
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
