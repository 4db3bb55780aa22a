"""Tensor parallelism: each process has a part of the heads, and compresses the cache of those alone.

torchrun --nproc_per_node 2 examples/tensor_parallel.py MODEL_FOLDER

``python examples/tensor_parallel.py MODEL_FOLDER`` runs the whole model in one process. If there is no such folder, a
small random Llama is saved there first.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import mikv_compile

folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
if "RANK" in os.environ and not dist.is_initialized():
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
if rank == 0 and not folder.exists():
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=512,
                                 num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)  # fmt: skip
split = {}
if dist.is_initialized():
    dist.barrier()
    split["distributed_config"] = DistributedConfig(tp_plan="auto")
model = AutoModelForCausalLM.from_pretrained(folder, **split).eval()
compiled = torch.compile(model, backend="mikv", options={"tiers": "int4", "lower": "eager"})
prompt = torch.randint(3, 256, (1, 500), generator=torch.Generator().manual_seed(0)).to(model.device)
cache = DynamicCache()
tokens = compiled.generate(prompt, past_key_values=cache, max_new_tokens=20, do_sample=False, eos_token_id=None)
heads = cache.layers[0].keys.shape[1]
said = f"rank {rank}: {heads} KV heads, {mikv_compile.cache_report(cache)}\n{tokens[0, 500:].tolist()}\n"
print(said, end="", flush=True)  # in one piece: all ranks write to one terminal
if dist.is_initialized():
    dist.destroy_process_group()
