//! Lion (Chen et al., 2023): the sign of a mean of gradients.

use std::collections::BTreeMap;

use super::{CHUNK, Optimizer, Parameter, Shapes, State, Step, parallel, state};
use crate::Result;

/// Lion as `bitsandbytes.optim.Lion` computes it.
#[derive(Debug)]
pub struct Lion {
    betas: [f64; 2],
    weight_decay: f64,
    means: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Lion {
    /// With the shares of the mean in what is stepped by, and in the next mean; and the decay of weights.
    pub fn new(betas: [f64; 2], weight_decay: f64) -> Self {
        Self {
            betas,
            weight_decay,
            means: BTreeMap::new(),
        }
    }
}

impl Optimizer for Lion {
    fn update(&mut self, parameter: Parameter<'_>, values: &mut [f32], grad: &[f32], step: Step) {
        let decay = if parameter.decays { self.weight_decay } else { 0.0 };
        let (keep, lr) = ((1.0 - step.lr * decay) as f32, step.lr as f32);
        let [beta1, beta2] = self.betas.map(|beta| beta as f32);
        let scale = step.grad_scale;
        let (_, mean) = (self.means)
            .entry(parameter.name.to_string())
            .or_insert_with(|| (parameter.shape.to_vec(), vec![0.0; grad.len()]));
        let chunks = (values.chunks_mut(CHUNK).zip(grad.chunks(CHUNK))).zip(mean.chunks_mut(CHUNK));
        parallel(chunks, |((x, grad), mean)| {
            pulp::Arch::new().dispatch(
                #[inline(always)]
                || {
                    for ((x, grad), mean) in x.iter_mut().zip(grad).zip(mean) {
                        let grad = grad * scale;
                        let direction = *mean * beta1 + (1.0 - beta1) * grad;
                        let sign = f32::from(direction > 0.0) - f32::from(direction < 0.0);
                        *x = *x * keep - lr * sign;
                        *mean = *mean * beta2 + (1.0 - beta2) * grad;
                    }
                },
            );
        });
    }

    fn state(&self) -> State {
        let save = |(name, (shape, values)): (&String, &(Vec<usize>, Vec<f32>))| {
            (format!("{name}.exp_avg"), state::floats(values, shape))
        };
        self.means.iter().map(save).collect()
    }

    fn load_state(&mut self, state: &State, shapes: &Shapes) -> Result<()> {
        let load = |from: &state::Moments| Ok((from.shape.to_vec(), from.floats("exp_avg")?));
        self.means = state::load(state, shapes, &["exp_avg"], load)?;
        Ok(())
    }
}
