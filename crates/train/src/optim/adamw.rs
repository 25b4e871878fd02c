//! AdamW: Adam (Kingma and Ba, 2015) with decoupled weight decay (Loshchilov and Hutter, 2019).

use std::collections::BTreeMap;

use super::{CHUNK, Optimizer, Parameter, Shapes, State, Step, parallel, state};
use crate::Result;

/// AdamW as `torch.optim.AdamW` computes it.
#[derive(Debug)]
pub struct AdamW {
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    moments: BTreeMap<String, Moments>,
}

/// What is remembered of a parameter.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    pub step: u64,
    pub shape: Vec<usize>,
    pub exp_avg: Vec<f32>,
    pub exp_avg_sq: Vec<f32>,
}

impl Moments {
    pub fn new(shape: &[usize], len: usize) -> Self {
        Self {
            step: 0,
            shape: shape.to_vec(),
            exp_avg: vec![0.0; len],
            exp_avg_sq: vec![0.0; len],
        }
    }

    pub fn save(&self, name: &str, to: &mut State) {
        to.insert(format!("{name}.step"), state::count(self.step));
        to.insert(
            format!("{name}.exp_avg"),
            state::floats(&self.exp_avg, &self.shape),
        );
        to.insert(
            format!("{name}.exp_avg_sq"),
            state::floats(&self.exp_avg_sq, &self.shape),
        );
    }

    pub fn load(from: &state::Moments) -> Result<Self> {
        Ok(Self {
            step: from.count("step")?,
            shape: from.shape.to_vec(),
            exp_avg: from.floats("exp_avg")?,
            exp_avg_sq: from.floats("exp_avg_sq")?,
        })
    }
}

impl AdamW {
    /// With the decays of the two means, what is added to the divisor, and the decay of weights.
    pub fn new(betas: [f64; 2], eps: f64, weight_decay: f64) -> Self {
        Self {
            betas,
            eps,
            weight_decay,
            moments: BTreeMap::new(),
        }
    }
}

/// Numbers of an update, the same for all values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Numbers {
    keep: f32,
    beta1: f32,
    beta2: f32,
    step_size: f32,
    correction2: f32,
    eps: f32,
    grad_scale: f32,
}

impl AdamW {
    /// Of the `t`th step of a parameter.
    pub(super) fn numbers(&self, decays: bool, t: u64, step: Step) -> Numbers {
        let weight_decay = if decays { self.weight_decay } else { 0.0 };
        let t = t as f64;
        Numbers {
            keep: (1.0 - step.lr * weight_decay) as f32,
            beta1: self.betas[0] as f32,
            beta2: self.betas[1] as f32,
            step_size: (step.lr / (1.0 - self.betas[0].powf(t))) as f32,
            correction2: (1.0 - self.betas[1].powf(t)).sqrt() as f32,
            eps: self.eps as f32,
            grad_scale: step.grad_scale,
        }
    }
}

impl Optimizer for AdamW {
    fn update(&mut self, parameter: Parameter<'_>, values: &mut [f32], grad: &[f32], step: Step) {
        let mut moments = (self.moments.remove(parameter.name))
            .unwrap_or_else(|| Moments::new(parameter.shape, values.len()));
        moments.step += 1;
        let numbers = self.numbers(parameter.decays, moments.step, step);
        let chunks = (values.chunks_mut(CHUNK).zip(grad.chunks(CHUNK)))
            .zip(moments.exp_avg.chunks_mut(CHUNK))
            .zip(moments.exp_avg_sq.chunks_mut(CHUNK));
        parallel(chunks, |(((x, grad), m), v)| {
            pulp::Arch::new().dispatch(
                #[inline(always)]
                || numbers.update(x, grad, m, v),
            );
        });
        self.moments.insert(parameter.name.to_string(), moments);
    }

    fn state(&self) -> State {
        let mut state = State::new();
        for (name, moments) in &self.moments {
            moments.save(name, &mut state);
        }
        state
    }

    fn load_state(&mut self, state: &State, shapes: &Shapes) -> Result<()> {
        self.moments = state::load(state, shapes, &["step", "exp_avg", "exp_avg_sq"], Moments::load)?;
        Ok(())
    }
}

impl Numbers {
    #[inline(always)]
    pub(super) fn update(self, x: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) {
        let (rest1, rest2) = (1.0 - self.beta1, 1.0 - self.beta2);
        for (((x, grad), m), v) in x.iter_mut().zip(grad).zip(m).zip(v) {
            let grad = grad * self.grad_scale;
            *m += (grad - *m) * rest1;
            *v = *v * self.beta2 + grad * grad * rest2;
            let denominator = v.sqrt() / self.correction2 + self.eps;
            *x = *x * self.keep - self.step_size * (*m / denominator);
        }
    }
}
