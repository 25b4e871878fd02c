//! Writes the logits of a decoder to standard output, as f32, for comparisons with other programs:
//!
//! ```sh
//! cargo run --release -p oxiformers-models --example logits -- FOLDER [--f32] 1 2 3 > logits.bin
//! ```
//!
//! `[tokens, vocab]`; with `--f32` weights are widened when they are loaded, and activations are not quantized.

use std::io::Write;
use std::path::Path;

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::{CacheKind, LoadOptions, LogitsFor};
use oxiformers_models::{AutoModelForCausalLM, CausalLM};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let dense = args.iter().any(|arg| arg == "--f32");
    args.retain(|arg| arg != "--f32");
    let (model, ids) = args
        .split_first()
        .ok_or("usage: logits FOLDER [--f32] ID…, see the source")?;
    let path = Path::new(model);
    let files = match path.is_dir() {
        true => ModelFiles::from_dir(path)?,
        false => ModelFiles::from_file(path)?,
    };
    let options = LoadOptions {
        dtype: dense.then_some(FloatDType::F32),
        ..LoadOptions::default()
    };
    let model = AutoModelForCausalLM::from_files(&files, &options)?;
    let ids: Vec<i32> = ids.iter().map(|id| id.parse()).collect::<Result<_, _>>()?;
    let shape = [1, ids.len()];
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, shape), &Device::flex());
    let mut cache = model.new_cache(CacheKind::Dynamic, vec![0]);
    let logits = model.forward(ids, &mut cache, LogitsFor::All).into_data();
    let bytes: Vec<u8> = logits.iter::<f32>().flat_map(f32::to_le_bytes).collect();
    std::io::stdout().lock().write_all(&bytes)?;
    Ok(())
}
