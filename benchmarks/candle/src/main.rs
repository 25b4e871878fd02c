//! What the Python peers do, by candle: `candle_peer MODEL THREADS TASKS`, see `peers/tasks.py`. A GGUF file is a
//! decoder of Llama's architecture, a folder a BERT.

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::quantized::gguf_file;
use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use candle_transformers::models::quantized_llama::ModelWeights;
use serde_json::Value;

const CPU: Device = Device::Cpu;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, threads, tasks] = &arguments[..] else {
        bail!("candle_peer MODEL THREADS TASKS");
    };
    // SAFETY: no other thread runs yet. candle and the libraries below it take the number from here.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", threads) };
    let tasks: Vec<(String, usize, usize, usize)> = serde_json::from_str(tasks)?;
    let path = Path::new(path);
    let values = if path.is_dir() {
        encode(path, &tasks)?
    } else {
        generate(path, &tasks)?
    };
    println!("{}", serde_json::to_string(&values)?);
    Ok(())
}

/// The same as `prompt` of `peers/tasks.py`, for all rows.
fn prompts(tokens: usize, batch: usize, vocab: usize) -> Result<Tensor> {
    let row = |row| (0..tokens).map(move |i| ((i * 7919 + row * 104_729 + 11) % vocab) as u32);
    let ids: Vec<u32> = (0..batch).flat_map(row).collect();
    Ok(Tensor::from_vec(ids, (batch, tokens), &CPU)?)
}

/// Tokens per second.
fn generate(path: &Path, tasks: &[(String, usize, usize, usize)]) -> Result<Vec<f64>> {
    let mut file = File::open(path)?;
    let content = gguf_file::Content::read(&mut file)?;
    let mut model = ModelWeights::from_gguf(content, &mut file, &CPU)?;
    let vocab = model.forward(&prompts(1, 1, 1)?, 0)?.dim(D::Minus1)?;
    let best = |logits: &Tensor| logits.argmax_keepdim(D::Minus1);
    let mut rates = Vec::new();
    for (what, tokens, batch, new) in tasks {
        let (tokens, batch, new) = (*tokens, *batch, *new);
        let mut rate = 0.0;
        // The first time warms up.
        for _ in 0..2 {
            let ids = prompts(tokens, batch, vocab)?;
            model.clear_kv_cache();
            let begin = Instant::now();
            let mut last = best(&model.forward(&ids, 0)?)?;
            let prefilled = Instant::now();
            if what == "prefill" {
                rate = (tokens * batch) as f64 / (prefilled - begin).as_secs_f64();
                continue;
            }
            for step in 0..new - 1 {
                last = best(&model.forward(&last, tokens + step)?)?;
            }
            rate = ((new - 1) * batch) as f64 / prefilled.elapsed().as_secs_f64();
        }
        rates.push(rate);
    }
    Ok(rates)
}

/// Milliseconds of a forward pass, up to the mean over each sequence.
fn encode(folder: &Path, tasks: &[(String, usize, usize, usize)]) -> Result<Vec<f64>> {
    let json: Value = serde_json::from_reader(File::open(folder.join("config.json"))?)?;
    let config: Config = serde_json::from_value(json)?;
    let vocab = config.vocab_size;
    // SAFETY: nobody changes the file meanwhile.
    let weights = unsafe {
        VarBuilder::from_mmaped_safetensors(&[folder.join("model.safetensors")], DType::F32, &CPU)?
    };
    let model = BertModel::load(weights, &config)?;
    let mut all = Vec::new();
    for (_, tokens, batch, rounds) in tasks {
        let ids = prompts(*tokens, *batch, vocab)?;
        let types = ids.zeros_like()?;
        let mut times = Vec::new();
        // The first time warms up.
        for _ in 0..rounds + 1 {
            let begin = Instant::now();
            model.forward(&ids, &types, None)?.mean(1)?.to_vec2::<f32>()?;
            times.push(1e3 * begin.elapsed().as_secs_f64());
        }
        times.remove(0);
        times.sort_by(f64::total_cmp);
        all.push(*times.get(times.len() / 2).context("at least one round")?);
    }
    Ok(all)
}
