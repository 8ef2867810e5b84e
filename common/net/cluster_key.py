"""The cluster's secret: who has its file is heard by the cluster's processes, and what they say travels encrypted.

From the secret follows one CURVE key pair (RFC 26/CurveZMQ: Curve25519, XSalsa20, Poly1305; fresh session keys for every
connection) that all processes share. A process proves with it that it belongs to the cluster, not which of its members it is.
"""

import hashlib
import os
import secrets
import stat
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from common.errors import ConfigError

LEAST_SECRET_BYTES = 32
_MOST_SECRET_BYTES = 4096
_LEAST_DISTINCT = 12  # bytes of 64 random hexadecimal digits, all but surely; zeros and words repeated have fewer
_PURPOSE = b"penstock curve 1"
_CONTAINER_SECRETS = "/run/secrets/"


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """The key pair, each half as 40 characters of Z85."""

    public: bytes
    secret: bytes = field(repr=False)


def read_cluster_key(path: str | None) -> ClusterKey | None:
    """The key of `--cluster-key`; None if it is not set. Raises ConfigError that says what is wrong, never what is inside."""
    return None if path is None else _derived(_read(path), path)


def make_cluster_key(path: str) -> None:
    """Write a new secret, readable by its owner alone. Raises ConfigError; a file that is there is never replaced."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path} is there already; a key that is in use must not be replaced by accident") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from error
    with os.fdopen(fd, "w") as file:
        os.fchmod(fd, 0o600)  # whatever the umask says
        file.write(secrets.token_hex(LEAST_SECRET_BYTES) + "\n")


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe in its place must not stop the start
    except (OSError, ValueError) as error:
        raise ConfigError(f"--cluster-key={path}: cannot be read: {error}") from error
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            raise ConfigError(f"--cluster-key={path}: is no plain file; `penstock key make FILE` writes one")
        # Container engines mount secrets there, mostly with mode 0444; who else is in the container is of the cluster.
        mounted = os.readlink(f"/proc/self/fd/{fd}").startswith(_CONTAINER_SECRETS)
        if state.st_mode & (0o022 if mounted else 0o077):
            mode = stat.S_IMODE(state.st_mode)
            raise ConfigError(f"--cluster-key={path}: others may read or write it (mode {mode:04o}); chmod 600 {path}")
        return os.read(fd, _MOST_SECRET_BYTES + 3)
    finally:
        os.close(fd)


def _derived(read: bytes, path: str) -> ClusterKey:
    secret = read.rstrip(b"\r\n")  # editors and copies add a line's end
    if not LEAST_SECRET_BYTES <= len(secret) <= _MOST_SECRET_BYTES:
        raise ConfigError(
            f"--cluster-key={path}: a secret has {LEAST_SECRET_BYTES} to {_MOST_SECRET_BYTES} bytes, and this has "
            f"{'more' if len(secret) > _MOST_SECRET_BYTES else len(secret)}; `penstock key make FILE` writes one"
        )
    if len(set(secret)) < _LEAST_DISTINCT:
        raise ConfigError(
            f"--cluster-key={path}: its bytes are not random; `penstock key make FILE` writes such a file"
        )
    own = z85.encode(hashlib.blake2b(secret, digest_size=32, person=_PURPOSE).digest())
    return ClusterKey(public=zmq.curve_public(own), secret=own)
