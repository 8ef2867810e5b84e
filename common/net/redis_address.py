"""Addresses of Redis: what stands in one, and what of it may be shown."""

import re

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from common.errors import ConfigError

SOCKET_TIMEOUT_S = 2.0
_SECRETS = re.compile(r"(?<=://)[^/?#]*(?=@)")
_PARAMETER = re.compile(r"(?i)(password|username)=[^&#]*")


def shown(url: str) -> str:
    """`url` for logs, errors and screens: without user and password."""
    return _PARAMETER.sub(r"\1=***", _SECRETS.sub("***", url))


def has_password(url: str) -> bool:
    """Whether it must not stand where others can read it, as in a command line."""
    return shown(url) != url


def connect_redis(url: str, *, retries: bool = True) -> "redis.Redis":
    """A client; does not need Redis to answer. `retries` False: whoever calls does that. Raises ConfigError for a bad `url`."""
    options = {} if retries else {"retry": Retry(NoBackoff(), 0)}
    try:
        return redis.Redis.from_url(
            url, socket_timeout=SOCKET_TIMEOUT_S, socket_connect_timeout=SOCKET_TIMEOUT_S, **options
        )
    except (ValueError, TypeError, OSError) as error:  # no scheme or number, no such option, no such certificate
        text = str(error).replace(url, shown(url))
        raise ConfigError(f"redis={shown(url)!r} is no address such as redis://127.0.0.1:6379/0: {text}") from None
