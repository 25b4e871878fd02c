"""What every peer is asked to do: `python PEER.py MODEL THREADS TASKS`, TASKS a JSON list of
[what, tokens, batch, n]. Prints a JSON list, in the same order: tokens per second of `decode` (of n new tokens) and
`prefill`, milliseconds of `forward` (median of n). MODEL is a GGUF file, or an encoder's folder."""

import json
import statistics
import sys
import time


def prompt(tokens, row, vocab):
    return [(i * 7919 + row * 104_729 + 11) % vocab for i in range(tokens)]


def generate(engine, what, tokens, batch, new):
    rate = 0
    # The first time warms up.
    for _ in range(2):
        prompts = [prompt(tokens, row, engine.vocab) for row in range(batch)]
        engine.reset()
        begin = time.perf_counter()
        last = engine.prefill(prompts)
        prefilled = time.perf_counter()
        if what == "prefill":
            rate = tokens * batch / (prefilled - begin)
            continue
        for _ in range(new - 1):
            last = engine.decode(last)
        rate = (new - 1) * batch / (time.perf_counter() - prefilled)
    return rate


def encode(engine, what, tokens, batch, rounds):
    prompts = [prompt(tokens, row, engine.vocab) for row in range(batch)]
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        engine.encode(prompts)
        times.append(1e3 * (time.perf_counter() - begin))
    # The first time warms up.
    return statistics.median(times[1:])


def main(load):
    path, threads, tasks = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    engine = load(path, threads, max(tokens + new for _, tokens, _, new in tasks))
    print(json.dumps([(encode if task[0] == "forward" else generate)(engine, *task) for task in tasks]))
