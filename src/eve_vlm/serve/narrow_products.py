"""Products of a few rows with large matrices, in blocks: what decoding on a CPU spends its time on.

For one row a product reads the matrix at the rate of the memory.  For three to a dozen rows the
library underneath (MKL) lays the matrix out anew at every call, which takes longer than the
product.  As a batch of small products, over the same memory, nothing is laid out: 8 rows of a 135M
decoder read 8.2 GB/s instead of 5.4, its head 8.6 instead of 3.7 (one thread).  No weight is
copied.

Easy to get wrong: the sums of a row come in another order than for 1 or 20 rows, so the last bits
of a row's logits depend on how many rows there are, as they always did.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

BLOCK = 64  # rows of a matrix in one small product
LEAST, MOST = 3, 12  # rows for which it is faster
SMALLEST = 2**18  # numbers in a matrix: smaller ones stay in the processor's caches


@contextmanager
def narrow_products(model: nn.Module) -> Iterator[None]:
    """Lets plain linear layers of a model take few rows in blocks for a while.

    Other classes of layers, and other numbers than float32 on a CPU, are left as they are.
    """
    layers = [
        module for module in model.modules() if isinstance(module, nn.Linear) and _gains(module)
    ]
    for layer in layers:
        vars(layer)["forward"] = _in_blocks(layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _gains(module: nn.Linear) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    large = weight.numel() >= SMALLEST and weight.shape[0] % BLOCK == 0
    return large and weight.dtype == torch.float32 and weight.is_cpu and weight.is_contiguous()


def _in_blocks(layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias = layer.weight, layer.bias
    wanted, given = weight.shape
    blocks = (
        weight.detach().view(-1, BLOCK, given).transpose(1, 2)
    )  # (wanted / BLOCK, given, BLOCK)

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // given
        if not LEAST <= rows <= MOST or x.dtype != torch.float32:
            return F.linear(x, weight, bias)
        few = x.reshape(1, rows, given).expand(len(blocks), -1, -1)
        made = torch.bmm(few, blocks).transpose(0, 1).reshape(*x.shape[:-1], wanted)
        return made if bias is None else made + bias

    return forward


__all__ = ["narrow_products"]
