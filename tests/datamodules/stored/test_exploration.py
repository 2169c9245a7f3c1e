import pytest
import torch

from datamodules.behaviours.exploration import KINDS
from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.domains import DOMAINS
from datamodules.environments.tasks import TASKS
from datamodules.stored.exploration import exploration_dataset

SMALL = {"shards": 1, "rows": 16, "steps": 10}


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_explores(domain, tmp_path):
    dataset = exploration_dataset(str(tmp_path), domain, **SMALL)
    env = BatchedMujocoEnv(domain, num_threads=1)
    assert dataset.domain == domain
    assert (len(dataset), dataset.episodes) == (160, 16)
    assert dataset.observation_dim == env.observation_spec["observation"].shape[-1]
    assert dataset.data["action"].abs().max() <= 1
    assert set(dataset.data["source"].unique().tolist()) == set(range(len(KINDS)))
    rewards = env.rewards(env.measure(dataset.data), list(TASKS[domain]))
    assert rewards.isfinite().all()
    first = rewards[:, :1]
    torch.testing.assert_close(first, dataset.data["next", "reward"])


def test_starts_anywhere_in_the_maze(tmp_path):
    """The suite starts in the top-left room only; random actions from there would never see the others."""

    def rooms(starts: str) -> set[tuple[bool, bool]]:
        data = exploration_dataset(str(tmp_path), "point_mass_maze", starts=starts, **SMALL).data
        return {(x > 0, y > 0) for x, y in data["observation"][::10, :2].tolist()}

    assert rooms("suite") == {(False, True)}
    assert len(rooms("anywhere")) == 4


def test_settings_name_the_folder(tmp_path):
    exploration_dataset(str(tmp_path), "walker", **SMALL)
    exploration_dataset(str(tmp_path), "walker", **SMALL)
    assert len(list(tmp_path.glob("walker-exploration-*"))) == 1
    exploration_dataset(str(tmp_path), "walker", **{**SMALL, "steps": 9})
    assert len(list(tmp_path.glob("walker-exploration-*"))) == 2
    with pytest.raises(ValueError, match="Unknown starts='nowhere': expected one of suite, anywhere"):
        exploration_dataset(str(tmp_path), "walker", starts="nowhere", **SMALL)
