//! What all commands that run a model share: finding it, loading it, and how it generates.

use oxiformers::hub::{Bars, FetchOptions, ModelFiles, Source, default_chat_model, resolve};
use oxiformers::nn::LoadOptions;
use oxiformers::{GenerationConfig, LanguageModel, device};

use crate::args::{Dtype, RunArgs, SamplingArgs};

/// Where models come from, with progress bars.
pub fn fetch_options() -> FetchOptions {
    FetchOptions::from_env().with_progress(Bars::new())
}

/// The files of a model; SmolLM2-135M-Instruct when none is named.
pub fn files(model: Option<&str>) -> anyhow::Result<ModelFiles> {
    let options = fetch_options();
    Ok(match model {
        Some(model) => resolve(&model.parse::<Source>()?, &options)?,
        None => default_chat_model(&options, &mut |line| eprintln!("{line}"))?,
    })
}

/// Loads a model.
pub fn load(model: Option<&str>, run: &RunArgs) -> anyhow::Result<LanguageModel> {
    if let Some(threads) = run.threads {
        device::set_threads(threads.into());
    }
    let dtype = match run.dtype {
        Dtype::Auto => None,
        Dtype::F32 => Some(oxiformers::FloatDType::F32),
        Dtype::F16 => Some(oxiformers::FloatDType::F16),
        Dtype::Bf16 => Some(oxiformers::FloatDType::BF16),
    };
    let options = LoadOptions {
        device: device::parse(&run.device)?,
        dtype,
    };
    let files = files(model)?;
    Ok(LanguageModel::from_files(&files, &options)?)
}

impl SamplingArgs {
    /// The model's settings, changed as the command line says.
    pub fn apply(&self, mut config: GenerationConfig) -> anyhow::Result<GenerationConfig> {
        if self.max_new_tokens.is_some() {
            config.max_new_tokens = self.max_new_tokens;
        }
        let draws = self.temperature.is_some()
            || self.top_k.is_some()
            || self.top_p.is_some()
            || self.min_p.is_some();
        config.do_sample = !self.greedy && (config.do_sample || draws);
        config.temperature = self.temperature.unwrap_or(config.temperature);
        config.top_k = self.top_k.unwrap_or(config.top_k);
        config.top_p = self.top_p.unwrap_or(config.top_p);
        config.min_p = self.min_p.or(config.min_p);
        config.repetition_penalty = self.repetition_penalty.unwrap_or(config.repetition_penalty);
        config.num_beams = self.num_beams.unwrap_or(config.num_beams);
        config.stop_strings.extend(self.stop.iter().cloned());
        config.seed = self.seed.or(config.seed);
        config.validate()?;
        Ok(config)
    }
}
