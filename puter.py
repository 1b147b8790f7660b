"""Ask the 500+ AI models of a Puter.com account from Python or the terminal.

    import puter
    print(puter.chat("Why is the sky blue?"))
    for chunk in puter.stream("Tell me a story", model="claude-opus-4-5"):
        print(chunk, end="", flush=True)

Sign in once with ``python -m puter login``; ``python -m puter --help`` lists the commands.
`Puter` is the client. Every failure is a `PuterError` that says what happened and what to do.

The names in `__all__` are the module's face and stay; any other may change with a version. Remarks
such as "(recorded)" mean that a fact was seen in the answers of a real Puter server, release 26.07.

The file from top to bottom; each section uses only those above it:

     1 head        the log, JSON, texts, and what is reset after a fork
     2 errors      `PuterError` and its kinds, and what a server's codes and texts stand for
     3 values      `Reply`, `Chunk`, `Model`…: what goes in and out
     4 config      one table of settings: types, ranges, defaults, documentation
     5 store       the accounts file, and the state that processes share
     6 messages    history (any vendor's parts in, each provider's form out), files, tools, replies
     7 policies    plain functions that decide: retry, whom to ask next, what a model can take
     8 transport   HTTP by `requests` and `sseclient`, and their failures
     9 Puter       the client: the loop that asks until somebody answers, streams, conversations
    10 login       sign in with the browser
    11 gateway     the server for other programs: three dialects, one handler
    12 mcp         the Model Context Protocol on stdin and stdout
    13 cli         the command line, and `launch` for coding agents

Begin to read at `class Puter`. A call's way: `Puter.chat` checks its arguments
(`_build_request`), `_open` gives a stream of the answer, `_ask_until_answered` asks whom
`next_target` names, `_send_with_retries` keeps at one of them, `_Api.open` writes the provider's
form (`arguments_for`), `_Transport.send` sends it, and `reply_from_driver`, or a decoder, reads
what comes.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (people copy this file anywhere)
    raise SystemExit("puter.py needs Python 3.10 or newer; this is " + sys.version.split()[0])

import base64
import copy
import enum
import errno
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import threading
import time
import types
import typing
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stderr, suppress
from dataclasses import asdict, astuple, dataclass, field, fields, is_dataclass, replace
from functools import cached_property, lru_cache, partial, wraps
from itertools import chain, groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, NoReturn, TypeVar
from urllib.parse import parse_qs, quote, unquote, urljoin, urlsplit
from weakref import WeakSet

if TYPE_CHECKING:
    import sqlite3
    from concurrent.futures import Future
    from typing import Concatenate, TypeGuard

    import requests
    from typing_extensions import Self  # noqa: UP035 (typing's own needs 3.11)

__version__ = "0.2.0"
__all__ = [
    "AccessError", "Account", "AccountStore", "AllAccountsOnCooldownError", "Attempt", "Audio",
    "AuthError", "BadRequestError", "BudgetError", "BusyError", "Chunk", "Config", "ConfigError",
    "ContextLengthError", "Conversation", "Cooldown", "Credit", "CreditError", "Model",
    "ModelAccessError", "ModelNotFoundError", "ModelRateLimitError", "ModelStats",
    "ModelUnavailableError", "NetworkError", "OpenAIServer", "Picture", "ProviderAuthError",
    "Puter", "PuterError", "RateLimitError", "Reply", "ReplyError", "RequestTimeoutError",
    "ServerError", "State", "StoreError", "Stream", "StreamError", "SubscriptionError",
    "ToolCall", "Transcript", "Usage", "chat", "stream",
]  # fmt: skip

DEFAULT_MODEL = "gpt-5-nano"  # Puter's default: cheap, so that a forgotten `model=` costs little
DEFAULT_FALLBACK_MODELS = tuple(
    f"openrouter:{name}:free"
    for name in """
    xiaomi/mimo-v2-flash deepseek/deepseek-r1-0528 mistralai/devstral-2512 qwen/qwen3-coder
    mistralai/devstral-small-2505 qwen/qwen2.5-coder-32b-instruct google/gemini-2.0-flash-exp
    meta-llama/llama-4-maverick meta-llama/llama-4-scout meta-llama/llama-3.3-70b-instruct
    qwen/qwen3-235b-a22b qwen/qwen3-30b-a3b deepseek/deepseek-chat-v3.1
    nvidia/llama-3.1-nemotron-ultra-253b-v1 openai/gpt-oss-120b openai/gpt-oss-20b
    google/gemma-3-27b-it mistralai/mistral-small-3.2-24b-instruct
""".split()
)
JSON = dict[str, Any]
_LOOPBACK_NAMES = frozenset(("127.0.0.1", "localhost", "[::1]"))
# What servers send: a number that no float holds is read as None.
_JSON = json.JSONDecoder(
    parse_int=lambda digits: int(digits) if len(digits) <= 300 else None,
    parse_float=lambda text: number if math.isfinite(number := float(text)) else None,
    parse_constant=lambda name: None,
)
_log = logging.getLogger("puter")
_log.addHandler(logging.NullHandler())
_forkable: WeakSet[Any] = WeakSet()  # what is reset in a forked child, whoever held its locks
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [one._after_fork() for one in list(_forkable)])
_T = TypeVar("_T")
_P = typing.ParamSpec("_P")
# C0 but newline and tab, DEL, and C1: what a terminal obeys instead of showing it.
_CONTROL_MARKS = {n: chr(0x2400 + n) for n in range(32) if chr(n) not in "\n\t"}
_CONTROL_MARKS |= {127: "␡"} | {n: f"\\x{n:02x}" for n in range(128, 160)}


def escape_controls(text: str) -> str:
    """The text with control characters as visible marks, fit for a terminal."""
    return text.translate(_CONTROL_MARKS)


class _StderrHandler(logging.Handler):
    """Writes to what is stderr at the time, as ``[puter-auth] 15:30:45 …``."""

    is_line_open = False  # whether a reply is being printed and has not ended its line

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None:
            start = "\n" if self.is_line_open else ""
            _StderrHandler.is_line_open = False
            print(start + escape_controls(self.format(record)), file=sys.stderr, flush=True)


def _show_log(level: int) -> None:
    _log.setLevel(level)
    if not any(isinstance(handler, _StderrHandler) for handler in _log.handlers):
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("[puter-auth] %(asctime)s %(message)s", "%H:%M:%S"))
        _log.addHandler(handler)


def __dir__() -> list[str]:
    """What tab completion shows of the module."""
    return sorted([*__all__, "__version__"])


def _json_or_none(text: str) -> Any:
    try:
        return _JSON.decode(text)
    except (ValueError, RecursionError):
        return None


def _finite(text: str) -> float:
    """A number of a JSON text; ValueError for NaN, and for infinity, as which 1e400 is read."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


_STRICT: JSON = {"parse_float": _finite, "parse_constant": _finite}


def _unique(pairs: list[tuple[str, Any]]) -> JSON:
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"duplicate key {key!r}")
    return dict(pairs)


def read_json(text: str | bytes, **hooks: Any) -> Any:
    """The value of a JSON text; ValueError for any other, whatever Python would make of it.

    With `object_pairs_hook=_unique` also for a key that comes twice: one would be lost.
    """
    try:
        return json.loads(text, **_STRICT, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number that can be counted with: no boolean, no NaN, below 2**53."""
    return type(value) in (int, float) and abs(value) < 2**53


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _new_id(prefix: str, glue: str = "_") -> str:
    return f"{prefix}{glue}{os.urandom(12).hex()}"


def mend_surrogates(text: str) -> str:
    """The text with halves of surrogate pairs joined; a half that stays alone becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _describe(value: Any) -> str:
    """A value for an error text: shortened, and of which kind."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    kinds |= {list: "a list", dict: "an object", type(None): "null"}
    shown = "a huge value"
    with suppress(ValueError):  # Python does not write integers of thousands of digits
        shown = repr(value[:60] if isinstance(value, (str, bytes)) else value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return f"{shown} ({kinds.get(type(value), type(value).__name__)})"


def _near_names(name: str, names: Iterable[str], likeness: float = 0.6) -> list[str]:
    from difflib import get_close_matches

    return get_close_matches(name, list(names), 6, likeness)


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question for the hint of an unknown name, with a blank behind it; "" if none is near."""
    near = _near_names(name, names)
    return f"Did you mean {near[0]!r}? " if near else ""


def strip_puter_prefix(name: str) -> str:
    """The name as Puter takes it: without the `puter/` that other tools put in front."""
    stripped = name.strip()
    return stripped[6:] if stripped.lower().startswith("puter/") else stripped


# ======================================================================================
# 2. errors · uses: the head
# ======================================================================================
Scope = Literal["request", "model", "account", "server"]
MAX_ATTEMPTS_SHOWN = 8
# By HTTP status, what OpenAI calls an error, and Anthropic:
# https://platform.claude.com/docs/en/api/errors
_ERROR_TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    402: ("insufficient_quota", "billing_error"),
    403: ("permission_error", "permission_error"),
    404: ("invalid_request_error", "not_found_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    504: ("server_error", "timeout_error"),
    529: ("server_error", "overloaded_error"),
}


class PuterError(Exception):
    """Something went wrong; the base of every error of this module.

    Attributes: `message` (what happened), `hint` (what to do), `status` (HTTP, or None),
    `code` (Puter's word, or None), `model` and `account` (names, or None), `attempts`
    (every `Attempt` made for the call), `retry_after_s` (when the server named a time).
    `str()` of the error holds message, attempts and hint; no attribute ever holds a token.
    """

    scope: Scope = "request"
    """Whose fault it is, and so what can help: another model, account, time, or nothing."""
    retryable: bool = False
    """Whether the very same request may work a moment later."""
    default_hint: ClassVar[str] = ""
    http_status: ClassVar[int] = 500
    """What the gateway answers with."""

    status: int | None = None
    code: str | None = None
    model: str | None = None
    account: str | None = None
    attempts: Sequence[Attempt] = ()
    retry_after_s: float | None = None
    may_be_billed: bool = False
    """Whether the server may have worked for the request that failed."""
    is_final: bool = False
    """Whether the server says that nobody should ask again (`x-should-retry: false`)."""
    is_momentary: bool = False
    """Whether it passes as soon as another request of the account ends."""
    near: Sequence[str] = ()
    raw: str = ""
    reply: Reply | None = None
    statuses: Sequence[Cooldown] = ()
    param: str | None = None

    def __init_subclass__(cls, **facts: Any) -> None:
        for name in ("scope", "retryable", "http_status"):
            if name in facts:
                setattr(cls, name, facts.pop(name))
        super().__init_subclass__(**facts)

    def __init__(self, message: str, *, hint: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint
        for name in ("model", "account", "attempts"):  # a reply says whose fault it was
            if name not in details and hasattr(details.get("reply"), name):
                details[name] = getattr(details["reply"], name)
        for name, value in details.items():
            if not hasattr(type(self), name):
                raise TypeError(f"{type(self).__name__} has no detail {name!r}")
            setattr(self, name, tuple(value) if isinstance(value, list) else value)

    @property
    def openai_type(self) -> str:
        """The kind that OpenAI's clients know it by."""
        return _ERROR_TYPES.get(self.http_status, _ERROR_TYPES[500])[0]

    def __str__(self) -> str:
        runs = [(text, len(list(run))) for text, run in groupby(a.outcome for a in self.attempts)]
        tried = [text if n == 1 else f"{text} ({n} times)" for text, n in runs[:MAX_ATTEMPTS_SHOWN]]
        if more := sum(n for _, n in runs[MAX_ATTEMPTS_SHOWN:]):
            tried.append(f"and {more} more")
        words = f"Tried {'; '.join(tried)}." if len(self.attempts) > 1 else ""
        parts = [self.message, *filter(None, [words, self.hint])]
        return " ".join(p if p[-1:] in ".!?:" else f"{p}." for p in parts)


class AuthError(PuterError, scope="account", http_status=401):
    """The account's token is missing, dead, or of the wrong kind."""

    default_hint = "Sign in with `python -m puter login`."


class CreditError(PuterError, scope="account", http_status=402):
    """The account's credit is used up; then free models are refused as well (recorded).

    Its `scope` is "model" where something is left, but less than the answer could cost.
    """

    default_hint = "Add another account with `python -m puter login`, or credit on puter.com."


class AccessError(PuterError, scope="account", http_status=403):
    """The account may not do this: it is suspended, not verified, or forbidden to."""

    default_hint = "See the account on puter.com, or use another: `python -m puter switch NAME`."


class ModelAccessError(AccessError, scope="model"):
    """This account may not use this model: it is for subscribers, or the free use is spent."""

    default_hint = "Use another model (`python -m puter models --free`) or another account."


class SubscriptionError(AccessError, scope="request", http_status=402):
    """The endpoint needs a paid plan; waiting changes nothing."""

    default_hint = 'Set "api_style" to "drivers" (the default): it works for every account.'


class RateLimitError(PuterError, scope="account", retryable=True, http_status=429):
    """The account sent too many requests; another model does not help."""

    default_hint = "Wait some seconds, or add another account with `python -m puter login`."


class BusyError(RateLimitError, scope="request", retryable=False):
    """This client itself has too much running: no fault of the account, so no other is tried."""

    default_hint = "Read streams to their end or close them; `max_concurrent` sets how many."


class ModelRateLimitError(PuterError, scope="model", http_status=429):
    """The model's provider is rate-limiting requests."""

    default_hint = "Use another model for a while."


class ModelUnavailableError(PuterError, scope="model", retryable=True, http_status=503):
    """The model's provider is down, or failed."""

    default_hint = "Try again later, or use another model (`python -m puter models`)."


class ProviderAuthError(ModelUnavailableError, retryable=False, http_status=502):
    """Puter's own key at the provider was refused; your login is fine."""

    default_hint = "This is between Puter and the provider: use another model."


class ModelNotFoundError(PuterError, http_status=404):
    """No model has this name; `near` lists names that are close."""

    default_hint = "List the names with `python -m puter models`."


class BadRequestError(PuterError, http_status=400):
    """The request itself is wrong: nobody will accept it as it is.

    `param` is the field of an OpenAI request that is at fault, if it is one.
    """

    default_hint = "Change the request as the message says; sending it again will not help."


class ContextLengthError(BadRequestError):
    """The prompt is too long for the model; for one that costs money, Puter's own limit counts.

    That limit is the model's `max_tokens`, not its context (recorded): then `tokens` is the
    estimate of the prompt, and `limit` what it must stay below.
    """

    tokens: int | None = None
    limit: int | None = None
    default_hint = "Shorten the prompt, or use a model that takes more."


class ServerError(PuterError, scope="server", retryable=True, http_status=502):
    """Puter's server failed, or something that is not a Puter server answered."""

    default_hint = "Try again later; if it stays, check `api_base_url` in puter.json."


class RequestTimeoutError(PuterError, scope="server", retryable=True, http_status=504):
    """No answer in time."""

    default_hint = "Raise `api_timeout_ms` in puter.json, or pass `timeout_ms=`."


class NetworkError(PuterError, scope="server", retryable=True, http_status=502):
    """The server cannot be reached: refused, unknown host, TLS, or a broken connection."""

    default_hint = "Check the network, the proxy settings and `api_base_url`."


class ReplyError(PuterError, http_status=502):
    """The model's answer cannot be read.

    `raw` holds the text in question as it came, `reply` what could be read (or None).
    """

    default_hint = "Ask again, or use another model."


class StreamError(PuterError, scope="model", retryable=True, http_status=502):
    """A stream broke before its end; `reply` holds what had come (a `Reply`, or None)."""

    default_hint = "Send the request again to get the complete answer."


class BudgetError(PuterError, http_status=402):
    """The budget (`budget_usd`) is spent: nothing that costs money is asked any more."""

    default_hint = (
        "Stop here and tell the user: raise `budget_usd` (--budget), or use a free model."
    )


class ConfigError(PuterError):
    """A setting is wrong; the message names where it stands and what is allowed."""


class StoreError(PuterError):
    """The accounts file cannot be read or written; it is left unchanged."""

    default_hint = "Fix the file, or move it away and sign in again."


class AllAccountsOnCooldownError(PuterError, scope="account", retryable=True, http_status=429):
    """Every account is on cooldown; `retry_after_s` says for how long, `statuses` why each."""

    default_hint = (
        "Wait, add another account with `python -m puter login`, or end the cooldowns with "
        "`python -m puter status --clear-cooldowns`."
    )


# A token with one of these cannot be used until the next sign-in (recorded).
DEAD_TOKEN_CODES = """token_missing reauth_required token_auth_failed
    app_or_api_token_required""".split()
# Puter's error codes and what they mean (recorded, or read in the server's code). What is
# not among them may be a proxy's word: it cools no account.
_KIND_BY_CODE: dict[str, type[PuterError]] = {
    **dict.fromkeys(DEAD_TOKEN_CODES, AuthError),
    "invalid_api_key": AuthError,
    "insufficient_funds": CreditError,
    "subscription_required": SubscriptionError,
    **dict.fromkeys(("permission_denied", "usage-limited-chat"), ModelAccessError),
    **dict.fromkeys(("forbidden", "account_is_not_verified", "account_suspended"), AccessError),
    "too_many_requests": RateLimitError,
    "upstream_rate_limited": ModelRateLimitError,
    **dict.fromkeys(("upstream_provider_unavailable", "upstream_failed"), ModelUnavailableError),
    "upstream_auth_failed": ProviderAuthError,
    "model_not_found": ModelNotFoundError,
    **dict.fromkeys(("bad_request", "not_found", "upstream_bad_request"), BadRequestError),
    "internal_error": ServerError,
}
_KIND_BY_STATUS: dict[int, type[PuterError]] = {
    kind.http_status: kind for kind in (AuthError, CreditError, AccessError, RateLimitError)
}
_KIND_BY_STATUS[408] = RequestTimeoutError
_BILLED_STATUSES = (504, 520, 522, 524)  # from proxies that gave up; the server may still work
_HINT_BY_CODE = {
    "app_or_api_token_required": "This is an account session token: sign in with "
    "`python -m puter login`, which gets a token of the right kind.",
    "not_found": "The server does not know this call: check `api_base_url`.",
    "account_is_not_verified": "Verify the account's e-mail address on puter.com.",
    "prompt_blocked": "Change the prompt.",
    "moderation_blocked": "The provider's moderation blocked the request: word it differently.",
}
# What a provider's own status would have been called, had it come before a stream (recorded).
_UPSTREAM_CODES = {
    **dict.fromkeys((400, 404, 413, 422), "upstream_bad_request"),
    **dict.fromkeys((401, 402, 403), "upstream_auth_failed"),
    429: "upstream_rate_limited",
}
_TOO_LONG = (
    "(?i)prompt is too long|context.{0,9}(length|window)|too many (input )?tokens|maximum context"
)


def error_from(status: int, body: Any, **details: Any) -> PuterError:
    """The error that an HTTP status and a body (decoded JSON, or text) stand for.

    The code decides first, then the status, then texts of older servers. Understands Puter's
    errors, older servers' `success: false` in a 200, and OpenAI's error objects.
    """
    message, code, own_status, provider_words = _error_fields(body)
    status = own_status or status
    # a failure under a good status, without a code, is a fault of the server
    other = BadRequestError if 400 <= status < 500 else ServerError
    kind = _KIND_BY_CODE.get(code or "") or _KIND_BY_STATUS.get(status, other)
    if "usage-limited-chat" in message:
        kind = ModelAccessError
    elif code in (None, "bad_request") and message.startswith("Model not found"):
        kind = ModelNotFoundError
    if kind is BadRequestError and re.search(_TOO_LONG, message):
        kind, code = ContextLengthError, "context_length_exceeded"
    text = message or f"The server answered {status} without saying why"
    if provider_words not in text:
        text = f"{text} (the provider said: {provider_words})"
    details |= {"status": status, "code": code, "may_be_billed": status in _BILLED_STATUSES}
    details["is_momentary"] = kind is RateLimitError and "concurrent" in text
    return kind(text, hint=_HINT_BY_CODE.get(code or ""), **details)


def _error_fields(body: Any) -> tuple[str, str | None, int | None, str]:
    """(message, code, status, the provider's own words) of any shape of error body."""
    if not isinstance(body, Mapping):
        import html

        page = re.sub(r"(?is)<(style|script)\b.*?</\1>|<[^>]*>", " ", str(body or "")[:10_000])
        return " ".join(html.unescape(page).split())[:300], None, None, ""
    nested, attempts = body.get("error"), body.get("attempts")
    error = nested if isinstance(nested, Mapping) else body
    message = error.get("message") or (nested if isinstance(nested, str) else "")
    last = attempts[-1] if isinstance(attempts, list) and attempts else None
    words = provider_error(last.get("error"))[1] if isinstance(last, Mapping) else ""
    code = error["code"] if isinstance(error.get("code"), str) else None
    # more telling than that the provider refused it (recorded)
    code = "moderation_blocked" if error.get("upstreamCode") == "moderation_blocked" else code
    status = error["status"] if isinstance(error.get("status"), int) else None
    return provider_error(message)[1][:2_000], code, status, words[:500]


def provider_error(text: Any) -> tuple[int | None, str]:
    """(status, message) of a provider's failure such as ``429 {"error": {"message": …}}``.

    So they arrive in a stream's error line, and in the message of a whole reply (recorded).
    """
    text = str(text or "")
    found = re.match(r"([0-9]{3}) ", text)
    status = int(found[1]) if found else None
    body = _json_or_none(text[4:] if found else text)
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        by_type = {name: status for status, (_, name) in _ERROR_TYPES.items()}
        return status or by_type.get(str(error.get("type"))), error["message"] or text
    return status, text


def upstream_error(text: str, model: str) -> PuterError | None:
    """The error that a stream's first line stands for (recorded); None if it does not say which."""
    status, message = provider_error(text)
    if status is None or status < 400:
        return None
    code = _UPSTREAM_CODES.get(status, "upstream_provider_unavailable")
    return error_from(status, {"message": message, "code": code}, model=model)


# ======================================================================================
# 3. values · uses: errors
# ======================================================================================


def _code_of(error: PuterError) -> str:
    return error.code or type(error).__name__


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and price of one reply, whatever the provider calls them; None means "not reported".

    Puter leaves tokens that were read from the provider's cache (`cached_tokens`), or written
    to it (`written_tokens`), out of `input_tokens`; `total_tokens` is the sum of all. An
    OpenAI-compatible server counts cached ones among the input. `cost_usd` is in US dollars.
    An empty usage is false.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    total_tokens: int | None = None
    cost_usd: float | None = None
    written_tokens: int | None = None

    def __bool__(self) -> bool:
        return any(v is not None for v in (self.input_tokens, self.output_tokens, self.cost_usd))

    def __add__(self, other: Usage) -> Usage:
        """The sum; what neither reported stays None."""
        pairs = zip(astuple(self), astuple(other))
        return Usage(*(b if a is None else a if b is None else a + b for a, b in pairs))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call that the model requests: `arguments` is a dict.

    `extra_content` is a provider's note (Gemini's thought signature) that must go back with
    the call in the history. `invalid` is the text of arguments that are not a JSON object.
    """

    id: str
    name: str
    arguments: JSON
    extra_content: JSON | None = None
    invalid: str = ""


class _Medium:
    """What a model made: `data` as `mime` says, or nothing but a `url` to load it from."""

    __slots__ = ()
    data: bytes
    mime: str
    url: str

    def as_url(self) -> str:
        """A URL of it: its own, or a data URL."""
        return self.url or f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write it to a file; raises OSError, and `BadRequestError` for one that exists, or a URL."""
        if not self.data:
            raise BadRequestError("There is only a URL", hint=f"Load it from {self.url}.")
        try:
            with open(path, "wb" if overwrite else "xb") as file:
                file.write(self.data)
        except FileExistsError as error:
            hint = "Choose another name, or pass overwrite=True."
            raise BadRequestError(f"{path} exists already", hint=hint) from error


@dataclass(frozen=True, slots=True)
class Picture(_Medium):
    """A picture that a model drew: `data` as `mime` says, or nothing but a `url` to load it from."""

    data: bytes = field(default=b"", repr=False)
    mime: str = "image/png"
    url: str = ""

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {self.mime: self.data} if self.data else {"text/markdown": f"![]({self.url})"}


@dataclass(frozen=True, slots=True)
class Audio(_Medium):
    """A sound that a model made: `data` as `mime` says, or nothing but a `url` to load it from."""

    data: bytes = field(default=b"", repr=False)
    mime: str = "audio/mpeg"
    url: str = ""

    def _repr_html_(self) -> str:
        import html

        return f'<audio controls src="{html.escape(self.as_url())}"></audio>'


@dataclass(frozen=True, slots=True)
class Transcript:
    """What a recording says; `raw` holds what else the model told of it."""

    text: str
    raw: JSON = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return self.text

    @property
    def segments(self) -> list[JSON]:
        """The pieces with their times, where the model gives them."""
        return self.raw.get("segments") or []


@dataclass(slots=True)
class Chunk:
    """A piece of a streamed reply; `str()` of any but a text chunk is empty.

    `type` is "text", "reasoning" (both carry `text`), "tool_call", "image" or "usage".
    """

    type: Literal["text", "reasoning", "tool_call", "image", "usage"]
    text: str = ""
    tool_call: ToolCall | None = None
    usage: Usage | None = None
    image: Picture | None = None

    def __str__(self) -> str:
        return self.text if self.type == "text" else ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request made for a call: `error` is None for the one that answered."""

    model: str
    account: str
    error: PuterError | None
    seconds: float

    @property
    def outcome(self) -> str:
        """Who was asked and what came of it, in a few words."""
        result = "answered" if self.error is None else _code_of(self.error)
        return f"{self.model} on {self.account}: {result}"


@dataclass(frozen=True, slots=True, repr=False)
class Reply:
    """A whole answer; `str()` is its text.

    `model` and `account` are the ones that answered, `attempts` everything that was tried.
    `finish_reason` is "stop", "tool_calls", "length", "content_filter" or the provider's own
    word. `images` are pictures that the model drew. `raw` is what the server said (for a
    stream: its extra lines). `extra` holds what must go back with the history: a content with
    `thinking` that Claude signed, `reasoning_details` of OpenRouter. `value` is what `returns`
    asked for; `text` is its JSON then.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"
    usage: Usage = Usage()
    model: str = ""
    account: str = ""
    attempts: tuple[Attempt, ...] = ()
    raw: JSON = field(default_factory=dict)
    images: tuple[Picture, ...] = ()
    extra: JSON = field(default_factory=dict)
    value: Any = None

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        calls = "".join(f"\n-> {c.name}({c.arguments})" for c in self.tool_calls)
        return f"<{self.model}, {self.finish_reason}>\n{self.text}{calls}"

    def _repr_markdown_(self) -> str:
        return self.text or f"```\n{self!r}\n```"


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the catalogue; prices in US dollars per million tokens, None if not reported.

    `inputs` are kinds such as "text", "image", "pdf"; `tools` is None when the catalogue does
    not say (then it may well work). `released` is a date such as "2025-11-01", or None.
    `usd_per_image` is the price of a picture where it is one for all of them.
    """

    id: str
    name: str = ""
    provider: str = ""
    aliases: tuple[str, ...] = ()
    context: int | None = None
    max_tokens: int | None = None
    inputs: tuple[str, ...] | None = None
    tools: bool | None = None
    free: bool = False
    input_usd_per_million: float | None = None
    output_usd_per_million: float | None = None
    released: str | None = None
    usd_per_image: float | None = None

    @property
    def window(self) -> int | None:
        """The longest prompt, in tokens: Puter lets no paid one reach `max_tokens` (recorded)."""
        limits = (self.context, self.max_tokens if self.output_usd_per_million else None)
        return min(filter(None, limits), default=None)

    def names(self) -> tuple[str, ...]:
        """Every name the server knows this model by, its id first."""
        return (self.id, *self.aliases)


@dataclass(frozen=True, slots=True)
class Account:
    """A stored account; times are milliseconds since 1970, None if never or not known."""

    username: str
    token: str = field(repr=False)
    added_at_ms: int | None = None
    last_used_ms: int | None = None
    is_temporary: bool = False


@dataclass(frozen=True, slots=True)
class Cooldown:
    """A cooldown of a whole account (`model` is ""), or of one model on it.

    `since_s` and `until_s` are seconds since 1970; `reason` is the error's code, "login" for a
    token that is dead until the next sign-in; `strikes` counts the incidents in a row.
    """

    account: str
    model: str
    until_s: float
    strikes: int
    reason: str
    since_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Credit:
    """What an account may still spend this month, in `unit` ("usd" or "credits").

    `by_api` maps what was used to (cost in the unit, units, calls).
    """

    unit: Literal["usd", "credits"]
    allowance: float
    remaining: float
    used: float
    by_api: dict[str, tuple[float, float, int]] = field(default_factory=dict)
    raw: JSON = field(default_factory=dict, repr=False)


def money(amount: float, unit: str) -> str:
    """An amount as people write it."""
    return f"${amount:,.4f}" if unit == "usd" else f"{amount:,.0f} credits"


@dataclass(frozen=True, slots=True)
class ModelStats:
    """How a model has done here: counts of all calls, times of the latest ones.

    Times are in seconds: `p50_s` and `p95_s` of whole replies, `first_s` the median to the
    first token, `times` the latest, the oldest first. `failures` counts by the error's code.
    None is "not known".
    """

    model: str
    requests: int
    successes: int
    failures: dict[str, int]
    p50_s: float | None = None
    p95_s: float | None = None
    first_s: float | None = None
    tokens_per_s: float | None = None
    cost_usd: float = 0.0
    times: tuple[float, ...] = ()


# ======================================================================================
# 4. config · uses: errors, values
# ======================================================================================
CONFIG_NAME = "puter.json"
ACCOUNTS_NAME = "puter-accounts.json"
STATE_NAME = "state.sqlite3"
# Variables of the same prefix that are not settings.
TOKEN_VARIABLE = "PUTER_AUTH_TOKEN"
_OTHER_VARIABLES = (TOKEN_VARIABLE, "PUTER_CONFIG_DIR", "PUTER_SERVER_API_KEY")
_MISNAMED_VARIABLES = {
    "PUTER_TOKEN": "PUTER_AUTH_TOKEN",
    "PUTER_ACCOUNT": "PUTER_AUTH_TOKEN (or `python -m puter switch NAME`)",
    "PUTER_MODEL": "PUTER_DEFAULT_MODEL",
    **dict.fromkeys(("PUTER_API_URL", "PUTER_URL", "PUTER_BASE_URL"), "PUTER_API_BASE_URL"),
    "PUTER_API_KEY": "PUTER_SERVER_API_KEY, PUTER_OPENAI_API_KEY or PUTER_AUTH_TOKEN",
    "PUTER_FALLBACK": "PUTER_FALLBACK_ENABLED or PUTER_FALLBACK_MODELS",
    "PUTER_NO_FALLBACK": "PUTER_FALLBACK_ENABLED",
    "PUTER_TIMEOUT": "PUTER_API_TIMEOUT_MS",
    "PUTER_CACHE": "PUTER_CACHE_ENABLED",
    "PUTER_CACHE_DIR": "PUTER_CACHE_DIRECTORY",
    "PUTER_CONCURRENCY": "PUTER_MAX_CONCURRENT",
    "PUTER_ROTATION": "PUTER_ACCOUNT_ROTATION_ENABLED",
    "PUTER_QUIET": "PUTER_QUIET_MODE",
    "PUTER_LOG": "PUTER_DEBUG",
    "PUTER_HOME": "PUTER_CONFIG_DIR",
}
# Settings of the plugin that mean nothing here; `config show` says so.
IGNORED_SETTINGS = ("log_enabled", "log_dir", "auto_update", "stream_buffer_size")


def config_dir(
    environ: Mapping[str, str] | None = None, os_name: str = os.name, home: str | None = None
) -> Path:
    """The folder of settings, accounts and state: `PUTER_CONFIG_DIR`, else the system's place.

    An absolute path; raises `ConfigError` when there is no home folder to begin from.
    """
    env = os.environ if environ is None else environ
    try:
        if own := env.get("PUTER_CONFIG_DIR"):
            return Path(own).expanduser().absolute()
        if shared := env.get("APPDATA" if os_name == "nt" else "XDG_CONFIG_HOME"):
            return Path(shared).absolute() / "puter"
        if home is None and os_name != "nt" and env.get("HOME") == "":
            raise RuntimeError("HOME is empty")
        user_home = Path(home) if home is not None else Path.home()
    except RuntimeError as error:
        problem = f"The home folder is not known ({error})"
        raise ConfigError(problem, hint="Set HOME, or PUTER_CONFIG_DIR.") from error
    parts = ("AppData", "Roaming") if os_name == "nt" else (".config",)
    return user_home.joinpath(*parts, "puter")


def _key(default: Any, doc: str, *allowed: Any, url: bool = False, secret: bool = False) -> Any:
    """A field of `Config`; `allowed` is the lowest and highest number, or all choices."""
    checks = {"doc": doc, "allowed": allowed, "url": url, "secret": secret}
    return field(default=default, repr=not secret, metadata=checks)


@dataclass(frozen=True, slots=True)
class Config:
    """All settings; `Config.load()` reads them from puter.json and the environment.

    Raises `ConfigError` for a value of the wrong type or out of range.
    """

    quiet_mode: bool = _key(False, "no status lines on stderr")
    debug: bool = _key(False, "a log of every request on stderr")
    api_base_url: str = _key("https://api.puter.com", "where Puter's API answers", url=True)
    gui_base_url: str = _key("https://puter.com", "where Puter's pages are", url=True)
    api_timeout_ms: int = _key(120_000, "longest silence, and longest answer, in ms", 1, 86_400_000)
    auto_create_temp_user: bool = _key(True, "accept a login that ends in a temporary account")
    max_retries: int = _key(3, "how often a failed request is sent again", 0, 20)
    retry_delay_ms: int = _key(1_000, "first wait before sending again, in ms; doubles", 0, 600_000)
    cache_ttl_ms: int = _key(300_000, "life of the model list and cached replies, in ms", 0, 10**12)
    cache_enabled: bool = _key(False, "cache whole replies and answer the same request again")
    cache_max_entries: int = _key(500, "cached replies at most", 1, 1_000_000)
    cache_directory: str | None = _key(None, "folder of the cached replies (null: with the state)")
    metrics_enabled: bool = _key(True, "record every call for `stats`")
    metrics_max_samples: int = _key(1_000, "calls of a model behind its percentiles", 1, 1_000_000)
    metrics_file: str | None = _key(None, "file of the statistics (null: with the state)")
    fallback_enabled: bool = _key(True, "try free models when the asked one fails")
    fallback_models: tuple[str, ...] = _key(DEFAULT_FALLBACK_MODELS, "fallback models, in order")
    fallback_cooldown_ms: int = _key(60_000, "cooldown of a model on an account, in ms", 0, 10**10)
    account_rotation_enabled: bool = _key(True, "go to the next account when one is limited")
    account_rotation_strategy: str = _key(
        "round-robin", "which account is next", "round-robin", "least-recently-used"
    )
    account_rotation_cooldown_ms: int = _key(300_000, "cooldown of an account, in ms", 0, 10**10)
    default_model: str | None = _key(None, f"model when none is asked for (null: {DEFAULT_MODEL})")
    api_style: str = _key("drivers", "`openai`: an OpenAI-compatible base", "drivers", "openai")
    openai_api_key: str | None = _key(None, "key of a server that is not Puter's", secret=True)
    stream_tools: str = _key("exact", "`live` streams tools and may lose calls", "exact", "live")
    max_concurrent: int = _key(3, "requests at once on one account", 1, 1_000)
    budget_usd: float | None = _key(None, "what a client may spend, in US dollars", 0, 10**6)
    folder: Path = field(default_factory=config_dir)
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Where each setting comes from: the file, a variable, "argument" or "default"."""
    ignored: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """The plugin's settings in the file that mean nothing here."""

    def __post_init__(self) -> None:
        for name, spec in _SETTINGS.items():
            value, where = getattr(self, name), self.sources.get(name, "argument")
            value = spec.default if value is None else _checked(spec, value, where)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "folder", Path(self.folder).absolute())

    def model_name(self, asked: str | None) -> str:
        """The model to ask: the asked one, else the default; without `puter/` in front."""
        return strip_puter_prefix(asked or self.default_model or DEFAULT_MODEL)

    @classmethod
    def load(
        cls,
        folder: str | Path | None = None,
        environ: Mapping[str, str] | None = None,
        **overrides: Any,
    ) -> Config:
        """The settings in force: overrides, else environment, else puter.json, else defaults.

        `folder` is where puter.json stands (default: `config_dir()`); `environ` defaults to
        the process's. Raises `ConfigError`, which names file (or variable), key, what was
        found and what is allowed.
        """
        env = os.environ if environ is None else environ
        try:
            folder = folder or config_dir(env)
        except ConfigError:
            if not env.get(TOKEN_VARIABLE):  # a token alone needs no stored accounts
                raise
            folder = Path(os.devnull)
        path = os.path.join(folder, CONFIG_NAME)
        values: JSON = {"folder": folder}
        sources = dict.fromkeys(_SETTINGS, "default")
        ignored: list[str] = []
        found = {path: _read_config(path), "": _from_environment(env), "argument": overrides}
        for where, settings in found.items():
            for name, value in settings.items():
                if name in IGNORED_SETTINGS and where == path:
                    ignored.append(name)
                elif name not in _SETTINGS:
                    raise _unknown_key(name, where)
                else:
                    values[name] = value
                    sources[name] = where or f"PUTER_{name.upper()}"
        return cls(**values, sources=sources, ignored=tuple(ignored))


def _read_config(path: str) -> JSON:
    try:
        with open(path, encoding="utf-8-sig") as file:
            data = read_json(file.read(), object_pairs_hook=_unique)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        problem = f"{path}: cannot be read as JSON in UTF-8 ({error})"
        raise ConfigError(problem, hint="Fix the file, or move it away.") from error
    if not isinstance(data, dict):
        problem = f"{path}: holds {_describe(data)}, not an object"
        raise ConfigError(problem, hint='It should look like {"debug": true}.')
    return data


def _from_environment(env: Mapping[str, str]) -> JSON:
    """The settings of variables that are not empty; a near miss of a name is a `ConfigError`."""
    settings: JSON = {}
    ours = {f"PUTER_{name.upper()}": name for name in _SETTINGS}
    for variable, text in sorted(env.items()):
        if not variable.startswith("PUTER_") or variable in _OTHER_VARIABLES or not text:
            continue
        if name := ours.get(variable):
            settings[name] = _from_text(name, text)
            continue
        # what is less alike may be another program's
        near = _near_names(variable, [*ours, *_OTHER_VARIABLES], 0.85)
        if meant := _MISNAMED_VARIABLES.get(variable) or "".join(near[:1]):
            hint = f"Did you mean {meant}?"
            raise ConfigError(f"{variable}: there is no such setting", hint=hint)
    return settings


def _from_text(name: str, text: str) -> Any:
    kind = _SETTINGS[name].type
    if kind == "bool":
        words = {"1": True, "true": True, "yes": True, "on": True}
        words |= {"0": False, "false": False, "no": False, "off": False}
        return words.get(text.strip().lower(), text)
    if kind.startswith("int") and re.fullmatch(r"\s*-?\d{1,18}\s*", text):
        return int(text)
    if kind.startswith("float") and re.fullmatch(r"\s*\d{1,9}(\.\d{1,9})?\s*", text):
        return float(text)
    if kind.startswith("tuple"):
        if not text.lstrip().startswith("["):
            return [part.strip() for part in text.split(",") if part.strip()]
        with suppress(ValueError):
            return read_json(text)
    return text


def _checked(spec: Any, value: Any, where: str) -> Any:
    allowed = spec.metadata["allowed"]
    if spec.type == "bool":
        ok, words = isinstance(value, bool), "true or false"
    elif spec.type.startswith(("int", "float")):
        (low, high), is_float = allowed, spec.type.startswith("float")
        is_kind = type(value) is int or (is_float and isinstance(value, float))
        ok = is_kind and low <= value <= high
        words = f"a {'' if is_float else 'whole '}number from {low} to {high}"
    elif spec.type.startswith("tuple"):
        ok = isinstance(value, (list, tuple)) and all(map(_is_text, value))
        value, words = tuple(value) if ok else value, "a list of model names"
    elif allowed:
        ok, words = value in allowed, " or ".join(f'"{choice}"' for choice in allowed)
    elif spec.metadata["url"]:
        ok = bool(re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", str(value).rstrip("/")))
        value = value.rstrip("/") if ok else value
        words = "a URL such as https://api.puter.com, without a user name or password"
    else:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        ok = isinstance(value, str) and value.strip() != ""
        words = "a string that is not empty"
    if ok:
        return value
    default = "a built-in list" if spec.name == "fallback_models" else json.dumps(spec.default)
    is_secret = spec.metadata["secret"] or (spec.metadata["url"] and "@" in str(value))
    problem = f"{where}: {spec.name} is {'not shown here' if is_secret else _describe(value)}"
    hint = f"Correct the value, or remove it for the default ({default})."
    raise ConfigError(f"{problem}, but must be {words}", hint=hint)


def _unknown_key(name: str, where: str) -> ConfigError:
    meant = _did_you_mean(name, _SETTINGS).strip() or f"Known keys: {', '.join(_SETTINGS)}."
    return ConfigError(f"{where}: there is no setting {name!r}", hint=meant)


_SETTINGS = {f.name: f for f in fields(Config) if "doc" in f.metadata}


# ======================================================================================
# 5. store · uses: errors, values, config
# ======================================================================================
LOCK_PATIENCE_S = 30.0
_CLOCK_SLACK_S = 60.0  # ignore the clock stepping back by up to this much
STRIKES_LAPSE_S = 3_600.0  # after a cooldown that ended so long ago, strikes count anew
STATE_RETRY_S = 60.0  # a file that failed is tried again after so long
_TRIM_EVERY = 1_000  # samples recorded, since trimming reads all of them


class AccountStore:
    """The accounts in a JSON file that the opencode-puter-auth plugin can share.

    `path` is the file, or the folder that holds `puter-accounts.json`. Reading never writes.
    Every change is read-modify-write under a lock between processes; the new file (mode 0600
    from its first byte) is written beside the old one and renamed over it, so that a crash
    leaves one or the other whole. Keys that this module does not know survive. A file that
    cannot be read as this format is never overwritten: `StoreError` says what to do.
    """

    VERSION = 1

    def __init__(self, path: str | Path | None = None) -> None:
        place = Path(path) if path is not None else config_dir()
        is_file = path is not None and place.suffix == ".json"
        self.path = place if is_file else place / ACCOUNTS_NAME

    def __repr__(self) -> str:
        return f"AccountStore({str(self.path)!r})"

    def accounts(self) -> list[Account]:
        """All accounts, in the order in which they were added; raises `StoreError`."""
        return self.read()[0]

    def active(self) -> Account | None:
        """The account in use, or None when there is none; raises `StoreError`."""
        return self.read()[1]

    def read(self) -> tuple[list[Account], Account | None]:
        """(all accounts, the active one) of one moment; raises `StoreError`."""
        data = self._read()
        accounts = list(map(_account_from, data["accounts"]))
        return accounts, accounts[data["activeIndex"]] if accounts else None

    def stamp(self) -> tuple[int, int, int] | None:
        """Changes whenever the file does; None when there is no file."""
        return _stamp_of(self.path)

    def add(self, account: Account, *, activate: bool = True) -> bool:
        """Store an account; True if it is new, False if only its token was replaced."""
        with self._change() as data:
            records, name = data["accounts"], account.username
            is_new = all(record["username"] != name for record in records)
            if is_new:
                added_ms = account.added_at_ms or int(time.time() * 1000)
                records.append({"username": name, "addedAt": added_ms})
            index = self._require(data, name)
            records[index] |= {"authToken": account.token, "isTemporary": account.is_temporary}
            if account.last_used_ms is not None:
                records[index]["lastUsed"] = account.last_used_ms
            if activate or len(records) == 1:
                data["activeIndex"] = index
        return is_new

    def remove(self, username: str) -> Account:
        """Forget one account and return it; raises `StoreError` if there is no such account."""
        with self._change() as data:
            index = self._require(data, username)
            record = data["accounts"].pop(index)
            if index < data["activeIndex"] or data["activeIndex"] == len(data["accounts"]):
                data["activeIndex"] = max(0, data["activeIndex"] - 1)
        return _account_from(record)

    def clear(self) -> list[Account]:
        """Forget all accounts and return them."""
        with self._change() as data:
            removed = list(map(_account_from, data["accounts"]))
            data["accounts"], data["activeIndex"] = [], 0
        return removed

    def switch(self, username: str) -> Account:
        """Make an account the active one; raises `StoreError` if there is no such account."""
        with self._change() as data:
            data["activeIndex"] = self._require(data, username)
            return _account_from(data["accounts"][data["activeIndex"]])

    def _require(self, data: JSON, username: str) -> int:
        names = [record["username"] for record in data["accounts"]]
        if username not in names:
            known = ", ".join(names) or "none; sign in with `python -m puter login`"
            hint = f"{_did_you_mean(username, names)}Accounts: {known}."
            raise StoreError(f"{self.path}: no account is called {username!r}", hint=hint)
        return names.index(username)

    def _read(self) -> JSON:
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return {"version": self.VERSION, "accounts": [], "activeIndex": 0}
        except OSError as error:
            raise self._failed(error) from error
        return parse_accounts(raw, str(self.path))

    @contextmanager
    def _change(self) -> Iterator[JSON]:
        try:
            with _locked(self.path) as target:
                data = self._read()
                before = json.dumps(data)
                yield data
                if json.dumps(data) != before:
                    raw = f"{json.dumps(data, indent=2)}\n".encode()
                    parse_accounts(raw, str(self.path))  # what could not be read is not written
                    _write_private(target, raw)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> StoreError:
        hint = "Make the file and its folder writable, free some space, or set PUTER_CONFIG_DIR."
        if error.errno == errno.ENOLCK:
            hint = "Its file system has no locks: set PUTER_CONFIG_DIR to a folder on a local disk."
        problem = f"{self.path}: could not be read or written ({error.strerror or error})"
        return StoreError(f"{problem}; the file is unchanged", hint=hint)


def parse_accounts(raw: bytes, where: str) -> JSON:
    """The contents of an accounts file, checked; raises `StoreError` that names `where`."""

    def check(ok: bool, problem: str, hint: str | None = None) -> None:
        if not ok:
            raise StoreError(f"{where}: {problem}; the file is unchanged", hint=hint)

    try:
        data = read_json(raw.decode("utf-8-sig"), object_pairs_hook=_unique)
    except ValueError as error:
        # The error's text is not shown: it may quote the token.
        place = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise StoreError(f"{where}: is not valid JSON{place}; the file is unchanged") from None
    check(isinstance(data, dict), "is not a JSON object")
    version, records = data.get("version"), data.get("accounts")
    is_newer = isinstance(version, int) and version > AccountStore.VERSION
    check(not is_newer, f"has version {version}, newer than this module", "Update puter.py.")
    check(version == AccountStore.VERSION and version is not True, 'has no "version": 1')
    check(isinstance(records, list), '"accounts" is not a list')
    for number, record in enumerate(records):
        place = f"accounts[{number}]"
        check(isinstance(record, dict), f"{place} is not an object")
        for key in ("username", "authToken"):
            is_text = isinstance(record.get(key), str) and record[key].strip() != ""
            check(is_text, f"{place}.{key} is not a string, or empty")
        for key in ("addedAt", "lastUsed"):
            check(_is_number(record.get(key) or 0), f"{place}.{key} is not a time in ms")
    active = data.setdefault("activeIndex", 0)
    check(type(active) is int, '"activeIndex" is not a whole number')
    is_there = not records or 0 <= active < len(records)
    check(is_there, f'"activeIndex" is {active}, but there are {len(records)} accounts')
    return dict(data)


def _account_from(record: JSON) -> Account:
    added_ms, used_ms = (int(record.get(key) or 0) or None for key in ("addedAt", "lastUsed"))
    is_temporary = record.get("isTemporary") is True
    return Account(record["username"], record["authToken"], added_ms, used_ms, is_temporary)


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    with suppress(OSError):
        status = os.stat(path)
        return (status.st_mtime_ns, status.st_size, status.st_ino)
    return None


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """The real place of a file (a symlinked one stays a symlink), locked for other processes."""
    target = Path(os.path.realpath(path))  # `resolve` raises no OSError for links in a circle
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(f"{target}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    until = time.monotonic() + LOCK_PATIENCE_S
    try:
        while not _try_lock(lock):
            if time.monotonic() > until:
                problem = f"{target}: another process has held the lock for {LOCK_PATIENCE_S:g} s"
                hint = f"End the program that has {target}.lock open, then try again."
                raise StoreError(f"{problem}; the file is unchanged", hint=hint)
            time.sleep(0.01)
        yield target
    finally:
        if os.name != "nt":
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_UN)  # a forked child may still have the file open
        os.close(lock)


def _try_lock(handle: int) -> bool:
    with suppress(BlockingIOError, PermissionError):
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _write_private(target: Path, data: bytes) -> None:
    """Replace a file whole, or not at all; mode 0600 from the first byte. Caller holds a lock."""
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)  # left by a crash; under the lock nobody else writes it
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@lru_cache
def token_fingerprint(token: str) -> str:
    """What tells a token from another, and does not give it away."""
    import hashlib

    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()[:16]


def cooldown_s(strikes: int, base_s: float) -> float:
    """How long the cooldown of an account is after so many incidents: 1, 2, 3, 4 times the base."""
    return base_s * min(max(strikes, 1), 4)


def _or_in_memory(method: Callable[..., _T]) -> Callable[..., _T]:
    """A method of `State` under its lock; when the file fails, it runs again in memory."""

    @wraps(method)
    def run(self: State, *args: Any, **kwargs: Any) -> _T:
        import sqlite3

        with self._lock:
            try:
                return method(self, *args, **kwargs)
            except (sqlite3.Error, OSError) as error:
                if self._db is None or self._source() == self._opened:  # else deleted meanwhile
                    self._use_memory(error)
            return run(self, *args, **kwargs)

    return run


class State:
    """What processes share: cooldowns, last uses, the model list, metrics, cached replies.

    An SQLite file that may be deleted at any time. When it is damaged or cannot be written,
    a warning says so once and the state stays in memory. Safe between threads, and opened
    anew after a fork. Cooldowns belong to a `server` (its URL).
    """

    _TABLES = """
        CREATE TABLE IF NOT EXISTS cooldowns (
            server TEXT, account TEXT, model TEXT, until_s REAL, strikes INTEGER, reason TEXT,
            since_s REAL, token_mark TEXT, PRIMARY KEY (server, account, model));
        CREATE TABLE IF NOT EXISTS last_used (account TEXT PRIMARY KEY, at_ms INTEGER);
        CREATE TABLE IF NOT EXISTS catalogues (base_url TEXT PRIMARY KEY, body TEXT, at_s REAL);
        CREATE TABLE IF NOT EXISTS totals (
            model TEXT, outcome TEXT, count INTEGER, cost_usd REAL,
            PRIMARY KEY (model, outcome));
        CREATE TABLE IF NOT EXISTS samples (
            id INTEGER PRIMARY KEY, model TEXT, seconds REAL, first_s REAL, tokens INTEGER);
        CREATE INDEX IF NOT EXISTS samples_by_model ON samples (model, id);
        CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, at_s REAL, body TEXT);
        CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, count INTEGER);
    """

    def __init__(self, path: str | Path | None = None, server: str = "") -> None:
        self.path = str(path) if path is not None else str(config_dir() / STATE_NAME)
        self.server = server
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._opened = self.path, -1
        self._inherited: list[Any] = []
        self._retry_at = 0.0  # when the file is tried again after it failed
        self._uses: dict[str, float] = {}  # when each account's use was noted last
        self._limited: set[str] = set()  # who had a cooldown, over or not, when they were read last
        _forkable.add(self)

    def __del__(self) -> None:
        if db := getattr(self, "_db", None):  # Python 3.13 warns of one that nobody closed
            db.close()

    @_or_in_memory
    def add_cooldown(
        self, account: str, model: str, base_s: float, reason: str, now: float, token: str = ""
    ) -> Cooldown:
        """Put a model on an account on cooldown for `base_s`, or the whole account (model "").

        An account gets more at its further strikes, by `cooldown_s`. One incident is one strike: a
        cooldown that still runs stays as it is, but for "login", which is of the `token`.
        """
        account, model, reason = map(mend_surrogates, (account, model, reason))
        self._limited.add(account)
        sql = "SELECT * FROM cooldowns WHERE server=? AND account=? AND model=? AND reason<>'login'"
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            strikes = 1
            if row := db.execute(sql, (self.server, account, model)).fetchone():
                last = Cooldown(*row[1:7])
                runs = last.since_s - _CLOCK_SLACK_S < now < last.until_s
                if runs and reason != "login":
                    return last
                strikes += last.strikes if now - last.until_s <= STRIKES_LAPSE_S else 0
            until_s = now + (base_s if model else cooldown_s(strikes, base_s))
            cooldown = Cooldown(account, model, until_s, strikes, reason, now)
            values = (self.server, *asdict(cooldown).values(), token_fingerprint(token))
            db.execute("INSERT OR REPLACE INTO cooldowns VALUES (?,?,?,?,?,?,?,?)", values)
        return cooldown

    @_or_in_memory
    def record_success(
        self, account: str, models: Iterable[str], started_s: float, now: float
    ) -> None:
        """A call that began at `started_s` was answered by a model of these names.

        Ends the cooldowns that began before, forgets their strikes, and notes the use.
        """
        account = mend_surrogates(account)
        is_noted = 0 <= now - self._uses.get(account, -1.0) < 1.0
        if is_noted and account not in self._limited:
            return  # one write a second is enough to know who was used last
        self._uses[account] = now
        rows = [(self.server, account, mend_surrogates(name), started_s) for name in {"", *models}]
        delete = "DELETE FROM cooldowns WHERE server=? AND account=? AND model=? AND since_s<=?"
        with self._open() as db:
            db.executemany(delete, rows)
            db.execute("INSERT OR REPLACE INTO last_used VALUES (?,?)", (account, int(now * 1000)))

    def cooldowns(self, now: float, accounts: Iterable[Account] = ()) -> list[Cooldown]:
        """Who is on cooldown now; a dead token stays so until its account has another one.

        If the clock was set back, the other cooldowns do not count.
        """
        tokens = {account.username: account.token for account in accounts}
        sql = "SELECT * FROM cooldowns WHERE server=? ORDER BY account, model"
        rows, cooldowns = self._rows(sql, self.server), []
        self._limited = {account for _, account, *_ in rows}
        for _, *row, mark in rows:
            one = Cooldown(*row)
            token = tokens.get(one.account)
            is_dead = one.reason == "login" and (token is None or token_fingerprint(token) == mark)
            runs = one.since_s - _CLOCK_SLACK_S < now < one.until_s
            if is_dead or (one.reason != "login" and runs):
                cooldowns.append(one)
        return cooldowns

    def clear_cooldowns(self, account: str | None = None) -> int:
        """End the cooldowns of one account or of all, and forget strikes; how many there were."""
        sql = "DELETE FROM cooldowns WHERE server=? AND ? IN (account, '')"
        return self._write(sql, self.server, account or "")

    def last_used_ms(self) -> dict[str, int]:
        """When each account last answered, in ms since 1970."""
        return dict(self._rows("SELECT account, at_ms FROM last_used"))

    def put_catalogue(self, base_url: str, body: str, now: float) -> None:
        """Store the model list of a server, as JSON text."""
        self._write("INSERT OR REPLACE INTO catalogues VALUES (?,?,?)", base_url, body, now)

    def catalogue(self, base_url: str) -> tuple[str, float] | None:
        """The stored model list of a server and when it was fetched (s since 1970), or None."""
        rows = self._rows("SELECT body, at_s FROM catalogues WHERE base_url=?", base_url)
        return rows[0] if rows else None

    @_or_in_memory
    def record(
        self,
        model: str,
        outcome: str,
        seconds: float,
        first_s: float | None = None,
        usage: Usage | None = None,
        limit: int = 1_000,
    ) -> None:
        """Count one request; `outcome` is "ok", "closed" or an error's code.

        Of the times of answered ones the latest `limit` of a model are stored (and a few more,
        until they are trimmed).
        """
        model, outcome, usage = mend_surrogates(model), mend_surrogates(outcome), usage or Usage()
        sql = "INSERT INTO totals VALUES (?,?,1,?) ON CONFLICT DO UPDATE SET count = count + 1, "
        sql += "cost_usd = cost_usd + excluded.cost_usd"
        with self._open() as db:
            db.execute(sql, (model, outcome, usage.cost_usd or 0.0))
            if outcome == "ok":
                row = (model, seconds, first_s, usage.output_tokens)
                added = db.execute("INSERT INTO samples VALUES (NULL,?,?,?,?)", row)
                if (added.lastrowid or 0) % _TRIM_EVERY == 0:
                    ranks = "SELECT id, row_number() OVER (PARTITION BY model ORDER BY id DESC) n"
                    extra = f"SELECT id FROM ({ranks} FROM samples) WHERE n > ?"
                    db.execute(f"DELETE FROM samples WHERE id IN ({extra})", (limit,))

    def metrics(self, names: Sequence[str], limit: int = 1_000) -> tuple[list[Any], list[Any]]:
        """What `record` counted of a model, by its names: (outcome, count, cost in USD) of each
        outcome, and (seconds, seconds to the first chunk, tokens) of calls, the latest first.
        """
        among = f"model IN ({','.join('?' * len(names))})"
        totals = "SELECT outcome, SUM(count), SUM(cost_usd) FROM totals"
        sql = f"SELECT seconds, first_s, tokens FROM samples WHERE {among} ORDER BY id DESC LIMIT ?"
        rows = self._rows(f"{totals} WHERE {among} GROUP BY outcome", *names)
        return rows, self._rows(sql, *names, limit)

    def models(self) -> list[str]:
        """The models that `record` counted."""
        return [model for (model,) in self._rows("SELECT DISTINCT model FROM totals")]

    def reset_metrics(self, models: Sequence[str] | None = None) -> None:
        """Forget what `record` counted, of some models or of all."""
        where = "" if models is None else f" WHERE model IN ({','.join('?' * len(models))})"
        for table in ("totals", "samples"):
            self._write(f"DELETE FROM {table}{where}", *(models or ()))

    def cache_put(self, key: str, body: str, now: float, limit: int) -> None:
        """Cache a reply as JSON text; the oldest go when there are more than `limit`."""
        oldest = "SELECT key FROM replies ORDER BY at_s DESC LIMIT -1 OFFSET ?"
        self._write("INSERT OR REPLACE INTO replies VALUES (?,?,?)", key, now, body)
        self._write(f"DELETE FROM replies WHERE key IN ({oldest})", limit)

    def cache_get(self, key: str, now: float, ttl_s: float) -> str | None:
        """The cached reply, if it is not too old; counts whether there was one."""
        sql = "SELECT body FROM replies WHERE key=? AND at_s BETWEEN ? AND ?"
        rows = self._rows(sql, key, now - ttl_s, now)
        count = "INSERT INTO counters VALUES (?,1) ON CONFLICT DO UPDATE SET count = count + 1"
        self._write(count, "hits" if rows else "misses")
        return rows[0][0] if rows else None

    def cache_stats(self, now: float, ttl_s: float) -> dict[str, int]:
        """Entries (and how many are still fresh), bytes, hits and misses of cached replies."""
        rows = self._rows("SELECT at_s >= ?, LENGTH(CAST(body AS BLOB)) FROM replies", now - ttl_s)
        counts = {"hits": 0, "misses": 0} | dict(self._rows("SELECT * FROM counters"))
        fresh, sizes = (sum(column) for column in zip(*rows)) if rows else (0, 0)
        return {"entries": len(rows), "fresh": fresh, "bytes": sizes, **counts}

    def cache_clear(self) -> int:
        """Forget all cached replies and their counts; how many replies there were."""
        self._write("DELETE FROM counters")
        return self._write("DELETE FROM replies")

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._db is not None:
                self._db.close()
            self._db = None

    @_or_in_memory
    def _rows(self, sql: str, *values: Any) -> list[Any]:
        return self._open().execute(sql, values).fetchall()

    @_or_in_memory
    def _write(self, sql: str, *values: Any) -> int:
        with self._open() as db:
            return db.execute(sql, values).rowcount

    def _use_memory(self, error: Exception) -> None:
        if self._source()[0] == ":memory:":
            raise error
        if not self._retry_at:
            text = f"{self.path} cannot be used ({error}): cooldowns and metrics stay in memory."
            # what another process has locked, or a disk without room, is no reason to delete it
            if re.search("malformed|not a database|disk i/o", str(error).lower()):
                text += f" Deleting it with its -wal and -shm files is safe ({self.path}*)."
            _log.warning("%s", text)
        self._retry_at = time.monotonic() + STATE_RETRY_S

    def _source(self) -> tuple[str, int]:
        """What is to be open now: the file, by its number, or memory for a time after it failed."""
        path = ":memory:" if time.monotonic() < self._retry_at else self.path
        with suppress(OSError):
            return path, os.stat(path).st_ino
        return path, -1

    def _open(self) -> sqlite3.Connection:
        """The connection to what is to be open; ``with`` it, all changes are one transaction."""
        import sqlite3

        if self._db is not None and self._source() == self._opened:
            return self._db
        self.close()
        path, _ = self._source()
        if path != ":memory:":
            os.makedirs(os.path.dirname(self.path) or ".", 0o700, exist_ok=True)
            # else the umask would decide on its mode; a file that is there must not be opened
            # beside SQLite: closing it would drop the locks of this process (POSIX)
            with suppress(FileExistsError):
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        db = sqlite3.connect(path, timeout=10, isolation_level="IMMEDIATE", check_same_thread=False)
        self._db, self._opened = db, (path, self._source()[1])
        db.execute("PRAGMA synchronous=OFF")  # disposable: it need not survive a power cut
        with suppress(sqlite3.OperationalError):  # another process makes the file, and sets it
            db.execute("PRAGMA journal_mode=WAL")
        db.executescript(self._TABLES)
        return db

    def _after_fork(self) -> None:
        """A forked child opens the file anew; SQLite forbids it even to close the parent's."""
        self._inherited.append(self._db)
        self._lock, self._db = threading.RLock(), None


# ======================================================================================
# 6. messages · uses: errors, values. Reads files, and nothing else of the outside
# ======================================================================================
Messages = list[JSON]
Prompt = str | Sequence[Mapping[str, Any]]
Image = str | bytes | os.PathLike[str]
File = str | bytes | os.PathLike[str] | tuple[str, bytes]
MAX_FILE_BYTES = 30 * 1024 * 1024
MAX_SENT_BYTES = 50 * 1024 * 1024  # a larger request is 413 (recorded)
MAX_LINE_BYTES = 32 * 1024 * 1024

# ---- history: any vendor's parts in, one canonical shape ----
# The shape is OpenAI's for chat completions. Beside it stands what other vendors need: marks of
# `cache_control` on parts, `thinking` that Claude signed among an assistant's parts, a message's
# `reasoning_details` and `images`, and results (role "tool") that hold pictures or `is_error`.
# What cannot be read, or sent, is a `BadRequestError` that names its place.

_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_KINDS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# Parts and items of a provider's own tools and thoughts, which are of no use to another model.
_SKIPPED_KINDS = """
    reasoning additional_tools web_search_call file_search_call mcp_call mcp_list_tools
    mcp_approval_request mcp_approval_response code_interpreter_call image_generation_call
    compaction compaction_trigger configuration_update program program_output item_reference
    server_tool_use web_search_tool_result web_fetch_tool_result code_execution_tool_result
    bash_code_execution_tool_result text_editor_code_execution_tool_result
    tool_search_tool_result advisor_tool_result mcp_tool_use mcp_tool_result mcp_tool_listing
    container_upload fallback tool_addition tool_removal
""".split()
# Calls and results of tools that a client runs by a provider's rules: told in words.
_WORDED_KINDS = """local_shell_call local_shell_call_output shell_call shell_call_output
    apply_patch_call apply_patch_call_output computer_call computer_call_output""".split()
_OWN_SIGNATURE = "unsigned"  # begins what this module made up, for clients that want a signature
_NO_OUTPUT = "(no output)"  # a tool's result may be empty, but Puter refuses an empty content
_NOT_ANSWERED = "(this call was not answered)"


class Needs(NamedTuple):
    """What a request asks of a model: tools, kinds of input, and room for so many tokens."""

    tools: bool = False
    inputs: frozenset[str] = frozenset()
    context: int = 0


def _require(ok: object, where: str, value: Any, hint: str) -> None:
    """Raise `BadRequestError` for a value that cannot stand in its place."""
    if not ok:
        raise _misplaced(where, f"is {_describe(value)}", hint)


def _misplaced(where: str, problem: str, hint: str | None = None) -> BadRequestError:
    """The error of something in a request; where it stands may begin with a field of that."""
    field_name = re.search(r"(^|of )([a-z_]+)(?=[.\[]|$)", where)
    param = field_name and field_name[2]
    return BadRequestError(f"{where} {problem}", hint=hint, param=param)


def messages_from(
    prompt: Prompt, system: str | None = None, extra_parts: Sequence[JSON] = ()
) -> Messages:
    """A prompt as new canonical messages; `extra_parts` (images, files) join the user's last."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray))
    hint = 'Pass a string, or a list such as [{"role": "user", "content": "Hi"}].'
    _require(is_list, "The prompt", prompt, hint)
    messages = [one for i, m in enumerate(prompt) for one in read_message(m, f"messages[{i}]")]
    if extra_parts:
        question = next((m for m in reversed(messages) if m["role"] == "user"), None)
        if question is None:
            messages.append(question := {"role": "user"})
        question["content"] = [*_parts(question.get("content")), *extra_parts]
    _require(isinstance(system, (str, type(None))), "system", system, "Give a string.")
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return messages


def read_message(message: Any, where: str) -> Messages:
    """A message in any vendor's shape as canonical ones: its results first, then the rest."""
    is_message = isinstance(message, Mapping)
    _require(is_message, where, message, 'Write {"role": "user", "content": "…"}.')
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    _require(role in _ROLES, f"{where}.role", role, f"Roles are {', '.join(_ROLES)}.")
    is_content = isinstance(content, (str, list, tuple, type(None)))
    _require(is_content, f"{where}.content", content, "Give a string, a list of parts, or null.")
    is_list = isinstance(calls, (list, tuple, type(None)))
    _require(is_list, f"{where}.tool_calls", calls, "Give a list of calls.")
    for number, call in enumerate(calls or ()):
        _check_call(call, _dig(call, "function"), f"{where}.tool_calls[{number}]")
    call_id, hint = message.get("tool_call_id"), "Say which call this is the result of."
    _require(role != "tool" or _is_text(call_id), f"{where}.tool_call_id", call_id, hint)
    read = {key: value for key, value in message.items() if value is not None}
    if "images" in read:
        images = read_parts(read["images"], f"{where}.images")
        read["images"] = [part for part in images if part["type"] == "image_url"]
    if content is None or isinstance(content, str):
        return [read]
    results, own_calls, parts = [], list(calls or ()), []
    for number, part in enumerate(content):
        place = f"{where}.content[{number}]"
        kind = _dig(part, "type")
        if kind == "tool_result":
            id_, output = part.get("tool_use_id"), part.get("content")
            _require(_is_text(id_), f"{place}.tool_use_id", id_, "Say whose result it is.")
            if not isinstance(output, str | None):
                output = read_parts(output, f"{place}.content")
            marks = {key: part[key] for key in ("is_error", "cache_control") if part.get(key)}
            results.append({"role": "tool", "tool_call_id": id_, "content": output, **marks})
        elif kind == "tool_use":
            _check_call(part, part, place)
            own_calls.append(openai_call(tool_call_from(part)))
        else:
            parts += read_part(part, place)
    if own_calls:
        read["tool_calls"] = own_calls
    is_empty = not parts and bool(results or own_calls)
    read["content"] = None if is_empty else parts
    return results if is_empty and not own_calls else [*results, read]


def read_parts(content: Any, where: str) -> list[JSON]:
    """A content in any vendor's shape as canonical parts."""
    parts = [content] if isinstance(content, str) else [] if content is None else content
    _require(isinstance(parts, (list, tuple)), where, parts, "Give a text or a list of parts.")
    return [known for part in parts for known in read_part(part, where)]


def read_part(part: Any, where: str) -> list[JSON]:
    """A part in any vendor's shape, whose kinds do not collide, as canonical ones of known keys."""
    if isinstance(part, str):
        return [{"type": "text", "text": part}]
    _require(isinstance(part, Mapping), where, part, 'Write {"type": "text", "text": "…"}.')
    kind, source = part.get("type"), part.get("source")
    _require(isinstance(kind, (str, type(None))), f"{where}.type", kind, "Write a string.")
    mark = {"cache_control": part["cache_control"]} if part.get("cache_control") else {}
    if kind in _TEXT_KINDS:
        text = part.get(_TEXT_KINDS[kind])
        _require(isinstance(text, (str, type(None))), f"{where}.text", text, "Write a string.")
        return [{"type": "text", "text": text or "", **mark}]
    if kind in ("image_url", "input_image", "image"):
        if (url := _image_url(part)) is None:
            raise _misplaced(where, "is an image without an http(s) or data URL")
        detail = part.get("detail") or _dig(part, "image_url", "detail")
        image = {"url": url, **({"detail": detail} if detail else {})}
        return [{"type": "image_url", "image_url": image, **mark}]
    if kind in ("file", "input_file"):
        return [{**_read_file(part, where), **mark}]
    if kind == "document" and _dig(source, "type") in ("text", "content"):
        title, content = part.get("title"), _dig(source, "data") or _dig(source, "content")
        return [*read_parts(title, where), *read_parts(content, where)]
    if kind == "document":
        name, url = part.get("title"), _source_url(source)
        return [{**_read_file({"filename": name, "file_data": url}, where), **mark}]
    if kind in ("thinking", "redacted_thinking"):
        text = part.get("thinking", "")
        _require(isinstance(text, str), f"{where}.thinking", text, "Write a string.")
        is_own = str(part.get("signature") or _OWN_SIGNATURE).startswith(_OWN_SIGNATURE)
        return [] if kind == "thinking" and is_own else [dict(part)]
    if kind == "search_result":
        title = f"{part.get('title')} ({part.get('source')})"
        return [*read_parts(title, where), *read_parts(part.get("content"), where)]
    if kind == "tool_reference":
        return read_parts(f"The tool {part.get('tool_name')} can be called.", where)
    if kind == "compaction" and _is_text(part.get("content")):
        return read_parts(part["content"], where)
    if kind == "input_audio":
        raise _misplaced(where, "is audio, which Puter's chat does not accept")
    if kind not in _SKIPPED_KINDS:
        raise _misplaced(where, f"is of the kind {_describe(kind)}, which is not known")
    return []


def _dig(value: Any, *path: str) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _image_url(image: Any) -> str | None:
    url = image if isinstance(image, str) else _dig(image, "image_url")
    url = _dig(url, "url") or url or _source_url(_dig(image, "source")) or _dig(image, "url")
    data = _dig(image, "data") or _dig(image, "b64_json")
    if data and not url:
        url = f"data:{_dig(image, 'mime_type') or 'image/png'};base64,{data}"
    is_url = isinstance(url, str) and re.match("(?i)https?://|data:", url[:10])
    return url if is_url else None


def _source_url(source: Any) -> Any:
    """The URL that Anthropic's clients name, or one that holds the data that they send."""
    if _dig(source, "type") == "base64":
        return f"data:{_dig(source, 'media_type')};base64,{_dig(source, 'data')}"
    return _dig(source, "url")


def _read_file(part: Mapping[str, Any], where: str) -> JSON:
    if _is_text(part.get("puter_path")):
        return {"type": "file", "puter_path": part["puter_path"]}
    data, name = (_dig(part.get("file", part), key) for key in ("file_data", "filename"))
    if not isinstance(data, str) or re.match("(?i)https?://", data[:10]):
        raise _misplaced(where, "has a file without its data (data:application/pdf;base64,…)")
    try:
        content = base64.b64decode(data.rpartition(",")[2], validate=True)
    except ValueError as error:
        raise _misplaced(where, f"has a file_data that is not base64 ({error})") from None
    return file_part(("document.pdf" if name is None else name, content))


def _check_call(call: Any, function: Any, where: str) -> None:
    """Raise `BadRequestError` for a call in a history that no provider can take."""
    hint = "Give the call as the model made it: with its id, name and arguments."
    is_call = isinstance(call, Mapping) and isinstance(function, Mapping)
    if not is_call or not _is_text(call.get("id")) or not _is_text(function.get("name")):
        raise _misplaced(where, "lacks an id or a function name", hint)
    arguments = function.get("arguments", function.get("input"))
    # a text that cannot be read passes: the model wrote it, and its result says so
    ok = isinstance(arguments, (str, Mapping, type(None))) or arguments == []
    _require(ok, f"The arguments of {where}", arguments, hint)


def _parts(content: Any) -> list[JSON]:
    """A content as a list of parts that hold something."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
    return [p for p in parts if p.get("type") != "text" or p.get("text")]


def _is_text_only(content: Any) -> bool:
    return all(part["type"] == "text" for part in _parts(content))


def text_of(content: Any, kind: str = "text", key: str = "text", glue: str = "") -> str:
    """The texts of a content's parts of one kind, joined."""
    if isinstance(content, str):
        return content if kind == "text" else ""
    parts = content if isinstance(content, (list, tuple)) else ()
    return glue.join(str(p.get(key) or "") for p in parts if p.get("type") == kind)


def openai_call(call: ToolCall) -> JSON:
    """A call as one of OpenAI's `tool_calls`; the inverse of `tool_call_from`."""
    function = {"name": call.name, "arguments": call.invalid or json.dumps(call.arguments)}
    signed = {"extra_content": call.extra_content} if call.extra_content else {}
    return {"id": call.id, "type": "function", "function": function, **signed}


def tool_call_from(call: Mapping[str, Any]) -> ToolCall:
    """One of OpenAI's `tool_calls`, or a `tool_use` part; KeyError or TypeError for others."""
    function = call.get("function", call)
    read, invalid = _arguments_from(function.get("arguments", function.get("input")))
    extra = call.get("extra_content") or None
    return ToolCall(str(call.get("id") or ""), str(function["name"] or ""), read, extra, invalid)


def _arguments_from(value: Any) -> tuple[JSON, str]:
    """(a call's arguments, ""), or ({}, the text that is not a JSON object)."""
    read = value
    if isinstance(value, str):
        value = mend_surrogates(value)
        try:
            read = read_json(value) if value.strip() else None
        except ValueError:
            return {}, value
    # null, a blank text and an empty list are how some providers say that there are none
    if isinstance(read, Mapping) or read is None or read == []:
        return dict(read or {}), ""
    return {}, value if isinstance(value, str) else json.dumps(value)


# ---- history: the canonical shape out, in the form of each kind of provider (recorded) ----

_Calls = list[tuple[ToolCall, JSON]]  # the calls of a message, each with its result


class Form(NamedTuple):
    """How the messages for one kind of provider are written: pure functions of canonical ones.

    `part` writes a picture or a PDF, `result` a call's result, and `turn` a message with its
    calls and their written results. `keeps` names the keys and kinds of parts beyond the usual
    ones that the provider takes. Where it `is_lossy`, Puter loses pictures in results, and calls
    in streams; where it `is_strict`, blank texts are refused, and later system messages lost.
    """

    part: Callable[[JSON], JSON]
    result: Callable[[JSON], JSON]
    turn: Callable[[JSON, _Calls], Messages]
    keeps: tuple[str, ...] = ()
    is_lossy: bool = False
    is_strict: bool = False


def form_of(model: Model | str) -> str:
    """The name of the form for a model: by its provider, else by the name that it is asked by."""
    if isinstance(model, Model):
        form = "responses" if model.provider.endswith("-responses") else model.provider
        return form if form in ("claude", "responses", "openrouter") else "chat"
    name = strip_puter_prefix(model).lower()
    is_claude = re.match(r"(anthropic[:/]){0,2}claude", name) is not None
    return "claude" if is_claude else "openrouter" if name.startswith("openrouter:") else "chat"


def messages_for(form_name: str, messages: Sequence[JSON]) -> Messages:
    """Canonical messages as a kind of provider takes them; raises `BadRequestError` if none is left."""
    form, is_opening = FORMS[form_name], True
    sent: Messages = []
    for message, calls in _with_results(messages):
        one = _written(message, form, bool(calls))
        is_opening = is_opening and one["role"] == "system"
        if form.is_strict and one["role"] == "system" and not is_opening:
            one["role"] = "user"
        if calls:
            written = [(call, form.result(_written(result, form))) for call, result in calls]
            turn = form.turn(one, written)
        else:
            turn = [one] if one["content"] else []
        if turn and "tool_calls" in turn[0] and form.turn is _chat_turn:
            # Puter would make one message of it and of the texts before, and lose the calls
            while sent and sent[-1]["role"] == "assistant" and _is_text_only(sent[-1]["content"]):
                turn[0]["content"] = f"{text_of(sent.pop()['content'])}\n\n{turn[0]['content']}"
        sent += turn
        shown = [p for _, r in calls for p in _parts(r["content"]) if p["type"] != "text"]
        if shown and form.is_lossy:
            sent.append({"role": "user", "content": [*map(form.part, shown)]})
        if drawn := message.get("images"):
            text = {"type": "text", "text": "The picture that you drew:"}
            sent.append({"role": "user", "content": [text, *map(form.part, drawn)]})
    if not sent:
        problem = "There is nothing to send: no message has a content"
        raise BadRequestError(problem, hint="Give a prompt that is not empty.")
    if form.is_strict and all(one["role"] == "system" for one in sent):
        sent[-1]["role"] = "user"
    return sent


def _with_results(messages: Sequence[JSON]) -> list[tuple[JSON, _Calls]]:
    """Each message with its calls and their results, however late these come.

    A call without a result gets one, a result without its call is told in words, and an id
    that is used again is made another one: else providers refuse the history for ever.
    """
    turns: list[tuple[JSON, _Calls]] = []
    waiting: dict[str, Messages] = {}
    uses: Counter[str] = Counter()
    for message in messages:
        if message["role"] == "tool":
            if slots := waiting.get(message["tool_call_id"]):
                slot = slots.pop(0)
                slot |= {**message, "tool_call_id": slot["tool_call_id"]}
                continue
            intro = {"type": "text", "text": f"The result of the call {message['tool_call_id']}:"}
            message = {"role": "user", "content": [intro, *_parts(message.get("content"))]}
        calls: _Calls = []
        opened: dict[str, Messages] = {}
        for call in map(tool_call_from, message.get("tool_calls") or ()):
            base = sent_id = re.sub(r"[^A-Za-z0-9_-]", "_", call.id)[-56:]
            while uses[sent_id]:
                uses[base] += 1
                sent_id = f"{base}_{uses[base]}"
            uses[sent_id] += 1
            result = {"role": "tool", "tool_call_id": sent_id, "content": _NOT_ANSWERED}
            opened.setdefault(call.id, []).append(result)
            # arguments that could not be read are sent as none; the result says what was wrong
            calls.append((replace(call, id=sent_id, invalid=""), result))
        waiting |= opened
        turns.append((message, calls))
    return turns


def _written(message: JSON, form: Form, has_calls: bool = False) -> JSON:
    """A message with the parts and keys that the provider takes; its content None if empty."""
    role, content = message["role"], message.get("content")
    if not isinstance(content, str):
        content = [one for part in _parts(content) for one in _written_part(part, form)]
    is_strict = form.is_strict or has_calls
    if is_strict and _is_text_only(content) and not text_of(content).strip():
        content = None
    keys = ("tool_call_id", "is_error", *form.keeps)
    clean = {key: message[key] for key in keys if message.get(key)}
    return {"role": "system" if role == "developer" else role, "content": content or None, **clean}


def _written_part(part: JSON, form: Form) -> list[JSON]:
    kind = part["type"]
    if kind in ("thinking", "redacted_thinking"):
        return [part] if "thinking" in form.keeps else []
    if kind == "text" and form.is_strict and not part["text"].strip():
        return []
    mark = {key: value for key, value in part.items() if key == "cache_control"}
    bare = {key: part[key] for key in part if key not in mark}
    written = bare if kind == "text" else form.part(bare)
    return [written | mark if "cache_control" in form.keeps else written]


def _claude_part(part: JSON) -> JSON:
    if "puter_path" in part:
        return part
    file = part.get("file") or {}
    url: str = file.get("file_data") or part["image_url"]["url"]
    head, _, data = url.partition(",")
    source = {"type": "url", "url": url}
    if head.lower().endswith(";base64"):
        kind = head[5:].partition(";")[0].lower()
        source = {"type": "base64", "media_type": kind, "data": "".join(data.split())}
    if file:
        return {"type": "document", "title": file["filename"], "source": source}
    return {"type": "image", "source": source}


def _claude_turn(message: JSON, calls: _Calls) -> Messages:
    uses = [_tool_use(replace(call, extra_content=None)) for call, _ in calls]
    turn = {"role": "assistant", "content": [*_parts(message["content"]), *uses]}
    return [turn, {"role": "user", "content": [result for _, result in calls]}]


def _result_block(result: JSON) -> JSON:
    block: JSON = {"type": "tool_result", "tool_use_id": result["tool_call_id"]}
    marks: JSON = {key: result[key] for key in ("is_error", "cache_control") if key in result}
    return {**block, "content": result["content"] or _NO_OUTPUT, **marks}


def _responses_part(part: JSON) -> JSON:
    if "file" in part:
        return {"type": "input_file", **part["file"]}
    image = dict(part.get("image_url", {}))
    return {"type": "input_image", "image_url": image.pop("url", None), **image}


def _responses_result(result: JSON) -> JSON:
    """A result as a text; one that holds more in Anthropic's wrapper, which arrives whole."""
    if _is_text_only(content := result["content"]):
        return _chat_result(result)
    texts = [{**p, "type": "input_text"} if p["type"] == "text" else p for p in _parts(content)]
    return {"role": "user", "content": [{**_result_block(result), "content": texts}]}


def _chat_turn(message: JSON, calls: _Calls) -> Messages:
    """The text alone, then each call alone before its result, unless a provider signed them.

    Signed calls must stay together in one message. With text beside them OpenAI's own shape
    arrives right; without, parts arrive reversed (recorded), so they are sent in reverse.
    """
    content, text = message["content"], text_of(message["content"], glue="\n")
    beside = {key: value for key, value in message.items() if key not in ("role", "content")}
    is_signed = any(call.extra_content for call, _ in calls)
    if is_signed and text.strip():
        return _openai_turn({**message, "content": text}, calls)
    turn: Messages = [{"role": "assistant", "content": content}] if content else []
    for some in [calls] if is_signed else [[one] for one in calls]:
        parts = [_tool_use(call) for call, _ in reversed(some)]
        turn.append({"role": "assistant", "content": parts, **beside})
        turn += [result for _, result in some]
        beside = {}
    return turn


def _responses_turn(message: JSON, calls: _Calls) -> Messages:
    unsigned = [(replace(call, extra_content=None), result) for call, result in calls]
    return _chat_turn(message, unsigned)


def _chat_result(result: JSON) -> JSON:
    empty = _NO_OUTPUT if _is_text_only(result["content"]) else "(see the picture below)"
    text = text_of(_parts(result["content"]), glue="\n")
    text = text if text.strip() else empty
    text = f"Error: {text}" if result.get("is_error") else text
    return {"role": "tool", "tool_call_id": result["tool_call_id"], "content": text}


def _openai_turn(message: JSON, calls: _Calls) -> Messages:
    turn = {**message, "tool_calls": [openai_call(call) for call, _ in calls]}
    return [turn, *(result for _, result in calls)]


def _tool_use(call: ToolCall) -> JSON:
    part = {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments}
    return {**part, "extra_content": call.extra_content} if call.extra_content else part


_CHAT = Form(dict, _chat_result, _chat_turn, ("name",), is_lossy=True)
FORMS = {
    "claude": Form(
        _claude_part, _result_block, _claude_turn, ("cache_control", "thinking"), is_strict=True
    ),
    "responses": Form(_responses_part, _responses_result, _responses_turn),
    "chat": _CHAT,
    "openrouter": _CHAT._replace(keeps=("name", "cache_control", "reasoning", "reasoning_details")),
    # an OpenAI-compatible base; Puter's own loses the same calls in streams
    "openai": _CHAT._replace(turn=_openai_turn),
}
# What Puter makes of an effort for Claude: so many tokens of the answer's are for thinking.
_EFFORT_TOKENS = {"high": 8192, "medium": 4096, "low": 1024}
_LEAST_ANSWER_TOKENS = 256
RESPONSES_ARGUMENTS = """service_tier metadata store prompt_cache_key truncation include
    safety_identifier""".split()


def arguments_for(form_name: str, model: str, args: JSON) -> JSON:
    """A request's arguments as a kind of provider takes them, messages included (recorded)."""
    sent = {**args, "messages": messages_for(form_name, args["messages"])}
    if form_name != "responses":
        sent = {key: value for key, value in sent.items() if key not in RESPONSES_ARGUMENTS}
    effort = args.get("reasoning_effort") or _dig(args.get("reasoning"), "effort")
    if form_name == "claude":
        sent.setdefault("temperature", 1)  # Puter would send 0; Anthropic's own default is 1
        sent.pop("reasoning", None)
        sent.pop("reasoning_effort", None)
        if effort := _claude_effort(effort, args):
            sent["reasoning_effort"] = effort
    elif form_name == "responses":
        sent.pop("reasoning_effort", None)
        if effort and not model.startswith("o3-pro"):
            sent["reasoning"] = {**(args.get("reasoning") or {}), "effort": effort}
        schema: Any = _dig(args.get("response_format"), "json_schema")
        text = {"verbosity": sent.pop("verbosity", None)}
        text["format"] = {"type": "json_schema", **schema} if schema else None
        if text := {key: value for key, value in text.items() if value}:
            sent["text"] = {**text, **(args.get("text") or {})}
        if name := _dig(args.get("tool_choice"), "function", "name"):
            sent["tool_choice"] = {"type": "function", "name": name}
    return sent


def _claude_effort(effort: Any, args: JSON) -> Any:
    """The highest effort, up to the asked one, that leaves room for an answer; None for none."""
    for message in reversed(args["messages"]):
        if message["role"] == "user":
            break
        kinds = {part["type"] for part in _parts(message.get("content"))}
        # Anthropic refuses a running turn whose calls do not begin with signed thinking
        if message.get("tool_calls") and kinds.isdisjoint(("thinking", "redacted_thinking")):
            return None
    limit = args.get("max_tokens")
    if limit is None or effort not in [*_EFFORT_TOKENS]:
        return effort
    most = min(limit - _LEAST_ANSWER_TOKENS, _EFFORT_TOKENS[effort])
    return next((name for name, tokens in _EFFORT_TOKENS.items() if tokens <= most), None)


def needs_of(messages: Sequence[JSON], tools: Sequence[JSON] = ()) -> Needs:
    """What canonical messages, and the schemas of tools, ask of a model; not yet how much room."""
    kinds = {"web search" for tool in tools if is_web_search(tool)}
    words = {"image_url": "image", "file": "pdf", "puter_path": "puter_path"}
    for message in messages:
        parts = (*_parts(message.get("content")), *message.get("images", ()))
        kinds |= {words[name] for part in parts for name in words.keys() & part.keys()}
    has_functions = any(not is_web_search(tool) for tool in tools)
    return Needs(has_functions, frozenset(kinds))


def estimated_tokens(messages: Sequence[JSON]) -> int:
    """The server's estimate of messages of any form, by which it lets a request pass (recorded)."""
    contents = (_parts(message.get("content")) for message in messages)
    calls = (message.get("tool_calls") or () for message in messages)
    return sum(map(_part_tokens, chain(*contents, *calls)))


def _part_tokens(part: JSON) -> int:
    kind, url = part.get("type"), str(_dig(part, "image_url", "url") or part.get("image_url") or "")
    if kind in ("image_url", "input_image") and url.startswith("data:"):
        return math.ceil(len(url.partition(",")[2]) * 3 // 4 / 150)
    if data := _dig(part, "source", "data"):
        return max(1_500, math.ceil(len(data) * 3 // 4 / 150))
    if kind in ("text", "thinking"):
        text = part.get(kind) or ""
    elif kind in ("tool_use", "tool_result", "function"):
        value = part.get("input") or part.get("content") or part.get("function")
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    else:
        return 1_500
    return int((len(text) / 4 + len(text.split()) * 4 / 3) / 2)


# ---- files: the only reader of the disk here ----

_IMAGE_KINDS = {
    "image/png": rb"\x89PNG\r\n\x1a\n",
    "image/jpeg": rb"\xff\xd8\xff",
    "image/gif": rb"GIF8[79]a",
    "image/webp": rb"RIFF....WEBP",
}
_PAGE_KINDS = {**_IMAGE_KINDS, "application/pdf": rb"%PDF-"}
_AUDIO_KINDS = {
    "audio/wav": rb"RIFF....WAVE",
    "audio/mpeg": rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]",
    "audio/mp4": rb"....ftyp",
    "audio/ogg": rb"OggS",
    "audio/flac": rb"fLaC",
    "audio/webm": rb"\x1aE\xdf\xa3",
}


def image_part(image: Image) -> JSON:
    """An image as a part of a message: a path or bytes become a data URL, a URL stays."""
    if isinstance(image, str) and re.match(r"https?://|data:", image, re.IGNORECASE):
        url = r"https?://.*|data:image/[\w.+-]+;base64,[A-Za-z0-9+/=\s]+"
        if not re.fullmatch(url, image, re.IGNORECASE | re.DOTALL):
            raise BadRequestError(f"The image {image[:40]!r}… is not a base64 data URL")
        return {"type": "image_url", "image_url": {"url": image}}
    data, name = _bytes_of(image, "image")
    if kind := mime_of(data):
        return {"type": "image_url", "image_url": {"url": Picture(data, kind).as_url()}}
    problem = f"is not an image in PNG, JPEG, GIF or WebP ({len(data)} bytes)"
    raise BadRequestError(f"{name} {problem}")


def file_part(file: File) -> JSON:
    """A path, bytes or (name, bytes) as a part, by what it holds: a text, an image, or a PDF."""
    if isinstance(file, tuple):
        name, data = file
    else:
        data, name = _bytes_of(file, "file")
        name = "document" if isinstance(file, (bytes, bytearray)) else name
    last = re.split(r"[/\\]", name)[-1] if isinstance(name, str) else ""
    is_name = last.strip(" .") and not re.search(r"[\x00-\x1f\x7f-\x9f]", last)
    _require(is_name, "The name of a file", name, "Use a plain name such as report.pdf.")
    name = mend_surrogates(last)
    is_data = isinstance(data, (bytes, bytearray))
    _require(is_data, f"The content of {name!r}", data, "Give a file as (name, bytes).")
    if not data or len(data) > MAX_FILE_BYTES:
        limits = f"may be 1 to {MAX_FILE_BYTES:,} bytes"
        raise BadRequestError(f"The file {name!r} is {len(data):,} bytes, but {limits}")
    if mime_of(data):
        return image_part(data)
    if data[:5] == b"%PDF-":
        name = name if "." in name else f"{name}.pdf"
        url = Picture(data, "application/pdf").as_url()
        return {"type": "file", "file": {"filename": name, "file_data": url}}
    if (text := decoded_text(data)) is None:
        problem = "is neither a text, an image (PNG, JPEG, GIF, WebP) nor a PDF"
        raise BadRequestError(f"The file {name!r} {problem}", hint="Convert it to one of these.")
    return {"type": "text", "text": f"{name}:\n```\n{text.rstrip()}\n```"}


def decoded_text(data: bytes) -> str | None:
    """A file's text: UTF-8, UTF-16 with its mark, else Latin-1; None if it is not text."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    if re.search(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f]", data):
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        # what Windows writes: Latin-1 with more letters
        return data.decode("cp1252", "replace")


def _bytes_of(source: Image, what: str) -> tuple[bytes, str]:
    """(contents, name for messages) of a path or bytes."""
    if isinstance(source, (bytes, bytearray)):
        return bytes(source), f"the {what} given as bytes"
    try:
        path = os.fspath(source)
        path = path if os.path.exists(path) else os.path.expanduser(path)
        with open(path, "rb") as file:
            return file.read(MAX_SENT_BYTES + 1), path
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problem = f"The {what} {str(source)[:200]!r} cannot be read ({reason})"
        raise BadRequestError(problem, hint="Check the path.") from error


def mime_of(data: bytes, kinds: Mapping[str, bytes] = _IMAGE_KINDS) -> str | None:
    """The MIME type of a file of one of these kinds, by its first bytes; None for others."""
    return next((k for k, start in kinds.items() if re.match(start, data, re.DOTALL)), None)


def _is_named(source: Any) -> bool:
    """Whether it is (name, bytes)."""
    return isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], bytes)


def data_url(source: Any, what: str, kinds: Mapping[str, bytes]) -> str:
    """A path, bytes or (name, bytes) as a data URL; `BadRequestError` if it is none of `kinds`."""
    data, name = (source[1], source[0]) if _is_named(source) else _bytes_of(source, what)
    if kind := mime_of(data, kinds):
        return Picture(data, kind).as_url()
    known = ", ".join(kind.partition("/")[2].upper() for kind in kinds)
    raise BadRequestError(f"{name} is not one of {known}", hint="Convert it first.", param=what)


# ---- tools: functions to schemas, a model's arguments to Python values ----

# Takes a value of JSON and its place, for messages; gives what a type hint says, or TypeError.
_Reader = Callable[[Any, str], Any]
_Type = tuple[JSON, _Reader]  # with its JSON schema
_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_TEXT_TYPES: dict[str, JSON] = {  # texts in JSON, with what a schema may say of them
    "datetime.datetime": {"format": "date-time"},
    "datetime.date": {"format": "date"},
    "decimal.Decimal": {},
    "pathlib.Path": {},
    "uuid.UUID": {"format": "uuid"},
}


def is_web_search(tool: Any) -> bool:
    """Whether a tool is the search that OpenAI's models run themselves."""
    return str(_dig(tool, "type")).startswith("web_search")


def tool_schemas(tools: Sequence[Any] | None) -> list[JSON]:
    """Tools as OpenAI's list of function schemas."""
    is_list = isinstance(tools, list | tuple | None)
    _require(is_list, "tools", tools, "Give a list: tools=[function].")
    return [_tool_schema(tool, index) for index, tool in enumerate(tools or ())]


def _tool_schema(tool: Any, index: int) -> JSON:
    if is_web_search(tool):
        # whatever its version and vendor, by OpenAI's name
        keys = ("search_context_size", "user_location", "filters")
        search = {"type": "web_search", **{key: tool[key] for key in keys if key in tool}}
        # Anthropic has them outside of filters, and chat completions the place in a box
        if domains := {k: tool[k] for k in ("allowed_domains", "blocked_domains") if tool.get(k)}:
            search["filters"] = domains
        if isinstance(place := _dig(tool, "user_location", "approximate"), Mapping):
            search["user_location"] = {"type": "approximate", **place}
        return search
    if isinstance(tool, Mapping) and tool.get("type", "function") == "function":
        function = tool.get("function")
        if function is None:  # it stands alone, under OpenAI's, Anthropic's or MCP's names
            names = {"input_schema": "parameters", "inputSchema": "parameters"}
            function = {names.get(k, k): v for k, v in tool.items() if k != "type"}
        if isinstance(function, Mapping) and _is_text(function.get("name")):
            return {"type": "function", "function": dict(function)}
    hint = 'Give a function, or {"type": "function", "function": {"name": "…", "parameters": {…}}}.'
    _require(callable(tool), f"tools[{index}]", tool, hint)
    return function_schema(tool)


def function_schema(function: Callable[..., Any]) -> JSON:
    """A Python function as OpenAI's schema, from its signature, type hints and docstring."""
    inner, _ = _behind(function)
    name = str(getattr(inner, "__name__", "") or type(inner).__name__)
    if not name.isidentifier() or isinstance(function, type):
        problem = f"{_describe(function)} has no name, or is a class"
        raise BadRequestError(problem, hint="Wrap it in an ordinary function (def).")
    text, parameters = _documented(function)[0], _call_type(function, dict, name)[0]
    described = {"name": name, **({"description": text} if text else {})}
    return {"type": "function", "function": {**described, "parameters": parameters}}


def read_arguments(function: Callable[..., Any], arguments: JSON) -> Any:
    """A model's arguments, made what the function's hints say; TypeError in words for the model."""
    return _call_type(function, dict, "it")[1](arguments, "")


def _call_type(call: Any, kind: Any, where: str, outer: tuple[Any, ...] = ()) -> _Type:
    """The parameters of a function or dataclass as an object that is read as `kind`."""
    try:
        hints = _hints_of(call)
        parameters = inspect.signature(call).parameters.values()
    except (NameError, TypeError, ValueError) as error:
        raise BadRequestError(f"The type hints of {where} cannot be read ({error})") from error
    about = _documented(call)[1]
    types: dict[str, _Type] = {}
    for one in parameters:
        if one.kind not in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) or one.name not in hints:
            problem = f"{where}: {str(one).split(':')[0]} cannot be a parameter of a tool"
            raise BadRequestError(problem, hint="Use ordinary parameters with hints: city: str.")
        schema, read = schema_and_reader(hints[one.name], f"{where}({one.name})", outer)
        notes: JSON = {"description": about[one.name]} if about.get(one.name) else {}
        is_number = isinstance(one.default, (int, float)) and math.isfinite(one.default)
        if is_number or isinstance(one.default, str):
            notes["default"] = one.default
        types[one.name] = ({**notes, **schema}, read)
    return _object_type(kind, types, [one.name for one in parameters if one.default is one.empty])


def _behind(call: Any) -> tuple[Any, Any]:
    """What a partial calls, and the function that runs: of an object its class's `__call__`."""
    inner = call.func if isinstance(call, partial) else call
    is_object = not isinstance(inner, type) and not inspect.isroutine(inner)
    return inner, type(inner).__call__ if is_object else inner


def _hints_of(call: Any) -> dict[str, Any]:
    """The type hints of what is called; Python 3.10 would add None to those with that default."""
    _, inner = _behind(call)
    inner = inspect.unwrap(getattr(inner, "__func__", inner))
    if sys.version_info < (3, 11) and isinstance(inner, types.FunctionType):
        hints = inner.__annotations__
        inner = types.FunctionType(inner.__code__, inner.__globals__, closure=inner.__closure__)
        inner.__annotations__ = hints
    return typing.get_type_hints(inner, include_extras=True)


def schema_and_reader(hint: Any, where: str = "the hint", outer: tuple[Any, ...] = ()) -> _Type:
    """A type hint as (its JSON schema, the reader of its values).

    Of `Annotated`, a string is the description, and a dict goes into the schema: its `minimum`
    and `maximum` are checked. Raises `BadRequestError` for what JSON cannot say; the reader
    raises TypeError for what does not fit.
    """
    hint = type(None) if hint is None else hint
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    type_of = partial(schema_and_reader, where=where, outer=outer)
    kind = origin or hint
    if origin is typing.Annotated:
        return _annotated_type(*type_of(inner[0]), inner[1:])
    # Required and NotRequired, of typing since 3.11 or of its extensions
    if getattr(origin, "_name", "") in ("Required", "NotRequired"):
        return type_of(inner[0])
    # NewType, and `type X = …` of Python 3.12
    if other := getattr(hint, "__supertype__", None) or getattr(hint, "__value__", None):
        return type_of(other)
    if hasattr(hint, "model_json_schema") and hasattr(hint, "model_validate"):
        return _model_type(hint, where)
    if isinstance(hint, type) and (about := _TEXT_TYPES.get(_full_name(hint))) is not None:
        return _type({"type": "string", **about}, partial(_text_value, hint))
    if hint is Any:
        return {}, lambda value, where: value
    if isinstance(hint, type) and hint in _SCALARS:
        # models write 3.0 for 3, and 3 for 3.0
        return _type({"type": _SCALARS[hint]}, hint if hint in (int, float) else lambda v: v)
    members = inner if origin is Literal else tuple(hint) if isinstance(hint, enum.EnumMeta) else ()
    choices = [(m.value if isinstance(m, enum.Enum) else m, m) for m in members]
    if choices and all(type(value) in _SCALARS for value, _ in choices):
        return _choice_type(choices)
    if origin in (typing.Union, types.UnionType):
        return _union_type([type_of(h) for h in inner])
    if kind in (list, tuple, set, frozenset, Sequence, Iterable):
        return _list_type(kind, inner, type_of)
    if kind in (dict, Mapping) and inner[:1] in ((), (str,), (Any,)):  # keys in JSON are strings
        schema, read = type_of(inner[1] if inner else Any)
        others = {"additionalProperties": schema} if schema else {}
        return _type({"type": "object", **others}, dict, lambda name: read)
    is_typed_dict = hasattr(hint, "__required_keys__")  # from typing, or typing_extensions
    if hint in outer or not (is_typed_dict or is_dataclass(hint)):
        allowed = "str, int, float, bool, list, dict, Literal, Enum, a dataclass or TypedDict"
        problem = f"{where} is of type {hint!r}, which a model cannot give"
        raise BadRequestError(problem, hint=f"Use {allowed} (and no recursive type).")
    outer = (*outer, hint)
    if is_typed_dict:
        return _typed_dict_type(hint, where, outer)
    return _call_type(hint, hint, where, outer)


def _typed_dict_type(hint: Any, where: str, outer: tuple[Any, ...]) -> _Type:
    try:
        hints = typing.get_type_hints(hint, include_extras=True)
    except NameError as error:
        raise BadRequestError(f"The type hints of {where} cannot be read ({error})") from error
    made = {name: schema_and_reader(h, f"{where}.{name}", outer) for name, h in hints.items()}
    # with hints that are texts, Python itself does not see these marks
    marks = {name: getattr(typing.get_origin(h), "_name", "") for name, h in hints.items()}
    whether = {"Required": True, "NotRequired": False}
    required = [n for n in hints if whether.get(marks[n], n in hint.__required_keys__)]
    return _object_type(dict, made, required)


def _inlined(schema: Any, definitions: JSON) -> Any:
    """A schema with definitions in the place of references to them, fit to stand in another."""
    if isinstance(schema, list):
        return [_inlined(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(one, definitions) for key, one in schema.items() if key != "$defs"}


def _model_type(model: Any, where: str) -> _Type:
    """The type of one of pydantic's models, which checks its values itself."""

    def read(value: Any, where: str) -> Any:
        try:
            return model.model_validate(value)
        except ValueError as error:
            raise TypeError(f"{where} does not fit: {str(error)[:500]}") from None

    schema = model.model_json_schema()
    try:
        return _inlined(schema, schema.get("$defs", {})), read
    except RecursionError:
        raise BadRequestError(f"{where} is of a recursive type, {model!r}") from None


def _text_value(kind: Any, text: str) -> Any:
    if kind.__name__ == "datetime":  # Python 3.10 does not know the Z of UTC
        text = re.sub("Z$", "+00:00", text)
    return getattr(kind, "fromisoformat", kind)(text)


def _full_name(kind: type) -> str:
    """Such as "pathlib.Path", whichever of its modules Python keeps it in."""
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def _type(
    schema: JSON, make: Callable[[Any], Any], reader_of: Callable[[Any], _Reader] | None = None
) -> _Type:
    """A type whose values `make` makes, of members that `reader_of` their key reads.

    What `make` refuses of a value without members does not fit the schema.
    """

    def read(value: Any, where: str) -> Any:
        _check(schema, value, where)
        if reader_of and isinstance(value, dict):
            return make({k: reader_of(k)(v, f"{where}.{k}".lstrip(".")) for k, v in value.items()})
        if reader_of:
            return make([reader_of(i)(one, f"{where}[{i}]") for i, one in enumerate(value)])
        try:
            return make(value)
        except (ValueError, TypeError, LookupError, ArithmeticError):
            raise _misfit(value, where, schema) from None

    return schema, read


def _misfit(value: Any, where: str, schema: JSON) -> TypeError:
    return TypeError(f"{where} is {_describe(value)}, but must be {json.dumps(schema)}")


def _check(schema: JSON, value: Any, where: str) -> None:
    """Raise TypeError unless a value fits a schema, whatever the values are that it holds."""
    kinds = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type")
    names = {list: ["array"], dict: ["object"], int: ["integer", "number"]}
    own = names.get(type(value)) or [_SCALARS.get(type(value), "")]
    if isinstance(value, float) and value.is_integer():
        own = ["integer", "number"]
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [value])
    # True and 1 are equal
    ok = any(one == value and isinstance(one, bool) is isinstance(value, bool) for one in choices)
    ok &= not kinds or not {*own}.isdisjoint(kinds)
    if isinstance(value, (list, str)) or _is_number(value):
        bounds: dict[Any, Any] = {str: ("minLength", "maxLength"), list: ("minItems", "maxItems")}
        least, most = bounds.get(type(value), ("minimum", "maximum"))
        size = len(value) if isinstance(value, (list, str)) else value
        ok &= schema.get(least, -math.inf) <= size <= schema.get(most, math.inf)
    if isinstance(value, str) and "pattern" in schema:
        ok &= re.search(schema["pattern"], value) is not None
    if not ok:
        raise _misfit(value, where, schema)
    if not isinstance(value, dict):
        return
    known, is_closed = schema.get("properties") or {}, schema.get("additionalProperties") is False
    if is_closed and (stray := [name for name in value if name not in known]):
        problem = f"has unexpected arguments {stray}; allowed are {list(known)}"
        raise TypeError(f"{where or 'the call'} {problem}")
    if lacking := [name for name in schema.get("required", ()) if name not in value]:
        raise TypeError(f"{where or 'the call'} lacks {lacking}")


def _annotated_type(schema: JSON, read: _Reader, notes: Sequence[Any]) -> _Type:
    texts = [{"description": note} for note in notes if isinstance(note, str)]
    for note in [*texts[:1], *(note for note in notes if isinstance(note, dict))]:
        schema = {**schema, **note}
    least, most = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)

    def read_within(value: Any, where: str) -> Any:
        value = read(value, where)
        if isinstance(value, (int, float)) and not least <= value <= most:
            raise _misfit(value, where, schema)
        return value

    return schema, read_within


def _choice_type(choices: Sequence[tuple[Any, Any]]) -> _Type:
    """One of (value in JSON, value in Python), by its kind: True and 1 are equal."""
    types = []
    for kind in dict.fromkeys(type(value) for value, _ in choices):
        members = {value: member for value, member in choices if type(value) is kind}
        types.append(_type({"type": _SCALARS[kind], "enum": [*members]}, members.__getitem__))
    return _union_type(types)


def _union_type(types: Sequence[_Type]) -> _Type:
    schemas = [schema for schema, _ in types]
    distinct = [schema for i, schema in enumerate(schemas) if schema not in schemas[:i]]
    schema: JSON = {"anyOf": distinct} if len(distinct) > 1 else distinct[0]

    def read(value: Any, where: str) -> Any:
        for _, read_as in types:
            with suppress(TypeError):
                return read_as(value, where)
        raise _misfit(value, where, schema)

    return schema, read


def _list_type(kind: Any, hints: Sequence[Any], type_of: Callable[[Any], _Type]) -> _Type:
    is_fixed = kind is tuple and bool(hints) and Ellipsis not in hints
    types = [type_of(hint) for hint in hints or [Any] if hint is not Ellipsis]
    item = types[0] if len(types) == 1 else _union_type(types)
    length = {"minItems": len(types), "maxItems": len(types)} if is_fixed else {}
    make = kind if kind in (tuple, set, frozenset) else list
    schema: JSON = {"type": "array", "items": item[0], **length}
    return _type(schema, make, lambda i: (types[i] if is_fixed else item)[1])


def _object_type(kind: Any, types: Mapping[str, _Type], required: Sequence[str]) -> _Type:
    properties = {name: schema for name, (schema, _) in types.items()}
    schema: JSON = {"type": "object", "properties": properties, "required": list(required)}
    schema["additionalProperties"] = False
    return _type(schema, lambda members: kind(**members), lambda name: types[name][1])


def _documented(call: Any) -> tuple[str, dict[str, str]]:
    """(what it does, what its parameters are), from Google's, NumPy's or Sphinx's docstrings."""
    inner, routine = _behind(call)
    doc = inspect.getdoc(routine) or inspect.getdoc(inner) or ""
    find = partial(re.findall, flags=re.MULTILINE | re.DOTALL)
    end = r"(?=^\w+:\s*$|^:\w|\Z)"  # a section such as "Returns:", or a field such as ":raises"
    head = find(rf"\A(.*?){end}", doc)[0]
    about = find(r"^:param\b[^:]*?(\w+): *(.*?)(?=^:|\Z)", doc)
    for rows in find(r"^Parameters\n-{3,}\n(.*?)(?=^\w[\w ]*\n-{3,}|\Z)", doc):
        about += find(r"^(\w+)(?: *:[^\n]*)?\n((?:[ \t]+[^\n]*\n?|\n)+)", rows + "\n")
        head = head.partition("\nParameters\n")[0]
    for indent, rows in find(rf"^(?:Args|Arguments|Parameters):\s*?\n( *)(.*?){end}", doc):
        entry = rf"^{indent}(\w+)(?: *\([^)]*\))?:"
        about += find(rf"{entry} *(.*?)(?={entry[:-1]}:|\Z)", indent + rows)
    return " ".join(head.split()), {entry[0]: " ".join(entry[1].split()) for entry in about}


def tool_result_text(value: Any) -> str:
    """What a function returned, as the text that goes to the model."""
    if not isinstance(value, str | None):
        return json.dumps(_json_value(value), ensure_ascii=False)
    return value if value and value.strip() else _NO_OUTPUT


def _json_value(value: Any) -> Any:
    value = value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, dict):
        pairs = [(k.value if isinstance(k, enum.Enum) else k, v) for k, v in value.items()]
        plain = (str, int, float, type(None))
        return {k if isinstance(k, plain) else str(k): _json_value(v) for k, v in pairs}
    if isinstance(value, (list, tuple, set, frozenset, Iterator)):
        return [*map(_json_value, value)]
    if is_dataclass(value) and not isinstance(value, type):
        return _json_value(asdict(value))
    for name in ("model_dump", "tolist", "to_dict"):  # of pydantic, NumPy and pandas
        if callable(getattr(value, name, None)):
            return _json_value(getattr(value, name)())
    return str(value)


# ---- typed answers: a type or a JSON schema to what a model is asked, its answer to a value ----

_ANSWER_TOOL = "final_answer"  # the function by which a model that takes some gives its answer
_BEGUN_JSON = r"""\{\s*(["']|\w+\s*:)|\[\s*["'{\[]"""
_JSON_ATTEMPTS = 64  # places where the JSON of an answer may begin
_SCHEMA_KEYS: dict[Any, str] = {  # what of a JSON schema is checked, and must be of these kinds
    (str, list): "type",
    list: "required enum anyOf oneOf allOf",
    dict: "properties $defs definitions",
    (dict, bool): "items additionalProperties",
    (int, float): "minimum maximum minItems maxItems minLength maxLength",
    str: "$ref pattern",
}


class Returns(NamedTuple):
    """What an answer is read as: the schema of an object, and the reader of its value."""

    schema: JSON
    read: _Reader
    is_wrapped: bool  # whether the value is not an object, and so stands in one under "value"


def returns_of(kind: Any) -> Returns:
    """What `returns` asks for: a type that `schema_and_reader` knows, or a JSON schema."""
    if isinstance(kind, Mapping):
        _check_schema(kind, "returns", kind)
        made: _Type = (dict(kind), partial(_fitting, kind, root=kind))
    else:
        made = schema_and_reader(kind, "returns")
    schema, read = made
    if schema.get("type") == "object":
        return Returns(schema, read, False)
    definitions: JSON = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    whole, _ = _object_type(dict, {"value": made}, ["value"])
    return Returns({**whole, **definitions}, read, True)


def _check_schema(schema: Any, where: str, root: Any) -> None:
    """Raise `BadRequestError` for what is not a JSON schema, before anybody is asked."""
    if isinstance(schema, bool):
        return
    _require(isinstance(schema, Mapping), where, schema, 'Write {"type": "object", …}.')
    for kind, keys in _SCHEMA_KEYS.items():
        for key in schema.keys() & {*keys.split()}:
            _require(isinstance(schema[key], kind), f"{where}.{key}", schema[key], "Correct it.")
    kinds = schema.get("type", [])
    known = {*_SCALARS.values(), "array", "object"}
    unknown = {kinds} - known if isinstance(kinds, str) else {*map(str, kinds)} - known
    _require(not unknown, f"{where}.type", kinds, f"Types are {', '.join(sorted(known))}.")
    _resolved(schema, root)
    try:
        re.compile(schema.get("pattern", ""))
    except re.error as error:
        raise _misplaced("returns", f"has a pattern that cannot be read ({error})") from None
    for key in ("properties", "$defs", "definitions"):
        for name, one in schema.get(key, {}).items():
            _check_schema(one, f"{where}.{key}.{name}", root)
    for key in ("anyOf", "oneOf", "allOf", "items", "additionalProperties"):
        below = schema.get(key, True)
        for one in below if isinstance(below, list) else [below]:
            _check_schema(one, f"{where}.{key}", root)


def _resolved(schema: Any, root: Any) -> Any:
    seen: list[Any] = []
    while isinstance(schema, Mapping) and "$ref" in schema:
        reference = schema["$ref"]
        schema = _dig(root, *filter(None, reference.removeprefix("#").split("/")))
        if schema is None or reference in seen:
            raise _misplaced("returns", f"has a $ref that leads nowhere: {reference!r}", "")
        seen.append(reference)
    return schema


def _fitting(schema: Any, value: Any, where: str, root: Any) -> Any:
    """The value if it fits a JSON schema, by what models get wrong; raises TypeError."""
    schema = _resolved(schema, root)
    if isinstance(schema, bool):
        return value
    _check(dict(schema), value, where)
    properties, others = schema.get("properties") or {}, schema.get("additionalProperties", True)
    members = value.items() if isinstance(value, dict) else ()
    # what decides between alternatives, such as a const, before what is deep
    for name, one in sorted(members, key=lambda m: isinstance(m[1], (dict, list))):
        _fitting(properties.get(name, others), one, f"{where}.{name}", root)
    for number, one in enumerate(value if isinstance(value, list) else ()):
        _fitting(schema.get("items", True), one, f"{where}[{number}]", root)
    for one in schema.get("allOf", ()):
        _fitting(one, value, where, root)
    if options := schema.get("anyOf") or schema.get("oneOf"):
        pairs = [(_resolved(one, root), partial(_fitting, one, root=root)) for one in options]
        types: list[_Type] = [({} if one is True else one, read) for one, read in pairs]
        _union_type(types)[1](value, where)
    return value


def _format_of(returns: Returns, args: JSON, tools: Sequence[JSON]) -> JSON:
    """The argument that asks for a type; raises `BadRequestError` if others are in its way."""
    if "response_format" in args:
        raise _misplaced("response_format", "and `returns` say the same", "Give one.")
    if any(_dig(tool, "function", "name") == _ANSWER_TOOL for tool in tools):
        raise _misplaced("tools", f"has a {_ANSWER_TOOL}, as `returns` needs it", "Rename it.")
    form = {"name": "answer", "schema": returns.schema}
    return {"response_format": {"type": "json_schema", "json_schema": form}}


def typed_arguments(form_name: str, has_tools: bool, args: JSON) -> JSON:
    """The arguments by which a kind of provider answers in the form of `response_format`.

    The Responses API takes it as it is; a model that `has_tools` gives its answer to a
    function; others are told in words, as is the choice of the function: Puter drops both
    `response_format` and `tool_choice` for them (recorded).
    """
    if form_name == "responses":
        return args
    order = json_instruction(args["response_format"])
    if not has_tools or form_name == "openai":
        return {**args, "messages": with_instruction(args["messages"], order)}
    parameters = args["response_format"]["json_schema"]["schema"]
    about = {"name": _ANSWER_TOOL, "description": "Gives the answer.", "parameters": parameters}
    tools = [*args.get("tools", ()), {"type": "function", "function": about}]
    order = f"Give your answer by calling the function {_ANSWER_TOOL}, not as a text."
    messages = with_instruction(args["messages"], order)
    sent = {key: value for key, value in args.items() if key != "response_format"}
    return {**sent, "tools": tools, "messages": messages}


def json_instruction(response_format: Any) -> str:
    """What to say in the system text, since most providers know no `response_format`."""
    kind = _dig(response_format, "type")
    text = "Answer with one JSON {} and nothing else: no code fence, no remarks."
    if kind == "json_schema":
        schema = json.dumps(_dig(response_format, "json_schema", "schema"))
        return f"{text.format('value')} It must match this JSON schema: {schema}"
    if kind not in (None, "text", "json_object"):
        raise _misplaced("response_format", f"of type {_describe(kind)} is not known", "")
    return text.format("object") if kind == "json_object" else ""


def with_instruction(messages: Messages, text: str) -> Messages:
    """The messages with a system text behind those that they begin with."""
    count = len([*takewhile(lambda m: m["role"] in ("system", "developer"), messages)])
    return [*messages[:count], {"role": "system", "content": text}, *messages[count:]]


def typed_reply(reply: Reply, returns: Returns, may_call: bool = False) -> Reply:
    """The reply with its `value`; raises TypeError, in words for the model, if it does not fit.

    If it `may_call` the caller's own functions, a reply that does is not an answer yet.
    """
    call = next((call for call in reply.tool_calls if call.name == _ANSWER_TOOL), None)
    if reply.tool_calls and call is None and may_call:
        return reply
    text = (call.invalid or json.dumps(call.arguments)) if call else json_text(reply.text)
    try:
        value = read_json(text)
    except ValueError:
        if not returns.is_wrapped or not text.strip():
            raise TypeError(f"the answer is not JSON: {_describe(text)}") from None
        value = text.strip()  # a bare word
    if returns.is_wrapped and isinstance(value, dict) and value.keys() == {"value"}:
        value = value["value"]
    text = json.dumps(value, ensure_ascii=False)
    reason = "stop" if reply.finish_reason == "tool_calls" else reply.finish_reason
    made = returns.read(value, "the answer")
    return replace(reply, text=text, tool_calls=(), finish_reason=reason, value=made, extra={})


def json_text(text: str) -> str:
    """The longest JSON object or list in an answer, else the answer as it is."""
    with suppress(ValueError):
        read_json(text)
        return text
    best, end, decoder = "", 0, json.JSONDecoder(**_STRICT)
    begins = (m.start() for m in re.finditer(r"[{\[]", text) if m.start() >= end)
    for begin in itertools.islice(begins, _JSON_ATTEMPTS):
        try:
            end = decoder.raw_decode(text, begin)[1]
        except (ValueError, RecursionError):
            if re.compile(_BEGUN_JSON).match(text, begin):
                return text  # cut or broken: what stands in it is not the answer
        else:
            # an object is what nearly everybody means
            best = max(best, text[begin:end], key=lambda t: (t[:1] == "{", len(t)))
    return best or text


# ---- replies: bytes and dicts to values ----

_FINISH_WORDS = {
    "stop": "end_turn stop_sequence eos eos_token stop",
    "tool_calls": "tool_use function_call tool_calls",
    "length": "max_tokens max_output_tokens length model_context_window_exceeded model_length",
    "content_filter": """safety content_filter recitation refusal blocklist prohibited_content spii
        image_safety""",
}
_FINISH_REASONS = {one: end for end, words in _FINISH_WORDS.items() for one in words.split()}
# The upstream failed while it wrote: what there is, is not an answer.
_FAILED_ENDS = """error network_error server_error malformed_function_call abort aborted canceled
    cancelled incomplete failed timeout rate_limit insufficient_system_resource other
    unknown""".split()
_FAKE_MODELS = ("fake", "costly", "abuse")
# Input, output, cached, written to the cache, all: the names that most use, Claude's and
# OpenRouter's (recorded).
_USAGE_KEYS = (
    ("prompt_tokens", "input_tokens", "prompt"),
    ("completion_tokens", "output_tokens", "completion"),
    ("cached_tokens", "cache_read_input_tokens", "input_cache_read"),
    ("cache_creation_input_tokens", "cache_write_tokens"),
    ("total_tokens",),
)


def _amount(source: Mapping[str, Any], *keys: str) -> int | float | None:
    return next(filter(_is_number, map(source.get, keys)), None)


def usage_from(body: Any) -> Usage:
    """A provider's usage object, under any of the three families of names, as a `Usage`."""
    if not isinstance(body, Mapping):
        return Usage()
    details: Any = body.get("prompt_tokens_details")
    # OpenAI's own shape counts cached tokens within the input; Puter beside it (recorded)
    is_within = isinstance(details, Mapping)
    body = {**details, **body} if is_within else body
    amounts = (_amount(body, *keys) for keys in _USAGE_KEYS)
    inputs, outputs, cached, written, total = (None if n is None else int(n) for n in amounts)
    times = (_amount(body, f"ephemeral_{minutes}_input_tokens") or 0 for minutes in ("5m", "1h"))
    written = int(sum(times)) or written
    if total is None and (inputs is not None or outputs is not None):
        beside = () if is_within else (cached, written)
        total = sum(n or 0 for n in (inputs, outputs, *beside))
    cents, cost = _amount(body, "usd_cents"), _amount(body, "cost_usd")
    cost = cost if cents is None else round(cents / 100, 12)
    return Usage(inputs, outputs, cached, total, cost, written)


def _finish_reason(word: Any, calls: Sequence[ToolCall]) -> str:
    """The provider's word in OpenAI's terms; calls are calls whatever it says."""
    word = word.strip() if isinstance(word, str) else ""
    reason = _FINISH_REASONS.get(word.lower(), word) or "stop"
    return "tool_calls" if calls and reason == "stop" else reason


def _add_call(call: Mapping[str, Any], calls: list[ToolCall]) -> ToolCall:
    """Put a call to the others of its reply; with a new id if it has none, or that of another."""
    read = tool_call_from(call)
    if not read.id or any(read.id == other.id for other in calls):
        read = replace(read, id=_new_id("call"))
    calls.append(read)
    return read


def _no_reply(what: str, body: Any) -> PuterError:
    """The error of a good status without a reply: the server's own, if the body is one."""
    error = body.get("error") if isinstance(body, Mapping) else None
    if not error:
        return ReplyError(what, raw=json.dumps(body)[:2_000])
    code: Any = error.get("code") if isinstance(error, Mapping) else None
    # OpenRouter's code is the status that it would have been
    return error_from(code if code in range(400, 600) else 502, body)


def reply_from(choice: Mapping[str, Any], usage: Any, model: str, body: JSON) -> Reply:
    """A reply from a message with its finish reason, in OpenAI's or Anthropic's shape."""
    message = choice.get("message")
    if not isinstance(message, Mapping):
        raise _no_reply("The reply has no message", body)
    content = message.get("content")
    # Claude's own word; beside it Puter always says "stop" (recorded)
    end = message.get("stop_reason") or choice.get("finish_reason")
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    calls: list[ToolCall] = []
    try:
        text = text_of(content) or message.get("refusal") or text_of(content, "refusal", "refusal")
        thinking = text_of(content, "thinking", "thinking")
        parts = content if isinstance(content, list) else ()
        uses = (part for part in parts if part.get("type") == "tool_use")
        for call in (*(message.get("tool_calls") or ()), *uses):
            _add_call(call, calls)
        images = tuple(map(picture_from, message.get("images") or ()))
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise _no_reply(f"The reply has an unknown format ({error})", body) from error
    # what must go back with the history, beside text and calls
    keys = ("reasoning_details", "reasoning") if message.get("reasoning_details") else ()
    extra = {key: message[key] for key in keys if message.get(key)}
    own = [p for p in parts if p.get("type") in ("text", "thinking", "redacted_thinking")]
    if any(part["type"] != "text" for part in own):
        extra["content"] = own
    text = mend_surrogates(str(text))
    reasoning = mend_surrogates(reasoning if isinstance(reasoning, str) else thinking)
    ended, used = _finish_reason(end, calls), usage_from(usage)
    reply = Reply(
        text, reasoning, tuple(calls), ended, used, model, raw=body, images=images, extra=extra
    )
    if reply.finish_reason.lower() in _FAILED_ENDS:
        problem = f"The provider of {model} failed while it wrote ({reply.finish_reason})"
        raise ReplyError(problem, raw=reply.text[:2_000], reply=reply)
    return reply


def picture_from(image: Any) -> Picture:
    """A picture of a reply, in whatever shape it comes; raises ValueError for anything else."""
    if (url := _image_url(image)) is None:
        raise ValueError(f"a picture is {_describe(image)}")
    if url[:5].lower() != "data:":
        return Picture(url=url)
    head, _, encoded = url.partition(",")
    is_base64 = head.lower().endswith(";base64")
    contents = base64.b64decode(encoded, validate=True) if is_base64 else b""
    if not contents:
        raise ValueError(f"a picture is {_describe(url)}")
    return Picture(contents, mime_of(contents) or head[5:].partition(";")[0])


def reply_from_driver(body: JSON, model: str) -> Reply:
    """The answer of `/drivers/call` as a `Reply`; raises `BadRequestError` for a blocked prompt.

    Puter answers a blocked prompt with its built-in fake model's lorem ipsum and HTTP 200:
    then another model than the asked one answered, and it says "fake-chat".
    """
    result, metadata = body.get("result"), body.get("metadata") or {}
    if not isinstance(result, Mapping) or not isinstance(metadata, Mapping):
        raise _no_reply("The reply has no result", body)
    is_fake = metadata.get("service_used") == "fake-chat"
    if is_fake and model not in _FAKE_MODELS:
        problem = f"Puter blocked this prompt to {model}: it answered with made-up text"
        code = "prompt_blocked"
        raise BadRequestError(problem, hint=_HINT_BY_CODE[code], code=code)
    answered = metadata.get("providerUsed") or model
    return reply_from(result, result.get("usage"), str(answered), body)


def reply_from_openai(body: JSON, model: str) -> Reply:
    """A `chat.completion` object as a `Reply`: of several choices the one of index 0."""
    choices = body.get("choices")
    choices = [c for c in choices if isinstance(c, Mapping)] if isinstance(choices, list) else []
    if not choices:
        raise _no_reply("The reply has no choices", body)
    choice = next((c for c in choices if c.get("index") in (0, None)), choices[0])
    return reply_from(choice, body.get("usage"), str(body.get("model") or model), body)


def chunks_of(reply: Reply) -> list[Chunk]:
    """A whole reply as the chunks that a stream of it would have had."""
    chunks = [Chunk("reasoning", reply.reasoning)] if reply.reasoning else []
    chunks += [Chunk("text", reply.text)] if reply.text else []
    chunks += [Chunk("image", image=image) for image in reply.images]
    chunks += [Chunk("tool_call", tool_call=call) for call in reply.tool_calls]
    return [*chunks, Chunk("usage", usage=reply.usage)]


def message_from(reply: Reply) -> JSON:
    """A reply as the assistant's message that goes back with the history."""
    calls = [openai_call(call) for call in reply.tool_calls]
    has_text = reply.text.strip() if calls else reply.text
    message: JSON = {"role": "assistant", "content": reply.text if has_text else None}
    if calls:
        message["tool_calls"] = calls
    if reply.images:
        urls = ({"url": image.as_url()} for image in reply.images)
        message["images"] = [{"type": "image_url", "image_url": url} for url in urls]
    return message | reply.extra


def reply_to_json(reply: Reply) -> JSON:
    """A reply as plain values, without its attempts and its `value`."""
    plain = asdict(replace(reply, attempts=(), raw={}, images=(), value=None))
    for name in ("attempts", "raw", "value"):
        del plain[name]
    return {**plain, "images": [image.as_url() for image in reply.images]}


def reply_from_json(data: JSON) -> Reply:
    """The reply that `reply_to_json` gave; raises KeyError or TypeError for anything else."""
    calls = tuple(ToolCall(**call) for call in data["tool_calls"])
    images = tuple(map(picture_from, data.get("images", ())))
    usage = Usage(**data["usage"])
    return Reply(**{**data, "tool_calls": calls, "usage": usage, "images": images})


class _TextBuffer:
    """A text that grows by pieces; a surrogate pair that is cut in two is joined again."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._half = ""

    def __str__(self) -> str:
        return self._buffer.getvalue().decode()

    def add(self, piece: str, is_last: bool = False) -> str:
        """The piece as it can be shown: the first half of a pair waits for the second."""
        if self._half or not piece.isascii():
            piece, self._half = self._half + piece, ""
            if "\ud800" <= piece[-1:] <= "\udbff" and not is_last:
                piece, self._half = piece[:-1], piece[-1]
            piece = mend_surrogates(piece)
        self._buffer.write(piece.encode())
        return piece


class _Decoder:
    """What both decoders of a stream gather; the bytes come from outside.

    `feed` gives the chunks that its piece completes, up to the first fault; the fault is kept
    in `error`, and nothing comes after it. `finish` says what the end of the bytes means: it
    sets `error` unless the stream had said itself that it was whole.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.error: PuterError | None = None
        self.whole = False
        self.usage = Usage()
        self._text = _TextBuffer()
        self._reasoning = _TextBuffer()
        self._calls: list[ToolCall] = []
        self._images: list[Picture] = []
        self._finish_word: str | None = None
        self._extra: list[JSON] = []

    def reply(self) -> Reply:
        calls, notes = self._calls, [e for e in self._extra if "extra_content" in e]
        # a signature on a line of its own
        if calls and notes and not any(call.extra_content for call in calls):
            calls = [replace(calls[0], extra_content=notes[0]["extra_content"]), *calls[1:]]
        text, reasoning, images = str(self._text), str(self._reasoning), tuple(self._images)
        ended = _finish_reason(self._finish_word, calls)
        raw: JSON = {"extra": self._extra} if self._extra else {}
        return Reply(
            text, reasoning, tuple(calls), ended, self.usage, self.model, raw=raw, images=images
        )

    def finish(self) -> list[Chunk]:
        if not self.whole:
            self.fail("the connection ended before the reply was whole")
        return []

    def fail(self, what: str, code: str | None = None) -> None:
        if self.error is None:
            problem = f"The reply of {self.model} broke off: {what}"
            hint = _HINT_BY_CODE.get(code or "")
            self.error = StreamError(problem, hint=hint, code=code, model=self.model)

    def _add_image(self, image: Any, chunks: list[Chunk]) -> None:
        self._images.append(picture_from(image))
        chunks.append(Chunk("image", image=self._images[-1]))

    def _complete(self, chunks: list[Chunk]) -> None:
        if str(self._finish_word).lower() in _FAILED_ENDS:
            self.fail(f"its provider failed while it wrote ({self._finish_word})")
            return
        self.whole = True
        if half := self._reasoning.add("", is_last=True):
            chunks.append(Chunk("reasoning", half))
        if half := self._text.add("", is_last=True):
            chunks.append(Chunk("text", half))
        chunks.append(Chunk("usage", usage=self.usage))


class LineDecoder(_Decoder):
    """Puter's stream: bytes in, one JSON object a line, split on `\\n` alone (recorded).

    `needs_usage` says whether an end without usage means that the answer was cut.
    """

    def __init__(self, model: str, needs_usage: Callable[[], bool] = lambda: False) -> None:
        super().__init__(model)
        self._needs_usage = needs_usage
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Chunk]:
        if self.error is not None:
            return []
        lines, line_end, start = data.rpartition(b"\n")
        chunks: list[Chunk] = []
        if line_end:
            chunks = self._read(bytes(self._buffer) + lines)
            self._buffer.clear()
        self._buffer += start
        if len(self._buffer) > MAX_LINE_BYTES:
            self.fail(f"a line is longer than {MAX_LINE_BYTES} bytes")
        return chunks

    def _read(self, block: bytes, problem: str = "a line is not what Puter sends") -> list[Chunk]:
        """The chunks of whole lines, up to the first fault. The one loop where speed counts."""
        chunks: list[Chunk] = []
        raw, add, decode = b"", self._text.add, _JSON.raw_decode
        try:
            for raw in block.split(b"\n"):
                line = raw.decode()
                if not line or line.isspace():
                    continue
                event, end = decode(line)
                if end != len(line) and not line[end:].isspace():
                    raise ValueError("there is something behind the object")
                if self.whole and event["type"] != "usage":
                    continue  # behind the end of the answer
                if event["type"] == "text":
                    chunks.append(Chunk("text", add(event["text"] or "")))
                else:
                    self._other(event["type"], event, chunks)
                    if self.error is not None:
                        break
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            self.fail(f"{problem}: {raw[:80].decode('utf-8', 'replace')!r}")
        return chunks

    def finish(self) -> list[Chunk]:
        """A last line without its line end counts, if it is whole."""
        chunks = [] if self.error else self._read(bytes(self._buffer), "the last line is cut off")
        return chunks + super().finish()

    def _other(self, kind: Any, event: JSON, chunks: list[Chunk]) -> None:
        if kind == "reasoning":
            chunks.append(Chunk("reasoning", self._reasoning.add(event["reasoning"] or "")))
        elif kind == "tool_use":
            chunks.append(Chunk("tool_call", tool_call=_add_call(event, self._calls)))
        elif kind == "image":
            self._add_image(event, chunks)
        elif kind == "usage":
            usage = event.get("usage")
            if not usage and self._needs_usage():
                self.fail("the model stopped before its answer was whole (its limit of tokens?)")
            elif usage == {"usd_cents": None} and self.model not in _FAKE_MODELS:
                self.fail("Puter blocked the prompt and sent made-up text", code="prompt_blocked")
            else:
                self.usage = usage_from(usage)
                self._finish_word = event.get("finish_reason") or self._finish_word
                self._complete(chunks)
        elif kind == "error":
            text = str(event.get("message") or "the server gave no reason")
            if not chunks_of(self.reply())[:-1]:
                # nothing had come but this: it is the error that a whole reply would have been
                self.error = upstream_error(text, self.model)
            self.fail(provider_error(text)[1])
        else:
            self._extra.append(event)  # extra_content, compaction and what may come


class EventDecoder(_Decoder):
    """An OpenAI-compatible stream: the data of Server-Sent Events in, as texts."""

    _open_calls: tuple[JSON, ...] = ()
    _has_choice = False

    def feed(self, data: str) -> list[Chunk]:
        chunks: list[Chunk] = []
        if self.error is not None or self.whole:
            return chunks
        try:
            if data.strip() != "[DONE]":
                self._frame(_JSON.decode(data), chunks)
            elif not self._has_choice:
                self.fail("it holds no answer")
            else:
                for call in self._open_calls:
                    chunks.append(Chunk("tool_call", tool_call=_add_call(call, self._calls)))
                self._complete(chunks)
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            self.fail(f"an event is not what an OpenAI endpoint sends: {data[:80]!r}")
        return chunks

    def _frame(self, frame: JSON, chunks: list[Chunk]) -> None:
        if frame.get("error"):
            error = frame["error"] if isinstance(frame["error"], dict) else frame
            code = error.get("code")
            message = str(error.get("message") or frame["error"])
            self.fail(message, code=code if isinstance(code, str) else None)
            return
        self.model = frame["model"] if _is_text(frame.get("model")) else self.model
        # `n` may have asked for several, and one is read
        for choice in (c for c in frame.get("choices") or () if c.get("index") in (0, None)):
            self._has_choice = True
            delta = choice.get("delta") or {}
            self._finish_word = choice.get("finish_reason") or self._finish_word
            if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
                chunks.append(Chunk("reasoning", self._reasoning.add(reasoning)))
            for text in filter(None, (delta.get("content"), delta.get("refusal"))):
                chunks.append(Chunk("text", self._text.add(text)))
            for image in delta.get("images") or ():
                self._add_image(image, chunks)
            for part in delta.get("tool_calls") or ():
                self._call_delta(part)
        if frame.get("usage"):
            self.usage = usage_from(frame["usage"])

    def _call_delta(self, part: JSON) -> None:
        """Put a piece of a call where its index says, unless it begins another call."""
        index, function = part.get("index"), part.get("function") or {}
        call = next((c for c in reversed(self._open_calls) if c["index"] == index), None)
        if call is None or _is_another(call, part.get("id"), function):
            call = {"index": index, "id": "", "function": {"name": "", "arguments": ""}}
            self._open_calls += (call,)
        call["id"] = call["id"] or part.get("id") or ""
        call["extra_content"] = call.get("extra_content") or part.get("extra_content")
        call["function"]["name"] = call["function"]["name"] or function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


def _is_another(call: JSON, call_id: Any, function: Mapping[str, Any]) -> bool:
    """Whether a piece of a call belongs to another one: some send every call under index 0."""
    ids, names = (call["id"], call_id), (call["function"]["name"], function.get("name"))
    if (all(ids) and ids[0] != ids[1]) or (all(names) and names[0] != names[1]):
        return True
    # the same name again, without an id, behind arguments that are whole
    before = call["function"]["arguments"].strip()
    is_again = not all(ids) and all(names) and bool(function.get("arguments") and before)
    return is_again and not _arguments_from(before)[1]


# ---- replies: the catalogue and credit ----


class ModelList(tuple[Model, ...]):
    """The catalogue; a model by any of its names, in any case, with or without `puter/`."""

    @cached_property
    def _by_name(self) -> dict[str, Model]:
        """An id counts before an alias, then who is first."""
        ids = {m.id.lower(): m for m in reversed(self)}
        return {n.lower(): m for m in reversed(self) for n in m.aliases} | ids

    def get(self, name: str) -> Model | None:
        return self._by_name.get(strip_puter_prefix(name).lower())

    def id_of(self, name: str) -> str:
        """The id behind a name; a name that is not known stays."""
        model = self.get(name)
        return model.id if model else name

    def find(self, name: str) -> Model:
        """The model of this name, or an error with near ones; a `:free` name is never made paid."""
        if model := self.get(name):
            return model
        wanted = strip_puter_prefix(name).lower()[:200]
        paid = self.get(wanted.removesuffix(":free"))
        near = [self._by_name[n].id for n in _near_names(wanted, self._by_name)]
        tail = wanted.rpartition("/")[2]
        near += [m.id for m in self if tail and tail in m.id.lower()]
        near = list(dict.fromkeys([*([paid.id] if paid else []), *near]))[:3]
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        if paid:
            hint = f"The model is not free any more: {paid.id} costs credit. "
        details = {"near": near, "model": name[:200], "code": "model_not_found"}
        hint += ModelNotFoundError.default_hint
        raise ModelNotFoundError(f"No model is called {name[:200]!r}", hint=hint, **details)


def models_from(body: Any) -> ModelList:
    """The catalogue of `/puterai/chat/models/details`, or OpenAI's list, as `Model`s."""
    entries = body.get("models", body.get("data")) if isinstance(body, Mapping) else None
    if not isinstance(entries, list) or not all(isinstance(e, (Mapping, str)) for e in entries):
        if isinstance(body, Mapping) and body.get("error"):
            raise _no_reply("", body)
        raise ServerError("The model list has an unknown format")
    models = []
    for entry in entries:
        try:
            models.append(_model_from({"id": entry} if isinstance(entry, str) else entry))
        except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
            _log.warning("An entry of the model list cannot be read: %r", error)
    return ModelList(models)


def _model_from(entry: Mapping[str, Any]) -> Model:
    costs: JSON = dict(entry["costs"]) if isinstance(entry.get("costs"), Mapping) else {}
    scale = 10_000 / (costs.pop("tokens", None) or 1_000_000)
    usd: Any = {key: round(cents * scale, 9) for key, cents in costs.items() if _is_number(cents)}
    modalities = entry.get("modalities") or {}
    others = entry.get("aliases")
    aliases = [entry.get("puterId"), *(others if isinstance(others, list) else ())]
    context, max_tokens = (_amount(entry, key) for key in ("context", "max_tokens"))
    if not _is_text(entry["id"]):
        raise ValueError(f"the id is {_describe(entry['id'])}")
    return Model(
        id=entry["id"],
        name=str(entry.get("name") or entry["id"]),
        provider=str(entry.get("provider") or entry.get("owned_by") or ""),
        aliases=tuple(dict.fromkeys(a for a in aliases if a and a != entry["id"])),
        context=None if context is None else int(context),
        max_tokens=None if max_tokens is None else int(max_tokens),
        inputs=tuple(modalities["input"]) if modalities.get("input") else None,
        tools=entry.get("tool_call"),
        # a price that cannot be read is still a price
        free=bool(costs) and len(usd) == len(costs) and not any(usd.values()),
        input_usd_per_million=usd.get(entry.get("input_cost_key")),
        output_usd_per_million=usd.get(entry.get("output_cost_key")),
        released=entry.get("release_date"),
        usd_per_image=usd.get("per-image") if len(costs) == 1 else None,
    )


def credit_from(body: Any) -> Credit:
    """The answer of `/metering/usage` as a `Credit`; raises `ServerError` for anything else."""
    info = body.get("allowanceInfo") if isinstance(body, Mapping) else None
    if not isinstance(info, Mapping) or "remaining" not in info:
        raise ServerError("The usage report has an unknown format")
    unit: Literal["usd", "credits"] = "credits" if info.get("unit") == "credits" else "usd"
    scale = 1.0 if unit == "credits" else 100_000_000.0  # dollars come in microcents
    usage: Any = body.get("usage") if isinstance(body.get("usage"), Mapping) else {}
    by_api = {}
    for name, row in usage.items():
        if isinstance(row, Mapping):
            cost, units, calls = (_amount(row, key) or 0 for key in ("cost", "units", "count"))
            by_api[name] = (cost / scale, units, int(calls))
    found = (info.get("monthUsageAllowance"), info.get("remaining"), usage.get("total"))
    allowance, remaining, used = ((n if _is_number(n) else 0) / scale for n in found)
    return Credit(unit, allowance, remaining, used, by_api, raw=dict(body))


# ======================================================================================
# 7. policies · uses: errors, values, config, messages. Plain functions that decide
# ======================================================================================
NextStep = Literal["raise", "next_model", "next_account"]
RETRY_CAP_S = 30.0
RATE_PAUSE_S = 0.25  # the least wait after a 429, so that nobody hammers
RATE_CAP_S = 1.5  # the longest wait for a limit of requests whose end is not told
RATE_WINDOW_S = 10.0  # Puter counts the requests of the last 10 s (recorded)
RATE_PATIENCE_S = 30.0  # how long a limit of requests is waited for, when nobody else can be asked
FALLBACKS_PER_CALL = 5
FALLBACK_BUDGET_S = 120.0  # no further fallback is begun after so long
MAX_REFUSALS_PER_PROVIDER = 2
# Whose models read a PDF, and search the web; of the others nothing is known (recorded).
_PDF_PROVIDERS = frozenset(
    "claude openai-responses azure-openai-responses openai-completion azure-openai openrouter".split()
)
SEARCH_PROVIDERS = _PDF_PROVIDERS - {"claude", "openrouter"}


def retry_delay_s(
    error: PuterError, retry: int, base_s: float, rand: Callable[[], float] | None = None
) -> float:
    """How long to wait after an error before sending again, in seconds.

    `retry` counts from 1: base, twice, four times… up to `RETRY_CAP_S`, each shortened by up to
    a quarter (by `rand`, from 0 to 1) so that clients do not come back in step. A server's
    `Retry-After` wins; `may_retry` has seen that it is not too long. A limit of requests is
    waited for in steps from `RATE_PAUSE_S` to `RATE_CAP_S`.
    """
    import random

    delay_s = error.retry_after_s
    if delay_s is None:
        jitter = 1.0 - (rand or random.random)() / 4
        # a place among the requests of a window is free in under a second
        cap_s = RATE_CAP_S if isinstance(error, RateLimitError) else RETRY_CAP_S
        delay_s = min(cap_s, base_s * 2.0 ** (retry - 1)) * jitter
    return max(delay_s, RATE_PAUSE_S) if isinstance(error, RateLimitError) else delay_s


def may_retry(
    error: PuterError,
    retries: int,
    max_retries: int,
    waits_out_limits: bool,
    waited_s: float,
    streaming: bool = False,
    waiting: int = 0,
) -> bool:
    """Whether to send the same request to the same account once more.

    `retries` have been made already. A broken server gets `max_retries` more, a model's
    provider one. What the server may have worked for, and billed, is sent again only for a
    stream, and once. A rate limit is waited for only where no other account is left
    (`waits_out_limits`), for longer than Puter's window, and the longer the more calls are
    `waiting`. What asks for a longer wait than we ever wait is not sent again.
    """
    is_over = error.is_final or (error.retry_after_s or 0) > RETRY_CAP_S
    if not error.retryable or max_retries == 0 or is_over:
        return False
    if error.may_be_billed:
        return streaming and retries < 1
    if isinstance(error, RateLimitError):
        patience_s = RATE_PATIENCE_S + RATE_WINDOW_S * waiting
        return waits_out_limits and (retries < max_retries or waited_s < patience_s)
    return retries < (1 if error.scope == "model" else max_retries)


def next_step(error: PuterError, is_fallback: bool, may_fall_back: bool) -> NextStep:
    """Where to go when an account cannot answer with a model, after its retries.

    A fallback that refuses the request says nothing of the asked model: on to the next. An
    unknown name is looked up. A prompt too long for Puter's limit may fit another model.
    """
    if error.is_final or error.may_be_billed or isinstance(error, ReplyError):
        # what is done and may be billed is not repeated
        return "raise"
    if error.scope == "account":
        return "next_account"
    is_too_long = isinstance(error, ContextLengthError) and bool(error.tokens) and may_fall_back
    refuses = error.scope == "model" or (error.scope == "request" and is_fallback)
    is_other_model = refuses or is_too_long or isinstance(error, ModelNotFoundError)
    return "next_model" if is_other_model else "raise"


def depends_on_account(error: PuterError | None) -> bool:
    """Whether another account may succeed with the model that failed so on this one."""
    return error is not None and (error.scope == "account" or isinstance(error, ModelAccessError))


def is_worth_trying(model: Model, attempts: Sequence[Attempt], models: ModelList) -> bool:
    """Whether a fallback may help after these attempts of one call.

    Not one that failed by its own fault, whatever the account; nor one of a provider whose
    limit was met `MAX_REFUSALS_PER_PROVIDER` times.
    """
    if any(a.model == model.id and a.error and not depends_on_account(a.error) for a in attempts):
        return False
    limited = [models.get(a.model) for a in attempts if isinstance(a.error, ModelRateLimitError)]
    refusals = sum(one is not None and one.provider == model.provider for one in limited)
    return refusals < MAX_REFUSALS_PER_PROVIDER


# ---- which models ----


def fallback_order(
    model: str,
    candidates: ModelList,
    cooled: Collection[str],
    needs: Needs | None = None,
    listed: Sequence[str] = DEFAULT_FALLBACK_MODELS,
    is_stale: bool = False,
) -> list[Model]:
    """The models to try when `model` fails, best first.

    `candidates` is the live catalogue. First the `listed` ones that it knows, then its other
    free models; none that is on cooldown (`cooled`), none that cannot do what the request
    `needs`. A model that costs money is here only if the user listed it: of the built-in list
    only what is still free counts. What an `is_stale` list calls free may cost by now, but for
    names that say it.
    """
    known = [m for m in map(candidates.get, listed) if m]
    own = [m.id for m in known] if tuple(listed) != DEFAULT_FALLBACK_MODELS else []
    skipped = {candidates.id_of(name) for name in (model, *cooled)}
    unique = {m.id: m for m in (*known, *candidates)}
    wanted = []
    for m in unique.values():
        is_free = m.free and (m.id.endswith(":free") or not is_stale)
        if (is_free or m.id in own) and m.id not in skipped and can_do(m, needs or Needs()):
            wanted.append(m)
    return wanted


def can_do(model: Model, needs: Needs) -> bool:
    """Whether a model can take the request; what the catalogue does not say may be so."""
    has_tools = not needs.tools or model.tools is not False
    return has_tools and fits(model, needs.context) and not lacking(model, needs)


def fits(model: Model, tokens: int) -> bool:
    """Whether Puter lets a model be asked with a prompt of so many (estimated) tokens."""
    return model.window is None or tokens < model.window


def with_true_end(reply: Reply, model: Model | None, args: JSON) -> Reply:
    """The reply, ended by "length" if it has all the tokens that it might: few providers say so.

    It may have what was asked for, and what Puter leaves a paid model (recorded).
    """
    tokens = reply.usage.output_tokens
    if reply.finish_reason != "stop" or not tokens:
        return reply
    limits = [args["max_tokens"]] if _is_number(args.get("max_tokens")) else []
    if model and model.max_tokens and model.output_usd_per_million:
        limits.append(model.max_tokens - estimated_tokens(args["messages"]))
    is_cut = tokens >= min(limits, default=math.inf)
    return replace(reply, finish_reason="length") if is_cut else reply


def cost_of(reply: Reply, model: Model | None, messages: Sequence[JSON]) -> float | None:
    """What an answer cost in US dollars: as it says, else by its tokens; None if nobody knows."""
    usage = reply.usage
    if usage.cost_usd is not None or model is None:
        return usage.cost_usd
    sent, answered = usage.input_tokens, usage.output_tokens
    sent = estimated_tokens(messages) if sent is None else sent
    answered = _part_tokens({"type": "text", "text": reply.text}) if answered is None else answered
    prices = (model.input_usd_per_million, model.output_usd_per_million)
    costs = [n * price / 1e6 for n, price in zip((sent, answered), prices) if price is not None]
    return sum(costs) if len(costs) == 2 else None


def lacking(model: Model, needs: Needs) -> list[str]:
    """What the model cannot do with the request, in words; nothing for an unknown provider."""
    provider, wanted = model.provider, needs.inputs if model.provider else ()
    can = {
        ("image", "see images"): model.inputs is None or "image" in model.inputs,
        ("pdf", "read PDFs"): provider in _PDF_PROVIDERS,
        ("puter_path", "read files that are stored at Puter"): provider == "claude",
        ("web search", "search the web"): provider in SEARCH_PROVIDERS,
    }
    return [what for (kind, what), ok in can.items() if kind in wanted and not ok]


# ---- whom to ask next ----


def next_account(
    accounts: Sequence[Account], cooled: Collection[str], strategy: str, current: str | None
) -> Account | None:
    """The account to use, or None when all are on cooldown (`cooled`).

    `current` stays while it may be used; else "round-robin" takes the next in order and
    "least-recently-used" the one whose last use is longest ago.
    """
    names = [a.username for a in accounts]
    if current in names and current not in cooled:
        return accounts[names.index(current)]
    start = names.index(current) + 1 if current in names else 0
    order = [*accounts[start:], *accounts[:start]]
    if strategy == "least-recently-used":
        order = sorted(accounts, key=lambda a: a.last_used_ms or 0)
    return next((a for a in order if a.username not in cooled), None)


class Asked(NamedTuple):
    """One request as the caller made it, checked; `args` in OpenAI's words, for any provider."""

    model: str
    args: JSON
    needs: Needs
    fallback: bool
    # as the caller asked; None is the setting's
    timeout_s: float | None = None
    # what the answer is checked by, and whether its form is asked for
    returns: Returns | None = None
    is_typed: bool = False
    # what comes of it: the answer of a chat, or one of the jobs' results
    makes: type[Any] = Reply


class World(NamedTuple):
    """What decides who is asked, read once a decision."""

    accounts: Sequence[Account]
    cooldowns: Sequence[Cooldown]
    models: ModelList
    config: Config
    current: str | None = None
    now: float = 0.0
    elapsed_s: float = 0.0
    is_stale: bool = False
    # whether the budget is spent: then only what is free may be asked
    is_spent: bool = False

    def others(self, account: Account) -> set[str]:
        """Who could take its place, now or later: all whose token is not dead."""
        dead = {c.account for c in self.cooldowns if c.reason == "login"}
        return {a.username for a in self.accounts} - dead - {account.username}


class Target(NamedTuple):
    """Whom to ask, and when; `waits_out_limits` if no other account could, or is left to, help."""

    model: str
    account: Account
    is_fallback: bool = False
    waits_out_limits: bool = False
    not_before_s: float = 0.0


def next_target(asked: Asked, attempts: Sequence[Attempt], world: World) -> Target | None:
    """Whom to ask next, after all that was tried; None when nobody could help any more.

    First the asked model on the current account, then its fallbacks there; when the account
    itself is limited, the next account, beginning again with the asked model. When nobody is
    left but accounts whose limit lasts seconds, the one whose window ends first, once.
    """
    visits = [(name, list(visit)) for name, visit in groupby(attempts, lambda a: a.account)]
    tried = {name for name, _ in visits}

    def leaves(one: Attempt) -> bool:
        error = one.error
        return error is not None and next_step(error, False, asked.fallback) == "next_account"

    # an account is asked again after it was left; what it has not left are retries
    pairs = itertools.pairwise(attempts)
    comes_back = any(a.account == b.account and leaves(a) for a, b in pairs)
    is_second_round = len(visits) > len(tried) or comes_back
    name, visit = visits[-1] if visits else ("", [])
    same = next((a for a in world.accounts if a.username == name), None)
    if same is not None and not leaves(visit[-1]):
        target = _next_model(asked, visit, attempts, same, world)
        if target is not None:
            return target._replace(waits_out_limits=True) if is_second_round else target
        if not any(depends_on_account(a.error) for a in visit):
            # the models failed by themselves: another account would meet the same
            return None
    if is_second_round:
        return None
    cooled = {c.account for c in world.cooldowns if not c.model}
    # the last usable account is asked during its cooldown as well
    last = [a.username for a in world.accounts if not world.others(a)]
    cooled -= {world.current} if world.current in last else {*last[:1]}
    strategy = world.config.account_rotation_strategy
    if account := next_account(world.accounts, cooled | tried, strategy, world.current):
        return _next_model(asked, [], attempts, account, world)
    soon_s = world.now + RATE_PAUSE_S
    ends = {a.account: soon_s for a in attempts if isinstance(a.error, RateLimitError)}
    for cooldown in world.cooldowns:
        if cooldown.reason == "too_many_requests" and not cooldown.model:
            ends[cooldown.account] = cooldown.since_s + RATE_WINDOW_S
    limited = [a for a in world.accounts if a.username in ends and world.others(a)]
    if not limited or not world.config.max_retries:
        return None
    account = min(limited, key=lambda a: ends[a.username])
    not_before_s = ends[account.username]
    return Target(asked.model, account, waits_out_limits=True, not_before_s=not_before_s)


def _next_model(
    asked: Asked,
    visit: Sequence[Attempt],
    attempts: Sequence[Attempt],
    account: Account,
    world: World,
) -> Target | None:
    """The model to ask on this account after this visit to it."""
    own = Target(asked.model, account, waits_out_limits=not world.others(account))
    names = {asked.model, world.models.id_of(asked.model)}
    cooled = {c.model for c in world.cooldowns if c.account == account.username and c.model}
    if not visit and (names.isdisjoint(cooled) or not asked.fallback):
        return own
    if not asked.fallback:
        return None
    needs = asked.needs._replace(context=estimated_tokens(asked.args["messages"]))
    listed, is_stale = world.config.fallback_models, world.is_stale
    fallbacks = fallback_order(asked.model, world.models, cooled, needs, listed, is_stale)
    if not visit and not fallbacks:
        # despite its cooldown
        return own
    if visit and isinstance(visit[-1].error, ModelNotFoundError) and visit[-1].model in names:
        return None
    tried, here = {a.model for a in attempts} - names, {a.model for a in visit}
    if world.elapsed_s > FALLBACK_BUDGET_S or len(tried) >= FALLBACKS_PER_CALL:
        return None
    left = (m for m in fallbacks if m.id not in here and (m.free or not world.is_spent))
    found = next((m for m in left if is_worth_trying(m, attempts, world.models)), None)
    return own._replace(model=found.id, is_fallback=True) if found else None


# ---- statistics, and the search in a catalogue ----


def stats_of(model: str, totals: Sequence[Any], samples: Sequence[Any]) -> ModelStats:
    """The statistics of a model, from what `State.metrics` gives of it."""
    counts = {outcome: count for outcome, count, _ in totals}
    timed = [(tokens, seconds) for seconds, _, tokens in samples if tokens and seconds]
    seconds = sum(s for _, s in timed)
    return ModelStats(
        model=model,
        requests=sum(counts.values()),
        successes=counts.get("ok", 0),
        failures={k: v for k, v in counts.items() if k not in ("ok", "closed")},
        p50_s=percentile([s[0] for s in samples], 50),
        p95_s=percentile([s[0] for s in samples], 95),
        first_s=percentile([s[1] for s in samples if s[1] is not None], 50),
        tokens_per_s=sum(t for t, _ in timed) / seconds if seconds else None,
        cost_usd=sum(cost for *_, cost in totals),
        times=tuple(s[0] for s in samples[:16])[::-1],
    )


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that so many percent of all do not exceed; None for an empty list."""
    rank = max(1, -int(-len(values) * percent // 100))
    return sorted(values)[rank - 1] if values else None


def matching_models(models: Sequence[Model], text: str | None) -> list[Model]:
    """The models that have the text in one of their names, in any case."""
    wanted = (text or "").lower()
    return [m for m in models if any(wanted in n.lower() for n in (*m.names(), m.name))]


def is_from(model: Model, provider: str) -> bool:
    """Whether a model is of a provider, by the catalogue's name or the vendor in its names."""
    names = [name.lower() for name in model.names()]
    vendors = {part for name in names for part in re.split(r"[:/]", name)[:-1]}
    return provider.lower() in {model.provider.lower(), *vendors}


# ======================================================================================
# 8. transport · uses: errors, config, messages. Alone knows requests
# ======================================================================================
_PIECE_BYTES = 64 * 1024
CONNECT_TIMEOUT_S = 10.0
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_REDIRECTS = 5
# What decides on proxies and certificates.
_NETWORK_VARIABLES = [f"{name}_proxy" for name in ("http", "https", "all", "no")]
_NETWORK_VARIABLES += [*map(str.upper, _NETWORK_VARIABLES), "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"]
_OPENAI_PATH = "/puterai/openai/v1"


def _origin_and_path(url: str) -> tuple[tuple[str, str, int | None], str]:
    """((scheme, host, port) of a URL, as one compares them; its path without a slash at its end)"""
    parts = urlsplit(url)
    port = {"http": 80, "https": 443}.get(parts.scheme)
    return (parts.scheme, parts.hostname or "", parts.port or port), parts.path.rstrip("/")


def is_foreign(config: Config) -> bool:
    """Whether requests go to an OpenAI-compatible server that is not Puter's.

    Puter's are `api.puter.com`, `api.puter.localhost` and the origin that belongs to
    `gui_base_url` (the same, or with `api.` before its host); tokens of Puter go to no other.
    Raises `ConfigError` for another one whose path does not say that it is an OpenAI-compatible
    server.
    """
    if config.api_style != "openai":
        return False
    origin, path = _origin_and_path(config.api_base_url)
    if path not in ("", _OPENAI_PATH):
        return True
    (scheme, host, port), _ = _origin_and_path(config.gui_base_url)
    own = [(scheme, host, port), (scheme, f"api.{host}", port), ("https", "api.puter.com", 443)]
    # `api.puter.localhost`: where a Puter server of one's own is by default (recorded)
    if origin in own or origin[1] == "api.puter.localhost":
        return False
    problem = "is not Puter's server, and does not name an OpenAI-compatible one"
    hint = f"Write {_api_origin(config)}/v1 for an OpenAI-compatible server; "
    hint += "for a Puter server of your own set gui_base_url, too."
    raise ConfigError(f"api_base_url: {config.api_base_url} {problem}", hint=hint)


def _api_origin(config: Config) -> str:
    return config.api_base_url.removesuffix(_OPENAI_PATH)


def _hang_up(connections: Iterable[Any]) -> None:
    for connection in connections:
        with suppress(OSError):  # it may be closed already
            connection.shutdown(2)  # SHUT_RDWR: nothing can be imported at the interpreter's end


class _InFlight:
    """One call in flight, so that another thread can end it, even before its headers."""

    # the call that a thread's connections work for
    current = threading.local()

    def __init__(self) -> None:
        # re-entrant: a stream may be dropped, and so closed, at any time
        self._lock = threading.RLock()
        self.cancelled = threading.Event()
        # where a thread may wait for its turn
        self.waker: threading.Condition | None = None
        self.timeout_s = 0.0
        # whether a byte of the request may have been sent
        self.has_sent = True
        self._pid = os.getpid()
        self._connection: Any = None
        self._response: Any = None

    def cancel(self) -> None:
        """End the call: a thread that waits for its bytes wakes up."""
        self.cancelled.set()
        if self.waker is not None:
            with self.waker:
                self.waker.notify_all()
        with self._lock:
            # http.client takes a socket from its connection when the body ends with it, and
            # gives it back after the last byte: another call may use the connection then
            reader = getattr(getattr(self._response, "_fp", None), "fp", None)
            sock = getattr(getattr(reader, "raw", None), "_sock", None)
            sock = sock or getattr(self._connection, "sock", None)
            if sock is not None and self._pid == os.getpid():
                # a forked child would end the parent's answer
                _hang_up([sock])

    @contextmanager
    def as_current(self, timeout_s: float, is_ours: bool) -> Iterator[None]:
        """While inside, this thread's connections work for this call; ours note that they send."""
        self.current.call, self.timeout_s, self.has_sent = self, timeout_s, not is_ours
        try:
            yield
        finally:
            self.current.call = None
            self.attach()

    def attach(self, connection: Any = None, response: Any = None) -> None:
        """What carries the call: a connection, then the response; nothing once it is read."""
        with self._lock:
            self._connection, self._response = connection, response
        if self.cancelled.is_set():
            self.cancel()


class _Cancellable:
    """Mixed into urllib3's connection classes: reports to the `_InFlight` of its thread."""

    sock: Any
    connect: Callable[[], None]

    def request(self, *args: Any, **kwargs: Any) -> None:
        call: _InFlight = _InFlight.current.call
        if self.sock is None:
            self.connect()
        call.attach(connection=self)
        # urllib3 would leave the (short) time for connecting on the socket
        self.timeout = call.timeout_s
        call.has_sent = True
        super().request(*args, **kwargs)  # type: ignore[misc]


def _new_session() -> requests.Session:
    from http.cookiejar import DefaultCookiePolicy

    try:
        import requests
    except ImportError as error:
        hint = "Run: pip install requests sseclient-py"
        raise ConfigError("The package `requests` is missing", hint=hint) from error
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):
        def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
            pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
            if "ConnectionCls" not in vars(pool):
                pool.ConnectionCls = type("Cancellable", (_Cancellable, pool.ConnectionCls), {})
            return pool

    class Session(requests.Session):
        """Reads proxies and certificates from the environment again when that has changed."""

        def merge_environment_settings(self, url: Any, proxies: Any, *more: Any) -> Any:
            origin, _ = _origin_and_path(url)
            key = (origin, *more, *map(os.environ.get, _NETWORK_VARIABLES))
            if proxies or self.proxies or key not in settings:
                settings[key] = super().merge_environment_settings(url, proxies, *more)
            return dict(settings[key])

    settings: dict[Any, Any] = {}
    session = Session()
    # else what comes with a redirect would be read to its end, if it has one
    session.get_redirect_target = lambda resp: None  # type: ignore[method-assign]
    # accounts do not mix
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter(pool_connections=8, pool_maxsize=256))
    return session


class _Transport:
    """HTTP to one server; no decisions, no policies. Safe between threads and after a fork."""

    def __init__(self, config: Config, session: requests.Session | None = None) -> None:
        if session is not None and not hasattr(session, "request"):
            hint = "Pass a requests.Session, or nothing."
            raise ConfigError(f"session is {_describe(session)}", hint=hint)
        self._config = config
        self._session, self._is_ours = session, session is None
        self._lock = threading.RLock()

    def send(
        self,
        method: str,
        url: str,
        *,
        token: str = "",
        body: Any = None,
        timeout_s: float | None = None,
        cancellation: _InFlight | None = None,
        leaves_open: Callable[[requests.Response], bool] | None = None,
    ) -> requests.Response:
        """Send one request with `body` as JSON.

        The response's content is read, bounded, and without the token; one that it
        `leaves_open` is the caller's to read and close.
        """
        cancellation = cancellation or _InFlight()
        timeout_s = timeout_s or self._config.api_timeout_ms / 1000
        # the token must not follow to another host
        options: JSON = {"allow_redirects": False, "auth": partial(_signed, token=token)}
        if body is not None:
            options |= {"data": _encoded(body), "headers": {"Content-Type": "application/json"}}
        times = (min(CONNECT_TIMEOUT_S, timeout_s), timeout_s)
        in_flight = cancellation.as_current(timeout_s, self._is_ours)
        with self._lock:
            session = self._session = self._session or _new_session()
        with _our_errors(url, timeout_s, cancellation), in_flight:
            response = session.request(method, url, timeout=times, stream=True, **options)
        cancellation.attach(response=response.raw)
        if leaves_open is not None and leaves_open(response):
            return response
        try:
            self._read(response, timeout_s, token)
        finally:
            response.close()
            cancellation.attach()
        return response

    def _read(self, response: requests.Response, timeout_s: float, token: str) -> None:
        data = bytearray()
        try:
            _read_into(data, response, timeout_s, MAX_BODY_BYTES)
        except PuterError as error:
            # a whole JSON without its frame's end is an answer
            if _json_or_none(data.decode("utf-8", "replace")) is None:
                if response.status_code == 200:
                    # it was worked for, and billed: nobody asks for it again
                    raise ReplyError(f"The answer broke off: {error.message}") from error
                raise
        # byte by byte: it may be a sound
        response._content = without_token(data.decode("latin-1"), token).encode("latin-1")
        response.headers["Location"] = without_token(response.headers.get("Location", ""), token)

    def download(self, url: str, cancellation: _InFlight | None = None) -> tuple[bytes, str]:
        """(contents, MIME type) of a public URL, up to `MAX_FILE_BYTES`; no token is sent."""
        data, until = bytearray(), time.monotonic() + self._config.api_timeout_ms / 1000
        how: JSON = {"cancellation": cancellation, "leaves_open": lambda response: True}
        try:
            # each redirect is a request of its own: no password of ~/.netrc goes along
            for _ in range(MAX_REDIRECTS + 1):
                left_s = max(0.001, until - time.monotonic())
                with self.send("GET", url, timeout_s=left_s, **how) as response:
                    if not response.is_redirect:
                        _read_into(data, response, left_s, MAX_FILE_BYTES)
                        break
                    with _our_errors(url, left_s):
                        url = urljoin(url, response.headers["Location"])
        except NetworkError as error:
            error.hint = "Check the URL and the network."
            raise
        if response.status_code != 200:
            raise BadRequestError(f"{url} answered {response.status_code}", hint="Check the URL.")
        return bytes(data), content_type(response)

    def close(self) -> None:
        """Close the connections of our own session; the caller's is the caller's to close."""
        with self._lock:
            if self._is_ours and self._session is not None:
                self._session.close()
                self._session = None


def without_token(text: str, token: str) -> str:
    """A server's text without the token: some show the request in their pages and errors.

    Short keys stay: replacing them would garble the text.
    """
    return text.replace(token, "<token>") if len(token) >= 10 else text


@contextmanager
def _our_errors(
    url: str, timeout_s: float, cancellation: _InFlight | None = None
) -> Iterator[None]:
    """Turns what requests, urllib3 and the socket raise into our errors.

    What fails before a byte of the request was sent cannot have been billed.
    """
    try:
        yield
    except PuterError:
        raise
    except Exception as error:
        is_unsent = cancellation is not None and not cancellation.has_sent
        failure = _network_error(error, url, timeout_s, is_unsent)
        if not isinstance(failure, PuterError):
            # somebody else's error keeps its own cause
            raise failure from failure.__cause__
        raise failure from error


def _read_into(data: bytearray, response: requests.Response, timeout_s: float, limit: int) -> None:
    until = time.monotonic() + timeout_s
    for piece in stream_pieces(response, timeout_s):
        data += piece
        if len(data) > limit:
            raise ServerError(f"The answer is larger than {limit:,} bytes")
        if time.monotonic() > until:
            problem = f"The answer was not complete after {timeout_s:g} s"
            raise RequestTimeoutError(problem, may_be_billed=True)


def stream_pieces(response: requests.Response, timeout_s: float) -> Iterator[bytes]:
    """The body's decoded bytes the moment they arrive, whatever frames it; raises our errors."""
    raw = response.raw
    with _our_errors(response.url, timeout_s):
        if getattr(raw, "chunked", False) and hasattr(raw, "stream"):
            yield from raw.stream(_PIECE_BYTES, decode_content=True)
        elif hasattr(raw, "read1") and hasattr(raw, "decode_content"):
            while piece := raw.read1(_PIECE_BYTES, decode_content=True):
                yield piece
        else:
            # an urllib3 before 2, or a recorded response: small pieces, so that none waits long
            yield from response.iter_content(256)


def stream_events(response: requests.Response, timeout_s: float) -> Iterator[str]:
    """The data of each Server-Sent Event; raises our errors."""
    try:
        from sseclient import SSEClient

        SSEClient.events  # noqa: B018 (another package of this name has none)
    except (ImportError, AttributeError) as error:
        problem = "The package `sseclient-py` is missing, or hidden by another called `sseclient`"
        hint = "Run: pip uninstall sseclient; pip install --force-reinstall sseclient-py"
        raise ConfigError(problem, hint=hint) from error
    size = 0

    def pieces() -> Iterator[bytes]:
        nonlocal size
        for piece in stream_pieces(response, timeout_s):
            size += len(piece)
            if size > MAX_LINE_BYTES:
                raise StreamError(f"An event is longer than {MAX_LINE_BYTES} bytes")
            yield piece

    try:
        for event in SSEClient(pieces()).events():
            size = 0
            yield event.data
    except UnicodeDecodeError as error:
        raise StreamError("The stream is not UTF-8") from error


def _network_error(
    error: Exception, url: str, timeout_s: float, is_unsent: bool = False
) -> Exception:
    """What a failure of requests, urllib3 or the socket means, as one of our errors."""
    import http.client

    import requests.exceptions as rq
    import urllib3.exceptions as u3

    if isinstance(error, rq.RequestException):
        # its headers hold the token
        error.request = error.response = None
    host, cause = url.split("?")[0], _root_cause(error)
    words = str(cause).split("Failed to establish a new connection: ")[-1]
    words = re.sub(r"^<[^>]*>:? ?|^HTTPS?Connection\([^)]*\): ", "", words)
    reason = words[:200] or type(cause).__name__
    if isinstance(cause, TimeoutError) and cause.errno is None and "timed out" not in str(cause):
        # somebody else's, such as a signal handler's
        return cause
    is_timeout = isinstance(error, (rq.Timeout, u3.TimeoutError, TimeoutError))
    if isinstance(error, rq.ConnectTimeout) or (is_timeout and is_unsent):
        longest_s = min(CONNECT_TIMEOUT_S, timeout_s)
        problem = f"{host} did not accept a connection within {longest_s:g} s"
        return RequestTimeoutError(problem, hint=NetworkError.default_hint)
    if is_timeout:
        return RequestTimeoutError(f"{host} was silent for {timeout_s:g} s", may_be_billed=True)
    if isinstance(error, (rq.SSLError, u3.SSLError)) or "CERTIFICATE" in reason:
        hint = "Check the clock, the certificates (REQUESTS_CA_BUNDLE) and `api_base_url`."
        return NetworkError(f"The TLS connection to {host} failed ({reason})", hint=hint)
    if isinstance(error, rq.ProxyError):
        return NetworkError(f"The proxy on the way to {host} failed ({reason})")
    if isinstance(error, rq.InvalidSchema) and "SOCKS" in str(error):
        hint = "Run: pip install 'requests[socks]'"
        return ConfigError("A SOCKS proxy is set, but PySocks is not installed", hint=hint)
    if isinstance(error, (rq.InvalidURL, rq.InvalidSchema, rq.MissingSchema)):
        return ConfigError(f"{host} is not a URL to call", hint="Correct `api_base_url`.")
    ours = (rq.RequestException, u3.HTTPError, http.client.HTTPException, OSError)
    # A socket closed by another thread shows as an attribute or value error inside urllib3.
    if not isinstance(error, (*ours, AttributeError, ValueError)):
        return error
    failure = NetworkError(f"The connection to {host} failed ({reason})")
    is_unknown, name = "resolve" in str(error), urlsplit(url).hostname or ""
    failure.may_be_billed = not (is_unsent or is_unknown or "Failed to establish" in str(error))
    if is_unknown and name.endswith(".localhost"):
        failure.hint = f"Add a line to the hosts file: 127.0.0.1 {name}"
    return failure


def _root_cause(error: BaseException) -> BaseException:
    wrapped = [getattr(error, "reason", None), *error.args[::-1], error.__cause__]
    inner = next((e for e in wrapped if isinstance(e, BaseException)), None)
    return error if inner is None else _root_cause(inner)


def _signed(request: Any, token: str) -> Any:
    """The request with our headers; given as `auth`, so that no ~/.netrc overrides the token."""
    if not re.fullmatch(r"[!-~]*", token):
        hint = "Copy it again, whole and alone; or sign in with `python -m puter login`."
        raise AuthError("The token contains a space or a character that is not ASCII", hint=hint)
    if token:
        request.headers["Authorization"] = f"Bearer {token}"
    if "python-requests" in str(request.headers.get("User-Agent", "python-requests")):
        # a session of the caller's may have one of its own
        request.headers["User-Agent"] = f"puter.py/{__version__}"
    return request


def _encoded(body: Any) -> bytes:
    """A request's JSON in UTF-8; raises `BadRequestError` for what it cannot hold, or take.

    A half of a surrogate pair becomes U+FFFD: no provider takes it.
    """
    try:
        text = json.dumps(body, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        hint = "Pass texts, numbers, booleans, lists and dicts."
        problem = f"The request cannot be written as JSON ({error})"
        raise BadRequestError(problem, hint=hint) from error
    data = mend_surrogates(text).encode()
    if len(data) > MAX_SENT_BYTES:
        message = f"The request has {len(data):,} bytes, but Puter takes {MAX_SENT_BYTES:,}"
        raise BadRequestError(message, hint="Send fewer or smaller files.", status=413)
    return data


def body_of(response: requests.Response) -> JSON:
    """The JSON object of a good response; raises the error that a bad one stands for."""
    text = response.content.decode("utf-8", "replace")
    data = _json_or_none(text)
    status = response.status_code
    if status >= 400 or (isinstance(data, dict) and data.get("success") is False):
        details = {"retry_after_s": _seconds(response.headers.get("Retry-After", ""))}
        details["is_final"] = response.headers.get("x-should-retry") == "false"
        raise error_from(status, text if data is None else data, **details)
    if status >= 300:
        message = f"The server redirects to {response.headers.get('Location')}"
        hint = "Nothing was sent there. Set `api_base_url` to the right URL."
        raise ServerError(message, status=status, hint=hint)
    if not isinstance(data, dict):
        start, kind = " ".join(text[:200].split()), content_type(response) or "something"
        message = f"{response.url} answered {kind} instead of a JSON object: {start!r}"
        hint = "Check `api_base_url` and any proxy on the way."
        raise ReplyError(message, status=status, raw=text[:2_000], hint=hint)
    return data


def content_type(response: requests.Response) -> str:
    """The MIME type of a response, without its parameters; "" if it has none."""
    return str(response.headers.get("Content-Type", "")).split(";")[0].strip().lower()


def is_stream(response: requests.Response) -> bool:
    """Whether a response is a good one, and a stream of one of the two kinds that we read."""
    kind = content_type(response)
    is_known = kind == "text/event-stream" or "ndjson" in kind or "jsonl" in kind
    return is_known and response.status_code == 200


def _seconds(retry_after: str) -> float | None:
    """A Retry-After header in seconds; it may also be a date (RFC 9110, 10.2.3)."""
    from email.utils import parsedate_to_datetime

    with suppress(ValueError):
        seconds = float(retry_after)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return None


# ======================================================================================
# 9. Puter · uses: everything above
# ======================================================================================
WHOLE_REPLY_TIMEOUT_S = 600.0  # a whole reply with tools may take minutes before its first byte
MODELS_TIMEOUT_S = 10.0
MODELS_RETRY_S = 60.0  # how long a failure to fetch the model list is remembered
_OWN_ARGUMENTS = "model system images files tools returns web_search fallback timeout_ms".split()
# Names of other libraries, too different from ours for a near match.
_OTHER_NAMES = {
    "messages": "the prompt itself",
    "prompt": "the first argument",
    "stream": "the method `stream`",
    "max_rounds": "`run`, which takes it",
    "on_tool": "`run`, which takes it",
    "client": "`conversation` of that client, which makes one that uses it",
    "images": "`image`, which takes them",
    # it would write into the storage of the account
    "puter_output_path": "`save` of the result",
}


# ---- work that is no chat ----


class _Job(NamedTuple):
    """Work that is no chat: how it is called, how its arguments are made, its result is read.

    `names` are the arguments that are known beside those of every job; all are passed on.
    `files` are the kinds of the file that comes of it, if it is one.
    """

    interface: str
    method: str
    names: str
    args: Callable[[Any], JSON]
    read: Callable[[Any], Any]
    files: Mapping[str, bytes] = types.MappingProxyType({})


def _audio_from(result: Any) -> Audio:
    found = picture_from(result)  # a URL is read as a picture's is
    return Audio(found.data, found.mime) if found.data else Audio(url=found.url)


def _transcript_from(result: Any) -> Transcript:
    if isinstance(result, str):  # where a form of text was asked for (recorded)
        return Transcript(result)
    return Transcript(mend_surrogates(result["text"]), result)


_JOB_ARGUMENTS = ("model", "provider", "test_mode")
# By what comes of them. Without a provider, Puter takes one that a server may lack (recorded).
_JOBS: dict[type[Any], _Job] = {
    Picture: _Job(
        "puter-image-generation",
        "generate",
        "quality ratio aspect_ratio",
        lambda prompt: {"prompt": prompt},
        picture_from,
        _IMAGE_KINDS,
    ),
    Audio: _Job(
        "puter-tts",
        "synthesize",
        "voice response_format instructions",
        lambda text: {"text": text, "provider": "openai"},
        _audio_from,
        _AUDIO_KINDS,
    ),
    Transcript: _Job(
        "puter-speech2txt",
        "transcribe",
        "response_format language prompt",
        lambda audio: {"file": data_url(audio, "audio", _AUDIO_KINDS)},
        _transcript_from,
    ),
    str: _Job(
        "puter-ocr",
        "recognize",
        "",
        lambda source: {"source": data_url(source, "source", _PAGE_KINDS)},
        lambda result: "\n".join(b["text"] for b in result["blocks"] if _is_text(b.get("text"))),
    ),
}


# ---- what a client is made of ----


@dataclass(eq=False, repr=False)
class _Exchange:
    """One call on its way: what is asked, how to end it, and what was tried for it."""

    asked: Asked
    is_stream: bool
    cancellation: _InFlight
    # how it is sent to a model on an account
    open: Callable[[_Exchange, str, Account, ExitStack], Stream]
    attempts: list[Attempt] = field(default_factory=list)
    # whether the one that answers is a fallback
    is_fallback: bool = False
    began: float = field(default_factory=time.monotonic)
    # when the latest attempt began
    started: float = 0.0


class _ConcurrencyLimit:
    """Lets so many calls at once through to one account, in the order in which they came."""

    def __init__(self, places: int) -> None:
        self._places = self._allowed = places
        self._running = 0
        self._paused_until = 0.0
        # when a call last ended
        self._released_at = 0.0
        # re-entrant: a stream may be dropped, and so give back its place, at any time
        self._lock = threading.RLock()
        # for each call that waits for its turn, and for those that wait for the end of another
        self._queue: deque[threading.Condition] = deque()
        self._ended = threading.Condition(self._lock)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @contextmanager
    def place(self, cancellation: _InFlight, patience_s: float) -> Iterator[None]:
        """Wait for a place and hold it; `BusyError` when none was given back for so long."""
        arrived, turn = time.monotonic(), threading.Condition(self._lock)
        cancellation.waker = turn
        with self._lock:
            self._queue.append(turn)
            try:
                while not cancellation.cancelled.is_set():
                    now, until = time.monotonic(), self._paused_until
                    is_next = self._running < self._allowed and self._queue[0] is turn
                    if is_next and now >= until:
                        self._running += 1
                        break
                    if not is_next:
                        until = max(arrived, self._released_at, until) + patience_s
                    if until <= now:
                        problem = f"None of {self._places} requests at once on the account ended"
                        raise BusyError(f"{problem} within {patience_s:g} s")
                    turn.wait(until - now)
                else:
                    raise BusyError("The call was given up before it was sent")
            finally:
                self._queue.remove(turn)
                self._wake_next()
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                self._released_at = time.monotonic()
                self._ended.notify_all()
                self._wake_next()

    def wait_for_end(self, cancellation: _InFlight, patience_s: float) -> bool:
        """Wait until one of the running calls ends; False if there is none, or after so long."""
        began, is_over = time.monotonic(), cancellation.cancelled.is_set
        cancellation.waker = self._ended
        with self._lock:
            self._ended.wait_for(
                lambda: self._released_at > began or not self._running or is_over(), patience_s
            )
        return self._released_at > began

    def pause(self, seconds: float) -> None:
        """The server refused for too many requests: nobody goes for a while, then one."""
        self._allowed = min(self._running + 1, self._places)
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def passed(self) -> None:
        """The server took a request: one more may go beside it."""
        with self._lock:
            self._allowed = min(self._allowed + 1, self._places)
            self._wake_next()

    def _wake_next(self) -> None:
        if self._queue:
            self._queue[0].notify()


@dataclass(eq=False, repr=False)
class _Accounts:
    """The accounts that a client may ask: which there are, who is on cooldown, who is next.

    `token` is the caller's, whose account's name is not known, or the key of a foreign server
    ("" where it needs none); `pinned` is the name of the only one to ask.
    """

    config: Config
    store: AccountStore
    state: State
    token: str | None
    pinned: str | None
    # who answered last, and is asked first
    current: str | None = None
    _last_read: tuple[Any, list[Account], str | None] | None = None

    def usable(self) -> list[Account]:
        """The account of the caller's token, the pinned one, or the stored ones."""
        if self.token is not None:
            name = f"token-{token_fingerprint(self.token)[:8]}" if self.token else "nobody"
            return [Account(name, self.token)]
        accounts, active = self._stored()
        if self.pinned is not None:
            return [_account_named(accounts, self.pinned)]
        return [a for a in accounts if self.config.account_rotation_enabled or a.username == active]

    def first(self, name: str | None = None) -> Account:
        """The account of this name, else the one in use, on cooldown or not; raises `AuthError`."""
        if not (accounts := self.usable()):
            raise AuthError("You are not signed in")
        if name is not None:
            return _account_named(accounts, name)
        wanted = self.current or self.active_name
        return next((a for a in accounts if a.username == wanted), accounts[0])

    @property
    def active_name(self) -> str | None:
        """The name of the active stored account; None if something else is in use."""
        return None if self.token is not None or self.pinned else self._stored()[1]

    def no_account_error(self) -> PuterError:
        if not (accounts := self.usable()):
            return AuthError("You are not signed in")
        now, count = time.time(), len(accounts)
        cooldowns = [c for c in self.state.cooldowns(now, accounts) if not c.model]
        ends = [c.until_s for c in cooldowns if c.reason != "login"]
        wait_s = max(0.0, min(ends, default=0.0) - now)
        message = f"All {count} accounts are on cooldown; the first is free in {wait_s:.0f} s"
        return AllAccountsOnCooldownError(message, retry_after_s=wait_s, statuses=cooldowns)

    def _stored(self) -> tuple[list[Account], str | None]:
        stamp, last = self.store.stamp(), self._last_read
        if last is not None and last[0] == stamp:
            return last[1:]
        accounts, active = self.store.read()
        name = active.username if active else None
        if last is not None and last[2] != name:
            # somebody has switched, or signed in
            self.current = None
        self._last_read = (stamp, accounts, name)
        return accounts, name


def _account_named(accounts: Sequence[Account], name: str) -> Account:
    by_name = {a.username: a for a in accounts}
    if name not in by_name:
        hint = f"{_did_you_mean(name, by_name)}`python -m puter status` lists them."
        raise AuthError(f"No stored account is called {name!r}", hint=hint)
    return by_name[name]


@dataclass(eq=False, repr=False)
class _Catalogue:
    """The model list, from memory, disk or the server, as fresh as `cache_ttl_ms` asks."""

    config: Config
    state: State
    transport: _Transport
    # a foreign server's; Puter's own lists need no token
    key: str
    # where the state keeps it
    place: str
    kind: str = "chat"
    _models: ModelList | None = None
    _fetched_at: float = 0.0
    # whether it is older than asked for, since the server could not be reached
    is_stale: bool = False
    # the latest one, and when by the monotonic clock
    _failure: tuple[PuterError, float] | None = None
    _lock: Any = field(default_factory=threading.RLock)

    def models(self, refresh: bool = False) -> ModelList:
        """The list; an old one with a warning when the server cannot be reached.

        Threads that come while another one asks the server share its list, or its failure,
        which is remembered for `MODELS_RETRY_S`.
        """
        with self._lock:
            models, age_s = self.known(), time.time() - self._fetched_at
            self.is_stale = False
            if 0 <= age_s < self.config.cache_ttl_ms / 1000 and not refresh:
                return models
            try:
                return self._fetch(refresh)
            except PuterError as error:
                if not self._fetched_at or refresh:
                    raise
                _log.warning("Using a model list that is %.0f minutes old: %s", age_s / 60, error)
            self.is_stale = True
            return models

    def models_if_any(self, why: str) -> ModelList:
        """The list, or none with a warning, for what can do without it."""
        try:
            return self.models()
        except PuterError as error:
            _log.warning("%s, since the model list could not be fetched: %s", why, error)
            return ModelList()

    def known(self) -> ModelList:
        """The list as far as is known without asking anybody; read from the disk once."""
        if self._models is None:
            models, stored = ModelList(), self.state.catalogue(self.place)
            # one that cannot be read is as good as none
            with suppress(PuterError, ValueError):
                if stored:
                    models, self._fetched_at = models_from(read_json(stored[0])), stored[1]
            self._models = models
        return self._models

    def _fetch(self, refresh: bool) -> ModelList:
        error, failed_at = self._failure or (None, 0.0)
        if error and not refresh and time.monotonic() - failed_at < MODELS_RETRY_S:
            # a copy: each raise would add its frames to the one that is remembered
            raise copy.copy(error).with_traceback(None)
        url, key = f"{self.config.api_base_url}/models", self.key
        if not is_foreign(self.config):
            url, key = f"{_api_origin(self.config)}/puterai/{self.kind}/models/details", ""
        timeout_s = min(MODELS_TIMEOUT_S, self.config.api_timeout_ms / 1000)
        try:
            body = body_of(self.transport.send("GET", url, token=key, timeout_s=timeout_s))
            models = models_from(body)
        except PuterError as error:
            self._failure = (copy.copy(error), time.monotonic())
            raise
        self._models, self._fetched_at, self._failure = models, time.time(), None
        self.state.put_catalogue(self.place, json.dumps(body), self._fetched_at)
        return models


class _Api(NamedTuple):
    """One request to Puter, or to an OpenAI-compatible base: no retries, no choices."""

    config: Config
    transport: _Transport
    catalogue: _Catalogue
    drawing: _Catalogue

    def open(self, call: _Exchange, model: str, account: Account, stack: ExitStack) -> Stream:
        """Ask, and read up to the first chunk, or all of a whole reply.

        The stack gives back the connection that the answer needs.
        """
        streaming = call.is_stream and not self.needs_whole_reply(call.asked, model)
        timeout_s = self.config.api_timeout_ms / 1000
        if call.asked.needs.tools and not streaming:
            # it may take minutes before its first byte
            timeout_s = max(timeout_s, WHOLE_REPLY_TIMEOUT_S)
        timeout_s = call.asked.timeout_s or timeout_s
        form, known = self.form(call.asked, model), self.catalogue.known().get(model)
        args = call.asked.args
        if call.asked.is_typed:
            args = typed_arguments(form, known is not None and known.tools is True, args)
        args = arguments_for(form, known.id if known else model, args)
        response = self._send(call, {**args, "model": model}, account, timeout_s, streaming)
        if not streaming or not is_stream(response):
            body = body_of(response)
            is_openai = self.config.api_style == "openai"
            reply = (reply_from_openai if is_openai else reply_from_driver)(body, model)
            return Stream.of(with_true_end(reply, known, args), call.cancellation)
        stack.callback(call.cancellation.attach)
        stack.callback(response.close)
        _log.info("Stream connected duration=%.0fms", (time.monotonic() - call.started) * 1000)

        def needs_usage() -> bool:
            # the list is asked for only where it matters
            models = self.catalogue.models_if_any("The stream's end is taken for whole")
            return form_of(models.get(model) or "") == "responses"

        decoder: LineDecoder | EventDecoder = LineDecoder(model, needs_usage)
        parts: Iterator[Any] = stream_pieces(response, timeout_s)
        if content_type(response) == "text/event-stream":
            decoder, parts = EventDecoder(model), stream_events(response, timeout_s)
        batches = decoded(decoder, parts, account.token)
        batches = chain([next(batches, [])], batches)

        def read() -> Reply:
            return with_true_end(decoder.reply(), known, args)

        return Stream(batches, read, call.cancellation, decoder.model)

    def work(self, call: _Exchange, model: str, account: Account, stack: ExitStack) -> Stream:
        """Have one of the `_JOBS` done; what comes of it is the `value` of the reply."""
        kind, args = call.asked.makes, dict(call.asked.args)
        job = _JOBS[kind]
        if model != job.interface:
            args["model"] = model
        body = {"interface": job.interface, "method": job.method, "args": args}
        how: JSON = {"timeout_s": call.asked.timeout_s, "cancellation": call.cancellation}
        url = f"{_api_origin(self.config)}/drivers/call"
        _log.info("Request: POST /drivers/call method=%s model=%s", job.method, model)
        response = self.transport.send("POST", url, token=account.token, body=body, **how)
        try:
            value = self._result(kind, response, call.cancellation)
        except PuterError as error:
            # what is not Puter's own word may stand for work that was done, and billed
            is_own, hundreds = error.code in _KIND_BY_CODE, (error.status or 0) // 100
            error.may_be_billed |= not is_own and hundreds in (2, 5)
            raise
        cost = 0.0 if args.get("test_mode") else None
        if cost is None and "model" in args and kind is Picture:
            known = self.drawing.models_if_any("The price is not known").get(model)
            cost = known.usd_per_image if known else None
        reply = Reply(usage=Usage(cost_usd=cost), model=model, value=value)
        return Stream.of(reply, call.cancellation)

    def _result(self, kind: type[Any], response: requests.Response, cancellation: _InFlight) -> Any:
        job, data, mime = _JOBS[kind], response.content, content_type(response)
        families = {one.partition("/")[0] for one in job.files}
        if mime.partition("/")[0] not in families or data[:99].lstrip()[:2] in (b"", b"{", b'{"'):
            mime = mime_of(data, job.files) or ""
        if response.status_code == 200 and mime:
            return kind(data, mime)
        body = body_of(response)
        try:
            result = job.read(body["result"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _no_reply(f"The result has an unknown format ({error!r})", body) from error
        if isinstance(result, (Picture, Audio)) and not result.data:
            try:
                data, mime = self.transport.download(result.url, cancellation)
                mime = mime_of(data, job.files) or mime or result.mime
                return replace(result, data=data, mime=mime)
            except PuterError as error:
                # it is made, and paid for: whoever asked can still load it
                _log.warning("%s could not be loaded: %s", result.url, error)
        return result

    def form(self, asked: Asked, model: str) -> str:
        """The form for a model; the list is asked for where more than plain text is sent."""
        if self.config.api_style == "openai":
            return "openai"
        models, args = self.catalogue.known(), asked.args
        are_texts = all(
            m.keys() == {"role", "content"} and isinstance(m["content"], str)
            for m in args["messages"]
        )
        is_plain = are_texts and args.keys() <= {"messages", "temperature", "max_tokens"}
        if not is_plain and models.get(model) is None:
            models = self.catalogue.models_if_any("The model's own form is guessed")
        form = form_of(models.get(model) or model)
        # Puter asks OpenAI's other API then (recorded)
        is_search = "web search" in asked.needs.inputs
        return "responses" if is_search and form == "chat" else form

    def data(self, path: str, account: Account) -> JSON:
        url = _api_origin(self.config) + path
        return body_of(self.transport.send("GET", url, token=account.token))

    def needs_whole_reply(self, asked: Asked, model: str) -> bool:
        """Whether a stream could lose all but the last of several calls in a turn (recorded)."""
        is_one = not asked.needs.tools or asked.args.get("parallel_tool_calls") is False
        if is_one or self.config.stream_tools == "live" or is_foreign(self.config):
            return False
        return FORMS[self.form(asked, model)].is_lossy

    def _send(
        self, call: _Exchange, args: JSON, account: Account, timeout_s: float, streaming: bool
    ) -> requests.Response:
        base, body = self.config.api_base_url, {**args, "stream": True} if streaming else args
        if self.config.api_style == "openai":
            if streaming:
                body.setdefault("stream_options", {"include_usage": True})
            path = "" if _origin_and_path(base)[1] else _OPENAI_PATH
            url = f"{base}{path}/chat/completions"
        else:
            url = f"{base}/drivers/call"
            driver = {"interface": "puter-chat-completion", "driver": "ai-chat"}
            body = {**driver, "method": "complete", "args": body}
        words = (urlsplit(url).path, args["model"], str(streaming).lower(), len(args["messages"]))
        _log.info("Request: POST %s method=complete model=%s stream=%s messages=%d", *words)
        how: JSON = {"timeout_s": timeout_s, "body": body, "token": account.token}
        how |= {"cancellation": call.cancellation, "leaves_open": is_stream if streaming else None}
        return self.transport.send("POST", url, **how)


def decoded(decoder: Any, parts: Iterable[Any], token: str) -> Iterator[list[Chunk]]:
    """The chunks of a stream as they arrive; raises what went wrong, without the token."""
    try:
        for part in parts:
            if chunks := decoder.feed(part):
                yield chunks
            if decoder.error is not None:
                break
    except PuterError:
        # all was said before the connection broke
        if not decoder.whole:
            raise
    if decoder.error is None and (chunks := decoder.finish()):
        yield chunks
    if decoder.error is not None:
        decoder.error.message = without_token(decoder.error.message, token)
        if isinstance(decoder.error, StreamError):
            decoder.error.reply = decoder.reply()
        raise decoder.error


@dataclass(repr=False, eq=False)
class Stream:
    """A reply as it comes: iterate over it for `Chunk`s; `reply` is the whole once it ended.

    Ends normally, or raises `StreamError` with the partial reply. Leaving the `with` block,
    `close()` or dropping it closes the connection. `close()` may be called from any thread:
    another one that reads the stream gets a `StreamError` that says so.

    Attributes: `model` and `account` (the names of those that answer), `attempts`.
    """

    _batches: Iterator[list[Chunk]]
    # what has come of it so far
    _read: Callable[[], Reply]
    _cancellation: _InFlight
    model: str = ""
    account: str = ""
    attempts: tuple[Attempt, ...] = ()
    _stack: ExitStack = field(default_factory=ExitStack)
    # is given how it ended, and the reply as far as it came
    _note_end: Callable[[str, Reply], None] = lambda word, reply: None
    # whether a call whose arguments cannot be read is an error
    _is_checked: bool = False
    _batch: Iterator[Chunk] = field(default_factory=lambda: iter(()))
    # "ok", "closed", "dropped" or an error's code
    _end_word: str = ""
    _lock: Any = field(default_factory=threading.RLock)
    _reading: Any = field(default_factory=threading.Lock)
    _reply: Reply | None = None

    @classmethod
    def of(cls, reply: Reply, cancellation: _InFlight) -> Stream:
        """A whole reply as a stream."""
        who = (reply.model, reply.account, reply.attempts)
        return cls(iter([chunks_of(reply)]), lambda: reply, cancellation, *who)

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            batch = self._batch
            yield from batch
            # `next` may have begun another one meanwhile
            if batch is self._batch and self._next_batch() is None:
                return

    def __next__(self) -> Chunk:
        return next(iter(self))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._release("closed")

    def __del__(self) -> None:
        self._release("dropped")

    def __repr__(self) -> str:
        state = {"ok": "ended", "": "open"}.get(self._end_word, "closed")
        return f"<puter.Stream of {self.model!r}, {state}>"

    @property
    def reply(self) -> Reply:
        """The whole reply; raises `StreamError` while the stream has not ended."""
        if self._reply is None:
            message, hint = "The stream has not come to its end", "Read all its chunks first."
            raise StreamError(message, hint=hint, reply=self._partial())
        return self._reply

    def close(self) -> None:
        """End the stream now, from any thread; what is on its way is not waited for."""
        self._release("closed")

    def _whole(self) -> Reply:
        while self._next_batch() is not None:
            pass
        return self.reply

    def _next_batch(self) -> list[Chunk] | None:
        """What came next, None at the end; raises `StreamError`, or `ReplyError`."""
        if self._end_word not in ("", "ok"):
            raise self._broken()
        try:
            with self._reading:  # by one thread at a time
                batch = next(self._batches, None)
            if self._is_checked and any(c.tool_call and c.tool_call.invalid for c in batch or ()):
                raise_for_invalid(self._partial())
        except PuterError as error:
            if self._end_word == "closed":
                raise self._broken() from error
            self._release(_code_of(error))
            if isinstance(error, ReplyError):
                raise
            is_worded = isinstance(error, StreamError)
            what = "" if is_worded else f"The reply of {self.model} broke off: "
            raise self._broken(what + error.message, error.code) from error
        if batch is None:
            self._release("ok")
        self._batch = iter(batch or ())
        return batch

    def _broken(
        self, message: str = "The stream was closed before its end", code: str | None = "closed"
    ) -> StreamError:
        hint = "" if code == "closed" else _HINT_BY_CODE.get(code or "")
        return StreamError(message, hint=hint, reply=self._partial(), code=code)

    def _release(self, word: str) -> None:
        """Give back the connection and the place, and note how it ended; once."""
        with self._lock:
            if self._end_word:
                return
            self._end_word = word
        if word != "ok":  # a body that was read to its end left a good connection
            self._cancellation.cancel()
        self._stack.close()
        reply = self._partial()
        self._reply = reply if word == "ok" else None
        self._note_end(word, reply)

    def _partial(self) -> Reply:
        return replace(self._read(), model=self.model, account=self.account, attempts=self.attempts)


def raise_for_invalid(reply: Reply) -> None:
    """Raise `ReplyError` when a call's arguments cannot be read."""
    for call in reply.tool_calls:
        if call.invalid:
            arguments = f"arguments that are not a JSON object: {call.invalid[:200]!r}"
            message = f"The model called {call.name!r} with {arguments}"
            raise ReplyError(message, raw=call.invalid, reply=reply)


def _takes(source: Callable[_P, Any]) -> Callable[[Callable[..., _T]], Callable[_P, _T]]:
    """Let type checkers, help and completion show the arguments that a method passes on."""

    def shown(method: Callable[..., _T]) -> Callable[..., _T]:
        signature, own = inspect.signature(source), inspect.signature(method)
        signature = signature.replace(return_annotation=own.return_annotation)
        method.__signature__ = signature  # type: ignore[attr-defined]
        return method

    return shown


class Puter:
    """The client of one person's Puter accounts; safe to share between threads.

    Args:
        token: use this token and no stored account. Default: `PUTER_AUTH_TOKEN` of the
            environment, else the stored accounts, the active one first. For an
            OpenAI-compatible server that is not Puter's: its key (default `openai_api_key`).
        account: use this stored account and no other, whatever the environment says.
        config: settings; default `Config.load()`.
        session: a `requests.Session` of yours, for a proxy or certificates of your own.
        settings: any field of `Config`, such as ``debug=True`` or ``max_retries=0``.

    Raises `ConfigError` for a wrong setting and `StoreError` for an unreadable accounts file.
    """

    def __init__(
        self,
        token: str | None = None,
        *,
        account: str | None = None,
        config: Config | None = None,
        session: requests.Session | None = None,
        **settings: Any,
    ) -> None:
        if unknown := [name for name in settings if name not in _SETTINGS]:
            raise _unknown_key(unknown[0], "argument")
        _require(isinstance(token, (str, type(None))), "token", token, "Give a string.")
        if token is not None and account is not None:
            hint = "A token is an account of its own."
            raise ConfigError("token and account are both given", hint=hint)
        if config is not None and not isinstance(config, Config):
            hint = "Pass a Config, or settings by their names."
            raise ConfigError(f"config is {_describe(config)}", hint=hint)
        if config is None:
            self.config = Config.load(**settings)
        else:
            sources = {**config.sources, **dict.fromkeys(settings, "argument")}
            self.config = replace(config, sources=sources, **settings)
        if is_foreign(self.config):
            token = token or self.config.openai_api_key or ""
        elif token == "":
            raise ConfigError("The token is empty", hint="Leave it out to use the stored accounts.")
        elif token is None and account is None:
            token = os.environ.get(TOKEN_VARIABLE) or None
        self.store = AccountStore(self.config.folder)
        self.state = State(self.config.folder / STATE_NAME, self.config.api_base_url)
        self._metrics = self._state_in(self.config.metrics_file)
        self._reply_cache = self._state_in(self.config.cache_directory, "cache.sqlite3")
        self._transport = _Transport(self.config, session)
        own, place = (self.config, self.state, self._transport), self.config.api_base_url
        self._catalogue = _Catalogue(*own, token or "", place)
        self._drawing = _Catalogue(*own, "", f"{place}#image", "image")
        self._accounts = _Accounts(self.config, self.store, self.state, token, account)
        self._api = _Api(self.config, self._transport, self._catalogue, self._drawing)
        self._limits: dict[str, _ConcurrencyLimit] = {}
        self._costs_usd: list[float] = []
        self._on_answer: Callable[[Reply, bool], object] = lambda reply, is_fallback: None
        self._on_wait: Callable[[str, float], object] = lambda why, wait_s: None
        _forkable.add(self)
        if self.config.debug:
            _show_log(logging.DEBUG)

    def __repr__(self) -> str:
        who = "a given token" if self._accounts.token else self._accounts.current
        return f"<puter.Puter with {who or 'stored accounts'} at {self.config.api_base_url}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close connections and files; using the client again opens them again."""
        self._transport.close()
        for state in (self.state, self._metrics, self._reply_cache):
            state.close()

    def _state_in(self, place: str | None, *name: str) -> State:
        if place is None:
            return self.state
        # the plugin's own statistics are JSON: ours stand beside them
        place = f"{place}.sqlite3" if place.endswith(".json") else place
        return State(os.path.join(os.path.expanduser(place), *name))

    def _after_fork(self) -> None:
        """A forked child begins without connections, and with nothing running."""
        if self._transport._is_ours:
            self._transport._session = None
        for holder in (self._transport, self._catalogue, self._drawing):
            # it may be held by a thread that does not exist in the child
            holder._lock = threading.RLock()
        self._limits = {}

    # ---- asking ----

    def _build_request(
        self,
        prompt: Prompt | None = None,
        /,
        *,
        model: str | Model | None = None,
        system: str | None = None,
        images: Sequence[Image] = (),
        files: Sequence[File] = (),
        tools: Sequence[Any] | None = None,
        returns: Any = None,
        web_search: bool = False,
        fallback: bool = True,
        timeout_ms: int | None = None,
        **args: Any,
    ) -> Asked:
        """Check what `chat` and `stream` are given, and ask no model."""
        args = {k: v for k, v in args.items() if v is not None}
        prompt = args.pop("prompt", None) if prompt is None else prompt
        _check_names(args)
        for switch, value in (("fallback", fallback), ("web_search", web_search)):
            _require(isinstance(value, bool), switch, value, "Give True or False.")
        is_time = timeout_ms is None or (_is_number(timeout_ms) and 0 < timeout_ms < 10**9)
        _require(is_time, "timeout_ms", timeout_ms, "Give milliseconds, 1 or more.")
        name = model.id if isinstance(model, Model) else model
        is_name = name is None or (isinstance(name, str) and strip_puter_prefix(name))
        _require(is_name, "model", model, "Give an id or alias, or a Model.")
        name = self.config.model_name(name)
        messages = messages_from(prompt, system, _input_parts(images, files))
        schemas = tool_schemas(tools)
        if web_search and not any(map(is_web_search, schemas)):
            schemas += tool_schemas([{"type": "web_search"}])
        typed = None if returns is None else returns_of(returns)
        if typed is not None:
            args |= _format_of(typed, args, schemas)
        needs = needs_of(messages, schemas)
        if needs.inputs and not is_foreign(self.config):
            self._check_inputs(name, needs._replace(context=estimated_tokens(messages)))
        args = {"messages": messages, **({"tools": schemas} if schemas else {}), **args}
        may_fall_back = fallback and self.config.fallback_enabled
        timeout_s = timeout_ms / 1000 if timeout_ms else None
        return Asked(name, args, needs, may_fall_back, timeout_s, typed, typed is not None)

    @_takes(_build_request)
    def chat(self, prompt: Prompt | None = None, /, **args: Any) -> Reply:
        """Ask a model and wait for its whole answer.

        Args:
            prompt: a string, or a list of messages in OpenAI's shape (it is not changed);
                Anthropic's and the Responses API's parts are understood as well.
            model: an id or alias of the catalogue, or a `Model`; default `default_model`, else
                a cheap one.
            system: a system text put in front.
            images: paths, bytes or URLs, shown with the last user message.
            files: texts, PDFs and images, as paths, bytes or (name, bytes).
            tools: Python functions (their schema comes from signature, type hints and
                docstring), or JSON schemas in OpenAI's shape.
            returns: what the answer must be: a type such as `int`, `list[str]`, a dataclass,
                TypedDict, Enum or Literal, or a JSON schema; `reply.value` is of it. What does
                not fit is told to the model, which is asked once more.
            web_search: whether the model searches the web first; OpenAI's models can.
            fallback: whether free models may answer when the asked one cannot.
            timeout_ms: longest time for a whole answer, or silence in a stream; default
                `api_timeout_ms`, with tools ten minutes, where nothing comes before all does.
            args: passed on to Puter: temperature, max_tokens, tool_choice, reasoning_effort…

        Raises the `PuterError` of the first attempt that failed when none could answer;
        `ReplyError`, with the reply on it, when a call's arguments cannot be read, or the
        answer is not what `returns` says.
        """
        asked = self._build_request(prompt, **args)
        return self._open(asked, is_stream=False, is_checked=True)._whole()

    @_takes(_build_request)
    def stream(self, prompt: Prompt | None = None, /, **args: Any) -> Stream:
        """Ask a model and get its answer as it comes; arguments as for `chat`.

        Returns once the first chunk is there: errors before it are raised here, as by `chat`.
        After that nothing is tried again, and a broken answer is a `StreamError`. With
        `returns` the answer is checked before it is given, and so comes whole.
        """
        return self._open(self._build_request(prompt, **args), is_checked=True)

    def run(
        self,
        prompt: Prompt,
        tools: Sequence[Callable[..., Any]],
        *,
        max_rounds: int = 8,
        on_tool: Callable[[ToolCall], bool | None] | None = None,
        **options: Any,
    ) -> Reply:
        """Ask, call the functions that the model asks for, and go on until it answers.

        Args:
            prompt: as for `chat`.
            tools: functions with type hints; a docstring tells the model what they do.
            max_rounds: how often the model may ask for functions.
            on_tool: is shown each call first; False refuses it, and the model is told.
            options: as for `chat`; a `tool_choice` holds until the model has called.

        A function's exception goes to the model as its result, and to the log; so does a call
        that cannot be read. Several calls are made in order. Raises `ReplyError` when the model
        still calls after `max_rounds`.
        """
        functions = list(_functions_by_name(tools).values())
        options |= {"tools": functions, "max_rounds": max_rounds, "on_tool": on_tool}
        return self.conversation().say(prompt, **options)

    def conversation(
        self, system: str | None = None, *, model: str | None = None, **options: Any
    ) -> Conversation:
        """A conversation that remembers its turns; `options` are `chat`'s, for each turn."""
        return Conversation(system, model=model, client=self, **options)

    # ---- pictures and sound: no other model answers; `args` are passed on, as `image` says ----

    def image(
        self,
        prompt: str,
        model: str | Model | None = None,
        images: Sequence[Image] = (),
        **args: Any,
    ) -> Picture:
        """Have a picture drawn, or `images` (paths, bytes, URLs) changed.

        Without a `model` the server's own draws. `args` go to Puter: quality, ratio ({"w": 3,
        "h": 2}), aspect_ratio ("16:9"), provider…; `test_mode=True` gives a sample without
        cost. `timeout_ms` is as for `chat`, by default ten minutes.
        """
        return self._make(Picture, prompt, model=model, images=images, **args)[0]

    def speech(
        self, text: str, voice: str | None = None, model: str | Model | None = None, **args: Any
    ) -> Audio:
        """Have a text spoken; other `args`: response_format ("mp3", "wav"…), instructions."""
        return self._make(Audio, text, voice=voice, model=model, **args)[0]

    def transcribe(self, audio: File, **args: Any) -> Transcript:
        """What is said in a recording: a path, bytes or (name, bytes).

        Other `args`: language, prompt, response_format ("text"; with `model="whisper-1"` also
        "srt", "vtt" and "verbose_json", which has segments).
        """
        return self._make(Transcript, audio, **args)[0]

    def ocr(self, source: File, **args: Any) -> str:
        """The text of a picture or PDF: a path, bytes or (name, bytes)."""
        return self._make(str, source, **args)[0]

    # ---- the account and the catalogue ----

    def models(
        self, provider: str | None = None, free: bool | None = None, refresh: bool = False
    ) -> list[Model]:
        """The live catalogue, by id; cached for `cache_ttl_ms`. Needs no account.

        `provider` matches the catalogue's provider or the vendor in the id ("anthropic");
        `free` keeps only free (True) or paid (False) models. When the server cannot be
        reached, an older list is used and a warning logged.
        """
        models = self._catalogue.models(refresh)
        models_of = [m for m in models if not provider or is_from(m, provider)]
        return sorted((m for m in models_of if free in (None, m.free)), key=lambda m: m.id)

    def model(self, name: str) -> Model:
        """One model by id or alias, in any case; `ModelNotFoundError` has near matches."""
        return self._catalogue.models().find(name)

    def whoami(self) -> JSON:
        """The account in use as the server describes it: username, uuid, email, is_temp…"""
        return self._api.data("/whoami", self._accounts.first())

    def usage(self, account: str | None = None) -> Credit:
        """What an account may still spend this month; by default the one in use."""
        holder = self._accounts.first(account)
        try:
            return credit_from(self._api.data("/metering/usage", holder))
        except BadRequestError as error:
            if error.status != 404:
                raise
            return credit_from(self._api.data("/auth/get-monthly-usage", holder))

    def stats(self, model: str | None = None) -> list[ModelStats]:
        """How the models have done in all calls from this computer, most asked first."""
        limit, known = self.config.metrics_max_samples, self._catalogue.known()
        # a model may have been asked by an alias before the list was known
        names: dict[str, list[str]] = {}
        for name in self._metrics.models():
            names.setdefault(known.id_of(name), []).append(name)
        if model is not None:
            known = self._catalogue.models_if_any("Aliases are not known")
            wanted = known.id_of(strip_puter_prefix(model))
            names = {one: its for one, its in names.items() if wanted in (one, *its)}
        stats = [stats_of(one, *self._metrics.metrics(its, limit)) for one, its in names.items()]
        return sorted(stats, key=lambda s: (-s.requests, s.model))

    def reset_stats(self, model: str | None = None) -> None:
        """Forget the statistics of a model, or of all."""
        if model is None:
            self._metrics.reset_metrics()
            return
        id_of, wanted = self._catalogue.known().id_of, strip_puter_prefix(model)
        names = [n for n in self._metrics.models() if wanted == n or id_of(wanted) == id_of(n)]
        self._metrics.reset_metrics(names)

    @property
    def accounts(self) -> list[Account]:
        """The accounts that this client may use, in order."""
        return self._accounts.usable()

    @property
    def active_account(self) -> Account | None:
        """The account in use, which is asked first unless it is on cooldown; None without any."""
        return self._accounts.first() if self._accounts.usable() else None

    def cooldowns(self) -> list[Cooldown]:
        """Who is on cooldown now, as all processes have reported it."""
        return self.state.cooldowns(time.time(), self.accounts)

    # ---- the internal face: for the gateway, the MCP server and the command line ----
    # `_build_request` and the public methods of `_accounts`, `_catalogue` and `_transport` are for
    # them as well.
    # `_on_answer` is called with each reply that ended well and whether a fallback gave it,
    # `_on_wait` with why a call waits before it is sent again, and for how long.

    def _make(
        self, kind: type[_T], given: Any, cancellation: _InFlight | None = None, **args: Any
    ) -> tuple[_T, Reply]:
        """Have one of the `_JOBS` done: what came of it, and the reply that brought it."""
        job, args = _JOBS[kind], {k: v for k, v in args.items() if v is not None}
        takes = ("images", "timeout_ms") if kind is Picture else ("timeout_ms",)
        _check_names(args, known=(*_JOB_ARGUMENTS, *takes, *job.names.split()))
        hint, style = 'Only Puter\'s own server does this: set "drivers".', self.config.api_style
        _require(not is_foreign(self.config), "api_style", style, hint)
        content = job.args(given)
        _require(all(map(_is_text, content.values())), "The input", given, "Give a text.")
        # without a model the server's own does it, which goes by the name of the interface here
        model, longest = args.pop("model", job.interface), max(self.config.api_timeout_ms, 600_000)
        timeout_ms = args.pop("timeout_ms", longest)
        asked = self._build_request("-", model=model, fallback=False, timeout_ms=timeout_ms)
        if images := _as_list(args.pop("images", ()), "images"):
            # only data URLs are taken (recorded)
            is_url = re.compile("(?i)https?://").match
            own = [self._transport.download(i)[0] if is_url(str(i)) else i for i in images]
            args["input_images"] = [one["image_url"]["url"] for one in map(image_part, own)]
        asked = asked._replace(args=content | args, makes=kind)
        reply = self._open(asked, cancellation, is_stream=False)._whole()
        return reply.value, reply

    def _open(
        self,
        asked: Asked,
        cancellation: _InFlight | None = None,
        is_stream: bool = True,
        is_checked: bool = False,
    ) -> Stream:
        """The reply to a request as it comes; returns once its first chunk, or all, is there.

        Another thread may cancel it. `is_checked` makes a call that cannot be read an error.
        """
        cancellation = cancellation or _InFlight()
        may_be_cached = self.config.cache_enabled and asked.makes is Reply
        if asked.returns is not None:
            answer = Stream.of(self._typed(asked, asked.returns, cancellation), cancellation)
        elif may_be_cached and (cached := self._cached(asked)):
            answer = Stream.of(cached, cancellation)
        else:
            way = self._api.open if asked.makes is Reply else self._api.work
            call = _Exchange(asked, is_stream, cancellation, way)
            answer = self._ask_until_answered(call)
            answer.model = self._catalogue.known().id_of(answer.model)
            answer.account, answer.attempts = call.attempts[-1].account, tuple(call.attempts)
            answer._note_end = partial(self._note_end, call)
        answer._is_checked = is_checked
        return answer

    def _typed(self, asked: Asked, returns: Returns, cancellation: _InFlight) -> Reply:
        """The reply with its value; if it does not fit, the model is told, and asked once more."""
        reply, asked = Reply(), asked._replace(returns=None)
        for may_ask_again in (True, False):
            try:
                answer = self._open(asked, cancellation, is_stream=False)._whole()
            except PuterError as error:
                if reply.attempts:  # the first answer was paid for
                    error.reply = error.reply or reply
                raise
            used, attempts = reply.usage + answer.usage, reply.attempts + answer.attempts
            reply = replace(answer, usage=used, attempts=attempts)
            try:
                typed = typed_reply(reply, returns, may_call=asked.needs.tools)
            except Exception as error:  # noqa: BLE001 (also what the caller's own types raise)
                problem = str(error)
            else:
                id_of, last = self._catalogue.known().id_of, answer.attempts[-1:]
                is_own = any(id_of(one.model) == id_of(asked.model) for one in last)
                if is_own and self.config.cache_enabled:
                    self._cache(asked, answer)
                return typed
            given = (call.invalid or json.dumps(call.arguments) for call in reply.tool_calls)
            said = "\n".join(filter(None, [reply.text, *given])) or "(nothing)"
            if not may_ask_again or reply.finish_reason == "length":
                break
            order = f"That is not what was asked for: {problem}. Answer again, in that form."
            talk = [{"role": "assistant", "content": said}, {"role": "user", "content": order}]
            messages = [*asked.args["messages"], *talk]
            asked = asked._replace(args={**asked.args, "messages": messages})
        hint = "Simplify the type or schema, raise `max_tokens`, or use another model."
        message = f"The answer of {reply.model} is not what was asked for: {problem}"
        raise ReplyError(message, raw=said, reply=reply, hint=hint)

    # ---- before anybody is asked ----

    def _check_inputs(self, name: str, needs: Needs) -> None:
        """Raise `BadRequestError` for what the model is known not to take, naming some that do."""
        model = self._catalogue.models_if_any("What the model takes was not checked").get(name)
        if model is not None and (missing := lacking(model, needs)):
            problem = " and ".join(f"does not {what}" for what in missing)
            hint = self._able_hint(needs)
            raise BadRequestError(f"{model.id} {problem}", model=model.id, hint=hint)

    def _able_hint(self, needs: Needs) -> str:
        able = [m for m in self._catalogue.models_if_any("No model is named") if can_do(m, needs)]
        # of some the list does not say what they take: they come last
        see = "image" in needs.inputs
        able.sort(key=lambda m: (see and not m.inputs, not m.free, m.input_usd_per_million or 0))
        return f"Models that do: {', '.join(m.id for m in able[:3]) or 'none'}."

    def _cached(self, asked: Asked) -> Reply | None:
        ttl_s = self.config.cache_ttl_ms / 1000
        body = self._reply_cache.cache_get(self._cache_key(asked), time.time(), ttl_s)
        try:
            reply = reply_from_json(read_json(body or "{}"))
            reply.text.encode()
        except (ValueError, TypeError, KeyError, AttributeError):
            return None  # there is none, or a damaged one
        _log.info("Response: from the cache")
        return replace(reply, usage=replace(reply.usage, cost_usd=0.0))

    def _cache_key(self, asked: Asked) -> str:
        import hashlib

        server = [self.config.api_base_url, self.config.api_style]
        return hashlib.sha256(_encoded([*server, asked.model, asked.args])).hexdigest()

    # ---- the walk over models and accounts ----

    def _ask_until_answered(self, call: _Exchange) -> Stream:
        """Ask whom the policies name next, until somebody answers.

        When nobody does, the first error is raised with all that was tried.
        """
        while target := next_target(call.asked, call.attempts, self._world(call)):
            wait_s = target.not_before_s - time.time()
            if wait_s > 0:
                self._on_wait(f"all accounts are limited, next try in {wait_s:.0f} s", wait_s)
                if call.cancellation.cancelled.wait(wait_s):
                    break
            if target.is_fallback:
                _log.info("Fallback: trying %s", target.model)
            elif self._accounts.current not in (None, target.account.username):
                _log.info("Auth: Switched account - %s", target.account.username)
            try:
                answer = self._send_with_retries(call, target)
            except PuterError as error:
                is_own = isinstance(error, (BusyError, BudgetError))
                if is_own and call.attempts:
                    break
                if call.cancellation.cancelled.is_set() or is_own:
                    # its owner gave up, or has too much open: no account's fault
                    raise
                self._note_failure(error, call, target)
                if isinstance(error, ModelNotFoundError) and not target.is_fallback:
                    self._correct_name(error, call)
                if next_step(error, target.is_fallback, call.asked.fallback) == "raise":
                    break
            else:
                self._accounts.current = target.account.username
                call.is_fallback = target.is_fallback
                return answer
        first = call.attempts[0].error if call.attempts else self._accounts.no_account_error()
        assert first is not None
        first.attempts = tuple(call.attempts)
        raise first from first.__cause__

    def _is_spent(self) -> bool:
        budget = self.config.budget_usd
        return budget is not None and sum(self._costs_usd) >= budget

    def _check_budget(self, name: str) -> None:
        """Raise `BudgetError`, now that the budget is spent, but for what costs nothing."""
        model = self._catalogue.models_if_any("Whether the model is free is not known").get(name)
        if model is None or not model.free:
            budget, spent = self.config.budget_usd or 0, sum(self._costs_usd)
            amounts = f"{money(budget, 'usd')} is spent ({money(spent, 'usd')})"
            message = f"The budget of {amounts}, and {name} costs money"
            raise BudgetError(message, code="budget_spent", model=name)

    def _spend(self, asked: Asked, reply: Reply) -> None:
        """Count what an answer cost, whole or not, against the budget."""
        model = self._catalogue.known().get(reply.model)
        cost = cost_of(reply, model, asked.args.get("messages", ()))
        if cost is None:
            _log.warning("What %s costs is not known: the budget does not count it", reply.model)
        self._costs_usd.append(cost or 0.0)

    def _world(self, call: _Exchange) -> World:
        accounts, now = self._accounts.usable(), time.time()
        cooldowns = self.state.cooldowns(now, accounts)
        models = self._catalogue.known()
        if call.asked.fallback and (call.attempts or any(c.model for c in cooldowns)):
            models = self._catalogue.models_if_any("No fallback")
        if self.config.account_rotation_strategy == "least-recently-used":
            used = {a.username: a.last_used_ms for a in accounts} | self.state.last_used_ms()
            accounts = [replace(a, last_used_ms=used[a.username]) for a in accounts]
        current = self._accounts.current or self._accounts.active_name
        more = (time.monotonic() - call.began, self._catalogue.is_stale, self._is_spent())
        return World(accounts, cooldowns, models, self.config, current, now, *more)

    def _send_with_retries(self, call: _Exchange, target: Target) -> Stream:
        """One model on one account, with the retries that the policies allow."""
        model, name, config = target.model, target.account.username, self.config
        if (limit := self._limits.get(name)) is None:
            limit = self._limits.setdefault(name, _ConcurrencyLimit(config.max_concurrent))
        patience_s = call.asked.timeout_s or config.api_timeout_ms / 1000
        retries, waited_s, waiting, has_waited_for_others = 0, 0.0, 0, False
        while True:
            with ExitStack() as stack:
                stack.enter_context(limit.place(call.cancellation, patience_s))
                if self._is_spent() and not call.asked.args.get("test_mode"):
                    self._check_budget(model)
                call.started = time.monotonic()
                try:
                    answer = call.open(call, model, target.account, stack)
                except PuterError as error:
                    failure = error
                else:
                    seconds = time.monotonic() - call.started
                    call.attempts.append(Attempt(model, name, None, seconds))
                    names, now = (model, self._catalogue.known().id_of(model)), time.time()
                    self.state.record_success(name, names, now - seconds, now)
                    limit.passed()
                    answer._stack = stack.pop_all()
                    return answer
            seconds = time.monotonic() - call.started
            if isinstance(failure, CreditError) and not has_waited_for_others:
                # what runs beside it holds the most that it may cost until it ends (recorded)
                has_waited_for_others = True
                if limit.wait_for_end(call.cancellation, patience_s):
                    continue
            failure = self._noted(failure, call, target, seconds)
            is_stream = call.is_stream and not self._api.needs_whole_reply(call.asked, model)
            waiting = max(waiting, limit.waiting)
            allowed = (config.max_retries, target.waits_out_limits, waited_s, is_stream, waiting)
            if not may_retry(failure, retries, *allowed):
                raise failure
            retries += 1
            delay_s = retry_delay_s(failure, retries, config.retry_delay_ms / 1000)
            if isinstance(failure, RateLimitError):
                limit.pause(delay_s)
            what, total = _log_words(failure), max(config.max_retries, retries)
            _log.info("Retry %d/%d: %s, waiting %.0fms", retries, total, what, delay_s * 1000)
            self._on_wait(f"{what}, next try in {delay_s:.0f} s", delay_s)
            if call.cancellation.cancelled.wait(delay_s):
                raise failure
            waited_s += delay_s

    def _noted(
        self, error: PuterError, call: _Exchange, target: Target, seconds: float
    ) -> PuterError:
        model, account = target.model, target.account
        is_vague = error.code == "insufficient_funds" and not is_foreign(self.config)
        if is_vague and call.asked.makes is Reply:
            error = self._explained(error, call.asked, target)
        call.attempts.append(Attempt(model, account.username, error, seconds))
        if error.reply is not None and self.config.budget_usd is not None:
            self._spend(call.asked, error.reply)
        if not isinstance(error, ModelNotFoundError):  # there is nothing of that name
            self._count(model, _code_of(error), seconds)
        error.model, error.account = error.model or model, account.username
        if model not in error.message and not isinstance(error, ConfigError):
            error.message = f"{model}: {error.message}"
        if error.scope == "account":
            error.message += f" (account {account.username})"
        if isinstance(error, AuthError) and account.token == os.environ.get(TOKEN_VARIABLE):
            error.hint = f"{TOKEN_VARIABLE} is set: unset it, or set it to a token that works."
        return error

    def _explained(self, error: PuterError, asked: Asked, target: Target) -> PuterError:
        """What a 402 means: a prompt too long for Puter's limit, or how much credit is left."""
        model, why = target.model, "The limits of the model are not known"
        known = self._catalogue.models_if_any(why).get(model)
        form = self._api.form(asked, model)
        tokens = estimated_tokens(messages_for(form, asked.args["messages"]))
        if known and not fits(known, tokens):
            limits = f"Puter lets {known.id} be asked with fewer than {known.window:,}"
            problem = f"The prompt has about {tokens:,} tokens, but {limits}"
            hint = f"Shorten it. {self._able_hint(asked.needs._replace(context=tokens))}"
            details: JSON = {"tokens": tokens, "limit": known.window, "param": "messages"}
            details["code"] = "context_length_exceeded"
            return ContextLengthError(problem, hint=hint, **details)
        try:
            left = self.usage(target.account.username)
        except PuterError as failure:
            problem = f"Its answer could cost more than is left ({failure.message})"
        else:
            if left.remaining <= 0:
                return error
            problem = f"Its answer could cost more than the {money(left.remaining, left.unit)} left"
        hint = "Set `max_tokens` to ask for a shorter answer, or use a cheaper model."
        details = {"status": error.status, "code": error.code, "scope": "model"}
        return CreditError(f"{model}: {problem}", hint=hint, **details)

    def _note_failure(self, error: PuterError, call: _Exchange, target: Target) -> None:
        """Note in the state who is on cooldown, so that nobody runs into the same again.

        An account with too many requests at once, or that has no substitute, is never on
        cooldown.
        """
        code, name, config = _code_of(error), target.account.username, self.config
        if isinstance(error, AuthError) and code in DEAD_TOKEN_CODES:
            token = target.account.token
            self.state.add_cooldown(name, "", math.inf, "login", time.time(), token)
            _log.info("Auth: Account needs a new sign-in - %s (%s)", name, code)
            return
        # a proxy on the way may answer 403 and 429 as well: only Puter's own codes count
        is_own = error.code in _KIND_BY_CODE and code != "invalid_api_key"
        is_limit = error.scope == "account" and is_own and not error.is_momentary
        # what is too little for a picture may do for a chat
        is_limit &= call.asked.makes is Reply or not isinstance(error, CreditError)
        if error.scope == "model" and not isinstance(error, CreditError):
            # cooldowns are of ids, which the list knows
            model_id, ms = self._world(call).models.id_of(target.model), config.fallback_cooldown_ms
        elif is_limit and self._world(call).others(target.account):
            model_id, ms = "", config.account_rotation_cooldown_ms
        else:
            return
        if isinstance(error, RateLimitError) and not config.max_retries:
            ms = min(ms, int(RATE_WINDOW_S * 1000))  # nobody waits for it
        self.state.add_cooldown(name, model_id, ms / 1000, code, time.time())
        _log.info("%s, adding to cooldown", _log_words(error))

    def _correct_name(self, error: ModelNotFoundError, call: _Exchange) -> None:
        """Ask by the id that the list has for an unknown name; else give near names."""
        lists = {Reply: self._catalogue, Picture: self._drawing}
        if call.asked.makes not in lists:
            error.hint = "Correct its name, or leave it out."
            return
        models = lists[call.asked.makes].models_if_any("No similar name was looked up")
        try:
            model_id = models.find(call.asked.model).id
        except ModelNotFoundError as unknown:
            if call.asked.makes is Picture:
                # the command lists those of chats
                unknown.message = unknown.message.replace("No", "No picture", 1)
                some = f"Some are: {', '.join(m.id for m in models[:5])}."
                unknown.hint = unknown.hint.removesuffix(unknown.default_hint).strip() or some
            if models:
                error.message, error.near, error.hint = unknown.message, unknown.near, unknown.hint
            if call.asked.model == self.config.default_model:
                error.message += f" (default_model of {self.config.sources['default_model']})"
            return
        if model_id != call.attempts[-1].model:
            # only a misspelling: not reported
            call.attempts.pop()
            call.asked = call.asked._replace(model=model_id)

    # ---- what is noted of an answer ----

    def _note_end(self, call: _Exchange, word: str, reply: Reply) -> None:
        """Note how the call that was answered ended, and cache a whole reply if wanted."""
        asked, now, last = call.asked, time.monotonic(), call.attempts[-1]
        if self.config.budget_usd is not None:
            self._spend(asked, reply)
        if word == "dropped":
            return  # at any time, in any thread
        first_s = last.seconds if call.is_stream else None
        self._count(last.model, word, now - call.started, first_s, reply.usage)
        if word != "ok":
            _log.info("Response: broke off (%s)", word)
            return
        how = f"{'Stream complete' if call.is_stream else 'OK'} ({now - call.began:.1f}s)"
        _log.info("Response: 200 %s", "OK (used fallback model)" if call.is_fallback else how)
        is_live = call.is_stream and self.config.stream_tools == "live"
        may_lack_calls = is_live and asked.needs.tools
        is_odd = call.is_fallback or may_lack_calls or any(c.invalid for c in reply.tool_calls)
        may_be_cached = self.config.cache_enabled and asked.makes is Reply and not asked.is_typed
        if may_be_cached and not is_odd:
            self._cache(asked, reply)
        self._on_answer(reply, call.is_fallback)

    def _cache(self, asked: Asked, reply: Reply) -> None:
        body, limit = json.dumps(reply_to_json(reply)), self.config.cache_max_entries
        self._reply_cache.cache_put(self._cache_key(asked), body, time.time(), limit)

    def _count(
        self,
        model: str,
        outcome: str,
        seconds: float,
        first_s: float | None = None,
        usage: Usage | None = None,
    ) -> None:
        if self.config.metrics_enabled and outcome != "model_not_found":
            name, limit = self._catalogue.known().id_of(model), self.config.metrics_max_samples
            self._metrics.record(name, outcome, seconds, first_s, usage, limit)


def _check_names(
    names: Iterable[str], what: str = "argument {!r}", known: tuple[str, ...] = ()
) -> None:
    """Raise `BadRequestError` for misspelt arguments of ours; all others go on to the server."""
    for name in (n for n in names if n not in known):
        if hint := _argument_hint(name, known):
            raise BadRequestError(f"There is no {what.format(name)}", hint=hint)


@lru_cache
def _argument_hint(name: str, known: tuple[str, ...]) -> str:
    if name in ("account", "token", "config", "session", *_SETTINGS):
        return f"{name} belongs to the client: Puter({name}=…)."
    known = known or ("prompt", "max_rounds", "on_tool", *_OWN_ARGUMENTS)
    meant = _OTHER_NAMES.get(name) or "".join(_near_names(name, known, 0.8)[:1])
    return f"Did you mean {meant}?" if meant else ""


def _log_words(error: PuterError) -> str:
    if isinstance(error, (RateLimitError, ModelRateLimitError)):
        return f"Rate limited ({error.status or 429})"
    return f"{_code_of(error)} ({error.status or '-'})"


class Conversation:
    """Turns with a model, remembered: `say`, or `stream`, and `messages` grows.

    `messages` is the history in OpenAI's shape, yours to read and change. Can be pickled, and
    put into JSON with `to_json` and `from_json`; without a client of its own it then uses the
    default one. A turn that fails leaves the history as it was.
    """

    def __init__(
        self,
        system: str | None = None,
        *,
        model: str | None = None,
        client: Puter | None = None,
        messages: Sequence[JSON] = (),
        **options: Any,
    ) -> None:
        self.system = system
        self.model = model
        self.messages: Messages = list(messages)
        self.options = _checked_options(options)
        self._client = client
        self._reply: Reply | None = None

    def __repr__(self) -> str:
        return f"<puter.Conversation of {len(self.messages)} messages>"

    def __getstate__(self) -> JSON:
        return {**self.__dict__, "_client": None}

    def say(self, message: Prompt | JSON, **options: Any) -> Reply:
        """The model's answer to the next message: a string, or one or more in OpenAI's shape.

        `options` are `chat`'s. With functions as `tools` they are called until the model
        answers, as by `run` (see `run` for `max_rounds` and `on_tool`).
        """
        deque(self._begin(message, options, streaming=False), maxlen=0)
        return self.reply

    def stream(self, message: Prompt | JSON, **options: Any) -> Iterator[Chunk]:
        """The answer as it comes, otherwise as `say`; remembered once it has come whole."""
        return self._begin(message, _checked_options(options), streaming=True)

    @property
    def reply(self) -> Reply:
        """The latest answer; raises `BadRequestError` before the first."""
        if self._reply is None:
            raise BadRequestError("There is no reply yet", hint="Call `say` first.")
        return self._reply

    def to_json(self) -> JSON:
        """The conversation as plain values; functions and types among the options are left out."""
        left_out = ("tools", "on_tool", "returns")
        options = {k: v for k, v in self.options.items() if k not in left_out}
        model = self.model.id if isinstance(self.model, Model) else self.model
        own = {"system": self.system, "model": model, "messages": self.messages}
        whole: JSON = {**own, "options": options}
        _encoded(whole)  # raises for what JSON cannot hold
        return whole

    @classmethod
    def from_json(cls, data: JSON, client: Puter | None = None) -> Self:
        """The conversation that `to_json` gave; raises `BadRequestError` for anything else."""
        is_one = isinstance(data, Mapping) and isinstance(data.get("messages", []), list)
        _require(is_one, "The conversation", data, "Pass what `to_json` gave.")
        own: JSON = {name: data[name] for name in ("system", "model", "messages") if data.get(name)}
        options = data.get("options") or {}
        _require(isinstance(options, Mapping), "options", options, "Pass what `to_json` gave.")
        return cls(client=client, **{**_checked_options(options), **own})

    def _begin(self, message: Prompt | JSON, options: JSON, streaming: bool) -> Iterator[Chunk]:
        """Check what is asked, which a generator would do only when it is read."""
        asked = {"model": self.model, "system": self.system, **self.options, **options}
        parts = _input_parts(asked.pop("images", ()), asked.pop("files", ()))
        prompt = [message] if isinstance(message, Mapping) else message
        messages = [*self.messages, *messages_from(prompt, None, parts)]
        return self._turns(messages, asked, streaming)

    def _turns(self, messages: Messages, options: JSON, streaming: bool) -> Iterator[Chunk]:
        max_rounds, on_tool = options.pop("max_rounds", 8), options.pop("on_tool", None)
        is_count = isinstance(max_rounds, int) and max_rounds >= 0
        _require(is_count, "max_rounds", max_rounds, "Give 0 or more.")
        tools = options.get("tools") or ()
        is_run = all(map(callable, _as_list(tools, "tools")))
        functions = _functions_by_name(tools) if is_run else {}
        client, used = self._client or _default_client(), Usage()
        for rounds_left in range(max_rounds, -1, -1):
            asked = client._build_request(messages, **options)
            with client._open(asked, is_stream=streaming) as stream:
                yield from stream
            used += stream.reply.usage
            reply = replace(stream.reply, usage=used)
            if not functions:
                raise_for_invalid(reply)
            messages = [*messages, message_from(reply)]
            if not functions or not reply.tool_calls:
                self.messages, self._reply = messages, reply
                return
            for call in reply.tool_calls if rounds_left else ():
                result = _called(call, functions, on_tool)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
            if options.get("tool_choice") not in (None, "none"):
                # it has called: a choice that forces it would make it call for ever
                options["tool_choice"] = "auto"
        message = f"The model still calls functions after {max_rounds} rounds"
        hint = "Raise `max_rounds`, or say in the prompt when to stop."
        raise ReplyError(message, raw=repr(reply), reply=reply, hint=hint)


def _checked_options(options: Mapping[str, Any]) -> JSON:
    own = ("max_rounds", "on_tool", *_OWN_ARGUMENTS)
    _check_names((n for n in options if n not in own), "option {!r} of a turn")
    return dict(options)


def _input_parts(images: Any, files: Any) -> list[JSON]:
    images, files = _as_list(images, "images"), _as_list(files, "files")
    return [*map(image_part, images), *map(file_part, files)]


def _as_list(value: Any, name: str) -> Any:
    """One path, URL, bytes, (name, bytes) or function as a list of it; a list stays."""
    alone = isinstance(value, (str, bytes, bytearray, os.PathLike)) or callable(value)
    if alone or (_is_named(value) and isinstance(value[0], str)):
        return [value]
    _require(isinstance(value, (list, tuple)), name, value, "Give a list.")
    return value


def _functions_by_name(tools: Any) -> dict[str, Callable[..., Any]]:
    functions: dict[str, Callable[..., Any]] = {}
    for tool in _as_list(tools, "tools"):
        _require(callable(tool), "A tool", tool, "`run` needs functions; with schemas use `chat`.")
        name = function_schema(tool)["function"]["name"]
        if name in functions:
            hint = "Give each a name of its own."
            raise BadRequestError(f"Two functions are called {name!r}", hint=hint)
        functions[name] = tool
    return functions


def _called(call: ToolCall, functions: Mapping[str, Any], on_tool: Any) -> str:
    """Call one function for the model; whatever happens is the text of its result."""
    if call.invalid:
        return f"Error: the arguments are not a JSON object: {call.invalid[:200]}"
    if on_tool is not None and on_tool(call) is False:
        return "The user refused this call."
    function = functions.get(call.name)
    if function is None:
        return f"Error: there is no function {call.name!r}; there are {sorted(functions)}."
    try:
        result = function(**read_arguments(function, call.arguments))
        if inspect.iscoroutine(result):
            import asyncio

            with closing(result) as coroutine:
                # fails in a thread whose loop is running, and says so
                result = asyncio.run(coroutine)
        return tool_result_text(result)
    except Exception as error:  # noqa: BLE001 (any error of a tool is the model's to read)
        _log.warning("The function %s failed", call.name, exc_info=True)
        return f"Error: {type(error).__name__}: {error}"


# The default client and the environment's settings that it was made by.
_default: tuple[Any, Puter] | None = None
_default_lock = threading.Lock()


def _default_client() -> Puter:
    """The client of `chat` and `stream`; made anew when the environment has changed."""
    global _default
    environment = frozenset(item for item in os.environ.items() if item[0].startswith("PUTER_"))
    with _default_lock:
        if _default is None or _default[0] != environment:
            old, _default = _default, (environment, Puter())
            if old is not None:
                old[1].close()
        return _default[1]


def _on_default_client(method: Callable[Concatenate[Puter, _P], _T]) -> Callable[_P, _T]:
    """A method as a function of the module, for type checkers and help as well."""
    call: Callable[..., _T] = method

    def function(prompt: Prompt | None = None, /, **arguments: Any) -> _T:
        return call(_default_client(), prompt, **arguments)

    function.__name__ = function.__qualname__ = method.__name__
    function.__doc__ = f"{method.__doc__}\n\n    On a client that is made at the first use."
    function.__signature__ = inspect.signature(partial(call, None))  # type: ignore[attr-defined]
    shown: Callable[..., _T] = function
    return shown


chat, stream = _on_default_client(Puter.chat), _on_default_client(Puter.stream)


# ---- credit in words, for the MCP server and the command line ----

_NOBODY = "You are not signed in. Sign in with: python -m puter login"


def credit_row(client: Puter, account: Account) -> JSON:
    """What an account may still spend; when that fails, why."""
    try:
        credit = asdict(client.usage(account.username))
    except PuterError as error:
        return {"username": account.username, "error": str(error)}
    del credit["raw"]
    names = ("cost", "units", "count")
    by_api = {api: dict(zip(names, costs)) for api, costs in credit["by_api"].items()}
    return {"username": account.username, "error": None, **credit, "by_api": by_api}


def credit_text(row: JSON) -> str:
    """A row of credit in words."""
    if row["error"]:
        return str(row["error"])
    left, whole = (money(row[key], row["unit"]) for key in ("remaining", "allowance"))
    return f"{left} of {whole} left this month"


# ======================================================================================
# 10. login · uses: errors, values, config, policies, transport, Puter
# ======================================================================================
LOGIN_PORT = 19847  # the port that the plugin's users know
LOGIN_TIMEOUT_S = 300.0
SIGN_IN_TRIES = 3
_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>puter.py</title>
<style>body{{font:18px/1.5 system-ui,sans-serif;max-width:34rem;margin:4rem auto;padding:0 1rem}}
</style><script>history.replaceState(null, "", "/")</script></head>
<body><h1>{title}</h1><p>{text}</p></body></html>
"""


def check_sign_in(config: Config) -> None:
    """Raise `ConfigError` where there is nothing to sign in to: tokens go to Puter alone."""
    if is_foreign(config):
        problem = f"{config.api_base_url} is not Puter's server, so there is no sign-in"
        raise ConfigError(problem, hint="Its key is the setting `openai_api_key`.")


def account_of(token: str, config: Config) -> Account:
    """Ask the server whose token this is; raises `AuthError` if it is nobody's.

    Raises `AuthError` too for a temporary account when `auto_create_temp_user` is off, and
    `ConfigError` when the settings name a server that is not Puter's.
    """
    check_sign_in(config)
    with Puter(token, config=config) as client:
        for retry in itertools.count(1):
            try:
                user = client.whoami()
                break
            except PuterError as error:
                # an approved sign-in is not thrown away for a moment's failure
                if not error.retryable or retry == SIGN_IN_TRIES:
                    raise
                time.sleep(retry_delay_s(error, retry, config.retry_delay_ms / 1000))
    username, is_temporary = user.get("username"), bool(user.get("is_temp"))
    if not isinstance(username, str) or not username:
        raise ServerError("The server does not say whose token this is")
    if is_temporary and not config.auto_create_temp_user:
        problem = f"{username} is a temporary account, and auto_create_temp_user is false"
        hint = "Sign in to your own account in the browser first, then log in again."
        raise AuthError(problem, hint=hint)
    return Account(username, token, int(time.time() * 1000), None, is_temporary)


class _Callback:
    """What the callback does with a request: no sockets, so that a test is a table."""

    def __init__(self, nonce: str, check: Callable[[str], Account]) -> None:
        self.path = f"/callback/{nonce}"
        self._check = check
        self._first = threading.Lock()  # held by the token that came first
        self.done = threading.Event()
        self.account: Account | None = None
        self.error: PuterError | None = None

    def handle(self, method: str, target: str, host: str) -> tuple[int, str, str]:
        """(status, title, text) of the page for a request."""
        if re.sub(r":\d+$", "", host.lower()) not in _LOOPBACK_NAMES:
            return 403, "Forbidden", "This page is only for this computer."
        if method != "GET":
            return 405, "Method not allowed", "Only GET is known here."
        url = urlsplit(target)
        if url.path == "/":
            # Not the URL itself: others on this computer could sign the user in with it.
            return 200, "Sign in", "Open the URL that the terminal shows."
        import hmac
        import html

        if not hmac.compare_digest(url.path.encode(), self.path.encode()):
            return 404, "Not found", "There is nothing here."
        token = parse_qs(url.query).get("token", [""])[0]
        if not token:
            return 400, "No token", "Puter sent no token. Please try again."
        if not self._first.acquire(blocking=False):
            return 410, "Already used", "This sign-in is over; you can close the page."
        try:
            self.account = self._check(token)
        except PuterError as error:
            self.error = error
            return 403, "Not signed in", html.escape(str(error))
        except BaseException:
            self.error = AuthError("The sign-in failed")
            raise
        return 200, f"Signed in as {html.escape(self.account.username)}", "You can close this page."


def browser_login(
    config: Config,
    *,
    show: Callable[[str], None],
    open_browser: Callable[[str], Any] | None = None,
    port: int | None = None,
    timeout_s: float = LOGIN_TIMEOUT_S,
) -> Account:
    """Sign in through the user's browser; the account with its token, not stored yet.

    Args:
        show: gets the URL of Puter's page, as a line for the user.
        open_browser: opens a URL, such as `webbrowser.open`; None leaves it to the user
            (over SSH, with the port forwarded).
        port: where to wait for the answer on 127.0.0.1; None is `LOGIN_PORT`, or any free one
            while that is in use.
        timeout_s: how long to wait for the user.

    Raises `AuthError` after the time, or when the server does not know the token, and
    `ConfigError` when the given port is in use, or the server is not Puter's.
    """
    check_sign_in(config)
    callback = _Callback(os.urandom(16).hex(), lambda token: account_of(token, config))
    server = _callback_server(callback, port)
    back = quote(f"http://127.0.0.1:{server.server_address[1]}{callback.path}", safe="")
    url = f"{config.gui_base_url}/?action=authme&redirectURL={back}"
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    try:
        show(url)
        if open_browser is not None:
            open_browser(url)
        until = time.monotonic() + timeout_s
        while not callback.done.wait(0.1):  # in short waits, so that Ctrl-C ends at once
            if time.monotonic() > until:
                hint = "Run `python -m puter login` again. If the browser is on another computer, "
                hint += "see `--no-browser` or `--with-token`."
                raise AuthError(f"Nobody signed in within {timeout_s:.0f} seconds", hint=hint)
    finally:
        server.shutdown()
        server.server_close()
    if callback.account is None:
        raise callback.error or AuthError("The sign-in failed")
    return callback.account


def _callback_server(callback: _Callback, port: int | None) -> Any:
    """An HTTP server on 127.0.0.1, on this port or the default."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # a connection that stays silent must not hold the thread

        def answer(self) -> None:
            try:
                host = self.headers.get("Host", "")
                status, title, text = callback.handle(self.command, self.path, host)
                body = _PAGE.format(title=title, text=text).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("Referrer-Policy", "no-referrer")
                self.end_headers()
                self.wfile.write(body if self.command != "HEAD" else b"")
            finally:  # the user has the page, or did not wait for it
                if callback.account or callback.error:
                    callback.done.set()

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = answer

        def log_message(self, format: str, *args: Any) -> None:
            """Silent: the URL holds the token."""

    class Server(ThreadingHTTPServer):
        allow_reuse_address = os.name != "nt"  # on Windows it would share a port in use

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Silent: browsers hang up early."""

    try:
        return Server(("127.0.0.1", LOGIN_PORT if port is None else port), Handler)
    except OSError as error:
        if port is None:
            return Server(("127.0.0.1", 0), Handler)
        reason = error.strerror or str(error)
        hint = "Choose another --port, or end the program that uses it."
        raise ConfigError(f"Cannot wait on port {port} ({reason})", hint=hint) from None


# ======================================================================================
# 11. gateway · uses: everything above but login
# ======================================================================================
SERVER_PORT = 11480
MAX_CONNECTIONS = 128
MAX_STOPS = 16

# What is passed on to Puter as it is; other fields of OpenAI's say nothing to it.
_PASSED_ON = """
    temperature top_p reasoning_effort reasoning verbosity seed tool_choice parallel_tool_calls
    response_format presence_penalty frequency_penalty
""".split()


# ---- what the dialects share: values ----


class ResponseMemory:
    """Values of recent answers by their ids, bounded in bytes: the oldest go first."""

    def __init__(self, limit_bytes: int = 16 * 1024 * 1024) -> None:
        self._limit_bytes = limit_bytes
        self._texts: dict[str, str] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    @cached_property
    def extras(self) -> ResponseMemory:
        """What providers want back with calls: apart, so that no response takes its place."""
        return ResponseMemory(self._limit_bytes // 4)

    def put(self, key: str, value: Any) -> None:
        """Remember a JSON value."""
        text = json.dumps(value)
        if len(text) > self._limit_bytes:
            return  # else all others would go for it
        with self._lock:
            self._bytes += len(text) - len(self._texts.pop(key, ""))
            self._texts[key] = text
            while self._bytes > self._limit_bytes:
                self._bytes -= len(self._texts.pop(next(iter(self._texts))))

    def get(self, key: str) -> Any:
        """A copy of the value, None when it is not there (any more)."""
        return json.loads(self._texts.get(key, "null"))


class ChatRequest(NamedTuple):
    """What a client of the gateway asks, whatever dialect it speaks.

    `messages` and `tools` have OpenAI's shape, `args` go on to Puter, `stop` holds at most
    `MAX_STOPS` texts. `names` maps tools' names to the caller's own, longer ones. `options` is
    what only its dialect needs to word the answer; `include_usage` false there ends the reading
    of a stream at a stop text. `memory` holds what providers want back with calls. `search` is
    the tool with which the model may search the web; it is all that is wanted if `must_search`,
    or without `tools`. What is `canned` is the answer: no model is asked.
    """

    model: str
    messages: Messages
    tools: list[JSON]
    args: JSON
    options: JSON
    memory: ResponseMemory
    names: Mapping[str, str] = types.MappingProxyType({})
    streaming: bool = False
    stop: tuple[str, ...] = ()
    wants_json: bool = False
    search: JSON | None = None
    must_search: bool = False
    canned: str = ""


class Ending(NamedTuple):
    """How an answer ended: comes after its last chunk; `stop_text` is the one that ended it."""

    finish_reason: str
    usage: Usage
    stop_text: str | None = None


# None: nothing came for a while. An error: the answer broke off. It or the ending is the last.
Event = Chunk | Ending | PuterError | None
Events = Iterable[Event]
# The data of an event, which has the name that its "type" says; None is a comment.
Frame = JSON | str | None
# The name of the model that answers, as known by then.
ModelName = Callable[[], str]


def event_text(frame: Frame) -> str:
    """A frame as a Server-Sent Event."""
    if frame is None:
        return ": keep-alive\n\n"
    if isinstance(frame, str):
        return f"data: {frame}\n\n"
    name = f"event: {frame['type']}\n" if "type" in frame else ""
    return f"{name}data: {json.dumps(frame)}\n\n"


class Dialect(NamedTuple):
    """One protocol that the gateway speaks: pure translations, no I/O.

    `parse` raises `BadRequestError`. `body` gets the reply as `whole_answer` gives it. `error`
    gets the HTTP status and the id of the request. `compute` is for a path that asks no model. A
    stream that broke off is cut without HTTP's own end when `cuts_broken_streams`; `write` makes
    a frame what a stream of the type `mime` holds.
    """

    parse: Callable[[JSON, ResponseMemory], ChatRequest]
    body: Callable[[ChatRequest, Reply, Ending], JSON]
    frames: Callable[[ChatRequest, ModelName, Events], Iterator[Frame]]
    error: Callable[[PuterError, int, str], JSON]
    compute: Callable[[JSON], JSON] | None = None
    cuts_broken_streams: bool = False
    write: Callable[[Frame], str] = event_text
    mime: str = "text/event-stream; charset=utf-8"


# ---- what the dialects share: requests ----


def checked_request(
    body: JSON,
    memory: ResponseMemory,
    messages: Messages,
    tools: Any,
    args: JSON,
    stop: Any = None,
    spaces: Mapping[str, str] = types.MappingProxyType({}),
    **fields: Any,
) -> ChatRequest:
    """A request of any dialect, checked; raises `BadRequestError`.

    Model and streaming are what the `body` says, all else is in OpenAI's shape. `args` may hold
    `tool_choice` and `response_format`; as most providers know neither, they are asked for in
    a system message as well. `spaces` are the namespaces of tools that a choice may name without.
    `fields` are taken as they are.
    """
    model = body.get("model") or ""  # without one the owner's default is meant
    is_name = isinstance(model, str) and len(model) <= 200 and strip_puter_prefix(model)
    _demand(is_name or not model, f"model is {_describe(model)}: name a model", "model")
    _demand(messages, "messages must hold at least one", "messages")
    is_own = any("puter_path" in part for one in messages for part in _parts(one.get("content")))
    _demand(not is_own, "puter_path is not for callers of this server", "messages")
    # -1 is how some say that there is no limit
    args = {k: v for k, v in args.items() if v is not None and (k, v) != ("max_tokens", -1)}
    if (limit := args.get("max_tokens")) is not None:
        is_count = _is_number(limit) and limit == int(limit) and limit >= 1
        _demand(is_count, "max_tokens must be a whole number, 1 or more", "max_tokens")
        args["max_tokens"] = int(limit)
    if "none" in (chosen := args.get("tool_choice"), _dig(chosen, "type")):
        fields |= {"search": None, "must_search": False}
    schemas = tool_schemas(tools)
    functions = [tool["function"] for tool in schemas if "function" in tool]
    names = {_flat_name(function["name"]): function["name"] for function in functions}
    for function in functions:
        function["name"] = _flat_name(function["name"])
    schemas, order = _choose_tools(schemas, args, spaces)
    shape = json_instruction(args.get("response_format"))
    messages = [_restored(message, memory) for message in messages]
    if orders := [text for text in (order, shape) if text]:
        messages = with_instruction(messages, "\n".join(orders))
    stops = [stop] if _is_text(stop) else stop or []
    is_list = isinstance(stops, list) and all(map(_is_text, stops))
    _demand(is_list, "stop must be a string or a list of strings", "stop")
    _demand(len(stops) <= MAX_STOPS, f"stop may hold {MAX_STOPS} texts", "stop")
    fields |= {"streaming": body.get("stream") is True, "wants_json": bool(shape)}
    fields |= {"memory": memory, "names": names, "stop": tuple(stops)}
    return ChatRequest(model, messages, schemas, args, **fields)


def _bad_request(why: str, param: str | None = None, status: int = 400, **more: Any) -> PuterError:
    return BadRequestError(f"Bad request: {why}", hint="", param=param, status=status, **more)


def _demand(ok: object, why: str, param: str | None = None, **more: Any) -> None:
    """Raise `BadRequestError`, which says why, if it is not ok."""
    if not ok:
        raise _bad_request(why, param, **more)


def _objects(value: Any, name: str) -> list[JSON]:
    objects: list[JSON] = [] if value is None else value
    _demand(isinstance(objects, list), f"{name} must be a list of objects", name)
    for number, one in enumerate(objects):
        if not isinstance(one, dict):
            raise _bad_request(f"{name}[{number}] is {_describe(one)}, but must be an object", name)
    return objects


def _pick(value: Any, *keys: str) -> JSON:
    return {k: value[k] for k in keys if k in value} if isinstance(value, dict) else {}


# A choice of these kinds names a tool of the caller's.
_NAMING_KINDS = (None, "function", "custom", "tool", "tool_search")


def _choose_tools(
    tools: list[JSON], args: JSON, spaces: Mapping[str, str]
) -> tuple[list[JSON], str]:
    """(the tools to offer, an instruction for the model) by the `tool_choice` of any dialect.

    It stays in `args` as chat completions word it, and only if there are tools.
    """

    def named(one: Any) -> JSON:
        name = str(_dig(one, "function", "name") or _dig(one, "name") or _dig(one, "type"))
        name = _flat_name(name, _dig(one, "namespace") or spaces.get(name))
        found = [tool for tool in tools if _dig(tool, "function", "name") == name]
        _demand(found, f"tool_choice is {_describe(one)}: it names no tool", "tool_choice")
        return found[0]

    choice, order = args.pop("tool_choice", None), ""
    kind = _dig(choice, "type")
    if kind == "allowed_tools":
        allowed = _dig(choice, "allowed_tools") or choice
        chosen, choice = _dig(allowed, "tools"), _dig(allowed, "mode")
        text = 'tool_choice allowed_tools needs tools, and "auto" or "required" as mode'
        _demand(isinstance(chosen, list) and choice in ("auto", "required"), text, "tool_choice")
        tools = [named(one) for one in chosen if _dig(one, "type") in _NAMING_KINDS]
    elif kind not in _NAMING_KINDS:
        known = r"web_|file_|image_|code_|computer|mcp|(local_)?shell|apply_patch|(auto|any|none)$"
        text = f"tool_choice is {_describe(choice)}, which is not known"
        _demand(re.match(known, str(kind)), text, "tool_choice")
        # a tool that the provider would run itself leaves nothing to choose
        choice = {"any": "required", "none": "none"}.get(str(kind), "auto")
    if not tools or choice == "none":
        args.pop("parallel_tool_calls", None)
        return [], ""
    if choice == "required":
        order = "Answer by calling at least one of the functions."
    elif choice not in (None, "auto"):
        tools = [named(choice)]
        name = tools[0]["function"]["name"]
        choice = {"type": "function", "function": {"name": name}}
        order = f"Answer by calling the function {name}."
    if choice:
        args["tool_choice"] = choice
    return tools, order


def _flat_name(name: Any, namespace: Any = None) -> str:
    """The name of a tool as a model may have it: one word of at most 64 letters."""
    flat = f"{namespace}__{name}" if namespace else str(name)
    if namespace or len(flat) > 64:
        flat = re.sub(r"[^\w-]", "_", flat, flags=re.ASCII)
    return flat if len(flat) <= 64 else f"{flat[:55]}_{token_fingerprint(flat)[:8]}"


_NO_SEARCH = (
    "Web search is not available here: this model runs no tools of its own. Nothing was "
    "searched; use another tool, such as one that fetches a URL, or say that it cannot be done."
)


def _without_suffix(name: str) -> str:
    return re.sub(r"\[\w*\]$", "", name)  # claude-opus-4-8[1m]


def with_served_model(request: ChatRequest, name: str, models: ModelList) -> ChatRequest:
    """The request with a model of the catalogue, and no more `max_tokens` than that can do.

    Without any `models` the name is taken as it is. Raises `ModelNotFoundError`.
    """
    name = _without_suffix(strip_puter_prefix(name))
    model, args = models.find(name) if models else None, request.args
    if request.search is not None and model and model.provider in SEARCH_PROVIDERS:
        request = request._replace(tools=[*request.tools, *tool_schemas([request.search])])
    elif request.must_search or (request.search is not None and not request.tools):
        able = [m.id for m in models if m.provider in SEARCH_PROVIDERS][:3] or ["none"]
        text = f"{_NO_SEARCH} Models that search: {', '.join(able)}."
        request = request._replace(canned=text)
    if model is None:
        return request._replace(model=name)
    if model.max_tokens and "max_tokens" in args:
        args = {**args, "max_tokens": min(args["max_tokens"], model.max_tokens)}
    return request._replace(model=name if name in model.names() else model.id, args=args)


# ---- what the dialects share: contents ----

# A picture in a text of ours, as `_shown_image` writes it.
_SHOWN_IMAGE = r"!\[image\]\((data:image/[\w.+-]{1,20};base64,[A-Za-z0-9+/=]+|https?://[^\s()]+)\)"


def _shown_image(image: Picture) -> str:
    return f"![image]({image.as_url()})"


def _restored(message: JSON, memory: ResponseMemory) -> JSON:
    """The message with its texts as one, its pictures beside, and what its provider wants back."""
    content = message.get("content")
    if isinstance(content, list) and all({*part} == {"type", "text"} for part in content):
        content = "\n\n".join(part["text"] for part in content if part["text"]) or None
    message = {**message, "content": content}
    if message["role"] == "assistant" and isinstance(content, str) and "![image](" in content:
        urls = [{"url": found} for found in re.findall(_SHOWN_IMAGE, content)]
        message["images"] = [{"type": "image_url", "image_url": url} for url in urls]
        message["content"] = re.sub(_SHOWN_IMAGE, "", content) or None
    calls = [dict(call) for call in message.get("tool_calls") or []]
    for call in calls:
        call["function"] = {**call["function"], "name": _flat_name(call["function"]["name"])}
        own_id = call["id"].rpartition("_")[2]  # the same in all dialects
        if extra := memory.extras.get(f"call_{own_id}"):
            call["extra_content"] = extra
        message |= memory.extras.get(f"message_{own_id}") or {}
    return {**message, "tool_calls": calls} if calls else message


# ---- what the dialects share: answers ----


class StopText:
    """Ends a text at the first of some stop texts, also when one spans several pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held_limit = max(map(len, stops), default=1) - 1
        self._held = ""
        self.found: str | None = None
        """The stop text that ended the text."""

    def feed(self, text: str, is_last: bool = False) -> str:
        """What may be shown now; an end in which a stop text may have begun is held back."""
        text, self._held = self._held + text, ""
        if self.found:
            return ""
        limit = len(text) if is_last else max(0, len(text) - self._held_limit)
        places = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        # behind the limit, an earlier one may still be on its way
        if places and min(places)[0] <= limit:
            limit, self.found = min(places)
        else:
            self._held = text[limit:]
        return text[:limit]

    def flush(self) -> str:
        """What was held back and turned out to be text."""
        return self.feed("", is_last=True)


# Chunks that came together, None for a while without any, and at last the whole reply.
Batch = Sequence[Chunk] | Reply | None


def answer_events(request: ChatRequest, batches: Iterable[Batch]) -> Iterator[Event]:
    """What happens in an answer, for any dialect; nothing comes behind a stop text.

    A call has the caller's name, and an id of ours: a model's own, alike in turns, confuse agents.
    """
    stop, ending = StopText(request.stop), Ending("stop", Usage())
    failure, first_id, extras = None, "", request.memory.extras
    try:
        for batch in batches:
            if batch is None:
                yield None
            elif isinstance(batch, Reply):
                ending = Ending(batch.finish_reason, batch.usage)
                if first_id and batch.extra:
                    extras.put(f"message_{first_id}", batch.extra)
            for chunk in batch if isinstance(batch, Sequence) else ():
                text = stop.feed(chunk.text) if chunk.type == "text" else ""
                text = stop.flush() if chunk.tool_call else text
                if text:
                    yield Chunk("text", text)
                if stop.found or chunk.type in ("text", "usage"):
                    continue
                if call := chunk.tool_call:
                    name, own_id = request.names.get(call.name, call.name), os.urandom(12).hex()
                    first_id = first_id or own_id
                    if call.extra_content:
                        extras.put(f"call_{own_id}", call.extra_content)
                    call = replace(call, id=f"call_{own_id}", name=name)
                    chunk = Chunk("tool_call", tool_call=call)
                yield chunk
            if stop.found and request.streaming and not request.options.get("include_usage", True):
                break
    except PuterError as error:
        failure = error
    if text := stop.flush():
        yield Chunk("text", text)
    yield failure or (Ending("stop", ending.usage, stop.found) if stop.found else ending)


def whole_answer(request: ChatRequest, reply: Reply) -> tuple[Reply, Ending]:
    """The reply as its stream would have given it, and how that ends."""
    reply = _with_json(request, reply)
    events: list[Any] = [*answer_events(request, [chunks_of(reply), reply])]
    *chunks, ending = events
    calls = tuple(chunk.tool_call for chunk in chunks if chunk.tool_call)
    text, reason = "".join(map(str, chunks)), ending.finish_reason
    return replace(reply, text=text, tool_calls=calls, finish_reason=reason), ending


def _with_json(request: ChatRequest, reply: Reply) -> Reply:
    if not request.wants_json or reply.tool_calls or reply.finish_reason == "length":
        return reply
    return replace(reply, text=json_text(reply.text))


def usage_object(usage: Usage) -> JSON | None:
    """The usage in OpenAI's names, or None when the provider reported nothing."""
    if usage.input_tokens is None and usage.output_tokens is None:
        return None
    sent, answered, cached, total = _token_counts(usage)
    counts: JSON = {"prompt_tokens": sent, "completion_tokens": answered, "total_tokens": total}
    counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return counts if usage.cost_usd is None else {**counts, "cost_usd": usage.cost_usd}


def _token_counts(usage: Usage) -> tuple[int, int, int, int]:
    """(tokens sent, answered, cached, all) as OpenAI counts: cached ones are among those sent."""
    answered, total = usage.output_tokens or 0, usage.total_tokens or 0
    # some providers count cached ones beside
    sent = max(usage.input_tokens or 0, total - answered)
    return sent, answered, usage.cached_tokens or 0, max(total, sent + answered)


# ---- what the dialects share: errors ----

# Codes for errors that the server gave none.
_CODES: dict[type[PuterError], str] = {AuthError: "not_signed_in", RequestTimeoutError: "timeout"}
_CODES[AllAccountsOnCooldownError] = "too_many_requests"


def error_status(error: PuterError) -> int:
    """The HTTP status that an error is answered with."""
    if isinstance(error, (BadRequestError, ServerError)) and (error.status or 0) >= 400:
        return error.status or 0
    return error.http_status


def error_headers(error: PuterError, status: int) -> dict[str, str]:
    """When to ask again, and for SDKs not to by themselves: the gateway has tried long enough."""
    headers, wait_s = {}, error.retry_after_s
    if status in (429, 503):
        if wait_s is None:
            wait_s = RATE_WINDOW_S if error.scope == "account" else 60.0
        headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    return headers if error.code == "overloaded" else {**headers, "x-should-retry": "false"}


# A URL, an IP address with its port, or the host that a failure of the network names.
_ADDRESS = (
    r"(?i)\b[a-z][a-z0-9+.-]{0,19}://[^\s,;()'\"<>]*(?<!\.)|\[[0-9a-f]{0,4}:[0-9a-f:]{1,45}\](:\d+)?"
    r"|\b\d{1,3}(\.\d{1,3}){3}(:\d+)?|(?<=ENOTFOUND )\S+|(?<=ECONNREFUSED )\S+"
)


def redacted_error(error: PuterError, names: Iterable[str], base_url: str) -> PuterError:
    """The error as callers may see it: no account's name in full, and no URL of the server."""
    public = copy.copy(error)
    if isinstance(error, AllAccountsOnCooldownError):
        public.message = "Every account of this gateway is on cooldown"
    elif isinstance(error, AuthError) and error.code != "invalid_api_key":
        public.message = "The account of this gateway must be signed in again"
    elif isinstance(error, StreamError):
        public.hint = ""
    text = str(public)[:4_000]
    for name in filter(None, {*names, error.account, *(a.account for a in error.attempts)}):
        named = rf"(?i)(?<!\w){re.escape(name)}(?!\w)"
        text = re.sub(named, lambda found: _masked_name(found[0]), text)
    host = re.escape(urlsplit(base_url).hostname or "")
    text = re.sub(rf"{_ADDRESS}|(?<![\w.-]){host}(?![\w-])[^\s,;()'\"]*", "Puter", text)
    public.message, public.hint, public.attempts = text, "", ()
    return public


def _masked_name(name: str) -> str:
    return _header_text(f"{name[: min(3, max(1, len(name) // 2))]}...")


def _header_text(text: str) -> str:
    return re.sub(r"[^ -~]", "?", text)


# ---- chat completions ----


def chat_request(body: JSON, memory: ResponseMemory) -> ChatRequest:
    """A request for `/v1/chat/completions`; raises `BadRequestError`."""
    is_one = body.get("n") in (None, 1) and body.get("n") is not True
    _demand(is_one, "n must be 1: ask several times for several answers", "n")
    _demand(not body.get("functions"), "functions is not supported: use tools", "functions")
    args = {k: body.get(k) for k in _PASSED_ON}
    limit = body.get("max_completion_tokens")
    args["max_tokens"] = body.get("max_tokens") if limit is None else limit
    options = {"include_usage": _dig(body, "stream_options", "include_usage") is True}
    if "messages" not in body and "input" in body:  # Cursor's, which asks in Responses' words
        messages = _item_messages(_response_items(body, memory))
    else:
        messages = _read_messages(body.get("messages"))
    stop, tools = body.get("stop"), body.get("tools")
    if isinstance(search := body.get("web_search_options"), dict):
        tools = [*_objects(tools, "tools"), {**search, "type": "web_search"}]
    return checked_request(body, memory, messages, tools, args, stop, options=options)


def _read_messages(messages: Any) -> Messages:
    keys = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_details")
    known = [_pick(message, *keys) for message in _objects(messages, "messages")]
    return [one for i, m in enumerate(known) for one in read_message(m, f"messages[{i}]")]


def chat_body(request: ChatRequest, reply: Reply, ending: Ending) -> JSON:
    """A whole `chat.completion`."""
    content: Any = "\n\n".join(filter(None, [reply.text, *map(_shown_image, reply.images)]))
    content = content or (None if reply.tool_calls else "")
    message: JSON = {"role": "assistant", "content": content, "refusal": None}
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["tool_calls"] = [openai_call(call) for call in reply.tool_calls]
    choice = {"index": 0, "message": message, "logprobs": None}
    usage = usage_object(ending.usage)
    head = {**_chat_head("chat.completion"), "model": reply.model}
    body = {**head, "choices": [{**choice, "finish_reason": ending.finish_reason}]}
    return {**body, "usage": usage} if usage else body


def chat_frames(request: ChatRequest, model: ModelName, events: Events) -> Iterator[Frame]:
    """The `chat.completion.chunk`s of an answer, as it comes."""
    head = _chat_head("chat.completion.chunk")
    with_usage = request.options.get("include_usage")

    def frame(delta: JSON, finish_reason: str | None = None) -> JSON:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if with_usage else {}
        return {**head, "model": model(), **usage, "choices": [choice]}

    role: JSON = {"role": "assistant"}
    calls = 0
    for event in events:
        if event is None:
            yield None
        elif isinstance(event, PuterError):
            yield chat_error(event, error_status(event), "")
        elif isinstance(event, Ending):
            yield frame({**role, "content": ""} if role else {}, event.finish_reason)
            usage = usage_object(event.usage)
            if with_usage and usage:
                yield {**head, "model": model(), "choices": [], "usage": usage}
            yield "[DONE]"
        else:
            if event.tool_call:
                delta: JSON = {"tool_calls": [{"index": calls, **openai_call(event.tool_call)}]}
                calls += 1
            else:
                key = "reasoning_content" if event.type == "reasoning" else "content"
                delta = {key: _shown_image(event.image) if event.image else event.text}
            yield frame({**role, **delta})
            role = {}


def _chat_head(kind: str) -> JSON:
    return {"id": _new_id("chatcmpl", "-"), "object": kind, "created": int(time.time())}


def chat_error(error: PuterError, status: int, request_id: str) -> JSON:
    """An error in OpenAI's shape."""
    param, code = error.param, error.code or _CODES.get(type(error))
    if isinstance(error, ModelNotFoundError):
        param, code = "model", "model_not_found"
    elif param and not code:
        code = f"invalid_{param}"
    body = {"message": str(error), "type": error.openai_type, "param": param, "code": code}
    return {"error": body}


# ---- what the dialects of agents share ----

# Puter's models know no more than "high".
_EFFORTS = {e: e for e in ("none", "minimal", "low", "medium", "high")}
_EFFORTS |= {"xhigh": "high", "max": "high"}

# Tools that a client runs by a provider's rules, which other models do not know.
_CLIENT_TOOLS = (
    r"(bash_|text_editor_|memory_|browser_|computer|shell$|local_shell|apply_patch)[\w.]*"
)


def _refuse_client_tool(kind: Any) -> None:
    if isinstance(kind, str) and re.fullmatch(_CLIENT_TOOLS, kind[:100]):
        problem = f"the tool {_describe(kind)} is for its provider's own models"
        raise _bad_request(f"{problem}: offer it as a function", "tools")


def _tool_name(name: Any) -> str:
    _demand(_is_text(name), f"a tool has the name {_describe(name)}", "tools")
    return str(name)


def _agent_args(effort: Any, form: Any, **defaults: Any) -> JSON:
    """How agents word an effort and a form of JSON, as arguments of chat completions."""
    if _dig(form, "type") == "json_schema":
        schema = {**defaults, **_pick(form, "name", "schema", "strict", "description")}
        form = {"type": "json_schema", "json_schema": schema}
    return {"reasoning_effort": _EFFORTS.get(str(effort)), "response_format": form}


# ---- responses ----

# What the fields of chat completions, which errors name, are called here.
_FIELDS = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text"}
# What a response repeats of its request, with its defaults; not the tools, which are long.
_ECHOED: JSON = {
    **dict.fromkeys("instructions max_output_tokens previous_response_id".split()),
    **dict.fromkeys(("temperature", "top_p", "user")),
    "metadata": {},
    "parallel_tool_calls": True,
    "reasoning": {"effort": None, "summary": None},
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
}
_UNFINISHED = {"length": "max_output_tokens", "content_filter": "content_filter"}
# A call's item: (prefix of its ids, its type, the field of its arguments, its events).
_CALL_ITEMS = {
    "function": ("fc", "function_call", "arguments", "function_call_arguments"),
    "custom": ("ctc", "custom_tool_call", "input", "custom_tool_call_input"),
    "tool_search": ("tsc", "tool_search_call", "arguments", ""),
}


def responses_request(body: JSON, memory: ResponseMemory) -> ChatRequest:
    """A request for `/v1/responses`; raises `BadRequestError`."""
    for name in ("background", "conversation", "prompt"):
        text = f"{name} is not supported here"
        _demand(not body.get(name), text, name, code="unsupported_parameter")
    items = _response_items(body, memory)
    instructions = read_parts(body.get("instructions"), "instructions")
    opening = [{"role": "system", "content": instructions}] if instructions else []
    messages = [*opening, *_item_messages(items)]
    offered: dict[str, tuple[JSON, JSON]] = {}
    found = [i for i in items if i.get("type") in ("additional_tools", "tool_search_output")]
    for one in (body, *found):
        _offer(one.get("tools"), offered)
    options = {
        "items": None if body.get("store") is False else items,
        "tools": {name: form for name, (form, _) in offered.items()},
        "echo": {k: v if body.get(k) is None else body[k] for k, v in _ECHOED.items()},
    }
    choice = body.get("tool_choice")
    args = {
        **_pick(body, "temperature", "top_p", "parallel_tool_calls", *RESPONSES_ARGUMENTS),
        "verbosity": _dig(body, "text", "verbosity"),
        **_agent_args(_dig(body, "reasoning", "effort"), _dig(body, "text", "format")),
        "max_tokens": body.get("max_output_tokens"),
        "tool_choice": choice,
    }
    functions = [function for _, function in offered.values()]
    forms = [form for form, _ in reversed(offered.values()) if "namespace" in form]
    spaces = {form["name"]: form["namespace"] for form in forms if form["name"] not in offered}
    search = next(filter(is_web_search, _objects(body.get("tools"), "tools")), None)
    # what must be called is a tool of the server's own
    is_required = "required" in (choice, _dig(choice, "mode"))
    must_search = is_web_search(choice) or (is_required and not offered)
    fields: JSON = {"options": options, "search": search, "must_search": must_search}
    return checked_request(body, memory, messages, functions, args, spaces=spaces, **fields)


def _response_items(body: JSON, memory: ResponseMemory) -> list[JSON]:
    items, previous = body.get("input"), body.get("previous_response_id")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    read: list[JSON] = []
    for item in _objects(items, "input"):
        if item.get("type", "item_reference") == "item_reference" and "role" not in item:
            name = str(item.get("id"))
            known = memory.get(f"item_{name}")
            text = f"Item with id '{name[:200]}' not found."
            text += " Items are not persisted when store is false."
            _demand(known or name.startswith("rs_"), text, "input", status=404)
            item = known or {"type": "reasoning"}
        read.append(item)
    before = [] if previous is None else memory.get(f"history_{previous}")
    text = f"Previous response with id {str(previous)[:200]!r} not found"
    _demand(before is not None, text, "previous_response_id", code="previous_response_not_found")
    return [*before, *read]


def _item_messages(items: Sequence[JSON]) -> Messages:
    messages: Messages = []
    for number, item in enumerate(items):
        one, last = _item_message(item, f"input[{number}]"), messages[-1] if messages else {}
        # a call joins the assistant's message that stands last
        if one and "tool_calls" in one and last.get("role") == "assistant":
            messages[-1] = {**last, "tool_calls": [*last.get("tool_calls", ()), *one["tool_calls"]]}
        elif one:
            messages += read_message(one, f"input[{number}]")
    return messages


def _item_message(item: JSON, where: str) -> JSON | None:
    """An item as a message; None for one that says nothing to a model."""
    kind, call_id = item.get("type", "message"), item.get("call_id")
    _require(isinstance(kind, str), f"{where}.type", kind, "Write a string.")
    if kind == "message":
        return _pick(item, "role", "content")
    if kind in ("function_call_output", "custom_tool_call_output", "tool_search_output"):
        output = item.get("output")
        if kind == "tool_search_output":
            found: dict[str, Any] = {}
            _offer(item.get("tools"), found)
            output = f"Tools to call now: {', '.join(found) or 'none'}"
        return {"role": "tool", "tool_call_id": call_id, "content": output}
    if kind in ("function_call", "custom_tool_call", "tool_search_call"):
        name = "tool_search" if kind == "tool_search_call" else item.get("name")
        is_custom = kind == "custom_tool_call"
        arguments = {"input": item.get("input")} if is_custom else item.get("arguments")
        function = {"name": _flat_name(name, item.get("namespace")), "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        _check_call(call, function, where)
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "image_generation_call" and item.get("result"):
        url = {"url": f"data:image/png;base64,{item['result']}"}
        return {"role": "assistant", "images": [{"type": "image_url", "image_url": url}]}
    if kind in _WORDED_KINDS:
        role = "user" if kind.endswith("_output") else "assistant"
        return {"role": role, "content": f"[{kind}: {json.dumps(item)[:4_000]}]"}
    if kind not in _SKIPPED_KINDS:
        raise _bad_request(f"an item is of the kind {_describe(kind)}, which is not known", "input")
    return None


def _offer(tools: Any, offered: dict[str, tuple[JSON, JSON]], namespace: str = "") -> None:
    """Add tools by their flat names, each as (the form of its calls, its function).

    Tools that the provider would run itself are left out.
    """
    for tool in _objects(tools, "tools"):
        kind, name = tool.get("type"), tool.get("name")
        if kind == "namespace" and not namespace:
            _offer(tool.get("tools"), offered, _tool_name(name))
        elif kind == "tool_search" and tool.get("execution") == "client":
            offered.setdefault(kind, ({"type": kind}, {"name": kind, **_described(tool)}))
        elif kind in ("function", "custom"):
            flat = _flat_name(_tool_name(name), namespace)
            form = {"type": kind, "name": name, **({"namespace": namespace} if namespace else {})}
            offered.setdefault(flat, (form, {"name": flat, **_described(tool)}))
        else:
            _refuse_client_tool(kind)


def _described(tool: JSON) -> JSON:
    if tool["type"] != "custom":
        return _pick(tool, "description", "parameters")
    texts = tool.get("description"), _dig(tool, "format", "definition")
    parameters = {"type": "object", "properties": {"input": {"type": "string"}}}
    return {
        "description": "\n\n".join(str(text) for text in texts if text),
        "parameters": {**parameters, "required": ["input"], "additionalProperties": False},
    }


def responses_body(request: ChatRequest, reply: Reply, ending: Ending) -> JSON:
    """A whole `response`: the one that ends its stream."""
    *_, last = responses_frames(request, lambda: reply.model, [*chunks_of(reply), ending])
    response: JSON = last["response"]
    return response


def responses_frames(request: ChatRequest, model: ModelName, events: Events) -> Iterator[JSON]:
    """The events of a response, as it comes."""
    writer = _ResponseWriter(request, model)
    yield writer.state("created")
    yield writer.state("in_progress")
    for event in events:
        if event is None:
            yield writer.state("in_progress")
        elif isinstance(event, PuterError):
            yield writer.failure(event)
        elif isinstance(event, Ending):
            yield from writer.end(event)
        elif event.tool_call:
            yield from writer.call(event.tool_call)
        elif event.image:
            yield from writer.image(event.image)
        elif event.text:
            yield from writer.text(event.type, event.text)


# For each kind of text: the prefix of its item's id, its events, and the name of an index.
_TEXT_ITEMS = {
    "text": ("msg", "content_part", "output_text", "content_index"),
    "reasoning": ("rs", "reasoning_summary_part", "reasoning_summary_text", "summary_index"),
}


class _ResponseWriter:
    """Writes the events of one response: numbered, and one item open at a time."""

    def __init__(self, request: ChatRequest, model: ModelName) -> None:
        self._request, self._model = request, model
        self._head = {"id": _new_id("resp"), "object": "response", "created_at": int(time.time())}
        self._numbers = itertools.count()
        self._output: list[JSON] = []
        # what the open item is: "text", "reasoning", or none
        self._kind = ""
        self._place: JSON = {}
        self._pieces: list[str] = []

    def text(self, kind: str, text: str) -> Iterator[JSON]:
        id_prefix, part, events, index = _TEXT_ITEMS[kind]
        if kind != self._kind:
            yield from self.close()
            self._kind, self._pieces = kind, []
            self._place = {"item_id": _new_id(id_prefix), "output_index": len(self._output)}
            self._place |= {index: 0, "logprobs": []}
            yield self._item_event("added", self._text_item("in_progress"))
            yield self._event(f"{part}.added", **self._place, part=self._part())
        self._pieces.append(text)
        yield self._event(f"{events}.delta", **self._place, delta=text)

    def close(self, status: str = "completed") -> Iterator[JSON]:
        if self._kind:
            _, part, events, _ = _TEXT_ITEMS[self._kind]
            yield self._event(f"{events}.done", **self._place, text="".join(self._pieces))
            yield self._event(f"{part}.done", **self._place, part=self._part())
            yield self._item_event("done", self._text_item(status))
            self._kind = ""

    def call(self, call: ToolCall) -> Iterator[JSON]:
        default = {"type": "function", "name": call.name}
        form = {**self._request.options["tools"].get(call.name, default)}
        id_prefix, kind, key, events = _CALL_ITEMS[form.pop("type")]
        value: Any = openai_call(call)["function"]["arguments"]
        if kind == "tool_search_call":
            value, form = call.arguments, {"execution": "client"}
        elif kind == "custom_tool_call" and isinstance(call.arguments.get("input"), str):
            value = call.arguments["input"]
        item = {"type": kind, "id": _new_id(id_prefix), "call_id": call.id, **form}
        return self._whole_item(item, key, "" if events else {}, value, events)

    def image(self, image: Picture) -> Iterator[JSON]:
        """A picture; one that is only a URL is a text."""
        if not image.data:
            return chain(self.close(), self.text("text", _shown_image(image)))
        item = {"type": "image_generation_call", "id": _new_id("ig")}
        return self._whole_item(item, "result", None, base64.b64encode(image.data).decode())

    def _whole_item(
        self, item: JSON, key: str, empty: Any, value: Any, events: str = ""
    ) -> Iterator[JSON]:
        yield from self.close()
        place = {"item_id": item["id"], "output_index": len(self._output)}
        yield self._item_event("added", {**item, key: empty, "status": "in_progress"})
        if events:
            yield self._event(f"{events}.delta", **place, delta=value)
            yield self._event(f"{events}.done", **place, **{key: value})
        yield self._item_event("done", {**item, key: value, "status": "completed"})

    def end(self, ending: Ending) -> Iterator[JSON]:
        """The response as it ended; remembered for requests that refer to it."""
        reason = _UNFINISHED.get(ending.finish_reason)
        sent, answered, cached, total = _token_counts(ending.usage)
        written = ending.usage.written_tokens or 0
        usage = {
            "input_tokens": sent,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
            "output_tokens": answered,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": total,
        }
        status = "incomplete" if reason else "completed"
        yield from self.close(status)
        if reason == "content_filter" and self._request.streaming:
            # Codex would ask five times more if this were an incomplete response.
            error = {"code": "invalid_prompt", "message": "The provider's filter ended the answer"}
            yield self.state("failed", "failed", error=error, usage=usage)
            return
        memory, items = self._request.memory, self._request.options["items"]
        if items is not None:
            for item in self._output:
                memory.put(f"item_{item['id']}", item)
            memory.put(f"history_{self._head['id']}", [*items, *self._output])
        details = {"reason": reason} if reason else None
        yield self.state(status, status, usage=usage, incomplete_details=details)

    def failure(self, error: PuterError) -> JSON:
        """It broke off; what came of the open item is shown as incomplete."""
        if self._kind:
            self._output.append(self._text_item("incomplete"))
        # it tells Codex whether to ask again
        code = "server_error" if error.http_status >= 500 else "invalid_prompt"
        if isinstance(error, ContextLengthError):
            code = "context_length_exceeded"
        elif error.openai_type in ("insufficient_quota", "rate_limit_error"):
            code = error.openai_type.replace("limit_error", "limit_exceeded")
        return self.state("failed", "failed", error={"code": code, "message": str(error)})

    def state(self, event: str, status: str = "in_progress", **more: Any) -> JSON:
        response = {
            **self._head,
            **dict.fromkeys(("error", "incomplete_details", "usage")),
            **self._request.options["echo"],
            "status": status,
            "model": self._model(),
            "output": list(self._output),
            "store": self._request.options["items"] is not None,
            "tools": [],
            **more,
        }
        return self._event(event, response=response)

    def _event(self, name: str, **more: Any) -> JSON:
        return {"type": f"response.{name}", "sequence_number": next(self._numbers), **more}

    def _item_event(self, what: str, item: JSON) -> JSON:
        index = len(self._output)
        if what == "done":
            self._output.append(item)
        return self._event(f"output_item.{what}", output_index=index, item=item)

    def _part(self) -> JSON:
        text = "".join(self._pieces)
        if self._kind == "reasoning":
            return {"type": "summary_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _text_item(self, status: str) -> JSON:
        parts, item_id = [self._part()] if self._pieces else [], self._place["item_id"]
        if self._kind == "reasoning":
            return {"type": "reasoning", "id": item_id, "summary": parts}
        item = {"type": "message", "id": item_id, "role": "assistant"}
        return {**item, "status": status, "content": parts}


def responses_error(error: PuterError, status: int, request_id: str) -> JSON:
    """An error in OpenAI's shape, with this dialect's names of fields and codes."""
    error = copy.copy(error)
    error.param = _FIELDS.get(error.param or "", error.param)
    return chat_error(error, status, request_id)


# ---- messages ----

_STOP_REASONS = {"length": "max_tokens", "content_filter": "refusal", "tool_calls": "tool_use"}
_IMAGE_TOKENS = 1_500  # an estimate, also for pages of documents


def messages_request(body: JSON, memory: ResponseMemory) -> ChatRequest:
    """A request for `/v1/messages`; raises `BadRequestError`."""
    for name in ("model", "messages", "max_tokens"):
        _demand(body.get(name) is not None, f"{name}: Field required", name)
    # Claude Code begins with a note on the billing of Anthropic's own accounts.
    billing, system = "x-anthropic-billing-header:", read_parts(body.get("system"), "system")
    system = [part for part in system if not str(part.get("text")).startswith(billing)]
    opening = [{"role": "system", "content": system}] if system else []
    messages = [*opening, *_read_messages(body["messages"])]
    own, searches, others = [], [], []
    for tool in _objects(body.get("tools"), "tools"):
        if tool.get("type") in (None, "custom"):
            parameters = tool.get("input_schema") or {"type": "object", "properties": {}}
            described = {**_pick(tool, "description"), "parameters": parameters}
            own.append({"name": _tool_name(tool.get("name")), **described})
        elif is_web_search(tool):
            searches.append(tool)
        else:
            _refuse_client_tool(tool.get("type"))
            others.append(tool.get("name"))
    must_search = _dig(body, "tool_choice", "name") in [tool.get("name") for tool in searches]
    args = _messages_args({**body, "tool_choice": None} if must_search else body, others)
    fields: JSON = {"options": {}, "search": next(iter(searches), None), "must_search": must_search}
    stop = body.get("stop_sequences")
    return checked_request(body, memory, messages, own, args, stop, **fields)


def _messages_args(body: JSON, hosted: Collection[Any]) -> JSON:
    effort, budget = _dig(body, "output_config", "effort"), _dig(body, "thinking", "budget_tokens")
    form = _dig(body, "output_config", "format") or body.get("output_format")
    if effort is None and _is_number(budget):
        effort = "low" if budget < 4_000 else "medium" if budget < 16_000 else "high"
    choice, named = body.get("tool_choice"), _dig(body, "tool_choice", "name")
    is_known = choice is None or _dig(choice, "type") in ("auto", "any", "tool", "none")
    _demand(is_known, f"tool_choice is {_describe(choice)}", "tool_choice")
    text = f"the tool {_describe(named)} is not available here: it runs on Anthropic's servers"
    _demand(named is None or named not in hosted, text, "tool_choice")
    return {
        **_pick(body, "max_tokens", "temperature", "top_p"),
        **_agent_args(effort, form, name="answer", strict=True),
        "tool_choice": choice,
        "parallel_tool_calls": False if _dig(choice, "disable_parallel_tool_use") else None,
    }


def messages_body(request: ChatRequest, reply: Reply, ending: Ending) -> JSON:
    """A whole `message`."""
    signed = [p for p in reply.extra.get("content", ()) if p["type"] != "text"]
    skipped = ("usage", "reasoning") if signed else ("usage",)
    chunks = [chunk for chunk in chunks_of(reply) if chunk.type not in skipped]
    return {
        **_message_head(reply.model),
        "content": [*signed, *(_block_and_delta(chunk)[0] for chunk in chunks)],
        **_message_end(ending, bool(reply.tool_calls)),
        "usage": _messages_usage(ending.usage),
    }


def messages_frames(request: ChatRequest, model: ModelName, events: Events) -> Iterator[JSON]:
    """The events of a message, as it comes: blocks that do not overlap."""
    index, kind, has_called = 0, "", False

    def close() -> Iterator[JSON]:
        if kind == "thinking":
            signature = {"type": "signature_delta", "signature": _new_id(_OWN_SIGNATURE)}
            yield {"type": "content_block_delta", "index": index, "delta": signature}
        if kind:
            yield {"type": "content_block_stop", "index": index}

    yield {"type": "message_start", "message": _message_head(model())}
    for event in events:
        if event is None:
            yield {"type": "ping"}
        elif isinstance(event, PuterError):
            yield messages_error(event, error_status(event), "")
        elif isinstance(event, Ending):
            yield from close()
            end, usage = _message_end(event, has_called), _messages_usage(event.usage)
            yield {"type": "message_delta", "delta": end, "usage": usage}
            yield {"type": "message_stop"}
        elif event.tool_call or event.text or event.image:
            block, delta = _block_and_delta(event)
            if event.tool_call or block["type"] != kind:
                yield from close()
                index = index + 1 if kind else 0
                kind, has_called = block["type"], has_called or bool(event.tool_call)
                empty: JSON = {"text": "", "thinking": "", "signature": "", "input": {}}
                block |= {key: empty[key] for key in empty if key in block}
                yield {"type": "content_block_start", "index": index, "content_block": block}
            yield {"type": "content_block_delta", "index": index, "delta": delta}


def _block_and_delta(chunk: Chunk) -> tuple[JSON, JSON]:
    """(a block of what a chunk holds, how a stream adds that to the block)"""
    text, call = _shown_image(chunk.image) if chunk.image else chunk.text, chunk.tool_call
    if call:
        call = replace(call, id=f"toolu_{call.id.removeprefix('call_')}")
        # what cannot be read is named as that, so that no tool runs without it
        given = {"unreadable_arguments": call.invalid} if call.invalid else call.arguments
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": given}
        return block, {"type": "input_json_delta", "partial_json": json.dumps(given)}
    if chunk.type != "reasoning":
        return {"type": "text", "text": text}, {"type": "text_delta", "text": text}
    block = {"type": "thinking", "thinking": text, "signature": _new_id(_OWN_SIGNATURE)}
    return block, {"type": "thinking_delta", "thinking": text}


def _message_head(model: str) -> JSON:
    head: JSON = {"id": _new_id("msg"), "type": "message", "role": "assistant", "model": model}
    head |= {"content": [], "stop_reason": None, "stop_sequence": None}
    return {**head, "usage": _messages_usage(Usage())}


def _message_end(ending: Ending, has_called: bool) -> JSON:
    reason = _STOP_REASONS.get(ending.finish_reason, "tool_use" if has_called else "end_turn")
    reason = reason if ending.stop_text is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": ending.stop_text}


def _messages_usage(usage: Usage) -> JSON:
    sent, answered, cached, _ = _token_counts(usage)
    written = usage.written_tokens or 0
    return {
        "input_tokens": max(0, sent - cached - written),
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": cached,
        "output_tokens": answered,
    }


def messages_error(error: PuterError, status: int, request_id: str) -> JSON:
    """An error in Anthropic's shape."""
    status = 529 if error.code == "overloaded" else status
    kind = _ERROR_TYPES.get(status, _ERROR_TYPES[400 if status < 500 else 500])[1]
    message = str(error)
    # Claude Code shortens its history when it reads these words.
    if isinstance(error, ContextLengthError):
        size = f"{error.tokens} tokens > {error.limit} maximum" if error.tokens else message
        message = f"prompt is too long: {size}"
    body: JSON = {"type": "error", "error": {"type": kind, "message": message}}
    return {**body, "request_id": request_id} if request_id else body


def count_tokens(body: JSON) -> JSON:
    """An estimate for `/v1/messages/count_tokens`: a token for four letters."""
    asked = messages_request({**body, "max_tokens": 1}, ResponseMemory())
    text = json.dumps([asked.messages, asked.tools], ensure_ascii=False)
    text, images = re.subn(r'"data:[\w/+.-]+;base64,[^"]*"', "", text)
    return {"input_tokens": math.ceil(len(text) / 4) + _IMAGE_TOKENS * images}


# ---- all dialects, and the list of models ----

_CHAT_DIALECT = Dialect(chat_request, chat_body, chat_frames, chat_error, cuts_broken_streams=True)
_MESSAGES = Dialect(messages_request, messages_body, messages_frames, messages_error)
DIALECTS: dict[str, Dialect] = {
    "/v1/chat/completions": _CHAT_DIALECT,
    "/v1/responses": Dialect(responses_request, responses_body, responses_frames, responses_error),
    "/v1/messages": _MESSAGES,
    "/v1/messages/count_tokens": _MESSAGES._replace(compute=count_tokens),
}


def dialect_of(path: str, headers: Any = ()) -> Dialect:
    """The dialect of a path, or of the longest known path above it; else what the SDK speaks."""
    above = [known for known in DIALECTS if f"{path}/".startswith(f"{known}/")]
    default = "messages" if "anthropic-version" in headers else "chat/completions"
    return DIALECTS[max(above, key=len, default=f"/v1/{default}")]


def model_object(model: Model) -> JSON:
    """A model in OpenAI's shape and Anthropic's at once, with what else is known of it."""
    from datetime import date

    released = first = date(1970, 1, 1)
    with suppress(ValueError):  # a date in a form of its own is no reason to fail
        released = date.fromisoformat((model.released or "")[:10])
    return {
        "id": model.id,
        "object": "model",
        "created": (released - first).days * 86_400,
        "owned_by": model.provider or "puter",
        "type": "model",
        "display_name": model.name or model.id,
        "created_at": f"{released}T00:00:00Z",
        "name": model.name,
        "aliases": list(model.aliases),
        "context_length": model.window,
        "max_completion_tokens": model.max_tokens,
        "free": model.free,
    }


# ---- pictures and sound ----

# What a path makes, and the field of what it is made of.
MEDIA: dict[str, tuple[type[Any], str]] = {
    "/v1/images/generations": (Picture, "prompt"),
    "/v1/audio/speech": (Audio, "input"),
    "/v1/audio/transcriptions": (Transcript, "file"),
}


def media_args(path: str, body: JSON) -> JSON:
    """The arguments of a job, from what OpenAI's clients send; raises `BadRequestError`."""
    kind, given = MEDIA[path]
    # a text would be a path of this computer
    is_given = body.get(given) and isinstance(body[given], tuple if kind is Transcript else str)
    _demand(is_given, f"{given} is missing, or of the wrong kind", given)
    is_one = body.get("n") in (None, 1) and body.get("stream") not in (True, "true")
    _demand(is_one, "n must be 1, and stream is not supported")
    names = (*_JOB_ARGUMENTS, *_JOBS[kind].names.split())
    args = {key: value for key, value in _pick(body, *names).items() if value != "auto"}
    if (size := body.get("size")) not in (None, "auto"):
        is_size = re.fullmatch("[0-9]{1,5}x[0-9]{1,5}", str(size))
        _demand(is_size, "size must be WIDTHxHEIGHT", "size")
        args["ratio"] = dict(zip("wh", map(int, size.split("x")), strict=True))
    return args


def media_body(body: JSON, result: Any) -> tuple[JSON | bytes, str]:
    """(what came of a job as OpenAI's clients await it, its MIME type)"""
    wanted = body.get("response_format")
    if isinstance(result, Audio):
        if not result.data:
            raise ReplyError("The sound is only a URL", hint=f"Load it from {result.url}.")
        return result.data, result.mime
    if isinstance(result, Picture):
        shown = {"url": result.as_url()}
        if result.data and wanted != "url":
            shown = {"b64_json": base64.b64encode(result.data).decode()}
        return {"created": int(time.time()), "data": [shown]}, "application/json"
    if wanted in ("text", "srt", "vtt"):
        return result.text.encode(), "text/plain; charset=utf-8"
    return {**result.raw, "text": result.text}, "application/json"


def form_body(data: bytes, boundary: str) -> JSON:
    """The fields of a form (multipart/form-data, RFC 7578); a file is (name, bytes)."""
    from email.parser import BytesHeaderParser

    fields: JSON = {}
    parts = (b"\r\n" + data).split(f"\r\n--{boundary}".encode("latin-1", "replace"), 64)
    _demand(boundary and parts[-1][:2] == b"--", "the form has no end, or too many parts")
    for part in parts[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        # the time that email takes grows with the square
        _demand(len(head) <= 512, "the head of the form, or of a part of it, is too long")
        read = BytesHeaderParser().parsebytes(head.lstrip(b"\r\n"))
        try:
            name, file = read.get_param("name", "", "content-disposition"), read.get_filename()
        except ValueError as error:
            raise _bad_request(f"the form cannot be read ({error})") from None
        is_file = file is not None
        fields[str(name)] = (file, content) if is_file else content.decode("utf-8", "replace")
    return fields


# ---- who may call ----


class AccessRules(NamedTuple):
    """Who may call a server that listens on `host`."""

    host: str
    api_key: str | None = None
    allowed_origins: frozenset[str] = frozenset()
    allowed_hosts: frozenset[str] = frozenset()


def refusal(rules: AccessRules, path: str, headers: Any) -> PuterError | None:
    """Why a caller is refused, judged by the head of its request; None if it is not.

    The key is the guard where there is one. Without, a foreign Host is refused, since pages of
    other sites could reach this server under a name of theirs (DNS rebinding).
    """
    host, origin = headers.get("Host"), headers.get("Origin")
    name = re.sub(r":\d+$", "", (host or "").lower())
    own_names = {_in_url(rules.host).lower(), *rules.allowed_hosts}
    if rules.api_key is None and name not in own_names and not _is_this_computer(name):
        text = f"This server does not answer to the name {str(host)[:100]!r}"
        return AccessError(text, code="forbidden_host", hint="`--allow-host NAME` lets it.")
    is_own = str(origin).lower() == f"http://{host}".lower()
    if not (origin is None or is_own or rules.allowed_origins & {origin, "*"}):
        # a whole URL would be masked for callers
        text = f"Pages of {origin[:100].rpartition('/')[2]} may not call"
        return AccessError(text, code="forbidden_origin", hint="`--allow-origin URL` lets them.")
    if rules.api_key is not None and path not in ("/", "/health"):
        scheme, _, token = headers.get("Authorization", "").strip().partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        import hmac

        # http.server reads a head as Latin-1, whatever it was
        sent = [key.encode("latin-1", "replace") for key in (bearer, headers.get("x-api-key", ""))]
        own = [rules.api_key.encode(coding, "replace") for coding in ("utf-8", "latin-1")]
        if not any(hmac.compare_digest(key, one) for key in sent for one in own):
            text = "The API key is wrong or missing"
            return AuthError(text, code="invalid_api_key", hint="")
    return None


def _is_this_computer(host: str) -> bool:
    return _in_url(host) in _LOOPBACK_NAMES or bool(re.fullmatch(r"127(\.\d{1,3}){3}", host))


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


# ---- the server ----


class Limits(NamedTuple):
    """What a server bears of its callers, in bytes and seconds.

    A request has `head_bytes` in `head_s` from its first line, `body_bytes` in `body_s`, and
    `values` in its JSON (each takes far more memory than bytes); the bodies of all requests at
    once have `read_bytes`. `idle_s` is for the next request of a caller, or until it takes our
    bytes; `keep_alive_s` the silence in a stream before a sign of life is sent; `linger_s` for
    a caller that is turned away to read why; `drain_s` for what runs when the server stops.
    """

    head_bytes: int = 64 * 1024
    head_s: float = 20.0
    body_bytes: int = 32 * 1024 * 1024
    body_s: float = 300.0
    values: int = 1_000_000
    read_bytes: int = 128 * 1024 * 1024
    idle_s: float = 75.0
    keep_alive_s: float = 15.0
    linger_s: float = 1.0
    drain_s: float = 10.0


def _has_hung_up(connection: Any) -> bool:
    """Whether its other side has closed, even with bytes of it unread where poll can tell."""
    import select
    import socket

    try:
        if hasattr(select, "POLLRDHUP"):
            poller = select.poll()
            poller.register(connection, select.POLLRDHUP)
            return bool(poller.poll(0))
        is_readable = bool(select.select([connection], [], [], 0)[0])
        return is_readable and not connection.recv(1, socket.MSG_PEEK)
    except (OSError, ValueError) as error:
        # any other than a reset: its own thread has just closed it
        return isinstance(error, ConnectionError)


class OpenAIServer:
    """The gateway: an HTTP server for other programs, on one shared `Puter` client.

    Args:
        client: the client that asks Puter; it stays the caller's to close.
        host, port: where to listen; port 0 takes a free one. A host other than this computer
            needs an `api_key`, else `ConfigError`.
        api_key: what callers must send as a bearer token or `x-api-key`; None takes anything.
        allowed_origins: web origins whose pages may call ("*" for all).
        max_connections: more at once are turned away with 503, once no idle one can go.
        allowed_hosts: names besides its own that callers may know this computer by.
        models: ids of the only models to serve; a request for another one gets the first.
        limits: what is borne of callers.

    Use as a context manager, or `start()` and `stop()`. `url` is the base for clients.
    """

    def __init__(
        self,
        client: Puter,
        host: str = "127.0.0.1",
        port: int = SERVER_PORT,
        api_key: str | None = None,
        allowed_origins: Iterable[str] = (),
        max_connections: int = MAX_CONNECTIONS,
        allowed_hosts: Iterable[str] = (),
        models: Sequence[str] = (),
        limits: Limits | None = None,
    ) -> None:
        if not _is_this_computer(host) and not api_key:
            problem = "without an API key would let everybody on the network use your account"
            hint = "Add --api-key, or listen on 127.0.0.1."
            raise ConfigError(f"Listening on {host} {problem}", hint=hint)
        if not 0 <= port <= 65_535:
            raise ConfigError(f"The port is {port}, but must be 0 to 65535")
        if max_connections < 1:
            raise ConfigError(f"max_connections is {max_connections}, but must be 1 or more")
        self.client = client
        origins = frozenset(origin.rstrip("/") for origin in allowed_origins)
        names = frozenset(name.lower() for name in allowed_hosts)
        self.rules = AccessRules(host, api_key or None, origins, names)
        self.max_connections = max_connections
        self.models = list(models)
        self.limits = limits or Limits()
        self.memory = ResponseMemory()
        # the real name behind a token of its own, which errors must not show
        self._token_owner = ""
        self._asking = threading.Thread(target=self._ask_owner, daemon=True)
        self.stopping = threading.Event()
        # when the next bytes of each connection must be there: never, while it is answered
        self.deadlines: dict[Any, float] = {}
        self._turned_away: deque[tuple[float, Any]] = deque()
        # for the connections of running requests: how to end them, and what their bodies hold
        self._running: dict[Any, _InFlight] = {}
        self._held_bytes: Counter[Any] = Counter()
        self._lock = threading.Lock()
        self._server = _http_server(self, host, port)
        self.port: int = self._server.server_address[1]
        self.url = f"http://{_in_url(host)}:{self.port}/v1"
        self._thread: threading.Thread | None = None

    def __exit__(self, *_: object) -> None:
        self.stop(0)

    def start(self) -> OpenAIServer:
        """Answer requests on a thread of its own."""
        run = self._server.serve_forever
        self._thread = threading.Thread(target=run, args=(0.05,), daemon=True)
        self._thread.start()
        self._asking.start()
        return self

    __enter__ = start

    def stop(self, drain_s: float | None = None) -> None:
        """Take no more work, let what runs end for so many seconds (or the limit's), then close."""
        self.stopping.set()
        if self._thread is not None:
            self._server.shutdown()
        self._server.socket.close()  # new callers are refused, not left waiting
        _hang_up(self.deadlines.copy().keys() - self._running.copy().keys())
        until = time.monotonic() + (self.limits.drain_s if drain_s is None else drain_s)
        try:
            while self._running and time.monotonic() < until:
                time.sleep(0.01)
        finally:
            _hang_up(self.deadlines.copy())
            for cancellation in list(self._running.values()):
                cancellation.cancel()
            self._server.server_close()
            for _, connection in self._turned_away:
                connection.close()

    def _ask_owner(self) -> None:
        client = self.client
        if client._accounts.token and not is_foreign(client.config):
            with suppress(PuterError):
                self._token_owner = str(client.whoami().get("username") or "")

    def token_owner(self) -> str:
        """The real name behind a token of its own, which errors must not show; "" for none."""
        self._asking.join(1.0)
        return self._token_owner

    def reserve(self, connection: Any, size: int) -> None:
        """Make room for so many bytes more of a running request's body."""
        with self._lock:
            if self._held_bytes.copy().total() + size > self.limits.read_bytes:
                raise _overloaded("Too many large requests at once")
            self._held_bytes[connection] += size

    def make_room(self) -> None:
        """Hang up on the caller idle for longest; on one that sends a body, only if none is idle."""
        due = {c: at for c, at in self.deadlines.copy().items() if at < math.inf}
        if due:
            oldest = min(due, key=lambda c: (c in self._running, due[c]))
            self.deadlines.pop(oldest, None)
            _hang_up([oldest])
        while self._turned_away:
            self._turned_away.popleft()[1].close()

    def turn_away(self, connection: Any) -> None:
        """Say that there is no room, without waiting for anything."""
        import socket

        error = _overloaded(f"All {self.max_connections} connections are in use")
        body = json.dumps(chat_error(error, 503, "")).encode()
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\nRetry-After: 2\r\nConnection: close\r\n\r\n"
        with suppress(OSError):
            connection.setblocking(False)
            connection.send(head.encode() + body)
            connection.shutdown(socket.SHUT_WR)
        self._turned_away.append((time.monotonic() + self.limits.linger_s, connection))

    def look_after_connections(self) -> None:
        """Hang up on callers that are too slow, and cancel the requests of those that hung up."""
        now = time.monotonic()
        while self._turned_away and (self._turned_away[0][0] < now or len(self._turned_away) > 64):
            self._turned_away.popleft()[1].close()
        _hang_up([c for c, due in self.deadlines.copy().items() if due < now])
        for connection, cancellation in self._running.copy().items():
            if _has_hung_up(connection):
                cancellation.cancel()


# The real base is mixed in by `_http_server`, so that only a server imports it.
_HandlerBase: Any = object


def _http_server(app: OpenAIServer, host: str, port: int) -> Any:
    import socket
    from http.server import BaseHTTPRequestHandler
    from socketserver import ThreadingTCPServer

    class Server(ThreadingTCPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # on Windows it would share a port that is in use
        allow_reuse_address = os.name != "nt"
        request_queue_size = 256
        daemon_threads = True
        block_on_close = False
        is_full = False

        def get_request(self) -> tuple[Any, Any]:
            try:
                return super().get_request()
            except OSError as error:
                if not self.is_full:
                    _log.error("No connection can be accepted: %s", error.strerror or error)
                self.is_full = True
                app.make_room()
                time.sleep(0.1)  # it is tried again at once
                raise

        def process_request(self, request: Any, client_address: Any) -> None:
            self.is_full = False
            if len(app.deadlines) >= app.max_connections:
                app.make_room()
            if len(app.deadlines) >= app.max_connections:
                app.turn_away(request)
            else:
                app.deadlines[request] = time.monotonic() + app.limits.idle_s
                super().process_request(request, client_address)

        def shutdown_request(self, request: Any) -> None:
            app.deadlines.pop(request, None)
            super().shutdown_request(request)

        def service_actions(self) -> None:
            app.look_after_connections()

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A fault of ours is logged with its traceback; a caller that hangs up is not."""
            if not isinstance(sys.exc_info()[1], ConnectionError):
                _log.error("A connection failed", exc_info=True)

    handler = {"app": app, "timeout": app.limits.idle_s}
    bases = (_GatewayHandler, BaseHTTPRequestHandler)
    return Server((host, port), type("Handler", bases, handler))


# The base class looks for a boundary in it, in a time that grows with the square.
_LONG_TYPE = rb"(?i)(^|[\r\n])content-type:([^\r\n]|[\r\n]+[ \t]){512}"
_SINGLE_HEADERS = ("content-length", "transfer-encoding", "host", "authorization", "x-api-key")


class _GatewayHandler(_HandlerBase):  # type: ignore[misc]
    """Reads a request, asks the functions above, and writes.

    ConnectionError and TimeoutError are of the client's socket: upstream's are `PuterError`s.
    """

    app: OpenAIServer
    cancellation: _InFlight
    rfile: io.BufferedIOBase
    dialect = DIALECTS["/v1/chat/completions"]

    protocol_version = default_request_version = "HTTP/1.1"
    server_version = f"puter.py/{__version__}"
    sys_version = ""
    disable_nagle_algorithm = True
    wbufsize = 64 * 1024  # one packet for head and body; streams flush what came together

    # ---- reading ----

    def handle_one_request(self) -> None:
        """As the base class, with nothing left of the request before."""
        self.sent = self.unread = False
        self.request_id = _new_id("req")
        self.reply_headers = {"x-request-id": self.request_id, "request-id": self.request_id}
        self.command = self.requestline = ""
        self.request_version = self.protocol_version
        self._must_arrive_in(self.app.limits.idle_s)
        super().handle_one_request()

    def _must_arrive_in(self, seconds: float) -> None:
        if self.connection in self.app.deadlines:
            self.app.deadlines[self.connection] = time.monotonic() + seconds

    def parse_request(self) -> bool:
        """As the base class, but the head as a whole is bounded in bytes and time."""
        if self.raw_requestline in (b"\r\n", b"\n"):
            # blank lines between requests are skipped
            self.close_connection = False
            return False
        self._must_arrive_in(self.app.limits.head_s)
        connection, head = self.rfile, b""
        left = self.app.limits.head_bytes - len(self.raw_requestline)
        while line := connection.readline(left - len(head) + 1):
            head += line
            if len(head) > left:
                self.send_error(431, "The head of the request is too large")
                return False
            if line in (b"\r\n", b"\n"):
                break
        if re.search(_LONG_TYPE, head):
            self.send_error(400, "the Content-Type is too long")
            return False
        self.rfile = io.BytesIO(head)
        try:
            return bool(super().parse_request())
        except ValueError as error:
            self.send_error(400, f"the head of the request cannot be read ({error})")
            return False
        finally:
            self.rfile = connection

    def handle_expect_100(self) -> bool:
        """It is answered once key and size are known to be right."""
        return True

    def _read_body(self) -> bytes:
        """The body; memory for it is reserved as it arrives, until the request is answered."""
        import zlib

        body, coding = bytearray(), self.headers.get("Content-Encoding", "identity").strip().lower()
        is_known = coding in ("", "identity", "gzip", "x-gzip", "deflate")
        _demand(is_known, f"the content coding {coding[:50]!r} is not known", status=415)
        self._must_arrive_in(self.app.limits.body_s)
        is_expected = self.headers.get("Expect", "").lower() == "100-continue"
        for size in self._sizes():
            self._check_size(len(body) + size)
            if is_expected:
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                self.wfile.flush()
                is_expected = False
            while size:
                piece = self.rfile.read1(min(size, 64 * 1024))
                if not piece:
                    raise ConnectionError("the client hung up in the middle of its request")
                self.app.reserve(self.connection, len(piece))
                size -= len(piece)
                body += piece
        self.unread = False
        self._must_arrive_in(math.inf)
        if coding in ("", "identity"):
            return bytes(body)
        try:
            # either kind, by its head
            unpacked = zlib.decompressobj(47).decompress(body, self.app.limits.body_bytes + 1)
        except zlib.error as error:
            raise _bad_request(f"the body is not {coding} ({error})") from None
        self._check_size(len(unpacked))
        self.app.reserve(self.connection, len(unpacked))
        return unpacked

    def _check_size(self, size: int) -> None:
        limit = self.app.limits.body_bytes
        _demand(size <= limit, f"a request may hold {limit} bytes", status=413)

    def _sizes(self) -> Iterator[int]:
        """How many bytes of the body come next, piece by piece."""
        coding = self.headers.get("Transfer-Encoding")
        if coding is None:
            yield _body_size(self.headers.get("Content-Length", "0"), "[0-9]{1,18}", 10)
            return
        text = "a request has a Content-Length or a Transfer-Encoding, not both"
        _demand("Content-Length" not in self.headers, text)
        is_known = coding.strip(" \t").lower() == "chunked"
        _demand(is_known, f"the transfer coding {coding[:50]!r} is not known", status=501)
        yield 0  # a client may wait for our word
        while size := _body_size(self._line().partition(";")[0], "[0-9A-Fa-f]{1,8}", 16):
            yield size
            _demand(not self._line(), "a chunk is longer than it says")
        # trailers say nothing to us
        _demand(any(not self._line() for _ in range(100)), "the body has too many trailers")

    def _line(self) -> str:
        line = self.rfile.readline(257).decode("latin-1")
        _demand(re.fullmatch(r"[^\r\n]*\r?\n", line), "the body is not chunked as it should be")
        return line.rstrip("\r\n")

    # ---- deciding ----

    def _route(self) -> None:
        self._must_arrive_in(math.inf)
        # a slash too many is forgiven
        path = re.sub("/{2,}", "/", unquote(self.path.partition("?")[0])).rstrip("/") or "/"
        self.dialect = dialect_of(path, self.headers)
        length = self.headers.get("Content-Length", "0")
        self.unread = length != "0" or "Transfer-Encoding" in self.headers
        self.cancellation = self.app._running[self.connection] = _InFlight()
        try:
            self._answer(path)
        except PuterError as error:
            # what else an abandoned client has sent is not for anybody any more
            self.close_connection |= self.cancellation.cancelled.is_set()
            self._fail(error)
        except (ConnectionError, TimeoutError):
            raise
        except Exception:  # noqa: BLE001 (it is answered and logged, and the server lives)
            _log.error("A request could not be answered", exc_info=True)
            self._fail(PuterError("An internal error of puter.py; its log says more"))
        finally:
            del self.app._running[self.connection], self.app._held_bytes[self.connection]

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _route

    def _answer(self, path: str) -> None:
        headers, client = self.headers, self.app.client
        if several := [name for name in _SINGLE_HEADERS if len(headers.get_all(name, ())) > 1]:
            # where the body ends is anybody's guess
            self.close_connection = True
            raise _bad_request(f"there are several {several[0]} headers")
        is_preflight = self.command == "OPTIONS" and "Origin" in headers
        refused = refusal(self.app.rules, path, headers)
        if "Origin" in headers and not isinstance(refused, AccessError):
            self._allow_page(headers["Origin"])
        if refused and not (is_preflight and isinstance(refused, AuthError)):
            self.close_connection = True
            raise refused
        is_models = path == "/v1/models" or path.startswith("/v1/models/")
        # what serves chosen models alone makes nothing else
        is_posted = path in DIALECTS or (path in MEDIA and not self.app.models)
        if is_preflight:
            self._send(204, None)
        elif not (is_models or is_posted or path in ("/", "/health")):
            hint = "Leave /v1 out of the URL." if path.startswith("/v1/v1/") else "The base is /v1."
            if path in MEDIA:
                hint = "Pictures and sound are not served by `launch`; use `python -m puter serve`."
            raise BadRequestError(f"There is no {path[:200]} here", hint=hint, status=404)
        elif self.command not in (allowed := ("POST",) if is_posted else ("GET", "HEAD")):
            self.reply_headers["Allow"] = ", ".join(allowed)
            raise _bad_request(f"{self.command} is not for {path[:200]}", status=405)
        elif path in DIALECTS:
            self._answer_dialect(self._read_body())
        elif is_posted:
            self._answer_media(path, self._read_body())
        elif path == "/v1/models":
            served = self.app.models
            data = [model_object(m) for m in client.models() if not served or m.id in served]
            ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
            self._send(200, {"object": "list", "data": data, "has_more": False, **ends})
        elif is_models:
            self._send(200, model_object(client.model(path.removeprefix("/v1/models/"))))
        else:
            self._send(200, {"status": "ok", "version": __version__})

    def _answer_dialect(self, data: bytes) -> None:
        body, client = _json_body(data, self.app.limits.values), self.app.client
        if self.dialect.compute is not None:
            self._send(200, self.dialect.compute(body))
            return
        request = self.dialect.parse(body, self.app.memory)
        models = client._catalogue.models_if_any("The name of the model is passed on unchecked")
        name = request.model or client.config.default_model or ""
        served = self.app.models
        if served and (not name or models.id_of(_without_suffix(name)) not in served):
            name = served[0]
        _demand(name, "you must name a model (or set default_model in puter.json)", "model")
        request = with_served_model(request, name, models)
        args = {**request.args, "tools": request.tools}
        asked = client._build_request(request.messages, model=request.model, **args)
        if request.streaming:
            self._stream(request, asked)
        else:
            reply = self._complete(request, asked)
            self.reply_headers |= answer_headers(reply)
            self._send(200, self.dialect.body(request, *whole_answer(request, reply)))

    def _answer_media(self, path: str, data: bytes) -> None:
        if self.headers.get_content_maintype() == "multipart":
            body = form_body(data, self.headers.get_boundary(""))
        else:
            body = _json_body(data, self.app.limits.values)
        args, (kind, given) = media_args(path, body), MEDIA[path]
        result, reply = self.app.client._make(kind, body[given], self.cancellation, **args)
        self.reply_headers |= answer_headers(reply)
        self._send(200, *media_body(body, result))

    def _complete(self, request: ChatRequest, asked: Asked) -> Reply:
        if request.canned:
            return Reply(request.canned, model=request.model)
        return self.app.client._open(asked, self.cancellation, is_stream=False)._whole()

    def _open(self, request: ChatRequest, asked: Asked) -> Stream:
        """A stream; of a whole reply where all must be there before anything can be given."""
        if not (request.wants_json or request.canned):
            return self.app.client._open(asked, self.cancellation)
        reply = _with_json(request, self._complete(request, asked))
        return Stream.of(reply, self.cancellation)

    def _stream(self, request: ChatRequest, asked: Asked) -> None:
        from concurrent.futures import Future, wait

        opened: Future[Stream] = Future()
        has_failed = False

        def open_it() -> None:
            try:
                opened.set_result(self._open(request, asked))
            except BaseException as error:  # noqa: BLE001 (the handler raises it)
                opened.set_exception(error)

        def batches() -> Iterator[Batch]:
            nonlocal has_failed
            while not wait([opened], self.app.limits.keep_alive_s).done:
                yield None
            try:
                for batch in iter(opened.result()._next_batch, None):
                    yield batch
                    # it may be long until the next one
                    self.wfile.flush()
                yield opened.result().reply
            except PuterError as error:
                has_failed = True
                raise self._redacted(error) from error

        def model() -> str:
            is_known = opened.done() and not opened.exception()
            return (is_known and opened.result().model) or asked.model

        threading.Thread(target=open_it, daemon=True).start()
        try:
            if wait([opened], self.app.limits.keep_alive_s).done:
                # what failed in time has a status of its own
                self.reply_headers |= answer_headers(opened.result())
            self._begin_events()
            for frame in self.dialect.frames(request, model, answer_events(request, batches())):
                self._write_frame(frame)
                if frame is None or not opened.done():
                    self.wfile.flush()
        finally:
            self.close_connection |= self.cancellation.cancelled.is_set()
            # a stream that comes too late is closed
            opened.add_done_callback(_close_opened)
        if has_failed and self.dialect.cuts_broken_streams:
            self.close_connection = True
        elif self.is_chunked:
            self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def _redacted(self, error: PuterError) -> PuterError:
        names: list[str] = [self.app.token_owner()]
        with suppress(PuterError):
            names += [account.username for account in self.app.client.accounts]
        return redacted_error(error, names, self.app.client.config.api_base_url)

    # ---- writing ----

    def _fail(self, error: PuterError) -> None:
        status, public = error_status(error), self._redacted(error)
        _log.info("Gateway: %d %s", status, error.message)
        body = self.dialect.error(public, status, self.request_id)
        if self.sent:
            self.close_connection = True
            self._write_frame(body)
            self.wfile.flush()
        else:
            self.reply_headers |= error_headers(error, status)
            if status == 401:
                self.reply_headers["WWW-Authenticate"] = "Bearer"
            self._send(status, body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The base class's own refusals (a broken head), in the shape of the dialect."""
        self.close_connection = True
        self._fail(_bad_request(message or "it cannot be read", status=int(code)))

    def _send(self, status: int, body: JSON | bytes | None, kind: str = "application/json") -> None:
        import socket

        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if body is not None:
            self.reply_headers |= {"Content-Type": kind, "Content-Length": str(len(data))}
        self.close_connection |= self.unread
        self._send_head(status)
        self.wfile.write(b"" if self.command == "HEAD" or body is None else data)
        self.wfile.flush()
        if self.unread:
            # a refused client may not see the answer unless it is read on for a moment
            until = time.monotonic() + self.app.limits.linger_s
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
                self.connection.settimeout(self.app.limits.linger_s)
                while time.monotonic() < until and self.connection.recv(64 * 1024):
                    pass

    def _send_head(self, status: int) -> None:
        self.sent = True
        self.send_response(status)
        if self.close_connection or self.app.stopping.is_set():
            self.reply_headers["Connection"] = "close"
        for name, value in self.reply_headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _begin_events(self) -> None:
        self.is_chunked = self.request_version != "HTTP/1.0"
        self.close_connection |= not self.is_chunked
        self.reply_headers |= {"Content-Type": self.dialect.mime, "Cache-Control": "no-cache"}
        self.reply_headers["X-Accel-Buffering"] = "no"  # else nginx would gather the stream
        if self.is_chunked:
            self.reply_headers["Transfer-Encoding"] = "chunked"
        self._send_head(200)

    def _write_frame(self, frame: Frame) -> None:
        if not (block := self.dialect.write(frame).encode()):
            return  # an empty chunk would be the end
        self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if self.is_chunked else block)

    def _allow_page(self, origin: str) -> None:
        asked = self.headers.get("Access-Control-Request-Headers")
        usual = "authorization, content-type, x-api-key, anthropic-version, anthropic-beta"
        self.reply_headers |= {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, HEAD, POST, OPTIONS",
            "Access-Control-Allow-Headers": asked or usual,
            "Access-Control-Expose-Headers": "x-puter-model, x-puter-account, x-puter-attempts, "
            "x-request-id, request-id, x-should-retry, retry-after",
            "Vary": "Origin",
        }

    def log_message(self, format: str, *args: Any) -> None:
        """Into our log, which `serve --log` shows."""
        _log.info("Gateway: %s", format % args)


def _close_opened(opened: Future[Stream]) -> None:
    if opened.exception() is None:
        opened.result().close()


def _overloaded(text: str) -> ServerError:
    return ServerError(text, status=503, code="overloaded", retry_after_s=2, hint="")


def _body_size(digits: str, pattern: str, base: int) -> int:
    _demand(re.fullmatch(pattern, digits.strip(" \t")), "the length of the body is not a number")
    return int(digits, base)


def _json_body(data: bytes, max_values: int) -> JSON:
    if data.count(b",") > max_values:
        # those in texts do not count
        plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")
        count, is_inside = 0, False
        for start in range(0, len(plain), 64 * 1024):
            pieces = plain[start : start + 64 * 1024].split(b'"')
            count += sum(piece.count(b",") for piece in pieces[1 if is_inside else 0 :: 2])
            is_inside = is_inside if len(pieces) % 2 else not is_inside
        _demand(count <= max_values, f"the body holds more than {max_values} values", status=413)
    try:
        body: JSON = read_json(data)
    except ValueError as error:
        raise _bad_request(f"the body is not valid JSON ({error})") from None
    _demand(isinstance(body, dict), "the body is not a JSON object")
    return body


def answer_headers(who: Reply | Stream) -> dict[str, str]:
    """Who answered; of the account's name only the first letters."""
    return {
        "x-puter-model": _header_text(who.model),
        "x-puter-account": _masked_name(who.account),
        "x-puter-attempts": str(len(who.attempts)),
    }


# ======================================================================================
# 12. mcp server · uses: everything above but login and the gateway
# ======================================================================================
# The specification: https://modelcontextprotocol.io/specification (2024-11-05 to 2026-07-28).
# 2025-03-26 is left out: it alone demands batches, and its clients also know 2024-11-05.
MCP_HANDSHAKE_VERSIONS = ("2024-11-05", "2025-06-18", "2025-11-25")
MCP_STATELESS_VERSION = "2026-07-28"
_MCP_VERSIONS = [MCP_STATELESS_VERSION, *MCP_HANDSHAKE_VERSIONS[::-1]]  # newest first
MCP_CALL_LIMIT_S = 55.0  # Claude Desktop gives up a call after 60 s without progress
MCP_MAX_LETTERS = 1_000_000
_MCP_TICK_S = 1.0  # between two progress notifications
_MCP_META = "io.modelcontextprotocol/"
_MCP_ABOUT = {
    "capabilities": {"tools": {}},
    "instructions": "puter-chat asks another AI model; name one from puter-models, or leave it to "
    "the default. Every answer says which model gave it.",
}
_MCP_SERVER_INFO = {"name": "puter", "title": "Puter.com models", "version": __version__}


def _schema_of(**names: str) -> JSON:
    """The schema of an object: `string="a b?"` are properties that are strings, one optional."""
    kinds = {name: kind for kind in names for name in names[kind].split()}
    properties = {name.rstrip("?"): {"type": kind} for name, kind in kinds.items()}
    schema: JSON = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": [name for name in kinds if name in properties]}


_MCP_CHAT = _schema_of(
    string="text reasoning? model account finish_reason", boolean="partial", object="usage"
)
_MCP_MODEL = _schema_of(
    string="id", boolean="free tools?", integer="context?",
    number="input_usd_per_million? output_usd_per_million?",
)  # fmt: skip
_MCP_MODELS = _schema_of(integer="count total", string="more?", array="models")
_MCP_MODELS["properties"]["models"]["items"] = _MCP_MODEL
_MCP_ACCOUNT = _schema_of(
    string="username error unit?", boolean="active temporary",
    number="allowance? remaining? used?",
)  # fmt: skip
_MCP_ACCOUNT["properties"]["error"] = {"type": ["string", "null"]}
_MCP_ACCOUNTS = _schema_of(array="accounts")
_MCP_ACCOUNTS["properties"]["accounts"]["items"] = _MCP_ACCOUNT
# The name of each tool: (method, title, schema of its structured answer)
_MCP_TOOLS: dict[str, tuple[str, str, JSON]] = {
    "puter-chat": ("chat", "Ask a model", _MCP_CHAT),
    "puter-models": ("models", "List models", _MCP_MODELS),
    "puter-account": ("account", "Show the accounts", _MCP_ACCOUNTS),
}


@dataclass(eq=False, repr=False)
class _McpCall:
    """A request that is not answered yet; its client asks for progress if there is a token."""

    id: str | int
    method: str
    params: JSON
    is_stateless: bool
    progress_token: str | int | None
    progress: int = 0
    cancellation: _InFlight = field(default_factory=_InFlight)
    stream: Stream | None = None

    def text(self) -> str:
        return self.stream._partial().text if self.stream else ""


class McpServer:
    """The protocol, without stdin and stdout: lines in, messages out.

    `make_client` is called when a tool first needs the client; `write` is given each message
    to send, from any thread. The public methods `chat`, `models` and `account` are the tools:
    MCP clients see their docstrings.
    """

    def __init__(
        self,
        make_client: Callable[[], Puter],
        write: Callable[[JSON], None],
        call_limit_s: float = MCP_CALL_LIMIT_S,
    ) -> None:
        self._make_client = make_client
        self._made_client: Puter | None = None
        self._write, self._call_limit_s = write, call_limit_s
        # The calls that are not answered yet; whoever takes one out may write its answer.
        self._calls: set[_McpCall] = set()
        self._calls_changed = threading.Condition()
        self._closed = threading.Event()
        threading.Thread(target=self._report_progress, daemon=True).start()

    # ---- the protocol ----

    def receive(self, line: bytes) -> None:
        """Take one line; its answer is written now, or later by the thread of a tool."""
        message: Any = None
        try:
            text = line.decode("utf-8-sig").strip()  # Windows programs may begin with a BOM
            if not text:
                return
            message = read_json(text)
            call = _call_from(message)
        except ValueError as error:
            body = getattr(error, "body", {"code": -32700, "message": "Parse error: invalid JSON"})
            request_id = _rpc_id(message.get("id")) if isinstance(message, dict) else None
            self._write({"jsonrpc": "2.0", "id": request_id, "error": body})
            return
        if call is None:
            self._notified(message.get("method"), message.get("params"))
            return
        with self._calls_changed:
            self._calls.add(call)
        if call.method == "tools/call":
            threading.Thread(target=self._run_call, args=(call,), daemon=True).start()
        else:
            self._answer(call, self._result)

    def close(self, patience_s: float = 0.0) -> None:
        """Wait so long for the calls that run; then answer them with what there is."""
        with self._calls_changed:
            self._calls_changed.wait_for(lambda: not self._calls, patience_s)
            for call in list(self._calls):
                self._expire(call)
        self._closed.set()

    def tools(self) -> list[JSON]:
        """The tools, as `tools/list` gives them."""
        tools = []
        for name, (method, title, output_schema) in _MCP_TOOLS.items():
            function = function_schema(getattr(self, method))["function"]
            is_free = method != "chat"  # asking a model spends credit
            hints = {"readOnlyHint": is_free, "idempotentHint": is_free}
            tool = {"name": name, "title": title, "description": function["description"]}
            tool |= {"inputSchema": function["parameters"], "outputSchema": output_schema}
            hints |= {"destructiveHint": False, "openWorldHint": True}
            tools.append({**tool, "annotations": hints})
        return tools

    def _result(self, call: _McpCall) -> JSON:
        """The result of a request that needs no tool; raises `_RpcError`."""
        if call.method == "initialize":
            asked = call.params.get("protocolVersion")
            if not isinstance(asked, str):
                raise _RpcError(-32602, "initialize needs a protocolVersion")
            older = [version for version in MCP_HANDSHAKE_VERSIONS if version <= asked]
            version = (older or MCP_HANDSHAKE_VERSIONS)[-1]
            return {"protocolVersion": version, "serverInfo": _MCP_SERVER_INFO, **_MCP_ABOUT}
        if call.method == "ping":
            return {}
        lists: dict[str, JSON] = {
            "tools/list": {"tools": self.tools()},
            "server/discover": {"supportedVersions": _MCP_VERSIONS, **_MCP_ABOUT},
        }
        if call.method not in lists:
            raise _RpcError(-32601, f"Method not found: {call.method}")
        return {**lists[call.method], "ttlMs": 3_600_000, "cacheScope": "private"}

    def _notified(self, method: Any, params: Any) -> None:
        """End the call that the client cancels; what else comes needs nothing."""
        if method != "notifications/cancelled" or not isinstance(params, dict):
            return
        with self._calls_changed:
            for call in [c for c in self._calls if c.id == _rpc_id(params.get("requestId"))]:
                self._calls.remove(call)
                call.cancellation.cancel()
            self._calls_changed.notify_all()

    # ---- calls of tools ----

    def _run_call(self, call: _McpCall) -> None:
        """Answer a call: in time, unless the client sees progress and so goes on waiting."""
        limit = threading.Timer(self._call_limit_s, self._expire, (call,))
        limit.daemon = True
        if call.progress_token is None:
            limit.start()
        self._answer(call, self._tool_result)
        limit.cancel()

    def _tool_result(self, call: _McpCall) -> JSON:
        """What a tool gives, or why it failed; raises `_RpcError` for a wrong call."""
        name, arguments = call.params.get("name"), call.params.get("arguments") or {}
        if not isinstance(name, str) or name not in _MCP_TOOLS:
            raise _RpcError(-32602, f"Unknown tool: {name!r}")
        if not isinstance(arguments, dict):
            raise _RpcError(-32602, "arguments must be an object")
        tool, given = getattr(self, _MCP_TOOLS[name][0]), arguments.items()
        try:
            arguments = read_arguments(tool, {k: v for k, v in given if v is not None})
        except TypeError as error:
            return _tool_output(f"{name}: {error}")
        try:
            result = tool(**arguments)
            if not isinstance(result, Asked):
                return _tool_output(*result)
            with self._client()._open(result, call.cancellation) as call.stream:
                deque(call.stream, maxlen=0)
        except PuterError as error:
            return _tool_output("\n\n".join(filter(None, [str(error), call.text()])))
        return _chat_output(call.stream.reply, partial=False)

    def _expire(self, call: _McpCall) -> None:
        """Answer a call whose time is over with what there is, and end it."""
        stream, text, limit = call.stream, call.text(), f"{self._call_limit_s:.0f} s"
        output = _tool_output(f"No answer came within {limit}. Ask again, or a faster model.")
        if stream and text:
            text += f"\n\n[cut off after {limit}, before the answer was whole]"
            reply = Reply(text, finish_reason="length", model=stream.model, account=stream.account)
            output = _chat_output(reply, partial=True)
        self._answer(call, lambda _: output)
        call.cancellation.cancel()

    def _answer(self, call: _McpCall, work: Callable[[_McpCall], JSON]) -> None:
        """Write what comes of a request, unless it has ended meanwhile; nothing comes later."""
        try:
            result = work(call)
            if call.is_stateless:
                stamp = {f"{_MCP_META}serverInfo": _MCP_SERVER_INFO}
                result = {"resultType": "complete", **result, "_meta": stamp}
            answer = {"result": result}
        except _RpcError as error:
            answer = {"error": error.body}
        except Exception:  # noqa: BLE001 (it is reported and logged, and the server lives)
            _log.error("A request could not be answered", exc_info=True)
            answer = {"error": {"code": -32603, "message": "Internal error"}}
        with self._calls_changed:
            if call in self._calls:
                self._calls.remove(call)
                self._write({"jsonrpc": "2.0", "id": call.id, **answer})
                self._calls_changed.notify_all()

    def _report_progress(self) -> None:
        """Tell the clients that ask for it how far their calls are, until the server closes."""
        method = "notifications/progress"
        while not self._closed.wait(_MCP_TICK_S):
            with self._calls_changed:  # no progress after the answer
                for call in self._calls:
                    if call.progress_token is not None:
                        call.progress += 1  # it must rise each time
                        params = {"progressToken": call.progress_token, "progress": call.progress}
                        params["message"] = f"{len(call.text())} characters so far"
                        self._write({"jsonrpc": "2.0", "method": method, "params": params})

    def _client(self) -> Puter:
        with self._calls_changed:
            self._made_client = self._made_client or self._make_client()
            return self._made_client

    # ---- the tools: `chat` gives what to ask, the others a text and its structure ----

    def chat(
        self,
        message: str,
        model: str = "",
        system: str = "",
        temperature: Annotated[float | None, {"minimum": 0, "maximum": 2}] = None,
        max_tokens: Annotated[int | None, {"minimum": 1}] = None,
    ) -> Asked:
        """Ask one of the 500+ AI models of Puter.com (Claude, GPT, Gemini, DeepSeek, ...) and
        get its answer. puter-models lists them.

        Args:
            message: What to ask.
            model: A model's id or alias; without one the default model answers.
            system: A system text.
            temperature: The sampling temperature, 0 to 2.
            max_tokens: The most tokens of the answer.
        """
        args: JSON = {"temperature": temperature, "max_tokens": max_tokens}
        args |= {"model": model or None, "system": system or None}
        return self._client()._build_request(message, **args)

    def models(
        self,
        provider: str = "",
        free: bool | None = None,
        search: str = "",
        limit: Annotated[int, {"minimum": 1, "maximum": 500}] = 50,
    ) -> tuple[str, JSON]:
        """List the AI models that puter-chat can ask, with their prices; free ones first.

        Args:
            provider: Such as anthropic, openai, google.
            free: Only free (true) or only paid (false) ones.
            search: Only those with this in a name.
            limit: List so many at most.
        """
        matches = matching_models(self._client().models(provider or None, free), search or None)
        shown = sorted(matches, key=lambda m: not m.free)[:limit]
        keys = _MCP_MODEL["properties"]
        rows = [{k: v for k in keys if (v := getattr(m, k)) is not None} for m in shown]
        output: JSON = {"models": rows, "count": len(rows), "total": len(matches)}
        head = f"{len(rows)} of {len(matches)} models"
        if len(rows) < len(matches):
            output["more"] = "Narrow by search, provider or free, or raise limit (up to 500)."
            head = f"{head}. {output['more']}"
        return "\n".join([head, *(f"{m.id} ({_price_text(m)})" for m in shown)]), output

    def account(self) -> tuple[str, JSON]:
        """Show the signed-in Puter accounts and the credit that each has left."""
        client = self._client()
        active = client.active_account
        rows, lines = [], []
        for account in client.accounts:
            row = credit_row(client, account)
            row |= {"active": account == active, "temporary": account.is_temporary}
            rows.append({k: row[k] for k in _MCP_ACCOUNT["properties"] if k in row})
            lines.append(f"{'*' if row['active'] else ' '} {account.username}: {credit_text(row)}")
        return "\n".join(lines) or _NOBODY, {"accounts": rows}


def _prices(model: Model) -> tuple[float | None, float | None]:
    return model.input_usd_per_million, model.output_usd_per_million


def _price_text(model: Model) -> str:
    into, out = ("?" if price is None else f"${price:g}" for price in _prices(model))
    return "free" if model.free else f"{into} in, {out} out, a million tokens"


def _chat_output(reply: Reply, partial: bool) -> JSON:
    keys = ("text", "reasoning", "model", "account", "finish_reason")
    usage = {k: v for k, v in asdict(reply.usage).items() if v is not None}
    answer: JSON = {**{k: getattr(reply, k) for k in keys}, "partial": partial, "usage": usage}
    return _tool_output(reply.text, answer)


def _tool_output(text: str, structured: JSON | None = None) -> JSON:
    if len(text) > MCP_MAX_LETTERS:
        text = f"{text[:MCP_MAX_LETTERS]}\n\n[cut off here]"
        structured = structured and {**structured, "text": text, "partial": True}
    output: JSON = {"content": [{"type": "text", "text": text}], "isError": structured is None}
    return output if structured is None else {**output, "structuredContent": structured}


class _RpcError(ValueError):
    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.body = {"code": code, "message": message} | ({"data": data} if data else {})


def _call_from(message: Any) -> _McpCall | None:
    """The request of a message, None for a notification or response; raises `_RpcError`."""
    if not isinstance(message, dict):
        raise _RpcError(-32600, "A message must be an object; batches are not supported")
    method, params = message.get("method"), message.get("params")
    is_call = isinstance(method, str)
    is_response = not is_call and ("result" in message or "error" in message)
    if is_response or (is_call and "id" not in message):
        return None
    if not isinstance(method, str) or message.get("jsonrpc") != "2.0":
        raise _RpcError(-32600, 'A message needs "jsonrpc": "2.0" and a method')
    if _rpc_id(message["id"]) is None:
        raise _RpcError(-32600, "An id must be a string or a whole number")
    if not isinstance(params, (dict, type(None))):
        raise _RpcError(-32600, "params must be an object")
    params = params or {}
    meta = params["_meta"] if isinstance(params.get("_meta"), dict) else {}
    key = f"{_MCP_META}protocolVersion"
    is_stateless = key in meta or method == "server/discover"
    if is_stateless and not isinstance(meta.get(key), str):
        raise _RpcError(-32602, f"params._meta needs {key}, a string")
    if is_stateless and meta[key] != MCP_STATELESS_VERSION:
        versions = {"supported": _MCP_VERSIONS, "requested": meta[key]}
        raise _RpcError(-32022, "Unsupported protocol version", versions)
    if is_stateless and not isinstance(meta.get(f"{_MCP_META}clientCapabilities"), dict):
        raise _RpcError(-32602, f"params._meta needs {_MCP_META}clientCapabilities")
    return _McpCall(message["id"], method, params, is_stateless, _rpc_id(meta.get("progressToken")))


def _rpc_id(value: Any) -> str | int | None:
    return value if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def serve_mcp(make_client: Callable[[], Puter]) -> NoReturn:
    """Speak MCP on stdin and stdout until stdin ends, and end the process then.

    The process's own stdout is for messages alone: whatever prints goes to stderr. A thread
    writes them, so that the end of stdin is seen even if the client does not read.
    """
    import signal
    from queue import SimpleQueue

    if sys.stdin.isatty():
        print("Waiting for an MCP client on standard input; Ctrl-C ends it", file=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process, whatever it does
    sys.stdout.flush()
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    messages: SimpleQueue[Any] = SimpleQueue()
    server = McpServer(make_client, messages.put)

    def write_lines() -> None:
        while (message := messages.get()) is not None:
            try:
                output.write(json.dumps(message).encode("ascii") + b"\n")
                output.flush()
            except OSError:
                os._exit(0)  # no answer can arrive, and what runs may cost credit

    writer = threading.Thread(target=write_lines, daemon=True)
    writer.start()
    for line in iter(sys.stdin.buffer.readline, b""):
        server.receive(line)
    server.close(MCP_CALL_LIMIT_S)
    messages.put(None)
    writer.join(1.0)
    os._exit(0)  # threads that still run must not hold the process up


# ======================================================================================
# 13. cli · uses: everything above
# ======================================================================================
EXIT_CODES = """exit codes:
  0  done
  1  it failed: not signed in, limited, a broken answer... (one line on stderr says why)
  2  wrong usage, or a wrong setting
  130  stopped with Ctrl-C;  141  whoever read the output went away
  launch: the program's own, 128 + n for a signal;  126  it is not executable
  127  it is not installed
"""
_EXAMPLES = """examples:
  python -m puter login                        sign in with the browser
  python -m puter ask "Why is the sky blue?"   an answer, as it comes
  cat log | python -m puter ask "What broke?"  with text from a pipe
  python -m puter models --free                models that cost nothing
"""
_NAME_RULE = """A single word behind -c is a name if one argument follows (-c NAME "question")
or there is a conversation of this name; all else is the question (-c "question").
Names are up to 64 letters, digits, dots, - and _, and do not begin with a dot or -.
"""
CONVERSATION_NAME = "conversation.json"
CONVERSATIONS_FOLDER = "conversations"
_TALK_NAME = r"\w[\w.-]{0,63}"
# Endings of files by their kind, the usual one first; other kinds are named as they end.
_ENDINGS = {"image/jpeg": ".jpg .jpeg", "audio/mpeg": ".mp3", "audio/ogg": ".ogg .opus"}
AGENT_CONTEXT = 64_000  # the least, in tokens, that a coding agent can work with


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv` is without the program's name."""
    can_write = sys.stdout is not None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # closed: no file that is opened later may get its number
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            with suppress(OSError):  # it has been read from already
                stream.reconfigure(encoding="utf-8", errors="replace")
    args = _parsed(argv)
    try:
        if not can_write:
            raise OSError(errno.EBADF, "standard output is closed")
        code: int = args.run(args) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _info("")
        return 130
    except PuterError as error:
        _error(error)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        with suppress(OSError, ValueError):
            # nobody takes the output; the interpreter would complain of it at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        _error(f"The output cannot be written ({error.strerror or error}).")
        return 1


def _parsed(argv: Sequence[str] | None) -> Any:
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if words[:1] == ["launch"] and "--" in words else len(words)
    parser = build_parser(*words[:1])
    args, unknown = parser.parse_known_args(words[:end])
    if unknown:
        is_option = unknown[0].startswith("-")
        meant = _did_you_mean(unknown[0], _words_of(args.command)) if is_option else ""
        if not meant and args.run is cmd_ask:
            meant = "Put the question into quotes, behind the options."
        parser.error(f"unrecognized arguments: {' '.join(unknown)}. {meant}".rstrip(" ."))
    args.arguments = words[end + 1 :]
    return args


# Names and keywords for argparse's `add_argument`.
_Option = tuple[list[str], JSON]
_Run = Callable[[Any], int | None]
# By name: the function, its arguments (several in a list exclude one another), the epilog.
_COMMANDS: dict[str, tuple[_Run, list[list[_Option]], str]] = {}


def _opt(usage: str, help: str, **keywords: Any) -> _Option:
    """An argument by its usage, such as "-m --model MODEL"; an option without a value is a flag."""
    names = usage.split()
    if names[-1].startswith("-"):
        return names, {"help": help, "action": "store_true", **keywords}
    metavar = {"metavar": names.pop()} if len(names) > 1 else {}
    return names, {"help": help, "type": _text, **metavar, **keywords}


def _command(*options: _Option | list[_Option], epilog: str = "") -> Callable[[_Run], _Run]:
    """Makes a function `cmd_x` the command `x`; its docstring is the help."""

    def add(run: _Run) -> _Run:
        groups = [one if isinstance(one, list) else [one] for one in options]
        _COMMANDS[run.__name__.removeprefix("cmd_")] = (run, groups, epilog)
        return run

    return add


def build_parser(first: str = "") -> Any:
    """The `argparse` parser of all commands; of one alone, if the command line begins with it."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            super().error(escape_controls(message.replace("\n", "␊")))

    shape = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="puter" if os.path.basename(sys.argv[0]) == "puter" else "python -m puter",
        description="Ask the AI models of a Puter.com account.",
        epilog=f"{_EXAMPLES}\n{EXIT_CODES}",
        formatter_class=shape,
    )
    parser.add_argument("--version", action="version", version=f"puter.py {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in [first] if first in _COMMANDS else _COMMANDS:
        run, groups, epilog = _COMMANDS[name]
        whole = run.__doc__ or " "
        texts: Any = {"help": whole[0].lower() + whole[1:].removesuffix("."), "description": whole}
        command = commands.add_parser(name, formatter_class=shape, epilog=epilog, **texts)
        command.set_defaults(run=run, command=name)
        for options in groups:
            group = command.add_mutually_exclusive_group() if len(options) > 1 else command
            for names, keywords in options:
                group.add_argument(*names, **keywords)
    return parser


def _words_of(command: str) -> list[str]:
    """The options of a command, and what it may be given."""
    options = [option for group in _COMMANDS[command][1] for option in group]
    names = [name for names, _ in options for name in names if name.startswith("-")]
    return ["--help", *names, *(c for _, more in options for c in more.get("choices", ()))]


def _number(kind: Callable[[str], Any], low: float, high: float) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        number = kind(text)
        if not low <= number <= high:
            raise ValueError
        return number

    # What argparse puts into "invalid ... value: '-1'".
    limits = f" from {low:g} to {high:g}" if high < math.inf else f", {low:g} or more,"
    read.__name__ = f"number{limits}"
    return read


def _text(text: str) -> str:
    """A text that says something, for argparse: an unset variable of a script is a mistake."""
    if not text.strip():
        from argparse import ArgumentTypeError

        raise ArgumentTypeError("must not be empty")
    return text


_PORT = _number(int, 0, 65_535)
_COUNT = _number(int, 1, math.inf)
_SEVERAL: JSON = {"action": "append", "default": []}
_JSON_FLAG = _opt("--json", "as JSON")
_MODEL_OPTION = _opt("-m --model MODEL", "a model's id or alias")
_FREE_FLAG = _opt("--free", "only models that cost nothing")
_BUDGET_OPTION = _opt("--budget USD", "stop when so much is spent", type=_number(float, 0, 10**6))
# None without it, "" without a name; argparse gives a const that is a text to `type`
_NAMED: JSON = {"dest": "continue_", "nargs": "?", "const": ()}
_TALK_OPTIONS = (
    _MODEL_OPTION,
    _opt("-s --system TEXT", "a system text"),
    _opt("--max-tokens N", "longest answer, in tokens", type=_COUNT),
    _opt("--temperature T", "0 (sober) to 2", type=_number(float, 0, 2)),
    [
        _opt("-c --continue NAME", "go on with this conversation, or the last", **_NAMED),
        _opt("-n --new", "begin a new one (the default)"),
    ],
)
_MODEL_CHOICE = (
    _FREE_FLAG,
    _opt("--provider NAME", "only models of a provider"),
    _opt("--search TEXT", "only models with this in a name"),
)


# ---- what the commands share ----

_WIPE = "\r\x1b[K"  # empties the line of a terminal
_STYLES = {"bold": "1", "dim": "2", "head": "2;4", "red": "31", "green": "32"}
# A text, or (text, style) for each piece of it; "" is no style.
_Line = str | Sequence[tuple[str, str]]


def _has_style(output: Any) -> bool:
    return output.isatty() and not (os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb")


def _print(line: _Line, end: str = "\n", output: Any = None, style: str = "") -> None:
    output, shown = output or sys.stdout, ""
    pieces = [(line, style)] if isinstance(line, str) else line
    for text, look in pieces:
        text = escape_controls(text) if output.isatty() else text
        shown += f"\x1b[{_STYLES[look]}m{text}\x1b[0m" if look and _has_style(output) else text
    print(shown, end=end, file=output, flush=True)
    _StderrHandler.is_line_open = not (pieces[-1][0] + end).endswith("\n")


def _info(line: _Line, dim: bool = False, end: str = "\n") -> None:
    """A line for the user, on stderr; `dim` for what is beside the point."""
    with suppress(BrokenPipeError):  # nobody listens there
        _print(line, end, sys.stderr, "dim" if dim else "")


def _error(error: PuterError | str) -> None:
    """One line on stderr; on a terminal the hint, with which an error ends, has its own."""
    text, hint = str(error), getattr(error, "hint", "")
    parts = (text[: text.rindex(hint)], text[text.rindex(hint) :])
    lines = (" ".join(map(str.strip, part.splitlines())) for part in parts if part)
    _info([("error:", "red"), (" " + ("\n" if sys.stderr.isatty() else " ").join(lines), "")])


def _report(args: Any, data: Any, lines: Iterable[_Line]) -> None:
    """A result on stdout: JSON for programs (--json), else lines for people."""
    if args.json:
        # a terminal obeys some of what is not ASCII
        print(json.dumps(data, ensure_ascii=sys.stdout.isatty()))
        return
    for line in lines:
        pieces = [(line, "")] if isinstance(line, str) else line
        _print([(text.replace("\n", "␊"), look) for text, look in pieces])


@contextmanager
def _failing(problem: str, hint: str, kind: type[PuterError] = StoreError) -> Iterator[None]:
    """What the system refuses inside becomes an error with this problem."""
    try:
        yield
    except OSError as error:
        raise kind(f"{problem} ({error.strerror or error})", hint=hint) from error


def _client(**settings: Any) -> Puter:
    config = Config.load(**settings)
    if config.debug or not config.quiet_mode:
        _show_log(logging.DEBUG if config.debug else logging.WARNING)
    return Puter(config=config)


def _budget(args: Any) -> JSON:
    return {} if args.budget is None else {"budget_usd": args.budget}


def _is_interactive() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty() and not os.environ.get("CI")


def _read_line(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    _info(prompt, end="")
    return input("")


def _signed_in(client: Puter, work: Callable[[], _T]) -> _T:
    try:
        return work()
    except AuthError:
        if client.accounts or not _is_interactive():
            raise
    _info("You are not signed in.")
    answer = "no"
    with suppress(EOFError):
        answer = _read_line("Sign in with the browser now? [Y/n] ").strip().lower()
    if answer not in ("", "y", "yes"):
        raise AuthError("You are not signed in")
    _info(_add_account(client, _sign_in(client.config)))
    return work()


# ---- ask ----


@_command(
    _opt("prompt", "the question; - reads standard input", nargs="*", type=str),
    _opt("-a --attach FILE", "a text, image, PDF or URL, - for stdin; several times", **_SEVERAL),
    _opt("-o --output FILE", "where a picture of the answer goes; - for stdout"),
    *_TALK_OPTIONS,
    _opt("--schema FILE", "answer in JSON by a schema: a file, - or the schema itself"),
    _opt("--web", "search the web first (OpenAI's models)"),
    _opt("--no-stream", "print the answer when it is whole"),
    _opt("--no-fallback", "only the model that was asked"),
    _opt("--json", "one JSON object with everything"),
    _opt("--usage", "tokens and cost, on stderr"),
    epilog=f"{_NAME_RULE}\n{_EXAMPLES}",
)
def cmd_ask(args: Any) -> None:
    """Ask a model; a pipe's text joins the prompt."""
    prompt = _prompt_of(args)
    is_taken = "-" in (*args.attach, args.schema)
    wants_stdin = not is_taken and (prompt == "-" or not sys.stdin.isatty())
    piped = _text_of_pipe(_read_input("-")).strip() if wants_stdin else ""
    text = "\n\n".join(filter(None, ["" if prompt == "-" else prompt, piped]))
    with _client() as client, _saving(args, "picture") as save:
        message = message_with(text, args.attach, client)
        if not text.strip() and not args.attach:
            hint = 'Try: python -m puter ask "Why is the sky blue?"'
            raise ConfigError("There is nothing to ask", hint=hint)
        talk = _conversation(args, client)
        options: JSON = {"max_tokens": args.max_tokens, "temperature": args.temperature}
        options |= {"fallback": not args.no_fallback, "web_search": args.web}
        options["returns"] = args.schema and _schema_from(args.schema)
        whole = args.json or args.no_stream
        reply = talk.turn(client, message, options, whole)
        if whole:
            _report(args, _reply_report(reply), str(reply).split("\n") if reply.text else [])
        if args.output and not reply.images:
            _info("the answer has no picture")
        talk.conclude(client, reply, save)
        if args.usage:
            _info(_usage_words([reply.usage]), dim=True)


def _schema_from(source: str) -> JSON:
    try:
        schema = read_json(source if source.lstrip().startswith("{") else _read_input(source))
    except ValueError as error:
        raise BadRequestError(f"The schema is not JSON ({error})", hint="Correct it.") from None
    _require(isinstance(schema, dict), "The schema", schema, 'Write {"type": "object", …}.')
    return dict(schema)


@contextmanager
def _saving(args: Any, name: str) -> Iterator[Callable[[_Medium], str]]:
    """What saves a medium where -o says, and returns the place: checked before anything is paid."""
    output, force, stdout = args.output or "", getattr(args, "force", False), sys.stdout
    if output == "-":
        if stdout.isatty():
            raise ConfigError("A terminal cannot show it", hint="Name a file with -o, or pipe it.")

        def write(medium: _Medium) -> str:
            stdout.buffer.write(medium.data)
            return "standard output" if medium.data else medium.url

        sys.stdout = sys.stderr  # for what else is printed inside
        try:
            yield write
        finally:
            sys.stdout = stdout
        return
    is_folder = os.path.isdir(output) or not os.path.basename(output)
    path = os.path.join(output, name) if is_folder else output
    if args.run is not cmd_ask and not is_folder and not force and os.path.lexists(path):
        hint = "Choose another name, or replace it with --force."
        raise BadRequestError(f"{path} exists already", hint=hint)
    real = os.path.realpath(path)
    place = real if force and os.path.exists(real) else os.path.dirname(real)
    if (output or args.run is not cmd_ask) and not os.access(place, os.W_OK):
        raise BadRequestError(f"{path} cannot be written", hint="Choose another place with -o.")
    yield partial(_saved, output=path, overwrite=force)


def _saved(medium: _Medium, output: str, overwrite: bool = False) -> str:
    """Where it is now: in a file of this name, or one like it that is free; else its URL."""
    if not medium.data:
        return medium.url
    stem, ending = os.path.splitext(output)
    usual = _ENDINGS.get(medium.mime, f".{medium.mime.rpartition('/')[2]}").split()
    ending = ending or ("" if overwrite and os.path.exists(output) else usual[0])
    path = stem + ending if overwrite else _free_name(stem, ending)
    try:
        medium.save(path, overwrite)
    except OSError as error:
        from tempfile import NamedTemporaryFile

        with NamedTemporaryFile(prefix="puter-", suffix=usual[0], delete=False) as file:
            file.write(medium.data)
        problem = f"{path} cannot be written ({error.strerror or error})"
        raise StoreError(problem, hint=f"It was saved in {file.name} instead.") from error
    if ending.lower() not in ("", *usual):
        _info(f"note: {path} holds {medium.mime}")
    return path


def _free_name(stem: str, ending: str) -> str:
    """The name of a file that is not there yet: stem.ending, stem-1.ending…"""
    names = (f"{stem}{f'-{n}' if n else ''}{ending}" for n in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


def _read_input(source: str) -> bytes:
    """A file, or all of standard input ("-"); when nothing comes for 2 s, it is mentioned."""
    if source != "-":
        return _bytes_of(source, "file")[0]
    waits = "Waiting for the end of standard input (at a terminal: Ctrl-D; to leave it out: < "
    note = threading.Timer(2.0, _info, [f"{waits}{os.devnull})", True])
    note.daemon = True
    note.start()
    try:
        first = sys.stdin.buffer.read(1)
    finally:
        note.cancel()
    return first + sys.stdin.buffer.read()


def _text_of_pipe(data: bytes) -> str:
    """The text of standard input; what cannot be decoded becomes U+FFFD, and is mentioned."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    text = data.decode("utf-8-sig", "replace")
    if "\ufffd" in text:
        _info("Standard input is not all UTF-8; what could not be read is marked.", dim=True)
    return text


def message_with(text: str, sources: Sequence[str], client: Puter) -> JSON:
    """A message with files, URLs and "-" (stdin): texts join the text, others stand beside it."""
    parts: list[JSON] = []
    for source in sources:
        if re.match(r"https?://", source):
            data, _ = client._transport.download(source)
            name = source.partition("?")[0].rstrip("/").rpartition("/")[2] or "page"
        else:
            data = _read_input(source)
            name = "standard input" if source == "-" else os.path.basename(source)
        if not data:
            raise BadRequestError(f"{source} is empty", hint="Attach something else.")
        parts.append(file_part((name, data)))
    texts = [text, *(part["text"] for part in parts if part["type"] == "text")]
    others = [part for part in parts if part["type"] != "text"]
    return messages_from("\n\n".join(filter(None, texts)), None, others)[0]


class _SavedTalk(Conversation):
    """A conversation that is saved for `--continue`; "" is the name of the last one."""

    # one question may replace what others asked
    may_replace = False

    def __init__(self, folder: Path, name: str = "", client: Puter | None = None) -> None:
        super().__init__(client=client)
        self.folder, self.name = folder, name
        # what the file was like when this process used it last
        self.stamp = _stamp_of(self.path)

    @property
    def path(self) -> Path:
        name = f"{CONVERSATIONS_FOLDER}/{self.name}.json" if self.name else CONVERSATION_NAME
        return self.folder / name

    def read(self) -> None:
        """Become what is saved; raises `StoreError` for a file that holds no conversation."""
        try:
            if not self.path.is_file():  # to open a FIFO would wait
                raise ValueError("it is not a file")
            saved = Conversation.from_json(read_json(self.path.read_text(encoding="utf-8")))
            _require(isinstance(saved.model or "", str), "model", saved.model, "")
            messages_from(saved.messages, saved.system)
            self.system, self.model = saved.system, saved.model
            self.messages, self.options = saved.messages, saved.options
        except (OSError, ValueError, TypeError, BadRequestError) as error:
            why = getattr(error, "message", error)
            problem = f"{self.path}: the conversation cannot be read ({why})"
            hint = "Move the file away, or ask without --continue."
            raise StoreError(problem, hint=hint) from error

    def save(self) -> None:
        """Save it, mode 0600; a failure is a warning, since the answer is there."""
        try:
            with _locked(self.path) as target:
                if not self.may_replace and _stamp_of(target) != self.stamp:
                    # another process has saved its own there meanwhile: both stay
                    self.name = self.name or "other"
                    self.path.parent.mkdir(0o700, exist_ok=True)
                    target = Path(_free_name(*os.path.splitext(self.path)))
                    self.name = target.stem
                    other = "Another conversation was saved meanwhile"
                    _info(f"{other}; this one is {self.name} now: -c {self.name} goes on with it.")
                _write_private(target, json.dumps(self.to_json()).encode() + b"\n")
                self.stamp = _stamp_of(target)
        except (OSError, TypeError, ValueError, StoreError) as error:
            _info(f"warning: The conversation could not be saved in {self.path} ({error}).")

    def turn(self, client: Puter, message: JSON, options: JSON, whole: bool = False) -> Reply:
        """Say or stream a message, and save the conversation; the stream is printed."""

        def ask() -> Reply:
            with closing(_Spinner(client)) as spinner:
                if whole:
                    return self.say(message, **options)
                _print_stream(self.stream(message, **options), spinner)
                return self.reply

        reply = _signed_in(client, ask)
        self.save()
        return reply

    def conclude(self, client: Puter, reply: Reply, save: Callable[[_Medium], str]) -> None:
        """Save an answer's pictures, and say what is special: empty, cut, or who else answered."""
        with ExitStack() as stack:  # when one fails, the others are saved all the same
            for image in reversed(reply.images):
                stack.callback(lambda image: _info(f"picture: {save(image)}"), image)
        if client.config.quiet_mode:
            return
        if not reply.text and not reply.images:
            calls = ", ".join(dict.fromkeys(call.name for call in reply.tool_calls))
            what = f"only a call of {calls}" if calls else "empty"
            _info(f"the answer is {what}", dim=True)
        if reply.finish_reason == "length":
            _info("the answer was cut at its longest length (--max-tokens)", dim=True)
        if reply.finish_reason == "content_filter":
            _info("the provider's filter ended the answer", dim=True)
        attempts, active = reply.attempts, client._accounts.active_name
        is_other = active not in (None, reply.account)
        wanted, id_of = client.config.model_name(self.model), client._catalogue.known().id_of
        if attempts and (is_other or id_of(attempts[-1].model) != id_of(wanted)):
            errors = (a.error.message for a in attempts if a.error)
            why = next(errors, "what was asked is on cooldown")
            _info(f"answered by {attempts[-1].model} on {reply.account} ({why})", dim=True)

    def words(self, role: str) -> list[str]:
        texts = (text_of(m.get("content")) for m in self.messages if m.get("role") == role)
        return [" ".join(text.split()) for text in texts]


def _prompt_of(args: Any) -> str:
    """The question; what follows -c may be its beginning, as the help of `ask` says."""
    word = args.continue_ or ""
    is_saved = re.fullmatch(_TALK_NAME, word) and _SavedTalk(config_dir(), word).stamp
    if word and len(args.prompt) != 1 and not is_saved:
        args.continue_, args.prompt = "", [word, *args.prompt]
    return " ".join(args.prompt)


def _conversation(args: Any, client: Puter) -> _SavedTalk:
    name = args.continue_ or ""
    if name and not re.fullmatch(_TALK_NAME, name):
        hint = "Use up to 64 letters, digits, dots, - and _, and no dot or - in front."
        raise ConfigError(f"{name!r} cannot be the name of a conversation", hint=hint)
    talk = _SavedTalk(client.config.folder, name, client)
    goes_on = args.continue_ is not None
    if goes_on and talk.stamp:
        talk.read()
    elif goes_on:
        _info(f"There is no conversation {name or 'yet'}: this begins one.", dim=True)
    talk.may_replace = args.run is cmd_ask and not goes_on
    talk.model, talk.system = args.model or talk.model, args.system or talk.system
    return talk


def _print_stream(chunks: Iterator[Chunk], spinner: _Spinner) -> None:
    last, thinking = "", False
    try:
        for chunk in chunks:
            spinner.close()
            if chunk.type == "reasoning":
                thinking = True
                _info(chunk.text, dim=True, end="")
            elif chunk.type == "text" and chunk.text:
                if thinking:
                    thinking = False
                    _info("")
                _print(chunk.text, end="")
                last = chunk.text
    finally:
        chunks.close()  # type: ignore[attr-defined]  # the stream with it, whatever happened
        if thinking:
            _info("")
        if last and not last.endswith("\n"):
            _print("")


class _Spinner(threading.Thread):
    """Shows on a terminal's stderr that something is waited for, and for how long."""

    def __init__(self, client: Puter) -> None:
        super().__init__(daemon=True)
        self._reason, self._until = "", 0.0
        self._over = threading.Event()
        client._on_wait = self._show
        can_wipe = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        if can_wipe and not client.config.quiet_mode:
            self.start()

    def _show(self, why: str, wait_s: float) -> None:
        self._reason, self._until = why, time.monotonic() + wait_s + 0.5

    def close(self) -> None:
        self._over.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        started = time.monotonic()
        while not self._over.wait(0.1):
            seconds = time.monotonic() - started
            sys.stderr.write(_WIPE)
            reason = "no answer yet" if seconds > 10 else ""
            reason = self._reason if time.monotonic() < self._until else reason
            words = f"{'|/-'[int(seconds * 10) % 3]} {seconds:.0f} s {reason}"
            _info(_cut(words.rstrip(), _columns() - 1), dim=True, end="")
        _info("", end=_WIPE)


def _reply_report(reply: Reply) -> JSON:
    attempts: list[JSON] = []
    for one in reply.attempts:
        result = {"error": one.error and one.error.message, "seconds": round(one.seconds, 3)}
        attempts.append({"model": one.model, "account": one.account, **result})
    report = {**reply_to_json(reply), "cost_usd": reply.usage.cost_usd, "attempts": attempts}
    return report if reply.value is None else {**report, "value": reply.value}


def _usage_words(usages: Iterable[Usage | None]) -> str:
    reported = [u for u in usages if u]
    used = sum(reported, Usage())
    words = f"tokens: {used.input_tokens or 0} in, {used.output_tokens or 0} out"
    cost = "; cost not reported" if used.cost_usd is None else f"; cost ${used.cost_usd:.6f}"
    return f"{words}{cost if used.cost_usd != 0 else ''}" if reported else "tokens: not reported"


# ---- pictures and sound ----

_READ_OPTIONS = (_opt("-m --model MODEL", "a model that does this"), _JSON_FLAG)
_MADE_OPTIONS = (
    _opt("given", "the words; - reads standard input", nargs="*", type=str, metavar="text"),
    _opt("-o --output FILE", "where it is saved: a file, a folder, or - for stdout"),
    _opt("--force", "replace the file if it exists"),
    *_READ_OPTIONS,
)


@_command(_opt("-a --attach FILE", "a picture to change, or several", **_SEVERAL), *_MADE_OPTIONS)
def cmd_image(args: Any) -> None:
    """Draw a picture, or change one."""
    _run_job(args, Picture, "picture", images=args.attach)


@_command(_opt("--voice NAME", "who speaks"), *_MADE_OPTIONS)
def cmd_speak(args: Any) -> None:
    """Speak a text."""
    ending = os.path.splitext(args.output or "")[1][1:].lower()
    form = ending if ending in "mp3 wav opus aac flac pcm".split() else None
    _run_job(args, Audio, "speech", voice=args.voice, response_format=form)


@_command(_opt("given", "a recording; - reads standard input", metavar="file"), *_READ_OPTIONS)
def cmd_transcribe(args: Any) -> None:
    """Write down what a recording says."""
    _run_job(args, Transcript)


@_command(_opt("given", "a picture or PDF; - reads standard input", metavar="file"), *_READ_OPTIONS)
def cmd_ocr(args: Any) -> None:
    """Read the text of a picture or PDF."""
    _run_job(args, str)


def _run_job(args: Any, kind: type[Any], name: str = "", **options: Any) -> None:
    """Have something made, or read; `name` is that of the file which is made, if one is."""
    with ExitStack() as stack, _client() as client:
        save: Any = stack.enter_context(_saving(args, name)) if name else str
        given: Any = args.given
        if name:
            words = " ".join(args.given)
            given = (_text_of_pipe(_read_input("-")) if words in ("", "-") else words).strip()
            if not given:
                hint = f'Try: python -m puter {args.command} "A red bicycle"'
                raise ConfigError("No text was given", hint=hint)
        elif given == "-":
            given = ("standard input", _read_input("-"))

        def make() -> tuple[Any, Reply]:
            with closing(_Spinner(client)):
                return client._make(kind, given, model=args.model, **options)

        result, reply = _signed_in(client, make)
        cost, shown = reply.usage.cost_usd, save(result)
        report = {"model": reply.model, "account": reply.account, "cost_usd": cost}
        found = {"file": shown, "mime": result.mime} if name else {"text": shown}
        report |= found | getattr(result, "raw", {})
        _report(args, report, shown.split("\n"))
        if not client.config.quiet_mode:
            price = "cost not reported" if cost is None else f"cost ${cost:.4f}"
            _info(f"{reply.model} on {reply.account}; {price}", dim=True)


# ---- a conversation at the terminal ----


class _Chat:
    """A conversation by lines: `/x` is `do_x`, whose docstring /help shows; all else is said."""

    def __init__(self, client: Puter, talk: _SavedTalk, options: JSON) -> None:
        self.client, self.talk, self.options = client, talk, options
        self.attached: list[str] = []
        self.unanswered: JSON | None = None
        # what each turn used; None for one that failed, or was stopped
        self.used: list[Usage | None] = []

    def run(self) -> None:
        while True:
            note = "(Ctrl-D leaves)"
            try:
                text, is_block = _read_message()
                note = "(stopped; the answer is not saved, /retry asks again)"
                self.take(text, is_block)
            except EOFError:
                if sys.stdin.isatty() and sys.stderr.isatty():
                    # the shell's prompt begins a line of its own; readline may have begun it
                    _info("", end="\n" if os.environ.get("TERM") == "dumb" else _WIPE)
                return
            except PuterError as error:
                _error(error)
            except KeyboardInterrupt:
                _info(f"\n{note}")

    def take(self, text: str, is_block: bool) -> None:
        """A message, or a line that may be a command; a path in front makes it a message."""
        word, _, argument = text.rstrip().partition(" ")
        is_path = "/" in word[1:] or (argument and os.path.exists(word))
        if not is_block and text.strip() in ("exit", "quit", "/exit", "/quit"):
            raise EOFError
        if is_block or is_path or not text.startswith("/"):
            if is_block or text.strip():
                self.ask(message_with(text, self.attached, self.client))
                self.attached = []
        elif word in self.commands():
            self.commands()[word](argument.strip())
        else:
            _info(f"There is no command {word}; see /help. A space in front sends the line.")

    def ask(self, message: JSON) -> None:
        """One turn; a message that fails can be sent again with /retry."""
        self.unanswered = message
        self.used.append(None)
        reply = self.talk.turn(self.client, message, self.options)
        self.unanswered = None
        self.used[-1] = reply.usage
        self.talk.conclude(self.client, reply, partial(_saved, output="picture"))

    def commands(self) -> dict[str, Callable[[str], None]]:
        return {f"/{n[3:]}": getattr(self, n) for n in vars(_Chat) if n.startswith("do_")}

    def do_model(self, name: str) -> None:
        """/model NAME    ask another model (alone: say which)"""
        if name:
            self.talk.model = self.client.model(name).id
        _info(f"model: {self.client.config.model_name(self.talk.model)}")

    def do_system(self, text: str) -> None:
        """/system TEXT   set the system text (alone: say which)"""
        self.talk.system = text or self.talk.system
        _info(f"system: {self.talk.system or 'none'}")

    def do_attach(self, source: str) -> None:
        """/attach FILE   send a file, image or URL with the next message (-: none)"""
        if source not in ("", "-"):
            message_with("", [source], self.client)  # so that a mistake shows now
            self.attached.append(source)
        elif source:
            self.attached = []
        _info(f"With the next message goes: {', '.join(self.attached) or 'nothing'}")

    def do_models(self, text: str) -> None:
        """/models TEXT   the models with this in a name"""
        found = matching_models(self.client.models(), text)
        lines = [f"{m.id} (free)" if m.free else m.id for m in found[:20]]
        lines += [f"and {len(found) - 20} more"] if len(found) > 20 else []
        _info("\n".join(lines) or "No models match.")

    def do_new(self, name: str) -> None:
        """/new           begin a new conversation, without a name"""
        if name:
            hint = "With a name: python -m puter chat -c NAME"
            raise BadRequestError("/new takes no name", hint=hint)
        old = self.talk
        self.talk = _SavedTalk(old.folder, client=self.client)
        self.talk.model, self.talk.system, self.unanswered = old.model, old.system, None
        _info("A new conversation begins.")

    def do_retry(self, _: str) -> None:
        """/retry         ask the last message again"""
        everything, asked = self.talk.messages, self.unanswered or self._take_back()
        if asked is None:
            raise BadRequestError("Nothing was asked yet", hint="")
        try:
            self.ask(asked)
        except BaseException:
            self.talk.messages = everything
            raise

    def do_undo(self, _: str) -> None:
        """/undo          forget the last message and its answer"""
        if self._take_back() is None:
            raise BadRequestError("There is nothing to undo", hint="")
        self.talk.save()
        _info("The last message and its answer were removed.")

    def _take_back(self) -> JSON | None:
        messages = self.talk.messages
        places = [i for i, m in enumerate(messages) if m.get("role") == "user"]
        self.talk.messages = messages[: places[-1]] if places else messages
        return messages[places[-1]] if places else None

    def do_save(self, name: str) -> None:
        """/save FILE     write the conversation (.json, else as text)"""
        if not name:
            raise BadRequestError("Say where", hint="/save FILE")
        if not self.talk.messages:
            raise BadRequestError("There is nothing to save yet", hint="")
        if name.endswith(".json"):
            text = json.dumps(self.talk.to_json(), indent=2, ensure_ascii=False)
        else:
            said = (f"## {m['role']}\n\n{text_of(m.get('content'))}" for m in self.talk.messages)
            text = "\n\n".join(said)
        file_errors = _failing(f"{name} cannot be written", "Choose another name.")
        with file_errors, open(os.path.expanduser(name), "x", encoding="utf-8") as file:
            file.write(text + "\n")
        _info(f"saved in {name}")

    def do_usage(self, _: str) -> None:
        """/usage         tokens and cost of this session"""
        _info(f"{_plural(len(self.used), 'answer')}; {_usage_words(self.used)}")

    def do_help(self, _: str) -> None:
        """/help          this list"""
        _info("\n".join(str(command.__doc__) for command in self.commands().values()))
        _info('A line that ends in \\ goes on in the next; """ begins and ends a longer text.')
        _info("Ctrl-C stops an answer; exit or Ctrl-D leaves.")


@_command(*_TALK_OPTIONS)
def cmd_chat(args: Any) -> int:
    """Talk with a model; /help lists its commands."""
    with _client() as client:
        talk = _conversation(args, client)
        chat = _Chat(client, talk, {"max_tokens": args.max_tokens, "temperature": args.temperature})
        if not sys.stdin.isatty():
            chat.run()
            return 1 if None in chat.used else 0
        shown = client.config.model_name(talk.model)
        _info(f"Talking with {shown}; /help lists the commands, Ctrl-D leaves.")
        for role, mark in (("user", "> "), ("assistant", "")):
            for said in talk.words(role)[-1:]:
                _info(mark + _cut(said, 200), dim=True)
        _run_with_readline(chat)
    return 0


def _read_message() -> tuple[str, bool]:
    """(what was typed, whether it is a message as it stands); what a pipe's end cuts counts."""
    prompt, more = ("> ", ". ") if sys.stdin.isatty() else ("", "")
    text = _read_line(prompt)
    if "\n" in text.strip():  # it was pasted
        return text.strip("\n"), True
    if not text.lstrip().startswith('"""'):
        with suppress(EOFError):
            while text.endswith("\\"):
                text = f"{text[:-1]}\n{_read_line(more)}"
        return text.removesuffix("\\"), False
    text = text.lstrip()[3:]
    with suppress(EOFError):
        while not text.rstrip().endswith('"""'):
            text += f"\n{_read_line(more)}"
    return text.rstrip().removesuffix('"""').strip("\n"), True


def _run_with_readline(chat: _Chat) -> None:
    import glob

    try:
        import readline
    except ImportError:  # Windows
        return chat.run()
    matches: list[str] = []

    def complete(text: str, state: int) -> str | None:
        if state == 0:
            command, space, _ = readline.get_line_buffer().partition(" ")
            names: Iterable[str] = ()
            if not space:
                names = chat.commands()
            elif command in ("/attach", "/save"):
                names = glob.glob(glob.escape(text) + "*")
            elif command == "/model":
                with suppress(PuterError):  # none without the list
                    names = [m.id for m in chat.client.models()]
            matches[:] = [name for name in names if name.startswith(text)]
        return matches[state] if state < len(matches) else None

    path = chat.client.config.folder / "chat-history"
    with suppress(OSError):  # none yet
        readline.read_history_file(path)
    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    if os.environ.get("TERM") != "dumb":  # several pasted lines are one message
        readline.parse_and_bind("set enable-bracketed-paste on")
    readline.set_history_length(1_000)
    known = readline.get_current_history_length()
    try:
        chat.run()
    finally:
        # a history that cannot be saved is no reason to fail; libedit cannot append
        with suppress(OSError, AttributeError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            # what another chat has added meanwhile stays
            readline.append_history_file(readline.get_current_history_length() - known, path)


@_command(_JSON_FLAG)
def cmd_conversations(args: Any) -> None:
    """List the conversations that `ask -c NAME` and `chat -c NAME` go on with."""
    folder, rows = config_dir(), []
    names = (path.stem for path in (folder / CONVERSATIONS_FOLDER).glob("*.json"))
    for talk in (_SavedTalk(folder, name) for name in ("", *names)):
        if not talk.stamp:
            continue
        try:
            talk.read()
        except StoreError as error:
            _info(f"warning: {error}")
            continue
        said, at_ms = talk.words("user"), talk.stamp[0] // 1_000_000
        row: JSON = {"name": talk.name or None, "saved_at_ms": at_ms, "turns": len(said)}
        rows.append({**row, "model": talk.model, "first": said[0] if said else ""})
    rows.sort(key=lambda row: -row["saved_at_ms"])
    table = [("NAME", "WHEN", "TURNS", "MODEL", "BEGINS WITH")]
    for row in rows:
        whose = (row["name"] or "(the last)", _when(row["saved_at_ms"] / 1000), str(row["turns"]))
        table.append((*whose, row["model"] or "(default)", _cut(row["first"], 60) or "-"))
    nothing = ["There are no conversations yet."]
    _report(args, rows, _table(table, "<<><<", (3,), cut=4) if rows else nothing)


# ---- accounts ----


@_command(
    [
        _opt("--with-token", "read a token from stdin"),
        _opt("--no-browser", "only print the URL"),
        _opt("--import FILE", "take the accounts of a file", dest="file"),
    ],
    _opt("--port PORT", f"where to wait, and only there ({LOGIN_PORT}, or any free)", type=_PORT),
)
def cmd_login(args: Any) -> None:
    """Sign in and keep the account."""
    with _client() as client:
        if args.file is not None:
            _import_accounts(client, args.file)
            return
        if not args.with_token:
            account = _sign_in(client.config, args.no_browser, args.port)
        elif token := _read_token():
            try:
                account = account_of(token, client.config)
            except AuthError as error:
                error.hint = "This token was refused: copy it again, whole."
                raise
        else:
            hint = "Try: python -m puter login --with-token < FILE"
            raise ConfigError("No token was given", hint=hint)
        _print(_add_account(client, account))


def _read_token() -> str:
    import getpass

    if sys.stdin.isatty():
        with suppress(EOFError):
            return getpass.getpass("Token (it is not shown): ").strip()
        return ""
    line = sys.stdin.buffer.readline()
    # a UTF-16 line ends one byte later
    line += sys.stdin.buffer.read(1) if line.startswith(b"\xff\xfe") else b""
    return _text_of_pipe(line).strip()


def _sign_in(config: Config, no_browser: bool = False, port: int | None = None) -> Account:
    import webbrowser

    def show(url: str) -> None:
        _info(f"Open this URL to sign in:\n\n    {url}\n\nWaiting for you (Ctrl-C ends it)...")

    opener = None if no_browser else webbrowser.open
    return browser_login(config, show=show, open_browser=opener, port=port)


def _add_account(client: Puter, account: Account) -> str:
    is_new = client.store.add(account)
    client.state.clear_cooldowns(account.username)
    _log.info("Auth: Account %s - %s", "added" if is_new else "renewed", account.username)
    kind = " (a temporary account)" if account.is_temporary else ""
    count = _plural(len(client.store.accounts()), "account")
    _note_variable()
    return f"Signed in as {account.username}{kind}; {count} in {client.store.path}"


def _note_variable() -> None:
    if os.environ.get(TOKEN_VARIABLE):
        _info(f"note: {TOKEN_VARIABLE} is set, and comes before the stored accounts.")


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _import_accounts(client: Puter, name: str) -> None:
    store = client.store
    raw, path = _bytes_of(name, "file")
    data = parse_accounts(raw, path)
    stored = {a.username: a for a in store.accounts()}
    any_user = replace(client.config, auto_create_temp_user=True)
    imported = [_account_from(record) for record in data["accounts"]]
    for account in imported:
        own, why = stored.get(account.username), ""
        if own is not None and own.token == account.token:
            why = ", whose token is the same"
        elif own is not None:
            try:
                owner = account_of(account.token, any_user).username
                why = f": the other token is of {owner}" if owner != account.username else ""
            except PuterError as error:
                why = f": the other token was refused ({error.message})"
        if why:
            _print(f"Kept {account.username}{why}")
        else:
            is_new = store.add(account, activate=False)
            _print(f"{'Added' if is_new else 'Renewed the token of'} {account.username}")
    if imported and not stored:
        store.switch(imported[data["activeIndex"]].username)
    _print(f"{_plural(len(imported), 'account')} from {path}")


@_command([_opt("name", "the account's name", nargs="?"), _opt("--all", "remove all accounts")])
def cmd_logout(args: Any) -> None:
    """Remove an account; the active one by default."""
    with _client() as client:
        active = client.store.active()
        name = args.name or (active.username if active else None)
        removed = client.store.clear() if args.all else [client.store.remove(name)] if name else []
        for account in removed:
            client.state.clear_cooldowns(account.username)
        active = client.store.active()
    names = ", ".join(a.username for a in removed)
    _print(f"Removed {names}." if removed else "No account was removed: nobody is signed in.")
    if active:
        _print(f"The active account is {active.username}.")
    if removed:
        _print("The token itself still works: revoke it on puter.com (Settings, Security).")


@_command(_opt("name", "the account's name"))
def cmd_switch(args: Any) -> None:
    """Make another account the active one."""
    account = _client().store.switch(args.name)
    _log.info("Auth: Switched account - %s", account.username)
    _print(f"The active account is {account.username}.")
    _note_variable()


@_command(
    _JSON_FLAG,
    _opt("--check", "try everything a call needs"),
    _opt("--clear-cooldowns", "end all cooldowns"),
)
def cmd_status(args: Any) -> int:
    """The accounts, and who is on cooldown for how long."""
    from_environment = bool(os.environ.get(TOKEN_VARIABLE))
    with _client() as client:
        if args.clear_cooldowns:
            count = len(client.state.cooldowns(time.time()))
            client.state.clear_cooldowns()
            _report(args, {"cleared": count}, [f"Ended {_plural(count, 'cooldown')}."])
            return 0
        if args.check:
            checks = list(_checks(client))
            bad, good = ("✗ ", "✓ ") if _has_style(sys.stdout) else ("FAIL  ", "ok    ")
            marks = {False: (bad, "red"), True: (good, "green")}
            data = [{"ok": fine, "text": text} for fine, text in checks]
            _report(args, data, ([marks[fine], (text, "")] for fine, text in checks))
            return 0 if all(fine for fine, _ in checks) else 1
        now, (accounts, active) = time.time(), client.store.read()
        cooldowns, used = client.state.cooldowns(now, accounts), client.state.last_used_ms()
    dead = {c.account for c in cooldowns if c.reason == "login"}
    report: JSON = {"config_dir": str(client.config.folder), "accounts": [], "cooldowns": []}
    note = "PUTER_AUTH_TOKEN is set: its account is used, and none of these."
    lines: list[_Line] = [note] if from_environment else []
    on, off = "●○" if _has_style(sys.stdout) else "* "
    for a in accounts:
        used_ms, needs_login = used.get(a.username, a.last_used_ms), a.username in dead
        row = {"username": a.username, "active": a == active, "temporary": a.is_temporary}
        row |= {"added_at_ms": a.added_at_ms, "last_used_ms": used_ms, "needs_login": needs_login}
        report["accounts"].append(row)
        notes = ["temporary"] if a.is_temporary else []
        notes += ["needs a new sign-in: python -m puter login"] if needs_login else []
        notes.append(f"last used {_when(used_ms / 1000) if used_ms else 'never'}")
        mark = (on, "green") if a == active else (off, "")
        lines.append([mark, (f" {a.username}", "bold"), (f"  ({', '.join(notes)})", "")])
    for c in cooldowns:
        if c.reason != "login":
            left_s = round(c.until_s - now, 1)
            row = {"account": c.account, "model": c.model or None, "reason": c.reason}
            report["cooldowns"].append({**row, "strikes": c.strikes, "seconds_left": left_s})
            what = f"{c.model} on {c.account}" if c.model else c.account
            lines.append(f"  cooldown: {what}, {left_s:.0f} s left ({c.reason})")
    _report(args, report, lines if accounts or from_environment else [*lines, _NOBODY])
    return 0 if accounts or from_environment else 1


def _when(at_s: float) -> str:
    """A time as a date; on a terminal, within a month, how long ago it was."""
    past_s = time.time() - at_s
    if not _has_style(sys.stdout) or not 0 <= past_s < 30 * 86_400:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_s))
    units = ((86_400, "d"), (3_600, "h"), (60, "min"))
    ago = (f"{past_s // size:.0f} {unit} ago" for size, unit in units if past_s >= size)
    return next(ago, "just now")


def _checks(client: Puter) -> Iterator[tuple[bool, str]]:
    from email.utils import parsedate_to_datetime
    from importlib.metadata import packages_distributions

    config, what = client.config, ""
    settings = config.folder / CONFIG_NAME
    yield True, f"settings: {settings if settings.exists() else 'no settings file'}"
    for rival in sorted({*packages_distributions().get("puter", ())} - {"puter-py"}):
        yield False, f"the package {rival} hides this one; do: pip uninstall {rival}"
    for path in (client.store.path, config.folder / STATE_NAME):
        if os.name != "nt" and path.exists():
            mode = path.stat().st_mode & 0o777
            fine = mode & 0o077 == 0
            yield fine, f"{path}: mode {mode:o}{'' if fine else f'; do: chmod 600 {path}'}"
    advice = "" if client.accounts else "; do: python -m puter login"
    yield bool(client.accounts), f"{_plural(len(client.accounts), 'account')}{advice}"
    any_user = replace(config, auto_create_temp_user=True)
    for account in client.accounts:
        whose = f"the token of {account.username}"
        try:
            yield True, f"{whose} works ({account_of(account.token, any_user).username})"
        except PuterError as error:
            yield False, f"{whose}: {error}"
    try:
        url = f"{_api_origin(config)}/puterai/chat/models"
        answer = client._transport.send("GET", url)
        date, status = answer.headers.get("Date"), answer.status_code
        words = "answers" if status < 500 else f"answered {status}"
        yield status < 500, f"{config.api_base_url} {words}"
        with suppress(ValueError):  # a date that cannot be read
            off_s = time.time() - parsedate_to_datetime(date).timestamp() if date else 0.0
            fine = abs(off_s) < 300
            yield fine, f"the clock differs by {off_s:.0f} s{'' if fine else '; set it right'}"
        what = "the model list: "
        models = ModelList(client.models(refresh=True))
        yield True, f"{len(models)} models"
        if config.default_model and not models.get(config.default_model):
            source = config.sources["default_model"]
            yield False, f"no model is called {config.default_model!r} (default_model of {source})"
    except PuterError as error:
        yield False, f"{what}{error}"


@_command(_JSON_FLAG)
def cmd_whoami(args: Any) -> None:
    """Ask the server whose token is in use."""
    with _client() as client:
        user = _signed_in(client, client.whoami)
    kind = " (temporary)" if user.get("is_temp") else ""
    _report(args, user, [f"{user.get('username')}{kind}"])


# ---- models, credit, statistics ----

MODEL_SORTS: dict[str, Callable[[Model], Any]] = {
    "id": lambda m: m.id,
    "price": lambda m: (m.input_usd_per_million is None, sum(filter(None, _prices(m))), m.id),
    "context": lambda m: (-(m.context or 0), m.id),
    # The newest first; the date as a number, such as 20251101.
    "released": lambda m: (-int(f"0{re.sub(r'[^0-9]', '', m.released or '')[:8]}"), m.id),
}


@_command(
    _opt("text", "only models with this in a name", nargs="?"),
    *_MODEL_CHOICE,
    _opt("--tools", "only those that call functions"),
    _opt("--vision", "only those that see images"),
    _opt("--sort KEY", "%(choices)s (%(default)s)", choices=list(MODEL_SORTS), default="id"),
    _opt("--refresh", "ask the server even if cached"),
    _JSON_FLAG,
)
def cmd_models(args: Any) -> None:
    """List the models."""
    with _client() as client:
        models = client.models(args.provider, args.free or None, args.refresh)
    models = matching_models(matching_models(models, args.search), args.text)
    models = [m for m in models if m.tools is not False or not args.tools]
    models = [m for m in models if _sees_images(m) or not args.vision]
    models.sort(key=MODEL_SORTS[args.sort])
    rows: list[Any] = [("MODEL", "PROVIDER", "CONTEXT", "INPUT", "TOOLS", "$/M IN", "$/M OUT")]
    for m in models:
        context, inputs = _tokens(m.context) if m.context else "?", "+".join(m.inputs or "?")
        prices = ("free" if m.free else "?" if p is None else f"{p:g}" for p in _prices(m))
        tools = {True: "yes", False: "no", None: "?"}[m.tools]
        rows.append((m.id, m.provider, context, inputs, tools, *prices))
    _report(args, [asdict(m) for m in models], _table(rows, "<<><<>>", (3, 1, 2, 4, 6, 5)))
    if not models:
        _info("No models match.")


def _tokens(count: int) -> str:
    if not _has_style(sys.stdout) or count < 1_000:
        return f"{count:,}"
    return f"{count / 1e6:.1f}M".replace(".0", "") if count >= 1e6 else f"{count / 1e3:.0f}K"


def _table(
    rows: Sequence[Sequence[str]], sides: str, spare: Sequence[int] = (), cut: int = 0
) -> Iterator[_Line]:
    """Rows, the head first, as lines with aligned columns (`<` or `>` a column).

    On a narrow terminal, columns that say the same in all rows are named once, then the
    `spare` ones are left out, in that order; at last `cut` is shortened.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    columns = list(range(len(widths)))
    room = _columns() if sys.stdout.isatty() else sys.maxsize
    same = [i for i in columns[1:] if len(rows) > 2 and len({row[i] for row in rows[1:]}) == 1]
    for i in (*same, *spare):
        if i in columns and sum(widths[c] + 2 for c in columns) - 2 > room:
            columns.remove(i)
            if i in same:
                yield [(f"{rows[0][i]}: {rows[1][i]}", "dim")]
    if cut:
        over = sum(widths[c] + 2 for c in columns) - 2 - room
        widths[cut] = min(widths[cut], max(widths[cut] - over, 8))
    for row in rows:
        cells = [f"{_cut(row[i], widths[i]):{sides[i]}{widths[i]}}" for i in columns]
        cells[-1] = cells[-1].rstrip()
        styles = ["bold", *("green" if row[i] == "free" else "" for i in columns[1:])]
        gapped = chain.from_iterable((("  ", ""), cell) for cell in zip(cells, styles))
        yield [("  ".join(cells), "head")] if row is rows[0] else list(gapped)[1:]


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size().columns


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


@_command(_opt("--all", "of all accounts"), _JSON_FLAG)
def cmd_usage(args: Any) -> int:
    """The credit that is left this month."""
    with _client() as client:
        active = _signed_in(client, client._accounts.first)
        rows = [credit_row(client, a) for a in (client.accounts if args.all else [active])]
    _report(args, rows, (line for row in rows for line in _credit_lines(row)))
    return 1 if any(row["error"] for row in rows) else 0


def _credit_lines(row: JSON) -> Iterator[_Line]:
    yield [(row["username"], "bold"), (f": {credit_text(row)}", "")]
    if row["error"]:
        return
    left, whole, unit = row["remaining"], row["allowance"], row["unit"]
    share = min(max(left / whole if whole > 0 else 0.0, 0.0), 1.0)
    words = ((0.5, "plenty"), (0.2, "fair"), (0.0, "low"))
    word = next((word for least, word in words if share > least), "used up")
    full, styled = round(20 * share), _has_style(sys.stdout)
    marks, most, least = ("█░", 6, 0.01) if styled else ("#.", 10, 0.0)
    bar = (marks[0] * full + marks[1] * (20 - full), "green" if share > 0.2 else "red")
    yield [("  [", ""), bar, (f"] {100 * share:.0f}% ({word})", "")]
    # each kind of token has a row of its own (recorded)
    costs: Any = Counter()
    calls: Counter[str] = Counter()
    for name, used in row["by_api"].items():
        parts = name.split(":")
        model = ":".join(parts[1:-1] if len(parts) > 2 else parts[:1])
        costs[model] += used["cost"]
        calls[model] = max(calls[model], used["count"])
    # on a terminal small change is not shown
    least *= sum(costs.values())
    dearest = [(name, cost) for name, cost in costs.most_common(most) if cost > least]
    if dearest:
        rows = [(f"  {name}", money(cost, unit), f"{calls[name]:,}") for name, cost in dearest]
        yield from _table([("  USED FOR", "COST", "CALLS"), *rows], "<>>")
    if more := len(costs) - len(dearest):
        yield f"  and {more} more"


@_command(_opt("model", "only this one", nargs="?"), _opt("--reset", "delete them"), _JSON_FLAG)
def cmd_stats(args: Any) -> None:
    """How the models have done."""
    of_model = f" of {args.model}" if args.model else ""
    with _client() as client:
        if args.reset:
            client.reset_stats(args.model)
            _report(args, {"reset": args.model or "all"}, [f"Statistics{of_model} were reset."])
            return
        stats = client.stats(args.model)
        free = {m.id for m in client._catalogue.known() if m.free}
    failures, styled = [], _has_style(sys.stdout)
    head = ("MODEL", "ASKED", "OK %" if styled else "OK", "P50", "P95", "FIRST", "TOK/S", "COST")
    rows: list[Sequence[str]] = [(*head, "TIMES") if styled else head]
    for one in stats:
        times = ("-" if t is None else f"{t:.2f}s" for t in (one.p50_s, one.p95_s, one.first_s))
        speed = "-" if one.tokens_per_s is None else f"{one.tokens_per_s:.0f}"
        # without those that were stopped
        ended = one.successes + sum(one.failures.values())
        rate = f"{100 * one.successes / ended:.0f}" if ended else "-"
        counts = (str(one.requests), rate if styled else str(one.successes))
        longest = max(one.times, default=0.0) or 1.0
        bars = "".join("▁▂▃▄▅▆▇█"[round(7 * t / longest)] for t in one.times)
        cost = f"${one.cost_usd:.4f}" if one.cost_usd or one.model in free else "-"
        cells = (one.model, *counts, *times, speed, cost)
        rows.append((*cells, bars or "-") if styled else cells)
        if one.failures:
            reasons = ", ".join(f"{code} {n}" for code, n in sorted(one.failures.items()))
            failures.append(f"failures of {one.model}: {reasons}")
    nothing = [f"There are no statistics{of_model} yet."]
    lines = chain(_table(rows, "<>>>>>>><", (4, 5, 6, 3, 8, 2)), failures)
    _report(args, [asdict(s) for s in stats], lines if stats else nothing)


@_command(_opt("--clear", "delete them"), _JSON_FLAG)
def cmd_cache(args: Any) -> None:
    """The cached replies."""
    with _client() as client:
        config, cache = client.config, client._reply_cache
        if args.clear:
            count = cache.cache_clear()
            _report(args, {"deleted": count}, [f"Cached replies deleted: {count}"])
            return
        stats: JSON = {**cache.cache_stats(time.time(), config.cache_ttl_ms / 1000)}
    stats |= {"enabled": config.cache_enabled, "path": cache.path}
    switch = "on" if config.cache_enabled else "off (set cache_enabled to true)"
    entries = f"{stats['entries']} of {config.cache_max_entries} entries, {stats['fresh']} fresh"
    lookups = stats["hits"] + stats["misses"]
    rate = f"{100 * stats['hits'] / lookups:.0f}%" if lookups else "-"
    lines = (
        f"The reply cache is {switch}, in {stats['path']}",
        f"{entries}, {stats['bytes']:,} bytes",
        f"{lookups} look-ups, {rate} found; replies last {config.cache_ttl_ms / 1000:.0f} s",
    )
    _report(args, stats, lines)


# ---- servers ----


@_command(
    [
        _opt("--openai", "the gateway: OpenAI's and Anthropic's protocols (the default)"),
        _opt("--mcp", "an MCP server on stdin and stdout"),
    ],
    _opt("--host HOST", "where to listen (%(default)s)", default="127.0.0.1"),
    _opt("--port PORT", "(%(default)s)", type=_PORT, default=SERVER_PORT),
    _opt("--api-key K", "what callers must send"),
    _opt("--log", "a line for each request, on stderr"),
    _opt("--allow-origin ORIGIN", "a web origin whose pages may call; several times", **_SEVERAL),
    _opt("--allow-host NAME", "a name of this host, as behind a proxy; several times", **_SEVERAL),
    _opt("--max-connections N", "more get 503 (%(default)s)", type=_COUNT, default=MAX_CONNECTIONS),
    _BUDGET_OPTION,
)
def cmd_serve(args: Any) -> None:
    """Serve other programs with your account."""
    import signal

    if args.mcp:
        serve_mcp(partial(_client, **_budget(args)))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    key = args.api_key or os.environ.get("PUTER_SERVER_API_KEY") or None
    with _client(**_budget(args)) as client:
        if args.log:
            _show_log(logging.INFO)
        more = (args.allow_origin, args.max_connections, args.allow_host)
        problem = f"Cannot listen on {args.host}:{args.port}"
        with _failing(problem, "Try another --port.", NetworkError):
            server = OpenAIServer(client, args.host, args.port, key, *more)
        try:
            server.start()
            root = server.url.removesuffix("/v1")
            _print(f"OpenAI-compatible server: {server.url}  (Anthropic clients: {root})")
            shown = "the one you gave" if key else "anything, such as puter"
            _print(f"For your client: base URL {server.url}, API key {shown}.")
            if not client.accounts:
                _print("You are not signed in yet: python -m puter login")
            try:
                _print(f"{len(client.models())} models; Ctrl-C stops.")
            except PuterError as error:
                _info(f"The model list is not available now: {error}")
            while True:  # in short sleeps: a signal cannot end a long one everywhere
                time.sleep(0.5)
        except KeyboardInterrupt:
            _info("Stopping when the running requests have ended; Ctrl-C again stops now.")
            server.stop()


# ---- the settings of other programs, for `config` and `launch` ----

# What they read, as seen in: OpenCode 1.18.33, Claude Code 2.1.197, Codex 0.169.0, Copilot
# 1.0.102, Qwen Code 0.24.4, Kilo 7.7.7, pi 1.6.0, Continue's cn 1.5.47, aider 0.86.2 and llm 0.36
# (each run), Zed of autumn 2026 and Claude Desktop of August 2026 (read in sources and manuals).
_BASE_URL = f"http://127.0.0.1:{SERVER_PORT}/v1"


class Setup(NamedTuple):
    """What a program is set up with: models, a gateway, and whether it gets the MCP server.

    The first model is the one to ask, `small` the id of the one for small tasks ("": the same).
    The gateway's key is in an environment variable, `key_variable`, or else any will do.
    `folder` is where files for a launch go.
    """

    models: Sequence[Model]
    small: str = ""
    mcp: bool = True
    url: str = _BASE_URL
    key: str = "puter"
    key_variable: str | None = None
    folder: Path = Path()

    def key_as(self, form: str) -> str:
        """The key for a file: how the program names a variable, KEY in `form`, or the key."""
        return form.replace("KEY", self.key_variable) if self.key_variable else self.key

    def file(self, name: str, content: Any) -> str:
        """The path of a new file for a launch."""
        path = self.folder / name
        _write_private(path, _file_text(name, content).encode())
        return str(path)

    def mcp_words(self, flag: str) -> list[str]:
        """The argument that names a file with the MCP server, if the program gets that."""
        servers = mcp_servers(self, type="stdio")
        return [flag + self.file("mcp.json", servers)] if self.mcp else []


def _file_text(file: str, content: Any) -> str:
    """A list is written as YAML: each item is one line of JSON, which YAML reads as well."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(f"- {json.dumps(item, ensure_ascii=False)}\n" for item in content)
    if file.endswith(".toml"):
        return "".join(f"{name} = {_toml_value(value)}\n" for name, value in content.items())
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _toml_value(value: Any) -> str:
    """A value on one line of TOML: tables in braces, all else as in JSON."""
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return "{" + ", ".join(f"{key} = {_toml_value(one)}" for key, one in value.items()) + "}"


def mcp_command() -> list[str]:
    """How another program starts the MCP server, from whatever folder it runs in."""
    here = os.path.realpath(__file__)
    installed = os.path.basename(os.path.dirname(here)) in ("site-packages", "dist-packages")
    return [sys.executable, *(("-m", "puter") if installed else (here,)), "serve", "--mcp"]


def _mcp_server(**more: Any) -> JSON:
    """The MCP server, as most programs want it written, with the folder if that is unusual."""
    program, *args = mcp_command()
    folder = config_dir()
    environ = {} if folder == config_dir({}) else {"PUTER_CONFIG_DIR": str(folder.absolute())}
    return {**more, "command": program, "args": args, "env": environ}


def _sees_images(model: Model) -> bool:
    return "image" in (model.inputs or ())


def opencode_settings(setup: Setup) -> JSON:
    """OpenCode: a provider on the bundled openai-compatible package, and the MCP server."""
    # Any other kind makes its file invalid.
    kinds = ("text", "audio", "image", "video", "pdf")
    # The catalogue does not say which models think; their names do.
    reasons = r"(^|[/:-])(o[134]|gpt-5|deepseek-r|qwq|qvq)|reason|thinking|magistral"
    models: JSON = {}
    for m in setup.models:
        inputs = [k for k in m.inputs or ("text",) if k in kinds]
        models[m.id] = {
            "name": m.name,
            "attachment": len(inputs) > 1,
            "reasoning": re.search(reasons, m.id.lower()) is not None,
            "temperature": True,
            "tool_call": m.tools is not False,
            "modalities": {"input": inputs, "output": ["text"]},
        }
        if m.window and m.max_tokens:  # it takes both or none
            models[m.id]["limit"] = {"context": m.window, "output": m.max_tokens}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Puter.com",
        "options": {"baseURL": setup.url, "apiKey": setup.key_as("{env:KEY}")},
        "models": models,
    }
    server = {"type": "local", "command": mcp_command(), "enabled": True}
    server["environment"] = _mcp_server()["env"]
    settings: JSON = {"$schema": "https://opencode.ai/config.json", "provider": {"puter": provider}}
    return settings | ({"mcp": {"puter": server}} if setup.mcp else {})


def zed_settings(setup: Setup) -> JSON:
    """Zed: an OpenAI-compatible provider (its key comes from PUTER_API_KEY), and the server."""
    models = [
        {"name": m.id, "display_name": m.name, "max_tokens": m.window or 128_000}
        for m in setup.models
    ]
    provider = {"puter": {"api_url": setup.url, "available_models": models}}
    servers = {"puter": _mcp_server()}
    return {"language_models": {"openai_compatible": provider}, "context_servers": servers}


def claude_environ(setup: Setup) -> dict[str, str]:
    """The variables that send Claude Code to a gateway; its sub-agents ask the small model."""
    model = setup.models[0]
    tiers = (f"ANTHROPIC_DEFAULT_{tier}_MODEL" for tier in ("OPUS", "SONNET", "FABLE"))
    small = ("ANTHROPIC_DEFAULT_HAIKU_MODEL", "ANTHROPIC_SMALL_FAST_MODEL")
    # For /model it asks for a list; CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC would forbid that.
    switches = """
        CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY CLAUDE_CODE_DISABLE_TERMINAL_TITLE
        DISABLE_AUTOUPDATER DISABLE_ERROR_REPORTING DISABLE_FEEDBACK_COMMAND DISABLE_TELEMETRY
    """
    environ = {
        "ANTHROPIC_BASE_URL": setup.url.rstrip("/").removesuffix("/v1"),
        "ANTHROPIC_AUTH_TOKEN": setup.key,
        **dict.fromkeys(("ANTHROPIC_MODEL", *tiers), model.id),
        **dict.fromkeys(small, setup.small or model.id),
        **dict.fromkeys(switches.split(), "1"),
    }
    if model.window:
        environ["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] = str(model.window)
    if model.max_tokens:
        environ["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(min(model.max_tokens, 32_000))
    return environ


def claude_exports(setup: Setup) -> str:
    """Claude Code: lines for a shell that send it to the gateway."""
    import shlex

    variables = {name: shlex.quote(value) for name, value in claude_environ(setup).items()}
    variables["ANTHROPIC_AUTH_TOKEN"] = setup.key_as('"$KEY"')
    return "".join(f"export {name}={value}\n" for name, value in variables.items())


def mcp_servers(_: Setup, **more: str) -> JSON:
    """The MCP server, for the programs that keep theirs under `mcpServers`."""
    return {"mcpServers": {"puter": _mcp_server(**more)}}


def codex_settings(setup: Setup) -> JSON:
    """Codex: a provider that speaks Responses, and the MCP server."""
    model = setup.models[0]
    provider = {
        "name": "puter.py",
        "base_url": setup.url,
        **({"env_key": setup.key_variable} if setup.key_variable else {}),
        "wire_api": "responses",
        # By default thirty requests for one failure; the gateway retries what can be retried.
        "request_max_retries": 0,
        "stream_max_retries": 0,
        "stream_idle_timeout_ms": 600_000,
    }
    settings: JSON = {"model": model.id, "model_provider": "puter", "web_search": "disabled"}
    settings |= {"model_context_window": model.window} if model.window else {}
    settings["model_providers.puter"] = provider
    return settings | ({"mcp_servers.puter": _mcp_server()} if setup.mcp else {})


def continue_settings(setup: Setup) -> str:
    """Continue: models with the provider `openai`, and the MCP server."""
    key, models = setup.key_as("${{ secrets.KEY }}"), []
    same: JSON = {"provider": "openai", "apiBase": setup.url, "apiKey": key}
    for m in setup.models:
        # It sends names such as gpt-5 or o3 to another endpoint: the full id avoids that.
        full = next((a for a in m.aliases if "/" in a and ":" not in a), m.id)
        name = full if re.match(r"gpt-5|o\d", m.id) else m.id
        kinds = {"tool_use": m.tools is not False, "image_input": _sees_images(m)}
        can = [kind for kind, can_do_it in kinds.items() if can_do_it]
        models.append({"name": f"Puter: {m.name}", "model": name, **same, "capabilities": can})
    text = f"name: Local Config\nversion: 1.0.0\nschema: v1\nmodels:\n{_file_text('', models)}"
    server = {"name": "puter", **_mcp_server(type="stdio")}
    return f"{text}mcpServers:\n{_file_text('', [server])}"


def aider_models(setup: Setup) -> list[JSON]:
    """aider: each model with its own URL, so that its other OpenAI models stay as they are."""
    extra = {"api_base": setup.url, "api_key": setup.key_as("os.environ/KEY")}
    same = {"edit_format": "diff", "use_repo_map": True, "extra_params": extra}
    names = [f"openai/{m.id}" for m in setup.models]
    return [{"name": name, "weak_model_name": name, **same} for name in names]


def aider_metadata(setup: Setup) -> JSON:
    """aider: what each model can do, and what it costs."""
    return {
        f"openai/{m.id}": {
            "litellm_provider": "openai",
            "mode": "chat",
            **dict.fromkeys(("max_tokens", "max_output_tokens"), m.max_tokens or 4_096),
            "max_input_tokens": m.window or 128_000,
            "supports_vision": _sees_images(m),
            "input_cost_per_token": (m.input_usd_per_million or 0) / 1e6,
            "output_cost_per_token": (m.output_usd_per_million or 0) / 1e6,
        }
        for m in setup.models
    }


def llm_models(setup: Setup) -> list[JSON]:
    """llm: extra OpenAI models; without a key name it sends a dummy and never a real key."""
    same: JSON = {"api_base": setup.url, "supports_schema": True}
    same |= {"api_key_name": "puter"} if setup.key_variable else {}
    models = []
    for m in setup.models:
        can = {"vision": _sees_images(m), "supports_tools": m.tools is not False}
        models.append({"model_id": f"puter/{m.id}", "model_name": m.id, **same, **can})
    return models


_SECRET_SETTINGS = [name for name, spec in _SETTINGS.items() if spec.metadata["secret"]]
_SECRET_VARIABLES = [TOKEN_VARIABLE, "PUTER_SERVER_API_KEY"]
_SECRET_VARIABLES += [f"PUTER_{name.upper()}" for name in _SECRET_SETTINGS]
PROGRAM_PATIENCE_S = 5.0  # for a program that was told to end
# What a program is started with: more arguments, and more variables (None takes one out).
# Files go into the temporary folder: nothing of the user's is written or changed.
LaunchPlan = tuple[list[str], Mapping[str, str | None]]


def _plan_opencode(setup: Setup) -> LaunchPlan:
    """OpenCode, and Kilo that is made from it, lay a variable's settings over the user's own."""
    settings = opencode_settings(setup)
    settings |= {"model": f"puter/{setup.models[0].id}", "small_model": f"puter/{setup.small}"}
    settings |= {"enabled_providers": ["puter"], "disabled_providers": []}
    names = ("OPENCODE_CONFIG_CONTENT", "KILO_CONFIG_CONTENT")
    return [], dict.fromkeys(names, json.dumps(settings))


def _plan_claude(setup: Setup) -> LaunchPlan:
    """Claude Code takes variables, and again as settings: those of the user's would win."""
    variables = claude_environ(setup)
    # These would send it elsewhere.
    clouds = "BEDROCK VERTEX FOUNDRY MANTLE ANTHROPIC_AWS ANTHROPIC_GOOGLE_CLOUD".split()
    others = [f"CLAUDE_CODE_USE_{name}" for name in clouds]
    others += "ANTHROPIC_API_KEY ANTHROPIC_UNIX_SOCKET ANTHROPIC_PROFILE".split()
    others += "CLAUDE_CODE_API_BASE_URL CLAUDE_CODE_SUBAGENT_MODEL".split()
    settings = {"env": {**variables, **dict.fromkeys(others, "")}}
    words = ["--settings", setup.file("settings.json", settings), *setup.mcp_words("--mcp-config=")]
    return words, {**dict.fromkeys(others), **variables}


# With a catalogue Codex uses these in place of its own prompt.
_CODEX_INSTRUCTIONS = """You are a coding agent in the Codex CLI, at work in the user's folder.
Go on until the task is done: read the code that matters, change it, run or test it, and end with
a few sentences on what you did and what is left. When something is unclear, look before you ask.
- Search with `rg`. Read a file before you change it. Follow the AGENTS.md files that apply.
- Change files with apply_patch. Its input is a patch, such as:
*** Begin Patch
*** Update File: src/app.py
@@ def greet():
-    print("Hi")
+    print("Hello")
*** End Patch
  Other heads are "*** Add File: PATH" (every line begins with +) and "*** Delete File: PATH".
- Keep changes small, at the root of the problem, and in the style of the code around them.
- Never undo changes that are not yours. Do not commit unless you are asked to.
"""


def _plan_codex(setup: Setup) -> LaunchPlan:
    """Codex takes settings as arguments; a catalogue tells it what the models can do."""
    settings = codex_settings(setup)
    settings.pop("model_context_window", None)  # the catalogue has each model's
    models = [
        {
            "slug": m.id,
            "display_name": m.name,
            "supported_reasoning_levels": [],
            "shell_type": "shell_command",
            "visibility": "list",
            "supported_in_api": True,
            "priority": 1,
            "base_instructions": _CODEX_INSTRUCTIONS,
            "support_verbosity": False,
            "truncation_policy": {"mode": "tokens", "limit": 10_000},
            "experimental_supported_tools": [],
            "apply_patch_tool_type": "freeform",
            "context_window": m.window or AGENT_CONTEXT,
            "supports_parallel_tool_calls": True,
            "input_modalities": ["text", "image"] if _sees_images(m) else ["text"],
        }
        for m in setup.models
    ]
    settings["model_catalog_json"] = setup.file("models.json", {"models": models})
    if setup.mcp:  # Codex hides its variables from servers
        names = [name for name in os.environ if name.startswith("PUTER_")]
        settings["mcp_servers.puter"]["env_vars"] = names
    return [w for k, v in settings.items() for w in ("-c", f"{k}={_toml_value(v)}")], {}


def _plan_aider(setup: Setup) -> LaunchPlan:
    """aider takes files with settings of models; a key in them may name a variable."""
    model = f"openai/{setup.models[0].id}"
    words = ["--model", model, "--editor-model", model, "--weak-model", f"openai/{setup.small}"]
    words += ["--model-settings-file", setup.file("models.yml", aider_models(setup))]
    words += ["--model-metadata-file", setup.file("metadata.json", aider_metadata(setup))]
    return words, {"OPENAI_API_KEY": setup.key}


def _plan_copilot(setup: Setup) -> LaunchPlan:
    """Copilot takes variables, and needs no login then."""
    model = setup.models[0]
    # the user's others would lead it elsewhere
    variables: JSON = dict.fromkeys(n for n in os.environ if n.startswith("COPILOT_PROVIDER_"))
    variables |= {
        "COPILOT_MODEL": model.id,
        "COPILOT_PROVIDER_BASE_URL": setup.url,
        "COPILOT_PROVIDER_API_KEY": setup.key,
        "COPILOT_PROVIDER_WIRE_API": "responses",
        "COPILOT_PROVIDER_MAX_PROMPT_TOKENS": str(model.window or AGENT_CONTEXT),
        "COPILOT_PROVIDER_MAX_OUTPUT_TOKENS": str(model.max_tokens or 4_096),
    }
    return setup.mcp_words("--additional-mcp-config=@"), variables


def _plan_qwen(setup: Setup) -> LaunchPlan:
    """Qwen Code takes a file of settings that win over the user's."""
    same = {"baseUrl": setup.url, "envKey": setup.key_variable}
    models = [
        {"id": m.id, **same, "generationConfig": {"contextWindowSize": m.window or AGENT_CONTEXT}}
        for m in setup.models
    ]
    settings = {"modelProviders": {"openai": models}, "fastModel": setup.small}
    words = ["--auth-type", "openai", "--model", setup.models[0].id]
    words += setup.mcp_words("--mcp-config=")
    return words, {"QWEN_CODE_SYSTEM_SETTINGS_PATH": setup.file("settings.json", settings)}


def _plan_pi(setup: Setup) -> LaunchPlan:
    """pi takes a provider from an extension."""
    models = [
        {
            "id": m.id,
            "name": m.name,
            "reasoning": False,
            "input": ["text", "image"] if _sees_images(m) else ["text"],
            "cost": dict(zip(("input", "output", "cacheRead", "cacheWrite"), (*_prices(m), 0, 0))),
            "contextWindow": m.window or AGENT_CONTEXT,
            "maxTokens": m.max_tokens or 4_096,
        }
        for m in setup.models
    ]
    provider = json.dumps({"baseUrl": setup.url, "api": "openai-completions", "models": models})
    with_key = f"{{...{provider}, apiKey: process.env.{setup.key_variable}}}"
    text = f"pi.registerProvider('puter', {with_key})"
    if setup.mcp:
        text += f"; pi.registerMcpServer('puter', {json.dumps(_mcp_server(exposure='direct'))})"
    extension = setup.file("puter.js", f"export default (pi) => {{ {text} }}\n")
    return ["-e", extension, "--model", f"puter/{setup.models[0].id}"], {}


def _plan_other(setup: Setup) -> LaunchPlan:
    """What the SDKs of OpenAI and Anthropic read, each with its own form of the URL."""
    keys = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
    return [], {
        **dict.fromkeys(keys, setup.key),
        **dict.fromkeys(("OPENAI_MODEL", "ANTHROPIC_MODEL"), setup.models[0].id),
        **dict.fromkeys(("OPENAI_BASE_URL", "OPENAI_API_BASE"), setup.url),
        "ANTHROPIC_BASE_URL": setup.url.removesuffix("/v1"),
    }


class Program(NamedTuple):
    """Another program: what `config` prints for it, and how `launch` starts it."""

    files: Mapping[str, Callable[[Setup], Any]] = {}  # that `config` prints, and their makers
    note: str = ""  # what to do with them
    install: str = ""  # the command for it; without one `launch` does not know the program
    plan: Callable[[Setup], LaunchPlan] = _plan_other
    command: str = ""  # that starts it, where that is not its name
    uses_tools: bool = True  # and takes MCP servers


PROGRAMS = {
    "opencode": Program(
        {"~/.config/opencode/opencode.json": opencode_settings},
        "Run: opencode -m puter/MODEL",
        "npm install -g opencode-ai",
        _plan_opencode,
    ),
    "zed": Program(
        {"settings.json (in Zed: open settings)": zed_settings},
        "Zed reads the key from PUTER_API_KEY; any will do if the server has none.",
    ),
    "claude-desktop": Program(
        {"claude_desktop_config.json (Settings, Developer, Edit Config)": mcp_servers},
        "Quit Claude Desktop before you change its file: it rewrites it.",
    ),
    "claude-code": Program(
        {
            "a shell, before `claude`": claude_exports,
            "~/.claude.json": partial(mcp_servers, type="stdio"),
        },
        'The variables can also stand under "env" in ~/.claude/settings.json.',
        "npm install -g @anthropic-ai/claude-code",
        _plan_claude,
        command="claude",
    ),
    "codex": Program(
        {"~/.codex/config.toml": codex_settings},
        "Run: codex, or codex -m MODEL",
        "npm install -g @openai/codex",
        _plan_codex,
    ),
    "copilot": Program(install="npm install -g @github/copilot", plan=_plan_copilot),
    "qwen": Program(install="npm install -g @qwen-code/qwen-code", plan=_plan_qwen),
    "kilo": Program(install="npm install -g @kilocode/cli", plan=_plan_opencode),
    "pi": Program(install="npm install -g @earendil-works/pi-coding-agent", plan=_plan_pi),
    "continue": Program(
        {"~/.continue/config.yaml": continue_settings},
        "Then choose a model whose name begins with Puter.",
    ),
    "aider": Program(
        {
            "~/.aider.model.settings.yml": aider_models,
            "~/.aider.model.metadata.json": aider_metadata,
        },
        "Run: aider --model openai/MODEL",
        "python -m pip install aider-chat",
        _plan_aider,
        uses_tools=False,
    ),
    "llm": Program(
        {
            "extra-openai-models.yaml, in the folder of the file that `llm logs path` names": llm_models
        },
        "Run: llm -m puter/MODEL. With a server key: llm keys set puter",
    ),
}
# Keyed by the commands that start them.
LAUNCHED = {row.command or name: row for name, row in PROGRAMS.items() if row.install}


@_command(
    _opt(
        "what",
        "show: every setting; path: where they stand; else the program to print settings for",
        choices=["show", "path", *(name for name, row in PROGRAMS.items() if row.files)],
    ),
    _JSON_FLAG,
    _opt("--base-url URL", "of the server (%(default)s)", default=_BASE_URL),
    *_MODEL_CHOICE,
)
def cmd_config(args: Any) -> None:
    """Show the settings, or print those that another program needs."""
    if args.what == "show":
        config = Config.load()
        rows = {name: getattr(config, name) for name in config.sources}
        rows |= {name: "***" for name in _SECRET_SETTINGS if rows[name]}
        data = {n: {"value": v, "source": config.sources[n]} for n, v in rows.items()}
        table = [("SETTING", "VALUE", "FROM")]
        for name, value in rows.items():
            text = json.dumps(value, ensure_ascii=False)
            text = text if len(text) <= 60 else f"{text[:57]}..."
            table.append((name, text, config.sources[name]))
        _report(args, data, _table(table, "<<<", cut=1))
        if config.ignored:
            _info(f"Settings of the plugin that mean nothing here: {', '.join(config.ignored)}")
    elif args.what == "path":
        path = str(config_dir() / CONFIG_NAME)
        _report(args, {"path": path}, [path])
    else:
        _config_program(args)


def _config_program(args: Any) -> None:
    models: list[Model] = []
    if args.what != "claude-desktop":
        with _client() as client:
            models = matching_models(client.models(args.provider, args.free or None), args.search)
            first = _agent_model(models, client.config)
            models.sort(key=lambda m: m != first)
        if not models:
            raise PuterError("No models match, so there is nothing to set up")
    variable = "PUTER_SERVER_API_KEY" if os.environ.get("PUTER_SERVER_API_KEY") else None
    program = PROGRAMS[args.what]
    setup = Setup(models, url=args.base_url, key_variable=variable)
    texts = {file: _file_text(file, content(setup)) for file, content in program.files.items()}
    if args.json:
        _report(args, [{"file": file, "text": text} for file, text in texts.items()], ())
        return
    for file, text in texts.items():
        _info(f"# {file}", dim=True)
        _print(text, end="")
    if models:
        _info("The server must run: python -m puter serve")
    _info(program.note)


def _agent_model(models: Sequence[Model], config: Config) -> Model | None:
    """What a coding agent gets unasked: the default model, else a free one that suits it."""
    if config.default_model and (found := ModelList(models).get(config.default_model)):
        return found
    free = [m for m in models if m.free]
    order = fallback_order("", ModelList(free), (), listed=config.fallback_models)
    suitable = (m for m in order if m.tools is not False and (m.window or 0) >= AGENT_CONTEXT)
    return next(suitable, None)


def _agent(name: str) -> str:
    if name not in LAUNCHED:
        from argparse import ArgumentTypeError

        known = f"choose from {', '.join(LAUNCHED)}"
        raise ArgumentTypeError(f"invalid choice: {name!r} ({known}, or: launch -- {name} ...)")
    return name


# ---- launch ----


@_command(
    _opt("program", "the agent", nargs="?", choices=list(LAUNCHED), type=_agent),
    _MODEL_OPTION,
    _opt("--small MODEL", "for small tasks (default: the same)"),
    _FREE_FLAG,
    _opt("--mcp", "give it our MCP server as well"),
    _BUDGET_OPTION,
    epilog="Arguments of the program go behind --; without PROGRAM, any command and its arguments.",
)
def cmd_launch(args: Any) -> int:
    """Run a coding agent on this account; its exit code is ours."""
    import shutil
    from concurrent.futures import ThreadPoolExecutor

    command = [args.program, *args.arguments] if args.program else args.arguments
    if not command:
        with ThreadPoolExecutor() as pool:  # each may take a second to say its version
            rows = [("PROGRAM", "VERSION", "PLACE"), *pool.map(_launcher_row, LAUNCHED)]
        for line in _table(rows, "<<<"):
            _print(line)
        return 0
    program = LAUNCHED.get(args.program, Program(uses_tools=False))
    path = shutil.which(command[0])
    if path is None and os.path.dirname(command[0]) and os.path.exists(command[0]):
        _error(f"{command[0]} cannot be started (Permission denied). Is it executable?")
        return 126
    if path is None:
        how = f"Install it with: {program.install}" if program.install else "Is its name right?"
        _error(f"{command[0]} is not installed. {how}")
        return 127
    if args.mcp and not program.uses_tools:
        raise ConfigError(f"{command[0]} cannot be given MCP servers", hint="Leave out --mcp.")
    config = Config.load(**_budget(args))
    with _LaunchClient(config, args.free) as client:
        if not client.accounts:
            _signed_in(client, client.whoami)
        setup = _launch_setup(args, client, program.uses_tools)
        # until the program has the signals, so that nothing is left behind
        with _launch_log(config), _signals(SIGTERM=lambda number, _: sys.exit(128 + number)):
            code = _run_with_gateway(client, setup, program, [path, *command[1:]])
        if not config.quiet_mode:
            _info(client.summary(), dim=True)
    return code


def _launcher_row(name: str) -> tuple[str, str, str]:
    import shutil
    import subprocess

    path = shutil.which(name)
    if path is None:
        return (name, "-", f"not installed; {LAUNCHED[name].install}")
    environ = {n: value for n, value in os.environ.items() if n not in _SECRET_VARIABLES}
    how: JSON = {"capture_output": True, "errors": "replace", "timeout": 20, "env": environ}
    with suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run([path, "--version"], check=False, **how).stdout
        if version := re.search(r"\d+(\.\d+)+", said):
            return (name, version[0], path)
    return (name, "?", path)


class _LaunchClient(Puter):
    """A client that counts what it answers, and may ask only models that are free."""

    def __init__(self, config: Config, only_free: bool) -> None:
        super().__init__(config=replace(config, debug=False))  # the terminal is the program's
        self._only_free = only_free
        if only_free:
            free = ModelList(self.models(free=True))
            names = tuple(filter(free.get, config.fallback_models))
            self.config = replace(self.config, fallback_models=names)
        self._requests = 0
        # for each answer: its model, whether it was a fallback, and its usage
        self._answers: list[tuple[str, bool, Usage]] = []
        self._on_answer = self._note_answer

    def _build_request(self, *args: Any, **more: Any) -> Asked:
        request = super()._build_request(*args, **more)
        if self._only_free and not self.model(request.model).free:
            raise BadRequestError(f"{request.model} is not free, and --free was given")
        self._requests += 1
        return request

    def _note_answer(self, reply: Reply, is_fallback: bool) -> None:
        self._answers.append((reply.model, is_fallback, reply.usage))

    def summary(self) -> str:
        parts = [_plural(self._requests, "request")]
        if self._answers:
            models, fallbacks, usages = zip(*self._answers)
            counts = (f"{n} by {model}" for model, n in Counter(models).most_common())
            parts += [f"answered: {', '.join(counts)}", _usage_words(usages)]
            parts += [_plural(sum(fallbacks), "fallback")] if any(fallbacks) else []
        active = self.active_account if self._requests else None
        if active and not (row := credit_row(self, active))["error"]:
            parts.append(f"{active.username}: {credit_text(row)}")
        return "; ".join(parts)


def _launch_setup(args: Any, client: Puter, uses_tools: bool) -> Setup:
    models = client.models(free=args.free or None)
    name = args.model or ("" if args.free else client.config.default_model)
    model = client.model(name) if name else _agent_model(models, client.config)
    if model is None:
        raise BadRequestError("No free model suits agents", hint="Name one with -m.")
    if not name:
        _info(f"Model: {model.id} (free). Another: -m MODEL; `python -m puter models` lists them.")
    small = client.model(args.small) if args.small else model
    for one in (model, small):
        if uses_tools and one.tools is False:
            problem = f"{one.id} cannot call tools, and {args.program} needs them"
            hint = "`python -m puter models --tools` lists those that can."
            raise BadRequestError(problem, hint=hint)
        if args.free and not one.free:
            hint = "Leave out --free, or choose a free model."
            raise BadRequestError(f"{one.id} is not free", hint=hint)
    served = [model, small]
    if args.program == "claude":  # its /model offers those of Claude; none may be dearer
        limits = [price or 0 for price in _prices(model)]
        pairs = ((m, zip(_prices(m), limits)) for m in models if m.id.startswith("claude"))
        served += (m for m, two in pairs if all(p is not None and p <= most for p, most in two))
    return Setup(list(dict.fromkeys(served)), small.id, args.mcp)


@contextmanager
def _launch_log(config: Config) -> Iterator[None]:
    """What is written to stderr meanwhile goes to a file, which is named if there was anything."""
    path = config.folder / "launch.log"
    os.makedirs(path.parent, 0o700, exist_ok=True)
    with _failing(f"{path} cannot be opened", "Move it away."):
        log = open(path, "a", 1, "utf-8", opener=partial(os.open, mode=0o600))  # noqa: SIM115
    with log, redirect_stderr(log):
        size = log.tell()
        _show_log(logging.DEBUG if config.debug else logging.WARNING)
        yield
        has_grown = log.tell() > size
    if has_grown:
        _info(f"What happened meanwhile is in {path}")


def _run_with_gateway(client: Puter, setup: Setup, program: Program, command: list[str]) -> int:
    from tempfile import TemporaryDirectory

    key = os.urandom(24).hex()
    server = OpenAIServer(client, port=0, api_key=key, models=[m.id for m in setup.models])
    folder = TemporaryDirectory(prefix="puter-launch-")
    with server, folder as name:
        gateway: JSON = {"url": server.url, "key": key, "key_variable": "PUTERPY_KEY"}
        setup = setup._replace(folder=Path(name), **gateway)
        words, variables = program.plan(setup)
        # No proxy may stand between the program and the gateway.
        hosts = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
        direct = f"{hosts},127.0.0.1".lstrip(",")
        merged: JSON = {**os.environ, "NO_PROXY": direct, "no_proxy": direct, **variables}
        merged["PUTERPY_KEY"] = key
        if not setup.mcp:  # its commands could read them
            merged |= dict.fromkeys(_SECRET_VARIABLES)
        environ = {name: value for name, value in merged.items() if value is not None}
        code = _run_program([command[0], *words, *command[1:]], environ)
        server.stop()  # the last answer may still be on its way into the summary
    return code


def _run_program(command: Sequence[str], environ: Mapping[str, str]) -> int:
    import subprocess

    process: Any = None

    def forward(number: int, _: Any) -> None:
        if process is not None:
            process.send_signal(number)
            killer = threading.Timer(PROGRAM_PATIENCE_S, process.kill)
            killer.daemon = True
            killer.start()

    # at a terminal, these reach the program as well
    leave = (lambda *_: None) if sys.stdin.isatty() else forward
    with _signals(SIGINT=leave, SIGQUIT=leave, SIGTERM=forward, SIGHUP=forward):
        with _failing(f"{command[0]} cannot be started", "", BadRequestError):
            process = subprocess.Popen(command, env=environ)
        code: int = process.wait()
    return code if code >= 0 else 128 - code


@contextmanager
def _signals(**handlers: Callable[[int, Any], Any]) -> Iterator[None]:
    """While inside, these signals go to these handlers; Windows has not all of them."""
    import signal

    with ExitStack() as stack:
        for name, handler in handlers.items():
            if number := getattr(signal, name, None):
                stack.callback(signal.signal, number, signal.signal(number, handler))
        yield


# For bash; zsh takes it as well. Each case: the word's place, the command before it, its words.
# Options are shown only when the word begins like one; where nothing fits, the shell shows files.
_BASH = """\
_puter() {
    local words= word="${COMP_WORDS[COMP_CWORD]}" hidden='-*'
    [[ $word == -* ]] && hidden=
    case "$COMP_CWORD:${COMP_WORDS[1]}" in
CASES    esac
    COMPREPLY=($(compgen -W "$words" -X "$hidden" -- "$word"))
}
complete -o default -F _puter puter
"""
_FISH = """\
function _puter
    string match -q -- '-*' (commandline -ct); or set -l hidden '-*'
    string split -- ' ' $argv | string match -v -- "$hidden"
end
"""
_ZSH = "autoload -Uz compinit bashcompinit\n(( $+functions[compdef] )) || compinit\nbashcompinit\n"


@_command(
    _opt("shell", "the shell", choices=["bash", "zsh", "fish"]),
    epilog='bash, zsh: eval "$(puter completion bash)"; fish: puter completion fish | source',
)
def cmd_completion(args: Any) -> None:
    """Print a script that completes the commands and options of `puter`."""
    is_fish, cases = args.shell == "fish", ""
    for command in ("", *_COMMANDS):  # none yet, and each
        words = " ".join(_words_of(command) if command else _COMMANDS)
        if is_fish:
            when = f"seen_subcommand_from {command}" if command else "use_subcommand"
            cases += f"complete -c puter -n '__fish_{when}' -a \"(_puter '{words}')\"\n"
        else:
            place = f"*:{command}" if command else "1:*"
            cases += f"        {place}) words='{words}' ;;\n"
    head = {"zsh": _ZSH, "fish": _FISH}.get(args.shell, "")
    _print(head + (cases if is_fish else _BASH.replace("CASES", cases)), end="")


if __name__ == "__main__":
    sys.exit(main())
