"""States of modules, as `state_dict` gives them: how two differ, and what one takes of another."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

TARGET = "target_"
"""What names of target networks begin with; what follows names the network that they are averages of."""

State = Mapping[str, Tensor]


def difference(saved: State, own: State) -> str | None:
    """The first tensor that two states do not have alike, as a clause; None if one can take those of the other."""
    for name in [*own, *saved]:
        shapes = [str(list(state[name].shape)) if name in state else "nothing" for state in (saved, own)]
        if shapes[0] != shapes[1]:
            return f"The checkpoint's {name} is {shapes[0]}, expected {shapes[1]}"
        if not torch.can_cast(saved[name].dtype, own[name].dtype):
            return f"The checkpoint's {name} is of {saved[name].dtype}, expected {own[name].dtype}"
    return None


def not_finite(state: State, weights: Collection[str]) -> str | None:
    """The name of a tensor with a NaN in it, or of weights that are infinite; None if there is none.

    What is no weight may begin at infinity, as the best of all values seen. One reading of the device for all tensors.
    """
    floating = {name: tensor.detach() for name, tensor in state.items() if tensor.is_floating_point()}
    if not floating:
        return None
    norms = torch.stack([norm.double() for norm in torch._foreach_norm(list(floating.values()))]).tolist()
    faults = (name for name, norm in zip(floating, norms) if math.isnan(norm) or (math.isinf(norm) and name in weights))
    return next(faults, None)


def select(saved: State, own: State, parts: Sequence[str] | None = None) -> dict[str, Tensor]:
    """What a module whose state is `own` takes of a saved one.

    Args:
        parts: modules by their names, such as ``encoder`` or ``critic.network``; None for all there is. Their targets
            go with them, and are copies of them where there are none in what was saved.

    Raises:
        ValueError: it is not of the same names and shapes; says which parts are.
    """
    chosen = saved, own
    if parts is not None:
        saved = _with_targets_of(saved, own)
        for part in parts:
            if not _part(saved, [part]) and not _part(own, [part]):
                raise ValueError(f"init_parts={part}: expected a part such as {', '.join(words(own))}, found none.")
        chosen = _part(saved, parts), _part(own, parts)
    found = difference(*chosen)
    if found is not None:
        fitting = [word for word in words(own) if difference(_part(saved, [word]), _part(own, [word])) is None]
        advice = f"what fits is init_parts=[{','.join(fitting)}]" if fitting else "no part of it fits"
        if homeless := [word for word in words(saved) if word not in words(own)]:
            advice += f", without {', '.join(homeless)}, for which there is no place here"
        raise ValueError(f"{found}; {advice}.")
    return dict(chosen[0])


def words(names: Iterable[str]) -> list[str]:
    """What names begin with, up to the first dot, each once; targets are not named."""
    return list(dict.fromkeys(name.split(".")[0] for name in names if not name.startswith(TARGET)))


def _part(state: State, parts: Sequence[str]) -> State:
    """What is below some parts or below their targets."""
    return {
        name: tensor
        for name, tensor in state.items()
        if any(f"{name.removeprefix(TARGET)}.".startswith(f"{part}.") for part in parts)
    }


def _with_targets_of(saved: State, own: State) -> State:
    """A saved state with the targets that `own` has."""
    found = {name: tensor for name, tensor in saved.items() if not name.startswith(TARGET)}
    for name in own:
        if name.startswith(TARGET) and (name in saved or name.removeprefix(TARGET) in saved):
            found[name] = saved.get(name, found.get(name.removeprefix(TARGET)))
    return found
