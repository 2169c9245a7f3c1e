"""Data-parallel training in which the method itself averages its gradients."""

from lightning.pytorch.strategies import DDPStrategy


class ExplicitDDP(DDPStrategy):
    """Launches and connects processes as Lightning's DDP does, but leaves the module unwrapped.

    Methods make several optimiser steps in an update, with losses that reach different parameters; they average the
    gradients of each step themselves (`LearningMethod.minimise`), so no hook has to guess which backward pass counts.
    """

    def configure_ddp(self) -> None:
        """Nothing to configure: the module stays as it is."""
