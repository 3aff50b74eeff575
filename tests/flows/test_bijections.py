"""Every map of a flow, held to the same properties: inverse, volume, period, smoothness, derivatives, precision."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from flowbridge.core.errors import ConfigurationError
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.coordinate_flow import CircleShift, CoordinateFlow, IntervalFeatures
from flowbridge.flows.boltzmann.internal_coordinates import InternalCoordinates, InternalPoint
from flowbridge.flows.boltzmann.molecule_coordinates import Coordinates, MoleculeCoordinates
from flowbridge.flows.boltzmann.stiff_maps import IntervalMap, WhitenedMap
from flowbridge.flows.boltzmann.zmatrix import build_zmatrix
from flowbridge.flows.transforms.bijection import Chain, ElementwiseTransform, Transformed
from flowbridge.flows.transforms.bumps import UNIMODAL_STEEPNESS, CircularBumps, IntervalBumps, smooth_sigmoid
from flowbridge.flows.transforms.conditioners import FourierFeatures
from flowbridge.flows.transforms.couplings import Coupling
from flowbridge.flows.transforms.sinh_arcsinh import Affine, SinhArcsinh, _arcsinh

Map = Callable[[Tensor], Transformed]


@dataclass(frozen=True)
class Case:
    """A map between flat latent ``(B, D)`` and flat data, its latent points, and which columns are circles."""

    forward: Map
    inverse: Map
    latent: Tensor
    latent_circles: tuple[int, ...] = ()
    data_circles: tuple[int, ...] = ()
    wrapped: bool = False
    rigid_motion: bool = False
    always_double: bool = False


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stirred(module: torch.nn.Module, dtype: torch.dtype, size: float = 0.3) -> torch.nn.Module:
    """Move all parameters away from their start, so that nothing is an identity by accident."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return module.to(dtype)


# ------------------------------------------------------------------------------------------------ the maps

ELEMENTWISE: dict[str, Callable[[], ElementwiseTransform]] = {
    "affine": Affine,
    "sinh_arcsinh": SinhArcsinh,
    "circular_bumps": lambda: CircularBumps(5),
    "circular_bumps_steep": lambda: CircularBumps(5, minimum_width=0.1, learn_steepness=True),
    "interval_bumps": lambda: IntervalBumps(5),
    "interval_bumps_steep": lambda: IntervalBumps(5, minimum_identity=1e-4, learn_steepness=True),
}


def latent_of(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (uniform if "bumps" in name else random)(*shape, seed=1, dtype=dtype)


def elementwise(name: str, dtype: torch.dtype) -> Case:
    transform = ELEMENTWISE[name]()
    parameters = 1.5 * random(3, transform.parameter_count, dtype=dtype)

    def run(direction: Callable[[Tensor, Tensor], Transformed]) -> Map:
        def flat(x: Tensor) -> Transformed:
            value, log_slope = direction(x, parameters.expand(len(x), -1, -1))
            return Transformed(value, log_slope.sum(-1))

        return flat

    circles = (0, 1, 2) if name.startswith("circular") else ()
    latent = latent_of(name, 7, 3, dtype=dtype)
    return Case(run(transform.forward), run(transform.inverse), latent, circles, circles)


def coupling(name: str, dtype: torch.dtype) -> Case:
    circular = name.startswith("circular")
    encoder = FourierFeatures(2, 2, ((0, 1),)) if circular else IntervalFeatures() if "interval" in name else None
    layer = stirred(
        Coupling(
            4, [2, 0], ELEMENTWISE[name](), (8, 8), torch.Generator().manual_seed(0),
            encoder=encoder, features=12 if circular else 2, context=3, wrap=circular,
        ),
        dtype,
    )  # fmt: skip
    context = random(1, 3, seed=2, dtype=dtype)
    circles = tuple(range(4)) if circular else ()
    return Case(
        lambda x: layer(x, context.expand(len(x), -1)),
        lambda y: layer.inverse(y, context.expand(len(y), -1)),
        latent_of(name, 7, 4, dtype=dtype),
        circles,
        circles,
        wrapped=circular,
    )


def chain(dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    layers = [
        Coupling(3, [0, 1], SinhArcsinh(), (8,), generator),
        Coupling(3, [2], Affine(), (8,), generator),
        Coupling(3, [1, 2], SinhArcsinh(), (8,), generator, conditioning=[]),
    ]
    bijection = stirred(Chain(layers), dtype, 0.1)
    return Case(bijection.forward, bijection.inverse, random(7, 3, dtype=dtype))


def circle_shift(dtype: torch.dtype) -> Case:
    shift = CircleShift(3, torch.Generator().manual_seed(0))
    circles = (0, 1, 2)
    return Case(shift.forward, shift.inverse, uniform(7, 3, dtype=dtype), circles, circles, wrapped=True)


def correlated(frames: int, dimension: int) -> np.ndarray:
    """Data with every coordinate on its own scale, from 1e-3 to 1, all correlated."""
    return (random(frames, dimension) @ random(dimension, dimension, seed=9) * torch.logspace(-3, 0, dimension)).numpy()


def whitened(dtype: torch.dtype) -> Case:
    fixed = WhitenedMap(4, 2)
    fixed.fit(correlated(200, 4), uniform(200, 2).numpy())
    context = uniform(1, 2, seed=4)
    return Case(
        lambda x: fixed(x, context.expand(len(x), -1)),
        lambda y: fixed.inverse(y, context.expand(len(y), -1)),
        random(7, 4),
    )


def interval(dtype: torch.dtype) -> Case:
    low, high = torch.tensor([0.05, 0.5, -math.pi]), torch.tensor([0.3, math.pi, math.pi])
    fixed = IntervalMap(low, high)
    data = torch.tensor([0.15, 2.0, 0.3]) + torch.tensor([0.004, 0.06, 0.9]) * uniform(200, 3)
    fixed.fit(data.numpy(), np.zeros((200, 0)))
    return Case(fixed.forward, fixed.inverse, uniform(7, 3))


def internal_coordinates(make: "Makers", dtype: torch.dtype) -> Case:
    particles, positions = make.from_smiles("CCO")
    internal = InternalCoordinates(build_zmatrix(particles))
    bonds, angles, torsions = len(particles) - 1, len(particles) - 2, len(particles) - 3

    def forward(flat: Tensor) -> Transformed:
        x, log_det = internal(InternalPoint(*flat.split([bonds, angles, torsions], 1)))
        return Transformed(x.flatten(1), log_det)

    def inverse(flat: Tensor) -> Transformed:
        point, log_det = internal.inverse(flat.unflatten(1, (-1, 3)))
        return Transformed(torch.cat(point, 1), log_det)

    latent, _ = inverse(torch.as_tensor(make.frames_of(particles, positions, 7)).flatten(1))
    circles = tuple(range(bonds + angles, bonds + angles + torsions))
    return Case(forward, inverse, latent.to(dtype), circles, rigid_motion=True, always_double=True)


def molecule_coordinates(make: "Makers", configuration: FlowConfiguration, dtype: torch.dtype) -> Case:
    model = make.generator_of("CCO", configuration)
    coordinates: MoleculeCoordinates = model.coordinates
    circles = len(coordinates.layout.circular)

    def forward(flat: Tensor) -> Transformed:
        x, log_det = coordinates(Coordinates(flat[:, :circles], flat[:, circles:]))
        return Transformed(x.flatten(1), log_det)

    def inverse(flat: Tensor) -> Transformed:
        point, log_det = coordinates.inverse(flat.unflatten(1, (-1, 3)))
        return Transformed(torch.cat(point, 1), log_det)

    particles, positions = make.from_smiles("CCO")
    latent, _ = inverse(torch.as_tensor(make.frames_of(particles, positions, 7, seed=1)).flatten(1))
    return Case(forward, inverse, latent.to(dtype), tuple(range(circles)), rigid_motion=True, always_double=True)


def coordinate_flow(make: "Makers", configuration: FlowConfiguration, dtype: torch.dtype) -> Case:
    flow: CoordinateFlow = make.generator_of("CCCO", configuration, dtype).flow
    circles = flow.circular_dimension

    def flat(direction: Callable[[Coordinates], tuple[Coordinates, Tensor]]) -> Map:
        def run(x: Tensor) -> Transformed:
            point, log_det = direction(Coordinates(x[:, :circles], x[:, circles:]))
            return Transformed(torch.cat(point, 1), log_det)

        return run

    latent = torch.cat(flow.sample_latent(7, torch.Generator().manual_seed(2)), 1)
    columns = tuple(range(circles))
    return Case(flat(flow.forward), flat(flow.inverse), latent, columns, columns, wrapped=True)


@dataclass(frozen=True)
class Makers:
    """The fixtures that cases of whole molecules need."""

    from_smiles: Callable
    frames_of: Callable
    generator_of: Callable
    paper_design: FlowConfiguration


CASES: dict[str, Callable[[Makers, torch.dtype], Case]] = {
    **{name: functools.partial(lambda make, dtype, name: elementwise(name, dtype), name=name) for name in ELEMENTWISE},
    **{
        f"coupling_{name}": functools.partial(lambda make, dtype, name: coupling(name, dtype), name=name)
        for name in ELEMENTWISE
    },
    "chain": lambda make, dtype: chain(dtype),
    "circle_shift": lambda make, dtype: circle_shift(dtype),
    "whitened_map": lambda make, dtype: whitened(dtype),
    "interval_map": lambda make, dtype: interval(dtype),
    "internal_coordinates": internal_coordinates,
    "molecule_coordinates": lambda make, dtype: molecule_coordinates(make, FlowConfiguration(), dtype),
    "molecule_coordinates_paper": lambda make, dtype: molecule_coordinates(make, make.paper_design, dtype),
    "coordinate_flow": lambda make, dtype: coordinate_flow(make, FlowConfiguration(), dtype),
    "coordinate_flow_paper": lambda make, dtype: coordinate_flow(make, make.paper_design, dtype),
}
DOUBLE_ONLY = {"whitened_map", "interval_map"}  # fitted maps: always evaluated in float64


@pytest.fixture(scope="module")
def case_of(from_smiles, frames_of, generator_of, paper_design):
    make = Makers(from_smiles, frames_of, generator_of, paper_design)
    return functools.lru_cache(lambda name, dtype=torch.float64: CASES[name](make, dtype))


every_case = pytest.mark.parametrize("name", CASES)


def off(first: Tensor, second: Tensor, circles: tuple[int, ...] = ()) -> float:
    """Return the largest difference, taken round the circle in the columns ``circles``, relative to sizes above 1."""
    difference, size = (first - second).detach().double(), 1.0 + second.detach().double().abs()
    columns = list(circles)
    difference[:, columns] -= torch.round(difference[:, columns])
    return float((difference.abs() / size).max()) if len(difference) else 0.0


# ------------------------------------------------------------------------------------------------ the properties


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float64) for name in CASES] + [(name, torch.float32) for name in CASES if name not in DOUBLE_ONLY],
)
def test_the_directions_undo_each_other(case_of, name, dtype):
    case = case_of(name, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    data, up = case.forward(case.latent)
    latent, down = case.inverse(data)
    for result in (data, up, latent, down):
        assert result.dtype == (torch.float64 if case.always_double else dtype)
    assert up.shape == down.shape == (7,)
    turns = case.latent_circles
    if name == "internal_coordinates":  # torsions in radians
        wound = latent.clone()
        wound[:, list(turns)] += 2 * math.pi * torch.round((case.latent - latent)[:, list(turns)] / (2 * math.pi))
        assert off(wound, case.latent) < tolerance
    else:
        assert off(latent, case.latent, turns) < tolerance
    assert off(down[:, None], -up[:, None]) < 10 * tolerance
    again, _ = case.forward(latent)
    assert off(again, data, case.data_circles) < 10 * tolerance


@pytest.mark.parametrize(
    "name", [name for name in CASES if name.startswith(("coupling_circ", "circle", "coordinate_f"))]
)
def test_angles_come_out_in_one_turn(case_of, name):
    case = case_of(name)
    far = case.latent.clone()
    far[:, list(case.latent_circles)] += torch.tensor([-7.0, -1.0, 0.0, 0.0, 1.0, 2.0, 30.0]).double()[:, None]
    data, latent = case.forward(far).value, case.inverse(far).value
    for value, circles in ((data, case.data_circles), (latent, case.latent_circles)):
        moved = value[:, [i for i in circles if not name.startswith("coupling") or i in (0, 2)]]
        assert torch.all((moved >= 0.0) & (moved <= 1.0))


@every_case
def test_batches_of_any_size_give_the_same_rows(case_of, name):
    case = case_of(name)
    data, up = case.forward(case.latent)
    latent, down = case.inverse(data)
    for rows in (slice(0, 0), slice(3, 4), slice(0, 7)):
        part, part_up = case.forward(case.latent[rows])
        back, part_down = case.inverse(data[rows])
        assert part.shape == data[rows].shape
        assert part_up.shape == part_down.shape == up[rows].shape
        assert off(part, data[rows]) < 1e-12
        assert off(back, latent[rows]) < 1e-12
        assert off(part_up[:, None], up[rows, None]) < 1e-12
        assert off(part_down[:, None], down[rows, None]) < 1e-12


def rigid_columns(flat: Tensor) -> Tensor:
    """Return ``(3N, 6)``: how positions move under translations and infinitesimal rotations about the origin."""
    x = flat.reshape(-1, 3)
    axes = torch.eye(3, dtype=x.dtype)
    shifts = axes.repeat(len(x), 1)
    turns = torch.stack([torch.linalg.cross(axis.expand_as(x), x).flatten() for axis in axes], 1)
    return torch.cat([shifts, turns], 1)


@every_case
def test_log_det_is_that_of_the_jacobian(case_of, name):
    case = case_of(name)
    data, up = case.forward(case.latent)
    for row in range(2):
        point = case.latent[row : row + 1]
        jacobian = torch.autograd.functional.jacobian(lambda x: case.forward(x).value[0], point)[:, 0]
        if case.rigid_motion:
            # With the frame's first atom at the origin, the rest of the volume element is exactly the rigid motion.
            jacobian = torch.cat([jacobian, rigid_columns(data[row])], 1)
        assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(up[row].detach()), abs=1e-8)
        if not case.rigid_motion:
            jacobian = torch.autograd.functional.jacobian(lambda y: case.inverse(y).value[0], data[row : row + 1])[:, 0]
            assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(-float(up[row].detach()), abs=1e-8)


@pytest.mark.parametrize("name", [name for name in CASES if "circ" in name or "coordinate" in name])
def test_a_full_turn_changes_nothing(case_of, name):
    case = case_of(name)
    period = 2 * math.pi if name == "internal_coordinates" else 1.0
    for run, circles, outputs, start in (
        (case.forward, case.latent_circles, case.data_circles, case.latent),
        (case.inverse, case.data_circles, case.latent_circles, case.forward(case.latent).value),
    ):
        value, log_det = run(start)
        for column in circles:
            for turns in (1, -3):
                moved = start.clone()
                moved[:, column] += turns * period
                turned, turned_log_det = run(moved)
                if not case.wrapped and outputs:
                    expected = value.clone()
                    expected[:, column] += turns
                    assert off(turned, expected) < 1e-11
                else:
                    assert off(turned, value, outputs) < 1e-9
                assert off(turned_log_det[:, None], log_det[:, None]) < 1e-9


def derivatives(function: Callable[[Tensor], Tensor], at: float, order: int = 3) -> list[float]:
    """Return value and derivatives of a function of one number by repeated differentiation."""
    t = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    values = [function(t)]
    for _ in range(order):
        (slope,) = torch.autograd.grad(values[-1], t, create_graph=True, materialize_grads=True)
        values.append(slope)
    return [float(value.detach()) for value in values]


def require_smooth(function: Callable[[Tensor], Tensor], place: float, width: float = 0.02) -> None:
    """Check value and three derivatives on both sides of a place, and against differences taken across it.

    A jump is measured against the largest value of that derivative at some places within ``width``.
    """
    near, h = 1e-11, 1e-7
    offsets = (0.0, near, -near, h, -h, width, -width, width / 9, -width / 9)
    here, right, left, after, before, *others = (np.array(derivatives(function, place + d)) for d in offsets)
    scale = np.abs([here, right, left, *others]).max(0) + 1e-6
    assert np.all(np.abs(left - right) < 1e-4 * scale)
    assert np.all(np.abs(here - right) < 1e-4 * scale)
    assert np.all(np.abs((after - before)[:3] / (2 * h) - here[1:]) < 1e-3 * scale[1:])


@pytest.mark.parametrize(
    "name", [name for name in CASES if ("circ" in name and "interval" not in name) or "coordinate" in name]
)
def test_maps_are_smooth_where_angles_are_cut(case_of, name):
    case = case_of(name)
    if name == "internal_coordinates":
        cuts = (math.pi, -math.pi)
    else:
        cuts = (0.0,) if name.startswith("coordinate_flow") else (0.0, 1.0, 0.5)
    runs = [(case.forward, case.latent_circles, case.data_circles, case.latent)]
    if not case.rigid_motion:
        runs.append((case.inverse, case.data_circles, case.latent_circles, case.forward(case.latent).value))
    for run, circles, outputs, start in runs:
        size = run(start[:1]).value.shape[1]
        weights, shares = random(size, seed=11), random(size, seed=12)
        turning = torch.zeros(size, dtype=torch.bool)
        turning[list(outputs)] = True
        for column in circles[-1:] if name.startswith("coordinate_flow") else circles[:2]:

            def observable(t, run=run, column=column, start=start, weights=weights, shares=shares, turning=turning):
                point = torch.cat([start[0, :column], t[None], start[0, column + 1 :]])[None]
                value, log_det = run(point)
                phases = 2 * math.pi * torch.where(turning, value[0], 0.0)
                rest = torch.where(turning, 0.0, value[0])
                return (weights * (phases.cos() + rest) + shares * phases.sin()).sum() + log_det[0]

            for cut in cuts:
                require_smooth(observable, cut)


@pytest.mark.parametrize("steepness", [UNIMODAL_STEEPNESS + 1e-3, 1.2, 10.8])
def test_the_sigmoid_is_smooth_at_its_ends_and_unimodal(steepness):
    edge = 1.0 / 1024.0
    for place in (0.0, edge, 1.0 - edge, 1.0):
        require_smooth(lambda x: smooth_sigmoid(x, steepness)[0], place, 0.3)
        require_smooth(lambda x: smooth_sigmoid(x, steepness)[1], place, 0.3)
    grid = torch.linspace(-0.5, 1.5, 4001, dtype=torch.float64)
    value, slope = smooth_sigmoid(grid, steepness)
    assert torch.all(value[grid <= 0] == 0.0)
    assert torch.all(value[grid >= 1] == 1.0)
    assert torch.all(slope[(grid <= 0) | (grid >= 1)] == 0.0)
    assert torch.allclose(value + value.flip(0), torch.ones_like(value), atol=1e-15)
    change = torch.sign(torch.diff(slope[slope > 1e-12]))
    assert int((torch.diff(change[change != 0]) != 0).sum()) <= 1


def test_below_the_stated_steepness_the_density_has_two_modes():
    grid = torch.linspace(0.05, 0.95, 4001, dtype=torch.float64)
    middle = 2000
    for steepness, flat in ((UNIMODAL_STEEPNESS - 0.02, False), (UNIMODAL_STEEPNESS + 0.02, True)):
        slope = smooth_sigmoid(grid, steepness)[1]
        assert bool(slope.argmax() == middle) == flat


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if "bumps" in name])
def test_mixtures_are_smooth_across_the_ends_of_their_bumps(name):
    transform = ELEMENTWISE[name]()
    parameters = 1.5 * random(transform.parameter_count, seed=21)
    _, centres, widths, _, _ = transform._read(parameters)
    if isinstance(transform, IntervalBumps):
        centres = transform._placed(centres, widths)
    for direction in (transform.inverse, transform.forward):
        for centre, width in zip(centres, widths, strict=True):
            for end in (centre - width / 2, centre + width / 2, centre + 0.5)[: 3 if name.startswith("circ") else 2]:
                place = float(end) if direction == transform.inverse else float(transform.inverse(end, parameters)[0])

                def density(x, direction=direction):
                    return direction(x.reshape(1, 1), parameters[None, None]).log_det.sum()

                require_smooth(density, place)  # its derivatives are those of the value, one order up
                near = torch.tensor([place - 1e-11, place + 1e-11], dtype=torch.float64)[:, None]
                before, after = direction(near, parameters.expand(2, 1, -1)).value
                assert float((after - before).abs()) < 1e-10 * (1.0 + math.exp(float(density(near[0]))))


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_first_and_second_derivatives_of_transforms(name, direction):
    transform = ELEMENTWISE[name]()
    run = getattr(transform, direction)
    value = latent_of(name, 2, 1).requires_grad_(True)
    parameters = (0.7 * random(2, 1, transform.parameter_count, seed=3)).requires_grad_(True)
    assert torch.autograd.gradcheck(run, (value, parameters), atol=1e-6)
    assert torch.autograd.gradgradcheck(run, (value, parameters), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_first_and_second_derivatives_of_couplings(name):
    layer = stirred(
        Coupling(3, [0, 2], ELEMENTWISE[name](), (4,), torch.Generator().manual_seed(0), wrap="circular" in name),
        torch.float64,
        0.1,
    )
    value = (0.2 + 0.6 * uniform(2, 3)).requires_grad_(True)
    bias = layer.conditioner.output.bias.detach().clone().requires_grad_(True)
    weight = layer.conditioner.hidden[0].weight.detach().clone().requires_grad_(True)

    def run(value: Tensor, bias: Tensor, weight: Tensor) -> Transformed:
        replaced = {"conditioner.output.bias": bias, "conditioner.hidden.0.weight": weight}
        return functional_call(layer, replaced, (value,))

    assert torch.autograd.gradcheck(run, (value, bias, weight), atol=1e-6, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (value, bias, weight), atol=1e-5, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize(
    "name", ["internal_coordinates", "molecule_coordinates", "coordinate_flow", "coordinate_flow_paper"]
)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_first_and_second_derivatives_of_whole_maps(case_of, name, direction):
    case = case_of(name)
    start = case.latent[:1] if direction == "forward" else case.forward(case.latent[:1]).value
    run = getattr(case, direction)
    start = start.detach().requires_grad_(True)
    assert torch.autograd.gradcheck(run, (start,), atol=1e-5, rtol=1e-4, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (start,), atol=1e-4, rtol=1e-3, fast_mode=True)


GRIDS = {
    "affine": (-50.0, 50.0),
    "sinh_arcsinh": (-50.0, 50.0),
    "circular_bumps": (-1.5, 1.5),
    "circular_bumps_steep": (-1.5, 1.5),
    "interval_bumps": (0.0, 1.0),
    "interval_bumps_steep": (0.0, 1.0),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("scale", [1.0, 6.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_transforms_increase_for_any_parameters(name, scale, dtype):
    """Grids are so coarse that neighbours differ by more than rounding, even where the slope is least."""
    transform = ELEMENTWISE[name]()
    trials = 12
    parameters = scale * random(1, trials, transform.parameter_count, seed=int(scale), dtype=dtype)
    if "sinh" in name or name == "affine":
        parameters[..., 0] /= scale  # a shift far beyond the grid would only test the rounding of the shift
    count = 20_001 if dtype == torch.float64 else 201
    grid = torch.linspace(*GRIDS[name], count, dtype=dtype)[:, None].expand(-1, trials)
    value, log_slope = transform.inverse(grid, parameters.expand(count, -1, -1))
    assert torch.isfinite(log_slope).all()
    assert torch.all(torch.diff(value, dim=0) > 0)
    latent = value[:: count // 200]
    root, root_log_slope = transform.forward(latent, parameters.expand(len(latent), -1, -1))
    # where the map is flat, rounding of the value moves the root by that much over the slope
    rounding = 40 * torch.finfo(dtype).eps * (1 + value.abs()[:: count // 200])
    off_by = (root - grid[:: count // 200]).abs()
    assert torch.all(off_by <= rounding * (1 + grid.abs()[:: count // 200] + torch.exp(root_log_slope)))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_densities_integrate_to_one(name):
    transform = ELEMENTWISE[name]()
    trials = 8
    parameters = 2.0 * random(1, trials, transform.parameter_count, seed=31)
    if "bumps" in name:
        step = 1.0 / 20_000
        grid = torch.arange(0, 20_001, dtype=torch.float64)[:, None] * step
        value, log_slope = transform.inverse(grid.expand(-1, trials), parameters.expand(20_001, -1, -1))
        assert torch.allclose(value[-1] - value[0], torch.ones(trials, dtype=torch.float64), atol=1e-13)
        density, jacobian = log_slope.exp(), torch.full_like(grid, step)
        if name.startswith("interval"):
            assert torch.allclose(value[0], torch.zeros(trials, dtype=torch.float64), atol=1e-15)
    else:
        t = torch.linspace(-12.0, 12.0, 20_001, dtype=torch.float64)[:, None]
        grid, jacobian = t.sinh(), t.cosh() * (24.0 / 20_000)
        value, log_slope = transform.inverse(grid.expand(-1, trials), parameters.expand(20_001, -1, -1))
        density = torch.exp(-0.5 * value.square() + log_slope) / math.sqrt(2.0 * math.pi)
    assert torch.allclose(
        torch.trapezoid(density * jacobian, dim=0), torch.ones(trials, dtype=torch.float64), atol=1e-9
    )


def test_interval_maps_carry_a_normal_density_truncated_to_the_domain():
    fixed = IntervalMap(torch.tensor([0.0]), torch.tensor([1.0]))
    fixed.fit(np.array([[0.2], [0.5], [0.9], [0.4]]), np.zeros((4, 0)))
    grid = torch.linspace(0.0, 1.0, 2001, dtype=torch.float64)[:, None]
    value, log_slope = fixed.inverse(grid)
    assert float(value[0]) == pytest.approx(0.0, abs=1e-15)
    assert float(value[-1]) == pytest.approx(1.0, abs=1e-15)
    assert float(torch.trapezoid(log_slope.exp(), grid[:, 0])) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("deviation", [0.2, 0.02, 0.003])
def test_interval_maps_reach_the_ends_of_their_domain_and_no_further(deviation):
    """A float32 draw is exactly 0 once in 2^24 times, and a root near 1 may round to 1 + eps."""
    fixed = IntervalMap(torch.tensor([0.0]), torch.tensor([1.0]))
    fixed.mean.fill_(0.3)
    fixed.deviation.fill_(deviation)
    ends = torch.tensor([[0.0], [1.0], [-1e-7], [1.0 + 1.2e-7], [2.0**-24], [1.0 - 2.0**-24], [0.5]]).requires_grad_(
        True
    )
    value, log_det = fixed.forward(ends)
    (slope,) = torch.autograd.grad(value.sum() + log_det.sum(), ends)
    assert torch.isfinite(value).all()
    assert torch.isfinite(log_det).all()
    assert torch.isfinite(slope).all()
    assert torch.all((value > -1e-15) & (value < 1.0 + 1e-15))
    if deviation > 0.01:
        assert float(value[0].detach()) == pytest.approx(0.0, abs=1e-15)
    assert float(value[4].detach()) < float(value[6].detach()) < float(value[5].detach())
    with pytest.raises(ConfigurationError, match="1 values lie outside"):
        fixed.forward(torch.tensor([[0.5], [1.01]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_roots_of_interval_mixtures_stay_in_the_interval(dtype):
    bumps = IntervalBumps(5, minimum_identity=1e-4, learn_steepness=True)
    parameters = 3.0 * random(1, 400, bumps.parameter_count, dtype=dtype)
    epsilon = torch.finfo(dtype).eps
    ends = torch.tensor([0.0, epsilon / 2, 1.0 - epsilon / 2, 1.0], dtype=dtype)[:, None].expand(-1, 400)
    root, _ = bumps.forward(ends, parameters.expand(4, -1, -1))
    assert torch.all((root >= 0.0) & (root <= 1.0))
    assert torch.all(root[0] <= 4 * epsilon)


def test_whitening_takes_out_torsions_scales_and_correlations():
    features = FourierFeatures(2, 2)(uniform(4000, 2, seed=1)).numpy()
    noise = correlated(4000, 5)
    data = 3.0 + noise + features @ (random(8, 5, seed=2).numpy() * noise.std(0))
    fixed = WhitenedMap(5, 8)
    fixed.fit(data, features)
    latent = fixed.inverse(torch.as_tensor(data), torch.as_tensor(features)).value.numpy()
    np.testing.assert_allclose(np.cov(latent, rowvar=False), np.eye(5), atol=1e-6)
    np.testing.assert_allclose(latent.mean(0), 0.0, atol=1e-9)
    dependence = np.corrcoef(features.T, latent.T)[:8, 8:]
    assert np.abs(dependence).max() < 0.01  # the ridge leaves a few thousandths
    assert np.abs(np.corrcoef(features.T, data.T)[:8, 8:]).max() > 0.3


def test_a_torsion_that_stayed_in_one_place_is_not_extrapolated():
    """Regression coefficients of features that hardly vary would be noise over their tiny variation."""
    turns = 0.3 + 1e-4 * random(400, 1)
    features = FourierFeatures(1, 3)(turns).numpy()
    data = 0.01 * random(400, 3, seed=1).numpy()
    fixed = WhitenedMap(3, 6)
    fixed.fit(data, features)
    elsewhere = FourierFeatures(1, 3)(uniform(100, 1)).double()
    latent, _ = fixed.inverse(torch.zeros(100, 3, dtype=torch.float64), elsewhere)
    assert float(latent.abs().max()) < 1.0


@pytest.mark.parametrize("kind", ["whitened", "interval"])
def test_a_coordinate_that_does_not_move_is_refused(kind):
    data = 0.5 + 0.01 * random(200, 3).numpy()
    data[:, 1] = 0.5
    fixed = WhitenedMap(3, 0) if kind == "whitened" else IntervalMap(torch.zeros(3), torch.ones(3))
    with pytest.raises(ConfigurationError, match="coordinate 1"):
        fixed.fit(data, np.zeros((200, 0)))


def test_fits_that_cannot_work_say_why():
    with pytest.raises(ConfigurationError, match="at least 14 frames, got 10"):
        WhitenedMap(4, 2).fit(correlated(10, 4), uniform(10, 2).numpy())
    with pytest.raises(ConfigurationError, match=r"stiff coordinate 0 ranges over .* outside its domain"):
        IntervalMap(torch.zeros(1), torch.ones(1)).fit(np.array([[0.5], [1.2]]), np.zeros((2, 0)))


def test_inverse_hyperbolic_sine():
    """One logarithm instead of two, and its own derivative: the values and derivatives of torch.asinh, both signs, zero too."""
    values = torch.tensor([-1e6, -30.0, -1.0, -1e-3, 0.0, 1e-9, 0.5, 4.0, 1e8], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(_arcsinh(values), torch.asinh(values), rtol=1e-14, atol=1e-16)
    for order in (1, 2):
        ours, usual = _arcsinh(values), torch.asinh(values)
        for _ in range(order):
            (ours,) = torch.autograd.grad(ours.sum(), values, create_graph=True)
            (usual,) = torch.autograd.grad(usual.sum(), values, create_graph=True)
        torch.testing.assert_close(ours, usual, rtol=1e-12, atol=1e-18)
    moderate = torch.linspace(-3.0, 3.0, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(_arcsinh, (moderate,))
