"""On-policy runs: killed in a rollout or in the updates from it, and in two processes, they go on bit for bit."""

from pathlib import Path

import pytest

from launch.checkpoints import load_checkpoint

ARGUMENTS = (
    "experiment=ppo_pendulum",
    "module.updates=384",
    "module.actor.network.hidden_dim=16",
    "module.value.hidden_dim=16",
    "module.target_divergence=0.01",
    "module.reward_normaliser={_target_: components.control.normalisation.RewardNormaliser}",
    "datamodule.num_envs=4",
    "datamodule.rollout_steps=8",
    "datamodule.epochs=2",
    "datamodule.updates_per_step=4",
    "datamodule.evaluate_every=96",
    "datamodule.episodes=2",
    "datamodule.curve_episodes=1",
    "checkpoint_every=32",
)
ARM = "ppo_pendulum"
HOLDS = ("exp_avg_sq", "moments", "learning_rate_factor")
DDP = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")


@pytest.fixture(scope="module")
def uninterrupted(program, tmp_path_factory):
    finished = program(*ARGUMENTS, f"output_root={tmp_path_factory.mktemp('whole')}")
    assert finished.code == 0, finished.err
    return finished.folder


def test_killed_run_goes_on_bit_for_bit(assert_same_runs, program, run_and_kill, uninterrupted, tmp_path):
    folder = run_and_kill(*ARGUMENTS, root=tmp_path, arm=ARM, updates=100)
    saved = load_checkpoint(folder / ARM / "seed_0" / "checkpoints" / "last.ckpt")
    assert 96 <= saved["learning_method"]["updates"] < 384
    (experience,) = saved["OnPolicyDataModule"]["processes"]
    assert experience["environment"]["steps"].min() > 0  # in the middle of episodes
    assert experience["carried"].abs().max() > 0
    finished = program(ARGUMENTS[0], f"ckpt_path={folder}")
    assert finished.code == 0, finished.err
    assert_same_runs(folder, uninterrupted, [ARM], HOLDS)


def test_a_checkpoint_between_the_updates_of_a_rollout_is_refused(program, tmp_path):
    finished = program(*ARGUMENTS, "checkpoint_every=30", f"output_root={tmp_path}")
    assert finished.code == 1
    assert finished.err.startswith("checkpoint_every=30: expected a multiple of datamodule.updates_per_step=4")


def test_two_processes_collect_their_own_and_resume_exactly(
    assert_same_runs, spawn, wait_for_updates, tmp_path_factory
):
    def run(*more):
        process = spawn(*ARGUMENTS, *DDP, *more)
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        return out.strip().splitlines()[-1]

    whole = Path(run(f"output_root={tmp_path_factory.mktemp('whole')}"))
    root = tmp_path_factory.mktemp("killed")
    process = spawn(*ARGUMENTS, *DDP, f"output_root={root}")
    wait_for_updates(process, root, ARM, 100)
    process.send_signal(15)
    process.communicate(timeout=60)
    (folder,) = (root / ARM).iterdir()
    saved = load_checkpoint(folder / ARM / "seed_0" / "checkpoints" / "last.ckpt")
    first, second = saved["OnPolicyDataModule"]["processes"]
    assert not first["environment"]["observation"].equal(second["environment"]["observation"])
    assert first["environment"]["observation"].shape[0] == 2
    run(f"ckpt_path={folder}")
    assert_same_runs(folder, whole, [ARM], HOLDS)
