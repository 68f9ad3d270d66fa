"""The server through the real `openai` client: its answers are the engine's, alone and in a crowd.

Independent side: another engine of the same weights, asked directly. Greedy search compares scores,
so a tie within float32 rounding could go either way; the models here have large weights, which keeps
the best two far apart. Log-probabilities may differ by 1e-4, the rounding of float32 in a batch.
"""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

import tiny
from conversations import random_question
from eve_vlm.serve.engine import user_message
from serving import NAME, chat, data_uri, engine, image_part, protocol, running, wait_for

import openai  # isort: skip  # behind serving, which skips all where it is lacking


@pytest.fixture(scope="module")
def server():
    with running() as made:
        yield made


@pytest.fixture(scope="module")
def alone():
    return engine()


def one(alone, messages, **settings):
    return alone.answer([messages], **settings)[0]


# --- the same answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[], [(20, 32)], [(7, 60), (60, 7), (32, 32)]], ids=len)
def test_text_and_pictures(server, alone, sizes):
    """Data URIs of mixed sizes; usage counts what the engine counts."""
    messages = user_message("What is this?", [tiny.picture(*size) for size in sizes])
    expected = one(alone, messages, max_new_tokens=12)
    completion = server.ask(messages, max_tokens=12)
    [choice], usage = completion.choices, completion.usage
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and choice.index == 0 and choice.logprobs is None
    assert (completion.object, completion.model) == ("chat.completion", NAME)
    assert usage.completion_tokens == 12 and usage.prompt_tokens == expected.prompt_tokens
    assert usage.total_tokens == usage.prompt_tokens + 12
    details = usage.prompt_tokens_details.model_dump()
    assert details["image_tokens"] == expected.image_tokens
    assert details["cached_tokens"] == 0
    assert (details["image_tokens"] > 0) == bool(sizes)


def test_conversations_of_several_turns(server, alone):
    rng = random.Random(4)
    for _ in range(10):
        messages = random_question(rng)
        expected = one(alone, messages, max_new_tokens=6)
        assert server.ask(messages, max_tokens=6).choices[0].message.content == expected.text


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "JPEG"])
def test_kinds_of_pictures(server, alone, kind):
    """JPEG loses a little, so it is compared with itself only where nothing is lost."""
    picture = tiny.picture(16, 16).quantize(8).convert("RGB")
    content = [image_part(data_uri(picture, kind)), {"type": "text", "text": "What?"}]
    completion = server.client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": content}], max_tokens=6
    )
    assert completion.usage.prompt_tokens_details.image_tokens > 0
    if kind in ("PNG", "GIF"):
        expected = one(alone, user_message("What?", [picture]), max_new_tokens=6)
        assert completion.choices[0].message.content == expected.text


def test_system_words_and_their_newer_name(server, alone):
    question = {"role": "user", "content": "What?"}
    for role in ("system", "developer"):
        content = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
        given = [{"role": role, "content": content}, question]
        told = [{"role": "system", "content": "Be brief."}, question]
        expected = one(alone, told, max_new_tokens=6)
        assert server.ask(given, max_tokens=6).choices[0].message.content == expected.text
    assert expected.text != one(alone, [question], max_new_tokens=6).text


def test_system_words_that_the_template_leaves_out_are_refused(server):
    """The template of a small model knows them in front only."""
    late = {"role": "system", "content": "Answer in verse."}
    with pytest.raises(openai.BadRequestError, match="leaves out message 1"):
        server.ask([{"role": "user", "content": "What?"}, late], max_tokens=2)


def test_the_clients_own_messages_can_be_sent_back(server):
    """With all the fields that are empty in them."""
    first = server.ask(user_message("What?", []), max_tokens=4).choices[0].message
    again = [
        {"role": "user", "content": "What?"},
        first.model_dump(),
        {"role": "user", "content": "Why?"},
    ]
    for given in (again, [again[0], first, again[2]]):
        server.client.chat.completions.create(model=NAME, messages=given, max_tokens=2)


def test_a_stop_text_ends_the_answer(server, alone):
    messages = user_message("Say more.", [tiny.picture(20, 32)])
    whole = one(alone, messages, max_new_tokens=30).text
    for stop in (whole[8], [whole[8:10], "never said"]):
        expected = one(
            alone,
            messages,
            max_new_tokens=30,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )
        choice = server.ask(messages, max_tokens=30, stop=stop).choices[0]
        assert choice.message.content == expected.text != whole
        assert choice.finish_reason == "stop"


def test_seeds_and_several_answers(server, alone):
    messages = user_message("Say more.", [tiny.picture(20, 32)])
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "n": 3}
    expected = alone.answer([messages], max_new_tokens=8, top_k=50, **settings)
    completion = server.ask(messages, max_tokens=8, extra_body={"top_k": 50}, **settings)
    told = [choice.message.content for choice in completion.choices]
    assert told == [answer.text for answer in expected] and len(set(told)) == 3
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert completion.usage.completion_tokens == 24
    assert completion.usage.prompt_tokens == expected[0].prompt_tokens


def test_the_default_is_the_likeliest_answer_and_drawing_is_asked_for(server, alone):
    messages = user_message("Say more.", [])
    expected = one(alone, messages, max_new_tokens=8).text
    assert {server.ask(messages, max_tokens=8).choices[0].message.content for _ in range(3)} == {
        expected
    }
    drawn = {
        server.ask(messages, max_tokens=8, temperature=2).choices[0].message.content
        for _ in range(4)
    }
    assert len(drawn) > 1


@pytest.mark.parametrize("top", [None, 0, 3])
def test_logprobs_are_the_engines(server, alone, top):
    messages = user_message("What?", [tiny.picture(20, 32)])
    expected = one(alone, messages, max_new_tokens=6, logprobs=top or 0)
    settings = {} if top is None else {"top_logprobs": top}
    choice = server.ask(messages, max_tokens=6, logprobs=True, **settings).choices[0]
    assert len(choice.logprobs.content) == len(expected.logprobs) == 6
    for told, own in zip(choice.logprobs.content, expected.logprobs, strict=True):
        assert told.token == own.text and told.logprob == pytest.approx(own.logprob, abs=1e-4)
        assert told.bytes in (None, list(own.text.encode()))
        assert [one.token for one in told.top_logprobs] == [text for _, text, _ in own.top]
        values = [value for _, _, value in own.top]
        assert [one.logprob for one in told.top_logprobs] == pytest.approx(values, abs=1e-4)


def test_tokens_by_number(server, alone):
    """vLLM's extension, by which `eve parity` compares servers."""
    messages = user_message("What?", [])
    expected = one(alone, messages, max_new_tokens=6)
    completion = server.ask(
        messages, max_tokens=6, logprobs=True, extra_body={"return_tokens_as_token_ids": True}
    )
    told = [one.token for one in completion.choices[0].logprobs.content]
    assert told == [f"token_id:{id}" for id in expected.token_ids]


def test_budgets_for_pictures():
    """`max_image_tokens` and low detail are the engine's budget."""
    wide = {"edge": 128}  # up to 16 x 16 cells, 273 tokens
    of, alone = engine(), engine()
    for each in (of, alone):
        each.processor = tiny.processor(**wide)
    messages = user_message("What?", [tiny.picture(128, 128)])
    with running(of) as server:
        client = server.client
        for ours, settings in ((60, {"extra_body": {"max_image_tokens": 60}}), (85, {})):
            [message] = protocol(messages)
            if not settings:
                message["content"][0]["image_url"]["detail"] = "low"
            expected = one(alone, messages, max_new_tokens=4, max_image_tokens=ours)
            completion = client.chat.completions.create(
                model=NAME, messages=[message], max_tokens=4, **settings
            )
            assert completion.choices[0].message.content == expected.text
            used = completion.usage.prompt_tokens_details.image_tokens
            assert used == expected.image_tokens <= ours
        mixed = [*protocol(messages)[0]["content"], message["content"][0]]
        with pytest.raises(openai.BadRequestError, match="low for some pictures only"):
            client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": mixed}], max_tokens=4
            )


def test_the_longest_answer_where_none_is_named(alone):
    """The server's default, or what room the prompt leaves in the model."""
    with running(default_tokens=20) as server:
        assert server.ask(user_message("What?", [])).usage.completion_tokens == 20
        long = "x" * 490
        usage = server.ask(user_message(long, [])).usage
        assert usage.total_tokens == alone.max_length and 1 < usage.completion_tokens < 20
        with pytest.raises(openai.BadRequestError, match="the model takes 512 in all"):
            server.ask(user_message(long, []), max_tokens=40)


def test_earlier_turns_are_not_read_again(alone):
    with running(engine(keep_tokens=1024)) as server:
        messages = user_message("What is this?", [tiny.picture(32, 32)])
        first = server.ask(messages, max_tokens=8)
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        answer = first.choices[0].message.content
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Why?"}]
        second = server.ask(messages, max_tokens=8)
        assert second.usage.prompt_tokens_details.cached_tokens > 21  # the picture, at least
        assert second.choices[0].message.content == one(alone, messages, max_new_tokens=8).text
        assert server.metric("cached_tokens_total") > 21


# --- streams --------------------------------------------------------------------------------------


def collected(stream):
    """Texts, finish reasons and log-probabilities by choice, and the usages; the order is checked."""
    texts, reasons, logprobs, usages = {}, {}, {}, []
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk" and chunk.model == NAME
        if chunk.usage is not None:
            assert not chunk.choices
            usages.append(chunk.usage)
        for choice in chunk.choices:
            assert not usages and choice.index not in reasons
            if choice.index not in texts:  # the first names the role and says nothing
                assert choice.delta.role == "assistant" and choice.delta.content == ""
                texts[choice.index], logprobs[choice.index] = "", []
                continue
            assert choice.delta.role is None
            texts[choice.index] += choice.delta.content or ""
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, logprobs, usages


def test_a_stream_says_what_the_whole_answer_says(server, alone):
    rng = random.Random(5)
    for index in range(8):
        messages = random_question(rng)
        settings = {"max_tokens": 10, "logprobs": True, "top_logprobs": 2}
        settings |= {"temperature": 1, "seed": index, "n": 2} if index % 2 else {}
        whole = server.ask(messages, **settings)
        streamed = server.ask(
            messages, stream=True, stream_options={"include_usage": True}, **settings
        )
        texts, reasons, logprobs, usages = collected(streamed)
        for choice in whole.choices:
            assert texts[choice.index] == choice.message.content
            assert reasons[choice.index] == choice.finish_reason
            assert logprobs[choice.index] == choice.logprobs.content
        assert usages == [whole.usage]
        if not index % 2:
            assert texts == {0: one(alone, messages, max_new_tokens=10).text}
    assert collected(server.ask(messages, stream=True, max_tokens=3))[3] == []


def test_a_stream_comes_token_by_token(server):
    """And ends as the protocol says, byte for byte."""
    response = server.post(chat("Say more.", stream=True, max_tokens=20))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(
        event.startswith("data: ") for event in events[:-1]
    )
    assert len(events) > 10
    assert '"usage"' not in response.text  # nobody asked for it


# --- together -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_32_clients_at_once(alone, stream):
    """Each gets what it gets alone, and they are answered together: fewer, larger batches."""
    rng = random.Random(6)
    asked = [(random_question(rng, turns=2), rng.randint(20, 40)) for _ in range(32)]
    expected = [one(alone, messages, max_new_tokens=number).text for messages, number in asked]
    with running() as server:

        def ask(messages, number):
            told = server.ask(messages, max_tokens=number, stream=stream)
            return collected(told)[0][0] if stream else told.choices[0].message.content

        with ThreadPoolExecutor(32) as threads:
            told = list(threads.map(lambda pair: ask(*pair), asked))
        assert told == expected
        wait_for(lambda: server.metric("requests_total", outcome="answered") == 32)
        assert server.metric("completion_tokens_total") == sum(number for _, number in asked)
        # One behind the other would be one row in each of 32 calls.
        assert max(server.rows) >= 8, server.rows
        assert len(set(expected)) > 20  # the model does not say the same to everybody


def test_a_newcomer_is_answered_while_a_long_answer_runs():
    with running(engine(positions=8192), max_tokens=8000) as server:
        long = server.ask(user_message("Say more.", []), max_tokens=8000, stream=True)
        next(iter(long))
        server.ask(user_message("What?", []), max_tokens=3)
        assert max(server.rows) == 2  # side by side, and the long one goes on
        wait_for(lambda: server.service.worker.batch.running == 1)
        long.close()
        wait_for(lambda: server.service.worker.batch.running == 0)
