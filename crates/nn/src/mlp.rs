//! Feed-forward blocks.

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_kernels::split;

use crate::linear::Matrix;
use crate::{Activation, Linear, Result, RmsNorm, Weights, training};

/// `down(act(gate(x)) · up(x))` (Shazeer, 2020).
#[derive(Module, Debug)]
pub struct GatedMlp {
    gate_proj: Option<Linear>,
    up_proj: Option<Linear>,
    /// Gate and up stacked, where the checkpoint has them so.
    gate_up_proj: Option<Linear>,
    down_proj: Linear,
    /// The norm of what `down_proj` takes.
    inner_norm: Option<RmsNorm>,
    #[module(skip)]
    act: Activation,
}

impl GatedMlp {
    /// Loads `gate_proj`, `up_proj` and `down_proj`.
    pub fn load(
        w: &Weights,
        hidden: usize,
        intermediate: usize,
        act: Activation,
        bias: bool,
    ) -> Result<Self> {
        Self::load_named(
            w,
            ["gate_proj", "up_proj", "down_proj"],
            hidden,
            intermediate,
            act,
            bias,
        )
    }

    /// Loads the three layers by the names `[gate, up, down]`.
    pub fn load_named(
        w: &Weights,
        [gate, up, down]: [&str; 3],
        hidden: usize,
        intermediate: usize,
        act: Activation,
        bias: bool,
    ) -> Result<Self> {
        Ok(Self {
            gate_proj: Some(Linear::load(&w.pp(gate), hidden, intermediate, bias)?),
            up_proj: Some(Linear::load(&w.pp(up), hidden, intermediate, bias)?),
            gate_up_proj: None,
            down_proj: Linear::load(&w.pp(down), intermediate, hidden, bias)?,
            inner_norm: None,
            act,
        })
    }

    /// Loads two layers by the names `[gate_up, down]`; of the first one's rows, the gate's come first.
    pub fn load_fused(
        w: &Weights,
        [gate_up, down]: [&str; 2],
        hidden: usize,
        intermediate: usize,
        act: Activation,
        bias: bool,
    ) -> Result<Self> {
        Ok(Self {
            gate_proj: None,
            up_proj: None,
            gate_up_proj: Some(Linear::load(&w.pp(gate_up), hidden, 2 * intermediate, bias)?),
            down_proj: Linear::load(&w.pp(down), intermediate, hidden, bias)?,
            inner_norm: None,
            act,
        })
    }

    /// From matrices that are cut out of a larger tensor: `[inner, hidden]` twice, `[hidden, inner]`.
    pub fn from_matrices(gate: Matrix, up: Matrix, down: Matrix, act: Activation) -> Self {
        Self {
            gate_proj: Some(Linear::from_matrix(gate)),
            up_proj: Some(Linear::from_matrix(up)),
            gate_up_proj: None,
            down_proj: Linear::from_matrix(down),
            inner_norm: None,
            act,
        }
    }

    /// From a matrix of gate rows followed by up rows `[2 * inner, hidden]`, and `[hidden, inner]`.
    pub fn from_fused_matrices(gate_up: Matrix, down: Matrix, act: Activation) -> Self {
        Self {
            gate_proj: None,
            up_proj: None,
            gate_up_proj: Some(Linear::from_matrix(gate_up)),
            down_proj: Linear::from_matrix(down),
            inner_norm: None,
            act,
        }
    }

    /// Adds a norm of what `down_proj` takes.
    pub fn with_inner_norm(mut self, norm: RmsNorm) -> Self {
        self.inner_norm = Some(norm);
        self
    }

    /// `[.., hidden]` to the same shape.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let (gate, up) = match (&self.gate_proj, &self.up_proj, &self.gate_up_proj) {
            (Some(gate), Some(up), _) if self.inner_norm.is_none() && !training::drops_activations() => {
                let layers = [gate, up, &self.down_proj];
                return training::feed_forward(Linear::gated_feed_forward(layers, x, self.act));
            }
            (Some(gate), Some(up), _) => Linear::forward_all([gate, up], x).into(),
            (_, _, Some(both)) => {
                let both = both.forward(x);
                let half = both.dims()[D - 1] / 2;
                let [gate, up] = split(both, [half, half]);
                (gate, up)
            }
            _ => return x,
        };
        let inner = training::activation(self.act.gated(gate, up));
        let inner = match &self.inner_norm {
            Some(norm) => norm.forward(inner),
            None => inner,
        };
        training::feed_forward(self.down_proj.forward(inner))
    }
}

/// `fc2(act(fc1(x)))`.
#[derive(Module, Debug)]
pub struct Mlp {
    fc1: Linear,
    fc2: Linear,
    #[module(skip)]
    act: Activation,
}

impl Mlp {
    /// Loads the two layers by the names `[in, out]`.
    pub fn load(
        w: &Weights,
        [fc1, fc2]: [&str; 2],
        hidden: usize,
        intermediate: usize,
        act: Activation,
        bias: bool,
    ) -> Result<Self> {
        Ok(Self {
            fc1: Linear::load(&w.pp(fc1), hidden, intermediate, bias)?,
            fc2: Linear::load(&w.pp(fc2), intermediate, hidden, bias)?,
            act,
        })
    }

    /// From two layers, for checkpoints that store them in a form of their own.
    pub fn new(fc1: Linear, fc2: Linear, act: Activation) -> Self {
        Self { fc1, fc2, act }
    }

    /// `[.., hidden]` to the same shape.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        if training::drops_activations() {
            let x = training::activation(self.fc1.forward_act(x, self.act));
            return training::feed_forward(self.fc2.forward(x));
        }
        training::feed_forward(Linear::feed_forward([&self.fc1, &self.fc2], x, self.act))
    }
}
