import copy

import pytest
import torch
from torch import nn

from components.networks.ensemble import (
    EnsembleLayerNorm,
    EnsembleLinear,
    EnsembleMLP,
    EnsembleNormalisedLinear,
    EnsembleResidualMLP,
    EnsembleSpectralLinear,
)


def test_members_equal_separate_layers():
    ensemble, norm = EnsembleLinear(3, 4, 5), EnsembleLayerNorm(3, 5)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    x = torch.randn(7, 4)
    result = norm(ensemble(x))
    assert result.shape == (3, 7, 5)
    for p in range(3):
        linear = x @ ensemble.weight[p] + ensemble.bias[p]
        separate = nn.functional.layer_norm(linear, (5,), norm.weight[p, 0], norm.bias[p, 0])
        torch.testing.assert_close(result[p], separate)
    torch.testing.assert_close(ensemble(x.expand(3, 7, 4)), ensemble(x))


@pytest.mark.parametrize("members", [1, 3])
def test_spectral_norms_become_one_and_gradients_do_not_pass_through_them(members):
    torch.manual_seed(0)
    layer, x = EnsembleSpectralLinear(members, 12, 8, gain=3.0), torch.randn(5, 12)
    for _ in range(300):
        layer(x)
    weight = layer.weight.detach().clone()
    torch.testing.assert_close(torch.linalg.matrix_norm(weight, 2), torch.ones(members), rtol=0, atol=1e-3)
    layer.eval()
    layer(x).sum().backward()
    assert torch.equal(layer.weight, weight)  # evaluation changes nothing
    expected = x.sum(0)[None, :, None].expand(members, 12, 8)  # that of x W, without a norm
    torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("network", [EnsembleMLP, EnsembleResidualMLP])
def test_members_do_not_see_each_other(network):
    torch.manual_seed(0)
    ensemble, x = network(4, 2, members=3, hidden_dim=8).eval(), torch.randn(6, 4)
    before = ensemble(x).detach()
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter[1] += 1.0
    after = ensemble(x).detach()
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1], before[1])


def test_a_residual_block_is_its_formula():
    torch.manual_seed(0)
    network, x = EnsembleResidualMLP(4, 2, members=2, hidden_dim=8).eval(), torch.randn(6, 4)
    first, _, block, last = network
    norm, one, _, two = block.branch
    for p in range(2):
        hidden = (x @ first.weight[p] + first.bias[p]).relu()
        normalised = nn.functional.layer_norm(hidden, (8,), norm.weight[p, 0], norm.bias[p, 0], eps=1e-3)
        branch = (normalised @ one.weight[p] + one.bias[p]).relu() @ two.weight[p] + two.bias[p]
        torch.testing.assert_close(network(x)[p], (hidden + branch) @ last.weight[p] + last.bias[p])
    assert network(x).abs().max() < 0.2  # the last layer starts small


def test_a_normalised_layer_is_that_of_torch_for_each_member():
    torch.manual_seed(0)
    layer, x = EnsembleNormalisedLinear(3, 4, 6, gain=2.0), torch.randn(5, 4)
    with torch.no_grad():
        layer.weight += torch.randn_like(layer.weight)
    for member in range(3):
        plain = nn.Linear(4, 6)
        plain.weight.data, plain.bias.data = layer.weight.data[member].T.clone(), layer.bias.data[member, 0].clone()
        theirs = nn.utils.parametrizations.spectral_norm(plain)
        norm = theirs.parametrizations.weight[0]
        norm._u.copy_(layer.right[member, 0])
        norm._v.copy_(layer.left[member, 0])
        theirs.eval()
        ours = layer.eval()(x)[member]
        torch.testing.assert_close(ours, theirs(x))
        (expected,) = torch.autograd.grad(theirs(x).square().sum(), theirs.parametrizations.weight.original)
        (gradient,) = torch.autograd.grad(ours.square().sum(), layer.weight)
        torch.testing.assert_close(gradient[member], expected.T)
    layer.train()
    for _ in range(50):
        layer(x)
    sigma = ((layer.left @ layer.weight) * layer.right).sum(-1, keepdim=True)
    singular = torch.linalg.svdvals((layer.weight / sigma).detach())
    assert torch.allclose(singular[:, 0], torch.ones(3), atol=1e-4)


def test_normalised_blocks_keep_what_they_compute_through_a_state_and_a_copy():
    network, x = EnsembleResidualMLP(4, 2, 3, hidden_dim=8, spectral="normalised", eps=1e-5), torch.randn(5, 4)
    network.train()
    loss = network(x).sum() + network(2 * x).sum()  # two passes before the gradient of the first
    loss.backward()
    other = copy.deepcopy(network).eval()
    anew = EnsembleResidualMLP(4, 2, 3, hidden_dim=8, spectral="normalised", eps=1e-5).eval()
    anew.load_state_dict(network.state_dict())
    network.eval()
    assert torch.equal(network(x), other(x))
    assert torch.equal(network(x), anew(x))
    uniform = EnsembleResidualMLP(4, 2, 3, hidden_dim=8, spectral="normalised", initialisation="uniform")
    layer = uniform[2].branch[1]
    sigma = ((layer.left @ layer.weight) * layer.right).sum(-1)[:, 0]
    assert torch.allclose(sigma, torch.linalg.svdvals(layer.weight)[:, 0], rtol=0.05)
    with pytest.raises(ValueError, match=r"Unknown spectral='norm': expected one of projected, normalised"):
        EnsembleResidualMLP(4, 2, spectral="norm")
