"""Questions as prompts, a policy's completions of them, and what they are worth.

Dimensions: B prompts, L prompt tokens, T completion tokens.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad

from components.checks import Count, Number, Seed, Size, checked
from components.distributed import rank, world_size
from components.language.models import PretrainedFolder
from datamodules.language.questions import Question, QuestionFamily
from datamodules.sampling import EvaluationTasks, FixedTasks, Stacks

COMPLETIONS = ("sampled", "reference")
VALIDATION = "validation"  # the task's name in metrics


class Prompts:
    """Makes token ids of questions.

    Args:
        language_model: whose tokenizer is used.
        template: of a prompt, with ``{question}`` and ``{prefix}``, how the answer begins, behind the token that the
            tokenizer begins texts with, if it does; None for the tokenizer's own chat template, behind which the prefix
            is put.
        turn_end: what follows an answer where examples stand before the question; of no meaning without a template.

    Attributes:
        ends: ids of the tokens that end a completion.
        end: the one of them that ends right answers which are trained on: that of the chat template's turns.
    """

    def __init__(self, language_model: PretrainedFolder, template: str | None, turn_end: str = "") -> None:
        if template is not None and not all(field in template for field in ("{question}", "{prefix}")):
            raise ValueError(f"template={template!r}: expected {{question}} and {{prefix}} in it.")
        self.tokenizer = language_model.tokenizer
        self.path = language_model.path
        self.template = template
        self.turn_end = turn_end
        self.ends = language_model.ends
        self.end = self.ends[0]
        first = self.tokenizer("a")["input_ids"][:1]
        self.begin = self.tokenizer.bos_token if first == [self.tokenizer.bos_token_id] else ""
        if template is None:
            if self.tokenizer.chat_template is None:
                raise ValueError(f"template: expected one, for the tokenizer of {self.path} has none.")
            told = self.encode([self._turns([("?", "!")])])[0][0].tolist()
            self.end = next((token for token in reversed(told) if token in self.ends), self.end)

    def text(self, question: str, prefix: str, examples: Sequence[tuple[str, str]] = ()) -> str:
        """A prompt, with questions and answers before it that are examples."""
        if self.template is None:
            return self._turns(examples, question) + prefix
        before = "".join(self._filled(*example) + self.turn_end for example in examples)
        return self.begin + (before + self._filled(question, prefix)).removeprefix(self.begin)

    def _filled(self, question: str, prefix: str) -> str:
        return self.template.replace("{prefix}", prefix).replace("{question}", question)

    def _turns(self, examples: Sequence[tuple[str, str]], question: str | None = None) -> str:
        """A conversation as the chat template has it.

        Raises:
            ValueError: it fails, or leaves out what was said.
        """
        said = [[{"role": "user", "content": asked}, {"role": "assistant", "content": own}] for asked, own in examples]
        turns = [turn for pair in said for turn in pair]
        turns += [] if question is None else [{"role": "user", "content": question}]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=question is not None)
        except Exception as error:  # jinja's, and whatever a template's expressions raise
            cause = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(
                f"{self.path}: expected a chat template for questions and answers in turn, found one that fails "
                f"({cause}); template= takes its place."
            ) from error
        for turn in turns:
            if turn["content"].strip() not in text:
                raise ValueError(
                    f"{self.path}: expected a chat template that says what it is given, found one that leaves out what "
                    f"the {turn['role']} says, {turn['content']!r:.80}; template= takes its place."
                )
        return text

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids [B, L], padded on the left, and their mask."""
        encoded = self.tokenizer(list(texts), return_tensors="pt", padding=True, add_special_tokens=False)
        return encoded["input_ids"], encoded["attention_mask"]

    def encode_completions(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids [B, T] with the end, padded on the right, and their mask, true up to the end."""
        ids = [[*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end] for text in texts]
        longest = max(map(len, ids))
        tokens = torch.tensor([[*row, *[self.end] * (longest - len(row))] for row in ids])
        return tokens, torch.arange(longest) < torch.tensor([[len(row)] for row in ids])

    def decode(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """Texts of completions [B, T], without what ends them."""
        return [
            self.tokenizer.decode(row[kept], skip_special_tokens=True)
            for row, kept in zip(tokens.cpu(), mask.bool().cpu())
        ]


@checked
class LanguageDataModule(FixedTasks, L.LightningDataModule):
    """A family of questions: at each update some are asked of the policy as it is, and its answers verified.

    Questions are drawn without replacement, all of the training split before any comes again; several processes share a
    batch. Validation and tests take the likeliest answers.

    Args:
        language_model: folder of the model, for its tokenizer.
        questions: the family that is learned.
        others: further ones that are tested, by any name.
        template: of prompts, see `Prompts`.
        most_tokens: of a completion.
        batch_size: questions of an update, over all processes.
        completions: ``sampled`` from the policy, or ``reference`` answers without rewards: next-token prediction.
        reward_wrong: of a wrong answer; a right one has 1.
        evaluate_every: updates between validations.
        validation_questions, test_questions: how many of these splits are used at most.
        other_questions: how many of the others' tests are used at most.
        generation_batch: prompts that are completed at once.
        split_seed: of the splits; experts that are to be used together need the same.
        seed: of the order of questions.
    """

    def __init__(
        self,
        language_model: PretrainedFolder,
        questions: QuestionFamily,
        *,
        others: Mapping[str, QuestionFamily] | None = None,
        template: str | None = None,
        most_tokens: Size,
        batch_size: Size,
        completions: str = "sampled",
        reward_wrong: Number = -1.0,
        evaluate_every: Count,
        validation_questions: Count,
        test_questions: Count,
        other_questions: Count = 100,
        generation_batch: Size = 100,
        split_seed: Seed = 0,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        if completions not in COMPLETIONS:
            raise ValueError(f"Unknown completions={completions!r}: expected one of {', '.join(COMPLETIONS)}.")
        self.prompts = Prompts(language_model, template)
        self.family = questions
        self.others = {own.name: own for own in (others or {}).values() if own.name != questions.name}
        self.most_tokens = most_tokens
        self.batch_size = batch_size
        self.completions = completions
        self.reward_wrong = reward_wrong
        self.evaluate_every = evaluate_every
        self.validation_questions = validation_questions
        self.test_questions = test_questions
        self.other_questions = other_questions
        self.generation_batch = generation_batch
        self.split_seed = split_seed
        self.seed = seed
        self._splits: dict[str, dict[str, list[Question]]] = {}

    @property
    def spec(self) -> dict[str, Any]:
        return {"ends": self.prompts.ends}

    def split(self, family: QuestionFamily, name: str) -> list[Question]:
        """One of the splits of a family."""
        if family.name not in self._splits:
            self._splits[family.name] = family.splits(self.split_seed)
        return self._splits[family.name][name]

    # -- experience ---------------------------------------------------------------------------------------------------

    def drawn(self, update: int) -> list[Question]:
        """This process' questions of an update."""
        questions = self.split(self.family, "train")
        count = self.batch_size
        if count > len(questions):
            raise ValueError(
                f"batch_size={count}: expected at most the {len(questions)} questions of {self.family.name}."
            )
        epoch, place = divmod(update, len(questions) // count)
        order = list(range(len(questions)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        own = order[place * count : (place + 1) * count][rank() :: world_size()]
        return [questions[index] for index in own]

    def train_dataloader(self) -> Stacks:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        if self.batch_size % world_size():
            raise ValueError(f"batch_size={self.batch_size} can't be split over {world_size()} processes.")
        stop = min((module.updates // self.evaluate_every + 1) * self.evaluate_every, module.total_updates)
        return Stacks(lambda update: self._asked(module, self.drawn(update))[None], 1, module.updates, stop)

    def _asked(self, module: Any, questions: Sequence[Question]) -> TensorDict:
        """Questions with the policy's answers and their rewards, or with right answers."""
        prompt, mask = self.prompts.encode([self.prompts.text(each.text, self.family.prefix) for each in questions])
        if self.completions == "sampled":
            parts = zip(prompt.split(self.generation_batch), mask.split(self.generation_batch))
            tokens, kept = self._together([module.complete(*part, most_tokens=self.most_tokens) for part in parts])
            texts = self.prompts.decode(tokens, kept)
            right = torch.tensor([self.family.right(text, each.answer) for text, each in zip(texts, questions)])
            judged = {"right": right, "reward": torch.where(right, 1.0, self.reward_wrong)}
        else:
            tokens, kept = self.prompts.encode_completions([self.family.reference(each.answer) for each in questions])
            judged = {}
        batch = {
            "prompt": prompt,
            "prompt_mask": mask.bool(),
            "completion": tokens,
            "completion_mask": kept,
            **judged,
        }
        return TensorDict({name: each.to(module.device) for name, each in batch.items()}, batch_size=[len(questions)])

    def _together(self, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Completions [B, T] and masks of several passes in one, as long as the longest."""
        longest = max(tokens.shape[1] for tokens, _ in parts)
        tokens = [pad(tokens, (0, longest - tokens.shape[1]), value=self.prompts.end) for tokens, _ in parts]
        masks = [pad(mask, (0, longest - mask.shape[1]), value=False) for _, mask in parts]
        return torch.cat(tokens), torch.cat(masks)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def val_dataloader(self) -> EvaluationTasks:
        return EvaluationTasks([self._validation()])

    def _validation(self) -> "QuestionsTask":
        questions = self.split(self.family, "validation")[: self.validation_questions]
        return self.task(VALIDATION, self.family, questions)

    def test_dataloader(self) -> EvaluationTasks:
        """The tests, and once more the questions of validation, for what has no curve to be compared with curves."""
        counts = {self.family: self.test_questions, **dict.fromkeys(self.others.values(), self.other_questions)}
        return EvaluationTasks(
            [
                *(self.task(own.name, own, self.split(own, "test")[:count]) for own, count in counts.items()),
                self._validation(),
            ]
        )

    def task(self, name: str, family: QuestionFamily, questions: Sequence[Question]) -> "QuestionsTask":
        return QuestionsTask(name, family, questions, self.prompts, self.most_tokens, self.generation_batch)


class QuestionsTask:
    """Questions that have not been learned from.

    Args:
        name: of the metrics.
        family: verifies answers.
        questions: that are asked.
        prompts: makes token ids of them.
        most_tokens: of an answer.
        batch: prompts in one pass.
    """

    rewards: tuple[str, ...] = ()  # nothing is rolled out, and there is nothing to film

    def __init__(
        self,
        name: str,
        family: QuestionFamily,
        questions: Sequence[Question],
        prompts: Prompts,
        most_tokens: int,
        batch: int,
    ) -> None:
        self.name = name
        self.family = family
        self.questions = list(questions)
        self.prompts = prompts
        self.most_tokens = most_tokens
        self.batch = batch

    @property
    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Prompts [B, L] and their masks."""
        for begin in range(0, len(self.questions), self.batch):
            part = self.questions[begin : begin + self.batch]
            yield self.prompts.encode([self.prompts.text(each.text, self.family.prefix) for each in part])

    def texts(self, result: Sequence[tuple[Tensor, Tensor]]) -> list[str]:
        """Completions that a method made of the batches."""
        return [text for tokens, mask in result for text in self.prompts.decode(tokens, mask)]

    def metrics(self, result: Sequence[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
        """For each question whether it was answered rightly, in percent, and how many tokens it took."""
        right = [self.family.right(text, each.answer) for text, each in zip(self.texts(result), self.questions)]
        tokens = [float(count) for _, mask in result for count in mask.sum(1)]
        return {f"{self.name}/accuracy": [100.0 * each for each in right], f"{self.name}/tokens": tokens}
