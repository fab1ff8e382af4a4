"""Every setting of the service: its variable, its default, its bounds and what it is for.

`from_env` reads a mapping such as os.environ and returns one frozen `Settings`; importing this
module reads nothing. An invalid value raises `SettingsError`.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from dotenv.parser import parse_stream
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    HttpUrl,
    Secret,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

M = TypeVar("M", bound=BaseModel)

RATE_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
# Settings, and what other software calls them.
ALIASES = {
    "CORS_ORIGINS": ("ALLOWED_ORIGINS", "CORS_ALLOWED_ORIGINS", "CORS_ALLOW_ORIGINS"),
    "DEFAULT_MODEL": ("OPENAI_MODEL", "MODEL", "MODEL_NAME", "LLM_MODEL"),
    "FORWARDED_ALLOW_IPS": ("TRUSTED_PROXIES", "TRUSTED_PROXY"),
    "MAX_OUTPUT_TOKENS": ("MAX_TOKENS", "MAX_COMPLETION_TOKENS"),
    "OPENAI_BASE_URL": ("OPENAI_API_BASE", "OPENAI_ENDPOINT", "OPENAI_HOST"),
    "STATE_URL": ("DATABASE_URL", "REDIS_URL"),
}


class SettingsError(Exception):
    """The service cannot start with these settings.

    The text is one line for the operator. It names the variable, states what the value must be, and
    shows the value unless it may be secret.
    """


class InUseError(SettingsError):
    """Another process uses the database that STATE_URL names."""


class Rate(NamedTuple):
    """The size of a token bucket: `limit` tokens, refilled evenly over `seconds`."""

    limit: Annotated[int, Field(ge=1, le=999_999_999)]
    seconds: int

    def __str__(self) -> str:
        unit = next(name for name, seconds in RATE_UNITS.items() if seconds == self.seconds)
        return f"{self.limit}/{unit}"


class ApiKey(NamedTuple):
    """An API key of a caller: a name for the log, and the SHA-256 digest of the key."""

    name: str
    digest: bytes


def _split(text: str) -> tuple[str, ...]:
    return tuple(item for part in text.split(",") if (item := part.strip()))


def _parse_rate(text: str) -> tuple[str, int | None] | None:
    limit, _, unit = text.partition("/")
    return None if text == "off" else (limit, RATE_UNITS.get(unit))


def _parse_api_keys(text: str) -> tuple[ApiKey, ...]:
    keys = []
    for number, entry in enumerate(text.split(","), start=1):
        # 20 random hexadecimal digits are 80 bits, which cannot be guessed.
        match = re.fullmatch("([a-z0-9-]{1,32}):([!-~]{20,})", entry.strip())
        if match is None or len(set(match[2])) < 8:
            problem = "is invalid" if ":" in entry else "has no colon between its name and its key"
            raise ValueError(f"entry {number} {problem}")
        keys.append(ApiKey(match[1], hashlib.sha256(match[2].encode()).digest()))
    return tuple(keys)


def _matching(pattern: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if not re.fullmatch(pattern, str(value)):
            raise ValueError
        return value

    return AfterValidator(check)


# Descriptions complete the sentence "NAME must be ..." in errors and in the documentation.
API_KEYS = (
    "NAME:KEY entries separated by commas, with names of a-z, 0-9 and -, and keys of at least 20"
    " visible ASCII characters, 8 of them different"
)
BODY = 'a JSON object such as {"temperature":0.3}, without model, messages, stream and n'
HEADERS = (
    "a JSON object of header names and strings, without Host, Connection, Content-*, Accept*,"
    " Transfer-Encoding and X-Client-Request-Id"
)
HOSTS = "host names such as localhost or *.example.com"
LEVELS = "debug, info, warning or error"
NAMES = "names such as groq,local-llm, without openai and mock"
NETWORKS = "IP addresses or networks such as 127.0.0.1 or 10.0.0.0/8, but not all addresses"
ORIGINS = "exact origins such as https://app.example.com"
RATE = "N/second, N/minute, N/hour, N/day or off, such as 10/minute"
STATE = "sqlite:///PATH, memory://, redis://HOST or, with TLS, rediss://HOST"
URL = "a URL such as http://localhost:11434/v1, without user, password, query and fragment"

JSON = BeforeValidator(lambda text: from_json(text, allow_inf_nan=False))
LIST = BeforeValidator(_split)
Switch = Annotated[bool, Field(description="true or false, on or off")]
Bytes = Annotated[int, Field(ge=2**16, le=2**40)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Seconds = Annotated[float, Field(ge=0.001, le=86400)]
Limit = Annotated[Rate | None, BeforeValidator(_parse_rate), Field(description=RATE)]
# A line break in a header value would make every request to the provider fail.
Token = Annotated[str, _matching("[!-~]+"), Field(description="visible ASCII without spaces")]
BaseUrl = Annotated[HttpUrl, _matching("https?://[^@/]+/[^?#]*"), Field(description=URL)]
Network = Annotated[IPv4Network | IPv6Network, _matching(".+/[1-9][0-9]*")]
Origin = Annotated[str, _matching(r"https?://[^\s/?#*@]+")]
Host = Annotated[str, _matching(r"\*|(\*\.)?[\w.-]+|\[[0-9a-f:.]+\]")]
StateUrl = Annotated[str, _matching("memory://|sqlite:///.+|rediss?://.+")]
Keys = Annotated[tuple[ApiKey, ...], BeforeValidator(_parse_api_keys)]
BodyField = Annotated[str, _matching("(?!(model|messages|stream|n)$).*")]
# The service sets these headers itself. A name is a token of RFC 9110, section 5.6.2.
RESERVED = "content-|accept|(host|connection|transfer-encoding|x-client-request-id)$"
HeaderName = Annotated[str, _matching(f"(?i)(?!{RESERVED})[!#$%&'*+.^_`|~0-9a-z-]+")]
Headers = Annotated[dict[HeaderName, Annotated[str, _matching("[ -~]*")]], JSON]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(str.lower)]


class ProviderSettings(BaseModel, frozen=True, hide_input_in_errors=True):
    """An OpenAI-compatible server. Its variables begin with its name: GROQ_API_KEY."""

    name: str

    # ---- Models and providers

    # The provider's API key. OPENAI_API_KEY adds the provider openai and makes it the default.
    api_key: Annotated[Secret[Token] | None, Field(repr=False)] = None
    # The URL of the provider's API, without /chat/completions.
    base_url: BaseUrl = HttpUrl("https://api.openai.com/v1")
    # Fields to add to the request body, such as {"temperature":0.3,"reasoning_effort":"low"}. They
    # override those of the service; null removes one.
    extra_body: Annotated[dict[BodyField, Any], JSON, Field(description=BODY)] = {}
    # Headers to add to requests, such as {"HTTP-Referer":"https://app.example.com"}. Authorization
    # replaces the one with the API key.
    extra_headers: Annotated[Headers, Field(repr=False, description=HEADERS)] = {}


class Settings(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """All settings. Each field is a variable of the same name in capitals.

    `make docs` writes the comment above each field into .env.example and docs/configuration.md.
    """

    # More OpenAI-compatible servers, by names that you choose, such as groq,local. Each needs a
    # GROQ_BASE_URL and can have GROQ_API_KEY, GROQ_EXTRA_BODY and GROQ_EXTRA_HEADERS.
    providers: Annotated[tuple[ProviderSettings, ...], Field(description=NAMES)] = ()
    # The provider of model ids without a provider prefix. Default: openai if it has a key, else the
    # first of PROVIDERS, else mock.
    default_provider: str | None = None
    # The model of requests without a model_id.
    default_model: str = "gpt-4o-mini"
    # The models that callers may request, such as gpt-4o-mini,groq/*. Default: DEFAULT_MODEL.
    models: Annotated[tuple[str, ...], LIST] = ()
    # Models to try, in this order, when a model fails before its first chunk, such as
    # groq/llama-3.3-70b.
    fallback_models: Annotated[tuple[str, ...], LIST] = ()
    # The system message of every conversation.
    system_prompt: str | None = None
    # The longest completion, in tokens. Default: the provider's limit.
    max_output_tokens: Count | None = None

    # ---- Network and callers

    # The address to listen on. The default accepts connections from this machine only; use 0.0.0.0
    # in a container.
    host: str = "127.0.0.1"
    # The port to listen on. 0 selects a free port.
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    # The Host headers to accept. On a developer's machine, localhost prevents DNS rebinding.
    allowed_hosts: Annotated[tuple[Host, ...], LIST, Field(description=HOSTS)] = ("*",)
    # The proxies whose X-Forwarded-For header is trusted, such as 127.0.0.1,10.0.0.0/8.
    forwarded_allow_ips: Annotated[tuple[Network, ...], LIST, Field(description=NETWORKS)] = ()
    # The origins of web pages that may call the API from a browser, such as
    # https://app.example.com.
    cors_origins: Annotated[tuple[Origin, ...], LIST, Field(description=ORIGINS)] = ()
    # The API keys of callers, such as web:KEY,batch:KEY, each with at least 20 characters, 8 of
    # them different. To rotate a key, list the old and the new one under the same name.
    api_keys: Annotated[Keys, Field(repr=False, description=API_KEYS)] = ()
    # Whether callers without an API key are accepted. false requires API_KEYS.
    allow_anonymous: Switch = True
    # The rate limit of each anonymous IP address.
    rate_limit: Limit = Rate(10, 60)
    # The rate limit of each name in API_KEYS.
    rate_limit_api_key: Limit = Rate(600, 60)

    # ---- Sessions and resumable streams

    # Where sessions are stored: sqlite:///PATH (sqlite:////data/chat.db is an absolute path),
    # memory://, or redis://USER:PASSWORD@HOST:6379/0 (rediss:// for TLS). Replicas that use the
    # same Redis also share rate limits.
    state_url: Annotated[StateUrl, Field(repr=False, description=STATE)] = "sqlite:///chat.db"
    # How long a session is stored after its last turn.
    session_ttl_seconds: Annotated[float, Field(ge=0.001, le=10**9)] = 86400
    # The maximum size of the SQLite file, in bytes. A full store rejects chat requests with 503
    # until sessions expire or are deleted.
    state_max_bytes: Bytes = 2**30
    # The number of sessions per caller once the store is half full. Beyond it, each new session
    # replaces the caller's oldest idle one. API keys get ten times as many.
    max_sessions_per_caller: Count = 1000
    # The length of the history that a session retains, in characters. Older turns are dropped.
    history_max_chars: Count = 32000

    # How long a stream with an Idempotency-Key continues without a client, and how long it can be
    # read again after its end. 0 turns resumable streams off.
    resume_seconds: Annotated[float, Field(ge=0, le=86400)] = 60
    # The size of the events that this process retains for resumable streams, in bytes.
    resume_max_bytes: Bytes = 2**24

    # ---- Limits

    # The size of a request body, in bytes.
    max_body_bytes: Annotated[int, Field(ge=64, le=2**24)] = 65536
    # The length of a message, in Unicode code points.
    max_message_chars: Count = 8000
    # The number of concurrent streams in this process.
    max_streams: Count = 1000
    # The number of concurrent streams per caller in this process. API keys get ten times as many.
    max_streams_per_caller: Count = 10
    # The time to connect to a provider, in seconds. All times may have fractions.
    connect_timeout_seconds: Seconds = 5
    # The time to the first chunk of a completion.
    first_token_timeout_seconds: Seconds = 60
    # The longest time between two chunks.
    idle_timeout_seconds: Seconds = 30
    # The longest time for a whole response.
    total_timeout_seconds: Seconds = 600
    # How long a client may stop reading before it is disconnected.
    write_timeout_seconds: Seconds = 30
    # The longest time for a request body to arrive.
    body_timeout_seconds: Seconds = 10
    # The interval of keep-alive comments while a stream is silent, so that proxies keep it open.
    heartbeat_seconds: Seconds = 15
    # The number of retries of the last model before its first chunk. Each may be billed.
    max_retries: Annotated[int, Field(ge=0, le=10)] = 2
    # How long a shutdown waits for streams to end. A second signal aborts them at once.
    drain_seconds: Annotated[float, Field(ge=0, le=86400)] = 20

    # ---- Operation

    # The lowest level of log messages. warning leaves out requests that succeeded.
    log_level: Annotated[LogLevel, Field(description=LEVELS)] = "info"
    # Whether to serve Prometheus metrics at /metrics.
    metrics: Switch = True
    # Whether to serve the playground at /.
    playground: Switch = True

    @property
    def public_state_url(self) -> str:
        """STATE_URL without user name, password and options."""
        return re.sub(r"^(rediss?://)(.*@)?([^?]*).*", r"\1\3", self.state_url)

    @property
    def default_provider_name(self) -> str:
        return self.default_provider or [*(each.name for each in self.providers), "mock"][0]

    def unknown_fallbacks(self) -> Iterator[str]:
        """Yield a problem for each of FALLBACK_MODELS whose prefix is not a provider."""
        known = ["mock", *(each.name for each in self.providers)]
        for model in self.fallback_models:
            name, slash, _ = model.partition("/")
            if slash and name not in known:
                sent = f"{self.default_provider_name} would receive the model id {model!r}"
                problem = f"FALLBACK_MODELS: {name} is not a provider, so {sent}"
                yield f"{problem}; to use {name}, {_remedy(name)}"

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        hosts = {**{each.name: each.base_url.host for each in self.providers}, "mock": None}
        name = self.default_provider_name
        if name not in hosts:
            problem = f"DEFAULT_PROVIDER must be one of {', '.join(hosts)} (got {name!r})"
            raise ValueError(f"{problem}; to use {name}, {_remedy(name)}")
        # Other servers may have model ids with a slash, such as meta-llama/llama-3.3-70b.
        if hosts[name] in (None, "api.openai.com"):
            for problem in self.unknown_fallbacks():
                raise ValueError(problem)
        if not self.allow_anonymous and not self.api_keys:
            raise ValueError("ALLOW_ANONYMOUS=false requires API_KEYS, or no request is accepted")
        return self


def variable_names(*providers: str) -> list[str]:
    """Return every name that `from_env` reads with these `providers`, OpenAI included.

    A secret has two names, NAME and NAME_FILE.
    """
    models: list[tuple[str, type[BaseModel]]]
    models = [(variable_prefix(name), ProviderSettings) for name in ("openai", *providers)]
    models.append(("", Settings))
    fields = [
        (prefix + name.upper(), info)
        for prefix, model in models
        for name, info in model.model_fields.items()
        if name != "name"
    ]
    return [name for name, _ in fields] + [f"{name}_FILE" for name, info in fields if not info.repr]


def from_env(env: Mapping[str, str]) -> Settings:
    """Return the settings in `env`, such as os.environ. Raise SettingsError if one is invalid."""
    openai = _build(ProviderSettings, env, "OPENAI_", name="openai")
    providers = [openai] if openai.api_key else []
    for name in dict.fromkeys(_split(_read(env, "PROVIDERS"))):
        # RATE_LIMIT_API_KEY would be a rate limit as well as a provider's API key.
        if not re.fullmatch("(?!(openai|mock|rate-limit)$)[a-z][a-z0-9-]{0,31}", name):
            raise SettingsError(f"PROVIDERS must be {NAMES} (got {name!r})")
        if not _read(env, f"{variable_prefix(name)}BASE_URL"):
            raise SettingsError(
                f"{variable_prefix(name)}BASE_URL must be set: PROVIDERS contains {name}"
            )
        providers.append(_build(ProviderSettings, env, variable_prefix(name), name=name))
    return _build(Settings, env, providers=tuple(providers))


def read_env_file(path: Path) -> dict[str, str]:
    """Return the variables in an .env file, or none if it does not exist.

    Values are literal: `$` has no meaning. A syntax error raises SettingsError, without the text of
    the line because it may contain a secret.
    """
    text = _read_file(path, str(path)) if path.exists() else ""
    values = {}
    for name, value, (original, line), error in parse_stream(StringIO(text)):
        if error or (name is not None and value is None):
            # `original` begins with the blank lines and comments above the statement.
            line += original[: -len(original.lstrip())].count("\n")
            raise SettingsError(f"{path}, line {line}, must be NAME=VALUE; close all quotes")
        if name is not None:
            values[name] = value or ""
    return values


def startup_warnings(settings: Settings, file: Iterable[str]) -> Iterator[str]:
    """Yield the warnings to log at start. `file` is the names of the variables in .env."""
    known = variable_names(*(each.name for each in settings.providers))
    for name in file:
        if name not in known:
            near = [setting for setting, aliases in ALIASES.items() if name in aliases]
            near = near or difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            of_provider = name.endswith(("_API_KEY", "_BASE_URL", "_EXTRA_BODY", "_EXTRA_HEADERS"))
            unless = " unless PROVIDERS contains its provider" if of_provider else ""
            yield f"{name} in .env is not a setting of this service{unless}{hint}"
    yield from settings.unknown_fallbacks()
    if not (settings.providers or settings.default_provider):
        remedy = "Set OPENAI_API_KEY in .env to use OpenAI."
        yield f"No provider is configured; using the mock provider. {remedy}"


def variable_prefix(provider: str) -> str:
    """Return what the variables of a provider begin with: LOCAL_LLM_ for local-llm."""
    return provider.upper().replace("-", "_") + "_"


def _remedy(provider: str) -> str:
    if provider == "openai":
        return "set OPENAI_API_KEY"
    return f"add it to PROVIDERS and set {variable_prefix(provider)}BASE_URL"


def _read(env: Mapping[str, str], name: str, *, secret: bool = False) -> str:
    """Return the value of a variable, for a secret also from the file NAME_FILE, or ""."""
    value = env.get(name, "").strip()
    # Python replaces bytes that are not UTF-8 with lone surrogates. JSON cannot represent them.
    if re.search("[\ud800-\udfff]", value):
        raise SettingsError(f"{name} must be UTF-8 text")
    path = env.get(f"{name}_FILE", "").strip() if secret else ""
    if not path:
        return value
    if value:
        raise SettingsError(f"{name} and {name}_FILE are both set; remove one")
    return _read_file(Path(path), f"{name}_FILE={path!r}").strip()


def _read_file(path: Path, source: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(f"{source} cannot be read: {reason}") from None


def _build(model: type[M], env: Mapping[str, str], prefix: str = "", **given: object) -> M:
    """Return a model of the variables with this prefix. Raise SettingsError for the first error."""
    values: dict[str, Any] = {}
    for field, info in model.model_fields.items():
        name = prefix + field.upper()
        if field not in given and (value := _read(env, name, secret=not info.repr)):
            values[field] = value
    try:
        return model(**values, **given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    detail = first["msg"].removeprefix("Value error, ") if first["type"] == "value_error" else ""
    if not first["loc"]:
        raise SettingsError(detail)
    field = str(first["loc"][0])
    problem = f"{prefix}{field.upper()} must be {requirement(model, field)}"
    # A URL may contain a password, or a key in its query.
    if model.model_fields[field].repr and not re.search("[@?]", values[field]):
        problem += f" (got {values[field]!r})"
    raise SettingsError(f"{problem}: {detail}" if detail else problem)


def requirement(model: type[BaseModel], field: str) -> str:
    """Return what the value of a setting must be, such as "an integer between 0 and 65535"."""
    schema = model.model_json_schema()["properties"][field]
    match {**schema.get("anyOf", [{}])[0], **schema}:
        case {"description": text}:
            return str(text)
        case {"minimum": least, "maximum": most, "type": kind}:
            return f"{'an' if kind == 'integer' else 'a'} {kind} between {least} and {most}"
    return "text"
