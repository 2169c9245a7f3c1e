"""Learning from what the policy of the moment does: rollouts that are used for a few updates and forgotten.

Dimensions: N environments of this process, T steps of a rollout, B batch.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.collectors import Collector

from components.checks import Count, Size, checked
from components.distributed import world_size
from components.networks.states import difference
from components.structure import COUNT
from datamodules.collecting import CollectingDataModule
from datamodules.environments.measured import MeasuredEnv
from datamodules.sampling import DrawnInTurn, Stacks, batch_generator


@checked
class OnPolicyDataModule(CollectingDataModule):
    """Rollouts of `num_envs` x `rollout_steps` transitions, each learned from in one of Lightning's steps.

    Before a step, the policy collects a rollout [N, T]; the method makes of it what it learns from,
    `prepare(rollout, carried)`; the step's updates then draw from that, in `epochs` passes, each in an order of its
    own, which is a function of (seed, rank, update). So a checkpoint, which is taken between steps, never has a
    rollout in it, and is as small as environments and networks are.

    Args:
        environment, protocols, num_envs: see `CollectingDataModule`. What an environment stores of a step, a method may
            use: `prepare` is given all of it.
        rollout_steps: T.
        epochs: passes over a rollout.
        updates_per_step: of one rollout, over all epochs: a batch is num_envs x rollout_steps x epochs over it.
        settings: further arguments of `EnvironmentDataModule`, but for the batch size.
    """

    state_structure: ClassVar = {
        "layout": {str: (int, float, str, None)},
        "processes": [
            {"written": COUNT, "environment": (None, {str: Tensor}), "episode": Tensor, "carried": (None, Tensor)}
        ],
    }

    def __init__(
        self,
        environment: Callable[..., MeasuredEnv],
        protocols: Mapping[str, Mapping[str, Any]],
        *,
        num_envs: Size = 64,
        rollout_steps: Count = 32,
        epochs: Size = 5,
        updates_per_step: Size = 20,
        **settings: Any,
    ) -> None:
        if updates_per_step % epochs:
            raise ValueError(f"updates_per_step={updates_per_step} is no multiple of epochs={epochs}.")
        minibatches, transitions = updates_per_step // epochs, num_envs * rollout_steps
        if transitions % minibatches:
            raise ValueError(
                f"updates_per_step={updates_per_step}: expected batches of one size, found {minibatches} of the "
                f"{transitions} transitions of a rollout."
            )
        super().__init__(
            environment,
            protocols,
            num_envs=num_envs,
            updates_per_step=updates_per_step,
            batch_size=transitions // minibatches,
            **settings,
        )
        self.rollout_steps = rollout_steps
        self.epochs = epochs
        self._written = 0  # steps of each environment
        self._carried: Tensor | None = None

    @property
    def env_steps(self) -> int:
        """Environment steps taken, over all processes."""
        return self._written * self.num_envs

    def _begin(self, module: Any) -> None:
        own = self._own_state()
        anew = self._make_own_env(own)
        if own is not None:
            self._written, carried = own["written"], own["carried"]
            if carried is not None:
                fault = difference({"carried": carried}, {"carried": carried.new_zeros(self.rows, *carried.shape[1:])})
                if fault is not None:
                    raise ValueError(f"{fault}.")
                carried = carried.masked_fill(anew.view(-1, *(1,) * (carried.dim() - 1)), 0)
            self._carried = carried
        # Collectors try out policy and environment when they are made; a run that resumes must not notice.
        with torch.random.fork_rng(devices=[module.device] if module.device.type == "cuda" else []):
            self._running = Collector(
                self._env,
                module.policy(exploring=True),
                frames_per_batch=self.rows * self.rollout_steps,
                total_frames=-1,
                policy_device=module.device,
                env_device="cpu",
                storing_device="cpu",
                track_traj_ids=False,
                auto_register_policy_transforms=False,
            )
        self._collected = iter(self._running)

    def _prepared(self, module: Any) -> TensorDict:
        """What a new rollout gives to learn from, [N T]."""
        if self._collected is None:
            self._begin(module)
        rollout = next(self._collected)
        self._written += self.rollout_steps
        self._count_episodes(module, rollout)
        for name, value in self._env.gauges().items():
            module.tally((name,), torch.tensor([value]), 1)
        module.advance(self.env_steps)
        prepared, carried = module.prepare(rollout.to(module.device), self._carried)
        self._carried = None if carried is None else carried.to("cpu")
        if prepared.batch_size != (rollout.numel(),):
            raise ValueError(
                f"{type(module).__name__}.prepare: expected [{rollout.numel()}] transitions, found "
                f"{list(prepared.batch_size)}."
            )
        return prepared

    def train_dataloader(self) -> Stacks:
        """A stack of batches [B] for each rollout."""
        assert self.trainer is not None
        module = self.trainer.lightning_module
        batch_size = self.share(self.batch_size, world_size())
        minibatches = self.updates_per_step // self.epochs

        def stack(first: int) -> DrawnInTurn:
            prepared = self._prepared(module)
            orders: dict[int, Tensor] = {}

            def draw(update: int) -> TensorDict:
                epoch, place = divmod(update - first, minibatches)
                if epoch not in orders:
                    order = torch.randperm(len(prepared), generator=batch_generator(self.seed, first + epoch))
                    orders[epoch] = order.to(prepared.device)
                return prepared[orders[epoch][place * batch_size : (place + 1) * batch_size]]

            return DrawnInTurn(draw, first, self.updates_per_step)

        stop = self.next_evaluation(module.updates, module.total_updates)
        return Stacks(stack, self.updates_per_step, module.updates, stop)

    def state_dict(self) -> dict[str, Any]:
        """What the collection goes on from."""
        if self._collected is None:
            return {} if self._restored is None else self._restored
        return self._saved({"written": self._written, "carried": self._carried})

    def _layout(self) -> dict[str, Any]:
        return {"num_envs": self.num_envs, "rollout_steps": self.rollout_steps}
