"""Few rows in blocks: the same products, on plain layers only, and only for a while.

Tolerance 1e-5 of the largest entry: float32 sums of 512 products in another order.
"""

import pytest
import torch
from torch import nn

from eve_vlm.serve import narrow_products as blocks
from eve_vlm.serve.narrow_products import narrow_products


def layers():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "plain": nn.Linear(512, 1024),
            "without": nn.Linear(512, 1024, bias=False),
            "small": nn.Linear(512, 64),
            "odd": nn.Linear(512, 1000),
            "rounded": nn.Linear(512, 1024).to(torch.bfloat16),
        }
    ).requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 12, 13, 40])
def test_products_are_the_same(rows, monkeypatch):
    found, wide = layers(), []
    x = torch.randn(rows, 1, 512)
    expected = {name: found[name](x) for name in ("plain", "without", "small", "odd")}
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *given: wide.append(1) or product(*given))
    with narrow_products(found):
        for name, other in expected.items():
            made = found[name](x)
            assert made.shape == other.shape
            assert (made - other).abs().max() < 1e-5 * other.abs().max(), name
    few = blocks.LEAST <= rows <= blocks.MOST
    assert len(wide) == (2 if few else 0)  # the two large ones


def test_it_ends_and_leaves_others_alone():
    found = layers()
    with pytest.raises(RuntimeError), narrow_products(found):
        changed = {name for name, layer in found.items() if "forward" in vars(layer)}
        raise RuntimeError
    assert changed == {"plain", "without"}
    assert not any("forward" in vars(layer) for layer in found.values())


def test_a_leg_of_a_running_batch_uses_it(monkeypatch):
    """And gives the tokens that it gave without."""
    import tiny
    from eve_vlm.serve.messages import Prompt
    from eve_vlm.serve.reply import Reply
    from eve_vlm.serve.running_batch import RunningBatch
    from eve_vlm.serve.sampling import Sampling

    monkeypatch.setattr(blocks, "SMALLEST", 1)
    monkeypatch.setattr(blocks, "BLOCK", 4)
    model, tokenizer, answers, wide = tiny.model(), tiny.tokenizer(), [], []
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *given: wide.append(1) or product(*given))
    for most in (0, blocks.MOST):
        monkeypatch.setattr(blocks, "MOST", most)
        replies = [
            Reply(
                Prompt(torch.arange(5, 9 + index), None, None, ()),
                Sampling(max_new_tokens=6),
                tokenizer,
                device=torch.device("cpu"),
            )
            for index in range(4)
        ]
        batch = RunningBatch(model, size=4)
        batch.add(replies)
        with torch.no_grad():
            batch.run()
        assert bool(wide) == (most > 0)
        answers.append([reply.token_ids for reply in replies])
    assert answers[0] == answers[1] and all(len(one) == 6 for one in answers[0])
