"""Every setting of the service: its default, its bounds and the reason for it.

`from_env` reads a mapping once and returns one frozen `Settings`. Nothing here looks at the
environment by itself. What can't be used raises `SettingsError`: one line that names the variable,
what it got (never for a secret) and what it takes.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from dotenv.parser import Binding, parse_stream
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    HttpUrl,
    SecretStr,
    ValidationError,
    model_validator,
)

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

RATE_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}


class SettingsError(Exception):
    """The service can't start like this. The text is one line for the operator."""


class Rate(NamedTuple):
    """A token bucket's size: `limit` requests at once, refilled evenly over `seconds`."""

    limit: int
    seconds: int

    def __str__(self) -> str:
        unit = next(name for name, seconds in RATE_UNITS.items() if seconds == self.seconds)
        return f"{self.limit}/{unit}"


class ApiKey(NamedTuple):
    """A caller's key: the name that may be logged, and the SHA-256 of the key itself."""

    name: str
    digest: bytes


def _items(text: str) -> tuple[str, ...]:
    """A list as it stands in the environment."""
    return tuple(item for part in text.split(",") if (item := part.strip()))


def _rate(value: str) -> Rate | None:
    if value == "off":
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,8})/(second|minute|hour|day)", value)
    if match is None:
        raise ValueError("takes N/second, N/minute, N/hour, N/day or off, such as 10/minute")
    return Rate(int(match[1]), RATE_UNITS[match[2]])


def _api_keys(value: str) -> tuple[ApiKey, ...]:
    """`name:key,name:key`; a name may stand twice, so that a key can be replaced without a gap."""
    keys = []
    for number, item in enumerate(value.split(","), start=1):
        name, _, key = item.strip().partition(":")
        if not re.fullmatch("[a-z0-9-]{1,32}", name):
            raise ValueError("takes name:key,name:key with names of a-z, 0-9 and - (at most 32)")
        # 20 characters of hex are 80 bits: what is shorter can be guessed.
        if not re.fullmatch("[!-~]{20,}", key):
            problem = f"key number {number} needs at least 20 visible ASCII characters"
            raise ValueError(f"takes name:key,name:key; {problem}")
        keys.append(ApiKey(name, hashlib.sha256(key.encode()).digest()))
    return tuple(keys)


def _network(value: str) -> IPv4Network | IPv6Network:
    with suppress(ValueError):
        if (network := ip_network(value)).prefixlen:
            return network
    raise ValueError("takes proxies' addresses and networks such as 10.0.0.0/8, never everybody")


def _matching(pattern: str, takes: str) -> AfterValidator:
    def check(value: T) -> T:
        text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        if not re.fullmatch(pattern, text):
            raise ValueError(f"takes {takes}")
        return value

    return AfterValidator(check)


# A newline in a header value would raise on every request; better once, here.
BEARER = "[!-~]+"
# As pydantic writes it down: no user, no query, no fragment.
BASE_URL = "https?://[^@/]+/[^?#]*"
ORIGIN = r"https?://[^\s/?#*@]+"
HOST = r"\*|(\*\.)?[\w.-]+|\[[0-9a-f:.]+\]"
STATE_URL = "memory://|sqlite:///.+|rediss?://.+"
STATE_URLS = (
    "sqlite:///PATH (sqlite:////PATH from /), memory://, redis://HOST or, with TLS, rediss://HOST"
)

LIST = BeforeValidator(_items)
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
Limit = Annotated[Rate | None, BeforeValidator(_rate)]
Bearer = Annotated[SecretStr, _matching(BEARER, "visible ASCII: no spaces, no line ends")]
OptionalKey = Annotated[Bearer | None, Field(repr=False)]
BaseUrl = Annotated[HttpUrl, _matching(BASE_URL, "a plain URL such as http://localhost:11434/v1")]
Network = Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]
Origin = Annotated[str, _matching(ORIGIN, "exact origins: https://app.example.com, never *")]
Host = Annotated[str, _matching(HOST, "host names such as localhost or *.example.com")]
StateUrl = Annotated[str, _matching(STATE_URL, STATE_URLS), Field(repr=False)]


class ProviderSettings(BaseModel, frozen=True, hide_input_in_errors=True):
    """An OpenAI-compatible server, asked at `{base_url}/chat/completions`."""

    name: str
    base_url: BaseUrl
    api_key: OptionalKey = None


class Settings(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """One variable a field, the name in capitals, and above it the reason for it, from which
    `make docs` writes .env.example and the README's table."""

    # ---- Models and providers

    # With a key, OpenAI answers; without one, a mock does.
    openai_api_key: OptionalKey = None
    # Where the provider openai is asked; another address for a gateway that speaks its API.
    openai_base_url: BaseUrl = HttpUrl("https://api.openai.com/v1")
    # More OpenAI-compatible servers, by names that you choose: groq,local. Each has an address,
    # GROQ_BASE_URL, and unless it needs none a key, GROQ_API_KEY.
    providers: tuple[ProviderSettings, ...] = ()
    # Who answers a bare model name. Unset: openai if it has a key, else the first of PROVIDERS,
    # else mock.
    default_provider: str | None = None
    # The model of requests that name none.
    default_model: str = "gpt-4o-mini"
    # Models that callers may ask for, with globs: gpt-4o-mini,groq/*. Unset: DEFAULT_MODEL alone.
    models: Annotated[tuple[str, ...], LIST] = ()
    # Asked in this order when a model fails before its first chunk: groq/llama-3.3-70b,mock/echo
    fallback_models: Annotated[tuple[str, ...], LIST] = ()
    # Goes before every conversation.
    system_prompt: str | None = None
    # The longest answer, in tokens. Unset: the provider's own limit.
    max_output_tokens: Count | None = None

    # ---- Who may call, from where, how often

    # The address to listen on: this machine alone. 0.0.0.0 in a container.
    host: str = "127.0.0.1"
    # The port to listen on; 0 takes a free one.
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    # Host headers to answer. On a developer's machine localhost keeps out pages that rebind their
    # name.
    allowed_hosts: Annotated[tuple[Host, ...], LIST] = ("*",)
    # Proxies whose X-Forwarded-For is believed, addresses and networks: 127.0.0.1,10.0.0.0/8
    forwarded_allow_ips: Annotated[tuple[Network, ...], LIST] = ()
    # Web pages that may call from a browser, exact origins: https://app.example.com
    cors_origins: Annotated[tuple[Origin, ...], LIST] = ()
    # Callers with keys of at least 20 characters: name:key,name:key. A name may stand twice, to
    # rotate.
    api_keys: Annotated[tuple[ApiKey, ...], BeforeValidator(_api_keys), Field(repr=False)] = ()
    # Whether callers without a key are answered; false needs API_KEYS.
    allow_anonymous: bool = True
    # For each anonymous address: N/second, N/minute, N/hour, N/day, or off.
    rate_limit: Limit = Rate(10, 60)
    # For each key, all that have its name together.
    rate_limit_api_key: Limit = Rate(600, 60)

    # ---- Sessions

    # Where conversations are kept: sqlite:///PATH (sqlite:////data/chat.db from the root), memory://
    # to lose them at the end, or redis://USER:PASSWORD@HOST:6379/0 (rediss:// with TLS) for several
    # processes, which then share their limits too.
    state_url: StateUrl = "sqlite:///chat.db"
    # A session ends this long after its last turn.
    session_ttl_seconds: Annotated[float, Field(gt=0, le=10**9, allow_inf_nan=False)] = 86400
    # What a session remembers, in characters: the newest whole turns that fit.
    history_max_chars: Count = 32000

    # ---- Limits

    # The body of a request, in bytes.
    max_body_bytes: Annotated[int, Field(ge=64, le=2**24)] = 65536
    # A message, in Unicode code points.
    max_message_chars: Count = 8000
    # Answers at once, in all.
    max_streams: Count = 1000
    # Answers at once for one address; a key may have ten times as many.
    max_streams_per_caller: Count = 10
    # How long the provider may take to accept a connection. Seconds take fractions.
    connect_timeout_seconds: Seconds = 5
    # How long it may take to begin its answer.
    first_token_timeout_seconds: Seconds = 60
    # How long it may pause between two chunks of it.
    idle_timeout_seconds: Seconds = 30
    # How long a whole answer may last.
    total_timeout_seconds: Seconds = 600
    # How long a client may take nothing of what it is sent.
    write_timeout_seconds: Seconds = 30
    # How long the body of a request may take to arrive.
    body_timeout_seconds: Seconds = 10
    # After so much silence a comment line keeps proxies from hanging up.
    heartbeat_seconds: Seconds = 15
    # Further tries of the last model before its first chunk; each may be billed.
    max_retries: Annotated[int, Field(ge=0, le=10)] = 2
    # For running answers to end when the service is told to stop; a second signal hurries.
    drain_seconds: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)] = 20

    # ---- What the operator sees

    # debug, info, warning or error; warning hides the lines of requests that did not fail.
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    # off removes /metrics.
    metrics: bool = True
    # off removes the page at /.
    playground: bool = True

    @property
    def configured_providers(self) -> tuple[ProviderSettings, ...]:
        """Every configured server, OpenAI first if it has a key."""
        if self.openai_api_key is None:
            return self.providers
        key, url = self.openai_api_key, self.openai_base_url
        return (ProviderSettings(name="openai", base_url=url, api_key=key), *self.providers)

    @property
    def public_state_url(self) -> str:
        """STATE_URL without user name and password."""
        return re.sub("//[^/]*@", "//", self.state_url)

    @property
    def default_provider_name(self) -> str:
        return self.default_provider or next(
            (each.name for each in self.configured_providers), "mock"
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [*(upstream.name for upstream in self.configured_providers), "mock"]
        if self.default_provider == "openai" and "openai" not in names:
            raise ValueError("DEFAULT_PROVIDER=openai needs OPENAI_API_KEY, which is not set")
        if self.default_provider_name not in names:
            known = ", ".join(names)
            raise ValueError(f"DEFAULT_PROVIDER={self.default_provider!r} takes one of {known}")
        if not self.allow_anonymous and not self.api_keys:
            raise ValueError("ALLOW_ANONYMOUS=false needs API_KEYS: nobody could ask anything")
        return self


# What is not shown may stand in a file, and stands in no error.
SECRETS = frozenset(name.upper() for name, field in Settings.model_fields.items() if not field.repr)


def variable_names() -> list[str]:
    """The names of all variables but those of `PROVIDERS`, which follow from its value."""
    return [name.upper() for name in Settings.model_fields]


def from_env(env: Mapping[str, str]) -> Settings:
    """`Settings` from a mapping such as `os.environ`. Raises SettingsError."""
    names = dict.fromkeys(_items(_read(env, "PROVIDERS", secret=False)))
    return _build(Settings, env, providers=tuple(_upstream(env, name) for name in names))


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of an .env file, as they stand there; none where there is no file. Raises
    SettingsError, which holds nothing of a line: it may be a secret's."""
    bindings: list[Binding] = []
    with _reading(str(path)), suppress(FileNotFoundError), path.open(encoding="utf-8") as file:
        bindings += parse_stream(file)
    values = {}
    for key, value, (text, line), broken in bindings:
        if broken or (key is not None and value is None):
            line += text[: -len(text.lstrip())].count("\n")
            raise SettingsError(f"{path}, line {line}: takes NAME=VALUE, quotes in pairs")
        if key is not None:
            values[key] = value or ""
    return values


def unknown_variable_warnings(file: Iterable[str], settings: Settings) -> Iterator[str]:
    """One warning for each name in `file`, the keys of an .env, that no setting reads."""
    known = [*variable_names(), *(f"{secret}_FILE" for secret in SECRETS)]
    for upstream in settings.providers:
        prefix = _prefix(upstream.name)
        known += [f"{prefix}_BASE_URL", f"{prefix}_API_KEY", f"{prefix}_API_KEY_FILE"]
    for name in file:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            provider = name.endswith(("_API_KEY", "_BASE_URL"))
            unless = " unless PROVIDERS names its provider" if provider else ""
            yield f"{name} in .env is not a setting of this service{unless}{hint}"


def _read(env: Mapping[str, str], name: str, *, secret: bool) -> str:
    """A variable's text, or that of the file that `NAME_FILE` names; "" where neither is set."""
    value = env.get(name, "").strip()
    # Python stands in lone surrogates for bytes of the environment that are no text.
    if value != value.encode(errors="ignore").decode():
        raise SettingsError(f"{name} is not text in UTF-8")
    path = env.get(f"{name}_FILE", "").strip() if secret else ""
    if not path:
        return value
    if value:
        raise SettingsError(f"{name} and {name}_FILE are both set: keep one")
    with _reading(f"{name}_FILE={path!r}"):
        return Path(path).read_text(encoding="utf-8").strip()


@contextmanager
def _reading(file: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise SettingsError(f"{file} can't be read: {reason}") from None


def _prefix(name: str) -> str:
    return name.upper().replace("-", "_")


def _upstream(env: Mapping[str, str], name: str) -> ProviderSettings:
    prefix = _prefix(name)
    # Not RATE_LIMIT_API_KEY either: it is no secret, and a classify_error of it would show the key.
    taken = name == "mock" or f"{prefix}_API_KEY" in variable_names()
    if taken or not re.fullmatch("[a-z][a-z0-9-]{0,31}", name):
        takes = "takes names such as groq or local-llm; openai and mock need no entry"
        raise SettingsError(f"PROVIDERS: {name!r} is not usable: {takes}")
    if not _read(env, f"{prefix}_BASE_URL", secret=False):
        raise SettingsError(f"{prefix}_BASE_URL is not set, but PROVIDERS names {name}")
    return _build(ProviderSettings, env, f"{prefix}_", name=name)


def _build(model: type[M], env: Mapping[str, str], prefix: str = "", **given: object) -> M:
    """A model of what is given and, for its other fields, of the variables of their names. What is
    wrong with the first of them that can't be used is told in one line."""
    values: dict[str, Any] = {}
    for field, info in model.model_fields.items():
        name = prefix + field.upper()
        if field not in given and (value := _read(env, name, secret=not info.repr)):
            values[field] = value
    try:
        return model(**values, **given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    message = re.sub("^Input should be (?=less|greater)", "takes a number ", message)
    message = re.sub("^Input should be", "takes", message)
    if not first["loc"]:
        raise SettingsError(message)
    field = str(first["loc"][0])
    name, got = prefix + field.upper(), values[field]
    # An address may hold a password, or a key in its query.
    secret = not model.model_fields[field].repr or re.search("[@?]", got)
    raise SettingsError(f"{name}: {message}" if secret else f"{name}={got!r}: {message}")
