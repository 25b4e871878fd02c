//! `oxiformers adapter`: PEFT's adapters merged, combined and described.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use anyhow::bail;
use indicatif::{DecimalBytes, HumanCount};
use oxiformers::hub::ModelFiles;
use oxiformers::hub::checkpoint::DType;
use oxiformers::peft::combine::{Combination, combine, draws};
use oxiformers::peft::{Adapter, Method, merge, save};
use oxiformers::with_base;
use serde_json::json;

use crate::args::{AdapterCommand, Dtype};
use crate::{interrupt, session};

pub fn run(command: &AdapterCommand) -> anyhow::Result<()> {
    match command {
        AdapterCommand::Merge {
            model,
            adapters,
            output,
            dtype,
            force,
        } => {
            vacant(output, *force)?;
            let find = |name: &str| session::files(Some(name));
            let (files, own) = with_base::<anyhow::Error>(session::files(Some(model))?, find)?;
            let given = adapters
                .iter()
                .map(|given| session::adapter(given).map(Into::into));
            let adapters = own
                .into_iter()
                .map(Ok)
                .chain(given)
                .collect::<anyhow::Result<Vec<_>>>()?;
            let dtype = match dtype {
                Dtype::Auto => None,
                Dtype::F32 => Some(DType::F32),
                Dtype::F16 => Some(DType::F16),
                Dtype::Bf16 => Some(DType::BF16),
            };
            interrupt::watch();
            let merged = merge::merge(&files, &adapters, output, dtype, || !interrupt::happened())?;
            println!("{}: {merged} tensors changed", output.display());
            Ok(())
        }
        AdapterCommand::Inspect {
            adapter,
            json,
            tensors,
        } => inspect(&session::files(Some(adapter))?, *json, *tensors),
        AdapterCommand::Combine {
            adapters,
            output,
            combination_type,
            density,
            svd_rank,
            svd_clamp,
            majority_sign_method,
            seed,
            force,
        } => {
            vacant(output, *force)?;
            let read = adapters.iter().map(|given| session::adapter(given));
            let adapters = read.collect::<anyhow::Result<Vec<_>>>()?;
            let weights = adapters.iter().map(|adapter| adapter.switch().weight()).collect();
            let combination = Combination {
                density: *density,
                svd_rank: *svd_rank,
                svd_clamp: *svd_clamp,
                majority_sign_method: *majority_sign_method,
                ..Combination::new(*combination_type, weights)
            };
            let adapters: Vec<&Adapter> = adapters.iter().collect();
            let (config, tensors) = combine(&adapters, &combination, &mut draws(*seed))?;
            save::save(output, &config, &tensors)?;
            inspect(&ModelFiles::from_dir(output)?, false, false)
        }
    }
}

fn vacant(output: &Path, force: bool) -> anyhow::Result<()> {
    let occupied = output.is_dir() && std::fs::read_dir(output)?.next().is_some();
    if (occupied || output.is_file()) && !force {
        bail!(
            "{} is there already; write to another folder, or use --force",
            output.display()
        );
    }
    Ok(())
}

/// Says what an adapter is made of.
pub fn inspect(files: &ModelFiles, as_json: bool, with_tensors: bool) -> anyhow::Result<()> {
    let adapter = Adapter::from_files(files, files.name())?;
    let config = adapter.config();
    let (mut parameters, mut bytes) = (0usize, 0usize);
    // Modules by the last component of their names.
    let mut modules: BTreeMap<&str, usize> = BTreeMap::new();
    let mut saved = Vec::new();
    const ENDINGS: [&str; 4] = [".lora_A.weight", ".lora_embedding_A", ".ia3_l", ".vera_lambda_b"];
    for (name, view) in adapter.tensors() {
        parameters += view.shape.iter().product::<usize>();
        bytes += view.data.len();
        match ENDINGS.iter().find_map(|ending| name.strip_suffix(ending)) {
            Some(module) => {
                *modules
                    .entry(module.rsplit('.').next().unwrap_or(module))
                    .or_default() += 1
            }
            None if ![".lora_", ".vera_", "vera_", "prompt_embeddings"]
                .iter()
                .any(|part| name.contains(part)) =>
            {
                saved.push(name.as_str());
            }
            None => {}
        }
    }
    let rank = match &config.method {
        Method::Lora(config) => Some(config.r),
        Method::Vera(config) => Some(config.r),
        _ => None,
    };
    let virtual_tokens = match &config.method {
        Method::PromptTuning(config) | Method::PTuning(config) | Method::PrefixTuning(config) => {
            Some(config.num_virtual_tokens)
        }
        _ => None,
    };
    let mut out = io::stdout().lock();
    if as_json {
        let report = json!({
            "adapter": files.name(),
            "peft_type": config.peft_type(),
            "base_model": config.base_model_name_or_path,
            "task_type": config.task_type,
            "parameters": parameters,
            "bytes": bytes,
            "rank": rank,
            "num_virtual_tokens": virtual_tokens,
            "modules": modules,
            "saved": saved,
            "config": config.to_json()?,
        });
        writeln!(out, "{report:#}")?;
    } else {
        writeln!(out, "{}", files.name())?;
        let kind = match &config.method {
            Method::Lora(config) if config.use_dora => "LORA (DoRA)",
            Method::Lora(config) if config.use_rslora => "LORA (rsLoRA)",
            _ => config.peft_type(),
        };
        writeln!(out, "adapter        {kind}")?;
        let base = config.base_model_name_or_path.as_deref().unwrap_or("not named");
        writeln!(out, "base model     {base}")?;
        if let Some(task) = &config.task_type {
            writeln!(out, "task           {task}")?;
        }
        writeln!(out, "parameters     {}", HumanCount(parameters as u64))?;
        writeln!(out, "weights        {}", DecimalBytes(bytes as u64))?;
        if let Some(rank) = rank {
            writeln!(out, "rank           {rank}")?;
        }
        if let Some(count) = virtual_tokens {
            writeln!(out, "virtual tokens {count}")?;
        }
        for (name, count) in &modules {
            writeln!(out, "  {name:<20} {count} modules")?;
        }
        for name in &saved {
            writeln!(out, "  {name:<20} whole")?;
        }
    }
    if with_tensors {
        for (name, view) in adapter.tensors() {
            writeln!(out, "{name:<72} {:<6} {:?}", view.dtype.name(), view.shape)?;
        }
    }
    Ok(())
}
