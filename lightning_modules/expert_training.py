"""Training an expert: a language model's few adapted numbers, by rewards for answers that can be verified.

Sun, Cetin and Tang, "Transformer-Squared: Self-adaptive LLMs", arXiv 2501.06252, section 3.1.

Dimensions: B sequences, L prompt tokens, T completion tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from components.checks import CountOrZero, NonNegative, Positive, Seed, Size, checked
from components.distributed import broadcast_
from components.language.adapted_model import AdaptedModel
from components.language.adapters import Adapter
from components.language.experts import Expert
from components.language.models import (
    PretrainedFolder,
    categorical_kl,
    completion_log_probs,
    is_one_of,
    of_tokens,
)
from components.language.reinforce import BASELINES, policy_loss, shaped_rewards
from lightning_modules.base import LearningMethod

DIRECTIONS = ("reference_to_policy", "policy_to_reference")


@checked
class ExpertTraining(LearningMethod):
    """REINFORCE with a penalty on the divergence from the base model; with reference answers, likelihood.

    A batch has `prompt` [B, L] and `prompt_mask`, padded on the left, `completion` [B, T] and `completion_mask`, true
    up to the end of each; where the policy answered also `reward` [B], and `right` [B] for the record. The tokens that
    were drawn are the tokens that are scored. Without rewards each completion counts as one, whatever else is set: the
    same loss is next-token prediction then.

    Parameters with the best validation are kept, and are what is tested and exported in the end.

    Args:
        ends: ids of the tokens that end a completion.
        language_model: folder of the pretrained model.
        adapter: what is trained in it, called with the model; None trains nothing (the base model, with updates=0).
        optimizer: makes the optimiser, called with parameters.
        dtype: of the frozen weights.
        temperature: of the policy in training: its logits are divided by it. 0 takes the likeliest tokens, as the
            authors' code does, and scores them as 1 does.
        max_norm: of the gradient; None leaves it. The authors' 1e-3 always binds, which makes each step about as long.
        baseline, normalise_rewards, clip_rewards: see `shaped_rewards`.
        mean_over_tokens: see `policy_loss`.
        score_end: whether the token that ends a completion is scored; the authors' code does not.
        kl_coefficient: weight of the divergence, summed over a completion's tokens, whatever the temperature.
        kl_direction: ``reference_to_policy``, KL(base || adapted), is the authors' code's, ``policy_to_reference`` the
            paper's.
        micro_batch: sequences of similar lengths in one pass; None for all.
        keep_last: of equals in validation keep the last, which has learned longer, instead of the first, which the
            authors' code does.
        expert: file of an expert vector to begin with.
        shuffle: seed by which that expert's numbers are shuffled within each matrix, a control; None for not.
        settings: further arguments of `LearningMethod`.
    """

    progress_bar_metrics = ("accuracy", "loss")
    kept = ("best_",)

    def __init__(
        self,
        *,
        ends: Sequence[CountOrZero],
        language_model: PretrainedFolder,
        adapter: Callable[..., Adapter] | None,
        optimizer: Callable[..., torch.optim.Optimizer],
        dtype: str = "float32",
        temperature: NonNegative = 0.0,
        max_norm: Positive | None = 1e-3,
        baseline: str = "none",
        normalise_rewards: bool = False,
        clip_rewards: Positive | None = None,
        mean_over_tokens: bool = False,
        score_end: bool = True,
        kl_coefficient: NonNegative = 0.0,
        kl_direction: str = "reference_to_policy",
        micro_batch: Size | None = None,
        keep_last: bool = False,
        expert: str | None = None,
        shuffle: Seed | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if baseline not in BASELINES:
            raise ValueError(f"Unknown baseline={baseline!r}: expected one of {', '.join(BASELINES)}.")
        if kl_direction not in DIRECTIONS:
            raise ValueError(f"Unknown kl_direction={kl_direction!r}: expected one of {', '.join(DIRECTIONS)}.")
        if adapter is None and self.total_updates:
            raise ValueError(f"updates={self.total_updates}: expected 0 where adapter is null, for nothing is trained.")
        self.ends = list(ends)
        self.temperature = temperature
        self.max_norm = max_norm
        self.baseline = baseline
        self.normalise_rewards = normalise_rewards
        self.clip_rewards = clip_rewards
        self.mean_over_tokens = mean_over_tokens
        self.score_end = score_end
        self.kl_coefficient = kl_coefficient
        self.kl_direction = kl_direction
        self.micro_batch = micro_batch
        self.keep_last = keep_last
        self.language = AdaptedModel(language_model, adapter, dtype)
        if expert is not None:
            loaded = Expert.load(expert, self.language.base_checksum)
            self.language.load_expert(loaded if shuffle is None else loaded.shuffled(shuffle))
        parameters = [] if self.language.adapter is None else list(self.language.adapter.parameters.values())
        self.optimizer = self.register_optimizer(optimizer(parameters)) if parameters else None
        self.register_buffer("best_validation", torch.tensor(-math.inf))
        for index, parameter in enumerate(parameters):
            self.register_buffer(f"best_{index}", parameter.detach().clone())

    def shard(self, mesh: Any) -> None:
        self.language.shard(mesh)

    # -- the policy ---------------------------------------------------------------------------------------------------

    def complete(self, prompt: Tensor, mask: Tensor, most_tokens: int) -> tuple[Tensor, Tensor]:
        """Completions of prompts [B, L] by the present policy, as it trains: tokens [B, T], and their mask."""
        return self._complete(prompt, mask, most_tokens, self.temperature)

    def _complete(self, prompt: Tensor, mask: Tensor, most_tokens: int, temperature: float) -> tuple[Tensor, Tensor]:
        self.language.refresh()
        return self.language.complete(prompt, mask, ends=self.ends, most_tokens=most_tokens, temperature=temperature)

    # -- the learning rule --------------------------------------------------------------------------------------------

    def update(self, batch: TensorDict) -> TensorDict:
        adapter = self.language.adapter
        rewarded = "reward" in batch.keys()  # noqa: SIM118 - a TensorDict iterates over its rows
        rows = len(batch)
        weight = torch.ones(rows, device=batch["completion"].device)
        if rewarded:
            weight = shaped_rewards(
                batch["reward"], baseline=self.baseline, normalise=self.normalise_rewards, clip=self.clip_rewards
            )
        adapter.refresh()
        leaves = adapter.leaves()
        gradients = [torch.zeros_like(leaf) for leaf in leaves]
        total = torch.zeros(2, device=weight.device)
        for part, own in self._parts(batch, weight):
            losses = self.losses(part, own) / rows
            torch._foreach_add_(gradients, torch.autograd.grad(losses[0] + self.kl_coefficient * losses[1], leaves))
            total += losses.detach()
        norm = self.step(adapter.gradients(gradients), self.optimizer, self.max_norm)
        metrics = {
            "loss": total[0] + self.kl_coefficient * total[1],
            "tokens": batch["completion_mask"].sum(1).float().mean(),
        }
        if rewarded:
            metrics["accuracy"] = 100 * batch["right"].float().mean()
        if self.kl_coefficient:
            metrics["kl"] = total[1]
        if norm is not None:
            metrics["gradient_norm"] = norm
        return TensorDict(metrics)

    def _parts(self, batch: TensorDict, weight: Tensor) -> Iterator[tuple[TensorDict, Tensor]]:
        """The batch in passes, each of similar sequences and no longer than they are.

        This reads lengths, once for all passes: after completions, at whose every token a host waits for the device,
        it costs nothing, and what is not padded is not computed.
        """
        if self.micro_batch is None:
            yield batch, weight
            return
        lengths = torch.stack([batch[f"{part}_mask"].sum(1) for part in ("prompt", "completion")], 1).tolist()
        order = sorted(range(len(lengths)), key=lambda row: sum(lengths[row]))
        for begin in range(0, len(order), self.micro_batch):
            rows = order[begin : begin + self.micro_batch]
            prompt, completion = (max(lengths[row][part] for row in rows) for part in (0, 1))
            part = batch[rows]
            for name in ("prompt", "prompt_mask"):
                part[name] = part[name][:, -prompt:]
            for name in ("completion", "completion_mask"):
                part[name] = part[name][:, :completion]
            yield part, weight[rows]

    def losses(self, batch: TensorDict, weight: Tensor) -> Tensor:
        """Sums over sequences, [2]: the policy's loss with weights [B], and the divergence from the base model."""
        sequences = [batch[name] for name in ("prompt", "prompt_mask", "completion", "completion_mask")]
        tokens, mask = batch["completion"], batch["completion_mask"]
        if not self.score_end:
            mask = mask & ~is_one_of(tokens, self.ends)
        adapted = completion_log_probs(self.language.model, *sequences)
        policy = adapted if self.temperature in (0, 1) else (adapted / self.temperature).log_softmax(-1)
        policy_losses = policy_loss(of_tokens(policy, tokens), mask, weight, self.mean_over_tokens).sum()
        if not self.kl_coefficient:
            return torch.stack([policy_losses, torch.zeros_like(policy_losses)])
        with torch.no_grad(), self.language.adapter.base():
            reference = completion_log_probs(self.language.model, *sequences)
        forth = self.kl_direction == "reference_to_policy"
        divergence = categorical_kl(reference, adapted) if forth else categorical_kl(adapted, reference)
        return torch.stack([policy_losses, torch.where(mask, divergence, 0.0).sum()])

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, task: Any) -> list[tuple[Tensor, Tensor]]:
        """The likeliest completions of an evaluation task's batches of prompts, with their masks, on the CPU."""
        return [
            tuple(each.cpu() for each in self._complete(prompt, mask, task.most_tokens, temperature=0.0))
            for prompt, mask in task.batches
        ]

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        values = self.scores["validation/accuracy"]
        score = torch.tensor(sum(values) / len(values), device=self.device)
        broadcast_(score)  # or rounding might let processes keep different parameters
        equal = self.keep_last and score == self.best_validation
        if self.optimizer is not None and (score > self.best_validation or equal):
            self.best_validation.copy_(score)
            for best, parameter in self._best():
                best.copy_(parameter.detach())

    def on_test_start(self) -> None:
        self.restore_best()

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self.add_scores({"parameters": [0 if self.language.adapter is None else self.language.adapter.count()]})

    @torch.no_grad()
    def restore_best(self) -> None:
        """Go back to the parameters that were best in validation."""
        if self.best_validation > -math.inf:
            for best, parameter in self._best():
                parameter.copy_(best)

    def _best(self) -> list[tuple[Tensor, Tensor]]:
        parameters = self.language.adapter.parameters.values()
        return [(getattr(self, f"best_{index}"), parameter) for index, parameter in enumerate(parameters)]

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["learning_method"]["base"] = self.language.base_checksum

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        super().check_checkpoint(checkpoint)
        self.language.check_base(checkpoint["learning_method"].get("base"))

    def begin_from(self, checkpoint: Mapping[str, Any], parts: Sequence[str] | None = None) -> dict[str, list[str]]:
        self.language.check_base(checkpoint["learning_method"].get("base", "of another method"))
        return super().begin_from(checkpoint, parts)
