"""What is said of code and machine, and what is not."""

import getpass
import json
import platform
import re
import subprocess
from pathlib import Path

import pytest
import torch

from launch import provenance


@pytest.fixture
def code():
    """Asks anew, as a program that begins does."""
    yield lambda: provenance.code.__wrapped__()
    provenance.code.cache_clear()


def git(folder, *command):
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *author, *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_checkout_says_its_commit_and_whether_it_was_changed(code, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    git(tmp_path, "init")
    (tmp_path / ".gitignore").write_text("outputs/\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "First.")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "run").touch()
    assert code() == commit
    (tmp_path / "method.py").touch()  # new files are part of what ran
    assert code() == f"{commit}+"


def test_a_package_says_its_version_though_it_lies_in_a_repository(code, tmp_path, monkeypatch):
    git(tmp_path, "init")
    installed = tmp_path / "site-packages"
    installed.mkdir()
    monkeypatch.setattr(provenance, "ROOT", installed)
    monkeypatch.setattr(provenance, "version", lambda package: {"tenfold": "1.2"}[package])
    assert code() == "1.2"


def test_without_git_the_version_has_to_do(code, tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()  # damaged
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert re.fullmatch(r"\d+\.\d+\.\d+|unknown", code())
    monkeypatch.setenv("PATH", "")
    assert re.fullmatch(r"\d+\.\d+\.\d+|unknown", code())


def test_a_package_of_ones_own_says_its_commit_or_its_version(tmp_path, monkeypatch):
    provenance.package_code.cache_clear()
    monkeypatch.syspath_prepend(tmp_path)
    git(tmp_path, "init")
    for name in ("mine_committed", "mine_loose"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    git(tmp_path, "add", "mine_committed")
    git(tmp_path, "commit", "-m", "First.")
    commit = git(tmp_path, "rev-parse", "HEAD")
    made = provenance.provenance(packages=("mine_committed", "mine_loose", "pytest", "nowhere_to_be_found"))
    assert made["versions"]["mine_committed"] == f"{commit}+"  # the other is not committed
    assert made["versions"]["mine_loose"] == made["versions"]["nowhere_to_be_found"] == "unknown"
    assert made["versions"]["pytest"] == pytest.__version__


def test_versions_and_hardware_are_told_and_nobody_is_named():
    made = provenance.provenance()
    assert made["versions"]["torch"] == torch.__version__
    assert made["versions"]["python"] == platform.python_version()
    assert made["hardware"]["threads"] == torch.get_num_threads()
    assert made["hardware"]["cores"] >= 1
    assert made["hardware"]["memory_gb"] > 0
    assert made["hardware"]["gpus"] == []
    text = json.dumps(made)
    assert str(Path.home()) not in text
    for name in (platform.node(), getpass.getuser()):
        assert not re.search(rf"\b{re.escape(name)}\b", text)
