"""Models of transformers: predicted is measured, plans are right, printed code runs.

Small ones, with random weights; their batches have masks with padding, and labels.
"""

import copy

import pytest
import torch

from helpers import Plan, inspect_model, plan_for, predict, verify
from helpers.measure import measure

tf = pytest.importorskip("transformers")

WORDS = 120
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64}
SMALL |= {"num_hidden_layers": 3, "num_attention_heads": 4}
PARTS = ("encoder_layers", "decoder_layers")
BOTH = {"vocab_size": WORDS, "d_model": 32, **dict.fromkeys(PARTS, 2), **MARKS}
BOTH |= {f"{part[:7]}_attention_heads": 4 for part in PARTS}
BOTH |= {f"{part[:7]}_ffn_dim": 64 for part in PARTS}
BOTH |= {"decoder_start_token_id": 1}
VISION = SMALL | {"image_size": 32, "patch_size": 8}
VISION.pop("vocab_size")
CAUSAL = SMALL | {"num_key_value_heads": 2, "use_cache": False}
GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 3, "n_head": 4, **MARKS}
T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
WHISPER = {"max_source_positions": 50, "max_target_positions": 32, "num_mel_bins": 16}
DISTIL = {"vocab_size": WORDS, "dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4}
CLIP = {"text_config": SMALL | {"max_position_embeddings": 32, **MARKS}}
CLIP |= {"vision_config": VISION, "projection_dim": 16}


def words(rows: int = 2, length: int = 24) -> dict[str, torch.Tensor]:
    ids, mask = torch.randint(3, WORDS, (rows, length)), torch.ones(rows, length).long()
    mask[1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def with_labels(rows: int = 2, length: int = 24) -> dict[str, torch.Tensor]:
    batch, labels = words(), torch.randint(3, WORDS, (rows, length))
    if length == 24:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return batch | {"labels": labels}


def pictures() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def sounds() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 100, dtype=torch.long)
    features = {"input_features": torch.randn(2, 16, 100), "attention_mask": mask}
    return features | {"labels": torch.randint(3, WORDS, (2, 12))}


CLASSES = {"labels": torch.tensor([0, 1])}
MODELS = {
    "BertForMaskedLM": (SMALL, with_labels),
    "RobertaForMaskedLM": (SMALL | {"max_position_embeddings": 64}, with_labels),
    "GPT2LMHeadModel": (GPT2 | {"use_cache": False}, with_labels),
    "LlamaForCausalLM": (CAUSAL, with_labels),
    "MixtralForCausalLM": (CAUSAL | {"num_local_experts": 4}, with_labels),
    "MistralForCausalLM": (CAUSAL | {"sliding_window": 4}, with_labels),
    "T5ForConditionalGeneration": (
        T5 | {"num_layers": 2, "decoder_start_token_id": 0, "use_cache": False},
        lambda: with_labels(2, 10),
    ),
    "BartForConditionalGeneration": (
        BOTH | {"max_position_embeddings": 64},
        lambda: with_labels(2, 10),
    ),
    "WhisperForConditionalGeneration": (
        BOTH | WHISPER | {"use_cache": False},
        sounds,
    ),
    "ViTForImageClassification": (VISION, lambda: pictures() | CLASSES),
    "DistilBertForSequenceClassification": (DISTIL, lambda: words() | CLASSES),
    "CLIPModel": (CLIP, lambda: words(2, 16) | pictures() | {"return_loss": True}),
}


def made(name: str, attention: str = "sdpa") -> tuple[torch.nn.Module, dict]:
    torch.manual_seed(0)
    options, make_batch = MODELS[name]
    cls = getattr(tf, name)
    config = cls.config_class(**options, attn_implementation=attention)
    return cls(config).train(), make_batch()


def layers_of(model: torch.nn.Module, batch: dict) -> Plan:
    found = inspect_model(model, batch, device="cpu")
    assert not any(hazard.is_wrong for hazard in found.hazards), found.warnings()
    return Plan.alone(max(found.chains, key=len) if found.chains else found.units)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_predicted_is_measured_and_gradients_are_as_without(name, attention):
    model, batch = made(name, attention)
    for plan in (Plan(), layers_of(model, batch)):
        dry = predict(model, batch, plan, device="cpu")
        report = measure(model, batch, plan, repeats=0)
        assert dry.peak_bytes == report.peak_bytes, plan
        assert dry.recompute_flops == report.recompute_flops, plan
        assert verify(model, batch, plan).same, plan
        assert predict(model, batch, plan, optimizer=torch.optim.AdamW).peak_bytes


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_is_kept_and_the_printed_code_runs(name):
    model, batch = made(name)
    plans = Plan(), layers_of(model, batch)
    peaks = [predict(model, batch, p, device="cpu").peak_bytes for p in plans]
    budget = sum(peaks) // 2
    plan = plan_for(model, batch, budget, device="cpu").plan
    assert measure(model, batch, plan, repeats=0).peak_bytes <= budget
    other = copy.deepcopy(model)
    exec(plan.code(other), {"model": other})
    for one in (model, other):
        torch.manual_seed(1)  # of dropout
        one(**batch).loss.backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.grad is b.grad or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [n for n in MODELS if "use_cache" in MODELS[n][0]])
def test_a_step_with_a_cache_is_predicted_too(name, attention):
    model, batch = made(name, attention)
    model.config.use_cache = True
    dry = predict(model, batch, device="cpu")
    assert dry.peak_bytes == measure(model, batch, repeats=0, warmup=1).peak_bytes
    assert predict(model, batch, device="cuda").peak_bytes


def test_a_cache_that_grows_is_found():
    model, batch = made("LlamaForCausalLM")
    model.config.use_cache, plan = True, Plan.alone(["model.layers.1"])
    assert inspect_model(model, batch).hazards_of(plan)
    with pytest.raises(
        ValueError, match="cannot be run again in backward: .*hazards says what"
    ):
        predict(model, batch, plan)
    peak = predict(model, batch, device="cpu").peak_bytes
    assert plan_for(model, batch, peak, device="cpu").plan == Plan()
