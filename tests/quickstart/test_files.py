"""A written file is the old one or the new one."""

import os

import pytest

from neox.quickstart.files import write_atomically


def test_writes_makes_the_folder_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "page.html"
    assert write_atomically(path, b"one") == path
    write_atomically(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["page.html"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "page.html"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_folder_in_the_way_is_an_error_and_is_kept(tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "page.html", b"new")
    assert os.listdir(tmp_path) == ["page.html"]
