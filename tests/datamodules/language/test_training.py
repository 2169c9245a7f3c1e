import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
from tokenizers.processors import TemplateProcessing

from components.language.models import PretrainedFolder
from datamodules.language.questions import family
from datamodules.language.training import LanguageDataModule, Prompts

TEMPLATE = "[{question}]{prefix}"
TURNS = "{% for turn in messages %}CONTENT{% endfor %}"


@pytest.fixture
def folder(language_folder) -> PretrainedFolder:
    return PretrainedFolder(language_folder)


class Policy(SimpleNamespace):
    """Stands for a method: it answers with what it is told to."""

    device = torch.device("cpu")

    def __init__(self, data: LanguageDataModule, answer) -> None:
        super().__init__(updates=0, total_updates=1000, data=data, answer=answer, asked=[])

    def complete(self, prompt, mask, *, most_tokens):
        texts = self.data.prompts.decode(prompt, mask)
        self.asked.append(texts)
        tokens, kept = self.data.prompts.encode_completions([self.answer(text) for text in texts])
        return tokens[:, :most_tokens], kept[:, :most_tokens]


def made(folder, answer=lambda text: " 7.", **settings) -> tuple[LanguageDataModule, Policy]:
    defaults = {
        "template": TEMPLATE,
        "most_tokens": 8,
        "batch_size": 10,
        "evaluate_every": 4,
        "validation_questions": 20,
        "test_questions": 30,
    }
    data = LanguageDataModule(folder, family("addm"), **{**defaults, **settings})
    policy = Policy(data, answer)
    data.trainer = SimpleNamespace(lightning_module=policy)
    return data, policy


def total(text: str) -> int:
    from datamodules.language.questions import numbers

    return int(sum(numbers(text)))


def chatting(language_folder, tmp_path, template: str) -> Prompts:
    """Prompts of a model with another chat template."""
    shutil.copytree(language_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(template)
    return Prompts(PretrainedFolder(tmp_path), None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TURNS.replace("CONTENT", "{{ turn.role }}"), r"leaves out what the user says, '\?'"),
        (
            TURNS.replace("CONTENT", "{% if turn.role == 'user' %}{{ turn.content }}{% endif %}"),
            "the assistant says, '!'",
        ),
        ("{% for", r"found one that fails \("),
        ("{{ raise_exception('never') }}", r"found one that fails \(never\)"),
        ("{{ messages + 1 }}", r"found one that fails \("),
    ],
)
def test_chat_templates_that_say_something_else_are_named(language_folder, tmp_path, template, message):
    with pytest.raises(ValueError, match=rf"^{tmp_path}: expected a chat template[^\n]*{message}[^\n]*"):
        chatting(language_folder, tmp_path, template).text("Why so?", "Because", [("Is it?", "No, it is not.")])


def test_chat_templates_may_trim_what_is_said(language_folder, tmp_path):
    prompts = chatting(language_folder, tmp_path, TURNS.replace("CONTENT", "{{ turn.content | trim }}|"))
    assert prompts.text(" Why? ", "Because") == "Why?|Because"


def test_the_token_that_begins_texts_begins_those_of_a_template(language_folder, tmp_path):
    shutil.copytree(language_folder, tmp_path, dirs_exist_ok=True)
    tokenizer = PretrainedFolder(tmp_path).tokenizer
    tokenizer.bos_token = tokenizer.eos_token  # a token that the model has
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 256)])
    tokenizer.save_pretrained(tmp_path)

    def ids(folder, template: str) -> list[int]:
        prompts = Prompts(PretrainedFolder(folder), template)
        return prompts.encode([prompts.text("Why?", "So", [("Is it?", "No")])])[0][0].tolist()

    expected = [256, *ids(language_folder, TEMPLATE)]
    assert ids(tmp_path, TEMPLATE) == expected
    plain = Prompts(PretrainedFolder(tmp_path), f"<end>{TEMPLATE}")
    assert plain.encode([plain.text("Why?", "So")])[0][0].tolist().count(256) == 1  # not twice


def test_prompts_survive_the_tokenizer(folder):
    prompts = Prompts(folder, TEMPLATE)
    texts = [prompts.text(question.text, "The answer is") for question in family("lastword").splits(0)["test"][:20]]
    assert texts[0].startswith("[What is the last word")
    ids, mask = prompts.encode(texts)
    assert prompts.decode(ids, mask) == texts
    assert mask[:, -1].all()  # padded on the left
    tokens, kept = prompts.encode_completions([" a.", " bcd."])
    assert tokens[0, int(kept[0].sum()) - 1] == prompts.end
    assert kept.sum(1).tolist() == [4, 6]
    assert prompts.decode(tokens, kept) == [" a.", " bcd."]
    own = Prompts(folder, None)
    assert own.text("Why?", "Because") == "[user]Why?<end>[assistant]Because"
    other = folder.tokenizer
    other.chat_template = None
    silent = SimpleNamespace(tokenizer=other, ends=folder.ends, path="somewhere")
    with pytest.raises(ValueError, match="template: expected one, for the tokenizer of somewhere has none"):
        Prompts(silent, None)
    with pytest.raises(ValueError, match=r"template='x': expected \{question\} and \{prefix\} in it"):
        Prompts(folder, "x")


def test_answers_are_rewarded(folder):
    data, policy = made(folder, lambda text: f" {total(text)}." if len(text) % 2 else " 0.", reward_wrong=-0.1)
    loader = data.train_dataloader()
    assert (len(loader), loader.stop) == (4, 4)
    batch = next(iter(loader))
    (texts,) = policy.asked
    assert batch.shape == (1, 10)
    expected = [len(text) % 2 == 1 for text in texts]
    assert batch["right"][0].tolist() == expected
    torch.testing.assert_close(batch["reward"][0], torch.where(torch.tensor(expected), 1.0, -0.1))
    assert data.prompts.decode(batch["prompt"][0], batch["prompt_mask"][0]) == texts


def test_prompts_are_completed_a_few_at_once(folder):
    data, policy = made(folder, lambda text: f" {total(text)}.", generation_batch=4)
    batch = next(iter(data.train_dataloader()))
    assert [len(texts) for texts in policy.asked] == [4, 4, 2]
    assert batch["right"].all()
    whole, _ = made(folder, lambda text: f" {total(text)}.")
    other = next(iter(whole.train_dataloader()))
    assert all(torch.equal(batch[name], other[name]) for name in other.keys())  # noqa: SIM118


def test_reference_answers_have_no_rewards(folder):
    data, policy = made(folder, completions="reference")
    (batch,) = list(data.train_dataloader())[:1]
    assert not policy.asked
    assert not {"reward", "right"} & set(batch.keys())
    prompts = data.prompts.decode(batch["prompt"][0], batch["prompt_mask"][0])
    completions = data.prompts.decode(batch["completion"][0], batch["completion_mask"][0])
    assert completions == [f" {total(text)}." for text in prompts]


def test_all_questions_come_before_any_comes_again(folder):
    data, _ = made(folder, seed=3)
    train = data.split(data.family, "train")
    rounds = len(train) // 10
    first = [question for update in range(rounds) for question in data.drawn(update)]
    second = [question for update in range(rounds, 2 * rounds) for question in data.drawn(update)]
    assert len(set(first)) == len(first) == 10 * rounds
    assert set(first) <= set(train)
    assert first != second
    assert made(folder, seed=3)[0].drawn(5) == data.drawn(5)
    assert made(folder, seed=4)[0].drawn(5) != data.drawn(5)


def test_processes_share_a_batch(folder, monkeypatch):
    data, _ = made(folder)
    whole = data.drawn(2)
    monkeypatch.setattr("datamodules.language.training.world_size", lambda: 2)
    parts = []
    for process in range(2):
        monkeypatch.setattr("datamodules.language.training.rank", lambda process=process: process)
        parts.append(data.drawn(2))
    assert [len(part) for part in parts] == [5, 5]
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    odd, _ = made(folder, batch_size=9)
    with pytest.raises(ValueError, match="batch_size=9 can't be split over 2 processes"):
        odd.train_dataloader()


def test_evaluation_asks_what_was_not_learned_from(folder):
    settings = {"others": {"x": family("lastnum"), "y": family("addm")}, "other_questions": 25}
    data, policy = made(folder, lambda text: f" {total(text)}.", **settings)
    (validation,) = data.val_dataloader()
    tests = list(data.test_dataloader())
    assert [task.name for task in tests] == ["addm", "lastnum", "validation"]
    assert [len(task.questions) for task in (validation, *tests)] == [20, 30, 25, 20]
    assert not set(data.split(data.family, "train")) & {*validation.questions, *tests[0].questions}
    result = [policy.complete(*batch, most_tokens=tests[0].most_tokens) for batch in tests[0].batches]
    metrics = tests[0].metrics(result)
    assert metrics["addm/accuracy"] == [100.0] * 30
    assert set(metrics["addm/tokens"]) <= {4.0, 5.0}
    wrong = [policy.complete(*batch, most_tokens=2) for batch in tests[0].batches]
    assert sum(tests[0].metrics(wrong)["addm/accuracy"]) < 3000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"completions": "x"}, "Unknown completions='x': expected one of sampled, reference"),
        ({"batch_size": 5000}, "batch_size=5000: expected at most the"),
    ],
)
def test_settings_that_make_no_sense_are_named(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        list(made(folder, **settings)[0].train_dataloader())


def test_there_are_no_protocols(folder):
    with pytest.raises(ValueError, match="protocol=x: expected an experiment with an environment"):
        made(folder)[0].choose_tasks(protocol="x")
