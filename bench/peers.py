"""The measured programs: this service and its peers, and how each is configured and started.

Each has a virtual environment under `.venv-bench/`, made by `make bench`. nginx is the system's.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench.client import Endpoint
from bench.process import Program

ROOT = Path(__file__).parent.parent
VENVS = ROOT / ".venv-bench"
BODY = '{"message":"MESSAGE"}'
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
    litellm_params:
      model: openai/gpt-4o-mini
      api_base: http://127.0.0.1:{upstream_port}/v1
      api_key: sk-bench
litellm_settings: {{telemetry: false}}
"""


@dataclass(frozen=True)
class Site:
    """Where a program runs, the provider's port, and additional settings for the service."""

    folder: Path
    port: int
    upstream_port: int
    service_env: Mapping[str, str]


@dataclass(frozen=True)
class Peer:
    """A program to measure.

    `configure` returns its arguments and the variables that only it needs. It may write
    configuration files into the site's folder.
    """

    name: str
    title: str
    executable: Path
    configure: Callable[[Site], tuple[list[str], dict[str, str]]]
    health_path: str = "/healthz"
    path: str = "/v1/chat/completions"
    body: str = OPENAI_BODY
    skipped_loads: frozenset[str] = frozenset()

    def program(self, site: Site) -> Program:
        arguments, variables = self.configure(site)
        env = {
            "PORT": str(site.port),
            "OPENAI_API_KEY": "sk-bench",
            "OPENAI_BASE_URL": f"http://127.0.0.1:{site.upstream_port}/v1",
            "RATE_LIMIT": UNLIMITED,
            **variables,
        }
        return Program([str(self.executable), *arguments], env, site.port, self.health_path)

    def endpoint(self, port: int) -> Endpoint:
        return Endpoint(port, self.path, self.body)


def _service(source: Path, site: Site) -> tuple[list[str], dict[str, str]]:
    limits = {"MAX_STREAMS": "2000", "MAX_STREAMS_PER_CALLER": "2000"}
    return ["-m", "service"], {"PYTHONPATH": str(source), **limits, **site.service_env}


def _nginx(site: Site) -> tuple[list[str], dict[str, str]]:
    config = site.folder / "nginx.conf"
    config.write_text(NGINX.format(**vars(site)))
    return ["-p", str(site.folder), "-c", str(config)], {}


def _ferro(site: Site) -> tuple[list[str], dict[str, str]]:
    return [], {
        "RATE_LIMIT_RPS": "0",
        "FERRO_MODEL_CATALOG_TIMEOUT": "0",
        "ALLOW_UNAUTHENTICATED_PROXY": "true",
    }


def _litellm(site: Site) -> tuple[list[str], dict[str, str]]:
    config = site.folder / "litellm.yaml"
    config.write_text(LITELLM.format(**vars(site)))
    arguments = ["--config", str(config), "--host", "127.0.0.1", "--port", str(site.port)]
    return [*arguments, "--num_workers", "1"], {
        # Otherwise it downloads its price list.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }


def upstream(port: int) -> Program:
    """Return the benchmark's provider, which runs in the benchmark's own Python."""
    command = [sys.executable, "-m", "bench.upstream", str(port)]
    return Program(command, {"PYTHONPATH": str(ROOT)}, port, "/")


# Tests run the service in their own environment.
PYTHON = next(filter(Path.exists, [VENVS / "service/bin/python"]), Path(sys.executable))
NGINX_PATH = Path(shutil.which("nginx") or "/usr/sbin/nginx")

# fmt: off
SERVICE = Peer("service", "this service", PYTHON, partial(_service, ROOT),
               path="/api/v1/chat", body=BODY)
PEERS = (
    SERVICE,
    replace(SERVICE, name="0.1.0", title="0.1.0", executable=VENVS / "0.1.0/bin/python",
            configure=partial(_service, VENVS / "0.1.0/source")),
    Peer("ferro", "Ferro 1.5 (Go)", VENVS / "ferro/bin/ferrogw", _ferro,
         health_path="/health"),
    Peer("nginx", "nginx (passes bytes)", NGINX_PATH, _nginx),
    # Its /health sends a request to the model, and a thousand streams take it minutes.
    Peer("litellm", "LiteLLM proxy", VENVS / "litellm/bin/litellm", _litellm,
         health_path="/health/liveliness", skipped_loads=frozenset({"arrival", "hold"})),
)
# fmt: on
