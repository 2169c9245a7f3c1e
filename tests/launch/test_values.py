"""Configuration values against what they are given to."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from components.checks import Count, Positive, Share, Size, checked
from launch.errors import CommandLineError
from launch.values import check_values, whole_keys

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


@checked
class Ranged:
    def __init__(
        self,
        share: Share = 0.5,
        count: Count | None = None,
        scale: Positive = 1.0,
        sizes: Sequence[Size] = (),
        shares: Mapping[str, Share] | None = None,
        part: Callable[..., object] | None = None,
        parts: Sequence["Ranged"] = (),
    ) -> None: ...


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
        (f"{__name__}.Annotated", r"part.zip: expected what Annotated takes \(one of size, other\), found zip"),
        (f"{__name__}.Pair", r"part.zip: expected what Pair takes \(one of first, second\), found zip"),
        (ENVIRONMENT, r"part.zip: expected what BatchedMujocoEnv takes \(one of domain, task, "),
    ],
)
def test_what_is_not_taken_is_named(target, message):
    with pytest.raises(ValueError, match=message):
        check_values(OmegaConf.create({"part": {"_target_": target, "_partial_": True, "zip": 3}}))


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        (f"{__name__}.Ranged", {"share": 2}, r"part.inner.share=2: expected at most 1\."),
        (f"{__name__}.Ranged", {"share": None}, r"part.inner.share=null: expected a number\."),
        (f"{__name__}.Ranged", {"count": 0}, r"part.inner.count=0: expected at least 1\."),
        (f"{__name__}.Ranged", {"count": "two"}, r"part.inner.count=two: expected a whole number or null\."),
        (f"{__name__}.Ranged", {"sizes": [1, 0]}, r"part.inner.sizes\[1\]=0: expected at least 1\."),
        (f"{__name__}.Ranged", {"part": 3}, r"part.inner.part=3: expected a part with its _target_ or null\."),
        (
            f"{__name__}.Ranged",
            {"part": {"share": 1}},
            r"part.inner.part=.*: expected a part with its _target_ or null; part.inner.part=null leaves it out\.",
        ),
        (
            "components.control.actors.DeterministicActor",
            {"network": None},
            r"part.inner.network=null: expected a part w.*",
        ),
        (
            "lightning_modules.actor_critic.ActorCritic",
            {"temperature": {"initial": 0.1}},
            r"part.inner.temperature=.*_target_ or null; part.inner.temperature=null leaves it out\.",
        ),
        (
            "lightning_modules.actor_critic.ActorCritic",
            {"pessimism": 3},
            r"part.inner.pessimism=3: expected a part w.*",
        ),
        (f"{__name__}.Ranged", {"sizes": "12"}, r"part.inner.sizes=12: expected a list\."),
        (f"{__name__}.Ranged", {"shares": 3}, r"part.inner.shares=3: expected KEY: VALUE pairs, .* or null\."),
        (f"{__name__}.Ranged", {"shares": {"a": -1}}, r"part.inner.shares.a=-1: expected at least 0\."),
        (f"{__name__}.Ranged", {"share": "${protocol.share}"}, r"protocol.share=7: expected at most 1\."),
        (f"{__name__}.Ranged", {"sizes": "${protocol.sizes}"}, r"protocol.sizes\[0\]=0: expected at least 1\."),
        ("torch.optim.AdamW", {"lr": float("nan")}, r"part.inner.lr=nan: expected a finite number\."),
        ("torch.optim.SGD", {"momentum": 1}, r"part.inner.momentum=1: expected less than 1\."),
        ("lightning.Trainer", {"max_epochs": 0}, r"part.inner.max_epochs=0: expected -1\."),
        ("lightning.Trainer", {"devices": -2}, r"part.inner.devices=-2: expected at least -1\."),
        ("lightning.Trainer", {"devices": [0, -1]}, r"part.inner.devices\[1\]=-1: expected at least 0\."),
    ],
)
def test_numbers_out_of_their_range_are_named_by_the_key_that_sets_them(target, arguments, message):
    part = {"inner": {"_target_": target, "_partial_": True, **arguments}}
    config = OmegaConf.create({"protocol": {"share": 7, "sizes": [0]}, "part": part})
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_values(config)


def test_what_is_built_for_a_number_is_no_number_yet():
    scale = {"_target_": "components.control.weighting.sqrt_scaled", "beta": 1.0, "features": 4}
    check_values(OmegaConf.create({"part": {"_target_": f"{__name__}.Ranged", "scale": scale}}))


NAMES = """
step: 5
shared: 0.5
module:
  updates: 122
  updates_per_step: ${data.updates_per_step}
  rate: ${data.rate}
  actor: {size: 8, kind: left}
  critic: {size: 8, blocks: 3, none: null}
data:
  updates_per_step: ${step}
  rate: ${shared}
  classes: [1, 2]
  missing: ???
"""


@pytest.mark.parametrize(
    ("text", "near", "expected"),
    [
        ("updates=122 is no multiple of updates_per_step=5.", "module", "module.updates=122 is no multiple of step=5."),
        ("Unknown kind='left': expected right", "module", "Unknown module.actor.kind='left': expected right"),
        ("rate=0.5, blocks=3", "", "shared=0.5, module.critic.blocks=3"),
        ("size=8: expected 7", "module.critic", "module.critic.size=8: expected 7"),
        ("size=8: expected 7", "module", "size=8: expected 7"),  # of which of the two nobody knows
        ("updates=12: expected 7", "module", "updates=12: expected 7"),  # another number
        ("updates=122.5: expected 7", "module", "updates=122.5: expected 7"),
        ("none=null and classes=[1, 2]", "", "module.critic.none=null and data.classes=[1, 2]"),
        ("critic.blocks=3, a/step=5, other=1", "", "critic.blocks=3, a/step=5, other=1"),
    ],
)
def test_what_is_refused_is_named_by_the_keys_that_set_it(text, near, expected):
    config = OmegaConf.create(NAMES)
    cause = ValueError(text)
    error = InstantiationException(f"Error in call to target\nfull_key: {near}") if near else cause
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"), whole_keys(config):
        raise error from (cause if near else None)


def test_other_errors_are_left_as_they_are():
    for error in (RuntimeError("updates=122"), FileNotFoundError("updates=122"), CommandLineError("updates=122")):
        with pytest.raises(type(error), match=r"^updates=122$"), whole_keys(OmegaConf.create(NAMES)):
            raise error


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("my_rules_nowhere.Rule", "my_rules_nowhere (installed, or on PYTHONPATH)"),
        ("my_rules_here.Rule", "another_nowhere (installed, or on PYTHONPATH)"),
    ],
)
def test_a_package_that_is_missing_is_looked_for_where_it_may_be(target, found, tmp_path, monkeypatch):
    (tmp_path / "my_rules_here.py").write_text("import another_nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=rf"^part\._target_={target}: expected the package {re.escape(found)}"):
        check_values(OmegaConf.create({"part": {"_target_": target}}))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_rules_there.Trimed", "expected something in my_rules_there, found no Trimed"),
        ("my_rules_there.more.Rule", "expected something in my_rules_there, found no more"),
        ("components.control.pessimism.Nope", "expected something in components.control.pessimism, found no Nope"),
        ("components.nope.Rule", "expected something in components, found no nope"),
    ],
)
def test_of_a_package_that_is_there_it_is_said_what_it_lacks(target, message, tmp_path, monkeypatch):
    (tmp_path / "my_rules_there.py").write_text("class Trimmed: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=rf"^part\._target_={target}: {message}\.$"):
        check_values(OmegaConf.create({"part": {"_target_": target}}))


@pytest.mark.parametrize(
    ("calling", "message"),
    [
        ({"_partial_": 5}, "part._partial_: expected true or false, found 5."),
        ({"_partial_": None}, "part._partial_: expected true or false, found nothing."),
        ({"_recursive_": "x"}, "part._recursive_: expected true or false, found a text."),
        ({"_convert_": True}, "part._convert_: expected a text, found True."),
        ({"_args_": 3}, "part._args_: expected a list, found 3."),
        ({"_target_": 3}, "part._target_: expected a text, found 3."),
    ],
)
def test_how_a_target_is_called_is_of_the_right_type(calling, message):
    part = {"_target_": f"{__name__}.Annotated", "size": 1, **calling}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_values(OmegaConf.create({"part": part}))
