//! Choosing a token from processed logits.

use oxiformers_kernels::argmax;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::logits::softmax;
use crate::{Error, Result};

/// Draws tokens; the same seed and stream give the same draws on every platform.
#[derive(Debug, Clone)]
pub struct Sampler {
    /// `None` takes the likeliest token.
    rng: Option<ChaCha8Rng>,
}

impl Sampler {
    /// Always takes the likeliest token; of equals, the first.
    pub fn greedy() -> Self {
        Self { rng: None }
    }

    /// Draws. Sequences of one generation use one seed and streams of their own, so that no draw depends on
    /// how many sequences there are beside.
    pub fn random(seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Self { rng: Some(rng) }
    }

    /// Whether it draws.
    pub fn is_random(&self) -> bool {
        self.rng.is_some()
    }

    /// A token from logits `[vocab_size]`.
    ///
    /// # Errors
    /// [`Error::NoToken`] when no logit is above negative infinity.
    pub fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        if self.rng.is_some() {
            return self.draw(&softmax(logits));
        }
        let best = argmax(logits).and_then(|id| u32::try_from(id).ok());
        best.ok_or(Error::NoToken)
    }

    /// A token by its probability; the probabilities need not sum to 1.
    ///
    /// # Errors
    /// [`Error::NoToken`] when they are all zero.
    pub fn draw(&mut self, probs: &[f32]) -> Result<u32> {
        let total: f64 = probs.iter().map(|p| f64::from(*p)).sum();
        if total.is_nan() || total <= 0.0 {
            return Err(Error::NoToken);
        }
        let mut left = self.uniform() * total;
        let mut last = None;
        for (id, p) in probs.iter().enumerate().filter(|(_, p)| **p > 0.0) {
            last = Some(id as u32);
            left -= f64::from(*p);
            if left < 0.0 {
                break;
            }
        }
        last.ok_or(Error::NoToken)
    }

    /// A number in `[0, 1)`; 0 when greedy.
    pub fn uniform(&mut self) -> f64 {
        // 53 bits, as many as an f64 holds.
        self.rng
            .as_mut()
            .map_or(0.0, |rng| (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64)
    }
}

/// A seed from the operating system.
pub fn fresh_seed() -> u64 {
    ChaCha8Rng::from_os_rng().next_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        let logits = [0.5f32.ln(), 0.25f32.ln(), f32::NEG_INFINITY, 0.25f32.ln()];
        let draw = |seed| {
            let mut sampler = Sampler::random(seed, 0);
            (0..20_000)
                .map(|_| sampler.choose(&logits).unwrap())
                .collect::<Vec<_>>()
        };
        let draws = draw(7);
        assert_eq!(draws, draw(7));
        assert_ne!(draws, draw(8));
        let share = |id| draws.iter().filter(|draw| **draw == id).count() as f64 / draws.len() as f64;
        // Five standard deviations.
        assert!((share(0) - 0.5).abs() < 0.018 && (share(1) - 0.25).abs() < 0.016 && share(2) == 0.0);
    }

    #[test]
    fn nothing_to_choose_is_an_error() {
        assert!(Sampler::greedy().choose(&[f32::NEG_INFINITY; 3]).is_err());
        assert!(Sampler::random(0, 0).choose(&[f32::NEG_INFINITY; 3]).is_err());
        assert!(Sampler::greedy().choose(&[]).is_err());
        assert_eq!(Sampler::greedy().choose(&[1.0, 3.0, 3.0]).unwrap(), 1);
    }
}
