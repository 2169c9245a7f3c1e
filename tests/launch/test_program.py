"""Help, sweeps, loggers and films, as a person meets them."""

import csv
from pathlib import Path

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _hydra_subprocess_cmd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.results import Films
from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.evaluation import EvaluationTask
from launch.overrides import given_value, quoted


def test_help_lists_the_experiments_with_their_duration_and_imports_no_torch(run_program):
    finished = run_program("-X", "importtime", "train.py", "--help")
    assert finished.returncode == 0
    (line,) = [line for line in finished.stdout.splitlines() if line.strip().startswith("fb_overdrive ")]
    assert "arXiv 2412.04368" in line
    assert "minutes" in line
    assert "ckpt_path=last" in finished.stdout
    imported = {line.split("|")[-1].strip() for line in finished.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "lightning", "numpy", "scipy", "matplotlib"}


def test_a_run_says_what_it_does_before_it_imports_what_takes_long(run_program, tmp_path):
    begin = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'train.py'; from launch.program import main; "
    report = "from launch.errors import run_reporting_errors; sys.exit(run_reporting_errors(main))"
    finished = run_program("-c", begin + report, "experiment=fb_overdrive", f"output_root={tmp_path}")
    assert finished.stdout.startswith("fb_overdrive: Offline data that hide a turn-over of the dynamics")
    assert finished.stdout.endswith("Takes about 4 minutes on two cores.\n")
    assert (finished.returncode, finished.stderr.count("\n")) == (1, 1)


def test_lightning_is_imported_without_what_is_not_needed_of_it(run_program):
    program = """
import sys
from launch.imports import UNUSED, import_lightning
import_lightning()
assert not {"scipy.signal", *UNUSED} & sys.modules.keys()
from lightning_utilities.core.imports import RequirementCache, package_available
assert all(package_available(name) and RequirementCache(name) for name in UNUSED)
"""
    finished = run_program("-c", program)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("mode", [(), ("-m",)])
def test_processes_that_a_run_starts_are_told_its_folder(program, tmp_path, monkeypatch, mode):
    """Whatever its name is."""
    parent, folders = tmp_path / 'a "b" \\c', []

    def run_study() -> None:
        command, _ = _hydra_subprocess_cmd(local_rank=1)
        folders.append(Path(given_value(command, "hydra.run.dir")))
        assert folders[-1].is_dir()

    monkeypatch.setattr("launch.study.run_study", run_study)
    finished = program(*mode, "experiment=fb_overdrive", f"output_root={quoted(str(parent))}")
    assert finished.code == 0, finished.err
    (folder,) = folders
    assert folder.relative_to(parent).parts[0] == ("sweep" if mode else "fb_overdrive")


def test_every_run_of_a_sweep_has_a_folder_of_its_own(program, one_arm, tmp_path):
    finished = program("-m", *one_arm, f"output_root={tmp_path}", "module.updates=5", "seed=0,1")
    assert finished.code == 0, finished.err
    (sweep,) = (tmp_path / "sweep").iterdir()
    for seed in (0, 1):
        assert (sweep / str(seed) / "report.md").exists()
        assert [path.name for path in (sweep / str(seed) / "fb_aw_narrow").iterdir()] == [f"seed_{seed}"]
        assert f"{sweep / str(seed)}\n" in finished.out
    again = program("experiment=fb_overdrive", f"ckpt_path={sweep / '1'}")
    assert (again.code, again.folder) == (0, sweep / "1")
    assert "Seed 1; mean" in again.out
    assert program("experiment=fb_overdrive", f"output_root={tmp_path}", "ckpt_path=last").folder == sweep / "1"
    refused = program("-m", *one_arm, f"output_root={tmp_path}", "ckpt_path=last", "seed=0,1")
    assert refused.code == 2
    assert "ckpt_path=last: expected without -m" in refused.err


def test_arms_that_are_null_are_left_out_and_what_overrides_arms_is_said(program, tiny, tmp_path):
    nulls = ("arms.fb_narrow=null", "arms.fb_full=null", "arms.fb_aw_full=null")
    override = "datamodule.dataset.coverage=full"
    finished = program(*tiny, *nulls, override, f"output_root={tmp_path}", "module.updates=5")
    assert finished.code == 0, finished.err
    assert f"{override} holds for all arms, also for fb_aw_narrow, which had their own." in finished.out
    assert finished.out.count("holds for all arms") == 2  # at once, and in the report
    assert "about 4 minutes on two cores with its own settings." in finished.out
    assert "The experiment's notes, written for its own settings and not for `" in finished.out
    assert [path.name for path in finished.folder.iterdir() if path.is_dir()] == ["fb_aw_narrow"]
    command = (finished.folder / "report.md").read_text().split("```bash\n")[1].split("\n```")[0]
    assert command.startswith("python train.py experiment=fb_overdrive ")
    assert command.endswith(f"arms.fb_aw_full=null {override} output_root={tmp_path} module.updates=5")


def test_wandb_and_tensorboard_log_beside_csv_without_an_account(spawn, two_arms, tmp_path):
    # In a process of its own: wandb replaces the streams of the process that imports it.
    environment = {"NETRC": str(tmp_path / "none"), "WANDB_API_KEY": ""}
    loggers = "logger=[wandb,tensorboard]"
    process = spawn(*two_arms, f"output_root={tmp_path}/runs", "module.updates=40", loggers, **environment)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "wandb:" not in out
    (folder,) = (tmp_path / "runs" / "fb_overdrive").iterdir()
    for arm in ("fb_narrow", "fb_aw_narrow"):
        run = folder / arm / "seed_0"
        assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))
        with open(run / "train.csv") as file:
            assert len(list(csv.reader(file))) == 9
        events = EventAccumulator(str(run / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("train/actor_loss")] == list(range(5, 41, 5))
        assert [event.step for event in events.Scalars("eval/goals/score")] == [40]


def test_films_are_skipped_with_one_line_where_nothing_can_be_rendered(tmp_path, monkeypatch, capfd):
    import mujoco

    def broken(*args, **kwargs):
        raise RuntimeError("no GL library")

    def make_env(rows):
        return BatchedMujocoEnv("humanoid", num_envs=rows, seed=0, episode_length=3)

    monkeypatch.setattr(mujoco, "Renderer", broken)
    films = Films(str(tmp_path / "films"))
    for name in ("upright", "fallen"):
        task = EvaluationTask(name, {"stand": "stand"}, make_env, 1, lambda: None)
        result = task.run(lambda seen: seen.set("action", seen["observation"].new_zeros(1, 21)))
        films.on_test_batch_end(None, None, result, task, 0)
    films.on_test_end(None, None)
    printed = capfd.readouterr()
    assert printed.out.count("\n") == 1
    assert printed.out.startswith("Films are skipped: MuJoCo cannot render here: install EGL")
    assert printed.err == ""
    assert not (tmp_path / "films").exists()
