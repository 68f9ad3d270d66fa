"""What a step costs in numbers that no clock disturbs: products, kernels, bytes, waits.

Counted on tiny models by a dispatch mode, which sees every operation that torch runs, backward and
fused ones too.  `PYTHONPATH=tests python tests/step_counts.py` records them in `tests/goldens/step_counts.json`.
Easy to get wrong: on a CPU nothing waits for a device, so waits are counted as the operations that
would make a GPU's host wait: values read by Python, shapes that depend on values, and copies to the
host.  What is computed from such a copy stays on the host and waits for nothing, until it is copied
to the device again; the model makes both copies on a CPU, too (`on_host`, `on_device`).
"""

import json
from collections import Counter
from pathlib import Path

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

import tiny
from eve_vlm import record_attention

FILE = Path(__file__).parent / "goldens" / "step_counts.json"
# Ask for a value on the host, or for a shape that values decide.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "item")
WAITS += ("masked_scatter_backward", "unique_dim", "unique_consecutive", "is_nonzero")
NO_KERNEL = ("view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select")
NO_KERNEL += ("unsqueeze", "squeeze", "split", "split_with_sizes", "detach", "alias", "unbind")


class Counted(TorchDispatchMode):
    """Counts kernels, waits and bytes of new tensors."""

    def __init__(self):
        super().__init__()
        self.kernels, self.waits, self.bytes = 0, Counter(), 0
        self.on_host = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        here = any(one in self.on_host for one in tensors(args, kwargs))
        moved = name == "_to_copy" and kwargs.get("device") and out.dtype == args[0].dtype
        at_once = moved and not kwargs.get("non_blocking")
        to_host = at_once and kwargs["device"].type == "cpu"
        if to_host or (here and not moved):
            self.on_host.update(dict.fromkeys(tensors(out), True))
        if name in NO_KERNEL:
            return out
        self.kernels += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool
            for one in tree_leaves(args[1])
        )
        by_values = name == "repeat_interleave" and kwargs.get("output_size") is None
        on_device = name in WAITS or by_mask or by_values or to_host
        if (on_device and not here) or (at_once and here and not to_host):
            self.waits[name] += 1
        given = {id(one) for one in tensors(args, kwargs)}
        for one in tensors(out):
            if id(one) not in given and one._base is None:
                self.bytes += one.numel() * one.element_size()
        return out


def tensors(*given):
    """Those among arguments or results."""
    return [one for one in tree_leaves(given) if isinstance(one, torch.Tensor)]


def count(step):
    """Of one call, after another that made what is made once."""
    step()
    with FlopCounterMode(display=False) as flops:
        step()
    with Counted() as counted:
        step()
    return {
        "flops": flops.get_total_flops(),
        "kernels": counted.kernels,
        "bytes": counted.bytes,
        "waits": dict(sorted(counted.waits.items())),
    }


def steps():
    """{name: a step}, tiny, on two pictures of different shapes."""
    grids = [(4, 4), (2, 3)]
    pictures, tokens = tiny.packed(grids), [1 + rows * (cols + 1) for rows, cols in grids]
    rows = [torch.tensor([1] + [3] * number + [5, 6, 7, 8]) for number in tokens]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    model = tiny.model(tiny.config())
    learner = tiny.model(tiny.config(aligned=True)).train()
    labels = ids.masked_fill((ids == 3) | (mask == 0), -100)
    features = torch.randn(
        sum(rows * cols for rows, cols in grids),
        tiny.TEACHER_WIDTH,
        generator=torch.Generator().manual_seed(0),
    )

    @torch.no_grad()
    def prefill():
        return model(input_ids=ids, attention_mask=mask, **pictures, logits_to_keep=1)

    @torch.no_grad()
    def embedding():
        return model.get_image_features(**pictures)

    past = prefill()

    @torch.no_grad()
    def decode():
        longer = torch.cat([mask, mask.new_ones(2, 1)], 1)
        cache = past.get("cache") if "cache" in past else past["past_key_values"]
        out = model(input_ids=ids[:, :1], attention_mask=longer, cache=cache, logits_to_keep=1)
        cache.crop(-1)
        return out

    def train(model=learner, **more):
        model.zero_grad()
        given = {"input_ids": ids, "attention_mask": mask, "labels": labels} | pictures | more
        model(**given).loss.backward()

    packed = tiny.model(tiny.config(aligned=True)).train()
    packed.set_attn_implementation({"text_config": record_attention.NAME})
    row = {
        "input_ids": torch.cat(rows)[None],
        "attention_mask": None,
        "labels": labels[mask.bool()][None],
        "position_ids": torch.cat([torch.arange(len(one)) for one in rows])[None],
        "teacher_features": features,
    }

    return {
        "patch embedding": embedding,
        "prefill": prefill,
        "decode": decode,
        "training": train,
        "training, aligned": lambda: train(teacher_features=features),
        "training, packed": lambda: train(packed, **row),
    }


def counts():
    """All of them, and what they were counted with."""
    torch.manual_seed(0)
    found = {name: count(step) for name, step in steps().items()}
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    return {"versions": versions, "steps": found}


if __name__ == "__main__":
    FILE.write_text(json.dumps(counts(), indent=1) + "\n", encoding="utf-8")
