"""Reading, answering and training beside the published programme's shape of the same work.

    OMP_NUM_THREADS=1 python benchmarks/published_programme.py                  # 20 minutes
    OMP_NUM_THREADS=1 python benchmarks/published_programme.py --only prefill decode
    python benchmarks/published_programme.py --device cuda --dtype bfloat16 --shape eve-7b

The published shape is `tests/oracle/published_step.py`, around the very weights of ours: canvases,
a round for each picture, rows padded on the right, T x T attention weights (on a GPU its training
takes the library's fused attention, as the programme trains with FlashAttention there), hidden
states of all layers, logits of all positions in float32, one question at a time, the teacher in
full at every step.  Losses of both have to agree before anything is timed.  Pictures are a square
of 24 x 24 cells and with it 8 x 24, 24 x 12 and 18 x 24 (672 pixels); 44 further words, and in
training 60 words that are learnt.  Ours takes the teacher's features from memory in float16, as a
run takes them from its store.

Both take turns.  Seconds are those of the processor on a CPU (other programs take little of them
away), by the clock on a GPU.  Memory is weights and the highest sum of live tensors: counted on a
CPU, the allocator's on a GPU.  Prints a table and, last, one line of JSON.

Easy to get wrong: a step's tokens are the real ones, of words and pictures; padding counts as none,
so a ratio of seconds is one of tokens per second.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CLIPVisionModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from eve_vlm import record_attention
from eve_vlm.alignment_eve import EveForPreTraining, EvePatchAligner
from eve_vlm.bench.measuring import weight_bytes
from eve_vlm.bench.subjects import SHAPES, Subject
from eve_vlm.bench.training import OTHERS, learning
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import EncodedRecord
from eve_vlm.memory.trace import LiveBytes
from eve_vlm.serve.messages import Prompt
from eve_vlm.serve.reply import Reply
from eve_vlm.serve.running_batch import RunningBatch
from eve_vlm.serve.sampling import Sampling
from eve_vlm.versions import versions
from oracle import published_shape, published_step

WORDS, LEARNT, ROWS = 44, 60, 8  # words behind a picture, of them learnt, rows of decoding
PARTS = ("prefill", "decode", "training", "aligned")
SQUARE, MIX = (24, 24), [(24, 24), (8, 24), (24, 12), (18, 24)]  # cells
SMALL_MIX = [(4, 4), (2, 4), (4, 2), (3, 4)]  # of the shape `tiny`
GIB = 2**30


class Way(NamedTuple):
    """One way to do a piece of work; returns what both must agree on, or the seconds it took."""

    run: Callable[[], Any]
    own_clock: bool = False
    """`run` returns its seconds: what it does before them is not part of the work."""


class Work(NamedTuple):
    """A piece of work done in several ways, the published one among them."""

    part: str
    name: str
    tokens: int
    """Real ones, or those made, by which both are compared."""
    published: Way
    published_tokens: int
    ours: dict[str, Way]


class TimedReply(Reply):
    """An answer that nothing ends early, and that notes when each of its tokens came."""

    def __init__(self, *args: Any, clock: Callable[[], float], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.clock, self.times = clock, list[float]()

    def take(self, token_id: int) -> None:
        """The next token of the answer."""
        super().take(token_id)
        self.times.append(self.clock())


class Bench:
    """Both programmes around one set of random weights, and their inputs."""

    def __init__(self, asked: argparse.Namespace):
        self.device = torch.device(asked.device)
        dtype = getattr(torch, asked.dtype)
        self.subject = Subject(asked.shape, device=self.device, dtype=dtype)
        self.model = self.subject.model
        self.model.set_attn_implementation(record_attention.NAME)  # as packed recipes have it
        self.aligned = with_aligner(self.subject)
        small = asked.shape == "tiny"
        self.mix = SMALL_MIX if small else MIX
        self.patch, self.edge = self.subject.config.vision_config.patch_size, 28 * self.mix[0][0]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.pictures = [torch.randn(3, rows * 28, cols * 28) for rows, cols in self.mix]
        self.teacher: CLIPVisionModel | None = None
        fused = "sdpa" if self.device.type == "cuda" else "eager"
        self.reader = published_step.Published(self.model)
        self.trainer = published_step.Published(self.model, attention=fused)

    def clock(self) -> float:
        """Processor seconds, or those of a GPU that has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    # --- inputs ---

    def canvases(self, count: int) -> torch.Tensor:
        """Pictures as the published programme takes them."""
        pictures = [self.pictures[index % len(self.mix)] for index in range(count)]
        made = published_shape.canvases(pictures, self.edge, self.patch)
        return made.to(self.device, self.model.dtype)

    def samples(self, count: int, *, learnt: int) -> list[published_step.Sample]:
        """A start word, the picture, and words of which the last are learnt."""
        found = []
        words = min(400, self.subject.config.text_config.vocab_size)
        generator = torch.Generator().manual_seed(2)
        for _ in range(count):
            ids = torch.randint(10, words, (1 + WORDS + learnt,), generator=generator)
            ids[ids == self.subject.config.image_token_id] = 9
            labels = torch.full_like(ids, published_step.IGNORED)
            if learnt:
                labels[-learnt:] = ids[-learnt:]
            found.append(published_step.Sample(ids.to(self.device), 1, labels.to(self.device)))
        return found

    def records(self, samples: list[published_step.Sample]) -> list[EncodedRecord]:
        """The same samples as our encoder gives them."""
        found = []
        for index, sample in enumerate(samples):
            rows, cols = self.mix[index % len(self.mix)]
            filled = (self.subject.config.image_token_id, published_step.IGNORED)
            ids, labels = (
                torch.cat([part[:1], torch.full((1 + rows * (cols + 1),), value), part[1:]])
                for part, value in zip((sample.ids.cpu(), sample.labels.cpu()), filled, strict=True)
            )
            picture = self.pictures[index % len(self.mix)]
            found.append(
                EncodedRecord(
                    id=str(index),
                    input_ids=ids.numpy(),
                    labels=labels.numpy(),
                    pixel_values=published_shape.patches_of(picture, self.patch).numpy(),
                    image_grid_thw=torch.tensor([[1, 2 * rows, 2 * cols]]).numpy(),
                    teacher_pixel_values=None,
                    source="",
                )
            )
        return found

    def prompts(self, samples: list[published_step.Sample]) -> list[Prompt]:
        """The same samples as questions."""
        return [
            Prompt(
                torch.from_numpy(record.input_ids),
                torch.from_numpy(record.pixel_values),
                torch.from_numpy(record.image_grid_thw),
                ((1, len(record.input_ids) - WORDS),),
            )
            for record in self.records(samples)
        ]

    # --- work ---

    def prefill(self) -> list[Work]:
        """A square alone, and the mixed batch, up to what decides the first token."""
        found = []
        for name, count in (("one square", 1), ("4 mixed", 4)):
            samples, canvases = self.samples(count, learnt=0), self.canvases(count)
            prompts = self.prompts(samples)
            tokens = sum(map(len, prompts))
            found.append(
                Work(
                    *("prefill", name, tokens),
                    Way(lambda s=samples, c=canvases: self.reader.read(s, c)),
                    tokens,
                    {
                        "asked together" if count > 1 else "asked": Way(
                            lambda p=prompts: self.answer(p, 1)
                        )
                    },
                )
            )
        return found

    def answer(self, prompts: list[Prompt], new_tokens: int) -> list[TimedReply]:
        """By the running batch that serves users."""
        sampling = Sampling(max_new_tokens=new_tokens)
        tokenizer = self.subject.tokenizer
        replies = [
            TimedReply(prompt, sampling, tokenizer, device=self.device, clock=self.clock)
            for prompt in prompts
        ]
        batch = RunningBatch(self.model, size=len(replies))
        batch.add(replies)
        batch.run()
        return replies

    def decode(self, new_tokens: int) -> list[Work]:
        """Tokens behind the first: eight answers together, and one at a time."""
        samples, canvas = self.samples(ROWS, learnt=0), self.canvases(1)
        prompts = self.prompts(samples)

        def one_by_one() -> float:
            _, _, cache = self.reader.read(samples[:1], canvas)
            started, token = self.clock(), 5
            for _ in range(new_tokens):
                token = int(self.reader.next(token, cache)[0, -1].argmax())
            return (self.clock() - started) / new_tokens

        def together(count: int) -> float:
            replies = self.answer(prompts[:count], new_tokens + 1)
            begun = max(reply.times[0] for reply in replies)
            return (max(reply.times[-1] for reply in replies) - begun) / new_tokens

        def work(name: str, count: int) -> Work:
            way = Way(lambda: together(count), own_clock=True)
            one = Way(one_by_one, own_clock=True)
            return Work("decode", name, count, one, 1, {f"{count} together": way})

        return [work("a token of each answer", ROWS), work("a token of one answer", 1)]

    def training(self, *, aligned: bool) -> list[Work]:
        """Forward and backward of the mixed batch, padded and packed."""
        samples, canvases = self.samples(4, learnt=LEARNT), self.canvases(4)
        records = self.records(samples)
        model = self.aligned if aligned else self.model
        extra: dict[str, Any] = {}
        if aligned:
            self.teacher = teacher_of(self.subject)
            views = self.views()
            extra["teacher_features"] = torch.cat(self.look(views)).half()

        def published() -> float:
            given = {"aligner": model.aligner, "features": self.look(views)} if aligned else {}
            loss = self.trainer.step(samples, canvases, **given).loss
            return backward(loss)

        def backward(loss: torch.Tensor) -> float:
            loss.backward()
            model.zero_grad()
            return float(loss.detach())

        ours = {}
        for name, packed in (("padded", False), ("packed", True)):
            batch = EveCollator(0, packed=packed)([records] if packed else [[r] for r in records])
            given = {
                key: value.to(self.device) if isinstance(value, torch.Tensor) else value
                for key, value in batch.items()
                if key not in OTHERS
            }
            ours[name] = Way(lambda given=given: backward(model(**given, **extra).loss))
        tokens = sum(len(record.input_ids) for record in records)
        part, name = ("aligned", "with alignment") if aligned else ("training", "no alignment")
        return [Work(part, f"4 mixed, {name}", tokens, Way(published), tokens, ours)]

    def views(self) -> torch.Tensor:
        """Noise in place of pictures on the teacher's canvases: what it sees costs the same."""
        assert self.teacher is not None
        side = self.teacher.config.image_size
        made = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(3))
        return made.to(self.device, self.model.dtype)

    def look(self, views: torch.Tensor) -> list[torch.Tensor]:
        """The teacher in full."""
        assert self.teacher is not None
        return published_step.teacher_cells(self.teacher, views, self.mix)

    # --- measuring ---

    def peak(self, way: Way, modules: list[torch.nn.Module]) -> tuple[int, Any]:
        """Bytes of weights and of all tensors alive at once, and what the way returned."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            result = way.run()
            return torch.cuda.max_memory_allocated(), result
        with LiveBytes() as counter:
            for module in modules:
                counter.ignore(module)
            result = way.run()
        return counter.peak.bytes + weight_bytes(modules), result

    def measure(self, work: Work, repeats: int) -> dict[str, Any]:
        """A round in which memory is looked at and losses are compared, then turns that count."""
        ours_of: Any = self.aligned if work.part == "aligned" else self.model
        theirs = [ours_of] if self.teacher is None else [ours_of, self.teacher]
        ways = {"published": work.published, **work.ours}
        memory, seconds = {}, {name: list[float]() for name in ways}
        results = {}
        for name, way in ways.items():
            memory[name], results[name] = self.peak(
                way, theirs if name == "published" else [ours_of]
            )
        if work.part in ("training", "aligned"):
            agree(results, exact=self.model.dtype == torch.float32)
        for _ in range(repeats):
            for name, way in ways.items():
                started = self.clock()
                result = way.run()
                seconds[name].append(result if way.own_clock else self.clock() - started)
        found: dict[str, Any] = {"part": work.part, "work": work.name, "ways": {}}
        for name, taken in seconds.items():
            tokens = work.published_tokens if name == "published" else work.tokens
            entry = {
                "seconds": statistics.median(taken),
                "tokens_per_second": tokens / statistics.median(taken),
                "memory_bytes": memory[name],
            }
            if name != "published":
                faster = work.tokens / work.published_tokens
                pairs = zip(seconds["published"], taken, strict=True)
                entry["ratio"] = quartiles([faster * theirs / ours for theirs, ours in pairs])
                entry["share_of_memory"] = memory[name] / memory["published"]
            found["ways"][name] = entry
        return found


def with_aligner(subject: Subject) -> EveForPreTraining:
    """The training class around the subject's own weights, with a new aligner."""
    config = subject.aligned_config()
    with torch.device("meta"):
        model = EveForPreTraining(config)
    with torch.random.fork_rng(), torch.device(subject.device):
        torch.manual_seed(0)
        model.aligner = EvePatchAligner(config).to(subject.dtype)
    model.model, model.lm_head = subject.model.model, subject.model.lm_head
    return model.eval().requires_grad_(False)


def teacher_of(subject: Subject) -> CLIPVisionModel:
    """The frozen teacher: CLIP-L/14-336, or the small one of the shape `tiny`, random weights."""
    config = copy.deepcopy(subject.shape.encoder)
    if subject.name == "tiny":
        config.hidden_size = subject.shape.teacher
    with torch.random.fork_rng(), torch.device(subject.device):
        torch.manual_seed(0)
        # The library of the published programme knows no other attention for it.
        made = CLIPVisionModel._from_config(config, attn_implementation="eager")
        return made.to(subject.dtype).eval().requires_grad_(False)


def agree(losses: dict[str, float], *, exact: bool) -> None:
    """Refuses to time different work.

    Raises:
        SystemExit: if the losses of the ways differ by more than sums in another order explain.
    """
    allowed = 1e-4 if exact else 3e-2
    for name, loss in losses.items():
        if abs(loss - losses["published"]) > allowed * abs(losses["published"]):
            raise SystemExit(f"The losses differ: published {losses['published']}, {name} {loss}.")


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def row(found: dict[str, Any], name: str) -> str:
    """A row of the table."""
    ours, theirs = found["ways"][name], found["ways"]["published"]
    low, middle, high = ours["ratio"]
    cells = [f"{found['part']}: {found['work']}", name]
    cells += [f"{way['seconds']:.3g}" for way in (theirs, ours)]
    cells += [f"{way['tokens_per_second']:,.1f}" for way in (theirs, ours)]
    cells += [f"{middle:.2f} ({low:.2f} to {high:.2f})"]
    cells += [f"{way['memory_bytes'] / GIB:.2f}" for way in (theirs, ours)]
    cells += [f"{ours['share_of_memory']:.2f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no GPU that torch can use; leave --device out.")
    try:
        measured = run(asked)
    except torch.OutOfMemoryError:
        name = torch.cuda.get_device_name()
        raise SystemExit(
            f"The published shape of work with {asked.shape} in {asked.dtype} does not fit {name}; "
            "leave out parts with --only, or take --shape small."
        ) from None
    facts = {**vars(asked), "threads": torch.get_num_threads()}
    device = torch.device(asked.device)
    print(json.dumps({"settings": facts, "versions": versions(device=device), "work": measured}))


def run(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """All parts that were asked for, each printed as it comes."""
    bench, found = Bench(asked), []
    titles = ["work", "ours", "published, s", "ours, s", "published, tokens/s", "ours, tokens/s"]
    titles += ["ours / published, tokens/s", "published, GiB", "ours, GiB", "share"]
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles), flush=True)
    for part in PARTS:
        if part not in asked.only:
            continue
        learns = part in ("training", "aligned")
        model: Any = bench.aligned if part == "aligned" else bench.model
        if learns:
            with learning(model, ("*",)):
                works = bench.training(aligned=part == "aligned")
                done = [bench.measure(work, asked.repeats) for work in works]
        else:
            works = bench.prefill() if part == "prefill" else bench.decode(asked.new_tokens)
            done = [bench.measure(work, asked.repeats) for work in works]
        for entry in done:
            for name in entry["ways"]:
                if name != "published":
                    print(row(entry, name), flush=True)
        found += done
    return found


if __name__ == "__main__":
    main()
