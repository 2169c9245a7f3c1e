"""Policies that were learned, from files of weights: the skilled part of data sets.

Dimensions: N rows (environments), O observation, A action.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from components.control.actors import GaussianActor
from components.files import check_file, is_damage
from components.networks.ensemble import EnsembleMLP

BEHAVIOURS = Path(__file__).resolve().parents[2] / "behaviours"
"""Policies that ship with the project, in folders with a manifest each."""

_PREFIX = "actor."


def load_policy(path: str | Path) -> GaussianActor:
    """The tanh-Gaussian actor of a file that `callbacks.policy_export.PolicyExport` wrote, of any width and depth.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds another kind of policy.
    """
    path = Path(path)
    check_file(path, "a policy's weights")
    try:
        state = {name.removeprefix(_PREFIX): value for name, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        if not is_damage(error):
            raise
        raise ValueError(f"{path}: expected a policy's weights, found a damaged file ({error}).") from None
    weights = [value for name, value in state.items() if name.endswith(".weight")]
    other = ValueError(f"{path}: expected the weights of a tanh-Gaussian actor, found {', '.join(state)}.")
    if not weights or any(weight.dim() != 3 for weight in weights):
        raise other
    (_, observation_dim, hidden_dim), outputs = weights[0].shape, weights[-1].shape[-1]
    network = partial(EnsembleMLP, hidden_dim=hidden_dim, layers=len(weights) - 1)
    actor = GaussianActor(observation_dim, outputs // 2, network)
    try:
        actor.load_state_dict(state)
    except RuntimeError:
        raise other from None
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(f"{path}: expected finite weights, found others.")
    return actor.requires_grad_(False).eval()


class TrainedPolicies(nn.Module):
    """Drives as many rows with each of several policies, with the noise that they explored with.

    Args:
        paths: their files.
        rows: of each; the first policy drives the first so many.
    """

    def __init__(self, paths: Sequence[str | Path], rows: int) -> None:
        super().__init__()
        self.policies = nn.ModuleList(map(load_policy, paths))
        self.rows = rows

    def forward(self, observation: Tensor) -> Tensor:
        """[N, O] -> [N, A]."""
        return torch.cat([policy.explore(own) for policy, own in zip(self.policies, observation.split(self.rows))])
