"""Tasks as reward expressions over a domain's measurements (see `components.control.rewards.RewardExpression`).

A task is nothing but its text: a new one needs no code, `BatchedMujocoEnv` takes any expression in place of a name.
"""

# The suite's pieces. `small_control` is 1 without effort and 0.8 at full effort.
_SMALL_CONTROL = "(4 + mean(tolerance(control, 0, 0, 1, 'quadratic', 0))) / 5"
_HUMANOID_UPRIGHT = "tolerance(torso_upright, 0.9, inf, 1.9, 'linear', 0)"
_HUMANOID_STANDING = f"tolerance(head_height, 1.4, inf, 0.35) * {_HUMANOID_UPRIGHT}"
_HUMANOID_STILL = "mean(tolerance(com_velocity_x, 0, 0, 2), tolerance(com_velocity_y, 0, 0, 2))"
_HUMANOID_STAND = f"{_SMALL_CONTROL} * {_HUMANOID_STANDING} * {_HUMANOID_STILL}"


def _humanoid_move(speed: float) -> str:
    move = f"(5 * tolerance(horizontal_speed, {speed}, inf, {speed}, 'linear', 0) + 1) / 6"
    return f"{_SMALL_CONTROL} * {_HUMANOID_STANDING} * {move}"


_WALKER_STAND = "(3 * tolerance(torso_height, 1.2, inf, 0.6) + (1 + torso_upright) / 2) / 4"


def _walker_move(speed: float) -> str:
    return f"{_WALKER_STAND} * (5 * tolerance(com_velocity_x, {speed}, inf, {speed / 2}, 'linear', 0.5) + 1) / 6"


_SPIN = "tolerance(angular_momentum, 5, inf, 5, 'linear', 0)"
_QUADRUPED_UPRIGHT = "tolerance(torso_upright, 1, inf, 2, 'linear', 0)"


def _quadruped_move(speed: float) -> str:
    return f"{_QUADRUPED_UPRIGHT} * tolerance(forward_velocity, {speed}, inf, {speed}, 'linear', 0.5)"


def _reach(x: float, y: float) -> str:
    return f"{_SMALL_CONTROL} * tolerance(norm(position_x - {x}, position_y - {y}), 0, 0.015, 0.09)"


TASKS: dict[str, dict[str, str]] = {
    "humanoid": {
        "stand": _HUMANOID_STAND,
        "walk": _humanoid_move(1),
        "run": _humanoid_move(10),
        "crouch": (
            f"{_SMALL_CONTROL} * tolerance(head_height, 1.0, 1.25, 0.1) * tolerance(torso_upright, 0.9, inf, 0.2)"
            f" * {_HUMANOID_STILL}"
        ),
        "raise_left_hand": f"{_HUMANOID_STAND} * tolerance(left_hand_height - head_height, 0, inf, 0.1)",
        "raise_right_hand": f"{_HUMANOID_STAND} * tolerance(right_hand_height - head_height, 0, inf, 0.1)",
        "bow": (
            f"{_SMALL_CONTROL} * tolerance(forward_lean, 0.4, 0.9, 0.2) * tolerance(pelvis_height, 0.75, inf, 0.2)"
            f" * {_HUMANOID_STILL}"
        ),
        "scoot": "tolerance(horizontal_speed, 0.5, inf, 0.5, 'linear', 0)",
        "spin": "tolerance(norm(angular_velocity), 4, inf, 4, 'linear', 0)",
        "head_up": "tolerance(head_height, 0.6, inf, 0.5)",
        "still": "mean(tolerance(velocity, 0, 0, 1))",
    },
    "walker": {
        "stand": _WALKER_STAND,
        "walk": _walker_move(1),
        "run": _walker_move(8),
        "flip": f"{_WALKER_STAND} * (5 * {_SPIN} + 1) / 6",
        "spin": _SPIN,
        "fast_spin": "tolerance(angular_momentum, 10, inf, 10, 'linear', 0)",  # what MOOD calls spin
    },
    "cheetah": {
        "run": "tolerance(com_velocity_x, 10, inf, 10, 'linear', 0)",
        "walk": "tolerance(com_velocity_x, 2, inf, 2, 'linear', 0)",
        "run_backward": "tolerance(-com_velocity_x, 10, inf, 10, 'linear', 0)",
        "walk_backward": "tolerance(-com_velocity_x, 2, inf, 2, 'linear', 0)",
    },
    "quadruped": {
        "stand": _QUADRUPED_UPRIGHT,
        "walk": _quadruped_move(0.5),
        "run": _quadruped_move(5),
        "jump": f"{_QUADRUPED_UPRIGHT} * tolerance(com_height, 1, inf, 1, 'linear', 0.5)",
    },
    "point_mass_maze": {
        "reach_top_left": _reach(-0.15, 0.15),
        "reach_top_right": _reach(0.15, 0.15),
        "reach_bottom_left": _reach(-0.15, -0.15),
        "reach_bottom_right": _reach(0.15, -0.15),
    },
}
