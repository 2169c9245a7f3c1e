"""Help, sweeps, loggers and films, as a person meets them."""

import csv

import pytest

from callbacks.results import Films
from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.evaluation import EvaluationTask
from launch.wandb_logger import logged_in, wandb_logger


def test_help_lists_the_experiments_with_their_duration(program):
    finished = program("--help")
    assert finished.code == 0
    (line,) = [line for line in finished.out.splitlines() if line.strip().startswith("fb_overdrive ")]
    assert "arXiv 2412.04368" in line
    assert "minutes" in line
    assert "ckpt_path=last" in finished.out


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
    assert "Seeds [1]" in again.out


@pytest.fixture
def without_account(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "")  # set by the logger: forgotten after the test
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.mark.usefixtures("without_account")
def test_wandb_is_offline_without_an_account(tmp_path, monkeypatch):
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert logged_in()
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password " + "0" * 40)
    (tmp_path / "netrc").chmod(0o600)
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example.org")
    assert not logged_in()


@pytest.mark.usefixtures("without_account")
def test_wandb_keeps_the_run_when_it_is_resumed(tmp_path):
    first, again = (wandb_logger("tenfold", "name", tmp_path / "a") for _ in range(2))
    other = wandb_logger("tenfold", "name", tmp_path / "b")
    assert first.version == again.version != other.version


@pytest.mark.usefixtures("without_account")
def test_wandb_logs_offline_beside_the_csv_files(program, two_arms, tmp_path, capfd):
    finished = program(*two_arms, f"output_root={tmp_path}", "module.updates=40", "logger=wandb")
    assert (finished.code, finished.err) == (0, "")
    printed = capfd.readouterr()
    assert "wandb" not in (printed.out + printed.err + finished.out.lower())
    for arm in ("fb_narrow", "fb_aw_narrow"):
        run = finished.folder / arm / "seed_0"
        assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))
        with open(run / "train.csv") as file:
            assert len(list(csv.reader(file))) == 9


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
