"""The shortest use: a small random Llama, one prompt, a few tokens, and what its cache weighs. No weights needed."""

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import mikv_compile

model = LlamaForCausalLM(LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=512,
                                     num_attention_heads=4, num_key_value_heads=2)).eval()  # fmt: skip
compiled = torch.compile(model, backend="mikv", options={"lower": "eager"})  # "eager" only skips Inductor
cache = DynamicCache()
with torch.no_grad():
    token = compiled(torch.randint(512, (1, 1000)), past_key_values=cache).logits[:, -1:].argmax(-1)
    for _ in range(20):
        token = compiled(token, past_key_values=cache).logits[:, -1:].argmax(-1)
print(mikv_compile.cache_report(cache))
