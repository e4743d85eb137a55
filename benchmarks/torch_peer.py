"""Trains timm's Xception with PyTorch as its users would on a GPU: the peer that `gpu.py` compares with.

channels_last, autocast to bfloat16, torch.compile, cross-entropy and a fused AdamW, on images that are resident on the
device at the network's size. No augmentation, which is in the peer's favour.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import timing
from workload import NUM_CLASSES

NAMES = ("legacy_xception", "xception")  # of the network: timm renamed it in version 0.9
IMAGES = 2_048  # on the device
LEARNING_RATE = 1e-3


def measure(case: dict[str, Any], device: str = "cuda", compiled: bool = True) -> dict[str, Any]:
    """The peer's row for a case of `gpu.plan`; ``failed`` says why it was not run."""
    if missing := why_not(device):
        return {"failed": f"not run: {missing}"}
    import timm
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case["precision"] != "float32"
    torch.backends.cudnn.benchmark = True  # tries the convolutions' algorithms, as XLA's autotuning does
    network = timm.create_model(next(filter(timm.is_model, NAMES)), pretrained=False, num_classes=NUM_CLASSES)
    train = make_training(network.to(device, memory_format=torch.channels_last), case, device, compiled)
    found = timing.take_turns({"peer": timing.many_steps(train, case["turn_s"])}, case["rounds"])["peer"]
    return {
        "seconds": found.median(),
        "spread": found.spread(),
        "rounds": len(found),
        "images_per_s": case["batch"] / found.median(),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }


def why_not(device: str) -> str:
    """What is missing here; nothing where the peer can run."""
    for package in ("torch", "timm"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    import torch

    return "" if device != "cuda" or torch.cuda.is_available() else "PyTorch finds no GPU"


def make_training(network: Any, case: dict[str, Any], device: str, compiled: bool) -> Any:
    """``train(steps)``: that many steps, done when it returns."""
    import torch

    size, batch = case["size"], case["batch"]
    pixels = np.random.default_rng(0).integers(0, 256, (max(IMAGES, batch), size, size, 3), np.uint8)
    images = torch.from_numpy(pixels).to(device)
    labels = torch.arange(len(images), device=device) % NUM_CLASSES
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.05, fused=device == "cuda")
    half = case["precision"] == "mixed_bfloat16"
    network.train()

    def loss_of(chosen: Any, targets: Any) -> Any:
        # (B, H, W, C) seen as (B, C, H, W) is channels_last already.
        x = chosen.permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logits = network(x)
        return torch.nn.functional.cross_entropy(logits.float(), targets)

    compute = torch.compile(loss_of) if compiled else loss_of

    def train(steps: int) -> None:
        for _ in range(steps):
            rows = torch.randint(len(images), (batch,), device=device)
            optimizer.zero_grad(set_to_none=True)
            compute(images[rows], labels[rows]).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return train
