"""Images per second of discrete representation replay: coding by bits back, and training the autoencoder.

Codes of Fashion-MNIST's size (80 codes of 64 values for an image) or of CIFAR's (80 of 512), by networks of random
weights, which take as long as trained ones:

    python -m benchmarks.coding_speed --images 2000
"""

import argparse
import itertools
import os
import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.vector_coder import VectorCoder
from components.coding.bits_back import BitsBackCoder
from components.coding.code_models import CategoricalVAE
from components.coding.vqvae import HierarchicalVQVAE

SIZES = {
    "Fashion-MNIST": ((1, 28, 28), {"codes": 64, "dim": 16, "width": 32, "blocks": 1, "block_width": 16}, 48),
    "CIFAR": ((3, 32, 32), {"codes": 512, "dim": 64, "width": 128, "blocks": 2, "block_width": 32}, 64),
}


class TimedCoder(BitsBackCoder):
    """Adds up the seconds that its networks take."""

    seconds = 0.0

    def _rounded(self, *arguments: Any) -> Any:
        return self._timed(super()._rounded, *arguments)

    def _probabilities(self, *arguments: Any) -> Any:
        return self._timed(super()._probabilities, *arguments)

    def _timed(self, function: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        self.seconds += time.perf_counter() - began
        return result


def report_coding(name: str, images: int) -> None:
    shape, sizes, width = SIZES[name]
    torch.manual_seed(0)
    shapes = HierarchicalVQVAE(shape, **sizes).code_shapes
    model = CategoricalVAE(shapes, sizes["codes"], width).double().eval().requires_grad_(False)
    codes = torch.randint(sizes["codes"], (images, model.symbols))
    for block in (1, 10, 100):
        coder = TimedCoder(model, block)
        line = f"  {name}, block {block:3d}:"
        began = time.perf_counter()
        coded = coder.encode(codes)
        for what in ("encode", "decode"):
            if what == "decode":
                began = time.perf_counter()
                assert torch.equal(coder.decode(coded.words, images), codes)
            seconds = time.perf_counter() - began
            line += f" {what} {images / seconds:6.0f} images/s, {100 * coder.seconds / seconds:.0f} % in networks;"
            coder.seconds = 0.0
        print(line.rstrip(";"), flush=True)


class BinaryVAE(nn.Module):
    """Of binary images of 28x28, the model that bits back is compared by since BB-ANS."""

    symbols, latents = 784, (40,)

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 80))
        self.decoder = nn.Sequential(nn.Linear(40, 100), nn.ReLU(), nn.Linear(100, 784))

    def infer(self, layer: int, below: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = self.encoder(below.double()).chunk(2, -1)
        return mean, (0.5 * log_variance).exp()

    def logits(self, above: torch.Tensor) -> torch.Tensor:
        on = self.decoder(above)
        return torch.stack([torch.zeros_like(on), on], -1)


def report_beside_a_vector(images: int, rounds: int = 9) -> None:
    """One stack for all images beside a coder for each pixel of a batch of 100: medians of rounds of both."""
    torch.manual_seed(0)
    model = BinaryVAE().double().eval().requires_grad_(False)
    x = (torch.rand(images - images % 100, 784) < 0.2).long()
    stack, vector = BitsBackCoder(model, 100), VectorCoder(model, 100)
    seconds: list[list[float]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(rounds):
        began = [time.perf_counter()]
        coded = stack.encode(x)
        began.append(time.perf_counter())
        decoded = [stack.decode(coded.words, len(x))]
        began.append(time.perf_counter())
        vectors = vector.encode(x)
        began.append(time.perf_counter())
        bits = vectors.bits
        decoded.append(vector.decode(vectors, len(x)))
        began.append(time.perf_counter())
        assert all(torch.equal(each, x) for each in decoded)
        seconds.append([after - before for before, after in itertools.pairwise(began)])
    torch.set_num_threads(threads)
    encode, decode, other_encode, other_decode = (1e6 * statistics.median(each) / len(x) for each in zip(*seconds))
    ratios = [statistics.median(each[2 + part] / each[part] for each in seconds) for part in (0, 1)]
    sizes = [32 * len(coded.words) / len(x), bits / len(x)]
    for name, times, size in zip(("one stack", "as vectors"), ((encode, decode), (other_encode, other_decode)), sizes):
        print(
            f"  binary 28x28, blocks of 100, {name}: encode {times[0]:.0f} us an image, decode {times[1]:.0f} us, "
            f"{size:.0f} bits stored for each",
            flush=True,
        )
    print(f"  the vectors' time over the stack's: encode {ratios[0]:.2f}, decode {ratios[1]:.2f}", flush=True)


def report_training(name: str, batch: int, seconds: float) -> None:
    shape, sizes, _ = SIZES[name]
    autoencoder = HierarchicalVQVAE(shape, **sizes)
    optimizer = torch.optim.Adam(autoencoder.parameters(), 1e-3)
    images = torch.randint(256, (batch, *shape), dtype=torch.uint8)

    def step() -> None:
        out = autoencoder(images)
        loss = (out.images - autoencoder.scaled(images)).square().mean() + 0.25 * out.commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        step()
        steps += 1
    speed = steps * batch / (time.perf_counter() - began)
    print(f"  {name}: training the autoencoder, batch {batch}: {speed:.0f} images/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="coded in one stream (default 2000)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of training for each size (default 10)")
    arguments = parser.parse_args()
    print(f"discrete representation replay on {len(os.sched_getaffinity(0))} cores; coding runs on one thread")
    report_beside_a_vector(arguments.images)
    for report in (
        partial(report_coding, images=arguments.images),
        partial(report_training, batch=64, seconds=arguments.seconds),
    ):
        for name in SIZES:
            report(name)


if __name__ == "__main__":
    main()
