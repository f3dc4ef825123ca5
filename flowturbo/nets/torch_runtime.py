"""Runs exported programs in PyTorch: plain on a CPU, compiled and as CUDA graphs on a GPU."""

import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export.passes import move_to_device_pass
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowturbo.rows import Tensors
from flowturbo.runtimes import usable_cores

INPUTS = "inputs.json"  # the names of the inputs, in order, in a file of an exported program
_WARM_UPS = 3  # evaluations before a graph capture: they choose kernels and allocate memory


class TorchModel:
    """A composed model, loaded from a file of `torch.export.save`.

    `graph_rows` needs a GPU: the network is compiled, and one CUDA graph is captured per size in
    it. A batch runs in the smallest graph that fits it, or without a graph if none does.
    """

    def __init__(
        self,
        path: Path,
        device: str = "cpu",
        threads: int | None = None,
        graph_rows: Sequence[int] = (),
    ) -> None:
        self.on_gpu = device.startswith("cuda")
        self._device = device
        stated = {INPUTS: ""}
        program = torch.export.load(path, extra_files=stated)
        self._inputs: list[str] = json.loads(stated[INPUTS])
        if self.on_gpu:
            torch.cuda.set_device(device)
            # No TF32: fp32 means full float32, as in ONNX Runtime here.
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            program = move_to_device_pass(program, device)
        else:
            torch.set_num_threads(threads or usable_cores())
        self._module: Any = program.module(check_guards=False)
        # Drop the row limits that tracing assumed: they are not limits of the network. They come
        # from diffusers, which copies activations of 64 images or more and changes no value.
        self._module._forward_pre_hooks.clear()
        self._graphs: dict[int, _Graph] = {}
        if graph_rows:
            self._module = torch.compile(self._module, fullgraph=True)
            self._capture(program, graph_rows)

    def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]:
        """Outputs [rows, ...] in the model's order."""
        given = [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self._inputs]
        rows = len(given[0])
        size = min((size for size in self._graphs if size >= rows), default=None)
        if size is not None:
            outputs = self._graphs[size].replay(given)
        else:
            with torch.inference_mode(), self._attention():
                outputs = self._module(*_any_rows(tensor.to(self._device) for tensor in given))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(output[:rows].cpu().numpy() for output in outputs)

    def _attention(self) -> AbstractContextManager[None]:
        # On few cores plain attention is the fastest.
        return nullcontext() if self.on_gpu else sdpa_kernel(SDPBackend.MATH)

    def _capture(self, program: torch.export.ExportedProgram, graph_rows: Sequence[int]) -> None:
        """Captures graphs of all sizes, the largest first: all share its buffers and memory."""
        most = max(graph_rows)
        nodes = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
        buffers = [
            torch.zeros((most, *node.shape[1:]), dtype=node.dtype, device=self._device)
            for node in map(nodes.__getitem__, program.graph_signature.user_inputs)
        ]
        pool = torch.cuda.graph_pool_handle()
        for rows in sorted(graph_rows, reverse=True):
            inputs = _any_rows(each[:rows] for each in buffers)
            self._graphs[rows] = _Graph(self._module, inputs, pool)


def _any_rows(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Marks the rows of `tensors` as dynamic, so that one compilation serves all batch sizes.

    `torch.compile(dynamic=True)` would also treat latent sides and channels as variable. It would
    compile again when the number of rows happens to equal one of them.
    """
    marked = list(tensors)
    for tensor in marked:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return marked


class _Graph:
    """A CUDA graph of one batch size: it reads `inputs` and always writes the same buffers."""

    def __init__(self, module: Any, inputs: list[torch.Tensor], pool: Any) -> None:
        self._inputs = inputs
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode():
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    module(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._outputs = module(*inputs)

    def replay(self, given: Sequence[torch.Tensor]) -> Any:
        """The outputs for `given`. Missing rows are padded with zeros, which have no partner."""
        with torch.inference_mode():
            for held, tensor in zip(self._inputs, given, strict=True):
                held[: len(tensor)].copy_(tensor)
                held[len(tensor) :].zero_()
            self._graph.replay()
        return self._outputs
