"""Families of questions whose answers can be verified: made up of numbers and words, or read from files.

Every family comes in splits that share nothing an answer could be remembered by: pairs of operands and lists of words
are split, not the questions asked about them.
"""

import itertools
import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from components.buildable import buildable
from components.files import read_text, visible_files

SPLITS = {"train": 0.5, "validation": 0.1, "test": 0.4}


class Question(NamedTuple):
    """What is asked, and what is right."""

    text: str
    answer: str


@buildable()
class QuestionFamily(ABC):
    """Questions of one kind.

    Attributes:
        name: in metrics.
        prefix: how the answer's sentence begins; completions go on from there.
    """

    name: str
    prefix: str = "The answer is"

    @abstractmethod
    def splits(self, seed: int) -> dict[str, list[Question]]:
        """Questions for ``train``, ``validation`` and ``test``, in a random order of this seed."""

    @abstractmethod
    def right(self, completion: str, answer: str) -> bool:
        """Whether what followed the prefix gives the answer."""

    def reference(self, answer: str) -> str:
        """A right completion."""
        return f" {answer}."


# -- reading answers ------------------------------------------------------------------------------------------------

_NUMBER = re.compile(
    r"(?P<sign>[-+\u2212]?)[$\u20ac\u00a3]?"
    r"(?P<digits>(?<!\d,)\d{1,3}(?:,\d{3})+(?![\d]|,\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)
_LONGEST = 1000  # digits that are read: more are no answer, and can take a while


def numbers(text: str) -> list[Fraction]:
    """All numbers in a text, as they are meant: with signs, decimals, currencies and thousands' separators.

    A sign right behind a digit, a letter or a closing bracket is an operator, and commas between numbers of other than
    three digits make a list.
    """
    found = []
    for match in _NUMBER.finditer(text):
        negative = match["sign"] in ("-", "\u2212") and not re.match(r"[\w)\]]", text[: match.start()][-1:])
        size = Fraction(match["digits"].replace(",", "")[:_LONGEST])
        found.append(-size if negative else size)
    return found


def first_number_is(completion: str, answer: str) -> bool:
    return numbers(completion)[:1] == numbers(answer)[:1]


def first_word_is(completion: str, answer: str) -> bool:
    found = re.search(r"[^\W\d_]+", completion)
    return found is not None and found[0].casefold() == answer.casefold()


# -- made up --------------------------------------------------------------------------------------------------------

_LISTED = (
    "apple arm bag ball bank bear bed bell bird boat book bottle box bread bridge brush bus cake candle car card "
    "cat chair cheese church circle clock cloud coat coin corn cow crown cup desk dog door dress drum egg engine "
    "eye farm feather fire fish flag flower fork garden gate glass glove gold grass guitar hammer hand hat heart "
    "hill horse house island jacket key king kite knife lake lamp leaf lemon letter lion map milk mirror moon "
    "mountain nail needle nest ocean orange paper pencil phone piano plate pocket queen rain ring river road rope "
    "salt ship shirt shoe silver snow spoon star stone street table tower train tree wall watch water wheel window "
    "wolf"
)
WORDS = _LISTED.split()

SUMS = ("What is {} + {}?", "How much is {} + {}?", "Calculate {} + {}.", "Compute {} + {}.", "Work out {} + {}.")
POOL = 2000  # groups of questions of a family that has more


class MadeUp(QuestionFamily):
    """Questions that are made up.

    Args:
        name: of the family.
        groups: what splits must not share, all of it or drawn.
        ask: the questions of a group.
        right_by: reads the answer.
    """

    def __init__(
        self,
        name: str,
        groups: Callable[[random.Random], Iterable[Hashable]],
        ask: Callable[..., list[Question]],
        right_by: Callable[[str, str], bool] = first_number_is,
    ) -> None:
        self.name = name
        self.groups = groups
        self.ask = ask
        self.right_by = right_by

    def splits(self, seed: int) -> dict[str, list[Question]]:
        chance = random.Random(f"{self.name}/{seed}")
        groups = sorted(self.groups(chance))
        chance.shuffle(groups)
        found, begin = {}, 0
        for name, share in SPLITS.items():
            end = len(groups) if name == "test" else begin + round(share * len(groups))
            found[name] = [question for group in groups[begin:end] for question in self.ask(*group)]
            chance.shuffle(found[name])
            begin = end
        return found

    def right(self, completion: str, answer: str) -> bool:
        return self.right_by(completion, answer)


def _drawn(items: Sequence, size: int) -> Callable[[random.Random], Iterable[Hashable]]:
    """Sets of so many different items, as sorted tuples."""

    def draw(chance: random.Random) -> Iterable[Hashable]:
        found: set[tuple] = set()
        while len(found) < POOL:
            found.add(tuple(sorted(chance.sample(items, size))))
        return found

    return draw


def _pairs(low: int, high: int, above: int = 0) -> Callable[[random.Random], Iterable[Hashable]]:
    """All pairs of numbers, in one order; the larger above a bound."""
    return lambda _: [
        pair for pair in itertools.combinations_with_replacement(range(low, high + 1), 2) if pair[1] > above
    ]


def _orders(items: tuple, most: int) -> list[tuple]:
    """Some orders of a group's items, which depend on them alone."""
    orders = sorted(set(itertools.permutations(items)))
    random.Random(repr(items)).shuffle(orders)
    return orders[:most]


def _chosen(question: str, choose: Callable[[tuple], object], orders: int = 2) -> Callable[..., list[Question]]:
    """Asks for one of a group's items, in several orders."""

    def ask(*items: object) -> list[Question]:
        found = []
        for order in _orders(items, orders):
            listed = ", ".join(map(str, order))
            found.append(Question(question.format(*order, list=listed), str(choose(order))))
        return found

    return ask


def _sum(a: int, b: int) -> list[Question]:
    return [Question(asked.format(*order), str(a + b)) for asked in SUMS for order in sorted({(a, b), (b, a)})]


def _last(items: tuple) -> object:
    return items[-1]


def _first(items: tuple) -> object:
    return items[0]


_TWO_DIGITS, _THREE_DIGITS = range(10, 100), range(100, 1000)
_LARGER = "Which number is larger, {} or {}?"
_LAST = "What is the last {} in this list: {{list}}?"

FAMILIES = {
    family.name: family
    for family in (
        MadeUp("larger", _drawn(_TWO_DIGITS, 2), _chosen(_LARGER, max)),
        MadeUp("larger3d", _drawn(_THREE_DIGITS, 2), _chosen(_LARGER, max)),
        MadeUp("smaller", _drawn(_TWO_DIGITS, 2), _chosen("Which number is smaller, {} or {}?", min)),
        MadeUp("largest3", _drawn(_TWO_DIGITS, 3), _chosen("Which number is the largest: {list}?", max)),
        MadeUp("smallest3", _drawn(_TWO_DIGITS, 3), _chosen("Which number is the smallest: {list}?", min)),
        MadeUp("addm", _pairs(2, 12), _sum),
        MadeUp("add20", _pairs(2, 20, above=12), _sum),
        MadeUp("lastword", _drawn(WORDS, 4), _chosen(_LAST.format("word"), _last), first_word_is),
        MadeUp(
            "firstword",
            _drawn(WORDS, 4),
            _chosen("What is the first word in this list: {list}?", _first),
            first_word_is,
        ),
        MadeUp("lastnum", _drawn(_TWO_DIGITS, 4), _chosen(_LAST.format("number"), _last)),
    )
}


@buildable()
def family(name: str) -> QuestionFamily:
    """A family by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in FAMILIES:
        raise ValueError(f"Unknown family={name!r}: expected one of {', '.join(FAMILIES)}.")
    return FAMILIES[name]


class Categories(QuestionFamily):
    """Which kind of question is it? Asked about the questions of other families, as many of each, split as they are.

    Args:
        families: by the names of their categories.
        instruction: comes before the question; may name ``{categories}``.
        name: in metrics.
        prefix: how the answer's sentence begins.
    """

    def __init__(
        self,
        families: Mapping[str, QuestionFamily],
        instruction: str = "Classify the question into one of these categories: {categories}. Question: ",
        name: str = "category",
        prefix: str = "The category is",
    ) -> None:
        self.families = dict(families)
        self.instruction = instruction
        self.name = name
        self.prefix = prefix

    def asked(self, question: str) -> str:
        """The question about a question."""
        return self.instruction.replace("{categories}", ", ".join(self.families)) + question

    def splits(self, seed: int) -> dict[str, list[Question]]:
        found: dict[str, list[Question]] = {split: [] for split in SPLITS}
        splits = {category: own.splits(seed) for category, own in self.families.items()}
        for split, questions in found.items():
            count = min(len(own[split]) for own in splits.values())
            for category, own in splits.items():
                questions += [Question(self.asked(question.text), category) for question in own[split][:count]]
            random.Random(f"{self.name}/{split}/{seed}").shuffle(questions)
        return found

    def read(self, completion: str) -> str | None:
        """The category that a completion names first; None for none."""
        known = {category.casefold(): category for category in self.families}
        named = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
        found = re.search(rf"(?<!\w)(?:{named})(?!\w)", completion.casefold())
        return None if found is None else known[found[0]]

    def right(self, completion: str, answer: str) -> bool:
        return self.read(completion) == answer


# -- from files -----------------------------------------------------------------------------------------------------


class GSM8K(QuestionFamily):
    """Word problems (Cobbe et al., arXiv 2110.14168): `train.jsonl` and `test.jsonl`, an object on each line with
    ``question`` and ``answer``, which ends with ``#### NUMBER``. Lines of even places train, odd ones validate.

    A completion is right if its last number is the answer's.

    Args:
        folder: of the files.
    """

    name = "gsm8k"
    prefix = ""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def splits(self, seed: int) -> dict[str, list[Question]]:
        lines = {name: self._read(name) for name in ("train", "test")}
        return {"train": lines["train"][::2], "validation": lines["train"][1::2], "test": lines["test"]}

    def _read(self, name: str) -> list[Question]:
        questions = []
        for path, number, line in _json_lines(
            self.folder / f"{name}.jsonl", "https://github.com/openai/grade-school-math"
        ):
            text, answer = _strings(path, number, line, "question", "answer")
            if "####" not in answer or not numbers(answer.rsplit("####", 1)[1]):
                raise ValueError(f"{path}:{number}: expected an answer that ends with #### and a number, found none.")
            questions.append(Question(text, answer))
        return questions

    def right(self, completion: str, answer: str) -> bool:
        return numbers(completion)[-1:] == numbers(answer.rsplit("####", 1)[1])[:1]

    def reference(self, answer: str) -> str:
        return answer


class ARC(QuestionFamily):
    """Multiple choice (Clark et al., arXiv 1803.05457): files ``NAME-Train.jsonl``, ``-Dev`` and ``-Test`` with
    ``question.stem``, ``question.choices`` of ``text`` and ``label``, and ``answerKey``.

    A completion is read by the first label in brackets or after "answer is"; without any, by a label that it begins
    with. A stray capital is no answer.

    Args:
        folder: of the files.
        name: ``ARC-Easy`` or ``ARC-Challenge``, as in the files' names.
    """

    prefix = "The answer is"

    def __init__(self, folder: str | Path, name: str = "ARC-Easy") -> None:
        self.folder = Path(folder)
        self.name = name

    def splits(self, seed: int) -> dict[str, list[Question]]:
        names = {"train": "Train", "validation": "Dev", "test": "Test"}
        return {split: self._read(self.folder / f"{self.name}-{name}.jsonl") for split, name in names.items()}

    def _read(self, path: Path) -> list[Question]:
        questions = []
        for _, number, line in _json_lines(path, "https://allenai.org/data/arc"):
            try:
                choices = {choice["label"]: choice["text"] for choice in line["question"]["choices"]}
                stem, key = line["question"]["stem"], line["answerKey"]
                texts = [stem, key, *choices, *choices.values()]
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number}: expected a question with choices and answerKey ({error})."
                ) from None
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(
                    f"{path}:{number}: expected texts as stem, answerKey, labels and choices, found others."
                )
            if key not in choices:
                raise ValueError(f"{path}:{number}: expected answerKey to be one of {', '.join(choices)}, found {key}.")
            listed = "\n".join(f"({label}) {text}" for label, text in choices.items())
            questions.append(Question(f"{stem}\n{listed}", key))
        return questions

    def right(self, completion: str, answer: str) -> bool:
        found = _CHOSEN.search(completion) or _CHOSEN_FIRST.match(completion)
        return found is not None and answer in found.groups()

    def reference(self, answer: str) -> str:
        return f" ({answer})."


_CHOSEN = re.compile(r"\(([A-J1-9])\)|(?i:answer(?: is|:)) *([A-J1-9])(?![\w'])")
_CHOSEN_FIRST = re.compile(r"\s*(?:([A-J1-9])(?=[.):,;\n]|\s*$)|([B-HJ])(?= ))")  # A and I are words too


class MATH(QuestionFamily):
    """Competition problems (Hendrycks et al., arXiv 2103.03874): files ``train/SUBJECT/NUMBER.json`` and ``test/...``
    with ``problem`` and ``solution``, which puts the answer in ``\\boxed{}``. Every other training problem validates.

    A completion is right if its boxed answer is equal to the solution's, as `math_verify` compares mathematics.

    Args:
        folder: of ``train`` and ``test``.
    """

    name = "math"
    prefix = ""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def splits(self, seed: int) -> dict[str, list[Question]]:
        problems = {name: self._read(name) for name in ("train", "test")}
        random.Random(f"{self.name}/{seed}").shuffle(problems["train"])  # or subjects would come one after the other
        return {"train": problems["train"][::2], "validation": problems["train"][1::2], "test": problems["test"]}

    def _read(self, name: str) -> list[Question]:
        paths = visible_files(self.folder / name, "*/*.json")
        if not paths:
            raise FileNotFoundError(
                f"{self.folder / name}: expected problems SUBJECT/NUMBER.json from https://github.com/hendrycks/math, "
                "found none."
            )
        questions = []
        for path in paths:
            text, solution = _strings(
                path, 1, _json_object(path, 1, read_text(path, "a problem")), "problem", "solution"
            )
            if "\\boxed" not in solution:
                raise ValueError(f"{path}: expected a solution with an answer in \\boxed{{}}, found none.")
            questions.append(Question(f"{text}\nPut the answer in \\boxed{{}}.", solution))
        return questions

    def right(self, completion: str, answer: str) -> bool:
        from math_verify import LatexExtractionConfig, parse, verify

        boxed = [LatexExtractionConfig(boxed_match_priority=0)]
        return "\\boxed" in completion and verify(parse(answer, boxed), parse(completion, boxed))

    def reference(self, answer: str) -> str:
        return answer


def _json_lines(path: Path, source: str) -> list[tuple[Path, int, dict]]:
    lines = enumerate(read_text(path, f"a file of questions from {source}").split("\n"), 1)
    found = [(path, number, _json_object(path, number, line)) for number, line in lines if line.strip()]
    if not found:
        raise ValueError(f"{path}: expected a question on each line, found none.")
    return found


def _json_object(path: Path, number: int, text: str) -> dict:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: expected a JSON object, found none ({error}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}:{number}: expected a JSON object, found {type(found).__name__}.")
    return found


def _strings(path: Path, number: int, line: dict, *keys: str) -> list[str]:
    for key in keys:
        if not isinstance(line.get(key), str):
            raise ValueError(f"{path}:{number}: expected a text under {key!r}, found {line.get(key)!r}.")
    return [line[key] for key in keys]
