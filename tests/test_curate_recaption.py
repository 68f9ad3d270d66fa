"""Captions from a server that fails in every way, and pictures from one that is not always there.

Counts are exact: which picture was asked for how often, and what stands in the end.  One thing a
reader would get wrong: pauses are set to milliseconds here, so the order of threads is not judged.
"""

import dataclasses
import http.server
import threading
import time
from collections import Counter
from contextlib import contextmanager

import pyarrow as pa
import pytest

import tiny
from curating import folder_of, recipe, task, waves
from eve_vlm.curate import fetching, looking, places
from eve_vlm.curate.cost import estimate
from eve_vlm.curate.endpoint import Pacer
from eve_vlm.curate.journal import Journal
from eve_vlm.curate.recaption import recaption
from eve_vlm.curate.recipe import (
    CostSection,
    FetchSection,
    RecaptionSection,
    SourceSection,
    WorkerSection,
    checked,
)
from faulty_server import CAPTION, faulty_server

pytest.importorskip("openai", reason="needs the extra curate")

PATIENT = {"model": "tiny", "tries": 4, "first_pause": 0.002, "parallel": 4, "timeout": 20.0}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """24 pictures that were looked at."""
    folder = tmp_path_factory.mktemp("pictures")
    ids = folder_of(folder, 24)
    listed = [{"id": id, "path": str(folder / id)} for id in ids]
    table = pa.Table.from_pylist(listed, schema=places.row_schema())
    return looking.look(table, task(recipe("", folder))).drop_columns(["why", "because"])


def asking(server, folder, **changes):
    section = RecaptionSection(endpoint=server.url, **(PATIENT | changes))
    return recipe("", folder, recaption=section)


def finished(of, rows):
    """The result of the unit, as if its file had been written."""
    one = task(of)
    made = recaption(rows, one)
    for action in one.afterwards:
        action()
    return made, one


def test_every_picture_gets_its_own_caption(rows, tmp_path):
    with faulty_server() as server:
        of = asking(server, tmp_path, prompt="What is this?", system="Be brief.", longest_edge=64,
                    sampling={"max_tokens": 30, "temperature": 0.5, "seed": 7})  # fmt: skip
        made, one = finished(of, rows)
    request = server.requests[0]
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert request["messages"][1]["content"][1] == {"type": "text", "text": "What is this?"}
    assert (request["model"], request["max_tokens"], request["seed"]) == ("tiny", 30, 7)
    assert set(server.delivered.values()) == {1} and len(server.delivered) == 24
    captions = made["caption"].to_pylist()
    assert sorted(captions) == sorted(CAPTION.format(name) for name in server.delivered)
    assert set(made["captioner"].to_pylist()) == {"tiny"} and made["why"].null_count == 24
    assert one.facts == {"requests": 24, "prompt_tokens": 720, "caption_tokens": 240, "asked": 24}
    assert not list((tmp_path / "work").rglob("*.jsonl"))


def test_a_picture_is_sent_as_the_recipe_sizes_it(rows, tmp_path):
    import base64
    import io

    from PIL import Image

    with faulty_server() as server:
        finished(asking(server, tmp_path, longest_edge=40), rows.slice(0, 1))
        finished(asking(server, tmp_path / "whole", longest_edge=None), rows.slice(0, 1))
    urls = [one["messages"][0]["content"][0]["image_url"]["url"] for one in server.requests]
    data = [base64.b64decode(url.partition(",")[2]) for url in urls]
    assert Image.open(io.BytesIO(data[0])).size == (40, 30)
    with open(rows["path"][0].as_py(), "rb") as file:
        assert data[1] == file.read() and urls[1].startswith("data:image/png;")


@pytest.mark.parametrize(
    "kind", ["500", "503", "429", "page", "empty", "null", "wordless", "list", "cut"]
)
def test_what_passes_is_waited_for(kind, rows, tmp_path):
    """Each picture fails twice in the same way; all are captioned, each delivered once."""
    seen: Counter = Counter()

    def fault(number, picture):
        seen[picture] += 1
        return kind if seen[picture] <= 2 else None

    with faulty_server(fault) as server:
        made, one = finished(asking(server, tmp_path), rows.slice(0, 6))
    assert made["why"].null_count == 6 and set(server.delivered.values()) == {1}
    assert (one.facts["requests"], one.facts["failed_requests"]) == (18, 12)


def test_a_picture_that_always_fails_is_dropped_when_others_are_answered(rows, tmp_path):
    bad: list = []

    def fault(number, picture):
        if picture and len(bad) < 2 and picture not in bad:
            bad.append(picture)
        return {0: "500", 1: "400"}[bad.index(picture)] if picture in bad else None

    with faulty_server(fault) as server:
        made, _ = finished(asking(server, tmp_path), rows)
    assert made["why"].to_pylist().count("no caption was given") == 2
    reasons = sorted(one for one in made["because"].to_pylist() if one)
    assert "out of memory" in reasons[1] + reasons[0] and "too odd" in reasons[1] + reasons[0]
    assert sorted(server.asked[name] for name in bad) == [1, 4]  # 400 is not tried again
    assert server.delivered["none"] == 2  # each was followed by a question without a picture


@pytest.mark.parametrize("kind", ["500", "cut", "page", "400", "401"])
def test_a_server_that_fails_stops_the_run_and_no_caption_is_asked_for_again(kind, rows, tmp_path):
    """Ten are delivered, then everything fails; with the server back, the rest is asked for once."""
    away = [False]
    lock, good = threading.Lock(), [0]

    def fault(number, picture):
        with lock:
            if good[0] >= 10 and not away[0]:
                away[0] = True
            if away[0]:
                return kind
            good[0] += 1
            return None

    with faulty_server(fault) as server:
        of = asking(server, tmp_path, tries=2)
        text = tiny.refused(lambda: recaption(rows, task(of)))
        assert server.url in text
        assert sum(server.delivered.values()) == 10
        journal = Journal(tmp_path, "recaption", "b0")
        assert len(journal.finished) == 10
        away[0], good[0] = False, -100
        made, one = finished(of, rows)
    assert made["why"].null_count == 24 and one.facts["asked"] == 14
    assert set(server.delivered.values()) <= {1} or kind == "400"
    pictures = {name: count for name, count in server.delivered.items() if name != "none"}
    assert len(pictures) == 24 and set(pictures.values()) == {1}


def test_nonsense_for_most_pictures_stops_the_run(rows, tmp_path):
    """A server that answers words and refuses pictures; nothing is remembered as failed."""
    with faulty_server(lambda number, picture: "400" if picture else None) as server:
        text = tiny.refused(lambda: recaption(rows, task(asking(server, tmp_path))))
    assert "got no caption" in text and "too odd" in text
    assert Journal(tmp_path, "recaption", "b0").finished == {}


def test_a_half_line_of_a_killed_worker_is_no_item(tmp_path):
    first = Journal(tmp_path, "recaption", "u")
    first.add({"id": "a", "caption": "One."})
    first.close()
    file = next((tmp_path / "work/recaption.journal").iterdir())
    with file.open("a") as out:
        out.write('{"id": "b", "capt')
    second = Journal(tmp_path, "recaption", "u")
    assert list(second.finished) == ["a"]
    second.add({"id": "b", "caption": "Two."})
    third = Journal(tmp_path, "recaption", "u")
    assert {id: one["caption"] for id, one in third.finished.items()} == {"a": "One.", "b": "Two."}
    third.remove()
    assert Journal(tmp_path, "recaption", "u").finished == {}


def test_requests_are_paced():
    """Ten turns from many threads, 20 ms apart: at least 180 ms, whatever the machine does."""
    pacer, began = Pacer(0.02), time.monotonic()
    threads = [threading.Thread(target=pacer.wait) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began >= 0.18


def test_the_key_comes_from_the_environment_and_the_rate_is_divided(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sesame")
    with faulty_server() as server:
        finished(asking(server, tmp_path, key_variable="MY_KEY"), rows.slice(0, 1))
    assert server.headers[0]["authorization"] == "Bearer sesame"
    of = recipe("", tmp_path, recaption=RecaptionSection(model="m", endpoint="http://x/v1", requests_per_minute=60))  # fmt: skip
    assert "workers.recaption.most" in tiny.refused(lambda: checked(of))
    checked(dataclasses.replace(of, workers={"recaption": WorkerSection(most=2)}))


def test_estimates():
    tokens = CostSection(per_million_prompt_tokens=0.5, per_million_caption_tokens=2.0,
                         prompt_tokens=600, caption_tokens=100)  # fmt: skip
    assert estimate(tokens, 1_000_000) == pytest.approx(0.5 * 600 + 2.0 * 100)
    hours = CostSection(per_hour=20.0, captions_per_second=100.0)
    assert estimate(hours, 3_600_000) == pytest.approx(200.0)  # ten hours


def test_a_local_model_captions_as_the_engine_does(rows, saved_model, tmp_path):
    """Our own model from a folder, in batches of another size than the engine's."""
    from eve_vlm.serve.engine import EveEngine
    from eve_vlm.serve.messages import user_message

    section = RecaptionSection(model=str(saved_model), prompt="What is this?", parallel=5,
                               longest_edge=None, sampling={"max_tokens": 6})  # fmt: skip
    made, one = finished(recipe("", tmp_path, recaption=section), rows.slice(0, 7))
    engine = EveEngine.from_pretrained(saved_model)
    asked = [user_message("What is this?", [waves(number)]) for number in range(7)]
    expected = engine.answer(asked, max_new_tokens=6)
    # A random model may say nothing, which is no caption.
    assert made["caption"].to_pylist() == [answer.text or None for answer in expected]
    assert one.facts["caption_tokens"] == sum(len(answer.token_ids) for answer in expected)
    assert made["finish"][0].as_py() == expected[0].finish_reason


# --- fetching -------------------------------------------------------------------------------------


@contextmanager
def picture_server(folder):
    """Serves a folder; paths that begin with /away are not there."""
    asked: Counter = Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, directory=str(folder), **settings)

        def log_message(self, *_):
            pass

        def do_GET(self):
            asked[self.path] += 1
            super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.server_address[1], asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def urls(folder, base, port, names, **changes):
    section = {"threads": 3, "tries": 1, "networks": ["127.0.0.0/8"], "ports": [port]} | changes
    source = SourceSection(name="u", kind="urls", path="list.txt", licence="CC0-1.0")
    of = recipe("", folder, sources=[source], fetch=FetchSection(**section))
    rows = [{"id": name, "member": f"{base}/{name}"} for name in names]
    return of, pa.Table.from_pylist(rows, schema=places.row_schema())


def test_urls_are_fetched_once_and_lie_where_the_rows_say(tmp_path):
    names = folder_of(tmp_path / "in", 8)
    with picture_server(tmp_path / "in") as (base, port, asked):
        of, rows = urls(tmp_path / "out", base, port, [*names, "away.png"], most_failed=0.5)
        made = fetching.fetch(rows, task(of)).to_pylist()
        again = fetching.fetch(rows, task(of)).to_pylist()  # its result was lost, its journal not
    assert again == made and set(asked.values()) == {1}
    assert [one["why"] for one in made] == [None] * 8 + ["cannot be fetched"]
    for name, one in zip(names, made, strict=False):
        with open(tmp_path / "in" / name, "rb") as file:
            assert places.read_bytes(one) == file.read()
        assert one["member"] == f"{base}/{name}"  # where it came from stays


def test_a_row_without_a_url_is_dropped_with_its_reason_and_shown_without_a_picture(tmp_path):
    of, rows = urls(tmp_path / "out", "", 80, [])
    row = {"id": "u/1", "source": "u", "member": None}
    made = fetching.fetch(pa.Table.from_pylist([row], schema=rows.schema), task(of)).to_pylist()[0]
    assert (made["why"], made["because"]) == ("cannot be fetched", "its list has no URL for it")
    assert "was not fetched" in tiny.refused(lambda: places.read_bytes(made))


def test_what_its_list_says_is_small_is_not_fetched(tmp_path):
    names = folder_of(tmp_path / "in", 3)
    with picture_server(tmp_path / "in") as (base, port, asked):
        of, rows = urls(tmp_path / "out", base, port, names)
        sides = pa.array([64, 65, None], pa.int32())  # the filter keeps what is above 64
        rows = rows.set_column(rows.schema.get_field_index("listed_side"), "listed_side", sides)
        made = fetching.fetch(rows, task(of))
    assert made["why"].to_pylist() == ["too small", None, None]
    assert set(asked) == {f"/{name}" for name in names[1:]}


def test_a_network_that_is_away_stops_the_run_and_forgets_its_failures(tmp_path):
    names = folder_of(tmp_path / "in", 8)
    with picture_server(tmp_path / "in") as (base, port, _):
        of, rows = urls(tmp_path / "out", base, port, names)
    text = tiny.refused(lambda: fetching.fetch(rows, task(of)))
    assert "8 of 8" in text
    assert Journal(tmp_path / "out", "fetch", "b0").finished == {}


def test_addresses_that_only_workers_can_reach_are_refused(tmp_path):
    names = folder_of(tmp_path / "in", 1)
    with picture_server(tmp_path / "in") as (base, port, asked):
        of, rows = urls(tmp_path / "out", base, port, names, networks=[], most_failed=1.0)
        made = fetching.fetch(rows, task(of))
    assert made["why"].to_pylist() == ["cannot be fetched"] and not asked
