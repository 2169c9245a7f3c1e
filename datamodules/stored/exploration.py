"""Data sets of random actions, for every domain: made on the user's machine, without learning."""

from tensordict.nn import TensorDictModule

from components.buildable import buildable
from components.checks import NonNegative, Seed, Size, checked
from datamodules.behaviours.exploration import ExplorationController
from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.domains import start_random_untouched
from datamodules.stored.collect import Shard, collect_dataset
from datamodules.stored.transitions import TransitionDataset

STARTS = {"suite": None, "anywhere": start_random_untouched}


@buildable(writes="root")
@checked
def exploration_dataset(
    root: str,
    domain: str,
    *,
    shards: Size = 4,
    rows: Size = 128,
    steps: Size = 250,
    starts: str = "suite",
    seed: Seed = 0,
    expected_seconds: NonNegative = 60.0,
) -> TransitionDataset:
    """Load the data set of these settings from `root`, collecting it first if it is not there.

    Every episode is driven by one of the kinds of random actions of `ExplorationController`; `source` says which.

    Args:
        domain: a key of `domains.DOMAINS`.
        shards, rows, steps: the collection makes shards x rows episodes of `steps` control steps.
        starts: ``suite``, the domain's own starting states, or ``anywhere``, random joints that touch nothing. Random
            actions don't travel: to see all of a maze, episodes have to begin all over it.
        seed: of everything random.
        expected_seconds: for the line printed before collecting.

    Raises:
        ValueError: `starts` or `domain` is unknown.
    """
    if starts not in STARTS:
        raise ValueError(f"Unknown starts={starts!r}: expected one of {', '.join(STARTS)}.")

    def make_shard(number: int, shard_seed: int) -> Shard:
        env = BatchedMujocoEnv(domain, num_envs=rows, start=STARTS[starts], episode_length=steps)
        controls = env.action_spec.shape[-1]
        controller = ExplorationController(rows, controls, env.step_seconds, shard_seed)
        policy = TensorDictModule(controller, in_keys=["physics"], out_keys=["action"])
        return Shard(env, policy, steps, controller.get_buffer("kind").squeeze(-1))

    recipe = {
        "domain": domain,
        "version": 1,  # to be raised when the same settings make other data
        "seed": seed,
        "shards": shards,
        "rows": rows,
        "steps": steps,
        "starts": starts,
    }
    return collect_dataset(root, f"{domain}-exploration", recipe, make_shard, expected_seconds=expected_seconds)
