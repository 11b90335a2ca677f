"""An encoder as an ONNX graph, checked against ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from harmonize.backbones.timm_vit import ViTEncoder
from harmonize.checkpoints.fingerprint import difference, probe_images
from harmonize.types import ConfigError

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_MAX_BYTES = 2**31 - 2**24
"""A protocol buffer ends at 2 GiB; what is not weights gets a margin."""


class _Outputs(nn.Module):
    """Images -> tokens and the pooled feature."""

    def __init__(self, encoder: ViTEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.encoder(images)
        return tokens, pooled(self.encoder, tokens)


def pooled(encoder: ViTEncoder, tokens: Tensor) -> Tensor:
    """The feature (B, D) in tokens (B, P + N, D): the class token, or the mean of the patch tokens without one."""
    return tokens[:, 0] if encoder.spec.has_class_token else tokens[:, encoder.spec.num_prefix_tokens :].mean(1)


def require_packages() -> None:
    """Say what to install.

    Raises:
        ConfigError: One of :data:`PACKAGES` is missing.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise ConfigError(f"format=onnx needs {' and '.join(missing)}: pip install 'harmonize[export]'.")


def save_onnx(encoder: ViTEncoder, path: Path, metadata: Mapping[str, str]) -> float:
    """Write a graph with the input ``images`` (B, 3, h, w) and the outputs ``tokens`` and ``pooled``, for any B.

    Args:
        encoder: On the CPU, in fp32 and eval mode.
        path: The file.
        metadata: Stored in the file.

    Returns:
        Largest difference of an output from the encoder's, over batches of one and of three images.

    Raises:
        ConfigError: A package is missing, or the weights exceed 2 GiB.
    """
    require_packages()
    import onnx
    import onnxruntime

    if sum(p.numel() * p.element_size() for p in encoder.parameters()) > _MAX_BYTES:
        raise ConfigError("format=onnx holds at most 2 GiB of weights in one file; format=safetensors holds more.")
    model = _Outputs(encoder).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        torch.onnx.export(
            model,
            (probe_images(encoder.spec, 2),),
            path,
            input_names=["images"],
            output_names=["tokens", "pooled"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,  # the exporter by tracing is deprecated
            external_data=False,
            verbose=False,
        )
    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, dict(metadata))
    onnx.checker.check_model(graph)
    onnx.save(graph, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for num_images in (1, 3):
        images = probe_images(encoder.spec, num_images)
        found += map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
        expected += model(images)
    return difference(found, expected)
