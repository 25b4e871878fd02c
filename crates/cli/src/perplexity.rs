//! `oxiformers perplexity`: how well a model predicts a text.

use std::io::{self, Read, Write};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use oxiformers::{CausalLM, GenerationConfig, PerplexityOptions, perplexity_with};
use serde_json::json;

use crate::args::PerplexityArgs;
use crate::session;

pub fn run(args: &PerplexityArgs) -> anyhow::Result<()> {
    let text = if args.text.as_os_str() == "-" {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).context("standard input")?;
        text
    } else {
        std::fs::read_to_string(&args.text).with_context(|| args.text.display().to_string())?
    };
    let model = session::load(Some(&args.model), &args.run)?;
    let ids = model.tokenizer.encode(&text, true)?;
    if ids.len() < 2 {
        bail!(
            "{}: the text has {} tokens; it takes two to predict one",
            args.text.display(),
            ids.len()
        );
    }
    let window = args.ctx.map_or(ids.len(), |n| n as usize);
    if let Some(limit) = model
        .max_positions()
        .filter(|limit| window.min(ids.len()) > *limit)
    {
        bail!(
            "{}: the text has {} tokens and the model was made for {limit}; cut it into windows with --ctx {limit}",
            args.text.display(),
            ids.len()
        );
    }
    let bar = ProgressBar::new(ids.len() as u64).with_style(
        ProgressStyle::with_template("{bar:30} {pos}/{len} tokens, {per_sec}, {eta} left")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let precision = args.cache.apply(GenerationConfig::default()).cache_precision()?;
    let options = PerplexityOptions {
        window,
        chunk: args.chunk,
        cache_precision: precision.unwrap_or(model.model.cache_precision()),
    };
    let progress = |done| bar.set_position(done as u64);
    let result = oxiformers::block_on(perplexity_with(&model.model, &ids, options, progress))?;
    bar.finish_and_clear();
    let mut out = io::stdout().lock();
    if args.json {
        let report = json!({
            "tokens": result.tokens, "nll": result.nll, "perplexity": result.perplexity(),
            "cache_bytes": result.cache_bytes,
        });
        writeln!(out, "{report}")?;
    } else {
        writeln!(
            out,
            "{} tokens, mean negative log-likelihood {:.6}, perplexity {:.4}",
            result.tokens,
            result.nll,
            result.perplexity()
        )?;
    }
    Ok(())
}
