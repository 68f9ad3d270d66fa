"""Beam search over prompts whose pictures were read once.

The library repeats inputs for beams, and with packed pixels it would repeat single patches.  Here
prompts are read into a cache first and its rows are repeated, so beams never meet a pixel.  Easy to
get wrong: the beams of one prompt stand next to each other, as `generate` expects them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from eve_vlm.cache_name_eve import CACHE

from .messages import Prompt
from .reply import Answer, Reply
from .running_batch import RunningBatch
from .sampling import Sampling

if TYPE_CHECKING:
    from .engine import EveEngine


@torch.inference_mode()
def answer_with_beams(
    engine: "EveEngine", prompts: Sequence[Prompt], sampling: Sampling, *, n: int, num_beams: int
) -> list[Answer]:
    """The n best answers of a beam search to each prompt, the best first; greedy only.

    Raises:
        ValueError: for settings that a beam search has no use for.
    """
    if sampling.temperature or sampling.logprobs is not None:
        raise ValueError(
            "A beam search neither draws tokens nor gives log-probabilities; leave out temperature "
            "and logprobs, or num_beams."
        )
    if n > num_beams:
        raise ValueError(f"n is {n} but there are {num_beams} beams; ask for at most as many.")
    batch = RunningBatch(engine.model, size=1)
    answers = []
    for prompt in prompts:  # one by one: beams of several prompts end at different times
        cache = DynamicCache()
        ids, mask = batch.read_prompts([prompt], cache)
        cache.batch_repeat_interleave(num_beams)
        settings = batch.settings(
            max_new_tokens=sampling.max_new_tokens,
            num_beams=num_beams,
            num_return_sequences=n,
            eos_token_id=engine.ends(),
            pad_token_id=(engine.ends() or [0])[0],
            suppress_tokens=engine.never(),
            stop_strings=list(sampling.stop) or None,
        )
        output = engine.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **{CACHE: cache},
            generation_config=settings,
            **({"tokenizer": engine.tokenizer} if sampling.stop else {}),
        )
        for row in output[:, ids.shape[1] :].tolist():
            reply = Reply(
                prompt,
                sampling,
                engine.tokenizer,
                device=engine.model.device,
                ends=engine.ends(),
            )
            for token in row:
                if not reply.finished:
                    reply.take(token)
            if not reply.finished:  # a stop text that the library found between two letters
                reply.end("stop")
            assert reply.answer is not None
            answers.append(reply.answer)
    return answers


__all__ = ["answer_with_beams"]
