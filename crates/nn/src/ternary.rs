//! Training of linear layers whose weights will be ternary and whose activations whole numbers of 8 bits: BitNet b1.58
//! (Ma et al., "The era of 1-bit LLMs", 2024).
//!
//! The forward pass computes with what quantization leaves, and gradients pass straight through the rounding to the values
//! as they are (Bengio et al., 2013). A model that was trained without loses what it knows where that begins at once, so
//! it can begin bit by bit: with a part λ of the difference.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use burn::tensor::Tensor;
use oxiformers_kernels::int8_activations;

use crate::training::constant;

/// The part λ of the difference that quantization makes, from 0 to 1. Clones are the same number: all layers of a model
/// follow the one that its trainer holds.
#[derive(Debug, Clone)]
pub struct Lambda(Arc<AtomicU32>);

impl Default for Lambda {
    /// The whole difference.
    fn default() -> Self {
        Self::new(1.0)
    }
}

impl Lambda {
    /// A number of its own, from 0 to 1.
    pub fn new(lambda: f32) -> Self {
        let all = Self(Arc::default());
        all.set(lambda);
        all
    }

    /// The number.
    pub fn get(&self) -> f32 {
        f32::from_bits(self.0.load(Ordering::Relaxed))
    }

    /// Sets the number for all clones; what is below 0 or above 1 counts as these.
    pub fn set(&self, lambda: f32) {
        let lambda = if lambda.is_nan() {
            1.0
        } else {
            lambda.clamp(0.0, 1.0)
        };
        self.0.store(lambda.to_bits(), Ordering::Relaxed);
    }

    /// `min(step / warmup_steps, 1)`; 1 where there is no warm-up.
    pub fn warm_up(&self, step: usize, warmup_steps: usize) {
        self.set(step as f32 / warmup_steps.max(1) as f32 + if warmup_steps == 0 { 1.0 } else { 0.0 });
    }

    /// `x + λ (quantized − x)`, whose gradient is that of `x`.
    fn toward<const D: usize>(
        &self,
        x: Tensor<D>,
        quantized: impl FnOnce(Tensor<D>) -> Tensor<D>,
    ) -> Tensor<D> {
        let plain = constant(x.clone());
        let difference = quantized(plain.clone()) - plain;
        x + difference * self.get()
    }

    /// Activations `[.., size]`: see [`int8_activations`].
    pub fn activations<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.toward(x, int8_activations)
    }

    /// Weights `[out_features, in_features]`: see [`ternary_weights`].
    pub fn weights(&self, weight: Tensor<2>) -> Tensor<2> {
        self.toward(weight, ternary_weights)
    }
}

/// Weights that become -1, 0 or 1 times one scale: the mean of their absolute values, 1e-5 at least.
pub fn ternary_weights(weight: Tensor<2>) -> Tensor<2> {
    let scale = weight
        .clone()
        .abs()
        .mean()
        .clamp_min(1e-5)
        .recip()
        .reshape([1, 1]);
    (weight * scale.clone()).round().clamp(-1.0, 1.0) / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up() {
        let lambda = Lambda::default();
        let other = lambda.clone();
        let at = |step, steps| {
            lambda.warm_up(step, steps);
            other.get()
        };
        assert_eq!(
            [at(0, 1000), at(250, 1000), at(1000, 1000), at(3000, 1000)],
            [0.0, 0.25, 1.0, 1.0]
        );
        assert_eq!(at(0, 0), 1.0);
    }
}
