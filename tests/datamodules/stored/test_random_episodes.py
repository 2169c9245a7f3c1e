from functools import partial
from types import SimpleNamespace

import pytest
import torch

from datamodules.environments.pixel_control import PixelControlEnv
from datamodules.environments.zero_value import ZeroValueEnv
from datamodules.stored.random_episodes import RandomEpisodesDataModule, discounted_returns, random_episodes

ENVIRONMENT = partial(PixelControlEnv, "cartpole", "balance", size=24, episode_length=24)


def made(**settings) -> RandomEpisodesDataModule:
    defaults = {"batch_size": 8, "updates_per_step": 2, "evaluate_every": 10, "training_episodes": 2, "scored": 20}
    data = RandomEpisodesDataModule(**{"environment": ENVIRONMENT, **defaults, **settings})
    learner = SimpleNamespace(device=torch.device("cpu"), updates=4, total_updates=30)
    data.trainer = SimpleNamespace(lightning_module=learner)
    return data


def test_returns_by_brute_force():
    reward = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(0))
    returns = discounted_returns(reward, 0.9)
    for t in range(6):
        expected = sum(0.9 ** (k - t) * reward[:, k] for k in range(t, 6))
        torch.testing.assert_close(returns[:, t], expected)


def test_transitions_carry_what_followed():
    data = made(n_step=3, discount=0.9)
    episodes = random_episodes(ENVIRONMENT(num_envs=3, seed=data.seed), torch.Generator().manual_seed(data.seed), 0.9)
    assert episodes.shape == (3, 11)  # twelve decisions, and nothing follows on the last
    batch = data.sample(data.training, (200,), torch.Generator().manual_seed(1))
    training = episodes[:2]
    for transition in batch:
        matches = (training["action"] == transition["action"]).all(-1).nonzero()
        ((row, t),) = matches.tolist()
        reward = training["next", "reward"][row, :, 0]
        assert t <= 8
        assert torch.equal(transition["observation"], training["observation"][row, t])
        assert torch.equal(transition["next", "observation"], training["next", "observation"][row, t + 2])
        assert torch.equal(transition["next", "action"], training["next", "action"][row, t + 2])
        expected = reward[t] + 0.9 * reward[t + 1] + 0.81 * reward[t + 2]
        torch.testing.assert_close(transition["next", "reward"][0], expected)
        assert torch.equal(transition["return"], training["return"][row, t])
        assert not transition["next", "terminated"]
    assert torch.equal(training["next", "action"][:, :-1], training["action"][:, 1:])


def test_data_and_batches_are_functions_of_the_seed():
    first, second, other = made(), made(), made(seed=1)
    stacks = [list(data.train_dataloader()) for data in (first, second, other)]
    assert len(stacks[0]) == 3  # updates 4, 6 and 8 of two batches each
    assert stacks[0][0].shape == (2, 8)
    for one, another, different in zip(*stacks):
        assert (one == another).all()
        assert not torch.equal(one["action"], different["action"])
    assert (first.probe(5) == second.probe(5)).all()


def test_episodes_are_collected_once_for_the_arms_of_a_seed(monkeypatch):
    collected = []
    made_by = "datamodules.stored.random_episodes.random_episodes"
    monkeypatch.setattr(made_by, lambda *_: collected.append(1) or object())
    shorter = partial(ENVIRONMENT, episode_length=20)
    for other in ({"seed": 4}, {"discount": 0.5}, {"training_episodes": 3}, {"environment": shorter}):
        first = made(seed=3)._episodes
        count = len(collected)
        assert made(seed=3, targets="monte_carlo")._episodes is first
        assert len(collected) == count
        assert made(**{"seed": 3, **other})._episodes is not first
        assert len(collected) == count + 1


def test_policies_made_of_the_data_are_evaluated_where_protocols_say():
    data = made(protocols={"default_reset": {"rewards": ["reward"]}}, episodes=3, curve_episodes=2)
    assert [len(loader()) for loader in (made().test_dataloader, data.test_dataloader)] == [2, 3]
    assert (list(data.val_dataloader())[-1].episodes, list(data.test_dataloader())[-1].episodes) == (2, 3)
    (returns,) = data.references()["random policy"].values()
    assert len(returns) == 3
    assert made().references() == {}
    data.choose_tasks("default_reset", "2 * reward")
    assert [task.name for task in data.test_dataloader()] == ["default_reset"]
    with pytest.raises(ValueError, match="reward=reward: expected an experiment that rolls out a policy, found one of"):
        made().choose_tasks(reward="reward")


def test_the_control_has_a_loss_of_its_own_name():
    held_out, _ = made(targets="monte_carlo").val_dataloader()
    result = {"td_loss": torch.tensor(0.5), "q_std": torch.tensor(1.0)}
    assert held_out.metrics(result) == {"held_out/supervised_loss": [0.5]}


def test_control_regresses_on_standardised_returns_and_ends_there():
    data, sarsa = made(targets="monte_carlo"), made()
    batch = data.sample(data.training, (2000,), torch.Generator().manual_seed(1))
    assert batch["next", "terminated"].all()
    assert torch.equal(batch["next", "reward"], batch["return"])
    assert abs(batch["return"].mean()) < 0.1
    assert batch["return"].std().item() == pytest.approx(1, abs=0.1)
    assert not sarsa.probe(50)["next", "terminated"].any()


def test_scores_are_of_held_out_and_of_training_transitions():
    data = made()
    held_out, training = data.val_dataloader()
    assert (held_out.name, training.name) == ("held_out", "training")
    actions = {tuple(action.tolist()) for action in data.training._steps.data["action"].flatten(0, 1)}
    assert all(tuple(action.tolist()) in actions for action in training.transitions["action"])
    assert not any(tuple(action.tolist()) in actions for action in held_out.transitions["action"])
    assert held_out.metrics({"loss": torch.tensor(0.5)}) == {"held_out/loss": [0.5]}


def test_settings_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match="Unknown targets='td': expected one of sarsa, monte_carlo"):
        made(targets="td")


def test_episodes_of_several_lengths_are_refused():
    env = ZeroValueEnv(num_envs=3, seed=0)
    step = env._step

    def uneven(tensordict):
        result = step(tensordict)
        result["truncated"][1] = True
        result["done"][1] = True
        return result

    env._step = uneven
    with pytest.raises(ValueError, match="expected episodes of one length, some ended after 1 steps"):
        random_episodes(env, torch.Generator().manual_seed(0), 0.9)
