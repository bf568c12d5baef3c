"""Lightning CLI: the callback in YAML, or on the command line.

    python examples/cli.py fit -c examples/digits.yaml
    python examples/cli.py fit -c examples/digits.yaml --trainer.max_epochs=10 --print_config
    python examples/cli.py fit --model=DigitsNet --data=DigitsData \
        --trainer.max_epochs=10 --trainer.callbacks+=XAICompression --trainer.callbacks.sparsity=0.8
"""

import lightning as L
from lightning.pytorch.cli import LightningCLI

from lightning_xai_compress import XAICompression

from data import DigitsData, FashionMNISTData
from models import DigitsNet, FashionNet

__all__ = ["DigitsData", "DigitsNet", "FashionMNISTData", "FashionNet", "XAICompression"]  # known to the CLI by name


def main() -> None:
    LightningCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
    )


if __name__ == "__main__":
    main()
