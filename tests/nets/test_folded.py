"""The folded form of a SiT computes the same function with fewer operations."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from export.onnx_graph import ExportTarget, export_onnx
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import Role
from flowturbo.nets.blocks import PredictorBlock
from flowturbo.nets.folded import FoldedSiT
from flowturbo.nets.sit import ByLabel, SiT, SiTConfig, refiner_config

pytestmark = pytest.mark.unit

CONFIG = SiTConfig(
    latent_size=8, patch_size=2, in_channels=4, latent_channels=4, out_channels=8, width=48,
    depth=3, num_heads=4, num_classes=5,
)  # fmt: skip


def random_sit(config: SiTConfig) -> SiT:
    """All weights are random: at their start many are zero."""
    torch.manual_seed(0)
    network = SiT(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name != "pos_embed":
                parameter.normal_(0, 0.15)
    return network


@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, reverse_time=True), refiner_config(CONFIG)],
    ids=["predictor", "reversed", "refiner"],
)
def test_the_function_is_the_same(config: SiTConfig) -> None:
    network = random_sit(config)
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    folded = FoldedSiT(network)
    x, t = torch.randn(6, config.in_channels, 8, 8), torch.rand(6)
    label = torch.tensor([0, 1, 2, 3, 4, 5])
    with torch.inference_mode():
        wanted, found = network(x, t, label), folded(x, t, label)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert all(torch.equal(value, kept[name]) for name, value in network.state_dict().items())


def test_the_graph_has_fewer_operations(tmp_path: Path) -> None:
    """No convolution, one product for the conditioning of all layers, no scale in attention."""
    network, counts = random_sit(CONFIG), []
    for form in (network, FoldedSiT(network)):
        block = PredictorBlock(ByLabel(form), 3)
        target = ExportTarget(Role.PREDICTOR, block, CONFIG.latent_shape, ClassLabel(5))
        export_onnx(target, tmp_path / "model.onnx")
        graph = onnx.load(tmp_path / "model.onnx").graph
        counts.append(Counter(node.op_type for node in graph.node))
    before, after = counts
    assert before["Conv"] == 1 and not after["Conv"]
    products = [count["Gemm"] + count["MatMul"] for count in counts]
    # Without a convolution there is one more; instead of one per layer there is one for all.
    assert products[1] == products[0] + 1 - CONFIG.depth
    assert after["Mul"] <= before["Mul"] - CONFIG.depth
    assert sum(after.values()) < 0.9 * sum(before.values())
