"""Exported programs in PyTorch: on a CPU as they are, on a GPU compiled and as CUDA graphs."""

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

_WARM_UPS = 3  # evaluations before a graph is captured: kernels are chosen, memory is taken


class TorchModel:
    """A composed model that `torch.export.save` wrote, loaded.

    With `graph_rows`, which needs a GPU, the network is compiled, and a CUDA graph is captured for
    each of these sizes. A batch runs in the smallest graph that holds it, or without one where none
    does.
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
        program = torch.export.load(path)
        self._inputs = list(program.graph_signature.user_inputs)
        if self.on_gpu:
            torch.cuda.set_device(device)
            # As ONNX Runtime is told: float32 is to be float32.
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            program = move_to_device_pass(program, device)
        else:
            torch.set_num_threads(threads or usable_cores())
        self._module: Any = program.module(check_guards=False)
        # The numbers of rows that tracing took for granted are no limits of the network: diffusers
        # copies the activations of 64 images and more, which changes no value.
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
        # On few cores plain attention is the fastest there is.
        return nullcontext() if self.on_gpu else sdpa_kernel(SDPBackend.MATH)

    def _capture(self, program: torch.export.ExportedProgram, graph_rows: Sequence[int]) -> None:
        """Graphs of all sizes, the largest first: they share its buffers and its memory."""
        most = max(graph_rows)
        nodes = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
        buffers = [
            torch.zeros((most, *node.shape[1:]), dtype=node.dtype, device=self._device)
            for node in map(nodes.__getitem__, self._inputs)
        ]
        pool = torch.cuda.graph_pool_handle()
        for rows in sorted(graph_rows, reverse=True):
            inputs = _any_rows(each[:rows] for each in buffers)
            self._graphs[rows] = _Graph(self._module, inputs, pool)


def _any_rows(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """`tensors` marked, so that what is compiled for one batch size serves all of them.

    `torch.compile(dynamic=True)` would take latent sides and channels for variable as well, and
    compile anew where the rows happen to be as many.
    """
    marked = list(tensors)
    for tensor in marked:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return marked


class _Graph:
    """One batch size as a CUDA graph: it reads `inputs`, and writes the same outputs each time."""

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
        """The outputs for `given`, whose rows may be fewer: the others are zero, without pairs."""
        with torch.inference_mode():
            for held, tensor in zip(self._inputs, given, strict=True):
                held[: len(tensor)].copy_(tensor)
                held[len(tensor) :].zero_()
            self._graph.replay()
        return self._outputs
