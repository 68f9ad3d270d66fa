"""A chat request: bytes to a checked conversation, with every refusal in the protocol's own shape.

The classes are pydantic's, made for one server's limits, so that its OpenAPI document says the
bounds that hold.  A field of the protocol that would change the answer and that nothing here can
honour is refused by name, and accepted where it asks for nothing: no flag is ignored silently.

Easy to get wrong: JSON goes to pydantic as bytes.  Python's own parser takes NaN, surrogates that
no tokenizer can encode, and as many digits and brackets as somebody cares to send.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from eve_vlm.serve.messages import Messages
from eve_vlm.serve.sampling import (
    LEAST_TEMPERATURE,
    MAX_LOGPROBS,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    Sampling,
)

from .limits import LOW_DETAIL_TOKENS, Limits, RequestError

MAX_PARTS = 256  # of one message
MAX_WORD = 512  # letters of names that are only noted
SHOWN_MISTAKES = 1000  # above, naming them costs more than sending them did
MESSAGE_LENGTH = 300  # pydantic's messages quote what was sent
# Fields that nothing here can honour, with the values at which they ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None, False, True),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "prompt_cache_options": (None,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
# What the client's own objects hold beside an answer's words when they are sent back.
UNSUPPORTED_IN_ANSWERS: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "name": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureSource:
    """Where a picture comes from, and its place in the request."""

    url: str
    param: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """A request as the engine understands it.

    messages: parts of type "image" wait for their pictures, which `pictures` names in order.
    max_tokens: None leaves it to the server and to the room that the prompt leaves.
    """

    model: str
    messages: Messages
    pictures: tuple[PictureSource, ...]
    sampling: Sampling
    max_tokens: int | None
    n: int
    stream: bool
    include_usage: bool
    token_ids: bool


def _strict(title: str, /, **fields: Any) -> Any:
    """A pydantic class that takes exactly these fields, and no other types than theirs."""
    from pydantic import ConfigDict, create_model

    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return create_model(title, __config__=config, **fields)


def _neutral(fields: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Fields that may be given as long as they ask for nothing."""
    from pydantic import AfterValidator, WithJsonSchema
    from pydantic_core import PydanticCustomError

    def only(values: tuple[Any, ...]) -> Any:
        def check(value: Any) -> Any:
            if value not in values:
                raise PydanticCustomError("unsupported", "is not supported here; leave it out")
            return value

        schema = WithJsonSchema({"enum": list(values)})
        return (Annotated[Any, AfterValidator(check), schema], None)

    return {name: only(values) for name, values in fields.items()}


def _text_or_list(text: Any, part: Any, *, least: int, most: int) -> Any:
    """The type of a text, or of a list whose first mistake ends the reading of it."""
    from pydantic import Discriminator, Field, Tag

    several = Field(min_length=least, max_length=most, fail_fast=True)
    return Annotated[
        Annotated[text, Tag("~text")] | Annotated[list[part], Tag("~list"), several],
        Discriminator(lambda value: "~text" if isinstance(value, str) else "~list"),
    ]


def _message_type(limits: Limits) -> Any:
    """The type of one message: a union told apart by its role."""
    from pydantic import Field

    text: Any = Annotated[str, Field(max_length=limits.max_text)]
    text_part: Any = _strict("TextPart", type=Literal["text"], text=text)
    url = Field(
        max_length=limits.max_body,
        description="data:image/TYPE;base64,... or, if the server allows it, an https URL.",
    )
    detail = Field(
        "auto",
        description=f"`low` is a budget of {LOW_DETAIL_TOKENS} tokens for each picture, the others "
        "leave it to the model; alike for all pictures of a request.",
    )
    image_url = _strict(
        "ImageURL", url=(str, url), detail=(Literal["auto", "low", "high"] | None, detail)
    )
    image_part: Any = _strict("ImagePart", type=Literal["image_url"], image_url=image_url)
    part = Annotated[text_part | image_part, Field(discriminator="type")]

    def message(name: str, role: Any, part: Any, neutral: dict[str, tuple[Any, ...]]) -> Any:
        content = _text_or_list(text, part, least=1, most=MAX_PARTS)
        return _strict(name, role=role, content=content, **_neutral(neutral))

    system = message("SystemMessage", Literal["system", "developer"], text_part, {"name": (None,)})
    user = message("UserMessage", Literal["user"], part, {"name": (None,)})
    assistant = message("AssistantMessage", Literal["assistant"], text_part, UNSUPPORTED_IN_ANSWERS)
    return Annotated[system | user | assistant, Field(discriminator="role")]


def request_class(limits: Limits, *, name: str) -> Any:
    """The pydantic class of a chat request to a server with these limits, serving `name`."""
    from pydantic import Field

    def number(kind: Any, least: float, most: float, about: str) -> Any:
        return (kind | None, Field(None, ge=least, le=most, description=about))

    def noted() -> Any:
        return (Annotated[str, Field(max_length=MAX_WORD)] | None, None)

    options = _strict(
        "StreamOptions",
        include_usage=(bool | None, Field(None, description="A last chunk with the usage.")),
        **_neutral({"include_obfuscation": (None, False)}),
    )
    stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
    stops = _text_or_list(stop, stop, least=0, most=MAX_STOPS)
    message: Any = _message_type(limits)
    longest = f"Longest answer in tokens; {limits.default_tokens} if left out."
    return _strict(
        "ChatCompletionRequest",
        model=(str, Field(max_length=MAX_WORD, json_schema_extra={"enum": [name]})),
        messages=(
            Annotated[list[message], Field(fail_fast=True)],
            Field(min_length=1, max_length=limits.max_messages),
        ),
        max_tokens=number(int, 1, limits.max_tokens, longest),
        max_completion_tokens=number(int, 1, limits.max_tokens, longest),
        temperature=number(
            float,
            0,
            2,
            "0, the default here, takes the likeliest token; the protocol's own default is 1. "
            f"Drawing begins at {LEAST_TEMPERATURE}.",
        ),
        top_p=number(float, 1e-6, 1, "Draw from the likeliest tokens of this probability."),
        top_k=number(int, 0, 2**31 - 1, "Not OpenAI's: draw from so many tokens; 0 means all."),
        seed=number(int, -(2**63), 2**63 - 1, "The same seed draws the same answer."),
        max_image_tokens=number(
            int, 1, 2**31 - 1, "Not OpenAI's: most tokens for each picture of the request."
        ),
        n=number(int, 1, limits.max_answers, "Answers; drawn ones take seed, seed + 1, ..."),
        stop=(stops | None, Field(None, description="Texts that end the answer.")),
        logprobs=(bool | None, None),
        top_logprobs=number(int, 0, MAX_LOGPROBS, "Needs `logprobs`."),
        return_tokens_as_token_ids=(
            bool | None,
            Field(None, description="Not OpenAI's but vLLM's: `logprobs` name token_id:NUMBER."),
        ),
        stream=(bool | None, None),
        stream_options=(options | None, None),
        metadata=(
            Annotated[dict[str, Annotated[str, Field(max_length=MAX_WORD)]], Field(max_length=16)]
            | None,
            Field(None, description="Accepted and not kept, as are the next ones."),
        ),
        user=noted(),
        safety_identifier=noted(),
        prompt_cache_key=noted(),
        prompt_cache_retention=noted(),
        **_neutral(UNSUPPORTED),
    )


def read_request(body: bytes, kind: Any, limits: Limits) -> ChatRequest:
    """Bytes to a request.

    Args:
        kind: what `request_class` made.

    Raises:
        RequestError: saying what is wrong and where (400).
    """
    from pydantic import ValidationError

    # Each value of a list or an object but the first has a comma, and takes far more memory than
    # it has bytes; a longer text than allowed has no better reason for them.
    if body.count(b",") > 2 * limits.max_text:
        raise RequestError(400, "The request has too many values; leave some out.")
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None
    for field, needed in (("top_logprobs", "logprobs"), ("stream_options", "stream")):
        if vars(request)[field] is not None and not vars(request)[needed]:
            raise RequestError(400, f"{field} needs {needed}; set it too.", param=field)
    lengths = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(lengths) > 1:
        raise RequestError(
            400,
            f"max_tokens is {request.max_tokens} and max_completion_tokens "
            f"{request.max_completion_tokens}; give one of them.",
            param="max_completion_tokens",
        )
    messages, pictures, low = _conversation(request.messages, limits)
    options, max_tokens = request.stream_options, next(iter(lengths), None)
    return ChatRequest(
        model=request.model,
        messages=messages,
        pictures=pictures,
        sampling=_sampling(request, max_tokens=max_tokens or 1, low=low),
        max_tokens=max_tokens,
        n=request.n or 1,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        token_ids=bool(request.return_tokens_as_token_ids),
    )


def _sampling(request: Any, *, max_tokens: int, low: bool) -> Sampling:
    """How the answers are chosen; what a request leaves out is `Sampling`'s own."""
    budgets = [request.max_image_tokens, LOW_DETAIL_TOKENS if low else None]
    stop = request.stop or ()
    given = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "seed": request.seed,
        "stop": (stop,) if isinstance(stop, str) else tuple(stop),
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        "max_image_tokens": min((one for one in budgets if one is not None), default=None),
    }
    if 0 < (request.temperature or 0) < LEAST_TEMPERATURE:
        raise RequestError(
            400,
            f"temperature is {request.temperature}; give 0 for the likeliest token or at least "
            f"{LEAST_TEMPERATURE}.",
            param="temperature",
        )
    chosen = {name: value for name, value in given.items() if value is not None}
    return Sampling(max_new_tokens=max_tokens, **chosen)


def _conversation(
    given: list[Any], limits: Limits
) -> tuple[Messages, tuple[PictureSource, ...], bool]:
    """Messages for the engine, the pictures that they wait for, and whether detail is low."""
    messages: Messages = []
    pictures: list[PictureSource] = []
    details, letters = set(), 0
    for index, message in enumerate(given):
        role = "system" if message.role == "developer" else message.role
        parts: list[dict[str, Any]] = []
        content = message.content
        for place, part in enumerate([content] if isinstance(content, str) else content):
            if isinstance(part, str) or part.type == "text":
                text = part if isinstance(part, str) else part.text
                letters += len(text)
                parts.append({"type": "text", "text": text})
            else:
                where = f"messages[{index}].content[{place}].image_url"
                pictures.append(PictureSource(url=part.image_url.url, param=where))
                details.add(part.image_url.detail == "low")
                parts.append({"type": "image"})
        if any(part["type"] == "image" for part in parts):
            messages.append({"role": role, "content": parts})
        else:  # a chat template may know text alone where there is no picture
            words = "".join(part["text"] for part in parts)
            messages.append({"role": role, "content": words})
    for count, most, what in (
        (letters, limits.max_text, "letters"),
        (len(pictures), limits.max_pictures, "pictures"),
    ):
        if count > most:
            raise RequestError(
                400, f"The messages have {count} {what}; at most {most} may be.", param="messages"
            )
    if len(details) > 1:
        raise RequestError(
            400, "The detail is low for some pictures only; give all the same.", param="messages"
        )
    return messages, tuple(pictures), True in details


def _refusal(error: Any) -> RequestError:
    """What pydantic found first, and where, as a refusal."""
    if error.error_count() > SHOWN_MISTAKES:
        return RequestError(400, f"The body has {error.error_count()} mistakes; see /openapi.json.")
    found = error.errors(include_url=False, include_input=False, include_context=False)[0]
    kind, param = found["type"], _param(found["loc"])
    message = f"{found['msg'][:MESSAGE_LENGTH].rstrip('.')}."
    if kind == "json_invalid":
        return RequestError(400, f"The body is not JSON that can be read: {message}", code=kind)
    if kind == "extra_forbidden":
        return RequestError(
            400, f"{param} is not a parameter here.", param=param, code="unknown_parameter"
        )
    if kind == "unsupported":
        return RequestError(400, f"{param} {message}", param=param, code="unsupported_parameter")
    return RequestError(400, f"{param or 'The body'}: {message}", param=param or None, code=kind)


def _param(loc: tuple[int | str, ...]) -> str:
    """A place as the protocol writes it, without pydantic's names of union members.

    >>> _param(("messages", 0, "user", "content", "~list", 1, "image_url", "image_url", "url"))
    'messages[0].content[1].image_url.url'
    """
    text = ""
    for before, part in zip((None, *loc), loc, strict=False):
        if isinstance(part, int):
            text += f"[{part}]"
        elif not isinstance(before, int) and not part.startswith("~"):
            text += f".{part[:MAX_WORD]}"
    return text.lstrip(".")


__all__ = ["ChatRequest", "PictureSource", "read_request", "request_class"]
