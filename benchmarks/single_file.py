"""SAC, REDQ, GPL, AWAC, IQL and PPO as the fastest single-file scripts write them: our peers.

Plain PyTorch and nothing of this project but environments: modules, fused Adam, `backward`, updates of target networks
by `foreach`, batches indexed from tensors. The updates are those of `lightning_modules.actor_critic` and
`lightning_modules.ppo`, number for number (tests/benchmarks/test_single_file.py).

Dimensions: B batch, P critics, A actions, N environments, T steps.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.envs import EnvBase

DISCOUNT, TARGET_RATE = 0.99, 0.005
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # observation, action, next observation, reward, terminated


class Actor(nn.Module):
    def __init__(self, observation_dim: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(observation_dim, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 2 * action_dim),
        )

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        mean, x = self.layers(observation).chunk(2, -1)
        log_std = 6 * (torch.tanh(x) + 1) - 10
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        return torch.tanh(u), (log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


class StackedLinear(nn.Module):
    def __init__(self, members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        weight = torch.randn(members, in_features, out_features) / math.sqrt(in_features)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(members, 1, out_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class SpectralLinear(StackedLinear):
    def __init__(self, members: int, in_features: int, out_features: int) -> None:
        super().__init__(members, in_features, out_features)
        self.register_buffer("vector", F.normalize(torch.randn(members, out_features, 1), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            left = F.normalize(self.weight @ self.vector, dim=1)
            right = self.weight.mT @ left
            norm = right.norm(dim=1, keepdim=True)
            self.vector.copy_(right / norm)
            self.weight.div_(norm)
        return super().forward(x)


class StackedNorm(nn.Module):
    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(members, 1, width))
        self.shift = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, F.layer_norm(x, x.shape[-1:], eps=1e-3), self.scale)


class SimpleCritics(nn.Module):
    def __init__(self, in_features: int, members: int, width: int) -> None:
        super().__init__()
        self.first = StackedLinear(members, in_features, width)
        self.second = StackedLinear(members, width, width)
        self.last = StackedLinear(members, width, 1)
        self.members = members

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([observation, action], -1).expand(self.members, -1, -1)
        return self.last(F.relu(self.second(F.relu(self.first(x))))).squeeze(-1)  # [P, B]


class ModernCritics(nn.Module):
    def __init__(self, in_features: int, members: int, width: int) -> None:
        super().__init__()
        self.first = StackedLinear(members, in_features, width)
        self.norm = StackedNorm(members, width)
        self.inner = SpectralLinear(members, width, width)
        self.outer = SpectralLinear(members, width, width)
        self.last = StackedLinear(members, width, 1)
        self.members = members

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([observation, action], -1).expand(self.members, -1, -1)
        x = F.relu(self.first(x))
        return self.last(x + self.outer(F.relu(self.inner(self.norm(x))))).squeeze(-1)


class SAC:
    """Soft actor-critic with the minimum of its critics."""

    losses = ("critic_loss", "actor_loss")

    def __init__(self, observation_dim: int, action_dim: int, critics: nn.Module, width: int, momentum: float = 0.9):
        self.critics, self.actor = critics, Actor(observation_dim, action_dim, width)
        self.targets = copy.deepcopy(critics).requires_grad_(False)
        self.log_alpha = torch.zeros((), requires_grad=True)
        self.target_entropy = -action_dim
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), 3e-4, fused=True)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), 3e-4, fused=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], 3e-4, betas=(momentum, 0.999), fused=True)

    def value(self, q: Tensor) -> Tensor:
        return torch.minimum(q[0], q[1])

    def target_value(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.value(self.targets(observation, action))

    def learn_pessimism(self, errors: Tensor) -> None:
        pass

    def clip_actor(self) -> None:
        pass

    def critic_loss(self, observation: Tensor, action: Tensor, next_observation: Tensor, reward: Tensor, end: Tensor):
        with torch.no_grad():
            next_action, log_prob = self.actor(next_observation)
            value = self.target_value(next_observation, next_action) - self.log_alpha.exp() * log_prob
            target = reward + DISCOUNT * (1 - end) * value
        errors = self.critics(observation, action) - target
        return 0.5 * errors.square().sum(0).mean(), errors.detach()

    def actor_loss(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        action, log_prob = self.actor(observation)
        loss = self.log_alpha.detach().exp() * log_prob - self.value(self.critics(observation, action))
        return loss.mean(), log_prob.detach()

    def update_critics(self, batch: Batch) -> None:
        loss, errors = self.critic_loss(*batch)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        self.learn_pessimism(errors)

    def update_actor(self, batch: Batch) -> None:
        self.critics.requires_grad_(False)
        loss, log_prob = self.actor_loss(batch[0])
        self.actor_optimizer.zero_grad()
        loss.backward()
        self.critics.requires_grad_(True)
        self.clip_actor()
        self.actor_optimizer.step()
        loss = -(self.log_alpha * (log_prob + self.target_entropy)).mean()
        self.alpha_optimizer.zero_grad()
        loss.backward()
        self.alpha_optimizer.step()

    @torch.no_grad()
    def update_targets(self) -> None:
        torch._foreach_lerp_(list(self.targets.parameters()), list(self.critics.parameters()), TARGET_RATE)


class SeparateCritics(nn.ModuleList):
    """Critics one after the other, which one thread goes through faster than through a batched product."""

    def __init__(self, in_features: int, members: int, width: int) -> None:
        super().__init__(
            nn.Sequential(
                nn.Linear(in_features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
            )
            for _ in range(members)
        )

    def forward(self, observation: Tensor, action: Tensor, members: list[int] | None = None) -> Tensor:
        x = torch.cat([observation, action], -1)
        asked = self if members is None else [self[member] for member in members]
        return torch.stack([critic(x).squeeze(-1) for critic in asked])  # [P, B]


class REDQ(SAC):
    """Targets are the minimum of two critics drawn for each; the actor climbs the mean of all."""

    def target_value(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.targets(observation, action, torch.randperm(len(self.targets))[:2].tolist()).amin(0)

    def value(self, q: Tensor) -> Tensor:
        return q.mean(0)


class GPL(SAC):
    """The learned penalty, tied to the actor, in the place of the minimum."""

    def __init__(self, observation_dim: int, action_dim: int, critics: nn.Module, width: int) -> None:
        super().__init__(observation_dim, action_dim, critics, width, momentum=0.5)
        self.alpha_optimizer.param_groups[0]["lr"] = 1e-4
        self.beta = torch.tensor(0.5, requires_grad=True)
        self.beta_optimizer = torch.optim.Adam([self.beta], 1e-4, betas=(0.5, 0.999), eps=1e-7, fused=True)
        members = critics.members
        ranks = 2.0 * torch.arange(members) - (members - 1)
        self.weights = (2.0 / (members * (members - 1)) * ranks)[:, None]

    def value(self, q: Tensor) -> Tensor:
        return q.mean(0) - self.beta.detach() * (self.weights * q.sort(0).values).sum(0)

    def learn_pessimism(self, errors: Tensor) -> None:
        self.beta.grad = errors.mean()
        self.beta_optimizer.step()

    def clip_actor(self) -> None:
        nn.utils.clip_grad_norm_(self.actor.parameters(), 40, foreach=True)


class CloningActor(nn.Module):
    """A squashed mean, with noise of 0.2 or of a size that is learned for each action."""

    def __init__(self, observation_dim: int, action_dim: int, width: int, learned: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(observation_dim, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, action_dim),
            nn.Tanh(),
        )
        self.log_std = nn.Parameter(torch.zeros(action_dim)) if learned else math.log(0.2)

    def forward(self, observation: Tensor) -> Tensor:
        return self.layers(observation)

    @staticmethod
    def sample(mean: Tensor, clip: float | None = None) -> Tensor:
        noise = 0.2 * torch.randn_like(mean)
        if clip is not None:
            noise = noise.clamp(-clip, clip)
        return (mean + noise).clamp(-1, 1)

    def log_normal(self, mean: Tensor, action: Tensor) -> Tensor:
        log_std = self.log_std.clamp(-20, 2) if isinstance(self.log_std, Tensor) else self.log_std
        std = log_std.exp() if isinstance(log_std, Tensor) else math.exp(log_std)
        return -0.5 * ((action - mean) / std).square() - log_std - 0.5 * math.log(2 * math.pi)


class AWAC:
    """Cloning with weights that are the softmax of the advantage over an action of the policy."""

    losses = ("critic_loss", "actor_loss")

    def __init__(self, observation_dim: int, action_dim: int, critics: nn.Module, width: int, learned: bool = False):
        self.critics, self.actor = critics, CloningActor(observation_dim, action_dim, width, learned)
        self.targets = copy.deepcopy(critics).requires_grad_(False)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), 3e-4, fused=True)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), 3e-4, fused=True)

    def critic_loss(self, observation: Tensor, action: Tensor, next_observation: Tensor, reward: Tensor, end: Tensor):
        with torch.no_grad():
            next_action = self.actor.sample(self.actor(next_observation), 0.3)
            target = reward + DISCOUNT * (1 - end) * self.targets(next_observation, next_action).amin(0)
        return 0.5 * (self.critics(observation, action) - target).square().sum(0).mean()

    def actor_loss(self, observation: Tensor, action: Tensor) -> Tensor:
        mean = self.actor(observation)
        with torch.no_grad():
            sampled = self.actor.sample(mean)
            advantage = self.critics(observation, action).mean(0) - self.critics(observation, sampled).amin(0)
            weight = torch.softmax(advantage, 0)
        return -(weight * self.actor.log_normal(mean, action).mean(-1)).sum()

    def update_critics(self, batch: Batch) -> None:
        descend(self.critic_optimizer, self.critic_loss(*batch))

    def update_actor(self, batch: Batch) -> None:
        descend(self.actor_optimizer, self.actor_loss(*batch[:2]))

    @torch.no_grad()
    def update_targets(self) -> None:
        torch._foreach_lerp_(list(self.targets.parameters()), list(self.critics.parameters()), TARGET_RATE)


class IQL(AWAC):
    """Critics bootstrap from an expectile of the data's values, and weights are exp(3 advantage) over it."""

    losses = ("critic_loss", "actor_loss", "value_loss")

    def __init__(self, observation_dim: int, action_dim: int, critics: nn.Module, width: int) -> None:
        super().__init__(observation_dim, action_dim, critics, width, learned=True)
        self.value = nn.Sequential(
            nn.Linear(observation_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), 3e-4, fused=True)

    def value_loss(self, observation: Tensor, action: Tensor, next_observation: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            next_value = self.value(next_observation).squeeze(-1)
            q = self.targets(observation, action).amin(0)
        advantage = q - self.value(observation).squeeze(-1)
        weight = torch.where(advantage > 0, 0.7, 0.3)
        return (weight * advantage.square()).mean(), advantage.detach(), next_value

    def critic_loss(self, observation: Tensor, action: Tensor, next_value: Tensor, reward: Tensor, end: Tensor):
        target = reward + DISCOUNT * (1 - end) * next_value
        return 0.5 * (self.critics(observation, action) - target).square().sum(0).mean()

    def actor_loss(self, observation: Tensor, action: Tensor) -> Tensor:
        weight = (3 * self.advantage).exp().clamp(max=100)
        return -(weight * self.actor.log_normal(self.actor(observation), action).sum(-1)).mean()

    def update_critics(self, batch: Batch) -> None:
        observation, action, next_observation, reward, end = batch
        loss, self.advantage, next_value = self.value_loss(observation, action, next_observation)
        descend(self.value_optimizer, loss)
        descend(self.critic_optimizer, self.critic_loss(observation, action, next_value, reward, end))


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def make_training(
    agent: SAC | AWAC, data: Batch, batch_size: int, actor_every: int, compile: bool = False
) -> Callable[[int], None]:
    """A function that makes so many updates on batches drawn from `data`, as the loop of such a script does.

    Compiled are the losses, and their backward passes with them; what lies between is no faster for it.
    """
    for name in agent.losses if compile else ():
        setattr(agent, name, torch.compile(getattr(agent, name)))
    done = 0

    def train(updates: int) -> None:
        nonlocal done
        for _ in range(updates):
            index = torch.randint(len(data[0]), (batch_size,))
            batch = tuple(tensor[index] for tensor in data)
            agent.update_critics(batch)
            done += 1
            if done % actor_every == 0:
                agent.update_actor(batch)
            agent.update_targets()

    return train


class PPO:
    """Clipped policy optimisation with observations normalised by what was seen before the rollout."""

    def __init__(self, observation_dim: int, action_dim: int, width: int) -> None:
        def mlp(outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(observation_dim, width),
                nn.Tanh(),
                nn.Linear(width, width),
                nn.Tanh(),
                nn.Linear(width, outputs),
            )

        self.actor, self.value = mlp(action_dim), mlp(1)
        self.log_std = nn.Parameter(torch.full((action_dim,), math.log(0.5)))
        self.parameters = [self.log_std, *self.actor.parameters(), *self.value.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, 3e-4, eps=1e-5, fused=True)
        self.mean, self.variance, self.count = torch.zeros(observation_dim), torch.ones(observation_dim), 0

    def normalised(self, observation: Tensor) -> Tensor:
        return ((observation - self.mean) / (self.variance + 1e-8).sqrt()).clamp(-10, 10)

    def seen(self, rows: Tensor) -> None:
        rows, total = rows.double(), self.count + len(rows)
        mean, variance = rows.mean(0), rows.var(0, correction=0)
        shift, before = mean - self.mean, self.count / total
        self.variance = (before * self.variance + (1 - before) * variance + before * (1 - before) * shift**2).float()
        self.mean, self.count = (self.mean + (1 - before) * shift).float(), total

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        squares = ((action - self.actor(observation)) * (-self.log_std).exp()).square()
        return -(0.5 * squares + self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    @torch.no_grad()
    def collect(self, env: EnvBase, observation: Tensor, steps: int) -> tuple[list[Tensor], Tensor]:
        """Observations, actions, rewards, next observations, terminations, ends [T, N, ...], and where it goes on."""
        kept = []
        for _ in range(steps):
            mean = self.actor(self.normalised(observation))
            action = mean + self.log_std.exp() * torch.randn_like(mean)
            after = env.step(TensorDict({"action": action}, env.batch_size))["next"]
            reward, terminated, done = (after[name].squeeze(-1) for name in ("reward", "terminated", "done"))
            kept.append((observation, action, reward, after["observation"], terminated, done))
            observation = after["observation"]
            if done.any():
                observation = env.reset(TensorDict({"_reset": done[:, None]}, env.batch_size))["observation"]
        return [torch.stack(each) for each in zip(*kept)], observation

    @torch.no_grad()
    def prepare(self, rollout: list[Tensor]) -> Batch:
        """Observations, actions, log-densities, advantages and returns [T N]."""
        seen, action, reward, following, terminated, done = rollout
        observation = self.normalised(seen)
        value, after = (self.value(each).squeeze(-1) for each in (observation, self.normalised(following)))
        error = reward + 0.99 * after * ~terminated - value
        advantage, running = torch.empty_like(error), torch.zeros_like(error[0])
        for step in reversed(range(len(error))):
            advantage[step] = running = error[step] + 0.99 * 0.95 * ~done[step] * running
        log_prob = self.log_prob(observation, action)
        self.seen(seen.flatten(0, 1))
        return tuple(each.flatten(0, 1) for each in (observation, action, log_prob, advantage, advantage + value))

    def loss(self, observation: Tensor, action: Tensor, before: Tensor, advantage: Tensor, target: Tensor) -> Tensor:
        ratio = (self.log_prob(observation, action) - before).exp()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-7)
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return -gain.mean() + 0.5 * 0.5 * (self.value(observation).squeeze(-1) - target).square().mean()

    def update(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.loss(*batch).backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.5, foreach=True)
        self.optimizer.step()


def make_on_policy_training(
    agent: PPO, env: EnvBase, steps: int, epochs: int, minibatches: int, compile: bool = False
) -> Callable[[int], None]:
    """A function that collects so many rollouts and learns from each."""
    if compile:
        agent.loss = torch.compile(agent.loss)
    observation = env.reset()["observation"]

    def train(rollouts: int) -> None:
        nonlocal observation
        for _ in range(rollouts):
            rollout, observation = agent.collect(env, observation, steps)
            prepared = agent.prepare(rollout)
            for _ in range(epochs):
                for index in torch.randperm(len(prepared[0])).chunk(minibatches):
                    agent.update(tuple(each[index] for each in prepared))

    return train
