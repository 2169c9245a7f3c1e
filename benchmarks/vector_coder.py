"""Bits back with a vector of coders, one for each symbol of a batch of images, in plain NumPy.

In the manner of the fastest public ones, every step is one operation on the whole batch. What a coder for each symbol
has to begin with, 31 to 63 random bits, is the price: it is stored for every batch.
"""

import numpy as np
import torch
from scipy.special import ndtr, ndtri

from components.coding.bits_back import LatentVariableModel

LOW = np.uint64(1 << 31)
WORD = np.uint64(32)
PRECISION = 16  # of frequencies, in bits
LATENT_BITS = 8  # of a latent's bucket; all buckets are as likely under the prior


class VectorStack:
    """Heads [m] of as many coders, and one tail of words that they share.

    Args:
        heads: m.
        words: that lie in the tail from the beginning.
    """

    def __init__(self, heads: int, words: int) -> None:
        generator = np.random.default_rng(0)
        self.heads = generator.integers(1 << 31, 1 << 63, heads, dtype=np.uint64)
        self.tail = [generator.integers(1 << 32, size=words, dtype=np.uint64)]

    def push(self, start: np.ndarray, frequency: np.ndarray, precision: int = PRECISION) -> None:
        """Symbols of as many heads, each with an interval of whole numbers below 2 ** precision."""
        heads = self.heads[: start.size]
        full = heads >= (frequency << np.uint64(63 - precision))
        if full.any():
            self.tail.append(heads[full] & np.uint64(0xFFFFFFFF))
            heads[full] >>= WORD
        quotient, rest = np.divmod(heads, frequency)
        heads[:] = (quotient << np.uint64(precision)) + rest + start

    def peek(self, count: int, precision: int = PRECISION) -> np.ndarray:
        """A whole number below 2 ** precision from each of the first heads: it lies in the interval of its symbol."""
        return self.heads[:count] & np.uint64((1 << precision) - 1)

    def pop(self, peeked: np.ndarray, start: np.ndarray, frequency: np.ndarray, precision: int = PRECISION) -> None:
        """Remove the symbols whose intervals what was peeked lies in."""
        heads = self.heads[: start.size]
        heads[:] = frequency * (heads >> np.uint64(precision)) + peeked - start
        empty = heads < LOW
        count = int(empty.sum())
        if count:
            heads[empty] = heads[empty] << WORD | self._words(count)

    def _words(self, count: int) -> np.ndarray:
        while len(self.tail[-1]) < count:
            last = self.tail.pop()
            self.tail[-1] = np.concatenate([self.tail[-1], last])
        last = self.tail[-1]
        self.tail[-1], words = last[: len(last) - count], last[len(last) - count :]
        return words

    @property
    def bits(self) -> int:
        return 64 * self.heads.size + 32 * sum(map(len, self.tail))


class VectorCoder:
    """Batches of binary images [n, d] by a model with one layer of latents, as `BitsBackCoder` takes it."""

    def __init__(self, model: LatentVariableModel, batch: int) -> None:
        self.model = model
        self.batch = batch
        buckets = 1 << LATENT_BITS
        self.edges = ndtri(np.arange(buckets + 1) / buckets)
        self.centres = ndtri((np.arange(buckets) + 0.5) / buckets)

    def encode(self, x: torch.Tensor) -> VectorStack:
        latents = self.batch * self.model.latents[0]
        stack = VectorStack(self.batch * self.model.symbols, latents)
        for images in x.split(self.batch):
            mean, std = self._posterior(images)
            peeked = stack.peek(latents)
            bucket = self._bucket(peeked, mean, std)
            stack.pop(peeked, *self._interval(bucket, mean, std))
            stack.push(*self._pixels(images.numpy().ravel(), bucket))
            stack.push(bucket.astype(np.uint64), np.ones(latents, np.uint64), LATENT_BITS)
        return stack

    def decode(self, stack: VectorStack, count: int) -> torch.Tensor:
        latents = self.batch * self.model.latents[0]
        found = []
        for _ in range(count // self.batch):
            bucket = stack.peek(latents, LATENT_BITS)
            stack.pop(bucket, bucket, np.ones(latents, np.uint64), LATENT_BITS)
            bucket = bucket.astype(np.int64)
            off = self._off(bucket)
            peeked = stack.peek(off.size)
            pixels = (peeked >= off).astype(np.int64)
            stack.pop(peeked, *_binary(pixels, off))
            images = torch.from_numpy(pixels.reshape(self.batch, -1))
            stack.push(*self._interval(bucket, *self._posterior(images)))
            found.append(images)
        return torch.cat(found[::-1])

    @torch.no_grad()
    def _posterior(self, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        return tuple(each.numpy().ravel() for each in self.model.infer(1, images))

    def _cumulative(self, bucket: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
        """Of the posterior at the lower edges of buckets, each of which has one at least."""
        free = (1 << PRECISION) - (1 << LATENT_BITS)
        return (ndtr((self.edges[bucket] - mean) / std) * free).astype(np.uint64) + bucket.astype(np.uint64)

    def _interval(self, bucket: np.ndarray, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        start = self._cumulative(bucket, mean, std)
        return start, self._cumulative(bucket + 1, mean, std) - start

    def _bucket(self, peeked: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
        """By bisection, whose steps are one operation each."""
        low = np.zeros(peeked.size, np.int64)
        for bit in reversed(range(LATENT_BITS)):
            middle = low + (1 << bit)
            low = np.where(self._cumulative(middle, mean, std) <= peeked, middle, low)
        return low

    @torch.no_grad()
    def _off(self, bucket: np.ndarray) -> np.ndarray:
        """The share of 2 ** PRECISION in which pixels are 0."""
        latents = torch.from_numpy(self.centres[bucket].reshape(self.batch, -1))
        on = self.model.logits(latents).diff(dim=-1).flatten().sigmoid().numpy()
        return ((1 - on) * ((1 << PRECISION) - 2)).astype(np.uint64) + np.uint64(1)

    def _pixels(self, pixels: np.ndarray, bucket: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _binary(pixels, self._off(bucket))


def _binary(pixels: np.ndarray, off: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    on = pixels.astype(bool)
    return np.where(on, off, np.uint64(0)), np.where(on, np.uint64(1 << PRECISION) - off, off)
