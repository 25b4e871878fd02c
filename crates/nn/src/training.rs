//! What a model does only while it is trained: dropout (Srivastava et al., 2014) and noise on embeddings (NEFTune: Jain et
//! al., 2023).
//!
//! Layers ask here at the places where Transformers' models have their dropout; outside of [`Pass::run`] nothing happens.

use std::cell::RefCell;

use burn::tensor::{Tensor, TensorData};
use serde_json::Value;

/// Shares of values that are left out.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Dropout {
    /// Of embeddings.
    pub embedding: f64,
    /// Of what attention and feed-forward blocks add to the hidden states.
    pub hidden: f64,
    /// Within feed-forward blocks, after the activation.
    pub activation: f64,
    /// Of what a head's output layer gets.
    pub classifier: f64,
}

impl Dropout {
    /// As a `config.json` says, by the names that its architecture gives them.
    pub fn of_config(config: &Value) -> Self {
        let first = |names: &[&str]| {
            let number = |name: &&str| config.get(*name).and_then(Value::as_f64);
            names
                .iter()
                .find_map(number)
                .filter(|p| (0.0..1.0).contains(p))
                .unwrap_or(0.0)
        };
        // T5's rate is 0.1 where it is not said; others say it.
        let t5 = match config.get("model_type").and_then(Value::as_str) {
            Some("t5" | "mt5" | "umt5") => config.get("dropout_rate").and_then(Value::as_f64).unwrap_or(0.1),
            _ => 0.0,
        };
        let or_t5 = |p: f64| if p > 0.0 { p } else { t5 };
        let hidden = [
            "hidden_dropout_prob",
            "resid_pdrop",
            "residual_dropout",
            "hidden_dropout",
            "dropout",
        ];
        let hidden = or_t5(first(&hidden));
        let embedding = [
            "embd_pdrop",
            "embedding_dropout",
            "embed_pdrop",
            "hidden_dropout_prob",
            "dropout",
        ];
        Self {
            embedding: or_t5(first(&embedding)),
            hidden,
            activation: or_t5(first(&["activation_dropout"])),
            classifier: first(&[
                "classifier_dropout",
                "seq_classif_dropout",
                "classifier_pdrop",
                "hidden_dropout_prob",
            ]),
        }
    }
}

/// A forward pass of training.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pass {
    /// Dropout.
    pub dropout: Dropout,
    /// Strength of the noise on token embeddings; 0 for none.
    pub neftune_noise_alpha: f64,
    /// Where the randomness of this pass comes from: the same for the same number.
    pub seed: u64,
}

thread_local! {
    static RUNNING: RefCell<Option<(Pass, u64)>> = const { RefCell::new(None) };
}

impl Pass {
    /// Whether it differs from a pass that is no training.
    pub fn is_random(&self) -> bool {
        self.dropout != Dropout::default() || self.neftune_noise_alpha > 0.0
    }

    /// Runs `forward`, whose layers leave out and add noise as this says.
    pub fn run<T>(self, forward: impl FnOnce() -> T) -> T {
        /// Ends the pass, also where `forward` panics.
        struct End;
        impl Drop for End {
            fn drop(&mut self) {
                RUNNING.with_borrow_mut(Option::take);
            }
        }
        if !self.is_random() {
            return forward();
        }
        RUNNING.with_borrow_mut(|running| *running = Some((self, 0)));
        let _end = End;
        forward()
    }
}

/// The running pass, and a seed for its next draw.
fn next() -> Option<(Pass, u64)> {
    RUNNING.with_borrow_mut(|running| {
        let (pass, draws) = running.as_mut()?;
        *draws += 1;
        Some((*pass, pass.seed ^ draws.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    })
}

/// The running pass.
fn running() -> Option<Pass> {
    RUNNING.with_borrow(|running| running.map(|(pass, _)| pass))
}

/// What the draws of the running pass go on from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Draws(Option<(Pass, u64)>);

/// What the next draws go on from, for what is to be computed [again](Draws::again).
pub(crate) fn draws() -> Draws {
    Draws(RUNNING.with_borrow(|running| *running))
}

impl Draws {
    /// Runs `forward` with the draws that followed.
    pub(crate) fn again<T>(self, forward: impl FnOnce() -> T) -> T {
        struct Restore(Option<(Pass, u64)>);
        impl Drop for Restore {
            fn drop(&mut self) {
                RUNNING.with_borrow_mut(|running| *running = self.0);
            }
        }
        let _restore = Restore(RUNNING.with_borrow_mut(|running| std::mem::replace(running, self.0)));
        forward()
    }
}

/// Numbers in 0..1 (SplitMix64).
fn units(seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = state;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // The 24 bits that an f32 holds.
        ((x ^ (x >> 31)) >> 40) as f32 / (1 << 24) as f32
    })
}

/// `x` with a share of its values set to 0 and the others scaled up, so that their expectation stays.
fn dropped<const D: usize>(x: Tensor<D>, share: impl Fn(&Dropout) -> f64) -> Tensor<D> {
    if running().is_none_or(|pass| share(&pass.dropout) == 0.0) {
        return x;
    }
    let Some((pass, seed)) = next() else { return x };
    let p = share(&pass.dropout);
    let (kept, scale) = (p as f32, (1.0 / (1.0 - p)) as f32);
    let count = x.shape().num_elements();
    let mask = units(seed)
        .take(count)
        .map(|unit| if unit < kept { 0.0 } else { scale })
        .collect::<Vec<f32>>();
    let mask = Tensor::<D>::from_data(TensorData::new(mask, x.dims()), &x.device());
    x.clone() * mask.cast(x.dtype())
}

/// Dropout of embeddings.
pub fn embedding<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    dropped(x, |dropout| dropout.embedding)
}

/// Dropout of what a block adds to the hidden states.
pub fn hidden<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    dropped(x, |dropout| dropout.hidden)
}

/// Dropout after the activation of a feed-forward block.
pub fn activation<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    dropped(x, |dropout| dropout.activation)
}

/// Whether there is dropout between the layers of a feed-forward block, which then cannot be computed at once.
pub fn drops_activations() -> bool {
    running().is_some_and(|pass| pass.dropout.activation > 0.0)
}

/// Dropout before a head's output layer.
pub fn classifier<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    dropped(x, |dropout| dropout.classifier)
}

/// NEFTune's noise on token embeddings `[batch, seq, width]`: uniform within `alpha / sqrt(seq · width)`.
pub fn noise(x: Tensor<3>) -> Tensor<3> {
    if running().is_none_or(|pass| pass.neftune_noise_alpha == 0.0) {
        return x;
    }
    let Some((pass, seed)) = next() else { return x };
    let [_, seq, width] = x.dims();
    let most = (pass.neftune_noise_alpha / ((seq * width).max(1) as f64).sqrt()) as f32;
    let count = x.shape().num_elements();
    let noise = units(seed)
        .take(count)
        .map(|unit| (2.0 * unit - 1.0) * most)
        .collect::<Vec<f32>>();
    let noise = Tensor::<3>::from_data(TensorData::new(noise, x.dims()), &x.device());
    x.clone() + noise.cast(x.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use serde_json::json;

    fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
        x.into_data().iter::<f32>().collect()
    }

    #[test]
    fn what_is_computed_again_draws_the_same() {
        let x = || Tensor::<2>::ones([5, 40], &Device::flex());
        let pass = Pass {
            dropout: Dropout {
                hidden: 0.5,
                ..Dropout::default()
            },
            ..Pass::default()
        };
        let (draws, first, second) = pass.run(|| {
            values(hidden(x()));
            let draws = draws();
            (draws, values(hidden(x())), values(hidden(x())))
        });
        assert_ne!(first, second);
        let again = draws.again(|| (values(hidden(x())), values(hidden(x()))));
        assert_eq!(again, (first, second));
        assert!(values(hidden(x())).iter().all(|x| *x == 1.0));
    }

    #[test]
    fn dropout_within_a_pass_only() {
        let x = || Tensor::<2>::ones([50, 200], &Device::flex());
        let pass = Pass {
            dropout: Dropout {
                hidden: 0.25,
                ..Dropout::default()
            },
            seed: 3,
            ..Pass::default()
        };
        let once =
            |pass: Pass| pass.run(|| (values(hidden(x())), values(hidden(x())), values(embedding(x()))));
        let (first, second, untouched) = once(pass);
        let zeros = first.iter().filter(|x| **x == 0.0).count();
        assert!((2200..2800).contains(&zeros), "{zeros}");
        assert!(first.iter().all(|x| *x == 0.0 || (*x - 4.0 / 3.0).abs() < 1e-6));
        assert_ne!(first, second);
        assert!(untouched.iter().all(|x| *x == 1.0));
        assert_eq!(once(pass).0, first);
        assert_ne!(once(Pass { seed: 4, ..pass }).0, first);
        assert!(values(hidden(x())).iter().all(|x| *x == 1.0));
    }

    #[test]
    fn noise_on_embeddings() {
        let pass = Pass {
            neftune_noise_alpha: 5.0,
            ..Pass::default()
        };
        let noisy = pass.run(|| values(noise(Tensor::<3>::zeros([2, 25, 16], &Device::flex()))));
        let most = 5.0 / 20.0;
        assert!(noisy.iter().all(|x| x.abs() <= most) && noisy.iter().any(|x| x.abs() > 0.9 * most));
    }

    #[test]
    fn rates_by_the_names_of_architectures() {
        let of = |config| Dropout::of_config(&config);
        let gpt2 = of(json!({"model_type": "gpt2", "embd_pdrop": 0.1, "resid_pdrop": 0.2}));
        assert_eq!((gpt2.embedding, gpt2.hidden, gpt2.activation), (0.1, 0.2, 0.0));
        let bert = of(json!({"hidden_dropout_prob": 0.1, "classifier_dropout": null}));
        assert_eq!((bert.embedding, bert.hidden, bert.classifier), (0.1, 0.1, 0.1));
        let t5 = of(json!({"model_type": "t5"}));
        assert_eq!((t5.embedding, t5.activation), (0.1, 0.1));
        assert_eq!(
            of(json!({"model_type": "t5", "dropout_rate": 0.0})),
            Dropout::default()
        );
        assert_eq!(
            of(json!({"model_type": "llama", "attention_dropout": 0.0})),
            Dropout::default()
        );
    }
}
