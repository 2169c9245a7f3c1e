"""From published files to a score: reader, datamodule, one Lightning step, inference and one evaluation."""

from pathlib import Path

import h5py
import lightning as L
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torchrl.envs.utils import step_mdp

from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.gymnasium import GymnasiumEnv

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NARROW = {
    "forward_backward": [
        *(f"module.{network}.hidden_dim=8" for network in ("forward_map", "backward_map", "actor")),
        "module.features=8",
        "module.groups=4",
    ],
    "actor_critic": ["module.critic.hidden_dim=8", "module.actor.network.hidden_dim=8"],
}
SMALL = [
    "module.compile=null",
    "module.updates=4",
    "module.log_every=2",
    "datamodule.batch_size=16",
    "datamodule.updates_per_step=2",
    "datamodule.evaluate_every=4",
    "datamodule.curve_episodes=2",
]


def trained(tmp_path: Path, *overrides: str, method: str = "forward_backward"):
    """The agent and the datamodule of a paper-scale experiment, shrunk and run to its end on the CPU."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", [f"data_root={tmp_path}", "trainer=cpu", *NARROW[method], *SMALL, *overrides])
    torch.manual_seed(0)
    datamodule = instantiate(config.datamodule)
    module = instantiate(config.module, **datamodule.spec)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        inference_mode=False,
    )
    trainer.fit(module, datamodule=datamodule)
    assert module.updates == 4
    return module, datamodule


def write_d4rl(file: Path, body: str, rows: int) -> None:
    """Random actions in the real environment, in D4RL's flat layout, without `next_observations`."""
    env = GymnasiumEnv(body, seed=0, episode_length=30)
    generator = torch.Generator().manual_seed(0)
    keys = ("observations", "actions", "rewards", "terminals", "timeouts", "infos/qpos", "infos/qvel")
    columns: dict[str, list] = {key: [] for key in keys}
    state = env.reset()
    for _ in range(rows):
        state["action"] = 2 * torch.rand(env.action_spec.shape, generator=generator) - 1
        qpos, qvel = np.split(state["physics"][0].numpy(), [env._envs[0].unwrapped.model.nq])
        stepped = env.step(state)
        step = stepped["next"]
        values = (
            state["observation"][0].numpy().copy(),
            state["action"][0].numpy(),
            float(step["reward"]),
            bool(step["terminated"]),
            bool(step["truncated"]),
            qpos.copy(),
            qvel.copy(),
        )
        for key, value in zip(keys, values):
            columns[key].append(value)
        state = env.reset() if step["done"] else step_mdp(stepped)
    file.parent.mkdir(parents=True)
    with h5py.File(file, "w") as h5:
        for key, values in columns.items():
            h5[key] = np.array(values)
        h5["next_observations"] = np.roll(np.array(columns["observations"]), -1, axis=0)


def test_d4rl(tmp_path, capsys):
    write_d4rl(tmp_path / "d4rl" / "hopper_medium_replay-v2.hdf5", "hopper", 200)
    module, datamodule = trained(
        tmp_path, "experiment=paper/fb_d4rl", "datamodule.dataset.name=hopper-medium-replay-v2"
    )
    assert "Reading hopper_medium_replay-v2.hdf5" in capsys.readouterr().out
    data = datamodule.dataset.data
    assert data["next", "terminated"].any()
    assert data["next", "physics"].isnan().any()  # arrivals of terminal rows, which the file does not hold
    assert not data["next", "terminated"].all()

    (task,) = datamodule.evaluation_tasks(2)
    states, rewards = task.inference_samples("cpu")
    assert rewards.shape == (len(data), 1)
    assert sorted(rewards[:, 0].tolist()) == sorted(data["next", "reward"][:, 0].tolist())
    assert states.shape == (len(data), 11)

    metrics = task.metrics(module.evaluate(task))
    assert set(metrics) == {"d4rl/reward/score", "d4rl/reward/return"}
    assert len(metrics["d4rl/reward/score"]) == 2
    score = 100 * (metrics["d4rl/reward/return"][0] + 20.272305) / (3234.3 + 20.272305)
    assert metrics["d4rl/reward/score"][0] == pytest.approx(score)

    instantiate_again = datamodule._make_dataset()  # the converted copy is opened, without reading the file again
    assert "Reading" not in capsys.readouterr().out
    assert instantiate_again.manifest["files"] == datamodule.dataset.manifest["files"]


def write_exorl(folder: Path, domain: str, episodes: int, steps: int) -> np.ndarray:
    """Random actions in the real domain, one file an episode; returns rewards [episodes, steps]."""
    env = BatchedMujocoEnv(domain, num_envs=episodes, num_threads=1, seed=0)
    env.set_seed(0)
    torch.manual_seed(0)
    rollout = env.rollout(steps)
    folder.mkdir(parents=True)

    def with_dummy(values: torch.Tensor) -> np.ndarray:
        values = values.numpy()
        return np.concatenate([np.full_like(values[:, :1], 9e9), values], axis=1)

    last = ("observation", "physics")
    series = {key: torch.cat([rollout[key], rollout["next", key][:, -1:]], 1).numpy() for key in last}
    series |= {"action": with_dummy(rollout["action"]), "reward": with_dummy(rollout["next", "reward"])}
    for episode in range(episodes):
        arrays = {key: values[episode] for key, values in series.items()}
        np.savez(folder / f"episode_{episode:06d}_{steps}.npz", discount=np.ones((steps + 1, 1), np.float32), **arrays)
    return rollout["next", "reward"].squeeze(-1).numpy()


def test_exorl(tmp_path, capsys):
    reward = write_exorl(tmp_path / "exorl" / "walker" / "rnd" / "buffer", "walker", episodes=4, steps=20)
    episode = "datamodule.environment.episode_length=15"
    module, datamodule = trained(
        tmp_path, "experiment=paper/fb_walker", f"+{episode}", "+datamodule.environment.num_threads=1"
    )
    assert "Reading 4 files" in capsys.readouterr().out
    assert len(datamodule.dataset) == 80
    # recomputed from physics and action, the rewards are the ones that the environment gave
    found = datamodule._rewards(datamodule.dataset.data, ["stand"])
    np.testing.assert_allclose(found[:, 0].numpy(), reward.flatten(), rtol=1e-5, atol=1e-6)
    (task,) = datamodule.evaluation_tasks(2)
    metrics = task.metrics(module.evaluate(task))
    assert set(metrics) == {f"default_reset/{name}/return" for name in ("stand", "walk", "run", "flip", "spin")}
    assert all(0 <= value <= 15 for values in metrics.values() for value in values)


def test_files_without_physics_are_one_sentence(tmp_path):
    folder = tmp_path / "exorl" / "walker" / "rnd" / "buffer"
    write_exorl(folder, "walker", episodes=1, steps=5)
    (file,) = folder.iterdir()
    with np.load(file) as arrays:
        kept = {key: arrays[key] for key in arrays if key != "physics"}
    np.savez(file, **kept)
    with pytest.raises(ValueError, match="The data set of walker has no physics"):
        trained(tmp_path, "experiment=paper/fb_walker")


def test_another_copy_is_read_again(tmp_path, capsys):
    folder = tmp_path / "exorl" / "cheetah" / "rnd" / "buffer"
    write_exorl(folder, "cheetah", episodes=2, steps=5)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", ["experiment=paper/fb_cheetah", f"data_root={tmp_path}"])
    read = instantiate(config.datamodule.dataset)
    assert (len(read()), len(read())) == (10, 10)
    assert capsys.readouterr().out.count("Reading") == 1
    (folder / "episode_000000_5.npz").unlink()
    assert len(read()) == 5
    assert capsys.readouterr().out.count("Reading") == 1


@pytest.mark.parametrize("environment", ["none", "overdrive"])
@pytest.mark.parametrize("method", ["actor_critic", "forward_backward"])
def test_own_files(method, environment, tmp_path):
    """Both kinds of methods, on a data set that a few lines make, with and without an environment of its own."""
    generator = np.random.default_rng(0)
    observation, action = generator.uniform(-1, 1, (200, 2)), generator.uniform(-1, 1, (200, 2))
    ends = np.arange(200) % 50 == 49
    arrays = {"observations": observation, "actions": action, "rewards": observation[:, 0], "physics": observation}
    np.savez(tmp_path / "mine.npz", terminals=np.zeros(200), timeouts=ends, **arrays)
    overrides = ["experiment=offline", f"datamodule.dataset.path={tmp_path / 'mine.npz'}", f"module={method}"]
    if environment == "overdrive":
        overrides += [
            "+datamodule.environment={_target_:datamodules.environments.overdrive.OverdriveEnv,_partial_:true}",
            "datamodule.protocols.default_reset.rewards=[centre]",
        ]
    module, datamodule = trained(tmp_path, *overrides, method=method)
    assert len(datamodule.dataset) == 196
    (task,) = datamodule.evaluation_tasks(2)
    metrics = task.metrics(module.evaluate(task))
    fitted = {"actor_critic": "data/td_loss", "forward_backward": "data/fb_loss"}[method]
    assert ("default_reset/centre/return" if environment == "overdrive" else fitted) in metrics
    assert all(np.isfinite(values).all() for values in metrics.values())
