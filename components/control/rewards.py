"""Rewards as text: dm_control's soft indicator in PyTorch, and a small safe language over named measurements.

Dimensions: n rows (environments or stored transitions), k components of a vector measurement.
"""

import ast
import math
import warnings
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

# Limits that no sensible reward comes near and that keep careless input from hanging the parser or overflowing.
MAX_CHARACTERS = 2000
MAX_NODES = 400
MAX_DEPTH = 40
MAX_EXPONENT = 8
MAX_NUMBER = 1e30  # float32 ends at 3e38


def _gaussian(d: Tensor, value: float) -> Tensor:
    return torch.exp(d.square() * math.log(value))


def _hyperbolic(d: Tensor, value: float) -> Tensor:
    return 1 / torch.cosh(d * math.acosh(1 / value))


def _long_tail(d: Tensor, value: float) -> Tensor:
    return 1 / (d.square() * (1 / value - 1) + 1)


def _reciprocal(d: Tensor, value: float) -> Tensor:
    return 1 / (d.abs() * (1 / value - 1) + 1)


def _cosine(d: Tensor, value: float) -> Tensor:
    angle = (d * math.acos(2 * value - 1)).clamp(-math.pi, math.pi)
    return (1 + torch.cos(angle)) / 2


def _linear(d: Tensor, value: float) -> Tensor:
    return (1 - d * (1 - value)).clamp_min(0)


def _quadratic(d: Tensor, value: float) -> Tensor:
    return (1 - d.square() * (1 - value)).clamp_min(0)


def _tanh_squared(d: Tensor, value: float) -> Tensor:
    # acosh(1 / sqrt(value)) is atanh(sqrt(1 - value)), and finite however small the value is.
    return 1 - torch.tanh(d * math.acosh(1 / math.sqrt(value))).square()


# How the value falls with the distance `d >= 0` from the bounds in margins: 1 at d = 0, `value` at d = 1.
SIGMOIDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "gaussian": _gaussian,
    "hyperbolic": _hyperbolic,
    "long_tail": _long_tail,
    "reciprocal": _reciprocal,
    "cosine": _cosine,
    "linear": _linear,
    "quadratic": _quadratic,
    "tanh_squared": _tanh_squared,
}
_REACHES_ZERO = ("cosine", "linear", "quadratic")


def tolerance(
    x: Tensor,
    lower: float = 0.0,
    upper: float = 0.0,
    margin: float = 0.0,
    sigmoid: str = "gaussian",
    value_at_margin: float = 0.1,
) -> Tensor:
    """1 where `lower <= x <= upper`, falling outside to `value_at_margin` at a distance of `margin`.

    Args:
        x: any shape.
        lower: smallest value that earns 1; may be `-inf`.
        upper: largest value that earns 1; may be `inf`.
        margin: distance, in the unit of `x`, over which the value falls; 0 makes a hard indicator.
        sigmoid: shape of the fall, a key of `SIGMOIDS`.
        value_at_margin: value at distance `margin`, below 1, above 0 (0 allowed for cosine, linear, quadratic).

    Returns:
        Values in [0, 1] with the shape of `x`.
    """
    if sigmoid not in SIGMOIDS:
        raise ValueError(f"unknown sigmoid {sigmoid!r}; available: {', '.join(SIGMOIDS)}")
    if not lower <= upper:
        raise ValueError(f"tolerance needs lower <= upper, got {lower:g} and {upper:g}")
    if not 0 <= margin < math.inf:
        raise ValueError(f"tolerance needs a finite margin of at least 0, got {margin:g}")
    if not (0 < value_at_margin < 1 or (value_at_margin == 0 and sigmoid in _REACHES_ZERO)):
        raise ValueError(f"value_at_margin of a {sigmoid} tolerance must lie between 0 and 1, got {value_at_margin:g}")
    # NaN stays NaN: a clamp would turn a broken measurement into a perfect score.
    distance = torch.maximum((lower - x).clamp_min(0), (x - upper).clamp_min(0))
    if margin == 0:
        return torch.where(distance.isnan(), distance, (distance == 0).to(x.dtype))
    return SIGMOIDS[sigmoid](distance / margin, value_at_margin)


# Values inside an expression: plain numbers, tensors [n] (a scalar per row) or [n, k] (a vector per row).
Value = float | Tensor


class RewardExpression:
    """A reward written as text over named measurements, such as `tolerance(head_height, 1.4, inf, 0.35) * upright`.

    The language has numbers, `inf` and `pi`, measurement names, `+ - * / **`, comparisons (1 or 0, may be chained),
    `and` (minimum), `or` (maximum), `not` (1 - x), and the functions

    - `tolerance(x, lower, upper, margin, sigmoid, value_at_margin)`, as `components.control.rewards.tolerance`;
    - `abs(x)`, `sqrt(x)`, `exp(x)`, `clip(x, low, high)`;
    - `min`, `max`, `mean`, `norm`: of several scalars, or over the components of one vector.

    Nothing is ever handed to `eval`: the text is parsed and only these constructs are walked.

    Args:
        text: the expression.
        names: the measurements that exist, checked at once if given: name -> number of components (0 for a scalar),
            or just the names. With component counts the whole expression is tried out, so that a reward that is still
            a vector, or a wrong argument, is found before anything is simulated.

    Raises:
        ValueError: one sentence on what is wrong.
    """

    def __init__(self, text: str, names: Mapping[str, int] | Collection[str] | None = None) -> None:
        self.text = text.strip()
        self._root = _parse(self.text)
        self.names: frozenset[str] = frozenset(
            node.id for node in _walk_values(self._root) if isinstance(node, ast.Name) and node.id not in CONSTANTS
        )
        if names is None:
            return
        for name in sorted(self.names):
            if name not in names:
                raise self._error(f"unknown name {name!r}; available: {', '.join(sorted(names))}")
        if isinstance(names, Mapping):
            example = {name: torch.ones((1, width) if width else (1,)) for name, width in names.items()}
            self._evaluate(example)

    def __repr__(self) -> str:
        return f"RewardExpression({self.text!r})"

    def __call__(self, measurements: Mapping[str, Tensor]) -> Tensor:
        """Rewards [n], float32, for measurements of shape [n] (scalars) or [n, k] (vectors)."""
        for name in sorted(self.names):
            if name not in measurements:
                raise self._error(f"unknown name {name!r}; available: {', '.join(sorted(measurements))}")
        reward = self._evaluate(measurements)
        if not bool(torch.isfinite(reward).all()):
            raise self._error("the reward is not finite for some rows (a division by 0, a root of a negative number?)")
        return reward

    def _evaluate(self, measurements: Mapping[str, Tensor]) -> Tensor:
        try:
            value = _value(self._root, measurements)
            if not isinstance(value, Tensor):
                rows = next(iter(measurements.values()))
                value = torch.full(rows.shape[:1], value, dtype=torch.float32, device=rows.device)
        except (ValueError, ArithmeticError, RuntimeError) as error:  # PyTorch's for numbers beyond float32
            raise self._error(str(error).splitlines()[0]) from None
        if value.ndim != 1:
            raise self._error("the result is a vector per row, take its mean, norm, min or max")
        return value.to(torch.float32)

    def _error(self, message: str) -> ValueError:
        return ValueError(f"reward {_short(self.text)!r}: {message}")


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _quote(node: ast.expr) -> str:
    return repr(_short(ast.unparse(node)))


def _parse(text: str) -> ast.expr:
    """Parses and checks everything that can be checked without measurements."""

    def refuse(message: str) -> ValueError:
        return ValueError(f"reward {_short(text)!r}: {message}")

    if not text:
        raise refuse("the expression is empty")
    if len(text) > MAX_CHARACTERS:
        raise refuse(f"longer than {MAX_CHARACTERS} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            root = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        detail = error.msg if isinstance(error, SyntaxError) else "cannot be parsed"
        raise refuse(f"not a valid expression ({detail})") from None
    try:
        _check(root, depth=1)
        if sum(1 for _ in _walk_values(root)) > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES} terms")
    except RecursionError:  # while quoting a forbidden construct
        raise refuse(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise refuse(str(error)) from None
    return root


def _walk_values(node: ast.expr):
    """Yields every node that stands for a value (function names are not values)."""
    yield node
    for child in _children(node):
        yield from _walk_values(child)


def _children(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    if isinstance(node, ast.BoolOp):
        return node.values
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.Call):
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    return []


def _check(node: ast.expr, depth: int, string_allowed: bool = False) -> None:
    """Refuses every construct outside the language."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            if not string_allowed:
                raise ValueError(f"text ({node.value!r}) is allowed only as the sigmoid of tolerance")
            if node.value not in SIGMOIDS:
                raise ValueError(f"unknown sigmoid {node.value!r}; available: {', '.join(SIGMOIDS)}")
        elif isinstance(node.value, bool) or not isinstance(node.value, int | float):
            raise ValueError(f"{node.value!r} is not a number")
        elif abs(node.value) > MAX_NUMBER:
            raise ValueError(f"numbers must lie between -{MAX_NUMBER:g} and {MAX_NUMBER:g}, use inf for an open bound")
        return
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
            raise ValueError(f"unknown function {_quote(node.func)}; available: {', '.join(FUNCTIONS)}")
        is_tolerance = node.func.id == "tolerance"
        for keyword in node.keywords:
            if not is_tolerance or keyword.arg not in TOLERANCE_ARGUMENTS:
                raise ValueError(f"{node.func.id} takes no argument named {keyword.arg!r}")
        for index, argument in enumerate(node.args):
            _check(argument, depth + 1, string_allowed=is_tolerance and index == TOLERANCE_ARGUMENTS.index("sigmoid"))
        for keyword in node.keywords:
            _check(keyword.value, depth + 1, string_allowed=keyword.arg == "sigmoid")
        return
    if isinstance(node, ast.BinOp):
        if type(node.op) not in BINARY:
            raise ValueError(f"the operator of {_quote(node)} is not allowed, only + - * / **")
        if isinstance(node.op, ast.Pow):
            exponent = node.right.operand if isinstance(node.right, ast.UnaryOp) else node.right
            if not isinstance(exponent, ast.Constant) or not isinstance(exponent.value, int | float):
                raise ValueError("an exponent must be a plain number")
            if not abs(exponent.value) <= MAX_EXPONENT:
                raise ValueError(f"an exponent must lie between -{MAX_EXPONENT} and {MAX_EXPONENT}")
    elif isinstance(node, ast.UnaryOp):
        if not isinstance(node.op, ast.USub | ast.UAdd | ast.Not):
            raise ValueError(f"the operator of {_quote(node)} is not allowed")
    elif isinstance(node, ast.Compare):
        if any(type(operator) not in COMPARISONS for operator in node.ops):
            raise ValueError(f"the comparison of {_quote(node)} is not allowed, only < <= > >= == !=")
    elif not isinstance(node, ast.Name | ast.BoolOp):
        raise ValueError(f"{_quote(node)} is not allowed here")
    for child in _children(node):
        _check(child, depth + 1)


def _aligned(*values: Value) -> tuple[Value, ...]:
    """Lets scalars [n] meet vectors [n, k] as [n, 1]."""
    widths = {value.shape[1] for value in values if isinstance(value, Tensor) and value.ndim == 2}
    if len(widths) > 1:
        raise ValueError(f"vectors of {' and '.join(map(str, sorted(widths)))} components cannot be combined")
    if not widths:
        return values
    return tuple(value[:, None] if isinstance(value, Tensor) and value.ndim == 1 else value for value in values)


def _power(base: Value, exponent: Value) -> Value:
    result = base**exponent
    if isinstance(result, complex):  # Python's answer to a root of a negative number
        raise ValueError("a power of a negative number is not real")
    return result


BINARY: dict[type[ast.operator], Callable[[Value, Value], Value]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: _power,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[Value, Value], Value]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}


def _unary(tensor_function: Callable[[Tensor], Tensor], number_function: Callable[[float], float]):
    def apply(*arguments: Value) -> Value:
        if len(arguments) != 1:
            raise ValueError(f"{tensor_function.__name__} takes 1 argument, got {len(arguments)}")
        (x,) = arguments
        return tensor_function(x) if isinstance(x, Tensor) else number_function(x)

    return apply


def _reduction(name: str, reduce: Callable[[Tensor], Tensor]):
    """A function of several scalars, or of the components of one vector; `reduce` maps [..., k] to [...]."""

    def apply(*arguments: Value) -> Value:
        if len(arguments) == 1 and isinstance(arguments[0], Tensor) and arguments[0].ndim == 2:
            return reduce(arguments[0])
        if any(isinstance(argument, Tensor) and argument.ndim == 2 for argument in arguments):
            raise ValueError(f"{name} takes several scalars or a single vector, not a mixture")
        if len(arguments) < 2:
            raise ValueError(f"{name} takes a vector or at least 2 scalars")
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        if not tensors:
            return float(reduce(torch.tensor(arguments, dtype=torch.float64)))
        like = tensors[0]
        columns = [a if isinstance(a, Tensor) else torch.full_like(like, a) for a in arguments]
        return reduce(torch.stack(columns, dim=-1))

    return apply


def _clip(*arguments: Value) -> Value:
    if len(arguments) != 3:
        raise ValueError(f"clip takes 3 arguments (x, low, high), got {len(arguments)}")
    x, low, high = arguments
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        raise ValueError("the bounds of clip must be numbers")
    return x.clamp(low, high) if isinstance(x, Tensor) else min(max(x, low), high)


TOLERANCE_ARGUMENTS = ("x", "lower", "upper", "margin", "sigmoid", "value_at_margin")


def _tolerance(*arguments: Value, **keywords: Value) -> Value:
    if len(arguments) > len(TOLERANCE_ARGUMENTS):
        raise ValueError(f"tolerance takes at most {len(TOLERANCE_ARGUMENTS)} arguments, got {len(arguments)}")
    bound = dict(zip(TOLERANCE_ARGUMENTS, arguments))
    for name, value in keywords.items():
        if name in bound:
            raise ValueError(f"tolerance got its argument {name!r} twice")
        bound[name] = value
    if "x" not in bound:
        raise ValueError("tolerance needs a value to judge as its first argument")
    for name, value in bound.items():
        if name != "x" and isinstance(value, Tensor):
            raise ValueError(f"{name} of tolerance must be a number; subtract the measurement from the value instead")
        if name not in ("x", "sigmoid") and isinstance(value, str):
            raise ValueError(f"{name} of tolerance must be a number")
        if name == "sigmoid" and not isinstance(value, str):
            raise ValueError(f"the sigmoid of tolerance must be one of {', '.join(map(repr, SIGMOIDS))}")
    x = bound.pop("x")
    if isinstance(x, Tensor):
        return tolerance(x, **bound)
    return float(tolerance(torch.tensor(x, dtype=torch.float64), **bound))


FUNCTIONS: dict[str, Callable[..., Value]] = {
    "tolerance": _tolerance,
    "abs": _unary(torch.abs, abs),
    "sqrt": _unary(torch.sqrt, math.sqrt),
    "exp": _unary(torch.exp, math.exp),
    "clip": _clip,
    "min": _reduction("min", lambda x: x.amin(-1)),
    "max": _reduction("max", lambda x: x.amax(-1)),
    "mean": _reduction("mean", lambda x: x.mean(-1)),
    "norm": _reduction("norm", lambda x: torch.linalg.vector_norm(x, dim=-1)),
}
CONSTANTS = {"inf": math.inf, "pi": math.pi}


def _number(value: Value | bool) -> Value:
    """Booleans as 1 and 0."""
    if isinstance(value, Tensor):
        return value.to(torch.get_default_dtype()) if value.dtype == torch.bool else value
    return float(value)


def _minimum(a: Value, b: Value) -> Value:
    a, b = _aligned(a, b)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    if isinstance(a, Tensor):
        return a.clamp_max(b)
    return b.clamp_max(a) if isinstance(b, Tensor) else min(a, b)


def _value(node: ast.expr, measurements: Mapping[str, Tensor]) -> Value:
    """Evaluates a checked node."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else float(node.value)
    if isinstance(node, ast.Name):
        return CONSTANTS[node.id] if node.id in CONSTANTS else measurements[node.id]
    if isinstance(node, ast.BinOp):
        left, right = _aligned(_value(node.left, measurements), _value(node.right, measurements))
        return BINARY[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp):
        operand = _value(node.operand, measurements)
        if isinstance(node.op, ast.Not):
            return 1 - operand
        return -operand if isinstance(node.op, ast.USub) else operand
    if isinstance(node, ast.BoolOp):
        # Minimum and maximum agree with `and` and `or` on 0 and 1 and keep soft indicators soft.
        values = [_value(value, measurements) for value in node.values]
        result = values[0]
        for value in values[1:]:
            result = _minimum(result, value) if isinstance(node.op, ast.And) else -_minimum(-result, -value)
        return result
    if isinstance(node, ast.Compare):
        values = [_value(value, measurements) for value in _children(node)]
        result: Value = 1.0
        for operator, left, right in zip(node.ops, values[:-1], values[1:]):
            holds = _number(COMPARISONS[type(operator)](*_aligned(left, right)))
            factor, holds = _aligned(result, holds)
            result = factor * holds
        return result
    # Only calls are left: everything else was refused when the text was parsed.
    arguments = [_value(argument, measurements) for argument in node.args]
    keywords = {keyword.arg: _value(keyword.value, measurements) for keyword in node.keywords}
    return FUNCTIONS[node.func.id](*arguments, **keywords)
