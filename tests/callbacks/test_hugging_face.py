"""Networks of Hugging Face transformers, made at random: dict batches in, ModelOutput out."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_xai_compress import Scoring, load_compressed

from toy import compression, fit

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def hugging_face():
    """The library, which takes seconds to import."""
    return pytest.importorskip("transformers")


class Sentences(Dataset):
    """Eight tokens, the second of which is the label; the last sentences are shorter and padded."""

    def __init__(self, causal):
        generator = torch.Generator().manual_seed(7)
        self.tokens = torch.randint(2, 32, (64, 8), generator=generator)
        self.labels = torch.arange(64) % 2
        self.tokens[:, 1] = self.labels
        self.mask = torch.ones(64, 8, dtype=torch.long)
        self.mask[48:, 6:] = 0
        if causal:
            self.labels = self.tokens.masked_fill(self.mask == 0, -100)

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "attention_mask": self.mask[index], "labels": self.labels[index]}


class Text(L.LightningDataModule):
    def __init__(self, causal=False, encoding=dict):
        super().__init__()
        self.data, self.encoding = Sentences(causal), encoding

    def collate(self, rows):
        return self.encoding({key: torch.stack([row[key] for row in rows]) for key in rows[0]})

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=16, shuffle=True, collate_fn=self.collate)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=32, collate_fn=self.collate)


class Classifier(L.LightningModule):
    """As users wrap such a model: inputs by name, the loss from the model's output."""

    def __init__(self):
        super().__init__()
        self.model = self.make()
        self.losses = []

    def make(self):
        transformers = hugging_face()
        config = transformers.BertConfig(**SIZES, max_position_embeddings=16, num_labels=2)
        return transformers.BertForSequenceClassification(config)

    def forward(self, **inputs):
        return self.model(**inputs)

    def training_step(self, batch, batch_idx):
        loss = self(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 2e-3)


class Causal(Classifier):
    """The next token is explained: labels are shifted within the model, which only it knows."""

    def relevance_step(self, batch, batch_idx):
        logits = self(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        target = batch["labels"][:, 1:]
        onehot = F.one_hot(target.clamp(min=0), logits.shape[-1])
        return logits * ((onehot - logits.softmax(-1)) * (target >= 0).unsqueeze(-1)).detach()


class GPT2(Causal):
    def make(self):
        transformers = hugging_face()
        config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2)
        return transformers.GPT2LMHeadModel(config)


class Llama(Causal):
    def make(self):
        transformers = hugging_face()
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, max_position_embeddings=16))


def compress(tmp_path, model, data, **settings):
    callback = compression(tmp_path, sparsity=0.3, average_bits=4.0, scoring=Scoring(samples=64), **settings)
    trained, _ = fit(tmp_path, [callback], model, data, max_epochs=4)

    report = callback.report
    assert report.halted == ""
    assert report.sparsity == pytest.approx(0.3, abs=1e-3)
    assert 3.8 < report.average_bits <= 4.0
    assert report.artifacts[0].max_abs_diff == 0
    reloaded = load_compressed(tmp_path / "model.safetensors", type(trained)())
    for name, tensor in trained.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        assert torch.equal(trained.eval()(**batch).logits, reloaded.eval()(**batch).logits)
    return trained, callback


@pytest.mark.parametrize("encoding", ["dict", "BatchEncoding"])
def test_a_bert_classifier_is_compressed_in_all_its_layers(tmp_path, encoding):
    data = Text(encoding=dict if encoding == "dict" else hugging_face().BatchEncoding)
    model, callback = compress(tmp_path, Classifier, data, metric=MulticlassAccuracy(2, average="micro"))

    weights = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    }
    assert len(weights) == 17  # 3 embeddings, 6 layers in each of 2 blocks, pooler and classifier
    assert set(callback.session.latent.bits) == weights
    assert callback.report.skipped == ()
    with torch.no_grad():
        rows = [data.data[index] for index in range(64)]
        batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "attention_mask")}
        right = (model(**batch).logits.argmax(-1) == data.data.labels).float().mean()
    assert callback.report.compressed.accuracy == pytest.approx(float(right))


def test_a_llama_is_compressed_in_all_its_layers(tmp_path):
    model, callback = compress(tmp_path, Llama, Text(causal=True))

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert {f"{name}.weight" for name in linear} <= set(callback.session.latent.bits)
    assert callback.report.skipped == ()
    assert model.losses[-1] < model.losses[0]


def test_the_conv1d_layers_of_gpt2_are_named_as_left_alone(tmp_path):
    torch.manual_seed(0)
    untouched = {name for name, module in GPT2().named_modules() if type(module).__name__ == "Conv1D"}
    model, callback = compress(tmp_path, GPT2, Text(causal=True))

    assert len(untouched) == 8
    assert {entry.name for entry in callback.report.skipped} == untouched
    assert {entry.reason for entry in callback.report.skipped} == {
        "Conv1D holds weights of its own: neither scored nor quantized"
    }
    # the head is the embedding of the tokens: compressed once, and still the same tensor
    assert set(callback.session.latent.bits) == {"model.transformer.wte.weight", "model.transformer.wpe.weight"}
    assert model.model.lm_head.weight is model.model.transformer.wte.weight
