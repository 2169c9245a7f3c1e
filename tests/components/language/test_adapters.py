import copy
from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from transformers import LlamaConfig, LlamaForCausalLM

from components.control.actors import DeterministicActor
from components.language.adapters import FullAdapter, LowRankAdapter, SingularValueAdapter, select_linears
from components.networks.ensemble import EnsembleMLP, EnsembleResidualMLP

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30,
}
KINDS = {
    "svf": SingularValueAdapter,
    "svf_factorised": lambda model: SingularValueAdapter(model, factorised=True),
    "lora": LowRankAdapter,
    "dora": lambda model: LowRankAdapter(model, kind="dora"),
    "ia3": lambda model: LowRankAdapter(model, kind="ia3"),
    "full": FullAdapter,
}
IDS = torch.randint(30, (3, 7), generator=torch.Generator().manual_seed(0))


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY)).eval()


def on_meta(sizes: dict) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes))


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    return model(input_ids=IDS).logits


def moved(adapter) -> None:
    """Another point of the parameters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter += torch.randn_like(parameter)


@pytest.mark.parametrize(
    ("sizes", "modules", "expected"),
    [
        (LLAMA_3_8B, "mlp", 393_216),
        (LLAMA_3_8B, "attention", 163_840),
        (LLAMA_3_8B, "both", 557_056),
        (SMOLLM2_135M, "mlp", 51_840),
        (SMOLLM2_135M, "attention", 23_040),
        (SMOLLM2_135M, ["q_proj", "k_proj", "v_proj", "o_proj"], 46_080),
    ],
)
def test_numbers_that_singular_values_train(sizes, modules, expected):
    assert SingularValueAdapter(on_meta(sizes), modules=modules).count() == expected


@pytest.mark.parametrize(
    ("sizes", "modules", "expected"),
    [
        (LLAMA_3_8B, "attention", 6_815_744),
        (LLAMA_3_8B, "both", 35_127_296),
        (SMOLLM2_135M, "attention", 921_600),
    ],
)
def test_numbers_that_low_rank_updates_train(sizes, modules, expected):
    model = on_meta(sizes)
    assert LowRankAdapter(model, modules=modules).count() == expected


def test_the_upper_half_of_the_blocks():
    names = list(select_linears(tiny(), "mlp", "upper_half"))
    assert names == [f"model.layers.{block}.mlp.{part}_proj" for block in (2, 3) for part in ("gate", "up", "down")]
    assert SingularValueAdapter(on_meta(SMOLLM2_135M), layers="upper_half").count() == 25_920


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_model_is_there_to_the_bit(kind):
    model = tiny()
    before = logits(model)
    adapter = KINDS[kind](model)
    adapter.refresh()
    begun = logits(model)
    if kind in ("lora", "full"):
        assert torch.equal(begun, before)
    else:
        torch.testing.assert_close(begun, before, rtol=1e-2, atol=1e-2)
    moved(adapter)
    adapter.refresh()
    adapted = logits(model)
    assert (adapted - before).abs().max() > 1e-3
    with adapter.base():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), adapted)
    if kind.startswith("svf"):
        assert torch.equal(logits(adapter.unload()), before)
        assert not any("parametrizations" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_add_up_over_passes_and_are_those_of_one_graph(kind):
    adapter = KINDS[kind](tiny())
    moved(adapter)
    adapter.refresh()
    leaves = adapter.leaves()
    parts = [torch.autograd.grad(logits(adapter.model)[row].square().mean() / 3, leaves) for row in range(3)]
    found = adapter.gradients([sum(gradients) for gradients in zip(*parts)])
    for scaling in getattr(adapter, "scalings", {}).values():
        scaling.held = None
    expected = torch.autograd.grad(logits(adapter.model).square().mean(), list(adapter.parameters.values()))
    assert [each.shape for each in found] == [each.shape for each in adapter.parameters.values()]
    for one, another in zip(found, expected, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_in_single_precision_whatever_the_model_is(kind):
    """Half of it would lose most steps of training."""
    model = tiny().bfloat16()
    before = logits(model)
    adapter = KINDS[kind](model)
    assert {parameter.dtype for parameter in adapter.parameters.values()} == {torch.float32}
    adapter.refresh()
    out = logits(model)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, before, rtol=0.1, atol=0.1)
    gradients = adapter.gradients(torch.autograd.grad(out.float().square().mean(), adapter.leaves()))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    with adapter.base():
        assert torch.equal(logits(model), before)


def test_weights_are_composed_when_parameters_have_moved_and_only_then():
    adapter = SingularValueAdapter(tiny())
    adapter.refresh()
    first = adapter.leaves()
    adapter.refresh()
    assert all(one is another for one, another in zip(first, adapter.leaves()))
    optimizer = torch.optim.Adam(adapter.parameters.values(), 0.1, foreach=True)
    for parameter in adapter.parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    adapter.refresh()
    assert not any(torch.equal(one, another) for one, another in zip(first, adapter.leaves()))


@pytest.mark.parametrize("factorised", [False, True])
def test_other_scales_can_be_used_for_a_while(factorised):
    adapter = SingularValueAdapter(tiny(), factorised=factorised)
    adapter.refresh()
    before = logits(adapter.model)
    generator = torch.Generator().manual_seed(0)
    scales = {name: torch.rand(len(p), generator=generator) for name, p in adapter.parameters.items()}
    adapter.use(scales)
    mixed = logits(adapter.model)
    assert (mixed - before).abs().max() > 1e-3
    adapter.use({name: 2 * z for name, z in scales.items()})
    torch.testing.assert_close(logits(adapter.model), mixed, rtol=1e-4, atol=1e-5)
    adapter.refresh()
    assert torch.equal(logits(adapter.model), before)


def test_low_rank_updates_have_low_rank_and_scales_of_singular_values_do_not():
    adapters = [LowRankAdapter(tiny(), modules="attention", rank=2), SingularValueAdapter(tiny(), modules="attention")]
    ranks = []
    for adapter in adapters:
        moved(adapter)
        layer = adapter.model.model.layers[0].self_attn.q_proj
        ids = torch.eye(16)
        with adapter.base():
            before = layer(ids)
        adapter.refresh()
        ranks.append(int(torch.linalg.matrix_rank(layer(ids) - before, rtol=1e-4)))
    assert ranks == [2, 16]


ANY = {
    "mlp": lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)),
    "ensemble": lambda: EnsembleMLP(5, 3, members=2, hidden_dim=16, layers=1, last_gain=1.0),
    "actor": lambda: DeterministicActor(5, 3, partial(EnsembleMLP, hidden_dim=16, layers=1, last_gain=1.0)),
    "modern": lambda: EnsembleResidualMLP(5, 3, members=2, hidden_dim=16, last_gain=1.0),
}


@pytest.mark.parametrize("kind", ANY)
def test_any_module_with_linear_layers_learns_by_its_singular_values(kind):
    """Back to what it did before its singular values were changed, by a few numbers."""
    torch.manual_seed(0)
    model = ANY[kind]()
    x = torch.randn(64, 5)
    call = model.act if kind == "actor" else model
    wanted = call(x).detach()
    adapter = SingularValueAdapter(model, modules="linear")
    members = 2 if kind in ("ensemble", "modern") else 1
    assert adapter.count() == members * (5 + 3)  # the inner layers of "modern" keep their own spectral norm
    moved(adapter)
    before = (call(x) - wanted).square().mean().item()
    optimizer = torch.optim.Adam(adapter.parameters.values(), lr=0.1)
    for _ in range(100):
        loss = (call(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01 * before
    assert torch.equal(adapter.unload()(x) if kind != "actor" else adapter.unload().act(x), wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SingularValueAdapter(ANY["mlp"]()), "found none; modules=linear takes all it has"),
        (lambda: SingularValueAdapter(ANY["ensemble"](), modules="linear", factorised=True), "found none"),
        (lambda: SingularValueAdapter(tiny(), modules="x"), "Unknown modules='x'"),
        (lambda: SingularValueAdapter(tiny(), layers="x"), "Unknown layers='x'"),
        (lambda: SingularValueAdapter(tiny(), modules=["x"]), "expected linear layers of such names"),
        (lambda: SingularValueAdapter(tiny(), rescale="none"), "rescale=none: expected parametrization=direct"),
        (lambda: LowRankAdapter(tiny(), kind="x"), "Unknown kind='x'"),
    ],
)
def test_settings_that_make_no_sense_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("factorised", [False, True])
def test_a_module_is_adapted_once_and_again_when_it_was_unloaded(factorised):
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    adapter = SingularValueAdapter(net, modules="linear", factorised=factorised)
    with pytest.raises(ValueError, match=r"^0: expected weights that are not adapted yet, found some that are"):
        SingularValueAdapter(net, modules="linear")
    adapter.unload()
    assert SingularValueAdapter(net, modules="linear").count() == 5 + 2


def test_what_was_learned_is_used_by_another_adapter_of_the_same_weights(tmp_path):
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    first, second = (SingularValueAdapter(copy.deepcopy(net), modules="linear") for _ in range(2))
    with torch.no_grad():
        for parameter in first.parameters.values():
            parameter.add_(torch.randn_like(parameter))
    first.refresh()
    torch.save(first.scales(), tmp_path / "scales")
    second.use(torch.load(tmp_path / "scales", weights_only=True))
    x = torch.randn(3, 5)
    torch.testing.assert_close(second.model(x), first.model(x))
    assert not torch.allclose(first.model(x), net(x))
