"""Pictures per second of the cheetah at 84x84: TorchRL's environment as it is, and `PixelControlEnv`.

Both sides are collected from by the same collector with random actions, one after the other, a picture for each
environment step of one control step:

    python -m benchmarks.rendering_speed --num-envs 8 --seconds 10
"""

import argparse
import os
import warnings

import torch
from torchrl.collectors import Collector
from torchrl.envs import DMControlWrapper, EnvBase

from benchmarks.environment_speed import collection, measure, show
from datamodules.environments.pixel_control import PixelControlEnv

SIZE = 84


def suite_environment() -> EnvBase:
    """TorchRL's environment over dm_control, as it draws by itself; DMControlEnv has no argument for the size."""
    from dm_control import suite  # after our environments, which choose its graphics library

    size = {"width": SIZE, "height": SIZE, "camera_id": 0}
    return DMControlWrapper(suite.load("cheetah", "run"), from_pixels=True, pixels_only=True, render_kwargs=size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, default=8, help="environments in the batch (default 8)")
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time per side (default 10)")
    parser.add_argument("--repeats", type=int, default=3, help="alternating measurements of all sides (default 3)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(f"cheetah, {SIZE}x{SIZE} pixels, on {len(os.sched_getaffinity(0))} cores")
    own = {"size": SIZE, "frame_stack": 1, "action_repeat": 1}
    sides = {
        "PixelControlEnv, 1 environment": (1, {}),
        f"PixelControlEnv, {arguments.num_envs} environments, one thread": (arguments.num_envs, {"render_workers": 1}),
        f"PixelControlEnv, {arguments.num_envs} environments": (arguments.num_envs, {}),
        f"PixelControlEnv, {arguments.num_envs} environments, effects": (arguments.num_envs, {"effects": True}),
    }
    for _ in range(arguments.repeats):
        single, _ = measure(Collector(suite_environment(), None, **collection(50)), arguments.seconds)
        show("DMControlWrapper(from_pixels=True)", single)
        for name, (count, settings) in sides.items():
            env = PixelControlEnv("cheetah", "run", count, **own, **settings)
            speed, _ = measure(Collector(env, None, **collection(50 * count)), arguments.seconds)
            show(name, speed)
            print(f"  ratio {speed / single:.1f}")


if __name__ == "__main__":
    main()
