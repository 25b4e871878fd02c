"""llama.cpp by its low-level interface: the forward pass and the likeliest token, nothing else."""

import ctypes

import llama_cpp
import numpy as np

import tasks

BATCH = 512


class Engine:
    def __init__(self, path, threads, context):
        params = llama_cpp.llama_model_default_params()
        llama_cpp.llama_log_set(SILENT, None)
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.threads, self.context_tokens, self.context, self.rows = threads, context, None, 0

    def reset(self):
        self.rows = 0

    def _open(self, rows):
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = (self.context_tokens + 8) * rows
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = rows
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = False
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, rows)
        self.rows = rows

    def _run(self, tokens, positions, rows, wanted):
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, row, want) in enumerate(zip(tokens, positions, rows, wanted)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = row, want
        assert llama_cpp.llama_decode(self.context, batch) == 0

    def _best(self, index):
        logits = llama_cpp.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def prefill(self, prompts):
        if self.context is None or self.rows != len(prompts):
            self._open(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        last = []
        for row, prompt in enumerate(prompts):
            for at in range(0, len(prompt), BATCH):
                part = prompt[at:at + BATCH]
                end = at + len(part) == len(prompt)
                wanted = [0] * (len(part) - 1) + [int(end)]
                self._run(part, range(at, at + len(part)), [row] * len(part), wanted)
            last.append(self._best(-1))
        self.position = len(prompts[0])
        return last

    def decode(self, last):
        self._run(last, [self.position] * len(last), range(len(last)), [1] * len(last))
        self.position += 1
        return [self._best(row) for row in range(len(last))]


@llama_cpp.llama_log_callback
def SILENT(level, text, data):
    pass


if __name__ == "__main__":
    tasks.main(Engine)
