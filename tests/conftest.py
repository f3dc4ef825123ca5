"""Real exports and real servers, made once a run."""

import os
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import GOLDEN_EXPORT, ROOT, run_export

from flowturbo.serving.tritonserver import ServerAddress, running_server

# Servers of the tests are on this machine, wherever its user's other calls go through.
os.environ["no_proxy"] = ",".join(filter(None, ("127.0.0.1,localhost", os.environ.get("no_proxy"))))


@pytest.fixture(scope="session")
def golden_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictor and refiner of the golden cases, latents only."""
    repository = tmp_path_factory.mktemp("golden") / "models"
    done = run_export(*GOLDEN_EXPORT, "--repository", repository)
    assert done.returncode == 0, done.stderr
    return repository


@pytest.fixture(scope="session")
def glyphs_repository() -> Path:
    """The glyphs model, exported by the Makefile's own command."""
    done = subprocess.run(["make", "export"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return ROOT / "model_repository"


@pytest.fixture(scope="session")
def golden_server(golden_repository: Path) -> Iterator[ServerAddress]:
    with running_server(golden_repository) as address:
        yield address


@pytest.fixture(scope="session")
def glyphs_server(glyphs_repository: Path) -> Iterator[ServerAddress]:
    with running_server(glyphs_repository) as address:
        yield address


@pytest.fixture(scope="session")
def read_metrics() -> Callable[..., dict[str, float]]:
    """Prometheus samples of a server, `name{labels}` to value."""

    def read(address: ServerAddress, *, at_once: bool = False) -> dict[str, float]:
        if not at_once:
            time.sleep(0.3)  # the service's own lag by a tenth of a second, Triton's do not
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{address.metrics}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    return read
