from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from components.evolution.cross_entropy_method import CrossEntropyMethod
from components.language.adapters import SingularValueAdapter
from components.language.experts import Expert
from components.language.models import PretrainedFolder
from lightning_modules.expert_adaptation import ExpertAdaptation

CATEGORIES = ["arithmetic", "list", "other"]
PROMPT = torch.arange(5).repeat(3, 1) + torch.arange(3)[:, None]
MASK = torch.ones(3, 5, dtype=torch.long)


@pytest.fixture(scope="module")
def files(language_folder, tmp_path_factory) -> dict[str, str]:
    """Three experts with random scales."""
    folder = tmp_path_factory.mktemp("experts")
    pretrained = PretrainedFolder(language_folder)
    adapter = SingularValueAdapter(pretrained.model())
    paths = {}
    for number, name in enumerate(("arithmetic", "list", "classifier")):
        generator = torch.Generator().manual_seed(number)
        scales = {key: torch.rand(len(p), generator=generator) for key, p in adapter.parameters.items()}
        paths[name] = str(folder / f"{name}.safetensors")
        Expert(scales, pretrained.checksum, name, 1.0, "nuclear").save(paths[name])
    return paths


@pytest.fixture
def made(language_folder, files):
    """Makes a method; arguments override its settings."""

    def make(strategy: str, **settings) -> ExpertAdaptation:
        torch.manual_seed(0)
        defaults = {
            "ends": [256],
            "families": 2,
            "categories": CATEGORIES,
            "language_model": PretrainedFolder(language_folder),
            "adapter": SingularValueAdapter,
            "experts": {name: files[name] for name in ("arithmetic", "list")},
            "search": partial(CrossEntropyMethod, population=10),
            "updates": {"best": 2, "search": 6}.get(strategy, 0),
            "log_every": 1,
        }
        return ExpertAdaptation(strategy=strategy, **{**defaults, **settings})

    return make


def task(kinds: list[int] | None = None) -> SimpleNamespace:
    """Three questions, in an evaluation task of the second family."""
    return SimpleNamespace(
        name="family",
        family_number=1,
        questions=[0, 1, 2],
        batch=2,
        most_tokens=4,
        prompts_of=lambda rows: (PROMPT[rows], MASK[rows]),
        kind_batches=[(PROMPT[:2], MASK[:2]), (PROMPT[2:], MASK[2:])],
        kinds=lambda tokens, mask: torch.tensor(kinds[: len(tokens)] if len(tokens) == 2 else kinds[2:]),
    )


def completions(module: ExpertAdaptation, scales=None) -> list[list[int]]:
    """What the model says to each prompt with these scales; as it is without any."""
    adapter = module.language.singular_values
    if scales is None:
        with adapter.base():
            tokens, mask = module.language.complete(PROMPT, MASK, ends=[256], most_tokens=4)
    else:
        adapter.use(scales)
        tokens, mask = module.language.complete(PROMPT, MASK, ends=[256], most_tokens=4)
    return [row[kept].tolist() for row, kept in zip(tokens, mask)]


def answered(module: ExpertAdaptation, kinds: list[int] | None = None) -> list[list[int]]:
    answers = module.evaluate(task(kinds))
    assert (answers.kinds is None) == (kinds is None)
    return [tokens[mask].tolist() for tokens, mask in answers.completions]


def test_the_base_model_answers_as_it_is(made):
    module = made("base")
    assert answered(module) == completions(module)
    assert set(module.scores) == {"family/first_pass_seconds", "family/second_pass_seconds"}


def test_a_uniform_mixture(made):
    module = made("uniform")
    one, other = (expert.scales for expert in module.experts)
    assert answered(module) == completions(module, {name: (one[name] + other[name]) / 2 for name in one})


@pytest.mark.parametrize("classifier", [False, True])
def test_each_question_is_answered_by_the_expert_for_its_kind(made, files, classifier):
    module = made("dispatch", classifier=files["classifier"] if classifier else None)
    experts = [completions(module, expert.scales) for expert in module.experts]
    base = completions(module)
    assert experts[0] != experts[1]
    assert answered(module, [1, 0, 1]) == [experts[1][0], experts[0][1], experts[1][2]]
    # No expert, and no answer that could be read: the base model.
    assert answered(module, [2, 0, -1]) == [base[0], experts[0][1], base[2]]


def test_the_classifier_asks_with_its_own_weights(made, files):
    asked = []
    for classifier in (None, files["classifier"]):
        module = made("dispatch", classifier=classifier)
        asked.append(module._classify(PROMPT, MASK)[0].tolist())
        expert = None if classifier is None else module.classifier.scales
        with torch.no_grad():
            expected = completions(module, expert)
        assert [row[: len(own)] for row, own in zip(asked[-1], expected)] == expected
    assert asked[0] != asked[1]


def judged(module: ExpertAdaptation, right: list[list[bool]], log_prob: list[list[float]]) -> TensorDict:
    batch = {"right": torch.tensor(right), "log_prob": torch.tensor(log_prob)}
    metrics = module.update(TensorDict(batch, batch_size=[len(right)]))
    module.updates += 1
    return metrics


def test_the_best_expert_is_that_of_most_right_answers_and_then_the_surest(made):
    module = made("best")
    attempts = module.attempt(0, PROMPT, MASK, 4)
    for attempt, expert in zip(attempts, module.experts, strict=True):
        found = [row[kept].tolist() for row, kept in zip(attempt.tokens, attempt.mask)]
        assert found == completions(module, expert.scales)
        assert attempt.log_prob.shape == (3,)
        assert (attempt.log_prob < 0).all()
    metrics = judged(module, [[True, False], [True, True]], [[0.0, 0.0], [-9.0, -9.0]])
    assert (metrics["population_accuracy"], metrics["best_accuracy"]) == (75, 100)
    judged(module, [[True, False], [False, True]], [[-1.0, 0.0], [-9.0, -2.0]])
    assert module.chosen.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert answered(module) == completions(module, module.experts[0].scales)
    assert module.scores["family/weight_of_arithmetic"] == [1.0]
    assert module.scores["family/weight_of_list"] == [0.0]
    module.scores |= {"a/accuracy": [100.0, 0.0], "b/accuracy": [100.0], "b/kind_accuracy": [0.0]}
    module.on_test_epoch_end()
    assert module.scores["average/accuracy"] == [75.0]


@pytest.mark.parametrize("per_matrix", [False, True])
def test_a_search_finds_the_mixture_that_is_rewarded(made, per_matrix):
    module = made("search", per_matrix=per_matrix, updates=40, search=partial(CrossEntropyMethod, population=32))
    columns = len(module.experts[0].scales) if per_matrix else 1
    assert module.chosen.shape == (2, 2 * columns)
    shots = 200
    for update in range(40):  # the more of the first expert and the less of the second, the better
        points = module.candidates(update // 20)
        assert torch.equal(points, module.searches[update // 20].points)
        weights = points.view(-1, 2, columns).mean(2)
        right = (0.5 + 0.5 * (weights[:, 0] - weights[:, 1])) * shots
        rows = torch.arange(shots) < right[:, None]
        judged(module, rows.tolist(), torch.zeros(32, shots).tolist())
    found = module.chosen.view(2, 2, columns).mean(2)
    assert (found[:, 0] > found[:, 1] + 0.4).all()
    state = module.state_dict()
    assert "chosen" in state
    assert "searches.1.mean" in state
    assert not [name for name in state if "embed" in name]


def test_one_weight_for_each_expert_mixes_all_its_matrices(made):
    module, per_matrix = made("search"), made("search", per_matrix=True)
    module._mix(torch.tensor([0.3, 0.6]))
    expected = [scaling.held for scaling in module.language.singular_values.scalings.values()]
    per_matrix._mix(torch.tensor([0.3, 0.6]).repeat_interleave(per_matrix.columns))
    found = [scaling.held for scaling in per_matrix.language.singular_values.scalings.values()]
    assert all(torch.equal(one, another) for one, another in zip(found, expected))


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        ("x", {}, "Unknown strategy='x': expected one of base"),
        ("base", {"updates": 3}, "updates=3: expected 0 with strategy=base"),
        ("best", {"updates": 3}, "updates=3: expected 2, one for each family with strategy=best"),
        ("search", {"updates": 3}, "updates=3: expected a multiple of the 2 families"),
        ("base", {"experts": {}}, "expected some of the categories arithmetic, list, other"),
        ("base", {"experts": {"x": "y"}}, "expected some of the categories arithmetic, list, other"),
    ],
)
def test_settings_that_make_no_sense_are_named(made, strategy, settings, message):
    with pytest.raises(ValueError, match=message):
        made(strategy, **settings)


def test_experts_of_other_matrices_are_named(made, files):
    with pytest.raises(ValueError, match="adapts 12 matrices, expected the 8 that"):
        made("base", adapter=partial(SingularValueAdapter, modules="attention"))
    with pytest.raises(FileNotFoundError, match="expected the file of an expert vector"):
        made("base", experts={"list": files["list"] + ".not"})
