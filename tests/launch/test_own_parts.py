"""Parts of one's own as the documentation shows them."""

import json
import re
import shlex
from pathlib import Path

import pytest

from callbacks.run_log import read_rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "pixels.md"
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
    page = PAGE.read_text()
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
