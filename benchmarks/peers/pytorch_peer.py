"""PyTorch with Transformers, the weights dequantized to f32 by Transformers' own GGUF loading."""

import os

import torch
import transformers

import tasks


class Engine:
    def __init__(self, path, threads, context):
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        folder, name = os.path.split(path)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32).eval()
        self.vocab = self.model.config.vocab_size

    def reset(self):
        self.past = None

    @torch.inference_mode()
    def _run(self, ids):
        out = self.model(torch.tensor(ids), past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        return out.logits[:, -1].argmax(-1, keepdim=True).tolist()

    def prefill(self, prompts):
        return self._run(prompts)

    decode = _run


if __name__ == "__main__":
    tasks.main(Engine)
