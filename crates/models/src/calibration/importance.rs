//! How much columns matter to a GGUF's matrices: how large what they are multiplied with is, over real texts.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::{Device, Int, Tensor, TensorData};
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::Checkpoint;
use oxiformers_nn::quant::gguf::ImportanceMatrix;
use oxiformers_nn::{CacheKind, LoadOptions, LogitsFor, Observer};

use super::{CalibrationError, Result, is_number};
use crate::{AutoConfig, AutoModelForCausalLM, CausalLM, Error, gguf};

/// Sums of squared inputs, by the names of weights.
#[derive(Debug, Default)]
struct Squares(Mutex<BTreeMap<String, (Vec<f64>, usize)>>);

impl Squares {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, (Vec<f64>, usize)>> {
        // A sum is never left half-done but where a kernel panics, which ends calibration.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Squares {
    fn observe(&self, name: &str, x: Tensor<2>) {
        let [rows, features] = x.dims();
        let data = x.into_data();
        let Ok(values) = data.as_slice::<f32>() else {
            return;
        };
        let mut all = self.all();
        let (sums, count) = match all.get_mut(name) {
            Some(known) => known,
            None => all
                .entry(name.to_string())
                .or_insert_with(|| (vec![0.0; features], 0)),
        };
        for row in values.chunks_exact(features.max(1)) {
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum += f64::from(*x) * f64::from(*x);
            }
        }
        *count += rows;
    }
}

/// The importance matrix of a decoder that is stored as GGUF, over `samples` of tokens. As llama.cpp makes it, it knows
/// nothing of tables of embeddings and output layers. `dataset` is what the text is called. `progress` is told how many
/// samples are done; where it returns false, calibration ends.
///
/// # Errors
/// Where the model cannot be loaded; [`CalibrationError::Interrupted`].
pub fn importance(
    files: &ModelFiles,
    samples: &[Vec<i32>],
    dataset: &str,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<ImportanceMatrix> {
    let squares = Arc::new(Squares::default());
    let options = LoadOptions {
        observer: Some(squares.clone()),
        ..LoadOptions::default()
    };
    let model = AutoModelForCausalLM::from_files(files, &options)?;
    for (done, ids) in samples.iter().enumerate() {
        if !progress(done) {
            return Err(CalibrationError::Interrupted);
        }
        let ids = TensorData::new(ids.clone(), [1, ids.len()]);
        let ids = Tensor::<2, Int>::from_data(ids, &Device::flex());
        let mut cache = model.new_cache(CacheKind::Dynamic, vec![0]);
        model.forward(ids, &mut cache, LogitsFor::Last);
    }
    drop(model);
    let checkpoint = Checkpoint::open(files).map_err(Error::from)?;
    let config = AutoConfig::from_files(files)?;
    let source = gguf::Source::new(checkpoint, &config, files.name())?;
    // Experts that share a tensor, in their order.
    let mut found: BTreeMap<String, BTreeMap<usize, (Vec<f64>, usize)>> = BTreeMap::new();
    for (name, sums) in std::mem::take(&mut *squares.all()) {
        let (name, expert) = match name.rsplit_once('.') {
            Some((stem, last)) if is_number(last) => (stem, last.parse().unwrap_or(0)),
            _ => (name.as_str(), 0),
        };
        let place = source.stored_name(name);
        if let Some((stored, experts)) = place.filter(|(stored, _)| !OUTER.contains(&stored.as_str())) {
            let all = found.entry(stored).or_default();
            // No token chose these.
            for expert in 0..experts {
                all.entry(expert).or_insert_with(|| (vec![0.0; sums.0.len()], 0));
            }
            all.insert(expert, sums);
        }
    }
    let mut matrix = ImportanceMatrix::new(dataset).made_with(dataset, samples.len());
    for (name, experts) in found {
        let sums: Vec<f32> = experts
            .values()
            .flat_map(|(sums, _)| sums)
            .map(|sum| *sum as f32)
            .collect();
        let counts: Vec<f32> = experts.values().map(|(_, count)| *count as f32).collect();
        matrix
            .add(&name, &sums, &counts)
            .map_err(|reason| CalibrationError::Module {
                model: files.name().to_string(),
                module: name.clone(),
                reason,
            })?;
    }
    Ok(matrix)
}

/// Tensors outside of layers.
const OUTER: [&str; 2] = ["token_embd.weight", "output.weight"];
