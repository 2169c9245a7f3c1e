"""Answering questions nobody trained for, with the experts that there are.

Sun, Cetin and Tang, "Transformer-Squared: Self-adaptive LLMs", arXiv 2501.06252, section 3.2: two passes, of which the
first finds out what is asked for, and the second answers with the weights for that.

Dimensions: B prompts, L prompt tokens, T completion tokens, K experts, A adapted matrices, P population.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from components.checks import CountOrZero, Seed, Size, checked
from components.distributed import broadcast_, rank, sum_, world_size
from components.evolution.cross_entropy_method import CrossEntropyMethod, first_of
from components.language.adapted_model import AdaptedModel
from components.language.adapters import Adapter
from components.language.experts import Expert, mixed
from components.language.models import Completions, PretrainedFolder
from lightning_modules.base import LearningMethod

STRATEGIES = ("base", "uniform", "dispatch", "best", "search")
KIND_TOKENS = 6  # of the answer to what kind of question it is


class Answers(NamedTuple):
    """To the questions of an evaluation task.

    Attributes:
        completions: token ids [1, T] and mask [1, T] for each question.
        kinds: the category that each was taken for, -1 for none; None if nobody asked.
    """

    completions: list[tuple[Tensor, Tensor]]
    kinds: Tensor | None


@checked
class ExpertAdaptation(LearningMethod):
    """A model, its experts, and a way to choose among them for each kind of question.

    - ``base`` uses none, ``uniform`` the same share of each.
    - ``dispatch`` asks the model itself what kind of question each one is, as it is or with an expert for that
      (`classifier`); a kind of which there is no expert is answered by the base model.
    - ``best`` takes the expert, and ``search`` the mixture, that answers a few shots best, for each family asked.
      A mixture is found by the cross-entropy method, with a weight for each expert or one for each of its matrices.

    Only the last two learn, an update for each round of each family, one family after the other: the datamodule lets
    candidates answer a few shots (`attempt`), and a batch says which of their answers were right.

    Args:
        ends: ids of the tokens that end a completion.
        families: kinds of questions that are adapted to.
        categories: names of kinds of questions that the model chooses from, each of which has the expert of that name.
        language_model: folder of the pretrained model.
        adapter: as the experts were trained with, called with the model.
        experts: files of expert vectors by category.
        classifier: file of the expert that tells categories apart; None for the base model.
        strategy: see above.
        search: makes the search of so many numbers, called with `size` and `start`.
        per_matrix: search a weight for each matrix.
        mix_space: see `components.language.experts.mixed`.
        shuffle: seed by which the experts' numbers are shuffled within each matrix, a control; None for not.
        dtype: of the frozen weights.
        updates: of the whole run: one for each family with ``best``, as many for each with ``search``, 0 else.
        settings: further arguments of `LearningMethod`.
    """

    progress_bar_metrics = ("population_accuracy", "best_accuracy")

    def __init__(
        self,
        *,
        ends: Sequence[CountOrZero],
        families: Size,
        categories: Sequence[str],
        language_model: PretrainedFolder,
        adapter: Callable[..., Adapter],
        experts: Mapping[str, str],
        strategy: str,
        classifier: str | None = None,
        search: Callable[..., CrossEntropyMethod] = CrossEntropyMethod,
        per_matrix: bool = False,
        mix_space: str = "z",
        shuffle: Seed | None = None,
        dtype: str = "float32",
        updates: CountOrZero,
        **settings: Any,
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"Unknown strategy={strategy!r}: expected one of {', '.join(STRATEGIES)}.")
        super().__init__(updates=updates, **settings)
        expected = {"best": f"{families}, one for each family", "search": f"a multiple of the {families} families"}
        if {"best": updates != families, "search": updates < 1 or updates % families}.get(strategy, updates):
            raise ValueError(f"updates={updates}: expected {expected.get(strategy, 0)} with strategy={strategy}.")
        unknown = [category for category in experts if category not in categories]
        if unknown or not experts:
            raise ValueError(f"experts={list(experts)}: expected some of the categories {', '.join(categories)}.")
        self.ends = list(ends)
        self.strategy = strategy
        self.rounds = updates // families  # of each family
        self.mix_space = mix_space
        self.language = AdaptedModel(language_model, adapter, dtype)
        self.names = list(experts)
        self.experts = [self._load(path) for path in experts.values()]
        if shuffle is not None:
            self.experts = [expert.shuffled(shuffle) for expert in self.experts]
        self.expert_of = [self.names.index(name) if name in experts else None for name in categories]
        self.classifier = None if classifier is None else self._load(classifier)
        self.columns = len(self.language.singular_values.parameters) if per_matrix else 1
        size = len(self.experts) * self.columns
        share = 1 / len(self.experts)
        searched = families if strategy == "search" else 0
        self.searches = torch.nn.ModuleList(search(size=size, start=share) for _ in range(searched))
        self.register_buffer("chosen", torch.full((families, size), share))

    def shard(self, mesh: Any) -> None:
        self.language.shard(mesh)

    def _load(self, path: str) -> Expert:
        expert = Expert.load(path, self.language.base_checksum)
        self.language.check_expert(expert)
        return expert

    # -- trying candidates --------------------------------------------------------------------------------------------

    def candidates(self, family: int) -> Tensor:
        """Weights of the mixtures to try for a family of questions, [P, K A or K]; the same in all processes."""
        if self.strategy == "best":
            return self._single
        self.searches[family].ask()
        broadcast_(self.searches[family].points)
        return self.searches[family].points

    @property
    def _single(self) -> Tensor:
        """Weights of each expert alone, [K, K A or K]."""
        return torch.eye(len(self.experts), device=self.chosen.device).repeat_interleave(self.columns, 1)

    @property
    def _own(self) -> slice:
        """The candidates that this process tries: its share, or all where processes share the model's weights."""
        return slice(None) if self.language.sharded else slice(rank(), None, world_size())

    def attempt(self, family: int, prompt: Tensor, mask: Tensor, most_tokens: int) -> list[Completions]:
        """What this process' share of the candidates answer to prompts [B, L]."""
        found = []
        for weights in self.candidates(family)[self._own].cpu():
            self._mix(weights)
            found.append(self.language.complete_surely(prompt, mask, ends=self.ends, most_tokens=most_tokens))
        return found

    def _mix(self, weights: Tensor) -> None:
        shape = (len(self.experts), self.columns)
        weights = weights.cpu().view(shape).expand(-1, len(self.language.singular_values.parameters))
        self.language.singular_values.use(mixed(self.experts, weights, self.mix_space))

    def update(self, batch: TensorDict) -> TensorDict:
        """Learn from which of a population's answers to shots were right.

        `right` [own, B] and `log_prob` [own, B], the mean of an answer's tokens, are of this process' candidates.
        """
        family = self.updates // self.rounds
        right, log_prob = batch["right"].float(), batch["log_prob"]
        count = len(self.experts) if self.strategy == "best" else len(self.searches[family].points)
        scores, ties = torch.zeros(2, count, device=right.device)
        scores[self._own] = right.mean(1)
        # Among candidates that are right as often, those win that are surer where they are.
        ties[self._own] = (log_prob * right).sum(1) / right.sum(1).clamp(min=1)
        if not self.language.sharded:
            sum_([scores, ties])
        if self.strategy == "best":
            self.chosen[family] = self._single[first_of(scores, ties)]
        else:
            self.searches[family].tell(scores, ties)
            self.chosen[family] = self.searches[family].best
        return TensorDict({"population_accuracy": 100 * scores.mean(), "best_accuracy": 100 * scores.max()})

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, task: Any) -> "Answers":
        """Answers to an evaluation task's questions, one after the other, and what kind they were taken for."""
        began = time.monotonic()
        kinds, groups = None, torch.zeros(len(task.questions), dtype=torch.int64)
        if self.strategy == "dispatch":
            kinds = torch.cat([task.kinds(*self._classify(prompt, mask)) for prompt, mask in task.kind_batches])
            groups = kinds
        between = time.monotonic()
        answers: list[Any] = [None] * len(task.questions)
        for kind in groups.unique().tolist():
            rows = (groups == kind).nonzero()[:, 0]
            with self._weights(task.family_number, kind):
                for part in rows.split(task.batch):
                    prompt, mask = task.prompts_of(part.tolist())
                    tokens, kept = self.language.complete(prompt, mask, ends=self.ends, most_tokens=task.most_tokens)
                    for place, row, own in zip(part.tolist(), tokens.cpu(), kept.cpu()):
                        answers[place] = (row[None], own[None])
        scores = {"first_pass_seconds": between - began, "second_pass_seconds": time.monotonic() - between}
        if self.strategy in ("best", "search"):
            weights = self.chosen[task.family_number].view(len(self.experts), self.columns).mean(1).tolist()
            scores |= {f"weight_of_{name}": weight for name, weight in zip(self.names, weights)}
        self.add_scores({f"{task.name}/{name}": [value] for name, value in scores.items()})
        return Answers(answers, kinds)

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        families = [sum(own) / len(own) for name, own in self.scores.items() if name.endswith("/accuracy")]
        self.add_scores({"average/accuracy": [sum(families) / len(families)]})

    def _classify(self, prompt: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if self.classifier is None:
            with self.language.adapter.base():
                return self.language.complete(prompt, mask, ends=self.ends, most_tokens=KIND_TOKENS)
        self.language.singular_values.use(self.classifier.scales)
        return self.language.complete(prompt, mask, ends=self.ends, most_tokens=KIND_TOKENS)

    @contextmanager
    def _weights(self, family: int, kind: int) -> Iterator[None]:
        """Inside, the model is the one for a family of questions, or for those that were taken for a kind."""
        weights = None if self.strategy == "base" else self.chosen[family]
        if self.strategy == "dispatch":
            expert = self.expert_of[kind] if kind >= 0 else None
            weights = None if expert is None else self._single[expert]
        if weights is None:
            with self.language.adapter.base():
                yield
        else:
            self._mix(weights)
            yield

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["learning_method"]["base"] = self.language.base_checksum

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        super().check_checkpoint(checkpoint)
        self.language.check_base(checkpoint["learning_method"].get("base"))
