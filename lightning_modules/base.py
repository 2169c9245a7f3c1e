"""What every method shares: the learning rule's clock, its metrics, its optimiser steps and its exact resumption."""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import CudaGraphModule
from torch import Tensor

from components.checks import check_counts
from components.distributed import average_, rank, world_size

COMPILE_MODES = (None, "default", "cudagraphs")


class LearningMethod(L.LightningModule, ABC):
    """A method is `update(batch) -> TensorDict of scalar metrics`; this class runs it inside Lightning.

    A training step receives `updates_per_step` batches stacked along the first dimension and makes one update with
    each, so that the loop's cost is paid once per step. The counters `updates` and `env_steps` are the method's only
    clock: Lightning's own loop counters are neither used nor saved.

    Subclasses create their optimisers in `__init__` and register them with `register_optimizer`, so that `update` also
    runs on its own, without a trainer. `update` neither reads tensor values (no `.item()`) nor branches on them.

    Args:
        updates: updates of the whole run.
        updates_per_step: updates in one Lightning step.
        log_every: updates between two records of the mean training metrics.
        anneal_from: share of the run after which every learning rate falls linearly, to zero at its end; 1 keeps them.
        compile: None for eager execution, ``default`` for `torch.compile`, ``cudagraphs`` for `torch.compile` captured
            in a CUDA graph (the same as ``default`` where there is no GPU).

    Raises:
        ValueError: if the counts do not divide each other or `compile` is unknown.
    """

    def __init__(
        self,
        *,
        updates: int,
        updates_per_step: int = 1,
        log_every: int = 100,
        anneal_from: float = 1.0,
        compile: str | None = None,
    ) -> None:
        super().__init__()
        if compile not in COMPILE_MODES:
            raise ValueError(f"Unknown compile={compile!r}: expected one of {', '.join(map(str, COMPILE_MODES))}.")
        check_counts(updates=updates, updates_per_step=updates_per_step, log_every=log_every)
        for name, value in (("updates", updates), ("log_every", log_every)):
            if value % updates_per_step:
                raise ValueError(f"{name}={value} is no multiple of updates_per_step={updates_per_step}.")
        if not 0.0 <= anneal_from <= 1.0:
            raise ValueError(f"anneal_from={anneal_from}: expected a share of the run from 0 to 1.")
        self.automatic_optimization = False
        self.total_updates = updates
        self.anneal_from = anneal_from
        self.updates_per_step = updates_per_step
        self.log_every = log_every
        self.compile_mode = compile
        self.updates = 0
        self.env_steps = 0
        self.seconds = 0.0
        self.recipe: dict[str, Any] | None = (
            None  # what the run was composed of: rebuilds the method without its folder
        )
        self._optimizers: list[torch.optim.Optimizer] = []
        self._learning_rates: list[list[float]] = []  # as configured: those in the optimisers change, and are loaded
        self._compiled_update: Any = None
        self._metric_names: list[str] = []
        self._metric_sum: Tensor | None = None
        self._metric_count = 0
        self._clock: float | None = None
        self._process_states: list[dict[str, Any]] | None = None

    # -- the learning rule ----------------------------------------------------------------------------------------

    @abstractmethod
    def update(self, batch: TensorDict) -> TensorDict:
        """One update from one batch [N]; returns scalar metrics on the device."""

    @abstractmethod
    def evaluate(self, task: Any) -> Any:
        """The result of an evaluation task of the datamodule, whose `metrics` turns it into named lists of values."""

    def register_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Have an optimiser saved and restored with the run."""
        self._optimizers.append(optimizer)
        self._learning_rates.append([group["lr"] for group in optimizer.param_groups])
        return optimizer

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return self._optimizers

    @torch.compiler.disable
    def minimise(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One step of `optimizer` on `loss`, its gradient averaged over processes.

        The gradient is taken with respect to the optimiser's own parameters only: nothing is accumulated elsewhere, and
        nothing has to be zeroed or frozen. Compilation leaves it out: what comes before and after becomes one graph
        each, the backward pass of a compiled loss is compiled with it, and a fused optimiser has nothing to gain.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = torch.autograd.grad(loss, parameters)
        average_(gradients)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        optimizer.step()

    def _anneal(self) -> None:
        """Set the learning rates of this instant of the run."""
        annealed = 1 - self.anneal_from
        left = 1 - self.updates / self.total_updates
        factor = left / annealed if left < annealed else 1.0
        for optimizer, rates in zip(self._optimizers, self._learning_rates):
            for group, rate in zip(optimizer.param_groups, rates):
                if isinstance(group["lr"], Tensor):  # a captured graph reads it where it lies
                    group["lr"].fill_(factor * rate)
                else:
                    group["lr"] = factor * rate

    def run_update(self, batch: TensorDict) -> TensorDict:
        """`update`, compiled as asked for."""
        if self.compile_mode is None:
            return self.update(batch)
        if self._compiled_update is None:
            # Random numbers are drawn by the eager kernels, so that compiling does not change the run.
            torch._inductor.config.fallback_random = True
            self._compiled_update = torch.compile(self.update)
            if self.compile_mode == "cudagraphs" and self.device.type == "cuda":
                for optimizer in self._optimizers:
                    for group in optimizer.param_groups:
                        group["capturable"] = True
                        group["lr"] = torch.as_tensor(group["lr"], device=self.device)
                self._compiled_update = CudaGraphModule(self._compiled_update)
        return self._compiled_update(batch)

    # -- the Lightning step -----------------------------------------------------------------------------------------

    def training_step(self, batch: TensorDict, batch_idx: int) -> None:
        assert batch.shape[0] == self.updates_per_step
        self._anneal()
        for index in range(self.updates_per_step):
            metrics = self.run_update(batch[index])
            values = torch.stack([value.detach().float() for value in metrics.values()])
            if self._metric_sum is None:
                self._metric_names, self._metric_sum = list(metrics.keys()), values.clone()
            else:
                self._metric_sum += values
        self._metric_count += self.updates_per_step
        self.updates += self.updates_per_step
        if self.updates % self.log_every == 0:
            self._record_training_metrics()
        if self.updates >= self.total_updates:
            self.trainer.should_stop = True

    def _record_training_metrics(self) -> None:
        metrics = self.training_metrics()
        self._metric_sum, self._metric_count = None, 0
        self.record({f"train/{name}": value for name, value in metrics.items()})
        for name in self.progress_bar_metrics:
            self.log(name, metrics[name], prog_bar=True, logger=False)

    progress_bar_metrics: tuple[str, ...] = ()

    def _evaluate(self, task: Any) -> Any:
        # Evaluation draws from a stream of its own: how often a run is evaluated does not change what it learns.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            return self.evaluate(task)

    def on_validation_epoch_start(self) -> None:
        self._evaluated: dict[str, float] = {}

    def validation_step(self, task: Any, batch_idx: int) -> None:
        metrics = task.metrics(self._evaluate(task))
        self._evaluated.update({f"eval/{name}": sum(values) / len(values) for name, values in metrics.items()})

    def on_validation_epoch_end(self) -> None:
        self.record(self._evaluated)

    def test_step(self, task: Any, batch_idx: int) -> Any:
        return self._evaluate(task)

    def training_metrics(self) -> dict[str, float]:
        """Mean metrics since the last record: the one place where training waits for the device.

        Raises:
            ValueError: if one is not finite, in any process.
        """
        if self._metric_sum is None:
            return {}
        mean = self._metric_sum / self._metric_count
        average_([mean])
        metrics = dict(zip(self._metric_names, mean.tolist()))
        for name, value in metrics.items():
            if not np.isfinite(value):
                raise ValueError(
                    f"train/{name} became {value} between updates {self.updates - self._metric_count} and "
                    f"{self.updates}: expected finite numbers; the last checkpoint was taken before and is intact."
                )
        return metrics

    def record(self, metrics: Mapping[str, float]) -> None:
        """Send metrics to all loggers, with the clocks of the run."""
        clocks = {"updates": self.updates, "env_steps": self.env_steps, "seconds": round(self.elapsed(), 3)}
        for logger in self.loggers:
            logger.log_metrics({**clocks, **metrics}, step=self.updates)

    def elapsed(self) -> float:
        """Wall-clock seconds spent in this run, resumed parts included."""
        return self.seconds + (0.0 if self._clock is None else time.monotonic() - self._clock)

    # -- life cycle ---------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self._clock = time.monotonic()
        if self.updates >= self.total_updates:  # a finished run that is resumed has nothing left to do
            self.trainer.should_stop = True

    def on_train_start(self) -> None:
        if world_size() > 1:
            for tensor in self.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)
        self._metric_sum = _on(self.device, self._metric_sum)
        states = self._process_states
        if states is not None and len(states) == world_size():
            set_random_state(states[rank()]["random"])
            self._metric_sum = _on(self.device, states[rank()]["metric_sum"])
        elif world_size() > 1:
            # The weights were made from one seed on all processes; from here on each has a stream of its own.
            torch.manual_seed(torch.initial_seed() + 7919 * (rank() + 1))
        self._process_states = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The counters below are the clock; Lightning's restart bookkeeping would only compete with it.
        checkpoint.pop("loops", None)
        state = {"random": random_state(), "metric_sum": _on("cpu", self._metric_sum)}
        states: list[Any] = [state]
        if world_size() > 1:
            states = [None] * world_size()
            torch.distributed.all_gather_object(states, state)
        checkpoint["learning_method"] = {
            "class": type(self).__name__,
            "recipe": self.recipe,
            "updates": self.updates,
            "env_steps": self.env_steps,
            "seconds": self.elapsed(),
            "metric_names": self._metric_names,
            "metric_count": self._metric_count,
            "processes": states,
        }

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise a ValueError if a checkpoint is not one of this method with these sizes."""
        found = checkpoint.get("learning_method", {}).get("class", "no learning method")
        if found != type(self).__name__:
            raise ValueError(f"The checkpoint holds {found}, expected {type(self).__name__}.")
        saved, own = checkpoint["state_dict"], self.state_dict()
        for name in [*own, *saved]:
            shapes = [str(list(state[name].shape)) if name in state else "nothing" for state in (saved, own)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"The checkpoint's {name} is {shapes[0]}, expected {shapes[1]}.")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)
        state = checkpoint["learning_method"]
        self.updates, self.env_steps, self.seconds = state["updates"], state["env_steps"], state["seconds"]
        self._metric_names, self._metric_count = state["metric_names"], state["metric_count"]
        self._process_states = state["processes"]
        sums = [process["metric_sum"] for process in state["processes"]]
        # Of another number of processes only the mean is left.
        self._metric_sum = None if sums[0] is None else torch.stack(sums).mean(0).to(self.device)


def _on(device: torch.device | str, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def random_state() -> dict[str, Any]:
    """Every random state of this process, in types that load with `weights_only=True`."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - libraries use the global state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [keys.tolist(), int(position), int(has_gauss), float(cached)],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([cuda.cpu() for cuda in state["cuda"]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
