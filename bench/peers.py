"""What is measured: the service and its peers, how each is started and asked.

Each has a virtual environment of its own under `.venv-bench/`; nginx is the system's. Whoever is
not installed is reported missing.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.load import Questions
from bench.process import Program

ROOT = Path(__file__).parent.parent
VENVS = ROOT / ".venv-bench"
OPENAI_BODY = (
    '{"model":"gpt-4o-mini","stream":true,"stream_options":{"include_usage":true},'
    '"messages":[{"role":"user","content":"MESSAGE"}]}'
)
# A limiter that is on and never refuses; the other limit is on one caller's answers at once.
UNLIMITED = "100000000/second"

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log stderr crit;
worker_rlimit_nofile 8192;
events {{ worker_connections 8000; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream provider {{ server 127.0.0.1:{upstream}; keepalive 2048; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096; keepalive_requests 1000000;
    location = /healthz {{ return 200; }}
    location / {{
      proxy_pass http://provider; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""
LITELLM = """
model_list:
  - model_name: gpt-4o-mini
    litellm_params: {{model: openai/gpt-4o-mini, api_base: {base_url}, api_key: sk-bench}}
litellm_settings: {{telemetry: false}}
"""


@dataclass(frozen=True)
class Place:
    """Where a program is to run, and whom it is to ask."""

    folder: Path
    port: int
    upstream: int

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.upstream}/v1"


@dataclass(frozen=True)
class Peer:
    """A program to measure. `program` may write files into the place's folder; `limited` asks for
    the default limits instead of none."""

    name: str
    title: str
    needs: Path
    program: Callable[[Place, bool], Program]
    path: str = "/v1/chat/completions"
    body: str = OPENAI_BODY
    # How often it is asked before it is measured.
    warming: int = 20

    def questions(self, port: int) -> Questions:
        return Questions(port, self.path, self.body)

    @property
    def missing(self) -> bool:
        return not self.needs.exists()


def _service(place: Place, limited: bool) -> Program:
    env = {
        "PYTHONPATH": str(ROOT),
        "PORT": str(place.port),
        "OPENAI_API_KEY": "sk-bench",
        "OPENAI_BASE_URL": place.base_url,
    }
    if not limited:
        env |= {"RATE_LIMIT": UNLIMITED, "MAX_STREAMS_PER_CALLER": "2000", "MAX_STREAMS": "2000"}
    return Program([str(SERVICE.needs), "-m", "service"], place.port, "/healthz", env)


def _fastapi(place: Place, limited: bool) -> Program:
    env = {
        "PYTHONPATH": str(ROOT),
        "OPENAI_API_KEY": "sk-bench",
        "OPENAI_BASE_URL": place.base_url,
        "RATE_LIMIT": "10/minute" if limited else UNLIMITED,
    }
    uvicorn = [str(VENVS / "fastapi/bin/python"), "-m", "uvicorn", "bench.fastapi_peer:app"]
    return Program([*uvicorn, "--port", str(place.port)], place.port, "/healthz", env)


def _nginx(place: Place, limited: bool) -> Program:
    text = NGINX.format(folder=place.folder, port=place.port, upstream=place.upstream)
    (place.folder / "nginx.conf").write_text(text)
    command = ["/usr/sbin/nginx", "-p", str(place.folder), "-c", str(place.folder / "nginx.conf")]
    return Program(command, place.port, "/healthz", {})


def _ferro(place: Place, limited: bool) -> Program:
    env = {
        "PORT": str(place.port),
        "OPENAI_API_KEY": "sk-bench",
        "OPENAI_BASE_URL": place.base_url,
        "RATE_LIMIT_RPS": "0",
        "FERRO_MODEL_CATALOG_TIMEOUT": "0",
        "ALLOW_UNAUTHENTICATED_PROXY": "true",
    }
    return Program([str(VENVS / "ferro/bin/ferrogw")], place.port, "/health", env)


def _litellm(place: Place, limited: bool) -> Program:
    (place.folder / "litellm.yaml").write_text(LITELLM.format(base_url=place.base_url))
    command = [str(VENVS / "litellm/bin/litellm"), "--config", "litellm.yaml"]
    command += ["--host", "127.0.0.1", "--port", str(place.port), "--num_workers", "1"]
    # Its price list would be fetched from outside. /health would ask the model.
    env = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    return Program(command, place.port, "/health/liveliness", env)


def upstream(port: int) -> Program:
    """The byte-level provider, in the bench's own Python."""
    serve = [sys.executable, "-m", "bench.upstream", str(port)]
    return Program(serve, port, "/", {"PYTHONPATH": str(ROOT)})


SERVICE = Peer(
    "service",
    "this service",
    # Tests do without an environment for it alone.
    python if (python := VENVS / "service/bin/python").exists() else Path(sys.executable),
    _service,
    "/api/v1/chat",
    '{"message":"MESSAGE"}',
)
FASTAPI = Peer(
    "fastapi",
    "FastAPI + openai SDK",
    VENVS / "fastapi/bin/uvicorn",
    _fastapi,
    "/chat",
    '{"message":"MESSAGE"}',
)
PEERS = (
    SERVICE,
    Peer(
        "nginx", "nginx, passing through", Path(shutil.which("nginx") or "/usr/sbin/nginx"), _nginx
    ),
    Peer("ferro", "Ferro AI gateway (Go)", VENVS / "ferro/bin/ferrogw", _ferro),
    FASTAPI,
    Peer("litellm", "LiteLLM proxy", VENVS / "litellm/bin/litellm", _litellm),
)
