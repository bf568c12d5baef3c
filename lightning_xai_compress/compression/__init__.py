"""A trained model and batches in, a smaller model out: compression in one call, without a Trainer."""

from lightning_xai_compress.compression.after_training import Compressed, compress

__all__ = ["Compressed", "compress"]
