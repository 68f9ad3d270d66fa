"""Measures real memory peaks of small models and puts the estimates of `eve fits` beside them.

    python benchmarks/measure_memory.py            # all cases as a table, a minute or two
    python benchmarks/measure_memory.py gemma3     # some of them
    python benchmarks/measure_memory.py --framework

Every case is one process of its own that does the real thing on the CPU in float32: `EveTrainer`
with torch's AdamW for two steps, or a saved folder that `EveEngine` loads and asks. What is
measured is the highest resident size that Linux saw (VmHWM), less the resident size before the
model was built. Nothing of the estimate's own counting is used, so the two can disagree.

Easy to get wrong: without the two MALLOC variables below glibc keeps freed memory, and the resident
size says what was once needed in pieces, not what is needed at once.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # larger blocks come from, and go back to, the system
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One small configuration; `what` says which part takes most."""

    what: str
    text: dict[str, Any]
    work: dict[str, Any]
    vision: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] | None = None


def decoder(width: int, layers: int, vocabulary: int = 512, **others: Any) -> dict[str, Any]:
    """A Llama shape with heads of 64 and the usual proportions."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 8 * width // 3 // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "head_dim": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **others,
    }


TRAIN = {"training": True, "rows": 4, "cols": 4}
ANSWER = {"training": False, "rows": 4, "cols": 4, "new_tokens": 8}
FROZEN = ("model.vision_tower.*", "model.multi_modal_projector.*", "aligner.*")
# Name: the part that dominates is in `what`. Each takes 100 MB to 1 GB and a few seconds.
CASES = {
    "weights": Case(
        what="answering, big weights", text=decoder(1024, 8, 8000), work=ANSWER | {"length": 64}
    ),
    "cache": Case(
        what="answering, key-value cache of 16 sequences",
        text=decoder(384, 6, 4000),
        work=ANSWER | {"length": 1500, "batch": 16, "new_tokens": 4},
    ),
    "grouped": Case(
        what="answering, one key-value head for 4 heads, padded",
        text=decoder(512, 8, 4000, num_key_value_heads=2),
        work=ANSWER | {"length": 1000, "batch": 24, "new_tokens": 4, "padded": True},
    ),
    "optimizer": Case(
        what="finetune, weights, gradients and moments",
        text=decoder(768, 6, 2000),
        work=TRAIN | {"length": 64},
    ),
    "muon": Case(
        what="finetune, the same with matrices moved by Muon",
        text=decoder(768, 6, 2000),
        work=TRAIN | {"length": 64, "muon": ("*",)},
    ),
    "long": Case(
        what="pretrain, long sequence",
        text=decoder(256, 6),
        work=TRAIN | {"length": 2048},
    ),
    "checkpointed": Case(
        what="pretrain, long sequence, gradient checkpointing",
        text=decoder(256, 12),
        work=TRAIN | {"length": 4096, "gradient_checkpointing": True},
    ),
    "padded": Case(
        what="pretrain, four sequences of different length",
        text=decoder(256, 6, num_key_value_heads=1),
        work=TRAIN | {"length": 768, "batch": 4, "padded": True},
    ),
    "eager": Case(
        what="pretrain, eager attention",
        text=decoder(256, 4),
        work=TRAIN | {"length": 1024, "attention": "eager"},
    ),
    "logits": Case(
        what="pretrain, vocabulary of 64,000",
        text=decoder(128, 2, 64000, tie_word_embeddings=True),
        work=TRAIN | {"length": 640},
    ),
    "pictures": Case(
        what="pretrain, 8 large pictures",
        text=decoder(64, 2),
        vision={"hidden_size": 256},
        work=TRAIN | {"length": 4900, "pictures": 8, "rows": 24, "cols": 24},
    ),
    "aligned": Case(
        what="pretrain, aligner and teacher",
        text=decoder(256, 6),
        vision={"hidden_size": 128},
        teacher={"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12},
        work=TRAIN | {"length": 320, "batch": 4, "rows": 16, "cols": 16, "aligned": True},
    ),
    "prealign": Case(
        what="prealign, frozen decoder",
        text=decoder(512, 10, 2000),
        vision={"hidden_size": 256},
        teacher={"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
        work=TRAIN | {"length": 512, "rows": 16, "cols": 16, "aligned": True, "trainable": FROZEN},
    ),
    "lora": Case(
        what="finetune, LoRA of rank 8 on a frozen decoder",
        text=decoder(768, 10, 2000),
        work=TRAIN | {"length": 256, "lora": 8},
    ),
    "accumulated": Case(
        what="finetune, gradients of three batches",
        text=decoder(512, 6, 2000),
        work=TRAIN | {"length": 1024, "accumulation": 3},
    ),
    "gemma3": Case(
        what="pretrain, a Gemma 3 decoder with sliding windows",
        text=decoder(256, 6, model_type="gemma3_text", sliding_window=256),
        work=TRAIN | {"length": 1024},
    ),
}


# --- in the process that is measured --------------------------------------------------------------


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status says no {name}; measure on Linux.")


def restart_peak() -> None:
    """From here on VmHWM counts anew (proc(5), clear_refs)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def configuration(case: Case) -> Any:
    """The model's configuration."""
    from eve_vlm import EveAlignmentConfig, EveConfig, EveVisionConfig

    alignment = None
    if case.teacher:
        alignment = EveAlignmentConfig(
            teacher_hidden_size=case.teacher["hidden_size"], tap_every=2, num_attention_heads=8
        )
    return EveConfig(
        text_config=case.text,
        vision_config=EveVisionConfig(**{"hidden_size": 64, **case.vision}),
        alignment_config=alignment,
        image_token_id=3,
    )


def teacher_config(case: Case) -> Any:
    """A CLIP vision model with one patch per cell."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        **(case.teacher or {}),
        num_attention_heads=8,
        patch_size=14,
        image_size=14 * case.work["cols"],
    )


def frozen_teacher(case: Case, model: Any) -> Any:
    """`FrozenTeacher` around a model, as `from_pretrained` makes it."""
    from eve_vlm.data.teacher_view import TeacherView
    from eve_vlm.train.teacher import FrozenTeacher

    cells = case.work["cols"]

    def extract(model: Any, pixels: Any) -> Any:
        return model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

    view = TeacherView(cells=cells, cell_pixels=14, fill=(127, 127, 127))
    width = case.teacher["hidden_size"] if case.teacher else 0
    return FrozenTeacher(
        model, extract, view=view, hidden_size=width, mean=(0.5,) * 3, std=(0.5,) * 3
    )


class Records:
    """Encoded records of the wanted length, made when asked for, as `EncodedRows` does."""

    def __init__(self, case: Case, vision: Any, *, view: int):
        self.work, self.vision, self.view = case.work, vision, view

    def __len__(self) -> int:
        return 2 * self.work.get("batch", 1) * self.work.get("accumulation", 1)

    def __getitem__(self, row: list[int]) -> list[Any]:
        """A row of one record."""
        return [self.encoded(index) for index in row]

    def encoded(self, index: int) -> Any:
        """Where the case is padded, every second one is shorter."""
        import numpy as np

        from eve_vlm.data.encode import EncodedRecord
        from eve_vlm.image_processing_eve import num_image_tokens

        work, merge = self.work, self.vision.merge_size
        rows, cols, count = work["rows"], work["cols"], work.get("pictures", 1)
        ids = np.full(work["length"] - (16 if work.get("padded") and index % 2 else 0), 5, np.int64)
        ids[: count * num_image_tokens(rows, cols)] = 3
        patches = count * rows * cols * merge**2
        return EncodedRecord(
            id=str(index),
            input_ids=ids,
            labels=np.where(ids == 3, -100, ids),
            pixel_values=np.full((patches, 3 * self.vision.patch_size**2), 0.1, np.float32),
            image_grid_thw=np.array([(1, rows * merge, cols * merge)] * count),
            teacher_pixel_values=np.ones((count, self.view, self.view, 3), np.uint8)
            if self.view
            else None,
        )


def train(case: Case, folder: str) -> None:
    """Two steps of `EveTrainer`, as `eve_vlm.train.run` sets it up."""
    import torch
    from transformers import CLIPVisionModel, PrinterCallback, TrainingArguments

    from eve_vlm import EveForConditionalGeneration, EveForPreTraining
    from eve_vlm.data.collator import EveCollator
    from eve_vlm.data.rows import Rows, RowSampler
    from eve_vlm.train.data_log import DataLog
    from eve_vlm.train.parameters import select_trainable
    from eve_vlm.train.sections import StageSection
    from eve_vlm.train.trainer import EveTrainer

    torch.manual_seed(0)
    work, config = case.work, configuration(case)
    cls = EveForPreTraining if case.teacher else EveForConditionalGeneration
    model = cls._from_config(config, attn_implementation=work.get("attention", "sdpa"))
    stage = StageSection(
        name="pretrain",
        trainable=list(work.get("trainable", ("*",))),
        learning_rates={"*": 1e-4},
        weight_decay=0.0,
        alignment=None,
        muon=list(work.get("muon", ())),
    )
    select_trainable(model, stage)
    if work.get("lora"):
        add_lora(model, work["lora"])
    teacher = None
    if case.teacher:
        teacher = frozen_teacher(case, CLIPVisionModel(teacher_config(case)))
    arguments = TrainingArguments(
        output_dir=folder,
        optim="adamw_torch",
        max_steps=2,
        per_device_train_batch_size=work.get("batch", 1),
        gradient_accumulation_steps=work.get("accumulation", 1),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    if work.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    view = teacher.view.size if teacher else 0
    records = Records(case, config.vision_config, view=view)
    rows = RowSampler(Rows(len(records), seed=0), batch_size=work.get("batch", 1))
    trainer = EveTrainer(
        model=model,
        args=arguments,
        train_dataset=records,
        data_log=DataLog(rows, max_bad_share=0.0),
        data_collator=EveCollator(0),
        stage=stage,
        teacher=teacher,
        teacher_side=config.vision_config.merge_size,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def add_lora(model: Any, rank: int) -> None:
    """LoRA by PEFT on the decoder's linear layers; the patch embedding learns in full."""
    from peft import LoraConfig, inject_adapter_in_model

    learning = [name for name in dict(model.named_parameters()) if "language_model" not in name]
    settings = LoraConfig(
        r=rank, target_modules=r".*language_model\.layers\..*_proj", lora_dropout=0.0
    )
    inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or (name in learning and "lm_head" not in name))


def save(case: Case, folder: str) -> None:
    """A model folder to ask; made by another process, so that its memory is not counted."""
    import torch

    from eve_vlm import EveForConditionalGeneration, EveImageProcessor, EveProcessor
    from eve_vlm.data.tokenizer import train_tokenizer

    torch.manual_seed(0)
    model = EveForConditionalGeneration._from_config(configuration(case))
    # As published checkpoints are; the engine makes float32 of it on the CPU, one shard of the two.
    model.to(torch.bfloat16).save_pretrained(folder)
    words = train_tokenizer(["a cat"] * 4, vocab_size=300)
    pictures = EveImageProcessor(size={"longest_edge": 28 * case.work["cols"]})
    EveProcessor(pictures, words, chat_template=words.chat_template).save_pretrained(folder)


def answer(case: Case, folder: str) -> int:
    """Loads the folder and asks it; returns the peak while loading, and starts the peak anew."""
    from PIL import Image

    from eve_vlm.serve.engine import EveEngine, user_message

    engine = EveEngine.from_pretrained(folder, device="cpu")
    loading = resident("VmHWM")
    work = case.work
    side = 28 * work["cols"]
    picture = Image.new("RGB", (side, 28 * work["rows"]), "orange")
    batch = work.get("batch", 1)

    def conversation(words: int, shorter: int = 0) -> list[dict]:
        return user_message(" a" * (words - shorter), [picture])

    def length(words: int) -> int:
        text = engine.processor.tokenizer.apply_chat_template(
            conversation(words), tokenize=False, add_generation_prompt=True
        )
        inputs = engine.processor(text=[text], images=[picture], add_special_tokens=False)
        return len(inputs["input_ids"][0])

    words = work["length"] - work["new_tokens"]
    words -= length(words) - words  # what the template and the picture take
    assert length(words) == work["length"] - work["new_tokens"]
    restart_peak()
    asked = [
        conversation(words, 4 if work.get("padded") and index % 2 else 0) for index in range(batch)
    ]
    engine.generate(asked, max_new_tokens=work["new_tokens"], batch_size=batch)
    return loading


def tiny_of(case: Case) -> Case:
    """The same kind of run with nothing in it, to load what has to be loaded once."""
    small = {"length": 64, "batch": 1, "rows": 2, "cols": 2, "pictures": 1, "accumulation": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    text = case.text | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 320} | heads
    vision = {"hidden_size": 16}
    teacher = case.teacher and {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
    }
    return Case(what="", text=text, vision=vision, teacher=teacher, work=case.work | small)


def measure(name: str, folder: str) -> dict[str, int]:
    """In a process of its own: peaks of one case in bytes, beyond what was there before."""
    case = CASES[name]
    if case.work["training"]:
        train(tiny_of(case), folder + "/run")
    else:
        answer(tiny_of(case), folder + "/tiny")
    restart_peak()
    before = resident("VmRSS")
    if case.work["training"]:
        train(case, folder + "/run")
        return {"peak": resident("VmHWM") - before, "framework": before}
    loading = answer(case, folder + "/model")
    return {
        "peak": resident("VmHWM") - before,
        "loading": loading - before,
        "framework": before,
    }


# --- in the process that asks ---------------------------------------------------------------------


def measured(name: str) -> dict[str, int]:
    """Measures a case in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        steps = [("--measure", name)]
        if not CASES[name].work["training"]:
            steps.insert(0, ("--save", name))
        for step in steps:
            done = subprocess.run(
                [sys.executable, __file__, *step, "--folder", folder],
                env=os.environ | ENVIRONMENT,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def estimated(name: str) -> dict[str, Any]:
    """What `eve fits` says of the same case: peak, loading peak and the phases."""
    import torch
    from transformers import CLIPVisionModel

    from eve_vlm.memory.estimate import MemoryModel
    from eve_vlm.memory.formulas import Workload

    case = CASES[name]
    teacher = None
    if case.teacher:
        with torch.device("meta"):
            model = CLIPVisionModel(teacher_config(case))
        teacher = frozen_teacher(case, model)
    memory = MemoryModel(configuration(case), teacher=teacher)
    work = Workload(**case.work)
    # Saved in bfloat16, in one file.
    memory.largest_shard = sum(memory.sizes(work).weights.values()) // 2
    estimate = memory.estimate(work)
    phases = dict(estimate.phases)
    loading = sum(phases.pop("loading", {"": 0}).values())
    peaks = {phase: sum(parts.values()) for phase, parts in phases.items()}
    return {"peak": max(peaks.values()), "loading": loading, "phases": phases}


def compare(names: list[str]) -> list[tuple[str, str, int, int]]:
    """Prints and returns (name, what, estimate, measured); loading is a line of its own."""
    rows: list[tuple[str, str, int, int]] = []
    print("| case | what | estimate, MiB | measured, MiB | ratio |")
    print("|---|---|---|---|---|")
    for name in names:
        guess, real = estimated(name), measured(name)
        found = [(CASES[name].what, guess["peak"], real["peak"])]
        if "loading" in real:
            found.append(("the same, while loading", guess["loading"], real["loading"]))
        for what, low, high in found:
            ratio = f"{low / high:.2f}"
            print(f"| {name} | {what} | {low / MIB:.0f} | {high / MIB:.0f} | {ratio} |", flush=True)
            rows.append((name, what, low, high))
    return rows


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all without")
    parser.add_argument("--framework", action="store_true", help="resident size before any model")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.folder)))
    elif given.save:
        save(CASES[given.save], given.folder + "/model")
        save(tiny_of(CASES[given.save]), given.folder + "/tiny")
    elif given.framework:
        for name in ("weights", "optimizer"):
            print(f"{CASES[name].what}: {measured(name)['framework'] / MIB:.0f} MiB")
    else:
        compare(given.cases or list(CASES))


if __name__ == "__main__":
    main()
