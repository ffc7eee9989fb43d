"""``deploy/``: every manifest matches its schema, all files agree, and their arguments work with a real Triton.

``render`` does what ``kubectl kustomize`` does, as far as these files need it, so that they are also checked on
machines without kubectl; where there is one, the results are compared.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import kubernetes_validate
import pytest
import tritonclient.grpc
import yaml
from tritonclient.utils import InferenceServerException

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
SERVERS = ("cpu", "gpu", "object-storage")
OVERLAYS = (*SERVERS, "admin")
KUBERNETES_VERSIONS = ("1.30", "1.34", "1.37")
KEY = "a-key"
HEADER = {"triton-grpc-protocol-clipweld-admin-key": KEY}


# Rendering


def documents(file):
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def identity(manifest):
    return manifest["kind"], manifest["metadata"]["name"]


def merged(base, patch):
    """Return a strategic merge: objects by key, null deletes, lists of named items by name, other lists replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        result = base | {key: merged(base.get(key), value) for key, value in patch.items()}
        return {key: value for key, value in result.items() if value is not None}
    if isinstance(base, list) and all(isinstance(item, dict) and "name" in item for item in (*base, *patch)):
        named = {item["name"]: item for item in base}
        new = {item["name"]: merged(named.get(item["name"]), item) for item in patch}
        return list((named | new).values())
    return merged({}, patch) if isinstance(patch, dict) else patch


def render(overlay):
    """Return an overlay's manifests by kind and name."""
    kustomization = documents(KUBERNETES / overlay / "kustomization.yaml")[0]
    assert set(kustomization) <= {"apiVersion", "kind", "resources", "patches", "images"}
    found = {}
    for name in kustomization["resources"]:
        path = (KUBERNETES / overlay / name).resolve()
        found |= render(path.name) if path.is_dir() else {identity(manifest): manifest for manifest in documents(path)}
    for entry in kustomization.get("patches", []):
        for patch in documents(KUBERNETES / overlay / entry["path"]):
            if patch.pop("$patch", None) == "delete":
                del found[identity(patch)]
            else:
                found[identity(patch)] = merged(found[identity(patch)], patch)
    images = {image["name"]: image for image in kustomization.get("images", [])}
    for manifest in found.values():
        for container in containers(manifest):
            if image := images.get(container["image"]):
                container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"
    return found


def pod(manifest):
    return manifest["spec"]["template"]["spec"]


def containers(manifest):
    if manifest["kind"] != "Deployment":
        return []
    return [*pod(manifest).get("initContainers", []), *pod(manifest)["containers"]]


def server(overlay):
    """Return the Deployment of an overlay and its Triton container."""
    deployment = render(overlay)["Deployment", "clipweld"]
    return deployment, pod(deployment)["containers"][0]


def compose(*files):
    """Return the merged compose files, with variables replaced by their values or defaults."""
    values = {"CLIPWELD_ADMIN_KEY": KEY}
    result = {}
    for name in files or ("compose.yaml",):
        text = (DEPLOY / name).read_text(encoding="utf-8")
        text = re.sub(r"\$\{(\w+):[-?]([^}]*)\}", lambda found: values.get(found[1], found[2]), text)
        result = merged(result, yaml.safe_load(text))
    return result


def kubernetes_arguments(overlay):
    """Return Triton's arguments as the kubelet expands them."""
    _, triton = server(overlay)
    values = {"CLIPWELD_ADMIN_KEY": KEY, "CPU_LIMIT": str(math.ceil(float(triton["resources"]["limits"]["cpu"])))}
    assert {entry["name"] for entry in triton["env"]} == set(values)
    return [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], argument) for argument in triton["args"]]


def arguments_of(platform):
    return compose()["services"]["triton"]["command"] if platform == "compose" else kubernetes_arguments(platform)


def value_of(arguments, flag):
    found = [argument.removeprefix(f"{flag}=") for argument in arguments if argument.startswith(f"{flag}=")]
    assert len(found) == 1, flag
    return found[0]


def seconds(text):
    return int(text.removesuffix("s"))


# Schemas


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_match_kubernetes_schemas(overlay, version):
    manifests = render(overlay)
    assert manifests
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_renders_the_same(overlay):
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / overlay)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = render(overlay), {identity(manifest): manifest for manifest in yaml.safe_load_all(done.stdout)}
    for manifests in (ours, theirs):
        for manifest in manifests.values():
            if manifest["kind"] == "Deployment":
                pod(manifest)["volumes"].sort(key=lambda volume: volume["name"])  # a merge does not define their order
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.gpu.yaml",), ("compose.yaml", "compose.gpu.yaml")])
def test_compose_matches_its_specification(files, tmp_path):
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(compose(*files)))
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, str(tmp_path / "compose.yaml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    shutil.which("docker") is None or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode,
    reason="no docker compose",
)
@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")])
def test_docker_compose_reads_the_files_as_we_do(files):
    options = [option for name in files for option in ("--file", str(DEPLOY / name))]
    environment = {**os.environ, "CLIPWELD_ADMIN_KEY": KEY}
    done = subprocess.run(
        ["docker", "compose", *options, "--profile", "*", "config"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["services"]["triton"]["command"] == arguments_of("compose")


# Consistency


def test_all_platforms_use_the_same_triton_release():
    images = {overlay: server(overlay)[1]["image"] for overlay in SERVERS}
    images["compose"] = compose()["services"]["triton"]["image"]
    assert len(set(images.values())) == 1, images
    release = re.fullmatch(r"nvcr\.io/nvidia/tritonserver:(\d\d\.\d\d)-py3", images["compose"])[1]
    assert release >= "26.07", "earlier ones have published ways around the key for model control"


def test_compose_and_kubernetes_start_the_same_server():
    only_behind_a_service = {"--grpc-max-connection-age=300000"}
    assert set(kubernetes_arguments("cpu")) - set(arguments_of("compose")) == only_behind_a_service
    assert set(arguments_of("compose")) <= set(kubernetes_arguments("cpu"))
    assert kubernetes_arguments("object-storage") == kubernetes_arguments("cpu")


@pytest.mark.parametrize("platform", ["compose", *SERVERS])
def test_triton_has_one_thread_per_core_of_its_limit(platform):
    threads = value_of(arguments_of(platform), "--backend-config=onnxruntime,intra_op_thread_count")
    if platform == "compose":
        limit = compose()["services"]["triton"]["deploy"]["resources"]["limits"]["cpus"]
    else:
        limit = server(platform)[1]["resources"]["limits"]["cpu"]
    assert int(threads) == int(limit)


@pytest.mark.parametrize("platform", ["compose", *SERVERS])
def test_a_stop_waits_for_requests_in_flight(platform):
    in_flight = int(value_of(arguments_of(platform), "--exit-timeout-secs"))
    if platform == "compose":
        assert seconds(compose()["services"]["triton"]["stop_grace_period"]) > in_flight
        return
    deployment, triton = server(platform)
    pause = int(triton["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod(deployment)["terminationGracePeriodSeconds"] > pause + in_flight


@pytest.mark.parametrize("overlay", SERVERS)
def test_every_reference_resolves(overlay):
    manifests = render(overlay)
    deployment, triton = server(overlay)
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    ports = {port["name"]: port["containerPort"] for port in triton["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}  # Triton's own defaults
    for (kind, name), manifest in manifests.items():
        if kind == "Service":
            assert manifest["spec"]["selector"].items() <= labels.items(), name
            assert {port["targetPort"] for port in manifest["spec"]["ports"]} <= set(ports)
        if kind == "PodDisruptionBudget":
            assert manifest["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert triton[probe]["httpGet"]["port"] in ports
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["metrics"])
    volumes = {volume["name"]: volume for volume in pod(deployment)["volumes"]}
    for container in containers(deployment):
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
    models = volumes["models"]
    if overlay == "object-storage":
        assert "emptyDir" in models
        assert ("PersistentVolumeClaim", "clipweld-models") not in manifests
    else:
        assert ("PersistentVolumeClaim", models["persistentVolumeClaim"]["claimName"]) in manifests
    mount = next(mount["mountPath"] for mount in triton["volumeMounts"] if mount["name"] == "models")
    assert value_of(triton["args"], "--model-repository").startswith(f"{mount}/")


def test_the_admin_pod_reaches_the_servers_and_their_volume():
    manifests, admin = render("cpu"), render("admin")["Deployment", "clipweld-admin"]
    policy, headless = manifests["NetworkPolicy", "clipweld"]["spec"], manifests["Service", "clipweld-servers"]
    assert policy["podSelector"]["matchLabels"] == headless["spec"]["selector"]
    labels = admin["spec"]["template"]["metadata"]["labels"]
    by_grpc = next(rule for rule in policy["ingress"] if rule["ports"] == [{"port": "grpc"}])
    here = [peer["podSelector"]["matchLabels"] for peer in by_grpc["from"] if "namespaceSelector" not in peer]
    assert any(wanted.items() <= labels.items() for wanted in here)
    assert headless["spec"]["clusterIP"] == "None"
    assert headless["spec"]["publishNotReadyAddresses"]
    deployment, triton = server("cpu")
    exporter = containers(admin)[0]
    assert pod(admin)["volumes"][0] == pod(deployment)["volumes"][0]
    assert exporter["volumeMounts"][0]["mountPath"] == triton["volumeMounts"][0]["mountPath"]
    assert exporter["env"][0] == triton["env"][0]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_have_minimal_permissions_and_resource_limits(overlay):
    for manifest in render(overlay).values():
        if manifest["kind"] != "Deployment":
            continue
        assert pod(manifest)["automountServiceAccountToken"] is False
        assert pod(manifest)["securityContext"]["runAsNonRoot"] is True
        assert pod(manifest)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(manifest):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= set(container["resources"]["limits"]), container["name"]
    if overlay in SERVERS:
        _, triton = server(overlay)
        assert next(mount for mount in triton["volumeMounts"] if mount["name"] == "models")["readOnly"] is True
        assert ("nvidia.com/gpu" in triton["resources"]["limits"]) == (overlay == "gpu")


def test_compose_exposes_only_the_clients_port():
    triton = compose()["services"]["triton"]
    assert [port for port in triton["ports"] if not str(port).startswith("127.0.0.1:")] == ["8001:8001"]
    assert triton["read_only"] is True
    assert triton["cap_drop"] == ["ALL"]
    assert triton["volumes"][0]["read_only"] is True
    assert (DEPLOY / triton["volumes"][0]["source"]).resolve() == ROOT / "model_repository"
    device = compose("compose.yaml", "compose.gpu.yaml")["services"]["triton"]["deploy"]["resources"]["reservations"]
    assert device["devices"][0]["capabilities"] == ["gpu"]


def test_compose_sets_the_same_stack_limit_as_exporter_serve():
    from clipweld.exporter.serving.isolation import STACK

    assert compose()["services"]["triton"]["ulimits"]["stack"] == {"soft": STACK, "hard": STACK}


def test_prometheus_scrapes_the_server():
    target = documents(DEPLOY / "prometheus.yml")[0]["scrape_configs"][0]["static_configs"][0]["targets"][0]
    service, port = target.split(":")
    assert service in compose()["services"]
    assert port == "8002"


def test_no_key_is_stored_in_the_files():
    for overlay in OVERLAYS:
        assert not [kind for kind, _ in render(overlay) if kind == "Secret"]
    git = subprocess.run(["git", "check-ignore", "deploy/.env"], cwd=ROOT, capture_output=True, check=False)
    assert git.returncode == 0 or not (ROOT / ".git").exists()
    for file in DEPLOY.rglob("*.yaml"):
        for value in re.findall(r"clipweld-admin-key=(.*)", file.read_text(encoding="utf-8")):
            assert re.fullmatch(r"\$\(CLIPWELD_ADMIN_KEY\)|\$\{CLIPWELD_ADMIN_KEY:\?[^}]+\}", value), file


def test_readme_names_every_file():
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([^`]+)` ", readme, re.M))
    files = {path.name for path in DEPLOY.iterdir() if not path.name.startswith(".")} - {"README.md", "kubernetes"}
    folders = {f"kubernetes/{path.name}" for path in KUBERNETES.iterdir()}
    assert rows == files | folders


# Administration


def test_promotion_needs_neither_torch_nor_onnxruntime(tmp_path):
    """Without the packages that exporter.Dockerfile omits, the only error is that there is no version to promote."""
    heavy = ("torch", "torchvision", "open_clip", "onnxruntime", "onnxscript", "pytriton", "lightning", "scipy")
    heavy += ("lightning_fabric", "jinja2", "matplotlib")
    image = (DEPLOY / "exporter.Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"pip install .* /src/trainer /src/exporter ", image), "without extras"
    locked = {line.partition("==")[0] for line in (ROOT / "requirements/exporter.txt").read_text().splitlines()}
    assert "tritonclient" in locked
    assert not {name.replace("_", "-") for name in (*heavy, "onnxruntime-gpu", "open-clip-torch")} & locked
    code = f"import sys; sys.modules.update(dict.fromkeys({heavy})); from clipweld.exporter.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "promote", "2", "--repository", str(tmp_path / "model_repository")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("exporter: repository "), done.stderr
    assert "no version of 'clip'" in done.stderr


@pytest.mark.parametrize("addresses", [("10.0.0.4", "10.0.0.7"), ()])
def test_on_all_servers_passes_each_pod_once(addresses, tmp_path):
    lines = "".join(f"{address} {kind} clipweld-servers\n" for address in addresses for kind in ("STREAM", "DGRAM"))
    for name, script in (("getent", f"printf '%s' '{lines}'"), ("exporter", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [str(DEPLOY / "on-all-servers"), "promote", "3"],
        env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    if not addresses:
        assert done.returncode != 0
        assert "no server runs" in done.stderr
        return
    expected = ["promote", "3", "--repository", "/clipweld/model_repository"]
    expected += [word for address in addresses for word in ("--url", f"{address}:8001")]
    assert done.stdout.split() == expected


# On a real Triton


def status(url, method="GET"):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as response:
            return response.status
    except urllib.error.HTTPError as exc:
        return exc.code
    except OSError:
        return None


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Running:
    """A Triton with a platform's arguments; only paths, addresses and ports are replaced."""

    def __init__(self, platform, repository, triton, ports):
        program, *arguments = arguments_of(platform)
        assert program == "tritonserver"
        place = f"--model-repository={value_of(arguments, '--model-repository')}"
        arguments[arguments.index(place)] = f"--model-repository={repository}"
        self.ports = dict(zip(("http", "grpc", "metrics"), ports, strict=True))
        addresses = [f"--{name}-port={port}" for name, port in self.ports.items()]
        addresses += ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1"]
        self.process = subprocess.Popen(
            [str(triton.binary), f"--backend-directory={triton.backends}", *arguments, *addresses],
            env=os.environ | triton.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def url(self, port, path):
        return f"http://127.0.0.1:{self.ports[port]}{path}"

    def wait(self, path="/v2/health/ready"):
        deadline = time.monotonic() + 60
        while status(self.url("http", path)) != 200:
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(40)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


@contextmanager
def running(platform, repository):
    from clipweld.exporter.serving.installation import installation

    with installation(f"clipweld-{os.getpid()}-") as triton:
        found = Running(platform, repository, triton, free_ports(3))
        try:
            found.wait()
            yield found
        finally:
            found.stop()


def probes(platform):
    """Return the port and path of every health check and metrics request."""
    if platform == "compose":
        url = compose()["services"]["triton"]["healthcheck"]["test"][-1]
        assert url.startswith("http://localhost:8000/")
        return [("http", url.removeprefix("http://localhost:8000")), ("metrics", "/metrics")]
    deployment, triton = server(platform)
    gets = [triton[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    return [*((get["port"], get["path"]) for get in gets), ("metrics", annotations["prometheus.io/path"])]


@pytest.fixture
def copied(repository, tmp_path):
    """A repository of versions 1 and 2 that a test may change."""
    for folder in (repository, repository.with_name(f"{repository.name}.store")):
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / repository.name


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["compose", "cpu", "gpu"])
def test_the_server_answers_probes_and_clients_and_model_control_needs_the_key(platform, copied, digits):
    from clipweld.client import ZeroShotClassifier

    with running(platform, copied) as triton:
        for port, path in probes(platform):
            assert status(triton.url(port, path)) == 200, path
        address = f"127.0.0.1:{triton.ports['grpc']}"
        with ZeroShotClassifier(address) as classifier:
            assert classifier.versions() == [1, 2]
            (answer,) = classifier.classify([digits.load("test")[0][0]], task="digits")
            assert answer.version == 2
        admin = tritonclient.grpc.InferenceServerClient(address)
        for refused in ({}, {"triton-grpc-protocol-clipweld-admin-key": "another"}):
            for control in (admin.load_model, admin.unload_model):
                with pytest.raises(InferenceServerException, match="restricted"):
                    control("clip_card", headers=refused)
        for path in ("/v2/repository/models/clip_card/load", "/v2/repository/models/clip_card/unload"):
            assert status(triton.url("http", path), "POST") == 403
        admin.unload_model("clip_card", headers=HEADER)
        admin.load_model("clip_card", headers=HEADER)
        assert admin.is_model_ready("clip_card", "2")
        admin.close()


@pytest.mark.slow
def test_a_failed_load_leaves_the_server_ready_and_a_failed_start_ends_it(copied, tmp_path):
    """This is why the readiness check is lenient."""
    with running("cpu", copied) as triton:
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "model.onnx").write_bytes(b"no model")
        broken.rename(copied / "clip_image" / "3")
        admin = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{triton.ports['grpc']}")
        with pytest.raises(InferenceServerException):
            admin.load_model("clip_image", headers=HEADER)
        assert admin.is_model_ready("clip_image", "2")
        admin.close()
        assert status(triton.url("http", "/v2/health/ready")) == 200
    with pytest.raises(AssertionError, match="is None"), running("cpu", copied):
        pass


@pytest.mark.slow
def test_a_server_missed_by_a_promotion_catches_up_when_it_is_repeated(copied):
    """deploy/README.md says this of a pod that starts during a promotion."""
    from clipweld.client import ZeroShotClassifier
    from clipweld.exporter.serving.switch import promote, rollback
    from clipweld.exporter.serving.triton import serve
    from clipweld.exporter.store.repository import Repository

    repository = Repository(copied, "clip")
    rollback(repository, [])
    with serve(copied) as first, serve(copied) as second:
        addresses = [server.url.removeprefix("grpc://") for server in (first, second)]

        def newest():
            return [versions_at(address)[-1] for address in addresses]

        def versions_at(address):
            with ZeroShotClassifier(address) as classifier:
                return classifier.versions()

        assert newest() == [1, 1]
        promote(repository, 2, addresses[:1])
        assert newest() == [2, 1]
        promote(repository, 2, addresses)
        assert newest() == [2, 2]
        assert repository.history()[-2:] == [1, 2]
