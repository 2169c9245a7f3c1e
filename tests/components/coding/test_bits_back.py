import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor, nn

from components.coding.bits_back import (
    _CATEGORICAL,
    BitsBackCoder,
    _lent_words,
    block_sizes,
    decode_static,
    encode_static,
)
from components.coding.code_models import CategoricalVAE

EDGE = 192  # of the grid, in steps
LEAST = 2.0**-24  # the probability that the coder gives to every symbol at least


class Chain(nn.Module):
    """A random linear model with as many layers of latents as there are sizes."""

    def __init__(self, symbols: int, values: int, latents: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.symbols, self.values, self.latents = symbols, values, latents
        generator = torch.Generator().manual_seed(seed)

        def weight(out: int, inside: int) -> nn.Parameter:
            drawn = torch.randn(out, inside, generator=generator, dtype=torch.float64)
            return nn.Parameter(scale * drawn / math.sqrt(inside))

        sizes = (symbols, *latents)
        self.up = nn.ParameterList(weight(out, inside) for inside, out in pairwise(sizes))
        self.spread = nn.ParameterList(weight(out, inside) for inside, out in pairwise(sizes))
        self.down = nn.ParameterList(weight(out, inside) for inside, out in zip(latents[1:], latents))
        self.out = weight(symbols * values, latents[0])

    def infer(self, layer: int, below: Tensor) -> tuple[Tensor, Tensor]:
        below = below.double() / (self.values if layer == 1 else 1)
        return below @ self.up[layer - 1].T, (below @ self.spread[layer - 1].T).sigmoid() * 0.5 + 0.1

    def generate(self, layer: int, above: Tensor) -> tuple[Tensor, Tensor]:
        mean = above @ self.down[layer - 1].T
        return mean, torch.full_like(mean, 0.7)

    def logits(self, above: Tensor) -> Tensor:
        return (above @ self.out.T).view(len(above), self.symbols, self.values)


def data(count: int, symbols: int, values: int, seed: int = 1) -> Tensor:
    return torch.randint(values, (count, symbols), generator=torch.Generator().manual_seed(seed))


class Traced(BitsBackCoder):
    """Adds up what every pop and push must cost by the distribution that it was given."""

    bits = 0.0

    def _gaussian_bits(self, symbols, mean, std) -> float:
        lower, upper = (np.asarray(symbols) + side / 2 - mean for side in (-1, 1))
        lower, upper = np.where(lower < -EDGE - mean, -np.inf, lower), np.where(upper > EDGE - mean, np.inf, upper)
        mass = norm.cdf(upper / std) - norm.cdf(lower / std)
        return -np.log2(mass * (1 - (2 * EDGE + 1) * LEAST) + LEAST).sum()

    def _pop(self, coder, mean, std):
        popped = super()._pop(coder, mean, std)
        self.bits -= self._gaussian_bits(popped, mean, std)
        return popped

    def _push(self, coder, latents, mean, std):
        self.bits += self._gaussian_bits(latents, mean, std)
        super()._push(coder, latents, mean, std)

    def _push_data(self, coder, x, above):
        table = self._probabilities(above)
        self.bits -= np.log2(np.maximum(table[np.arange(len(table)), x.flatten()], LEAST)).sum()
        super()._push_data(coder, x, above)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 40),
    symbols=st.integers(1, 12),
    values=st.integers(2, 20),
    latents=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    block=st.integers(1, 50),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
)
def test_any_model_gives_back_what_it_coded_at_the_cost_of_its_distributions(
    count, symbols, values, latents, block, seed, scale
):
    model = Chain(symbols, values, tuple(latents), seed, scale)
    coder = Traced(model, block)
    x = data(count, symbols, values, seed)
    coded = coder.encode(x)
    assert torch.equal(BitsBackCoder(model, block).decode(coded.words, count), x)
    steps = count * (symbols + 2 * sum(latents))
    rounding = 0.01 if scale < 1 else 1.0  # where all is in the tails, probabilities are a few units of 2^-24
    assert coded.net_bits == pytest.approx(coder.bits, abs=2 + rounding * steps)
    assert coded.initial_bits > 0
    assert abs(32 * len(coded.words) - coded.net_bits - coded.initial_bits) <= 96


def test_a_decoder_that_ignores_the_latents_makes_static_coding():
    """With the prior as posterior, which then is exact, the net length is -log2 p(x), whatever was popped."""

    class Ignoring(Chain):
        def infer(self, layer, below):
            return (torch.zeros(len(below), 4, dtype=torch.float64), torch.ones(len(below), 4, dtype=torch.float64))

        def logits(self, above):
            return self.out[:, 0].view(1, self.symbols, self.values).expand(len(above), -1, -1)

    model = Ignoring(6, 9, (4,))
    x = data(300, 6, 9)
    probabilities = (model.out[:, 0].detach().view(6, 9) * 256).round().div(256).softmax(-1).numpy()
    expected = -np.log2(probabilities[np.arange(6), x.numpy()]).sum()
    coded = BitsBackCoder(model, 10).encode(x)
    assert coded.net_bits == pytest.approx(expected, rel=1e-4, abs=2)
    static = encode_static(x, probabilities)
    assert abs(32 * len(static) - expected) <= 64 + 1e-3 * x.numel()
    assert torch.equal(decode_static(static, 300, probabilities), x)


class DiscreteCoder(BitsBackCoder):
    """Latents of a few values, and the exact posterior or another one."""

    def __init__(self, prior: np.ndarray, given: np.ndarray, posterior: np.ndarray) -> None:
        super().__init__(Chain(1, given.shape[1], (1,)), 1)
        self.prior, self.given, self.posterior = prior, given, posterior

    def _prior(self, size):
        return (np.tile(self.prior, (size, 1)).astype(np.float32),)

    def _infer(self, layer, below):
        return (self.posterior[below.flatten().numpy()].astype(np.float32),)

    def _probabilities(self, above):
        return self.given[above.flatten().numpy()].astype(np.float32)

    def _pop(self, coder, table):
        return torch.from_numpy(coder.decode(_CATEGORICAL, table)).view(-1, 1)

    def _push(self, coder, latents, table):
        coder.encode_reverse(latents.flatten().numpy().astype(np.int32), _CATEGORICAL, table)


@pytest.mark.parametrize("exact", [True, False])
def test_with_the_exact_posterior_the_length_is_that_of_the_marginal_whatever_was_popped(exact):
    """-log2 p(x) for every sample; with another posterior, what its own latents cost."""
    generator = np.random.default_rng(3)
    prior, given = generator.dirichlet(np.ones(4)), generator.dirichlet(np.ones(7), 4)
    joint = prior[:, None] * given
    posterior = (joint / joint.sum(0)).T
    if not exact:
        posterior = generator.dirichlet(np.ones(4), 7)
    x = torch.from_numpy(generator.choice(7, (600, 1), p=joint.sum(0)))
    coder, popped = DiscreteCoder(prior, given, posterior), []
    pop = coder._pop
    coder._pop = lambda *arguments: popped.append(pop(*arguments)) or popped[-1]
    coded = coder.encode(x)
    z = torch.cat(popped).flatten().numpy()
    values = x.flatten().numpy()
    expected = np.log2(posterior[values, z]) - np.log2(given[z, values]) - np.log2(prior[z])
    assert coded.net_bits == pytest.approx(expected.sum(), abs=2 + 1e-3 * 600)
    if exact:
        assert coded.net_bits == pytest.approx(-np.log2(joint.sum(0))[values].sum(), abs=2 + 1e-3 * 600)
    assert torch.equal(DiscreteCoder(prior, given, posterior).decode(coded.words, 600), x)


def test_mean_net_length_is_minus_elbo():
    model = Chain(8, 5, (3,), seed=4)
    x = data(3000, 8, 5)
    net = BitsBackCoder(model, 100).encode(x).net_bits / len(x)
    mean, std = model.infer(1, x)
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(20):
        z = mean + std * torch.randn(mean.shape, generator=generator, dtype=torch.float64)
        log_p = model.logits(z).log_softmax(-1).gather(-1, x[..., None]).sum((1, 2))
        divergence = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum(1)
        rates.append((divergence - log_p).detach().mean().item() / math.log(2))
    assert net == pytest.approx(np.mean(rates), rel=0.01)


def test_popped_latents_are_samples_of_the_posterior():
    """Bits just pushed must not come back as the same quantile: pitfall of coders that pop and push alike."""
    model, seen = Chain(8, 5, (3,), seed=4), []

    class Watching(BitsBackCoder):
        def _pop(self, coder, mean, std):
            popped = super()._pop(coder, mean, std)
            seen.append(((popped.numpy() - mean) / std).ravel())
            return popped

    Watching(model, 10).encode(data(3000, 8, 5))
    quantiles = norm.cdf(np.concatenate(seen))
    assert np.abs(np.histogram(quantiles, 10, (0, 1))[0] / len(quantiles) - 0.1).max() < 0.04
    assert abs(np.corrcoef(quantiles[:-3], quantiles[3:])[0, 1]) < 0.05


def test_stream_does_not_depend_on_how_much_was_lent():
    coder = BitsBackCoder(Chain(5, 7, (3, 2)), 4)
    x = data(30, 5, 7)
    one, another = coder._encode(x, 60), coder._encode(x, 200)
    assert np.array_equal(one.words, another.words)
    assert (one.net_bits, one.initial_bits) == pytest.approx((another.net_bits, another.initial_bits), abs=1)
    thirsty = BitsBackCoder(Chain(5, 7, (60,)), 4)
    assert thirsty._encode(x, 8) is None  # too little
    assert np.array_equal(_lent_words(9), _lent_words(20)[11:])


def test_small_first_blocks_borrow_the_bits_of_one_sample():
    model = Chain(20, 30, (16,))
    x = data(200, 20, 30)
    one, many = (BitsBackCoder(model, block).encode(x).initial_bits for block in (1, 100))
    assert many < 2 * one
    assert list(block_sizes(32, 3)) == [1] * 16 + [2] * 4 + [3, 3, 2]
    assert sum(block_sizes(1234, 100)) == 1234


def test_the_number_of_threads_does_not_matter():
    model = Chain(30, 40, (16, 8), seed=2)
    x = data(300, 30, 40)
    coder, threads = BitsBackCoder(model, 64), torch.get_num_threads()
    words = coder.encode(x).words
    try:
        torch.set_num_threads(3)
        assert torch.equal(coder.decode(words, 300), x)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("changes", "samples", "message"),
    [
        ({"bound": 0.01}, None, r"bound=0.01: expected a bound of at least a step"),
        ({}, data(5, 4, 9), r"Samples of shape \[5, 4\]: expected \[n, 6\]"),
        ({}, data(5, 6, 9) + 9, "5 samples can't be coded: expected integers that the model knows"),
    ],
)
def test_what_can_not_be_coded_is_one_sentence(changes, samples, message):
    with pytest.raises(ValueError, match=message):
        BitsBackCoder(Chain(6, 9, (4,)), **changes).encode(samples)


def test_precision_and_frequencies_are_checked():
    with pytest.raises(ValueError, match=r"expected a model in double precision, as after \.double\(\), found"):
        BitsBackCoder(CategoricalVAE([(2, 2)], codes=5, width=4)).encode(data(3, 4, 5))
    with pytest.raises(ValueError, match="3 samples can't be coded: expected integers that the frequencies know"):
        encode_static(torch.zeros(3, 2, dtype=torch.int64), np.ones((2, 1)))


@pytest.mark.parametrize("damage", ["bit", "short", "model", "count", "block"])
def test_what_can_not_be_decoded_is_one_sentence(damage):
    model = Chain(6, 9, (4,))
    coder, count = BitsBackCoder(model, 10), 50
    words = coder.encode(data(50, 6, 9)).words.copy()
    if damage == "bit":
        words[len(words) // 2] ^= 1 << 7
    elif damage == "short":
        words = words[:-1]
    elif damage == "model":
        coder = BitsBackCoder(Chain(6, 9, (4,), seed=1), 10)
    elif damage == "count":
        count = 49
    else:
        coder = BitsBackCoder(model, 3)
    with pytest.raises(ValueError, match="words can't be decoded: expected one of this model"):
        coder.decode(words, count)


def test_static_coding_costs_the_cross_entropy_and_names_damage():
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(16), 5)
    x = torch.from_numpy(np.stack([generator.choice(16, 400, p=row) for row in probabilities], 1))
    words = encode_static(x, probabilities)
    expected = -np.log2(probabilities[np.arange(5), x.numpy()]).sum()
    assert abs(32 * len(words) - expected) <= 64 + 1e-3 * x.numel()
    assert torch.equal(decode_static(words, 400, probabilities), x)
    with pytest.raises(ValueError, match="can't be decoded"):
        decode_static(words, 399, probabilities)
    assert decode_static(encode_static(x[:0], probabilities), 0, probabilities).shape == (0, 5)
