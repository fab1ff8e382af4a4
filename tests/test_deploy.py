"""The files in deploy/ fit the service. tests/test_container.py runs what they describe."""

import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from server import CLOSE_SECONDS
from settings import Settings, variable_names
from tests.container import context

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
NAMESPACE, DEPLOYMENT, POLICY = yaml.safe_load_all(
    (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
)
VARIABLES = set(variable_names())
SECRETS = {name.removesuffix("_FILE") for name in VARIABLES if name.endswith("_FILE")}
# From SIGTERM until the last connection is closed.
STOP_SECONDS = Settings().drain_seconds + CLOSE_SECONDS
POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]


def compose_sidecar() -> dict[str, Any]:
    """Return the service of the Compose file."""
    sidecar: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]["chat"]
    return sidecar


def pod_sidecar() -> dict[str, Any]:
    """Return the service's container of the pod, with its variables as a mapping."""
    (sidecar,) = POD["initContainers"]
    return {**sidecar, "env": {each["name"]: each["value"] for each in sidecar["env"]}}


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("compose*.yaml")), ids=lambda file: file.name)
def test_compose_file_is_valid(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert "chat-sidecar" in text
    PyCompose.from_yaml(text)
    with pytest.raises(ValueError, match="read_onyl"):
        PyCompose.from_yaml(text.replace("read_only", "read_onyl"))


@pytest.mark.parametrize("name", ["app", "chat"])
def test_compose_containers_are_restricted(name: str) -> None:
    container = yaml.safe_load(COMPOSE)["services"][name]
    assert container["read_only"] is True
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert "ports" not in container
    assert "privileged" not in container


def test_compose_grace_period_covers_the_drain() -> None:
    grace = compose_sidecar()["stop_grace_period"]
    assert float(grace.removesuffix("s")) >= STOP_SECONDS + 2


def test_replicas_trust_their_load_balancer_and_share_a_redis_that_evicts_nothing() -> None:
    file = yaml.safe_load((DEPLOY / "compose.scale.yaml").read_text(encoding="utf-8"))
    services, network = file["services"], file["networks"]["default"]["ipam"]["config"]
    nginx = (DEPLOY / "nginx.scale.conf").read_text(encoding="utf-8")
    assert re.findall("server (.+):8000;", nginx) == ["chat-1", "chat-2"]
    for name in ("chat-1", "chat-2"):
        env = services[name]["environment"]
        assert env.keys() <= VARIABLES
        assert env["STATE_URL"] == "redis://redis:6379/0"
        assert network == [{"subnet": env["FORWARDED_ALLOW_IPS"]}]
        assert float(services[name]["stop_grace_period"].removesuffix("s")) >= STOP_SECONDS + 2
    command = " ".join(services["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert "ports" not in services["redis"]


@pytest.mark.parametrize("container", [compose_sidecar(), pod_sidecar()], ids=["compose", "pod"])
def test_sidecar_never_uses_the_mock_and_sets_only_known_variables(
    container: dict[str, Any],
) -> None:
    env = container.get("env") or container["environment"]
    assert env.keys() <= VARIABLES
    assert env["DEFAULT_PROVIDER"] == "openai"
    assert env["OPENAI_API_KEY_FILE"].startswith("/run/secrets/")
    assert not SECRETS & env.keys()


def test_pod_meets_the_restricted_pod_security_standard() -> None:
    # kubernetes.io/docs/concepts/security/pod-security-standards, "Restricted"
    assert NAMESPACE["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["runAsUser"] > 0
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*POD["initContainers"], *POD["containers"]):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
        assert all("hostPort" not in port for port in container["ports"])
    kinds = {kind for volume in POD["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"emptyDir", "secret"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & POD.keys()
    assert POD["automountServiceAccountToken"] is False


def test_pod_runs_as_the_user_of_the_image_and_writes_only_to_its_volume() -> None:
    uid = POD["securityContext"]["runAsUser"]
    assert f"USER {uid}:{POD['securityContext']['runAsGroup']}\n" in DOCKERFILE
    assert POD["securityContext"]["fsGroup"] == POD["securityContext"]["runAsGroup"]
    sidecar = pod_sidecar()
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["securityContext"]["readOnlyRootFilesystem"] is True
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in sidecar["volumeMounts"]}
    assert mounts == {"/data": False, "/run/secrets/openai": True}


def test_pod_grace_period_covers_the_application_and_the_drain() -> None:
    application = 30
    assert POD["terminationGracePeriodSeconds"] >= application + STOP_SECONDS + 2


def test_network_policy_does_not_open_the_sidecars_port() -> None:
    assert POLICY["spec"]["podSelector"] == DEPLOYMENT["spec"]["selector"]
    assert set(POLICY["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    open_ports = [port["port"] for rule in POLICY["spec"]["ingress"] for port in rule["ports"]]
    assert pod_sidecar()["ports"][0]["containerPort"] == Settings().port
    assert Settings().port not in open_ports


def test_image_has_the_version_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    label = re.search(r'image\.version="(.+)"', DOCKERFILE)
    assert label is not None
    assert label[1] == project["version"]
    assert pod_sidecar()["image"] == f"{project['name']}:{project['version']}"


def test_build_context_has_only_what_the_dockerfile_copies(tmp_path: Path) -> None:
    source = tmp_path / "source"
    wanted = {"requirements/run.txt", "service.py", "static/playground.html"}
    excluded = {
        ".env",
        "requirements/dev.txt",
        "chat.db",
        ".git/config",
        "tests/a.py",
        "static/__pycache__/a.pyc",
    }
    for name in wanted | excluded:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    shutil.copy(ROOT / ".dockerignore", source)
    target = context(source, tmp_path / "target")
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == wanted
