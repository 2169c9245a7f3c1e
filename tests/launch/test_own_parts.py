"""Parts of one's own as the documentation shows them."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from callbacks.run_log import read_rows
from launch.recipes import rebuild_method

DOCS = Path(__file__).resolve().parents[2] / "docs"
SMALL = (
    "module.updates=40",
    "module.log_every=4",
    "module.critic.hidden_dim=16",
    "module.actor.network.hidden_dim=16",
    "datamodule.random_steps=60",
    "datamodule.evaluate_every=20",
    "datamodule.batch_size=16",
    "datamodule.episodes=1",
    "datamodule.curve_episodes=1",
    "datamodule.environment.size=25",
    "datamodule.environment.episode_length=52",
    "checkpoint_every=20",
    "callbacks=default",
)


@pytest.fixture(scope="module")
def documented(tmp_path_factory) -> tuple[str, list[str]]:
    """The page's module and the arguments of its last command."""
    page = (DOCS / "methods" / "pixels.md").read_text()
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_encoders.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    command = re.findall(r"```bash\nPYTHONPATH=\. python train\.py (.*?)```", page, re.DOTALL)[-1]
    return str(folder), shlex.split(command.replace("\\\n", " "))


def test_an_encoder_with_a_loss_of_its_own_learns(program, documented, monkeypatch, tmp_path):
    folder, arguments = documented
    monkeypatch.syspath_prepend(folder)
    finished = program(*arguments, *SMALL, f"output_root={tmp_path}")
    assert finished.code == 0, finished.err
    results = json.loads((finished.folder / "alix_cartpole" / "seed_0" / "results.json").read_text())
    assert results["provenance"]["versions"]["my_encoders"] == "unknown"  # a file in no repository
    _, rows = read_rows(finished.folder / "alix_cartpole" / "seed_0" / "train.csv")
    assert float(rows[-1]["encoder_loss"]) < 0.7 * float(rows[0]["encoder_loss"])


@pytest.fixture
def own_methods(monkeypatch, tmp_path) -> list[str]:
    """The files of the page, with transitions in FILE.npz, in the folder that is gone to; the commands."""
    page = (DOCS / "architecture.md").read_text()
    for name, text in re.findall(r"```\w+\n# ((?:my_methods|my_cloning|conf/\S+)\.\w+)\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    random = np.random.default_rng(0)
    observations = random.normal(size=(400, 3))
    actions = np.stack([np.tanh(observations[:, 0]), random.uniform(-1, 1, 400)], 1)
    rows = {"observations": observations, "actions": actions, "rewards": actions[:, 0]}
    np.savez(tmp_path / "FILE.npz", **rows, terminals=np.zeros(400), timeouts=np.arange(400) % 50 == 49)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return re.findall(r"```bash\nPYTHONPATH=\. python train\.py (--config-dir .*)\n```", page)


def test_a_method_from_nothing_learns_is_rebuilt_and_goes_on(program, own_methods, monkeypatch):
    (command,) = (each for each in own_methods if "cloning" in each)
    small = ("module.updates=400", "module.log_every=50", "datamodule.evaluate_every=200", "module.learning_rate=1e-2")
    finished = program(*shlex.split(command.replace("=FILE", "=FILE.npz")), *small)
    assert finished.code == 0, finished.err
    run = finished.folder / "cloning" / "seed_0"
    _, rows = read_rows(run / "train.csv")
    # of the two actions the first is a function of what is observed, the second is uniform noise, of variance 1/3
    assert 0.1 < float(rows[-1]["loss"]) < 0.19
    method, _ = rebuild_method(run / "checkpoints" / "last.ckpt", trust="my_cloning")
    observation = torch.tensor([[0.5, 0.0, 0.0]])
    acted = method.policy()(TensorDict({"observation": observation}, batch_size=[1]))["action"]
    assert abs(acted[0, 0] - 0.46) < 0.15
    longer = ("trust=my_cloning", "module.updates=600")
    finished = program(f"ckpt_path={finished.folder}", *longer)
    assert finished.code == 0, finished.err
    assert read_rows(run / "train.csv")[1][-1]["updates"] == "600"

    refused = program(*shlex.split(command.replace("=FILE", "=FILE.npz")), *small, "module.width=0")
    assert refused.code == 1
    assert "module.width=0: expected at least 1" in refused.err


def test_a_method_and_an_experiment_in_a_package_of_ones_own(program, own_methods, tmp_path):
    (command,) = (each for each in own_methods if "conservative" in each)
    small = (
        "module.updates=200",
        "module.log_every=50",
        "datamodule.evaluate_every=100",
        "module.critic.hidden_dim=32",
        "module.critic_learning_rate=3e-3",
        "module.actor_learning_rate=3e-3",
        "module.temperature=null",
    )
    finished = program(*shlex.split(command.replace("=FILE", "=FILE.npz")), *small)
    assert finished.code == 0, finished.err
    report = (finished.folder / "report.md").read_text()
    assert f"\nPYTHONPATH={tmp_path} python train.py 'hydra.searchpath=" in report
    gaps = {}
    for arm in ("conservative", "plain"):
        _, rows = read_rows(finished.folder / arm / "seed_0" / "train.csv")
        gaps[arm] = float(rows[-1]["value_gap"])
    assert not (finished.folder / "sac_n").exists()
    assert gaps["conservative"] < gaps["plain"] - 0.1
