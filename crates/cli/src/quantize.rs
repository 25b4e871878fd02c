//! `oxiformers quantize`: a model with fewer bits per weight.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use anyhow::bail;
use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};
use oxiformers::hub::checkpoint::{Checkpoint, DType, TensorInfo};
use oxiformers::hub::{ModelFiles, OutputFile};
use oxiformers::models::quantize::{PlannedTensor, QuantizePlan};
use oxiformers::quant::gguf::{FileType, ImportanceMatrix, Plan};
use oxiformers::quant::{MethodOptions, QuantizationConfig, Recipe};
use oxiformers::{AutoConfig, ChatTemplate, LanguageModel, Tokenizer, device};
use serde_json::{Map, Value, json};

use crate::args::{Dtype, Method, QuantizeArgs};
use crate::{interrupt, session};

mod calibrated;

pub fn run(args: &QuantizeArgs) -> anyhow::Result<()> {
    if let Some(threads) = args.threads {
        device::set_threads(threads.into());
    }
    match &args.method {
        Method::Gguf(ty) => gguf(args, *ty),
        Method::Named(name) => folder(args, name),
    }
}

/// What becomes of the modules of a model.
fn recipe(args: &QuantizeArgs, name: &str) -> anyhow::Result<Recipe> {
    let more = &args.calibration;
    let options = MethodOptions {
        block_size: args.block_size,
        double_quant: args.double_quant,
        bits: more.bits,
        group_size: more.group_size,
        sym: (more.sym || more.no_sym).then_some(!more.no_sym),
        desc_act: more.desc_act,
        act_group_aware: more.no_act_group_aware.then_some(false),
        static_groups: more.static_groups,
        true_sequential: more.no_true_sequential.then_some(false),
        damp_percent: more.damp_percent,
        mse: more.mse,
    };
    let mut config = QuantizationConfig::named(name, &options)?;
    if !args.skip.is_empty() {
        config.skip(args.skip.clone());
    }
    let overrides = args.overrides.iter().map(|(pattern, name)| {
        let config = match name.as_str() {
            "none" => None,
            name => {
                let config = QuantizationConfig::named(name, &MethodOptions::default())?;
                if config.is_calibrated() {
                    bail!(
                        "--override: {name} is calibrated, which only the method of the whole model can be"
                    );
                }
                Some(config)
            }
        };
        Ok((pattern.clone(), config))
    });
    Ok(Recipe {
        config,
        overrides: overrides.collect::<anyhow::Result<_>>()?,
    })
}

fn folder(args: &QuantizeArgs, name: &str) -> anyhow::Result<()> {
    if args.imatrix.is_some() {
        bail!("--imatrix is for gguf:TYPE; {name} does not look at it");
    }
    let files = session::files(Some(&args.model))?;
    let dtype = match args.dtype {
        Dtype::Auto => None,
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::Bf16 => Some(DType::BF16),
    };
    let recipe = recipe(args, name)?;
    if args.calibration.text.is_some() && !recipe.config.is_calibrated() {
        bail!("--calibration is for gptq, awq and gguf:TYPE; {name} does not look at it");
    }
    let plan = QuantizePlan::new(&files, recipe.clone(), dtype)?;
    let tensors: Vec<PlannedTensor> = plan.tensors().collect();
    let after: usize = tensors.iter().map(|tensor| tensor.num_bytes).sum();
    let sizes = format!(
        "{} instead of {}",
        DecimalBytes(after as u64),
        DecimalBytes(plan.num_bytes_read() as u64)
    );
    let Some(output) = args.output.as_deref().filter(|_| !args.dry_run) else {
        let mut out = io::stdout().lock();
        for tensor in &tensors {
            writeln!(out, "{:<56} {:<6} {:?}", tensor.name, tensor.scheme, tensor.shape)?;
        }
        writeln!(out, "{sizes}")?;
        return Ok(());
    };
    let is_new = !output.exists();
    let occupied = output.is_dir() && std::fs::read_dir(output)?.next().is_some();
    if (occupied || output.is_file()) && !args.force {
        bail!(
            "{} is there already; write to another folder, or use --force",
            output.display()
        );
    }
    let calibrated = if recipe.config.is_calibrated() {
        Some(calibrated::Calibrated::new(args, &files, &recipe, output)?)
    } else {
        None
    };
    let bar = progress(plan.num_bytes_read());
    // What is half-written is removed before the program ends.
    interrupt::watch();
    let told = |bytes: usize| {
        bar.inc(bytes as u64);
        !interrupt::happened()
    };
    let done = match &calibrated {
        Some(calibrated) => plan.write_calibrated(calibrated.source(), output, args.max_shard_size, told),
        None => plan.write(output, args.max_shard_size, told),
    };
    bar.finish_and_clear();
    if done.is_err() && is_new {
        // Nothing is left in it; if it cannot be removed, that is not what went wrong.
        let _ = std::fs::remove_dir(output);
    }
    done?;
    interrupt::unwatch();
    if let Some(calibrated) = calibrated {
        calibrated.finish();
    }
    if files.gguf().is_some() {
        write_tokenizer(&files, output)?;
    }
    eprintln!(
        "{}: {sizes}; tensors: {}",
        output.display(),
        counts(tensors.iter().map(|tensor| tensor.scheme.clone()))
    );
    Ok(())
}

/// What a GGUF knows besides weights as the files that a folder has: the tokenizer, its special tokens, chat templates, and
/// where answers end.
fn write_tokenizer(files: &ModelFiles, output: &Path) -> anyhow::Result<()> {
    let written = Tokenizer::from_files(files).and_then(|tokenizer| {
        let json = tokenizer.to_json(true)?;
        Ok((tokenizer, json))
    });
    let (tokenizer, json) = match written {
        Ok(written) => written,
        Err(error) => {
            eprintln!("no tokenizer.json was written: {error}");
            return Ok(());
        }
    };
    let write = |name: &str, text: &str| -> anyhow::Result<()> {
        let path = output.join(name);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut file = OutputFile::create(&path)?;
        file.write_all(text.as_bytes())?;
        Ok(file.finish()?)
    };
    write("tokenizer.json", &json)?;
    let mut settings = tokenizer.special_tokens_map();
    let known = tokenizer.config();
    settings.insert("tokenizer_class".to_string(), json!("PreTrainedTokenizerFast"));
    settings.insert("clean_up_tokenization_spaces".to_string(), json!(false));
    for (name, value) in [
        ("add_bos_token", json!(known.add_bos_token)),
        ("add_eos_token", json!(known.add_eos_token)),
        (
            "model_max_length",
            json!(
                AutoConfig::from_files(files)?
                    .architecture
                    .max_position_embeddings()
            ),
        ),
    ] {
        if !value.is_null() {
            settings.insert(name.to_string(), value);
        }
    }
    write(
        "tokenizer_config.json",
        &format!("{:#}\n", Value::Object(settings)),
    )?;
    if let Some(template) = ChatTemplate::from_files(files, &tokenizer)? {
        for (name, source) in template.sources() {
            match name {
                "default" => write("chat_template.jinja", source)?,
                name => write(&format!("additional_chat_templates/{name}.jinja"), source)?,
            }
        }
    }
    let config = LanguageModel::generation_config_of(files, &tokenizer)?;
    let mut settings = Map::new();
    for (name, id) in [
        ("bos_token_id", json!(tokenizer.bos_token_id())),
        (
            "eos_token_id",
            match config.eos_token_id.as_slice() {
                [] => Value::Null,
                [one] => json!(one),
                several => json!(several),
            },
        ),
        ("pad_token_id", json!(tokenizer.pad_token_id())),
    ] {
        if !id.is_null() {
            settings.insert(name.to_string(), id);
        }
    }
    write(
        "generation_config.json",
        &format!("{:#}\n", Value::Object(settings)),
    )
}

fn progress(bytes: usize) -> ProgressBar {
    let bar = ProgressBar::new(bytes as u64);
    if let Ok(style) = ProgressStyle::with_template("quantizing [{bar:30}] {bytes}/{total_bytes} {eta}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// How often each name is there.
fn counts(names: impl Iterator<Item = String>) -> String {
    let mut all: BTreeMap<String, usize> = BTreeMap::new();
    for name in names {
        *all.entry(name).or_default() += 1;
    }
    let all: Vec<_> = all
        .iter()
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    all.join(", ")
}

fn gguf(args: &QuantizeArgs, ty: FileType) -> anyhow::Result<()> {
    let files = session::files(Some(&args.model))?;
    let checkpoint = Checkpoint::open(&files)?;
    let stored = |info: &TensorInfo| info.dtype.num_bytes(&info.shape).unwrap_or(0);
    let before: usize = checkpoint.tensors().map(stored).sum();
    let importance = match (&args.imatrix, &args.calibration.text) {
        (Some(file), _) => Some(ImportanceMatrix::open(&ModelFiles::from_file(file)?)?),
        (None, Some(_)) if checkpoint.gguf().is_some() => Some(calibrated::importance(args, &files)?),
        (None, _) => None,
    };
    let plan = Plan::new(checkpoint, ty, &args.tensor_type, importance)?;
    let Some(output) = args.output.as_deref().filter(|_| !args.dry_run) else {
        return describe(&plan, before);
    };
    write(&plan, output, args.force)?;
    eprintln!(
        "{}: {} instead of {}; tensors: {}",
        output.display(),
        DecimalBytes(plan.num_bytes() as u64),
        DecimalBytes(before as u64),
        counts(plan.tensors().iter().map(|info| info.dtype.name()))
    );
    Ok(())
}

/// Which tensor gets which type.
fn describe(plan: &Plan, before: usize) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    for info in plan.tensors() {
        writeln!(out, "{:<56} {:<6} {:?}", info.name, info.dtype.name(), info.shape)?;
    }
    let (after, before) = (DecimalBytes(plan.num_bytes() as u64), DecimalBytes(before as u64));
    writeln!(out, "{after} instead of {before}")?;
    Ok(())
}

fn write(plan: &Plan, output: &Path, force: bool) -> anyhow::Result<()> {
    if output.exists() && !force {
        bail!(
            "{} is there already; write to another file, or use --force",
            output.display()
        );
    }
    let bar = progress(plan.num_bytes());
    let mut file = OutputFile::create(output)?;
    // What is half-written is removed before the program ends.
    interrupt::watch();
    let done = plan.write(&mut file, &output.display().to_string(), |bytes| {
        bar.inc(bytes as u64);
        !interrupt::happened()
    });
    bar.finish_and_clear();
    done?;
    interrupt::unwatch();
    Ok(file.finish()?)
}
