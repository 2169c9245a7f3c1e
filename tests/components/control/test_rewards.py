import math

import pytest
import torch
from dm_control.utils import rewards as suite_rewards
from hypothesis import given, settings
from hypothesis import strategies as st

from components.control.rewards import MAX_CHARACTERS, SIGMOIDS, RewardExpression, tolerance

NAMES = {"head_height": 0, "upright": 0, "control": 3}
ROWS = {
    "head_height": torch.tensor([1.7, 1.0]),
    "upright": torch.tensor([1.0, 0.5]),
    "control": torch.tensor([[0.0, 0.0, 0.0], [3.0, -4.0, 0.0]]),
}


def evaluate(text: str) -> list[float]:
    return RewardExpression(text, NAMES)(ROWS).tolist()


@pytest.mark.parametrize("sigmoid", SIGMOIDS)
@pytest.mark.parametrize("margin", [0.0, 0.35, 2.0])
@pytest.mark.parametrize(("lower", "upper"), [(0.0, 0.0), (1.4, math.inf), (-math.inf, -1.0), (-0.5, 0.7)])
def test_tolerance_equals_dm_control(sigmoid: str, margin: float, lower: float, upper: float) -> None:
    x = torch.linspace(-4, 4, 161, dtype=torch.float64)
    for value in (0.1, 0.5, *([0.0] if sigmoid in ("cosine", "linear", "quadratic") else [])):
        ours = tolerance(x, lower, upper, margin, sigmoid, value)
        theirs = suite_rewards.tolerance(x.numpy(), (lower, upper), margin, sigmoid, value)
        torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=1e-12, atol=1e-12)


def test_tolerance_falls_to_any_small_value() -> None:
    distance = torch.tensor([0.0, 1.0])
    found = tolerance(distance, margin=1.0, sigmoid="tanh_squared", value_at_margin=1e-18)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-6)


def test_tolerance_keeps_nan_visible() -> None:
    assert tolerance(torch.tensor([math.nan]), 0, 1).isnan().all()
    assert tolerance(torch.tensor([math.nan]), 0, 1, 1.0).isnan().all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("head_height", [1.7, 1.0]),
        ("2", [2, 2]),
        ("-head_height + 2 * upright ** 2 / 4", [-1.2, -0.875]),
        ("1 < head_height", [1, 0]),
        ("0.9 <= upright <= 1", [1, 0]),
        ("head_height > 1 and upright", [1, 0]),
        ("head_height > 1 or upright", [1, 0.5]),
        ("not upright", [0, 0.5]),
        ("norm(control)", [0, 5]),
        ("norm(head_height, upright)", [math.hypot(1.7, 1), math.hypot(1, 0.5)]),
        ("mean(control * upright)", [0, -1 / 6]),
        ("mean(head_height, upright, 0)", [0.9, 0.5]),
        ("min(control)", [0, -4]),
        ("max(head_height, 1.5)", [1.7, 1.5]),
        ("abs(upright - 2)", [1, 1.5]),
        ("clip(head_height, 1.2, 1.5)", [1.5, 1.2]),
        ("sqrt(exp(0) * 4) * upright", [2, 1]),
        ("tolerance(head_height, 1.4, inf, margin=0.4, sigmoid='linear', value_at_margin=0)", [1, 0]),
        ("mean(tolerance(control, 0, 0, 1, 'quadratic', 0))", [1, 1 / 3]),
    ],
)
def test_expression_values(text: str, expected: list[float]) -> None:
    assert evaluate(text) == pytest.approx(expected, abs=1e-6)


def test_expression_says_what_it_uses() -> None:
    assert RewardExpression("min(upright, inf) * norm(control)").names == {"upright", "control"}


def test_scalars_and_vectors_meet_even_when_rows_equal_components() -> None:
    rows = {"a": torch.tensor([1.0, 2.0]), "v": torch.tensor([[1.0, 1.0], [1.0, 1.0]])}
    assert RewardExpression("mean(a * v)", {"a": 0, "v": 2})(rows).tolist() == [1, 2]
    assert RewardExpression("mean(a < v + 1)", {"a": 0, "v": 2})(rows).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("head_heigth > 1", "unknown name 'head_heigth'; available: control, head_height, upright"),
        ("control", "vector per row"),
        ("control * 2 > 1", "vector per row"),
        ("foo(upright)", "unknown function 'foo'; available: tolerance"),
        ("upright upright", "not a valid expression"),
        ("upright.real", "not allowed"),
        ("control[0]", "not allowed"),
        ("(lambda: 1)()", "unknown function"),
        ("__import__('os')", "unknown function"),
        ("[upright]", "not allowed"),
        ("upright if 1 else 0", "not allowed"),
        ("upright // 2", "operator"),
        ("~upright", "operator"),
        ("upright in control", "comparison"),
        ("'linear'", "allowed only as the sigmoid"),
        ("tolerance(upright, sigmoid='soft')", "unknown sigmoid 'soft'"),
        ("tolerance(upright, 2, 1)", "lower <= upper"),
        ("tolerance(upright, 1, inf, -1)", "margin"),
        ("tolerance(upright, 1, inf, head_height)", "margin of tolerance must be a number"),
        ("tolerance(upright, bounds=1)", "no argument named 'bounds'"),
        ("tolerance(upright, 0, lower=1)", "twice"),
        ("min(upright)", "at least 2"),
        ("norm(control, upright)", "mixture"),
        ("True", "not a number"),
        ("2 ** 9999", "exponent"),
        ("upright ** head_height", "exponent"),
        ("1 / 0", "division by zero"),
        ("upright * 1e100", "numbers must lie between"),
        ("1e30 * 1e30", "overflow"),
        ("lambda: " * 200 + "1", "not allowed"),
        ("(" * 300 + "1" + ")" * 300, "not a valid expression"),
        ("-" * 100 + "1", "nested deeper"),
        ("+".join(["1"] * 900), "nested deeper"),
        ("max(" + ",".join(["1"] * 900) + ")", "more than"),
        ("1" * (MAX_CHARACTERS + 1), "longer than"),
        ("upright\x00", "not a valid expression"),
    ],
)
def test_expression_errors_are_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^reward ") as caught:
        RewardExpression(text, NAMES)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_measurement_and_infinite_reward_are_named_when_evaluated() -> None:
    with pytest.raises(ValueError, match="unknown name 'upright'; available: head_height"):
        RewardExpression("upright")({"head_height": torch.ones(2)})
    with pytest.raises(ValueError, match="not finite"):
        RewardExpression("1 / (upright - 1)", NAMES)(ROWS)


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="upright_control_head_height()+-*/<>=. ,'0123456789eandornotminmaxtolerance[]{}:@!\n", max_size=80)
)
def test_any_text_gives_a_reward_or_a_value_error(text: str) -> None:
    try:
        reward = RewardExpression(text, NAMES)(ROWS)
    except ValueError:
        return
    assert reward.shape == (2,)
    assert reward.dtype == torch.float32
