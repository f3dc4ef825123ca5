"""A real gRPC server in this process that speaks Triton's protocol and follows a script."""

import io
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import (
    deserialize_bytes_tensor,
    np_to_triton_dtype,
    serialize_byte_tensor,
    triton_to_np_dtype,
)

NAMES = "ABCDEFGH"
PIPELINES: list[dict[str, Any]] = [
    {
        "name": "glyphs",
        "condition": {
            "kind": "class_label",
            "takes": ["label", "class_name"],
            "num_classes": 8,
            "class_names": list(NAMES),
            "null_class": True,
        },
        "size": [4, 6],
        "latent_shape": [2, 1, 1],
        "refiner": True,
        "edits": True,
        "default": True,
        "presets": {"fast": "H1P5R3", "best": "H8P9R5"},
        "default_schedule": "H1P5R3",
        "default_guidance_scale": 3.0,
    },
    {
        "name": "latents",
        "condition": {
            "kind": "class_label",
            "takes": ["label", "class_name"],
            "num_classes": 1000,
            "class_names": [],
            "null_class": False,
        },
        "size": None,
        "latent_shape": [2, 1, 1],
        "refiner": False,
        "edits": False,
        "default": False,
        "presets": {"fast": "H1P5"},
        "default_schedule": "H1P5",
        "default_guidance_scale": 1.0,
    },
]


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers like the model; `script` holds what happens to the next requests instead.

    An entry is one of three things. (status code, message) is an error. A dict has arrays that
    replace outputs; None omits one. A function of the gRPC context runs before the normal answer.
    """

    def __init__(self) -> None:
        self.url = ""
        self.script: list[Any] = []
        self.requests: list[Any] = []
        self.remaining_s: list[float] = []
        self.live = self.ready = self.model_ready = True
        self.pipelines = PIPELINES
        self.cancelled = threading.Event()

    def inputs(self, index: int = -1) -> dict[str, np.ndarray]:
        """Input tensors of a received request."""
        return _inputs(self.requests[index])

    def output_names(self, index: int = -1) -> list[str]:
        """Requested outputs of a received request."""
        return [tensor.name for tensor in self.requests[index].outputs]

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        self.remaining_s.append(context.time_remaining())
        action = self.script.pop(0) if self.script else {}
        if isinstance(action, tuple):
            context.abort(*action)
        if callable(action):
            action(context)
            action = {}
        outputs = _answer(_inputs(request)) | action
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        for name in (tensor.name for tensor in request.outputs):
            if outputs[name] is not None:
                _append(response, name, outputs[name])
        return response

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:
        """Two previews, and the answer; a script's arrays are those of the answer."""
        for request in requests:
            self.requests.append(request)
            action = self.script.pop(0) if self.script else {}
            if isinstance(action, tuple):
                code, message = action
                told = f"[{code.name}] {message}"
                yield service_pb2.ModelStreamInferResponse(error_message=told)
                return
            places = [(1, False), (2, False), (3, True)]
            for step, final in places:
                if callable(action):
                    action(context)
                outputs = _answer(_inputs(request)) | (action if isinstance(action, dict) else {})
                outputs |= {"step": np.array([step]), "final": np.array([final])}
                if final and outputs.get("none"):
                    return
                response = service_pb2.ModelInferResponse(model_name=request.model_name)
                for name in (tensor.name for tensor in request.outputs):
                    if final or name in ("image", "encoded_image", "step", "final"):
                        _append(response, name, outputs[name])
                yield service_pb2.ModelStreamInferResponse(infer_response=response)

    def ServerLive(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=self.live)

    def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self.ready)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=self.model_ready)

    def ServerMetadata(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerMetadataResponse(name="triton", version="2.51.0")

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        if not self.model_ready:
            context.abort(grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'flowturbo'")
        response = service_pb2.ModelMetadataResponse(name=request.name)
        for name in ("label", "seed"):
            response.inputs.add(name=name, datatype="INT64", shape=[-1])
        return response


def _inputs(request: Any) -> dict[str, np.ndarray]:
    return {
        tensor.name: _decode(tensor, raw)
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
    }


def _decode(tensor: Any, raw: bytes) -> np.ndarray:
    if tensor.datatype == "BYTES":
        return deserialize_bytes_tensor(raw).reshape(tensor.shape)
    return np.frombuffer(raw, triton_to_np_dtype(tensor.datatype)).reshape(tensor.shape)


def _append(response: Any, name: str, array: np.ndarray) -> None:
    datatype = np_to_triton_dtype(array.dtype)
    raw = serialize_byte_tensor(array).item() if datatype == "BYTES" else array.tobytes()
    response.outputs.add(name=name, datatype=datatype, shape=array.shape)
    response.raw_output_contents.append(raw)


def _answer(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    if not inputs:
        return {"pipelines": _json_tensor(PIPELINES)}
    names = inputs.get("class_name")
    if "prompt" in inputs:
        texts = inputs["prompt"]
        counted = [
            len(inputs[name]) for name in ("seed", "initial_noise", "image") if name in inputs
        ]
        n = counted[0] if counted else len(texts)
        cut = np.resize([len(text) > 40 for text in texts], n)
    else:
        if names is None:
            names = np.array([NAMES[i].encode() for i in inputs["label"]], dtype=object)
        n, cut = len(names), np.zeros(0, bool)
    seeds = inputs.get("seed", np.arange(100, 100 + n))
    images = np.zeros((n, 4, 6, 3), np.uint8) + seeds.astype(np.uint8)[:, None, None, None]
    return {
        "image": images,
        "encoded_image": np.array([_png(image) for image in images], dtype=object),
        "latent": np.full((n, 2, 1, 1), 0.5, np.float32),
        "seed": seeds,
        "start_time": np.array([0.5], np.float32),
        "class_name": names,
        "truncated": cut,
        "settings": _json_tensor(_settings(inputs)),
        "pipelines": _json_tensor(PIPELINES),
    }


def _json_tensor(document: Any) -> np.ndarray:
    """A document as the service answers it: BYTES [1]."""
    return np.array([json.dumps(document).encode()], dtype=object)


def _settings(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the request asks for, or the defaults of the first pipeline."""
    defaults = {
        "pipeline": PIPELINES[0]["name"].encode(),
        "schedule": PIPELINES[0]["default_schedule"].encode(),
        "guidance_scale": PIPELINES[0]["default_guidance_scale"],
        "output_format": b"raw",
    }
    used = {name: inputs[name].item() if name in inputs else defaults[name] for name in defaults}
    times = inputs["times"].tolist() if "times" in inputs else None
    interval = inputs.get("guidance_interval", np.array([0.0, 1.0])).tolist()
    decoded = {k: v.decode() if isinstance(v, bytes) else v for k, v in used.items()}
    return decoded | {
        "times": times,
        "guidance_interval": interval,
        "size": PIPELINES[0]["size"],
        "variant": "reference",
    }


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    """A running fake server."""
    fake = FakeTriton()
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    fake.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield fake
    server.stop(None).wait()


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
