"""Weights that don't divide over the mesh are said, with the mesh that divides them."""

import jax
import pytest

from capvl.models.parameters import Blueprint
from capvl.parallel.rules import MESH_AXES, fsdp_advice


@pytest.fixture(scope="module")
def blueprint():
    from capvl.models.captioner import CaptionerOptions

    return Blueprint(CaptionerOptions(encoder="w48d2h2m96/16", res=32, decoder_layers=1, vocab=64, length=8))


def advice(blueprint, replica, fsdp, tensor=1):
    mesh = jax.sharding.AbstractMesh((replica, fsdp, tensor), MESH_AXES)
    return fsdp_advice(blueprint.axes, blueprint.shapes, mesh)


def test_a_width_that_divides_needs_no_advice(blueprint):
    for fsdp in (1, 2, 4, 8, 16):
        assert advice(blueprint, 1, fsdp) == ""


def test_a_width_that_does_not_divide_gets_the_mesh_that_does(blueprint):
    found = advice(blueprint, 2, 32)
    assert "doesn't divide by mesh.fsdp=32 are whole on every device" in found
    assert "--config.mesh.replica=4 --config.mesh.fsdp=16 divides all of them" in found
    assert "--config.mesh.replica=5 --config.mesh.fsdp=1 divides" in advice(blueprint, 1, 5)
