"""Settings of the stage that quantizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_xai_compress.checks import check_number
from lightning_xai_compress.quantization import BitsPer, Quantizer, Strategy, check_widths

__all__ = ["Quantization", "Sensitivity"]

Sensitivity = Literal["relevance", "absolute", "fisher", "error"]


@dataclass(frozen=True)
class Quantization:
    """Who gets how many bits, and how quantized training is done; docs/quantization.md says more.

    Args:
        activations: "int8": layers also read activations of 8 bits from the start of quantized training, as an ONNX
            file with `Files(activations="int8")` will compute; their ranges are measured at that moment and at the
            start of every epoch. None: floats. The packed file and `pt2` compute with floats either way.
        strategy: "knapsack": the least error, weighted by sensitivity, that the budget allows. "ranked": tiers, as
            the paper words it: whoever has more relevance a weight gets no fewer bits.
        bits_per: What has a width of its own: "layer", "channel" (output channel), or "group" of input channels in
            one, which has a scale of its own, too.
        group_size: Input channels of a group, >= 1; for "group" alone. Weights whose input channels it does not
            divide keep one group a channel.
        sensitivity: What a unit of squared error costs: "relevance" (mean square of R / w, by the criterion of the
            fit), "absolute" (mean of abs(R), whatever the weight is; needs Scoring(statistics=("rms", "absolute"))),
            "fisher" (mean square of the gradient of a sample, for which one more pass is made) or "error" (the same for
            all weights; no pass is made).
        quantizer: "uniform": codes times the scale of a row. "codebook": weights of a layer share 2^bits - 1 values,
            zero among them (15 for 4 bits), found by k-means weighted by `sensitivity`; in training each moves with the
            mean of its weights. For bits_per="layer" alone.
        codebook_channels: Output channels that share a codebook, >= 1; None: all of a layer, as in layers whose
            channels it does not divide. For quantizer="codebook".
        widths: Layers that have no choice: shell-style patterns of layer or parameter names, each with a width in
            2..8, which need not be among `bits`; the first match wins. They count in the budget.

    Raises:
        ValueError: A setting out of range, or settings that contradict each other.
    """

    activations: Literal["int8"] | None = None
    strategy: Strategy = "knapsack"
    bits_per: BitsPer = "channel"
    group_size: int | None = None
    sensitivity: Sensitivity = "relevance"
    quantizer: Quantizer = "uniform"
    codebook_channels: int | None = None
    widths: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.activations not in (None, "int8"):
            raise ValueError(f"activations must be None or 'int8', got {self.activations!r}")
        if self.strategy not in ("knapsack", "ranked"):
            raise ValueError(f"strategy must be 'knapsack' or 'ranked', got {self.strategy!r}")
        if self.bits_per not in ("layer", "channel", "group"):
            raise ValueError(f"bits_per must be 'layer', 'channel' or 'group', got {self.bits_per!r}")
        if self.sensitivity not in ("relevance", "absolute", "fisher", "error"):
            raise ValueError(
                f"sensitivity must be 'relevance', 'absolute', 'fisher' or 'error', got {self.sensitivity!r}"
            )
        if self.quantizer not in ("uniform", "codebook"):
            raise ValueError(f"quantizer must be 'uniform' or 'codebook', got {self.quantizer!r}")
        if self.quantizer == "codebook" and (self.bits_per != "layer" or self.activations):
            raise ValueError(
                "quantizer='codebook' has one codebook a layer, which integer kernels cannot read: use it with "
                f"bits_per='layer' and without activations, got bits_per={self.bits_per!r} and "
                f"activations={self.activations!r}"
            )
        if self.codebook_channels is not None:
            if self.quantizer != "codebook":
                raise ValueError(
                    f"codebook_channels={self.codebook_channels!r} needs quantizer='codebook', got {self.quantizer!r}"
                )
            if check_number("codebook_channels", self.codebook_channels, whole=True) < 1:
                raise ValueError(f"codebook_channels must be >= 1, got {self.codebook_channels}")
        if self.strategy == "ranked" and self.sensitivity == "error":
            raise ValueError("strategy='ranked' ranks by relevance, which sensitivity='error' does without: drop one")
        if self.strategy == "ranked" and self.sensitivity == "absolute":
            raise ValueError("strategy='ranked' goes by relevance itself: use sensitivity='relevance' or 'fisher'")
        if (self.bits_per == "group") != (self.group_size is not None):
            raise ValueError(
                f"bits_per='group' needs a group_size, and nothing else has one: got bits_per={self.bits_per!r} and "
                f"group_size={self.group_size!r}"
            )
        if self.group_size is not None and check_number("group_size", self.group_size, whole=True) < 1:
            raise ValueError(f"group_size must be >= 1, got {self.group_size}")
        if self.bits_per == "group" and self.activations:
            raise ValueError(
                "activations='int8' trains for integer kernels, which take one scale an output channel, but "
                "bits_per='group' gives it several: use bits_per='channel', or leave activations out"
            )
        check_widths(self.widths)
