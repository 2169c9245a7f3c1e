"""Rewards that an agent gives itself for what it has not seen, to explore with.

Dimensions: N batch, O observation, H features that are predicted.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.checks import Count, Positive, Size, checked, vector_size
from components.distributed import gather_rows
from components.networks.ensemble import EnsembleMLP


@checked
class RandomNetworkDistillation(nn.Module):
    """The error of a network that learns what another, random one says of observations (arXiv 1810.12894).

    It falls where observations come again and again. Observations are normalised by the mean and deviation of the whole
    batch, and clamped; rewards are errors over their standard deviation in all batches so far. This is the form that
    explores in the study of offline data (arXiv 2403.13097).

    Args:
        observation_shape: O.
        features: H.
        hidden_dim, layers: of both networks.
        clamp: bound of the normalised observations.
    """

    def __init__(
        self,
        observation_shape: Sequence[Count],
        features: Size = 512,
        hidden_dim: Size = 256,
        layers: Size = 2,
        clamp: Positive = 5.0,
    ) -> None:
        super().__init__()
        if len(observation_shape) != 1:
            raise ValueError(
                f"module.intrinsic_reward: expected vectors as observations, found pictures {list(observation_shape)}."
            )
        size = vector_size(observation_shape)
        networks = [EnsembleMLP(size, features, hidden_dim=hidden_dim, layers=layers, last_gain=1.0) for _ in range(2)]
        self.predictor, self.target = networks[0], networks[1].requires_grad_(False)
        self.clamp = clamp
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("squares", torch.zeros((), dtype=torch.float64))  # of differences from the mean, summed

    def errors(self, observation: Tensor) -> Tensor:
        """[N, O] -> [N]: the mean square over features, with its gradient for the predictor."""
        std, mean = torch.std_mean(gather_rows(observation), 0, correction=0)
        x = ((observation - mean) / (std + 1e-5)).clamp(-self.clamp, self.clamp)
        return (self.predictor(x) - self.target(x)).squeeze(0).square().mean(-1)

    @torch.no_grad()
    def rewards(self, errors: Tensor) -> Tensor:
        """[N] -> [N, 1]; these errors count from now on."""
        batch = gather_rows(errors.detach()).double()
        count, difference = self.count + len(batch), batch.mean() - self.mean
        self.squares += (batch - batch.mean()).square().sum() + difference.square() * self.count * len(batch) / count
        self.mean += difference * len(batch) / count
        self.count.copy_(count)
        std = (self.squares / self.count).sqrt().to(errors.dtype)
        return (errors.detach() / (std + 1e-8)).unsqueeze(-1)
