//! What a model does only while it is trained: dropout (Srivastava et al., 2014) and noise on embeddings (NEFTune: Jain et
//! al., 2023).
//!
//! Layers ask here at the places where Transformers' models have their dropout; outside of [`Pass::run`] nothing happens.

use std::cell::RefCell;

use burn::tensor::{Tensor, TensorData};
use oxiformers_kernels::dropout::{self, draw};

/// Shares of values that are left out.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Dropout {
    /// Of embeddings.
    pub embedding: f64,
    /// Of the weights that attention gives to keys.
    pub attention: f64,
    /// Of what attention adds to the hidden states.
    pub attention_output: f64,
    /// Of what feed-forward blocks add to the hidden states.
    pub feed_forward: f64,
    /// Of what attention and a feed-forward block beside it add together.
    pub parallel: f64,
    /// Within feed-forward blocks, after the activation.
    pub activation: f64,
    /// Of what the last norm makes.
    pub last: f64,
    /// Of what the first layer of a head gets.
    pub head_input: f64,
    /// Of what a head's output layer gets.
    pub classifier: f64,
    /// Whether adapters leave out the shares of their own configurations.
    pub adapters: bool,
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
    /// Runs `forward`, whose layers leave out and add noise as this says.
    pub fn run<T>(self, forward: impl FnOnce() -> T) -> T {
        /// Ends the pass, also where `forward` panics.
        struct End;
        impl Drop for End {
            fn drop(&mut self) {
                RUNNING.with_borrow_mut(Option::take);
            }
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

/// `x` as a constant. Burn's `detach` alone would leave a parameter one: all that is made of it would be kept for a backward
/// pass that never comes.
pub(crate) fn constant<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.detach().set_require_grad(false)
}

/// Which of so many values the running pass leaves out next; none where it leaves out nothing.
fn next_dropout(share: impl Fn(&Dropout) -> f64) -> Option<dropout::Dropout> {
    let rate = share(&running()?.dropout);
    if rate == 0.0 {
        return None;
    }
    let (_, seed) = next()?;
    Some(dropout::Dropout { rate, seed })
}

/// `x` with a share of its values set to 0 and the others scaled up, so that their expectation stays.
fn dropped<const D: usize>(x: Tensor<D>, share: impl Fn(&Dropout) -> f64) -> Tensor<D> {
    let Some(dropout) = next_dropout(share) else {
        return x;
    };
    let factors = TensorData::new(dropout.factors(x.shape().num_elements()), x.dims());
    let factors = Tensor::<D>::from_data(factors, &x.device());
    x.clone() * factors.cast(x.dtype())
}

/// Dropout of embeddings.
pub fn embedding<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    dropped(x, |dropout| dropout.embedding)
}

/// Which weights of an attention are left out.
pub fn attention() -> Option<dropout::Dropout> {
    next_dropout(|dropout| dropout.attention)
}

/// Dropout of what attention adds to the hidden states.
pub fn attention_output<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    dropped(x, |dropout| dropout.attention_output)
}

/// Dropout of what a feed-forward block adds to the hidden states.
pub fn feed_forward<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    dropped(x, |dropout| dropout.feed_forward)
}

/// Dropout of what attention and a feed-forward block beside it add together to the hidden states.
pub fn parallel<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    dropped(x, |dropout| dropout.parallel)
}

/// Dropout of what the last norm makes.
pub fn last<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    dropped(x, |dropout| dropout.last)
}

/// Dropout before the first layer of a head.
pub fn head_input<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    dropped(x, |dropout| dropout.head_input)
}

/// Dropout after the activation of a feed-forward block.
pub fn activation<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    dropped(x, |dropout| dropout.activation)
}

/// Dropout of what an adapter gets, which has a share of its own.
pub(crate) fn adapter<const D: usize>(x: Tensor<D>, share: f64) -> Tensor<D> {
    match drops_for_adapters() {
        true => dropped(x, |_| share),
        false => x,
    }
}

/// Whether there is dropout of what adapters get.
pub(crate) fn drops_for_adapters() -> bool {
    running().is_some_and(|pass| pass.dropout.adapters)
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
    // The 24 bits that an f32 holds.
    let unit = |place: usize| (draw(seed, place as u64) >> 40) as f32 / (1 << 24) as f32;
    let noise: Vec<f32> = (0..x.shape().num_elements())
        .map(|place| (2.0 * unit(place) - 1.0) * most)
        .collect();
    let noise = Tensor::<3>::from_data(TensorData::new(noise, x.dims()), &x.device());
    x.clone() + noise.cast(x.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
        x.into_data().iter::<f32>().collect()
    }

    #[test]
    fn what_is_computed_again_draws_the_same() {
        let x = || Tensor::<2>::ones([5, 40], &Device::flex());
        let pass = Pass {
            dropout: Dropout {
                feed_forward: 0.5,
                ..Dropout::default()
            },
            ..Pass::default()
        };
        let (draws, first, second) = pass.run(|| {
            values(feed_forward(x()));
            let draws = draws();
            (draws, values(feed_forward(x())), values(feed_forward(x())))
        });
        assert_ne!(first, second);
        let again = draws.again(|| (values(feed_forward(x())), values(feed_forward(x()))));
        assert_eq!(again, (first, second));
        assert!(values(feed_forward(x())).iter().all(|x| *x == 1.0));
    }

    #[test]
    fn dropout_within_a_pass_only() {
        let x = || Tensor::<2>::ones([50, 200], &Device::flex());
        let pass = Pass {
            dropout: Dropout {
                feed_forward: 0.25,
                ..Dropout::default()
            },
            seed: 3,
            ..Pass::default()
        };
        let once = |pass: Pass| {
            pass.run(|| {
                (
                    values(feed_forward(x())),
                    values(feed_forward(x())),
                    values(embedding(x())),
                )
            })
        };
        let (first, second, untouched) = once(pass);
        let zeros = first.iter().filter(|x| **x == 0.0).count();
        assert!((2200..2800).contains(&zeros), "{zeros}");
        assert!(first.iter().all(|x| *x == 0.0 || (*x - 4.0 / 3.0).abs() < 1e-6));
        assert_ne!(first, second);
        assert!(untouched.iter().all(|x| *x == 1.0));
        assert_eq!(once(pass).0, first);
        assert_ne!(once(Pass { seed: 4, ..pass }).0, first);
        assert!(values(feed_forward(x())).iter().all(|x| *x == 1.0));
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
}
