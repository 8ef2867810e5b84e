"""The tree of errors is complete, and its codes are stable API."""

import re
from collections.abc import Iterator

from common import errors
from common.errors import Busy, ContextTooLong, PeerFailed, Rejected, ServingError


def tree(root: type[ServingError] = ServingError) -> Iterator[type[ServingError]]:
    yield root
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield from tree(kind)


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [kind.code for kind in tree()]
    assert len(set(codes)) == len(codes)


def test_the_drawing_shows_every_error() -> None:
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or "")) | {"ServingError"}
    assert drawn == {kind.__name__ for kind in tree()}


def test_only_what_may_succeed_elsewhere_or_later_is_retryable() -> None:
    for kind in tree():
        assert kind.retryable == issubclass(kind, Busy | PeerFailed), kind.__name__
        if issubclass(kind, Rejected):
            assert 400 <= kind.http_status < 500


def test_a_context_that_is_too_short_says_by_how_much() -> None:
    text = str(ContextTooLong(prompt_tokens=90, output_tokens=20, limit_tokens=100))
    assert all(number in text for number in ("90", "20", "100"))
