"""LoRA on a quantized model: adapters learn, are saved and loaded, and are not merged into codes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("peft", reason="peft is not installed (pip install anybit[peft])")

import peft

from anybit.errors import InputError
from anybit.integrations.peft import LoraQuantLinear, with_anybit
from tiny_checkpoints import quantize_tiny
from tiny_models import token_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*requires_grad=True to a scalar")
IDS = token_ids(20)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return quantize_tiny("llama", tmp_path_factory.mktemp("peft"))


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def config(**options):
    return with_anybit(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model, steps=3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_training_lowers_the_loss_and_leaves_the_codes(checkpoint):
    base = load(checkpoint)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, config())
    assert torch.equal(logits(model), logits(load(checkpoint)))  # an adapter begins at nothing
    losses = train(model)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    after = {
        name.replace("base_layer.", ""): tensor for name, tensor in base.state_dict().items() if "lora" not in name
    }
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trained = [module for module in model.modules() if isinstance(module, LoraQuantLinear)]
    assert len(trained) == 4
    assert all(float(module.lora_B["default"].weight.abs().max()) > 0 for module in trained)


def test_gradients_are_those_of_the_dequantized_model(checkpoint):
    grads = []
    for base in (load(checkpoint), load(checkpoint).dequantize()):
        torch.manual_seed(0)
        model = peft.get_peft_model(base, config())
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-6)


def test_an_adapter_is_saved_loaded_and_switched_off(checkpoint, tmp_path):
    model = peft.get_peft_model(load(checkpoint), config())
    train(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        load(checkpoint),
        tmp_path / "adapter",
        config=with_anybit(peft.PeftConfig.from_pretrained(tmp_path / "adapter")),
    )
    assert torch.equal(logits(again), logits(model))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(load(checkpoint)))
    dense = peft.PeftModel.from_pretrained(load(checkpoint).dequantize(), tmp_path / "adapter")
    merged = dense.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-3, atol=1e-3)


def test_merging_into_codes_is_refused(checkpoint):
    model = peft.get_peft_model(load(checkpoint), config())
    with pytest.raises(InputError, match="cannot be merged into codes"):
        model.merge_and_unload()


def test_what_cannot_train_is_refused(checkpoint, tmp_path):
    with pytest.raises(InputError, match="plain LoRA"):
        peft.get_peft_model(load(checkpoint), config(use_dora=True))
    with pytest.raises(InputError, match="weight-only"):
        peft.get_peft_model(load(quantize_tiny("llama", tmp_path, recipe="bipolar-w4a4")), config())
