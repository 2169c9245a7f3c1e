"""Data-parallel training in which the method itself averages its gradients."""

import os
import threading
import time
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

LAUNCHER = "TENFOLD_LAUNCHER"


class ExplicitDDP(DDPStrategy):
    """Launches and connects processes as Lightning's DDP does, but leaves the module unwrapped.

    Methods make several optimiser steps in an update, with losses that reach different parameters; they average the
    gradients of each step themselves (`LearningMethod.minimise`), so no hook has to guess which backward pass counts.
    """

    def configure_ddp(self) -> None:
        """Nothing to configure: the module stays as it is."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            os.environ[LAUNCHER] = str(os.getpid())  # for the processes that this one starts
        elif LAUNCHER in os.environ:
            threading.Thread(target=_end_with, args=(int(os.environ[LAUNCHER]),), daemon=True).start()


class ExplicitFSDP(ExplicitDDP):
    """As `ExplicitDDP`, with the frozen weights of a large model split over all processes.

    What is trained is small, whole in each process, and averaged by the method.
    """

    def model_to_device(self) -> None:
        module = self.lightning_module
        assert module is not None
        module.shard(init_device_mesh(self.root_device.type, (self.world_size,)))
        super().model_to_device()
        # Nobody has these whole, to give them to the others.
        split = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, split)


def _end_with(launcher: int) -> None:
    """Before the processes have met, one whose launcher was killed would wait for it for half an hour."""
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)
