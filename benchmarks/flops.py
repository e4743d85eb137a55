"""Counts the arithmetic of a network, and knows the peak rate of some GPUs."""

from __future__ import annotations

import math

# Peak TFLOP/s without sparsity, by a part of the device's name in JAX; the first match counts.
# Sources: NVIDIA's data sheets of the H100 (SXM, PCIe and NVL), H200 (SXM and NVL) and A100 Tensor Core GPUs. They give
# TF32 and BF16 of the H100 and H200 with sparsity; the values here are half of those.
PEAKS = {
    "H100 PCIe": {"float32": 51.0, "tf32": 378.0, "mixed_bfloat16": 756.5},
    "H100 NVL": {"float32": 60.0, "tf32": 417.5, "mixed_bfloat16": 835.5},
    "H100": {"float32": 67.0, "tf32": 494.5, "mixed_bfloat16": 989.5},
    "H200 NVL": {"float32": 60.0, "tf32": 417.5, "mixed_bfloat16": 835.5},
    "H200": {"float32": 67.0, "tf32": 494.5, "mixed_bfloat16": 989.5},
    "A100": {"float32": 19.5, "tf32": 156.0, "mixed_bfloat16": 312.0},
}


def peak_tflops(kind: str, precision: str, chosen: float | None = None) -> float | None:
    """A device's peak TFLOP/s: the chosen one, or that of `PEAKS`; None for an unknown device."""
    return chosen or next((peaks[precision] for name, peaks in PEAKS.items() if name in kind), None)


def forward_flops(network) -> int:
    """FLOPs of the forward pass per image: two for each product."""
    return 2 * multiply_adds(network)


def multiply_adds(network) -> int:
    """Products (each with its addition) per image in a Keras model's convolutions and dense layers.

    The sum over kernels of `size(kernel) * positions`, where the positions are the layer's output without batch and
    channels. Xception with its classifier at 299 px has 8.36e9 (timm's model card of legacy_xception: 8.4e9). Other
    layers (batch normalisation, pooling, activations) are not counted.
    """
    total = 0
    for layer in network.layers:
        if hasattr(layer, "layers"):  # the backbone
            total += multiply_adds(layer)
            continue
        for name in ("kernel", "depthwise_kernel", "pointwise_kernel"):
            if (kernel := getattr(layer, name, None)) is not None:
                total += math.prod(kernel.shape) * math.prod(layer.output.shape[1:-1])
    return total
