//! Mixtures of experts: routing weights to a mixture of feed-forward blocks.

use burn::module::Module;
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData, activation};

use crate::{Activation, GatedMlp, Result, Role, Weights};

/// The feed-forward blocks among which a router chooses.
#[derive(Module, Debug)]
pub struct Experts {
    experts: Vec<GatedMlp>,
}

impl Experts {
    /// Loads `count` gated blocks. Three forms are understood: one tensor per expert and layer
    /// (`0.gate_proj.weight`, with the names `[gate, up, down]`), one tensor for all experts per layer
    /// (`gate_proj.weight` `[count, inner, hidden]`), and gate and up stacked as well (`gate_up_proj`
    /// `[count, 2 * inner, hidden]`, `down_proj` `[count, hidden, inner]`).
    pub fn load(
        w: &Weights,
        count: usize,
        names: [&str; 3],
        hidden: usize,
        inner: usize,
        act: Activation,
    ) -> Result<Self> {
        let w = &w.with_role(Role::Expert);
        let experts = if w.is_stored("gate_up_proj") {
            let gate_up = w.matrices("gate_up_proj", [count, 2 * inner, hidden])?;
            let down = w.matrices("down_proj", [count, hidden, inner])?;
            let pairs = gate_up.into_iter().zip(down);
            pairs
                .map(|(gate_up, down)| GatedMlp::from_fused_matrices(gate_up, down, act))
                .collect()
        } else if w.is_stored(&format!("{}.weight", names[0])) {
            let stacked = |name: &str, shape| w.matrices(&format!("{name}.weight"), shape);
            let gate = stacked(names[0], [count, inner, hidden])?;
            let up = stacked(names[1], [count, inner, hidden])?;
            let down = stacked(names[2], [count, hidden, inner])?;
            let all = gate.into_iter().zip(up).zip(down);
            all.map(|((gate, up), down)| GatedMlp::from_matrices(gate, up, down, act))
                .collect()
        } else {
            (0..count)
                .map(|e| GatedMlp::load_named(&w.pp(e), names, hidden, inner, act, false))
                .collect::<Result<_>>()?
        };
        Ok(Self { experts })
    }

    /// The experts' answers to `x` `[tokens, hidden]`, mixed by `weights` `[tokens, count]`.
    pub fn forward(&self, x: Tensor<2>, weights: Tensor<2>) -> Tensor<2> {
        mix_experts(x, weights, |e, x| self.experts[e].forward(x))
    }
}

/// The `k` largest of `scores` `[tokens, experts]` in each row: values and indices, both `[tokens, k]`.
pub fn top_k(scores: Tensor<2>, k: usize) -> (Tensor<2>, Tensor<2, Int>) {
    scores.topk_with_indices(k, 1)
}

/// Softmax over all experts, the `k` largest kept, and if `normalize` scaled to sum to 1:
/// `[tokens, experts]` logits to `[tokens, experts]` weights that are zero for experts not chosen.
pub fn softmax_top_k(logits: Tensor<2>, k: usize, normalize: bool) -> Tensor<2> {
    let experts = logits.dims()[1];
    let (mut weights, indices) = top_k(activation::softmax(logits, 1), k);
    if normalize {
        weights = weights.clone() / weights.sum_dim(1);
    }
    spread(indices, weights, experts)
}

/// Chosen weights `[tokens, k]` at `indices` `[tokens, k]` as `[tokens, experts]`, zero elsewhere.
pub fn spread(indices: Tensor<2, Int>, weights: Tensor<2>, experts: usize) -> Tensor<2> {
    let [tokens, _] = weights.dims();
    Tensor::zeros([tokens, experts], (&weights.device(), weights.dtype())).scatter(
        1,
        indices,
        weights,
        IndexingUpdateOp::Add,
    )
}

/// `Σₑ weights[:, e] · expert(e, x)` for `x` `[tokens, hidden]` and `weights` `[tokens, experts]`.
///
/// On the CPU an expert runs over the tokens that chose it; elsewhere, where reading the choice back would
/// stall the device, over all of them.
pub fn mix_experts(
    x: Tensor<2>,
    weights: Tensor<2>,
    expert: impl Fn(usize, Tensor<2>) -> Tensor<2>,
) -> Tensor<2> {
    let device = x.device();
    let [_, experts] = weights.dims();
    let mut out = x.zeros_like();
    if device != Device::flex() {
        for e in 0..experts {
            out = out + expert(e, x.clone()) * weights.clone().narrow(1, e, 1);
        }
        return out;
    }
    let chosen: Vec<f32> = weights.clone().into_data().iter::<f32>().collect();
    for e in 0..experts {
        let tokens: Vec<i32> = (chosen.iter().skip(e).step_by(experts).enumerate())
            .filter(|(_, weight)| **weight != 0.0)
            .map(|(token, _)| token as i32)
            .collect();
        if tokens.is_empty() {
            continue;
        }
        let count = tokens.len();
        let tokens = Tensor::<1, Int>::from_data(TensorData::new(tokens, [count]), &device);
        let weight = weights.clone().narrow(1, e, 1).select(0, tokens.clone());
        let y = expert(e, x.clone().select(0, tokens.clone())) * weight;
        out = out.select_assign(0, tokens, y, IndexingUpdateOp::Add);
    }
    out
}
