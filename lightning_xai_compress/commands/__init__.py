"""The command line: export a checkpoint again, tell what a file holds, prove that it is a checkpoint's model."""

from lightning_xai_compress.commands.parser import main

__all__ = ["main"]
