import pytest
import torch

from components.control.state_value import StateValue, expectile_loss

DIFFERENCES = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.2, 1.5])


def test_expectile_loss_weighs_differences_by_their_sign():
    by_hand = (0.3 * (4 + 1 + 0.09) + 0.7 * (0.04 + 2.25)) / 6
    assert expectile_loss(DIFFERENCES, 0.7).item() == pytest.approx(by_hand)
    assert by_hand == pytest.approx(0.5216667, abs=1e-6)
    torch.testing.assert_close(expectile_loss(DIFFERENCES, 0.5), DIFFERENCES.square().mean() / 2)


@pytest.mark.parametrize("expectile", [0.3, 0.5, 0.9])
def test_it_is_least_at_the_samples_expectile(expectile):
    value = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([value], max_iter=100, tolerance_grad=1e-9)

    def loss():
        optimizer.zero_grad()
        found = expectile_loss(DIFFERENCES - value, expectile)
        found.backward()
        return found

    optimizer.step(loss)
    above = (DIFFERENCES - value.detach()).clamp_min(0).sum()
    below = (value.detach() - DIFFERENCES).clamp_min(0).sum()
    assert (expectile * above).item() == pytest.approx(((1 - expectile) * below).item(), abs=1e-5)


def test_wrong_settings():
    with pytest.raises(ValueError, match="Unknown next_value='later': expected one of after, before"):
        StateValue(3, next_value="later")
    with pytest.raises(ValueError, match="expectile=1: expected less than 1"):
        StateValue(3, expectile=1)
