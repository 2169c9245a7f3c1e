"""Training a codec of images: first the discrete autoencoder, then a model of its codes.

Jiang, Cetin and Celiktutan, arXiv 2104.10588, steps 1 and 2.

Dimensions: B images, C channels, H height and width, n images.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from components.checks import Count, LearningRate, NonNegative, Positive, Share, Size, checked
from components.coding.code_models import place_frequencies
from components.coding.image_codec import ImageCodec
from components.coding.vector_quantizer import perplexity
from lightning_modules.base import LearningMethod


@checked
class ImageCodecTraining(LearningMethod):
    """Learns an `ImageCodec` from images [B, C, H, H] uint8.

    The first `autoencoder_updates` minimise the mean squared error of reconstructions and the commitment to codes. Then
    the autoencoder is frozen, the code model begins at the frequencies of all training images' codes, and learns
    theirs. Both learning rates fall linearly, to a tenth and to zero.

    Args:
        image_shape: (C, H, H).
        codec: makes the codec, called with `image_shape`.
        autoencoder_updates: updates of the first part.
        commitment: weight of the commitment, beta.
        autoencoder_learning_rate, code_model_learning_rate: Adam's.
        latent_warmup: share of the second part over which the weight of the latents' bits rises to 1.
        max_norm: of the code model's gradient.
        augmentation: of a batch of images while the autoencoder learns; None for none.
        settings: further arguments of `LearningMethod`.
    """

    progress_bar_metrics = ("squared_error", "rate")

    def __init__(
        self,
        image_shape: Sequence[Size],
        *,
        codec: Callable[..., ImageCodec],
        autoencoder_updates: Count,
        commitment: NonNegative = 0.25,
        autoencoder_learning_rate: LearningRate = 1e-3,
        code_model_learning_rate: LearningRate = 2e-3,
        latent_warmup: Share = 0.3,
        max_norm: Positive = 1.0,
        augmentation: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if autoencoder_updates >= self.total_updates:
            raise ValueError(
                f"updates={self.total_updates}: expected more than autoencoder_updates={autoencoder_updates}, the rest "
                "being those of the code model."
            )
        if autoencoder_updates % self.updates_per_step:
            raise ValueError(
                f"autoencoder_updates={autoencoder_updates} is no multiple of updates_per_step={self.updates_per_step}."
            )
        self.codec = codec(image_shape=image_shape)
        self.autoencoder_updates = autoencoder_updates
        self.commitment = commitment
        self.latent_warmup = latent_warmup
        self.max_norm = max_norm
        self.augmentation = nn.Identity() if augmentation is None else augmentation
        self.register_buffer("latent_weight", torch.zeros(()))  # compiled updates read it where it lies
        self.autoencoder_optimizer = self.register_optimizer(
            torch.optim.Adam(
                [each for each in self.codec.autoencoder.parameters() if each.requires_grad], autoencoder_learning_rate
            )
        )
        self.code_model_optimizer = self.register_optimizer(
            torch.optim.Adam(self.codec.code_model.parameters(), code_model_learning_rate)
        )

    def schedule(self) -> dict[str, bool]:
        return {"autoencoder": self.updates < self.autoencoder_updates}

    def begin_codes(self, images: Tensor) -> None:
        """The autoencoder is learned: from here on its codes of these training images [n, C, H, H] are."""
        if self.codec.frozen_autoencoder:
            return
        self.codec.freeze_autoencoder()
        if self.updates == self.autoencoder_updates:
            frequencies = place_frequencies(self.codec.encode(images), self.codec.autoencoder.codes)
            self.codec.frequencies.copy_(frequencies)
            self.codec.code_model.begin(self.codec.frequencies)

    def learning_rate_factors(self) -> list[float]:
        first, second = self._progress()
        return [1 - 0.9 * first, 1 - second]

    def _progress(self) -> tuple[float, float]:
        """Shares of both parts that are done."""
        first, second = self.autoencoder_updates, self.total_updates - self.autoencoder_updates
        return min(1.0, self.updates / first), max(0, self.updates - first) / second

    def training_step(self, batch: TensorDict, batch_idx: int) -> None:
        share = self._progress()[1]
        self.latent_weight.fill_(min(1.0, share / self.latent_warmup) if self.latent_warmup else 1.0)
        super().training_step(batch, batch_idx)

    def update(self, batch: TensorDict, autoencoder: bool) -> TensorDict:
        images = batch["image"]
        if autoencoder:
            images = self.augmentation(images)
            out = self.codec.autoencoder(images)
            error = (out.images - self.codec.autoencoder.scaled(images)).square().mean()
            self.minimise(error + self.commitment * out.commitment, self.autoencoder_optimizer)
            return TensorDict({"squared_error": error.detach(), "commitment": out.commitment.detach()})
        with torch.no_grad():
            codes = self.codec.autoencoder.encode(images)
        loss, rate = self.codec.code_model.loss(codes, self.latent_weight)
        self.minimise(loss, self.code_model_optimizer, self.max_norm)
        return TensorDict({"code_model_loss": loss.detach(), "rate": rate})

    def evaluate(self, task: Any) -> TensorDict:
        """What becomes of an evaluation task's images: codes, reconstructions, and -ELBO of each in bits."""
        codec, images = self.codec, task.images
        codes = codec.encode(images)
        rates = []
        for part in codes.split(500):
            data, latent = codec.code_model.rate(part.to(self.device))
            rates.append((data + latent.sum(1)).cpu())
        found = {"codes": codes, "reconstruction": codec.decode(codes), "rate": torch.cat(rates)}
        for name, level in zip(("top", "bottom"), codes.split(_sizes(codec), dim=1)):
            found[f"{name}_perplexity"] = perplexity(level, codec.autoencoder.codes)
        return TensorDict(found)


def _sizes(codec: ImageCodec) -> list[int]:
    return [height * width for height, width in codec.autoencoder.code_shapes]
