from types import SimpleNamespace

import pytest
import torch

from components.language.models import PretrainedFolder
from datamodules.language.adaptation import AdaptationDataModule
from datamodules.language.questions import Categories, family

SUMS, LISTS = family("add20"), family("lastnum")


def made(language_folder, **settings) -> AdaptationDataModule:
    defaults = {
        "categories": Categories({"arithmetic": family("addm"), "list": family("lastword")}),
        "kinds": {"add20": "arithmetic", "lastnum": "list"},
        "template": "[{question}]{prefix}",
        "turn_end": "|",
        "most_tokens": 8,
        "shots": 6,
        "test_questions": 10,
    }
    return AdaptationDataModule(PretrainedFolder(language_folder), {"a": SUMS, "b": LISTS}, **{**defaults, **settings})


def said(data: AdaptationDataModule, texts: list[str]) -> SimpleNamespace:
    """Completions as a method gives them."""
    tokens, mask = data.prompts.encode_completions(texts)
    return SimpleNamespace(tokens=tokens, mask=mask, log_prob=torch.arange(len(texts)).float())


def test_candidates_answer_shots_and_are_judged(language_folder):
    data = made(language_folder)
    asked = []

    def attempt(number, prompt, mask, most_tokens):
        asked.append((number, data.prompts.decode(prompt, mask), most_tokens))
        answers = [data.families[number].reference(shot.answer) for shot in data.drawn(number)[0]]
        return [said(data, answers), said(data, [" 0.", *answers[1:]])]

    module = SimpleNamespace(updates=1, total_updates=4, rounds=2, attempt=attempt, device=torch.device("cpu"))
    data.trainer = SimpleNamespace(lightning_module=module)
    batches = list(data.train_dataloader())
    assert [number for number, *_ in asked] == [0, 1, 1]
    assert asked[0][1] == [f"[{shot.text}]The answer is" for shot in data.drawn(0)[0]]
    assert batches[0].shape == (1, 2)
    assert batches[0]["right"][0].tolist() == [[True] * 6, [False] + [True] * 5]
    assert batches[0]["log_prob"][0, 0].tolist() == list(range(6))


def test_shots_and_tests_share_nothing(language_folder):
    data = made(language_folder)
    tasks = list(data.test_dataloader())
    assert [task.name for task in tasks] == ["add20", "lastnum"]
    assert [task.family_number for task in tasks] == [0, 1]
    for number, task in enumerate(tasks):
        assert not set(data.drawn(number)[0]) & set(task.questions)
        assert len(task.questions) == 10
    assert not list(data.val_dataloader())
    assert data.spec == {"ends": [256], "families": 2, "categories": ["arithmetic", "list"]}


def test_shots_are_others_with_another_seed_and_tests_are_not(language_folder):
    one, again, other = (made(language_folder, seed=seed) for seed in (0, 0, 1))
    assert one.drawn(0) == again.drawn(0)
    assert set(one.drawn(0)[0]) != set(other.drawn(0)[0])
    assert one.drawn(0)[1] == other.drawn(0)[1]


def test_a_process_without_candidates_has_nothing_to_say(language_folder):
    data = made(language_folder)
    module = SimpleNamespace(updates=0, total_updates=1, rounds=1, attempt=lambda *_: [], device=torch.device("cpu"))
    data.trainer = SimpleNamespace(lightning_module=module)
    (batch,) = data.train_dataloader()
    assert batch["right"].shape == (1, 0, 6)


def test_examples_are_turns_where_the_tokenizer_has_a_template(language_folder):
    data = made(language_folder, in_context=1, template=None)
    task = next(iter(data.test_dataloader()))
    shot, question = data.drawn(0)[0][0], task.questions[0]
    assert task.prompts.decode(*task.prompts_of([0])) == [
        f"[user]{shot.text}[assistant]The answer is {shot.answer}.[user]{question.text}[assistant]The answer is"
    ]


def test_examples_stand_before_the_question(language_folder):
    plain, with_examples = (next(iter(made(language_folder, in_context=n).test_dataloader())) for n in (0, 2))
    texts = [task.prompts.decode(*task.prompts_of([3]))[0] for task in (plain, with_examples)]
    shots = made(language_folder).drawn(0)[0][:2]
    before = "".join(f"[{shot.text}]The answer is {shot.answer}.|" for shot in shots)
    assert texts == [f"[{plain.questions[3].text}]The answer is", before + texts[0]]


def test_questions_are_sorted(language_folder):
    data = made(language_folder, generation_batch=4)
    _, task = data.test_dataloader()
    batches = list(task.kind_batches)
    assert [len(prompt) for prompt, _ in batches] == [4, 4, 2]
    first = data.prompts.decode(*batches[0])[0]
    asked = "Classify the question into one of these categories: arithmetic, list. Question: "
    assert first == f"[{asked}{task.questions[0].text}]The category is"
    kinds = task.kinds(*data.prompts.encode_completions([" list.", " Arithmetic", " other"]))
    assert kinds.tolist() == [1, 0, -1]


def test_answers_and_kinds_are_scored(language_folder):
    data = made(language_folder)
    _, task = data.test_dataloader()
    texts = [task.family.reference(question.answer) for question in task.questions[:9]] + [" none"]
    tokens, mask = data.prompts.encode_completions(texts)
    completions = [(row[None], kept[None]) for row, kept in zip(tokens, mask)]
    kinds = torch.tensor([1] * 7 + [0] * 2 + [-1])
    found = task.metrics(SimpleNamespace(completions=completions, kinds=kinds))
    shares = {name: sum(values) / len(values) for name, values in found.items()}
    assert shares == pytest.approx(
        {
            "lastnum/accuracy": 90.0,
            "lastnum/kind_accuracy": 70.0,
            "lastnum/taken_for_arithmetic": 20.0,
            "lastnum/taken_for_list": 70.0,
            "lastnum/taken_for_none": 10.0,
        }
    )
    assert list(task.metrics(SimpleNamespace(completions=completions, kinds=None))) == ["lastnum/accuracy"]


def test_settings_that_make_no_sense_are_named(language_folder):
    with pytest.raises(ValueError, match="in_context=7: expected at most shots=6"):
        made(language_folder, in_context=7)
    with pytest.raises(ValueError, match="shots=5000: expected at most the"):
        made(language_folder, shots=5000).drawn(0)
    with pytest.raises(ValueError, match=r"kinds\.lastnum=None: expected one of the categories arithmetic, list"):
        made(language_folder, kinds={"add20": "arithmetic"})
    with pytest.raises(ValueError, match="reward=x: expected an experiment with an environment"):
        made(language_folder).choose_tasks(reward="x")
