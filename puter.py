"""Ask the 500+ AI models of a Puter.com account from Python or the terminal.

    import puter
    print(puter.chat("Why is the sky blue?"))
    for chunk in puter.stream("Tell me a story", model="claude-opus-4-5"):
        print(chunk, end="", flush=True)

Sign in once with ``python -m puter login``; ``python -m puter --help`` lists the commands.
`Puter` is the client. Every failure is a `PuterError` that says what happened and what to do.

The names in `__all__` are the module's face and stay; any other may change with a version.
Remarks such as "(recorded)" mean that a fact was seen in the answers of a real Puter server,
release 26.07.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from operator import length_hint
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, NoReturn, TypeVar

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path
    from typing import TypeGuard

    import requests
    from typing_extensions import Self  # noqa: UP035 (typing's own needs 3.11)

__version__ = "0.1.0"
__all__ = [
    "AccessError",
    "Account",
    "AccountStore",
    "AllAccountsOnCooldownError",
    "Attempt",
    "AuthError",
    "BadRequestError",
    "Chunk",
    "Config",
    "ConfigError",
    "Conversation",
    "Cooldown",
    "Credit",
    "CreditError",
    "Model",
    "ModelAccessError",
    "ModelNotFoundError",
    "ModelRateLimitError",
    "ModelStats",
    "ModelUnavailableError",
    "NetworkError",
    "OpenAIServer",
    "ProviderAuthError",
    "Puter",
    "PuterError",
    "RateLimitError",
    "Reply",
    "ReplyError",
    "RequestTimeoutError",
    "ServerError",
    "State",
    "StoreError",
    "Stream",
    "StreamError",
    "SubscriptionError",
    "ToolCall",
    "Usage",
    "chat",
    "stream",
]

# Puter's own default: cheap, so that a forgotten `model=` costs little.
DEFAULT_MODEL = "gpt-5-nano"
DEFAULT_FALLBACK_MODELS = (
    "openrouter:xiaomi/mimo-v2-flash:free",
    "openrouter:deepseek/deepseek-r1-0528:free",
    "openrouter:mistralai/devstral-2512:free",
    "openrouter:qwen/qwen3-coder:free",
    "openrouter:mistralai/devstral-small-2505:free",
    "openrouter:qwen/qwen2.5-coder-32b-instruct:free",
    "openrouter:google/gemini-2.0-flash-exp:free",
    "openrouter:meta-llama/llama-4-maverick:free",
    "openrouter:meta-llama/llama-4-scout:free",
    "openrouter:meta-llama/llama-3.3-70b-instruct:free",
    "openrouter:qwen/qwen3-235b-a22b:free",
    "openrouter:qwen/qwen3-30b-a3b:free",
    "openrouter:deepseek/deepseek-chat-v3.1:free",
    "openrouter:nvidia/llama-3.1-nemotron-ultra-253b-v1:free",
    "openrouter:openai/gpt-oss-120b:free",
    "openrouter:openai/gpt-oss-20b:free",
    "openrouter:google/gemma-3-27b-it:free",
    "openrouter:mistralai/mistral-small-3.2-24b-instruct:free",
)
CONNECT_TIMEOUT_S = 10.0
# A whole reply with tools may take minutes before its first byte.
EXACT_TOOLS_TIMEOUT_S = 600.0
RETRY_CAP_S = 30.0
RATE_PAUSE_S = 0.25  # the least wait after a 429, so that nobody hammers
RATE_WINDOW_S = 10.0  # Puter counts the requests of the last 10 s (recorded)
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_FILE_BYTES = 30 * 1024 * 1024
MAX_LINE_BYTES = 32 * 1024 * 1024


class _LazyLog:
    """The logger `puter`; `logging` is imported only when somebody could hear.

    That is when the program has imported it itself, or wants these messages on stderr.
    """

    def __init__(self) -> None:
        self._logger: Any = None
        self._shown_from: int | None = None

    def show(self, level: int) -> None:
        """Show messages from this level on on stderr, as ``[puter-auth] 15:30:45 …``."""
        self._shown_from = level
        if self._logger is not None:
            self._attach()

    def debug(self, message: str, *args: Any) -> None:
        """See `logging`."""
        self._log(10, message, args)

    def info(self, message: str, *args: Any) -> None:
        """See `logging`."""
        self._log(20, message, args)

    def warning(self, message: str, *args: Any, exc_info: bool = False) -> None:
        """See `logging`."""
        self._log(30, message, args, exc_info)

    def error(self, message: str, *args: Any, exc_info: bool = True) -> None:
        """See `logging`; with the traceback of the exception at hand."""
        self._log(40, message, args, exc_info)

    def _log(self, level: int, message: str, args: tuple[Any, ...], exc_info: bool = False) -> None:
        if self._logger is None:
            shown = self._shown_from is not None and level >= self._shown_from
            if "logging" not in sys.modules and not shown:
                return
            import logging

            self._logger = logging.getLogger("puter")
            self._logger.addHandler(logging.NullHandler())
            self._attach()
        self._logger.log(level, message, *args, exc_info=exc_info, stacklevel=3)

    def _attach(self) -> None:
        import logging

        if self._shown_from is None:
            return
        if all(h.name != _STDERR_HANDLER for h in self._logger.handlers):
            handler = logging.StreamHandler()
            handler.name = _STDERR_HANDLER
            form = "[puter-auth] %(asctime)s %(message)s"
            handler.setFormatter(logging.Formatter(form, "%H:%M:%S"))
            self._logger.addHandler(handler)
        self._logger.setLevel(self._shown_from)


_STDERR_HANDLER = "puter-stderr"
_DEBUG, _WARNING = 10, 30  # logging's levels
_log = _LazyLog()
_T = TypeVar("_T")


def __dir__() -> list[str]:
    """What tab completion shows of the module."""
    return sorted([*__all__, "__version__"])


JSON = dict[str, Any]
_LOOPBACK_NAMES = frozenset(("127.0.0.1", "localhost", "[::1]"))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a finite number (true and false are none)."""
    fine = isinstance(value, (int, float)) and not isinstance(value, bool)
    return fine and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _describe(value: Any) -> str:
    """A found value for an error text: its JSON, shortened, and its kind."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a text"}
    kinds |= {list: "a list", dict: "an object", type(None): "null"}
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return f"{shown} ({kinds.get(type(value), type(value).__name__)})"


def _close_matches(
    name: str, names: Iterable[str], cutoff: float = 0.6, most: int = 3
) -> list[str]:
    """The names that look like the given one, best first."""
    import difflib

    return difflib.get_close_matches(name, list(names), n=most, cutoff=cutoff)


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question for the hint of an unknown name, with a blank behind it; "" if none is near."""
    near = _close_matches(name, names)
    return f"Did you mean {near[0]!r}? " if near else ""


def strip_puter_prefix(name: str) -> str:
    """The name as Puter takes it: without the `puter/` that other tools put in front."""
    stripped = name.strip()
    return stripped[6:] if stripped.lower().startswith("puter/") else stripped


class _Lock:
    """A re-entrant lock that a forked child finds open, whoever held it in the parent."""

    def __init__(self) -> None:
        self._by_process = {os.getpid(): threading.RLock()}

    def __enter__(self) -> None:
        own = self._by_process.get(os.getpid())
        if own is None:  # setdefault: another thread of the child may be as far
            own = self._by_process.setdefault(os.getpid(), threading.RLock())
        own.acquire()

    def __exit__(self, *_: object) -> None:
        self._by_process[os.getpid()].release()


# ======================================================================================
# 2. errors · uses: nothing above but the constants
# ======================================================================================
Scope = Literal["request", "model", "account", "server"]


class PuterError(Exception):
    """Something went wrong; the base of every error of this module.

    Attributes: `message` (what happened), `hint` (what to do), `status` (HTTP, or None),
    `code` (Puter's word, or None), `model` and `account` (names, or None), `attempts`
    (every `Attempt` made for the call), `retry_after_s` (when the server named a time).
    `str()` of the error holds message, attempts and hint; no attribute ever holds a token.
    """

    scope: ClassVar[Scope] = "request"
    """Whose fault it is, and so what can help: another model, account, time, or nothing."""
    retryable: ClassVar[bool] = False
    """Whether the very same request may work a moment later."""
    default_hint: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        hint: str | None = None,
        model: str | None = None,
        account: str | None = None,
        attempts: Sequence[Attempt] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.hint = self.default_hint if hint is None else hint
        self.model = model
        self.account = account
        self.attempts = tuple(attempts)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        parts = [self.message]
        if len(self.attempts) > 1:
            parts.append(f"Tried {_summarize(self.attempts)}.")
        if self.hint:
            parts.append(self.hint)
        return " ".join(p if p[-1:] in ".!?:" else f"{p}." for p in parts)


def _summarize(attempts: Sequence[Attempt]) -> str:
    """Attempts in a few words; the same one several times in a row is told once."""
    told: list[list[Any]] = []
    for attempt in attempts:
        if told and told[-1][0] == attempt.outcome:
            told[-1][1] += 1
        else:
            told.append([attempt.outcome, 1])
    return "; ".join(text if n == 1 else f"{text} ({n} times)" for text, n in told)


class AuthError(PuterError):
    """The account's token is missing, dead, or of the wrong kind."""

    scope = "account"
    default_hint = "Sign in with `python -m puter login`."


class CreditError(PuterError):
    """The account's credit is used up (requests in flight reserve some of it)."""

    scope = "account"
    default_hint = (
        "Use a free model (`python -m puter models --free`), add another account with "
        "`python -m puter login`, or add credit on puter.com."
    )


class AccessError(PuterError):
    """The account may not do this: it is suspended, not verified, or forbidden to."""

    scope: ClassVar[Scope] = "account"
    default_hint = (
        "Look at the account on puter.com, or use another: `python -m puter switch NAME`."
    )


class ModelAccessError(AccessError):
    """This account may not use this model: it is for subscribers, or the free use is spent."""

    scope = "model"
    default_hint = "Use another model (`python -m puter models --free`) or another account."


class SubscriptionError(AccessError):
    """The endpoint needs a paid plan; waiting changes nothing."""

    scope = "request"
    default_hint = 'Set "api_style" to "drivers" (the default): it works for every account.'


class RateLimitError(PuterError):
    """The account sent too many requests; another model does not help."""

    scope: ClassVar[Scope] = "account"
    retryable = True
    default_hint = "Wait some seconds, or add another account with `python -m puter login`."


class ModelRateLimitError(PuterError):
    """The model's provider has had enough requests for now."""

    scope = "model"
    default_hint = "Use another model for a while, or leave `fallback_enabled` on."


class ModelUnavailableError(PuterError):
    """The model's provider is down, or failed."""

    scope = "model"
    retryable = True
    default_hint = "Try again later, or use another model (`python -m puter models`)."


class ProviderAuthError(ModelUnavailableError):
    """Puter's own key at the provider was refused; your login is fine."""

    retryable = False
    default_hint = "This is between Puter and the provider: use another model."


class ModelNotFoundError(PuterError):
    """No model has this name; `near` lists names that are close."""

    default_hint = "List the names with `python -m puter models`."

    def __init__(self, message: str, *, near: Sequence[str] = (), **details: Any) -> None:
        super().__init__(message, **details)
        self.near = tuple(near)


class BadRequestError(PuterError):
    """The request itself is wrong: nobody will accept it as it is.

    `param` is the field of an OpenAI request that is at fault, if it is one.
    """

    param: str | None = None

    default_hint = "Change the request as the message says; sending it again will not help."


class ServerError(PuterError):
    """Puter's server failed, or something that is no Puter server answered."""

    scope = "server"
    retryable = True
    default_hint = "Try again later; if it stays, check `api_base_url` in puter.json."


class RequestTimeoutError(PuterError):
    """No answer in time."""

    scope = "server"
    retryable = True
    default_hint = "Raise `api_timeout_ms` in puter.json (or `timeout_ms=` of the call)."


class NetworkError(PuterError):
    """The server cannot be reached: refused, unknown host, TLS, or a broken connection."""

    scope = "server"
    retryable = True
    default_hint = "Check the network, the proxy settings and `api_base_url`."


class ReplyError(PuterError):
    """The model's answer cannot be read; `raw` holds the text in question as it came."""

    default_hint = "Ask again, or use another model."

    def __init__(self, message: str, *, raw: str = "", **details: Any) -> None:
        super().__init__(message, **details)
        self.raw = raw


class StreamError(PuterError):
    """A stream broke before its end; `reply` holds what had come (a `Reply`, or None)."""

    scope = "model"
    retryable = True
    default_hint = "What came before is in `.reply`; ask again for a whole answer."

    def __init__(self, message: str, *, reply: Reply | None = None, **details: Any) -> None:
        super().__init__(message, **details)
        self.reply = reply


class ConfigError(PuterError):
    """A setting is wrong; the message names where it stands and what is allowed."""


class StoreError(PuterError):
    """The accounts file cannot be read or written; its bytes are left as they are."""


class AllAccountsOnCooldownError(PuterError):
    """Every account is resting; `retry_after_s` says for how long, `statuses` why each."""

    scope = "account"
    retryable = True
    default_hint = (
        "Wait, add another account with `python -m puter login`, or end the cooldowns with "
        "`python -m puter status --clear-cooldowns`."
    )

    def __init__(self, message: str, *, statuses: Sequence[Cooldown] = (), **details: Any) -> None:
        super().__init__(message, **details)
        self.statuses = tuple(statuses)


# ======================================================================================
# 3. values · uses: errors
# ======================================================================================
ChunkType = Literal["text", "reasoning", "tool_call", "usage"]


def as_dict(value: Any) -> JSON:
    """A value as a dict of its fields; what is inside them stays as it is."""
    return {f.name: getattr(value, f.name) for f in fields(value)}


def _code_of(error: PuterError) -> str:
    """An error in a word: the server's, else the name of its kind."""
    return error.code or type(error).__name__


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and price of one reply, whatever the provider calls them; None is "not told".

    `input_tokens` is as the provider counts it: OpenRouter and Claude leave cached tokens
    out of it. `cost_usd` is in US dollars. An empty usage is false.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    total_tokens: int | None = None
    cost_usd: float | None = None

    def __bool__(self) -> bool:
        return any(v is not None for v in (self.input_tokens, self.output_tokens, self.cost_usd))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A model's wish to call a function: `arguments` is a dict.

    `extra_content` is a provider's note (Gemini's thought signature) that must go back with
    the call in the history.
    """

    id: str
    name: str
    arguments: JSON
    extra_content: JSON | None = None


@dataclass(slots=True)
class Chunk:
    """A piece of a streamed reply; `str()` of any but a text chunk is empty.

    `type` is "text", "reasoning" (both carry `text`), "tool_call" or "usage".
    """

    type: ChunkType
    text: str = ""
    tool_call: ToolCall | None = None
    usage: Usage | None = None

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
        error = self.error
        told = "answered" if error is None else _code_of(error)
        return f"{self.model} on {self.account}: {told}"


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer; `str()` is its text.

    `model` and `account` are the ones that answered, `attempts` everything that was tried.
    `finish_reason` is "stop", "tool_calls", "length" or the provider's own word. `raw` is
    what the server said (for a stream: its extra lines).
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

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        calls = "".join(f"\n-> {c.name}({c.arguments})" for c in self.tool_calls)
        return f"<{self.model}, {self.finish_reason}>\n{self.text}{calls}"

    def _repr_markdown_(self) -> str:
        """How Jupyter shows it."""
        return self.text or f"```\n{self!r}\n```"


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the catalogue; prices in US dollars per million tokens, None if not told.

    `inputs` are kinds such as "text", "image", "pdf"; `tools` is None when the catalogue does
    not say (then it may well work). `released` is a date such as "2025-11-01", or None.
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
    """A rest: of a whole account (`model` is ""), or of one model on it.

    `until_s` is seconds since 1970; `reason` is the error's code, "login" for a token that is
    dead until the next sign-in; `strikes` counts the failures in a row.
    """

    account: str
    model: str
    until_s: float
    strikes: int
    reason: str


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


@dataclass(frozen=True, slots=True)
class ModelStats:
    """How a model has done here: counts of all calls, times of the latest ones.

    Times are in seconds: `p50_s` and `p95_s` of whole replies, `first_s` the median to the
    first token. `failures` counts by the error's code. None is "not known".
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


# ======================================================================================
# 4. config · uses: errors, values
# ======================================================================================
CONFIG_NAME = "puter.json"
ACCOUNTS_NAME = "puter-accounts.json"
STATE_NAME = "state.sqlite3"
# Variables of the same prefix that are no settings.
_OTHER_VARIABLES = ("PUTER_AUTH_TOKEN", "PUTER_CONFIG_DIR", "PUTER_SERVER_API_KEY")


def config_dir(
    environ: Mapping[str, str] | None = None, os_name: str = os.name, home: str | None = None
) -> Path:
    """The folder of settings, accounts and state: `PUTER_CONFIG_DIR`, else the system's place."""
    from pathlib import Path

    env = os.environ if environ is None else environ
    if env.get("PUTER_CONFIG_DIR"):
        return Path(env["PUTER_CONFIG_DIR"]).expanduser()
    given = env.get("APPDATA" if os_name == "nt" else "XDG_CONFIG_HOME")
    if given:
        return Path(given) / "puter"
    user_home = Path(home) if home is not None else Path.home()
    if os_name == "nt":
        return user_home / "AppData" / "Roaming" / "puter"
    return user_home / ".config" / "puter"


def _setting(default: Any, doc: str, **check: Any) -> Any:
    """A field of `Config`; `check` holds `low` and `high`, or `choices`, or `url`."""
    return field(default=default, metadata={"doc": doc, **check})


@dataclass(frozen=True, slots=True)
class Config:
    """All settings; `Config.load()` reads them from puter.json and the environment.

    Raises `ConfigError` for a value of the wrong type or out of range.
    """

    quiet_mode: bool = _setting(False, "no status lines on stderr")
    debug: bool = _setting(False, "a log of every request on stderr")
    api_base_url: str = _setting("https://api.puter.com", "where Puter's API answers", url=True)
    gui_base_url: str = _setting("https://puter.com", "where Puter's pages are", url=True)
    api_timeout_ms: int = _setting(
        120_000,
        "longest silence of the server, and longest time for a whole answer, in ms",
        low=1,
        high=86_400_000,
    )
    auto_create_temp_user: bool = _setting(
        True, "accept a login that ends in a temporary account, as Puter's page makes them"
    )
    max_retries: int = _setting(3, "how often a failed request is sent again", low=0, high=20)
    retry_delay_ms: int = _setting(
        1_000, "first wait before sending again, in ms; doubles", low=0, high=600_000
    )
    cache_ttl_ms: int = _setting(
        300_000, "how long the model list and cached replies count, in ms", low=0, high=10**12
    )
    cache_enabled: bool = _setting(False, "keep whole replies and answer the same request again")
    cache_max_entries: int = _setting(500, "replies kept at most", low=1, high=1_000_000)
    cache_directory: str | None = _setting(
        None, "folder of the cached replies (null: with the state)"
    )
    metrics_enabled: bool = _setting(True, "keep figures of every call for `stats`")
    metrics_max_samples: int = _setting(
        1_000, "calls kept a model for the percentiles", low=1, high=1_000_000
    )
    metrics_file: str | None = _setting(None, "file of the figures (null: with the state)")
    fallback_enabled: bool = _setting(True, "try free models when the asked one fails")
    fallback_models: tuple[str, ...] = _setting(
        DEFAULT_FALLBACK_MODELS, "models to fall back to, in order"
    )
    fallback_cooldown_ms: int = _setting(
        60_000, "rest of a model that failed on an account, in ms", low=0, high=10**10
    )
    account_rotation_enabled: bool = _setting(True, "go to the next account when one is limited")
    account_rotation_strategy: str = _setting(
        "round-robin", "which account is next", choices=("round-robin", "least-recently-used")
    )
    account_rotation_cooldown_ms: int = _setting(
        300_000, "rest of a limited account, in ms; 2x, 3x, 4x when it goes on", low=0, high=10**10
    )
    default_model: str | None = _setting(
        None, f"model when none is asked for (null: {DEFAULT_MODEL})"
    )
    api_style: str = _setting(
        "drivers", "`openai`: an OpenAI-compatible base", choices=("drivers", "openai")
    )
    stream_tools: str = _setting(
        "exact", "`live` streams with tools and may lose calls", choices=("exact", "live")
    )
    max_concurrent: int = _setting(3, "requests at once on one account", low=1, high=1_000)
    folder: Path = field(default_factory=config_dir)

    def __post_init__(self) -> None:
        for spec in _SETTINGS.values():
            value = _checked(spec.name, getattr(self, spec.name), "argument")
            object.__setattr__(self, spec.name, value)

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
        from pathlib import Path

        values, _ = settings_and_sources(folder, environ, overrides)
        return cls(**values, folder=Path(folder) if folder else config_dir(environ))


def settings_and_sources(
    folder: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """All settings as (name -> value, name -> where it comes from); raises `ConfigError`."""
    from pathlib import Path

    env = os.environ if environ is None else environ
    path = (Path(folder) if folder else config_dir(env)) / CONFIG_NAME
    found: dict[str, tuple[Any, str]] = {}
    for where, given in (
        (str(path), _read_config(path)),
        ("environment", _from_environment(env)),
        ("argument", overrides or {}),
    ):
        for name, value in given.items():
            if name not in _SETTINGS:
                raise _unknown_key(name, where)
            label = f"PUTER_{name.upper()}" if where == "environment" else where
            found[name] = (_checked(name, value, label), label)
    values = {n: found[n][0] if n in found else spec.default for n, spec in _SETTINGS.items()}
    return values, {n: found[n][1] if n in found else "default" for n in _SETTINGS}


def _read_config(path: Path) -> JSON:
    """puter.json as a dict ({} when there is none); raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error})", hint="Make it a UTF-8 file that you may read."
        ) from error
    try:
        data = json.loads(text, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: is not valid JSON ({error})", hint="Mend the file, or move it away."
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: holds {_describe(data)}, not an object",
            hint='It should look like {"debug": true}.',
        )
    return data


def _no_twins(pairs: list[tuple[str, Any]]) -> JSON:
    """A JSON object as a dict; a key given twice is an error, since one would be lost."""
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twin = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twin!r} stands twice")
    return result


def _from_environment(env: Mapping[str, str]) -> JSON:
    """The settings given as `PUTER_<NAME>`; a near miss of a name is a `ConfigError`."""
    given: JSON = {}
    for variable in sorted(env):
        if not variable.startswith("PUTER_") or variable in _OTHER_VARIABLES:
            continue
        name = variable[len("PUTER_") :].lower()
        if name in _SETTINGS:
            given[name] = _from_text(name, env[variable])
        else:
            known = [*(f"PUTER_{n.upper()}" for n in _SETTINGS), *_OTHER_VARIABLES]
            near = _close_matches(variable, known, cutoff=0.85)
            if near:  # what is less alike may be another program's
                raise ConfigError(
                    f"{variable}: there is no such setting", hint=f"Did you mean {near[0]}?"
                )
    return given


def _from_text(name: str, text: str) -> Any:
    """The value that an environment variable's text stands for (checked by the caller)."""
    kind = _SETTINGS[name].type
    if kind == "bool":
        words = {"1": True, "true": True, "yes": True, "on": True}
        words |= {"0": False, "false": False, "no": False, "off": False}
        return words.get(text.strip().lower(), text)
    if kind == "int" and re.fullmatch(r"\s*-?\d{1,18}\s*", text):
        return int(text)
    if kind.startswith("tuple"):
        if text.lstrip().startswith("["):
            try:
                return json.loads(text)
            except ValueError:
                return text
        return [part.strip() for part in text.split(",") if part.strip()]
    return None if text == "" and kind.endswith("None") else text


def _checked(name: str, value: Any, where: str) -> Any:
    """The value as `Config` holds it; None is the default. Raises `ConfigError`."""
    spec = _SETTINGS[name]
    if value is None:
        return spec.default
    allowed, result = _allowed(spec, value)
    if allowed:
        raise ConfigError(
            f"{where}: {name} is {_describe(value)}, but must be {allowed}",
            hint="Correct the value, or remove it for the default"
            f" ({json.dumps(spec.default) if spec.name != 'fallback_models' else 'a built-in list'}).",
        )
    return result


def _allowed(spec: Any, value: Any) -> tuple[str, Any]:
    """("" and the value to keep) if the value is fine, else (what is allowed, None)."""

    check = spec.metadata
    if spec.type == "bool":
        return ("" if isinstance(value, bool) else "true or false"), value
    if spec.type == "int":
        fine = isinstance(value, int) and not isinstance(value, bool)
        fine = fine and check["low"] <= value <= check["high"]
        return ("" if fine else f"a whole number from {check['low']} to {check['high']}"), value
    if spec.type.startswith("tuple"):
        fine = isinstance(value, (list, tuple)) and all(isinstance(v, str) and v for v in value)
        return ("" if fine else "a list of model names"), tuple(value) if fine else None
    if "choices" in check:
        choices = " or ".join(f'"{c}"' for c in check["choices"])
        return ("" if value in check["choices"] else choices), value
    if isinstance(value, os.PathLike) and not check.get("url"):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.strip():
        return "a text that is not empty", None
    if check.get("url"):
        fine = re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", value) is not None
        return ("" if fine else "an address such as https://api.puter.com"), value.rstrip("/")
    return "", value


def _unknown_key(name: str, where: str) -> ConfigError:
    meant = _did_you_mean(name, _SETTINGS).strip() or f"Known keys: {', '.join(_SETTINGS)}."
    return ConfigError(f"{where}: there is no setting {name!r}", hint=meant)


_SETTINGS = {n: f for n, f in ((f.name, f) for f in fields(Config)) if "doc" in f.metadata}


# ======================================================================================
# 5. store · uses: errors, values, config
# ======================================================================================
class AccountStore:
    """The accounts in a JSON file that the opencode-puter-auth plugin can share.

    `path` is the file, or the folder that holds `puter-accounts.json`. Reading never writes.
    Every change is read-modify-write under a lock between processes; the new file (mode 0600
    from its first byte) is written beside the old one and renamed over it, so that a crash
    leaves one or the other whole. Keys that this module does not know are kept. A file that
    cannot be read as this format is never overwritten: `StoreError` says what to do.
    """

    VERSION = 1

    def __init__(self, path: str | Path | None = None) -> None:
        from pathlib import Path

        given = Path(path) if path is not None else config_dir()
        is_file = path is not None and given.suffix == ".json"
        self.path = given if is_file else given / ACCOUNTS_NAME

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
        accounts = [_account_from(record) for record in data["accounts"]]
        return accounts, accounts[data["activeIndex"]] if accounts else None

    def stamp(self) -> tuple[int, int, int] | None:
        """Changes whenever the file does; None when there is no file."""
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return (status.st_mtime_ns, status.st_size, status.st_ino)

    def add(self, account: Account, *, activate: bool = True) -> bool:
        """Keep an account; True if it is new, False if only its token was replaced."""
        for what, text in (("name", account.username), ("token", account.token)):
            if not isinstance(text, str) or not text.strip():
                raise StoreError(
                    f"{self.path}: an account without a {what} cannot be kept",
                    hint="Sign in with `python -m puter login`.",
                )
        with self._change() as data:
            records = data["accounts"]
            if not records:
                data["activeIndex"] = 0
            index = _index_of(records, account.username)
            if index is None:
                records.append({"username": account.username})
                records[-1]["addedAt"] = account.added_at_ms or int(time.time() * 1000)
            record = records[-1 if index is None else index]
            record["authToken"] = account.token
            record["isTemporary"] = account.is_temporary
            if account.last_used_ms is not None:
                record["lastUsed"] = account.last_used_ms
            if activate:
                data["activeIndex"] = len(records) - 1 if index is None else index
        return index is None

    def remove(self, username: str) -> Account:
        """Forget one account and return it; raises `StoreError` if there is none such."""
        with self._change() as data:
            index = self._require(data, username)
            record = data["accounts"].pop(index)
            if index < data["activeIndex"] or data["activeIndex"] == len(data["accounts"]):
                data["activeIndex"] = max(0, data["activeIndex"] - 1)
        return _account_from(record)

    def clear(self) -> list[Account]:
        """Forget all accounts and return them."""
        with self._change() as data:
            gone = [_account_from(record) for record in data["accounts"]]
            data["accounts"], data["activeIndex"] = [], 0
        return gone

    def switch(self, username: str) -> Account:
        """Make an account the active one; raises `StoreError` if there is none such."""
        with self._change() as data:
            data["activeIndex"] = self._require(data, username)
            return _account_from(data["accounts"][data["activeIndex"]])

    def _require(self, data: JSON, username: str) -> int:
        index = _index_of(data["accounts"], username)
        if index is None:
            names = [record["username"] for record in data["accounts"]]
            known = ", ".join(names) or "none; sign in with `python -m puter login`"
            raise StoreError(
                f"{self.path}: no account is called {username!r}",
                hint=f"{_did_you_mean(username, names)}Accounts: {known}.",
            )
        return index

    def _read(self) -> JSON:
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return {"version": self.VERSION, "accounts": [], "activeIndex": 0}
        except OSError as error:
            raise self._failed("be read", error) from error
        return parse_accounts(raw, str(self.path))

    @contextmanager
    def _change(self) -> Iterator[JSON]:
        """Lock, read, let the caller change the data, write it if it did change."""
        what = "be changed"
        try:
            with _locked(self.path) as target:
                data = self._read()
                before = json.dumps(data)
                yield data
                what = "be written"
                if json.dumps(data) != before:
                    _write_private(target, f"{_pretty_json(data)}\n".encode())
        except OSError as error:
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: OSError) -> StoreError:
        reason = error.strerror or str(error)
        hint = _OS_HINTS.get(error.errno or 0, "Set PUTER_CONFIG_DIR to another folder.")
        return StoreError(f"{self.path}: cannot {what} ({reason}); it is as it was", hint=hint)


_OS_HINTS = {
    errno.EISDIR: "A folder stands in its place: move it away.",
    errno.ENOTDIR: "A part of the path is a file: set PUTER_CONFIG_DIR to a folder.",
    errno.EEXIST: "A part of the path is a file: set PUTER_CONFIG_DIR to a folder.",
    errno.ENOSPC: "Free some space, or set PUTER_CONFIG_DIR elsewhere.",
    errno.EDQUOT: "Free some space, or set PUTER_CONFIG_DIR elsewhere.",
    errno.EROFS: "The disk is read-only: set PUTER_CONFIG_DIR elsewhere.",
    errno.EACCES: "Give yourself the right to read and write the file and its folder, "
    "or set PUTER_CONFIG_DIR to another folder.",
}
_OS_HINTS[errno.EPERM] = _OS_HINTS[errno.EACCES]


def parse_accounts(raw: bytes, where: str) -> JSON:
    """The contents of an accounts file, checked; raises `StoreError` that names `where`."""

    def wrong(
        what: str, hint: str = "Mend the file, or move it away and sign in again."
    ) -> StoreError:
        return StoreError(f"{where}: {what}; it was left as it is", hint=hint)

    try:
        data = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        # The error's text is not shown: it may quote the token.
        place = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise wrong(f"is not valid JSON{place}") from None
    if not isinstance(data, dict):
        raise wrong("is not a JSON object")
    version = data.get("version")
    if isinstance(version, int) and version > AccountStore.VERSION:
        raise wrong(f"has version {version}, which is newer than this module", "Update puter.py.")
    if version != AccountStore.VERSION or isinstance(version, bool):
        raise wrong('has no "version": 1')
    records = data.get("accounts")
    if not isinstance(records, list):
        raise wrong('"accounts" is not a list')
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise wrong(f"accounts[{number}] is not an object")
        for key in ("username", "authToken"):
            if not isinstance(record.get(key), str) or not record[key].strip():
                raise wrong(f"accounts[{number}].{key} is not a text, or empty")
        for key in ("addedAt", "lastUsed"):
            time_ms = record.get(key) or 0
            if not isinstance(time_ms, (int, float)) or not math.isfinite(time_ms):
                raise wrong(f"accounts[{number}].{key} is not a time in ms")
    active = data.setdefault("activeIndex", 0)
    if not isinstance(active, int) or isinstance(active, bool):
        raise wrong('"activeIndex" is not a whole number')
    if records and not 0 <= active < len(records):
        raise wrong(f'"activeIndex" is {active}, but there are {len(records)} accounts')
    return data


def _index_of(records: Sequence[JSON], username: str) -> int | None:
    return next((i for i, r in enumerate(records) if r["username"] == username), None)


def _account_from(record: JSON) -> Account:
    def whole(key: str) -> int | None:
        return int(record[key]) if record.get(key) else None

    return Account(
        username=record["username"],
        token=record["authToken"],
        added_at_ms=whole("addedAt"),
        last_used_ms=whole("lastUsed"),
        is_temporary=record.get("isTemporary") is True,
    )


def _pretty_json(data: Any) -> str:
    """JSON for people to read; half a surrogate pair, which UTF-8 lacks, is written escaped."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(data, indent=2)
    return text


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """The real place of a file (a symlinked one stays a symlink), locked for other processes."""
    from pathlib import Path

    target = Path(os.path.realpath(path))
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(f"{target}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock_file(lock)
        yield target
    finally:
        _unlock_file(lock)
        os.close(lock)


def _lock_file(handle: int) -> None:
    """Wait for the exclusive lock of an open file."""
    if os.name == "nt":
        _lock_file_windows(handle)
        return
    import fcntl

    fcntl.flock(handle, fcntl.LOCK_EX)


def _unlock_file(handle: int) -> None:
    """Give the lock back, also when a forked child still has the file open."""
    if os.name != "nt":
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_UN)


def _lock_file_windows(handle: int, module: Any = None) -> None:
    """As `_lock_file`; msvcrt waits ten seconds at the most, so ask again until it is ours."""
    if module is None:
        import msvcrt as module  # type: ignore[no-redef, import-not-found, unused-ignore]
    while True:
        try:
            module.locking(handle, module.LK_LOCK, 1)
            return
        except OSError as error:
            if error.errno != 36:  # EDEADLOCK: still held by another process
                raise


def _write_private(target: Path, data: bytes) -> None:
    """Replace a file whole, or not at all; mode 0600 from the first byte. Caller holds a lock."""
    part = target.with_name(f".{target.name}.part")
    with suppress(FileNotFoundError):
        part.unlink()  # left by a crash; under the lock nobody else writes it
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system lets a folder be synced."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot; the file itself is in place
            os.fsync(handle)
    finally:
        os.close(handle)


_BUSY_S = 10.0  # how long a state file that others use is waited for
_CLOCK_SLACK_S = 60.0  # that the clock goes back by so much is no news


def _storable(text: str) -> str:
    """A server's word as SQLite takes it: question marks for what is no character."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _is_busy(error: Exception) -> bool:
    return "locked" in str(error) or "busy" in str(error)


def _all_of(works: Sequence[Callable[[_T], None]], db: _T) -> None:
    for work in works:
        work(db)


class State:
    """What processes tell each other: cooldowns, last uses, the model list.

    An SQLite file that may be deleted at any time. When it is damaged or cannot be written,
    a warning says so once and the state is kept in memory. Safe between threads, and used
    afresh after a fork.
    """

    _TABLES = """
        CREATE TABLE IF NOT EXISTS rests (
            account TEXT, model TEXT, until_s REAL, strikes INTEGER, reason TEXT, token_mark TEXT,
            since_s REAL, PRIMARY KEY (account, model));
        CREATE TABLE IF NOT EXISTS last_used (account TEXT PRIMARY KEY, at_ms INTEGER);
        CREATE TABLE IF NOT EXISTS catalogues (base_url TEXT PRIMARY KEY, body TEXT, at_s REAL);
        CREATE TABLE IF NOT EXISTS totals (
            model TEXT, outcome TEXT, count INTEGER, cost_usd REAL,
            PRIMARY KEY (model, outcome));
        CREATE TABLE IF NOT EXISTS samples (
            id INTEGER PRIMARY KEY, model TEXT, seconds REAL, first_s REAL, tokens INTEGER);
        CREATE INDEX IF NOT EXISTS samples_of ON samples (model, id);
        CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, at_s REAL, body TEXT);
        CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, count INTEGER);
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = str(path) if path is not None else str(config_dir() / STATE_NAME)
        self._lock = _Lock()
        self._db: sqlite3.Connection | None = None
        self._pid = 0
        # SQLite's counter of what others wrote, and all rests as of then; None after a write.
        self._kept_rests: tuple[int, dict[tuple[str, str], Any]] | None = None
        self._uses: dict[str, float] = {}
        # What waits to be recorded, and who writes it: of each process, for a fork has its own.
        self._to_record: dict[int, tuple[deque[Any], threading.Lock]] = {}

    def __repr__(self) -> str:
        return f"State({self.path!r})"

    def add_cooldown(
        self,
        account: str,
        model: str,
        rest_s: Callable[[int], float],
        reason: str,
        now: float,
        token_mark: str = "",
    ) -> Cooldown:
        """Let an account (model "") or a model on it rest: `rest_s(strikes in a row)` seconds."""

        account, model, reason = map(_storable, (account, model, reason))

        def work(db: sqlite3.Connection) -> Cooldown:
            row = db.execute(
                "SELECT strikes FROM rests WHERE account=? AND model=?", (account, model)
            ).fetchone()
            strikes = (row[0] if row else 0) + 1
            rest = Cooldown(account, model, now + rest_s(strikes), strikes, reason)
            self._kept_rests = None
            db.execute(
                "INSERT OR REPLACE INTO rests VALUES (?,?,?,?,?,?,?)",
                (account, model, rest.until_s, strikes, reason, token_mark, now),
            )
            return rest

        return self._run(self._written(work))

    def record_success(self, account: str, names: Sequence[str], now: float) -> None:
        """A call was answered by a model of these names: no strikes, and a use of the account.

        Nothing is written when nothing changes: no strike that is known, and a use within the
        last second.
        """
        account, names = _storable(account), [_storable(name) for name in names]
        known = self._rests(look=False)
        struck = any((account, name) in known for name in ("", *names))
        if not struck and 0 <= now - self._uses.get(account, -1.0) < 1.0:
            return

        def work(db: sqlite3.Connection) -> None:
            self._kept_rests = None
            rows = [(account, name) for name in {"", *names}]
            db.executemany("DELETE FROM rests WHERE account=? AND model=?", rows)
            row = (account, int(now * 1000))
            db.execute("INSERT OR REPLACE INTO last_used VALUES (?,?)", row)

        self._run(self._written(work))
        self._uses[account] = now

    def cooldowns(
        self, now: float, mark_of: Callable[[str], str | None] = lambda _: None, look: bool = True
    ) -> list[Cooldown]:
        """Who rests now; `mark_of` gives an account's token's mark.

        A dead token's rest holds only while the token is the same one. A clock that was set
        back ends the others. Without a `look` at the file, what other processes wrote since
        the last look is not known.
        """
        return [
            rest
            for rest, mark, since_s in self._rests(look).values()
            if now < rest.until_s
            and (now > since_s - _CLOCK_SLACK_S or rest.reason == "login")
            and (rest.reason != "login" or mark_of(rest.account) in (None, mark))
        ]

    def _rests(self, look: bool) -> dict[tuple[str, str], tuple[Cooldown, str, float]]:
        """All rests, their tokens' marks and beginnings; read again only when one was written."""
        kept = self._kept_rests
        if not look and kept is not None:
            return kept[1]

        def work(db: sqlite3.Connection) -> dict[tuple[str, str], tuple[Cooldown, str, float]]:
            kept = self._kept_rests
            (others,) = db.execute("PRAGMA data_version").fetchone()
            if kept is None or kept[0] != others:
                rows = db.execute(
                    "SELECT account, model, until_s, strikes, reason, token_mark, since_s "
                    "FROM rests ORDER BY account, model"
                ).fetchall()
                rests = {(r[0], r[1]): (Cooldown(*r[:5]), r[5], r[6]) for r in rows}
                self._kept_rests = kept = (others, rests)
            return kept[1]

        return self._run(work)

    def clear_cooldowns(self, account: str | None = None) -> int:
        """End the rests of one account or of all, and forget strikes; how many rows went."""
        where, values = ("", ()) if account is None else (" WHERE account=?", (account,))

        def work(db: sqlite3.Connection) -> int:
            self._kept_rests = None
            return db.execute(f"DELETE FROM rests{where}", values).rowcount

        return self._run(self._written(work))

    def last_used_ms(self) -> dict[str, int]:
        """When each account last answered, in ms since 1970."""
        return dict(
            self._run(lambda db: db.execute("SELECT account, at_ms FROM last_used").fetchall())
        )

    def put_catalogue(self, base_url: str, body: str, now: float) -> None:
        """Keep the model list of a server, as JSON text."""
        row = (base_url, body, now)
        self._run(lambda db: db.execute("INSERT OR REPLACE INTO catalogues VALUES (?,?,?)", row))

    def catalogue(self, base_url: str) -> tuple[str, float] | None:
        """The kept model list of a server and when it was fetched (s since 1970), or None."""
        found: tuple[str, float] | None = self._run(
            lambda db: db.execute(
                "SELECT body, at_s FROM catalogues WHERE base_url=?", (base_url,)
            ).fetchone()
        )
        return found

    def record(
        self,
        model: str,
        outcome: str,
        seconds: float,
        first_s: float | None = None,
        usage: Usage | None = None,
        keep: int = 1_000,
    ) -> None:
        """Count one request; `outcome` is "ok", "closed" or an error's code.

        Of the times of answered ones the latest `keep` a model are kept.
        """
        told = usage or Usage()
        model, outcome = _storable(model), _storable(outcome)

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT INTO totals VALUES (?,?,1,?) ON CONFLICT DO UPDATE SET "
                "count = count + 1, cost_usd = cost_usd + excluded.cost_usd",
                (model, outcome, told.cost_usd or 0.0),
            )
            if outcome != "ok":
                return
            row = (model, seconds, first_s, told.output_tokens)
            sample = db.execute(
                "INSERT INTO samples (model, seconds, first_s, tokens) VALUES (?,?,?,?)", row
            )
            if (sample.lastrowid or 0) % 64 == 0:  # tidying every time would cost more
                db.execute(
                    "DELETE FROM samples WHERE model=? AND id NOT IN (SELECT id FROM "
                    "samples WHERE model=? ORDER BY id DESC LIMIT ?)",
                    (model, model, keep),
                )

        fresh = deque[Any](), threading.Lock()
        queue, recorder = self._to_record.setdefault(os.getpid(), fresh)
        queue.append(work)
        # Whoever finds nobody writing writes what all have brought: threads do not queue up.
        while queue and recorder.acquire(blocking=False):
            try:
                batch = [queue.popleft() for _ in range(len(queue))]
                self._run(self._written(partial(_all_of, batch)))
            finally:
                recorder.release()

    def metrics(
        self, keep: int = 1_000
    ) -> tuple[list[tuple[str, str, int, float]], dict[str, list[tuple[Any, ...]]]]:
        """All that `record` counted: (model, outcome, count, cost), and samples by model."""

        def work(
            db: sqlite3.Connection,
        ) -> tuple[list[tuple[str, str, int, float]], dict[str, list[tuple[Any, ...]]]]:
            totals = db.execute(
                "SELECT model, outcome, count, cost_usd FROM totals ORDER BY model, outcome"
            ).fetchall()
            samples = {
                model: db.execute(
                    "SELECT seconds, first_s, tokens FROM samples WHERE model=? "
                    "ORDER BY id DESC LIMIT ?",
                    (model, keep),
                ).fetchall()
                for model in {row[0] for row in totals}
            }
            return totals, samples

        return self._run(work)

    def reset_metrics(self, models: Sequence[str] | None = None) -> None:
        """Forget what `record` counted, of some models or of all."""

        def work(db: sqlite3.Connection) -> None:
            for table in ("totals", "samples"):
                if models is None:
                    db.execute(f"DELETE FROM {table}")
                else:
                    rows = [(name,) for name in models]
                    db.executemany(f"DELETE FROM {table} WHERE model=?", rows)

        self._run(self._written(work))

    def cache_put(self, key: str, body: str, now: float, most: int) -> None:
        """Keep a reply as JSON text; the oldest go when there are more than `most`."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO replies VALUES (?,?,?)", (key, now, body))
            db.execute(
                "DELETE FROM replies WHERE key IN "
                "(SELECT key FROM replies ORDER BY at_s DESC LIMIT -1 OFFSET ?)",
                (most,),
            )

        self._run(self._written(work))

    def cache_get(self, key: str, now: float, ttl_s: float) -> str | None:
        """The kept reply, if it is not too old; counts whether there was one."""

        def work(db: sqlite3.Connection) -> str | None:
            row = db.execute(
                "SELECT body FROM replies WHERE key=? AND at_s BETWEEN ? AND ?",
                (key, now - ttl_s, now),
            ).fetchone()
            db.execute(
                "INSERT INTO counters VALUES (?,1) ON CONFLICT DO UPDATE SET count = count + 1",
                ("hits" if row else "misses",),
            )
            return row[0] if row else None

        return self._run(self._written(work))

    def cache_stats(self, now: float, ttl_s: float) -> dict[str, int]:
        """Entries (and how many are still fresh), bytes, hits and misses of kept replies."""

        def work(db: sqlite3.Connection) -> dict[str, int]:
            entries, size = db.execute(
                "SELECT COUNT(*), COALESCE(SUM(LENGTH(CAST(body AS BLOB))), 0) FROM replies"
            ).fetchone()
            (fresh,) = db.execute(
                "SELECT COUNT(*) FROM replies WHERE at_s >= ?", (now - ttl_s,)
            ).fetchone()
            counts = dict(db.execute("SELECT name, count FROM counters").fetchall())
            hits, misses = counts.get("hits", 0), counts.get("misses", 0)
            found = {"entries": entries, "fresh": fresh, "bytes": size}
            return {**found, "hits": hits, "misses": misses}

        return self._run(work)

    def cache_clear(self) -> int:
        """Forget all kept replies and their counts; how many replies there were."""

        def work(db: sqlite3.Connection) -> int:
            db.execute("DELETE FROM counters")
            return db.execute("DELETE FROM replies").rowcount

        return self._run(self._written(work))

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._db is not None and self._pid == os.getpid():
                self._db.close()
            self._db = None

    def _run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do the work on the open file; when the file is broken, once more in memory.

        A file that is busy is not broken: somebody else is just making or using it.
        """
        import sqlite3

        with self._lock:
            until = time.monotonic() + _BUSY_S
            while True:
                try:
                    return work(self._open())
                except (sqlite3.Error, OSError) as error:
                    if self.path == ":memory:":
                        raise
                    if _is_busy(error) and time.monotonic() < until:
                        time.sleep(0.01)
                        continue
                    _log.warning(
                        "%s cannot be used (%s): cooldowns and figures are kept in memory. "
                        "Deleting the file is safe.",
                        self.path,
                        error,
                    )
                    self.close()
                    self.path = ":memory:"

    @staticmethod
    def _written(work: Callable[[sqlite3.Connection], _T]) -> Callable[[sqlite3.Connection], _T]:
        """The same work as one transaction, so that other processes see all of it or nothing."""

        def transaction(db: sqlite3.Connection) -> _T:
            try:
                # In here, for a Ctrl-C may come right behind it.
                db.execute("BEGIN IMMEDIATE")
                result = work(db)
                db.execute("COMMIT")
                return result
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

        return transaction

    def _open(self) -> sqlite3.Connection:
        import sqlite3
        from pathlib import Path

        if self._db is not None and self._pid == os.getpid():
            return self._db
        if self.path != ":memory:":
            Path(self.path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # else the umask rules
        db = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.executescript(self._TABLES)
        self._db, self._pid, self._kept_rests = db, os.getpid(), None
        return db


# ======================================================================================
# 6. messages · uses: errors, values. No I/O: bytes and dicts in, values out
# ======================================================================================
Messages = list[JSON]
Prompt = str | Sequence[Mapping[str, Any]]
Image = str | bytes | os.PathLike[str]
File = str | bytes | os.PathLike[str] | tuple[str, bytes]

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_ROLES["tool"] = "tool"
# What replies carry and providers refuse to take back.
_REPLY_ONLY_KEYS = frozenset(
    ("tool_calls", "reasoning", "reasoning_content", "reasoning_details", "refusal", "audio")
    + ("annotations", "function_call")
)
_NO_OUTPUT = "(no output)"  # a tool's result may be empty, but Puter refuses an empty content
_IMAGE_KINDS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a request asks of a model: tools, kinds of input, and room for so many tokens."""

    tools: bool = False
    inputs: frozenset[str] = frozenset()
    context: int = 0


def messages_from(
    prompt: Prompt, system: str | None = None, extra_parts: Sequence[JSON] = ()
) -> Messages:
    """A prompt as new messages in OpenAI's shape; the caller's own list is never changed.

    `extra_parts` (images, files) join the last user message. Raises `BadRequestError`.
    """
    if isinstance(prompt, str):
        messages: Messages = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
        messages = [_checked_message(m, i) for i, m in enumerate(prompt)]
    else:
        raise BadRequestError(
            f"The prompt is {_describe(prompt)}",
            hint='Pass a text, or a list such as [{"role": "user", "content": "Hi"}].',
        )
    if extra_parts:
        asked = next((m for m in reversed(messages) if m["role"] == "user"), None)
        if asked is None:
            messages.append({"role": "user", "content": list(extra_parts)})
        else:
            asked["content"] = [*_parts(asked.get("content")), *extra_parts]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _checked_message(message: Any, index: int) -> JSON:
    """A shallow copy of one message; raises `BadRequestError` that names its place."""
    where = f"messages[{index}]"
    if type(message) is not dict and not isinstance(message, Mapping):
        raise BadRequestError(
            f"{where} is {_describe(message)}, not an object",
            hint='Write {"role": "user", "content": "…"}.',
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRequestError(
            f"{where}.role is {_describe(role)}",
            hint="Roles are system, developer, user, assistant and tool.",
        )
    content = message.get("content")
    if not isinstance(content, (str, list, tuple, type(None))):
        raise BadRequestError(
            f"{where}.content is {_describe(content)}",
            hint="Give a text, a list of parts, or null.",
        )
    for number, part in enumerate(content if isinstance(content, (list, tuple)) else ()):
        _check_part(part, f"{where}.content[{number}]")
    calls = message.get("tool_calls")
    if not isinstance(calls, (list, tuple, type(None))):
        raise BadRequestError(
            f"{where}.tool_calls is {_describe(calls)}", hint="Give a list of calls."
        )
    if role == "tool" and not _is_text(message.get("tool_call_id")):
        raise BadRequestError(
            f"{where} has no tool_call_id", hint="Say which call this is the result of."
        )
    return dict(message)


def _check_part(part: Any, where: str) -> None:
    """Raise `BadRequestError` for a part of a message that nobody can read."""
    if isinstance(part, str):
        return
    if not isinstance(part, Mapping):
        raise BadRequestError(
            f"{where} is {_describe(part)}, not an object",
            hint='Write {"type": "text", "text": "…"}.',
        )
    kind, text = part.get("type"), part.get("text")
    if kind == "input_audio":
        raise BadRequestError(
            f"{where} is audio, which Puter's chat does not take", hint="Send its text."
        )
    if kind == "text" and not isinstance(text, (str, type(None))):
        raise BadRequestError(
            f"{where}.text is {_describe(text)}, not a text", hint="Write it as a text."
        )
    if kind == "tool_use":
        fine = _is_text(part.get("id")) and _is_text(part.get("name"))
        if not fine or not isinstance(part.get("input", {}), Mapping):
            raise BadRequestError(
                f"{where} lacks an id, a name, or an object as input",
                hint='Write {"type": "tool_use", "id": "…", "name": "…", "input": {}}.',
            )


def _parts(content: Any) -> list[JSON]:
    """A content as a list of parts that hold something."""
    if content is None or content == "":
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = [{"type": "text", "text": p} if isinstance(p, str) else dict(p) for p in content]
    return [p for p in parts if p.get("type") != "text" or p.get("text")]


def wire_messages(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """A history in the one form that arrives right at every provider (recorded).

    A text is a message of its own; then each call is an assistant message of one `tool_use`
    part, followed at once by its result. Messages without content are left out. Raises
    `BadRequestError` for what no provider can take.
    """
    return _wired([_checked_message(m, i) for i, m in enumerate(messages)])


def _wired(messages: Messages) -> Messages:
    """As `wire_messages`, for messages that were checked, and are copies."""
    groups: list[Messages] = []  # one a message or call, so that a late result finds its call
    waiting: dict[str, deque[Messages]] = {}
    for index, message in enumerate(messages):
        message["role"] = _ROLES[message["role"]]
        if message["role"] == "assistant":
            groups.extend(_assistant_groups(message, index, waiting))
        elif message["role"] == "tool":
            wire = _plain(message, _text_of(message.get("content")) or _NO_OUTPUT)
            calls = waiting.get(message["tool_call_id"])
            if calls:
                calls.popleft().append(wire)
            else:
                groups.append([wire])
        elif parts := _parts(message.get("content")):
            content = message["content"] if isinstance(message["content"], str) else parts
            groups.append([_plain(message, content)])
    wired = [message for group in groups for message in group]
    if not wired:
        raise BadRequestError(
            "There is nothing to send: no message has a content", hint="Ask something."
        )
    return wired


def _plain(message: JSON, content: Any) -> JSON:
    """The message with this content and without what only replies carry."""
    kept = {k: v for k, v in message.items() if k not in _REPLY_ONLY_KEYS and v is not None}
    return {**kept, "content": content}


def _text_of(content: Any) -> Any:
    """A tool result's content: its texts as one; parts that are no text are kept as parts."""
    parts = _parts(content)
    if isinstance(content, str) or any(p.get("type") != "text" for p in parts):
        return content if isinstance(content, str) else parts
    return "\n".join(p["text"] for p in parts)


def _assistant_groups(
    message: JSON, index: int, waiting: dict[str, deque[Messages]]
) -> list[Messages]:
    """An assistant's turn as groups: its text, then each call; notes who waits for a result."""
    parts = _parts(message.get("content"))
    calls = [{"input": {}, **p} for p in parts if p.get("type") == "tool_use"]
    calls += [_tool_use(call, index, n) for n, call in enumerate(message.get("tool_calls") or ())]
    spoken = [p for p in parts if p.get("type") != "tool_use"]
    text: Any = message["content"] if isinstance(message.get("content"), str) else spoken
    if any(call.get("extra_content") for call in calls):
        groups = _signed_turn(message, spoken, calls)
        waiters = groups[-1:] * len(calls)
    else:
        groups = [[{"role": "assistant", "content": [call]}] for call in calls]
        waiters = list(groups)
        if spoken:
            groups.insert(0, [_plain(message, text)])
    for call in calls:
        waiting[call["id"]] = deque()  # an id used again belongs to the newest turn
    for call, group in zip(calls, waiters, strict=True):
        waiting[call["id"]].append(group)
    return groups


def _signed_turn(message: JSON, spoken: list[JSON], calls: list[JSON]) -> list[Messages]:
    """Calls with a provider's signature, which must stay together in one message.

    With text beside them OpenAI's own shape arrives right; without, parts arrive reversed
    (recorded), so they are sent in reverse.
    """
    text = "\n".join(p["text"] for p in spoken if p.get("type") == "text")
    if not text.strip():
        before = [[_plain(message, spoken)]] if any(p.get("type") != "text" for p in spoken) else []
        return [*before, [{"role": "assistant", "content": calls[::-1]}]]
    openai_calls = [openai_call(call) for call in calls]
    return [[_plain(message, text) | {"tool_calls": openai_calls}]]


def openai_call(use: Mapping[str, Any]) -> JSON:
    """A `tool_use` part as one of OpenAI's `tool_calls`."""
    signed = {"extra_content": use["extra_content"]} if use.get("extra_content") else {}
    function = {"name": use["name"], "arguments": json.dumps(use["input"])}
    return {"id": use["id"], "type": "function", "function": function, **signed}


def _tool_use(call: Any, index: int, number: int) -> JSON:
    """One of OpenAI's `tool_calls` as a `tool_use` part; raises `BadRequestError`."""
    where = f"messages[{index}].tool_calls[{number}]"
    function = call.get("function") if isinstance(call, Mapping) else None
    named = isinstance(function, Mapping) and _is_text(function.get("name"))
    if not isinstance(function, Mapping) or not named or not _is_text(call.get("id")):
        raise BadRequestError(
            f"{where} lacks an id or a function name",
            hint='Write {"id": "…", "type": "function", "function": {"name": "…", "arguments": "{}"}}.',
        )
    try:
        arguments = _arguments(function.get("arguments"))
    except (ValueError, TypeError) as error:
        raise BadRequestError(
            f"{where}.function.arguments is not a JSON object ({error})",
            hint="Send the arguments as the model gave them.",
        ) from None
    part: JSON = {
        "type": "tool_use",
        "id": call["id"],
        "name": function["name"],
        "input": arguments,
    }
    if call.get("extra_content"):
        part["extra_content"] = call["extra_content"]
    return part


def _arguments(value: Any) -> JSON:
    """A call's arguments as a dict; raises ValueError or TypeError."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}  # a function without parameters
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except RecursionError:
            raise ValueError("nested too deeply") from None
    if not isinstance(value, Mapping):
        raise TypeError("not an object")
    return dict(value)


def needs_of(messages: Sequence[Mapping[str, Any]], tools: Any = None) -> Needs:
    """What a request asks of a model; the context is a low guess of four characters a token."""
    kinds, characters = set(), 0
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ({"text": content},):
            characters += len(part.get("text") or "")
            if part.get("type") == "image_url":
                kinds.add("image")
            elif part.get("type") == "file" and _is_pdf(part):
                kinds.add("pdf")
    return Needs(bool(tools), frozenset(kinds), characters // 4)


def image_part(image: Image) -> JSON:
    """An image as a part of a message: a path or bytes become a data URL, a URL stays.

    Raises `BadRequestError` when there is no such file, or it is no PNG, JPEG, GIF or WebP.
    """
    if isinstance(image, str) and re.match(r"https?://", image, re.IGNORECASE):
        return {"type": "image_url", "image_url": {"url": image}}
    if isinstance(image, str) and image[:5].lower() == "data:":
        whole = r"data:image/[\w.+-]+;base64,[A-Za-z0-9+/=\s]+"
        if not re.fullmatch(whole, image, re.IGNORECASE):
            raise BadRequestError(
                f"The image {image[:40]!r}… is no base64 data URL of an image",
                hint="Pass a path, bytes, or data:image/png;base64,….",
            )
        return {"type": "image_url", "image_url": {"url": image}}
    data, name = _bytes_of(image, "image")
    kind = image_kind(data)
    if kind is None:
        raise BadRequestError(
            f"{name} is no image that models can see ({len(data)} bytes)",
            hint="Use PNG, JPEG, GIF or WebP.",
        )
    return {"type": "image_url", "image_url": {"url": _data_url(kind, data)}}


def file_part(file: File) -> JSON:
    """A document as a part of a message, in OpenAI's shape: its name and a data URL.

    `file` is a path, bytes, or (name, bytes). Raises `BadRequestError` when it cannot be
    read, is empty, or is larger than `MAX_FILE_BYTES`.
    """
    import mimetypes

    if isinstance(file, tuple):
        name, data = file
    else:
        data, name = _bytes_of(file, "file")
        name = "document.pdf" if isinstance(file, (bytes, bytearray)) else name
    name = re.split(r"[/\\]", name)[-1] or "document"
    if not data or len(data) > MAX_FILE_BYTES:
        raise BadRequestError(
            f"The file {name!r} is {len(data):,} bytes; nothing was sent",
            hint=f"A file may be 1 to {MAX_FILE_BYTES:,} bytes.",
        )
    kind = "application/pdf" if data[:5] == b"%PDF-" else mimetypes.guess_type(name)[0]
    url = _data_url(kind or "application/octet-stream", data)
    return {"type": "file", "file": {"filename": name, "file_data": url}}


def _data_url(kind: str, data: bytes) -> str:
    import base64

    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _is_pdf(part: Mapping[str, Any]) -> bool:
    given = part.get("file")
    if isinstance(given, Mapping):
        return "pdf" in str(given.get("file_data"))[:30]
    return str(part.get("puter_path")).lower().endswith(".pdf")


def file_of(part: Mapping[str, Any], where: str = "the file") -> tuple[str, bytes, str]:
    """(name, bytes, MIME type) of a part made by `file_part` or an OpenAI client.

    Raises `BadRequestError` when it holds no file.
    """
    import base64

    given = part.get("file")
    data = given.get("file_data") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(data, str):
        raise BadRequestError(
            f"{where} has no file_data", hint="Send the file itself, as a data URL."
        )
    head, _, encoded = data.rpartition(",")
    kind = re.match(r"data:([\w.+/-]+)", head)
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise BadRequestError(
            f"{where} has a file_data that is no base64 ({error})",
            hint="Write data:application/pdf;base64,….",
        ) from None
    mime = kind.group(1) if kind else "application/octet-stream"
    name = str(given.get("filename") or "document.pdf")
    name = name.encode("utf-8", "replace").decode("utf-8")
    return re.split(r"[/\\]", name)[-1] or "document.pdf", content, mime


def _bytes_of(source: Image, what: str) -> tuple[bytes, str]:
    """(contents, name for messages) of a path or bytes; raises `BadRequestError`."""
    from pathlib import Path

    if isinstance(source, (bytes, bytearray)):
        return bytes(source), f"the {what} given as bytes"
    try:
        path = Path(source)
        path = path if path.exists() else path.expanduser()
        return path.read_bytes(), str(path)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadRequestError(
            f"The {what} {str(source)[:200]!r} cannot be read ({reason})",
            hint="Check the path; nothing was sent.",
        ) from error


def image_kind(data: bytes) -> str | None:
    """The MIME type of an image by its first bytes, or None if it is none we know."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for magic, kind in _IMAGE_KINDS if data.startswith(magic)), None)


def tool_schemas(tools: Sequence[Any] | None) -> list[JSON]:
    """Tools as OpenAI's list of function schemas; raises `BadRequestError`."""
    if not isinstance(tools, (list, tuple, type(None))):
        raise BadRequestError(
            f"tools is {_describe(tools)}, not a list", hint="Write tools=[function]."
        )
    return [_tool_schema(tool, index) for index, tool in enumerate(tools or ())]


def _tool_schema(tool: Any, index: int) -> JSON:
    if isinstance(tool, Mapping) and tool.get("type", "function") == "function":
        function = tool.get("function")
        if function is None:  # the function alone, under OpenAI's, Anthropic's or MCP's names
            function = {k: v for k, v in tool.items() if k != "type"}
            for other in ("input_schema", "inputSchema"):
                if other in function:
                    function["parameters"] = function.pop(other)
        if isinstance(function, Mapping) and _is_text(function.get("name")):
            return {"type": "function", "function": dict(function)}
    if callable(tool):
        return function_schema(tool)
    raise BadRequestError(
        f"tools[{index}] is {_describe(tool)}, not a function or its schema",
        hint='Write {"type": "function", "function": {"name": "…", "parameters": {…}}}.',
    )


def function_schema(function: Callable[..., Any]) -> JSON:
    """A Python function as OpenAI's schema, from its signature, type hints and docstring.

    Raises `BadRequestError` for a parameter without a hint, or of a type that JSON lacks, and
    for what has no name or must be awaited.
    """
    import inspect

    name = getattr(function, "__name__", None)
    if not isinstance(name, str) or inspect.iscoroutinefunction(function):
        raise BadRequestError(
            f"{_describe(function)} has no name, or must be awaited",
            hint="Wrap it in an ordinary function (def) with type hints.",
        )
    text, about = _docstring_parts(inspect.getdoc(function) or "")
    properties: JSON = {}
    required = []
    for parameter_name, (hint, parameter) in _parameters(function).items():
        shape = hint_schema(hint, f"{name}({parameter_name})")
        if about.get(parameter_name):
            shape.setdefault("description", about[parameter_name])
        if parameter.default is parameter.empty:
            required.append(parameter_name)
        elif isinstance(parameter.default, (str, int, float, bool)):
            shape["default"] = parameter.default
        properties[parameter_name] = shape
    schema: JSON = {"type": "object", "properties": properties, "required": required}
    schema["additionalProperties"] = False
    described = {"description": text} if text else {}
    return {"type": "function", "function": {"name": name, **described, "parameters": schema}}


def _parameters(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """A function's parameters with their resolved hints; raises `BadRequestError`."""
    import inspect
    import typing

    name = getattr(function, "__name__", repr(function))
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
    except (NameError, TypeError, ValueError) as error:
        raise BadRequestError(
            f"The type hints of {name} cannot be read ({error})",
            hint="Give each parameter a hint whose names are known where it is defined.",
        ) from error
    found = {}
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise BadRequestError(
                f"{name} takes {parameter}, which a model cannot name",
                hint="Use ordinary parameters.",
            )
        if parameter.name not in hints or parameter.kind is parameter.VAR_KEYWORD:
            raise BadRequestError(
                f"{name}: the parameter {parameter} has no type hint of its own",
                hint="Write it as city: str.",
            )
        found[parameter.name] = (hints[parameter.name], parameter)
    return found


_PLAIN_HINTS = {str: "string", int: "integer", float: "number", bool: "boolean"}


_LISTS = (list, tuple, set, frozenset, Sequence, Iterable)


def hint_schema(hint: Any, where: str = "the hint", outer: tuple[Any, ...] = ()) -> JSON:
    """A type hint as a JSON schema; raises `BadRequestError` for what JSON cannot say."""
    import typing

    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        text = next((a for a in inner[1:] if isinstance(a, str)), None)
        shape = hint_schema(inner[0], where, outer)
        return {**shape, **({"description": text} if text else {})}
    if _is_marked(origin):
        return hint_schema(inner[0], where, outer)
    if isinstance(hint, type) and hint in _PLAIN_HINTS:
        return {"type": _PLAIN_HINTS[hint]}
    if hint is Any:
        return {}
    if hint in (None, type(None)):
        return {"type": "null"}
    if origin is Literal:
        return {"enum": list(inner)}
    if _is_enum(hint):
        return {"enum": [member.value for member in hint]}
    if _is_union(origin):
        return {"anyOf": [hint_schema(h, where, outer) for h in inner]}
    if hint in _LISTS or origin in _LISTS:
        if (hint is tuple or origin is tuple) and inner and Ellipsis not in inner:
            shapes = [hint_schema(h, where, outer) for h in inner]
            return {"type": "array", "prefixItems": shapes, "minItems": len(inner), "items": False}
        item = {"items": hint_schema(inner[0], where, outer)} if inner else {}
        return {"type": "array", **item}
    if hint is dict or origin in (dict, Mapping):
        values = hint_schema(inner[1], where, outer) if inner else None
        return {"type": "object", **({"additionalProperties": values} if inner else {})}
    parts = _parts_of_hint(hint)
    if parts is None or hint in outer:
        raise BadRequestError(
            f"{where} is of type {hint!r}, which a model cannot give",
            hint="Use str, int, float, bool, list, dict, Literal, Enum, a dataclass or "
            "TypedDict (not one that holds its like).",
        )
    hints, required = parts
    return {
        "type": "object",
        "properties": {n: hint_schema(h, f"{where}.{n}", (*outer, hint)) for n, h in hints.items()},
        "required": required,
        "additionalProperties": False,
    }


def _parts_of_hint(hint: Any) -> tuple[dict[str, Any], list[str]] | None:
    """(fields with their hints, those that must be given) of a dataclass or TypedDict."""
    import typing
    from dataclasses import MISSING, is_dataclass

    if typing.is_typeddict(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        return hints, [name for name in hints if name in hint.__required_keys__]
    if is_dataclass(hint):
        known = typing.get_type_hints(hint, include_extras=True)
        given = [f for f in fields(hint) if f.init]
        bare = [f for f in given if f.default is MISSING and f.default_factory is MISSING]
        return {f.name: known[f.name] for f in given}, [f.name for f in bare]
    return None


def _is_marked(origin: Any) -> bool:
    """Whether it is Required or NotRequired (of typing since 3.11, or its extensions)."""
    return getattr(origin, "_name", "") in ("Required", "NotRequired")


def _is_enum(hint: Any) -> bool:
    import enum

    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _is_union(origin: Any) -> bool:
    import types
    import typing

    return origin in (typing.Union, getattr(types, "UnionType", typing.Union))


def _docstring_parts(doc: str) -> tuple[str, dict[str, str]]:
    """(what stands before the parameters, text of each) of a Google- or Sphinx-style docstring."""
    head: list[str] = []
    about: dict[str, str] = {}
    section, indent, name = "head", "", ""
    for row in doc.splitlines():
        titled = re.match(r"(\w+):\s*$", row)
        sphinx = re.match(r":(\w+)(?: [^:]*?(\w+))?: *(.*)", row)
        if titled and titled.group(1) in _DOC_SECTIONS:
            section, indent = _DOC_SECTIONS[titled.group(1)], ""
        elif sphinx:
            section = "sphinx" if sphinx.group(1) == "param" else "other"
            name = sphinx.group(2) or ""
            if section == "sphinx":
                about[name] = sphinx.group(3).strip()
        elif section == "head":
            head.append(row.strip())
        elif section in ("args", "sphinx") and row.strip():
            indent = indent or row[: len(row) - len(row.lstrip())]
            entry = re.match(rf"{indent}(\w+)(?: *\([^)]*\))?: *(.*)", row)
            if section == "args" and entry:
                name, about[entry.group(1)] = entry.group(1), entry.group(2).strip()
            elif name in about:
                about[name] = f"{about[name]} {row.strip()}".strip()
    return " ".join(" ".join(head).split()), about


_DOC_SECTIONS = dict.fromkeys(("Args", "Arguments", "Parameters"), "args")
_DOC_SECTIONS |= dict.fromkeys(("Returns", "Raises", "Yields", "Example", "Examples"), "other")
_DOC_SECTIONS |= dict.fromkeys(("Note", "Notes", "Attributes"), "other")


def call_function(function: Callable[..., Any], arguments: JSON) -> Any:
    """Call a function with a model's arguments, checked and made what its hints say.

    Raises TypeError or ValueError, in words for the model, when they do not fit.
    """
    parameters = _parameters(function)
    unknown = [name for name in arguments if name not in parameters]
    if unknown:
        raise TypeError(f"there is no parameter {unknown[0]!r}; there are {list(parameters)}")
    missing = [
        name
        for name, (_, parameter) in parameters.items()
        if name not in arguments and parameter.default is parameter.empty
    ]
    if missing:
        raise TypeError(f"the parameter {missing[0]!r} is missing")
    given = {n: coerce(v, parameters[n][0], n) for n, v in arguments.items()}
    return function(**given)


def coerce(value: Any, hint: Any, where: str) -> Any:
    """The value as the hint wants it (an Enum member, a dataclass…); raises TypeError."""
    import typing

    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    wrong = TypeError(f"{where} is {_describe(value)}, but must be {_hint_name(hint)}")
    if origin is typing.Annotated or _is_marked(origin):
        return coerce(value, inner[0], where)
    if hint is Any or (value is None and hint in (None, type(None))):
        return value
    if hint in _PLAIN_HINTS:
        return _plain_fit(value, hint, wrong)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in inner):
            raise wrong
        return value
    if _is_enum(hint):
        try:
            return hint(value)
        except ValueError:
            raise wrong from None
    if _is_union(origin):
        return _first_fit(value, inner, where, wrong)
    kind = origin or hint
    if kind in _LISTS:
        return _list_fit(value, kind, inner, where, wrong)
    if not isinstance(value, dict):
        raise wrong
    if kind in (dict, Mapping):
        if not inner:
            return value
        keys = {k: _key_fit(k, inner[0], where) for k in value}
        return {keys[k]: coerce(v, inner[1], f"{where}.{k}") for k, v in value.items()}
    hints, required = _parts_of_hint(hint) or ({}, [])
    stray = [key for key in value if key not in hints]
    lacking = [key for key in required if key not in value]
    if stray or lacking:
        what = f"has no place for {stray}" if stray else f"lacks {lacking}"
        raise TypeError(f"{where} {what}")
    made = {k: coerce(v, hints[k], f"{where}.{k}") for k, v in value.items()}
    return made if typing.is_typeddict(hint) else hint(**made)


def _plain_fit(value: Any, hint: type, wrong: TypeError) -> Any:
    """A text, number or boolean; JSON has one kind of number, so 2.0 is a whole one."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number:
        return float(value)
    if hint is int and is_number and float(value).is_integer():
        return int(value)
    if hint in (str, bool) and type(value) is hint:
        return value
    raise wrong


def _list_fit(value: Any, kind: Any, inner: Sequence[Any], where: str, wrong: TypeError) -> Any:
    if not isinstance(value, list):
        raise wrong
    hints = list(inner[:1] or (Any,)) * len(value)
    if kind is tuple and inner and Ellipsis not in inner:
        if len(value) != len(inner):
            raise wrong
        hints = list(inner)
    made = [
        coerce(v, h, f"{where}[{i}]") for i, (v, h) in enumerate(zip(value, hints, strict=True))
    ]
    return kind(made) if kind in (tuple, set, frozenset) else made


def _key_fit(key: str, hint: Any, where: str) -> Any:
    """A key of an object, which JSON knows as text alone, as the hint wants it."""
    if hint in (int, float):
        try:
            return hint(key)
        except ValueError:
            raise TypeError(f"{where} has the key {key!r}, which is no number") from None
    return coerce(key, hint, f"a key of {where}")


def _first_fit(value: Any, hints: Sequence[Any], where: str, wrong: TypeError) -> Any:
    for hint in hints:
        try:
            return coerce(value, hint, where)
        except TypeError:
            continue
    raise wrong


def _hint_name(hint: Any) -> str:
    return json.dumps(hint_schema(hint)) if not isinstance(hint, type) else hint.__name__


def tool_result_text(value: Any) -> str:
    """What a function returned, as the text that goes to the model."""
    if isinstance(value, str):
        return value or _NO_OUTPUT
    if value is None:
        return _NO_OUTPUT
    return json.dumps(value, default=_json_value, ensure_ascii=False)


def _json_value(value: Any) -> Any:
    """What JSON does not know, in terms that it does."""
    from dataclasses import asdict, is_dataclass

    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if _is_enum(type(value)):
        return value.value
    return list(value) if isinstance(value, (set, frozenset)) else str(value)


# Names of the same figure: OpenRouter, OpenAI and most others, Claude (recorded).
_INPUT_KEYS = ("prompt_tokens", "input_tokens", "prompt")
_OUTPUT_KEYS = ("completion_tokens", "output_tokens", "completion")
_CACHED_KEYS = ("cached_tokens", "cache_read_input_tokens", "input_cache_read")


def usage_from(given: Any) -> Usage:
    """A provider's usage object, under any of the three families of names, as a `Usage`."""
    if not isinstance(given, Mapping):
        return Usage()

    def first(keys: Iterable[str], source: Mapping[str, Any] = given) -> int | None:
        found = (source.get(k) for k in keys)
        # What is beyond belief (and beyond SQLite) is not told, either.
        return next((int(v) for v in found if _is_number(v) and abs(v) < 2**53), None)

    inputs, outputs, cached = (first(_INPUT_KEYS), first(_OUTPUT_KEYS), first(_CACHED_KEYS))
    if cached is None and isinstance(given.get("prompt_tokens_details"), Mapping):
        cached = first(("cached_tokens",), given["prompt_tokens_details"])
    total = first(("total_tokens",))
    if total is None and (inputs is not None or outputs is not None):
        # OpenRouter and Claude count cached tokens beside the input, the others within it.
        beside = (cached or 0) if "prompt_tokens" not in given else 0
        beside += first(("cache_creation_input_tokens",)) or 0
        total = (inputs or 0) + (outputs or 0) + beside
    cents: Any = given.get("usd_cents")
    cost = round(cents / 100, 12) if _is_number(cents) else given.get("cost_usd")
    return Usage(inputs, outputs, cached, total, cost if _is_number(cost) else None)


_FINISH_REASONS = {
    **dict.fromkeys(("end_turn", "stop_sequence", "eos", "eos_token", "stop"), "stop"),
    **dict.fromkeys(("tool_use", "function_call", "tool_calls"), "tool_calls"),
    **dict.fromkeys(("max_tokens", "max_output_tokens", "length"), "length"),
    **dict.fromkeys(("safety", "content_filter", "recitation"), "content_filter"),
}


def _finish_reason(given: Any, calls: Sequence[ToolCall]) -> str:
    """The provider's word in OpenAI's terms; calls are calls whatever it says."""
    told = given.strip() if isinstance(given, str) else ""
    reason = _FINISH_REASONS.get(told.lower(), told) or "stop"
    return "tool_calls" if calls and reason == "stop" else reason


def _tool_call(call_id: Any, name: Any, arguments: Any, extra: Any) -> ToolCall:
    """A call of either shape; raises `ReplyError` with the raw text of broken arguments."""
    try:
        given = _arguments(arguments)
    except (ValueError, TypeError) as error:
        raw = arguments if isinstance(arguments, str) else json.dumps(arguments)
        raise ReplyError(
            f"The model called {name!r} with arguments that are not a JSON object ({error}): "
            f"{raw[:200]!r}",
            raw=raw,
        ) from None
    return ToolCall(str(call_id or ""), str(name or ""), given, extra or None)


def _calls_of(message: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """A reply's tool calls, in OpenAI's shape or as Anthropic's parts."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        calls.append(
            _tool_call(
                call.get("id"),
                function.get("name"),
                function.get("arguments"),
                call.get("extra_content"),
            )
        )
    for part in message["content"] if isinstance(message.get("content"), list) else ():
        if part.get("type") == "tool_use":
            calls.append(
                _tool_call(
                    part.get("id"), part.get("name"), part.get("input"), part.get("extra_content")
                )
            )
    return tuple(calls)


def _told(content: Any, kind: str, key: str) -> str:
    """The texts of the parts of one kind, joined."""
    if isinstance(content, str):
        return content if kind == "text" else ""
    parts = content if isinstance(content, list) else ()
    return "".join(str(p.get(key) or "") for p in parts if p.get("type") == kind)


def reply_from(choice: Mapping[str, Any], usage: Any, model: str, raw: JSON) -> Reply:
    """A reply from a message with its finish reason, in OpenAI's or Anthropic's shape.

    Raises `ReplyError` when it is no such thing.
    """
    message = choice.get("message")
    if not isinstance(message, Mapping):
        raise ReplyError("The reply has no message", raw=json.dumps(raw)[:2_000])
    content = message.get("content")
    try:
        calls = _calls_of(message)
        text = _told(content, "text", "text")
        thought = _told(content, "thinking", "thinking")
    except (TypeError, AttributeError, KeyError) as error:
        raise ReplyError(
            f"The reply is in no form that we know ({error})", raw=json.dumps(raw)[:2_000]
        ) from error
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    return Reply(
        text=text,
        reasoning=reasoning if isinstance(reasoning, str) else thought,
        tool_calls=calls,
        finish_reason=_finish_reason(
            choice.get("finish_reason") or message.get("stop_reason"), calls
        ),
        usage=usage_from(usage),
        model=model,
        raw=raw,
    )


_FAKE_MODELS = ("fake", "costly", "abuse")  # the server's own, for trying things


def reply_from_driver(body: JSON, model: str) -> Reply:
    """The answer of `/drivers/call` as a `Reply`; raises `BadRequestError` for a blocked prompt.

    Puter answers a blocked prompt with its built-in fake model's lorem ipsum and HTTP 200:
    then another model than the asked one answered, and it says "fake-chat".
    """
    result, metadata = body.get("result"), body.get("metadata") or {}
    if not isinstance(result, Mapping) or not isinstance(metadata, Mapping):
        raise ReplyError("The reply has no result", raw=json.dumps(body)[:2_000], model=model)
    answered = metadata.get("providerUsed")
    is_fake = metadata.get("service_used") == "fake-chat"
    if is_fake and model not in _FAKE_MODELS:
        raise BadRequestError(
            f"Puter blocked this prompt to {model}: it answered with made-up text",
            code="prompt_blocked",
            model=model,
            hint="Word the prompt differently.",
        )
    return reply_from(result, result.get("usage"), str(answered or model), body)


def reply_from_openai(body: JSON, model: str) -> Reply:
    """A `chat.completion` object as a `Reply`; raises `ReplyError`."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise ReplyError("The reply has no choices", raw=json.dumps(body)[:2_000], model=model)
    return reply_from(choices[0], body.get("usage"), str(body.get("model") or model), body)


def chunks_of(reply: Reply) -> list[Chunk]:
    """A whole reply as the chunks that a stream of it would have had."""
    chunks = [Chunk("reasoning", reply.reasoning)] if reply.reasoning else []
    chunks += [Chunk("text", reply.text)] if reply.text else []
    chunks += [Chunk("tool_call", tool_call=call) for call in reply.tool_calls]
    return [*chunks, Chunk("usage", usage=reply.usage)]


def call_object(call: ToolCall) -> JSON:
    """A tool call in OpenAI's shape; a call needs an id, so a missing one is made."""
    call_id = call.id or f"call_{os.urandom(8).hex()}"
    use = {"id": call_id, "name": call.name, "input": call.arguments}
    return openai_call({**use, "extra_content": call.extra_content})


def message_from(reply: Reply) -> JSON:
    """A reply as the assistant's message that goes back with the history."""
    message: JSON = {"role": "assistant", "content": reply.text or None}
    if reply.tool_calls:
        message["tool_calls"] = [call_object(call) for call in reply.tool_calls]
    return message


def reply_to_json(reply: Reply) -> JSON:
    """A reply as plain values, without its attempts."""
    calls = [as_dict(call) for call in reply.tool_calls]
    kept = ("text", "reasoning", "finish_reason", "model", "account")
    told = {name: getattr(reply, name) for name in kept}
    return {**told, "tool_calls": calls, "usage": as_dict(reply.usage)}


def reply_from_json(data: JSON) -> Reply:
    """The reply that `reply_to_json` wrote."""
    calls = tuple(ToolCall(**call) for call in data["tool_calls"])
    return Reply(**{**data, "tool_calls": calls, "usage": Usage(**data["usage"])})


class _Text:
    """A text that grows by small pieces; full blocks of it are packed, so that a long one
    takes little room until somebody wants it whole."""

    _BLOCK = 8_192  # pieces

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._blocks: list[bytes] = []

    def add(self, piece: str) -> None:
        """Put a piece at the end."""
        self._pieces.append(piece)
        if len(self._pieces) == self._BLOCK:
            import zlib

            block = "".join(self._pieces).encode("utf-8", "surrogatepass")
            self._blocks.append(zlib.compress(block, 1))
            self._pieces.clear()

    def __str__(self) -> str:
        if not self._blocks:
            return "".join(self._pieces)
        import zlib

        packed = b"".join(map(zlib.decompress, self._blocks))
        return packed.decode("utf-8", "surrogatepass") + "".join(self._pieces)


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
        self._text = _Text()
        self._reasoning = _Text()
        self._calls: list[ToolCall] = []
        self._finish: str | None = None
        self._extra: list[JSON] = []

    def reply(self) -> Reply:
        """Everything gathered so far."""
        calls, signed = self._calls, any(c.extra_content for c in self._calls)
        notes = [e["extra_content"] for e in self._extra if "extra_content" in e]
        if calls and notes and not signed:  # told on a line of its own
            calls = [replace(calls[0], extra_content=notes[0]), *calls[1:]]
        return Reply(
            text=str(self._text),
            reasoning=str(self._reasoning),
            tool_calls=tuple(calls),
            finish_reason=_finish_reason(self._finish, self._calls),
            usage=self.usage,
            model=self.model,
            raw={"extra": self._extra} if self._extra else {},
        )

    def finish(self) -> list[Chunk]:
        """The bytes have ended; the chunks that only now are whole."""
        if not self.whole:
            self.fail("the connection ended before the reply was whole")
        return []

    def fail(self, what: str, code: str | None = None) -> None:
        """Keep the first fault."""
        if self.error is None:
            self.error = StreamError(
                f"The reply of {self.model} broke off: {what}", code=code, model=self.model
            )


def _text_or_fault(line: bytes) -> str:
    """A line as text; one that is none as something that is no JSON either."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return f"bytes that are no UTF-8: {line[:60]!r}"


class LineDecoder(_Decoder):
    """Puter's stream: bytes in, one JSON object a line, split on `\\n` alone (recorded)."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._rest = bytearray()
        self._scan: Any = json.JSONDecoder().scan_once  # type: ignore[attr-defined]

    def feed(self, data: bytes) -> list[Chunk]:
        """The chunks of the lines that this piece completes."""
        end = data.rfind(b"\n") + 1
        if len(self._rest) + len(data) > MAX_LINE_BYTES:
            self._check_lengths(bytes(self._rest) + data)
        if self.error is not None:
            return []
        if not end:
            self._rest += data
            return []
        if end == len(data) and not self._rest:
            block = data  # as nearly always: whole lines
        else:
            block = bytes(self._rest) + data[:end]
            self._rest = bytearray(data[end:])
        lines: Iterable[str]
        try:
            lines = block.decode("utf-8").split("\n")
        except UnicodeDecodeError:  # give what comes before the broken line
            lines = map(_text_or_fault, block.split(b"\n"))
        return self._read(lines)

    def _check_lengths(self, block: bytes) -> None:
        if any(len(line) > MAX_LINE_BYTES for line in block.split(b"\n")):
            self.fail(f"a line is longer than {MAX_LINE_BYTES} bytes")

    def _read(self, lines: Iterable[str]) -> list[Chunk]:
        """The chunks of whole lines, up to the first fault. The one loop where speed counts."""
        chunks: list[Chunk] = []
        line, scan, add, text_type = "", self._scan, self._text.add, str
        try:
            for line in lines:
                if not line or line.isspace():
                    continue
                event, end = scan(line, 0)
                if end != len(line) and not line[end:].isspace():
                    raise ValueError("there is something behind the object")
                if event["type"] == "text":
                    text = event["text"]
                    if type(text) is not text_type:
                        raise TypeError("the text is none")
                    add(text)
                    chunks.append(Chunk("text", text))
                else:
                    self._other(event["type"], event, chunks)
                    if self.error is not None:
                        break
        except (ValueError, RecursionError, TypeError, KeyError, StopIteration):
            self.fail(f"a line is not what Puter sends: {line[:80]!r}")
        except ReplyError as error:
            self.error = error
        return chunks

    def finish(self) -> list[Chunk]:
        """A last line without its line end counts, if it is whole."""
        rest, self._rest = bytes(self._rest), bytearray()
        chunks: list[Chunk] = []
        if rest.strip() and self.error is None:
            try:
                json.loads(rest)
            except (ValueError, RecursionError):
                self.fail(f"the last line is cut: {rest[:80]!r}")
            else:
                chunks = self._read([rest.decode("utf-8")])
        super().finish()
        return chunks

    def _other(self, kind: Any, event: JSON, chunks: list[Chunk]) -> None:
        if kind == "reasoning":
            self._reasoning.add(event["reasoning"] + "")
            chunks.append(Chunk("reasoning", event["reasoning"]))
        elif kind == "tool_use":
            call = _tool_call(
                event["id"], event["name"], event["input"], event.get("extra_content")
            )
            self._calls.append(call)
            chunks.append(Chunk("tool_call", tool_call=call))
        elif kind == "usage":
            self.whole = True
            self.usage = usage_from(event.get("usage"))
            chunks.append(Chunk("usage", usage=self.usage))
        elif kind == "error":
            self.fail(str(event.get("message") or "the server names no reason"))
        else:
            self._extra.append(event)  # extra_content, compaction and what may come


class EventDecoder(_Decoder):
    """An OpenAI-compatible stream: the data of Server-Sent Events in, as texts."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._open_calls: list[JSON] = []

    def feed(self, data: str) -> list[Chunk]:
        """The chunks of one event."""
        if self.error is not None:
            return []
        chunks: list[Chunk] = []
        try:
            if data.strip() == "[DONE]":
                self._done(chunks)
            else:
                self._frame(json.loads(data), chunks)
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            self.fail(f"an event is not what an OpenAI endpoint sends: {data[:80]!r}")
        except ReplyError as error:
            self.error = error
        return chunks

    def _frame(self, frame: JSON, chunks: list[Chunk]) -> None:
        if frame.get("error"):
            told = frame["error"] if isinstance(frame["error"], dict) else frame
            code = told.get("code")
            message = str(told.get("message") or frame["error"])
            self.fail(message, code=code if isinstance(code, str) else None)
            return
        if isinstance(frame.get("model"), str) and frame["model"]:
            self.model = frame["model"]
        for choice in (frame.get("choices") or ())[:1]:
            delta = choice.get("delta") or {}
            self._finish = choice.get("finish_reason") or self._finish
            reasoning = delta.get("reasoning_content") or delta.get("reasoning")
            if reasoning:
                self._reasoning.add(reasoning + "")
                chunks.append(Chunk("reasoning", reasoning))
            if delta.get("content"):
                self._text.add(delta["content"] + "")
                chunks.append(Chunk("text", delta["content"]))
            for part in delta.get("tool_calls") or ():
                self._call_delta(part)
        if frame.get("usage"):
            self.usage = usage_from(frame["usage"])

    def _call_delta(self, part: JSON) -> None:
        """Put a piece of a call where its index says; a new id begins a new call."""
        index, call_id = part.get("index"), part.get("id") or ""
        same = [c for c in self._open_calls if c["index"] == index]
        if not same or (call_id and same[-1]["id"] and call_id != same[-1]["id"]):
            same = [{"index": index, "id": "", "name": "", "arguments": "", "extra": None}]
            self._open_calls += same
        call, function = same[-1], part.get("function") or {}
        call["id"] = call["id"] or call_id
        call["name"] = call["name"] or function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""
        call["extra"] = call["extra"] or part.get("extra_content")

    def _done(self, chunks: list[Chunk]) -> None:
        for call in self._open_calls:
            made = _tool_call(call["id"], call["name"], call["arguments"], call["extra"])
            self._calls.append(made)
            chunks.append(Chunk("tool_call", tool_call=made))
        self.whole = True
        chunks.append(Chunk("usage", usage=self.usage))


def models_from(body: Any) -> list[Model]:
    """The catalogue of `/puterai/chat/models/details`, or OpenAI's list, as `Model`s.

    Raises `ServerError` when it is neither.
    """
    entries = body.get("models", body.get("data")) if isinstance(body, Mapping) else None
    if not isinstance(entries, list) or not all(isinstance(e, (Mapping, str)) for e in entries):
        raise ServerError("The model list is not in a form that we know")
    named = [{"id": e} if isinstance(e, str) else e for e in entries]
    models = []
    for entry in named:
        try:
            models.append(_model_from(entry))
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            _log.warning("An entry of the model list cannot be read: %r", error)
    return models


def _model_from(entry: Mapping[str, Any]) -> Model:
    costs = entry.get("costs") if isinstance(entry.get("costs"), Mapping) else {}
    assert isinstance(costs, Mapping)
    per = costs.get("tokens") or 1_000_000
    prices = {k: v for k, v in costs.items() if k != "tokens" and isinstance(v, (int, float))}

    def usd_per_million(key: Any) -> float | None:
        cents = prices.get(key)
        return None if cents is None else round(cents / 100 * (1_000_000 / per), 6)

    modalities = entry.get("modalities") or {}
    aliases = [entry.get("puterId"), *(entry.get("aliases") or ())]
    if not _is_text(entry["id"]):
        raise ValueError(f"the id is {_describe(entry['id'])}")
    return Model(
        id=entry["id"],
        name=str(entry.get("name") or entry["id"]),
        provider=str(entry.get("provider") or entry.get("owned_by") or ""),
        aliases=tuple(dict.fromkeys(a for a in aliases if a and a != entry["id"])),
        context=entry.get("context"),
        max_tokens=entry.get("max_tokens"),
        inputs=tuple(modalities["input"]) if modalities.get("input") else None,
        tools=entry.get("tool_call"),
        free=bool(prices) and not any(prices.values()),
        input_usd_per_million=usd_per_million(entry.get("input_cost_key")),
        output_usd_per_million=usd_per_million(entry.get("output_cost_key")),
        released=entry.get("release_date"),
    )


def credit_from(body: Any) -> Credit:
    """The answer of `/metering/usage` as a `Credit`; raises `ServerError` when it is none.

    Amounts come in microcents, a hundred million to the dollar, unless `unit` says credits.
    """
    info = body.get("allowanceInfo") if isinstance(body, Mapping) else None
    if not isinstance(info, Mapping) or "remaining" not in info:
        raise ServerError("The usage report is not in a form that we know")
    in_credits = info.get("unit") == "credits"
    scale = 1.0 if in_credits else 100_000_000.0
    usage = body.get("usage") if isinstance(body.get("usage"), Mapping) else {}
    by_api = {
        name: ((row.get("cost") or 0) / scale, row.get("units") or 0, row.get("count") or 0)
        for name, row in usage.items()
        if isinstance(row, Mapping)
    }
    return Credit(
        unit="credits" if in_credits else "usd",
        allowance=(info.get("monthUsageAllowance") or 0) / scale,
        remaining=(info.get("remaining") or 0) / scale,
        used=(usage.get("total") or 0) / scale,
        by_api=by_api,
        raw=dict(body),
    )


# ======================================================================================
# 7. policies · uses: errors, values, messages' Needs. Plain functions that decide
# ======================================================================================
# The wire's error codes and what they mean (recorded, or read in the server's code).
_KIND_BY_CODE: dict[str, type[PuterError]] = {
    "token_missing": AuthError,
    "reauth_required": AuthError,
    "token_auth_failed": AuthError,
    "app_or_api_token_required": AuthError,
    "invalid_api_key": AuthError,
    "insufficient_funds": CreditError,
    "subscription_required": SubscriptionError,
    "permission_denied": ModelAccessError,
    "usage-limited-chat": ModelAccessError,
    "forbidden": AccessError,
    "account_is_not_verified": AccessError,
    "account_suspended": AccessError,
    "too_many_requests": RateLimitError,
    "upstream_rate_limited": ModelRateLimitError,
    "upstream_provider_unavailable": ModelUnavailableError,
    "upstream_failed": ModelUnavailableError,
    "upstream_auth_failed": ProviderAuthError,
    "upstream_bad_request": BadRequestError,
    "model_not_found": ModelNotFoundError,
    "bad_request": BadRequestError,
    "not_found": BadRequestError,
    "internal_error": ServerError,
}
_KIND_BY_STATUS: dict[int, type[PuterError]] = {
    401: AuthError,
    402: CreditError,
    403: AccessError,
    408: RequestTimeoutError,
    429: RateLimitError,
}
_HINT_BY_CODE = {
    "app_or_api_token_required": "This is an account session token: sign in with "
    "`python -m puter login`, which gets a token of the right kind.",
    "not_found": "The server does not know this call: check `api_base_url`.",
    "account_is_not_verified": "Verify the account's e-mail address on puter.com.",
}


def error_from(
    status: int,
    body: Any,
    *,
    model: str | None = None,
    account: str | None = None,
    retry_after_s: float | None = None,
) -> PuterError:
    """The error that an HTTP status and a body (decoded JSON, or text) stand for.

    The code decides first, then the status, then texts of older servers. Understands Puter's
    errors, older servers' `success: false` in a 200, and OpenAI's error objects.
    """
    told = _error_fields(body)
    code, message = told["code"], told["message"]
    status = told["status"] or status
    kind = _KIND_BY_CODE.get(code or "")
    if "usage-limited-chat" in message:
        kind = ModelAccessError
    elif code in (None, "bad_request") and message.startswith("Model not found"):
        kind = ModelNotFoundError
    if kind is None:
        kind = _KIND_BY_STATUS.get(status, ServerError if status >= 500 else BadRequestError)
    words = told["provider_words"]
    text = message or f"The server answered {status} without saying why"
    if model and model not in text:
        text = f"{model}: {text}"
    if account and kind.scope == "account":
        text = f"{text} (account {account})"
    if words and words not in text:
        text = f"{text} (the provider said: {words})"
    return kind(
        text,
        status=status,
        code=code,
        hint=_HINT_BY_CODE.get(code or ""),
        model=model,
        account=account,
        retry_after_s=retry_after_s,
    )


def _error_fields(body: Any) -> JSON:
    """Message, code, status and the provider's own words, from any shape of error body."""
    if not isinstance(body, Mapping):
        import html

        page = re.sub(r"(?is)<(style|script)\b.*?</\1>|<[^>]*>", " ", str(body or ""))
        text = " ".join(html.unescape(page).split())[:300]
        return {"message": text, "code": None, "status": None, "provider_words": None}
    nested = body.get("error")
    given = nested if isinstance(nested, Mapping) else body
    message = given.get("message") or (nested if isinstance(nested, str) else "")
    attempts = body.get("attempts")
    words = ""
    if isinstance(attempts, list) and attempts and isinstance(attempts[-1], Mapping):
        words = str(attempts[-1].get("error") or "")
    code, status = given.get("code"), given.get("status")
    return {
        "message": str(message)[:2_000],
        "code": code if isinstance(code, str) else None,
        "status": status if isinstance(status, int) else None,
        "provider_words": words[:500],
    }


def retry_delay_s(
    attempt: int,
    base_s: float,
    cap_s: float = RETRY_CAP_S,
    retry_after_s: float | None = None,
    rand: Callable[[], float] | None = None,
) -> float:
    """How long to wait before sending again, in seconds.

    `attempt` counts from 1: base, twice, four times…, each shortened by up to a quarter so
    that clients do not come back in step. A server's `Retry-After` wins. `cap_s` bounds both.
    `rand` gives a number in [0, 1).
    """
    if retry_after_s is not None:
        return max(0.0, min(retry_after_s, cap_s))
    if rand is None:
        import random

        rand = random.random
    return min(cap_s, base_s * 2.0 ** (min(attempt, 60) - 1)) * (1.0 - rand() / 4)


def may_retry(
    error: PuterError, retries: int, max_retries: int, alone: bool, waited_s: float
) -> bool:
    """Whether to send the same request to the same account once more.

    `retries` have been made already. A broken server gets `max_retries` more, a model's
    provider one. A rate limit is waited for only by an account that is `alone`, and for at
    least the length of Puter's window.
    """
    if not error.retryable or max_retries == 0:
        return False
    if isinstance(error, RateLimitError):
        within = waited_s < RATE_WINDOW_S and retries < RATE_WINDOW_S / RATE_PAUSE_S
        return alone and (retries < max_retries or within)
    return retries < (1 if error.scope == "model" else max_retries)


NextStep = Literal["raise", "rename", "next_model", "free_model", "next_account"]


def next_step(error: PuterError, is_asked_model: bool, may_fall_back: bool) -> NextStep:
    """Where to go when an account cannot answer with a model, after its retries.

    A stand-in that refuses the request says nothing of the asked model: on to the next.
    """
    if isinstance(error, ReplyError):
        return "raise"  # it was worked for, and billed: nobody asks for it again
    if isinstance(error, ModelNotFoundError) and is_asked_model:
        return "rename"
    if isinstance(error, CreditError):
        return "free_model" if is_asked_model and may_fall_back else "next_account"
    if error.scope == "account":
        return "next_account"
    if error.scope == "model" or (error.scope == "request" and not is_asked_model):
        return "next_model"
    return "raise"


def fallback_order(
    model: str,
    candidates: Sequence[Model],
    cooled: Collection[str],
    needs: Needs | None = None,
    listed: Sequence[str] = DEFAULT_FALLBACK_MODELS,
) -> list[str]:
    """The ids of the models to try when `model` fails, best first.

    `candidates` is the live catalogue. First the `listed` ones that it knows, then its other
    free models; none that is resting (`cooled`), none that cannot do what the request `needs`.
    A model that costs money is here only if the user listed it: of the built-in list only
    what is still free counts.
    """
    needs = needs or Needs()
    by_name = models_by_name(candidates, str.lower)
    own_list = tuple(listed) != DEFAULT_FALLBACK_MODELS
    names = [strip_puter_prefix(name).lower() for name in listed]
    wanted = [by_name[name] for name in names if name in by_name]
    wanted = [m for m in wanted if own_list or m.free]
    wanted += [m for m in candidates if m.free]
    known = (by_name.get(name.lower()) for name in (model, *cooled))
    skip = {m.id for m in known if m is not None}
    unique = {m.id: m for m in wanted}.values()
    return [m.id for m in unique if m.id not in skip and can_do(m, needs)]


def models_by_name(models: Sequence[Model], fold: Callable[[str], str] = str) -> dict[str, Model]:
    """Every name's model, the names folded; an id counts before an alias, then who is first."""
    ids = {fold(m.id): m for m in reversed(models)}
    return {fold(n): m for m in reversed(models) for n in m.aliases} | ids


def can_do(model: Model, needs: Needs) -> bool:
    """Whether a model can take the request; what the catalogue does not say may be so."""
    if needs.tools and model.tools is False:
        return False
    if model.inputs is not None and not needs.inputs <= set(model.inputs):
        return False
    return not (model.context and needs.context > model.context)


def next_account(
    accounts: Sequence[Account],
    cooldowns: Mapping[str, float],
    strategy: str,
    current: str | None,
    now: float,
) -> Account | None:
    """The account to use, or None when all rest.

    `cooldowns` maps names to the end of their rest (s since 1970). `current` is kept while it
    may be used; else "round-robin" takes the next in order and "least-recently-used" the one
    whose last use is longest ago.
    """
    free = [a for a in accounts if cooldowns.get(a.username, 0.0) <= now]
    kept = next((a for a in free if a.username == current), None)
    if kept or not free:
        return kept
    if strategy == "least-recently-used":
        return min(free, key=lambda a: a.last_used_ms or 0)
    names = [a.username for a in accounts]
    start = names.index(current) + 1 if current in names else 0
    order = [*accounts[start:], *accounts[:start]]
    return next(a for a in order if a in free)


def cooldown_s(strikes: int, base_s: float) -> float:
    """How long an account rests after so many failures in a row: 1, 2, 3, 4 times the base."""
    return base_s * min(max(strikes, 1), 4)


def stats_from(
    totals: Sequence[tuple[str, str, int, float]], samples: Mapping[str, Sequence[tuple[Any, ...]]]
) -> list[ModelStats]:
    """The figures of `State.figures` by model, most asked first."""
    found = []
    for model in dict.fromkeys(row[0] for row in totals):
        rows = [row for row in totals if row[0] == model]
        counts: dict[str, int] = {}
        for _, outcome, count, _ in rows:  # an outcome twice: under an alias and the id
            counts[outcome] = counts.get(outcome, 0) + count
        times = [s[0] for s in samples.get(model, ())]
        firsts = [s[1] for s in samples.get(model, ()) if s[1] is not None]
        spoken = [(s[2], s[0]) for s in samples.get(model, ()) if s[2] and s[0]]
        seconds = sum(s for _, s in spoken)
        found.append(
            ModelStats(
                model=model,
                requests=sum(counts.values()),
                successes=counts.get("ok", 0),
                failures={k: v for k, v in counts.items() if k not in ("ok", "closed")},
                p50_s=percentile(times, 50),
                p95_s=percentile(times, 95),
                first_s=percentile(firsts, 50),
                tokens_per_s=sum(t for t, _ in spoken) / seconds if seconds else None,
                cost_usd=sum(row[3] for row in rows),
            )
        )
    return sorted(found, key=lambda s: (-s.requests, s.model))


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that so many percent of all do not exceed; None of nothing."""
    if not values:
        return None
    rank = max(1, -int(-len(values) * percent // 100))
    return sorted(values)[rank - 1]


def find_model(name: str, candidates: Sequence[Model]) -> Model:
    """The model of this id or alias, in any case, with or without `puter/` in front.

    Raises `ModelNotFoundError` with near matches.
    """
    wanted = strip_puter_prefix(name)
    for fold in (str, str.lower):
        model = models_by_name(candidates, fold).get(fold(wanted))
        if model is not None:
            return model
    names = {n: m.id for m in candidates for n in m.names()}
    by_lower = {n.lower(): i for n, i in names.items()}
    near = [by_lower[n] for n in _close_matches(wanted.lower(), by_lower, most=6)]
    tail = wanted.lower().rpartition("/")[2]
    near += [m.id for m in candidates if tail and tail in m.id.lower()]
    near = list(dict.fromkeys(near))[:3]
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ModelNotFoundError(
        f"No model is called {name!r}",
        near=near,
        model=name,
        code="model_not_found",
        hint=meant + ModelNotFoundError.default_hint,
    )


def matching_models(models: Sequence[Model], text: str | None) -> list[Model]:
    """The models that have the text in one of their names, in any case."""
    wanted = (text or "").lower()
    return [m for m in models if any(wanted in n.lower() for n in (*m.names(), m.name))]


MODEL_SORTS: dict[str, Callable[[Model], Any]] = {
    "id": lambda m: m.id,
    "price": lambda m: (
        m.input_usd_per_million is None,
        (m.input_usd_per_million or 0) + (m.output_usd_per_million or 0),
        m.id,
    ),
    "context": lambda m: (-(m.context or 0), m.id),
    "released": lambda m: (m.released is None, _backwards(m.released or ""), m.id),
}


def _backwards(date: str) -> tuple[int, ...]:
    """Sorts newest dates first."""
    return tuple(-ord(c) for c in date)


def may_lose_calls(provider: str | None, tools: Any, args: Mapping[str, Any]) -> bool:
    """Whether a stream could lose all but the last of several calls in one turn (recorded).

    So it is with every provider that speaks OpenAI's dialect; only Puter's own Claude provider
    does not. An unknown provider (None) may lose them.
    """
    return bool(tools) and args.get("parallel_tool_calls") is not False and provider != "claude"


# ======================================================================================
# 8. transport · uses: errors, config, policies' error_from. Alone knows requests
# ======================================================================================
_PIECE_BYTES = 64 * 1024
_SHUT_RDWR = 2  # socket's constant, needed when modules cannot be imported any more
_USER_AGENT = f"puter.py/{__version__}"
# Puter ties a user-app token to a web origin; every later call must carry the same one.
_APP_ORIGIN = "http://localhost:19847"


_OPENAI_PATH = "/puterai/openai/v1"


def _path_of(url: str) -> str:
    """The path of an address, without a slash at its end."""
    return re.sub(r"^https?://[^/]*", "", url).rstrip("/")


def _is_gateway(config: Config) -> bool:
    """Whether requests go to somebody's OpenAI server, which stored tokens are not for."""
    path = _path_of(config.api_base_url)
    return config.api_style == "openai" and path not in ("", _OPENAI_PATH)


def _api_origin(config: Config) -> str:
    """Where Puter's own calls are, whatever the style of the chat."""
    return config.api_base_url.removesuffix(_OPENAI_PATH)


def _openai_base(config: Config) -> str:
    base = config.api_base_url
    return base if _path_of(base) else base + _OPENAI_PATH


class _Cancellation:
    """One call in flight, so that another thread can end it: before its headers, too.

    A connection knows the handle that it works for, so that a late `close` does not hit the
    next call on the same connection.
    """

    _local = threading.local()
    _owners = _Lock()  # re-entrant: a stream may be dropped, and so closed, at any time

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._connection: Any = None  # the urllib3 connection that carries the call
        self._socket: Any = None
        self._timeout_s: float | None = None

    def close(self) -> None:
        """End the call: a thread that waits for its bytes wakes up."""
        self.closed.set()
        with self._owners:
            connection = self._connection
            if connection is None or connection.owner is not self:
                return
            sock = self._socket or connection.sock
            if sock is not None:
                with suppress(OSError):  # it may be closed already
                    sock.shutdown(_SHUT_RDWR)

    def let_go(self) -> None:
        """The answer is read: the connection is free for others, and no longer ours to close."""
        with self._owners:
            if self._connection is not None and self._connection.owner is self:
                self._connection.owner = None

    def settimeout(self, seconds: float) -> None:
        """Bound the wait for the next byte."""
        with self._owners:
            if self._socket is not None and self._connection.owner is self:
                with suppress(OSError):
                    self._socket.settimeout(seconds)

    @contextmanager
    def carried(self, timeout_s: float) -> Iterator[None]:
        """Tell the connection that this thread is about to use whom it works for."""
        self._local.handle, self._timeout_s = self, timeout_s
        try:
            yield
        except BaseException:
            self.let_go()
            raise
        finally:
            self._local.handle = None

    def _takes(self, connection: Any) -> None:
        if self.closed.is_set():
            raise ConnectionAbortedError("closed by its owner")
        with self._owners:
            connection.owner, self._connection, self._socket = self, connection, None

    def _waits(self, connection: Any) -> None:
        with self._owners:
            self._socket = connection.sock
        if self.closed.is_set():
            raise ConnectionAbortedError("closed by its owner")

    @classmethod
    def tracked(cls, connection_class: type[Any]) -> type[Any]:
        """A urllib3 connection class that reports its socket to the handle of its thread."""

        class Tracked(connection_class):  # type: ignore[misc]
            owner: Any = None

            def connect(self) -> None:
                super().connect()
                # urllib3 leaves the (short) time for connecting on the socket while it sends.
                handle = getattr(cls._local, "handle", None)
                if handle is not None:
                    self.sock.settimeout(handle._timeout_s)

            def request(self, *args: Any, **kwargs: Any) -> None:
                handle = getattr(cls._local, "handle", None)
                if handle is not None:
                    handle._takes(self)
                    if self.sock is not None:  # the base class puts it on the socket
                        self.timeout = handle._timeout_s
                super().request(*args, **kwargs)

            def getresponse(self) -> Any:
                handle = getattr(cls._local, "handle", None)
                if handle is not None:
                    handle._waits(self)
                return super().getresponse()

        return Tracked


@dataclass(frozen=True, slots=True)
class _Answer:
    """A whole HTTP answer: `data` is the decoded JSON, or None and then `text` holds it."""

    status: int
    content_type: str
    data: Any
    text: str
    url: str
    retry_after_s: float | None
    location: str | None = None
    date: str | None = None


class _Wire:
    """A streaming HTTP answer: its pieces as they arrive, then `close`."""

    def __init__(
        self,
        response: requests.Response,
        content_type: str,
        handle: _Cancellation,
        timeout_s: float,
    ) -> None:
        self.content_type = content_type
        self._response = response
        self._handle = handle
        self._timeout_s = timeout_s

    def pieces(self) -> Iterator[bytes]:
        """The body's bytes the moment they arrive; raises our errors."""
        try:
            yield from _raw_pieces(self._response)
        except Exception as error:
            failure = _network_error(error, self._response.url, self._timeout_s)
            if failure is error:
                raise
            raise failure from error

    def events(self) -> Iterator[str]:
        """The data of each Server-Sent Event; raises our errors."""
        import sseclient

        try:
            for event in sseclient.SSEClient(self._limited()).events():
                yield event.data
        except UnicodeDecodeError as error:
            raise StreamError("The stream is not UTF-8") from error

    def _limited(self) -> Iterator[bytes]:
        """The pieces, as long as no event grows without end."""
        since_event = 0
        for piece in self.pieces():
            ends = b"\n\n" in piece or b"\n\r\n" in piece
            since_event = len(piece) if ends else since_event + len(piece)
            if since_event > MAX_LINE_BYTES:
                raise StreamError(f"An event is longer than {MAX_LINE_BYTES} bytes")
            yield piece

    def hurry(self) -> None:
        """The reply is whole: wait only a moment more for the end of the body."""
        self._handle.settimeout(1.0)

    def close(self) -> None:
        """Give the connection back if the body was read to its end, else close it."""
        self._response.close()
        self._handle.let_go()


def _raw_pieces(response: requests.Response) -> Iterator[bytes]:
    """Decoded bytes without waiting for a full buffer, whatever frames the body."""
    raw = response.raw
    if getattr(raw, "chunked", False):
        yield from raw.stream(_PIECE_BYTES, decode_content=True)
    elif hasattr(raw, "read1"):
        while piece := raw.read1(_PIECE_BYTES, decode_content=True):
            yield piece
    else:  # an urllib3 before 2: small pieces, so that none waits long
        yield from raw.stream(256, decode_content=True)


def _bounded(response: requests.Response, timeout_s: float, most: int) -> Iterator[bytes]:
    """The pieces of a body that must be whole after so many seconds, and so many bytes."""
    size, until = 0, time.monotonic() + timeout_s
    for piece in _raw_pieces(response):
        size += len(piece)
        if size > most:
            raise ServerError(f"The answer is larger than {most:,} bytes")
        yield piece
        if time.monotonic() > until:
            raise RequestTimeoutError(f"The answer was not whole after {timeout_s:g} s")


def _is_framed(response: requests.Response) -> bool:
    """Whether the headers say how a body ends; where they were cut, they do not."""
    raw, headers = response.raw, response.headers
    closes = "close" in headers.get("Connection", "").lower() or raw.version == 10
    return closes or getattr(raw, "chunked", False) or "Content-Length" in headers


def _network_error(error: Exception, url: str, timeout_s: float) -> Exception:
    """What a failure of requests, urllib3 or the socket means, as one of our errors."""
    import http.client

    import requests.exceptions as rq
    import urllib3.exceptions as u3

    if isinstance(error, PuterError):
        return error
    host = url.split("?")[0]
    reason = _root_cause(error)
    if isinstance(error, rq.ConnectTimeout):
        return RequestTimeoutError(
            f"{host} did not accept a connection within {CONNECT_TIMEOUT_S:g} s",
            hint=NetworkError.default_hint,
        )
    if isinstance(error, (rq.Timeout, u3.TimeoutError, TimeoutError)):
        return RequestTimeoutError(f"{host} was silent for {timeout_s:g} s")
    if isinstance(error, (rq.SSLError, u3.SSLError)) or "CERTIFICATE" in reason:
        return NetworkError(
            f"The TLS connection to {host} failed ({reason})",
            hint="Check the clock, the certificates (REQUESTS_CA_BUNDLE) and `api_base_url`.",
        )
    if isinstance(error, rq.ProxyError):
        return NetworkError(f"The proxy on the way to {host} failed ({reason})")
    if isinstance(error, (rq.InvalidURL, rq.InvalidSchema, rq.MissingSchema)):
        return ConfigError(f"{host} is no address to call", hint="Correct `api_base_url`.")
    known = (rq.RequestException, u3.HTTPError, http.client.HTTPException, OSError)
    # A socket closed by another thread shows as an attribute or value error inside urllib3.
    if isinstance(error, (*known, AttributeError, ValueError)):
        return NetworkError(f"The connection to {host} failed ({reason})")
    return error


def _root_cause(error: BaseException) -> str:
    """The innermost reason in a chain of wrapped errors, in a few words."""
    seen: set[int] = set()
    inner: Any = error
    while id(inner) not in seen:
        seen.add(id(inner))
        nested = getattr(inner, "reason", None)
        if not isinstance(nested, BaseException):
            nested = next((a for a in inner.args[::-1] if isinstance(a, BaseException)), None)
        inner = nested or inner.__cause__ or inner
    words = str(inner).split("Failed to establish a new connection: ")[-1]
    words = re.sub(r"^<[^>]*>:? ?|^HTTPS?Connection\([^)]*\): ", "", words)
    return words[:200] or type(inner).__name__


class _Transport:
    """HTTP to one server; no decisions, no policies. Safe between threads and after a fork."""

    def __init__(self, config: Config, session: requests.Session | None = None) -> None:
        self._config = config
        self._given = session
        self._own: requests.Session | None = None
        self._bases: dict[tuple[str, str], Any] = {}
        self._pid = 0
        self._lock = _Lock()

    def call(
        self,
        method: str,
        url: str,
        *,
        token: str = "",
        body: Any = None,
        form: Sequence[tuple[str, Any]] | None = None,
        progress: Callable[[int, int], None] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        handle: _Cancellation | None = None,
        streaming: bool = False,
    ) -> _Answer | _Wire:
        """Send one request. A `_Wire` comes back only for a streaming answer with status 200.

        `form` is sent as multipart; `progress` is told (bytes sent, bytes in all) then.
        """
        handle = handle or _Cancellation()
        timeout_s = timeout_s or self._config.api_timeout_ms / 1000
        sent_headers = {"User-Agent": _USER_AGENT, **(headers or {})}
        data: Any = None
        if body is not None:
            data = _encoded(body)
            sent_headers["Content-Type"] = "application/json"
        elif form is not None:
            data, sent_headers["Content-Type"] = _multipart(form, progress)
        try:
            with handle.carried(timeout_s):
                response = self._sent(method, url, sent_headers, data, _bearer(token), timeout_s)
        except PuterError:
            raise
        except Exception as error:
            raise _network_error(error, url, timeout_s) from error
        content_type = _content_type(response)
        if streaming and response.status_code == 200 and _is_stream(content_type):
            return _Wire(response, content_type, handle, timeout_s)
        try:
            text = self._whole(response, timeout_s)
        finally:
            handle.let_go()
        # Some proxies show the request in their error pages. A key of a few letters is no secret.
        if len(token) >= 10 and response.status_code >= 400:
            text = text.replace(token, "<token>")
        return _Answer(
            response.status_code,
            content_type,
            _decoded(text),
            text,
            url,
            _seconds(response.headers.get("Retry-After")),
            response.headers.get("Location"),
            response.headers.get("Date"),
        )

    def _sent(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        data: Any,
        auth: Callable[[Any], Any],
        timeout_s: float,
    ) -> requests.Response:
        """The answer's head. What is the same for every request to an address is made once."""
        session, key = self._session(), (method, url)
        if session is self._given or key not in self._bases:
            import requests

            request = requests.Request(method, url, auth=_bearer(""))
            base = session.prepare_request(request)
            proxies: Any = {}
            known = session.merge_environment_settings(url, proxies, True, None, None)
            self._bases[key] = (base, known)
        base, known = self._bases[key]
        prepared = base.copy()
        prepared.headers.update(headers)
        if data is not None:
            prepared.prepare_body(data, None)
        return session.send(
            auth(prepared),
            timeout=(min(CONNECT_TIMEOUT_S, timeout_s), timeout_s),
            allow_redirects=False,  # the token must not follow to another host
            **known,
        )

    def ask(self, method: str, url: str, **options: Any) -> _Answer:
        """As `call`, for what never streams."""
        answer = self.call(method, url, **options)
        assert isinstance(answer, _Answer)
        return answer

    def download(self, url: str) -> tuple[bytes, str]:
        """(contents, MIME type) of a public address, up to `MAX_FILE_BYTES`; no token is sent."""
        timeout_s = self._config.api_timeout_ms / 1000
        try:
            response = self._session().get(
                url,
                headers={"User-Agent": _USER_AGENT},
                auth=_bearer(""),
                timeout=(CONNECT_TIMEOUT_S, timeout_s),
                stream=True,
            )
            with response:
                data = b"".join(_bounded(response, timeout_s, MAX_FILE_BYTES))
        except PuterError:
            raise
        except Exception as error:
            raise _network_error(error, url, timeout_s) from error
        if response.status_code != 200:
            raise BadRequestError(
                f"{url} answered {response.status_code}", hint="Check the address."
            )
        return data, _content_type(response)

    def close(self) -> None:
        """Close the connections of our own session; a given one is its owner's."""
        with self._lock:
            if self._own is not None and self._pid == os.getpid():
                _close_session(self._own)
            self._own = None

    def _whole(self, response: requests.Response, timeout_s: float) -> str:
        """The body as text, within the time and the size limit.

        A good answer that breaks off was worked for, and billed: it is a `ReplyError`, which
        nobody asks for again; unless the JSON is whole, and but the end of its frame is not.
        """
        data = bytearray()
        try:
            for piece in _bounded(response, timeout_s, MAX_BODY_BYTES):
                data += piece
        except Exception as error:
            failure = _network_error(error, response.url, timeout_s)
            is_whole = _decoded(data.decode("utf-8", "replace")) is not None
            if isinstance(failure, PuterError) and response.status_code == 200:
                failure = ReplyError(f"The answer broke off: {failure.message}")
            if not (is_whole and isinstance(failure, PuterError)):
                if failure is error:
                    raise
                raise failure from error
        finally:
            response.close()
        if not data and response.status_code == 200 and not _is_framed(response):
            raise NetworkError(f"{response.url} closed the connection in the headers of its answer")
        return data.decode("utf-8", "replace")

    def _session(self) -> requests.Session:
        with self._lock:
            if self._given is not None:
                return _tracking(self._given)
            if self._own is None or self._pid != os.getpid():  # sockets are not for a fork
                self._own, self._pid, self._bases = _new_session(), os.getpid(), {}
            return self._own


def _new_session() -> requests.Session:
    from http.cookiejar import DefaultCookiePolicy

    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    no_cookies = DefaultCookiePolicy(allowed_domains=[])  # accounts do not mix
    session.cookies.set_policy(no_cookies)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_connections=8, pool_maxsize=256))
    return _tracking(session)


def _close_session(session: requests.Session) -> None:
    """Close the connections that nobody uses; requests leaves them to the garbage collector."""
    from queue import Empty

    adapter: Any
    for adapter in session.adapters.values():
        for manager in (adapter.poolmanager, *adapter.proxy_manager.values()):
            for key in manager.pools.keys():  # noqa: SIM118 (it has no iterator)
                pool = manager.pools.get(key)
                # The pool itself stays open, for another thread may be about to use it.
                with suppress(Empty):
                    while pool is not None:
                        connection = pool.pool.get(block=False)
                        if connection is not None:
                            connection.close()
    session.close()


def _tracking(session: requests.Session) -> requests.Session:
    """The session with adapters whose connections a `_Cancellation` can close."""
    for adapter in session.adapters.values():
        made: Any = getattr(adapter, "get_connection_with_tls_context", None)
        if made is None or hasattr(made, "is_tracked"):
            continue

        def tracked(*args: Any, _made: Any = made, **kwargs: Any) -> Any:
            pool = _made(*args, **kwargs)
            if not hasattr(pool.ConnectionCls, "owner"):
                pool.ConnectionCls = _Cancellation.tracked(pool.ConnectionCls)
            return pool

        tracked.is_tracked = True  # type: ignore[attr-defined]
        adapter.get_connection_with_tls_context = tracked  # type: ignore[attr-defined]
    return session


def _bearer(token: str) -> Callable[[Any], Any]:
    """Puts the token on a request; given as `auth`, so that no ~/.netrc overrides it."""
    if not re.fullmatch(r"[!-~]*", token):
        raise AuthError(
            "The token holds a blank or a character that is not ASCII",
            hint="Copy it again, whole and alone; or sign in with `python -m puter login`.",
        )

    def sign(request: Any) -> Any:
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    return sign


def _encoded(body: Any) -> bytes:
    """A request's JSON; raises `BadRequestError` for what JSON cannot hold."""
    try:
        return json.dumps(body, allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequestError(
            f"The request cannot be written as JSON ({error})",
            hint="Pass texts, numbers, booleans, lists and dicts.",
        ) from error


def _multipart(
    form: Sequence[tuple[str, Any]], progress: Callable[[int, int], None] | None
) -> tuple[Any, str]:
    """(body, content type) of a form in this order; the body tells how far it was read."""
    from urllib3.filepost import encode_multipart_formdata

    data, content_type = encode_multipart_formdata(form)
    return _Told(data, progress) if progress else data, content_type


class _Told:
    """A body that is read in pieces and tells of each."""

    def __init__(self, data: bytes, progress: Callable[[int, int], None]) -> None:
        import io

        self._file = io.BytesIO(data)
        self._size = len(data)
        self._progress = progress

    def __len__(self) -> int:
        return self._size

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        self._progress(self._file.tell(), self._size)
        return piece


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def body_of(answer: _Answer, model: str | None = None, account: str | None = None) -> JSON:
    """The JSON object of a good answer; raises the error that a bad one stands for."""
    data = answer.data
    if answer.status >= 400 or (isinstance(data, dict) and data.get("success") is False):
        raise error_from(
            answer.status,
            answer.text if data is None else data,
            model=model,
            account=account,
            retry_after_s=answer.retry_after_s,
        )
    if answer.status >= 300:
        raise ServerError(
            f"The server redirects to {answer.location}; nothing was sent there",
            status=answer.status,
            hint="Set `api_base_url` to the right address.",
        )
    if not isinstance(data, dict):
        shown = " ".join(answer.text[:200].split())
        raise ReplyError(
            f"{answer.url} answered {answer.content_type or 'something'} where a JSON "
            f"object was due: {shown!r}",
            status=answer.status,
            raw=answer.text[:2_000],
            model=model,
            hint="Check `api_base_url` and any proxy on the way.",
        )
    return data


def _content_type(response: requests.Response) -> str:
    """The MIME type of an answer, without its parameters; "" if none was told."""
    told: str = response.headers.get("Content-Type", "")
    return told.split(";")[0].strip().lower()


def _is_stream(content_type: str) -> bool:
    return (
        content_type == "text/event-stream" or "ndjson" in content_type or "jsonl" in content_type
    )


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header in seconds; it may also be a date (RFC 9110, 10.2.3)."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        from email.utils import parsedate_to_datetime

        try:
            return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
        except ValueError:
            return None


# ======================================================================================
# 9. Puter · uses: everything above
# ======================================================================================
@dataclass(frozen=True, slots=True)
class _Request:
    """One request as the caller made it, checked and in wire form."""

    model: str
    args: JSON
    needs: Needs
    fallback: bool
    timeout_s: float | None  # as the caller asked; None is the setting's
    streaming: bool = False


class _BusyError(RateLimitError):
    """This client itself has too much running: no fault of the account, nothing to walk from."""

    scope = "request"
    retryable = False
    default_hint = "Read streams to their end or close them; `max_concurrent` sets how many."


class _ConcurrencyLimit:
    """Lets so many calls at once through to one account, and learns from its refusals."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._running = 0
        self._learned = limit
        self._learned_until = 0.0
        self._paused_until = 0.0
        self._change = threading.Condition()

    def enter(self, handle: _Cancellation, patience_s: float) -> None:
        """Wait for a place; raises an error of scope "request" when none came free in time."""
        with self._change:
            until = self._clock() + patience_s
            while (wait_s := self._wait_s()) > 0:
                if handle.closed.is_set() or self._clock() >= until:
                    raise _BusyError(
                        f"{self._running} requests of this client are still running on the account"
                    )
                self._change.wait(min(wait_s, 0.25))
            self._running += 1

    def leave(self) -> None:
        """Give the place back."""
        with self._change:
            self._running -= 1
            self._change.notify_all()

    def refused(self, pause_s: float, too_many_at_once: bool) -> None:
        """The server said 429: nobody goes for a while, and fewer go at once for a minute."""
        with self._change:
            now = self._clock()
            self._paused_until = max(self._paused_until, now + pause_s)
            if too_many_at_once:
                self._learned = max(1, min(self._learned, self._running))
                self._learned_until = now + 60

    def _wait_s(self) -> float:
        now = self._clock()
        if now < self._paused_until:
            return self._paused_until - now
        limit = self._learned if now < self._learned_until else self._limit
        return 0.0 if self._running < limit else 60.0


class _Accounts:
    """The accounts that a client may ask: which there are, who rests, who is next."""

    def __init__(
        self,
        config: Config,
        store: AccountStore,
        state: State,
        token: str | None,
        pinned: str | None,
    ) -> None:
        self._config = config
        self._store = store
        self._state = state
        self._token = token
        self._pinned = pinned
        self._lock = _Lock()
        self._read: tuple[Any, list[Account], str | None] | None = None
        self.current: str | None = None  # who answered last, and is asked first

    @property
    def has_token(self) -> bool:
        """Whether a given token is used, whose account's name is not known."""
        return self._token is not None

    def usable(self) -> list[Account]:
        """The given token's account, the pinned one, or the stored ones."""
        if self._token is not None or _is_gateway(self._config):
            return [Account(_token_name(self._token), self._token or "")]
        accounts, active = self._stored()
        if self._pinned is not None:
            return [self._named(accounts, self._pinned)]
        if not self._config.account_rotation_enabled:
            return [a for a in accounts if a.username == active]
        return accounts

    @property
    def active_name(self) -> str | None:
        """The name of the active stored account; None if something else is in use."""
        if self._token is not None or self._pinned or _is_gateway(self._config):
            return None
        return self._stored()[1]

    def first(self, name: str | None = None) -> Account:
        """The account of this name, else the one in use, resting or not; raises `AuthError`."""
        accounts = self.usable()
        if not accounts:
            raise AuthError("You are not signed in")
        if name is not None:
            return self._named(accounts, name)
        wanted = self.current or self.active_name
        return next((a for a in accounts if a.username == wanted), accounts[0])

    def next(self, tried: Collection[str], is_free: Callable[[], bool]) -> Account | None:
        """The account to ask now, by the policy; None when all were tried or rest.

        For a model that `is_free`, one without credit is as good as any.
        """
        accounts = self.usable()
        strategy = self._config.account_rotation_strategy
        if strategy == "least-recently-used" and len(accounts) > 1:
            used = self._state.last_used_ms()
            accounts = [
                replace(a, last_used_ms=used.get(a.username, a.last_used_ms)) for a in accounts
            ]
        rests = {**self._rests(accounts, is_free), **dict.fromkeys(tried, float("inf"))}
        current = self.current or self.active_name
        chosen = next_account(accounts, rests, strategy, current, time.time())
        if chosen is not None and current is not None and chosen.username != current:
            _log.info("Auth: Switched account - %s", chosen.username)
        return chosen

    def cooldowns(self) -> list[Cooldown]:
        """Who rests now, as all processes have learned it."""
        return _resting(self._state, self.usable(), time.time())

    def is_alone(self, account: Account) -> bool:
        """Whether no other account could take its place, now or later."""
        accounts = self.usable()
        others = [a for a in accounts if a.username != account.username]
        if not others:
            return True
        rests = _resting(self._state, accounts, time.time(), look=False)
        dead = {c.account for c in rests if not c.model and c.reason == "login"}
        return all(a.username in dead for a in others)

    def nobody(self) -> PuterError:
        """Why there is no account to ask."""
        accounts = self.usable()
        if not accounts:
            return AuthError("You are not signed in")
        everything = _resting(self._state, accounts, time.time())
        rests = [c for c in everything if not c.model]
        dead = sorted(c.account for c in rests if c.reason == "login")
        if len(dead) == len(accounts):
            return AuthError(f"Every account needs a new sign-in: {', '.join(dead)}")
        ends = [c.until_s for c in rests if c.reason != "login"]
        wait_s = max(0.0, min(ends, default=0.0) - time.time())
        return AllAccountsOnCooldownError(
            f"All {len(accounts)} accounts are resting; the first is free in {wait_s:.0f} s",
            retry_after_s=wait_s,
            statuses=rests,
        )

    def _rests(self, accounts: Sequence[Account], is_free: Callable[[], bool]) -> dict[str, float]:
        """Until when each account rests; one that is alone never does."""
        rests = {
            c.account: c.until_s
            for c in _resting(self._state, accounts, time.time())
            if not c.model and not (c.reason == "insufficient_funds" and is_free())
        }
        awake = [a.username for a in accounts if rests.get(a.username) != float("inf")]
        if len(accounts) == 1 or len(awake) == 1:
            for name in awake or [accounts[0].username]:
                rests.pop(name, None)
        return rests

    def _stored(self) -> tuple[list[Account], str | None]:
        """The stored accounts and the active one's name; read again when the file changed."""
        with self._lock:
            stamp = self._store.stamp()
            if self._read is None or self._read[0] != stamp:
                accounts, active = self._store.read()
                self._read = (stamp, accounts, active.username if active else None)
            return self._read[1], self._read[2]

    @staticmethod
    def _named(accounts: Sequence[Account], name: str) -> Account:
        found = next((a for a in accounts if a.username == name), None)
        if found is None:
            meant = _did_you_mean(name, [a.username for a in accounts])
            raise AuthError(
                f"No stored account is called {name!r}",
                hint=f"{meant}`python -m puter status` lists them.",
            )
        return found


class _Catalogue:
    """The model list, from memory, disk or the server, as fresh as `cache_ttl_ms` asks."""

    def __init__(self, config: Config, state: State, transport: _Transport, token: str) -> None:
        self._config = config
        self._state = state
        self._transport = transport
        self._token = token if _is_gateway(config) else ""  # Puter's own list needs none
        self._lock = _Lock()
        self._kept: tuple[list[Model], float] | None = None
        self._indexed: tuple[list[Model], dict[str, Model]] | None = None

    def models(self, refresh: bool = False) -> list[Model]:
        """The list; an old one with a warning when the server cannot be reached."""
        kept = self._fresh()
        if kept and not refresh:
            return kept
        with self._lock:  # one fetches, the others wait for it
            kept = self._fresh()
            if kept and not refresh:
                return kept
            old, now = self._kept, time.time()
            try:
                body = self._fetch()
                found = models_from(body)
            except PuterError as error:
                if not old or refresh:
                    raise
                _log.warning(
                    "The model list is %.0f minutes old, since a new one cannot be had: %s",
                    (now - old[1]) / 60,
                    error,
                )
                return old[0]
            self._kept = (found, now)
            self._state.put_catalogue(self._config.api_base_url, json.dumps(body), now)
            return found

    def models_if_any(self, why: str) -> list[Model]:
        """The list, or none with a warning, for what can do without it."""
        try:
            return self.models()
        except PuterError as error:
            _log.warning("%s, since the model list cannot be had: %s", why, error)
            return []

    def find(self, name: str) -> Model:
        """The model of this name; raises `ModelNotFoundError` with near matches."""
        models = self.models()
        return self._index(models).get(strip_puter_prefix(name)) or find_model(name, models)

    def id_of(self, name: str, look: bool = False) -> str:
        """The id behind a name as far as is known in memory (`look`: or on disk)."""
        kept = self._kept or (self._on_disk() if look else None)
        model = self._index(kept[0]).get(name) if kept else None
        return model.id if model else name

    def is_free(self, name: str) -> bool:
        """Whether a model costs nothing, as far as is known without asking anybody."""
        kept = self._kept or self._on_disk()
        model = self._index(kept[0]).get(name) if kept else None
        return model is not None and model.free

    def _index(self, models: list[Model]) -> dict[str, Model]:
        """Every exact name's model; made once a list."""
        if self._indexed is None or self._indexed[0] is not models:
            self._indexed = (models, models_by_name(models))
        return self._indexed[1]

    def _fresh(self) -> list[Model] | None:
        kept = self._kept or self._on_disk()
        is_fresh = kept and 0 <= time.time() - kept[1] < self._config.cache_ttl_ms / 1000
        return kept[0] if kept and is_fresh else None

    def _on_disk(self) -> tuple[list[Model], float] | None:
        on_disk = self._state.catalogue(self._config.api_base_url)
        if on_disk:
            self._kept = (models_from(json.loads(on_disk[0])), on_disk[1])
        return self._kept

    def _fetch(self) -> JSON:
        if _is_gateway(self._config):
            url = f"{self._config.api_base_url}/models"
        else:
            url = f"{_api_origin(self._config)}/puterai/chat/models/details"
        return body_of(self._transport.ask("GET", url, token=self._token))


class _Ledger:
    """What is noted of answered requests: figures, and replies to give again."""

    def __init__(self, config: Config, state: State) -> None:
        from pathlib import Path

        figures, folder = config.metrics_file, config.cache_directory
        self._config = config
        self.figures = State(Path(figures).expanduser()) if figures else state
        self.replies = State(Path(folder).expanduser() / "cache.sqlite3") if folder else state

    def count(
        self,
        model: str,
        outcome: str,
        seconds: float,
        first_s: float | None = None,
        usage: Usage | None = None,
    ) -> None:
        """Note how one request ended: "ok", "closed" or an error's code."""
        if self._config.metrics_enabled:
            keep = self._config.metrics_max_samples
            self.figures.record(model, outcome, seconds, first_s, usage, keep)

    def keep(self, ask: _Request, whole: Callable[[], Reply]) -> None:
        """Keep a whole reply, if replies are kept."""
        if self._config.cache_enabled:
            body, most = (json.dumps(reply_to_json(whole())), self._config.cache_max_entries)
            self.replies.cache_put(self._key(ask), body, time.time(), most)

    def kept(self, ask: _Request) -> Reply | None:
        """The kept reply to the same request, if replies are kept and it is fresh."""
        if not self._config.cache_enabled:
            return None
        ttl_s = self._config.cache_ttl_ms / 1000
        body = self.replies.cache_get(self._key(ask), time.time(), ttl_s)
        if body is None:
            return None
        _log.info("Response: from the cache")
        return reply_from_json(json.loads(body))

    def close(self) -> None:
        """Close the files."""
        self.figures.close()
        self.replies.close()

    def _key(self, ask: _Request) -> str:
        """What tells one request from another: all of it, and the server."""
        import hashlib

        whole = [self._config.api_base_url, self._config.api_style, ask.model, ask.args]
        return hashlib.sha256(_encoded(whole)).hexdigest()


class _Source:
    """A streaming reply as it arrives: chunks until there are none."""

    def __init__(self, wire: _Wire, model: str, stack: ExitStack) -> None:
        self._wire = wire
        self.decoder: LineDecoder | EventDecoder
        self._pieces: Iterator[Any]
        if wire.content_type == "text/event-stream":
            self.decoder, self._pieces = EventDecoder(model), wire.events()
        else:
            self.decoder, self._pieces = LineDecoder(model), wire.pieces()
        self.is_read = False  # to the end of the body
        self.first = self.read()
        self._stack = stack.pop_all()  # closes the wire and deletes uploaded files

    def read(self) -> list[Chunk]:
        """The next chunks, [] at the end; raises our errors."""
        decoder = self.decoder
        while decoder.error is None:
            try:
                piece = next(self._pieces, None)
            except PuterError:
                if decoder.whole:  # all was said before the connection broke
                    return []
                raise
            self.is_read = piece is None
            chunks = decoder.finish() if piece is None else decoder.feed(piece)
            if chunks:
                if decoder.whole:
                    self._wire.hurry()
                return chunks
            if piece is None and decoder.error is None:
                return []
        if isinstance(decoder.error, StreamError):
            decoder.error.reply = decoder.reply()
        raise decoder.error

    def reply(self) -> Reply:
        """What has come so far."""
        return self.decoder.reply()

    @property
    def usage(self) -> Usage:
        """What the provider counted, once it has told."""
        return self.decoder.usage

    def close(self) -> None:
        """Give back the connection, and delete uploaded files."""
        self._stack.close()


class _WholeSource:
    """A reply that was asked for whole, given out as a stream."""

    def __init__(self, reply: Reply) -> None:
        self.is_read = True
        self._reply = reply
        self.usage = reply.usage
        self.first = chunks_of(reply)

    def read(self) -> list[Chunk]:
        """No more than the first."""
        return []

    def reply(self) -> Reply:
        """All of it."""
        return self._reply

    def close(self) -> None:
        """Nothing is open."""


class _Api:
    """One request to Puter, or to an OpenAI-compatible base: no retries, no choices."""

    def __init__(
        self, config: Config, transport: _Transport, catalogue: _Catalogue, roster: _Accounts
    ) -> None:
        self._config = config
        self._transport = transport
        self._catalogue = catalogue
        self._roster = roster
        self._exchanged: dict[str, str] = {}  # session token -> user-app token
        self.on_upload: Callable[[str, int, int], None] | None = None

    def complete(self, ask: _Request, model: str, account: Account, handle: _Cancellation) -> Reply:
        """A whole reply."""
        with ExitStack() as stack:
            ask = self._uploaded(ask, account, stack)
            answer = self._send(ask, model, account, handle, streaming=False)
        assert isinstance(answer, _Answer)
        return self._read_whole(answer, model, account)

    def open_stream(
        self, ask: _Request, model: str, account: Account, handle: _Cancellation
    ) -> _Source | _WholeSource:
        """A streaming reply, read up to its first chunk."""
        if self._must_be_exact(ask, model):
            if ask.timeout_s is None:
                usual_s = self._config.api_timeout_ms / 1000
                ask = replace(ask, timeout_s=max(usual_s, EXACT_TOOLS_TIMEOUT_S))
            return _WholeSource(self.complete(ask, model, account, handle))
        started = time.monotonic()
        with ExitStack() as stack:
            ask = self._uploaded(ask, account, stack)
            answer = self._send(ask, model, account, handle, streaming=True)
            if isinstance(answer, _Answer):
                return _WholeSource(self._read_whole(answer, model, account))
            stack.callback(answer.close)
            duration_ms = (time.monotonic() - started) * 1000
            _log.info("Stream connected duration=%.0fms", duration_ms)
            return _Source(answer, model, stack)

    def data(self, path: str, account: Account) -> JSON:
        """The answer to a question about the account."""
        url = _api_origin(self._config) + path
        return body_of(self._transport.ask("GET", url, token=account.token))

    def _read_whole(self, answer: _Answer, model: str, account: Account) -> Reply:
        body = body_of(answer, model, account.username)
        if self._config.api_style == "openai":
            return reply_from_openai(body, model)
        return reply_from_driver(body, model)

    def _must_be_exact(self, ask: _Request, model: str) -> bool:
        """Whether streaming could lose tool calls, and the user wants none lost."""
        if self._config.stream_tools == "live" or not ask.needs.tools:
            return False
        if _is_gateway(self._config):
            return False
        provider = None
        with suppress(PuterError):  # without a catalogue the provider is unknown
            provider = self._catalogue.find(model).provider
        return may_lose_calls(provider, ask.args.get("tools"), ask.args)

    def _send(
        self, ask: _Request, model: str, account: Account, handle: _Cancellation, streaming: bool
    ) -> _Answer | _Wire:
        """Put one request on the wire, in the dialect of the `api_style`."""
        args = {**ask.args, "model": model, **({"stream": True} if streaming else {})}
        if self._config.api_style == "openai":
            if streaming:
                args.setdefault("stream_options", {"include_usage": True})
            args["messages"] = openai_messages(args["messages"])
            url, body = f"{_openai_base(self._config)}/chat/completions", args
        else:
            url = f"{self._config.api_base_url}/drivers/call"
            body = {
                "interface": "puter-chat-completion",
                "driver": "ai-chat",
                "method": "complete",
                "args": args,
            }
        _log.info(
            "Request: POST %s method=complete model=%s stream=%s messages=%d",
            _path_of(url),
            model,
            str(streaming).lower(),
            len(args["messages"]),
        )
        return self._post(url, body, account, handle, ask.timeout_s, streaming)

    def _post(
        self,
        url: str,
        body: JSON,
        account: Account,
        handle: _Cancellation,
        timeout_s: float | None,
        streaming: bool,
    ) -> _Answer | _Wire:
        """POST with the account's token; a session token is exchanged once if the server asks."""

        def post() -> _Answer | _Wire:
            token = self._exchanged.get(account.token, account.token)
            return self._transport.call(
                "POST",
                url,
                token=token,
                body=body,
                headers={"Origin": _APP_ORIGIN} if token != account.token else {},
                timeout_s=timeout_s,
                handle=handle,
                streaming=streaming,
            )

        answer = post()
        if isinstance(answer, _Answer) and answer.status == 403:
            code = _error_fields(answer.data)["code"]
            known = account.token in self._exchanged
            if code == "app_or_api_token_required" and not known:
                self._exchanged[account.token] = self._exchange(account)
                return post()
        return answer

    def _exchange(self, account: Account) -> str:
        """A user-app token for an account session token."""
        url = f"{_api_origin(self._config)}/auth/get-user-app-token"
        origin = {"origin": _APP_ORIGIN}
        answer = self._transport.ask("POST", url, token=account.token, body=origin)
        token = body_of(answer, None, account.username).get("token")
        if not isinstance(token, str) or not token:
            raise AuthError("The server exchanged the session token for nothing")
        return token

    def _uploaded(self, ask: _Request, account: Account, stack: ExitStack) -> _Request:
        """The request with its files put into the account's storage, until the stack ends."""
        if _is_gateway(self._config) or not any(map(_has_file, ask.args["messages"])):
            return ask
        messages = []
        for message in ask.args["messages"]:
            if _has_file(message):
                parts = [
                    self._upload(part, account, stack) if _holds_file(part) else part
                    for part in message["content"]
                ]
                message = {**message, "content": parts}
            messages.append(message)
        return replace(ask, args={**ask.args, "messages": messages})

    def _upload(self, part: JSON, account: Account, stack: ExitStack) -> JSON:
        """Put one file into `AppData/puter.py` of the account (recorded); a part for it."""
        name, data, mime = file_of(part)
        owner = account.username
        if self._roster.has_token:
            owner = str(self.data("/whoami", account).get("username"))
        operation = {
            "op": "write",
            "dedupe_name": True,
            "overwrite": False,
            "create_missing_ancestors": True,
            "path": f"/{owner}/AppData/puter.py",
            "name": name,
            "item_upload_id": 0,
        }
        info = {"name": name, "type": mime, "size": len(data)}
        _log.info("Request: POST /batch name=%s bytes=%d", name, len(data))
        answer = self._transport.ask(
            "POST",
            f"{_api_origin(self._config)}/batch",
            token=account.token,
            form=[
                ("fileinfo", json.dumps(info)),
                ("operation", json.dumps(operation)),
                ("file", (name, data, mime)),
            ],
            progress=partial(self.on_upload, name) if self.on_upload else None,
        )
        results = body_of(answer, None, account.username).get("results")
        path = results[0].get("path") if isinstance(results, list) and results else None
        if not isinstance(path, str):
            raise ServerError(f"The server took {name!r}, but does not say where it is")
        stack.callback(self._delete, path, account)
        return {"type": "file", "puter_path": path}

    def _delete(self, path: str, account: Account) -> None:
        """Remove an uploaded file; the answer matters more, so a failure is only logged."""
        url = f"{_api_origin(self._config)}/delete"
        try:
            answer = self._transport.ask("POST", url, token=account.token, body={"paths": [path]})
            if answer.status >= 400:
                raise error_from(answer.status, answer.data, account=account.username)
        except PuterError as error:
            _log.warning("%s could not be deleted from Puter: %s", path, error)


class Stream:
    """A reply as it comes: iterate over it for `Chunk`s; `reply` is the whole once it ended.

    Ends normally, or raises `StreamError` with the partial reply. Leaving the `with` block,
    `close()` (from any thread) or dropping it closes the connection.
    """

    def __init__(self, client: Puter, ask: _Request) -> None:
        self._client = client
        self._ask = replace(ask, streaming=True)
        self._handle = _Cancellation()
        self._source: _Source | _WholeSource | None = None
        self._batch: Iterator[Chunk] = iter(())
        self._ended = False
        self._reply: Reply | None = None  # put together when asked for
        self._last: _Source | _WholeSource | None = None
        self._walked: _Walked | None = None
        self.model: str = ask.model
        """The model that answers."""
        self.account: str = ""
        self.attempts: tuple[Attempt, ...] = ()

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            yield from self._batch
            if self._source is None or self._ended:
                return
            self._batch = iter(self._next_chunks(self._source))

    def __next__(self) -> Chunk:
        for chunk in self:
            return chunk
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._shut()

    def __repr__(self) -> str:
        ended = "ended" if self._ended else "closed" if self._source is None else "open"
        return f"<puter.Stream of {self.model!r}, {ended}>"

    @property
    def reply(self) -> Reply:
        """The whole reply; raises `StreamError` while the stream has not ended."""
        if not self._ended:
            raise StreamError(
                "The stream has not come to its end",
                hint="Read all its chunks first.",
                reply=self._last.reply() if self._last else None,
            )
        if self._reply is None and self._last is not None:
            self._reply = self._with_walk(self._last.reply())
        assert self._reply is not None
        return self._reply

    def close(self) -> None:
        """End the stream now; what is on its way is not waited for."""
        if self._source is not None and not self._ended and self._walked:
            seconds = time.monotonic() - self._walked.started
            self._client._ledger.count(self.model, "closed", seconds)
        self._shut()

    def _shut(self) -> None:
        """Give back the connection and the place in the gate."""
        source, self._source = self._source, None
        if not self._ended and not (source is not None and source.is_read):
            self._handle.close()  # a body that was read to its end left a good connection
        if source is not None:
            source.close()
        if self._walked is not None:
            self._walked.release()

    def _start(self) -> Stream:
        """Walk models and accounts until one answers; its first chunks are there then."""
        kept = self._client._ledger.kept(self._ask)
        if kept is not None:
            self._batch, self._reply, self._ended = iter(chunks_of(kept)), kept, True
            self.model, self.account = kept.model, kept.account
            return self
        walked = self._client._walk(self._ask, self._handle, self._client._caller.open_stream)
        self._walked, self._source, self._last = walked, walked.result, walked.result
        self.model = self._client._catalogue.id_of(walked.model)
        self.account, self.attempts = walked.account.username, walked.attempts
        self._batch = iter(walked.result.first)
        return self

    def _next_chunks(self, source: _Source | _WholeSource) -> list[Chunk]:
        try:
            chunks = source.read()
        except PuterError as error:
            self._end(source, _code_of(error))
            if isinstance(error, ReplyError):
                raise
            raise StreamError(
                error.message
                if isinstance(error, StreamError)
                else f"The reply of {self.model} broke off: {error.message}",
                reply=self._with_walk(source.reply()),
                code=error.code,
                model=self.model,
                account=self.account,
                attempts=self.attempts,
            ) from error
        if not chunks:
            self._ended = True
            self._end(source, "ok")
        return chunks

    def _end(self, source: _Source | _WholeSource, outcome: str) -> None:
        """Close, and note how it ended."""
        self._shut()
        if self._walked is not None:
            whole = partial(getattr, self, "reply")
            self._client._ended(self._ask, self._walked, source.usage, outcome, whole)

    @property
    def _has_more(self) -> bool:
        """Whether chunks have come that nobody has read yet."""
        return length_hint(self._batch) > 0

    def _with_walk(self, reply: Reply) -> Reply:
        return replace(reply, account=self.account, attempts=self.attempts)


class _Walked:
    """How a walk ended well: who answered, and the place in the gate that is still taken."""

    def __init__(
        self,
        result: Any,
        asked: str,
        attempts: Sequence[Attempt],
        account: Account,
        gate: _ConcurrencyLimit,
        began: float,
    ) -> None:
        self.result = result
        self.asked = asked  # under the name that the server knows
        self.attempts = tuple(attempts)
        self.model = self.attempts[-1].model
        self.account = account
        self.began = began  # when the walk did, with its retries and waits
        self.started = time.monotonic() - self.attempts[-1].seconds
        self._gate: _ConcurrencyLimit | None = gate
        self._lock = threading.Lock()

    def release(self) -> None:
        """Give the place back; once, whoever comes first."""
        with self._lock:
            gate, self._gate = self._gate, None
        if gate is not None:
            gate.leave()


class Puter:
    """The client of one person's Puter accounts; safe to share between threads.

    Args:
        token: use this token and no stored account. Default: `PUTER_AUTH_TOKEN` of the
            environment, else the stored accounts, the active one first.
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
        for name in settings:
            if name not in _SETTINGS:
                raise _unknown_key(name, "argument")
        if token is not None and account is not None:
            raise ConfigError(
                "token and account are both given", hint="A token is an account of its own."
            )
        self.config = Config.load(**settings) if config is None else replace(config, **settings)
        if token is None and account is None:
            token = os.environ.get("PUTER_AUTH_TOKEN") or None
        self.store = AccountStore(self.config.folder)
        self.state = State(self.config.folder / STATE_NAME)
        self._ledger = _Ledger(self.config, self.state)
        self._transport = _Transport(self.config, session)
        self._catalogue = _Catalogue(self.config, self.state, self._transport, token or "")
        self._roster = _Accounts(self.config, self.store, self.state, token, account)
        self._caller = _Api(self.config, self._transport, self._catalogue, self._roster)
        self._lock = _Lock()
        self._gates: dict[str, _ConcurrencyLimit] = {}
        self._gates_pid = os.getpid()
        if self.config.debug:
            _log.show(_DEBUG)

    def __repr__(self) -> str:
        who = "a given token" if self._roster.has_token else self._roster.current
        return f"<puter.Puter with {who or 'stored accounts'} at {self.config.api_base_url}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close connections and files; using the client again opens them again."""
        self._transport.close()
        self.state.close()
        self._ledger.close()

    # ---- asking ----

    def chat(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        system: str | None = None,
        images: Sequence[Image] = (),
        files: Sequence[File] = (),
        tools: Sequence[Any] | None = None,
        fallback: bool = True,
        timeout_ms: int | None = None,
        **args: Any,
    ) -> Reply:
        """Ask a model and wait for its whole answer.

        Args:
            prompt: a text, or a list of messages in OpenAI's shape (it is not changed).
            model: an id or alias of the catalogue; default `default_model`, else a cheap one.
            system: a system text put in front.
            images: paths, bytes or URLs, shown with the last user message.
            files: PDFs and other documents, as paths, bytes or (name, bytes): uploaded to
                the account's storage, used, and deleted again.
            tools: Python functions (their schema comes from signature, type hints and
                docstring), or JSON schemas in OpenAI's shape.
            fallback: whether free models may answer when the asked one cannot.
            timeout_ms: longest silence of the server; default `api_timeout_ms`.
            args: passed on to Puter: temperature, max_tokens, tool_choice, reasoning_effort…

        Raises the `PuterError` of the first attempt that failed when none could answer.
        """
        ask = self._ask(prompt, model, system, images, files, tools, fallback, timeout_ms, args)
        return self._answer(ask, _Cancellation())

    def stream(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        system: str | None = None,
        images: Sequence[Image] = (),
        files: Sequence[File] = (),
        tools: Sequence[Any] | None = None,
        fallback: bool = True,
        timeout_ms: int | None = None,
        **args: Any,
    ) -> Stream:
        """Ask a model and get its answer as it comes; arguments as for `chat`.

        Returns once the first chunk is there: errors before it are raised here, as by `chat`.
        After that nothing is tried again, and a broken answer is a `StreamError`.
        """
        ask = self._ask(prompt, model, system, images, files, tools, fallback, timeout_ms, args)
        return Stream(self, ask)._start()

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
            on_tool: is shown each call first; False refuses it, and the model is told so.
            options: as for `chat`.

        A function's exception goes to the model as its result, and to the log. Several calls
        are made in order. Raises `ReplyError` when the model still calls after `max_rounds`.
        """
        options["tools"] = list(_functions_by_name(tools).values())
        rounds = _Rounds(self, messages_from(prompt), options, max_rounds, on_tool)
        for _ in rounds.chunks(streaming=False):
            pass
        return rounds.reply

    def conversation(
        self, system: str | None = None, *, model: str | None = None, **options: Any
    ) -> Conversation:
        """A conversation that remembers its turns; `options` are `chat`'s, for each turn."""
        return Conversation(system, model=model, client=self, **options)

    # ---- the account and the catalogue ----

    def models(
        self, provider: str | None = None, free: bool | None = None, refresh: bool = False
    ) -> list[Model]:
        """The live catalogue, by id; kept for `cache_ttl_ms`. Needs no account.

        `provider` matches the catalogue's provider or the vendor in the id ("anthropic");
        `free` keeps only free (True) or paid (False) models. When the server cannot be
        reached, an older list is used and a warning logged.
        """
        found = self._catalogue.models(refresh)
        if provider:
            found = [m for m in found if _is_from(m, provider)]
        if free is not None:
            found = [m for m in found if m.free is free]
        return sorted(found, key=lambda m: m.id)

    def model(self, name: str) -> Model:
        """One model by id or alias, in any case; `ModelNotFoundError` has near matches."""
        return self._catalogue.find(name)

    def whoami(self) -> JSON:
        """The account in use as the server describes it: username, uuid, email, is_temp…"""
        return self._caller.data("/whoami", self._roster.first())

    def usage(self, account: str | None = None) -> Credit:
        """What an account may still spend this month; by default the one in use."""
        holder = self._roster.first(account)
        try:
            return credit_from(self._caller.data("/metering/usage", holder))
        except BadRequestError as error:
            if error.status != 404:
                raise
            return credit_from(self._caller.data("/auth/get-monthly-usage", holder))

    @property
    def on_upload(self) -> Callable[[str, int, int], None] | None:
        """Told (name, bytes sent, bytes in all) while a file is uploaded; None tells nobody."""
        return self._caller.on_upload

    @on_upload.setter
    def on_upload(self, told: Callable[[str, int, int], None] | None) -> None:
        self._caller.on_upload = told

    def stats(self, model: str | None = None) -> list[ModelStats]:
        """How the models have done in all calls from this computer, most asked first."""
        if model is not None:
            self._catalogue.models_if_any("Aliases are counted apart")
        totals, samples = self._ledger.figures.metrics(self.config.metrics_max_samples)
        ids = {name: self._catalogue.id_of(name, look=True) for name in samples}
        by_id: dict[str, list[tuple[Any, ...]]] = {}
        for name, rows in samples.items():
            by_id.setdefault(ids[name], []).extend(rows)
        found = stats_from([(ids[row[0]], *row[1:]) for row in totals], by_id)
        wanted = model and self._catalogue.id_of(strip_puter_prefix(model), look=True)
        return [s for s in found if not wanted or s.model == wanted]

    def reset_stats(self, model: str | None = None) -> None:
        """Forget the figures of a model, or of all."""
        names = None
        if model is not None:
            wanted = self._catalogue.id_of(strip_puter_prefix(model), look=True)
            _, samples = self._ledger.figures.metrics(1)
            names = [n for n in samples if self._catalogue.id_of(n) == wanted]
        self._ledger.figures.reset_metrics(names)

    @property
    def accounts(self) -> list[Account]:
        """The accounts that this client may use, in order."""
        return self._roster.usable()

    @property
    def active_account(self) -> Account | None:
        """The account that the next call goes to first, resting or not; None if there is none."""
        return self._roster.first() if self._roster.usable() else None

    def cooldowns(self) -> list[Cooldown]:
        """Who rests now, as all processes have learned it."""
        return self._roster.cooldowns()

    # ---- the walk over models and accounts ----

    def _walk(
        self,
        ask: _Request,
        handle: _Cancellation,
        send: Callable[[_Request, str, Account, _Cancellation], Any],
    ) -> _Walked:
        """Ask until somebody answers, in the order that the policies give.

        First the asked model on the current account, then its fallbacks there; when the
        account itself is limited, the next account, beginning again with the asked model.
        When nobody answers, the first error is raised with all that was tried.
        """
        attempts: list[Attempt] = []
        first: PuterError | None = None
        tried: set[str] = set()
        began = time.monotonic()
        is_free = partial(self._catalogue.is_free, ask.model)
        while (account := self._roster.next(tried, is_free)) is not None:
            tried.add(account.username)
            unpaid: CreditError | None = None
            models = self._models_in_turn(ask, account)
            while (model := next(models, None)) is not None:
                try:
                    result = self._persist(ask, model, account, send, handle, attempts)
                except PuterError as error:
                    if handle.closed.is_set() or isinstance(error, _BusyError):
                        raise  # its owner gave up, or has too much open: no account's fault
                    first = first or error
                    step = next_step(error, model == ask.model, ask.fallback)
                    if ask.fallback and error.scope == "model":
                        self._catalogue.models_if_any("No fallback")  # names, too
                    self._learn(error, model, account)
                    unpaid = error if isinstance(error, CreditError) else unpaid
                    if step == "rename" and (
                        name := self._name_for(ask.model, error, ask.fallback)
                    ):
                        ask = replace(ask, model=name)
                        first, models = None, self._models_in_turn(ask, account)
                    elif step in ("raise", "rename"):
                        raise self._summed_up(first, attempts) from first.__cause__
                    elif step == "next_account":
                        break
                    elif step == "free_model":
                        models = self._one_free(models)
                else:
                    self._roster.current = account.username
                    gate = self._gate(account)
                    return _Walked(result, ask.model, attempts, account, gate, began)
            if unpaid is not None:  # no free model could help, either
                self._rest(unpaid, account)
        if first is None:
            raise self._roster.nobody()
        raise self._summed_up(first, attempts) from first.__cause__

    def _persist(
        self,
        ask: _Request,
        model: str,
        account: Account,
        send: Callable[[_Request, str, Account, _Cancellation], Any],
        handle: _Cancellation,
        attempts: list[Attempt],
    ) -> Any:
        """One model on one account, with the retries that the policies allow.

        Comes back with the account's place in the gate still taken.
        """
        gate, alone = self._gate(account), self._roster.is_alone(account)
        if model != ask.model:
            _log.info("Fallback: trying %s", model)
        retries, waited_s = 0, 0.0
        while True:
            gate.enter(handle, ask.timeout_s or self.config.api_timeout_ms / 1000)
            started = time.monotonic()
            try:
                result = send(ask, model, account, handle)
            except BaseException as error:
                gate.leave()
                if not isinstance(error, PuterError):
                    raise
                seconds = time.monotonic() - started
                error.model, error.account = error.model or model, account.username
                if model not in error.message:
                    error.message = f"{model}: {error.message}"
                attempts.append(Attempt(model, account.username, error, seconds))
                self._ledger.count(model, _code_of(error), seconds)
                limit = self.config.max_retries
                if not may_retry(error, retries, limit, alone, waited_s):
                    raise
                retries += 1
                delay_s = self._wait_for(error, retries, gate, handle)
                waited_s += delay_s
                if handle.closed.is_set():
                    raise
            else:
                seconds = time.monotonic() - started
                attempts.append(Attempt(model, account.username, None, seconds))
                try:
                    self._note_success(account, model)
                except BaseException:
                    gate.leave()
                    raise
                return result

    def _note_success(self, account: Account, model: str) -> None:
        names = (model, self._catalogue.id_of(model))
        self.state.record_success(account.username, names, time.time())

    def _wait_for(
        self, error: PuterError, retries: int, gate: _ConcurrencyLimit, handle: _Cancellation
    ) -> float:
        """Wait before the next try, unless the handle is closed; how long, in seconds."""
        base_s = self.config.retry_delay_ms / 1000
        delay_s = retry_delay_s(retries, base_s, RETRY_CAP_S, error.retry_after_s)
        if isinstance(error, RateLimitError):
            delay_s = max(delay_s, RATE_PAUSE_S)
            gate.refused(delay_s, "concurrent" in error.message)
        _log.info(
            "Retry %d/%d: %s, waiting %.0fms",
            retries,
            max(self.config.max_retries, retries),
            _short(error),
            delay_s * 1000,
        )
        handle.closed.wait(delay_s)
        return delay_s

    def _learn(self, error: PuterError, model: str, account: Account) -> None:
        """Note in the state who must rest, so that nobody runs into the same again.

        An account without credit rests only once its free models could not help.
        """
        name, now, code = account.username, time.time(), _code_of(error)
        if isinstance(error, AuthError):
            mark = _token_mark(account.token)
            self.state.add_cooldown(name, "", lambda _: float("inf"), "login", now, mark)
            _log.info("Auth: Account needs a new sign-in - %s (%s)", name, code)
        elif error.scope == "model" or isinstance(error, CreditError):
            base_s = self.config.fallback_cooldown_ms / 1000
            rests = self._catalogue.id_of(model, look=True)
            self.state.add_cooldown(name, rests, lambda _: base_s, code, now)
            _log.info("%s, adding to cooldown", _short(error))
        elif error.scope == "account":
            self._rest(error, account)

    def _rest(self, error: PuterError, account: Account) -> None:
        """Let a whole account rest, unless it is alone."""
        if self._roster.is_alone(account):
            return
        base_s = self.config.account_rotation_cooldown_ms / 1000
        name, now = account.username, time.time()
        self.state.add_cooldown(name, "", lambda n: cooldown_s(n, base_s), _code_of(error), now)
        _log.info("%s, adding to cooldown", _short(error))

    def _models_in_turn(self, ask: _Request, account: Account) -> Iterator[str]:
        """The asked model, unless it rests on this account; then what may stand in for it."""
        rests = self.state.cooldowns(time.time(), look=False)  # the roster just looked
        cooled = {c.model for c in rests if c.account == account.username and c.model}
        asked = self._catalogue.id_of(ask.model, look=True) if cooled else ask.model
        rests_now = asked in cooled or ask.model in cooled
        if not rests_now or not ask.fallback:
            yield ask.model
        if not ask.fallback:
            return
        candidates = self._catalogue.models_if_any("No fallback")
        listed = self.config.fallback_models
        stand_ins = fallback_order(ask.model, candidates, cooled, ask.needs, listed)
        yield from stand_ins
        if rests_now and not stand_ins:
            yield ask.model  # nobody to stand in: better asked too early than not at all

    def _one_free(self, models: Iterator[str]) -> Iterator[str]:
        """The next free model of those to come, and no more."""
        free = {m.id for m in self._catalogue.models_if_any("No free model") if m.free}
        for model in models:
            if model in free:
                yield model
                return

    def _name_for(self, name: str, error: PuterError, may_cost: bool) -> str | None:
        """The name that the server knows instead, or None; adds near matches to the error.

        `may_cost`: whether a `:free` name that is gone may become its paid twin.
        """
        candidates = self._catalogue.models_if_any("No other name")
        try:
            found = find_model(name, candidates).id
        except ModelNotFoundError as unknown:
            if isinstance(error, ModelNotFoundError) and candidates:
                error.message, error.near = unknown.message, unknown.near
                error.hint = unknown.hint
            if not may_cost:
                return None
            paid = name.removesuffix(":free")
            found = next((m.id for m in candidates if paid in m.names()), name)
            if paid == name or found == name:
                return None
            _log.warning("%s is not there any more: trying %s, which may cost credit", name, found)
        return None if found == name else found

    @staticmethod
    def _summed_up(error: PuterError, attempts: Sequence[Attempt]) -> PuterError:
        error.attempts = tuple(attempts)
        return error

    def _gate(self, account: Account) -> _ConcurrencyLimit:
        with self._lock:
            if self._gates_pid != os.getpid():  # a forked child has nothing running yet
                self._gates, self._gates_pid = {}, os.getpid()
            if account.username not in self._gates:
                self._gates[account.username] = _ConcurrencyLimit(self.config.max_concurrent)
            return self._gates[account.username]

    # ---- one question, from the caller's arguments to the reply ----

    def _ask(
        self,
        prompt: Prompt,
        model: str | None,
        system: str | None = None,
        images: Sequence[Image] = (),
        files: Sequence[File] = (),
        tools: Sequence[Any] | None = None,
        fallback: bool = True,
        timeout_ms: int | None = None,
        args: JSON | None = None,
    ) -> _Request:
        """Check the caller's arguments; raises `BadRequestError` before anything is sent."""
        if "stream" in (args or {}):
            raise BadRequestError(
                "`stream` is no argument here", hint="Use `.stream(…)` or `.chat(…)`."
            )
        if timeout_ms is not None and (not isinstance(timeout_ms, int) or timeout_ms <= 0):
            raise BadRequestError(
                f"timeout_ms is {_describe(timeout_ms)}", hint="Give milliseconds, 1 or more."
            )
        parts = [*map(image_part, _listing(images)), *map(file_part, _listing(files))]
        messages = _wired(messages_from(prompt, system, parts))
        schemas = tool_schemas(tools)
        name = self.config.model_name(model)
        sent = {k: v for k, v in (args or {}).items() if v is not None}
        needs = needs_of(messages, schemas)
        self._check_inputs(name, needs)
        return _Request(
            model=name,
            args={"messages": messages, **({"tools": schemas} if schemas else {}), **sent},
            needs=needs,
            fallback=fallback and self.config.fallback_enabled,
            timeout_s=timeout_ms / 1000 if timeout_ms else None,
        )

    def _check_inputs(self, name: str, needs: Needs) -> None:
        """Raise `BadRequestError` when the catalogue says that the model cannot see this."""
        if not needs.inputs:
            return
        catalogue = self._catalogue.models_if_any("Not checked what the model takes")
        try:
            model = find_model(name, catalogue)
        except ModelNotFoundError:
            return  # the server says so, with what it knows
        if model.inputs is None or needs.inputs <= set(model.inputs):
            return
        able = [m for m in catalogue if m.inputs and needs.inputs <= set(m.inputs)]
        able.sort(key=lambda m: (not m.free, m.input_usd_per_million or 0))
        raise BadRequestError(
            f"{model.id} takes {', '.join(model.inputs)}, but no "
            f"{' and '.join(sorted(needs.inputs))}",
            model=model.id,
            hint=f"Models that do: {', '.join(m.id for m in able[:3]) or 'none'}.",
        )

    def _answer(self, ask: _Request, handle: _Cancellation) -> Reply:
        """The whole reply to a request; another thread may close the handle."""
        kept = self._ledger.kept(ask)
        if kept is not None:
            return kept
        walked = self._walk(ask, handle, self._caller.complete)
        walked.release()
        reply: Reply = walked.result
        reply = replace(reply, account=walked.account.username, attempts=walked.attempts)
        self._ended(ask, walked, reply.usage, "ok", lambda: reply)
        return reply

    def _ended(
        self, ask: _Request, walked: _Walked, usage: Usage, outcome: str, whole: Callable[[], Reply]
    ) -> None:
        """Note how the request that was answered ended, and keep a whole reply if wanted."""
        now = time.monotonic()
        first_s = walked.attempts[-1].seconds if ask.streaming else None
        self._ledger.count(walked.model, outcome, now - walked.started, first_s, usage)
        if outcome != "ok":
            _log.info("Response: broke off (%s)", outcome)
            return
        how = f"OK ({now - walked.began:.1f}s)"
        if walked.model != walked.asked:
            how = "OK (used fallback model)"
        elif ask.streaming:
            how = f"Stream complete ({now - walked.began:.1f}s)"
        _log.info("Response: 200 %s", how)
        if walked.model == walked.asked:
            self._ledger.keep(ask, whole)


class _Rounds:
    """A question and its answer, with the rounds of function calls between them.

    `messages` grows by each turn; `reply` is the last one.
    """

    def __init__(
        self,
        client: Puter,
        messages: Messages,
        options: JSON,
        max_rounds: int,
        on_tool: Callable[[ToolCall], bool | None] | None,
    ) -> None:
        tools = options.get("tools")
        is_run = bool(tools) and all(map(callable, _listing(tools)))
        self.messages = messages
        self.reply = Reply()
        self._client = client
        self._options = options
        self._functions = _functions_by_name(tools) if is_run else {}
        self._max_rounds = max_rounds
        self._on_tool = on_tool

    def chunks(self, streaming: bool) -> Iterator[Chunk]:
        """Ask until there is an answer; its chunks as they come, if it is to stream."""
        for rounds_left in range(self._max_rounds, -1, -1):
            yield from self._one_turn(streaming)
            if not self._functions or not self.reply.tool_calls:
                return
            if rounds_left:
                self.messages += [self._result(call) for call in self.reply.tool_calls]
        raise ReplyError(
            f"The model still calls functions after {self._max_rounds} rounds",
            raw=repr(self.reply),
            hint="Raise `max_rounds`, or say in the prompt when to stop.",
        )

    def _one_turn(self, streaming: bool) -> Iterator[Chunk]:
        if streaming:
            with self._client.stream(self.messages, **self._options) as stream:
                yield from stream
            self.reply = stream.reply
        else:
            self.reply = self._client.chat(self.messages, **self._options)
        self.messages = [*self.messages, message_from(self.reply)]

    def _result(self, call: ToolCall) -> JSON:
        content = _result_of(call, self._functions, self._on_tool)
        return {"role": "tool", "tool_call_id": call.id, "content": content}


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
        self.options = options
        self._client = client
        self._reply: Reply | None = None

    def __repr__(self) -> str:
        return f"<puter.Conversation of {len(self.messages)} messages>"

    def __getstate__(self) -> JSON:
        return {**self.__dict__, "_client": None}

    def say(self, said: str | JSON, **options: Any) -> Reply:
        """The model's answer to the next thing said: a text, or a message in OpenAI's shape.

        `options` are `chat`'s. With functions as `tools` they are called until the model
        answers, as by `run` (which see for `max_rounds` and `on_tool`).
        """
        for _ in self._turns(said, options, streaming=False):
            pass
        return self.reply

    def stream(self, said: str | JSON, **options: Any) -> Iterator[Chunk]:
        """The answer as it comes, otherwise as `say`; remembered once it has come whole."""
        return self._turns(said, options, streaming=True)

    @property
    def reply(self) -> Reply:
        """The latest answer; raises `BadRequestError` before the first."""
        if self._reply is None:
            raise BadRequestError("Nothing was answered yet", hint="Say something first.")
        return self._reply

    def _turns(self, said: str | JSON, options: JSON, streaming: bool) -> Iterator[Chunk]:
        asked = {**self.options, **options}
        messages = self._with(said, asked)
        most, on_tool = asked.pop("max_rounds", 8), asked.pop("on_tool", None)
        asked = {"model": self.model, "system": self.system, **asked}
        rounds = _Rounds(self._its_client(), messages, asked, most, on_tool)
        yield from rounds.chunks(streaming)
        self.messages, self._reply = rounds.messages, rounds.reply

    def to_json(self) -> JSON:
        """The conversation as plain values; functions among the options are left out."""
        told = {k: v for k, v in self.options.items() if k not in ("tools", "on_tool")}
        names = ("system", "model", "messages")
        return {**{n: getattr(self, n) for n in names}, "options": told}

    @classmethod
    def from_json(cls, data: JSON, client: Puter | None = None) -> Conversation:
        """The conversation that `to_json` gave."""
        return cls(
            data.get("system"),
            model=data.get("model"),
            client=client,
            messages=data.get("messages") or (),
            **(data.get("options") or {}),
        )

    def _with(self, said: str | JSON, asked: JSON) -> Messages:
        """The history with the next thing said; images and files become part of it."""
        parts = [*map(image_part, _listing(asked.pop("images", ())))]
        parts += map(file_part, _listing(asked.pop("files", ())))
        prompt = said if isinstance(said, str) else [said]
        return [*self.messages, *messages_from(prompt, None, parts)]

    def _its_client(self) -> Puter:
        return self._client or _default_client()


def _listing(given: Any) -> Sequence[Any]:
    """One path, URL, bytes, or (name, bytes) as a list of it; a list stays."""
    named = isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], bytes)
    alone = isinstance(given, (str, bytes, bytearray, os.PathLike)) or callable(given)
    return [given] if alone or (named and isinstance(given[0], str)) else given


def _functions_by_name(tools: Any) -> dict[str, Callable[..., Any]]:
    """Functions for a model by their names; raises `BadRequestError` for anything else."""
    found: dict[str, Callable[..., Any]] = {}
    for tool in _listing(tools):
        if not callable(tool):
            raise BadRequestError(
                f"{_describe(tool)} is no function to call",
                hint="`run` needs functions; with schemas use `chat`.",
            )
        name = function_schema(tool)["function"]["name"]
        if name in found:
            raise BadRequestError(
                f"Two functions are called {name!r}", hint="Give each a name of its own."
            )
        found[name] = tool
    return found


def _result_of(
    call: ToolCall,
    functions: Mapping[str, Callable[..., Any]],
    on_tool: Callable[[ToolCall], bool | None] | None,
) -> str:
    """Call one function for the model; whatever happens is the text of the result."""
    if on_tool is not None and on_tool(call) is False:
        return "The user refused this call."
    function = functions.get(call.name)
    if function is None:
        return f"Error: there is no function {call.name!r}; there are {sorted(functions)}."
    try:
        return tool_result_text(call_function(function, call.arguments))
    except Exception as error:  # noqa: BLE001 (any error of a tool is the model's to read)
        _log.warning("The function %s failed", call.name, exc_info=True)
        return f"Error: {type(error).__name__}: {error}"


def _holds_file(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "file" and "file" in part


def _has_file(message: JSON) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(map(_holds_file, content))


def _token_name(token: str | None) -> str:
    """What an account that is known by its token alone is called."""
    return f"token-{_token_mark(token)[:8]}" if token else "nobody"


def _token_mark(token: str) -> str:
    import hashlib

    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()[:16]


def _resting(
    state: State, accounts: Sequence[Account], now: float, look: bool = True
) -> list[Cooldown]:
    """Who rests now; a dead token rests until its account has another one."""
    tokens = {a.username: a.token for a in accounts}

    def mark_of(name: str) -> str | None:
        return _token_mark(tokens[name]) if name in tokens else None

    return state.cooldowns(now, mark_of, look)


def _short(error: PuterError) -> str:
    """An error in the words of the log."""
    if isinstance(error, (RateLimitError, ModelRateLimitError)):
        return f"Rate limited ({error.status or 429})"
    return f"{_code_of(error)} ({error.status or '-'})"


def _is_from(model: Model, provider: str) -> bool:
    """Whether a model is of a provider, by the catalogue's name or the vendor in its names."""
    wanted = provider.lower()
    vendors = {re.split(r"[:/]", name)[0].lower() for name in model.names()}
    vendors |= {part for name in model.names() for part in re.split(r"[:/]", name.lower())[:-1]}
    return wanted == model.provider.lower() or wanted in vendors


def openai_messages(messages: Sequence[JSON]) -> Messages:
    """A history in wire form back in OpenAI's shape, each turn's calls in one message."""
    result: Messages = []
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        uses = [p for p in parts if p.get("type") == "tool_use"]
        if not uses:
            result.append(message)
            continue
        calls = [openai_call(use) for use in uses]
        result.append({"role": "assistant", "content": None, "tool_calls": calls})
    return result


_default: Puter | None = None
_default_lock = _Lock()


def _default_client() -> Puter:
    global _default
    with _default_lock:
        if _default is None:
            _default = Puter()
        return _default


def chat(prompt: Prompt, **arguments: Any) -> Reply:
    """`Puter().chat(…)` on a client that is made at the first use and kept."""
    return _default_client().chat(prompt, **arguments)


def stream(prompt: Prompt, **arguments: Any) -> Stream:
    """`Puter().stream(…)` on a client that is made at the first use and kept."""
    return _default_client().stream(prompt, **arguments)


# ======================================================================================
# 10. login · uses: errors, values, config, transport
# ======================================================================================
LOGIN_PORT = 19847  # the port that the plugin's users know
LOGIN_TIMEOUT_S = 300.0
_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>puter.py</title>
<style>body{{font:18px/1.5 system-ui,sans-serif;max-width:34rem;margin:4rem auto;padding:0 1rem}}
</style><script>history.replaceState(null, "", "/")</script></head>
<body><h1>{title}</h1><p>{text}</p></body></html>
"""


def sign_in_url(gui_base_url: str, callback_url: str) -> str:
    """Puter's page that asks the person to approve, and then calls back with a token."""
    from urllib.parse import quote

    return f"{gui_base_url}/?action=authme&redirectURL={quote(callback_url, safe='')}"


def account_of(token: str, config: Config) -> Account:
    """Ask the server whose token this is; raises `AuthError` if it is nobody's.

    Raises `AuthError` too for a temporary account when `auto_create_temp_user` is off.
    """
    transport = _Transport(config)
    try:
        answer = transport.ask("GET", f"{_api_origin(config)}/whoami", token=token)
    finally:
        transport.close()
    told = body_of(answer)
    username, is_temporary = told.get("username"), bool(told.get("is_temp"))
    if not isinstance(username, str) or not username:
        raise ServerError("The server does not say whose token this is")
    if is_temporary and not config.auto_create_temp_user:
        raise AuthError(
            f"{username} is a temporary account, and auto_create_temp_user is false",
            hint="Sign in to your own account in the browser first, then log in again.",
        )
    return Account(username, token, int(time.time() * 1000), None, is_temporary)


class _Callback:
    """What the callback does with a request: no sockets, so that a test is a table."""

    def __init__(
        self, gui_base_url: str, port: int, nonce: str, check: Callable[[str], Account]
    ) -> None:
        self.path = f"/callback/{nonce}"
        self.sign_in_url = sign_in_url(gui_base_url, f"http://127.0.0.1:{port}{self.path}")
        self._check = check
        self._lock = threading.Lock()
        self._taken = False
        self.done = threading.Event()
        self.account: Account | None = None
        self.error: PuterError | None = None

    def answer(self, method: str, target: str, host: str) -> tuple[int, str, str]:
        """(status, title, text) for a request; with status 302 the text is the address."""
        import hmac
        from urllib.parse import parse_qs, urlsplit

        if re.sub(r":\d+$", "", host.lower()) not in _LOOPBACK_NAMES:
            return 403, "Forbidden", "This page is only for this computer."
        if method != "GET":
            return 405, "Method not allowed", "Only GET is known here."
        url = urlsplit(target)
        if url.path == "/":
            return 302, "Sign in", self.sign_in_url
        if not hmac.compare_digest(url.path.encode(), self.path.encode()):
            return 404, "Not found", "There is nothing here."
        token = parse_qs(url.query).get("token", [""])[0]
        if not token:
            return 400, "No token", "Puter sent no token. Please try again."
        with self._lock:
            if self._taken:
                return (410, "Already used", "This sign-in is over; you can close the page.")
            self._taken = True
        return self._finish(token)

    def _finish(self, token: str) -> tuple[int, str, str]:
        import html

        try:
            self.account = self._check(token)
        except PuterError as error:
            self.error = error
            return 403, "Not signed in", html.escape(str(error))
        except BaseException:
            self.error = AuthError("The sign-in failed")
            raise
        name = html.escape(self.account.username)
        return 200, f"Signed in as {name}", "You can close this page."


def browser_login(
    config: Config,
    *,
    show: Callable[[str], None],
    open_browser: Callable[[str], Any] | None = None,
    port: int = LOGIN_PORT,
    timeout_s: float = LOGIN_TIMEOUT_S,
) -> Account:
    """Sign in through the person's browser; the account with its token, not yet kept.

    Args:
        show: is told the address of Puter's page, as a line for the person.
        open_browser: opens an address, such as `webbrowser.open`; None leaves it to the
            person (over SSH, with the port forwarded).
        port: where to wait for the answer on 127.0.0.1; any free one if it is taken.
        timeout_s: how long to wait for the person.

    Raises `AuthError` after the time, or when the server does not know the token.
    """
    server = _callback_server(port)
    callback = _Callback(
        config.gui_base_url,
        server.server_address[1],
        os.urandom(16).hex(),
        lambda token: account_of(token, config),
    )
    server.callback = callback
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        show(callback.sign_in_url)
        if open_browser is not None:
            open_browser(callback.sign_in_url)
        until = time.monotonic() + timeout_s
        while not callback.done.wait(0.1):  # in short waits, so that Ctrl-C ends at once
            if time.monotonic() > until:
                raise AuthError(
                    f"Nobody signed in within {timeout_s:.0f} seconds",
                    hint="Run `python -m puter login` again. If the browser is on another "
                    "computer, see `--no-browser` or `--with-token`.",
                )
    finally:
        server.shutdown()
        server.server_close()
    if callback.account is None:
        raise callback.error or AuthError("The sign-in failed")
    return callback.account


def _callback_server(port: int) -> Any:
    """An HTTP server on 127.0.0.1, on this port or any; its `callback` is set later."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # a connection that stays silent must not hold the thread

        def answer(self) -> None:
            callback: _Callback = self.server.callback  # type: ignore[attr-defined]
            host = self.headers.get("Host", "")
            try:
                self.reply(*callback.answer(self.command, self.path, host))
            finally:  # the person has the page, or did not wait for it
                if callback.account or callback.error:
                    callback.done.set()

        def reply(self, status: int, title: str, text: str) -> None:
            body = _PAGE.format(title=title, text=text) if status != 302 else ""
            self.send_response(status)
            if status == 302:
                self.send_header("Location", text)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body.encode())))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body.encode())
                self.wfile.flush()

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = answer

        def log_message(self, format: str, *args: Any) -> None:
            """Silent: the address holds the token."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        allow_reuse_address = os.name != "nt"  # on Windows it would share a taken port
        callback: _Callback

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A browser that hangs up early is no news."""

    try:
        return Server(("127.0.0.1", port), Handler)
    except OSError:
        return Server(("127.0.0.1", 0), Handler)


# ======================================================================================
# 11. openai server · uses: everything above but login
# ======================================================================================
SERVER_PORT = 11480
MAX_REQUEST_BYTES = 32 * 1024 * 1024
MAX_CONNECTIONS = 128
IDLE_TIMEOUT_S = 75.0  # between two requests on a kept connection
REQUEST_TIMEOUT_S = 30.0  # for the whole of a request to arrive
DRAIN_TIMEOUT_S = 10.0  # for what runs when the server is told to stop

# What is passed on to Puter as it is; other fields of OpenAI's say nothing to it.
_PASSED_ON = (
    *("temperature", "top_p", "reasoning_effort", "reasoning", "verbosity", "seed"),
    *("tool_choice", "parallel_tool_calls", "response_format"),
    *("presence_penalty", "frequency_penalty"),
)


class ChatRequest:
    """A chat completion that a client asks for, understood and checked."""

    def __init__(
        self,
        prompt: Messages,
        model: str,
        tools: list[JSON],
        args: JSON,
        streaming: bool = False,
        include_usage: bool = False,
        stop: tuple[str, ...] = (),
        wants_json: bool = False,
    ) -> None:
        self.prompt, self.model, self.tools, self.args = prompt, model, tools, args
        self.streaming, self.include_usage = streaming, include_usage
        self.stop, self.wants_json = stop, wants_json


def chat_request_from(body: Any, default_model: str | None) -> ChatRequest:
    """A request in OpenAI's shape as a `ChatRequest`; raises `BadRequestError`."""
    if not isinstance(body, dict):
        raise _wrong("the body is no JSON object", None)
    model = body.get("model") or default_model
    if not isinstance(model, str):
        raise _wrong("you must name a model (or set default_model in puter.json)", "model")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages must be a list with at least one message", "messages")
    if body.get("n") is not None and (body["n"] != 1 or body["n"] is True):
        raise _wrong("n must be 1: ask several times for several answers", "n")
    if body.get("functions"):
        raise _wrong("functions are long gone: use tools", "functions")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
        raise _wrong("stop must be a text or a list of texts", "stop")
    options = body.get("stream_options") or {}
    args = {k: body[k] for k in _PASSED_ON if body.get(k) is not None}
    limit = body.get("max_completion_tokens")
    limit = body.get("max_tokens") if limit is None else limit
    if limit is not None:
        limit = int(limit) if _is_number(limit) and limit == int(limit) else limit
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise _wrong("max_tokens must be a whole number, 1 or more", "max_tokens")
        args["max_tokens"] = limit
    tools, order = _chosen_tools(tool_schemas(body.get("tools")), args.get("tool_choice"))
    wanted = _json_order(body.get("response_format"))
    return ChatRequest(
        prompt=_with_orders(messages, [o for o in (order, wanted) if o]),
        model=model,
        tools=tools,
        args=args,
        streaming=body.get("stream") is True,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        stop=tuple(stop),
        wants_json=bool(wanted),
    )


def _wrong(what: str, param: str | None) -> BadRequestError:
    error = BadRequestError(f"Bad request: {what}", hint="", status=400)
    error.param = param
    return error


def _chosen_tools(tools: list[JSON], choice: Any) -> tuple[list[JSON], str]:
    """(the tools to offer, an order for the system text): most providers know no tool_choice."""
    if not tools or choice in (None, "auto"):
        return tools, ""
    if choice == "none":
        return [], ""
    if choice == "required":
        return tools, "Answer by calling at least one of the functions."
    function = choice.get("function") if isinstance(choice, dict) else None
    named = function.get("name") if isinstance(function, dict) else None
    chosen = [t for t in tools if t["function"]["name"] == named]
    if not chosen:
        raise _wrong(f"tool_choice names {named!r}, which is not among the tools", "tool_choice")
    return chosen, f"Answer by calling the function {named}."


def _json_order(response_format: Any) -> str:
    """What to ask for in the system text, since most providers know no response_format."""
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "json_object":
        return "Answer with one JSON object and nothing else: no code fence, no remarks."
    if kind == "json_schema":
        told = response_format.get("json_schema", {})
        if not isinstance(told, dict):
            raise _wrong("response_format needs a json_schema object", "response_format")
        schema = told.get("schema")
        return (
            "Answer with one JSON value and nothing else: no code fence, no remarks. "
            f"It must match this JSON schema: {json.dumps(schema)}"
        )
    if kind not in (None, "text"):
        raise _wrong(f"response_format of type {kind!r} is not known", "response_format")
    return ""


def _with_orders(messages: list[Any], orders: Sequence[str]) -> Messages:
    """The messages with a system message behind those that open the history."""
    if not orders:
        return messages
    count = 0
    while count < len(messages) and isinstance(messages[count], dict):
        if messages[count].get("role") not in ("system", "developer"):
            break
        count += 1
    order = {"role": "system", "content": "\n".join(orders)}
    return [*messages[:count], order, *messages[count:]]


class StopText:
    """Ends a text at the first of some sequences, also when one spans several pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What may be shown now; the start of what could become a sequence is held back."""
        if not self._stops or self.found:
            return "" if self.found else text
        text, self._held = self._held + text, ""
        places = [place for s in self._stops if (place := text.find(s)) >= 0]
        keep = max(_overlap(text, s) for s in self._stops)
        # A sequence that may yet begin before the one found would end the text earlier.
        if places and min(places) <= len(text) - keep:
            self.found = True
            return text[: min(places)]
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back and turned out to be text."""
        held, self._held = self._held, ""
        places = [place for s in self._stops if (place := held.find(s)) >= 0]
        self.found = self.found or bool(places)
        return held[: min(places)] if places else held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text could be the start of the sequence."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def completion_head(kind: str, model: str, now: float) -> JSON:
    """What every object of one answer begins with."""
    return {
        "id": f"chatcmpl-{os.urandom(12).hex()}",
        "object": kind,
        "created": int(now),
        "model": model,
    }


def usage_object(usage: Usage) -> JSON | None:
    """The usage in OpenAI's names, or None when the provider told nothing."""
    if usage.input_tokens is None and usage.output_tokens is None:
        return None
    # In OpenAI's shape cached tokens are part of the prompt; some providers count them beside.
    prompt = max(usage.input_tokens or 0, (usage.total_tokens or 0) - (usage.output_tokens or 0))
    told: JSON = {
        "prompt_tokens": prompt,
        "completion_tokens": usage.output_tokens or 0,
        "total_tokens": usage.total_tokens or 0,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens or 0},
    }
    return told if usage.cost_usd is None else {**told, "cost_usd": usage.cost_usd}


def completion_object(reply: Reply, asked: ChatRequest, now: float) -> JSON:
    """A whole `chat.completion`; raises `ReplyError` when JSON was wanted and is not."""
    stop = StopText(asked.stop)
    text = stop.feed(reply.text) + stop.rest()
    if asked.wants_json and not reply.tool_calls and reply.finish_reason != "length":
        text = json_text(text)
    content = text or (None if reply.tool_calls else "")
    message: JSON = {"role": "assistant", "content": content, "refusal": None}
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["tool_calls"] = [call_object(call) for call in reply.tool_calls]
    finish = "stop" if stop.found else reply.finish_reason
    usage = usage_object(reply.usage)
    return {
        **completion_head("chat.completion", reply.model, now),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        **({"usage": usage} if usage else {}),
    }


def json_text(text: str) -> str:
    """The JSON of an answer, out of a code fence if need be; raises `ReplyError`."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    inner = fenced.group(1) if fenced else text
    try:
        json.loads(inner, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ReplyError(
            f"The model was asked for JSON and answered something else ({error})", raw=text
        ) from None
    return inner


def completion_chunks(
    chunks: Iterable[Chunk], finish_reason: Callable[[], str], asked: ChatRequest, head: JSON
) -> Iterator[JSON]:
    """The frames of a streamed answer, as its chunks come.

    `finish_reason` is asked when the chunks have ended. With a `stop` text found and no wish
    for the usage, the rest of the chunks is not read.
    """
    if asked.include_usage:
        head = {**head, "usage": None}

    def frame(delta: JSON, finish: str | None = None) -> JSON:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**head, "choices": [choice]}

    role: JSON = {"role": "assistant"}
    stop, usage, calls = StopText(asked.stop), Usage(), 0
    for chunk in chunks:
        delta: JSON = {}
        if chunk.type == "usage" and chunk.usage:
            usage = chunk.usage
        elif stop.found:
            continue
        elif chunk.type == "text" and (text := stop.feed(chunk.text)):
            delta = {"content": text}
        elif chunk.type == "reasoning":
            delta = {"reasoning_content": chunk.text}
        elif chunk.tool_call:
            if held := stop.rest():
                yield frame({**role, "content": held})
                role = {}
            delta = {"tool_calls": [{"index": calls, **call_object(chunk.tool_call)}]}
            calls += 1
        if delta:
            yield frame({**role, **delta})
            role = {}
        if stop.found and not asked.include_usage:
            break
    if held := stop.rest():
        yield frame({**role, "content": held})
        role = {}
    yield frame({**role, "content": ""} if role else {}, "stop" if stop.found else finish_reason())
    told = usage_object(usage)
    if asked.include_usage and told:
        yield {**head, "choices": [], "usage": told}


_STATUS_BY_KIND: tuple[tuple[type[PuterError], int, str], ...] = (
    (ModelNotFoundError, 404, "invalid_request_error"),
    (BadRequestError, 400, "invalid_request_error"),
    (AuthError, 401, "authentication_error"),
    (CreditError, 402, "insufficient_quota"),
    (SubscriptionError, 402, "insufficient_quota"),
    (AccessError, 403, "permission_error"),
    (RateLimitError, 429, "rate_limit_error"),
    (ModelRateLimitError, 429, "rate_limit_error"),
    (AllAccountsOnCooldownError, 429, "rate_limit_error"),
    (ProviderAuthError, 502, "server_error"),
    (ModelUnavailableError, 503, "server_error"),
    (RequestTimeoutError, 504, "server_error"),
    (ReplyError, 502, "server_error"),
    (StreamError, 502, "server_error"),
    (NetworkError, 502, "server_error"),
    (ServerError, 502, "server_error"),
)
_CODE_BY_KIND: tuple[tuple[type[PuterError], str], ...] = (
    (ModelNotFoundError, "model_not_found"),
    (AuthError, "not_signed_in"),
    (RequestTimeoutError, "timeout"),
    (AllAccountsOnCooldownError, "too_many_requests"),
)


def error_object(error: PuterError) -> tuple[int, JSON, dict[str, str]]:
    """(status, body in OpenAI's shape, headers) for an error."""
    status, kind = next(
        ((s, k) for cls, s, k in _STATUS_BY_KIND if isinstance(error, cls)), (500, "server_error")
    )
    if isinstance(error, (BadRequestError, ServerError)) and (error.status or 0) >= 400:
        status = error.status or status
    code = next((c for cls, c in _CODE_BY_KIND if isinstance(error, cls)), None)
    code = code if isinstance(error, ModelNotFoundError) else error.code or code
    headers = {}
    if status in (429, 503):
        wait_s = error.retry_after_s
        if wait_s is None:
            wait_s = RATE_WINDOW_S if error.scope == "account" else 60.0
        headers["Retry-After"] = str(max(1, int(wait_s + 0.999)))
    param = "model" if isinstance(error, ModelNotFoundError) else None
    if isinstance(error, BadRequestError):
        param = error.param
        code = code or (f"invalid_{param}" if param else None)
    # A stream error's hint is about Python's `.reply`.
    message = error.message if isinstance(error, StreamError) else str(error)
    for name in {a.account for a in error.attempts} | {error.account or ""} - {""}:
        who = rf"\b(on|account) {re.escape(name)}\b"
        message = re.sub(who, rf"\1 {_header_text(_short_name(name))}", message)
    body = {"message": message, "type": kind, "param": param, "code": code}
    return status, {"error": body}, headers


def model_object(model: Model) -> JSON:
    """A model in OpenAI's shape, with what else is known of it."""
    created = 0
    if model.released:
        with suppress(ValueError):  # a date in a form of its own is no reason to fail
            import calendar

            created = calendar.timegm(time.strptime(model.released[:10], "%Y-%m-%d"))
    return {
        "id": model.id,
        "object": "model",
        "created": created,
        "owned_by": model.provider or "puter",
        "name": model.name,
        "aliases": list(model.aliases),
        "context_length": model.context,
        "max_completion_tokens": model.max_tokens,
        "free": model.free,
    }


def _in_address(host: str) -> str:
    """A host as it stands in an address: an IPv6 one in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


class Gatekeeper:
    """Who may call: decisions on the head of a request, without sockets."""

    def __init__(
        self, host: str, api_key: str | None = None, allowed_origins: Collection[str] = ()
    ) -> None:
        self.host = host
        self.api_key = api_key
        self.allowed_origins = frozenset(allowed_origins)

    def refusal(
        self, path: str, host: str | None, origin: str | None, authorization: str
    ) -> tuple[int, str, str] | None:
        """(status, code, message) for a caller who may not; None for one who may."""
        if not self._knows_host(host):
            return (403, "forbidden_host", f"This server does not answer to the name {host!r}")
        if origin is not None and not self.allows_origin(origin, host):
            return (
                403,
                "forbidden_origin",
                f"Pages of {origin[:100]} may not call (--allow-origin lets them)",
            )
        if self.api_key is not None and path not in ("/", "/health"):
            import hmac

            scheme, _, given = authorization.strip().partition(" ")
            key = given.strip().encode("utf-8", "replace")
            fine = hmac.compare_digest(key, self.api_key.encode("utf-8", "replace"))
            if not fine or scheme.lower() != "bearer":
                return 401, "invalid_api_key", "The API key is wrong or missing"
        return None

    def _knows_host(self, host: str | None) -> bool:
        """Against DNS rebinding; with an open bind the key is the guard."""
        name = re.sub(r":\d+$", "", (host or "").lower())
        bound = _in_address(self.host).lower()
        return name in _LOOPBACK_NAMES or name == bound or self.host in ("0.0.0.0", "::")

    def allows_origin(self, origin: str, host: str | None) -> bool:
        """Whether a web page of this origin may call."""
        own = origin.lower() == f"http://{(host or '').lower()}"
        return own or not self.allowed_origins.isdisjoint((origin, "*"))


class _DisconnectWatcher:
    """One thread that looks at the sockets of running requests: who hung up, who is too slow."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[int, tuple[Any, Callable[[], float | None], Any]] = {}
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    @contextmanager
    def over(
        self, sock: Any, act: Callable[[], None], until: Callable[[], float | None] = lambda: None
    ) -> Iterator[None]:
        """While inside: act once when the client hangs up, or when it is later than `until()`."""
        key = sock.fileno()
        with self._lock:
            self._entries[key] = (sock, until, act)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
            self._wake.set()
        try:
            yield
        finally:
            with self._lock:
                self._entries.pop(key, None)

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._wake.set()

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait()
            with self._lock:
                entries = dict(self._entries)
                if not entries and not self._closed:
                    self._wake.clear()
            gone = _hung_up([sock for sock, _, _ in entries.values()])
            now = time.monotonic()
            for key, (sock, until, act) in entries.items():
                limit = until()
                if sock in gone or (limit is not None and now > limit):
                    with self._lock:
                        due = self._entries.get(key, (None,))[0] is sock
                        if due:
                            del self._entries[key]
                    if due:
                        act()
            time.sleep(0.1)


def _hung_up(sockets: Sequence[Any]) -> set[Any]:
    """Those whose other side has closed; bytes that wait to be read say that it has not."""
    import select
    import socket

    numbers = {s.fileno(): s for s in sockets if s.fileno() >= 0}
    gone = {s for s in sockets if s.fileno() < 0}
    if hasattr(select, "poll"):
        poller = select.poll()
        for number in numbers:
            poller.register(number, select.POLLIN)
        readable = [number for number, _ in poller.poll(0)]
    else:
        readable = select.select(list(numbers), [], [], 0)[0] if numbers else []
    for number in readable:
        try:
            if not numbers[number].recv(1, socket.MSG_PEEK):
                gone.add(numbers[number])
        except OSError:
            gone.add(numbers[number])
    return gone


class OpenAIServer:
    """An OpenAI-compatible HTTP server on one shared `Puter` client.

    Args:
        client: the client that asks Puter; it stays the caller's to close.
        host, port: where to listen; port 0 takes a free one. A host other than this computer
            needs an `api_key`, else `ConfigError`.
        api_key: what callers must send as a bearer token; None takes anything.
        allowed_origins: web origins whose pages may call ("*" for all).
        max_connections: more at once are turned away with 503.

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
    ) -> None:
        if _in_address(host) not in _LOOPBACK_NAMES and not api_key:
            raise ConfigError(
                f"Listening on {host} without an API key would let everybody on the network use "
                "your account",
                hint="Add --api-key, or listen on 127.0.0.1.",
            )
        self.client = client
        origins = frozenset(origin.rstrip("/") for origin in allowed_origins)
        self.gatekeeper = Gatekeeper(host, api_key, origins)
        self.watch = _DisconnectWatcher()
        self.stopping = threading.Event()
        self._working: set[Any] = set()
        self._idle = threading.Condition()
        self._server = _openai_http_server(self, host, port, max_connections)
        self.port: int = self._server.server_address[1]
        self.url = f"http://{_in_address(host)}:{self.port}/v1"
        self._thread: threading.Thread | None = None

    def __enter__(self) -> OpenAIServer:  # noqa: PYI034
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop(0)

    def start(self) -> OpenAIServer:
        """Answer requests on a thread of its own."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()
        return self

    def stop(self, drain_s: float = DRAIN_TIMEOUT_S) -> None:
        """Take no more work, let what runs end for so many seconds, then close."""
        self.stopping.set()
        if self._thread is not None:
            self._server.shutdown()
        self._server.socket.close()  # who comes now is refused, not left waiting
        self._server.close_connections(self._working)
        with self._idle:
            self._idle.wait_for(lambda: not self._working, drain_s)
        self._server.close_connections()
        with self._idle:  # the watch sees them closed, and ends their calls to Puter
            self._idle.wait_for(lambda: not self._working, 1.0)
        self._server.server_close()
        self.watch.close()

    @property
    def busy(self) -> int:
        """How many requests are being answered."""
        return len(self._working)

    @contextmanager
    def working(self, connection: Any) -> Iterator[None]:
        """Notes a connection whose request is being answered."""
        with self._idle:
            self._working.add(connection)
        try:
            yield
        finally:
            with self._idle:
                self._working.discard(connection)
                self._idle.notify_all()


def _openai_http_server(app: OpenAIServer, host: str, port: int, max_connections: int) -> Any:
    """The standard library's threading server, with our handler and limits."""
    import socket
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    handler = type("Handler", (_GatewayHandler, BaseHTTPRequestHandler), {"app": app})
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    own = {"address_family": family, "max_connections": max_connections}
    return type("Server", (_BoundedServer, ThreadingHTTPServer), own)((host, port), handler)


class _BoundedServer:
    """What the OpenAI server adds to `ThreadingHTTPServer`: no more than so many connections."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    allow_reuse_address = os.name != "nt"  # on Windows it would share a taken port
    max_connections = MAX_CONNECTIONS
    socket: Any
    server_address: Any

    def __init__(self, *args: Any) -> None:
        self._open: set[Any] = set()
        self._lock = threading.Lock()
        super().__init__(*args)

    def server_bind(self) -> None:
        """As the base class, but without its look-up of the host's full name."""
        import socket

        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, unless there are too many."""
        import socket

        with self._lock:
            full = len(self._open) >= self.max_connections
            if not full:
                self._open.add(request)
        if full:
            self._turn_away(request)
        else:
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            super().process_request(request, client_address)  # type: ignore[misc]

    def _turn_away(self, request: Any) -> None:
        message = f"All {self.max_connections} connections are in use"
        body = json.dumps(_error_body(message, "server_error", "overloaded")).encode()
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nRetry-After: 2\r\nConnection: close\r\n\r\n"
        )
        with suppress(OSError):  # who is turned away may be gone already
            request.settimeout(1)
            request.sendall(head.encode() + body)
        super().shutdown_request(request)  # type: ignore[misc]

    def shutdown_request(self, request: Any) -> None:
        """A connection is over."""
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)  # type: ignore[misc]

    def close_connections(self, keep: Collection[Any] = ()) -> None:
        """Hang up on everybody but these."""
        with self._lock:
            connections = [c for c in self._open if c not in keep]
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(_SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A fault of ours: into the log, with its traceback. Who hangs up is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            _log.error("A connection failed")


def _error_body(message: str, kind: str, code: str | None) -> JSON:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


_ROUTES = {
    "/": ("GET", "HEAD"),
    "/health": ("GET", "HEAD"),
    "/v1/models": ("GET", "HEAD"),
    "/v1/chat/completions": ("POST",),
}


class _ClientGoneError(ConnectionError):
    """The client does not take what is sent to it."""


class _GatewayHandler:
    """Reads a request, asks the functions above, and writes; mixed into the library's handler."""

    app: OpenAIServer
    command: str
    path: str
    headers: Any
    connection: Any
    rfile: Any
    wfile: Any
    request_version: str
    parse_request: Callable[[], bool]
    send_response: Callable[[int], None]
    send_header: Callable[[str, str], None]
    end_headers: Callable[[], None]
    protocol_version = "HTTP/1.1"
    server_version = f"puter.py/{__version__}"
    sys_version = ""
    stuck_at: float | None = None  # when a write that is under way has taken too long
    wbufsize = 64 * 1024  # one packet for head and body; streams flush each frame
    timeout = IDLE_TIMEOUT_S

    def handle_one_request(self) -> None:
        """As the base class, with a time limit for the whole request, and one router."""
        self.close_connection = True
        self.sent = False
        self.requestline, self.request_version, self.command = "", "HTTP/1.1", ""
        self.connection.settimeout(IDLE_TIMEOUT_S)
        try:
            while self.rfile.peek(1)[:1] in (b"\r", b"\n"):
                self.rfile.read(1)  # blank lines before a request are to be skipped
            if not self.rfile.peek(1):
                return
            limit = time.monotonic() + REQUEST_TIMEOUT_S
            with self.app.watch.over(self.connection, self._hang_up, lambda: limit):
                self.raw_requestline = self.rfile.readline(65_537)
                if len(self.raw_requestline) > 65_536:
                    self._wrong(414, "The address is too long")
                    return
                if not self.parse_request():
                    return
                refused, body = self._read()
            if not refused:
                with self.app.working(self.connection):
                    self._route(body)
            self.wfile.flush()
        except OSError:
            self.close_connection = True  # the client is gone or stuck: nobody to tell

    def handle_expect_100(self) -> bool:
        """As the base class; what waits for the word must get it now."""
        going_on = bool(super().handle_expect_100())  # type: ignore[misc]
        self.wfile.flush()
        return going_on

    def _hang_up(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(_SHUT_RDWR)

    def _read(self) -> tuple[bool, bytes]:
        """(whether it was refused, the body): checks the caller before reading."""
        path = self.path.partition("?")[0]
        refusal = self.app.gatekeeper.refusal(
            path,
            self.headers.get("Host"),
            self.headers.get("Origin"),
            self.headers.get("Authorization", ""),
        )
        is_preflight = self.command == "OPTIONS" and self.headers.get("Origin")
        if refusal and not (is_preflight and refusal[0] == 401):
            status, code, message = refusal
            kind = "authentication_error" if status == 401 else "permission_error"
            self.close_connection = True
            self._json(status, _error_body(message, kind, code))
            return True, b""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return self._wrong(411, "Send a Content-Length"), b""
        for name in ("Content-Length", "Host", "Authorization"):
            if len(set(self.headers.get_all(name, ()))) > 1:
                return self._wrong(400, f"There are several {name} headers"), b""
        length = self.headers.get("Content-Length", "0")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            return self._wrong(400, "Content-Length is no number"), b""
        if int(length) > MAX_REQUEST_BYTES:
            return self._wrong(413, f"A request may hold {MAX_REQUEST_BYTES} bytes"), b""
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionAbortedError("the client hung up in the middle of its request")
        return False, body

    def _route(self, body: bytes) -> None:
        """Find what answers; a failure before the first byte is a status of its own."""
        from urllib.parse import unquote

        path = unquote(self.path.partition("?")[0])
        is_model = path.startswith("/v1/models/")
        methods = ("GET", "HEAD") if is_model else _ROUTES.get(path, ())
        try:
            if self.command == "OPTIONS" and self.headers.get("Origin"):
                self._send(204, b"", "text/plain")
            elif not methods:
                self._wrong(404, f"There is no {path[:200]} here; the base is /v1", close=False)
            elif self.command not in methods:
                self._wrong(
                    405,
                    f"{self.command[:20]} is not for {path[:200]}",
                    {"Allow": ", ".join(methods)},
                    close=False,
                )
            elif is_model:
                found = self.app.client.model(path[len("/v1/models/") :])
                self._json(200, model_object(found))
            elif path == "/v1/chat/completions":
                self._complete(body)
            elif path == "/v1/models":
                data = [model_object(m) for m in self.app.client.models()]
                self._json(200, {"object": "list", "data": data})
            else:
                status = {"status": "ok", "version": __version__, "base_url": self.app.url}
                self._json(200, status)
        except PuterError as error:
            self._fail(error)
        except _ClientGoneError:
            raise
        except Exception:  # noqa: BLE001 (it is told and logged, and the server lives)
            _log.error("A request could not be answered")
            self._fail(PuterError("An internal error of puter.py; its log says more"))

    def _complete(self, body: bytes) -> None:
        """Answer a chat completion, as a whole or as a stream."""
        asked = chat_request_from(_json_body(body), self.app.client.config.default_model)
        ask = self.app.client._ask(asked.prompt, asked.model, tools=asked.tools, args=asked.args)
        if asked.streaming and not asked.wants_json:
            self._stream(asked, Stream(self.app.client, ask))
            return
        handle = _Cancellation()
        with self.app.watch.over(self.connection, handle.close):
            reply = self.app.client._answer(ask, handle)
        whole = completion_object(reply, asked, time.time())
        if asked.streaming:
            answered = _as_answered(reply, whole)
            self._stream_of(asked, chunks_of(answered), answered)
        else:
            self._json(200, whole, _answer_headers(reply))

    def _stream(self, asked: ChatRequest, stream: Stream) -> None:
        def wake() -> None:  # this thread, which then cleans up itself
            stream._handle.close()
            self._hang_up()

        # The watch looks after a client that takes nothing; asking the socket to do so costs
        # two calls of the system for every token.
        with stream, self.app.watch.over(self.connection, wake, lambda: self.stuck_at):
            stream._start()
            self.connection.settimeout(None)
            self._stream_of(asked, stream, stream)

    def _stream_of(self, asked: ChatRequest, chunks: Iterable[Chunk], who: Reply | Stream) -> None:
        """Write frames as Server-Sent Events."""

        def finish_reason() -> str:
            return (who.reply if isinstance(who, Stream) else who).finish_reason

        head = completion_head("chat.completion.chunk", who.model, time.time())
        self._begin_events(_answer_headers(who))
        for frame in completion_chunks(chunks, finish_reason, asked, head):
            more = isinstance(who, Stream) and who._has_more
            self._event(json.dumps(frame), more)
        self._event("[DONE]", more=True)
        self._end_events()

    def _begin_events(self, headers: Mapping[str, str]) -> None:
        self.sent = True
        self.chunked = self.request_version != "HTTP/1.0"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        if self.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        self._end_head(headers)

    def _event(self, data: str, more: bool = False) -> None:
        event = f"data: {data}\n\n".encode()
        framed = b"%x\r\n%b\r\n" % (len(event), event) if self.chunked else event
        self._write(framed, more)

    def _write(self, data: bytes, more: bool = False) -> None:
        """Send to the client; whatever is wrong with it is no fault of the answer.

        With `more` to come at once, it may wait for that.
        """
        self.stuck_at = time.monotonic() + IDLE_TIMEOUT_S
        try:
            self.wfile.write(data)
            if not more:
                self.wfile.flush()
        except OSError as error:
            raise _ClientGoneError(str(error)) from error
        finally:
            self.stuck_at = None

    def _end_events(self) -> None:
        self._write(b"0\r\n\r\n" if self.chunked else b"")

    def _fail(self, error: PuterError) -> None:
        """A status of its own; once bytes are out, an error frame and no proper end."""
        status, body, headers = error_object(error)
        _log.info("Server: %d %s", status, error.message)
        if not self.sent:
            self._json(status, body, headers)
            return
        self.close_connection = True
        self._event(json.dumps(body))

    def _wrong(
        self,
        status: int,
        message: str,
        headers: Mapping[str, str] | None = None,
        close: bool = True,
    ) -> bool:
        self.close_connection = self.close_connection or close
        self._json(status, _error_body(message, "invalid_request_error", None), headers)
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The base class's own refusals (a broken head), in OpenAI's shape."""
        self._wrong(int(code), message or "The request cannot be read")

    def _json(self, status: int, body: JSON, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(body).encode(), "application/json", headers)

    def _send(
        self, status: int, body: bytes, content_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self.sent = True
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self._end_head(headers or {})
        self._write(b"" if self.command == "HEAD" else body)

    def _end_head(self, headers: Mapping[str, str]) -> None:
        for name, value in {**headers, **self._cors()}.items():
            self.send_header(name, value)
        self.end_headers()

    def _cors(self) -> dict[str, str]:
        """Headers for a page that may call."""
        headers: Any = getattr(self, "headers", None) or {}
        origin, host = headers.get("Origin"), headers.get("Host")
        if origin is None or not self.app.gatekeeper.allows_origin(origin, host):
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, HEAD, POST, OPTIONS",
            "Access-Control-Allow-Headers": headers.get("Access-Control-Request-Headers")
            or "authorization, content-type",
            "Access-Control-Expose-Headers": "x-puter-model, x-puter-account, "
            "x-puter-attempts, retry-after",
            "Vary": "Origin",
        }

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug("Server: %s", format % args)


def _json_body(body: bytes) -> Any:
    """The JSON of a request; raises `BadRequestError` for what is none, or nested too deeply."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"the body is not valid JSON ({error})", None) from None


def _as_answered(reply: Reply, whole: JSON) -> Reply:
    """The reply with the text that its completion object carries (cut, or out of its fence)."""
    choice = whole["choices"][0]
    return replace(
        reply, text=choice["message"]["content"] or "", finish_reason=choice["finish_reason"]
    )


def _short_name(name: str) -> str:
    """An account's name for those who need not know it: its first letters."""
    return f"{name[: min(3, max(1, len(name) // 2))]}..."


def _answer_headers(who: Reply | Stream) -> dict[str, str]:
    """Who answered; of the account's name only the first letters."""
    return {
        "x-puter-model": _header_text(who.model),
        "x-puter-account": _header_text(_short_name(who.account)),
        "x-puter-attempts": str(len(who.attempts)),
    }


def _header_text(text: str) -> str:
    return re.sub(r"[^ -~]", "?", text)


# ======================================================================================
# 12. mcp server · uses: everything above but login and the openai server
# ======================================================================================
# The specification: https://modelcontextprotocol.io/specification (2024-11-05 to 2026-07-28).
MCP_HANDSHAKE_VERSIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
MCP_STATELESS_VERSION = "2026-07-28"
_MCP_VERSIONS = [MCP_STATELESS_VERSION, *MCP_HANDSHAKE_VERSIONS[::-1]]  # newest first
MCP_CALL_LIMIT_S = 55.0  # Claude Desktop gives a call up after 60 s without progress
_MCP_META = "io.modelcontextprotocol/"
_MCP_BATCH_VERSION = "2025-03-26"  # the only one with batches
_MCP_TICK_S = 5.0  # a word of progress when nothing else comes
_MCP_TELL_S = 0.25  # and at most so often while text comes
_MCP_MODELS_TTL_MS = 3_600_000
_EMPTY_LISTS = {
    "prompts/list": "prompts",
    "resources/list": "resources",
    "resources/templates/list": "resourceTemplates",
}

_MCP_MODEL_KEYS = (
    *("id", "name", "provider", "context", "max_tokens", "inputs", "tools", "free"),
    *("input_usd_per_million", "output_usd_per_million"),
)
_NULLABLE_NUMBER = {"type": ["number", "null"]}
_NULLABLE_TEXT = {"type": ["string", "null"]}
_NULLABLE_FLAG = {"type": ["boolean", "null"]}


def _object_schema(required: Sequence[str] = (), **properties: JSON) -> JSON:
    schema: JSON = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": list(required)} if required else schema


MCP_TOOLS: list[JSON] = [
    {
        "name": "puter-chat",
        "title": "Ask a model",
        "description": "Ask one of the 500+ AI models of Puter.com (Claude, GPT, Gemini, "
        "DeepSeek, ...) and get its answer. puter-models lists them.",
        "inputSchema": _object_schema(
            ["message"],
            message={"type": "string", "description": "What to ask."},
            model={"type": "string", "description": "A model's id or alias."},
            system={"type": "string", "description": "A system text."},
            temperature={"type": "number", "minimum": 0, "maximum": 2},
            max_tokens={"type": "integer", "minimum": 1, "description": "Longest answer."},
        ),
        "outputSchema": _object_schema(
            ["text", "model", "account", "finish_reason", "partial", "usage"],
            text={"type": "string"},
            reasoning={"type": "string"},
            model={"type": "string", "description": "The model that answered."},
            account={"type": "string"},
            finish_reason={"type": "string"},
            partial={"type": "boolean", "description": "Cut off by the time limit."},
            usage={"type": "object"},
        ),
    },
    {
        "name": "puter-models",
        "title": "List models",
        "description": "List the AI models that puter-chat can ask, with their prices.",
        "inputSchema": _object_schema(
            provider={"type": "string", "description": "Such as anthropic, openai, google."},
            free={"type": "boolean", "description": "Only free (true) or paid (false) ones."},
            search={"type": "string", "description": "Only those with this in a name."},
        ),
        "outputSchema": _object_schema(
            ["models", "count"],
            count={"type": "integer"},
            models={
                "type": "array",
                "items": _object_schema(
                    ["id", "free"],
                    id={"type": "string"},
                    name={"type": "string"},
                    provider={"type": "string"},
                    context=_NULLABLE_NUMBER,
                    max_tokens=_NULLABLE_NUMBER,
                    inputs={"type": ["array", "null"], "items": {"type": "string"}},
                    tools=_NULLABLE_FLAG,
                    free={"type": "boolean"},
                    input_usd_per_million=_NULLABLE_NUMBER,
                    output_usd_per_million=_NULLABLE_NUMBER,
                ),
            },
        ),
    },
    {
        "name": "puter-account",
        "title": "Show the accounts",
        "description": "Show the signed-in Puter accounts and the credit that each has left.",
        "inputSchema": _object_schema(),
        "outputSchema": _object_schema(
            ["accounts"],
            accounts={
                "type": "array",
                "items": _object_schema(
                    ["username", "active"],
                    username={"type": "string"},
                    active={"type": "boolean"},
                    temporary={"type": "boolean"},
                    unit=_NULLABLE_TEXT,
                    remaining=_NULLABLE_NUMBER,
                    allowance=_NULLABLE_NUMBER,
                    error=_NULLABLE_TEXT,
                ),
            },
        ),
    },
]
for _tool in MCP_TOOLS:  # none changes anything but the credit; all ask the network
    _tool["annotations"] = {
        "readOnlyHint": True,
        "destructiveHint": False,
        "idempotentHint": _tool["name"] != "puter-chat",
        "openWorldHint": True,
    }


class _RpcError(Exception):
    """A JSON-RPC error to answer with."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.body: JSON = {"code": code, "message": message}
        if data is not None:
            self.body["data"] = data


class _McpCall:
    """One request in work: how it is told of, cancelled, or stopped when its time is over."""

    def __init__(self, version: str, progress_token: Any, notify: Callable[[JSON], None]) -> None:
        self.version = version
        self.cancelled = threading.Event()
        self.out_of_time = threading.Event()
        self.said: list[str] = []  # the answer's text so far
        self._token = progress_token if _is_rpc_id(progress_token) else None
        self._notify = notify
        self._progress = 0.0
        self._lock = threading.Lock()
        self._stream: Stream | None = None

    @property
    def tells(self) -> bool:
        """Whether the client asked for progress."""
        return self._token is not None

    def works_on(self, stream: Stream) -> None:
        """What must be closed when the call is stopped."""
        with self._lock:
            self._stream = stream
        if self.cancelled.is_set():
            stream.close()

    def cancel(self) -> None:
        """The client does not want it any more; there will be no answer."""
        self.cancelled.set()
        self.stop()

    def stop(self) -> bool:
        """End the request to Puter; whether there was one that can be ended."""
        with self._lock:
            stream = self._stream
        if stream is not None:
            stream.close()
        return stream is not None

    def end(self) -> None:
        """The answer is about to go out: no word of progress after it."""
        with self._lock:
            self._token = None

    def tell(self) -> None:
        """A progress notification, if the client asked for them."""
        with self._lock:  # the numbers must not come out of order
            if self._token is None or self.cancelled.is_set():
                return
            self._progress += 1
            params = {"progressToken": self._token, "progress": self._progress}
            if self.version != "2024-11-05":
                params["message"] = f"{sum(map(len, self.said))} characters so far"
            method = "notifications/progress"
            self._notify({"jsonrpc": "2.0", "method": method, "params": params})


class McpServer:
    """The protocol, without stdin and stdout: lines in, messages out.

    `make_client` is called when a tool needs the client first; `write` is given each message
    to send (a dict, or a list for a batch), from any thread.
    """

    def __init__(
        self,
        make_client: Callable[[], Puter],
        write: Callable[[Any], None],
        call_limit_s: float = MCP_CALL_LIMIT_S,
    ) -> None:
        self._make_client = make_client
        self._write = write
        self._call_limit_s = call_limit_s
        self._client: Puter | None = None
        self._lock = threading.RLock()
        self._running: dict[tuple[bool, str | int], _McpCall] = {}
        self._version = MCP_HANDSHAKE_VERSIONS[-1]  # until the client asks for another
        self._initialized = False

    def receive(self, line: bytes) -> None:
        """Take one line; its answer is written now, or later from a thread."""
        if not line.strip():
            return
        try:
            message = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        except (ValueError, RecursionError):
            self._write(_rpc_failure(None, _RpcError(-32700, "This is no JSON")))
            return
        if isinstance(message, list):
            self._batch(message)
        else:
            self._take(message, self._write)

    def _take(self, message: Any, reply: Callable[[JSON], None]) -> threading.Thread | None:
        """Answer a message, a call to a tool on a thread of its own (which is given back)."""
        is_call = isinstance(message, dict) and message.get("method") == "tools/call"
        call = self._registered(message) if is_call else None

        def work() -> None:
            try:
                answer = self.answer(message, call)
            finally:
                if call is not None:
                    call.end()
                    self._forget(message.get("id"), call)
            if answer is not None:
                reply(answer)

        if is_call:
            return self._in_thread(work)
        work()
        return None

    def _registered(self, message: JSON) -> _McpCall:
        """Notes a call before its thread runs, so that its cancellation finds it."""
        meta, version = self._meta_and_version(message.get("params"))
        call = _McpCall(version, meta.get("progressToken"), self._write)
        request_id: Any = message.get("id")
        if _is_rpc_id(request_id):
            with self._lock:
                self._running[_rpc_key(request_id)] = call
        return call

    def close(self) -> None:
        """The client is gone: stop what runs."""
        with self._lock:
            running = list(self._running.values())
        for call in running:
            call.cancel()

    def answer(self, message: Any, call: _McpCall | None = None) -> JSON | None:
        """The reply to one message, or None when there is to be none."""
        try:
            kind = _rpc_kind(message)
        except _RpcError as error:
            given = message.get("id") if isinstance(message, dict) else None
            return _rpc_failure(given, error)
        if kind == "response":
            return None
        if kind == "notification":
            self._notified(message)
            return None
        try:
            result = self._result(message, call)
        except _RpcError as error:
            return _rpc_failure(message["id"], error)
        except Exception:  # noqa: BLE001 (it is told and logged, and the server lives)
            _log.error("A request could not be answered")
            return _rpc_failure(message["id"], _RpcError(-32603, "Internal error"))
        if result is None:
            return None
        return {"jsonrpc": "2.0", "id": message["id"], "result": result}

    def _batch(self, messages: list[Any]) -> None:
        """Several messages in one line, which one version of the protocol had."""
        if not messages or not self._initialized or self._version != _MCP_BATCH_VERSION:
            why = "Batches are not part of this version of the protocol"
            self._write(_rpc_failure(None, _RpcError(-32600, why)))
            return
        replies: list[JSON] = []
        threads = [self._take_from_batch(m, replies.append) for m in messages]

        def finish() -> None:
            for thread in threads:
                if thread is not None:
                    thread.join()
            if replies:
                self._write(replies)

        self._in_thread(finish)

    def _take_from_batch(
        self, message: Any, reply: Callable[[JSON], None]
    ) -> threading.Thread | None:
        if isinstance(message, dict) and message.get("method") == "initialize":
            error = _RpcError(-32600, "initialize must not be part of a batch")
            reply(_rpc_failure(message.get("id"), error))
            return None
        return self._take(message, reply)

    @staticmethod
    def _in_thread(work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def _notified(self, message: JSON) -> None:
        params = message.get("params")
        if message["method"] == "notifications/cancelled" and isinstance(params, dict):
            given: Any = params.get("requestId")
            with self._lock:
                call = self._running.get(_rpc_key(given)) if _is_rpc_id(given) else None
            if call is not None:
                call.cancel()

    def _result(self, message: JSON, call: _McpCall | None) -> JSON | None:
        """The result of a request; raises `_RpcError`."""
        method, params = message["method"], message.get("params") or {}
        if method == "initialize":
            return self._initialize(params)
        meta, version = self._meta_and_version(params)
        is_stateless = version == MCP_STATELESS_VERSION
        if is_stateless:
            _check_envelope(meta)
        elif method == "server/discover":
            raise _RpcError(-32602, f"params._meta needs {_MCP_META}protocolVersion")
        if method == "tools/call":
            result = self._call(params, call or self._registered(message))
        else:
            result = mcp_list_result(method, params, version)
        if result is not None and is_stateless:
            result = {"resultType": "complete", **result, "_meta": _server_stamp()}
        return result

    def _meta_and_version(self, params: Any) -> tuple[JSON, str]:
        """A request's `_meta`, and the version of the protocol that it speaks."""
        meta = params.get("_meta") if isinstance(params, dict) else None
        meta = meta if isinstance(meta, dict) else {}
        is_stateless = f"{_MCP_META}protocolVersion" in meta
        return meta, MCP_STATELESS_VERSION if is_stateless else self._version

    def _initialize(self, params: JSON) -> JSON:
        asked = params.get("protocolVersion")
        if not isinstance(asked, str):
            raise _RpcError(-32602, "initialize needs a protocolVersion")
        known = asked in MCP_HANDSHAKE_VERSIONS
        self._version = asked if known else MCP_HANDSHAKE_VERSIONS[-1]
        self._initialized = True
        return {
            "protocolVersion": self._version,
            "capabilities": {"tools": {}},
            "serverInfo": _server_info(),
            "instructions": _MCP_INSTRUCTIONS,
        }

    def _forget(self, request_id: Any, call: _McpCall) -> None:
        with self._lock:
            if _is_rpc_id(request_id) and self._running.get(_rpc_key(request_id)) is call:
                del self._running[_rpc_key(request_id)]

    def _call(self, params: JSON, call: _McpCall) -> JSON | None:
        """Run a tool; None when it was cancelled."""
        name, arguments = params.get("name"), params.get("arguments")
        tool = next((t for t in MCP_TOOLS if t["name"] == name), None)
        if tool is None:
            raise _RpcError(-32602, f"Unknown tool: {name!r}")
        if not isinstance(arguments, (dict, type(None))):
            raise _RpcError(-32602, "arguments must be an object")
        arguments = arguments or {}
        wrong = argument_fault(arguments, tool["inputSchema"])
        if wrong:
            return _tool_failure(f"{name}: {wrong}")
        runs = {
            "puter-chat": self._chat,
            "puter-models": self._models,
            "puter-account": self._account,
        }
        try:
            text, structured = self._in_time(partial(runs[tool["name"]], arguments, call), call)
        except PuterError as error:
            return None if call.cancelled.is_set() else _tool_failure(str(error))
        if call.cancelled.is_set():
            return None
        result: JSON = {"content": [{"type": "text", "text": text}], "isError": False}
        if call.version not in ("2024-11-05", "2025-03-26"):
            result["structuredContent"] = structured
        return result

    def _in_time(self, run: Callable[[], tuple[str, JSON]], call: _McpCall) -> tuple[str, JSON]:
        """The result of a tool, or what there is of it when its time is over."""
        results: list[tuple[str, JSON] | BaseException] = []
        done = threading.Event()

        def work() -> None:
            try:
                results.append(run())
            except BaseException as error:  # noqa: BLE001 (raised by who waits for it)
                results.append(error)
            done.set()

        self._in_thread(work)
        until = time.monotonic() + self._call_limit_s
        wait_s = min(_MCP_TICK_S, self._call_limit_s)
        while not done.wait(wait_s):
            call.tell()
            left_s = until - time.monotonic()
            if left_s <= 0 and not call.tells:
                call.out_of_time.set()
                if call.stop():
                    done.wait(1.0)  # for what there is of the answer
                break
            wait_s = _MCP_TICK_S if call.tells else max(0.01, min(_MCP_TICK_S, left_s))
        if not results:
            raise RequestTimeoutError(
                f"Nothing came within {self._call_limit_s:.0f} s", hint="Try again later."
            )
        if isinstance(results[0], BaseException):
            raise results[0]
        return results[0]

    def _the_client(self) -> Puter:
        with self._lock:
            if self._client is None:
                self._client = self._make_client()
            return self._client

    def _chat(self, arguments: JSON, call: _McpCall) -> tuple[str, JSON]:
        """The answer as it was when it ended, or when the time for it did."""
        client = self._the_client()
        ask = client._ask(
            arguments["message"],
            arguments.get("model"),
            arguments.get("system"),
            args={k: arguments.get(k) for k in ("temperature", "max_tokens")},
        )
        stream = Stream(client, ask)
        call.works_on(stream)
        try:
            with stream._start():
                last = time.monotonic()
                for chunk in stream:
                    call.said.append(str(chunk))
                    if time.monotonic() - last >= _MCP_TELL_S:
                        last = time.monotonic()
                        call.tell()
                if not call.out_of_time.is_set():
                    return stream.reply.text, _chat_content(stream.reply, partial=False)
        except PuterError:
            if not call.out_of_time.is_set() or call.cancelled.is_set():
                raise
        return self._partial_answer(stream, "".join(call.said))

    def _partial_answer(self, stream: Stream, text: str) -> tuple[str, JSON]:
        """What there is when the time is over."""
        limit = f"{self._call_limit_s:.0f} s"
        if not text:
            raise RequestTimeoutError(
                f"No answer came within {limit}", hint="Ask a faster model, or a shorter question."
            )
        note = f"[cut off after {limit}, before the answer was whole]"
        reply = Reply(
            text=f"{text}\n\n{note}",
            finish_reason="length",
            model=stream.model,
            account=stream.account,
        )
        return reply.text, _chat_content(reply, partial=True)

    def _models(self, arguments: JSON, call: _McpCall) -> tuple[str, JSON]:
        found = self._the_client().models(arguments.get("provider"), arguments.get("free"))
        found = matching_models(found, arguments.get("search"))
        rows = [{k: _listed(getattr(m, k)) for k in _MCP_MODEL_KEYS} for m in found]
        lines = [f"{len(rows)} models", *(f"{m.id} ({_price_words(m)})" for m in found)]
        return "\n".join(lines), {"models": rows, "count": len(rows)}

    def _account(self, arguments: JSON, call: _McpCall) -> tuple[str, JSON]:
        client = self._the_client()
        active, told = client.active_account, credits_of(client, client.accounts)
        rows = [_credit_row(a, c, active) for a, c in told]
        lines = [
            f"{'*' if row['active'] else ' '} {row['username']}: {_credit_words(credit)}"
            for row, (_, credit) in zip(rows, told, strict=True)
        ]
        return "\n".join(lines) or _NOBODY, {"accounts": rows}


_MCP_INSTRUCTIONS = (
    "puter-chat asks another AI model; name one from puter-models, or leave it to the default. "
    "Every answer says which model gave it."
)


def mcp_list_result(method: str, params: JSON, version: str) -> JSON:
    """The result of a request that needs no work; raises `_RpcError` for unknown ones."""
    is_stateless = version == MCP_STATELESS_VERSION
    lasting: JSON = {"ttlMs": _MCP_MODELS_TTL_MS, "cacheScope": "private"} if is_stateless else {}
    if method == "ping" and not is_stateless:
        return {}
    if method == "server/discover":
        return {
            "supportedVersions": _MCP_VERSIONS,
            "capabilities": {"tools": {}},
            "instructions": _MCP_INSTRUCTIONS,
            **lasting,
        }
    if method != "tools/list" and method not in _EMPTY_LISTS:
        raise _RpcError(-32601, f"Method not found: {method}")
    if params.get("cursor") is not None:
        raise _RpcError(-32602, "There are no further pages")
    if method == "tools/list":
        return {"tools": [_tool_for(tool, version) for tool in MCP_TOOLS], **lasting}
    return {_EMPTY_LISTS[method]: [], **lasting}


def _tool_for(tool: JSON, version: str) -> JSON:
    """A tool as a version of the protocol knows it."""
    later = {"2024-11-05": {"annotations", "title", "outputSchema"}}
    later["2025-03-26"] = {"title", "outputSchema"}
    return {k: v for k, v in tool.items() if k not in later.get(version, ())}


def _check_envelope(meta: JSON) -> None:
    """The keys that each request of the stateless protocol carries; raises `_RpcError`."""
    asked = meta[f"{_MCP_META}protocolVersion"]
    if not isinstance(asked, str):
        raise _RpcError(-32602, f"{_MCP_META}protocolVersion must be a text")
    if asked != MCP_STATELESS_VERSION:
        raise _RpcError(
            -32022, "Unsupported protocol version", {"supported": _MCP_VERSIONS, "requested": asked}
        )
    if not isinstance(meta.get(f"{_MCP_META}clientCapabilities"), dict):
        raise _RpcError(-32602, f"params._meta needs {_MCP_META}clientCapabilities")


def _server_info() -> JSON:
    return {"name": "puter", "title": "Puter.com models", "version": __version__}


def _server_stamp() -> JSON:
    return {f"{_MCP_META}serverInfo": _server_info()}


def _rpc_kind(message: Any) -> Literal["request", "notification", "response"]:
    """What a message is by JSON-RPC 2.0; raises `_RpcError` if it is nothing valid."""
    if not isinstance(message, dict):
        raise _RpcError(-32600, "A message must be an object")
    if "method" not in message and ("result" in message or "error" in message):
        return "response"
    if "id" not in message and isinstance(message.get("method"), str):
        return "notification"
    if message.get("jsonrpc") != "2.0" or not isinstance(message.get("method"), str):
        raise _RpcError(-32600, 'A message needs "jsonrpc": "2.0" and a method')
    if not _is_rpc_id(message["id"]):
        raise _RpcError(-32600, "An id must be a text or a whole number")
    if not isinstance(message.get("params"), (dict, type(None))):
        raise _RpcError(-32600, "params must be an object")
    return "request"


def _is_rpc_id(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _rpc_key(request_id: str | int) -> tuple[bool, str | int]:
    """So that 1 and "1" are two requests."""
    return isinstance(request_id, str), request_id


def _rpc_failure(given_id: Any, error: _RpcError) -> JSON:
    """The answer to a request that failed; what is no id is answered under null."""
    request_id = given_id if _is_rpc_id(given_id) else None
    return {"jsonrpc": "2.0", "id": request_id, "error": error.body}


def _tool_failure(text: str) -> JSON:
    return {"content": [{"type": "text", "text": text}], "isError": True}


def argument_fault(arguments: JSON, schema: JSON) -> str:
    """What is wrong with a tool's arguments by its (flat) schema, or ""."""
    known = schema["properties"]
    kinds: JSON = {"string": str, "number": (int, float), "integer": int, "boolean": bool}
    for name in schema.get("required", ()):
        if arguments.get(name) in (None, ""):
            return f"the argument {name!r} is missing"
    for name, value in list(arguments.items()):
        if name not in known:
            return f"there is no argument {name!r}; there are {', '.join(known) or 'none'}"
        kind = known[name]["type"]
        if kind == "integer" and isinstance(value, float) and value.is_integer():
            value = arguments[name] = int(value)  # JSON has one kind of number
        is_flag = isinstance(value, bool)
        if value is not None and (
            not isinstance(value, kinds[kind]) or is_flag != (kind == "boolean")
        ):
            return f"{name} is {_describe(value)}, but must be a {kind}"
        if isinstance(value, (int, float)) and not is_flag:
            low, high = known[name].get("minimum"), known[name].get("maximum")
            if (low is not None and value < low) or (high is not None and value > high):
                bounds = f"from {low} to {high}" if high is not None else f"{low} or more"
                return f"{name} is {value}, but must be {bounds}"
    return ""


def _price_words(model: Model) -> str:
    prices = (model.input_usd_per_million, model.output_usd_per_million)
    if model.free:
        return "free"
    told = ["?" if price is None else f"${price:g}" for price in prices]
    return f"{told[0]} in, {told[1]} out, a million tokens"


def _chat_content(reply: Reply, partial: bool) -> JSON:
    return {
        "text": reply.text,
        "reasoning": reply.reasoning,
        "model": reply.model,
        "account": reply.account,
        "finish_reason": reply.finish_reason,
        "partial": partial,
        "usage": {k: v for k, v in as_dict(reply.usage).items() if v is not None},
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


_NOBODY = "Nobody is signed in. Sign in with: python -m puter login"


def credits_of(
    client: Puter, accounts: Sequence[Account]
) -> list[tuple[Account, Credit | PuterError]]:
    """Each account with what it may still spend; one that fails says why and hides no other."""
    told: list[tuple[Account, Credit | PuterError]] = []
    for account in accounts:
        try:
            told.append((account, client.usage(account.username)))
        except PuterError as error:
            told.append((account, error))
    return told


def _credit_row(account: Account, credit: Credit | PuterError, active: Account | None) -> JSON:
    known = None if isinstance(credit, PuterError) else credit
    return {
        "username": account.username,
        "active": active is not None and account.username == active.username,
        "temporary": account.is_temporary,
        "unit": known and known.unit,
        "remaining": known and known.remaining,
        "allowance": known and known.allowance,
        "error": None if known else str(credit),
    }


def _credit_words(credit: Credit | PuterError) -> str:
    if isinstance(credit, PuterError):
        return str(credit)
    left, whole = (money(n, credit.unit) for n in (credit.remaining, credit.allowance))
    return f"{left} of {whole} left this month"


def money(amount: float, unit: str) -> str:
    """An amount as people write it."""
    return f"${amount:,.4f}" if unit == "usd" else f"{amount:,.0f} credits"


def serve_mcp(make_client: Callable[[], Puter]) -> NoReturn:
    """Speak MCP on stdin and stdout until stdin ends, and end the process then.

    Nothing else may reach stdout, so the process's own is kept for messages, and whatever
    prints goes to stderr. Messages are written by a thread of their own, so that a client
    that does not read is no reason not to see the end of stdin.
    """
    import queue

    sys.stdout.flush()
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    server = McpServer(make_client, messages.put)
    writer = threading.Thread(target=_write_lines, args=(messages.get, output), daemon=True)
    writer.start()
    try:
        for line in iter(sys.stdin.buffer.readline, b""):
            server.receive(line)
    except KeyboardInterrupt:
        pass  # as good as the end of stdin
    server.close()
    messages.put(None)
    writer.join(1.0)
    os._exit(0)  # threads still at work must not hold the process up


def _write_lines(get: Callable[[], Any], output: BinaryIO) -> None:
    """Write messages as lines until one is None, or nobody reads any more."""
    while (message := get()) is not None:
        try:
            line = json.dumps(message, allow_nan=False).encode("ascii") + b"\n"
        except ValueError as error:  # a number that JSON lacks
            _log.error("A message could not be written")
            message = message if isinstance(message, dict) else {}
            failure = _RpcError(-32603, f"Internal error: {error}")
            line = json.dumps(_rpc_failure(message.get("id"), failure)).encode() + b"\n"
        try:
            output.write(line)
            output.flush()
        except OSError:
            return  # the client is gone: stdin ends, too


# ======================================================================================
# 13. cli · uses: everything above
# ======================================================================================
EXIT_CODES = """exit codes:
  0  done
  1  it failed: not signed in, limited, a broken answer... (one line on stderr says why)
  2  wrong usage, or a wrong setting
  130  stopped with Ctrl-C;  141  whoever read the output went away
"""
_EXAMPLES = """examples:
  python -m puter login                        sign in with the browser
  python -m puter ask "Why is the sky blue?"   an answer, as it comes
  cat log | python -m puter ask "What broke?"  with text from a pipe
  python -m puter models --free                models that cost nothing
"""
IDLE_STDIN_S = 2.0  # how long a silent pipe is waited for when there is a prompt


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv` is without the program's name."""
    for name in ("stdout", "stderr"):
        output = getattr(sys, name)
        if hasattr(output, "reconfigure"):
            output.reconfigure(encoding="utf-8", errors="replace")
    args = _parsed(argv)
    try:
        code: int = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _info("")
        return 130
    except BrokenPipeError:
        _give_up_stdout()
        return 141
    except OSError as error:
        _info(f"error: The output cannot be written ({error.strerror or error}).")
        _give_up_stdout()
        return 1
    except PuterError as error:
        _info(f"error: {error}")
        return 2 if isinstance(error, ConfigError) else 1


def _parsed(argv: Sequence[str] | None) -> Any:
    """The arguments; words of a question may stand on both sides of its options."""
    parser = build_parser()
    args, more = parser.parse_known_args(argv)
    if more:
        if not hasattr(args, "prompt") or any(word.startswith("-") for word in more):
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        args.prompt += more
    return args


def _give_up_stdout() -> None:
    """Nobody takes the output; without this the interpreter complains of it at its end."""
    if sys.stdout is not None:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> Any:
    """The `argparse` parser of all commands."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m puter",
        description="Ask the AI models of a Puter.com account.",
        epilog=_EXAMPLES + "\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"puter.py {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Any], int], text: str, epilog: str = "") -> Any:
        added = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    _add_ask(command)
    _add_accounts(command)
    _add_catalogue(command)
    _add_serve(command)
    _add_config(command)
    return parser


def _add_ask(command: Callable[..., Any]) -> None:
    ask = command("ask", cmd_ask, "ask a model; a pipe's text joins the prompt", _EXAMPLES)
    ask.add_argument("prompt", nargs="*", help="the question; - waits for standard input")
    ask.add_argument("--no-stream", action="store_true", help="print the answer when it is whole")
    ask.add_argument("--no-fallback", action="store_true", help="only the model that was asked")
    ask.add_argument("--json", action="store_true", help="one JSON object with everything")
    ask.add_argument("--usage", action="store_true", help="tokens and cost, on stderr")
    ask.add_argument(
        "-a",
        "--attach",
        action="append",
        default=[],
        metavar="FILE",
        help="a text, image, PDF or address to send along, - for stdin; several times",
    )
    chat = command("chat", cmd_chat, "talk with a model; /help lists its commands")
    for parser in (ask, chat):
        parser.add_argument("-m", "--model", help="a model's id or alias")
        parser.add_argument("-s", "--system", help="a system text")
        parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer, in tokens")
        parser.add_argument("--temperature", type=float, metavar="T", help="0 (sober) to 2")
        which = parser.add_mutually_exclusive_group()
        which.add_argument(
            "-c",
            "--continue",
            dest="continue_",
            action="store_true",
            help="go on with the last conversation",
        )
        which.add_argument("-n", "--new", action="store_true", help="begin a new one (the default)")


def _port(text: str) -> int:
    """A port number, for argparse."""
    if not text.isdecimal() or int(text) > 65_535:
        raise ValueError(text)
    return int(text)


def _add_accounts(command: Callable[..., Any]) -> None:
    login = command("login", cmd_login, "sign in and keep the account")
    how = login.add_mutually_exclusive_group()
    how.add_argument("--with-token", action="store_true", help="read a token from stdin")
    how.add_argument("--no-browser", action="store_true", help="only print the address")
    how.add_argument(
        "--import", dest="import_file", metavar="FILE", help="take the accounts of a file"
    )
    login.add_argument("--port", type=_port, default=LOGIN_PORT, help="where to wait (%(default)s)")
    logout = command("logout", cmd_logout, "forget an account; the active one by default")
    which = logout.add_mutually_exclusive_group()
    which.add_argument("name", nargs="?", help="the account's name")
    which.add_argument("--all", action="store_true", help="forget all accounts")
    switch = command("switch", cmd_switch, "make another account the active one")
    switch.add_argument("name", help="the account's name")
    status = command("status", cmd_status, "the accounts, and who rests for how long")
    status.add_argument("--json", action="store_true", help="one JSON object")
    status.add_argument("--check", action="store_true", help="try everything a call needs")
    status.add_argument("--clear-cooldowns", action="store_true", help="end all rests")
    whoami = command("whoami", cmd_whoami, "ask the server whose token is in use")
    whoami.add_argument("--json", action="store_true", help="all that the server says")


def _add_catalogue(command: Callable[..., Any]) -> None:
    models = command("models", cmd_models, "list the models")
    _add_model_choice(models)
    models.add_argument("--tools", action="store_true", help="only those that can call functions")
    models.add_argument("--vision", action="store_true", help="only those that see images")
    models.add_argument("--sort", choices=list(MODEL_SORTS), default="id", help="(%(default)s)")
    models.add_argument("--refresh", action="store_true", help="ask the server even if cached")
    models.add_argument("--json", action="store_true", help="a JSON list")
    usage = command("usage", cmd_usage, "the credit that is left this month")
    usage.add_argument("--all", action="store_true", help="of all accounts")
    usage.add_argument("--json", action="store_true", help="a JSON list")
    stats = command("stats", cmd_stats, "how the models have done")
    stats.add_argument("model", nargs="?", help="only this one")
    stats.add_argument("--reset", action="store_true", help="begin anew")
    stats.add_argument("--json", action="store_true", help="a JSON list")
    cache = command("cache", cmd_cache, "the kept replies")
    cache.add_argument("--clear", action="store_true", help="forget them")
    cache.add_argument("--json", action="store_true", help="a JSON object")


def _add_model_choice(parser: Any) -> None:
    """The options that choose models of the catalogue."""
    parser.add_argument("--free", action="store_true", help="only models that cost nothing")
    parser.add_argument("--provider", metavar="NAME", help="only models of a provider")
    parser.add_argument("--search", metavar="TEXT", help="only models with this in a name")


def _add_serve(command: Callable[..., Any]) -> None:
    serve = command("serve", cmd_serve, "serve other programs with your account")
    kind = serve.add_mutually_exclusive_group(required=True)
    kind.add_argument("--openai", action="store_true", help="an OpenAI-compatible server")
    kind.add_argument("--mcp", action="store_true", help="an MCP server on stdin and stdout")
    serve.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s)")
    serve.add_argument("--port", type=_port, default=SERVER_PORT, help="(%(default)s)")
    serve.add_argument("--api-key", metavar="K", help="what callers must send")
    serve.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web origin whose pages may call; may be given several times",
    )
    serve.add_argument(
        "--max-connections",
        type=int,
        default=MAX_CONNECTIONS,
        metavar="N",
        help="more at once are turned away (%(default)s)",
    )


def _add_config(command: Callable[..., Any]) -> None:
    config = command("config", cmd_config, "show the settings, or set up another program")
    config.add_argument(
        "what",
        choices=["show", "path", *_PROGRAMS],
        help="show: every setting; path: where they stand; else the program to set up",
    )
    config.add_argument("--json", action="store_true", help="show: one JSON object")
    config.add_argument("--write", action="store_true", help="merge the block into its file")
    config.add_argument("--yes", action="store_true", help="write without asking")
    config.add_argument("--base-url", default=_BASE_URL, help="of the server (%(default)s)")
    _add_model_choice(config)


def cmd_ask(args: Any) -> int:
    """Answer a question on stdout."""
    prompt = " ".join(args.prompt)
    piped = "" if "-" in args.attach else _piped_text(wait=not prompt or prompt == "-")
    text = "\n\n".join(t for t in ("" if prompt == "-" else prompt, piped) if t)
    with _client() as client:
        attached = attachments(args.attach, client)
        text = "\n\n".join(t for t in (text, *attached.texts) if t)
        if not text.strip() and not attached.parts:
            _info('error: There is nothing to ask. Try: python -m puter ask "Why is the sky blue?"')
            return 2
        talk = _talk_of(args, client)
        options: JSON = {"max_tokens": args.max_tokens, "temperature": args.temperature}
        options |= {"fallback": not args.no_fallback}
        options |= {"images": attached.images, "files": attached.files}
        reply = _signed_in(client, partial(_ask_once, args, talk, text, options))
        _keep_conversation(client, talk)
        if args.json:
            print(json.dumps(_reply_report(reply), ensure_ascii=False))
        elif args.no_stream:
            print(reply)
        _report_answerer(client, talk.model, reply)
        if args.usage:
            _info(_dim(_usage_line(reply)))
    return 0


def _ask_once(args: Any, talk: Conversation, text: str, options: JSON) -> Reply:
    """One turn of a conversation; printed as it comes unless it is wanted whole."""
    client = talk._its_client()
    with _Spinner(client.config.quiet_mode) as spinner:
        client.on_upload = spinner.uploading
        if args.json or args.no_stream:
            return talk.say(text, **options)
        _print_stream(talk.stream(text, **options), spinner)
        return talk.reply


def _print_stream(chunks: Iterator[Chunk], spinner: _Spinner) -> None:
    """Print the text as it comes, the reasoning dimmed on stderr."""
    last, thinking = "", False
    try:
        for chunk in chunks:
            spinner.stop()
            if chunk.type == "reasoning":
                thinking = True
                sys.stderr.write(_dim(chunk.text))
                sys.stderr.flush()
            elif chunk.type == "text" and chunk.text:
                if thinking:
                    thinking = False
                    _info("")
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
                last = chunk.text
    finally:
        chunks.close()  # type: ignore[attr-defined]  # the stream with it, whatever happened
        if last and not last.endswith("\n"):
            print(flush=True)


def _bar(full: int) -> str:
    """A bar of 20 characters."""
    return "#" * full + "." * (20 - full)


class _Spinner:
    """Shows on a terminal's stderr that something is waited for, and for how long."""

    _FRAMES = "|/-\\"

    def __init__(self, quiet: bool) -> None:
        plain = quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb"
        self._thread = None if plain else threading.Thread(target=self._run, daemon=True)
        self._over = threading.Event()
        self._note = ""

    def __enter__(self) -> _Spinner:  # noqa: PYI034
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Wipe it off the line; more than once is fine."""
        if not self._over.is_set():
            self._over.set()
            if self._thread is not None:
                self._thread.join()
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()

    def uploading(self, name: str, sent: int, total: int) -> None:
        """Show how far an upload is, if it is large enough to wait for."""
        if total > 1_000_000:
            bar = _bar(20 * sent // total)
            self._note = f"uploading {name} [{bar}] {100 * sent // total}%" if sent < total else ""

    def _run(self) -> None:
        started = time.monotonic()
        while not self._over.wait(0.1):
            seconds = time.monotonic() - started
            frame = self._FRAMES[int(seconds * 10) % len(self._FRAMES)]
            width = terminal_columns() - 1
            line = f"{frame} {seconds:.0f} s {self._note}"[:width]
            sys.stderr.write(f"\r\x1b[K{_dim(line)}")
            sys.stderr.flush()


class Attachments:
    """What `--attach` brings: texts for the prompt, images and files beside it."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.images: list[Image] = []
        self.files: list[File] = []

    @property
    def parts(self) -> int:
        """How many are no text."""
        return len(self.images) + len(self.files)


def attachments(sources: Sequence[str], client: Puter) -> Attachments:
    """Sort files, addresses and "-" (stdin) by what they hold; raises `BadRequestError`."""
    from pathlib import Path

    found = Attachments()
    for source in sources:
        if re.match(r"https?://", source):
            data, kind = client._transport.download(source)
            name = source.partition("?")[0].rstrip("/").rpartition("/")[2] or "page"
        else:
            data = sys.stdin.buffer.read() if source == "-" else _bytes_of(source, "file")[0]
            name, kind = ("standard input" if source == "-" else Path(source).name), ""
        if not data:
            raise BadRequestError(f"{source} holds nothing", hint="Attach something else.")
        if image_kind(data):
            found.images.append(data)
        elif (text := _as_text(data)) is not None and "pdf" not in kind:
            found.texts.append(f"{name}:\n```\n{text.rstrip()}\n```")
        else:
            file_part((name, data))  # its limits are named before anything is sent
            found.files.append((name, data))
    return found


def _as_text(data: bytes) -> str | None:
    """The bytes as a text, if they are one."""
    if b"\0" in data or data.startswith(b"%PDF-"):
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _talk_of(args: Any, client: Puter) -> Conversation:
    """The conversation that a command is to go on with, or a new one."""
    talk = _last_conversation(client) if args.continue_ else Conversation(client=client)
    talk.model, talk.system = args.model or talk.model, args.system or talk.system
    return talk


def _last_conversation(client: Puter) -> Conversation:
    """The kept conversation; a new one when there is none. Raises `StoreError`."""
    path = client.config.folder / CONVERSATION_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Conversation.from_json(data, client)
    except FileNotFoundError:
        return Conversation(client=client)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path}: the last conversation cannot be read ({error})",
            hint="Move the file away, or ask without --continue.",
        ) from error


def _keep_conversation(client: Puter, talk: Conversation) -> None:
    """Keep it for `--continue`; mode 0600. Failing to is told, not more."""
    path = client.config.folder / CONVERSATION_NAME
    try:
        with _locked(path) as target:
            _write_private(target, json.dumps(talk.to_json()).encode() + b"\n")
    except (OSError, TypeError, ValueError) as error:
        _info(f"warning: The conversation could not be kept in {path} ({error}).")


def _reply_report(reply: Reply) -> JSON:
    """A reply as `--json` prints it."""
    tried = [
        {
            "model": a.model,
            "account": a.account,
            "error": None if a.error is None else a.error.message,
            "seconds": round(a.seconds, 3),
        }
        for a in reply.attempts
    ]
    cost = {"cost_usd": reply.usage.cost_usd}
    return {**reply_to_json(reply), **cost, "attempts": tried}


def _usage_line(reply: Reply) -> str:
    """Tokens and cost in a few words."""
    used = reply.usage
    if not used:
        return "tokens: not told"
    cost = "not told" if used.cost_usd is None else f"${used.cost_usd:.6f}"
    return f"tokens: {used.input_tokens} in, {used.output_tokens} out; cost {cost}"


def _report_answerer(client: Puter, asked: str | None, reply: Reply) -> None:
    """One dim line when another model or account answered than was asked."""
    tried = reply.attempts
    wanted = client.config.model_name(asked)
    if client.config.quiet_mode:
        return
    if reply.finish_reason == "length":
        _info(_dim("the answer was cut at its longest length (--max-tokens)"))
    if not tried:
        return
    first = client._roster.active_name
    if tried[-1].model != wanted or first not in (None, reply.account):
        why = next((a.error.message for a in tried if a.error), "what was asked is resting")
        _info(_dim(f"answered by {tried[-1].model} on {reply.account} ({why})"))


CONVERSATION_NAME = "conversation.json"
_CHAT_HELP = """/model NAME    ask another model (alone: say which)
/system TEXT   set the system text (alone: say which)
/attach FILE   send a file, image or address with the next message (-: none)
/retry         ask the last message again
/undo          forget the last message and its answer
/save FILE     write the conversation (.json, else as text)
/usage         tokens and cost of this session
/help          this list
A line that ends in \\ goes on in the next; \"\"\" begins and ends a longer text.
Ctrl-C stops an answer; Ctrl-D leaves."""


class _Chat:
    """An interactive conversation: one method a command."""

    def __init__(self, client: Puter, talk: Conversation, options: JSON) -> None:
        self.client = client
        self.talk = talk
        self.options = options
        self.attached: list[str] = []
        self.unanswered: JSON | None = None
        self.failures = 0
        self.used: list[Usage] = []
        self.commands: dict[str, Callable[[str], None]] = {
            "/model": self.model,
            "/system": self.system,
            "/attach": self.attach,
            "/retry": self.retry,
            "/undo": self.undo,
            "/save": self.save,
            "/usage": self.usage,
            "/help": lambda _: _info(_CHAT_HELP),
        }

    def run(self) -> None:
        """Read lines until there are no more."""
        interrupted, told = False, ""
        while True:
            try:
                if interrupted:  # told in here, so that a second Ctrl-C ends nothing
                    interrupted = False
                    _info(told)
                told = "\n(Ctrl-D leaves)"
                try:
                    text, is_block = _read_message()
                except EOFError:
                    return
                told = "\n(stopped; the answer is not kept, /retry asks again)"
                self.say(text) if is_block else self.take(text)
            except PuterError as error:
                _info(f"error: {error}")
            except KeyboardInterrupt:
                interrupted = True

    def take(self, line: str) -> None:
        """One message or command."""
        name, _, rest = line.strip().partition(" ")
        if not name:
            return
        if not name.startswith("/"):
            self.say(line)
        elif name in self.commands:
            self.commands[name](rest.strip())
        else:
            near = _close_matches(name, self.commands)
            _info(f"There is no {name}. " + (f"Did you mean {near[0]}?" if near else "See /help."))

    def say(self, text: str) -> None:
        """Ask, and print the answer as it comes."""
        given = attachments(self.attached, self.client)
        text = "\n\n".join([text, *given.texts])
        images, files = map(image_part, given.images), map(file_part, given.files)
        self.ask(messages_from(text, None, [*images, *files])[0])
        self.attached = []

    def ask(self, message: JSON) -> None:
        """One turn; a message that fails is kept for /retry."""
        self.unanswered = message
        self.failures += 1
        reply = _signed_in(self.client, partial(self._once, message))
        self.unanswered = None
        self.failures -= 1
        self.used.append(reply.usage)
        _report_answerer(self.client, self.talk.model, reply)
        _keep_conversation(self.client, self.talk)

    def _once(self, message: JSON) -> Reply:
        with _Spinner(self.client.config.quiet_mode) as spinner:
            self.client.on_upload = spinner.uploading
            _print_stream(self.talk.stream(message, **self.options), spinner)
        return self.talk.reply

    def model(self, name: str) -> None:
        """Choose the model."""
        if name:
            self.talk.model = self.client.model(name).id
        _info(f"model: {self.client.config.model_name(self.talk.model)}")

    def system(self, text: str) -> None:
        """Set the system text."""
        if text:
            self.talk.system = text
        _info(f"system: {self.talk.system or 'none'}")

    def attach(self, source: str) -> None:
        """Send something with the next message; "-" forgets what was to be sent."""
        if source == "-":
            self.attached = []
        if source in ("", "-"):
            told = ", ".join(self.attached) or "nothing"
            _info(f"With the next message goes {told}. /attach FILE or ADDRESS adds to it.")
            return
        attachments([source], self.client)  # what is wrong with it is told now
        self.attached.append(source)
        _info(f"{source} goes with the next message")

    def retry(self, _: str) -> None:
        """Ask the last message again: the one that failed, else the one that was answered."""
        if self.unanswered is not None:
            self.ask(self.unanswered)
            return
        before, said = self._split()
        if said is None:
            _info("Nothing was asked yet.")
            return
        kept, self.talk.messages = self.talk.messages, before
        try:
            self.ask(said)
        except BaseException:
            self.talk.messages = kept
            raise

    def undo(self, _: str) -> None:
        """Forget the last message and its answer."""
        before, said = self._split()
        if said is None:
            _info("There is nothing to undo.")
            return
        self.talk.messages = before
        _keep_conversation(self.client, self.talk)
        _info("forgotten")

    def _split(self) -> tuple[Messages, JSON | None]:
        """(what came before the last message of the person, that message or None)."""
        for index in range(len(self.talk.messages) - 1, -1, -1):
            if self.talk.messages[index].get("role") == "user":
                return self.talk.messages[:index], self.talk.messages[index]
        return self.talk.messages, None

    def save(self, name: str) -> None:
        """Write the conversation into a file."""
        from pathlib import Path

        if not name:
            _info("Say where: /save FILE")
            return
        path = Path(name).expanduser()
        if path.suffix == ".json":
            text = json.dumps(self.talk.to_json(), indent=2, ensure_ascii=False)
        else:
            told = [
                (m["role"], _told(m.get("content"), "text", "text")) for m in self.talk.messages
            ]
            text = "\n\n".join(f"## {role}\n\n{said}" for role, said in told)
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise StoreError(
                f"{path} cannot be written ({error.strerror})", hint="Choose another name."
            ) from error
        _info(f"saved in {path}")

    def usage(self, _: str) -> None:
        """Tokens and cost of this session."""
        known = [u for u in self.used if u]
        tokens = sum(u.total_tokens or 0 for u in known)
        cost = sum(u.cost_usd or 0 for u in known)
        _info(f"{len(self.used)} answers, {tokens} tokens, ${cost:.6f}")


def cmd_chat(args: Any) -> int:
    """Talk with a model until Ctrl-D."""
    with _client() as client:
        talk = _talk_of(args, client)
        options = {"max_tokens": args.max_tokens, "temperature": args.temperature}
        chat = _Chat(client, talk, options)
        if sys.stdin.isatty():
            shown = client.config.model_name(talk.model)
            _info(f"Talking with {shown}; /help lists the commands, Ctrl-D leaves.")
            with _line_editing(client, chat.commands):
                chat.run()
        else:
            chat.run()
            return 1 if chat.failures else 0
    return 0


def _read_message() -> tuple[str, bool]:
    """(a line, or several; whether between \"\"\"); raises EOFError at the end.

    At the end of a pipe, what was begun counts as it is.
    """
    prompt = "> " if sys.stdin.isatty() else ""
    more = ". " if prompt else ""
    lines = [input(prompt)]
    is_block = lines[0].lstrip().startswith('"""')
    if is_block:
        lines[0] = lines[0].lstrip()[3:]
    with suppress(EOFError):
        while is_block and not lines[-1].rstrip().endswith('"""'):
            lines.append(input(more))
        while not is_block and lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input(more))
    text = "\n".join(lines)
    if is_block:
        text = text.rstrip().removesuffix('"""').strip("\n")
    return text, is_block


@contextmanager
def _line_editing(client: Puter, commands: Collection[str]) -> Iterator[None]:
    """History and completion where the system has readline."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    path = client.config.folder / "chat-history"
    with suppress(OSError):  # none yet
        readline.read_history_file(path)

    def complete(text: str, state: int) -> str | None:
        line = readline.get_line_buffer()
        names: Iterable[str] = commands
        if line.startswith("/model "):
            with suppress(PuterError):  # without the list there is nothing to complete
                names = [m.id for m in client.models()]
        elif line.startswith(("/attach ", "/save ")):
            import glob

            names = glob.glob(glob.escape(text) + "*")
        found = [n for n in names if n.startswith(text)]
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(1_000)
    try:
        yield
    finally:
        with suppress(OSError):  # a history that cannot be kept is no reason to fail
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            readline.write_history_file(path)


def cmd_login(args: Any) -> int:
    """Sign in and keep the account."""
    from pathlib import Path

    config = _load_config()
    store = AccountStore(config.folder)
    if args.import_file is not None:
        return _import_accounts(store, Path(args.import_file).expanduser())
    if args.with_token:
        token = _read_token()
        if not token:
            _info("error: No token came. Try: python -m puter login --with-token < FILE")
            return 2
        account = account_of(token, config)
    else:
        account = _login_with_browser(config, args.no_browser, args.port)
    print(_keep(store, config, account))
    return 0


def _read_token() -> str:
    """A token from the terminal, unseen, or from standard input."""
    if sys.stdin is None:
        return ""
    if sys.stdin.isatty():
        import getpass

        return getpass.getpass("Token (it is not shown): ").strip()
    try:
        return sys.stdin.buffer.readline().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadRequestError(
            "The token on standard input is no UTF-8 text", hint="Pipe it as plain text."
        ) from error


def _login_with_browser(config: Config, no_browser: bool, port: int) -> Account:
    import webbrowser

    def show(url: str) -> None:
        _info(f"Open this address to sign in:\n\n    {url}\n\nWaiting for you (Ctrl-C ends it)...")

    opener = None if no_browser else webbrowser.open
    return browser_login(config, show=show, open_browser=opener, port=port)


def _keep(store: AccountStore, config: Config, account: Account) -> str:
    """Put an account into the store; a rest of its old token ends. What was done, in words."""
    is_new = store.add(account)
    State(config.folder / STATE_NAME).clear_cooldowns(account.username)
    _log.info("Auth: Account %s - %s", "added" if is_new else "renewed", account.username)
    kind = " (a temporary account)" if account.is_temporary else ""
    count = len(store.accounts())
    return (
        f"Signed in as {account.username}{kind}; {count} account{'s' * (count > 1)} in {store.path}"
    )


def _import_accounts(store: AccountStore, path: Path) -> int:
    """Merge another accounts file into ours, without the network."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be read ({error.strerror})", hint="Check the path."
        ) from error
    given = parse_accounts(raw, str(path))
    taken = [_account_from(record) for record in given["accounts"]]
    if not taken:
        print(f"{path} holds no account; nothing was changed.")
        return 0
    known = {a.username: a for a in store.accounts()}
    for account in taken:
        print(_merged_account(store, known.get(account.username), account))
    if not known:
        store.switch(taken[given["activeIndex"]].username)
    print(f"{len(taken)} account{'s' * (len(taken) > 1)} from {path}")
    return 0


def _merged_account(store: AccountStore, own: Account | None, account: Account) -> str:
    """Take an account unless ours is as new; what was done, in words."""
    if own is not None and own.token == account.token:
        return f"{account.username} is here already"
    if own is not None and (own.added_at_ms or 0) > (account.added_at_ms or 0):
        return f"Kept the newer token of {account.username}"
    is_new = store.add(account, activate=False)
    return f"{'Added' if is_new else 'Renewed the token of'} {account.username}"


def cmd_logout(args: Any) -> int:
    """Forget an account, or all."""
    config = _load_config()
    store = AccountStore(config.folder)
    if args.all:
        gone = store.clear()
    else:
        active = store.active()
        name = args.name or (active.username if active else None)
        if name is None:
            print("Nobody is signed in.")
            return 0
        gone = [store.remove(name)]
    state = State(config.folder / STATE_NAME)
    for account in gone:
        state.clear_cooldowns(account.username)
    print(f"Forgot {', '.join(a.username for a in gone) or 'nobody'}.")
    left = store.active()
    if left:
        print(f"The active account is {left.username}.")
    if gone:
        print("The token itself still works: revoke it on puter.com (Settings, Security).")
    return 0


def cmd_switch(args: Any) -> int:
    """Make another account the active one."""
    account = AccountStore(_load_config().folder).switch(args.name)
    _log.info("Auth: Switched account - %s", account.username)
    print(f"The active account is {account.username}.")
    return 0


def cmd_status(args: Any) -> int:
    """Who is signed in, and who rests."""
    config = _load_config()
    store = AccountStore(config.folder)
    state = State(config.folder / STATE_NAME)
    if args.clear_cooldowns:
        count = len(state.cooldowns(time.time()))
        state.clear_cooldowns()
        told = f"Ended {count} rest{'s' * (count != 1)}."
        print(json.dumps({"cleared": count}) if args.json else told)
        return 0
    if args.check:
        results = list(_checks(config))
        for fine, text in results:
            print(f"{'ok  ' if fine else 'FAIL'}  {text}")
        return 0 if all(fine for fine, _ in results) else 1
    accounts, active = store.accounts(), store.active()
    report = _status_report(accounts, active, state, time.time())
    signed_in = bool(accounts or os.environ.get("PUTER_AUTH_TOKEN"))
    if args.json:
        print(json.dumps({"config_dir": str(config.folder), **report}))
        return 0 if signed_in else 1
    if os.environ.get("PUTER_AUTH_TOKEN"):
        print("PUTER_AUTH_TOKEN is set: its account is used, and none of these.")
    for line in _status_lines(report, time.time()):
        print(line)
    if not accounts:
        print(_not_signed_in_text(store))
    return 0 if signed_in else 1


def _status_report(
    accounts: Sequence[Account], active: Account | None, state: State, now: float
) -> JSON:
    """What `status` tells, as plain values."""
    rests = _resting(state, accounts, now)
    used = state.last_used_ms()
    return {
        "accounts": [
            {
                "username": a.username,
                "active": active is not None and a.username == active.username,
                "temporary": a.is_temporary,
                "added_at_ms": a.added_at_ms,
                "last_used_ms": used.get(a.username, a.last_used_ms),
                "needs_login": any(c.account == a.username and c.reason == "login" for c in rests),
            }
            for a in accounts
        ],
        "cooldowns": [
            {
                "account": c.account,
                "model": c.model or None,
                "reason": c.reason,
                "strikes": c.strikes,
                "seconds_left": round(c.until_s - now, 1),
            }
            for c in rests
            if c.reason != "login"
        ],
    }


def _status_lines(report: JSON, now: float) -> Iterator[str]:
    for account in report["accounts"]:
        notes = ["temporary"] if account["temporary"] else []
        notes += ["needs a new sign-in: python -m puter login"] if account["needs_login"] else []
        notes.append(f"last used {_ago(account['last_used_ms'], now)}")
        yield f"{'*' if account['active'] else ' '} {account['username']}  ({', '.join(notes)})"
    for rest in report["cooldowns"]:
        what = f"{rest['model']} on {rest['account']}" if rest["model"] else rest["account"]
        yield f"  resting: {what}, {rest['seconds_left']:.0f} s left ({rest['reason']})"


def _not_signed_in_text(store: AccountStore) -> str:
    """How to sign in, or to bring along the accounts of the plugin."""
    from pathlib import Path

    for folder in (Path.home() / ".config" / "opencode", Path.home() / ".opencode"):
        path = folder / ACCOUNTS_NAME
        if path.exists() and path != store.path:
            return (
                f"{_NOBODY}\nOr take the plugin's accounts: python -m puter login --import {path}"
            )
    return _NOBODY


def cmd_whoami(args: Any) -> int:
    """Whose token is in use, as the server says."""
    with _client() as client:
        told = _signed_in(client, client.whoami)
    if args.json:
        print(json.dumps(told, ensure_ascii=False))
    else:
        kind = " (temporary)" if told.get("is_temp") else ""
        print(f"{told.get('username')}{kind}")
    return 0


def cmd_models(args: Any) -> int:
    """The catalogue as a table."""
    with _client() as client:
        found = client.models(args.provider, args.free or None, args.refresh)
    found = matching_models(found, args.search)
    if args.tools:
        found = [m for m in found if m.tools is not False]
    if args.vision:
        found = [m for m in found if m.inputs and "image" in m.inputs]
    found.sort(key=MODEL_SORTS[args.sort])
    if args.json:
        print(json.dumps([as_dict(m) for m in found], ensure_ascii=False))
        return 0
    head = ("MODEL", "PROVIDER", "CONTEXT", "INPUT", "TOOLS", "$/M IN", "$/M OUT")
    table = [head, *map(_model_row, found)]
    for line in _table(table, "<<><<>>", (3, 1, 2, 4, 6, 5)):
        print(line)
    if not found:
        _info("No model is like that.")
    return 0


def _model_row(model: Model) -> tuple[str, ...]:
    tools = {True: "yes", False: "no", None: "?"}[model.tools]
    context = f"{model.context:,}" if model.context else "?"
    inputs = "+".join(model.inputs) if model.inputs else "?"
    prices = (model.input_usd_per_million, model.output_usd_per_million)
    shown = ["free" if model.free else "?" if p is None else f"{p:g}" for p in prices]
    return (model.id, model.provider, context, inputs, tools, *shown)


def _table(rows: Sequence[Sequence[str]], sides: str, less: Sequence[int] = ()) -> Iterator[str]:
    """Rows of texts as lines with aligned columns (`<` or `>` a column).

    On a terminal that is too narrow the columns of `less` are left out, in that order.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    shown = list(range(len(widths)))
    for column in less if sys.stdout.isatty() else ():
        if sum(widths[i] + 2 for i in shown) - 2 > terminal_columns():
            shown.remove(column)
    for row in rows:
        yield "  ".join(f"{row[i]:{sides[i]}{widths[i]}}" for i in shown).rstrip()


def terminal_columns() -> int:
    """The width of the terminal, as `COLUMNS` or the terminal itself says, else 80."""
    told = os.environ.get("COLUMNS", "")
    if told.isdecimal() and int(told) > 0:
        return int(told)
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 80  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):  # no terminal there
        return 80


def cmd_usage(args: Any) -> int:
    """What may still be spent."""
    with _client() as client:
        if not client.accounts:
            _signed_in(client, client.whoami)
        active = client.active_account
        asked = client.accounts if args.all else [active] if active else []
        told = credits_of(client, asked)
    failed = [t for _, t in told if isinstance(t, PuterError)]
    if args.json:
        print(json.dumps([_credit_report(a, t) for a, t in told], ensure_ascii=False))
    else:
        for account, credit in told:
            for line in _credit_lines(account, credit):
                print(line)
    return 1 if failed else 0


def _credit_report(account: Account, credit: Credit | PuterError) -> JSON:
    if isinstance(credit, PuterError):
        return {"username": account.username, "error": str(credit)}
    told = {k: v for k, v in as_dict(credit).items() if k not in ("raw", "by_api")}
    by_api = {
        name: {"cost": cost, "units": units, "count": count}
        for name, (cost, units, count) in credit.by_api.items()
    }
    return {"username": account.username, "error": None, **told, "by_api": by_api}


def _credit_lines(account: Account, credit: Credit | PuterError) -> Iterator[str]:
    """An account's credit with a bar, and what it went to."""
    yield f"{account.username}: {_credit_words(credit)}"
    if isinstance(credit, PuterError):
        return
    share = credit.remaining / credit.allowance if credit.allowance > 0 else 0.0
    share = min(max(share, 0.0), 1.0)
    yield f"  [{_bar(round(20 * share))}] {100 * share:.0f}% ({credit_word(share)})"
    rows = sorted(credit.by_api.items(), key=lambda row: -row[1][0])
    if rows:
        shown = [(n, money(c, credit.unit), f"{u:,.0f}", f"{k:,}") for n, (c, u, k) in rows]
        head = ("  USED FOR", "COST", "UNITS", "CALLS")
        yield from _table([head, *_indented(shown)], "<>>>")


def _indented(rows: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    return ((f"  {row[0]}", *row[1:]) for row in rows)


def credit_word(share: float) -> str:
    """A word for the share of the credit that is left (0 to 1)."""
    words = ((0.5, "plenty"), (0.2, "fair"), (0.0, "low"))
    return next((word for least, word in words if share > least), "used up")


def cmd_stats(args: Any) -> int:
    """How the models have done."""
    with _client() as client:
        if args.reset:
            client.reset_stats(args.model)
            print(f"The figures{f' of {args.model}' if args.model else ''} begin anew.")
            return 0
        found = client.stats(args.model)
    if args.json:
        print(json.dumps([as_dict(s) for s in found], ensure_ascii=False))
        return 0
    if not found:
        print("There are no figures yet.")
        return 0
    head = ("MODEL", "ASKED", "OK", "P50", "P95", "FIRST", "TOK/S", "COST")
    rows = [_stats_row(s) for s in found]
    for line in _table([head, *rows], "<>>>>>>>", (4, 5, 6, 3, 2)):
        print(line)
    for stats in found:
        if stats.failures:
            told = ", ".join(f"{k} {v}" for k, v in sorted(stats.failures.items()))
            print(f"failures of {stats.model}: {told}")
    return 0


def _stats_row(stats: ModelStats) -> tuple[str, ...]:
    def shown(value: float | None, unit: str) -> str:
        return "-" if value is None else f"{value:.2f}{unit}"

    times = (shown(stats.p50_s, "s"), shown(stats.p95_s, "s"), shown(stats.first_s, "s"))
    speed = "-" if stats.tokens_per_s is None else f"{stats.tokens_per_s:.0f}"
    counts = (str(stats.requests), str(stats.successes))
    return (stats.model, *counts, *times, speed, f"${stats.cost_usd:.4f}")


def cmd_cache(args: Any) -> int:
    """The kept replies."""
    with _client() as client:
        config = client.config
        if args.clear:
            print(f"Forgot {client._ledger.replies.cache_clear()} replies.")
            return 0
        told = client._ledger.replies.cache_stats(time.time(), config.cache_ttl_ms / 1000)
        place = client._ledger.replies.path
    asked = told["hits"] + told["misses"]
    rate = f"{100 * told['hits'] / asked:.0f}%" if asked else "-"
    if args.json:
        print(json.dumps({**told, "enabled": config.cache_enabled, "path": place}))
        return 0
    state = "on" if config.cache_enabled else "off (set cache_enabled to true)"
    print(f"Keeping replies is {state}; they are in {place}")
    print(
        f"{told['entries']} of {config.cache_max_entries} entries, {told['fresh']} fresh, ", end=""
    )
    print(f"{told['bytes']:,} bytes")
    print(f"{asked} look-ups, {rate} found; kept for {config.cache_ttl_ms / 1000:.0f} s")
    return 0


def _checks(config: Config) -> Iterator[tuple[bool, str]]:
    """Everything that a call needs, as (is it fine, what to say), one after the other."""
    yield True, f"settings: {config.folder / CONFIG_NAME}"
    store = AccountStore(config.folder)
    for path in (store.path, config.folder / STATE_NAME):
        if os.name != "nt" and path.exists():
            mode = path.stat().st_mode & 0o777
            fine = mode & 0o077 == 0
            yield (fine, f"{path}: mode {mode:o}" + ("" if fine else f"; do: chmod 600 {path}"))
    with Puter(config=config) as client:
        try:
            accounts = client.accounts
            yield (
                bool(accounts),
                f"{len(accounts)} accounts" + ("" if accounts else "; do: python -m puter login"),
            )
        except PuterError as error:
            yield False, str(error)
            return
        for account in accounts:
            try:
                name = account_of(
                    account.token, replace(config, auto_create_temp_user=True)
                ).username
                yield True, f"the token of {account.username} works ({name})"
            except PuterError as error:
                yield False, f"the token of {account.username}: {error}"
        yield from _server_checks(client)


def _server_checks(client: Puter) -> Iterator[tuple[bool, str]]:
    base = client.config.api_base_url
    try:
        url = f"{_api_origin(client.config)}/puterai/chat/models"
        answer = client._transport.ask("GET", url)
        yield True, f"{base} answers"
    except PuterError as error:
        yield False, str(error)
        return
    off_s = _clock_error_s(answer.date, time.time())
    if off_s is not None:
        fine = abs(off_s) < 300
        yield (fine, f"the clock differs by {off_s:.0f} s" + ("" if fine else "; set it right"))
    try:
        yield True, f"{len(client.models(refresh=True))} models"
    except PuterError as error:
        yield False, f"the model list: {error}"


def _clock_error_s(date: str | None, now: float) -> float | None:
    """How far our clock is ahead of a server's Date header, in seconds."""
    from email.utils import parsedate_to_datetime

    try:
        return now - parsedate_to_datetime(date).timestamp() if date else None
    except ValueError:
        return None


def cmd_serve(args: Any) -> int:
    """Run a server until it is told to stop."""
    if args.mcp:
        serve_mcp(_client)
    return _serve_openai(args)


def _serve_openai(args: Any) -> int:
    import signal

    stop = threading.Event()
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), lambda *_: stop.set())
    key = args.api_key or os.environ.get("PUTER_SERVER_API_KEY") or None
    with _client() as client:
        try:
            server = OpenAIServer(
                client, args.host, args.port, key, args.allow_origin, args.max_connections
            )
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            _info(
                f"error: Cannot listen on {args.host}:{args.port} ({reason}). Try another --port."
            )
            return 1
        server.start()
        _announce(server, client, key)
        while not stop.wait(0.5):  # in short waits: a signal cannot end a long one everywhere
            pass
        _info("Stopping; what runs may take a moment to end.")
        server.stop()
    return 0


def _announce(server: OpenAIServer, client: Puter, key: str | None) -> None:
    """Tell where the server is and how a client is set up for it."""
    print(f"OpenAI-compatible server: {server.url}", flush=True)
    shown = "the one you gave" if key else "anything, such as puter"
    print(f"For your client: base URL {server.url}, API key {shown}.", flush=True)
    if not client.accounts:
        print("Nobody is signed in yet: python -m puter login", flush=True)
    try:
        print(f"{len(client.models())} models; Ctrl-C stops.", flush=True)
    except PuterError as error:
        _info(f"The model list cannot be had now: {error}")


# What other programs read, as seen in: OpenCode 1.18.33, Claude Code 2.1.197, Continue's cn
# 1.5.47, aider 0.86.2 and llm 0.36 (each run on such a block), Zed of autumn 2026 and Claude
# Desktop of August 2026 (read in their sources and manuals).
_BASE_URL = f"http://127.0.0.1:{SERVER_PORT}/v1"
_MARK_BEGIN, _MARK_END = "# >>> puter.py", "# <<< puter.py"
_OPENCODE_KINDS = ("text", "audio", "image", "video", "pdf")  # others make its file invalid


class ConfigSnippet:
    """A part of a program's settings: where it goes, and what goes there.

    JSON: `values` maps key paths to values. YAML: `lines` are items of the list under `key`
    (of the whole file, for key "").
    """

    def __init__(
        self,
        path: Path,
        values: Mapping[tuple[str, ...], Any] | None = None,
        lines: Mapping[str, list[str]] | None = None,
        comments: bool = False,
        fresh: str = "",
    ) -> None:
        self.path = path
        self.values = values or {}
        self.lines = lines or {}
        self.comments = comments  # whether the program takes JSON with comments
        self.fresh = fresh  # what a new file begins with

    def text(self) -> str:
        """The block alone, as a file that holds nothing else."""
        return self.merged("")

    def merged(self, old: str) -> str:
        """The old text with the block in it; raises ValueError if it cannot be read."""
        new = old.lstrip("\ufeff") if old.strip() else self.fresh
        if self.values and new and not self.comments:
            json.loads(new)  # this program takes plain JSON only: say so before it does
        new = jsonc_with_all(new or "{}\n", self.values) if self.values else new
        for key, lines in self.lines.items():
            new = yaml_with(new, key, lines)
        return new


def jsonc_with(text: str, path: Sequence[str], value: Any) -> str:
    """JSON text (comments and trailing commas allowed) with a value put at a path of keys.

    Everything else stays as it is, to the letter. Raises ValueError for what is no object.
    """
    start = _jsonc_skip(text, 0)
    end = _jsonc_end(text, start)
    if _jsonc_skip(text, end) < len(text):
        raise ValueError(f"there is something behind the end, at {_place(text, end)}")
    for depth, key in enumerate(path):
        if text[start : start + 1] != "{":
            raise ValueError(f"{'.'.join(path[:depth]) or 'it'} is not an object")
        members = _jsonc_members(text, start)
        indent = "  " * (depth + 1)
        found = [m for m in members if m[0] == key]
        if not found:
            for name in reversed(path[depth + 1 :]):
                value = {name: value}
            shown = json.dumps(value, indent=2, ensure_ascii=False).replace("\n", f"\n{indent}")
            added = f"\n{indent}{json.dumps(key)}: {shown}" + (
                "," if members else f"\n{indent[2:]}"
            )
            return text[: start + 1] + added + text[start + 1 :].lstrip(" \t" if members else None)
        _, start, end = found[-1]  # of twins every parser takes the last
    shown = json.dumps(value, indent=2, ensure_ascii=False).replace("\n", f"\n{'  ' * len(path)}")
    return text[:start] + shown + text[end:]


def jsonc_with_all(text: str, values: Mapping[tuple[str, ...], Any]) -> str:
    """As `jsonc_with` for several; new keys of the top are put in together, for speed."""
    start = _jsonc_skip(text, 0)
    known = {m[0] for m in _jsonc_members(text, start)} if text[start : start + 1] == "{" else set()
    new = {
        path[0]: value for path, value in values.items() if len(path) == 1 and path[0] not in known
    }
    rest = {path: value for path, value in values.items() if path[0] not in new}
    for path, value in rest.items():
        text = jsonc_with(text, path, value)
    if not new:
        return text
    shown = json.dumps(new, indent=2, ensure_ascii=False)[2:-2]  # the members alone
    marker = "puter.py puts its members here"
    return jsonc_with(text, (marker,), 0).replace(f'  "{marker}": 0', shown)


def _jsonc_skip(text: str, at: int) -> int:
    """Behind blanks and comments."""
    found = re.compile(r"(?:\s+|//[^\n]*|/\*.*?\*/)*", re.DOTALL).match(text, at)
    return found.end() if found else at


def _jsonc_end(text: str, at: int) -> int:
    """Behind the value that begins here; raises ValueError."""
    if text[at : at + 1] in ("{", "["):
        closing = "}" if text[at] == "{" else "]"
        members = _jsonc_members(text, at)
        inner = _jsonc_skip(text, members[-1][2] if members else at + 1)
        inner = _jsonc_skip(text, inner + 1) if text[inner : inner + 1] == "," else inner
        if text[inner : inner + 1] != closing:
            raise ValueError(f"{closing} is missing at {_place(text, inner)}")
        return inner + 1
    try:
        return json.JSONDecoder().raw_decode(text, at)[1]
    except ValueError as error:
        raise ValueError(f"no value at {_place(text, at)}") from error


def _jsonc_members(text: str, start: int) -> list[tuple[str, int, int]]:
    """(key, where its value begins, where it ends) of the object or list that begins here."""
    is_object, at = text[start] == "{", _jsonc_skip(text, start + 1)
    members = []
    while text[at : at + 1] not in ("}", "]", ""):
        key = ""
        if is_object:
            end = _jsonc_end(text, at) if text[at] == '"' else at
            colon = _jsonc_skip(text, end)
            if end == at or text[colon : colon + 1] != ":":
                raise ValueError(f"a key is wrong at {_place(text, at)}")
            key, at = json.loads(text[at:end]), _jsonc_skip(text, colon + 1)
        end = _jsonc_end(text, at)
        members.append((key, at, end))
        at = _jsonc_skip(text, end)
        if text[at : at + 1] != ",":
            break
        at = _jsonc_skip(text, at + 1)
    return members


def _place(text: str, at: int) -> str:
    return f"line {text.count(chr(10), 0, at) + 1}"


def yaml_with(text: str, key: str, lines: Sequence[str]) -> str:
    """YAML text with items put at the end of a list, between two marks.

    Items between our marks are replaced; everything else stays. `key` is a list at the top
    of the file, or "" when the file is a list itself. Raises ValueError for what this cannot
    do without a YAML parser: a list in one line, or a file of another shape.
    """
    begin, end = (f"{mark} {key}".rstrip() for mark in (_MARK_BEGIN, _MARK_END))
    text = _without_block(text, begin, end)
    rows = text.rstrip("\n").split("\n") if text.strip() else []
    if not key:
        items = [r for r in rows if _says_something(r)]
        indent = re.match(r" *", items[0]).group() if items else ""  # type: ignore[union-attr]
        if any(not r.startswith((f"{indent}- ", f"{indent} ")) and r.strip() != "-" for r in items):
            raise ValueError("it is not a list")
        return "\n".join([*rows, *_indented_by(indent, [begin, *lines, end]), ""])
    heads = [rf"{quote}{re.escape(key)}{quote}\s*:" for quote in ("", '"', "'")]
    at = next((i for i, r in enumerate(rows) if re.match("|".join(heads), r)), None)
    if at is None:
        return "\n".join([*rows, f"{key}:", *_indented_by("  ", [begin, *lines, end]), ""])
    told = re.sub(r"^[^:]*:\s*|\s*#.*$", "", rows[at])
    if told.replace(" ", "") in ("[]", "~", "null"):
        rows[at] = f"{rows[at].partition(':')[0]}:"
    elif told:
        raise ValueError(f"{key} is written in one line")
    item = next((r for r in rows[at + 1 :] if _says_something(r)), "")
    first = re.match(r"( *)-", item)
    indent = first.group(1) if first else "  "
    last = at
    for i in range(at + 1, len(rows)):
        if rows[i].startswith((f"{indent} ", f"{indent}-")):
            last = i  # the list's own; comments and blanks behind it belong to what follows
        elif _says_something(rows[i]):
            break
    block = _indented_by(indent, [begin, *lines, end])
    return "\n".join([*rows[: last + 1], *block, *rows[last + 1 :], ""])


def _says_something(row: str) -> bool:
    """Whether a line of YAML is neither blank nor a comment."""
    return row.strip() != "" and not row.lstrip().startswith("#")


def _without_block(text: str, begin: str, end: str) -> str:
    """The text without what an earlier run put between the marks; raises ValueError."""
    rows = text.split("\n")
    marks = [r.strip() for r in rows if r.strip() in (begin, end)]
    if marks not in ([], [begin, end]):
        raise ValueError(f"the marks {begin!r} and {end!r} do not stand in pairs")
    if not marks:
        return text
    places = [i for i, r in enumerate(rows) if r.strip() in (begin, end)]
    return "\n".join([*rows[: places[0]], *rows[places[1] + 1 :]])


def _indented_by(indent: str, lines: Iterable[str]) -> list[str]:
    return [indent + line for line in lines]


def _home(*parts: str) -> Path:
    from pathlib import Path

    return Path.home().joinpath(*parts)


def _app_folder(name: str, environ: Mapping[str, str], platform: str) -> Path:
    """Where a desktop program keeps its settings, by platform."""
    from pathlib import Path

    if platform == "win32":
        return Path(environ.get("APPDATA") or _home("AppData", "Roaming")) / name
    if platform == "darwin":
        return _home("Library", "Application Support", name)
    return Path(environ.get("XDG_CONFIG_HOME") or _home(".config")) / name


def mcp_command() -> list[str]:
    """How another program starts the MCP server, from whatever folder it runs in."""
    from pathlib import Path

    here = Path(__file__).resolve()
    installed = any(part in ("site-packages", "dist-packages") for part in here.parts)
    return [sys.executable, *(("-m", "puter") if installed else (str(here),)), "serve", "--mcp"]


def seems_to_reason(model: Model) -> bool:
    """Whether a model thinks before it answers, by its name: the catalogue does not say."""
    pattern = r"(^|[/:-])(o[134]|gpt-5|deepseek-r|qwq|qvq)|reason|thinking|magistral"
    return re.search(pattern, model.id.lower()) is not None


def opencode_block(models: Sequence[Model], base_url: str, key: str | None) -> list[ConfigSnippet]:
    """OpenCode: a provider on the bundled openai-compatible package, and the MCP server."""
    from pathlib import Path

    folder = Path(os.environ.get("XDG_CONFIG_HOME") or _home(".config")) / "opencode"
    named = folder / "opencode.jsonc"
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Puter.com",
        "options": {
            "baseURL": base_url,
            "apiKey": "{env:PUTER_SERVER_API_KEY}" if key else "puter",
        },
        "models": {m.id: _opencode_model(m) for m in models},
    }
    mcp = {"type": "local", "command": mcp_command(), "enabled": True}
    values: dict[tuple[str, ...], Any] = {("provider", "puter"): provider, ("mcp", "puter"): mcp}
    fresh = '{\n  "$schema": "https://opencode.ai/config.json"\n}\n'
    path = named if named.exists() else folder / "opencode.json"
    return [ConfigSnippet(path, values, comments=True, fresh=fresh)]


def _opencode_model(model: Model) -> JSON:
    inputs = [k for k in model.inputs or ("text",) if k in _OPENCODE_KINDS]
    told: JSON = {
        "name": model.name,
        "attachment": len(inputs) > 1,
        "reasoning": seems_to_reason(model),
        "temperature": True,
        "tool_call": model.tools is not False,
        "modalities": {"input": inputs, "output": ["text"]},
    }
    if model.context and model.max_tokens:  # it takes both or none
        told["limit"] = {"context": model.context, "output": model.max_tokens}
    return told


def zed_block(models: Sequence[Model], base_url: str, key: str | None) -> list[ConfigSnippet]:
    """Zed: an OpenAI-compatible provider (its key comes from PUTER_API_KEY), and the server."""
    listed = [
        {
            "name": m.id,
            "display_name": m.name,
            "max_tokens": m.context or 128_000,
            **({"max_output_tokens": m.max_tokens} if m.max_tokens else {}),
            "capabilities": {  # it wants all four, or fails the whole map
                "tools": m.tools is not False,
                "images": "image" in (m.inputs or ()),
                "parallel_tool_calls": False,
                "prompt_cache_key": False,
            },
        }
        for m in models
    ]
    provider = {"api_url": base_url, "available_models": listed}
    command, *args = mcp_command()
    values: dict[tuple[str, ...], Any] = {
        ("language_models", "openai_compatible", "puter"): provider,
        ("context_servers", "puter"): {"command": command, "args": args, "env": {}},
    }
    folder = _app_folder("Zed" if sys.platform == "win32" else "zed", os.environ, sys.platform)
    if sys.platform == "darwin":
        folder = _home(".config", "zed")
    return [ConfigSnippet(folder / "settings.json", values, comments=True)]


def _mcp_json(path: Path, kind: JSON) -> list[ConfigSnippet]:
    command, *args = mcp_command()
    server = {**kind, "command": command, "args": args, "env": {}}
    return [ConfigSnippet(path, {("mcpServers", "puter"): server})]


def claude_desktop_block(
    models: Sequence[Model], base_url: str, key: str | None
) -> list[ConfigSnippet]:
    """Claude Desktop: the MCP server (it takes no OpenAI-compatible provider)."""
    from pathlib import Path

    folder = _app_folder("Claude", os.environ, sys.platform)
    if sys.platform == "win32":  # the installer of the app store keeps its own copy
        packages = Path(os.environ.get("LOCALAPPDATA") or _home("AppData", "Local")) / "Packages"
        for package in sorted(packages.glob("Claude_*")):
            folder = package / "LocalCache" / "Roaming" / "Claude"
    return _mcp_json(folder / "claude_desktop_config.json", {})


def claude_code_block(
    models: Sequence[Model], base_url: str, key: str | None
) -> list[ConfigSnippet]:
    """Claude Code: the MCP server, for the user (it takes no OpenAI-compatible provider)."""
    from pathlib import Path

    folder = os.environ.get("CLAUDE_CONFIG_DIR")
    path = (Path(folder) if folder else _home()) / ".claude.json"
    return _mcp_json(path, {"type": "stdio"})


def continue_block(models: Sequence[Model], base_url: str, key: str | None) -> list[ConfigSnippet]:
    """Continue: models with the provider `openai`, and the MCP server."""
    from pathlib import Path

    folder = Path(os.environ.get("CONTINUE_GLOBAL_DIR") or _home(".continue"))
    lines = []
    for m in models:
        can = [*(["tool_use"] if m.tools is not False else [])]
        can += ["image_input"] if "image" in (m.inputs or ()) else []
        # It sends names such as gpt-5 or o3 to another endpoint: the full id avoids that.
        vendor = next((a for a in m.aliases if "/" in a and ":" not in a), m.id)
        asked = vendor if re.match(r"gpt-5|o\d", m.id) else m.id
        lines += [
            f"- name: {json.dumps(f'Puter: {m.name}', ensure_ascii=False)}",
            "  provider: openai",
            f"  model: {json.dumps(asked)}",
            f"  apiBase: {base_url}",
            f"  apiKey: {'${{ secrets.PUTER_SERVER_API_KEY }}' if key else 'puter'}",
            "  roles: [chat, edit, apply]",
            f"  capabilities: {json.dumps(can)}",
        ]
        if m.context and m.max_tokens:
            # It refuses an answer that leaves less room than this for the question.
            most = min(m.max_tokens, m.context // 4)
            lines += [
                "  defaultCompletionOptions:",
                f"    contextLength: {m.context}",
                f"    maxTokens: {most}",
            ]
    command, *args = mcp_command()
    server = ["- name: puter", "  type: stdio", f"  command: {json.dumps(command)}"]
    server += [f"  args: {json.dumps(args)}"]
    fresh = "name: Local Config\nversion: 1.0.0\nschema: v1\n"
    parts = {"models": lines, "mcpServers": server}
    return [ConfigSnippet(folder / "config.yaml", lines=parts, fresh=fresh)]


def aider_block(models: Sequence[Model], base_url: str, key: str | None) -> list[ConfigSnippet]:
    """aider: each model with its own address, so that its other OpenAI models stay as they are."""
    lines: list[str] = []
    known: dict[tuple[str, ...], Any] = {}
    for m in models:
        name = f"openai/{m.id}"
        lines += [
            f"- name: {json.dumps(name)}",
            "  edit_format: diff",
            f"  weak_model_name: {json.dumps(name)}",
            "  use_repo_map: true",
            "  extra_params:",
            f"    api_base: {base_url}",
            f"    api_key: {'os.environ/PUTER_SERVER_API_KEY' if key else 'puter'}",
        ]
        known[(name,)] = {
            "max_tokens": m.max_tokens or 4_096,
            "max_input_tokens": m.context or 128_000,
            "max_output_tokens": m.max_tokens or 4_096,
            "input_cost_per_token": (m.input_usd_per_million or 0) / 1e6,
            "output_cost_per_token": (m.output_usd_per_million or 0) / 1e6,
            "litellm_provider": "openai",
            "mode": "chat",
            "supports_vision": "image" in (m.inputs or ()),
        }
    return [
        ConfigSnippet(_home(".aider.model.settings.yml"), lines={"": lines}),
        ConfigSnippet(_home(".aider.model.metadata.json"), known, comments=True),
    ]


def llm_block(models: Sequence[Model], base_url: str, key: str | None) -> list[ConfigSnippet]:
    """llm: extra OpenAI models; without a key name it sends a dummy and never a real key."""
    from pathlib import Path

    given = os.environ.get("LLM_USER_PATH")
    folder = Path(given) if given else _app_folder("io.datasette.llm", os.environ, sys.platform)
    lines = []
    for m in models:
        lines += [f"- model_id: {json.dumps(f'puter/{m.id}')}", f"  model_name: {json.dumps(m.id)}"]
        lines += [f"  api_base: {json.dumps(base_url)}"]
        lines += ["  api_key_name: puter"] if key else []
        lines += ["  vision: true"] if "image" in (m.inputs or ()) else []
        lines += ["  supports_tools: true"] if m.tools is not False else []
        lines += ["  supports_schema: true"]
    return [ConfigSnippet(folder / "extra-openai-models.yaml", lines={"": lines})]


_PROGRAMS: dict[str, tuple[Callable[..., list[ConfigSnippet]], str]] = {
    "opencode": (opencode_block, "Then: opencode --model puter/MODEL"),
    "zed": (
        zed_block,
        "Zed reads the key from PUTER_API_KEY, or asks: any will do if the server has none.",
    ),
    "claude-desktop": (
        claude_desktop_block,
        "Quit Claude Desktop before writing: it rewrites its file.",
    ),
    "claude-code": (
        claude_code_block,
        "By its own command: claude mcp add --scope user puter -- COMMAND",
    ),
    "continue": (continue_block, "Then choose a model whose name begins with Puter."),
    "aider": (aider_block, "Then: aider --model openai/MODEL"),
    "llm": (llm_block, "Then: llm -m puter/MODEL. If the server has a key: llm keys set puter"),
}


def cmd_config(args: Any) -> int:
    """Show the settings, or set up another program."""
    if args.what == "path":
        print(config_dir() / CONFIG_NAME)
        return 0
    if args.what == "show":
        return _show_config(args.json)
    build, note = _PROGRAMS[args.what]
    needs_models = not args.what.startswith("claude")
    models: list[Model] = []
    if needs_models:
        with _client() as client:
            models = client.models(args.provider, args.free or None)
    models = matching_models(models, args.search)
    if needs_models and not models:
        _info("error: No model is like that, so there is nothing to set up.")
        return 1
    key = os.environ.get("PUTER_SERVER_API_KEY")
    blocks = build(models, args.base_url, key)
    if args.write:
        changes = [_change_of(block) for block in blocks]  # all are read before one is written
        for change in changes:
            _write_change(*change, sure=args.yes)
    else:
        for block in blocks:
            _info(_dim(f"# {block.path}"))
            print(block.text(), end="")
    if needs_models:
        _info("The server must run: python -m puter serve --openai")
    _info(note.replace("COMMAND", " ".join(mcp_command())))
    return 0


def _show_config(as_json: bool) -> int:
    """Every setting, its value, and where it comes from."""
    values, sources = settings_and_sources()
    if as_json:
        told = {n: {"value": v, "source": sources[n]} for n, v in values.items()}
        print(json.dumps(told, ensure_ascii=False))
        return 0
    rows = [(n, json.dumps(v, ensure_ascii=False), sources[n]) for n, v in values.items()]
    short = [(n, v if len(v) <= 60 else f"{v[:57]}...", s) for n, v, s in rows]
    for line in _table([("SETTING", "VALUE", "FROM"), *short], "<<<"):
        print(line)
    return 0


def _change_of(block: ConfigSnippet) -> tuple[Path, bytes, bytes]:
    """(file, its bytes, what they should be); raises `ConfigError` if it cannot be read."""
    from pathlib import Path

    target = Path(os.path.realpath(block.path))
    try:
        old = target.read_bytes() if target.exists() else b""
        text = old.decode("utf-8")
        ends = "\r\n" if "\r\n" in text else "\n"
        new = block.merged(text.replace("\r\n", "\n")).replace("\n", ends)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{block.path} cannot be read ({error}); nothing was written",
            hint="Mend the file, or put the block there by hand: run this without --write.",
        ) from error
    return target, old, new.encode("utf-8")


def _write_change(target: Path, old: bytes, new: bytes, sure: bool) -> None:
    """Put a change into a program's file: a diff first, a backup beside it."""
    import difflib

    if new == old:
        print(f"{target} has it already.")
        return
    before, after = (
        data.decode("utf-8").replace("\r\n", "\n").splitlines(True) for data in (old, new)
    )
    name = str(target)
    sys.stderr.writelines(difflib.unified_diff(before, after, name, name))
    if not sure and _is_interactive() and not _confirm(f"Write this into {target}?"):
        print("Nothing was written.")
        return
    try:
        if (target.read_bytes() if target.exists() else b"") != old:
            raise ConfigError(
                f"{target} was changed meanwhile; nothing was written",
                hint="Run the command again.",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o600
        if old:
            backup = _unused_name(target)
            _write_private(backup, old)
            print(f"The old file is kept as {backup}")
        _write_private(target, new)
        target.chmod(mode)
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written ({error.strerror})", hint="Give yourself the right to."
        ) from error
    print(f"Wrote {target}")


def _unused_name(target: Path) -> Path:
    """A name for a backup beside the file that no other backup has."""
    stem = f"{target.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    names = (f"{stem}{more}.bak" for more in ("", *(f"-{n}" for n in range(2, 1_000))))
    return next(p for p in map(target.with_name, names) if not p.exists())


def _confirm(question: str) -> bool:
    """Whether the person says yes; the end of input is a no."""
    try:
        return input(f"{question} [Y/n] ").strip().lower() in ("", "y", "yes")
    except EOFError:
        return False


def _client() -> Puter:
    """The client of a command; what the user should know of goes to stderr."""
    return Puter(config=_load_config())


def _load_config() -> Config:
    """The settings of a command, with the log that they ask for on stderr."""
    config = Config.load()
    if config.debug:
        _log.show(_DEBUG)
    elif not config.quiet_mode:
        _log.show(_WARNING)
    return config


def _signed_in(client: Puter, work: Callable[[], _T]) -> _T:
    """Do the work; offer a login to a person who is not signed in."""
    try:
        return work()
    except AuthError:
        if client.accounts or not _is_interactive():
            raise
    _info("You are not signed in.")
    if not _confirm("Sign in with the browser now?"):
        raise AuthError("You are not signed in")
    account = _login_with_browser(client.config, False, LOGIN_PORT)
    _info(_keep(client.store, client.config, account))
    return work()


def _is_interactive() -> bool:
    """Whether somebody sits at a terminal who could answer."""
    return sys.stdin.isatty() and sys.stderr.isatty() and not os.environ.get("CI")


def _piped_text(wait: bool) -> str:
    """What a pipe or file holds on stdin, "" at a terminal; raises `BadRequestError`.

    With a prompt given (`wait` false), a pipe that stays silent is left alone, and said so.
    """
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    if not wait and not _has_input(IDLE_STDIN_S):
        _info(_dim("standard input is silent and was left alone (use - as the prompt to wait)"))
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadRequestError("Standard input is no UTF-8 text", hint="Pipe text.") from error


def _has_input(patience_s: float) -> bool:
    """Whether stdin has something to read, or has ended; files always have."""
    import select

    try:
        return bool(select.select([sys.stdin], [], [], patience_s)[0])
    except (OSError, ValueError):  # no socket on Windows: a pipe is read to its end there
        return True


def _ago(time_ms: int | None, now: float) -> str:
    if not time_ms:
        return "never"
    seconds = max(0, int(now - time_ms / 1000))
    for size, unit in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"


def _dim(text: str) -> str:
    """The text in grey on a terminal that has colours."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not sys.stderr.isatty() else f"\x1b[2m{text}\x1b[0m"


def _info(text: str) -> None:
    """A line for the person, on stderr."""
    if sys.stderr is not None:
        with suppress(BrokenPipeError):  # nobody listens there
            print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
