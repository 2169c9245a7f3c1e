"""Closed forms, limits and brute force for the forward-backward components (notation as in the module)."""

import math

import pytest
import torch
from torch import nn

from components.control.forward_backward import (
    BackwardMap,
    ForwardMap,
    MixedLatentSampler,
    ZConditionedActor,
    fb_loss,
    implicit_reward,
    orthonormality_loss,
    project_z,
    sample_sphere,
    successor_density,
)

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_loss_inputs(rows=6, features=4, members=2, groups=1):
    forward, target_forward = torch.randn(2, members, rows, features)
    backward, target_backward = torch.randn(2, groups, rows, features)
    discount = 0.9 * (torch.rand(rows, 1) > 0.3).float()
    return forward, backward, target_forward, target_backward, discount


def double_loop(forward, backward, target_forward, target_backward, discount, pessimism=0.0):
    """The two parts of the loss, pair by pair; group of row i is i // (N / G)."""
    members, rows, _ = forward.shape
    size = rows // backward.shape[0]
    off, diagonal = 0.0, 0.0
    for i in range(rows):
        for j in range(rows):
            b, target_b = backward[i // size, j], target_backward[i // size, j]
            targets = [target_forward[p, i] @ target_b for p in range(members)]
            differences = [(x - y).abs() for m, x in enumerate(targets) for n, y in enumerate(targets) if m != n]
            target = sum(targets) / members - pessimism * sum(differences) / max(1, len(differences))
            for p in range(members):
                value = forward[p, i] @ b
                if i == j:
                    diagonal -= value / rows
                else:
                    off += 0.5 * (value - discount[i, 0] * target) ** 2 / (rows * (rows - 1))
    return off, diagonal


def test_loss_of_two_rows_by_hand():
    forward, backward = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [4.0]]])
    parts = fb_loss(forward, backward, torch.zeros_like(forward), torch.zeros_like(backward), torch.ones(2, 1))
    assert parts.off_diagonal == 13.0
    assert parts.diagonal == -5.5
    assert parts.measure_mean == (3 + 4 + 6 + 8) / 4
    assert orthonormality_loss(backward) == 59.5


@pytest.mark.parametrize("pessimism", [0.0, 0.5, 0.3])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("members", [1, 2, 3])
def test_loss_equals_the_double_loop(pessimism, groups, members):
    inputs = random_loss_inputs(groups=groups, members=members)
    parts = fb_loss(*inputs, pessimism=pessimism)
    off, diagonal = double_loop(*inputs, pessimism=pessimism)
    torch.testing.assert_close(parts.off_diagonal, off, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.diagonal, diagonal, rtol=1e-4, atol=1e-5)


def test_loss_within_groups_is_the_mean_of_the_groups_losses():
    forward, _, target_forward, _, discount = random_loss_inputs(rows=6)
    backward, target_backward = torch.randn(2, 2, 3, 4)
    parts = fb_loss(forward, backward, target_forward, target_backward, discount, within_groups=True)
    for name in ("off_diagonal", "diagonal"):
        separate = [
            getattr(
                fb_loss(
                    forward[:, rows],
                    backward[g, None],
                    target_forward[:, rows],
                    target_backward[g, None],
                    discount[rows],
                ),
                name,
            )
            for g, rows in enumerate((slice(0, 3), slice(3, 6)))
        ]
        torch.testing.assert_close(getattr(parts, name), sum(separate) / 2)


def test_rows_of_two_processes_average_to_the_whole_loss():
    forward, backward, target_forward, target_backward, discount = random_loss_inputs()
    whole = fb_loss(forward, backward, target_forward, target_backward, discount)
    halves = [
        fb_loss(forward[:, r], backward, target_forward[:, r], target_backward, discount[r], row_offset=r.start)
        for r in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close((halves[0].off_diagonal + halves[1].off_diagonal) / 2, whole.off_diagonal)
    torch.testing.assert_close((halves[0].diagonal + halves[1].diagonal) / 2, whole.diagonal)


def test_pessimism_of_one_half_with_two_members_is_the_minimum():
    forward, backward, target_forward, target_backward, discount = random_loss_inputs()
    parts = fb_loss(forward, backward, target_forward, target_backward, discount, pessimism=0.5)
    minimum = successor_density(target_forward, target_backward).min(0).values[0]
    residual = successor_density(forward, backward)[:, 0] - discount * minimum
    residual.diagonal(dim1=1, dim2=2).zero_()
    torch.testing.assert_close(parts.off_diagonal, 0.5 * residual.square().sum() / 30)


def test_terminal_rows_do_not_see_the_targets():
    forward, backward, target_forward, target_backward, _ = random_loss_inputs()
    discount = torch.zeros(6, 1)
    one = fb_loss(forward, backward, target_forward, target_backward, discount)
    other = fb_loss(forward, backward, target_forward + 7, target_backward - 3, discount)
    assert one.off_diagonal == other.off_diagonal


def test_discount_multiplies_rows_and_a_flat_one_is_refused():
    inputs = random_loss_inputs()
    with pytest.raises(AssertionError):
        fb_loss(*inputs[:-1], inputs[-1].squeeze(-1))


def test_loss_does_not_depend_on_the_order_of_the_batch():
    forward, backward, target_forward, target_backward, discount = random_loss_inputs()
    order = torch.randperm(6)
    one = fb_loss(forward, backward, target_forward, target_backward, discount)
    other = fb_loss(
        forward[:, order], backward[:, order], target_forward[:, order], target_backward[:, order], discount[order]
    )
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(orthonormality_loss(backward), orthonormality_loss(backward[:, order]))


def test_duplicating_members_doubles_the_loss():
    forward, backward, target_forward, target_backward, discount = random_loss_inputs()
    one = fb_loss(forward, backward, target_forward, target_backward, discount)
    two = fb_loss(torch.cat([forward] * 2), backward, torch.cat([target_forward] * 2), target_backward, discount)
    torch.testing.assert_close(two.off_diagonal + two.diagonal, 2 * (one.off_diagonal + one.diagonal))


def test_loss_is_invariant_to_mixing_features_but_orthonormality_is_not():
    forward, backward, target_forward, target_backward, discount = (x.double() for x in random_loss_inputs())
    mixing = torch.randn(4, 4, dtype=DOUBLE) + 2 * torch.eye(4, dtype=DOUBLE)
    inverse = torch.linalg.inv(mixing)  # F -> A^{-T} F, B -> A B, as rows
    mixed = (forward @ inverse, backward @ mixing.T, target_forward @ inverse, target_backward @ mixing.T)
    one, other = fb_loss(forward, backward, target_forward, target_backward, discount), fb_loss(*mixed, discount)
    torch.testing.assert_close(one, other)
    assert not torch.isclose(orthonormality_loss(backward), orthonormality_loss(mixed[1]))


def test_no_gradient_reaches_the_targets():
    inputs = [x.requires_grad_() for x in random_loss_inputs()[:4]]
    parts = fb_loss(*inputs, torch.full((6, 1), 0.9))
    (parts.off_diagonal + parts.diagonal).backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert inputs[2].grad is None
    assert inputs[3].grad is None


# -- exactness on a finite process: rho over states, B one-hot, F the rows of M / rho ---------------------------------


def finite_process(states=5, discount=0.9):
    transition = torch.rand(states, states, dtype=DOUBLE).softmax(1)
    rho = torch.rand(states, dtype=DOUBLE).softmax(0)
    measure = transition @ torch.linalg.inv(torch.eye(states, dtype=DOUBLE) - discount * transition)
    return transition, rho, measure, discount


def test_exact_successor_measure_is_a_stationary_point_with_exact_values():
    transition, rho, measure, discount = finite_process()
    density = (measure / rho).requires_grad_()
    # Expected loss over s ~ rho, s' ~ P(s), an independent s'' ~ rho, with the true measure as its own target.
    target = discount * transition @ (measure / rho)
    off = 0.5 * (rho[:, None] * rho[None, :] * (density - target).square()).sum()
    diagonal = -(rho[:, None] * transition * density).sum()
    (gradient,) = torch.autograd.grad(off + diagonal, density)
    assert gradient.abs().max() < 1e-12
    reward = torch.randn(5, dtype=DOUBLE)
    values = density.detach() @ (rho * reward)  # F z with z = E_rho[r B]
    torch.testing.assert_close(values, transition @ torch.linalg.solve(torch.eye(5) - discount * transition, reward))
    torch.testing.assert_close(density.detach() @ rho, torch.full((5,), 1 / (1 - discount), dtype=DOUBLE))


def test_without_discount_the_minimiser_is_the_one_step_density():
    transition, rho, _, _ = finite_process()
    density = torch.zeros(5, 5, dtype=DOUBLE, requires_grad=True)
    off = 0.5 * (rho[:, None] * rho[None, :] * density.square()).sum()
    diagonal = -(rho[:, None] * transition * density).sum()
    (gradient,) = torch.autograd.grad(off + diagonal, density)
    minimiser = -gradient / (rho[:, None] * rho[None, :])  # the loss is quadratic with this diagonal Hessian
    torch.testing.assert_close(minimiser, transition / rho)
    reward = torch.randn(5, dtype=DOUBLE)
    torch.testing.assert_close(minimiser @ (rho * reward), transition @ reward)


def test_gradient_of_the_loss_vanishes_at_the_exact_successor_measure():
    """`fb_loss` itself, averaged over many batches of a finite process whose state distribution is stationary."""
    transition, _, measure, discount = finite_process(states=4)
    rho = torch.linalg.matrix_power(transition, 200)[0]
    table = (measure / rho).float().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    wrong = (2 * table.detach()).requires_grad_()
    total, total_wrong = torch.zeros_like(table), torch.zeros_like(table)
    for _ in range(300):
        state = torch.multinomial(rho.float(), 512, replacement=True, generator=generator)
        arrived = torch.multinomial(transition[state].float(), 1, generator=generator).squeeze(1)
        one_hot = nn.functional.one_hot(arrived, 4).float()[None]
        for density, gradient in ((table, total), (wrong, total_wrong)):
            forward, target = density[state][None], density.detach()[arrived][None]
            loss = fb_loss(forward, one_hot, target, one_hot, torch.full((512, 1), discount))
            gradient += torch.autograd.grad(loss.off_diagonal + loss.diagonal, density)[0] / 300
    assert total.abs().max() < 0.01
    assert total_wrong.abs().max() > 0.05


# -- projections, orthonormality, sampling --------------------------------------------------------------------------


def test_projection_has_norm_sqrt_d_and_is_idempotent():
    z = project_z(torch.randn(100, 50))
    torch.testing.assert_close(z.norm(dim=-1), torch.full((100,), math.sqrt(50)), rtol=1e-6, atol=0)
    torch.testing.assert_close(project_z(z), z)
    zero = torch.zeros(3, requires_grad=True)
    project_z(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_orthonormality_loss_of_orthonormal_features_is_minus_half_d():
    features, rows = 8, 8 * 512
    backward = math.sqrt(features) * torch.eye(features).repeat(rows // features, 1)
    torch.testing.assert_close(backward.T @ backward / rows, torch.eye(features))
    assert abs(orthonormality_loss(backward) + features / 2) < 0.01


def test_implicit_reward_recovers_the_reward_of_a_task_vector():
    """With z = E[r B] and r linear in B, B^T Sigma^{-1} z is r itself."""
    backward = torch.randn(1, 64, 4)
    weights = torch.randn(4)
    reward = backward[0] @ weights
    z = (reward[:, None] * backward[0]).mean(0).expand(64, 4)
    torch.testing.assert_close(implicit_reward(backward, backward[0], z), reward, rtol=1e-4, atol=1e-4)


def test_latent_sampler_mixes_prior_and_goals():
    backward = BackwardMap(3, 8, hidden_dim=16)
    goals = torch.randn(1000, 3)
    encoded = backward.encode(goals)

    def share_of_goals(z):
        return (
            (torch.cdist(z, encoded, compute_mode="donot_use_mm_for_euclid_dist").min(1).values < 1e-4).float().mean()
        )

    assert share_of_goals(MixedLatentSampler(0.0)(backward, goals, 1000)) == 0
    assert share_of_goals(MixedLatentSampler(1.0)(backward, goals, 1000)) == 1
    z = MixedLatentSampler(0.5)(backward, goals, 1000)
    assert 0.4 < share_of_goals(z) < 0.6
    assert not z.requires_grad
    torch.testing.assert_close(z.norm(dim=-1), torch.full((1000,), math.sqrt(8)))
    assert len(MixedLatentSampler(1.0)(backward, goals, 7).unique(dim=0)) == 7


def test_latent_sampler_gives_rows_what_followed_them():
    backward = BackwardMap(3, 8, hidden_dim=16, blocks=2)
    goals, future = torch.randn(1000, 3), torch.randn(1000, 5, 3)
    followed = project_z(backward.encode(future))
    z = MixedLatentSampler(0.0, 1.0)(backward, goals, 1000, future)
    torch.testing.assert_close(z, followed)
    z = MixedLatentSampler(0.25, 0.5)(backward, goals, 1000, future)
    own = (z - followed).abs().amax(1) < 1e-4
    reached = torch.cdist(z, backward.encode(goals), compute_mode="donot_use_mm_for_euclid_dist").amin(1) < 1e-4
    assert 0.45 < own.float().mean() < 0.55
    assert 0.2 < reached.float().mean() < 0.3
    assert not (own & reached).any()
    with pytest.raises(ValueError, match=r"hindsight_probability=0.6: expected a sum of at most 1"):
        MixedLatentSampler(0.5, 0.6)


# -- auto-regressive features -----------------------------------------------------------------------------------------


def auto_regressive(blocks=4, features=8, observation=3):
    torch.manual_seed(1)
    return BackwardMap(observation, features, hidden_dim=16, blocks=blocks).double()


def test_block_k_depends_on_earlier_blocks_only():
    backward, state = auto_regressive(), torch.randn(1, 3, dtype=DOUBLE)
    z = sample_sphere((1, 8)).double()
    jacobian = torch.autograd.functional.jacobian(lambda z: backward(state, z)[0, 0], z)[:, 0].unflatten(0, (4, 2))
    jacobian = jacobian.unflatten(-1, (4, 2)).abs().amax((1, 3))  # [block of B, block of z]
    assert (jacobian.triu() == 0).all()
    assert (jacobian.tril(-1)[torch.ones(4, 4).tril(-1).bool()] > 0).all()


def test_changing_block_three_leaves_the_first_three_blocks_bit_identical():
    backward, states = auto_regressive(), torch.randn(5, 3, dtype=DOUBLE)
    z = sample_sphere((2, 8)).double()
    changed = z.clone()
    changed[:, 4:6] = torch.randn(2, 2)
    one, other = backward(states, z), backward(states, changed)
    assert torch.equal(one[..., :6], other[..., :6])
    assert not torch.equal(one[..., 6:], other[..., 6:])


def test_features_of_all_pairs_equal_features_one_by_one():
    backward, states = auto_regressive(), torch.randn(5, 3, dtype=DOUBLE)
    z = sample_sphere((2, 8)).double()
    grouped = backward(states.expand(2, 5, 3), z)
    torch.testing.assert_close(grouped, backward(states, z))
    directions = backward.directions(z)
    for g in range(2):
        for n in range(5):
            parts = [backward.block(k, states[n], directions[g, : 2 * k] if k else None) for k in range(4)]
            torch.testing.assert_close(backward(states, z)[g, n], torch.cat(parts))


def test_every_block_of_the_features_is_on_its_sphere():
    features = auto_regressive()(torch.randn(5, 3, dtype=DOUBLE), sample_sphere((2, 8)).double())
    norms = features.unflatten(-1, (4, 2)).norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(2)))


def test_inferred_z_is_the_fixed_point():
    backward = auto_regressive()
    states, reward = torch.randn(200, 3, dtype=DOUBLE), torch.randn(200, 3, dtype=DOUBLE)
    z = backward.infer(states, reward)
    expected = torch.einsum("nt,tnd->td", reward, backward(states, z)) / 200
    torch.testing.assert_close(z, project_z(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("normalise", ["global", "block"])
def test_inference_ignores_the_scale_of_the_reward_and_the_chunks(blocks, normalise):
    backward = auto_regressive(blocks)
    states, reward = torch.randn(200, 3, dtype=DOUBLE), torch.randn(200, 2, dtype=DOUBLE)
    z = backward.infer(states, reward, normalise)
    torch.testing.assert_close(backward.infer(states, 5.0 * reward, normalise), z)
    torch.testing.assert_close(backward.infer(states, reward, normalise, chunk_size=7), z)
    if blocks == 1:
        torch.testing.assert_close(backward.infer(states, -reward, normalise), -z)


@pytest.mark.parametrize("blocks", [1, 4])
def test_reward_on_copies_of_one_state_gives_the_goal_vector(blocks):
    backward = auto_regressive(blocks)
    states = torch.randn(50, 3, dtype=DOUBLE)
    states[10:20] = states[10]
    reward = torch.zeros(50, 1, dtype=DOUBLE)
    reward[10:20] = 0.7
    torch.testing.assert_close(backward.infer(states, reward)[0], backward.encode(states[10:11])[0])


@pytest.mark.parametrize("blocks", [1, 4])
def test_several_states_are_encoded_as_a_reward_of_one_in_them(blocks):
    backward = auto_regressive(blocks)
    states = torch.randn(50, 3, dtype=DOUBLE)
    reward = torch.zeros(50, 2, dtype=DOUBLE)
    reward[:10, 0] = reward[10:20, 1] = 1.0
    encoded = project_z(backward.encode(states[:20].view(2, 10, 3)))
    torch.testing.assert_close(encoded, backward.infer(states, reward))


def test_one_block_is_the_ordinary_backward_map():
    backward = BackwardMap(3, 8, hidden_dim=16)
    states, z = torch.randn(5, 3), torch.randn(5, 8)
    assert torch.equal(backward(states, z), backward(states))
    assert backward(states).shape == (1, 5, 8)
    assert torch.equal(backward.encode(states), backward(states)[0])


def test_blocks_that_ignore_z_equal_one_block_of_concatenated_networks():
    backward = auto_regressive()
    for k, network in enumerate(backward.blocks):
        network[0].weight.data[:, 3:] = 0
        assert k == 0 or (network[0].weight[:, 3:] == 0).all()
    states, reward = torch.randn(200, 3, dtype=DOUBLE), torch.randn(200, 1, dtype=DOUBLE)
    features = torch.cat([backward.block(k, states, torch.zeros(200, 2 * k)) for k in range(4)], -1)
    torch.testing.assert_close(backward.infer(states, reward), project_z(reward.T @ features))


def test_sequential_sweep_is_exact_for_any_causal_mixing_of_an_exact_model():
    """One policy, exact density f^T e, B(s, z) = A(z) e(s), F(z) = A(z)^{-T} f: the sweep's u has F(u)^T u = Q_r."""
    _, rho, measure, _ = finite_process(states=4)
    reward = torch.randn(4, dtype=DOUBLE)
    base = torch.randn(4, 4, dtype=DOUBLE) + 3 * torch.eye(4, dtype=DOUBLE)
    slope = torch.randn(4, 4, 4, dtype=DOUBLE)

    def mixing(z):  # row block k depends on z_{<k} only (blocks of size 1)
        return torch.stack([base[k] + torch.sin(slope[k, :, :k] @ z[:k]) for k in range(4)])

    u = torch.zeros(4, dtype=DOUBLE)
    one_hot_mean = rho * reward  # E_rho[r e]
    for k in range(4):
        u[k] = mixing(u)[k] @ one_hot_mean
    forward = (measure / rho) @ torch.linalg.inv(mixing(u))  # rows: A^{-T} f
    torch.testing.assert_close(forward @ u, measure @ reward)


def test_features_must_split_evenly():
    with pytest.raises(ValueError, match=r"features=10 can't be split in blocks=4"):
        BackwardMap(3, 10, blocks=4)


# -- networks ---------------------------------------------------------------------------------------------------------


def test_paper_sizes():
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(ForwardMap(67, 21, 50)) / 2e6 == pytest.approx(2.37, abs=0.01)
    assert count(ZConditionedActor(67, 21, 50)) / 1e6 == pytest.approx(2.31, abs=0.01)
    assert count(BackwardMap(67, 50)) / 1e6 == pytest.approx(0.10, abs=0.01)


@pytest.mark.parametrize("shared", [False, True])
def test_forward_map_shapes_and_action_samples(shared):
    network = ForwardMap(5, 2, 8, hidden_dim=16, members=3, shared_embeddings=shared)
    state, z, actions = torch.randn(7, 5), torch.randn(7, 8), torch.randn(4, 7, 2)
    many = network(state, z, actions)
    assert many.shape == (3, 4, 7, 8)
    for s in range(4):
        torch.testing.assert_close(many[:, s], network(state, z, actions[s]))


@pytest.mark.parametrize("shared", [False, True])
def test_ensemble_members_differ_and_are_orthogonal(shared):
    network = ForwardMap(5, 2, 8, hidden_dim=16, members=2, shared_embeddings=shared, gain=1.0)
    weight = network.head[0].weight
    assert not torch.equal(weight[0], weight[1])
    for member in weight:
        torch.testing.assert_close(member @ member.T, torch.eye(16), atol=1e-5, rtol=0)
