"""The page of `eve demo`: what it shows, and a real Chromium that uses it.

Independent sides: another engine of the same weights, asked directly; `draw_grid` and `overlay` for
the drawings, which must agree to the last pixel; the browser's own list of requests.  The model of
the browser's tests waits in every step, so that an answer can be seen growing.
"""

import asyncio
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import tiny
from eve_vlm.cli.paging import demo
from eve_vlm.image_processing_eve import num_image_tokens
from eve_vlm.inspection.grid_picture import draw_grid
from eve_vlm.serve.engine import EveEngine, user_message
from eve_vlm.serve.looking.attention_map import look
from eve_vlm.serve.looking.attention_picture import overlay
from eve_vlm.serve.page import parts
from eve_vlm.serve.page.parts import (
    MAX_PICTURES,
    WHOLE,
    View,
    Visit,
    answer_figures,
    check_pictures,
    draw_heat,
    draw_tokens,
    drawn_examples,
    grid_html,
    pieces_of,
    shown_turns,
)
from eve_vlm.serve.sampling import Sampling
from eve_vlm.serve.worker import QueueFullError, Worker

QUESTION, LENGTH = "What is this?", 24
STEP = 0.03  # seconds that the model waits in each step while an answer is watched
# Seconds for an answer that must not end by itself: the page's 128 tokens would take 38 s, longer
# than a browser on a busy machine is waited for.
LONG_STEP = 0.3


class Waiting:
    """How long the model waits in each step, in seconds."""

    step = 0.0


def engine(**settings) -> EveEngine:
    """A tiny model that says letters and blanks only, so that its answers have words."""
    made = EveEngine(tiny.model(), tiny.processor(), batch_size=4, **settings)
    words = made.tokenizer
    odd = [n for n in range(len(words)) if not re.fullmatch("[a-z ]+", words.decode([n]))]
    made.model.generation_config.suppress_tokens = odd
    return made


@pytest.fixture(scope="module")
def alone():
    """Asked directly, for what is right."""
    return engine()


@pytest.fixture
def worker(alone):
    """A worker of that engine."""
    with Worker(alone) as made:
        yield made


@pytest.fixture
def files(tmp_path):
    """Three picture files."""
    names = []
    for number, (height, width) in enumerate(((20, 32), (60, 90), (50, 20))):
        names.append(str(tmp_path / f"{number}.png"))
        tiny.picture(height, width, seed=number).save(names[-1])
    return names


def visited(alone, files, *, budget=None) -> Visit:
    """A visit with one question answered."""
    visit = Visit()
    messages = visit.question(QUESTION, files)
    [answer] = alone.answer([messages], max_new_tokens=LENGTH, max_image_tokens=budget)
    assert visit.answered(alone, messages, answer, budget)
    return visit


# --- what is shown --------------------------------------------------------------------------------


def test_pictures_are_checked(files, tmp_path):
    check_pictures(files)
    check_pictures([tmp_path / "missing.png"], unread=[])  # was read before
    text = tmp_path / "text.png"
    text.write_text("no picture")
    large = tmp_path / "large.png"
    Image.new("1", (8000, 8000)).save(large)
    for bad, said in (
        ([text], "text.png is not a picture"),
        ([large], "8000 x 8000"),
        (files * 2, f"at most {MAX_PICTURES}"),
    ):
        message = tiny.refused(lambda bad=bad: check_pictures(bad), end=".")
        assert said in message and str(tmp_path) not in message
    assert "Clear" in tiny.refused(lambda: check_pictures(files, earlier=14), end=".")


def test_a_visit_keeps_answered_questions_only(alone, files):
    visit = visited(alone, files[:1])
    assert visit.files == files[:1] and len(visit.turns) == 2
    assert (
        "".join(word.text for word in visit.looked.words).strip()
        == visit.turns[1]["content"][0]["text"]
    )
    [answer] = alone.answer([visit.turns[:1]], max_new_tokens=3)
    answer.finish_reason, answer.text = "cancelled", ""
    before = list(visit.turns)
    assert not visit.answered(alone, visit.question("Again?", []), answer, None)
    assert visit.turns == before
    assert "letters" in tiny.refused(lambda: visit.question("a" * 300_000, []), end=".")
    tiny.refused(lambda: visit.question("  ", files))


@pytest.mark.parametrize("budget", [None, 8])
def test_the_grid_is_that_of_the_prompt(alone, files, budget):
    """The drawing is `draw_grid`'s without its legend; the counts are those of `encode`."""
    for file in files:
        image, grid = draw_tokens(alone, file, budget)
        prompt = alone.encode(
            user_message(QUESTION, [file]), Sampling(max_new_tokens=1, max_image_tokens=budget)
        )
        assert num_image_tokens(grid.rows, grid.cols) == prompt.image_tokens
        assert f"<b>{prompt.image_tokens} tokens</b>" in grid_html(grid)
        if budget is None:
            whole = draw_grid(Image.open(file), pictures=alone.processor.image_processor).image
            np.testing.assert_array_equal(image, np.asarray(whole)[: image.height, : image.width])
            rest = np.asarray(whole)[: image.height, image.width :]
            assert len(np.unique(rest.reshape(-1, 3), axis=0)) <= 1  # nothing but paper is cut off
    assert "3 tokens" in tiny.refused(lambda: draw_tokens(alone, files[0], 1), end=".")


@pytest.mark.parametrize("view", [View(), View(method="gradient", layer=1, head=2)])
def test_heat_is_the_overlay_of_the_word(alone, worker, files, view, monkeypatch):
    visit = visited(alone, files[:2], budget=12)
    calls = []
    monkeypatch.setattr(parts, "look", lambda *a, **k: calls.append(k) or look(*a, **k))
    maps = look(
        alone,
        user_message(QUESTION, files[:2]),
        answer=visit.looked.answer.token_ids,
        max_image_tokens=12,
        method=view.method,
        layers=None if view.layer < 0 else view.layer,
        heads=None if view.head < 0 else view.head,
    )
    for word in (WHOLE, 0, 1):
        for number, file in enumerate(files[:2]):
            drawn, text = draw_heat(worker, visit.looked, word, number, view)
            expected = overlay(
                Image.open(file),
                maps.map(None if word == WHOLE else word, picture=number),
                pictures=alone.processor.image_processor,
                top=maps.largest(),
                max_image_tokens=12,
            )
            scale = drawn.width // expected.width
            assert drawn.size == (scale * expected.width, scale * expected.height) and scale > 1
            same = np.asarray(drawn)[::scale, ::scale].astype(int) - np.asarray(expected)
            # Averaged before or after they are kept, weights differ by rounding: one level at most.
            assert np.abs(same).max() <= 2
            share = maps.shares(None if word == WHOLE else word).cells
            assert f"{share:.1%}" in text
    assert len(calls) == 1  # all other drawings are of the same maps
    tiny.refused(lambda: draw_heat(worker, visit.looked, 99, 0, view))


def test_heat_does_not_wait_for_other_visitors(files):
    """It is drawn between two tokens of another answer, which goes on as if nothing had been."""
    made = engine()
    question, sampling = user_message("Say more.", files[1:2]), Sampling(max_new_tokens=200)
    [expected] = made.answer([question], max_new_tokens=200)
    visit, seen, waiting = visited(made, files[:1]), [], Waiting()
    made.model.model.language_model.register_forward_pre_hook(lambda *_: time.sleep(waiting.step))
    waiting.step = STEP
    with Worker(made) as worker:
        [reply] = worker.submit(question, sampling, on_piece=[seen.append])
        wait_until(lambda: len(seen) > 5)
        for layer in range(3):
            draw_heat(worker, visit.looked, 0, 0, View(layer=layer))
        assert not reply.finished
        waiting.step = 0.0
        wait_until(lambda: reply.finished)
    assert reply.answer.text == expected.text


def test_figures_are_the_answers(alone, files):
    visit = visited(alone, files[:1])
    answer = visit.looked.answer
    answer.cached_tokens, answer.seconds_to_first, answer.seconds = 5, 0.5, 2.5
    shown = {figure.name: figure.text for figure in answer_figures(answer)}
    assert shown == {
        "Prompt": f"{answer.prompt_tokens} tokens: {answer.image_tokens} picture, "
        f"{answer.prompt_tokens - answer.image_tokens} text; 5 reused",
        "Answer": f"{LENGTH} tokens, cut off at the longest answer",
        "First token": "after 0.50 s",
        "Speed": f"{(LENGTH - 1) / 2:.1f} tokens/s after the first",
    }


def test_words_of_strangers_are_no_html():
    turns = user_message("<img src=x> & <b>", ["a.png"])
    shown = shown_turns(turns, "<script>")
    assert [part.get("text") for part in shown[0]["content"]] == [
        None,
        "&lt;img src=x&gt; &amp; &lt;b&gt;",
    ]
    assert shown[1] == {
        "role": "assistant",
        "content": [{"type": "text", "text": "&lt;script&gt;"}],
    }
    assert turns[0]["content"][1]["text"] == "<img src=x> & <b>"


def test_examples_are_pictures_with_questions(alone):
    for example in drawn_examples():
        assert example.question.endswith("?")
        alone.encode(user_message(example.question, [example.picture]))


# --- answers, piece by piece ----------------------------------------------------------------------


def run(coroutine):
    """In a thread, because a browser's driver may hold this one's loop."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def test_pieces_are_the_answer(alone, files):
    visit, messages = Visit(), user_message(QUESTION, files[:1])
    expected = alone.answer([messages], max_new_tokens=LENGTH)[0].text

    async def ask(worker, sampling):
        said = []
        async for pieces in pieces_of(worker, visit, messages, sampling):
            said.append("".join(piece.text for piece in pieces))
            assert visit.reply is not None
        return said, pieces[-1].answer

    with Worker(engine()) as worker:
        said, answer = run(ask(worker, Sampling(max_new_tokens=LENGTH)))
        assert said[0] == "" and "".join(said) == answer.text == expected
        assert visit.reply is None
        with pytest.raises(ValueError, match="model takes 512"):
            run(ask(worker, Sampling(max_new_tokens=600)))
        worker.queue_size = 0
        with pytest.raises(QueueFullError):
            run(ask(worker, Sampling()))


def test_leaving_ends_the_answer(files):
    """Whoever stops reading, or is cancelled while the prompt is made, leaves nothing running."""
    messages, sampling = user_message(QUESTION, files[:1]), Sampling(max_new_tokens=400)

    async def leave_after_two(worker, visit):
        pieces = pieces_of(worker, visit, messages, sampling)
        async for new in pieces:
            if new:
                break
        reply = visit.reply
        await pieces.aclose()
        return reply

    async def leave_at_once(worker, visit):
        task = asyncio.ensure_future(anext(pieces_of(worker, visit, messages, sampling)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with Worker(engine()) as worker:
        reply = run(leave_after_two(worker, Visit()))
        wait_until(lambda: reply.finished)
        assert reply.answer.finish_reason == "cancelled" and len(reply.token_ids) < 400
        visit = Visit()
        run(leave_at_once(worker, visit))
        assert visit.reply is None and not worker.batch.busy


def test_an_answer_that_breaks_is_told(files):
    made = engine()

    def broken(*_):
        raise RuntimeError("out of memory at 0x7f")

    async def ask(worker):
        async for _ in pieces_of(worker, Visit(), user_message(QUESTION, []), Sampling()):
            pass

    with Worker(made) as worker:
        made.model.model.language_model.register_forward_pre_hook(broken)
        with pytest.raises(RuntimeError, match="ask again"):
            run(ask(worker))


def wait_until(true, *, seconds: float = 20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


# --- the command ----------------------------------------------------------------------------------


def test_without_gradio_the_command_says_what_to_install(monkeypatch, saved_model):
    monkeypatch.setattr("eve_vlm.cli.paging.find_spec", lambda name: None)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(demo)
    done = CliRunner().invoke(app, ["--model", str(saved_model)])
    assert isinstance(done.exception, ValueError)
    assert 'pip install "eve-vlm[page]"' in str(done.exception) and "\n" not in str(done.exception)


COMMAND = """
import ipaddress, sys, typer

def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        if not ipaddress.ip_address(arguments[1][0]).is_loopback:
            print("CONNECTS TO", arguments[1], flush=True)
    elif event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "localhost", "", None):
        print("LOOKS UP", arguments[0], flush=True)

sys.addaudithook(watch)
from eve_vlm.cli.paging import demo
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(demo)
app()
"""


def test_the_command_serves_until_it_is_stopped(saved_model, tmp_path):
    """A real process: it tells its address, looks nowhere else, and leaves no file behind."""
    pytest.importorskip("gradio", reason="needs the extra page")
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("GRADIO_TEMP_DIR", None)
    arguments = ["--model", str(saved_model), "--port", "0", "--no-browser"]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        lines = iter(process.stdout.readline, "")
        first = next(line for line in lines if "page of" in line or "Error" in line)
        url = re.search(r"http://127\.0\.0\.1:\d+", first).group()
        with urlopen(url, timeout=60) as page:
            text = page.read().decode()
        assert saved_model.name in text
        with pytest.raises(HTTPError) as refused:
            urlopen(Request(url, headers={"Host": "elsewhere.example"}), timeout=60)
        assert refused.value.code == 400
        for path in ("/etc/passwd", str(saved_model / "config.json")):
            with pytest.raises(HTTPError) as refused:
                urlopen(f"{url}/gradio_api/file={path}", timeout=60)
            assert refused.value.code in (403, 404)
        assert list(tmp_path.glob("eve-page-*"))
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in rest
    assert "CONNECTS" not in rest and "LOOKS UP" not in rest
    assert not list(tmp_path.glob("eve-page-*"))


# --- a browser ------------------------------------------------------------------------------------

QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE = 30_000  # milliseconds; for a machine that is busy with other tests


@pytest.fixture(scope="module")
def site():
    """Address, worker and waiting time of a page with a model behind it."""
    pytest.importorskip("gradio", reason="needs the extra page")
    from eve_vlm.serve.http.running import bound, url_of
    from eve_vlm.serve.page.server import allowed_hosts, make_server, page_app

    made, started, waiting = engine(keep_tokens=512), threading.Event(), Waiting()
    made.model.model.language_model.register_forward_pre_hook(lambda *_: time.sleep(waiting.step))
    with ExitStack() as stack:
        sock = stack.enter_context(bound("127.0.0.1", 0))
        worker = stack.enter_context(Worker(made))
        app = stack.enter_context(
            page_app(
                worker,
                name="<tiny>",
                examples=drawn_examples(),
                hosts=allowed_hosts(sock),
            )
        )
        server = make_server(app, on_start=started.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        assert started.wait(60)
        yield url_of(sock), worker, waiting
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def chromium():
    """A browser without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs chromium or google-chrome, and neither is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(QUIET))
        yield browser
        browser.close()


@contextmanager
def visitor(chromium, url, *, width=1280, height=800):
    """Somebody with cookies of their own, who notices requests to elsewhere and errors."""
    context = chromium.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(PATIENCE)
    page, elsewhere, errors = context.new_page(), [], []

    def sent(request):
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1":
            elsewhere.append(request.url)

    context.on("request", sent)
    page.on("console", lambda one: errors.append(one.text) if one.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#eve-box textarea")
    yield page
    context.close()
    assert not elsewhere and not errors


@pytest.fixture
def page(chromium, site):
    """One visitor, and a model that does not wait."""
    site[2].step = 0.0
    with visitor(chromium, site[0]) as made:
        yield made


def add(page, *files):
    page.set_input_files("#eve-box input[type=file]", list(files))
    page.wait_for_function(
        "n => document.querySelectorAll('#eve-box .thumbnail-item').length == n", arg=len(files)
    )


def send(page, text=QUESTION):
    page.fill("#eve-box textarea", text)
    page.press("#eve-box textarea", "Enter")


def answers(page) -> list[str]:
    """What the model said, as it can be read."""
    return page.locator('#eve-chat [data-testid="bot"] .md').all_inner_texts()


def ended(page, count=1):
    """Waits until so many questions are answered, and the box is free again."""
    done = (
        "n => document.querySelectorAll('#eve-chat [data-testid=bot]').length == n "
        "&& document.querySelector('#eve-box .submit-button') "
        "&& (n == 0 || document.querySelector('#eve-figures').innerText.includes('First token'))"
    )
    for _ in range(2):  # twice, because a page changes one component after the other
        page.wait_for_function(done, arg=count)
        page.wait_for_timeout(200)


def pixels(page, name) -> np.ndarray:
    """The picture that an element shows, as it was sent."""
    page.wait_for_selector(f"{name} img")
    source = page.get_attribute(f"{name} img", "src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB"))


def told(alone, files, question=QUESTION, **settings):
    """What is right for one question."""
    settings = {"max_new_tokens": 128} | settings  # the page's own, for 512 positions
    return alone.answer([user_message(question, files)], **settings)[0]


def test_ask_and_look(page, site, alone, files):
    """A picture, its tokens, an answer that grows, its words, and the heat of each."""
    file, pictures = files[1], alone.processor.image_processor
    assert "<tiny>" in page.inner_text("#eve-header")
    assert answers(page) == [] and not page.is_visible("#eve-words")
    add(page, file)
    grid = pixels(page, "#eve-grid")
    whole = np.asarray(draw_grid(Image.open(file), pictures=pictures).image)
    np.testing.assert_array_equal(grid, whole[: grid.shape[0], : grid.shape[1]])
    expected, site[2].step = told(alone, [file]), LONG_STEP
    send(page)
    seen, end = [], time.monotonic() + PATIENCE / 1000
    while not page.is_visible("#eve-words"):
        assert time.monotonic() < end, f"no words to choose after {seen[-1:]}"
        seen += [text for text in answers(page)[:1] if text not in seen]
        site[2].step = LONG_STEP if len(seen) < 4 else 0.0
    assert len(seen) >= 4 and all(expected.text.startswith(text) for text in seen[1:])
    assert [len(text) for text in seen[1:]] == sorted(len(text) for text in seen[1:])
    ended(page)
    assert answers(page) == [expected.text]
    site[2].step = 0.0
    figures = page.inner_text("#eve-figures")
    prompt = alone.encode(user_message(QUESTION, [file]))
    text = len(prompt) - prompt.image_tokens
    assert f"{len(prompt)} tokens: {prompt.image_tokens} picture, {text} text; 0 reused" in figures
    assert "128 tokens, cut off" in figures and "tokens/s" in figures and "First token" in figures
    assert f"= {prompt.image_tokens} tokens" in page.inner_text("#eve-sum")
    maps = look(alone, user_message(QUESTION, [file]), answer=expected.token_ids)
    words = page.locator("#eve-words label")
    names = [name.strip() for name in words.all_inner_texts()]
    assert names == ["whole answer", *(word.text.strip() for word in maps.words)]
    drawn = {}
    for place, word in ((1, 0), (2, 1), (0, None)):
        words.nth(place).click()
        page.wait_for_function(
            "share => document.querySelector('#eve-scale').innerText.includes(share)",
            arg=f"{maps.shares(word).cells:.1%} of its attention",
        )
        heat = overlay(Image.open(file), maps.map(word), pictures=pictures, top=maps.largest())
        drawn[word] = pixels(page, "#eve-heat")
        scale = drawn[word].shape[1] // heat.width
        np.testing.assert_allclose(
            drawn[word][::scale, ::scale].astype(int), np.asarray(heat), rtol=0, atol=2
        )
    assert len({one.tobytes() for one in drawn.values()}) == 3
    page.click("#eve-which-attention button")
    page.click("#eve-which-attention label:has-text('gradient')")
    page.wait_for_function(
        "() => document.querySelector('#eve-scale').innerText.includes('positive effect')"
    )
    assert pixels(page, "#eve-heat").tobytes() != drawn[None].tobytes()


def test_two_visitors_at_once(page, chromium, site, alone, files):
    """Each sees the own chat only, and gets the answer that would come alone."""
    with visitor(chromium, site[0]) as other:
        add(page, files[0])
        add(other, files[1])
        site[2].step = STEP
        send(page)
        page.wait_for_selector('#eve-chat [data-testid="bot"]')
        assert answers(other) == []
        send(other, "Say more.")
        ended(other)
        ended(page)
        assert answers(page) == [told(alone, [files[0]]).text]
        assert answers(other) == [told(alone, [files[1]], "Say more.").text]
        with visitor(chromium, site[0]) as third:
            assert answers(third) == [] and not third.is_visible("#eve-words")


def test_turns_and_several_pictures(page, alone, files):
    add(page, *files[:2])
    page.fill("#eve-box textarea", QUESTION)
    for _ in range(2):  # the second is refused
        page.press("#eve-box textarea", "Enter")
    ended(page)
    assert pixels(page, "#eve-grid").shape == np.shape(draw_tokens(alone, files[1], None)[0])
    page.click("#eve-which label:has-text('1')")
    shape = np.shape(draw_tokens(alone, files[0], None)[0])
    for _ in range(200):
        if pixels(page, "#eve-grid").shape == shape:
            break
    assert pixels(page, "#eve-grid").shape == shape
    first = user_message(QUESTION, files[:2])
    said = {"role": "assistant", "content": [{"type": "text", "text": answers(page)[0]}]}
    add(page, files[2])
    send(page, "Where is it?")
    ended(page, 2)
    messages = [*first, said, *user_message("Where is it?", files[2:])]
    [expected] = alone.answer([messages], max_new_tokens=128)
    assert answers(page)[1] == expected.text
    reused = re.search(r"(\d+) reused", page.inner_text("#eve-figures"))
    assert int(reused.group(1)) > len(alone.encode(first)) // 2
    assert page.locator("#eve-which label").count() == 3


def test_what_is_no_picture_is_said_and_taken_out(page, files, tmp_path):
    bad = tmp_path / "<i>bad.png"
    bad.write_bytes(b"not a picture")
    page.set_input_files("#eve-box input[type=file]", [str(bad)])
    page.wait_for_selector("text=is not a picture of a kind that is read here")
    page.wait_for_function("() => !document.querySelector('#eve-box .thumbnail-item')")
    assert not page.is_visible("#eve-grid img")
    add(page, files[0])
    send(page, "")
    page.wait_for_selector("text=The question is empty")
    ended(page, 0)
    assert page.locator("#eve-box .thumbnail-item").count() == 1  # it can still be asked about
    send(page)
    ended(page)


def test_stop_and_clear(page, site, files):
    worker, waiting = site[1:]
    add(page, files[0])
    waiting.step = LONG_STEP
    send(page)
    page.wait_for_selector('#eve-chat [data-testid="bot"]')
    page.wait_for_function(
        "() => document.querySelector('#eve-chat [data-testid=bot] .md').innerText.length > 4"
    )
    page.click("#eve-box .stop-button")
    page.wait_for_selector("#eve-words label")
    assert "stopped" in page.inner_text("#eve-figures") and not worker.batch.busy
    send(page, "Say more.")
    page.wait_for_selector("#eve-box .stop-button")
    send(page, "And now?")
    page.wait_for_selector("text=The model is still answering")
    assert page.input_value("#eve-box textarea") == "And now?"
    page.click("#eve-clear")
    page.wait_for_selector("#eve-chat .placeholder")
    wait_until(lambda: not worker.batch.busy)
    assert answers(page) == [] and page.inner_text("#eve-figures").strip() == ""
    assert page.input_value("#eve-box textarea") == ""
    assert not page.is_visible("#eve-grid img") and not page.is_visible("#eve-words")
    waiting.step = 0.0
    send(page)  # without a picture
    ended(page)
    assert "no words about a picture" in page.inner_text("#eve-scale")
    assert "0 picture" in page.inner_text("#eve-figures")


def test_who_leaves_is_not_answered_any_more(chromium, site, files):
    worker, waiting = site[1:]
    with visitor(chromium, site[0]) as page:
        add(page, files[0])
        waiting.step = LONG_STEP
        send(page)
        page.wait_for_selector('#eve-chat [data-testid="bot"]')
        wait_until(lambda: worker.batch.busy)
    wait_until(lambda: not worker.batch.busy, seconds=8)
    waiting.step = 0.0


def test_words_are_shown_as_they_are(page):
    """Neither a question nor an answer is HTML or Markdown, which could fetch pictures."""
    hostile = (
        "<img src='http://elsewhere.example/a.png'> **b** ![c](http://elsewhere.example/c.png) &lt;"
    )
    send(page, hostile)
    ended(page)
    assert page.locator('#eve-chat [data-testid="user"] .md').inner_text() == hostile


def test_examples_and_a_narrow_window(chromium, site):
    site[2].step = 0.0
    with visitor(chromium, site[0], width=400) as page:
        page.click("text=How many triangles are there?")
        ended(page)
        page.click("#eve-words label >> nth=0")
        page.wait_for_selector("#eve-heat img")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert page.inner_text('#eve-chat [data-testid="user"] .md').endswith("are there?")
