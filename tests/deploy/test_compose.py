"""docker-compose.yml, the Dockerfile and .env.example agree with each other and with the code."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from typing import Any

import yaml
from support import ROOT

from bench.downloads import debian_package
from export.__main__ import _options
from flowturbo import contract
from flowturbo.conditions import REQUEST_INPUTS
from flowturbo.gateway.__main__ import options as gateway_options
from flowturbo.serve import _parse

COMPOSE = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
ENV = dict(
    line.split("=", 1)
    for line in (ROOT / ".env.example").read_text().splitlines()
    if line and not line.startswith("#")
)


def resolved() -> dict[str, Any]:
    """The compose file with the defaults of its variables put in."""
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE))


SERVICES: dict[str, Any] = resolved()["services"]


def test_variables_and_their_defaults() -> None:
    used = re.findall(r"\$\{(\w+)(?::-([^}]*))?\}", COMPOSE)
    assert dict(used) == ENV
    assert f"ARG TRITON_RELEASE={ENV['TRITON_RELEASE']}" in DOCKERFILE


def test_one_release_with_the_security_fixes() -> None:
    year, month = ENV["TRITON_RELEASE"].split(".")
    assert (int(year), int(month)) >= (26, 8)
    images = re.findall(r"(nvcr\.io/\S+|flowturbo-\w+:\S+)", COMPOSE + DOCKERFILE)
    assert len(images) == 5
    assert all("${TRITON_RELEASE" in image for image in images)


def test_paths_exist() -> None:
    assert set(SERVICES) == {
        *("check", "server", "export", "torch", "gateway", "perf_analyzer", "glyphs_export"),
        "glyphs",
    }
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            folders = [ENV[name] for name in ("MODELS", "CHECKPOINTS", "KEYS")]
            given = source in folders or source in resolved()["volumes"]
            assert given or (ROOT / source).exists(), volume
        if "build" in service:
            build = service["build"]
            assert (ROOT / build["dockerfile"]).is_file()
            assert f" AS {build['target']}\n" in DOCKERFILE


def test_servers_are_guarded() -> None:
    for name in ("server", "torch", "glyphs"):
        service = SERVICES[name]
        assert int(service["user"].split(":")[0]) > 0
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["restart"] == "unless-stopped"
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["shm_size"] == "1g"
        check = " ".join(service["healthcheck"]["test"])
        assert f"/v2/models/{contract.ORCHESTRATOR}/ready" in check
        assert [v for v in service["volumes"] if ":/models" in v][0].endswith(":ro")
    assert SERVICES["server"]["deploy"] == SERVICES["export"]["deploy"]
    assert SERVICES["torch"]["deploy"] == SERVICES["server"]["deploy"]
    assert "deploy" not in SERVICES["glyphs"]
    assert "profiles" not in SERVICES["server"]


def test_commands_are_understood() -> None:
    (default,) = re.findall(r"^CMD (\[.*repository.*\])$", DOCKERFILE, re.MULTILINE)
    for command in (json.loads(default), *(SERVICES[n]["command"] for n in ("glyphs", "torch"))):
        options, _, check_alone = _parse(command)
        assert not check_alone
        assert options.host == "0.0.0.0"
        assert str(options.repository).startswith("/models/")
    export = _options(SERVICES["glyphs_export"]["command"])
    assert (export.name, export.guidance_scale) == ("glyphs", 3.0)
    assert (export.deployment.engine, export.deployment.on_gpu) == ("onnxruntime", False)
    assert all((ROOT / path).exists() for path in export.source.files().values())
    assert str(export.repository) == str(_parse(SERVICES["glyphs"]["command"])[0].repository)


def test_the_gateway_is_guarded() -> None:
    """It has keys, and its own options are understood."""
    service = SERVICES["gateway"]
    assert int(service["user"].split(":")[0]) > 0 and service["read_only"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["cap_drop"] == ["ALL"]
    args = gateway_options(service["command"])
    assert (args.host, args.service, args.port) == ("0.0.0.0", "server:8001", 8080)
    assert str(args.keys).startswith("/keys/") and f"{args.port}/readyz" in str(
        service["healthcheck"]
    )


def test_the_driver_that_the_image_needs_is_found_for_it() -> None:
    """By the image's own entry point, in front of every command of ours."""
    entries = [json.loads(e) for e in re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)]
    entries.append(SERVICES["torch"]["entrypoint"])
    entries.remove(["python3", "-m", "flowturbo.gateway"])  # a client needs no driver
    modules = {entry[-1] for entry in entries}
    assert modules == {"flowturbo.serve", "export"}
    for entry in entries:
        assert entry[:-1] == ["/opt/nvidia/nvidia_entrypoint.sh", "python3", "-m"]


def test_tensorrt_is_not_installed_twice() -> None:
    """Its bindings alone, without what they would bring, and PyTorch for the CPU."""
    (tensorrt,) = re.findall(r"pip install (.*tensorrt.*)", DOCKERFILE)
    assert tensorrt == '--no-deps "tensorrt-cu13-bindings==${TRT_VERSION%%+*}.*"'
    assert ENV["TORCH_BUILD"] == "cpu"
    assert "ARG TORCH_BUILD=cpu\n" in DOCKERFILE


def test_what_must_be_put_right_ends_the_start_at_once() -> None:
    """The server waits for a service that checks the same repository and is not started again."""
    check, (default,) = SERVICES["check"], re.findall(r"^CMD (.*repo.*)$", DOCKERFILE, re.MULTILINE)
    options, _, check_alone = _parse(check["command"])
    assert check_alone and check["restart"] == "no" and not check["ports"]
    assert options.repository == _parse(json.loads(default))[0].repository
    waits = {"check": {"condition": "service_completed_successfully"}}
    assert SERVICES["server"]["depends_on"] == waits
    assert check["volumes"] == SERVICES["server"]["volumes"]


def test_the_load_is_of_this_service() -> None:
    arguments = shlex.join(SERVICES["perf_analyzer"]["entrypoint"])
    assert f"-m {contract.ORCHESTRATOR} " in arguments
    # Without --name, as docs/deployment.md exports it.
    exported = _options(["--predictor", "FILE"]).name
    models = ",".join(contract.model_name(exported, role) for role in contract.LABEL_ROLES)
    assert f"--bls-composing-models={models}" in arguments
    data = json.loads((ROOT / "docker" / "perf_analyzer.json").read_text())["data"]
    names = {spec.name for spec in REQUEST_INPUTS}
    assert all(entry.keys() <= names and "label" in entry for entry in data)


def test_docker_compose_accepts_the_file() -> None:
    """By what is here, or by Debian's docker-compose."""
    command, environment = docker_compose()
    names = ("export", "torch", "load", "cpu", "web")
    profiles = [word for name in names for word in ("--profile", name)]
    done = subprocess.run(
        [*command, "--env-file", ".env.example", *profiles, "config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["services"].keys() == SERVICES.keys()


def docker_compose() -> tuple[list[str], dict[str, str]]:
    """The command, and its environment."""
    environment = dict(os.environ)
    plugin = [shutil.which("docker") or "", "compose"]
    if plugin[0] and not subprocess.run([*plugin, "version"], capture_output=True).returncode:
        return plugin, environment
    if found := shutil.which("docker-compose"):
        return [found], environment
    folder = debian_package("docker-compose", along=r"python3-(?!minimal|distutils|lib2to3).+")
    environment["PYTHONPATH"] = str(folder / "usr/lib/python3/dist-packages")
    return [sys.executable, "-W", "ignore", str(folder / "usr/bin/docker-compose")], environment
