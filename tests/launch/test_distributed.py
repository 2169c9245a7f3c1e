"""Two processes with half of the batch each: the gradients of one with all of it, and whole runs with reports.

Run as a program (`python test_distributed.py RANK FOLDER`) this file is one of the two processes.
"""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from callbacks.run_log import read_rows
from components.coding.code_models import CategoricalVAE
from components.coding.image_codec import ImageCodec
from components.coding.vqvae import VQVAE
from components.control.actor_objectives import AdvantageWeighted, BehaviourCloning, ReparameterisedGradient
from components.control.actors import DeterministicActor, EntropyTemperature, GaussianActor, NormalActor
from components.control.forward_backward import BackwardMap, ForwardMap, ZConditionedActor, sample_sphere
from components.control.normalisation import ObservationNormaliser, RewardNormaliser
from components.control.novelty import RandomNetworkDistillation
from components.control.pessimism import DualPessimism, MinimumPessimism
from components.control.policies import ClippedGaussianPolicy, TanhGaussianPolicy
from components.distributed import rank, world_size
from components.language.adapters import SingularValueAdapter
from components.networks.classifiers import ResNet, SmallConvNet
from components.networks.encoders import FeatureTrunk, PixelEncoder
from components.networks.ensemble import EnsembleMLP, EnsembleResidualMLP
from components.networks.signal_mixing import SignalMixing
from components.priority_tree import PriorityTree
from datamodules.stored.offline import OfflineDataModule
from datamodules.stored.swirl import swirl_dataset
from launch.checkpoints import load_checkpoint
from lightning_modules.actor_critic import ActorCritic
from lightning_modules.class_incremental import ClassIncremental
from lightning_modules.expert_training import ExpertTraining
from lightning_modules.forward_backward import ForwardBackward
from lightning_modules.image_codec import ImageCodecTraining
from lightning_modules.ppo import ProximalPolicyOptimisation

ROOT = Path(__file__).resolve().parents[2]
ROWS, GROUP_ROWS = 32, 4
FREE_BITS = 0.2  # about what an untrained model's latents have
OBJECTIVES = {
    "aw_softmax": partial(AdvantageWeighted, weighting="softmax"),
    "aw_iwis": partial(AdvantageWeighted, weighting="iwis"),
    "aw_iwis_not_renormalised": partial(AdvantageWeighted, weighting="iwis", renormalise=False),
    "aw_softmax_mean": partial(AdvantageWeighted, weighting="softmax", over_batch="mean"),
    "aw_exp": partial(AdvantageWeighted, weighting="exp", over_batch="mean", over_action="sum"),
    "bc": BehaviourCloning,
    "td3": partial(ReparameterisedGradient, 0.5, 0.3),
    "td3bc": partial(ReparameterisedGradient, 0.5, 0.3, behaviour_cloning=1.0),
    "td3bc_distance": partial(ReparameterisedGradient, 0.5, 0.3, behaviour_cloning=1.0, scaled="distance"),
}
REPRESENTATIONS = {
    "one_block": {"blocks": 1},
    "one_block_pessimistic": {"blocks": 1, "measure_pessimism": 0.5},
    "one_block_value": {"blocks": 1, "value_weight": 0.1},
    "four_blocks": {"blocks": 4},
    "four_blocks_pessimistic": {"blocks": 4, "measure_pessimism": 0.5},
    "four_blocks_value": {"blocks": 4, "value_weight": 0.1},
    "four_blocks_within_groups": {"blocks": 4, "within_groups": True, "value_weight": 0.1},
}


def noise_of_the_row(self, sample_shape=(), clip=None):
    """Policy samples whose noise is a function of the row, so that it does not depend on how the batch is split."""
    counts = torch.arange(1, 1 + max(1, *sample_shape, 1)).view(-1, *(1,) * self.mean.dim())
    noise = self.std * torch.sin(50 * self.mean.detach() + counts)
    return self.mean + (noise if sample_shape else noise[0])


def tanh_noise_of_the_row(self, sample_shape=()):
    """The same for the tanh-Gaussian policy."""
    noise = torch.sin(50 * self.pre_tanh_mean.detach() + 1)
    u = self.pre_tanh_mean + self.std * noise
    return u.tanh(), self._log_prob(u, noise)


def gradients() -> dict[str, list[torch.Tensor]]:
    """What `minimise` steps along, for every loss, from this process's share of one fixed batch."""
    ClippedGaussianPolicy.sample = noise_of_the_row
    TanhGaussianPolicy.sample_with_log_prob = tanh_noise_of_the_row
    generator = torch.Generator().manual_seed(7)
    share = slice(rank() * ROWS // world_size(), (rank() + 1) * ROWS // world_size())
    observation, next_observation = torch.randn(2, ROWS, 5, generator=generator)[:, share]
    action, next_action = (2 * torch.rand(2, ROWS, 2, generator=generator) - 1)[:, share]
    discount = (0.9 * (torch.rand(ROWS, 1, generator=generator) > 0.1))[share]

    found = {}
    for name, settings in REPRESENTATIONS.items():
        settings = dict(settings)
        torch.manual_seed(3)
        agent = ForwardBackward(
            [5],
            2,
            features=8,
            forward_map=partial(ForwardMap, hidden_dim=16),
            backward_map=partial(BackwardMap, hidden_dim=16, blocks=settings.pop("blocks")),
            actor=partial(ZConditionedActor, hidden_dim=16),
            objective=AdvantageWeighted(),
            groups=ROWS // GROUP_ROWS // world_size(),
            updates=1,
            **settings,
        )
        z = sample_sphere((ROWS, 8))
        if agent.groups is not None:
            z = z[::GROUP_ROWS].repeat_interleave(GROUP_ROWS, 0)
        z = z[share]
        loss, _ = agent.representation_loss(observation, action, next_observation, discount, z, next_action)
        found[name] = minimised(agent, loss, agent.representation_optimizer)
        if name in ("one_block", "four_blocks"):
            for objective, make in OBJECTIVES.items():
                agent.objective = make()
                loss, _ = agent.actor_loss(observation, action, z)
                before = [parameter.detach().clone() for parameter in agent.actor.parameters()]
                found[f"{objective}, {name}"] = minimised(agent, loss, agent.actor_optimizer)
                for parameter, value in zip(agent.actor.parameters(), before):
                    parameter.data.copy_(value)
    batch = TensorDict(
        {
            "observation": observation,
            "action": action,
            "next": {
                "observation": next_observation,
                "reward": observation[:, :1],
                "terminated": discount == 0,
            },
        },
        [len(observation)],
    )
    for quantiles in (1, 5):
        for part, gradient in actor_critic_gradients(batch, quantiles).items():
            found[f"actor-critic {part}, {quantiles}"] = gradient
    found["novelty"] = novelty_gradients(observation)
    found["on-policy"] = on_policy_gradients(observation, action)
    found["priorities"] = priorities(torch.arange(ROWS)[share], action[:, 0])
    pictures = torch.randint(256, (2, ROWS, 3, 20, 20), generator=generator, dtype=torch.uint8)[:, share]
    batch["observation"], batch["next", "observation"] = pictures
    found["pixels"] = pixel_gradients(batch)
    found["pixels, a loss of the encoder's own"] = encoder_gradients(batch)
    pairs = torch.randint(256, (ROWS, 2, 1, 8, 8), generator=generator, dtype=torch.uint8)[share]
    labels = (torch.arange(ROWS) % 3)[share]
    for positives in ("class", "instance"):
        found[f"classifier, {positives}"] = classifier_gradients(pairs, labels, positives)
    found["classifier, statistics"] = classifier_statistics(pairs[:, 0], labels)
    found["autoencoder"] = autoencoder_gradients(pairs[:, 0])
    tokens = torch.randint(3, 30, (ROWS, 8), generator=generator)[share]
    rewards = torch.randn(ROWS, generator=generator)[share]
    for baseline in ("none", "leave_one_out"):
        found[f"expert, {baseline}"] = expert_gradients(tokens, rewards, baseline)
    found["expert, sharded"] = expert_gradients(tokens, rewards, "none", sharded=True)
    found["code model"] = code_model_gradients(torch.randint(6, (ROWS, 4), generator=generator)[share])
    return found


def novelty_gradients(observation: torch.Tensor) -> list[torch.Tensor]:
    """And the rewards' scale, after two batches."""
    torch.manual_seed(3)
    agent = ActorCritic(
        [5],
        2,
        critic=partial(EnsembleMLP, hidden_dim=16),
        actor=partial(GaussianActor, network=partial(EnsembleMLP, hidden_dim=16)),
        pessimism=MinimumPessimism(),
        intrinsic_reward=partial(RandomNetworkDistillation, features=8, hidden_dim=16),
        updates=1,
    )
    novelty = agent.intrinsic_reward
    for scale in (1.0, 2.0):
        novelty.rewards(scale * novelty.errors(observation))
    gradient = minimised(agent, novelty.errors(observation).mean(), agent.intrinsic_optimizer)
    return [*gradient, novelty.mean.clone(), novelty.squares.clone()]


def on_policy_gradients(observation: torch.Tensor, action: torch.Tensor) -> list[torch.Tensor]:
    """And what normalisers and the learning rate know after two rollouts."""
    torch.manual_seed(3)
    agent = ProximalPolicyOptimisation(
        [5],
        2,
        actor=partial(NormalActor, network=partial(EnsembleMLP, hidden_dim=16)),
        value=partial(EnsembleMLP, hidden_dim=16),
        normaliser=ObservationNormaliser,
        reward_normaliser=RewardNormaliser(),
        target_divergence=0.01,
        updates=1,
    )
    ends = observation[:, :1] > 0
    following = {"observation": observation, "reward": action[:, :1], "terminated": ends, "done": ends}
    rows = TensorDict({"observation": observation, "action": action, "next": following}, [len(observation)])
    rollout, carried = rows.unsqueeze(1), None
    for _ in range(2):
        prepared, carried = agent.prepare(rollout, carried)
    agent.update(prepared)
    gradients = [parameter.grad.clone() for parameter in (*agent.actor.parameters(), *agent.value.parameters())]
    agent.updates = 1
    agent.divergence.fill_(0.001)
    agent.prepare(rollout, carried)
    return [*gradients, *(buffer.float() for buffer in agent.buffers())]


def priorities(index: torch.Tensor, logit: torch.Tensor) -> list[torch.Tensor]:
    """Of shared data, after a method gave those of its own share of the rows."""
    data = OfflineDataModule(partial(swirl_dataset, 1), None, {}, batch_size=8, updates_per_step=1, evaluate_every=1)
    data._priorities = PriorityTree(ROWS)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(take_priorities=lambda: (index, logit)))
    data._refresh()
    return [data._priorities.logits]


def code_model_gradients(codes: torch.Tensor) -> list[torch.Tensor]:
    """With free bits about as many as there are, and the same noise in all rows."""
    torch.manual_seed(3)
    model = CategoricalVAE([(2, 2)], 6, width=8, latent_channels=3, embedding=4, free_bits=FREE_BITS)
    module = ImageCodecTraining(
        [1, 8, 8],
        codec=partial(
            ImageCodec,
            autoencoder=partial(VQVAE, codes=6, dim=4, width=8, blocks=1, block_width=4),
            code_model=lambda **sizes: model,
        ),
        autoencoder_updates=1,
        updates=2,
    )
    randn_like, torch.randn_like = torch.randn_like, lambda x: torch.sin(50 * x.detach() + 1)
    try:
        loss, _ = model.loss(codes)
    finally:
        torch.randn_like = randn_like
    return minimised(module, loss, module.code_model_optimizer)


def classifier_gradients(pairs: torch.Tensor, labels: torch.Tensor, positives: str) -> list[torch.Tensor]:
    """Of the cross-entropy and the contrastive loss, which compares all views with each other."""
    torch.manual_seed(3)
    module = ClassIncremental(
        [1, 8, 8],
        3,
        network=partial(SmallConvNet, channels=(4,), features=6),
        task_updates=[1],
        optimizer=partial(torch.optim.SGD, lr=0.0),
        information_back=1.0,
        pairs=positives,
        updates=1,
    )
    module.begin_task(0, 3)
    loss = torch.nn.functional.cross_entropy(module.logits(module.features(pairs[:, 0])), labels)
    return minimised(module, loss + module.contrastive_loss(pairs, labels), module.optimizer)


def classifier_statistics(images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Running means of the first batch normalisation, whose inputs are the same however a batch is shared."""
    torch.manual_seed(3)
    module = ClassIncremental(
        [1, 8, 8],
        3,
        network=partial(ResNet, depth=1),
        task_updates=[2],
        optimizer=partial(torch.optim.SGD, lr=0.0),
        updates=2,
    )
    module.begin_task(0, 3)
    for _ in range(2):
        module.run_update(TensorDict({"image": images // 4, "label": labels}, [len(images)]))  # dark: no mean of zero
    return [module.network.layers[1].running_mean]


def expert_gradients(
    tokens: torch.Tensor, rewards: torch.Tensor, baseline: str, sharded: bool = False
) -> list[torch.Tensor]:
    """Of a language model's rewarded completions, and their divergence from the base model.

    Where there are two processes, each may have half of the frozen weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=30, initializer_range=0.5)).eval()
    module = ExpertTraining(
        ends=[2],
        language_model=SimpleNamespace(model=lambda dtype: model, checksum="of a model"),
        adapter=partial(SingularValueAdapter, modules="both", factorised=sharded),
        optimizer=partial(torch.optim.SGD, lr=0.0),
        max_norm=None,
        baseline=baseline,
        normalise_rewards=True,
        kl_coefficient=0.1,
        micro_batch=7,
        updates=1,
    )
    if sharded and world_size() > 1:
        module.shard(init_device_mesh("cpu", (world_size(),)))
        assert isinstance(model.model.layers[0].mlp.up_proj.parametrizations.weight[0].u, DTensor)
    ones = torch.ones(len(tokens), 4, dtype=torch.bool)
    batch = {"prompt": tokens[:, :4], "prompt_mask": ones, "completion": tokens[:, 4:], "completion_mask": ones}
    module.update(TensorDict({**batch, "right": rewards > 0, "reward": rewards}, [len(tokens)]))
    return [parameter.grad for parameter in module.language.adapter.parameters.values()]


def autoencoder_gradients(images: torch.Tensor) -> list[torch.Tensor]:
    """Of the loss, and what becomes of the codebook."""
    torch.manual_seed(3)
    autoencoder = partial(VQVAE, codes=8, dim=4, width=8, blocks=1, block_width=4, restart_below=0.0)
    module = ImageCodecTraining(
        [1, 8, 8],
        codec=partial(ImageCodec, autoencoder=autoencoder, code_model=partial(CategoricalVAE, width=8)),
        autoencoder_updates=1,
        updates=2,
    )
    module.codec.autoencoder.quantizer.begun.fill_(True)  # the first codes are drawn from one process's share
    out = module.codec.autoencoder(images)
    loss = (out.images - module.codec.autoencoder.scaled(images)).square().mean() + 0.25 * out.commitment
    gradients = minimised(module, loss, module.autoencoder_optimizer)
    return [*gradients, module.codec.autoencoder.quantizer.codebook.clone()]


def pixel_gradients(batch: TensorDict) -> list[torch.Tensor]:
    """Of critics and encoder, and of the strength of mixing, which comes from the gradient of the whole batch."""
    torch.manual_seed(3)
    agent = ActorCritic(
        [3, 20, 20],
        2,
        critic=partial(EnsembleMLP, hidden_dim=16, last_gain=1.0),
        actor=partial(DeterministicActor, network=partial(EnsembleMLP, hidden_dim=16, last_gain=1.0)),
        pessimism=MinimumPessimism(),
        encoder=partial(PixelEncoder, channels=4, mixing=partial(SignalMixing, initial=0.0)),
        trunk=partial(FeatureTrunk, feature_dim=6),
        updates=1,
    )
    features = agent.encoder(batch["observation"])
    loss, _, _ = agent.critic_loss(features, batch["action"], agent.target(batch))
    return minimised(agent, loss, agent.critic_optimizer)


class Brightness(PixelEncoder):
    """Has a loss of its own, which is large beside that of the critics."""

    def loss(self, observation: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return 10 * (features.mean(1) - observation.flatten(1).float().mean(1) / 255).square().mean()


def encoder_gradients(batch: TensorDict) -> list[torch.Tensor]:
    """Of critics and encoder, in an update as it is made."""
    torch.manual_seed(3)
    agent = ActorCritic(
        [3, 20, 20],
        2,
        critic=partial(EnsembleMLP, hidden_dim=16, last_gain=1.0),
        actor=partial(DeterministicActor, network=partial(EnsembleMLP, hidden_dim=16, last_gain=1.0)),
        pessimism=MinimumPessimism(),
        encoder=partial(Brightness, channels=4),
        updates=1,
    )
    agent.update(batch, actor=False)
    return [parameter.grad for group in agent.critic_optimizer.param_groups for parameter in group["params"]]


def actor_critic_gradients(batch: TensorDict, quantiles: int) -> dict[str, list[torch.Tensor]]:
    torch.manual_seed(3)
    agent = ActorCritic(
        [5],
        2,
        critic=partial(EnsembleResidualMLP, hidden_dim=16, last_gain=1.0),
        actor=partial(GaussianActor, network=partial(EnsembleMLP, hidden_dim=16, last_gain=1.0)),
        pessimism=DualPessimism(0.4),
        temperature=EntropyTemperature,
        members=3,
        quantiles=quantiles,
        updates=1,
    )
    loss, errors, _ = agent.critic_loss(batch["observation"], batch["action"], agent.target(batch))
    found = {"critic": minimised(agent, loss, agent.critic_optimizer)}
    found["pessimism"] = minimised(agent, agent.pessimism.loss(errors), agent.pessimism_optimizer)
    loss, metrics = agent.actor_loss(batch["observation"], batch["action"])
    agent.minimise(loss, agent.actor_optimizer, max_norm=0.05)
    found["actor"] = [parameter.grad.clone() for parameter in agent.actor.parameters()]
    found["temperature"] = minimised(agent, agent.temperature.loss(-metrics["entropy"]), agent.temperature_optimizer)
    return found


def minimised(agent, loss, optimizer) -> list[torch.Tensor]:
    agent.minimise(loss, optimizer)
    return [parameter.grad.clone() for group in optimizer.param_groups for parameter in group["params"]]


CASES = [
    "novelty",
    "on-policy",
    "priorities",
    *REPRESENTATIONS,
    *(f"{o}, {r}" for o in OBJECTIVES for r in ("one_block", "four_blocks")),
    "pixels",
    "pixels, a loss of the encoder's own",
    "classifier, class",
    "classifier, instance",
    "classifier, statistics",
    "autoencoder",
    "code model",
    "expert, none",
    "expert, leave_one_out",
    "expert, sharded",
    *(f"actor-critic {part}, {m}" for part in ("critic", "pessimism", "actor", "temperature") for m in (1, 5)),
]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Gradients of the whole batch in this process, and of each of two processes."""
    folder = tmp_path_factory.mktemp("gradients")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(number), str(folder)], env=environment) for number in range(2)
    ]
    sample, sample_with_log_prob = ClippedGaussianPolicy.sample, TanhGaussianPolicy.sample_with_log_prob
    state = torch.get_rng_state()
    try:
        whole = gradients()
    finally:
        ClippedGaussianPolicy.sample, TanhGaussianPolicy.sample_with_log_prob = sample, sample_with_log_prob
        torch.set_rng_state(state)
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return whole, [torch.load(folder / f"{number}.pt") for number in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_halves_of_a_batch_give_the_gradients_of_the_whole(both, case):
    whole, halves = both
    for process in halves:
        torch.testing.assert_close(process[case], whole[case], rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, *(process[case] for process in halves)))  # or their weights would part
    assert any(gradient.abs().max() > 1e-3 for gradient in whole[case])


PATIENCE = 5.0  # seconds in which a run that is asked to end ends
DDP = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")


def finish(process) -> tuple[Path, str]:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert err == ""
    return Path(out.strip().splitlines()[-1]), out


def stopped(process, *others: int, trust: str = "") -> Path:
    """The folder of a run that was asked to end, by SIGTERM to its first process and to `others`."""
    asked = time.monotonic()
    for number in (process.pid, *others):
        os.kill(number, signal.SIGTERM)
    _, err = process.communicate(timeout=60)  # the other processes write to the same pipe
    assert time.monotonic() - asked < PATIENCE
    assert process.returncode == 143
    found_by = rf"PYTHONPATH={Path(__file__).resolve().parents[2]} " if trust else ""
    found = re.fullmatch(rf"Stopped\. Go on with: {found_by}python train\.py ckpt_path=(\S+){re.escape(trust)}\n", err)
    assert found, err
    return Path(found[1])


def children(process) -> list[int]:
    return [int(number) for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def resumed(spawn, wait_for_updates, one_arm, tmp_path_factory):
    """A run that went on after its launcher, alone, was asked to end in the middle of an evaluation."""
    root = tmp_path_factory.mktemp("ddp")
    slow = "datamodule.task.path=tests.launch.slow_task.SlowTask"
    arguments = [*one_arm, *DDP, slow, f"output_root={root}", "module.updates=60"]
    process = spawn(*arguments, SLOW="0.5")
    wait_for_updates(process, root, "fb_aw_narrow", 40)
    time.sleep(0.5)
    first = stopped(process, trust=" 'trust=[tests]'")
    second, out = finish(spawn(*arguments, "ckpt_path=last", "trust=[tests]"))
    assert second == first
    return second, out


def test_two_processes_run_from_the_command_line_and_resume(resumed):
    folder, out = resumed
    assert out.count("resuming after 30 updates.") == 1
    assert out.count("# fb_overdrive") == 1
    assert (folder / "report.md").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no folder of the second process
    run = folder / "fb_aw_narrow" / "seed_0"
    assert [int(row["updates"]) for row in read_rows(run / "train.csv")[1]] == list(range(5, 61, 5))
    assert [int(row["updates"]) for row in read_rows(run / "eval.csv")[1]] == [40, 60]
    processes = load_checkpoint(run / "checkpoints" / "last.ckpt")["learning_method"]["processes"]
    assert len(processes) == 2
    assert not torch.equal(processes[0]["random"]["torch"], processes[1]["random"]["torch"])


def test_two_processes_learn_one_class_after_the_other_and_resume(spawn, wait_for_updates, tmp_path):
    """The codec, too: both processes read what the first has written."""
    arguments = (
        "experiment=drr_digits",
        *(f"~arms.{arm}" for arm in ("fine_tuning", "joint", "raw_64", "fixed_64", "static_64")),
        *(f"~arms.{arm}" for arm in ("raw_128", "fixed_128", "static_128", "bits_back_128")),
        "num_seeds=1",
        "codec_updates={autoencoder: 30, code_model: 30}",
        "task_updates=[20, 10, 10, 10, 10, 10]",
        "checkpoint_every=10",
        "module.log_every=5",
        *DDP,
        f"output_root={tmp_path}",
    )
    first = spawn(*arguments)
    wait_for_updates(first, tmp_path, "bits_back_64", 30)
    first.kill()
    first.wait()
    folder, out = finish(spawn(*arguments, "ckpt_path=last"))
    assert "resuming after" in out
    run = folder / "bits_back_64" / "seed_0"
    assert [int(row["updates"]) for row in read_rows(run / "train.csv")[1]] == list(range(5, 71, 5))
    assert [float(row["test/classes"]) for row in read_rows(run / "eval.csv")[1]] == [5, 6, 7, 8, 9, 10]
    assert (run / "memory" / "memory.bin").exists()


def test_a_process_whose_launcher_is_killed_before_they_meet_ends(spawn, one_arm, tmp_path):
    first = spawn(*one_arm, *DDP, f"output_root={tmp_path}")
    until = time.monotonic() + 60
    while not (second := children(first)) and time.monotonic() < until:
        time.sleep(0.01)
    first.kill()
    first.wait()
    assert second
    while Path(f"/proc/{second[0]}/cmdline").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{second[0]}/cmdline").exists()


@pytest.mark.slow
def test_two_processes_resume_exactly(resumed, spawn, one_arm, tmp_path):
    whole, _ = finish(spawn(*one_arm, *DDP, f"output_root={tmp_path}", "module.updates=60"))
    states = [load_checkpoint(folder / "fb_aw_narrow/seed_0/checkpoints/last.ckpt") for folder in (whole, resumed[0])]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name
    rows = [read_rows(folder / "fb_aw_narrow/seed_0/train.csv")[1] for folder in (whole, resumed[0])]
    for row in (*rows[0], *rows[1]):
        row.pop("seconds")
    assert rows[0] == rows[1]


ONLINE = (
    "experiment=gpl_zero_mdp",
    *(f"~arms.{arm}" for arm in ("fixed_00", "fixed_05", "fixed_15", "learned_from_00", "flipped")),
    "num_seeds=1",
    "module.log_every=10",
    "datamodule.num_envs=2",
    "datamodule.evaluate_every=40",
    "callbacks.critic_bias.rows=2",
    "checkpoint_every=20",
)


@pytest.fixture(scope="module")
def online(spawn, wait_for_updates, tmp_path_factory):
    """A run that went on after all of its processes were asked to end in the middle of training, as schedulers do."""
    root = tmp_path_factory.mktemp("online")
    arguments = [*ONLINE, *DDP, f"output_root={root}", "module.updates=80"]
    process = spawn(*arguments)
    wait_for_updates(process, root, "learned_from_05", 50)
    first = stopped(process, *children(process))
    second, out = finish(spawn(*arguments, "ckpt_path=last"))
    assert second == first
    assert "resuming after 40 updates." in out or "resuming after 60 updates." in out
    return second / "learned_from_05" / "seed_0"


def test_two_processes_collect_experience_of_their_own(online):
    processes = load_checkpoint(online / "checkpoints" / "last.ckpt")["OnlineDataModule"]["processes"]
    assert [process["written"] for process in processes] == [154, 154]  # 300 + 80 / 10 steps of two environments
    assert not torch.equal(*(process["environment"]["state"] for process in processes))
    assert {path.name for path in (online / "replay").iterdir()} == {"process_0", "process_1"}
    rows = read_rows(online / "train.csv")[1]
    assert [int(row["updates"]) for row in rows] == list(range(10, 81, 10))
    assert int(rows[-1]["env_steps"]) == 308


@pytest.mark.slow
def test_two_collecting_processes_resume_exactly(assert_same_runs, online, spawn, tmp_path):
    whole, _ = finish(spawn(*ONLINE, *DDP, f"output_root={tmp_path}", "module.updates=80"))
    assert_same_runs(online.parent.parent, whole, ["learned_from_05"])


if __name__ == "__main__":
    _, number, folder = sys.argv
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=int(number), world_size=2
    )
    torch.save(gradients(), Path(folder) / f"{number}.pt")
    torch.distributed.destroy_process_group()
