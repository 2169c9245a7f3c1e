"""What every method shares: the learning rule's clock, its metrics, its optimiser steps and its exact resumption."""

import math
import os
import random
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import CudaGraphModule
from torch import Tensor

from components.checks import Count, CountOrZero, Share, Size, checked
from components.distributed import average_, rank, world_size
from components.networks.states import difference, not_finite, select, words

# Lightning asks for GPUs to be counted through NVML, and optimisers count them at every step: that would cost each step
# 0.2 ms on a machine without a GPU.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"

_NUMBERS = 624  # of the state of a Mersenne twister
COMPILE_MODES = (None, "default", "cudagraphs")


@checked
class LearningMethod(L.LightningModule, ABC):
    """A method is `update(batch) -> TensorDict of scalar metrics`; this class runs it inside Lightning.

    A training step receives `updates_per_step` batches stacked along the first dimension and makes one update with
    each, so that the loop's cost is paid once per step. The counters `updates` and `env_steps` are the method's only
    clock: Lightning's own loop counters are neither used nor saved.

    Subclasses create their optimisers in `__init__` and register them with `register_optimizer`, so that `update` also
    runs on its own, without a trainer. `update` neither reads tensor values (no `.item()`) nor branches on them.

    Args:
        updates: updates of the whole run; 0 to evaluate what there is.
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
        updates: CountOrZero,
        updates_per_step: Size = 1,
        log_every: Count = 100,
        anneal_from: Share = 1.0,
        compile: str | None = None,
    ) -> None:
        super().__init__()
        if compile not in COMPILE_MODES:
            raise ValueError(f"Unknown compile={compile!r}: expected one of {', '.join(map(str, COMPILE_MODES))}.")
        for name, value in (("updates", updates), ("log_every", log_every)):
            if value % updates_per_step:
                raise ValueError(f"{name}={value} is no multiple of updates_per_step={updates_per_step}.")
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
        self._compiled_updates: dict[tuple[tuple[str, bool], ...], Any] = {}
        self._tallies: dict[tuple[str, ...], tuple[Tensor, int]] = {}  # sums and count of metrics that come together
        self.scores: dict[str, list[float]] = {}
        self._priorities: TensorDict | None = None
        self._clock: float | None = None
        self._began = 0  # the number of updates when this program took over
        self._process_states: list[dict[str, Any]] | None = None

    # -- the learning rule ----------------------------------------------------------------------------------------

    @abstractmethod
    def update(self, batch: TensorDict, **due: bool) -> TensorDict:
        """One update from one batch [N], with the parts that `schedule` says are due; scalar metrics on the device.

        A method that says which rows are to be drawn, see `prioritised`, adds `priorities`: their `index` [B] and
        `logit` [B].
        """

    def schedule(self) -> dict[str, bool]:
        """Which parts of the next update are due, by name, for methods that make some of their steps more rarely."""
        return {}

    @abstractmethod
    def evaluate(self, task: Any) -> Any:
        """The result of an evaluation task of the datamodule, whose `metrics` turns it into named lists of values."""

    def advance(self, env_steps: int) -> None:
        """So many environment steps have been taken in the whole run."""
        self.env_steps = env_steps

    def register_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Have an optimiser saved and restored with the run."""
        self._optimizers.append(optimizer)
        self._learning_rates.append([group["lr"] for group in optimizer.param_groups])
        return optimizer

    def shard(self, mesh: Any) -> None:
        """Split frozen weights over the processes of a device mesh, where a method has such.

        Raises:
            ValueError: it has none.
        """
        raise ValueError(f"trainer=fsdp: expected a method with frozen weights, found {type(self).__name__}; use ddp.")

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that were registered.

        Raises:
            ValueError: none of them trains a parameter that asks for a gradient, and nothing would say so.
        """
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        left = [name for name, each in self.named_parameters() if each.requires_grad and id(each) not in trained]
        if left and trained:  # not of a method that searches without gradients
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ValueError(
                f"{left[0]}{more}: expected in an optimiser that is registered, or frozen by requires_grad_(False), "
                "found neither."
            )
        return self._optimizers

    @torch.compiler.disable
    def minimise(self, loss: Tensor, optimizer: torch.optim.Optimizer, max_norm: float | None = None) -> None:
        """One step of `optimizer` on `loss`, its gradient averaged over processes and clipped to a global norm.

        The gradient is taken with respect to the optimiser's own parameters only: nothing is accumulated elsewhere, and
        nothing has to be zeroed or frozen. Compilation leaves it out: what comes before and after becomes one graph
        each, the backward pass of a compiled loss is compiled with it, and a fused optimiser has nothing to gain.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._step(parameters, torch.autograd.grad(loss, parameters), optimizer, max_norm)

    @torch.compiler.disable
    def step(
        self, gradients: Sequence[Tensor], optimizer: torch.optim.Optimizer, max_norm: float | None = None
    ) -> Tensor | None:
        """One step of `optimizer` on gradients of its parameters, which are averaged over processes and clipped.

        Returns:
            Their norm before, where they are clipped.

        Raises:
            ValueError: the optimiser is not registered, and would not be saved with the run.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return self._step(parameters, gradients, optimizer, max_norm)

    def _step(
        self,
        parameters: list[Tensor],
        gradients: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        max_norm: float | None,
    ) -> Tensor | None:
        if all(optimizer is not own for own in self._optimizers):
            raise ValueError(
                f"{type(self).__name__}: expected an optimiser that register_optimizer was given, found another "
                f"{type(optimizer).__name__}, which no checkpoint would hold."
            )
        average_(gradients)
        for parameter, gradient in zip(parameters, gradients):
            if gradient.stride() != parameter.stride():  # fused optimisers go through memory in the parameters' order
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        norm = None
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
        optimizer.step()
        return norm

    def learning_rate_factors(self) -> list[float]:
        """What the configured learning rates of each optimiser are multiplied by at this instant of the run."""
        annealed = 1 - self.anneal_from
        left = 1 - self.updates / self.total_updates
        return [left / annealed if left < annealed else 1.0] * len(self._optimizers)

    def _anneal(self) -> None:
        for optimizer, factor, rates in zip(self._optimizers, self.learning_rate_factors(), self._learning_rates):
            for group, rate in zip(optimizer.param_groups, rates):
                if isinstance(group["lr"], Tensor):  # a captured graph reads it where it lies
                    group["lr"].fill_(factor * rate)
                else:
                    group["lr"] = factor * rate

    def run_update(self, batch: TensorDict) -> TensorDict:
        """`update`, compiled as asked for."""
        due = self.schedule()
        if self.compile_mode is None:
            return self.update(batch, **due)
        key = tuple(due.items())
        if not self._compiled_updates:
            # What was compiled for other sizes, in the runs before, would make this one's dynamic; and it counts
            # against a limit, past which nothing is compiled any more.
            torch.compiler.reset()
        if key not in self._compiled_updates:
            # Random numbers are drawn by the eager kernels, so that compiling does not change the run.
            torch._inductor.config.fallback_random = True
            self._compiled_updates[key] = torch.compile(partial(self.update, **due))
            if self.compile_mode == "cudagraphs" and self.device.type == "cuda":
                for optimizer in self._optimizers:
                    for group in optimizer.param_groups:
                        group["capturable"] = True
                        group["lr"] = torch.as_tensor(group["lr"], device=self.device)
                    for state in optimizer.state.values():  # of a checkpoint
                        if "step" in state:
                            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=self.device)
                self._compiled_updates[key] = CudaGraphModule(self._compiled_updates[key])
        return self._compiled_updates[key](batch)

    prioritised: str | None = None
    """What the datamodule, one that `draws_by_priority`, has to draw by the priorities that `update` gives: with
    probabilities exp(logit) over their sum, all at first alike. ``batch`` for its batches; ``beside`` for as many rows
    more, which batches bring as `prioritised`. Both have `index` [B], and rows that were drawn by priorities their
    `log_probability` [B, 1]. None for nothing."""

    next_data_actions: bool = False
    """Whether batches have to hold the action that the data have next, `("next", "data_action")` [B, A], NaN where an
    episode ends; of a datamodule that `knows_next_actions`."""

    futures: tuple[int, float, int] | None = None
    """How many states K that follow in the same episode batches have to hold for each row, a discount and a delay: each
    is d + k steps after the next, or the episode's last where that ends before. k has probability
    (1 - discount) discount^k; the K of a row share d, from 0 to the delay, whose probability goes with
    log((d + 2) / (d + 1)), so that it is of any order alike. They are `("next", "future")` [B, K, O]; of a datamodule
    that `knows_futures`. None for nothing."""

    def take_priorities(self) -> tuple[Tensor, Tensor] | None:
        """Indices [B] and logits [B] that the last update gave, once; None where there are none."""
        taken, self._priorities = self._priorities, None
        return None if taken is None else (taken["index"], taken["logit"])

    # -- the Lightning step -----------------------------------------------------------------------------------------

    def training_step(self, batch: TensorDict, batch_idx: int) -> None:
        assert batch.shape[0] == self.updates_per_step
        self._anneal()
        for each in batch.unbind(0):
            metrics = self.run_update(each)
            if self.prioritised is not None:
                if self.updates == self._began and "priorities" not in metrics.keys():  # noqa: SIM118 - a TensorDict
                    raise ValueError(
                        f"{type(self).__name__}.update: expected priorities, an index and a logit for each row, as "
                        f"prioritised={self.prioritised} says, found none."
                    )
                self._priorities, metrics = metrics["priorities"], metrics.exclude("priorities")
            if self.updates == self._began:
                self._check_metrics(metrics)
            with torch.no_grad():
                values = torch.stack(list(metrics.values())).float()
            self.tally(tuple(metrics.keys()), values, 1)
            self.updates += 1
        if self.updates % self.log_every == 0:
            self._record_training_metrics()
        if self.updates >= self.total_updates:
            self.trainer.should_stop = True

    def _check_metrics(self, metrics: Any) -> None:
        update = f"{type(self).__name__}.update"
        if not isinstance(metrics, TensorDict | Mapping):
            raise ValueError(f"{update}: expected a TensorDict of scalars, found {type(metrics).__name__}.")
        for name, value in metrics.items():
            if not isinstance(value, Tensor) or value.shape:
                found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{update}: expected scalars, found {name} {found}.")

    def tally(self, names: tuple[str, ...], values: Tensor, count: int) -> None:
        """Add to the training metrics `names` the sums `values` over `count` observations of each."""
        if names in self._tallies:
            total, counted = self._tallies[names]
            total += values.to(total.device)
            self._tallies[names] = (total, counted + count)
        else:
            self._tallies[names] = (values.clone(), count)

    def _record_training_metrics(self) -> None:
        metrics = self.training_metrics()
        self._tallies = {}
        self.record({f"train/{name}": value for name, value in metrics.items()})
        for name in self.progress_bar_metrics:
            if name in metrics:
                self.log(name, metrics[name], prog_bar=True, logger=False)

    progress_bar_metrics: tuple[str, ...] = ()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside, networks are in evaluation mode and random numbers come from a stream of their own.

        How often a run is evaluated thus does not change what it learns.
        """
        training = self.training
        self.eval()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            yield
        self.train(training)

    def add_scores(self, scores: Mapping[str, list[float]]) -> None:
        """Scores of the evaluation going on, a value for each episode; callbacks may add theirs before it ends."""
        self.scores.update(scores)

    def _evaluate(self, task: Any) -> Any:
        before, self.scores = self.scores, {}
        with self.evaluation():
            result = self.evaluate(task)
        if result is None:
            raise ValueError(
                f"{type(self).__name__}.evaluate: expected what the task's metrics are made of, found None."
            )
        self.scores = {**before, **task.metrics(result), **self.scores}  # the task's first, then what was added
        return result

    def on_validation_epoch_start(self) -> None:
        self.scores = {}

    def validation_step(self, task: Any, batch_idx: int) -> None:
        self._evaluate(task)

    def on_validation_epoch_end(self) -> None:
        self._check_scores()
        self.record({f"eval/{name}": sum(values) / len(values) for name, values in self.scores.items()})

    def on_test_epoch_start(self) -> None:
        self.scores = {}

    def test_step(self, task: Any, batch_idx: int) -> Any:
        return self._evaluate(task)

    def on_test_epoch_end(self) -> None:
        self._check_scores()

    def _check_scores(self) -> None:
        evaluate = f"{type(self).__name__}.evaluate"
        if not self.scores:
            raise ValueError(f"{evaluate}: expected scores by their names, found none.")
        for name, values in self.scores.items():
            if not values or not all(map(math.isfinite, values)):
                found = next((value for value in values if not math.isfinite(value)), "none")
                raise ValueError(f"{evaluate}: expected finite numbers of eval/{name}, found {found}.")

    def training_metrics(self) -> dict[str, float]:
        """Mean metrics since the last record: the one place where training waits for the device.

        Raises:
            ValueError: if one is not finite, in any process.
        """
        if not self._tallies:
            return {}
        sums: dict[str, Tensor] = {}
        counts: dict[str, float] = {}
        for names, (total, count) in self._tallies.items():
            for name, value in zip(names, total.to(self.device)):
                sums[name] = sums[name] + value if name in sums else value
                counts[name] = counts.get(name, 0.0) + count
        # Processes may have counted differently: means are taken of what all of them have seen.
        both = torch.stack([torch.stack(list(sums.values())), torch.tensor(list(counts.values())).to(self.device)])
        average_([both])
        metrics = {name: total / count for name, total, count in zip(sums, *both.tolist()) if count}
        for name, value in metrics.items():
            if not np.isfinite(value):
                raise ValueError(
                    f"train/{name} became {value} by update {self.updates}: expected finite numbers; no checkpoint "
                    "was taken of it."
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
        data = self.trainer.datamodule
        for wanted, offer, what in (
            (self.prioritised is not None, "draws_by_priority", "draws by priorities"),
            (self.next_data_actions, "knows_next_actions", "knows the actions that come next"),
            (self.futures is not None, "knows_futures", "knows what follows each transition"),
        ):
            if wanted and not getattr(data, offer, False):
                raise ValueError(
                    f"datamodule: expected one that {what}, such as datamodule=offline, for this module, found "
                    f"{type(data).__name__}, which does not."
                )
        self._clock, self._began = time.monotonic(), self.updates
        if self.updates >= self.total_updates:  # a finished run that is resumed has nothing left to do
            self.trainer.should_stop = True

    def on_train_start(self) -> None:
        if world_size() > 1:
            for tensor in self.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)
        states = self._process_states
        if states is not None:  # of another number of processes: all go on with what the first has seen
            self._set_tallies(states[rank() if len(states) == world_size() else 0]["tallies"])
        if states is not None and len(states) == world_size():
            set_random_state(states[rank()]["random"])
        elif world_size() > 1:
            # The weights were made from one seed on all processes; from here on each has a stream of its own.
            torch.manual_seed(torch.initial_seed() + 7919 * (rank() + 1))
        self._process_states = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The counters below are the clock; Lightning's own, which start anew with every program, would contradict it.
        for name in ("loops", "epoch", "global_step"):
            checkpoint.pop(name, None)
        tallies = [[list(names), total.cpu(), count] for names, (total, count) in self._tallies.items()]
        state = {"random": random_state(), "tallies": tallies}
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
            "processes": states,
        }

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise a ValueError if a checkpoint is not one of this method with these sizes."""
        found = checkpoint.get("learning_method", {}).get("class", "no learning method")
        if found != type(self).__name__:
            raise ValueError(f"The checkpoint holds {found}, expected {type(self).__name__}.")
        differing = difference(checkpoint["state_dict"], self.state_dict())
        if differing is not None:
            raise ValueError(f"{differing}.")
        self._check_finite(checkpoint["state_dict"])
        self._check_optimizers(checkpoint.get("optimizer_states", []))
        for process in checkpoint["learning_method"]["processes"]:
            _check_random_state(process["random"])
            for tally in process["tallies"]:
                names, total, count = tally if len(tally) == 3 else ((), None, None)
                named = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
                sums = isinstance(total, Tensor) and total.is_floating_point() and total.isfinite().all()
                if not named or not sums or total.shape != (len(names),) or count not in range(2**31):
                    raise ValueError("The checkpoint's tallies: expected names, their sums and a count, found others.")

    def _check_finite(self, state: Mapping[str, Tensor]) -> None:
        name = not_finite(state, {name for name, _ in self.named_parameters()})
        if name is not None:
            raise ValueError(f"The checkpoint's {name} is not finite, expected finite weights.")

    def _check_optimizers(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Raise a ValueError if optimiser states are not of this method's optimisers.

        Fused optimisers go through memory by the sizes of the parameters, whatever those of their own tensors are.
        """
        own = [sum(len(group["params"]) for group in optimizer.param_groups) for optimizer in self._optimizers]
        found = [[index for group in state["param_groups"] for index in group["params"]] for state in states]
        if found != [list(range(count)) for count in own]:
            raise ValueError(f"The checkpoint's optimisers have {list(map(len, found))} parameters, expected {own}.")
        for number, (state, optimizer) in enumerate(zip(states, self._optimizers)):
            for index, kept in enumerate(_what_is_kept(optimizer)):
                fault = _unlike(state["state"].get(index, {}), kept)
                if fault is not None:
                    raise ValueError(f"The checkpoint's optimiser {number}, parameter {index}: {fault}.")

    kept: tuple[str, ...] = ()
    """What names of state begin with that `begin_from` leaves: how far a run has come, and what its settings say."""

    def begin_from(self, checkpoint: Mapping[str, Any], parts: Sequence[str] | None = None) -> dict[str, list[str]]:
        """Take the state of another run, of whatever method: weights, targets, running averages; no optimiser or clock.

        Args:
            parts: of the state, see `components.networks.states.select`; None for all.

        Returns:
            Parts of which something was ``taken``, was ``left`` as it was made, or went ``unused``.

        Raises:
            ValueError: what is to be taken has other names or shapes.
        """
        saved, own = (
            {name: tensor for name, tensor in state.items() if not name.startswith(self.kept)}
            for state in (checkpoint["state_dict"], self.state_dict())
        )
        taken = select(saved, own, parts)
        self._check_finite(taken)
        self.load_state_dict(taken, strict=False)
        return {
            "taken": words(taken),
            "left": words(name for name in own if name not in taken),
            "unused": words(name for name in saved if name not in taken),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)
        for state, optimizer in zip(checkpoint["optimizer_states"], self._optimizers):
            # What is configured holds, as for learning rates: what was when the checkpoint was taken may be changed.
            state["param_groups"] = optimizer.state_dict()["param_groups"]
            for index, kept in enumerate(_what_is_kept(optimizer)):
                for name, value in state["state"].get(index, {}).items():
                    if isinstance(value, Tensor):  # in the order of the parameter's memory, in which it is gone through
                        state["state"][index][name] = torch.empty_like(kept[name]).copy_(value)
        state = checkpoint["learning_method"]
        self.updates, self.env_steps, self.seconds = state["updates"], state["env_steps"], state["seconds"]
        self._process_states = state["processes"]

    def _set_tallies(self, tallies: list[list[Any]]) -> None:
        self._tallies = {}
        for names, total, count in tallies:
            self.tally(tuple(names), total.to(self.device), count)


def _what_is_kept(optimizer: torch.optim.Optimizer) -> list[Mapping[str, Any]]:
    """The state that an optimiser has of each parameter after one step: shown on another, of zeros."""
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    kinds = []
    own = optimizer.param_groups, optimizer.state
    for group in own[0]:
        for parameter in group["params"]:
            kinds.append((id(group), parameter.shape, parameter.stride(), parameter.dtype))
            if kinds[-1] in found:
                continue
            zeros = torch.zeros_like(parameter, requires_grad=True)
            zeros.grad = torch.zeros_like(parameter)
            optimizer.param_groups, optimizer.state = [{**group, "params": [zeros]}], defaultdict(dict)
            try:
                optimizer.step()
                found[kinds[-1]] = optimizer.state[zeros]
            finally:
                optimizer.param_groups, optimizer.state = own
    return [found[kind] for kind in kinds]


def _unlike(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """How the state of a parameter differs from what its optimiser keeps; None where it does not, or is none yet."""
    if not found:
        return None
    for name in (*expected, *found):
        kinds = [_kind(each[name]) if name in each else "nothing" for each in (expected, found)]
        if kinds[0] != kinds[1]:
            return f"expected {name} to be {kinds[0]}, found {kinds[1]}"
        if not torch.as_tensor(0 if found[name] is None else found[name]).isfinite().all():
            return f"expected {name} to be finite, found what is not"
    return None


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        numbers = "complex " if value.is_complex() else "" if value.is_floating_point() else "whole "
        return f"{numbers}numbers {list(value.shape)}"
    return type(value).__name__


def _check_random_state(state: Mapping[str, Any]) -> None:
    """Raise a ValueError if a state can't be restored, or would have a generator read what is not its own."""
    own = random_state()
    try:
        if state["numpy"][1] not in range(len(own["numpy"][0]) + 1):
            raise ValueError("NumPy's position is not one of its numbers'")
        # of torch's generator on the CPU: how many numbers are left (int32 at 8), where the next is (int64 at 16)
        left, place = (state["torch"].numpy().view(kind)[at] for kind, at in ((np.int32, 2), (np.int64, 2)))
        if (left, place) != (1, 0) and (left + place != _NUMBERS + 1 or left not in range(1, _NUMBERS + 1)):
            raise ValueError("torch's position is not one of its numbers'")
        set_random_state(state)
    except Exception as error:  # each generator raises types of its own
        raise ValueError("The checkpoint's random states: expected what random_state gives, found another.") from error
    finally:
        set_random_state(own)


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
