"""Every variable: what it takes, what it refuses and in which words, and what is never printed."""

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
    unknown_variable_warnings,
    variable_names,
)
from tests.conftest import StartService

ROOT = Path(__file__).parent.parent
OPENAI_KEY = "sk-0123456789abcdefghij"
GROQ_KEY = "gsk-0123456789abcdefghij"
CALLER_KEY = "key-of-0123456789abcdefghij"
OPENAI = {"OPENAI_API_KEY": OPENAI_KEY}
GROQ = {"PROVIDERS": "groq", "GROQ_BASE_URL": "https://api.groq.com/openai/v1"}


def classify_error(env: Mapping[str, str]) -> str:
    """The one line with which these variables stop the start."""
    with pytest.raises(SettingsError) as caught:
        from_env(env)
    line = str(caught.value)
    assert "\n" not in line
    return line


# What a variable takes


def test_an_empty_environment_gives_the_defaults_of_the_contract() -> None:
    assert from_env({}).model_dump(mode="json") == {
        "openai_api_key": None,
        "openai_base_url": "https://api.openai.com/v1",
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
        "history_max_chars": 32000,
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
        ("METRICS", "off", False),
        ("METRICS", "true", True),
        ("LOG_LEVEL", "warning", "warning"),
        ("SYSTEM_PROMPT", "Be brief, be kind.", "Be brief, be kind."),
        ("OPENAI_BASE_URL", "http://localhost:11434/v1", "http://localhost:11434/v1"),
    ],
)
def test_a_variable_takes(name: str, text: str, value: object) -> None:
    assert from_env({name: text}).model_dump(mode="json")[name.lower()] == value


@pytest.mark.parametrize("name", variable_names())
def test_an_empty_value_is_an_unset_one(name: str) -> None:
    assert from_env({name: " "}) == from_env({})


def test_names_are_those_of_the_contract_in_capitals_and_nothing_else_is_read() -> None:
    assert from_env({"port": "1", "OPENAI_KEY": "x", "CHAT_PORT": "2"}) == from_env({})


def test_settings_are_frozen_and_know_no_other_field() -> None:
    settings = from_env({**OPENAI, **GROQ})
    for part, name in ((settings, "port"), (settings.providers[0], "base_url")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, "1")
    with pytest.raises(ValidationError, match="not permitted"):
        Settings.model_validate({"pork": 1})


# What it refuses, and in which words


@pytest.mark.parametrize(
    ("name", "got", "takes"),
    [
        ("OPENAI_BASE_URL", "api.openai.com", "valid URL"),
        ("OPENAI_BASE_URL", "ftp://example.com/v1", "'http' or 'https'"),
        ("OPENAI_BASE_URL", "https://example.com/v1#x", "takes a plain URL such as http://"),
        ("OPENAI_BASE_URL", "https://example.com/v1#", "takes a plain URL such as http://"),
        ("MAX_OUTPUT_TOKENS", "0", "takes a number greater than or equal to 1"),
        ("PORT", "65536", "takes a number less than or equal to 65535"),
        ("PORT", "-1", "takes a number greater than or equal to 0"),
        ("PORT", "http", "takes a valid integer"),
        ("ALLOWED_HOSTS", "localhost, a b", "takes host names such as localhost"),
        ("ALLOWED_HOSTS", "exa*.com", "takes host names such as localhost"),
        ("FORWARDED_ALLOW_IPS", "*", "addresses and networks such as"),
        ("FORWARDED_ALLOW_IPS", "0.0.0.0/0", "never everybody"),
        ("FORWARDED_ALLOW_IPS", "127.0.0.1,proxy", "addresses and networks such as"),
        ("CORS_ORIGINS", "*", "takes exact origins: https://app.example.com, never *"),
        ("CORS_ORIGINS", "https://*.example.com", "takes exact origins"),
        ("CORS_ORIGINS", "https://example.com/", "takes exact origins"),
        ("CORS_ORIGINS", "null", "takes exact origins"),
        ("ALLOW_ANONYMOUS", "perhaps", "takes a valid boolean"),
        ("METRICS", "2", "takes a valid boolean"),
        ("RATE_LIMIT", "0/minute", "takes N/second, N/minute, N/hour, N/day or off"),
        ("RATE_LIMIT", "ten/minute", "takes N/second"),
        ("RATE_LIMIT", "10/fortnight", "takes N/second"),
        ("RATE_LIMIT", "10", "takes N/second"),
        ("RATE_LIMIT", "1000000000/day", "takes N/second"),
        ("RATE_LIMIT_API_KEY", "often", "takes N/second"),
        ("MAX_BODY_BYTES", "63", "takes a number greater than or equal to 64"),
        ("MAX_BODY_BYTES", "16777217", "takes a number less than or equal to 16777216"),
        ("MAX_MESSAGE_CHARS", "0", "takes a number greater than or equal to 1"),
        ("MAX_STREAMS", "0", "takes a number greater than or equal to 1"),
        ("MAX_STREAMS_PER_CALLER", "0", "takes a number greater than or equal to 1"),
        ("CONNECT_TIMEOUT_SECONDS", "0", "takes a number greater than 0"),
        ("FIRST_TOKEN_TIMEOUT_SECONDS", "-1", "takes a number greater than 0"),
        ("IDLE_TIMEOUT_SECONDS", "86401", "takes a number less than or equal to 86400"),
        ("TOTAL_TIMEOUT_SECONDS", "inf", "takes a finite number"),
        ("WRITE_TIMEOUT_SECONDS", "nan", "takes a finite number"),
        ("BODY_TIMEOUT_SECONDS", "10s", "takes a valid number"),
        ("HEARTBEAT_SECONDS", "1,5", "takes a valid number"),
        ("LOG_LEVEL", "loud", "takes 'debug', 'info', 'warning' or 'error'"),
        ("PORT", "1\n2", "takes a valid integer"),
    ],
)
def test_a_bad_value_is_refused_with_its_name_what_it_is_and_what_is_taken(
    name: str, got: str, takes: str
) -> None:
    line = classify_error({name: got})
    assert line.startswith(f"{name}={got!r}: ")
    assert takes in line


def test_a_text_that_is_not_utf_8_is_refused_at_the_start_and_not_at_every_request() -> None:
    # What os.environ makes of a byte that is not UTF-8; no request to a provider could hold it.
    assert "SYSTEM_PROMPT" in classify_error({"SYSTEM_PROMPT": "caf\udce9"})


def test_nobody_may_call_is_refused() -> None:
    assert classify_error({"ALLOW_ANONYMOUS": "false"}).startswith(
        "ALLOW_ANONYMOUS=false needs API_KEYS"
    )
    keys = f"app:{CALLER_KEY}"
    assert not from_env({"ALLOW_ANONYMOUS": "false", "API_KEYS": keys}).allow_anonymous


# Secrets


@pytest.mark.parametrize(
    "show", [repr, str, lambda s: f"{s.configured_providers}", lambda s: f"{s.api_keys}"]
)
def test_no_way_of_printing_settings_shows_a_secret(show: Callable[[Settings], str]) -> None:
    env = {**OPENAI, **GROQ, "GROQ_API_KEY": GROQ_KEY, "API_KEYS": f"app:{CALLER_KEY}"}
    shown = show(from_env({**env, "STATE_URL": "redis://user:password@127.0.0.1"}))
    secrets = (OPENAI_KEY, GROQ_KEY, CALLER_KEY, "user:password")
    assert [secret for secret in secrets if secret in shown] == []


def test_a_key_of_a_caller_is_not_even_kept() -> None:
    settings = from_env({"API_KEYS": f"app:{CALLER_KEY}"})
    assert [(key.name, len(key.digest)) for key in settings.api_keys] == [("app", 32)]
    assert CALLER_KEY not in str(settings.model_dump())
    assert str(settings.api_keys[0].digest) not in repr(settings), "what is not needed is not shown"


@pytest.mark.parametrize(
    ("env", "secret", "takes"),
    [
        ({"OPENAI_API_KEY": "sk-hush hush"}, "hush", "visible ASCII"),
        ({"OPENAI_API_KEY": "sk-hush\nhush"}, "hush", "no line ends"),
        ({"OPENAI_API_KEY": "sk-hush-é"}, "hush", "visible ASCII"),
        ({"GROQ_API_KEY": "a hush", **GROQ}, "hush", "visible ASCII"),
        ({"API_KEYS": "app:hush"}, "hush", "at least 20 visible ASCII characters"),
        ({"API_KEYS": f"app:{'k' * 19}"}, "k" * 19, "at least 20 visible ASCII characters"),
        ({"API_KEYS": f"app:{CALLER_KEY}é"}, CALLER_KEY, "at least 20 visible ASCII characters"),
        ({"API_KEYS": f"app:{CALLER_KEY},"}, CALLER_KEY, "takes name:key,name:key"),
        ({"API_KEYS": f"My App:{CALLER_KEY}"}, CALLER_KEY, "takes name:key,name:key"),
        ({"API_KEYS": f"{'a' * 33}:{CALLER_KEY}"}, CALLER_KEY, "takes name:key,name:key"),
        # The name forgotten, or put behind the key: here the key stands where a name belongs.
        ({"API_KEYS": CALLER_KEY}, CALLER_KEY, ""),
        ({"API_KEYS": f"{CALLER_KEY}:app"}, CALLER_KEY, ""),
        ({"OPENAI_BASE_URL": "https://me:hush@host/v1"}, "hush", "takes a plain URL"),
        ({"OPENAI_BASE_URL": "https://hush@host/v1"}, "hush", "takes a plain URL"),
        ({"OPENAI_BASE_URL": "https://me:hush@host:port/v1"}, "hush", "valid URL"),
        ({"OPENAI_BASE_URL": "https://me:p@hush@host:port/v1"}, "hush", "valid URL"),
        ({"OPENAI_BASE_URL": "https://me:p/hush@host/v1"}, "hush", "valid URL"),
        ({"OPENAI_BASE_URL": "me:hush@host/v1"}, "hush", "'http' or 'https'"),
        ({"OPENAI_BASE_URL": "https://host/v1?key=hush"}, "hush", "takes a plain URL"),
        ({"GROQ_BASE_URL": "https://me:hush@host/v1", "PROVIDERS": "groq"}, "hush", "plain URL"),
        ({"CORS_ORIGINS": "https://me:hush@host"}, "hush", "takes exact origins"),
        ({"STATE_URL": "http://me:hush@host"}, "hush", "redis://HOST"),
    ],
)
def test_a_refusal_names_the_variable_and_what_it_takes_and_holds_no_secret(
    env: dict[str, str], secret: str, takes: str
) -> None:
    line = classify_error(env)
    assert line.startswith(next(iter(env)))
    assert takes in line
    assert secret not in line


@pytest.mark.parametrize(
    ("build", "values"),
    [
        (from_env, {"OPENAI_API_KEY": "not a key"}),
        (Settings.model_validate, {"openai_api_key": "not a key"}),
        (Settings.model_validate, {"api_keys": "not a key"}),
    ],
)
def test_a_traceback_of_a_refusal_holds_no_secret(
    build: Callable[[dict[str, str]], Settings], values: dict[str, str]
) -> None:
    with pytest.raises((SettingsError, ValidationError)) as caught:
        build(values)
    assert "not a key" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "GROQ_API_KEY", "API_KEYS"])
def test_a_secret_may_stand_in_a_file_its_white_space_stripped(name: str, tmp_path: Path) -> None:
    text = f"app:{CALLER_KEY}"
    file = tmp_path / "secret"
    file.write_text(f"\n {text} \r\n")
    here, there = from_env({**GROQ, name: text}), from_env({**GROQ, f"{name}_FILE": str(file)})
    assert here == there
    assert here != from_env(GROQ)


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "GROQ_API_KEY", "API_KEYS"])
def test_a_secret_that_is_set_twice_is_refused(name: str, tmp_path: Path) -> None:
    line = classify_error({**GROQ, name: CALLER_KEY, f"{name}_FILE": str(tmp_path)})
    assert line == f"{name} and {name}_FILE are both set: keep one"


@pytest.mark.parametrize("content", [b"", b" \n"])
def test_an_empty_secret_file_is_an_unset_secret(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content)
    assert from_env({"OPENAI_API_KEY_FILE": str(file), "OPENAI_API_KEY": " "}) == from_env({})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        ("directory", "Is a directory"),
        (b"\xff", "not text in UTF-8"),
    ],
)
def test_a_secret_file_that_cannot_be_read_is_refused_with_the_reason(
    content: str | bytes | None, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        file.mkdir()
    line = classify_error({**GROQ, "GROQ_API_KEY_FILE": str(file)})
    assert line == f"GROQ_API_KEY_FILE={str(file)!r} can't be read: {reason}"


def test_only_secrets_are_read_from_files(tmp_path: Path) -> None:
    file = tmp_path / "port"
    file.write_text("80")
    assert from_env({"PORT_FILE": str(file)}) == from_env({})


def test_a_name_may_have_several_keys_so_that_one_can_replace_the_other() -> None:
    new = f"{CALLER_KEY}-new"
    keys = from_env({"API_KEYS": f"app:{CALLER_KEY}, app:{new} ,other-2:{'~' * 20}"}).api_keys
    assert [key.name for key in keys] == ["app", "app", "other-2"]
    assert len({key.digest for key in keys}) == 3
    assert keys[0] == from_env({"API_KEYS": f"app:{CALLER_KEY}"}).api_keys[0]


def test_a_key_may_hold_colons() -> None:
    whole, part = (from_env({"API_KEYS": f"app:{CALLER_KEY}{end}"}) for end in (":x", ""))
    assert [key.name for key in whole.api_keys] == ["app"]
    assert whole.api_keys != part.api_keys


# Providers


def test_openai_is_a_provider_as_soon_as_it_has_a_key_and_stands_first() -> None:
    assert [upstream.name for upstream in from_env(GROQ).configured_providers] == ["groq"]
    settings = from_env({**GROQ, **OPENAI, "OPENAI_BASE_URL": "http://localhost:1/v1"})
    openai, groq = settings.configured_providers
    assert (openai.name, str(openai.base_url)) == ("openai", "http://localhost:1/v1")
    assert openai.api_key is not None
    assert openai.api_key.get_secret_value() == OPENAI_KEY
    assert (groq.name, str(groq.base_url)) == ("groq", GROQ["GROQ_BASE_URL"])


def test_openai_is_asked_at_its_own_address_unless_that_is_moved() -> None:
    assert str(from_env(OPENAI).configured_providers[0].base_url) == "https://api.openai.com/v1"


def test_providers_are_configured_by_their_names_in_capitals_and_need_no_key() -> None:
    settings = from_env(
        {
            "PROVIDERS": " local-llm ,groq,",
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


@pytest.mark.parametrize(
    "name",
    ["openai", "mock", "rate-limit", "Groq", "local_llm", "1st", "-a", "a/b", "a" * 33, "a b"],
)
def test_a_name_that_is_taken_or_makes_no_variable_is_no_provider(name: str) -> None:
    line = classify_error({"PROVIDERS": f"groq,{name}", "GROQ_BASE_URL": "http://localhost"})
    assert line.startswith(f"PROVIDERS: {name!r} is not usable: takes names such as groq")


def test_a_provider_without_an_address_is_refused() -> None:
    line = classify_error({"PROVIDERS": "local-llm"})
    assert line == "LOCAL_LLM_BASE_URL is not set, but PROVIDERS names local-llm"


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
def test_bare_models_are_answered_by(env: dict[str, str], name: str) -> None:
    assert from_env(env).default_provider_name == name


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"DEFAULT_PROVIDER": "openai"}, "DEFAULT_PROVIDER=openai needs OPENAI_API_KEY"),
        (
            {**GROQ, "DEFAULT_PROVIDER": "openai"},
            "DEFAULT_PROVIDER=openai needs OPENAI_API_KEY",
        ),
        ({"DEFAULT_PROVIDER": "groq"}, "DEFAULT_PROVIDER='groq' takes one of mock"),
        (
            {**OPENAI, **GROQ, "DEFAULT_PROVIDER": "grok"},
            "DEFAULT_PROVIDER='grok' takes one of openai, groq, mock",
        ),
    ],
)
def test_a_default_provider_that_is_not_configured_is_refused(
    env: dict[str, str], line: str
) -> None:
    assert classify_error(env).startswith(line)


# The .env file


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("OPENAI_APIKEY", "; did you mean OPENAI_API_KEY?"),
        ("RATELIMIT", "; did you mean RATE_LIMIT?"),
        ("OPENAI_API_KEY_FIEL", "; did you mean OPENAI_API_KEY_FILE?"),
        ("GROQ_BASEURL", "; did you mean GROQ_BASE_URL?"),
        ("GROC_API_KEY", " unless PROVIDERS names its provider; did you mean GROQ_API_KEY?"),
        ("XYZZY", ""),
        ("port", ""),
    ],
)
def test_an_unknown_name_gives_a_warning_that_offers_the_nearest_known_one(
    name: str, hint: str
) -> None:
    warnings = list(unknown_variable_warnings([name, "PORT"], from_env(GROQ)))
    assert warnings == [f"{name} in .env is not a setting of this service{hint}"]


def test_all_that_is_read_is_known() -> None:
    secrets = ("OPENAI_API_KEY_FILE", "API_KEYS_FILE", "STATE_URL_FILE", "GROQ_API_KEY_FILE")
    names = [*variable_names(), *secrets, "GROQ_BASE_URL", "GROQ_API_KEY"]
    assert list(unknown_variable_warnings(names, from_env(GROQ))) == []


def test_variables_of_a_provider_that_is_not_named_are_unknown() -> None:
    assert len([*unknown_variable_warnings(["GROQ_BASE_URL", "GROQ_API_KEY"], from_env({}))]) == 2


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("\ufeff# Only\n\n  # comments\n", {}),
        ("PORT=1\r\nexport HOST = x # why\nSYSTEM_PROMPT='a\nb'", None),
        ("API_KEYS=web:${HOME}$PATH\n", {"API_KEYS": "web:${HOME}$PATH"}),
        ("METRICS=\nMETRICS=off\n", {"METRICS": "off"}),
    ],
)
def test_a_file_is_read_as_it_stands(
    tmp_path: Path, text: str, values: dict[str, str] | None
) -> None:
    file = tmp_path / ".env"
    file.write_bytes(text.encode())
    lines = {"PORT": "1", "HOST": "x", "SYSTEM_PROMPT": "a\nb"}
    assert read_env_file(file) == (lines if values is None else values)


def test_a_file_that_is_not_there_sets_nothing(tmp_path: Path) -> None:
    assert read_env_file(tmp_path / ".env") == {}


@pytest.mark.parametrize(
    "text",
    [
        "PORT=1\n\n# Nobody but callers with keys.\nALLOW_ANONYMOUS false s3cret\n",
        'PORT=1\nHOST=x\n\nOPENAI_API_KEY="s3cret\n',
        "\n\nHOST=x\ns3cret\nPORT=1\n",
    ],
)
def test_a_line_that_cannot_be_read_stops_the_start_and_is_not_shown(
    tmp_path: Path, text: str
) -> None:
    file = tmp_path / ".env"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_env_file(file)
    assert str(caught.value) == f"{file}, line 4: takes NAME=VALUE, quotes in pairs"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, "Is a directory"),
        (lambda file: file.write_bytes(b"SYSTEM_PROMPT=caf\xe9\n"), "not text in UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_stops_the_start(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    file = tmp_path / ".env"
    make(file)
    with pytest.raises(SettingsError, match=f"{file} can't be read: {reason}"):
        read_env_file(file)


EXAMPLE = ROOT / ".env.example"
# A name, as it stands in the example, and its text; commented out where unset is the default.
ASSIGNMENT = re.compile(r"^(# )?([A-Z_]+)=(.*)$", re.MULTILINE)
# Names that are there for the sake of PROVIDERS, whose variables follow from its value.
EXAMPLES = ["GROQ_BASE_URL", "GROQ_API_KEY"]


def test_the_example_holds_each_variable_once_in_the_order_of_the_model() -> None:
    names = [match[2] for match in ASSIGNMENT.finditer(EXAMPLE.read_text())]
    assert [name for name in names if name not in EXAMPLES] == variable_names()
    assert [name for name in names if name in EXAMPLES] == EXAMPLES


def test_the_example_writes_down_the_defaults() -> None:
    assert from_env(read_env_file(EXAMPLE)) == from_env({})
    assert list(unknown_variable_warnings(read_env_file(EXAMPLE), from_env({}))) == []
    for match in ASSIGNMENT.finditer(EXAMPLE.read_text()):
        if match[2] in variable_names():
            default = Settings.model_fields[match[2].lower()].default
            assert bool(match[1]) == (default is None or default == ()), match[2]
            assert bool(match[3]) != bool(match[1]), match[2]


def test_the_example_is_read_alike_by_whatever_reads_such_files() -> None:
    # `docker run --env-file` knows neither quotes nor comments at the end of a line.
    plain = {
        match[2]: match[3] for match in ASSIGNMENT.finditer(EXAMPLE.read_text()) if not match[1]
    }
    assert plain == read_env_file(EXAMPLE)


def test_a_copy_of_the_example_starts_the_mock(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(EXAMPLE.read_bytes())
    with subprocess.Popen(
        [sys.executable, "-m", "service"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PORT": "0", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        process.terminate()
    assert "NO MODEL ANSWERS" in lines[0]
    assert "Listening on http://127.0.0.1:" in lines[1]
    assert "answers come from mock" in lines[1]


# Read once, by whoever starts the service

WATCHED_IMPORT = """
import importlib, logging, os, sys

asked = set()

class Watched(dict):
    def __getitem__(self, name):
        asked.add(name)
        return super().__getitem__(name)
    def get(self, name, default=None):
        asked.add(name)
        return super().get(name, default)

os.environ = Watched(os.environ)
for name in sys.argv[1:]:
    importlib.import_module(name)
from settings import variable_names
print(sorted(asked & set(variable_names())), logging.getLogger().handlers)
"""


def test_importing_the_modules_reads_no_setting_and_configures_no_log(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    modules = project["tool"]["setuptools"]["py-modules"]
    bad = dict.fromkeys(variable_names(), "*** no value of any variable ***")
    (tmp_path / ".env").write_text("".join(f"{name}='{value}'\n" for name, value in bad.items()))
    run = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORT, *modules],
        cwd=tmp_path,
        env={**bad, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout, run.stderr) == ("[] []\n", "")


async def test_services_with_different_settings_live_side_by_side(service: StartService) -> None:
    apps = [await service(DEFAULT_MODEL=model) for model in ("one", "two")]
    told = [await (await app.get("/api/v1/models")).json() for app in apps]
    assert [models["default"] for models in told] == ["one", "two"]
