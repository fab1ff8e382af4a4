"""`python -m service --check`: reports whether the configured providers, models and store work.

It prints the effective settings without secrets, requests each provider's list of models, and opens
the session store. It sends no chat request and does not listen.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, suppress
from typing import Any, Literal

import httpx

from errors import ServiceError
from providers import create_transport
from settings import InUseError, ProviderSettings, Rate, Settings, SettingsError, variable_prefix

# Providers send a list of models, 400 KB at most, in a second or two.
LIST_SECONDS = 10.0

Result = tuple[Literal["ok", "warning", "error"], str]
OpenState = Callable[[Settings], tuple[object, Any]]


async def check(
    settings: Settings,
    warnings: Iterable[str],
    open_state: OpenState,
    write: Callable[[str], object],
) -> int:
    """Write a line per setting and per result, and return the exit status: 1 after an error.

    `warnings` are those of a start. `open_state` returns the limiters and the session store. Raise
    SettingsError if a proxy or the certificate authorities in the environment are invalid.
    """
    status = 0
    for line in effective_settings(settings):
        write(f"{line}\n")
    for text in warnings:
        write(f"warning: {text}\n")
    async for level, text in _check_all(settings, open_state):
        write(f"{level}: {text}\n")
        status |= level == "error"
    return status


def effective_settings(settings: Settings) -> Iterator[str]:
    """Yield NAME=VALUE for each variable that has a value. Secrets are only shown to be set."""
    providers = [(variable_prefix(each.name), each) for each in settings.providers]
    for prefix, model in [*providers, ("", settings)]:
        for field, info in type(model).model_fields.items():
            value = getattr(model, field)
            if field == "providers":
                value = tuple(each.name for each in settings.providers if each.name != "openai")
            elif value and not info.repr:
                value = settings.public_state_url if field == "state_url" else "(set)"
            # None is a value where the default is another one: RATE_LIMIT=off.
            text = "off" if value is None and info.default is not None else format_value(value)
            if text and field != "name":
                yield f"{prefix}{field.upper()}={text}"


def format_value(value: object) -> str:
    """Return the value of a setting as its variable would contain it, but on one line."""
    if value in (None, (), {}):
        return ""
    if isinstance(value, tuple) and not isinstance(value, Rate):
        return ",".join(map(str, value))
    if isinstance(value, bool | dict):
        return json.dumps(value)
    return str(value).replace("\n", "\\n")


async def _check_all(settings: Settings, open_state: OpenState) -> AsyncIterator[Result]:
    try:
        async with aclosing(open_state(settings)[1]) as store:
            await store.check()
        yield "ok", f"STATE_URL: {settings.public_state_url} can be used"
    except (SettingsError, ServiceError) as error:
        level: Literal["warning", "error"] = "warning" if isinstance(error, InUseError) else "error"
        yield level, f"{settings.public_state_url} cannot be used: {error}"
    models = _configured_models(settings)
    for provider in settings.providers:
        try:
            response = await _get_models(provider, settings.connect_timeout_seconds)
        except (httpx.HTTPError, TimeoutError) as error:
            variable = f"{variable_prefix(provider.name)}BASE_URL"
            yield "error", f"{provider.name} is unreachable: {_reason(error)}; check {variable}"
        else:
            for result in _evaluate(provider, response, models[provider.name]):
                yield result


def _configured_models(settings: Settings) -> dict[str, dict[str, str]]:
    """Return for each provider its configured models and their variables, without globs."""
    models: dict[str, dict[str, str]] = defaultdict(dict)
    names = {"mock", *(each.name for each in settings.providers)}
    for variable, model_ids in (
        ("DEFAULT_MODEL", (settings.default_model,)),
        ("MODELS", settings.models),
        ("FALLBACK_MODELS", settings.fallback_models),
    ):
        for model_id in model_ids:
            name, _, model = model_id.partition("/")
            if name not in names or not model:
                name, model = settings.default_provider_name, model_id
            if not set("*?[") & set(model_id):
                models[name].setdefault(model, variable)
    return models


async def _get_models(provider: ProviderSettings, connect_seconds: float) -> httpx.Response:
    url = httpx.URL(f"{str(provider.base_url).rstrip('/')}/models")
    key = provider.api_key
    headers = httpx.Headers({"Authorization": f"Bearer {key.get_secret_value()}"} if key else {})
    headers.update(provider.extra_headers)
    timeout = httpx.Timeout(LIST_SECONDS, connect=connect_seconds)
    async with (
        asyncio.timeout(connect_seconds + LIST_SECONDS),
        httpx.AsyncClient(transport=create_transport(url), timeout=timeout) as client,
    ):
        return await client.get(url, headers=headers)


def _evaluate(
    provider: ProviderSettings, response: httpx.Response, models: dict[str, str]
) -> Iterator[Result]:
    """Yield the results for a provider's list of models. `models` are those it has to contain."""
    name, prefix, status = provider.name, variable_prefix(provider.name), response.status_code
    listed = _model_ids(response) if status == 200 else set()
    # OpenAI lists every model. Other servers may have no list, or accept aliases.
    openai = provider.base_url.host == "api.openai.com"
    missing: Literal["warning", "error"] = "error" if openai else "warning"
    if status in (401, 403):
        yield "error", f"{name} rejected the API key ({status}); check {prefix}API_KEY"
    elif not listed:
        hint = f"; does {prefix}BASE_URL need /v1?" if status == 404 else ""
        yield missing, f"{name} sent no list of models ({status} from {response.url}){hint}"
    else:
        yield "ok", f"{name} responds at {response.url}"
        for model, variable in models.items():
            if model in listed:
                yield "ok", f"{name} lists the model {model} of {variable}"
            else:
                yield missing, f"{name} does not list the model {model}; check {variable}"


def _model_ids(response: httpx.Response) -> set[str]:
    """Return the ids in a list of models, or nothing if the response has another form."""
    with suppress(ValueError, TypeError, KeyError):
        ids = {str(model["id"]) for model in response.json()["data"]}
        # Ollama lists llama3:latest for llama3, Gemini models/gemini-3-flash for gemini-3-flash.
        return ids | {each.removesuffix(":latest").removeprefix("models/") for each in ids}
    return set()


def _reason(error: BaseException) -> str:
    """Return what caused the error. Other texts than the system's may quote a proxy's password."""
    while error.__cause__ is not None:
        error = error.__cause__
    return getattr(error, "strerror", None) or type(error).__name__
