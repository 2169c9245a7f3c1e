import io
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from components.coding.code_models import CategoricalVAE, place_frequencies
from components.coding.code_streams import FixedLength
from components.coding.exemplars import CodeStore, ExemplarMemory, PillowStore, RawStore
from components.coding.image_codec import STREAMS, ImageCodec
from components.coding.vqvae import VQVAE


def images(count: int, channels: int = 1, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Smooth ones, as different from each other as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (255 * fine).to(torch.uint8)


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    torch.manual_seed(0)
    autoencoder = partial(VQVAE, codes=11, dim=4, width=8, blocks=1, block_width=4)
    made = ImageCodec((1, 16, 16), autoencoder, partial(CategoricalVAE, width=8, latent_channels=1, embedding=4), 8)
    for step in range(5):
        made.autoencoder(images(64, seed=step))
    made.eval()
    made.frequencies.copy_(place_frequencies(made.encode(images(200)), 11))
    made.code_model.begin(made.frequencies)
    return made.freeze()


@pytest.fixture(params=["raw", *STREAMS, "jpeg", "webp"])
def store(request, codec):
    if request.param == "raw":
        return RawStore((1, 16, 16))
    if request.param in STREAMS:
        return CodeStore(codec, request.param)
    return PillowStore((1, 16, 16), request.param, 10)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(count=st.integers(0, 9), symbols=st.integers(1, 9), values=st.integers(2, 600), seed=st.integers(0, 99))
def test_fixed_length_is_exact_and_as_long_as_it_says(count, symbols, values, seed):
    stream = FixedLength(symbols, values)
    codes = torch.randint(values, (count, symbols), generator=torch.Generator().manual_seed(seed))
    payload = stream.pack(codes)
    bits = max(1, int(np.ceil(np.log2(values))))
    assert len(payload) == -(-count * symbols * bits // 8)
    assert torch.equal(stream.unpack(payload, count), codes)
    with pytest.raises(ValueError, match="bytes of codes, found"):
        stream.unpack(payload + b"0", count)


def test_what_is_packed_comes_back_and_images_are_alike(store):
    x = images(20, seed=7)
    items = store.shrink(x)
    payload = store.pack(items)
    again = store.unpack(payload, 20)
    assert torch.equal(store.restore(again), store.restore(items))
    assert store.restore(items).dtype == torch.uint8
    assert store.restore(items).shape == x.shape
    assert len(store.pack(items[:5])) < len(payload)
    with pytest.raises(ValueError, match=r"found|decoded"):
        store.unpack(payload[:-3], 20)
    if isinstance(store, PillowStore):
        with pytest.raises(
            ValueError, match=rf"^Expected 20 images, found 20 in {len(payload) - 1} bytes, the last of th"
        ):
            store.unpack(payload[:-1], 20)


def test_codes_take_fewer_bytes_the_more_is_known_of_them(codec):
    codes = codec.encode(images(200))
    sizes = {name: len(codec.stream(name).pack(codes)) for name in STREAMS}
    entropy = -(codec.frequencies.log2()[torch.arange(16), codes]).sum().item() / 8
    assert sizes["fixed"] == 200 * 16 * 4 // 8
    assert sizes["static"] == pytest.approx(entropy, abs=8)
    places = torch.stack([codes[:, place].bincount(minlength=11) for place in range(16)]).double()

    def entropy_of(counts: torch.Tensor) -> float:
        return torch.special.entr(counts / counts.sum(-1, keepdim=True)).sum(-1).mean().item() / np.log(2)

    assert 4 >= entropy_of(places.sum(0)) >= entropy_of(places)
    assert sizes["static"] < sizes["fixed"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("format", ["jpeg", "webp"])
@pytest.mark.parametrize("size", [13, 28])
def test_headers_are_left_out_without_changing_a_pixel(channels, format, size):
    x = images(6, channels, size)
    store = PillowStore(x.shape[1:], format, 30)
    items = store.shrink(x)
    for image, item, found in zip(x, items, store.restore(items)):
        file = store._file(image)
        expected = np.array(Image.open(io.BytesIO(file)).convert("RGB" if channels == 3 else "L"))
        assert np.array_equal(found.permute(1, 2, 0).numpy().squeeze(), expected.squeeze())
        assert len(item) <= len(file) - (27 if format == "webp" else 300)


def test_memory_holds_as_many_as_fit_and_drops_without_loss(store):
    memory = ExemplarMemory(store, 1200)
    memory.add([images(40, seed=0), images(40, seed=1)])
    first = memory.counts[0]
    assert memory.counts == [first] * 2
    assert 0 < first <= 40
    assert memory.bytes <= 2400
    expected = store.restore(store.shrink(images(40, seed=0)))
    memory.add([images(40, seed=2)])
    assert memory.counts[0] == memory.counts[1] == min(first, memory.counts[2])
    assert memory.bytes <= 3600
    found, labels = memory.images()
    assert labels.tolist() == [c for c in range(3) for _ in range(memory.counts[c])]
    assert torch.equal(found[labels == 0], expected[: memory.counts[0]])
    if memory.counts[2] < 40:
        own = [items[: memory.counts[2] + 1] for items in (*memory.items[:2], store.shrink(images(40, seed=2)))]
        memory.items = own
        assert memory._write(41)[1] > 3600  # one more of each would not fit


@pytest.mark.parametrize("limit", [0, None])
def test_no_memory_and_no_limit(store, limit):
    memory = ExemplarMemory(store, limit)
    assert memory.images()[0].shape == (0, 1, 16, 16)
    memory.add([images(7), images(5, seed=1)])
    assert memory.counts == ([0, 0] if limit == 0 else [7, 5])
    assert (memory.file == b"") == (memory.bytes == 0) == (limit == 0)
    assert len(memory.images()[0]) == sum(memory.counts)
    other = ExemplarMemory(store, limit)
    other.load(memory.file, 2, "a file")
    assert other.counts == memory.counts


def test_memory_goes_on_from_its_file(store):
    memory, other = (ExemplarMemory(store, 900) for _ in range(2))
    memory.add([images(30, seed=0), images(30, seed=1)])
    other.load(memory.file, 2, "a file")
    assert other.bytes == memory.bytes
    for each in (memory, other):
        each.add([images(30, seed=2)])
    assert other.file == memory.file
    assert torch.equal(other.images()[0], memory.images()[0])


def test_bytes_are_those_of_the_file_and_raw_ones_those_of_the_pixels(store):
    memory = ExemplarMemory(store, None)
    memory.add([images(6)])
    assert memory.bytes == (6 * 256 if isinstance(store, RawStore) else len(memory.file))


def test_what_is_wrong_with_a_file_is_one_sentence(store, codec):
    memory = ExemplarMemory(store, None)
    memory.add([images(9), images(9, seed=1)])

    def load(file: bytes, into=store) -> None:
        ExemplarMemory(into, None).load(file, 2, "memory.bin")

    damaged = bytearray(memory.file)
    damaged[len(damaged) // 2] ^= 1
    for file in (bytes(damaged), memory.file[:-5], memory.file[:20]):
        with pytest.raises(ValueError, match=r"memory.bin: expected a whole file of exemplars, found a damaged one"):
            load(file)
    with pytest.raises(ValueError, match=r"memory.bin: expected a file of exemplars, found one that does not begin"):
        load(b"PNG" + memory.file)
    with pytest.raises(
        ValueError, match=r"memory.bin: expected .* of this version, found one written by an older version"
    ):
        load(b"TFX1" + memory.file[4:])
    with pytest.raises(ValueError, match=r"memory.bin: expected exemplars of 3 classes, found 2"):
        ExemplarMemory(store, None).load(memory.file, 3, "memory.bin")
    other = RawStore((1, 16, 16)) if not isinstance(store, RawStore) else PillowStore((1, 16, 16), "jpeg", 10)
    with pytest.raises(ValueError, match=r"memory.bin: expected exemplars of kind \d, found kind \d"):
        load(memory.file, other)
    if isinstance(store, CodeStore):
        foreign = CodeStore(codec, STREAMS[store.kind - 1])
        foreign.model += 1
        with pytest.raises(ValueError, match=r"memory.bin: expected exemplars coded by model \w+, found model"):
            load(memory.file, foreign)


def test_images_of_another_kind_are_refused(store):
    for other in (images(3).float(), images(3)[..., :8]):
        with pytest.raises(ValueError, match=r"expected uint8 \[1, 16, 16\]"):
            ExemplarMemory(store, None).add([other])


def test_codes_that_do_not_come_back_are_stored_by_frequencies(codec, monkeypatch):
    store = CodeStore(codec, "bits_back")
    items = store.shrink(images(30))
    assert not store.fell_back(store.pack(items))
    memory = ExemplarMemory(store, None)
    memory.add([images(30)])
    assert not memory.fell_back

    def panics(codes):
        raise ValueError("30 samples can't be coded")

    for name, broken in (("unpack", lambda payload, count: items + 1), ("pack", panics)):
        with monkeypatch.context() as patch:
            patch.setattr(store.stream, name, broken)
            payload = store.pack(items)
            assert store.fell_back(payload)
            assert torch.equal(store.unpack(payload, 30), items)
            memory.add([images(30, seed=1)])
            assert memory.fell_back


def test_what_fits_is_found_in_few_trials(monkeypatch):
    store = RawStore((1, 16, 16))
    trials, write = [], ExemplarMemory._write
    monkeypatch.setattr(ExemplarMemory, "_write", lambda self, most: trials.append(most) or write(self, most))
    for allowed, expected in ((200 * 256, 200), (73 * 256, 73), (10**6, 300), (256, 1), (255, 0)):
        trials.clear()
        memory = ExemplarMemory(store, allowed)
        memory.add([torch.zeros(300, 1, 16, 16, dtype=torch.uint8)] * 2)
        assert memory.counts == [expected] * 2
        assert len(trials) <= 4


def test_jpeg_of_another_quality_is_refused():
    stores = [PillowStore((1, 16, 16), "jpeg", quality) for quality in (10, 50)]
    memory = ExemplarMemory(stores[0], None)
    memory.add([images(5)])
    with pytest.raises(ValueError, match="expected exemplars coded by model"):
        ExemplarMemory(stores[1], None).load(memory.file, 1, "a file")


def test_settings_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match="Unknown format='png'"):
        PillowStore((1, 8, 8), "png", 3)
    with pytest.raises(ValueError, match="bytes_per_class=-1"):
        ExemplarMemory(RawStore((1, 8, 8)), -1)
