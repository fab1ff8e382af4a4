"""The measured programs: this service and its peers, and how each is configured and started.

Each has a virtual environment under `.venv-bench/`, made by `make bench`. nginx is the system's.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.client import Endpoint
from bench.process import Program

ROOT = Path(__file__).parent.parent
VENVS = ROOT / ".venv-bench"
OPENAI_BODY = (
    '{"model":"gpt-4o-mini","stream":true,"stream_options":{"include_usage":true},'
    '"messages":[{"role":"user","content":"MESSAGE"}]}'
)
# The rate limiter is on, but admits every request.
UNLIMITED = "100000000/second"

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log stderr crit;
worker_rlimit_nofile 8192;
events {{ worker_connections 8000; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream provider {{ server 127.0.0.1:{upstream_port}; keepalive 2048; }}
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
class Site:
    """Where one program runs: its directory, its port, the provider's port.

    `env` holds further settings for this service.
    """

    folder: Path
    port: int
    upstream_port: int
    env: Mapping[str, str]

    @property
    def openai(self) -> dict[str, str]:
        """The variables that point the openai SDK, and every peer, at the benchmark's provider."""
        base_url = f"http://127.0.0.1:{self.upstream_port}/v1"
        return {"OPENAI_API_KEY": "sk-bench", "OPENAI_BASE_URL": base_url}


@dataclass(frozen=True)
class Peer:
    """A program to measure. `program` may write configuration files into the site's folder."""

    name: str
    title: str
    executable: Path
    program: Callable[[Site], Program]
    path: str = "/v1/chat/completions"
    body: str = OPENAI_BODY
    skipped_loads: frozenset[str] = frozenset()

    def endpoint(self, port: int) -> Endpoint:
        return Endpoint(port, self.path, self.body)


def _service(python: Path, source: Path, site: Site) -> Program:
    env = {
        "PYTHONPATH": str(source),
        "PORT": str(site.port),
        "RATE_LIMIT": UNLIMITED,
        "MAX_STREAMS": "2000",
        "MAX_STREAMS_PER_CALLER": "2000",
        **site.openai,
        **site.env,
    }
    return Program([str(python), "-m", "service"], env, site.port, "/healthz")


def _fastapi(site: Site) -> Program:
    env = {"PYTHONPATH": str(ROOT), "RATE_LIMIT": UNLIMITED, **site.openai}
    command = [str(FASTAPI.executable), "bench.fastapi_peer:app", "--port", str(site.port)]
    return Program(command, env, site.port, "/healthz")


def _nginx(site: Site) -> Program:
    text = NGINX.format(folder=site.folder, port=site.port, upstream_port=site.upstream_port)
    config = site.folder / "nginx.conf"
    config.write_text(text)
    command = [str(NGINX_PEER.executable), "-p", str(site.folder), "-c", str(config)]
    return Program(command, {}, site.port, "/healthz")


def _ferro(site: Site) -> Program:
    env = {
        "PORT": str(site.port),
        "RATE_LIMIT_RPS": "0",
        "FERRO_MODEL_CATALOG_TIMEOUT": "0",
        "ALLOW_UNAUTHENTICATED_PROXY": "true",
        **site.openai,
    }
    return Program([str(FERRO.executable)], env, site.port, "/health")


def _litellm(site: Site) -> Program:
    config = LITELLM.format(base_url=site.openai["OPENAI_BASE_URL"])
    (site.folder / "litellm.yaml").write_text(config)
    command = [str(LITELLM_PEER.executable), "--config", "litellm.yaml"]
    command += ["--host", "127.0.0.1", "--port", str(site.port), "--num_workers", "1"]
    env = {
        # Otherwise it downloads its price list.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    # Its /health sends a request to the model.
    return Program(command, env, site.port, "/health/liveliness")


def upstream(port: int) -> Program:
    """Return the benchmark's provider, which runs in the benchmark's own Python."""
    command = [sys.executable, "-m", "bench.upstream", str(port)]
    return Program(command, {"PYTHONPATH": str(ROOT)}, port, "/")


def _chat_sidecar(name: str, title: str, python: Path, source: Path) -> Peer:
    def program(site: Site) -> Program:
        return _service(python, source, site)

    return Peer(name, title, python, program, "/api/v1/chat", '{"message":"MESSAGE"}')


# Tests run the service in their own environment.
PYTHON = VENVS / "service/bin/python"
SERVICE = _chat_sidecar(
    "service", "this service", PYTHON if PYTHON.exists() else Path(sys.executable), ROOT
)
BASELINE = _chat_sidecar("0.1.0", "0.1.0", VENVS / "0.1.0/bin/python", VENVS / "0.1.0/source")
NGINX_PEER = Peer(
    "nginx", "nginx (passes bytes)", Path(shutil.which("nginx") or "/usr/sbin/nginx"), _nginx
)
FERRO = Peer("ferro", "Ferro 1.5.10 (Go)", VENVS / "ferro/bin/ferrogw", _ferro)
FASTAPI = Peer(
    "fastapi",
    "FastAPI, openai SDK",
    VENVS / "fastapi/bin/uvicorn",
    _fastapi,
    "/chat",
    '{"message":"MESSAGE"}',
    # It fails most of these, and takes half a minute.
    skipped_loads=frozenset({"arrival"}),
)
# A thousand streams take it minutes.
LITELLM_PEER = Peer(
    "litellm",
    "LiteLLM proxy",
    VENVS / "litellm/bin/litellm",
    _litellm,
    skipped_loads=frozenset({"arrival", "hold"}),
)
PEERS = (SERVICE, BASELINE, FERRO, NGINX_PEER, FASTAPI, LITELLM_PEER)
