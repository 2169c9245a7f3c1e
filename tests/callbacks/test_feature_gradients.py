from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from callbacks.feature_gradients import FeatureGradients
from components.control.actors import DeterministicActor
from components.control.pessimism import MinimumPessimism
from components.networks.encoders import PixelEncoder
from components.networks.ensemble import EnsembleMLP
from components.networks.signal_mixing import discontinuity_score
from lightning_modules.actor_critic import ActorCritic

NETWORK = partial(EnsembleMLP, hidden_dim=8)


def agent(**settings) -> ActorCritic:
    torch.manual_seed(0)
    encoder = {"encoder": partial(PixelEncoder, channels=3), **settings}
    shape = [3, 20, 20] if "encoder" not in settings else [4]
    actor = partial(DeterministicActor, network=NETWORK)
    return ActorCritic(shape, 2, critic=NETWORK, actor=actor, pessimism=MinimumPessimism(), updates=1, **encoder)


class Data:
    def __init__(self, batch: TensorDict | None) -> None:
        self.batch = batch

    def probe(self, count: int) -> TensorDict | None:
        return None if self.batch is None else self.batch[:count]


def test_scores_and_picture_of_the_gradient(tmp_path, transitions):
    module, batch = agent(), transitions(16, [3, 20, 20])
    trainer = SimpleNamespace(datamodule=Data(batch), is_global_zero=True)
    callback = FeatureGradients(tmp_path / "run", samples=8, maps=2)
    callback.on_fit_start(trainer, module)
    random = torch.get_rng_state()
    callback.on_test_epoch_end(trainer, module)
    assert torch.equal(torch.get_rng_state(), random)  # looking changes nothing
    with module.evaluation():
        gradient = module.feature_gradient(batch[:8])[None]
    for name, robust in (("nd", True), ("nd_paper", False)):
        expected = discontinuity_score(gradient, robust).item()
        assert module.scores[f"feature_gradient/{name}"] == pytest.approx([expected], rel=1e-4)
    callback.on_test_end(trainer, module)
    assert (tmp_path / "run" / "feature_gradients.png").stat().st_size > 1000


def test_nothing_is_drawn_without_data(tmp_path):
    callback, module = FeatureGradients(tmp_path / "run"), agent()
    trainer = SimpleNamespace(datamodule=Data(None), is_global_zero=True)
    callback.on_validation_epoch_end(trainer, module)
    callback.on_test_end(trainer, module)
    assert module.scores == {}
    assert not (tmp_path / "run").exists()


def test_modules_and_data_that_do_not_fit_are_named_before_training(tmp_path):
    callback = FeatureGradients(tmp_path)
    with pytest.raises(ValueError, match="expected a module with a picture encoder, found SimpleNamespace"):
        callback.on_fit_start(SimpleNamespace(datamodule=Data(None)), SimpleNamespace())
    with pytest.raises(ValueError, match="expected transitions to look at, found SimpleNamespace without"):
        callback.on_fit_start(SimpleNamespace(datamodule=SimpleNamespace()), agent())
