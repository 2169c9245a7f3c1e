"""Environments and what they need; importing anything from here readies MuJoCo for machines without a display."""

import ctypes
import importlib
import os
import sys

# The order matters: dm_control loads the graphics library when it is imported, and where that is Mesa's EGL, loading
# Triton's compiler afterwards, as tensordict and torchrl do, ends the process.
import tensordict  # noqa: F401


def _choose_graphics() -> None:
    """Lets MuJoCo render through EGL where there is no display, and not at all where there is no EGL.

    MuJoCo's default needs a display, and dm_control prints warnings about its absence as soon as it is imported.
    """
    has_display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform != "linux" or has_display or "MUJOCO_GL" in os.environ:
        return
    try:
        ctypes.CDLL("libEGL.so.1")
        os.environ["MUJOCO_GL"] = "egl"
    except OSError:
        os.environ["MUJOCO_GL"] = "off"
    # MuJoCo picks its library when it is imported, and TorchRL imports it: let it pick again.
    if "mujoco" in sys.modules:
        importlib.reload(importlib.import_module("mujoco.rendering.classic.gl_context"))


def _quieten_mujoco() -> None:
    """Keeps MuJoCo from printing its warnings and from writing them to a file where the program was started.

    They are of old words in models, about which no user can do anything, and of simulations that break down, which the
    environments notice by MuJoCo's counters. dm_control, when it is imported, has absl say them instead.
    """
    importlib.import_module("mujoco").set_mju_user_warning(lambda message: None)
    importlib.import_module("absl.logging").set_verbosity("error")


_choose_graphics()
_quieten_mujoco()
