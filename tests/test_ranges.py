"""Every number that a configuration can set has a range, which is asked before anything is built."""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

import train  # noqa: F401 - registers the resolvers that configurations use
from components.checks import Range, has_range
from launch.experiments import CONFIGS, experiment_names
from launch.values import check_values

ROOMS = ("callbacks.", "components.", "datamodules.", "launch.", "lightning_modules.")
TARGETS = sorted(
    {name for path in CONFIGS.rglob("*.yaml") for name in re.findall(r"_target_: *([\w.]+)", path.read_text())}
)
BAD = (-1, -1e-3, 0, 0.5, 1.5, 2, 1e39, 10**11, math.nan, math.inf, -math.inf)


def settings(called: Callable[..., Any]) -> Iterator[tuple[Callable[..., Any], str, Any]]:
    """Constructor, name and annotation of each number that a class or function of the project is given."""
    classes = called.__mro__ if inspect.isclass(called) else ()
    makers = [vars(own)["__init__"] for own in classes if _is_own(own) and "__init__" in vars(own)]
    for maker in makers if classes else filter(_is_own, [called]):
        for parameter in inspect.signature(maker, eval_str=True).parameters.values():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and _numeric(parameter.annotation):
                yield maker, parameter.name, parameter.annotation


def _is_own(called: Callable[..., Any]) -> bool:
    return f"{called.__module__}.".startswith(ROOMS)


def _numeric(annotation: Any) -> bool:
    if annotation in (int, float) or get_origin(annotation) is Annotated:
        return True
    return get_origin(annotation) is not Callable and any(map(_numeric, get_args(annotation)))


def ranges(annotation: Any) -> Iterator[tuple[type, Range, Callable[[Any], Any]]]:
    """What kind of number, its range, and how a number is put into what the annotation asks for."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield *inner, lambda number: number
    elif inspect.isclass(origin) and issubclass(origin, Mapping):
        yield from ((*each, lambda number, put=put: {"key": put(number)}) for *each, put in ranges(inner[1]))
    elif origin is tuple:
        yield from ((*each, lambda number, put=put: [put(number)] * len(inner)) for *each, put in ranges(inner[0]))
    elif inspect.isclass(origin) and issubclass(origin, Sequence):
        yield from ((*each, lambda number, put=put: [put(number)]) for *each, put in ranges(inner[0]))
    else:
        for alternative in inner:
            yield from ranges(alternative)


def inside(number: float, kind: type, bounds: Range) -> bool:
    whole = kind is float or isinstance(number, int)
    return whole and bounds.least <= number <= bounds.most and bounds.above < number < bounds.below


@pytest.mark.parametrize("target", TARGETS)
def test_every_number_has_a_range_that_is_kept(target):
    """By the class itself, and from a configuration by the whole key, before anything is made."""
    called = get_object(target)
    for maker, name, annotation in settings(called):
        assert has_range(annotation), f"{target}: {name}"
        for kind, bounds, put in ranges(annotation):
            assert not any(inside(number, kind, bounds) for number in (math.nan, math.inf, -math.inf, 1e39))
            for number in (number for number in BAD if not inside(number, kind, bounds)):
                own = (None,) if inspect.isclass(called) else ()
                with pytest.raises(ValueError, match=rf"^{name}\S*={number}".replace("+", r"\+") + ": expected .*\\.$"):
                    maker(*own, **{name: put(number)})
                part = {"_target_": target, "_partial_": True, name: put(number)}
                with pytest.raises(ValueError, match=rf"^part\.{name}\b.*: expected .*\.$"):
                    check_values(OmegaConf.create({"part": part}))


def leaves(node: Any, key: str, target: str) -> Iterator[tuple[str, str]]:
    """Key, and target or key again, of every number that is written in a configuration."""
    items = node.items() if isinstance(node, DictConfig) else enumerate(node)
    target = str(node.get("_target_", target)) if isinstance(node, DictConfig) else target
    for name, value in items if not node._is_none() else ():
        path = f"{key}[{name}]" if isinstance(node, ListConfig) else f"{key}.{name}" if key else str(name)
        if OmegaConf.is_interpolation(node, name):
            continue
        if isinstance(value, DictConfig | ListConfig):
            yield from leaves(value, path, target)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path, f"{target}: {name}" if target else path


LAUNCH = {"num_seeds", "threads", "seed"}  # checked before parts are
OF_AN_ARM = {"codec_updates.autoencoder", "codec_updates.code_model", "protocol.codec_per_class"}


def test_every_number_of_every_experiment_is_checked():
    """Those that are no part's own too, such as `protocol.batch_size`, for parts are made with them."""
    seen = LAUNCH | OF_AN_ARM
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for name in experiment_names():
            config = compose("train", [f"experiment={name}"])
            for key in (*OmegaConf.missing_keys(config), "run_dir", "study_dir", "arm"):
                OmegaConf.update(config, key, "given")
            check_values(config)
            for key, known in leaves(config, "", ""):
                if known in seen or known.startswith("contrasts."):  # checked before parts are, too
                    continue
                seen.add(known)
                before = OmegaConf.select(config, key)
                for number in (math.nan, math.inf):
                    OmegaConf.update(config, key, number)
                    with pytest.raises(ValueError, match=rf"^{re.escape(key)}={number}: expected "):
                        check_values(config)
                OmegaConf.update(config, key, before)
    assert len(seen) > 200


SENSELESS = {
    "fb_walker": {
        "module.learning_rate": -1e-3,
        "module.discount": 2,
        "module.target_rate": 2,
        "module.goal_probability": 2,
        "module.policy_std": 0,
        "module.objective.temperature": math.nan,
        "module.objective.value_samples": -1,
        "module.forward_map.members": 0,
        "module.backward_map.hidden_dim": 99999999999,
        "datamodule.dataset.steps": -1,
        "datamodule.batch_size": 0,
        "checkpoint_every": 0,
    },
    "gpl_cheetah": {
        "module.critic_loss_weight": -1,
        "module.critic.blocks": -1,
        "module.temperature.initial": 0,
        "module.temperature_momentum": 1,
        "module.critic_learning_rate": -1e-3,
        "module.actor_max_norm": -1,
        "module.actor_learning_rate": 1000.0,
        "datamodule.num_envs": 99999999999,
        "datamodule.updates_per_env_step": 1e-30,
    },
    "gpl_zero_mdp": {"datamodule.protocols.truth.episode_length": 0, "datamodule.protocols.truth.noise": -1},
    "drr_fashion": {
        "module.optimizer.lr": -1e-3,
        "module.temperature": math.inf,
        "task_updates[1]": -5,
        "protocol.bytes_per_class": -1,
    },
    "drr_digits module=image_codec datamodule=base_images ~store": {
        "codec_updates.autoencoder": 0,
        "codec.autoencoder.codes": 1,
        "protocol.codec_per_class": 0,
    },
}


@pytest.mark.parametrize("experiment", SENSELESS)
def test_numbers_that_make_no_sense_are_refused_by_their_keys(experiment):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        folders = ("run_dir=given", "study_dir=given", "arm=given")
        config = compose("train", [*f"experiment={experiment}".split(), *folders])
    for key, number in SENSELESS[experiment].items():
        before = OmegaConf.select(config, key)
        OmegaConf.update(config, key, number)
        with pytest.raises(ValueError, match=rf"^{re.escape(key)}={number}: expected .*\.$"):
            check_values(config)
        OmegaConf.update(config, key, before)
    check_values(config)
