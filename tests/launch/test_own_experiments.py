"""Experiments in folders outside of the project are listed, run, reproduced and resumed as those inside."""

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from launch.arms import Run, run_configs
from launch.errors import CommandLineError
from launch.experiments import CONFIGS, experiment_list, experiment_names
from launch.overrides import quoted

EXPERIMENT = """
# @package _global_
defaults:
  - fb_overdrive

name: mine
summary: Mine is $other.
duration: a second
own_settings: {first: 1}
arms: null
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of configurations whose name is not easy."""
    folder = tmp_path_factory.mktemp("own") / "é, it's (mine)"
    (folder / "experiment" / "group").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text(EXPERIMENT)
    (folder / "experiment" / "group" / "bare.yaml").write_text("# @package _global_\ndefaults: [../mine]\n")
    (folder / "shade").mkdir()
    for shade in ("dark", "light"):
        (folder / "shade" / f"{shade}.yaml").write_text(f"is: {shade}\n")
    return folder


@pytest.fixture(scope="module")
def first(program, tiny, folder):
    """A study of two seeds, whose seeds and folders are interpolations that were typed."""
    typed = [override for override in tiny if override.split("=")[0] not in ("experiment", "num_seeds")]
    finished = program(
        *("experiment=mine", *typed, "--config-dir", str(folder), f"output_root={quoted(f'{folder}/out=put')}"),
        *("num_seeds=2", "+third=3"),
        *("module.updates=5", "datamodule.seed=${seed}", "+own_settings.second=${run_dir}", "+shade=dark"),
    )
    assert finished.code == 0, finished.err
    return finished.folder


def test_typed_interpolations_are_those_of_each_run(first):
    for seed in (0, 1):
        recipe = json.loads((first / "mine" / f"seed_{seed}" / "results.json").read_text())["recipe"]
        assert recipe["datamodule"]["seed"] == seed
    remembered = yaml.safe_load((first / "run.yaml").read_text())["overrides"]
    assert {"datamodule.seed=${seed}", "+own_settings.second=${run_dir}"} <= set(remembered)


def test_interpolations_of_arms_are_those_of_each_run(tmp_path):
    overrides = ["experiment=fb_overdrive", "+arms.mine=['datamodule.seed=${seed}','+save_dir=${run_dir}']"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        runs = [Run("mine", seed, tmp_path / "mine" / f"seed_{seed}") for seed in (3, 4)]
        configs = run_configs(runs, compose("train", overrides), overrides)
    for run in runs:
        assert (configs[run].datamodule.seed, configs[run].save_dir) == (run.seed, str(run.folder))


RULE = "components.control.pessimism.SubsetMinimumPessimism"  # stands for one of their own


@pytest.fixture(scope="module")
def choosing(tmp_path_factory) -> Callable[..., DictConfig]:
    """Composes the arm `chosen` of an experiment with a rule, a part without and a world in its own file."""
    folder = tmp_path_factory.mktemp("choosing")
    (folder / "module" / "pessimism").mkdir(parents=True)
    (folder / "module" / "pessimism" / "mine.yaml").write_text(f"_target_: {RULE}\nsubset: 1\n")
    (folder / "experiment").mkdir()
    head = "# @package _global_\ndefaults:\n  - gpl_cheetah\n"
    (folder / "experiment" / "whole.yaml").write_text(f"{head}  - override /module/pessimism: mine\n")
    (folder / "experiment" / "merged.yaml").write_text(
        f"{head}module:\n  pessimism: {{_target_: {RULE}, subset: 1}}\n  actor: {{network: {{gain: 2.0}}}}\n"
        "datamodule:\n  environment: {_target_: builtins.dict}\ncallbacks: {films: null}\n"
    )
    (folder / "experiment" / "heir.yaml").write_text("# @package _global_\ndefaults: [merged]\nname: heir\n")

    def composed(experiment: str, *arm: str, typed: Sequence[str] = ()) -> DictConfig:
        arms = "arms={gpl:null,sac:null,chosen:[" + ",".join(map(quoted, arm)) + "]}"
        overrides = [f"hydra.searchpath=[file://{folder}]", f"experiment={experiment}", f"+{arms}", *typed]
        run = Run("chosen", 0, folder / "chosen" / "seed_0")
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return run_configs([run], compose("train", overrides), overrides)[run]

    return composed


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize(
    ("choice", "key", "expected", "found", "advice"),
    [
        (
            "module/pessimism=min",
            "module.pessimism",
            "components.control.pessimism.MinimumPessimism",
            RULE,
            "DIR/module/pessimism/NAME.yaml and choose it in the experiment's defaults by "
            "`override /module/pessimism: NAME`, or leave module/pessimism=min out",
        ),
        (
            "environment=gymnasium",
            "datamodule.environment",
            "datamodules.environments.gymnasium.GymnasiumEnv",
            "builtins.dict",
            "DIR/environment/NAME.yaml that begins with `# @package _global_` and choose it",
        ),
        ("callbacks=films", "callbacks.films", "callbacks.results.Films", "null", "or leave callbacks=films out"),
    ],
)
def test_an_option_that_an_experiment_sets_something_over_is_refused(
    choosing, typed, choice, key, expected, found, advice
):
    sentence = f"{choice}: expected {key} to be {expected}, found {found}, which experiment/merged.yaml sets over it; "
    with pytest.raises(CommandLineError) as refused:
        choosing("heir", *([] if typed else [choice]), typed=[choice] if typed else [])
    assert str(refused.value).startswith(sentence)
    assert advice in str(refused.value)


def test_options_that_hold_are_taken(choosing):
    minimum = "components.control.pessimism.MinimumPessimism"
    assert choosing("merged").module.pessimism._target_ == RULE
    assert choosing("merged", "module/pessimism=redq").module.pessimism._target_ == RULE  # the same rule
    assert choosing("merged", "module/actor=deterministic").module.actor.network.gain == 2.0  # a part of what it builds
    own = choosing("merged", "module/pessimism=min", typed=["module.pessimism._target_=my_rules.Trimmed"])
    assert own.module.pessimism._target_ == "my_rules.Trimmed"
    # As the sentence advises:
    assert choosing("whole").module.pessimism._target_ == RULE
    assert choosing("whole", "module/pessimism=min").module.pessimism._target_ == minimum
    assert choosing("whole", "module/pessimism=redq", typed=["module/pessimism=min"]).module.pessimism.actor == "min"


def test_help_lists_them(program, folder):
    for option in (["--config-dir", str(folder)], [f"hydra.searchpath=[{quoted(str(folder))}]"]):
        finished = program("--help", *option)
        assert finished.code == 0, finished.err
        lines = [line.split(maxsplit=1) for line in finished.out.splitlines()]
        assert ["mine", "Mine is $other. [a second]"] in lines
        assert ["group/bare"] in lines


def test_the_reports_command_reproduces_them(program, first):
    command = (first / "report.md").read_text().split("```bash\n")[1].split("\n```")[0]
    shell = subprocess.run(
        ["bash", "-c", f"python() {{ printf '%s\\0' \"${{@:2}}\"; }}; {command}"], stdout=-1, text=True
    )
    again = program(*shell.stdout.split("\0")[:-1])
    assert again.code == 0, again.err
    assert again.folder != first
    assert again.folder.parent == first.parent
    scores = [
        json.loads((run / "results.json").read_text())["arms"]["mine"]["goals/score"] for run in (first, again.folder)
    ]
    assert scores[0] == scores[1]


def test_a_run_knows_its_experiment_and_takes_further_overrides(program, first):
    here = f"ckpt_path={quoted(str(first))}"
    assert "2 of 2 runs done already" in program(here).out
    # What the first command line added is there to be changed.
    longer = program(here, "module.updates=10", "own_settings.second=2", "shade=light", "~third")
    assert (longer.code, longer.folder) == (0, first), longer.err
    assert longer.out.count("resuming after 5 updates") == 2
    remembered = yaml.safe_load((first / "run.yaml").read_text())["overrides"]
    assert {"++own_settings.second=2", "module.updates=10", "+shade=light"} <= set(remembered)
    assert not any("third" in override for override in remembered)
    last = program(
        "experiment=mine",
        f"hydra.searchpath=[{quoted(str(first.parents[2]))}]",
        f"output_root={quoted(str(first.parents[1]))}",
        "ckpt_path=last",
    )
    assert last.out.count("2 of 2 runs done already") == 1


def test_a_misspelt_key_of_theirs_is_recognised(program, folder):
    finished = program("experiment=mine", "--config-dir", str(folder), "own_setings.first=2")
    assert "Did you mean own_settings.first?" in finished.err
    finished = program("experiment=mina", "--config-dir", str(folder))
    assert "Unknown experiment=mina: expected one of" in finished.err
    assert "mine" in finished.err


def test_hidden_files_are_no_experiments(tmp_path):
    for name in ("mine.yaml", "._mine.yaml", ".ipynb_checkpoints/mine-checkpoint.yaml"):
        path = tmp_path / "experiment" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"summary: s" if name == "mine.yaml" else b"\x00\x05\x16\x07\xff")
    own = [f"file://{tmp_path}"]
    assert set(experiment_names(own)) - set(experiment_names()) == {"mine"}
    assert "  mine " in experiment_list(own)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults:\n  - override /modul: gpl\n", "In 'experiment/wrong': Could not override 'modul'. No match in"),
        ("defaults:\n  - fb_overdrive\nmodule: [1]\n", "composing config: Cannot merge DictConfig with ListConfig."),
        ("summary: x\n", "name: expected a value in experiment=wrong or on the command line, found none."),
        ("name: x\nsummary: y\nduration: z\n", "experiment=wrong: expected a module among its defaults, as in `- over"),
        ("defaults: [fb_overdrive]\ncallbacks: null\n", "or under callbacks, found None."),
        ("defaults: [fb_overdrive]\narms: {a: [~datamodule]}\n", "or under datamodule._target_, found None."),
        (
            "defaults: [gpl_zero_mdp, override /callbacks: films]\n",
            "leave it out with callbacks.critic_bias=null, or choose an option that brings it: callbacks=critic_bias.",
        ),
        (
            "defaults: [fb_overdrive]\nlogger: {mine: 3}\n",
            "logger.mine: expected a part with its _target_, found 3; leave it out with logger.mine=null.",
        ),
        ("x: [\ny: 3", 'while parsing a flow sequence: in "'),
    ],
)
def test_mistakes_in_their_files_are_one_sentence(program, tmp_path, text, message):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "wrong.yaml").write_text(f"# @package _global_\n{text}")
    finished = program("experiment=wrong", "--config-dir", str(tmp_path), f"output_root={tmp_path}/runs")
    assert finished.code != 0
    assert message in finished.err
    assert finished.err.count("\n") == 1
