"""Updates per second of forward-backward agents: eager, compiled, and inside the framework.

    python -m benchmarks.update_speed [--seconds 20]

Prints, for the sizes of `experiment=fb_humanoid` (and of the paper where there is a GPU), the bare `update` eager and
compiled, and the whole Lightning loop around the same update on the same data, interleaved in one run. The overhead of
the framework is the loop's time per update over the bare update's.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tensordict import TensorDict

from datamodules.sampling import UniformBatches
from launch.experiments import CONFIGS
from launch.study import quieten
from lightning_modules.base import LearningMethod

ROWS = 100_000


def make_module(experiment: str, arm: str, overrides: list[str], device: torch.device) -> tuple[LearningMethod, int]:
    """The method of an experiment's arm on `device`, and its batch size."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        arms = compose("train", [f"experiment={experiment}"]).arms
        config = compose("train", [f"experiment={experiment}", *arms.get(arm, []), *overrides])
    torch.manual_seed(0)
    config.module.updates_per_step = OmegaConf.to_container(config.datamodule, resolve=False)["updates_per_step"]
    return instantiate(config.module, observation_dim=67, action_dim=21).to(device), config.datamodule.batch_size


def make_data(device: torch.device) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    rows = {
        "observation": torch.randn(ROWS, 67, generator=generator),
        "action": 2 * torch.rand(ROWS, 21, generator=generator) - 1,
        "next": {
            "observation": torch.randn(ROWS, 67, generator=generator),
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


def time_loop(module: LearningMethod, data: TensorDict, batch_size: int, updates: int) -> float:
    """Seconds per update of the Lightning loop, without its start."""
    steps = module.updates_per_step
    clock = Clock()
    trainer = L.Trainer(
        accelerator="gpu" if data.device is not None and data.device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=-1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module.updates, module.total_updates = 0, updates + steps
    trainer.fit(module, UniformBatches(data, batch_size, steps, 0, updates + steps, seed=0))
    return clock.seconds / updates


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


def interleaved(measures: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of each measure over rounds in which all take their turn: load on the machine meets all alike."""
    results: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            results[name].append(measure())
    return {name: median(values) for name, values in results.items()}


def report(experiment: str, arm: str, title: str, device: torch.device, rounds: int, updates: int) -> None:
    data = make_data(device)
    module, batch_size = make_module(experiment, arm, [], device)
    batches = list(UniformBatches(data, batch_size, 1, 0, 32, seed=0))
    batches = [batch[0] for batch in batches]
    modes = {"compiled": "default"} | ({"CUDA graphs": "cudagraphs"} if device.type == "cuda" else {})
    compiled = {
        name: make_module(experiment, arm, [f"module.compile={mode}"], device)[0] for name, mode in modes.items()
    }
    for other in (module, *compiled.values()):
        time_bare(other, batches, 12)  # warm up, and compile
    measures = {
        "eager": partial(time_bare, module, batches, updates),
        "Lightning loop": partial(time_loop, module, data, batch_size, updates),
        **{name: partial(time_bare, other, batches, updates) for name, other in compiled.items()},
    }
    seconds = interleaved(measures, rounds)
    print(f"{title}, batch {batch_size}, {device}, {torch.get_num_threads()} threads:")
    for name, value in seconds.items():
        print(f"  {name:<15} {1 / value:8.1f} updates/s  {1e3 * value:8.2f} ms")
    print(f"  overhead of the framework: {100 * (seconds['Lightning loop'] / seconds['eager'] - 1):.1f} %", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=60, help="updates in each round, a multiple of 10")
    arguments = parser.parse_args()
    quieten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report("fb_humanoid", "fb_aware", "FB-AWARE as in fb_humanoid", device, arguments.rounds, arguments.updates)
    report("fb_humanoid", "fb", "FB as in fb_humanoid", device, arguments.rounds, arguments.updates)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        report(
            "paper/fb_humanoid", "fb_aware", "FB-AWARE at paper size, TF32", device, arguments.rounds, arguments.updates
        )


if __name__ == "__main__":
    main()
