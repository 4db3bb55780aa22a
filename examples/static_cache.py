"""``generate`` with a preallocated cache: transformers compiles the decoding steps itself, with this backend.

The prompt is read by the model as it is, and leaves a dense cache; the first compiled step takes it over, in place.
"""

import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

import mikv_compile

model = LlamaForCausalLM(LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=512,
                                     num_attention_heads=4, num_key_value_heads=2)).eval()  # fmt: skip
config = CompileConfig(backend="mikv", mode=None, options={"tiers": "int8:0.1,int4", "lower": "eager"})
config._compile_all_devices = True  # transformers compiles on GPUs only unless it is told so
made = model.generate(
    torch.randint(512, (1, 500)), max_new_tokens=24, do_sample=False, cache_implementation="static",
    compile_config=config, return_dict_in_generate=True,
)  # fmt: skip
print(made.sequences[0, 500:].tolist())
print(mikv_compile.cache_report(made.past_key_values))
