"""Folders of lives that are gone are removed, and never one of a life that is there, at whatever point it is."""

import socket
from pathlib import Path

import pytest

from common.ids import PeerId
from common.kv_layout import KvLayout
from kvstore.memory.page_memory import open_page_memory
from kvstore.transport.share import Share
from kvstore.transport.socket_folder import SocketFolder, left_behind, sweep

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    return listener


def killed(run_dir: Path, name: str) -> Path:
    """What stays of a life: its socket, at which nobody listens."""
    folder = run_dir / name
    folder.mkdir(mode=0o700)
    listening(folder / "pages.sock").close()
    return folder


def test_what_was_left_is_found_and_removed_and_nothing_else(tmp_path: Path) -> None:
    left = [killed(tmp_path, "decode-0@1"), killed(tmp_path, "prefill-0@2")]
    (tmp_path / "logs").mkdir()
    (tmp_path / "empty@3").mkdir()
    (tmp_path / "file@4").mkdir()
    (tmp_path / "file@4" / "pages.sock").write_text("no socket")
    (tmp_path / "link@5").symlink_to(left[0])
    assert left_behind(tmp_path) == left
    assert sweep(tmp_path) == left
    assert sorted(one.name for one in tmp_path.iterdir()) == ["empty@3", "file@4", "link@5", "logs"]
    assert sweep(tmp_path) == [] == sweep(tmp_path / "none")


@pytest.mark.parametrize("stage", ["made", "bound", "listening"])
def test_a_life_that_is_there_keeps_its_folder_however_far_it_is(stage: str, tmp_path: Path) -> None:
    folder = SocketFolder(tmp_path, "decode-0@1")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if stage != "made":
        listener.bind(str(folder.path))
    if stage == "listening":
        listener.listen()
    assert sweep(tmp_path) == []
    assert folder.path.parent.is_dir() and folder.path.exists() == (stage != "made")
    folder.close()
    listener.close()
    assert not folder.path.parent.exists()


def test_who_listens_without_a_lock_keeps_its_folder(tmp_path: Path) -> None:
    (tmp_path / "old@1").mkdir()
    with listening(tmp_path / "old@1" / "pages.sock"):
        assert sweep(tmp_path) == []
    assert sweep(tmp_path) == [tmp_path / "old@1"]


def test_a_host_removes_what_was_left_where_it_begins_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = killed(tmp_path, "decode-0@1")
    memory = open_page_memory(2**21, LAYOUT)
    shares = [Share(PeerId(name), on_joined=print, on_gone=print) for name in ("decode-0@2", "decode-1@3")]
    paths = [Path(share.serve(memory, tmp_path)) for share in shares]
    assert not folder.exists() and all(path.is_socket() for path in paths)
    assert capsys.readouterr().err.count('"socket_folders_removed"') == 1
    for share in shares:
        share.close()
    memory.close()
    assert list(tmp_path.iterdir()) == []
