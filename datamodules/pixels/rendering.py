"""Pictures of MuJoCo simulations.

A graphics context belongs to the thread that made it: contexts are kept for each thread, and serve all simulations of
the same model.

Only one thread of a process may draw. Mesa's software renderer, whenever pixels are read, walks lists of all contexts
of the process, which other threads may be changing: once in some ten thousand pictures that ended the process with a
segmentation fault (version 22.3, `lp_setup_is_resource_referenced`). What a `WorkerGroup` calls is in one thread.
"""

import atexit
import threading
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from mujoco.rendering.classic import gl_context  # mujoco.GLContext keeps the library chosen when it was first imported

from datamodules.pixels import RenderingUnavailable


@dataclass(frozen=True)
class View:
    """What a picture shows, and how.

    Attributes:
        model: a name that only simulations with the same bodies, meshes and textures share.
        camera: name or number.
        width, height: in pixels.
        effects: shadows, reflections and multisampling; without them drawing in software is ten times as fast.
    """

    model: str
    camera: str | int
    width: int
    height: int
    effects: bool = False


_own = threading.local()  # of each thread: its contexts by view, and the one that is current


def draw(view: View, physics: Any) -> np.ndarray:
    """A picture [height, width, 3], uint8.

    Args:
        view: of what, from where.
        physics: a `dm_control` physics.

    Raises:
        RenderingUnavailable: no graphics library works on this machine.
        ValueError: there is no such camera.
    """
    kept = _own.__dict__.setdefault("contexts", {})
    if view not in kept:
        try:
            kept[view] = _Context(view, physics.model.ptr)
        except ValueError:
            raise
        except Exception as error:  # every graphics library fails with an exception of its own
            raise RenderingUnavailable(
                "MuJoCo cannot render here: install EGL (libegl1 on Debian and Ubuntu) and set MUJOCO_GL=egl,"
                f" or OSMesa and MUJOCO_GL=osmesa ({error})"
            ) from error
    return kept[view].draw(physics.model.ptr, physics.data.ptr)


class _Context:
    """One thread's means of drawing one view."""

    def __init__(self, view: View, model: mujoco.MjModel) -> None:
        camera = view.camera
        if isinstance(camera, str):
            camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        if not 0 <= camera < model.ncam:
            names = [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_CAMERA, i) for i in range(model.ncam)]
            raise ValueError(f"camera={view.camera}: expected one of {', '.join(map(str, names))}, or its number.")
        self._camera = mujoco.MjvCamera()
        self._camera.type, self._camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, camera
        self._options = mujoco.MjvOption()
        self._options.flags[mujoco.mjtVisFlag.mjVIS_RANGEFINDER] = False  # as the suite's own pictures
        self._rectangle = mujoco.MjrRect(0, 0, view.width, view.height)
        self._pixels = np.empty((view.height, view.width, 3), np.uint8)
        # The size and the samples of the buffer are read from the model when the context is made.
        quality, visual = model.vis.quality, model.vis.global_
        kept = quality.offsamples, visual.offwidth, visual.offheight
        try:
            if not view.effects:
                quality.offsamples = 0
            visual.offwidth, visual.offheight = view.width, view.height
            self._library = gl_context.GLContext(view.width, view.height)
            self._make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        finally:
            quality.offsamples, visual.offwidth, visual.offheight = kept
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=max(1000, 2 * model.ngeom))
        if not view.effects:
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        # EGL complains about contexts that are still open when it is shut down at exit, which it has asked for by now.
        atexit.register(self._library.free)

    def _make_current(self) -> None:
        if getattr(_own, "current", None) is not self:
            self._library.make_current()
            _own.current = self

    def draw(self, model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray:
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, self._options, None, self._camera, everything, self._scene)
        self._make_current()
        mujoco.mjr_render(self._rectangle, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._rectangle, self._context)
        return self._pixels[::-1].copy()
