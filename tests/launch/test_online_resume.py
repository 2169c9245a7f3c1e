"""Online runs: stop in the middle of an episode or an update, go on, and get every later number as if nothing was."""

import random

import pytest

from launch.checkpoints import load_checkpoint

SMALL = (
    "module.updates=320",
    "module.log_every=20",
    "datamodule.updates_per_step=2",
    "datamodule.random_steps=60",
    "datamodule.evaluate_every=64",
    "datamodule.batch_size=16",
    "datamodule.episodes=2",
    "datamodule.curve_episodes=1",
    "checkpoint_every=24",
    "module.discount=0.8",
)
NARROW = ("module.critic.hidden_dim=16", "module.actor.network.hidden_dim=16")
BIAS = ("callbacks=critic_bias", "callbacks.critic_bias.rows=2", "callbacks.critic_bias.scored_steps=4")
RUNS = {
    # a ring that has gone round several times, in memory and in files; n-step returns; episodes that end on the way
    "cheetah": (
        "experiment=gpl_cheetah",
        *NARROW,
        "~arms.sac",
        *BIAS,
        "+datamodule.environment.episode_length=28",
        "datamodule.n_step=3",
        "datamodule.replay_capacity=80",
    ),
    "hopper": (
        "experiment=gpl_hopper_gym",
        *NARROW,
        "~arms.sac",
        *BIAS,
        "datamodule.replay_storage=memmap",
        "datamodule.replay_capacity=80",
        "+datamodule.environment.episode_length=40",
    ),
    # pictures, each stored once, and a strength and noise that move
    "cartpole": (
        "experiment=gpl_drq_cartpole",
        *NARROW,
        "~arms.drq",
        "callbacks=feature_gradients",
        "module.encoder.channels=4",
        "datamodule.environment.size=24",
        "datamodule.replay_capacity=80",
        "datamodule.environment.episode_length=52",
    ),
}


@pytest.fixture(scope="module", params=RUNS)
def arguments(request):
    return (*RUNS[request.param], *SMALL)


@pytest.fixture(scope="module")
def uninterrupted(program, arguments, tmp_path_factory):
    finished = program(*arguments, f"output_root={tmp_path_factory.mktemp('whole')}")
    assert finished.code == 0, finished.err
    return finished.folder


@pytest.fixture(scope="module")
def arm(uninterrupted):
    (folder,) = (path for path in uninterrupted.iterdir() if path.is_dir())
    return folder.name


def test_killed_run_goes_on_bit_for_bit(
    assert_same_runs, program, run_and_kill, arguments, uninterrupted, arm, tmp_path
):
    folder = run_and_kill(*arguments, root=tmp_path, arm=arm, updates=100)
    saved = load_checkpoint(folder / arm / "seed_0" / "checkpoints" / "last.ckpt")
    assert 64 <= saved["learning_method"]["updates"] < 320
    assert any(tally[2] for tally in saved["learning_method"]["processes"][0]["tallies"])  # between two records
    (experience,) = saved["OnlineDataModule"]["processes"]
    assert experience["environment"]["steps"].min() > 0  # in the middle of episodes
    finished = program(arguments[0], f"ckpt_path={folder}")
    assert finished.code == 0, finished.err
    assert_same_runs(folder, uninterrupted, [arm])


def test_run_without_a_checkpoint_starts_over_on_the_old_replay_files(
    assert_same_runs, program, run_and_kill, arguments, uninterrupted, arm, tmp_path
):
    if uninterrupted.parent.name != "gpl_cheetah":
        pytest.skip("one is enough")
    folder = run_and_kill(*arguments, "checkpoint_every=64", root=tmp_path, arm=arm, updates=20)
    (folder / arm / "seed_0" / "checkpoints" / "last.ckpt").unlink(missing_ok=True)
    finished = program(arguments[0], f"ckpt_path={folder}", "checkpoint_every=24")
    assert finished.code == 0, finished.err
    assert_same_runs(folder, uninterrupted, [arm])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_at_random_instants(assert_same_runs, program, run_and_kill, arguments, uninterrupted, arm, tmp_path):
    generator = random.Random(0)
    for number in range(10):
        more = ("ckpt_path=last",) if number else ()
        instant = {"updates": 8 + 14 * number, "seconds": 0.3 * generator.random()}
        folder = run_and_kill(*arguments, *more, root=tmp_path, arm=arm, **instant)
    assert program(arguments[0], f"ckpt_path={folder}").code == 0
    assert_same_runs(folder, uninterrupted, [arm])


def test_checkpoint_of_another_number_of_environments_is_one_sentence(program, uninterrupted, arm):
    with open(uninterrupted / arm / "seed_0" / "train.csv", "a") as file:
        file.write("325,0,1.2\n")  # of after the checkpoint: nothing is dropped for a resumption that is refused
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    name = f"experiment={uninterrupted.parent.name}"
    finished = program(name, f"ckpt_path={uninterrupted}", "module.updates=400", "datamodule.num_envs=6")
    assert finished.code == 1
    assert len(finished.err.strip().splitlines()) == 1
    assert finished.err.startswith("datamodule.num_envs=6: expected ")
    assert {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()} == before
