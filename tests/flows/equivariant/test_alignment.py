"""Pairs of prior points and samples, brought together."""

import pytest
import torch

from flowbridge.core.errors import ConfigurationError
from flowbridge.flows.equivariant.alignment import aligned_to, couple, permuted_to, rotated_to


def clouds(count: int, particles: int = 6, dimension: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, particles, dimension, generator=generator, dtype=torch.float64)
    return x - x.mean(1, keepdim=True)


def distance(a, b):
    return (a - b).square().sum((1, 2))


@pytest.mark.parametrize("dimension", [2, 3])
def test_rotations_and_reflections_are_undone(dimension):
    x = clouds(8, dimension=dimension)
    rotation, _ = torch.linalg.qr(clouds(8, dimension, dimension, seed=1))
    torch.testing.assert_close(rotated_to(x, x @ rotation), x)


def test_permutations_are_undone():
    x = clouds(8)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(permuted_to(x, x[:, order]), x)


def test_small_turns_with_permutations_are_undone():
    x = clouds(8)
    turn = torch.matrix_exp(torch.tensor([[0.0, 0.1, -0.05], [-0.1, 0.0, 0.08], [0.05, -0.08, 0.0]]).double())
    torch.testing.assert_close(aligned_to(x, x[:, [3, 2, 1, 0, 5, 4]] @ turn), x)


def test_no_permutation_is_nearer():
    """All permutations of four particles by brute force."""
    from itertools import permutations

    a, b = clouds(5, 4), clouds(5, 4, seed=1)
    best = torch.stack([distance(a, b[:, list(order)]) for order in permutations(range(4))]).amin(0)
    torch.testing.assert_close(distance(a, permuted_to(a, b)), best)


def test_no_rotation_is_nearer():
    a, b = clouds(5), clouds(5, seed=1)
    best = distance(a, rotated_to(a, b))
    for seed in range(50):
        rotation, _ = torch.linalg.qr(clouds(5, 3, 3, seed=seed))
        assert (distance(a, b @ rotation) >= best).all()


def test_coupling_shortens_lines_and_keeps_samples():
    start, end = clouds(32), clouds(32, seed=1)
    alone, together = couple(start, end, 1), couple(start, end, 8)
    assert torch.equal(together.start, start)
    assert distance(*alone).mean() < 0.7 * distance(start, end).mean()
    assert distance(*together).mean() < distance(*alone).mean()
    # Each sample is used once: sorted distances from the centre know a configuration up to its symmetries.
    radii = [part.norm(dim=-1).sort(1).values.view(4, 8, 6) for part in (end, together.end)]
    for before, after in zip(*radii, strict=True):
        assert (torch.cdist(before, after) < 1e-9).sum(0).tolist() == [1] * 8


def test_hostile_input():
    with pytest.raises(ConfigurationError, match="divide"):
        couple(clouds(10), clouds(10), 4)
    with pytest.raises(ValueError, match="shape"):
        couple(clouds(10), clouds(9), 1)
    with pytest.raises(ConfigurationError, match="round"):
        aligned_to(clouds(2), clouds(2), 0)
