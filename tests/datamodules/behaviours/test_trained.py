import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from components.control.actors import ActorPolicy, DeterministicActor, GaussianActor, NormalActor
from components.control.normalisation import ObservationNormaliser
from components.networks.encoders import FlatObservations, StandardisedObservations
from components.networks.ensemble import EnsembleMLP
from components.networks.equivariant import ReflectedNetwork, Reflection
from datamodules.behaviours.trained import BEHAVIOURS, TrainedPolicies, load_policy, policy_settings, save_policy
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
    state = env.reset()
    observation = state["observation"]
    for name, made in manifest.items():
        assert made["command"].startswith("python train.py experiment=")
        assert "/" not in made["command"].replace(f"{BEHAVIOURS.name}/{body}/", "")  # of no machine but with what ships
        assert made["seed"] >= 0
        assert made["updates"] > 0
        assert made["scores"]
        file = path.parent / f"{name}.safetensors"
        assert file.stat().st_size < 250_000
        seen, told = observation, policy_settings(file)
        if told:  # measurements by name, a command of three numbers and a clock of two
            measured = [state["measurements"][:, env.columns[each]] for each in told["observes"]]
            seen = torch.cat([*measured, torch.zeros(1, 5)], 1)
        assert load_policy(file)(seen).shape == env.action_spec.shape


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
    policies, alone = TrainedPolicies(paths, 3), [load_policy(path) for path in paths]
    torch.manual_seed(0)
    actions = policies(observation)
    torch.manual_seed(0)
    expected = [policy(observation[rows]) for policy, rows in zip(alone, (slice(3), slice(3, 6)))]
    assert torch.equal(actions, torch.cat(expected))


def test_what_was_saved_is_loaded_whatever_its_depth_and_noise(tmp_path):
    actor = GaussianActor(4, 2, partial(EnsembleMLP, hidden_dim=8, layers=6, last_gain=1.0), log_std_range=(-3.0, 0.0))
    save_policy(ActorPolicy(FlatObservations([4]), actor, "explore"), tmp_path / "a.safetensors")
    loaded, observation = load_policy(tmp_path / "a.safetensors"), torch.randn(5, 4)
    ours, theirs = actor(observation), loaded.actor(observation)
    assert torch.equal(ours.mean, theirs.mean)
    assert torch.equal(ours.std, theirs.std)


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
        with pytest.raises(
            ValueError, match=r"a.safetensors: expected a tanh-Gaussian or normal actor of linear layers alone"
        ):
            load_policy(path)
    state = load_policy(BEHAVIOURS / "walker/run_early.safetensors").state_dict()
    metadata = {"actor": "tanh-Gaussian", "log_std_range": "[-10.0, 2.0]"}
    save_file({name: torch.full_like(value, torch.nan) for name, value in state.items()}, path, metadata)
    with pytest.raises(ValueError, match=r"a.safetensors: expected finite weights"):
        load_policy(path)


@pytest.mark.parametrize(
    "policy",
    [
        ActorPolicy(FlatObservations([4]), DeterministicActor(4, 6), "explore"),
        ActorPolicy(FlatObservations([4]), GaussianActor(4, 2, partial(EnsembleMLP, layer_norm=True)), "explore"),
        ActorPolicy(StandardisedObservations([4]), GaussianActor(4, 2), "explore"),
    ],
)
def test_policies_that_could_not_be_loaded_are_not_saved(policy, tmp_path):
    with pytest.raises(
        ValueError, match=r"^The policy of .*: expected a tanh-Gaussian or normal actor of linear layers alone"
    ):
        save_policy(policy, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reflected", [True, False])
def test_normal_actors_come_back_with_reflection_normaliser_and_what_they_were_told(tmp_path, reflected):
    network = partial(EnsembleMLP, hidden_dim=8, layers=3, activation="silu", last_gain=1.0)
    if reflected:
        sides = Reflection([1, 0, 2, 3], [1.0, 1.0, -1.0, 1.0]), Reflection([1, 0], [1.0, 1.0])
        network = partial(ReflectedNetwork, inputs=sides[0], outputs=sides[1], network=network)
    actor = NormalActor(4, 2, network, std=0.3, squash=True)
    normaliser = ObservationNormaliser([4], bound=2.0, eps=1e-3)
    normaliser.merge(3 * torch.randn(100, 4) + 1)
    policy = ActorPolicy(nn.Sequential(normaliser, FlatObservations([4])), actor, "explore")
    save_policy(policy, tmp_path / "a.safetensors", {"observes": ["height"], "cadence": [0.5, 1.0]})
    observation = 5 * torch.randn(6, 4)
    for use in ("act", "explore"):
        policy.use, loaded = use, load_policy(tmp_path / "a.safetensors", use)
        torch.manual_seed(1)
        expected = policy(observation)
        torch.manual_seed(1)
        assert torch.equal(loaded(observation), expected)
    assert policy_settings(tmp_path / "a.safetensors") == {"observes": ["height"], "cadence": [0.5, 1.0]}
    assert policy_settings(BEHAVIOURS / "walker/run_late.safetensors") == {}
    if reflected:
        metadata = {"actor": "normal", "squash": "true", "activation": '"silu"', "inputs": "[[0, 0], [1, 1]]"}
        save_file(policy.state_dict(), tmp_path / "b.safetensors", metadata)
        with pytest.raises(
            ValueError, match=r"b.safetensors: expected a tanh-Gaussian or normal actor of linear layers"
        ):
            load_policy(tmp_path / "b.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "c.safetensors", {"told": "[]"})
    with pytest.raises(ValueError, match=r"c.safetensors: expected what its policy was told as a mapping"):
        policy_settings(tmp_path / "c.safetensors")
