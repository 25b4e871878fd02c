//! How well a model predicts a text.

use burn::tensor::{Int, Tensor, TensorData};
use oxiformers_models::CausalLM;
use oxiformers_nn::{CacheKind, CachePrecision, LogitsFor};

/// How a text is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerplexityOptions {
    /// Tokens of a window; a window sees nothing of the one before.
    pub window: usize,
    /// Tokens that are run, and whose logits are held, at a time: 128, which at a vocabulary of 262,144 is 128 MiB. What
    /// a cache has packed is seen by later ones only, so that 1 is what decoding does.
    pub chunk: usize,
    /// What keys and values are kept as.
    pub cache_precision: CachePrecision,
}

impl Default for PerplexityOptions {
    fn default() -> Self {
        Self {
            window: usize::MAX,
            chunk: 128,
            cache_precision: CachePrecision::Full,
        }
    }
}

/// The measure of [`perplexity`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Perplexity {
    /// Tokens of the text, the first of each window included, which nothing predicts.
    pub tokens: usize,
    /// Mean negative log-likelihood of the predicted tokens, in nats.
    pub nll: f64,
    /// Bytes of the cache at the end of the longest window.
    pub cache_bytes: usize,
}

impl Perplexity {
    /// `exp(nll)`.
    pub fn perplexity(&self) -> f64 {
        self.nll.exp()
    }
}

/// The mean negative log-likelihood of the tokens 2 to N of each window of `window` tokens; a window sees
/// nothing of the one before. `progress` is told the tokens done.
///
/// # Errors
/// Where the device fails to give back values.
pub async fn perplexity(
    model: &dyn CausalLM,
    ids: &[u32],
    window: usize,
    progress: impl FnMut(usize),
) -> Result<Perplexity, crate::Error> {
    let options = PerplexityOptions {
        window,
        ..PerplexityOptions::default()
    };
    perplexity_with(model, ids, options, progress).await
}

/// Like [`perplexity`], with more to choose.
///
/// # Errors
/// Where the device fails to give back values.
pub async fn perplexity_with(
    model: &dyn CausalLM,
    ids: &[u32],
    options: PerplexityOptions,
    mut progress: impl FnMut(usize),
) -> Result<Perplexity, crate::Error> {
    let (window, size) = (options.window.max(2), options.chunk.max(1));
    let device = model.device();
    let vocab = model.vocab_size();
    let (mut sum, mut predicted, mut done, mut cache_bytes) = (0.0, 0usize, 0usize, 0usize);
    for window in ids.chunks(window) {
        let cache = model.new_cache(CacheKind::Dynamic, vec![0]);
        let mut cache = cache.with_precision(options.cache_precision);
        // The last token predicts nothing that is in the window.
        let inputs = &window[..window.len() - 1];
        cache.prepare(inputs.len());
        cache.reserve(inputs.len());
        for (index, chunk) in inputs.chunks(size).enumerate() {
            let input: Vec<i32> = chunk.iter().map(|id| *id as i32).collect();
            let input = Tensor::<2, Int>::from_data(TensorData::new(input, [1, chunk.len()]), &device);
            let logits = model.forward(input, &mut cache, LogitsFor::All);
            let logits = logits.into_data_async().await.map_err(crate::Error::read_back)?;
            let logits: Vec<f32> = logits.try_to_vec().map_err(crate::Error::read_back)?;
            let targets = &window[index * size + 1..];
            for (row, target) in logits.chunks_exact(vocab).zip(targets) {
                sum += negative_log_likelihood(row, *target as usize);
                predicted += 1;
            }
            done += chunk.len();
            progress(done);
        }
        done += 1;
        cache_bytes = cache_bytes.max(cache.num_bytes());
    }
    Ok(Perplexity {
        tokens: ids.len(),
        nll: sum / predicted.max(1) as f64,
        cache_bytes,
    })
}

/// `log Σ exp(logits) − logits[target]`, summed in f64.
fn negative_log_likelihood(logits: &[f32], target: usize) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    match logits.get(target) {
        Some(logit) => sum.ln() + f64::from(max) - f64::from(*logit),
        None => f64::INFINITY,
    }
}

#[cfg(test)]
mod tests {
    use super::negative_log_likelihood;

    #[test]
    fn uniform_logits_give_the_log_of_their_number() {
        let nll = negative_log_likelihood(&[3.0; 8], 5);
        assert!((nll - 8f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let nll = negative_log_likelihood(&[1e30, 0.0], 0);
        assert!(nll.abs() < 1e-12);
    }
}
