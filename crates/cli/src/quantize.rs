//! `oxiformers quantize`: a model with fewer bits per weight.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use anyhow::bail;
use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};
use oxiformers::device;
use oxiformers::hub::OutputFile;
use oxiformers::hub::checkpoint::Checkpoint;
use oxiformers::quant::gguf::{FileType, Plan};

use crate::args::{Method, QuantizeArgs};
use crate::{interrupt, session};

pub fn run(args: &QuantizeArgs) -> anyhow::Result<()> {
    if let Some(threads) = args.threads {
        device::set_threads(threads.into());
    }
    match args.method {
        Method::Gguf(ty) => gguf(args, ty),
    }
}

fn gguf(args: &QuantizeArgs, ty: FileType) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&session::files(Some(&args.model))?)?;
    let stored =
        |info: &oxiformers::hub::checkpoint::TensorInfo| info.dtype.num_bytes(&info.shape).unwrap_or(0);
    let before: usize = checkpoint.tensors().map(stored).sum();
    let plan = Plan::new(checkpoint, ty, &args.tensor_type)?;
    let Some(output) = args.output.as_deref().filter(|_| !args.dry_run) else {
        return describe(&plan, before);
    };
    write(&plan, output, args.force)?;
    let mut types: BTreeMap<String, usize> = BTreeMap::new();
    for info in plan.tensors() {
        *types.entry(info.dtype.name()).or_default() += 1;
    }
    let types: Vec<_> = types
        .iter()
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    eprintln!(
        "{}: {} instead of {}; tensors: {}",
        output.display(),
        DecimalBytes(plan.num_bytes() as u64),
        DecimalBytes(before as u64),
        types.join(", ")
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
    let bar = ProgressBar::new(plan.num_bytes() as u64);
    if let Ok(style) = ProgressStyle::with_template("quantizing [{bar:30}] {bytes}/{total_bytes} {eta}") {
        bar.set_style(style.progress_chars("=> "));
    }
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
