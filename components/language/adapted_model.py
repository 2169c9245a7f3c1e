"""A pretrained language model with an adapter, as a module whose state is what the adapter trains."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from components.language.adapters import Adapter, SingularValueAdapter
from components.language.experts import Expert
from components.language.models import Completions, PretrainedFolder, complete, complete_surely
from components.language.singular_values import unscaled


class AdaptedModel(nn.Module):
    """A frozen language model and what is trained in it. Its state holds the latter alone.

    Args:
        folder: of the pretrained model.
        adapter: adapts it, called with the model; None for the model as it is.
        dtype: of the frozen weights, see `PretrainedFolder.model`.
    """

    def __init__(
        self, folder: PretrainedFolder, adapter: Callable[..., Adapter] | None = None, dtype: str = "float32"
    ) -> None:
        super().__init__()
        self.model = folder.model(dtype).requires_grad_(False)
        self.base_checksum = folder.checksum
        self.adapter = None if adapter is None else adapter(self.model)
        self.sharded = False
        self._trained = {name for name, each in self.named_parameters() if each.requires_grad}
        self._register_state_dict_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_forgive_frozen)

    def refresh(self) -> None:
        """Let the model be that of the present parameters."""
        if self.adapter is not None:
            self.adapter.refresh()

    def shard(self, mesh: DeviceMesh) -> None:
        """Split the frozen weights over a mesh's processes, once, block by block; what is trained stays whole in each.

        Raises:
            ValueError: the adapter needs whole weights.
        """
        if self.adapter is not None and self.adapter.unshardable is not None:
            raise ValueError(f"{self.adapter.unshardable} where weights are split over processes.")
        if self.sharded:
            return
        trained = set() if self.adapter is None else set(self.adapter.parameters.values())
        for block in self.model.get_decoder().layers:
            fully_shard(block, mesh=mesh, ignored_params=trained)
        fully_shard(self.model, mesh=mesh, ignored_params=trained)
        self.sharded = True

    def complete(self, prompt: Tensor, mask: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        """Completions by the model as it is now, see `components.language.models.complete`."""
        return complete(self.model, *self._here(prompt, mask), in_step=self.sharded, **settings)

    def complete_surely(self, prompt: Tensor, mask: Tensor, **settings: Any) -> Completions:
        """The likeliest completions, see `components.language.models.complete_surely`."""
        return complete_surely(self.model, *self._here(prompt, mask), in_step=self.sharded, **settings)

    def _here(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(self.model.device) for tensor in tensors]

    def check_base(self, checksum: str) -> None:
        """Raise a ValueError if what is to be loaded was trained in another frozen model."""
        if checksum != self.base_checksum:
            raise ValueError(
                f"The checkpoint adapts the model {checksum}, expected {self.base_checksum}, that of language_model."
            )

    # -- experts ------------------------------------------------------------------------------------------------------

    @property
    def has_expert(self) -> bool:
        """Whether what is trained makes an expert vector."""
        return isinstance(self.adapter, SingularValueAdapter)

    @property
    def singular_values(self) -> SingularValueAdapter:
        """The adapter, if it is the one that experts are of."""
        if not self.has_expert:
            raise ValueError("adapter: expected svf, the only one that has expert vectors.")
        return self.adapter

    def expert(self, task: str) -> Expert:
        """What is trained, as an expert vector."""
        scales = {name: z.detach().float().cpu() for name, z in self.singular_values.scales().items()}
        return Expert(scales, self.base_checksum, task, *self._way())

    def _way(self) -> tuple[float | None, str]:
        """The largest z that a sigmoid gives, None without, and what is rescaled."""
        scaling = next(iter(self.singular_values.scalings.values()))
        return scaling.max_scale if scaling.parametrization == "sigmoid" else None, scaling.rescale

    @torch.no_grad()
    def load_expert(self, expert: Expert) -> None:
        """Train on from an expert vector.

        Raises:
            ValueError: it adapts other matrices.
        """
        adapter = self.singular_values
        self.check_expert(expert)
        for name, scaling in adapter.scalings.items():
            z = expert.scales[name].to(scaling.s)
            sigmoid = scaling.parametrization == "sigmoid"
            adapter.parameters[name].copy_(unscaled(z, scaling.max_scale) if sigmoid else z)

    def check_expert(self, expert: Expert) -> None:
        """Raise a ValueError if an expert adapts other matrices than this model has adapted, or in another way."""
        if (expert.largest, expert.rescale) != self._way():
            raise ValueError(
                f"The expert of {expert.task} was trained with {_named(expert.largest, expert.rescale)}, expected "
                f"{_named(*self._way())}."
            )
        found = {name: list(z.shape) for name, z in expert.scales.items()}
        expected = {name: list(p.shape) for name, p in self.singular_values.parameters.items()}
        if found != expected:
            raise ValueError(
                f"The expert of {expert.task} adapts {len(found)} matrices, expected the {len(expected)} that "
                "adapter.modules and adapter.layers choose."
            )


def _named(largest: float | None, rescale: str) -> str:
    parametrization = "direct" if largest is None else f"sigmoid up to {largest:g}"
    return f"adapter.rescale={rescale} and parametrization={parametrization}"


def _drop_frozen(module: AdaptedModel, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in list(state):
        if name.startswith(prefix) and name.removeprefix(prefix) not in module._trained:
            del state[name]


def _forgive_frozen(module: AdaptedModel, keys: Any) -> None:
    every = {*dict(module.named_parameters(remove_duplicate=False)), *dict(module.named_buffers())}
    frozen = every - module._trained
    keys.missing_keys[:] = [
        key for key in keys.missing_keys if not any(key == name or key.endswith(f".{name}") for name in frozen)
    ]
