"""Environments and what they need; importing anything from here prepares MuJoCo for machines without a display."""

import os
import sys

# MuJoCo picks its graphics library when it is imported, and its default needs a display.
if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
    os.environ.setdefault("MUJOCO_GL", "egl")
