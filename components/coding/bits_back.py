"""Lossless coding with latent-variable models: bits-back coding on asymmetric numeral systems.

Townsend et al., "Practical Lossless Compression with Latent Variables using Bits Back Coding" (BB-ANS), arXiv
1901.04866; Kingma et al., "Bit-Swap", arXiv 1905.06845, whose order several layers of latents are coded in.

A coder of this kind is a stack of bits: to pop a symbol with a distribution is to draw it from it, to push it is to
store it. Per sample, latents are popped with the posterior, and then data and latents are pushed with the model, so
that the net length is -ELBO. What the first pops take is lent by pseudo-random words, which decoding gives back.

Dimensions: n samples, d symbols of each, K values of a symbol, z latents of a layer, L layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import constriction
import numpy as np
import torch
from torch import Tensor

from components.checks import Positive, Size, checked

_Coder = constriction.stream.stack.AnsCoder
_CATEGORICAL = constriction.stream.model.Categorical(perfect=False)  # an exact one takes 45 times as long
_CHUNK = 1000  # samples that a table of probabilities is made for at once
_FEW = 8  # values of a symbol
_STATE_WORDS = 2  # of the coder's head, beside which words lie untouched


class LatentVariableModel(Protocol):
    """p(z_L) p(z_{L-1} | z_L) ... p(x | z_1), with p(z_L) standard normal, and q(z_1 | x) ... q(z_L | z_{L-1}).

    Attributes:
        symbols: d.
        latents: z of each layer, the one next to the data first.
    """

    symbols: int
    latents: tuple[int, ...]

    def infer(self, layer: int, below: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [n, z] of q(z_layer | below), layer 1 .. L; below is x [n, d] or latents."""
        ...

    def generate(self, layer: int, above: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [n, z] of p(z_layer | above), layer 1 .. L - 1."""
        ...

    def logits(self, above: Tensor) -> Tensor:
        """Of p(x | z_1), [n, d, K], from latents [n, z]."""
        ...


class Coded(NamedTuple):
    """A stream.

    Attributes:
        words: uint32, what has to be stored.
        net_bits: by which the stack grew, -ELBO in the mean.
        initial_bits: taken from the pseudo-random words, which are stored too.
    """

    words: np.ndarray
    net_bits: float
    initial_bits: float


@checked
class BitsBackCoder:
    """Samples to words and back, by a latent-variable model.

    Latents live on a grid. Samples are coded in blocks, whose size is part of the code: the model's answers depend on
    it in their last bits. The first blocks are small, for the first has to borrow the bits of its latents; the model
    runs on the CPU, in double precision, on one thread, and its answers are rounded, for a decoder must be given the
    very numbers that the encoder was given.

    Args:
        model: in evaluation mode, with parameters of float64.
        block: samples in a block at most.
        step: of the grid.
        bound: the grid goes from -bound to bound.
    """

    def __init__(
        self, model: LatentVariableModel, block: Size = 100, step: Positive = 1 / 32, bound: Positive = 6.0
    ) -> None:
        if bound < step:
            raise ValueError(f"step={step}, bound={bound}: expected a bound of at least a step.")
        self.model = model
        self.block = block
        self.step = step
        edge = round(bound / step)
        self._gaussian = constriction.stream.model.QuantizedGaussian(-edge, edge)

    def encode(self, x: Tensor) -> Coded:
        """Samples [n, d], integers from 0 to K - 1.

        Raises:
            ValueError: they are others, or the model's answers are no distributions.
        """
        if x.ndim != 2 or x.shape[1] != self.model.symbols:
            raise ValueError(f"Samples of shape {list(x.shape)}: expected [n, {self.model.symbols}].")
        # The first block needs at most three bytes for a latent; where later ones dig deeper, all starts anew.
        lent = 16 + sum(self.model.latents)
        while True:
            with _sound(f"{len(x)} samples can't be coded: expected integers that the model knows"):
                coded = self._encode(x, lent)
            if coded is not None:
                return coded
            lent *= 2

    def _encode(self, x: Tensor, lent: int) -> Coded | None:
        seed = _lent_words(lent)
        coder = _Coder(seed)
        began = lowest = coder.num_valid_bits()
        lowest_words = coder.num_words()
        start = 0
        for size in block_sizes(len(x), self.block):
            below = x[start : start + size]
            start += size
            for layer in range(1, len(self.model.latents) + 1):
                popped = self._pop(coder, *self._infer(layer, below))
                lowest = min(lowest, coder.num_valid_bits())
                lowest_words = min(lowest_words, coder.num_words())
                # A coder that has run dry says nothing: what it pops then is no sample.
                if lowest_words <= 2 * _STATE_WORDS:
                    return None
                if layer == 1:
                    self._push_data(coder, below, popped)
                else:
                    self._push(coder, below, *self._generate(layer - 1, popped))
                below = popped
            self._push(coder, below, *self._prior(size))
        untouched = lowest_words - _STATE_WORDS
        words = coder.get_compressed()
        assert np.array_equal(words[:untouched], seed[:untouched])
        return Coded(words[untouched:], coder.num_valid_bits() - began, began - lowest)

    def decode(self, words: np.ndarray, count: int) -> Tensor:
        """The samples [count, d] of a stream.

        Raises:
            ValueError: the stream is not one of so many samples, of this model, from a machine that calculates alike.
        """
        with _sound(_undecodable(words)):
            coder = _Coder(words)
            blocks = []
            for size in reversed(list(block_sizes(count, self.block))):
                above = self._pop(coder, *self._prior(size))
                for layer in range(len(self.model.latents), 1, -1):
                    popped = self._pop(coder, *self._generate(layer - 1, above))
                    self._push(coder, above, *self._infer(layer, popped))
                    above = popped
                x = self._pop_data(coder, above)
                self._push(coder, above, *self._infer(1, x))
                blocks.append(x)
            left = coder.get_compressed()
            if not np.array_equal(left, _lent_words(len(left))):
                raise ValueError("it does not give back what it was lent")
        return torch.cat(blocks[::-1]) if blocks else torch.zeros(0, self.model.symbols, dtype=torch.int64)

    # --- distributions, [n, z] in units of the grid ---

    def _prior(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        shape = (size, self.model.latents[-1])
        return np.zeros(shape), np.full(shape, 1 / self.step)

    def _infer(self, layer: int, below: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return self._rounded(self.model.infer, layer, below if layer == 1 else self._values(below))

    def _generate(self, layer: int, above: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return self._rounded(self.model.generate, layer, self._values(above))

    def _rounded(self, asked: Callable[..., tuple[Tensor, Tensor]], *arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        with _exactly():
            mean, std = asked(*arguments)
            _check_precision(mean)
            mean = (mean / self.step * 64).round() / 64
            std = ((std / self.step).log2() * 64).round().div(64).exp2()
        return mean.numpy(), std.numpy()

    def _probabilities(self, above: Tensor) -> np.ndarray:
        """[n d, K], float32."""
        with _exactly():
            logits = self.model.logits(self._values(above))
            _check_precision(logits)
            table = logits.float().mul_(256).round_().div_(256).flatten(0, 1)
            # Of few values, a softmax over rows side by side is four times as fast as one row after the other.
            table = table.T.contiguous().softmax(0).T if table.shape[1] <= _FEW else table.softmax(1)
        # A table that does not lie row by row is misread without a word.
        return np.ascontiguousarray(table.numpy())

    def _values(self, latents: Tensor) -> Tensor:
        return latents.double() * self.step

    # --- the stack ---

    def _pop(self, coder: Any, mean: np.ndarray, std: np.ndarray) -> Tensor:
        popped = coder.decode(self._gaussian, mean.ravel(), std.ravel())
        return torch.from_numpy(popped.reshape(mean.shape))

    def _push(self, coder: Any, latents: Tensor, mean: np.ndarray, std: np.ndarray) -> None:
        coder.encode_reverse(_symbols(latents), self._gaussian, mean.ravel(), std.ravel())

    def _pop_data(self, coder: Any, above: Tensor) -> Tensor:
        popped = coder.decode(_CATEGORICAL, self._probabilities(above))
        return torch.from_numpy(popped.astype(np.int64)).view(len(above), self.model.symbols)

    def _push_data(self, coder: Any, x: Tensor, above: Tensor) -> None:
        coder.encode_reverse(_symbols(x), _CATEGORICAL, self._probabilities(above))


def block_sizes(count: int, most: int) -> Iterator[int]:
    """Sizes of the blocks that `count` samples are coded in: an eighth of what was coded before, from 1 to `most`.

    What a block pops is thus there, as long as a sample's latents have less than eight times its net length.
    """
    done = 0
    while done < count:
        size = min(most, max(1, done // 8), count - done)
        yield size
        done += size


def encode_static(x: Tensor, probabilities: np.ndarray) -> np.ndarray:
    """Words of samples [n, d], each symbol with frequencies of its place, [d, K]; no latents, nothing lent."""
    coder = _Coder()
    with _sound(f"{len(x)} samples can't be coded: expected integers that the frequencies know, two at least"):
        for part in x.split(_CHUNK) if len(x) else ():
            coder.encode_reverse(_symbols(part), _CATEGORICAL, _table(probabilities, len(part)))
    return coder.get_compressed()


def decode_static(words: np.ndarray, count: int, probabilities: np.ndarray) -> Tensor:
    """The samples [count, d] of `encode_static`.

    Raises:
        ValueError: the words are not of so many samples with these frequencies.
    """
    sizes = [min(_CHUNK, count - begin) for begin in range(0, count, _CHUNK)]
    with _sound(_undecodable(words)):
        coder = _Coder(words)
        popped = [coder.decode(_CATEGORICAL, _table(probabilities, size)) for size in reversed(sizes)]
        if not coder.is_empty():
            raise ValueError("something is left over")
    symbols = np.concatenate([np.zeros(0, np.int64), *reversed(popped)]).astype(np.int64)
    return torch.from_numpy(symbols).view(count, len(probabilities))


def _check_precision(answer: Tensor) -> None:
    if answer.dtype != torch.float64:
        raise ValueError(f"expected a model in double precision, as after .double(), found {answer.dtype}")


def _table(probabilities: np.ndarray, count: int) -> np.ndarray:
    return np.tile(probabilities.astype(np.float32), (count, 1))


def _symbols(values: Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.reshape(-1).numpy(), dtype=np.int32)


def _lent_words(count: int) -> np.ndarray:
    """Pseudo-random words: of longer ones the last are the same, and none of them looks like the end of a stream."""
    return np.random.Generator(np.random.Philox(key=0)).integers(1, 2**32, count, dtype=np.uint32)[::-1].copy()


@contextmanager
def _exactly() -> Iterator[None]:
    """Inside, a network on a CPU gives the same bits whatever the number of threads outside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _sound(sentence: str) -> Iterator[None]:
    """Begins errors with a sentence; the coder's own are no `Exception`s."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{sentence} ({error}).") from error


def _undecodable(words: np.ndarray) -> str:
    return (
        f"A stream of {len(words)} words can't be decoded: expected one of this model and number of samples, found"
        " another, or a damaged one"
    )
