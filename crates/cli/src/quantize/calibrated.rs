//! Quantization that looks at a text first.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use oxiformers::Tokenizer;
use oxiformers::hub::ModelFiles;
use oxiformers::models::calibration::{Calibration, CalibrationError, ModuleReport, run, samples};
use oxiformers::nn::TensorSource;
use oxiformers::quant::Recipe;

use crate::args::QuantizeArgs;
use crate::interrupt;

/// A model whose layers are quantized, and where they wait to be written.
pub struct Calibrated {
    calibration: Calibration,
    work: PathBuf,
}

/// Steps of a layer that the bar knows.
const STEPS: f32 = 100.0;

impl Calibrated {
    /// Quantizes the layers of a model that is to be written to `output`. What was done before the last time it was
    /// stopped is used again.
    pub fn new(
        args: &QuantizeArgs,
        files: &ModelFiles,
        recipe: &Recipe,
        output: &Path,
    ) -> anyhow::Result<Self> {
        let name = recipe.config.method();
        let options = &args.calibration;
        let path = options.text.as_deref().ok_or_else(|| {
            anyhow!("{name} looks at what weights are multiplied with; give a text like those that the model will read, with --calibration FILE")
        })?;
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let ids = Tokenizer::from_files(files)?.encode(&text, false)?;
        let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
        let samples = samples(&ids, options.seq_len, options.num_samples)
            .with_context(|| path.display().to_string())?;
        eprintln!(
            "{}: {} samples of {} tokens, of {} in all",
            path.display(),
            samples.len(),
            options.seq_len,
            ids.len()
        );
        let folder = output
            .file_name()
            .ok_or_else(|| anyhow!("{}: is no name of a folder", output.display()))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(folder);
        hidden.push(".calibration");
        let work = output.with_file_name(hidden);
        let bar = ProgressBar::new(0);
        if let Ok(style) =
            ProgressStyle::with_template("layer {msg} [{bar:30}] {percent}% {elapsed} {eta} left")
        {
            bar.set_style(style.progress_chars("=> "));
        }
        interrupt::watch();
        let done = run(files, recipe, &samples, &work, &mut |progress| {
            bar.set_length((STEPS * progress.layers as f32) as u64);
            bar.set_position((STEPS * (progress.layer as f32 + progress.done)) as u64);
            bar.set_message(format!("{} of {}", progress.layer + 1, progress.layers));
            !interrupt::happened()
        });
        bar.finish_and_clear();
        interrupt::unwatch();
        let (calibration, modules) = match done {
            Err(CalibrationError::Interrupted) => bail!(
                "interrupted; layers that are done are in {}, and the same command goes on from there",
                work.display()
            ),
            done => done?,
        };
        modules.iter().for_each(note);
        Ok(Self { calibration, work })
    }

    /// The tensors of the model.
    pub fn source(&self) -> &dyn TensorSource {
        self.calibration.source()
    }

    /// Removes what is not needed once the model is written.
    pub fn finish(self) {
        drop(self.calibration);
        if let Err(error) = std::fs::remove_dir_all(&self.work) {
            eprintln!("{}: {error}; it can be removed", self.work.display());
        }
    }
}

fn note(module: &ModuleReport) {
    if let Some(note) = &module.note {
        eprintln!("{}: {note}", module.module);
    }
}
