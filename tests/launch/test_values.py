"""Configuration values against what they are given to."""

from typing import TYPE_CHECKING, NamedTuple

import pytest
from omegaconf import OmegaConf

from launch.values import check_values

if TYPE_CHECKING:
    from nowhere import Unknown


class Annotated:
    """Has an annotation that only type checkers can read."""

    def __init__(self, size: int, other: "Unknown" = None) -> None: ...


class Pair(NamedTuple):
    first: int
    second: int


class Made:
    def __new__(cls, size: int) -> "Made":
        return super().__new__(cls)


class Open(Annotated):
    def __init__(self, **rest: object) -> None: ...


ENVIRONMENT = "datamodules.environments.batched_mujoco.BatchedMujocoEnv"


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        (f"{__name__}.Annotated", {"size": 1, "other": 2}),
        (f"{__name__}.Pair", {"first": 1, "second": 2}),
        (f"{__name__}.Made", {"size": 1}),
        (f"{__name__}.Open", {"anything": 1}),
        ("fractions.Fraction", {"numerator": 1, "denominator": 2}),
        ("torch.utils.data.DataLoader", {"dataset": [], "batch_size": 2}),
        ("builtins.dict", {"anything": 1}),
        (ENVIRONMENT, {"domain": "cheetah", "task": "run", "action_repeat": 2}),
    ],
)
def test_what_is_taken_is_not_refused(target, arguments):
    check_values(OmegaConf.create({"part": {"_target_": target, "_partial_": True, **arguments}}))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (f"{__name__}.Annotated", r"part.zip: expected what Annotated takes \(size, other\), found zip"),
        (f"{__name__}.Pair", r"part.zip: expected what Pair takes \(first, second\), found zip"),
        (ENVIRONMENT, r"part.zip: expected what BatchedMujocoEnv takes \(domain, task, "),
    ],
)
def test_what_is_not_taken_is_named(target, message):
    with pytest.raises(ValueError, match=message):
        check_values(OmegaConf.create({"part": {"_target_": target, "_partial_": True, "zip": 3}}))
