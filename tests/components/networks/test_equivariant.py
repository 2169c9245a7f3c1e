from functools import partial

import pytest
import torch

from components.networks.ensemble import EnsembleMLP
from components.networks.equivariant import ReflectedNetwork, Reflection

SWAP = Reflection([1, 0, 2], [1.0, 1.0, -1.0])
TURN = Reflection([1, 0], [-1.0, -1.0])


def reflect(x, reflection):
    return x[..., list(reflection.source)] * torch.tensor(reflection.sign)


def test_a_reflected_input_gives_the_reflected_output():
    torch.manual_seed(0)
    network = ReflectedNetwork(3, 2, SWAP, TURN, partial(EnsembleMLP, hidden_dim=8, last_gain=1.0))
    x = torch.randn(5, 3)
    assert network(x).shape == (1, 5, 2)
    assert torch.allclose(network(reflect(x, SWAP)), reflect(network(x), TURN), atol=1e-6)
    assert not torch.allclose(network(x), network(x + 1), atol=1e-3)


def test_without_a_reflection_of_the_output_it_stays():
    torch.manual_seed(0)
    network = ReflectedNetwork(3, 1, SWAP, network=partial(EnsembleMLP, hidden_dim=8, last_gain=1.0))
    x = torch.randn(5, 3)
    assert torch.allclose(network(reflect(x, SWAP)), network(x), atol=1e-6)
    assert network(x).std() > 0.01


@pytest.mark.parametrize(
    ("source", "sign"), [([1, 2, 0], [1, 1, 1]), ([0, 0], [1, 1]), ([1, 0], [1, -1]), ([0, 1], [1, 0.5]), ([0], [1, 1])]
)
def test_what_is_not_its_own_inverse_is_refused(source, sign):
    with pytest.raises(ValueError, match="expected a signed permutation that is its own inverse"):
        Reflection(source, sign)


def test_reflections_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"^inputs: expected a reflection of 4 numbers, found 3"):
        ReflectedNetwork(4, 2, SWAP)
    with pytest.raises(ValueError, match=r"^outputs: expected a reflection of 3 numbers, found 2"):
        ReflectedNetwork(3, 3, SWAP, TURN)
