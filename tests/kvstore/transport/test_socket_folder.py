"""Folders of lives that are gone are removed, and never one of a life that is there, at whatever point it is."""

import socket
import time
from pathlib import Path

import pytest

from common.ids import PeerId
from common.kv_layout import KvLayout
from common.net.host import kernel_identity
from kvstore.memory.page_memory import open_page_memory
from kvstore.transport.share import Share
from kvstore.transport.socket_folder import SocketFolder, left_behind, sweep

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    return listener


def killed(run_dir: Path, name: str, kernel: str | None = None) -> Path:
    """What stays of a life of this kernel, or of another: its socket, at which nobody listens."""
    folder = bare(run_dir, name, kernel_identity() if kernel is None else kernel)
    listening(folder / "pages.sock").close()
    return folder


def bare(run_dir: Path, name: str, kernel: str | None) -> Path:
    """What stays of a life that was killed before it had a socket, or even a kernel's name there."""
    folder = run_dir / name
    folder.mkdir(mode=0o700)
    if kernel is not None:
        (folder / "kernel").write_text(kernel)
    return folder


def test_what_was_left_is_found_and_removed_and_nothing_else(tmp_path: Path) -> None:
    left = [killed(tmp_path, "decode-0@1"), killed(tmp_path, "prefill-0@2")]
    (tmp_path / "logs").mkdir()
    (tmp_path / "full@3").mkdir()
    (tmp_path / "full@3" / "notes").write_text("of somebody else")
    (tmp_path / "file@4").mkdir()
    (tmp_path / "file@4" / "kernel").write_text(kernel_identity())
    (tmp_path / "file@4" / "pages.sock").write_text("no socket")
    (tmp_path / "link@5").symlink_to(left[0])
    for now_s in (time.time(), time.time() + 120):
        assert left_behind(tmp_path, now_s) == left
        assert sweep(tmp_path, now_s) == left
        assert sorted(one.name for one in tmp_path.iterdir()) == ["file@4", "full@3", "link@5", "logs"]
        assert sweep(tmp_path, now_s) == [] == sweep(tmp_path / "none", now_s)
        left = []


def test_folders_of_another_kernel_stay_for_it(tmp_path: Path) -> None:
    killed(tmp_path, "decode-0@1", kernel="another")
    bare(tmp_path, "decode-0@2", kernel="another")
    (killed(tmp_path, "decode-0@3") / "kernel").unlink()
    assert sweep(tmp_path, time.time() + 120) == []
    assert len(list(tmp_path.iterdir())) == 3


def test_who_was_killed_before_it_had_a_socket_leaves_a_folder_for_a_minute(tmp_path: Path) -> None:
    left = [bare(tmp_path, f"decode-0@{number}", kernel) for number, kernel in enumerate((None, "", kernel_identity()))]
    changed_s = max(folder.stat().st_mtime for folder in left)
    assert sweep(tmp_path, changed_s + 59) == []
    assert sweep(tmp_path, changed_s + 61) == left
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["made", "bound", "listening"])
def test_a_life_that_is_there_keeps_its_folder_however_far_it_is(stage: str, tmp_path: Path) -> None:
    folder = SocketFolder(tmp_path, "decode-0@1")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if stage != "made":
        listener.bind(str(folder.path))
    if stage == "listening":
        listener.listen()
    assert sweep(tmp_path, time.time() + 120) == []
    assert folder.path.parent.is_dir() and folder.path.exists() == (stage != "made")
    folder.close()
    listener.close()
    assert not folder.path.parent.exists()
    folder.close()


def test_a_folder_that_cannot_be_made_whole_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> str:
        raise PermissionError("/proc cannot be read")

    monkeypatch.setattr("kvstore.transport.socket_folder.kernel_identity", refuses)
    with pytest.raises(PermissionError):
        SocketFolder(tmp_path, "decode-0@1")
    assert list(tmp_path.iterdir()) == []


def test_who_listens_without_a_lock_keeps_its_folder(tmp_path: Path) -> None:
    folder = bare(tmp_path, "old@1", kernel_identity())
    with listening(folder / "pages.sock"):
        assert sweep(tmp_path, time.time()) == []
    assert sweep(tmp_path, time.time()) == [folder]


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
