import json

import pytest
import torch
from safetensors.torch import save_file

from datamodules.behaviours.trained import BEHAVIOURS, TrainedPolicies, load_policy
from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.domains import DOMAINS

BODIES = sorted({path.parent.name for path in BEHAVIOURS.glob("*/*.safetensors")})


@pytest.mark.parametrize("body", BODIES)
def test_what_ships_is_what_the_manifest_says(body):
    path = BEHAVIOURS / body / "manifest.json"
    manifest = json.loads(path.read_text())
    files = sorted(file.stem for file in path.parent.glob("*.safetensors"))
    assert files == sorted(manifest)
    assert body in DOMAINS
    env = BatchedMujocoEnv(body, num_threads=1)
    observation = env.reset()["observation"]
    for name, made in manifest.items():
        assert made["command"].startswith("python train.py experiment=")
        assert "/" not in made["command"]
        assert made["seed"] >= 0
        assert made["updates"] > 0
        assert made["scores"]
        file = path.parent / f"{name}.safetensors"
        assert file.stat().st_size < 250_000
        policy = load_policy(file)
        assert policy.explore(observation).shape == env.action_spec.shape


def test_shipped_policies_do_what_they_learned():
    """An episode of each for each of the tasks, from the suite's starts."""
    policies = TrainedPolicies([BEHAVIOURS / f"walker/{task}_late.safetensors" for task in ("run", "walk", "spin")], 2)
    env = BatchedMujocoEnv("walker", num_envs=6, seed=3)
    tasks, returns = ["run", "walk", "spin"], torch.zeros(6, 3)
    torch.manual_seed(0)
    state = env.reset()
    for _ in range(1000):
        state["action"] = policies(state["observation"])
        state = env.step(state)["next"]
        returns += env.rewards(state["measurements"], tasks)
    run, walk, spin = returns.unflatten(0, (3, 2)).mean(1)
    assert run[0] > 350
    assert walk[1] > 800
    assert spin[2] > 800


def test_rows_are_driven_by_their_own_policy(tmp_path):
    paths = [BEHAVIOURS / "walker" / f"{name}.safetensors" for name in ("run_early", "walk_late")]
    observation = torch.randn(6, 24)
    torch.manual_seed(0)
    actions = TrainedPolicies(paths, 3)(observation)
    torch.manual_seed(0)
    expected = [load_policy(path).explore(observation[rows]) for path, rows in zip(paths, (slice(3), slice(3, 6)))]
    assert torch.equal(actions, torch.cat(expected))


def test_files_that_are_no_policies_are_refused(tmp_path):
    whole = (BEHAVIOURS / "walker/run_early.safetensors").read_bytes()
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"a.safetensors: expected a policy's weights, found none"):
        load_policy(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a.safetensors: expected a policy's weights, found a damaged file"):
        load_policy(path)
    for state in ({"critic.weight": torch.ones(2, 2)}, {"actor.network.0.weight": torch.ones(1, 3, 4)}):
        save_file(state, path)
        with pytest.raises(ValueError, match=r"a.safetensors: expected the weights of a tanh-Gaussian actor, found"):
            load_policy(path)
    state = load_policy(BEHAVIOURS / "walker/run_early.safetensors").state_dict()
    save_file({f"actor.{name}": torch.full_like(value, torch.nan) for name, value in state.items()}, path)
    with pytest.raises(ValueError, match=r"a.safetensors: expected finite weights"):
        load_policy(path)
