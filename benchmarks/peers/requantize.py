"""`python requantize.py FROM TO TYPE`: a GGUF of another type, made by llama.cpp."""

import ctypes
import os
import sys
from pathlib import Path

import llama_cpp

source, path, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
path.parent.mkdir(parents=True, exist_ok=True)
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize, params.pure, params.nthread = number, True, True, os.cpu_count()
part = path.with_suffix(".part")
code = llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(params))
assert code == 0, f"llama.cpp cannot make {path}"
part.rename(path)
