"""Policies taken elsewhere, as docs/export.md shows it: its code is what is run here."""

import re

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from launch.experiments import CONFIGS

BLOCKS = re.findall(r"```python\n(.*?)```", (CONFIGS.parent / "docs" / "export.md").read_text(), re.DOTALL)
LOAD, PROGRAM, ELSEWHERE, WEIGHTS = BLOCKS[:4]
PLAIN = {block.splitlines()[0].split()[1].strip(","): block for block in BLOCKS[4:]}
SMALL = ("module.actor.network.hidden_dim=16", "module.critic.hidden_dim=16")
TINY = ("module.actor.hidden_dim=16", "module.forward_map.hidden_dim=16")
POLICIES = {
    "SAC": ("gpl_cheetah", SMALL, {"observation_shape": [17], "action_dim": 6}),
    "DrQ-v2": (
        "alix_cartpole",
        (*SMALL, "module.encoder.channels=4"),
        {"observation_shape": [9, 25, 25], "action_dim": 1},
    ),
    "FB": ("fb_humanoid", TINY, {"observation_shape": [67], "action_dim": 21}),
    "FB, the better of two": (
        "fb_humanoid",
        (*TINY, "module.evaluation_samples=2"),
        {"observation_shape": [67], "action_dim": 21},
    ),
}


def checkpoint(experiment: str, overrides: tuple[str, ...], spec: dict) -> dict:
    """Of a method with random weights, and of a datamodule that nothing could be made of."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", [f"experiment={experiment}", *overrides])
    torch.manual_seed(0)
    method = instantiate(config.module, **spec)
    module = OmegaConf.to_container(config.module, resolve=True)
    method.recipe = {
        "experiment": experiment,
        "spec": spec,
        "study": None,
        "module": module,
        "datamodule": {"_target_": "datamodules.x"},
    }
    with torch.no_grad():
        for state in method.state_dict().values():
            if state.is_floating_point():
                state += 0.1 * torch.rand_like(state)  # also statistics that observations are standardised by
    saved = {
        "state_dict": method.state_dict(),
        "optimizer_states": [optimizer.state_dict() for optimizer in method.configure_optimizers()],
        "lr_schedulers": [],
        "pytorch-lightning_version": "2",
    }
    method.on_save_checkpoint(saved)
    return saved


@pytest.mark.parametrize("kind", POLICIES)
def test_a_policy_is_the_same_elsewhere(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint(*POLICIES[kind]), "last.ckpt")
    here: dict = {}
    for block in (LOAD, PROGRAM, WEIGHTS):
        exec(block, here)
    shape = here["recipe"]["spec"]["observation_shape"]
    elsewhere = [{} for block in (ELSEWHERE, PLAIN.get(kind)) if block]
    for block, names in zip((ELSEWHERE, PLAIN.get(kind)), elsewhere):
        exec(block, names)
    for rows in (1, 5):
        pictures = torch.randint(256, (rows, *shape), dtype=torch.uint8)
        inputs = [pictures if len(shape) == 3 else torch.randn(rows, *shape)]
        if kind.startswith("FB"):
            inputs.append(torch.randn(rows, here["method"].backward_map.features))
        torch.manual_seed(1)
        expected = here["policy"](*inputs)
        assert expected.shape == (rows, here["recipe"]["spec"]["action_dim"])
        for there in elsewhere:
            torch.manual_seed(1)
            torch.testing.assert_close(there["act"](*inputs), expected, rtol=1e-5, atol=1e-5)
