"""stub for the dense part"""
from __future__ import annotations
import argparse, json, sys, time
from pathlib import Path
import lightning as L
import torch
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from data import FashionMNISTData
from models import FashionNet, FashionResNet, LeNet300
from runner import silence

MODELS = {"lenet": LeNet300, "cnn": FashionNet, "resnet": FashionResNet}

def fit(model, seed, epochs, callbacks=(), first=0):
    L.seed_everything(seed, verbose=False)
    data = FashionMNISTData(batch_size=128, seed=seed + 1000 * first)
    trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", precision="bf16-mixed", logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False)
    began = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - began
    val = 100 * trainer.callback_metrics["val_acc"].item()
    test = 100 * trainer.test(model, datamodule=data, verbose=False)[0]["test_acc"]
    return val, test, seconds

if __name__ == "__main__":
    silence()
    torch.set_num_threads(1)
    folder = Path("artifacts/benchmark"); folder.mkdir(parents=True, exist_ok=True)
    for spec in sys.argv[1:]:
        name, seed, phase = spec.split(":")
        path = folder / f"{name}-{seed}.pt"
        L.seed_everything(int(seed), verbose=False)
        model = MODELS[name]()
        if phase == "dense":
            val, test, seconds = fit(model, int(seed), 10)
            torch.save({"state": model.state_dict(), "val": val, "test": test, "seconds": seconds}, path)
        else:
            model.load_state_dict(torch.load(path)["state"])
            val, test, seconds = fit(model, int(seed), 6, first=1)
            torch.save({"state": model.state_dict(), "val": val, "test": test, "seconds": seconds}, folder / f"{name}-{seed}-control.pt")
        print(spec, round(val, 2), round(test, 2), round(seconds), flush=True)
