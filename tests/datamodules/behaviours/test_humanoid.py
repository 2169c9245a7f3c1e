"""Shards of the humanoid data set: composition, reproducibility, most rows stay on their feet."""

import pytest
import torch
from tensordict import TensorDict

from datamodules.behaviours import humanoid
from datamodules.behaviours.humanoid import POSTURES, SOURCES, HumanoidBehaviours, build_repertoire, upright_start
from datamodules.environments.domains import HUMANOID
from datamodules.environments.simulation import BatchSimulation


@pytest.fixture(autouse=True)
def small_repertoire(monkeypatch: pytest.MonkeyPatch):
    """The named postures and few others: balancing them all takes seconds."""
    repertoire = build_repertoire(random_postures=2, moves_per_posture=1, stops=2)
    monkeypatch.setattr(humanoid, "build_repertoire", lambda: repertoire)
    return repertoire


def test_repertoire_moves_go_both_ways_and_reach_standing(small_repertoire: humanoid.Repertoire):
    moves = small_repertoire.moves
    assert small_repertoire.keys == len(POSTURES) + 2
    for (first, last), passed in moves.items():
        assert (passed[0], passed[-1]) == (first, last)
        assert moves[last, first] == passed[::-1]
    assert all((0, place) in moves for place in range(1, small_repertoire.keys))


def test_composition_shapes_and_reproducibility():
    behaviours = HumanoidBehaviours()
    first, again, other = (behaviours.episodes(20, seed, 50) for seed in (7, 7, 8))
    assert torch.bincount(first.source, minlength=len(SOURCES)).tolist() == [5, 11, 2, 2]
    assert first.physics.shape == (20, 55)
    assert first.physics.dtype == torch.float64
    assert torch.equal(first.physics, again.physics)
    data = TensorDict({"physics": first.physics}, [20])
    for _ in range(3):
        action = first.policy(data.clone())["action"]
        assert action.shape == (20, 21)
        assert action.dtype == torch.float32
        assert torch.equal(action, again.policy(data.clone())["action"])
    assert not torch.equal(action, other.policy(data.clone())["action"])


@pytest.mark.parametrize("name", SOURCES)
def test_one_behaviour_alone(name: str):
    episodes = HumanoidBehaviours({name: 1.0}).episodes(3, 0, 40)
    assert (episodes.source == SOURCES.index(name)).all()
    assert episodes.policy(TensorDict({"physics": episodes.physics}, [3]))["action"].shape == (3, 21)


def test_unknown_behaviour_is_named():
    with pytest.raises(ValueError, match="'fly'"):
        HumanoidBehaviours({"fly": 1.0})


def test_schedules_increase_and_cover_the_episode():
    balancing = HumanoidBehaviours({"move": 1.0}).episodes(30, 1, 500).policy.module.balancing
    assert (balancing.times.diff(dim=1) > 0).all()
    assert (balancing.times[:, -1] >= 500).all()


def test_moving_rows_mostly_stay_up():
    simulation = BatchSimulation(HUMANOID, num_threads=2)
    episodes = HumanoidBehaviours({"hold": 0.3, "move": 0.7}, max_noise=0.1).episodes(16, 2, 200)
    physics = episodes.physics.numpy()
    for _ in range(200):
        action = episodes.policy(TensorDict({"physics": torch.from_numpy(physics)}, [16]))["action"]
        physics, _, _ = simulation.advance(physics, simulation.control(action.numpy()), HUMANOID.substeps)
    head = HUMANOID.measurements["head_height"].read(simulation.snapshot(physics, action.double().numpy()))
    assert (head > 0.9).float().mean() > 0.85


def test_upright_start_stands():
    simulation = BatchSimulation(HUMANOID, num_threads=1)
    physics = upright_start(simulation, 5, torch.Generator().manual_seed(0))
    snapshot = simulation.snapshot(physics, torch.zeros(5, 21).numpy())
    assert (HUMANOID.measurements["head_height"].read(snapshot) > 1.4).all()
    assert (HUMANOID.measurements["torso_upright"].read(snapshot) > 0.99).all()
