"""Times steps of full fine-tuning against PyTorch, in turn: same weights, batches, threads and optimizer (AdamW), f32.

    python training.py PATH/training_speed [--only NAME] [--rounds N] [--threads N] [--steps N]

Needs transformers and torch (measured with 5.23.0 and 2.15.0); `cargo build --release -p oxiformers-train --example
training_speed` builds ours. Two models with random weights: a llama decoder of 10 million parameters (8 x 256 tokens) and a BERT encoder of the
shape of all-MiniLM-L6-v2 with a classifier (32 x 128 tokens). Memory is the peak of each process. The losses of both are
printed: they are of the same weights and batches, dropout off.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODELS = {
    "llama": dict(
        task="CausalLM", batch=8, seq=256, model_type="llama",
        config=dict(vocab_size=8192, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8,
                    num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False),
    ),
    "minilm": dict(
        task="SequenceClassification", batch=32, seq=128, model_type="bert",
        config=dict(vocab_size=30522, hidden_size=384, intermediate_size=1536, num_hidden_layers=6,
                    num_attention_heads=12, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    ),
}


def ids(step, batch, seq, vocab):
    """Ids that look random: the same on the Rust side."""
    import torch

    index = torch.arange(batch * seq)
    return ((step * 7919 + index * 104729 + index * index % 8191) % (vocab - 8) + 8).reshape(batch, seq)


def make(name, folder):
    """Runs in a process of its own, so that its memory counts for nobody."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = MODELS[name]
    config = transformers.AutoConfig.for_model(model["model_type"], **model["config"])
    getattr(transformers, f"AutoModelFor{model['task']}").from_config(config).save_pretrained(folder)


def theirs(name, folder, steps, threads):
    """Runs in a process of its own: prints seconds of each step and losses."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    given = MODELS[name]
    batch, seq = given["batch"], given["seq"]
    model = getattr(transformers, f"AutoModelFor{given['task']}").from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    seconds, losses = [], []
    for step in range(steps):
        begin = time.perf_counter()
        tokens = ids(step, batch, seq, given["config"]["vocab_size"])
        labels = tokens if given["task"] == "CausalLM" else (torch.arange(batch) + step) % 2
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    print(json.dumps(dict(seconds=seconds, losses=losses)))


def run(command, threads):
    """What it printed, and its peak memory in MiB."""
    env = os.environ | dict(OMP_NUM_THREADS=str(threads), RAYON_NUM_THREADS=str(threads))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return json.loads(text), usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    this = [sys.executable, __file__]
    for name, model in MODELS.items():
        if args.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*this, "make", name, folder], check=True, stderr=subprocess.DEVNULL)
            own = [args.program, folder, model["task"], *(str(n) for n in (model["batch"], model["seq"], args.steps))]
            peer = [*this, "theirs", name, folder, str(args.steps), str(args.threads)]
            found = {"ours": [], "PyTorch": []}
            for _ in range(args.rounds):
                found["PyTorch"].append(run(peer, args.threads))
                found["ours"].append(run(own, args.threads))
        rates = {}
        for who, runs in found.items():
            # The first step warms up.
            rate = 1 / statistics.median(x for output, _ in runs for x in output["seconds"][1:])
            memory = statistics.median(memory for _, memory in runs)
            losses = runs[0][0]["losses"]
            rates[who] = (rate, memory)
            print(f"{name} {who}: {rate:.3f} steps/s, {memory:.0f} MiB, losses {losses[0]:.5f} to {losses[-1]:.5f}")
        faster, smaller = (rates["ours"][0] / rates["PyTorch"][0], rates["PyTorch"][1] / rates["ours"][1])
        print(f"{name}: {faster:.2f} times as fast, {smaller:.2f} times as small", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", name, folder]:
            make(name, folder)
        case ["theirs", name, folder, steps, threads]:
            theirs(name, folder, int(steps), int(threads))
        case _:
            main()
