"""What reaches the model in a training step: no mask, and still the outputs that it would give.

Rows are padded behind their end, so a causal decoder sees no padding from where a label is.
Tolerance `SAME` 1e-5 of the largest entry: another kernel may add float32 numbers in another order.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

import tiny
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import Encoder
from eve_vlm.data.rows import Rows, RowSampler
from eve_vlm.data.sources import LlavaSource
from eve_vlm.train.data_log import DataLog
from eve_vlm.train.sections import StageSection
from eve_vlm.train.trainer import EveTrainer
from small_decoders import FAMILIES, decoder_folder

SAME = 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_behind_needs_no_mask(family, tmp_path):
    """States and gradients of every family, sliding windows and learned positions among them."""
    model = AutoModelForCausalLM.from_pretrained(decoder_folder(tmp_path, family))
    ids = torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 9:], mask[1, 20:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    seen = []
    for given in ({"attention_mask": mask}, {}):
        model.zero_grad()
        out = model(input_ids=ids, labels=labels, use_cache=False, **given)
        out.loss.backward()
        gradients = [one.grad for one in model.parameters() if one.grad is not None]
        seen.append([out.logits[mask.bool()].detach(), *gradients])
    for made, expected in zip(*reversed(seen), strict=True):
        assert (made - expected).abs().max() <= SAME * max(1.0, float(expected.abs().max()))


def test_the_trainer_hands_on_no_mask(tmp_path, monkeypatch):
    """But the loss of the model with one."""
    file = tiny.llava_file(tmp_path / "data", records=4)
    processor, model = tiny.processor(), tiny.model()
    encoder = Encoder(processor, format="chat", max_length=256)
    records = [encoder(LlavaSource(file)[index]) for index in range(4)]
    collate = EveCollator(processor.tokenizer.pad_token_id)
    batch = tiny.for_model(collate([[record] for record in records]))
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        expected = float(model.train()(**batch).loss)

    class Records:
        def __len__(self):
            return 4

        def __getitem__(self, row):
            return [records[index] for index in row]

    given = []
    plain = type(model).forward

    def forward(self, **inputs):
        given.append(set(inputs))
        return plain(self, **inputs)

    monkeypatch.setattr(type(model), "forward", forward)
    trainer = EveTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=4,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Records(),
        data_collator=collate,
        stage=StageSection(
            name="finetune",
            trainable=["*"],
            learning_rates={"*": 1e-3},
            weight_decay=0.0,
            alignment=None,
        ),
        data_log=DataLog(RowSampler(Rows(4, seed=0), batch_size=4), max_bad_share=0.0),
    )
    trainer.train()
    assert len(given) == 1 and "attention_mask" not in given[0] and "labels" in given[0]
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert loss == pytest.approx(expected, abs=SAME)
