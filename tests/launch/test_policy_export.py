"""Policies that a run leaves behind at moments of it."""

import json

import torch

from datamodules.behaviours.trained import load_policy
from launch.checkpoints import load_checkpoint

SMALL = (
    "experiment=walker_behaviours",
    *(f"~arms.{arm}" for arm in ("run", "walk", "stand", "spin")),
    "callbacks.films=null",
    "callbacks.policy_export.stages={early: 4, middle: 8, late: 8}",
    "module.updates=8",
    "module.log_every=4",
    "module.critic.hidden_dim=8",
    "module.actor.network.hidden_dim=8",
    "datamodule.random_steps=16",
    "datamodule.replay_capacity=1000",
    "datamodule.batch_size=8",
    "datamodule.evaluate_every=4",
    "datamodule.episodes=1",
    "datamodule.curve_episodes=1",
    "checkpoint_every=4",
)


def test_policies_of_stages_are_kept_with_how_they_were_made(program, tmp_path):
    finished = program(*SMALL, f"output_root={tmp_path}")
    assert finished.code == 0, finished.err
    folder = finished.folder / "policies" / "seed_0"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert list(manifest) == ["explore_early", "explore_late", "explore_middle"]
    assert [made["updates"] for made in manifest.values()] == [4, 8, 8]
    late = manifest["explore_late"]
    assert late["command"].startswith("python ")
    assert late["seed"] == 0
    assert late["env_steps"] > 0
    assert "default_reset/run/return" in late["scores"]
    saved = load_checkpoint(finished.folder / "explore" / "seed_0" / "checkpoints" / "last.ckpt")["state_dict"]
    for name, weight in load_policy(folder / "explore_late.safetensors").state_dict().items():
        assert torch.equal(weight, saved[name])
    early = load_policy(folder / "explore_early.safetensors").state_dict()
    assert any(not torch.equal(weight, saved[name]) for name, weight in early.items())
    assert (saved["intrinsic_reward.count"], "intrinsic_reward.predictor.0.weight" in saved) == (64, True)


def test_stages_come_with_evaluations(program, tmp_path):
    refused = program(*SMALL, f"output_root={tmp_path}", "callbacks.policy_export.stages={early: 2}")
    assert refused.code == 1
    assert "callbacks.policy_export.stages.early=2: expected a multiple of datamodule.evaluate_every=4" in refused.err
    refused = program(*SMALL, f"output_root={tmp_path}", "callbacks.policy_export.stages={late: 12}")
    assert "stages.late=12: expected a multiple of datamodule.evaluate_every=4 up to module.updates=8" in refused.err
    refused = program(*SMALL, f"output_root={tmp_path}", "module.critic.hidden_dim=8", "module/actor=deterministic")
    assert (
        "The policy of DeterministicActor: expected a tanh-Gaussian or normal actor of linear layers alone"
        in refused.err
    )
