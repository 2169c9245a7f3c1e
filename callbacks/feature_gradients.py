"""What the critics' loss asks of an encoder's feature maps, as pictures and as a score of their roughness."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only

from components.checks import Size, checked
from components.files import replacing
from components.networks.signal_mixing import discontinuity_score


@checked
class FeatureGradients(L.Callback):
    """Scores the gradient of the critics' loss at the encoder's features, and draws it when the run is over.

    The gradient is the mean over a batch of training data, the same at every evaluation of data that do not change,
    with the encoder in evaluation mode. Adds `feature_gradient/nd`, the robust score that tunes signal mixing, and in
    the end `feature_gradient/nd_paper`, the paper's definition without logarithm, which outliers govern. Writes
    `folder/feature_gradients.png`: the maps with the largest gradients, each on a scale of its own.

    Any module will do that has `feature_gradient(batch)` and an `encoder` with a `feature_shape`, and any datamodule
    that has `probe(count)`.

    Args:
        folder: where the picture is written.
        samples: in the batch.
        maps: drawn.
    """

    metric_names = ("feature_gradient/*",)

    def __init__(self, folder: str | Path, samples: Size = 256, maps: Size = 8) -> None:
        self.folder = Path(folder)
        self.samples = samples
        self.maps = maps
        self._gradient: torch.Tensor | None = None

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        found = type(module).__name__
        if not hasattr(getattr(module, "encoder", None), "feature_shape"):
            raise ValueError(f"callbacks.feature_gradients: expected a module with a picture encoder, found {found}.")
        if not hasattr(trainer.datamodule, "probe"):
            found = type(trainer.datamodule).__name__
            raise ValueError(f"callbacks.feature_gradients: expected transitions to look at, found {found} without.")

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._measure(trainer.datamodule, module, {"nd": True})

    def on_test_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._measure(trainer.datamodule, module, {"nd": True, "nd_paper": False})

    def _measure(self, data: Any, module: Any, scores: Mapping[str, bool]) -> None:
        batch = data.probe(self.samples)
        if batch is None:
            return
        with module.evaluation():
            gradient = module.feature_gradient(batch.to(module.device))[None]
        found = {name: discontinuity_score(gradient, robust).item() for name, robust in scores.items()}
        module.add_scores({f"feature_gradient/{name}": [score] for name, score in found.items()})
        self._gradient = gradient[0].float().cpu()

    @rank_zero_only
    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._gradient is None:
            return
        from matplotlib.figure import Figure

        strength = self._gradient.flatten(1).norm(dim=1)
        chosen = strength.argsort(descending=True)[: self.maps].tolist()
        figure = Figure(figsize=(1.5 * len(chosen), 1.7), layout="constrained")
        for axis, index in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen):
            largest = self._gradient[index].abs().max().item() or 1.0
            axis.imshow(self._gradient[index].numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
            axis.set_axis_off()
            axis.set_title(f"map {index}", fontsize=8)
        with replacing(self.folder / "feature_gradients.png") as temporary:
            figure.savefig(temporary, dpi=110)
