"""The manifests: what the pod's two containers share, that their commands and settings are real ones, and that names agree."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from engine.host_process.directories import claim_all, release
from engine.host_process.host import SHUTDOWN_SECONDS_MAX
from gateway.cli.main import build_parser
from gateway.settings import Settings, load
from gateway.settings_nodes import node_settings
from tests.unit.packaging.files import DOCKER, REPOSITORY, read_manifests, read_yaml
from transport.node.keys import make_keys

BASE = "kubernetes/base"
NODES = "kubernetes/nodes"
FILES = ("statefulset.yaml", "services.yaml", "networkpolicy.yaml", "poddisruptionbudget.yaml")
(STATEFUL_SET,) = read_manifests(f"{BASE}/statefulset.yaml")
POD: dict[str, Any] = STATEFUL_SET["spec"]["template"]["spec"]
(ENGINE,), (GATEWAY,) = POD["initContainers"], POD["containers"]
LABELS = {"app.kubernetes.io/name": "peerkv"}
# The oldest that the manifests name, and a recent one.
VERSIONS = ("1.29", "1.33")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES)
def test_kubernetes_schema_accepts_every_manifest(file: str, version: str) -> None:
    for manifest in read_manifests(f"{BASE}/{file}"):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_oldest_version_of_kubernetes_is_the_one_that_is_validated() -> None:
    assert f"Kubernetes {VERSIONS[0]} or later" in (DOCKER / BASE / "kustomization.yaml").read_text()


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize(("directory", "kind", "gpus"), [(BASE, "gpu", "8"), ("kubernetes/cpu", "cpu", None)])
def test_kustomize_makes_valid_manifests_with_the_images_and_gpus_of_each_directory(
    directory: str, kind: str, gpus: str | None
) -> None:
    made = subprocess.check_output(["kubectl", "kustomize", str(DOCKER / directory)], text=True)
    manifests = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(made)}
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)
    pod = manifests["StatefulSet"]["spec"]["template"]["spec"]
    (engine,) = pod["initContainers"]
    assert engine["image"].startswith("peerkv-engine:")
    assert engine["image"].endswith(f"-{kind}")
    assert engine["resources"]["limits"].get("nvidia.com/gpu") == gpus
    # The map's name has a hash of its settings, so that a change of them makes a new pod.
    (config,) = [volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume]
    assert config == manifests["ConfigMap"]["metadata"]["name"] != "peerkv"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_the_component_for_the_prometheus_operator_adds_its_monitor(tmp_path: Path) -> None:
    shutil.copytree(DOCKER / "kubernetes", tmp_path / "kubernetes")
    file = tmp_path / BASE / "kustomization.yaml"
    file.write_text(file.read_text().replace("# components:", "components:"))
    made = subprocess.check_output(["kubectl", "kustomize", str(file.parent)], text=True)
    assert "PodMonitor" in [manifest["kind"] for manifest in yaml.safe_load_all(made)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_several_pods_are_nodes_each_with_a_name_an_address_and_keys_of_its_own(version: str, tmp_path: Path) -> None:
    made = list(yaml.safe_load_all(subprocess.check_output(["kubectl", "kustomize", str(DOCKER / NODES)], text=True)))
    for manifest in made:
        kubernetes_validate.validate(manifest, version, strict=True)
    (stateful,) = [manifest for manifest in made if manifest["kind"] == "StatefulSet"]
    pod = stateful["spec"]["template"]["spec"]
    keys, engine = pod["initContainers"]  # in this order: the agent reads what the first one writes
    assert keys["image"] == engine["image"]
    environment = {each["name"]: each for each in engine["env"]}
    assert environment["POD_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert environment["POD_IP"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
    make_keys(tmp_path, ["peerkv-1"])
    settings = Settings(
        node_name=environment["PEERKV_NODE_NAME"]["value"].replace("$(POD_NAME)", "peerkv-1"),
        node_address=environment["PEERKV_NODE_ADDRESS"]["value"].replace("$(POD_IP)", "10.0.0.7"),
        node_keys=tmp_path / "peerkv-1",
        join="valkey://:word@registry:6379",
    )
    told = node_settings(settings, settings, "")
    assert (told.name, told.host, told.port) == ("peerkv-1", "10.0.0.7", 7710)
    assert {told.port, told.port + 1} == {each["containerPort"] for each in engine["ports"]}
    (policy,) = read_manifests(f"{NODES}/networkpolicy.yaml")
    assert [each["port"] for each in policy["spec"]["ingress"][0]["ports"]] == [told.port, told.port + 1]
    (volume,) = {m["name"] for m in engine["volumeMounts"] if m["mountPath"] == environment["PEERKV_NODE_KEYS"]["value"]}
    (written,) = {m["mountPath"] for m in keys["volumeMounts"] if m["name"] == volume}
    assert f"{written}/ca.pem" in keys["args"][0]
    assert f'0600 "/run/secrets/nodes/$POD_NAME.pem" {written}/node.pem' in keys["args"][0]


def test_the_engine_starts_before_the_gateway_and_ends_after_it() -> None:
    assert (ENGINE["name"], ENGINE["restartPolicy"]) == ("engine", "Always")
    assert GATEWAY["name"] == "gateway"


@pytest.mark.parametrize("container", [ENGINE, GATEWAY], ids=["engine", "gateway"])
def test_each_command_is_one_that_peerkv_knows(container: dict[str, Any]) -> None:
    assert callable(build_parser().parse_args(container["args"]).run)


def test_both_containers_have_the_same_environment_of_known_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert ENGINE["env"] == GATEWAY["env"]
    for variable in GATEWAY["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    monkeypatch.setenv("PEERKV_CONFIG", str(DOCKER / BASE / "peerkv.toml"))
    # As Kubernetes would set them for the services, were they wanted.
    monkeypatch.setenv("PEERKV_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("PEERKV_PODS_SERVICE_HOST", "None")
    assert load().run_dir.parent == load().table_dir.parent
    assert load().port == 8000


def test_directories_of_a_volume_that_others_may_write_to_are_accepted(tmp_path: Path) -> None:
    volume = tmp_path / "run"
    volume.mkdir()
    volume.chmod(0o2777)  # as an emptyDir is
    environment = {variable["name"]: variable["value"] for variable in ENGINE["env"]}
    paths = [environment["PEERKV_RUN_DIR"], environment["PEERKV_TABLE_DIR"]]
    (mount,) = [m["mountPath"] for m in ENGINE["volumeMounts"] if m["name"] == "run"]
    claims = claim_all([volume / Path(path).relative_to(mount) for path in paths], 0)
    assert len(claims) == 2
    release(claims)


@pytest.mark.parametrize("container", [ENGINE, GATEWAY], ids=["engine", "gateway"])
def test_no_container_has_more_rights_than_it_needs(container: dict[str, Any]) -> None:
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["runAsUser"] == POD["securityContext"]["fsGroup"] == 10001
    assert POD["automountServiceAccountToken"] is POD["enableServiceLinks"] is False


@pytest.mark.parametrize("container", [ENGINE, GATEWAY], ids=["engine", "gateway"])
def test_every_mount_is_of_a_volume_and_no_secret_is_where_it_is_not_needed(container: dict[str, Any]) -> None:
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    claimed = {claim["metadata"]["name"] for claim in STATEFUL_SET["spec"]["volumeClaimTemplates"]}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted <= volumes.keys() | claimed
    given = {item["key"] for name in mounted for item in volumes.get(name, {}).get("secret", {}).get("items", [])}
    assert given == ({"hf_token"} if container is ENGINE else {"admin_key", "tenants", "salt_secret"})


def test_secrets_are_called_what_peerkv_looks_for() -> None:
    environment = {variable["name"]: variable["value"] for variable in GATEWAY["env"]}
    (mount,) = [m["mountPath"] for m in GATEWAY["volumeMounts"] if m["name"] == "gateway-secrets"]
    assert environment["PEERKV_SECRETS_DIR"] == mount
    items = {item["key"]: item["path"] for v in POD["volumes"] if "secret" in v for item in v["secret"]["items"]}
    ours = ("admin_key", "tenants", "salt_secret")
    assert items == {"hf_token": "hf_token", **{name: f"peerkv_{name}" for name in ours}}


def test_a_stop_waits_for_the_drain_and_the_end_of_the_replicas() -> None:
    settings = Settings()
    need = settings.drain_seconds + settings.terminate_seconds + SHUTDOWN_SECONDS_MAX
    assert POD["terminationGracePeriodSeconds"] > need


def test_probes_ask_what_the_gateway_answers() -> None:
    assert GATEWAY["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}
    assert GATEWAY["livenessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    port = {each["name"]: each["containerPort"] for each in GATEWAY["ports"]}["http"]
    assert port == Settings.model_fields["port"].default
    assert ENGINE["readinessProbe"]["exec"]["command"][1:] == ["/opt/peerkv/healthcheck.py", "engine"]


def test_services_policy_budget_and_monitor_mean_the_pods_of_the_set() -> None:
    assert STATEFUL_SET["spec"]["selector"]["matchLabels"] == LABELS == STATEFUL_SET["spec"]["template"]["metadata"]["labels"]
    services = read_manifests(f"{BASE}/services.yaml")
    assert {service["metadata"]["name"] for service in services} == {"peerkv", STATEFUL_SET["spec"]["serviceName"]}
    assert all(service["spec"]["selector"] == LABELS for service in services)
    (policy,) = read_manifests(f"{BASE}/networkpolicy.yaml")
    assert policy["spec"]["podSelector"]["matchLabels"] == LABELS
    for file in (f"{BASE}/poddisruptionbudget.yaml", "kubernetes/prometheus-operator/podmonitor.yaml"):
        (manifest,) = read_manifests(file)
        assert manifest["spec"]["selector"]["matchLabels"] == LABELS


def test_prometheus_reads_with_the_admin_key_under_the_job_that_the_alerts_name() -> None:
    (monitor,) = read_manifests("kubernetes/prometheus-operator/podmonitor.yaml")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    secret = {volume["name"]: volume for volume in POD["volumes"]}["gateway-secrets"]["secret"]
    assert endpoint["authorization"]["credentials"] == {"name": secret["secretName"], "key": "admin_key"}
    assert endpoint["port"] in {port["name"] for port in GATEWAY["ports"]}
    (job,) = read_yaml("prometheus/prometheus.yml")["scrape_configs"]
    assert LABELS[monitor["spec"]["jobLabel"]] == job["job_name"]


def test_kustomize_lists_every_manifest_and_the_projects_version() -> None:
    kustomization = read_yaml(f"{BASE}/kustomization.yaml")
    assert set(kustomization["resources"]) == set(FILES)
    (generated,) = kustomization["configMapGenerator"]
    assert {"name": generated["name"]} in [volume.get("configMap") for volume in POD["volumes"]]
    assert all((DOCKER / BASE / file).exists() for file in generated["files"])
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    for path, engine in ((BASE, "gpu"), ("kubernetes/cpu", "cpu"), (NODES, "gpu")):
        tags = {image["name"]: image["newTag"] for image in read_yaml(f"{path}/kustomization.yaml")["images"]}
        assert tags["peerkv-engine"] == f"{version}-{engine}"
        assert tags.get("peerkv-gateway", version) == version
    assert {ENGINE["image"], GATEWAY["image"]} == {"peerkv-engine", "peerkv-gateway"}
