"""`python export_onnx.py FOLDER PATH`: an encoder, up to the mean over each sequence, as PATH.onnx; its configuration
beside it."""

import shutil
import sys
from pathlib import Path

import torch
import transformers
from onnxruntime.transformers import optimizer

folder, path = Path(sys.argv[1]), Path(sys.argv[2])


class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = transformers.AutoModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager").eval()

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask).last_hidden_state.mean(1)


module = Mean()
ids = torch.ones(2, 8, dtype=torch.int64)
path.parent.mkdir(parents=True, exist_ok=True)
part = path.with_suffix(".part")
axes = {0: "batch", 1: "tokens"}
torch.onnx.export(
    module, (ids, ids), str(part), input_names=["input_ids", "attention_mask"], output_names=["mean"],
    dynamic_axes={"input_ids": axes, "attention_mask": axes, "mean": {0: "batch"}}, dynamo=False, opset_version=17)
config = module.model.config
# What the runtime does not fuse by itself.
optimized = optimizer.optimize_model(
    str(part), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size)
print(optimized.get_fused_operator_statistics())
optimized.save_model_to_file(str(part))
shutil.copyfile(folder / "config.json", path.with_suffix(".json"))
part.rename(path)
