"""Conformance checks of elementwise transforms, the bijections that coupling layers apply coordinate by coordinate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..flows.transforms.bijection import ElementwiseTransform, Transformed
from ..flows.transforms.registry import Domain
from .report import Check, ConformanceReport

_COUNT = 101
_ROUND_TRIP = {torch.float64: 1e-9, torch.float32: 1e-3}

Direction = Callable[[Tensor, Tensor], Transformed]


def check_transform(transform: ElementwiseTransform, domain: Domain = "line", seed: int = 0) -> ConformanceReport:
    """Check that a transform keeps its contract, and return the report if it does.

    Checked are shapes, the two directions against each other in float64 and float32, that the map increases, its logarithmic
    slopes against derivatives, rows against a batch, first and second derivatives by values and parameters (which forces and
    their training need), and that an interval is mapped onto itself.

    Args:
        transform: what is checked.
        domain: where its values lie.
        seed: random seed of parameters and values.

    Raises:
        ConformanceError: with one line for each check that failed.
    """
    generator = torch.Generator().manual_seed(seed)
    size = transform.parameter_count
    parameters = 1.5 * torch.randn(1, 3, size, generator=generator, dtype=torch.float64)
    ends = (0.0, 1.0) if domain == "interval" else (-4.0, 4.0)
    values = torch.linspace(*ends, _COUNT, dtype=torch.float64)[:, None].repeat(1, 3)
    checks = (
        ("shapes", lambda: _shapes(transform, values, parameters)),
        ("directions undo each other", lambda: _round_trip(transform, values, parameters, torch.float64)),
        ("the same in single precision", lambda: _round_trip(transform, values, parameters, torch.float32)),
        ("data to latent increases", lambda: _increases(transform.inverse, values, parameters)),
        ("slopes of latent to data", lambda: _slopes(transform.forward, values, parameters)),
        ("slopes of data to latent", lambda: _slopes(transform.inverse, values, parameters)),
        ("rows are those of the batch", lambda: _rows(transform, values, parameters)),
        ("first and second derivatives", lambda: _derivatives(transform, values[30:70:20], parameters)),
        ("the interval is mapped onto itself", lambda: _onto(transform, values, parameters)),
    )
    wanted = checks if domain == "interval" else checks[:-1]
    report = ConformanceReport(type(transform).__name__, tuple(_outcome(name, check) for name, check in wanted))
    report.require()
    return report


def _outcome(name: str, check: Callable[[], tuple[float, float]]) -> Check:
    """Run a check, which returns what it measured and what is allowed."""
    try:
        measured, allowed = check()
    except Exception as error:  # whatever a transform raises belongs in the report, next to what else is wrong
        return Check(name, False, detail=f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return Check(name, measured <= allowed, measured, allowed)


def _shapes(transform: ElementwiseTransform, values: Tensor, parameters: Tensor) -> tuple[float, float]:
    start = transform.initial_parameters(3, torch.Generator().manual_seed(0))
    wrong = int(start.shape != (3, transform.parameter_count))
    for direction in (transform.forward, transform.inverse):
        result = direction(values, parameters.expand(len(values), -1, -1))
        wrong += sum(part.shape != values.shape or part.dtype != values.dtype for part in result)
    return float(wrong), 0.0


def _round_trip(
    transform: ElementwiseTransform, values: Tensor, parameters: Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    given, parameters = values.to(dtype), parameters.to(dtype).expand(len(values), -1, -1)
    latent, down = transform.inverse(given, parameters)
    data, up = transform.forward(latent, parameters)
    # Where the map is flat, rounding of the latent value moves the data by that much over the slope.
    moved = (data - given).abs() / (1.0 + given.abs() + up.exp())
    return float(torch.maximum(moved, (up + down).abs() / (1.0 + up.exp())).max()), _ROUND_TRIP[dtype]


def _increases(direction: Direction, values: Tensor, parameters: Tensor) -> tuple[float, float]:
    mapped, _ = direction(values, parameters.expand(len(values), -1, -1))
    return -float(torch.diff(mapped, dim=0).min()), 0.0


def _slopes(direction: Direction, values: Tensor, parameters: Tensor) -> tuple[float, float]:
    leaf = values[1:-1].clone().requires_grad_(True)
    mapped, log_slope = direction(leaf, parameters.expand(len(leaf), -1, -1))
    (slope,) = torch.autograd.grad(mapped.sum(), leaf)
    return float((log_slope.detach() - slope.log()).abs().max()), 1e-8


def _rows(transform: ElementwiseTransform, values: Tensor, parameters: Tensor) -> tuple[float, float]:
    difference = 0.0
    for direction in (transform.forward, transform.inverse):
        batch = direction(values, parameters.expand(len(values), -1, -1))
        row = direction(values[40:41], parameters)
        difference = max(difference, *(float((a[40:41] - b).abs().max()) for a, b in zip(batch, row, strict=True)))
    return difference, 1e-12


def _derivatives(transform: ElementwiseTransform, values: Tensor, parameters: Tensor) -> tuple[float, float]:
    inputs = (values.clone().requires_grad_(True), (0.5 * parameters).repeat(len(values), 1, 1).requires_grad_(True))
    for direction in (transform.forward, transform.inverse):
        torch.autograd.gradcheck(direction, inputs, atol=1e-6, fast_mode=True)
        torch.autograd.gradgradcheck(direction, inputs, atol=1e-5, rtol=1e-4, fast_mode=True)
    return 0.0, 0.0  # the checks of torch raise an error for what is wrong


def _onto(transform: ElementwiseTransform, values: Tensor, parameters: Tensor) -> tuple[float, float]:
    ends = values[[0, -1]]
    mapped, _ = transform.inverse(ends, parameters.expand(2, -1, -1))
    return float((mapped - ends).abs().max()), 1e-9
