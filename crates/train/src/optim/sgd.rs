//! Stochastic gradient descent with momentum (Polyak, 1964).

use std::collections::BTreeMap;

use super::{CHUNK, Optimizer, Parameter, Shapes, State, Step, parallel, state};
use crate::Result;

/// SGD as `torch.optim.SGD` computes it; the decay of weights is part of the gradient.
#[derive(Debug)]
pub struct Sgd {
    momentum: f64,
    nesterov: bool,
    weight_decay: f64,
    buffers: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Sgd {
    /// With momentum (0 for none), looking ahead or not, and the decay of weights.
    pub fn new(momentum: f64, nesterov: bool, weight_decay: f64) -> Self {
        Self {
            momentum,
            nesterov,
            weight_decay,
            buffers: BTreeMap::new(),
        }
    }
}

impl Optimizer for Sgd {
    fn update(&mut self, parameter: Parameter<'_>, values: &mut [f32], grad: &[f32], step: Step) {
        let decay = if parameter.decays {
            self.weight_decay as f32
        } else {
            0.0
        };
        let (lr, scale, momentum) = (step.lr as f32, step.grad_scale, self.momentum as f32);
        let chunks = values.chunks_mut(CHUNK).zip(grad.chunks(CHUNK));
        if self.momentum == 0.0 {
            parallel(chunks, |(x, grad)| {
                pulp::Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        for (x, grad) in x.iter_mut().zip(grad) {
                            *x -= lr * (grad * scale + decay * *x);
                        }
                    },
                );
            });
            return;
        }
        let nesterov = self.nesterov;
        // The first gradient is the first momentum, which adding it to zeros makes of it.
        let (_, buffer) = (self.buffers)
            .entry(parameter.name.to_string())
            .or_insert_with(|| (parameter.shape.to_vec(), vec![0.0; grad.len()]));
        parallel(chunks.zip(buffer.chunks_mut(CHUNK)), |((x, grad), buffer)| {
            pulp::Arch::new().dispatch(
                #[inline(always)]
                || {
                    for ((x, grad), buffer) in x.iter_mut().zip(grad).zip(buffer) {
                        let grad = grad * scale + decay * *x;
                        *buffer = *buffer * momentum + grad;
                        let ahead = grad + momentum * *buffer;
                        *x -= lr * if nesterov { ahead } else { *buffer };
                    }
                },
            );
        });
    }

    fn state(&self) -> State {
        let save = |(name, (shape, values)): (&String, &(Vec<usize>, Vec<f32>))| {
            (format!("{name}.momentum_buffer"), state::floats(values, shape))
        };
        self.buffers.iter().map(save).collect()
    }

    fn load_state(&mut self, state: &State, shapes: &Shapes) -> Result<()> {
        let load = |from: &state::Moments| Ok((from.shape.to_vec(), from.floats("momentum_buffer")?));
        self.buffers = state::load(state, shapes, &["momentum_buffer"], load)?;
        Ok(())
    }
}
