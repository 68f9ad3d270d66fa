"""`EveTrainer`: one step is the same however it is cut, terms by name, bad records, bad losses.

Tolerance `SAME` 1e-5 (times the largest entry beyond 1): float32 sums cut into micro-batches and
padded to other lengths. What is not touched is compared bit for bit.
"""

import logging
import math

import pytest
import torch
from safetensors import safe_open
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

import tiny
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import BadRecord, Encoder
from eve_vlm.data.encoded_rows import EncodedRows
from eve_vlm.data.rows import Rows, RowSampler
from eve_vlm.data.sources import LlavaSource, Mixture
from eve_vlm.train.data_log import DataLog
from eve_vlm.train.parameters import select_trainable
from eve_vlm.train.sections import AlignmentSection, StageSection
from eve_vlm.train.teacher import FrozenTeacher
from eve_vlm.train.trainer import EveTrainer

SAME = 1e-5
CELLS = tiny.EDGE // tiny.MULTIPLE


class InOrder(Rows):
    """Records in the order of their numbers."""

    def order(self, epoch):
        return torch.arange(self.num_records)


class OneByOne:
    """Rows of a list of encoded records."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, row):
        return [self.records[index] for index in row]


class Gradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(
            {
                name: weight.grad.clone()
                for name, weight in model.named_parameters()
                if weight.grad is not None
            }
        )


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    """Twelve conversations; numbers 3, 7 and 11 are text only."""
    return tiny.llava_file(tmp_path_factory.mktemp("data"), records=12)


def stage(*, trainable=("*",), rates=None, aligned=False, decay=0.0):
    return StageSection(
        name="finetune",
        trainable=list(trainable),
        learning_rates=rates or {"*": 1e-2},
        weight_decay=decay,
        alignment=AlignmentSection(teacher="-") if aligned else None,
    )


def trainer_for(
    data_file,
    folder,
    *,
    batch=2,
    accumulation=1,
    steps=1,
    teacher=None,
    of=None,
    dataset=None,
    in_order=True,
    checkpointing=False,
    weight=1.0,
    max_bad_share=0.0,
    **arguments,
):
    """A trainer of a new tiny model on the file's records."""
    model = tiny.model(tiny.config(aligned=teacher is not None)) if of is None else of
    if teacher is not None:
        model.alignment_weight = weight
    section = arguments.pop("stage", stage(aligned=teacher is not None))
    select_trainable(model, section)
    processor = tiny.processor()
    if dataset is None:
        encoder = Encoder(
            processor,
            format="chat",
            max_length=256,
            teacher_view=teacher.view if teacher else None,
        )
        dataset = EncodedRows(Mixture([LlavaSource(data_file)]), encoder)
    else:
        dataset = OneByOne(dataset)
    rows = (InOrder if in_order else Rows)(len(dataset), seed=0)
    gradients = Gradients()
    made = EveTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            learning_rate=1e-2,
            logging_steps=arguments.pop("logging_steps", 1),
            save_strategy=arguments.pop("save_strategy", "no"),
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            use_cpu=True,
            optim=arguments.pop("optim", "sgd"),
            max_grad_norm=arguments.pop("max_grad_norm", 0.0),
            lr_scheduler_type="constant",
            **arguments,
        ),
        train_dataset=dataset,
        data_collator=EveCollator(processor.tokenizer.pad_token_id),
        stage=section,
        teacher=teacher,
        teacher_side=tiny.MERGE,
        data_log=DataLog(RowSampler(rows, batch_size=batch), max_bad_share=max_bad_share),
        callbacks=[gradients],
    )
    made.remove_callback(PrinterCallback)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made.gradients = gradients
    return made


@pytest.fixture
def teacher(teacher_folder):
    return FrozenTeacher.from_pretrained(str(teacher_folder), cells=CELLS)


def assert_same(made, expected, tolerance=SAME):
    made, expected = made.detach(), expected.detach()
    allowed = tolerance * max(1.0, float(expected.abs().max()))
    assert float((made - expected).abs().max()) <= allowed


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# --- accumulation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_a_step_is_the_same_however_it_is_cut(data_file, tmp_path, teacher, aligned, checkpointing):
    """(8 x 1), (4 x 2), (2 x 4) and (1 x 8): with pictures, text only beside them and alone, aligned.

    One record a micro-batch makes some micro-batches text only, which must weigh nothing in the
    alignment and nothing more than their words in the language loss.
    """
    seen = {}
    for batch, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        trainer = trainer_for(
            data_file,
            tmp_path,
            batch=batch,
            accumulation=accumulation,
            teacher=teacher if aligned else None,
            weight=0.7,
            checkpointing=checkpointing,
        )
        trainer.train()
        terms = ("loss", "loss_lm", "loss_alignment") if aligned else ("loss", "loss_lm")
        seen[batch] = (
            {name: logged(trainer, name)[0] for name in terms},
            trainer.gradients.steps[0],
            dict(trainer.model.named_parameters()),
        )
    losses, gradients, weights = seen[8]
    assert losses["loss"] == pytest.approx(
        losses["loss_lm"] + 0.7 * losses.get("loss_alignment", 0.0), abs=SAME
    )
    for batch in (4, 2, 1):
        assert seen[batch][0] == pytest.approx(losses, abs=SAME)
        assert set(seen[batch][1]) == set(gradients)
        for name, gradient in gradients.items():
            largest = gradient.abs().max() + 1e-9
            assert_same(seen[batch][1][name] / largest, gradient / largest, 1e-4)  # relative
        for name, weight in weights.items():
            assert_same(seen[batch][2][name], weight)


def test_the_first_loss_is_the_models_own(data_file, tmp_path, teacher):
    """Language: the mean over all labels; alignment: the mean over all pictures of the step."""
    trainer = trainer_for(data_file, tmp_path, batch=4, accumulation=2, teacher=teacher)
    model = trainer.model.train()
    collate = EveCollator(0)
    batch = tiny.for_model(collate([trainer.train_dataset[[index]] for index in range(8)]))
    features = teacher.features(
        batch.pop("teacher_pixel_values"), batch["image_grid_thw"], side=tiny.MERGE
    )
    with torch.no_grad():
        out = model(**batch, teacher_features=features)
    trainer.train()
    assert logged(trainer, "loss_lm")[0] == pytest.approx(float(out.loss_terms["lm"]), abs=SAME)
    term = float(out.loss_terms["alignment"])
    assert logged(trainer, "loss_alignment")[0] == pytest.approx(term, abs=SAME)


def test_terms_are_means_over_the_steps_of_a_log(data_file, tmp_path, teacher):
    one = trainer_for(data_file, tmp_path, steps=4, teacher=teacher, logging_steps=1)
    one.train()
    two = trainer_for(data_file, tmp_path, steps=4, teacher=teacher, logging_steps=2)
    two.train()
    for name in ("loss", "loss_lm", "loss_alignment"):
        steps = logged(one, name)
        assert len(steps) == 4
        means = [(steps[0] + steps[1]) / 2, (steps[2] + steps[3]) / 2]
        assert logged(two, name) == pytest.approx(means, abs=SAME)
    assert all(value > 0 for value in logged(two, "tokens_per_second"))


def test_tokens_are_counted_without_padding(data_file, tmp_path, monkeypatch):
    trainer = trainer_for(data_file, tmp_path, batch=4)
    tokens = sum(len(trainer.train_dataset[[index]][0].input_ids) for index in range(4))
    longest = max(len(trainer.train_dataset[[index]][0].input_ids) for index in range(4))
    trainer._sums.started = 0
    monkeypatch.setattr("eve_vlm.train.step_sums.time.perf_counter", lambda: 2)
    trainer.train()
    assert logged(trainer, "tokens_per_second")[0] == tokens / 2
    assert logged(trainer, "utilisation")[0] == pytest.approx(tokens / (4 * longest))
    assert trainer.data_log.num_records == 4


# --- what learns ----------------------------------------------------------------------------------


def test_frozen_weights_stay_bit_for_bit_and_others_move(data_file, tmp_path, teacher):
    """As in prealign: only the patch embedding layer and the aligner learn."""
    ours = ("model.vision_tower.*", "model.multi_modal_projector.*", "aligner.*")
    trainer = trainer_for(
        data_file,
        tmp_path,
        batch=3,
        steps=3,
        teacher=teacher,
        optim="adamw_torch",
        stage=stage(trainable=ours, aligned=True),
    )
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    for name, weight in trainer.model.state_dict().items():
        moves = name.startswith(("model.vision_tower.", "model.multi_modal_projector.", "aligner."))
        assert torch.equal(weight, before[name]) != moves, name


def test_groups_reach_the_optimizer(data_file, tmp_path):
    rates = {"model.vision_tower.*": 3e-3, "*": 1e-4}
    trainer = trainer_for(
        data_file, tmp_path, optim="adamw_torch", stage=stage(rates=rates, decay=0.1)
    )
    trainer.train()
    names = {weight: name for name, weight in trainer.model.named_parameters()}
    settings = {
        names[weight]: (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for weight in group["params"]
    }
    assert settings["model.vision_tower.merge_attention.output.weight"] == (3e-3, 0.1)
    assert settings["model.vision_tower.merge_attention.output.bias"] == (3e-3, 0.0)
    assert settings["model.vision_tower.merge_attention.query_norm.weight"] == (3e-3, 0.0)
    assert settings["lm_head.weight"] == (1e-4, 0.1)
    assert settings["model.language_model.norm.weight"] == (1e-4, 0.0)
    assert len(settings) == len(names)


# --- teacher --------------------------------------------------------------------------------------


def test_the_teacher_is_never_trained_or_saved(data_file, tmp_path, teacher):
    before = {name: weight.clone() for name, weight in teacher.model.state_dict().items()}
    trainer = trainer_for(
        data_file, tmp_path, steps=2, teacher=teacher, save_strategy="steps", save_steps=1
    )
    trainer.train()
    assert not teacher.model.training and trainer.model.training
    for name, weight in teacher.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert all(weight.grad is None for weight in teacher.model.parameters())
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) == 2
    own = set(trainer.model.state_dict())
    for checkpoint in checkpoints:
        with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
            assert set(file.keys()) <= own
        optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=False)
        count = sum(len(group["params"]) for group in optimizer["param_groups"])
        assert count == len(list(trainer.model.parameters()))


# --- bad records ----------------------------------------------------------------------------------


class Spoilt:
    """A data set with some records replaced by reasons."""

    def __init__(self, records, bad, size=None):
        self.records, self.bad, self.size = records, set(bad), size or len(records)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.bad:
            return BadRecord(f"Record {index}: broken")
        return self.records[index % len(self.records)]


@pytest.fixture(scope="module")
def records(data_file):
    encoder = Encoder(tiny.processor(), format="chat", max_length=256)
    return [encoder(record) for record in LlavaSource(data_file)]


def test_bad_records_are_counted_named_and_left_out(data_file, tmp_path, records, caplog):
    """The step is that of the usable records alone."""
    spoilt = trainer_for(
        data_file, tmp_path, batch=4, dataset=Spoilt(records, [1, 2]), max_bad_share=0.5
    )
    with caplog.at_level(logging.WARNING, logger="eve_vlm"):
        spoilt.train()
    alone = trainer_for(
        data_file, tmp_path, batch=2, dataset=[records[0], records[3]], max_bad_share=0.0
    )
    alone.train()
    assert spoilt.data_log.reasons() == {"Record 1: broken": 1, "Record 2: broken": 1}
    assert spoilt.data_log.num_records == 4
    assert "left out: Record 1: broken" in caplog.text
    assert logged(spoilt, "left_out_records") == [2] and not logged(alone, "left_out_records")
    assert logged(spoilt, "loss") == pytest.approx(logged(alone, "loss"), abs=SAME)
    for name, gradient in alone.gradients.steps[0].items():
        assert_same(spoilt.gradients.steps[0][name], gradient)


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 1), (2, 1), (1, 2)])
def test_batches_without_a_usable_record_do_not_end_a_run(
    data_file, tmp_path, records, batch, accumulation
):
    """Steps of nothing but bad records move nothing, and the others go on."""
    trainer = trainer_for(
        data_file,
        tmp_path,
        batch=batch,
        accumulation=accumulation,
        steps=3,
        dataset=Spoilt(records, [0, 1, 2]),
        max_bad_share=0.5,
    )
    trainer.train()
    assert len(trainer.data_log.bad) == 3
    losses = logged(trainer, "loss")
    assert losses[0] == 0.0 and all(math.isfinite(loss) for loss in losses)
    first = trainer.gradients.steps[0].values()
    assert all(bool((gradient == 0).all()) for gradient in first)
    for name, weight in trainer.model.named_parameters():
        assert bool(weight.isfinite().all()), name


def test_too_many_bad_records_stop_the_run(data_file, tmp_path, records):
    """Judged from the first 200 on, so that one bad record in front is no reason to stop."""
    dataset = Spoilt(records, range(100, 110), size=400)
    trainer = trainer_for(
        data_file, tmp_path, batch=10, steps=30, dataset=dataset, max_bad_share=0.02
    )
    with pytest.raises(ValueError) as caught:
        trainer.train()
    text = str(caught.value)
    # Five of 200 are more than two percent; they come in the eleventh batch, all ten at once.
    assert "10 of the first 110 records" in text and "0.02" in text and "max_bad_share" in text
    assert "Record 109: broken" in text


def test_no_bad_record_is_allowed_unless_said(data_file, tmp_path, records):
    trainer = trainer_for(data_file, tmp_path, dataset=Spoilt(records, [1]))
    with pytest.raises(ValueError, match="1 of the first 2 records cannot be used"):
        trainer.train()


def test_a_long_list_of_bad_records_is_not_all_logged(data_file, tmp_path, records, caplog):
    trainer = trainer_for(
        data_file,
        tmp_path,
        batch=50,
        dataset=Spoilt(records, range(40), size=400),
        max_bad_share=0.5,
    )
    with caplog.at_level(logging.WARNING, logger="eve_vlm"):
        trainer.train()
    assert caplog.text.count("left out: ") == 20 and len(trainer.data_log.bad) == 40


# --- bad losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run(data_file, tmp_path, value):
    trainer = trainer_for(data_file, tmp_path, steps=4)
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(value)
    with pytest.raises(
        ValueError, match=r"became (nan|inf) by step 1; lower stage\.learning_rates"
    ):
        trainer.train()
