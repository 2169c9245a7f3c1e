"""Searches and sweeps with Hydra's sweepers and launchers."""

import json
import re

import pytest
import yaml
from hydra import compose, initialize_config_dir
from lightning.pytorch.utilities import rank_zero_only

from launch.experiments import CONFIGS
from launch.files import write_json
from launch.objectives import metrics_meant, objective_known, objective_value
from launch.settings import parts_of

OPTUNA = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=0", "hydra.sweeper.direction=maximize")


def test_a_search_maximises_what_it_is_asked_for(program, two_arms, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ("objective=eval/goals/score", "hydra.sweeper.n_trials=2", "module.learning_rate=interval(1e-4,1e-2)")
    finished = program(*two_arms, f"output_root={tmp_path}", *OPTUNA, *search, "module.updates=5")
    assert finished.code == 0, finished.err
    (sweep,) = (tmp_path / "sweep").iterdir()
    found = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    scores = {}
    for number in range(2):
        arms = json.loads((sweep / str(number) / "results.json").read_text())["arms"]
        assert arms.keys() == {"fb_narrow", "fb_aw_narrow", "random policy"}  # which is not searched for
        scores[number] = sum(arms[arm]["goals/score"]["mean"] for arm in ("fb_narrow", "fb_aw_narrow")) / 2
    assert scores[0] != scores[1]
    assert found["best_value"] == pytest.approx(max(scores.values()))
    best = max(scores, key=scores.get)
    overrides = yaml.safe_load((sweep / str(best) / "run.yaml").read_text())["overrides"]
    assert f"module.learning_rate={found['best_params']['module.learning_rate']}" in overrides


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ([], "objective=null: expected eval/METRIC, the number that the search is for."),
        (
            ["objective=eval/goal/score"],
            "objective=eval/goal/score: expected a metric of the evaluation, one of eval/goals",
        ),
        (
            ["objective=eval/goals/score", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"],
            "trainer.devices: expected one process in a search, found 2.",
        ),
    ],
)
def test_a_search_for_nothing_is_one_sentence(program, one_arm, tmp_path, objective, message):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = (*OPTUNA, "hydra.sweeper.n_trials=1", "module.learning_rate=choice(1e-3)", *objective)
    finished = program(*one_arm, f"output_root={tmp_path}", *search, "module.updates=5")
    assert finished.code != 0
    assert finished.err.splitlines()[-1].startswith(message)
    assert "Writing to" not in finished.out  # nothing was trained
    assert not list(tmp_path.iterdir())


def test_of_several_processes_the_first_has_the_number(tmp_path, monkeypatch):
    write_json(tmp_path / "results.json", {"arms": {"a": {"x": {"mean": 1.0}}, "b": {"x": {"mean": 4.0}}, "c": {}}})
    assert objective_value("eval/x", tmp_path, "abc") == 2.5
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert objective_value("eval/x", tmp_path / "not written yet", "a") is None


def test_a_metric_may_be_named_as_the_table_shows_it():
    arms = {"a": {"stand/return": 1.0}, "b": {"stand/return": 2.0, "stand": 3.0}, "c": {}}
    assert metrics_meant("eval/stand", arms) == [1.0, 3.0]
    assert metrics_meant("stand/return", arms) == [1.0, 2.0]
    with pytest.raises(ValueError, match=r"objective=eval/walk: expected .*, one of eval/stand/return, eval/stand\."):
        metrics_meant("eval/walk", arms)


@pytest.mark.parametrize(
    ("experiment", "objective", "expected"),
    [
        ("fb_overdrive", "eval/goals/score", True),
        ("fb_overdrive", "eval/goals/scores", "eval/goals/score, eval/goals/in_range"),
        ("gpl_cheetah", "eval/default_reset/run", True),
        ("gpl_cheetah", "default_reset/run/return", True),
        ("gpl_cheetah", "eval/critic_bias/mean", True),
        ("gpl_cheetah", "eval/pessimism", False),  # the method's own
        ("gpl_cheetah", "eval/default/run", "eval/default_reset/run/return, eval/critic_bias/*"),
        ("alix_selffitting", "eval/held_out/td_loss", True),
        ("drr_digits", "eval/test/last_accuracy", False),
    ],
)
def test_what_will_be_measured_is_known_before_training(experiment, objective, expected):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", [f"experiment={experiment}", "run_dir=x", "study_dir=x", "arm=x"])
    arms = [parts_of(config)]
    if not isinstance(expected, str):
        assert objective_known(objective, arms) == expected
        return
    with pytest.raises(ValueError, match=re.escape(f"objective={objective}: expected a metric of the ")) as raised:
        objective_known(objective, arms)
    assert str(raised.value).endswith(f"one of {expected}.")
    arms[0]["module"]["part"] = {"_target_": "mine.Part"}  # which may add what it likes
    assert not objective_known(objective, arms)


def test_a_run_that_fails_does_not_end_a_sweep(program, one_arm, tmp_path):
    finished = program("-m", *one_arm, f"output_root={tmp_path}", "module.updates=7,5")
    assert finished.code == 1
    assert finished.err.splitlines()[-1].startswith("module.updates=7 is no multiple of datamodule.updates_per_step=5.")
    (sweep,) = (tmp_path / "sweep").iterdir()
    assert not (sweep / "0").exists()
    assert (sweep / "1" / "report.md").exists()


@pytest.mark.slow
def test_trainings_beside_each_other_are_the_same_as_one_after_the_other(spawn, program, one_arm, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = (*one_arm, "-m", "seed=0,1", "module.updates=5")
    beside = spawn(*sweep, f"output_root={tmp_path}/beside", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    after = program(*sweep, f"output_root={tmp_path}/after")
    assert after.code == 0, after.err
    _, err = beside.communicate(timeout=120)
    assert beside.returncode == 0, err
    folders = [next((tmp_path / name / "sweep").iterdir()) for name in ("beside", "after")]
    for seed in (0, 1):
        results = [json.loads((folder / str(seed) / "results.json").read_text())["arms"] for folder in folders]
        assert results[0] == results[1]


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_launchers_of_clusters_compose(program, cluster):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    finished = program("experiment=fb_overdrive", f"hydra/launcher=submitit_{cluster}", "--cfg", "hydra")
    assert finished.code == 0, finished.err
    hydra = yaml.safe_load(finished.out)["hydra"]
    assert hydra["hydra_logging"]["loggers"]["alembic"] == {"level": "WARNING"}
    launcher = hydra["launcher"]
    assert launcher["_target_"].endswith(f"{cluster.capitalize()}Launcher")
    assert launcher["name"] == "${hydra.job.name}"


def test_a_command_that_is_started_again_in_its_folder_goes_on(program, one_arm, tmp_path):
    """As schedulers do with jobs that they took the machine from."""
    for updates, said in ((5, "Writing to"), (10, "resuming after 5 updates")):
        finished = program(*one_arm, f"hydra.run.dir={tmp_path}/job", f"module.updates={updates}", "+extra=1")
        assert finished.code == 0, finished.err
        assert said in finished.out
