"""The model against slow loops, the bare decoder, and itself done another way.

Tolerances, for float32 unless a test says otherwise:
  - `SAME` 2e-5: the same sums in another order (padding, batching, cache, eager), at activations up
    to 10 and logits up to 60 in these models with their large weights; relative beyond 1;
  - everything that should be the same operations on the same numbers is compared bit for bit.
"""

import copy
import time

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    pipeline,
)

import tiny
from eve_vlm import (
    EveAlignmentConfig,
    EveConfig,
    EveForConditionalGeneration,
    EveForPreTraining,
    EveModel,
    EvePatchEmbedding,
    EveVisionConfig,
)
from eve_vlm.patch_embedding_eve import PackedGrid
from oracle import patch_embedding as slow
from oracle.published_shape import official

SAME = 2e-5
# One cell, one row, one column, odd sides, squares, and cells left over on no side.
GRIDS = [(1, 1), (1, 4), (4, 1), (3, 3), (2, 5), (1, 1), (5, 2), (4, 4)]


def assert_same(made, expected, tolerance=SAME):
    allowed = tolerance * max(1.0, float(expected.abs().max()))
    difference = float((made - expected).abs().max())
    assert difference <= allowed, f"{difference} is more than {allowed}"


def tokens_of(grid):
    rows, cols = grid
    return 1 + rows * (cols + 1)


def inputs_for(grids_of_rows, *, seed=0, side="left"):
    """A padded batch: words, then each of the row's pictures and a word behind it."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for row, grids in enumerate(grids_of_rows):
        ids = torch.randint(10, 300, (4 + 3 * row,), generator=generator).tolist()
        for grid in grids:
            ids += [3] * tokens_of(grid)
            ids += torch.randint(10, 300, (2,), generator=generator).tolist()
        texts.append(ids)
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(longest - len(text), None) if side == "left" else slice(0, len(text))
        ids[row, place] = torch.tensor(text)
        mask[row, place] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    grids = [grid for row in grids_of_rows for grid in row]
    return batch | (tiny.packed(grids, seed=seed) if grids else {})


def labelled(batch):
    """Labels at every word, none at pictures and padding."""
    learnt = (batch["attention_mask"] == 1) & (batch["input_ids"] != 3)
    return batch | {"labels": batch["input_ids"].masked_fill(~learnt, -100)}


MIXED = [[(2, 3)], [], [(1, 1), (3, 2)], [(1, 4)]]


# --- patch embedding ------------------------------------------------------------------------------


def oracle_weights(tower):
    """In float64, by the names that the oracle knows."""
    return official({name: weight.double() for name, weight in tower.state_dict().items()})


def unpacked(pixels, rows, cols):
    """One picture's packed patches laid out as (3, height, width), patch by patch."""
    picture = torch.empty(3, rows * 2 * tiny.PATCH, cols * 2 * tiny.PATCH, dtype=pixels.dtype)
    patches = iter(pixels.view(-1, 3, tiny.PATCH, tiny.PATCH))
    for row in range(rows):
        for col in range(cols):
            for y in range(2):
                for x in range(2):
                    top, left = (2 * row + y) * tiny.PATCH, (2 * col + x) * tiny.PATCH
                    picture[:, top : top + tiny.PATCH, left : left + tiny.PATCH] = next(patches)
    return picture


@torch.no_grad()
def test_patch_embedding_equals_slow_loops(model):
    """Against float64 loops, on all grids in one batch; 1e-5 is what float32 sums of 48 allow."""
    tower = model.model.vision_tower
    weights = oracle_weights(tower)
    batch = tiny.packed(GRIDS)
    made = tower(**batch)
    place, patch = 0, 0
    for rows, cols in GRIDS:
        pixels = batch["pixel_values"][patch : patch + 4 * rows * cols].double()
        expected = slow.embed(unpacked(pixels, rows, cols), weights).sequence
        assert_same(made[place : place + len(expected)], expected, 1e-5)
        place, patch = place + len(expected), patch + 4 * rows * cols
    assert place == len(made)


@torch.no_grad()
def test_patch_embedding_on_random_mixes(model):
    """Batch equals single, for random mixes of sizes."""
    tower = model.model.vision_tower
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        count = int(torch.randint(1, 7, (1,), generator=generator))
        grids = torch.randint(1, 9, (count, 2), generator=generator).tolist()
        batch = tiny.packed(grids, seed=seed)
        pieces = batch["pixel_values"].split(batch["image_grid_thw"].prod(-1).tolist())
        singles = [
            tower(piece, grid[None])
            for piece, grid in zip(pieces, batch["image_grid_thw"], strict=True)
        ]
        assert [len(single) for single in singles] == [tokens_of(grid) for grid in grids]
        assert_same(tower(**batch), torch.cat(singles))


def test_packed_positions_equal_loops():
    thw = torch.tensor([(1, 2 * rows, 2 * cols) for rows, cols in GRIDS])
    grid = PackedGrid.from_grid_thw(thw, 2)
    cells, classes, owners, place = [], [], [], 0
    for image, (rows, cols) in enumerate(GRIDS):
        classes.append(place)
        place += 1
        for _ in range(rows):
            for _ in range(cols):
                cells.append(place)
                owners.append(image)
                place += 1
            place += 1
    assert grid.cell_position.tolist() == cells
    assert grid.class_position.tolist() == classes
    assert grid.image_of_cell.tolist() == owners
    assert grid.num_tokens == place == int(grid.tokens_per_image.sum())


def test_gradients_of_the_patch_embedding():
    """Against finite differences in float64, for pixels and every weight (gradcheck's own 1e-5)."""
    tower = copy.deepcopy(tiny.model().model.vision_tower).double()
    batch = tiny.packed([(1, 2), (1, 1)])
    pixels = batch["pixel_values"].double().requires_grad_()
    names = [name for name, _ in tower.named_parameters()]

    def embed(pixels, *weights):
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(tower, named, (pixels, batch["image_grid_thw"]))

    weights = tuple(weight.detach().clone().requires_grad_() for weight in tower.parameters())
    assert torch.autograd.gradcheck(embed, (pixels, *weights), fast_mode=True)


def float64_tokens(tower, batch):
    exact = copy.deepcopy(tower).double()
    return exact(batch["pixel_values"].double(), batch["image_grid_thw"])


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_weights_still_sum_in_float32(autocast):
    """With the same rounded weights, only the arithmetic differs from float64's.

    Measured: 1e-6 in float32; bfloat16's own arithmetic, with 8 bits, is 1e-2 away.
    """
    tower = copy.deepcopy(tiny.model().model.vision_tower).bfloat16()
    batch = tiny.packed(GRIDS)
    expected = float64_tokens(tower, batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made = tower(**batch)
    assert made.dtype == torch.float32
    ours = float((made - expected).abs().max())
    weight = tower.patch_projection.weight.flatten(1)
    patches = (
        batch["pixel_values"].bfloat16() @ weight.T
    )  # what plain bfloat16 would do, first step
    exact = batch["pixel_values"].double() @ weight.double().T
    plain = float((patches - exact).abs().max())
    assert ours <= 1e-5 and ours < plain / 1000


@torch.no_grad()
def test_half_precision_does_not_overflow():
    """Pixels and weights so large that a sum is beyond float16's 65,504, and the answer is not."""
    tower = copy.deepcopy(tiny.model().model.vision_tower)
    tower.patch_projection.weight.fill_(50.0)
    tower = tower.half()
    batch = tiny.packed(GRIDS)
    batch["pixel_values"] = torch.full_like(batch["pixel_values"], 60.0)
    sums = batch["pixel_values"].half() @ tower.patch_projection.weight.flatten(1).T
    assert bool(sums.isinf().any())  # 48 x 50 x 60 = 144,000
    made = tower(**batch)
    assert bool(made.isfinite().all())
    assert_same(made, float64_tokens(tower, batch), 1e-5)


def test_whole_model_in_bfloat16_runs_and_stays_close():
    """bfloat16 has 8 bits: 3 layers of it move logits by a few percent, no more."""
    batch = inputs_for(MIXED, side="right")
    with torch.no_grad():
        exact = tiny.model(tiny.config(initializer_range=0.05))
        expected = exact(**batch).logits
        made = copy.deepcopy(exact).bfloat16()(**batch).logits
    assert made.dtype == torch.bfloat16
    kept = batch["attention_mask"].bool()
    assert_same(made[kept].float(), expected[kept], 0.05)


@pytest.mark.parametrize(
    ("pixels", "thw", "parts"),
    [
        (torch.zeros(4, 147), [[1, 2, 2]], ("(4, 147)", "48", "4 pixels")),
        (torch.zeros(4, 3, 4, 4), [[1, 2, 2]], ("(4, 3, 4, 4)",)),
        (torch.zeros(4, 48), [[1, 2, 4]], ("4 patches", "8")),
    ],
)
def test_pixels_that_do_not_fit_are_refused(model, pixels, thw, parts):
    with pytest.raises(ValueError) as caught:
        model.model.vision_tower(pixels, torch.tensor(thw))
    for part in parts:
        assert part in str(caught.value)


# --- pictures among words -------------------------------------------------------------------------


@pytest.mark.parametrize("change", [-1, 1, -21])
def test_placeholders_and_pictures_must_agree(model, change):
    grid = (4, 4)
    count = tokens_of(grid) + change
    ids = torch.tensor([[1] + [3] * count + [7, 8]])
    with pytest.raises(ValueError, match=f"{count} image placeholders .* {tokens_of(grid)} tokens"):
        model(input_ids=ids, **tiny.packed([grid]))


def test_placeholders_without_pictures_are_refused(model):
    with pytest.raises(ValueError, match="5 image placeholders"):
        model(input_ids=torch.tensor([[1, 3, 3, 3, 3, 3, 9]]))


@torch.no_grad()
@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3_text"]
)
def test_text_alone_is_the_bare_decoder_bit_for_bit(model_type):
    made = tiny.model(tiny.config(model_type=model_type))
    bare = AutoModelForCausalLM.from_config(made.config.text_config).eval()
    bare.base_model.load_state_dict(made.model.language_model.state_dict())
    bare.get_output_embeddings().load_state_dict(made.lm_head.state_dict())
    for side in ("left", "right"):
        batch = inputs_for([[], [], []], side=side)
        expected = bare(**batch)
        ours = made(**batch)
        assert torch.equal(ours.logits, expected.logits)
        hidden = bare.base_model(**batch).last_hidden_state
        assert torch.equal(made.model(**batch).last_hidden_state, hidden)


@torch.no_grad()
def test_pictures_stand_where_their_placeholders_are(model):
    """The decoder gets exactly words and picture tokens, in the order of the text."""
    batch = inputs_for(MIXED)
    features = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    words = model.get_input_embeddings()(batch["input_ids"])
    words[batch["input_ids"] == 3] = features.last_hidden_state
    seen = {}
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**batch)
    handle.remove()
    assert torch.equal(seen["inputs_embeds"], words)
    sizes = [tokens_of(grid) for row in MIXED for grid in row]
    assert [len(piece) for piece in features.pooler_output] == sizes
    assert torch.equal(torch.cat(features.pooler_output), features.last_hidden_state)


@torch.no_grad()
def test_another_picture_changes_the_answer(model):
    """Else half of the tests here would hold for a model that is blind."""
    batch = inputs_for([[(2, 3)]])
    other = batch | tiny.packed([(2, 3)], seed=5)
    difference = (model(**batch).logits[:, -1] - model(**other).logits[:, -1]).abs().max()
    assert difference > 0.1


@torch.no_grad()
def test_placeholder_id_may_lie_beyond_the_vocabulary():
    """As in the published checkpoints: 32,000 words have no row for id 32000."""
    of = tiny.config()
    of.image_token_id = 300
    beyond = tiny.model(of)
    batch = inputs_for(MIXED)
    inside = tiny.model()
    expected = inside(**batch).logits
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == 3, 300)
    assert torch.equal(beyond(**batch).logits, expected)


@torch.no_grad()
def test_embeddings_may_come_instead_of_ids(model):
    batch = inputs_for(MIXED)
    expected = model(**batch).logits
    ids = batch.pop("input_ids")
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded, **batch).logits, expected)
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=ids, inputs_embeds=embedded)
    with pytest.raises(ValueError, match="exactly one"):
        model(attention_mask=batch["attention_mask"])


@torch.no_grad()
def test_encoded_pictures_may_come_instead_of_pixels(model):
    batch = inputs_for(MIXED)
    expected = model(**batch).logits
    pixels, grids = batch.pop("pixel_values"), batch.pop("image_grid_thw")
    encoded = {"image": model.get_image_features(pixels, grids)}
    assert torch.equal(model(mm_encoder_outputs=encoded, **batch).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_and_padding_change_nothing(model, side):
    batch = inputs_for(MIXED, side=side)
    made = model(**batch).logits
    pixels = iter(batch["pixel_values"].split(batch["image_grid_thw"].prod(-1).tolist()))
    grids = iter(batch["image_grid_thw"])
    for row, images in enumerate(MIXED):
        kept = batch["attention_mask"][row].bool()
        alone = {"input_ids": batch["input_ids"][row][kept][None]}
        if images:
            alone["pixel_values"] = torch.cat([next(pixels) for _ in images])
            alone["image_grid_thw"] = torch.stack([next(grids) for _ in images])
        assert_same(made[row][kept], model(**alone).logits[0])


@torch.no_grad()
def test_padding_by_any_amount_changes_nothing(model):
    """Total lengths around multiples of 32, where kernels change (transformers#47651)."""
    batch = inputs_for([[(2, 3)]])
    expected = model(**batch).logits[0, -1]
    length = batch["input_ids"].shape[1]
    for total in (31, 32, 33, 63, 64, 65):
        pad = torch.zeros(1, total - length, dtype=torch.long)
        padded = batch | {
            "input_ids": torch.cat([pad, batch["input_ids"]], 1),
            "attention_mask": torch.cat([pad, batch["attention_mask"]], 1),
        }
        assert_same(model(**padded).logits[0, -1], expected)


@torch.no_grad()
def test_with_and_without_cache(model):
    """A prompt with pictures at once, then word by word through the cache."""
    batch = inputs_for(MIXED)
    expected = model(**batch, use_cache=False).logits
    first = batch["input_ids"].shape[1] - 2
    cache = DynamicCache(config=model.config.text_config)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    made = model(
        input_ids=batch["input_ids"][:, :first],
        attention_mask=batch["attention_mask"][:, :first],
        position_ids=positions[:, :first],
        pixel_values=batch["pixel_values"],
        image_grid_thw=batch["image_grid_thw"],
        past_key_values=cache,
        use_cache=True,
    )
    logits = [made.logits]
    for place in range(first, first + 2):
        step = model(
            input_ids=batch["input_ids"][:, place : place + 1],
            attention_mask=batch["attention_mask"][:, : place + 1],
            position_ids=positions[:, place : place + 1],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(step.logits)
    kept = batch["attention_mask"].bool()
    assert_same(torch.cat(logits, 1)[kept], expected[kept])


@torch.no_grad()
def test_eager_equals_sdpa():
    batch = inputs_for(MIXED)
    kept = batch["attention_mask"].bool()
    sdpa, eager = tiny.model(), tiny.model(attn_implementation="eager")
    assert sdpa.model.language_model.config._attn_implementation == "sdpa"
    assert eager.model.language_model.config._attn_implementation == "eager"
    assert_same(eager(**batch).logits[kept], sdpa(**batch).logits[kept])


@torch.no_grad()
def test_hidden_states_and_attentions_are_the_decoders(model):
    batch = inputs_for(MIXED)
    eager = tiny.model(attn_implementation="eager")
    out = eager(**batch, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == tiny.LAYERS + 1 and len(out.attentions) == tiny.LAYERS
    assert out.attentions[0].shape[0] == len(MIXED)
    assert torch.equal(
        out.image_hidden_states,
        eager.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).last_hidden_state,
    )


@torch.no_grad()
def test_logits_to_keep(model):
    batch = inputs_for(MIXED)
    everything = model(**batch).logits
    assert_same(model(**batch, logits_to_keep=1).logits, everything[:, -1:])
    places = torch.tensor([2, 5])
    assert_same(model(**batch, logits_to_keep=places).logits, everything[:, places])


# --- training -------------------------------------------------------------------------------------


def train_step(model, batch, **settings):
    """Loss and gradients in train mode."""
    model.train()
    model.zero_grad()
    loss = model(**batch, **settings).loss
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


def assert_same_gradients(made, expected):
    """1e-5 of the largest entry of each: float32 sums in another order."""
    for name, gradient in expected.items():
        assert (gradient is None) == (made[name] is None), name
        if gradient is not None:
            assert_same(
                made[name] / (1e-9 + gradient.abs().max()),
                gradient / (1e-9 + gradient.abs().max()),
                1e-5,
            )


@torch.no_grad()
def test_loss_is_the_mean_over_labels(model):
    """The head runs only where labels are; the loss is that of all logits."""
    batch = labelled(inputs_for(MIXED, side="right"))
    out = model(**batch)
    plain = nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    assert_same(out.loss, plain)
    count = int((batch["labels"][:, 1:] != -100).sum())
    for items in (7, torch.tensor(7)):
        assert_same(model(**batch, num_items_in_batch=items).loss, plain * count / 7)
    assert torch.equal(out.loss_terms["lm"], out.loss)


def test_training_makes_no_logits_and_evaluation_does(model):
    batch = labelled(inputs_for(MIXED))
    made = copy.deepcopy(model)
    assert made.train()(**batch).logits is None
    assert made.eval()(**batch).logits is not None


def test_labels_without_anything_to_learn_give_zero(model):
    batch = inputs_for(MIXED)
    out = copy.deepcopy(model).train()(**batch, labels=torch.full_like(batch["input_ids"], -100))
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0


@pytest.mark.parametrize("aligned", [False, True])
def test_gradient_checkpointing_changes_nothing(aligned):
    batch = labelled(inputs_for(MIXED))
    if aligned:
        cells = sum(rows * cols for row in MIXED for rows, cols in row)
        generator = torch.Generator().manual_seed(3)
        batch["teacher_features"] = torch.randn(cells, tiny.TEACHER_WIDTH, generator=generator)
    made = tiny.model(tiny.config(aligned=aligned))
    loss, gradients = train_step(made, batch)
    for kwargs in ({"use_reentrant": False}, None):
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        assert made.model.language_model.layers[0].gradient_checkpointing
        again, checkpointed = train_step(made, batch)
        assert torch.equal(loss, again)
        assert_same_gradients(checkpointed, gradients)


@pytest.mark.parametrize("aligned", [False, True])
def test_text_alone_touches_every_weight_with_zero(aligned):
    """A rank without pictures must not leave other ranks waiting; the loss is not moved by it."""
    made = tiny.model(tiny.config(aligned=aligned))
    batch = labelled(inputs_for([[], []]))
    loss, gradients = train_step(made, batch)
    with torch.no_grad():
        assert torch.equal(loss, made.eval()(**batch).loss)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        ours = name.startswith(("model.vision_tower.", "model.multi_modal_projector.", "aligner."))
        assert bool((gradient == 0).all()) == ours, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(checkpointing, attention):
    """One row with restarting positions and no mask, in train mode, equals separate rows.

    A cache that is made by mistake would let them see each other, and checkpointing would hide it.
    """
    made = tiny.model(attn_implementation=attention)
    documents = [inputs_for([row], seed=index) for index, row in enumerate(MIXED)]
    if checkpointing:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, labels, positions, pixels, grids = [], [], [], [], []
    for document in documents:
        document = labelled(document)
        length = document["input_ids"].shape[1]
        ids.append(document["input_ids"])
        # The first label of a document has no word before it to be told from.
        labels.append(torch.cat([torch.tensor([[-100]]), document["labels"][:, 1:]], 1))
        positions.append(torch.arange(length)[None])
        if "pixel_values" in document:
            pixels.append(document["pixel_values"])
            grids.append(document["image_grid_thw"])
    packed = {
        "input_ids": torch.cat(ids, 1),
        "labels": torch.cat(labels, 1),
        "position_ids": torch.cat(positions, 1),
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.cat(grids),
    }
    count = int((packed["labels"][:, 1:] != -100).sum())
    loss, gradients = train_step(made, packed)
    made.zero_grad()
    total = torch.zeros(())
    for document, target in zip(documents, labels, strict=True):
        part = {name: value for name, value in document.items() if name != "attention_mask"}
        piece = made(**part, labels=target, num_items_in_batch=count).loss
        piece.backward()
        total += piece.detach()
    separate = {name: weight.grad for name, weight in made.named_parameters()}
    assert_same(loss, total)
    assert_same_gradients(gradients, separate)
    # And the other order of documents would be seen, if they saw each other.
    leaky = dict(packed, attention_mask=torch.ones_like(packed["input_ids"]))
    assert abs(float(made(**leaky).loss.detach()) - float(loss)) > 1e-2


def test_tapped_layers_are_the_hidden_states(model):
    """Taps read layers' outputs by hooks; they equal what the library returns, and leave no hook."""
    batch = inputs_for(MIXED)
    taps = (3, 2, 1, 0)
    layers = model.model.language_model.layers
    model.model(**batch, output_hidden_states=True)  # the library leaves hooks of its own
    before = [len(layer._forward_hooks) for layer in layers]
    with torch.no_grad():
        out = model.model(**batch, image_taps=taps, output_hidden_states=True)
    mask = batch["input_ids"] == 3
    for tap, state in zip(taps, out.image_taps, strict=True):
        assert torch.equal(state, out.hidden_states[tap][mask])
    assert [len(layer._forward_hooks) for layer in layers] == before
    words = model.model(**inputs_for([[]]), image_taps=taps).image_taps
    assert [tuple(state.shape) for state in words] == [(0, tiny.WIDTH)] * 4


def test_hooks_are_taken_off_after_an_error(model):
    layers = model.model.language_model.layers
    before = [len(layer._forward_hooks) for layer in layers]
    batch = inputs_for(MIXED) | {"position_ids": torch.zeros(1, 3, 1, dtype=torch.long)}
    with pytest.raises(Exception):  # noqa: B017 - whatever the decoder says to nonsense
        model.model(**batch, image_taps=(2, 1))
    assert [len(layer._forward_hooks) for layer in layers] == before


# --- size and construction ------------------------------------------------------------------------


def test_parameters_of_the_published_7b_model():
    EveModel(tiny.config())  # the decoder's file is imported before the clock runs
    seconds = []
    for _ in range(2):
        before = time.process_time()
        with torch.device("meta"):
            answering = EveForConditionalGeneration(EveConfig())
        seconds.append(time.process_time() - before)
    assert min(seconds) < 1, "a 7B model has to be built in under a second"
    count = {name: weight.numel() for name, weight in answering.named_parameters()}
    assert sum(count.values()) == 6_768_398_336
    ours = ("model.vision_tower.", "model.multi_modal_projector.")
    assert sum(size for name, size in count.items() if name.startswith(ours)) == 29_982_720
    with torch.device("meta"):
        training = EveForPreTraining(EveConfig(alignment_config=EveAlignmentConfig()))
    more = training.num_parameters() - answering.num_parameters()
    assert more == sum(weight.numel() for weight in training.aligner.parameters()) == 43_067_392


@torch.no_grad()
def test_new_weights_are_as_documented():
    """Uniform within 1/sqrt(fan in), norms one and zero, embeddings standard normal."""
    of = EveVisionConfig(patch_size=4, hidden_size=256, num_attention_heads=8)
    wide = EvePatchEmbedding._from_config(of)
    bound = 48**-0.5
    weight = wide.patch_projection.weight
    assert float(weight.abs().max()) <= bound
    # 12,288 uniform numbers: their standard deviation is known to half a percent.
    assert abs(float(weight.std()) / (bound / 3**0.5) - 1) < 0.03
    assert bool((wide.merge_attention.query_norm.weight == 1).all())
    assert bool((wide.merge_attention.query_norm.bias == 0).all())
    assert 0.8 < float(wide.class_embedding.std()) < 1.2
    linear = wide.class_attention.output
    assert float(linear.weight.abs().max()) <= 256**-0.5 and float(linear.bias.abs().max()) > 0
    decoder = tiny.model(tiny.config(initializer_range=0.05)).model.language_model
    assert abs(float(decoder.embed_tokens.weight.std()) / 0.05 - 1) < 0.05


def test_tied_and_untied_heads():
    tied = tiny.model(tiny.config(tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    untied = tiny.model()
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight


def test_vocabulary_may_grow():
    grown = tiny.model()
    grown.resize_token_embeddings(310)
    assert grown.get_input_embeddings().weight.shape[0] == grown.lm_head.weight.shape[0] == 310
    assert grown.config.text_config.vocab_size == 310


# --- saving, loading, Auto classes ----------------------------------------------------------------


@torch.no_grad()
def test_saved_folders_load_with_nothing_else_on_disk(saved_model, model):
    names = {file.name for file in saved_model.iterdir()}
    assert "model.safetensors" in names and not any(
        name.endswith((".bin", ".py")) for name in names
    )
    batch = inputs_for(MIXED)
    expected = model(**batch).logits
    for cls in (EveForConditionalGeneration, AutoModelForImageTextToText):
        loaded = cls.from_pretrained(saved_model)
        assert type(loaded) is EveForConditionalGeneration
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, loaded.state_dict()[name]), name
        # Not bit for bit: a loaded weight lies elsewhere in memory, which changes the kernels' sums.
        assert_same(loaded.eval()(**batch).logits, expected)
    backbone = AutoModel.from_pretrained(saved_model)
    assert type(backbone) is EveModel
    assert_same(backbone.eval()(**batch).last_hidden_state, model.model(**batch).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_survives_saving(tmp_path, tied, dtype):
    made = tiny.model(tiny.config(tie_word_embeddings=tied)).to(dtype)
    made.save_pretrained(tmp_path)
    loaded, report = EveForConditionalGeneration.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, weight), (same, again) in zip(
        made.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == same and weight.dtype == again.dtype == dtype and torch.equal(weight, again)


def test_sharded_checkpoints(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = EveForConditionalGeneration.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


def test_pipeline_from_a_folder(saved_model, model, processor):
    """`pipeline("image-text-to-text")` knows the model, and answers as the model does."""
    picture = tiny.picture(20, 32)
    messages = tiny.conversation("What is this?")
    messages[0]["content"][0] = {"type": "image", "image": picture}
    ask = pipeline("image-text-to-text", model=str(saved_model), device="cpu")
    said = ask(text=messages, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(
        **{
            name: inputs[name]
            for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
        },
        max_new_tokens=6,
        do_sample=False,
    )
    new = output[0, inputs["input_ids"].shape[1] :]
    assert said == processor.decode(new, skip_special_tokens=True)
