"""Exemplars of classes that were learned before, at an exact number of bytes.

Dimensions: n images, C channels, H height and width.
"""

import io
import itertools
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from components.buildable import buildable
from components.checks import CountOrZero, Range, Size, checked
from components.coding.image_codec import ImageCodec
from components.files import replacing


@buildable()
class ImageStore(ABC):
    """A way to keep images: `shrink` may lose something, what follows may not.

    Attributes:
        image_shape: (C, H, H).
        kind: number of the store in the files that hold its images.
        model: checksum of the model that reading them takes, 0 for none.
    """

    image_shape: tuple[int, ...]
    kind: int
    model = 0

    @abstractmethod
    def shrink(self, images: Tensor) -> Any:
        """Images [n, C, H, H] uint8 to what is kept of each: a list or tensor of n items."""

    @abstractmethod
    def pack(self, items: Any) -> bytes: ...

    @abstractmethod
    def unpack(self, payload: bytes, count: int) -> Any:
        """The items of so many images.

        Raises:
            ValueError: the payload is not theirs.
        """

    @abstractmethod
    def restore(self, items: Any) -> Tensor:
        """Images [n, C, H, H] uint8."""

    def charged(self, file: bytes, payload: int) -> int:
        """Bytes that a memory's file, of which so many are payload, counts."""
        return len(file)

    def fell_back(self, payload: bytes) -> bool:
        """Whether something had to be written in another way than was asked for."""
        return False

    def to(self, device: torch.device | str) -> None:  # noqa: B027 - most stores have no networks
        """Let networks run on a device."""

    def model_bytes(self) -> dict[str, int]:
        """Of the models that ``reading`` takes, and of ``all`` that it takes to go on."""
        return {"reading": 0, "all": 0}


@checked
class RawStore(ImageStore):
    """Images as they are. Only pixels are counted, not the few bytes of the file around them.

    Args:
        image_shape: (C, H, H).
    """

    kind = 0

    def __init__(self, image_shape: Sequence[Size]) -> None:
        self.image_shape = tuple(image_shape)

    def shrink(self, images: Tensor) -> Tensor:
        return images

    def pack(self, items: Tensor) -> bytes:
        return items.numpy().tobytes()

    def unpack(self, payload: bytes, count: int) -> Tensor:
        values = np.frombuffer(payload, np.uint8)
        if values.size != count * int(np.prod(self.image_shape)):
            raise ValueError(f"{count} images of {list(self.image_shape)} expected, found {len(payload)} bytes.")
        return torch.from_numpy(values.copy()).view(count, *self.image_shape)

    def restore(self, items: Tensor) -> Tensor:
        return items

    def charged(self, file: bytes, payload: int) -> int:
        return payload


class CodeStore(ImageStore):
    """The codes of a frozen codec.

    What was packed is unpacked at once and compared; should it ever differ, static frequencies take its place.

    Args:
        codec: frozen.
        stream: how codes are written, see `ImageCodec.stream`.
    """

    def __init__(self, codec: ImageCodec, stream: str = "bits_back") -> None:
        assert codec.frozen
        self.image_shape = codec.autoencoder.image_shape
        self.codec = codec
        self.model = codec.checksum()
        self.stream = codec.stream(stream)
        self.kind = {"fixed": 1, "static": 2, "bits_back": 3}[stream]
        self._static = codec.stream("static")

    def to(self, device: torch.device | str) -> None:
        self.codec.to(device)

    def model_bytes(self) -> dict[str, int]:
        bytes_of = self.codec.model_bytes()
        # Bits back may have to fall back on frequencies.
        stream = {1: 0, 2: bytes_of["frequencies"], 3: bytes_of["frequencies"] + bytes_of["code_model"]}[self.kind]
        reading = bytes_of["decode_path"] + stream
        return {"reading": reading, "all": reading + bytes_of["encoder"]}

    def shrink(self, images: Tensor) -> Tensor:
        assert self.codec.checksum() == self.model  # it is the codec that it was
        return self.codec.encode(images)

    def pack(self, items: Tensor) -> bytes:
        try:
            payload = b"\0" + self.stream.pack(items)
            if torch.equal(self.unpack(payload, len(items)), items):
                return payload
        except ValueError:
            pass
        return b"\1" + self._static.pack(items)

    def fell_back(self, payload: bytes) -> bool:
        return payload[:1] == b"\1"

    def unpack(self, payload: bytes, count: int) -> Tensor:
        if payload[:1] not in (b"\0", b"\1"):
            raise ValueError(f"Codes of {count} images expected, found {len(payload)} bytes of something else.")
        stream = self._static if payload[:1] == b"\1" else self.stream
        return stream.unpack(payload[1:], count)

    def restore(self, items: Tensor) -> Tensor:
        assert self.codec.checksum() == self.model
        return self.codec.decode(items)


@buildable()
@checked
def stored_codes(
    image_shape: Sequence[Size], codec: Callable[..., ImageCodec], weights: str, stream: str = "bits_back"
) -> CodeStore:
    """A `CodeStore` by a codec of trained weights.

    Args:
        image_shape: (C, H, H).
        codec: makes it, called with `image_shape`.
        weights: the file that `ImageCodec.save` wrote.
        stream: how codes are written.
    """
    return CodeStore(codec(image_shape=image_shape).load(weights), stream)


@checked
class PillowStore(ImageStore):
    """JPEG or WebP, without what is the same in the files of all images.

    Of a JPEG file the entropy-coded scan is kept, of a WebP file all but the 27 bytes that follow from the image's size
    and the file's length; two bytes say how long each is.

    Args:
        image_shape: (C, H, H), C being 1 or 3.
        format: ``jpeg`` or ``webp``.
        quality: 0 to 100.
    """

    def __init__(self, image_shape: Sequence[Size], format: str, quality: Annotated[int, Range(0, 100)]) -> None:
        if format not in ("jpeg", "webp"):
            raise ValueError(f"Unknown format={format!r}: expected jpeg or webp.")
        if image_shape[0] not in (1, 3):
            raise ValueError(f"image_shape={list(image_shape)}: expected 1 or 3 channels for {format}.")
        self.image_shape = tuple(image_shape)
        self.format = format
        self.kind = {"jpeg": 4, "webp": 5}[format]
        self.quality = quality
        self._settings = {"method": 6} if format == "webp" else {}
        blank = torch.zeros(self.image_shape, dtype=torch.uint8)
        self._header, _ = self._split(self._file(blank))
        self.model = zlib.crc32(self._header, quality)  # JPEG's holds the tables of a quality

    def _file(self, image: Tensor) -> bytes:
        channels = self.image_shape[0]
        pixels = image[0].numpy() if channels == 1 else image.permute(1, 2, 0).contiguous().numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, self.format, quality=self.quality, **self._settings)
        return buffer.getvalue()

    def _split(self, file: bytes) -> tuple[bytes, bytes]:
        """What all files share, and the rest."""
        if self.format == "webp":
            frame = file[20 : 20 + int.from_bytes(file[16:20], "little")]
            return frame[3:10], frame[:3] + frame[10:]
        scan = file.index(b"\xff\xda")
        scan += 2 + int.from_bytes(file[scan + 2 : scan + 4], "big")
        assert file.endswith(b"\xff\xd9")
        return file[:scan], file[scan:-2]

    def _join(self, rest: bytes) -> bytes:
        if self.format == "jpeg":
            return self._header + rest + b"\xff\xd9"
        frame = rest[:3] + self._header + rest[3:]
        chunk = b"VP8 " + struct.pack("<I", len(frame)) + frame + b"\0" * (len(frame) % 2)
        return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk

    def shrink(self, images: Tensor) -> list[bytes]:
        items = []
        for image in images:
            header, rest = self._split(self._file(image))
            if header != self._header:
                raise ValueError(f"{self.format} of quality={self.quality}: the files of two images begin differently.")
            items.append(rest)
        return items

    def pack(self, items: list[bytes]) -> bytes:
        return b"".join(struct.pack("<H", len(item)) + item for item in items)

    def unpack(self, payload: bytes, count: int) -> list[bytes]:
        items, place = [], 0
        while place + 2 <= len(payload):
            (length,) = struct.unpack_from("<H", payload, place)
            items.append(payload[place + 2 : place + 2 + length])
            place += 2 + length
        if len(items) != count or place != len(payload):
            cut = ", the last of them cut off" if place > len(payload) else ""
            raise ValueError(f"Expected {count} images, found {len(items)} in {len(payload)} bytes{cut}.")
        return items

    def restore(self, items: list[bytes]) -> Tensor:
        images = torch.zeros(len(items), *self.image_shape, dtype=torch.uint8)
        mode = "L" if self.image_shape[0] == 1 else "RGB"
        for index, item in enumerate(items):
            pixels = np.array(Image.open(io.BytesIO(self._join(item))).convert(mode))
            images[index] = torch.from_numpy(pixels if mode == "L" else pixels.transpose(2, 0, 1))
        return images


_MAGIC = b"TFX2"
_OLDER = b"TFX1"  # whose bits-back streams were coded by probabilities of another precision
_HEADER = struct.Struct("<4sBxHI")  # magic, kind, classes, model; then counts, payload and their checksum


def write_exemplars(store: ImageStore, counts: Sequence[int], payload: bytes) -> bytes:
    """A file: so many exemplars of each class, one class after the other. Nothing at all where there are none."""
    if not sum(counts):
        return b""
    if max(counts) > 0xFFFF:
        raise ValueError(f"{max(counts)} exemplars of a class: expected at most {0xFFFF}.")
    body = _HEADER.pack(_MAGIC, store.kind, len(counts), store.model) + struct.pack(f"<{len(counts)}H", *counts)
    return body + struct.pack("<I", zlib.crc32(payload, zlib.crc32(body))) + payload


def read_exemplars(store: ImageStore, file: bytes, name: str) -> tuple[list[int], bytes]:
    """Counts and payload of what `write_exemplars` wrote.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    if not file:
        return [], b""
    if file.startswith(_OLDER):
        raise ValueError(
            f"{name}: expected a file of exemplars of this version, found one written by an older version."
        )
    if len(file) < _HEADER.size or not file.startswith(_MAGIC):
        raise ValueError(f"{name}: expected a file of exemplars, found one that does not begin like one.")
    _, kind, classes, model = _HEADER.unpack_from(file)
    begin = _HEADER.size + 2 * classes + 4
    body, checksum, payload = file[: begin - 4], file[begin - 4 : begin], file[begin:]
    if checksum != struct.pack("<I", zlib.crc32(payload, zlib.crc32(body))):
        raise ValueError(f"{name}: expected a whole file of exemplars, found a damaged one of {len(file)} bytes.")
    if kind != store.kind:
        raise ValueError(f"{name}: expected exemplars of kind {store.kind}, found kind {kind}.")
    if model != store.model:
        raise ValueError(f"{name}: expected exemplars coded by model {store.model:08x}, found model {model:08x}.")
    return list(struct.unpack_from(f"<{classes}H", file, _HEADER.size)), payload


@checked
class ExemplarMemory:
    """Exemplars of classes 0, 1, ... within a number of bytes for each, shared by all.

    No class has more than a number that is the same for all, the largest with which all fit; those that were given
    first stay. What is dropped is dropped from what is kept, without loss of the rest.

    Args:
        store: how images are kept.
        bytes_per_class: budget; None for no limit, 0 for no memory.
    """

    def __init__(self, store: ImageStore, bytes_per_class: CountOrZero | None) -> None:
        self.store = store
        self.bytes_per_class = bytes_per_class
        self.items: list[Any] = []  # of each class
        self.file = b""
        self.bytes = 0  # that are charged
        self.fell_back = False  # the latest file is not written as was asked for

    @property
    def counts(self) -> list[int]:
        return [len(items) for items in self.items]

    def add(self, images: Sequence[Tensor]) -> None:
        """Exemplars [n, C, H, H] of classes that follow on those known, the most important first; then drop."""
        for own in images:
            if own.dtype != torch.uint8 or tuple(own.shape[1:]) != self.store.image_shape:
                raise ValueError(
                    f"Images of {own.dtype} {list(own.shape[1:])}: expected uint8 {list(self.store.image_shape)}."
                )
        self.items += [self.store.shrink(own) for own in images]
        most, written = self._fitting()
        self.items = [items[:most] for items in self.items]
        self.file, self.bytes, self.fell_back = written

    def _fitting(self) -> tuple[int, tuple[bytes, int, bool]]:
        """How many of each class fit at most, and what is written of them.

        Writing is dear: numbers are tried by turns where the bytes of an image so far say that the limit is, and in the
        middle of what is left.
        """
        largest = max(self.counts, default=0)
        if self.bytes_per_class is None:
            return largest, self._write(largest)
        allowed = self.bytes_per_class * len(self.items)
        fits, above, written, tried, trials = 0, largest + 1, (b"", 0, False), 1, 0
        while above - fits > 1:
            found = self._write(tried)
            images = sum(min(count, tried) for count in self.counts)
            if found[1] <= allowed:
                fits, written = tried, found
            else:
                above = tried
            trials += 1
            expected = allowed * images // max(1, found[1]) // len(self.items)
            tried = expected if trials % 2 else (fits + above) // 2
            tried = min(max(tried, fits + 1), above - 1)
        return fits, written

    def _write(self, most: int) -> tuple[bytes, int, bool]:
        """A file, the bytes of it that count, and whether it is not written as was asked for."""
        kept = [items[:most] for items in self.items]
        payload = self.store.pack(self._joined(kept))
        file = write_exemplars(self.store, [len(items) for items in kept], payload)
        if not file:
            return b"", 0, False
        return file, self.store.charged(file, len(payload)), self.store.fell_back(payload)

    def images(self) -> tuple[Tensor, Tensor]:
        """All exemplars as they are replayed, [n, C, H, H] uint8, and their classes [n]."""
        labels = torch.repeat_interleave(torch.arange(len(self.items)), torch.tensor(self.counts, dtype=torch.int64))
        return self.store.restore(self._joined(self.items)), labels

    def _joined(self, items: list[Any]) -> Any:
        if not items:
            return self.store.shrink(torch.zeros(0, *self.store.image_shape, dtype=torch.uint8))
        return torch.cat(items) if torch.is_tensor(items[0]) else [item for own in items for item in own]

    def save(self, path: str | Path) -> None:
        """Write the file, atomically."""
        with replacing(path) as temporary:
            temporary.write_bytes(self.file)

    def load(self, file: bytes, classes: int, name: str) -> None:
        """Take over what the bytes of another memory's `file` hold of so many classes; no bytes are no exemplars.

        Raises:
            ValueError: it is damaged, of another kind or of another model.
        """
        counts, payload = read_exemplars(self.store, file, name)
        counts = counts or [0] * classes
        if len(counts) != classes:
            raise ValueError(f"{name}: expected exemplars of {classes} classes, found {len(counts)}.")
        try:
            items = self.store.unpack(payload, sum(counts)) if file else self._joined([])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        bounds = np.cumsum([0, *counts])
        self.items = [items[begin:end] for begin, end in itertools.pairwise(bounds)]
        self.file = file
        self.bytes = self.store.charged(file, len(payload)) if file else 0
