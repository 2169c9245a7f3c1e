"""Policies that were learned, from files of weights: the skilled part of data sets.

Dimensions: N rows (environments), O observation, A action.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from components.control.actors import GaussianActor
from components.files import check_file, is_damage
from components.networks.ensemble import EnsembleMLP

BEHAVIOURS = Path(__file__).resolve().parents[2] / "behaviours"
"""Policies that ship with the project, in folders with a manifest each."""

_PREFIX = "actor."
_KIND = "tanh-Gaussian"


def save_policy(policy: nn.Module, path: str | Path) -> None:
    """Write the actor of a policy that `ActorCritic.policy` gives, which has to be one that `load_policy` gives back.

    Raises:
        ValueError: it is another.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in policy.state_dict().items()}
    metadata = {"actor": _KIND, "log_std_range": json.dumps(list(getattr(policy.actor, "log_std_range", ())))}
    _rebuilt(state, metadata, f"The policy of {type(policy.actor).__name__}")
    save_file(state, path, metadata)


def load_policy(path: str | Path) -> GaussianActor:
    """The tanh-Gaussian actor of a file that `save_policy` wrote, of any width and depth.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds another kind of policy.
    """
    path = Path(path)
    check_file(path, "a policy's weights")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        if not is_damage(error):
            raise
        raise ValueError(f"{path}: expected a policy's weights, found a damaged file ({error}).") from None
    return _rebuilt(state, metadata, str(path))


def _rebuilt(state: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> GaussianActor:
    """The actor whose policy has this state."""
    other = ValueError(f"{where}: expected a {_KIND} actor of linear layers alone, found {', '.join(state)[:200]}.")
    own = {name.removeprefix(_PREFIX): value for name, value in state.items()}
    try:
        low, high = json.loads(metadata["log_std_range"])
        names = sorted((name for name in own if name.endswith(".weight")), key=lambda name: int(name.split(".")[1]))
        (_, observation_dim, hidden_dim), outputs = own[names[0]].shape, own[names[-1]].shape[-1]
        network = partial(EnsembleMLP, hidden_dim=hidden_dim, layers=len(names) - 1)
        actor = GaussianActor(observation_dim, outputs // 2, network, log_std_range=(low, high))
        actor.load_state_dict(own)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
        raise other from None
    if metadata.get("actor") != _KIND:
        raise other
    if not all(value.isfinite().all() for value in own.values()):
        raise ValueError(f"{where}: expected finite weights, found others.")
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
