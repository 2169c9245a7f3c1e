"""What training a language model's expert leaves behind: its vector, and examples of what the model says."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from components.checks import Count, checked
from components.files import replacing
from launch.files import COMPLETIONS, write_json


class ExpertExport(L.Callback):
    """Writes the expert vector of the best validation to a file when training ends, for others to use.

    Nothing is written of what was not trained, or has no expert vector.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not module.total_updates or not module.language.has_expert:
            return
        module.restore_best()
        if trainer.is_global_zero:
            module.language.expert(trainer.datamodule.family.name).save(self.path)
        trainer.strategy.barrier()  # all processes will read it


@checked
class Completions(L.Callback):
    """Writes down the first questions of each test, with the right answer and what the model said.

    Args:
        folder: `completions.json` is written there, for the report.
        questions: of each test.
    """

    def __init__(self, folder: str | Path, questions: Count = 5) -> None:
        self.folder = Path(folder)
        self.questions = questions
        self._said: dict[str, list[dict[str, Any]]] = {}

    def on_test_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if batch.name == "validation":  # more of the same
            return
        said = zip(batch.questions[: self.questions], batch.texts(outputs))
        self._said[batch.name] = [
            {
                "question": question.text,
                "answer": question.answer,
                "completion": text,
                "right": batch.family.right(text, question.answer),
            }
            for question, text in said
        ]

    @rank_zero_only
    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        write_json(self.folder / COMPLETIONS, self._said)


class Confusion(L.Callback):
    """Draws what kind of question each family's were taken for, where a method sorts them.

    Args:
        folder: `confusion.png` is written there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._rows: dict[str, list[float]] = {}
        self._columns: list[str] = []

    def on_test_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if outputs.kinds is None:
            return
        self._columns = [*batch.categories.families, "none"]
        own = list(batch.categories.families)[batch.kind]
        shares = [outputs.kinds == kind for kind in (*range(len(self._columns) - 1), -1)]
        self._rows[f"{batch.name} ({own})"] = [100 * share.float().mean().item() for share in shares]

    @rank_zero_only
    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self._rows:
            return
        from matplotlib.figure import Figure

        shares = list(self._rows.values())
        figure = Figure(figsize=(1.1 * len(self._columns) + 2, 0.6 * len(shares) + 1), layout="constrained")
        axis = figure.subplots()
        axis.imshow(shares, vmin=0, vmax=100, cmap="Blues", aspect="auto")
        for row, numbers in enumerate(shares):
            for column, share in enumerate(numbers):
                axis.text(column, row, f"{share:.0f}", ha="center", va="center", color="w" if share > 60 else "k")
        axis.set_xticks(range(len(self._columns)), self._columns, fontsize=8)
        axis.set_yticks(range(len(shares)), self._rows, fontsize=8)
        axis.set_title("taken for, in %", fontsize=9)
        with replacing(self.folder / "confusion.png") as temporary:
            figure.savefig(temporary, dpi=120)
        self._rows = {}
