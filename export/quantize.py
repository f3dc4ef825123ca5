"""Converts float16 step blocks to fp8 with explicit QuantizeLinear and DequantizeLinear nodes.

Weights and inputs of the transformer's matrix products become FLOAT8E4M3FN, with one scale per
tensor. Everything else stays float16. A trajectory of the block itself gives the input scales.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.onnx_graph import ExportTarget
from flowturbo.contract import SCALARS, Role, X
from flowturbo.rows import scalar_rows
from flowturbo.runtimes import OnnxRuntimeModel
from flowturbo.solver.calls import BlockCall, PredictorCall, RefinerCall
from flowturbo.solver.guidance import Guidance

LARGEST = 448.0  # largest value of FLOAT8E4M3FN
_STEPS, _ROWS, _GUIDANCE = 10, 16, 1.5


def quantize(exported: ExportTarget, path: Path) -> None:
    """Replaces the float16 block at `path` by its fp8 form; large weights get a file beside it."""
    model = onnx.load(path)
    large = path.with_suffix(".onnx.data").exists()
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    # Neither the patches' product (FoldedSiT) nor the last layer's: errors of these would be errors
    # of what the network reads, and of the velocity.
    last = products[-1].input[1]
    products = [n for n in products if n.input[1] != last and not n.input[1].endswith(".patches")]
    largest = _largest_inputs(exported, path, sorted({node.input[0] for node in products}))
    for node in products:
        largest[node.input[1]] = float(np.abs(numpy_helper.to_array(weights[node.input[1]])).max())
    _insert(model, products, largest)
    for old in (path, path.with_suffix(".onnx.data")):
        old.unlink(missing_ok=True)
    onnx.save(
        model,
        path,
        save_as_external_data=large,
        location=path.with_suffix(".onnx.data").name if large else None,
    )


def _largest_inputs(exported: ExportTarget, path: Path, names: list[str]) -> dict[str, float]:
    """The largest magnitude of each tensor in `names` over steps from noise to data."""
    watched = onnx.load(path, load_external_data=False)
    watched.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in names
    )
    found = dict.fromkeys(names, 0.0)
    # In the same folder as the original, because it refers to the original's weight file.
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".onnx") as file:
        onnx.save(watched, file.name)
        block = OnnxRuntimeModel(Path(file.name))
    inputs = {k: v.numpy() for k, v in exported.random_inputs(_ROWS, seed=0).items()}
    inputs[X][1::2] = inputs[X][::2]
    for step in range(_STEPS):
        start, end = step / _STEPS, (step + 1) / _STEPS
        call: BlockCall = PredictorCall(step, start, start, end, w_next=end - start)
        if exported.role is Role.REFINER:
            call = RefinerCall(step, start, end, reads_refined=False)
        inputs[SCALARS] = scalar_rows(call, _ROWS, Guidance(_GUIDANCE))
        x_next, _, *values = block(inputs)
        inputs[X] = x_next
        for name, value in zip(names, values, strict=True):
            found[name] = max(found[name], float(np.abs(value.astype(np.float32)).max()))
    return found


def _insert(model: ModelProto, products: list[NodeProto], largest: dict[str, float]) -> None:
    """Puts a quantize-dequantize pair before the inputs of `products`, one pair per tensor."""
    made: set[str] = set()
    nodes: list[NodeProto] = []
    wanted = {node.name for node in products}
    for node in model.graph.node:
        if node.name in wanted:
            for k, name in enumerate(list(node.input)):
                if name not in made:
                    nodes += _pair(model, name, largest[name])
                    made.add(name)
                node.input[k] = f"{name}_dequantized"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _pair(model: ModelProto, name: str, largest: float) -> list[NodeProto]:
    scale = numpy_helper.from_array(np.array(largest / LARGEST, np.float16), f"{name}_scale")
    zero = helper.make_tensor(f"{name}_zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    model.graph.initializer.extend([scale, zero])
    quantized, dequantized = f"{name}_quantized", f"{name}_dequantized"
    return [
        helper.make_node(kind, [read, scale.name, zero.name], [written], name=written)
        for kind, read, written in (
            ("QuantizeLinear", name, quantized),
            ("DequantizeLinear", quantized, dequantized),
        )
    ]
