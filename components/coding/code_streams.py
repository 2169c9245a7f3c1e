"""Discrete codes to bytes and back, without loss: at fixed length, by frequencies of places, and by bits back.

Dimensions: n images, S codes of each, K values of a code.
"""

import copy
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from components.coding.bits_back import BitsBackCoder, Coded, decode_static, encode_static


class CodeStream(ABC):
    """A way to write codes [n, S] down."""

    @abstractmethod
    def pack(self, codes: Tensor) -> bytes: ...

    @abstractmethod
    def unpack(self, payload: bytes, count: int) -> Tensor:
        """The codes [count, S].

        Raises:
            ValueError: the payload is not one of so many images.
        """


class FixedLength(CodeStream):
    """Every code takes as many bits as the largest needs; all of them lie in one row.

    Args:
        symbols: S.
        values: K.
    """

    def __init__(self, symbols: int, values: int) -> None:
        self.symbols = symbols
        self.bits = max(1, (values - 1).bit_length())

    def pack(self, codes: Tensor) -> bytes:
        places = np.arange(self.bits)
        return np.packbits((codes.numpy().reshape(-1, 1) >> places) & 1).tobytes()

    def unpack(self, payload: bytes, count: int) -> Tensor:
        bits = count * self.symbols * self.bits
        if len(payload) != -(-bits // 8):
            raise ValueError(f"{count} images take {-(-bits // 8)} bytes of codes, found {len(payload)}.")
        flat = np.unpackbits(np.frombuffer(payload, np.uint8), count=bits).astype(np.int64)
        values = (flat.reshape(-1, self.bits) << np.arange(self.bits)).sum(1)
        return torch.from_numpy(values).view(count, self.symbols)


class StaticFrequencies(CodeStream):
    """Codes by how often each place has each value.

    Args:
        frequencies: [S, K], above 0.
    """

    def __init__(self, frequencies: Tensor) -> None:
        self.frequencies = frequencies.double().cpu().numpy()

    def pack(self, codes: Tensor) -> bytes:
        return _bytes(encode_static(codes, self.frequencies))

    def unpack(self, payload: bytes, count: int) -> Tensor:
        return decode_static(_words(payload), count, self.frequencies)


class BitsBack(CodeStream):
    """Codes by a latent-variable model.

    Args:
        model: a `LatentVariableModel`; a copy of it is used, on the CPU and in double precision.
        block: images in a block at most.

    Attributes:
        latest: what was packed last, with its net and initial bits.
    """

    def __init__(self, model: nn.Module, block: int = 100) -> None:
        self.coder = BitsBackCoder(copy.deepcopy(model).cpu().double().eval().requires_grad_(False), block)
        self.latest: Coded | None = None

    def pack(self, codes: Tensor) -> bytes:
        self.latest = self.coder.encode(codes)
        return _bytes(self.latest.words)

    def unpack(self, payload: bytes, count: int) -> Tensor:
        return self.coder.decode(_words(payload), count)


def _bytes(words: np.ndarray) -> bytes:
    return words.astype("<u4").tobytes()


def _words(payload: bytes) -> np.ndarray:
    if len(payload) % 4:
        raise ValueError(f"A stream of {len(payload)} bytes can't be decoded: expected whole words of four bytes.")
    return np.frombuffer(payload, "<u4").astype(np.uint32)
