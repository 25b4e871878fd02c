//! Rotary position embeddings (Su et al., 2021) and their scalings for long contexts.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::{Device, Tensor, TensorData};
use oxiformers_kernels::rotary;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, Result};

/// The rope fields of a `config.json`, in the older form (`rope_theta`, `rope_scaling`) or the newer
/// (`rope_parameters`); flatten it into an architecture's configuration.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RopeSettings {
    /// Base of the frequencies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// Scaling by `rope_type` (or `type`), the older form.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<Value>,
    /// Base and scaling in one object, or one such object per layer type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<Value>,
    /// Fraction of the head's dimensions that are rotated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partial_rotary_factor: Option<f64>,
    /// Longest context the model was trained for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<usize>,
}

/// One resolved set of rope parameters.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RopeParameters {
    /// `default`, `linear`, `dynamic`, `yarn`, `longrope` or `llama3`.
    #[serde(alias = "type", default = "default_rope_type")]
    pub rope_type: String,
    /// Base of the frequencies.
    #[serde(default)]
    pub rope_theta: Option<f64>,
    /// How far the context is stretched.
    #[serde(default)]
    pub factor: Option<f64>,
    /// Context length before the stretching.
    #[serde(default)]
    pub original_max_position_embeddings: Option<usize>,
    /// Scale of the attention scores (yarn, longrope).
    #[serde(default)]
    pub attention_factor: Option<f64>,
    /// Yarn: rotations above which frequencies are kept.
    #[serde(default)]
    pub beta_fast: Option<f64>,
    /// Yarn: rotations below which frequencies are divided.
    #[serde(default)]
    pub beta_slow: Option<f64>,
    /// Yarn: attention scale as DeepSeek computes it.
    #[serde(default)]
    pub mscale: Option<f64>,
    /// Yarn: divisor of `mscale`.
    #[serde(default)]
    pub mscale_all_dim: Option<f64>,
    /// Yarn: whether the correction range is rounded to whole dimensions.
    #[serde(default)]
    pub truncate: Option<bool>,
    /// Longrope: factors for contexts up to the original length.
    #[serde(default)]
    pub short_factor: Option<Vec<f64>>,
    /// Longrope: factors beyond it.
    #[serde(default)]
    pub long_factor: Option<Vec<f64>>,
    /// Llama 3: bound below which frequencies are divided.
    #[serde(default)]
    pub low_freq_factor: Option<f64>,
    /// Llama 3: bound above which frequencies are kept.
    #[serde(default)]
    pub high_freq_factor: Option<f64>,
    /// Fraction of the head's dimensions that are rotated.
    #[serde(default)]
    pub partial_rotary_factor: Option<f64>,
}

fn default_rope_type() -> String {
    "default".to_string()
}

impl RopeSettings {
    /// The parameters for layers of `layer_type` (for configurations that have several), with `rope_theta`
    /// where none is given.
    pub fn resolve(&self, layer_type: &str, default_theta: f64) -> Result<RopeParameters> {
        let (field, value) = match (&self.rope_parameters, &self.rope_scaling) {
            (Some(Value::Object(map)), _) => match map.get(layer_type) {
                Some(nested @ Value::Object(_)) => ("rope_parameters", nested.clone()),
                _ => ("rope_parameters", Value::Object(map.clone())),
            },
            (_, Some(scaling @ Value::Object(_))) => ("rope_scaling", scaling.clone()),
            _ => ("rope_scaling", Value::Object(Default::default())),
        };
        let mut rope: RopeParameters =
            serde_json::from_value(value).map_err(|error| Error::config(field, error.to_string()))?;
        rope.rope_theta = rope.rope_theta.or(self.rope_theta).or(Some(default_theta));
        rope.partial_rotary_factor = rope.partial_rotary_factor.or(self.partial_rotary_factor);
        rope.original_max_position_embeddings = rope
            .original_max_position_embeddings
            .or(self.original_max_position_embeddings);
        Ok(rope)
    }
}

/// Rotary embedding of one kind of layer. Cheap to clone; clones share their tables.
#[derive(Debug, Clone)]
pub struct Rope(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    key: usize,
    rotary_dim: usize,
    interleaved: bool,
    attention_factor: f32,
    scaling: Scaling,
}

#[derive(Debug)]
enum Scaling {
    /// Always the same frequencies.
    Fixed(Vec<f32>),
    /// Dynamic NTK: the base grows with the context.
    Dynamic {
        theta: f64,
        factor: f64,
        max_position: usize,
    },
    /// Longrope: one of two sets by the context's length.
    Long {
        short: Vec<f32>,
        long: Vec<f32>,
        original: usize,
    },
}

impl Rope {
    /// Tables for heads of `head_dim`, of which `partial_rotary_factor` is rotated. `interleaved` pairs
    /// neighbouring dimensions; otherwise a dimension is paired with the one half the head further.
    pub fn new(
        parameters: &RopeParameters,
        head_dim: usize,
        max_position_embeddings: usize,
        interleaved: bool,
    ) -> Result<Self> {
        let factor = parameters.partial_rotary_factor.unwrap_or(1.0);
        let rotary_dim = (head_dim as f64 * factor) as usize;
        if rotary_dim > head_dim {
            let message = format!("is {factor}; no more than the whole of a head can be rotated");
            return Err(Error::config("partial_rotary_factor", message));
        }
        Self::with_rotary_dim(parameters, rotary_dim, max_position_embeddings, interleaved)
    }

    /// Like [`new`](Self::new) with the number of rotated dimensions given.
    pub fn with_rotary_dim(
        parameters: &RopeParameters,
        rotary_dim: usize,
        max_position_embeddings: usize,
        interleaved: bool,
    ) -> Result<Self> {
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) || rotary_dim > crate::attention::MAX_HEAD_DIM {
            return Err(Error::config(
                "head_dim",
                format!("cannot rotate {rotary_dim} dimensions in pairs"),
            ));
        }
        let theta = parameters.rope_theta.unwrap_or(10_000.0);
        let base = frequencies(theta, rotary_dim);
        let original = parameters
            .original_max_position_embeddings
            .unwrap_or(max_position_embeddings);
        let need = |field: &'static str, value: Option<f64>| {
            value.ok_or_else(|| {
                Error::config(
                    format!("rope_scaling.{field}"),
                    format!("`{}` needs it", parameters.rope_type),
                )
            })
        };
        let mut attention_factor = 1.0;
        let scaling = match parameters.rope_type.as_str() {
            "default" | "mrope" => Scaling::Fixed(base),
            "linear" => {
                let factor = need("factor", parameters.factor)? as f32;
                Scaling::Fixed(base.into_iter().map(|f| f / factor).collect())
            }
            "dynamic" => Scaling::Dynamic {
                theta,
                factor: need("factor", parameters.factor)?,
                max_position: max_position_embeddings,
            },
            "llama3" => Scaling::Fixed(llama3(
                base,
                need("factor", parameters.factor)?,
                need("low_freq_factor", parameters.low_freq_factor)?,
                need("high_freq_factor", parameters.high_freq_factor)?,
                original as f64,
            )),
            "yarn" => {
                let factor = match (parameters.factor, parameters.original_max_position_embeddings) {
                    (Some(factor), _) => factor,
                    (None, Some(original)) => max_position_embeddings as f64 / original as f64,
                    (None, None) => need("factor", None)?,
                };
                attention_factor = yarn_attention_factor(parameters, factor);
                Scaling::Fixed(yarn(&base, parameters, factor, theta, original as f64))
            }
            "longrope" | "su" => {
                let factors = |field: &'static str, factors: &Option<Vec<f64>>| match factors {
                    Some(factors) if factors.len() == rotary_dim / 2 => Ok(base
                        .iter()
                        .zip(factors)
                        .map(|(f, x)| f / *x as f32)
                        .collect::<Vec<_>>()),
                    _ => Err(Error::config(
                        format!("rope_scaling.{field}"),
                        format!("needs {} numbers", rotary_dim / 2),
                    )),
                };
                let stretch = parameters
                    .factor
                    .unwrap_or(max_position_embeddings as f64 / original as f64);
                attention_factor = parameters.attention_factor.unwrap_or_else(|| {
                    if stretch <= 1.0 {
                        1.0
                    } else {
                        (1.0 + stretch.ln() / (original as f64).ln()).sqrt()
                    }
                });
                Scaling::Long {
                    short: factors("short_factor", &parameters.short_factor)?,
                    long: factors("long_factor", &parameters.long_factor)?,
                    original,
                }
            }
            other => {
                return Err(Error::config(
                    "rope_scaling.rope_type",
                    format!("`{other}` is not one of default, linear, dynamic, yarn, longrope, llama3"),
                ));
            }
        };
        static KEYS: AtomicUsize = AtomicUsize::new(0);
        Ok(Self(Arc::new(Inner {
            key: KEYS.fetch_add(1, Ordering::Relaxed),
            rotary_dim,
            interleaved,
            attention_factor: attention_factor as f32,
            scaling,
        })))
    }

    pub(crate) fn key(&self) -> usize {
        self.0.key
    }

    /// Number of dimensions that are rotated.
    pub fn rotary_dim(&self) -> usize {
        self.0.rotary_dim
    }

    /// Context length beyond which all frequencies are others, with longrope.
    pub(crate) fn switch(&self) -> Option<usize> {
        match self.0.scaling {
            Scaling::Long { original, .. } => Some(original),
            _ => None,
        }
    }

    /// Cosine and sine `[rows, 1, seq, rotary_dim / 2]` of `positions` `[rows][seq]` in sequences that are at
    /// least `context` long.
    pub fn tables(
        &self,
        positions: &[Vec<usize>],
        context: usize,
        device: &Device,
    ) -> (Tensor<4>, Tensor<4>) {
        // The longest sequence of the batch, which some scalings depend on.
        let last = positions.iter().flatten().max();
        let context = context.max(last.map_or(0, |last| last + 1));
        let dynamic;
        let frequencies = match &self.0.scaling {
            Scaling::Fixed(frequencies) => frequencies,
            Scaling::Long {
                short,
                long,
                original,
            } => {
                if context > *original {
                    long
                } else {
                    short
                }
            }
            Scaling::Dynamic {
                theta,
                factor,
                max_position,
            } => {
                let context = context.max(*max_position) as f64;
                let dim = self.0.rotary_dim as f64;
                let stretch = factor * context / *max_position as f64 - (factor - 1.0);
                dynamic = self::frequencies(theta * stretch.powf(dim / (dim - 2.0)), self.0.rotary_dim);
                &dynamic
            }
        };
        let seq = positions.first().map_or(0, Vec::len);
        let shape = [positions.len(), 1, seq, frequencies.len()];
        let angles = || {
            let flat = positions.iter().flatten();
            flat.flat_map(|position| frequencies.iter().map(move |f| *position as f32 * f))
        };
        let scale = self.0.attention_factor;
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = angles().map(|angle| f(angle) * scale).collect();
            Tensor::from_data(TensorData::new(values, shape), device)
        };
        (table(f32::cos), table(f32::sin))
    }

    /// Rotates the first `rotary_dim` of the last dimension of `x` `[batch, heads, seq, head_dim]`.
    pub fn rotate(&self, x: Tensor<4>, (cos, sin): &(Tensor<4>, Tensor<4>)) -> Tensor<4> {
        rotary(x, cos.clone(), sin.clone(), self.0.interleaved)
    }
}

/// `theta^(-2i / dim)`, computed in f32 as the reference does.
fn frequencies(theta: f64, dim: usize) -> Vec<f32> {
    (0..dim / 2)
        .map(|i| 1.0 / (theta as f32).powf(2.0 * i as f32 / dim as f32))
        .collect()
}

fn llama3(base: Vec<f32>, factor: f64, low: f64, high: f64, original: f64) -> Vec<f32> {
    let scale = |f: f32| {
        let f = f64::from(f);
        let wavelength = 2.0 * std::f64::consts::PI / f;
        let scaled = if wavelength < original / high {
            f
        } else if wavelength > original / low {
            f / factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            (1.0 - smooth) * f / factor + smooth * f
        };
        scaled as f32
    };
    base.into_iter().map(scale).collect()
}

/// Yarn (Peng et al., 2023): a ramp between interpolated and kept frequencies.
fn yarn(base: &[f32], parameters: &RopeParameters, factor: f64, theta: f64, original: f64) -> Vec<f32> {
    let dim = 2.0 * base.len() as f64;
    let correction = |rotations: f64| {
        dim * (original / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
    };
    let mut low = correction(parameters.beta_fast.unwrap_or(32.0));
    let mut high = correction(parameters.beta_slow.unwrap_or(1.0));
    if parameters.truncate.unwrap_or(true) {
        low = low.floor();
        high = high.ceil();
    }
    low = low.max(0.0);
    high = high.min(dim - 1.0);
    if low == high {
        high += 0.001;
    }
    let blend = |(i, f): (usize, &f32)| {
        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        let f = f64::from(*f);
        (f / factor * ramp + f * (1.0 - ramp)) as f32
    };
    base.iter().enumerate().map(blend).collect()
}

fn yarn_attention_factor(parameters: &RopeParameters, factor: f64) -> f64 {
    let mscale = |m: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * m * factor.ln() + 1.0
        }
    };
    parameters
        .attention_factor
        .unwrap_or_else(|| match (parameters.mscale, parameters.mscale_all_dim) {
            (Some(m), Some(all)) if m != 0.0 && all != 0.0 => mscale(m) / mscale(all),
            _ => mscale(1.0),
        })
}
