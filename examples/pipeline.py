"""transformers' text-generation pipeline with a compressed cache.

python examples/pipeline.py [MODEL]     # a folder or a name on the hub; without one a small random Llama, no download
"""

import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import pipeline as make_pipeline

import mikv_compile

if len(sys.argv) > 1:
    tokenizer, model = (kind.from_pretrained(sys.argv[1]) for kind in (AutoTokenizer, AutoModelForCausalLM))
else:
    letters = Tokenizer(models.BPE({byte: i for i, byte in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=256,
                                         num_attention_heads=4, num_key_value_heads=2)).eval()  # fmt: skip

# In place: what torch.compile(model) returns works as well, but the pipeline warns that it does not know its class.
model.compile(backend="mikv", options={"lower": "eager"})  # "eager" only skips Inductor
generate = make_pipeline("text-generation", model=model, tokenizer=tokenizer)
prompt = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
)
print(repr(generate(prompt * 4, max_new_tokens=24, do_sample=False, return_full_text=False)[0]["generated_text"]))
print(*mikv_compile.graph_reports(), sep="\n")
