from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from components.language.adapters import FullAdapter, LowRankAdapter, SingularValueAdapter
from components.language.models import PretrainedFolder, completion_log_probs
from lightning_modules.expert_training import ExpertTraining

ADAPTERS = {"svf": SingularValueAdapter, "lora": LowRankAdapter, "full": FullAdapter}


@pytest.fixture
def made(language_folder):
    """Makes a method on the tiny language model; arguments override its settings."""

    def make(kind: str | None = "svf", lr: float = 1e-2, **settings) -> ExpertTraining:
        torch.manual_seed(0)
        defaults = {
            "language_model": PretrainedFolder(language_folder),
            "adapter": None if kind is None else partial(ADAPTERS[kind], modules="both"),
            "optimizer": partial(torch.optim.Adam, lr=lr),
            "updates": 10,
            "log_every": 1,
        }
        return ExpertTraining(ends=[256], **{**defaults, **settings})

    return make


def batch(rows: int = 6, reward: torch.Tensor | None = None, seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 6, (rows, 1), generator=generator)
    ended = torch.randint(1, 5, (rows, 1), generator=generator)
    completion = torch.randint(256, (rows, 5), generator=generator)
    completion.scatter_(1, ended, 256)
    reward = torch.where(torch.arange(rows) % 2 == 0, 1.0, -1.0) if reward is None else reward
    return TensorDict(
        {
            "prompt": torch.randint(256, (rows, 5), generator=generator),
            "prompt_mask": torch.arange(5) >= 5 - lengths,
            "completion": completion,
            "completion_mask": torch.arange(5) <= ended,
            "right": reward > 0,
            "reward": reward,
        },
        batch_size=[rows],
    )


def gradients(module: ExpertTraining, data: TensorDict) -> list[torch.Tensor]:
    """Of an update, before it is clipped."""
    module.max_norm = None
    module.update(data)
    return [parameter.grad.clone() for parameter in module.language.adapter.parameters.values()]


def token_sums(module: ExpertTraining, data: TensorDict, mask: torch.Tensor) -> torch.Tensor:
    """Log-probability of each completion [B], as one differentiable graph."""
    for scaling in getattr(module.language.adapter, "scalings", {}).values():
        scaling.held = None
    sequences = [data[name] for name in ("prompt", "prompt_mask", "completion", "completion_mask")]
    log_probs = completion_log_probs(module.language.model, *sequences)
    picked = log_probs.gather(-1, data["completion"][..., None])[..., 0]
    return (picked * mask).sum(1)


def close(found, expected) -> None:
    for one, another in zip(found, expected, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("score_end", [True, False])
def test_gradient_is_that_of_rewarded_likelihood(made, kind, score_end):
    data = batch()
    module = made(kind, score_end=score_end)
    mask = data["completion_mask"] & (torch.tensor(score_end) | (data["completion"] != 256))
    loss = -(data["reward"] * token_sums(module, data, mask)).mean()
    expected = torch.autograd.grad(loss, list(module.language.adapter.parameters.values()))
    assert float(sum(each.abs().sum() for each in expected)) > 0
    close(gradients(module, data), expected)


def test_rewards_of_one_are_next_token_prediction_and_of_minus_one_its_opposite(made):
    data = batch(reward=torch.ones(6))
    module = made()
    loss = -token_sums(module, data, data["completion_mask"]).mean()
    likelihood = torch.autograd.grad(loss, list(module.language.adapter.parameters.values()))
    close(gradients(module, data), likelihood)
    close(gradients(made(), batch(reward=-torch.ones(6))), [-each for each in likelihood])


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_passes_of_few_sequences_add_up(made, kl):
    data = batch()
    settings = {"kl_coefficient": kl, "baseline": "leave_one_out"}
    for rows in (1, 4):
        close(gradients(made(micro_batch=rows, **settings), data), gradients(made(**settings), data))


def test_what_lies_in_padding_changes_nothing(made):
    data = batch()
    other = data.clone()
    other["prompt"] = torch.where(data["prompt_mask"], data["prompt"], 3)
    other["completion"] = torch.where(data["completion_mask"], data["completion"], 4)
    close(gradients(made(kl_coefficient=0.1), other), gradients(made(kl_coefficient=0.1), data))


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("direction", ["reference_to_policy", "policy_to_reference"])
def test_divergence_from_the_base_model(made, kind, direction):
    module = made(kind, kl_coefficient=1.0, kl_direction=direction)
    data = batch()
    zero = torch.zeros(6)
    if kind == "svf":  # nor is it the base model at first
        with torch.no_grad():
            for parameter in module.language.adapter.parameters.values():
                parameter.fill_(0.1)
    module.language.refresh()
    with torch.no_grad():
        assert module.losses(data, zero)[1].abs() < 1e-5
        assert not module.losses(data, zero)[0]
    assert all(each.abs().max() < 1e-4 for each in gradients(module, data.set("reward", zero)))
    with torch.no_grad():
        for parameter in module.language.adapter.parameters.values():
            parameter.add_((1.0 if kind == "svf" else 0.05) * torch.randn_like(parameter))
        module.language.refresh()
        found = module.losses(data, zero)[1]
        sequences = [data[name] for name in ("prompt", "prompt_mask", "completion", "completion_mask")]
        adapted = completion_log_probs(module.language.model, *sequences).exp()
        with module.language.adapter.base():
            base = completion_log_probs(module.language.model, *sequences).exp()
        p, q = (base, adapted) if direction == "reference_to_policy" else (adapted, base)
        expected = ((p * (p / q).log()).sum(-1) * data["completion_mask"]).sum()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert found > 0.01


def test_reference_answers_are_learned_whatever_becomes_of_rewards(made):
    data = batch(reward=torch.ones(6))
    expected = gradients(made(), data)
    reference = data.exclude("reward", "right")
    close(gradients(made(baseline="leave_one_out", normalise_rewards=True, clip_rewards=0.1), reference), expected)


def test_the_policy_that_is_sampled_is_the_one_that_is_scored(made):
    """At another temperature than one."""
    data = batch()
    module = made(temperature=0.5)
    sequences = [data[name] for name in ("prompt", "prompt_mask", "completion", "completion_mask")]
    for scaling in module.language.adapter.scalings.values():
        scaling.held = None
    log_probs = (completion_log_probs(module.language.model, *sequences) / 0.5).log_softmax(-1)
    picked = log_probs.gather(-1, data["completion"][..., None])[..., 0]
    loss = -(data["reward"] * (picked * data["completion_mask"]).sum(1)).mean()
    expected = torch.autograd.grad(loss, list(module.language.adapter.parameters.values()))
    close(gradients(module, data), expected)
    asked = []
    module.language.complete = lambda *_, temperature, **__: asked.append(temperature)
    module.complete(data["prompt"], data["prompt_mask"], most_tokens=3)
    assert asked == [0.5]


def test_a_clipped_step_does_not_depend_on_the_size_of_rewards(made):
    """The first step of Adam would not anyway; the second does, unless gradients are clipped."""
    moved = {}
    for max_norm in (1e-3, None):
        modules = [made(max_norm=max_norm), made(max_norm=max_norm)]
        for module, scale in zip(modules, (1.0, 10.0)):
            module.update(batch())
            module.update(batch(reward=scale * torch.tensor([1.0, -1.0] * 3), seed=1))
        pairs = zip(*(module.language.adapter.parameters.values() for module in modules))
        moved[max_norm] = max(float((one - another).detach().abs().max()) for one, another in pairs)
    assert moved[1e-3] < 1e-6
    assert moved[None] > 1e-4


def test_equal_rewards_beside_a_baseline_teach_nothing(made):
    module = made(baseline="batch_mean")
    assert not any(each.any() for each in gradients(module, batch(reward=-torch.ones(6))))


@pytest.mark.parametrize(("kind", "lr"), [("svf", 0.1), ("full", 0.01)])
def test_it_learns_what_is_rewarded(made, kind, lr):
    """A bandit: tokens below 128 are right, about half of them at first."""
    module = made(kind, lr, baseline="leave_one_out", max_norm=1e-3, temperature=1.0)
    prompt, mask = torch.arange(5).repeat(64, 1), torch.ones(64, 5, dtype=torch.long)
    shares = []
    for _ in range(40):
        tokens, kept = module.complete(prompt, mask, most_tokens=1)
        right = tokens[:, 0] < 128
        shares.append(right.float().mean().item())
        data = {"prompt": prompt, "prompt_mask": mask.bool(), "completion": tokens, "completion_mask": kept}
        reward = torch.where(right, 1.0, -1.0)
        module.update(TensorDict({**data, "right": right, "reward": reward}, batch_size=[64]))
    assert shares[0] < 0.7
    assert sum(shares[-5:]) / 5 > 0.9, shares


@pytest.mark.parametrize("keep_last", [False, True])
def test_the_best_of_validation_is_kept(made, keep_last):
    module = made(keep_last=keep_last)
    parameters = list(module.language.adapter.parameters.values())
    kept = []
    for score in (30.0, 50.0, 50.0, 40.0):
        with torch.no_grad():
            for parameter in parameters:
                parameter += 0.1
        module.scores = {"validation/accuracy": [score, score]}
        module._trainer = SimpleNamespace(loggers=[])
        module.on_validation_epoch_end()
        kept.append([parameter.detach().clone() for parameter in parameters])
    assert module.best_validation == 50
    module.restore_best()
    assert all(torch.equal(one, another) for one, another in zip(parameters, kept[2 if keep_last else 1]))


def test_state_is_what_is_trained_and_nothing_of_the_model(made):
    module = made()
    names = list(module.state_dict())
    assert sum("original0" in name for name in names) == 4 * 5
    assert not [name for name in names if "original0" not in name and not name.startswith("best_")]
    module.update(batch())
    other = made()
    other.load_state_dict(module.state_dict())
    data = batch(seed=1)
    close(gradients(other, data), gradients(module, data))
    assert not list(made(None, updates=0).state_dict())[1:]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({name: value for name, value in module.state_dict().items() if "layers.3" not in name})


def test_an_expert_goes_on_where_it_was(made, tmp_path):
    module = made()
    module.update(batch())
    module.language.expert("sums").save(tmp_path / "expert.safetensors")
    other = made(expert=str(tmp_path / "expert.safetensors"))
    for name, p in module.language.adapter.parameters.items():
        torch.testing.assert_close(other.language.adapter.parameters[name], p, rtol=0, atol=1e-5)
    shuffled = made(expert=str(tmp_path / "expert.safetensors"), shuffle=0)
    for name, p in other.language.adapter.parameters.items():
        moved = shuffled.language.adapter.parameters[name]
        assert torch.equal(moved.sort().values, p.sort().values)
        assert not torch.equal(moved, p)
    with pytest.raises(ValueError, match="adapts 20 matrices, expected the 12 that"):
        made(adapter=SingularValueAdapter, expert=str(tmp_path / "expert.safetensors"))
    for settings, named in (
        ({"rescale": "none", "parametrization": "direct"}, "rescale=none and parametrization=direct"),
        ({"parametrization": "direct"}, "rescale=nuclear and parametrization=direct"),
    ):
        adapter = partial(SingularValueAdapter, modules="both", **settings)
        with pytest.raises(ValueError, match=f"sigmoid up to 1, expected adapter.{named}"):
            made(adapter=adapter, expert=str(tmp_path / "expert.safetensors"))
    with pytest.raises(ValueError, match="adapter: expected svf"):
        made("lora", expert=str(tmp_path / "expert.safetensors"))


def test_another_run_gives_its_parameters_and_not_what_was_best_in_it(made):
    module = made()
    module.best_validation.fill_(90.0)  # of other questions: nothing would ever be kept again
    module.update(batch())
    checkpoint = {"state_dict": module.state_dict(), "learning_method": {"base": module.language.base_checksum}}
    other = made()
    assert other.begin_from(checkpoint) == {"taken": ["language"], "left": [], "unused": []}
    assert other.best_validation == -torch.inf
    for name, p in module.language.adapter.parameters.items():
        assert torch.equal(other.language.adapter.parameters[name], p)
    with pytest.raises(ValueError, match=f"adapts the model abc, expected {module.language.base_checksum}"):
        other.begin_from({**checkpoint, "learning_method": {"base": "abc"}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": None}, "updates=10: expected 0 where adapter is null"),
        ({"baseline": "x"}, "Unknown baseline='x'"),
        ({"kl_direction": "x"}, "Unknown kl_direction='x'"),
    ],
)
def test_settings_that_make_no_sense_are_named(made, settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)
