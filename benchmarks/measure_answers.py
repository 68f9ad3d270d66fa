"""How fast a model answers, in how much memory, and how far smaller weights move its answers.

    python benchmarks/measure_answers.py MODEL --variants plain int8 nf4 static
    python benchmarks/measure_answers.py --shape smollm2   # random weights of that shape

Every variant runs in a process of its own, so that its peak of memory is its own.  It answers the
same questions about pictures of mixed sizes one at a time, then 8 and 32 together, with as many
tokens each.  The answers and log-probabilities of `plain` are the yardstick of the others.  A table
is printed, then one line of JSON.

Easy to get wrong: speeds of two runs on a shared machine do not compare; the rate of a matrix
product, measured in each process before and after, stands beside them.  And weights of a float32
folder stay mapped to their file, which makes `plain` look small: measure a bfloat16 folder, as
published models are.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from eve_vlm.serve.engine import EveEngine, user_message

SIZES = ((640, 480), (480, 640), (600, 600), (900, 300), (200, 150), (300, 800))
QUESTIONS = ("What is this?", "Describe the picture in one sentence.", "Which colours are there?")
SIDE = 1024  # of the matrices whose product is timed
# Variant: what it is loaded with.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
    "static": {"static_cache": True},
    "compiled": {"static_cache": True},  # and told to compile, which takes most of a minute a shape
}
# Width, its layers' inner width, layers, heads, key-value heads, vocabulary.
SHAPES = {
    "smollm2": (576, 1536, 30, 9, 3, 49152),  # 135 M parameters
    "1b": (2048, 8192, 16, 32, 8, 32000),  # as Llama 3.2 1B with fewer words
}


def save(shape: str, folder: str) -> None:
    """A folder with random weights of a shape, in bfloat16."""
    from eve_vlm import EveConfig, EveForConditionalGeneration, EveImageProcessor, EveProcessor
    from eve_vlm.data.tokenizer import train_tokenizer

    torch.manual_seed(0)
    words = train_tokenizer(QUESTIONS * 4, vocab_size=300)
    place = words.convert_tokens_to_ids("<image>")
    width, inner, layers, heads, pairs, vocabulary = SHAPES[shape]
    text = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": pairs,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = EveConfig(text_config=text, image_token_id=place)
    EveForConditionalGeneration._from_config(config).to(torch.bfloat16).save_pretrained(folder)
    pictures = EveImageProcessor(size={"longest_edge": 672})
    EveProcessor(pictures, words, chat_template=words.chat_template).save_pretrained(folder)


def questions(count: int) -> list[list[dict]]:
    """The same questions each time; every fourth is about no picture."""
    asked = []
    for index in range(count):
        picture = Image.new("RGB", SIZES[index % len(SIZES)], (40 * index % 256, 90, 200))
        question = f"{QUESTIONS[index % len(QUESTIONS)]} ({index})"
        asked.append(user_message(question, [] if index % 4 == 3 else [picture]))
    return asked


def matrix_rate() -> float:
    """float32 GFLOP/s of a matrix product, the best of five."""
    one = torch.randn(SIDE, SIDE)
    best = min(timed(lambda: one @ one) for _ in range(5))
    return 2 * SIDE**3 / best / 1e9


def peak_mb() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(work: Any) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.inference_mode()
def likelihood(engine: EveEngine, messages: list[dict], answer: list[int]) -> list[float]:
    """Log-probabilities of given tokens by one plain forward pass."""
    prompt = engine.encode(messages)
    ids = torch.cat([prompt.input_ids, torch.tensor(answer)])[None]
    logits = engine.model(ids, logits_to_keep=len(answer) + 1, **prompt.pictures_from(0)).logits
    rows = logits[0, :-1].float().log_softmax(-1)
    return rows.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()


def weight_bytes(model: torch.nn.Module) -> int:
    """Of weights and scales; those that are shared count once."""
    seen = {}
    for weight in model.state_dict().values():
        names = [] if type(weight) is torch.Tensor else weight.__tensor_flatten__()[0]
        for part in [getattr(weight, name) for name in names] or [weight]:
            seen[part.data_ptr()] = part.nbytes
    return sum(seen.values())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One variant, in this process."""
    engine = EveEngine.from_pretrained(args.model, device="cpu", **VARIANTS[args.variant])
    if args.variant == "compiled":
        from transformers import CompileConfig

        engine.model.generation_config.compile_config = told = CompileConfig(mode="default")
        told._compile_all_devices = True  # the library's own way to try it on a CPU
    loading = peak_mb()
    gc.collect()
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    engine.model.generation_config.eos_token_id = None
    engine.ends = lambda: []  # type: ignore[method-assign]  # all answers are equally long
    asked, before = questions(args.questions), matrix_rate()
    engine.answer(asked[:2], max_new_tokens=2)
    first = min(engine.answer(asked[:1], max_new_tokens=1)[0].seconds_to_first for _ in range(3))
    speeds, tokens = {}, []
    for size in (1, 8, 32):
        some = asked[: args.alone] if size == 1 else asked
        start = time.perf_counter()
        answers = engine.answer(some, batch_size=size, max_new_tokens=args.tokens)
        seconds = time.perf_counter() - start
        speeds[str(size)] = len(some) * args.tokens / seconds
        tokens.append([answer.token_ids for answer in answers])
    few = asked[: args.alone]
    return {
        "variant": args.variant,
        "tokens_per_second": speeds,
        "first_token": first,
        "batch_is_single": tokens[0] == tokens[1][: args.alone] == tokens[2][: args.alone],
        "tokens": tokens[0],
        "logprobs": [
            likelihood(engine, one, ids)
            for one, ids in zip(few, args.yardstick or tokens[0], strict=True)
        ],
        "loading_mb": loading,
        "held_mb": held,
        "peak_mb": peak_mb(),
        "weights_mb": weight_bytes(engine.model) / 2**20,
        "gflops": (before + matrix_rate()) / 2,
    }


def drift(plain: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How far one variant's answers are from the plain ones."""
    pairs = list(zip(plain["tokens"], other["tokens"], strict=True))
    prefix = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0]))
        for pair in pairs
    ]
    gaps = [
        abs(a - b)
        for one, two in zip(plain["logprobs"], other["logprobs"], strict=True)
        for a, b in zip(one, two, strict=True)
    ]
    return {
        "equal_answers": sum(a == b for a, b in pairs) / len(pairs),
        "equal_beginning": sum(prefix) / sum(len(a) for a, _ in pairs),
        "logprob_mean": sum(gaps) / len(gaps),
        "logprob_most": max(gaps),
    }


def main() -> None:
    """Runs all variants and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="a model folder")
    parser.add_argument("--shape", choices=SHAPES, help="instead of a folder: random weights")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["plain", "int8", "nf4", "static"]
    )
    parser.add_argument("--questions", type=int, default=32, help="questions in all")
    parser.add_argument("--alone", type=int, default=8, help="of them asked one at a time")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--yardstick", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args)))
        return
    if bool(args.model) == bool(args.shape):
        parser.error("give a model folder or --shape")
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            save(args.shape, folder)
        compare(args, args.model or folder)


def compare(args: argparse.Namespace, model: str) -> None:
    """Each variant in a process of its own."""
    found: list[dict[str, Any]] = []
    for variant in args.variants:
        command = [sys.executable, __file__, model, "--variant", variant]
        for name in ("questions", "alone", "tokens"):
            command += [f"--{name}", str(vars(args)[name])]
        if found:
            command += ["--yardstick", json.dumps(found[0]["tokens"])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        row = found[-1] | {"drift": drift(found[0], found[-1])}
        speeds = "  ".join(f"{size}: {one:6.1f}" for size, one in row["tokens_per_second"].items())
        print(
            f"{variant:8} tokens/s at {speeds}  first token {row['first_token']:.2f} s  "
            f"weights {row['weights_mb']:.0f} MB  held {row['held_mb']:.0f} MB  "
            f"peak {row['peak_mb']:.0f} MB  "
            f"batch == single {row['batch_is_single']}  equal beginning "
            f"{row['drift']['equal_beginning']:.2f}  log-probability off by "
            f"{row['drift']['logprob_mean']:.3f}, at most {row['drift']['logprob_most']:.2f}  "
            f"({row['gflops']:.0f} GFLOP/s)",
            flush=True,
        )
        found[-1]["drift"] = row["drift"]
    print(
        json.dumps(
            [{k: v for k, v in one.items() if k not in ("tokens", "logprobs")} for one in found]
        )
    )


if __name__ == "__main__":
    main()
