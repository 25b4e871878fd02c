//! `oxiformers bench`: how fast a model runs here.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::bail;
use indicatif::BinaryBytes;
use oxiformers::hub::ModelFiles;
use oxiformers::models::registry::Kind;
use oxiformers::{
    AutoConfig, AutoModel, CausalLM, EncoderInputs, GenerationConfig, LanguageModel, LoadOptions, Step,
    block_on,
};
use serde_json::{Value, json};

use crate::args::{BenchArgs, CacheArgs};
use crate::session;

pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let (files, options) = session::model(Some(&args.model), &args.run)?;
    if files.gguf().is_none() && AutoConfig::from_files(&files)?.architecture.kind() == Kind::Encoder {
        return run_encoder(args, &files, &options);
    }
    let begin = Instant::now();
    let model = LanguageModel::from_files(&files, &options)?;
    let load_s = begin.elapsed().as_secs_f64();
    let most = model.max_positions().unwrap_or(usize::MAX);

    let mut rows = Vec::new();
    for prompt in &args.prompt_tokens {
        let prompt = *prompt;
        if prompt + 1 > most {
            bail!("--prompt-tokens {prompt}: the model was made for {most}");
        }
        let runs = repeat(args.rounds, || time(&model, args.cache, prompt, 1, 1))?;
        rows.push(row(
            "prefill",
            prompt,
            1,
            runs.iter().map(|run| prompt as f64 / run.prompt_s),
        ));
    }
    for context in &args.context {
        for batch in &args.batch {
            let (context, batch, new) = (*context, *batch, args.new_tokens);
            if context + new > most {
                bail!(
                    "--context {context}: with {new} new tokens that is more than the {most} that the model was made for"
                );
            }
            let runs = repeat(args.rounds, || time(&model, args.cache, context, batch, new))?;
            let rate = runs.iter().map(|run| ((new - 1) * batch) as f64 / run.decode_s);
            rows.push(row("decode", context, batch, rate));
        }
    }
    let peak = peak_memory();
    let mut out = io::stdout().lock();
    if args.json {
        let report = json!({
            "model": model.name, "load_s": load_s, "peak_memory": peak,
            "threads": args.run.threads, "new_tokens": args.new_tokens, "runs": rows,
        });
        return Ok(writeln!(out, "{report:#}")?);
    }
    writeln!(out, "{}\nload  {load_s:.3} s", model.name)?;
    writeln!(
        out,
        "{:<8} {:>8} {:>6} {:>10} {:>10} {:>10}",
        "", "tokens", "batch", "tokens/s", "least", "most"
    )?;
    for row in rows {
        let number = |name: &str| row[name].as_f64().unwrap_or_default();
        writeln!(
            out,
            "{:<8} {:>8} {:>6} {:>10.1} {:>10.1} {:>10.1}",
            row["what"].as_str().unwrap_or_default(),
            number("tokens"),
            number("batch"),
            number("tokens_per_s"),
            number("least"),
            number("most"),
        )?;
    }
    if let Some(peak) = peak {
        writeln!(out, "peak memory {}", BinaryBytes(peak))?;
    }
    Ok(())
}

/// Times an encoder: whole batches of random tokens, up to the mean over each sequence.
fn run_encoder(args: &BenchArgs, files: &ModelFiles, options: &LoadOptions) -> anyhow::Result<()> {
    let begin = Instant::now();
    let model = AutoModel::from_files(files, options)?;
    let load_s = begin.elapsed().as_secs_f64();
    let vocab = (model.config.json.get("vocab_size").and_then(Value::as_u64)).unwrap_or(1000) as usize;

    let mut rows = Vec::new();
    for tokens in &args.prompt_tokens {
        for batch in &args.batch {
            let ids: Vec<Vec<u32>> = prompts(vocab, *batch, *tokens);
            let inputs = EncoderInputs::padded(&ids, 0);
            let forward = || -> anyhow::Result<f64> {
                let begin = Instant::now();
                let x = model.forward(&inputs)?.last_hidden_state;
                x.mean_dim(1).into_data();
                Ok(begin.elapsed().as_secs_f64())
            };
            let mut seconds = repeat(args.rounds, forward)?;
            seconds.sort_by(f64::total_cmp);
            let median = seconds.get(seconds.len() / 2).copied().unwrap_or_default();
            rows.push(json!({
                "what": "forward", "tokens": tokens, "batch": batch, "ms": median * 1e3,
                "least_ms": seconds.first().map(|s| s * 1e3), "most_ms": seconds.last().map(|s| s * 1e3),
                "sequences_per_s": *batch as f64 / median, "tokens_per_s": (batch * tokens) as f64 / median,
            }));
        }
    }
    let peak = peak_memory();
    let mut out = io::stdout().lock();
    if args.json {
        let report = json!({
            "model": files.name(), "load_s": load_s, "peak_memory": peak, "threads": args.run.threads, "runs": rows,
        });
        return Ok(writeln!(out, "{report:#}")?);
    }
    writeln!(out, "{}\nload  {load_s:.3} s", files.name())?;
    let columns = [
        "tokens",
        "batch",
        "ms",
        "least_ms",
        "most_ms",
        "sequences_per_s",
        "tokens_per_s",
    ];
    writeln!(
        out,
        "{}",
        columns
            .map(|name| format!("{:>12}", name.replace("_per_", "/").replace("sequences", "seqs")))
            .join("")
    )?;
    for row in rows {
        let number = |name: &str| row[name].as_f64().unwrap_or_default();
        let digits = |name: &str| if matches!(name, "tokens" | "batch") { 0 } else { 1 };
        writeln!(
            out,
            "{}",
            columns
                .map(|name| format!("{:>12.*}", digits(name), number(name)))
                .join("")
        )?;
    }
    if let Some(peak) = peak {
        writeln!(out, "peak memory {}", BinaryBytes(peak))?;
    }
    Ok(())
}

struct Run {
    prompt_s: f64,
    decode_s: f64,
}

/// One run that counts is after one that does not.
fn repeat<T>(rounds: usize, run: impl Fn() -> anyhow::Result<T>) -> anyhow::Result<Vec<T>> {
    run()?;
    (0..rounds).map(|_| run()).collect()
}

/// Median, least and most of the rates.
fn row(what: &str, tokens: usize, batch: usize, rates: impl Iterator<Item = f64>) -> Value {
    let mut rates: Vec<f64> = rates.collect();
    rates.sort_by(f64::total_cmp);
    json!({
        "what": what, "tokens": tokens, "batch": batch,
        "tokens_per_s": rates.get(rates.len() / 2), "least": rates.first(), "most": rates.last(),
    })
}

/// Continues `batch` prompts of `prompt` tokens by `new` tokens each.
fn time(
    model: &LanguageModel,
    cache: CacheArgs,
    prompt: usize,
    batch: usize,
    new: usize,
) -> anyhow::Result<Run> {
    let config = cache.apply(GenerationConfig {
        max_new_tokens: Some(new),
        // As many tokens as asked for.
        eos_token_id: Vec::new(),
        ..GenerationConfig::default()
    });
    let prompts = prompts(model.model.vocab_size(), batch, prompt);
    let mut generation = oxiformers::Generator::new(&model.model, config).start(&prompts, None)?;
    let begin = Instant::now();
    let mut prompt_s = None;
    loop {
        match block_on(generation.step())? {
            Step::Prompt { .. } => {}
            Step::Tokens(_) => {
                prompt_s.get_or_insert_with(|| begin.elapsed().as_secs_f64());
            }
            Step::Done => break,
        }
    }
    let total_s = begin.elapsed().as_secs_f64();
    let prompt_s = prompt_s.unwrap_or(total_s);
    Ok(Run {
        prompt_s,
        decode_s: total_s - prompt_s,
    })
}

/// `batch` rows of `tokens` tokens: any will do, and different ones in each row.
fn prompts(vocab: usize, batch: usize, tokens: usize) -> Vec<Vec<u32>> {
    let id = |row, i| ((i * 7919 + row * 104_729 + 11) % vocab) as u32;
    (0..batch)
        .map(|row| (0..tokens).map(|i| id(row, i)).collect())
        .collect()
}

/// The most memory that this process has held, in bytes, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}
