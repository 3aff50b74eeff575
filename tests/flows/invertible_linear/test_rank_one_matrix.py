"""Matrices with perturbations of rank one: what they track is what a direct computation gives."""

import math

import pytest
import torch

from flowbridge.core.errors import ConfigurationError, ConvergenceError, SingularMatrixError
from flowbridge.flows.transforms.linear_layer import InvertibleLinear
from flowbridge.flows.transforms.rank_one_matrix import MergeLimits, RankOneMatrix

DOUBLE = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def perturbed(size=6, seed=0, share=0.3):
    matrix = RankOneMatrix(
        size, seed, matrix=torch.eye(size, dtype=DOUBLE) + 0.3 * normal(size, size, seed=9), dtype=DOUBLE
    )
    with torch.no_grad():
        matrix.u.copy_(share * normal(size, seed=seed + 1))
    return matrix


def test_products_solutions_and_determinant_are_those_of_the_dense_matrix():
    matrix, x = perturbed(), normal(10, 6, seed=3)
    dense = matrix.dense()
    sign, log_det = torch.linalg.slogdet(dense)
    torch.testing.assert_close(matrix.multiply(x), x @ dense.T)
    torch.testing.assert_close(matrix.solve(x), torch.linalg.solve(dense, x.T).T)
    torch.testing.assert_close(matrix.log_abs_det(), log_det)
    assert matrix.sign() == int(sign)


def test_gradients_are_those_of_the_dense_matrix():
    matrix, x = perturbed(), normal(10, 6, seed=3)

    def loss_of(product, solution, log_det):
        return product.sin().sum() + solution.cos().sum() + 3.0 * log_det

    tracked = loss_of(matrix.multiply(x), matrix.solve(x), matrix.log_abs_det())
    dense = matrix.dense()
    direct = loss_of(x @ dense.T, torch.linalg.solve(dense, x.T).T, torch.linalg.slogdet(dense)[1])
    wanted = torch.autograd.grad(direct, (matrix.u, matrix.v))
    for found, expected in zip(torch.autograd.grad(tracked, (matrix.u, matrix.v)), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_layer_is_a_bijection_whose_volume_is_that_of_its_jacobian():
    layer = InvertibleLinear(4, seed=2, matrix=torch.eye(4, dtype=DOUBLE).flip(0), dtype=DOUBLE)
    with torch.no_grad():
        layer.weight.u.copy_(0.4 * normal(4, seed=1))
        layer.bias.copy_(normal(4, seed=2))
    x = normal(5, 4, seed=3)
    y, log_det = layer(x)
    back, inverse_log_det = layer.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_log_det, -log_det)
    jacobian = torch.func.jacrev(lambda value: layer(value[None]).value[0])(x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[0])


def test_merging_changes_the_bookkeeping_and_not_the_function():
    matrix, x = perturbed(), normal(10, 6, seed=3)
    before, log_det, sign = matrix.dense().detach(), matrix.log_abs_det().detach(), matrix.sign()
    v = matrix.v.detach().clone()
    assert matrix.merge()
    torch.testing.assert_close(matrix.matrix, before)
    torch.testing.assert_close(matrix.inverse, torch.linalg.inv(before))
    torch.testing.assert_close(matrix.log_det, log_det)
    torch.testing.assert_close(matrix.solve(x), torch.linalg.solve(before, x.T).T)
    assert matrix.sign() == sign
    assert not bool(matrix.u.any())
    assert not torch.allclose(matrix.v, v)
    assert matrix.u.grad is None


@pytest.mark.parametrize("size", [5, 24])
def test_inverse_and_determinant_hold_over_thousands_of_updates(size):
    """The benchmark makes 100 000 of larger ones; here the ordinary rounding of 4000 is already seen, and removed."""
    matrix = RankOneMatrix(size, 1, dtype=DOUBLE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        with torch.no_grad():
            matrix.u.copy_(0.1 / math.sqrt(size) * torch.randn(size, generator=generator, dtype=DOUBLE))
        if matrix.merge() and int(matrix.merges) % 50 == 0:
            matrix.correct_inverse()
    assert int(matrix.merges) > 3500
    sign, log_det = torch.linalg.slogdet(matrix.dense())
    assert abs(float(matrix.log_abs_det().detach() - log_det)) < 1e-9
    assert matrix.sign() == int(sign)
    assert float((matrix.inverse @ matrix.matrix - torch.eye(size, dtype=DOUBLE)).abs().max()) < 1e-9


def test_correction_squares_the_residual_and_falls_back_on_a_direct_inverse():
    for size_of_error in (1e-5, 1e-2, 10.0):
        matrix = perturbed(12)
        matrix.merge()
        matrix.inverse.add_(size_of_error * normal(12, 12, seed=4))
        assert matrix.correct_inverse() > 0.1 * size_of_error
        torch.testing.assert_close(matrix.inverse, torch.linalg.inv(matrix.matrix), rtol=1e-11, atol=1e-11)
    assert matrix.correct_inverse() < 1e-12


def singular():
    """A perturbation that takes the identity to a matrix of rank n - 1, and nearly."""
    matrix = RankOneMatrix(3, 0, dtype=DOUBLE)
    with torch.no_grad():
        matrix.v.copy_(torch.tensor([1.0, 0.0, 0.0]))
        matrix.u.copy_(torch.tensor([-1.0, 0.0, 0.0]))
    return matrix


def test_what_would_make_the_matrix_singular_is_not_merged():
    matrix = singular()
    assert not matrix.merge()
    with pytest.raises(SingularMatrixError, match="cannot be inverted"):
        matrix.merge_directly()
    torch.testing.assert_close(matrix.matrix, torch.eye(3, dtype=DOUBLE))
    with torch.no_grad():
        matrix.u[0] = -1.0 + 1e-5
    assert not matrix.merge()
    matrix.merge_directly()
    assert float(matrix.log_det) == pytest.approx(math.log(1e-5))
    torch.testing.assert_close(matrix.inverse[0, 0], torch.tensor(1e5, dtype=DOUBLE))


def test_determinant_bounds_and_their_penalty():
    matrix, limits = RankOneMatrix(2, 0, dtype=DOUBLE), MergeLimits(log_det=(-1.0, 1.0))
    with torch.no_grad():
        matrix.v.copy_(torch.tensor([1.0, 0.0]))
        matrix.u.copy_(torch.tensor([math.e**1.4 - 1.0, 0.0]))
    assert float(matrix.penalty(limits).detach()) == pytest.approx(0.1 * 0.4**2)
    (pull,) = torch.autograd.grad(matrix.penalty(limits), matrix.u)
    assert float(pull[0]) > 0.0  # downhill is a smaller determinant
    assert float(matrix.penalty(MergeLimits()).detach()) == 0.0
    assert matrix.merge(limits)  # within the half that is left
    with torch.no_grad():
        matrix.v.copy_(torch.tensor([1.0, 0.0]))
        matrix.u.copy_(torch.tensor([1.0, 0.0]))
    assert not matrix.merge(limits)


def test_a_step_over_zero_is_noticed_in_the_sign():
    matrix = RankOneMatrix(2, 0, dtype=DOUBLE)
    with torch.no_grad():
        matrix.v.copy_(torch.tensor([1.0, 0.0]))
        matrix.u.copy_(torch.tensor([-3.0, 0.0]))
    assert matrix.sign() == -1
    assert matrix.merge()
    assert matrix.sign() == -1
    assert float(matrix.log_det) == pytest.approx(math.log(2.0))


def test_divergence_and_bad_matrices_are_errors():
    matrix = RankOneMatrix(2, 0)
    with torch.no_grad():
        matrix.u[0] = torch.nan
    with pytest.raises(ConvergenceError, match="diverged"):
        matrix.merge()
    with pytest.raises(SingularMatrixError):
        RankOneMatrix(2, 0, matrix=torch.zeros(2, 2))
    with pytest.raises(ConfigurationError, match=r"must be \(2, 2\)"):
        RankOneMatrix(2, 0, matrix=torch.eye(3))
    with pytest.raises(ConfigurationError, match="range"):
        MergeLimits(log_det=(1.0, 1.0))


def test_evaluation_merges_once_and_training_mode_does_not():
    matrix = perturbed()
    before, merges = matrix.dense().detach(), int(matrix.merges)
    matrix.train()
    assert int(matrix.merges) == merges
    matrix.eval()
    matrix.eval()
    assert int(matrix.merges) == merges + 1
    torch.testing.assert_close(matrix.matrix, before)


def test_a_singular_perturbation_is_left_alone_by_evaluation():
    matrix = singular()
    matrix.eval()
    assert int(matrix.merges) == 0
    assert float(matrix.u[0]) == -1.0


def test_held_back_perturbations_keep_sign_and_condition():
    """A random walk that would cross the singular matrices again and again stays on its side, and well conditioned."""
    matrix, limits = RankOneMatrix(6, 1, dtype=DOUBLE), MergeLimits(condition=300.0)
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(1500):
        with torch.no_grad():
            matrix.u.copy_(0.5 * torch.randn(6, generator=generator, dtype=DOUBLE))
        norm = float(torch.linalg.vector_norm(matrix.matrix))
        before = float(torch.linalg.vector_norm(matrix.inverse))
        if matrix.hold_back(limits):
            held += 1
        after = float(torch.linalg.vector_norm(torch.linalg.inv(matrix.dense())))
        assert after < max(300.0 / norm, before) * (1.0 + 1e-9)
        assert matrix.sign() == 1
        matrix.merge(limits)
    assert held > 50
    sign, log_det = torch.linalg.slogdet(matrix.matrix)
    assert int(sign) == 1
    assert abs(float(matrix.log_det - log_det)) < 1e-10


def test_as_little_is_held_back_as_the_condition_asks_for():
    matrix, limits = RankOneMatrix(4, 0, dtype=DOUBLE), MergeLimits(log_factor=(-12.0, 15.0), condition=50.0)
    with torch.no_grad():
        matrix.u.copy_(-matrix.v / matrix.v.square().sum() * 0.999)
    assert matrix.hold_back(limits)
    largest = 50.0 / float(torch.linalg.vector_norm(matrix.matrix))
    assert float(torch.linalg.vector_norm(torch.linalg.inv(matrix.dense()))) == pytest.approx(largest)
    assert not matrix.hold_back(MergeLimits(log_factor=(-12.0, 15.0), condition=50.1))


def test_a_spoiled_inverse_is_repaired_before_it_spoils_the_determinant():
    matrix = perturbed(8)
    matrix.inverse.add_(1e-6 * normal(8, 8, seed=4))
    dense = matrix.dense().detach()
    assert matrix.merge()
    assert abs(float(matrix.log_det - torch.linalg.slogdet(dense)[1])) < 1e-12
    with pytest.raises(ConfigurationError, match="more than 1"):
        MergeLimits(condition=0.5)
