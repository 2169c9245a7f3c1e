"""Folders of runs."""

import subprocess
import sys
from datetime import datetime
from types import SimpleNamespace

import pytest

from launch.runs import LOCK, locked, new_folder

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_programs_that_start_at_one_instant_get_folders_of_their_own(tmp_path, monkeypatch):
    instants = iter([datetime(2026, 11, 22, 12, 0, 0, each) for each in (5, 5, 5, 6)])
    monkeypatch.setattr("launch.runs.datetime", SimpleNamespace(now=lambda: next(instants)))
    names = [new_folder(tmp_path / "evaluations").name for _ in range(2)]
    assert names == ["2026-11-22_12-00-00-000005", "2026-11-22_12-00-00-000006"]


def test_a_folder_is_one_programs_until_it_ends_or_is_killed(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="no program is at work on, found one"), locked(tmp_path):
        pass
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / LOCK)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="no program is at work on, found one"), locked(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        pass
