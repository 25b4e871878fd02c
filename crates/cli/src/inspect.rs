//! `oxiformers inspect`: what a model is made of.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;

use anyhow::Context;
use indicatif::{DecimalBytes, HumanCount};
use oxiformers::hub::checkpoint::Checkpoint;
use oxiformers::models::memory::Memory;
use oxiformers::models::quantize::survey_as;
use oxiformers::nn::{Role, SurveyedMatrix};
use oxiformers::quant::{MethodOptions, QuantizationConfig, Recipe};
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
    let method = match &args.quantize {
        Some(name) => Some(QuantizationConfig::named(name, &MethodOptions::default()).context("--quantize")?),
        None => None,
    };
    let recipe = method.map(Recipe::from);
    let matrices = survey_as(&files, recipe.clone().map(Arc::new))?;
    let quantization = recipe.as_ref().or(config.quantization.as_ref());

    let mut bytes = 0usize;
    let mut dtypes: BTreeMap<String, usize> = BTreeMap::new();
    for tensor in checkpoint.tensors() {
        bytes += tensor.dtype.num_bytes(&tensor.shape).unwrap_or(0);
        *dtypes.entry(tensor.dtype.name()).or_default() += tensor.shape.iter().product::<usize>();
    }
    let schemes = Scheme::of(&matrices);
    // Codes and scales are no parameters: the matrices that they stand for are.
    let parameters = match config.quantization {
        Some(_) => schemes.values().map(|scheme| scheme.parameters).sum(),
        None => dtypes.values().sum::<usize>(),
    };
    let context = args
        .context
        .or_else(|| config.architecture.max_position_embeddings());
    let memory = Memory::of(&files, &config, &matrices)?;
    let tokens = context.unwrap_or(2048);
    let (cache, activations) = (
        memory.cache(tokens, args.batch),
        memory.activations(tokens, args.batch),
    );
    let report = json!({
        "model": files.name(),
        "architecture": config.model_type,
        "parameters": parameters,
        "tensors": checkpoint.tensors().count(),
        "dtypes": dtypes,
        "weight_bytes": bytes,
        "quantization": quantization.map(Recipe::to_json),
        "schemes": schemes.iter().map(|(name, scheme)| scheme.json(name)).collect::<Vec<_>>(),
        "kept": kept(&matrices, quantization.is_some()),
        "memory": {
            "context": tokens,
            "batch": args.batch,
            "weights": memory.weights,
            "kv_cache": cache,
            "activations": activations,
            "total": memory.weights + cache + activations,
        },
        "kv_cache_bytes_per_token": Some(memory.cache(1, 1)).filter(|bytes| *bytes > 0),
        "max_position_embeddings": config.architecture.max_position_embeddings(),
        "vocab_size": tokenizer.as_ref().ok().map(Tokenizer::vocab_size),
        "chat_templates": template.as_ref().map(|template| template.names().collect::<Vec<_>>()),
        "modules": args.modules.then(|| modules(&matrices)),
        "config": config.json,
    });
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{report:#}")?;
    } else {
        writeln!(out, "{}", files.name())?;
        writeln!(out, "architecture   {}", config.model_type)?;
        writeln!(out, "parameters     {}", HumanCount(parameters as u64))?;
        writeln!(out, "weights        {}", size(bytes))?;
        for (name, scheme) in &schemes {
            let (matrices, bits) = (scheme.matrices, scheme.bits());
            let part = scheme.parameters as f64
                / schemes.values().map(|s| s.parameters).sum::<usize>().max(1) as f64;
            writeln!(
                out,
                "  {name:<12} {:>5.1}%   {bits:>5.2} bits a weight, {matrices} matrices",
                100.0 * part
            )?;
        }
        if let Some(quantization) = quantization {
            writeln!(
                out,
                "quantization   {}",
                summary(quantization.config.method(), &quantization.to_json())
            )?;
            let kept = kept(&matrices, true);
            if !kept.is_empty() {
                writeln!(out, "  as they are  {}", kept.join(", "))?;
            }
        }
        let total = memory.weights + cache + activations;
        let sequences = match args.batch {
            1 => String::new(),
            batch => format!("{batch} x "),
        };
        writeln!(
            out,
            "memory         {}: weights {}, kv cache of {sequences}{tokens} tokens {}, activations about {}",
            size(total),
            size(memory.weights),
            size(cache),
            size(activations)
        )?;
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
        if args.modules {
            for module in modules(&matrices) {
                let text = |name: &str| module[name].as_str().unwrap_or_default().to_string();
                writeln!(
                    out,
                    "{:<56} {:>4} x {:<14} {:<8} {:>5.2} bits",
                    text("name"),
                    module["count"],
                    module["shape"].to_string(),
                    text("scheme"),
                    module["bits_per_weight"].as_f64().unwrap_or_default()
                )?;
            }
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

fn size(bytes: usize) -> DecimalBytes {
    DecimalBytes(bytes as u64)
}

/// The matrices that are stored one way.
#[derive(Default)]
struct Scheme {
    matrices: usize,
    parameters: usize,
    bytes: usize,
}

impl Scheme {
    fn of(matrices: &[SurveyedMatrix]) -> BTreeMap<&str, Self> {
        let mut all: BTreeMap<&str, Self> = BTreeMap::new();
        for matrix in matrices {
            let scheme = all.entry(&matrix.scheme).or_default();
            scheme.matrices += 1;
            scheme.parameters += matrix.shape.iter().product::<usize>();
            scheme.bytes += matrix.num_bytes;
        }
        all
    }

    fn bits(&self) -> f64 {
        bits(self.bytes, self.parameters)
    }

    fn json(&self, name: &str) -> Value {
        json!({
            "scheme": name,
            "matrices": self.matrices,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "bits_per_weight": self.bits(),
        })
    }
}

fn bits(bytes: usize, parameters: usize) -> f64 {
    8.0 * bytes as f64 / parameters.max(1) as f64
}

/// Linear layers of a quantized model that are stored as floats, those of all layers together.
fn kept(matrices: &[SurveyedMatrix], quantized: bool) -> Vec<String> {
    let float = |matrix: &&SurveyedMatrix| {
        quantized && matrix.role != Role::Kept && matches!(matrix.scheme.as_str(), "F32" | "F16" | "BF16")
    };
    let mut names: Vec<String> = Vec::new();
    for matrix in matrices.iter().filter(float) {
        let name = template(matrix.module());
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// A name without its numbers: the same in all layers.
fn template(name: &str) -> String {
    let each = name.split('.').map(|part| match part.parse::<usize>() {
        Ok(_) => "*",
        Err(_) => part,
    });
    each.collect::<Vec<_>>().join(".")
}

/// Matrices of the same name, shape and form together, in the order of the model.
fn modules(matrices: &[SurveyedMatrix]) -> Vec<Value> {
    let mut all: Vec<(String, [usize; 2], &str, usize, usize)> = Vec::new();
    for matrix in matrices {
        let name = template(matrix.module());
        let same = |known: &&mut (String, [usize; 2], &str, usize, usize)| {
            known.0 == name && known.1 == matrix.shape && known.2 == matrix.scheme
        };
        match all.iter_mut().find(same) {
            Some(known) => (known.3, known.4) = (known.3 + 1, known.4 + matrix.num_bytes),
            None => all.push((name, matrix.shape, &matrix.scheme, 1, matrix.num_bytes)),
        }
    }
    let module = |(name, shape, scheme, count, bytes): (String, [usize; 2], &str, usize, usize)| {
        json!({
            "name": name, "shape": shape, "scheme": scheme, "count": count, "bytes": bytes,
            "bits_per_weight": bits(bytes, count * shape[0] * shape[1]),
        })
    };
    all.into_iter().map(module).collect()
}

/// The method, and what the configuration says that it is.
fn summary(method: &str, config: &Value) -> String {
    let said = |(name, value): (&String, &Value)| {
        let silent = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(all) => all.is_empty(),
            Value::Object(all) => all.is_empty(),
            _ => name == "quant_method" || name == "meta",
        };
        let text = match value {
            Value::String(text) => text.clone(),
            value => value.to_string(),
        };
        (!silent && name != "meta").then(|| format!("{name} {text}"))
    };
    let fields: Vec<_> = config
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(said)
        .collect();
    match fields.is_empty() {
        true => method.to_string(),
        false => format!("{method}: {}", fields.join(", ")),
    }
}
