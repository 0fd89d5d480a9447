"""Models of transformers, with random weights: predicted is what is measured."""

import pytest
import torch

from helpers.measure import measure, predict

T = pytest.importorskip("transformers", exc_type=ImportError)

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
HEADS = {"num_key_value_heads": 2}
ENCODES = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
DECODES = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def text(labels: bool = True) -> dict:
    """Make a batch of three sentences, two of them padded."""
    mask = (torch.arange(12) < torch.tensor([12, 9, 5])[:, None]).long()
    ids = torch.randint(3, 99, (3, 12))
    labels = ids.masked_fill(mask == 0, -100) if labels else torch.tensor([0, 1, 1])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def classes() -> dict:
    return text(labels=False)


def images() -> dict:
    return {
        "pixel_values": torch.randn(3, 3, 32, 32),
        "labels": torch.tensor([0, 1, 1]),
    }


def sounds() -> dict:
    mask, labels = torch.ones(3, 40, dtype=torch.long), torch.randint(3, 99, (3, 7))
    features = {"input_features": torch.randn(3, 16, 40), "attention_mask": mask}
    return features | {"labels": labels}


MODELS = [
    ("BertForMaskedLM", "BertConfig", SMALL, text),
    (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        classes,
    ),
    ("RobertaForMaskedLM", "RobertaConfig", SMALL, text),
    (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64},
        text,
    ),
    ("LlamaForCausalLM", "LlamaConfig", SMALL | HEADS, text),
    (
        "MistralForCausalLM",
        "MistralConfig",
        SMALL | HEADS | {"sliding_window": 4},
        text,
    ),
    (
        "MixtralForCausalLM",
        "MixtralConfig",
        SMALL | HEADS | {"num_local_experts": 4},
        text,
    ),
    (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        | {"vocab_size": 99, "decoder_start_token_id": 0},
        text,
    ),
    (
        "ViTForImageClassification",
        "ViTConfig",
        SMALL | {"image_size": 32, "patch_size": 8},
        images,
    ),
    (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "d_model": 32,
            "vocab_size": 99,
            "num_mel_bins": 16,
            "max_source_positions": 20,
        }
        | {"max_target_positions": 32, "decoder_start_token_id": 1}
        | ENCODES
        | DECODES
        | IDS,
        sounds,
    ),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name, config, sizes, batch", MODELS, ids=lambda x: str(x)[:9])
def test_predicted_is_measured(name, config, sizes, batch, attention):
    torch.manual_seed(0)
    config = getattr(T, config)(**sizes, attn_implementation=attention)
    model, batch = getattr(T, name)(config).train(), batch()
    measured = measure(model, batch, device="cpu", repeats=0, warmup=1)
    assert predict(model, batch, device="cpu").peak_bytes == measured.peak_bytes
    assert predict(model, batch, device="cuda").peak_bytes
