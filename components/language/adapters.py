"""What is trained in a frozen model: scales of singular values, low-rank updates, channel scales, or weights.

Scales of singular values are for any module with linear layers, the others for transformers.

Dimensions: o rows and i columns of a weight, r = min(o, i).
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from components.buildable import buildable
from components.checks import Positive, Size, checked
from components.language.singular_values import SVD, SingularValueScaling, decompose, factorise
from components.networks.ensemble import EnsembleLinear

MODULES = {
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "v_proj"),
    "both": ("gate_proj", "up_proj", "down_proj", "q_proj", "v_proj"),
}
EVERY = "linear"
LAYERS = ("all", "upper_half")


def select_linears(
    model: nn.Module,
    modules: str | Sequence[str] = "mlp",
    layers: str = "all",
    ensembles: bool = False,
) -> dict[str, nn.Module]:
    """Linear layers of a model by name, in the model's order.

    Args:
        model: a transformer, whose blocks are numbered, as in ``model.layers.7.mlp.up_proj``, or any module.
        modules: of a transformer ``mlp``, ``attention`` (queries and values) or ``both``; of any module ``linear`` for
            all linear layers it has, or the last parts of names.
        layers: blocks of a transformer, ``all`` or the ``upper_half``.
        ensembles: also `EnsembleLinear`, but not where it keeps its own spectral norm.
    """
    if isinstance(modules, str) and modules not in (*MODULES, EVERY):
        known = ", ".join((*MODULES, EVERY))
        raise ValueError(f"Unknown modules={modules!r}: expected one of {known}, or a list of names.")
    if layers not in LAYERS:
        raise ValueError(f"Unknown layers={layers!r}: expected one of {', '.join(LAYERS)}.")
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | EnsembleLinear) and parametrize.is_parametrized(layer):
            raise ValueError(
                f"{name}: expected weights that are not adapted yet, found some that are; unload those first."
            )
    wanted = MODULES.get(modules) if isinstance(modules, str) else tuple(modules)
    found = {
        name: layer
        for name, layer in model.named_modules()
        if (isinstance(layer, nn.Linear) or (ensembles and type(layer) is EnsembleLinear))
        and (wanted is None or name.rsplit(".", 1)[-1] in wanted)
    }
    if layers == "upper_half":
        blocks = {name: _block(name) for name in found if _block(name) is not None}
        half = (max(blocks.values(), default=0) + 1) // 2
        found = {name: found[name] for name, block in blocks.items() if block >= half}
    if not found:
        raise ValueError(
            f"modules={modules}: expected linear layers of such names in the model, found none; modules={EVERY} takes "
            "all it has."
        )
    return found


def _block(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", f".{name}")
    return int(found[1]) if found else None


@buildable()
class Adapter(ABC):
    """Makes a model trainable in a few places. The model is frozen, and in evaluation mode.

    Attributes:
        model: the adapted one.
        parameters: trained ones by name.
        unshardable: why the frozen weights can't be split over processes; None if they can.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    unshardable: str | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    def refresh(self) -> None:  # noqa: B027 - most models need nothing
        """Let the model be that of the present parameters, at the least cost for many passes."""

    def leaves(self) -> list[Tensor]:
        """What the refreshed model's losses are to be differentiated by; losses of several passes add up there."""
        return list(self.parameters.values())

    def gradients(self, of_leaves: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of `parameters` from those of `leaves`."""
        return list(of_leaves)

    @contextmanager
    @abstractmethod
    def base(self) -> Iterator[None]:
        """Inside, the model is what it was before it was adapted, to the bit."""

    def count(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())


@buildable(writes="cache")
class SingularValueAdapter(Adapter):
    """Scales the singular values of linear layers; of ensembles those of each member.

    The adapted module is an ordinary function of `parameters`, for any optimiser. `refresh` and `leaves` are for losses
    of many passes.

    Args:
        model: a transformer, or with `modules="linear"` any module with linear layers, such as an actor.
        modules, layers: see `select_linears`.
        cache: folder for decompositions; None for none.
        factorised: apply factors one after the other instead of composing weights: for few tokens less work, and no
            memory for gradients of weights. They are kept in the weights' precision, in which they are applied.
        settings: of `SingularValueScaling`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        modules: str | Sequence[str] = "mlp",
        layers: str = "all",
        cache: str | Path | None = None,
        factorised: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(model)
        self.layers = select_linears(model, modules, layers, ensembles=not factorised)
        self.factorised = factorised
        self.unshardable = None if factorised else "adapter.factorised=false: expected true"
        self.scalings: dict[str, SingularValueScaling] = {}
        bar = tqdm(self.layers.items(), "Decomposing weights once", leave=False, delay=2, disable=None)
        for name, layer in bar:
            svd = decompose(layer.weight, cache)
            if factorised:
                svd = SVD(svd.u.to(layer.weight.dtype), svd.s, svd.vh.to(layer.weight.dtype))
            scaling = SingularValueScaling(layer.weight, svd, **settings)
            parametrize.register_parametrization(layer, "weight", scaling)
            if factorised:
                factorise(layer)
            self.scalings[name] = scaling
        self.parameters = {name: layer.parametrizations.weight.original0 for name, layer in self.layers.items()}
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self._composed_of: Any = None

    @torch.no_grad()
    def scales(self) -> dict[str, Tensor]:
        """z [r] of each layer as trained, by name."""
        return {name: self.scalings[name].scales(p) for name, p in self.parameters.items()}

    def refresh(self) -> None:
        state = [(p.data_ptr(), p._version) for p in self.parameters.values()]
        if self.factorised:
            for scaling in self.scalings.values():
                scaling.fixed = None
        elif self._composed_of != state:
            self.use(self.scales())
            self._composed_of = state

    @torch.no_grad()
    def use(self, scales: Mapping[str, Tensor]) -> None:
        """Let the model be that of these z [r], of which the parameters know nothing, until `refresh`."""
        self._composed_of = None
        for name, scaling in self.scalings.items():
            z = scales[name].to(self.parameters[name])
            if self.factorised:
                scaling.fixed = z
            else:
                scaling.held = None  # one after the other: there need not be room for all weights twice
                scaling.held = scaling.compose(z).requires_grad_()

    def leaves(self) -> list[Tensor]:
        return super().leaves() if self.factorised else [scaling.held for scaling in self.scalings.values()]

    def gradients(self, of_leaves: Sequence[Tensor]) -> list[Tensor]:
        if self.factorised:
            return super().gradients(of_leaves)
        triples = zip(self.scalings.values(), self.parameters.values(), of_leaves)
        return [scaling.pull_back(p, gradient) for scaling, p, gradient in triples]

    @contextmanager
    def base(self) -> Iterator[None]:
        for scaling in self.scalings.values():
            scaling.is_base = True
        try:
            yield
        finally:
            for scaling in self.scalings.values():
                scaling.is_base = False

    def unload(self) -> nn.Module:
        """The model as it was before; the adapter is of no more use."""
        for name, layer in self.layers.items():
            if self.factorised:
                layer.__class__ = type(layer).__base__
            self.scalings[name].is_base = True
            parametrize.remove_parametrizations(layer, "weight")
        return self.model


@checked
class LowRankAdapter(Adapter):
    """LoRA, DoRA or IA3, by the library `peft`.

    Args:
        model: a transformer.
        kind: ``lora``, ``dora`` (LoRA and magnitudes of columns) or ``ia3`` (multipliers of keys, values and the MLP's
            hidden channels).
        modules, layers: see `select_linears`; for ``ia3``, which has its own modules, only layers count.
        rank, alpha: of low-rank updates, which are scaled by alpha / rank.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: str = "lora",
        modules: str | Sequence[str] = "attention",
        layers: str = "all",
        rank: Size = 16,
        alpha: Positive = 32.0,
    ) -> None:
        from peft import IA3Config, LoraConfig, inject_adapter_in_model

        super().__init__(model)
        if kind not in ("lora", "dora", "ia3"):
            raise ValueError(f"Unknown kind={kind!r}: expected lora, dora or ia3.")
        if kind == "ia3":
            names = list(select_linears(model, ("k_proj", "v_proj", "down_proj"), layers))
            hidden = [name for name in names if name.endswith("down_proj")]
            config = IA3Config(target_modules=names, feedforward_modules=hidden)
        else:
            names = list(select_linears(model, modules, layers))
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, use_dora=kind == "dora")
        inject_adapter_in_model(config, model)
        model.eval()
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()  # in half precision most steps of training would vanish

    @contextmanager
    def base(self) -> Iterator[None]:
        layers = self._layers()
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def _layers(self) -> list[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer)]


class FullAdapter(Adapter):
    """Trains whole weights of linear layers, in single precision whatever the model's is.

    Args:
        model: a transformer.
        modules, layers: see `select_linears`.
    """

    unshardable = "adapter=full: expected an adapter beside frozen weights"

    def __init__(self, model: nn.Module, *, modules: str | Sequence[str] = "mlp", layers: str = "all") -> None:
        super().__init__(model)
        self.parameters = {}
        self._weights = []
        for name, layer in select_linears(model, modules, layers).items():
            weight = TrainedWeight(layer.weight)
            parametrize.register_parametrization(layer, "weight", weight)
            self.parameters[name] = layer.parametrizations.weight.original0.requires_grad_()
            self._weights.append(weight)

    @contextmanager
    def base(self) -> Iterator[None]:
        for weight in self._weights:
            weight.is_base = True
        try:
            yield
        finally:
            for weight in self._weights:
                weight.is_base = False


class TrainedWeight(nn.Module):
    """A parametrisation of a weight [o, i] by itself in single precision; with `is_base`, what it was before."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.before = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.is_base = False

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        return (weight.float(),)  # a tuple, for only then may it have another precision than the weight

    def forward(self, weight: Tensor) -> Tensor:
        return self.before if self.is_base else weight.to(self.before.dtype)
