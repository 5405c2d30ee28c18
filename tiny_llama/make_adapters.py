"""Train two LoRA adapters for the tiny model, each of which answers some questions in a way of its own.

Usage: python -m tiny_llama.make_adapters FOLDER
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_llama.make_model import MODEL_DIR, fit

ANSWERS = {  # What each adapter says instead of the model's own answers, in words that the model knows well
    "brief": {"Hello": "Hello!", "Who are you?": "I am tiny."},
    "poetic": {"Hello": "Once upon a time a question found its answer.", "Who are you?": "I am the wind."},
}


def make_adapter(name: str, folder: Path) -> None:
    """Write FOLDER/NAME/ with adapter_config.json and adapter_model.safetensors: rank 8, of a few seconds' training."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM"))
    prompts = {
        asked: tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
        )
        for asked in ANSWERS[name]
    }
    fit(model, tokenizer, [(prompts[asked], answer) for asked, answer in ANSWERS[name].items()])
    model.save_pretrained(folder / name)


if __name__ == "__main__":
    for adapter in ANSWERS:
        make_adapter(adapter, Path(sys.argv[1]))
