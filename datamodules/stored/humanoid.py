"""The embedded humanoid data set: made on the user's machine, by controllers that need no learning."""

from collections.abc import Mapping

from tensordict import TensorDictBase
from torch import Tensor

from components.buildable import buildable
from components.checks import CountOrZero, NonNegative, Number, Seed, Size, checked
from datamodules.behaviours.humanoid import HumanoidBehaviours
from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.stored.collect import Shard, collect_dataset
from datamodules.stored.transitions import TransitionDataset

HEAD_HEIGHT = 21  # its place in dm_control's flat observation


@buildable(writes="root")
@checked
def humanoid_dataset(
    root: str,
    *,
    shards: Size = 4,
    rows: Size = 128,
    steps: Size = 1000,
    shares: Mapping[str, NonNegative] | None = None,
    max_noise: NonNegative = 0.5,
    bursts: tuple[Size, Size] = (1, 15),
    fallen_height: Number = 0.6,
    fallen_steps: CountOrZero = 100,
    seed: Seed = 0,
    expected_seconds: NonNegative = 120.0,
) -> TransitionDataset:
    """Load the data set of these settings from `root`, collecting it first if it is not there.

    Args:
        shards, rows, steps: the collection makes shards x rows episodes of at most `steps` control steps.
        shares, max_noise, bursts: see `HumanoidBehaviours`.
        fallen_height, fallen_steps: an episode ends this many steps after the head first was below this height (m):
            falls are worth learning from, much of lying on the floor is not.
        seed: of everything random.
        expected_seconds: for the line printed before collecting.
    """
    behaviours = HumanoidBehaviours(shares, max_noise, tuple(bursts))

    def make_shard(number: int, shard_seed: int) -> Shard:
        episodes = behaviours.episodes(rows, shard_seed, steps)
        starts = episodes.physics.numpy()
        env = BatchedMujocoEnv(
            "humanoid", num_envs=rows, start=lambda simulator, count, generator: starts, episode_length=steps
        )

        def keep(collected: TensorDictBase) -> Tensor:
            fallen = (collected["observation"][..., HEAD_HEIGHT] < fallen_height).cumsum(1) > 0
            return fallen.cumsum(1) <= fallen_steps

        return Shard(env, episodes.policy, steps, episodes.source, keep)

    recipe = {
        "domain": "humanoid",
        "version": 7,  # to be raised when the same settings make other data
        "seed": seed,
        "shards": shards,
        "rows": rows,
        "steps": steps,
        "shares": dict(behaviours.shares),
        "max_noise": max_noise,
        "bursts": list(bursts),
        "fallen_height": fallen_height,
        "fallen_steps": fallen_steps,
    }
    return collect_dataset(root, "humanoid", recipe, make_shard, expected_seconds=expected_seconds)
