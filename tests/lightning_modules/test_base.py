"""The clock, the metrics and the exact resumption that every method gets, shown on the smallest method."""

import random
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from callbacks.checkpoint import Checkpoint
from callbacks.resumption import Resumption
from callbacks.run_log import RunLog, read_rows
from datamodules.sampling import EvaluationTasks, UniformBatches
from launch.checkpoints import AtomicCheckpointIO, load_checkpoint
from lightning_modules.base import LearningMethod, random_state, set_random_state

EVALUATE_EVERY, TOTAL = 8, 20
CHECKPOINTS = [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]


class Toy(LearningMethod):
    """A regression whose every update draws from all random streams."""

    def __init__(self, width: int = 3, updates: int = TOTAL, anneal_from: float = 1.0) -> None:
        super().__init__(updates=updates, updates_per_step=2, log_every=4, anneal_from=anneal_from)
        self.net = nn.Linear(width, 1)
        self.optimizer = self.register_optimizer(torch.optim.Adam(self.net.parameters(), lr=0.1))
        self.train_starts = 0

    def update(self, batch: TensorDict) -> TensorDict:
        noise = torch.randn(()) + np.random.randn() + random.random()  # noqa: NPY002 - libraries use the global state
        loss = (self.net(batch["x"]) - noise).square().mean()
        self.minimise(loss, self.optimizer)
        return TensorDict({"loss": loss.detach(), "noise": noise})

    def evaluate(self, task: "ToyTask") -> torch.Tensor:
        return torch.rand(3) + self.net.bias.detach()

    def on_train_start(self) -> None:
        super().on_train_start()
        self.train_starts += 1


class OtherToy(Toy):
    """The same under another name."""


class ToyTask:
    def metrics(self, result: torch.Tensor) -> dict[str, list[float]]:
        return {"task/score": result.tolist()}


class Poisoned:
    """Batches of which one has a NaN."""

    def __init__(self, batches: UniformBatches, update: int) -> None:
        self.batches = [batch.clone() for batch in batches]
        self.batches[(update - batches.start) // batches.updates_per_step]["x"][0, 1] = float("nan")

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class ToyData(L.LightningDataModule):
    def __init__(self, poisoned_update: int | None = None) -> None:
        super().__init__()
        data = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
        self.data = TensorDict({"x": data}, batch_size=[50])
        self.poisoned_update = poisoned_update

    def train_dataloader(self):
        start = self.trainer.lightning_module.updates
        stop = min((start // EVALUATE_EVERY + 1) * EVALUATE_EVERY, self.trainer.lightning_module.total_updates)
        batches = UniformBatches(self.data, 4, 2, start, stop, seed=0)
        if self.poisoned_update is None or not start <= self.poisoned_update < stop:
            return batches
        return Poisoned(batches, self.poisoned_update)

    def val_dataloader(self):
        return EvaluationTasks([ToyTask()])


class EveryCheckpoint(Checkpoint):
    """Keeps a copy of every checkpoint, and of the record as it was at that moment."""

    def _save(self, trainer, module):
        super()._save(trainer, module)
        kept = self.path.parent / str(module.updates)
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        shutil.copy(self.path, kept)


def fit(folder: Path, method: Toy, checkpoint: Path | None = None, poisoned_update: int | None = None) -> Toy:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
        logger=[RunLog(folder)],
        callbacks=[Resumption(folder), EveryCheckpoint(str(folder), every=2, name="run")],
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(method, datamodule=ToyData(poisoned_update), ckpt_path=checkpoint, weights_only=True)
    return method


def fresh(seed: int = 0, **settings) -> Toy:
    L.seed_everything(seed, verbose=False)
    return Toy(**settings)


def equal(a, b) -> bool:
    """Bit-for-bit equality of nested states."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def record(folder: Path) -> dict[str, list]:
    return {
        name: [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(folder / name)[1]]
        for name in ("train.csv", "eval.csv")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run, with every checkpoint that it took."""
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, fresh())
    return folder


def final_state(folder: Path) -> dict:
    checkpoint = load_checkpoint(folder / "last.ckpt")
    return {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "learning_method")}


def test_record_has_a_row_for_each_interval_and_evaluation(whole):
    rows = record(whole)
    assert [row["updates"] for row in rows["train.csv"]] == ["4", "8", "12", "16", "20"]
    assert [row["updates"] for row in rows["eval.csv"]] == ["8", "16", "20"]
    assert sorted(int(path.name) for path in whole.iterdir() if path.is_dir()) == CHECKPOINTS


@pytest.mark.parametrize("updates", CHECKPOINTS)
def test_resuming_anywhere_gives_the_uninterrupted_run(whole, tmp_path, updates):
    for name in ("train.csv", "eval.csv"):  # as the kill left them: with rows from after the checkpoint, the last torn
        text = (whole / name).read_text()
        (tmp_path / name).write_text(text[:-3])
    method = fit(tmp_path, fresh(seed=99), whole / str(updates) / "last.ckpt")
    assert method.updates == TOTAL
    if updates == TOTAL:
        assert method.train_starts == 0
        return
    assert equal(final_state(tmp_path), final_state(whole))
    assert record(tmp_path) == record(whole)


def test_run_that_is_extended_goes_on(whole, tmp_path):
    longer = fit(tmp_path / "longer", fresh(updates=28))
    extended = fit(tmp_path / "extended", fresh(seed=5, updates=28), whole / "20" / "last.ckpt")
    assert extended.updates == 28
    assert equal(extended.state_dict(), longer.state_dict())
    assert equal(extended.optimizer.state_dict(), longer.optimizer.state_dict())


def test_learning_rates_fall_linearly_to_the_end_of_the_run(whole, tmp_path):
    rates = {}

    class Observed(Toy):
        def update(self, batch):
            rates[self.updates] = self.optimizer.param_groups[0]["lr"]
            return super().update(batch)

    L.seed_everything(0, verbose=False)
    annealed = fit(tmp_path / "annealed", Observed(anneal_from=0.4))
    resumed = fit(tmp_path / "resumed", Observed(anneal_from=0.4), tmp_path / "annealed" / "14" / "last.ckpt")
    assert rates == pytest.approx({u: 0.1 * min(1.0, (20 - u + u % 2) / 12) for u in range(20)})  # two in a step
    assert equal(resumed.state_dict(), annealed.state_dict())
    assert not equal(resumed.state_dict(), load_checkpoint(whole / "last.ckpt")["state_dict"])


def test_how_often_a_run_is_evaluated_does_not_change_what_it_learns(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(__import__("sys").modules[__name__], "EVALUATE_EVERY", 4)
    assert equal(fit(tmp_path, fresh()).state_dict(), load_checkpoint(whole / "last.ckpt")["state_dict"])


def test_random_states_come_back():
    state = random_state()
    draws = [(torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) for _ in range(2)]  # noqa: NPY002
    assert draws[0] != draws[1]
    set_random_state(state)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == draws[0]  # noqa: NPY002


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(whole, tmp_path):
    with pytest.raises(ValueError, match=r"train/loss became nan by update 12: expected finite numbers"):
        fit(tmp_path, fresh(), poisoned_update=10)
    checkpoint = tmp_path / "last.ckpt"
    assert load_checkpoint(checkpoint)["learning_method"]["updates"] == 10
    fit(tmp_path, fresh(seed=3), checkpoint)  # with sound data it goes on as if nothing had happened
    assert equal(final_state(tmp_path), final_state(whole))
    assert record(tmp_path) == record(whole)


def test_weights_that_are_not_finite_are_never_saved(whole, tmp_path):
    method = fresh()

    def break_weights(batch):
        with torch.no_grad():
            method.net.bias.fill_(float("inf"))
        return TensorDict({"loss": torch.zeros(())})

    method.update = break_weights
    with pytest.raises(ValueError, match=r"net.bias is not finite after 2 updates"):
        fit(tmp_path, method)
    assert not (tmp_path / "last.ckpt").exists()


def test_checkpoints_are_taken_after_whole_steps(tmp_path):
    with pytest.raises(ValueError, match="every=3: expected a multiple of updates_per_step=2"):
        Checkpoint(str(tmp_path), 3, "run").on_fit_start(SimpleNamespace(loggers=[]), fresh())


def test_checkpoint_of_another_method_is_refused(whole):
    with pytest.raises(ValueError, match=r"holds Toy, expected OtherToy\.$"):
        OtherToy().on_load_checkpoint(load_checkpoint(whole / "last.ckpt"))


def test_checkpoint_of_other_sizes_is_refused_in_one_sentence(whole):
    with pytest.raises(ValueError, match=r"^The checkpoint's net.weight is \[1, 3\], expected \[1, 4\]\.$"):
        Toy(width=4).on_load_checkpoint(load_checkpoint(whole / "last.ckpt"))


@pytest.mark.parametrize("settings", [{"updates": 3}, {"updates": 4, "log_every": 3}])
def test_counts_that_do_not_divide_each_other_are_refused(settings):
    class Plain(Toy):
        def __init__(self):
            LearningMethod.__init__(self, updates_per_step=2, **{"log_every": 2, **settings})

    with pytest.raises(ValueError, match=r"(updates|log_every)=3 is no multiple of updates_per_step=2"):
        Plain()


def test_a_run_that_begins_from_another_takes_its_weights_and_no_progress(tmp_path):
    torch.manual_seed(0)
    done = fit(tmp_path, Toy())
    checkpoint = load_checkpoint(tmp_path / "last.ckpt")
    method = OtherToy()  # a resumption would refuse it
    found = method.begin_from(checkpoint)
    assert found == {"taken": ["net"], "left": [], "unused": []}
    assert torch.equal(method.net.weight, done.net.weight)
    assert (method.updates, method.env_steps, method.optimizer.state_dict()["state"]) == (0, 0, {})
    method = OtherToy()
    method.kept = ("net.bias",)
    before = method.net.bias.clone()
    assert method.begin_from(checkpoint)["taken"] == ["net"]
    assert torch.equal(method.net.weight, done.net.weight)
    assert torch.equal(method.net.bias, before)


class Kept(Toy):
    """With an optimiser of choice, for weights of two shapes."""

    def __init__(self, make) -> None:
        super().__init__()
        self.wide = nn.Linear(4, 3)
        self._optimizers, self._learning_rates = [], []
        groups = [{"params": [self.net.weight, self.wide.weight]}, {"params": []}, {"params": [self.wide.bias]}]
        self.optimizer = self.register_optimizer(make(groups))


OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=0.1, fused=True),
    "amsgrad": partial(torch.optim.AdamW, amsgrad=True),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "plain": partial(torch.optim.SGD, lr=0.1),
    "adafactor": torch.optim.Adafactor,  # whose moments are not of the shapes of weights
    "rprop": torch.optim.Rprop,
    "nadam": torch.optim.NAdam,
}


def states(tree):
    return {index: dict(state) for index, state in tree["state"].items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_get_back_what_they_keep_and_nothing_else(whole, name):
    saved, method = load_checkpoint(whole / "10" / "last.ckpt"), Kept(OPTIMIZERS[name])
    saved["state_dict"] = method.state_dict()
    saved["learning_method"]["class"] = "Kept"
    saved["optimizer_states"] = [method.optimizer.state_dict()]
    method.check_checkpoint(saved)  # before the first step there is no state
    for parameter in (method.net.weight, method.wide.weight, method.wide.bias):
        parameter.grad = torch.ones_like(parameter)
    method.optimizer.step()
    own = method.optimizer.state_dict()
    before, groups = states(own), own["param_groups"]
    saved["optimizer_states"] = [own]
    method.check_checkpoint(saved)
    assert states(method.optimizer.state_dict()) == before  # nothing was done to it
    assert method.optimizer.param_groups[0]["params"][0] is method.net.weight

    assert (name == "plain") == (before == {index: {} for index in before})
    others = {torch.Tensor: (torch.ones(7), "x", None, 0.5), float: ("x", torch.ones(1)), int: ("x",)}
    for index, kept in before.items():
        wrong = [{**kept, "more": 1}]
        for part, value in kept.items():
            wrong += [{**kept, part: other} for other in others[type(value)]]
            wrong += [{key: each for key, each in kept.items() if key != part}] if len(kept) > 1 else []
            if isinstance(value, torch.Tensor):
                wrong += [{**kept, part: odd} for odd in (value * torch.nan, value.to(torch.complex64))]
        for state in wrong:
            saved["optimizer_states"] = [{"state": {**before, index: state}, "param_groups": groups}]
            with pytest.raises(ValueError, match=rf"^The checkpoint's optimiser 0, parameter {index}: expected "):
                method.check_checkpoint(saved)


def test_moments_are_laid_out_as_their_parameters(whole):
    """Fused optimisers go through the memory of both together."""
    saved, method = load_checkpoint(whole / "10" / "last.ckpt"), Kept(OPTIMIZERS["adam"])
    turned = nn.Parameter(torch.randn(4, 3).T)
    method.wide.weight = turned
    method._optimizers, method._learning_rates = [], []
    method.optimizer = method.register_optimizer(torch.optim.Adam([turned], lr=0.1, fused=True))
    turned.grad = torch.randn(4, 3).T
    method.optimizer.step()
    own = method.optimizer.state_dict()
    assert own["state"][0]["exp_avg"].stride() == turned.stride() == (1, 3)
    state = {"step": own["state"][0]["step"], **{n: own["state"][0][n].contiguous() for n in ("exp_avg", "exp_avg_sq")}}
    saved["optimizer_states"] = [{"state": {0: state}, "param_groups": own["param_groups"]}]
    saved["state_dict"], saved["learning_method"]["class"] = method.state_dict(), "Kept"
    method.on_load_checkpoint(saved)
    for name, value in saved["optimizer_states"][0]["state"][0].items():
        assert torch.equal(value, own["state"][0][name])
        assert value.stride() == own["state"][0][name].stride()


def test_settings_of_optimisers_are_those_of_the_configuration(whole):
    """Not those of the file: who goes on may change them, and a file may bring what makes no sense."""
    saved, method = load_checkpoint(whole / "10" / "last.ckpt"), Toy()
    saved["optimizer_states"][0]["param_groups"][0].update(eps=-1.0, betas="abc", lr=None, fused=5)
    method.optimizer.param_groups[0]["weight_decay"] = 0.25
    expected = method.optimizer.state_dict()["param_groups"]
    method.on_load_checkpoint(saved)
    method.optimizer.load_state_dict(saved["optimizer_states"][0])
    assert method.optimizer.state_dict()["param_groups"] == expected


def test_weights_that_are_not_finite_are_not_taken(whole):
    saved, method = load_checkpoint(whole / "10" / "last.ckpt"), Toy()
    before = method.net.weight.clone()
    saved["state_dict"]["net.weight"][0, 1] = torch.nan
    with pytest.raises(ValueError, match=r"net\.weight is not finite, expected finite weights"):
        method.begin_from(saved)
    assert torch.equal(method.net.weight, before)


def test_what_is_no_weight_may_be_infinite_and_not_nan(whole):
    saved, method = load_checkpoint(whole / "10" / "last.ckpt"), Toy()
    method.register_buffer("best", torch.tensor(-torch.inf))
    saved["state_dict"]["best"] = torch.tensor(torch.inf)
    method.check_checkpoint(saved)
    saved["state_dict"]["best"] = torch.tensor(torch.nan)
    with pytest.raises(ValueError, match="best is not finite"):
        method.check_checkpoint(saved)
    saved["state_dict"]["best"] = torch.tensor(1, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"best is of torch\.complex64, expected torch\.float32"):
        method.check_checkpoint(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["state_dict"]["net.bias"].fill_(torch.nan), "net.bias is not finite, expected finite"),
        (lambda saved: saved["optimizer_states"].pop(), r"optimisers have \[\] parameters, expected \[2\]"),
        (
            lambda saved: saved["optimizer_states"][0]["param_groups"][0]["params"].pop(),
            r"optimisers have \[1\] parameters, expected \[2\]",
        ),
        (
            lambda saved: saved["optimizer_states"][0]["state"][1]["exp_avg"].fill_(torch.inf),
            "optimiser 0, parameter 1: expected exp_avg to be finite, found",
        ),
        (lambda saved: saved["learning_method"]["processes"][0]["random"].pop("python"), "random states: expected"),
        (lambda saved: saved["learning_method"]["processes"][0]["random"].update(torch=torch.ones(2)), "random states"),
        *(
            (
                lambda saved, position=position: saved["learning_method"]["processes"][0]["random"][
                    "numpy"
                ].__setitem__(1, position),
                "random states",
            )
            for position in (-1, 625, 10**8)
        ),
        *(
            (
                lambda saved, at=at: saved["learning_method"]["processes"][0]["random"]["torch"].__setitem__(at, 7),
                "random states",
            )
            for at in (8, 16)  # how many numbers are left, and where the next is
        ),
        *(
            (
                lambda saved, tally=tally: saved["learning_method"]["processes"][0].update(tallies=[tally]),
                "tallies: expected",
            )
            for tally in (
                [["a"], 5, 1],
                [3, torch.ones(1), 1],
                [[["a"]], torch.ones(1), 1],
                [["a"], torch.ones(2), 1],
                [["a"], torch.ones(1, dtype=torch.int64), 1],
                [["a"], torch.full((1,), torch.nan), 1],
                [["a"], torch.ones(1), 10**400],
                [["a"], torch.ones(1), -1],
            )
        ),
    ],
)
def test_damaged_parts_of_a_checkpoint_are_named_and_nothing_is_changed(whole, change, message):
    saved, method = load_checkpoint(whole / "10" / "last.ckpt"), fresh()
    method.check_checkpoint(saved)
    before = random_state()
    change(saved)
    with pytest.raises(ValueError, match=message):
        method.check_checkpoint(saved)
    assert equal(random_state(), before)


class Regression(LearningMethod):
    """A method whose update can be compiled."""

    def __init__(self, width: int, compile: str | None = None) -> None:
        super().__init__(updates=TOTAL, updates_per_step=1, compile=compile)
        self.net = nn.Linear(width, width)
        self.optimizer = self.register_optimizer(torch.optim.SGD(self.net.parameters(), lr=0.1))

    def update(self, batch: TensorDict) -> TensorDict:
        loss = self.net(batch["x"]).square().mean()
        self.minimise(loss, self.optimizer)
        return TensorDict({"loss": loss.detach()})

    def evaluate(self, task: ToyTask) -> torch.Tensor:
        raise NotImplementedError


def test_a_step_of_an_optimiser_that_is_not_saved_is_refused():
    method = fresh()
    other = torch.optim.Adam(method.net.parameters(), lr=0.1)
    message = r"^Toy: expected an optimiser that register_optimizer was given, found another Adam, which no checkpoint"
    with pytest.raises(ValueError, match=message):
        method.minimise(method.net(torch.ones(1, 3)).sum(), other)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, "Toy.update: expected a TensorDict of scalars, found NoneType"),
        (TensorDict({"loss": torch.zeros(()), "q": torch.zeros(3)}), r"Toy.update: expected scalars, found q \[3\]"),
        ({"loss": 1.0}, "Toy.update: expected scalars, found loss float"),
    ],
)
def test_an_update_without_scalars_is_one_sentence(tmp_path, metrics, message):
    method = fresh()
    method.update = lambda batch: metrics
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, method)


def test_weights_that_nothing_trains_are_named(tmp_path):
    method = fresh()
    method.other = nn.Linear(2, 2)
    message = r"^other.weight and 1 more: expected in an optimiser that is registered, or frozen by requires_"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, method)
    method.other.requires_grad_(False)
    assert method.configure_optimizers() == [method.optimizer]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "Toy.evaluate: expected what the task's metrics are made of, found None"),
        (torch.zeros(0), "Toy.evaluate: expected finite numbers of eval/task/score, found none"),
        (torch.tensor([1.0, torch.nan]), "Toy.evaluate: expected finite numbers of eval/task/score, found nan"),
    ],
)
def test_an_evaluation_without_numbers_is_one_sentence(tmp_path, result, message):
    method = fresh()
    method.evaluate = lambda task: result
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, method)


def test_an_evaluation_that_gives_nothing_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyTask, "metrics", lambda self, result: {})
    with pytest.raises(ValueError, match=r"Toy.evaluate: expected scores by their names, found none\."):
        fit(tmp_path, fresh())


def test_updates_of_the_tenth_run_are_compiled_as_those_of_the_first(monkeypatch):
    """Each for its own sizes: PyTorch compiles a function eight times, and the second time for sizes of any kind."""
    shapes = []

    def backend(graph, inputs):
        shapes.append([tuple(each.shape) for each in inputs if torch.is_tensor(each)])
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for width in range(2, 12):
        shapes.clear()
        Regression(width, compile="default").run_update(TensorDict({"x": torch.ones(4, width)}, [4]))
        assert any((width, width) in each for each in shapes)
        assert all(isinstance(size, int) for each in shapes for shape in each for size in shape)
