"""Every registered transform keeps the contract, and breaking it is noticed."""

import pytest
import torch

from flowbridge.core.errors import ConfigurationError
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.transforms.bijection import ElementwiseTransform, Transformed
from flowbridge.flows.transforms.registry import TRANSFORMS, find_transform
from flowbridge.flows.transforms.sinh_arcsinh import Affine
from flowbridge.testing import ConformanceError, check_transform


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_registered_transforms_keep_the_contract(name, seed):
    registered = TRANSFORMS[name]
    assert check_transform(registered.make(5), registered.domain, seed).passed


class WrongSlope(Affine):
    def inverse(self, value, parameters):
        mapped, log_slope = super().inverse(value, parameters)
        return Transformed(mapped, 0.99 * log_slope)


class Decreasing(ElementwiseTransform):
    parameter_count = 1

    def inverse(self, value, parameters):
        return Transformed(-value, torch.zeros_like(value))

    forward = inverse


class KinkedAtTheMiddle(Affine):
    """Its first derivatives are right everywhere, its second by the values are missing."""

    def inverse(self, value, parameters):
        mapped, log_slope = super().inverse(value, parameters)
        return Transformed(mapped, log_slope + 0.1 * value.detach())


@pytest.mark.parametrize(
    ("transform", "failed"),
    [
        (WrongSlope(), "slopes of data to latent"),
        (Decreasing(), "data to latent increases"),
        (KinkedAtTheMiddle(), "slopes of data to latent"),
    ],
)
def test_what_breaks_the_contract_is_named(transform, failed):
    with pytest.raises(ConformanceError, match=failed):
        check_transform(transform)


def test_an_interval_has_to_be_mapped_onto_itself():
    with pytest.raises(ConformanceError, match="the interval is mapped onto itself"):
        check_transform(Affine(), "interval")


def test_a_name_that_is_not_registered():
    with pytest.raises(ConfigurationError, match="no transform 'sinh' is registered, there are affine, sinh_arcs"):
        find_transform("sinh")
    with pytest.raises(ValueError, match="no transform 'sinh' is registered"):
        FlowConfiguration.model_validate({"stiff": {"transform": "sinh"}})
    with pytest.raises(ValueError, match="do not fit: whitened coordinates are for affine or sinh_arcsinh"):
        FlowConfiguration.model_validate({"stiff": {"transform": "bumps"}})
