"""What is written down is read as it was meant."""

import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from launch.overrides import command, given_value, override_key, program, quoted

PATHS = [
    "/runs/2026-11-22_12-00-00-123456/last.ckpt",
    "/runs/a b",
    "/runs/a  b ",
    "/runs/é/ü",
    "/runs/lr=0.1,seed=2",
    "/runs/(old) [new] {newer}",
    "~/runs",
    "/runs/a~b",
    "/runs/it's",
    '/runs/"quoted"',
    "/runs/$HOME/${seed}/\\${seed}",
    "/runs/back\\slash\\",
    "/runs/`date`;&|<>*?!#%@+:",
    "last",
    "null",
    "3",
    "",
]


def test_commands_can_be_pasted_into_a_shell():
    commands = [command("train", ["experiment=x", f"ckpt_path={quoted(path)}"]) for path in PATHS]
    script = "python() { printf '%s\\0' \"${@: -1}\"; }\n" + "\n".join(commands)
    printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    for path, argument in zip(PATHS, printed.split("\0")[:-1], strict=True):
        override = OverridesParser.create().parse_override(argument)
        config = OmegaConf.create({"ckpt_path": None, "seed": 5})
        config.ckpt_path = override.value()
        assert config.ckpt_path == path


@pytest.mark.parametrize(
    ("called", "train", "evaluate"),
    [
        ("train.py", "python train.py", "python evaluate.py"),
        ("./evaluate.py", "python train.py", "python evaluate.py"),
        ("../ten fold/train.py", "python '../ten fold/train.py'", "python '../ten fold/evaluate.py'"),
        ("/opt/tenfold/train.py", "python /opt/tenfold/train.py", "python /opt/tenfold/evaluate.py"),
        ("/opt/bin/tenfold-train", "tenfold-train", "tenfold-evaluate"),
        ("/lib/submitit/core/_submit.py", "python train.py", "python evaluate.py"),
    ],
)
def test_programs_are_named_as_they_are_called(called, train, evaluate, monkeypatch):
    monkeypatch.setattr("sys.argv", [called, "x=1"])
    assert command("train", ["a=b c"]) == f"{train} 'a=b c'"
    assert program("evaluate") == evaluate


def test_packages_of_ones_own_are_found_where_they_were(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("PYTHONPATH", "my code:/lib")
    assert command("train", ["a=1"], {"mine"}) == "PYTHONPATH='my code:/lib' python train.py a=1"
    assert command("train", ["a=1"]) == "python train.py a=1"
    monkeypatch.delenv("PYTHONPATH")
    assert command("train", ["a=1"], {"mine"}) == "python train.py a=1"


def test_simple_paths_are_not_quoted():
    assert command("train", [f"ckpt_path={quoted(PATHS[0])}"]) == f"python train.py ckpt_path={PATHS[0]}"


@pytest.mark.parametrize(
    ("override", "key"),
    [("a.b=1", "a.b"), ("~a.b", "a.b"), ("++a=b=c", "a"), ("module/pessimism=min", "module/pessimism")],
)
def test_keys(override, key):
    assert override_key(override) == key


@pytest.mark.parametrize(
    ("overrides", "value"),
    [
        (["x=1"], None),
        (["key=1", "key='a=b'"], "a=b"),
        (["key=a,b"], "a,b"),
        (["~key"], None),
        (["key=[a,b]"], ["a", "b"]),
    ],
)
def test_what_is_given_for_a_key_at_last(overrides, value):
    assert given_value(overrides, "key") == value
