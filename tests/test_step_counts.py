"""Speed without a clock: what a step counts is what was recorded, and no count grows by pictures.

A timed test on a shared machine tells its load.  These numbers change only when the code does, or
the library; whoever changes one on purpose records it again and says why in the commit.
"""

import json

import pytest
import torch

import step_counts
import tiny
from eve_vlm.patch_embedding_eve import on_device, on_host

RECORDED = json.loads(step_counts.FILE.read_text(encoding="utf-8"))
AGAIN = "if that is meant, record it: PYTHONPATH=tests python tests/step_counts.py"


@pytest.fixture(scope="module")
def counted():
    return step_counts.counts()


@pytest.mark.parametrize("name", list(RECORDED["steps"]))
def test_a_step_costs_what_was_recorded(counted, name):
    if counted["versions"] != RECORDED["versions"]:
        pytest.skip(f"recorded with {RECORDED['versions']}; other versions run other operations")
    assert counted["steps"][name] == RECORDED["steps"][name], AGAIN
    assert counted["steps"].keys() == RECORDED["steps"].keys()


def embedding_of(grids):
    model, pictures = tiny.model(tiny.config()), tiny.packed(grids)
    with torch.no_grad():
        return step_counts.count(lambda: model.model.vision_tower(**pictures))


def test_more_pictures_are_no_more_kernels():
    """A loop over pictures, rows or cells would be."""
    two, many = (embedding_of([(4, 4), (2, 3)] * times) for times in (1, 8))
    assert two["kernels"] == many["kernels"] and two["waits"] == many["waits"]
    assert many["bytes"] < 8 * two["bytes"]  # nothing that grows faster than the pictures


def test_the_counter_counts():
    left, right = torch.ones(4, 8), torch.ones(8, 2)

    def step():
        product = left @ right  # 4 x 2 float32 values, 2 * 4 * 8 * 2 operations
        product += 1  # no new bytes
        chosen = product[product > 0]  # a mask, then as many values as there are
        return float(chosen.view(-1)[0])

    found = step_counts.count(step)
    assert found["flops"] == 128 and found["kernels"] == 5
    assert found["bytes"] == 32 + 8 + 32
    assert found["waits"] == {"_local_scalar_dense": 1, "index": 1}


def test_what_was_copied_to_the_host_waits_for_nothing_more():
    values = torch.tensor([2, 0, 1])

    def step():
        here = on_host(values)  # the one wait
        owner = torch.arange(3).repeat_interleave(here)
        assert int(here.sum()) == 3 and owner.tolist() == [0, 0, 2]
        (there,) = on_device(values.device, owner)
        return int(there.sum())  # on the device again, so another one

    found = step_counts.count(step)
    assert found["waits"] == {"_local_scalar_dense": 1, "_to_copy": 1}


def test_indices_travel_together_and_arrive_as_they_were():
    sent = torch.arange(6).view(2, 3), torch.empty(0, dtype=torch.long), torch.tensor([7])
    came = on_device(torch.device("cpu"), *sent)
    assert all(torch.equal(one, other) for one, other in zip(sent, came, strict=True))
