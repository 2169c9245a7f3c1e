"""Policies that were learned, from files of weights: the skilled part of data sets.

Dimensions: N rows (environments), O observation, A action.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from components.control.actors import Actor, ActorPolicy, GaussianActor, NormalActor
from components.control.normalisation import ObservationNormaliser
from components.files import check_file, is_damage
from components.networks.encoders import FlatObservations
from components.networks.ensemble import EnsembleMLP, activation_of
from components.networks.equivariant import ReflectedNetwork, Reflection

BEHAVIOURS = Path(__file__).resolve().parents[2] / "behaviours"
"""Policies that ship with the project, in folders with a manifest each."""

_KINDS: dict[str, tuple[type[Actor], tuple[str, ...]]] = {
    "tanh-Gaussian": (GaussianActor, ("log_std_range",)),
    "normal": (NormalActor, ("squash",)),
}
"""Actors that files know, and the settings that their weights do not tell."""
_REFLECTIONS = ("inputs", "outputs")
POLICY_SUFFIX = ".safetensors"


def save_policy(policy: nn.Module, path: str | Path, told: Mapping[str, Any] | None = None) -> None:
    """Write the actor of a policy that `ActorCritic.policy` or `ProximalPolicyOptimisation.policy` wraps.

    Args:
        policy: one that `load_policy` gives back: a tanh-Gaussian or a normal actor of linear layers alone, reflected
            or not, of observations as they are or normalised by what was seen.
        told: what whoever uses it has to know besides, as JSON; see `policy_settings`.

    Raises:
        ValueError: it is another.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in policy.state_dict().items()}
    metadata = {**_description(policy), **({"told": json.dumps(told)} if told else {})}
    _rebuilt(state, metadata, f"The policy of {type(policy.actor).__name__}")
    save_file(state, path, metadata)


def load_policy(path: str | Path, use: str = "explore") -> ActorPolicy:
    """The policy of a file that `save_policy` wrote, of any width and depth, [N, O] -> [N, A].

    Args:
        use: ``explore``, with its noise, or ``act``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds another kind of policy.
    """
    state, metadata = _read(path)
    return _rebuilt(state, metadata, str(path), use)


def policy_settings(path: str | Path) -> dict[str, Any]:
    """What `save_policy` was told of a policy; nothing for some.

    Raises:
        FileNotFoundError, ValueError: see `load_policy`.
    """
    try:
        told = json.loads(_read(path)[1].get("told", "{}"))
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise ValueError(f"{path}: expected what its policy was told as a mapping in JSON, found something else.")
    return told


def policy_weights(path: str | Path, method: nn.Module) -> dict[str, Tensor]:
    """The weights of a file that `save_policy` wrote, by the names that a learning method has for those of its policy.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another policy than the method's, if that has one.
    """
    state, _ = _read(path)
    policy = method.policy(exploring=True).module if hasattr(method, "policy") else nn.Module()
    places = {id(tensor): name for name, tensor in method.state_dict(keep_vars=True).items()}
    own = {name: places[id(tensor)] for name, tensor in policy.state_dict(keep_vars=True).items()}
    if odd := sorted(set(state) ^ set(own)):
        name = type(method).__name__
        raise ValueError(f"{path}: expected the weights of a policy such as {name}'s, found another: {odd[0]}.")
    return {own[name]: value for name, value in state.items()}


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = Path(path)
    check_file(path, "a policy's weights")
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        if not is_damage(error):
            raise
        raise ValueError(f"{path}: expected a policy's weights, found a damaged file ({error}).") from None


def _description(policy: nn.Module) -> dict[str, str]:
    """What the weights of a policy do not tell."""
    actor, told = policy.actor, {}
    for kind, (made, settings) in _KINDS.items():
        if type(actor) is made:
            told = {"actor": kind, **{name: getattr(actor, name) for name in settings}}
    network = getattr(actor, "network", None)
    if isinstance(network, ReflectedNetwork):
        for name in _REFLECTIONS:
            reflection = getattr(network, f"{name}_reflection")
            told[name] = None if reflection is None else [list(reflection.source), list(reflection.sign)]
        network = network.network
    if isinstance(network, EnsembleMLP):
        told["activation"] = activation_of(network)
    first = policy.encoder[0] if isinstance(policy.encoder, nn.Sequential) else None
    if isinstance(first, ObservationNormaliser):
        told |= {"bound": first.bound, "eps": first.eps}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in told.items()}


def _rebuilt(state: Mapping[str, Tensor], metadata: Mapping[str, str], where: str, use: str = "explore") -> ActorPolicy:
    """The policy that has this state."""
    try:
        policy = _made(state, metadata, use)
        policy.load_state_dict(state)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{where}: expected a {' or '.join(_KINDS)} actor of linear layers alone, found {', '.join(state)[:200]}."
        ) from None
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(f"{where}: expected finite weights, found others.")
    return policy.requires_grad_(False).eval()


def _made(state: Mapping[str, Tensor], metadata: Mapping[str, str], use: str) -> ActorPolicy:
    kind, settings = _KINDS[metadata["actor"]]
    reflected = "inputs" in metadata
    place = 3 if reflected else 2  # of a layer's number in its name
    layers = sorted(
        (name for name in state if name.startswith("actor.") and name.endswith(".weight")),
        key=lambda name: int(name.split(".")[place]),
    )
    (_, inputs, hidden_dim), outputs = state[layers[0]].shape, state[layers[-1]].shape[-1]
    network = partial(
        EnsembleMLP, hidden_dim=hidden_dim, layers=len(layers) - 1, activation=metadata.get("activation", "relu")
    )
    if reflected:
        own = {name: json.loads(metadata[name]) for name in _REFLECTIONS}
        own = {name: None if value is None else Reflection(*value) for name, value in own.items()}
        network = partial(ReflectedNetwork, network=network, **own)
    encoder: nn.Module = FlatObservations([inputs])
    if "bound" in metadata:
        scales = {name: json.loads(metadata[name]) for name in ("bound", "eps")}
        encoder = nn.Sequential(ObservationNormaliser([inputs], **scales), encoder)
    actions = outputs // 2 if kind is GaussianActor else outputs
    made = kind(inputs, actions, network, **{name: json.loads(metadata[name]) for name in settings})
    return ActorPolicy(encoder, made, use)


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
        return torch.cat([policy(own) for policy, own in zip(self.policies, observation.split(self.rows))])
