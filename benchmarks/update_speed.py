"""Updates per second: eager, compiled, inside the framework, and as a single-file script would make them.

    python -m benchmarks.update_speed [--rounds 5]

Prints, for forward-backward agents at the sizes of `experiment=fb_humanoid` (and of the paper where there is a GPU),
the bare `update` eager and compiled, and the whole Lightning loop around the same update on the same data; the overhead
of the framework is the loop's time per update over the bare update's. For SAC (two critics 256-256, batch 256), REDQ
(ten such critics) and generalised pessimism learning (ten "modern" critics of 256), the last two with the actor after
every twentieth update, the Lightning loop with batches from the replay buffer beside the loops of
`benchmarks.single_file`, which make the same updates; for AWAC and IQL (two critics 256-256, batch 256) the same, with
batches of stored transitions; for PPO whole rollouts, collection included, on the walker, and environment steps per
second of the humanoid's walk. For agents that see pictures, without a regulariser, with random
shifts and with signal mixing, the bare `update` eager and compiled. All that is compared takes turns in one run.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from statistics import median
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tensordict import TensorDict

from benchmarks.single_file import (
    AWAC,
    GPL,
    IQL,
    PPO,
    REDQ,
    SAC,
    Batch,
    ModernCritics,
    SeparateCritics,
    SimpleCritics,
    make_on_policy_training,
    make_training,
)
from datamodules.replay import ReplayBuffer
from datamodules.sampling import Futures, UniformBatches, batch_generator
from launch.experiments import CONFIGS
from launch.study import quieten
from lightning_modules.base import LearningMethod

ROWS = 100_000


Sizes = tuple[int | tuple[int, int, int], int]
"""Of observations, vectors or pictures, and actions."""


def make_module(overrides: list[str], sizes: Sizes, device: torch.device) -> tuple[LearningMethod, int]:
    """The method that `overrides` compose, for observations and actions of these sizes, and its batch size."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides)
    torch.manual_seed(0)
    config.module.updates_per_step = OmegaConf.to_container(config.datamodule, resolve=False)["updates_per_step"]
    shape = [sizes[0]] if isinstance(sizes[0], int) else sizes[0]
    made = instantiate(config.module, observation_shape=shape, action_dim=sizes[1])
    return made.to(device), config.datamodule.batch_size


def arm_of(experiment: str, arm: str) -> list[str]:
    """The overrides that compose an experiment's arm."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", [f"experiment={experiment}"]))
    return [f"experiment={experiment}", *config["arms"][arm]]


def make_data(sizes: tuple[int, int], device: torch.device) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    rows = {
        "observation": torch.randn(ROWS, sizes[0], generator=generator),
        "action": 2 * torch.rand(ROWS, sizes[1], generator=generator) - 1,
        "next": {
            "observation": torch.randn(ROWS, sizes[0], generator=generator),
            "reward": torch.randn(ROWS, 1, generator=generator),
            "terminated": torch.zeros(ROWS, 1, dtype=torch.bool),
        },
    }
    return TensorDict(rows, batch_size=[ROWS], device=device)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_bare(module: LearningMethod, batches: list[TensorDict], updates: int) -> float:
    """Seconds per update of the bare rule."""
    device = module.device
    synchronise(device)
    start = time.perf_counter()
    for index in range(updates):
        module.run_update(batches[index % len(batches)])
    synchronise(device)
    return (time.perf_counter() - start) / updates


def time_loop(module: LearningMethod, batches: Iterable[TensorDict], updates: int) -> float:
    """Seconds per update of the Lightning loop over stacks of batches, without its start."""
    steps = module.updates_per_step
    clock = Clock()
    trainer = L.Trainer(
        accelerator="gpu" if module.device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=-1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module.updates, module.total_updates = 0, updates + steps
    trainer.fit(module, batches)
    return clock.seconds / updates


class ReplayBatches:
    """Stacks of batches from a replay buffer, without end."""

    def __init__(self, replay: ReplayBuffer, shape: tuple[int, int]) -> None:
        self.replay, self.shape = replay, shape

    def __iter__(self) -> Iterator[TensorDict]:
        for update in count():
            yield self.replay.sample(self.shape, batch_generator(0, update))


class Clock(L.Callback):
    """Measures from the end of the first step to the end of the last."""

    def __init__(self) -> None:
        self.started: float | None = None
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        synchronise(module.device)
        now = time.perf_counter()
        self.started = self.started or now
        self.seconds = now - self.started


def interleaved(measures: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each measure's seconds in rounds in which all take their turn: load on the machine meets all alike."""
    results: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            results[name].append(measure())
    return results


def ratio(results: dict[str, list[float]], name: str, other: str) -> float:
    """The median, over rounds, of how many updates `name` makes in the time of one of `other`."""
    return median(theirs / own for own, theirs in zip(results[name], results[other]))


def show(title: str, results: dict[str, list[float]], device: torch.device) -> None:
    print(
        f"{title}, {device}, {torch.get_num_threads()} threads, medians of {len(next(iter(results.values())))} rounds:"
    )
    for name, values in results.items():
        print(f"  {name:<24} {1 / median(values):8.1f} updates/s  {1e3 * median(values):8.2f} ms")


def report_forward_backward(experiment: str, arm: str, title: str, device: torch.device, rounds: int, updates: int):
    sizes, overrides = (67, 21), arm_of(experiment, arm)
    data = make_data(sizes, device)
    module, batch_size = make_module(overrides, sizes, device)
    steps = module.updates_per_step
    futures = None
    if module.futures is not None:
        futures = Futures(data["next", "observation"], torch.full((ROWS,), ROWS - 1, device=device), *module.futures)
    batches = [batch[0] for batch in UniformBatches(data, batch_size, 1, 0, 32, seed=0, futures=futures)]
    modes = {"compiled": "default"} | ({"CUDA graphs": "cudagraphs"} if device.type == "cuda" else {})
    compiled = {
        name: make_module([*overrides, f"module.compile={mode}"], sizes, device)[0] for name, mode in modes.items()
    }
    for other in (module, *compiled.values()):
        time_bare(other, batches, 12)  # warm up, and compile
    stacks = UniformBatches(data, batch_size, steps, 0, updates + steps, seed=0, futures=futures)
    measures = {
        "eager": partial(time_bare, module, batches, updates),
        "Lightning loop": partial(time_loop, module, stacks, updates),
        **{name: partial(time_bare, other, batches, updates) for name, other in compiled.items()},
    }
    results = interleaved(measures, rounds)
    show(f"{title}, batch {batch_size}", results, device)
    overhead = 1 / ratio(results, "Lightning loop", "eager") - 1
    print(f"  overhead of the framework: {100 * overhead:.1f} %", flush=True)


def report_actor_critic(
    overrides: list[str],
    make_plain: Callable[[], SAC | AWAC],
    title: str,
    device: torch.device,
    rounds: int,
    updates: int,
) -> None:
    """The framework's loop and that of a single file, which make the same updates, eager and compiled."""
    sizes = (17, 6)  # of HalfCheetah
    data = make_data(sizes, device)
    columns: Batch = (
        data["observation"],
        data["action"],
        data["next", "observation"],
        data["next", "reward"][:, 0],
        data["next", "terminated"][:, 0].float(),
    )
    offline, stored = "datamodule=offline" in overrides, data.clone(False)
    with tempfile.TemporaryDirectory() as folder:
        data["next", "truncated"] = data["next", "terminated"]
        replay = ReplayBuffer(data[:100], ROWS, 1, folder, "memory", device)
        replay.extend(data.reshape(100, -1))
        results = {}
        for name, mode in {"eager": "null", "compiled": "default"}.items():
            module, batch_size = make_module([*overrides, f"module.compile={mode}"], sizes, device)
            with device:
                agent = make_plain()
            train = make_training(agent, columns, batch_size, module.actor_every, name == "compiled")
            stacks = (
                UniformBatches(stored, batch_size, module.updates_per_step, 0, 10**9, seed=0)
                if offline
                else ReplayBatches(replay, (module.updates_per_step, batch_size))
            )
            measures = {
                f"framework, {name}": partial(time_loop, module, stacks, updates),
                f"single file, {name}": partial(time_plain, train, updates, device),
            }
            for measure in measures.values():  # warm up, and compile
                measure()
            results |= interleaved(measures, rounds)
    show(f"{title}, batch {batch_size}", results, device)
    for name in ("eager", "compiled"):
        times = ratio(results, f"framework, {name}", f"single file, {name}")
        print(f"  {name}: the framework has {times:.2f} times the updates of the single file", flush=True)


class Rollouts:
    """Stacks of batches from the rollouts of a method, without end."""

    def __init__(self, overrides: list[str], device: torch.device) -> None:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("train", [*overrides, "run_dir=none", f"datamodule.evaluate_every={20 * 10**6}"])
        torch.manual_seed(0)
        self.data = instantiate(config.datamodule)
        self.module = instantiate(config.module, **self.data.spec).to(device)
        self.data.trainer = SimpleNamespace(lightning_module=self.module)

    def __iter__(self) -> Iterator[Any]:
        draw = self.data.train_dataloader().draw
        while True:
            yield draw(0)


def report_on_policy(device: torch.device, rounds: int, updates: int) -> None:
    """Whole rollouts of PPO on the walker, with a script's beside it, and the humanoid's environment steps."""
    results = {}
    for name, mode in {"eager": "null", "compiled": "default"}.items():
        ours = Rollouts(["experiment=ppo_walker", "module.max_norm=0.5", f"module.compile={mode}"], device)
        data, spec = ours.data, ours.data.spec
        agent = PPO(spec["observation_shape"][0], spec["action_dim"], 256)
        env = data._make_env(num_envs=data.num_envs, seed=0)
        minibatches = data.updates_per_step // data.epochs
        train = make_on_policy_training(agent, env, data.rollout_steps, data.epochs, minibatches, name == "compiled")
        step = data.updates_per_step
        measures = {
            f"framework, {name}": partial(time_loop, ours.module, ours, updates),
            f"single file, {name}": lambda train=train, step=step: time_plain(train, updates // step, device) / step,
        }
        for measure in measures.values():  # warm up, and compile
            measure()
        results |= interleaved(measures, rounds)
        data.teardown("fit")
    show(f"PPO of the walker, {data.num_envs} x {data.rollout_steps} steps in {step} updates", results, device)
    for name in ("eager", "compiled"):
        times = ratio(results, f"framework, {name}", f"single file, {name}")
        print(f"  {name}: the framework has {times:.2f} times the updates of the single file", flush=True)
    humanoid = Rollouts(["experiment=ppo_humanoid_walk"], device)
    seconds = [time_loop(humanoid.module, humanoid, updates) for _ in range(rounds + 1)][1:]
    data = humanoid.data
    steps = data.num_envs * data.rollout_steps / data.updates_per_step
    print(f"  the humanoid's walk: {steps / median(seconds):.0f} environment steps/s, learning included", flush=True)
    data.teardown("fit")


def report_pixels(
    experiment: str, size: int, title: str, device: torch.device, rounds: int, updates: int, precision: str = "32"
) -> None:
    """Updates of agents that see pictures: without a regulariser, with random shifts, and with signal mixing."""
    arms = {"none": ["mixing=none"], "DrQ-v2": ["mixing=none", "augmentation=random_shift"], "A-LIX": []}
    modes = {"eager": "null", "compiled": "cudagraphs" if device.type == "cuda" else "default"}
    measures = {}
    for arm, overrides in arms.items():
        for name, mode in modes.items():
            switches = [f"experiment={experiment}", *overrides, f"module.compile={mode}"]
            module, batch_size = make_module(switches, ((9, size, size), 6), device)
            generator = torch.Generator().manual_seed(0)
            shape = (batch_size, 9, size, size)
            pictures = [torch.randint(256, shape, generator=generator, dtype=torch.uint8) for _ in range(2)]
            batch = make_data((1, 6), torch.device("cpu"))[:batch_size]
            batch["observation"], batch["next", "observation"] = pictures
            measures[f"{arm}, {name}"] = partial(time_half, precision, time_bare, module, [batch.to(device)], updates)
    for measure in measures.values():  # warm up, and compile
        measure()
    results = interleaved(measures, rounds)
    show(f"{title}, batch {batch_size}", results, device)
    for name in modes:
        for arm in ("DrQ-v2", "A-LIX"):
            times = ratio(results, f"{arm}, {name}", f"none, {name}")
            print(f"  {name}: {arm} makes {times:.2f} times the updates of no regulariser", flush=True)


def _offline(plain: type[AWAC]) -> AWAC:
    return plain(17, 6, SimpleCritics(23, 2, 256), 256)


def time_half(precision: str, measure: Callable[..., float], module: LearningMethod, *arguments: object) -> float:
    """What `measure` gives, in bfloat16 where that is asked for."""
    with torch.autocast(module.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return measure(module, *arguments)


def time_plain(train: Callable[[int], None], updates: int, device: torch.device) -> float:
    """Seconds per update of a single-file loop."""
    synchronise(device)
    start = time.perf_counter()
    train(updates)
    synchronise(device)
    return (time.perf_counter() - start) / updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--updates", type=int, default=60, help="updates in each round, a multiple of 20")
    arguments = parser.parse_args()
    quieten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extent = {"device": device, "rounds": arguments.rounds, "updates": arguments.updates}
    report_actor_critic(
        ["module=actor_critic", "datamodule=online", "datamodule.updates_per_step=10"],
        lambda: SAC(17, 6, SimpleCritics(23, 2, 256), 256),
        "SAC, two critics 256-256",
        **extent,
    )
    report_actor_critic(
        ["module=redq", "datamodule=online", "module.actor_every=20", "datamodule.updates_per_step=20"],
        lambda: REDQ(17, 6, SeparateCritics(23, 10, 256), 256),
        "REDQ, ten critics 256-256, actor every 20 updates",
        **extent,
    )
    report_actor_critic(
        ["module=gpl", "datamodule=online", "module.actor_every=20", "datamodule.updates_per_step=20"],
        lambda: GPL(17, 6, ModernCritics(23, 10, 256), 256),
        "GPL, ten modern critics, actor every 20 updates",
        **extent,
    )
    for module, plain in {"awac": AWAC, "iql": IQL}.items():
        report_actor_critic(
            [
                f"module={module}",
                "datamodule=offline",
                "datamodule.dataset.path=none",
                "datamodule.updates_per_step=20",
            ],
            partial(_offline, plain),
            f"{module.upper()}, two critics 256-256",
            **extent,
        )
    if device.type == "cpu":
        report_on_policy(**extent)
    small = {**extent, "updates": min(arguments.updates, 10)}
    report_pixels("alix_cartpole", 48, "Pixel agents as in alix_cartpole", **small)
    report_forward_backward("fb_humanoid", "fb_aware", "FB-AWARE as in fb_humanoid", **extent)
    report_forward_backward("fb_humanoid", "fb", "FB as in fb_humanoid", **extent)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        for precision in ("32", "bf16"):
            title = f"Pixel agents at paper size, {'TF32' if precision == '32' else precision}"
            report_pixels("paper/alix_cheetah_run", 84, title, **extent, precision=precision)
        report_forward_backward("paper/fb_humanoid", "fb_aware", "FB-AWARE at paper size, TF32", **extent)


if __name__ == "__main__":
    main()
