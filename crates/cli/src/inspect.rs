//! `oxiformers inspect`: what a model is made of.

use std::collections::BTreeMap;
use std::io::{self, Write};

use indicatif::{DecimalBytes, HumanCount};
use oxiformers::hub::checkpoint::Checkpoint;
use oxiformers::models::registry::Kind;
use oxiformers::{AutoConfig, ChatTemplate, Tokenizer};
use serde_json::{Value, json};

use crate::args::InspectArgs;
use crate::session;

pub fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let files = session::files(Some(&args.model))?;
    let config = AutoConfig::from_files(&files)?;
    let checkpoint = Checkpoint::open(&files)?;
    let tokenizer = Tokenizer::from_files(&files);
    let template = match &tokenizer {
        Ok(tokenizer) => ChatTemplate::from_files(&files, tokenizer)?,
        Err(_) => None,
    };

    let (mut parameters, mut bytes) = (0usize, 0usize);
    let mut dtypes: BTreeMap<String, usize> = BTreeMap::new();
    for tensor in checkpoint.tensors() {
        let count: usize = tensor.shape.iter().product();
        parameters += count;
        bytes += tensor.dtype.num_bytes(&tensor.shape).unwrap_or(0);
        *dtypes.entry(tensor.dtype.name()).or_default() += count;
    }
    let cache = cache_bytes_per_token(&config.json).filter(|_| config.architecture.kind() != Kind::Encoder);
    let context = config.architecture.max_position_embeddings();
    let report = json!({
        "model": files.name(),
        "architecture": config.model_type,
        "parameters": parameters,
        "tensors": checkpoint.tensors().count(),
        "dtypes": dtypes,
        "weight_bytes": bytes,
        "kv_cache_bytes_per_token": cache,
        "max_position_embeddings": context,
        "vocab_size": tokenizer.as_ref().ok().map(Tokenizer::vocab_size),
        "chat_templates": template.as_ref().map(|template| template.names().collect::<Vec<_>>()),
        "config": config.json,
    });
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{report:#}")?;
    } else {
        writeln!(out, "{}", files.name())?;
        writeln!(out, "architecture   {}", config.model_type)?;
        writeln!(out, "parameters     {}", HumanCount(parameters as u64))?;
        for (name, count) in &dtypes {
            writeln!(
                out,
                "  {name:<12} {:>5.1}%",
                *count as f64 / parameters.max(1) as f64 * 100.0
            )?;
        }
        writeln!(out, "weights        {}", DecimalBytes(bytes as u64))?;
        if let Some(cache) = cache {
            write!(
                out,
                "kv cache       {} per 1,000 tokens",
                DecimalBytes(cache * 1000)
            )?;
            match context {
                Some(context) => writeln!(
                    out,
                    ", {} for all {context}",
                    DecimalBytes(cache * context as u64)
                )?,
                None => writeln!(out)?,
            }
        }
        match &tokenizer {
            Ok(tokenizer) => writeln!(out, "vocabulary     {} tokens", tokenizer.vocab_size())?,
            Err(error) => writeln!(out, "vocabulary     none ({error})")?,
        }
        match &template {
            Some(template) => {
                writeln!(
                    out,
                    "chat template  {}",
                    template.names().collect::<Vec<_>>().join(", ")
                )?;
                let (_, source) = template.select(&Default::default())?;
                writeln!(out, "\n{source}")?;
            }
            None => writeln!(out, "chat template  none")?,
        }
    }
    if args.tensors {
        for tensor in checkpoint.tensors() {
            writeln!(
                out,
                "{:<56} {:<6} {:?}",
                tensor.name,
                tensor.dtype.name(),
                tensor.shape
            )?;
        }
    }
    Ok(())
}

/// Keys and values in f32, if the configuration has the usual fields.
fn cache_bytes_per_token(config: &Value) -> Option<u64> {
    let field = |names: &[&str]| names.iter().find_map(|name| config.get(name)?.as_u64());
    let layers = field(&["num_hidden_layers", "n_layer", "n_layers", "num_layers"])?;
    let heads = field(&["num_attention_heads", "n_head", "n_heads"])?;
    let hidden = field(&["hidden_size", "n_embd", "d_model"])?;
    let kv_heads = field(&["num_key_value_heads"]).unwrap_or(heads);
    let head_dim = field(&["head_dim"]).or_else(|| hidden.checked_div(heads))?;
    Some(2 * layers * kv_heads * head_dim * 4)
}
