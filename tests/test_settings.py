"""Settings: accepted and rejected values, error messages, secrets, providers and the .env file."""

import re
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from pydantic import ValidationError

from settings import (
    Settings,
    SettingsError,
    from_env,
    read_env_file,
    startup_warnings,
    variable_names,
)
from tests.conftest import StartService

ROOT = Path(__file__).parent.parent
OPENAI_KEY = "sk-0123456789abcdefghij"
GROQ_KEY = "gsk-0123456789abcdefghij"
CALLER_KEY = "key-of-0123456789abcdefghij"
OPENAI = {"OPENAI_API_KEY": OPENAI_KEY}
GROQ = {"PROVIDERS": "groq", "GROQ_BASE_URL": "https://api.groq.com/openai/v1"}

FORBIDDEN = ("model", "messages", "stream", "n")

# The variables of the contract, without those of providers, and their defaults.
DEFAULTS = {
    "providers": [],
    "default_provider": None,
    "default_model": "gpt-4o-mini",
    "models": [],
    "fallback_models": [],
    "system_prompt": None,
    "max_output_tokens": None,
    "host": "127.0.0.1",
    "port": 8000,
    "allowed_hosts": ["*"],
    "forwarded_allow_ips": [],
    "cors_origins": [],
    "api_keys": [],
    "allow_anonymous": True,
    "rate_limit": [10, 60],
    "rate_limit_api_key": [600, 60],
    "state_url": "sqlite:///chat.db",
    "session_ttl_seconds": 86400,
    "state_max_bytes": 2**30,
    "max_sessions_per_caller": 1000,
    "history_max_chars": 32000,
    "resume_seconds": 60,
    "resume_max_bytes": 2**24,
    "max_body_bytes": 65536,
    "max_message_chars": 8000,
    "max_streams": 1000,
    "max_streams_per_caller": 10,
    "connect_timeout_seconds": 5,
    "first_token_timeout_seconds": 60,
    "idle_timeout_seconds": 30,
    "total_timeout_seconds": 600,
    "write_timeout_seconds": 30,
    "body_timeout_seconds": 10,
    "heartbeat_seconds": 15,
    "max_retries": 2,
    "drain_seconds": 20,
    "log_level": "info",
    "metrics": True,
    "playground": True,
}
INTEGER = "an integer between 1 and 1000000000"
BYTES = "an integer between 65536 and 1099511627776"
SECONDS = "a number between 0.001 and 86400"
SWITCH = "true or false, on or off"
URL = "a URL such as http://localhost:11434/v1, without user, password, query and fragment"
HOSTS = "host names such as localhost or *.example.com"
NETWORKS = "IP addresses or networks such as 127.0.0.1 or 10.0.0.0/8, but not all addresses"
ORIGINS = "exact origins such as https://app.example.com"
RATE = "N/second, N/minute, N/hour, N/day or off, such as 10/minute"
STATE = "sqlite:///PATH, memory://, redis://HOST or, with TLS, rediss://HOST"
BODY = 'a JSON object such as {"temperature":0.3}, without model, messages, stream and n'
HEADERS = (
    "a JSON object of header names and strings, without Host, Connection, Content-*, Accept*,"
    " Transfer-Encoding and X-Client-Request-Id"
)
TOKEN = "visible ASCII without spaces"
API_KEYS = (
    "NAME:KEY entries separated by commas, with names of a-z, 0-9 and -, and keys of at least 20"
    " visible ASCII characters, 8 of them different"
)


def error_of(env: Mapping[str, str]) -> str:
    """Return the error that these variables cause. It has one line."""
    with pytest.raises(SettingsError) as error:
        from_env(env)
    line = str(error.value)
    assert "\n" not in line
    return line


# Values


def test_empty_environment_gives_the_defaults() -> None:
    assert from_env({}).model_dump(mode="json") == DEFAULTS


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("PORT", "0", 0),
        ("PORT", "65535", 65535),
        ("PORT", " 80\n", 80),
        ("MODELS", "gpt-4o, groq/* ,,", ["gpt-4o", "groq/*"]),
        ("ALLOWED_HOSTS", "localhost,*.example.com,[::1]", ["localhost", "*.example.com", "[::1]"]),
        ("FORWARDED_ALLOW_IPS", "127.0.0.1,10.0.0.0/8", ["127.0.0.1/32", "10.0.0.0/8"]),
        ("FORWARDED_ALLOW_IPS", "::1, fd00::/8", ["::1/128", "fd00::/8"]),
        ("CORS_ORIGINS", "https://a.example,http://b:81", ["https://a.example", "http://b:81"]),
        ("RATE_LIMIT", "1/second", [1, 1]),
        ("RATE_LIMIT", "999999999/hour", [999999999, 3600]),
        ("RATE_LIMIT", "off", None),
        ("RATE_LIMIT_API_KEY", "5/day", [5, 86400]),
        ("MAX_BODY_BYTES", "64", 64),
        ("MAX_OUTPUT_TOKENS", "1", 1),
        ("CONNECT_TIMEOUT_SECONDS", "0.25", 0.25),
        ("HEARTBEAT_SECONDS", "86400", 86400),
        ("DRAIN_SECONDS", "0", 0),
        ("METRICS", "off", False),
        ("METRICS", "true", True),
        ("LOG_LEVEL", "WARNING", "warning"),
        ("SYSTEM_PROMPT", "Be brief, be kind.", "Be brief, be kind."),
        ("STATE_URL", "rediss://user:password@host:1/0", "rediss://user:password@host:1/0"),
    ],
)
def test_valid_value_is_accepted(name: str, text: str, value: object) -> None:
    assert from_env({name: text}).model_dump(mode="json")[name.lower()] == value


@pytest.mark.parametrize("name", variable_names())
def test_empty_value_counts_as_unset(name: str) -> None:
    assert from_env({name: " "}) == from_env({})


def test_names_are_case_sensitive_and_unknown_names_are_ignored() -> None:
    assert from_env({"port": "1", "OPENAI_KEY": "x", "CHAT_PORT": "2"}) == from_env({})


def test_settings_are_immutable_and_have_no_other_field() -> None:
    settings = from_env({**OPENAI, **GROQ})
    for part, name in ((settings, "port"), (settings.providers[0], "base_url")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, "1")
    with pytest.raises(ValidationError, match="not permitted"):
        Settings.model_validate({"pork": 1})


# Errors


@pytest.mark.parametrize(
    ("name", "requirement", "values"),
    [
        ("OPENAI_BASE_URL", URL, ["api.openai.com", "ftp://example.com/v1", "http://a:b/v1"]),
        ("OPENAI_BASE_URL", URL, ["https://example.com/v1#x", "https://example.com/v1#"]),
        ("OPENAI_EXTRA_BODY", BODY, ["[]", "1", *(f'{{"{name}":1}}' for name in FORBIDDEN)]),
        ("MAX_OUTPUT_TOKENS", INTEGER, ["0", "1.5"]),
        ("PORT", "an integer between 0 and 65535", ["65536", "-1", "abc", "1\n2"]),
        ("ALLOWED_HOSTS", HOSTS, ["localhost, a b", "exa*.com"]),
        ("FORWARDED_ALLOW_IPS", NETWORKS, ["*", "0.0.0.0/0", "::/0", "127.0.0.1,proxy"]),
        ("CORS_ORIGINS", ORIGINS, ["*", "https://*.a.example", "https://a.example/", "null"]),
        ("ALLOW_ANONYMOUS", SWITCH, ["perhaps"]),
        ("METRICS", SWITCH, ["2"]),
        ("PLAYGROUND", SWITCH, ["page"]),
        ("RATE_LIMIT", RATE, ["0/minute", "ten/minute", "1/fortnight", "10", "1000000000/day"]),
        ("RATE_LIMIT_API_KEY", RATE, ["often"]),
        ("SESSION_TTL_SECONDS", "a number between 0.001 and 1000000000", ["0", "1e10"]),
        ("STATE_MAX_BYTES", BYTES, ["65535", "1GiB"]),
        ("RESUME_SECONDS", "a number between 0 and 86400", ["-1"]),
        ("RESUME_MAX_BYTES", BYTES, ["0"]),
        ("MAX_SESSIONS_PER_CALLER", INTEGER, ["0"]),
        ("HISTORY_MAX_CHARS", INTEGER, ["0"]),
        ("MAX_BODY_BYTES", "an integer between 64 and 16777216", ["63", "16777217"]),
        ("MAX_MESSAGE_CHARS", INTEGER, ["0"]),
        ("MAX_STREAMS", INTEGER, ["0"]),
        ("MAX_STREAMS_PER_CALLER", INTEGER, ["0"]),
        ("CONNECT_TIMEOUT_SECONDS", SECONDS, ["0", "10s"]),
        ("FIRST_TOKEN_TIMEOUT_SECONDS", SECONDS, ["-1"]),
        ("IDLE_TIMEOUT_SECONDS", SECONDS, ["86401"]),
        ("TOTAL_TIMEOUT_SECONDS", SECONDS, ["inf"]),
        ("WRITE_TIMEOUT_SECONDS", SECONDS, ["nan"]),
        ("BODY_TIMEOUT_SECONDS", SECONDS, ["ten"]),
        ("HEARTBEAT_SECONDS", SECONDS, ["1,5"]),
        ("MAX_RETRIES", "an integer between 0 and 10", ["11"]),
        ("DRAIN_SECONDS", "a number between 0 and 86400", ["-1"]),
        ("LOG_LEVEL", "debug, info, warning or error", ["loud"]),
    ],
)
def test_invalid_value_is_shown_with_the_name_and_the_requirement(
    name: str, requirement: str, values: list[str]
) -> None:
    for value in values:
        assert error_of({name: value}) == f"{name} must be {requirement} (got {value!r})"


def test_value_that_is_not_utf8_is_rejected() -> None:
    # os.environ contains a lone surrogate for each byte that is not UTF-8.
    assert error_of({"SYSTEM_PROMPT": "caf\udce9"}) == "SYSTEM_PROMPT must be UTF-8 text"


def test_rejecting_anonymous_callers_requires_api_keys() -> None:
    assert error_of({"ALLOW_ANONYMOUS": "false"}).startswith(
        "ALLOW_ANONYMOUS=false requires API_KEYS"
    )
    keys = f"app:{CALLER_KEY}"
    assert not from_env({"ALLOW_ANONYMOUS": "false", "API_KEYS": keys}).allow_anonymous


# Secrets


@pytest.mark.parametrize("show", [repr, str, lambda s: f"{s.providers}", lambda s: f"{s.api_keys}"])
def test_printed_settings_contain_no_secret(show: Callable[[Settings], str]) -> None:
    env = {**OPENAI, **GROQ, "GROQ_API_KEY": GROQ_KEY, "API_KEYS": f"app:{CALLER_KEY}"}
    env["OPENAI_EXTRA_HEADERS"] = '{"X-Gateway-Key":"hush"}'
    shown = show(from_env({**env, "STATE_URL": "redis://user:password@127.0.0.1"}))
    for secret in (OPENAI_KEY, GROQ_KEY, CALLER_KEY, "user:password", "hush"):
        assert secret not in shown


def test_api_keys_are_stored_as_digests() -> None:
    settings = from_env({"API_KEYS": f"app:{CALLER_KEY}"})
    assert [(key.name, len(key.digest)) for key in settings.api_keys] == [("app", 32)]
    assert CALLER_KEY not in str(settings.model_dump())
    assert str(settings.api_keys[0].digest) not in repr(settings)


@pytest.mark.parametrize(
    ("name", "requirement", "values"),
    [
        ("OPENAI_API_KEY", TOKEN, ["sk-hush hush", "sk-hush\nhush", "sk-hush-é"]),
        ("GROQ_API_KEY", TOKEN, ["a hush"]),
        ("OPENAI_BASE_URL", URL, ["https://me:hush@host/v1", "https://hush@host/v1"]),
        ("OPENAI_BASE_URL", URL, ["https://me:hush@host:port/v1", "https://me:p/hush@host/v1"]),
        ("OPENAI_BASE_URL", URL, ["me:hush@host/v1", "https://host/v1?key=hush"]),
        ("GROQ_BASE_URL", URL, ["https://me:hush@host/v1"]),
        ("CORS_ORIGINS", ORIGINS, ["https://me:hush@host"]),
        ("OPENAI_EXTRA_HEADERS", HEADERS, ['["hush"]', '{"X-Key":1}', '{"X-Key":"hush\\n"}']),
        ("GROQ_EXTRA_HEADERS", HEADERS, ['{"":"hush"}', '{"X Key":"hush"}', '{"X-Key":"hushé"}']),
        ("STATE_URL", STATE, ["http://me:hush@host"]),
    ],
)
def test_invalid_secret_is_not_shown(name: str, requirement: str, values: list[str]) -> None:
    for value in values:
        assert error_of({**GROQ, name: value}) == f"{name} must be {requirement}"


@pytest.mark.parametrize(
    "name",
    [
        *("Host", "Connection", "Transfer-Encoding", "X-Client-Request-Id"),
        *("Content-Type", "Content-Length", "Accept", "Accept-Encoding", "ACCEPT-CHARSET"),
    ],
)
def test_header_that_the_service_sets_is_rejected(name: str) -> None:
    line = error_of({"OPENAI_EXTRA_HEADERS": f'{{"{name}":"hush"}}'})
    assert line == f"OPENAI_EXTRA_HEADERS must be {HEADERS}"


@pytest.mark.parametrize(
    ("name", "text", "requirement", "detail"),
    [
        ("OPENAI_EXTRA_BODY", "{hush", f"{BODY} (got '{{hush')", "key must be a string"),
        ("OPENAI_EXTRA_BODY", '{"a":NaN}', f"""{BODY} (got '{{"a":NaN}}')""", "expected value"),
        ("OPENAI_EXTRA_HEADERS", "{hush", HEADERS, "key must be a string"),
        ("OPENAI_EXTRA_HEADERS", '{"X":"hush', HEADERS, "EOF while parsing a string"),
    ],
)
def test_json_syntax_error_is_reported_with_its_position(
    name: str, text: str, requirement: str, detail: str
) -> None:
    line, _, column = error_of({name: text}).partition(" at line 1 column ")
    assert line == f"{name} must be {requirement}: {detail}"
    assert int(column) <= len(text)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("web", "entry 1 has no colon between its name and its key"),
        (CALLER_KEY, "entry 1 has no colon between its name and its key"),
        (f"app:{CALLER_KEY},", "entry 2 has no colon between its name and its key"),
        ("app:hush", "entry 1 is invalid"),
        (f"app:{CALLER_KEY},other:{CALLER_KEY[:19]}", "entry 2 is invalid"),
        (f"app:{CALLER_KEY}é", "entry 1 is invalid"),
        (f"app:{'abcdefg' * 4}", "entry 1 is invalid"),
        (f"My App:{CALLER_KEY}", "entry 1 is invalid"),
        (f"{'a' * 33}:{CALLER_KEY}", "entry 1 is invalid"),
        # With name and key swapped, the name is the secret.
        (f"{CALLER_KEY}:app", "entry 1 is invalid"),
    ],
)
def test_invalid_api_key_is_named_by_its_position(value: str, problem: str) -> None:
    assert error_of({"API_KEYS": value}) == f"API_KEYS must be {API_KEYS}: {problem}"


@pytest.mark.parametrize(
    ("build", "values"),
    [
        (from_env, {"OPENAI_API_KEY": "not a key"}),
        (Settings.model_validate, {"state_url": "not a key"}),
        (Settings.model_validate, {"api_keys": "not a key"}),
    ],
)
def test_traceback_of_an_error_contains_no_secret(
    build: Callable[[dict[str, str]], Settings], values: dict[str, str]
) -> None:
    with pytest.raises((SettingsError, ValidationError)) as error:
        build(values)
    assert "not a key" not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("OPENAI_API_KEY", OPENAI_KEY),
        ("GROQ_API_KEY", GROQ_KEY),
        ("GROQ_EXTRA_HEADERS", '{"X-Gateway-Key":"1"}'),
        ("API_KEYS", f"app:{CALLER_KEY}"),
        ("STATE_URL", "sqlite:///other.db"),
    ],
)
def test_secret_can_come_from_a_file(name: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"\n {text} \r\n")
    settings = from_env({**GROQ, f"{name}_FILE": str(file)})
    assert settings == from_env({**GROQ, name: text})
    assert settings != from_env(GROQ)
    line = error_of({**GROQ, name: text, f"{name}_FILE": str(file)})
    assert line == f"{name} and {name}_FILE are both set; remove one"


@pytest.mark.parametrize("content", ["", " \n"])
def test_empty_secret_file_counts_as_unset(content: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(content)
    assert from_env({"OPENAI_API_KEY_FILE": str(file), "OPENAI_API_KEY": " "}) == from_env({})


@pytest.mark.parametrize(
    ("create", "reason"),
    [
        (lambda file: None, "No such file or directory"),
        (Path.mkdir, "Is a directory"),
        (lambda file: file.write_bytes(b"\xff"), "not UTF-8 text"),
    ],
)
def test_unreadable_secret_file_is_reported_with_the_reason(
    create: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    create(file)
    line = error_of({**GROQ, "GROQ_API_KEY_FILE": str(file)})
    assert line == f"GROQ_API_KEY_FILE={str(file)!r} cannot be read: {reason}"


def test_only_secrets_are_read_from_files(tmp_path: Path) -> None:
    file = tmp_path / "port"
    file.write_text("80")
    assert from_env({"PORT_FILE": str(file)}) == from_env({})


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("memory://", "memory://"),
        ("sqlite:////data/a@b.db", "sqlite:////data/a@b.db"),
        ("redis://localhost", "redis://localhost"),
        ("redis://me:s3cret@host:6379/0", "redis://host:6379/0"),
        ("rediss://:s3/cr@et@host/1?password=s3cret", "rediss://host/1"),
    ],
)
def test_public_state_url_has_no_user_password_and_options(url: str, public: str) -> None:
    assert from_env({"STATE_URL": url}).public_state_url == public


def test_one_name_can_have_several_api_keys() -> None:
    new = f"{CALLER_KEY}-new"
    keys = from_env({"API_KEYS": f"app:{CALLER_KEY}, app:{new} ,other-2:{new[::-1]}"}).api_keys
    assert [key.name for key in keys] == ["app", "app", "other-2"]
    assert len({key.digest for key in keys}) == 3
    assert keys[0] == from_env({"API_KEYS": f"app:{CALLER_KEY}"}).api_keys[0]


def test_api_key_needs_eight_different_characters() -> None:
    (key,) = from_env({"API_KEYS": f"app:{'abcdefgh' * 4}"}).api_keys
    assert key.name == "app"


def test_api_key_can_contain_colons() -> None:
    with_colon, without = (from_env({"API_KEYS": f"app:{CALLER_KEY}{end}"}) for end in (":x", ""))
    assert [key.name for key in with_colon.api_keys] == ["app"]
    assert with_colon.api_keys != without.api_keys


# Providers


def test_openai_is_the_first_provider_if_it_has_a_key() -> None:
    assert [provider.name for provider in from_env(GROQ).providers] == ["groq"]
    settings = from_env({**GROQ, **OPENAI, "OPENAI_BASE_URL": "http://localhost:1/v1"})
    openai, groq = settings.providers
    assert (openai.name, str(openai.base_url)) == ("openai", "http://localhost:1/v1")
    assert openai.api_key is not None
    assert openai.api_key.get_secret_value() == OPENAI_KEY
    assert (groq.name, str(groq.base_url)) == ("groq", GROQ["GROQ_BASE_URL"])
    assert str(from_env(OPENAI).providers[0].base_url) == "https://api.openai.com/v1"


def test_provider_variables_begin_with_the_name_in_capitals() -> None:
    settings = from_env(
        {
            "PROVIDERS": " local-llm ,groq,groq",
            "LOCAL_LLM_BASE_URL": "http://localhost:8080",
            "GROQ_BASE_URL": "https://groq.example/v1",
            "GROQ_API_KEY": GROQ_KEY,
        }
    )
    local, groq = settings.providers
    assert (local.name, local.api_key) == ("local-llm", None)
    assert groq.name == "groq"
    assert groq.api_key is not None
    assert groq.api_key.get_secret_value() == GROQ_KEY


def test_extra_body_and_headers_belong_to_a_provider() -> None:
    body = '{"temperature":0.3,"stream_options":null,"model_kwargs":{"n":1}}'
    headers = '{"HTTP-Referer":"https://app.example.com","Authorization":"Token x","X-Empty":""}'
    extra = {"OPENAI_EXTRA_BODY": body, "GROQ_EXTRA_HEADERS": headers}
    openai, groq = from_env({**OPENAI, **GROQ, **extra}).providers
    assert openai.extra_body == {
        "temperature": 0.3,
        "stream_options": None,
        "model_kwargs": {"n": 1},
    }
    assert groq.extra_headers == {
        "HTTP-Referer": "https://app.example.com",
        "Authorization": "Token x",
        "X-Empty": "",
    }
    assert (openai.extra_headers, groq.extra_body) == ({}, {})


@pytest.mark.parametrize(
    "name",
    ["openai", "mock", "rate-limit", "Groq", "local_llm", "1st", "-a", "a/b", "a" * 33, "a b"],
)
def test_invalid_provider_name_is_rejected(name: str) -> None:
    line = error_of({"PROVIDERS": f"groq,{name}", "GROQ_BASE_URL": "http://localhost"})
    requirement = "names such as groq,local-llm, without openai and mock"
    assert line == f"PROVIDERS must be {requirement} (got {name!r})"


def test_provider_without_base_url_is_rejected() -> None:
    line = error_of({"PROVIDERS": "local-llm"})
    assert line == "LOCAL_LLM_BASE_URL must be set: PROVIDERS contains local-llm"


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({}, "mock"),
        (OPENAI, "openai"),
        (GROQ, "groq"),
        ({**OPENAI, **GROQ}, "openai"),
        ({**OPENAI, **GROQ, "DEFAULT_PROVIDER": "groq"}, "groq"),
        ({**OPENAI, "DEFAULT_PROVIDER": "mock"}, "mock"),
        ({**GROQ, "PROVIDERS": "local,groq", "LOCAL_BASE_URL": "http://localhost"}, "local"),
    ],
)
def test_default_provider_is_the_first_configured_one(env: dict[str, str], name: str) -> None:
    assert from_env(env).default_provider_name == name


@pytest.mark.parametrize(
    ("env", "default", "problem"),
    [
        ({}, "openai", "one of mock (got 'openai'); to use openai, set OPENAI_API_KEY"),
        (
            {**OPENAI, **GROQ},
            "x",
            "one of openai, groq, mock (got 'x'); to use x, add it to PROVIDERS and set X_BASE_URL",
        ),
    ],
)
def test_unknown_default_provider_is_rejected_with_the_way_to_add_it(
    env: dict[str, str], default: str, problem: str
) -> None:
    assert error_of({**env, "DEFAULT_PROVIDER": default}) == f"DEFAULT_PROVIDER must be {problem}"


def fallback_problem(default: str, name: str, model: str, remedy: str) -> str:
    sent = f"{default} would receive the model id {model!r}"
    return f"FALLBACK_MODELS: {name} is not a provider, so {sent}; to use {name}, {remedy}"


@pytest.mark.parametrize(
    ("env", "default"), [({}, "mock"), (OPENAI, "openai"), ({**GROQ, **OPENAI}, "openai")]
)
def test_fallback_to_unknown_provider_is_rejected_for_openai_and_the_mock(
    env: dict[str, str], default: str
) -> None:
    line = error_of({**env, "FALLBACK_MODELS": "mock/echo,local-llm/llama-3"})
    remedy = "add it to PROVIDERS and set LOCAL_LLM_BASE_URL"
    assert line == fallback_problem(default, "local-llm", "local-llm/llama-3", remedy)


def test_fallback_to_unknown_provider_is_a_warning_for_other_servers() -> None:
    models = "groq/llama-3,gpt-4o,mock/echo,meta-llama/llama-3,openai/gpt-4o"
    settings = from_env({**GROQ, "FALLBACK_MODELS": models})
    remedy = "add it to PROVIDERS and set META_LLAMA_BASE_URL"
    assert list(startup_warnings(settings, [])) == [
        fallback_problem("groq", "meta-llama", "meta-llama/llama-3", remedy),
        fallback_problem("groq", "openai", "openai/gpt-4o", "set OPENAI_API_KEY"),
    ]
    gateway = {**OPENAI, "OPENAI_BASE_URL": "https://gateway.example/v1"}
    settings = from_env({**gateway, "FALLBACK_MODELS": "meta-llama/llama-3"})
    assert list(startup_warnings(settings, [])) == [
        fallback_problem("openai", "meta-llama", "meta-llama/llama-3", remedy)
    ]


def test_missing_provider_is_a_warning() -> None:
    (warning,) = startup_warnings(from_env({}), [])
    assert warning.startswith("No provider is configured; using the mock provider. Set OPENAI_API_")
    assert list(startup_warnings(from_env({"DEFAULT_PROVIDER": "mock"}), [])) == []
    assert list(startup_warnings(from_env(OPENAI), [])) == []


# The .env file


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("OPENAI_APIKEY", "; did you mean OPENAI_API_KEY?"),
        ("RATELIMIT", "; did you mean RATE_LIMIT?"),
        ("OPENAI_API_KEY_FIEL", "; did you mean OPENAI_API_KEY_FILE?"),
        ("GROQ_BASEURL", "; did you mean GROQ_BASE_URL?"),
        ("GROC_API_KEY", " unless PROVIDERS contains its provider; did you mean GROQ_API_KEY?"),
        ("OPENAI_MODEL", "; did you mean DEFAULT_MODEL?"),
        ("OPENAI_API_BASE", "; did you mean OPENAI_BASE_URL?"),
        ("REDIS_URL", "; did you mean STATE_URL?"),
        ("XYZZY", ""),
        ("port", ""),
    ],
)
def test_unknown_name_in_env_file_is_a_warning_that_suggests_a_setting(
    name: str, hint: str
) -> None:
    warnings = list(startup_warnings(from_env(GROQ), [name, "PORT"]))
    assert warnings == [f"{name} in .env is not a setting of this service{hint}"]


def test_every_variable_that_is_read_is_known() -> None:
    secrets = ("OPENAI_API_KEY_FILE", "API_KEYS_FILE", "STATE_URL_FILE", "GROQ_API_KEY_FILE")
    groq = ["GROQ_BASE_URL", "GROQ_API_KEY", "GROQ_EXTRA_BODY", "GROQ_EXTRA_HEADERS"]
    names = [*variable_names(), *secrets, *groq]
    assert list(startup_warnings(from_env(GROQ), names)) == []
    warnings = list(startup_warnings(from_env(OPENAI), groq))
    assert len(warnings) == len(groq)
    assert all("unless PROVIDERS contains its provider" in text for text in warnings)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("\ufeff# Only\n\n  # comments\n", {}),
        (
            "PORT=1\r\nexport HOST = x # why\nSYSTEM_PROMPT='a\nb'",
            {"PORT": "1", "HOST": "x", "SYSTEM_PROMPT": "a\nb"},
        ),
        ("API_KEYS=web:${HOME}$PATH\n", {"API_KEYS": "web:${HOME}$PATH"}),
        ("METRICS=\nMETRICS=off\n", {"METRICS": "off"}),
    ],
)
def test_env_file_is_read_without_interpolation(
    tmp_path: Path, text: str, values: dict[str, str]
) -> None:
    file = tmp_path / ".env"
    file.write_bytes(text.encode())
    assert read_env_file(file) == values


def test_missing_env_file_has_no_variables(tmp_path: Path) -> None:
    assert read_env_file(tmp_path / ".env") == {}


@pytest.mark.parametrize(
    "text",
    [
        "PORT=1\n\n# A comment.\nALLOW_ANONYMOUS false s3cret\n",
        'PORT=1\nHOST=x\n\nOPENAI_API_KEY="s3cret\n',
        "\n\nHOST=x\ns3cret\nPORT=1\n",
    ],
)
def test_syntax_error_in_env_file_is_reported_by_its_line_only(tmp_path: Path, text: str) -> None:
    file = tmp_path / ".env"
    file.write_text(text)
    with pytest.raises(SettingsError) as error:
        read_env_file(file)
    assert str(error.value) == f"{file}, line 4, must be NAME=VALUE; close all quotes"


@pytest.mark.parametrize(
    ("create", "reason"),
    [
        (Path.mkdir, "Is a directory"),
        (lambda file: file.write_bytes(b"SYSTEM_PROMPT=caf\xe9\n"), "not UTF-8 text"),
    ],
)
def test_unreadable_env_file_is_an_error(
    tmp_path: Path, create: Callable[[Path], object], reason: str
) -> None:
    file = tmp_path / ".env"
    create(file)
    with pytest.raises(SettingsError, match=f"{file} cannot be read: {reason}"):
        read_env_file(file)


# .env.example

EXAMPLE = ROOT / ".env.example"
# A variable; it is commented out if it has no default.
ASSIGNMENT = re.compile(r"^(# )?([A-Z_]+)=(.*)$", re.MULTILINE)
# The variables of a provider that is only an example.
EXAMPLES = {"GROQ_BASE_URL", "GROQ_API_KEY"}


def test_example_contains_each_variable_once_with_its_default() -> None:
    assignments = ASSIGNMENT.findall(EXAMPLE.read_text())
    names = [name for _, name, _ in assignments]
    variables = {name for name in variable_names() if not name.endswith("_FILE")}
    assert sorted(names) == sorted(variables | EXAMPLES)
    for comment, name, value in assignments:
        if name not in EXAMPLES:
            assert bool(comment) != bool(value), name
    assert from_env(read_env_file(EXAMPLE)) == from_env({})
    # `docker run --env-file` supports neither quotes nor comments behind a value.
    active = {name: value for comment, name, value in assignments if not comment}
    assert active == read_env_file(EXAMPLE)


def test_copy_of_the_example_starts_the_mock(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(EXAMPLE.read_bytes())
    with subprocess.Popen(
        [sys.executable, "-m", "service"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PORT": "0", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = process.stdout.readline() + process.stdout.readline()
        process.terminate()
        process.communicate()
    assert "http://127.0.0.1:" in lines
    assert "using the mock provider" in lines


# Reading the environment

WATCHED_IMPORT = """
import importlib, logging, os, sys

read = set()

class WatchedEnvironment(dict):
    def __getitem__(self, name):
        read.add(name)
        return super().__getitem__(name)
    def get(self, name, default=None):
        read.add(name)
        return super().get(name, default)

os.environ = WatchedEnvironment(os.environ)
for name in sys.argv[1:]:
    importlib.import_module(name)
from settings import variable_names
print(sorted(read & set(variable_names())), logging.getLogger().handlers)
"""


def test_importing_the_modules_reads_no_variable_and_configures_no_log(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    modules = project["tool"]["setuptools"]["py-modules"]
    invalid = dict.fromkeys(variable_names(), "*** invalid ***")
    (tmp_path / ".env").write_text(
        "".join(f"{name}='{value}'\n" for name, value in invalid.items())
    )
    run = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORT, *modules],
        cwd=tmp_path,
        env={**invalid, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout, run.stderr) == ("[] []\n", "")


async def test_two_services_with_different_settings_run_in_one_process(
    service: StartService,
) -> None:
    apps = [await service(DEFAULT_MODEL=model) for model in ("one", "two")]
    responses = [await (await app.get("/api/v1/models")).json() for app in apps]
    assert [models["default"] for models in responses] == ["one", "two"]
