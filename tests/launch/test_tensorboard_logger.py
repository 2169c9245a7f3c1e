"""TensorBoard's files of a run that was stopped and resumed."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.tensorboard_logger import TensorBoard


def session(folder, rewound_to, *rows):
    """A logger as the trainer uses it, left without a goodbye."""
    logger = TensorBoard(folder)
    logger.save()
    assert logger.experiment is not None  # the trainer asks for it before anything is rewound
    logger.rewind(rewound_to)
    for updates, loss in rows:
        logger.log_metrics({"updates": updates, "train/loss": loss}, step=updates)
    return logger


def test_what_came_after_the_checkpoint_is_dropped_and_nothing_before_is_lost(tmp_path):
    killed = session(tmp_path, 0, (5, 1.0), (10, 2.0), (15, 3.0))  # its writer is neither closed nor flushed by us
    session(tmp_path, 10, (15, 4.0), (20, 5.0))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (5, 1.0),
        (10, 2.0),
        (15, 4.0),
        (20, 5.0),
    ]
    killed.finalize("success")
    assert {path.name.split(".")[0] for path in (tmp_path / "tensorboard").iterdir()} == {"events"}
