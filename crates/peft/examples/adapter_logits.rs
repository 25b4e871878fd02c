//! Writes the logits of a decoder with an adapter to standard output, as f32, for comparisons with other programs:
//!
//! ```sh
//! cargo run --release -p oxiformers-peft --example adapter_logits -- BASE ADAPTER [--quantize METHOD] 1 2 3 > logits.bin
//! ```
//!
//! `[tokens, vocab]`. `BASE` is a folder or a GGUF file, whose linear layers are quantized while they are loaded where a
//! method is given.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};
use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::quant::{MethodOptions, QuantizationConfig};
use oxiformers_models::nn::{CacheKind, LoadOptions, LogitsFor};
use oxiformers_models::{AutoModelForCausalLM, CausalLM};
use oxiformers_peft::Adapter;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let quantization = match args.iter().position(|arg| arg == "--quantize") {
        Some(at) if at + 1 < args.len() => {
            let method = args.drain(at..at + 2).nth(1).unwrap_or_default();
            let config = QuantizationConfig::named(&method, &MethodOptions::default())?;
            Some(Arc::new(config.into()))
        }
        _ => None,
    };
    let [base, adapter, ids @ ..] = args.as_slice() else {
        return Err("usage: adapter_logits BASE ADAPTER [--quantize METHOD] ID…, see the source".into());
    };
    let path = Path::new(base);
    let files = match path.is_dir() {
        true => ModelFiles::from_dir(path)?,
        false => ModelFiles::from_file(path)?,
    };
    let adapter = Adapter::from_files(&ModelFiles::from_dir(Path::new(adapter))?, "adapter")?;
    let options = LoadOptions {
        adapters: vec![Arc::new(adapter)],
        quantization,
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
