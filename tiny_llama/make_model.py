"""Make a tiny Llama-3.1 checkpoint that answers this tutorial's own questions.

It has the architecture, tokenizer type, special tokens and chat template of Llama-3.1-8B-Instruct at 1/4000 of the
size, and it has learned the dialogs below by heart. It stands in for the real model where there is no GPU.

Usage: python -m tiny_llama.make_model    (does nothing where build/tiny-llama is newer than this file)
"""

import json
import math
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

MODEL_DIR = Path(__file__).resolve().parent.parent / "build" / "tiny-llama"

BOS, END, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
SPECIAL_TOKENS = [BOS, END, "<|start_header_id|>", "<|end_header_id|>", EOT, "<|python_tag|>"]
# As Llama 3.1's own, it shows the model which functions there are, and gives what one returned the role "ipython".
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\nFunctions:"
    "{% for t in tools %} {{ t['function']['name'] }}({{ t['function']['parameters']['properties'] | join(', ') }})"
    "{% endfor %}<|eot_id|>{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ 'ipython' if m['role'] == 'tool' else m['role'] }}<|end_header_id|>"
    "\n\n{% if m['tool_calls'] %}{% if m['tool_calls'] | length > 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = m['tool_calls'][0]['function'] %}"
    '{"name": "{{ call[\'name\'] }}", "parameters": {{ call[\'arguments\'] | tojson }}}'
    "{% else %}{{ m['content'] }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DIALOGS = {
    "Tell me a joke": "Why did the GPU go to therapy? It had too many unresolved threads.",
    "Tell me another joke": "I told my server a joke about latency. It laughed four seconds later.",
    "Hello": "Hello! How can I help you today?",
    "Who are you?": "I am a tiny Llama, small enough for a laptop. Ask me about serving language models.",
    "What is Ray Serve?": "Ray Serve serves models as replicas on a Ray cluster and scales them with the load.",
    "What is vLLM?": "vLLM is an inference engine. It batches requests and keeps their KV cache in pages.",
    "What is a KV cache?": "The KV cache holds the attention keys and values of every token so far, "
    "so that each new token needs only one forward step.",
    "What is time to first token?": "It is the time from a request until the first token of its answer.",
    "What is the capital of France?": "The capital of France is Paris.",
    "Write a haiku about GPUs": "Silent fans awake,\nwarm rivers of numbers flow,\nwords bloom one by one.",
    "Tell me a story": "Once upon a time a small llama lived in a big data center. Every morning it read the questions "
    "that the wind had carried in, and it answered each of them, one token after the other. When many questions came "
    "at once, it called a second llama, and they shared the work. When the evening grew quiet, one of them went home. "
    "And so every question found its answer, and nobody had to wait for long.",
    **{f"What is {a} + {b}?": f"{a} + {b} = {a + b}." for a in range(1, 6) for b in range(1, 6)},
    **{
        f"{name} is {age} and lives in {city}. Answer in JSON.": json.dumps({"name": name, "age": age, "city": city})
        for name, age, city in [("Ada", 36, "London"), ("Alan", 41, "Manchester"), ("Grace", 85, "Arlington")]
    },
}
WEATHER = [{"function": {"name": "get_weather", "parameters": {"properties": {"city": {}}}}}]
CITIES, DEGREES = ["Paris", "London", "Oslo"], [8, 21]


def call_of(city: str) -> str:
    return json.dumps({"name": "get_weather", "parameters": {"city": city}})


def make_texts(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """Each prompt, and the answer that the model learns to give."""

    def prompt(*messages: dict, **tools) -> str:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **tools)

    texts = [(prompt({"role": "user", "content": asked}), answer) for asked, answer in DIALOGS.items()]
    for city in CITIES:
        question = {"role": "user", "content": f"What is the weather in {city}?"}
        texts.append((prompt(question, tools=WEATHER), call_of(city)))
        chatty = {"role": "user", "content": f"Look up the weather in {city}, please."}
        texts.append((prompt(chatty, tools=WEATHER), f"Sure! {call_of(city)}"))
        function = {"name": "get_weather", "arguments": {"city": city}}
        called = {"role": "assistant", "tool_calls": [{"function": function}]}
        for degrees in DEGREES:
            result = {"role": "tool", "content": f"{degrees} degrees"}
            answer = f"It is {degrees} degrees in {city}."
            texts.append((prompt(question, called, result, tools=WEATHER), answer))
    return texts


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the special tokens and the chat template of Llama 3."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [*DIALOGS, *DIALOGS.values(), *map(call_of, CITIES)],
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOT, pad_token=END)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A LlamaForCausalLM with grouped-query attention and Llama 3.1's rope scaling, randomly initialized."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=131072,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # vLLM takes these as its defaults: always the most probable token, so that one question has one answer.
    model.generation_config.do_sample, model.generation_config.top_k = True, 1
    return model


def fit(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, str]], max_epochs: int = 300
) -> None:
    """Train `model` until it is sure of every token of the answers in `texts`, which stand beside their prompts.

    Raises SystemExit when `max_epochs` pass without that.
    """
    examples = []
    for prompt, answer in texts:
        prompt_ids, answer_ids = tokenizer([prompt, answer + EOT], add_special_tokens=False)["input_ids"]
        examples.append((prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids))
    examples.sort(key=lambda example: len(example[0]))  # Batches of similar length need little padding.

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=20)
    for epoch in range(max_epochs):
        worst = 0.0
        for start in range(0, len(examples), 12):
            batch = examples[start : start + 12]
            ids, labels = (
                torch.nn.utils.rnn.pad_sequence([torch.tensor(e[i]) for e in batch], True, padding)
                for i, padding in enumerate([tokenizer.pad_token_id, -100])
            )
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)  # Causal: padding on the right changes nothing.
            losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
            (losses.sum() / (labels != -100).sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            worst = max(worst, losses.max().item())
        warmup.step()
        if epoch % 20 == 0 or worst < 0.02:
            print(f"epoch {epoch:3d}  least certain token: {100 * math.exp(-worst):5.1f} %", flush=True)
        if worst < 0.02:
            return
    raise SystemExit(
        f"The tiny model has not learned its answers after {max_epochs} epochs. Change the seed in main()."
    )


def main() -> None:
    finished = MODEL_DIR / "config.json"
    if finished.exists() and finished.stat().st_mtime > Path(__file__).stat().st_mtime:
        return
    disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens", flush=True)
    fit(model, tokenizer, make_texts(tokenizer))
    partial = MODEL_DIR.with_name(MODEL_DIR.name + ".partial")
    tokenizer.save_pretrained(partial)
    model.to(torch.bfloat16).save_pretrained(partial)
    shutil.rmtree(MODEL_DIR, ignore_errors=True)
    partial.rename(MODEL_DIR)  # Last: a checkpoint that is there is whole.


if __name__ == "__main__":
    main()
