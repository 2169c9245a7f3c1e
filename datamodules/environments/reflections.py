"""How a body's left and right change places: reflections of what is observed and done, across its plane of symmetry.

Dimensions: O observed numbers, C controls.
"""

import re
from collections.abc import Sequence

import mujoco
import numpy as np

from components.buildable import buildable
from components.networks.equivariant import Reflection
from datamodules.environments.commanded import COMMANDS
from datamodules.environments.domains import DOMAINS

_TURNS = np.array([-1.0, 1.0, -1.0])
"""Axes of rotation are reflected as y stays and x and z change their sign, as the plane of symmetry is y = 0."""
_SIDEWAYS = re.compile(r"leftward|turn|_y$")


def _other_side(name: str) -> str:
    return {"left": "right", "right": "left"}.get(side := name.partition("_")[0], side) + name[len(side) :]


def _joints(model: mujoco.MjModel) -> tuple[dict[str, str], dict[str, float]]:
    """By the names of hinges: which is on the other side, and whether it turns the same way there."""
    other, sign = {}, {}
    for number in range(model.njnt):
        if model.jnt_type[number] != mujoco.mjtJoint.mjJNT_HINGE:
            continue
        name = model.joint(number).name
        other[name] = _other_side(name)
        reflected = _TURNS * model.joint(other[name]).axis
        sign[name] = float(np.sign(reflected @ model.jnt_axis[number]))
        if not np.allclose(sign[name] * reflected, model.jnt_axis[number]):
            raise ValueError(f"{name}: expected an axis that reflects that of {other[name]}, found another.")
    return other, sign


def _reflected(names: Sequence[str], other: dict[str, str], sign: dict[str, float]) -> Reflection:
    return Reflection([names.index(other[name]) for name in names], [sign[name] for name in names])


@buildable()
def reflected_actions(domain: str) -> Reflection:
    """Of the controls of a domain, or of targets of its joints, in the order of its actuators."""
    model = DOMAINS[domain].build(sensors={})
    joints = [model.joint(model.actuator_trnid[number, 0]).name for number in range(model.nu)]
    return _reflected(joints, *_joints(model))


@buildable()
def reflected_observations(domain: str, observes: Sequence[str]) -> Reflection:
    """Of what `CommandedEnv` observes: measurements by their names, then the command and the clock.

    Scalars are known by their names: what is on the left changes with what is on the right, and what is `leftward`,
    turns or ends in `_y` changes its sign. A clock that is reflected is half a turn ahead.
    """
    model = DOMAINS[domain].build(sensors={})
    other, sign = _joints(model)
    hinges = [model.joint(number).name for number in range(model.njnt) if model.joint(number).name in sign]
    names: list[str] = []
    for name in observes:
        if name in ("joint_angles", "joint_velocities"):
            names += [f"{name}.{joint}" for joint in hinges]
            other |= {f"{name}.{joint}": f"{name}.{other[joint]}" for joint in hinges}
            sign |= {f"{name}.{joint}": sign[joint] for joint in hinges}
        elif name == "angular_velocity":
            parts = [f"{name}.{axis}" for axis in "xyz"]
            names += parts
            other |= {part: part for part in parts}
            sign |= dict(zip(parts, _TURNS.tolist()))
        else:
            names.append(name)
            other[name], sign[name] = _other_side(name), -1.0 if _SIDEWAYS.search(name) else 1.0
    for name in (*(f"command_{each}" for each in COMMANDS), "clock_sin", "clock_cos"):
        names.append(name)
        other[name], sign[name] = name, -1.0 if _SIDEWAYS.search(name) or name.startswith("clock") else 1.0
    return _reflected(names, other, sign)
