"""ONNX Runtime: an encoder's graph, exported by PyTorch, with all its optimizations."""

import json
from pathlib import Path

import numpy as np
import onnxruntime

import tasks


class Encoder:
    def __init__(self, path, threads, context):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.vocab = json.loads(Path(path).with_suffix(".json").read_text())["vocab_size"]

    def encode(self, prompts):
        ids = np.array(prompts, dtype=np.int64)
        return self.session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]


if __name__ == "__main__":
    tasks.main(Encoder)
