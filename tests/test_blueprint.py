"""Networks built to be filled: on the meta device, without values, while garbage collection pauses."""

import gc

import pytest
import torch
from torch import nn

from mrflow.checkpoints.blueprint import blueprint, pause_collection


def test_nothing_is_initialised_and_nothing_collected() -> None:
    drawn: list[str] = []

    class Loud(nn.Linear):
        def reset_parameters(self) -> None:
            drawn.append("reset")
            before = torch.get_rng_state()
            super().reset_parameters()
            assert torch.equal(torch.get_rng_state(), before)
            assert not gc.isenabled()

    with blueprint():
        net = Loud(3, 5)
        norm = nn.GroupNorm(1, 4)
    assert drawn == ["reset"]
    assert {p.device.type for p in (*net.parameters(), *norm.parameters())} == {"meta"}
    assert net.weight.shape == (5, 3) and isinstance(net.weight, nn.Parameter)
    assert gc.isenabled()


def test_initialisation_leaves_values_alone_inside_and_works_again_outside() -> None:
    given = torch.full((4, 4), 7.0)
    with blueprint():
        assert nn.init.kaiming_uniform_(given) is given
        assert nn.init.uniform_(given, -1, 1) is given
        nn.init.normal_(tensor=given)
    assert (given == 7).all()
    nn.init.normal_(given)
    assert (given != 7).all()


@pytest.mark.parametrize("was", [True, False])
def test_collection_is_left_as_it_was(was: bool) -> None:
    (gc.enable if was else gc.disable)()
    try:
        with pytest.raises(KeyError), pause_collection():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is was
    finally:
        gc.enable()
