"""Learning from experience that is collected along the way.

Dimensions: N environments of this process, T steps of a collection, B batch.
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.collectors import AsyncCollector, Collector

from components.checks import Count, Range, Share, Size, checked
from components.distributed import rank, world_size
from components.structure import COUNT
from datamodules.collecting import CollectingDataModule
from datamodules.environments.measured import MeasuredEnv
from datamodules.replay import STORAGES, ReplayBuffer, delete_replay_files
from datamodules.sampling import Stacks, batch_generator

COLLECTORS = ("sync", "async", "ray")


@checked
class OnlineDataModule(CollectingDataModule):
    """A collector, its replay buffer, and batches drawn from it in step with the collection.

    Environment steps and updates keep a fixed ratio: update u is made once `random_steps` + u / `updates_per_env_step`
    steps were taken. What the collector needs to go on (environments in the middle of episodes, the replay buffer, the
    episodes' statistics) travels in the checkpoint or beside it.

    Args:
        environment, protocols, num_envs: see `CollectingDataModule`.
        replay_folder: where the replay buffer's files lie.
        collector: ``sync`` collects between updates, in this process. ``async`` collects beside them, in a process of
            its own with a copy of the policy that is one collection old, or newer. Its environments begin new episodes
            when a run resumes, and when a batch arrives depends on the machine: such runs lose nothing, but can't be
            repeated exactly. ``ray`` collects in `workers` processes of a Ray cluster, a local one if there is no
            other, while the learner waits; the same holds for its runs. Needs the extra `distributed`.
        workers: processes of ``ray``.
        steps_per_collection: steps of each between two looks at the new policy.
        random_steps: environment steps with uniformly random actions, before the first update.
        updates_per_env_step: updates for each environment step, may be a fraction.
        replay_capacity: transitions that are kept, over all processes.
        replay_storage: see `ReplayBuffer`.
        keep_replay: keep the replay buffer's files when the run is finished, without which it can't go on to more
            updates.
        n_step: steps of the returns.
        discount: of the rewards in n-step returns.
        checkpoint_every: updates between two checkpoints at most; what is written in between must not overwrite what
            the last one shows.
        settings: further arguments of `EnvironmentDataModule`.
    """

    writes: ClassVar = ("replay_folder",)
    state_structure: ClassVar = {
        "layout": {str: (int, float, str, None)},
        "processes": [{"written": COUNT, "environment": (None, {str: Tensor}), "episode": Tensor}],
    }

    def __init__(
        self,
        environment: Callable[..., MeasuredEnv],
        protocols: Mapping[str, Mapping[str, Any]],
        *,
        replay_folder: str,
        collector: str = "sync",
        workers: Size = 2,
        num_envs: Size = 1,
        steps_per_collection: Count = 1,
        random_steps: Count = 5000,
        updates_per_env_step: Annotated[float, Range(1e-6, 1e6)] = 1.0,
        replay_capacity: Count = 1_000_000,
        replay_storage: str = "memory",
        keep_replay: bool = True,
        n_step: Size = 1,
        discount: Share = 0.99,
        checkpoint_every: Count = 10_000,
        **settings: Any,
    ) -> None:
        super().__init__(environment, protocols, num_envs=num_envs, **settings)
        if collector not in COLLECTORS:
            raise ValueError(f"Unknown collector={collector!r}: expected one of {', '.join(COLLECTORS)}.")
        if replay_storage not in STORAGES:
            raise ValueError(f"Unknown replay_storage={replay_storage!r}: expected one of {', '.join(STORAGES)}.")
        if random_steps < n_step * num_envs:
            raise ValueError(
                f"random_steps={random_steps}: expected at least n_step x num_envs = {n_step * num_envs}, or there is "
                "nothing to begin with."
            )
        self.replay_folder = replay_folder
        self.collector = collector
        self.workers = workers
        self.steps_per_collection = steps_per_collection
        self.random_steps = random_steps
        self.updates_per_env_step = Fraction(str(updates_per_env_step))
        self.replay_capacity = replay_capacity
        self.replay_storage = replay_storage
        self.keep_replay = keep_replay
        self.n_step = n_step
        self.discount = discount
        self.checkpoint_every = checkpoint_every
        self.replay: ReplayBuffer | None = None

    # -- experience ---------------------------------------------------------------------------------------------------

    def _begin(self, module: Any) -> None:
        """Make environment, replay buffer and collector, as new or as a checkpoint left them."""
        rows = self.rows
        per_step = self.updates_per_env_step * self.num_envs
        margin = math.ceil(self.checkpoint_every / per_step) + 2 * self.steps_per_collection
        self.replay = ReplayBuffer(
            _example(self._reference_env, rows),
            self.replay_capacity // world_size(),
            margin,
            f"{self.replay_folder}/process_{rank()}",
            self.replay_storage,
            module.device,
            self._reference_env.frame_stack,
        )
        own = self._own_state()
        if own is not None:
            self.replay.restore(own["written"])
        if self.collector == "sync":
            anew = self._make_own_env(own)
            if anew.any():
                self.replay.end_episodes(anew)
        else:
            began = self.replay.written > 0
            if began:
                self.replay.end_episodes()
            if rank() == 0:
                anew = ", and its environments begin new episodes" if began else ""
                print(f"Other processes collect: this run can't be repeated exactly{anew}.", flush=True)
        # Collectors try out policy and environment when they are made; a run that resumes must not notice.
        with torch.random.fork_rng(devices=[module.device] if module.device.type == "cuda" else []):
            self._running = self._make_collector(self._make_rows, module)
            if self.collector != "sync":
                self._running.set_seed(self.seed + 7919 * rank() + self.replay.written)
        self._collected = iter(self._running)

    def _make_collector(self, make_env: Callable[[], MeasuredEnv], module: Any) -> Any:
        policy = module.policy(exploring=True)
        rows = self.num_envs // world_size()
        settings = {
            "frames_per_batch": rows * self.steps_per_collection,
            "total_frames": -1,
            "env_device": "cpu",
            "storing_device": "cpu",
            "auto_register_policy_transforms": False,
        }
        if self.collector == "sync":
            policy = TensorDictModule(_Behaviour(policy, self), ["observation"], ["action"])
            return Collector(self._env, policy, policy_device=module.device, track_traj_ids=False, **settings)
        settings |= {
            "policy_device": "cpu",
            "init_random_frames": max(0, self.random_steps // world_size() - self.replay.written * rows),
        }
        if self.collector == "async":
            return AsyncCollector(make_env, policy, update_at_each_batch=True, **settings)
        return _ray_collector(make_env, policy, rows, self.workers, settings)

    def finish(self) -> None:
        """Called when the run has its results."""
        if not self.keep_replay:
            delete_replay_files(self.replay_folder)

    @property
    def env_steps(self) -> int:
        """Environment steps taken, over all processes."""
        return 0 if self.replay is None else self.replay.written * self.num_envs

    def collect_until(self, module: Any, env_steps: int) -> None:
        """Collect until so many environment steps have been taken over all processes.

        Raises:
            ValueError: a process that collects has stopped.
        """
        try:
            self._collect_until(module, env_steps)
        except (EOFError, BrokenPipeError) as error:
            raise ValueError(
                f"collector={self.collector}: the process that collects has stopped; its own error stands above."
            ) from error

    def _collect_until(self, module: Any, env_steps: int) -> None:
        if self._collected is None:
            self._begin(module)
        while self.env_steps < env_steps:
            batch = next(self._collected)
            if self.collector == "ray":
                batch = batch.flatten(0, 1)  # [workers, N / workers, T]
            self.replay.extend(batch)
            self._count_episodes(module, batch)
            module.advance(self.env_steps)

    def probe(self, count: int) -> TensorDict | None:
        """Transitions [count] of what there is by now, to look at; None before there is any."""
        if self.replay is None and self._restored is not None:  # a run that was stopped after its last update
            self._begin(self.trainer.lightning_module)
        if self.replay is None or not self.replay.size:
            return None
        generator = torch.Generator().manual_seed(self.evaluation_seed)
        return self.replay.sample((count,), generator, self.n_step, self.discount)

    # -- Lightning ----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Stacks:
        """Stacks of batches [updates_per_step, B], each drawn after the environment steps that are due by then."""
        assert self.trainer is not None
        module = self.trainer.lightning_module
        shape = (self.updates_per_step, self.share(self.batch_size, world_size()))

        def draw(update: int) -> TensorDict:
            self.collect_until(module, self.random_steps + int(update / self.updates_per_env_step))
            return self.replay.sample(shape, batch_generator(self.seed, update), self.n_step, self.discount)

        stop = self.next_evaluation(module.updates, module.total_updates)
        return Stacks(draw, self.updates_per_step, module.updates, stop)

    def state_dict(self) -> dict[str, Any]:
        """What the collection goes on from; the replay buffer's new steps are saved at the same time."""
        if self._collected is None:
            return {} if self._restored is None else self._restored
        self.saved_bytes = self.replay.commit()
        return self._saved({"written": self.replay.written})

    def _layout(self) -> dict[str, Any]:
        """What the files of the replay buffer depend on."""
        names = ("num_envs", "replay_capacity", "steps_per_collection", "checkpoint_every")
        return {"updates_per_env_step": str(self.updates_per_env_step), **{name: getattr(self, name) for name in names}}


class _Behaviour(torch.nn.Module):
    """Random actions at first, then those of the exploring policy."""

    def __init__(self, policy: TensorDictModule, data: OnlineDataModule) -> None:
        super().__init__()
        self.policy = policy
        self._data = data

    def forward(self, observation: Tensor) -> Tensor:
        if self._data.env_steps < self._data.random_steps:
            action = 2 * torch.rand(len(observation), self._data.spec["action_dim"]) - 1
            return action.to(observation.device)
        return self.policy(TensorDict({"observation": observation}, batch_size=observation.shape[:1]))["action"]


def _ray_collector(
    make_env: Callable[..., MeasuredEnv], policy: TensorDictModule, rows: int, workers: int, settings: dict[str, Any]
) -> Any:
    """A collector over `workers` processes of a Ray cluster, each with its share of `rows` environments."""
    try:
        import ray
        from torchrl.collectors.distributed import RayCollector
    except ImportError as error:
        raise ValueError('collector=ray: expected Ray (pip install "tenfold[distributed]"), found none.') from error
    if rows % workers:
        raise ValueError(f"num_envs={rows} can't be split over workers={workers}.")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level="error", log_to_driver=False)
    settings = dict(settings)
    shared = {"auto_register_policy_transforms": settings.pop("auto_register_policy_transforms")}
    settings["total_frames"] = 2**62  # it knows no -1
    return RayCollector(
        [partial(make_env, num_envs=rows // workers) for _ in range(workers)],
        policy,
        sync=True,
        num_collectors=workers,
        collector_kwargs=shared,
        remote_configs={"num_cpus": 1},
        update_after_each_batch=True,
        **settings,
    )


def _example(env: MeasuredEnv, n: int) -> TensorDict:
    """What is stored of a step of n environments like the one given, [n]."""
    observed = env.observation_spec["observation"]
    observation = torch.zeros(n, *observed.shape[1:], dtype=observed.dtype)
    flag = torch.zeros(n, 1, dtype=torch.bool)
    following = {"observation": observation, "reward": torch.zeros(n, 1), "terminated": flag, "truncated": flag}
    action = torch.zeros(n, *env.action_spec.shape[1:])
    return TensorDict({"observation": observation, "action": action, "next": following}, batch_size=[n])
