"""The tests of puter.py, and FakePuter, the scripted Puter server that they all talk to.

    pytest test_puter.py
    python test_puter.py serve        # the scripted server, in the foreground
    python test_puter.py demo         # the real command line against it
    python test_puter.py bench        # figures, as ratios against floors

FakePuter is a real HTTP server on a real socket. It answers as a Puter server was recorded to
answer, and can be told to fail in every way that such a server, or the road to it, can fail.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import builtins
import codeop
import contextlib
import copy
import dataclasses
import enum
import errno
import functools
import gc
import gzip
import html
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import pickle
import platform
import queue
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import statistics
import struct
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import types
import urllib.error
import urllib.request
import uuid
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from decimal import Decimal
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from tempfile import TemporaryDirectory
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NewType,
    NoReturn,
    Optional,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)
from unittest import mock
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit, urlunsplit

import requests

import puter

# =============================================================================
# Helpers
# =============================================================================
JSON = dict[str, Any]


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


def json_or_bytes(data: bytes) -> Any:
    """`data` decoded from JSON, or as it is where that cannot be done."""
    with suppress(ValueError):
        return json.loads(data)
    return data


def clean_environ(config_dir: Path, **more: str) -> dict[str, str]:
    """The environment of a child process: no setting of ours but the folder and `more`."""
    own = os.environ.items()
    return {
        **{n: v for n, v in own if not n.startswith("PUTER_") and not n.lower().endswith("_proxy")},
        "PYTHONPATH": str(Path(puter.__file__).resolve().parent),
        "PUTER_CONFIG_DIR": str(config_dir),
        "HOME": str(config_dir.parent / "home"),
        "NO_COLOR": "1",
        **more,
    }


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
ONE_PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
USAGE = {"prompt": 11, "completion": 22, "input_cache_read": 0, "request": 1, "usd_cents": 0.0055}
# What the scripted models count, as each kind of provider tells it.
CLAUDE_COUNTS = {
    "input_tokens": 11,
    "ephemeral_5m_input_tokens": 3,
    "ephemeral_1h_input_tokens": 0,
    "cache_read_input_tokens": 5,
    "output_tokens": 22,
    "thinking_tokens": 0,
}
OPENROUTER_COUNTS = {"prompt": 11, "completion": 22, "input_cache_read": 0, "request": 1}
CHAT_COUNTS = {"prompt_tokens": 11, "completion_tokens": 22, "cached_tokens": 5}
OPENAI_USAGE = {"prompt_tokens": 11, "completion_tokens": 22, "cached_tokens": 5, "usd_cents": 0.01}
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
    credit_microcents: int = ALLOWANCE_MICROCENTS  # none left: 402 for every model
    reserves: bool = False  # a request that runs holds what it can cost at worst
    max_in_window: int | None = None  # chat calls in `window_s`: one more gets 429
    window_s: float = 10.0
    max_concurrent: int | None = None  # chat calls at once: one more gets 429
    dead: bool = False  # the token is of no use any more: 401 everywhere
    temporary: bool = False
    error: tuple[int, dict[str, Any]] | None = None  # the answer to each driver call
    session_token: bool = False  # not good for chat
    held_microcents: float = field(default=0, init=False, repr=False)
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
    sent: list[dict[str, Any]] = field(default_factory=list)  # to the model's provider


@dataclass(frozen=True)
class Turn:
    """What a scripted model says, before it is put into one of the shapes of the wire.

    A stream is told apart from a complete reply by `error` (it ends with that error after
    `error_after` words), `fault` (a key of `FAULTS`), `whole` (one piece, not words) and
    `bytewise` (a chunk for each byte). `usage` is what the model's provider bills, and `form`
    (a key of `FORMS`) that of the provider, where nothing else is given.
    """

    text: str = ""
    reasoning: tuple[str, ...] = ()
    calls: tuple[dict[str, Any], ...] = ()
    images: tuple[str, ...] = ()  # URLs of what it drew
    finish: str = "stop"
    usage: dict[str, Any] | Literal["billed"] | None = "billed"
    form: str = ""
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
        return [word for word in words if word][: self.error_after if self.error else None]

    def streamed_calls(self) -> Sequence[dict[str, Any]]:
        """A stream of chat completions loses every call but the last."""
        return self.calls[-1:] if self.form == "chat" else self.calls


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
def openrouter_model(name: str, usd_cents: tuple[int, int] = (100, 200)) -> dict[str, Any]:
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
{"puterId": "anthropic:anthropic/claude-haiku-4-5", "id": "claude-haiku-4-5-20251001",
 "modalities": {"input": ["text", "image", "pdf"], "output": ["text"]}, "open_weights": false,
 "tool_call": true, "knowledge": "2025-02-28", "release_date": "2025-10-15",
 "aliases": ["claude-haiku", "claude-haiku-latest", "claude-haiku-4.5-latest", "claude-haiku-4.5",
  "claude-haiku-4-5", "claude-4-5-haiku", "anthropic/claude-haiku-4-5",
  "anthropic:anthropic/claude-haiku-4-5"], "name": "Claude Haiku 4.5",
 "costs_currency": "usd-cents", "input_cost_key": "input_tokens",
 "output_cost_key": "output_tokens", "costs": {"tokens": 1000000, "input_tokens": 100,
  "ephemeral_5m_input_tokens": 125, "ephemeral_1h_input_tokens": 200,
  "cache_read_input_tokens": 10, "output_tokens": 500},
 "context": 200000, "max_tokens": 64000, "provider": "claude"},
{"puterId": "anthropic:anthropic/claude-sonnet-5", "id": "claude-sonnet-5",
 "modalities": {"input": ["text", "image", "pdf"], "output": ["text"]}, "open_weights": false,
 "tool_call": true, "release_date": "2026-06-30",
 "aliases": ["claude-sonnet", "claude-sonnet-latest", "claude-sonnet-5-latest", "claude-sonnet-5",
  "anthropic/claude-sonnet-5", "anthropic:anthropic/claude-sonnet-5"], "name": "Claude Sonnet 5",
 "costs_currency": "usd-cents", "input_cost_key": "input_tokens",
 "output_cost_key": "output_tokens", "costs": {"tokens": 1000000, "input_tokens": 300,
  "ephemeral_5m_input_tokens": 375, "ephemeral_1h_input_tokens": 600,
  "cache_read_input_tokens": 30, "output_tokens": 1500},
 "context": 1000000, "max_tokens": 64000, "provider": "claude"},
{"puterId": "openai:openai/gpt-4o", "id": "gpt-4o",
 "modalities": {"input": ["text", "image"], "output": ["text"]}, "open_weights": false,
 "tool_call": true, "knowledge": "2023-09", "release_date": "2024-05-13",
 "aliases": ["openai/gpt-4o", "openai:openai/gpt-4o"], "costs_currency": "usd-cents",
 "input_cost_key": "prompt_tokens", "output_cost_key": "completion_tokens",
 "costs": {"tokens": 1000000, "prompt_tokens": 250, "cached_tokens": 125,
  "completion_tokens": 1000},
 "context": 128000, "max_tokens": 16384, "provider": "openai-completion"},
{"puterId": "openai:openai/gpt-5.3-codex", "id": "gpt-5.3-codex",
 "modalities": {"input": ["text", "image"], "output": ["text"]}, "open_weights": false,
 "tool_call": true, "knowledge": "2025-08-31",
 "aliases": ["openai/gpt-5.3-codex", "openai:openai/gpt-5.3-codex"],
 "costs_currency": "usd-cents", "input_cost_key": "prompt_tokens",
 "output_cost_key": "completion_tokens", "costs": {"tokens": 1000000, "prompt_tokens": 175,
  "cached_tokens": 17.5, "completion_tokens": 1400}, "context": 128000, "max_tokens": 128000,
 "responses_api_only": true, "provider": "openai-responses"},
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
FAKE_MODEL: dict[str, Any] = {"id": "fake", "provider": "fake-chat", "costs": {"tokens": 1000000}}


def default_catalogue() -> list[dict[str, Any]]:
    """A lab model for each scenario, the recorded paid and free pairs, and direct models."""
    models = [openrouter_model(f"lab/{name}") for name in SCENARIOS if name != "fake"]
    models += [openrouter_model(name) for name in (*PAID_AND_FREE, "openai/gpt-5-nano")]
    models += [openrouter_model(f"{name}:free", (0, 0)) for name in PAID_AND_FREE]
    models += json.loads(DIRECT_MODELS)
    return sorted(models, key=lambda model: model["id"])


# =============================================================================
# FakePuter: the scenarios
# =============================================================================
# What a scenario, or a test's own script, may answer: a name stands for that scenario,
# and None means that it has written its reply itself.
Answer = Turn | Raw | str | None
Scenario = Callable[["FakeHandler", dict[str, Any]], Answer]

# How a provider's own status reaches us: status, code and message.
UPSTREAM = {
    400: (400, "upstream_bad_request", ""),  # the provider's own words
    401: (500, "upstream_auth_failed", "AI provider authentication failed"),
    403: (500, "upstream_auth_failed", "AI provider authentication failed"),
    429: (429, "upstream_rate_limited", "AI provider rate limit exceeded"),
    500: (400, "upstream_provider_unavailable", "AI provider unavailable"),
    529: (400, "upstream_provider_unavailable", "AI provider unavailable"),
}
# What Anthropic calls an error of its own with that status.
CLAUDE_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


def tool_call(call_id: str, name: str = "f", arguments: str = "{}", **more: Any) -> dict[str, Any]:
    """A tool call in OpenAI's shape."""
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function, **more}


WEATHER_CALL = tool_call("call_1", "get_weather", '{"city": "Paris"}')
TIME_CALL = tool_call("call_2", "get_time", '{"tz": "CET"}')
BROKEN_CALL = tool_call("call_1", "get_weather", '{"city": ')
SIGNATURE = {"google": {"thought_signature": "c2lnbmF0dXJl"}}
SIGNED_CALL = {**WEATHER_CALL, "extra_content": SIGNATURE}
OLD_ERROR = {"code": "usage-limited-chat", "message": "Permission denied.", "status": 403}


def says(text: str = SENTENCE, **turn: Any) -> Scenario:
    """A scenario that always says the same."""
    return lambda handler, args: Turn(text, **turn)


def replies(body: Any, status: int = 200, content_type: str = JSON_TYPE, **raw: Any) -> Scenario:
    """A scenario that always sends the same bytes or JSON."""
    return lambda handler, args: Raw(body, status, content_type, **raw)


def refuses(status: int, code: str, message: str) -> Callable[..., NoReturn]:
    """A scenario or a route that always fails with an error of the server's own."""

    def refuse(*_: Any) -> NoReturn:
        raise Refusal(status, code, message)

    return refuse


def claude_error(status: int, message: str) -> str:
    """An error as Anthropic words it."""
    return compact({"type": "error", "error": {"type": CLAUDE_ERRORS[status], "message": message}})


def vendor_failure(handler: FakeHandler, status: int, message: str) -> Turn:
    """How an error of the model's provider reaches us: of Claude's streams as the first line."""
    provider = handler.model.get("provider")
    told = f"{status} {claude_error(status, message) if provider == 'claude' else message}"
    if provider == "claude" and handler.streaming:
        return Turn(error=told)
    attempt = {"model": handler.model["id"], "provider": provider, "status": status}
    attempt |= {"code": status} if provider == "openrouter" else {}
    our_status, code, words = UPSTREAM[status]
    raise Refusal(our_status, code, words or told, attempts=[{**attempt, "error": told}])


def upstream(status: int) -> Scenario:
    """A scenario in which the model's provider answers with `status`."""
    return lambda handler, args: vendor_failure(handler, status, f"scripted {status}")


def last_user_parts(args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The content of the last user message, as parts."""
    users = [message for message in args["messages"] if message.get("role") == "user"]
    content = users[-1]["content"] if users else ""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_of(content: Any) -> str:
    """The text of a message's content, or of a tool's result."""
    parts = content if isinstance(content, list) else [content]
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in parts)


def tool_results(args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every result of a tool in the history, as Puter has it inside."""
    parts = [part for message in normalised(args["messages"]) for part in message["content"]]
    return [part for part in parts if part["type"] == "tool_result"]


def tools_scenario(handler: FakeHandler, args: dict[str, Any]) -> Answer:
    """Calls a tool, and talks once the history holds the result."""
    if tool_results(args):
        return Turn(SENTENCE)
    return Turn(calls=(WEATHER_CALL,), finish="tool_calls")


def brain_scenario(handler: FakeHandler, args: dict[str, Any]) -> Answer:
    """Plays the scenario that the prompt names, says what it is told to say, or what tools said."""
    if normalised(args["messages"])[-1]["content"][-1]["type"] == "tool_result":
        results = " | ".join(text_of(result["content"]) for result in tool_results(args))
        return Turn(f"The tool returned: {results}")
    prompt = text_of(last_user_parts(args))
    told = re.search(r"Reply with exactly this and nothing else: (.*)", prompt)
    return named_scenario(args) or Turn(told[1] if told else "Hello from the stub model.")


def named_scenario(args: Mapping[str, Any]) -> str | None:
    """The scenario that the last prompt asks for with `scenario: NAME`."""
    named = re.fullmatch(r"scenario: (\w+)", text_of(last_user_parts(args)))
    return named[1] if named and named[1] in SCENARIOS else None


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
    return Turn(LOREM, form="claude", served_by=("fake-chat", "fake"), whole=True, usage=usage)


SCENARIOS: dict[str, Scenario] = {
    # As recorded.
    "text": says(),
    "reason": says(reasoning=("thinking", "...")),
    "empty": says(""),
    "length": says(finish="length"),
    "refusal": says(finish="refusal"),
    "tools": tools_scenario,
    "twotools": says("", calls=(WEATHER_CALL, TIME_CALL), finish="tool_calls"),
    "vision": lambda handler, args: Turn(
        "parts: " + json.dumps([part["type"] for part in last_user_parts(args)])
    ),
    "midfail": says(error="scripted mid-stream failure"),
    "cut": says(error="terminated"),
    "nousage": says(usage=None),
    "err400": upstream(400),
    "err401": upstream(401),
    "err403": upstream(403),
    "err429": upstream(429),
    "err500": upstream(500),
    "err529": upstream(529),
    "hang": hang_scenario,
    "slow": says(pause_s=0.025),
    "long": says(" ".join(f"word{number}" for number in range(2000))),
    "fake": fake_scenario,
    "brain": brain_scenario,
    # Faults of the road: the reply does not arrive whole.
    "closed": says(fault="closed"),
    "halfline": says(fault="halfline"),
    "nousageline": says(fault="nousageline"),
    "badjson": replies(b'{"success":true,"result":{"index":0,"message":{"role":"assis'),
    "html": replies(b"<html><h1>502 Bad Gateway</h1></html>", 502, HTML_TYPE),
    "notjson": replies(b"<html><h1>Welcome</h1></html>", 200, HTML_TYPE),
    "busy503": replies(b"<html><h1>503</h1></html>", 503, HTML_TYPE, headers={"Retry-After": "1"}),
    # Faults of the server.
    "internal": refuses(500, "internal_error", "Internal Server Error"),
    "denied": refuses(403, "permission_denied", "Permission denied."),
    "flaky": lambda handler, args: "internal" if handler.call_number == 1 else "text",
    "oldfail": replies({"success": False, "error": OLD_ERROR}),
    "blocked": fake_scenario,
    # Other shapes of a good reply.
    "badargs": says("", calls=(BROKEN_CALL,), finish="tool_calls"),
    "anthropic": says(calls=(WEATHER_CALL,), finish="tool_use", form="claude", usage=CLAUDE_USAGE),
    "openaiusage": says(usage=OPENAI_USAGE),
    "unicode": says(ODD_TEXT, bytewise=True),
    "echo": echo_scenario,
    "draw": says("", images=(f"data:image/png;base64,{ONE_PIXEL}",)),
    "extra": says("", calls=(SIGNED_CALL,), finish="tool_calls", extra_content=SIGNATURE),
}

# =============================================================================
# FakePuter: what the model's provider is sent
# =============================================================================
# Puter has tool calls and results in one shape inside, puts them into the provider's, and passes
# all other parts on as they are. Every provider that is not named here speaks chat completions.
RESPONSES = ("openai-responses", "azure-openai-responses")
OPENAI = ("openai-completion", "azure-openai", *RESPONSES)
NEWER_CLAUDES = ("claude-sonnet-5", "claude-opus-4-7", "claude-opus-4-8")  # no temperature
CLAUDE_BUDGETS = {"low": 1024, "medium": 4096, "high": 8192}
UNMEASURED_TOKENS = 1500  # of a file, or of a picture that is only named
FILE_ERROR = "{error: input file has unsupported MIME type; the user did not write this message}"
NO_FUNCTION = "Cannot destructure property 'name' of 'tool.function' as it is undefined."


def form_of(model: Mapping[str, Any], args: Mapping[str, Any]) -> str:
    """The shape that a request for `model` is sent on in: a key of `FORMS`."""
    provider = model.get("provider")
    searches = any(tool.get("type") == "web_search" for tool in args.get("tools") or ())
    if provider in RESPONSES or (provider in OPENAI and searches):
        return "responses"
    return "claude" if provider == "claude" else "chat"


def present(**fields: Any) -> dict[str, Any]:
    """The fields that have a value."""
    return {name: value for name, value in fields.items() if value is not None}


def of_type(parts: Any, kind: str) -> list[dict[str, Any]]:
    """The parts of one type, of content that may be text."""
    return [part for part in parts if part.get("type") == kind] if isinstance(parts, list) else []


def function_call(part: Mapping[str, Any]) -> dict[str, Any]:
    """A `tool_use` part as OpenAI's call."""
    more = present(extra_content=part.get("extra_content"))
    return tool_call(part["id"], part["name"], compact(part.get("input")), **more)


def read_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with nothing but parts as its content; calls and results are parts, too."""
    message = {"role": "user", **message}
    content: Any = message.get("content")
    if not content and message.get("tool_calls"):
        calls = [(call["id"], call["function"]) for call in message.pop("tool_calls")]
        content = [
            {"type": "tool_use", "id": name, "name": call["name"], "input": call["arguments"]}
            for name, call in calls
        ]
    if message["role"] == "tool":
        name = message.get("tool_call_id") or message.get("tool_use_id")
        text = content if isinstance(content, str) else compact(content or {})
        message["tool_use_id"] = name
        content = [{"type": "tool_result", "tool_use_id": name, "content": text}]
    parts = content if isinstance(content, list) else [content]
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    if not all(isinstance(part, dict) for part in parts):
        told = "each message content item must be a string or object"
        raise Refusal(400, "bad_request", told)
    types = ["text" if isinstance(part.get("text"), str) else None for part in parts]
    typed = [{"type": kind, **part} for kind, part in zip(types, parts)]
    return {**message, "content": typed}


def normalised(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The history as Puter has it inside: messages of one role are one, those of tools stay."""
    merged: list[dict[str, Any]] = []
    for message in map(read_message, copy.deepcopy(messages)):
        calls, parts = of_type(message["content"], "tool_use"), message["content"]
        for content in (
            [parts] if calls and message["role"] == "assistant" else [[p] for p in parts]
        ):
            last = merged[-1] if merged else {"role": None, "content": []}
            kinds = {part["type"] for part in (*content, *last["content"])}
            if last["role"] == message["role"] and not kinds & {"tool_use", "tool_result"}:
                last["content"] += content
            else:
                merged.append({**message, "content": content})
    return merged


def read_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool of OpenAI's or Anthropic's shape, and nothing but what Puter knows of it."""
    if tool.get("type") == "web_search":
        return dict(tool)
    function = tool.get("function") or tool
    schema = {
        "type": "object",
        **(function.get("parameters") or function.get("input_schema") or {}),
    }
    named = {key: function[key] for key in ("name", "description") if function.get(key)}
    return {"type": "function", "function": {"parameters": schema, **named}}


def claude_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as Anthropic gets it: what Puter does not know stays in it."""
    parts = message["content"]
    for call in message.pop("tool_calls", None) or ():
        function = call["function"]
        part = {"type": "tool_use", "id": call["id"], "name": function["name"]}
        parts.append({**part, "input": function["arguments"]})
    if mark := message.pop("cache_control", None):
        parts[0]["cache_control"] = mark
    for part in parts:
        if part["type"] == "tool_use" and isinstance(part["input"], str):
            decoded = json_or_bytes(part["input"].encode())
            part["input"] = {} if isinstance(decoded, bytes) else decoded
        if part.get("puter_path"):
            part.clear()
            part.update(type="document", source={"type": "file", "file_id": "file_1"})
    return {"role": "user", "content": parts} if message["role"] == "tool" else message


def to_claude(model: Mapping[str, Any], args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The requests to Anthropic: one for each file that is uploaded, and the one that counts."""
    if any(tool["type"] != "function" for tool in args["tools"]):
        attempt = {"model": model["id"], "provider": "claude", "error": NO_FUNCTION}
        raise Refusal(500, "internal_error", "All providers failed", attempts=[attempt])
    path = "/anthropic/v1/messages"
    files = [part for m in args["messages"] for part in m["content"] if part.get("puter_path")]
    uploads = [{"path": "/anthropic/v1/files?beta=true"} for _ in files]
    system = [m["content"] for m in args["messages"] if m["role"] == "system"]
    limit = args.get("max_tokens") or 4096
    effort = args.get("reasoning_effort") or (args.get("reasoning") or {}).get("effort")
    thinking, temperature = None, args.get("temperature") or 0
    if effort and limit > 1024:
        budget = min(CLAUDE_BUDGETS.get(effort, limit), limit - 1)
        thinking, temperature = {"type": "enabled", "budget_tokens": budget}, 1
    newer = model["id"] in NEWER_CLAUDES
    functions = [tool["function"] for tool in args["tools"]]
    tools = [{**f, "input_schema": f["parameters"]} for f in functions]
    body = present(
        model=model["id"],
        max_tokens=limit,
        temperature=None if newer else temperature,
        system=system[0] if system else None,
        tool_choice={"type": "auto", "disable_parallel_tool_use": True},
        messages=[claude_message(m) for m in args["messages"] if m["role"] != "system"],
        tools=[{k: v for k, v in tool.items() if k != "parameters"} for tool in tools] or None,
        thinking=thinking,
        output_config={"effort": effort} if newer and effort else None,
        stream=True if args.get("stream") else None,
        path=f"{path}?beta=true" if files else path,
    )
    return [*uploads, body]


def chat_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat completions have it: calls arrive reversed, text beside them is lost."""
    calls = [function_call(part) for part in reversed(of_type(message["content"], "tool_use"))]
    if calls:
        message.setdefault("tool_calls", calls)
        return {**message, "content": None}
    for result in of_type(message["content"], "tool_result"):
        name, content = result["tool_use_id"], result.get("content")
        return {**message, "role": "tool", "tool_call_id": name, "content": content}
    return message


def without_files(model: Mapping[str, Any], args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The history as OpenAI's models get it: stored files are not read."""
    for part in [part for message in args["messages"] for part in message["content"]]:
        if part.get("puter_path") and model["provider"] in OPENAI:
            part.clear()
            part.update(type="text", text=FILE_ERROR)
    return args["messages"]


def to_chat(model: Mapping[str, Any], args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The request to a provider that speaks chat completions."""
    provider, stream = model.get("provider"), bool(args.get("stream"))
    reads_effort = not model["id"].startswith("gpt-5")
    own: dict[str, Any] = {"max_tokens": args.get("max_tokens")}
    if provider == "openrouter":
        own["usage"] = {"include": True}
    elif provider in OPENAI:
        own = {
            "max_completion_tokens": args.get("max_tokens"),
            "stream": stream,
            "stream_options": {"include_usage": True} if stream else None,
            "reasoning_effort": args.get("reasoning_effort") if reads_effort else None,
            "verbosity": args.get("verbosity") if reads_effort else None,
            "path": "/openai/v1/chat/completions",
        }
    body = present(
        messages=[chat_message(message) for message in without_files(model, args)],
        model=model["id"].removeprefix("openrouter:"),
        tools=args["tools"] or None,
        temperature=args.get("temperature"),
        **own,
    )
    return [body]


def responses_item(message: dict[str, Any]) -> dict[str, Any]:
    """A message as an item of the Responses API: one call of several, and no text beside it."""
    parts = message["content"]
    rest = {k: v for k, v in message.items() if k not in ("role", "content", "tool_calls")}
    if calls := of_type(parts, "tool_use"):
        call = function_call(calls[-1])
        own = present(id=calls[-1].get("canonical_id"), call_id=call["id"], **call["function"])
        return {**rest, **own, "type": "function_call"}
    for result in of_type(parts, "tool_result"):
        rest = {k: v for k, v in rest.items() if k not in ("tool_call_id", "tool_use_id")}
        own = {"call_id": result["tool_use_id"], "output": result.get("content")}
        return {**rest, **own, "type": "function_call_output"}
    kind = "output_text" if message["role"] == "assistant" else "input_text"
    renamed = [{**p, "type": kind} if p["type"] == "text" else p for p in parts]
    return {**message, "content": renamed}


def to_responses(model: Mapping[str, Any], args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The request to OpenAI's Responses API."""
    passed = ("tool_choice", "parallel_tool_calls", "temperature", "top_p", "text", "reasoning")
    tools = [{"type": tool["type"], **tool.get("function", tool)} for tool in args["tools"]]
    body = present(
        input=[responses_item(message) for message in without_files(model, args)],
        model=model["id"],
        tools=tools or None,
        max_output_tokens=args.get("max_tokens"),
        **{key: args.get(key) for key in passed},
        stream=args.get("stream"),
        path="/openai/v1/responses",
    )
    return [body]


# The gate: whether the account, and the model's limit, let a prompt through.
def text_tokens(text: str) -> int:
    """What a text counts at the gate, of UTF-16 letters and of words."""
    letters = len(text.encode("utf-16-le", "surrogatepass")) // 2
    words = max(1, len(text.split()) + text[:1].isspace() + text[-1:].isspace())
    return int((letters / 4 + words * 4 / 3) / 2)


def media_tokens(value: Any) -> int:
    """What a picture or a document counts: a token for 150 bytes where a data URL shows them."""
    if not isinstance(value, str) or re.match(r"(?i)(?!data:)[a-z][a-z0-9+.-]*:", value):
        return UNMEASURED_TOKENS
    data = value.partition(",")[2] if value.startswith("data:") else value
    tokens = math.ceil(len(data) * 3 // 4 / 150)
    return tokens if value.startswith("data:") else max(tokens, UNMEASURED_TOKENS)


def part_tokens(part: Mapping[str, Any]) -> int:
    """What one part of a message counts; calls and results count as JSON."""
    for key in ("text", "thinking", "reasoning", "refusal"):
        if isinstance(part.get(key), str):
            return text_tokens(part[key])
    image, source = part.get("image_url"), part.get("source")
    if image:
        return media_tokens(image.get("url") if isinstance(image, dict) else image)
    if isinstance(source, dict):
        return media_tokens(source.get("data") or source.get("url"))
    if part["type"] in ("tool_use", "tool_result"):
        value = part.get("input" if part["type"] == "tool_use" else "content")
        return text_tokens(value if isinstance(value, str) else compact(value))
    return UNMEASURED_TOKENS


def answer_limit(
    left: float, model: Mapping[str, Any], messages: Sequence[dict[str, Any]], asked: int | None
) -> tuple[int | None, float]:
    """How long the answer may be, and what the request costs at worst; 402 for what cannot be."""
    costs, most = model.get("costs", {}), model.get("max_tokens")
    price, answer_price = (
        costs.get(model.get(key)) or 0 for key in ("input_cost_key", "output_cost_key")
    )
    prompt = sum(part_tokens(part) for message in messages for part in message["content"])
    limit = asked
    if answer_price:
        limits = [(left - prompt * price) / answer_price, asked, most - prompt if most else None]
        limit = math.floor(min(one for one in limits if one is not None))
    if left < max(prompt * price, 1) or (answer_price and (limit or 0) < 1):
        raise Refusal(402, "insufficient_funds", "No usage left for request.")
    return limit, max(prompt * price + (limit or 0) * answer_price, 1)


# =============================================================================
# FakePuter: what the model's provider refuses
# =============================================================================
# What a part must have, and what else it may have, as the vendors' SDKs type it.
Fields = tuple[str, str]
CLAUDE_PARTS: dict[Any, Fields] = {
    "text": ("text", "cache_control citations"),
    "image": ("source", "cache_control"),
    "document": ("source", "title context citations cache_control"),
    "search_result": ("source title content", "citations cache_control"),
    "tool_use": ("id name input", "cache_control"),
    "tool_result": ("tool_use_id", "content is_error cache_control"),
    "thinking": ("thinking signature", ""),
    "redacted_thinking": ("data", ""),
}
CLAUDE_SOURCES: dict[Any, Fields] = {
    "base64": ("media_type data", ""),
    "url": ("url", ""),
    "text": ("media_type data", ""),
    "file": ("file_id", ""),
}
CLAUDE_MEDIA = {
    "image": ("image/png", "image/jpeg", "image/gif", "image/webp"),
    "document": ("application/pdf", "text/plain"),
}
CHAT_PARTS: dict[Any, Fields] = {
    "text": ("text", "cache_control"),
    "image_url": ("image_url", "cache_control"),
    "file": ("file", "cache_control"),
    "input_audio": ("input_audio", "cache_control"),
    "refusal": ("refusal", ""),
}
CHAT_PARTS_OF = {"user": ("text", "image_url", "file", "input_audio")}
READS_FILES = ("openai-completion", "azure-openai", "openrouter")
INPUT_PARTS: dict[Any, Fields] = {
    "input_text": ("text", ""),
    "input_image": ("image_url", "detail file_id"),
    "input_file": ("filename file_data", ""),
}
OUTPUT_PARTS: dict[Any, Fields] = {
    "output_text": ("text", "annotations"),
    "refusal": ("refusal", ""),
}
RESPONSES_ITEMS: dict[Any, Fields] = {
    None: ("role content", ""),
    "function_call": ("call_id name arguments", "id status"),
    "function_call_output": ("call_id output", "id status"),
}


def misshapen(value: Mapping[str, Any], types: Mapping[Any, Fields]) -> str:
    """What is wrong with the type and the keys of a part; nothing, when all is well."""
    kind = value.get("type")
    if kind not in types:
        names = ", ".join(repr(name) for name in sorted(filter(None, types)))
        tag = f"Input tag '{kind}' found using 'type'"
        return f"{tag} does not match any of the expected tags: {names}"
    needed, more = (names.split() for names in types[kind])
    for name in needed:
        if value.get(name) is None:
            return f"{kind}.{name}: Field required"
    extra = value.keys() - {"type", *needed, *more}
    return f"{kind}.{min(extra)}: Extra inputs are not permitted" if extra else ""


def claude_part_fault(part: Mapping[str, Any]) -> str:
    """What Anthropic has against one part."""
    kind, source = part.get("type"), part.get("source") or {}
    if fault := misshapen(part, CLAUDE_PARTS):
        return fault
    if kind in CLAUDE_MEDIA:
        if fault := misshapen(source if isinstance(source, dict) else {}, CLAUDE_SOURCES):
            return f"{kind}.source: {fault}"
        if source.get("media_type", CLAUDE_MEDIA[kind][0]) not in CLAUDE_MEDIA[kind]:
            return f"{kind}.source.media_type: Input should be one of {CLAUDE_MEDIA[kind]}"
    if kind == "text" and not part["text"].strip():
        return "text content blocks must be non-empty"
    if kind == "tool_use" and not isinstance(part["input"], dict):
        return "tool_use.input: Input should be a valid dictionary"
    if kind == "thinking" and not part["signature"]:
        return "Invalid `signature` in `thinking` block"
    inner = part.get("content") if kind == "tool_result" else ()
    faults = map(claude_part_fault, inner if isinstance(inner, list) else ())
    return next((f"tool_result.content: {fault}" for fault in faults if fault), "")


def claude_order_fault(body: Mapping[str, Any]) -> str:
    """What Anthropic has against calls without results, and thinking that is not given back."""
    turns: list[tuple[str, list[dict[str, Any]]]] = []
    for message in body["messages"]:
        if turns and turns[-1][0] == message["role"]:
            turns[-1][1].extend(message["content"])
        else:
            turns.append((message["role"], list(message["content"])))
    waiting: set[str] = set()
    for role, parts in [*turns, ("user", [])]:
        leading = itertools.takewhile(lambda part: part["type"] == "tool_result", parts)
        first = {part["tool_use_id"] for part in leading}
        results = {part["tool_use_id"] for part in of_type(parts, "tool_result")}
        if waiting - first:
            ids = ", ".join(sorted(waiting - first))
            return (
                f"`tool_use` ids were found without `tool_result` blocks immediately after: {ids}"
            )
        if results - waiting:
            ids = ", ".join(sorted(results - waiting))
            return f"unexpected `tool_use_id` found in `tool_result` blocks: {ids}"
        waiting = (
            {part["id"] for part in of_type(parts, "tool_use")} if role == "assistant" else set()
        )
    last: list[Any] = next((parts for role, parts in reversed(turns) if role == "assistant"), [])
    if body.get("thinking") and of_type(last, "tool_use") and "thinking" not in last[0]["type"]:
        found = last[0]["type"]
        return f"Expected `thinking` or `redacted_thinking`, but found `{found}`"
    return ""


def claude_fault(model: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """What Anthropic has against a request."""
    marks = 0
    for index, message in enumerate([{"content": body.get("system", [])}, *body["messages"]], -1):
        if extra := message.keys() - {"role", "content"}:
            return f"messages.{index}.{min(extra)}: Extra inputs are not permitted"
        if message.get("role", "user") not in ("user", "assistant"):
            return f'messages: Unexpected role "{message["role"]}"'
        marks += sum("cache_control" in part for part in message["content"])
        for number, part in enumerate(message["content"]):
            if fault := claude_part_fault(part):
                return f"messages.{index}.content.{number}: {fault}"
    if marks > 4:
        return f"A maximum of 4 blocks with cache_control may be provided. Found {marks}."
    return claude_order_fault(body)


def waiting_fault(waiting: Sequence[str], call_id: str | None) -> str:
    """What OpenAI has against a message that does not answer the calls before it."""
    if waiting and call_id is None:
        return f"No tool output found for function call {', '.join(waiting)}."
    if call_id is not None and call_id not in waiting:
        return f"No tool call found for function call output with call_id {call_id}."
    return ""


def chat_part_fault(model: Mapping[str, Any], role: str, part: Mapping[str, Any]) -> str:
    """What a provider of chat completions has against one part."""
    allowed = CHAT_PARTS_OF.get(role, ("text", "refusal") if role == "assistant" else ("text",))
    if fault := misshapen(part, {kind: CHAT_PARTS[kind] for kind in allowed}):
        return fault
    if "cache_control" in part and model.get("provider") != "openrouter":
        return "Unknown parameter: 'cache_control'"
    if part["type"] == "image_url":
        image = part["image_url"]
        url = image.get("url") if isinstance(image, dict) else None
        is_fine = isinstance(url, str) and url.startswith(("data:image/", "http://", "https://"))
        return "" if is_fine else "Invalid image_url"
    if part["type"] == "file":
        data = part["file"].get("file_data") if isinstance(part["file"], dict) else None
        if model.get("provider") not in READS_FILES or not str(data).startswith("data:"):
            return "Invalid file"
    return ""


def chat_fault(model: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """What a provider of chat completions has against a request."""
    waiting: list[str] = []
    for index, message in enumerate([*body["messages"], {"role": "user", "content": ""}]):
        role, content = message["role"], message["content"]
        name = message.get("tool_call_id") if role == "tool" else None
        if fault := waiting_fault(waiting, name):
            return fault
        waiting = [one for one in waiting if one != name]
        waiting += [call["id"] for call in message.get("tool_calls") or ()]
        for number, part in enumerate(content if isinstance(content, list) else ()):
            if fault := chat_part_fault(model, role, part):
                return f"messages[{index}].content[{number}]: {fault}"
    return ""


def responses_fault(model: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """What OpenAI's Responses API has against a request."""
    waiting: list[str] = []
    for index, item in enumerate([*body["input"], {"role": "user", "content": []}]):
        kind, content = item.get("type"), item.get("content", item.get("output"))
        fault = misshapen(item, RESPONSES_ITEMS)
        if kind != "function_call" and not fault:
            fault = waiting_fault(waiting, item.get("call_id"))
        if kind == "function_call":
            waiting.append(item.get("call_id", ""))
        else:
            waiting = [one for one in waiting if one != item.get("call_id")]
        parts = OUTPUT_PARTS if item.get("role") == "assistant" else INPUT_PARTS
        for part in content if isinstance(content, list) else ():
            fault = fault or misshapen(part, parts)
            if part.get("type") == "input_image" and not isinstance(part.get("image_url"), str):
                fault = fault or "Invalid type for image_url: expected an image URL"
        if fault:
            return f"input[{index}]: {fault}"
    return ""


# =============================================================================
# FakePuter: the shapes of a reply
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
    return json_or_bytes(call["function"]["arguments"])


def tool_use(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call as Anthropic's part, which is also how a stream carries it."""
    name = call["function"]["name"]
    return {"type": "tool_use", "id": call["id"], "name": name, "input": arguments_of(call)}


def billed(model: Mapping[str, Any]) -> dict[str, Any]:
    """What the scripted models count, and its price, as the model's provider tells it."""
    provider, costs = model.get("provider"), model.get("costs", {})
    own = {"claude": CLAUDE_COUNTS, "openrouter": OPENROUTER_COUNTS}
    counts = own.get(str(provider), CHAT_COUNTS)
    microcents = sum(count * (costs.get(key) or 0) for key, count in counts.items())
    return {**counts, "usd_cents": math.floor(microcents + 0.5) / 1_000_000}


def dressed(turn: Turn, model: Mapping[str, Any]) -> Turn:
    """A turn as the model's provider says it: with its usage, and with its own failures."""
    form = turn.form or form_of(model, {})
    error = turn.error
    if error and turn.pieces() and form == "claude" and error != "terminated":
        error = claude_error(529, error)
    elif error and form == "responses":
        error = "terminated"
    usage = billed(model) if turn.usage == "billed" else turn.usage
    reasoning = () if model.get("provider") in OPENAI else turn.reasoning
    return replace(turn, form=form, error=error, usage=usage, reasoning=reasoning)


STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def claude_result(turn: Turn, model: Mapping[str, Any]) -> dict[str, Any]:
    """The `result` of a complete reply that is Anthropic's own message."""
    parts: list[dict[str, Any]] = []
    if turn.reasoning:
        thinking = "".join(turn.reasoning)
        parts += [{"type": "thinking", "thinking": thinking, "signature": "sig"}]
    parts += [{"type": "text", "text": turn.text}] if turn.text else []
    parts += map(tool_use, turn.calls)
    own: Any = turn.usage
    if own and "ephemeral_5m_input_tokens" in own:
        kept = ("input_tokens", "output_tokens", "cache_read_input_tokens")
        written = {"cache_creation_input_tokens": own["ephemeral_5m_input_tokens"]}
        own = {**{key: own[key] for key in kept}, **written}
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": model["id"],
        "content": parts,
        "stop_reason": STOP_REASONS.get(turn.finish, turn.finish),
        "stop_sequence": None,
        "usage": own,
    }
    return {"message": message, "usage": turn.usage, "finish_reason": "stop"}


def responses_result(turn: Turn, model: Mapping[str, Any]) -> dict[str, Any]:
    """The `result` of a complete reply of the Responses API: it always ends with "stop"."""
    message: dict[str, Any] = {"content": turn.text, "reasoning": None, "refusal": None}
    message["role"] = "assistant"
    calls = [{**call, "canonical_id": f"fc_{index}"} for index, call in enumerate(turn.calls)]
    message |= {"tool_calls": calls} if calls else {}
    head = {"finish_reason": "stop", "index": 0, "message": message, "role": "assistant"}
    return head if turn.usage is None else {**head, "usage": turn.usage}


def drawn(turn: Turn) -> list[dict[str, Any]]:
    """What a model drew, as OpenRouter tells it."""
    kind = "image_url"
    urls = enumerate(turn.images)
    return [{"type": kind, kind: {"url": url}, "index": number} for number, url in urls]


def openai_result(turn: Turn, model: Mapping[str, Any]) -> dict[str, Any]:
    """The `result` of a complete reply of a provider of chat completions."""
    message: dict[str, Any] = {"role": "assistant", "content": None if turn.calls else turn.text}
    if model.get("provider") in OPENAI and not turn.text:
        message["content"] = None
    if turn.calls:
        message["tool_calls"] = list(turn.calls)
    if turn.reasoning:
        message["reasoning"] = "".join(turn.reasoning)
    if turn.images:
        message["images"] = drawn(turn)
    finish = "stop" if turn.finish == "refusal" else turn.finish
    result = {"index": 0, "message": message, "finish_reason": finish}
    return result if turn.usage is None else {**result, "usage": turn.usage}


class Form(NamedTuple):
    """The shape that a kind of provider speaks."""

    sent: Callable[[Mapping[str, Any], Mapping[str, Any]], list[dict[str, Any]]]
    fault: Callable[[Mapping[str, Any], Mapping[str, Any]], str]
    result: Callable[[Turn, Mapping[str, Any]], dict[str, Any]]


FORMS = {
    "claude": Form(to_claude, claude_fault, claude_result),
    "responses": Form(to_responses, responses_fault, responses_result),
    "chat": Form(to_chat, chat_fault, openai_result),
}


def driver_reply(turn: Turn, model: Mapping[str, Any]) -> dict[str, Any]:
    """A complete reply of /drivers/call."""
    service, provider = turn.served_by or (model.get("provider"), model["id"])
    turn = dressed(turn, model)
    return {
        "success": True,
        "result": {**FORMS[turn.form].result(turn, model), "via_ai_chat_service": True},
        "service": {"name": "ai-chat"},
        "metadata": {"service_used": service, "providerUsed": provider},
    }


def driver_stream(turn: Turn, model: Mapping[str, Any]) -> tuple[list[bytes], list[bytes]]:
    """The body and the ending of a streamed reply of /drivers/call: one JSON object a line."""
    turn = dressed(turn, model)
    body: list[dict[str, Any]] = [
        {"type": "reasoning", "reasoning": piece} for piece in turn.reasoning
    ]
    body += [{"type": "text", "text": piece} for piece in turn.pieces()]
    body += [{**one, "type": "image"} for one in drawn(turn)]
    for index, call in enumerate(turn.streamed_calls()):
        own = {"canonical_id": f"fc_{index}"} if turn.form == "responses" else {}
        body.append({**tool_use(call), **own, "text": ""})
    if turn.extra_content:
        body += [{"type": "extra_content", "extra_content": turn.extra_content}]
    ending: dict[str, Any] = {"type": "usage"}
    if turn.error:
        ending = {"type": "error", "message": turn.error}
    elif turn.usage is not None and (turn.form, turn.finish) != ("responses", "length"):
        ending["usage"] = turn.usage
    *lines, last = [compact(item).encode() + b"\n" for item in [*body, ending]]
    return lines, [last]


def openai_head(kind: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """How each reply of the OpenAI endpoint, and each event of its streams, begins."""
    name = f"chatcmpl-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model["id"]}


def openai_reply(turn: Turn, model: Mapping[str, Any]) -> dict[str, Any]:
    """A complete reply of the OpenAI endpoint: no reasoning, and no usage to speak of."""
    message: dict[str, Any] = {"role": "assistant", "content": turn.text}
    if turn.calls:
        message["tool_calls"] = list(turn.calls)
    finish = "tool_calls" if turn.calls else turn.finish
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    return {**openai_head("chat.completion", model), "choices": [choice], "usage": ZERO_USAGE}


def openai_stream(turn: Turn, model: Mapping[str, Any]) -> tuple[list[bytes], list[bytes]]:
    """The body and the ending of a streamed reply of the OpenAI endpoint: an error looks normal."""
    head = openai_head("chat.completion.chunk", model)
    turn = dressed(turn, model)

    def event(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return f"data: {compact({**head, 'choices': [choice], **more})}\n\n".encode()

    body = [event({"content": piece}) for piece in turn.pieces()]
    for index, call in enumerate(turn.streamed_calls()):
        arguments = arguments_of(call)
        text = arguments if isinstance(arguments, str) else compact(arguments)
        function = {"name": call["function"]["name"], "arguments": text}
        delta = {"index": index, "id": call["id"], "type": "function", "function": function}
        body.append(event({"tool_calls": [delta]}))
    usage = {} if turn.error else {"usage": ZERO_USAGE}
    last = event({}, "tool_calls" if turn.calls else "stop", **usage)
    return body, [last, b"data: [DONE]\n\n"]


# =============================================================================
# FakePuter: one request
# =============================================================================
class FakeHandler(BaseHTTPRequestHandler):
    """Answers the requests of one connection; the methods without `do_` are for scenarios too."""

    server: FakeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16  # headers and body leave together; every chunk is flushed

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the terminal quiet."""

    def do_GET(self) -> None:
        """Answers any request: what is asked stands in the table of routes."""
        self.fake = self.server.fake
        self.running_for, self.stream_open, self.streaming = None, False, False
        self.held_microcents = 0.0
        try:
            self.seen = self.fake.note(self)
            self.pause(self.fake.wire_delay_s)
            route = self.fake.routes.get((self.command, self.seen.path))
            (route or refuses(404, "not_found", "Not Found"))(self)
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
        account = self.fake.accounts.get(self.seen.token)
        if account is None or account.dead:
            message = "Re-authentication required"
            raise Refusal(401, "reauth_required", message, reason="token_v1")
        return account

    def caller(self) -> FakeAccount:
        """The account of a chat call, which takes fewer kinds of token and has limits."""
        account = self.signed_in()
        if account.session_token:
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
                self.running_for.held_microcents -= self.held_microcents
            self.fake.open_streams -= self.stream_open
            self.running_for, self.stream_open = None, False

    def fields(self) -> dict[str, Any]:
        """The body of the request, which must be an object."""
        if not isinstance(self.seen.body, dict):
            raise Refusal(400, "bad_request", "the body is no JSON object")
        return self.seen.body

    # What is said.

    def send(self, reply: Raw, length: int | None = None) -> None:
        """Sends a whole reply; a `length` beyond the body's promises more than there is."""
        body = reply.body if isinstance(reply.body, bytes) else compact(reply.body).encode()
        self.release()
        self.send_response(reply.status)
        headers = {"Content-Type": reply.content_type, **reply.headers}
        for name, value in {**headers, "Content-Length": str(length or len(body))}.items():
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

    def converse(self, args: dict[str, Any], account: FakeAccount, shapes: Shapes) -> None:
        """Checks a chat call, sends it on, lets the model's scenario answer, sends the answer."""
        check_messages(args.get("messages"))
        self.model = self.fake.find_model(args.get("model"))
        self.streaming, self.stream_type = bool(args.get("stream")), shapes.stream_type
        answer = self.send_on(args, account) or self.play(args)
        if isinstance(answer, Raw):
            self.send(answer)
        elif isinstance(answer, Turn):
            self.say(replace(answer, form=answer.form or form_of(self.model, args)), shapes)

    def send_on(self, args: dict[str, Any], account: FakeAccount) -> Turn | None:
        """Sends a request on to the provider, which may refuse it, or to nobody at the gate."""
        messages, form = normalised(args["messages"]), FORMS[form_of(self.model, args)]
        with self.fake.lock:
            left = account.credit_microcents - account.held_microcents
            limit, worst = answer_limit(left, self.model, messages, args.get("max_tokens"))
            self.held_microcents = worst if account.reserves else 0
            account.held_microcents += self.held_microcents
        inside = {
            "messages": messages,
            "tools": [read_tool(tool) for tool in args.get("tools") or ()],
        }
        bodies = form.sent(self.model, {**args, **inside, "max_tokens": limit})
        self.seen.sent.extend(copy.deepcopy(bodies))
        fault = form.fault(self.model, bodies[-1])
        return vendor_failure(self, 400, fault) if fault else None

    def play(self, args: dict[str, Any]) -> Turn | Raw | None:
        """What the model's scenario answers."""
        answer: Answer | Scenario
        answer, self.call_number = self.fake.next_scenario(args, self.model)
        while isinstance(answer, str) or callable(answer):
            answer = (SCENARIOS[answer] if isinstance(answer, str) else answer)(self, args)
        return answer

    def say(self, turn: Turn, shapes: Shapes) -> None:
        """Sends what a model says; that it says nothing, the Responses API calls an error."""
        if self.streaming:
            self.send_stream(turn, *shapes.stream(turn, self.model))
        elif turn.form == "responses" and not turn.text and not turn.calls:
            told, attempt = "an empty response was generated", {"model": self.model["id"]}
            attempt |= {"provider": self.model["provider"], "status": 400, "error": told}
            raise Refusal(400, "upstream_bad_request", told, attempts=[attempt])
        else:
            self.send_reply(turn, compact(shapes.reply(turn, self.model)).encode())

    def send_reply(self, turn: Turn, body: bytes) -> None:
        """Sends a complete reply, after the time that its model takes."""
        self.pause(turn.pause_s * len(turn.pieces()))
        if turn.fault == "closed":
            self.send(Raw(body[: len(body) // 2]), len(body))
            self.drop()
        else:
            self.send(Raw(body))

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


class Shapes(NamedTuple):
    """How one URL words its replies."""

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
            raise Refusal(400, "bad_request", "each message must have a 'content' property")


# =============================================================================
# FakePuter: the routes
# =============================================================================
Route = Callable[[FakeHandler], None]


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
    allowance = {"remaining": left, "monthUsageAllowance": ALLOWANCE_MICROCENTS, "addons": {}}
    usage = {"total": max(0, ALLOWANCE_MICROCENTS - left)}
    handler.send(Raw({"usage": usage, "appTotals": {}, "allowanceInfo": allowance}))


def driver_call(handler: FakeHandler) -> None:
    """POST /drivers/call."""
    account = handler.caller()
    if account.error:
        handler.send(Raw(account.error[1], account.error[0]))
        return
    body = handler.fields()
    interface, driver, method = (body.get(key) for key in ("interface", "driver", "method"))
    if does := MEDIA.get((interface, method)):
        made = does(handler, handler.seen.args, driver)
        is_raw = isinstance(made, Raw)
        handler.send(made if is_raw else Raw({"success": True, "result": made, "service": {}}))
        return
    if (interface, driver) != ("puter-chat-completion", "ai-chat"):
        raise Refusal(404, "not_found", f"Driver not found: {interface}:{driver}")
    if method != "complete":
        raise Refusal(404, "not_found", f"Method '{method}' not found on driver '{interface}'")
    handler.converse(handler.seen.args, account, DRIVER_SHAPES)


# Pictures and sound: the wire's own words, with pictures and sounds of the fake's own.
SOUND = b"ID3\x04\0\0\0\0\0\0" + bytes(range(256)) + b"token-like \xff\xfb\x90\r\n\r\n"
WAV = b"RIFF\x2c\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0@\x1f\0\0\x80>\0\0\x02\0\x10\0data"
HEARD = "Hello from the scripted host."
SRT = f"1\n00:00:00,000 --> 00:00:01,500\n{HEARD}\n"
VOICES = "alloy, ash, ballad, coral, echo, fable, nova, onyx, sage, shimmer"
SEEDREAM = "seedream-4-0-250828"
IMAGE_MODELS: list[dict[str, Any]] = [
    {
        "id": SEEDREAM,
        "puterId": f"byteplus:byteplus/{SEEDREAM}",
        "aliases": ["seedream-4-0"],
        "costs_currency": "usd-cents",
        "pricing_unit": "per-image",
        "index_cost_key": "per-image",
        "costs": {"per-image": 3},
        "provider": "byteplus-image-generation",
    },
    *(
        {
            "id": name,
            "costs_currency": "usd-cents",
            "pricing_unit": "per-tier",
            "index_cost_key": "low:1024x1024",
            "costs": {"low:1024x1024": 0.5, "high:1024x1024": 3.6},
            "provider": "openai-image-generation",
        }
        for name in ("gpt-image-1-mini", "gpt-image-1", "gpt-image-2", "gemini-2.5-flash-image")
    ),
]
# What the media's providers answer to "scenario: NAME".
PROVIDER_ERRORS = {
    "err400": (400, "scripted 400", "upstream_bad_request", 400, "moderation_blocked"),
    "err401": (500, "scripted 401", "upstream_auth_failed", 401, None),
    "err429": (429, "scripted 429", "upstream_rate_limited", 429, None),
    "err500": (400, "AI provider unavailable", "upstream_provider_unavailable", 500, None),
}


def play_media(handler: FakeHandler, asked: str) -> None:
    """What a prompt of the form `scenario: NAME` lets a picture or sound come to."""
    name = asked.removeprefix("scenario: ")
    if name in PROVIDER_ERRORS:
        status, message, code, upstream, word = PROVIDER_ERRORS[name]
        raise Refusal(status, code, message, upstreamStatus=upstream, upstreamCode=word)
    if name == "hang":
        handler.pause(30)
    if name == "closed":
        handler.send(Raw(b'{"success": true, "result": "data:image'), 9_999)
        handler.drop()
        raise ConnectionAbortedError


def sample(handler: FakeHandler, name: str) -> str:
    """The address of what `test_mode` gives."""
    return f"{handler.fake.url}/samples/{name}"


def draw(handler: FakeHandler, args: dict[str, Any], driver: str | None) -> Any:
    """puter-image-generation, generate."""
    if driver == "ai-image" and not args.keys() & {"model", "provider"}:
        raise Refusal(400, "bad_request", "Missing `model`")
    names = {n for m in IMAGE_MODELS for n in (m["id"], m.get("puterId"), *m.get("aliases", ()))}
    if args.get("model", SEEDREAM) not in names:
        raise Refusal(400, "bad_request", f"Model not found: {args['model']}")
    if args.get("test_mode"):
        return sample(handler, "image_example.png")
    account, ratio = handler.signed_in(), args.get("ratio") or {"w": 1, "h": 1}
    is_dear = args.get("quality") == "high" and ratio["w"] * ratio["h"] > 4_000_000
    if account.credit_microcents <= 0 or (is_dear and account.temporary):
        raise Refusal(402, "insufficient_funds", "Insufficient credits for image generation")
    play_media(handler, str(args.get("prompt")))
    return f"data:image/png;base64,{ONE_PIXEL}"


def synthesize(handler: FakeHandler, args: dict[str, Any], driver: str | None) -> Any:
    """puter-tts, synthesize."""
    if not args.get("text"):
        raise Refusal(400, "field_required", "Missing required field: text", key="text")
    if args.get("test_mode"):
        return {"url": sample(handler, "tts_example.mp3"), "content_type": "audio"}
    if "provider" not in args and driver != "openai-tts":
        raise Refusal(500, "internal_error", "Internal Server Error")
    voice = args.get("voice")
    if voice and voice not in VOICES.split(", "):
        more = {"key": "voice", "expected": VOICES, "got": voice}
        raise Refusal(400, "field_invalid", f"Invalid voice: {voice}. Expected: {VOICES}", **more)
    play_media(handler, args["text"])
    handler.fake.spoken = args["text"]
    is_wav = args.get("response_format") == "wav" or args.get("provider") == "gemini"
    return Raw(SOUND, content_type="audio/wav" if is_wav else "audio/mpeg")


def transcribe(handler: FakeHandler, args: dict[str, Any], driver: str | None) -> Any:
    """puter-speech2txt, transcribe and translate."""
    if not str(args.get("file")).startswith("data:audio/"):
        raise Refusal(400, "bad_request", "`file` is required")
    if args.get("test_mode"):
        words = [{"start": 0, "end": 0.5, "text": "Hello"}]
        told = {"language": "en", "duration_seconds": 2, "words": words}
        return {"text": "Hello! This is a sample.", **told, "model": "gpt-4o-mini-transcribe"}
    play_media(handler, str(args.get("prompt")))
    heard, wanted = handler.fake.spoken, args.get("response_format", "json")
    if wanted == "verbose_json":
        timed = {"id": 0, "seek": 0, "start": 0, "end": 1.5, "text": f" {heard}", "tokens": [1]}
        timed |= {"temperature": 0, "avg_logprob": -0.1, "compression_ratio": 1}
        told = {"task": "transcribe", "language": "english", "duration": 1.5, "text": heard}
        return {**told, "segments": [{**timed, "no_speech_prob": 0.01}]}
    usage = {"type": "tokens", "total_tokens": 10, "input_tokens": 5, "output_tokens": 5}
    return {"json": {"text": heard, "usage": usage}, "srt": SRT}.get(wanted, heard)


def recognize(handler: FakeHandler, args: dict[str, Any], driver: str | None) -> Any:
    """puter-ocr, recognize."""
    if not re.match("data:(image/|application/pdf)", str(args.get("source"))):
        raise Refusal(400, "bad_request", "`source` is required")
    texts = ["test_mode is enabled"] if args.get("test_mode") else ["First line", "Second line"]
    blocks = [{"type": "text/x", "confidence": 1, "text": text} for text in texts]
    return {"blocks": [*blocks, {"type": "figure", "confidence": 1}][: len(texts) + 1]}


# By interface and method.
MEDIA: dict[Any, Callable[[FakeHandler, dict[str, Any], str | None], Any]] = {
    ("puter-image-generation", "generate"): draw,
    ("puter-tts", "synthesize"): synthesize,
    ("puter-speech2txt", "transcribe"): transcribe,
    ("puter-speech2txt", "translate"): transcribe,
    ("puter-ocr", "recognize"): recognize,
}


def sign_in_page(handler: FakeHandler) -> None:
    """GET /?action=authme&redirectURL=…: the page on which a person approves."""
    redirect = query_value(handler.path, "redirectURL")
    if query_value(handler.path, "action") != "authme" or not redirect:
        raise Refusal(404, "not_found", "Not Found")
    link = html.escape(with_query(redirect, token=handler.fake.login_token))
    page = f'<!doctype html><title>Puter</title><a id="approve" href="{link}">Approve</a>'
    handler.send(Raw(page.encode(), content_type=HTML_TYPE))


ROUTES: dict[tuple[str, str], Route] = {
    ("GET", "/"): sign_in_page,
    ("GET", "/whoami"): whoami,
    ("GET", "/metering/usage"): metering,
    ("GET", "/puterai/chat/models"): lambda handler: handler.send(
        Raw({"models": [model["id"] for model in handler.fake.catalogue]})
    ),
    ("GET", "/puterai/chat/models/details"): lambda handler: handler.send(
        Raw({"models": handler.fake.catalogue})
    ),
    ("GET", "/puterai/image/models/details"): lambda handler: handler.send(
        Raw({"models": IMAGE_MODELS})
    ),
    ("GET", "/samples/image_example.png"): lambda handler: handler.send(
        Raw(base64.b64decode(ONE_PIXEL), content_type="image/png")
    ),
    ("GET", "/samples/tts_example.mp3"): lambda handler: handler.send(
        Raw(SOUND, content_type="audio/mpeg")
    ),
    ("POST", "/drivers/call"): driver_call,
    ("POST", "/puterai/openai/v1/chat/completions"): lambda handler: handler.converse(
        handler.fields(), handler.caller(), OPENAI_SHAPES
    ),
    # Signing in with a password is for the server's own page.
    ("POST", "/login"): refuses(403, "forbidden", "Forbidden"),
    ("POST", "/signup"): refuses(403, "forbidden", "Forbidden"),
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

    def serve_forever(self, poll_interval: float = 0.0) -> None:
        """Takes connections until the socket is closed; no poll, for which a stop would wait."""
        with suppress(OSError):
            while True:
                connection, address = self.socket.accept()
                self.process_request(connection, address)

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
        for connection in (self.socket, *self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class FakePuter:
    """A scripted Puter server on a real socket; API origin and GUI origin are both `url`.

        with FakePuter() as fake:
            fake.script["openrouter:lab/text"] = ["internal", "text"]
            requests.get(fake.url + "/whoami", headers={"Authorization": "Bearer token-alice"})

    `script` maps a model to a scenario name, a list of them (used up in order; the last one
    stays), or a function of handler and args that gives a Turn, a Raw, the name of a scenario,
    or None once it has written its own reply with the handler's `begin_stream`, `chunk`,
    `end_stream`, `pause`, `drop` and `send`. Without a script a model does what its name says, or
    what a prompt of the form `scenario: NAME` says. `sent` is what arrived at the providers.
    `routes` may be changed by a test as well.
    """

    def __init__(
        self, port: int = 0, host: str = "127.0.0.1", catalogue: Any = None, wire_delay_s: float = 0
    ) -> None:
        self.host, self.port = host, port
        self.catalogue = default_catalogue() if catalogue is None else catalogue
        self.wire_delay_s = wire_delay_s  # before the first byte of each reply
        self.lock = threading.Lock()
        self.requests: list[Seen] = []
        self.accounts: dict[str, FakeAccount] = {}
        self.script: dict[str, Any] = {}
        self.routes: dict[tuple[str, str], Route] = dict(ROUTES)
        self.open_streams = 0
        self.spoken = HEARD  # the latest text that was spoken: what every recording says
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
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Stops listening and closes every connection."""
        if self._server:
            self._server.close_all()
            self._server = None

    # For tests.

    def add_account(self, username: str, token: str | None = None, **limits: Any) -> FakeAccount:
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
        body = json_or_bytes(handler.rfile.read(int(handler.headers.get("Content-Length") or 0)))
        scheme, _, token = handler.headers.get("Authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        owner = self.accounts.get(token)
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

    @property
    def sent(self) -> list[dict[str, Any]]:
        """Every request that reached a model's provider, as it arrived there."""
        with self.lock:
            return [body for one in self.requests for body in one.sent]

    def find_model(self, name: Any) -> dict[str, Any]:
        """The catalogue entry of an id, a puterId or an alias."""
        if name == FAKE_MODEL["id"]:
            return FAKE_MODEL
        for model in self.catalogue:
            if name in (model["id"], model.get("puterId"), *model.get("aliases", ())) and name:
                return model
        raise Refusal(400, "bad_request", f"Model not found: {name}")

    def next_scenario(
        self, args: Mapping[str, Any], model: Mapping[str, Any]
    ) -> tuple[str | Scenario, int]:
        """What the model does now, and how many times it was asked, this time included."""
        names = (args["model"], model["id"], model.get("puterId"), *model.get("aliases", ()))
        with self.lock:
            self._calls[model["id"]] += 1
            number = self._calls[model["id"]]
            planned = next((self.script[name] for name in names if name in self.script), None)
            if isinstance(planned, list):
                planned = planned.pop(0) if len(planned) > 1 else planned[0]
        lab_name = model["id"].removeprefix("openrouter:lab/")
        own = lab_name if lab_name in SCENARIOS else named_scenario(args)
        return planned or own or "text", number


# =============================================================================
# The demo
# =============================================================================
DEMO_ANSWER = (
    "Air scatters blue light far more than red, so blue comes to your eye from all over the sky."
)
# What is shown, the model that is asked, and what it does.
DEMO_STEPS: tuple[tuple[str, str, Any], ...] = (
    ("1. An answer streams in, word by word.", "claude-opus-4-5", says(DEMO_ANSWER, pause_s=0.02)),
    (
        """2. The model's provider takes no more requests now (429): a free model
   answers instead, and a line on stderr says which, and why.""",
        "claude-opus-4-5",
        refuses(429, "upstream_rate_limited", "AI provider rate limit exceeded"),
    ),
    (
        """3. A stream breaks off. What came is shown; nothing is asked or paid for
   twice; one line on stderr and the exit code 1 say that it is not whole.""",
        "gemini-2.5-flash",
        says(DEMO_ANSWER, pause_s=0.02, error="connection lost", error_after=9),
    ),
)

DEMO_LAUNCH = """4. A coding agent runs on your account: it is told of the gateway in its environment, and
   nothing of yours is changed. Here a script stands for OpenCode.

$ python -m puter launch opencode --free -- run 'Why is the sky blue?'"""
# A coding agent that asks the gateway one question, as OpenCode would.
DEMO_AGENT = """
import json, os, sys, urllib.request
settings = json.loads(os.environ["OPENCODE_CONFIG_CONTENT"])
options = settings["provider"]["puter"]["options"]
asked = [{"role": "user", "content": sys.argv[-1]}]
body = {"model": settings["model"].removeprefix("puter/"), "messages": asked}
key = os.environ["PUTERPY_KEY"]
head = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
url = options["baseURL"] + "/chat/completions"
request = urllib.request.Request(url, json.dumps(body).encode(), head)
answer = json.load(urllib.request.urlopen(request))
print("(a scripted agent) " + answer["choices"][0]["message"]["content"], flush=True)
"""


def install_agent(folder: Path, name: str, source: str) -> None:
    """Puts a Python script, which needs nothing installed, into the folder as a command."""
    script = folder / name
    script.write_text(f"#!{sys.executable} -S\n{source}", "utf-8")
    script.chmod(0o755)
    if os.name == "nt":
        (folder / f"{name}.cmd").write_text(f'@"{sys.executable}" -S "{script}" %*\n', "utf-8")


def cmd_demo(args: argparse.Namespace) -> int:
    """Shows the real command line against FakePuter: no account, no network, nothing kept."""
    own = {n: v for n, v in os.environ.items() if not n.upper().startswith("PUTER_")}
    own |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
    with TemporaryDirectory() as folder, FakePuter() as fake:
        puter.AccountStore(folder).add(puter.Account("alice", "token-alice"))
        env = {**own, "PUTER_CONFIG_DIR": folder, "PUTER_API_BASE_URL": fake.url}
        stand_ins = {m["id"]: says(DEMO_ANSWER, pause_s=0.02) for m in fake.catalogue}
        for told, model, does in DEMO_STEPS:
            fake.script = {**stand_ins, model: does}
            command = ["ask", "-m", model, "Why is the sky blue?"]
            print(f"{told}\n\n$ python -m puter {shlex.join(command)}", flush=True)
            command = [sys.executable, puter.__file__, *command]
            code = subprocess.call(command, env=env, stdin=subprocess.DEVNULL)
            print(f"[exit code {code}]\n", flush=True)
        install_agent(Path(folder), "opencode", DEMO_AGENT)
        env["PATH"] = os.pathsep.join([folder, env.get("PATH", "")])
        fake.script = stand_ins
        print(DEMO_LAUNCH, flush=True)
        command = [sys.executable, puter.__file__, "launch", "opencode", "--free"]
        code = subprocess.call([*command, "--", "run", "Why is the sky blue?"], env=env)
        print(f"[exit code {code}]\n", flush=True)
    print("That was a scripted server. For real answers: python -m puter login")
    return 0


# =============================================================================
# The benchmark
# =============================================================================
Samples = dict[str, list[float]]
Jobs = Mapping[str, Callable[[], object]]

# The parts below are played in processes of their own. Only a part's source goes there, behind
# that of the first three functions: it imports what it needs, so that nothing of pytest or
# openai weighs on what is measured.


def tell(value: Any) -> None:
    """Pass a value on to the benchmark."""
    print(json.dumps(value), flush=True)


def peak_mb() -> float:
    """The most memory that this process ever had."""
    import resource

    try:  # Linux counts the parent's memory into ru_maxrss
        with open("/proc/self/status") as status:
            values = dict(line.split(":", 1) for line in status)
        return int(values["VmHWM"].split()[0]) / 1024
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def by_turns(jobs: Jobs, rounds: int, warm: int = 1) -> Samples:
    """Samples of jobs done in turns, `warm` rounds uncounted: the number each returns, or its ms."""
    samples: Samples = {name: [] for name in jobs}
    for number in range(-warm, rounds):
        for name, job in jobs.items():
            began = time.perf_counter()
            result = job()
            ms = (time.perf_counter() - began) * 1000
            if number >= 0:
                samples[name].append(result if isinstance(result, float) else ms)
    return samples


def play_puter(catalogue: Any, reply: Any, shapes: dict[str, list[str]]) -> None:
    """A Puter server that costs next to nothing: its replies are ready strings of bytes.

    A model's name says what is streamed: lab/lines-1000 is 1,000 lines, one a chunk of HTTP;
    lab/events-1000 the same as SSE; lab/paced-250 is 250 lines, 50 a second.
    """
    import re
    import socketserver
    import threading

    def fixed(value: Any) -> bytes:
        body = json.dumps(value)
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n"
        return f"{head}Content-Type: application/json\r\n\r\n{body}".encode()

    def chunk(text: str) -> bytes:
        return f"{len(text):x}\r\n{text}\r\n".encode()

    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            while first := self.rfile.readline():
                length = 0
                while (line := self.rfile.readline()).strip():
                    if line.lower().startswith(b"content-length:"):
                        length = int(line[15:])
                asked = re.search(rb'lab/(lines|events|paced)-(\d+)"', self.rfile.read(length))
                if asked:
                    self.stream(asked[1].decode(), int(asked[2]))
                else:
                    self.wfile.write(listing if first.startswith(b"GET") else whole)

        def stream(self, shape: str, count: int) -> None:
            kind, line, last = shapes[shape]
            head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n"
            self.wfile.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            if shape == "paced":
                for _ in range(count):
                    self.wfile.write(chunk(line))
                    time.sleep(0.02)
            else:
                self.wfile.write(chunk(line) * count)
            self.wfile.write(chunk(last) + b"0\r\n\r\n")

    class Server(socketserver.ThreadingTCPServer):
        request_queue_size = 512
        daemon_threads = True

    listing, whole = fixed(catalogue), fixed(reply)
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tell(server.server_address[1])
    sys.stdin.read()


def play_bare_server(base: str) -> None:
    """The least that a server on `http.server` and `requests` can do."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    session.mount("http://", HTTPAdapter(pool_maxsize=64))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            text = session.post(f"{base}/drivers/call", data=body).content
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tell(server.server_address[1])
    sys.stdin.read()


def play_server(base: str) -> None:
    """`OpenAIServer` as anybody would start it, but for many clients at once."""
    import puter

    client = puter.Puter("bench", api_base_url=base, max_concurrent=512)
    with puter.OpenAIServer(client, port=0, max_connections=512) as server:
        tell(server.port)
        for _ in sys.stdin:
            tell(peak_mb())


def time_streams(base: str, lines: int, events: int, rounds: int, firsts: int) -> None:
    """Lines a second of long streams, and ms to the first line of short ones on kept connections.

    The floors are a bare loop that builds nothing, and the SDK.
    """
    import openai
    import requests

    import puter

    client, session = puter.Puter("bench", api_base_url=base), requests.Session()
    sdk = openai.OpenAI(base_url=f"{base}/v1", api_key="bench")
    messages: Any = [{"role": "user", "content": "Go"}]

    def bare(model: str) -> Any:
        body = {"args": {"model": model, "messages": messages, "stream": True}}
        answer = session.post(f"{base}/drivers/call", json=body, stream=True)
        return map(json.loads, answer.iter_lines())

    def by_sdk() -> Any:
        model = f"lab/events-{events}"
        return sdk.chat.completions.create(model=model, messages=messages, stream=True)

    def rate(count: int, opened: Callable[[], Any]) -> float:
        began = time.perf_counter()
        for _ in opened():
            pass
        return count / (time.perf_counter() - began)

    def first(opened: Callable[[], Any]) -> float:
        began = time.perf_counter()
        lines = iter(opened())
        next(lines)
        took_s = time.perf_counter() - began
        for _ in lines:
            pass
        return took_s * 1000

    long, short = f"lab/lines-{lines}", "lab/lines-3"
    rates: Jobs = {
        "ours": lambda: rate(lines, lambda: client.stream(messages, model=long)),
        "bare": lambda: rate(lines, lambda: bare(long)),
        "sdk": lambda: rate(events, by_sdk),
    }
    times: Jobs = {
        "our first": lambda: first(lambda: client.stream(messages, model=short)),
        "bare first": lambda: first(lambda: bare(short)),
    }
    tell({**by_turns(rates, rounds), **by_turns(times, firsts, warm=10)})


def read_length(base: str, lines: int) -> None:
    """The peak memory of a process that reads one stream of so many lines."""
    import puter

    for _ in puter.Puter("bench", api_base_url=base).stream("Go", model=f"lab/lines-{lines}"):
        pass
    tell(peak_mb())


def load_server(port: int, clients: int, seconds: float, asked: Any) -> None:
    """Calls a second that so many clients on kept connections get answered."""
    import http.client
    from concurrent.futures import ThreadPoolExecutor

    body = json.dumps({**asked, "messages": [{"role": "user", "content": "Hi"}]})

    def work(connection: http.client.HTTPConnection) -> int:
        count = 0
        while count == 0 or time.perf_counter() < began + seconds:
            connection.request("POST", "/v1/chat/completions", body)
            answer = connection.getresponse()
            text = answer.read()
            assert answer.status == 200, text
            count += 1
        return count

    kept = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(clients)]
    for connection in kept:
        connection.connect()
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        count = sum(pool.map(work, kept))
    tell(count / (time.perf_counter() - began))


def ask_in_a_crowd(base: str, token: str, by_us: bool, threads: int, calls: int) -> None:
    """Asks from so many threads when told to, by puter.py or by a loop that sleeps a second."""
    from concurrent.futures import ThreadPoolExecutor

    import requests

    import puter

    client, model = puter.Puter(token, api_base_url=base), "openrouter:lab/echo"
    messages = [{"role": "user", "content": "Hi"}]
    call = {"interface": "puter-chat-completion", "driver": "ai-chat", "method": "complete"}
    body = {**call, "args": {"model": model, "messages": messages}}

    def plain() -> None:
        headers = {"Authorization": f"Bearer {token}"}
        while True:
            answer = requests.post(f"{base}/drivers/call", json=body, headers=headers)
            if answer.status_code != 429:
                return answer.raise_for_status()
            time.sleep(1)

    def work(_: int) -> int:
        failures = 0
        for _ in range(calls):
            try:
                client.chat(messages, model=model) if by_us else plain()
            except (puter.PuterError, requests.RequestException):
                failures += 1
        return failures

    tell("ready")
    sys.stdin.readline()
    with ThreadPoolExecutor(threads) as pool:
        tell(sum(pool.map(work, range(threads))))


class Part:
    """A process that plays one of the parts above; `said` is the first that it says."""

    def __init__(self, lab: Lab, play: Callable[..., None], *args: Any) -> None:
        sources = [inspect.getsource(part) for part in (tell, peak_mb, by_turns, play)]
        head = "from __future__ import annotations\nimport json, sys, time\n"
        call = f"{play.__name__}(*json.loads(sys.stdin.readline()))"
        self._process = subprocess.Popen(
            [sys.executable, "-c", "\n".join([head, *sources, call])],
            cwd=lab.folder,  # where nothing lies that could be imported
            env=lab.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said = self.ask(args)

    def ask(self, value: Any) -> Any:
        """What it says next, when it was told this."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{json.dumps(value)}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "a part of the benchmark failed: see above"
        return json.loads(line)

    def end(self) -> None:
        """Wait until it has done its work; a server has when its input ends."""
        with self._process:
            self._process.communicate()


class Lab:
    """What one run of the benchmark works with."""

    def __init__(self, folder: Path, quick: bool, stack: ExitStack) -> None:
        self.folder, self.quick, self._stack = folder, quick, stack
        # Bytecode is cached, but not beside the sources.
        cache = str(folder / "bytecode")
        self.env = clean_environ(folder / "config", PYTHONPYCACHEPREFIX=cache)
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)
        models = [openrouter_model(f"lab/model-{n}") for n in range(500)]
        models.append(openrouter_model("lab/paced-250"))
        choice = {"index": 0, "delta": {"content": "a "}, "finish_reason": None}
        head = {"id": "1", "object": "chat.completion.chunk", "created": 1}
        event = json.dumps({**head, "model": "m", "choices": [choice]})
        usage = '{"type":"usage","usage":{"prompt_tokens":1,"completion_tokens":1}}\n'
        lines = ("application/x-ndjson", '{"type":"text","text":"a "}\n', usage)
        sse = ("text/event-stream", f"data: {event}\n\n", "data: [DONE]\n\n")
        shapes = {"lines": lines, "paced": lines, "events": sse}
        reply = driver_reply(Turn("Hello there, and good-bye."), models[0])
        port = self.start(play_puter, {"models": models}, reply, shapes).said
        self.base = f"http://127.0.0.1:{port}"
        self.server = self.start(play_server, self.base)
        self.bare_server = self.start(play_bare_server, self.base)

    def start(self, play: Callable[..., None], *args: Any) -> Part:
        """A part that plays until the end."""
        part = Part(self, play, *args)
        self._stack.callback(part.end)
        return part

    def ask(self, play: Callable[..., None], *args: Any) -> Any:
        """What a part says that is played in a fresh process."""
        part = Part(self, play, *args)
        part.end()
        return part.said

    def many(self, full: int, quick: int) -> int:
        """How many, by the kind of the run."""
        return quick if self.quick else full


def starts(lab: Lab) -> Samples:
    """ms of fresh processes, from start to end."""
    store = puter.AccountStore(lab.folder / "config" / "puter-accounts.json")
    store.add(puter.Account("bench", "token"))

    def run(*command: str) -> Callable[[], object]:
        command = (sys.executable, *command)
        options: JSON = {"cwd": lab.folder, "env": lab.env, "stdout": subprocess.DEVNULL}
        return lambda: subprocess.run(command, check=True, **options)

    jobs = {
        "puter": run("-c", "import puter"),
        "requests": run("-c", "import requests"),
        "status": run("-m", "puter", "status"),
    }
    return by_turns(jobs, lab.many(25, 7))


def reading(lab: Lab) -> Samples:
    """Lines a second, and ms to the first line."""
    lines, events = lab.many(200_000, 32_000), lab.many(20_000, 2_000)
    return lab.ask(time_streams, lab.base, lines, events, lab.many(7, 3), lab.many(200, 60))


def lengths(lab: Lab) -> Samples:
    """MB at most."""
    lines = {"short": 1_000, "long": lab.many(1_000_000, 200_000)}
    return {name: [lab.ask(read_length, lab.base, count)] for name, count in lines.items()}


def rates(lab: Lab) -> Samples:
    """Calls a second, by the number of clients."""
    jobs = {}
    for clients in (1, 8, 32):
        for name, part in (("", lab.server), ("bare ", lab.bare_server)):
            args = part.said, clients, 0.4 if lab.quick else 1.0, {"model": "lab/model-0"}
            jobs[f"{name}{clients}"] = functools.partial(lab.ask, load_server, *args)
    return by_turns(jobs, lab.many(7, 2), warm=0)


def peaks(lab: Lab) -> Samples:
    """MB of the gateway, at most, after 200 streams at once."""
    asked = {"model": "lab/paced-250", "stream": True}
    lab.ask(load_server, lab.server.said, 200, 0, asked)
    return {"ours": [lab.server.ask("peak")]}


def crowds(lab: Lab) -> Samples:
    """Seconds, requests and failures of many processes on one account with Puter's own limits."""
    processes, threads, calls = lab.many(6, 2), lab.many(8, 2), lab.many(4, 1)
    samples: Samples = {}
    for name in ("ours", "bare"):
        with FakePuter() as fake, ThreadPoolExecutor(processes) as pool:
            account = fake.add_account("crowd", max_in_window=30, max_concurrent=3)
            args = fake.url, account.token, name == "ours", threads, calls
            parts = [Part(lab, ask_in_a_crowd, *args) for _ in range(processes)]
            began = time.perf_counter()
            failures = sum(pool.map(lambda part: part.ask("go"), parts))
            samples[f"{name} s"] = [time.perf_counter() - began]
            samples[f"{name} failures"] = [failures]
            count = sum(request.path == "/drivers/call" for request in fake.requests)
            samples[f"{name} requests"] = [count]
            for part in parts:
                part.end()
    return samples


class Bench(NamedTuple):
    """One line: a measurement, which of its samples are compared, and the target.

    The target is of the ratio (x) of ours to the floor, of how much `more` ours is, or of ours.
    """

    name: str
    measure: Callable[[Lab], Samples]
    ours: str
    floor: str
    target: str


BENCHES = (
    Bench("import puter, ms / requests", starts, "puter", "requests", "x <= 0.6"),
    Bench("puter status, ms / requests", starts, "status", "requests", "x <= 0.75"),
    Bench("a stream, lines/s / bare", reading, "ours", "bare", "x >= 0.85"),
    Bench("a stream, lines/s / openai", reading, "ours", "sdk", "x >= 15"),
    Bench("a long stream, MB / short", lengths, "long", "short", "more <= 5"),
    Bench("first chunk, ms / bare", reading, "our first", "bare first", "more <= 1"),
    Bench("gateway, 1 client, calls/s / bare", rates, "1", "bare 1", "x >= 0.7"),
    Bench("gateway, 8 clients, calls/s / bare", rates, "8", "bare 8", "x >= 0.7"),
    Bench("gateway, 32 clients, calls/s / bare", rates, "32", "bare 32", "x >= 0.7"),
    Bench("gateway, 200 streams, peak MB", peaks, "ours", "", "ours <= 80"),
    Bench("a limited account, s / sleeping 1 s", crowds, "ours s", "bare s", "x <= 1.1"),
    Bench("... requests / sleeping 1 s", crowds, "ours requests", "bare requests", "x <= 0.5"),
    Bench("... calls that failed", crowds, "ours failures", "", "ours <= 0"),
)


def verdict(bench: Bench, samples: Samples) -> tuple[bool, str]:
    """Whether a line reaches its target, and its text; ours and the floor go turn by turn."""
    ours, floor = samples[bench.ours], samples.get(bench.floor, [])
    pairs = list(zip(ours, floor, strict=bool(floor)))
    what, sign, limit = bench.target.split()
    compared = {
        "x": [mine / bare for mine, bare in pairs],
        "more": [mine - bare for mine, bare in pairs],
        "ours": ours,
    }[what]
    value = statistics.median(compared)
    ok = value >= float(limit) if sign == ">=" else value <= float(limit)
    medians = [f"{statistics.median(side):,.1f}" if side else "-" for side in (ours, floor)]
    reached = f"{what} {value:.2f} {sign} {limit}"
    span = f"({min(compared):.2f}..{max(compared):.2f})"
    cells = f"{medians[0]:>12}{medians[1]:>12}  {reached:<20}{span:<18}"
    return ok, f"{bench.name:<37}{cells}{'ok' if ok else 'SHORT'}"


def cmd_bench(args: argparse.Namespace) -> int:
    """Measures puter.py beside bare Python; 1 when a line falls short of its target."""
    where = f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs"
    print(f"{where}, load {os.getloadavg()[0]:.2f}; ours, floor (medians), target", flush=True)
    short = 0
    with ExitStack() as stack:
        lab = Lab(Path(stack.enter_context(TemporaryDirectory())), args.quick, stack)
        measured = functools.cache(lambda measure: measure(lab))
        for bench in BENCHES:
            ok, line = verdict(bench, measured(bench.measure))
            print(line, flush=True)
            short += not ok
    return 1 if short else 0


# =============================================================================
# The soak: one client, many threads, everything that can go wrong
# =============================================================================
SOAK_FAULTS = (
    *("internal", "err429", "err500", "denied", "oldfail", "html", "notjson"),
    *("badjson", "closed", "halfline", "nousageline", "error", "drop", "limited"),
)


def soak_scenario(handler: FakeHandler, args: dict[str, Any]) -> Answer:
    """Says the question back; one time in five something goes wrong."""
    handler.fake.requests.clear()  # their memory would be taken for the client's
    fault = random.choice(SOAK_FAULTS) if random.random() < 0.2 else "echo"
    if fault == "drop":
        handler.drop()
        return None
    if fault == "limited":
        raise Refusal(429, "too_many_requests", "Slow down")
    turn = echo_scenario(handler, args)
    assert isinstance(turn, Turn)
    if fault == "error":
        return replace(turn, error="lost", error_after=2)
    return replace(turn, fault=fault) if fault in FAULTS else fault


class Soak:
    """One run: what was asked, what came of it, and whatever is not as it should be."""

    def __init__(self, client: puter.Puter, seconds: float) -> None:
        self.client = client
        self.until = time.monotonic() + seconds
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def work(self, number: int) -> None:
        """Asks until the time is over, in every way in turn."""
        ways = itertools.cycle((self.client.chat, self.stream, self.leave, self.talk))
        for turn, way in enumerate(ways):
            if time.monotonic() > self.until or self.wrong:
                return
            words = f"thread {number} turn {turn} é"
            try:
                text = way(words, model="openrouter:lab/echo")
                self.outcomes["answered"] += 1
                if str(text) != words:
                    self.wrong.append(f"{words!r} got {text!r}")
            except puter.PuterError as error:
                self.outcomes[type(error).__name__] += 1
                if error.reply and not words.startswith(error.reply.text):
                    self.wrong.append(f"{words!r} got a part of {error.reply.text!r}")
            except Exception:  # noqa: BLE001 (reported at the end: the run has failed)
                self.wrong.append(traceback.format_exc())

    def stream(self, words: str, model: str) -> str:
        """The text, read as a stream."""
        with self.client.stream(words, model=model) as stream:
            text = "".join(map(str, stream))
        assert stream.reply.text == text
        return text

    def leave(self, words: str, model: str) -> str:
        """A stream that is left after its first words."""
        with self.client.stream(words, model=model) as stream:
            assert words.startswith(str(next(stream)))
        return words

    def talk(self, words: str, model: str) -> puter.Reply:
        """The reply to the second turn of a conversation."""
        talk = self.client.conversation(model=model)
        talk.say("first")
        return talk.say(words)


def soak(folder: Path, threads: int, seconds: float) -> Soak:
    """Many threads share one client with three accounts; the server fails at random."""
    with FakePuter() as fake:
        store = puter.AccountStore(folder)
        for name in ("alice", "bob", "carol"):
            store.add(puter.Account(name, fake.add_account(name).token))
        fake.script = {m["id"]: soak_scenario for m in fake.catalogue}
        names = ("retry_delay_ms", "fallback_cooldown_ms", "account_rotation_cooldown_ms")
        options = dict.fromkeys(names, 5)
        config = puter.Config.load(folder, {}, api_base_url=fake.url, max_concurrent=8, **options)
        with puter.Puter(config=config) as client:
            run = Soak(client, seconds)
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(run.work, range(threads)))
            taken = sum(running_on(client, name) for name in client._limits)
            if taken:
                run.wrong.append(f"{taken} places of the gates are still taken")
        gc.collect()  # the errors that were met hold connections
        if not eventually(lambda: not fake._server or not fake._server.connections):
            run.wrong.append(f"{len(fake._server.connections)} sockets are open")
        if not eventually(lambda: fake.open_streams == 0):
            run.wrong.append(f"{fake.open_streams} streams are open")
        alive = [t.name for t in threading.enumerate() if "ThreadPool" in t.name]
        if alive:
            run.wrong.append(f"threads are left: {alive}")
    return run


def cmd_soak(args: argparse.Namespace) -> int:
    """Runs the soak, and tells what came of every question."""
    with TemporaryDirectory() as folder:
        before_mb = peak_mb()
        run = soak(Path(folder), args.threads, args.seconds)
    for outcome, count in run.outcomes.most_common():
        print(f"{count:8,} {outcome}")
    print(f"{peak_mb() - before_mb:8.1f} MB more than at the beginning")
    print(f"{len(run.wrong):8} wrong", *run.wrong[:10], sep="\n")
    return 1 if run.wrong else 0


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
    parser = argparse.ArgumentParser(description="What this file does besides testing.")
    commands = parser.add_subparsers(required=True, metavar="command")
    serve = commands.add_parser("serve", help="run the scripted server in the foreground")
    serve.add_argument("--port", type=int, default=0, help="the port (default: any free one)")
    serve.set_defaults(run=cmd_serve)
    demo = commands.add_parser("demo", help="show the command line against the scripted server")
    demo.set_defaults(run=cmd_demo)
    bench = commands.add_parser("bench", help="measure; ratios against floors")
    bench.add_argument("--quick", action="store_true", help="fewer rounds")
    bench.set_defaults(run=cmd_bench)
    text = "many threads on one client, with faults; replies must match"
    soaked = commands.add_parser("soak", help=text)
    soaked.add_argument("--threads", type=int, default=32, help="(%(default)s)")
    soaked.add_argument("--seconds", type=float, default=60.0, help="(%(default)s)")
    soaked.set_defaults(run=cmd_soak)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand."""
    args = build_parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())


# What follows is for pytest, and alone needs the packages of the extra `test`.
import anthropic
import anyio
import jsonschema
import mcp
import openai
import pytest
from anthropic.types import Message as ClaudeMessage
from anthropic.types import RawMessageStreamEvent
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mcp.client.stdio import stdio_client
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

# =============================================================================
# Tests of FakePuter itself
# =============================================================================
# Recordings of a real server, where they lie beside the repository.
WIRE = Path(__file__).resolve().parent.parent / "shared" / "wire"
CHAT = "/drivers/call"
OPENAI_CHAT = "/puterai/openai/v1/chat/completions"

# What nothing here asks for.
UNUSED = ("/auth/create-access-token", "/auth/get-user-app-token", "/batch", "/delete")
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


def recordings(name: str) -> Any:
    """What a recorded file holds; an empty list, which skips its tests, where there is none."""
    path = WIRE / name
    return json.loads(path.read_text("utf-8")) if path.is_file() else []


def recorded_exchanges() -> list[Any]:
    """The recorded exchanges as test parameters."""
    exchanges = recordings("exchanges.json")
    return [pytest.param(e, id=e["name"]) for e in exchanges if e["request"]["path"] not in UNUSED]


def recorded_calls() -> list[Any]:
    """The exchanges that were recorded at both ends, Puter's and its provider's."""
    calls = recordings("providers.json")
    return [pytest.param(call, id=f"{call['provider']}: {call['name']}") for call in calls]


# What the recorded hosts took, since they take anything, and the providers' own do not.
SHAPES_OF_ANTHROPIC = (
    "arrives: thinking blocks in the history",
    "arrives: image by Anthropic's source",
    "arrives: tool result as Anthropic's block with an image",
    "arrives: an inline PDF as Anthropic's document",
)
REFUSED = {
    "exchanges": ("complete: file part",),
    "claude": (
        "arrives: reasoning in the history",
        "arrives: image in a user message",
        "arrives: an inline PDF in OpenAI's shape",
        "arrives: an empty text part and a blank message",
    ),
    "openai-completion": (*SHAPES_OF_ANTHROPIC, "arrives: cache_control on parts and on a message"),
    "openai-responses": (
        *SHAPES_OF_ANTHROPIC,
        "arrives: cache_control on parts and on a message",
        "arrives: reasoning in the history",
        "arrives: image in a user message",
        "arrives: an inline PDF in OpenAI's shape",
        "arrives: two calls in one message",
        "arrives: text beside two OpenAI calls",
    ),
    "openrouter": (
        *SHAPES_OF_ANTHROPIC,
        "arrives: a stored PDF (puter_path)",
        "arrives: a stored text file (puter_path)",
    ),
}
ONE_PDF = "JVBERi0xLjQ="
PICTURES: dict[str, dict[str, Any]] = {
    "claude": {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": ONE_PIXEL},
    },
    "chat": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{ONE_PIXEL}"}},
    "responses": {"type": "input_image", "image_url": f"data:image/png;base64,{ONE_PIXEL}"},
}
PDFS: dict[str, dict[str, Any]] = {
    "claude": {
        "type": "document",
        "source": {"type": "base64", "media_type": "application/pdf", "data": ONE_PDF},
    },
    "chat": {
        "type": "file",
        "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{ONE_PDF}"},
    },
    "responses": {
        "type": "input_file",
        "filename": "a.pdf",
        "file_data": f"data:application/pdf;base64,{ONE_PDF}",
    },
}
ASKED = {"role": "user", "content": "w?"}
SIGNED = {"type": "thinking", "thinking": "T", "signature": "s"}
EFFORT = {"reasoning_effort": "high", "max_tokens": 4000}


def asks(*parts: Any) -> dict[str, Any]:
    """A message of the user's with these parts."""
    return {"role": "user", "content": list(parts)}


def calls_for(*names: str, before: Sequence[Any] = (), **more: Any) -> dict[str, Any]:
    """A message with calls, as parts."""
    calls = [{"type": "tool_use", "id": name, "name": "f", "input": {}} for name in names]
    return {"role": "assistant", "content": [*before, *calls], **more}


def result_part(name: str, content: Any = "sunny") -> dict[str, Any]:
    """A call's result as Anthropic's part."""
    return {"type": "tool_result", "tool_use_id": name, "content": content}


def tool_says(name: str, content: Any = "sunny") -> dict[str, Any]:
    """A call's result as OpenAI's message."""
    return {"role": "tool", "tool_call_id": name, "content": content}


CODEX, GPT, CLAUDE = "gpt-5.3-codex", "gpt-4o", "claude-haiku-4-5"
FAMILIES = {"claude": CLAUDE, "chat": GPT, "responses": CODEX}
TOO_MANY_MARKS = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}] * 5
WHAT_VENDORS_REFUSE: list[tuple[str, list[Any], dict[str, Any], str]] = [
    *(
        (model, [asks(parts[form])], {}, "does not match any of the expected tags")
        for parts in (PICTURES, PDFS)
        for form in parts
        for family, model in FAMILIES.items()
        if form != family
    ),
    (CLAUDE, [asks({"type": "image", "source": "x"})], {}, "image.source: Input tag"),
    (CLAUDE, [{**ASKED, "name": "al"}], {}, "messages.0.name: Extra inputs"),
    (CLAUDE, [asks({"type": "text", "text": " "})], {}, "must be non-empty"),
    (CLAUDE, [asks(*TOO_MANY_MARKS)], {}, "Found 5."),
    (
        CLAUDE,
        [ASKED, calls_for("t", before=[{**SIGNED, "cache_control": {}}])],
        {},
        "thinking.cache_control",
    ),
    (CLAUDE, [ASKED, calls_for("t"), tool_says("t")], EFFORT, "Expected `thinking` or"),
    (
        CLAUDE,
        [ASKED, calls_for("t"), ASKED],
        {},
        "without `tool_result` blocks immediately after: t",
    ),
    (
        CLAUDE,
        [ASKED, calls_for("t"), asks({"type": "text", "text": "a"}, result_part("t"))],
        {},
        "without",
    ),
    (CLAUDE, [ASKED, tool_says("t")], {}, "unexpected `tool_use_id`"),
    (
        CLAUDE,
        [ASKED, calls_for("t"), asks(result_part("t", [PICTURES["chat"]]))],
        {},
        "'image_url'",
    ),
    (GPT, [asks({"type": "file", "file": {"file_id": "f"}})], {}, "Invalid file"),
    (GPT, [asks({"type": "image_url", "image_url": "data:"})], {}, "Invalid image_url"),
    (GPT, [asks(TOO_MANY_MARKS[0])], {}, "cache_control"),
    (GPT, [ASKED, calls_for("t"), ASKED], {}, "No tool output found for function call t."),
    (GPT, [ASKED, tool_says("t")], {}, "No tool call found"),
    (GPT, [ASKED, calls_for("t"), asks(result_part("t", [PICTURES["chat"]]))], {}, "'image_url'"),
    ("gemini-2.5-flash", [asks(PDFS["chat"])], {}, "Invalid file"),
    ("lab/text", [asks({"type": "file", "puter_path": "/a"})], {}, "file.file: Field required"),
    (CODEX, [ASKED, calls_for("t", "u"), tool_says("t"), tool_says("u")], {}, "call_id t."),
    (CODEX, [ASKED, calls_for("t", reasoning="R"), tool_says("t")], {}, "reasoning: Extra inputs"),
    (CODEX, [ASKED, calls_for("t")], {}, "No tool output found for function call t."),
    (CODEX, [ASKED, calls_for("t"), asks(result_part("t", [PICTURES["chat"]]))], {}, "'image_url'"),
]
WHAT_VENDORS_TAKE: list[tuple[str, list[Any], dict[str, Any]]] = [
    *(
        (FAMILIES[form], [asks(parts[form], {"type": "text", "text": "What is it?"})], {})
        for parts in (PICTURES, PDFS)
        for form in parts
    ),
    ("lab/text", [asks(TOO_MANY_MARKS[0], PDFS["chat"])], {}),
    ("lab/text", [ASKED, calls_for("t", reasoning="R"), tool_says("t")], {}),
    (CLAUDE, [ASKED, calls_for("t", "u"), tool_says("t"), tool_says("u"), ASKED], {}),
    (CLAUDE, [ASKED, calls_for("t", before=[SIGNED]), tool_says("t")], EFFORT),
    (CLAUDE, [ASKED, calls_for("t"), asks(result_part("t", [PICTURES["claude"]]))], {}),
    (CLAUDE, [asks({"type": "file", "puter_path": "/alice/a.pdf"})], {}),
    (GPT, [ASKED, calls_for("t", "u"), tool_says("u"), tool_says("t")], {}),
    (GPT, [ASKED], {"tools": [{"type": "web_search"}]}),
    (CODEX, [ASKED, calls_for("t"), asks(result_part("t", [PICTURES["responses"]]))], {}),
    (CODEX, [ASKED, calls_for("t"), tool_says("t"), calls_for("u"), tool_says("u")], {}),
]
SHORTENED = re.compile(r"(?s)(word )+(word)? ?…\[(\d+) characters\]")


def rebuilt(value: Any) -> Any:
    """A recorded value with its long texts, and without what no two servers have in common."""
    text = compact(value).replace("toolu_0", "call_")
    tail = "Reply with exactly this and nothing else: OK"
    text = SHORTENED.sub(lambda found: "word " * (int(found[3]) // 5 - 8) + tail, text)
    return json.loads(text, object_hook=lambda found: {k: found[k] for k in found if k != "bytes"})


def as_sent(request: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded request for `requests`, with its placeholders filled in."""
    text = json.dumps(request.get("body")).replace("<username>", "admin")
    text = text.replace('"<30 MB of text>"', '[{"role": "user", "content": "long"}]')
    headers = {"Authorization": "Bearer t"} if request["auth"] else None
    return {"json": json.loads(text), "headers": headers}


def shape(value: Any) -> Any:
    """The keys of a JSON value at every depth; of a list, those of its first element."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items() if key != "models"}
    return [shape(inner) for inner in value[:1]] if isinstance(value, list) else None


def without_ids(text: str) -> str:
    """A reply of the OpenAI endpoint without what differs from one call to the next."""
    return re.sub(r'"id": ?"chatcmpl-\w+"|"created": ?\d+', "", text)


def chat_body(scenario: str = "text", content: Any = "hi", **args: Any) -> dict[str, Any]:
    """The body of a driver call to a lab model."""
    model = {"model": f"openrouter:lab/{scenario}"}
    args = {"messages": [{"role": "user", "content": content}], **model, **args}
    method = {"interface": "puter-chat-completion", "driver": "ai-chat", "method": "complete"}
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
    return requests.post(fake.url + path, json=body, headers=headers, stream=stream, timeout=10)


@pytest.fixture
def fake() -> Iterator[FakePuter]:
    """A FakePuter of the test's own."""
    with FakePuter() as server:
        yield server


@pytest.fixture(autouse=True, scope="session")
def freeze_modules() -> None:
    """What was imported stays: no `gc.collect()` need look through it."""
    gc.freeze()


TOKENS = re.compile(r"token-(alice|bob|carol|dave|temp_bob|given)\b|Bearer (?!<token>)[!-~]{8}")


def begin_log() -> None:
    """No command of before shows its log any more."""
    puter._log.handlers[:] = [h for h in puter._log.handlers if isinstance(h, logging.NullHandler)]
    puter._log.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def no_token_gets_out(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """In every test: no token in a log, a new error, what is printed, a header, or the state."""
    leaks: list[str] = []
    begin_log()

    def look(where: str, *told: Any) -> None:
        texts = [t.decode("utf-8", "replace") if isinstance(t, bytes) else str(t) for t in told]
        leaks.extend(f"{where}: {text[:2_000]}" for text in texts if TOKENS.search(text))

    def watch(owner: Any, name: str, seen: Callable[..., None]) -> None:
        """Lets `seen` have the result of a method, and what it was called with."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            seen(result, *args)
            return result

        monkeypatch.setattr(owner, name, watched)

    def said(method: Callable[..., None], message: str, *args: Any, **more: Any) -> None:
        look("log", message % args if args else message)
        if more.get("exc_info"):
            look("traceback", traceback.format_exc())
        method(message, *args, **more)

    def header(_: Any, handler: Any, name: str, value: str) -> None:
        if not isinstance(handler, FakeHandler):
            look(f"header {name}", value)

    def made(_: Any, error: puter.PuterError, *args: Any) -> None:
        look(type(error).__name__, str(error), repr(error), vars(error))

    for level in ("debug", "info", "warning", "error"):
        method = getattr(puter._log, level)
        monkeypatch.setattr(puter._log, level, functools.partial(said, method))
    watch(puter.PuterError, "__init__", made)
    watch(BaseHTTPRequestHandler, "send_header", header)
    watch(builtins, "print", lambda _, *printed: look("print", *printed))
    watch(subprocess.Popen, "communicate", lambda told, *_: look("output", *told))
    watch(Terminal, "close", lambda _, terminal: look("terminal", terminal.shown))
    watch(McpProcess, "end", lambda told, *_: look("stderr of MCP", told[1]))
    for name in ("run_here", "launched"):
        watch(sys.modules[__name__], name, lambda told, *_: look("output", *told))
    # Only a power cut could tell the difference, and a disk is slow.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    yield
    folder: Path | None = request.node.funcargs.get("tmp_path")
    for path in folder.rglob("*.sqlite3*") if folder else ():
        if path.is_file():
            look(str(path), path.read_bytes())
    assert not leaks, "\n".join(leaks)


class TestFakePuter:
    """The scripted server answers as the real one was recorded, and its machinery works."""

    @pytest.mark.parametrize("exchange", recorded_exchanges())
    def test_answers_as_recorded(self, fake, exchange):
        fake.add_account("admin", "t", **SET_UPS.get(exchange["name"], {}))
        request, recorded = exchange["request"], exchange["response"]
        url = fake.url + request["path"]
        got = requests.request(request["method"], url, timeout=10, **as_sent(request))
        if exchange["name"] in REFUSED["exchanges"]:
            assert got.json()["code"] == "upstream_bad_request"
            return
        assert got.status_code == recorded["status"]
        assert got.headers["Content-Type"] == recorded["content_type"]
        is_fake_model = "built-in fake" in exchange["name"]
        if "json" in recorded:
            assert shape(got.json()) == shape(recorded["json"])
            if request["path"] in (CHAT, OPENAI_CHAT) and not is_fake_model:
                assert without_ids(compact(got.json())) == without_ids(compact(recorded["json"]))
        elif "lines" in recorded:
            lines, wanted = got.content.decode().split("\n"), recorded["lines"]
            assert lines.pop() == ""
            kinds = [[json.loads(one)["type"] for one in group] for group in (lines, wanted)]
            assert kinds[0] == kinds[1]
            assert is_fake_model or lines == wanted
        else:
            assert without_ids(got.content.decode()) == without_ids(recorded["text"])

    @pytest.mark.parametrize("call", recorded_calls())
    def test_sends_on_as_recorded(self, fake, call):
        fake.add_account("admin", "t", credit_microcents=10**12)
        args, recorded = rebuilt(call["args"]), call["response"]
        fake.script[args["model"]] = "brain"
        got = post(fake, CHAT, chat_body(**args), "t")
        # The vendors' SDKs ask again after some errors.
        sent = [body for body, _ in itertools.groupby(rebuilt(call["sent_to_provider"]))]
        assert fake.sent == sent
        if call["name"] in REFUSED.get(call["provider"], ()):
            assert got.json()["code"] == "upstream_bad_request"
            return
        assert got.status_code == recorded["status"]
        assert got.headers["Content-Type"] == recorded["content_type"]
        if "json" in recorded:
            assert got.json() == rebuilt(recorded["json"])
        else:
            wanted = [rebuilt(json.loads(line)) for line in recorded["lines"]]
            assert [json.loads(line) for line in got.text.splitlines()] == wanted

    def test_the_recorded_models_are_in_the_catalogue(self, fake):
        models = recorded_answer("model details")
        for model in models["json"]["models"]:
            assert model in fake.catalogue

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("scenario", sorted(SCENARIOS.keys() - {"hang", "fake"}))
    def test_every_scenario_answers(self, fake, scenario, stream):
        try:
            reply = post(fake, CHAT, chat_body(scenario, stream=stream))
        except requests.exceptions.ChunkedEncodingError:
            assert scenario == "closed"
        else:
            assert scenario != "closed"
            assert reply.headers["Content-Type"]
        assert eventually(lambda: fake.accounts["token-alice"].running == 0)

    @pytest.mark.parametrize("name", ["claude-opus-4.5", "groq:allam-2-7b", "lab/text", "text"])
    def test_models_have_several_names(self, fake, name):
        assert post(fake, CHAT, chat_body(model=name)).ok
        assert post(fake, CHAT, chat_body(model=f"puter/{name}")).json()["code"] == "bad_request"

    def test_lists_are_used_up_and_the_last_entry_stays(self, fake):
        fake.script["lab/text"] = ["err429", "internal", "echo"]
        statuses = [post(fake, CHAT, chat_body()).status_code for _ in range(5)]
        assert statuses == [429, 500, 200, 200, 200]
        fake.script["openrouter:lab/flaky"] = "flaky"
        statuses = [post(fake, CHAT, chat_body("flaky")).status_code for _ in range(3)]
        assert statuses == [500, 200, 200]

    def test_limits(self, fake):
        fake.add_account("carol", max_in_window=2, window_s=0.3)
        codes = [post(fake, CHAT, chat_body(), "token-carol").status_code for _ in range(3)]
        assert codes == [200, 200, 429]
        assert eventually(lambda: post(fake, CHAT, chat_body(), "token-carol").ok)
        fake.add_account("dave", max_concurrent=1)
        with post(fake, CHAT, chat_body("slow", stream=True), "token-dave", stream=True):
            refused = post(fake, CHAT, chat_body(), "token-dave")
            assert refused.json()["message"] == "Too many concurrent requests."
        assert eventually(lambda: fake.accounts["token-dave"].running == 0)
        assert all(post(fake, CHAT, chat_body(), "token-dave").ok for _ in range(20))

    def test_no_model_answers_without_credit(self, fake):
        for model in ("openrouter:lab/text", "qwen/qwen3-coder:free"):
            assert post(fake, CHAT, chat_body(model=model)).ok
        fake.accounts["token-alice"].credit_microcents = 0
        for model in ("openrouter:lab/text", "qwen/qwen3-coder:free"):
            assert post(fake, CHAT, chat_body(model=model)).json()["code"] == "insufficient_funds"

    @pytest.mark.parametrize(("model", "history", "args", "words"), WHAT_VENDORS_REFUSE)
    def test_vendors_refuse_what_is_not_theirs(self, fake, model, history, args, words):
        told = post(fake, CHAT, chat_body(messages=history, model=model, **args))
        assert (told.status_code, told.json()["code"]) == (400, "upstream_bad_request")
        assert words in told.json()["message"] == told.json()["attempts"][0]["error"]
        assert len(fake.sent) == 1
        streamed = post(fake, CHAT, chat_body(messages=history, model=model, stream=True, **args))
        if "claude" in model:
            assert streamed.json() == {"type": "error", "message": told.json()["message"]}
        else:
            assert streamed.json() == told.json()

    @pytest.mark.parametrize(("model", "history", "args"), WHAT_VENDORS_TAKE)
    def test_vendors_take_what_is_theirs(self, fake, model, history, args):
        told = post(fake, CHAT, chat_body(messages=history, model=model, **args))
        assert told.ok, told.text
        assert fake.requests[-1].sent == fake.sent

    @pytest.mark.parametrize(
        ("model", "words", "asked", "limit"),
        [
            ("gpt-4o", 12_682, None, 3),
            ("gpt-4o", 12_683, None, 2),
            ("gpt-4o", 12_684, None, None),
            ("gpt-4o", 1_000, 20_000, 15_092),
            ("gpt-4o", 1_000, 100, 100),
            ("qwen/qwen3-coder:free", 70_000, 100, 100),
        ],
    )
    def test_the_gate(self, fake, model, words, asked, limit):
        fake.accounts["token-alice"].credit_microcents = 10**9
        body = chat_body(content="word " * words, model=model, max_tokens=asked)
        answer = post(fake, CHAT, body)
        if limit is None:
            assert (answer.status_code, fake.sent) == (402, [])
        else:
            assert {"max_tokens", "max_completion_tokens"} & fake.sent[0].keys()
            assert limit in (
                fake.sent[0].get(key) for key in ("max_tokens", "max_completion_tokens")
            )

    @pytest.mark.parametrize(
        ("part", "tokens"),
        [
            (PICTURES["chat"], 1),
            (
                {
                    "type": "image_url",
                    "image_url": {"url": f"data:image/png;base64,{'A' * 40_000}"},
                },
                200,
            ),
            ({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}, 1_500),
            (PICTURES["claude"], 1_500),
            ({"type": "document", "source": {"type": "base64", "data": "A" * 400_000}}, 2_000),
            (
                {"type": "input_file", "filename": "a.pdf", "file_data": "data:," + "A" * 400_000},
                1_500,
            ),
            ({"type": "file", "puter_path": "/alice/a.pdf"}, 1_500),
            ({"type": "thinking", "thinking": "word " * 10, "signature": "s"}, 13),
            ({"type": "tool_use", "id": "t1", "name": "f", "input": {"city": "Oslo"}}, 2),
        ],
    )
    def test_what_a_part_counts(self, part, tokens):
        assert part_tokens(part) == tokens

    def test_what_runs_holds_its_price(self, fake):
        fake.add_account("carol", reserves=True, credit_microcents=4_000_000)
        body = chat_body("slow", stream=True)
        with post(fake, CHAT, body, "token-carol", stream=True):
            limits = [fake.sent[0]["max_tokens"]]
            assert post(fake, CHAT, chat_body(), "token-carol").ok
            limits.append(fake.sent[1]["max_tokens"])
            fake.accounts["token-carol"].credit_microcents = 3_276_800
            assert post(fake, CHAT, chat_body(), "token-carol").status_code == 402
        assert limits == [16_384, 3_616]
        assert eventually(lambda: fake.accounts["token-carol"].held_microcents == 0)

    @pytest.mark.parametrize("scenario", ["slow", "hang"])
    def test_a_client_that_leaves_ends_the_stream_quietly(self, fake, scenario, capfd):
        reply = post(fake, CHAT, chat_body(scenario, stream=True), stream=True)
        assert fake.open_streams == 1
        reply.close()
        assert eventually(lambda: fake.open_streams == 0, timeout_s=0.5)
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize("path", [CHAT, OPENAI_CHAT])
    def test_a_closed_stream_has_no_end(self, fake, path):
        body = chat_body("closed", stream=True)
        reply = post(fake, path, body if path == CHAT else body["args"], stream=True)
        received = b""
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            for data in reply.iter_content(None):
                received += data
        assert received.endswith(b"\n") and received.count(b"{") and b"usage" not in received

    def test_the_sign_in_page_keeps_the_query_of_its_redirect(self, fake):
        back = f"{fake.url}/callback?nonce=a%26b"
        page_url = f"{fake.url}/?{urlencode({'action': 'authme', 'redirectURL': back})}"
        page = requests.get(page_url, timeout=10)
        assert page.headers["Content-Type"] == HTML_TYPE
        assert html.escape(f"{back}&token=token-bob") in page.text
        assert [fake.approve(url)[0] for url in (back, page_url)] == [404, 404]
        assert [one.path for one in fake.requests[-2:]] == ["/callback", "/callback"]
        assert post(fake, "/login", {}).status_code == 403


# =============================================================================
# Helpers
# =============================================================================
ALL_ERRORS = sorted(
    (
        kind
        for kind in vars(puter).values()
        if isinstance(kind, type)
        and issubclass(kind, puter.PuterError)
        and not kind.__name__.startswith("_")
    ),
    key=lambda kind: kind.__name__,
)


def table(*rows: Any) -> list[Any]:
    """Rows whose first value is their name; `pytest.param`s stay as they are."""
    return [row if not isinstance(row, list) else pytest.param(*row[1:], id=row[0]) for row in rows]


def recorded(name: str) -> Any:
    """One recorded file, or a skipped test."""
    return recordings(name) or pytest.skip("there are no recordings beside the repository")


def recorded_answer(name: str) -> JSON:
    """The response of the recorded exchange of this name."""
    found = next(e for e in recorded("exchanges.json") if e["name"] == name)
    answer: JSON = found["response"]
    return answer


def attempt(model: str, account: str, error: puter.PuterError | None = None) -> puter.Attempt:
    return puter.Attempt(model, account, error, 0.1)


def write_settings(folder: Path, text: str | bytes) -> Path:
    """puter.json in the folder, byte for byte."""
    path = folder / "puter.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def load(folder: Path, env: Mapping[str, str] | None = None, **given: Any) -> Any:
    """The settings of a folder, and of no environment but the one given."""
    return puter.Config.load(folder, env or {}, **given)


def config_fault(folder: Path, env: Mapping[str, str] | None = None, **given: Any) -> str:
    """The text of the `ConfigError` that these settings raise."""
    with pytest.raises(puter.ConfigError) as caught:
        load(folder, env, **given)
    return str(caught.value)


def user(content: Any, **more: Any) -> JSON:
    return {"role": "user", "content": content, **more}


def assistant(content: Any = None, *calls: JSON, **more: Any) -> JSON:
    said = {"role": "assistant", "content": content, **more}
    return {**said, "tool_calls": list(calls)} if calls else said


called = tool_call


def used(call_id: str, name: str = "f", given: Any = None, **more: Any) -> JSON:
    """A call as a `tool_use` part."""
    part = {"type": "tool_use", "id": call_id, "name": name}
    return {**part, "input": {} if given is None else given, **more}


def result(call_id: str, content: Any = "done", **more: Any) -> JSON:
    return {"role": "tool", "tool_call_id": call_id, "content": content, **more}


def text_part(text: Any) -> JSON:
    return {"type": "text", "text": text}


def as_it_arrives(messages: Sequence[JSON]) -> list[tuple[Any, ...]]:
    """What a model gets to see of wire messages, by what was recorded of the server.

    Several `tool_use` parts arrive in reverse and without the text beside them; calls beside
    a blank text arrive in reverse and with their arguments encoded twice.
    """
    seen: list[tuple[Any, ...]] = []
    for message in messages:
        content, role = message["content"], message["role"]
        if role == "tool":
            seen.append(("result", message["tool_call_id"], content))
            continue
        parts = content if isinstance(content, list) else [text_part(content)]
        calls = [p for p in parts if p["type"] == "tool_use"]
        if not calls:
            seen += [(role, p["text"]) for p in parts if p["text"]]
        seen += [
            ("call", c["id"], c["name"], c["input"], c.get("extra_content"))
            for c in reversed(calls)
        ]
        open_calls = message.get("tool_calls") or []
        if open_calls and not (isinstance(content, str) and content.strip()):
            open_calls = [
                {**c, "function": {**c["function"], "arguments": None}}
                for c in reversed(open_calls)
            ]
        for call in open_calls:
            arguments = json.loads(call["function"]["arguments"] or "null")
            name, extra = call["function"]["name"], call.get("extra_content")
            seen.append(("call", call["id"], name, arguments, extra))
    return seen


def with_texts_joined(seen: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The same with texts of the assistant that follow one another as one."""
    joined_up: list[tuple[Any, ...]] = []
    for one in seen:
        if one[0] == "assistant" and joined_up and joined_up[-1][0] == "assistant":
            joined_up[-1] = ("assistant", f"{joined_up[-1][1]}\n\n{one[1]}")
        else:
            joined_up.append(one)
    return joined_up


def sent_as(form: str, messages: Any) -> Any:
    """A history in the form of a kind of provider, checked before."""
    return puter.messages_for(form, puter.messages_from(messages))


def used_once(call_id: str) -> JSON:
    """A message of one call, as it is sent."""
    return assistant([used(call_id)])


UNANSWERED = result("1", "(this call was not answered)")
THOUGHT_SIGNATURE = {"google": {"thought_signature": "abc"}}
# A model of each form whose vendor says what is wrong.
MODEL_OF = {"claude": CLAUDE, "responses": CODEX, "chat": GPT, "openrouter": "openrouter:lab/text"}
BY_NAME = {name: m for m in default_catalogue() for name in (m["id"], *m.get("aliases", ()))}


def vendor_fault(form: str, messages: Sequence[JSON]) -> str:
    """What the vendor has against messages that are sent so; nothing, when all is well."""
    asked = BY_NAME[MODEL_OF[form]]
    vendor = FORMS[form_of(asked, {})]
    (body,) = vendor.sent(asked, {"messages": normalised(messages), "tools": []})
    return vendor.fault(asked, body)


# What the recorder asked, and this module never does: a list as a tool's text, and OpenAI's calls
# beside a text.
SHAPES_WE_NEVER_SEND = (
    "arrives: tool result with an image part",
    "arrives: text beside two OpenAI calls",
)
MARKED = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
WEB_PICTURES = {
    "claude": {"type": "image", "source": {"type": "url", "url": "https://x.org/a.png"}},
    "chat": {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}},
    "responses": {"type": "input_image", "image_url": "https://x.org/a.png"},
}
TITLED_PDFS = {**PDFS, "claude": {**PDFS["claude"], "title": "a.pdf"}}
A_PICTURE, A_PDF = PICTURES["chat"], PDFS["chat"]
SEEN = [user("a"), assistant(None, called("1")), result("1", [text_part("b"), A_PICTURE])]
SEEN_BY_CHAT = [user("a"), used_once("1"), result("1", "b"), user([A_PICTURE])]


def claude_result_of(call_id: str, content: Any, **more: Any) -> JSON:
    return user([{**result_part(call_id, content), **more}])


# What each form makes of messages; where one is not named, it is the row's "chat".
BY_FORM: list[tuple[str, list[JSON], dict[str, Any]]] = [
    *(
        (f"{what} of {vendor}", [user([part, text_part("Hi")])], {
            form: [user([own, text_part("Hi")])] for form, own in written.items()
        })
        for what, read, written in (
            ("picture", PICTURES, PICTURES),
            ("picture's URL", WEB_PICTURES, WEB_PICTURES),
            ("PDF", TITLED_PDFS, TITLED_PDFS),
        )
        for vendor, part in read.items()
    ),
    ("stored PDF", [user([{"type": "file", "puter_path": "/a.pdf"}])], {
        "chat": [user([{"type": "file", "puter_path": "/a.pdf"}])],
        "responses": None,
    }),
    ("picture's detail", [user([{**PICTURES["responses"], "detail": "low"}])], {
        "claude": [user([PICTURES["claude"]])],
        "responses": [user([{**PICTURES["responses"], "detail": "low"}])],
        "chat": [user([{"type": "image_url", "image_url": {**A_PICTURE["image_url"], "detail": "low"}}])],
    }),
    ("document that is text", [user([{"type": "document", "title": "t", "source": {"type": "text", "data": "d"}}])], {
        "chat": [user([text_part("t"), text_part("d")])],
    }),
    ("later system messages", [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, user("c"), {"role": "system", "content": "d"}], {
        "claude": [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, user("c"), user("d")],
        "chat": [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, user("c"), {"role": "system", "content": "d"}],
    }),
    ("system message alone", [{"role": "system", "content": "a"}], {
        "claude": [user("a")],
        "chat": [{"role": "system", "content": "a"}],
    }),
    ("thinking, text and calls", [user("a"), assistant([SIGNED, text_part("b")], called("1"), called("2", "g", '{"x": 1}')), result("1"), result("2", "")], {
        "claude": [user("a"), assistant([SIGNED, text_part("b"), used("1"), used("2", "g", {"x": 1})]), user([result_part("1", "done"), result_part("2", "(no output)")])],
        "chat": [user("a"), assistant([text_part("b")]), used_once("1"), result("1"), assistant([used("2", "g", {"x": 1})]), result("2", "(no output)")],
        "openai": [user("a"), assistant([text_part("b")], called("1"), called("2", "g", '{"x": 1}')), result("1"), result("2", "(no output)")],
    }),
    ("unsigned thinking", [user("a"), assistant([{"type": "thinking", "thinking": "T"}, text_part("b")]), user("c")], {
        "chat": [user("a"), assistant([text_part("b")]), user("c")],
    }),
    ("redacted thinking", [user("a"), assistant([{"type": "redacted_thinking", "data": "x"}]), user("c")], {
        "claude": [user("a"), assistant([{"type": "redacted_thinking", "data": "x"}]), user("c")],
        "chat": [user("a"), user("c")],
    }),
    ("Google's signature", [user("a"), assistant(None, called("1", extra_content=THOUGHT_SIGNATURE)), result("1")], {
        "claude": [user("a"), used_once("1"), user([result_part("1", "done")])],
        "responses": [user("a"), used_once("1"), result("1")],
        "chat": [user("a"), assistant([used("1", extra_content=THOUGHT_SIGNATURE)]), result("1")],
        "openai": [user("a"), assistant(None, called("1", extra_content=THOUGHT_SIGNATURE)), result("1")],
    }),
    ("result with a picture", SEEN, {
        "claude": [user("a"), used_once("1"), claude_result_of("1", [text_part("b"), PICTURES["claude"]])],
        "responses": [user("a"), used_once("1"), claude_result_of("1", [{"type": "input_text", "text": "b"}, PICTURES["responses"]])],
        "chat": SEEN_BY_CHAT,
        "openai": [user("a"), assistant(None, called("1")), *SEEN_BY_CHAT[2:]],
    }),
    ("Anthropic's result with a picture", [user("a"), assistant([used("1")]), user([result_part("1", [text_part("b"), PICTURES["claude"]]), text_part("c")])], {
        "claude": [user("a"), used_once("1"), claude_result_of("1", [text_part("b"), PICTURES["claude"]]), user([text_part("c")])],
        "responses": [user("a"), used_once("1"), claude_result_of("1", [{"type": "input_text", "text": "b"}, PICTURES["responses"]]), user([text_part("c")])],
        "chat": [*SEEN_BY_CHAT, user([text_part("c")])],
        "openai": [user("a"), assistant(None, called("1")), *SEEN_BY_CHAT[2:], user([text_part("c")])],
    }),
    ("pictures follow the last result", [user("a"), assistant(None, called("1"), called("2")), result("1", [A_PICTURE]), result("2", "d")], {
        "claude": [user("a"), assistant([used("1"), used("2")]), user([result_part("1", [PICTURES["claude"]]), result_part("2", "d")])],
        "responses": [user("a"), used_once("1"), claude_result_of("1", [PICTURES["responses"]]), used_once("2"), result("2", "d")],
        "chat": [user("a"), used_once("1"), result("1", "(see the picture below)"), used_once("2"), result("2", "d"), user([A_PICTURE])],
        "openai": [user("a"), assistant(None, called("1"), called("2")), result("1", "(see the picture below)"), result("2", "d"), user([A_PICTURE])],
    }),
    ("failed result", [user("a"), assistant([used("1")]), claude_result_of("1", "no", is_error=True)], {
        "claude": [user("a"), used_once("1"), claude_result_of("1", "no", is_error=True)],
        "chat": [user("a"), used_once("1"), result("1", "Error: no")],
        "openai": [user("a"), assistant(None, called("1")), result("1", "Error: no")],
    }),
    ("cache marks", [{"role": "system", "content": [MARKED]}, user([MARKED, {**A_PICTURE, "cache_control": {"type": "ephemeral"}}]), assistant([used("1")]), claude_result_of("1", "b", cache_control={"type": "ephemeral"})], {
        "claude": [{"role": "system", "content": [MARKED]}, user([MARKED, {**PICTURES["claude"], "cache_control": {"type": "ephemeral"}}]), used_once("1"), claude_result_of("1", "b", cache_control={"type": "ephemeral"})],
        "responses": [{"role": "system", "content": [text_part("a")]}, user([text_part("a"), PICTURES["responses"]]), used_once("1"), result("1", "b")],
        "chat": [{"role": "system", "content": [text_part("a")]}, user([text_part("a"), A_PICTURE]), used_once("1"), result("1", "b")],
        "openrouter": [{"role": "system", "content": [MARKED]}, user([MARKED, {**A_PICTURE, "cache_control": {"type": "ephemeral"}}]), used_once("1"), result("1", "b")],
        "openai": [{"role": "system", "content": [text_part("a")]}, user([text_part("a"), A_PICTURE]), assistant(None, called("1")), result("1", "b")],
    }),
    ("reasoning beside a call", [user("a"), assistant(None, called("1"), reasoning="r", reasoning_details=[{"text": "r"}], reasoning_content="r"), result("1")], {
        "claude": [user("a"), used_once("1"), user([result_part("1", "done")])],
        "chat": [user("a"), used_once("1"), result("1")],
        "openrouter": [user("a"), {**used_once("1"), "reasoning": "r", "reasoning_details": [{"text": "r"}]}, result("1")],
        "openai": [user("a"), assistant(None, called("1")), result("1")],
    }),
    ("keys of other vendors", [user("a", name="al", audio={}), assistant("b", refusal="r", annotations=[1])], {
        "claude": [user("a"), assistant("b")],
        "responses": [user("a"), assistant("b")],
        "chat": [user("a", name="al"), assistant("b")],
    }),
    ("blank texts", [user([text_part(""), text_part(" "), text_part("a")]), assistant(" \n"), user("b")], {
        "claude": [user([text_part("a")]), user("b")],
        "chat": [user([text_part(" "), text_part("a")]), assistant(" \n"), user("b")],
    }),
    ("picture that was drawn", [user("a"), assistant("b", images=[A_PICTURE]), user("c")], {
        form: [user("a"), assistant("b"), user([text_part("The picture that you drew:"), own]), user("c")]
        for form, own in PICTURES.items()
    }),
]  # fmt: skip
# What UTF-8 can hold; Hypothesis would work the same out from the codec, which takes seconds.
ANY_TEXT = functools.partial(st.text, st.characters(exclude_categories=["Cs"]))
TEXTS = ANY_TEXT(max_size=20).filter(lambda t: not t or t.strip())
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | ANY_TEXT(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
ARGUMENTS = st.dictionaries(ANY_TEXT(max_size=5), JSON_VALUES, max_size=3)


@st.composite
def turns(
    draw: st.DrawFn, only_one_call_if_signed_and_silent: bool = False
) -> tuple[list[JSON], list[tuple[Any, ...]]]:
    """A history of an agent, and what a model must get to see of it.

    Every turn uses the same ids again, as some agents do, and results come in any order.
    """
    messages: list[JSON] = [user("Begin.")]
    meant: list[tuple[Any, ...]] = [("user", "Begin.")]
    uses: Counter[str] = Counter()
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            text = draw(TEXTS)
            messages.append(user(text))
            meant += [("user", text)] if text else []
            continue
        spoken, signed = draw(st.none() | TEXTS), draw(st.booleans())
        few = only_one_call_if_signed_and_silent and signed and not spoken
        number = draw(st.integers(0, 1 if few else 3))
        given = [draw(ARGUMENTS) for _ in range(number)]
        extra = {"extra_content": THOUGHT_SIGNATURE} if signed else {}
        calls = [called(f"call_{n}", f"f{n}", json.dumps(a), **extra) for n, a in enumerate(given)]
        order = draw(st.permutations(range(number)))
        said: Any = [text_part(spoken)] if spoken and draw(st.booleans()) else spoken
        messages.append(assistant(said, *calls))
        messages += [result(f"call_{n}", f"result {n}") for n in order]
        meant += [("assistant", spoken)] if spoken else []
        uses.update(names := [f"call_{n}" for n in range(number)])
        sent_ids = [f"{name}_{uses[name]}" if uses[name] > 1 else name for name in names]
        seen = [
            ("call", sent_ids[n], f"f{n}", a, THOUGHT_SIGNATURE if signed else None)
            for n, a in enumerate(given)
        ]
        results = [("result", sent_ids[n], f"result {n}") for n in range(number)]
        if signed:
            meant += [*seen, *results]
        else:
            meant += [event for pair in zip(seen, results, strict=True) for event in pair]
    return messages, meant


TINY_PNG = b"\x89PNG\r\n\x1a\n....."
TINY_URL = f"data:image/png;base64,{base64.b64encode(TINY_PNG).decode()}"
PDF = b"%PDF-1.4 small"
PDF_URL = f"data:application/pdf;base64,{base64.b64encode(PDF).decode()}"
PDF_PART: JSON = {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF_URL}}
IMAGES = table(
    ["png", TINY_PNG, "image/png"],
    ["jpeg", b"\xff\xd8\xff\xe0....", "image/jpeg"],
    ["gif87", b"GIF87a....", "image/gif"],
    ["gif89", b"GIF89a....", "image/gif"],
    ["webp", b"RIFF\0\0\0\0WEBPVP8 ", "image/webp"],
)


def stream_line(kind: str, **more: Any) -> bytes:
    """One line of Puter's stream, its text unescaped as the server sends it."""
    event = {"type": kind, **more}
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


USAGE_LINE = stream_line("usage", usage={"prompt": 11, "completion": 22})


def decoded(
    *pieces: bytes, model: str = "m"
) -> tuple[list[puter.Chunk], puter.PuterError | None, puter.Reply]:
    """What a line decoder makes of pieces and the end after them."""
    decoder = puter.LineDecoder(model)
    chunks = [chunk for piece in pieces for chunk in decoder.feed(piece)]
    chunks += decoder.finish()
    return chunks, decoder.error, decoder.reply()


def values_of(*pieces: bytes) -> str:
    """The same as a text that can be compared, without the ids that calls were given."""
    chunks, error, reply = decoded(*pieces)
    return re.sub(r"call_\w{24}", "call_?", repr((chunks, error, reply, reply.tool_calls)))


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """The bytes cut at these places (of any order, taken modulo the length)."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def escaped_line(text: Any, kind: str = "text") -> bytes:
    """A line of text with everything escaped: halves of an emoji can be sent so alone."""
    return json.dumps({"type": kind, kind: text}).encode() + b"\n"


# Lines of every kind that a server sends, and some that none does.
LINES = st.one_of(
    st.builds(lambda t: stream_line("text", text=t), ANY_TEXT(max_size=10)),
    st.builds(escaped_line, st.sampled_from(["a\ud83e", "\udd8a", "\ud83e", "\ud83e\udd8ab", ""])),
    st.builds(lambda t: stream_line("reasoning", reasoning=t), ANY_TEXT(max_size=10)),
    st.builds(lambda a: stream_line("tool_use", id="c", name="f", input=a), ARGUMENTS),
    st.builds(lambda v: stream_line("extra_content", extra_content=v), JSON_VALUES),
    st.sampled_from(
        [
            USAGE_LINE,
            stream_line("error", message="gone"),
            stream_line("tool_use", id="c", name="f", input="{broken"),
            stream_line("text"),
            b"\n",
            b" \r\n",
            b"[1]\n",
            b"{}\n",
            b"\xff\xfe\n",
        ]
    ),
    st.binary(max_size=20),
)


def delta(**given: Any) -> str:
    """The data of one event of an OpenAI-compatible stream."""
    return json.dumps({"choices": [{"index": 0, "delta": given}]})


def call_delta(index: Any, arguments: str, **head: Any) -> str:
    name = {"name": head.pop("name")} if "name" in head else {}
    function = {**name, "arguments": arguments}
    return delta(tool_calls=[{"index": index, **head, "function": function}])


def heard(*events: str) -> tuple[list[puter.Chunk], puter.PuterError | None, puter.Reply]:
    """What an event decoder makes of events and the end after them."""
    decoder = puter.EventDecoder("m")
    chunks = [chunk for event in events for chunk in decoder.feed(event)]
    decoder.finish()
    return chunks, decoder.error, decoder.reply()


def model_entry(model_id: str, **more: Any) -> JSON:
    """A model as the catalogue lists it; free unless it says otherwise."""
    prices = {"input_cost_key": "prompt", "output_cost_key": "completion"}
    costs = {"tokens": 1_000_000, "prompt": 0, "completion": 0}
    return {"id": model_id, "provider": "openrouter", **prices, "costs": costs, **more}


def model(model_id: str, *aliases: str, **more: Any) -> puter.Model:
    return puter.Model(model_id, aliases=aliases, **more)


def account(name: str, last_used_ms: int | None = None) -> puter.Account:
    return puter.Account(name, f"token of {name}", last_used_ms=last_used_ms)


def ids(models: Sequence[puter.Model]) -> list[str]:
    return [m.id for m in models]


# =============================================================================
# Errors
# =============================================================================
class TestErrors:
    @pytest.mark.parametrize("kind", ALL_ERRORS)
    def test_every_kind_is_public_and_says_what_it_means(self, kind):
        assert kind.__name__ in puter.__all__ and not hasattr(builtins, kind.__name__)
        assert kind.scope in ("request", "model", "account", "server")
        assert isinstance(kind.retryable, bool) and kind.__doc__

    # The errors of settings get their hint where they are raised.
    @pytest.mark.parametrize(
        "kind", [k for k in ALL_ERRORS if k not in (puter.PuterError, puter.ConfigError)]
    )
    def test_every_kind_has_a_hint(self, kind):
        assert str(kind("It failed")) == f"It failed. {kind.default_hint}"

    @pytest.mark.parametrize("kind", ALL_ERRORS)
    def test_pickles_with_all_it_knows(self, kind):
        error = kind(
            "It failed",
            status=418,
            code="teapot",
            hint="Use a pot.",
            model="m",
            account="a",
            attempts=[attempt("m", "a", puter.ServerError("Down", code="x"))],
            retry_after_s=1.5,
        )
        copied = pickle.loads(pickle.dumps(error))
        assert type(copied) is kind
        assert str(copied) == str(error)
        values_of, again = dict(vars(error)), dict(vars(copied))
        assert [a.outcome for a in values_of.pop("attempts")] == [
            a.outcome for a in again.pop("attempts")
        ]
        assert values_of == again

    def test_pickles_what_single_kinds_know(self):
        statuses = [puter.Cooldown("a", "", 5.0, 1, "x")]
        errors: list[tuple[puter.PuterError, str, Any]] = [
            (puter.ModelNotFoundError("x", near=["a"]), "near", ("a",)),
            (puter.ReplyError("x", raw="{"), "raw", "{"),
            (puter.NetworkError("x", may_be_billed=True), "may_be_billed", True),
            (puter.BadRequestError("x"), "param", None),
            (puter.StreamError("x", reply=puter.Reply("hi")), "reply", puter.Reply("hi")),
            (puter.AllAccountsOnCooldownError("x", statuses=statuses), "statuses", tuple(statuses)),
        ]
        for error, name, value in errors:
            assert getattr(error, name) == value
            assert getattr(pickle.loads(pickle.dumps(error)), name) == value

    @pytest.mark.parametrize(
        ("message", "hint", "text"),
        table(
            ["a full stop is added", "It failed", "Do that", "It failed. Do that."],
            ["none is doubled", "It failed!", "Really?", "It failed! Really?"],
            ["no hint", "It failed", "", "It failed."],
        ),
    )
    def test_text(self, message, hint, text):
        assert str(puter.PuterError(message, hint=hint)) == text

    def test_a_detail_that_no_error_has_is_refused(self):
        with pytest.raises(TypeError, match="no detail 'statsu'"):
            puter.ServerError("It failed", statsu=500)

    def test_attempts_are_summed_up_and_repeats_counted(self):
        busy = puter.RateLimitError("Slow", code="too_many_requests")
        down = puter.NetworkError("Refused")
        tried = [attempt("m", "a", busy)] * 2 + [attempt("n", "b", down), attempt("n", "c")]
        assert str(puter.PuterError("It failed", attempts=tried[:1])) == "It failed."
        assert str(puter.PuterError("It failed", attempts=tried)) == (
            "It failed. Tried m on a: too_many_requests (2 times); "
            "n on b: NetworkError; n on c: answered."
        )


# =============================================================================
# Values
# =============================================================================
class TestValues:
    @pytest.mark.parametrize(
        ("usage", "is_reported"),
        table(
            ["nothing", puter.Usage(), False],
            ["zeros", puter.Usage(0, 0), True],
            ["input", puter.Usage(input_tokens=1), True],
            ["output", puter.Usage(output_tokens=1), True],
            ["price", puter.Usage(cost_usd=0.0), True],
        ),
    )
    def test_an_empty_usage_is_false(self, usage, is_reported):
        assert bool(usage) is is_reported

    @pytest.mark.parametrize(
        ("chunk", "text"),
        table(
            ["text", puter.Chunk("text", "hi"), "hi"],
            ["reasoning", puter.Chunk("reasoning", "hm"), ""],
            ["tool call", puter.Chunk("tool_call", tool_call=puter.ToolCall("1", "f", {})), ""],
            ["usage", puter.Chunk("usage", usage=puter.Usage(1, 2)), ""],
        ),
    )
    def test_only_text_chunks_have_a_text(self, chunk, text):
        assert str(chunk) == text

    def test_a_model_knows_its_names(self):
        assert model("a-1", "a", "b").names() == ("a-1", "a", "b")

    @pytest.mark.parametrize(
        "value",
        [
            puter.Usage(),
            puter.ToolCall("1", "f", {}),
            attempt("m", "a"),
            puter.Reply("hi"),
            model("m"),
            account("a"),
            puter.Cooldown("a", "", 1.0, 1, "x"),
            puter.Credit("usd", 1.0, 1.0, 0.0),
            puter.Config(),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_values_are_frozen_and_slotted(self, value):
        name = dataclasses.fields(value)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 1)
        assert not hasattr(value, "__dict__")
        assert pickle.loads(pickle.dumps(value)) == copy.copy(value) == value


# =============================================================================
# Config
# =============================================================================
# The names of the original plugin, so that its file can be brought along, and our own.
SETTING_NAMES = re.findall(
    r"\w+",
    """
    quiet_mode debug api_base_url gui_base_url api_timeout_ms auto_create_temp_user max_retries
    retry_delay_ms cache_ttl_ms cache_enabled cache_max_entries cache_directory metrics_enabled
    metrics_max_samples metrics_file fallback_enabled fallback_models fallback_cooldown_ms
    account_rotation_enabled account_rotation_strategy account_rotation_cooldown_ms
    default_model api_style openai_api_key stream_tools max_concurrent
    """,
)
HUGE = "9" * 5_000


class TestConfig:
    def test_all_settings_and_no_others(self, tmp_path):
        assert sorted(load(tmp_path).sources) == sorted(SETTING_NAMES)
        assert set(load(tmp_path).sources.values()) == {"default"}

    def test_defaults_are_those_of_the_class(self, tmp_path):
        assert load(tmp_path) == puter.Config(folder=tmp_path)
        assert load(tmp_path).api_base_url == "https://api.puter.com"
        assert load(tmp_path).api_style == "drivers"
        assert load(tmp_path).folder == tmp_path

    def test_the_defaults_can_be_written_down(self, tmp_path):
        values = {name: getattr(load(tmp_path), name) for name in SETTING_NAMES}
        write_settings(tmp_path, json.dumps(values))
        assert load(tmp_path) == puter.Config(folder=tmp_path)

    @pytest.mark.parametrize(
        ("in_file", "env", "argument", "value", "source"),
        table(
            ["default", None, None, None, 3, "default"],
            ["file", 5, None, None, 5, "file"],
            ["environment over file", 5, "6", None, 6, "PUTER_MAX_RETRIES"],
            ["argument over all", 5, "6", 7, 7, "argument"],
            ["environment alone", None, "6", None, 6, "PUTER_MAX_RETRIES"],
        ),
    )
    def test_precedence(self, tmp_path, in_file, env, argument, value, source):
        path = tmp_path / "puter.json"
        if in_file is not None:
            write_settings(tmp_path, json.dumps({"max_retries": in_file}))
        environ = {} if env is None else {"PUTER_MAX_RETRIES": env}
        overrides = {} if argument is None else {"max_retries": argument}
        config = load(tmp_path, environ, **overrides)
        assert config.max_retries == value
        assert config.sources["max_retries"] == (str(path) if source == "file" else source)
        client = puter.Puter("t", config=config, max_retries=7)
        assert client.config.sources == {**config.sources, "max_retries": "argument"}

    @pytest.mark.parametrize("name", SETTING_NAMES)
    def test_null_is_the_default(self, tmp_path, name):
        write_settings(tmp_path, json.dumps({name: None}))
        assert load(tmp_path) == puter.Config(folder=tmp_path)
        nothing: JSON = {name: None}
        assert puter.Config(folder=tmp_path, **nothing) == load(tmp_path)

    @pytest.mark.parametrize(
        ("name", "value", "held"),
        table(
            ["boolean", "debug", True, True],
            ["lowest", "max_retries", 0, 0],
            ["highest", "max_retries", 20, 20],
            ["text", "default_model", "gpt-5", "gpt-5"],
            ["folder", "cache_directory", "/x y", "/x y"],
            ["choice", "api_style", "openai", "openai"],
            ["list", "fallback_models", ["a", "b"], ("a", "b")],
            ["no fallback models", "fallback_models", [], ()],
            ["last slash", "api_base_url", "https://x.y/", "https://x.y"],
            ["path", "api_base_url", "http://x.y:1/v1", "http://x.y:1/v1"],
        ),
    )
    def test_values_are_taken(self, tmp_path, name, value, held):
        write_settings(tmp_path, json.dumps({name: value}))
        assert getattr(load(tmp_path), name) == held
        assert getattr(puter.Config(**{name: value}), name) == held

    @pytest.mark.parametrize(
        ("name", "value", "found", "allowed"),
        table(
            ["text for a boolean", "debug", "true", "'true' (a string)", "true or false"],
            ["number for a boolean", "debug", 1, "1 (a number)", "true or false"],
            ["text for a number", "max_retries", "3", "'3' (a string)", "from 0 to 20"],
            ["fraction", "max_retries", 2.5, "2.5 (a number)", "a whole number"],
            ["boolean for a number", "max_retries", True, "a boolean", "from 0 to 20"],
            ["too low", "max_retries", -1, "-1 (a number)", "from 0 to 20"],
            ["too high", "max_retries", 21, "21 (a number)", "from 0 to 20"],
            ["no time at all", "api_timeout_ms", 0, "0 (a number)", "from 1 to"],
            ["nobody at once", "max_concurrent", 0, "0 (a number)", "from 1 to"],
            ["number for a text", "default_model", 5, "5 (a number)", "a string"],
            ["blank text", "default_model", " ", "' ' (a string)", "not empty"],
            ["object for a text", "metrics_file", {}, "{} (an object)", "a string"],
            ["text for a list", "fallback_models", "a", "'a' (a string)", "a list"],
            ["list of numbers", "fallback_models", [1], "[1] (a list)", "model names"],
            ["blank in a list", "fallback_models", [""], "[''] (a list)", "a list"],
            ["no choice", "api_style", "x", "'x' (a string)", '"drivers" or "openai"'],
            ["list for a choice", "api_style", [], "[] (a list)", '"drivers" or'],
            ["wrong case", "account_rotation_strategy", "LRU", "'LRU'", "round-robin"],
            ["no scheme", "api_base_url", "x.y", "'x.y' (a string)", "a URL"],
            ["other scheme", "gui_base_url", "ftp://x", "'ftp://x'", "a URL"],
            ["query", "api_base_url", "https://x/?a", "'https://x/?a'", "a URL"],
            ["no host", "api_base_url", "https://", "'https://'", "a URL"],
            ["number for a URL", "api_base_url", 1, "1 (a number)", "a URL"],
            ["line end", "api_base_url", "https://x\n", "https://x", "a URL"],
        ),
    )
    def test_a_wrong_value_is_named_with_its_place_and_what_is_allowed(
        self, tmp_path, name, value, found, allowed
    ):
        path = write_settings(tmp_path, json.dumps({name: value}))
        message = config_fault(tmp_path)
        for words in (str(path), f"{name} is ", found, f"must be {allowed}"[8:]):
            assert words in message
        with pytest.raises(puter.ConfigError, match=f"argument: {name} is "):
            puter.Config(**{name: value})

    @pytest.mark.parametrize(
        ("name", "value"),
        table(
            ["password in a URL", "api_base_url", "https://me:s3cret@x.y"],
            ["with a slash in it", "gui_base_url", "https://me:s3cret/1@x.y"],
            ["without a scheme", "api_base_url", "me:s3cret@x.y"],
            ["key in a list", "openai_api_key", ["s3cret"]],
        ),
    )
    def test_no_secret_is_shown(self, tmp_path, name, value):
        write_settings(tmp_path, json.dumps({name: value}))
        message = config_fault(tmp_path)
        assert "s3cret" not in message and f"{name} is not shown here, but must be" in message
        assert "s3cret" not in repr(puter.Config(openai_api_key="s3cret"))

    @pytest.mark.parametrize(
        "value", [pytest.param(b"x", id="bytes"), pytest.param(("x",), id="tuple")]
    )
    def test_what_json_does_not_know_is_not_called_null(self, value):
        with pytest.raises(puter.ConfigError) as caught:
            puter.Config(cache_directory=value)
        assert "null" not in caught.value.message

    def test_a_long_value_is_shortened(self, tmp_path):
        assert len(config_fault(tmp_path, default_model=["x" * 10_000])) < 300
        assert "max_retries is a huge value" in config_fault(tmp_path, max_retries=10**5_000)

    @pytest.mark.parametrize(
        ("name", "text", "value"),
        table(
            *([f"boolean {w}", "debug", w, True] for w in ("1", "true", "Yes", " ON ", "TRUE")),
            *([f"boolean {w}", "quiet_mode", w, False] for w in ("0", "False", "no", "off")),
            ["number", "MAX_RETRIES", " 7 ", 7],
            ["text", "default_model", "gpt-5", "gpt-5"],
            *([f"empty {n}", n, "", getattr(puter.Config(), n)] for n in SETTING_NAMES),
            ["names", "fallback_models", " a, b ,,c:free ", ("a", "b", "c:free")],
            ["names in JSON", "fallback_models", ' ["a", "b"]', ("a", "b")],
            ["no names", "fallback_models", "[]", ()],
            ["URL", "api_base_url", "http://x:1/", "http://x:1"],
        ),
    )
    def test_environment(self, tmp_path, name, text, value):
        config = load(tmp_path, {f"PUTER_{name.upper()}": text})
        assert getattr(config, name.lower()) == value

    @pytest.mark.parametrize(
        ("name", "text", "allowed"),
        table(
            ["boolean", "DEBUG", "maybe", "true or false"],
            ["number", "MAX_RETRIES", "three", "a whole number from 0 to 20"],
            ["range", "MAX_RETRIES", "-1", "a whole number from 0 to 20"],
            ["fraction", "MAX_RETRIES", "1.5", "a whole number"],
            pytest.param("MAX_RETRIES", HUGE, "a whole number", id="more digits than Python takes"),
            ["half a list", "FALLBACK_MODELS", '["a"', "a list of model names"],
            ["wrong list", "FALLBACK_MODELS", "[1]", "a list of model names"],
            ["choice", "API_STYLE", "rest", '"drivers" or "openai"'],
            ["URL", "API_BASE_URL", "x", "a URL"],
        ),
    )
    def test_a_wrong_variable_is_named(self, tmp_path, name, text, allowed):
        message = config_fault(tmp_path, {f"PUTER_{name}": text})
        assert message.startswith(f"PUTER_{name}: {name.lower()} is ")
        assert allowed in message

    @pytest.mark.parametrize(
        ("variable", "meant"),
        table(
            ["letter missing", "PUTER_MAX_RETRIE", "PUTER_MAX_RETRIES"],
            ["words turned round", "PUTER_MODEL_DEFAULTS", None],
            ["plural", "PUTER_DEFAULT_MODELS", "PUTER_DEFAULT_MODEL"],
            ["unit missing", "PUTER_API_TIMEOUT", "PUTER_API_TIMEOUT_MS"],
            ["somebody else's", "PUTER_EDITOR", None],
            ["another word for the folder", "PUTER_HOME", "PUTER_CONFIG_DIR"],
            ["another word for the token", "PUTER_TOKEN", "PUTER_AUTH_TOKEN"],
            ["another word for the model", "PUTER_MODEL", "PUTER_DEFAULT_MODEL"],
            ["another word for the URL", "PUTER_API_URL", "PUTER_API_BASE_URL"],
            ["which key", "PUTER_API_KEY", "PUTER_SERVER_API_KEY, PUTER_OPENAI_API_KEY or PUTER_AUTH_TOKEN"],
            ["other prefix", "MAX_RETRIE", None],
            ["the token", "PUTER_AUTH_TOKEN", None],
            ["the folder", "PUTER_CONFIG_DIR", None],
            ["the server's key", "PUTER_SERVER_API_KEY", None],
            pytest.param("PUTER_AUTH_TOKN", "PUTER_AUTH_TOKEN", id="near the token"),
        ),
    )  # fmt: skip
    def test_a_near_miss_of_a_variable_is_named(self, tmp_path, variable, meant):
        if meant is None:
            assert load(tmp_path, {variable: "1"}) == puter.Config(folder=tmp_path)
        else:
            assert load(tmp_path, {variable: ""}) == puter.Config(folder=tmp_path)
            message = config_fault(tmp_path, {variable: "1"})
            assert message.startswith(f"{variable}: ")
            assert f"Did you mean {meant}?" in message

    @pytest.mark.parametrize(
        ("key", "hint"),
        table(
            ["near", "max_retry", "Did you mean 'max_retries'?"],
            ["other case", "Debug", "Did you mean 'debug'?"],
            ["far", "zzz", "Known keys: quiet_mode, debug, "],
            ["the folder is none", "folder", "there is no setting 'folder'"],
        ),
    )
    def test_an_unknown_key_is_an_error(self, tmp_path, key, hint):
        path = write_settings(tmp_path, json.dumps({key: 1}))
        assert config_fault(tmp_path).startswith(f"{path}: there is no setting")
        assert hint in config_fault(tmp_path)

    def test_an_unknown_argument_is_an_error(self, tmp_path):
        assert config_fault(tmp_path, max_retry=1).startswith("argument: there is no setting")

    @pytest.mark.parametrize(
        ("text", "words"),
        table(
            ["not JSON", '{"debug": tru}', "cannot be read as JSON"],
            ["empty", "", "cannot be read as JSON"],
            ["comment", '{"debug": true} // on', "cannot be read as JSON"],
            ["nested too deeply", "[" * 200_000, "cannot be read as JSON"],
            ["same key twice", '{"debug": true, "debug": false}', "duplicate key 'debug'"],
            ["list", "[]", "holds [] (a list), not an object"],
            ["text", '"debug"', "holds 'debug' (a string), not an object"],
            ["null", "null", "holds None (null), not an object"],
            pytest.param(f'{{"max_retries": {HUGE}}}', "cannot be read as JSON", id="huge number"),
            ["not UTF-8", b'{"default_model": "\xe9"}', "cannot be read"],
            ["UTF-16", "{}".encode("utf-16"), "cannot be read"],
        ),
    )
    def test_a_broken_file_is_named(self, tmp_path, text, words):
        path = write_settings(tmp_path, text)
        assert config_fault(tmp_path).startswith(f"{path}: ")
        assert words in config_fault(tmp_path)

    def test_a_byte_order_mark_is_no_harm_and_a_folder_is_named(self, tmp_path):
        (tmp_path / "puter.json").mkdir()
        assert "puter.json: cannot be read" in config_fault(tmp_path)
        (tmp_path / "puter.json").rmdir()
        write_settings(tmp_path, b'\xef\xbb\xbf{"debug": true}')
        assert load(tmp_path).debug is True

    @pytest.mark.parametrize(
        ("environ", "os_name", "folder"),
        table(
            ["Linux", {}, "posix", "/home/me/.config/puter"],
            ["macOS", {"TMPDIR": "/x"}, "posix", "/home/me/.config/puter"],
            ["XDG", {"XDG_CONFIG_HOME": "/xdg"}, "posix", "/xdg/puter"],
            ["empty XDG", {"XDG_CONFIG_HOME": ""}, "posix", "/home/me/.config/puter"],
            ["Windows", {"APPDATA": "/Roaming"}, "nt", "/Roaming/puter"],
            ["no APPDATA", {}, "nt", "/home/me/AppData/Roaming/puter"],
            ["APPDATA elsewhere", {"APPDATA": "/x"}, "posix", "/home/me/.config/puter"],
            ["XDG on Windows", {"XDG_CONFIG_HOME": "/x", "APPDATA": "/a"}, "nt", "/a/puter"],
            ["given", {"PUTER_CONFIG_DIR": "/p", "XDG_CONFIG_HOME": "/x"}, "posix", "/p"],
            ["given on Windows", {"PUTER_CONFIG_DIR": "/p", "APPDATA": "/a"}, "nt", "/p"],
            ["given empty", {"PUTER_CONFIG_DIR": ""}, "posix", "/home/me/.config/puter"],
        ),
    )
    def test_config_dir(self, environ, os_name, folder):
        assert puter.config_dir(environ, os_name, "/home/me") == Path(folder)

    def test_config_dir_knows_the_home(self):
        given = puter.config_dir({"PUTER_CONFIG_DIR": "~/x"})
        assert given == Path("~/x").expanduser()
        assert puter.config_dir({}, "posix") == Path.home() / ".config" / "puter"

    @pytest.mark.parametrize("environ", [{"PUTER_CONFIG_DIR": "x"}, {"XDG_CONFIG_HOME": "x"}])
    def test_the_folder_is_made_absolute_at_once(self, environ, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert tmp_path / "x" in (found := puter.config_dir(environ, "posix"), *found.parents)
        assert puter.Config(folder="x").folder == tmp_path / "x"

    @pytest.mark.parametrize("environ", [{}, {"PUTER_CONFIG_DIR": "~/x"}])
    def test_without_a_home_the_error_says_what_to_set(self, environ, monkeypatch):
        def no_home(_: Path) -> NoReturn:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", classmethod(no_home))
        monkeypatch.setattr(Path, "expanduser", no_home)
        with pytest.raises(puter.ConfigError, match="Set HOME, or PUTER_CONFIG_DIR"):
            puter.config_dir(environ, "posix")

    def test_the_folder_comes_from_the_environment(self, tmp_path):
        write_settings(tmp_path, '{"debug": true}')
        config = puter.Config.load(None, {"PUTER_CONFIG_DIR": str(tmp_path)})
        assert (config.debug, config.folder) == (True, tmp_path)


# =============================================================================
# Messages
# =============================================================================
class TestMessages:
    # ---- prompts ----

    def test_a_text_is_a_user_message(self):
        assert puter.messages_from("Hi") == [user("Hi")]

    def test_a_system_text_comes_first(self):
        system = {"role": "system", "content": "Be brief."}
        assert puter.messages_from("Hi", "Be brief.") == [system, user("Hi")]
        assert puter.messages_from([user("Hi")], "Be brief.") == [system, user("Hi")]
        assert puter.messages_from("Hi", "") == [user("Hi")]

    @pytest.mark.parametrize(
        ("prompt", "messages"),
        table(
            ["text", "Look", [user([text_part("Look"), {"type": "x"}])]],
            ["no text", "", [user([{"type": "x"}])]],
            ["the last user message", [user("a"), user("b"), assistant("c")], [user("a"), user([text_part("b"), {"type": "x"}]), assistant("c")]],
            ["parts", [user([text_part("a"), "b", text_part("")])], [user([text_part("a"), text_part("b"), {"type": "x"}])]],
            ["nobody asked", [assistant("a")], [assistant("a"), user([{"type": "x"}])]],
        ),
    )  # fmt: skip
    def test_extra_parts_join_the_last_question(self, prompt, messages):
        before = copy.deepcopy(prompt)
        assert puter.messages_from(prompt, None, [{"type": "x"}]) == messages
        assert prompt == before

    @pytest.mark.parametrize(
        ("prompt", "words"),
        table(
            ["number", 5, "The prompt is 5 (a number)"],
            ["one message", user("Hi"), "(an object)"],
            ["nothing", None, "The prompt is None (null)"],
            ["bytes", b"Hi", "The prompt is b'Hi'"],
            ["text in a list", ["Hi"], "messages[0] is 'Hi' (a string)"],
            ["no role", [user("a"), {"content": "b"}], "messages[1].role is None"],
            ["unknown role", [{"role": "robot"}], "messages[0].role is 'robot'"],
            ["role that is no text", [{"role": ["user"]}], "messages[0].role is"],
            ["content of a number", [user(5)], "messages[0].content is 5 (a number)"],
            ["content of an object", [user({})], "messages[0].content is {}"],
            ["part of a number", [user(["a", 5])], "messages[0].content[1] is 5"],
            ["result of nothing", [{"role": "tool"}], "messages[0].tool_call_id is None"],
        ),
    )
    def test_a_wrong_prompt_is_named(self, prompt, words):
        with pytest.raises(puter.BadRequestError) as caught:
            puter.messages_from(prompt)
        assert words in caught.value.message
        assert caught.value.hint

    def test_what_is_no_system_text_token_or_conversation_is_named(self, make):
        for call, words in (
            (lambda: make().chat("hi", system=5), "system is 5"),
            (lambda: make().chat("hi", fallback="no"), "fallback is 'no'"),
            (lambda: puter.Puter(5), "token is 5"),
            (lambda: puter.Puter(""), "The token is empty"),
            (lambda: puter.Conversation.from_json(5), "The conversation is 5"),
        ):
            with pytest.raises(puter.PuterError, match=words):
                call()

    # ---- histories ----

    @pytest.mark.parametrize(
        ("messages", "sent"),
        table(
            ["texts stay", [user("a"), assistant("b")], [user("a"), assistant("b")]],
            ["developer", [{"role": "developer", "content": "a"}], [{"role": "system", "content": "a"}]],
            ["name stays", [user("a", name="me")], [user("a", name="me")]],
            ["null keys go", [user("a", name=None)], [user("a")]],
            ["empty text goes", [user(""), user("a")], [user("a")]],
            ["null goes", [user("a"), assistant(None)], [user("a")]],
            ["no parts", [user([]), user("a")], [user("a")]],
            ["empty part goes", [user([text_part(""), "a"])], [user([text_part("a")])]],
            ["part of null goes", [user([text_part(None), text_part("a")])], [user([text_part("a")])]],
            ["parts in a tuple", [user((text_part("a"),))], [user([text_part("a")])]],
            ["what only replies carry goes", [assistant("a", reasoning="r", reasoning_content="r", refusal="no", audio={}, annotations=[])], [assistant("a")]],
            ["text, then the call, then its result", [assistant("a", called("1", "f", '{"x": 1}')), result("1")], [assistant("a"), assistant([used("1", "f", {"x": 1})]), result("1")]],
            ["parts of text beside a call", [assistant([text_part("a"), text_part("b")], called("1"))], [assistant([text_part("a"), text_part("b")]), assistant([used("1")]), UNANSWERED]],
            ["call beside null", [assistant(None, called("1")), result("1")], [assistant([used("1")]), result("1")]],
            [
                "each result follows its call",
                [assistant(None, called("1"), called("2")), result("1", "a"), result("2", "b")],
                [assistant([used("1")]), result("1", "a"), assistant([used("2")]), result("2", "b")],
            ],
            [
                "results the other way round",
                [assistant(None, called("1"), called("2")), result("2", "b"), result("1", "a")],
                [assistant([used("1")]), result("1", "a"), assistant([used("2")]), result("2", "b")],
            ],
            ["late result", [assistant(None, called("1")), user("Well?"), result("1")], [assistant([used("1")]), result("1"), user("Well?")]],
            ["one result of two", [assistant(None, called("1"), called("2")), result("2")], [assistant([used("1")]), UNANSWERED, assistant([used("2")]), result("2")]],
            [
                "same id in every turn",
                [
                    *(assistant(None, called("1", "f")), result("1", "a")),
                    *(assistant(None, called("1", "g")), result("1", "b")),
                ],
                [
                    *(assistant([used("1", "f")]), result("1", "a")),
                    *(assistant([used("1_2", "g")]), result("1_2", "b")),
                ],
            ],
            [
                "same id again after a call without result",
                [assistant(None, called("1", "f")), assistant(None, called("1", "g")), result("1")],
                [assistant([used("1", "f")]), UNANSWERED, assistant([used("1_2", "g")]), result("1_2")],
            ],
            ["result of no call", [user("a"), result("9")], [user("a"), user([text_part("The result of the call 9:"), text_part("done")])]],
            ["second result of one call", [assistant(None, called("1")), result("1", "a"), result("1", "b")], [assistant([used("1")]), result("1", "a"), user([text_part("The result of the call 1:"), text_part("b")])]],
            ["an id that vendors refuse", [assistant(None, called("functions.f:0")), result("functions.f:0")], [assistant([used("functions_f_0")]), result("functions_f_0")]],
            ["a long id", [assistant(None, called("x" * 70)), result("x" * 70)], [assistant([used("x" * 56)]), result("x" * 56)]],
            [
                "calls as parts",
                [assistant([text_part("a"), used("1"), used("2")]), result("2"), result("1")],
                [assistant([text_part("a")]), assistant([used("1")]), result("1"), assistant([used("2")]), result("2")],
            ],
            ["no arguments", [assistant(None, called("1", "f", ""))], [assistant([used("1")]), UNANSWERED]],
            [
                "arguments as an object",
                [assistant(None, called("1", "f", {"x": 1}))],  # type: ignore[arg-type]
                [assistant([used("1", "f", {"x": 1})]), UNANSWERED],
            ],
            ["blank text beside a call", [assistant(" \n", called("1"))], [assistant([used("1")]), UNANSWERED]],
            ["broken arguments, as the model gave them", [assistant(None, called("1", "f", "{"))], [assistant([used("1")]), UNANSWERED]],
            ["blank result", [used_once("1"), result("1", " \n")], [used_once("1"), result("1", "(no output)")]],
            ["blank parts of a result", [used_once("1"), result("1", [text_part("\n")])], [used_once("1"), result("1", "(no output)")]],
            ["empty result", [used_once("1"), result("1", "")], [used_once("1"), result("1", "(no output)")]],
            ["result of texts", [used_once("1"), result("1", [text_part("a"), "b"])], [used_once("1"), result("1", "a\nb")]],
            [
                "signed calls stay with their text",
                [assistant("a", called("1", extra_content=THOUGHT_SIGNATURE), called("2")), result("2"), result("1")],
                [assistant("a", called("1", extra_content=THOUGHT_SIGNATURE), called("2")), result("1"), result("2")],
            ],
            [
                # Parts of one message arrive in reverse, so they leave in reverse.
                "signed calls without text",
                [assistant(None, called("1", extra_content=THOUGHT_SIGNATURE), called("2")), result("1")],
                [assistant([used("2"), used("1", extra_content=THOUGHT_SIGNATURE)]), result("1"), {**UNANSWERED, "tool_call_id": "2"}],
            ],
            ["one signed part", [assistant([used("1", extra_content=THOUGHT_SIGNATURE)]), result("1")], [assistant([used("1", extra_content=THOUGHT_SIGNATURE)]), result("1")]],
            pytest.param([assistant(" \n", called("1", extra_content=THOUGHT_SIGNATURE)), result("1")],
                [assistant([used("1", extra_content=THOUGHT_SIGNATURE)]), result("1")],
                id="signed call beside a blank text",
            ),
            ["empty note is none", [assistant(None, called("1", extra_content={}))], [assistant([used("1")]), UNANSWERED]],
        ),
    )  # fmt: skip
    def test_history(self, messages, sent):
        before = copy.deepcopy(messages)
        assert sent_as("chat", messages) == sent
        assert messages == before

    @settings(deadline=None)
    @given(turns())
    def test_all_of_a_history_arrives_in_order(self, history):
        messages, meant = history
        before = copy.deepcopy(messages)
        assert with_texts_joined(as_it_arrives(sent_as("chat", messages))) == with_texts_joined(
            meant
        )
        assert messages == before

    @settings(deadline=None)
    @given(turns(only_one_call_if_signed_and_silent=True))
    def test_a_history_in_either_form_becomes_the_other(self, history):
        once = sent_as("chat", history[0])
        assert sent_as("chat", once) == once
        for messages in (history[0], once):
            openai = sent_as("openai", messages)
            assert sent_as("openai", openai) == openai
            assert sent_as("chat", openai) == once
            assert not any(isinstance(m["content"], list) and not m["content"] for m in openai)

    @settings(deadline=None, max_examples=50)
    @given(turns())
    def test_every_vendor_takes_any_history(self, history):
        apart = [one for m in history[0] for one in ([user("So?")] * (m["role"] != "tool") + [m])]
        for form in MODEL_OF:
            assert vendor_fault(form, sent_as(form, apart)) == ""

    @pytest.mark.parametrize("form", MODEL_OF)
    def test_a_text_before_signed_calls_loses_none(self, form):
        """Puter makes one message of two that follow one another, and keeps the first's keys."""
        signed = called("1", extra_content=THOUGHT_SIGNATURE)
        history = [user("a"), assistant("b"), assistant("c", signed), result("1")]
        assert vendor_fault(form, sent_as(form, history)) == ""

    def test_openais_form_keeps_the_calls_of_a_turn_together(self):
        calls = [called("1", "f", '{"x": 1}'), called("2", extra_content=THOUGHT_SIGNATURE)]
        turn = [assistant("a", *calls, reasoning="r"), user("Well?"), result("2"), result("1", " ")]
        sent = sent_as("openai", [{"role": "developer", "content": "Hi"}, *turn, user("")])
        assert sent == [
            {"role": "system", "content": "Hi"},
            *(assistant("a", *calls), result("1", "(no output)"), result("2"), user("Well?")),
        ]
        broken = sent_as("openai", [assistant(" ", called("1", "f", "{"))])
        assert broken == [assistant(None, called("1", "f", "{}")), UNANSWERED]

    @pytest.mark.parametrize(
        ("messages", "form", "sent"),
        [
            pytest.param(messages, form, want.get(form, want.get("chat")), id=f"{name}-{form}")
            for name, messages, want in BY_FORM
            for form in puter.FORMS
            if want.get(form, want.get("chat"))
        ],
    )
    def test_each_form(self, messages, form, sent):
        before = copy.deepcopy(messages)
        assert sent_as(form, messages) == sent
        assert messages == before
        if form in MODEL_OF and "puter_path" not in str(messages):
            assert vendor_fault(form, sent) == ""

    @pytest.mark.parametrize(
        ("asked", "form"),
        [
            *((model("m", provider=p), p) for p in ("claude", "openrouter")),
            *((model("m", provider=p), "responses") for p in RESPONSES),
            *((model("m", provider=p), "chat") for p in ("openai-completion", "gemini", "xai", "")),
            *((name, "claude") for name in ("claude-x", "puter/Claude-x", "anthropic/claude-x")),
            ("anthropic:anthropic/claude-x", "claude"),
            ("openrouter:anthropic/claude-x", "openrouter"),
            ("gpt-5.3-codex", "chat"),
            ("my-claude", "chat"),
        ],
    )
    def test_the_form_of_a_model(self, asked, form):
        assert puter.form_of(asked) == form

    @pytest.mark.parametrize(
        ("form", "args", "want"),
        table(
            ["a temperature for Claude", "claude", {}, {"temperature": 1}],
            ["its own temperature", "claude", {"temperature": 0}, {"temperature": 0}],
            ["no temperature for others", "responses", {}, {}],
            ["effort", "claude", {"reasoning_effort": "low"}, {"temperature": 1, "reasoning_effort": "low"}],
            ["effort in other words", "claude", {"reasoning": {"effort": "low"}}, {"temperature": 1, "reasoning_effort": "low"}],
            ["effort that leaves no answer", "claude", {"reasoning_effort": "high", "max_tokens": 5000}, {"temperature": 1, "max_tokens": 5000, "reasoning_effort": "medium"}],
            ["no room for any", "claude", {"reasoning_effort": "high", "max_tokens": 1279}, {"temperature": 1, "max_tokens": 1279}],
            ["room for the least", "claude", {"reasoning_effort": "high", "max_tokens": 1280}, {"temperature": 1, "max_tokens": 1280, "reasoning_effort": "low"}],
            ["effort as an object", "responses", {"reasoning_effort": "low"}, {"reasoning": {"effort": "low"}}],
            ["effort beside a summary", "responses", {"reasoning_effort": "low", "reasoning": {"summary": "auto"}}, {"reasoning": {"summary": "auto", "effort": "low"}}],
            ["effort of chat completions", "chat", {"reasoning_effort": "low"}, {"reasoning_effort": "low"}],
            ["verbosity", "responses", {"verbosity": "low"}, {"text": {"verbosity": "low"}}],
            ["a tool by its name", "responses", {"tool_choice": {"type": "function", "function": {"name": "f"}}}, {"tool_choice": {"type": "function", "name": "f"}}],
            ["any tool", "responses", {"tool_choice": "required"}, {"tool_choice": "required"}],
            ["a tool of chat completions", "openai", {"tool_choice": {"type": "function", "function": {"name": "f"}}}, {"tool_choice": {"type": "function", "function": {"name": "f"}}}],
        ),
    )  # fmt: skip
    def test_arguments(self, form, args, want):
        before = copy.deepcopy(args)
        messages = [user("hi")]
        sent = puter.arguments_for(form, "m", {"messages": messages, **args})
        assert sent == {"messages": messages, **want}
        assert args == before

    def test_a_json_schema_in_the_words_of_responses(self):
        schema = {"name": "s", "schema": {"type": "object"}, "strict": True}
        form = {"type": "json_schema", "json_schema": schema}
        args = {"messages": [user("hi")], "response_format": form, "verbosity": "low"}
        sent = puter.arguments_for("responses", "m", args)
        assert sent["text"] == {"verbosity": "low", "format": {"type": "json_schema", **schema}}
        assert "text" not in puter.arguments_for("chat", "m", args)

    @pytest.mark.parametrize(("name", "kept"), [("o3-pro-2025-06-10", False), ("gpt-5-pro", True)])
    def test_o3_pro_takes_no_effort(self, name, kept):
        args = {"messages": [user("hi")], "reasoning_effort": "low"}
        assert ("reasoning" in puter.arguments_for("responses", name, args)) is kept

    @pytest.mark.parametrize(
        ("turn", "kept"),
        table(
            ["unsigned", [assistant(None, called("1")), result("1")], False],
            ["signed", [assistant([SIGNED], called("1")), result("1")], True],
            ["redacted", [assistant([{"type": "redacted_thinking", "data": "x"}], called("1")), result("1")], True],
            ["one of two", [assistant([SIGNED], called("1")), result("1"), assistant(None, called("2")), result("2")], False],
            ["before a question", [assistant(None, called("1")), result("1"), user("and?")], True],
            ["no call", [assistant("a")], True],
        ),
    )  # fmt: skip
    def test_no_effort_in_a_turn_with_unsigned_calls(self, turn, kept):
        args = {"messages": [user("hi"), *turn], "reasoning_effort": "low"}
        sent = puter.arguments_for("claude", "m", args)
        assert ("reasoning_effort" in sent) is kept

    @settings(deadline=None)
    @given(ARGUMENTS, st.booleans())
    def test_a_call_goes_out_as_it_came_in(self, arguments, signed):
        extra = THOUGHT_SIGNATURE if signed else None
        for call in (
            puter.ToolCall("1", "f", arguments, extra),
            puter.ToolCall("1", "f", {}, extra, invalid="{broken"),
        ):
            assert puter.tool_call_from(puter.openai_call(call)) == call

    @pytest.mark.parametrize(
        ("messages", "words"),
        table(
            ["no messages", [], "nothing to send"],
            ["only empty ones", [user(""), assistant(None)], "nothing to send"],
            ["call without id", [assistant(None, called(""))], "tool_calls[0] lacks"],
            ["call without name", [assistant(None, called("1", ""))], "tool_calls[0]"],
            ["call of no function", [user("a"), assistant(None, {"id": "1"})], "messages[1].tool_calls[0] lacks"],
            ["call that is a text", [assistant(None, "f")], "tool_calls[0] lacks"],  # type: ignore[arg-type]
            ["arguments of a number", [assistant(None, called("1", "f", 5))], "arguments of messages[0].tool_calls[0] is 5"],  # type: ignore[arg-type]
            ["wrong message", [5], "messages[0] is 5"],
            pytest.param([assistant([{"type": "tool_use", "name": "f"}])], "messages[0]", id="part without id"),
            pytest.param([assistant([{"type": "tool_use", "id": "1", "extra_content": {"a": 1}}, text_part("a")])], "messages[0]", id="signed part without name"),
            pytest.param([assistant([used("1", "f", [1])])], "messages[0]", id="part with a list as input"),
            pytest.param([{"role": "assistant", "tool_calls": 5}], "messages[0]", id="number of calls"),
            pytest.param([result(["1"])], "messages[0]", id="result of a list"),  # type: ignore[arg-type]
            pytest.param([assistant(None, called(["1"]))], "messages[0]", id="call of a list"),  # type: ignore[arg-type]
            pytest.param([user([text_part(5)])], "messages[0].content[0]", id="text of a number"),
        ),
    )  # fmt: skip
    def test_a_wrong_history_is_named(self, messages, words):
        with pytest.raises(puter.BadRequestError) as caught:
            sent_as("chat", messages)
        assert words in caught.value.message
        assert caught.value.hint

    @pytest.mark.parametrize(
        ("messages", "tools", "needs"),
        table(
            ["text", [user("12345678901")], [], puter.Needs(context=2)],
            ["tools", [user("a")], [{}], puter.Needs(tools=True)],
            ["search", [user("a")], [{"type": "web_search"}], puter.Needs(inputs=frozenset({"web search"}))],
            ["search and a tool", [user("a")], [{"type": "web_search"}, {}], puter.Needs(True, frozenset({"web search"}))],
            ["nothing", [assistant(None)], [], puter.Needs()],
            ["image", [user([PICTURES["chat"], text_part("1234")])], [], puter.Needs(inputs=frozenset({"image"}), context=2)],
            ["PDF", [user([PDF_PART])], [], puter.Needs(inputs=frozenset({"pdf"}), context=1_500)],
            ["stored file", [user([{"type": "file", "puter_path": "/a.pdf"}])], [], puter.Needs(inputs=frozenset({"puter_path"}), context=1_500)],
            ["a picture that was drawn", [assistant("a", images=[PICTURES["chat"]])], [], puter.Needs(inputs=frozenset({"image"}))],
            ["all together", [user("12 34"), assistant("12 34")], [], puter.Needs(context=2)],
        ),
    )  # fmt: skip
    def test_needs(self, messages, tools, needs):
        assert puter.needs_of(messages, tools) == needs

    def test_the_estimate_is_the_servers(self):
        """Where no credit and nobody else limits it, the answer's limit tells the estimate."""
        models = {name: m for m in default_catalogue() for name in (m["id"], *m.get("aliases", ()))}
        checked = 0
        for call in recorded("providers.json"):
            args, bodies = rebuilt(call["args"]), rebuilt(call["sent_to_provider"])
            if not bodies or call["name"] in SHAPES_WE_NEVER_SEND:
                continue
            keys = ("max_tokens", "max_completion_tokens", "max_output_tokens")
            limit = next((bodies[-1][key] for key in keys if key in bodies[-1]), None)
            if limit not in (None, args.get("max_tokens")):
                tokens = models[args["model"]]["max_tokens"] - limit
                assert puter.estimated_tokens(args["messages"]) == tokens, call["name"]
                checked += 1
        assert checked > 100

    @pytest.mark.parametrize(
        ("known", "args", "limit"),
        [
            (None, {}, math.inf),
            (None, {"max_tokens": 5}, 5),
            (model("m", max_tokens=100, output_usd_per_million=1.0), {}, 96),
            (model("m", max_tokens=100, output_usd_per_million=1.0), {"max_tokens": 99}, 96),
            (model("m", max_tokens=100, output_usd_per_million=1.0), {"max_tokens": 9}, 9),
            (model("m", max_tokens=100), {}, math.inf),
        ],
    )
    def test_how_long_an_answer_may_be(self, known, args, limit):
        args = {"messages": [user("one two three four")], **args}
        assert puter.answer_limit(known, args) == limit

    # ---- images ----

    @pytest.mark.parametrize(("data", "kind"), IMAGES)
    def test_images_become_data_urls(self, tmp_path, data, kind):
        path = tmp_path / "image"  # the bytes tell the kind, not the name
        path.write_bytes(data)
        url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        part = {"type": "image_url", "image_url": {"url": url}}
        images: list[Any] = [data, bytearray(data), path, str(path)]
        for image in images:
            assert puter.image_part(image) == part
        for same in (url, "http://x/a.png", "HTTPS://x/a?b=c"):
            assert puter.image_part(same)["image_url"] == {"url": same}

    @pytest.mark.parametrize(
        ("image", "words"),
        table(
            ["no image", b"%PDF-1.4", "the image given as bytes is not an image"],
            ["nothing", b"", "(0 bytes)"],
            ["half a signature", b"\x89PN", "is not an image"],
            ["sound, not WebP", b"RIFF\0\0\0\0WAVE", "is not an image"],
            ["no such file", "nowhere/a.png", "'nowhere/a.png' cannot be read (No such"],
            ["folder", ".", "cannot be read"],
            ["NUL in the name", "a\0b", "cannot be read"],
            ["number", 5, "'5' cannot be read"],
            ["none", None, "cannot be read"],
            ["data of a text", "data:text/plain;base64,QQ==", "is not a base64 data URL"],
            ["data without base64", "data:image/png,abc", "is not a base64 data URL"],
            ["broken base64", "data:image/png;base64,%%", "is not a base64 data URL"],
            ["no data", "data:image/png;base64,", "is not a base64 data URL"],
            pytest.param("~nobody.png", "cannot be read", id="name after ~"),
        ),
    )
    def test_no_image(self, image, words):
        with pytest.raises(puter.BadRequestError) as caught:
            puter.image_part(image)
        assert words in caught.value.message
        assert caught.value.hint

    def test_a_file_whose_name_begins_with_a_tilde(self, tmp_path, monkeypatch):
        (tmp_path / "~copy.png").write_bytes(TINY_PNG)
        monkeypatch.chdir(tmp_path)
        assert puter.image_part("~copy.png") == puter.image_part(TINY_PNG)

    # ---- files ----

    def test_files_become_data_urls(self, tmp_path):
        path = tmp_path / "a.pdf"
        path.write_bytes(PDF)
        files: list[Any] = [path, str(path), ("a.pdf", PDF), ("C:\\x\\a.pdf", PDF)]
        for file in files:
            assert puter.file_part(file) == PDF_PART
        assert puter.file_part(PDF)["file"]["filename"] == "document.pdf"

    @pytest.mark.parametrize(
        ("file", "part"),
        table(
            ["PDF by its bytes", ("a.txt", PDF), {**PDF_PART, "file": {**PDF_PART["file"], "filename": "a.txt"}}],
            ["PDF without an ending", ("a", PDF), PDF_PART],
            ["image", ("a.pdf", TINY_PNG), {"type": "image_url", "image_url": {"url": TINY_URL}}],
            ["UTF-8", ("a.csv", "é,1\n\n".encode()), text_part("a.csv:\n```\né,1\n```")],
            ["UTF-8 with its mark", ("a", "é".encode("utf-8-sig")), text_part("a:\n```\né\n```")],
            ["UTF-16 with its mark", ("a", "é, 日".encode("utf-16")), text_part("a:\n```\né, 日\n```")],
            ["UTF-16, the other way round", ("a", b"\xfe\xff" + "é".encode("utf-16-be")), text_part("a:\n```\né\n```")],
            ["Latin-1", ("a", "é, ü".encode("latin-1")), text_part("a:\n```\né, ü\n```")],
            ["of Windows", ("a", "„é“ €".encode("cp1252")), text_part("a:\n```\n„é“ €\n```")],
            ["terminal's colours", ("a", b"\x1b[1mb\x1b[0m\f"), text_part("a:\n```\n\x1b[1mb\x1b[0m\n```")],
            ["bytes without a name", b"a", text_part("document:\n```\na\n```")],
        ),
    )  # fmt: skip
    def test_a_file_is_what_it_holds(self, file, part):
        assert puter.file_part(file) == part

    @pytest.mark.parametrize(
        "data",
        table(
            ["docx or zip", b"PK\x03\x04\x14\x00\x06\x00[Content_Types].xml"],
            ["heic", b"\0\0\0\x18ftypheic\0\0\0\0"],
            ["ELF", b"\x7fELF\x02\x01\x01"],
            ["UTF-16 without its mark", "ab".encode("utf-16-le")],
        ),
    )
    def test_a_file_that_nobody_reads(self, data):
        words = "'a.bin' is neither a text, an image .PNG, JPEG, GIF, WebP. nor a PDF"
        with pytest.raises(puter.BadRequestError, match=words):
            puter.file_part(("a.bin", data))
        assert puter.decoded_text(data) is None

    def test_a_file_that_is_no_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(puter, "MAX_FILE_BYTES", 3)
        assert puter.file_part(b"abc")
        for file, words in (
            (b"", "is 0 bytes"),
            (b"abcd", "is 4 bytes"),
            (tmp_path / "gone.pdf", "gone.pdf' cannot be read"),
            (("a.pdf", "abc"), "content of 'a.pdf' is 'abc'"),
            ((5, b"abc"), "name of a file is 5"),
        ):
            with pytest.raises(puter.BadRequestError, match=words):
                puter.file_part(file)

    @pytest.mark.parametrize(
        "name", ["", " ", ".", "..", "/docs/", "a/..", "C:\\", "a\0.pdf", "a\nb", "a\x7f", "a\x85"]
    )
    def test_a_name_that_no_file_may_have(self, name):
        encoded = {"filename": name, "file_data": PDF_URL}
        with pytest.raises(puter.BadRequestError, match="name of a file is"):
            puter.file_part((name, PDF))
        with pytest.raises(puter.BadRequestError, match="name of a file is"):
            puter.read_part({"type": "file", "file": encoded}, "messages[0]")

    @pytest.mark.parametrize(
        ("part", "words"),
        table(
            ["no file", {"type": "file"}, "without its data"],
            ["no data", {"type": "file", "file": {"filename": "a"}}, "without its data"],
            ["a URL", {"type": "input_file", "file_data": "https://x.org/a.pdf"}, "without its data"],
            ["number for data", {"type": "file", "file": {"file_data": 5}}, "without its data"],
            ["no base64", {"type": "file", "file": {"file_data": "data:a/b;base64,%"}}, "not base64"],
            ["what nobody reads", {"type": "input_file", "file_data": "data:a/b;base64,UEsDBA=="}, "neither a text"],
        ),
    )  # fmt: skip
    def test_a_part_that_holds_no_file(self, part, words):
        with pytest.raises(puter.BadRequestError, match=words):
            puter.read_part(part, "messages[0]")

    def test_bare_base64_of_a_client_is_a_file(self):
        part = {"type": "input_file", "file_data": PDF_URL.rpartition(",")[2]}
        named = {"filename": "document.pdf", "file_data": PDF_URL}
        assert puter.read_part(part, "messages[0]") == [{"type": "file", "file": named}]

    def test_audio_is_refused(self):
        with pytest.raises(puter.BadRequestError, match="is audio"):
            sent_as("chat", [user([{"type": "input_audio"}])])

    # ---- tools ----

    @pytest.mark.parametrize(
        "tool",
        table(
            ["OpenAI's shape", {"type": "function", "function": {"name": "f", "parameters": {}}}],
            ["no type", {"function": {"name": "f", "parameters": {}}}],
            ["flat", {"type": "function", "name": "f", "parameters": {}}],
            ["flat without type", {"name": "f", "parameters": {}}],
            ["Anthropic's shape", {"name": "f", "input_schema": {}}],
            ["MCP's shape", {"name": "f", "inputSchema": {}}],
        ),
    )  # fmt: skip
    def test_tools(self, tool):
        before = copy.deepcopy(tool)
        function = {"name": "f", "parameters": {}}
        assert puter.tool_schemas([tool]) == [{"type": "function", "function": function}]
        assert tool == before
        assert puter.tool_schemas(None) == puter.tool_schemas([]) == []
        search = {"type": "web_search", "search_context_size": "low"}
        assert puter.tool_schemas([search]) == [search]

    @pytest.mark.parametrize(
        "tool",
        table(
            ["text", "f"],
            ["nothing", None],
            ["no name", {"type": "function", "function": {}}],
            ["number for a name", {"name": 5}],
            ["other kind", {"type": "code_interpreter"}],
            pytest.param({"type": "bash_20250124", "name": "bash"}, id="other kind with a name"),
        ),
    )  # fmt: skip
    def test_no_tool(self, tool):
        good = {"type": "function", "function": {"name": "f"}}
        with pytest.raises(puter.BadRequestError, match=r"tools\[1\] is .*Give a function"):
            puter.tool_schemas([good, tool])

    # ---- usage ----

    @pytest.mark.parametrize(
        ("given", "usage"),
        table(
            ["OpenRouter", {"prompt": 11, "completion": 22, "input_cache_read": 5, "usd_cents": 0.5}, puter.Usage(11, 22, 5, 38, 0.005)],
            ["OpenAI", {"prompt_tokens": 11, "completion_tokens": 22, "cached_tokens": 5, "usd_cents": 1}, puter.Usage(11, 22, 5, 38, 0.01)],
            ["Claude", {**CLAUDE_COUNTS, "usd_cents": 6}, puter.Usage(11, 22, 5, 41, 0.06, 3)],
            ["Claude, for an hour", {"input_tokens": 1, "ephemeral_5m_input_tokens": 2, "ephemeral_1h_input_tokens": 4}, puter.Usage(1, None, None, 7, None, 6)],
            ["Anthropic's own", {"input_tokens": 11, "output_tokens": 22, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 3}, puter.Usage(11, 22, 5, 41, None, 3)],
            ["OpenAI's details", {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1}}, puter.Usage(1, None, 1, 1)],
            ["total as told", {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 9}, puter.Usage(1, 2, None, 9)],
            ["price of null", {"prompt": 1, "usd_cents": None}, puter.Usage(1, None, None, 1, None)],
            ["price of nothing", {"prompt": 0, "completion": 0, "usd_cents": 0}, puter.Usage(0, 0, None, 0, 0.0)],
            ["price in dollars", {"cost_usd": 0.5}, puter.Usage(cost_usd=0.5)],
            ["whole fractions", {"prompt": 11.0}, puter.Usage(11, None, None, 11)],
            ["texts and booleans are no numbers", {"prompt": "11", "completion": True}, puter.Usage()],
            ["beyond belief", {"prompt": 10**400, "usd_cents": 10**400, "cost_usd": float("nan")}, puter.Usage()],
            ["empty", {}, puter.Usage()],
            ["null", None, puter.Usage()],
            ["list", [1], puter.Usage()],
        ),
    )  # fmt: skip
    def test_usage(self, given, usage):
        assert puter.usage_from(given) == usage

    # ---- replies ----

    @pytest.mark.parametrize(
        ("message", "meant"),
        table(
            ["text", {"content": "hi"}, {"text": "hi"}],
            ["null", {"content": None}, {}],
            ["nothing", {}, {}],
            ["parts", {"content": [text_part("a"), text_part("b")]}, {"text": "ab"}],
            ["reasoning", {"content": "a", "reasoning": "r"}, {"text": "a", "reasoning": "r"}],
            ["other reasoning", {"content": "a", "reasoning_content": "r"}, {"text": "a", "reasoning": "r"}],
            ["thinking", {"content": [{"type": "thinking", "thinking": "r", "signature": "s"}, text_part("a"), used("1")]}, {"text": "a", "reasoning": "r", "tool_calls": (puter.ToolCall("1", "f", {}),), "finish_reason": "tool_calls", "extra": {"content": [{"type": "thinking", "thinking": "r", "signature": "s"}, text_part("a")]}}],
            ["OpenRouter's reasoning", {"content": "a", "reasoning": "r", "reasoning_details": [{"text": "r"}]}, {"text": "a", "reasoning": "r", "extra": {"reasoning": "r", "reasoning_details": [{"text": "r"}]}}],
            ["pictures", {"content": None, "images": [{"type": "image_url", "image_url": {"url": TINY_URL}}, "https://x.org/a.png"]}, {"images": (puter.Picture(TINY_PNG), puter.Picture(url="https://x.org/a.png"))}],
            ["calls", {"content": None, "tool_calls": [called("1", "f", '{"x": 1}'), called("2")]}, {"tool_calls": (puter.ToolCall("1", "f", {"x": 1}), puter.ToolCall("2", "f", {})), "finish_reason": "tool_calls"}],
            ["calls as parts", {"content": [text_part("a"), used("1", "f", {"x": 1})]}, {"text": "a", "tool_calls": (puter.ToolCall("1", "f", {"x": 1}),), "finish_reason": "tool_calls"}],
            ["signature", {"tool_calls": [called("1", extra_content=THOUGHT_SIGNATURE)]}, {"tool_calls": (puter.ToolCall("1", "f", {}, THOUGHT_SIGNATURE),), "finish_reason": "tool_calls"}],
            ["signature of a part", {"content": [used("1", extra_content=THOUGHT_SIGNATURE)]}, {"tool_calls": (puter.ToolCall("1", "f", {}, THOUGHT_SIGNATURE),), "finish_reason": "tool_calls"}],
            ["no arguments", {"tool_calls": [called("1", "f", "")]}, {"tool_calls": (puter.ToolCall("1", "f", {}),), "finish_reason": "tool_calls"}],
            ["null for arguments", {"tool_calls": [called("1", "f", None)]}, {"tool_calls": (puter.ToolCall("1", "f", {}),), "finish_reason": "tool_calls"}],
            ["empty list for arguments", {"tool_calls": [called("1", "f", "[]")]}, {"tool_calls": (puter.ToolCall("1", "f", {}),), "finish_reason": "tool_calls"}],
            ["text of null for arguments", {"tool_calls": [called("1", "f", "null")]}, {"tool_calls": (puter.ToolCall("1", "f", {}),), "finish_reason": "tool_calls"}],
            ["refusal", {"content": None, "refusal": "I can't."}, {"text": "I can't."}],
            ["part of a refusal", {"content": [{"type": "refusal", "refusal": "No."}]}, {"text": "No."}],
            ["halves of an emoji", {"content": [text_part("a\ud83e"), text_part("\udd8a")], "reasoning": "\ud83e"}, {"text": "a🦊", "reasoning": "\ufffd"}],
            ["Anthropic's end", {"content": "a", "stop_reason": "max_tokens"}, {"text": "a", "finish_reason": "length"}],
        ),
    )  # fmt: skip
    def test_reply(self, message, meant):
        usage = {"prompt": 1, "completion": 2}
        driver = {"success": True, "result": {"message": message, "usage": usage}}
        openai = {"choices": [{"message": message}], "usage": usage}
        values_of = puter.Usage(1, 2, None, 3)
        assert puter.reply_from_driver(driver, "m") == puter.Reply(
            model="m", usage=values_of, raw=driver, **meant
        )
        assert puter.reply_from_openai(openai, "m") == puter.Reply(
            model="m", usage=values_of, raw=openai, **meant
        )

    @pytest.mark.parametrize(
        ("told", "calls", "reason"),
        table(
            ["stop", "stop", [], "stop"],
            ["length", "length", [], "length"],
            ["Anthropic's stop", "end_turn", [], "stop"],
            ["stop sequence", "stop_sequence", [], "stop"],
            ["Anthropic's length", "max_tokens", [], "length"],
            ["Anthropic's calls", "tool_use", [called("1")], "tool_calls"],
            ["old word for calls", "function_call", [called("1")], "tool_calls"],
            ["own word", "content_filter", [], "content_filter"],
            ["Anthropic's refusal", "refusal", [], "content_filter"],
            ["context full", "model_context_window_exceeded", [], "length"],
            ["nothing told", None, [], "stop"],
            ["nothing told, calls", None, [called("1")], "tool_calls"],
            ["empty", "", [called("1")], "tool_calls"],
            ["no text", 5, [], "stop"],
        ),
    )
    def test_finish_reason(self, told, calls, reason):
        choice = {"message": {"tool_calls": calls}, "finish_reason": told}
        assert puter.reply_from_driver({"result": choice}, "m").finish_reason == reason
        # Claude's own word counts before Puter's
        own = {"message": {**choice["message"], "stop_reason": told}, "finish_reason": "stop"}
        if told:
            assert puter.reply_from_driver({"result": own}, "m").finish_reason == reason

    @pytest.mark.parametrize(
        ("arguments", "raw"),
        table(
            ["half", '{"city": "Par', '{"city": "Par'],
            ["two", "{}{}", "{}{}"],
            ["list", "[1]", "[1]"],
            ["list, decoded", [1], "[1]"],
            ["number", 5, "5"],
            ["too deep", "[" * 200_000, "[" * 200_000],
            ["a number too long for Python", "9" * 5_000, "9" * 5_000],
            ["no number", '{"x": NaN}', '{"x": NaN}'],
        ),
    )
    def test_broken_arguments_keep_their_text(self, arguments, raw):
        call = puter.ToolCall("1", "f", {}, invalid=raw)
        one, other = called("1", "f", arguments), used("1", "f", arguments)
        for message in ({"tool_calls": [one]}, {"content": [other]}):
            reply = puter.reply_from_driver({"result": {"message": message}}, "m")
            assert reply.tool_calls == (call,)
        line = stream_line("tool_use", id="1", name="f", input=arguments)
        event = delta(tool_calls=[one]) if isinstance(arguments, str) else None
        for chunks, error, reply in (
            decoded(line, USAGE_LINE),
            *([heard(event, "[DONE]")] if event else []),
        ):
            assert (error, reply.tool_calls, chunks[0].tool_call) == (None, (call,), call)

    @pytest.mark.parametrize(
        "call_ids", [["", ""], [None, None], ["a", "a"], ["a", ""], ["call_1", "call_1", "call_1"]]
    )
    def test_every_call_has_an_id_of_its_own(self, call_ids):
        calls = [called(one, f"f{n}") for n, one in enumerate(call_ids)]
        lines = [stream_line("tool_use", id=one, name="f", input={}) for one in call_ids]
        events = [delta(tool_calls=[{"index": n, **call}]) for n, call in enumerate(calls)]
        body = {"result": {"message": {"tool_calls": calls}}}
        whole = puter.reply_from_driver(body, "m")
        for reply, chunks in (
            (whole, puter.chunks_of(whole)),
            decoded(*lines, USAGE_LINE)[::-2],
            heard(*events, "[DONE]")[::-2],
        ):
            made = [call.id for call in reply.tool_calls]
            assert all(made) and len(set(made)) == len(call_ids)
            assert made[0] == (call_ids[0] or made[0])
            assert [c.tool_call.id for c in chunks if c.tool_call] == made
            message = puter.message_from(reply)
            assert [call["id"] for call in message["tool_calls"]] == made

    @pytest.mark.parametrize(
        ("error", "kind", "words"),
        table(
            ["by its code", {"code": "insufficient_funds", "message": "Broke"}, puter.CreditError, "Broke"],
            ["by a status as code", {"code": 429, "message": "Slow down"}, puter.RateLimitError, "Slow down"],
            ["by no code", {"message": "Overloaded"}, puter.ServerError, "Overloaded"],
            ["a text", "Overloaded", puter.ServerError, "Overloaded"],
        ),
    )  # fmt: skip
    def test_an_error_in_a_good_answer(self, error, kind, words):
        for read in (puter.reply_from_driver, puter.reply_from_openai):
            with pytest.raises(kind, match=words):
                read({"error": error}, "m")
        with pytest.raises(kind, match=words):
            puter.models_from({"error": error})

    @pytest.mark.parametrize(
        ("read", "body"),
        table(
            ["no result", puter.reply_from_driver, {}],
            ["result of a text", puter.reply_from_driver, {"result": "hi"}],
            ["no message", puter.reply_from_driver, {"result": {}}],
            ["message of a text", puter.reply_from_driver, {"result": {"message": "hi"}}],
            ["part of a text", puter.reply_from_driver, {"result": {"message": {"content": ["a"]}}}],
            ["call of a text", puter.reply_from_driver, {"result": {"message": {"tool_calls": ["f"]}}}],
            ["function of a text", puter.reply_from_driver, {"result": {"message": {"tool_calls": [{"function": "f"}]}}}],
            ["call without name", puter.reply_from_driver, {"result": {"message": {"tool_calls": [{"function": {}}]}}}],
            ["number of calls", puter.reply_from_driver, {"result": {"message": {"tool_calls": 5}}}],
            ["nothing", puter.reply_from_openai, {}],
            ["no choices", puter.reply_from_openai, {"choices": []}],
            ["choices of an object", puter.reply_from_openai, {"choices": {}}],
            ["choice of a text", puter.reply_from_openai, {"choices": ["hi"]}],
            ["choice without message", puter.reply_from_openai, {"choices": [{}]}],
        ),
    )  # fmt: skip
    def test_no_reply(self, read, body):
        with pytest.raises(puter.ReplyError) as caught:
            read(body, "m")
        assert caught.value.raw == json.dumps(body)

    @pytest.mark.parametrize(
        ("metadata", "answered"),
        table(
            ["named", {"providerUsed": "openrouter:m"}, "openrouter:m"],
            ["not named", {}, "m"],
            ["no metadata", None, "m"],
        ),
    )
    def test_the_model_that_answered_is_named(self, metadata, answered):
        body = {"result": {"message": {"content": "hi"}}, "metadata": metadata}
        assert puter.reply_from_driver(body, "m").model == answered
        body = {"choices": [{"message": {"content": "hi"}}], "model": "m-1"}
        assert puter.reply_from_openai(body, "m").model == "m-1"

    @pytest.mark.parametrize(
        "indexes", [(None, None), (0, 1), (1, 0)], ids=["none", "in order", "the other way round"]
    )
    def test_of_several_choices_one_is_the_reply(self, indexes):
        texts = ("other", "one") if indexes[0] == 1 else ("one", "other")
        said = [{"index": i, "message": {"content": t}} for i, t in zip(indexes, texts)]
        assert puter.reply_from_openai({"choices": [*said, "none"]}, "m").text == "one"
        frames = [{"index": i, "delta": {"content": t}} for i, t in zip(indexes, texts)]
        if indexes[0] is not None:
            _, error, reply = heard(json.dumps({"choices": frames}), "[DONE]")
            assert (error, reply.text) == (None, "one")
            _, error, reply = heard(*(json.dumps({"choices": [f]}) for f in frames), "[DONE]")
            assert (error, reply.text) == (None, "one")

    def test_a_reply_as_a_message(self):
        call = puter.ToolCall("1", "f", {"x": 1})
        said = {"role": "assistant", "content": None, "tool_calls": [puter.openai_call(call)]}
        assert puter.message_from(puter.Reply(" \n", tool_calls=(call,))) == said
        assert puter.message_from(puter.Reply(" ")) == assistant(" ")

    @pytest.mark.parametrize(
        "metadata",
        table(
            ["fake", {"service_used": "fake-chat", "providerUsed": "fake"}],
            pytest.param({"service_used": "fake-chat"}, id="only the service"),
        ),
    )
    def test_a_blocked_prompt_is_no_answer(self, metadata):
        body = {"result": {"message": {"content": "Lorem"}}, "metadata": metadata}
        with pytest.raises(puter.BadRequestError, match="blocked") as caught:
            puter.reply_from_driver(body, "gpt-5-nano")
        assert caught.value.code == "prompt_blocked" and "gpt-5-nano" in str(caught.value)
        assert puter.reply_from_driver(body, "fake").text == "Lorem"

    def test_a_whole_reply_as_chunks(self):
        call = puter.ToolCall("1", "f", {})
        reply = puter.Reply("a", "r", (call,), usage=puter.Usage(1))
        assert puter.chunks_of(reply) == [
            puter.Chunk("reasoning", "r"),
            puter.Chunk("text", "a"),
            puter.Chunk("tool_call", tool_call=call),
            puter.Chunk("usage", usage=puter.Usage(1)),
        ]
        assert puter.chunks_of(puter.Reply()) == [puter.Chunk("usage", usage=puter.Usage())]

    # ---- the catalogue and the credit ----

    def test_models(self):
        paid = model_entry(
            "claude-1",
            puterId="anthropic:claude-1",
            name="Claude 1",
            provider="claude",
            aliases=["claude", "claude-1", "claude"],
            context=200,
            max_tokens=100,
            modalities={"input": ["text", "image"], "output": ["text"]},
            tool_call=True,
            release_date="2025-11-01",
            costs={"tokens": 1_000_000, "prompt": 300, "completion": 1500, "x": None},
        )
        (found,) = puter.models_from({"models": [paid]})
        assert found == (
            puter.Model(
                id="claude-1",
                name="Claude 1",
                provider="claude",
                aliases=("anthropic:claude-1", "claude"),
                context=200,
                max_tokens=100,
                inputs=("text", "image"),
                tools=True,
                free=False,
                input_usd_per_million=3.0,
                output_usd_per_million=15.0,
                released="2025-11-01",
            )
        )

    @pytest.mark.parametrize(
        ("entry", "free", "price"),
        table(
            ["nothing to pay", model_entry("m"), True, 0.0],
            ["one price", model_entry("m", costs={"prompt": 0, "image": 1}), False, 0.0],
            ["per thousand", model_entry("m", costs={"tokens": 1000, "prompt": 1}), False, 10.0],
            ["no prices", model_entry("m", costs={"tokens": 1_000_000}), False, None],
            ["no costs", model_entry("m", costs=None), False, None],
            ["no key", model_entry("m", input_cost_key=None), True, None],
            ["a price beyond belief", model_entry("m", costs={"prompt": 10**400}), False, None],
            ["a price in words", model_entry("m", costs={"prompt": "300", "completion": 0}), False, None],
            ["an unknown price", model_entry("m", costs={"prompt": 0, "completion": None}), False, 0.0],
            ["only an id", {"id": "m"}, False, None],
        ),
    )  # fmt: skip
    def test_prices(self, entry, free, price):
        found = puter.models_from({"models": [entry]})
        assert [(m.free, m.input_usd_per_million) for m in found] == (
            [(free, price)] if free is not None else []
        )

    def test_what_is_no_number_or_list_is_not_known(self):
        entry = model_entry("m", context="8k", max_tokens=True, aliases="gpt")
        (found,) = puter.models_from({"models": [entry]})
        assert (found.context, found.max_tokens, found.aliases) == (None, None, ())
        assert puter.can_do(found, puter.Needs(context=10))

    def test_model_ids_alone_and_openai_lists(self):
        assert ids(puter.models_from({"models": ["a", "b"]})) == ["a", "b"]
        assert puter.models_from({"models": [{"id": "m"}]}) == (puter.Model("m", name="m"),)
        data = {"object": "list", "data": [{"id": "a", "owned_by": "x"}]}
        assert puter.models_from(data) == (puter.Model("a", "a", "x"),)

    @pytest.mark.parametrize(
        "body",
        table(
            ["nothing", None],
            ["text", "<html>"],
            ["no list", {}],
            ["list of numbers", {"models": [1]}],
            ["bare list", ["a"]],
        ),
    )
    def test_no_models(self, body):
        with pytest.raises(puter.ServerError, match="unknown format"):
            puter.models_from(body)

    def test_the_real_catalogue(self):
        body = recorded("catalogue.json")
        models = puter.models_from(body)
        assert ids(models) == [entry["id"] for entry in body["models"]]
        assert all(m.provider and m.inputs and m.context for m in models)
        assert all(m.input_usd_per_million is not None for m in models)
        opus = models.find("puter/Claude-Opus-4-5")
        assert opus.id == "claude-opus-4-5-20251101"
        assert opus.provider == "claude"
        qvq = models.find("qvq-max")
        assert (qvq.input_usd_per_million, qvq.output_usd_per_million) == (1.2, 4.8)
        assert [models.find(m.id).id for m in models] == ids(models)

    @pytest.mark.parametrize(("unit", "scale"), [("usd", 100_000_000), ("credits", 1)])
    def test_credit(self, unit, scale):
        info = {"remaining": 150 * scale, "monthUsageAllowance": 200 * scale}
        used = {"total": 50 * scale, "chat:in": {"cost": 50 * scale, "units": 7, "count": 2}}
        more = {"unit": unit} if unit == "credits" else {}
        body = {"usage": used, "allowanceInfo": {**info, **more}}
        by_api = {"chat:in": (50.0, 7.0, 2)}
        assert puter.credit_from(body) == puter.Credit(unit, 200.0, 150.0, 50.0, by_api, body)

    @pytest.mark.parametrize(
        "body",
        table(
            ["nothing else", {"allowanceInfo": {"remaining": 0}}],
            ["nulls", {"usage": None, "allowanceInfo": {"remaining": None}}],
            ["no total", {"usage": {"x": 1}, "allowanceInfo": {"remaining": 0}}],
            ["texts", {"usage": {"total": "1"}, "allowanceInfo": {"remaining": 10**400}}],
            pytest.param({"usage": {"x": {"cost": None}}, "allowanceInfo": {"remaining": 0}}, id="cost of null"),
        ),
    )  # fmt: skip
    def test_a_short_usage_report(self, body):
        credit = puter.credit_from(body)
        assert (credit.allowance, credit.remaining, credit.used) == (0.0, 0.0, 0.0)

    @pytest.mark.parametrize(
        "body", [None, "x", {}, {"allowanceInfo": None}, {"allowanceInfo": {}}]
    )
    def test_no_usage_report(self, body):
        with pytest.raises(puter.ServerError, match="unknown format"):
            puter.credit_from(body)

    def test_the_recorded_usage_report(self):
        credit = puter.credit_from(recorded_answer("usage")["json"])
        assert (credit.unit, credit.allowance, credit.used) == ("usd", 0.25, 0.0)


# =============================================================================
# Stream decoders
# =============================================================================
class TestStreamDecoders:
    # ---- Puter's lines ----

    def test_every_kind_of_line(self):
        call = puter.ToolCall("1", "f", {"x": 1}, THOUGHT_SIGNATURE)
        note = {"type": "extra_content", "extra_content": {"a": 1}}
        chunks, error, reply = decoded(
            stream_line("reasoning", reasoning="r"),
            stream_line("text", text="a"),
            stream_line(
                "tool_use",
                id="1",
                name="f",
                input={"x": 1},
                text="",
                extra_content=THOUGHT_SIGNATURE,
            ),
            stream_line("extra_content", extra_content={"a": 1}),
            stream_line("text", text="b"),
            USAGE_LINE,
        )
        usage = puter.Usage(11, 22, None, 33)
        assert error is None
        assert chunks == [
            puter.Chunk("reasoning", "r"),
            puter.Chunk("text", "a"),
            puter.Chunk("tool_call", tool_call=call),
            puter.Chunk("text", "b"),
            puter.Chunk("usage", usage=usage),
        ]
        assert reply == puter.Reply(
            "ab", "r", (call,), "tool_calls", usage, "m", raw={"extra": [note]}
        )

    @settings(deadline=None, max_examples=200)
    @given(st.lists(LINES, max_size=6).map(b"".join), st.lists(st.integers(0), max_size=8))
    @example("é日🦊\u2028\u2029\x85".encode().join([b'{"type":"text","text":"', b'"}\n']), [])
    def test_cuts_change_nothing(self, data, places):
        whole = values_of(data)
        assert values_of(*cut(data, places)) == whole
        assert values_of(*(data[n : n + 1] for n in range(len(data)))) == whole

    def test_chunks_come_as_soon_as_their_line_is_whole(self):
        decoder = puter.LineDecoder("m")
        assert decoder.feed(b'{"type":"text",') == []
        assert decoder.feed(b'"text":"a"}\n{"type"') == [puter.Chunk("text", "a")]
        assert decoder.reply().text == "a"
        assert not decoder.whole
        assert decoder.feed(b':"usage"}\n') == [puter.Chunk("usage", usage=puter.Usage())]
        assert decoder.whole

    @pytest.mark.parametrize(
        ("usage", "meant"),
        table(
            ["numbers", {"usage": {"prompt": 1}}, puter.Usage(1, None, None, 1)],
            ["empty", {"usage": {}}, puter.Usage()],
            ["null", {"usage": None}, puter.Usage()],
            ["missing", {}, puter.Usage()],
        ),
    )
    def test_any_usage_line_ends_a_reply(self, usage, meant):
        chunks, error, reply = decoded(stream_line("text", text="a"), stream_line("usage", **usage))
        assert error is None
        assert chunks[-1] == puter.Chunk("usage", usage=meant)
        assert reply.usage == meant

    @pytest.mark.parametrize(
        "data",
        [
            b"\n \r\n" + stream_line("text", text="a").replace(b"\n", b"\r\n"),
            b'{"type":\r"text",\r"text":"a"}\n',
        ],
    )
    def test_only_a_line_feed_ends_a_line(self, data):
        assert [decoded(data + USAGE_LINE)[2].text, decoded(data + USAGE_LINE)[1]] == ["a", None]

    def test_a_note_on_a_line_of_its_own_is_the_first_calls(self):
        calls = [stream_line("tool_use", id=name, name=name, input={}) for name in ("a", "b")]
        notes = [stream_line("extra_content", extra_content={"n": n}) for n in (1, 2)]
        _, error, reply = decoded(*calls, *notes, USAGE_LINE)
        assert error is None
        found = [(call.name, call.extra_content) for call in reply.tool_calls]
        assert found == [("a", {"n": 1}), ("b", None)]

    def test_a_last_line_without_its_end_counts_when_it_is_whole(self):
        _, error, reply = decoded(stream_line("text", text="a") + USAGE_LINE[:-1])
        assert (error, reply.text) == (None, "a")

    @pytest.mark.parametrize(
        ("pieces", "whole"),
        table(
            ["two halves", ["a\ud83e", "\udd8ab"], "a🦊b"],
            ["apart", ["\ud83e", "", "\udd8a"], "🦊"],
            ["whole pairs", ["🦊", "\ud83e\udd8a"], "🦊🦊"],
            ["a half at the end", ["a", "b\ud83e"], "ab\ufffd"],
            ["a first half alone", ["a\ud83e", "b"], "a\ufffdb"],
            ["a second half alone", ["a\udd8a", "b"], "a\ufffdb"],
            ["the wrong way round", ["\udd8a", "\ud83e", "\ud83e"], "\ufffd\ufffd\ufffd"],
            ["null", [None, "a", None], "a"],
        ),
    )
    def test_halves_of_an_emoji_are_joined(self, pieces, whole):
        lines = [escaped_line(p, kind) for p in pieces for kind in ("text", "reasoning")]
        events = [delta(content=p, reasoning=p) for p in pieces]
        refusals = [delta(refusal=p, reasoning_content=p) for p in pieces]
        for chunks, error, reply in (
            decoded(*lines, USAGE_LINE),
            decoded(b"".join(lines) + USAGE_LINE),
            heard(*events, "[DONE]"),
            heard(*refusals, "[DONE]"),
        ):
            assert error is None
            assert (reply.text, reply.reasoning) == (whole, whole)
            for kind in ("text", "reasoning"):
                assert "".join(c.text for c in chunks if c.type == kind) == whole
            assert "".join(c.text for c in chunks).isprintable()  # no half, anywhere

    def test_a_half_that_waits_is_no_part_of_the_reply_yet(self):
        decoder = puter.LineDecoder("m")
        assert "".join(map(str, decoder.feed(escaped_line("a\ud83e")))) == "a"
        assert decoder.reply().text == "a"
        assert "".join(map(str, decoder.feed(escaped_line("\udd8a")))) == "🦊"

    def test_the_last_usage_counts(self):
        usages = [stream_line("usage", usage={"prompt": n}) for n in (1, 2)]
        assert decoded(*usages)[2].usage.input_tokens == 2
        frames = [json.dumps({"choices": [], "usage": {"prompt_tokens": n}}) for n in (1, 2)]
        assert heard(*frames, '{"usage": null}', "[DONE]")[2].usage.input_tokens == 2

    def test_a_huge_number_costs_no_answer(self):
        huge = b'{"type":"usage","usage":{"prompt":%b}}\n' % (b"9" * 5_000)
        _, error, reply = decoded(stream_line("text", text="a"), huge)
        assert (error, reply.text, reply.usage.input_tokens) == (None, "a", None)

    @pytest.mark.parametrize(
        ("data", "words"),
        table(
            ["nothing at all", b"", "the connection ended before"],
            ["no usage line", stream_line("text", text="b"), "the connection ended before"],
            ["half a line", b'{"type":"te', 'the last line is cut off: \'{"type":"te\''],
            ["half a usage line", USAGE_LINE[:-3], "the last line is cut off"],
            ["half a line after the end", USAGE_LINE + b"{", "the last line is cut off"],
            ["error line", stream_line("error", message="gone"), "gone"],
            ["error line of an object", stream_line("error", message={"a": 1}), "{'a': 1}"],
            ["error line without words", stream_line("error"), "gave no reason"],
            ["lines after an error", stream_line("error", message="gone") + USAGE_LINE, "gone"],
            ["no JSON", b"<html>\n", "not what Puter sends: '<html>'"],
            ["two objects in a line", USAGE_LINE[:-1] + USAGE_LINE, "not what Puter sends"],
            ["no UTF-8", b'{"type":"text","text":"\xff"}\n', "not what Puter sends"],
            ["list", b"[]\n", "not what Puter sends"],
            ["text", b'"type"\n', "not what Puter sends"],
            ["null", b"null\n", "not what Puter sends"],
            ["no type", b"{}\n", "not what Puter sends"],
            ["too deep", b"[" * 200_000 + b"\n", "not what Puter sends"],
            ["text without text", stream_line("text"), "not what Puter sends"],
            ["reasoning without any", stream_line("reasoning"), "not what Puter sends"],
            ["call without name", stream_line("tool_use", id="1", input={}), "not what"],
        ),
    )  # fmt: skip
    def test_a_broken_stream(self, data, words):
        chunks, error, reply = decoded(stream_line("text", text="a"), data)
        assert isinstance(error, puter.StreamError)
        assert error.message.startswith("The reply of m broke off: ")
        assert words in error.message
        assert len(error.message) < 300
        assert error.model == "m"
        assert chunks[0] == puter.Chunk("text", "a")
        assert reply.text.startswith("a")

    def test_nothing_counts_after_a_fault(self):
        late = stream_line("error", message="gone") + stream_line("text", text="b") + USAGE_LINE
        for pieces in ([late], late.splitlines(keepends=True)):
            chunks, error, reply = decoded(stream_line("text", text="a"), *pieces)
            assert chunks == [puter.Chunk("text", "a")]
            assert reply.text == "a"
            assert error is not None and "gone" in error.message
        _, error, _ = decoded(b"x\n", b"y\n", b"half")
        assert error is not None and "'x'" in error.message

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(stream_line("text", text=5), id="text of a number"),
            pytest.param(b'{"type":"usage","usage":{"prompt":%b}}\n' % (b"9" * 400), id="huge usage"),
            pytest.param(b'{"type":"usage","usage":{"prompt":1e999}}\n', id="endless usage"),
            pytest.param(b'{"type":"usage","usage":{"prompt":NaN}}\n', id="usage of NaN"),
        ],
    )  # fmt: skip
    def test_a_value_of_the_wrong_kind_breaks_nothing(self, data):
        chunks, _, reply = decoded(stream_line("text", text="a"), data)
        assert reply.text == "a"
        assert all(isinstance(str(chunk), str) for chunk in chunks)

    @pytest.mark.parametrize(
        "pieces",
        table(
            ["bit by bit", [b"x" * 20] * 6],
            ["all at once", [b"x" * 120]],
            ["behind a good one", [USAGE_LINE + b"x" * 120, b"\n"]],
        ),
    )
    def test_a_line_without_end_is_refused(self, monkeypatch, pieces):
        monkeypatch.setattr(puter, "MAX_LINE_BYTES", 100)
        _, error, _ = decoded(*pieces)
        assert error is not None
        assert "a line is longer than 100 bytes" in error.message

    def test_a_line_of_the_greatest_length_is_taken(self, monkeypatch):
        monkeypatch.setattr(puter, "MAX_LINE_BYTES", len(USAGE_LINE) - 1)
        assert decoded(*(USAGE_LINE[n : n + 1] for n in range(99)))[1] is None

    @pytest.mark.parametrize("name", ["text", "reason", "empty", "tools"])
    def test_recorded_streams_say_what_whole_replies_say(self, name):
        lines = recorded_answer(f"stream: {name}")["lines"]
        whole = recorded_answer(f"complete: {name}")["json"]
        chunks, error, reply = decoded("".join(f"{one}\n" for one in lines).encode())
        meant = puter.reply_from_driver(whole, "m")
        assert error is None
        assert dataclasses.replace(reply, raw=meant.raw, model=meant.model) == (
            dataclasses.replace(meant, reasoning=reply.reasoning)
        )
        assert bool(reply.reasoning) == bool(meant.reasoning)
        assert "".join(map(str, chunks)) == meant.text

    # ---- events of OpenAI's kind ----

    def test_every_kind_of_event(self):
        chunks, error, reply = heard(
            json.dumps({"model": "m-1", "choices": [{"delta": {"role": "assistant"}}]}),
            delta(reasoning_content="r"),
            delta(reasoning="s"),
            delta(content="a"),
            delta(content=""),
            call_delta(0, '{"x"', id="1", name="f"),
            call_delta(1, "", id="2", name="g"),
            call_delta(0, ": 1}"),
            delta(content="b"),
            json.dumps({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}),
            json.dumps({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}),
            " [DONE]\n",
        )
        calls = (puter.ToolCall("1", "f", {"x": 1}), puter.ToolCall("2", "g", {}))
        usage = puter.Usage(1, 2, None, 3)
        assert error is None
        assert chunks == [
            puter.Chunk("reasoning", "r"),
            puter.Chunk("reasoning", "s"),
            puter.Chunk("text", "a"),
            puter.Chunk("text", "b"),
            *(puter.Chunk("tool_call", tool_call=call) for call in calls),
            puter.Chunk("usage", usage=usage),
        ]
        assert reply == puter.Reply("ab", "rs", calls, "tool_calls", usage, "m-1")

    @settings(deadline=None)
    @given(ARGUMENTS, st.lists(st.integers(0), max_size=6))
    def test_arguments_cut_anywhere(self, given, places):
        text = json.dumps(given)  # ASCII alone: any cut leaves whole characters
        pieces = [piece.decode() for piece in cut(text.encode(), places)]
        head, *rest = pieces
        _, error, reply = heard(
            call_delta(0, head, id="1", name="f", extra_content=THOUGHT_SIGNATURE),
            *(call_delta(0, piece) for piece in rest),
            "[DONE]",
        )
        assert error is None
        assert reply.tool_calls == (puter.ToolCall("1", "f", given, THOUGHT_SIGNATURE),)

    @pytest.mark.parametrize(
        ("finish", "reason"),
        table(["length", "length", "length"], ["stop", "stop", "stop"], ["nothing", None, "stop"]),
    )
    def test_finish_reason(self, finish, reason):
        end = json.dumps({"choices": [{"delta": None, "finish_reason": finish}]})
        assert heard(delta(content="a"), end, "[DONE]")[2].finish_reason == reason

    @pytest.mark.parametrize(
        ("given", "names"),
        table(
            ["ids", [("1", "f"), ("2", "f"), ("3", "g")], "ffg"],
            ["names", [("", "f"), ("", "g"), (None, "h")], "fgh"],
            ["nothing", [("", "f"), ("", "f"), (None, "f")], "fff"],
            ["one id", [("1", "f"), ("1", "g")], "fg"],
        ),
    )
    def test_calls_under_one_index_are_kept_apart(self, given, names):
        # Some gateways send each call whole, and every one under index 0 or none.
        for cut_at, index in itertools.product((0, 4, 8), (0, None)):
            pieces = []
            for n, (call_id, name) in enumerate(given):
                arguments = json.dumps({"x": n})
                cuts = [arguments] if cut_at == 8 else [arguments[:cut_at], arguments[cut_at:]]
                pieces.append(call_delta(index, cuts[0], id=call_id, name=name))
                pieces += [call_delta(index, rest) for rest in cuts[1:]]
            _, error, reply = heard(*pieces, "[DONE]")
            if cut_at == 8 or names != "fff":
                assert error is None
                found = [(call.name, call.arguments.get("x")) for call in reply.tool_calls]
                assert found == list(zip(names, range(9)))

    def test_a_call_whose_name_and_id_come_with_every_piece(self):
        for more in ({"id": "1", "name": "f"}, {"name": "f"}):
            pieces = [call_delta(0, text, **more) for text in ('{"x":', " 1", "}", "")]
            (call,) = heard(*pieces, "[DONE]")[2].tool_calls
            assert (call.name, call.arguments) == ("f", {"x": 1})

    def test_nothing_counts_after_the_end(self):
        call = call_delta(0, "{}", id="1", name="f")
        chunks, error, reply = heard(call, "[DONE]", delta(content="b"), "[DONE]")
        assert (error, reply.text, len(reply.tool_calls), len(chunks)) == (None, "", 1, 2)

    @pytest.mark.parametrize(
        ("event", "words", "code"),
        table(
            ["cut", None, "the connection ended before", None],
            ["half a JSON", '{"choices": [{"del', "not what an OpenAI endpoint", None],
            ["no JSON", "hello", "not what an OpenAI endpoint sends: 'hello'", None],
            ["list", "[1]", "not what an OpenAI endpoint sends", None],
            ["choice of null", '{"choices": [null]}', "not what an OpenAI", None],
            ["a number too long for Python", "9" * 5_000, "not what an OpenAI", None],
            ["too deep", "[" * 200_000, "not what an OpenAI endpoint sends", None],
            ["error", '{"error": {"message": "gone", "code": "x"}}', "gone", "x"],
            ["error of a text", '{"error": "gone"}', "gone", None],
            ["error without words", '{"error": {"code": "x"}}', "{'code': 'x'}", "x"],
            pytest.param('{"error": {"message": "gone", "code": 429}}', "gone", None, id="error with a number"),
        ),
    )  # fmt: skip
    def test_a_broken_event_stream(self, event, words, code):
        events = [delta(content="a"), *([event] if event else [])]
        chunks, error, reply = heard(*events)
        assert isinstance(error, puter.StreamError)
        assert error.message.startswith("The reply of m broke off: ")
        assert words in error.message
        assert error.code == code
        assert chunks == [puter.Chunk("text", "a")]
        assert reply.text == "a"

    def test_a_content_of_the_wrong_kind_breaks_nothing(self):
        assert heard(delta(content="a"), delta(content=5))[2].text == "a"

    @pytest.mark.parametrize("name", ["text", "tools", "reason"])
    def test_recorded_event_streams(self, name):
        events = recorded_answer(f"openai endpoint, stream: {name}")["text"]
        whole = recorded_answer(f"openai endpoint, complete: {name}")["json"]
        data = [e.removeprefix("data: ") for e in events.split("\n\n") if e]
        _, error, reply = heard(*data)
        assert error is None
        meant = puter.reply_from_openai(whole, "m")
        assert dataclasses.replace(meant, raw={}) == reply


# =============================================================================
# Policies
# =============================================================================
# The wire's table of errors: whose fault each is, and whether waiting may help.
WIRE_ERRORS = table(
    *(
        [code, 401, code, puter.AuthError, "account", False]
        for code in ("token_missing", "reauth_required", "token_auth_failed")
    ),
    ["insufficient_funds", 402, "insufficient_funds", puter.CreditError, "account", False],
    ["subscription_required", 402, "subscription_required", puter.SubscriptionError, "request", False],
    ["permission_denied", 403, "permission_denied", puter.ModelAccessError, "model", False],
    *(
        [code, 403, code, puter.AccessError, "account", False]
        for code in ("forbidden", "account_is_not_verified", "account_suspended", "new_one")
    ),
    ["app_or_api_token_required", 403, "app_or_api_token_required", puter.AuthError, "account", False],
    ["too_many_requests", 429, "too_many_requests", puter.RateLimitError, "account", True],
    ["upstream_rate_limited", 429, "upstream_rate_limited", puter.ModelRateLimitError, "model", False],
    ["upstream_provider_unavailable", 400, "upstream_provider_unavailable", puter.ModelUnavailableError, "model", True],
    ["upstream_failed", 400, "upstream_failed", puter.ModelUnavailableError, "model", True],
    ["upstream_auth_failed", 500, "upstream_auth_failed", puter.ProviderAuthError, "model", False],
    ["upstream_bad_request", 400, "upstream_bad_request", puter.BadRequestError, "request", False],
    ["bad_request", 400, "bad_request", puter.BadRequestError, "request", False],
    ["not_found", 404, "not_found", puter.BadRequestError, "request", False],
    ["too large", 413, None, puter.BadRequestError, "request", False],
    ["internal_error", 500, "internal_error", puter.ServerError, "server", True],
    *([str(s), s, None, puter.ServerError, "server", True] for s in (500, 502, 503, 504)),
    ["401", 401, None, puter.AuthError, "account", False],
    ["402", 402, None, puter.CreditError, "account", False],
    ["403", 403, None, puter.AccessError, "account", False],
    ["408", 408, None, puter.RequestTimeoutError, "server", True],
    ["429", 429, None, puter.RateLimitError, "account", True],
    ["418", 418, "teapot", puter.BadRequestError, "request", False],
    # An OpenAI endpoint's own words.
    ["invalid_api_key", 401, "invalid_api_key", puter.AuthError, "account", False],
    ["model_not_found", 404, "model_not_found", puter.ModelNotFoundError, "request", False],
)  # fmt: skip


def waits(
    error: puter.PuterError, base_s: float, max_retries: int = 3, enough: int = 1_000
) -> list[float]:
    """The waits before each new try while the same error comes back, `enough` at most."""
    delays: list[float] = []
    while len(delays) < enough and puter.may_retry(
        error, len(delays), max_retries, True, sum(delays)
    ):
        delays.append(puter.retry_delay_s(error, len(delays) + 1, base_s, rand=lambda: 0.0))
    return delays


FREE_MODEL = model("a:free", "a-free", free=True)
PAID = model("paid", "paid-alias", "PAID-2")
SMALL_CATALOGUE = puter.ModelList(
    [
        FREE_MODEL,
        PAID,
        model("eyes:free", free=True, inputs=("text", "image"), tools=False),
        model("blind:free", free=True, inputs=("text",), tools=True, provider="openrouter"),
        model("small:free", free=True, context=100),
    ]
)


# ---- whom to ask next: the specification of fallback and rotation ----
#
# The models: `ask` costs money, f1 to f6 are free and say so in their names, s is free by the
# list alone. f1 to f3 are of one provider, all others of others.
TARGET_MODELS = puter.ModelList(
    [
        model("ask", "ask-alias", provider="x"),
        *(model(f"f{n}:free", free=True, provider="pppqqq"[n - 1]) for n in range(1, 7)),
        model("s", free=True, provider="s"),
    ]
)
TARGET_FAULTS: dict[str, Callable[[], puter.PuterError]] = {
    "down": lambda: puter.ModelUnavailableError(""),
    "limit": lambda: puter.ModelRateLimitError(""),
    "denied": lambda: puter.ModelAccessError(""),
    "key": lambda: puter.ProviderAuthError(""),
    "busy": lambda: puter.RateLimitError(""),
    "dead": lambda: puter.AuthError(""),
    "credit": lambda: puter.CreditError(""),
    "dear": lambda: puter.CreditError("", scope="model"),
    "long": lambda: puter.ContextLengthError("", tokens=9),
    "unknown": lambda: puter.ModelNotFoundError(""),
}
FIVE_FAIL = "a/f1:key a/f2:key a/f3:key a/f4:key a/f5:key"
# Accounts, who is on cooldown since second 90 (an account, or a model on it, and why), what was
# tried, and whom to ask at second 100: "waits" out limits, and not before second "@". More: the
# asked name, `fallback`, and fields of the world or its settings.
TARGETS = table(
    ["nobody is there", "", "", "", None, {}],
    ["the asked model, on the first account", "ab", "", "", "a/ask", {}],
    ["on the current one", "ab", "", "", "b/ask", {"current": "b"}],
    ["the only one waits out limits", "a", "", "", "a/ask waits", {}],
    # the model is at fault
    ["its first fallback, on the same account", "ab", "", "a/ask:down", "a/f1", {}],
    ["its limit", "ab", "", "a/ask:limit", "a/f1", {}],
    ["not for this account", "ab", "", "a/ask:denied", "a/f1", {}],
    ["its answer costs more than is left", "ab", "", "a/ask:dear", "a/f1", {}],
    ["a prompt too long for Puter's limit of it", "ab", "", "a/ask:long", "a/f1", {}],
    ["the next fallback", "a", "", "a/ask:down a/f1:key", "a/f2 waits", {}],
    ["a fallback that nobody knows", "ab", "", "a/ask:down a/f1:unknown", "a/f2", {}],
    ["a provider that refused twice is skipped", "ab", "", "a/ask:limit a/f1:limit a/f2:limit", "a/f4", {}],
    ["not more than five", "ab", "", f"a/ask:down {FIVE_FAIL}", None, {}],
    ["late, none is begun", "ab", "", "a/ask:down", None, {"elapsed_s": 121.0}],
    ["without fallback", "ab", "", "a/ask:down", None, {"fallback": False}],
    ["an unknown name", "ab", "", "a/ask:unknown", None, {}],
    ["the user's own list comes first", "ab", "", "a/ask:down", "a/s", {"fallback_models": ("s",)}],
    # a list that could not be fetched: what it calls free may cost by now
    ["stale: names that say free", "ab", "", "a/ask:down a/f1:key a/f2:key a/f3:key a/f4:key", "a/f5", {"is_stale": True}],
    ["stale: no other", "ab", "", "a/ask:down", None, {"is_stale": True, "models": TARGET_MODELS[7:]}],
    ["fresh: that, too", "ab", "", "a/ask:down", "a/s", {"models": TARGET_MODELS[7:]}],
    ["stale: the user's own", "ab", "", "a/ask:down", "a/s", {"is_stale": True, "fallback_models": ("s",)}],
    # the account is at fault
    ["the next account, asked model first", "ab", "", "a/ask:busy", "b/ask", {}],
    ["no credit", "ab", "", "a/ask:credit", "b/ask", {}],
    ["a dead token: the last one waits out limits", "ab", "a:login", "a/ask:dead", "b/ask waits", {}],
    ["found out at a fallback", "ab", "", "a/ask:down a/f1:busy", "b/ask", {}],
    ["in order, round the end", "abc", "", "c/ask:busy", "a/ask", {"current": "c"}],
    ["late: the next account all the same", "ab", "", "a/ask:busy", "b/ask", {"elapsed_s": 121.0}],
    ["one on cooldown is passed over", "abc", "b:busy", "a/ask:busy", "c/ask", {}],
    ["nobody has credit", "ab", "", "a/ask:credit b/ask:credit", None, {}],
    ["one that is gone by now", "ab", "", "z/ask:busy", "a/ask", {}],
    # from the model to the next account
    ["another account may use it", "ab", "", f"a/ask:denied {FIVE_FAIL}", "b/ask", {}],
    ["without fallback, at once", "ab", "", "a/ask:denied", "b/ask", {"fallback": False}],
    ["what failed by itself is not asked again", "ab", "", "a/ask:denied a/f1:down a/f2:busy b/ask:denied", "b/f2", {}],
    ["five fallbacks on all accounts together", "ab", "", f"a/ask:denied {FIVE_FAIL} b/ask:denied", None, {}],
    # cooldowns
    ["alone, it is asked all the same", "a", "a:busy", "", "a/ask waits", {}],
    ["so is the last one alive", "ab", "a:busy b:login", "", "a/ask waits", {}],
    ["nobody is alive: the current one says so", "ab", "a:login b:login", "", "b/ask waits", {"current": "b"}],
    ["on cooldown for long", "ab", "a:forbidden b:forbidden", "", None, {}],
    ["the asked model rests: its fallback first", "ab", "a/ask:down", "", "a/f1", {}],
    ["known by another name", "ab", "a/ask:down", "", "a/f1", {"model": "ask-alias"}],
    ["on this account only", "ab", "b/ask:down", "", "a/ask", {}],
    ["without any fallback, despite its rest", "ab", "a/ask:down", "", "a/ask", {"fallback": False}],
    ["a fallback that rests is skipped", "ab", "a/f1:down", "a/ask:down", "a/f2", {}],
    # everybody is limited, for seconds
    ["the first whose window ends, once more", "ab", "a:busy b:busy", "a/ask:busy b/ask:busy", "a/ask waits @100", {}],
    ["before anybody was asked", "ab", "a:busy b:busy", "", "a/ask waits @100", {}],
    ["of what was not noted", "ab", "", "a/ask:busy b/ask:busy", "a/ask waits @100.25", {}],
    ["one that has a fault of its own is not", "ab", "", "a/ask:credit b/ask:busy", "b/ask waits @100.25", {}],
    ["its fallbacks then", "ab", "", "a/ask:busy b/ask:busy a/ask:down", "a/f1 waits", {}],
    ["never a third time", "ab", "", "a/ask:busy b/ask:busy a/ask:busy", None, {}],
    ["nor where it alone was asked", "ab", "b:forbidden", "a/ask:busy a/ask:busy", None, {}],
    ["nor the last one twice", "ab", "", "a/ask:credit b/ask:busy b/ask:busy", None, {}],
    ["nor without retries", "ab", "", "a/ask:busy b/ask:busy", None, {"max_retries": 0}],
)  # fmt: skip


def next_of(names: str, cooled: str, tried: str, given: JSON) -> str | None:
    """What `next_target` says, in the words of the table."""
    given = {"model": "ask", "fallback": True, "models": TARGET_MODELS, **given}
    full = {"busy": "too_many_requests"}
    cooldowns = []
    for where, _, why in (word.partition(":") for word in cooled.split()):
        who, _, name = where.partition("/")
        name = f"{name}:free" if name.startswith("f") else name
        cooldowns.append(puter.Cooldown(who, name, 400.0, 1, full.get(why, why), 90.0))
    attempts = []
    for where, _, why in (word.partition(":") for word in tried.split()):
        who, _, name = where.partition("/")
        name = f"{name}:free" if name.startswith("f") else name
        attempts.append(attempt(name, who, TARGET_FAULTS[why]()))
    asked = puter.Asked(given.pop("model"), {}, puter.Needs(), given.pop("fallback"))
    settings = {k: given.pop(k) for k in ("fallback_models", "max_retries") if k in given}
    world = puter.World(
        accounts=[account(name) for name in names],
        cooldowns=cooldowns,
        models=puter.ModelList(given.pop("models")),
        config=puter.Config(folder="/", **settings),
        now=100.0,
        **given,
    )
    target = puter.next_target(asked, attempts, world)
    if target is None:
        return None
    assert target.is_fallback is (target.model != asked.model)
    words = f"{target.account.username}/{target.model.removesuffix(':free')}"
    words += " waits" if target.waits_out_limits else ""
    return f"{words} @{target.not_before_s:g}" if target.not_before_s else words


class TestPolicies:
    # ---- what an error means ----

    @pytest.mark.parametrize(("status", "code", "kind", "scope", "retryable"), WIRE_ERRORS)
    def test_kind(self, status, code, kind, scope, retryable):
        body = {"error": "Bad luck", "message": "Bad luck", "code": code}
        error = puter.error_from(status, body)
        assert type(error) is kind
        assert (error.scope, error.retryable) == (scope, retryable)
        assert (error.status, error.code, error.message) == (status, code, "Bad luck")
        assert error.may_be_billed is (status in (504, 520, 522, 524))
        assert error.hint

    @pytest.mark.parametrize(
        ("status", "body", "kind", "message"),
        table(
            ["model of an unknown name", 400, {"message": "Model not found: x", "code": "bad_request"}, puter.ModelNotFoundError, "Model not found: x"],
            ["the same without code", 400, {"error": "Model not found: x"}, puter.ModelNotFoundError, "Model not found: x"],
            pytest.param(400, {"message": "Model not found: x", "code": "upstream_bad_request"}, puter.BadRequestError, "Model not found: x", id="the same of a provider"),
            ["old text", 403, {"message": "usage-limited-chat: no"}, puter.ModelAccessError, "usage-limited-chat: no"],
            ["old text under a code", 403, {"message": "usage-limited-chat", "code": "forbidden"}, puter.ModelAccessError, "usage-limited-chat"],
            ["old code", 400, {"code": "usage-limited-chat", "message": "no"}, puter.ModelAccessError, "no"],
            ["success false", 200, {"success": False, "error": {"code": "insufficient_funds", "message": "Empty", "status": 402}}, puter.CreditError, "Empty"],
            ["success false by status", 200, {"success": False, "error": {"message": "Slow", "status": 429}}, puter.RateLimitError, "Slow"],
            ["success false by text", 200, {"success": False, "error": "usage-limited-chat"}, puter.ModelAccessError, "usage-limited-chat"],
            ["OpenAI", 401, {"error": {"message": "No key", "type": "x", "code": "invalid_api_key"}}, puter.AuthError, "No key"],
            ["OpenAI with a null code", 429, {"error": {"message": "Slow", "code": None}}, puter.RateLimitError, "Slow"],
            ["page", 502, "<html><body><h1>502 Bad\nGateway</h1><hr></body></html>", puter.ServerError, "502 Bad Gateway"],
            ["page with a look", 502, "<style>p{x:y}</style><script>go()</script><p>Down &amp; out</p>", puter.ServerError, "Down & out"],
            ["text", 503, "Down", puter.ServerError, "Down"],
            ["nothing", 500, None, puter.ServerError, "The server answered 500 without saying why"],
            ["an outage under 400", 400, {"code": "upstream_failed", "message": "x"}, puter.ModelUnavailableError, "x"],
            ["a limit under 500", 500, {"code": "too_many_requests", "message": "x"}, puter.RateLimitError, "x"],
        ),
    )  # fmt: skip
    def test_shapes(self, status, body, kind, message):
        error = puter.error_from(status, body)
        assert (type(error), error.message) == (kind, message)

    def test_long_texts_are_shortened(self):
        assert len(puter.error_from(500, "x" * 10_000).message) <= 300
        assert len(puter.error_from(500, {"message": "x" * 10_000}).message) <= 2_000

    def test_what_else_an_error_holds(self):
        inside = {"message": "Empty", "status": 402, "code": "insufficient_funds"}
        assert puter.error_from(200, {"success": False, "error": inside}).status == 402
        error = puter.error_from(429, {"message": "Busy"}, retry_after_s=7.0)
        assert (error.message, error.retry_after_s) == ("Busy", 7.0)

    @pytest.mark.parametrize(
        ("attempts", "message"),
        table(
            ["one", [{"error": "429 slow down"}], "Busy (the provider said: 429 slow down)"],
            ["the last one", [{"error": "a"}, {"error": "b"}], "Busy (the provider said: b)"],
            ["the same words", [{"error": "Busy"}], "Busy"],
            ["in their JSON", [{"error": '429 {"error": {"message": "slow down"}}'}], "Busy (the provider said: slow down)"],
            ["no words", [{"status": 429}], "Busy"],
            ["none", [], "Busy"],
            ["no list", "x", "Busy"],
            ["no object", ["x"], "Busy"],
            ["the last one is no object", [{"error": "a"}, "x"], "Busy"],
        ),
    )  # fmt: skip
    def test_the_providers_words_are_passed_on(self, attempts, message):
        body = {"message": "Busy", "code": "upstream_failed", "attempts": attempts}
        assert puter.error_from(400, body).message == message

    @pytest.mark.parametrize(
        ("line", "kind", "code", "message"),
        table(
            ["limit", '429 {"error": {"message": "slow"}}', puter.ModelRateLimitError, "upstream_rate_limited", "slow"],
            ["request", "400 bad", puter.BadRequestError, "upstream_bad_request", "400 bad"],
            ["too large", "413 big", puter.BadRequestError, "upstream_bad_request", "413 big"],
            ["too long", '400 {"error": {"message": "prompt is too long: 9 tokens > 8 maximum"}}', puter.ContextLengthError, "context_length_exceeded", "prompt is too long: 9 tokens > 8 maximum"],
            ["Puter's key", "401 no", puter.ProviderAuthError, "upstream_auth_failed", "401 no"],
            ["Puter's money", "402 pay", puter.ProviderAuthError, "upstream_auth_failed", "402 pay"],
            ["down", "503 down", puter.ModelUnavailableError, "upstream_provider_unavailable", "503 down"],
            ["no status but a type", '{"error": {"type": "overloaded_error", "message": "busy"}}', puter.ModelUnavailableError, "upstream_provider_unavailable", "busy"],
        ),
    )  # fmt: skip
    def test_the_first_line_of_a_stream(self, line, kind, code, message):
        error = puter.upstream_error(line, "m")
        assert (type(error), error.code, error.message, error.model) == (kind, code, message, "m")

    @pytest.mark.parametrize("line", ["", "terminated", "4290 a", "200 words", '{"error": 5}', "{"])
    def test_a_first_line_without_a_kind(self, line):
        assert puter.upstream_error(line, "m") is None

    @pytest.mark.parametrize("status", [400, 401, 429, 500, 529])
    def test_a_recorded_first_line_is_the_whole_replys_error(self, status):
        answers = {
            call["name"]: call["response"]
            for call in recorded("providers.json")
            if call["provider"] == "claude" and call["name"].endswith(f": err{status}")
        }
        (line,) = answers[f"stream: err{status}"]["lines"]
        streamed = puter.upstream_error(json.loads(line)["message"], "m")
        whole = answers[f"complete: err{status}"]
        error = puter.error_from(whole["status"], whole["json"])
        assert (type(streamed), streamed.code) == (type(error), error.code)
        assert streamed.message == f"scripted {status}" and streamed.message in error.message
        assert "{" not in error.message

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            ("app_or_api_token_required", "session token"),
            ("not_found", "api_base_url"),
            ("account_is_not_verified", "e-mail"),
            ("subscription_required", "api_style"),
            ("token_missing", "login"),
            ("insufficient_funds", "login"),
        ],
    )
    def test_hints_say_what_helps(self, code, words):
        assert words in str(puter.error_from(400, {"code": code, "message": "x"}))

    def test_every_recorded_error_is_known(self):
        seen = set()
        for exchange in recorded("exchanges.json"):
            answer = exchange["response"]
            if answer["status"] >= 400 and answer.get("json"):
                error = puter.error_from(answer["status"], answer["json"])
                assert error.code == answer["json"]["code"]
                assert answer["json"]["message"] in error.message
                for one in answer["json"].get("attempts", ()):
                    assert one["error"] in error.message
                seen.add(type(error))
        assert len(seen) >= 8

    # ---- how long, and whether ----

    @pytest.mark.parametrize(
        ("error", "retry", "rand", "delay_s"),
        table(
            ["first", puter.ServerError(""), 1, 0.0, 1.0],
            ["second", puter.ServerError(""), 2, 0.0, 2.0],
            ["fourth", puter.ServerError(""), 4, 0.0, 8.0],
            ["shortened by a quarter", puter.ServerError(""), 2, 1.0, 1.5],
            ["capped", puter.ServerError(""), 10, 0.0, 30.0],
            ["as often as a limit allows", puter.ServerError(""), 120, 0.0, 30.0],
            ["the server's word", puter.ServerError("", retry_after_s=7.0), 1, 0.5, 7.0],
            ["at once", puter.ServerError("", retry_after_s=0.0), 5, 0.0, 0.0],
            ["not at once", puter.RateLimitError("", retry_after_s=0.0), 5, 0.0, 0.25],
        ),
    )
    def test_retry_delay(self, error, retry, rand, delay_s):
        assert puter.retry_delay_s(error, retry, 1.0, rand=lambda: rand) == delay_s

    def test_retry_delay_draws_lots_of_its_own(self):
        assert 0.75 <= puter.retry_delay_s(puter.ServerError(""), 1, 1.0) <= 1.0

    @pytest.mark.parametrize(
        ("error", "retries", "max_retries", "patient", "waited_s", "again"),
        table(
            ["server, last", puter.ServerError(""), 2, 3, False, 0.0, True],
            ["server, enough", puter.ServerError(""), 3, 3, False, 0.0, False],
            ["time-out", puter.RequestTimeoutError(""), 0, 3, False, 0.0, True],
            ["network", puter.NetworkError(""), 0, 3, False, 0.0, True],
            ["provider down, once", puter.ModelUnavailableError(""), 0, 3, True, 0.0, True],
            ["provider down, twice", puter.ModelUnavailableError(""), 1, 3, True, 0.0, False],
            ["stream without a chunk", puter.StreamError(""), 0, 3, True, 0.0, True],
            ["Puter's own key", puter.ProviderAuthError(""), 0, 3, True, 0.0, False],
            ["provider's limit", puter.ModelRateLimitError(""), 0, 3, True, 0.0, False],
            ["wrong request", puter.BadRequestError(""), 0, 3, True, 0.0, False],
            ["no credit", puter.CreditError(""), 0, 3, True, 0.0, False],
            ["dead token", puter.AuthError(""), 0, 3, True, 0.0, False],
            ["limit, alone", puter.RateLimitError(""), 0, 3, True, 0.0, True],
            ["Retry-After beyond the cap", puter.RateLimitError("", retry_after_s=31), 0, 3, True, 0.0, False],
            ["Retry-After of the cap", puter.ServerError("", retry_after_s=30), 0, 3, True, 0.0, True],
            ["billed", puter.RequestTimeoutError("", may_be_billed=True), 0, 3, True, 0.0, False],
            ["billed, and broken", puter.NetworkError("", may_be_billed=True), 0, 3, True, 0.0, False],
            ["limit, within the patience", puter.RateLimitError(""), 5, 3, True, 29.9, True],
            ["limit, after it", puter.RateLimitError(""), 3, 3, True, 30.0, False],
            ["limit, retries left", puter.RateLimitError(""), 2, 3, True, 60.0, True],
            ["limit, others there", puter.RateLimitError(""), 0, 3, False, 0.0, False],
            ["limit, retries off", puter.RateLimitError(""), 0, 0, True, 0.0, False],
            ["server, not again", puter.ServerError("", is_final=True), 0, 3, True, 0.0, False],
        ),
    )  # fmt: skip
    def test_may_retry(self, error, retries, max_retries, patient, waited_s, again):
        assert puter.may_retry(error, retries, max_retries, patient, waited_s) is again

    @pytest.mark.parametrize(("retries", "again"), [(0, True), (1, False)])
    def test_a_stream_that_may_be_billed_is_asked_for_once_more(self, retries, again):
        error = puter.RequestTimeoutError("", may_be_billed=True)
        assert puter.may_retry(error, retries, 3, True, 0.0, streaming=True) is again

    def test_the_waits_grow_and_are_longer_than_puters_window(self):
        assert waits(puter.ServerError(""), 1.0) == [1.0, 2.0, 4.0]
        # in short waits: a place in the window is free within a second
        assert waits(puter.RateLimitError(""), 1.0, 1) == [1.0, *[1.5] * 20]

    @pytest.mark.parametrize(
        ("base_s", "retry_after_s"),
        [pytest.param(0.0, None, id="no wait set"), pytest.param(1.0, 0.0, id="Retry-After of 0")],
    )
    def test_waiting_for_a_limit_ends(self, base_s, retry_after_s):
        error = puter.RateLimitError("", retry_after_s=retry_after_s)
        assert len(waits(error, base_s)) < 1_000

    # ---- where to go next ----

    @pytest.mark.parametrize(
        ("error", "is_fallback", "may_fall_back", "step"),
        table(
            ["unknown model", puter.ModelNotFoundError(""), False, True, "next_model"],
            ["unknown fallback", puter.ModelNotFoundError(""), True, True, "next_model"],
            ["no credit", puter.CreditError(""), False, True, "next_account"],
            ["no credit for this answer", puter.CreditError("", scope="model"), False, True, "next_model"],
            ["too long for Puter", puter.ContextLengthError("", tokens=9), False, True, "next_model"],
            ["too long, no fallback", puter.ContextLengthError("", tokens=9), False, False, "raise"],
            ["too long for the provider", puter.ContextLengthError(""), False, True, "raise"],
            ["not to be asked again", puter.ModelUnavailableError("", is_final=True), False, True, "raise"],
            ["nor by another account", puter.RateLimitError("", is_final=True), False, True, "raise"],
            ["model", puter.ModelUnavailableError(""), False, True, "next_model"],
            ["model's limit", puter.ModelRateLimitError(""), True, True, "next_model"],
            ["model not for you", puter.ModelAccessError(""), False, True, "next_model"],
            ["Puter's own key", puter.ProviderAuthError(""), False, True, "next_model"],
            ["broken before its start", puter.StreamError(""), False, True, "next_model"],
            ["limit", puter.RateLimitError(""), False, True, "next_account"],
            ["token", puter.AuthError(""), False, True, "next_account"],
            ["suspended", puter.AccessError(""), False, True, "next_account"],
            ["paid endpoint", puter.SubscriptionError(""), False, True, "raise"],
            ["wrong request", puter.BadRequestError(""), False, True, "raise"],
            ["wrong request to a fallback", puter.BadRequestError(""), True, True, "next_model"],
            ["unreadable", puter.ReplyError(""), False, True, "raise"],
            ["unreadable, of a fallback", puter.ReplyError(""), True, True, "raise"],
            ["server", puter.ServerError(""), False, True, "raise"],
            ["time-out", puter.RequestTimeoutError(""), False, True, "raise"],
            ["network", puter.NetworkError(""), False, True, "raise"],
            ["worked for", puter.StreamError("", may_be_billed=True), True, True, "raise"],
        ),
    )  # fmt: skip
    def test_next_step(self, error, is_fallback, may_fall_back, step):
        assert puter.next_step(error, is_fallback, may_fall_back) == step

    @pytest.mark.parametrize(
        ("failed", "model_id", "worth"),
        table(
            ["nothing failed", [], "a", True],
            ["its own failure, on any account", [("a", puter.ModelUnavailableError)], "a", False],
            ["not for this account", [("a", puter.ModelAccessError)], "a", True],
            ["the account's failure", [("a", puter.RateLimitError)], "a", True],
            ["one limit of its provider", [("b", puter.ModelRateLimitError)], "a", True],
            ["two", [("b", puter.ModelRateLimitError), ("C", puter.ModelRateLimitError)], "a", False],
            ["two failures that are none", [("b", puter.ModelUnavailableError)] * 2, "a", True],
            ["two of another provider", [("x", puter.ModelRateLimitError)] * 2, "a", True],
            ["two of a model that is not listed", [("z", puter.ModelRateLimitError)] * 2, "a", True],
        ),
    )  # fmt: skip
    def test_is_worth_trying(self, failed, model_id, worth):
        models = [model(name, provider="one") for name in "abc"] + [model("x", provider="two")]
        models = puter.ModelList(models)
        attempts = [attempt(name, "alice", kind("no")) for name, kind in failed]
        assert puter.is_worth_trying(models.find(model_id), attempts, models) is worth

    @pytest.mark.parametrize(
        ("asked", "given", "order"),
        table(
            ["other free ones", "paid", {"listed": []}, ["a:free", "eyes:free", "blind:free", "small:free"]],
            ["listed ones first", "x", {"listed": ["blind:free", "eyes:free"]}, ["blind:free", "eyes:free", "a:free", "small:free"]],
            ["listed, but not there", "x", {"listed": ["gone"]}, ["a:free", "eyes:free", "blind:free", "small:free"]],
            ["listed by an alias of any case", "x", {"listed": ["A-Free"]}, ["a:free", "eyes:free", "blind:free", "small:free"]],
            ["listed and paid", "x", {"listed": ["Paid-2"]}, ["paid", "a:free", "eyes:free", "blind:free", "small:free"]],
            ["listed twice", "x", {"listed": ["paid", "paid-alias"]}, ["paid", "a:free", "eyes:free", "blind:free", "small:free"]],
            ["never the asked one", "a:free", {"listed": ["a:free"]}, ["eyes:free", "blind:free", "small:free"]],
            ["nor by its alias", "A-FREE", {"listed": ["a:free"]}, ["eyes:free", "blind:free", "small:free"]],
            ["none that rests", "x", {"listed": [], "cooled": {"a:free", "small:free"}}, ["eyes:free", "blind:free"]],
            ["tools", "x", {"listed": [], "needs": puter.Needs(tools=True)}, ["a:free", "blind:free", "small:free"]],
            ["images", "x", {"listed": [], "needs": puter.Needs(inputs=frozenset({"image"}))}, ["a:free", "eyes:free", "small:free"]],
            ["room", "x", {"listed": [], "needs": puter.Needs(context=101)}, ["a:free", "eyes:free", "blind:free"]],
            ["listed ones must be able too", "x", {"listed": ["eyes:free"], "needs": puter.Needs(tools=True)}, ["a:free", "blind:free", "small:free"]],
            pytest.param("x", {"listed": [], "cooled": {"a-free"}}, ["eyes:free", "blind:free", "small:free"], id="none that rests under an alias"),
            pytest.param("x", {"listed": ["puter/paid"]}, ["paid", "a:free", "eyes:free", "blind:free", "small:free"], id="listed with puter/ in front"),
        ),
    )  # fmt: skip
    def test_fallback_order(self, asked, given, order):
        given = {"cooled": (), **given}
        assert ids(puter.fallback_order(asked, SMALL_CATALOGUE, **given)) == order

    def test_the_built_in_list_costs_nothing(self):
        first, second = puter.DEFAULT_FALLBACK_MODELS[:2]
        # What was free when the list was made may cost money by now.
        models = [model("z:free", free=True), model(first), model(second, free=True)]
        assert ids(puter.fallback_order("x", puter.ModelList(models), ())) == [second, "z:free"]
        assert puter.fallback_order("x", puter.ModelList(), (), listed=["a"]) == []

    @pytest.mark.parametrize(
        ("one", "needs", "able"),
        table(
            ["nothing told", model("m"), puter.Needs(True, frozenset({"image"}), 10**9), True],
            ["tools", model("m", tools=True), puter.Needs(tools=True), True],
            ["no tools", model("m", tools=False), puter.Needs(tools=True), False],
            ["sees", model("m", inputs=("text", "image")), puter.Needs(inputs=frozenset({"image"})), True],
            ["does not see", model("m", provider="xai", inputs=("text",)), puter.Needs(inputs=frozenset({"image"})), False],
            ["of no known provider", model("m", inputs=("text",)), puter.Needs(inputs=frozenset({"image", "pdf"})), True],
            *(
                [f"{provider} reads {kind}", model("m", provider=provider, inputs=("text",)), puter.Needs(inputs=frozenset({kind})), provider in able]
                for kind, able in (
                    ("pdf", ("claude", "openai-completion", "azure-openai", *RESPONSES, "openrouter")),
                    ("web search", ("openai-completion", "azure-openai", *RESPONSES)),
                    ("puter_path", ("claude",)),
                )
                for provider in ("claude", "openai-completion", "azure-openai", *RESPONSES, "openrouter", "gemini", "xai")
            ),
            ["sees, reads no PDF", model("m", provider="gemini", inputs=("image",)), puter.Needs(inputs=frozenset({"image", "pdf"})), False],
            ["just room", model("m", context=11), puter.Needs(context=10), True],
            ["no room", model("m", context=10), puter.Needs(context=10), False],
            ["paid: the answer's limit counts", model("m", context=99, max_tokens=10, output_usd_per_million=1.0), puter.Needs(context=10), False],
            ["paid, just room", model("m", context=99, max_tokens=10, output_usd_per_million=1.0), puter.Needs(context=9), True],
            ["free: the context counts", model("m", context=99, max_tokens=10, output_usd_per_million=0.0), puter.Needs(context=98), True],
            ["room of 0 is not told", model("m", context=0), puter.Needs(context=11), True],
        ),
    )  # fmt: skip
    def test_can_do(self, one, needs, able):
        assert puter.can_do(one, needs) is able

    @pytest.mark.parametrize(
        ("names", "cooled", "current", "in_turn", "least_used"),
        table(
            ["nobody", "", "", None, None, None],
            ["one", "a", "", None, "a", "a"],
            ["the current one stays", "abc", "", "b", "b", "b"],
            ["all are on cooldown", "ab", "ab", "a", None, None],
            ["the current one is on cooldown", "ab", "b", "b", "a", "a"],
            ["nobody yet", "abcd", "", None, "a", "c"],
            ["after the first", "abcd", "a", "a", "b", "c"],
            ["after the last", "abcd", "d", "d", "a", "c"],
            ["over one on cooldown", "abcd", "abc", "a", "d", "d"],
            ["round the end", "abcd", "cd", "c", "a", "b"],
            ["after one that is gone", "abcd", "", "z", "a", "c"],
        ),
    )
    def test_next_account(self, names, cooled, current, in_turn, least_used):
        # c was never used: its turn comes first.
        used_ms = {"a": 400, "b": 200, "c": None, "d": 300}
        accounts = [account(name, used_ms[name]) for name in names]
        for strategy, name in (("round-robin", in_turn), ("least-recently-used", least_used)):
            one = puter.next_account(accounts, cooled, strategy, current)
            assert (one and one.username) == name

    @pytest.mark.parametrize(("names", "cooled", "tried", "target", "given"), TARGETS)
    def test_next_target(self, names, cooled, tried, target, given):
        assert next_of(names, cooled, tried, given) == target

    def test_a_call_ends_whatever_fails(self):
        """However it goes, everybody together is asked some twenty times, never for ever."""
        rand = random.Random(5)
        for _ in range(300):
            names = "abc"[: rand.randint(1, 3)]
            kinds = ["busy", "forbidden", "login"]
            cooled = " ".join(f"{n}:{rand.choice(kinds)}" for n in names if rand.random() < 0.4)
            tried: list[str] = []
            while (found := next_of(names, cooled, " ".join(tried), {})) is not None:
                tried.append(
                    f"{found.split()[0]}:{rand.choice([*set(TARGET_FAULTS) - {'unknown'}])}"
                )
                assert len(tried) < 30, (names, cooled, tried)

    @pytest.mark.parametrize(
        ("strikes", "times"), [(0, 1), (1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (99, 4)]
    )
    def test_cooldown(self, strikes, times):
        assert puter.cooldown_s(strikes, 300.0) == 300.0 * times

    # ---- names of models ----

    @pytest.mark.parametrize(
        ("name", "found"),
        table(
            ["id", "paid", "paid"],
            ["alias", "a-free", "a:free"],
            ["any case", "A:FREE", "a:free"],
            ["alias in any case", "paid-2", "paid"],
            ["puter/", "puter/paid", "paid"],
            ["blanks", " Puter/a-free ", "a:free"],
        ),
    )
    def test_find(self, name, found):
        assert SMALL_CATALOGUE.find(name).id == SMALL_CATALOGUE.id_of(name) == found
        assert SMALL_CATALOGUE.get("nobody") is None and SMALL_CATALOGUE.id_of("No") == "No"

    def test_an_id_comes_before_another_models_alias(self):
        models = puter.ModelList([model("vendor:x", "x"), model("x")])
        assert models.find("x").id == "x"

    @pytest.mark.parametrize(
        ("name", "near"),
        table(
            ["slip", "claude-opus-45", ("claude-opus-4-5",)],
            ["other case", "CLAUDE-OPUS-45", ("claude-opus-4-5",)],
            ["no more free", "openrouter:vendor/big:free", ("openrouter:vendor/big",)],
            ["without its vendor", "big", ("openrouter:vendor/big",)],
            ["nothing like it", "zzzzzz", ()],
            ["empty", "", ()],
        ),
    )
    def test_near_matches(self, name, near):
        models = [
            model("claude-opus-4-5", "anthropic/claude-opus-4-5"),
            model("openrouter:vendor/big"),
        ]
        with pytest.raises(puter.ModelNotFoundError) as caught:
            puter.ModelList(models).find(name)
        error = caught.value
        assert error.near == near
        assert (error.model, error.code) == (name, "model_not_found")
        assert repr(name) in error.message
        if name.endswith(":free"):
            assert f"not free any more: {near[0]} costs credit" in error.hint
        else:
            assert f"Did you mean {near[0]}?" in error.hint if near else not error.near
        assert "python -m puter models" in error.hint

    def test_no_more_than_three_near_matches(self):
        with pytest.raises(puter.ModelNotFoundError, match=" or ") as caught:
            puter.ModelList([model(f"model-{n}") for n in range(9)]).find("model")
        assert len(caught.value.near) == 3

    @pytest.mark.parametrize(
        ("text", "found"),
        table(
            ["nothing", None, ["a:free", "paid", "eyes:free", "blind:free", "small:free"]],
            ["piece of an id", "BLI", ["blind:free"]],
            ["piece of an alias", "paid-a", ["paid"]],
            ["none", "zzz", []],
        ),
    )
    def test_matching_models(self, text, found):
        assert ids(puter.matching_models(SMALL_CATALOGUE, text)) == found


# =============================================================================
# Helpers: processes, folders, files
# =============================================================================
ACCOUNTS = "puter-accounts.json"
STATE = "state.sqlite3"
SECRET = "eyJhbGciOi.very-secret-token.c2lnbmF0dXJl"
# What the original plugin writes, and a key on every level that nobody knows yet.
PLUGIN_FILE: dict[str, Any] = {
    "version": 1,
    "accounts": [
        {
            "username": "alice",
            "authToken": SECRET,
            "addedAt": 1_700_000_000_000,
            "lastUsed": 1_700_000_500_000,
            "isTemporary": False,
        },
        {
            "username": "temp_bob",
            "authToken": "token-bob",
            "addedAt": 1_700_000_100_000,
            "isTemporary": True,
        },
    ],
    "activeIndex": 0,
}


# For children whose lines are run in this process too: to count them takes half of their time.
UNCOUNTED = {"COVERAGE_PROCESS_CONFIG": ""}


def start_script(script: str, config_dir: Path, *args: str) -> subprocess.Popen[str]:
    """Start Python code in a process of its own; `puter`, `sys` and `os` are imported."""
    code = "import os, sys, puter\n" + textwrap.dedent(script)
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env=clean_environ(config_dir, **UNCOUNTED),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_script(script: str, config_dir: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own to its end."""
    process = start_script(script, config_dir, *args)
    out, err = process.communicate(timeout=30)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def run_at_once(script: str, config_dir: Path, count: int) -> None:
    """Run the code in `count` processes that all begin at the same moment."""
    # Each says that it is ready, and waits: the import takes longer than the work.
    wait = "print('ready', flush=True); sys.stdin.readline(); number = int(sys.argv[1])"
    script = f"{wait}\n{textwrap.dedent(script)}"
    processes = [start_script(script, config_dir, str(i)) for i in range(count)]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, "")


def mode_of(path: Path) -> int:
    """The permission bits of a file or folder."""
    return stat.S_IMODE(path.stat().st_mode)


def accounts_json(folder: Path) -> Any:
    """What stands in the accounts file."""
    return json.loads((folder / ACCOUNTS).read_text("utf-8"))


def names(store: puter.AccountStore) -> list[str]:
    """The names of all accounts, in order."""
    return [account.username for account in store.accounts()]


def active_name(store: puter.AccountStore) -> str:
    """The name of the active account, or an empty text."""
    active = store.active()
    return active.username if active else ""


def told_by(error: BaseException) -> str:
    """All that an error could show to anybody: text, representation, traceback."""
    shown = traceback.format_exception(type(error), error, error.__traceback__)
    # Tools that report crashes show what an error was raised from, too.
    cause = vars(error.__cause__) if error.__cause__ else {}
    return "".join([str(error), repr(error), repr(vars(error)), repr(cause), *shown])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A settings folder that does not exist yet, and that this process uses."""
    path = tmp_path / "config"
    monkeypatch.setenv("PUTER_CONFIG_DIR", str(path))
    return path


@pytest.fixture
def store(folder: Path) -> puter.AccountStore:
    """A store in a folder that does not exist yet."""
    return puter.AccountStore(folder / ACCOUNTS)


@pytest.fixture
def filled(store: puter.AccountStore) -> puter.AccountStore:
    """A store whose file is the plugin's."""
    store.path.parent.mkdir(mode=0o700)
    store.path.write_text(json.dumps(PLUGIN_FILE, indent=2), "utf-8")
    return store


@pytest.fixture
def no_umask() -> Iterator[None]:
    """A umask that takes no permission away."""
    before = os.umask(0)
    yield
    os.umask(before)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, code: int, on: str = "") -> None:
    """Let `os.<name>` fail with an errno, for paths (or open files) with `on` in them."""
    real = getattr(os, name)

    def fail(target: Any, *args: Any, **kwargs: Any) -> Any:
        path = target
        if isinstance(target, int):
            path = os.readlink(f"/proc/self/fd/{target}")
        if on in str(path):
            raise OSError(code, os.strerror(code), str(path))
        return real(target, *args, **kwargs)

    monkeypatch.setattr(os, name, fail)


posix_only = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

# =============================================================================
# 5. store: the accounts
# =============================================================================
BROKEN_FILES = {
    "empty": b"",
    "no JSON": b'{"version": 1, "accounts": [{"authToken": "%b"' % SECRET.encode(),
    "half": json.dumps(PLUGIN_FILE)[:150].encode(),
    "not UTF-8": b'{"version": 1, "accounts": [], "x": "\xff\xfe%b"}' % SECRET.encode(),
    "too deep": b"[" * 100_000,
    "huge number": b'{"version": 1, "accounts": [], "activeIndex": %b}' % (b"9" * 5_000),
    "twins": b'{"version": 1, "version": 1, "accounts": [], "activeIndex": 0}',
}


def with_record(**changed: Any) -> dict[str, Any]:
    """The plugin's file with something wrong in its second account."""
    first, second = PLUGIN_FILE["accounts"]
    return {**PLUGIN_FILE, "accounts": [first, {**second, **changed}]}


WRONG_SHAPES: dict[str, Any] = {
    "a list": [PLUGIN_FILE],
    "null": None,
    "a text": SECRET,
    "no version": {"accounts": [], "activeIndex": 0},
    **{f"version {v!r}": {**PLUGIN_FILE, "version": v} for v in (True, 0, "1", 2)},
    "no accounts": {"version": 1, "activeIndex": 0},
    "accounts by name": {**PLUGIN_FILE, "accounts": {"alice": SECRET}},
    "an account that is a text": {**PLUGIN_FILE, "accounts": [SECRET]},
    "name missing": {**PLUGIN_FILE, "accounts": [{"authToken": SECRET}]},
    "token null": with_record(authToken=None),
    "time a text": with_record(addedAt="yesterday"),
    "use a list": with_record(lastUsed=[SECRET]),
    **{f"name {name!r}": with_record(username=name) for name in (7, " ")},
    "token empty": with_record(authToken=""),
    **{f"index {index!r}": {**PLUGIN_FILE, "activeIndex": index} for index in ("0", True, None)},
    **{f"index {index}": {**PLUGIN_FILE, "activeIndex": index} for index in (2, -1)},
}
UNREADABLE: dict[str, bytes] = {
    **BROKEN_FILES,
    **{name: json.dumps(value).encode() for name, value in WRONG_SHAPES.items()},
}
# Python's JSON takes such numbers, and no whole number can be made of them.
UNREADABLE |= {
    f"time {word}": json.dumps(PLUGIN_FILE).replace("1700000000000", word).encode("ascii")
    for word in ("Infinity", "-1e999", "NaN", "9" * 99)
}


class TestAccountStore:
    """One file, two tools, many processes: nothing is lost, nothing is shown."""

    def test_a_folder_that_is_not_there_holds_no_account(self, store):
        assert store.accounts() == []
        assert store.active() is None
        assert store.stamp() is None
        assert not store.path.parent.exists(), "reading must not write"

    def test_add_and_read(self, store):
        assert store.add(puter.Account("alice", "t1", 5, 6, True)) is True
        assert store.add(puter.Account("bob", "t2"), activate=False) is True
        alice, bob = store.accounts()
        assert alice == puter.Account("alice", "t1", 5, 6, True)
        assert store.active() == alice
        assert bob.added_at_ms and bob.last_used_ms is None and not bob.is_temporary
        assert "t1" not in repr(alice) and "t1" not in repr(store)

    def test_where_it_stands(self, tmp_path, monkeypatch):
        folder = tmp_path / "puter-1.2"
        monkeypatch.setenv("PUTER_CONFIG_DIR", str(folder))
        for path in (folder, folder / ACCOUNTS, None):
            assert puter.AccountStore(path).path == folder / ACCOUNTS

    # The format that is shared with the plugin.

    def test_the_plugins_file_is_read(self, filled):
        before = filled.path.read_bytes()
        alice, bob = filled.accounts()
        assert alice == puter.Account("alice", SECRET, 1_700_000_000_000, 1_700_000_500_000, False)
        assert bob == puter.Account("temp_bob", "token-bob", 1_700_000_100_000, None, True)
        assert filled.active() == alice
        assert filled.path.read_bytes() == before

    def test_the_plugin_can_read_what_is_written(self, filled):
        filled.add(puter.Account("josé 🦊", "t3", 1_700_000_200_000))
        data = accounts_json(filled.path.parent)
        assert data == {
            "version": 1,
            "accounts": [
                *PLUGIN_FILE["accounts"],
                {
                    "username": "josé 🦊",
                    "authToken": "t3",
                    "addedAt": 1_700_000_200_000,
                    "isTemporary": False,
                },
            ],
            "activeIndex": 2,
        }
        raw = filled.path.read_bytes()
        assert raw.startswith(b'{\n  "version": 1,') and raw.endswith(b"}\n")

    def test_a_byte_order_mark_is_no_error(self, filled):
        filled.path.write_bytes(b"\xef\xbb\xbf" + filled.path.read_bytes())
        filled.switch("temp_bob")
        # JSON.parse of the plugin does not take one.
        assert filled.path.read_bytes()[:1] == b"{"

    def test_unknown_keys_survive_every_change(self, store):
        data = json.loads(json.dumps(PLUGIN_FILE))
        data["theme"] = {"dark": [1, None, "é\u2028"]}
        data["accounts"][0]["note"] = {"plan": "free", "n": 1.5}
        data["accounts"][1]["tags"] = ["x"]
        store.path.parent.mkdir()
        store.path.write_text(json.dumps(data), "utf-8")
        store.switch("temp_bob")
        store.add(puter.Account("alice", "new"), activate=False)
        store.add(puter.Account("carol", "t"), activate=False)
        store.remove("carol")
        data["activeIndex"] = 1
        data["accounts"][0]["authToken"] = "new"
        assert accounts_json(store.path.parent) == data

    def test_adding_again_replaces_only_the_token(self, filled):
        assert filled.add(puter.Account("alice", "new", 9), activate=False) is False
        want = [{**PLUGIN_FILE["accounts"][0], "authToken": "new"}, PLUGIN_FILE["accounts"][1]]
        assert accounts_json(filled.path.parent) == {**PLUGIN_FILE, "accounts": want}

    @pytest.mark.parametrize(
        ("active", "removed", "left"),
        ["aab", "aba", "aca", "bab", "bbc", "bcb", "cac", "cbc", "ccb"],
    )
    def test_removal_keeps_the_right_account_active(self, store, active, removed, left):
        for name in "abc":
            store.add(puter.Account(name, f"t-{name}"))
        store.switch(active)
        assert store.remove(removed).token == f"t-{removed}"
        assert active_name(store) == left
        assert removed not in names(store)

    def test_removing_the_last_one_and_clearing(self, filled):
        assert [gone.username for gone in filled.clear()] == ["alice", "temp_bob"]
        assert filled.active() is None and filled.clear() == []
        filled.add(puter.Account("carol", "t"))
        filled.remove("carol")
        assert accounts_json(filled.path.parent) == {"version": 1, "accounts": [], "activeIndex": 0}

    @pytest.mark.parametrize("change", ["remove", "switch"])
    def test_a_name_that_nobody_has(self, filled, change):
        before = filled.path.read_bytes()
        with pytest.raises(puter.StoreError) as caught:
            getattr(filled, change)("Alice")
        assert "'Alice'" in str(caught.value)
        assert "Did you mean 'alice'?" in str(caught.value)
        assert "alice, temp_bob" in str(caught.value)
        assert SECRET not in told_by(caught.value)
        assert filled.path.read_bytes() == before
        filled.clear()
        with pytest.raises(puter.StoreError, match="python -m puter login"):
            filled.switch("alice")

    @pytest.mark.parametrize("index", [3, -1])
    def test_an_index_without_accounts_does_no_harm(self, store, index):
        store.path.parent.mkdir()
        store.path.write_text(json.dumps({"version": 1, "accounts": [], "activeIndex": index}))
        assert store.active() is None
        store.add(puter.Account("alice", "t"), activate=False)
        assert active_name(store) == "alice"

    @pytest.mark.parametrize(
        ("username", "token"),
        [("alice", ""), ("alice", " "), ("", "t"), (" ", "t"), ("alice", None)],
    )
    def test_what_could_not_be_read_again_is_not_written(self, filled, username, token):
        with contextlib.suppress(puter.PuterError, ValueError, TypeError):
            filled.add(puter.Account(username, token))
        assert names(filled) == ["alice", "temp_bob"]

    # Files that are not as they should be.

    @pytest.mark.parametrize("raw", UNREADABLE.values(), ids=UNREADABLE)
    def test_a_file_that_cannot_be_read_is_left_alone(self, store, raw):
        store.path.parent.mkdir()
        store.path.write_bytes(raw)
        for use in (
            store.accounts,
            store.active,
            store.clear,
            lambda: store.add(puter.Account("carol", "token-carol")),
            lambda: store.remove("alice"),
            lambda: store.switch("alice"),
        ):
            with pytest.raises(puter.StoreError) as caught:
                use()
            assert str(store.path) in str(caught.value)
            assert "the file is unchanged" in str(caught.value)
            assert re.search(r"Fix the file|Update", str(caught.value))
            assert SECRET not in told_by(caught.value)
            assert store.path.read_bytes() == raw

    @pytest.mark.parametrize(
        ("raw", "words"),
        [
            (b'{"version": 1,\n\n "accounts": oops}', "not valid JSON at line 3"),
            (b'{"version": 9, "accounts": 5}', "version 9, newer than"),
            (UNREADABLE["token null"], r"accounts\[1\]\.authToken"),
            (UNREADABLE["time a text"], r"accounts\[1\]\.addedAt"),
            (UNREADABLE["time NaN"], r"accounts\[0\]\.addedAt"),
            (UNREADABLE["index 2"], r'"activeIndex" is 2, but there are 2'),
        ],
    )
    def test_the_error_says_where(self, raw, words):
        with pytest.raises(puter.StoreError, match=words):
            puter.parse_accounts(raw, "here")

    def test_half_a_character_survives(self, filled):
        data = {**PLUGIN_FILE, "note": "\ud83e"}
        filled.path.write_text(json.dumps(data), "ascii")
        filled.switch("temp_bob")
        assert accounts_json(filled.path.parent) == {**data, "activeIndex": 1}

    @pytest.mark.parametrize("place", [ACCOUNTS, ".", ".."])
    def test_what_stands_in_the_way_is_left_alone(self, tmp_path, place):
        store = puter.AccountStore(tmp_path / "config" / "puter" / ACCOUNTS)
        in_the_way, words = store.path.parent.joinpath(place).resolve(), "PUTER_CONFIG_DIR"
        if place == ACCOUNTS:
            in_the_way.mkdir(parents=True)
            words = "Make the file and its folder writable"
        else:
            in_the_way.parent.mkdir(exist_ok=True)
            in_the_way.write_text("mine")
        for use in (store.accounts, lambda: store.add(puter.Account("a", "t"))):
            with pytest.raises(puter.StoreError, match=f"{store.path}.*{words}"):
                use()
        assert in_the_way.is_dir() or in_the_way.read_text() == "mine"
        assert not in_the_way.is_dir() or list(in_the_way.iterdir()) == []

    # Files that cannot be written.

    @linux_only
    @pytest.mark.parametrize(
        ("call", "code", "on"),
        [
            ("open", errno.EACCES, ".part"),
            ("open", errno.EROFS, ".lock"),
            ("fsync", errno.ENOSPC, ".part"),
            ("fsync", errno.EIO, ".part"),
            ("replace", errno.EACCES, ".part"),
            ("replace", errno.EROFS, ".part"),
        ],
    )
    def test_what_cannot_be_written_stays_as_it_was(self, filled, monkeypatch, call, code, on):
        before = filled.path.read_bytes()
        with monkeypatch.context() as patch:
            failing(patch, call, code, on)
            with pytest.raises(puter.StoreError) as caught:
                filled.add(puter.Account("carol", SECRET))
        assert str(filled.path) in str(caught.value)
        assert os.strerror(code) in str(caught.value)
        assert "PUTER_CONFIG_DIR" in str(caught.value)
        assert SECRET not in told_by(caught.value)
        assert filled.path.read_bytes() == before
        assert list(filled.path.parent.glob(".*")) == [], "a part file was left"
        assert filled.add(puter.Account("carol", SECRET))

    def test_a_new_file(self, tmp_path):
        store = puter.AccountStore(tmp_path / "not" / "yet" / "there")
        before_ms = int(time.time() * 1000)
        store.add(puter.Account("zoë", "token-zoe"))
        assert before_ms <= store.accounts()[0].added_at_ms <= time.time() * 1000  # type: ignore[operator]
        text = store.path.read_text(encoding="utf-8")
        assert '\n  "accounts": [\n    {\n      "username": "zo\\u00eb",\n' in text

    @linux_only
    def test_the_file_is_on_the_disk_before_it_is_renamed(self, filled, monkeypatch):
        done: list[str] = []
        for name in ("fsync", "replace"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *a, n=name, f=real: (done.append(n), f(*a)))
        filled.switch("temp_bob")
        assert done == ["fsync", "replace"]

    # Who may read it.

    @posix_only
    @pytest.mark.usefixtures("no_umask")
    def test_files_are_private_from_their_first_byte(self, store, monkeypatch):
        real = os.open
        created: list[tuple[str, int]] = []

        def watched(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            handle = real(path, flags, *args, **kwargs)
            if flags & os.O_CREAT:
                created.append((str(path), stat.S_IMODE(os.fstat(handle).st_mode)))
            return handle

        monkeypatch.setattr(os, "open", watched)
        store.add(puter.Account("alice", "t"))
        assert any("part" in path for path, _ in created)
        assert {mode for _, mode in created} == {0o600}
        assert mode_of(store.path) == 0o600
        assert mode_of(store.path.parent) == 0o700
        store.path.chmod(0o644)
        store.add(puter.Account("bob", "t"))
        assert mode_of(store.path) == 0o600

    @posix_only
    def test_files_are_private_at_every_moment(self, folder):
        script = """
            os.umask(0)
            store = puter.AccountStore()
            for number in range(100):
                store.add(puter.Account(f"user{number % 20}", f"token-{number}" * 50))
        """
        writer = start_script(script, folder)
        seen: dict[str, set[int]] = {}
        while writer.poll() is None:
            with contextlib.suppress(OSError):
                for entry in os.scandir(folder):
                    with contextlib.suppress(OSError):
                        mode = stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode)
                        seen.setdefault(entry.name, set()).add(mode)
        out, err = writer.communicate()
        assert (writer.returncode, out, err) == (0, "", "")
        assert set(seen) > {ACCOUNTS}, "the files beside it were never seen"
        assert set().union(*seen.values()) == {0o600}
        assert mode_of(folder) == 0o700

    @posix_only
    @pytest.mark.parametrize("exists", [True, False], ids=["there", "dangling"])
    @pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
    def test_a_symlinked_file_stays_a_symlink(self, store, tmp_path, exists, relative):
        target = tmp_path / "dotfiles" / "accounts.json"
        store.path.parent.mkdir()
        target.parent.mkdir()
        if exists:
            target.write_text(json.dumps(PLUGIN_FILE))
        link = Path("..") / "dotfiles" / target.name if relative else target
        store.path.symlink_to(link)
        store.add(puter.Account("carol", "t"))
        assert store.path.is_symlink() and Path(os.readlink(store.path)) == link
        assert not target.is_symlink() and mode_of(target) == 0o600
        assert active_name(puter.AccountStore(target)) == "carol"
        assert len(store.accounts()) == (3 if exists else 1)

    # Many at once, and sudden ends.

    def test_eight_processes_at_once_lose_nothing(self, folder):
        script = """
            store = puter.AccountStore()
            for i in range(50):
                assert store.add(puter.Account(f"user-{number}-{i}", "t"))
        """
        run_at_once(script, folder, 8)
        want = {f"user-{number}-{i}" for number in range(8) for i in range(50)}
        found = names(puter.AccountStore(folder))
        assert len(found) == 400 and set(found) == want

    def test_threads_at_once_lose_nothing(self, store):
        users = [puter.Account(f"user-{number}", "t") for number in range(40)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(store.add, users))
        assert len(set(names(store))) == 40

    @posix_only
    def test_kill_at_any_moment_leaves_the_old_file_or_the_new(self, folder):
        # A server of victims, since a fork is much cheaper than a new interpreter.
        script = """
            store = puter.AccountStore()
            for i in range(60):
                store.add(puter.Account(f"user{i}", "x" * 500))
            for line in sys.stdin:
                child = os.fork()
                if child == 0:
                    number = int(line)
                    while True:
                        number += 1
                        store.add(puter.Account("counter", str(number)))
                        os.write(1, b"done %d\\n" % number)
                os.write(1, b"child %d\\n" % child)
                os.waitpid(child, 0)
                os.write(1, b"dead 0\\n")
        """
        server = start_script(script, folder)
        assert server.stdin and server.stdout
        store = puter.AccountStore(folder)
        dice = random.Random(1)
        done = 0
        for _ in range(40):
            server.stdin.write(f"{done}\n")
            server.stdin.flush()
            child, before = None, done
            while child is None or done == before:
                word, value = server.stdout.readline().split()
                child = int(value) if word == "child" else child
                done = int(value) if word == "done" else done
            time.sleep(dice.random() * 0.008)
            os.kill(child, signal.SIGKILL)
            while (line := server.stdout.readline().split())[0] != "dead":
                done = int(line[1])
            counters = [a.token for a in store.accounts() if a.username == "counter"]
            assert len(store.accounts()) >= 60
            found = int(counters[0])
            # The kill may have come between the rename and the word of it.
            assert done <= found <= done + 1
            done = found
        server.stdin.close()
        server.wait(timeout=10)
        server.stdout.close()
        if server.stderr:
            server.stderr.close()

    @posix_only
    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_a_part_file_left_by_a_crash_does_not_hinder(self, filled, step):
        before = filled.path.read_bytes()
        script = f"""
            import signal
            os.{step} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            puter.AccountStore().add(puter.Account("carol", "t"))
        """
        assert run_script(script, filled.path.parent).returncode == -signal.SIGKILL
        assert list(filled.path.parent.glob(".*.part"))
        assert filled.path.read_bytes() == before
        filled.add(puter.Account("dave", "t"))
        assert names(filled) == ["alice", "temp_bob", "dave"]
        assert not list(filled.path.parent.glob(".*.part"))

    @posix_only
    def test_a_fork_during_a_change_does_not_keep_the_lock(self, folder):
        # Another thread may well fork (multiprocessing does) while this one writes.
        script = """
            import signal, threading
            store = puter.AccountStore()
            with store._change() as data:
                child = os.fork()
                if child == 0:
                    signal.pause()
            later = threading.Thread(
                target=store.add, args=(puter.Account("bob", "t"),), daemon=True)
            later.start()
            later.join(1)
            os.kill(child, signal.SIGKILL)
            os._exit(later.is_alive())
        """
        assert run_script(script, folder).returncode == 0

    def test_the_stamp_changes_with_every_change(self, filled):
        stamps = [filled.stamp()]
        for number in range(30):
            filled.add(puter.Account("alice", f"token-{number:03}"))
            stamps.append(filled.stamp())
        assert all(old != new for old, new in itertools.pairwise(stamps))
        # Two changes of the same length: the inode may be the first one's again.
        assert all(old != new for old, new in zip(stamps, stamps[2:], strict=False))

    def test_what_changes_nothing_writes_nothing(self, filled):
        before = filled.path.read_bytes(), filled.stamp()
        filled.switch("alice")
        filled.add(puter.Account("alice", SECRET))
        assert (filled.path.read_bytes(), filled.stamp()) == before

    # Windows.

    @pytest.mark.parametrize(
        ("code", "words"), [(errno.EACCES, "held the lock for 0 s"), (errno.EBADF, "could not be")]
    )
    def test_the_lock_of_windows(self, filled, monkeypatch, code, words):
        def locking(_: int, mode: int, count: int) -> None:
            assert (mode, count) == (2, 1)
            raise OSError(code, "held")

        module: Any = type("Msvcrt", (), {"LK_NBLCK": 2, "locking": staticmethod(locking)})
        monkeypatch.setitem(sys.modules, "msvcrt", module)
        monkeypatch.setattr(puter, "LOCK_PATIENCE_S", 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", "win32")
            with pytest.raises(puter.StoreError, match=words):
                filled.switch("temp_bob")

    @posix_only
    def test_a_lock_that_nobody_gives_back(self, filled, monkeypatch):
        monkeypatch.setattr(puter, "LOCK_PATIENCE_S", 0.05)
        before = filled.path.read_bytes()
        with puter._locked(filled.path), pytest.raises(puter.StoreError) as caught:
            filled.switch("temp_bob")
        assert "held the lock" in str(caught.value) and "End the program" in str(caught.value)
        assert filled.path.read_bytes() == before
        assert filled.switch("temp_bob")


# =============================================================================
# 5. store: the state
# =============================================================================
MINUTE_S = 60.0


@pytest.fixture
def state(folder: Path) -> Iterator[puter.State]:
    """The state of a folder that does not exist yet."""
    state = puter.State(folder / STATE)
    yield state
    state.close()


class TestState:
    """What processes tell each other; never a reason to stop."""

    def test_a_cooldown_ends_by_itself(self, state):
        cooldown = state.add_cooldown("alice", "", MINUTE_S, "too_many_requests", now=1000.0)
        assert cooldown == puter.Cooldown("alice", "", 1060.0, 1, "too_many_requests", 1000.0)
        assert state.cooldowns(1059.9) == [cooldown]
        assert state.cooldowns(1060.0) == []

    def test_a_clock_that_is_set_back_ends_cooldowns_but_no_dead_tokens(self, state):
        for_ever = float("inf")
        state.add_cooldown("alice", "", MINUTE_S, "busy", now=1000.0)
        state.add_cooldown("bob", "", for_ever, "login", now=1000.0)
        for now, left in (
            (1000.0, "alice bob"),
            (941.0, "alice bob"),
            (940.0, "bob"),
            (1.0, "bob"),
        ):
            assert [one.account for one in state.cooldowns(now)] == left.split()

    def test_one_incident_is_one_strike(self, state):
        def cool(now: float) -> tuple[int, float]:
            cooldown = state.add_cooldown("alice", "", MINUTE_S, "busy", now=now)
            return cooldown.strikes, cooldown.until_s

        assert cool(1000.0) == (1, 1060.0)
        # What fails while it runs adds nothing, and makes it no longer.
        assert cool(1001.0) == cool(1059.0) == (1, 1060.0)
        assert cool(1061.0) == (2, 1181.0)
        assert cool(1182.0 + puter.STRIKES_LAPSE_S) == (1, 1242.0 + puter.STRIKES_LAPSE_S)
        # A clock that was set back.
        assert cool(500.0) == (2, 620.0)

    def test_a_success_ends_what_began_before_it(self, state):
        first = state.add_cooldown("alice", "m", MINUTE_S, "busy", now=1000.0)
        state.record_success("alice", ("m",), 999.0, now=1001.0)
        assert state.cooldowns(1001.0) == [first]
        state.record_success("alice", ("m",), 1000.5, now=1001.5)
        assert state.cooldowns(1001.5) == []
        assert state.add_cooldown("alice", "m", MINUTE_S, "busy", now=1002.0).strikes == 1
        assert state.last_used_ms() == {"alice": 1_001_500}

    def test_cooldowns_belong_to_a_server(self, folder):
        here, there = (puter.State(folder / STATE, url) for url in ("https://a", "https://b"))
        here.add_cooldown("alice", "", MINUTE_S, "busy", now=0.0)
        there.record_success("alice", ("m",), 0.0, now=1.0)
        assert (len(here.cooldowns(1.0)), there.cooldowns(1.0)) == (1, [])
        here.close()
        there.close()

    def test_a_file_of_the_first_version(self, folder, state):
        folder.mkdir()
        with contextlib.closing(sqlite3.connect(folder / STATE)) as db:
            db.execute("CREATE TABLE rests (account TEXT, model TEXT, until_s REAL)")
            db.execute("INSERT INTO rests VALUES ('alice', '', 1e12)")
            db.commit()
        assert state.cooldowns(1.0) == [] and state.path != ":memory:"
        state.add_cooldown("alice", "", MINUTE_S, "busy", now=0.0)
        assert len(state.cooldowns(1.0)) == 1 and state.path != ":memory:"

    def test_one_that_nobody_closed_does_not_warn(self, folder):
        script = """
            import warnings
            warnings.simplefilter("error")
            state = puter.State()
            state.last_used_ms()
            db = state._db
            del state
            try:
                db.execute("SELECT 1")
            except Exception as error:
                print(type(error).__name__)
        """
        done = run_script(script, folder)
        assert (done.stdout.strip(), done.stderr) == ("ProgrammingError", "")

    def test_a_success_ends_the_accounts_cooldown_and_the_models(self, state):
        for account, model in (("a", ""), ("a", "m"), ("a", "n"), ("b", ""), ("b", "m")):
            state.add_cooldown(account, model, MINUTE_S, "busy", now=0.0)
        state.record_success("a", ("m",), 1.0, now=1.0)
        left = [(one.account, one.model) for one in state.cooldowns(1.0)]
        assert left == [("a", "n"), ("b", ""), ("b", "m")]

    def test_clearing_one_account_or_all(self, state):
        for account in ("a", "b", "c"):
            state.add_cooldown(account, "", MINUTE_S, "busy", now=0.0)
            state.add_cooldown(account, "m", MINUTE_S, "busy", now=0.0)
        assert state.clear_cooldowns("a") == 2
        assert {one.account for one in state.cooldowns(1.0)} == {"b", "c"}
        assert state.clear_cooldowns() == 4
        assert state.cooldowns(1.0) == []
        assert state.add_cooldown("b", "", MINUTE_S, "busy", now=2.0).strikes == 1

    def test_a_dead_tokens_mark_ends_when_the_token_changes(self, state):
        for_ever = float("inf")
        state.add_cooldown("alice", "", for_ever, "login", 0.0, token="old")
        assert state.cooldowns(1e12, [puter.Account("alice", "old")])[0].reason == "login"
        assert state.cooldowns(1e12, [puter.Account("bob", "x")])[0].account == "alice"
        assert state.cooldowns(1e12, [puter.Account("alice", "new")]) == []
        # Any other cooldown is the account's, whatever its token is.
        state.add_cooldown("alice", "", MINUTE_S, "busy", 0.0, token="old")
        assert state.cooldowns(1.0, [puter.Account("alice", "new")])[0].reason == "busy"

    def test_old_times_go_and_counts_stay(self, state):
        for number in range(puter._TRIM_EVERY):
            state.record("mn"[number % 2], "ok", float(number), keep=5)
        state.record("m", "late", 1.0)
        totals, samples = state.metrics(["m"], keep=3)
        half = puter._TRIM_EVERY // 2
        assert sorted(totals) == [("late", 1, 0.0), ("ok", half, 0.0)]
        assert [row[0] for row in samples] == [998.0, 996.0, 994.0]
        assert [len(state.metrics([name], keep=500)[1]) for name in "mn"] == [5, 5]

    def test_cached_replies_are_counted(self, state):
        state.cache_put("old", "{}", 1.0, limit=10)
        state.cache_put("new", '"é"', 100.0, limit=10)
        found = [state.cache_get(key, 101.0, 50.0) for key in ("old", "new", "none")]
        assert found == [None, '"é"', None]
        want = {"entries": 2, "fresh": 1, "bytes": 6, "hits": 1, "misses": 2}
        assert state.cache_stats(101.0, 50.0) == want

    def test_what_sqlite_does_not_take_costs_nothing_later(self, state):
        odd = "m\ud800"
        state.record(odd, f"code {odd}", 1.0)
        state.record(odd, "ok", 1.0, usage=puter.Usage(1, 2))
        with pytest.raises(OverflowError):
            state.record("m", "ok", 1.0, usage=puter.Usage(1, 10**20))
        state.record("m", "ok", 1.0)
        totals = {name: [row[:2] for row in state.metrics([name])[0]] for name in state.models()}
        assert totals == {"m": [("ok", 1)], "m\ufffd": [("code m\ufffd", 1), ("ok", 1)]}
        assert state.add_cooldown("a", odd, MINUTE_S, odd, 1.0).model == "m\ufffd"
        state.record_success("a", (odd,), 2.0, now=2.0)
        assert state.cooldowns(2.0) == []

    def test_other_objects_and_processes_see_it(self, state, folder):
        state.add_cooldown("alice", "m", MINUTE_S, "busy", now=0.0)
        other = puter.State(folder / STATE)
        assert other.cooldowns(1.0) == state.cooldowns(1.0)
        other.close()
        script = """
            state = puter.State()
            assert [one.account for one in state.cooldowns(1.0)] == ["alice"]
            state.add_cooldown("bob", "", 60.0, "from afar", 0.0)
            state.record_success("alice", ("m",), 5.0, now=5.0)
        """
        done = run_script(script, folder)
        assert (done.returncode, done.stderr) == (0, "")
        assert [one.reason for one in state.cooldowns(1.0)] == ["from afar"]
        assert state.last_used_ms() == {"alice": 5000}

    def test_eight_processes_at_once_lose_nothing(self, state, folder):
        script = """
            import logging
            logging.basicConfig(level="WARNING")  # a warning is a failure, too
            state = puter.State()
            for i in range(20):
                state.add_cooldown(f"user-{number}", f"m{i}", 60.0, "busy", 0.0)
                state.add_cooldown("shared", "", 60.0, "busy", 0.0)
        """
        assert state.cooldowns(1.0) == []  # the file is there: the next test is without
        run_at_once(script, folder, 8)
        cooldowns = state.cooldowns(1.0)
        assert len(cooldowns) == 8 * 20 + 1
        assert {one.strikes for one in cooldowns if one.account == "shared"} == {1}

    def test_a_file_that_another_process_is_making(self, folder, caplog):
        # Two that begin together meet here now and then; this one always does.
        folder.mkdir()
        maker = sqlite3.connect(folder / STATE, isolation_level=None, check_same_thread=False)
        maker.execute("CREATE TABLE other (x)")
        maker.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.2, maker.execute, ["COMMIT"])
        timer.start()
        state = puter.State(folder / STATE)
        state.add_cooldown("alice", "", MINUTE_S, "busy", now=0.0)
        timer.join()
        maker.close()
        state.close()
        assert caplog.records == []
        assert run_script("assert puter.State().cooldowns(1.0)", folder).stderr == ""

    def test_threads_may_share_one(self, state):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(state.record, *zip(*[("m", "ok", 1.0)] * 160)))
        assert state.metrics(["m"])[0] == [("ok", 160, 0.0)]

    def test_model_lists(self, state, folder):
        assert state.catalogue("https://a") is None
        state.put_catalogue("https://a", '{"models": []}', 5.0)
        state.put_catalogue("https://b", "{}", 6.0)
        state.put_catalogue("https://a", '{"models": ["🦊"]}', 7.0)
        other = puter.State(folder / STATE)
        assert other.catalogue("https://a") == ('{"models": ["🦊"]}', 7.0)
        other.close()
        other.close()
        assert other.catalogue("https://b") == ("{}", 6.0)  # opened again
        other.close()

    @posix_only
    @pytest.mark.usefixtures("no_umask")
    def test_its_files_are_private(self, state, folder):
        state.add_cooldown("alice", "", MINUTE_S, "busy", now=0.0)
        modes = {path.name: mode_of(path) for path in folder.iterdir()}
        assert set(modes) >= {STATE, f"{STATE}-wal"}
        assert set(modes.values()) == {0o600}
        assert mode_of(folder) == 0o700

    # When the file is of no use.

    @pytest.mark.parametrize("damage", ["junk", "half", "a folder", "no folder", "other tables"])
    def test_damage_is_logged_once_and_memory_is_used(self, folder, caplog, damage):
        path = folder / STATE
        if damage == "no folder":
            folder.write_text("a file")
        elif damage == "a folder":
            path.mkdir(parents=True)
        else:
            folder.mkdir()
        if damage == "junk":
            path.write_bytes(b"this is no database, " * 500)
        if damage == "half":
            whole = puter.State(path)
            whole.put_catalogue("u", "x" * 50_000, 0.0)
            whole.close()
            path.write_bytes(path.read_bytes()[:5000])
        if damage == "other tables":
            with contextlib.closing(sqlite3.connect(path)) as db:
                db.execute("CREATE TABLE cooldowns (who TEXT)")
        state = puter.State(path)
        with caplog.at_level(logging.DEBUG, "puter"):
            state.add_cooldown("alice", "", MINUTE_S, "busy", now=0.0)
            state.put_catalogue("u", "{}", 1.0)
            assert state.catalogue("u") == ("{}", 1.0)
            assert [one.account for one in state.cooldowns(1.0)] == ["alice"]
            state.record_success("alice", "", 2.0, now=2.0)
            assert state.cooldowns(1.0) == []
        (warning,) = caplog.records
        assert warning.levelname == "WARNING" and str(path) in warning.getMessage()
        assert "memory" in warning.getMessage()
        state.close()

    @linux_only
    def test_a_file_that_may_not_be_written(self, folder, monkeypatch, caplog):
        failing(monkeypatch, "open", errno.EACCES, STATE)
        state = puter.State(folder / STATE)
        state.add_cooldown("alice", "", MINUTE_S, "busy", now=0.0)
        assert len(state.cooldowns(1.0)) == 1
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        state.close()

    @posix_only
    # A file that is open fails in the middle of a change.
    @pytest.mark.parametrize("first", ["state.close()", "pass"])
    def test_a_full_disk(self, folder, first):
        script = f"""
            import logging, resource
            logging.basicConfig(format="%(levelname)s %(message)s")
            state = puter.State()
            state.add_cooldown("alice", "", 60.0, "busy", 0.0)
            {first}
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
            state.put_catalogue("u", "x" * 100_000, 0.0)
            state.add_cooldown("bob", "", 60.0, "busy", 0.0)
            assert [one.account for one in state.cooldowns(1.0)] == ["bob"]
            assert len(state.catalogue("u")[0]) == 100_000
        """
        done = run_script(script, folder)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert done.stderr.count("WARNING") == 1 and str(folder) in done.stderr
        # What others had written is still there.
        whole = puter.State(folder / STATE)
        assert [one.account for one in whole.cooldowns(1.0)] == ["alice"]
        whole.close()

    def test_the_file_may_be_deleted_after_a_crash(self, folder, caplog):
        # The crash leaves the write-ahead log, which is of no file any more then.
        script = """
            state = puter.State()
            state.put_catalogue("u", "x" * 50_000, 0.0)
            os._exit(0)
        """
        assert run_script(script, folder).returncode == 0
        assert (folder / f"{STATE}-wal").exists()
        (folder / STATE).unlink()
        state = puter.State(folder / STATE)
        assert state.cooldowns(0.0) == [] and state.catalogue("u") is None
        state.add_cooldown("alice", "", MINUTE_S, "busy", now=0.0)
        state.close()
        assert caplog.records == []
        assert len(state.cooldowns(1.0)) == 1
        state.close()

    @posix_only
    def test_after_a_fork_both_go_on(self, folder):
        script = """
            import logging
            logging.basicConfig(level="WARNING")
            state = puter.State()
            state.add_cooldown("before", "", 60.0, "busy", 0.0)
            inherited = state._db
            child = os.fork()
            for i in range(50):
                state.add_cooldown(f"{child == 0}-{i}", "", 60.0, "busy", 0.0)
            if child == 0:
                # SQLite forbids the use of a connection on the other side of a fork.
                os._exit(state._db is inherited)
            assert os.waitpid(child, 0)[1] == 0
            assert len(state.cooldowns(1.0)) == 101, len(state.cooldowns(1.0))
        """
        done = run_script(script, folder)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    @posix_only
    def test_a_fork_while_a_thread_is_at_work(self, folder):
        script = """
            import signal, threading
            state = puter.State()
            inside, go_on = threading.Event(), threading.Event()
            def write():
                with state._lock, state._open() as db:
                    db.execute("BEGIN IMMEDIATE")
                    inside.set()
                    go_on.wait()
            thread = threading.Thread(target=write)
            thread.start()
            inside.wait()
            child = os.fork()
            if child == 0:
                signal.alarm(1)  # ends the child if it hangs
                state.cooldowns(1.0)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            go_on.set()
            thread.join()
            sys.exit(status != 0)
        """
        assert run_script(script, folder).returncode == 0


# =============================================================================
# 10. login
# =============================================================================
GUI = "https://gui.example"
NONCE = "0123456789abcdef0123456789abcdef"
GOOD_CALLBACK = f"/callback/{NONCE}?token=good"


def config_for(fake: FakePuter, folder: Path, **settings: Any) -> puter.Config:
    """Settings that point to the scripted server."""
    return puter.Config(api_base_url=fake.url, gui_base_url=fake.url, folder=folder, **settings)


def callback_url(sign_in_url: str) -> str:
    """The address to which the sign-in page would send the browser back."""
    back = query_value(sign_in_url, "redirectURL")
    assert back
    return back


class Browser:
    """Stands in for the person's browser: approves at once, and keeps what it was shown."""

    def __init__(self, fake: FakePuter, token: str | None = None) -> None:
        self.fake, self.token = fake, token
        self.shown: list[str] = []
        self.pages: list[tuple[int, str]] = []

    def open(self, url: str) -> None:
        """Go to the sign-in page and press the button."""
        self.pages.append(self.fake.approve(url, self.token))

    def sign_in(self, config: puter.Config, **options: Any) -> puter.Account:
        """A whole login with this browser."""
        options = {"port": 0, "open_browser": self.open, "timeout_s": 5.0, **options}
        return puter.browser_login(config, show=self.shown.append, **options)


class Checked:
    """A callback whose check knows one token, and counts how often it is asked."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.callback = puter._Callback(GUI, 1234, NONCE, self.check)

    def check(self, token: str) -> puter.Account:
        """The account of a token."""
        self.tokens.append(token)
        if token != "good":
            raise puter.AuthError("<b>no</b>")
        return puter.Account("<i>alice</i>", token)


class TestLogin:
    """The loopback callback takes one token, from Puter's page, on this computer."""

    # The callback, as a table.

    @pytest.mark.parametrize(
        ("status", "method", "target", "host"),
        [
            *((200, "GET", GOOD_CALLBACK, f"{host}:1234") for host in ("127.0.0.1", "LOCALHOST")),
            (200, "GET", GOOD_CALLBACK, "[::1]:1234"),
            (200, "GET", f"/callback/{NONCE}?x=1&token=good&y", "127.0.0.1"),
            *((200, "GET", path, "127.0.0.1:1234") for path in ("/", "/?token=good")),
            *(
                (400, "GET", f"/callback/{NONCE}{query}", "127.0.0.1:1234")
                for query in ("", "?token=", "?Token=good")
            ),
            *((404, "GET", path, "127.0.0.1:1234") for path in ("/favicon.ico", "/caf\xe9")),
            *(
                (404, "GET", f"/{path}?token=good", "127.0.0.1:1234")
                for path in (f"callback/{NONCE[:-1]}", f"callback/{NONCE}/", f"Callback/{NONCE}")
            ),
            (404, "GET", "/callback/?token=good", "127.0.0.1:1234"),
            *((405, m, GOOD_CALLBACK, "127.0.0.1:1234") for m in ("POST", "HEAD", "OPTIONS")),
            *((403, "GET", GOOD_CALLBACK, f"{host}evil.example") for host in ("", "127.0.0.1.")),
            *((403, "GET", GOOD_CALLBACK, host) for host in ("evil.example:1234", "")),
            (403, "GET", "/", "evil.example"),
            (403, "GET", f"/callback/{NONCE}?token=bad", "127.0.0.1:1234"),
        ],
    )
    def test_answers(self, status, method, target, host):
        checked = Checked()
        found, title, text = checked.callback.handle(method, target, host)
        assert (found, bool(title), bool(text)) == (status, True, True)
        is_sign_in = status == 200 and "callback" in target
        assert (checked.callback.account is not None) == is_sign_in
        asked = is_sign_in or "token=bad" in target
        assert len(checked.tokens) == asked, "only a right request reaches the server"

    def test_the_second_token_is_refused(self):
        checked = Checked()
        target = f"/callback/{NONCE}?token="
        assert checked.callback.handle("GET", f"{target}good", "localhost")[0] == 200
        assert checked.callback.handle("GET", f"{target}bad", "localhost")[0] == 410
        assert checked.callback.handle("GET", f"{target}good", "localhost")[0] == 410
        assert checked.tokens == ["good"]
        assert checked.callback.account and checked.callback.error is None

    def test_a_request_without_a_token_does_not_use_it_up(self):
        checked = Checked()
        target = f"/callback/{NONCE}"
        assert checked.callback.handle("GET", target, "localhost")[0] == 400
        assert checked.callback.handle("GET", f"{target}?token=good", "localhost")[0] == 200

    def test_the_sign_in_page(self):
        url = urlsplit(Checked().callback.sign_in_url)
        assert f"{url.scheme}://{url.netloc}{url.path}" == f"{GUI}/"
        assert parse_qs(url.query) == {
            "action": ["authme"],
            "redirectURL": [f"http://127.0.0.1:1234/callback/{NONCE}"],
        }
        assert "token_type" not in url.query, "a session token could change the password"

    def test_the_root_gives_no_secret_away(self):
        _, title, text = Checked().callback.handle("GET", "/", "127.0.0.1:1234")
        assert "terminal shows" in text and NONCE not in title + text

    def test_names_and_errors_are_escaped(self):
        for token in ("good", "bad"):
            answer = Checked().callback.handle(
                "GET", f"/callback/{NONCE}?token={token}", "localhost"
            )
            shown = "".join(map(str, answer[1:]))
            assert "&lt;" in shown and "<" not in shown

    # With a browser.

    def test_from_end_to_end(self, fake, folder):
        browser = Browser(fake)
        account = browser.sign_in(config_for(fake, folder))
        assert (account.username, account.token) == ("bob", "token-bob")
        assert account.added_at_ms and not account.is_temporary
        assert len(browser.shown) == 1 and browser.shown[0].startswith(f"{fake.url}/?")
        ((status, page),) = browser.pages
        assert status == 200 and "Signed in as bob" in page
        assert not folder.exists(), "keeping the account is the caller's"

    def test_no_token_goes_to_a_server_that_is_not_puters(self, fake, folder):
        options = {"api_style": "openai", "api_base_url": f"{fake.url}/v1"}
        config = puter.Config.load(folder, {}, **options)
        for sign_in in (
            lambda: puter.account_of("token-alice", config),
            lambda: puter.browser_login(config, show=pytest.fail, port=0),
        ):
            with pytest.raises(puter.ConfigError, match="no sign-in.*openai_api_key"):
                sign_in()
        assert fake.requests == []

    def test_a_person_opens_the_address(self, fake, folder):
        browser = Browser(fake)
        threads = []

        def show(url: str) -> None:
            threads.append(threading.Thread(target=browser.open, args=(url,)))
            threads[0].start()

        account = puter.browser_login(config_for(fake, folder), show=show, port=0, timeout_s=5)
        threads[0].join()
        assert account.username == "bob" and browser.pages[0][0] == 200

    def test_the_nonce_is_long_and_new_each_time(self, fake, folder):
        browser = Browser(fake)
        for _ in range(3):
            browser.sign_in(config_for(fake, folder))
        nonces = {callback_url(url).rpartition("/")[2] for url in browser.shown}
        assert len(nonces) == 3
        assert all(len(bytes.fromhex(nonce)) == 16 for nonce in nonces)

    def test_what_others_send_does_not_disturb(self, fake, folder, capfd):
        statuses: list[int] = []
        silent: list[socket.socket] = []

        def open_browser(url: str) -> None:
            back = callback_url(url)
            root, port = back.partition("/callback/")[0], urlsplit(back).port
            for data in (b"", b"\x16\x03\x01\x00\xff garbage\r\n\r\n", b"GET / HT"):
                silent.append(socket.create_connection(("127.0.0.1", port), 5))
                silent[-1].sendall(data)
            for method, address, host in (
                ("GET", f"{root}/favicon.ico", None),
                ("GET", f"{root}/callback/{'0' * 32}?token=evil", None),
                ("POST", f"{back}?token=evil", None),
                ("DELETE", f"{back}?token=evil", None),
                ("GET", f"{back}?token=evil", "evil.example"),
                ("GET", back, None),
            ):
                headers = {"Host": host} if host else {}
                reply = requests.request(method, address, headers=headers, timeout=5)
                statuses.append(reply.status_code)
            fake.approve(url)

        account = Browser(fake).sign_in(config_for(fake, folder), open_browser=open_browser)
        for connection in silent:
            connection.close()
        assert account.username == "bob"
        assert statuses == [404, 404, 405, 405, 403, 400]
        assert [one.token for one in fake.requests] == ["token-bob"]
        assert capfd.readouterr() == ("", "")

    def test_the_answer_is_not_kept_by_the_browser(self, fake, folder):
        replies: list[requests.Response] = []

        def open_browser(url: str) -> None:
            address = f"{callback_url(url)}?token=token-bob"
            replies.append(requests.get(address, timeout=5))

        Browser(fake).sign_in(config_for(fake, folder), open_browser=open_browser)
        headers = replies[0].headers
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        # The address bar, and so the history, would show it else.
        assert "history.replaceState" in replies[0].text

    def test_a_name_with_html_in_it(self, fake, folder):
        name = "<script>alert('x')</script>{0}"
        fake.login_token = fake.add_account(name, "token-evil").token
        browser = Browser(fake)
        assert browser.sign_in(config_for(fake, folder)).username == name
        page = browser.pages[0][1]
        assert "<script>alert" not in page and "&lt;script&gt;alert" in page

    def test_nobody_comes(self, fake, folder):
        with pytest.raises(puter.AuthError) as caught:
            Browser(fake).sign_in(config_for(fake, folder), open_browser=None, timeout_s=0.05)
        assert "Nobody signed in" in str(caught.value)
        assert "--no-browser" in str(caught.value)

    def test_a_port_in_use(self, fake, folder, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as busy:
            port = busy.getsockname()[1]
            with pytest.raises(puter.ConfigError, match=f"port {port}"):
                Browser(fake).sign_in(config_for(fake, folder), port=port)
            monkeypatch.setattr(puter, "LOGIN_PORT", port)
            browser = Browser(fake)
            assert browser.sign_in(config_for(fake, folder), port=None)
        assert urlsplit(callback_url(browser.shown[0])).port != port

    def test_the_wanted_port(self, fake, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        browser = Browser(fake)
        for _ in range(2):  # the second one finds the first one's closed connections
            browser.sign_in(config_for(fake, folder), port=port)
        ports = [urlsplit(callback_url(url)).port for url in browser.shown]
        assert ports == [port, port]
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), 5)

    def test_temporary_accounts(self, fake, folder):
        fake.accounts["token-bob"].temporary = True
        assert Browser(fake).sign_in(config_for(fake, folder)).is_temporary
        browser = Browser(fake)
        with pytest.raises(puter.AuthError, match="auto_create_temp_user") as caught:
            browser.sign_in(config_for(fake, folder, auto_create_temp_user=False))
        assert "Sign in to your own account" in str(caught.value)
        ((status, page),) = browser.pages
        assert status == 403 and "temporary account" in page

    def test_a_token_that_the_server_refuses(self, fake, folder):
        browser = Browser(fake, token=SECRET)
        with pytest.raises(puter.AuthError) as caught:
            browser.sign_in(config_for(fake, folder))
        assert browser.pages[0][0] == 403 and "Not signed in" in browser.pages[0][1]
        assert SECRET not in told_by(caught.value) + browser.pages[0][1]

    def test_a_server_that_is_away(self, fake, folder):
        config = config_for(fake, folder)
        fake.stop()
        browser = Browser(fake, token=SECRET)
        with pytest.raises(puter.NetworkError) as caught:
            browser.sign_in(config)
        assert browser.pages[0][0] == 403
        assert SECRET not in told_by(caught.value) + browser.pages[0][1]

    def test_an_answer_that_names_nobody(self, fake, folder):
        fake.routes["GET", "/whoami"] = lambda handler: handler.send(Raw({"username": None}))
        with pytest.raises(puter.ServerError, match="whose token"):
            Browser(fake).sign_in(config_for(fake, folder))

    def test_the_token_is_never_shown(self, fake, folder, caplog, capfd):
        fake.login_token = fake.add_account("carol", SECRET).token
        browser = Browser(fake)
        with caplog.at_level(logging.DEBUG):
            account = browser.sign_in(config_for(fake, folder, debug=True))
        shown = "".join(capfd.readouterr()) + caplog.text + browser.pages[0][1]
        assert SECRET not in shown + repr(account) + "".join(browser.shown)

    @posix_only
    def test_a_browser_that_does_not_wait_for_the_page(self, fake, folder):
        gone = threading.Event()

        def slow(handler: FakeHandler) -> None:
            gone.wait(2)
            whoami(handler)

        def open_browser(url: str) -> None:
            back = urlsplit(callback_url(url))
            with socket.create_connection(("127.0.0.1", back.port), 5) as tab:
                reset_when_closed(tab)  # as when a browser is killed
                tab.sendall(
                    f"GET {back.path}?token=token-bob HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
                )
                assert eventually(lambda: bool(fake.requests))
            gone.set()

        fake.routes["GET", "/whoami"] = slow
        account = Browser(fake).sign_in(
            config_for(fake, folder), open_browser=open_browser, timeout_s=1.0
        )
        assert account.username == "bob"

    def test_a_browser_that_cannot_be_opened_ends_the_server(self, fake, folder):
        addresses: list[str] = []

        def broken(url: str) -> None:
            addresses.append(callback_url(url))
            raise RuntimeError("no browser")

        with pytest.raises(RuntimeError, match="no browser"):
            Browser(fake).sign_in(config_for(fake, folder), open_browser=broken)
        with pytest.raises(requests.exceptions.ConnectionError):
            requests.get(addresses[0], timeout=5)


# =============================================================================
# 13. cli: the accounts
# =============================================================================
def run_here(
    argv: Sequence[str], environ: Mapping[str, str], stdin: str | bytes = b""
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process, whose input is a pipe."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    streams = [io.TextIOWrapper(io.BytesIO(given), "ascii") for given in (data, b"", b"")]
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ, environ, clear=True):
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, stream)
        begin_log()
        try:
            code: Any = puter.main(list(argv))
        except SystemExit as ended:
            code = ended.code or 0
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode() for stream in streams[1:])
    return code, out, err


def run_apart(
    argv: Sequence[str], environ: Mapping[str, str], stdin: str | bytes = b""
) -> tuple[int, str, str]:
    """The same of a command in a process of its own."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    command = [sys.executable, "-m", "puter", *argv]
    done = subprocess.run(
        command, check=False, input=data, capture_output=True, env=environ, timeout=50
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


class Shell:
    """Runs commands as a person does, against the scripted server."""

    def __init__(self, fake: FakePuter, folder: Path) -> None:
        self.fake, self.folder = fake, folder
        urls = dict.fromkeys(("PUTER_API_BASE_URL", "PUTER_GUI_BASE_URL"), fake.url)
        self.environ = clean_environ(folder, **urls)

    def run(
        self, *args: str, stdin: str | bytes = "", apart: bool = False, **environ: str
    ) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command."""
        run = run_apart if apart else run_here
        code, out, err = run(args, {**self.environ, **environ}, stdin)
        assert "Traceback" not in err, err
        return code, out, err

    def good(self, *args: str, stdin: str = "", **environ: str) -> str:
        """Standard output of a command that must work, and say nothing else."""
        code, out, err = self.run(*args, stdin=stdin, **environ)
        assert (code, err) == (0, "")
        return out

    def refused(self, *args: str, stdin: str = "") -> str:
        """The one line on standard error of a command that must fail."""
        code, out, err = self.run(*args, stdin=stdin)
        assert (code, out) == (1, "")
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    @property
    def store(self) -> puter.AccountStore:
        """The accounts that the commands see."""
        return puter.AccountStore(self.folder / ACCOUNTS)

    @property
    def state(self) -> puter.State:
        """The state that the commands see."""
        return puter.State(self.folder / STATE, self.fake.url)


@pytest.fixture
def shell(fake: FakePuter, folder: Path) -> Shell:
    """The commands, with nobody signed in."""
    return Shell(fake, folder)


@pytest.fixture
def two(shell: Shell) -> Shell:
    """The commands, with alice and bob signed in; bob is active."""
    for name in ("alice", "bob"):
        shell.store.add(puter.Account(name, f"token-{name}", 1_700_000_000_000))
    return shell


NOBODY_REMOVED = "No account was removed: nobody is signed in.\n"


class TestAccountCommands:
    """login, logout, switch and status."""

    # login

    def test_login_with_a_token(self, shell):
        argv = ("login", "--with-token")
        _, out, _ = shell.run(*argv, stdin="  token-alice \r\n", apart=True)
        path = shell.folder / ACCOUNTS
        assert out == f"Signed in as alice; 1 account in {path}\n"
        out = shell.good(*argv, stdin="token-bob")
        assert out == f"Signed in as bob; 2 accounts in {path}\n"
        assert names(shell.store) == ["alice", "bob"]
        assert active_name(shell.store) == "bob"

    def test_login_again_renews_the_token_and_ends_the_rests(self, two):
        state = two.state
        state.add_cooldown("alice", "", MINUTE_S, "busy", now=time.time())
        state.add_cooldown("bob", "", MINUTE_S, "busy", now=time.time())
        two.fake.add_account("alice", "token-new")
        two.good("login", "--with-token", stdin="token-new\n")
        assert names(two.store) == ["alice", "bob"]
        alice = two.store.active()
        assert alice and (alice.username, alice.token) == ("alice", "token-new")
        assert alice.added_at_ms == 1_700_000_000_000
        assert [r.account for r in state.cooldowns(time.time())] == ["bob"]
        state.close()

    @pytest.mark.parametrize("token", [SECRET, f"two {SECRET}", f"{SECRET}é"])
    def test_login_with_a_token_that_is_of_no_use(self, shell, token):
        told = shell.refused("login", "--with-token", stdin=token)
        assert SECRET not in told
        assert not shell.store.path.exists()

    def test_login_without_a_server(self, shell):
        shell.fake.stop()
        told = shell.refused("login", "--with-token", stdin=SECRET)
        assert shell.fake.url in told and SECRET not in told

    def test_login_to_a_temporary_account(self, shell):
        shell.fake.accounts["token-bob"].temporary = True
        argv, off = ("login", "--with-token"), {"PUTER_AUTO_CREATE_TEMP_USER": "0"}
        code, _, err = shell.run(*argv, stdin="token-bob", **off)
        assert code == 1 and "auto_create_temp_user" in err
        assert shell.store.accounts() == []
        assert "bob (a temporary account)" in shell.good(*argv, stdin="token-bob")
        assert shell.store.accounts()[0].is_temporary
        assert "(temporary, " in shell.good("status")

    @pytest.mark.parametrize(
        ("argv", "more", "words"),
        [
            ("status", {"PUTER_MAX_RETRIES": "many"}, "PUTER_MAX_RETRIES"),
            ("login --with-token", {}, "--with-token"),
            ("login --no-browser --port 99999", {}, "port"),
            ("login --no-browser --port -1", {}, "port"),
            ("logout alice --all", {}, "not allowed with"),
            *(
                (argv, {}, "usage:")
                for argv in ("", "aks", "switch", "logout a b", "login --port x")
            ),
        ],
    )
    def test_wrong_usage(self, two, argv, more, words):
        code, out, err = two.run(*argv.split(), apart=words == "usage:", **more)
        assert (code, out) == (2, "") and words in err
        assert len(two.store.accounts()) == 2

    def shown_address(self, process: subprocess.Popen[bytes]) -> str:
        """The address that a waiting login shows."""
        assert process.stderr
        for line in process.stderr:
            if b"action=authme" in line:
                return line.decode().strip()
        raise AssertionError("no address was shown")

    def test_login_with_a_browser_elsewhere(self, shell):
        shell.fake.login_token = shell.fake.add_account("carol", SECRET).token
        argv = ("login", "--no-browser", "--port", "0")
        with running_cli(shell.fake, *argv, env=shell.environ) as process:
            status, page = shell.fake.approve(self.shown_address(process))
            out, err = process.communicate(timeout=10)
        assert (process.returncode, status) == (0, 200)
        assert out.startswith(b"Signed in as carol; 1 account in ")
        assert SECRET.encode() not in out + err + page.encode()
        assert shell.store.accounts()[0].token == SECRET

    @posix_only
    def test_login_opens_the_browser(self, shell, tmp_path):
        # A browser that presses the button on the page that it is told to open.
        browser = tmp_path / "browser"
        browser.write_text(
            f"#!{sys.executable}\n"
            "import html, re, sys, urllib.request as u\n"
            "page = u.urlopen(sys.argv[1]).read().decode()\n"
            "u.urlopen(html.unescape(re.search('href=\"([^\"]+)', page)[1])).read()\n"
        )
        browser.chmod(0o700)
        environ = {"BROWSER": f"{browser} %s"}
        code, out, err = shell.run("login", "--port", "0", apart=True, **environ)
        assert (code, out[:16]) == (0, "Signed in as bob")
        assert "Open this URL to sign in" in err

    @posix_only
    def test_ctrl_c_ends_a_waiting_login_at_once(self, shell):
        argv = ("login", "--no-browser", "--port", "0")
        with running_cli(shell.fake, *argv, env=shell.environ) as process:
            self.shown_address(process)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=5)
        assert (process.returncode, out) == (130, b"")
        assert b"Traceback" not in err

    def test_login_with_a_token_in_utf_16(self, shell):
        # What a redirection of an older PowerShell writes.
        raw, strict = f"{SECRET}\n".encode("utf-16"), {"PYTHONIOENCODING": "utf-8:strict"}
        code, _, err = shell.run("login", "--with-token", stdin=raw, apart=True, **strict)
        assert code in (1, 2) and err.startswith("error: ")

    # login --import

    def test_import(self, shell, tmp_path):
        shell.fake.stop()  # it needs no network
        plugin = tmp_path / "plugin.json"
        plugin.write_text(json.dumps({**PLUGIN_FILE, "activeIndex": 1}))
        out = shell.good("login", "--import", str(plugin))
        assert out.splitlines() == ["Added alice", "Added temp_bob", f"2 accounts from {plugin}"]
        assert accounts_json(shell.folder) == json.loads(plugin.read_text())
        assert active_name(shell.store) == "temp_bob"
        assert "Kept temp_bob, whose token is the same" in shell.good(
            "login", "--import", str(plugin)
        )

    @pytest.mark.parametrize("kept", [False, True])
    def test_import_into_a_filled_store(self, shell, tmp_path, kept):
        # Which of two tokens is newer nobody knows: the other one is tried before it replaces ours.
        plugin = tmp_path / "plugin.json"
        plugin.write_text(json.dumps(PLUGIN_FILE))
        for name in ("alice", "bob"):
            shell.store.add(puter.Account(name, f"token-{name}", 1))
        if not kept:
            shell.fake.accounts[SECRET] = FakeAccount("alice", SECRET)
        out = shell.good("login", "--import", str(plugin))
        done = "Kept alice: the other token was refused" if kept else "Renewed the token of alice\n"
        assert out.startswith(done) and "\nAdded temp_bob\n" in out and SECRET not in out
        assert names(shell.store) == ["alice", "bob", "temp_bob"]
        assert shell.store.accounts()[0].token == ("token-alice" if kept else SECRET)
        assert active_name(shell.store) == "bob"

    @pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", "a folder"])
    def test_import_of_what_is_no_accounts_file(self, shell, tmp_path, content):
        path = str(tmp_path / "plugin.json")
        if isinstance(content, bytes):
            Path(path).write_bytes(content)
        elif content == "a folder":
            Path(path).mkdir()
        assert path in shell.refused("login", "--import", path)
        assert not shell.store.path.exists()

    # logout

    def test_logout(self, two):
        out = two.good("logout")
        assert out.startswith("Removed bob.\nThe active account is alice.\n")
        assert "revoke it on puter.com" in out
        assert names(two.store) == ["alice"]
        assert two.good("logout", "alice").startswith("Removed alice.\n")
        assert two.good("logout") == NOBODY_REMOVED

    @pytest.mark.parametrize(
        ("which", "said", "left"),
        [
            ("alice", "Removed alice.\nThe active account is bob.\n", ["bob"]),
            ("--all", "Removed alice, bob.\n", []),
        ],
    )
    def test_logout_of_others(self, two, which, said, left):
        assert two.good("logout", which).startswith(said) and names(two.store) == left
        if not left:
            assert two.good("logout", "--all") == NOBODY_REMOVED
            assert "python -m puter login" in two.refused("switch", "alice")

    def test_switch(self, two):
        assert two.good("switch", "alice") == "The active account is alice.\n"
        assert "Did you mean 'bob'?" in two.refused("switch", "bop")
        told = two.refused("logout", "Bob")
        assert "Did you mean 'bob'?" in told and "alice, bob" in told
        assert active_name(two.store) == "alice" and len(two.store.accounts()) == 2

    # status

    def test_status(self, two):
        now, state = time.time(), two.state
        state.record_success("alice", ("m",), now - 7205, now - 7200)
        state.add_cooldown("alice", "m1", 500.0, "upstream_failed", now)
        state.add_cooldown("bob", "", 900.0, "too_many_requests", now)
        state.add_cooldown("bob", "old", -1.0, "is over", now)
        state.close()
        lines = two.good("status").splitlines()
        assert re.fullmatch(r"  alice  \(last used \d{4}-\d\d-\d\d \d\d:\d\d\)", lines[0])
        assert lines[1] == "* bob  (last used never)"
        assert re.fullmatch(r"  cooldown: m1 on alice, \d+ s left \(upstream_failed\)", lines[2])
        assert re.fullmatch(r"  cooldown: bob, \d+ s left \(too_many_requests\)", lines[3])
        assert len(lines) == 4

    def test_status_as_json(self, two):
        state = two.state
        state.add_cooldown("bob", "m", 900.0, "busy", time.time())
        state.add_cooldown("alice", "", 1e9, "login", time.time(), token="token-alice")
        state.close()
        out = two.good("status", "--json")
        data = json.loads(out)
        assert data["config_dir"] == str(two.folder)
        alice, bob = data["accounts"]
        assert alice == {
            "username": "alice",
            "active": False,
            "temporary": False,
            "added_at_ms": 1_700_000_000_000,
            "last_used_ms": None,
            "needs_login": True,
        }
        assert (bob["active"], bob["needs_login"]) == (True, False)
        (rest,) = data["cooldowns"]
        left = rest.pop("seconds_left")
        assert 0 < left <= 900
        assert rest == {"account": "bob", "model": "m", "reason": "busy", "strikes": 1}
        assert "token-" not in out
        out = two.good("status")
        assert "alice  (needs a new sign-in: python -m puter login" in out
        assert out.count("cooldown:") == 1
        two.store.add(puter.Account("alice", "another"))
        assert "needs a new" not in two.good("status")

    def test_status_without_accounts(self, shell):
        code, out, err = shell.run("status")
        assert (code, err) == (1, "") and "python -m puter login" in out
        code, out, _ = shell.run("status", "--json")
        assert code == 1 and json.loads(out)["accounts"] == []

    def test_status_with_a_token_of_the_environment(self, two):
        out = two.good("status", PUTER_AUTH_TOKEN=SECRET)
        assert out.startswith("PUTER_AUTH_TOKEN is set") and SECRET not in out

    def test_status_tells_of_a_damaged_state(self, two):
        (two.folder / STATE).write_bytes(b"this is no database, " * 500)
        code, out, err = two.run("status")
        assert code == 0 and "* bob" in out
        assert STATE in err

    def test_clearing_the_cooldowns(self, two):
        state = two.state
        for model in ("", "m"):
            state.add_cooldown("bob", model, MINUTE_S, "busy", time.time())
        state.add_cooldown("alice", "", MINUTE_S, "busy", now=0.0)  # over long ago
        assert two.good("status", "--clear-cooldowns") == "Ended 2 cooldowns.\n"
        assert state.cooldowns(time.time()) == []
        assert two.good("status", "--clear-cooldowns") == "Ended 0 cooldowns.\n"
        state.close()

    # all of them

    @pytest.mark.parametrize(
        "command",
        [
            *("login --with-token", "logout", "logout --all", "logout alice", "switch alice"),
            *("status", "status --json"),
        ],
    )
    def test_a_broken_file_is_named_and_kept(self, two, command):
        path = two.store.path
        raw = b'{"version": 1, "accounts": [{"authToken": "%b"' % SECRET.encode()
        path.write_bytes(raw)
        told = two.refused(*command.split(), stdin="token-alice")
        assert str(path) in told and SECRET not in told
        assert path.read_bytes() == raw

    def test_debug_shows_what_happens_to_the_accounts(self, shell):
        on: Any = {"apart": True, "PUTER_DEBUG": "1"}
        code, _, err = shell.run("login", "--with-token", stdin="token-alice", **on)
        assert code == 0 and "token-alice" not in err
        assert re.search(r"(?m)^\[puter-auth\] [\d:]{8} Auth: Account added - alice$", err)
        _, _, err = shell.run("switch", "alice", **on)
        assert "Auth: Switched account - alice" in err

    @posix_only
    @pytest.mark.parametrize(
        ("redirection", "args", "code", "words"),
        [
            ("<&-", "login --with-token", 2, "error: No token came."),
            ("<&-", "chat", 0, ""),
            ("<&-", "ask --no-fallback hi", 0, ""),
            (">&-", "status", 1, "error: The output cannot be written"),
            (">&-", "ask hi", 1, "error: The output cannot be written"),
            (">/dev/full", "status", 1, "error: The output cannot be written"),
            ("2>&-", "ask hi", 0, ""),
            ("2>/dev/full", "switch nobody", 1, ""),
        ],
    )
    def test_streams_that_are_closed_or_full(self, two, redirection, args, code, words):
        done = subprocess.run(
            ["sh", "-c", f'"$0" -m puter {args} {redirection}', sys.executable],
            env=two.environ,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        assert (done.returncode, done.stderr[: len(words)]) == (code, words), done.stderr
        assert done.stderr.count("\n") == bool(words)
        if "ask" in args:
            assert len(two.fake.chat_calls()) == (code == 0)
            assert bool(done.stdout) is (code == 0)

    @pytest.mark.parametrize(
        ("command", "key", "value"),
        [
            ("status --clear-cooldowns", "cleared", 0),
            ("stats --reset", "reset", "all"),
            ("cache --clear", "deleted", 0),
            ("config path", "path", None),
            ("status --check", 0, {"ok": True}),
        ],
    )
    def test_json_is_json(self, two, command, key, value):
        found = json.loads(two.good(*command.split(), "--json"))[key]
        assert found == value or value is None or found.items() >= value.items()

    @pytest.mark.parametrize(("argv", "port"), [((), None), (("--port", "0"), 0)])
    def test_only_the_default_port_may_move(self, two, monkeypatch, capsys, argv, port):
        asked: list[Any] = []

        def sign_in(config: Any, **more: Any) -> puter.Account:
            asked.append(more["port"])
            return puter.Account("carol", SECRET)

        monkeypatch.setattr(puter, "browser_login", sign_in)
        monkeypatch.setenv("PUTER_CONFIG_DIR", str(two.folder))
        assert puter.main(["login", *argv]) == 0 and asked == [port]

    def test_what_needs_no_network_loads_no_network(self, two):
        script = """
            for args in (["status"], ["switch", "alice"], ["logout", "alice"]):
                assert puter.main(args) == 0
            assert not {"requests", "http.server", "sseclient"} & set(sys.modules)
        """
        done = run_script(script, two.folder)
        assert (done.returncode, done.stderr) == (0, "")


# =============================================================================
# Helpers of the client's tests
# =============================================================================
MakeClient = Callable[..., puter.Puter]
Script = Callable[[FakeHandler, dict[str, Any]], Answer]

# The free models of the fake catalogue, in the order in which they stand in.
FREE = (
    "openrouter:xiaomi/mimo-v2-flash:free",
    "openrouter:deepseek/deepseek-r1-0528:free",
    "openrouter:mistralai/devstral-2512:free",
    "openrouter:qwen/qwen3-coder:free",
    "allam-2-7b",
)
OPUS = "claude-opus-4-5-20251101"
HAIKU, SONNET = "claude-haiku-4-5-20251001", "claude-sonnet-5"
PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 16
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
NO_MODEL = (400, {"code": "bad_request", "message": "Model not found: x"})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own for settings, accounts and state."""
    for name in [name for name in os.environ if name.startswith("PUTER_")]:
        monkeypatch.delenv(name)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PUTER_CONFIG_DIR", str(tmp_path / "puter"))
    return tmp_path / "puter"


@pytest.fixture
def make(fake: FakePuter, home: Path) -> Iterator[MakeClient]:
    """Makes clients of the fake server: `make("alice", "bob", max_retries=0)`."""
    made: list[puter.Puter] = []

    def make_client(*usernames: str, **settings: Any) -> puter.Puter:
        sign_in(fake, home, *(usernames or ("alice",)))
        urls = {"api_base_url": fake.url, "gui_base_url": fake.url}
        more = {**urls, "retry_delay_ms": 1, **settings}
        made.append(puter.Puter(**more))
        return made[-1]

    yield make_client
    for client in made:
        client.close()


def sign_in(fake: FakePuter, home: Path, *usernames: str) -> None:
    """Keeps the accounts in the store, the first one active, and tells the server of them."""
    store = puter.AccountStore(home)
    for username in usernames:
        if f"token-{username}" not in fake.accounts:
            fake.add_account(username)
        known = [account.username for account in store.accounts()]
        if username not in known:
            account = puter.Account(username, f"token-{username}", 1)
            store.add(account, activate=not known)


def lab(name: str) -> str:
    """The id of the model of a scenario."""
    return name if name == "fake" else f"openrouter:lab/{name}"


def told(fake: FakePuter) -> list[str]:
    """Every driver call that the server saw: "alice text", or "alice F1" for a stand-in."""
    short = {model: f"F{number}" for number, model in enumerate(FREE, 1)}
    return [
        f"{account} {short.get(str(model), str(model).removeprefix('openrouter:lab/'))}"
        for account, model in fake.chat_calls()
    ]


def ask(client: puter.Puter, how: str, model: str, **more: Any) -> puter.Reply:
    """The whole reply, by `chat` or by a stream that is read to its end."""
    if how == "chat":
        return client.chat("hi", model=model, **more)
    with client.stream("hi", model=model, **more) as stream:
        for _ in stream:
            pass
        return stream.reply


def text_of_chunks(chunks: list[puter.Chunk]) -> str:
    """The text of a stream's chunks."""
    return "".join(map(str, chunks))


def calls_of(reply: puter.Reply) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of the tool calls of a reply."""
    return [(call.name, call.arguments) for call in reply.tool_calls]


def line(kind: str, **fields: Any) -> bytes:
    """A line of a driver stream."""
    return compact({"type": kind, **fields}).encode() + b"\n"


def event(**delta: Any) -> bytes:
    """An event of an OpenAI stream."""
    return f"data: {compact({'choices': [{'index': 0, 'delta': delta}]})}\n\n".encode()


def streams(*chunks: bytes, content_type: str | None = None) -> Script:
    """A scenario that streams the given chunks and ends as a stream should."""

    def send(handler: FakeHandler, args: dict[str, Any]) -> Answer:
        handler.begin_stream(content_type)
        for chunk in chunks:
            handler.chunk(chunk)
        handler.end_stream()
        return None

    return send


def silent(handler: FakeHandler, args: dict[str, Any]) -> Answer:
    """A scenario that never sends a byte."""
    handler.pause(30.0)
    return None


def stalls(*chunks: bytes) -> Script:
    """A scenario that streams the given chunks, and then falls silent."""

    def send(handler: FakeHandler, args: dict[str, Any]) -> Answer:
        handler.begin_stream()
        for chunk in chunks:
            handler.chunk(chunk)
        return silent(handler, args)

    return send


def refusing(status: int, code: str, message: str = "no") -> Raw:
    """An error of the server."""
    return Raw({"code": code, "message": message, "error": message}, status)


def in_background(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Starts the work in a thread; its value, or the error that it raised, comes into a list."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001 (handed over)
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


def opening(
    client: puter.Puter, model: str, **more: Any
) -> tuple[Any, threading.Thread, list[Any]]:
    """A stream that another thread opens: what gives it up, the thread, and its outcome."""
    call = puter._Cancellation()
    request = client._build_request("hi", model, **more)
    return (call, *in_background(lambda: client._open(request, call)))


def running_on(client: puter.Puter, username: str = "alice") -> int:
    """How many places of an account are taken in this client."""
    return client._limits[username]._running


@pytest.fixture
def move_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock forward by so many seconds."""
    real, moved = time.time, [0.0]

    def move(seconds: float) -> None:
        moved[0] += seconds

    monkeypatch.setattr(puter.time, "time", lambda: real() + moved[0])
    return move


@pytest.fixture
def short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puter's limit of requests lasts half a second, and is hardly waited for."""
    for name, seconds in {"WINDOW": 0.5, "PAUSE": 0.01, "PATIENCE": 0.0}.items():
        monkeypatch.setattr(puter, f"RATE_{name}_S", seconds)


@contextmanager
def raw_server(serve: Callable[[socket.socket], None], host: str = "127.0.0.1") -> Iterator[str]:
    """A server that knows no HTTP: `serve` gets each connection; gives the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    kept: list[socket.socket] = []

    def run(connection: socket.socket) -> None:
        with suppress(OSError):
            serve(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                kept.append(connection)
                threading.Thread(target=run, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        named = f"[{host}]" if ":" in host else host
        yield f"http://{named}:{listener.getsockname()[1]}"
    finally:
        for one in (listener, *kept):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def reset_when_closed(connection: socket.socket) -> None:
    """Lets the other side see a reset, as from a machine that knows nothing of it any more."""
    linger = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def sit_down(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], str]) -> None:
    """Somebody sits at the terminal, and answers what is asked."""
    monkeypatch.setattr(puter, "_is_interactive", lambda: True)
    monkeypatch.setattr(builtins, "input", answer)


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages of the log."""
    return [record.getMessage() for record in caplog.records if record.name == "puter"]


def count_connections(fake: FakePuter) -> Callable[[], int]:
    """Counts the connections that clients open from now on."""
    opened: list[Any] = []
    server = fake._server
    assert server is not None
    before = server.process_request

    def process(request: Any, address: Any) -> None:
        opened.append(address)
        before(request, address)

    server.process_request = process  # type: ignore
    return lambda: len(opened)


# What each scenario must come to: for a whole reply, and for a stream of it. A value is what
# is special about the reply; an error is its kind and how many requests it takes when two
# retries are allowed.
PLAIN: dict[str, Any] = {"text": SENTENCE, "finish_reason": "stop"}
GOOD: dict[str, dict[str, Any]] = {
    "text": {"usage": puter.Usage(11, 22, 0, 33, 0.000055)},
    "reason": {"reasoning": "thinking..."},
    "empty": {"text": ""},
    "length": {"finish_reason": "length"},
    "refusal": {},
    "tools": {"text": "", "finish_reason": "tool_calls"},
    "twotools": {"text": "", "finish_reason": "tool_calls"},
    "vision": {"text": 'parts: ["text"]'},
    "midfail": {},
    "cut": {},
    "nousage": {"usage": puter.Usage()},
    "slow": {},
    "long": {"text": " ".join(f"word{number}" for number in range(2000))},
    "fake": {"text": LOREM},
    "brain": {"text": "Hello from the stub model."},
    "halfline": {},
    "nousageline": {},
    "flaky": {},
    "anthropic": {"finish_reason": "tool_calls"},
    "openaiusage": {"usage": puter.Usage(11, 22, 5, 38, 0.0001)},
    "unicode": {"text": ODD_TEXT},
    "echo": {"text": "hi"},
    "extra": {"text": "", "finish_reason": "tool_calls"},
    "draw": {"text": "", "images": (puter.Picture(base64.b64decode(ONE_PIXEL)),)},
}
PARIS = ("get_weather", {"city": "Paris"})
CALLS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "tools": [PARIS],
    "twotools": [PARIS, ("get_time", {"tz": "CET"})],
    "anthropic": [PARIS],
    "extra": [PARIS],
}
BAD: dict[str, tuple[type[puter.PuterError], int]] = {
    "err400": (puter.BadRequestError, 1),
    "err401": (puter.ProviderAuthError, 1),
    "err403": (puter.ProviderAuthError, 1),
    "err429": (puter.ModelRateLimitError, 1),
    "err500": (puter.ModelUnavailableError, 2),
    "err529": (puter.ModelUnavailableError, 2),
    "hang": (puter.RequestTimeoutError, 1),
    "closed": (puter.ReplyError, 1),
    "badjson": (puter.ReplyError, 1),
    "html": (puter.ServerError, 3),
    "notjson": (puter.ReplyError, 1),
    "busy503": (puter.ServerError, 2),
    "internal": (puter.ServerError, 3),
    "denied": (puter.ModelAccessError, 1),
    "oldfail": (puter.ModelAccessError, 1),
    "blocked": (puter.BadRequestError, 1),
    "badargs": (puter.ReplyError, 1),
}
# A stream differs: no finish reason but what the calls tell, and one call of two.
BROKEN_STREAMS = {
    "midfail": "The quick brown fox — ",
    "cut": "The quick brown fox — ",
    "closed": None,
    "halfline": SENTENCE.removesuffix("line."),
    "nousageline": SENTENCE,
    "blocked": LOREM,
}

GOOD_STREAMED: dict[str, dict[str, Any]] = {
    **{name: GOOD[name] for name in GOOD if name not in BROKEN_STREAMS},
    "length": {},
}
BAD_CASES = [("chat", name) for name in BAD] + [
    ("stream", name) for name in BAD if name not in {**GOOD_STREAMED, **BROKEN_STREAMS}
]


def check_reply(reply: puter.Reply, want: Mapping[str, Any]) -> None:
    """Compares the fields of a reply that a table names."""
    assert {name: getattr(reply, name) for name in want} == want


# =============================================================================
# Transport
# =============================================================================
class TestTransport:
    """The road to the server: every way in which it can fail has a kind and a text."""

    def test_the_tables_know_every_scenario(self):
        assert GOOD.keys() | BAD.keys() == SCENARIOS.keys()
        streamed = GOOD_STREAMED.keys() | BAD.keys() | BROKEN_STREAMS.keys()
        assert streamed == SCENARIOS.keys()

    @pytest.mark.parametrize("scenario", GOOD)
    def test_a_whole_reply(self, make, fake, scenario):
        reply = make().chat("hi", model=lab(scenario), fallback=False)
        check_reply(reply, {**PLAIN, **GOOD[scenario]})
        assert calls_of(reply) == CALLS.get(scenario, [])
        assert str(reply) == reply.text
        assert (reply.model, reply.account) == (lab(scenario), "alice")
        assert len(reply.attempts) == len(fake.chat_calls())

    @pytest.mark.parametrize(("how", "scenario"), BAD_CASES)
    def test_an_error_has_its_kind_and_its_number_of_requests(self, make, fake, scenario, how):
        kind, count = BAD[scenario]
        if (how, scenario) == ("stream", "hang"):
            count = 2  # what may be billed is sent again only for a stream, and once
        # Each retry of this one waits a second, as its server asks.
        retries = 1 if scenario == "busy503" else 2
        client = make(max_retries=retries, api_timeout_ms=150 if scenario == "hang" else 5_000)
        with pytest.raises(kind) as caught:
            ask(client, how, lab(scenario), fallback=False)
        error = caught.value
        assert type(error) is kind
        assert len(fake.chat_calls()) == len(error.attempts) == count
        assert (error.model, error.account) == (lab(scenario), "alice")
        assert error.hint and "token-" not in repr(vars(error)) + str(error)
        assert eventually(lambda: fake.accounts["token-alice"].running == 0)
        assert running_on(client) == 0

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("http://127.0.0.1:{dead}", "refused"),
            ("http://no-such-host.invalid", "no-such-host.invalid"),
            ("https://127.0.0.1:{live}", "TLS"),
            ("http://127.0.0.1:{live}", "proxy"),
        ],
    )
    def test_there_is_no_way_to_the_server(self, make, fake, monkeypatch, url, words):
        if words == "proxy":
            monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
            for name in ("NO_PROXY", "no_proxy"):
                monkeypatch.delenv(name, raising=False)
        client = make(api_base_url=url.format(dead=free_port(), live=fake.port), max_retries=1)
        with pytest.raises(puter.NetworkError, match=words) as caught:
            client.chat("hi")
        assert len(caught.value.attempts) == 2
        assert "api_base_url" in str(caught.value)
        assert not fake.requests

    @pytest.mark.parametrize("status", [301, 302, 307, 308])
    def test_the_token_does_not_follow_a_redirect(self, make, fake, status):
        with FakePuter() as other:
            there = {"Location": f"{other.url}/drivers/call"}
            fake.script[lab("text")] = replies({}, status, headers=there)
            with pytest.raises(puter.ServerError, match=re.escape(other.url)):
                make(max_retries=0).chat("hi", model=lab("text"))
            assert not other.requests

    @pytest.mark.parametrize(
        ("content_type", "is_stream"),
        [
            ("application/x-ndjson; charset=utf-8", True),
            ("Application/X-NDJSON", True),
            ("application/jsonl", True),
            (SSE_TYPE, True),
            ("text/plain", False),
            (HTML_TYPE, False),
            ("application/octet-stream", False),
        ],
    )
    def test_a_stream_is_known_by_its_content_type(self, make, fake, content_type, is_stream):
        pieces = [line("text", text="yes"), line("usage", usage=USAGE)]
        if content_type == SSE_TYPE:
            pieces = [event(content="yes"), b"data: [DONE]\n\n"]
        fake.script[lab("text")] = streams(*pieces, content_type=content_type)
        if is_stream:
            assert ask(make(), "stream", lab("text")).text == "yes"
        else:
            with pytest.raises(puter.ReplyError, match=content_type.partition(";")[0]):
                make().stream("hi", model=lab("text"))
        assert len(fake.chat_calls()) == 1

    def test_a_server_that_does_not_stream_is_understood(self, make, fake):
        turn = Turn("whole", reasoning=("thought",))
        fake.script[lab("text")] = replies(driver_reply(turn, openrouter_model("m")))
        with make().stream("hi", model=lab("text")) as stream:
            kinds = [chunk.type for chunk in stream]
        assert kinds == ["reasoning", "text", "usage"]
        assert stream.reply.text == "whole"

    @pytest.mark.parametrize(
        ("size", "content_type", "pack"),
        table(
            ["another name", 3, "text/plain", None],
            ["long and packed: byte by byte this takes many times as long", 500_000, JSON_TYPE, "gzip"],
        ),
    )  # fmt: skip
    def test_a_body_is_read(self, make, fake, size, content_type, pack):
        words = os.urandom(size).hex()
        body = compact(driver_reply(Turn(words), openrouter_model("m"))).encode()
        body, head = (gzip.compress(body, 1), {"Content-Encoding": "gzip"}) if pack else (body, {})
        fake.script[lab("text")] = replies(body, 200, content_type, headers=head)
        assert make(max_retries=0, api_timeout_ms=700).chat("hi", model=lab("text")).text == words

    def test_a_netrc_does_not_override_the_token(self, make, fake, tmp_path, monkeypatch):
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login me password secret\n")
        netrc.chmod(0o600)
        monkeypatch.setenv("NETRC", str(netrc))
        # Shows that requests would use it.
        plain = requests.get(f"{fake.url}/whoami", timeout=10)
        assert plain.request.headers["Authorization"].startswith("Basic ")
        client = make()
        client.chat("hi", model=lab("text"))
        client.models()
        sent = [one.headers.get("Authorization") for one in fake.requests[1:]]
        assert sent == ["Bearer token-alice", None]

    def test_cookies_of_one_account_are_not_sent_with_another(self, make, fake):
        refusal = {"code": "too_many_requests", "message": "Slow down"}
        cookie = {"Set-Cookie": "session=of-alice; Path=/"}
        fake.script[lab("text")] = [replies(refusal, 429, headers=cookie), "text"]
        make("alice", "bob").chat("hi", model=lab("text"))
        assert told(fake) == ["alice text", "bob text"]
        assert all(one.headers.get("Cookie") is None for one in fake.requests)

    def test_connections_are_used_again(self, make, fake):
        opened, client = count_connections(fake), make()
        for how in ("chat", "stream") * 4:
            ask(client, how, lab("text"))
        assert opened() == 1

    @pytest.mark.parametrize("scenario", ["err400", "denied", "notjson"])
    def test_a_stream_that_failed_leaves_its_connection_to_others(self, make, fake, scenario):
        opened, client = count_connections(fake), make(max_retries=0)
        for _ in range(3):
            with pytest.raises(puter.PuterError):
                ask(client, "stream", lab(scenario), fallback=False)
            gc.collect()  # a stream that is dropped late must not hang up on others
            assert client.chat("hi", model=lab("text")).text == SENTENCE
        assert opened() == 1

    def test_an_idle_connection_that_the_server_closed_is_no_failure(self, make, fake):
        client = make(max_retries=1)
        client.chat("hi", model=lab("text"))
        fake.stop()
        fake.start()
        assert client.chat("hi", model=lab("text")).text == SENTENCE

    def test_a_whole_reply_that_stalls_after_its_headers_is_not_asked_for_again(self, make, fake):
        def send(handler, _):
            handler.send(Raw(b'{"success": true, "resu'), 1_000)
            handler.pause(5.0)
            handler.drop()

        fake.script[lab("text")] = send
        # It was made, and billed: a second one would be billed again.
        with pytest.raises(puter.PuterError):
            make(api_timeout_ms=150).chat("hi", model=lab("text"))
        assert len(fake.chat_calls()) == 1

    def test_a_reply_in_drops_ends_with_the_timeout(self, make, fake):
        def send(handler, _):
            handler.begin_stream(JSON_TYPE)
            while True:
                handler.chunk(b" ")
                handler.pause(0.02)

        fake.script[lab("text")] = send
        with pytest.raises(puter.ReplyError, match="not complete after 0.2 s"):
            make(max_retries=0, api_timeout_ms=200).chat("hi", model=lab("text"))

    @pytest.mark.parametrize("how", ["first request", "after a stream"])
    def test_a_slow_upload_has_as_much_time_as_a_slow_reply(self, home, monkeypatch, how):
        # A picture on a slow line: the server takes the bytes late, within `timeout_ms`.
        monkeypatch.setattr(puter, "CONNECT_TIMEOUT_S", 0.2)
        body = line("text", text="seen") + line("usage", usage=USAGE)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {NDJSON_TYPE}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"

        def serve(connection: socket.socket) -> None:
            while read_request(connection, late_s=0.5):
                connection.sendall(head.encode() + body)

        with raw_server(serve) as url, puter.Puter("t", api_base_url=url, max_retries=0) as client:
            if how == "after a stream":
                ask(client, "stream", lab("text"))
            words = "x" * 20_000_000  # more than the buffers of a socket hold
            with client.stream(words, model=lab("text")) as stream:
                assert text_of_chunks(list(stream)) == "seen"

    @pytest.mark.parametrize("token", ["two words", "line\nbreak", "schlüssel"])
    def test_a_broken_token_is_not_sent(self, make, fake, token):
        with pytest.raises(puter.AuthError, match="a space") as caught:
            make(token=token).chat("hi")
        assert all(seen.path == DETAILS and seen.token is None for seen in fake.requests)
        assert token not in str(caught.value)

    @pytest.mark.parametrize("case", ["token", "timeout"])
    def test_an_error_is_not_its_own_cause(self, make, case):
        # Programs that follow the causes to their end would never come to it.
        token = "two words" if case == "token" else "token-alice"
        client = make(token=token, max_retries=0, api_timeout_ms=100)
        with pytest.raises(puter.PuterError) as caught:
            client.chat("hi", model=lab("hang" if case == "timeout" else "text"))
        assert caught.value.__cause__ is not caught.value

    @pytest.mark.parametrize(
        ("base", "gui", "foreign"),
        table(
            ["Puter", "https://api.puter.com", "https://puter.com", False],
            ["Puter's endpoint", "https://api.puter.com/puterai/openai/v1", "https://puter.com", False],
            ["its path elsewhere", "http://box:1/puterai/openai/v1", "https://puter.com", "box:1/v1"],
            ["its port", "https://api.puter.com:443", "https://puter.com", False],
            ["one's own by default", "http://api.puter.localhost:4100", "https://puter.com", False],
            ["a Puter of one's own", "http://api.box:4100", "http://box:4100", False],
            ["on one origin", "http://box:4100", "http://box:4100", False],
            ["another path there", "http://box:4100/v1", "http://box:4100", True],
            ["a gateway", "http://127.0.0.1:1234/v1", "https://puter.com", True],
            ["a bare origin", "http://127.0.0.1:1234", "https://puter.com", "127.0.0.1:1234/v1"],
            ["one that looks like Puter's", "https://api.puter.com.x.io", "https://puter.com", "x.io/v1"],
        ),
    )  # fmt: skip
    def test_is_foreign(self, home, base, gui, foreign):
        settings = {"api_base_url": base, "gui_base_url": gui}
        assert not puter.is_foreign(puter.Config.load(**settings))
        config = puter.Config.load(**settings, api_style="openai")
        if isinstance(foreign, bool):
            assert puter.is_foreign(config) is foreign
        else:
            with pytest.raises(puter.ConfigError, match=f"Write .*{foreign}"):
                puter.Puter(config=config)

    # 504 and 52x are of proxies that gave up while the server worked on.
    @pytest.mark.parametrize("how", ["chat", "stream"])
    @pytest.mark.parametrize("status", [500, 502, 503, 504, 520, 522, 524])
    def test_what_may_be_billed_is_not_sent_again(self, make, fake, how, status):
        fake.script[lab("text")] = lambda *_: Raw(b"no", status, HTML_TYPE)
        with pytest.raises(puter.ServerError) as caught:
            ask(make(max_retries=3), how, lab("text"))
        billed = status in (504, 520, 522, 524)
        assert caught.value.may_be_billed is billed
        assert len(fake.chat_calls()) == ((1 if how == "chat" else 2) if billed else 4)

    @posix_only
    def test_somebody_elses_timeout_is_not_ours_to_retry(self, make, fake):
        def ring(*_: Any) -> None:
            raise TimeoutError("the user's alarm")

        fake.script[lab("text")] = silent
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            with pytest.raises(TimeoutError, match="the user's alarm"):
                make().chat("hi", model=lab("text"))
        finally:
            signal.signal(signal.SIGALRM, before)
        assert len(fake.chat_calls()) == 1

    def test_the_token_is_in_no_part_of_an_error(self, make, fake):
        def redirect(handler, _):
            return Raw({}, 302, headers={"Location": f"{fake.url}/?was={handler.seen.token}"})

        def page(handler, _):
            # Some proxies print the request that they refuse.
            return Raw(f"<pre>{handler.headers['Authorization']}</pre>".encode(), 400, HTML_TYPE)

        fake.script[lab("text")] = [redirect, page, silent]
        client = make(max_retries=0, api_timeout_ms=100)
        for _ in range(3):
            with pytest.raises(puter.PuterError) as caught:
                client.chat("hi", model=lab("text"))
            error = caught.value
            while error is not None:
                request = getattr(error, "request", None)
                shown = f"{error} {error!r} {vars(error)} {getattr(request, 'headers', '')}"
                assert "token-alice" not in shown
                error = error.__cause__ or error.__context__

    @pytest.mark.parametrize(
        ("case", "words"), [("socks", r"PySocks.*requests\[socks\]"), ("sse", "sseclient-py")]
    )
    def test_packages_that_are_missing_are_named(self, make, fake, monkeypatch, case, words):
        if case == "socks":
            monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:9")
            monkeypatch.setenv("NO_PROXY", "")
            monkeypatch.setenv("no_proxy", "")
            if importlib.util.find_spec("socks"):
                pytest.skip("PySocks is here")
        else:
            monkeypatch.setitem(sys.modules, "sseclient", types.ModuleType("sseclient"))
        with pytest.raises(puter.ConfigError, match=words):
            ask(make(api_style="openai"), "stream", lab("text"))

    def test_a_recorded_response_is_readable(self, make):
        class Recorded(requests.Session):
            def request(self, *_, **__):
                response = requests.Response()
                response.status_code, response.headers["Content-Type"] = 200, JSON_TYPE
                body = driver_reply(Turn("old"), openrouter_model("m"))
                response.raw = io.BytesIO(compact(body).encode())
                return response

        assert make(session=Recorded()).chat("hi", model="m").text == "old"

    def test_what_json_cannot_hold_is_not_sent(self, make, fake):
        for value in (object(), float("nan"), {1, 2}):
            with pytest.raises(puter.BadRequestError, match="JSON"):
                make().chat("hi", temperature=value)
        assert not fake.requests

    def test_a_given_session_is_used_and_left_open(self, make, fake):
        with requests.Session() as session:
            session.headers.update({"X-Mine": "1", "User-Agent": "mine/2"})
            client = make(session=session)
            client.chat("hi", model=lab("text"))
            ask(client, "stream", lab("text"))
            client.close()
            assert session.get(f"{fake.url}/puterai/chat/models", timeout=10).ok
        sent = [(one.headers["X-Mine"], one.headers["User-Agent"]) for one in fake.requests]
        assert sent == [("1", "mine/2")] * 3
        assert fake.requests[0].token == "token-alice"


# =============================================================================
# Faults of the wire
# =============================================================================
WIRE_TEXT = "Hello there"


def wire_parts(how: str) -> tuple[bytes, list[bytes]]:
    """An answer byte by byte: its head, and its body in the pieces of HTTP, the empty one last."""
    if how == "chat":
        body = [compact(driver_reply(Turn(WIRE_TEXT), openrouter_model("m"))).encode()]
    else:
        first, rest = WIRE_TEXT.split(" ")
        body = [line("text", text=first), line("text", text=f" {rest}"), line("usage", usage=USAGE)]
    kind = JSON_TYPE if how == "chat" else NDJSON_TYPE
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
    pieces = [b"%x\r\n%b\r\n" % (len(part), part) for part in body]
    return head.encode(), [*pieces, b"0\r\n\r\n"]


def read_request(connection: socket.socket, late_s: float = 0.0) -> bytes:
    """The head of a request, once its body has come, too; a long one is read `late_s` later."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (got := connection.recv(65_536)):
            raise ConnectionAbortedError("the client has gone away")
        data += got
    head, body = data.split(b"\r\n\r\n", 1)
    length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
    time.sleep(late_s if length > 1_000_000 else 0)
    missing = length - len(body)
    while missing > 0:
        missing -= len(connection.recv(65_536))
    return head


@contextmanager
def client_of(sent: bytes, host: str = "127.0.0.1") -> Iterator[puter.Puter]:
    """A client of a server that answers every request with these bytes."""

    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(sent)

    with raw_server(serve, host) as url, puter.Puter("t", api_base_url=url) as client:
        yield client


def hang_up(connection: socket.socket, how: str) -> None:
    """Ends a connection in order ("closed"), or as a machine that knows nothing of it ("reset")."""
    if how == "reset":
        time.sleep(0.02)  # what was sent before is read first
        reset_when_closed(connection)
        connection.close()
    else:
        connection.shutdown(socket.SHUT_RDWR)


class TestFaults:
    """What networks, proxies and servers do to an answer on its way."""

    # Where the connection ends, and what comes of it: an error and the number of requests, or
    # the whole text. Once the request was sent it may have been worked for and billed: only a
    # stream of which nothing was seen is asked for again, once. A missing end is no loss.
    @pytest.mark.parametrize("end", ["closed", "reset"])
    @pytest.mark.parametrize(
        ("place", "chat", "stream"),
        [
            ("before the head", (puter.NetworkError, 1), (puter.NetworkError, 2)),
            ("in the status", (puter.NetworkError, 1), (puter.NetworkError, 2)),
            ("after the head", (puter.ReplyError, 1), (puter.NetworkError, 2)),
            ("in a size", (puter.ReplyError, 1), (puter.NetworkError, 2)),
            ("in a line", (puter.ReplyError, 1), (puter.NetworkError, 2)),
            ("after a line", None, (puter.StreamError, 1)),
            ("after the last line", None, None),
            ("in the end", None, None),
        ],
    )
    @pytest.mark.parametrize("how", ["chat", "stream"])
    def test_the_connection_ends(self, home, how, place, chat, stream, end):
        head, pieces = wire_parts(how)
        sent, want, asked = head + b"".join(pieces), {"chat": chat}.get(how, stream), []
        until = {
            "before the head": 0,
            "in the status": 9,
            "after the head": len(head),
            "in a size": len(head) + 1,
            "in a line": len(head) + 9,
            "after a line": len(head) + len(pieces[0]),
            "after the last line": len(sent) - len(pieces[-1]),
            "in the end": len(sent) - 2,
        }[place]

        def serve(connection: socket.socket) -> None:
            asked.append(read_request(connection))
            connection.sendall(sent[:until])
            hang_up(connection, end)

        settings: Any = {"max_retries": 1, "retry_delay_ms": 0}
        with raw_server(serve) as url, puter.Puter("t", api_base_url=url, **settings) as client:
            if want is None:
                assert ask(client, how, "m", fallback=False).text == WIRE_TEXT
                assert len(asked) == 1
                return
            with pytest.raises(want[0]) as caught:
                ask(client, how, "m", fallback=False)
        assert type(caught.value) is want[0] and len(asked) == want[1]
        if isinstance(caught.value, puter.StreamError):
            assert str(caught.value.reply) == "Hello"

    @pytest.mark.parametrize("how", ["chat", "stream"])
    @pytest.mark.parametrize("size", [1, 7, None])
    @pytest.mark.parametrize("encoding", ["gzip", "deflate", "raw deflate", "both"])
    def test_packed_bodies(self, home, how, encoding, size):
        bare = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        pack: dict[str, Callable[[bytes], bytes]] = {
            "gzip": gzip.compress,
            "deflate": zlib.compress,
            "raw deflate": lambda body: bare.compress(body) + bare.flush(),
            "both": lambda body: gzip.compress(zlib.compress(body)),
        }
        named = {"raw deflate": "deflate", "both": "deflate, gzip"}
        head, pieces = wire_parts(how)
        body = b"".join(piece.split(b"\r\n", 1)[1][:-2] for piece in pieces[:-1])
        packed = pack[encoding](body)
        size = size or len(packed)
        parts = [packed[at : at + size] for at in range(0, len(packed), size)]
        packing = f"Content-Encoding: {named.get(encoding, encoding)}\r\n\r\n"
        sent = head[:-2] + packing.encode()
        sent += b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [*parts, b""])
        with client_of(sent) as client:
            assert ask(client, how, "m").text == WIRE_TEXT

    @pytest.mark.parametrize(
        ("how", "status", "kind"),
        [
            ("chat", 200, JSON_TYPE),
            ("chat", 500, HTML_TYPE),
            ("stream", 200, NDJSON_TYPE),
            ("stream", 200, SSE_TYPE),
            ("stream", 200, HTML_TYPE),
        ],
    )
    def test_a_gigabyte_is_not_read_to_its_end(self, home, monkeypatch, how, status, kind):
        sent: list[int] = []
        if kind == SSE_TYPE:  # sseclient takes long for events of this size
            monkeypatch.setattr(puter, "MAX_LINE_BYTES", 4 << 20)

        def serve(connection: socket.socket) -> None:
            read_request(connection)
            head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n"
            connection.sendall(f"{head}Content-Length: {1 << 30}\r\n\r\n".encode())
            for _ in range(1 << 10):
                connection.sendall(b"x" * (1 << 20))
                sent.append(1)

        with (
            raw_server(serve) as url,
            puter.Puter("t", api_base_url=url, max_retries=0) as client,
            pytest.raises(puter.PuterError, match=r"(longer|larger) than [\d,]+ bytes"),
        ):
            ask(client, how, "m", fallback=False)
        assert eventually(lambda: len(sent) < 100)

    @pytest.mark.parametrize("rest", ["", "Connection: close\r\n\r\n"])
    def test_a_head_without_a_body_is_not_asked_for_again(self, home, rest):
        asked = []

        def serve(connection):
            asked.append(read_request(connection))
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{rest}"
            connection.sendall(head.encode())
            connection.shutdown(socket.SHUT_RDWR)

        with (
            raw_server(serve) as url,
            puter.Puter("t", api_base_url=url, retry_delay_ms=0) as client,
            pytest.raises(puter.ReplyError, match="instead of a JSON object"),
        ):
            client.chat("hi", model="m", fallback=False)
        assert len(asked) == 1

    def test_an_error_whose_end_is_missing_is_that_error(self, make, fake):
        def send(handler, _):
            body = b'{"code": "account_is_not_verified", "message": "no"}'
            handler.send(Raw(body, 403), len(body) + 5)
            handler.drop()

        fake.script[lab("text")] = [send, "text"]
        assert make("alice", "bob").chat("hi", model=lab("text")).account == "bob"
        assert told(fake) == ["alice text", "bob text"]

    @pytest.mark.parametrize("size", [10, 100_000, 20_000_000])
    def test_an_answer_before_the_request_was_read(self, home, size):
        def serve(connection: socket.socket) -> None:
            connection.recv(1_000)
            body = b'{"code":"bad_request","message":"too much"}'
            head = "HTTP/1.1 413 X\r\nContent-Type: application/json\r\nConnection: close"
            connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                pass

        with (
            raw_server(serve) as url,
            puter.Puter("t", api_base_url=url, max_retries=0) as client,
            pytest.raises(puter.BadRequestError, match="too much"),
        ):
            client.chat("x" * size, model="m")

    @pytest.mark.parametrize("exempt", [False, True])
    def test_a_proxy(self, make, fake, monkeypatch, exempt):
        heads: list[bytes] = []

        def serve(connection: socket.socket) -> None:
            heads.append(read_request(connection))
            head, pieces = wire_parts("chat")
            connection.sendall(head + b"".join(pieces))

        with raw_server(serve) as proxy:
            monkeypatch.setenv("HTTP_PROXY", proxy)
            for name in ("NO_PROXY", "no_proxy"):
                monkeypatch.setenv(name, "127.0.0.1" if exempt else "")
            reply = make().chat("hi", model=lab("text"))
        if exempt:
            assert (reply.text, heads, len(fake.requests)) == (SENTENCE, [], 1)
        else:
            assert (reply.text, len(fake.requests)) == (WIRE_TEXT, 0)
            wanted = f"POST {fake.url}/drivers/call HTTP/1.1\r\n".encode()
            assert heads[0].startswith(wanted)

    @pytest.mark.parametrize("how", ["chat", "stream"])
    def test_ipv6(self, home, how):
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
        head, pieces = wire_parts(how)
        with client_of(head + b"".join(pieces), "::1") as client:
            assert "//[::1]:" in client.config.api_base_url
            assert ask(client, how, "m").text == WIRE_TEXT

    @pytest.mark.parametrize("days", [-1, 1])
    def test_a_clock_that_jumps(self, make, fake, monkeypatch, days):
        client = make("alice", "bob", api_timeout_ms=2_000)
        prepare(fake, {"alice": "limited"})
        client.chat("hi", model=lab("text"))
        assert [rest.account for rest in client.cooldowns()] == ["alice"]
        real = time.time
        stream = client.stream("go on", model=lab("slow"))
        next(stream)
        monkeypatch.setattr(puter.time, "time", lambda: real() + days * 86_400)
        assert text_of_chunks(list(stream))  # no timeout
        assert client.cooldowns() == []
        fake.accounts["token-alice"].error = None
        prepare(fake, {"bob": "limited"})
        assert client.chat("hi", model=lab("text")).account == "alice"
        assert [rest.account for rest in client.cooldowns()] == ["bob"]


def press_ctrl_c() -> None:
    """What the main thread is told when a person stops it, a moment from now."""
    time.sleep(0.05)  # until it waits
    os.kill(os.getpid(), signal.SIGINT)


# Where a Ctrl-C comes: before the head, behind it, after a line, within one, before the end.
STAGES = ["no head", "no body", "a line", "half a line", "no end"]


@posix_only
class TestInterrupts:
    """Ctrl-C, wherever a call is: nothing of it is left, and the client goes on."""

    @staticmethod
    def pressing(stage: str) -> Script:
        """A scenario that presses Ctrl-C at a stage of its answer, and then says no more."""

        def send(handler: FakeHandler, args: dict[str, Any]) -> Answer:
            words = line("text", text="one")
            parts = {
                "a line": words,
                "half a line": words + b'{"type": "te',
                "no end": words + line("usage", usage=USAGE),
            }
            if stage != "no head":
                handler.begin_stream(NDJSON_TYPE if args.get("stream") else JSON_TYPE)
            if stage in parts:
                handler.chunk(parts[stage])
            press_ctrl_c()
            handler.pause(5)
            return None

        return send

    @staticmethod
    def assert_nothing_is_left(client: puter.Puter, fake: FakePuter) -> None:
        """No socket is open, no place is taken, no lock is held: the same client goes on."""
        gc.collect()  # closes what was put back into the pool of a closed session
        assert fake._server is not None
        assert eventually(lambda: not fake._server.connections)  # type: ignore[union-attr]
        assert eventually(lambda: fake.open_streams == 0)
        assert running_on(client) == 0
        thread, outcome = in_background(lambda: ask(client, "stream", lab("text")).text)
        thread.join(5)
        assert outcome == [SENTENCE]

    @pytest.mark.parametrize("stage", STAGES)
    @pytest.mark.parametrize("how", ["chat", "stream", "with"])
    def test_while_it_waits(self, make, fake, how, stage):
        client = make(max_concurrent=1)
        fake.script[lab("echo")] = self.pressing(stage)
        with pytest.raises(KeyboardInterrupt):
            if how == "chat":
                client.chat("hi", model=lab("echo"))
            elif how == "with":
                ask(client, "stream", lab("echo"))
            else:
                for _ in client.stream("hi", model=lab("echo")):
                    pass
        # A stream without `with` ends when nobody has it any more.
        self.assert_nothing_is_left(client, fake)

    def test_between_two_tries(self, make, fake):
        client = make(retry_delay_ms=5_000)

        def send(handler: FakeHandler, args: dict[str, Any]) -> Answer:
            in_background(press_ctrl_c)
            return Raw({"code": "internal_error", "message": "no"}, 500)

        fake.script[lab("echo")] = send
        with pytest.raises(KeyboardInterrupt):
            client.chat("hi", model=lab("echo"))
        client._transport.close()  # the connection was kept, for it was good
        self.assert_nothing_is_left(client, fake)

    def test_before_the_gate(self, make, fake):
        client = make(max_concurrent=1)
        with client.stream("hi", model=lab("slow")) as running:
            next(running)
            in_background(press_ctrl_c)
            with pytest.raises(KeyboardInterrupt):
                client.chat("hi", model=lab("text"))
            assert running_on(client) == 1
        self.assert_nothing_is_left(client, fake)

    def test_while_the_state_waits_for_others(self, state):
        assert state.cooldowns(1.0) == []
        other = sqlite3.connect(state.path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        in_background(press_ctrl_c)
        in_background(lambda: (time.sleep(0.3), other.execute("COMMIT")))
        with pytest.raises(KeyboardInterrupt):
            state.add_cooldown("alice", "", MINUTE_S, "busy", 0.0)
        assert state._db is not None and not state._db.in_transaction
        state.add_cooldown("bob", "", MINUTE_S, "busy", 0.0)
        other.close()
        again = puter.State(state.path)
        assert [rest.account for rest in again.cooldowns(1.0)] == ["bob"]
        again.close()

    @pytest.mark.parametrize("stage", ["store", "state"])
    def test_while_a_file_is_written(self, make, home, monkeypatch, stage):
        client = make("alice", "bob")
        write = {
            "store": lambda: client.store.switch("bob"),
            "state": lambda: client.state.add_cooldown("bob", "", MINUTE_S, "busy", 0.0),
        }[stage]

        def press(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            if stage == "store":
                patch.setattr(os, "replace", press)
            else:
                patch.setattr(puter, "Cooldown", press)
            with pytest.raises(KeyboardInterrupt):
                write()
        thread, outcome = in_background(write)
        thread.join(5)
        assert len(outcome) == 1 and not isinstance(outcome[0], BaseException)
        assert [a.username for a in client.store.accounts()] == ["alice", "bob"]
        assert not list(home.glob("*.part*")) and not list(home.glob(".puter*"))


# =============================================================================
# chat
# =============================================================================
class TestChat:
    """A question and its whole answer: what is sent, retried and told."""

    def test_what_is_sent(self, make, fake):
        more: dict[str, Any] = {"temperature": 0.5, "top_p": None, "reasoning_effort": "low"}
        make().chat("hi", model="puter/lab/text", system="Be brief", **more)
        (sent,) = [one for one in fake.requests if one.path == CHAT]
        assert sent.body | {"args": 0} == {
            "interface": "puter-chat-completion",
            "driver": "ai-chat",
            "method": "complete",
            "args": 0,
        }
        assert sent.args == {
            "messages": [
                {"role": "system", "content": "Be brief"},
                {"role": "user", "content": "hi"},
            ],
            "model": "lab/text",
            "temperature": 0.5,
            "reasoning_effort": "low",
        }

    @pytest.mark.parametrize(
        ("settings", "want"),
        [({}, puter.DEFAULT_MODEL), ({"default_model": lab("echo")}, lab("echo"))],
    )
    def test_the_model_when_none_is_named(self, make, fake, settings, want):
        make(**settings).chat("hi")
        assert fake.requests[0].args["model"] == want

    def test_the_callers_values_are_left_alone(self, make):
        calls = [tool_call("c1", "f", '{"a": 1}')]
        messages = [
            {"role": "developer", "content": "Be brief"},
            {"role": "user", "content": [{"type": "text", "text": "look"}]},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c1", "content": ""},
            {"role": "user", "content": "and this"},
        ]
        more = {"tools": [WEATHER], "stop": ["x"], "images": [PNG]}
        before = copy.deepcopy([messages, more])
        client = make(stream_tools="live")
        for how in (client.chat, client.stream):
            how(messages, model=lab("text"), **more)
        assert [messages, more] == before

    @pytest.mark.parametrize("as_what", ["path", "bytes", "url", "alone"])
    def test_images(self, make, fake, tmp_path, as_what):
        path, url = tmp_path / "a.png", "https://example.com/a.png"
        path.write_bytes(PNG)
        images = {"path": [path], "bytes": [PNG], "url": [url], "alone": PNG}[as_what]
        reply = make().chat("look", model=lab("vision"), images=images)
        assert reply.text == 'parts: ["text", "image_url"]'
        sent = fake.requests[-1].args["messages"][0]["content"][1]["image_url"]["url"]
        assert sent == url if as_what == "url" else sent.startswith("data:image/png;")
        assert len(fake.chat_calls()) == 1

    @pytest.mark.parametrize(
        "wrong",
        [
            {"prompt": 5},
            {"prompt": []},
            {"prompt": [{"role": "wizard", "content": "x"}]},
            {"images": ["/no/such/file.png"]},
            {"images": [b"no image"]},
            {"tools": [5]},
            {"timeout_ms": 0},
            {"timeout_ms": "5"},
            {"images": None},
            {"model": "puter/ "},
            {"model": 5},
        ],
    )
    def test_a_wrong_argument_is_told_before_anything_is_sent(self, make, fake, wrong):
        client = make()
        for how in (client.chat, client.stream):
            with pytest.raises(puter.BadRequestError) as caught:
                how(**{"prompt": "hi", **wrong})
            assert caught.value.hint
        assert not fake.requests

    @pytest.mark.parametrize("how", ["chat", "stream"])
    @pytest.mark.parametrize(
        ("plan", "retries", "works"),
        [
            (["internal", "internal", "text"], 2, True),
            (["internal", "internal", "text"], 1, False),
            (["html", "text"], 3, True),
            (["err500", "text"], 3, True),
            (["err500", "err500", "text"], 3, False),
            (["err500", "text"], 0, False),
            (["err401", "text"], 3, False),
        ],
    )
    def test_retries(self, make, fake, how, plan, retries, works):
        fake.script[lab("text")] = list(plan)
        client = make(max_retries=retries, api_timeout_ms=200)
        if works:
            assert len(ask(client, how, lab("text"), fallback=False).attempts) == len(plan)
        else:
            with pytest.raises(puter.PuterError) as caught:
                ask(client, how, lab("text"), fallback=False)
            assert len(caught.value.attempts) == len(fake.chat_calls()) < len(plan)

    @pytest.mark.parametrize("how", ["chat", "run", "say", "stream"])
    def test_with_tools_all_wait_as_long_as_it_takes(self, make, fake, how):
        fake.script[lab("text")] = late(0.2, Turn("done"))
        client = make(api_timeout_ms=50, max_retries=0)
        if how == "run":
            reply = client.run("hi", [get_weather], model=lab("text"))
        elif how == "say":
            reply = client.conversation(model=lab("text")).say("hi", tools=[get_weather])
        else:
            reply = ask(client, how, lab("text"), tools=[WEATHER])
        assert str(reply) == "done"

    @pytest.mark.parametrize(
        ("given", "meant"),
        table(
            ["image", "image", "images"],
            ["timeout", "timeout", "timeout_ms"],
            ["modle", "modle", "model"],
            ["messages", "messages", "the prompt"],
            ["a slip", "fallbak", "fallback"],
            ["stream", "stream", "stream"],
        ),
    )
    def test_misspelt_arguments_are_refused(self, make, fake, given, meant):
        client = make()
        for how in (client.chat, client.stream, client.conversation(model=lab("text")).say):
            with pytest.raises(puter.BadRequestError, match=f"{given}'.*Did you mean .*{meant}"):
                how("hi", **{given: 5})
        assert not fake.requests
        client.chat("hi", model=client.model("lab/text"), seed=7)
        assert chats(fake)[-1]["seed"] == 7 and chats(fake)[-1]["model"] == lab("text")

    @pytest.mark.parametrize(
        ("status", "code", "least"), [(503, "internal_error", 0), (429, "too_many_requests", 250)]
    )
    def test_retry_after_is_honoured(self, make, fake, caplog, status, code, least):
        caplog.set_level(logging.INFO, "puter")
        error = {"code": code, "message": "busy"}
        times = ("0", "Wed, 21 Oct 2015 07:28:00 GMT", "0.05")
        busy = [replies(error, status, headers={"Retry-After": when}) for when in times]
        fake.script[lab("text")] = [*busy, "text"]
        # Its own wait would be a minute.
        assert make(retry_delay_ms=60_000).chat("hi", model=lab("text")).text
        waits = [int(ms) for ms in re.findall(r"waiting (\d+)ms", caplog.text)]
        assert waits == [max(wait, least) for wait in (0, 0, 50)]

    def test_sixteen_threads_share_a_client(self, make, fake):
        client = make("alice", "bob", max_concurrent=4)
        start = threading.Barrier(16)

        def work(number):
            start.wait(10)
            for said in [f"thread {number} turn {turn}" for turn in range(2)]:
                with client.stream(said, model=lab("echo")) as stream:
                    assert text_of_chunks(list(stream)) == said
                assert client.chat(said, model=lab("echo")).text == said

        for thread, outcome in [in_background(functools.partial(work, n)) for n in range(16)]:
            thread.join(20)
            assert outcome == [None]
        assert running_on(client) == 0

    def test_many_threads_and_every_fault(self, tmp_path):
        run = soak(tmp_path, threads=32, seconds=0.75)
        assert not run.wrong
        assert run.outcomes["answered"]

    @posix_only
    def test_a_fork_in_the_middle_of_everything(self, make, fake, home):
        make("alice")
        script = f"""
            import os, signal, threading, time
            client, texts = puter.Puter(api_base_url={fake.url!r}, max_concurrent=2), []

            def work(n):
                texts.append(client.chat(f"thread {{n}}", model={lab("slow")!r}).text)
                texts.append(client.chat(f"again {{n}}", model={lab("echo")!r}).text)

            client.chat("before", model={lab("echo")!r})
            threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
            for thread in threads:
                thread.start()
            while sum(limit._running for limit in client._limits.values()) < 2:
                time.sleep(0.01)
            held, forked = threading.Event(), threading.Event()

            def hold():
                with client.state._lock, client._catalogue._lock, client._transport._lock:
                    held.set()
                    forked.wait()

            threading.Thread(target=hold).start()
            held.wait()
            child = os.fork()
            if not child:
                signal.alarm(5)  # ends the child if it hangs
                assert client.chat("child", model={lab("echo")!r}).text == "child"
                assert puter._default_client() is not None
                os._exit(0)
            forked.set()
            _, code = os.waitpid(child, 0)
            for thread in threads:
                thread.join()
            print(code, sorted(texts), client.stats({lab("echo")!r})[0].requests)
        """
        done = run_script(script, home)
        said = sorted([SENTENCE, SENTENCE, "again 0", "again 1"])
        assert done.stdout.strip() == f"0 {said} 4", done.stderr

    def test_closing_while_others_ask(self, make):
        client = make(max_retries=0, max_concurrent=6)

        def work() -> int:
            return [client.chat("hi", model=lab("text")).text for _ in range(25)].count(SENTENCE)

        started = [in_background(work) for _ in range(6)]
        while any(thread.is_alive() for thread, _ in started):
            client._transport.close()
            time.sleep(0.001)
        assert [outcome for _, outcome in started] == [[25]] * 6

    def test_a_slow_model_list_holds_nobody_else_up(self, make, fake):
        go_on, route = threading.Event(), fake.routes["GET", DETAILS]
        fake.routes["GET", DETAILS] = lambda handler: (go_on.wait(1.5), route(handler))
        client = make()
        listing, _ = in_background(client.models)
        assert eventually(lambda: len(fake.requests) == 1)
        assert client.chat("hi", model=lab("text")).text == SENTENCE
        assert listing.is_alive(), "the question waited for the model list of another thread"
        go_on.set()
        listing.join(5)

    def test_nothing_secret_is_shown(self, make, fake, caplog, home):
        caplog.set_level(logging.DEBUG)
        client = make("alice", "bob")
        fake.accounts["token-alice"].dead = True
        shown = [repr(client), str(client)]
        for how, scenario in itertools.product(("chat", "stream"), ("text", "err500")):
            with suppress(puter.PuterError):
                shown += [repr(ask(client, how, lab(scenario)))]
        fake.accounts["token-bob"].dead = True
        for _ in range(2):
            with pytest.raises(puter.AuthError) as caught:
                client.chat("hi")
            error = caught.value
            shown += [str(error), repr(error), repr(vars(error))]
        shown += [repr(client.accounts), repr(client.cooldowns())]
        shown += [repr(puter.Puter("token-given")), repr(client.store)]
        shown += [repr(client.state), caplog.text]
        assert "token-" in "".join(fake.accounts)
        secrets = ("token-alice", "token-bob", "token-given", "Bearer")
        assert not [s for s in secrets if s in "\n".join(shown)]

    def test_the_log_of_a_question(self, make, fake, caplog):
        caplog.set_level(logging.INFO, "puter")
        fake.script[lab("text")] = ["internal", "text"]
        fake.script[lab("echo")] = "err429"
        client = make("alice", "bob", retry_delay_ms=0)
        client.models()
        client.chat("hi", model=lab("text"))
        client.chat("hi", model=lab("echo"))
        fake.accounts["token-alice"].max_in_window = 0
        client.chat("hi", model=lab("text"))
        text, echo, free = (
            f"Request: POST /drivers/call method=complete model={name} stream=false messages=1"
            for name in (lab("text"), lab("echo"), FREE[0])
        )
        limited = "Rate limited (429), adding to cooldown"
        retry, ok = "Retry 1/3: internal_error (500), waiting 0ms", "Response: 200 OK (0.0s)"
        fallback, answered = f"Fallback: trying {FREE[0]}", "Response: 200 OK (used fallback model)"
        lines = [re.sub(r"\d\.\ds", "0.0s", message) for message in logged(caplog)]
        assert lines == [
            *[text, retry, text, ok],
            *[echo, limited, fallback, free, answered],
            *[text, limited, "Auth: Switched account - bob", text, ok],
        ]

    def test_a_retry_is_never_numbered_beyond_their_count(self, make, fake, caplog):
        # A rate limit is waited for longer than `max_retries` short waits.
        caplog.set_level(logging.INFO, "puter")
        busy = refusing(429, "too_many_requests")
        fake.script[lab("text")] = [*[lambda *_: busy] * 3, "text"]
        make(max_retries=1).chat("hi", model=lab("text"))
        numbers = re.findall(r"Retry (\d+)/(\d+)", caplog.text)
        assert len(numbers) == 3
        assert all(int(number) <= int(count) for number, count in numbers)


# =============================================================================
# Streams
# =============================================================================
def stepwise(
    pieces: list[bytes], framing: str, steps: threading.Semaphore, content_type: str
) -> Script:
    """A stream that sends each piece only after a step, in one of the framings of HTTP."""

    def send(handler: FakeHandler, args: dict[str, Any]) -> Answer:
        head = {"Content-Type": content_type}
        packer = zlib.compressobj(wbits=31) if "gzip" in framing else None
        if packer:
            head["Content-Encoding"] = "gzip"
        if "chunked" in framing:
            head["Transfer-Encoding"] = "chunked"
        elif "length" in framing:
            head["Content-Length"] = str(sum(map(len, pieces)))
        else:
            head["Connection"] = "close"
        handler.send_response(200)
        for name, value in head.items():
            handler.send_header(name, value)
        handler.end_headers()
        for piece in pieces:
            if not steps.acquire(timeout=2.0):
                break  # the client waits for more than what it was sent
            if packer:
                piece = packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH)
            if "chunked" in framing:
                handler.chunk(piece)
            else:
                handler.wfile.write(piece)
                handler.wfile.flush()
        handler.release()
        if "chunked" in framing:
            if packer:
                handler.chunk(packer.flush())
            handler.wfile.write(b"0\r\n\r\n")
        handler.wfile.flush()
        return None

    return send


class TestStream:
    """A reply as it comes: each chunk at once, and every way of its ending."""

    @pytest.mark.parametrize("scenario", GOOD_STREAMED)
    def test_a_good_stream(self, make, fake, scenario):
        client = make()
        with client.stream("hi", model=lab(scenario), fallback=False) as stream:
            chunks = list(stream)
            reply = stream.reply
        special = {**PLAIN, **GOOD_STREAMED[scenario]}
        check_reply(reply, special)
        assert calls_of(reply) == CALLS.get(scenario, [])[-1:]  # the server's own loss
        assert text_of_chunks(chunks) == reply.text
        assert chunks[-1].type == "usage" and chunks[-1].usage == reply.usage
        spoken = [c.text for c in chunks if c.type == "reasoning"]
        assert "".join(spoken) == reply.reasoning
        calls = [(c.tool_call.id, c.tool_call.arguments) for c in chunks if c.tool_call]
        assert calls == [(call.id, call.arguments) for call in reply.tool_calls]
        assert (reply.model, reply.account) == (lab(scenario), "alice")
        assert running_on(client) == fake.open_streams == 0

    @pytest.mark.parametrize("scenario", BROKEN_STREAMS)
    def test_a_broken_stream_has_its_partial_reply_and_is_not_asked_for_again(
        self, make, fake, scenario
    ):
        client = make("alice", "bob")
        chunks = []
        stream = client.stream("hi", model=lab(scenario))
        with pytest.raises(puter.StreamError, match="broke off") as caught:
            for chunk in stream:
                chunks += [chunk]  # as far as it comes
        partial, want = caught.value.reply, BROKEN_STREAMS[scenario]
        assert partial is not None and text_of_chunks(chunks) == partial.text
        assert partial.text == want or want is None and SENTENCE.startswith(want or "T")
        assert (caught.value.model, caught.value.account) == (lab(scenario), "alice")
        assert (partial.account, len(partial.attempts)) == ("alice", 1)
        assert told(fake) == [f"alice {scenario}"]
        assert running_on(client) == 0
        with pytest.raises(puter.StreamError):
            _ = stream.reply

    @pytest.mark.parametrize("dialect", ["lines", "events"])
    @pytest.mark.parametrize(
        "framing", ["chunked", "chunked gzip", "close", "length", "close gzip"]
    )
    def test_each_chunk_arrives_when_its_line_does(self, make, fake, framing, dialect):
        words = ["one ", "two ", "three"]
        if dialect == "lines":
            pieces = [line("text", text=word) for word in words] + [line("usage", usage=USAGE)]
        else:
            pieces = [event(content=w) for w in words] + [b"data: [DONE]\n\n"]
        steps = threading.Semaphore(1)
        kind = NDJSON_TYPE if dialect == "lines" else SSE_TYPE
        fake.script[lab("text")] = stepwise(pieces, framing, steps, kind)
        said = []
        with make(max_retries=0).stream("hi", model=lab("text")) as stream:
            for chunk in stream:
                said.append(str(chunk))
                steps.release()  # only now may the server send the next one
        assert said == [*words, ""]

    @pytest.mark.parametrize("way", ["with", "close", "drop", "error"])
    def test_leaving_early(self, make, fake, way):
        client = make(max_concurrent=1)
        stream = client.stream("hi", model=lab("slow"))
        assert running_on(client) == fake.open_streams == 1
        if way == "with":
            with stream:
                next(stream)
        elif way == "close":
            next(stream)
            stream.close()
            stream.close()
        elif way == "error":
            with pytest.raises(ZeroDivisionError), stream:
                _ = [1 / len(str(chunk).strip("The ")) for chunk in stream]
        else:
            for _ in stream:
                break
            del stream
        gc.collect()
        assert running_on(client) == 0
        assert eventually(lambda: fake.open_streams == 0, 0.4)
        assert client.chat("hi", model=lab("text")).text == SENTENCE

    @pytest.mark.parametrize("session", ["own", pytest.param("given")])
    def test_close_from_another_thread_wakes_the_reader(self, make, fake, session):
        fake.script[lab("text")] = stalls(line("text", text="one"))
        wanted = requests.Session() if session == "given" else None
        client = make("alice", "bob", session=wanted, api_timeout_ms=2_500)
        stream = client.stream("hi", model=lab("text"))
        reader, outcome = in_background(lambda: list(stream))
        time.sleep(0.1)  # the reader waits for bytes now
        closer, _ = in_background(stream.close)
        closer.join(1.0)
        is_closing = closer.is_alive()
        reader.join(1.0)
        assert not is_closing and not reader.is_alive(), "they wait for the timeout"
        # One outcome that says so, and never the look of a normal end.
        assert isinstance(outcome[0], puter.StreamError) and outcome[0].code == "closed"
        assert outcome[0].reply.text == "one"
        assert eventually(lambda: fake.open_streams == 0, 0.5)
        assert running_on(client) == 0
        assert told(fake) == ["alice text"]

    @pytest.mark.parametrize("stage", ["no headers", "headers", "identity", "exact", "retry"])
    def test_close_while_the_answer_is_waited_for(self, make, fake, stage):
        def identity(handler, _):
            handler.send_response(200)
            handler.send_header("Content-Type", NDJSON_TYPE)
            handler.end_headers()
            handler.wfile.flush()
            handler.pause(30.0)

        plans = {"headers": "hang", "identity": identity, "retry": "internal"}
        fake.script[lab("text")] = plans.get(stage, silent)
        client = make("alice", "bob", retry_delay_ms=60_000)
        tools = [WEATHER] if stage == "exact" else None
        call, waiter, outcome = opening(client, lab("text"), tools=tools)
        assert eventually(lambda: told(fake) == ["alice text"])
        time.sleep(0.05)
        call.cancel()
        waiter.join(1.5)
        assert not waiter.is_alive(), "the waiter waits on"
        assert isinstance(outcome[0], puter.PuterError)
        assert eventually(lambda: fake.accounts["token-alice"].running == 0, 0.5)
        assert running_on(client) == 0
        # Who goes away wants nothing else, and no model or account is at fault.
        assert told(fake) == ["alice text"]
        assert client.cooldowns() == []

    def test_two_threads_close_at_once(self, make, fake):
        client = make()
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)  # lets the threads meet in the middle
        try:
            for _ in range(30):
                stream = client.stream("hi", model=lab("text"))
                barrier = threading.Barrier(4)
                work = lambda: (barrier.wait(5), stream.close())  # noqa: B023
                for thread, _ in [in_background(work) for _ in range(4)]:
                    thread.join(5)
        finally:
            sys.setswitchinterval(before)
        assert running_on(client) == 0

    def test_a_stall_ends_with_the_timeout(self, make, fake):
        fake.script[lab("text")] = stalls(line("text", text="one"))
        client = make("alice", "bob")
        stream = client.stream("hi", model=lab("text"), timeout_ms=150)
        with pytest.raises(puter.StreamError, match=r"silent for 0\.15 s") as caught:
            list(stream)
        assert caught.value.reply and caught.value.reply.text == "one"
        assert told(fake) == ["alice text"]
        assert eventually(lambda: fake.open_streams == 0, 0.5)
        assert running_on(client) == 0

    def test_silence_is_counted_from_the_last_byte(self, make, fake):
        # 13 words at 25 ms each: longer together than the timeout.
        stream = make().stream("hi", model=lab("slow"), timeout_ms=200)
        assert text_of_chunks(list(stream)) == SENTENCE

    def test_a_body_that_stays_open_after_the_last_line(self, make, fake):
        fake.script[lab("text")] = stalls(line("text", text="whole") + line("usage", usage=USAGE))
        assert ask(make(api_timeout_ms=150), "stream", lab("text")).text == "whole"
        assert eventually(lambda: fake.open_streams == 0, 0.5)

    @pytest.mark.parametrize(
        "first", [streams(line("error", message="no luck")), stalls()], ids=["error", "silence"]
    )
    def test_before_the_first_chunk_another_may_answer(self, make, fake, first):
        fake.script[lab("text")] = [first, "text"]
        client = make(api_timeout_ms=150)
        assert ask(client, "stream", lab("text")).text == SENTENCE
        assert told(fake) == ["alice text", "alice text"]
        assert running_on(client) == 0

    @pytest.mark.parametrize("end", ["ended", "closed"])
    def test_a_reply_is_only_there_at_the_end(self, make, fake, end):
        stream = make().stream("hi", model=lab("slow"))
        assert fake.open_streams == 1
        assert str(next(stream)) == "The " and "open" in repr(stream)
        with pytest.raises(puter.StreamError, match="not come to its end"):
            _ = stream.reply
        if end == "ended":
            list(stream)
            assert stream.reply.text == SENTENCE
        else:
            stream.close()
            for _ in range(2):
                with pytest.raises(puter.StreamError, match="closed before its end") as caught:
                    next(stream)
            assert caught.value.code == "closed" and caught.value.reply.text == "The "
            with pytest.raises(puter.StreamError):
                _ = stream.reply
        assert end in repr(stream)

    def test_for_and_next_may_be_mixed(self, make, fake):
        def batches(handler, _):
            handler.begin_stream()
            for n in "123":
                handler.chunk(b"".join(stream_line("text", text=f"{n}{c} ") for c in "abc"))
                handler.pause(0.05)
            handler.chunk(USAGE_LINE)
            handler.end_stream()

        fake.script[lab("text")] = batches
        stream, seen = make().stream("hi", model=lab("text")), []
        for chunk in stream:
            seen.append(str(chunk))
            if len(seen) == 2:
                seen += [str(next(stream)), str(next(stream))]
        assert "".join(seen) == stream.reply.text == "1a 1b 1c 2a 2b 2c 3a 3b 3c "

    def test_no_later_thread_sees_a_normal_end_of_a_closed_stream(self, make):
        # Python uses the number of a thread that has ended again.
        for _ in range(5):
            stream = make().stream("hi", model=lab("slow"))
            closer, _ = in_background(stream.close)
            closer.join()
            reader, outcome = in_background(lambda s=stream: list(s))
            reader.join()
            assert isinstance(outcome[0], puter.StreamError)

    def test_the_log_of_a_stream(self, make, caplog):
        caplog.set_level(logging.INFO, "puter")
        ask(make(), "stream", lab("text"))
        request, connected, response = logged(caplog)
        head = f"Request: POST /drivers/call method=complete model={lab('text')} stream=true"
        assert request == f"{head} messages=1"
        assert re.fullmatch(r"Stream connected duration=\d+ms", connected)
        assert re.fullmatch(r"Response: 200 Stream complete \(\d+\.\ds\)", response)

    @pytest.mark.parametrize("how", ["chat", "stream"])
    def test_answers_are_reported_inside(self, make, fake, how):
        prepare(fake, {"text": "err429"})
        client, answers = make(), []
        client._on_answer = lambda asked, reply: answers.append((asked, reply))
        reply = ask(client, how, lab("text"))
        with pytest.raises(puter.PuterError):
            ask(client, how, lab("midfail" if how == "stream" else "err400"), fallback=False)
        assert answers == [(lab("text"), reply)]
        assert (reply.model, reply.account, len(reply.attempts)) == (FREE[0], "alice", 2)

    # Tools: a stream of most providers loses all but the last of several calls.

    @pytest.mark.parametrize(
        ("setting", "model", "more", "streamed", "count"),
        [
            ("exact", "twotools", {}, False, 2),
            ("exact", "twotools", {"parallel_tool_calls": True}, False, 2),
            ("exact", "twotools", {"parallel_tool_calls": False}, True, 1),
            ("live", "twotools", {}, True, 1),
            ("exact", "claude-opus-4-5", {}, True, 2),
            ("exact", "CLAUDE-opus-4-5", {}, True, 2),
            ("live", "claude-opus-4-5", {}, True, 2),
            ("exact", "gemini-2.5-flash", {}, False, 2),
        ],
    )
    def test_streams_with_tools(self, make, fake, setting, model, more, streamed, count):
        for name in (OPUS, "gemini-2.5-flash"):
            fake.script[name] = "twotools"
        name = lab(model) if model == "twotools" else model
        with make(stream_tools=setting).stream("hi", model=name, tools=[WEATHER], **more) as stream:
            chunks = list(stream)
        asked = [one.args for one in fake.requests if one.path == CHAT]
        assert asked[-1].get("stream", False) is streamed
        assert asked[-1]["tools"] == [WEATHER]
        assert calls_of(stream.reply) == CALLS["twotools"][-count:]
        assert len([c for c in chunks if c.type == "tool_call"]) == count
        assert stream.reply.finish_reason == "tool_calls"

    def test_a_blocked_prompt_is_seen_when_the_reply_is_whole(self, make):
        with pytest.raises(puter.BadRequestError, match="blocked"):
            make().stream("hi", model=lab("blocked"), tools=[WEATHER])

    def test_tools_are_exact_when_no_model_list_can_be_had(self, make, fake):
        fake.routes.pop(("GET", "/puterai/chat/models/details"))
        stream = make(max_retries=0).stream("hi", model=lab("twotools"), tools=[WEATHER])
        list(stream)
        assert calls_of(stream.reply) == CALLS["twotools"]


# =============================================================================
# An OpenAI-compatible base
# =============================================================================
def sse(*chunks: bytes, done: bool = True) -> Script:
    """A stream of Server-Sent Events."""
    return streams(*chunks, *([b"data: [DONE]\n\n"] if done else []), content_type=SSE_TYPE)


class TestApiStyleOpenAI:
    """The same client over Server-Sent Events, at Puter's endpoint or at a gateway."""

    @pytest.mark.parametrize("how", ["chat", "stream"])
    @pytest.mark.parametrize("scenario", ["text", "empty", "unicode", "long", "echo"])
    def test_text(self, make, fake, how, scenario):
        reply = ask(make(api_style="openai"), how, lab(scenario))
        want = GOOD[scenario].get("text", SENTENCE)
        check_reply(reply, {"text": want, "finish_reason": "stop"})
        assert (reply.model, reply.account) == (lab(scenario), "alice")
        (sent,) = fake.requests
        assert (sent.path, sent.token) == (OPENAI_CHAT, "token-alice")
        assert sent.body["messages"] == [{"role": "user", "content": "hi"}]
        assert sent.body.get("stream", False) is (how == "stream")

    @pytest.mark.parametrize("how", ["chat", "stream"])
    def test_a_base_that_names_the_path(self, make, fake, how):
        base = f"{fake.url}/puterai/openai/v1"
        client = make(api_style="openai", api_base_url=base)
        assert ask(client, how, lab("text")).text == SENTENCE
        assert client.whoami()["username"] == "alice"
        assert client.model("lab/text").id == lab("text")
        assert [one.path for one in fake.requests[:1]] == [OPENAI_CHAT]

    @pytest.mark.parametrize("scenario", sorted(BAD.keys() - {"hang", "busy503", "blocked"}))
    def test_errors(self, make, fake, scenario):
        client = make(api_style="openai", max_retries=0)
        with pytest.raises(BAD[scenario][0]):
            client.chat("hi", model=lab(scenario), fallback=False)
        assert running_on(client) == 0

    def test_tools_are_put_together(self, make, fake):
        def piece(index, text, **more):
            return event(tool_calls=[{"index": index, "function": {"arguments": text}, **more}])

        weather, clock = {"name": "get_weather", "arguments": ""}, {"name": "get_time"}
        fake.script[lab("text")] = sse(
            event(
                reasoning_content="hm", tool_calls=[{"index": 0, "id": "a", "function": weather}]
            ),
            piece(0, '{"ci'),
            event(tool_calls=[{"index": 1, "id": "b", "function": clock}]),
            piece(1, '{"tz": "CET"}', extra_content=SIGNATURE),
            piece(0, 'ty": "Paris"}'),
            b": a comment\n\n",
            b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}\n\n',
        )
        client = make(api_style="openai", stream_tools="live")
        with client.stream("hi", model=lab("text"), tools=[WEATHER]) as stream:
            kinds = [chunk.type for chunk in stream]
        reply = stream.reply
        assert calls_of(reply) == CALLS["twotools"]
        assert [call.id for call in reply.tool_calls] == ["a", "b"]
        assert reply.tool_calls[1].extra_content == SIGNATURE
        assert (reply.finish_reason, reply.usage.total_tokens) == ("tool_calls", 3)
        assert kinds == ["reasoning", "tool_call", "tool_call", "usage"]
        assert fake.requests[0].body["stream_options"] == {"include_usage": True}

    def test_tools_of_puters_endpoint_are_exact(self, make, fake):
        client = make(api_style="openai")
        stream = client.stream("hi", model=lab("twotools"), tools=[WEATHER])
        list(stream)
        assert calls_of(stream.reply) == CALLS["twotools"]

    def test_a_history_with_calls_is_in_openais_shape(self, make, fake):
        calls = [tool_call("c1", "f", '{"a": 1}'), tool_call("c2", "g", "{}")]
        results = [{"role": "tool", "tool_call_id": n, "content": f"r{n}"} for n in ("c1", "c2")]
        asked = {"role": "assistant", "content": "wait", "tool_calls": calls}
        make(api_style="openai").chat(
            [{"role": "user", "content": "hi"}, asked, *results], model=lab("text")
        )
        sent = fake.requests[0].body["messages"]
        got = {c["id"]: c["function"] for m in sent for c in m.get("tool_calls") or ()}
        assert got == {c["id"]: c["function"] for c in calls}
        # Every result comes right after the message with its call.
        for before, message in itertools.pairwise(sent):
            if message["role"] == "tool" and before["role"] != "tool":
                assert message["tool_call_id"] in [c["id"] for c in before["tool_calls"]]

    @pytest.mark.parametrize(
        ("chunks", "done", "words"),
        [
            ([event(content="one ")], False, "ended before"),
            ([event(content="one "), event(content="two")[:-9]], False, "broke off"),
            ([event(content="one "), b'data: {"error":{"message":"oh"}}\n\n'], 1, "oh"),
            ([event(content="one "), b'data: {"error":"oh no"}\n\n'], True, "oh no"),
            ([event(content="one "), b"data: what\n\n"], True, "what"),
        ],
    )
    def test_streams_that_do_not_end_well(self, make, fake, chunks, done, words):
        fake.script[lab("text")] = sse(*chunks, done=done)
        client = make("alice", "bob", api_style="openai")
        with pytest.raises(puter.StreamError, match=words) as caught:
            list(client.stream("hi", model=lab("text")))
        assert caught.value.reply and caught.value.reply.text == "one "
        assert len(fake.requests) == 1
        assert running_on(client) == 0

    @pytest.mark.parametrize("ends", ["together", "apart", ""])
    def test_many_events_but_none_without_end(self, make, fake, monkeypatch, ends):
        monkeypatch.setattr(puter, "MAX_LINE_BYTES", 2_000)
        many = [event(content="word ").replace(b"\n", b"\r\n")] * 50
        if ends == "apart":
            data, size = b"".join(many), len(many[0])
            many = [data[: size - 2], *(data[n - 2 :][:size] for n in range(size, 51 * size, size))]
        fake.script[lab("text")] = sse(*many, *([] if ends else [b"data: ", *[b"x" * 500] * 10]))
        stream = make(api_style="openai").stream("hi", model=lab("text"))
        if ends:
            assert text_of_chunks(list(stream)) == "word " * 50
        else:
            with pytest.raises(puter.StreamError, match="2000 bytes"):
                list(stream)

    # A gateway: an OpenAI-compatible base whose path is not Puter's.

    @staticmethod
    def gateway(fake):
        """Puts an OpenAI server that wants no token under /v1; gives its URL."""
        says = "from the gateway"
        choice = {"index": 0, "message": {"role": "assistant", "content": says}}
        whole = Raw({"choices": [{**choice, "finish_reason": "stop"}], "model": "big"})
        streamed = sse(event(content=says))

        def answer(handler):
            args = handler.fields()
            if args.get("stream"):
                streamed(handler, args)
            else:
                handler.send(whole)

        listed = Raw({"data": [{"id": "big", "owned_by": "us"}]})
        fake.routes["POST", "/v1/chat/completions"] = answer
        fake.routes["GET", "/v1/models"] = lambda handler: handler.send(listed)
        return f"{fake.url}/v1"

    def test_no_token_of_puter_is_sent_to_a_gateway(self, make, fake, monkeypatch):
        monkeypatch.setenv("PUTER_AUTH_TOKEN", "token-alice")
        client = make("alice", "bob", api_style="openai", api_base_url=self.gateway(fake))
        for how in ("chat", "stream"):
            assert ask(client, how, "big").text == "from the gateway"
        stream = client.stream("hi", model="big", tools=[WEATHER])
        assert text_of_chunks(list(stream)) == "from the gateway"
        assert [model.id for model in client.models()] == ["big"]
        assert fake.requests[2].body["stream"] is True
        sent = [one.headers.get("Authorization") for one in fake.requests]
        assert sent == [None] * 4

    @pytest.mark.parametrize("as_what", ["token", "openai_api_key"])
    def test_a_gateways_key_is_given_as_such(self, make, fake, monkeypatch, as_what):
        monkeypatch.setenv("PUTER_AUTH_TOKEN", "token-alice")
        base = self.gateway(fake)
        client = make(**{as_what: "gateway-key"}, api_style="openai", api_base_url=base)
        client.chat("hi", model="big")
        client.models()
        assert [one.token for one in fake.requests] == ["gateway-key"] * 2


# =============================================================================
# The walk over models and accounts
# =============================================================================
def prepare(fake: FakePuter, faults: Mapping[str, Any]) -> None:
    """Lets accounts (by name) and models (by the name of their scenario, or F1…) fail."""
    for name, wanted in faults.items():
        fault = list(wanted) if isinstance(wanted, list) else wanted  # it is used up
        account = fake.accounts.get(f"token-{name}")
        if account is None:
            number = int(name[1:]) if re.fullmatch(r"F\d", name) else 0
            fake.script[FREE[number - 1] if number else lab(name)] = fault
        elif fault == "dead":
            account.dead = True
        elif fault == "no credit":
            account.credit_microcents = 0
        elif fault == "limited":
            account.error = (429, {"code": "too_many_requests", "message": "Slow"})
        else:
            account.error = (403, {"code": fault, "message": "no"})


ALL_FREE_FAIL = {f"F{number}": "err401" for number in range(1, 6)}
ALL_FREE_LIMITED = dict.fromkeys(ALL_FREE_FAIL, "err429")
ONE, TWO, THREE = ("alice",), ("alice", "bob"), ("alice", "bob", "carol")
# F1 to F4 are of one provider, and two refusals of one are enough; F5 is of another.
# Accounts, faults, which models the server must see asked on which account, who answers or the
# kind of the error, and settings or `fallback`.
WALKS = table(
    ["all is well", TWO, {}, "alice text", "text", {}],
    ["the model's provider is busy", TWO, {"text": "err429"}, "alice text F1", "F1", {}],
    ["two fallbacks fail", TWO, {"text": "err401", "F1": "err429", "F2": "err401"}, "alice text F1 F2 F3", "F3", {}],
    ["the model is down", ONE, {"text": "err500"}, "alice text text F1", "F1", {}],
    ["the model is for subscribers", TWO, {"text": "denied"}, "alice text F1", "F1", {}],
    ["no fallback at all", ONE, {"text": "err429"}, "alice text", puter.ModelRateLimitError, {"fallback_enabled": False}],
    ["a model's own failure is not met again on the next account", TWO, {"text": "err429"}, "alice text", puter.ModelRateLimitError, {"fallback": False}],
    ["no fallback, but another account", TWO, {"text": ["denied", "text"]}, "alice text, bob text", "text", {"fallback": False}],
    ["many alike fail: five fallbacks, and no second account", TWO, {"text": "err401", **ALL_FREE_FAIL}, "alice text err401 err403 F5 F2 F3", puter.ProviderAuthError, {"fallback_models": ["lab/err401", "lab/err403"]}],
    ["a list of the user's, with a model that costs", ONE, {"text": "err429"}, "alice text echo", "echo", {"fallback_models": ["nobody/knows-it", "lab/echo"]}],
    ["after the user's list come the free ones", ONE, {"text": "err429", "echo": "err429"}, None, "free", {"fallback_models": ["lab/echo"]}],
    ["no fallback is able", ONE, {"text": "err429", **ALL_FREE_LIMITED}, "alice text F1 F5", puter.ModelRateLimitError, {}],
    ["the next account begins again", TWO, {"text": ["denied", "text"], **ALL_FREE_LIMITED}, "alice text F1 F2 F5, bob text", "text", {}],
    ["no credit: no free model answers either", ONE, {"alice": "no credit"}, "alice text", puter.CreditError, {}],
    ["no credit: the next account", TWO, {"alice": "no credit"}, "alice text, bob text", "text", {}],
    ["no credit and no fallback", TWO, {"alice": "no credit"}, "alice text, bob text", "text", {"fallback": False}],
    ["no credit, and what the user listed costs", TWO, {"alice": "no credit"}, "alice text, bob text", "text", {"fallback_models": ["lab/echo"]}],
    ["the account is limited", TWO, {"alice": "limited"}, "alice text, bob text", "text", {}],
    ["the token is dead", TWO, {"alice": "dead"}, "alice text, bob text", "text", {}],
    ["the account is suspended", TWO, {"alice": "account_suspended"}, "alice text, bob text", "text", {}],
    ["a code nobody knows", TWO, {"alice": "made_up"}, "alice text, bob text", "text", {}],
    ["all accounts are limited", THREE, dict.fromkeys(THREE, "limited"), "alice text, bob text, carol text, alice text text text text", puter.RateLimitError, {}],
    ["no rotation", TWO, {"alice": "dead"}, "alice text", puter.AuthError, {"account_rotation_enabled": False}],
    ["the account is chosen", TWO, {"bob": "dead"}, "bob text", puter.AuthError, {"account": "bob"}],
    ["a bad request is an error at once", TWO, {"text": "err400"}, "alice text", puter.BadRequestError, {}],
    ["a plan is needed", TWO, {"text": lambda *_: refusing(402, "subscription_required")}, "alice text", puter.SubscriptionError, {}],
    ["too large", TWO, {"text": lambda *_: refusing(413, "payload_too_large")}, "alice text", puter.BadRequestError, {}],
)  # fmt: skip


class TestWalk:
    """Which model on which account is asked after which: as the server saw it."""

    @pytest.mark.parametrize("how", ["chat", "stream"])
    @pytest.mark.parametrize(("accounts", "faults", "path", "outcome", "settings"), WALKS)
    def test_the_order(
        self, make, fake, short_window, how, accounts, faults, path, outcome, settings
    ):
        more = {name: settings[name] for name in settings if name == "fallback"}
        client = make(*accounts, **{n: v for n, v in settings.items() if n not in more})
        prepare(fake, faults)
        if isinstance(outcome, type):
            with pytest.raises(outcome) as caught:
                ask(client, how, lab("text"), **more)
            assert type(caught.value) is outcome
            attempts = caught.value.attempts  # type: ignore[attr-defined]
            assert attempts[0].error is caught.value
            assert caught.value.account == attempts[0].account
        else:
            reply = ask(client, how, lab("text"), **more)
            attempts = reply.attempts
            want = FREE[int(outcome[1:]) - 1] if outcome[1:].isdigit() else lab(outcome)
            assert reply.model in ([want] if outcome != "free" else FREE)
            assert attempts[-1].error is None
            assert (attempts[-1].model, attempts[-1].account) == (reply.model, reply.account)
        walked = [
            (who, [one.split()[1] for one in calls])
            for who, calls in itertools.groupby(told(fake), lambda one: one.split()[0])
        ]
        assert path in (None, ", ".join(" ".join([who, *models]) for who, models in walked))
        assert [(a.account, a.model) for a in attempts] == fake.chat_calls()
        assert all(running_on(client, name) == 0 for name in client._limits)

    @pytest.mark.parametrize("order", list(itertools.permutations(THREE)))
    def test_three_accounts_with_three_faults_in_every_order(self, make, fake, order):
        client = make(*order, "dave")
        faults = {"alice": "no credit", "bob": "limited", "carol": "dead"}
        prepare(fake, faults)
        reply = client.chat("hi", model=lab("text"))
        want = [f"{name} text" for name in order]
        assert told(fake) == [*want, "dave text"]
        assert (reply.text, reply.account) == (SENTENCE, "dave")
        cooldowns = {c.account: c.reason for c in client.cooldowns() if not c.model}
        reasons = ("insufficient_funds", "too_many_requests", "login")
        assert cooldowns == dict(zip(THREE, reasons, strict=True))
        # Who has learned it, and a new client, goes to the good one at once.
        for one in (client, make()):
            one.chat("hi", model=lab("text"))
        assert told(fake)[len(want) + 1 :] == ["dave text"] * 2

    @pytest.mark.parametrize("order", list(itertools.permutations(THREE)))
    def test_when_nobody_is_left_the_first_error_is_raised(self, make, fake, order):
        client = make(*order)
        reasons = {"alice": "insufficient_funds", "bob": "account_suspended", "carol": "login"}
        faults = {"alice": "no credit", "bob": "account_suspended", "carol": "dead"}
        prepare(fake, faults)
        kinds = {"alice": puter.CreditError, "bob": puter.AccessError, "carol": puter.AuthError}
        with pytest.raises(kinds[order[0]]) as caught:
            client.chat("hi", model=lab("text"))
        assert len(caught.value.attempts) == len(fake.chat_calls()) == 3
        for name in THREE:
            assert f"{lab('text')} on {name}" in str(caught.value)
        with pytest.raises(puter.AllAccountsOnCooldownError, match=r"free in \d+ s") as caught:
            client.chat("hi", model=lab("text"))
        assert {c.account: c.reason for c in caught.value.statuses} == reasons
        assert 290 < caught.value.retry_after_s <= 300
        assert len(fake.chat_calls()) == 3

    def test_a_model_on_cooldown_is_not_asked_by_a_new_process(self, make, fake):
        fake.script[lab("text")] = "err429"
        for client in (make(), make()):
            assert client.chat("hi", model=lab("text")).text == SENTENCE
        assert told(fake) == ["alice text", "alice F1", "alice F1"]

    @pytest.mark.parametrize(
        ("settings", "more"), [({"fallback_models": []}, {}), ({}, {"fallback": False})]
    )
    def test_a_model_on_cooldown_is_asked_without_a_fallback(self, make, fake, settings, more):
        fake.script[lab("text")] = ["err429", "text"]
        client = make(**settings)
        fake.catalogue = [m for m in fake.catalogue if m["id"] == lab("text")]
        with pytest.raises(puter.ModelRateLimitError):
            client.chat("hi", model=lab("text"))
        assert client.chat("hi", model=lab("text"), **more).model == lab("text")

    def test_a_cooldown_is_of_all_names_of_a_model(self, make, fake):
        fake.script[lab("text")] = "err429"
        client = make()
        for name in (lab("text"), "lab/text", "openrouter/lab/text"):
            client.chat("hi", model=name)
        assert told(fake) == ["alice text", *["alice F1"] * 3]

    def test_a_models_cooldown_is_of_one_account_and_ends(self, make, fake):
        fake.script[lab("text")] = ["err429", "text"]
        client = make("alice", "bob", fallback_cooldown_ms=30)
        client.chat("hi", model=lab("text"))
        cooldowns = [(c.account, c.model) for c in client.cooldowns()]
        assert cooldowns in ([("alice", lab("text"))], [])
        assert eventually(lambda: not client.cooldowns())
        assert client.chat("hi", model=lab("text")).model == lab("text")

    def test_a_paid_model_is_never_chosen(self, make, fake):
        fake.script[lab("text")] = "err429"
        # What the built-in list names is no longer free.
        fake.catalogue = [m for m in fake.catalogue if m["id"].startswith("openrouter")]
        for model in fake.catalogue:
            model["costs"] = {**model["costs"], "prompt": 1}
        with pytest.raises(puter.ModelRateLimitError):
            make().chat("hi", model=lab("text"))
        assert told(fake) == ["alice text"]

    @pytest.mark.parametrize(
        ("prompt", "more", "left_out"),
        table(
            ["tools", "hi", {"tools": [WEATHER]}, True],
            ["images", "hi", {"images": [PNG]}, True],
            ["too little room", "word " * 5_000, {}, True],
            ["nothing special", "hi", {}, False],
        ),
    )
    def test_models_that_cannot_do_it_are_left_out(self, make, fake, prompt, more, left_out):
        prepare(fake, {"text": "err401", **ALL_FREE_FAIL})
        with pytest.raises(puter.ProviderAuthError):
            make(max_retries=0).chat(prompt, model=lab("text"), **more)
        assert ("alice F5" not in told(fake)) is left_out
        assert "alice F4" in told(fake)

    @pytest.mark.parametrize("fault", ["err400", "internal", "closed"])
    def test_a_fallback_that_fails_otherwise_does_not_hide_the_first_error(self, make, fake, fault):
        # The caller asked for another model: an error about a fallback says nothing to him.
        prepare(fake, {"text": "err429", "F1": fault})
        try:
            assert make(max_retries=0).chat("hi", model=lab("text")).text == SENTENCE
        except puter.PuterError as error:
            assert isinstance(error, puter.ModelRateLimitError)

    def test_no_credit_and_no_model_list(self, make, fake):
        prepare(fake, {"alice": "no credit"})
        fake.routes.pop(("GET", "/puterai/chat/models/details"))
        reply = make("alice", "bob", max_retries=0).chat("hi", model=lab("text"))
        assert (reply.account, told(fake)) == ("bob", ["alice text", "bob text"])

    # Names of models.

    @pytest.mark.parametrize("name", ["Lab/TEXT", "puter/LAB/text", "OPENROUTER:lab/text", "TEXT"])
    def test_a_name_in_any_case(self, make, fake, caplog, name):
        caplog.set_level(logging.INFO, "puter")
        reply = make().chat("hi", model=name)
        assert (reply.text, reply.model) == (SENTENCE, lab("text"))
        assert fake.chat_calls()[-1] == ("alice", lab("text"))
        assert "fallback" not in caplog.text.lower()

    def test_an_unknown_name(self, make, fake):
        with pytest.raises(puter.ModelNotFoundError, match="Did you mean") as caught:
            make("alice", "bob").chat("hi", model="claude-opus-4-6")
        error = caught.value
        assert "claude-opus-4-5-20251101" in error.near
        assert fake.chat_calls() == [("alice", "claude-opus-4-6")]
        assert len(error.attempts) == 1

    def test_an_unknown_name_without_a_model_list(self, make, fake):
        fake.routes.pop(("GET", "/puterai/chat/models/details"))
        with pytest.raises(puter.ModelNotFoundError, match="claude-opus-4-6"):
            make(max_retries=0).chat("hi", model="claude-opus-4-6")

    @pytest.mark.parametrize(
        ("name", "words"),
        [("openrouter:lab/text:free", "openrouter:lab/text costs credit"), ("no:free", "models")],
    )
    def test_a_free_model_that_is_gone_does_not_become_another(self, make, fake, name, words):
        with pytest.raises(puter.ModelNotFoundError, match=words):
            make().chat("hi", model=name)
        assert fake.chat_calls() == [("alice", name)]

    def test_a_listed_model_that_the_server_does_not_know_is_passed_over(self, make, fake):
        prepare(fake, {"text": "err429", "F1": lambda *_: Raw(NO_MODEL[1], 400)})
        assert make().chat("hi", model=lab("text")).model == FREE[1]

    # Accounts.

    def test_a_dead_token_is_marked_and_its_record_kept(self, make, fake, home):
        client = make("alice", "bob")
        path = home / puter.ACCOUNTS_NAME
        before = path.read_bytes()
        fake.accounts["token-alice"].dead = True
        client.chat("hi", model=lab("text"))
        assert path.read_bytes() == before
        (mark,) = client.cooldowns()
        assert (mark.account, mark.model, mark.reason) == ("alice", "", "login")
        make().chat("hi", model=lab("text"))
        assert told(fake) == ["alice text", "bob text", "bob text"]
        # A new sign-in brings a new token, and the mark is of the old one.
        fake.add_account("alice", "token-alice-2")
        client.store.add(puter.Account("alice", "token-alice-2", 1))
        assert make().chat("hi", model=lab("text")).account == "alice"

    def test_only_dead_tokens(self, make, fake):
        client = make("alice", "bob")
        prepare(fake, {"alice": "dead", "bob": "dead"})
        with pytest.raises(puter.AuthError) as caught:
            client.chat("hi", model=lab("text"))
        assert [a.account for a in caught.value.attempts] == ["alice", "bob"]
        # When all are dead the active one is tried: its owner may have signed in elsewhere.
        with pytest.raises(puter.AuthError, match="login"):
            client.chat("hi", model=lab("text"))
        assert told(fake) == ["alice text", "bob text", "alice text"]

    def test_nobody_is_signed_in(self, fake, home):
        with (
            puter.Puter(api_base_url=fake.url) as client,
            pytest.raises(puter.AuthError, match=r"not signed in.*puter login"),
        ):
            client.chat("hi")
        assert not fake.requests

    def test_an_account_of_no_name(self, make):
        with pytest.raises(puter.AuthError, match=r"alcie.*Did you mean 'alice'"):
            make("alice", "bob", account="alcie").chat("hi")

    @pytest.mark.parametrize("chosen", [None, "alice"])
    def test_who_is_asked_first(self, make, fake, monkeypatch, chosen):
        # A chosen account wins over the environment's token, and that one over the store.
        monkeypatch.setenv("PUTER_AUTH_TOKEN", "token-bob")
        make("carol", "alice", account=chosen).chat("hi", model=lab("text"))
        assert told(fake) == [f"{chosen or 'bob'} text"]

    def test_cooldowns_grow_with_each_failure_in_a_row(self, make, fake, move_clock):
        client = make("alice", "bob")
        prepare(fake, dict.fromkeys(TWO, "account_suspended"))
        for n in (1, 2, 3, 4, 4):
            with pytest.raises(puter.AccessError):
                client.chat("hi", model=lab("text"))
            lengths = [round((c.until_s - time.time()) / 300, 1) for c in client.cooldowns()]
            assert lengths == [n, n]
            move_clock(300 * n + 1)
        fake.accounts["token-alice"].error = None
        client.chat("hi", model=lab("text"))
        prepare(fake, {"alice": "account_suspended"})
        with pytest.raises(puter.AccessError):
            client.chat("hi", model=lab("text"))
        assert [c.strikes for c in client.cooldowns()] == [1, 6]

    def test_all_are_on_cooldown_until_the_first_is_free(self, make, fake):
        client = make("alice", "bob", account_rotation_cooldown_ms=40_000)
        prepare(fake, dict.fromkeys(TWO, "account_suspended"))
        with pytest.raises(puter.AccessError):
            client.chat("hi", model=lab("text"))
        for one in (client, make()):
            with pytest.raises(puter.AllAccountsOnCooldownError) as caught:
                one.stream("hi", model=lab("text"))
            assert 30 < (caught.value.retry_after_s or 0) <= 40
            assert [c.account for c in caught.value.statuses] == ["alice", "bob"]
            assert caught.value.attempts == ()
        assert len(fake.chat_calls()) == 2
        client.state.clear_cooldowns()
        fake.accounts["token-alice"].error = None
        assert client.chat("hi", model=lab("text")).account == "alice"

    def test_a_cooldown_that_ends_in_between_is_no_crash(self, make):
        # Between the look for an account and the words about it, the last cooldown may end.
        error = make("alice", "bob")._accounts.no_account_error()
        assert isinstance(error, puter.AllAccountsOnCooldownError)

    def test_the_account_that_works_stays(self, make, fake, move_clock):
        client = make(*THREE)
        prepare(fake, {"alice": "limited"})
        client.chat("hi", model=lab("text"))
        fake.accounts["token-alice"].error = None
        move_clock(301)
        for _ in range(3):
            client.chat("hi", model=lab("text"))
        assert told(fake) == ["alice text", *["bob text"] * 4]

    @pytest.mark.parametrize(
        ("strategy", "want"),
        [
            ("round-robin", ["alice", "bob", "carol", "dave"]),
            ("least-recently-used", ["alice", "carol", "dave", "bob"]),
        ],
    )
    def test_strategies(self, make, fake, strategy, want):
        names = ("alice", "bob", "carol", "dave")
        client = make(*names, account_rotation_strategy=strategy)
        for seconds, name in enumerate(["carol", "dave", "bob", "alice"], 1):
            client.state.record_success(name, ("x",), seconds, seconds)
        prepare(fake, dict.fromkeys(names, "account_suspended"))
        with pytest.raises(puter.AccessError):
            client.chat("hi", model=lab("text"))
        assert [account for account, _ in fake.chat_calls()] == want

    def test_round_robin_goes_on_from_the_active_account(self, make, fake):
        client = make(*THREE)
        client.store.switch("bob")
        prepare(fake, {"bob": "limited", "carol": "limited"})
        client.chat("hi", model=lab("text"))
        assert told(fake) == ["bob text", "carol text", "alice text"]

    @pytest.mark.parametrize("change", ["removed", "damaged"])
    def test_accounts_that_change_meanwhile_hide_no_error(self, make, fake, home, change):
        store = puter.AccountStore(home)

        def send(*_):
            if change == "damaged":
                store.path.write_bytes(b"{")
            elif names(store) == ["alice", "bob"]:
                store.remove("alice")
            return "internal"

        fake.script[lab("text")] = send
        client = make("alice", "bob", account="alice", max_retries=2)
        with pytest.raises(puter.ServerError):
            client.chat("hi", model=lab("text"), fallback=False)
        assert len(fake.chat_calls()) == 3
        assert client.state.cooldowns(time.time()) == []

    @pytest.mark.parametrize("others", ["none", "dead", "not wanted"])
    def test_who_is_alone_waits_out_a_rate_limit(self, make, fake, others):
        names = ("alice",) if others == "none" else ("alice", "bob")
        client = make(*names, account="alice" if others == "not wanted" else None)
        if others == "dead":
            prepare(fake, {"bob": "dead"})
            client.store.switch("bob")
            client.chat("hi", model=lab("text"))
            fake.requests.clear()
        limited = refusing(429, "too_many_requests")
        fake.script[lab("text")] = [lambda *_: limited, lambda *_: limited, "text"]
        for _ in range(2):
            assert client.chat("hi", model=lab("text")).account == "alice"
        assert told(fake) == ["alice text"] * 4
        assert not [c for c in client.cooldowns() if c.reason != "login"]

    @pytest.mark.parametrize("names", [("erin",), ("erin", "frank")])
    def test_two_accounts_are_no_worse_than_one(self, make, fake, monkeypatch, names):
        # As from two processes: each client has limits of its own, and the state is shared.
        monkeypatch.setattr(puter, "RATE_WINDOW_S", 0.25)
        monkeypatch.setattr(puter, "RATE_PAUSE_S", 0.025)
        for name in names:
            fake.add_account(name, max_in_window=15, window_s=0.25)

        def work(client):
            return [client.chat("hi", model=lab("text")).text for _ in range(6)]

        clients = [make(*names), make(*names)] * 4
        running = [in_background(functools.partial(work, client)) for client in clients]
        for thread, outcome in running:
            thread.join(15)
            assert outcome == [[SENTENCE] * 6]

    def test_no_fallback_is_begun_late(self, make, fake, monkeypatch):
        monkeypatch.setattr(puter, "FALLBACK_BUDGET_S", -1.0)
        prepare(fake, {"text": "err429"})
        with pytest.raises(puter.ModelRateLimitError):
            make().chat("hi", model=lab("text"))
        assert told(fake) == ["alice text"]

    @pytest.mark.parametrize(
        ("body", "dead"),
        table(
            ["a proxy's page", b"<h1>Sign in to the hotel's network</h1>", False],
            ["another's code", {"code": "nope", "message": "no"}, False],
            ["Puter's code", {"code": "token_auth_failed", "message": "no"}, True],
        ),
    )
    def test_only_puters_own_codes_retire_an_account(self, make, fake, body, dead):
        client = make("alice", "bob")
        fake.script[lab("text")] = lambda *_: Raw(body, 401, JSON_TYPE)
        with pytest.raises(puter.AuthError):
            client.chat("hi", model=lab("text"))
        assert told(fake) == ["alice text", "bob text"]
        assert len([c for c in client.cooldowns() if c.reason == "login"]) == (2 if dead else 0)
        fake.script[lab("text")] = "text"
        assert client.chat("hi", model=lab("text")).account == "alice"

    def test_a_switch_and_a_new_account_are_noticed(self, make, fake, home):
        client = make("alice", "bob")
        client.chat("hi", model=lab("text"))
        client.store.switch("bob")
        client.chat("hi", model=lab("text"))
        assert told(fake) == ["alice text", "bob text"]
        sign_in(fake, home, "carol")
        prepare(fake, dict.fromkeys(TWO, "limited"))
        assert client.chat("hi", model=lab("text")).account == "carol"

    def test_a_broken_state_file_costs_a_warning(self, make, home, caplog):
        home.mkdir(parents=True, exist_ok=True)
        (home / puter.STATE_NAME).write_bytes(b"no database" * 100)
        client = make()
        for _ in range(2):
            assert client.chat("hi", model=lab("text")).text == SENTENCE
        warnings = [r for r in caplog.records if r.levelname == "WARNING"]
        assert len(warnings) == 1


# =============================================================================
# The gate
# =============================================================================
class TestGate:
    """So many requests at once and no more."""

    def test_only_places_that_nobody_gives_back_are_an_error(self):
        limit = puter._ConcurrencyLimit(2)
        with limit.place(puter._Cancellation(), 0), limit.place(puter._Cancellation(), 0):
            with pytest.raises(puter.RateLimitError, match="2 requests.*max_concurrent") as caught:
                limit.place(puter._Cancellation(), 0.05).__enter__()
            assert caught.value.scope == "request" and not caught.value.retryable
        with limit.place(puter._Cancellation(), 0):
            pass

    def test_who_gave_up_does_not_wait_and_a_pause_holds_all_back(self):
        limit, call = puter._ConcurrencyLimit(1), puter._Cancellation()
        limit.pause(30)
        waiter, outcome = in_background(limit.place(call, 30).__enter__)
        assert not eventually(lambda: outcome, 0.1)
        call.cancel()
        waiter.join(2)
        assert isinstance(outcome[0], puter.PuterError)
        with pytest.raises(puter.PuterError, match="given up"):
            puter._ConcurrencyLimit(1).place(call, 30).__enter__()

    def test_queueing_is_not_failing(self, make, fake):
        # Each answer comes within the time-out; the last one waits for its turn much longer.
        fake.script[lab("text")] = late(0.06, Turn(SENTENCE))
        client = make(max_concurrent=1, api_timeout_ms=300)
        work = [in_background(lambda: ask(client, "chat", lab("text"))) for _ in range(10)]
        for thread, outcome in work:
            thread.join(10)
            assert getattr(outcome[0], "text", outcome[0]) == SENTENCE

    @pytest.mark.parametrize("how", ["chat", "stream"])
    def test_max_concurrent_at_the_server(self, make, fake, how):
        seen: list[int] = []

        def count(handler: FakeHandler, args: dict[str, Any]) -> Answer:
            seen.append(fake.accounts["token-alice"].running)
            handler.pause(0.02)
            return Turn("ok", pause_s=0.01)

        fake.script[lab("text")] = count
        client = make(max_concurrent=2)
        work = [in_background(lambda: ask(client, how, lab("text"))) for _ in range(12)]
        for thread, outcome in work:
            thread.join(10)
            assert outcome[0].text == "ok"
        assert len(seen) == 12 and max(seen) == 2

    def test_too_much_running_is_no_fault_of_the_account(self, make, fake):
        client = make("alice", "bob", max_concurrent=1)
        fake.script[lab("text")] = "hang"
        with client.stream("hi", model=lab("slow")):
            with pytest.raises(puter.RateLimitError, match="max_concurrent"):
                client.chat("hi", model=lab("text"), timeout_ms=50)
            call, waiter, outcome = opening(client, lab("text"))
            time.sleep(0.05)
            call.cancel()
            waiter.join(1.5)
        assert isinstance(outcome[0], puter.PuterError)
        # The server has refused nothing: nobody else is asked, and no account is cooled.
        assert told(fake) == ["alice slow"] and client.cooldowns() == []

    def test_too_many_at_once_never_cools_an_account(self, make, fake):
        fake.add_account("erin", max_concurrent=1)
        client, other = make("erin", "alice"), make("erin", "alice")
        with other.stream("hi", model=lab("slow")):
            assert client.chat("hi", model=lab("text")).account == "alice"
            assert client.cooldowns() == []


# =============================================================================
# The catalogue, the account
# =============================================================================
DETAILS = "/puterai/chat/models/details"


class TestModels:
    """The model list, who is signed in, and what may still be spent."""

    @pytest.mark.parametrize("stored", ['{"x": 1}', "{", "[]"])
    def test_a_stored_list_that_cannot_be_read_is_as_good_as_none(self, make, fake, stored):
        client = make()
        client.state.put_catalogue(fake.url, stored, time.time())
        assert client.chat("hi", model=lab("text")).text == SENTENCE
        assert len(client.models()) == len(fake.catalogue)

    def test_the_list_is_sorted_and_filtered(self, make, fake):
        client = make()
        ids = [model.id for model in client.models()]
        assert ids == sorted(model["id"] for model in fake.catalogue)
        assert [m.id for m in client.models(free=True)] == sorted(FREE)
        assert {m.id for m in client.models(free=False)} == {*ids} - {*FREE}
        found = [m.id for m in client.models("Google")]
        assert found == [m.id for m in client.models("gemini")]
        assert found == ["gemini-2.5-flash"]
        assert client.models("nobody") == []
        assert [m.id for m in client.models("qwen", free=True)] == [FREE[3]]
        assert len(fake.requests) == 1

    @pytest.mark.parametrize(
        ("name", "want"),
        [
            ("claude-opus-4-5", "claude-opus-4-5-20251101"),
            ("CLAUDE-OPUS-4.5", "claude-opus-4-5-20251101"),
            ("puter/claude-opus-4-5", "claude-opus-4-5-20251101"),
            ("anthropic:anthropic/claude-opus-4-5", "claude-opus-4-5-20251101"),
            (" Puter/lab/Text ", "openrouter:lab/text"),
        ],
    )
    def test_one_model(self, make, name, want):
        assert make().model(name).id == want
        with pytest.raises(puter.ModelNotFoundError, match="gemini-2.5-flash"):
            make().model("gemini-2.5-flahs")

    def test_the_list_is_cached_and_needs_no_account(self, make, fake, home):
        with puter.Puter(api_base_url=fake.url) as client:
            assert client.models()
            make().models()  # another process would find it on disk as well
            assert [one.token for one in fake.requests] == [None]
            client.models(refresh=True)
        assert len(fake.requests) == 2
        make(cache_ttl_ms=0).models()
        assert len(fake.requests) == 3

    def test_the_list_of_another_server_is_another_list(self, make, fake):
        make().models()
        with FakePuter(catalogue=[]) as other:
            assert make(api_base_url=other.url).models() == []

    def test_an_old_list_is_better_than_none(self, make, fake, caplog):
        count = len(make().models())
        client = make(cache_ttl_ms=0)
        fake.routes.pop(("GET", DETAILS))
        assert len(client.models()) == count
        assert "old" in caplog.text
        with pytest.raises(puter.PuterError):
            client.models(refresh=True)

    def test_a_list_that_hangs_is_waited_for_once(self, make, fake, monkeypatch):
        monkeypatch.setattr(puter, "MODELS_TIMEOUT_S", 0.2)
        fake.routes["GET", DETAILS] = lambda handler: handler.pause(30.0)
        client = make()
        work = [in_background(client.models) for _ in range(4)]
        for thread, outcome in work:
            thread.join(5)
            assert isinstance(outcome[0], puter.RequestTimeoutError)
        with pytest.raises(puter.RequestTimeoutError):
            client.model("x")
        assert len(fake.requests) == 1
        monkeypatch.setattr(puter, "MODELS_RETRY_S", 0.0)
        with pytest.raises(puter.RequestTimeoutError):
            client.models()
        assert len(fake.requests) == 2

    @pytest.mark.parametrize(
        "reply",
        [
            Raw(b"<html>hello</html>", 200, HTML_TYPE),
            Raw({"models": 5}),
            Raw({"models": [{"name": "no id"}]}),
            Raw({"models": [{"id": "a", "costs": {"tokens": "many", "x": 1}}]}),
            Raw({"models": [{"id": "a", "modalities": [], "aliases": "b"}]}),
            Raw([1, 2]),
            refusing(503, "down"),
        ],
    )
    def test_what_is_no_list_is_an_error_of_ours(self, make, fake, reply):
        fake.routes["GET", DETAILS] = lambda handler: handler.send(reply)
        try:
            assert isinstance(make().models(), list)
        except puter.PuterError as error:
            assert error.hint

    def test_whoami_and_usage(self, make, fake):
        client = make("alice", "bob")
        assert client.whoami()["username"] == "alice"
        fake.accounts["token-alice"].credit_microcents = 10_000_000
        credit = client.usage()
        assert (credit.unit, credit.remaining, credit.used) == ("usd", 0.1, 0.15)
        prepare(fake, {"alice": "limited"})
        client.chat("hi", model=lab("text"))
        assert client.whoami()["username"] == "bob"  # the one in use
        fake.accounts["token-bob"].dead = True
        with pytest.raises(puter.AuthError, match="login"):
            client.whoami()

    def test_usage_of_an_old_server(self, make, fake):
        fake.routes["GET", "/auth/get-monthly-usage"] = fake.routes.pop(("GET", "/metering/usage"))
        assert make().usage().remaining == 0.25
        with pytest.raises(puter.PuterError):
            fake.routes.pop(("GET", "/auth/get-monthly-usage"))
            make().usage()

    def test_accounts(self, make):
        client = make("alice", "bob")
        assert [account.username for account in client.accounts] == ["alice", "bob"]
        assert [one.username for one in make(account="bob").accounts] == ["bob"]
        wanted = make(token="token-alice").accounts
        assert len(wanted) == 1 and "token-alice" not in repr(wanted)


# =============================================================================
# Commands: ask
# =============================================================================
def cli_env(fake: FakePuter, **more: str) -> dict[str, str]:
    """The environment of a command that talks to the fake server."""
    return {
        **os.environ,
        "PYTHONPATH": str(Path(puter.__file__).parent),
        "PUTER_API_BASE_URL": fake.url,
        "PUTER_RETRY_DELAY_MS": "1",
        **more,
    }


def run_cli(
    fake: FakePuter, *argv: str, stdin: str | bytes = b"", apart: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, here or in a process of its own."""
    run = run_apart if apart else run_here
    return subprocess.CompletedProcess(argv, *run(argv, cli_env(fake, **env), stdin))


@contextmanager
def running_cli(fake: FakePuter, *argv: str, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A command that runs while the test does something to it."""
    command = [sys.executable, "-m", "puter", *argv]
    pipes: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    options = {"stdin": subprocess.DEVNULL, **pipes, "env": cli_env(fake), **options}
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def signed_in(fake: FakePuter, home: Path) -> FakePuter:
    """The fake server, with alice signed in."""
    sign_in(fake, home, "alice")
    return fake


class TestAskCommand:
    """`ask`, without a terminal."""

    @pytest.mark.parametrize("how", [[], ["--no-stream"]])
    def test_an_answer(self, signed_in, how):
        done = run_cli(signed_in, "ask", "-m", lab("reason"), *how, "Why", "so?", apart=True)
        assert (done.returncode, done.stdout) == (0, SENTENCE + "\n")
        assert done.stderr == ("" if how else "thinking...\n")
        (sent,) = [one for one in signed_in.requests if one.path == CHAT]
        assert sent.args["messages"] == [{"role": "user", "content": "Why so?"}]
        assert sent.args.get("stream", False) is not bool(how)

    def test_it_is_printed_as_it_comes(self, signed_in):
        signed_in.script[lab("text")] = stalls(line("text", text="first"))
        with running_cli(signed_in, "ask", "-m", lab("text"), "hi") as process:
            assert process.stdout and process.stdout.read(5) == b"first"

    @pytest.mark.parametrize("scenario", ["text", "twotools", "reason"])
    def test_json(self, signed_in, scenario):
        done = run_cli(signed_in, "ask", "--json", "-m", lab(scenario), "hi")
        told_json = json.loads(done.stdout)
        assert (done.returncode, done.stdout.count("\n")) == (0, 1)
        want = {**PLAIN, **GOOD[scenario]}
        assert told_json["text"] == want["text"]
        assert told_json["finish_reason"] == want["finish_reason"]
        names = [call["name"] for call in told_json["tool_calls"]]
        assert names == [name for name, _ in CALLS.get(scenario, [])]
        assert told_json["model"] == lab(scenario)
        assert told_json["usage"]["output_tokens"] == 22
        assert "token-" not in done.stdout

    @pytest.mark.parametrize(
        ("argv", "stdin", "want"),
        [
            (["What broke?"], "the log\n", "What broke?\n\nthe log"),
            ([], "a question\n", "a question"),
            (["-"], "a question", "a question"),
            (["hi"], "", "hi"),
            (["hi"], "é🦊", "hi\n\né🦊"),
            (["Why", "so?", "-m", lab("echo")], "", "Why so?"),
            (["--", "-5", "is?"], "", "-5 is?"),
        ],
    )
    def test_a_pipe_joins_the_prompt(self, signed_in, argv, stdin, want):
        done = run_cli(signed_in, "ask", "-m", lab("echo"), *argv, stdin=stdin)
        assert (done.returncode, done.stdout) == (0, want + "\n")

    def test_a_pipe_that_is_slow_to_begin_is_read_to_its_end(self, signed_in):
        argv = ("ask", "-m", lab("echo"), "hi")
        with running_cli(signed_in, *argv, stdin=subprocess.PIPE) as process:
            assert process.stdin and process.stdout and process.stderr
            waits = process.stderr.readline().decode()
            assert "standard input" in waits and os.devnull in waits
            assert not signed_in.requests
            process.stdin.write(b"the ")
            process.stdin.flush()
            out, err = process.communicate(b"log\n", timeout=15)
        assert (process.returncode, out, err) == (0, b"hi\n\nthe log\n", b"")

    @pytest.mark.parametrize(
        ("argv", "more", "code", "words"),
        [
            *(([*argv], {}, 2, "python -m puter ask") for argv in ([], ["-"], [" "], ["--json"])),
            (["hi"], {"PUTER_MAX_RETRIES": "many"}, 2, "PUTER_MAX_RETRIES"),
            *(
                ([f"{option}={value}", "hi"], {}, 2, f"{option}: invalid ")
                for option, values in {
                    "--max-tokens": ("-5", "0", "1.5", "x"),
                    "--temperature": ("nan", "2.1", "-1", "inf"),
                }.items()
                for value in values
            ),
        ],
    )
    def test_nothing_is_asked(self, signed_in, argv, more, code, words):
        done = run_cli(signed_in, "ask", *argv, **more)
        assert (done.returncode, done.stdout) == (code, "") and words in done.stderr
        assert not signed_in.requests and "Traceback" not in done.stderr

    @pytest.mark.parametrize(
        ("turn", "words"),
        [
            (Turn(""), "the answer is empty"),
            (Turn("", calls=(WEATHER_CALL, WEATHER_CALL)), "only a call of get_weather"),
        ],
    )
    @pytest.mark.parametrize("how", [[], ["--no-stream"], ["--json"]])
    def test_an_answer_without_text_is_said(self, signed_in, turn, words, how):
        signed_in.script[lab("text")] = lambda handler, args: turn
        done = run_cli(signed_in, "ask", "-m", lab("text"), *how, "hi")
        assert done.returncode == 0 and words in done.stderr
        assert done.stderr.count("\n") == 1 and bool(done.stdout) is (how == ["--json"])

    @pytest.mark.parametrize(
        "argv", [["ask", "hi"], ["ask", "--json", "hi"], ["whoami"], ["usage", "--json"]]
    )
    def test_not_signed_in(self, fake, home, argv):
        done = run_cli(fake, *argv)
        assert (done.returncode, done.stdout) == (1, "")
        assert "python -m puter login" in done.stderr
        assert done.stderr.count("\n") == 1 and not fake.requests

    @pytest.mark.parametrize("scenario", ["midfail", "closed", "nousageline"])
    def test_a_failure_in_the_middle(self, signed_in, scenario):
        done = run_cli(signed_in, "ask", "-m", lab(scenario), "hi", apart=True)
        assert done.returncode == 1
        said = done.stdout.rstrip("\n")
        assert said and SENTENCE.startswith(said) and done.stdout.endswith("\n")
        assert done.stderr.startswith("error: ") and "broke off" in done.stderr
        assert "Traceback" not in done.stderr
        assert len(signed_in.chat_calls()) == 1

    def test_a_name_in_another_case_is_the_same_model(self, signed_in):
        done = run_cli(signed_in, "ask", "-m", "Claude-Opus-4-5", "hi")
        assert (done.returncode, done.stdout, done.stderr) == (0, SENTENCE + "\n", "")

    @pytest.mark.parametrize(
        ("scenario", "words"), [("badargs", "arguments"), ("html", "502"), ("text", "one two")]
    )
    def test_a_failure_is_one_line(self, signed_in, scenario, words):
        signed_in.script[lab("text")] = refuses(400, "bad_request", "one\n  two")
        done = run_cli(signed_in, "ask", "--no-fallback", "-m", lab(scenario), "hi")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1 and words in done.stderr

    def test_who_stood_in_is_told(self, signed_in):
        signed_in.script[lab("text")] = "err429"
        argv = ("ask", "-m", lab("text"), "hi")
        done = run_cli(signed_in, *argv)
        assert done.stdout == SENTENCE + "\n"
        assert f"answered by {FREE[0]} on alice" in done.stderr
        assert run_cli(signed_in, *argv, PUTER_QUIET_MODE="1").stderr == ""
        done = run_cli(signed_in, *argv[:-1], "--no-fallback", "hi")
        assert done.returncode == 1

    @pytest.mark.parametrize("scenario", ["long", "slow", None])
    def test_a_reader_that_goes_away_is_no_noise(self, signed_in, scenario):
        argv = ("ask", "-m", lab(scenario), "hi") if scenario else ("models",)
        with running_cli(signed_in, *argv, bufsize=0) as process:
            assert process.stdout and process.stderr
            process.stdout.read(3 if scenario else 0)
            process.stdout.close()
            assert process.wait(10) == 141
            assert process.stderr.read() == b""
        assert eventually(lambda: signed_in.open_streams == 0)

    @pytest.mark.parametrize("scenario", ["slow", "hang"])
    def test_ctrl_c(self, signed_in, scenario):
        argv = ("ask", "-m", lab(scenario), "hi")
        with running_cli(signed_in, *argv) as process:
            assert eventually(lambda: signed_in.open_streams == 1)
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130
            assert process.stderr and b"Traceback" not in process.stderr.read()
        assert eventually(lambda: signed_in.open_streams == 0)

    def test_the_debug_log(self, signed_in):
        signed_in.script[lab("text")] = "err429"
        done = run_cli(signed_in, "ask", "-m", lab("text"), "hi", apart=True, PUTER_DEBUG="1")
        lines = [one for one in done.stderr.splitlines() if one.startswith("[")]
        form = r"\[puter-auth\] \d\d:\d\d:\d\d (Request|Rate|Fallback|Stream|Response)"
        assert len(lines) >= 5 and all(re.match(form, one) for one in lines)
        assert done.stdout == SENTENCE + "\n"
        assert "token-alice" not in done.stderr


# =============================================================================
# Commands: whoami and models, and the frame of all
# =============================================================================
class TestCatalogueCommands:
    """`whoami`, `models`, `--version` and `--help`."""

    def test_whoami(self, signed_in):
        done = run_cli(signed_in, "whoami")
        assert (done.returncode, done.stdout, done.stderr) == (0, "alice\n", "")
        signed_in.accounts["token-alice"].temporary = True
        assert run_cli(signed_in, "whoami").stdout == "alice (temporary)\n"
        told_json = json.loads(run_cli(signed_in, "whoami", "--json").stdout)
        assert told_json["username"] == "alice" and told_json["is_temp"] is True
        signed_in.accounts["token-alice"].dead = True
        done = run_cli(signed_in, "whoami")
        assert (done.returncode, done.stdout) == (1, "")
        assert "python -m puter login" in done.stderr

    @pytest.mark.parametrize(
        ("argv", "want"),
        [
            (["--free"], sorted(FREE)),
            (["--provider", "google"], ["gemini-2.5-flash"]),
            (["--search", "OPUS"], ["claude-opus-4-5-20251101"]),
            (["--search", "qwen3", "--free"], [FREE[3]]),
            (["--search", "nothing-like-this"], []),
            (["--free", "--sort", "context"], [*sorted(FREE[:4]), FREE[4]]),
            (["--vision"], [HAIKU, OPUS, SONNET, "gemini-2.5-flash", "gpt-4o", "gpt-5.3-codex"]),
            (
                ["--vision", "--sort", "price"],
                ["gemini-2.5-flash", HAIKU, "gpt-4o", "gpt-5.3-codex", SONNET, OPUS],
            ),
            (
                ["--vision", "--sort", "context"],
                ["gemini-2.5-flash", SONNET, HAIKU, OPUS, "gpt-4o", "gpt-5.3-codex"],
            ),
            (
                ["--vision", "--sort", "released"],
                [SONNET, OPUS, HAIKU, "gemini-2.5-flash", "gpt-4o", "gpt-5.3-codex"],
            ),
            (["--vision", "--provider", "ANTHROPIC"], [HAIKU, OPUS, SONNET]),
            (["--vision", "--search", "opus 4.5"], [OPUS]),
            (["--tools", "--provider", "groq"], []),
        ],
    )
    def test_models(self, fake, home, argv, want):
        done = run_cli(fake, "models", *argv)
        head, *rows = done.stdout.splitlines()
        assert done.returncode == 0 and head.startswith("MODEL ")
        assert [row.split()[0] for row in rows] == want
        assert ("No model" in done.stderr) is (not want)
        told_json = json.loads(run_cli(fake, "models", "--json", *argv).stdout)
        assert [model["id"] for model in told_json] == want
        assert len(fake.requests) == 1  # the second process found it on disk

    def test_a_row(self, fake, home):
        rows = run_cli(fake, "models").stdout.splitlines()
        opus = next(row for row in rows if row.startswith("claude-opus"))
        cells = re.split(r"  +", opus)
        assert cells[1:] == ["claude", "200,000", "text+image+pdf", "yes", "5", "25"]
        assert len(rows) == len(fake.catalogue) + 1

    def test_refresh(self, fake, home):
        for _ in range(2):
            assert run_cli(fake, "models", "--refresh").returncode == 0
        assert len(fake.requests) == 2

    def test_no_server(self, fake, home):
        dead = f"http://127.0.0.1:{free_port()}"
        done = run_cli(fake, "models", PUTER_API_BASE_URL=dead)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ") and "refused" in done.stderr

    @pytest.mark.parametrize("argv", [[], ["ask"]])
    def test_help(self, fake, home, argv):
        done = run_cli(fake, *argv, "--help", apart=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: python -m puter")
        version = run_cli(fake, "--version").stdout
        assert version == f"puter.py {puter.__version__}\n"
        if not argv:
            for word in ("ask", "models", "whoami", "exit codes:", "examples:"):
                assert word in done.stdout


# =============================================================================
# Helpers of the server's tests
# =============================================================================
JSONObject = dict[str, Any]
Serve = Callable[..., puter.OpenAIServer]

HI: list[JSONObject] = [{"role": "user", "content": "hi"}]
A_PDF_URL = "data:application/pdf;base64," + base64.b64encode(b"%PDF-1.4 x").decode()
PNG_URL = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
KEY = "the-key-of-the-server"


def function_tool(name: str = "get_weather", **more: Any) -> JSONObject:
    """A tool in OpenAI's shape."""
    parameters = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"city": {"type": ["string", "null"], "$comment": "any"}},
        "additionalProperties": False,
        **more,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def body_for(scenario: Any = "text", **more: Any) -> JSONObject:
    """The body of a chat completion."""
    return {"model": lab(scenario), "messages": HI, **more}


def understood(**more: Any) -> puter.ChatRequest:
    """A request as the server understands it."""
    return puter.chat_request(body_for(**more), puter.ResponseMemory())


def post_to(
    server: puter.OpenAIServer, body: Any, stream: Any = False, **headers: Any
) -> requests.Response:
    """A chat completion, by plain `requests`; bytes are sent as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return requests.post(
        f"{server.url}/chat/completions",
        data=data,
        headers={"Content-Type": "application/json", **headers},
        stream=stream,
        timeout=10,
    )


def get_from(
    server: puter.OpenAIServer, path: str, method: str = "GET", **headers: str
) -> requests.Response:
    """A request of any other kind."""
    root = server.url.removesuffix("/v1")
    return requests.request(method, root + path, headers=headers, timeout=10)


def error_of(reply: requests.Response) -> JSONObject:
    """The error of a reply, which must have OpenAI's shape."""
    body = reply.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert isinstance(body["error"]["type"], str)
    return body["error"]


def events_of(text: str) -> list[str]:
    """The data of Server-Sent Events."""
    blocks = [block for block in text.split("\n\n") if block]
    assert all(block.startswith("data: ") for block in blocks), text
    return [block.removeprefix("data: ") for block in blocks]


def frames_of(reply: requests.Response) -> list[JSONObject]:
    """The frames of a stream that ended well."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    *frames, last = events_of(reply.content.decode())
    assert last == "[DONE]"
    return [json.loads(frame) for frame in frames]


def deltas_of(frames: Sequence[JSONObject]) -> list[JSONObject]:
    """What each frame adds."""
    return [choice["delta"] for frame in frames for choice in frame["choices"]]


def joined(frames: Sequence[JSONObject], key: str = "content") -> str:
    """A text that came in frames."""
    return "".join(delta.get(key) or "" for delta in deltas_of(frames))


def finish_of(frames: Sequence[JSONObject]) -> str:
    """The one finish reason, which must come with the last choice."""
    reasons = [c["finish_reason"] for frame in frames for c in frame["choices"]]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    return reasons[-1]


def answer_of(server: puter.OpenAIServer, body: JSONObject) -> tuple[str, str]:
    """(text, finish reason) of a request, streamed or not."""
    reply = post_to(server, body)
    if body.get("stream"):
        frames = frames_of(reply)
        return joined(frames), finish_of(frames)
    choice = reply.json()["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def sent_to(fake: FakePuter) -> JSONObject:
    """The arguments of the last chat call that reached Puter."""
    return [one for one in fake.requests if one.path == CHAT][-1].args


@contextmanager
def connected(server: puter.OpenAIServer) -> Iterator[socket.socket]:
    """A bare connection to the server."""
    with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
        yield sock


def head_of(
    method: str = "GET", path: str = "/health", version: str = "1.1", **headers: Any
) -> bytes:
    """The head of a request; an underscore in a header's name is a hyphen."""
    lines = [f"{method} {path} HTTP/{version}"]
    named = {"Host": "127.0.0.1", **headers}
    lines += [f"{k.replace('_', '-')}: {v}" for k, v in named.items() if v is not None]
    return "\r\n".join([*lines, "", ""]).encode()


def chat_request(body: JSONObject, version: str = "1.1", **headers: Any) -> bytes:
    """A whole chat completion as bytes."""
    data = json.dumps(body).encode()
    head = head_of("POST", "/v1/chat/completions", version, **headers)
    return head[:-2] + f"Content-Length: {len(data)}\r\n\r\n".encode() + data


def until_end(sock: socket.socket, within_s: float = 5.0) -> bytes:
    """All that comes until the server closes; raises TimeoutError when it does not."""
    sock.settimeout(within_s)
    got = b""
    with suppress(ConnectionError):
        while data := sock.recv(65_536):
            got += data
    return got


def until_seen(sock: socket.socket, mark: bytes, within_s: float = 5.0) -> bytes:
    """What comes until the mark does."""
    sock.settimeout(within_s)
    got = b""
    while mark not in got and (data := sock.recv(65_536)):
        got += data
    return got


def said_to(server: puter.OpenAIServer, request: bytes) -> bytes:
    """The whole answer to bytes after which the server closes the connection."""
    with connected(server) as sock:
        sock.sendall(request)
        return until_end(sock)


def status_of(answer: bytes) -> int:
    """The status of an answer; 0 when there is none."""
    found = re.match(rb"HTTP/1\.[01] (\d+)", answer)
    return int(found[1]) if found else 0


@pytest.fixture
def serve(make: MakeClient) -> Iterator[Serve]:
    """Starts servers: `serve(make("alice"), api_key="k")`; without a client, on alice's."""
    started: list[puter.OpenAIServer] = []

    def start(client: puter.Puter | None = None, **options: Any) -> puter.OpenAIServer:
        client = client or make(max_retries=0, fallback_enabled=False)
        server = puter.OpenAIServer(client, **{"port": 0, **options})
        run = server._server.serve_forever
        server._server.serve_forever = lambda _: run(0.005)  # so that a stop is soon seen
        started.append(server.start())
        return server

    yield start
    for server in started:
        server.stop(0)


@pytest.fixture
def server(serve: Serve) -> puter.OpenAIServer:
    """A server without any options."""
    return serve()


AT_ONCE: Any = {"max_retries": 0, "timeout": 10}


def sdk(server: puter.OpenAIServer, key: str = "any") -> openai.OpenAI:
    """The real SDK, which does not try again."""
    web = openai.DefaultHttpxClient(verify=False)  # it need not load certificates
    return openai.OpenAI(base_url=server.url, api_key=key, http_client=web, **AT_ONCE)


# =============================================================================
# Openai server: functions
# =============================================================================
TOOLS = [function_tool("get_weather"), function_tool("get_time")]
NAMED = {"type": "function", "function": {"name": "get_time"}}
OUR_USAGE = puter.Usage(11, 22, 5, 33, 0.01)
MEMORY = puter.ResponseMemory()
USAGE_OBJECT = {
    "prompt_tokens": 11,
    "completion_tokens": 22,
    "total_tokens": 33,
    "prompt_tokens_details": {"cached_tokens": 5},
    "cost_usd": 0.01,
}


def reply_of(text: str = "Hi", **more: Any) -> puter.Reply:
    """A reply to be worded."""
    base = puter.Reply(text=text, model="m", account="alice")
    return replace(base, **more)


def text_chunk(text: str) -> puter.Chunk:
    """A piece of text."""
    return puter.Chunk("text", text)


def call_chunk(name: str, arguments: JSONObject, call_id: str = "call_7") -> puter.Chunk:
    """A call in a stream."""
    return puter.Chunk("tool_call", tool_call=puter.ToolCall(call_id, name, arguments))


def reasoning_chunk(text: str) -> puter.Chunk:
    """A thought in a stream."""
    return puter.Chunk("reasoning", text)


CHUNK_TEXTS = ANY_TEXT(max_size=5)
CHUNK_CALLS = st.dictionaries(ANY_TEXT(max_size=3), st.integers())
ANSWER_CHUNKS = st.lists(
    CHUNK_TEXTS.map(text_chunk)
    | CHUNK_TEXTS.map(reasoning_chunk)
    | CHUNK_CALLS.map(lambda arguments: call_chunk("f", arguments)),
    max_size=8,
)


def said(*parts: Any) -> JSONObject:
    """What a user says in parts."""
    return {"role": "user", "content": list(parts)}


def image_of(url: str, **more: Any) -> JSONObject:
    """An image as a part."""
    return {"type": "image_url", "image_url": {"url": url, **more}}


def allowing(mode: str, *tools: JSONObject) -> JSONObject:
    """A tool_choice of some tools."""
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


BAD_GATEWAYS = (
    *(puter.ProviderAuthError, puter.ServerError, puter.NetworkError),
    *(puter.ReplyError, puter.StreamError),
)
ON_COOLDOWN = puter.AllAccountsOnCooldownError("x", retry_after_s=0.0)
WRONG_PARTS = (
    {"type": "video"},
    {"type": "input_audio"},
    image_of("/alice/cat.png"),
    image_of("file:///etc/passwd"),
)
WRONG_CHOICES = (
    *("sometimes", {"type": "function"}, {"type": "allowed_tools"}, allowing("maybe", NAMED)),
    *({"function": function} for function in ("get_time", {"name": "nope"})),
    {"type": "required"},
)


def code_of_refusal(rules: puter.AccessRules, path: str = "/v1/models", **headers: Any) -> Any:
    """Why a caller may not."""
    refused = puter.refusal(rules, path, {"Host": "127.0.0.1", **headers})
    return refused and refused.code


def frames_for(
    chunks: Sequence[puter.Chunk], finish: str = "stop", **asked: Any
) -> list[JSONObject]:
    """The frames of these chunks."""
    wanted = understood(stream=True, **asked)
    usage = next((chunk.usage for chunk in chunks if chunk.usage), puter.Usage())
    batches = [chunks, reply_of(finish_reason=finish, usage=usage)]
    events = puter.answer_events(wanted, batches)
    *frames, last = puter.chat_frames(wanted, lambda: "m", events)
    assert last == "[DONE]" and not any("type" in frame for frame in frames)  # no names
    return frames


def completion_of(reply: puter.Reply, **asked: Any) -> JSONObject:
    """A whole answer."""
    wanted = understood(**asked)
    return puter.chat_body(wanted, *puter.whole_answer(wanted, reply))


def error_body(error: puter.PuterError) -> JSONObject:
    """An error as callers see it."""
    public = puter.public_error(error, ["alice"], "https://api.example:8443/v9")
    return puter.chat_error(public, puter.error_status(error), "req_1")["error"]


class TestTranslation:
    """What is asked and what is answered, without sockets."""

    # What is asked.

    @pytest.mark.parametrize(
        ("more", "args"),
        [
            ({}, {}),
            ({"max_tokens": 5}, {"max_tokens": 5}),
            ({"max_completion_tokens": 7}, {"max_tokens": 7}),
            ({"max_tokens": 5, "max_completion_tokens": 7}, {"max_tokens": 7}),
            *(({"max_tokens": none}, {}) for none in (None, -1)),
            ({"temperature": 0, "top_p": 0.5}, {"temperature": 0, "top_p": 0.5}),
            ({"temperature": None, "seed": 4}, {"seed": 4}),
            ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
            ({"user": "u", "metadata": {"a": "b"}, "store": False, "logprobs": True}, {}),
            ({"service_tier": "auto", "prediction": {}, "anything": [1]}, {}),
            ({"n": 1, "stop": None, "tools": None, "functions": None}, {}),
        ],
    )
    def test_arguments(self, more, args):
        asked = understood(**more)
        assert asked.args == args
        assert (asked.messages, asked.model) == (HI, lab("text"))
        assert (asked.tools, asked.stop, asked.wants_json) == ([], (), False)

    @pytest.mark.parametrize(
        ("more", "streaming", "include_usage"),
        [
            *((more, False, False) for more in ({}, {"stream": None})),
            ({"stream": True}, True, False),
            *(
                (
                    {"stream": True, "stream_options": options},
                    True,
                    options == {"include_usage": True},
                )
                for options in ({"include_usage": False}, {"include_usage": True}, [1])
            ),
        ],
    )
    def test_streaming(self, more, streaming, include_usage):
        asked = understood(**more)
        assert (asked.streaming, asked.options["include_usage"]) == (streaming, include_usage)

    @pytest.mark.parametrize(
        ("stop", "want"),
        [
            *(("END", ("END",)), (["a", "b"], ("a", "b")), ([], ()), (None, ()), ("", ())),
            (list("abcdefghijklmnop"), tuple("abcdefghijklmnop")),
        ],
    )
    def test_stop(self, stop, want):
        assert understood(stop=stop).stop == want

    @pytest.mark.parametrize(
        ("more", "param"),
        [
            *(({"model": wrong}, "model") for wrong in ("  ", "puter/", 5, ["m"])),
            *(({"messages": wrong}, "messages") for wrong in (None, [], "hi", {})),
            *(({"messages": [said(part)]}, "messages") for part in WRONG_PARTS),
            *(({"n": wrong}, "n") for wrong in (2, 0, "1")),
            *(
                ({"stop": wrong}, "stop")
                for wrong in (5, ["a", 1], [""], list("abcdefghijklmnopq"))
            ),
            *(({"max_tokens": wrong}, "max_tokens") for wrong in (0, -2, "5")),
            *(({"max_completion_tokens": wrong}, "max_tokens") for wrong in (True, 0)),
            ({"functions": [{"name": "f"}]}, "functions"),
            ({"response_format": {"type": "xml"}}, "response_format"),
            *(({"tools": TOOLS, "tool_choice": wrong}, "tool_choice") for wrong in WRONG_CHOICES),
        ],
    )
    def test_what_is_wrong_is_named(self, more, param):
        with pytest.raises(puter.BadRequestError) as caught:
            understood(**more)
        body = error_body(caught.value)
        assert puter.error_status(caught.value) == 400
        assert (body["type"], body["param"]) == ("invalid_request_error", param)
        assert param.removeprefix("max_") in body["message"]

    def test_no_model(self):
        for model in ({}, {"model": None}, {"model": ""}):
            assert puter.chat_request({"messages": HI, **model}, MEMORY).model == ""

    @pytest.mark.parametrize(
        ("part", "want"),
        [
            ("Hi", "Hi"),
            ({"type": "text", "text": "Hi", "x": 1}, "Hi"),
            ({"type": "refusal", "refusal": "No"}, "No"),
            ({**MARKED, "x": 1}, MARKED),
            (
                {**image_of(PNG_URL, detail="low", path="/alice"), "path": "/alice"},
                image_of(PNG_URL, detail="low"),
            ),
            ({"type": "image_url", "image_url": PNG_URL}, image_of(PNG_URL)),
            ({**PDF_PART, "file": {**PDF_PART["file"], "path": "c"}, "x": 1}, PDF_PART),
            (
                {"type": "input_file", "filename": "a", "file_data": "data:text/csv;base64,YSxi"},
                "a:\n```\na,b\n```",
            ),
        ],
    )
    def test_known_keys_of_parts(self, part, want):
        want = user(want) if isinstance(want, str) else said(want)
        assert understood(messages=[said(part)]).messages == [want]

    @pytest.mark.parametrize(
        ("part", "want"),
        [
            ({"type": "input_text", "text": "Hi"}, {"type": "text", "text": "Hi"}),
            ({"type": "input_image", "image_url": PNG_URL, "detail": "low"}, "image"),
            (
                {"type": "image", "source": {"type": "url", "url": PNG_URL}, "detail": "low"},
                "image",
            ),
            ({"type": "input_file", **PDF_PART["file"]}, "file"),
            ({"type": "file", "file": {**PDF_PART["file"], "x": 1}}, "file"),
        ],
    )
    def test_any_part_in_any_dialect(self, part, want):
        want = {"image": image_of(PNG_URL, detail="low"), "file": PDF_PART}.get(str(want), want)
        message = said({**part, "path": "/alice/taxes.pdf", "x": 1}, "and")
        body = {"model": "m", "max_tokens": 9, "messages": [message], "input": [message]}
        for path in ("chat/completions", "responses", "messages"):
            asked = puter.DIALECTS[f"/v1/{path}"].parse(body, MEMORY)
            is_text = want == {"type": "text", "text": "Hi"}
            wanted = user("Hi\n\nand") if is_text else said(want, text_part("and"))
            assert asked.messages == [wanted], path

    def test_known_keys_of_messages(self):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        message = {"role": "assistant", "content": "x", "name": "n", "tool_calls": [call]}
        more = {"path": "/alice", "reasoning_content": "Hm", "files": ["/alice"]}
        assert understood(messages=[{**message, **more}]).messages == [message]

    @pytest.mark.parametrize(
        ("choice", "offered", "order"),
        [
            (None, ["get_weather", "get_time"], ""),
            ("auto", ["get_weather", "get_time"], ""),
            ("none", [], ""),
            ("required", ["get_weather", "get_time"], "calling at least one"),
            (NAMED, ["get_time"], "calling the function get_time"),
            (allowing("auto", NAMED), ["get_time"], ""),
            (allowing("required", *TOOLS), ["get_weather", "get_time"], "at least one"),
            (
                {**allowing("auto", NAMED)["allowed_tools"], "type": "allowed_tools"},
                ["get_time"],
                "",
            ),
        ],
    )
    def test_tool_choice(self, choice, offered, order):
        asked = understood(tools=TOOLS, tool_choice=choice, parallel_tool_calls=True)
        assert ("tool_choice" in asked.args) is (choice not in (None, "none"))
        assert ("parallel_tool_calls" in asked.args) is (choice != "none")
        assert not isinstance(asked.args.get("tool_choice"), dict) or choice is NAMED
        assert [tool["function"]["name"] for tool in asked.tools] == offered
        system = [m["content"] for m in asked.messages if m["role"] == "system"]
        assert len(system) == bool(order)
        assert not order or order in system[0]
        assert all(tool in TOOLS for tool in asked.tools)  # schemas as they were

    def test_a_choice_is_no_tool_whose_name_only_ends_so(self):
        with pytest.raises(puter.BadRequestError, match="names no tool"):
            understood(tools=[function_tool("srv__get_time")], tool_choice=NAMED)

    def test_tool_choice_without_tools(self):
        for choice in ("auto", "none", "required", NAMED):
            asked = understood(tool_choice=choice, parallel_tool_calls=False)
            assert (asked.messages, asked.args) == (HI, {})

    @pytest.mark.parametrize(
        ("wanted", "words"),
        [
            (None, None),
            ({"type": "text"}, None),
            ({"type": "json_object"}, ["one JSON object"]),
            (
                {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}},
                ["one JSON value", '{"type": "array"}'],
            ),
            ({"type": "json_schema"}, ["one JSON value"]),
        ],
    )
    def test_json_is_asked_for(self, wanted, words):
        asked = understood(response_format=wanted)
        assert asked.wants_json is (words is not None)
        system = [m["content"] for m in asked.messages if m["role"] == "system"]
        assert len(system) == asked.wants_json
        assert all(word in system[0] for word in words or ())
        assert asked.args == ({"response_format": wanted} if wanted else {})

    @pytest.mark.parametrize(
        ("roles", "place"),
        [
            (["user"], 0),
            (["system", "user"], 1),
            (["system", "developer", "user", "system"], 2),
            (["user", "assistant", "user"], 0),
        ],
    )
    def test_where_an_order_stands(self, roles, place):
        messages = [{"role": role, "content": "x"} for role in roles]
        before = json.dumps(messages)
        asked = understood(messages=messages, response_format={"type": "json_object"})
        given_roles = [message["role"] for message in asked.messages]
        assert given_roles == [*roles[:place], "system", *roles[place:]]
        assert "JSON" in asked.messages[place]["content"]
        assert json.dumps(messages) == before  # the caller's list is left alone

    # Stop sequences.

    @pytest.mark.parametrize(
        ("stops", "pieces", "want", "found"),
        [
            ([], ["a", "b"], "ab", False),
            (["END"], ["one END two"], "one ", True),
            (["END"], ["one E", "N", "D two"], "one ", True),
            (["END"], ["one E", "N", "E"], "one ENE", False),
            (["END"], ["one EN"], "one EN", False),
            (["END"], ["EN", "END"], "EN", True),
            (["aab"], ["a", "a", "a", "b", "x"], "a", True),
            (["b", "c"], ["acb"], "a", True),
            (["\n\n"], ["x\n", "\ny"], "x", True),
            (["日本"], ["x日", "本語"], "x", True),
            (["END"], ["END", "more", "END"], "", True),
            (["abc", "b"], ["a", "b", "c"], "", True),
            (["END", "EXIT"], ["aE", "b", "EX", "I", "!"], "aEbEXI!", False),
        ],
    )
    def test_stop_text(self, stops, pieces, want, found):
        stop = puter.StopText(stops)
        shown = [stop.feed(piece) for piece in pieces]
        assert "".join([*shown, stop.flush()]) == want
        assert (stop.found in stops) is found and (found or stop.found is None)
        assert stop.flush() == ""

    @given(
        text=st.text("ab\n", max_size=20),
        stop=st.text("ab\n", min_size=1, max_size=4),
        cuts=st.lists(st.integers(0, 20), max_size=6),
    )
    def test_pieces_make_no_difference(self, text, stop, cuts):
        edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
        reader = puter.StopText([stop])
        shown = [reader.feed(text[a:b]) for a, b in itertools.pairwise(edges)]
        assert "".join([*shown, reader.flush()]) == text.partition(stop)[0]
        assert reader.found == (stop if stop in text else None)

    # What is answered: whole.

    def test_a_whole_completion(self):
        whole = completion_of(reply_of(reasoning="Hm", usage=OUR_USAGE))
        assert re.fullmatch("chatcmpl-[0-9a-f]{24}", whole.pop("id"))
        assert abs(whole.pop("created") - time.time()) < 60
        message = {"role": "assistant", "content": "Hi", "refusal": None}
        assert whole == {
            "object": "chat.completion",
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "message": {**message, "reasoning_content": "Hm"},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": USAGE_OBJECT,
        }

    @pytest.mark.parametrize(("text", "content"), [("", None), ("Let me see", "Let me see")])
    def test_calls_of_a_whole_answer(self, text, content):
        calls = (
            puter.ToolCall("c1", "get_weather", {"city": "Köln"}, SIGNATURE),
            puter.ToolCall("c1", "get_time", {}),
        )
        reply = reply_of(text, tool_calls=calls, finish_reason="tool_calls")
        whole = completion_of(reply)
        message = whole["choices"][0]["message"]
        assert whole["choices"][0]["finish_reason"] == "tool_calls"
        assert message["content"] == content
        first, second = message["tool_calls"]
        assert json.loads(first["function"]["arguments"]) == {"city": "Köln"}
        assert first["extra_content"] == SIGNATURE and "extra_content" not in second
        ids = [first["id"], second["id"]]
        assert all(re.fullmatch("call_[0-9a-f]{24}", i) for i in ids) and len(set(ids)) == 2
        assert second["function"] == {"name": "get_time", "arguments": "{}"}
        assert first["type"] == second["type"] == "function"
        ChatCompletion.model_validate(whole, strict=True)

    @pytest.mark.parametrize(
        "usage", [puter.Usage(), puter.Usage(cost_usd=0.1), puter.Usage(total_tokens=5)]
    )
    def test_no_empty_usage(self, usage):
        assert puter.usage_object(usage) is None
        whole = completion_of(reply_of(usage=usage))
        assert "usage" not in whole

    def test_usage_object(self):
        assert puter.usage_object(OUR_USAGE) == USAGE_OBJECT
        counts = {"prompt_tokens": 0, "completion_tokens": 4, "total_tokens": 4}
        little = puter.usage_object(puter.Usage(None, 4, None, 4, None))
        assert little == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}
        beside = puter.usage_object(
            puter.Usage(5, 6, 2, 13)
        )  # cached ones, in some providers' count
        assert beside and (beside["prompt_tokens"], beside["total_tokens"]) == (7, 13)

    @pytest.mark.parametrize(
        ("text", "want"),
        [
            ('{"a": 1}', '{"a": 1}'),
            ('```json\n{"a": 1}\n```', '{"a": 1}'),
            ('  ```\n{"a": 1}```\n', '{"a": 1}'),
            (" [1]\n", " [1]\n"),
            ('Here: {"a": 1}', '{"a": 1}'),
            ('See [1]: {"a": [1]}. Done', '{"a": [1]}'),
            ('Two: [{"a": 1}, {"b": 2}]', '[{"a": 1}, {"b": 2}]'),
            ('Not {this} but {"a": 1}', '{"a": 1}'),
            *((text, text) for text in ("", "Sure!", '{"a": 1', "```json\nno\n```", "[" * 9999)),
            ('{"a": NaN}', '{"a": NaN}'),
        ],
    )
    def test_json_text(self, text, want):
        assert puter.json_text(text) == want
        whole = completion_of(reply_of(text), response_format={"type": "json_object"})
        assert whole["choices"][0]["message"]["content"] == want

    @pytest.mark.parametrize("text", ["{" * 10**6, '{"' * 10**6, "```\n" + "\n" * 10**6])
    def test_no_answer_takes_long_to_look_through(self, text):
        looked_at = []

        class Decoder(json.JSONDecoder):
            def raw_decode(self, s: str, idx: int = 0) -> Any:
                looked_at.append(idx)
                return super().raw_decode(s, idx)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json, "JSONDecoder", Decoder)
            assert puter.json_text(text) == text
        assert len(looked_at) <= 100

    def test_json_is_not_looked_for_in_what_was_cut_or_calls(self):
        call = puter.ToolCall("c", "f", {})
        for reply in (
            reply_of("no {}", tool_calls=(call,), finish_reason="tool_calls"),
            reply_of('{"a": {}', finish_reason="length"),
        ):
            whole = completion_of(reply, response_format={"type": "json_object"})
            assert whole["choices"][0]["message"]["content"] == reply.text

    # What is answered: in frames.

    def test_frames_of_all_kinds(self):
        call = puter.ToolCall("c1", "f", {"x": 1})
        chunks = [
            puter.Chunk("reasoning", "Hm"),
            text_chunk("a"),
            puter.Chunk("tool_call", tool_call=call),
            puter.Chunk("tool_call", tool_call=call),
            puter.Chunk("usage", usage=OUR_USAGE),
        ]
        frames = frames_for(chunks, "tool_calls")
        thought, text, first, second, last = deltas_of(frames)
        assert thought == {"role": "assistant", "reasoning_content": "Hm"}
        assert (text, last) == ({"content": "a"}, {})
        function = {"name": "f", "arguments": '{"x": 1}'}
        (one,), (two,) = first["tool_calls"], second["tool_calls"]
        assert one == {"index": 0, "id": one["id"], "type": "function", "function": function}
        assert (two["index"], two["id"] != one["id"]) == (1, True)
        assert re.fullmatch("call_[0-9a-f]{24}", two["id"])
        assert finish_of(frames) == "tool_calls"
        for frame in frames:
            ChatCompletionChunk.model_validate(frame, strict=True)

    @pytest.mark.parametrize("counted", [True, False])
    def test_usage_in_frames(self, counted):
        usage = [puter.Chunk("usage", usage=OUR_USAGE)] if counted else []
        frames = frames_for([text_chunk("a"), *usage], stream_options={"include_usage": True})
        plain = frames[:-1] if counted else frames
        assert [frame["usage"] for frame in plain] == [None, None]
        assert finish_of(plain) == "stop"
        if counted:
            assert frames[-1] == {**frames[0], "choices": [], "usage": USAGE_OBJECT}

    def test_a_stop_ends_the_reading(self):
        batches = iter([[text_chunk("one E")], [text_chunk("ND")], [text_chunk("more")]])
        asked = understood(stop="END", stream=True)
        *chunks, ending = puter.answer_events(asked, batches)
        assert "".join(map(str, chunks)) == "one "
        assert ending == puter.Ending("stop", puter.Usage(), "END")
        assert next(batches) == [text_chunk("more")]

    @pytest.mark.parametrize("text", ["one END", "one EN", "END"])
    def test_a_stop_before_a_call_is_the_same_in_both(self, text):
        call = puter.Chunk("tool_call", tool_call=puter.ToolCall("c", "f", {}))
        reply = reply_of(text, tool_calls=(call.tool_call,), finish_reason="tool_calls")
        choice = completion_of(reply, stop="END")["choices"][0]
        frames = frames_for([text_chunk(text), call], "tool_calls", stop="END")
        called = any("tool_calls" in delta for delta in deltas_of(frames))
        assert (choice["message"]["content"] or "") == joined(frames)
        assert choice["finish_reason"] == finish_of(frames)
        assert bool(choice["message"].get("tool_calls")) is called is ("END" not in text)

    @pytest.mark.parametrize("with_usage", [False, True])
    def test_an_answer_that_breaks_off(self, with_usage):
        def batches() -> Iterator[Any]:
            yield None
            yield [text_chunk("one EN")]
            raise puter.StreamError("It broke")

        asked = understood(stop="END", stream=True, stream_options={"include_usage": with_usage})
        events = puter.answer_events(asked, batches())
        frames = list(puter.chat_frames(asked, lambda: "m", events))
        assert frames[0] is None  # a sign of life
        assert joined(frames[1:-1]) == "one EN"
        assert frames[-1]["error"]["message"].startswith("It broke")

    def test_a_stop_waits_for_the_usage(self):
        call = puter.ToolCall("c1", "f", {})
        chunks = [
            text_chunk("one END"),
            text_chunk("more"),
            puter.Chunk("reasoning", "Hm"),
            puter.Chunk("tool_call", tool_call=call),
            puter.Chunk("usage", usage=OUR_USAGE),
        ]
        options = {"include_usage": True}
        frames = frames_for(chunks, stop=["END"], stream_options=options)
        assert deltas_of(frames) == [{"role": "assistant", "content": "one "}, {}]
        assert frames[-1]["usage"] == USAGE_OBJECT

    @given(ANSWER_CHUNKS, st.booleans())
    def test_any_frames_parse(self, chunks, include_usage):
        usage = puter.Chunk("usage", usage=OUR_USAGE)
        options = {"include_usage": include_usage}
        frames = frames_for([*chunks, usage], stream_options=options)
        for frame in frames:
            again = json.loads(json.dumps(frame))
            ChatCompletionChunk.model_validate(again, strict=True)
        assert joined(frames) == "".join(map(str, chunks))
        roles = [delta.get("role") for delta in deltas_of(frames)]
        assert roles == ["assistant"] + [None] * (len(roles) - 1)
        assert ("usage" in frames[-1]) is include_usage

    # What is answered: errors.

    @pytest.mark.parametrize(
        ("error", "status", "code", "retry_after"),
        [
            *(
                (kind("x"), 402, None, None)
                for kind in (puter.CreditError, puter.SubscriptionError)
            ),
            *((kind("x"), 403, None, None) for kind in (puter.AccessError, puter.ModelAccessError)),
            *((kind("x"), 500, None, None) for kind in (puter.StoreError, puter.ConfigError)),
            *((kind("x"), 502, None, None) for kind in BAD_GATEWAYS),
            (puter.BadRequestError("x"), 400, None, None),
            (puter.BadRequestError("x", status=413, code="too_large"), 413, "too_large", None),
            (puter.ModelNotFoundError("x", status=400, code="no"), 404, "model_not_found", None),
            (puter.AuthError("x"), 401, "not_signed_in", None),
            (puter.AuthError("x", status=403, code="token_missing"), 401, "token_missing", None),
            (puter.RateLimitError("x"), 429, None, "10"),
            (puter.RateLimitError("x", retry_after_s=2.2), 429, None, "3"),
            (puter.ModelRateLimitError("x"), 429, None, "60"),
            (ON_COOLDOWN, 429, "too_many_requests", "1"),
            (puter.ModelUnavailableError("x"), 503, None, "60"),
            (puter.ServerError("x", status=200), 502, None, None),
            (puter.ServerError("x", status=500), 500, None, None),
            (puter.ServerError("x", status=503, retry_after_s=7), 503, None, "7"),
            (puter.RequestTimeoutError("x"), 504, "timeout", None),
        ],
    )
    def test_error_object(self, error, status, code, retry_after):
        got, inner = puter.error_status(error), error_body(error)
        headers = puter.error_headers(error, got)
        assert (got, inner["type"], inner["code"]) == (status, error.openai_type, code)
        assert headers.get("Retry-After") == retry_after
        assert headers["x-should-retry"] == "false"
        assert inner["param"] == ("model" if code == "model_not_found" else None)

    def test_every_kind_of_error_has_a_status(self):
        kinds = {
            kind
            for kind in vars(puter).values()
            if isinstance(kind, type) and issubclass(kind, puter.PuterError)
        }
        for kind in kinds:
            assert 400 <= puter.error_status(kind("x")) < 600 and error_body(kind("x"))["message"]

    def test_words_for_those_who_use_no_python(self):
        assert ".reply" not in error_body(puter.StreamError("It broke"))["message"]
        hinted = error_body(puter.ModelNotFoundError("No model"))["message"]
        assert "python -m puter models" in hinted

    @pytest.mark.parametrize("name", ["alice", "bob smith!", "eve-", "(x)", "日本", "a.b+c@d.e"])
    @pytest.mark.parametrize("where", ["message", "attempts", "account", "stored"])
    def test_no_account_is_named(self, name, where):
        details: Any = {"message": {"account": name}, "account": {"account": name}}.get(where, {})
        if where == "attempts":
            attempt = puter.Attempt("m", name, puter.RateLimitError("x"), 1.0)
            details = {"attempts": [attempt, attempt]}
        error = puter.RateLimitError(f"Too much on {name}, they say ({name})", **details)
        public = puter.public_error(error, [name] if where == "stored" else [], "http://h")
        assert name not in str(public) and "Too much on" in str(public)

    @pytest.mark.parametrize(
        "text",
        [
            "to https://a.internal:8/x.",
            "HTTP://B.Internal/x",
            "connect ECONNREFUSED 10.2.3.4:443",
            "ENOTFOUND backend-17.internal",
            "at [fd00::1]:443",
        ],
    )
    def test_no_address_is_named(self, text):
        public = str(puter.public_error(puter.ServerError(text), [], "http://h"))
        assert "Puter" in public and not re.search("(?i)internal|10[.]2|fd00", public)

    @pytest.mark.parametrize(
        "error",
        [
            puter.AuthError("Every account needs a new sign-in: alice, bob"),
            puter.AllAccountsOnCooldownError("alice and bob rest", retry_after_s=5),
        ],
    )
    def test_no_account_is_named_when_none_is_left(self, error):
        shown = error_body(error)["message"]
        assert "alice" not in shown and "bob" not in shown and "python -m puter" in shown

    @pytest.mark.parametrize(
        "text",
        [
            "The connection to https://api.example:8443/v9/call failed (refused)",
            "api.example:8443 was silent",
            "Failed to resolve 'api.example'",
        ],
    )
    def test_nothing_is_said_of_the_server(self, text):
        shown = error_body(puter.NetworkError(text))["message"]
        assert "api.example" not in shown and "8443" not in shown and "Puter" in shown

    @pytest.mark.parametrize(
        ("released", "created"),
        [("2025-11-01", True), (None, False), ("2025", False), ("soon", False)],
    )
    def test_model_object(self, released, created):
        model = puter.Model(id="a/b:free", name="B", provider="p", released=released)
        shown = puter.model_object(model)
        assert (shown["id"], shown["object"]) == ("a/b:free", "model")
        assert (shown["created"] > 0) is created
        assert shown["owned_by"] == "p"
        Model.model_validate(shown, strict=True)

    def test_what_is_remembered_of_answers(self):
        memory = puter.ResponseMemory(most_bytes=30)
        value = {"a": [1]}
        memory.put("x", value)
        value["a"].append(2)
        assert memory.get("x") == {"a": [1]}
        for key in "xyzw":
            memory.put(key, key)
        memory.put("long", "l" * 20)
        remembered = [memory.get(key) for key in (*"xyzw", "long")]
        assert remembered == [None, None, "z", "w", "l" * 20]
        memory.put("too long", "l" * 99)  # else it would drive out all others
        assert remembered == [memory.get(key) for key in (*"xyzw", "long")]
        assert memory._bytes == sum(map(len, memory._texts.values()))

    @pytest.mark.parametrize(
        "path", ["/v1/chat/completions", "/v1/chat/completions/x", "/v1/chat/completionsx", "/", ""]
    )
    def test_the_dialect_of_a_path(self, path, monkeypatch):
        chat = puter.DIALECTS["/v1/chat/completions"]
        other = chat._replace(cuts_broken_streams=False)
        monkeypatch.setitem(puter.DIALECTS, "/v1/other", other)
        monkeypatch.setitem(puter.DIALECTS, "/v1/other/longer", chat)
        assert puter.dialect_of(path) is chat
        assert puter.dialect_of("/v1/other/x/y") is other
        assert puter.dialect_of("/v1/other/longer/y") is chat

    # Who may call.

    @pytest.mark.parametrize(
        ("bound", "welcome", "refused"),
        [
            (
                "127.0.0.1",
                "127.0.0.1 127.0.0.1:11480 localhost:80 LOCALHOST [::1]:11480 127.8.9.10:1 Docker:1",
                "evil.example evil.example:80 localhost.evil.example 127.0.0.1.evil.example 128.0.0.1",
            ),
            ("::1", "[::1]:11480", "127.0.0.1:80:80 127.0.0.1@evil.example 127.0.0.1. [::2]"),
            ("box.lan", "box.lan:11480 BOX.lan", "other.lan"),
            ("192.168.1.5", "192.168.1.5:11480", "192.168.1.6"),
        ],
    )
    def test_hosts(self, bound, welcome, refused):
        rules = puter.AccessRules(bound, allowed_hosts=frozenset(["docker"]))
        with_key = rules._replace(api_key=KEY)  # which is the guard then
        for host in [*refused.split(), "", None]:
            assert code_of_refusal(rules, Host=host) == "forbidden_host", host
            assert code_of_refusal(with_key, Host=host, Authorization=f"Bearer {KEY}") is None
        for host in welcome.split():
            assert code_of_refusal(rules, Host=host) is None, host

    @pytest.mark.parametrize(
        ("allowed", "welcome", "refused"),
        [
            ([], [None, "http://127.0.0.1:11480"], ["https://evil.example", "null", ""]),
            ([], [], ["https://127.0.0.1:11480", "http://127.0.0.1:3000"]),
            ([], [], ["http://localhost:11480"]),
            (["https://app.example"], ["https://app.example"], ["https://app.example:8443"]),
            (["https://app.example"], [], ["http://app.example", "https://app.example.evil"]),
            (["*"], ["https://anyone.example"], []),
        ],
    )
    def test_origins(self, allowed, welcome, refused):
        rules = puter.AccessRules("127.0.0.1", None, frozenset(allowed))
        for code, origins in ((None, welcome), ("forbidden_origin", refused)):
            for origin in origins:
                assert code_of_refusal(rules, Host="127.0.0.1:11480", Origin=origin) == code, origin

    @pytest.mark.parametrize(
        ("paths", "given", "may"),
        [
            (["/v1/models"], [f"Bearer {KEY}"], True),
            (["/v1/models"], [f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY], False),
            (["/v1/models"], ["Bearer", "Bearer ", "Bearer \xff\ud800"], False),
            (["/v1/models", "/v1/chat/completions", "/nowhere", "/health/"], [""], False),
            (["/", "/health"], [""], True),
        ],
    )
    def test_keys(self, paths, given, may):
        rules = puter.AccessRules("127.0.0.1", KEY)
        free = puter.AccessRules("127.0.0.1")
        for path, key in itertools.product(paths, given):
            code = code_of_refusal(rules, path, Authorization=key)
            assert code == (None if may else "invalid_api_key"), (path, key)
            assert code_of_refusal(free, path, Authorization=key) is None

    def test_a_key_in_either_header(self):
        rules = puter.AccessRules("127.0.0.1", KEY)
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": f"Bearer {KEY}"}):
            assert code_of_refusal(rules, **{**headers, "x-api-key": KEY}) is None
        assert code_of_refusal(rules, **{"x-api-key": "no"}) == "invalid_api_key"

    def test_a_key_is_compared_in_constant_time(self, monkeypatch):
        import hmac

        compared: list[Any] = []

        def compare(*both: Any) -> bool:
            compared.append(both)
            return False

        monkeypatch.setattr(hmac, "compare_digest", compare)
        rules = puter.AccessRules("127.0.0.1", KEY)
        headers = {"Authorization": f"Bearer {KEY}x"}
        assert KEY not in str(puter.refusal(rules, "/v1/models", headers))
        assert set(compared) == {(f"{KEY}x".encode(), KEY.encode()), (b"", KEY.encode())}


# =============================================================================
# Gateway: responses, messages, names of models
# =============================================================================
# The HTTP library of the SDKs, under the name that their version has for it.
HTTPX: Any = importlib.import_module(openai.DefaultHttpxClient.__base__.__module__.split(".")[0])
RESPONSE_EVENT: Any = TypeAdapter(ResponseStreamEvent)
CLAUDE_EVENT: Any = TypeAdapter(RawMessageStreamEvent)
A_RESULT = {"type": "function_call_output", "call_id": "c1"}
FUNCTIONS_CALL = {"namespace": "functions", "input": "a\nb"}
SEE_IT = [{"type": "input_text", "text": text} for text in ("see", "it")]
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
DOCUMENT = base64.b64encode(b"%PDF-1.4 x").decode()
PDF_SOURCE = {"type": "base64", "media_type": "application/pdf", "data": DOCUMENT}


def responses_request(memory: Any = None, **body: Any) -> puter.ChatRequest:
    """A request of the dialect as the gateway understands it."""
    asked = {"model": "m", "input": "hi", **body}
    return puter.responses_request(asked, memory or puter.ResponseMemory())


def messages_request(*messages: Any, **body: Any) -> puter.ChatRequest:
    """A request of the other dialect."""
    asked = {"model": "m", "max_tokens": 64, "messages": list(messages) or HI, **body}
    return puter.messages_request(asked, puter.ResponseMemory())


def typed(kind: str, **more: Any) -> JSONObject:
    """An item or a block of a kind."""
    return {"type": kind, **more}


def claude_tool(name: str) -> JSONObject:
    """A function as Anthropic's clients offer it."""
    return {"name": name, "description": "d", "input_schema": {"type": "object"}}


def offering(*tools: JSONObject, **choice: Any) -> JSONObject:
    """The function f and other tools, and a choice among them."""
    return {"tools": [claude_tool("f"), *tools], "tool_choice": choice}


def flat_tool(name: str, kind: str = "function", **more: Any) -> JSONObject:
    """A tool as clients of responses offer it."""
    return {"type": kind, "name": name, "description": "d", **more}


def image_block(**source: Any) -> JSONObject:
    """An image as Anthropic's clients send it."""
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", **source}}


def agent_answer(dialect: str, *events: Any, **asked: Any) -> list[JSONObject]:
    """The frames for these events, which all say their name."""
    request = responses_request(**asked) if dialect == "responses" else messages_request(**asked)
    frames = list(puter.DIALECTS[f"/v1/{dialect}"].frames(request, lambda: "m", events))
    assert all(frame["type"] for frame in frames)
    return [json.loads(json.dumps(frame)) for frame in frames]


def types_of(frames: Sequence[JSONObject]) -> list[str]:
    """The kinds of frames, without the dialect's prefix."""
    return [frame["type"].removeprefix("response.") for frame in frames]


def parsed_frames(dialect: str, frames: Sequence[JSONObject]) -> list[JSONObject]:
    """The frames, each of which the SDK's own model of events must accept."""
    model = RESPONSE_EVENT if dialect == "responses" else CLAUDE_EVENT
    for number, frame in enumerate(frames):
        if frame["type"] not in ("ping", "error"):
            model.validate_python(frame)
        assert dialect == "messages" or frame["sequence_number"] == number
    return list(frames)


AGENT_KEYS = st.sampled_from(
    re.findall(
        r"\w+",
        "type role content text input tools name namespace tool_choice call_id output arguments id "
        "source data title format include reasoning effort thinking budget_tokens output_config "
        "system messages stop_sequences instructions image_url file_data mode execution",
    )
)
AGENT_WORDS = st.sampled_from(
    re.findall(
        r"\w+",
        "message user assistant developer function custom namespace tool_search client function_call "
        "function_call_output custom_tool_call tool_search_output additional_tools item_reference "
        "input_text input_image input_file text image document tool_use tool_result search_result "
        "base64 allowed_tools auto any tool json_schema web_search_20250305 f",
    )
)
AGENT_JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | AGENT_WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(AGENT_KEYS, inner, max_size=5),
    max_leaves=20,
)


def sse_client(dialect: str, frames: Sequence[JSONObject]) -> Any:
    """An SDK whose server answers with these frames."""
    text = "".join(f"event: {f['type']}\ndata: {json.dumps(f)}\n\n" for f in frames)
    answer = HTTPX.Response(200, headers={"Content-Type": "text/event-stream"}, text=text)
    web = HTTPX.Client(transport=HTTPX.MockTransport(lambda _: answer))
    if dialect == "responses":
        return openai.OpenAI(api_key="k", base_url="http://x/v1", http_client=web)
    return anthropic.Anthropic(api_key="k", base_url="http://x", http_client=web)


def essence(dialect: str, whole: Any) -> list[Any]:
    """Texts, thoughts, calls and usage of a whole answer, without ids."""
    usage = [whole["usage"]["input_tokens"], whole["usage"]["output_tokens"]]
    if dialect == "messages":
        keys = {"text": ("text",), "thinking": ("thinking",), "tool_use": ("name", "input")}
        blocks = whole["content"]
        return [[block[key] for key in keys[block["type"]]] for block in blocks] + [usage]
    found: list[Any] = []
    for item in whole["output"]:
        parts = item.get("content") or item.get("summary") or [{}]
        call = [item.get("name"), json.loads(item.get("arguments") or "null")]
        found.append(call if item["type"] == "function_call" else [parts[0].get("text")])
    return [*found, usage]


def final_of(dialect: str, frames: Sequence[JSONObject]) -> Any:
    """What the SDK's stream helper makes of frames."""
    client = sse_client(dialect, frames)
    if dialect == "responses":
        with client.responses.stream(model="m", input="hi") as stream:
            return stream.get_final_response().model_dump()
    with client.messages.stream(model="m", max_tokens=9, messages=HI) as stream:
        return stream.get_final_message().model_dump()


class TestResponses:
    """The dialect of Codex, without sockets."""

    @pytest.mark.parametrize(
        ("items", "messages"),
        [
            ("hi", HI),
            ([{"role": "user", "content": "hi"}], HI),
            ([said({"type": "input_text", "text": "hi"})], HI),
            ([assistant([{"type": "refusal", "refusal": "no"}]), *HI], [assistant("no"), *HI]),
            (
                [{"role": "developer", "content": "d"}, {"role": "system", "content": "s"}, *HI],
                [{"role": "developer", "content": "d"}, {"role": "system", "content": "s"}, *HI],
            ),
            (
                [
                    said(
                        {"type": "input_image", "image_url": PNG_URL, "detail": "high"},
                        {"type": "input_file", "filename": "a.pdf", "file_data": A_PDF_URL},
                    )
                ],
                [
                    said(
                        image_of(PNG_URL, detail="high"),
                        {"type": "file", "file": {"filename": "a.pdf", "file_data": A_PDF_URL}},
                    )
                ],
            ),
            # Text and calls of a turn are one message; reasoning does not part them.
            (
                [
                    typed("message", **assistant([typed("output_text", text="so")], id="msg_1")),
                    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
                    {"type": "reasoning", "id": "rs_1", "summary": []},
                    typed("custom_tool_call", call_id="c2", name="exec", **FUNCTIONS_CALL),
                    {**A_RESULT, "output": "one"},
                    {"type": "custom_tool_call_output", "call_id": "c2", "output": []},
                ],
                [
                    assistant(
                        "so", called("c1"), called("c2", "functions__exec", {"input": "a\nb"})
                    ),
                    result("c1", "one"),
                    result("c2", None),
                ],
            ),
            # Images in results stay there: it is the provider's form that says where they go.
            (
                [
                    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
                    {**A_RESULT, "output": [*SEE_IT, typed("input_image", image_url=PNG_URL)]},
                    *HI,
                ],
                [
                    assistant(None, called("c1")),
                    result("c1", [text_part("see"), text_part("it"), image_of(PNG_URL)]),
                    *HI,
                ],
            ),
            # A picture that was drawn is the assistant's.
            (
                [*HI, typed("image_generation_call", id="ig_1", result="AA==")],
                [*HI, assistant(None, images=[image_of("data:image/png;base64,AA==")])],
            ),
            (
                [
                    {"type": "tool_search_call", "call_id": "c1", "arguments": {"query": "x"}},
                    typed(
                        "tool_search_output",
                        call_id="c1",
                        tools=[flat_tool("mcp__wx", "namespace", tools=[flat_tool("get")])],
                    ),
                ],
                [
                    assistant(None, called("c1", "tool_search", {"query": "x"})),
                    result("c1", "Tools to call now: mcp__wx__get"),
                ],
            ),
        ],
    )
    def test_items(self, items, messages):
        assert responses_request(input=items).messages == messages

    @pytest.mark.parametrize(
        ("more", "args"),
        [
            ({"stream": True, "store": True, "top_logprobs": 1, "user": "u"}, {"store": True}),
            ({"max_output_tokens": 9, "temperature": 0}, {"max_tokens": 9, "temperature": 0}),
            ({"reasoning": {"effort": "xhigh", "summary": "auto"}}, {"reasoning_effort": "high"}),
            (
                {"reasoning": {"summary": "auto"}, "text": {"verbosity": "low"}},
                {"verbosity": "low"},
            ),
            (
                {"text": {"format": {"type": "json_object"}}},
                {"response_format": {"type": "json_object"}},
            ),
            (
                {"text": {"format": {"type": "json_schema", "name": "n", "schema": {}}}},
                {"response_format": typed("json_schema", json_schema={"name": "n", "schema": {}})},
            ),
        ],
    )
    def test_arguments(self, more, args):
        asked = responses_request(**more)
        assert asked.args == args and asked.streaming is more.get("stream", False)
        assert asked.wants_json is ("response_format" in args)

    def test_tools_and_the_way_back(self):
        tools = [
            flat_tool("f", strict=True, parameters={"type": "object"}),
            flat_tool("patch", "custom", format={"type": "grammar", "definition": "start: x"}),
            flat_tool("n" * 40, "namespace", tools=[flat_tool("a" * 40), flat_tool("e", "custom")]),
            {"type": "tool_search", "execution": "client", "parameters": {"type": "object"}},
            {"type": "web_search"},
            {"type": "mcp", "server_label": "x"},
        ]
        more = [{"type": "additional_tools", "role": "developer", "tools": [flat_tool("late")]}]
        asked = responses_request(tools=tools, input=[*more, *HI])
        names = [tool["function"]["name"] for tool in asked.tools]
        assert names[:2] + names[4:] == ["f", "patch", "tool_search", "late"]
        assert len(names[2]) <= 64 and names[3] == f"{'n' * 40}__e"
        assert asked.tools[1]["function"]["description"] == "d\n\nstart: x"
        assert set(asked.tools[0]["function"]) == {"name", "description", "parameters"}
        calls = [
            call_chunk("f", {"a": 1}),
            call_chunk("patch", {"input": 'say "é"\n'}),
            call_chunk("patch", {"text": "x"}),
            puter.Chunk("tool_call", tool_call=puter.ToolCall("c", "patch", {}, invalid="+a")),
            call_chunk(names[2], {}),
            call_chunk("tool_search", {"query": "x"}),
            call_chunk("unknown", {}),
        ]
        ending = puter.Ending("tool_calls", OUR_USAGE)
        frames = parsed_frames("responses", agent_answer("responses", *calls, ending, tools=tools))
        output = frames[-1]["response"]["output"]
        assert output == [f["item"] for f in frames if f["type"] == "response.output_item.done"]
        assert [
            (o["type"], o.get("name"), o.get("namespace"), o.get("arguments", o.get("input")))
            for o in output
        ] == [
            ("function_call", "f", None, '{"a": 1}'),
            ("custom_tool_call", "patch", None, 'say "é"\n'),
            ("custom_tool_call", "patch", None, '{"text": "x"}'),
            ("custom_tool_call", "patch", None, "+a"),
            ("function_call", "a" * 40, "n" * 40, "{}"),
            ("tool_search_call", None, None, {"query": "x"}),
            ("function_call", "unknown", None, "{}"),
        ]

    @pytest.mark.parametrize(
        ("choice", "offered", "words"),
        [
            ("auto", ["f", "n__g"], ""),
            ("none", [], ""),
            ("required", ["f", "n__g"], "at least one"),
            ({"type": "function", "name": "f"}, ["f"], "function f"),
            ({"type": "function", "name": "g", "namespace": "n"}, ["n__g"], "function n__g"),
            ({"type": "custom", "name": "g"}, ["n__g"], "function n__g"),
            ({"type": "web_search"}, ["f", "n__g"], ""),
            (
                typed("allowed_tools", mode="required", tools=[flat_tool("f"), SEARCH]),
                *(["f"], "at least one"),
            ),
        ],
    )
    def test_tool_choice(self, choice, offered, words):
        tools = [flat_tool("f"), flat_tool("n", "namespace", tools=[flat_tool("g", "custom")])]
        asked = responses_request(tools=tools, tool_choice=choice)
        assert [tool["function"]["name"] for tool in asked.tools] == offered
        assert words in str(asked.messages[0]["content"])

    @pytest.mark.parametrize(
        ("more", "param", "status", "code"),
        [
            *(({"input": wrong}, "input", 400, "invalid_input") for wrong in (None, [], [5])),
            *(
                ({"input": [wrong]}, "input", 400, "invalid_input")
                for wrong in (typed("nonsense"), said(typed("video")), user("x") | {"role": "tool"})
            ),
            *(
                ({"input": [said(typed(f"input_{kind}", file_id="f"))]}, "input", 400, None)
                for kind in ("file", "image")
            ),
            ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", 404, None),
            *(
                ({name: value}, name, 400, "unsupported_parameter")
                for name, value in (
                    ("background", True),
                    ("conversation", "c"),
                    ("prompt", {"id": "p"}),
                )
            ),
            (
                {"previous_response_id": "resp_1"},
                *("previous_response_id", 400, "previous_response_not_found"),
            ),
            ({"max_output_tokens": 0}, "max_output_tokens", 400, None),
            ({"tools": [{"type": "function"}]}, "tools", 400, None),
            ({"tools": {}}, "tools", 400, None),
            ({"text": {"format": {"type": "xml"}}}, "text", 400, None),
            ({"instructions": 5}, "instructions", 400, None),
        ],
    )
    def test_what_is_wrong_is_named(self, more, param, status, code):
        with pytest.raises(puter.BadRequestError) as caught:
            responses_request(**more)
        assert puter.error_status(caught.value) == status
        body = puter.responses_error(caught.value, status, "req_1")["error"]
        assert (body["param"], body["code"]) == (param, code or f"invalid_{param}")

    @pytest.mark.parametrize("store", [None, True, False])
    def test_what_is_remembered(self, store):
        memory = puter.ResponseMemory()
        request = responses_request(memory, input="one", store=store)
        reply = reply_of("two", reasoning="hm")
        body = puter.responses_body(request, reply, puter.Ending("stop", OUR_USAGE))
        thought, message = body["output"]
        referred = [*HI, *({"type": "item_reference", "id": i["id"]} for i in (thought, message))]
        if store is False:
            with pytest.raises(puter.BadRequestError, match="not found"):
                responses_request(memory, input=referred)
            with pytest.raises(puter.BadRequestError, match="not found"):
                responses_request(memory, previous_response_id=body["id"])
            return
        assert responses_request(memory, input=referred).messages == [*HI, assistant("two")]
        again = responses_request(memory, previous_response_id=body["id"], input="three")
        assert again.messages == [user("one"), assistant("two"), user("three")]

    def test_the_order_of_events(self):
        chunks = [reasoning_chunk("a"), reasoning_chunk("b"), text_chunk("c"), text_chunk("d")]
        events = [*chunks, None, call_chunk("f", {}), text_chunk("e")]
        ending = puter.Ending("stop", OUR_USAGE)
        frames = parsed_frames("responses", agent_answer("responses", *events, ending))
        text = ["output_item.added", "content_part.added", "output_text.delta"]
        done = ["output_text.done", "content_part.done", "output_item.done"]
        summary = "reasoning_summary_part", "reasoning_summary_text"
        assert types_of(frames) == [
            *("created", "in_progress", "output_item.added", f"{summary[0]}.added"),
            *[f"{summary[1]}.delta"] * 2,
            *(f"{summary[1]}.done", f"{summary[0]}.done", "output_item.done"),
            *(*text, "output_text.delta", "in_progress", *done),
            *("output_item.added", "function_call_arguments.delta"),
            *("function_call_arguments.done", "output_item.done", *text, *done, "completed"),
        ]
        assert len({f["response"]["id"] for f in frames if "response" in f}) == 1
        assert frames[-1]["response"]["usage"] == {
            "input_tokens": 11,
            "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 0},
            "output_tokens": 22,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 33,
        }

    @pytest.mark.parametrize(
        ("event", "last", "status", "why"),
        [
            (puter.Ending("stop", OUR_USAGE), "completed", "completed", None),
            (puter.Ending("tool_calls", OUR_USAGE), "completed", "completed", None),
            (puter.Ending("length", OUR_USAGE), "incomplete", "incomplete", "max_output_tokens"),
            (puter.Ending("content_filter", OUR_USAGE), "failed", "incomplete", "invalid_prompt"),
            (puter.StreamError("x"), "failed", "incomplete", "server_error"),
            (puter.RateLimitError("x"), "failed", "incomplete", "rate_limit_exceeded"),
            (puter.CreditError("x"), "failed", "incomplete", "insufficient_quota"),
            (puter.BadRequestError("x"), "failed", "incomplete", "invalid_prompt"),
            (
                puter.error_from(400, {"message": "maximum context length is 9"}),
                *("failed", "incomplete", "context_length_exceeded"),
            ),
        ],
    )
    def test_endings(self, event, last, status, why):
        frames = agent_answer("responses", text_chunk("so"), event, stream=True)
        response = frames[-1]["response"]
        assert types_of(frames)[-1] == response["status"] == last
        assert [(o["status"], o["content"][0]["text"]) for o in response["output"]] == [
            (status, "so")
        ]
        reason = (response["incomplete_details"] or {}).get("reason")
        assert why == (reason or (response["error"] or {}).get("code"))
        if why != "insufficient_quota" and why != "context_length_exceeded":  # not in the SDK yet
            Response.model_validate(response)

    def test_a_whole_answer(self):
        request = responses_request(metadata={"a": "b"}, temperature=0.5)
        reply = reply_of("so", reasoning="hm", tool_calls=(puter.ToolCall("call_1", "f", {}),))
        body = puter.responses_body(request, reply, puter.Ending("tool_calls", puter.Usage()))
        parsed = Response.model_validate(json.loads(json.dumps(body)))
        assert (parsed.output_text, parsed.status, parsed.model) == ("so", "completed", "m")
        assert (parsed.metadata, parsed.temperature) == ({"a": "b"}, 0.5)
        assert body["usage"]["total_tokens"] == 0
        filtered = puter.responses_body(request, reply, puter.Ending("content_filter", OUR_USAGE))
        assert filtered["incomplete_details"] == {"reason": "content_filter"}

    @pytest.mark.parametrize("dialect", ["responses", "messages"])
    @given(chunks=ANSWER_CHUNKS)
    @settings(max_examples=40, deadline=None)
    def test_any_stream_is_the_whole_answer(self, dialect, chunks):
        row = puter.DIALECTS[f"/v1/{dialect}"]
        request = responses_request() if dialect == "responses" else messages_request()
        texts = [
            "".join(c.text for c in chunks if c.type == kind) for kind in ("text", "reasoning")
        ]
        calls = tuple(c.tool_call for c in chunks if c.tool_call)
        reply = reply_of(texts[0], reasoning=texts[1], tool_calls=calls, usage=OUR_USAGE)
        batches = [batch for chunk in chunks for batch in (None, [chunk])]
        events = puter.answer_events(request, [*batches, reply])
        frames = [json.loads(json.dumps(f)) for f in row.frames(request, lambda: "m", events)]
        final = essence(dialect, final_of(dialect, parsed_frames(dialect, frames)))
        whole = row.body(request, *puter.whole_answer(request, reply))
        (Response if dialect == "responses" else ClaudeMessage).model_validate(whole)
        in_one = essence(dialect, whole)
        assert [e for e in final if len(e) == 2] == [e for e in in_one if len(e) == 2]
        assert "".join(e[0] for e in final if len(e) == 1) == "".join(c.text for c in chunks)
        assert "".join(e[0] for e in in_one if len(e) == 1) == texts[1] + texts[0]

    @pytest.mark.parametrize("dialect", ["responses", "messages"])
    @given(body=st.dictionaries(AGENT_KEYS, AGENT_JSON, max_size=6))
    @settings(max_examples=150, deadline=None)
    def test_any_body_is_understood_or_refused(self, dialect, body):
        asked = {"model": "m", "input": "hi", "messages": HI, "max_tokens": 9, **body}
        row = puter.DIALECTS[f"/v1/{dialect}"]
        with suppress(puter.BadRequestError):
            request = row.parse(asked, MEMORY)
            assert row.body(request, reply_of(), puter.Ending("stop", OUR_USAGE))


class TestMessagesDialect:
    """The dialect of Claude Code, without sockets."""

    @pytest.mark.parametrize(
        ("messages", "want"),
        [
            (HI, HI),
            ([{"role": "user", "content": [text_part("hi")]}], HI),
            ([*HI, {"role": "system", "content": "s"}], [*HI, {"role": "system", "content": "s"}]),
            (
                [said(image_block(data="AA=="), text_part("hi"))],
                [said(image_of("data:image/png;base64,AA=="), text_part("hi"))],
            ),
            (
                [said({"type": "image", "source": {"type": "url", "url": "https://x/y.png"}})] * 2,
                [user([image_of("https://x/y.png")])] * 2,
            ),
            (
                [
                    said(
                        typed("document", title="a.pdf", source=PDF_SOURCE),
                        {"type": "document", "source": {"type": "text", "data": "plain"}},
                        {"type": "document", "source": {"type": "content", "content": "more"}},
                    )
                ],
                [
                    said(
                        {"type": "file", "file": {"filename": "a.pdf", "file_data": A_PDF_URL}},
                        text_part("plain"),
                        text_part("more"),
                    )
                ],
            ),
            (
                [
                    assistant(
                        [
                            {"type": "thinking", "thinking": "hm", "signature": "s"},
                            text_part("so"),
                            {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
                            {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
                        ]
                    ),
                    said(
                        text_part("then"),
                        typed(
                            "tool_result",
                            tool_use_id="t1",
                            content=[text_part("see"), image_block(data="AA==")],
                        ),
                        {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                    ),
                ],
                [
                    assistant(
                        [{**SIGNED, "thinking": "hm"}, text_part("so")],
                        *(called("t1", "f", '{"a": 1}'), called("t2", "g")),
                    ),
                    result("t1", [text_part("see"), image_of("data:image/png;base64,AA==")]),
                    result("t2", None, is_error=True),
                    user("then"),
                ],
            ),
            (
                [assistant([{"type": "redacted_thinking", "data": "x"}]), *HI],
                [assistant([{"type": "redacted_thinking", "data": "x"}]), *HI],
            ),
            # Thinking whose signature is ours, or that has none, is of no use to anybody.
            (
                [assistant([{**SIGNED, "signature": "unsigned_1"}, text_part("a")]), *HI],
                [assistant("a"), *HI],
            ),
            (
                [assistant([{"type": "thinking", "thinking": "T"}, text_part("a")]), *HI],
                [assistant("a"), *HI],
            ),
            (
                [
                    said(
                        typed("search_result", source="s", title="t", content=[text_part("c")]),
                        typed("tool_reference", tool_name="f"),
                    )
                ],
                [user("t (s)\n\nc\n\nThe tool f can be called.")],
            ),
        ],
    )
    def test_messages(self, messages, want):
        assert messages_request(*messages).messages == want

    @pytest.mark.parametrize(
        ("system", "want"),
        [
            ("Be brief", "Be brief"),
            ([text_part("a"), text_part("b")], "a\n\nb"),
            ([text_part("x-anthropic-billing-header: v=1"), text_part("b")], "b"),
            ([], None),
            (None, None),
        ],
    )
    def test_system(self, system, want):
        want = [{"role": "system", "content": want}] if want else []
        assert messages_request(system=system).messages == [*want, *HI]

    @pytest.mark.parametrize(
        ("more", "args"),
        [
            ({"metadata": {}, "top_k": 5, "context_management": {}, "service_tier": "auto"}, {}),
            ({"temperature": 1, "top_p": 0.5}, {"temperature": 1, "top_p": 0.5}),
            ({"output_config": {"effort": "max"}}, {"reasoning_effort": "high"}),
            ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"reasoning_effort": "low"}),
            ({"thinking": {"type": "adaptive"}}, {}),
            (
                {"output_config": {"format": {"type": "json_schema", "schema": {"type": "array"}}}},
                {
                    "response_format": typed(
                        "json_schema",
                        json_schema={"name": "answer", "schema": {"type": "array"}, "strict": True},
                    )
                },
            ),
            (offering(type="any"), {"tool_choice": "required"}),
            (
                offering(SEARCH, type="auto", disable_parallel_tool_use=True),
                {"tool_choice": "auto", "parallel_tool_calls": False},
            ),
            (
                offering(type="tool", name="f"),
                {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            ),
            (offering(type="none"), {}),
        ],
    )
    def test_arguments(self, more, args):
        asked = messages_request(**more, stream=True, stop_sequences=["END"])
        assert asked.args == {"max_tokens": 64, **args}
        assert (asked.streaming, asked.stop, asked.answer) == (True, ("END",), "")
        offered = [tool["function"]["name"] for tool in asked.tools]
        chosen = more.get("tool_choice", {}).get("type")
        assert offered == (["f"] if "tools" in more and chosen != "none" else [])

    @pytest.mark.parametrize(
        ("more", "param"),
        [
            *(({"max_tokens": wrong}, "max_tokens") for wrong in (None, 0)),
            ({"model": None}, "model"),
            *(({"messages": wrong}, "messages") for wrong in (None, [], [5])),
            ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
            ({"messages": [said({"type": "nonsense"})]}, "messages"),
            ({"messages": [said(image_block(type="file", file_id="f"))]}, "messages"),
            ({"messages": [said({"type": "document", "source": {"type": "url"}})]}, "messages"),
            ({"stop_sequences": [5]}, "stop"),
            *(({"tools": wrong}, "tools") for wrong in ([{"name": 5}], 5)),
            *(
                ({"tools": [SEARCH], "tool_choice": wrong}, "tool_choice")
                for wrong in ("auto", typed("tool", name="web_search"))
            ),
        ],
    )
    def test_what_is_wrong_is_named(self, more, param):
        with pytest.raises(puter.BadRequestError) as caught:
            messages_request(**more)
        assert caught.value.param == param
        body = puter.messages_error(caught.value, 400, "req_1")
        assert (body["type"], body["request_id"]) == ("error", "req_1")
        assert body["error"]["type"] == "invalid_request_error"

    def test_the_order_of_events(self):
        chunks = [reasoning_chunk("a"), reasoning_chunk("b"), text_chunk("c")]
        broken = puter.Chunk("tool_call", tool_call=puter.ToolCall("c", "f", {}, invalid="x"))
        events = [*chunks, None, call_chunk("f", {"a": 1}), broken]
        ending = puter.Ending("stop", OUR_USAGE)
        frames = parsed_frames("messages", agent_answer("messages", *events, ending))
        block = ["content_block_start", "content_block_delta"]
        assert types_of(frames) == [
            *("message_start", *block, "content_block_delta", "content_block_delta"),
            *("content_block_stop", *block, "ping", "content_block_stop"),
            *(*block, "content_block_stop") * 2,
            *("message_delta", "message_stop"),
        ]
        assert [f["index"] for f in frames if f["type"] == "content_block_stop"] == [0, 1, 2, 3]
        assert [f["delta"].get("partial_json") for f in frames if "delta" in f][-3:-1] == [
            '{"a": 1}',
            '{"unreadable_arguments": "x"}',
        ]
        assert frames[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
        assert frames[-2]["usage"] == {
            "input_tokens": 6,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 5,
            "output_tokens": 22,
        }

    @pytest.mark.parametrize(
        ("ending", "reason", "sequence"),
        [
            (puter.Ending("stop", OUR_USAGE), "end_turn", None),
            (puter.Ending("length", OUR_USAGE), "max_tokens", None),
            (puter.Ending("content_filter", OUR_USAGE), "refusal", None),
            (puter.Ending("stop", OUR_USAGE, "END"), "stop_sequence", "END"),
        ],
    )
    def test_endings(self, ending, reason, sequence):
        body = puter.messages_body(messages_request(), reply_of("so", reasoning="hm"), ending)
        parsed = ClaudeMessage.model_validate(json.loads(json.dumps(body)))
        assert [block.type for block in parsed.content] == ["thinking", "text"]
        assert (parsed.stop_reason, parsed.stop_sequence) == (reason, sequence)

    @pytest.mark.parametrize(
        ("error", "status", "kind", "words"),
        [
            (puter.AuthError("x"), 401, "authentication_error", "x"),
            (puter.CreditError("x"), 402, "billing_error", "x"),
            (puter.AccessError("x"), 403, "permission_error", "x"),
            (puter.ModelNotFoundError("x"), 404, "not_found_error", "x"),
            (puter.BadRequestError("x", status=413), 413, "request_too_large", "x"),
            (puter.RateLimitError("x"), 429, "rate_limit_error", "x"),
            (puter.RequestTimeoutError("x"), 504, "timeout_error", "x"),
            (puter.ServerError("x", status=503, code="overloaded"), 503, "overloaded_error", "x"),
            (puter.NetworkError("x"), 502, "api_error", "x"),
            (
                puter.error_from(400, {"message": "too many tokens"}),
                *(400, "invalid_request_error", "prompt is too long: too many"),
            ),
            (
                puter.ContextLengthError("x", tokens=70_000, limit=16_384),
                *(400, "invalid_request_error", "prompt is too long: 70000 tokens > 16384 maximum"),
            ),
        ],
    )
    def test_errors(self, error, status, kind, words):
        assert puter.error_status(error) == status
        body = puter.messages_error(error, status, "req_1")
        assert body["error"]["type"] == kind and body["error"]["message"].startswith(words)
        frames = agent_answer("messages", text_chunk("so"), error)
        assert types_of(frames)[-2:] == ["content_block_delta", "error"]
        assert frames[-1]["error"]["type"] == kind

    @pytest.mark.parametrize(
        ("more", "low", "high"),
        [
            ({}, 5, 20),
            ({"messages": [user("x" * 4_000)]}, 1_000, 1_020),
            ({"system": "x" * 4_000, "tools": [claude_tool("f")]}, 1_000, 1_060),
            ({"messages": [said(image_block(data="A" * 40_000))]}, 1_500, 1_550),
        ],
    )
    def test_count_tokens(self, more, low, high):
        body = {"model": "m", "messages": HI, **more}
        assert low <= puter.count_tokens(body)["input_tokens"] <= high
        with pytest.raises(puter.BadRequestError, match="messages"):
            puter.count_tokens({"model": "m"})


def real_catalogue() -> list[puter.Model]:
    """The models of a real server."""
    return puter.models_from(recorded("catalogue.json"))


def served_model(name: str, models: Sequence[puter.Model]) -> str:
    """The name that is asked for at last."""
    return puter.with_served_model(messages_request(), name, puter.ModelList(models)).model


class TestServedModel:
    """What a name means that an agent asks for."""

    @pytest.mark.parametrize(
        ("name", "want"),
        [
            # The catalogue's own names.
            ("claude-opus-4-8", "claude-opus-4-8"),
            ("claude-opus-4-5", "claude-opus-4-5"),
            ("puter/claude-opus-4-5", "claude-opus-4-5"),
            ("CLAUDE-Opus-4-5", "claude-opus-4-5-20251101"),
            ("openai/gpt-5.1", "openai/gpt-5.1"),
            ("claude-sonnet-5[1m]", "claude-sonnet-5"),
            ("claude-haiku-4-5-20251001", "claude-haiku-4-5-20251001"),
            # Never a guess.
            ("claude-haiku-9", None),
            ("claude-haiku-5-20270101", None),
            ("gpt-6-sol", None),
            ("claude", None),
            ("gpt-", None),
        ],
    )
    def test_names(self, name, want):
        models = real_catalogue()
        if want is None:
            with pytest.raises(puter.ModelNotFoundError) as caught:
                served_model(name, models)
            assert caught.value.near
        else:
            assert served_model(name, models) == want
            assert served_model(name, models[::-1]) == want

    def test_no_catalogue_and_near_names(self):
        assert served_model("puter/claude-x[1m]", []) == "claude-x"
        with pytest.raises(puter.ModelNotFoundError) as caught:
            served_model("claude-haiku-4-5", [model("gpt-5"), model("claud-haiku")])
        assert caught.value.near == ("claud-haiku",)

    @pytest.mark.parametrize(("asked", "sent"), [(None, None), (9, 9), (64_000, 100)])
    def test_max_tokens_within_the_limit(self, asked, sent):
        request = messages_request()
        request = request._replace(args={"max_tokens": asked} if asked else {})
        models = puter.ModelList([model("m", max_tokens=100), model("n")])
        assert puter.with_served_model(request, "M", models).args.get("max_tokens") == sent
        assert puter.with_served_model(request, "n", models).args == request.args
        assert puter.with_served_model(request, "x", puter.ModelList()).args == request.args


def agent_requests() -> list[Any]:
    """What real agents and SDKs sent to the two dialects, as test parameters."""
    found = dict(recordings("responses-and-messages.json")).get("recordings", [])
    for one in found:
        if "…" in (one["request"]["body"] or {}):  # "as in: plain text"
            one["request"]["body"] = found[0]["request"]["body"]
    return [pytest.param(one, id=f"{n}-{one['client']}") for n, one in enumerate(found)]


def as_recorded(value: Any) -> Any:
    """A body with its cut parts mended: repeated items are left out, PDFs are whole."""
    if isinstance(value, dict):
        return {k: as_recorded(v) for k, v in value.items() if not is_reference(v)}
    if isinstance(value, list):
        return [as_recorded(v) for v in value if not is_reference(v)]
    if isinstance(value, str) and value.endswith("…") and "JVBERi" in value:
        return value.partition("JVBERi")[0] + DOCUMENT
    return value


def is_reference(value: Any) -> bool:
    """Whether it only names a part of another recording."""
    return isinstance(value, str) and value.startswith("<the same ")


def status_recorded(recording: JSONObject) -> int:
    """The status that our gateway must give for a recording."""
    model_asked = (recording["request"]["body"] or {}).get("model", "")
    if "err429" in model_asked or "not-there" in model_asked or recording["status"] == 400:
        return int(recording["status"])
    if recording["request"]["method"] == "POST" and "resp_x" not in recording["request"]["path"]:
        return 404 if "item_reference" in recording["scenario"] else 200
    return 405 if recording["request"]["path"] == "/v1/responses" else int(recording["status"])


def two_calls_then_text(handler: FakeHandler, args: JSONObject) -> Answer:
    """A tool loop of three rounds, from a model that gives every call the same id."""
    results = [m["content"] for m in args["messages"] if m.get("role") == "tool"]
    if len(results) < 2:
        call = tool_call("call_1", "get_weather", json.dumps({"city": f"c{len(results)}"}))
        return Turn("Let me see.", ("hm",), calls=(call,), finish="tool_calls", form="claude")
    return Turn(f"The results: {results}")


def response_loop(server: puter.OpenAIServer, how: str) -> tuple[str, list[str]]:
    """(the last text, the ids of calls) of a loop with the SDK for responses."""
    tools: Any = [flat_tool("get_weather", parameters={"type": "object"})]
    history: list[Any] = [user("go")]
    told: list[Any] = history
    ids, previous = [], openai.omit
    with sdk(server) as client:
        for _ in range(3):
            asked: Any = {"model": lab("text"), "tools": tools, "input": told}
            if how == "streamed":
                with client.responses.stream(**asked) as stream:
                    answer: Any = stream.get_final_response()
            else:
                answer = client.responses.create(**asked, previous_response_id=previous)
            items = [item.to_dict() for item in answer.output]
            if how == "references":
                items = [
                    {"type": "item_reference", "id": item["id"]}
                    if item["type"] != "function_call"
                    else item
                    for item in items
                ]
            calls = [item for item in answer.output if item.type == "function_call"]
            results = [
                {**A_RESULT, "call_id": c.call_id, "output": json.loads(c.arguments)["city"]}
                for c in calls
            ]
            ids += [call.call_id for call in calls]
            history += [*items, *results]
            told = results if how == "previous" else history
            previous = answer.id if how == "previous" else openai.omit
    return answer.output_text, ids


def message_loop(server: puter.OpenAIServer, how: str) -> tuple[str, list[str]]:
    """The same with the SDK for messages."""
    tools: Any = [claude_tool("get_weather")]
    history: list[Any] = [user("go")]
    ids = []
    with claude(server) as client:
        for _ in range(3):
            asked: Any = {"model": lab("text"), "max_tokens": 99, "messages": history}
            if how == "streamed":
                with client.messages.stream(**asked, tools=tools) as stream:
                    answer = stream.get_final_message()
            else:
                answer = client.messages.create(**asked, tools=tools)
            calls: Any = [block for block in answer.content if block.type == "tool_use"]
            assert answer.stop_reason == ("tool_use" if calls else "end_turn")
            ids += [call.id for call in calls]
            history.append({"role": "assistant", "content": answer.content})
            results = [
                {"type": "tool_result", "tool_use_id": c.id, "content": c.input["city"]}
                for c in calls
            ]
            history.append({"role": "user", "content": results})
    text: Any = answer.content[-1]
    return text.text, ids


def claude(server: puter.OpenAIServer, key: str = "any") -> anthropic.Anthropic:
    """Anthropic's SDK, which does not try again."""
    base = server.url.removesuffix("/v1")
    web = anthropic.DefaultHttpxClient(verify=False)
    return anthropic.Anthropic(base_url=base, api_key=key, http_client=web, **AT_ONCE)


def event_data(reply: requests.Response) -> list[JSONObject]:
    """The data of named events."""
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    found = re.findall(r"event: (.+)\ndata: (.+)\n\n", reply.content.decode())
    frames = [json.loads(data) for _, data in found]
    assert [name for name, _ in found] == [frame["type"] for frame in frames]
    return frames


class TestDialectsOfAgents:
    """Both dialects over real sockets, with the real SDKs."""

    @pytest.mark.parametrize("recording", agent_requests())
    def test_what_real_agents_send(self, server, recording):
        sent = recording["request"]
        body = as_recorded(sent["body"])
        # what they ask by themselves, and our catalogue has not
        names = ("openrouter:lab/brain", "stub-model", "gpt-5", "gpt-5.5", "gpt-6-sol")
        for name in names if body else ():
            body = json.loads(json.dumps(body).replace(f'"{name}"', f'"{lab("text")}"'))
        url = server.url.removesuffix("/v1") + sent["path"]
        headers = {} if isinstance(sent["headers"], str) else sent["headers"]
        headers = {k: v for k, v in headers.items() if k.lower() in ("anthropic-version",)}
        reply = requests.request(sent["method"], url, json=body, headers=headers, timeout=20)
        assert reply.status_code == status_recorded(recording), reply.text
        dialect = "messages" if "/messages" in sent["path"] else "responses"
        if not reply.ok:
            shown = reply.json() if dialect == "messages" else {"error": error_of(reply)}
            assert shown["error"]["message"]
        elif sent["path"].partition("?")[0] not in ("/v1/responses", "/v1/messages"):
            assert sent["method"] == "HEAD" or reply.json().get("input_tokens", 1) > 0
        elif body.get("stream"):
            frames = parsed_frames(dialect, event_data(reply))
            broken = body["model"] in (lab("midfail"), lab("cut"))
            last = "error" if dialect == "messages" else "response.failed"
            assert (frames[-1]["type"] == last) is broken
            if not broken:
                assert final_of(dialect, frames)["usage"]
        elif dialect == "messages":
            assert ClaudeMessage.model_validate(reply.json()).content
        else:
            assert Response.model_validate(reply.json()).output_text

    @pytest.mark.parametrize("how", ["whole", "streamed", "references", "previous"])
    def test_a_tool_loop_of_responses(self, server, fake, how):
        fake.script[lab("text")] = two_calls_then_text
        text, ids = response_loop(server, how)
        assert text == "The results: ['c0', 'c1']" and len(set(ids)) == 2
        said_before = [m for m in sent_to(fake)["messages"] if m["role"] == "assistant"]
        assert json.dumps(said_before).count("Let me see.") == 2

    @pytest.mark.parametrize("how", ["whole", "streamed"])
    def test_a_tool_loop_of_messages(self, server, fake, how):
        fake.script[lab("text")] = two_calls_then_text
        text, ids = message_loop(server, how)
        assert text == "The results: ['c0', 'c1']" and len(set(ids)) == 2
        assert all(one.startswith("toolu_") for one in ids)

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_search_alone_is_answered_honestly(self, server, fake, stream):
        body: Any = {"model": lab("text"), "max_tokens": 9, "messages": HI, "tools": [SEARCH]}
        with claude(server) as client:
            if stream:
                with client.messages.stream(**body) as events:
                    message = events.get_final_message()
            else:
                message = client.messages.create(**body)
        assert "not available here" in message.content[0].text
        assert not fake.chat_calls()

    def test_a_providers_note_on_a_call_comes_back(self, server, fake):
        asked: Any = {"model": lab("extra"), "max_tokens": 9, "tools": [claude_tool("get_weather")]}
        with claude(server) as client:
            answer = client.messages.create(**asked, messages=HI)
            call: Any = answer.content[-1]
            done = {"type": "tool_result", "tool_use_id": call.id, "content": "ok"}
            again: Any = [*HI, {"role": "assistant", "content": [call]}, said(done)]
            client.messages.create(**asked, messages=again)
        assert json.dumps(SIGNATURE) in json.dumps(sent_to(fake)["messages"])

    @pytest.mark.parametrize(
        ("method", "path", "status", "is_claudes"),
        [
            ("GET", "/v1/responses", 405, False),
            ("GET", "/v1/responses/resp_x", 404, False),
            ("DELETE", "/v1/responses/resp_x", 404, False),
            ("POST", "/v1/responses/resp_x/cancel", 404, False),
            ("POST", "/v1/responses/compact", 404, False),
            ("POST", "/v1/messages/batches", 404, True),
            ("POST", "/v1/files", 404, True),
            ("GET", "/v1/models/nope", 404, True),
        ],
    )
    def test_other_routes(self, server, method, path, status, is_claudes):
        headers = {"anthropic-version": "2023-06-01"} if path != "/v1/responses" else {}
        reply = get_from(server, path, method, **headers)
        assert reply.status_code == status
        assert (reply.json().get("type") == "error") is is_claudes
        if is_claudes:
            assert reply.json()["request_id"] == reply.headers["request-id"]

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("no-such-model", "NotFoundError"),
            (lab("err400"), "BadRequestError"),
            (lab("err429"), "RateLimitError"),
            (lab("denied"), "PermissionDeniedError"),
        ],
    )
    def test_errors_before_the_stream(self, server, *, name, kind, stream):
        with claude(server) as client, pytest.raises(getattr(anthropic, kind)) as refused:
            client.messages.create(model=name, max_tokens=9, messages=HI, stream=stream)  # type: ignore[arg-type]
        assert refused.value.response.headers["x-should-retry"] == "false"
        with sdk(server) as client, pytest.raises(getattr(openai, kind)):
            client.responses.create(model=name, input="hi", stream=stream)

    def test_a_stream_that_breaks(self, server):
        text = ""
        with (
            claude(server) as client,
            client.messages.stream(model=lab("midfail"), max_tokens=9, messages=HI) as stream,  # type: ignore[arg-type]
            pytest.raises(anthropic.APIStatusError, match="scripted"),
        ):
            for piece in stream.text_stream:
                text += piece
        assert text == "The quick brown fox — "
        with claude(server) as client, pytest.raises(anthropic.APIStatusError):
            client.messages.create(model=lab("err500"), max_tokens=9, messages=HI)  # type: ignore[arg-type]

    def test_a_slow_answer_shows_signs_of_life(self, server, monkeypatch):
        monkeypatch.setattr(puter, "KEEP_ALIVE_S", 0.05)
        for dialect, sign in (("responses", "response.in_progress"), ("messages", "ping")):
            body = {"model": lab("hang"), "input": "hi", "messages": HI, "max_tokens": 9}
            url = f"{server.url}/{dialect}"
            with requests.post(url, json={**body, "stream": True}, stream=True) as reply:
                lines = (line.decode() for line in reply.iter_lines())
                signs = itertools.islice((x for x in lines if x == f"event: {sign}"), 3)
                assert len(list(signs)) == 3


# =============================================================================
# Openai server: sockets
# =============================================================================
def client_requests() -> list[Any]:
    """What real clients sent, as test parameters."""
    found = recordings("client-requests.json")
    return [pytest.param(one, id=f"{n}-{one['client']}") for n, one in enumerate(found)]


def two_tools(handler: FakeHandler, args: JSONObject) -> Answer:
    """Two calls in one turn, which arrive both from such a provider."""
    calls = (
        tool_call("call_1", "get_weather", '{"city": "Paris"}'),
        tool_call("call_2", "get_time", '{"tz": "CET"}'),
    )
    return Turn(calls=calls, finish="tool_calls", form="claude")


KNOWN_KEYS = (
    *("model", "messages", "tools", "tool_choice", "stop", "n", "max_tokens"),
    *("max_completion_tokens", "response_format", "stream", "stream_options"),
    *("temperature", "parallel_tool_calls", "reasoning_effort", "functions"),
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*KNOWN_KEYS, "role", "content", "type", "function", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
ANY_BODY = ANY_JSON | st.dictionaries(st.sampled_from(KNOWN_KEYS), ANY_JSON).map(
    lambda more: {"model": lab("text"), "messages": HI, **more}
)


class TestOpenAIServer:
    """The server on a real socket, asked by plain HTTP and by the real SDK."""

    # What is there.

    def test_health(self, server):
        for path in ("/", "/health", "/health?x=1"):
            reply = get_from(server, path)
            assert (reply.status_code, reply.json()["status"]) == (200, "ok")
            assert reply.json().keys() == {"status", "version"}  # nothing of what is behind it
            head = get_from(server, path, "HEAD")
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["Content-Length"] == str(len(reply.content))

    def test_models(self, server, fake):
        listed = get_from(server, "/v1/models").json()
        assert listed["object"] == "list"
        assert [m["id"] for m in listed["data"]] == [m["id"] for m in fake.catalogue]
        assert listed["has_more"] is False and listed["last_id"] == listed["data"][-1]["id"]
        for model in listed["data"]:
            Model.model_validate(model, strict=True)
            assert (model["type"], model["created_at"][10:]) == ("model", "T00:00:00Z")
        assert get_from(server, "/v1/models", "HEAD").status_code == 200

    @pytest.mark.parametrize(
        ("asked", "found"),
        [
            ("openrouter:lab/text", "openrouter:lab/text"),
            ("openrouter%3Alab%2Ftext", "openrouter:lab/text"),
            ("openrouter:qwen/qwen3-coder:free", "openrouter:qwen/qwen3-coder:free"),
            ("claude-opus-4-5", "claude-opus-4-5-20251101"),
            ("anthropic/claude-opus-4-5", "claude-opus-4-5-20251101"),
            ("CLAUDE-OPUS-4.5", "claude-opus-4-5-20251101"),
            ("puter/gemini-2.5-flash", "gemini-2.5-flash"),
            ("gemini-2.5-flash?x=1", "gemini-2.5-flash"),
        ],
    )
    def test_one_model(self, server, asked, found):
        reply = get_from(server, f"/v1/models/{asked}")
        assert (reply.status_code, reply.json()["id"]) == (200, found)

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            *(("GET", path, 404) for path in ("/nowhere", "/v1", "/%ff%00")),
            *(("POST", path, 404) for path in ("/v1/embeddings", "/chat/completions")),
            ("OPTIONS", "*", 404),
            ("GET", "/v1/chat/completions", 405),
            ("DELETE", "/v1/responses", 405),
            ("POST", "/v1/models", 405),
            ("DELETE", "/v1/models/lab/text", 405),
            ("PUT", "/health", 405),
            ("BREW", "/", 501),
            ("OPTIONS", "/v1/models", 405),
            ("HEAD", "/health", 200),
            ("HEAD", "/v1/models/x", 404),
        ],
    )
    def test_unknown(self, server, method, path, status):
        request = head_of(method, path, Connection="close")
        head, _, body = said_to(server, request).partition(b"\r\n\r\n")
        assert status_of(head) == status and (body == b"") is (method == "HEAD")
        if body:
            assert json.loads(body)["error"]["type"] == "invalid_request_error"

    # Requests as clients send them.

    @pytest.mark.parametrize("request_sent", client_requests())
    def test_what_real_clients_send(self, server, fake, request_sent):
        model = "gemini-2.5-flash"
        sent = json.dumps(request_sent["body"]).replace("stub-model", model)
        body = json.loads(sent.replace("err-429", lab("err429")))
        headers = {k: v for k, v in request_sent["headers"].items() if k != "connection"}
        url = server.url.removesuffix("/v1") + request_sent["path"]
        reply = requests.request(
            request_sent["method"], url, headers=headers, json=body, timeout=10
        )
        if body is None:
            assert reply.json()["data"]
        elif body["model"] != model or not body["messages"]:
            status = {"no-such-model-xyz": 404, lab("err429"): 429}
            assert reply.status_code == status.get(body["model"], 400)
            assert error_of(reply)["message"]
        elif body.get("stream"):
            frames = frames_of(reply)
            assert joined(frames) == SENTENCE
            wants_usage = (body.get("stream_options") or {}).get("include_usage")
            assert ("usage" in frames[-1]) is bool(wants_usage)
            assert [ChatCompletionChunk.model_validate(f, strict=True) for f in frames]
        else:
            whole = ChatCompletion.model_validate(reply.json(), strict=True)
            assert whole.choices[0].message.content == SENTENCE
        if reply.ok and body:
            wire = sent_to(fake)
            assert wire["model"] == model
            assert len(wire.get("tools", [])) <= len(body.get("tools", []))
            limit = body.get("max_completion_tokens") or body.get("max_tokens")
            assert wire.get("max_tokens") == limit

    @pytest.mark.parametrize("url", [PNG_URL, "https://example.com/a.png"])
    def test_images(self, server, fake, url):
        image = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
        content = [{"type": "text", "text": "What is it?"}, image]
        messages = [{"role": "user", "content": content}]
        text, _ = answer_of(server, body_for("vision", messages=messages))
        assert text == 'parts: ["text", "image_url"]'
        assert sent_to(fake)["messages"][0]["content"][1]["image_url"]["url"] == url

    def test_a_default_model(self, serve, make, fake):
        nameless = {"messages": HI}
        reply = post_to(serve(make(default_model=lab("echo"))), nameless)
        assert reply.json()["model"] == lab("echo")
        error = error_of(post_to(serve(make()), nameless))
        assert error["param"] == "model" and "default_model" in error["message"]

    # Replies.

    @pytest.mark.parametrize("stream", [False, True])
    def test_who_answered(self, serve, make, fake, stream):
        server = serve(make("alexandra", max_retries=0))
        body = body_for("err429", stream=stream)
        reply = post_to(server, body)
        model = frames_of(reply)[0]["model"] if stream else reply.json()["model"]
        assert model == reply.headers["x-puter-model"] == FREE[0]
        assert reply.headers["x-puter-attempts"] == "2"
        shown = reply.headers["x-puter-account"].rstrip(".")
        assert "alexandra".startswith(shown) and 1 <= len(shown) <= 3

    def test_the_same_name_in_both(self, server):
        server.client.models()  # an id is known once the list is
        whole = post_to(server, body_for(model="lab/text")).json()["model"]
        frames = frames_of(post_to(server, body_for(model="lab/text", stream=True)))
        assert {frame["model"] for frame in frames} == {whole}

    @pytest.mark.parametrize("account", ["é", "ab", "a\r\nX-Evil: 1", "名前です"])
    def test_names_that_no_header_takes(self, account):
        reply = reply_of(account=account, model="m\r\nX: 1")
        headers = puter.answer_headers(reply)
        assert all(re.fullmatch("[ -~]+", value) for value in headers.values())
        assert account not in headers["x-puter-account"]

    def test_frames_come_as_they_are_made(self, server, fake):
        more = threading.Event()

        def speak(handler: FakeHandler, args: JSONObject) -> Answer:
            handler.begin_stream()
            handler.chunk(b'{"type":"text","text":"first"}\n')
            more.wait(5)
            handler.chunk(b'{"type":"text","text":"second"}\n')
            handler.chunk(b'{"type":"usage","usage":{}}\n')
            handler.end_stream()
            return None

        fake.script[lab("text")] = speak
        with connected(server) as sock:
            sock.sendall(chat_request(body_for(stream=True)))
            assert b"second" not in until_seen(sock, b"first")
            more.set()
            assert b"second" in until_seen(sock, b"[DONE]")

    # Errors.

    def test_puter_cannot_be_reached(self, serve, make):
        dead = f"http://127.0.0.1:{free_port()}"
        server = serve(make(api_base_url=dead, max_retries=0))
        for reply in (post_to(server, body_for()), get_from(server, "/v1/models")):
            assert reply.status_code == 502
            assert "refused" in error_of(reply)["message"]
        assert get_from(server, "/health").ok

    def test_nobody_signed_in(self, serve, fake, home):
        with puter.Puter(api_base_url=fake.url) as client:
            server = serve(client)
            reply = post_to(server, body_for())
            assert reply.status_code == 401
            assert "python -m puter login" in error_of(reply)["message"]
            assert error_of(reply)["code"] == "not_signed_in"
            assert get_from(server, "/v1/models").ok  # which needs no account

    def test_all_accounts_rest(self, serve, make, fake):
        server = serve(make("alice", "bob", max_retries=0, fallback_enabled=False))
        for account in fake.accounts.values():
            account.credit_microcents = 0
        assert post_to(server, body_for()).status_code == 402
        reply = post_to(server, body_for())
        assert (reply.status_code, error_of(reply)["code"]) == (429, "too_many_requests")
        assert int(reply.headers["Retry-After"]) > 0
        assert "alice" not in reply.text and "bob" not in reply.text
        assert len(fake.chat_calls()) == 2  # the second time nobody was asked

    @pytest.mark.parametrize("asked", [True, False])
    def test_unknown_models(self, server, asked):
        name = "claud-opus-4-5"
        body = body_for(model=name)
        reply = post_to(server, body) if asked else get_from(server, f"/v1/models/{name}")
        error = error_of(reply)
        assert (reply.status_code, error["code"]) == (404, "model_not_found")
        assert error["param"] == "model" and "claude-opus-4-5" in error["message"]

    @pytest.mark.parametrize("version", ["1.0", "1.1"])
    @pytest.mark.parametrize(
        ("scenario", "words"), [("midfail", "scripted mid-stream failure"), ("cut", "terminated")]
    )
    def test_a_stream_that_breaks(self, server, scenario, words, version):
        with connected(server) as sock:
            sock.sendall(chat_request(body_for(scenario, stream=True), version))
            head, _, body = until_end(sock).partition(b"\r\n\r\n")
        assert status_of(head) == 200
        events = re.findall(rb"^data: (.*)$", body, re.MULTILINE)
        last = json.loads(events[-1].strip())
        assert words in last["error"]["message"]
        assert ".reply" not in last["error"]["message"]
        assert b"quick" in body
        assert b"[DONE]" not in body and not body.endswith(b"0\r\n\r\n")

    @pytest.mark.parametrize("scenario", ["closed", "halfline", "nousageline"])
    def test_a_stream_that_ends_too_soon(self, server, scenario):
        with connected(server) as sock:
            sock.sendall(chat_request(body_for(scenario, stream=True)))
            body = until_end(sock)
        assert b'"error"' in body and b"[DONE]" not in body

    def test_one_bad_request_touches_no_other(self, server, fake):
        with connected(server) as sock:
            sock.sendall(chat_request(body_for("slow", stream=True)))
            until_seen(sock, b"quick")
            for bad in (b"", b"\xff", b"[" * 100_000, b'{"model":1}'):
                assert post_to(server, bad).status_code == 400
            said_to(server, b"\x16\x03\x01\r\n\r\n")
            post_to(server, body_for("midfail", stream=True), stream=True).close()
            assert b"line." in until_seen(sock, b"[DONE]")

    @pytest.mark.parametrize(
        "body",
        [
            *(b"", b"{", b"5", b"\xff\xfe\x00", b"\x1f\x8b\x08\x00"),
            *(b"[" * 200_000, b'{"a":' * 200_000, b"9" * 5000),
            *(b'{"model":"m","messages":[' * 500, b"[" * 300 + b"]" * 300),
            json.dumps(body_for(temperature=1e999)).encode(),
        ],
        ids=range(11),
    )
    def test_bad_bodies(self, server, body):
        reply = post_to(server, body)
        assert reply.status_code == 400
        error = error_of(reply)
        assert error["type"] == "invalid_request_error"
        assert len(error["message"]) < 1000

    @pytest.mark.parametrize(
        "message",
        [
            5,
            {"content": "x"},
            {"role": ["user"], "content": "x"},
            {"role": "function", "name": "f", "content": "x"},
            *(user(content) for content in (5, [5], [{"type": "text", "text": 5}])),
            *({"role": "tool", "content": "y", **more} for more in ({}, {"tool_call_id": ["x"]})),
            {"role": "assistant", "content": "x", "tool_calls": 5},
            *(assistant("x", 5), assistant([{"type": "tool_use"}])),
            assistant(None, {"id": [1], "function": {"name": "f"}}),
            assistant(None, called("1", "f", 5)),
        ],
    )
    def test_bad_messages(self, server, message):
        reply = post_to(server, body_for(messages=[*HI, message]))
        assert reply.status_code == 400
        assert "messages[1]" in error_of(reply)["message"]

    @settings(
        max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(body=ANY_BODY)
    @example(body={"model": lab("text"), "messages": HI, "tools": 5})
    def test_any_json(self, server, body):
        reply = post_to(server, body)
        assert reply.status_code in (200, 400, 404)
        if reply.status_code != 200:
            error_of(reply)
        elif body.get("stream") is True:
            frames_of(reply)
        assert get_from(server, "/health").ok

    @pytest.mark.parametrize("kind", [RuntimeError, KeyError, RecursionError, OSError])
    def test_a_fault_of_ours(self, server, monkeypatch, kind):
        def fail(*_: Any) -> None:
            raise kind("secret")

        with monkeypatch.context() as patch:
            patch.setattr(puter, "_json_body", fail)
            reply = post_to(server, body_for())
            assert reply.status_code == 500
            assert "secret" not in error_of(reply)["message"]
        assert post_to(server, body_for()).ok

    def test_a_fault_of_ours_in_a_stream(self, server, monkeypatch):
        def fail(*_: Any) -> Iterator[Any]:
            yield puter.Chunk("text", "first")
            raise RuntimeError("secret")

        monkeypatch.setattr(puter, "answer_events", fail)
        with connected(server) as sock:
            sock.sendall(chat_request(body_for(stream=True)))
            got = until_end(sock, 1)
        assert b'"error"' in got
        assert b"secret" not in got and b"[DONE]" not in got

    # Clients that go away.

    @pytest.mark.parametrize("scenario", ["slow", "hang"])
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_goes_away(self, serve, make, fake, *, scenario, stream):
        client = make(max_concurrent=1)
        server = serve(client)
        alice = fake.accounts["token-alice"]
        pause = {"slow": says(" ".join("x" * 200), pause_s=0.05)}
        fake.script[lab(scenario)] = pause.get(scenario, "hang")
        with connected(server) as sock:
            sock.sendall(chat_request(body_for(scenario, stream=stream)))
            assert eventually(lambda: alice.running == 1)
            if stream and scenario == "slow":
                until_seen(sock, b"data: ")
        assert eventually(lambda: alice.running == 0, 2.0)
        assert eventually(lambda: not server._running)
        assert post_to(server, body_for()).ok

    def test_a_client_that_goes_away_where_poll_cannot_tell(self, server, fake, monkeypatch):
        monkeypatch.delattr(select, "POLLRDHUP", raising=False)
        with connected(server) as sock:
            sock.sendall(chat_request(body_for("hang")))
            assert eventually(lambda: fake.accounts["token-alice"].running == 1)
        assert eventually(lambda: fake.accounts["token-alice"].running == 0, 2.0)

    @pytest.mark.skipif(not hasattr(select, "POLLRDHUP"), reason="an end behind bytes is unseen")
    @pytest.mark.parametrize("unread", [b"\r\n", chat_request(body_for())])
    def test_a_client_that_goes_away_with_bytes_unread(self, server, fake, unread):
        alice = fake.accounts["token-alice"]
        with connected(server) as sock:
            sock.sendall(chat_request(body_for("hang")))
            assert eventually(lambda: alice.running == 1)
            sock.sendall(unread)
        assert eventually(lambda: alice.running == 0, 2.0)
        assert len(fake.chat_calls()) == 1

    @pytest.mark.parametrize("wants_json", [False, True])
    @pytest.mark.parametrize(
        ("answer", "end"),
        [
            (Turn('{"a": 1}'), b'"finish_reason": "stop"'),
            (refusing(400, "upstream_bad_request"), b"upstream_bad_request"),
        ],
    )
    def test_a_stream_that_begins_late(self, server, fake, monkeypatch, wants_json, answer, end):
        monkeypatch.setattr(puter, "KEEP_ALIVE_S", 0.05)
        more = threading.Event()
        fake.script[lab("text")] = lambda handler, args: more.wait(5) and answer
        shape = {"response_format": {"type": "json_object"}} if wants_json else {}
        with connected(server) as sock:
            sock.sendall(chat_request(body_for(stream=True, **shape), Connection="close"))
            head = until_seen(sock, b": keep-alive\n\n")
            assert status_of(head) == 200 and b"data: " not in head
            more.set()
            rest = until_end(sock)
        assert end in rest
        assert (b"[DONE]" in rest) is (b'"error"' not in rest) is isinstance(answer, Turn)

    def test_a_client_that_reads_nothing_holds_up_nobody_else(self, server, fake, monkeypatch):
        monkeypatch.setattr(puter, "KEEP_ALIVE_S", 0.05)
        more = threading.Event()
        fake.script[lab("text")] = lambda handler, args: more.wait(5) and Turn("late")
        body = {
            "model": lab("text"),
            "input": "hi",
            "stream": True,
            "instructions": "i" * 8_000_000,
        }
        with connected(server) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            data = json.dumps(body).encode()
            head = head_of("POST", "/v1/responses", "1.1")
            sock.sendall(head[:-2] + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
            assert eventually(lambda: fake.chat_calls())
            time.sleep(0.2)
            assert get_from(server, "/health").ok
            more.set()

    @pytest.mark.parametrize("status", [500, 429, 401])
    def test_an_sdk_does_not_multiply_our_tries(self, serve, make, fake, status):
        fake.script[lab("text")] = lambda handler, args: refusing(status, "upstream_failed")
        server = serve(make(max_retries=0, fallback_enabled=False))
        with openai.OpenAI(base_url=server.url, api_key="any", max_retries=3) as client:
            for stream in (False, True):
                with pytest.raises(openai.APIStatusError):
                    client.chat.completions.create(**body_for(stream=stream))
        assert len(fake.chat_calls()) <= 2

    def test_a_client_that_goes_away_costs_no_second_try(self, serve, make, fake):
        server = serve(make("alice", "bob"))
        with connected(server) as sock:
            sock.sendall(chat_request(body_for("hang")))
            assert eventually(lambda: fake.chat_calls() != [])
        assert eventually(lambda: not server._running)
        time.sleep(0.1)
        assert told(fake) == ["alice hang"]
        assert server.client.cooldowns() == []

    def test_a_client_that_goes_away_in_its_request(self, server, fake):
        whole = chat_request(body_for())
        for length in (3, 60, len(whole) - 1):
            with connected(server) as sock:
                sock.sendall(whole[:length])
        assert post_to(server, body_for()).ok
        assert len(fake.chat_calls()) == 1

    # Who may call.

    @pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "box.lan", "::", ""])
    def test_the_network_needs_a_key(self, make, host):
        for key in (None, ""):
            with pytest.raises(puter.ConfigError, match="API key"):
                puter.OpenAIServer(make(), host=host, port=0, api_key=key)

    def test_an_open_bind_with_a_key(self, serve):
        server = serve(host="0.0.0.0", api_key=KEY)
        url = f"http://127.0.0.1:{server.port}/v1/models"
        assert requests.get(url, timeout=5).status_code == 401
        headers = {"Authorization": f"Bearer {KEY}", "Host": "box.lan"}
        assert requests.get(url, headers=headers, timeout=5).ok

    def test_keys(self, serve, fake):
        server = serve(api_key=KEY)
        assert server._server.server_address[0] == "127.0.0.1"
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": KEY}):
            for size in (2, 300_000):
                reply = post_to(server, b"x" * size, **headers)
                assert reply.status_code == 401
                assert error_of(reply)["code"] == "invalid_api_key"
                assert KEY not in reply.text
        assert get_from(server, "/v1/models").status_code == 401
        assert get_from(server, "/nowhere").status_code == 401
        assert get_from(server, "/health").ok and get_from(server, "/").ok
        assert fake.chat_calls() == []
        assert post_to(server, body_for(), Authorization=f"Bearer {KEY}").ok
        assert post_to(server, body_for(), **{"x-api-key": KEY}).ok

    @pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", ""])
    def test_foreign_hosts(self, server, fake, host):
        answer = said_to(server, chat_request(body_for(), Host=host))
        assert status_of(answer) == 403 and b"forbidden_host" in answer
        assert fake.requests == []

    @pytest.mark.parametrize("kind", ["application/json", "text/plain", ""])
    @pytest.mark.parametrize("origin", ["https://evil.example", "null"])
    def test_foreign_origins(self, server, fake, origin, kind):
        headers = {"Origin": origin, "Content-Type": kind}
        reply = post_to(server, body_for(), **headers)
        assert (reply.status_code, error_of(reply)["code"]) == (403, "forbidden_origin")
        assert f"Pages of {origin.rpartition('/')[2]} may not" in error_of(reply)["message"]
        assert get_from(server, "/v1/models", Origin=origin).status_code == 403
        asked = {"Access-Control-Request-Method": "POST"}
        preflight = get_from(server, "/v1/models", "OPTIONS", Origin=origin, **asked)
        assert preflight.status_code == 403
        for one in (reply, preflight):
            assert not [n for n in one.headers if n.startswith("Access-Control")]
        assert fake.requests == []

    def test_allowed_origins(self, serve):
        origin = "https://app.example"
        server = serve(api_key=KEY, allowed_origins=[f"{origin}/"])
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        preflight = get_from(server, "/v1/chat/completions", "OPTIONS", **asked)
        assert (preflight.status_code, preflight.content) == (204, b"")
        assert preflight.headers["Access-Control-Allow-Origin"] == origin
        assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
        assert "Origin" in preflight.headers["Vary"]
        asked = {"Origin": origin, "Authorization": f"Bearer {KEY}"}
        for reply in (
            post_to(server, body_for(), **asked),
            post_to(server, body_for(stream=True), **asked),
            post_to(server, b"{", **asked),
            post_to(server, body_for(), Origin=origin),
        ):
            assert reply.headers["Access-Control-Allow-Origin"] == origin
            exposed = reply.headers["Access-Control-Expose-Headers"].lower()
            assert all(name in exposed for name in ("x-puter-model", "retry-after", "request-id"))
        other = post_to(server, body_for(), **{**asked, "Origin": "https://b.example"})
        assert other.status_code == 403
        assert "Access-Control-Allow-Origin" not in other.headers

    def test_headers_of_the_sdk_in_a_browser(self, serve):
        origin = "https://app.example"
        server = serve(allowed_origins=[origin])
        path = "/v1/chat/completions"
        plain = get_from(server, path, "OPTIONS", Origin=origin)
        assert "x-api-key" in plain.headers["Access-Control-Allow-Headers"]
        asked = "authorization,content-type,x-stainless-lang,x-stainless-os"
        headers = {"Origin": origin, "Access-Control-Request-Headers": asked}
        preflight = get_from(server, path, "OPTIONS", **headers)
        allowed = preflight.headers["Access-Control-Allow-Headers"].lower()
        assert set(asked.split(",")) <= {name.strip() for name in allowed.split(",")}

    @pytest.mark.parametrize(
        "message",
        [
            said({"type": "file", "puter_path": "/alice/taxes.pdf"}),
            said(typed("tool_result", tool_use_id="c", content=[typed("file", puter_path="/x")])),
            result("c", [{"type": "input_file", "puter_path": "/x"}]),
        ],
    )
    def test_the_storage_is_not_for_callers(self, server, fake, message):
        reply = post_to(server, body_for(messages=[*HI, message]))
        assert reply.status_code == 400 and "puter_path" in error_of(reply)["message"]
        assert fake.requests == []

    def test_paths_beside_what_is_known_are_dropped(self, server, fake):
        text = {"type": "text", "text": "x", "puter_path": "/alice/taxes.pdf"}
        assert post_to(server, body_for(messages=[{**said(text), "puter_path": "/x"}])).ok
        assert sent_to(fake)["messages"] == [user("x")]

    def test_no_body_is_read_of_who_may_not(self, serve, monkeypatch):
        monkeypatch.setattr(puter._GatewayHandler, "_read_body", lambda *_: pytest.fail("read"))
        server = serve(api_key=KEY)
        size = {"Content_Length": 30_000_000}
        key = {"Authorization": f"Bearer {KEY}"}
        for head in (
            head_of("POST", "/v1/chat/completions", **size),
            head_of("POST", "/v1/chat/completions", Transfer_Encoding="chunked"),
            head_of("POST", "/health", **size),
            head_of("POST", "/nowhere", **size, **key),
            head_of("PUT", "/v1/models", **size, **key),
        ):
            answer = said_to(server, head)
            assert status_of(answer) in (401, 404, 405)
            assert answer.count(b"HTTP/1.1") == 1 and b"Connection: close" in answer

    @pytest.mark.parametrize(
        "wrong", [{"max_connections": 0}, {"port": -1}, {"port": 99_999}, {"host": "127.0.0.x"}]
    )
    def test_wrong_options(self, make, wrong):
        with pytest.raises(puter.ConfigError):
            puter.OpenAIServer(make(), **{"port": 0, **wrong})

    @posix_only
    def test_all_of_127_is_this_computer(self, serve):
        if sys.platform == "linux":
            assert requests.get(f"{serve(host='127.0.0.2').url}/models", timeout=5).ok

    def test_names_that_are_allowed(self, serve):
        server = serve(allowed_hosts=["Host.docker.internal"])
        assert get_from(server, "/v1/models", Host="host.docker.internal:80").ok
        assert get_from(server, "/v1/models", Host="evil.example").status_code == 403

    # Limits.

    @pytest.mark.parametrize("size", [101, 300_000])
    def test_large_bodies(self, server, monkeypatch, size):
        assert puter.MAX_REQUEST_BYTES == 32 * 1024 * 1024
        monkeypatch.setattr(puter, "MAX_REQUEST_BYTES", 100)
        reply = post_to(server, b"x" * size)
        assert reply.status_code == 413
        assert "100" in error_of(reply)["message"]
        assert post_to(server, b"x" * 100).status_code == 400

    @pytest.mark.parametrize(
        "sent", [b"", b"GET /health HTTP/1.1\r\nX: ", chat_request(body_for())[:-1], head_of()]
    )
    def test_slow_clients(self, serve, monkeypatch, sent):
        monkeypatch.setattr(puter, "IDLE_TIMEOUT_S", 0.3)
        server = serve()
        with connected(server) as sock:
            sock.sendall(sent)
            assert status_of(until_end(sock)) == (200 if sent == head_of() else 0)
        assert get_from(server, "/health").ok

    def test_long_answers_are_not_cut(self, server, monkeypatch):
        monkeypatch.setattr(puter, "IDLE_TIMEOUT_S", 0.1)
        for stream in (False, True):
            assert answer_of(server, body_for("slow", stream=stream))[0] == SENTENCE

    def test_too_many_connections(self, serve, fake):
        server = serve(max_connections=2)
        with connected(server) as first, connected(server) as second:
            for sock in (first, second):
                sock.sendall(head_of())
                assert status_of(until_seen(sock, b"}")) == 200
            # both answer, and so none can go
            fake.script[lab("text")] = "hang"
            for sock in (first, second):
                sock.sendall(chat_request(body_for()))
            # whose bodies have been read: who still sends one may have to go
            assert eventually(lambda: len(server._running) == 2 and not server.deadlines)
            for _ in range(3):
                reply = post_to(server, body_for())
                assert (reply.status_code, error_of(reply)["code"]) == (503, "overloaded")
                assert int(reply.headers["Retry-After"]) > 0
        assert eventually(lambda: get_from(server, "/health").ok)

    def test_many_at_once(self, server):
        def ask_for(number: int) -> tuple[str, str]:
            messages = [{"role": "user", "content": f"number {number}"}]
            stream = number % 2 == 0
            return answer_of(server, body_for("echo", messages=messages, stream=stream))

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask_for, range(24)))
        assert answers == [(f"number {number}", "stop") for number in range(24)]

    # HTTP.

    def test_several_requests_on_one_connection(self, server):
        with requests.Session() as session:
            for body in (body_for(), {}, body_for(stream=True), body_for(model="no")):
                url = f"{server.url}/chat/completions"
                reply = session.post(url, json=body, timeout=5)
                assert reply.headers.get("Connection") != "close"
            assert session.get(f"{server.url}/nowhere", timeout=5).status_code == 404
            pools = session.get_adapter(url).poolmanager.pools  # type: ignore[attr-defined]
            (pool,) = [pools[key] for key in pools.keys()]  # noqa: SIM118 (no dict)
            assert pool.num_connections == 1

    @pytest.mark.parametrize("between", [b"", b"\r\n"])
    def test_pipelined_requests(self, server, between):
        last = chat_request(body_for("echo"), Connection="close")
        stream = chat_request(body_for(stream=True))
        answer = said_to(server, head_of() + between + chat_request({}) + stream + last)
        statuses = re.findall(rb"HTTP/1\.1 (\d+)", answer)
        assert statuses == [b"200", b"400", b"200", b"200"]
        assert answer.count(b"\r\n0\r\n\r\n") == 1
        assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["model"] == lab("echo")

    @pytest.mark.parametrize("stream", [False, True])
    def test_http_1_0(self, server, stream):
        answer = said_to(server, chat_request(body_for(stream=stream), "1.0"))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert status_of(head) == 200
        assert b"chunked" not in head
        if stream:
            assert events_of(body.decode())[-1] == "[DONE]"
        else:
            assert json.loads(body)["choices"]

    def test_expect_100_continue(self, server):
        request = chat_request(body_for(), Expect="100-continue", Connection="close")
        head, _, body = request.partition(b"\r\n\r\n")
        with connected(server) as sock:
            sock.sendall(head + b"\r\n\r\n")
            assert status_of(until_seen(sock, b"\r\n\r\n", 1)) == 100
            sock.sendall(body)
            assert status_of(until_end(sock)) == 200

    @pytest.mark.parametrize("cut", [1, 7, 10_000])
    def test_a_body_in_chunks(self, server, cut):
        data = json.dumps(body_for()).encode()
        chunks = b"".join(
            b"%X ;x=y\r\n%b\r\n" % (len(data[i : i + cut]), data[i : i + cut])
            for i in range(0, len(data), cut)
        )
        head = head_of("POST", "/v1/chat/completions", Transfer_Encoding="Chunked")
        body = chunks + b"0\r\nX-Trailer: y\r\n\r\n"
        answer = said_to(server, head + body + head_of(Connection="close"))
        assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"200", b"200"]

    @pytest.mark.parametrize(
        ("headers", "body", "status"),
        [
            *(({}, body, 400) for body in (b"", b"x\r\n", b"-1\r\n", b"2;" + b"x" * 5_000)),
            *(
                ({}, size + b"\r\n0\r\n\r\n", 400)
                for size in (b"0x2\r\n{}", b"2\r\n{}x", b"2;a\rb\r\n{}")
            ),
            ({}, b"FFFFFFF\r\n", 413),
            ({"Content_Length": 2}, b"2\r\n{}\r\n0\r\n\r\n", 400),
            ({"Transfer_Encoding": "gzip, chunked"}, b"2\r\n{}\r\n0\r\n\r\n", 501),
            ({"Transfer_Encoding": "identity"}, b"{}", 501),
        ],
    )
    def test_broken_chunks(self, server, headers, body, status):
        framing = {"Transfer_Encoding": "chunked", **headers}
        head = head_of("POST", "/v1/chat/completions", **framing)
        with connected(server) as sock:
            sock.sendall(head + body)
            sock.shutdown(socket.SHUT_WR)
            answer = until_end(sock)
        assert status_of(answer) == status and answer.count(b"HTTP/1.1") == 1

    @pytest.mark.parametrize(
        ("more", "status"),
        [
            # lengths that are none, or too large, or several
            *((f"Content-Length: {n}", 400) for n in ("abc", "-1", "+2", "2_0", "2, 2", "", "²")),
            ("Content-Length: 99999999999", 413),
            (f"Content-Length: {'9' * 5000}", 400),
            ("Content-Length: 2\r\nContent-Length: 3", 400),
            ("Content-Length: 0\r\nContent-Length: 2", 400),
            *((f"Transfer-Encoding: {blank}chunked", 501) for blank in "\x0b\x85"),
            ("Host: evil.example", 400),
            *((f"{name}: a\r\n{name}: b", 400) for name in ("Authorization", "X-API-Key")),
            # large heads
            (f"X: {'a' * 70_000}", 431),
            ("\r\n".join(["X: y"] * 150), 431),
        ],
    )
    def test_broken_heads(self, server, more, status):
        head = head_of("POST", "/v1/chat/completions")
        answer = said_to(server, head[:-2] + f"{more}\r\n\r\n{{}}".encode())
        assert status_of(answer) == status and answer.count(b"HTTP/1.1") == 1
        assert b"invalid_request_error" in answer

    @pytest.mark.parametrize(
        ("noise", "status"),
        [
            (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
            (b"GET\r\n\r\n", 400),
            (b"\0" * 100 + b"\n\n", 400),
            (head_of(path="/" + "a" * 70_000), 414),
        ],
    )
    def test_noise(self, server, noise, status):
        assert status_of(said_to(server, noise)) == status
        assert get_from(server, "/health").ok

    # Start and stop.

    def test_a_port_in_use(self, server):
        with pytest.raises(OSError, match="in use"):
            puter.OpenAIServer(server.client, port=server.port)

    def test_a_port_is_free_again(self, serve, make):
        with puter.OpenAIServer(make(), port=0) as first:
            assert get_from(first, "/health").ok
        with pytest.raises(requests.ConnectionError):
            get_from(first, "/health")
        assert get_from(serve(port=first.port), "/health").ok

    def test_what_runs_may_end(self, serve, make):
        server = puter.OpenAIServer(make(), port=0).start()
        thread, answers = in_background(lambda: answer_of(server, body_for("slow", stream=True)))
        assert eventually(lambda: len(server._running) == 1)
        server.stop(5)
        thread.join(5)
        assert answers == [(SENTENCE, "stop")]

    def test_what_runs_too_long_is_cut(self, make, fake):
        server = puter.OpenAIServer(make(), port=0).start()
        thread, answers = in_background(lambda: post_to(server, body_for("hang", stream=False)))
        assert eventually(lambda: fake.accounts["token-alice"].running == 1)
        server.stop(0.1)
        thread.join(5)
        assert isinstance(answers[0], requests.RequestException)
        assert eventually(lambda: fake.accounts["token-alice"].running == 0, 1.0)

    # Our own client.

    def test_our_client(self, serve, make, fake):
        gateway = serve(api_key=KEY)
        with puter.Puter(
            KEY, api_style="openai", api_base_url=gateway.url, max_retries=0
        ) as client:
            reply = client.chat("hi", model=lab("reason"))
            assert (reply.text, reply.reasoning) == (SENTENCE, "thinking...")
            assert reply.usage.total_tokens == 33
            assert reply.model == lab("reason")
            with client.stream("hi", model=lab("text")) as stream:
                assert "".join(map(str, stream)) == SENTENCE
                assert stream.reply.usage.total_tokens == 33
            for how in (client.chat, self._streamed(client)):
                called = how("hi", model=lab("twotools"), tools=TOOLS)
                assert [call.name for call in called.tool_calls] == ["get_weather", "get_time"]
                assert called.finish_reason == "tool_calls"
            assert client.model(lab("text")).id == lab("text")
        assert {one.token for one in fake.requests if one.path == CHAT} == {"token-alice"}

    @staticmethod
    def _streamed(client: puter.Puter) -> Callable[..., puter.Reply]:
        def ask(prompt: str, **more: Any) -> puter.Reply:
            with client.stream(prompt, **more) as stream:
                list(stream)
                return stream.reply

        return ask

    @pytest.mark.parametrize("how", [pytest.param("chat"), "stream"])
    def test_a_key_that_is_a_word(self, server, how):
        with puter.Puter("puter", api_base_url=server.url, api_style="openai") as client:
            style = client.chat if how == "chat" else self._streamed(client)
            reply = style("a computer, puter.py", model=lab("echo"))
        assert reply.text == "a computer, puter.py"

    @pytest.mark.parametrize("how", ["chat", "stream"])
    @pytest.mark.parametrize(
        ("answer", "kind"),
        [
            (refusing(400, "upstream_bad_request"), puter.BadRequestError),
            (refusing(402, "insufficient_funds"), puter.CreditError),
            (refusing(403, "permission_denied"), puter.ModelAccessError),
            (refusing(403, "account_suspended"), puter.AccessError),
            (refusing(401, "token_auth_failed"), puter.AuthError),
            (refusing(429, "upstream_rate_limited"), puter.ModelRateLimitError),
            (refusing(500, "upstream_auth_failed"), puter.ProviderAuthError),
            (refusing(400, "upstream_failed"), puter.ModelUnavailableError),
            (refusing(500, "internal_error"), puter.ServerError),
            (refusing(400, "bad_request", "Model not found: x"), puter.ModelNotFoundError),
        ],
    )
    def test_errors_keep_their_kinds(self, server, fake, *, answer, kind, how):
        fake.script[lab("text")] = lambda handler, args: answer
        style: Any = {"api_style": "openai", "fallback_enabled": False, "max_retries": 0}
        with puter.Puter("any", api_base_url=server.url, **style) as client:
            ask = client.chat if how == "chat" else self._streamed(client)
            with pytest.raises(puter.PuterError) as caught:
                ask("hi", model=lab("text"))
        assert type(caught.value) is kind

    # The real SDK.

    def test_sdk_whole(self, server):
        with sdk(server) as client:
            whole = client.chat.completions.create(model=lab("reason"), messages=HI)  # type: ignore[arg-type]
            assert whole.choices[0].message.content == SENTENCE
            assert whole.choices[0].message.reasoning_content == "thinking..."  # type: ignore[attr-defined]
            assert whole.usage and whole.usage.prompt_tokens == 11
            models = [model.id for model in client.models.list()]
            assert lab("text") in models
            assert client.models.retrieve("qwen/qwen3-coder:free").id == FREE[3]

    def test_sdk_parallel_calls(self, server, fake):
        fake.script["claude-opus-4-5-20251101"] = two_tools
        body: Any = {"model": "claude-opus-4-5", "messages": HI, "tools": TOOLS}
        with sdk(server) as client, client.chat.completions.stream(**body) as stream:
            message = stream.get_final_completion().choices[0].message
        assert message.tool_calls
        assert [c.function.name for c in message.tool_calls] == ["get_weather", "get_time"]
        assert len({c.id for c in message.tool_calls} - {"call_1", "call_2"}) == 2
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "ok"}
            for call in message.tool_calls
        ]
        again = [*HI, message.model_dump(exclude_unset=True), *results]
        fake.script["claude-opus-4-5-20251101"] = "text"
        with sdk(server) as client:
            whole = client.chat.completions.create(**{**body, "messages": again})
        assert whole.choices[0].message.content == SENTENCE

    @pytest.mark.parametrize(
        ("model", "kind"),
        [
            ("no-such-model", openai.NotFoundError),
            (lab("err400"), openai.BadRequestError),
            (lab("err429"), openai.RateLimitError),
            (lab("err500"), openai.InternalServerError),
            (lab("denied"), openai.PermissionDeniedError),
            ("", openai.BadRequestError),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_sdk_errors(self, server, *, model, kind, stream):
        body: Any = {"model": model, "messages": HI, "stream": stream}
        with sdk(server) as client, pytest.raises(kind) as caught:
            client.chat.completions.create(**body)
        assert caught.value.body["message"]  # type: ignore[index]
        headers = caught.value.response.headers
        assert headers["x-should-retry"] == "false" and headers["x-request-id"]
        assert ("retry-after" in headers) is (caught.value.status_code in (429, 503))

    def test_sdk_and_a_wrong_key(self, serve):
        server = serve(api_key=KEY)
        image = {"type": "image_url", "image_url": {"url": PNG_URL + "A" * 400_000}}
        body: Any = body_for(messages=[{"role": "user", "content": [image]}])
        with sdk(server, "no") as client:
            for one in (body_for(), body):
                with pytest.raises(openai.AuthenticationError) as caught:
                    client.chat.completions.create(**one)
                assert caught.value.code == "invalid_api_key"
        with sdk(server, KEY) as client:
            assert client.chat.completions.create(**body).choices

    def test_sdk_and_a_stream_that_breaks(self, server):
        body: Any = body_for("midfail", stream=True)
        text = ""
        with sdk(server) as client, pytest.raises(openai.APIError, match="scripted"):
            for chunk in client.chat.completions.create(**body):
                text += chunk.choices[0].delta.content or ""
        assert text == "The quick brown fox — "


# =============================================================================
# The gateway under attack, and what odd clients send
# =============================================================================
LONG_NAME = "a." * 200_000
CHAT_PATH = "/v1/chat/completions"
SILENT = b""


def cpu_of(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work gives, and how long all threads of this process have computed for it."""
    began = time.process_time()
    return work(), time.process_time() - began


def raw_post(server: puter.OpenAIServer, path: str, data: bytes, **headers: str) -> Any:
    """A request whose body is sent as it is."""
    url = server.url.removesuffix("/v1") + path
    return requests.post(url, data=data, headers=headers, timeout=20)


class TestGatewayUnderAttack:
    """One request freezes nobody, many fill nothing, and who is too slow goes."""

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            (CHAT_PATH, {"model": LONG_NAME}),
            (CHAT_PATH, {"model": "x" * 30_000_000}),
            (CHAT_PATH, {"response_format": {"type": LONG_NAME}}),
            (CHAT_PATH, {"tools": [function_tool()], "tool_choice": {"type": "function", "function": {"name": LONG_NAME}}}),
            (CHAT_PATH, {"messages": [{"role": LONG_NAME, "content": "hi"}]}),
            (CHAT_PATH, {"messages": [{"role": "user", "content": [{"type": LONG_NAME}]}]}),
            ("/v1/responses", {"model": LONG_NAME, "input": "hi"}),
            ("/v1/responses", {"input": "hi", "previous_response_id": LONG_NAME}),
            ("/v1/responses", {"input": [{"type": "item_reference", "id": LONG_NAME}]}),
            ("/v1/responses", {"input": [{"type": LONG_NAME}]}),
            ("/v1/messages", {"model": LONG_NAME, "max_tokens": 9}),
            ("/v1/messages", {"max_tokens": 9, "tools": [{"name": "f"}], "tool_choice": {"type": "tool", "name": LONG_NAME}}),
            ("/v1/messages", {"max_tokens": 9, "tools": [{"name": "f", "type": LONG_NAME[:60_000]}], "tool_choice": {"type": LONG_NAME}}),
            (f"/v1/models/{'a.' * 30_000}", None),
        ],
    )  # fmt: skip
    def test_a_long_word_freezes_nobody(self, server, path, body):
        server.client.models()
        data = (
            b""
            if body is None
            else json.dumps({"model": lab("text"), "messages": HI, **body}).encode()
        )
        method = "GET" if body is None else "POST"
        url = server.url.removesuffix("/v1") + path
        work = lambda: requests.request(method, url, data=data, timeout=20)
        (running, outcome), cpu_s = cpu_of(lambda: in_background(work))
        began = time.monotonic()
        assert get_from(server, "/health").ok and time.monotonic() - began < 1.0
        _, more_s = cpu_of(lambda: running.join(20))
        assert 400 <= outcome[0].status_code < 500 and len(outcome[0].content) < 5_000
        assert cpu_s + more_s < 1.0

    @pytest.mark.parametrize(
        ("data", "status"),
        [
            (b'{"a":[' + b'"a",' * 1_100_000 + b"1]}", 413),
            (json.dumps({"a": "a," * 1_100_000}).encode(), 400),
            (b"," * 1_000_001 + b'"' + rb"\"" * 20_000, 413),
            (gzip.compress(b"[" * 34_000_000), 413),
        ],
        ids=["many values", "a text of commas", "a text without end", "packed"],
    )
    def test_a_body_of_too_many_values(self, server, data, status):
        coding = {"Content-Encoding": "gzip"} if data[:2] == b"\x1f\x8b" else {}
        reply, cpu_s = cpu_of(lambda: raw_post(server, CHAT_PATH, data, **coding))
        assert reply.status_code == status and cpu_s < 2.0

    def test_what_is_announced_takes_no_memory(self, server):
        with ExitStack() as stack:
            for _ in range(12):
                sock = stack.enter_context(connected(server))
                sock.sendall(head_of("POST", CHAT_PATH, Content_Length=str(30 << 20)))
            assert eventually(lambda: len(server._running) == 12)
            assert server._reserved_bytes == 0
            assert answer_of(server, body_for())[0] == SENTENCE

    @pytest.mark.parametrize(
        "sent", [SILENT, b"GET / HT", head_of()], ids=["silent", "half", "idle"]
    )
    def test_who_waits_makes_room(self, serve, sent):
        server = serve(max_connections=4)
        before = threading.active_count()
        with ExitStack() as stack:
            for _ in range(40):
                sock = stack.enter_context(connected(server))
                sock.sendall(sent)
                if sent == head_of():
                    until_seen(sock, b"}")
            assert answer_of(server, body_for())[0] == SENTENCE
            assert len(server.connections) <= 4 and len(server.deadlines) <= 4
            assert eventually(lambda: threading.active_count() <= before + 6)

    def test_above_the_limit_no_thread_begins(self, serve, fake):
        fake.script[lab("text")] = "hang"
        server = serve(max_connections=2)
        with ExitStack() as stack:
            for number in (1, 2):
                sock = stack.enter_context(connected(server))
                sock.sendall(chat_request(body_for()))
                assert eventually(lambda n=number: len(server._running) == n)
            threads = threading.active_count()
            late = [stack.enter_context(connected(server)) for _ in range(30)]
            for sock in late:
                answer = until_end(sock)
                assert status_of(answer) == 503 and b"overloaded" in answer
                assert b"Retry-After" in answer
            assert threading.active_count() <= threads + 1

    @pytest.mark.parametrize("slow", ["head", "body"])
    def test_slow_bytes_end(self, serve, monkeypatch, slow):
        monkeypatch.setattr(puter, "HEAD_TIMEOUT_S", 0.3)
        monkeypatch.setattr(puter, "BODY_TIMEOUT_S", 0.3)
        server = serve()
        with connected(server) as sock:
            sock.sendall(
                head_of("POST", CHAT_PATH, Content_Length="999")
                if slow == "body"
                else b"GET / HTTP/1.1\r\n"
            )
            began = time.monotonic()
            with suppress(ConnectionError):
                while time.monotonic() < began + 5 and not select.select([sock], [], [], 0.05)[0]:
                    sock.sendall(b"X: y\r\n")
            assert time.monotonic() - began < 2.0

    def test_without_descriptors_it_says_so_and_goes_on(self, server, monkeypatch, caplog):
        real, failures = socket.socket.accept, [errno.EMFILE] * 2

        def accept(self: socket.socket) -> Any:
            if failures and self.fileno() == server._server.fileno():
                raise OSError(failures.pop(), "Too many open files")
            return real(self)

        monkeypatch.setattr(socket.socket, "accept", accept)
        assert get_from(server, "/health").ok and not failures
        assert "No connection can be accepted: Too many open files" in caplog.text

    def test_no_100_continue_before_key_and_size(self, serve):
        server = serve(api_key=KEY)
        expecting = {"Expect": "100-continue", "Content_Length": "2"}
        for headers, status in (
            ({}, 401),
            ({"Authorization": f"Bearer {KEY}", "Content_Length": "99999999999"}, 413),
            ({"Authorization": f"Bearer {KEY}"}, 100),
        ):
            with connected(server) as sock:
                sock.sendall(head_of("POST", CHAT_PATH, **{**expecting, **headers}))
                assert status_of(until_seen(sock, b"\r\n\r\n")) == status

    def test_one_large_history_drives_out_no_other(self, server):
        def post(**body: Any) -> Any:
            return requests.post(
                f"{server.url}/responses", json={"model": lab("text"), **body}, timeout=20
            ).json()

        first = post(input="hi")["id"]
        post(input="x" * 17_000_000)
        assert post(input="and?", previous_response_id=first)["status"] == "completed"

    def test_signatures_outlive_large_histories(self, server):
        memory = server.memory
        asked = understood()._replace(memory=memory)
        puter._remember(asked, "call_1", call={"google": "signature"})
        for number in range(3):
            memory.put(f"history_{number}", "x" * 7_000_000)
        message = assistant(None, called("call_1"))
        assert puter._restored(message, memory)["tool_calls"][0]["extra_content"]

    def test_the_owners_name_is_not_told(self, serve, fake):
        fake.script[lab("text")] = lambda *_: refusing(403, "forbidden", "alice may not do this")
        for client in (None, puter.Puter("token-alice", api_base_url=fake.url, max_retries=0)):
            reply = post_to(serve(client), body_for())
            assert reply.status_code == 403 and "alice" not in reply.text
            if client is not None:
                client.close()


class TestOddClients:
    """What clients send besides what is documented."""

    @pytest.mark.parametrize(
        "path",
        ["/v1/chat/completions/", "//v1/chat/completions", "/v1//chat/completions", "/v1/chat/completions?x=1"],
    )  # fmt: skip
    def test_a_slash_too_many(self, server, path):
        assert raw_post(server, path, json.dumps(body_for()).encode()).ok

    def test_a_doubled_base_is_explained(self, server):
        reply = raw_post(server, "/v1/v1/messages", b"{}", **{"anthropic-version": "2023-06-01"})
        assert reply.status_code == 404 and reply.json()["type"] == "error"
        assert "leave /v1 out" in reply.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("coding", "pack", "status"),
        [
            ("gzip", gzip.compress, 200),
            ("deflate", zlib.compress, 200),
            ("identity", bytes, 200),
            ("gzip", bytes, 400),
            ("br", bytes, 415),
            ("zstd", bytes, 415),
        ],
    )
    def test_packed_bodies(self, server, coding, pack, status):
        data = pack(json.dumps(body_for()).encode())
        reply = raw_post(server, CHAT_PATH, data, **{"Content-Encoding": coding})
        assert reply.status_code == status

    def test_heads_of_refusals_and_streams(self, serve, fake):
        server = serve(api_key="schlüssel")
        for key in ("schlüssel".encode(), "schlüssel".encode("latin-1")):
            assert get_from(server, "/v1/models", Authorization=b"Bearer " + key).ok
        refused = get_from(server, "/v1/models")
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        for path, allowed in ((CHAT_PATH, "POST"), ("/v1/models", "GET, HEAD")):
            wrong = get_from(server, path, "DELETE", **{"x-api-key": b"schl\xfcssel"})
            assert (wrong.status_code, wrong.headers["Allow"]) == (405, allowed)
        head = {"Authorization": b"Bearer schl\xfcssel"}
        with post_to(server, body_for(stream=True), stream=True, **head) as streamed:
            assert streamed.headers["X-Accel-Buffering"] == "no"

    def test_long_names_of_tools_are_restored(self, server, fake):
        name = "mcp__server__" + "a_long_name_" * 6
        fake.script[lab("text")] = lambda _, args: Turn(
            calls=(tool_call("1", args["tools"][0]["function"]["name"]),), finish="tool_calls"
        )
        for stream in (False, True):
            reply = post_to(server, body_for(tools=[function_tool(name)], stream=stream))
            assert name in reply.text
            sent_name = sent_to(fake)["tools"][0]["function"]["name"]
            assert len(sent_name) <= 64 and sent_name != name
        history = [*HI, assistant(None, called("1", name)), result("1")]
        assert post_to(server, body_for(tools=[function_tool(name)], messages=history)).ok
        assert sent_name in json.dumps(sent_to(fake)["messages"]) and name not in json.dumps(
            sent_to(fake)
        )

    def test_stop_texts_and_no_limit_of_messages(self, server, fake):
        body = {"model": lab("text"), "messages": HI, "max_tokens": -1}
        body["stop_sequences"] = ["a1", "a2", "a3", "a4", "jumps"]
        answer = requests.post(f"{server.url}/messages", json=body, timeout=10).json()
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "jumps")
        assert "max_tokens" not in sent_to(fake)

    def test_what_cursor_sends(self, server, fake):
        flat = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}}
        body = {"model": lab("text"), "input": [{"role": "user", "content": "hi"}], "tools": [flat]}
        assert post_to(server, body).json()["choices"][0]["message"]["content"] == SENTENCE
        blocks = [
            user("hi"),
            assistant([text_part("so"), used("1", "get_weather", {"city": "Rome"})]),
            user([{"type": "tool_result", "tool_use_id": "1", "content": "sunny"}]),
        ]
        assert post_to(server, body_for(messages=blocks)).ok
        seen = sent_to(fake)["messages"]
        assert [m["role"] for m in seen] == ["user", "assistant", "assistant", "tool"]
        assert seen[-1]["content"] == "sunny"

    def test_only_the_given_models_are_served(self, serve, fake):
        server = serve(models=[lab("echo"), lab("text")])
        for name, served in (
            ("claude-fable-5", "echo"),
            ("", "echo"),
            ("lab/text", "text"),
            (f"{lab('text')}[1m]", "text"),
        ):
            assert post_to(server, {**body_for(), "model": name}).ok
            assert sent_to(fake)["model"].endswith(f"lab/{served}")
        assert [m["id"] for m in get_from(server, "/v1/models").json()["data"]] == [
            lab("echo"),
            lab("text"),
        ]


def kinds_in(union: Any) -> list[str]:
    """What the members of a union of typed dicts have as their type."""
    if get_origin(union) is Annotated:
        return kinds_in(get_args(union)[0])
    if get_args(union) and get_origin(union) is not Literal:
        members = [m for m in get_args(union) if m not in (str, type(None))]
        return sorted({kind for member in members for kind in kinds_in(member)})
    if hasattr(union, "model_fields"):  # what an answer held, given back as it is
        return [*get_args(union.model_fields["type"].annotation)]
    hint = get_type_hints(union, include_extras=True).get("type")
    while get_origin(hint) not in (None, Literal):
        hint = get_args(hint)[0]
    return [kind for kind in get_args(hint) if isinstance(kind, str)]


class TestArguments:
    """What a request's arguments become for each kind of provider."""

    @pytest.mark.parametrize(
        ("effort", "limit", "sent_effort"),
        [
            ("high", None, "high"),
            ("high", 8_448, "high"),
            ("high", 8_447, "medium"),
            ("high", 4_352, "medium"),
            ("high", 1_500, "low"),
            ("high", 1_280, "low"),
            ("high", 1_279, None),
            ("medium", 9_999, "medium"),
            ("low", 1_279, None),
            ("none", 10, "none"),
        ],
    )
    def test_an_effort_leaves_room_for_the_answer(self, effort, limit, sent_effort):
        args = {"messages": [user("hi")], "reasoning_effort": effort}
        args |= {"max_tokens": limit} if limit else {}
        assert (
            puter.arguments_for("claude", "claude-x", args).get("reasoning_effort") == sent_effort
        )

    @pytest.mark.parametrize(
        ("form", "name", "given", "want"),
        [
            ("responses", "o3-pro", {"reasoning_effort": "high"}, {}),
            ("responses", "gpt-5", {"reasoning_effort": "high"}, {"reasoning": {"effort": "high"}}),
            ("responses", "gpt-5", {"verbosity": "low"}, {"text": {"verbosity": "low"}}),
            ("chat", "gpt-5", {"verbosity": "low"}, {"verbosity": "low"}),
            (
                "responses",
                "gpt-5",
                {"tool_choice": NAMED},
                {"tool_choice": {"type": "function", "name": "get_time"}},
            ),
            ("chat", "gpt-5", {"tool_choice": NAMED}, {"tool_choice": NAMED}),
            *(
                (form, "m", {name: "x"}, {name: "x"} if form == "responses" else {})
                for form in ("responses", "chat", "openrouter")
                for name in puter.RESPONSES_ARGUMENTS
            ),
            ("claude", "claude-x", {}, {"temperature": 1}),
            ("claude", "claude-x", {"temperature": 0}, {"temperature": 0}),
            ("chat", "m", {}, {}),
        ],
    )
    def test_by_form(self, form, name, given, want):
        sent = puter.arguments_for(form, name, {"messages": [user("hi")], **given})
        assert {key: value for key, value in sent.items() if key != "messages"} == want

    @pytest.mark.parametrize("form", puter.FORMS)
    def test_a_name_goes_to_chat_providers_only(self, form):
        (message,) = sent_as(form, [user("hi", name="bob")])
        assert ("name" in message) is (form in ("chat", "openrouter", "openai"))

    @pytest.mark.parametrize("form", puter.FORMS)
    @pytest.mark.parametrize(
        "messages",
        [
            [{"role": "system", "content": "Be brief."}],
            [user("hi"), assistant(" \n"), user("so?")],
            [
                user("hi"),
                assistant(None, called("c", "f", '{"x": 1e400}')),
                result("c"),
                user("so?"),
            ],
            [
                user("hi"),
                assistant(None, called("c"), called("c")),
                result("c"),
                result("c"),
                user("so?"),
            ],
        ],
        ids=["systems alone", "a blank text", "infinity", "one id twice"],
    )
    def test_a_history_never_ends_for_good(self, form, messages):
        sent = sent_as(form, messages)
        json.dumps(sent, allow_nan=False)
        if form in MODEL_OF:
            assert vendor_fault(form, sent) == ""


class TestEveryKind:
    """Every block, item and tool that the vendors' packages define is read, skipped, or named."""

    def test_blocks_of_anthropic(self):
        beta = anthropic.types.beta
        kinds = kinds_in(anthropic.types.ContentBlockParam) + kinds_in(beta.BetaContentBlockParam)
        assert len(kinds) > 20 and {"text", "tool_use", "mcp_tool_use"} <= set(kinds)
        for kind in kinds:
            try:
                puter.read_message(user([{"type": kind}]), "messages[0]")
            except puter.BadRequestError as error:
                assert "not known" not in error.message, kind

    def test_items_of_openai(self):
        kinds = kinds_in(openai.types.responses.ResponseInputItemParam)
        assert len(kinds) > 20 and {"function_call", "shell_call"} <= set(kinds)
        for kind in kinds:
            item = {
                "type": kind,
                "call_id": "c",
                "name": "f",
                "role": "user",
                "id": "rs_1",
                "content": "x",
            }
            try:
                puter._item_message(item, "input[0]")
            except puter.BadRequestError as error:
                assert "not known" not in error.message, kind

    def test_parts_of_openai(self):
        kinds = kinds_in(openai.types.chat.ChatCompletionContentPartParam)
        kinds += kinds_in(openai.types.responses.ResponseInputContentParam)
        for kind in kinds:
            try:
                puter.read_part({"type": kind}, "messages[0]")
            except puter.BadRequestError as error:
                assert "not known" not in error.message, kind

    def test_tools(self):
        """A tool that a client runs is a function, or refused by its name: never dropped."""
        run_by_clients = re.compile("bash|text_editor|memory|computer|shell|apply_patch|browser")
        beta = anthropic.types.beta.BetaToolUnionParam
        for kind in {*kinds_in(anthropic.types.ToolUnionParam), *kinds_in(beta)}:
            body = {"tools": [{"type": kind, "name": "own_name"}]}
            if run_by_clients.search(kind):
                with pytest.raises(puter.BadRequestError, match=re.escape(kind)):
                    messages_request(user("hi"), **body)
            else:
                offered = [
                    t["function"]["name"] for t in messages_request(user("hi"), **body).tools
                ]
                assert offered == (["own_name"] if kind == "custom" else []), kind
        for kind in kinds_in(openai.types.responses.ToolParam):
            body = {"input": "hi", "tools": [{"type": kind, "name": "own_name", "tools": []}]}
            # the container of code_interpreter and the hosted shell are the provider's
            if run_by_clients.search(kind):
                with pytest.raises(puter.BadRequestError, match=re.escape(kind)):
                    responses_request(**body)
            else:
                offered = [t["function"]["name"] for t in responses_request(**body).tools]
                assert offered == (["own_name"] if kind in ("function", "custom") else []), kind

    def test_what_was_told_and_what_stays(self):
        call = {"type": "local_shell_call", "call_id": "c", "action": {"command": ["ls"]}}
        assert "ls" in str(puter._item_message(call, "input[0]"))
        (kept,) = puter.read_message(user([{"type": "compaction", "content": "so far"}]), "m")
        assert kept["content"] == [text_part("so far")]


# =============================================================================
# Commands: serve --openai
# =============================================================================
@contextmanager
def serving(
    fake: FakePuter, *argv: str, **env: str
) -> Iterator[tuple[subprocess.Popen[Any], str, list[str]]]:
    """A server as a process: the process, its base URL, and the lines that it printed."""
    environ = cli_env(fake, **env)
    with running_cli(fake, "serve", *argv, env=environ, text=True) as process:
        assert process.stdout
        lines = [process.stdout.readline().rstrip("\n") for _ in range(2)]
        found = re.search(r"http://\S+/v1", lines[0])
        assert found, process.stderr and process.stderr.read()
        yield process, found[0], lines


class TestServeCommand:
    """`serve`, as a process of its own."""

    @pytest.mark.parametrize(
        ("argv", "env", "key"),
        [
            ([], {}, None),
            (["--openai", "--api-key", KEY], {}, KEY),
            ([], {"PUTER_SERVER_API_KEY": KEY}, KEY),
        ],
    )
    def test_what_is_printed(self, signed_in, argv, env, key):
        with serving(signed_in, "--port", "0", *argv, **env) as (process, url, lines):
            lines.append(process.stdout.readline())
            assert lines[-1].startswith(f"{len(signed_in.catalogue)} models")
            assert url in lines[1] and "API key" in lines[1] and KEY not in "".join(lines)
            without = requests.get(f"{url}/models", timeout=5)
            assert without.status_code == (401 if key else 200)
            headers = {"Authorization": f"Bearer {key}"}
            body = {"model": lab("text"), "messages": HI}
            reply = requests.post(f"{url}/chat/completions", json=body, headers=headers, timeout=5)
            assert reply.json()["choices"][0]["message"]["content"] == SENTENCE

    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
    def test_signals(self, signed_in, name):
        with serving(signed_in, "--port", "0") as (process, url, _):
            body = {"model": lab("slow"), "messages": HI, "stream": True}
            with requests.post(
                f"{url}/chat/completions", json=body, stream=True, timeout=10
            ) as reply:
                pieces = reply.iter_content(None)
                first = next(pieces)
                process.send_signal(getattr(signal, name))
                rest = b"".join(pieces)
            assert b"line." in first + rest
            assert (first + rest).endswith(b"data: [DONE]\n\n")
            assert process.wait(5) == 0
            assert process.stderr
            assert "Traceback" not in process.stderr.read()

    def test_ctrl_c_while_it_waits_for_the_models(self, signed_in):
        signed_in.routes["GET", DETAILS] = lambda handler: handler.pause(30)
        with serving(signed_in, "--port", "0") as (process, _, _lines):
            assert eventually(lambda: any(one.path == DETAILS for one in signed_in.requests))
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0

    def test_a_second_ctrl_c_ends_what_runs(self, signed_in):
        with serving(signed_in, "--port", "0") as (process, url, _):
            assert process.stdout and process.stderr
            process.stdout.readline()  # it is ready
            body = {"model": lab("hang"), "messages": HI, "stream": True}
            thread, _ = in_background(lambda: requests.post(f"{url}/chat/completions", json=body))
            assert eventually(lambda: signed_in.open_streams == 1)
            process.send_signal(signal.SIGINT)
            assert "Stopping" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130
            assert "Traceback" not in process.stderr.read()
            thread.join(5)

    def test_a_port_in_use(self, signed_in):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            done = run_cli(signed_in, "serve", "--port", port, apart=True)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert f"127.0.0.1:{port}" in done.stderr and "in use" in done.stderr

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["--host", "0.0.0.0"], "--api-key"),
            (["--host", "no.such.host.invalid", "--api-key", KEY], "Cannot listen"),
            (["--port", "70000"], "invalid number from 0 to 65535 value"),
            (["--max-connections", "0"], "invalid number, 1 or more, value"),
            (["--port", "-1"], "--port"),
            (["--port", "x"], "--port"),
            (["--mcp"], "not allowed with"),
        ],
    )
    def test_what_cannot_be(self, signed_in, argv, words):
        done = run_cli(signed_in, "serve", "--openai", *argv, apart=True)
        assert done.returncode in (1, 2) and done.stdout == ""
        assert words in done.stderr and "Traceback" not in done.stderr
        assert KEY not in done.stderr

    def test_nobody_signed_in_and_no_puter(self, fake, home):
        dead = f"http://127.0.0.1:{free_port()}"
        with serving(fake, "--port", "0", PUTER_API_BASE_URL=dead) as (process, url, _):
            assert process.stdout and process.stderr
            assert "login" in process.stdout.readline()
            assert "model list" in process.stderr.readline()
            assert requests.get(url.removesuffix("v1") + "health", timeout=5).ok
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 0

    def test_origins_and_hosts(self, signed_in):
        origins = ["https://a.example", "https://b.example"]
        hosts = ["puter.example", "host.docker.internal"]
        argv = [word for origin in origins for word in ("--allow-origin", origin)]
        argv += [word for host in hosts for word in ("--allow-host", host)]
        with serving(signed_in, "--port", "0", *argv) as (_, url, _lines):
            rows = [("Origin", one) for one in (*origins, "https://c.example")]
            rows += [("Host", one) for one in (*hosts, "evil.example")]
            for name, value in rows:
                reply = requests.get(f"{url}/models", headers={name: value}, timeout=5)
                assert reply.ok is (value in (*origins, *hosts))


# =============================================================================
# Helpers of the tests of MCP
# =============================================================================
VERSIONS = puter.MCP_HANDSHAKE_VERSIONS
NEWEST = "2025-11-25"
META = "io.modelcontextprotocol/"
ENVELOPE: dict[str, Any] = {f"{META}protocolVersion": "2026-07-28", f"{META}clientCapabilities": {}}
DETAILS_PATH = ("GET", "/puterai/chat/models/details")


def rpc(method: str, params: Any = None, request_id: Any = 1) -> dict[str, Any]:
    """A request; one without an id (None) is a notification."""
    message: dict[str, Any] = {"jsonrpc": "2.0", "method": method}
    message |= {} if params is None else {"params": params}
    return message if request_id is None else {**message, "id": request_id}


def tool_request(
    tool: str, arguments: Any = None, request_id: Any = 1, **meta: Any
) -> dict[str, Any]:
    """A call of a tool; `meta` is its `_meta`."""
    params: dict[str, Any] = {"name": f"puter-{tool}", "arguments": arguments or {}}
    return rpc("tools/call", {**params, **({"_meta": meta} if meta else {})}, request_id)


def lab_chat(scenario: str, request_id: Any = 1, **meta: Any) -> dict[str, Any]:
    """A chat with the model of a scenario."""
    arguments = {"message": "hi", "model": f"openrouter:lab/{scenario}"}
    return tool_request("chat", arguments, request_id, **meta)


def cancelled(request_id: Any) -> dict[str, Any]:
    """The notification that a call is to end."""
    return rpc("notifications/cancelled", {"requestId": request_id}, None)


def as_line(message: Any) -> bytes:
    """A message as it is sent; bytes are sent as they are."""
    return message if isinstance(message, bytes) else json.dumps(message).encode()


def fault_in_answer(answer: Any) -> str:
    """What is wrong with an answer by JSON-RPC 2.0, or ""."""
    if not isinstance(answer, dict) or answer.get("jsonrpc") != "2.0":
        return "no JSON-RPC 2.0"
    if "method" in answer:
        return "" if "id" not in answer else "a request"
    if ("result" in answer) == ("error" in answer) or "id" not in answer:
        return "neither result nor error, or both, or no id"
    if not isinstance(answer["id"], (str, int, type(None))):
        return "a wrong id"
    error = answer.get("error")
    if error is not None and not (
        isinstance(error["code"], int) and isinstance(error["message"], str)
    ):
        return "a wrong error"
    return "" if error or isinstance(answer["result"], dict) else "a wrong result"


def nulls_in(value: Any) -> bool:
    """Whether a null stands anywhere in the value."""
    if isinstance(value, dict):
        return any(map(nulls_in, value.values()))
    return any(map(nulls_in, value)) if isinstance(value, list) else value is None


class Talk:
    """A server in this process: what is sent to it, and what it has written."""

    def __init__(self, make_client: Callable[[], puter.Puter], **more: Any) -> None:
        self.out: list[Any] = []
        self.server = puter.McpServer(make_client, self.out.append, **more)

    def send(self, *messages: Any) -> None:
        for message in messages:
            self.server.receive(as_line(message))

    def answers(self, request_id: Any) -> list[Any]:
        """The answers to a request so far."""
        answers = [one for one in list(self.out) if "method" not in one]
        return [a for a in answers if (a["id"], type(a["id"])) == (request_id, type(request_id))]

    def ask(self, message: dict[str, Any]) -> Any:
        """The one answer to a request."""
        before = len(self.answers(message["id"]))
        self.send(message)
        assert eventually(lambda: len(self.answers(message["id"])) > before)
        return self.answers(message["id"])[-1]

    def result(self, message: dict[str, Any]) -> Any:
        """The result of a request."""
        return self.ask(message)["result"]

    def progress(self) -> list[dict[str, Any]]:
        """The params of every notification of progress so far."""
        return [one["params"] for one in list(self.out) if "method" in one]

    def initialize(self, version: str = NEWEST) -> Any:
        """Shake hands."""
        return self.result(rpc("initialize", {"protocolVersion": version}, "init"))

    def call(self, tool: str, arguments: Any = None) -> Any:
        """The structured answer of a tool, which its schema allows."""
        answer = self.result(tool_request(tool, arguments))["structuredContent"]
        schemas = {one["name"]: one["outputSchema"] for one in self.server.tools()}
        jsonschema.validate(answer, schemas[f"puter-{tool}"])
        return answer


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own, and no settings from outside."""
    others = ("XDG_CONFIG_HOME", "CLAUDE_CONFIG_DIR", "CONTINUE_GLOBAL_DIR")
    for name in list(os.environ):
        if name.startswith("PUTER_") or name in (*others, "LLM_USER_PATH"):
            monkeypatch.delenv(name)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("PUTER_CONFIG_DIR", str(tmp_path / "puter"))
    return tmp_path


@pytest.fixture
def talk(fake: FakePuter, own_home: Path) -> Iterator[Callable[..., Talk]]:
    """Starts servers in this process: `talk("alice", call_limit_s=1.0)`."""
    made: list[puter.Puter] = []
    talks: list[Talk] = []

    def start(*usernames: str, limit_s: float = 30.0, **more: Any) -> Talk:
        sign_in(fake, own_home / "puter", *usernames)
        plain = {"api_base_url": fake.url, "max_retries": 0, "fallback_enabled": False}

        def make_client() -> puter.Puter:
            made.append(puter.Puter(**{**plain, **more}))
            return made[-1]

        talks.append(Talk(make_client, call_limit_s=limit_s))
        return talks[-1]

    yield start
    for one in talks:
        one.server.close()
    for client in made:
        client.close()


NO_JSON = (
    *(b"{", b"{} {}", b"[" * 200_000, b'{"id":' + b"9" * 5000 + b"}"),
    b'{"jsonrpc":"2.0","id":1,"method":"\xff"}',
    b'{"jsonrpc":"2.0","id":NaN,"method":"ping"}',
)
NO_REQUESTS = (
    *(b"5", b"null", b'"ping"', {}, [], [rpc("ping")]),
    *(rpc("ping", None, wrong_id) for wrong_id in (True, 1.5, {})),
    {"jsonrpc": "2.0", "id": None, "method": "ping"},
)
# (line, code and id of the error; None when there is no answer)
BAD_LINES: dict[str, tuple[Any, tuple[int, Any] | None]] = {
    **{f"not JSON {n}": (line, (-32700, None)) for n, line in enumerate(NO_JSON)},
    **{f"no request {n}": (line, (-32600, None)) for n, line in enumerate(NO_REQUESTS)},
    "old JSON-RPC": ({"jsonrpc": "1.0", "id": 3, "method": "ping"}, (-32600, 3)),
    "no jsonrpc": ({"id": "x", "method": "ping"}, (-32600, "x")),
    "no method": ({"jsonrpc": "2.0", "id": 3}, (-32600, 3)),
    "method a number": ({"jsonrpc": "2.0", "id": 3, "method": 5}, (-32600, 3)),
    "params a list": (rpc("ping", [1], 3), (-32600, 3)),
    "params a text": (rpc("ping", "x", 3), (-32600, 3)),
    "unknown method": (rpc("nope", None, 3), (-32601, 3)),
    "undeclared logging": (rpc("logging/setLevel", {"level": "info"}, 3), (-32601, 3)),
    "undeclared completion": (rpc("completion/complete", {}, 3), (-32601, 3)),
    "unknown tool": (tool_request("nope", None, 3), (-32602, 3)),
    "no tool": (rpc("tools/call", None, 3), (-32602, 3)),
    **{f"tool {n}": (rpc("tools/call", {"name": n}, 3), (-32602, 3)) for n in (5, {})},
    "arguments a list": (tool_request("models", [1], 3), (-32602, 3)),
    "initialize with nothing": (rpc("initialize", None, 3), (-32602, 3)),
    "initialize with 5": (rpc("initialize", {"protocolVersion": 5}, 3), (-32602, 3)),
    "a bare discover": (rpc("server/discover", None, 3), (-32602, 3)),
    "a blank line": (b" \r\n", None),
    "a notification": (rpc("notifications/initialized", None, None), None),
    "a notification with null": ({"jsonrpc": "2.0", "method": "nope", "params": None}, None),
    "a mark of byte order alone": (b"\xef\xbb\xbf\r\n", None),
    "a call without an id": (tool_request("models", None, None), None),
    "initialize without an id": (rpc("initialize", {}, None), None),
    "an unknown notification": (rpc("nope", [5], None), None),
    "an unasked result": ({"jsonrpc": "2.0", "id": 9, "result": {}}, None),
    "an unasked error": ({"jsonrpc": "2.0", "id": 9, "error": {"code": 1}}, None),
    **{f"cancel of {n}": (cancelled(n), None) for n in (77, {}, None)},
    "cancel with a list": (rpc("notifications/cancelled", [1], None), None),
}

# (the _meta of a request, code of the error)
BAD_ENVELOPES: dict[str, tuple[dict[str, Any], int]] = {
    "version a number": ({**ENVELOPE, f"{META}protocolVersion": 5}, -32602),
    "version null": ({**ENVELOPE, f"{META}protocolVersion": None}, -32602),
    "no capabilities": ({f"{META}protocolVersion": "2026-07-28"}, -32602),
    "capabilities null": ({**ENVELOPE, f"{META}clientCapabilities": None}, -32602),
    "a later version": ({**ENVELOPE, f"{META}protocolVersion": "2027-01-01"}, -32022),
    "an earlier version": ({**ENVELOPE, f"{META}protocolVersion": NEWEST}, -32022),
}

# (tool, arguments, what the text of the failure says)
BAD_ARGUMENTS: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {}, "'message'"),
    ("chat", {"message": None}, "'message'"),
    ("chat", {"message": ""}, "nothing to send"),
    ("chat", {"message": 5}, "message is 5"),
    ("chat", {"message": "x", "modle": "y"}, "'modle'"),
    ("chat", {"message": "x", "model": 5}, "model is 5"),
    *(
        ("chat", {"message": "x", "temperature": t}, f"temperature is {t!r}")
        for t in ("warm", 2.5, True)
    ),
    *(("chat", {"message": "x", "max_tokens": n}, f"max_tokens is {n}") for n in (0, 1.5, True)),
    *(("models", {"free": value}, f"free is {value!r}") for value in ("yes", 1)),
    ("models", {"provider": ["x"]}, "provider"),
    *(("models", {"limit": limit}, f"limit is {limit}") for limit in (501, 0)),
    ("account", {"x": 1}, "'x'"),
]

# (scenario, what the text of the failure says): the hint is part of it
FAILURES = [
    ("err400", "scripted 400"),
    ("err429", "rate limit"),
    ("internal", "Internal Server Error"),
    ("midfail", "The quick brown fox"),
    ("midfail", "scripted mid-stream failure"),
    ("closed", "broke off"),
    ("html", "502"),
    ("texxt", "openrouter:lab/text"),
]


class TestMcpMessages:
    """Lines in, messages out."""

    @pytest.mark.parametrize(
        ("asked", "answered"),
        [
            *((v, v) for v in VERSIONS),
            *((v, NEWEST) for v in ("1999-01-01", "2026-07-28", "2024-10-07", "")),
            ("2025-03-26", "2024-11-05"),
        ],
    )
    def test_the_handshake(self, talk, asked, answered):
        result = talk().initialize(asked)
        assert result["protocolVersion"] == answered
        assert result["serverInfo"]["name"] == "puter"
        assert result["serverInfo"]["version"] == puter.__version__
        assert result["capabilities"]["tools"] == {}
        assert not nulls_in(result)

    @pytest.mark.parametrize("case", BAD_LINES)
    def test_bad_lines(self, talk, case):
        line, want = BAD_LINES[case]
        server = talk()
        server.send(line)
        if want is not None:
            assert eventually(lambda: server.out)
            code, request_id = want
            assert server.out[0]["error"]["code"] == code
            assert server.out[0]["id"] == request_id
        assert server.result(rpc("ping", None, "after")) == {}
        assert len(server.out) == (1 if want is None else 2)
        assert not any(map(fault_in_answer, server.out))

    @pytest.mark.parametrize("request_id", [0, -1, 2**70, "", "0", "\ud800", "日本"])
    def test_the_id_comes_back_as_it_was(self, talk, request_id):
        assert talk().ask(rpc("ping", None, request_id))["id"] == request_id
        server = talk()
        server.send(b"\xef\xbb\xbf" + as_line(rpc("ping")))  # with a byte order mark
        assert server.out[0]["result"] == {}

    @pytest.mark.parametrize("params", [None, {}, {"_meta": {}}])
    def test_the_empty_lists(self, talk, params):
        for name in ("prompts", "resources"):
            assert talk().result(rpc(f"{name}/list", params))[name] == []
        result = talk().result(rpc("resources/templates/list", params))
        assert result["resourceTemplates"] == []

    def test_the_tools_are_described(self, talk):
        tools = talk().result(rpc("tools/list"))["tools"]
        assert [t["name"] for t in tools] == ["puter-chat", "puter-models", "puter-account"]
        for tool in tools:
            assert re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", tool["name"])
            assert tool["title"] and tool["description"] and not nulls_in(tool)
            for schema in (tool["inputSchema"], tool["outputSchema"]):
                jsonschema.Draft202012Validator.check_schema(schema)
                assert schema["type"] == "object"
            assert tool["annotations"] == {
                "readOnlyHint": tool["name"] != "puter-chat",  # which spends credit
                "destructiveHint": False,
                "idempotentHint": tool["name"] != "puter-chat",
                "openWorldHint": True,
            }
        chat, models, account = (t["inputSchema"]["properties"] for t in tools)
        assert set(chat) == {"message", "model", "system", "temperature", "max_tokens"}
        assert set(models) == {"provider", "free", "search", "limit"} and not account
        assert all(one["description"] for one in (*chat.values(), *models.values()))
        bounds = [(p["minimum"], p["maximum"]) for p in (chat["temperature"], models["limit"])]
        assert bounds == [(0, 2), (1, 500)] and chat["max_tokens"]["minimum"] == 1

    # The stateless form.

    def test_the_stateless_form(self, talk):
        server = talk("alice")
        stateless = {"_meta": ENVELOPE}
        found = server.result(rpc("server/discover", stateless, "probe"))
        assert found["supportedVersions"] == ["2026-07-28", *VERSIONS[::-1]]
        listed = server.result(rpc("tools/list", stateless))
        prompts = server.result(rpc("prompts/list", stateless))
        called = server.result(lab_chat("text", **ENVELOPE))
        failed = server.result(lab_chat("internal", **ENVELOPE))
        for result in (found, listed, prompts, called, failed):
            assert result["resultType"] == "complete" and not nulls_in(result)
            info = result["_meta"][f"{META}serverInfo"]
            assert (info["name"], info["version"]) == ("puter", puter.__version__)
        for result in (found, listed, prompts):
            assert type(result["ttlMs"]) is int and result["ttlMs"] >= 0
            assert result["cacheScope"] in ("public", "private")
        assert called["structuredContent"]["text"] == SENTENCE and failed["isError"]
        assert server.result(rpc("ping")) == {}
        assert server.initialize()["protocolVersion"] == NEWEST

    @pytest.mark.parametrize("method", ["tools/list", "server/discover", "tools/call"])
    @pytest.mark.parametrize("case", BAD_ENVELOPES)
    def test_bad_envelopes(self, talk, case, method):
        meta, code = BAD_ENVELOPES[case]
        params = {"_meta": meta, "name": "puter-models"}
        error = talk().ask(rpc(method, params))["error"]
        assert error["code"] == code
        if code == -32022:
            assert error["data"]["requested"] == meta[f"{META}protocolVersion"]
            assert error["data"]["supported"] == ["2026-07-28", *VERSIONS[::-1]]

    # The tools.

    @pytest.mark.parametrize(
        "scenario",
        [
            *("text", "reason", "length", "nousage", "anthropic", "openaiusage"),
            *("unicode", "long", "fake", "echo", "tools", "flaky", "empty"),
        ],
    )
    def test_a_chat_answers_in_text_and_in_structure(self, talk, scenario):
        server = talk("alice", max_retries=1, retry_delay_ms=1)
        model = "fake" if scenario == "fake" else f"openrouter:lab/{scenario}"
        request = tool_request("chat", {"message": "hi", "model": model, "temperature": 1})
        result = server.result(request)
        if result["isError"]:
            assert scenario in ("empty", "tools")
            return
        answer = result["structuredContent"]
        jsonschema.validate(answer, server.server.tools()[0]["outputSchema"])
        assert result["content"] == [{"type": "text", "text": answer["text"]}]
        assert answer["account"] == "alice" and answer["partial"] is False
        if scenario == "unicode":
            assert answer["text"] == ODD_TEXT
        if scenario == "reason":
            assert answer["reasoning"] == "thinking..."

    def test_what_a_chat_sends(self, talk, fake):
        server = talk("alice", default_model="openrouter:lab/echo")
        arguments = {"message": "hi", "system": "Be short.", "temperature": 0, "max_tokens": 7}
        assert not server.result(tool_request("chat", {**arguments, "model": None}))["isError"]
        seen = fake.requests[-1]
        assert seen.model == "openrouter:lab/echo" and seen.args["stream"] is True
        assert (seen.args["temperature"], seen.args["max_tokens"]) == (0, 7)
        assert [m["role"] for m in seen.args["messages"]] == ["system", "user"]

    @pytest.mark.parametrize(("tool", "arguments", "words"), BAD_ARGUMENTS)
    def test_bad_arguments_are_reported(self, talk, fake, tool, arguments, words):
        result = talk("alice").result(tool_request(tool, arguments))
        assert result["isError"] and words in result["content"][0]["text"]
        assert not fake.requests

    @pytest.mark.parametrize(
        "arguments",
        [
            {"temperature": 2, "max_tokens": 1},
            {"temperature": 0.5, "system": "", "model": ""},
            {"max_tokens": 100.0, "temperature": None},
        ],
    )
    def test_what_the_schema_takes_is_taken(self, talk, arguments):
        server = talk("alice", default_model="openrouter:lab/text")
        assert server.call("chat", {"message": "x", **arguments})["text"] == SENTENCE

    @pytest.mark.parametrize(("scenario", "words"), FAILURES)
    def test_failures_are_reported_with_their_hint(self, talk, scenario, words):
        result = talk("alice").result(lab_chat(scenario))
        text = result["content"][0]["text"]
        assert result["isError"] and words in text and "structuredContent" not in result

    @pytest.mark.parametrize(
        ("arguments", "ids"),
        [
            ({"provider": "gemini"}, ["gemini-2.5-flash"]),
            ({"search": "OPUS"}, ["claude-opus-4-5-20251101"]),
            ({"search": "no such model"}, []),
            *(({"free": free, "provider": "groq"}, ["allam-2-7b"]) for free in (True, None)),
            ({"free": False, "provider": "groq"}, []),
        ],
    )
    def test_the_models(self, talk, arguments, ids):
        result = talk().result(tool_request("models", arguments))
        answer = result["structuredContent"]
        assert [m["id"] for m in answer["models"]] == ids and answer["count"] == len(ids)
        assert all(name in result["content"][0]["text"] for name in ids)

    def test_long_lists_of_models_are_cut_short(self, talk, fake):
        prices = {"costs": {"tokens": 1_000_000, "prompt_tokens": 5, "completion_tokens": 10}}
        paid = [{"id": f"m{n}", "provider": "x", **prices} for n in range(600)]
        fake.catalogue = [*paid, {"id": "unpriced", "provider": "x"}, *fake.catalogue]
        total, server = len(fake.catalogue), talk()
        for arguments, count in (({}, 50), ({"limit": 500}, 500), ({"limit": 3}, 3)):
            answer = server.call("models", arguments)
            assert (answer["count"], answer["total"]) == (count, total) and "more" in answer
            assert len(answer["models"]) == count and answer["models"][0]["free"]
            assert sorted((m["free"] for m in answer["models"]), reverse=True)
        result = server.result(tool_request("models"))
        assert "50 of" in result["content"][0]["text"] and len(json.dumps(result)) < 12_000
        assert "more" not in server.call("models", {"search": "m59", "free": False})
        result = server.result(tool_request("models", {"search": "unpriced"}))
        assert result["structuredContent"]["models"] == [{"id": "unpriced", "free": False}]
        assert "$0" not in result["content"][0]["text"]

    def test_the_accounts(self, talk, fake):
        server = talk("alice", "bob", "carol")
        fake.accounts["token-bob"].dead = True
        rows = {row["username"]: row for row in server.call("account")["accounts"]}
        assert list(rows) == ["alice", "bob", "carol"]
        assert [row["active"] for row in rows.values()] == [True, False, False]
        assert rows["alice"]["remaining"] == 0.25 and rows["alice"]["unit"] == "usd"
        assert rows["bob"]["error"] and rows["carol"]["error"] is None
        result = server.result(tool_request("account"))
        assert "alice: $0.2500" in result["content"][0]["text"]
        assert "token-" not in json.dumps(result)

    @pytest.mark.parametrize("network", [True, False])
    def test_nobody_is_signed_in(self, talk, fake, network):
        if not network:
            fake.stop()
        server = talk()
        account = server.result(tool_request("account"))
        assert account["structuredContent"] == {"accounts": []}
        assert "puter login" in account["content"][0]["text"]
        assert server.result(lab_chat("text"))["isError"]
        models = server.result(tool_request("models"))
        assert models["isError"] is not network

    def test_a_fault_ends_one_request_only(self, own_home):
        result = Talk(lambda: puter.Puter(max_retries=-5)).result(tool_request("account"))
        assert result["isError"] and "max_retries" in result["content"][0]["text"]
        for fault in ({}.popitem, lambda: len(5)):  # of ours: a TypeError is none of the arguments
            server = Talk(fault)
            answer = server.ask(tool_request("account"))
            assert answer["error"]["code"] == -32603 and "popitem" not in json.dumps(answer)
            assert server.result(rpc("ping")) == {}

    # Progress, cancelling, time.

    def test_progress_rises_and_ends_with_the_answer(self, talk, monkeypatch):
        monkeypatch.setattr(puter, "_MCP_TICK_S", 0.01)
        server = talk("alice", limit_s=0.2)
        whole = server.result(lab_chat("slow", 7, progressToken="t"))
        assert whole["structuredContent"]["text"] == SENTENCE  # progress lifts the limit
        server.ask(lab_chat("slow", 8))
        time.sleep(0.05)
        told = [params["progress"] for params in server.progress()]
        assert len(told) > 5 and told == sorted(set(told))
        assert {params["progressToken"] for params in server.progress()} == {"t"}
        last = max(i for i, one in enumerate(server.out) if "method" in one)
        assert last < server.out.index(server.answers(7)[0])

    def test_no_progress_without_a_good_token(self, talk, monkeypatch):
        monkeypatch.setattr(puter, "_MCP_TICK_S", 0.01)
        server, tokens = talk("alice"), (None, True, 1.5, {}, [])
        server.send(*(lab_chat("slow", n, progressToken=t) for n, t in enumerate(tokens)))
        assert eventually(lambda: len(server.out) == len(tokens))
        assert not any(one["result"]["isError"] for one in server.out) and not server.progress()

    @pytest.mark.parametrize("scenario", ["slow", "hang"])
    @pytest.mark.parametrize("request_id", [0, 5, "five"])
    def test_a_cancelled_call_ends_at_once(self, talk, fake, scenario, request_id):
        server = talk("alice")
        server.send(lab_chat(scenario, request_id, progressToken=1))
        assert eventually(lambda: fake.open_streams == 1)
        other: Any = str(request_id) if isinstance(request_id, int) else 5
        server.send(cancelled(other))
        time.sleep(0.05)
        assert fake.open_streams == 1
        server.send(cancelled(request_id))
        assert eventually(lambda: fake.open_streams == 0, 2.0)
        server.send(cancelled(request_id))
        assert server.result(rpc("ping", None, "after")) == {}
        time.sleep(0.1)
        assert not server.answers(request_id)
        assert not server.result(lab_chat("text", request_id))["isError"]
        server.send(cancelled(request_id))
        assert server.result(rpc("ping", None, "after")) == {}

    def test_a_cancel_of_true_is_none_of_number_one(self, talk, fake):
        server = talk("alice")
        server.send(lab_chat("hang", 1))
        assert eventually(lambda: fake.open_streams == 1)
        server.send(cancelled(True))
        time.sleep(0.05)
        assert fake.open_streams == 1
        server.send(cancelled(1))
        assert eventually(lambda: fake.open_streams == 0)

    def test_a_long_answer_is_cut_and_says_so(self, talk, fake):
        fake.script[lab("text")] = says("x" * 1_200_000)
        answer = talk("alice").result(lab_chat("text"))
        (content,) = answer["content"]
        assert len(content["text"]) < 1_000_100 and content["text"].endswith("[cut off here]")
        assert answer["structuredContent"]["partial"] is True

    @posix_only
    def test_at_a_terminal_it_says_what_it_waits_for(self, desk):
        with at_terminal(desk, "serve", "--mcp") as terminal:
            terminal.expect("Waiting for an MCP client", 3.0)
            terminal.send("\x03")
            terminal.end()

    def test_a_call_that_waits_for_headers_is_cancelled(self, talk, fake):
        gone = threading.Event()

        def silent(handler: Any, args: dict[str, Any]) -> None:
            try:
                handler.pause(30.0)
            finally:
                gone.set()

        fake.script["openrouter:lab/hang"] = silent
        server = talk("alice")
        server.send(lab_chat("hang", 5))
        assert eventually(lambda: len(fake.chat_calls()) == 1)
        server.send(cancelled(5))
        assert gone.wait(2.0) and not server.answers(5)

    def test_calls_run_side_by_side_and_those_in_line_are_cancelled(self, talk, fake):
        server = talk("alice", max_concurrent=2)
        server.send(*(lab_chat("hang", number) for number in range(4)))
        assert eventually(lambda: fake.open_streams == 2)
        assert server.result(rpc("ping", None, "meanwhile")) == {}
        assert server.result(tool_request("models", None, "list"))["content"]
        server.send(*(cancelled(number) for number in range(4)))
        assert eventually(lambda: fake.open_streams == 0)
        assert not server.result(lab_chat("text", "next"))["isError"]
        assert not any(server.answers(number) for number in range(4))

    def test_a_cancel_right_behind_its_call_counts(self, talk, monkeypatch):
        run = puter.McpServer._run_call

        def late(*args: Any) -> None:
            time.sleep(0.1)
            run(*args)

        monkeypatch.setattr(puter.McpServer, "_run_call", late)
        server = talk("alice")
        server.send(lab_chat("text", 5), cancelled(5), lab_chat("text", 6))
        assert eventually(lambda: server.answers(6))
        time.sleep(0.2)
        assert not server.answers(5)

    def test_closing_waits_for_the_calls_and_ends_those_that_are_late(self, talk, fake):
        server = talk("alice")
        server.send(lab_chat("slow", "slow"), *(lab_chat("hang", number) for number in range(2)))
        assert eventually(lambda: fake.open_streams == 3)
        server.server.close(1.5)
        assert server.answers("slow")[0]["result"]["structuredContent"]["text"] == SENTENCE
        assert all(server.answers(number)[0]["result"]["isError"] for number in range(2))
        assert eventually(lambda: fake.open_streams == 0, 2.0)

    def test_a_call_at_the_limit_gives_what_there_is(self, talk, fake):
        server = talk("alice", limit_s=0.2)
        result = server.result(lab_chat("slow"))
        told = result["structuredContent"]
        jsonschema.validate(told, server.server.tools()[0]["outputSchema"])
        assert told["partial"] and told["finish_reason"] == "length"
        assert told["text"].startswith("The quick") and "cut off" in told["text"]
        assert SENTENCE not in told["text"] and not result["isError"]
        assert result["content"][0]["text"] == told["text"]
        result = talk("alice", limit_s=0.2).result(lab_chat("hang"))
        assert result["isError"] and "No answer came" in result["content"][0]["text"]
        assert eventually(lambda: fake.open_streams == 0)

    @pytest.mark.parametrize("tool", ["models", "account"])
    def test_every_tool_answers_at_the_limit(self, talk, fake, tool):
        for route in (DETAILS_PATH, ("GET", "/metering/usage")):
            fake.routes[route] = lambda handler: handler.pause(2.5)
        server = talk("alice", limit_s=0.2)
        server.send(tool_request(tool, None, 5))
        assert eventually(lambda: server.answers(5), 1.0)


# =============================================================================
# The MCP server as a command
# =============================================================================
class McpProcess:
    """`python -m puter serve --mcp`, and the lines that it has written."""

    def __init__(self, env: Mapping[str, str], *command: str) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command or mcp_argv(), stdin=pipe, stdout=pipe, stderr=pipe, env=dict(env)
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.stderr = self.process.stderr
        self.lines: queue.Queue[bytes] = queue.Queue()

    def read(self) -> None:
        """Reads what comes, in a thread."""

        def work() -> None:
            for line in self.stdout:
                self.lines.put(line)

        threading.Thread(target=work, daemon=True).start()

    def send(self, *messages: Any) -> None:
        self.stdin.write(b"".join(as_line(message) + b"\n" for message in messages))
        self.stdin.flush()

    def next(self, timeout_s: float = 10.0) -> Any:
        """The next message."""
        return json.loads(self.lines.get(timeout=timeout_s))

    def until(self, request_id: Any) -> list[Any]:
        """All messages up to the answer to a request."""
        found: list[Any] = []
        while not found or found[-1].get("id") != request_id:
            found.append(self.next())
        return found

    def end(self, timeout_s: float = 2.0) -> tuple[int, bytes]:
        """Ends its input; gives exit code and stderr. It must end in time."""
        self.stdin.close()
        code = self.process.wait(timeout_s)
        return code, self.stderr.read()


def mcp_argv() -> list[str]:
    """How the server is started here."""
    return [sys.executable, "-m", "puter", "serve", "--mcp"]


@pytest.fixture
def mcp_env(fake: FakePuter, own_home: Path) -> dict[str, str]:
    """The near-empty environment in which other programs start the server."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(puter.__file__).resolve().parent),
        "HOME": str(own_home),
        "LANG": "C",
        "PYTHONIOENCODING": "ascii",
        "PYTHONDONTWRITEBYTECODE": "1",
        **({"SYSTEMROOT": os.environ["SYSTEMROOT"]} if os.name == "nt" else {}),
        "PUTER_CONFIG_DIR": str(own_home / "puter"),
        "PUTER_API_BASE_URL": fake.url,
        "PUTER_AUTH_TOKEN": "token-alice",
    }


@pytest.fixture
def start_mcp(mcp_env: dict[str, str]) -> Iterator[Callable[..., McpProcess]]:
    """Starts the command: `start_mcp(PUTER_DEBUG="1")`."""
    made: list[McpProcess] = []

    def start(*command: str, **env: str) -> McpProcess:
        made.append(McpProcess({**mcp_env, **env}, *command))
        return made[-1]

    yield start
    for one in made:
        one.process.kill()
        one.process.wait()
        for stream in (one.stdin, one.stdout, one.stderr):
            with suppress(OSError):
                stream.close()


def mutated(rand: random.Random) -> Any:
    """A valid message with something wrong in it, as an object or as bytes."""
    odd: list[Any] = [
        *(None, True, 0, -1, 1.5, 2**70, "", "x", "\ud800", [], {}, [[]]),
        *({"a": None}, "tools/call", "2.0", "2026-07-28", 1e300),
    ]
    valid: list[Any] = [
        *(rpc("initialize", {"protocolVersion": one}) for one in (NEWEST, "2025-03-26")),
        *(rpc(f"{method}/list", {"cursor": None}) for method in ("tools", "prompts")),
        *(rpc(method, {"_meta": ENVELOPE}) for method in ("server/discover", "tools/list")),
        rpc("notifications/initialized", None, None),
        rpc("ping"),
        tool_request("account", {"a": 1}, 3, progressToken=4),
        tool_request("models", {"search": 5}, "3"),
        tool_request("chat", {"temperature": 1}, 3, **ENVELOPE),
        cancelled(3),
        [rpc("ping"), rpc("tools/list", None, 2)],
        {"jsonrpc": "2.0", "id": 1, "result": {}},
    ]
    message = copy.deepcopy(rand.choice(valid))
    for _ in range(rand.randint(1, 3)):
        place: Any = message
        while True:
            keys = list(place if isinstance(place, dict) else range(len(place)))
            if not keys:
                break
            key = rand.choice(keys)
            deeper = place[key]
            if not isinstance(deeper, (dict, list)) or rand.random() < 0.4:
                if rand.random() < 0.3:
                    del place[key]
                else:
                    place[key] = json.loads(json.dumps(rand.choice(odd)))
                break
            place = deeper
    line = bytearray(json.dumps(message).encode())
    if rand.random() < 0.3:
        for _ in range(rand.randint(1, 3)):
            at = rand.randrange(len(line) + 1)
            line[at : at + rand.randint(0, 2)] = rand.randbytes(rand.randint(0, 2))
    return bytes(line).replace(b"\n", b" ")


class TestMcpCommand:
    """Real pipes."""

    @pytest.mark.parametrize("debug", ["0", "1"])
    def test_only_messages_in_utf8_reach_stdout(self, start_mcp, debug):
        server = start_mcp(PUTER_DEBUG=debug)
        server.read()
        server.send(rpc("initialize", {"protocolVersion": NEWEST}, 0))
        assert server.next()["result"]["protocolVersion"] == NEWEST
        server.send(b'{"jsonrpc":"2.0","method":"notifications/initialized"}\r')
        odd = "naïve 日本語 🦊 \u2028 \x85 end"
        arguments = {"message": odd, "model": "openrouter:lab/echo"}
        sent = json.dumps(tool_request("chat", arguments, 1), ensure_ascii=False)
        server.send(b"", sent.encode(), b"\xff\xfe", b"{", rpc("ping", None, 2))
        answers = {one["id"]: one for one in (server.next() for _ in range(4))}
        assert answers[1]["result"]["content"][0]["text"] == odd
        assert answers[2]["result"] == {} and answers[None]["error"]["code"] == -32700
        code, log = server.end()
        assert (code, server.lines.qsize()) == (0, 0)
        assert (b"Request" in log) is (debug == "1") and b"Traceback" not in log

    def test_it_starts_without_account_and_network(self, start_mcp, fake, own_home):
        fake.stop()
        server = start_mcp(PUTER_AUTH_TOKEN="", PUTER_MAX_RETRIES="0")
        server.read()
        server.send(
            rpc("initialize", {"protocolVersion": "2025-06-18"}, 1), rpc("tools/list", None, 2)
        )
        assert [server.next()["id"] for _ in range(2)] == [1, 2]
        server.send(tool_request("account", None, 3), lab_chat("text", 4))
        server.send(tool_request("models", None, 5))
        answers = {one["id"]: one["result"] for one in (server.next() for _ in "345")}
        assert answers[3]["structuredContent"] == {"accounts": []}
        assert answers[4]["isError"] and answers[5]["isError"]
        assert server.end()[0] == 0

    def test_calls_in_flight_are_answered_after_the_end_of_input(self, start_mcp):
        assert start_mcp().end() == (0, b"")
        server = start_mcp()
        server.send(*(lab_chat("slow", number) for number in range(5)))
        code, log = server.end(15.0)
        answers = [json.loads(line) for line in server.stdout]
        assert sorted(answer["id"] for answer in answers) == list(range(5))
        assert not any(answer["result"]["isError"] for answer in answers)
        assert (code, log) == (0, b"")

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
    @pytest.mark.parametrize("waits", [False, True])
    def test_ctrl_c_ends_it_at_once_and_quietly(self, start_mcp, fake, waits):
        server = start_mcp()
        server.send(lab_chat("hang"))
        assert eventually(lambda: fake.open_streams == 1)
        if waits:
            server.stdin.close()
            time.sleep(0.2)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(2.0) == -signal.SIGINT and server.stderr.read() == b""
        assert eventually(lambda: fake.open_streams == 0)

    @pytest.mark.skipif(os.name == "nt", reason="the shell of Unix closes the streams")
    @pytest.mark.parametrize(
        ("closed", "code", "says"), [("<&-", 0, b""), (">&-", 1, b"closed"), ("2>&-", 0, b"")]
    )
    def test_closed_streams_are_a_clear_end(self, mcp_env, closed, code, says):
        shell = ["sh", "-c", f"{shlex.join(mcp_argv())} {closed}"]
        ping = as_line(rpc("ping"))
        done = subprocess.run(shell, check=False, env=mcp_env, input=ping, capture_output=True)
        assert done.returncode == code and says in done.stderr and b"Traceback" not in done.stderr
        assert bool(done.stdout) is (closed == "2>&-")

    def test_it_ends_with_its_input_when_nobody_reads(self, start_mcp):
        server = start_mcp()
        server.send(*(rpc("tools/list", None, number) for number in range(100)))
        time.sleep(0.2)
        assert server.end()[0] == 0

    @pytest.mark.parametrize("message", [rpc("ping"), tool_request("models")])
    def test_a_broken_stdout_ends_it_quietly(self, start_mcp, message):
        server = start_mcp()
        server.stdout.close()
        server.send(*[message] * 3)
        assert server.process.wait(5.0) == 0 and server.stderr.read() == b""

    def test_a_thousand_mutations(self, start_mcp):
        rand = random.Random(12)
        server = start_mcp(PUTER_MAX_RETRIES="0")
        server.read()
        lines = [mutated(rand) for _ in range(1000)]
        server.send(*lines, rpc("ping", None, "the last"))
        count, ended = 0, False
        while not ended:
            answer = server.next()
            count += 1
            assert fault_in_answer(answer) == "", answer
            ended = isinstance(answer, dict) and answer.get("id") == "the last"
        assert count > 500
        server.send(rpc("ping", None, "still here"))
        assert server.until("still here")[-1]["result"] == {}
        assert server.process.poll() is None

    # The official SDK.

    @pytest.mark.parametrize(
        ("asked", "version"),
        [(NEWEST, NEWEST), ("2025-03-26", "2024-11-05"), ("2024-11-05", "2024-11-05")],
    )
    def test_the_session_of_the_sdk(self, mcp_env, fake, monkeypatch, asked, version):
        session_module = sys.modules[mcp.ClientSession.__module__]
        if not hasattr(session_module, "LATEST_HANDSHAKE_VERSION"):
            pytest.skip("mcp 1.x names its version elsewhere")
        monkeypatch.setattr(session_module, "LATEST_HANDSHAKE_VERSION", asked)
        fake.script[lab("slow")] = says(pause_s=0.1)
        progress: list[float] = []

        async def heard(done: float, total: float | None, text: str | None) -> None:
            progress.append(done)

        async def visit() -> dict[str, Any]:
            command, *args = mcp_argv()
            parameters = mcp.StdioServerParameters(command=command, args=args, env=mcp_env)
            async with (
                stdio_client(parameters) as (read, write),
                mcp.ClientSession(read, write) as session,
            ):
                chat = {"message": "hi", "model": lab("slow" if version == NEWEST else "text")}
                results: dict[str, Any] = {
                    "init": await session.initialize(),
                    "tools": await session.list_tools(),
                    "models": await session.call_tool("puter-models", {"free": True}),
                    "account": await session.call_tool("puter-account", {}),
                    "chat": await session.call_tool("puter-chat", chat, progress_callback=heard),
                    "wrong": await session.call_tool("puter-chat", {}),
                }
                return {k: v.model_dump(by_alias=True, mode="json") for k, v in results.items()}

        results = anyio.run(visit)
        assert results["init"]["protocolVersion"] == version
        assert len(results["tools"]["tools"]) == 3
        assert results["chat"]["content"][0]["text"] == SENTENCE
        assert progress == sorted(set(progress)) and (progress or version != NEWEST)
        assert results["wrong"]["isError"] and not results["models"]["isError"]
        if version == NEWEST:
            models = results["models"]["structuredContent"]["models"]
            assert len(models) == 5 and all(model["free"] for model in models)
            accounts = results["account"]["structuredContent"]["accounts"]
            assert [row["remaining"] for row in accounts] == [0.25]

    @pytest.mark.skipif(not hasattr(mcp, "Client"), reason="mcp 1.x has no Client")
    @pytest.mark.parametrize(
        ("mode", "version"),
        [("auto", "2026-07-28"), ("legacy", NEWEST), ("2026-07-28", "2026-07-28")],
    )
    def test_the_client_of_the_sdk(self, mcp_env, fake, mode, version):
        async def visit() -> list[Any]:
            command, *args = mcp_argv()
            parameters = mcp.StdioServerParameters(command=command, args=args, env=mcp_env)
            async with mcp.Client(parameters, mode=mode) as client:
                tools = await client.list_tools()
                arguments = {"message": "hi", "model": "openrouter:lab/text"}
                chat = await client.call_tool("puter-chat", arguments)
                wrong = await client.call_tool("puter-chat", {})
                hang = {**arguments, "model": "openrouter:lab/hang"}
                with anyio.move_on_after(0.5):
                    await client.call_tool("puter-chat", hang)
                with anyio.move_on_after(5):
                    while fake.open_streams:
                        await anyio.sleep(0.01)
                left = fake.open_streams
                return [client.protocol_version, tools, chat, wrong, left]

        got, tools, chat, wrong, left = anyio.run(visit)
        assert got == version and len(tools.tools) == 3
        assert chat.structured_content["text"] == SENTENCE and wrong.is_error
        assert left == 0


# =============================================================================
# Other programs
# =============================================================================
MODELS = [
    puter.Model(
        "claude-opus-4-5",
        "Claude Opus 4.5",
        "claude",
        ("anthropic/claude-opus-4-5",),
        *(200_000, 64_000, ("text", "image", "pdf", "smell"), True),
    ),
    puter.Model("openrouter:a/b:free", 'A "B": #1 🦊', "openrouter", free=True),
    puter.Model("gpt-5-mini", "GPT-5 mini", "openai", ("openai/gpt-5-mini",), 400, 128),
    puter.Model("old", "Old", "groq", (), 4096, 4096, ("text",), False),
]
URL = "http://127.0.0.1:11480/v1"
SLOTS = ("OPUS", "SONNET", "HAIKU")
PROGRAMS = tuple(puter.PROGRAMS)


@pytest.fixture
def config(fake: FakePuter, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `config` with arguments, in this process."""
    monkeypatch.setenv("PUTER_API_BASE_URL", fake.url)
    return lambda *args: puter.main(["config", *args])


def texts_of(
    program: str, models: list[puter.Model] | None = None, key: str | None = None
) -> list[str]:
    """What goes into the files of a program."""
    variable = "PUTER_SERVER_API_KEY" if key else None
    setup = puter.Setup(MODELS if models is None else models, url=URL, key_variable=variable)
    return [puter._file_text(*file) for file in puter.PROGRAMS[program].files(setup).items()]


def files_of(program: str) -> tuple[str, ...]:
    """The names of the files of a program."""
    return tuple(puter.PROGRAMS[program].files(puter.Setup(MODELS)))


def settings_of(program: str, key: str | None = None) -> Any:
    """The last of these as the program reads it."""
    text = texts_of(program, key=key)[-1]
    if program == "codex":
        return pytest.importorskip("tomllib").loads(text)
    return yaml_of(text) if program in ("continue", "llm") else json.loads(text)


def yaml_of(text: str) -> Any:
    """The value of the YAML that is printed: plain keys, and items that are JSON."""
    whole: JSON = {}
    items: list[Any] = []
    for line in text.splitlines():
        if line.lstrip().startswith("- "):
            items.append(json.loads(line.lstrip()[2:]))
        else:
            key, _, value = line.partition(": ") if ": " in line else (line[:-1], "", "")
            items = []
            whole[key] = value or items
    return whole or items


class TestConfigCommand:
    """The settings, and those of other programs."""

    def test_show_and_path(self, config, own_home, monkeypatch, capsys):
        assert config("path") == 0
        path = Path(capsys.readouterr().out.strip())
        assert path == own_home / "puter" / "puter.json"
        path.parent.mkdir()
        text = '{"max_retries": 5, "default_model": "é🦊", "openai_api_key": "secret-key"}'
        path.write_text(text, "utf-8")
        monkeypatch.setenv("PUTER_DEBUG", "0")
        assert config("show", "--json") == 0
        told = json.loads(capsys.readouterr().out)
        names = set(puter.Config.__dataclass_fields__) - {"folder", "sources", "ignored"}
        assert set(told) == names
        assert told["max_retries"] == {"value": 5, "source": str(path)}
        assert told["debug"] == {"value": False, "source": "PUTER_DEBUG"}
        assert told["quiet_mode"] == {"value": False, "source": "default"}
        assert isinstance(told["fallback_models"]["value"], list)
        assert config("show") == 0
        lines = capsys.readouterr().out.splitlines()
        assert {line.split()[0] for line in lines[1:]} == names
        assert "secret-key" not in "".join(lines) + json.dumps(told)
        assert any(re.match(r"default_model +\"é🦊\" +/", line) for line in lines)

    def test_wrong_settings_end_show(self, config, monkeypatch, capsys):
        monkeypatch.setenv("PUTER_MAX_RETRIES", "many")
        assert config("show") == 2
        assert "PUTER_MAX_RETRIES" in capsys.readouterr().err

    @pytest.mark.parametrize("program", PROGRAMS)
    def test_the_text_goes_to_stdout_alone(self, config, program, own_home, capsys):
        assert config(program, "--search", "opus") == 0
        shown = capsys.readouterr()
        for file in files_of(program):
            assert f"# {file}\n" in shown.err
        has_models = program != "claude-desktop"
        assert ("python -m puter serve\n" in shown.err) is has_models
        assert ("claude-opus-4-5-20251101" in shown.out) is has_models
        assert "allam" not in shown.out and set(os.listdir(own_home)) <= {"puter"}
        assert config(program, "--search", "opus", "--json") == 0
        files = json.loads(capsys.readouterr().out)
        assert "".join(one["text"] for one in files) == shown.out
        assert tuple(one["file"] for one in files) == files_of(program)

    @pytest.mark.parametrize("program", ["continue", "llm", "codex", "claude-code"])
    def test_no_model_is_nothing_to_print(self, config, program, capsys):
        assert config(program, "--search", "no such model") == 1
        shown = capsys.readouterr()
        assert shown.out == "" and "No models match" in shown.err

    @pytest.mark.parametrize("program", [p for p in PROGRAMS if p not in ("aider", "llm")])
    @pytest.mark.parametrize("folder", [None, 'a "b" folder'])
    def test_the_mcp_server_knows_the_folder(self, own_home, monkeypatch, program, folder):
        wanted = {"PUTER_CONFIG_DIR": str(own_home / folder)} if folder else {}
        monkeypatch.delenv("PUTER_CONFIG_DIR")
        for name, value in wanted.items():
            monkeypatch.setenv(name, value)
        settings = settings_of(program)
        keys = ("mcp", "mcpServers", "mcp_servers", "context_servers")
        servers = next(settings[key] for key in keys if key in settings)
        server = servers[0] if program == "continue" else servers["puter"]
        command = server["command"]
        whole = command if isinstance(command, list) else [command, *server["args"]]
        assert whole == puter.mcp_command() and Path(whole[0]).is_absolute()
        assert server.get("env", server.get("environment", {})) == wanted
        assert server.get("type", "stdio") in ("stdio", "local")

    def test_opencode(self, own_home):
        settings = settings_of("opencode", "k")
        assert settings["$schema"] == "https://opencode.ai/config.json"
        provider = settings["provider"]["puter"]
        assert provider["npm"] == "@ai-sdk/openai-compatible"
        key = "{env:PUTER_SERVER_API_KEY}"
        assert provider["options"] == {"baseURL": URL, "apiKey": key}
        opus, free, *_ = provider["models"].values()
        assert opus["modalities"]["input"] == ["text", "image", "pdf"]
        assert opus["limit"] == {"context": 200_000, "output": 64_000}
        assert "limit" not in free and free["modalities"]["input"] == ["text"]

    def test_zed(self, own_home):
        provider = settings_of("zed", "k")["language_models"]["openai_compatible"]["puter"]
        assert provider["api_url"] == URL
        for model in provider["available_models"]:
            assert set(model) == {"name", "display_name", "max_tokens"}

    @pytest.mark.parametrize(("key", "shown"), [(None, "puter"), ("k", '"$PUTER_SERVER_API_KEY"')])
    def test_claude_code(self, own_home, key, shown):
        model = replace(MODELS[0], id="it's a/model:free")
        exports = texts_of("claude-code", [model], key)[0]
        assert f"export ANTHROPIC_AUTH_TOKEN={shown}\n" in exports
        script = exports + "env"
        if os.name == "nt":
            return
        out = subprocess.check_output(["sh", "-c", script], env={"PUTER_SERVER_API_KEY": "k"})
        variables = dict(line.split("=", 1) for line in out.decode().splitlines())
        assert variables["ANTHROPIC_BASE_URL"] == URL.removesuffix("/v1")
        assert variables["ANTHROPIC_AUTH_TOKEN"] == (key or "puter")
        for slot in ("ANTHROPIC_MODEL", *(f"ANTHROPIC_DEFAULT_{n}_MODEL" for n in SLOTS)):
            assert variables[slot] == model.id

    def test_codex(self, own_home):
        settings = settings_of("codex")
        assert (settings["model"], settings["model_provider"]) == ("claude-opus-4-5", "puter")
        assert settings["model_context_window"] == 200_000
        assert settings["web_search"] == "disabled"
        provider = settings["model_providers"]["puter"]
        assert provider["base_url"] == URL and provider["wire_api"] == "responses"
        assert "env_key" not in provider and provider["request_max_retries"] == 0
        provider = settings_of("codex", "k")["model_providers"]["puter"]
        assert provider["env_key"] == "PUTER_SERVER_API_KEY"

    def test_the_model_of_a_coding_agent(self, config, monkeypatch, capsys):
        assert config("codex") == 0
        free = re.escape(puter.DEFAULT_FALLBACK_MODELS[0])
        assert re.match(rf'model = "{free}"\n', capsys.readouterr().out)
        monkeypatch.setenv("PUTER_DEFAULT_MODEL", "claude-opus-4.5")
        assert config("codex") == 0
        assert 'model = "claude-opus-4-5-20251101"\n' in capsys.readouterr().out

    def test_continue(self, own_home):
        settings = settings_of("continue", "k")
        assert settings["schema"] == "v1" and settings["version"] == "1.0.0"
        opus, free, mini, *_ = settings["models"]
        assert (free["name"], free["provider"]) == ('Puter: A "B": #1 🦊', "openai")
        assert mini["model"] == "openai/gpt-5-mini"
        assert opus["apiKey"] == "${{ secrets.PUTER_SERVER_API_KEY }}"
        assert opus["capabilities"] == ["tool_use", "image_input"] and opus["apiBase"] == URL
        lengths = [m.get("defaultCompletionOptions") for m in settings["models"]]
        for one in filter(None, lengths):  # it leaves room for the question
            context, most = one["contextLength"], one["maxTokens"]
            assert context - most - min(max(most, (context - most) / 5), 15_000) > 0

    def test_aider(self, own_home):
        first, metadata = texts_of("aider", key="k")
        opus, *_ = yaml_of(first)
        assert opus["name"] == opus["weak_model_name"] == "openai/claude-opus-4-5"
        key = "os.environ/PUTER_SERVER_API_KEY"
        assert opus["extra_params"] == {"api_base": URL, "api_key": key}
        opus = json.loads(metadata)["openai/claude-opus-4-5"]
        assert (opus["max_input_tokens"], opus["max_output_tokens"]) == (200000, 64000)
        assert opus["litellm_provider"] == "openai" and opus["supports_vision"]

    def test_llm(self, own_home):
        opus, *_ = settings_of("llm")
        assert opus == {
            "model_id": "puter/claude-opus-4-5",
            "model_name": "claude-opus-4-5",
            "api_base": URL,
            **dict.fromkeys(("vision", "supports_tools", "supports_schema"), True),
        }
        assert all(one["api_key_name"] == "puter" for one in settings_of("llm", "k"))

    def test_the_printed_command_starts_the_server(self, start_mcp, own_home):
        server = start_mcp(*puter.mcp_command())
        server.send(rpc("ping"))
        assert json.loads(server.stdout.readline())["result"] == {}


# =============================================================================
# Helpers of the tests of everyday use
# =============================================================================
SMALL_PDF = b"%PDF-1.4 a small document"


def chats(fake: FakePuter) -> list[dict[str, Any]]:
    """The arguments of every driver call that the server saw."""
    return [one.args for one in fake.requests if one.path == CHAT]


def sent(fake: FakePuter) -> list[dict[str, Any]]:
    """The messages of the last driver call."""
    messages: list[dict[str, Any]] = chats(fake)[-1]["messages"]
    return messages


def results(fake: FakePuter) -> list[str]:
    """The results of functions in the last driver call."""
    return [one["content"] for one in sent(fake) if one["role"] == "tool"]


def calling(*calls: tuple[str, Mapping[str, Any]]) -> Callable[..., Turn]:
    """A model that calls functions, the first one with the id call_1."""
    made = [
        tool_call(f"call_{number}", name, json.dumps(arguments))
        for number, (name, arguments) in enumerate(calls, 1)
    ]
    return lambda handler, args: Turn(calls=tuple(made), finish="tool_calls")


def late(seconds: float, turn: Turn) -> Callable[..., Turn]:
    """A model that thinks for a while before its first byte."""

    def answer(handler: FakeHandler, args: dict[str, Any]) -> Turn:
        handler.pause(seconds)
        return turn

    return answer


# =============================================================================
# Function tools
# =============================================================================
class Unit(enum.Enum):
    """A choice, as the functions of the tests take it."""

    CELSIUS = "c"
    FAHRENHEIT = "f"


class Place(TypedDict):
    """An object with named keys."""

    city: str
    zip: int


class Hints(TypedDict, total=False):
    """An object whose keys may all be missing."""

    lang: str


@dataclass
class Trip:
    """An object that becomes an instance."""

    to: str
    days: int = 1
    tags: Annotated[list[str], "free words"] = field(default_factory=list)
    made: bool = field(default=False, init=False)


@dataclass
class Node:
    """An object that holds its like."""

    name: str
    children: list[Node] = field(default_factory=list)


TRIP_SCHEMA = {
    "type": "object",
    "properties": {
        "to": {"type": "string"},
        "days": {"type": "integer", "default": 1},
        "tags": {"type": "array", "items": {"type": "string"}, "description": "free words"},
    },
    "required": ["to"],
    "additionalProperties": False,
}


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def get_time(tz: str) -> dict[str, Any]:
    """The time in a time zone."""
    return {"tz": tz, "time": "12:00"}


def fails(reason: str) -> str:
    """Never works."""
    raise LookupError(reason)


def google(city: str, days: int = 3) -> str:
    """The weather of a city.

    It may be wrong.

    Args:
        city (str): the name,
            as people write it: Paris
        days: how many to look ahead

    Returns:
        A sentence.
    """
    return f"{city} {days}"


def sphinx(city: str, days: int = 3) -> str:
    """The weather of a city.

    It may be wrong.

    :param city: the name,
        as people write it: Paris
    :param int days: how many to look ahead
    :returns: A sentence.
    """
    return f"{city} {days}"


def only_arguments(city: str) -> str:
    """Args:
    city: the name
    """
    return city


def sphinx_result(city: str) -> str:
    """The weather of a city.

    :returns: A sentence.
    """
    return city


async def slow_weather(city: str) -> str:
    """The weather, from somewhere far away."""
    await asyncio.sleep(0)
    return f"sunny in {city}"


def schema_of(hint: Any) -> Any:
    return puter.schema_and_reader(hint)[0]


def read_as(value: Any, hint: Any, where: str) -> Any:
    return puter.schema_and_reader(hint)[1](value, where)


class TestFunctionTools:
    """Python functions as tools: their schema, and calling them with a model's arguments."""

    @pytest.mark.parametrize(
        ("hint", "want"),
        [
            (str, {"type": "string"}),
            (int, {"type": "integer"}),
            (float, {"type": "number"}),
            (bool, {"type": "boolean"}),
            (None, {"type": "null"}),
            (Any, {}),
            (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
            (
                Literal["a", 2, "b"],
                {"anyOf": [{"type": "string", "enum": ["a", "b"]}, {"type": "integer", "enum": [2]}]},
            ),
            (Unit, {"type": "string", "enum": ["c", "f"]}),
            (Literal[Unit.CELSIUS], {"type": "string", "enum": ["c"]}),
            (Optional[int], {"anyOf": [{"type": "integer"}, {"type": "null"}]}),  # noqa: UP045
            (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
            (Union[int, str], {"anyOf": [{"type": "integer"}, {"type": "string"}]}),  # noqa: UP007
            (list, {"type": "array", "items": {}}),
            (list[int], {"type": "array", "items": {"type": "integer"}}),
            (list[Unit], {"type": "array", "items": {"type": "string", "enum": ["c", "f"]}}),
            (Sequence[str], {"type": "array", "items": {"type": "string"}}),
            (set[str], {"type": "array", "items": {"type": "string"}}),
            (tuple, {"type": "array", "items": {}}),
            (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
            (tuple[int, int], {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}),
            (tuple[int, str, int], {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}, "minItems": 3, "maxItems": 3}),
            (dict, {"type": "object"}),
            (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
            (Annotated[int, "how many"], {"type": "integer", "description": "how many"}),
            (Annotated[int, 7], {"type": "integer"}),
            (Annotated[int, {"minimum": 1}, "how many", {"maximum": 9}], {"type": "integer", "description": "how many", "minimum": 1, "maximum": 9}),
            (Trip, TRIP_SCHEMA),
            (list[Trip], {"type": "array", "items": TRIP_SCHEMA}),
            (Place, {"type": "object", "properties": {"city": {"type": "string"}, "zip": {"type": "integer"}}, "required": ["city", "zip"], "additionalProperties": False}),
            (Hints, {"type": "object", "properties": {"lang": {"type": "string"}}, "required": [], "additionalProperties": False}),
        ],
    )  # fmt: skip
    def test_a_hint(self, hint, want):
        assert schema_of(hint) == want
        json.dumps(want)

    @pytest.mark.parametrize(
        "hint",
        [bytes, Node, object, list[bytes], dict[int, str], "str", 3, [], Literal[b"x"], enum.Enum("Odd", {"A": ()})],
    )  # fmt: skip
    def test_a_hint_that_json_lacks(self, hint):
        with pytest.raises(puter.BadRequestError, match="which a model cannot give"):
            schema_of(hint)

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="typing has it since 3.11")
    def test_keys_that_may_be_missing(self):
        import typing

        optional: Any = typing.NotRequired[str]  # type: ignore[attr-defined, unused-ignore]
        keys: Any = {"city": str, "zip": optional}
        make: Any = TypedDict
        hint = make("hint", keys)
        schema = schema_of(hint)
        assert schema["required"] == ["city"]
        assert schema["properties"]["zip"] == {"type": "string"}
        assert read_as({"city": "Rome"}, hint, "place") == {"city": "Rome"}

    @pytest.mark.parametrize(
        ("function", "text", "about"),
        [
            (sphinx, "The weather of a city. It may be wrong.", {"city": "the name, as people write it: Paris", "days": "how many to look ahead"}),
            pytest.param(google, "The weather of a city. It may be wrong.", {"city": "the name, as people write it: Paris", "days": "how many to look ahead"}),
            pytest.param(only_arguments, None, {"city": "the name"}),
            pytest.param(sphinx_result, "The weather of a city.", {"city": None}),
        ],
        ids=["sphinx", "google", "only-arguments", "sphinx-result"],
    )  # fmt: skip
    def test_a_docstring(self, function, text, about):
        told = puter.function_schema(function)["function"]
        assert told.get("description") == text
        properties = told["parameters"]["properties"]
        assert {n: p.get("description") for n, p in properties.items()} == about

    def test_a_signature(self):
        def plan(
            trip: Trip,
            unit: Unit,
            days: int = 3,
            *,
            note: str | None = None,
            exact: bool = False,
            where: Annotated[str, "a place"] = "here",
        ) -> None: ...

        told = puter.function_schema(plan)
        assert told["type"] == "function" and told["function"]["name"] == "plan"
        assert "description" not in told["function"]
        schema = told["function"]["parameters"]
        assert schema["required"] == ["trip", "unit"]
        assert schema["additionalProperties"] is False
        assert schema["properties"]["days"] == {"type": "integer", "default": 3}
        assert schema["properties"]["exact"] == {"type": "boolean", "default": False}
        where = {"type": "string", "description": "a place", "default": "here"}
        assert schema["properties"]["where"] == where
        assert "default" not in schema["properties"]["note"]
        assert schema["properties"]["trip"] == TRIP_SCHEMA

    def test_methods(self):
        class Home:
            name = "Rome"

            def near(self, km: int) -> str:
                return f"{km} km from {self.name}"

            @classmethod
            def far(cls, km: int) -> str:
                return f"{km} km from {cls.name}"

            @staticmethod
            def plus(km: int) -> str:
                return f"{km} km"

        for function, want in [
            (Home().near, "2 km from Rome"),
            (Home.far, "2 km from Rome"),
            (Home.plus, "2 km"),
        ]:
            schema = puter.function_schema(function)["function"]["parameters"]
            assert list(schema["properties"]) == ["km"]
            assert function(**puter.read_arguments(function, {"km": 2})) == want

    def test_a_decorated_function(self):
        @functools.wraps(sphinx)
        def wrapped(*args: Any, **kwargs: Any) -> str:
            return "wrapped " + sphinx(*args, **kwargs)

        assert puter.function_schema(wrapped) == puter.function_schema(sphinx)
        assert wrapped(**puter.read_arguments(wrapped, {"city": "Rome"})) == "wrapped Rome 3"

    def test_what_a_model_cannot_call(self):
        def untyped(city) -> None: ...  # type: ignore[no-untyped-def]
        def many(*cities: str) -> None: ...
        def named(**cities: str) -> None: ...
        def by_place(city: str, /) -> None: ...
        def unknown(city: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
        def raw(data: bytes) -> None: ...

        table: list[tuple[Callable[..., Any], str]] = [
            (untyped, "city cannot be a parameter"),
            (many, "\\*cities cannot be a parameter"),
            (named, "\\*\\*cities cannot be a parameter"),
            (by_place, "city cannot be a parameter"),
            (unknown, "cannot be read"),
            (raw, "cannot give"),
            (lambda city: city, "has no name"),
        ]
        for function, words in table:
            with pytest.raises(puter.BadRequestError, match=words):
                puter.function_schema(function)

    @pytest.mark.parametrize(
        ("value", "hint", "want"),
        [
            *((value, type(value), value) for value in ("a", 1, 1.5, True, 10**400)),
            (1, float, 1.0),
            *((value, int | None, value) for value in (None, 2)),
            ("2", int | str, "2"),
            ("f", Unit, Unit.FAHRENHEIT),
            ("a", Literal["a", 1], "a"),
            (["c"], list[Unit], [Unit.CELSIUS]),
            ([1, 2], tuple[int, ...], (1, 2)),
            ([1, 1], set[int], {1}),
            ([1, "a"], list, [1, "a"]),
            ({"a": "c"}, dict[str, Unit], {"a": Unit.CELSIUS}),
            ({"a": [1]}, dict, {"a": [1]}),
            ({"x": 1}, Any, {"x": 1}),
            (3, Annotated[int, "how many"], 3),
            (3, Annotated[int, {"minimum": 3, "maximum": 3}], 3),
            (None, Annotated[int | None, {"minimum": 1}], None),
            ("c", Literal[Unit.CELSIUS], Unit.CELSIUS),
            (2.0, int, 2),
            ([1, "a"], tuple[int, str], (1, "a")),
            ([1], frozenset[int], frozenset({1})),
            ({"to": "Rome"}, Trip, Trip("Rome")),
            ({"to": "Rome", "days": 2, "tags": ["x"]}, Trip, Trip("Rome", 2, ["x"])),
            ([{"to": "Rome"}], list[Trip], [Trip("Rome")]),
            ({"city": "Rome", "zip": 1}, Place, {"city": "Rome", "zip": 1}),
            ({}, Hints, {}),
        ],
    )
    def test_an_argument(self, value, hint, want):
        made = read_as(value, hint, "it")
        assert made == want and type(made) is type(want)

    @pytest.mark.parametrize(
        ("value", "hint", "where"),
        [
            *((value, int, f"it is {value!r}") for value in ("1", 1.5, True)),
            *((value, str, f"it is {value}") for value in (1, None)),
            *((value, Unit, f"it is {value!r}") for value in ("x", "CELSIUS", {})),
            (True, float, "it is True"),
            (1, bool, "it is 1"),
            ("b", Literal["a"], "it is 'b'"),
            (True, Literal[1], "it is True"),
            (1, Literal[True], "it is 1"),
            (10**400, float, "it is 1000"),
            (0, Annotated[int, {"minimum": 1}], "it is 0"),
            (10, Annotated[int, {"maximum": 9}], '"maximum": 9'),
            (10**400, Annotated[int, {"maximum": 9}], '"maximum": 9'),
            ([1], tuple[int, int], "it is [1]"),
            (["a", 1], tuple[int, str], "it[0] is 'a'"),
            *(([], hint, "it is []") for hint in (Literal["a"], int | None, dict, Trip)),
            ("a", list[str], "it is 'a'"),
            (["a", 1], list[str], "it[1] is 1"),
            ({"a": "b"}, dict[str, int], "it.a is 'b'"),
            ({}, Trip, "it lacks ['to']"),
            ({"to": "Rome", "by": "car"}, Trip, "it has unexpected arguments ['by']"),
            ({"to": 1}, Trip, "it.to is 1"),
            ({"city": "Rome"}, Place, "it lacks ['zip']"),
        ],
    )
    def test_an_argument_that_does_not_fit(self, value, hint, where):
        with pytest.raises(TypeError, match=re.escape(where)):
            read_as(value, hint, "it")

    def test_calls(self):
        def plan(trip: Trip, unit: Unit = Unit.CELSIUS, *, note: str = "") -> Any:
            return (trip, unit, note)

        def call(arguments):
            return plan(**puter.read_arguments(plan, arguments))

        trip = {"to": "Rome", "days": 2}
        assert call({"trip": trip}) == (Trip("Rome", 2), Unit.CELSIUS, "")
        made = call({"unit": "f", "note": "x", "trip": trip})
        assert made == (Trip("Rome", 2), Unit.FAHRENHEIT, "x")
        table: list[tuple[dict[str, Any], str]] = [
            ({}, r"the call lacks \['trip'\]"),
            ({"trp": trip}, r"the call has unexpected arguments \['trp'\]; allowed are \['trip'"),
            ({"trip": {"to": "Rome", "days": "2"}}, "trip.days is '2'"),
            ({"trip": trip, "unit": "k"}, "unit is 'k'"),
        ]
        for arguments, words in table:
            with pytest.raises(TypeError, match=words):
                call(arguments)

    @pytest.mark.parametrize(
        ("value", "want"),
        [
            ("sunny", "sunny"),
            ("", "(no output)"),
            (" \n", "(no output)"),
            (None, "(no output)"),
            ((n * n for n in range(3)), "[0, 1, 4]"),
            ({"a": map(str, (1, 2))}, '{"a": ["1", "2"]}'),
            (3, "3"),
            (True, "true"),
            ([1, "é"], '[1, "é"]'),
            (Trip("Rome"), '{"to": "Rome", "days": 1, "tags": [], "made": false}'),
            ([Unit.CELSIUS, {"b"}], '["c", ["b"]]'),
            ({"a": None}, '{"a": null}'),
            (Path("x"), '"x"'),
        ],
    )
    def test_a_result(self, value, want):
        assert puter.tool_result_text(value) == want


class TestRun:
    """`Puter.run`: functions are called until the model answers."""

    def test_it_calls_and_goes_on(self, make, fake):
        reply = make().run("Paris?", [get_weather], model=lab("tools"))
        assert str(reply) == SENTENCE and not reply.tool_calls
        first, second = chats(fake)
        assert first["tools"] == [puter.function_schema(get_weather)] == second["tools"]
        assert [m["role"] for m in second["messages"]] == ["user", "assistant", "tool"]
        assert second["messages"][2] == {
            "role": "tool",
            "tool_call_id": "call_1",
            "content": "sunny in Paris",
        }

    @pytest.mark.parametrize(
        ("scenario", "want"), [("badargs", "not a JSON object"), ("noid", "sunny in Paris")]
    )
    def test_calls_that_providers_botch(self, make, fake, scenario, want):
        no_id = Turn(calls=(tool_call("", "get_weather", '{"city": "Paris"}'),))
        plan: Any = scenario if scenario == "badargs" else lambda *_: no_id
        fake.script[lab("text")] = [plan, says("done")]
        client = make()
        assert str(client.run("hi", [get_weather], model=lab("text"))) == "done"
        (called,), answer = sent(fake)[-2]["content"][-1:], sent(fake)[-1]
        assert want in json.dumps(answer)
        assert called["id"]
        if scenario == "badargs":
            with pytest.raises(puter.ReplyError) as caught:
                client.chat("hi", model=lab("badargs"), tools=[WEATHER])
            assert caught.value.reply.tool_calls[0].invalid == caught.value.raw != ""

    def test_a_forced_call_is_forced_once(self, make, fake):
        make().run("hi", [get_weather], model=lab("tools"), tool_choice="required")
        assert [args["tool_choice"] for args in chats(fake)] == ["required", "auto"]

    def test_parallel_calls_in_order(self, make, fake):
        calls = [("get_time", {"tz": "CET"}), ("get_weather", {"city": "Rome"})]
        fake.script[lab("text")] = [calling(*calls), says("done")]
        assert str(make().run("hi", [get_weather, get_time], model=lab("text"))) == "done"
        assert results(fake) == ['{"tz": "CET", "time": "12:00"}', "sunny in Rome"]

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (("fails", {"reason": "no map"}), ["LookupError", "no map"]),
            (("fails", {}), ["TypeError", "lacks ['reason']"]),
            (("fails", {"reason": 3}), ["TypeError", "reason is 3", "str"]),
            (("fails", {"why": "x"}), ["TypeError", "'why'", "'reason'"]),
            (("nothing", {}), ["no function 'nothing'", "fails"]),
        ],
    )
    def test_a_failure_is_the_models_to_read(self, make, fake, caplog, call, words):
        fake.script[lab("text")] = [calling(call), says("sorry")]
        with caplog.at_level(logging.WARNING, "puter"):
            assert str(make().run("hi", [fails], model=lab("text"))) == "sorry"
        (told,) = results(fake)
        assert told.startswith("Error: ") and all(word in told for word in words)
        assert "Traceback" not in told
        logged = [r for r in caplog.records if "fails" in r.getMessage()]
        assert bool(logged) is (call[0] == "fails")
        assert all(r.exc_info for r in logged)

    def test_on_tool_watches_and_refuses(self, make, fake):
        made, seen = [], []

        def note(text: str) -> str:
            """Write a text down."""
            made.append(text)
            return "noted"

        def watch(call):
            seen.append(call.arguments["text"])
            return {"a": True, "b": False, "c": None}[seen[-1]]

        calls = [("note", {"text": text}) for text in ("a", "b", "c")]
        fake.script[lab("text")] = [calling(*calls), says("done")]
        make().run("hi", [note], model=lab("text"), on_tool=watch)
        assert (seen, made) == (["a", "b", "c"], ["a", "c"])
        first, refused, last = results(fake)
        assert (first, last) == ("noted", "noted") and "refused" in refused

    @pytest.mark.parametrize("as_what", ["on_tool", "tool"])
    def test_a_callback_or_ctrl_c_may_end_it(self, make, fake, as_what):
        def get_weather(city: str) -> str:
            raise KeyboardInterrupt

        def stop(call):
            raise KeyboardInterrupt

        more = {"on_tool": stop} if as_what == "on_tool" else {}
        with pytest.raises(KeyboardInterrupt):
            make().run("hi", [get_weather], model=lab("tools"), **more)
        assert len(chats(fake)) == 1

    @pytest.mark.parametrize("rounds", [2, 3])
    def test_a_model_that_does_not_stop(self, make, fake, rounds):
        fake.script[lab("text")] = calling(("get_weather", {"city": "Rome"}))
        with pytest.raises(puter.ReplyError, match=f"after {rounds} rounds"):
            make().run("hi", [get_weather], model=lab("text"), max_rounds=rounds)
        assert rounds <= len(chats(fake)) <= rounds + 1

    def test_after_the_last_round_the_model_may_answer(self, make):
        reply = make().run("hi", [get_weather], model=lab("tools"), max_rounds=1)
        assert str(reply) == SENTENCE

    def test_options_go_with_every_round(self, make, fake):
        history = [{"role": "user", "content": "Paris?"}]
        more = {"system": "Be brief", "temperature": 0.5, "images": [PNG]}
        make().run(history, [get_weather], model=lab("tools"), **more)
        assert history == [{"role": "user", "content": "Paris?"}]
        for args in chats(fake):
            assert args["temperature"] == 0.5
            assert args["messages"][0] == {"role": "system", "content": "Be brief"}
            kinds = [part["type"] for part in args["messages"][1]["content"]]
            assert kinds == ["text", "image_url"]

    def test_a_note_of_the_provider_goes_back(self, make, fake):
        fake.script[lab("text")] = ["extra", "text"]
        make().run("hi", [get_weather], model=lab("text"))
        assert json.dumps(SIGNATURE) in json.dumps(sent(fake))

    @pytest.mark.parametrize(
        "tools",
        [
            [WEATHER],
            ["get_weather"],
            [None],
            [get_weather, functools.wraps(get_weather)(lambda city: "no")],
        ],
        ids=["a schema", "a name", "nothing", "two of one name"],
    )
    def test_it_needs_functions_of_names_of_their_own(self, make, fake, tools):
        with pytest.raises(puter.BadRequestError, match="function|called"):
            make().run("hi", tools, model=lab("text"))
        assert not chats(fake)

    def test_an_async_function(self, make, fake):
        fake.script[lab("text")] = [calling(("slow_weather", {"city": "Rome"})), says("done")]
        assert make().run("hi", [slow_weather], model=lab("text")).text == "done"
        assert results(fake) == ["sunny in Rome"]


# =============================================================================
# Conversations
# =============================================================================
def roles(talk: puter.Conversation) -> str:
    """The roles of a history by their first letters."""
    return "".join(message["role"][0] for message in talk.messages)


class TestConversation:
    """Turns that are remembered."""

    @pytest.mark.parametrize("how", ["say", "stream"])
    def test_it_remembers(self, make, fake, how):
        talk = make().conversation("Be brief", model=lab("echo"), temperature=0)
        for text in ("one", "two"):
            if how == "say":
                assert str(talk.say(text)) == text
            else:
                assert "".join(map(str, talk.stream(text))) == text
        assert [m["content"] for m in talk.messages] == ["one", "one", "two", "two"]
        assert roles(talk) == "uaua"
        assert [m["content"] for m in sent(fake)] == ["Be brief", "one", "one", "two"]
        assert chats(fake)[-1]["temperature"] == 0
        assert "4 messages" in repr(talk)

    def test_options_of_a_turn(self, make, fake):
        talk = make().conversation(model=lab("echo"), temperature=0)
        talk.say("one", temperature=1, model=lab("text"), system="Once")
        assert (chats(fake)[-1]["temperature"], chats(fake)[-1]["model"]) == (1, lab("text"))
        talk.say("two")
        assert (chats(fake)[-1]["temperature"], chats(fake)[-1]["model"]) == (0, lab("echo"))
        assert sent(fake)[0]["role"] == "user"

    def test_no_reply_before_the_first(self, make):
        with pytest.raises(puter.BadRequestError, match="There is no reply"):
            make().conversation().reply  # noqa: B018

    def test_the_history_is_yours(self, make, fake):
        talk = make().conversation(model=lab("echo"))
        talk.messages = [{"role": "user", "content": "a"}]
        talk.messages.append({"role": "assistant", "content": "b"})
        talk.say("c")
        assert [m["content"] for m in sent(fake)] == ["a", "b", "c"]

    @pytest.mark.parametrize("how", ["say", "stream"])
    @pytest.mark.parametrize("scenario", ["err400", "closed", "html"])
    def test_a_turn_that_fails_leaves_no_trace(self, make, how, scenario):
        talk = make(max_retries=0).conversation(model=lab("echo"), fallback=False)
        talk.say("one")
        before = list(talk.messages)
        with pytest.raises(puter.PuterError):
            getattr(talk, how)("two", model=lab(scenario))
            list(talk.stream("two", model=lab(scenario)))
        assert talk.messages == before
        assert str(talk.say("three")) == "three" and roles(talk) == "uaua"

    def test_a_stream_that_is_left(self, make, fake):
        talk = make().conversation(model=lab("slow"))
        chunks = talk.stream("one")
        next(chunks)
        chunks.close()  # type: ignore[attr-defined]
        assert talk.messages == []
        assert eventually(lambda: fake.open_streams == 0)

    def test_tools(self, make, fake):
        talk = make().conversation(model=lab("tools"), tools=[get_weather])
        assert str(talk.say("Paris?")) == SENTENCE
        assert roles(talk) == "uata"
        assert talk.messages[2]["content"] == "sunny in Paris"
        talk.say("And now?")
        assert roles(talk) == "uataua"
        refused = make().conversation(model=lab("tools"), on_tool=lambda _: False)
        refused.say("Paris?", tools=[get_weather])
        assert "refused" in refused.messages[2]["content"]

    def test_tools_that_fail_leave_no_trace(self, make, fake):
        fake.script[lab("text")] = [calling(("get_weather", {"city": "Rome"})), "err400"]
        talk = make(max_retries=0).conversation(model=lab("text"), fallback=False)
        with pytest.raises(puter.PuterError):
            talk.say("Rome?", tools=[get_weather])
        assert talk.messages == []

    def test_schemas_are_not_called(self, make):
        talk = make().conversation(model=lab("tools"))
        reply = talk.say("Paris?", tools=[WEATHER])
        assert [call.name for call in reply.tool_calls] == ["get_weather"]
        assert roles(talk) == "ua" and talk.messages[1]["tool_calls"]

    def test_tools_in_a_stream(self, make):
        talk = make().conversation(model=lab("tools"), tools=[get_weather])
        assert "".join(map(str, talk.stream("Paris?"))) == SENTENCE
        assert roles(talk) == "uata"

    def test_images_and_files_stay_with_their_turn(self, make, fake):
        talk = make().conversation(model=lab("vision"))
        talk.say("look", images=[PNG], files=[("a.pdf", SMALL_PDF)])
        talk.say("again")
        kinds = [p["type"] for p in sent(fake)[0]["content"]]
        assert kinds == ["text", "image_url", "file"]
        assert sent(fake)[2]["content"] == "again"

    def test_pickle_and_json(self, make, fake, monkeypatch):
        client = make()
        monkeypatch.setattr(puter, "_default_client", lambda: client)
        talk = client.conversation("Be brief", model=lab("echo"), max_tokens=9)
        talk.say("one", images=[PNG])
        data = json.loads(json.dumps(talk.to_json()))
        assert data["messages"] == talk.messages and "token-" not in json.dumps(data)
        copies = [pickle.loads(pickle.dumps(talk)), puter.Conversation.from_json(data)]
        for again in (*copies, puter.Conversation.from_json(data, client)):
            assert (again.system, again.model) == ("Be brief", lab("echo"))
            assert again.options == {"max_tokens": 9}
            assert str(again.say("two")) == "two"
            assert len(again.messages) == 4
        assert len(talk.messages) == 2  # the copies are on their own
        empty = puter.Conversation.from_json({})
        assert (empty.messages, empty.options, empty.model) == ([], {}, None)
        # Functions are left out.
        talk = client.conversation(tools=[get_weather], on_tool=print, temperature=0)
        assert talk.to_json()["options"] == {"temperature": 0}


# =============================================================================
# Files
# =============================================================================
class TestFiles:
    """`files=` and `images=`: what arrives, and what is refused before anything is sent."""

    @pytest.mark.parametrize("how", ["path", "text", "bytes", "named", "alone"])
    def test_a_pdf_goes_along(self, make, fake, tmp_path, how):
        path = tmp_path / "über uns.pdf"
        path.write_bytes(SMALL_PDF)
        named = ("C:\\docs\\über uns.pdf", SMALL_PDF)
        ways = {"path": [path], "text": [str(path)], "bytes": [SMALL_PDF], "named": [named]}
        name = "document.pdf" if how == "bytes" else "über uns.pdf"
        assert str(make().chat("Sum up", files=ways.get(how, path), model=lab("text"))) == SENTENCE
        url = f"data:application/pdf;base64,{base64.b64encode(SMALL_PDF).decode()}"
        file = {"type": "file", "file": {"filename": name, "file_data": url}}
        assert sent(fake)[0]["content"] == [text_part("Sum up"), file]

    def test_texts_and_images_are_files_too(self, make, fake):
        make().chat("hi", files=[("a.csv", b"x,y"), ("b", PNG)], model="gemini-2.5-flash")
        text, csv, picture = sent(fake)[0]["content"]
        assert (text["text"], csv["text"]) == ("hi", "a.csv:\n```\nx,y\n```")
        assert picture == puter.image_part(PNG)

    def test_a_text_is_read_by_any_model(self, make, fake):
        make().chat("hi", files=[("a.csv", b"x,y")], model="groq:allam-2-7b")
        assert sent(fake)[0]["content"][1] == text_part("a.csv:\n```\nx,y\n```")

    def test_the_largest_request_is_named_before_it_is_sent(self, make, fake, monkeypatch):
        monkeypatch.setattr(puter, "MAX_SENT_BYTES", 50_000)
        with pytest.raises(
            puter.BadRequestError, match=r"has 5\d,\d+ bytes, but Puter takes 50,000"
        ):
            make().chat("hi", files=[SMALL_PDF + b"0" * 40_000], model=lab("text"))
        assert not fake.chat_calls()

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ([("empty.pdf", b"")], "0 bytes"),
            ([("large.pdf", SMALL_PDF * 9)], r"225 bytes.*1 to 99"),
            (["no-such.pdf"], "no-such.pdf.*cannot be read"),
            ([Path("/")], "cannot be read"),
            ([None], "cannot be read"),
        ],
    )
    def test_limits_are_named_before_anything_is_sent(self, make, fake, monkeypatch, given, words):
        monkeypatch.setattr(puter, "MAX_FILE_BYTES", 99)
        with pytest.raises(puter.BadRequestError, match=words):
            make().chat("hi", files=[SMALL_PDF, *given], model=lab("text"))
        assert not fake.requests

    def test_what_nobody_reads(self, make, fake):
        with pytest.raises(puter.BadRequestError, match="'a.docx' is neither a text, an image"):
            make().chat("hi", files=[("a.docx", b"PK\3\4\0")], model=lab("text"))
        assert not fake.requests

    @pytest.mark.parametrize(
        ("more", "problem", "near"),
        [
            ({"files": [SMALL_PDF]}, "does not read PDFs", FREE[1]),
            ({"images": [PNG]}, "does not see images", "gemini-2.5-flash"),
            (
                {"images": PNG, "files": SMALL_PDF},
                "does not see images and does not read PDFs",
                HAIKU,
            ),
            ({"tools": [{"type": "web_search"}]}, "does not search the web", "gpt-4o"),
        ],
    )
    def test_a_model_that_cannot_do_it(self, make, fake, more, problem, near):
        with pytest.raises(puter.BadRequestError) as caught:
            make().chat("hi", model="groq:allam-2-7b", **more)
        assert f"allam-2-7b {problem}" in caught.value.message
        assert near in caught.value.hint and not fake.chat_calls()
        assert make().chat("hi", model=near, **more).text


# =============================================================================
# The four kinds of provider, and the gate before them
# =============================================================================
def history_of(body: JSON) -> list[JSON]:
    """The history in a request to a model's provider, Anthropic's system text first."""
    return body["input"] if "input" in body else [{"system": body.get("system")}, *body["messages"]]


def arrived(fake: FakePuter) -> list[JSON]:
    """The history of the last request that reached a model's provider."""
    return history_of(fake.sent[-1])


def as_arrived(form: str, messages: Sequence[JSON]) -> list[JSON]:
    """What arrives of messages that are sent so."""
    asked = BY_NAME[MODEL_OF[form]]
    args = {"messages": normalised(messages), "tools": []}
    *_, body = FORMS[form_of(asked, {})].sent(asked, args)
    return history_of(body)


def thoughtful(handler: FakeHandler, args: JSON) -> Answer:
    """Thinks, calls a tool, and talks once the history holds the result."""
    if tool_results(args):
        return Turn(SENTENCE, ("hm",))
    return Turn("So:", ("hm",), calls=(WEATHER_CALL,), finish="tool_calls")


class TestProviders:
    """What arrives at each kind of provider through the whole client, and what comes back.

    FakePuter refuses what their vendors refuse.
    """

    @pytest.mark.parametrize(
        ("messages", "form", "want"),
        [
            pytest.param(messages, form, want.get(form, want["chat"]), id=f"{name}-{form}")
            for name, messages, want in BY_FORM
            for form in MODEL_OF
            if form == "claude" or name != "stored PDF"
        ],
    )
    def test_what_arrives(self, make, fake, messages, form, want):
        reply = make().chat(messages, model=MODEL_OF[form], fallback=False)
        assert (reply.text, len(reply.attempts)) == (SENTENCE, 1)
        assert arrived(fake) == as_arrived(form, want)

    @pytest.mark.parametrize("form", MODEL_OF)
    def test_halves_of_an_emoji_become_a_mark(self, make, fake, form):
        calls = [called("1", "f", '{"a": "\\ud83e"}'), called("2", "f", '{"a": "\\ud83e\\udd8a"}')]
        history = [user("a\ud83e"), assistant(None, *calls), result("1", "\udd8ab"), result("2")]
        make().chat(history, model=MODEL_OF[form], tools=[WEATHER])
        told = compact(arrived(fake))
        assert (
            "a\ufffd" in told and "\ufffdb" in told and "🦊" in told.replace("\\ud83e\\udd8a", "🦊")
        )
        assert not re.search(r"[\ud800-\udfff]|\\ud83e(?!\\udd8a)", told)

    @pytest.mark.parametrize(
        ("form", "args", "want"),
        [
            ("claude", {"max_tokens": 9_000, "reasoning_effort": "high"}, {"thinking": {"type": "enabled", "budget_tokens": 8_192}}),
            ("claude", {}, {"temperature": 1}),
            ("responses", {"reasoning_effort": "high"}, {"reasoning": {"effort": "high"}}),
            ("responses", {"verbosity": "low"}, {"text": {"verbosity": "low"}}),
            ("responses", {"response_format": {"type": "json_schema", "json_schema": {"name": "s"}}}, {"text": {"format": {"type": "json_schema", "name": "s"}}}),
            ("responses", {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}, {"tool_choice": {"type": "function", "name": "get_weather"}}),
            ("chat", {"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        ],
    )  # fmt: skip
    def test_the_arguments_arrive(self, make, fake, form, args, want):
        make().chat("hi", model=MODEL_OF[form], **args)
        assert fake.sent[-1].items() >= want.items()

    @pytest.mark.parametrize("how", ["run", "conversation"])
    def test_signed_thinking_goes_back(self, make, fake, how):
        # Anthropic refuses the next round of a turn that does not begin with it.
        fake.script[HAIKU] = thoughtful
        more: Any = {"model": HAIKU, "reasoning_effort": "low", "max_tokens": 4_000}
        if how == "run":
            reply = make().run("Paris?", [get_weather], **more)
        else:
            talk = make().conversation(tools=[get_weather], model=HAIKU)
            reply = talk.say("Paris?", reasoning_effort="low", max_tokens=4_000)
        assert reply.text == SENTENCE and len(fake.sent) == 2
        assert fake.sent[1]["thinking"]["type"] == "enabled"
        first, *_ = arrived(fake)[2]["content"]
        assert first == {"type": "thinking", "thinking": "hm", "signature": "sig"}

    @pytest.mark.parametrize("form", MODEL_OF)
    def test_streams_with_tools(self, make, fake, form):
        """They are live where no call is lost, and whole elsewhere; a turn has all its calls."""
        fake.script[MODEL_OF[form]] = "twotools"
        with make().stream("hi", model=MODEL_OF[form], tools=[WEATHER]) as stream:
            calls = [chunk.tool_call.name for chunk in stream if chunk.tool_call]
        assert calls == ["get_weather", "get_time"]
        is_live = "stream" in chats(fake)[-1]
        assert is_live is (form in ("claude", "responses"))

    @pytest.mark.parametrize("how", ["chat", "stream"])
    @pytest.mark.parametrize(
        ("scenario", "kind"),
        [(name, kind) for name, (kind, _) in BAD.items() if re.fullmatch(r"err\d+", name)],
    )
    def test_failures_of_claude(self, make, fake, how, scenario, kind):
        fake.script[HAIKU] = scenario
        client = make(max_retries=0)
        with pytest.raises(kind) as caught:
            ask(client, how, HAIKU, fallback=False)
        assert type(caught.value) is kind
        assert f"scripted {scenario[3:]}" in caught.value.message
        if kind is puter.BadRequestError:
            with pytest.raises(kind):
                ask(client, how, HAIKU)
        else:
            assert ask(client, how, HAIKU).model == FREE[0]

    @pytest.mark.parametrize("form", MODEL_OF)
    def test_a_failure_in_the_middle(self, make, fake, form):
        fake.script[MODEL_OF[form]] = "midfail"
        with pytest.raises(puter.StreamError) as caught:
            ask(make(), "stream", MODEL_OF[form])
        words = "terminated" if form == "responses" else "scripted mid-stream failure"
        assert caught.value.message.endswith(words) and caught.value.reply.text

    @pytest.mark.parametrize(
        ("form", "how", "scenario", "reason"),
        [
            *(("claude", "chat", name, name) for name in ("length",)),
            ("claude", "chat", "refusal", "content_filter"),
            ("claude", "chat", "tools", "tool_calls"),
            ("chat", "chat", "length", "length"),
            *((form, "stream", "text", "stop") for form in MODEL_OF),
        ],
    )
    def test_how_answers_end(self, make, fake, form, how, scenario, reason):
        fake.script[MODEL_OF[form]] = scenario
        assert ask(make(), how, MODEL_OF[form]).finish_reason == reason

    @pytest.mark.parametrize("how", ["chat", "stream"])
    @pytest.mark.parametrize(("asked", "reason"), [(22, "length"), (23, "stop"), (None, "stop")])
    def test_all_the_tokens_that_were_allowed(self, make, fake, asked, reason, how):
        reply = ask(make(), how, CODEX, max_tokens=asked)
        assert (reply.usage.output_tokens, reply.finish_reason) == (22, reason)

    @pytest.mark.parametrize("form", MODEL_OF)
    def test_what_each_counts(self, make, fake, form):
        wants = {
            "claude": puter.Usage(11, 22, 5, 41, 0.00013, 3),
            "responses": puter.Usage(11, 22, 5, 38),
            "chat": puter.Usage(11, 22, 5, 38),
            "openrouter": puter.Usage(11, 22, 0, 33),
        }
        for how in ("chat", "stream"):
            usage = ask(make(), how, MODEL_OF[form]).usage
            assert usage.cost_usd is not None
            assert replace(usage, cost_usd=None) == replace(wants[form], cost_usd=None)

    def test_an_end_without_usage(self, make, fake):
        """Of a responses model it is a cut one; of others it was not recorded to be."""
        fake.script |= dict.fromkeys(MODEL_OF.values(), "nousage")
        with pytest.raises(puter.StreamError, match="before its answer was whole") as caught:
            ask(make(), "stream", CODEX)
        assert caught.value.reply.text == SENTENCE
        for form in ("claude", "chat", "openrouter"):
            assert ask(make(), "stream", MODEL_OF[form]).text == SENTENCE

    def test_a_blocked_prompt(self, make, fake):
        fake.script[CODEX] = "blocked"
        for how, kind in (("chat", puter.BadRequestError), ("stream", puter.StreamError)):
            with pytest.raises(kind) as caught:
                ask(make(), how, CODEX)
            assert caught.value.code == "prompt_blocked"

    # Through the gateway.

    @pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
    @pytest.mark.parametrize("form", MODEL_OF)
    def test_what_callers_of_the_gateway_send_arrives(self, server, fake, form, path):
        """A cache mark, thinking, a picture in a result and a later system message, in any dialect."""
        seen = [text_part("b"), PICTURES["claude" if path == "messages" else "chat"]]
        if path == "responses":
            call = {"type": "function_call", "call_id": "t1", "name": "f", "arguments": "{}"}
            history = [
                call,
                {**A_RESULT, "call_id": "t1", "output": [*SEE_IT, PICTURES["responses"]]},
            ]
        elif path == "messages":
            history = [calls_for("t1", before=[SIGNED]), asks(result_part("t1", seen))]
        else:
            history = [assistant(None, called("t1")), result("t1", seen)]
        history = [asks(MARKED), *history, {"role": "system", "content": "later"}]
        body = {"model": MODEL_OF[form], "max_tokens": 4_000, "messages": history, "input": history}
        reply = requests.post(f"{server.url}/{path}", json=body, timeout=10)
        assert reply.ok, reply.text
        told = compact(arrived(fake))
        assert told.count(ONE_PIXEL) == 1 and compact(PICTURES.get(form, A_PICTURE)) in told
        assert '"later"' in told
        assert ("cache_control" in told) is (form in ("claude", "openrouter"))
        assert (compact(SIGNED) in told) is (form == "claude" and path == "messages")

    @pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
    def test_the_gateway_gives_signed_thinking_back(self, server, fake, path):
        fake.script[HAIKU] = thoughtful
        asked: dict[str, Any] = {"model": HAIKU}
        history: list[Any] = [user("Paris?")]
        for _ in range(2):
            if path == "messages":
                asked |= {"output_config": {"effort": "low"}, "max_tokens": 4_000}
                body = {**asked, "messages": history, "tools": [claude_tool("get_weather")]}
                told = requests.post(f"{server.url}/{path}", json=body, timeout=10).json()
                ids = [part["id"] for part in told["content"] if part["type"] == "tool_use"]
                history += [assistant(told["content"]), asks(*map(result_part, ids))]
            elif path == "responses":
                asked |= {"reasoning": {"effort": "low"}, "max_output_tokens": 4_000}
                body = {**asked, "input": history, "tools": [flat_tool("get_weather")]}
                told = requests.post(f"{server.url}/{path}", json=body, timeout=10).json()
                ids = [item["call_id"] for item in told["output"] if "call_id" in item]
                history += told["output"] + [
                    {**A_RESULT, "call_id": name, "output": "x"} for name in ids
                ]
            else:
                asked |= {"reasoning_effort": "low", "max_tokens": 4_000}
                body = {**asked, "messages": history, "tools": [WEATHER]}
                told = requests.post(f"{server.url}/{path}", json=body, timeout=10).json()
                message = told["choices"][0]["message"]
                history += [message, *(result(c["id"]) for c in message.get("tool_calls", ()))]
        assert len(fake.sent) == 2 and fake.sent[1]["thinking"]["type"] == "enabled"
        first, *_ = arrived(fake)[2]["content"]
        assert first == {"type": "thinking", "thinking": "hm", "signature": "sig"}

    @pytest.mark.parametrize("how", ["chat", "stream"])
    @pytest.mark.parametrize("scenario", ["internal", "err429", "err500", "err400", "denied"])
    def test_a_client_behind_the_gateway_asks_once(self, serve, make, fake, scenario, how):
        server = serve(make(fallback_enabled=False, max_retries=2))
        post_to(server, body_for(scenario, stream=how == "stream"))
        alone = len(fake.chat_calls())
        settings: Any = {"api_style": "openai", "max_retries": 3, "retry_delay_ms": 1}
        fake.script[lab(scenario)] = scenario
        make(account_rotation_enabled=False).state.clear_cooldowns()
        with (
            puter.Puter("any", api_base_url=server.url, **settings) as client,
            pytest.raises(puter.PuterError) as caught,
        ):
            ask(client, how, lab(scenario))
        assert len(fake.chat_calls()) == 2 * alone and len(caught.value.attempts) == 1


LONG_PROMPT = "word " * 20_000


class TestCreditGate:
    """402, which is not always about credit."""

    @pytest.mark.parametrize("how", ["chat", "stream"])
    def test_a_prompt_too_long_for_puter(self, make, fake, how):
        client = make("alice", "bob")
        ask_it = getattr(client, how)
        with pytest.raises(puter.ContextLengthError) as caught:
            ask_it(LONG_PROMPT, model=GPT, fallback=False)
        error = caught.value
        assert (error.code, error.limit, error.param) == (
            "context_length_exceeded",
            16_384,
            "messages",
        )
        assert error.tokens == puter.estimated_tokens([user(LONG_PROMPT)]) > 16_384
        assert f"about {error.tokens:,} tokens" in error.message and "16,384" in error.message
        assert "Models that do: openrouter:" in error.hint
        assert told(fake) == ["alice gpt-4o"] and client.cooldowns() == []
        answer = ask_it(LONG_PROMPT, model=GPT)
        assert "".join(map(str, answer)) == SENTENCE if how == "stream" else answer.text == SENTENCE
        assert answer.model == FREE[0]
        assert client.cooldowns() == []

    def test_the_server_is_asked_first(self, make, fake):
        # Its rule may change.
        make()._catalogue.models_if_any("")
        gpt = next(m for m in fake.catalogue if m["id"] == GPT)
        client = make()
        client.models(refresh=True)
        gpt["max_tokens"] = 10**6
        assert client.chat(LONG_PROMPT, model=GPT).model == GPT

    def test_others_in_flight(self, make, fake):
        """A request that runs holds what it can cost at worst: the refused one is asked again."""
        alice = fake.add_account("alice", reserves=True, credit_microcents=4_000_000)
        client = make()
        with client.stream("hi", model=lab("slow")) as running:
            next(running)
            alice.credit_microcents = 3_276_800
            thread, outcome = in_background(lambda: client.chat("hi", model=lab("text")))
            assert eventually(lambda: len(fake.chat_calls()) == 2)
            time.sleep(0.05)
            assert not outcome
            list(running)
        thread.join(5)
        assert outcome[0].text == SENTENCE
        assert told(fake) == ["alice slow", "alice text", "alice text"]
        assert len(outcome[0].attempts) == 1 and client.cooldowns() == []

    @pytest.mark.parametrize("fallback", [False, True])
    def test_too_dear_for_what_is_left(self, make, fake, fallback):
        client = make("alice", "bob", account_rotation_enabled=False)
        fake.accounts["token-alice"].credit_microcents = 100
        if fallback:
            assert client.chat("hi", model=OPUS).model == FREE[0]
        else:
            with pytest.raises(puter.CreditError, match=r"more than the \$0\.0000 left") as caught:
                client.chat("hi", model=OPUS, fallback=False)
            assert (caught.value.scope, caught.value.code) == ("model", "insufficient_funds")
            assert "max_tokens" in caught.value.hint
        assert client.cooldowns() == []

    def test_nothing_left(self, make, fake):
        client = make(*TWO)
        for account in fake.accounts.values():
            account.credit_microcents = 0
        with pytest.raises(puter.CreditError) as caught:
            client.chat("hi", model=OPUS)
        assert caught.value.scope == "account" and "free" not in str(caught.value)
        assert fake.chat_calls() == [(name, OPUS) for name in TWO]  # and no free model
        resting = [(c.account, c.model, c.reason) for c in client.cooldowns()]
        assert resting == [(name, "", "insufficient_funds") for name in TWO]

    def test_what_is_left_cannot_be_known(self, make, fake):
        client = make(max_retries=0)
        fake.accounts["token-alice"].credit_microcents = 0
        fake.routes["GET", "/metering/usage"] = refuses(500, "internal_error", "down")
        with pytest.raises(puter.CreditError, match="more than is left .down") as caught:
            client.chat("hi", model=OPUS, fallback=False)
        assert caught.value.scope == "model" and client.cooldowns() == []

    @pytest.mark.parametrize("stream", [False, True])
    def test_each_dialects_words(self, serve, make, fake, stream):
        server = serve(make(fallback_enabled=False))
        tokens = puter.estimated_tokens([user(LONG_PROMPT)])
        asked: Any = {"model": GPT, "stream": stream}
        told = post_to(server, {**asked, "messages": [user(LONG_PROMPT)]})
        assert (told.status_code, error_of(told)["code"]) == (400, "context_length_exceeded")
        assert error_of(told)["param"] == "messages"
        with sdk(server) as client, pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(**asked, input=LONG_PROMPT)
        assert refused.value.code == "context_length_exceeded"
        with claude(server) as client, pytest.raises(anthropic.BadRequestError) as refused:
            client.messages.create(**asked, max_tokens=9, messages=[user(LONG_PROMPT)])
        words = f"prompt is too long: {tokens} tokens > 16384 maximum"
        assert refused.value.body["error"]["message"] == words

    def test_the_window_that_agents_learn(self, server, fake):
        models = {m["id"]: m for m in get_from(server, "/v1/models").json()["data"]}
        windows = {GPT: 16_384, OPUS: 64_000, FREE[3]: 128_000}
        assert {name: models[name]["context_length"] for name in windows} == windows
        assert models[OPUS]["max_completion_tokens"] == 64_000


class TestPictures:
    """Pictures that a model draws: the replies that hold them are in the tables of scenarios."""

    def test_in_a_stream(self, make, fake):
        with make().stream("hi", model=lab("draw")) as stream:
            chunks = list(stream)
        assert [chunk.type for chunk in chunks] == ["image", "usage"]
        assert (chunks[0].image,) == stream.reply.images and str(chunks[0]) == ""

    @pytest.mark.parametrize("form", MODEL_OF)
    def test_in_the_history(self, make, fake, form, monkeypatch):
        client = make()
        monkeypatch.setattr(puter, "_default_client", lambda: client)
        talk = client.conversation(model=lab("draw"))
        talk.say("Draw")
        talk = puter.Conversation.from_json(json.loads(json.dumps(talk.to_json())))
        assert talk.say("And now?", model=MODEL_OF[form]).text == SENTENCE
        told, written = compact(arrived(fake)), compact(PICTURES.get(form, PICTURES["chat"]))
        assert told.count(ONE_PIXEL) == 1 and written in told

    def test_kept_in_a_cached_reply(self, make, fake):
        client = make(cache_enabled=True)
        first, again = (client.chat("hi", model=lab("draw")).images for _ in range(2))
        assert first == again != () and len(fake.chat_calls()) == 1

    def test_files_and_notebooks(self, tmp_path):
        picture, url = puter.Picture(TINY_PNG), puter.Picture(url="https://x.org/a.png")
        picture.save(tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes() == TINY_PNG
        with pytest.raises(FileExistsError):
            picture.save(tmp_path / "a.png")
        with pytest.raises(puter.BadRequestError, match="only a URL"):
            url.save(tmp_path / "b.png")
        assert picture._repr_mimebundle_() == {"image/png": TINY_PNG}
        assert url._repr_mimebundle_() == {"text/markdown": "![](https://x.org/a.png)"}
        assert (picture.as_url(), url.as_url()) == (TINY_URL, "https://x.org/a.png")

    @pytest.mark.parametrize(
        ("image", "picture"),
        table(
            ["a URL", TINY_URL, puter.Picture(TINY_PNG)],
            ["OpenAI's part", {"type": "image_url", "image_url": {"url": TINY_URL}}, puter.Picture(TINY_PNG)],
            ["its URL bare", {"image_url": TINY_URL}, puter.Picture(TINY_PNG)],
            ["of Responses", {"b64_json": TINY_URL.partition(",")[2]}, puter.Picture(TINY_PNG)],
            ["another kind than it says", {"data": "R0lGODlhAAAA", "mime_type": "image/png"}, puter.Picture(b"GIF89a\0\0\0", "image/gif")],
            ["Anthropic's part", PICTURES["claude"], puter.Picture(base64.b64decode(ONE_PIXEL))],
            ["elsewhere", {"url": "https://x.org/a"}, puter.Picture(url="https://x.org/a")],
        ),
    )  # fmt: skip
    def test_shapes(self, image, picture):
        assert puter.picture_from(image) == picture

    @pytest.mark.parametrize("image", [None, 5, {}, "file:///a.png", {"image_url": {"url": 5}}])
    def test_no_picture(self, image):
        with pytest.raises(ValueError):
            puter.picture_from(image)
        with pytest.raises(puter.ReplyError):
            puter.reply_from_driver({"result": {"message": {"images": [image]}}}, "m")
        _, error, _ = decoded(json.dumps({"type": "image", "image_url": image}).encode() + b"\n")
        assert isinstance(error, puter.StreamError)

    @pytest.mark.parametrize("flags", [[], ["--no-stream"]])
    def test_ask_saves_it(self, desk, flags):
        for name in ("fox.png", "fox-1.png"):
            done = run_cli(desk, "ask", "-m", lab("draw"), *flags, "-o", "fox.png", "Draw")
            assert (done.returncode, done.stdout.strip()) == (0, "")
            assert f"picture: {name}" in done.stderr
            assert Path(name).read_bytes() == base64.b64decode(ONE_PIXEL)
        run_cli(desk, "ask", "-m", lab("draw"), *flags, "Draw")
        assert Path("picture.png").is_file()
        done = run_cli(desk, "ask", "-m", lab("draw"), *flags, "-o", "none/a.png", "Draw")
        assert done.returncode == 1 and "none/a.png cannot be written" in done.stderr

    @pytest.mark.parametrize("stream", [False, True])
    def test_the_gateway_and_the_way_back(self, server, fake, stream):
        url = f"data:image/png;base64,{ONE_PIXEL}"
        shown = f"![image]({url})"
        body = body_for("draw", stream=stream)
        text, _ = answer_of(server, body)
        assert text == shown
        back = [*HI, assistant(f"Here: {shown}"), user("And now?")]
        assert post_to(server, {"model": CLAUDE, "messages": back}).ok
        self.check_the_way_back(fake, "Here: ")
        with claude(server) as client:
            asked: Any = {"max_tokens": 99, "model": lab("draw"), "messages": HI}
            if stream:
                with client.messages.stream(**asked) as events:
                    message = events.get_final_message()
            else:
                message = client.messages.create(**asked)
            assert [block.text for block in message.content] == [shown]
            back = [*HI, assistant([b.to_dict() for b in message.content]), user("And now?")]
            client.messages.create(**{**asked, "model": CLAUDE, "messages": back})
        self.check_the_way_back(fake)
        with sdk(server) as client:
            asked = {"model": lab("draw"), "input": "hi"}
            if stream:
                with client.responses.stream(**asked) as events:
                    answer = events.get_final_response()
            else:
                answer = client.responses.create(**asked)
            (item,) = answer.output
            assert (item.type, item.status, item.result) == (
                *("image_generation_call", "completed", ONE_PIXEL),
            )
            told: Any = [user("hi"), item.to_dict(), user("And now?")]
            client.responses.create(model=CLAUDE, input=told)
            self.check_the_way_back(fake)
            client.responses.create(model=CLAUDE, input="And?", previous_response_id=answer.id)
            self.check_the_way_back(fake)

    @staticmethod
    def check_the_way_back(fake: FakePuter, text: str = "") -> None:
        """The picture arrived once, as a picture, and nowhere as a text."""
        told = compact(arrived(fake))
        assert told.count(ONE_PIXEL) == 1 and compact(PICTURES["claude"]) in told
        assert "![image]" not in told and text in told


# =============================================================================
# Pictures and sound
# =============================================================================
DREW = puter.Picture(base64.b64decode(ONE_PIXEL))
DATA_URL = f"data:image/png;base64,{ONE_PIXEL}"
# One call of each job.
JOBS_DONE: dict[str, Callable[..., Any]] = {
    "image": lambda client, text="a dot", **args: client.image(text, **args),
    "speech": lambda client, text="Hello", **args: client.speech(text, **args),
    "transcribe": lambda client, text=None, **args: client.transcribe(WAV, prompt=text, **args),
    "ocr": lambda client, text=None, **args: client.ocr(PNG, **args),
}
NOT_RECORDED_SO = ("ocr mistral real", "ocr no provider")  # its providers were not reachable


def recorded_media() -> list[Any]:
    """The recorded exchanges of the jobs that are imitated, as test parameters."""
    found = [e for e in recordings("media.json") if isinstance(e["request"].get("body"), dict)]
    wanted = [
        e
        for e in found
        if (e["request"]["body"].get("interface"), e["request"]["body"].get("method")) in MEDIA
        if e["name"] not in NOT_RECORDED_SO
    ]
    return [pytest.param(e, id=e["name"]) for e in wanted]


def args_sent(fake: FakePuter) -> list[JSON]:
    """The arguments of every driver call."""
    return [seen.args for seen in fake.requests if seen.path == CHAT]


class TestMedia:
    """image, speech, transcribe and ocr: what is sent, what is read, and who is asked."""

    @pytest.mark.parametrize("exchange", recorded_media())
    def test_the_fake_answers_as_recorded(self, fake, exchange):
        fake.add_account("a", "t", temporary=exchange["token"] == "temp-api-token")
        recorded = exchange["response"]
        got = post(fake, CHAT, exchange["request"]["body"], "t")
        assert got.status_code == recorded["status"]
        assert got.headers["Content-Type"] == recorded["headers"]["Content-Type"]
        if got.headers["Content-Type"].startswith("audio/"):
            return
        if got.status_code != 200:
            assert got.json() == recorded["body"]
        else:
            told, wanted = got.json()["result"], recorded["body"]["result"]
            assert shape(told) == shape(wanted) or "ocr" in exchange["name"]

    def test_image(self, make, fake):
        client = make()
        assert client.image("a dot") == DREW
        (seen,) = [seen for seen in fake.requests if seen.path == CHAT]
        assert seen.body == {
            "interface": "puter-image-generation",
            "method": "generate",
            "args": {"prompt": "a dot"},
        }
        client.image("a dot", SEEDREAM, quality="low", aspect_ratio="16:9", provider=None)
        wanted = {"prompt": "a dot", "quality": "low", "aspect_ratio": "16:9"}
        assert args_sent(fake)[1] == {**wanted, "model": SEEDREAM}

    def test_pictures_to_change(self, make, fake, tmp_path):
        (tmp_path / "a.png").write_bytes(DREW.data)
        url = f"{fake.url}/samples/image_example.png"
        images = [tmp_path / "a.png", DREW.data, DATA_URL, url]
        assert make().image("blue", model="puter/gpt-image-1", images=images) == DREW
        assert args_sent(fake) == [
            {"prompt": "blue", "model": "gpt-image-1", "input_images": [DATA_URL] * 4}
        ]
        assert make().image("blue", images=url) == DREW
        assert args_sent(fake)[1]["input_images"] == [DATA_URL]
        loaded = [seen for seen in fake.requests if seen.path.startswith("/samples/")]
        assert [seen.token for seen in loaded] == [None, None]

    def test_speech(self, make, fake):
        client = make()
        assert client.speech("Hello") == puter.Audio(SOUND, "audio/mpeg")
        assert client.speech("Hello", "nova", "tts-1", response_format="wav") == puter.Audio(
            SOUND, "audio/wav"
        )
        assert client.speech("Hello", provider="gemini").mime == "audio/wav"
        said = {"text": "Hello", "provider": "openai"}
        more = {"voice": "nova", "model": "tts-1", "response_format": "wav"}
        assert args_sent(fake) == [said, {**said, **more}, {**said, "provider": "gemini"}]
        assert not any("driver" in seen.body for seen in fake.requests if seen.path == CHAT)

    def test_a_sound_stays_as_it_is_but_for_the_token(self, make, fake, monkeypatch):
        sound = Raw(b"\xff\xfb\x80 Bearer token-alice\x80\r\n", content_type="audio/mpeg")
        monkeypatch.setitem(MEDIA, ("puter-tts", "synthesize"), lambda *_: sound)
        assert make().speech("Hello").data == b"\xff\xfb\x80 Bearer <token>\x80\r\n"

    def test_transcribe(self, make, fake, tmp_path):
        client, url = make(), "data:audio/wav;base64," + base64.b64encode(WAV).decode()
        (tmp_path / "a.txt").write_bytes(WAV)  # its contents count
        for audio in (WAV, ("a.bin", WAV), tmp_path / "a.txt", str(tmp_path / "a.txt")):
            told = client.transcribe(audio, language="en")
            assert (str(told), told.segments, told.raw["usage"]["total_tokens"]) == (HEARD, [], 10)
        assert args_sent(fake) == [{"file": url, "language": "en"}] * 4
        assert client.transcribe(WAV, model="whisper-1", response_format="srt").text == SRT
        whole = client.transcribe(WAV, model="whisper-1", response_format="verbose_json")
        assert whole.segments[0]["end"] == 1.5 and str(whole) == HEARD
        assert repr(whole) == f"Transcript(text={HEARD!r})"

    def test_ocr(self, make, fake):
        client = make()
        assert client.ocr(PNG) == client.ocr(("a.pdf", PDF)) == "First line\nSecond line"
        kinds = [args["source"].partition(";")[0] for args in args_sent(fake)]
        assert kinds == ["data:image/png", "data:application/pdf"]

    @pytest.mark.parametrize(
        ("head", "kind"),
        [
            [b"RIFF....WAVE", "wav"],
            [b"ID3\x04", "mpeg"],
            [b"\xff\xfb\x90", "mpeg"],
            [b"OggS", "ogg"],
            [b"fLaC", "flac"],
            [b"\0\0\0\x20ftypM4A ", "mp4"],
            [b"\x1aE\xdf\xa3", "webm"],
        ],
    )
    def test_kinds_of_recordings(self, make, fake, head, kind):
        make().transcribe(head)
        assert args_sent(fake)[0]["file"].startswith(f"data:audio/{kind};base64,")

    @pytest.mark.parametrize("job", JOBS_DONE)
    def test_samples_cost_nothing(self, make, fake, job):
        client, ended = make(), []
        client._on_answer = lambda model, reply: ended.append(reply)
        made = JOBS_DONE[job](client, test_mode=True)
        if job in ("image", "speech"):
            wanted = (DREW.data, "image/png") if job == "image" else (SOUND, "audio/mpeg")
            assert (made.data, made.mime) == wanted and made.url.startswith(f"{fake.url}/samples/")
            assert fake.requests[-1].token is None
        else:
            assert str(made)
        assert ended[0].usage.cost_usd == 0.0

    def test_a_host_that_does_not_know_what_it_holds(self, make, fake):
        for name, data in (("image_example.png", PNG), ("tts_example.mp3", SOUND)):
            web(fake, f"/samples/{name}", Raw(data, content_type="application/octet-stream"))
        assert make().image("a dot", test_mode=True).mime == "image/png"
        assert make().speech("Hello", test_mode=True).mime == "audio/mpeg"

    def test_a_result_that_cannot_be_loaded(self, make, fake, caplog):
        fake.routes["GET", "/samples/image_example.png"] = refuses(404, "not_found", "Not Found")
        picture = make().image("a dot", test_mode=True)
        assert picture == puter.Picture(url=f"{fake.url}/samples/image_example.png")
        assert "could not be loaded" in caplog.text and len(fake.chat_calls()) == 1

    # What it costs

    @pytest.mark.parametrize(
        ("model", "cost"), [(SEEDREAM, 0.03), ("SEEDREAM-4-0", 0.03), ("gpt-image-1-mini", None), (None, None)]
    )  # fmt: skip
    def test_price(self, make, fake, model, cost):
        client, ended = make(), []
        client._on_answer = lambda model, reply: ended.append(reply)
        client.image("a dot", model)
        assert ended[0].usage.cost_usd == cost
        (stats,) = client.stats()
        assert (stats.successes, stats.cost_usd) == (1, cost or 0.0)
        lists = [seen for seen in fake.requests if seen.path == "/puterai/image/models/details"]
        assert [seen.token for seen in lists] == [None] * (model is not None)

    def test_the_lists_of_models_do_not_mix(self, make, fake):
        client = make()
        client.image("a dot", SEEDREAM)
        assert SEEDREAM not in ids(client.models()) and OPUS in ids(client.models())
        again, ended = make(), []
        again._on_answer = lambda model, reply: ended.append(reply.usage.cost_usd)
        again.image("a dot", SEEDREAM)
        assert OPUS in ids(again.models()) and ended == [0.03]
        assert sum(seen.path == "/puterai/image/models/details" for seen in fake.requests) == 1

    # What is refused before anything is sent

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            [lambda c: c.image(""), "Give a text"],
            [lambda c: c.speech(5), "Give a text"],
            [lambda c: c.image("x", model=""), "model is ''"],
            [lambda c: c.image("x", qualty="low"), "Did you mean quality"],
            [lambda c: c.image("x", timeout=5), "Did you mean timeout_ms"],
            [lambda c: c.image("x", timeout_ms=0), "timeout_ms is 0"],
            [lambda c: c.image("x", max_retries=1), "max_retries belongs to the client"],
            [
                lambda c: c.image("x", puter_output_path="~/a.png"),
                "no argument 'puter_output_path'",
            ],
            [lambda c: c.image("x", images=[b"text"]), "not an image"],
            [lambda c: c.image("x", images=["httpd.png"]), "cannot be read"],
            [lambda c: c.transcribe(PNG), "none of WAV"],
            [lambda c: c.transcribe(("a.wav", b"")), "a.wav is none of WAV"],
            [lambda c: c.transcribe("/no/such.wav"), "cannot be read"],
            [lambda c: c.transcribe(5), "cannot be read"],
            [lambda c: c.transcribe(("a.wav", "text")), "cannot be read"],
            [lambda c: c.transcribe(WAV, langage="en"), "Did you mean language"],
            [lambda c: c.ocr(WAV), "none of PNG"],
        ],
    )
    def test_wrong_arguments(self, make, fake, call, words):
        with pytest.raises(puter.BadRequestError, match=re.escape(words)):
            call(make())
        assert fake.requests == []

    def test_servers_that_are_not_puters(self, make, fake):
        client = make(api_style="openai", api_base_url=f"{fake.url}/v1", openai_api_key="sk-none")
        with pytest.raises(puter.BadRequestError, match="Only Puter's own server"):
            client.image("a dot")
        assert fake.requests == []
        assert make(api_style="openai").image("a dot") == DREW

    # What goes wrong

    @pytest.mark.parametrize(
        ("call", "kind", "words", "calls"),
        [
            [lambda c: c.image("scenario: err400"), puter.BadRequestError, "moderation blocked the request", 1],
            [lambda c: c.speech("scenario: err400"), puter.BadRequestError, "moderation blocked the request", 1],
            [lambda c: c.image("scenario: err401"), puter.ProviderAuthError, "scripted 401", 1],
            [lambda c: c.image("scenario: err429"), puter.ModelRateLimitError, "scripted 429", 1],
            [lambda c: c.image("scenario: err500"), puter.ModelUnavailableError, "unavailable", 2],
            [lambda c: c.image("x", "nope"), puter.ModelNotFoundError, "No model is called 'nope'", 1],
            [lambda c: c.image("x", "seedream-4"), puter.ModelNotFoundError, f"mean {SEEDREAM}?", 1],
            [lambda c: c.speech("x", "nobody"), puter.BadRequestError, f"Expected: {VOICES}", 1],
            [lambda c: c.speech("x", provider=""), puter.ServerError, "Internal Server Error", 3],
            [lambda c: c.image("scenario: closed"), puter.ReplyError, "broke off", 1],
            [lambda c: c.image("scenario: hang", timeout_ms=200), puter.RequestTimeoutError, "silent", 1],
        ],
    )  # fmt: skip
    def test_errors(self, make, fake, call, kind, words, calls):
        client = make("alice", "bob", max_retries=2)
        if "Internal" in words:
            fake.accounts["token-alice"].error = recorded_error(500, "internal_error", words)
        with pytest.raises(kind, match=re.escape(words)) as caught:
            call(client)
        assert type(caught.value) is kind
        assert fake.chat_calls().count(("alice", fake.chat_calls()[0][1])) == calls
        assert len(caught.value.attempts) == len(fake.chat_calls()) == calls
        assert "puter models" not in str(caught.value) or kind is not puter.ModelNotFoundError

    @pytest.mark.parametrize(
        "result", [None, 5, {}, {"url": None}, "ftp://x", {"text": None, "segments": 5}, []]
    )
    @pytest.mark.parametrize("job", JOBS_DONE)
    def test_results_that_cannot_be_read(self, make, fake, monkeypatch, job, result):
        for known in MEDIA:
            monkeypatch.setitem(MEDIA, known, lambda *_: result)
        if job == "transcribe" and isinstance(result, str):
            return
        with pytest.raises(puter.ReplyError, match="unknown format"):
            JOBS_DONE[job](make())
        assert len(fake.chat_calls()) == 1

    def test_a_page_in_place_of_a_sound(self, make, fake, monkeypatch):
        page = Raw(b"<html>Sign in</html>", content_type=HTML_TYPE)
        monkeypatch.setitem(MEDIA, ("puter-tts", "synthesize"), lambda *_: page)
        with pytest.raises(puter.ReplyError, match="answered text/html"):
            make().speech("Hello")
        assert len(fake.chat_calls()) == 1

    # Who is asked

    @pytest.mark.parametrize("job", JOBS_DONE)
    def test_the_next_account_when_one_is_limited(self, make, fake, job):
        client = make("alice", "bob")
        fake.accounts["token-alice"].max_in_window = 0
        assert JOBS_DONE[job](client)
        assert [account for account, _ in fake.chat_calls()] == ["alice", "bob"]
        assert [(c.account, c.reason) for c in client.cooldowns()] == [
            ("alice", "too_many_requests")
        ]
        assert JOBS_DONE[job](client)
        assert fake.chat_calls()[2][0] == "bob"

    def test_credit(self, make, fake):
        client = make("alice", "bob")
        fake.accounts["token-alice"].credit_microcents = 0
        assert client.image("a dot") == DREW
        assert [account for account, _ in fake.chat_calls()] == ["alice", "bob"]
        # what is too little for a picture may do for a chat
        assert client.cooldowns() == []
        fake.accounts["token-bob"].credit_microcents = 0
        with pytest.raises(puter.CreditError, match="Insufficient credits for image") as caught:
            client.image("a dot")
        assert type(caught.value) is puter.CreditError and len(caught.value.attempts) == 2
        assert not any(seen.path == "/metering/usage" for seen in fake.requests)

    def test_a_dead_token(self, make, fake):
        client = make("alice", "bob")
        fake.accounts["token-alice"].dead = True
        assert client.image("a dot") == DREW
        assert [c.reason for c in client.cooldowns()] == ["login"]

    def test_no_other_model_answers(self, make, fake):
        fake.accounts["token-alice"].error = recorded_error(
            400, "upstream_provider_unavailable", "down"
        )
        with pytest.raises(puter.ModelUnavailableError):
            make().image("a dot", SEEDREAM)
        assert {model for _, model in fake.chat_calls()} == {SEEDREAM}

    def test_the_limit_of_requests_at_once(self, make, fake, monkeypatch):
        monkeypatch.setitem(MEDIA, ("puter-ocr", "recognize"), lambda handler, *_: [
            handler.pause(0.02), recognize(handler, handler.seen.args, None)
        ][1])  # fmt: skip
        fake.accounts["token-alice"].max_concurrent = 1
        client = make(max_concurrent=1, max_retries=0)
        with ThreadPoolExecutor(4) as pool:
            texts = list(pool.map(lambda _: client.ocr(PNG), range(8)))
        assert set(texts) == {"First line\nSecond line"}

    def test_nothing_is_cached(self, make, fake):
        client = make(cache_enabled=True)
        for _ in range(2):
            client.image("a dot")
        assert len(fake.chat_calls()) == 2
        stats = client._reply_cache.cache_stats(time.time(), 60)
        assert (stats["entries"], stats["misses"]) == (0, 0)

    def test_a_name_that_is_put_right(self, make, fake):
        client = make()
        assert client.image("a dot", "SeeDream-4-0") == DREW
        assert [model for _, model in fake.chat_calls()] == ["SeeDream-4-0", SEEDREAM]

    def test_values(self, tmp_path):
        audio = puter.Audio(b"ID3", url="")
        assert audio._repr_html_() == '<audio controls src="data:audio/mpeg;base64,SUQz"></audio>'
        audio.save(tmp_path / "a.mp3")
        with pytest.raises(FileExistsError):
            audio.save(tmp_path / "a.mp3")
        puter.Audio(b"ID3 new").save(tmp_path / "a.mp3", overwrite=True)
        assert (tmp_path / "a.mp3").read_bytes() == b"ID3 new"
        assert "SUQz" not in repr(audio) and not isinstance(audio, puter.Picture)


def recorded_error(status: int, code: str, message: str) -> tuple[int, JSON]:
    """An error as the answer of an account."""
    return status, {"error": message, "message": message, "code": code}


class TestMediaCommands:
    """image, speak, transcribe and ocr on the command line."""

    def test_image(self, desk):
        done = run_cli(desk, "image", "a", "red", "dot", "-o", "cat.png", "-m", SEEDREAM)
        assert (done.returncode, done.stdout) == (0, "cat.png\n")
        assert done.stderr == f"{SEEDREAM} on alice; cost $0.0300\n"
        assert Path("cat.png").read_bytes() == DREW.data
        assert args_sent(desk) == [{"prompt": "a red dot", "model": SEEDREAM}]
        for name in ("picture.png", "picture-1.png"):
            done = run_cli(desk, "image", "-a", "cat.png", stdin="a dot\n")
            assert (done.returncode, done.stdout) == (0, f"{name}\n")
            assert done.stderr == "puter-image-generation on alice; cost not reported\n"
            assert Path(name).read_bytes() == DREW.data
        assert args_sent(desk)[-1] == {"prompt": "a dot", "input_images": [DATA_URL]}

    @pytest.mark.parametrize("command", ["image", "speak"])
    def test_a_file_that_exists(self, desk, command):
        Path("a.bin").write_bytes(b"mine")
        done = run_cli(desk, command, "hi", "-o", "a.bin")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: a.bin exists already.") and desk.requests == []
        assert Path("a.bin").read_bytes() == b"mine"
        done = run_cli(desk, command, "hi", "-o", "a.bin", "--force")
        assert (done.returncode, done.stdout) == (0, "a.bin\n")
        assert Path("a.bin").read_bytes() in (DREW.data, SOUND)
        assert not Path("a-1.bin").exists()

    def test_a_place_that_cannot_be(self, desk):
        done = run_cli(desk, "image", "hi", "-o", "none/a.png")
        assert done.returncode == 1 and "none/a.png cannot be written" in done.stderr
        assert desk.requests == []

    def test_a_picture_that_is_only_a_url(self, desk, monkeypatch):
        url = f"{desk.url}/samples/none.png"
        monkeypatch.setitem(MEDIA, ("puter-image-generation", "generate"), lambda *_: url)
        done = run_cli(desk, "image", "hi", "-o", "a.png")
        assert (done.returncode, done.stdout) == (0, f"{url}\n")
        assert not Path("a.png").exists() and len(desk.chat_calls()) == 1

    def test_speak(self, desk):
        done = run_cli(desk, "speak", "Good morning", "--voice", "nova", "--json")
        assert done.returncode == 0 and Path("speech.mp3").read_bytes() == SOUND
        report = json.loads(done.stdout)
        assert report == {
            "model": "puter-tts",
            "account": "alice",
            "cost_usd": None,
            "file": "speech.mp3",
            "mime": "audio/mpeg",
        }
        run_cli(desk, "speak", "-", "-o", "x", "-m", "tts-1", stdin="From a pipe.\n")
        assert Path("x.mp3").read_bytes() == SOUND
        texts = [args["text"] for args in args_sent(desk)]
        assert texts == ["Good morning", "From a pipe."] and args_sent(desk)[1]["model"] == "tts-1"

    def test_transcribe_and_ocr(self, desk):
        Path("a.wav").write_bytes(WAV)
        Path("page.png").write_bytes(PNG)
        done = run_cli(desk, "transcribe", "a.wav")
        assert (done.returncode, done.stdout) == (0, f"{HEARD}\n")
        assert done.stderr == "puter-speech2txt on alice; cost not reported\n"
        report = json.loads(run_cli(desk, "transcribe", "a.wav", "--json").stdout)
        assert (report["text"], report["usage"]["total_tokens"]) == (HEARD, 10)
        done = run_cli(desk, "ocr", "page.png", PUTER_QUIET_MODE="1")
        assert (done.stdout, done.stderr) == ("First line\nSecond line\n", "")
        report = json.loads(run_cli(desk, "ocr", "page.png", "--json").stdout)
        assert report["text"] == "First line\nSecond line"

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            [["image", "scenario: err400"], "moderation blocked"],
            [["image", ""], "Give a text"],
            [["image", "hi", "-a", "no.png"], "cannot be read"],
            [["speak", "hi", "--voice", "nobody"], "Expected: alloy"],
            [["transcribe", "no.wav"], "cannot be read"],
            [["ocr", "notes.txt"], "none of PNG"],
        ],
    )
    def test_errors(self, desk, argv, words):
        Path("notes.txt").write_text("remember", "utf-8")
        done = run_cli(desk, *argv)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ") and words in done.stderr
        assert not list(Path().glob("*.png"))

    def test_signs_of_life_at_a_terminal(self, desk):
        with at_terminal(desk, "image", "scenario: hang") as terminal:
            assert terminal.expect("1 s")


def form_of_parts(*parts: tuple[str, bytes], end: bytes = b"--") -> bytes:
    """A form of (head, content) with the boundary `b`."""
    body = b"".join(b"--b\r\n%b\r\n\r\n%b\r\n" % (h.encode(), c) for h, c in parts)
    return body + b"--b" + end + b"\r\n"


A_FILE = ('Content-Disposition: form-data; name="file"; filename="a.wav"', WAV)
A_FORM = "multipart/form-data; boundary=b"


class TestMediaGateway:
    """OpenAI's paths of pictures and sound, with its SDK."""

    @staticmethod
    def post(
        server: puter.OpenAIServer,
        path: str,
        body: Any,
        kind: str = "application/json",
        **head: str,
    ) -> requests.Response:
        """A request, by plain `requests`; bytes are sent as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": kind, **head}
        return requests.post(f"{server.url}/{path}", data=data, headers=headers, timeout=10)

    def test_images(self, server, fake):
        with sdk(server) as client:
            asked: Any = {"prompt": "a dot", "model": "gpt-image-1-mini", "n": 1}
            made = client.images.generate(**asked, size="1536x1024", quality="low")
            assert base64.b64decode(made.data[0].b64_json) == DREW.data and made.created > 1e9
            assert client.images.generate(**asked, response_format="url").data[0].url == DATA_URL
            client.images.generate(**asked, size="auto", quality="auto", user="u")
            sample = {"response_format": "url", "extra_body": {"test_mode": True}}
            made = client.images.generate(prompt="a dot", **sample)
            assert made.data[0].url == f"{fake.url}/samples/image_example.png"
        plain = {"prompt": "a dot", "model": "gpt-image-1-mini"}
        ratio = {"quality": "low", "ratio": {"w": 1536, "h": 1024}}
        wanted = [{**plain, **ratio}, plain, plain, {"prompt": "a dot", "test_mode": True}]
        assert args_sent(fake) == wanted

    def test_speech(self, server, fake):
        with sdk(server) as client:
            asked: Any = {"input": "Hello", "model": "tts-1", "voice": "nova"}
            made = client.audio.speech.create(**asked, response_format="wav", speed=1.5)
            assert made.content == SOUND and made.response.headers["Content-Type"] == "audio/wav"
            assert made.response.headers["x-puter-model"] == "tts-1"
            with client.audio.speech.with_streaming_response.create(**asked) as streamed:
                assert b"".join(streamed.iter_bytes(100)) == SOUND
                assert streamed.headers["Content-Type"] == "audio/mpeg"
        said = {"text": "Hello", "provider": "openai", "model": "tts-1", "voice": "nova"}
        assert args_sent(fake) == [{**said, "response_format": "wav"}, said]

    def test_transcriptions(self, server, fake):
        audio = WAV + os.urandom(100_000) + b"\r\n--\r\n\r\n\r"
        with sdk(server) as client:
            create: Any = client.audio.transcriptions.create
            asked = {"file": ("é.wav", audio), "model": "whisper-1"}
            assert create(**asked, language="en", prompt="Hé").text == HEARD
            assert create(**asked, response_format="text") == HEARD
            assert create(**asked, response_format="srt") == SRT
            whole = create(**asked, response_format="verbose_json")
            assert whole.segments[0].end == 1.5 and whole.language == "english"
        url = "data:audio/wav;base64," + base64.b64encode(audio).decode()
        assert {args["file"] for args in args_sent(fake)} == {url}
        wanted = {"file": url, "model": "whisper-1", "language": "en", "prompt": "Hé"}
        assert args_sent(fake)[0] == wanted

    @pytest.mark.parametrize(
        ("asked", "status", "code", "words"),
        [
            [{"prompt": "scenario: err400"}, 400, "moderation_blocked", "moderation blocked"],
            [{"prompt": "x", "model": "nope"}, 404, "model_not_found", "No model is called 'nope'"],
            [{"prompt": "scenario: err429"}, 429, "upstream_rate_limited", "scripted 429"],
            [{"prompt": "scenario: err401"}, 502, "upstream_auth_failed", "scripted 401"],
        ],
    )
    def test_errors(self, server, fake, asked, status, code, words):
        with sdk(server) as client, pytest.raises(openai.APIStatusError, match=words) as caught:
            client.images.generate(**asked)
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert caught.value.response.headers["x-should-retry"] == "false"

    def test_other_errors(self, server, fake):
        with sdk(server) as client:
            with pytest.raises(openai.BadRequestError, match="Expected: alloy"):
                client.audio.speech.create(input="x", model="tts-1", voice="nobody")
            fake.accounts["token-alice"].credit_microcents = 0
            with pytest.raises(openai.APIStatusError, match="Insufficient credits") as caught:
                client.images.generate(prompt="x")
        assert (caught.value.status_code, caught.value.code) == (402, "insufficient_funds")
        assert len(fake.chat_calls()) == 2

    @pytest.mark.parametrize(
        ("path", "body", "words"),
        [
            ["images/generations", {}, "prompt is missing"],
            ["images/generations", {"prompt": ["x"]}, "prompt is missing"],
            ["images/generations", {"prompt": "x", "n": 2}, "leave out n"],
            ["images/generations", {"prompt": "x", "stream": True}, "leave out n and stream"],
            ["images/generations", {"prompt": "x", "size": "big"}, "size must be"],
            ["images/generations", {"prompt": "x", "model": 5}, "model is 5"],
            ["audio/speech", {"input": "", "model": "tts-1"}, "input is missing"],
            # it would be read from the disk of the gateway
            ["audio/transcriptions", {"file": "a.wav"}, "file is missing"],
            ["audio/transcriptions", {"file": ["a.wav", "x"]}, "file is missing"],
        ],
    )  # fmt: skip
    def test_wrong_requests(self, server, fake, tmp_path, monkeypatch, path, body, words):
        monkeypatch.chdir(tmp_path)
        Path("a.wav").write_bytes(WAV)
        told = self.post(server, path, body)
        assert told.status_code == 400 and words in told.json()["error"]["message"]
        assert fake.chat_calls() == []

    @pytest.mark.parametrize(
        ("body", "kind", "words"),
        [
            [form_of_parts(A_FILE), "multipart/form-data", "no end"],
            [form_of_parts(A_FILE), "multipart/form-data; boundary=c", "no end"],
            [form_of_parts(A_FILE, end=b""), A_FORM, "no end"],
            [form_of_parts(A_FILE)[:-8], A_FORM, "no end"],
            [form_of_parts(*[A_FILE] * 99), A_FORM, "too many parts"],
            [form_of_parts((A_FILE[0].replace("file", "data"), WAV)), A_FORM, "file is missing"],
            [form_of_parts((A_FILE[0].partition("; filename")[0], b"a.wav")), A_FORM, "file is miss"],
            [form_of_parts((A_FILE[0], b"text")), A_FORM, "a.wav is none of WAV"],
            [form_of_parts(("\0:\r\n :;=\xff\r\n\r\nname", b"x")), A_FORM, "file is missing"],
            [b"", A_FORM, "no end"],
        ],
    )  # fmt: skip
    def test_wrong_forms(self, server, fake, tmp_path, monkeypatch, body, kind, words):
        monkeypatch.chdir(tmp_path)
        Path("a.wav").write_bytes(WAV)
        told = self.post(server, "audio/transcriptions", body, kind)
        assert told.status_code == 400 and words in told.json()["error"]["message"]
        assert fake.chat_calls() == []
        told = self.post(server, "audio/transcriptions", form_of_parts(A_FILE), A_FORM)
        assert told.json()["text"] == HEARD

    def test_a_form_that_is_too_large(self, server, fake, monkeypatch):
        monkeypatch.setattr(puter, "MAX_REQUEST_BYTES", 1_000)
        body = form_of_parts((A_FILE[0], WAV + bytes(2_000)))
        assert self.post(server, "audio/transcriptions", body, A_FORM).status_code == 413
        assert fake.chat_calls() == []

    def test_who_may_call(self, serve, make, fake):
        server = serve(make(), api_key=KEY, allowed_origins=["https://app.example"])
        asked = {"prompt": "a dot"}
        assert self.post(server, "images/generations", asked).status_code == 401
        key = {"Authorization": f"Bearer {KEY}", "Origin": "https://app.example"}
        told = self.post(server, "images/generations", asked, **key)
        assert told.ok and told.headers["Access-Control-Allow-Origin"] == "https://app.example"
        told = get_from(server, "/v1/audio/speech", **key)
        assert (told.status_code, told.headers["Allow"]) == (405, "POST")
        told = get_from(server, "/v1/images/generations", "OPTIONS", Origin="https://app.example")
        assert told.status_code == 204
        # who may use chosen models alone is not to spend on others
        few = serve(make(), models=[OPUS])
        assert self.post(few, "images/generations", asked).status_code == 404
        assert len(fake.chat_calls()) == 1

    def test_a_client_that_hangs_up(self, server, fake):
        body = b'{"prompt": "scenario: hang"}'
        with connected(server) as sock:
            head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            sock.sendall(head.encode() + body)
            assert eventually(lambda: fake.accounts["token-alice"].running == 1)
        assert eventually(lambda: fake.accounts["token-alice"].running == 0)
        assert len(fake.chat_calls()) == 1

    def test_a_sound_that_is_only_a_url(self, server, fake):
        fake.routes["GET", "/samples/tts_example.mp3"] = refuses(404, "not_found", "Not Found")
        asked = {"input": "x", "model": "tts-1", "voice": "nova", "test_mode": True}
        told = self.post(server, "audio/speech", asked)
        assert told.status_code == 502 and "only a URL" in told.json()["error"]["message"]
        fake.routes["GET", "/samples/image_example.png"] = refuses(404, "not_found", "Not Found")
        told = self.post(server, "images/generations", {"prompt": "x", "test_mode": True})
        assert told.json()["data"] == [{"url": f"{fake.url}/samples/image_example.png"}]


# =============================================================================
# Cached replies and metrics
# =============================================================================
class TestReplies:
    """`Reply` at the prompt and in Jupyter, and cached replies."""

    def test_how_it_looks(self):
        call = puter.ToolCall("call_1", "get_weather", {"city": "Rome"})
        reply = puter.Reply("**Hi**", model="m", finish_reason="length")
        assert str(reply) == reply._repr_markdown_() == "**Hi**"
        assert repr(reply) == "<m, length>\n**Hi**"
        assert "-> get_weather({'city': 'Rome'})" in repr(replace(reply, tool_calls=(call,)))
        assert "get_weather" in puter.Reply(tool_calls=(call,))._repr_markdown_()
        assert "token" not in repr(puter.Account("alice", "token-alice"))

    def ask(self, client: puter.Puter, how: str, **more: Any) -> puter.Reply:
        """A reply, whole or from a stream."""
        more = {"model": lab("reason"), **more}
        if how == "chat":
            return client.chat("hi", **more)
        with client.stream("hi", **more) as stream:
            assert "".join(map(str, stream)) == str(stream.reply)
            return stream.reply

    @pytest.mark.parametrize("first", ["chat", "stream"])
    @pytest.mark.parametrize("second", ["chat", "stream"])
    def test_the_same_request_is_answered_from_the_cache(self, make, fake, first, second):
        client = make(cache_enabled=True)
        one, two = self.ask(client, first), self.ask(client, second)
        assert len(chats(fake)) == 1
        for name in ("text", "reasoning", "finish_reason", "model", "account"):
            assert getattr(one, name) == getattr(two, name), name
        assert one.usage.cost_usd and two.usage == replace(one.usage, cost_usd=0.0)
        assert two.reasoning and two.usage and not two.attempts
        self.ask(make(cache_enabled=True), "chat")  # another process finds it too
        assert len(chats(fake)) == 1

    def test_calls_are_cached(self, make, fake):
        client = make(cache_enabled=True)
        replies = [client.chat("hi", model=lab("extra"), tools=[WEATHER]) for _ in range(2)]
        assert replies[0].tool_calls == replies[1].tool_calls
        assert replies[1].tool_calls[0].extra_content == SIGNATURE
        assert len(chats(fake)) == 1

    @pytest.mark.parametrize(
        "more",
        [
            {"temperature": 1},
            {"model": lab("text")},
            {"system": "Be brief"},
            {"tools": [WEATHER]},
            {"images": [PNG]},
            {"cache_enabled": False},
        ],
    )
    def test_another_request_is_asked(self, make, fake, more):
        more = dict(more)
        client = make(cache_enabled=more.pop("cache_enabled", True))
        self.ask(client, "chat")
        self.ask(client, "chat", **more)
        assert len(chats(fake)) == 2

    def test_it_grows_old(self, make, fake):
        client = make(cache_enabled=True, cache_ttl_ms=150)
        self.ask(client, "chat")
        time.sleep(0.2)
        self.ask(client, "chat")
        assert len(chats(fake)) == 2

    def test_the_oldest_go(self, make, fake):
        client = make(cache_enabled=True, cache_max_entries=2)
        for text in ("a", "b", "c", "c", "b", "a"):
            client.chat(text, model=lab("echo"))
        assert len(chats(fake)) == 4  # a, b, c, and a again

    @pytest.mark.parametrize("how", ["chat", "stream"])
    @pytest.mark.parametrize("scenario", ["closed", "err400", "badargs"])
    def test_a_failure_is_not_cached(self, make, fake, how, scenario):
        client = make(cache_enabled=True, max_retries=0)
        for _ in range(2):
            with pytest.raises(puter.PuterError):
                ask(client, how, lab(scenario), fallback=False)
        assert len(chats(fake)) == 2

    def test_a_live_stream_that_may_have_lost_calls_is_not_cached(self, make, fake):
        client = make(cache_enabled=True, stream_tools="live")
        options = {"model": lab("twotools"), "tools": [WEATHER]}
        with client.stream("hi", **options) as stream:
            list(stream)
        assert len(stream.reply.tool_calls) == 1
        assert len(client.chat("hi", **options).tool_calls) == 2

    def test_a_stream_that_is_left_is_not_cached(self, make, fake):
        client = make(cache_enabled=True)
        with client.stream("hi", model=lab("slow")) as stream:
            next(stream)
        assert str(client.chat("hi", model=lab("slow"))) == SENTENCE
        assert len(chats(fake)) == 2

    def test_a_folder_of_its_own(self, make, tmp_path):
        folder = tmp_path / "replies"
        client = make(cache_enabled=True, cache_directory=str(folder))
        self.ask(client, "chat")
        (path,) = folder.glob("*.sqlite3")
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or os.name == "nt"

    def test_a_file_is_not_sent_for_a_cached_reply(self, make, fake):
        client = make(cache_enabled=True)
        for _ in range(2):
            self.ask(client, "chat", files=[SMALL_PDF])
        assert len(fake.chat_calls()) == 1

    def test_a_conversation_remembers_a_cached_reply(self, make):
        client = make(cache_enabled=True)
        for _ in range(2):
            talk = client.conversation(model=lab("echo"))
            assert "".join(map(str, talk.stream("hi"))) == "hi"
            assert roles(talk) == "ua"


class TestStats:
    """Statistics of every call, exact however many ask at once."""

    def test_statistics_of_models(self):
        totals = [("ok", 3, 0.5), ("late", 2, 0.25)]
        samples = [(4.0, 1.0, 20), (2.0, None, 10), (9.0, 3.0, None)]
        many, few = puter.stats_of("many", totals, samples), puter.stats_of("few", totals, ())
        assert (many.model, many.requests, many.successes) == ("many", 5, 3)
        assert (many.failures, many.cost_usd) == ({"late": 2}, 0.75)
        assert (many.p50_s, many.p95_s, many.first_s) == (4.0, 9.0, 1.0)
        assert many.tokens_per_s == 5.0
        assert (few.model, few.p50_s, few.tokens_per_s) == ("few", None, None)

    @pytest.mark.parametrize(
        ("sort", "want"),
        [("id", "abcd"), ("price", "cbda"), ("context", "bdac"), ("released", "dbac")],
    )
    def test_orders_of_models(self, sort, want):
        def priced(name, usd_in, usd_out, **more):
            return model(name, input_usd_per_million=usd_in, output_usd_per_million=usd_out, **more)

        models = [
            model("a", context=5, released="2024-01-02"),
            priced("b", 1.0, 1.0, context=9, released="2024-11-01"),
            priced("c", 1.5, 0.0),
            priced("d", 0.5, 3.0, context=7, released="2025-01-01"),
        ]
        assert ids(sorted(models, key=puter.MODEL_SORTS[sort])) == list(want)

    @pytest.mark.parametrize(
        ("values", "percent", "want"),
        [
            ([], 50, None),
            ([3], 95, 3),
            ([1, 2], 50, 1),
            ([3, 1, 2], 50, 2),
            (range(1, 101), 95, 95),
            (range(1, 12), 95, 11),
            ([5, 1], 0, 1),
            ([5, 1], 100, 5),
        ],
    )
    def test_percentile(self, values, percent, want):
        assert puter.percentile(values, percent) == want

    def test_statistics(self, make, fake):
        client = make(max_retries=0)
        for how in ("chat", "stream"):
            ask(client, how, lab("text"))
        with client.stream("hi", model=lab("text")) as stream:
            next(stream)
        with pytest.raises(puter.PuterError):
            client.chat("hi", model=lab("err400"), fallback=False)
        text, failed = client.stats()
        assert (text.model, text.requests, text.successes) == (lab("text"), 3, 2)
        assert text.failures == {} and text.cost_usd == pytest.approx(2 * 0.000055)
        assert 0 < text.p50_s <= text.p95_s < 5
        assert 0 < text.first_s < 5 and text.tokens_per_s > 0
        assert (failed.model, failed.requests, failed.successes) == (lab("err400"), 1, 0)
        assert failed.failures == {"upstream_bad_request": 1} and failed.p50_s is None
        assert client.stats("puter/" + lab("text")) == [text]
        assert client.stats("nothing") == []

    def test_retries_and_fallbacks_count_for_who_was_asked(self, make, fake):
        fake.script[lab("text")] = ["internal", "err429"]
        make(max_retries=1).chat("hi", model=lab("text"))
        told = {s.model: (s.requests, s.successes) for s in make().stats()}
        assert told == {lab("text"): (2, 0), FREE[0]: (1, 1)}

    def test_a_file_of_their_own_or_none(self, make, tmp_path):
        make(metrics_enabled=False).chat("hi", model=lab("text"))
        client = make(metrics_file=str(tmp_path / "stats.sqlite3"))
        client.chat("hi", model=lab("text"))
        assert (tmp_path / "stats.sqlite3").exists()
        assert make().stats() == [] and len(client.stats()) == 1

    def test_32_threads(self, make):
        client = make(max_concurrent=32, max_retries=0)

        def work(how):
            return [ask(client, how, lab("text")).text for _ in range(3)]

        for thread, outcome in [
            in_background(functools.partial(work, how)) for how in ["chat", "stream"] * 16
        ]:
            thread.join(30)
            assert outcome == [[SENTENCE] * 3]
        (stats,) = client.stats()
        assert (stats.requests, stats.successes, stats.failures) == (96, 96, {})
        assert stats.cost_usd == pytest.approx(96 * 0.000055)

    def test_8_processes(self, make, home):
        client = make()
        script = """
            for n in range(25):
                usage = puter.Usage(1, 2, cost_usd=0.5)
                puter.State().record("m", "ok" if n % 5 else "late", 1.0, 0.5, usage)
        """
        run_at_once(script, home, 8)
        (stats,) = client.stats()
        assert (stats.requests, stats.successes) == (200, 160)
        assert stats.failures == {"late": 40} and stats.cost_usd == pytest.approx(100)
        client.reset_stats()
        assert client.stats() == []


class TestModuleLevel:
    """`puter.chat`, `puter.stream`, and what the module shows."""

    def test_chat_and_stream(self, fake, home, monkeypatch):
        sign_in(fake, home, "alice")
        monkeypatch.setattr(puter, "_default", None)
        monkeypatch.setenv("PUTER_API_BASE_URL", fake.url)
        assert str(puter.chat("hi", model=lab("echo"), system="Be brief")) == "hi"
        client = puter._default_client()
        with puter.stream("hi", model=lab("text")) as stream:
            assert "".join(map(str, stream)) == SENTENCE
        # In a notebook the token may come late: the client is made anew, and only then.
        assert puter._default_client() is client
        monkeypatch.setenv("PUTER_AUTH_TOKEN", "token-bob")
        puter.chat("hi", model=lab("text"))
        assert [account for account, _ in fake.chat_calls()] == ["alice", "alice", "bob"]
        puter._default_client().close()

    @pytest.mark.parametrize("name", ["chat", "stream"])
    def test_functions_look_like_the_methods(self, name):
        function, method = getattr(puter, name), getattr(puter.Puter, name)
        parameters = list(inspect.signature(function).parameters)
        assert parameters == list(inspect.signature(method).parameters)[1:]
        assert "model" in parameters and function.__doc__.startswith(method.__doc__)

    def test_one_client_for_many_threads(self, home, monkeypatch):
        monkeypatch.setattr(puter, "_default", None)
        start = threading.Barrier(8)
        running = [
            in_background(lambda: (start.wait(10), puter._default_client())[1]) for _ in range(8)
        ]
        for thread, _ in running:
            thread.join(10)
        assert len({id(outcome[0]) for _, outcome in running}) == 1

    @pytest.mark.parametrize("answer", ["", "n"])
    def test_a_person_who_is_not_signed_in_is_asked(self, fake, home, monkeypatch, capsys, answer):
        alice = puter.Account("alice", "token-alice")
        monkeypatch.setenv("PUTER_API_BASE_URL", fake.url)
        sit_down(monkeypatch, lambda _: answer)
        monkeypatch.setattr(puter, "browser_login", lambda *_, **__: alice)
        monkeypatch.setattr(puter, "_read_stdin", lambda: b"")
        code = puter.main(["ask", "-m", lab("echo"), "hello"])
        told = capsys.readouterr()
        assert "You are not signed in." in told.err, told
        if answer == "n":
            assert (code, told.out) == (1, "") and not fake.requests
        else:
            assert (code, told.out) == (0, "hello\n")
            assert names(puter.AccountStore(home)) == ["alice"]

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"debugg": True}, "no setting 'debugg'.*'debug'"),
            ({"token": "t", "account": "alice"}, "both given"),
            ({"config": {"debug": True}}, "config is .*Pass a Config"),
            ({"session": "s"}, "session is 's'.*requests.Session"),
        ],
    )
    def test_arguments_that_cannot_be(self, home, given, words):
        with pytest.raises(puter.ConfigError, match=words):
            puter.Puter(**given)

    def test_names(self):
        assert puter.__all__ == sorted(puter.__all__, key=lambda n: (n.islower(), n))
        assert all(hasattr(puter, name) for name in puter.__all__)
        assert dir(puter) == sorted([*puter.__all__, "__version__"])
        errors = {
            name
            for name, value in vars(puter).items()
            if isinstance(value, type) and issubclass(value, puter.PuterError)
            if not name.startswith("_")
        }
        assert errors <= set(puter.__all__)

    def test_every_public_name_says_what_it_is(self):
        for name in puter.__all__:
            assert getattr(puter, name).__doc__, name
        assert importlib.import_module("puter").__doc__


# =============================================================================
# Commands at a terminal
# =============================================================================
# Takes the terminal for its own, so that Ctrl-C reaches it, and is the command then.
AT_TERMINAL = (
    "import fcntl, sys, termios, puter\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "sys.exit(puter.main())"
)
needs_pty = pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are of Unix")


def plain(text: str) -> str:
    """What a terminal was sent, without colours and moves."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n")


class Terminal:
    """A command at a pseudo-terminal: `send` types, `expect` waits for what it shows.

    With `piped`, its stdout is a pipe, read into `piped_out` once it has ended.
    """

    def __init__(
        self, fake: FakePuter, *argv: str, columns: int = 80, piped: bool = False, **env: str
    ) -> None:
        import fcntl
        import pty
        import termios

        self.master, tty = pty.openpty()
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(tty, termios.TIOCSWINSZ, size)
        self.shown, self.read_to, self.piped_out = "", 0, b""
        unset = ("NO_COLOR", "COLUMNS", "LINES", "CI")
        own = {"TERM": "xterm-256color", "INPUTRC": os.devnull, **env}
        settings = {n: v for n, v in cli_env(fake).items() if n not in unset} | own
        self.process = subprocess.Popen(
            [sys.executable, "-c", AT_TERMINAL, *argv],
            stdin=tty,
            stdout=subprocess.PIPE if piped else tty,
            stderr=tty,
            env=settings,
            start_new_session=True,
        )
        os.close(tty)

    def read(self, timeout_s: float) -> bool:
        """Takes what has come; False when nothing did, or nothing will."""
        if not select.select([self.master], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self.master, 65_536)
        except OSError:  # the other side is closed
            return False
        self.shown += data.decode("utf-8", "replace")
        return bool(data)

    def expect(self, text: str, timeout_s: float = 10.0) -> str:
        """Waits until it shows the text, behind what was expected before; what led to it."""
        end = time.monotonic() + timeout_s
        while (at := self.shown.find(text, self.read_to)) < 0:
            left = end - time.monotonic()
            if left <= 0 or not (self.read(left) or self.process.poll() is None):
                raise AssertionError(f"no {text!r} in {self.shown[self.read_to :]!r}")
        before, self.read_to = self.shown[self.read_to : at], at + len(text)
        return before

    def send(self, text: str) -> None:
        """Types."""
        os.write(self.master, text.encode())

    def say(self, text: str) -> None:
        """Types a line at the prompt."""
        self.expect("> ")
        self.send(text + "\r")
        self.expect("\n")

    def end(self, timeout_s: float = 20.0) -> int:
        """Waits for its end; the exit code. Everything that it showed is in `shown` then."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self.process.poll() is None:
            self.read(0.05)
        code = self.process.wait(0.1)
        while self.read(0.05):
            pass
        if self.process.stdout:
            self.piped_out = self.process.stdout.read()
        return code

    def close(self) -> None:
        """Ends it for good."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        os.close(self.master)


@contextmanager
def at_terminal(fake: FakePuter, *argv: str, **options: Any) -> Iterator[Terminal]:
    """A command at a terminal, until the end of the block."""
    terminal = Terminal(fake, *argv, **options)
    try:
        yield terminal
    finally:
        terminal.close()


@pytest.fixture
def desk(fake: FakePuter, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePuter:
    """The fake server, with alice signed in, a home and a working folder of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "TERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    sign_in(fake, home, "alice")
    return fake


def web(fake: FakePuter, path: str, reply: Raw) -> str:
    """An address of the fake server that answers with this."""
    fake.routes["GET", path] = lambda handler: handler.send(reply)
    return fake.url + path


class TestAsk:
    """`ask` with attachments, conversations, and at a terminal."""

    def test_attachments_by_what_they_hold(self, desk):
        Path("notes.txt").write_text("remember\n", "utf-8")
        Path("image.dat").write_bytes(PNG)
        Path("report.bin").write_bytes(SMALL_PDF)
        page = web(desk, "/page.html?x=1".partition("?")[0], Raw(b"<p>hello</p>"))
        picture = web(desk, "/picture", Raw(PNG, content_type="image/png"))
        options = [f"-a{name}" for name in ("notes.txt", "image.dat", "report.bin")]
        options += ["-a", page + "?x=1", "--attach", picture, "-a", "-"]
        done = run_cli(desk, "ask", "-m", lab("text"), *options, "Sum up", stdin="piped")
        assert (done.returncode, done.stdout, done.stderr) == (0, SENTENCE + "\n", "")
        text, *parts = sent(desk)[0]["content"]
        assert text["text"] == (
            "Sum up\n\nnotes.txt:\n```\nremember\n```\n\n"
            "page.html:\n```\n<p>hello</p>\n```\n\nstandard input:\n```\npiped\n```"
        )
        assert [part["type"] for part in parts] == ["image_url", "file", "image_url"]
        assert parts[0] == parts[2]
        done = run_cli(desk, "ask", "-m", lab("vision"), "-a", "-", stdin=PNG)
        assert done.stdout == 'parts: ["image_url"]\n'
        assert all(
            "Authorization" not in one.headers
            for one in desk.requests
            if one.path in ("/page.html", "/picture")
        )

    @pytest.mark.parametrize(
        ("source", "words"),
        [
            ("nowhere.txt", "nowhere.txt"),
            (".", "cannot be read"),
            ("http://127.0.0.1:9/x", "127.0.0.1:9"),
            ("MISSING", "404"),
            ("empty.pdf", "empty.pdf"),
        ],
    )
    def test_an_attachment_that_cannot_be_had(self, desk, source, words):
        source = desk.url + "/missing" if source == "MISSING" else source
        Path("empty.pdf").touch()
        done = run_cli(desk, "ask", "-a", source, "hi", PUTER_MAX_RETRIES="0")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1 and words in done.stderr
        assert not chats(desk)

    def test_continue(self, desk, home):
        first = ["-m", lab("echo"), "-s", "Be brief", "one"]
        assert run_cli(desk, "ask", *first).returncode == 0
        kept = home / "conversation.json"
        assert os.name == "nt" or stat.S_IMODE(kept.stat().st_mode) == 0o600
        assert run_cli(desk, "ask", "-c", "two").stdout == "two\n"  # the same model
        assert run_cli(desk, "ask", "--continue", "--json", "three").returncode == 0
        told = [m["content"] for m in sent(desk)]
        assert told == ["Be brief", "one", "one", "two", "two", "three"]
        # A failure is not saved.
        assert run_cli(desk, "ask", "-c", "-m", lab("closed"), "four").returncode == 1
        run_cli(desk, "ask", "-c", "-m", lab("echo"), "five")
        assert [m["content"] for m in sent(desk)] == [*told, "three", "five"]
        assert run_cli(desk, "ask", "-n", "-m", lab("echo"), "four").returncode == 0
        assert [m["content"] for m in sent(desk)] == ["four"]
        assert run_cli(desk, "ask", "-c", "-n", "x").returncode == 2

    def test_of_two_at_once_both_stay(self, desk, home):
        run_cli(desk, "ask", "-m", lab("echo"), "one")
        with at_terminal(desk, "chat", "-c") as terminal:
            terminal.expect("> ")
            assert run_cli(desk, "ask", "-c", "two").returncode == 0
            terminal.send("three\r")
            terminal.expect("saved meanwhile")
            terminal.say("four")
            terminal.expect("> ")
            terminal.send("\x04")
            assert terminal.end() == 0
        asked = [
            [m["content"] for m in json.loads(path.read_text("utf-8"))["messages"]][::2]
            for path in sorted(home.glob("conversation*.json"))
        ]
        assert asked == [["one", "three", "four"], ["one", "two"]]

    def test_continue_without_any(self, desk, home):
        done = run_cli(desk, "ask", "-c", "-m", lab("echo"), "one")
        assert (done.returncode, done.stdout) == (0, "one\n")
        (home / "conversation.json").write_text("[nothing", "utf-8")
        done = run_cli(desk, "ask", "-c", "two")
        assert done.returncode == 1 and "conversation.json" in done.stderr
        assert done.stderr.count("\n") == 1

    @pytest.mark.parametrize("how", [[], ["--no-stream"], ["--json"]])
    def test_usage(self, desk, how):
        done = run_cli(desk, "ask", "-m", lab("text"), "--usage", *how, "hi")
        assert done.stderr == "tokens: 11 in, 22 out; cost $0.000055\n"
        if how == ["--json"]:
            assert json.loads(done.stdout)["cost_usd"] == pytest.approx(0.000055)
        done = run_cli(desk, "ask", "-m", lab("nousage"), "--no-stream", "--usage", "hi")
        assert "not reported" in done.stderr

    @needs_pty
    @pytest.mark.parametrize("columns", [80, 40])
    @pytest.mark.parametrize("how", [[], ["--no-stream"]])
    def test_the_spinner(self, desk, columns, how):
        desk.script[lab("text")] = late(0.4, Turn("done"))
        argv = ("ask", "-m", lab("text"), *how, "hi")
        with at_terminal(desk, *argv, columns=columns) as terminal:
            assert terminal.end() == 0
        before, _, after = terminal.shown.partition("done")
        assert " 0 s" in before and "\x1b[2m" in before
        assert before.endswith("\r\x1b[K") and plain(after) == "\n"
        frames = plain(before).split("\r")
        assert len(frames) > 2 and all(len(one) < columns for one in frames)

    @needs_pty
    def test_stdout_in_a_pipe_stays_clean(self, desk):
        desk.script[lab("text")] = late(0.3, Turn("done", reasoning=("so",)))
        argv = ("ask", "-m", lab("text"), "hi")
        with at_terminal(desk, *argv, piped=True) as terminal:
            assert terminal.end() == 0
        assert terminal.piped_out == b"done\n"
        assert "\x1b[2mso\x1b[0m" in terminal.shown and " 0 s" in terminal.shown

    def test_no_spinner_in_a_pipe(self, desk):
        desk.script[lab("text")] = late(0.3, Turn("done"))
        done = run_cli(desk, "ask", "-m", lab("text"), "hi", apart=True)
        assert (done.stdout, done.stderr) == ("done\n", "")

    @needs_pty
    @pytest.mark.parametrize(
        ("env", "colour", "spinner"),
        [
            ({"NO_COLOR": "1"}, False, True),
            ({"TERM": "dumb"}, False, False),
            ({"PUTER_QUIET_MODE": "1"}, True, False),
            ({"NO_COLOR": ""}, True, True),
        ],
    )
    def test_plain_terminals(self, desk, env, colour, spinner):
        desk.script[lab("text")] = late(0.3, Turn("done", reasoning=("so",)))
        with at_terminal(desk, "ask", "-m", lab("text"), "hi", **env) as terminal:
            assert terminal.end() == 0
        assert ("\x1b[2m" in terminal.shown) is colour
        assert (" 0 s" in terminal.shown) is spinner
        if not spinner and not colour:
            assert terminal.shown == "so\r\ndone\r\n"

    @needs_pty
    @pytest.mark.parametrize("scenario", ["midfail", "closed"])
    def test_a_failure_half_way(self, desk, scenario):
        with at_terminal(desk, "ask", "-m", lab(scenario), "hi") as terminal:
            assert terminal.end() == 1
        first, *rest = plain(terminal.shown.rpartition("\r\x1b[K")[2]).splitlines()
        assert first and SENTENCE.startswith(first)
        assert any(one.startswith("error: ") for one in rest)
        assert "Traceback" not in terminal.shown

    @needs_pty
    def test_ctrl_c(self, desk):
        with at_terminal(desk, "ask", "-m", lab("slow"), "hi") as terminal:
            terminal.expect("The ")
            terminal.send("\x03")
            assert terminal.end() == 130
        assert "Traceback" not in terminal.shown
        assert eventually(lambda: desk.open_streams == 0)

    @pytest.mark.parametrize(
        ("text", "want"),
        [
            ("a\nb\tc é🦊", "a\nb\tc é🦊"),
            ("\x1b]52;c;eA==\x07", "␛]52;c;eA==␇"),
            ("\x00\x08\r\x7f\x80\x9b", "␀␈␍␡\\x80\\x9b"),
        ],
    )
    def test_visible(self, text, want):
        assert puter.visible(text) == want

    @needs_pty
    def test_no_answer_drives_the_terminal(self, desk):
        pieces = ["\x1b", "]0;title\x07", "\x9b", "2Jred", "\x1b[8mhidden"]
        desk.script[lab("text")] = streams(
            line("reasoning", reasoning="\x1b[2Jso"),
            *(line("text", text=t) for t in pieces),
            line("usage", usage=dict(USAGE)),
        )
        argv = ("ask", "-m", lab("text"), "hi")
        with at_terminal(desk, *argv) as terminal:
            assert terminal.end() == 0
        assert "␛]0;title␇\\x9b2Jred␛[8mhidden\r\n" in terminal.shown
        assert "\x1b[2m␛[2Jso\x1b[0m" in terminal.shown
        assert run_cli(desk, *argv).stdout == "".join(pieces) + "\n"
        desk.script[lab("text")] = refuses(400, "bad_request", "\x1b]0;x")
        with at_terminal(desk, *argv, "--no-fallback") as terminal:
            assert terminal.end() == 1
        assert "\x1b]" not in terminal.shown and "␛]0;x" in terminal.shown

    def test_no_log_line_drives_the_terminal(self, desk):
        desk.script[lab("text")] = refuses(429, "upstream_rate_limited", "\x1b]0;x")
        done = run_cli(desk, "ask", "-m", "x\x1b[2Jy", "hi", apart=True, PUTER_DEBUG="1")
        log = [one for one in done.stderr.splitlines() if one.startswith("[puter-auth]")]
        assert log and "␛[2J" in "".join(log) and "\x1b" not in "".join(log)

    @needs_pty
    def test_a_prompt_is_read_at_a_terminal(self, desk):
        with at_terminal(desk, "ask", "-m", lab("echo"), "-", piped=True) as terminal:
            terminal.expect("Waiting for the end of standard input")
            terminal.send("one\rtwo\r\x04")
            assert terminal.end() == 0
        assert terminal.piped_out == b"one\ntwo\n"

    @needs_pty
    @pytest.mark.parametrize(
        ("argv", "signed_in", "steps", "code", "out"),
        [
            ("ask hello", False, ["Sign in with the browser now? [Y/n] ", "n\r"], 1, b""),
            (f"chat -m {lab('echo')}", True, ["> ", "one\r\x04", "> "], 0, b"one\n"),
            ("login --with-token", False, ["Token", "\x04", "No token came."], 2, b""),
        ],
    )
    def test_questions_never_go_into_a_file(self, fake, home, argv, signed_in, steps, code, out):
        if signed_in:
            sign_in(fake, home, "alice")
        with at_terminal(fake, *argv.split(), piped=True) as terminal:
            for number, text in enumerate(steps):
                (terminal.send if number % 2 else terminal.expect)(text)
            assert terminal.end() == code
        assert terminal.piped_out == out


class TestChatCommand:
    """`chat`, at a terminal and on a pipe."""

    def talk(self, desk: FakePuter, *lines: str, argv: Sequence[str] = ()) -> Any:
        """Says the lines on a pipe."""
        stdin = "".join(f"{line}\n" for line in lines)
        return run_cli(desk, "chat", "-m", lab("echo"), *argv, stdin=stdin)

    @pytest.mark.parametrize("how", [("chat",), ("ask", "-")])
    def test_options(self, desk, how):
        argv = ["-s", "Be brief", "--max-tokens", "9", "--temperature", "0.5"]
        assert run_cli(desk, *how, *argv, stdin="one\n").returncode == 0
        args = chats(desk)[-1]
        assert (args["max_tokens"], args["temperature"]) == (9, 0.5)
        assert sent(desk)[0] == {"role": "system", "content": "Be brief"}
        assert args["model"] == puter.DEFAULT_MODEL

    @pytest.mark.parametrize(
        ("lines", "want"),
        [
            (["one \\", "two\\", "three"], "one \ntwo\nthree"),
            (['"""', "one", "", "two", '"""'], "one\n\ntwo"),
            (['"""one', 'two"""'], "one\ntwo"),
            (['"""one two"""'], "one two"),
            (['"""', "/etc/hosts is what?", '"""'], "/etc/hosts is what?"),
            (['"""', "one"], "one"),
            (["one\\"], "one"),
        ],
    )
    def test_longer_texts(self, desk, lines, want):
        self.talk(desk, *lines)
        assert [sent(desk)[0]["content"]] == [want] and len(chats(desk)) == 1

    @pytest.mark.parametrize(
        ("text", "is_said"),
        [
            ("/etc/hosts is what?", True),
            ("/tmp is full", True),
            (" /model of a car", True),
            ("/modle x", False),
            ("/nosuch thing", False),
        ],
    )
    @posix_only
    def test_a_path_is_no_command(self, desk, text, is_said):
        done = self.talk(desk, text)
        assert bool(chats(desk)) is is_said
        assert done.stdout == (f"{text}\n" if is_said else "")
        assert ("There is no command" in done.stderr) is not is_said

    def test_stdin_is_utf_8(self, desk):
        env: Any = {"apart": True, "PYTHONIOENCODING": "latin-1", "LC_ALL": "C"}
        argv = ("chat", "-m", lab("echo"))
        assert run_cli(desk, *argv, stdin="é🦊\n", **env).stdout == "é🦊\n"
        done = run_cli(desk, *argv, stdin=b"\xff\n", apart=True)
        assert (done.returncode, done.stdout) == (0, "\ufffd\n")

    def test_commands(self, desk):
        Path("notes.txt").write_text("remember", "utf-8")
        done = self.talk(
            desk,
            "/help",
            "/model",
            "/model LAB/TEXT",
            "/model claude-opus-4",
            "/system",
            "/system Be brief",
            "/attach notes.txt",
            "/attach nowhere.txt",
            "/attach",
            "/usage",
            "one",
            "two",
            "/usage",
            "/hepl",
        )
        told = done.stderr
        for words in (
            "/attach FILE",
            f"model: {lab('echo')}",
            f"model: {lab('text')}",
            f"Did you mean {OPUS}",
            "system: none",
            "system: Be brief",
            "nowhere.txt",
            "0 answers; tokens: not reported",
            "2 answers; tokens: 22 in, 44 out; cost $0.000110",
            "no command /hepl",
        ):
            assert words in told, words
        assert done.returncode == 0 and done.stdout == f"{SENTENCE}\n" * 2
        first = chats(desk)[0]
        assert first["model"] == lab("text")
        assert [m["content"] for m in first["messages"]] == [
            "Be brief",
            "one\n\nnotes.txt:\n```\nremember\n```",
        ]
        assert sent(desk)[-1]["content"] == "two"  # it went with one message

    def test_retry_and_undo(self, desk, home):
        desk.script[lab("echo")] = [says(text) for text in "abcdef"]
        lines = ["/retry", "/undo", "one", "/retry", "two", "/undo", "three"]
        done = self.talk(desk, *lines)
        assert done.stdout == "a\nb\nc\nd\n"
        for words in ("Nothing was asked", "nothing to undo", "were removed"):
            assert words in done.stderr
        assert [m["content"] for m in chats(desk)[1]["messages"]] == ["one"]
        assert [m["content"] for m in sent(desk)] == ["one", "b", "three"]
        kept = json.loads((home / "conversation.json").read_text("utf-8"))
        assert [m["content"] for m in kept["messages"]] == ["one", "b", "three", "d"]
        done = self.talk(desk, "one", "", "  ", "two")  # the scripted answers that are left
        assert (done.returncode, done.stdout, done.stderr) == (0, "e\nf\n", "")

    def test_retry_keeps_the_answer_when_it_fails(self, desk):
        desk.script[lab("echo")] = [says("a"), "closed", says("c")]
        done = self.talk(desk, "one", "/retry", "two")
        assert "error: " in done.stderr and done.returncode == 1
        assert [m["content"] for m in sent(desk)] == ["one", "a", "two"]

    @pytest.mark.parametrize("before", [[], ["zero"]])
    def test_retry_after_a_failure(self, desk, before):
        answers: list[Any] = [says("0")] * len(before)
        desk.script[lab("echo")] = [*answers, "closed", says("better")]
        done = self.talk(desk, *before, "one", "/retry")
        assert sent(desk)[-1]["content"] == "one" and "better" in done.stdout

    def test_an_attachment_waits_for_an_answer(self, desk):
        Path("a.png").write_bytes(PNG)
        desk.script[lab("echo")] = ["closed", "vision"]
        done = self.talk(desk, "/attach a.png", "one", "two", "three")
        assert 'parts: ["text", "image_url"]' in done.stdout
        assert sent(desk)[-1]["content"] == "three"

    def test_save(self, desk, home):
        lines = ["one", "/save", "/save a.md", "/save a.json", "/save a.md"]
        done = self.talk(desk, *lines, "/save no/where.md")
        assert Path("a.md").read_text("utf-8") == "## user\n\none\n\n## assistant\n\none\n"
        told = json.loads(Path("a.json").read_text("utf-8"))
        assert puter.Conversation.from_json(told).messages[1]["content"] == "one"
        assert "Say where" in done.stderr
        assert "a.md cannot be written (File exists)" in done.stderr
        assert "where.md cannot be written" in done.stderr

    def test_continue(self, desk, home):
        run_cli(desk, "ask", "-m", lab("echo"), "one")
        done = run_cli(desk, "chat", "-c", stdin="two\n")
        assert done.stdout == "two\n"
        run_cli(desk, "ask", "--continue", "three")
        assert [m["content"] for m in sent(desk)] == ["one", "one", "two", "two", "three"]
        mode = stat.S_IMODE((home / "conversation.json").stat().st_mode)
        assert os.name == "nt" or mode == 0o600
        run_cli(desk, "chat", stdin="/help\n")  # without a word nothing is kept
        assert run_cli(desk, "ask", "-c", "four").returncode == 0
        assert len(sent(desk)) == 7

    @needs_pty
    @pytest.mark.parametrize("columns", [80, 40])
    def test_at_a_terminal(self, desk, home, columns):
        argv = ("chat", "-m", lab("echo"))
        with at_terminal(desk, *argv, columns=columns) as terminal:
            terminal.expect("Talking with")
            terminal.say("one")
            terminal.expect("one\r\n")
            terminal.expect("> ")
            terminal.send("two\\\r")
            terminal.expect(". ")
            terminal.send("lines\r")
            terminal.expect("two\r\nlines\r\n")
            terminal.expect("> ")
            terminal.send("\x1b[A\r")  # the line before
            terminal.expect("> ")
            terminal.send("\x04")
            assert terminal.end() == 0
        assert sent(desk)[-1]["content"] == "lines"
        history = home / "chat-history"
        assert stat.S_IMODE(history.stat().st_mode) == 0o600
        assert "one" in history.read_text("utf-8").splitlines()
        with at_terminal(desk, *argv, columns=columns) as terminal:
            terminal.expect("> ")
            terminal.send("\x1b[A\x1b[A\x1b[A\x1b[A\r")  # kept from the last time
            terminal.expect("> ")
            terminal.send("\x04")
            assert terminal.end() == 0
        assert [m["content"] for m in sent(desk)] == ["one"]

    @needs_pty
    def test_ctrl_c_stops_the_answer_only(self, desk):
        desk.script[lab("text")] = [says("a"), "slow", says("b")]
        with at_terminal(desk, "chat", "-m", lab("text")) as terminal:
            terminal.say("one")
            terminal.expect("a\r\n")
            terminal.say("two")
            terminal.expect("The quick")
            terminal.send("\x03")
            terminal.expect("stopped")
            assert eventually(lambda: desk.open_streams == 0)
            terminal.expect("> ")
            terminal.send("half a line")
            terminal.expect("half a line")  # a Ctrl-C takes back what is not read yet
            for _ in range(3):  # readline sees no signal that comes just as it begins to wait
                terminal.send("\x03")
                with suppress(AssertionError):
                    terminal.expect("Ctrl-D leaves", 3)
                    break
            terminal.say("three")
            terminal.expect("b\r\n")
            terminal.expect("> ")
            terminal.send("\x04")
            assert terminal.end() == 0
        assert [m["content"] for m in sent(desk)] == ["one", "a", "three"]
        assert "Traceback" not in terminal.shown

    @needs_pty
    def test_tab_completes(self, desk):
        pytest.importorskip("readline")
        Path("remember-this.txt").write_text("x", "utf-8")
        with at_terminal(desk, "chat", "-m", lab("text")) as terminal:
            terminal.expect("> ")
            terminal.send("/mod\t")
            terminal.expect("/model")
            terminal.send("\x15/model openrouter:lab/ech\t")
            terminal.expect("openrouter:lab/echo")
            terminal.send("\x15/attach rememb\t")
            terminal.expect("remember-this.txt")
            terminal.send("\r")
            terminal.expect("> ")
            terminal.send("\x04")
            assert terminal.end() == 0


# =============================================================================
# Commands: what was used, what is there, and whether it works
# =============================================================================
class TestReports:
    """`models`, `usage`, `stats`, `cache` and `status --check`."""

    def test_sorted_by_price(self, desk):
        told = json.loads(run_cli(desk, "models", "--json", "--sort", "price").stdout)
        prices = [m["input_usd_per_million"] for m in told]
        assert prices[:5] == [0.0] * 5 and told[-1]["id"] == OPUS
        assert run_cli(desk, "models", "--sort", "size").returncode == 2

    @needs_pty
    @pytest.mark.parametrize("columns", [80, 40])
    def test_a_row_of_models_stays_a_line(self, desk, columns):
        with at_terminal(desk, "models", "--vision", columns=columns) as terminal:
            assert terminal.end() == 0
        assert max(map(len, plain(terminal.shown).splitlines())) <= columns
        assert OPUS in terminal.shown

    def metering(self, desk: FakePuter) -> None:
        """Lets alice have used something, and bob have credits."""

        def answer(handler: FakeHandler) -> None:
            account = handler.signed_in()
            info: dict[str, Any] = {"remaining": 10_000_000, "monthUsageAllowance": 25_000_000}
            usage: dict[str, Any] = {
                "total": 15_000_000,
                "openai:gpt:input": {"cost": 3_000_000, "units": 1234, "count": 7},
                "openai:gpt:output": {"cost": 4_000_000, "units": 9, "count": 7},
                "lab:nothing:output": {"cost": 0, "units": 9, "count": 1},
            }
            for number in range(1, 13):
                usage[f"lab:m{number}:output"] = {"cost": number * 100_000, "units": 1, "count": 1}
            if account.username == "bob":
                info = {"unit": "credits", "remaining": 40, "monthUsageAllowance": 50}
                usage = {"total": 10}
            handler.send(Raw({"usage": usage, "allowanceInfo": info}))

        desk.routes["GET", "/metering/usage"] = answer

    def test_usage(self, desk, home):
        self.metering(desk)
        sign_in(desk, home, "bob")
        done = run_cli(desk, "usage")
        assert done.returncode == 0 and "bob" not in done.stdout
        first, bar, head, *rows = done.stdout.splitlines()
        assert first.startswith("alice: ") and "$0.1000 of $0.2500 left" in first
        assert bar.strip() == "[########............] 40% (fair)"
        assert head.split() == ["USED", "FOR", "COST", "CALLS"]
        # the kinds of tokens of a model are one row, the dearest first, ten at most
        shown = [
            ["gpt", "$0.0700", "7"],
            *([f"m{n}", f"${n / 1000:.4f}", "1"] for n in range(12, 3, -1)),
        ]
        assert [row.split() for row in rows] == [*shown, ["and", "4", "more"]]
        done = run_cli(desk, "usage", "--all")
        assert done.returncode == 0 and "alice: " in done.stdout
        (line,) = [one for one in done.stdout.splitlines() if one.startswith("bob")]
        assert "40" in line and "credits" in line and "$" not in line

    def test_usage_json(self, desk, home):
        self.metering(desk)
        sign_in(desk, home, "bob")
        alice, bob = json.loads(run_cli(desk, "usage", "--all", "--json").stdout)
        assert (alice["username"], alice["unit"], alice["error"]) == ("alice", "usd", None)
        assert (alice["remaining"], alice["allowance"], alice["used"]) == (0.1, 0.25, 0.15)
        assert alice["by_api"]["openai:gpt:input"] == {"cost": 0.03, "units": 1234, "count": 7}
        assert (bob["unit"], bob["remaining"], bob["used"]) == ("credits", 40, 10)

    @pytest.mark.parametrize("how", [[], ["--json"]])
    def test_one_failing_account_does_not_hide_others(self, desk, home, how):
        sign_in(desk, home, "bob")
        desk.accounts["token-alice"].dead = True
        done = run_cli(desk, "usage", "--all", *how)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        if how:
            alice, bob = json.loads(done.stdout)
            assert alice["username"] == "alice" and alice["error"]
            assert bob["error"] is None and bob["remaining"] == 0.25
        else:
            assert "python -m puter login" in done.stdout + done.stderr
            assert "bob: $0.2500 of $0.2500 left" in done.stdout

    @pytest.mark.parametrize(
        ("left", "words"),
        [
            (25_000_000, "100% (plenty)"),
            (5_000_000, "20% (low)"),
            (0, "0% (used up)"),
            (-5, "0% (used up)"),
            (90_000_000, "100% (plenty)"),
        ],
    )
    def test_the_bar(self, desk, left, words):
        desk.accounts["token-alice"].credit_microcents = left
        line = run_cli(desk, "usage").stdout.splitlines()[1]
        assert words in line and len(re.sub(r"[^#.]", "", line)) == 20

    def test_stats(self, desk):
        assert run_cli(desk, "stats").stdout == "There are no statistics yet.\n"
        assert run_cli(desk, "stats", "--json").stdout == "[]\n"
        for scenario in ("text", "text", "err400"):
            run_cli(desk, "ask", "--no-fallback", "-m", lab(scenario), "hi")
        done = run_cli(desk, "stats")
        head, text, failed, why = done.stdout.splitlines()
        assert head.split() == ["MODEL", "ASKED", "OK", "P50", "P95", "FIRST", "TOK/S", "COST"]
        assert text.split()[:3] == [lab("text"), "2", "2"]
        assert text.split()[-1] == "$0.0001"
        assert failed.split() == [lab("err400"), "1", "0", *"----", "$0.0000"]
        assert why == f"failures of {lab('err400')}: upstream_bad_request 1"
        rows = run_cli(desk, "stats", lab("text")).stdout.splitlines()
        assert [row.split() for row in rows] == [head.split(), text.split()]
        (told,) = json.loads(run_cli(desk, "stats", "--json", lab("text")).stdout)
        assert (told["model"], told["requests"]) == (lab("text"), 2)
        run_cli(desk, "stats", lab("err400"), "--reset")
        (told,) = json.loads(run_cli(desk, "stats", "--json").stdout)
        assert told["model"] == lab("text")
        assert run_cli(desk, "stats", "--reset").stdout == "Statistics were reset.\n"
        assert run_cli(desk, "stats", "--json").stdout == "[]\n"

    def test_stats_by_an_alias(self, desk):
        run_cli(desk, "models", apart=True)  # now the aliases are known
        run_cli(desk, "ask", "-m", "claude-opus-4.5", "hi", apart=True)
        run_cli(desk, "ask", "-m", OPUS, "hi", apart=True)
        (told,) = json.loads(run_cli(desk, "stats", "--json", "claude-opus-4-5", apart=True).stdout)
        assert told["requests"] == 2

    def test_cache(self, desk):
        assert "off (set cache_enabled to true)" in run_cli(desk, "cache").stdout
        on = {"PUTER_CACHE_ENABLED": "1"}
        for _ in range(2):
            done = run_cli(desk, "ask", "-m", lab("text"), "hi", **on)
            assert done.stdout == SENTENCE + "\n"
        assert len(chats(desk)) == 1
        told = json.loads(run_cli(desk, "cache", "--json", **on).stdout)
        assert told["enabled"] is True and told["bytes"] > 50
        assert [told[n] for n in ("entries", "fresh", "hits", "misses")] == [1, 1, 1, 1]
        shown = run_cli(desk, "cache", **on).stdout
        assert "1 of 500 entries, 1 fresh" in shown and "2 look-ups, 50% found" in shown
        assert run_cli(desk, "cache", "--clear").stdout == "Cached replies deleted: 1\n"
        told = json.loads(run_cli(desk, "cache", "--json").stdout)
        assert [told[n] for n in ("entries", "hits", "misses")] == [0, 0, 0]

    def test_check(self, desk, home):
        done = run_cli(desk, "status", "--check")
        lines = done.stdout.splitlines()
        assert done.returncode == 0 and all(one.startswith("ok  ") for one in lines)
        wanted = {f"ok    {desk.url} answers", f"ok    {len(desk.catalogue)} models"}
        wanted.add("ok    the token of alice works (alice)")
        assert wanted <= set(lines) and any("clock" in one for one in lines)
        assert not chats(desk)  # it costs nothing

    @pytest.mark.parametrize(
        ("fault", "words"),
        [
            ("dead", "the token of bob"),
            ("mode", "do: chmod 600"),
            ("nobody", "python -m puter login"),
            ("server", "127.0.0.1:9"),
            ("models", "the model list"),
        ],
    )
    def test_check_finds(self, desk, home, fault, words):
        sign_in(desk, home, "bob")
        accounts = puter.AccountStore(home).path
        env = {"PUTER_API_BASE_URL": desk.url, "PUTER_MAX_RETRIES": "0"}
        if fault == "dead":
            desk.accounts["token-bob"].dead = True
        elif fault == "mode":
            if os.name == "nt":
                pytest.skip("modes are of Unix")
            Path(accounts).chmod(0o644)
        elif fault == "nobody":
            Path(accounts).unlink()
        elif fault == "server":
            env["PUTER_API_BASE_URL"] = "http://127.0.0.1:9"
        else:
            desk.routes["GET", "/puterai/chat/models/details"] = lambda handler: handler.send(
                Raw({"code": "internal_error", "message": "no"}, 500)
            )
        done = run_cli(desk, "status", "--check", **env)
        failed = [one for one in done.stdout.splitlines() if one.startswith("FAIL")]
        assert done.returncode == 1 and any(words in one for one in failed)
        if fault == "dead":
            assert "ok    the token of alice works" in done.stdout
            assert len(failed) == 1
        assert "Traceback" not in done.stderr


# =============================================================================
# The client under attack
# =============================================================================
FAILED_WORDS = ("error", "ERROR", "network_error", "malformed_function_call", "abort", "incomplete")
DOUBTFUL = table(
    ["a firewall's page", 403, b"<h1>Blocked by the firewall</h1>"],
    ["a proxy's limit", 429, b"Slow down"],
    ["a limit without a code", 429, {"message": "too many"}],
    ["a misread 402", 402, {"message": "pay"}],
    ["another's code", 403, {"code": "nope", "message": "no"}],
)


def open_files() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


class TestClientUnderAttack:
    """Failures that look like success, bills that come twice, and what grows for ever."""

    @pytest.mark.parametrize("word", FAILED_WORDS)
    def test_what_its_provider_gave_up_is_no_answer(self, make, fake, word):
        fake.script[lab("text")] = lambda *_: Turn("half of", finish=word)
        with pytest.raises(puter.ReplyError, match="failed while it wrote") as caught:
            make(fallback_enabled=False).chat("hi", model=lab("text"))
        assert caught.value.reply.text == "half of" and len(chats(fake)) == 1
        ended = json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": word}]})
        _, error, reply = heard(delta(content="half of"), ended, "[DONE]")
        assert isinstance(error, puter.StreamError) and reply.text == "half of"

    def test_an_end_alone_is_no_answer(self):
        _, error, _ = heard("[DONE]")
        assert isinstance(error, puter.StreamError) and "no answer" in error.message

    @pytest.mark.parametrize(
        ("finish", "words"), [("length", "cut at its longest"), ("content_filter", "filter ended")]
    )
    def test_a_cut_is_said(self, signed_in, finish, words):
        signed_in.script[lab("text")] = lambda *_: Turn("half", finish=finish)
        done = run_cli(signed_in, "ask", "-m", lab("text"), "--no-stream", "hi")
        assert (done.returncode, done.stdout) == (0, "half\n") and words in done.stderr

    def test_what_comes_behind_the_end_is_nothing(self):
        decoder = puter.LineDecoder("m")
        decoder.feed(
            line("text", text="all") + line("usage", usage=USAGE) + line("text", text="no")
        )
        decoder.finish()
        assert decoder.error is None and decoder.reply().text == "all"

    def test_a_task_that_closes_is_seen_by_the_task_that_reads(self, make):
        async def both(stream: puter.Stream) -> None:
            loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor(1)

            async def read() -> None:
                while await loop.run_in_executor(pool, next, stream, None):
                    pass

            reading = asyncio.ensure_future(read())
            await asyncio.sleep(0.1)
            await loop.run_in_executor(pool, stream.close)
            with pytest.raises(puter.StreamError, match="closed"):
                await reading
            pool.shutdown()

        asyncio.run(both(make().stream("hi", model=lab("slow"))))

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("way", ["leave", "close", "drop", "client"])
    def test_a_forked_child_ends_only_its_own(self, make, way):
        client = make()
        with client.stream("hi", model=lab("slow")) as stream:
            said = str(next(stream))
            child = os.fork()
            if child == 0:
                with suppress(BaseException):
                    {
                        "leave": lambda: stream.__exit__(None, None, None),
                        "close": stream.close,
                        "drop": stream.__del__,
                        "client": client.close,
                    }[way]()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert said + text_of_chunks(list(stream)) == SENTENCE

    @pytest.mark.parametrize(("how", "asked"), [("chat", 1), ("stream", 2)])
    def test_a_kept_connection_that_breaks_at_work_is_not_stale(self, how, asked):
        seen: list[bytes] = []
        answer = driver_reply(Turn(WIRE_TEXT), openrouter_model("m"))
        body = compact(answer).encode()
        head = (
            f"HTTP/1.1 200 OK\r\nContent-Type: {JSON_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
        )

        def serve(connection: socket.socket) -> None:
            with suppress(ConnectionAbortedError):
                while request := read_request(connection):
                    seen.append(request)
                    if len(seen) > 1:
                        time.sleep(0.1)  # at work, and then it fails
                        hang_up(connection, "closed")
                    connection.sendall(head.encode() + body)

        with (
            raw_server(serve) as url,
            puter.Puter("t", api_base_url=url, retry_delay_ms=1, fallback_enabled=False) as client,
        ):
            client.chat("hi", model="m")
            with pytest.raises(puter.NetworkError) as caught:
                ask(client, how, "m")
        assert caught.value.may_be_billed and len(seen) == 1 + asked

    def test_a_connection_that_was_closed_while_idle_is_seen_before(self, make, fake):
        client = make(max_retries=0)
        client.chat("hi", model=lab("text"))
        fake.stop()
        fake.start()
        assert client.chat("hi", model=lab("text")).text == SENTENCE

    @pytest.mark.parametrize(
        ("name", "ttl_ms", "is_down", "is_asked"),
        [
            ("gift", 20, True, False),
            ("gift:free", 20, True, True),
            ("gift", 20, False, True),
            ("gift", 0, False, True),
            ("gift", 60_000, True, True),
        ],
    )
    def test_what_an_old_list_calls_free(self, make, fake, name, ttl_ms, is_down, is_asked):
        fake.catalogue = [openrouter_model("lab/text"), openrouter_model(f"lab/{name}", (0, 0))]
        fake.script |= {lab("text"): "err429", lab(name): "echo"}
        client = make(cache_ttl_ms=ttl_ms)
        client.models()
        if is_down:
            fake.routes["GET", DETAILS] = lambda handler: handler.send(Raw(b"", 500))
        time.sleep(0.03)
        with suppress(puter.ModelRateLimitError):
            client.chat("hi", model=lab("text"))
        assert told(fake) == ["alice text", *([f"alice {name}"] if is_asked else [])]

    def test_usage_is_the_sum(self, make, fake):
        one = {"usage": None}
        fake.script[lab("text")] = [calling(("get_weather", {"city": "Rome"})), says("done")]
        client = make()
        one = client.chat("hi", model=lab("text"), tools=[get_weather]).usage
        fake.script[lab("text")] = [calling(("get_weather", {"city": "Rome"})), says("done")]
        talk = client.conversation(model=lab("text"))
        for reply in (talk.say("hi", tools=[get_weather]), talk.reply):
            assert reply.usage == one + one and reply.usage.cost_usd == 2 * one.cost_usd
        fake.script[lab("text")] = calling(("get_weather", {"city": "Rome"}))
        with pytest.raises(puter.ReplyError) as caught:
            client.run("hi", [get_weather], model=lab("text"), max_rounds=2)
        assert caught.value.reply.usage == one + one + one

    @pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
    def test_one_default_client_at_a_time(self, fake, home, monkeypatch):
        monkeypatch.setattr(puter, "_default", None)
        monkeypatch.setenv("PUTER_API_BASE_URL", fake.url)
        counts, clients = [], []
        for number in range(30):
            fake.add_account(f"user{number}", f"key-{number}")
            monkeypatch.setenv("PUTER_AUTH_TOKEN", f"key-{number}")
            assert puter.chat("hi", model=lab("echo")).text == "hi"
            clients.append(puter._default_client())  # whoever still holds it
            counts.append(open_files())
        puter._default_client().close()
        assert max(counts[2:]) <= counts[1] + 2

    def test_a_remembered_failure_does_not_grow(self, make, fake):
        fake.routes["GET", DETAILS] = lambda handler: handler.send(Raw(b"", 500))
        client, depths = make(max_retries=0), set()
        for _ in range(4):
            with pytest.raises(puter.ServerError) as caught:
                client.models()
            depths.add(len(list(traceback.walk_tb(caught.value.__traceback__))))
        assert client._catalogue._failure[0].__traceback__ is None
        assert len(depths) <= 2 and len(fake.requests) == 1

    def test_a_clock_that_is_set_back(self, make, fake, move_clock, monkeypatch):
        monkeypatch.setattr(puter, "MODELS_RETRY_S", 0.05)
        route = fake.routes["GET", DETAILS]
        fake.routes["GET", DETAILS] = lambda handler: handler.send(Raw(b"", 500))
        client = make(max_retries=0)
        with pytest.raises(puter.ServerError):
            client.models()
        move_clock(-7_200.0)
        fake.routes["GET", DETAILS] = route
        time.sleep(0.06)
        assert client.models()

    @pytest.mark.parametrize(("status", "body"), DOUBTFUL)
    def test_only_puters_own_codes_lock_an_account(self, make, fake, short_window, status, body):
        fake.script[lab("text")] = lambda *_: Raw(body, status, JSON_TYPE)
        client = make("alice", "bob")
        for _ in range(2):
            with pytest.raises(puter.PuterError) as caught:
                client.chat("hi", model=lab("text"), fallback=False)
            assert not isinstance(caught.value, puter.AllAccountsOnCooldownError)
        assert client.cooldowns() == []
        fake.script[lab("text")] = "text"
        assert client.chat("hi", model=lab("text")).text == SENTENCE

    def test_a_call_ends_though_the_others_are_locked(self, make, fake, short_window):
        fake.add_account("alice", error=(429, {"code": "too_many_requests", "message": "Slow"}))
        client = make("alice", "bob", max_retries=1)
        client.state.add_cooldown("bob", "", 300.0, "forbidden", time.time())
        thread, outcome = in_background(lambda: client.chat("hi", model=lab("text")))
        thread.join(2)
        is_over = not thread.is_alive()
        fake.accounts["token-alice"].error = None  # else it would go on
        thread.join(5)
        assert is_over and isinstance(outcome[0], puter.RateLimitError)

    @pytest.mark.parametrize(
        ("error", "retries", "waited_s", "waiting", "again"),
        [
            (puter.RateLimitError(""), 25, 29.9, 0, True),
            (puter.RateLimitError(""), 25, 30.0, 0, False),
            (puter.RateLimitError(""), 25, 39.9, 1, True),
            (puter.RateLimitError(""), 25, 40.0, 1, False),
            (puter.RateLimitError(""), 25, 100.0, 8, True),
            (puter.ServerError(""), 3, 0.0, 8, False),
        ],
    )
    def test_patience_grows_with_who_waits(self, error, retries, waited_s, waiting, again):
        assert puter.may_retry(error, retries, 3, True, waited_s, waiting=waiting) is again

    @pytest.mark.parametrize(
        ("retry", "rand", "delay_s"), [(1, 0.0, 1.0), (2, 0.0, 1.5), (9, 0.0, 1.5), (9, 1.0, 1.125)]
    )
    def test_the_wait_for_a_limit_is_short(self, retry, rand, delay_s):
        error = puter.RateLimitError("")
        assert puter.retry_delay_s(error, retry, 1.0, rand=lambda: rand) == delay_s

    def test_a_reset_before_anything_was_sent_is_sent_again(self):
        seen: list[int] = []

        def serve(connection: socket.socket) -> None:
            seen.append(1)
            connection.recv(1)  # the greeting of TLS
            hang_up(connection, "reset")

        with (
            raw_server(serve) as url,
            puter.Puter(
                "t", api_base_url=url.replace("http:", "https:"), retry_delay_ms=1
            ) as client,
            pytest.raises(puter.NetworkError) as caught,
        ):
            client.chat("hi", model="m", fallback=False)
        assert not caught.value.may_be_billed and len(seen) == 4

    def test_a_silent_greeting_is_a_failure_to_connect(self, monkeypatch):
        monkeypatch.setattr(puter, "CONNECT_TIMEOUT_S", 0.2)
        seen: list[int] = []

        def serve(connection: socket.socket) -> None:
            seen.append(1)
            connection.recv(99)
            time.sleep(0.5)

        with (
            raw_server(serve) as url,
            puter.Puter(
                "t", api_base_url=url.replace("http:", "https:"), max_retries=1, retry_delay_ms=1
            ) as client,
            pytest.raises((puter.RequestTimeoutError, puter.NetworkError)) as caught,
        ):
            client.chat("hi", model="m", fallback=False)
        assert not caught.value.may_be_billed and len(seen) == 2

    def test_the_servers_own_slip_is_its_fault(self):
        body = {"success": False, "error": "Cannot read properties of undefined"}
        error = puter.error_from(200, body)
        assert isinstance(error, puter.ServerError) and error.retryable

    def test_a_damaged_cached_reply_is_a_miss(self, make, fake):
        client = make(cache_enabled=True)
        for damage in ("{", "[]", '{"text": 5}', '{"tool_calls": [{}], "usage": {}}'):
            client.chat("hi", model=lab("text"))
            with client.state._open() as db:
                db.execute("UPDATE replies SET body=?", (damage,))
        assert client.chat("hi", model=lab("text")).text == SENTENCE and len(chats(fake)) == 5

    def test_a_model_has_one_name(self, make, fake):
        client = make()
        client.models()
        alias, name = "claude-opus-4-5", "claude-opus-4-5-20251101"
        asked = [
            client.chat("hi", model=alias),
            ask(client, "stream", alias),
            client.chat("hi", model=name),
        ]
        assert {reply.model for reply in asked} == {name}
        with pytest.raises(puter.ModelNotFoundError):
            client.chat("hi", model="nobody-knows-it")
        assert [(s.model, s.requests) for s in client.stats()] == [(name, 3)]

    def test_a_token_needs_no_home(self, fake):
        environ = {
            n: v for n, v in os.environ.items() if n not in ("PUTER_CONFIG_DIR", "XDG_CONFIG_HOME")
        }
        environ |= {"HOME": "", "PUTER_AUTH_TOKEN": "token-alice", "PUTER_API_BASE_URL": fake.url}
        code, out, err = run_apart(
            ["ask", "-m", lab("echo"), "hi"],
            {**environ, "PYTHONPATH": str(Path(puter.__file__).parent)},
        )
        assert (code, out) == (0, "hi\n") and "Traceback" not in err


# Calls that fail before anything is sent, and words of their advice.
RAW_FAILURES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a misspelt option": (lambda p: p.conversation(temprature=1, modell="m"), "model"),
    "a client among options": (
        lambda p: puter.Conversation.from_json({"options": {"client": 5}}),
        "client",
    ),
    "bytes in a conversation": (lambda p: p.conversation(extra=b"x").to_json(), "JSON"),
    "no conversation": (lambda p: puter.Conversation.from_json([1]), "to_json"),
    "a misspelt option of a stream": (lambda p: p.conversation().stream("hi", modell="m"), "model"),
    "no prompt": (lambda p: p.chat(), "prompt"),
    "a prompt twice": (lambda p: p.chat("a", prompt="b"), "prompt"),
}


class TestRawFailures:
    """Each a `PuterError` with advice, and told at once."""

    @pytest.mark.parametrize(("work", "words"), RAW_FAILURES.values(), ids=RAW_FAILURES)
    def test_is_ours(self, make, fake, work, words):
        with pytest.raises(puter.PuterError) as caught:
            work(make())
        assert words in str(caught.value) and not chats(fake)

    def test_a_prompt_by_name_and_a_model_as_option(self, make, fake):
        client = make()
        assert client.chat(prompt="hi", model=lab("echo")).text == "hi"
        talk = client.conversation(model=client.model(lab("echo")))
        assert talk.to_json()["model"] == lab("echo")

    def test_infinity(self):
        def far(distance: float = math.inf) -> str:
            """How far."""
            return "far"

        assert "default" not in json.dumps(puter.function_schema(far))
        call = puter.tool_call_from({"id": "1", "name": "far", "input": '{"distance": 1e400}'})
        assert call.invalid == '{"distance": 1e400}'

    @pytest.mark.parametrize(
        ("variable", "meant"),
        [
            ("PUTER_FALLBACK", "PUTER_FALLBACK_ENABLED"),
            ("PUTER_NO_FALLBACK", "PUTER_FALLBACK_ENABLED"),
            ("PUTER_TIMEOUT", "PUTER_API_TIMEOUT_MS"),
            ("PUTER_CACHE", "PUTER_CACHE_ENABLED"),
            ("PUTER_CACHE_DIR", "PUTER_CACHE_DIRECTORY"),
            ("PUTER_URL", "PUTER_API_BASE_URL"),
            ("PUTER_BASE_URL", "PUTER_API_BASE_URL"),
            ("PUTER_CONCURRENCY", "PUTER_MAX_CONCURRENT"),
            ("PUTER_ROTATION", "PUTER_ACCOUNT_ROTATION_ENABLED"),
            ("PUTER_ACCOUNT", "PUTER_AUTH_TOKEN"),
            ("PUTER_QUIET", "PUTER_QUIET_MODE"),
            ("PUTER_LOG", "PUTER_DEBUG"),
            ("PUTER_HOME", "PUTER_CONFIG_DIR"),
        ],
    )
    def test_plausible_wrong_variables(self, tmp_path, variable, meant):
        told = config_fault(tmp_path, {variable: "0"})
        assert variable in told and f"Did you mean {meant}" in told


STATE_WRITER = """
import sys, threading, puter
def work(number):
    for _ in range(25):
        state = puter.State(sys.argv[1], "s")  # a client for each request
        state.record(f"m{number % 2}", "ok", 1.0)
        state.record_success("alice", ("m",), 1.0, 2.0)
        state.close()
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


class TestStateUnderAttack:
    """The state that processes share: locked, deleted, and written by many."""

    def test_many_clients_in_many_processes_lose_nothing(self, folder):
        path = folder / STATE
        run_at_once(STATE_WRITER.replace("sys.argv[1]", repr(str(path))), folder, 3)
        state = puter.State(path)
        assert (
            sum(count for name in state.models() for _, count, _ in state.metrics([name])[0]) == 300
        )
        assert state._rows("PRAGMA integrity_check") == [("ok",)]
        plan = str(
            state._rows(
                "EXPLAIN QUERY PLAN SELECT seconds FROM samples WHERE model IN ('m') ORDER BY id DESC LIMIT 9"
            )
        )
        assert "samples_by_model" in plan
        state.close()

    def test_a_lock_of_another_is_waited_for_in_memory(self, state, folder, monkeypatch, caplog):
        state.record("m", "before", 1.0)
        state.close()
        real = sqlite3.connect
        monkeypatch.setattr(
            sqlite3, "connect", lambda path, **more: real(path, **{**more, "timeout": 0.05})
        )
        other = real(folder / STATE, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        state.record("m", "meanwhile", 1.0)
        assert caplog.text.count("cannot be used") == 1 and "safe" not in caplog.text
        other.execute("ROLLBACK")
        other.close()
        monkeypatch.setattr(state, "_retry_at", 0.0)
        state.record("m", "after", 1.0)
        assert {outcome for outcome, *_ in puter.State(folder / STATE).metrics(["m"])[0]} == {
            "before",
            "after",
        }

    @pytest.mark.parametrize("endings", [("",), ("", "-wal", "-shm")])
    def test_it_may_be_deleted_while_it_is_open(self, state, folder, endings, caplog):
        state.record("m", "ok", 1.0)
        for ending in endings:
            os.unlink(f"{folder / STATE}{ending}")
        state.record("n", "ok", 1.0)
        other = puter.State(folder / STATE)
        assert other.models() == ["n"] and other._rows("PRAGMA integrity_check") == [("ok",)]
        other.close()
        assert caplog.text == ""

    def test_a_full_disk_is_said_once_without_bad_advice(self, folder, caplog):
        state = puter.State(folder / STATE)
        state._use_memory(sqlite3.OperationalError("database or disk is full"))
        state._retry_at = None
        state._use_memory(sqlite3.OperationalError("database or disk is full"))
        assert len(caplog.records) == 1 and "elet" not in caplog.text

    def test_a_damaged_one_names_all_three_files(self, folder, caplog):
        puter.State(folder / STATE)._use_memory(sqlite3.DatabaseError("disk I/O error"))
        assert "-wal and -shm" in caplog.text

    def test_a_file_system_without_locks(self, store, monkeypatch):
        fcntl = pytest.importorskip("fcntl")

        def flock(handle: int, how: int) -> None:
            if how != fcntl.LOCK_UN:
                raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
        began = time.monotonic()
        with pytest.raises(puter.StoreError, match="local disk"):
            store.add(puter.Account("alice", "t"))
        assert time.monotonic() - began < 1.0


# =============================================================================
# Everyday use: what people type, paste, and have lying about
# =============================================================================
# The plugin's own settings, as its manual shows them.
PLUGIN_SETTINGS: JSON = {
    "quiet_mode": False,
    "debug": False,
    "api_timeout_ms": 120_000,
    "auto_create_temp_user": True,
    "max_retries": 3,
    "retry_delay_ms": 1_000,
    "stream_buffer_size": 1_024,
    "cache_ttl_ms": 300_000,
    "cache_enabled": True,
    "cache_max_entries": 100,
    "metrics_enabled": True,
    "metrics_max_samples": 500,
    "fallback_enabled": True,
    "fallback_cooldown_ms": 60_000,
    "fallback_models": ["openrouter:xiaomi/mimo-v2-flash:free"],
    "account_rotation_enabled": True,
    "account_rotation_strategy": "round-robin",
    "account_rotation_cooldown_ms": 300_000,
    "log_enabled": True,
    "log_dir": "~/logs",
    "auto_update": True,
}
SEED = WIRE.parent / "seed"


def example_settings() -> list[Any]:
    """The settings that the plugin's manual shows, where it stands beside the repository."""
    texts = [path.read_text("utf-8") for path in sorted(SEED.glob("*"))] if SEED.is_dir() else []
    found = [one for text in texts for one in re.findall(r"(?m)^\{\n(?:  .*\n)+?\}$", text)]
    known = []
    for one in found:
        with suppress(ValueError):
            data = json.loads(one)
            if data.keys() & set(puter._SETTINGS):
                known.append(pytest.param(data, id=", ".join([*data][:2])))
    return [pytest.param(PLUGIN_SETTINGS, id="all"), *known]


class TestPluginsFiles:
    """What a user of the plugin brings along."""

    @pytest.mark.parametrize("settings", example_settings())
    def test_its_settings_are_read(self, tmp_path, settings):
        write_settings(tmp_path, json.dumps(settings))
        config = load(tmp_path)
        for name, value in settings.items():
            if name in puter.IGNORED_SETTINGS:
                assert name in config.ignored
            else:
                given = getattr(config, name)
                assert (list(given) if isinstance(given, tuple) else given) == value

    def test_config_show_says_which_mean_nothing(self, desk, home):
        write_settings(home, json.dumps(PLUGIN_SETTINGS))
        done = run_cli(desk, "config", "show")
        assert done.returncode == 0 and done.stderr.count("\n") == 1
        assert all(name in done.stderr for name in puter.IGNORED_SETTINGS)
        assert "log_dir" not in done.stdout

    def test_its_statistics_are_left_alone(self, make, home, tmp_path):
        path = tmp_path / "metrics.json"
        path.write_text('{"models": {}}')
        client = make(metrics_file=str(path))
        client.chat("hi", model=lab("text"))
        assert path.read_text() == '{"models": {}}' and [s.requests for s in client.stats()] == [1]


class TestEveryday:
    """Waits with a reason, variables that win, wrong words, and pipes of any kind."""

    def test_who_answered_instead_is_said(self, desk, home):
        sign_in(desk, home, "alice", "bob")
        desk.accounts["token-alice"].credit_microcents = 0
        for how in ([], ["--no-stream"]):
            done = run_cli(desk, "ask", "-m", lab("text"), *how, "hi")
            assert re.search(r"answered by \S+ on bob \(", done.stderr)

    @posix_only
    def test_a_wait_has_a_reason(self, desk, home):
        fail = refusing(429, "too_many_requests")
        desk.script[lab("text")] = [*[lambda *_: fail] * 2, "text"]
        with at_terminal(
            desk, "ask", "-m", lab("text"), "hi", PUTER_RETRY_DELAY_MS="600"
        ) as terminal:
            terminal.expect("Rate limited (429), next try in")
            assert terminal.end() == 0

    @posix_only
    def test_pasted_lines_are_one_message(self, desk):
        with at_terminal(desk, "chat", "-m", lab("echo")) as terminal:
            terminal.expect("> ")
            assert "\x1b[?2004h" in terminal.shown  # the terminal is to mark what is pasted
            terminal.send("\x1b[200~one\rtwo\rthree\x1b[201~")
            terminal.send("\r")
            terminal.expect("three")
            terminal.say("exit")
            assert terminal.end() == 0
        assert [one["messages"][-1]["content"] for one in chats(desk)] == ["one\ntwo\nthree"]

    @pytest.mark.parametrize("word", ["exit", "quit", "/exit", "/quit", " exit "])
    def test_words_that_leave(self, desk, word):
        done = run_cli(desk, "chat", "-m", lab("echo"), stdin=f"hi\n{word}\nmore\n")
        assert (done.returncode, done.stdout) == (0, "hi\n")

    @posix_only
    def test_ctrl_d_leaves_the_line_to_the_shell(self, desk):
        with at_terminal(desk, "chat", "-m", lab("echo")) as terminal:
            terminal.expect("> ")
            terminal.send("\x04")
            assert terminal.end() == 0
            assert terminal.shown.endswith("\n")

    @posix_only
    def test_a_stopped_answer_counts(self, desk):
        desk.script[lab("text")] = "hang"
        with at_terminal(desk, "chat", "-m", lab("text")) as terminal:
            terminal.say("hi")
            assert eventually(lambda: chats(desk))
            time.sleep(0.2)
            terminal.send("\x03")
            terminal.expect("stopped")
            terminal.say("/usage")
            terminal.expect("1 answer;")
            terminal.say("quit")
            assert terminal.end() == 0

    @pytest.mark.parametrize(
        ("data", "want", "note"),
        [
            (b"caf\xe9", "caf\ufffd", True),
            ("é🦊".encode("utf-16"), "é🦊", False),
            (b"\xfe\xff" + "é🦊".encode("utf-16-be"), "é🦊", False),
            (b"\xef\xbb\xbfmark", "mark", False),
        ],
    )
    def test_a_pipe_of_any_bytes(self, desk, data, want, note):
        done = run_cli(desk, "ask", "-m", lab("echo"), stdin=data)
        assert (done.returncode, done.stdout) == (0, want + "\n")
        assert ("not all UTF-8" in done.stderr) is note

    @pytest.mark.parametrize(
        "argv",
        [
            ["logout", ""],
            ["switch", ""],
            ["stats", "--reset", ""],
            ["ask", "-m", "", "hi"],
            ["ask", "-s", " ", "hi"],
            ["ask", "-a", "", "hi"],
            ["login", "--import", ""],
            ["models", "--provider", ""],
            ["launch", "claude", "-m", ""],
            ["serve", "--api-key", ""],
            ["chat", "-m", ""],
        ],
    )
    def test_an_empty_argument_is_wrong_usage(self, desk, home, argv):
        done = run_cli(desk, *argv, stdin="hi")
        assert done.returncode == 2 and "must not be empty" in done.stderr
        assert len(puter.AccountStore(home).accounts()) == 1 and not desk.requests

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["ask", "--modle", "m", "hi"], "--model"),
            (["ask", "hello", "-m", "x", "there"], "quotes"),
            (["models", "--fre"], ""),
        ],
    )
    def test_misspelt_options(self, desk, argv, words):
        done = run_cli(desk, *argv)
        assert words in done.stderr and not chats(desk)

    def test_models_by_a_word(self, desk):
        done = run_cli(desk, "models", "claude-opus")
        assert (
            done.returncode == 0
            and "claude-opus-4-5" in done.stdout
            and "gemini" not in done.stdout
        )

    def test_the_variable_wins_and_says_so(self, desk, home):
        sign_in(desk, home, "bob")
        desk.accounts["token-given"] = FakeAccount("carol", "token-given", dead=True)
        env = {"PUTER_AUTH_TOKEN": "token-given"}
        done = run_cli(desk, "ask", "-m", lab("text"), "hi", **env)
        assert done.returncode == 1 and "PUTER_AUTH_TOKEN is set" in done.stderr
        assert "PUTER_AUTH_TOKEN is set" in run_cli(desk, "switch", "bob", **env).stderr
        done = run_cli(
            desk, "login", "--with-token", stdin="token-bob\n", PUTER_GUI_BASE_URL=desk.url, **env
        )
        assert done.returncode == 0 and "PUTER_AUTH_TOKEN is set" in done.stderr
        done = run_cli(
            desk, "login", "--with-token", stdin="token-given\n", PUTER_GUI_BASE_URL=desk.url
        )
        assert done.returncode == 1 and "This token was refused" in done.stderr

    def test_a_moment_s_failure_loses_no_sign_in(self, desk):
        route, failures = desk.routes["GET", "/whoami"], [1]

        def whoami(handler: FakeHandler) -> None:
            handler.send(Raw(b"", 503)) if failures and failures.pop() else route(handler)

        desk.routes["GET", "/whoami"] = whoami
        done = run_cli(
            desk, "login", "--with-token", stdin="token-bob\n", PUTER_GUI_BASE_URL=desk.url
        )
        assert done.returncode == 0 and done.stdout.startswith("Signed in as bob")

    def test_a_wrong_default_model_names_file_and_key(self, desk, home):
        path = write_settings(home, '{"default_model": "nobody-knows-it"}')
        done = run_cli(desk, "ask", "hi")
        assert done.returncode == 1 and f"default_model of {path}" in done.stderr

    def test_without_fallback_none_is_advised(self, desk):
        desk.script[lab("text")] = "err429"
        done = run_cli(desk, "ask", "--no-fallback", "-m", lab("text"), "hi")
        assert done.returncode == 1 and "fallback" not in done.stderr

    def test_a_failed_import_keeps_the_working_token(self, desk, home, tmp_path):
        dead = {"username": "alice", "authToken": "token-old", "addedAt": 9_000_000_000_000}
        path = tmp_path / "plugin.json"
        path.write_text(json.dumps({"version": 1, "accounts": [dead], "activeIndex": 0}))
        done = run_cli(desk, "login", "--import", str(path), PUTER_GUI_BASE_URL=desk.url)
        assert "Kept alice" in done.stdout
        assert puter.AccountStore(home).accounts()[0].token == "token-alice"

    def test_another_package_of_this_name(self, desk, monkeypatch):
        import importlib.metadata

        rivals = {"puter": ["putergenai", "puter-py"]}
        monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: rivals)
        done = run_cli(desk, "status", "--check", PUTER_GUI_BASE_URL=desk.url)
        assert "FAIL  the package putergenai hides this one" in done.stdout
        assert (
            "no settings file" in done.stdout and "hides this one; do: pip uninstall" in done.stdout
        )

    @pytest.mark.parametrize(
        ("content", "words"),
        [(None, "no conversation yet"), ("[" * 100_000, "cannot be read"), ("{}", "")],
    )
    def test_the_last_conversation(self, desk, home, content, words):
        if content is not None:
            (home / puter.CONVERSATION_NAME).write_text(content)
        done = run_cli(desk, "ask", "-c", "-m", lab("echo"), "hi")
        assert words in done.stderr and "Traceback" not in done.stderr
        assert done.returncode == (1 if "read" in words else 0)

    def test_nothing_is_said_of_the_cost_of_what_is_free(self, desk):
        desk.script[FREE[0]] = says("free")
        done = run_cli(desk, "ask", "--usage", "-m", FREE[0], "hi")
        assert "tokens:" in done.stderr and "cost" not in done.stderr

    @posix_only
    def test_the_log_begins_on_a_line_of_its_own(self, desk):
        with at_terminal(desk, "ask", "-m", lab("text"), "hi", PUTER_DEBUG="1") as terminal:
            assert terminal.end() == 0
        text = plain(terminal.shown)
        assert all(
            before in ("\n", "\r", "") for before in re.findall(r"(.|\n|^)\[puter-auth\]", text)
        )

    def test_serve_logs_requests(self, desk):
        with serving(desk, "--log") as (process, url, _):
            assert requests.get(f"{url}/models", timeout=10).ok
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=10)
        assert "GET /v1/models" in err

    def test_hosts_that_the_system_does_not_know(self):
        error = requests.ConnectionError("Failed to resolve 'api.puter.localhost'")
        ours = puter._network_error(error, "http://api.puter.localhost:4100/x", 1.0)
        assert "127.0.0.1 api.puter.localhost" in str(ours)


class TestToolsOfEveryKind:
    """Functions, and what they take and return, as people write them."""

    def test_what_can_be_a_tool(self):
        class Weather:
            """Knows the weather."""

            def __call__(self, city: str) -> str:
                """The weather."""
                return f"sunny in {city}"

            def method(self, city: str) -> str:
                """Of a method."""
                return city

        def both(city: str, days: int) -> str:
            """Of a partial."""
            return f"{city} {days}"

        for tool, name, text in (
            (Weather(), "Weather", "The weather"),
            (Weather().method, "method", "Of a method"),
            (functools.partial(both, days=2), "both", "Of a partial"),
        ):
            function = puter.function_schema(tool)["function"]
            assert (function["name"], function["description"].startswith(text)) == (name, True)
            assert "city" in function["parameters"]["properties"]
            assert tool(**puter.read_arguments(tool, {"city": "Rome"}))

    @pytest.mark.parametrize(
        ("hint", "given", "want"),
        [
            (datetime, "2026-01-02T03:04:05", datetime(2026, 1, 2, 3, 4, 5)),
            (date, "2026-01-02", date(2026, 1, 2)),
            (Path, "a/b", Path("a/b")),
            (Decimal, "1.50", Decimal("1.50")),
            (uuid.UUID, "12345678123456781234567812345678", uuid.UUID("12345678123456781234567812345678")),
            (NewType("City", str), "Rome", "Rome"),
            (date | None, None, None),
        ],
    )  # fmt: skip
    def test_texts_that_mean_more(self, hint, given, want):
        assert read_as(given, hint, "x") == want
        if want is not None and hint is not str and not hasattr(hint, "__supertype__"):
            for wrong in ("no such thing" if hint is not Path else 5, 5, ["x"]):
                with pytest.raises(TypeError):
                    read_as(wrong, hint, "x")

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="new syntax")
    def test_a_type_statement(self):
        names: JSON = {}
        exec("type City = str\ndef f(city: City) -> str: return city", names)  # noqa: S102
        assert puter.function_schema(names["f"])["function"]["parameters"]["properties"] == {
            "city": {"type": "string"}
        }

    def test_pydantic_s_models(self):
        from pydantic import BaseModel

        class Trip(BaseModel):
            city: str
            days: int = 1

        assert schema_of(Trip)["properties"]["city"] == {"title": "City", "type": "string"}
        assert read_as({"city": "Rome"}, Trip, "x") == Trip(city="Rome")
        with pytest.raises(TypeError, match="does not fit"):
            read_as({"days": 1}, Trip, "trip")
        assert json.loads(puter.tool_result_text(Trip(city="Rome"))) == {"city": "Rome", "days": 1}

    def test_numpy_s_docstrings(self):
        def far(city: str, days: int = 1) -> str:
            """How far it is.

            Parameters
            ----------
            city : str
                Where to go.
            days : int, optional
                How long
                it may take.

            Returns
            -------
            str
                Words.
            """
            return city

        function = puter.function_schema(far)["function"]
        assert function["description"] == "How far it is."
        about = {n: p["description"] for n, p in function["parameters"]["properties"].items()}
        assert about == {"city": "Where to go.", "days": "How long it may take."}

    @pytest.mark.parametrize(
        ("value", "want"),
        [
            (date(2026, 1, 2), "2026-01-02"),
            (Decimal("1.5"), "1.5"),
            (
                {(1, 2): "a", date(2026, 1, 2): "b", Unit("c"): "d"},
                {"(1, 2)": "a", "2026-01-02": "b", "c": "d"},
            ),
            ([types.SimpleNamespace(tolist=lambda: [1, 2])], [[1, 2]]),
            (types.SimpleNamespace(to_dict=lambda: {"x": {0: 1}}), {"x": {"0": 1}}),
        ],
    )
    def test_results(self, value, want):
        assert json.loads(puter.tool_result_text(value)) == want

    def test_a_coroutine_within_a_running_loop_is_a_clear_error(self, make, fake):
        fake.script[lab("text")] = [calling(("slow_weather", {"city": "Rome"})), says("done")]

        async def within() -> str:
            return make().run("hi", [slow_weather], model=lab("text")).text

        assert asyncio.run(within()) == "done" and "loop" in results(fake)[0]


OTHER_PYTHONS = sorted(
    {
        *Path.home().glob(".pyenv/versions/3.*/bin/python"),
        *(Path(found) for minor in range(8, 15) if (found := shutil.which(f"python3.{minor}"))),
    }
)
ON_ANY_PYTHON = """
import puter
import functools
from typing import Annotated, Optional
tools = puter.McpServer(None, print).tools()
assert [t["name"] for t in tools] == ["puter-chat", "puter-models", "puter-account"]
assert tools[0]["inputSchema"]["required"] == ["message"]
def f(a: "Annotated[float | None, {'minimum': 0}]" = None, b: Annotated[Optional[int], {"maximum": 9}] = None) -> str:
    return ""
schema = puter.function_schema(f)["function"]["parameters"]
assert schema["properties"]["b"]["maximum"] == 9 and schema["properties"]["a"]["minimum"] == 0, schema
assert puter.read_arguments(functools.partial(f), {"a": 1}) == {"a": 1.0}
"""


class TestOtherPythons:
    """What only another Python shows, on those that are here."""

    @pytest.mark.parametrize("python", OTHER_PYTHONS, ids=lambda p: str(p.parent.parent.name))
    def test_tools_or_a_clear_word(self, python, tmp_path):
        asked = subprocess.run(
            [python, "-c", "import sys; print(sys.version_info[1])"],
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.returncode or int(asked.stdout) < 8:
            pytest.skip("no Python 3.8 or newer behind this name")
        env = clean_environ(tmp_path, PYTHONDONTWRITEBYTECODE="1")
        done = subprocess.run(
            [python, "-c", ON_ANY_PYTHON], env=env, capture_output=True, text=True, check=False
        )
        if int(asked.stdout) >= 10:
            assert (done.returncode, done.stderr) == (0, "")
        else:
            assert done.returncode == 1 and done.stderr.count("\n") == 1
            assert "needs Python 3.10" in done.stderr


# =============================================================================
# Commands: launch
# =============================================================================
# A program that says how it was started, asks the gateway, and ends as its last argument says.
AGENT = """
import json, os, signal, sys, time, urllib.error, urllib.request
text = os.environ.get("OPENCODE_CONFIG_CONTENT", "") + " ".join(sys.argv)
files = {w: open(w).read() for a in sys.argv[1:] for w in [a.rpartition("=")[2].strip('"')]
         if os.path.isfile(w)}
text += "".join(files.values()) + os.environ.get("ANTHROPIC_BASE_URL", "")
at = text.index("http://127.0.0.1:")
root = text[at:at + text[at + 7:].index(":") + 13].rstrip('/v"')
def ask(key, model):
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    head = {"Authorization": "Bearer " + key, "Content-Type": "application/json"}
    request = urllib.request.Request(root + "/v1/chat/completions", json.dumps(body).encode(), head)
    try:
        answer = json.load(urllib.request.urlopen(request))
        return answer["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        return error.code
key = os.environ.get("PUTERPY_KEY") or os.environ["ANTHROPIC_AUTH_TOKEN"]
how = sys.argv[-1]
models = [w.partition(":")[2] for w in sys.argv if w.startswith("ask:")]
print(json.dumps({"argv": sys.argv[1:], "environ": dict(os.environ), "files": files, "key": key,
                  "root": root, "answers": [ask(key, m) for m in models],
                  "without": ask("wrong", "x")}), flush=True)
if how == "wait":
    signal.signal(signal.SIGINT, lambda *_: os._exit(7))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(8))
    print("ready", os.get_terminal_size().columns if os.isatty(1) else "", flush=True)
    time.sleep(60)
if how == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(how) if how.isdecimal() else 0)
"""
AGENTS = ("opencode", "claude", "codex", "aider")


@pytest.fixture
def agents(desk: FakePuter, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> FakePuter:
    """The fake server with alice signed in, and four scripted programs to launch."""
    sign_in(desk, own_home / "puter", "alice")
    folder = own_home / "bin"
    folder.mkdir()
    for name in AGENTS:
        install_agent(folder, name, AGENT)
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), os.environ["PATH"]]))
    return desk


# What the real ones are asked to do, and settings of a user that must not lead them elsewhere.
AGENT_ARGUMENTS = {
    "opencode": ["run", "write out.txt"],
    "claude": ["-p", "write out.txt", "--allowedTools", "Write"],
    "codex": ["exec", "--skip-git-repo-check", "-s", "workspace-write", "write out.txt"],
    "aider": ["--no-git", "--yes-always", "--analytics-disable", "--message", "write out.txt"],
}
NOWHERE = "http://127.0.0.1:9/v1"
AGENT_FILES = {
    "opencode": (
        ".config/opencode/opencode.json",
        json.dumps({"model": "x/y", "provider": {"puter": {"options": {"baseURL": NOWHERE}}}}),
    ),
    "claude": (
        ".claude/settings.json",
        json.dumps({"env": {"ANTHROPIC_BASE_URL": NOWHERE, "ANTHROPIC_AUTH_TOKEN": "mine"}}),
    ),
    "codex": (".codex/config.toml", 'model = "x"\nmodel_provider = "y"\n'),
    "aider": (".aider.conf.yml", f"openai-api-base: {NOWHERE}\nopenai-api-key: mine\n"),
}


def agent_at_work(handler: FakeHandler, args: dict[str, Any]) -> Turn:
    """A model that writes a file with the tools of any coding agent, or without."""
    tools = [tool["function"]["name"] for tool in args.get("tools", [])]
    calls: JSON = {
        "write": {"filePath": str(Path("out.txt").resolve()), "content": "written"},
        "Write": {"file_path": str(Path("out.txt").resolve()), "content": "written"},
        "exec_command": {"cmd": "echo written > out.txt"},
    }
    name = next((name for name in calls if name in tools), None)
    if name is None:
        return Turn("out.txt\n```\n<<<<<<< SEARCH\n=======\nwritten\n>>>>>>> REPLACE\n```\n")
    messages = args["messages"]
    if any(m.get("role") == "tool" for m in messages) or "tool_result" in str(messages):
        return Turn("Done.")
    call = tool_call("call_1", name, json.dumps(calls[name]))
    return Turn("", calls=(call,), finish="tool_calls")


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, but those of our own state."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != "puter"
    }


def launched(fake: FakePuter, capfd: Any, *argv: str, **env: str) -> tuple[Any, str]:
    """What a launched program said, and the stderr of it all; the last argument ends it."""
    done, told = run_cli(fake, "launch", *argv, **env), capfd.readouterr()
    assert told.out, done.stderr
    return json.loads(told.out.splitlines()[0]), done.stderr + told.err


class TestLaunch:
    """`launch` with scripted programs, and with the real ones where they are installed."""

    @pytest.mark.parametrize("program", AGENTS)
    @pytest.mark.parametrize("how", [[], ["--mcp"]])
    def test_what_the_program_gets(self, agents, own_home, program, how, capfd):
        if program == "aider" and how:
            done = run_cli(agents, "launch", program, *how)
            assert done.returncode == 2 and "MCP" in done.stderr
            return
        for name in (".claude.json", ".codex/config.toml", ".aider.conf.yml"):
            (own_home / name).parent.mkdir(exist_ok=True)
            (own_home / name).write_text("mine")
        before = files_in(own_home)
        argv = (program, *how, "-m", "claude-opus-4.5", "--small", lab("text"), "--")
        env = {"ANTHROPIC_API_KEY": "sk-mine", "NO_PROXY": "x.example"}
        report, err = launched(agents, capfd, *argv, f"ask:{lab('text')}", "0", **env)
        environ, key = report["environ"], report["key"]
        assert report["answers"] == [SENTENCE] and report["without"] == 401
        assert report["argv"][-2:] == [f"ask:{lab('text')}", "0"]
        assert len(key) > 30 and not any(key in one for one in report["argv"])
        assert key not in err and program == "claude" or key not in str(report["files"])
        assert "ANTHROPIC_API_KEY" not in environ or program != "claude"
        assert environ["NO_PROXY"] == environ["no_proxy"] == "x.example,127.0.0.1"
        everything = json.dumps([report["argv"], report["files"], environ])
        assert OPUS in everything and lab("text") in everything
        assert ("--mcp" in everything) is bool(how)
        assert files_in(own_home) == before
        assert not any(Path(name).exists() for name in report["files"])
        with pytest.raises(requests.exceptions.ConnectionError):
            requests.get(report["root"] + "/health", timeout=5)
        assert err.startswith(
            f"1 request; answered: 1 by {lab('text')}; tokens: 11 in, 22 out; cost $0.0000"
        )
        assert err.rstrip().endswith("left this month") and err.count("\n") == 1

    def test_settings_of_opencode(self, agents, capfd):
        report, _ = launched(agents, capfd, "opencode", "--mcp", "--", "0")
        settings = json.loads(report["environ"]["OPENCODE_CONFIG_CONTENT"])
        assert settings["model"] == settings["small_model"] == f"puter/{FREE[0]}"
        provider = settings["provider"]["puter"]
        assert provider["options"]["apiKey"] == "{env:PUTERPY_KEY}"
        assert FREE[0] in provider["models"]
        assert settings["mcp"]["puter"]["command"] == puter.mcp_command()

    def test_settings_of_claude(self, agents, capfd):
        argv = ("claude", "--mcp", "-m", OPUS, "--small", lab("text"), "--", "0")
        report, _ = launched(agents, capfd, *argv)
        settings, servers = map(json.loads, report["files"].values())
        assert servers["mcpServers"]["puter"]["args"] == puter.mcp_command()[1:]
        for variables in (report["environ"], settings["env"]):
            assert variables["ANTHROPIC_BASE_URL"].startswith("http://127.0.0.1:")
            assert variables["ANTHROPIC_AUTH_TOKEN"] == report["key"]
            slots = [variables[f"ANTHROPIC_DEFAULT_{slot}_MODEL"] for slot in SLOTS]
            assert [variables["ANTHROPIC_MODEL"], *slots] == [OPUS, OPUS, OPUS, lab("text")]
            assert variables["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] == "64000"  # it costs money
        assert settings["env"]["ANTHROPIC_API_KEY"] == ""

    def test_settings_of_codex(self, agents, capfd):
        tomllib = pytest.importorskip("tomllib")
        report, _ = launched(agents, capfd, "codex", "--mcp", "-m", OPUS, "--", "0")
        pairs = report["argv"][1:-1:2]
        settings = tomllib.loads("\n".join(pairs))
        assert settings["model"] == OPUS and settings["model_provider"] == "puter"
        assert settings["model_providers"]["puter"]["env_key"] == "PUTERPY_KEY"
        server = settings["mcp_servers"]["puter"]
        assert server["args"] == puter.mcp_command()[1:]
        assert "PUTER_API_BASE_URL" in server["env_vars"]
        assert "model_context_window" not in settings  # of this model only
        (catalogue,) = report["files"].values()
        first, *_ = json.loads(catalogue)["models"]
        assert (first["slug"], first["context_window"]) == (OPUS, 64_000)
        assert first["input_modalities"] == ["text", "image"] and first["base_instructions"]

    @pytest.mark.parametrize("how", ["0", "3", pytest.param("kill", marks=posix_only)])
    def test_its_exit_code_is_ours(self, agents, how):
        done = run_cli(agents, "launch", "opencode", "--", how, apart=True)
        assert done.returncode == (137 if how == "kill" else int(how))

    @pytest.mark.parametrize(
        ("argv", "code", "words"),
        [
            (["nosuch"], 2, "invalid choice"),
            (["opencode", "-m", "claude-opus-4"], 1, f"Did you mean {OPUS}"),
            (["opencode", "--small", "nosuch-model-x"], 1, "No model is called"),
            (["opencode", "-m", "allam-2-7b"], 1, "allam-2-7b cannot call tools"),
            (["opencode", "-m", OPUS, "--free"], 1, f"{OPUS} is not free"),
            (["opencode", "--resume"], 2, "unrecognized arguments"),
        ],
    )
    def test_what_cannot_be(self, agents, argv, code, words):
        done = run_cli(agents, "launch", *argv)
        assert (done.returncode, done.stdout) == (code, "") and words in done.stderr

    def test_not_installed(self, agents, monkeypatch):
        monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
        done = run_cli(agents, "launch", "opencode")
        assert (done.returncode, done.stdout) == (127, "")
        assert done.stderr.endswith("Install it with: npm install -g opencode-ai\n")
        rows = run_cli(agents, "launch").stdout.splitlines()
        assert [row.split()[0] for row in rows[1:]] == list(AGENTS)
        assert all("not installed; " in row for row in rows[1:])

    def test_what_is_installed(self, agents, own_home):
        install_agent(own_home / "bin", "codex", "print('codex-cli 0.169.0')")
        rows = [row.split() for row in run_cli(agents, "launch").stdout.splitlines()]
        assert ["codex", "0.169.0", str(own_home / "bin" / "codex")] in rows

    def test_nobody_is_signed_in(self, agents, own_home):
        (own_home / "puter" / ACCOUNTS).unlink()
        done = run_cli(agents, "launch", "opencode", "--", "0")
        assert (done.returncode, done.stdout) == (1, "")
        assert "python -m puter login" in done.stderr

    def test_free_passes_over_a_default_that_costs(self, agents, monkeypatch, capfd):
        monkeypatch.setenv("PUTER_DEFAULT_MODEL", OPUS)
        for how, model in (([], OPUS), (["--free"], FREE[0])):
            environ = launched(agents, capfd, "claude", *how, "--", "0")[0]["environ"]
            assert environ["ANTHROPIC_MODEL"] == model

    def test_the_model_is_free_though_none_is_listed(self, agents, monkeypatch, capfd):
        monkeypatch.setenv("PUTER_FALLBACK_MODELS", f"{OPUS},nosuch")
        _, err = launched(agents, capfd, "claude", "--", "0")
        assert re.match(r"Model: \S+:free \(free\)\. ", err)

    def test_free_is_free_for_whatever_it_asks(self, agents, monkeypatch, capfd):
        monkeypatch.setenv("PUTER_FALLBACK_MODELS", f"{OPUS},{FREE[1]}")
        agents.script[FREE[1]] = says("free")
        agents.script[FREE[0]] = "err429"
        asked = [f"ask:{name}" for name in (OPUS, FREE[0])]
        report, err = launched(
            agents, capfd, "opencode", "--free", "-m", FREE[0], "--", *asked, "0"
        )
        # whatever is asked is the model of the launch; while that rests, its fallback
        assert report["answers"] == ["free", "free"]
        assert [model for _, model in agents.chat_calls()] == [FREE[0], FREE[1], FREE[1]]
        assert f"2 requests; answered: 2 by {FREE[1]}; " in err and "2 fallbacks" in err

    @pytest.mark.parametrize("debug", ["0", "1"])
    def test_nothing_of_ours_is_printed_meanwhile(self, agents, own_home, debug):
        argv = ("launch", "opencode", "-m", OPUS, "--", f"ask:{lab('text')}", "0")
        err = run_cli(agents, *argv, apart=True, PUTER_DEBUG=debug).stderr
        log = own_home / "puter" / "launch.log"
        assert ("[puter-auth]" in log.read_text("utf-8")) is (debug == "1")
        named, *others = err.splitlines() if debug == "1" else ["", *err.splitlines()]
        assert (str(log) in named) is (debug == "1")
        assert len(others) == 1 and others[0].startswith("1 request; ")
        if debug == "0":
            assert run_cli(agents, *argv, apart=True, PUTER_QUIET_MODE="1").stderr == ""

    CLAUDE_LEADS_ELSEWHERE = (
        *(
            f"CLAUDE_CODE_USE_{n}"
            for n in "BEDROCK VERTEX FOUNDRY MANTLE ANTHROPIC_AWS ANTHROPIC_GOOGLE_CLOUD".split()
        ),
        *"ANTHROPIC_API_KEY ANTHROPIC_UNIX_SOCKET CLAUDE_CODE_SUBAGENT_MODEL".split(),
    )

    def test_no_variable_leads_claude_elsewhere(self, agents, capfd):
        env = dict.fromkeys(self.CLAUDE_LEADS_ELSEWHERE, "claude-fable-5")
        report, _ = launched(
            agents,
            capfd,
            "claude",
            "-m",
            OPUS,
            "--small",
            FREE[0],
            "--",
            "ask:claude-fable-5",
            "0",
            **env,
        )
        environ = report["environ"]
        (settings,) = (
            json.loads(text)["env"]
            for name, text in report["files"].items()
            if name.endswith("settings.json")
        )
        for name in self.CLAUDE_LEADS_ELSEWHERE:
            assert name not in environ and settings[name] == ""
        tiers = {
            n: environ[n] for n in environ if n.startswith("ANTHROPIC_") and n.endswith("_MODEL")
        }
        for tier in ("OPUS", "SONNET", "FABLE", "HAIKU"):
            assert tiers[f"ANTHROPIC_DEFAULT_{tier}_MODEL"] == (
                FREE[0] if tier == "HAIKU" else OPUS
            )
        assert set(tiers.values()) == {OPUS, FREE[0]} and tiers.items() <= settings.items()
        # whatever it asks for, it is the given model that answers
        assert [name for _, name in agents.chat_calls()] == [OPUS]

    def test_opencode_gets_ours_though_it_is_disabled(self, agents, capfd):
        environ = launched(agents, capfd, "opencode", "-m", OPUS, "--", "0")[0]["environ"]
        settings = json.loads(environ["OPENCODE_CONFIG_CONTENT"])
        assert settings["enabled_providers"] == ["puter"] and settings["disabled_providers"] == []

    def test_sigint_to_launch_alone_ends_it(self, agents):
        with running_cli(agents, "launch", "opencode", "-m", OPUS, "--", "wait") as process:
            while b"ready" not in process.stdout.readline():
                pass
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 7

    def test_a_program_that_ignores_sigterm_is_killed(self, agents, own_home):
        stubborn = "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True)\ntime.sleep(60)\n"
        install_agent(own_home / "bin", "codex", stubborn)
        code = "import sys, puter; puter.PROGRAM_PATIENCE_S = 0.3; sys.exit(puter.main())"
        command = [sys.executable, "-c", code, "launch", "codex", "-m", OPUS]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=cli_env(agents)) as process:
            while b"ready" not in process.stdout.readline():
                pass
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 128 + 9

    def test_folders_of_killed_launches_are_cleared(self, tmp_path):
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        names = [f"puter-{gone.pid}-abc", f"puter-{os.getpid()}-abc", "puter-x-abc", "other"]
        for name in names:
            (tmp_path / name).mkdir()
        puter._clear_left_folders(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted(names[1:])

    def test_the_terminal_is_its_own(self, agents):
        argv = ("launch", "opencode", "-m", OPUS, "--", "wait")
        with at_terminal(agents, *argv, columns=77) as terminal:
            terminal.expect("ready 77")
            terminal.send("\x03")
            assert terminal.end() == 7
        assert "Traceback" not in terminal.shown
        with running_cli(agents, *argv) as process:
            assert process.stdout
            while b"ready" not in process.stdout.readline():
                pass
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 8

    @pytest.mark.parametrize("program", AGENTS)
    def test_the_real_program(self, desk, own_home, monkeypatch, program):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
        sign_in(desk, own_home / "puter", "alice")
        work, mine = own_home / "work", own_home / AGENT_FILES[program][0]
        work.mkdir()
        mine.parent.mkdir(exist_ok=True, parents=True)
        mine.write_text(AGENT_FILES[program][1])
        subprocess.run(["git", "init", "-q"], cwd=work, check=False)
        monkeypatch.chdir(work)
        monkeypatch.setenv("PWD", str(work))
        desk.script[OPUS] = agent_at_work
        how = ["--mcp"] * (program != "aider")
        argv = ("launch", program, "-m", OPUS, *how, "--", *AGENT_ARGUMENTS[program])
        done = run_cli(desk, *argv, apart=True)
        assert done.returncode == 0, done.stderr
        assert (work / "out.txt").read_text().strip() == "written", done.stdout + done.stderr
        assert f" by {OPUS}; tokens: " in done.stderr
        assert mine.read_text() == AGENT_FILES[program][1]

    def test_on_windows(self, agents, monkeypatch, capsys):
        started: list[Any] = []

        class Popen:
            def __init__(self, command: Any, env: Any) -> None:
                started.append(command)

            def wait(self) -> int:
                return 5

        for name in ("SIGQUIT", "SIGHUP"):
            monkeypatch.delattr(signal, name, raising=False)
        monkeypatch.setattr(subprocess, "Popen", Popen)
        monkeypatch.setattr("shutil.which", lambda name: rf"C:\npm\{name}.CMD")
        monkeypatch.setenv("PUTER_API_BASE_URL", agents.url)
        assert puter.main(["launch", "opencode", "-m", OPUS, "--", "run", "a b"]) == 5
        assert started == [[r"C:\npm\opencode.CMD", "run", "a b"]]


# =============================================================================
# The benchmark plays
# =============================================================================
class TestBench:
    def test_every_part_of_it_plays(self, tmp_path):
        with ExitStack() as stack:
            lab = Lab(tmp_path, True, stack)
            assert lab.ask(load_server, lab.server.said, 1, 0, {"model": "lab/model-0"}) > 0
            assert lab.ask(load_server, lab.bare_server.said, 1, 0, {"model": "lab/model-0"}) > 0
            assert lab.ask(read_length, lab.base, 10) > 0
            assert lab.ask(time_streams, lab.base, 10, 10, 1, 1)["sdk"][0] > 0
            samples = crowds(lab)
        assert samples["ours failures"] == samples["bare failures"] == [0]
        assert samples["ours requests"] == [4]

    @pytest.mark.parametrize(
        ("target", "ours", "floor", "ok"),
        [
            ("x <= 0.6", [1.0, 2.0, 9.0], [2.0, 4.0, 10.0], True),
            ("x >= 0.6", [1.0, 2.0, 9.0], [2.0, 4.0, 10.0], False),
            ("more <= 1", [3.0], [1.0], False),
            ("ours <= 0", [0], [], True),
        ],
    )
    def test_verdict(self, target, ours, floor, ok):
        bench = Bench("a line", crowds, "ours", "floor" if floor else "", target)
        reached, line = verdict(bench, {"ours": ours, "floor": floor} if floor else {"ours": ours})
        assert reached is ok and line.endswith("ok" if ok else "SHORT")


# =============================================================================
# The README
# =============================================================================
README = Path(puter.__file__).resolve().parent / "README.md"
README_TEXT = README.read_text("utf-8") if README.is_file() else ""

# What the models of the README's examples say to what they are asked.
README_ANSWERS = {
    "Why is the sky blue?": "Air scatters blue light far more than red, so blue comes to "
    "your eye from all over the sky.",
    "Tell me a story in one sentence.": "The lighthouse keeper lit the lamp for a ship that "
    "had come home years ago.",
    "Name three rivers.": "The Nile, the Danube and the Mekong.",
    "And three lakes?": "Lake Victoria, Lake Constance and Lake Tanganyika.",
    "What do you see?": "A red bicycle that leans against a white wall.",
    "What is the total?": "The invoice comes to 240 euros.",
    "What is the weather in Paris?": "It is 18 degrees and sunny in Paris.",
    "Name and year, as JSON: Ada Lovelace was born in 1815.": '{"name": "Ada Lovelace", '
    '"year": 1815}',
    "Days in a leap year?": "366.",
    "Say hello.": "Hello!",
    "What broke?": "The disk was full: no space was left on the device at 03:12.",
}


def readme_answer(handler: FakeHandler, args: dict[str, Any]) -> Answer:
    """What any model says to a question of the README; Claude is too busy for rivers."""
    asked = " ".join(part.get("text", "") for part in last_user_parts(args)).strip()
    results = [m["content"] for m in args["messages"] if m.get("role") == "tool"]
    if args.get("tools") and not results and "weather" in asked:
        return Turn(calls=(WEATHER_CALL,), finish="tool_calls")
    if "rivers" in asked and handler.model["provider"] == "claude":
        message = "AI provider rate limit exceeded"
        raise Refusal(429, "upstream_rate_limited", message)
    known = [said for question, said in README_ANSWERS.items() if question in asked]
    assert known, f"the README asks what nobody expects: {asked!r}"
    reasons = "reasoning_effort" in args
    return Turn(known[0], reasoning=("Scattering. ",) if reasons else ())


def readme_catalogue() -> list[dict[str, Any]]:
    """A few models of the fake catalogue, and the default model as Puter lists it."""
    unshown = ("lab/", HAIKU, SONNET, "gpt-4o", "gpt-5.3-codex")
    models = [m for m in default_catalogue() if not any(name in m["id"] for name in unshown)]
    for model in models:
        if model["id"] == "openrouter:openai/gpt-5-nano":
            model |= {"id": "gpt-5-nano-2025-08-07", "provider": "openai-completion"}
            model["costs"] = {"tokens": 1_000_000, "prompt_tokens": 5, "completion_tokens": 40}
            model |= {"input_cost_key": "prompt_tokens", "output_cost_key": "completion_tokens"}
    return models


def readme_blocks(language: str) -> list[Any]:
    """(code, the text block right behind it or None) of a language, named by the line."""
    pattern = rf"^```{language}\n(.*?)^```\n(?:```text\n(.*?)^```\n)?"
    return [
        pytest.param(
            found[1], found[2], id=f"line {README_TEXT[: found.start()].count(chr(10)) + 1}"
        )
        for found in re.finditer(pattern, README_TEXT, re.DOTALL | re.MULTILINE)
    ]


def readme_section(title: str) -> str:
    """The text of a section, its subsections included."""
    level, _, rest = README_TEXT.partition(f"# {title}\n")
    level = level[level.rfind("\n") + 1 :] + "#"
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def readme_table(section: str, *head: str) -> list[list[str]]:
    """The rows of the table of a section that has this head."""
    first = f"| {' | '.join(head)} |\n"
    assert README_TEXT.count(first) == 1 and first in readme_section(section)
    rows = README_TEXT.partition(first)[2].partition("\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows.splitlines()]


def same_words(text: str) -> str:
    """A text with every number as 0, since times and ports are never the same."""
    return " ".join(re.sub(r"\d[\d.,:]*", "0", text).split())


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a reader who tries the examples: two accounts, and some files."""
    config = tmp_path / ".config" / "puter"
    (tmp_path / "photo.png").write_bytes(PNG)
    (tmp_path / "invoice.pdf").write_bytes(b"%PDF-1.4\n%%EOF\n")
    (tmp_path / "app.log").write_text("03:12 write failed: no space left\n", "utf-8")
    hidden = ("XDG_", "COLUMNS", "NO_COLOR", "HTTP_", "ALL_", "PUTER_")
    own = {n: v for n, v in os.environ.items() if not n.upper().startswith(hidden)}
    with FakePuter(catalogue=readme_catalogue()) as fake:
        fake.script = {model["id"]: readme_answer for model in fake.catalogue}
        sign_in(fake, config, "alice", "bob")
        yield {
            **own,
            **UNCOUNTED,
            **dict.fromkeys(("HOME", "USERPROFILE"), str(tmp_path)),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), own["PATH"]]),
            "PUTER_API_BASE_URL": fake.url,
            "PUTER_CONFIG_DIR": str(config),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONIOENCODING": "utf-8",
            "PYTHONPATH": str(README.parent),
        }


def run_as_reader(command: Any, reader: dict[str, str], **options: Any) -> str:
    """What a command shows on stdout and stderr together, with names for this machine."""
    done = subprocess.run(
        command,
        check=False,
        cwd=reader["HOME"],
        env=reader,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=30,
        **options,
    )
    shown: str = done.stdout.decode().replace("\r\n", "\n")
    shown = shown.replace(reader["HOME"], "/home/alice")
    shown = shown.replace(reader["PUTER_API_BASE_URL"], "https://api.puter.com")
    assert "Traceback" not in shown, shown
    return shown


class TestReadme:
    """The README is true: its examples run, and its tables are those of the module."""

    @pytest.mark.parametrize(("code", "shown"), readme_blocks("python"))
    def test_python(self, code, shown, reader):
        told = run_as_reader([sys.executable, "-c", code], reader)
        assert shown is None or told.rstrip() == shown.rstrip()

    @pytest.mark.parametrize(("code", "shown"), readme_blocks("python"))
    def test_a_repl_takes_it_pasted(self, code, shown):
        waiting: list[str] = []
        for row in [*code.splitlines(), ""]:
            waiting.append(row)
            if codeop.compile_command("\n".join(waiting), symbol="single") is not None:
                waiting = []
        assert not waiting

    @pytest.mark.skipif(os.name == "nt", reason="the commands are of a Unix shell")
    @pytest.mark.parametrize(("block", "more"), readme_blocks("console"))
    def test_console(self, block, more, reader):
        assert more is None
        for part in block.removeprefix("$ ").split("\n$ "):
            command, _, shown = part.partition("\n")
            told = run_as_reader(command, reader, shell=True)
            assert same_words(told) == same_words(shown), command

    def test_every_json_example_is_valid(self, tmp_path):
        examples = readme_blocks("json")
        assert examples
        for block_shown in examples:
            (tmp_path / "puter.json").write_text(block_shown.values[0], "utf-8")
            assert puter.Config.load(tmp_path, {}) != puter.Config.load(tmp_path / "none", {})

    def test_settings(self):
        rows = readme_table("Configuration", "Setting", "Default", "Range", "Meaning")
        specs = list(puter._SETTINGS.values())
        assert [(row[0], row[3]) for row in rows] == [
            (f"`{spec.name}`", spec.metadata["doc"]) for spec in specs
        ]
        for spec, (_, default, allowed, _) in zip(specs, rows, strict=True):
            shown = f"`{json.dumps(spec.default)}`"
            if spec.name == "fallback_models":
                shown = "18 free models"
            assert default == shown
            if spec.type == "int":
                assert allowed == "{:,} to {:,}".format(*spec.metadata["allowed"])
            elif choices := spec.metadata["allowed"]:
                assert all(f'`"{choice}"`' in allowed for choice in choices)

    def test_environment_variables(self):
        known = {"PUTER_<NAME>", *puter._OTHER_VARIABLES, *puter._MISNAMED_VARIABLES}
        known |= {f"PUTER_{name.upper()}" for name in puter._SETTINGS}
        used = set(re.findall(r"PUTER_(?:<NAME>|[A-Z_]+)", README_TEXT))
        assert used <= known and set(puter._OTHER_VARIABLES) <= used

    def test_commands(self):
        subparsers = next(
            action
            for action in puter.build_parser()._actions
            if isinstance(action, argparse._SubParsersAction)
        )
        listed = next(x for x in README_TEXT.splitlines() if x.startswith("The commands: "))
        assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(subparsers.choices)

    def test_every_command_line_is_understood(self):
        """Whatever the README says to type after `python -m puter`."""
        said = re.findall(r"python -m puter ([^`\n|#<>]+)", README_TEXT)
        assert len(said) > 40
        for words in {text.split("   ")[0].strip() for text in said}:
            argv = shlex.split(words)
            if argv[-1:] != ["--help"] and not {"PROGRAM", "NAME"} & set(argv):
                puter._parsed(argv)

    def test_programs(self):
        listed = README_TEXT.partition("\n`python -m puter config PROGRAM` prints")[2]
        listed = listed.partition("PROGRAM is ")[2].partition("\n")[0]
        assert set(re.findall(r"`([\w-]+)`", listed)) == set(puter.PROGRAMS)

    def test_mcp_tools(self):
        rows = readme_table("MCP", "Tool", "Arguments", "Gives")
        assert [(row[0], re.findall(r"`(\w+)`", row[1])) for row in rows] == [
            (f"`{tool['name']}`", list(tool["inputSchema"]["properties"]))
            for tool in puter.McpServer(puter.Puter, print).tools()
        ]

    def test_fallback_models(self):
        listed = README_TEXT.partition("**The default fallback models**")[2].partition("\n")[0]
        assert tuple(re.findall(r"`(.+?)`", listed)) == puter.DEFAULT_FALLBACK_MODELS

    def test_errors(self):
        columns = ("Scope", "Retryable", "When", "What to do")
        first = readme_table("Errors", "Kind", *columns)
        handled = ["AuthError", "RateLimitError", "StreamError", "BadRequestError"]
        assert [row[0].strip("`") for row in first] == handled
        rows = first + readme_table("Errors", "Other kind", *columns)
        told = [(row[0].strip("`"), row[1], row[2] == "yes") for row in rows]
        kinds = [kind for kind in ALL_ERRORS if kind is not puter.PuterError]
        assert sorted(told) == [(k.__name__, k.scope, k.retryable) for k in kinds]

    def test_demo(self, capfd, monkeypatch):
        monkeypatch.setattr(FakeHandler, "pause", lambda *_: None)  # nobody looks on
        assert cmd_demo(argparse.Namespace()) == 0
        shown = capfd.readouterr()
        assert shown.out.count(f"{DEMO_ANSWER}\n") == 3
        assert shown.out.count("[exit code 0]") == 3
        assert shown.out.count("[exit code 1]") == 1
        stand_in, broken, model, summary = shown.err.splitlines()
        assert "(free)" in model and summary.startswith("1 request; answered: 1 by openrouter:")
        assert stand_in.startswith("answered by openrouter:") and ":free" in stand_in
        assert broken.startswith("error: ") and "connection lost" in broken

    def test_links(self):
        titles = re.findall(r"^#+ (.+)$", re.sub(r"(?s)```.*?```", "", README_TEXT), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        for target in re.findall(r"\]\(([^)]+)\)", README_TEXT):
            if target.startswith("#"):
                assert target[1:] in anchors, target
            elif not target.startswith("https://"):
                assert (README.parent / target).is_file(), target

    def test_it_tells_nothing_of_where_it_was_written(self):
        places = r"/(work|tmp|root|opt|mnt|Users|home/(?!alice\b))\b|[A-Z]:\\"
        assert not re.search(places, README_TEXT)
        assert not re.search(r"(?i)pypi|npmjs|pythonhosted|crates\.io", README_TEXT)
        assert str(Path.home()) not in README_TEXT

    def test_the_check_finds_its_command(self):
        """`.ci/run` runs the first line that has `python -m pytest`."""
        line = next(x for x in README_TEXT.splitlines() if "python -m pytest" in x)
        assert line == "python -m pip install '.[test]' && python -m pytest -n auto"
