"""What several test modules share: the golden cases and the export command."""

import io
import json
import runpy
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import tritonclient.grpc as triton
from google.protobuf import text_format
from safetensors import safe_open
from safetensors.torch import save_file
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import np_to_triton_dtype

from flowturbo.contract import ORCHESTRATOR, TensorSpec
from flowturbo.serving.tritonserver import ServerAddress

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
GLYPHS = ROOT / "weights" / "glyphs"
GLYPHS_SOURCE = (
    *("--predictor", GLYPHS / "predictor.safetensors"),
    *("--refiner", GLYPHS / "refiner.safetensors", "--vae", GLYPHS / "vae"),
)
# As `make export` does.
GLYPHS_EXPORT = (
    *GLYPHS_SOURCE,
    *("--name", "glyphs", "--class-names", GLYPHS / "classes.txt", "--guidance-scale", "3"),
)
# Its figures are float32's. The pipeline is named `sit`. The runtime is given: nothing is measured.
GOLDEN_EXPORT = (
    *("--predictor", GOLDEN / "predictor.pt", "--refiner", GOLDEN / "refiner.pt"),
    *("--num-heads", "2", "--runtime", "onnxruntime", "--precision", "fp32"),
)

TRITON_TYPES = {
    np.float32: model_config_pb2.TYPE_FP32,
    np.int64: model_config_pb2.TYPE_INT64,
    np.int32: model_config_pb2.TYPE_INT32,
    np.uint8: model_config_pb2.TYPE_UINT8,
    np.bool_: model_config_pb2.TYPE_BOOL,
    np.object_: model_config_pb2.TYPE_STRING,
}


def read_config(path: Path) -> model_config_pb2.ModelConfig:
    """A config.pbtxt; unknown fields are errors."""
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def check_tensors(
    entries: list, specs: tuple[TensorSpec, ...], sizes: dict[int | str, int]
) -> None:
    """Asserts that a configuration's inputs or outputs are those of the contract, in order."""
    found = [(e.name, e.data_type, list(e.dims), getattr(e, "optional", False)) for e in entries]
    assert found == [
        (s.name, TRITON_TYPES[s.dtype], [sizes.get(d, d) for d in s.dims], s.optional)
        for s in specs
    ]


@dataclass(frozen=True)
class GoldenCase:
    """A sample of the public reference implementation."""

    schedule: str
    guidance_scale: float
    label: np.ndarray
    noise: np.ndarray
    latent: np.ndarray


def golden_cases() -> list[GoldenCase]:
    arrays = np.load(GOLDEN / "cases.npz")
    return [
        GoldenCase(
            case["schedule"],
            case["guidance_scale"],
            *(arrays[f"{name}_{case['case']}"] for name in ("label", "noise", "latent")),
        )
        for case in json.loads((GOLDEN / "cases.json").read_text())["cases"]
    ]


def run_module(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m module`, in this process: to import its libraries again takes seconds."""
    words = [module, *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with (
        chdir(ROOT),
        mock.patch.object(sys, "argv", words),
        redirect_stdout(out),
        redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # a user's process does not turn them into errors
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def run_export(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`python -m export` as a user runs it."""
    return run_module("export", *arguments)


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes other `tensors` into a safetensors file; its metadata stay."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)


class Caller:
    """A plain client of Triton's gRPC protocol, for what the product's own client cannot ask."""

    def __init__(self, url: str) -> None:
        self._client = triton.InferenceServerClient(url)
        self._pool = ThreadPoolExecutor(16)

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown()
        self._client.close()

    def infer(
        self, model: str, outputs: list[str], class_count: int = 0, **tensors: Any
    ) -> list[np.ndarray]:
        """The outputs of one request, in the order asked for; a string is one of BYTES [1]."""
        answer = self._ask(model, outputs, class_count, tensors)
        return [answer.as_numpy(name) for name in outputs]

    def output_names(self, model: str, outputs: list[str] | None, **tensors: Any) -> list[str]:
        """The names of the outputs, in the order that they came in."""
        answer = self._ask(model, outputs, 0, tensors).get_response()
        return [output.name for output in answer.outputs]

    def _ask(
        self, model: str, outputs: list[str] | None, class_count: int, tensors: dict[str, Any]
    ) -> triton.InferResult:
        wanted = [triton.InferRequestedOutput(name, class_count) for name in outputs or ()] or None
        inputs = [_input(name, value) for name, value in tensors.items()]
        return self._client.infer(model, inputs, outputs=wanted, client_timeout=60)

    def begin(self, model: str, outputs: list[str], **tensors: Any) -> Future[list[np.ndarray]]:
        """A request that runs beside others."""
        return self._pool.submit(lambda: self.infer(model, outputs, **tensors))


def _input(name: str, value: Any) -> triton.InferInput:
    array = np.array([value.encode()], object) if isinstance(value, str) else np.asarray(value)
    dtype = "BYTES" if array.dtype == object else np_to_triton_dtype(array.dtype)
    tensor = triton.InferInput(name, list(array.shape), dtype)
    tensor.set_data_from_numpy(array)
    return tensor


def post(
    address: ServerAddress, endpoint: str, body: dict[str, Any] | bytes, **headers: str
) -> Any:
    """Status and answer of Triton's HTTP front end."""
    url = f"http://{address.http}/v2/models/{ORCHESTRATOR}/{endpoint}"
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, content, headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
