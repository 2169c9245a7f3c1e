import json
import re
from fractions import Fraction

import pytest

from datamodules.language.questions import ARC, FAMILIES, GSM8K, MATH, Categories, family, first_word_is, numbers

OPERANDS = {"addm": (2, 12), "add20": (2, 20)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 45.", [45]),
        ("1,234 and 1,000", [1234, 1000]),
        ("12,34", [12, 34]),
        ("-7 is -7.50", [-7, Fraction(-15, 2)]),
        ("3-2 = 1, x-1", [3, 2, 1, 1]),
        ("\u22125 or +.5", [-5, Fraction(1, 2)]),
        ("$1,234,567.", [1234567]),
        ("10, 20, 300", [10, 20, 300]),
        ("10,20,300", [10, 20, 300]),
        ("-$5 or \u20ac3", [-5, 3]),
        ("7" * 5000, [int("7" * 1000)]),
        ("none", []),
    ],
)
def test_numbers_are_read_as_they_are_meant(text, expected):
    assert numbers(text) == expected


@pytest.mark.parametrize(
    ("name", "completion", "answer", "right"),
    [
        ("larger", " 81.", "81", True),
        ("larger", " 81.0", "81", True),
        ("larger", " 8", "81", False),
        ("larger", " 81 or 45", "45", False),
        ("larger", "", "81", False),
        ("addm", " 7 + 5 = 12", "12", False),
        ("lastword", " Cloud.", "cloud", True),
        ("lastword", ': "cloud"', "cloud", True),
        ("lastword", " clouds", "cloud", False),
        ("lastword", " 7", "cloud", False),
    ],
)
def test_answers_are_verified(name, completion, answer, right):
    assert family(name).right(completion, answer) is right


def test_the_reference_is_right():
    for made_up in FAMILIES.values():
        for question in made_up.splits(0)["validation"]:
            assert made_up.right(made_up.reference(question.answer), question.answer)


@pytest.mark.parametrize("name", FAMILIES)
def test_splits_share_nothing_that_an_answer_could_be_remembered_by(name):
    splits = family(name).splits(3)
    assert splits == family(name).splits(3)
    assert splits != family(name).splits(4)
    groups = {}
    for split, questions in splits.items():
        assert len(set(questions)) == len(questions)
        if name.endswith("word"):
            found = [frozenset(question.text.split(": ")[1].strip("?").split(", ")) for question in questions]
        else:
            found = [tuple(sorted(numbers(question.text))) for question in questions]
        groups[split] = set(found)
    assert not groups["train"] & groups["validation"]
    assert not (groups["train"] | groups["validation"]) & groups["test"]
    assert len(splits["test"]) >= 200
    assert len(splits["train"]) >= 200


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_right(name):
    rules = {
        "larger": max,
        "larger3d": max,
        "smaller": min,
        "largest3": max,
        "smallest3": min,
        "addm": sum,
        "add20": sum,
        "lastnum": lambda found: found[-1],
    }
    for question in family(name).splits(0)["test"]:
        if name in rules:
            assert rules[name](numbers(question.text)) == int(question.answer)
        else:
            words = question.text.split(": ")[1].strip("?").split(", ")
            assert len(set(words)) == 4
            assert question.answer == words[0 if name == "firstword" else -1]
    if name in OPERANDS:
        low, high = OPERANDS[name]
        every = [numbers(question.text) for questions in family(name).splits(0).values() for question in questions]
        assert all(low <= min(pair) and max(pair) <= high for pair in every)
        assert (min(max(pair) for pair in every) > 12) == (name == "add20")


def test_categories_are_split_as_their_questions_are():
    families = {"comparison": family("larger"), "list": family("lastword")}
    categories = Categories(families)
    splits = categories.splits(0)
    for split, questions in splits.items():
        answers = [answer for _, answer in questions]
        assert answers.count("comparison") == answers.count("list") == len(answers) / 2
        for category, own in families.items():
            asked = {text.split("Question: ")[1] for text, answer in questions if answer == category}
            assert asked <= {question.text for question in own.splits(0)[split]}
    text, _ = splits["test"][0]
    assert text.startswith("Classify the question into one of these categories: comparison, list. Question: ")
    assert categories.read(" Comparison.") == "comparison"
    assert categories.read(" 'list' or comparison") == "list"
    assert categories.read(" lists") is None
    longer = Categories({"list": family("lastword"), "list-making": family("larger"), "word problem": family("addm")})
    assert longer.read(" List-making, then") == "list-making"
    assert longer.read(" a word problem") == "word problem"
    counts = [len(own) for own in longer.splits(0).values()]
    assert counts == [3 * min(len(each.splits(0)[split]) for each in longer.families.values()) for split in splits]
    assert categories.right(" list.", "list")
    assert not categories.right(" none", "list")


def test_unknown_families_are_named():
    with pytest.raises(ValueError, match="Unknown family='x': expected one of larger"):
        family("x")


def test_word_problems_are_read_from_their_files(tmp_path):
    lines = [{"question": f"How many? {n}", "answer": f"It is 1,0{n}0.\n#### 1,0{n}0"} for n in range(4)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    gsm8k = GSM8K(tmp_path)
    splits = gsm8k.splits(0)
    assert [question.text for question in splits["train"]] == ["How many? 0", "How many? 2"]
    assert [question.text for question in splits["validation"]] == ["How many? 1", "How many? 3"]
    assert len(splits["test"]) == 4
    answer = splits["test"][2].answer
    assert gsm8k.right("First 5, then 1020.", answer)
    assert gsm8k.right(gsm8k.reference(answer), answer)
    assert not gsm8k.right("1020, no, 20", answer)
    assert not gsm8k.right("none", answer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"train\.jsonl:1: expected a JSON object"),
        ("[1]", "expected a JSON object, found list"),
        ('{"question": "x"}', "expected a text under 'answer', found None"),
        ('{"question": "x", "answer": "5"}', "expected an answer that ends with #### and a number"),
    ],
)
def test_what_is_wrong_with_word_problems_is_named(tmp_path, line, message):
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl: expected a file of questions"):
        GSM8K(tmp_path).splits(0)
    (tmp_path / "train.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        GSM8K(tmp_path).splits(0)


def test_multiple_choice_is_read_from_its_files(tmp_path):
    line = {
        "id": "1",
        "question": {"stem": "Which?", "choices": [{"text": "this", "label": "A"}, {"text": "that", "label": "B"}]},
        "answerKey": "B",
    }
    for name in ("Train", "Dev", "Test"):
        (tmp_path / f"ARC-Easy-{name}.jsonl").write_text(json.dumps(line))
    arc = ARC(tmp_path)
    (question,) = arc.splits(0)["test"]
    assert question == ("Which?\n(A) this\n(B) that", "B")
    for right in (" (B).", " B", " B because", " I think it is (B)", " A plant, so (B).", "5 m, (B)", "x. Answer: B"):
        assert arc.right(right, "B"), right
    for none in (" Both", " vitamin A", " 5 meters", " A plant makes food", ""):
        assert not any(arc.right(none, label) for label in "AB5"), none
    assert not arc.right(" A, not B", "B")
    assert arc.right(arc.reference("B"), "B")
    line["answerKey"] = "C"
    (tmp_path / "ARC-Easy-Train.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match="expected answerKey to be one of A, B, found C"):
        arc.splits(0)
    line["answerKey"] = ["B"]
    (tmp_path / "ARC-Easy-Train.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=r"Train.jsonl:1: expected texts as stem, answerKey, labels and choices"):
        arc.splits(0)
    (tmp_path / "ARC-Easy-Train.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"ARC-Easy-Train.jsonl: expected a question on each line, found none"):
        arc.splits(0)
    (tmp_path / "ARC-Easy-Train.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="expected a question with choices and answerKey"):
        arc.splits(0)


def test_competition_problems_are_read_from_their_files(tmp_path):
    math = MATH(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train: expected problems SUBJECT/NUMBER\.json from"):
        math.splits(0)
    for split in ("train", "test"):
        for number in range(4):
            path = tmp_path / split / "algebra" / f"{number}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            solution = f"So it is $\\boxed{{\\frac{{{number}}}{{8}}}}$."
            path.write_text(json.dumps({"problem": f"What is {number}/8?", "level": "Level 1", "solution": solution}))
    for name in ("._0.json", ".ipynb_checkpoints/0.json"):
        (tmp_path / "test" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "test" / name).write_text("of a Mac, or of a notebook")
        (tmp_path / "test" / "algebra" / "._0.json").write_text("of a Mac")
    splits = math.splits(0)
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [2, 2, 4]
    assert not set(splits["train"]) & set(splits["validation"])
    question = splits["test"][2]
    assert question.text == "What is 2/8?\nPut the answer in \\boxed{}."
    assert math.right(math.reference(question.answer), question.answer)
    for right in (r"It is \boxed{0.25}.", r"$\boxed{\dfrac14}$", r"\boxed{\frac{1}{4}}"):
        assert math.right(right, question.answer), right
    for wrong in (r"\boxed{4}", "It is 1/4.", r"\boxed{", r"\boxed{1/4} or \boxed{1/2}", ""):
        assert not math.right(wrong, question.answer), wrong
    (tmp_path / "test" / "algebra" / "0.json").write_text('{"problem": "x", "solution": "y"}')
    with pytest.raises(ValueError, match=r"0\.json: expected a solution with an answer in \\boxed"):
        math.splits(0)


def test_words_are_read_whole():
    assert first_word_is(" The cloud", "the")
    assert re.fullmatch(r"[a-z]+", family("lastword").splits(0)["test"][0].answer)
