"""What programs of the tests have imported when they begin: most of what a start takes."""

from launch.imports import import_lightning

import_lightning()

import torchrl.collectors  # noqa: E402, F401

import callbacks.progress  # noqa: E402
import callbacks.results  # noqa: E402, F401
import datamodules.online  # noqa: E402, F401
import launch.program  # noqa: E402
import launch.study  # noqa: E402, F401
import lightning_modules.actor_critic  # noqa: E402
import lightning_modules.forward_backward  # noqa: E402, F401
