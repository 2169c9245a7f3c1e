"""The humanoid data set: who drove its rows, and what is kept of them."""

import pytest
import torch
from hydra import compose, initialize_config_dir

from datamodules.behaviours import humanoid
from datamodules.behaviours.humanoid import build_repertoire
from datamodules.stored.humanoid import humanoid_dataset
from launch.experiments import CONFIGS


@pytest.fixture(autouse=True)
def small_repertoire(monkeypatch):
    repertoire = build_repertoire(random_postures=2, moves_per_posture=1, stops=2)
    monkeypatch.setattr(humanoid, "build_repertoire", lambda: repertoire)


def test_rows_balance_and_walk_side_by_side(tmp_path):
    settings = {"shards": 1, "rows": 6, "steps": 60, "shares": {"hold": 1.0, "walk": 2.0}}
    data = humanoid_dataset(str(tmp_path), **settings)
    assert data.data["source"].bincount().tolist() == [120, 0, 0, 0, 240]
    velocity = data.data["next", "physics"][:, 28:31].norm(dim=1)
    held, walked = (velocity[data.data["source"] == source] for source in (0, 4))
    assert walked.mean() > 3 * held.mean()
    again = humanoid_dataset(str(tmp_path), **settings)
    assert torch.equal(again.data["action"], data.data["action"])
    assert set(data.manifest["recipe"]["policies"]) == {"walk_late", "backward_late", "run_late"}


def test_shares_of_what_nobody_does_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^shares.fly: expected one of hold, move, .*, walk, rise, found another"):
        humanoid_dataset(str(tmp_path), shares={"fly": 1.0})


def test_data_of_more_and_of_less_are_composed_by_their_names():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        rises, balances = (
            compose("train", ["experiment=fb_humanoid", *more]).datamodule.dataset
            for more in ([], ["datamodule/dataset=humanoid_balance"])
        )
    assert set(balances.shares) == {"hold", "move", "explore_upright", "explore_floor"}
    assert set(rises.shares) == {*balances.shares, "walk", "rise"}
    assert balances.max_noise == rises.max_noise == 0.5
