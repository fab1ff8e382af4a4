"""Every setting of the service: its default, its bounds and the reason for it.

`from_env` reads a mapping once and returns one frozen `Settings`. Nothing here looks at the
environment by itself. What can't be used raises `SettingsError`: one line that names the variable,
what it got (never for a secret) and what it takes.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    HttpUrl,
    IPvAnyNetwork,
    SecretStr,
    ValidationError,
    model_validator,
)

OPENAI_BASE_URL = "https://api.openai.com/v1"
RATE_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}


class SettingsError(Exception):
    """The service can't start like this. The text is one line for the operator."""


class Rate(NamedTuple):
    """A token bucket's size: `limit` requests at once, refilled evenly over `seconds`."""

    limit: int
    seconds: int


class ApiKey(NamedTuple):
    """A caller's key: the name that may be logged, and the SHA-256 of the key itself."""

    name: str
    digest: bytes


def _items(text: str) -> tuple[str, ...]:
    return tuple(item for item in (part.strip() for part in text.split(",")) if item)


def _split(value: object) -> object:
    """A list as it stands in the environment; anything but text is left to pydantic."""
    return _items(value) if isinstance(value, str) else value


def _rate(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value == "off":
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,8})/(second|minute|hour|day)", value)
    if match is None:
        raise ValueError("takes N/second, N/minute, N/hour, N/day or off, such as 10/minute")
    return Rate(int(match[1]), RATE_UNITS[match[2]])


def _api_keys(value: object) -> object:
    """`name:key,name:key`; a name may stand twice, so that a key can be replaced without a gap."""
    if not isinstance(value, str):
        return value
    keys = []
    for item in value.split(","):
        name, _, key = item.strip().partition(":")
        if not re.fullmatch("[a-z0-9-]{1,32}", name):
            raise ValueError("takes name:key,name:key with names of a-z, 0-9 and - (at most 32)")
        # 20 characters of hex are 80 bits: what is shorter can be guessed.
        if not re.fullmatch("[!-~]{20,}", key):
            raise ValueError(f"the key of {name} needs at least 20 visible ASCII characters")
        keys.append(ApiKey(name, hashlib.sha256(key.encode()).digest()))
    return tuple(keys)


def _bearer(value: SecretStr) -> SecretStr:
    # A newline in a header value would raise on every request; better once, here.
    if not re.fullmatch("[!-~]+", value.get_secret_value()):
        raise ValueError("takes visible ASCII characters only: no spaces, no line ends")
    return value


def _base_url(value: HttpUrl) -> HttpUrl:
    if value.username or value.password or value.query or value.fragment:
        raise ValueError("takes a plain URL such as http://localhost:11434/v1")
    return value


def _origin(value: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#*@]+", value):
        raise ValueError("takes exact origins such as https://app.example.com, never *")
    return value


def _host(value: str) -> str:
    if not re.fullmatch(r"\*|(\*\.)?[A-Za-z0-9.\[\]:_-]+", value):
        raise ValueError("takes host names such as localhost or *.example.com")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
Bearer = Annotated[SecretStr, AfterValidator(_bearer)]
BaseUrl = Annotated[HttpUrl, AfterValidator(_base_url)]


class Upstream(BaseModel):
    """An OpenAI-compatible server, asked at `{base_url}/chat/completions`."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    name: str
    base_url: BaseUrl
    api_key: Bearer | None = None


class Settings(BaseModel):
    """One variable a field, the name in capitals. The order is that of `.env.example`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    openai_api_key: Bearer | None = Field(None, description="with it, OpenAI answers")
    openai_base_url: BaseUrl = Field(
        HttpUrl(OPENAI_BASE_URL), description="another address for the provider openai"
    )
    providers: Annotated[tuple[Upstream, ...], BeforeValidator(_split)] = Field(
        (), description="more OpenAI-compatible servers: groq needs GROQ_BASE_URL, GROQ_API_KEY"
    )
    default_provider: str | None = Field(
        None,
        description="who answers a bare model name: openai if it has a key, else the first of"
        " PROVIDERS, else mock",
    )
    default_model: str = Field("gpt-4o-mini", description="for requests that name no model")
    models: Names = Field(
        (), description="models that callers may ask for, globs allowed; unset: DEFAULT_MODEL alone"
    )
    system_prompt: str | None = Field(None, description="goes before every conversation")
    max_output_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="a limit for each answer; unset: the provider's own"
    )

    host: str = Field("127.0.0.1", description="the address to listen on; 0.0.0.0 in a container")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="0 takes a free one")
    allowed_hosts: Annotated[
        tuple[Annotated[str, AfterValidator(_host)], ...], BeforeValidator(_split)
    ] = Field(("*",), description="Host headers to answer; localhost keeps rebinding pages out")
    forwarded_allow_ips: Annotated[tuple[IPvAnyNetwork, ...], BeforeValidator(_split)] = Field(
        (), description="proxies whose X-Forwarded-For is believed: addresses and networks"
    )
    cors_origins: Annotated[
        tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(_split)
    ] = Field((), description="web pages that may call from a browser: exact origins")
    api_keys: Annotated[tuple[ApiKey, ...], BeforeValidator(_api_keys)] = Field(
        (), repr=False, description="callers with keys: name:key,name:key"
    )
    allow_anonymous: bool = Field(True, description="false: only callers with a key")
    rate_limit: Annotated[Rate | None, BeforeValidator(_rate)] = Field(
        Rate(10, 60), description="for each anonymous address: N/second|minute|hour|day, or off"
    )
    rate_limit_api_key: Annotated[Rate | None, BeforeValidator(_rate)] = Field(
        Rate(600, 60), description="for each key"
    )

    max_body_bytes: Annotated[int, Field(ge=64, le=2**24)] = Field(
        65536, description="a request's body"
    )
    max_message_chars: Annotated[int, Field(ge=1)] = Field(
        8000, description="a message, in Unicode code points"
    )
    max_streams: Annotated[int, Field(ge=1)] = Field(1000, description="answers at once, in all")
    max_streams_per_caller: Annotated[int, Field(ge=1)] = Field(
        10, description="answers at once for one address; ten times that for a key"
    )
    connect_timeout_seconds: Seconds = Field(5, description="to reach the provider")
    first_token_timeout_seconds: Seconds = Field(60, description="until its first piece")
    idle_timeout_seconds: Seconds = Field(30, description="between two pieces")
    total_timeout_seconds: Seconds = Field(600, description="for a whole answer")
    write_timeout_seconds: Seconds = Field(30, description="for a client to take what we sent")
    body_timeout_seconds: Seconds = Field(10, description="for a request's body to arrive")
    heartbeat_seconds: Seconds = Field(
        15, description="silence before a comment line keeps proxies from hanging up"
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="warning hides the line for each request"
    )
    metrics: bool = Field(True, description="off removes /metrics")

    @property
    def upstreams(self) -> tuple[Upstream, ...]:
        """Every configured server, OpenAI first if it has a key."""
        if self.openai_api_key is None:
            return self.providers
        openai = Upstream(name="openai", base_url=self.openai_base_url, api_key=self.openai_api_key)
        return (openai, *self.providers)

    @property
    def default_provider_name(self) -> str:
        names = [upstream.name for upstream in self.upstreams]
        return self.default_provider or (names[0] if names else "mock")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [upstream.name for upstream in self.upstreams]
        if self.default_provider == "openai" and "openai" not in names:
            raise ValueError("DEFAULT_PROVIDER=openai needs OPENAI_API_KEY, which is not set")
        if self.default_provider_name not in [*names, "mock"]:
            known = ", ".join([*names, "mock"])
            raise ValueError(f"DEFAULT_PROVIDER={self.default_provider!r} takes one of {known}")
        if not self.allow_anonymous and not self.api_keys:
            raise ValueError("ALLOW_ANONYMOUS=false needs API_KEYS: nobody could ask anything")
        return self


SECRETS = frozenset({"OPENAI_API_KEY", "API_KEYS"})


def variables() -> list[str]:
    """The names of all variables but those of `PROVIDERS`, which follow from its value."""
    return [name.upper() for name in Settings.model_fields]


def from_env(env: Mapping[str, str]) -> Settings:
    """`Settings` from a mapping such as `os.environ`. Raises SettingsError."""
    values: dict[str, Any] = {}
    for name in variables():
        if value := _read(env, name, secret=name in SECRETS):
            values[name.lower()] = value
    if "providers" in values:
        values["providers"] = [_upstream(env, name) for name in _items(values["providers"])]
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError(_one_line(error, values)) from None


def unknown_variables(file: Iterable[str], settings: Settings) -> list[str]:
    """One warning for each name in `file`, the keys of an .env, that no setting reads."""
    known = [*variables(), *(f"{secret}_FILE" for secret in SECRETS)]
    for upstream in settings.providers:
        prefix = _prefix(upstream.name)
        known += [f"{prefix}_BASE_URL", f"{prefix}_API_KEY", f"{prefix}_API_KEY_FILE"]
    warnings = []
    for name in file:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            warnings.append(f"{name} in .env is not a setting of this service{hint}")
    return warnings


def _read(env: Mapping[str, str], name: str, secret: bool = False) -> str:
    """A variable's text, or that of the file that `NAME_FILE` names; "" where neither is set."""
    value = env.get(name, "").strip()
    path = env.get(f"{name}_FILE", "").strip() if secret else ""
    if not path:
        return value
    if value:
        raise SettingsError(f"{name} and {name}_FILE are both set: keep one")
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SettingsError(f"{name}_FILE={path!r} can't be read: {reason}") from None


def _prefix(name: str) -> str:
    return name.upper().replace("-", "_")


def _upstream(env: Mapping[str, str], name: str) -> Upstream:
    if not re.fullmatch("[a-z][a-z0-9-]{0,31}", name) or name in ("openai", "mock"):
        raise SettingsError(
            f"PROVIDERS: {name!r} is not usable: takes names such as groq or local-llm;"
            " openai and mock need no entry"
        )
    prefix = _prefix(name)
    values = {"base_url": _read(env, f"{prefix}_BASE_URL")}
    if key := _read(env, f"{prefix}_API_KEY", secret=True):
        values["api_key"] = key
    if not values["base_url"]:
        raise SettingsError(f"{prefix}_BASE_URL is not set, but PROVIDERS names {name}")
    try:
        return Upstream.model_validate({"name": name, **values})
    except ValidationError as error:
        raise SettingsError(_one_line(error, values, f"{prefix}_")) from None


def _one_line(error: ValidationError, values: Mapping[str, str], prefix: str = "") -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    message = re.sub("^Input should be (?=less|greater)", "takes a number ", message)
    message = re.sub("^Input should be", "takes", message)
    if not first["loc"]:
        return message
    field = str(first["loc"][0])
    name = prefix + field.upper()
    # An address may hold a password.
    got = re.sub("//[^@/]*@", "//***@", f"={values[field]!r}")
    if name in SECRETS or name.endswith("_API_KEY"):
        got = ""
    return f"{name}{got}: {message}"
