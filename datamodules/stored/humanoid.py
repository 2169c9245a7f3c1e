"""The embedded humanoid data set: made on the user's machine, by balance controllers and policies that ship with it."""

import hashlib
from collections.abc import Mapping

from tensordict import TensorDictBase
from torch import Tensor

from components.buildable import buildable
from components.checks import CountOrZero, NonNegative, Number, Seed, Size, checked
from datamodules.behaviours.humanoid import SOURCES, HumanoidBehaviours, side_by_side
from datamodules.behaviours.locomotion import LOCOMOTION_SOURCES, LocomotionBehaviours
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
    locomotion_noise: NonNegative = 0.3,
    bursts: tuple[Size, Size] = (1, 15),
    fallen_height: Number = 0.6,
    fallen_steps: CountOrZero = 100,
    seed: Seed = 0,
    expected_seconds: NonNegative = 120.0,
) -> TransitionDataset:
    """Load the data set of these settings from `root`, collecting it first if it is not there.

    Args:
        shards, rows, steps: the collection makes shards x rows episodes of at most `steps` control steps.
        shares: of the rows, in proportion: the sources of `HumanoidBehaviours`, which balance and fall, and of
            `LocomotionBehaviours`, which walk, run and get up; those of the former if None.
        max_noise, bursts: see `HumanoidBehaviours`.
        locomotion_noise: the same as `max_noise` for those that walk and get up.
        fallen_height, fallen_steps: an episode ends this many steps after the head first was below this height (m):
            falls are worth learning from, much of lying on the floor is not. Rows that get up are kept whole.
        seed: of everything random.
        expected_seconds: for the line printed before collecting.
    """
    shares = dict(shares or HumanoidBehaviours().shares)
    names = (*SOURCES, *LOCOMOTION_SOURCES)
    if unknown := set(shares) - set(names):
        raise ValueError(f"shares.{min(unknown)}: expected one of {', '.join(names)}, found another behaviour.")
    balance, locomotion = (
        {name: share for name, share in shares.items() if name in known} for known in (SOURCES, LOCOMOTION_SOURCES)
    )
    moving = round(rows * sum(locomotion.values()) / sum(shares.values())) if sum(shares.values()) else 0
    makers = []
    if moving < rows:
        makers.append((HumanoidBehaviours(balance, max_noise, tuple(bursts)), rows - moving))
    if moving:
        makers.append((LocomotionBehaviours(locomotion, locomotion_noise, tuple(bursts)), moving))

    def make_shard(number: int, shard_seed: int) -> Shard:
        episodes = side_by_side([maker.episodes(own, shard_seed, steps) for maker, own in makers])
        starts = episodes.physics.numpy()
        env = BatchedMujocoEnv(
            "humanoid", num_envs=rows, start=lambda simulator, count, generator: starts, episode_length=steps
        )

        def keep(collected: TensorDictBase) -> Tensor:
            fallen = (collected["observation"][..., HEAD_HEIGHT] < fallen_height).cumsum(1) > 0
            return (fallen.cumsum(1) <= fallen_steps) | episodes.rises[:, None]

        return Shard(env, episodes.policy, steps, episodes.source, keep)

    recipe = {
        "domain": "humanoid",
        "version": 9,  # to be raised when the same settings make other data
        "seed": seed,
        "shards": shards,
        "rows": rows,
        "steps": steps,
        "shares": shares,
        "max_noise": max_noise,
        "locomotion_noise": locomotion_noise,
        "policies": {
            path.stem: hashlib.sha256(path.read_bytes()).hexdigest()
            for maker, _ in makers
            if isinstance(maker, LocomotionBehaviours)
            for path in maker.paths
        },
        "bursts": list(bursts),
        "fallen_height": fallen_height,
        "fallen_steps": fallen_steps,
    }
    return collect_dataset(root, "humanoid", recipe, make_shard, expected_seconds=expected_seconds)
