"""Networks that commute with a reflection of what they are given.

Dimensions: N batch, `in` and `out` features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.checks import Count, checked
from components.networks.ensemble import EnsembleMLP


@dataclass(frozen=True)
class Reflection:
    """A signed permutation that is its own inverse: y_i = sign_i x_{source_i}.

    Attributes:
        source, sign: of each coordinate.
    """

    source: Sequence[int]
    sign: Sequence[float]

    def __post_init__(self) -> None:
        pairs = list(zip(self.source, self.sign))
        own = len(self.source) == len(self.sign) and sorted(self.source) == list(range(len(self.source)))
        if not own or any(self.source[j] != i or s * self.sign[j] != 1 for i, (j, s) in enumerate(pairs)):
            raise ValueError(
                f"source={list(self.source)}, sign={list(self.sign)}: expected a signed permutation that is its own "
                "inverse."
            )

    def __call__(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        return x[..., list(self.source)] * torch.tensor(list(self.sign), dtype=x.dtype, device=x.device)


@checked
class ReflectedNetwork(nn.Module):
    """A network that commutes with reflections, f(R_in x) = R_out f(x): f(x) = (g(x) + R_out g(R_in x)) / 2.

    [N, in] -> [1, N, out]. Without a reflection of the output, f is what the reflection does not change.

    Args:
        network: makes g, called with in_features and out_features.
        inputs, outputs: R_in and R_out; None for the identity.
    """

    def __init__(
        self,
        in_features: Count,
        out_features: Count,
        inputs: Reflection,
        outputs: Reflection | None = None,
        network: Callable[..., nn.Module] = EnsembleMLP,
    ) -> None:
        super().__init__()
        for name, reflection, size in (("inputs", inputs, in_features), ("outputs", outputs, out_features)):
            if reflection is not None and len(reflection.source) != size:
                raise ValueError(f"{name}: expected a reflection of {size} numbers, found {len(reflection.source)}.")
        self.network = network(in_features, out_features)
        self._keep("inputs", inputs)
        self._keep("outputs", outputs)

    def _keep(self, name: str, reflection: Reflection | None) -> None:
        setattr(self, f"{name}_reflection", reflection)
        known = reflection is not None
        source = torch.tensor(list(reflection.source)) if known else None
        self.register_buffer(f"{name}_source", source, persistent=False)
        self.register_buffer(f"{name}_sign", torch.tensor(list(reflection.sign)) if known else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        own, other = self.network(torch.cat([x, x[:, self.inputs_source] * self.inputs_sign])).chunk(2, 1)
        if self.outputs_source is not None:
            other = other[..., self.outputs_source] * self.outputs_sign
        return (own + other) / 2
