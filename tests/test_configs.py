"""Every experiment and preset composes, and its parts fit together: sizes, switches and one update."""

import itertools
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict

import train  # noqa: F401 - registers the resolvers that configurations use
from callbacks.expert import ExpertExport
from components.control.actor_objectives import AdvantageWeighted, ReparameterisedGradient
from components.control.critics import believed
from datamodules.images.readers import LabelledImages
from launch.distributed import ExplicitFSDP
from launch.recipes import check_targets
from launch.values import check_values

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EXPERIMENTS = sorted(
    str(path.relative_to(CONFIGS / "experiment").with_suffix(""))
    for path in (CONFIGS / "experiment").rglob("*.yaml")
    if path.stem.startswith("fb_")
)
ONLINE = sorted(
    str(path.relative_to(CONFIGS / "experiment").with_suffix(""))
    for path in (CONFIGS / "experiment").rglob("gpl_*.yaml")
    if not path.stem.startswith("gpl_drq")
)
PAPER = [name for name in EXPERIMENTS if name.startswith("paper/")]
CORNERS = {
    "fb": (ReparameterisedGradient, 1),
    "fb_aw": (AdvantageWeighted, 1),
    "fb_ar": (ReparameterisedGradient, 4),
    "fb_aware": (AdvantageWeighted, 4),
}
NARROW = [f"module.{network}.hidden_dim=8" for network in ("forward_map", "backward_map", "actor")]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [*overrides])


def check_parts(config: DictConfig) -> None:
    """Numbers are in their ranges, and a checkpoint of it can be rebuilt."""
    for part in ("module", "datamodule"):
        check_values(config[part], part)
        check_targets(OmegaConf.to_container(config[part], resolve=True), "last.ckpt")


def narrow_agent(transitions, *overrides: str):
    """The agent of a configuration with narrow networks, after one update on random data of the right shape."""
    config = composed(*overrides, *NARROW)
    check_parts(config)
    spec = instantiate(config.datamodule).spec
    module = instantiate(config.module, **spec)
    batch = transitions(2 * config.module.groups, **spec)
    if module.futures is not None:
        batch["next", "future"] = batch["next", "observation"].unsqueeze(1).expand(-1, module.futures[0], -1)
    metrics = module.update(batch)
    assert all(value.isfinite() for value in metrics.values())
    return module


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_arm_of_every_experiment_learns(name, transitions):
    config = composed(f"experiment={name}")
    assert config.name == name
    assert config.summary
    assert config.duration
    for arm, overrides in config.arms.items():
        module = narrow_agent(transitions, f"experiment={name}", *overrides)
        if arm in CORNERS:
            objective, blocks = CORNERS[arm]
            assert isinstance(module.objective, objective)
            assert len(module.backward_map.blocks) == blocks or (blocks > 1 and name not in PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_paper_scale(name):
    """The default column of the method's page, with the maze's exceptions."""
    config = composed(f"experiment={name}")
    module, data = config.module, config.datamodule
    maze = name.endswith("maze")
    assert list(config.arms) == list(CORNERS)
    assert config.num_seeds == 5
    assert (config.trainer.accelerator, module.compile) == ("auto", "cudagraphs")
    assert (module.features, module.groups, data.batch_size) == (64, 32, 1024)
    assert (module.forward_map.hidden_dim, module.actor.hidden_dim, module.backward_map.hidden_dim) == (1024, 1024, 256)
    assert module.discount == (0.99 if maze or name.endswith("d4rl") else 0.98)
    assert module.learning_rate == 1e-4
    assert module.backward_learning_rate == module.actor_learning_rate == (1e-6 if maze else 1e-4)
    assert (module.target_rate, module.orthonormality, module.updates) == (0.01, 1.0, 1_000_000)
    assert (data.evaluate_every, data.inference_samples) == (50_000, 100_000)
    objective = composed(f"experiment={name}", *config.arms.fb_aware).module.objective
    assert (objective.temperature, objective.value_samples, objective.weighting) == (1.0, 4, "iwis")


def test_the_maze_of_published_code():
    published = composed("experiment=paper/fb_point_mass_maze", "preset=fb_mm_maze").module
    assert (published.features, published.discount, published.updates) == (100, 0.99, 3_000_000)
    assert (published.learning_rate, published.backward_learning_rate, published.actor_learning_rate) == (
        1e-4,
        1e-6,
        1e-6,
    )


@pytest.mark.parametrize(
    ("base", "group"),
    [("/study: fb_paper", "datamodule/dataset"), ("fb_walker", "datamodule/dataset"), ("drr_digits", "dataset")],
)
@pytest.mark.parametrize("option", ["mine", "null"])
def test_an_experiment_can_replace_data_that_another_brought(base, group, option, tmp_path):
    """By an option of its own, or by keys of its own; nothing of what was there before stays."""
    own = {"_target_": "my.data", "path": "here"}
    datamodule = ["override /datamodule: exorl"] if base.startswith("/study") else []
    defaults = [*datamodule, f"override /{group}: {option}"]
    text = "# @package _global_\ndefaults:\n" + "".join(f"  - {line}\n" for line in [base, *defaults])
    keys = group.split("/")
    if option == "null":
        text += "".join(f"{'  ' * depth}{key}:\n" for depth, key in enumerate(keys))
        text += f"{'  ' * len(keys)}{{_target_: my.data, path: here}}\n"
    for path, content in ((f"{group}/mine.yaml", json.dumps(own)), ("experiment/mine.yaml", text)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(content)
    config = composed("experiment=mine", f"hydra.searchpath=[file://{tmp_path}]")
    assert config.datamodule.dataset == own


@pytest.mark.parametrize("experiment", ["paper/fb_walker", "fb_walker"])
def test_presets_differ_where_their_codes_do(experiment, transitions):
    original, later = (composed(f"experiment={experiment}", f"preset={name}") for name in ("fb_ca", "fb_mm"))
    for config in (original, later):
        assert config.arms is None
        assert (config.module.features, config.datamodule.batch_size, config.module.backward_map.blocks) == (
            50,
            1024,
            1,
        )
        assert (config.module.forward_map.hidden_dim, config.module.actor.hidden_dim) == (1024, 1024)
        assert config.module.objective._target_.endswith("ReparameterisedGradient")

    def differing(config: DictConfig) -> tuple:
        module = config.module
        return (
            module.discount,
            (module.forward_map.shared_embeddings, module.forward_map.gain),
            module.backward_map.hidden_dim,
            module.measure_pessimism,
            module.orthonormality_convention,
            module.goal_key,
            config.datamodule.inference_samples,
            module.updates,
        )

    assert differing(original) == (0.99, (True, 1.0), 526, 0.5, "full", "observation", 5_120, 1_000_000)
    assert differing(later) == (0.98, (False, 2**0.5), 256, 0.0, "half", "next_observation", 50_000, 3_000_000)
    for name in ("fb_ca", "fb_mm"):
        narrow_agent(transitions, f"experiment={experiment}", f"preset={name}")


def test_paper_size_networks():
    """The counts of parameters that arXiv 2209.14935's sizes give for humanoid with 50 features."""
    config = composed("experiment=paper/fb_humanoid", "preset=fb_mm", "module.features=50")
    networks = {
        name: instantiate(config.module[name], **sizes, observation_dim=67, features=50)()
        for name, sizes in {"forward_map": {"action_dim": 21}, "backward_map": {}, "actor": {"action_dim": 21}}.items()
    }
    millions = {
        name: sum(parameter.numel() for parameter in network.parameters()) / 1e6 for name, network in networks.items()
    }
    assert millions == pytest.approx({"forward_map": 2 * 2.37, "backward_map": 0.10, "actor": 2.31}, abs=0.01)


SWITCHES = {
    "module.objective.weighting=softmax": "objective.weighting",
    "module.objective.renormalise=false": "objective.renormalise",
    "module.objective.temperature=3.0": "objective.temperature",
    "module.objective.value_samples=10": "objective.value_samples",
    "module.objective.pessimism=0.0": "objective.pessimism",
    "module.evaluation_samples=50": "evaluation_samples",
    "module.anneal_from=0.5": "anneal_from",
    "module.evaluation_pessimism=0.0": "evaluation_pessimism",
    "module.measure_pessimism=0.5": "measure_pessimism",
    "module.forward_map.members=3": "forward_map.head.0.weight",
    "module.forward_map.gain=1.0": None,
    "module.forward_map.shared_embeddings=true": None,
    "module.actor.gain=1.4": None,
    "module.features=32": "backward_map.features",
    "module.backward_map.blocks=2": "backward_map.blocks",
    "module.groups=8": "groups",
    "module.normalise_z=block": "normalise_z",
    "module.within_groups=true": "within_groups",
    "module.fresh_actor_z=true": "fresh_actor_z",
    "module.orthonormality=100": "orthonormality",
    "module.orthonormality_convention=full": "orthonormality",
    "module.goal_probability=0.2": "latent_sampler.goal_probability",
    "module.goal_key=observation": "goal_key",
    "module.value_weight=0.1": "value_weight",
    "module.policy_std=0.1": "policy_std",
    "module.policy_noise_clip=0.1": "policy_noise_clip",
    "module.normalise_observations=true": "normaliser",
    "module.backward_learning_rate=1e-5": None,
}


@pytest.fixture(scope="module")
def ordinary() -> object:
    return instantiate(composed("experiment=fb_overdrive", *NARROW).module, observation_shape=[2], action_dim=2)


@pytest.mark.parametrize("override", SWITCHES)
def test_every_switch_is_a_configuration_key(override, transitions, ordinary):
    """Without `+`, and it arrives in a method that still learns."""
    module = instantiate(
        composed("experiment=fb_overdrive", "module.backward_map.blocks=4", *NARROW, override).module,
        observation_shape=[2],
        action_dim=2,
    )
    metrics = module.update(transitions(64, [2], 2))
    assert all(value.isfinite() for value in metrics.values())
    if SWITCHES[override]:
        values = [agent_value(agent, SWITCHES[override]) for agent in (module, ordinary)]
        assert values[0] != values[1]


def agent_value(agent: object, path: str) -> object:
    for name in path.split("."):
        agent = agent[int(name)] if name.isdigit() else getattr(agent, name)
    if isinstance(agent, torch.nn.ModuleList):
        return len(agent)
    return agent.shape if isinstance(agent, torch.Tensor) else agent


def test_temperature_of_sqrt_d(transitions):
    overrides = ("experiment=fb_walker", "module/objective=advantage_weighted_sqrt_d", "module.features=64")
    assert narrow_agent(transitions, *overrides).objective.temperature == 8.0
    scaled = composed(*overrides, "module.objective.temperature.beta=0.5")
    assert instantiate(scaled.module.objective).temperature == 4.0


def test_behaviour_cloning_beside_the_policy_gradient(transitions):
    overrides = ("module/objective=td3bc", "module.objective.behaviour_cloning=0.5")
    module = narrow_agent(transitions, "experiment=fb_overdrive", *overrides)
    assert module.objective.behaviour_cloning == 0.5


@pytest.mark.parametrize(
    ("name", "key", "where"),
    [
        ("paper/fb_humanoid", "datamodule.dataset.file", "github.com/facebookresearch/offline_rl"),
        ("paper/fb_walker", "datamodule.dataset.folder", "exorl/walker/rnd.zip"),
        ("paper/fb_d4rl", "datamodule.dataset.folder", "gym_mujoco_v2/hopper_medium-v2.hdf5"),
    ],
)
def test_missing_data_are_one_sentence(name, key, where, tmp_path):
    datamodule = instantiate(composed(f"experiment={name}", f"data_root={tmp_path}").datamodule)
    with pytest.raises(FileNotFoundError) as error:
        datamodule.prepare_data()
    message = str(error.value)
    assert message.startswith(f"{key}={tmp_path}")
    assert where in message
    assert "GB" in message or "MB" in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ONLINE)
def test_every_arm_of_every_online_experiment_learns(name, transitions, tmp_path):
    config = composed(f"experiment={name}")
    assert config.name == name
    assert config.summary
    assert config.duration
    assert (config.callbacks.films is None) == (name in ("gpl_pendulum", "gpl_zero_mdp"))
    for overrides in config.arms.values():
        narrow = ("module.critic.hidden_dim=8", "module.actor.network.hidden_dim=8", "module.compile=null")
        config = composed(f"experiment={name}", f"run_dir={tmp_path}", *overrides, *narrow)
        check_parts(config)
        data = instantiate(config.datamodule)
        module = instantiate(config.module, **data.spec)
        metrics = module.update(transitions(16, **data.spec))
        assert all(value.isfinite() for value in metrics.values())
        assert data.discount == module.discount
        probe = instantiate(config.callbacks.critic_bias)
        assert probe._make_env(num_envs=1, seed=0, episode_length=5).batch_size == (1,)


ON_POLICY = ["pendulum", "walker", *(f"humanoid_{name}" for name in ("walk", "run", "get_up", "directions"))]


@pytest.mark.parametrize("name", [f"ppo_{name}" for name in ON_POLICY])
def test_every_on_policy_experiment_learns_from_a_rollout(name, tmp_path):
    config = composed(f"experiment={name}", f"run_dir={tmp_path}", "datamodule.num_envs=4", "init_from=null")
    assert config.name == name
    assert config.summary
    assert config.duration
    check_parts(config)
    data = instantiate(config.datamodule)
    module = instantiate(config.module, **data.spec)
    data.trainer = SimpleNamespace(lightning_module=module)
    stack = next(iter(data.train_dataloader()))
    assert stack.shape == (module.updates_per_step,)
    metrics = module.update(next(stack.unbind(0)))
    assert all(value.isfinite() for value in metrics.values())
    assert metrics["divergence"].abs() < 1e-6
    data.teardown("fit")


@pytest.mark.parametrize(
    ("name", "choice", "sizes", "reward"),
    [
        ("gpl_cheetah", ["environment=gymnasium", "environment.id=Pendulum-v1"], (3, 1), "reward"),
        (
            "gpl_pendulum",
            ["environment=batched_mujoco", "environment.domain=walker", "environment.task=walk"],
            (24, 6),
            "walk",
        ),
    ],
)
def test_another_world_can_be_chosen_for_an_online_experiment(name, choice, sizes, reward, tmp_path):
    config = composed(f"experiment={name}", f"run_dir={tmp_path}", *choice)
    check_parts(config)
    spec = instantiate(config.datamodule).spec
    assert (*spec["observation_shape"], spec["action_dim"]) == sizes
    assert config.datamodule.protocols == {"default_reset": {"rewards": [reward]}}


@pytest.mark.parametrize("name", [name for name in ONLINE if name.startswith("paper/")])
def test_paper_scale_of_online_experiments(name):
    config = composed(f"experiment={name}")
    module, data = config.module, config.datamodule
    assert (module.members, module.critic.hidden_dim, module.actor.network.hidden_dim) == (10, 256, 256)
    assert (data.updates_per_env_step, module.actor_every, data.batch_size, config.num_seeds) == (20, 20, 256, 5)
    assert (data.random_steps, module.discount, module.target_rate) == (5000, 0.99, 0.005)
    assert data.random_steps + module.updates / 20 == (125_000 if name.endswith("hopper") else 300_000)
    entropies = {"hopper": -1, "walker2d": -3, "halfcheetah": -3, "ant": -4, "humanoid": -2}
    assert module.temperature.target_entropy == entropies[name.removeprefix("paper/gpl_")]
    assert module.pessimism._target_.endswith("DualPessimism")
    assert composed(f"experiment={name}", *config.arms.redq).module.pessimism._target_.endswith(
        "SubsetMinimumPessimism"
    )


@pytest.mark.parametrize("module", ["actor_critic", "td3", "redq", "gpl"])
@pytest.mark.parametrize("pessimism", ["min", "td3", "mean", "redq", "fixed", "learned"])
@pytest.mark.parametrize("critic", ["simple", "modern"])
def test_actor_critics_take_every_pessimism_and_critic(module, pessimism, critic, transitions):
    narrow = ("module.critic.hidden_dim=8", "module.actor.network.hidden_dim=8")
    switches = (f"module={module}", f"module/pessimism={pessimism}", f"module/critic={critic}")
    config = composed(*switches, *narrow, "datamodule=online")
    made = instantiate(config.module, observation_shape=[5], action_dim=2)
    assert all(value.isfinite() for value in made.update(transitions(16)).values())


OBJECTIVES = sorted(
    path.stem for path in (CONFIGS / "module/objective").glob("*.yaml") if path.stem != "advantage_weighted_sqrt_d"
)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("module", ["actor_critic", "td3", "awac", "iql"])
def test_actor_critics_take_every_objective(module, objective, transitions):
    """By one override; the noise that an objective bounds must be there, and a state value where it is asked for."""
    narrow = ("module.critic.hidden_dim=8", "module.actor.network.hidden_dim=8")
    needs = [] if module == "iql" or objective != "iql" else ["module/value=expectile"]
    if module == "actor_critic" and objective in ("td3", "td3bc"):
        needs += ["module.objective.noise_clip=null"]
    config = composed(
        "experiment=offline",
        f"module={module}",
        f"module/objective={objective}",
        "datamodule.dataset.path=x.npz",
        *needs,
        *narrow,
    )
    made = instantiate(config.module, observation_shape=[5], action_dim=2)
    check_parts(config)
    before = [parameter.clone() for parameter in made.actor.parameters()]
    batch = transitions(16)
    batch["index"] = torch.arange(16)
    if made.prioritised is not None:
        batch["prioritised"] = batch.clone()
    metrics = made.update(batch).exclude("priorities")
    assert all(value.isfinite() for value in metrics.values())
    assert any(not torch.equal(*pair) for pair in zip(before, made.actor.parameters()))
    assert ("temperature" in metrics) == ("entropy" in metrics) == (module == "actor_critic")
    assert ("value_loss" in metrics) == (module == "iql" or objective == "iql")


@pytest.mark.parametrize("objective", sorted({*OBJECTIVES} - {"asac"}))
def test_forward_backward_takes_every_objective(objective, transitions):
    switches = [f"module/objective={objective}", *(["module.objective.advantage=policy"] * (objective == "iql"))]
    narrow_agent(transitions, "experiment=fb_overdrive", *switches)


def test_forward_backward_takes_no_priorities(transitions):
    with pytest.raises(Exception, match=r"module.objective: expected one that needs no priorities"):
        narrow_agent(transitions, "experiment=fb_overdrive", "module/objective=asac")


def test_every_agent_whose_policy_makes_data_learns(transitions, tmp_path):
    config = composed("experiment=walker_behaviours")
    for arm, overrides in config.arms.items():
        settings = (f"arm={arm}", f"study_dir={tmp_path}", f"run_dir={tmp_path}", "module.critic.hidden_dim=8")
        config = composed("experiment=walker_behaviours", *overrides, *settings)
        check_parts(config)
        data = instantiate(config.datamodule)
        module = instantiate(config.module, **data.spec)
        metrics = module.update(transitions(16, **data.spec))
        assert all(value.isfinite() for value in metrics.values())
        assert ("intrinsic_reward" in metrics) == (arm == "explore")
        export = instantiate(config.callbacks.policy_export)
        assert (export.name, list(export.stages)) == (arm, ["early", "middle", "late"])
    walker = composed("experiment=mood_walker").datamodule.dataset.policies
    assert sorted(walker) == sorted(composed("experiment=walker_behaviours").arms)


def test_every_arm_of_the_point_on_mixed_data_learns():
    name = "mood_swirl"
    arms = OmegaConf.to_container(composed(f"experiment={name}").arms)  # as they are written, ${seed} and all
    for arm, overrides in arms.items():
        config = composed(f"experiment={name}", *overrides, "seed=3", "datamodule.dataset.episodes=2")
        check_parts(config)
        data = instantiate(config.datamodule)
        data.setup("fit")
        assert data.dataset.data["source"].unique().tolist() == ([3] if arm.endswith("same") else list(range(8)))
        made = instantiate(config.module, **data.spec)
        assert made.actor.network[0].weight.shape[-1] == (8 if arm.startswith("narrow") else 256)
        assert all(value.isfinite() for value in made.update(data.dataset.data[:32]).values())


OFFLINE_PAPER = sorted(
    f"paper/{path.stem}" for kind in ("mood", "d4rl") for path in (CONFIGS / "experiment/paper").glob(f"{kind}_*.yaml")
)


def test_the_studies_of_offline_data_have_their_tasks():
    assert len([name for name in OFFLINE_PAPER if "/mood_" in name]) == 15
    assert len([name for name in OFFLINE_PAPER if "/d4rl_" in name]) == 9


@pytest.mark.parametrize("name", OFFLINE_PAPER)
def test_every_study_of_offline_data_names_its_data_and_task(name):
    config = composed(f"experiment={name}")
    check_parts(config)
    data = instantiate(config.datamodule)
    if "/mood_" in name:
        domain, task = name.removeprefix("paper/mood_").split("_", 1)
        assert data.spec["action_dim"] == {"walker": 6, "cheetah": 6, "quadruped": 12, "humanoid": 21}[domain]
        assert config.datamodule.dataset.file.endswith(f"mixed_task_rnd_sub__{domain}_{task}.hdf5")
        (reward,) = data.rewards["default_reset"].values()
        assert reward == ("fast_spin" if task == "spin" else task)
    else:
        assert name.removeprefix("paper/d4rl_").replace("_", "-") == config.datamodule.dataset.name.removesuffix("-v2")


@pytest.mark.parametrize("name", ["paper/mood_walker_spin", "paper/d4rl_hopper_medium_expert"])
def test_every_arm_of_studies_of_offline_data_learns(name, transitions):
    made = {}
    narrow = ("module.critic.hidden_dim=8", "module.compile=null")
    arms = OmegaConf.to_container(composed(f"experiment={name}").arms)
    for arm, overrides in arms.items():
        config = composed(f"experiment={name}", *overrides, *narrow)
        check_parts(config)
        made[arm] = module = instantiate(config.module, observation_shape=[5], action_dim=2)
        assert module.total_updates == (2_000_000 if "mood" in name else 1_000_000)
        assert config.datamodule.batch_size == (1024 if "mood" in name or arm == "rebrac" else 256)
        batch = transitions(16)
        batch["next", "data_action"] = batch["action"]
        if module.prioritised is not None:
            batch["index"] = torch.arange(16)
            batch["prioritised"] = batch.clone()
        assert all(value.isfinite() for value in module.update(batch).exclude("priorities").values())
    if "mood" in name:
        widths = [made[arm].actor.network[0].weight.shape[-1] for arm in ("awac", "awac_narrow")]
        assert widths == [1024, 256]
    else:
        assert (made["rebrac"].objective.behaviour_cloning, made["rebrac"].critic_cloning) == (0.1, 0.01)
        assert (made["iql"].objective.temperature, made["iql"].value.expectile) == (pytest.approx(1 / 6), 0.5)


@pytest.mark.parametrize("module", ["awac", "iql", "td3bc", "asac", "bc"])
def test_evaluations_choose_among_sampled_actions(module, transitions):
    narrow = ("module.critic.hidden_dim=8", "module.actor.network.hidden_dim=8")
    config = composed(f"module={module}", *narrow, "module.evaluation_samples=[1,50]", "datamodule=online")
    made = instantiate(config.module, observation_shape=[5], action_dim=2)
    observation = transitions(16)["observation"]
    one, best = (made.policy(samples=samples)(observation=observation) for samples in (1, 50))
    assert torch.equal(one, made.policy()(observation=observation))
    values = [believed(made.critic, made.pessimism, made.members, observation, action) for action in (one, best)]
    assert torch.equal(one, best) == (module == "td3bc")  # which draws nothing
    assert module == "td3bc" or (values[1] > values[0]).float().mean() > 0.9


PIXELS = sorted(
    str(path.relative_to(CONFIGS / "experiment").with_suffix(""))
    for pattern in ("alix_*.yaml", "gpl_drq_*.yaml")
    for path in (CONFIGS / "experiment").rglob(pattern)
)
NARROW_PIXELS = (
    "module.critic.hidden_dim=8",
    "module.actor.network.hidden_dim=8",
    "module.encoder.channels=2",
    "module.trunk.feature_dim=4",
    "module.compile=null",
)


@pytest.mark.parametrize("name", PIXELS)
def test_every_arm_of_every_pixel_experiment_learns(name, transitions, tmp_path):
    config = composed(f"experiment={name}")
    assert config.name == name
    assert config.summary
    assert config.duration
    for overrides in config.arms.values():
        config = composed(f"experiment={name}", f"run_dir={tmp_path}", *overrides, *NARROW_PIXELS)
        check_parts(config)
        data = instantiate(config.datamodule)
        module = instantiate(config.module, **data.spec)
        metrics = module.update(transitions(4, **data.spec))
        assert all(value.isfinite() for value in metrics.values())
        assert 0 < metrics["nd_score"] < 3
        assert data.discount == module.discount
        for callback in config.callbacks.values():
            assert callback is None or instantiate(callback)
        assert config.callbacks.feature_gradients is not None
        assert (config.callbacks.films is None) == (name == "alix_selffitting")


def test_offline_policies_of_pictures_at_paper_scale():
    config = composed("experiment=paper/alix_offline_cheetah")
    module, data, environment = config.module, config.datamodule, config.datamodule.environment
    assert (environment.size, environment.frame_stack, environment.action_repeat) == (84, 3, 2)
    assert data.training_episodes * 500 == 15_000  # transitions
    assert (module.policy_evaluation_updates, module.updates) == (15_000, 25_000)
    assert (data.batch_size, data.n_step, data.targets) == (256, 3, "sarsa")
    assert (module.critic_learning_rate, module.discount, module.encoder.channels) == (1e-4, 0.99, 32)
    assert list(config.arms) == ["alix", "shift", "none"]


def test_published_tasks_are_there():
    tasks = set()
    for name in PIXELS:
        if name.startswith("paper/alix_") and "offline" not in name:
            environment = composed(f"experiment={name}").datamodule.environment
            tasks.add(f"{environment.domain}/{environment.task}")
    assert tasks == {
        *("acrobot/swingup", "cartpole/swingup_sparse", "cheetah/run", "finger/turn_easy", "finger/turn_hard"),
        *("hopper/hop", "quadruped/run", "quadruped/walk", "manipulation/reach_duplo", "reacher/easy", "reacher/hard"),
        *("walker/run", "humanoid/stand", "humanoid/walk", "humanoid/run"),
    }


@pytest.mark.parametrize("name", [name for name in PIXELS if name.startswith("paper/") and "offline" not in name])
def test_paper_scale_of_pixel_experiments(name):
    """The constants of the published code, and those tasks that have others."""
    config = composed(f"experiment={name}")
    module, data, hard = config.module, config.datamodule, "humanoid" in name
    assert (module.encoder.channels, list(module.encoder.strides)) == (32, [2, 1, 1, 1])
    assert (module.trunk.feature_dim, module.critic.hidden_dim) == (100 if hard else 50, 1024)
    assert (module.critic.last_gain, module.actor.network.gain, module.actor.network.last_gain) == (2**0.5, 1, 1)
    rates = {module.critic_learning_rate, module.encoder_learning_rate, module.actor_learning_rate}
    assert rates == {8e-5 if hard else 1e-4}
    actor = module.actor
    assert (actor.initial_std, actor.final_std, actor.clip) == (1.0, 0.1, 0.3)
    assert actor.anneal_steps == (2_000_000 if hard else 500_000)
    assert (module.target_rate, module.discount, module.critic_loss_weight, module.members) == (0.01, 0.99, 2, 2)
    environment = data.environment
    assert (environment.size, environment.frame_stack, environment.action_repeat) == (84, 3, 2)
    assert environment.effects
    walker = name.endswith("walker_run")
    assert (data.n_step, data.batch_size) == ((1, 512) if walker else (3, 256))
    assert data.replay_capacity == (100_000 if name.endswith("quadruped_run") else 1_000_000)
    assert (data.random_steps, data.updates_per_env_step, data.num_envs, data.updates_per_step) == (2000, 0.5, 1, 1)
    assert 4 * module.updates == (30_100_000 if hard else 3_100_000)  # simulator steps
    assert (4 * data.evaluate_every, data.curve_episodes, config.num_seeds) == (10_000, 10, 10)
    for preset, expected in (("alix_code", (0.5, 0.535, 2e-3)), ("alix_paper", (0.4, 0.635, 1.2e-3))):
        mixing = composed(f"experiment={name}", f"preset={preset}").module.encoder.mixing
        assert (mixing.initial, mixing.target, mixing.learning_rate, mixing.momentum) == (*expected, 0.5)


MIXINGS = {
    "none": ([], 1, 0.0),
    "lix": ([1, 2, 3, 4], 1, 0.0),
    "alix": ([1, 2, 3, 4], 1, 2e-3),
    "alix_untied": ([1, 2, 3, 4], 4, 2e-3),
    "alix_last": ([4], 1, 2e-3),
    "input_shift": ([0], 1, 2e-3),
}


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("augmentation", ["none", "random_shift"])
def test_mixing_and_augmentation_are_switches(mixing, augmentation, transitions):
    switches = (f"mixing={mixing}", f"augmentation={augmentation}")
    module = instantiate(
        composed("experiment=alix_cartpole", *switches, *NARROW_PIXELS).module,
        observation_shape=[9, 24, 24],
        action_dim=1,
    )
    blocks, strengths, learning_rate = MIXINGS[mixing]
    assert module.encoder.mixing.blocks == blocks
    assert [dual.learning_rate for dual in module.encoder.mixing.duals] == [learning_rate] * strengths
    assert (module.encoder.augmentation is None) == (augmentation == "none")
    assert all(value.isfinite() for value in module.update(transitions(4, [9, 24, 24], 1)).values())
    moved = any(dual.value() != dual.value().new_tensor(0.5) for dual in module.encoder.mixing.duals)
    assert moved == (learning_rate > 0)


@pytest.mark.parametrize("preset", ["alix_code", "alix_paper"])
def test_presets_leave_a_constant_strength_constant(preset):
    config = composed("experiment=alix_cartpole", "mixing=lix", f"preset={preset}")
    encoder = instantiate(config.module.encoder)([9, 24, 24])
    assert [dual.learning_rate for dual in encoder.mixing.duals] == [0.0]


def test_drq_by_itself_shifts_its_pictures():
    encoder = instantiate(composed("module=drq", "datamodule=online").module.encoder)([9, 24, 24])
    assert (encoder.augmentation.pad, encoder.mixing) == (4, None)


def test_learned_pessimism_on_pictures_is_configuration_alone(transitions):
    config = composed("experiment=gpl_drq_cartpole", *NARROW_PIXELS)
    assert config.module._target_ == composed("experiment=gpl_cheetah").module._target_
    module = instantiate(config.module, observation_shape=[9, 24, 24], action_dim=1)
    module.update(transitions(8, [9, 24, 24], 1))
    assert module.pessimism.beta.item() != 0.5


def test_pictures_without_an_encoder_are_one_sentence():
    for module in ("gpl", "forward_backward"):
        config = composed(f"module={module}", "datamodule=online")
        with pytest.raises(Exception, match=r"observation_shape=\[9, 84, 84\]: expected vectors; pictures need an enc"):
            instantiate(config.module, observation_shape=[9, 84, 84], action_dim=2)


INCREMENTAL = sorted(
    str(path.relative_to(CONFIGS / "experiment").with_suffix(""))
    for path in (CONFIGS / "experiment").rglob("drr_*.yaml")
)


def small_images(shape: tuple[int, ...], classes: int) -> LabelledImages:
    """Random images in place of a data set's."""
    generator = torch.Generator().manual_seed(0)

    def drawn(per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(classes).repeat(per_class)
        return torch.randint(256, (len(labels), *shape), generator=generator, dtype=torch.uint8), labels

    return LabelledImages(*drawn(6), *drawn(2))


SHAPES = {"digits": ((1, 8, 8), 10), "fashion_mnist": ((1, 28, 28), 10), "cifar100": ((3, 32, 32), 100)}


@pytest.mark.parametrize("name", INCREMENTAL)
def test_every_arm_of_every_incremental_experiment_learns(name, tmp_path):
    """On random images of the right size, with a codec of random weights."""
    config = composed(f"experiment={name}")
    assert config.name == name
    assert config.summary
    assert config.duration
    dataset = partial(small_images, *SHAPES[config.dataset._target_.split(".")[-1]])
    for arm, overrides in config.arms.items():
        folders = (f"study_dir={tmp_path}", f"run_dir={tmp_path}")
        config = composed(f"experiment={name}", *folders, *overrides, "module.compile=null")
        check_parts(config)
        trains = arm.startswith("codec")
        if trains:
            config.datamodule.per_class = None
        config.datamodule.dataset = None
        data = instantiate(config.datamodule, dataset=dataset)
        module = instantiate(config.module, **data.spec)
        images = {"image": data.data.images[:8]}
        if trains:
            for part in (True, False):
                metrics = module.update(TensorDict(images, [8]), autoencoder=part)
                assert all(value.isfinite() for value in metrics.values())
                module.begin_codes(data.data.images)
            module.codec.save(tmp_path / arm / f"seed_{config.seed}" / "codec.safetensors")
            continue
        module.begin_task(0, data.seen(0))
        batch = {**images, "label": torch.zeros(8, dtype=torch.int64)}
        if data.pairs:
            pair = torch.stack([images["image"], images["image"]], 1)
            batch |= {"pair": pair, "pair_label": torch.arange(8) % data.seen(0)}
        metrics = module.update(TensorDict(batch, [8]))
        assert all(value.isfinite() for value in metrics.values())
        assert (module.projection is None) == (data.pairs == 0)
        for callback in config.callbacks.values():
            assert callback is None or instantiate(callback)


@pytest.mark.parametrize("name", [name for name in INCREMENTAL if name.startswith("paper/")])
def test_paper_scale_of_incremental_experiments(name):
    config = composed(f"experiment={name}")
    codec = config.codec.autoencoder
    assert (codec.codes, codec.dim, codec.width, codec.blocks) == (512, 64, 128, 2)
    assert (config.protocol.base_classes, config.protocol.classes_per_task) == (50, 10)
    assert config.protocol.order_seed == 1993
    assert config.datamodule.batch_size == 128
    assert config.module.optimizer._target_ == "torch.optim.SGD"
    assert (config.module.optimizer.lr, config.module.optimizer.weight_decay) == (0.1, 5e-4)


@pytest.mark.parametrize(("group", "home"), [("store", "datamodule.store"), ("mixing", "module.encoder.mixing")])
def test_what_is_put_elsewhere_is_the_same_there(group, home):
    for option in (path.stem for path in (CONFIGS / group).glob("*.yaml")):
        there = composed(f"+{group}@elsewhere={option}", "codec=digits")
        here = composed(f"{group}={option}", "codec=digits")
        assert there.elsewhere._target_
        assert OmegaConf.to_container(there.elsewhere) == OmegaConf.to_container(OmegaConf.select(here, home))
        assert OmegaConf.select(there, home) is None


@pytest.mark.parametrize("option", ["raw", "jpeg", "webp", "fixed", "static", "bits_back"])
def test_a_store_keeps_images_outside_of_class_incremental_learning(option, tmp_path):
    torch.manual_seed(0)
    config = composed(f"+store@keep={option}", "codec=digits")
    if "weights" in config.keep:
        config.keep.weights = str(tmp_path / "codec.safetensors")
        instantiate(config.codec)(image_shape=(1, 8, 8)).save(config.keep.weights)
    store = instantiate(config.keep)(image_shape=(1, 8, 8))
    images = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    kept = store.shrink(images)
    restored = store.restore(store.unpack(store.pack(kept), 5))
    assert torch.equal(restored, store.restore(kept))
    assert (restored.shape, restored.dtype) == (images.shape, images.dtype)
    assert torch.equal(restored, images) == (option == "raw")


def test_a_codec_that_was_not_trained_is_one_sentence(tmp_path):
    config = composed("experiment=drr_digits", f"study_dir={tmp_path}")
    with pytest.raises(Exception, match=r"expected a trained codec .`module=image_codec` trains one., found none"):
        instantiate(config.datamodule)


LANGUAGE = sorted(
    str(path.relative_to(CONFIGS / "experiment").with_suffix(""))
    for pattern in ("svf_*.yaml", "transformer_squared.yaml")
    for path in (CONFIGS / "experiment").rglob(pattern)
)


HARD = ("Easy", "Challenge")


def write_questions(folder: Path) -> None:
    """A few of GSM8K's, ARC's and MATH's, in their formats."""
    problem = {"question": "How many?", "answer": "Two and two.\n#### 4"}
    choices = [{"text": "this", "label": "A"}, {"text": "that", "label": "B"}]
    choice = {"question": {"stem": "Which?", "choices": choices}, "answerKey": "B"}
    for path, line in (
        *((f"gsm8k/{name}.jsonl", problem) for name in ("train", "test")),
        *((f"ARC-{kind}/ARC-{kind}-{name}.jsonl", choice) for kind in HARD for name in ("Train", "Dev", "Test")),
    ):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("".join(json.dumps(line) + "\n" for _ in range(8)))
    for split, number in itertools.product(("train", "test"), range(8)):
        path = folder / "MATH" / split / "algebra" / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"problem": f"{number}?", "solution": "\\boxed{4}"}))


@pytest.mark.parametrize("name", LANGUAGE)
def test_every_arm_of_every_language_experiment_learns(name, language_folder, tmp_path):
    """A tiny model instead of a pretrained one."""
    write_questions(tmp_path)
    config = composed(f"experiment={name}", "language_model=folder", f"language_model.path={language_folder}")
    assert config.name == name
    assert config.summary
    assert config.duration
    small = ("protocol.batch_size=2", "protocol.most_tokens=3", f"data_root={tmp_path}", "module.dtype=float32")
    small += ("protocol.shots=4",) if name == "paper/transformer_squared" else ()
    for arm, overrides in OmegaConf.to_container(config)["arms"].items():
        folders = (f"study_dir={tmp_path}", f"run_dir={tmp_path / arm / 'seed_0'}", f"arm={arm}")
        config = composed(f"experiment={name}", *folders, *overrides, *small, "language_model=folder")
        config.language_model.path = str(language_folder)
        check_parts(config)
        data = instantiate(config.datamodule)
        module = instantiate(config.module, **data.spec)
        data.trainer = SimpleNamespace(lightning_module=module)
        callbacks = [instantiate(callback) for callback in config.callbacks.values() if callback is not None]
        for task in data.test_dataloader():
            task.questions = task.questions[:2]
            assert task.metrics(module.evaluate(task))
        if not module.total_updates:
            continue
        batch = next(iter(data.train_dataloader()))
        metrics = module.update(batch[0])
        assert all(value.isfinite() for value in metrics.values())
        trainer = SimpleNamespace(datamodule=data, is_global_zero=True, strategy=SimpleNamespace(barrier=lambda: None))
        for callback in callbacks:
            if isinstance(callback, ExpertExport):
                callback.on_fit_end(trainer, module)
                exported = (tmp_path / arm / "seed_0" / "expert.safetensors").exists()
                assert exported == module.language.has_expert == (arm.startswith("svf") or "expert" in arm)


def test_paper_scale_of_language_experiments():
    config = composed("experiment=paper/svf_gsm8k")
    assert (config.learning_rate, config.module.max_norm, config.protocol.batch_size) == (2e-3, 1e-3, 256)
    assert (config.adapter.modules, config.adapter.layers, config.adapter.rescale) == ("mlp", "all", "nuclear")
    assert config.protocol.most_tokens == 512
    assert config.module.score_end is False
    lora = composed("experiment=paper/svf_gsm8k", *config.arms.lora)
    assert (lora.adapter.modules, lora.adapter.rank, lora.adapter.alpha) == ("attention", 16, 32)


def test_a_missing_model_is_one_sentence(tmp_path):
    config = composed("experiment=paper/svf_gsm8k", f"language_model.path={tmp_path}")
    with pytest.raises(Exception, match=r"config\.json: expected a file of a language model's folder, found none"):
        instantiate(config.datamodule)


def test_a_large_model_is_composed_and_built_on_the_meta_device():
    overrides = ("language_model.path=somewhere", "trainer=fsdp", "adapter.factorised=true", "adapter.cache=null")
    config = composed("experiment=paper/svf_gsm8k", *overrides, "trainer.accelerator=cpu", "trainer.devices=2")
    trainer = instantiate(config.trainer)
    assert isinstance(trainer.strategy, ExplicitFSDP)
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=128256))
    folder = SimpleNamespace(model=lambda dtype: model.to(getattr(torch, dtype)), checksum="of a model")
    config.module.language_model = None
    module = instantiate(config.module, ends=[2], language_model=folder)
    assert module.language.adapter.count() == 393_216
    assert {p.dtype for p in module.language.adapter.parameters.values()} == {torch.float32}
    assert model.dtype == torch.bfloat16
