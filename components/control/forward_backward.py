"""Forward-backward representations of the successor measure, and their auto-regressive extension.

Model (Touati and Ollivier, arXiv 2103.07945): M^{pi_z}(s, a, ds') = F(s, a, z)^T B(s') rho(ds'), rho the distribution
of next states in the data. Then Q_r = F^T E_rho[r B], and z_r = E_rho[r B] indexes the optimal policy of reward r.
Auto-regressive features B(s, z) (Cetin, Touati and Ollivier, arXiv 2412.04368): block k of B depends on z_1 .. z_{k-1}
only, so z = E_rho[r B(., z)] is solved exactly by one sweep over the blocks, and the map r -> z is no longer linear.

Dimensions: N batch, P ensemble members, d features, K blocks of d/K features, G distinct z in a batch, O observation,
A action, S action samples, T tasks.
"""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from components.checks import Count, NonNegative, Range, Share, Size, checked
from components.control.pessimism import pessimistic_mean
from components.control.policies import ClippedGaussianPolicy, best_of
from components.networks.ensemble import RELU_GAIN, EnsembleLayerNorm, EnsembleLinear, orthogonal_

Width = Annotated[int, Range(2, 2**16)]  # embeddings have half of it


def project_z(z: Tensor) -> Tensor:
    """Project [..., d] on the sphere of radius sqrt(d). A zero vector stays zero, with a finite gradient."""
    return math.sqrt(z.shape[-1]) * nn.functional.normalize(z, dim=-1, eps=1e-8)


def sample_sphere(shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Uniform samples on the sphere of radius sqrt(d), d the last entry of `shape`."""
    return project_z(torch.randn(*shape, device=device))


def linear(in_features: int, out_features: int, gain: float = 1.0) -> nn.Linear:
    """A linear layer with an orthogonal weight and zero bias."""
    layer = nn.Linear(in_features, out_features)
    orthogonal_(layer.weight.data, gain)
    nn.init.zeros_(layer.bias)
    return layer


class InputEmbedding(nn.Sequential):
    """Linear, LayerNorm, Tanh, Linear, ReLU: [N, in] -> [N, hidden/2], or [P, N, hidden/2] for an ensemble."""

    def __init__(self, in_features: int, hidden_dim: int, members: int | None = None, gain: float = 1.0) -> None:
        if members is None:
            first, norm = linear(in_features, hidden_dim, gain), nn.LayerNorm(hidden_dim)
            second: nn.Module = linear(hidden_dim, hidden_dim // 2, gain)
        else:
            first, norm = EnsembleLinear(members, in_features, hidden_dim, gain), EnsembleLayerNorm(members, hidden_dim)
            second = EnsembleLinear(members, hidden_dim, hidden_dim // 2, gain)
        super().__init__(first, norm, nn.Tanh(), second, nn.ReLU(inplace=True))


@checked
class ForwardMap(nn.Module):
    """F_p(s, a, z): an ensemble of P networks on the embeddings of (s, a) and (s, z).

    Args:
        hidden_dim: width of the trunk; the two embeddings have half of it.
        members: P.
        shared_embeddings: both embeddings are common to all members, which differ in their heads only (the layout of
            arXiv 2209.14935); otherwise the members share nothing.
        gain: gain of the orthogonal initialisation.
    """

    def __init__(
        self,
        observation_dim: Count,
        action_dim: Size,
        features: Size,
        hidden_dim: Width = 1024,
        members: Size = 2,
        shared_embeddings: bool = False,
        gain: NonNegative = RELU_GAIN,
    ) -> None:
        super().__init__()
        embedded = None if shared_embeddings else members
        self.embed_action = InputEmbedding(observation_dim + action_dim, hidden_dim, embedded, gain)
        self.embed_z = InputEmbedding(observation_dim + features, hidden_dim, embedded, gain)
        width = 2 * (hidden_dim // 2)
        self.head = nn.Sequential(
            EnsembleLinear(members, width, hidden_dim, gain),
            nn.ReLU(inplace=True),
            EnsembleLinear(members, hidden_dim, features, gain),
        )

    def forward(self, observation: Tensor, z: Tensor, action: Tensor) -> Tensor:
        """F [P, N, d] for [N, O], [N, d] and actions [N, A]; [P, S, N, d] for S actions at each state, [S, N, A]."""
        samples = action.shape[:-2]
        rows = observation.expand(*samples, *observation.shape)
        embedded_action = self.embed_action(torch.cat([rows, action], -1).flatten(0, -2))
        embedded_z = self.embed_z(torch.cat([observation, z], -1))
        if samples:
            embedded_z = embedded_z.repeat(*(1,) * (embedded_z.dim() - 2), *samples, 1)
        features = self.head(torch.cat([embedded_action, embedded_z], -1))
        return features.unflatten(1, (*samples, observation.shape[0]))


@checked
class BackwardMap(nn.Module):
    """B(s, z) = (B_1(s), B_2(s, z_1), ..., B_K(s, z_1 .. z_{K-1})), every block on the sphere of radius sqrt(d_k).

    One block (the default) is the ordinary backward map B(s). Blocks see the *directions* of the earlier blocks of z,
    so that the features, and hence the solution of z = E[r B(., z)], do not depend on the scale of the reward; each
    block is normalised on its own, since a norm over all blocks would make the first depend on z.
    """

    def __init__(self, observation_dim: Count, features: Size, hidden_dim: Size = 256, blocks: Size = 1) -> None:
        super().__init__()
        if features % blocks:
            raise ValueError(f"features={features} can't be split in blocks={blocks} blocks of equal size.")
        self.features = features
        self.block_dim = features // blocks
        self.blocks = nn.ModuleList(
            nn.Sequential(
                linear(observation_dim + k * self.block_dim, hidden_dim),
                nn.LayerNorm(hidden_dim),
                nn.Tanh(),
                linear(hidden_dim, hidden_dim),
                nn.ReLU(inplace=True),
                linear(hidden_dim, self.block_dim),
            )
            for k in range(blocks)
        )

    def block(self, k: int, observation: Tensor, prefix: Tensor | None = None) -> Tensor:
        """B_k for observations [..., O] and the directions of z_{<k}, [..., k * d_k] -> [..., d_k]."""
        inputs = observation if prefix is None else torch.cat([observation, prefix], -1)
        return project_z(self.blocks[k](inputs))

    def directions(self, z: Tensor) -> Tensor:
        """Every block of z, [..., d], scaled to norm sqrt(d_k); shape kept."""
        return project_z(z.unflatten(-1, (-1, self.block_dim))).flatten(-2)

    def forward(self, observation: Tensor, z: Tensor | None = None) -> Tensor:
        """Features of all observations [N, O] under each of G task vectors z [G, d] -> [G, N, d].

        Observations [G, N, O] give every task vector its own. With one block the features do not depend on z: the
        result is [1, N, d] for observations [N, O].
        """
        if observation.dim() == 2:
            observation = observation.unsqueeze(0)
        first = self.block(0, observation)
        if len(self.blocks) == 1:
            return first
        assert z is not None, "auto-regressive features need z"
        directions = self.directions(z)
        outputs = [first.expand(z.shape[0], -1, -1)]
        for k, network in enumerate(self.blocks):
            if k == 0:
                continue
            # The first layer is linear in (s, z_{<k}), so its two halves are computed once for each s and each z and
            # then added: the G * N rows are formed only after it.
            layer = network[0]
            width = observation.shape[-1]
            from_state = nn.functional.linear(observation, layer.weight[:, :width], layer.bias)
            from_prefix = nn.functional.linear(directions[:, : k * self.block_dim], layer.weight[:, width:])
            outputs.append(project_z(network[1:](from_state + from_prefix.unsqueeze(1))))
        return torch.cat(outputs, -1)

    def encode(self, goal: Tensor) -> Tensor:
        """Task vectors [N, d] of reaching goals [N, O], block after block: z_1 = B_1(g), z_2 = B_2(g, z_1), ...

        Of several states for each, [N, K, O], the task is to be in each of them alike: what `infer` makes of a reward
        of 1 in them, before its projection.
        """
        states = goal if goal.dim() == 3 else goal.unsqueeze(1)
        z = self.block(0, states).mean(1)
        for k in range(1, len(self.blocks)):
            prefix = self.directions(z).unsqueeze(1).expand(-1, states.shape[1], -1)
            z = torch.cat([z, self.block(k, states, prefix).mean(1)], -1)
        return z

    @torch.no_grad()
    def infer(
        self, next_observation: Tensor, reward: Tensor, normalise: str = "global", chunk_size: int = 16384
    ) -> Tensor:
        """Solve z = proj(E[r B(., z)]) for T rewards by one sweep over the blocks.

        Args:
            next_observation: [n, O], states drawn from the distribution of next states in training.
            reward: [n, T], reward received on arrival in that state.
            normalise: ``global`` scales the whole vector to norm sqrt(d), keeping the relative size of the blocks, as
                the fixed point has it; ``block`` scales every block to norm sqrt(d_k).
            chunk_size: rows evaluated at once; the result does not depend on it, but for rounding.

        Returns:
            z [T, d].
        """
        count, tasks = reward.shape
        raw: list[Tensor] = []
        for k in range(len(self.blocks)):
            prefix = self.directions(torch.cat(raw, -1)) if raw else None
            total = reward.new_zeros(tasks, self.block_dim)
            for rows in torch.arange(count, device=reward.device).split(chunk_size):
                observation, weight = next_observation[rows], reward[rows]
                if prefix is None:
                    total += weight.T @ self.block(0, observation)
                    continue
                for task in range(tasks):
                    features = self.block(k, observation, prefix[task].expand(len(rows), -1))
                    total[task] += weight[:, task] @ features
            raw.append(total / count)
        z = torch.cat(raw, -1)
        return self.directions(z) if normalise == "block" else project_z(z)


@checked
class ZConditionedActor(nn.Module):
    """The mean action tanh(mu(s, z)) on the embeddings of s and (s, z): [N, O], [N, d] -> [N, A] in (-1, 1)."""

    def __init__(
        self,
        observation_dim: Count,
        action_dim: Size,
        features: Size,
        hidden_dim: Width = 1024,
        gain: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.embed = InputEmbedding(observation_dim, hidden_dim, gain=gain)
        self.embed_z = InputEmbedding(observation_dim + features, hidden_dim, gain=gain)
        self.head = nn.Sequential(
            linear(2 * (hidden_dim // 2), hidden_dim, gain),
            nn.ReLU(inplace=True),
            linear(hidden_dim, action_dim, gain),
            nn.Tanh(),
        )

    def forward(self, observation: Tensor, z: Tensor) -> Tensor:
        embedded = torch.cat([self.embed(observation), self.embed_z(torch.cat([observation, z], -1))], -1)
        return self.head(embedded)


def standardise(observation: Tensor, normaliser: nn.BatchNorm1d | None) -> Tensor:
    """Observations [N, O] by running statistics, if there are any."""
    if normaliser is None:
        return observation
    return nn.functional.batch_norm(observation, normaliser.running_mean, normaliser.running_var, eps=normaliser.eps)


class ZConditionedPolicy(nn.Module):
    """A z-conditioned actor in use, as a module that can be copied, sent and exported: [N, O], [N, d] -> [N, A].

    Args:
        actor, normaliser, forward_map: shared, not copied; the last to choose among sampled actions, see `best_of`.
        std: of the noise.
        samples: actions of which the best is taken; 1 is the mean action.
        pessimism: of the value by which they are compared.
        exploring: draw one action instead.
    """

    def __init__(
        self,
        actor: ZConditionedActor,
        normaliser: nn.BatchNorm1d | None,
        forward_map: ForwardMap,
        std: float,
        samples: int = 1,
        pessimism: float = 0.5,
        exploring: bool = False,
    ) -> None:
        super().__init__()
        self.actor = actor
        self.normaliser = normaliser
        self.forward_map = forward_map if samples > 1 and not exploring else None  # what is exported has what it needs
        self.std = std
        self.samples = samples
        self.pessimism = pessimism
        self.exploring = exploring

    @torch.no_grad()
    def forward(self, observation: Tensor, z: Tensor) -> Tensor:
        observation = standardise(observation, self.normaliser)
        policy = ClippedGaussianPolicy(self.actor(observation, z).float(), self.std)
        if self.exploring:
            return policy.sample()

        def value(action: Tensor) -> Tensor:
            return pessimistic_mean((self.forward_map(observation, z, action) * z).sum(-1), self.pessimism)

        return best_of(policy, value, self.samples)


class FBLoss(NamedTuple):
    """The parts of the forward-backward loss, and the statistic worth watching, as scalars."""

    off_diagonal: Tensor
    diagonal: Tensor
    measure_mean: Tensor  # mean of M over the batch: tends to 1 / (1 - discount)


def successor_density(forward: Tensor, backward: Tensor) -> Tensor:
    """M_pgij = F_p(s_i, a_i, z_g)^T B(s'_j, z_g) for F [P, N, d] and B [G, C, d] -> [P, G, N/G, C].

    Group g of the task vectors owns N/G consecutive rows of F.
    """
    return torch.matmul(forward.unflatten(1, (backward.shape[0], -1)), backward.mT)


def fb_loss(
    forward: Tensor,
    backward: Tensor,
    target_forward: Tensor,
    target_backward: Tensor,
    discount: Tensor,
    pessimism: float = 0.0,
    row_offset: int = 0,
    within_groups: bool = False,
) -> FBLoss:
    """Squared Bellman residual of the successor measure density, up to a constant (arXiv 2103.07945, appendix A).

    L_off = 1/2 sum_p mean_{i != j} (M_pij - c_i Mbar_ij)^2 and L_diag = - sum_p mean_i M_pii, where row i is
    (s_i, a_i, z_i) and column j the next state s'_j. Leaving the diagonal out of the square keeps it unbiased.

    Args:
        forward: F(s, a, z), [P, N, d].
        backward: B(s', z_g), [G, C, d]. C = N, or more when the columns of other processes are gathered.
        target_forward: target F(s', a', z), [P, N, d].
        target_backward: target B(s', z_g), [G, C, d].
        discount: discount * (1 - terminated), [N, 1]; it multiplies rows.
        pessimism: pairwise-disagreement penalty of the target measure; 0.5 with two members is the minimum.
        row_offset: the column that belongs to row 0.
        within_groups: the columns of group g are its own rows only, C = N/G: fewer pairs, more variance.
    """
    rows, columns = forward.shape[1], backward.shape[1]
    groups = backward.shape[0]
    assert discount.shape == (rows, 1), "a [N] discount would broadcast over columns"

    def own(features: Tensor) -> Tensor:
        """Each row's own column, [G, C, d] -> [N, d]."""
        if within_groups:
            return features.flatten(0, 1)
        ours = features[:, row_offset : row_offset + rows].unflatten(1, (groups, -1))
        return ours.diagonal(dim1=0, dim2=1).movedim(-1, 0).flatten(0, 1)

    # Densities reach hundreds and are squared: too much for half precision.
    with torch.autocast(forward.device.type, enabled=False):
        forward, backward = _at_least_single(forward), _at_least_single(backward)
        target_forward = _at_least_single(target_forward.detach())
        target_backward = _at_least_single(target_backward.detach())
        diagonal = (forward * own(backward)).sum(-1)
        if pessimism == 0:
            # The target is bilinear too, so all sums over pairs are inner products of d x d matrices:
            # sum_ij (F_i . B_j)^2 = <F^T F, B^T B>. Nothing of size N x N is formed.
            target_forward = discount * target_forward.mean(0)
            target_diagonal = (target_forward * own(target_backward)).sum(-1)
            squared = (
                _sum_of_products(forward, forward, backward, backward)
                - 2 * _sum_of_products(forward, target_forward, backward, target_backward)
                + forward.shape[0]
                * _sum_of_products(target_forward[None], target_forward, target_backward, target_backward)
            )
        else:
            with torch.no_grad():
                target = pessimistic_mean(successor_density(target_forward, target_backward), pessimism)
                target = target * discount.unflatten(0, (groups, -1))
                measured = target if within_groups else target.flatten(0, 1)
                target_diagonal = measured.diagonal(row_offset, -2, -1)[..., : measured.shape[-2]].flatten()
            squared = (successor_density(forward, backward) - target).square().sum()
        squared = squared - (diagonal - target_diagonal).square().sum()
        return FBLoss(
            off_diagonal=0.5 * squared / (rows * (columns - 1)),
            diagonal=-diagonal.sum() / rows,
            measure_mean=(forward.detach().mean(0).unflatten(0, (groups, -1)).mean(1) * backward.detach().mean(1))
            .sum(-1)
            .mean(),
        )


def _at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum_of_products(left: Tensor, right: Tensor, left_columns: Tensor, right_columns: Tensor) -> Tensor:
    """sum_{p, i, j} (L_pi . U_gj) (R_pi . V_gj) with g the group of row i, for L [P, N, d], R [P, N, d] or [N, d],
    U and V [G, C, d]; computed as sum_g <L_g^T R_g, U_g^T V_g>.
    """
    groups = left_columns.shape[0]
    if right.dim() == 2:
        left, right = left.sum(0, keepdim=True), right[None]
    left, right = left.unflatten(1, (groups, -1)), right.unflatten(1, (groups, -1))
    rows = torch.matmul(left.mT, right).sum(0)
    return (rows * torch.matmul(left_columns.mT, right_columns)).sum()


def orthonormality_loss(backward: Tensor) -> Tensor:
    """1/2 mean_{i != j} (B_i . B_j)^2 - mean_i |B_i|^2 for features [..., N, d], averaged over leading dimensions.

    Its minimum over features with E[B B^T] = I and |B|^2 = d is -d/2. The convention of arXiv 2209.14935's code is
    exactly twice this. The sum over pairs is the squared norm of the d x d matrix B^T B.
    """
    count = backward.shape[-2]
    with torch.autocast(backward.device.type, enabled=False):
        backward = _at_least_single(backward)
        norms = backward.square().sum(-1)
        squared = (backward.mT @ backward).square().sum((-2, -1)) - norms.square().sum(-1)
        return (0.5 * squared / (count * (count - 1)) - norms.mean(-1)).mean()


def implicit_reward(backward: Tensor, own: Tensor, z: Tensor) -> Tensor:
    """The reward B(s'_i)^T Sigma_g^{-1} z_i for which z_i is the task vector, with Sigma_g = E[B B^T]: [N].

    Args:
        backward: [G, C, d], the sample for Sigma under each task vector.
        own: [N, d], the features of each row's next state under its own task vector.
        z: [N, d], N/G consecutive rows for each group.
    """
    with torch.autocast(backward.device.type, enabled=False):
        backward = backward.float()
        covariance = backward.mT @ backward / backward.shape[1]
        solved = torch.linalg.solve(covariance, z.unflatten(0, (backward.shape[0], -1)).float().mT)
        return (own.float() * solved.mT.flatten(0, 1)).sum(-1)


@checked
class MixedLatentSampler(nn.Module):
    """Task vectors for training: of goals, of what followed in the data (hindsight), or uniform on the sphere."""

    def __init__(self, goal_probability: Share = 0.5, hindsight_probability: Share = 0.0) -> None:
        super().__init__()
        if goal_probability + hindsight_probability > 1:
            raise ValueError(
                f"module.goal_probability={goal_probability} and module.hindsight_probability={hindsight_probability}: "
                "expected a sum of at most 1."
            )
        self.goal_probability, self.hindsight_probability = goal_probability, hindsight_probability

    @torch.no_grad()
    def forward(self, backward_map: BackwardMap, goals: Tensor, count: int, future: Tensor | None = None) -> Tensor:
        """Sample z [count, d].

        Args:
            backward_map: what encodes goals and futures.
            goals: drawn from without replacement, [N, O], N >= count.
            future: states that followed the row that each z is for, [count, K, O].
        """
        z = sample_sphere((count, backward_map.features), goals.device)
        chosen = goals[torch.randperm(goals.shape[0], device=goals.device)[:count]]
        kind = torch.rand(count, 1, device=goals.device)
        z = torch.where(kind < self.goal_probability, project_z(backward_map.encode(chosen)), z)
        if self.hindsight_probability:
            assert future is not None
            followed = kind >= 1 - self.hindsight_probability
            z = torch.where(followed, project_z(backward_map.encode(future)), z)
        return z
