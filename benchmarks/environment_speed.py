"""Control steps per second of humanoid: TorchRL's collector over its own environment and over `BatchedMujocoEnv`.

Both sides run the same collector and the same policy network, inference included, one after the other: in this process,
and beside it in one of the collector's own, as `collector=sync` and `collector=async` do:

    python -m benchmarks.environment_speed --num-envs 1024 --seconds 10
"""

import argparse
import os
import time
import warnings
from functools import partial

import torch
from tensordict.nn import TensorDictModule
from torchrl.collectors import AsyncCollector, BaseCollector, Collector
from torchrl.envs import CatTensors, DMControlEnv, DoubleToFloat, EnvBase, TransformedEnv

from datamodules.environments.batched_mujoco import BatchedMujocoEnv


def make_policy() -> TensorDictModule:
    """A deterministic policy of humanoid, 67-256-256-21."""
    network = torch.nn.Sequential(
        torch.nn.Linear(67, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 21),
        torch.nn.Tanh(),
    )
    return TensorDictModule(network, in_keys=["observation"], out_keys=["action"])


def suite_environment() -> EnvBase:
    """TorchRL's environment over dm_control, with the observation flat and in float32 as networks need it."""
    environment = TransformedEnv(DMControlEnv("humanoid", "stand"))
    keys = ["joint_angles", "head_height", "extremities", "torso_vertical", "com_velocity", "velocity"]
    environment.append_transform(CatTensors(keys, "observation", del_keys=True, sort=False))
    environment.append_transform(DoubleToFloat(in_keys=["observation"], in_keys_inv=["action"]))
    return environment


def measure(collector: BaseCollector, seconds: float) -> tuple[float, float]:
    """Control steps per second and processor microseconds per step, over whole batches, the first one left out.

    Processor time, of this process, is what a busy machine does not distort.
    """
    collected, began, processor = 0, 0.0, 0.0
    for index, batch in enumerate(collector):
        if index == 0:
            began, processor = time.perf_counter(), time.process_time()
            continue
        collected += batch.numel()
        if time.perf_counter() - began > seconds:
            break
    elapsed, used = time.perf_counter() - began, time.process_time() - processor
    collector.shutdown()
    return collected / elapsed, used / collected * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, default=1024, help="environments in the batch (default 1024)")
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time per side (default 10)")
    parser.add_argument("--repeats", type=int, default=1, help="alternating measurements of both sides (default 1)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    # The simulation keeps all cores busy: for a network this small, PyTorch's own threads only get in its way.
    torch.set_num_threads(1)
    policy = make_policy()
    print(f"humanoid on {len(os.sched_getaffinity(0))} cores, policy 67-256-256-21 included")
    own = partial(BatchedMujocoEnv, "humanoid", "stand", arguments.num_envs)
    frames = 20 * arguments.num_envs
    for _ in range(arguments.repeats):
        single, single_cost = measure(Collector(suite_environment(), policy, **collection(500)), arguments.seconds)
        show("Collector over DMControlEnv, 1 environment", single, single_cost)
        batched, cost = measure(Collector(own(), policy, **collection(frames)), arguments.seconds)
        show(f"Collector over BatchedMujocoEnv, {arguments.num_envs} environments", batched, cost)
        print(f"  ratio {batched / single:.1f} in steps/s, {single_cost / cost:.1f} in CPU time")
        single, _ = measure(AsyncCollector(suite_environment, policy, **collection(500)), arguments.seconds)
        show("AsyncCollector over DMControlEnv, 1 environment", single)
        batched, _ = measure(AsyncCollector(own, policy, **collection(frames)), arguments.seconds)
        show(f"AsyncCollector over BatchedMujocoEnv, {arguments.num_envs} environments", batched)
        print(f"  ratio {batched / single:.1f} in steps/s")


def collection(frames: int) -> dict[str, int]:
    return {"frames_per_batch": frames, "total_frames": -1}


def show(name: str, speed: float, cost: float | None = None) -> None:
    print(f"  {name:56s} {speed:7.0f} steps/s" + ("" if cost is None else f", {cost:5.0f} us CPU/step"), flush=True)


if __name__ == "__main__":
    main()
