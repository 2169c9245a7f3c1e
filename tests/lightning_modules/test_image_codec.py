from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from components.coding.code_models import CategoricalVAE, place_frequencies
from components.coding.image_codec import ImageCodec
from components.coding.vqvae import VQVAE
from lightning_modules.image_codec import ImageCodecTraining


def made(**settings) -> ImageCodecTraining:
    torch.manual_seed(0)
    autoencoder = partial(VQVAE, codes=8, dim=4, width=8, blocks=1, block_width=4, halvings=1)
    code_model = partial(CategoricalVAE, width=8, latent_channels=1, embedding=4, free_bits=1.0)
    defaults = {"autoencoder_updates": 6, "updates": 10, "log_every": 1}
    return ImageCodecTraining(
        [1, 8, 8], codec=partial(ImageCodec, autoencoder=autoencoder, code_model=code_model), **{**defaults, **settings}
    )


def images(count: int = 32, seed: int = 0) -> torch.Tensor:
    """Bars: upright ones and lying ones."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    places = torch.randint(4, (count,), generator=generator)
    for index, place in enumerate(places.tolist()):
        if index % 2:
            made[index, 0, 2 * place : 2 * place + 2] = 255
        else:
            made[index, 0, :, 2 * place : 2 * place + 2] = 255
    return made


def batch(**arguments) -> TensorDict:
    x = images(**arguments)
    return TensorDict({"image": x}, batch_size=[len(x)])


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten().float() for value in module.state_dict().values()])


def test_first_the_autoencoder_then_the_code_model():
    module = made()
    autoencoder, code_model = weights(module.codec.autoencoder), weights(module.codec.code_model)
    assert module.schedule() == {"autoencoder": True}
    module.run_update(batch())
    assert not torch.equal(weights(module.codec.autoencoder), autoencoder)
    assert torch.equal(weights(module.codec.code_model), code_model)
    module.updates = 6
    assert module.schedule() == {"autoencoder": False}
    module.begin_codes(images(200))
    autoencoder, code_model = weights(module.codec.autoencoder), weights(module.codec.code_model)
    module.train()
    module.run_update(batch())
    assert torch.equal(weights(module.codec.autoencoder), autoencoder)  # codebooks and their averages too
    assert not torch.equal(weights(module.codec.code_model), code_model)


def test_loss_is_that_of_reconstructions_and_commitment():
    module = made(commitment=0.7)
    module.run_update(batch())
    twin = made(commitment=0.7)
    twin.load_state_dict(module.state_dict())
    out = twin.codec.autoencoder(images(seed=1))
    error = (out.images - (images(seed=1).float() / 127.5 - 1)).square().mean()
    expected = torch.autograd.grad(error + 0.7 * out.commitment, list(twin.codec.autoencoder.parameters()))
    torch.manual_seed(0)
    metrics = module.run_update(batch(seed=1))
    assert metrics["squared_error"].item() == pytest.approx(error.item(), rel=1e-5)
    for parameter, gradient in zip(module.codec.autoencoder.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_the_code_model_begins_at_the_frequencies_of_all_training_codes_once():
    module = made()
    module.run_update(batch())
    module.updates = 6
    module.begin_codes(images(200))
    codes = module.codec.encode(images(200))
    frequencies = place_frequencies(codes, 8)
    torch.testing.assert_close(module.codec.frequencies, frequencies.float())
    torch.testing.assert_close(module.codec.code_model.bias.detach(), frequencies.log().float())
    resumed = made()
    resumed.load_state_dict(module.state_dict())
    resumed.updates = 8
    resumed.begin_codes(images(50, seed=3))
    torch.testing.assert_close(resumed.codec.frequencies, frequencies.float())
    resumed.train()
    assert not resumed.codec.autoencoder.training
    assert resumed.codec.code_model.training


def test_learning_rates_and_the_weight_of_latents():
    module = made(latent_warmup=0.5)
    found = []
    for update in (0, 3, 6, 8, 10):
        module.updates = update
        found.append(module.learning_rate_factors())
    assert found == [pytest.approx(pair) for pair in ([1, 1], [0.55, 1], [0.1, 1], [0.1, 0.5], [0.1, 0.0])]
    module.trainer = SimpleNamespace(should_stop=False)
    module.record = lambda metrics: None
    module.log = lambda *arguments, **settings: None
    module.begin_codes(images())
    seen = []
    for update in (6, 7, 8, 9):
        module.updates = update
        module.training_step(TensorDict({"image": images()[None]}, batch_size=[1]), 0)
        seen.append(module.latent_weight.item())
    assert seen == pytest.approx([0, 0.5, 1, 1])


def test_it_learns_bars():
    """Eight pictures: hardly an error, and fewer bits than places have by themselves."""
    module = made(autoencoder_updates=400, updates=800, autoencoder_learning_rate=3e-3, code_model_learning_rate=1e-2)
    for update in range(800):
        if update == 400:
            module.updates = 400
            module.begin_codes(images(400))
        module.updates = update
        module._anneal()
        module.latent_weight.fill_(min(1.0, max(0, update - 400) / 100))
        module.run_update(batch(seed=update))
    module.eval()
    result = module.evaluate(SimpleNamespace(images=images(400, seed=999)))
    error = (result["reconstruction"].float() - images(400, seed=999).float()).square().mean()
    assert error < 0.02 * 255**2
    codes = result["codes"]
    static = -module.codec.frequencies.log2()[torch.arange(codes.shape[1]), codes].sum(1).mean()
    assert result["rate"].mean() < 0.8 * static  # places depend on each other
    assert result["top_perplexity"] > 1.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"autoencoder_updates": 10}, "updates=10: expected more than autoencoder_updates=10"),
        ({"updates_per_step": 5, "log_every": 5}, "autoencoder_updates=6 is no multiple of updates_per_step=5"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)
