"""A value of states, learned from the data's actions alone (implicit Q-learning, arXiv 2110.06169).

Dimensions: N batch, F features.
"""

from collections.abc import Callable
from typing import Annotated

from torch import Tensor, nn

from components.checks import Count, Range, checked
from components.networks.ensemble import EnsembleMLP

Expectile = Annotated[float, Range(above=0, below=1)]

NEXT_VALUES = ("after", "before")


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """Mean over |tau - 1{d <= 0}| d^2, of any shape: least where tau of the squares' slopes lies above zero.

    Args:
        difference: d = target - prediction.
        expectile: tau; 0.5 gives half the mean squared error, values towards 1 the upper end of the targets.
    """
    weight = (difference > 0).to(difference.dtype) * (2 * expectile - 1) + (1 - expectile)
    return (weight * difference.square()).mean()


@checked
class StateValue(nn.Module):
    """V(s), an upper expectile of what the target critics say of the data's actions: [N, F] -> [N].

    With one, critics bootstrap from V and ask no action of the policy.

    Args:
        features: F.
        network: makes the network, called with in_features and out_features; [N, F] -> [1, N, 1].
        expectile: of the values of the data's actions in a state.
        next_value: critics bootstrap from V ``after`` its own step of the same update (arXiv 2403.13097), or from V
            ``before`` (arXiv 2110.06169).
    """

    def __init__(
        self,
        features: Count,
        network: Callable[[int, int], nn.Module] = EnsembleMLP,
        expectile: Expectile = 0.7,
        next_value: str = "after",
    ) -> None:
        super().__init__()
        if next_value not in NEXT_VALUES:
            raise ValueError(f"Unknown next_value={next_value!r}: expected one of {', '.join(NEXT_VALUES)}.")
        self.network = network(features, 1)
        self.expectile = expectile
        self.steps_first = next_value == "after"

    def forward(self, features: Tensor) -> Tensor:
        return self.network(features).squeeze(0).squeeze(-1)

    def loss(self, advantage: Tensor) -> Tensor:
        """The expectile loss, of differences [N] between what critics say and V."""
        return expectile_loss(advantage, self.expectile)
