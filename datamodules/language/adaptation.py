"""Families of questions that nobody trained for, a few of them with answers, and what kind of question they are.

Dimensions: B prompts, L prompt tokens, T completion tokens, P candidates.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from tensordict import TensorDict
from torch import Tensor

from components.checks import Count, CountOrZero, Seed, Size, checked
from components.language.models import PretrainedFolder
from datamodules.language.questions import Categories, Question, QuestionFamily
from datamodules.language.training import Prompts, QuestionsTask
from datamodules.sampling import EvaluationTasks, FixedTasks, Stacks


@checked
class AdaptationDataModule(FixedTasks, L.LightningDataModule):
    """Shots and tests of several families, which a method adapts to one after the other.

    Args:
        language_model: folder of the model, for its tokenizer.
        families: that are adapted to, by any name.
        categories: kinds of questions that there are experts for, and how the model is asked for them.
        kinds: the category of each family, by the family's name, for the record alone.
        template: of prompts, see `Prompts`.
        turn_end: what follows an answer in a prompt with examples.
        most_tokens: of a completion.
        shots: questions of each family whose answers may be used.
        in_context: shots that are put before each question as examples.
        test_questions: of each family at most.
        generation_batch: prompts that are completed at once.
        split_seed: of the splits; the experts' own.
        seed: of which questions are shots.
    """

    def __init__(
        self,
        language_model: PretrainedFolder,
        families: Mapping[str, QuestionFamily],
        *,
        categories: Categories,
        kinds: Mapping[str, str],
        template: str | None = None,
        turn_end: str = "",
        most_tokens: Size,
        shots: Count,
        in_context: CountOrZero = 0,
        test_questions: Count,
        generation_batch: Size = 100,
        split_seed: Seed = 0,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        if in_context > shots:
            raise ValueError(f"in_context={in_context}: expected at most shots={shots}.")
        self.prompts = Prompts(language_model, template, turn_end)
        self.families = list(families.values())
        self.categories = categories
        known = list(categories.families)
        for family in self.families:
            if kinds.get(family.name) not in known:
                raise ValueError(
                    f"kinds.{family.name}={kinds.get(family.name)}: expected one of the categories {', '.join(known)}."
                )
        self.kinds = {family.name: known.index(kinds[family.name]) for family in self.families}
        self.most_tokens = most_tokens
        self.shots = shots
        self.in_context = in_context
        self.test_questions = test_questions
        self.generation_batch = generation_batch
        self.split_seed = split_seed
        self.seed = seed
        self._drawn: dict[int, tuple[list[Question], list[Question]]] = {}

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "ends": self.prompts.ends,
            "families": len(self.families),
            "categories": list(self.categories.families),
        }

    def drawn(self, number: int) -> tuple[list[Question], list[Question]]:
        """Questions of a family whose answers may be used, and those that it is tested with."""
        if number not in self._drawn:
            family = self.families[number]
            splits = family.splits(self.split_seed)
            if self.shots > len(splits["train"]):
                raise ValueError(
                    f"shots={self.shots}: expected at most the {len(splits['train'])} training questions of "
                    f"{family.name}."
                )
            shots = random.Random(f"{family.name}/{self.seed}").sample(splits["train"], self.shots)
            self._drawn[number] = shots, splits["test"][: self.test_questions]
        return self._drawn[number]

    # -- Lightning ----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Stacks:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        return Stacks(lambda update: self._judged(module, update)[None], 1, module.updates, module.total_updates)

    def _judged(self, module: Any, update: int) -> TensorDict:
        """Which of a method's candidates answer which shots rightly, [P, B]."""
        number = update // module.rounds
        family, (shots, _) = self.families[number], self.drawn(number)
        prompt, mask = self.prompts.encode([self.prompts.text(shot.text, family.prefix) for shot in shots])
        attempts = module.attempt(number, prompt, mask, self.most_tokens)
        shape = len(attempts), len(shots)  # where processes are many, one may have no candidate
        right, log_prob = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        for row, attempt in enumerate(attempts):
            texts = self.prompts.decode(attempt.tokens, attempt.mask)
            right[row] = torch.tensor([family.right(text, shot.answer) for text, shot in zip(texts, shots)])
            log_prob[row] = attempt.log_prob.cpu()
        batch = {"right": right, "log_prob": log_prob}
        return TensorDict({name: each.to(module.device) for name, each in batch.items()}, batch_size=shape[:1])

    def val_dataloader(self) -> EvaluationTasks:
        return EvaluationTasks([])

    def test_dataloader(self) -> EvaluationTasks:
        return EvaluationTasks([AdaptationTask(self, number) for number in range(len(self.families))])


class AdaptationTask(QuestionsTask):
    """Test questions of a family, and the question what kind they are."""

    def __init__(self, data: AdaptationDataModule, number: int) -> None:
        family = data.families[number]
        shots, questions = data.drawn(number)
        super().__init__(family.name, family, questions, data.prompts, data.most_tokens, data.generation_batch)
        self.family_number = number
        self.categories = data.categories
        self.kind = data.kinds[family.name]
        self._examples = [
            (each.text, family.prefix + family.reference(each.answer)) for each in shots[: data.in_context]
        ]

    def prompts_of(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Prompts [B, L] of some questions, and their mask."""
        asked = [self.questions[row].text for row in rows]
        return self.prompts.encode([self.prompts.text(text, self.family.prefix, self._examples) for text in asked])

    @property
    def kind_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Prompts [B, L] that ask what kind of question each one is, and their masks."""
        for begin in range(0, len(self.questions), self.batch):
            asked = [self.categories.asked(each.text) for each in self.questions[begin : begin + self.batch]]
            yield self.prompts.encode([self.prompts.text(text, self.categories.prefix) for text in asked])

    def kinds(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The categories [B] that completions of these name, -1 for none."""
        names = list(self.categories.families)
        read = [self.categories.read(text) for text in self.prompts.decode(tokens, mask)]
        return torch.tensor([-1 if name is None else names.index(name) for name in read])

    def texts(self, result: Any) -> list[str]:
        return super().texts(result.completions)

    def metrics(self, result: Any) -> dict[str, list[float]]:
        """As of other questions; where they were sorted, also how many in a hundred were taken for what."""
        found = {
            f"{self.name}/accuracy": [
                100.0 * self.family.right(text, each.answer) for text, each in zip(self.texts(result), self.questions)
            ]
        }
        if result.kinds is not None:
            found[f"{self.name}/kind_accuracy"] = (100.0 * (result.kinds == self.kind)).tolist()
            for kind, name in enumerate([*self.categories.families, "none"]):
                taken = result.kinds == (kind if name != "none" else -1)
                found[f"{self.name}/taken_for_{name}"] = (100.0 * taken).tolist()
        return found
