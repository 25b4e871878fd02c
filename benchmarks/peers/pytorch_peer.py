"""PyTorch with Transformers: a GGUF's weights dequantized to f32 by Transformers' own loading, an encoder as it is."""

import os

import torch
import transformers

import tasks


class Decoder:
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


class Encoder:
    """Up to the mean over each sequence, none of which is padded."""

    def __init__(self, path, threads, context):
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        self.model = transformers.AutoModel.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.vocab = self.model.config.vocab_size

    @torch.inference_mode()
    def encode(self, prompts):
        return self.model(torch.tensor(prompts)).last_hidden_state.mean(1).numpy()


if __name__ == "__main__":
    tasks.main(lambda path, *rest: (Encoder if os.path.isdir(path) else Decoder)(path, *rest))
