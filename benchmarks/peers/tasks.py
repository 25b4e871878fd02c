"""What every peer is asked to do: `python PEER.py MODEL THREADS TASKS`, TASKS a JSON list of
[what, tokens, batch, new_tokens]. Prints a JSON list of tokens per second, in the same order."""

import json
import sys
import time


def prompt(tokens, row, vocab):
    return [(i * 7919 + row * 104_729 + 11) % vocab for i in range(tokens)]


def main(load):
    path, threads, tasks = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    engine = load(path, threads, max(tokens + new for _, tokens, _, new in tasks))
    rates = []
    for what, tokens, batch, new in tasks:
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
        rates.append(rate)
    print(json.dumps(rates))
