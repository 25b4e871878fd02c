//! AWQ of a layer: columns that meet large inputs are scaled up, and what makes these inputs is scaled down.
//!
//! What makes them is not said by any table of architectures: it is one of the layer's norms, or one of its linear layers,
//! with as many outputs; which one is found by trying, as scaling the right one leaves the outputs of the layer as they were.

use burn::tensor::Tensor;
use oxiformers_hub::checkpoint::{DType, TensorView};
use oxiformers_nn::quant::awq::{Awq, AwqConfig};
use oxiformers_nn::quant::calibrate::awq::{Layer, clip, scale_columns, scales};
use oxiformers_nn::quant::calibrate::{Hessian, round_to_nearest};
use oxiformers_nn::quant::to_f32;
use oxiformers_nn::{SurveyedMatrix, TensorSource};

use super::inputs::Inputs;
use super::{Calibration, LayerResult, ModuleReport, Result, layer_prefix};
use crate::Error;

/// The largest change of a layer's outputs, against their size, that comes of rounding alone.
const SAME: f32 = 1e-3;
/// Queries and keys are not clipped: what matters there are their products.
const UNCLIPPED: [&str; 5] = ["q_", "k_", "query", "key", "Wqkv"];

/// Quantizes the running layer.
pub(super) fn layer(
    calibration: &Calibration,
    config: &AwqConfig,
    tell: &mut dyn FnMut(f32) -> Result<()>,
) -> Result<LayerResult> {
    let all: Vec<String> = calibration.stages(false)?.concat();
    let inputs = calibration.inputs(&all, &mut |part| tell(part / 4.0))?;
    let group_size = usize::try_from(config.group_size).ok();
    let mut result = LayerResult::default();
    let folding = Folding::new(calibration, &all)?;
    let mut done: Vec<String> = Vec::new();
    for (at, name) in all.iter().enumerate() {
        tell(0.25 + 0.5 * at as f32 / all.len() as f32)?;
        if done.contains(name) {
            continue;
        }
        let group = inputs.together(name);
        done.extend(group.iter().cloned());
        folding.fold(&inputs, &group, group_size, &mut result)?;
    }
    for (at, name) in all.iter().enumerate() {
        tell(0.75 + 0.25 * at as f32 / all.len() as f32)?;
        let Some(matrix) = calibration.matrices.get(name) else {
            continue;
        };
        let mut weight = calibration.values(matrix)?;
        let failed = |reason: String| calibration.wrong(matrix.module(), reason);
        let (rows, clipped) = inputs.with(name, |hessian| {
            let rows = hessian.map_or(0, Hessian::rows);
            let last = matrix.module().rsplit('.').next().unwrap_or_default();
            let clips = rows > 0 && !UNCLIPPED.iter().any(|part| last.contains(part));
            let done = match hessian.filter(|_| clips) {
                Some(hessian) => clip(&mut weight, hessian, &Awq::AFFINE, group_size),
                None => Ok(()),
            };
            (rows, done)
        });
        clipped.map_err(|error| failed(error.to_string()))?;
        let codes = round_to_nearest(&weight, matrix.shape, &Awq::AFFINE, group_size);
        let parts = codes
            .map_err(|error| error.to_string())
            .and_then(|codes| config.storage().store(&codes));
        calibration.put(matrix, &parts.map_err(failed)?, &mut result);
        let note = (rows == 0).then(|| "no text came here: rounded to nearest".to_string());
        result.modules.push(ModuleReport {
            module: matrix.module().to_string(),
            rows,
            loss: None,
            note,
        });
    }
    // What was scaled and then quantized is not stored as floats.
    let removed = &result.removed;
    result.tensors.retain(|(name, _)| !removed.contains(name));
    Ok(result)
}

/// What can be scaled instead of the inputs of linear layers.
#[derive(Debug, Clone)]
enum Before {
    /// A norm with these factors, and perhaps a bias; its factors are stored minus 1 where `plus_one`.
    Norm {
        weight: String,
        bias: Option<String>,
        plus_one: bool,
    },
    /// The rows of a linear layer, from this one on, and its bias.
    Rows {
        matrix: String,
        first: usize,
        bias: Option<String>,
    },
}

struct Folding<'a> {
    calibration: &'a Calibration,
    /// All tensors of the layer, and how many values those with one dimension have.
    vectors: Vec<(String, usize)>,
    matrices: Vec<&'a SurveyedMatrix>,
    /// What the layer makes of the first sample.
    expected: Option<Vec<f32>>,
}

impl<'a> Folding<'a> {
    fn new(calibration: &'a Calibration, all: &[String]) -> Result<Self> {
        let matrices: Vec<_> = all
            .iter()
            .filter_map(|name| calibration.matrices.get(name))
            .collect();
        let stored = matrices
            .iter()
            .find_map(|matrix| layer_prefix(matrix.stored.as_deref()?));
        let mut vectors = Vec::new();
        if let Some(prefix) = stored {
            for name in calibration
                .overlay
                .names()
                .into_iter()
                .filter(|name| name.starts_with(&prefix))
            {
                let view = calibration.overlay.tensor(&name).map_err(Error::from)?;
                if let [count] = view.shape.as_slice() {
                    vectors.push((name, *count));
                }
            }
        }
        let mut folding = Self {
            calibration,
            vectors,
            matrices,
            expected: None,
        };
        folding.expected = folding.run()?;
        Ok(folding)
    }

    /// What the layer makes of the first sample.
    fn run(&self) -> Result<Option<Vec<f32>>> {
        let Some(sample) = self.calibration.hidden.first() else {
            return Ok(None);
        };
        let decoder = self.calibration.load(None)?;
        let out: Tensor<3> = decoder.run_layer(self.calibration.layer, sample.clone());
        Ok(out.into_data().try_to_vec::<f32>().ok())
    }

    /// Scales the columns of the weights `group`, which share their inputs, if what makes the inputs can be found.
    fn fold(
        &self,
        inputs: &Inputs,
        group: &[String],
        group_size: Option<usize>,
        result: &mut LayerResult,
    ) -> Result<()> {
        let calibration = self.calibration;
        let mut members: Vec<(&SurveyedMatrix, Vec<f32>)> = Vec::new();
        for name in group {
            let Some(matrix) = calibration.matrices.get(name) else {
                // A weight that is not quantized, such as a router's, would have to be scaled, too.
                return Ok(());
            };
            members.push((matrix, calibration.values(matrix)?));
        }
        let Some((first, _)) = members.first() else {
            return Ok(());
        };
        let (name, features) = (first.name.clone(), first.shape[1]);
        let layers: Vec<Layer> = members
            .iter()
            .map(|(matrix, weight)| Layer {
                weight,
                out_features: matrix.shape[0],
            })
            .collect();
        let found = inputs.with(&name, |hessian| {
            let hessian = hessian.filter(|hessian| hessian.rows() > 0)?;
            Some(scales(&layers, hessian, &Awq::AFFINE, group_size))
        });
        let scales = match found {
            Some(Ok(scales)) => scales,
            Some(Err(error)) => return Err(calibration.wrong(first.module(), error.to_string())),
            None => return Ok(()),
        };
        for before in self.candidates(group, features) {
            let untouched = calibration.overlay.snapshot();
            let mut changed = Vec::new();
            for (matrix, weight) in &members {
                let scaled = scale_columns(weight, &scales);
                changed.extend(calibration.dense(matrix, scaled));
            }
            changed.extend(self.scale(&before, &scales)?);
            for (name, view) in &changed {
                calibration.overlay.set(name, view.clone());
            }
            if self.unchanged()? {
                inputs.change(&name, |hessian| hessian.divide(&scales));
                result
                    .tensors
                    .retain(|(name, _)| !changed.iter().any(|(other, _)| other == name));
                result.tensors.extend(changed);
                return Ok(());
            }
            calibration.overlay.restore(untouched);
        }
        Ok(())
    }

    /// Whether the layer makes of the first sample what it made before.
    fn unchanged(&self) -> Result<bool> {
        let (Some(expected), Some(found)) = (&self.expected, self.run()?) else {
            return Ok(false);
        };
        let size = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let apart = expected
            .iter()
            .zip(&found)
            .fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        Ok(apart.is_finite() && apart <= SAME * size)
    }

    /// What may make inputs of so many features, the likely ones first.
    fn candidates(&self, group: &[String], features: usize) -> Vec<Before> {
        let mut candidates = Vec::new();
        let has = |name: &str| {
            self.vectors
                .iter()
                .any(|(other, count)| other == name && *count == features)
        };
        for plus_one in [false, true] {
            for (name, _) in self.vectors.iter().filter(|(_, count)| *count == features) {
                if let Some(module) = name.strip_suffix(".weight") {
                    let bias = Some(format!("{module}.bias")).filter(|bias| has(bias));
                    candidates.push(Before::Norm {
                        weight: name.clone(),
                        bias,
                        plus_one,
                    });
                }
            }
        }
        let others = self
            .matrices
            .iter()
            .filter(|matrix| !group.contains(&matrix.name));
        for matrix in others {
            let [rows, _] = matrix.shape;
            if !rows.is_multiple_of(features) {
                continue;
            }
            // Of layers that are stored as one, the last part is what is multiplied further.
            let bias = format!("{}.bias", module(matrix));
            let bias = self
                .vectors
                .iter()
                .any(|(name, count)| *name == bias && *count == rows)
                .then_some(bias);
            candidates.push(Before::Rows {
                matrix: matrix.name.clone(),
                first: rows - features,
                bias,
            });
        }
        candidates
    }

    /// The tensors of `before`, divided by `scales`.
    fn scale(&self, before: &Before, scales: &[f32]) -> Result<Vec<(String, TensorView)>> {
        let mut changed = Vec::new();
        match before {
            Before::Norm {
                weight,
                bias,
                plus_one,
            } => {
                let one = if *plus_one { 1.0 } else { 0.0 };
                changed.push(self.vector(weight, |at, value| (value + one) / scales[at] - one)?);
                if let Some(bias) = bias {
                    changed.push(self.vector(bias, |at, value| value / scales[at])?);
                }
            }
            Before::Rows { matrix, first, bias } => {
                if let Some(matrix) = self.calibration.matrices.get(matrix) {
                    let mut values = self.calibration.values(matrix)?;
                    let rows = values.chunks_exact_mut(matrix.shape[1].max(1)).skip(*first);
                    for (row, scale) in rows.zip(scales) {
                        row.iter_mut().for_each(|value| *value /= scale);
                    }
                    changed.extend(self.calibration.dense(matrix, values));
                }
                if let Some(bias) = bias {
                    let scaled = |at: usize, value: f32| match at.checked_sub(*first) {
                        Some(at) => value / scales[at],
                        None => value,
                    };
                    changed.push(self.vector(bias, scaled)?);
                }
            }
        }
        Ok(changed)
    }

    fn vector(&self, name: &str, each: impl Fn(usize, f32) -> f32) -> Result<(String, TensorView)> {
        let view = self.calibration.overlay.tensor(name).map_err(Error::from)?;
        let values = to_f32(&view).map_err(|reason| self.calibration.wrong(name, reason))?;
        let data: Vec<u8> = values
            .iter()
            .enumerate()
            .flat_map(|(at, value)| each(at, *value).to_le_bytes())
            .collect();
        Ok((
            name.to_string(),
            TensorView {
                dtype: DType::F32,
                shape: view.shape,
                data: data.into(),
            },
        ))
    }
}

/// The name of a matrix's module in the checkpoint.
fn module(matrix: &SurveyedMatrix) -> &str {
    let stored = matrix.stored.as_deref().unwrap_or(&matrix.name);
    stored.strip_suffix(".weight").unwrap_or(stored)
}

impl Calibration {
    /// A matrix with other values, as the checkpoint stores it.
    fn dense(&self, matrix: &SurveyedMatrix, values: Vec<f32>) -> Option<(String, TensorView)> {
        let [rows, columns] = matrix.shape;
        let (shape, values) = if self.is_turned(matrix) {
            let turned = (0..rows * columns)
                .map(|at| values[at % rows * columns + at / rows])
                .collect();
            (vec![columns, rows], turned)
        } else {
            (vec![rows, columns], values)
        };
        let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Some((
            matrix.stored.clone()?,
            TensorView {
                dtype: DType::F32,
                shape,
                data: data.into(),
            },
        ))
    }
}
