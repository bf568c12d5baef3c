"""What can go wrong that is not a bad argument: one family, so that one `except` catches it."""

__all__ = ["ArtifactError", "BudgetError", "CompressionError", "LatentCopyError", "NonFiniteError", "RelevanceError"]


class CompressionError(RuntimeError):
    """Base of all errors that this package raises for reasons other than a bad argument."""


class RelevanceError(CompressionError):
    """A scoring pass cannot be done."""


class NonFiniteError(RelevanceError):
    """A scoring pass met NaN or infinity."""


class LatentCopyError(CompressionError):
    """An optimizer stepped in a way that the latent copy of the weights cannot follow."""


class ArtifactError(CompressionError):
    """A file cannot be written, or was refused on reading: damaged, of another version, or of another model."""


class BudgetError(CompressionError):
    """A size or an accuracy that the user named cannot be met."""
