"""Checks that PEFT loads an adapter that `oxiformers train` has written over a model in NF4, and that both answer alike.

    python qlora.py PATH/TO/oxiformers PATH/TO/adapter_logits BASE ADAPTER

Pinned: peft==0.21.2, transformers==5.23.0, torch==2.15.0, bitsandbytes==0.50.0, gguf==0.19.0. `adapter_logits` is the example of crates/peft, BASE
what the adapter was trained over (a GGUF file or a folder), ADAPTER the folder that the training wrote. Python gets the same
codes, as `oxiformers quantize --method nf4` writes them, as f32: on a CPU bitsandbytes multiplies in bf16, and widens codes to the
type that they were made of, half precision for a GGUF. It gets the table of BASE, too, where the folder holds that in half precision.
"""

import subprocess
import sys
import tempfile

import gguf
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = [
    "The capital of France is Paris, and that of Italy is Rome.",
    "<|im_start|>system\nYou answer in one word.<|im_end|>\n<|im_start|>user\nWhat is the capital of Spain?<|im_end|>\n"
    "<|im_start|>assistant\nMadrid<|im_end|>",
]
# Activations are rounded to 15 bits where weights are packed.
TOLERANCE = 1e-3


def load(folder):
    """The model with its codes widened to f32."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.dtype = torch.float32
    return model.dequantize(dtype=torch.float32).float().eval()


def table_of(base, otherwise):
    """The embeddings of a GGUF file."""
    if not base.endswith(".gguf"):
        return otherwise
    tensor = next(tensor for tensor in gguf.GGUFReader(base).tensors if tensor.name == "token_embd.weight")
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


def main():
    binary, example, base, adapter = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        nf4 = f"{folder}/nf4"
        subprocess.run([binary, "quantize", base, "--method", "nf4", "--output", nf4], check=True)
        tokenizer = AutoTokenizer.from_pretrained(nf4)
        plain = load(nf4)
        own = plain.get_input_embeddings().weight.data
        worst = 0.0
        # The base as it was trained over, and as the folder has it.
        for place, more, table in [(base, ["--quantize", "nf4"], table_of(base, own)), (nf4, [], own)]:
            plain.get_input_embeddings().weight.data = plain.get_output_embeddings().weight.data = table
            for text in TEXTS:
                ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
                with torch.no_grad():
                    without = plain(ids).logits[0]
                adapted = PeftModel.from_pretrained(plain, adapter).eval()
                with torch.no_grad():
                    expected = adapted(ids).logits[0]
                plain = adapted.unload()
                change = (expected - without).abs().max().item()
                command = [example, place, adapter, *more, *map(str, ids[0].tolist())]
                raw = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                ours = torch.from_numpy(np.frombuffer(raw, dtype=np.float32).copy()).reshape(expected.shape)
                difference = ((ours - expected).abs().max() / expected.abs().max()).item()
                worst = max(worst, difference)
                print(f"{ids.shape[1]} tokens: {difference:.1e} of the largest logit (the adapter changes them by {change:.2f})")
                assert change > 0.1, "an adapter that changes nothing proves nothing"
        assert worst < TOLERANCE, worst


main()
