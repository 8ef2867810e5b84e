"""Who may use the gateway: keys, compared in constant time and never logged, and what each may use.

The file of `--api-keys` is JSON:

    {"keys": [{"key": "sk-...", "name": "team-a", "max_inflight": 32, "requests_per_minute": 600,
               "tokens_per_minute": 200000, "priority": 0}]}

Every limit may be left out. `--api-key` is one key more, without limits, named `default`.
"""

import hmac
from collections.abc import Mapping
from pathlib import Path

import msgspec

from common.errors import ConfigError
from common.header_key import key_bytes
from gateway.core.keys import KeyTerms

DEFAULT = "default"


class _Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    key: str
    name: str
    max_inflight: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    priority: int = 0


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    keys: list[_Key]


class ApiKeys:
    """Resolves what a client sends to the name of its key."""

    def __init__(
        self, keys: Mapping[str, bytes], terms: Mapping[str, KeyTerms], admin: bytes | None, *, open_admin: bool = False
    ) -> None:
        """`keys`: by name. `admin`: what operators send; None: nobody may give orders, or everybody if `open_admin`."""
        self._keys, self.terms = dict(keys), dict(terms)
        self._admin, self._open_admin = admin, open_admin and not keys

    @property
    def needed(self) -> bool:
        """Whether clients must send one."""
        return bool(self._keys)

    @property
    def open_to_operators(self) -> bool:
        """Whether everybody may give orders."""
        return self._admin is None and self._open_admin

    def name_of(self, given: bytes) -> str | None:
        """The name of the key; None if it is none. Takes as long for every key of its length."""
        found: str | None = None
        for name, key in self._keys.items():
            if hmac.compare_digest(given, key):
                found = name
        return found

    def is_admin(self, given: bytes) -> bool:
        """Whether it may give orders to workers."""
        if self._admin is None:
            return self._open_admin
        return hmac.compare_digest(given, self._admin)


def read_api_keys(api_key: str | None, file: str | None, admin_key: str | None, *, open_admin: bool = False) -> ApiKeys:
    """From the settings. Raises ConfigError that names what is wrong with the file, never a key."""
    keys: dict[str, bytes] = {} if api_key is None else {DEFAULT: key_bytes("--api-key", api_key)}
    terms: dict[str, KeyTerms] = {}
    for one in _read(file) if file is not None else ():
        key = _bytes_of(file, one)
        if one.name in keys or not one.name or key in keys.values():
            raise ConfigError(f"--api-keys={file}: names and keys must not be empty and must differ; see {one.name!r}")
        limits = (one.max_inflight, one.requests_per_minute, one.tokens_per_minute)
        if any(limit is not None and limit < 1 for limit in limits):
            raise ConfigError(f"--api-keys={file}: limits must be 1 or more; see {one.name!r}")
        keys[one.name] = key
        terms[one.name] = KeyTerms(
            name=one.name,
            max_inflight=one.max_inflight,
            requests_per_minute=one.requests_per_minute,
            tokens_per_minute=one.tokens_per_minute,
            priority=one.priority,
        )
    admin = admin_key or api_key
    return ApiKeys(keys, terms, None if admin is None else key_bytes("--admin-key", admin), open_admin=open_admin)


def _bytes_of(file: str | None, one: _Key) -> bytes:
    try:
        return key_bytes(f"--api-keys={file}: the key of {one.name!r}", one.key)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _read(file: str) -> list[_Key]:
    try:
        keys = msgspec.json.decode(Path(file).read_bytes(), type=_File).keys
    except OSError as error:
        raise ConfigError(f"--api-keys={file}: cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"--api-keys={file}: {error}; see gateway/api_keys.py for an example") from error
    if not keys:
        raise ConfigError(f"--api-keys={file}: holds no key; leave the setting out to ask for none")
    return keys
