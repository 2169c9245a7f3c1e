import pytest
import torch

from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.stored.trained import trained_dataset

POLICIES = {"run": ["run_early", "run_late"], "walk": ["walk_late"]}
SMALL = {"shards": 2, "rows": 2, "steps": 50}


def test_every_policy_drives_as_many_episodes_under_the_name_of_its_source(tmp_path):
    data = trained_dataset(str(tmp_path), "walker", POLICIES, **SMALL)
    assert (len(data), data.episodes, data.domain) == (600, 12, "walker")
    assert data.manifest["sources"] == ["run", "walk"]
    assert data.data["source"].view(12, 50)[:, 0].tolist() == 2 * [0, 0, 0, 0, 1, 1]
    run = data.chosen(["run"], None, 0)
    assert (run.episodes, run.data["source"].unique().tolist()) == (8, [0])
    env = BatchedMujocoEnv("walker", num_threads=1)
    rewards = env.rewards(env.measure(run.data), ["run"])
    assert torch.equal(run.rewarded(rewards, "run").data["next", "reward"], rewards)
    assert rewards.std() > 0


def test_other_policies_are_other_data(tmp_path):
    trained_dataset(str(tmp_path), "walker", POLICIES, **SMALL)
    trained_dataset(str(tmp_path), "walker", POLICIES, **SMALL)
    trained_dataset(str(tmp_path), "walker", {"run": ["run_late"]}, **SMALL)
    turned = trained_dataset(str(tmp_path), "walker", dict(reversed(POLICIES.items())), **SMALL)
    assert turned.manifest["sources"] == ["walk", "run"]
    assert turned.chosen(["walk"], None, 0).episodes == 4
    assert len(list(tmp_path.glob("walker-trained-*[0-9a-f]"))) == 3
    with pytest.raises(
        FileNotFoundError, match=r"jump_late.safetensors: expected a policy that ships with the project"
    ):
        trained_dataset(str(tmp_path), "walker", {"jump": ["jump_late"]}, **SMALL)
