"""TensorBoard's files, as they read when a run had never stopped."""

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


class TensorBoard(TensorBoardLogger):
    """Writes `folder/tensorboard`, updates being the steps; of a resumed run TensorBoard drops what came later.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, name="", version="tensorboard", default_hp_metric=False)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        self.experiment.flush()  # a kill would take what came before the checkpoint too

    @rank_zero_only
    def rewind(self, updates: int) -> None:
        """Have TensorBoard drop what was logged after the given number of updates."""
        start = SessionLog(status=SessionLog.START)
        self.experiment.file_writer.add_event(Event(step=updates + 1, session_log=start))

    def save(self) -> None:
        """Every row is on the disk already, and the configuration is stored beside the log."""
