"""Compiled gradients and samples against the same functions with torch, where they were not recorded."""

import pytest
import torch
from torch import Tensor

from flowbridge.core.cache import Cache, cache_folder
from flowbridge.core.compilation.programs import PROGRAMS
from flowbridge.core.errors import CompilationError, ConfigurationError, ConvergenceError
from flowbridge.flows.boltzmann import compiled_functions
from flowbridge.flows.boltzmann.compiled_functions import CompiledFlowFunction, CompiledSampling
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.coordinate_flow import CoordinateFlow
from flowbridge.flows.boltzmann.training.compiled_gradients import GradientEvaluator, compilation_of, with_gradients
from flowbridge.flows.boltzmann.training.configuration import TrainingConfiguration
from flowbridge.flows.boltzmann.training.objectives import path_gradients
from flowbridge.flows.transforms.rank_one_matrix import rank_one_matrices
from flowbridge.flows.transforms.root_finding import bounded_iterations, solve_increasing

TINY = {
    "circular": "soft",
    "torsions": {"couplings": 1, "components": 3, "hidden": [4], "learn_steepness": True},
    "stiff": {"couplings": 2, "hidden": [4], "mixing": "rank_one"},
}
BATCH = 20


def fresh(generator_of, seed: int = 3) -> CoordinateFlow:
    flow = generator_of("CO", FlowConfiguration.model_validate(TINY)).flow
    moved(flow, seed)
    return flow


def moved(flow: CoordinateFlow, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    for matrix in rank_one_matrices(flow):
        assert matrix.merge()  # what is trained then acts on another matrix


def batch_of(flow: CoordinateFlow, seed: int) -> tuple[Tensor, ...]:
    """Return arguments of :func:`path_gradients`, one sample without an energy."""
    generator = torch.Generator().manual_seed(seed)
    latent = flow.sample_latent(BATCH, generator)
    with torch.no_grad():
        samples, _ = flow(latent)
        log_density = flow.log_prob(samples) + torch.randn(BATCH, generator=generator, dtype=flow.dtype)
    log_density[seed % BATCH] = torch.nan
    slopes = [torch.randn(part.shape, generator=generator, dtype=flow.dtype) for part in samples]
    numbers = torch.tensor(torch.nan if seed % 2 else 0.3), torch.tensor([0.2, 0.3, 0.5])
    return (*samples, log_density, *slopes, *(number.double() for number in numbers))


class Interpreted:
    """In the place of the program: the function that is compiled, evaluated by torch."""

    compiles = True

    def __init__(self, flow: CoordinateFlow) -> None:
        self.flow = flow

    def __call__(self, *latent: Tensor) -> tuple[Tensor, ...]:
        return compiled_functions.sampling(self.flow, *latent)


@pytest.fixture(scope="module")
def trained(generator_of):
    """A flow with the compiled path gradient and its compiled sampling."""
    flow = fresh(generator_of)
    gradients, sampling = GradientEvaluator(flow, path_gradients, "always"), CompiledSampling(flow, "always")
    gradients(*batch_of(flow, 0))
    sampling(flow.sample_latent(BATCH, torch.Generator().manual_seed(0)))
    return flow, gradients, sampling


def test_gradients_follow_the_parameters(trained):
    """The program was recorded at other parameters and other samples; results of earlier calls stay what they were."""
    flow, gradients, _ = trained
    pairs = []
    for seed in (1, 2, 3):
        moved(flow, seed)
        arguments = batch_of(flow, seed)
        pairs.append((gradients(*arguments), path_gradients(flow, *arguments)))
    for found, expected in pairs:
        assert torch.allclose(found.losses[0], expected.losses[0], rtol=1e-10, equal_nan=True)
        assert int(found.losses[0].isnan().sum()) == 1
        largest = max(float(slope.abs().max()) for slope in expected.by_parameter)
        assert largest > 1e-3
        for a, b in zip(found.by_parameter, expected.by_parameter, strict=True):
            assert float((a - b).abs().max()) <= 1e-10 * largest


def test_samples_are_those_of_torch(trained):
    flow, _, sampling = trained
    for seed in (1, 2):
        moved(flow, seed)
        latent = flow.sample_latent(BATCH, torch.Generator().manual_seed(seed))
        found = sampling(latent)
        with torch.no_grad():
            expected = flow(latent)
        difference = found.coordinates.circular - expected.coordinates.circular
        assert float((difference - difference.round()).abs().max()) < 1e-10
        assert torch.allclose(found.coordinates.stiff, expected.coordinates.stiff, atol=1e-10)
        assert torch.allclose(found.log_det, expected.log_det, atol=1e-9)


def test_roots_that_need_more_iterations_are_found_by_torch(generator_of, monkeypatch):
    """The function that is compiled says which samples it could not finish."""
    flow = fresh(generator_of)
    latent = flow.sample_latent(BATCH, torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = flow(latent)
    monkeypatch.setitem(compiled_functions.ITERATIONS, torch.float64, 5)
    *_, converged = compiled_functions.sampling(flow, *latent)
    assert 0 < int(converged.sum()) < BATCH
    sampling = CompiledSampling(flow, "always")
    sampling._sampling = Interpreted(flow)
    found = sampling(latent)
    assert torch.equal(found.coordinates.circular, expected.coordinates.circular)
    assert torch.allclose(found.log_det, expected.log_det, atol=1e-12)


def test_nothing_unfinished_comes_back(generator_of):
    flow = fresh(generator_of)
    sampling = CompiledSampling(flow, "always")
    sampling._sampling = Interpreted(flow)
    latent = flow.sample_latent(BATCH, torch.Generator().manual_seed(5))
    latent.circular[3, 0] = torch.nan
    with pytest.raises(ConvergenceError, match="NaN"):
        sampling(latent)


def test_bounded_iterations_give_the_same_roots_and_end_with_their_block():
    def cubic(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x**3 + parameters[:, 0] * x, 3 * x**2 + parameters[:, 0]

    target = torch.linspace(-2.0, 2.0, 30, dtype=torch.float64)
    parameters = torch.logspace(-3, 1, 30, dtype=torch.float64)[:, None]
    ends = torch.full_like(target, -3.0), torch.full_like(target, 3.0)
    expected = solve_increasing(cubic, target, parameters, *ends)
    with bounded_iterations(40) as bounded:
        assert torch.equal(solve_increasing(cubic, target, parameters, *ends), expected)
    assert bool(bounded.converged(10).all())
    with bounded_iterations(3) as bounded:
        solve_increasing(cubic, target, parameters, *ends)
    assert not bool(bounded.converged(30).all())
    assert torch.equal(solve_increasing(cubic, target, parameters, *ends), expected)


def test_another_flow_of_the_same_design_finds_the_program(trained, generator_of, capfd):
    flow = fresh(generator_of, seed=9)
    again = GradientEvaluator(flow, path_gradients, "cached")
    arguments = batch_of(flow, 4)
    found, expected = again(*arguments), path_gradients(flow, *arguments)
    assert "compiling" not in capfd.readouterr().err
    assert again._evaluate._programs
    assert all(again._evaluate._programs.values())
    assert torch.allclose(found.by_parameter[0], expected.by_parameter[0], rtol=1e-9, atol=1e-12)


def test_a_program_with_wrong_numbers_is_refused(trained, generator_of, monkeypatch, tmp_path):
    """A function that gives one thing to the recorder and another afterwards, as a miscompiled one would."""
    monkeypatch.setenv("FLOWBRIDGE_CACHE", str(tmp_path))
    calls = []

    def fickle(flow: CoordinateFlow, value: Tensor) -> tuple[Tensor, ...]:
        calls.append(1)
        return (value * (1.0 if len(calls) == 1 else 1.01) + sum(p.sum() for p in flow.parameters()),)

    with pytest.raises(CompilationError, match=r"results of fickle of a batch of 20 differ"):
        CompiledFlowFunction(trained[0], fickle, "always")(torch.ones(BATCH, dtype=torch.float64))
    assert not [entry for entry in Cache(cache_folder(PROGRAMS)).entries() if "failed with" not in entry.description]


def test_nothing_is_recorded_for_an_empty_cache(trained, monkeypatch, tmp_path):
    """Recording takes seconds, and a cache that has no program of that name and these shapes has not this one either."""
    monkeypatch.setenv("FLOWBRIDGE_CACHE", str(tmp_path))
    calls = []

    def counted(flow: CoordinateFlow, value: Tensor) -> tuple[Tensor, ...]:
        calls.append(1)
        return (2.0 * value,)

    function = CompiledFlowFunction(trained[0], counted, "cached")
    for _ in range(3):
        assert torch.equal(function(torch.ones(BATCH))[0], torch.full((BATCH,), 2.0))
    assert len(calls) == 3


def test_what_cannot_be_recorded(trained, monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWBRIDGE_CACHE", str(tmp_path))

    def deciding(flow: CoordinateFlow, value: Tensor) -> tuple[Tensor, ...]:
        return (value if value.sum().item() > 0 else -value,)

    value = torch.ones(BATCH, dtype=torch.float64)
    monkeypatch.delenv("FLOWBRIDGE_COMPILE", raising=False)
    with pytest.warns(
        UserWarning, match="going on without compiled code.*deciding of a batch of 20 cannot be recorded"
    ):
        (found,) = CompiledFlowFunction(trained[0], deciding, "auto")(value)
    assert torch.equal(found, value)
    with pytest.raises(CompilationError):
        CompiledFlowFunction(trained[0], deciding, "always")(value)
    with pytest.raises(ConfigurationError, match="compilation must be one of"):
        CompiledFlowFunction(trained[0], deciding, "sometimes")


def test_given_gradients_reach_the_optimiser(trained):
    flow = trained[0]
    slopes = tuple(torch.full_like(parameter, float(number)) for number, parameter in enumerate(flow.parameters()))
    flow.zero_grad()
    loss = with_gradients(torch.tensor(2.5), flow, slopes)
    (3.0 * loss).backward()
    assert float(loss.detach()) == 2.5
    for parameter, slope in zip(flow.parameters(), slopes, strict=True):
        assert torch.equal(parameter.grad, 3.0 * slope)
    flow.zero_grad()


@pytest.mark.parametrize(
    ("compilation", "environment", "steps", "expected"),
    [
        ("auto", None, 1000, "never"),
        ("auto", None, 7000, "auto"),
        ("auto", "never", 7000, "never"),
        ("auto", "always", 10, "always"),
        ("always", "never", 10, "always"),
        ("cached", None, 10, "cached"),
    ],
)
def test_long_stages_are_compiled(monkeypatch, compilation, environment, steps, expected):
    monkeypatch.delenv("FLOWBRIDGE_COMPILE", raising=False)
    if environment:
        monkeypatch.setenv("FLOWBRIDGE_COMPILE", environment)
    settings = TrainingConfiguration.model_validate({"compilation": compilation})
    assert compilation_of(settings.compilation, steps) == expected
