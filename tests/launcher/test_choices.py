"""Which model, which Redis, which port."""

import shlex
import socket
import stat
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.ports import free_port, port_is_free
from services.launcher.model_choice import chosen_model
from services.launcher.redis_server import find_redis_server, redis_command
from services.launcher.up import curl, printable


def test_a_model_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert chosen_model("m", (), {}) == str(tmp_path / "m")


@pytest.mark.parametrize("named", ["./missing", "/no/such/folder", "~/nothing", "a/b/c", "missing"])
def test_a_missing_folder_is_named_with_the_command_that_makes_one(named: str) -> None:
    with pytest.raises(ConfigError, match=rf"--model={named}: there is no such folder.*model make"):
        chosen_model(named, (), {})


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        chosen_model(str(tmp_path), (), {})


def test_a_hub_id_is_left_to_the_workers() -> None:
    assert chosen_model("owner/name", (), {}) == "owner/name"


def test_the_default_model_is_used_when_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models/tiny").mkdir(parents=True)
    (tmp_path / "models/tiny/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert chosen_model(None, ("false",), {}) == str(tmp_path / "models/tiny")


def test_a_default_model_that_cannot_be_made_names_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"(?s)--model.*no space left"):
        chosen_model(None, ("sh", "-c", "echo no space left; exit 1"), {})


def test_the_system_s_redis_comes_first() -> None:
    assert find_redis_server(lambda name: f"/usr/bin/{name}") == "/usr/bin/redis-server"


def test_without_one_the_packaged_binary_is_found_and_can_run() -> None:
    binary = Path(find_redis_server(lambda _: None))
    assert binary.name == "redis-server"
    assert binary.stat().st_mode & stat.S_IXUSR


def test_without_any_the_error_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="--redis URL"):
        find_redis_server(lambda _: None)


def test_a_private_redis_listens_here_alone_and_writes_nothing() -> None:
    words = redis_command("redis-server", 7)
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--bind"] == "127.0.0.1"
    assert options["--save"] == "" and options["--appendonly"] == "no"
    assert options["--port"] == "7"


def test_a_taken_port_is_seen_as_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert not port_is_free("127.0.0.1", taken.getsockname()[1])
    assert port_is_free("127.0.0.1", free_port())


def test_the_printed_request_survives_a_shell() -> None:
    words = shlex.split(curl("http://h:1", "it's", with_key=True))
    assert words[-1].startswith('{"model": "it\'s"')
    assert "authorization: Bearer $PENSTOCK_API_KEY" in words


def test_an_answer_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\nc") == "a\N{REPLACEMENT CHARACTER}[2Jb\nc"
