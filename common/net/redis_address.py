"""Addresses of Redis: what stands in one, and what of it may be shown."""

import re

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from common.errors import ConfigError

SOCKET_TIMEOUT_S = 2.0
_PARAMETER = re.compile(r"(?i)(password|username)=[^&]*")
_RIGHT = (
    "it begins with redis://, rediss:// or unix://, its port and database are numbers, its options are redis-py's, "
    "and in a user or password / ? # @ are written %2F %3F %23 %40"
)
"""Instead of what parsers say of a wrong one: they quote it, and a stray / ? or # makes a password part of what they quote."""


def shown(url: str) -> str:
    """`url` for logs, errors and screens: nothing of what stands before its last @, where a user and a password may be."""
    scheme, colon, rest = url.partition("://")
    if not colon:
        scheme, rest = "", url
    _, at, place = rest.rpartition("@")
    return _PARAMETER.sub(r"\1=***", f"{scheme}{colon}{'***@' if at else ''}{place}")


def has_password(url: str) -> bool:
    """Whether it must not stand where others can read it, as in a command line."""
    return shown(url) != url


def connect_redis(url: str, *, retries: bool = True) -> "redis.Redis":
    """A client; does not need Redis to answer. `retries` False: whoever calls does that. Raises ConfigError for a bad `url`."""
    if _is_misread(url):
        raise ConfigError(f"redis={shown(url)!r} is no address such as redis://127.0.0.1:6379/0: {_RIGHT}")
    options = {} if retries else {"retry": Retry(NoBackoff(), 0)}
    try:
        client = redis.Redis.from_url(
            url, socket_timeout=SOCKET_TIMEOUT_S, socket_connect_timeout=SOCKET_TIMEOUT_S, **options
        )
        pool = client.connection_pool
        pool.connection_class(
            **pool.connection_kwargs
        )  # unconnected: an option that is none would be found at first use
        return client
    except (ValueError, TypeError, OSError):  # no scheme or number, no such option, no such certificate
        raise ConfigError(f"redis={shown(url)!r} is no address such as redis://127.0.0.1:6379/0: {_RIGHT}") from None


def _is_misread(url: str) -> bool:
    """A password that was not quoted: parsers would take its beginning for the host, and tell it when that does not answer."""
    scheme, _, rest = url.partition("://")
    host = re.split("[/?#]", rest, maxsplit=1)[0]
    return scheme != "unix" and "@" in rest and "@" not in host
