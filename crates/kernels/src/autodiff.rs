//! Operators with a backward pass of their own, on the CPU.
//!
//! An operator opens its tensors where automatic differentiation knows at least one of them, computes on their
//! values, and records what its backward pass does.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, BackendTensor, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind, Flex,
};
use burn::tensor::{DType, Shape, Tensor, TensorData};

use crate::flex;

/// A tensor of the CPU that automatic differentiation knows.
type Known = FloatTensor<Autodiff<Flex>>;

/// Where the gradients of at most `N` tensors go, each at a place of its own.
pub(crate) struct Tape<const N: usize> {
    guards: [Option<NodeGuard>; N],
    context: DispatchAutodiffContext,
    is_tracked: bool,
}

#[cfg(test)]
thread_local! {
    /// Set where a test wants operators that are made of tensor operations.
    pub(crate) static REFERENCE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// The values of tensors of f32 on the CPU, where automatic differentiation knows one of them; else the tensors back.
#[allow(clippy::type_complexity)]
pub(crate) fn open<const N: usize>(
    tensors: [DispatchTensor; N],
) -> Result<([FlexTensor; N], Tape<N>), [DispatchTensor; N]> {
    let Some(mut tape) = Tape::over(tensors.iter()) else {
        return Err(tensors);
    };
    let mut place = 0;
    let values = tensors.map(|x| {
        place += 1;
        tape.open(place - 1, x)
    });
    Ok((values, tape))
}

/// Whether automatic differentiation knows the tensor, and it is of f32 on the CPU.
pub fn knows<const D: usize>(x: &Tensor<D>) -> bool {
    known(&x.clone().into_dispatch()).is_some_and(|x| x.primitive().dtype() == DType::F32)
}

/// Whether a gradient of the tensor is wanted.
pub(crate) fn is_tracked(x: &DispatchTensor) -> bool {
    match known(x) {
        Some(x) => x.is_tracked(),
        // On other devices nobody knows without asking.
        None => x.autodiff != DispatchAutodiffContext::Disabled,
    }
}

fn known(x: &DispatchTensor) -> Option<&Known> {
    match &x.kind {
        DispatchTensorKind::Autodiff(inner) => match inner.as_ref() {
            DispatchTensorKind::Flex(BackendTensor::Autodiff(x)) => Some(x),
            #[allow(unreachable_patterns)]
            _ => None,
        },
        _ => None,
    }
}

/// What [fits](Tape::over).
fn into_known(x: DispatchTensor) -> Known {
    match x.kind {
        DispatchTensorKind::Autodiff(inner) => match *inner {
            DispatchTensorKind::Flex(x) => x.autodiff(),
            #[allow(unreachable_patterns)]
            _ => unreachable!("asked for the values of a tensor that is elsewhere"),
        },
        kind => Known::new(flex::inner(DispatchTensor {
            kind,
            autodiff: DispatchAutodiffContext::Disabled,
        })),
    }
}

impl<const N: usize> Tape<N> {
    /// For an operator of these tensors; None unless automatic differentiation knows one of them, and all are of f32 on
    /// the CPU.
    pub fn over<'a>(tensors: impl Iterator<Item = &'a DispatchTensor> + Clone) -> Option<Self> {
        #[cfg(test)]
        if REFERENCE.get() {
            return None;
        }
        let mut contexts = tensors.clone().map(|x| x.autodiff);
        let context = contexts.find(|context| *context != DispatchAutodiffContext::Disabled)?;
        let fits = |x: &DispatchTensor| {
            flex::is_plain(x)
                || x.autodiff == context && known(x).is_some_and(|x| x.primitive().dtype() == DType::F32)
        };
        tensors.clone().all(fits).then(|| Self {
            guards: [const { None }; N],
            context,
            is_tracked: false,
        })
    }

    /// The values of one of the tensors, whose gradient is the one at `place`.
    pub fn open(&mut self, place: usize, x: DispatchTensor) -> FlexTensor {
        let x = into_known(x);
        self.is_tracked |= x.is_tracked();
        let (values, guard) = x.into_parts();
        self.guards[place] = Some(guard);
        values
    }

    /// A node for each place: one without a gradient where no tensor was opened.
    fn nodes(self) -> [NodeGuard; N] {
        let nobody = || {
            Known::new(FlexTensor::empty(Shape::from([0]), DType::F32))
                .into_parts()
                .1
        };
        self.guards.map(|guard| guard.unwrap_or_else(nobody))
    }

    /// The result `out` of the operator. `backward` makes the gradients of its tensors of the gradient of the result, where
    /// the second argument says that they are wanted; each must have the shape of its tensor.
    pub fn record<const D: usize>(
        self,
        out: FlexTensor,
        backward: impl FnOnce(FlexTensor, [bool; N]) -> [Option<FlexTensor>; N] + Send + 'static,
    ) -> Tensor<D> {
        let context = self.context;
        let out = if self.is_tracked {
            let step = Step::<N>.prepare::<NoCheckpointing>(self.nodes());
            match step.compute_bound().stateful() {
                OpsKind::Tracked(step) => step.finish(State::new(backward), out),
                OpsKind::UnTracked(step) => step.finish(out),
            }
        } else {
            Known::new(out)
        };
        Tensor::from_dispatch(DispatchTensor {
            kind: DispatchTensorKind::Autodiff(Box::new(DispatchTensorKind::Flex(BackendTensor::Autodiff(
                out,
            )))),
            autodiff: context,
        })
    }
}

/// The backward pass of one operator of the graph.
#[derive(Debug)]
struct Step<const N: usize>;

type Rule<const N: usize> = dyn FnOnce(FlexTensor, [bool; N]) -> [Option<FlexTensor>; N] + Send;

/// What runs once, when the gradient is there.
#[derive(Clone)]
struct State<const N: usize>(Arc<Mutex<Option<Box<Rule<N>>>>>);

impl<const N: usize> State<N> {
    fn new(rule: impl FnOnce(FlexTensor, [bool; N]) -> [Option<FlexTensor>; N] + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(Some(Box::new(rule)))))
    }
}

impl<const N: usize> fmt::Debug for State<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("State")
    }
}

impl<const N: usize> Backward<Flex, N> for Step<N> {
    type State = State<N>;

    fn backward(self, ops: Ops<State<N>, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<Flex>(&ops.node);
        let rule = ops.state.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(rule) = rule else {
            return;
        };
        let wanted = ops.parents.each_ref().map(Option::is_some);
        for (parent, gradient) in ops.parents.into_iter().zip(rule(gradient, wanted)) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

/// Tensors besides parameters that gradients of a recomputed part go to.
pub const MOST_INPUTS: usize = 4;

/// What is [recomputed](recompute), with tensors of its own in place of those that it was made of.
pub struct Again {
    /// The result.
    pub out: DispatchTensor,
    /// Those in place of the inputs.
    pub inputs: Vec<DispatchTensor>,
    /// Those in place of the parameters.
    pub parameters: Vec<DispatchTensor>,
}

/// A part of a model whose inner values are not kept, but computed again in the backward pass (Chen et al., 2016).
///
/// `out` is its result, computed without gradients, of `inputs` (at most [`MOST_INPUTS`], of any rank) and `parameters`,
/// which are leaves of the graph. `again` computes the same of tensors of its own. All of them are [known](knows). None where
/// no gradient is wanted.
pub fn recompute<const D: usize>(
    out: Tensor<D>,
    inputs: Vec<DispatchTensor>,
    parameters: Vec<DispatchTensor>,
    again: impl FnOnce() -> Again + Send + 'static,
) -> Option<Tensor<D>> {
    const N: usize = MOST_INPUTS + 1;
    let wanted: Vec<bool> = inputs.iter().map(is_tracked).collect();
    let parameters: Vec<_> = parameters.into_iter().filter(|x| known(x).is_some()).collect();
    let ids: Vec<NodeId> = parameters.iter().filter_map(known).map(|x| x.id()).collect();
    // One of the parameters stands for all of them.
    let own = parameters.into_iter().find(is_tracked);
    let mut tape = Tape::<N>::over(inputs.iter().chain(&own))?;
    for (place, x) in inputs.into_iter().take(MOST_INPUTS).enumerate() {
        tape.open(place, x);
    }
    if let Some(own) = own {
        tape.open(MOST_INPUTS, own);
    }
    if !tape.is_tracked {
        return None;
    }
    let out = out.into_dispatch();
    let out = match flex::is_plain(&out) {
        true => flex::inner(out),
        false => known(&out)?.primitive().clone(),
    };
    let rule = move |g: FlexTensor| {
        let again = again();
        let seed = seed(into_known(again.out), g);
        let gradients = seed.backward();
        let mut found = Vec::new();
        for ((index, x), wanted) in again.inputs.iter().enumerate().zip(wanted) {
            if let Some(g) = known(x).filter(|_| wanted).and_then(|x| x.grad(&gradients)) {
                found.push((Target::Input(index), g));
            }
        }
        for (id, x) in ids.into_iter().zip(&again.parameters) {
            if let Some(g) = known(x).and_then(|x| x.grad(&gradients)) {
                found.push((Target::Parameter(id), g));
            }
        }
        found
    };
    let context = tape.context;
    let step = Recompute.prepare::<NoCheckpointing>(tape.nodes());
    let out = match step.compute_bound().stateful() {
        OpsKind::Tracked(step) => step.finish(Shared(Arc::new(Mutex::new(Some(Box::new(rule))))), out),
        OpsKind::UnTracked(step) => step.finish(out),
    };
    Some(Tensor::from_dispatch(DispatchTensor {
        kind: DispatchTensorKind::Autodiff(Box::new(DispatchTensorKind::Flex(BackendTensor::Autodiff(out)))),
        autodiff: context,
    }))
}

/// A number from which the backward pass starts with the gradient `g` of `x`.
fn seed(x: Known, g: FlexTensor) -> Known {
    let (_, guard) = x.into_parts();
    let one = FlexTensor::from_data(TensorData::new(vec![0.0f32], Shape::from([1])));
    let step = Step::<1>.prepare::<NoCheckpointing>([guard]);
    match step.compute_bound().stateful() {
        OpsKind::Tracked(step) => step.finish(State::new(move |_, _| [Some(g)]), one),
        OpsKind::UnTracked(step) => step.finish(one),
    }
}

/// Whose gradient it is.
enum Target {
    Input(usize),
    Parameter(NodeId),
}

/// The backward pass of what is recomputed.
#[derive(Debug)]
struct Recompute;

type Recomputed = dyn FnOnce(FlexTensor) -> Vec<(Target, FlexTensor)> + Send;

#[derive(Clone)]
struct Shared(Arc<Mutex<Option<Box<Recomputed>>>>);

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shared")
    }
}

impl Backward<Flex, { MOST_INPUTS + 1 }> for Recompute {
    type State = Shared;

    fn backward(self, ops: Ops<Shared, { MOST_INPUTS + 1 }>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<Flex>(&ops.node);
        let rule = ops.state.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(rule) = rule else {
            return;
        };
        for (target, gradient) in rule(gradient) {
            match target {
                Target::Input(index) => {
                    if let Some(parent) = &ops.parents[index] {
                        grads.register::<Flex>(parent.id, gradient);
                    }
                }
                Target::Parameter(id) => grads.register::<Flex>(id, gradient),
            }
        }
    }
}
