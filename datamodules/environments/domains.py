"""What is particular to each simulated domain: model, sensors, observation, measurements and starting states.

Dimensions: n rows (environments or stored states). Units are MuJoCo's: metres, radians, seconds, newtons.
"""

import copy
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import mujoco
import numpy as np
import torch
from dm_control.suite import common, quadruped
from torch import Tensor

from components.buildable import buildable

Xml = ElementTree.Element
Sensor = tuple[str, dict[str, str]]
"""XML tag and attributes of a MuJoCo sensor."""

MAX_PICTURE = (1280, 960)
"""Largest width and height that can be rendered; MuJoCo's default is 640 x 480."""


@dataclass(frozen=True)
class Snapshot:
    """Simulator states with everything a domain reads from them; float64 throughout."""

    qpos: Tensor
    """Generalised positions [n, nq]."""
    qvel: Tensor
    """Generalised velocities [n, nv]."""
    act: Tensor
    """Actuator activations [n, na]."""
    control: Tensor
    """Control signals that led to the state, in actuator units [n, nu]."""
    sensors: Mapping[str, Tensor]
    """Sensor readings [n, width] by name."""


@dataclass(frozen=True)
class Quantity:
    """A named physical quantity."""

    meaning: str
    read: Callable[[Snapshot], Tensor]
    """Gives [n] for a scalar, [n, k] for a vector."""


class Simulator(Protocol):
    """What a domain needs to draw its starting states."""

    model: mujoco.MjModel

    def touches(self, qpos: np.ndarray) -> np.ndarray: ...

    def advance(self, physics: np.ndarray, control: np.ndarray, substeps: int) -> tuple[np.ndarray, ...]: ...


Start = Callable[[Simulator, int, torch.Generator], np.ndarray]
"""Draws physics states [n, nq + nv + na]."""


@dataclass(frozen=True)
class Domain:
    """One simulated body and its world."""

    name: str
    make_xml: Callable[[], Xml]
    substeps: int
    """Simulation steps per control step."""
    sensors: Mapping[str, Sensor]
    """Sensors that depend on positions and velocities only."""
    observation: Mapping[str, Callable[[Snapshot], Tensor]]
    """The suite's observation, in its order: name -> [n] or [n, k]."""
    measurements: Mapping[str, Quantity]
    start: Start
    """The suite's own starting states."""
    camera: str
    force_sensors: Mapping[str, Sensor] = field(default_factory=dict)
    """Sensors that depend on accelerations and contact forces; they cost a full step to restore."""
    episode_length: int = 1000
    _compiled: dict[str, mujoco.MjModel] = field(default_factory=dict, init=False, repr=False, compare=False)

    def build(self, *, sensors: Mapping[str, Sensor]) -> mujoco.MjModel:
        """A model of the caller's own with exactly these sensors."""
        key = json.dumps(dict(sensors))
        if key not in self._compiled:  # which takes ten times as long as a copy
            self._compiled[key] = self._compile(sensors)
        return copy.copy(self._compiled[key])

    def _compile(self, sensors: Mapping[str, Sensor]) -> mujoco.MjModel:
        root = self.make_xml()
        for section in root.findall("sensor"):
            root.remove(section)
        section = ElementTree.SubElement(root, "sensor")
        for name, (tag, attributes) in sensors.items():
            ElementTree.SubElement(section, tag, {"name": name, **attributes})
        compiler = root.find("compiler")
        total_mass = None if compiler is None else compiler.attrib.pop("settotalmass", None)
        model = mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"), common.ASSETS)
        if total_mass is not None:  # the attribute still works, with a warning that nobody could act on
            mujoco.mj_setTotalmass(model, float(total_mass))
            mujoco.mj_setConst(model, mujoco.MjData(model))
        model.vis.global_.offwidth, model.vis.global_.offheight = MAX_PICTURE
        # Without a graphics card these two decide how long a video takes: 0.06 s a picture instead of 0.14 s.
        model.vis.quality.offsamples, model.vis.quality.shadowsize = 0, 1024
        return model


def _suite_xml(file_name: str) -> Xml:
    return ElementTree.fromstring(common.read_model(file_name))


def _position(body: str) -> Sensor:
    """Position of a body's frame in the world."""
    return "framepos", {"objtype": "xbody", "objname": body}


def _position_seen_from(body: str, observer: str) -> Sensor:
    return "framepos", {"objtype": "xbody", "objname": body, "reftype": "xbody", "refname": observer}


def _world_axis_seen_from(axis: str, body: str) -> Sensor:
    """A row of the body's rotation matrix: the world's axis in the body's frame."""
    return f"frame{axis}axis", {"objtype": "xbody", "objname": "world", "reftype": "xbody", "refname": body}


def _sensor(name: str, component: int | None = None) -> Callable[[Snapshot], Tensor]:
    if component is None:
        return lambda s: s.sensors[name]
    return lambda s: s.sensors[name][:, component]


def _uniform(generator: torch.Generator, low: np.ndarray, high: np.ndarray, rows: int) -> np.ndarray:
    unit = torch.rand((rows, len(low)), generator=generator, dtype=torch.float64).numpy()
    return low + (high - low) * unit


def _physics(model: mujoco.MjModel, qpos: np.ndarray) -> np.ndarray:
    """States at rest with these positions."""
    return np.concatenate([qpos, np.zeros((len(qpos), model.nv + model.na))], axis=1)


def _random_joints(model: mujoco.MjModel, rows: int, generator: torch.Generator) -> np.ndarray:
    """The suite's randomised positions: limited joints within their range, free hinges and the root's turn anyhow."""
    qpos = np.tile(model.qpos0, (rows, 1))
    hinge, slide, free = (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE, mujoco.mjtJoint.mjJNT_FREE)
    limited = model.jnt_limited.astype(bool) & np.isin(model.jnt_type, [hinge, slide])
    low, high = model.jnt_range[limited].T
    qpos[:, model.jnt_qposadr[limited]] = _uniform(generator, low, high, rows)
    turning = ~model.jnt_limited.astype(bool) & (model.jnt_type == hinge)
    pi = np.full(int(turning.sum()), np.pi)
    qpos[:, model.jnt_qposadr[turning]] = _uniform(generator, -pi, pi, rows)
    for address in model.jnt_qposadr[model.jnt_type == free]:
        # Positive components only, as the suite draws them: turns of more than half a circle never come up.
        quaternion = torch.rand((rows, 4), generator=generator, dtype=torch.float64).numpy()
        qpos[:, address + 3 : address + 7] = quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True)
    return qpos


def _start_random(simulator: Simulator, rows: int, generator: torch.Generator) -> np.ndarray:
    return _physics(simulator.model, _random_joints(simulator.model, rows, generator))


@buildable()
def start_random_untouched(simulator: Simulator, rows: int, generator: torch.Generator) -> np.ndarray:
    """Random joints, drawn again until nothing touches anything."""
    qpos = np.empty((rows, simulator.model.nq))
    pending = np.arange(rows)
    while len(pending):
        candidates = _random_joints(simulator.model, len(pending), generator)
        touching = simulator.touches(candidates)
        qpos[pending[~touching]] = candidates[~touching]
        pending = pending[touching]
    return _physics(simulator.model, qpos)


def _start_settled(simulator: Simulator, rows: int, generator: torch.Generator) -> np.ndarray:
    """Random limited joints, then 200 simulation steps without control."""
    model = simulator.model
    qpos = np.tile(model.qpos0, (rows, 1))
    limited = model.jnt_limited.astype(bool)
    low, high = model.jnt_range[limited].T
    qpos[:, model.jnt_qposadr[limited]] = _uniform(generator, low, high, rows)
    return simulator.advance(_physics(model, qpos), np.zeros((rows, model.nu)), 200)[0]


def _start_turned_above_floor(simulator: Simulator, rows: int, generator: torch.Generator) -> np.ndarray:
    """Any orientation, lifted in steps of 1 cm until nothing touches the floor."""
    qpos = np.tile(simulator.model.qpos0, (rows, 1))
    quaternion = torch.randn((rows, 4), generator=generator, dtype=torch.float64).numpy()
    qpos[:, 3:7] = quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True)
    qpos[:, 2] = 0
    touching = simulator.touches(qpos)
    while touching.any():
        qpos[touching, 2] += 0.01
        touching[touching] = simulator.touches(qpos[touching])
    return _physics(simulator.model, qpos)


def _start_top_left(simulator: Simulator, rows: int, generator: torch.Generator) -> np.ndarray:
    return _physics(simulator.model, _uniform(generator, np.array([-0.29, 0.15]), np.array([-0.15, 0.29]), rows))


_COM_VELOCITY: dict[str, Sensor] = {"com_velocity": ("subtreelinvel", {"body": "torso"})}
_CONTROL = Quantity("control signal of every actuator", lambda s: s.control)
_VELOCITY = Quantity("velocity of every degree of freedom (m/s, rad/s)", lambda s: s.qvel)


# --- humanoid ---------------------------------------------------------------------------------------------------------


def _heading(s: Snapshot) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the direction in the floor plane that the humanoid's trunk faces."""
    x, y = s.sensors["torso_x_axis"][:, 0], s.sensors["torso_x_axis"][:, 1]
    length = torch.hypot(x, y).clamp_min(1e-9)
    return x / length, y / length


def _forward_velocity(s: Snapshot) -> Tensor:
    cos, sin = _heading(s)
    velocity = s.sensors["com_velocity"]
    return cos * velocity[:, 0] + sin * velocity[:, 1]


def _leftward_velocity(s: Snapshot) -> Tensor:
    cos, sin = _heading(s)
    velocity = s.sensors["com_velocity"]
    return cos * velocity[:, 1] - sin * velocity[:, 0]


_HUMANOID_LIMBS = ("left_hand", "left_foot", "right_hand", "right_foot")

HUMANOID = Domain(
    name="humanoid",
    make_xml=lambda: _suite_xml("humanoid.xml"),
    substeps=5,
    camera="side",
    start=start_random_untouched,
    sensors={
        "head": _position("head"),
        "pelvis": _position("pelvis"),
        **{limb: _position(limb) for limb in _HUMANOID_LIMBS},
        **{f"{limb}_seen": _position_seen_from(limb, "torso") for limb in _HUMANOID_LIMBS},
        "torso_vertical": _world_axis_seen_from("z", "torso"),
        "torso_x_axis": ("framexaxis", {"objtype": "xbody", "objname": "torso"}),
        **_COM_VELOCITY,
    },
    observation={
        "joint_angles": lambda s: s.qpos[:, 7:],
        "head_height": _sensor("head", 2),
        "extremities": lambda s: torch.cat([s.sensors[f"{limb}_seen"] for limb in _HUMANOID_LIMBS], dim=1),
        "torso_vertical": _sensor("torso_vertical"),
        "com_velocity": _sensor("com_velocity"),
        "velocity": lambda s: s.qvel,
    },
    measurements={
        "head_height": Quantity("height of the head above the floor (m)", _sensor("head", 2)),
        "pelvis_height": Quantity("height of the pelvis above the floor (m)", _sensor("pelvis", 2)),
        "left_hand_height": Quantity("height of the left hand above the floor (m)", _sensor("left_hand", 2)),
        "right_hand_height": Quantity("height of the right hand above the floor (m)", _sensor("right_hand", 2)),
        "left_foot_height": Quantity("height of the left foot above the floor (m)", _sensor("left_foot", 2)),
        "right_foot_height": Quantity("height of the right foot above the floor (m)", _sensor("right_foot", 2)),
        **{
            f"{limb}_{axis}": Quantity(
                f"position of the {limb.replace('_', ' ')} {words} of the trunk's centre, along its own axis (m)",
                _sensor(f"{limb}_seen", component),
            )
            for limb in _HUMANOID_LIMBS
            for component, (axis, words) in enumerate((("forward", "in front"), ("leftward", "to the left")))
        },
        "torso_upright": Quantity("cosine of the trunk's tilt, 1 when vertical", _sensor("torso_vertical", 2)),
        "forward_lean": Quantity(
            "sine of the trunk's forward tilt, 1 when face down", lambda s: -s.sensors["torso_vertical"][:, 0]
        ),
        "leftward_lean": Quantity("sine of the trunk's tilt to its left", lambda s: -s.sensors["torso_vertical"][:, 1]),
        "com_velocity_x": Quantity(
            "velocity of the centre of mass along the world's x (m/s)", _sensor("com_velocity", 0)
        ),
        "com_velocity_y": Quantity(
            "velocity of the centre of mass along the world's y (m/s)", _sensor("com_velocity", 1)
        ),
        "com_velocity_z": Quantity("upward velocity of the centre of mass (m/s)", _sensor("com_velocity", 2)),
        "horizontal_speed": Quantity(
            "speed of the centre of mass along the floor (m/s)",
            lambda s: torch.hypot(s.sensors["com_velocity"][:, 0], s.sensors["com_velocity"][:, 1]),
        ),
        "distance": Quantity(
            "distance of the trunk along the floor (m) from the origin of the world, where episodes begin",
            lambda s: torch.hypot(s.qpos[:, 0], s.qpos[:, 1]),
        ),
        "forward_velocity": Quantity("velocity of the centre of mass where the trunk faces (m/s)", _forward_velocity),
        "leftward_velocity": Quantity("velocity of the centre of mass to the trunk's left (m/s)", _leftward_velocity),
        "angular_velocity": Quantity(
            "turning of the trunk about its own x, y, z axes (rad/s)", lambda s: s.qvel[:, 3:6]
        ),
        "turn_rate": Quantity(
            "turning of the trunk about the vertical, positive to the left (rad/s)",
            lambda s: (s.qvel[:, 3:6] * s.sensors["torso_vertical"]).sum(dim=1),
        ),
        "joint_angles": Quantity("angle of every hinge (rad)", lambda s: s.qpos[:, 7:]),
        "joint_velocities": Quantity("angular velocity of every hinge (rad/s)", lambda s: s.qvel[:, 6:]),
        "velocity": _VELOCITY,
        "control": _CONTROL,
    },
)


# --- walker and cheetah -----------------------------------------------------------------------------------------------

_WALKER_BODIES = ("torso", "right_thigh", "right_leg", "right_foot", "left_thigh", "left_leg", "left_foot")
_PLANAR_SENSORS: dict[str, Sensor] = {
    "torso": _position("torso"),
    "torso_vertical": _world_axis_seen_from("z", "torso"),
    "angular_momentum": ("subtreeangmom", {"body": "torso"}),
    **_COM_VELOCITY,
}
_PLANAR_MEASUREMENTS: dict[str, Quantity] = {
    "torso_height": Quantity("height of the torso above the floor (m)", _sensor("torso", 2)),
    "torso_upright": Quantity("cosine of the torso's tilt, 1 in its normal posture", _sensor("torso_vertical", 2)),
    "com_velocity_x": Quantity("forward velocity of the centre of mass (m/s)", _sensor("com_velocity", 0)),
    "com_velocity_z": Quantity("upward velocity of the centre of mass (m/s)", _sensor("com_velocity", 2)),
    "angular_momentum": Quantity(
        "angular momentum of the whole body in the plane, positive for a forward roll (kg m2/s)",
        _sensor("angular_momentum", 1),
    ),
}

WALKER = Domain(
    name="walker",
    make_xml=lambda: _suite_xml("walker.xml"),
    substeps=10,
    camera="side",
    start=_start_random,
    sensors={
        **_PLANAR_SENSORS,
        **{f"{body}_x_row": _world_axis_seen_from("x", body) for body in _WALKER_BODIES},
        "left_foot": _position("left_foot"),
        "right_foot": _position("right_foot"),
    },
    observation={
        "orientations": lambda s: torch.cat([s.sensors[f"{body}_x_row"][:, ::2] for body in _WALKER_BODIES], dim=1),
        "height": _sensor("torso", 2),
        "velocity": lambda s: s.qvel,
    },
    measurements={
        **_PLANAR_MEASUREMENTS,
        "left_foot_height": Quantity("height of the left foot above the floor (m)", _sensor("left_foot", 2)),
        "right_foot_height": Quantity("height of the right foot above the floor (m)", _sensor("right_foot", 2)),
        "joint_angles": Quantity("angle of every leg joint (rad)", lambda s: s.qpos[:, 3:]),
        "velocity": _VELOCITY,
        "control": _CONTROL,
    },
)

CHEETAH = Domain(
    name="cheetah",
    make_xml=lambda: _suite_xml("cheetah.xml"),
    substeps=1,
    camera="side",
    start=_start_settled,
    sensors=_PLANAR_SENSORS,
    observation={"position": lambda s: s.qpos[:, 1:], "velocity": lambda s: s.qvel},
    measurements={
        **_PLANAR_MEASUREMENTS,
        "joint_angles": Quantity("angle of every leg joint (rad)", lambda s: s.qpos[:, 3:]),
        "velocity": _VELOCITY,
        "control": _CONTROL,
    },
)


# --- quadruped --------------------------------------------------------------------------------------------------------

_TOES = ("toe_front_left", "toe_front_right", "toe_back_right", "toe_back_left")


def _force_and_torque(s: Snapshot) -> Tensor:
    readings = [s.sensors[f"{kind}_{toe}"] for kind in ("force", "torque") for toe in _TOES]
    return torch.cat(readings, dim=1).asinh()


QUADRUPED = Domain(
    name="quadruped",
    # The floor is an endless plane to the simulator; its size only says how much of it is drawn.
    make_xml=lambda: ElementTree.fromstring(quadruped.make_model(floor_size=100)),
    substeps=4,
    camera="x",
    start=_start_turned_above_floor,
    sensors={
        "gyro": ("gyro", {"site": "torso"}),
        "velocimeter": ("velocimeter", {"site": "torso"}),
        "torso": _position("torso"),
        "torso_vertical": _world_axis_seen_from("z", "torso"),
        "com": ("subtreecom", {"body": "torso"}),
    },
    force_sensors={
        "accelerometer": ("accelerometer", {"site": "torso"}),
        **{f"{kind}_{toe}": (kind, {"site": toe}) for kind in ("force", "torque") for toe in _TOES},
    },
    observation={
        "egocentric_state": lambda s: torch.cat([s.qpos[:, 7:], s.qvel[:, 6:], s.act], dim=1),
        "torso_velocity": _sensor("velocimeter"),
        "torso_upright": _sensor("torso_vertical", 2),
        "imu": lambda s: torch.cat([s.sensors["accelerometer"], s.sensors["gyro"]], dim=1),
        "force_torque": _force_and_torque,
    },
    measurements={
        "torso_upright": Quantity("cosine of the torso's tilt, 1 when level", _sensor("torso_vertical", 2)),
        "torso_height": Quantity("height of the torso above the floor (m)", _sensor("torso", 2)),
        "com_height": Quantity("height of the centre of mass above the floor (m)", _sensor("com", 2)),
        "forward_velocity": Quantity(
            "velocity of the torso along its own forward axis (m/s)", _sensor("velocimeter", 0)
        ),
        "leftward_velocity": Quantity("velocity of the torso along its own left axis (m/s)", _sensor("velocimeter", 1)),
        "angular_velocity": Quantity("turning of the torso about its own x, y, z axes (rad/s)", _sensor("gyro")),
        "joint_angles": Quantity("angle of every hinge (rad)", lambda s: s.qpos[:, 7:]),
        "joint_velocities": Quantity("angular velocity of every hinge (rad/s)", lambda s: s.qvel[:, 6:]),
        "velocity": _VELOCITY,
        "control": _CONTROL,
    },
)


# --- point-mass maze --------------------------------------------------------------------------------------------------


def _maze_xml() -> Xml:
    """The suite's point mass in four rooms: a cross of walls with a door in three of its four arms.

    From the top-left room, where episodes start, one door leads right and one down; the bottom-right room is reached
    from the top-right one only, so that it lies farthest away.
    """
    root = _suite_xml("point_mass.xml")
    option = root.find("option")
    option.remove(option.find("flag"))  # the suite disables contacts; here walls have to stop the mass
    world = root.find("worldbody")
    for geom in world.findall("geom"):
        if geom.get("name") == "target":
            world.remove(geom)
        else:
            geom.set("contype", "0")  # the joints' ranges already end at the outer walls
            geom.set("conaffinity", "0")
    # Arms reach from the centre to the outer wall at 0.3; doors are 0.1 wide, at the arm's end.
    walls = {
        "wall_up": ((0, 0.1), (0.01, 0.1)),
        "wall_left": ((-0.1, 0), (0.1, 0.01)),
        "wall_right": ((0.1, 0), (0.1, 0.01)),
        "wall_down": ((0, -0.15), (0.01, 0.15)),
    }
    for name, ((x, y), (half_x, half_y)) in walls.items():
        attributes = {"type": "box", "pos": f"{x} {y} .02", "size": f"{half_x} {half_y} .02", "friction": "0 0 0"}
        ElementTree.SubElement(world, "geom", {"name": name, "material": "decoration", **attributes})
    return root


POINT_MASS_MAZE = Domain(
    name="point_mass_maze",
    make_xml=_maze_xml,
    substeps=1,
    camera="fixed",
    start=_start_top_left,
    sensors={},
    observation={"position": lambda s: s.qpos, "velocity": lambda s: s.qvel},
    measurements={
        "position_x": Quantity("position to the right of the centre (m)", lambda s: s.qpos[:, 0]),
        "position_y": Quantity("position above the centre, seen on the map (m)", lambda s: s.qpos[:, 1]),
        "velocity_x": Quantity("velocity to the right (m/s)", lambda s: s.qvel[:, 0]),
        "velocity_y": Quantity("velocity upwards on the map (m/s)", lambda s: s.qvel[:, 1]),
        "control": _CONTROL,
    },
)

DOMAINS: dict[str, Domain] = {d.name: d for d in (HUMANOID, WALKER, CHEETAH, QUADRUPED, POINT_MASS_MAZE)}
