"""Read a long prompt once, save its compressed cache, and answer from the file: in another process, too.

    python examples/reuse_prompt.py             # a small random model, in seconds; run it twice
    python examples/reuse_prompt.py --smollm2   # SmolLM2-135M-Instruct (`make demo` installs it), about README.md

The first run reads the document and saves. Later ones load the file: only the questions go through the model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from mikv_compile import cache_report, cached_tokens, load_cache, save_cache

README = Path(__file__).parent.parent / "README.md"
QUESTIONS = ("What does this project keep in mixed precision?", "Which command runs the test suite?")


def small_model():
    """A random Llama, equal in each process; its document and questions, [1, T] each; and no tokenizer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=512,
                                         num_attention_heads=4, num_key_value_heads=2)).eval()  # fmt: skip
    return model, torch.randint(512, (1, 2000)), [torch.randint(512, (1, 9)) for _ in QUESTIONS], None


def smollm2():
    """The same with a real model and text."""
    from mikv_compile.eval import models

    tokenizer, model = models.load("smollm2")

    def ids(text):
        return tokenizer(text, return_tensors="pt").input_ids

    document = ids(f"<|im_start|>user\n{README.read_text(encoding='utf-8')[:5000]}\n\n")
    return model, document, [ids(f"{q}<|im_end|>\n<|im_start|>assistant\n") for q in QUESTIONS], tokenizer


def main() -> None:
    """Fill the file if it is not there, and answer from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", action="store_true", help="a real model instead of a small random one")
    parser.add_argument(
        "--file", type=Path, help="where the cache is saved; by default in the folder for temporary files"
    )
    args = parser.parse_args()
    name = "smollm2" if args.smollm2 else "small"
    path = args.file or Path(tempfile.gettempdir()) / f"mikv_reuse_prompt_{name}.safetensors"
    model, document, questions, tokenizer = smollm2() if args.smollm2 else small_model()
    fast = torch.compile(model, backend="mikv", options={"lower": "eager"})  # "eager" only skips Inductor

    if not path.exists():
        start, cache = time.perf_counter(), DynamicCache(config=model.config)
        with torch.no_grad():
            fast(document, past_key_values=cache, logits_to_keep=1)
        save_cache(cache, path, model=model, tokens=document)
        print(f"read {document.shape[1]} tokens and saved them in {time.perf_counter() - start:.1f} s")
        print(cache_report(cache))
    print(f"{path}: {path.stat().st_size:,} bytes")

    for number, question in enumerate(questions, 1):
        prompt = torch.cat([document, question], dim=1)
        known = cached_tokens(path, prompt)
        start, cache = time.perf_counter(), load_cache(path, model=model)
        surplus = cache.get_seq_length() - known
        if surplus:  # the prompt begins with a part of what is cached
            cache.crop(-surplus)
        loaded = time.perf_counter() - start
        output = fast.generate(prompt, past_key_values=cache, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :]
        answer = tokenizer.decode(output, skip_special_tokens=True) if tokenizer else output.tolist()
        print(f"question {number}: {known} of {prompt.shape[1]} tokens were cached, loaded in {loaded:.2f} s: {answer}")


if __name__ == "__main__":
    main()
