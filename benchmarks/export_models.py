"""The networks of the export benchmark, compressed, and what their files are compared with."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import cast

import lightning as L
import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torchvision.models import resnet18

from lightning_xai_compress import CompressionPlan, XAICompression
from lightning_xai_compress.formats.codes import integer_codes
from lightning_xai_compress.layers import find_layers
from lightning_xai_compress.plan import BitAllocation, Mask
from lightning_xai_compress.quantization import fit_scales, quantize

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from data import FashionMNISTData, ImageDataset
from models import FashionNet

__all__ = ["MODELS", "SEED", "bit_packed", "compress", "fp32", "train_fashion"]

SEED = 0
WIDTHS = (2, 4, 8)
TOKENS, VOCABULARY = 64, 8192


class Transformer(nn.Module):
    """Token ids [n, 64] to ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 256)
        # nn.TransformerEncoder would make four equal copies of one layer
        layers = [nn.TransformerEncoderLayer(256, 8, 1024, dropout=0.0, batch_first=True) for _ in range(4)]
        self.encoder = nn.Sequential(*layers)
        self.head = nn.Linear(256, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embed(tokens)).mean(1))
        return logits


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 128, 128, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, TOKENS), generator=torch.Generator().manual_seed(seed))


def make_resnet18() -> nn.Module:
    model = resnet18(num_classes=10)
    model.train()
    with torch.no_grad():
        for seed in range(4):
            model(images(16, 100 + seed))
    model.eval()
    return cast(nn.Module, model)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Tensor]]] = {
    "resnet18": (make_resnet18, images),
    "transformer": (lambda: Transformer().eval(), tokens),
}


@torch.no_grad()
def compress(model: nn.Module) -> CompressionPlan:
    """Half of each weight zero, channels on 2, 4 or 8 bits at random; the model then holds the values."""
    generator = torch.Generator().manual_seed(SEED)
    parameters = dict(model.named_parameters())
    keep, bits, scales = {}, {}, {}
    for name in find_layers(model).names:
        weight = parameters[name]
        keep[name] = weight.abs() > weight.abs().flatten().median()
        weight.mul_(keep[name])
        bits[name] = torch.tensor(WIDTHS, dtype=torch.uint8)[
            torch.randint(0, len(WIDTHS), (len(weight),), generator=generator)
        ]
        fitted = {width: fit_scales(weight, width)[0] for width in WIDTHS}
        scales[name] = torch.zeros(len(weight))
        for width in WIDTHS:
            scales[name][bits[name] == width] = fitted[width][bits[name] == width]
        weight.copy_(quantize(weight, bits[name], scales[name]))
    sizes = {name: parameters[name][0].numel() for name in bits}
    return CompressionPlan(Mask(keep), BitAllocation(bits, sizes), scales)


class FirstImages(FashionMNISTData):
    """The first training images alone."""

    def __init__(self, count: int) -> None:
        super().__init__(batch_size=128, seed=SEED)
        self.count = count

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train = ImageDataset(*(tensor[: self.count] for tensor in self.train.tensors))


def train_fashion(
    epochs: int, samples: int, folder: Path
) -> tuple[L.LightningModule, CompressionPlan, FashionMNISTData]:
    """A short fit with compression; the test images are read afterwards, once."""
    L.seed_everything(SEED, verbose=False)
    data = FirstImages(samples)
    callback = XAICompression(
        sparsity=0.5, average_bits=4.0, bits=WIDTHS, metric="val_acc", export_dir=str(folder), formats=("safetensors",)
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=str(folder),
    )
    model = FashionNet()
    trainer.fit(model, datamodule=data)
    session = callback.session
    assert session is not None
    return model.eval(), session.latent.plan(tuple(session.skipped)), data


def fp32(model: nn.Module, example: Tensor, path: Path) -> None:
    """The same model as a plain float ONNX file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        exported = torch.onnx.export(
            model, (example,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        torch.backends.mha.set_fastpath_enabled(fastpath)
    assert exported is not None
    exported.save(str(path))


def bit_packed(model: nn.Module, plan: CompressionPlan) -> bytes:
    """The plain alternative: every code in exactly its bits, bfloat16 scales, widths, and the rest, as safetensors."""
    assert plan.allocation is not None
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name not in plan.scales:
            tensors[name] = tensor.clone()
            continue
        bits = plan.allocation[name]
        codes = integer_codes(name, tensor, plan.scales[name], bits).flatten(1).numpy()
        for width in sorted(set(bits.tolist())):
            rows = codes[(bits == width).numpy()].reshape(-1, 1).view(np.uint8)
            packed = np.packbits(np.unpackbits(rows, axis=1, bitorder="little")[:, :width].reshape(-1))
            tensors[f"{name}.{width}"] = torch.from_numpy(packed)
        tensors[f"{name}.scale"] = plan.scales[name].to(torch.bfloat16)
        tensors[f"{name}.bits"] = bits.clone()
    return save_safetensors(tensors)
