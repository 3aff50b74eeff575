"""Roots of functions chosen to defeat Newton's method, against plain bisection."""

import pytest
import torch
from torch import Tensor

from flowbridge.core.errors import ConvergenceError
from flowbridge.flows.transforms.bumps import CircularBumps, IntervalBumps
from flowbridge.flows.transforms.root_finding import invert_increasing, solve_increasing

COUNT = 4000
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def staircase(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """A slope between 1e-4 and 1 with three steps, each up to 3e3 times as steep: Newton jumps across the bracket."""
    base = 10.0 ** (-4.0 * parameters[:, 0])
    steepness = 10.0 ** (3.5 * parameters[:, 1:4])
    arguments = steepness * (x[:, None] - (4.0 * parameters[:, 4:7] - 2.0))
    rises = torch.tanh(arguments)
    return base * x + rises.sum(-1), base + (steepness * (1.0 - rises.square())).sum(-1)


def hook(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """``sign(x) |x|^p + 1e-4 x`` shifted, with p from 1/4 to 4: slopes that vanish or explode at the root."""
    power = 4.0 ** (2.0 * parameters[:, 0] - 1.0)
    y = x - (2.0 * parameters[:, 1] - 1.0)
    size = y.abs().clamp_min(1e-30)
    return torch.sign(y) * size**power + 1e-4 * y, power * size ** (power - 1.0) + 1e-4


def exponential(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Thirty e-foldings over the bracket: Newton from the wrong side creeps."""
    rate = 15.0 * parameters[:, 0]
    value = torch.exp(rate * x)
    return value + x, rate * value + 1.0


FUNCTIONS = {"staircase": (staircase, 7, 3.0), "hook": (hook, 2, 3.0), "exponential": (exponential, 1, 2.0)}


def bisect(function, target: Tensor, parameters: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Plain bisection down to neighbouring numbers."""
    for _ in range(120):
        middle = 0.5 * (low + high)
        above = function(middle, parameters)[0] > target
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return 0.5 * (low + high)


def problem(name: str, dtype: torch.dtype):
    function, count, half = FUNCTIONS[name]
    parameters = draw(COUNT, count, seed=1, dtype=dtype)
    low = torch.full((COUNT,), -half, dtype=dtype)
    hidden = half * (2.0 * draw(COUNT, seed=2, dtype=dtype) - 1.0)
    return function, function(hidden, parameters)[0], parameters, low, -low


@DTYPES
@pytest.mark.parametrize("name", FUNCTIONS)
def test_hostile_functions_agree_with_bisection(name, dtype):
    function, target, parameters, low, high = problem(name, dtype)
    root = solve_increasing(function, target, parameters, low, high)
    assert root.dtype == dtype
    assert torch.all((root >= low) & (root <= high))
    exact = bisect(function, *(part.double() for part in (target, parameters, low, high)))
    epsilon = torch.finfo(dtype).eps
    tolerance = 16 * epsilon * (1.0 + exact.abs())
    # Rounding of the function itself, some units in the last place of its largest term, moves a root by that over the
    # slope; between the ends of that uncertainty the root may lie anywhere.
    noise = 64 * epsilon * (3.0 + target.double().abs())
    wide = (parameters.double(), low.double() - 1.0, high.double() + 1.0)
    least = bisect(function, target.double() - noise, *wide)
    most = bisect(function, target.double() + noise, *wide)
    assert torch.all(root.double() >= least - tolerance)
    assert torch.all(root.double() <= most + tolerance)


@pytest.mark.parametrize("name", ["staircase", "hook"])
def test_the_hostile_functions_defeat_plain_newton(name):
    """Otherwise the test above would prove nothing."""
    function, target, parameters, low, high = problem(name, torch.float64)
    x = 0.5 * (low + high)
    for _ in range(200):
        value, slope = function(x, parameters)
        x = x - (value - target) / slope
    missed = ~((function(x, parameters)[0] - target).abs() < 1e-6)
    assert int(missed.sum()) > COUNT // 50


def cubic(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Additions and multiplications only, which round the same way in a vector lane and alone."""
    c = parameters[:, 0]
    return c * x * x * x + 0.001 * x, 3.0 * c * x * x + 0.001


@DTYPES
def test_an_element_alone_gives_the_bits_it_gives_in_a_batch(dtype):
    parameters, target = draw(257, 1, seed=3, dtype=dtype), 2.0 * draw(257, seed=4, dtype=dtype) - 1.0
    low = torch.full((257,), -20.0, dtype=dtype)
    root = solve_increasing(cubic, target, parameters, low, -low)
    for rows in [slice(i, i + 1) for i in range(0, 257, 9)] + [slice(0, 100), slice(5, 257)]:
        alone = solve_increasing(cubic, target[rows], parameters[rows], low[rows], -low[rows])
        assert torch.equal(alone, root[rows])
    order = torch.randperm(257, generator=torch.Generator().manual_seed(0))
    assert torch.equal(solve_increasing(cubic, target[order], parameters[order], low, -low), root[order])


@DTYPES
@pytest.mark.parametrize(
    "bumps", [CircularBumps(6), IntervalBumps(6, learn_steepness=True)], ids=["circle", "interval"]
)
def test_roots_of_mixtures_do_not_depend_on_the_batch(bumps, dtype):
    """To the tolerance of the solver: exp and softmax may round differently in another place of a vector register."""
    value = draw(64, 1, seed=5, dtype=dtype)
    parameters = 3.0 * (2.0 * draw(64, 1, bumps.parameter_count, seed=6, dtype=dtype) - 1.0)
    root, log_slope = bumps.forward(value, parameters)
    epsilon = torch.finfo(dtype).eps
    for row in range(0, 64, 7):
        alone, _ = bumps.forward(value[row : row + 1], parameters[row : row + 1])
        allowed = 16 * epsilon * (1.0 + float(log_slope[row].exp()))
        assert abs(float(alone - root[row])) <= allowed


def with_nan(tensor: Tensor, *index: int) -> Tensor:
    broken = tensor.clone()
    broken[index] = torch.nan
    return broken


@DTYPES
@pytest.mark.parametrize("place", ["target", "parameters", "low"])
def test_nan_is_never_given_a_root(place, dtype):
    function, target, parameters, low, high = problem("staircase", dtype)
    if place == "target":
        target = with_nan(target, 17)
    elif place == "parameters":
        parameters = with_nan(parameters, 17, 5)
    else:
        low = with_nan(low, 17)
    with pytest.raises(ConvergenceError, match=f"1 of {COUNT} roots did not converge"):
        solve_increasing(function, target, parameters, low, high)


@pytest.mark.parametrize("bumps", [CircularBumps(2, learn_steepness=True), IntervalBumps(2, learn_steepness=True)])
def test_a_nan_in_any_parameter_of_a_mixture_is_refused(bumps):
    value, parameters = draw(3, 1, seed=7, dtype=torch.float64), torch.zeros(3, 1, bumps.parameter_count).double()
    for index in range(bumps.parameter_count):
        with pytest.raises(ConvergenceError, match="NaN"):
            bumps.forward(value, with_nan(parameters, 1, 0, index))
    with pytest.raises(ConvergenceError, match="NaN"):
        bumps.forward(with_nan(value, 2, 0), parameters)


def test_a_function_without_a_slope_is_solved_or_refused_but_never_guessed():
    """A step function has no derivative anywhere; bisection still finds the step."""

    def step(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sign(x - parameters[:, 0]), torch.zeros_like(x)

    place = torch.tensor([[0.3], [-0.7]], dtype=torch.float64)
    ends = torch.ones(2, dtype=torch.float64)
    root = solve_increasing(step, torch.full((2,), 0.5, dtype=torch.float64), place, -ends, ends)
    assert torch.allclose(root, place[:, 0], atol=1e-14)


def test_nothing_to_solve_gives_nothing():
    empty = torch.zeros(0, dtype=torch.float64)
    assert solve_increasing(cubic, empty, torch.zeros(0, 1, dtype=torch.float64), empty, empty).shape == (0,)


@pytest.mark.parametrize("seed", range(3))
def test_implicit_derivatives_up_to_third_order(seed):
    """Against the closed-form inverse of ``f(x) = a sinh(b x)``, in the target and in both parameters."""

    def function(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        a, b = parameters.unbind(-1)
        return a * torch.sinh(b * x), a * b * torch.cosh(b * x)

    start = 0.5 + draw(3, seed=seed, dtype=torch.float64)

    def implicit(point: Tensor) -> tuple[Tensor, Tensor]:
        ends = torch.full((1,), 20.0, dtype=torch.float64)
        return invert_increasing(function, point[:1], point[None, 1:], -ends, ends)

    def closed(point: Tensor) -> tuple[Tensor, Tensor]:
        y, a, b = point
        return torch.asinh(y / a) / b, -torch.log(b * torch.sqrt(a.square() + y.square()))

    def second(f, output: int) -> Tensor:
        return torch.autograd.functional.hessian(lambda point: f(point)[output].sum(), start)

    for output in (0, 1):
        assert torch.allclose(second(implicit, output), second(closed, output), rtol=1e-10, atol=1e-12)

    def third(f, output: int) -> Tensor:
        point = start.clone().requires_grad_(True)
        (first,) = torch.autograd.grad(f(point)[output].sum(), point, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), point, create_graph=True)
        return torch.autograd.grad(second.sum(), point)[0]

    assert torch.allclose(third(implicit, 0), third(closed, 0), rtol=1e-9)


def test_recording_gradients_leaves_the_value_as_it_is():
    bumps = CircularBumps(6)
    value = draw(500, 2, seed=8, dtype=torch.float64)
    parameters = 3.0 * (2.0 * draw(500, 2, bumps.parameter_count, seed=9, dtype=torch.float64) - 1.0)
    plain = bumps.forward(value, parameters)
    recorded = bumps.forward(value.clone().requires_grad_(True), parameters)
    assert torch.allclose(plain.value, recorded.value, atol=1e-13)
    assert recorded.value.requires_grad
    assert not plain.value.requires_grad
