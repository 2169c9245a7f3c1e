"""Data sets of learned policies: what the agents of several tasks did, early, midway and late in their training."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from tensordict.nn import TensorDictModule

from components.buildable import buildable
from components.checks import NonNegative, Seed, Size, checked
from components.files import check_file
from datamodules.behaviours.trained import BEHAVIOURS, TrainedPolicies
from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.stored.collect import Shard, collect_dataset
from datamodules.stored.transitions import TransitionDataset


@buildable(writes="root")
@checked
def trained_dataset(
    root: str,
    domain: str,
    policies: Mapping[str, Sequence[str]],
    *,
    shards: Size = 4,
    rows: Size = 8,
    steps: Size = 1000,
    seed: Seed = 0,
    expected_seconds: NonNegative = 90.0,
) -> TransitionDataset:
    """Load the data set of these settings from `root`, collecting it first if it is not there.

    Args:
        domain: a key of `domains.DOMAINS`; its policies are those of `behaviours/DOMAIN`.
        policies: what the data's `sources` are called -> names of the policies that are one, with their noise.
        shards, rows, steps: every policy drives shards x rows episodes of `steps` control steps.
        seed: of everything random.
        expected_seconds: for the line printed before collecting.

    Raises:
        FileNotFoundError: a policy is not there.
    """
    names = [name for group in policies.values() for name in group]
    paths = [BEHAVIOURS / domain / f"{name}.safetensors" for name in names]
    for path in paths:
        check_file(path, "a policy that ships with the project")
    numbers = [number for number, group in enumerate(policies.values()) for _ in group]
    source = torch.tensor(numbers).repeat_interleave(rows)

    def make_shard(number: int, shard_seed: int) -> Shard:
        env = BatchedMujocoEnv(domain, num_envs=len(source), episode_length=steps)
        policy = TensorDictModule(TrainedPolicies(paths, rows), in_keys=["observation"], out_keys=["action"])
        return Shard(env, policy, steps, source)

    recipe = {
        "domain": domain,
        "version": 1,  # to be raised when the same settings make other data
        "seed": seed,
        "shards": shards,
        "rows": rows,
        "steps": steps,
        "policies": [[name, list(group)] for name, group in policies.items()],  # whose order numbers the sources
        "weights": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in zip(names, paths)},
    }
    data = collect_dataset(root, f"{domain}-trained", recipe, make_shard, expected_seconds=expected_seconds)
    return TransitionDataset(data.data, {**data.manifest, "sources": list(policies)})
