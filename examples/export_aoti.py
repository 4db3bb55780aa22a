"""Export a decoder with a compressed cache, and run it in a process that knows neither transformers nor the model.

python examples/export_aoti.py [MODEL]     # a folder or a name on the hub; without one a small random Llama
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mikv_compile

RUN = """
import sys, torch, mikv_compile

decoder = mikv_compile.load_exported(sys.argv[1])
prompt = torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(0))
cache = decoder.new_cache()
print(decoder.generate(prompt, 20, cache=cache)[0, 300:].tolist())
print(f"{cache.length} tokens in {cache.nbytes:,} bytes, {cache.nbytes / cache.dense_nbytes:.0%} of a dense cache")
print("transformers was imported:", "transformers" in sys.modules)
"""

if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
    model = LlamaForCausalLM(LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=1, vocab_size=256,
                                         num_attention_heads=4, num_key_value_heads=2)).eval()  # fmt: skip
options = {"tiers": "int8:0.1,int4"}
with tempfile.TemporaryDirectory() as folder:
    package = mikv_compile.export(model, Path(folder) / "decoder.pt2", max_length=512, options=options)
    print(f"{package.name}: {package.stat().st_size / 2**20:.1f} MiB")
    subprocess.run([sys.executable, "-c", RUN, str(package)], check=True)

    prompt = torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    live = torch.compile(model, backend="mikv", options={**options, "lower": "eager"})
    tokens = live.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    print(tokens[0, 300:].tolist(), "with torch.compile, here")
