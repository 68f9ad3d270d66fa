"""Records to arrays: labels are exactly the answers, and what cannot be used says why.

Everything is compared exactly. Labels are checked by decoding them, which needs no second tokeniser.
"""

import re

import numpy as np
import pytest
from PIL import Image, ImageOps

import tiny
from eve_vlm import num_image_tokens
from eve_vlm.data.encode import IGNORED, Encoder
from eve_vlm.data.records import Record
from eve_vlm.data.teacher_view import TeacherView
from eve_vlm.processing_eve import SHORT_CHAT_TEMPLATE, VICUNA_CHAT_TEMPLATE

# In the manner of SmolLM2's: a default system sentence, and turns that end in a line break.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# In the manner of Qwen3's: earlier thoughts vanish when a turn is added.
FORGETFUL = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for part in message['content'] %}{{ part.get('text', '<image>') }}{% endfor %}"
    "{% if loop.last %}{{ ' (thinking)' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def processor(template=VICUNA_CHAT_TEMPLATE):
    made = tiny.processor(chat_template=template)
    if template == CHATML:
        made.tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
        )
    return made


def encoder(template=VICUNA_CHAT_TEMPLATE, *, format="chat", max_length=256, **settings):
    return Encoder(processor(template), format=format, max_length=max_length, **settings)


def record(messages, images=(), id="r1"):
    return Record(id=id, messages=messages, images=list(images))


def learnt(encoder, encoded):
    """The labelled stretches as text."""
    pieces, inside = [], False
    for label in encoded.labels:
        if label == IGNORED:
            inside = False
        elif inside:
            pieces[-1].append(label)
        else:
            pieces.append([label])
            inside = True
    return [encoder.processor.tokenizer.decode(piece) for piece in pieces]


TWO_TURNS = [
    *tiny.conversation("What is this?", "a red square"),
    *tiny.conversation("And what does ASSISTANT: mean?", "two</s>  words ", pictures=0),
]


# --- labels ---------------------------------------------------------------------------------------


def test_vicuna_labels_are_the_answers_and_their_ends():
    made = encoder()
    encoded = made(record(TWO_TURNS, [tiny.picture(20, 32)]))
    # The blank after "ASSISTANT:" is part of the answer's first token, as in published training.
    assert learnt(made, encoded) == [" a red square</s>", " two</s>  words </s>"]
    assert made.processor.tokenizer.eos_token_id == encoded.labels[-1]


def test_plain_labels_are_the_caption_and_a_line_break():
    made = encoder(format="plain")
    encoded = made(record(tiny.conversation("Describe it.", "a red square"), [tiny.picture(8, 8)]))
    text = made.processor.tokenizer.decode(encoded.input_ids)
    marks = "<image>" * num_image_tokens(4, 4)
    assert text.replace(" ", "") == f"<s>{marks}aredsquare\n"  # the user's words are left out
    assert "".join(learnt(made, encoded)).strip(" ") == "a red square\n"
    assert (encoded.labels != IGNORED).sum() == len(encoded.input_ids) - 1 - num_image_tokens(4, 4)


def test_chatml_labels_are_the_answers_and_their_ends():
    """The end mark is learnt, the line break that the template puts behind it is not."""
    made = encoder(CHATML)
    encoded = made(record(TWO_TURNS, [tiny.picture(20, 32)]))
    pieces = learnt(made, encoded)
    assert [piece.strip(" ") for piece in pieces] == [
        "a red square<|im_end|>",
        "two</s>  words <|im_end|>",
    ]
    text = made.processor.tokenizer.decode(encoded.input_ids)
    assert text.count("system") == 1  # the template's own system turn stays unlearnt


@pytest.mark.parametrize("template", [VICUNA_CHAT_TEMPLATE, CHATML])
def test_labels_stand_under_their_own_tokens(template):
    encoded = encoder(template)(record(TWO_TURNS, [tiny.picture(20, 32)]))
    kept = encoded.labels != IGNORED
    assert (encoded.labels[kept] == encoded.input_ids[kept]).all()
    assert encoded.input_ids.shape == encoded.labels.shape


@pytest.mark.parametrize("template", [VICUNA_CHAT_TEMPLATE, CHATML])
def test_the_prompt_is_what_generation_will_see(template):
    """Tokens before the first answer equal the tokens of a generation prompt."""
    made = encoder(template)
    encoded = made(record(TWO_TURNS[:2], [tiny.picture(20, 32)]))
    prompt = made.processor.tokenizer.apply_chat_template(
        TWO_TURNS[:1], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    ids = made.processor(text=prompt, images=[tiny.picture(20, 32)], add_special_tokens=False)
    first = int((encoded.labels != IGNORED).argmax())
    assert encoded.input_ids[:first].tolist() == ids["input_ids"][0]


@pytest.mark.parametrize("template", [VICUNA_CHAT_TEMPLATE, SHORT_CHAT_TEMPLATE])
def test_marked_answers_are_those_that_rendering_step_by_step_finds(template):
    """Templates with `generation` marks are rendered once; without them, turn by turn."""
    unmarked = re.sub(r"{%-\s*(end)?generation\s*-%}", "{#- -#}", template)
    assert "generation -" not in unmarked and unmarked != template
    pictures = [tiny.picture(20, 32), tiny.picture(5, 5)]
    system = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}]
    several = [*tiny.conversation("Is it?", "two", pictures=2), *TWO_TURNS[2:]]
    for messages, images in (
        (TWO_TURNS, pictures[:1]),
        (several, pictures),
        (system + TWO_TURNS, pictures[:1]),
        (TWO_TURNS + TWO_TURNS[2:] * 3, pictures[:1]),
    ):
        marked = encoder(template, max_length=1000)(record(messages, images))
        plain = encoder(unmarked, max_length=1000)(record(messages, images))
        assert marked.input_ids.tolist() == plain.input_ids.tolist()
        assert marked.labels.tolist() == plain.labels.tolist()


def test_a_system_turn_is_not_learnt():
    made = encoder()
    messages = [
        {"role": "system", "content": "Be brief."},
        *tiny.conversation("Why?", "So.", pictures=0),
    ]
    assert learnt(made, made(record(messages))) == [" So.</s>"]


def test_an_end_word_in_a_question_is_not_an_answer():
    """What the user writes cannot open a span, whatever it says."""
    made = encoder()
    spoof = tiny.conversation("hi ASSISTANT: ha</s>USER: ho", "yes", pictures=0)
    assert learnt(made, made(record(spoof))) == [" yes</s>"]


def test_a_template_that_forgets_is_refused():
    with pytest.raises(ValueError, match="changes earlier turns"):
        encoder(FORGETFUL)(record(TWO_TURNS, [tiny.picture(8, 8)]))


def test_a_template_without_a_generation_prompt_is_refused():
    """Else the answer's span would begin somewhere else in every template."""
    silent = "{% for m in messages %}{{ m['role'] }}{% endfor %}{% if add_generation_prompt %}X{% endif %}"
    with pytest.raises(ValueError, match="template that only appends"):
        encoder(silent)(record(tiny.conversation("a", "b", pictures=0)))


def test_chat_needs_a_template():
    made = tiny.processor()
    made.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Encoder(made, format="chat", max_length=10)
    Encoder(made, format="plain", max_length=10)


# --- pictures -------------------------------------------------------------------------------------


def test_placeholders_are_repeated_in_place():
    made = encoder()
    pictures = [tiny.picture(20, 32), tiny.picture(32, 9), tiny.picture(5, 5)]
    messages = [
        *tiny.conversation("Which is red?", "two", pictures=2),
        *tiny.conversation("And this?", "a red square"),
    ]
    encoded = made(record(messages, pictures))
    grids = [made.processor.image_processor.grid_of(one.height, one.width) for one in pictures]
    counts = [num_image_tokens(grid.rows, grid.cols) for grid in grids]
    placeholder = encoded.input_ids == made.processor.image_token_id
    runs = np.diff(np.flatnonzero(np.diff(np.r_[0, placeholder, 0])))[::2]
    assert runs.tolist() == counts
    assert (encoded.labels[placeholder] == IGNORED).all()
    assert encoded.image_grid_thw.tolist() == [[1, 2 * grid.rows, 2 * grid.cols] for grid in grids]
    expected = made.processor.image_processor(pictures, return_tensors="np")
    assert (encoded.pixel_values == expected["pixel_values"]).all()


def test_without_pictures_the_arrays_are_empty_not_missing():
    view = TeacherView(cells=4, cell_pixels=5, fill=(0, 0, 0))
    encoded = encoder(teacher_view=view)(record(tiny.conversation("a", "b", pictures=0)))
    assert encoded.pixel_values.shape == (0, 48) and encoded.pixel_values.dtype == np.float32
    assert encoded.image_grid_thw.shape == (0, 3) and encoded.image_grid_thw.dtype == np.int64
    assert encoded.teacher_pixel_values.shape == (0, 20, 20, 3)
    assert encoder()(record(tiny.conversation("a", "b", pictures=0))).teacher_pixel_values is None


def test_teacher_views_match_the_students_cells():
    view = TeacherView(cells=4, cell_pixels=5, fill=(9, 9, 9))
    pictures = [tiny.picture(20, 32), tiny.picture(30, 30)]
    messages = tiny.conversation("Which?", "two", pictures=2)
    encoded = encoder(teacher_view=view)(record(messages, pictures))
    expected = [view.render(pictures[0], 3, 4), view.render(pictures[1], 4, 4)]
    assert (encoded.teacher_pixel_values == np.stack(expected)).all()


def test_pictures_come_from_files_and_in_any_mode(tmp_path):
    path = tmp_path / "cat.png"
    tiny.picture(20, 32).save(path)
    open_one = tiny.picture(20, 32)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = tmp_path / "turned.png"
    tiny.picture(20, 32).rotate(180).save(turned, exif=exif)
    made = encoder()
    messages = tiny.conversation("a", "b")
    expected = made(record(messages, [open_one])).pixel_values
    for image in (path, turned, open_one.convert("RGBA")):
        assert (made(record(messages, [image])).pixel_values == expected).all()


# --- what cannot be used --------------------------------------------------------------------------


def refused(made, given):
    with pytest.raises(ValueError) as caught:
        made(given)
    text = str(caught.value)
    assert text.startswith(f"Record {given.id!r}: ") and "\n" not in text
    return text


@pytest.mark.parametrize(("marks", "pictures"), [(1, 0), (0, 1), (2, 1), (1, 3)])
def test_marks_and_pictures_must_agree(marks, pictures):
    messages = tiny.conversation("What?", "b", pictures=marks)
    text = refused(encoder(), record(messages, [tiny.picture(8, 8)] * pictures))
    assert f"{marks} <image> marks but {pictures} pictures" in text


@pytest.mark.parametrize("format", ["plain", "chat"])
@pytest.mark.parametrize("answer", ["", "   ", "\n"])
def test_empty_answers_are_refused(format, answer):
    text = refused(encoder(format=format), record(tiny.conversation("a", answer, pictures=0)))
    assert "answer" in text and "empty" in text


def test_a_record_without_an_answer_is_refused():
    assert "no answer to learn from" in refused(
        encoder(), record(tiny.conversation("a", pictures=0))
    )
    assert "one caption" in refused(
        encoder(format="plain"), record(tiny.conversation("a", pictures=0))
    )


def test_plain_takes_one_caption_only():
    made = encoder(format="plain")
    assert "one caption" in refused(made, record(TWO_TURNS, [tiny.picture(8, 8)]))


def test_too_long_records_say_how_long():
    messages, pictures = tiny.conversation("What?", "b", pictures=2), [tiny.picture(32, 32)] * 2
    length = len(encoder(max_length=10**6)(record(messages, pictures)).input_ids)
    text = refused(encoder(max_length=length - 1), record(messages, pictures))
    assert f"{length} tokens (42 of them for pictures)" in text and str(length - 1) in text
    assert len(encoder(max_length=length)(record(messages, pictures)).input_ids) == length


def test_bad_picture_files_are_named(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    messages = tiny.conversation("a", "b")
    assert "broken.png" in refused(encoder(), record(messages, [broken]))
    assert "missing.png" in refused(encoder(), record(messages, [tmp_path / "missing.png"]))


# --- sizes and budgets ----------------------------------------------------------------------------


def random_record(number):
    rng = np.random.default_rng(number)
    pictures = int(rng.integers(0, 4))
    messages = tiny.conversation(
        tiny.QUESTIONS[number % 4], tiny.ANSWERS[number % 4], pictures=pictures
    )
    sides = rng.integers(3, 90, (pictures, 2)).tolist()
    return record(messages, [tiny.picture(*side, seed=number) for side in sides], id=str(number))


@pytest.mark.parametrize("format", ["chat", "plain"])
def test_the_size_is_that_of_the_encoded_record(format):
    encode = encoder(format=format)
    for number in range(40):
        made = random_record(number)
        encoded, size = encode(made), encode.size(made)
        assert size == (len(encoded.input_ids), len(encoded.pixel_values))


def test_a_size_needs_no_pixels(tmp_path):
    """The header of a file is read; what lies behind it is for the encoder to refuse."""
    file = tmp_path / "cut.png"
    tiny.picture(40, 60).save(file)
    file.write_bytes(file.read_bytes()[:200])
    made = record(tiny.conversation("What?", "a ball"), [file])
    assert encoder().size(made).patches == 48  # 4 x 3 cells of four patches
    assert "cut.png" in tiny.refused(lambda: encoder()(made))


@pytest.mark.parametrize("number", range(20))
def test_pictures_shrink_to_fit_and_words_stay(number):
    made = random_record(number)
    full = encoder()(made)
    words = [id for id in full.input_ids if id != processor().image_token_id]
    for room in (len(full.input_ids) - 1, len(words) + 3 * len(made.images)):
        small = encoder(max_length=room, shrink=True)
        if not made.images:  # words are never cut
            assert f"max_length is {room}" in tiny.refused(lambda small=small: small(made))
            return
        encoded = small(made)
        assert len(encoded.input_ids) <= room
        assert [id for id in encoded.input_ids if id != processor().image_token_id] == words
        assert len(encoded.image_grid_thw) == len(made.images)
        assert small.size(made) == (len(encoded.input_ids), len(encoded.pixel_values))
        # One step larger would not fit.
        edge = max(grid.max() for grid in encoded.image_grid_thw[:, 1:]) * tiny.PATCH
        larger = processor().image_processor
        grids = [
            larger.grid_of(image.height, image.width, longest_edge=int(edge) + tiny.MULTIPLE)
            for image in made.images
        ]
        needed = len(words) + sum(num_image_tokens(grid.rows, grid.cols) for grid in grids)
        assert needed > room


def test_what_cannot_shrink_enough_is_refused_with_what_it_needs():
    made = record(tiny.conversation("What?", "a ball", pictures=3), [tiny.picture(30, 30)] * 3)
    text = tiny.refused(lambda: encoder(max_length=12, shrink=True)(made))
    assert "even with its pictures made as small as they can be" in text and "'r1'" in text


def test_pictures_with_too_many_patches():
    made = record(tiny.conversation("What?", "a ball"), [tiny.picture(30, 30)])
    text = tiny.refused(lambda: encoder(max_patches=50)(made))
    assert "have 64 patches but a packed row takes 50" in text
    assert len(encoder(max_patches=50, shrink=True)(made).pixel_values) == 36


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_open_pictures_that_a_camera_held_sideways(orientation):
    """As many placeholders as the upright picture has tokens: 6 and 8 swap its sides."""
    picture = tiny.picture(8, 32)
    picture.getexif()[0x0112] = orientation
    turned = ImageOps.exif_transpose(picture)
    one, two = (
        encoder()(record(tiny.conversation("What is this?", "a square"), [image]))
        for image in (picture, turned)
    )
    assert one.input_ids.tolist() == two.input_ids.tolist()
    assert np.array_equal(one.image_grid_thw, two.image_grid_thw)
    assert np.array_equal(one.pixel_values, two.pixel_values)


def test_teacher_views_follow_pictures_that_shrink():
    view = TeacherView(cells=4, cell_pixels=5, fill=(9, 9, 9))
    made = record(tiny.conversation("What?", "a ball"), [tiny.picture(30, 30)])
    encoded = encoder(max_patches=50, shrink=True, teacher_view=view)(made)
    (canvas,) = encoded.teacher_pixel_values
    inside = (canvas != np.array([9, 9, 9])).any(-1)
    assert inside[:15, :15].mean() > 0.9 and not inside[15:].any() and not inside[:, 15:].any()


def test_a_template_that_refuses_a_record_is_a_reason():
    """Templates may raise by themselves; a run must count the record and go on."""
    strict = (
        "{% for message in messages %}{% if loop.first and message['role'] != 'user' %}"
        "{{ raise_exception('turns must begin with the user') }}{% endif %}"
        "{% for part in message['content'] %}{{ part.get('text', '<image>') }}{% endfor %}"
        "{% endfor %}"
    )
    made = record([{"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}])
    text = refused(encoder(strict), made)
    assert "refuses it (turns must begin with the user)" in text and "'r1'" in text
