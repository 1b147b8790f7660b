"""The tests of puter.py, and FakePuter, the scripted Puter server that they all talk to.

    pytest test_puter.py
    python test_puter.py serve        # the scripted server, in the foreground

FakePuter is a real HTTP server on a real socket. It answers as a Puter server was recorded to
answer, and can be told to fail in every way that such a server, or the road to it, can fail.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import selectors
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any, NoReturn
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit, urlunsplit

import pytest
import requests

# =============================================================================
# Helpers
# =============================================================================


def eventually(check: Callable[[], Any], timeout_s: float = 5.0) -> bool:
    """Waits until `check()` is true; says whether it came true in time."""
    end = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def compact(value: Any) -> str:
    """JSON as the server writes it: no spaces, and no character escaped without need."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def with_query(url: str, **extra: str) -> str:
    """`url` with query parameters added; those that it has are kept."""
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True) + list(extra.items())
    return urlunsplit(parts._replace(query=urlencode(query)))


def query_value(url: str, name: str) -> str | None:
    """The first value of one query parameter of `url`."""
    return parse_qs(urlsplit(url).query).get(name, [None])[0]


def parse_form(body: bytes, content_type: str) -> dict[str, Any]:
    """The fields of a multipart form, in order: bytes for a file, decoded JSON for the others."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    fields: dict[str, Any] = {}
    for part in body.split(b"--" + boundary[1].encode())[1:-1] if boundary else []:
        head, _, data = part.partition(b"\r\n\r\n")
        if name := re.search(rb'[ ;]name="([^"]*)"', head):
            content = data.removesuffix(b"\r\n")
            fields[name[1].decode()] = (
                content if b"filename=" in head else json_or_bytes(content)
            )
    return fields


def json_or_bytes(data: bytes) -> Any:
    """`data` decoded from JSON, or as it is where that cannot be done."""
    try:
        return json.loads(data)
    except ValueError:
        return data


# =============================================================================
# FakePuter: what passes over the wire
# =============================================================================

JSON_TYPE = "application/json; charset=utf-8"
NDJSON_TYPE = "application/x-ndjson"
SSE_TYPE = "text/event-stream; charset=utf-8"
HTML_TYPE = "text/html; charset=utf-8"

ALLOWANCE_MICROCENTS = 25_000_000
SENTENCE = "The quick brown fox — naïve café, 日本語, 🦊 — jumps over the lazy dog.\nSecond line."
LOREM = "Cillum duis magna laborum velit consequat amet do eiusmod.\nAmet veniam dolore enim."
ODD_TEXT = "One\u2028two\u0085three \U0001f469\u200d\U0001f467 \U0001f98a and the end."
USAGE = {
    "prompt": 11,
    "completion": 22,
    "input_cache_read": 0,
    "request": 1,
    "usd_cents": 0.0055,
}
OPENAI_USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 22,
    "cached_tokens": 5,
    "usd_cents": 0.01,
}
CLAUDE_USAGE = {
    "input_tokens": 11,
    "output_tokens": 22,
    "cache_read_input_tokens": 5,
    "usd_cents": 0.06,
}
ZERO_USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
NO_SESSION_TOKEN = (
    "This API cannot be called with an account session token. Use an app or worker token, "
    "or create an API token from the dashboard (Account → API Token)."
)


@dataclass
class FakeAccount:
    """One account of the fake server, and what is wrong with it."""

    username: str
    token: str
    credit_microcents: int = ALLOWANCE_MICROCENTS  # none left: 402 for what is not free
    max_in_window: int | None = None  # chat calls in `window_s`: one more gets 429
    window_s: float = 10.0
    max_concurrent: int | None = None  # chat calls at once: one more gets 429
    dead: bool = False  # the token is of no use any more: 401 everywhere
    temporary: bool = False
    error: tuple[int, dict[str, Any]] | None = None  # the answer to each driver call
    session_token: bool = False  # good for chat only after an exchange
    running: int = field(default=0, init=False, repr=False)
    hits: deque[float] = field(default_factory=deque, init=False, repr=False)


@dataclass(frozen=True)
class Seen:
    """One request as the server saw it."""

    method: str
    path: str
    headers: Message
    body: Any
    token: str | None
    account: str | None
    model: str | None
    args: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What a scripted model says, before it is put into one of the four shapes of the wire.

    A stream is told apart from a complete reply by `error` (it ends with that error after
    `error_after` words), `fault` (a key of `FAULTS`), `whole` (one piece, not words) and
    `bytewise` (a chunk for each byte). `claude` is for content in parts, as Anthropic has it.
    """

    text: str = ""
    reasoning: tuple[str, ...] = ()
    calls: tuple[dict[str, Any], ...] = ()
    finish: str = "stop"
    usage: dict[str, Any] | None = field(default_factory=lambda: dict(USAGE))
    claude: bool = False
    served_by: tuple[str, str] | None = None
    extra_content: dict[str, Any] | None = None
    pause_s: float = 0.0
    error: str | None = None
    error_after: int = 5
    fault: str | None = None
    whole: bool = False
    bytewise: bool = False

    def pieces(self) -> list[str]:
        """The text as it is streamed: a word and the space after it at a time."""
        words = [self.text] if self.whole else re.split(r"(?<= )", self.text)
        return [word for word in words if word][
            : self.error_after if self.error else None
        ]

    def streamed_calls(self) -> Sequence[dict[str, Any]]:
        """A stream of an OpenAI-style provider loses every call but the last."""
        return self.calls if self.claude else self.calls[-1:]


@dataclass(frozen=True)
class Raw:
    """A reply given as it is: JSON, or bytes of any type."""

    body: Any
    status: int = 200
    content_type: str = JSON_TYPE
    headers: Mapping[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An error reply in the server's own form."""

    def __init__(self, status: int, code: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message, "message": message, "code": code, **more}


# =============================================================================
# FakePuter: the catalogue
# =============================================================================


def openrouter_model(
    name: str, usd_cents: tuple[int, int] = (100, 200)
) -> dict[str, Any]:
    """A catalogue entry of a model that is reached through OpenRouter."""
    prompt, completion = usd_cents
    prices = {"prompt": prompt, "completion": completion, "request": 0, "image": 0}
    return {
        "id": f"openrouter:{name}",
        "name": f"{name} (OpenRouter)",
        "aliases": [name, name, f"openrouter/{name}", name.partition("/")[2]],
        "context": 128000,
        "max_tokens": 16384,
        "costs_currency": "usd-cents",
        "input_cost_key": "prompt",
        "output_cost_key": "completion",
        "costs": {"tokens": 1000000, **prices},
        "release_date": "2023-11-14",
        "provider": "openrouter",
    }


PAID_AND_FREE = (
    "deepseek/deepseek-r1-0528",
    "mistralai/devstral-2512",
    "qwen/qwen3-coder",
    "xiaomi/mimo-v2-flash",
)
DIRECT_MODELS = """[
{"puterId": "anthropic:anthropic/claude-opus-4-5", "id": "claude-opus-4-5-20251101",
 "modalities": {"input": ["text", "image", "pdf"], "output": ["text"]}, "open_weights": false,
 "tool_call": true, "knowledge": "2025-03-31", "release_date": "2025-11-01",
 "aliases": ["claude-opus-4-5-latest", "claude-opus-4-5", "claude-opus-4.5",
  "anthropic/claude-opus-4-5", "anthropic:anthropic/claude-opus-4-5"], "name": "Claude Opus 4.5",
 "costs_currency": "usd-cents", "input_cost_key": "input_tokens",
 "output_cost_key": "output_tokens", "costs": {"tokens": 1000000, "input_tokens": 500,
  "ephemeral_5m_input_tokens": 625, "ephemeral_1h_input_tokens": 1000,
  "cache_read_input_tokens": 50, "output_tokens": 2500},
 "context": 200000, "max_tokens": 64000, "provider": "claude"},
{"puterId": "google:google/gemini-2.5-flash", "id": "gemini-2.5-flash",
 "modalities": {"input": ["text", "image", "audio", "video", "pdf"], "output": ["text"]},
 "open_weights": false, "tool_call": true, "knowledge": "2025-01", "release_date": "2025-03-20",
 "name": "Gemini 2.5 Flash",
 "aliases": ["google/gemini-2.5-flash", "google:google/gemini-2.5-flash"], "context": 1048576,
 "costs_currency": "usd-cents", "input_cost_key": "prompt_tokens",
 "output_cost_key": "completion_tokens", "costs": {"tokens": 1000000, "prompt_tokens": 30,
  "completion_tokens": 250, "thinking_tokens": 250, "cached_tokens": 3,
  "grounding_requests": 3500000}, "max_tokens": 65536, "provider": "gemini"},
{"puterId": "groq:allam-2-7b", "id": "allam-2-7b",
 "modalities": {"input": ["text"], "output": ["text"]}, "open_weights": true,
 "tool_call": false, "release_date": "2025-01-23", "name": "ALLaM 2 7B",
 "aliases": ["allam-2-7b", "groq:allam-2-7b"], "context": 4096,
 "costs_currency": "usd-cents", "input_cost_key": "prompt_tokens",
 "output_cost_key": "completion_tokens", "costs": {"tokens": 1000000, "prompt_tokens": 0,
  "completion_tokens": 0, "cached_tokens": 0}, "max_tokens": 4096, "provider": "groq"}
]"""
FAKE_MODEL: dict[str, Any] = {
    "id": "fake",
    "provider": "fake-chat",
    "costs": {"tokens": 1000000},
}


def default_catalogue() -> list[dict[str, Any]]:
    """A lab model for each scenario, the recorded paid and free pairs, three direct models."""
    models = [openrouter_model(f"lab/{name}") for name in SCENARIOS if name != "fake"]
    models += [openrouter_model(name) for name in (*PAID_AND_FREE, "openai/gpt-5-nano")]
    models += [openrouter_model(f"{name}:free", (0, 0)) for name in PAID_AND_FREE]
    models += json.loads(DIRECT_MODELS)
    return sorted(models, key=lambda model: model["id"])


def is_free(model: Mapping[str, Any]) -> bool:
    """Whether every cost of a catalogue entry is 0."""
    return not any(cost for key, cost in model["costs"].items() if key != "tokens")


# =============================================================================
# FakePuter: the scenarios
# =============================================================================

# What a scenario, or a test's own script, may answer: a name stands for that scenario,
# and None means that it has written its reply itself.
Answer = Turn | Raw | str | None
Scenario = Callable[["FakeHandler", dict[str, Any]], Answer]

# How a provider's own status reaches us: status, code and message.
UPSTREAM = {
    400: (400, "upstream_bad_request", "400 scripted 400"),
    401: (500, "upstream_auth_failed", "AI provider authentication failed"),
    403: (500, "upstream_auth_failed", "AI provider authentication failed"),
    429: (429, "upstream_rate_limited", "AI provider rate limit exceeded"),
    500: (400, "upstream_provider_unavailable", "AI provider unavailable"),
}


def tool_call(call_id: str, name: str, arguments: str, **more: Any) -> dict[str, Any]:
    """A tool call in OpenAI's shape."""
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function, **more}


WEATHER_CALL = tool_call("call_1", "get_weather", '{"city": "Paris"}')
TIME_CALL = tool_call("call_2", "get_time", '{"tz": "CET"}')
BROKEN_CALL = tool_call("call_1", "get_weather", '{"city": ')
SIGNATURE = {"google": {"thought_signature": "c2lnbmF0dXJl"}}
SIGNED_CALL = {**WEATHER_CALL, "extra_content": SIGNATURE}
OLD_ERROR = {
    "code": "usage-limited-chat",
    "message": "Permission denied.",
    "status": 403,
}


def says(text: str = SENTENCE, **turn: Any) -> Scenario:
    """A scenario that always says the same."""
    return lambda handler, args: Turn(text, **turn)


def replies(
    body: Any, status: int = 200, content_type: str = JSON_TYPE, **raw: Any
) -> Scenario:
    """A scenario that always sends the same bytes or JSON."""
    return lambda handler, args: Raw(body, status, content_type, **raw)


def refuses(status: int, code: str, message: str) -> Scenario:
    """A scenario that always fails with an error of the server's own."""

    def refuse(handler: FakeHandler, args: dict[str, Any]) -> NoReturn:
        raise Refusal(status, code, message)

    return refuse


def upstream(status: int) -> Scenario:
    """A scenario in which the model's provider answers with `status`."""

    def fail(handler: FakeHandler, args: dict[str, Any]) -> NoReturn:
        attempt = {
            "model": handler.model["id"],
            "provider": handler.model["provider"],
            "status": status,
            "code": status,
            "error": f"{status} scripted {status}",
        }
        raise Refusal(*UPSTREAM[status], attempts=[attempt])

    return fail


def last_user_parts(args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The content of the last user message, as parts."""
    users = [message for message in args["messages"] if message.get("role") == "user"]
    content = users[-1]["content"] if users else ""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def tools_scenario(handler: FakeHandler, args: dict[str, Any]) -> Answer:
    """Calls a tool, and talks once the history holds the result."""
    has_result = any(message.get("role") == "tool" for message in args["messages"])
    return (
        Turn(SENTENCE)
        if has_result
        else Turn(calls=(WEATHER_CALL,), finish="tool_calls")
    )


def vision_scenario(handler: FakeHandler, args: dict[str, Any]) -> Answer:
    """Says which types of parts it was sent."""
    return Turn(
        "parts: " + json.dumps([part["type"] for part in last_user_parts(args)])
    )


def echo_scenario(handler: FakeHandler, args: dict[str, Any]) -> Answer:
    """Repeats the last user message."""
    return Turn("".join(part.get("text", "") for part in last_user_parts(args)))


def hang_scenario(handler: FakeHandler, args: dict[str, Any]) -> Answer:
    """Sends the headers of a stream, or nothing at all, and falls silent."""
    if handler.streaming:
        handler.begin_stream()
    handler.pause(30.0)
    handler.drop()
    return None


def fake_scenario(handler: FakeHandler, args: dict[str, Any]) -> Answer:
    """The server's built-in fake model, which is also what answers a blocked prompt."""
    usage: dict[str, Any] = {"usd_cents": None}
    if not handler.streaming:
        usage = {"input_tokens": 0, "output_tokens": 1, **usage}
    return Turn(
        LOREM, claude=True, served_by=("fake-chat", "fake"), whole=True, usage=usage
    )


def flaky_scenario(handler: FakeHandler, args: dict[str, Any]) -> Answer:
    """Fails the first time that its model is asked."""
    return "internal" if handler.call_number == 1 else "text"


SCENARIOS: dict[str, Scenario] = {
    # As recorded.
    "text": says(),
    "reason": says(reasoning=("thinking", "...")),
    "empty": says(""),
    "length": says(finish="length"),
    "tools": tools_scenario,
    "twotools": says("", calls=(WEATHER_CALL, TIME_CALL), finish="tool_calls"),
    "vision": vision_scenario,
    "midfail": says(error="scripted mid-stream failure"),
    "cut": says(error="terminated"),
    "nousage": says(usage=None),
    "err400": upstream(400),
    "err401": upstream(401),
    "err403": upstream(403),
    "err429": upstream(429),
    "err500": upstream(500),
    "hang": hang_scenario,
    "slow": says(pause_s=0.05),
    "long": says(" ".join(f"word{number}" for number in range(2000))),
    "fake": fake_scenario,
    # Faults of the road: the reply does not arrive whole.
    "closed": says(fault="closed"),
    "halfline": says(fault="halfline"),
    "nousageline": says(fault="nousageline"),
    "badjson": replies(b'{"success":true,"result":{"index":0,"message":{"role":"assis'),
    "html": replies(b"<html><h1>502 Bad Gateway</h1></html>", 502, HTML_TYPE),
    "notjson": replies(b"<html><h1>Welcome</h1></html>", 200, HTML_TYPE),
    "busy503": replies(
        b"<html><h1>503</h1></html>", 503, HTML_TYPE, headers={"Retry-After": "1"}
    ),
    # Faults of the server.
    "internal": refuses(500, "internal_error", "Internal Server Error"),
    "denied": refuses(403, "permission_denied", "Permission denied."),
    "flaky": flaky_scenario,
    "oldfail": replies({"success": False, "error": OLD_ERROR}),
    "blocked": fake_scenario,
    # Other shapes of a good reply.
    "badargs": says("", calls=(BROKEN_CALL,), finish="tool_calls"),
    "anthropic": says(
        calls=(WEATHER_CALL,), finish="tool_use", claude=True, usage=CLAUDE_USAGE
    ),
    "openaiusage": says(usage=OPENAI_USAGE),
    "unicode": says(ODD_TEXT, bytewise=True),
    "echo": echo_scenario,
    "extra": says(
        "", calls=(SIGNED_CALL,), finish="tool_calls", extra_content=SIGNATURE
    ),
}

# =============================================================================
# FakePuter: the four shapes of a reply
# =============================================================================

# A stream is a body and an ending; a fault says which chunks of them are really sent.
FAULTS: dict[str | None, Callable[[list[bytes], list[bytes]], list[bytes]]] = {
    None: lambda body, ending: body + ending,
    "closed": lambda body, ending: body[: len(body) // 2],
    "halfline": lambda body, ending: [*body[:-1], body[-1][: len(body[-1]) // 2]],
    "nousageline": lambda body, ending: body,
}


def arguments_of(call: Mapping[str, Any]) -> Any:
    """The arguments of a call, decoded; broken ones stay a string."""
    try:
        return json.loads(call["function"]["arguments"])
    except ValueError:
        return call["function"]["arguments"]


def tool_use(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call as Anthropic's part, which is also how a stream carries it."""
    name = call["function"]["name"]
    return {
        "type": "tool_use",
        "id": call["id"],
        "name": name,
        "input": arguments_of(call),
    }


def claude_result(turn: Turn, model: str) -> dict[str, Any]:
    """The `result` of a complete reply whose content is a list of parts."""
    parts: list[Any] = [{"type": "text", "text": turn.text}, *map(tool_use, turn.calls)]
    message = {
        "id": str(uuid.UUID(int=0)),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": parts,
        "stop_reason": "end_turn" if turn.finish == "stop" else turn.finish,
        "stop_sequence": None,
        "usage": turn.usage,
    }
    return {"message": message, "usage": turn.usage, "finish_reason": turn.finish}


def openai_result(turn: Turn) -> dict[str, Any]:
    """The `result` of a complete reply of an OpenAI-style provider."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if turn.calls else turn.text,
    }
    if turn.calls:
        message["tool_calls"] = list(turn.calls)
    if turn.reasoning:
        message["reasoning"] = "".join(turn.reasoning)
    result = {"index": 0, "message": message, "finish_reason": turn.finish}
    return result if turn.usage is None else {**result, "usage": turn.usage}


def driver_reply(turn: Turn, model: Mapping[str, Any]) -> dict[str, Any]:
    """A complete reply of /drivers/call."""
    service, provider = turn.served_by or (model["provider"], model["id"])
    result = claude_result(turn, model["id"]) if turn.claude else openai_result(turn)
    return {
        "success": True,
        "result": {**result, "via_ai_chat_service": True},
        "service": {"name": "ai-chat"},
        "metadata": {"service_used": service, "providerUsed": provider},
    }


def driver_stream(
    turn: Turn, model: Mapping[str, Any]
) -> tuple[list[bytes], list[bytes]]:
    """The body and the ending of a streamed reply of /drivers/call: one JSON object a line."""
    body: list[dict[str, Any]] = [
        {"type": "reasoning", "reasoning": piece} for piece in turn.reasoning
    ]
    body += [{"type": "text", "text": piece} for piece in turn.pieces()]
    body += [{**tool_use(call), "text": ""} for call in turn.streamed_calls()]
    if turn.extra_content:
        body += [{"type": "extra_content", "extra_content": turn.extra_content}]
    ending: dict[str, Any] = {"type": "usage"}
    if turn.error:
        ending = {"type": "error", "message": turn.error}
    elif turn.usage is not None:
        ending["usage"] = turn.usage
    *lines, last = [compact(item).encode() + b"\n" for item in [*body, ending]]
    return lines, [last]


def openai_head(kind: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """How each reply of the OpenAI endpoint, and each event of its streams, begins."""
    name = f"chatcmpl-{uuid.uuid4().hex}"
    return {
        "id": name,
        "object": kind,
        "created": int(time.time()),
        "model": model["id"],
    }


def openai_reply(turn: Turn, model: Mapping[str, Any]) -> dict[str, Any]:
    """A complete reply of the OpenAI endpoint: no reasoning, and no usage to speak of."""
    message: dict[str, Any] = {"role": "assistant", "content": turn.text}
    if turn.calls:
        message["tool_calls"] = list(turn.calls)
    finish = "tool_calls" if turn.calls else turn.finish
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    return {
        **openai_head("chat.completion", model),
        "choices": [choice],
        "usage": ZERO_USAGE,
    }


def openai_stream(
    turn: Turn, model: Mapping[str, Any]
) -> tuple[list[bytes], list[bytes]]:
    """The body and the ending of a streamed reply of the OpenAI endpoint: an error looks normal."""
    head = openai_head("chat.completion.chunk", model)

    def event(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return f"data: {compact({**head, 'choices': [choice], **more})}\n\n".encode()

    body = [event({"content": piece}) for piece in turn.pieces()]
    for index, call in enumerate(turn.streamed_calls()):
        arguments = arguments_of(call)
        text = arguments if isinstance(arguments, str) else compact(arguments)
        function = {"name": call["function"]["name"], "arguments": text}
        delta = {
            "index": index,
            "id": call["id"],
            "type": "function",
            "function": function,
        }
        body.append(event({"tool_calls": [delta]}))
    usage = {} if turn.error else {"usage": ZERO_USAGE}
    last = event({}, "tool_calls" if turn.calls else "stop", **usage)
    return body, [last, b"data: [DONE]\n\n"]


FILE_ENTRY = """{"is_dir": false, "is_shortcut": 0, "shortcut_to": null, "is_symlink": 0,
"symlink_path": null, "writable": true, "is_public": null, "thumbnail": null, "immutable": false,
"metadata": "{}", "layout": null, "subdomains": [], "workers": [], "has_website": false,
"suggested_apps": [], "associated_app": null, "appdata_app": "puter.py", "is_empty": false}"""


def file_entry(path: str, size: int) -> dict[str, Any]:
    """What the server tells about a stored file."""
    folder, _, name = path.rpartition("/")
    uid, parent = (str(uuid.uuid5(uuid.NAMESPACE_URL, text)) for text in (path, folder))
    return {
        **dict.fromkeys(("id", "uid", "uuid"), uid),
        **dict.fromkeys(("parent_id", "parent_uid"), parent),
        **dict.fromkeys(("dirname", "dirpath"), folder),
        **dict.fromkeys(("modified", "created", "accessed"), int(time.time())),
        "path": path,
        "name": name,
        "size": size,
        "type": "application/pdf",
        **json.loads(FILE_ENTRY),
    }


# =============================================================================
# FakePuter: one request
# =============================================================================


class FakeHandler(BaseHTTPRequestHandler):
    """Answers the requests of one connection; the methods without `do_` are for scenarios too."""

    server: FakeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16  # headers and body leave together; every chunk is flushed

    fake: FakePuter
    seen: Seen
    model: dict[str, Any]
    streaming: bool
    call_number: int
    stream_type: str
    running_for: FakeAccount | None
    stream_open: bool

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the terminal quiet."""

    def do_GET(self) -> None:
        """Answers any request: what is asked stands in the table of routes."""
        self.fake = self.server.fake
        self.running_for, self.stream_open, self.streaming = None, False, False
        try:
            self.seen = self.fake.note(self)
            if self.fake.wire_delay_s:
                self.pause(self.fake.wire_delay_s)
            self.fake.routes.get((self.command, self.seen.path), not_found)(self)
        except Refusal as refusal:
            self.send(Raw(refusal.body, refusal.status))
        except ConnectionError:
            self.close_connection = True
        finally:
            self.release()

    do_POST = do_GET

    # Who asks.

    def signed_in(self) -> FakeAccount:
        """The account whose token came with the request."""
        if self.seen.token is None:
            raise Refusal(401, "token_missing", "Missing authentication token")
        account = self.fake.owner(self.seen.token)
        if account is None or account.dead:
            message = "Re-authentication required"
            raise Refusal(401, "reauth_required", message, reason="token_v1")
        return account

    def caller(self) -> FakeAccount:
        """The account of a chat call, which takes fewer kinds of token and has limits."""
        account = self.signed_in()
        if account.session_token and self.seen.token not in self.fake.grants:
            raise Refusal(403, "app_or_api_token_required", NO_SESSION_TOKEN)
        origin = self.fake.grants.get(self.seen.token or "", (account, None))[1]
        if origin not in (None, self.headers.get("Origin")):
            raise Refusal(403, "app_or_api_token_required", NO_SESSION_TOKEN)
        with self.fake.lock:
            count_call(account)
            self.running_for = account
        return account

    def release(self) -> None:
        """Takes this call off the counts: before the client can know that it has ended."""
        with self.fake.lock:
            if self.running_for:
                self.running_for.running -= 1
            self.fake.open_streams -= self.stream_open
            self.running_for, self.stream_open = None, False

    def fields(self) -> dict[str, Any]:
        """The body of the request, which must be an object."""
        if not isinstance(self.seen.body, dict):
            raise Refusal(400, "bad_request", "the body is no JSON object")
        return self.seen.body

    # What is said.

    def send(self, reply: Raw) -> None:
        """Sends a whole reply."""
        is_bytes = isinstance(reply.body, bytes)
        self.send_body(reply.body if is_bytes else compact(reply.body).encode(), reply)

    def send_body(self, body: bytes, reply: Raw, length: int | None = None) -> None:
        """Sends headers and body; a `length` beyond the body's promises more than there is."""
        self.release()
        self.send_response(reply.status)
        headers = {"Content-Type": reply.content_type, **reply.headers}
        for name, value in {
            **headers,
            "Content-Length": str(length or len(body)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def begin_stream(self, content_type: str | None = None) -> None:
        """Sends the headers of a streamed reply."""
        with self.fake.lock:
            self.fake.open_streams += not self.stream_open
            self.stream_open = True
        self.send_response(200)
        self.send_header("Content-Type", content_type or self.stream_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()

    def chunk(self, data: bytes) -> None:
        """Sends one chunk at once."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def end_stream(self) -> None:
        """Sends the chunk that says that a stream has ended."""
        self.release()
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def drop(self) -> None:
        """Closes the connection under the client."""
        self.release()
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def pause(self, seconds: float) -> None:
        """Waits; ends the reply when the client goes away meanwhile, or the server stops."""
        if not seconds:
            return
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            while (left := end - time.monotonic()) > 0:
                if selector.select(left):
                    if not self.connection.recv(1, socket.MSG_PEEK):
                        raise ConnectionAbortedError("the client has gone away")
                    time.sleep(min(left, 0.01))

    # A chat call, at either address.

    def converse(
        self, args: dict[str, Any], account: FakeAccount, shapes: Shapes
    ) -> None:
        """Checks a chat call, lets the model's scenario answer it, and sends the answer."""
        check_messages(args.get("messages"))
        self.model = self.fake.find_model(args.get("model"))
        if account.credit_microcents <= 0 and not is_free(self.model):
            raise Refusal(402, "insufficient_funds", "No usage left for request.")
        self.streaming, self.stream_type = bool(args.get("stream")), shapes.stream_type
        scenario, self.call_number = self.fake.next_scenario(args["model"], self.model)
        answer: Answer | Scenario = scenario
        while isinstance(answer, str) or callable(answer):
            answer = (SCENARIOS[answer] if isinstance(answer, str) else answer)(
                self, args
            )
        if isinstance(answer, Raw):
            self.send(answer)
        elif isinstance(answer, Turn) and self.streaming:
            self.send_stream(answer, *shapes.stream(answer, self.model))
        elif isinstance(answer, Turn):
            self.send_reply(answer, compact(shapes.reply(answer, self.model)).encode())

    def send_reply(self, turn: Turn, body: bytes) -> None:
        """Sends a complete reply, after the time that its model takes."""
        self.pause(turn.pause_s * len(turn.pieces()))
        is_whole = turn.fault != "closed"
        self.send_body(
            body if is_whole else body[: len(body) // 2], Raw(None), len(body)
        )
        if not is_whole:
            self.drop()

    def send_stream(self, turn: Turn, body: list[bytes], ending: list[bytes]) -> None:
        """Sends a streamed reply, one line or event a chunk, as far as its fault lets it."""
        chunks = FAULTS[turn.fault](body, ending)
        if turn.bytewise:
            chunks = [bytes([byte]) for byte in b"".join(chunks)]
        self.begin_stream()
        for chunk in chunks[:-1]:
            self.chunk(chunk)
            self.pause(turn.pause_s)
        self.release()
        for chunk in chunks[-1:]:
            self.chunk(chunk)
        if turn.fault == "closed":
            self.drop()
        else:
            self.end_stream()


@dataclass(frozen=True)
class Shapes:
    """How one address words its replies."""

    reply: Callable[[Turn, Mapping[str, Any]], dict[str, Any]]
    stream: Callable[[Turn, Mapping[str, Any]], tuple[list[bytes], list[bytes]]]
    stream_type: str


DRIVER_SHAPES = Shapes(driver_reply, driver_stream, NDJSON_TYPE)
OPENAI_SHAPES = Shapes(openai_reply, openai_stream, SSE_TYPE)


def count_call(account: FakeAccount) -> None:
    """Counts a chat call of `account` that begins now, or refuses it for being one too many."""
    now = time.monotonic()
    while account.hits and account.hits[0] <= now - account.window_s:
        account.hits.popleft()
    if account.max_in_window is not None and len(account.hits) >= account.max_in_window:
        raise Refusal(429, "too_many_requests", "Too many requests.")
    if account.max_concurrent is not None and account.running >= account.max_concurrent:
        raise Refusal(429, "too_many_requests", "Too many concurrent requests.")
    account.hits.append(now)
    account.running += 1


def check_messages(messages: Any) -> None:
    """Refuses a history that the server refuses."""
    if not isinstance(messages, list):
        raise Refusal(500, "internal_error", "Internal Server Error")
    for message in messages:
        if not isinstance(message, dict):
            raise Refusal(400, "bad_request", "each message must be an object")
        if message.get("content") in (None, "") and not message.get("tool_calls"):
            raise Refusal(
                400, "bad_request", "each message must have a 'content' property"
            )


# =============================================================================
# FakePuter: the routes
# =============================================================================


def not_found(handler: FakeHandler) -> None:
    """Any path that the server does not know, today's /auth/get-monthly-usage among them."""
    raise Refusal(404, "not_found", "Not Found")


def forbidden(handler: FakeHandler) -> None:
    """Signing in with a password is for the server's own page."""
    raise Refusal(403, "forbidden", "Forbidden")


WHOAMI = """{"email": null, "unconfirmed_email": null, "email_confirmed": true,
"requires_email_confirmation": false, "requires_phone_verification": false,
"requires_card_verification": false, "desktop_bg_url": null, "desktop_bg_color": null,
"desktop_bg_fit": null, "is_user_token": true, "referral_code": null, "oidc_only": false,
"otp": false, "feature_flags": {}, "created_ts": 1795332414, "human_readable_age": "9 minutes ago",
"metadata": {}, "hasDevAccountAccess": false}"""


def whoami(handler: FakeHandler) -> None:
    """GET /whoami."""
    account = handler.signed_in()
    uid = str(uuid.uuid5(uuid.NAMESPACE_URL, account.username))
    own = {"username": account.username, "uuid": uid, "is_temp": account.temporary}
    handler.send(Raw({**own, **json.loads(WHOAMI)}))


def metering(handler: FakeHandler) -> None:
    """GET /metering/usage."""
    left = handler.signed_in().credit_microcents
    allowance = {
        "remaining": left,
        "monthUsageAllowance": ALLOWANCE_MICROCENTS,
        "addons": {},
    }
    usage = {"total": max(0, ALLOWANCE_MICROCENTS - left)}
    handler.send(Raw({"usage": usage, "appTotals": {}, "allowanceInfo": allowance}))


def model_ids(handler: FakeHandler) -> None:
    """GET /puterai/chat/models."""
    handler.send(Raw({"models": [model["id"] for model in handler.fake.catalogue]}))


def model_details(handler: FakeHandler) -> None:
    """GET /puterai/chat/models/details."""
    handler.send(Raw({"models": handler.fake.catalogue}))


def driver_call(handler: FakeHandler) -> None:
    """POST /drivers/call."""
    account = handler.caller()
    if account.error:
        handler.send(Raw(account.error[1], account.error[0]))
        return
    body = handler.fields()
    interface, driver, method = (
        body.get(key) for key in ("interface", "driver", "method")
    )
    if (interface, driver) != ("puter-chat-completion", "ai-chat"):
        raise Refusal(404, "not_found", f"Driver not found: {interface}:{driver}")
    if method != "complete":
        raise Refusal(
            404, "not_found", f"Method '{method}' not found on driver '{interface}'"
        )
    handler.converse(handler.seen.args, account, DRIVER_SHAPES)


def openai_call(handler: FakeHandler) -> None:
    """POST /puterai/openai/v1/chat/completions."""
    account = handler.caller()
    handler.converse(handler.fields(), account, OPENAI_SHAPES)


def create_access_token(handler: FakeHandler) -> None:
    """POST /auth/create-access-token."""
    handler.send(Raw({"token": handler.fake.grant(handler.signed_in(), None)}))


def get_user_app_token(handler: FakeHandler) -> None:
    """POST /auth/get-user-app-token: the new token is good for one Origin."""
    account, origin = handler.signed_in(), handler.fields().get("origin")
    app = uuid.uuid5(uuid.NAMESPACE_URL, str(origin))
    handler.send(
        Raw({"token": handler.fake.grant(account, origin), "app_uid": f"app-{app}"})
    )


def upload(handler: FakeHandler) -> None:
    """POST /batch: the order of the fields counts, and a name in use gets a number."""
    account, form = handler.signed_in(), handler.fields()
    if list(form) != ["fileinfo", "operation", "file"]:
        raise Refusal(
            400, "bad_request", "the form needs fileinfo, operation and file, in order"
        )
    folder, name = form["operation"]["path"].rstrip("/"), form["operation"]["name"]
    if not f"{folder}/".startswith(f"/{account.username}/"):
        raise Refusal(403, "forbidden", "Permission denied.")
    stem, dot, ending = name.rpartition(".")
    names = [name] + [f"{stem} ({number}){dot}{ending}" for number in range(1, 100)]
    with handler.fake.lock:
        path = next(
            p for n in names if (p := f"{folder}/{n}") not in handler.fake.files
        )
        handler.fake.files[path] = form["file"]
    handler.send(Raw({"results": [file_entry(path, len(form["file"]))]}))


def delete(handler: FakeHandler) -> None:
    """POST /delete."""
    handler.signed_in()
    paths = handler.fields()["paths"]
    with handler.fake.lock:
        if not all(path in handler.fake.files for path in paths):
            raise Refusal(404, "not_found", "Not Found")
        entries = [
            file_entry(path, len(handler.fake.files.pop(path))) for path in paths
        ]
    handler.send(Raw(entries))


def sign_in_page(handler: FakeHandler) -> None:
    """GET /?action=authme&redirectURL=…: the page on which a person approves."""
    redirect = query_value(handler.path, "redirectURL")
    if query_value(handler.path, "action") != "authme" or not redirect:
        raise Refusal(404, "not_found", "Not Found")
    link = html.escape(with_query(redirect, token=handler.fake.login_token))
    page = (
        f'<!doctype html><title>Puter</title><a id="approve" href="{link}">Approve</a>'
    )
    handler.send(Raw(page.encode(), content_type=HTML_TYPE))


Route = Callable[[FakeHandler], None]
ROUTES: dict[tuple[str, str], Route] = {
    ("GET", "/"): sign_in_page,
    ("GET", "/whoami"): whoami,
    ("GET", "/metering/usage"): metering,
    ("GET", "/puterai/chat/models"): model_ids,
    ("GET", "/puterai/chat/models/details"): model_details,
    ("POST", "/drivers/call"): driver_call,
    ("POST", "/puterai/openai/v1/chat/completions"): openai_call,
    ("POST", "/auth/create-access-token"): create_access_token,
    ("POST", "/auth/get-user-app-token"): get_user_app_token,
    ("POST", "/batch"): upload,
    ("POST", "/delete"): delete,
    ("POST", "/login"): forbidden,
    ("POST", "/signup"): forbidden,
}

# =============================================================================
# FakePuter: the server
# =============================================================================


class FakeServer(ThreadingHTTPServer):
    """The sockets of a FakePuter: stopping it closes those of its clients too."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, address: tuple[str, int], fake: FakePuter) -> None:
        super().__init__(address, FakeHandler)
        self.fake = fake
        self.connections: set[Any] = set()

    def server_bind(self) -> None:
        """Binds without asking anybody for the name of this host."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error; anything else is, and is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def close_all(self) -> None:
        """Closes the listening socket and every connection."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class FakePuter:
    """A scripted Puter server on a real socket; API origin and GUI origin are both `url`.

        with FakePuter() as fake:
            fake.script["openrouter:lab/text"] = ["internal", "text"]
            requests.get(fake.url + "/whoami", headers={"Authorization": "Bearer token-alice"})

    `script` maps a model to a scenario name, a list of them (used up in order; the last one
    stays), or a function of handler and args that gives a Turn, a Raw, the name of a scenario,
    or None once it has written its own reply with the handler's `begin_stream`, `chunk`,
    `end_stream`, `pause`, `drop` and `send`. `routes` may be changed by a test as well.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        catalogue: list[dict[str, Any]] | None = None,
        wire_delay_s: float = 0.0,
    ) -> None:
        self.host, self.port = host, port
        self.catalogue = default_catalogue() if catalogue is None else catalogue
        self.wire_delay_s = wire_delay_s  # before the first byte of each reply
        self.lock = threading.Lock()
        self.requests: list[Seen] = []
        self.accounts: dict[str, FakeAccount] = {}
        self.grants: dict[str, tuple[FakeAccount, str | None]] = {}
        self.files: dict[str, bytes] = {}
        self.script: dict[str, Any] = {}
        self.routes: dict[tuple[str, str], Route] = dict(ROUTES)
        self.open_streams = 0
        self.add_account("alice")
        self.login_token = self.add_account("bob").token
        self._calls: Counter[str] = Counter()
        self._server: FakeServer | None = None

    def __enter__(self) -> FakePuter:  # noqa: PYI034
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The origin of the server."""
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Begins to listen; a server that was stopped comes back at the same port."""
        self._server = FakeServer((self.host, self.port), self)
        self.port = self._server.server_port
        threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        ).start()

    def stop(self) -> None:
        """Stops listening and closes every connection."""
        if self._server:
            self._server.close_all()
            self._server = None

    # For tests.

    def add_account(
        self, username: str, token: str | None = None, **limits: Any
    ) -> FakeAccount:
        """A new account; `limits` are fields of FakeAccount."""
        account = FakeAccount(username, token or f"token-{username}", **limits)
        self.accounts[account.token] = account
        return account

    def chat_calls(self) -> list[tuple[str | None, str | None]]:
        """User name and model of every call of /drivers/call, in order."""
        with self.lock:
            seen = list(self.requests)
        return [(one.account, one.model) for one in seen if one.path == "/drivers/call"]

    def approve(
        self, redirect_url: str, token: str | None = None, timeout_s: float = 10.0
    ) -> tuple[int, str]:
        """Does what the browser does when the person approves; gives status and page.

        `redirect_url` is the address to return to, or that of the whole sign-in page.
        """
        target = query_value(redirect_url, "redirectURL") or redirect_url
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            url = with_query(target, token=token or self.login_token)
            with opener.open(url, timeout=timeout_s) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    # For the handler.

    def note(self, handler: FakeHandler) -> Seen:
        """Reads a request to its end, and remembers it."""
        kind = handler.headers.get("Content-Type", "")
        data = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        body = (
            parse_form(data, kind)
            if kind.startswith("multipart/")
            else json_or_bytes(data)
        )
        scheme, _, token = handler.headers.get("Authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        owner = self.owner(token)
        path = urlsplit(handler.path).path
        fields = body if isinstance(body, dict) else {}
        args = fields.get("args") if path == "/drivers/call" else None
        args = args if isinstance(args, dict) else {}
        seen = Seen(
            method=handler.command,
            path=path,
            headers=handler.headers,
            body=body,
            token=token or None,
            account=owner.username if owner else None,
            model=(args or fields).get("model"),
            args=args,
        )
        with self.lock:
            self.requests.append(seen)
        return seen

    def owner(self, token: str) -> FakeAccount | None:
        """The account that a token stands for."""
        return self.accounts.get(token) or self.grants.get(token, (None, None))[0]

    def grant(self, account: FakeAccount, origin: str | None) -> str:
        """A new token of an account, for use with one Origin or with any."""
        with self.lock:
            token = f"granted-{len(self.grants) + 1}-{account.username}"
            self.grants[token] = (account, origin)
        return token

    def find_model(self, name: Any) -> dict[str, Any]:
        """The catalogue entry of an id, a puterId or an alias."""
        if name == FAKE_MODEL["id"]:
            return FAKE_MODEL
        for model in self.catalogue:
            if (
                name in (model["id"], model.get("puterId"), *model.get("aliases", ()))
                and name
            ):
                return model
        raise Refusal(400, "bad_request", f"Model not found: {name}")

    def next_scenario(
        self, asked: str, model: Mapping[str, Any]
    ) -> tuple[str | Scenario, int]:
        """What the model does now, and how many times it was asked, this time included."""
        names = (asked, model["id"], model.get("puterId"), *model.get("aliases", ()))
        with self.lock:
            self._calls[model["id"]] += 1
            number = self._calls[model["id"]]
            planned = next(
                (self.script[name] for name in names if name in self.script), None
            )
            if isinstance(planned, list):
                planned = planned.pop(0) if len(planned) > 1 else planned[0]
        lab_name = model["id"].removeprefix("openrouter:lab/")
        return planned or (lab_name if lab_name in SCENARIOS else "text"), number


# =============================================================================
# Tests of FakePuter itself
# =============================================================================

WIRE = Path(__file__).resolve().parent.parent / "shared" / "wire" / "exchanges.json"
STORED_FILE = "/admin/AppData/puter.py/x.pdf"
CHAT = "/drivers/call"
OPENAI_CHAT = "/puterai/openai/v1/chat/completions"

# What must be wrong with the account for an exchange to go as it was recorded.
SET_UPS: dict[str, dict[str, Any]] = {
    "whoami, token of a retired format": {"dead": True},
    "complete: bad token": {"dead": True},
    "too many at once (a temporary account has 2, a free one 3, a paid one 20)": {
        "max_concurrent": 0
    },
    "no credit left": {"credit_microcents": 0},
    "too many in 10 s": {"max_in_window": 0},
    "openai endpoint, session token": {"session_token": True},
}


def recorded_exchanges() -> list[Any]:
    """The recorded exchanges as test parameters, or one that is skipped and says why."""
    if not WIRE.is_file():
        skip = pytest.mark.skip(reason=f"there are no recordings at {WIRE}")
        return [pytest.param({}, marks=skip, id="recordings")]
    return [
        pytest.param(one, id=one["name"]) for one in json.loads(WIRE.read_text("utf-8"))
    ]


def as_sent(request: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded request for `requests`, with its placeholders filled in."""
    text = json.dumps({"json": request.get("body"), "form": request.get("form")})
    text = text.replace("<username>", "admin")
    text = text.replace('"<30 MB of text>"', '[{"role": "user", "content": "long"}]')
    sent = json.loads(text)
    if form := sent.pop("form"):
        files = {name: (None, json.dumps(value)) for name, value in form.items()}
        sent["files"] = {
            **files,
            "file": ("x.pdf", b"%PDF-1.4 small", "application/pdf"),
        }
    return {
        **sent,
        "headers": {"Authorization": "Bearer t"} if request["auth"] else None,
    }


def shape(value: Any) -> Any:
    """The keys of a JSON value at every depth; of a list, those of its first element."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items() if key != "models"}
    return [shape(inner) for inner in value[:1]] if isinstance(value, list) else None


def without_ids(text: str) -> str:
    """A reply of the OpenAI endpoint without what differs from one call to the next."""
    return re.sub(r'"id": ?"chatcmpl-\w+"|"created": ?\d+', "", text)


def chat_body(
    scenario: str = "text", content: Any = "hi", **args: Any
) -> dict[str, Any]:
    """The body of a driver call to a lab model."""
    model = {"model": f"openrouter:lab/{scenario}"}
    args = {"messages": [{"role": "user", "content": content}], **model, **args}
    method = {
        "interface": "puter-chat-completion",
        "driver": "ai-chat",
        "method": "complete",
    }
    return {**method, "args": args}


def post(
    fake: FakePuter,
    path: str,
    body: Any,
    token: str = "token-alice",
    headers: Mapping[str, str] | None = None,
    stream: bool = False,
) -> requests.Response:
    """A POST with a token, by plain `requests`."""
    headers = {"Authorization": f"Bearer {token}", **(headers or {})}
    return requests.post(
        fake.url + path, json=body, headers=headers, stream=stream, timeout=10
    )


def text_of(reply: requests.Response) -> str:
    """The text of a complete or a streamed driver call."""
    if reply.headers["Content-Type"] == JSON_TYPE:
        return reply.json()["result"]["message"]["content"]
    lines = [json.loads(line) for line in reply.content.split(b"\n") if line]
    return "".join(line["text"] for line in lines if line["type"] == "text")


@pytest.fixture
def fake() -> Iterator[FakePuter]:
    """A FakePuter of the test's own."""
    with FakePuter() as server:
        yield server


class TestFakePuter:
    """The scripted server answers as the real one was recorded, and its machinery works."""

    @pytest.mark.parametrize("exchange", recorded_exchanges())
    def test_answers_as_recorded(
        self, fake: FakePuter, exchange: dict[str, Any]
    ) -> None:
        fake.add_account("admin", "t", **SET_UPS.get(exchange["name"], {}))
        request, recorded = exchange["request"], exchange["response"]
        if request["path"] == "/delete":
            fake.files[STORED_FILE] = b"%PDF-1.4 small"
        url = fake.url + request["path"]
        got = requests.request(request["method"], url, timeout=10, **as_sent(request))
        assert got.status_code == recorded["status"]
        assert got.headers["Content-Type"] == recorded["content_type"]
        is_fake_model = "built-in fake" in exchange["name"]
        if "json" in recorded:
            assert shape(got.json()) == shape(recorded["json"])
            if request["path"] in (CHAT, OPENAI_CHAT) and not is_fake_model:
                assert without_ids(compact(got.json())) == without_ids(
                    compact(recorded["json"])
                )
        elif "lines" in recorded:
            lines, wanted = got.content.decode().split("\n"), recorded["lines"]
            assert lines.pop() == ""
            kinds = [
                [json.loads(one)["type"] for one in group] for group in (lines, wanted)
            ]
            assert kinds[0] == kinds[1]
            assert is_fake_model or lines == wanted
        else:
            assert without_ids(got.content.decode()) == without_ids(recorded["text"])

    def test_the_recorded_models_are_in_the_catalogue(self, fake: FakePuter) -> None:
        recorded = [one.values[0] for one in recorded_exchanges()]
        if not recorded[0]:
            pytest.skip("there are no recordings")
        models = next(one for one in recorded if one["name"] == "model details")
        for model in models["response"]["json"]["models"]:
            assert model in fake.catalogue

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("scenario", sorted(SCENARIOS.keys() - {"hang", "fake"}))
    def test_every_scenario_answers(
        self, fake: FakePuter, scenario: str, stream: bool
    ) -> None:
        try:
            reply = post(fake, CHAT, chat_body(scenario, stream=stream))
        except requests.exceptions.ChunkedEncodingError:
            assert scenario == "closed"
        else:
            assert scenario != "closed"
            assert reply.headers["Content-Type"]
        assert eventually(lambda: fake.accounts["token-alice"].running == 0)

    @pytest.mark.parametrize(
        "name", ["claude-opus-4.5", "groq:allam-2-7b", "lab/text", "text"]
    )
    def test_models_have_several_names(self, fake: FakePuter, name: str) -> None:
        assert post(fake, CHAT, chat_body(model=name)).ok
        assert (
            post(fake, CHAT, chat_body(model=f"puter/{name}")).json()["code"]
            == "bad_request"
        )

    def test_lists_are_used_up_and_the_last_entry_stays(self, fake: FakePuter) -> None:
        fake.script["lab/text"] = ["err429", "internal", "echo"]
        statuses = [post(fake, CHAT, chat_body()).status_code for _ in range(5)]
        assert statuses == [429, 500, 200, 200, 200]
        fake.script["openrouter:lab/flaky"] = "flaky"
        statuses = [post(fake, CHAT, chat_body("flaky")).status_code for _ in range(3)]
        assert statuses == [500, 200, 200]

    def test_a_script_may_be_a_function(self, fake: FakePuter) -> None:
        def by_account(handler: FakeHandler, args: dict[str, Any]) -> Answer:
            return Turn(f"{handler.seen.account} {len(args['messages'])}")

        fake.script["openrouter:lab/text"] = by_account
        assert text_of(post(fake, CHAT, chat_body(), token="token-bob")) == "bob 1"
        assert text_of(post(fake, CHAT, chat_body(stream=True))) == "alice 1"

    def test_seen(self, fake: FakePuter) -> None:
        post(fake, CHAT, chat_body(stream=True), headers={"X-Thing": "1"})
        post(fake, OPENAI_CHAT, chat_body("echo")["args"], token="nobody")
        first, second = fake.requests
        assert (first.method, first.path, first.model) == (
            "POST",
            CHAT,
            "openrouter:lab/text",
        )
        assert first.headers["x-thing"] == "1"
        assert first.body == chat_body(stream=True)
        assert first.args == first.body["args"]
        assert (first.token, first.account) == ("token-alice", "alice")
        assert (second.token, second.account, second.args) == ("nobody", None, {})
        assert second.model == "openrouter:lab/echo"
        assert fake.chat_calls() == [("alice", "openrouter:lab/text")]

    def test_limits(self, fake: FakePuter) -> None:
        fake.add_account("carol", max_in_window=2, window_s=0.3)
        codes = [
            post(fake, CHAT, chat_body(), "token-carol").status_code for _ in range(3)
        ]
        assert codes == [200, 200, 429]
        assert eventually(lambda: post(fake, CHAT, chat_body(), "token-carol").ok)
        fake.add_account("dave", max_concurrent=1)
        with post(
            fake, CHAT, chat_body("slow", stream=True), "token-dave", stream=True
        ):
            refused = post(fake, CHAT, chat_body(), "token-dave")
            assert refused.json()["message"] == "Too many concurrent requests."
        assert eventually(lambda: fake.accounts["token-dave"].running == 0)
        assert all(post(fake, CHAT, chat_body(), "token-dave").ok for _ in range(20))

    def test_credit_is_for_models_that_cost(self, fake: FakePuter) -> None:
        fake.accounts["token-alice"].credit_microcents = 0
        assert post(fake, CHAT, chat_body()).json()["code"] == "insufficient_funds"
        assert post(fake, CHAT, chat_body(model="qwen/qwen3-coder:free")).ok

    def test_an_account_error_answers_every_call(self, fake: FakePuter) -> None:
        fake.accounts["token-alice"].error = (403, {"code": "account_suspended"})
        assert post(fake, CHAT, chat_body()).json() == {"code": "account_suspended"}

    def test_a_session_token_must_be_exchanged(self, fake: FakePuter) -> None:
        fake.accounts["token-alice"].session_token = True
        origin = {"Origin": "http://localhost:5500"}
        app = post(
            fake, "/auth/get-user-app-token", {"origin": origin["Origin"]}
        ).json()["token"]
        api = post(fake, "/auth/create-access-token", {}).json()["token"]
        assert (
            post(fake, CHAT, chat_body()).json()["code"] == "app_or_api_token_required"
        )
        assert post(fake, CHAT, chat_body(), app, origin).ok
        assert post(fake, CHAT, chat_body(), app).status_code == 403
        assert post(fake, CHAT, chat_body(), api).ok

    @pytest.mark.parametrize("scenario", ["slow", "hang"])
    def test_a_client_that_leaves_ends_the_stream_quietly(
        self, fake: FakePuter, scenario: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        reply = post(fake, CHAT, chat_body(scenario, stream=True), stream=True)
        assert fake.open_streams == 1
        reply.close()
        assert eventually(lambda: fake.open_streams == 0, timeout_s=0.5)
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize("path", [CHAT, OPENAI_CHAT])
    def test_a_closed_stream_has_no_end(self, fake: FakePuter, path: str) -> None:
        body = chat_body("closed", stream=True)
        reply = post(fake, path, body if path == CHAT else body["args"], stream=True)
        received = b""
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            for data in reply.iter_content(None):
                received += data
        assert (
            received.endswith(b"\n")
            and received.count(b"{")
            and b"usage" not in received
        )

    def test_shapes_beyond_the_recording(self, fake: FakePuter) -> None:
        def result(scenario: str) -> Any:
            return post(fake, CHAT, chat_body(scenario)).json()["result"]

        def last_types(scenario: str) -> list[str]:
            lines = post(
                fake, CHAT, chat_body(scenario, stream=True)
            ).content.splitlines()
            return [json.loads(line)["type"] for line in lines[-3:]]

        claude = result("anthropic")
        assert [part["type"] for part in claude["message"]["content"]] == [
            "text",
            "tool_use",
        ]
        assert claude["finish_reason"] == claude["message"]["stop_reason"] == "tool_use"
        assert last_types("anthropic") == ["text", "tool_use", "usage"]
        assert last_types("extra") == ["tool_use", "extra_content", "usage"]
        arguments = result("badargs")["message"]["tool_calls"][0]["function"][
            "arguments"
        ]
        assert json_or_bytes(arguments) == arguments
        blocked = post(fake, CHAT, chat_body("blocked")).json()
        assert blocked["metadata"] == {
            "service_used": "fake-chat",
            "providerUsed": "fake",
        }
        assert post(fake, CHAT, chat_body("busy503")).headers["Retry-After"] == "1"
        assert not post(fake, CHAT, chat_body("oldfail")).json()["success"]
        with pytest.raises(ValueError, match="Unterminated"):
            post(fake, CHAT, chat_body("badjson")).json()

    def test_faulty_endings(self, fake: FakePuter) -> None:
        half = post(fake, CHAT, chat_body("halfline", stream=True)).content
        assert not half.endswith(b"\n") and half.startswith(b'{"type":"text"')
        bare = post(fake, CHAT, chat_body("nousageline", stream=True)).content
        assert bare.endswith(b'"line."}\n')

    @pytest.mark.parametrize(
        "content", ["a  b\n c ", ODD_TEXT, [{"type": "text", "text": "x y"}]]
    )
    def test_echo_and_bytewise_streams_keep_the_text(
        self, fake: FakePuter, content: Any
    ) -> None:
        want = content if isinstance(content, str) else content[0]["text"]
        assert text_of(post(fake, CHAT, chat_body("echo", content))) == want
        assert (
            text_of(post(fake, CHAT, chat_body("echo", content, stream=True))) == want
        )
        assert text_of(post(fake, CHAT, chat_body("unicode", stream=True))) == ODD_TEXT

    def test_uploads_are_kept_and_need_their_order(self, fake: FakePuter) -> None:
        operation = {"path": "/alice/AppData/puter.py", "name": "x.pdf"}
        form: dict[str, Any] = {
            "fileinfo": (None, "{}"),
            "operation": (None, json.dumps(operation)),
            "file": ("x.pdf", b'\r\n{"a": 1}\r\n\x00\xff'),
        }
        headers = {"Authorization": "Bearer token-alice"}
        for wanted in ("x.pdf", "x (1).pdf"):
            reply = requests.post(
                f"{fake.url}/batch", files=form, headers=headers, timeout=10
            )
            path = reply.json()["results"][0]["path"]
            assert path == f"/alice/AppData/puter.py/{wanted}"
            assert fake.files[path] == form["file"][1]
        form = dict(reversed(form.items()))
        reply = requests.post(
            f"{fake.url}/batch", files=form, headers=headers, timeout=10
        )
        assert reply.status_code == 400
        assert post(fake, "/delete", {"paths": list(fake.files)}).ok
        assert not fake.files

    def test_the_sign_in_page_keeps_the_query_of_its_redirect(
        self, fake: FakePuter
    ) -> None:
        back = f"{fake.url}/callback?nonce=a%26b"
        page_url = f"{fake.url}/?{urlencode({'action': 'authme', 'redirectURL': back})}"
        page = requests.get(page_url, timeout=10)
        assert page.headers["Content-Type"] == HTML_TYPE
        assert html.escape(f"{back}&token=token-bob") in page.text
        assert [fake.approve(url)[0] for url in (back, page_url)] == [404, 404]
        assert [one.path for one in fake.requests[-2:]] == ["/callback", "/callback"]
        assert post(fake, "/login", {}).status_code == 403

    def test_stopping_closes_what_is_open(self, fake: FakePuter) -> None:
        session = requests.Session()
        assert session.get(f"{fake.url}/puterai/chat/models", timeout=10).ok
        fake.stop()
        with pytest.raises(requests.exceptions.ConnectionError):
            session.get(f"{fake.url}/puterai/chat/models", timeout=10)
        fake.start()
        assert session.get(f"{fake.url}/puterai/chat/models", timeout=10).ok


# =============================================================================
# Command line
# =============================================================================


def cmd_serve(args: argparse.Namespace) -> int:
    """Runs FakePuter until Ctrl-C, and says how to point a client at it."""
    with FakePuter(port=args.port) as fake, suppress(KeyboardInterrupt):
        for name in ("PUTER_API_BASE_URL", "PUTER_GUI_BASE_URL"):
            print(f"export {name}={fake.url}")
        print("export PUTER_AUTH_TOKEN=token-alice", flush=True)
        threading.Event().wait()
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser; each subcommand names the function that does it."""
    parser = argparse.ArgumentParser(
        description="The scripted Puter server of the tests."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    serve = commands.add_parser(
        "serve", help="run the scripted server in the foreground"
    )
    serve.add_argument(
        "--port", type=int, default=0, help="the port (default: any free one)"
    )
    serve.set_defaults(run=cmd_serve)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand."""
    args = build_parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
