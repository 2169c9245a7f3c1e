import json

import pytest
import torch
from safetensors.torch import save_file

from components.language.experts import FORMAT, Expert, mixed


def expert(seed: int = 0, task: str = "sums") -> Expert:
    generator = torch.Generator().manual_seed(seed)
    scales = {name: torch.rand(size, generator=generator) for name, size in (("a.up", 5), ("b.up", 3))}
    return Expert(scales, "base", task, 1.0, "nuclear")


@pytest.mark.parametrize("largest", [1.5, 2, None])
def test_experts_are_saved_and_loaded(largest, tmp_path):
    Expert(expert().scales, "base", "sums", largest, "nuclear").save(tmp_path / "folder" / "sums.safetensors")
    found = Expert.load(tmp_path / "folder" / "sums.safetensors", "base")
    assert (found.base, found.task, found.largest, found.rescale) == ("base", "sums", largest, "nuclear")
    assert list(found.scales) == ["a.up", "b.up"]
    assert all(torch.equal(found.scales[name], z) for name, z in expert().scales.items())
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["sums.safetensors"]


def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="expected the file of an expert vector, found none"):
        Expert.load(path, "base")
    expert().save(path)
    assert Expert.load(path).base == "base"
    with pytest.raises(ValueError, match="expected an expert of the model other, found one of the model base"):
        Expert.load(path, "other")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="found a damaged one"):
        Expert.load(path, "base")
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="found another kind of file"):
        Expert.load(path, "base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": None}, r"\.base: expected a text, found nothing"),
        ({"largest": "1"}, r"\.largest: expected a number or nothing, found a text"),
        ({"scales": {"a.up": torch.zeros(2, 2)}}, r"in a.up, found torch.float32 \[2, 2\]"),
        ({"scales": {"a.up": torch.zeros(2, dtype=torch.int64)}}, r"in a.up, found torch.int64 \[2\]"),
        ({"scales": {"a.up": torch.tensor([1.0, torch.nan])}}, r"expected finite numbers of single precision in a.up"),
    ],
)
def test_what_an_expert_is_made_of_is_checked(change, message, tmp_path):
    about = {"base": "base", "task": "sums", "largest": 1.0, "rescale": "nuclear", **change}
    save_file(about.pop("scales", {"a.up": torch.ones(2)}), tmp_path / "x.safetensors", {FORMAT: json.dumps(about)})
    with pytest.raises(ValueError, match=rf"x.safetensors: .*{message}"):
        Expert.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("per_matrix", [False, True])
def test_mixtures(per_matrix):
    experts = [expert(seed) for seed in range(3)]

    def weights(*values: float) -> torch.Tensor:
        found = torch.tensor(values)
        return found[:, None].repeat(1, 2) if per_matrix else found

    for index, one in enumerate(experts):
        alone = mixed(experts, weights(*(float(index == place) for place in range(3))))
        assert all(torch.equal(alone[name], z) for name, z in one.scales.items())
    same = mixed([experts[0]] * 3, weights(0.2, 0.3, 0.5))
    for name, z in experts[0].scales.items():
        torch.testing.assert_close(same[name], z)
    both = mixed(experts, weights(0.5, 0.25, 0.0))
    for name in both:
        expected = 0.5 * experts[0].scales[name] + 0.25 * experts[1].scales[name]
        torch.testing.assert_close(both[name], expected)


def test_without_any_weight_a_matrix_is_the_base_models():
    found = mixed([expert(seed) for seed in range(2)], torch.tensor([[0.0, 0.5], [0.0, 0.25]]))
    assert torch.equal(found["a.up"], torch.ones_like(found["a.up"]))
    assert not torch.equal(found["b.up"], torch.ones_like(found["b.up"]))


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3), (0,)])
def test_weights_of_another_shape_are_named(shape):
    experts = [expert(seed) for seed in range(2)]
    with pytest.raises(ValueError, match=r"weights: expected the shape \[2\] or \[2, 2\], found"):
        mixed(experts, torch.rand(shape))


def test_each_matrix_can_have_weights_of_its_own():
    experts = [expert(seed) for seed in range(2)]
    found = mixed(experts, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(found["a.up"], experts[0].scales["a.up"])
    assert torch.equal(found["b.up"], experts[1].scales["b.up"])


def test_raw_numbers_are_those_before_the_sigmoid():
    raw = mixed([expert()], torch.ones(1), space="raw")
    for name, z in expert().scales.items():
        torch.testing.assert_close(raw[name].sigmoid(), z)
    with pytest.raises(ValueError, match="Unknown mix_space='x'"):
        mixed([expert()], torch.ones(1), space="x")


def test_experts_of_other_matrices_are_not_mixed():
    other = Expert({"a.up": torch.ones(5)}, "base", "words", 1.0, "nuclear")
    with pytest.raises(ValueError, match="The expert of words adapts other matrices than that of sums"):
        mixed([expert(), other], torch.ones(2))


def test_a_shuffled_expert_has_the_same_numbers_elsewhere():
    one, another = expert(), expert().shuffled(3)
    for name, z in one.scales.items():
        assert torch.equal(another.scales[name].sort().values, z.sort().values)
    assert not torch.equal(another.scales["a.up"], one.scales["a.up"])
    assert torch.equal(expert().shuffled(3).scales["a.up"], another.scales["a.up"])
