"""No key is ever told: not by a log, an answer, a metric, a command, a command line, nor by an error about the key itself."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.log import Log
from common.net.cluster_key import make_cluster_key, read_cluster_key
from common.settings import load
from gateway.api_keys import read_api_keys
from gateway.settings import GatewaySettings
from services.launcher import doctor, status
from services.launcher.commands import settings_classes
from services.launcher.plan import Site, plan_processes
from services.launcher.redis_checks import RedisFound
from services.launcher.settings import DoctorSettings, StatusSettings, UpSettings
from tests.gateway.cluster import Cluster, cluster
from tests.gateway.model import NAME
from tests.hostile.test_http import read_all

OWN, ADMIN, FILED = "own-0-clé-à", "boss-0-日本", "filed-0-ключ"
WRONG = ("wrong-0-key", "wrong-0-\u00ff", "wrong-0-日本", "wrong-0-" + "x" * 5000, OWN + "\0", "\0" + OWN, OWN.upper())
MARKS = ("own-0-", "boss-0-", "filed-0-", "wrong-0-", "OWN-0-")


@pytest.fixture(scope="module")
def keyed(redis_url: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys.json").write_text(json.dumps({"keys": [{"key": FILED, "name": "team"}]}))
    with cluster(redis_url, model, api_key=OWN, admin_key=ADMIN, api_keys=str(folder / "keys.json")) as one:
        yield one


def ask(up: Cluster, line: str, key: bytes, body: bytes = b"") -> tuple[int, bytes]:
    """Status and everything that comes back. Raw, since no decent client sends such headers."""
    host, _, port = up.url.removeprefix("http://").partition(":")
    head = b"%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10.0) as sock:
        sock.sendall(head % (line.encode(), key, len(body)) + body)
        answer = read_all(sock)
    return int(answer.split(b" ", 2)[1]), answer


def require_silent(text: str | bytes, where: str) -> None:
    told = text.decode(errors="surrogateescape") if isinstance(text, bytes) else text
    for mark in MARKS:
        assert mark not in told, f"{where} tells a key: {told[:500]}"


BODY = json.dumps({"model": NAME, "prompt": "ab", "max_tokens": 1}).encode()
LINES = (
    *(
        "GET /v1/models",
        "POST /v1/completions",
        "POST /v1/nothing",
        "GET /status",
        "GET /status/memory",
        "GET /metrics",
    ),
    *("GET /health", "GET /ready", "GET /openapi.json", "POST /admin/workers/decode-0/drain", "PUT /v1/models"),
)


def test_no_key_is_told_by_anything(keyed: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    keyed.answer((97,))
    for given in (OWN, ADMIN, FILED, *WRONG):
        for line in LINES:
            if given == ADMIN and "drain" in line:
                continue  # it would be obeyed
            _, answer = ask(keyed, line, given.encode(), BODY if line.startswith("POST") else b"")
            require_silent(answer, line)
    keyed.loop.call_soon_threadsafe(keyed.gateway.switchboard.write_state)
    for key in (OWN, "wrong-0-é", "wrong-0-\0", "wrong-0-\n"):
        try:
            status.main(["--url", keyed.url, "--api-key", key])
            for found in doctor.running(keyed.url, key, RedisFound([])):  # its other findings do not know the key
                print(doctor.line(found))
        except (ConfigError, ValueError) as error:
            require_silent(str(error), "an error of a command")
    told = capfd.readouterr()
    require_silent(told.out, "standard output")
    require_silent(told.err, "a log")
    assert '"event": "state"' in told.err and "ready" in told.out, "nothing was written that could have told"


@pytest.mark.parametrize(("key", "right"), [(OWN, 200), (FILED, 200), *((wrong, 401) for wrong in WRONG)])
def test_keys_beyond_ascii_are_taken_and_others_are_refused(keyed: Cluster, key: str, right: int) -> None:
    found, _ = ask(keyed, "GET /v1/models", key.encode())
    assert found == (400 if "\0" in key else right)  # no header may hold a NUL


def test_operators_keys_beyond_ascii_are_taken(keyed: Cluster) -> None:
    assert [ask(keyed, "GET /status", key.encode())[0] for key in (ADMIN, OWN, "wrong-0-é")] == [200, 200, 401]
    assert ask(keyed, "POST /admin/workers/nobody/drain", ADMIN.encode())[0] == 404
    assert ask(keyed, "POST /admin/workers/nobody/drain", OWN.encode())[0] == 403


@pytest.mark.parametrize("key", ["own-0-\0", "own-0-\n", " own-0-", "own-0- ", "own-0-\x7f", "own-0-\ud800", ""])
def test_a_key_that_no_header_carries_is_refused_at_the_start_without_telling_it(key: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(json.dumps({"keys": [{"key": key, "name": "team"}]}))
    starts: list[Callable[[], Any]] = [
        lambda: read_api_keys(None, str(tmp_path / "keys"), None),
        lambda: load(GatewaySettings, ["--model", "m", "--redis", "r", "--api-key", key], {}),
        lambda: load(GatewaySettings, ["--model", "m", "--redis", "r", "--admin-key", key], {}),
        *(
            lambda kind=kind: load(kind, ["--api-key", key], {})
            for kind in (UpSettings, StatusSettings, DoctorSettings)
        ),
    ]
    for start in starts:
        with pytest.raises(ConfigError, match="key") as refused:
            start()
        require_silent(str(refused.value), "the refusal")


@pytest.mark.parametrize(
    "content", [b'{"keys":[{"key":"own-0-\xff","name":"a"}]}', b'{"keys":[{"key":"own-0-"', b'{"keys":{"own-0-":1}}']
)
def test_a_file_of_keys_that_cannot_be_read_does_not_tell_them(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ConfigError, match="--api-keys") as refused:
        read_api_keys(None, str(tmp_path / "keys"), None)
    require_silent(str(refused.value), "the refusal")


def test_no_planned_process_shows_a_key_in_its_command_line(tmp_path: Path) -> None:
    """Everybody on the machine can read command lines; the cluster's secret stays in its file, and is not passed on."""
    make_cluster_key(str(tmp_path / "cluster.key"))
    environ = {"PENSTOCK_API_KEY": OWN, "PENSTOCK_ADMIN_KEY": ADMIN}
    settings = load(
        UpSettings, ["--cluster-key", str(tmp_path / "cluster.key"), "--mixed", "1"], environ, known=settings_classes()
    )
    secret = (tmp_path / "cluster.key").read_text().strip()
    site = Site(program=("penstock",), model="/m", redis="redis://:own-0-pass@r:1/0", run_dir="/r", cores=8)
    plans = plan_processes(settings, site)
    assert {plan.role for plan in plans} == {"kvstore", "prefill", "decode", "mixed", "gateway"}
    for plan in plans:
        require_silent(" ".join(plan.argv), plan.name)
        assert str(tmp_path / "cluster.key") in plan.argv
        assert secret not in " ".join([*plan.argv, *plan.environ.values()])
        if plan.role != "gateway":
            assert not {"PENSTOCK_API_KEY", "PENSTOCK_ADMIN_KEY"} & set(plan.environ)


def test_a_cluster_key_shows_its_secret_nowhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "cluster.key")
    make_cluster_key(path)
    key = read_cluster_key(path)
    assert key is not None
    Log(process="any").event("any", key=key, path=path)
    written = (tmp_path / "cluster.key").read_text().strip()
    told = repr(key) + str(key) + capfd.readouterr().err
    assert written not in told and key.secret.decode() not in told
    (tmp_path / "bad").write_bytes(written[:20].encode() + os.urandom(2))
    (tmp_path / "bad").chmod(0o600)
    with pytest.raises(ConfigError) as refused:
        read_cluster_key(str(tmp_path / "bad"))
    assert written[:20] not in str(refused.value)
