"""File locks: one writer, several readers, released by the end of the process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from neox.system.files import is_at, try_lock


def test_a_file_lock_excludes_others_and_goes_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys, time; from neox.system.files import try_lock; file = open(sys.argv[1], 'ab');"
        "print(try_lock(file), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with path.open("ab") as file:
            assert not try_lock(file)
            assert not try_lock(file, shared=True)
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()
            assert try_lock(file)


def test_shared_locks_exclude_exclusive_ones_only(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("ab") as one, path.open("ab") as two, path.open("ab") as three:
        assert try_lock(one, shared=True)
        assert try_lock(two, shared=True)
        assert not try_lock(three)
        two.close()
        one.close()
        assert try_lock(three)


def test_a_locked_file_that_was_moved_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("ab") as file:
        assert is_at(file, path)
        path.rename(tmp_path / "moved")
        assert not is_at(file, path)
        path.touch()
        assert not is_at(file, path)
