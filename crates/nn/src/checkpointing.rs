//! Gradient checkpointing: layers whose inner values are computed again in the backward pass.

use std::cell::Cell;

use burn::backend::DispatchTensor;
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;
use oxiformers_kernels::autodiff::{Again, knows, recompute};

use crate::{Context, training};

thread_local! {
    static CHECKPOINTING: Cell<bool> = const { Cell::new(false) };
}

/// Runs `forward` with gradient checkpointing (Chen et al., 2016): of each layer only the input is kept, and the layer runs
/// once more in the backward pass. Gradients are the same. It takes part where models are on the CPU, in f32, and sequences
/// are read as a whole; elsewhere nothing changes.
pub fn with_gradient_checkpointing<R>(forward: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            CHECKPOINTING.set(self.0);
        }
    }
    let _restore = Restore(CHECKPOINTING.replace(true));
    forward()
}

/// Runs a layer, so that its inner values are not kept where that is asked for.
pub(crate) fn run_layer<L: Module + 'static>(
    layer: &L,
    x: Tensor<3>,
    cx: &mut Context,
    forward: impl Fn(&L, Tensor<3>, &mut Context) -> Tensor<3> + Send + Copy + 'static,
) -> Tensor<3> {
    if !CHECKPOINTING.get() || !knows(&x) {
        return forward(layer, x, cx);
    }
    let Some(alone) = cx.alone() else {
        return forward(layer, x, cx);
    };
    let mut leaves = Leaves::default();
    let untracked = layer.clone().map(&mut leaves);
    let Leaves { parameters, wanted } = leaves;
    let tensors = alone.tensors();
    let given = [x.clone().into_dispatch()].into_iter();
    let inputs = given
        .chain(tensors.iter().map(|x| x.clone().into_dispatch()))
        .collect();
    // Nothing of the graph may stand in it.
    let alone = alone.with(tensors.into_iter().map(Tensor::detach).collect());
    let x = x.detach();
    // Dropout leaves out the same values when the layer runs again.
    let draws = training::draws();
    let out = forward(&untracked, x.clone(), &mut alone.clone().context());
    let again = move || {
        let mut own = Own {
            parameters: Vec::new(),
            wanted,
        };
        let layer = untracked.map(&mut own);
        let tensors: Vec<_> = (alone.tensors().into_iter())
            .map(|x| x.detach().require_grad())
            .collect();
        let x = x.require_grad();
        let given = [x.clone().into_dispatch()].into_iter();
        let inputs = given
            .chain(tensors.iter().map(|x| x.clone().into_dispatch()))
            .collect();
        let out = draws.again(|| forward(&layer, x, &mut alone.with(tensors).context()));
        Again {
            out: out.into_dispatch(),
            inputs,
            parameters: own.parameters,
        }
    };
    // Without one, no gradient is wanted.
    recompute(out.clone(), inputs, parameters, again).unwrap_or(out)
}

/// Takes the parameters out of a module, and leaves it without gradients.
#[derive(Default)]
struct Leaves {
    parameters: Vec<DispatchTensor>,
    wanted: Vec<bool>,
}

impl ModuleMapper for Leaves {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let tensor = param.val();
        self.wanted.push(tensor.is_require_grad());
        self.parameters.push(tensor.clone().into_dispatch());
        Param::initialized(param.id, training::constant(tensor))
    }
}

/// Gives a module leaves of its own.
struct Own {
    parameters: Vec<DispatchTensor>,
    /// Whether gradients of them are wanted, in the order of the module.
    wanted: Vec<bool>,
}

impl ModuleMapper for Own {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let tensor = param.val();
        let wanted = self.wanted.get(self.parameters.len()).copied().unwrap_or(false);
        let own = if wanted { tensor.require_grad() } else { tensor };
        self.parameters.push(own.clone().into_dispatch());
        Param::initialized(param.id, own)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::{Cache, CacheKind};

    thread_local! {
        /// Whether what the layer made wants a gradient, run for run.
        static TRACKED: std::cell::RefCell<Vec<bool>> = const { std::cell::RefCell::new(Vec::new()) };
    }

    #[derive(Module, Debug)]
    struct Layer {
        weight: Param<Tensor<3>>,
    }

    /// The first run of a layer leaves no graph behind, the second one has the gradients.
    #[test]
    fn nothing_is_kept_of_the_first_run() {
        let device = Device::flex().autodiff();
        let layer = Layer {
            weight: Param::from_tensor(Tensor::from_floats([[[2.0, 3.0]]], &device)),
        };
        let x = Tensor::<3>::from_floats([[[5.0, 7.0]]], &device);
        let mut cache = Cache::new(CacheKind::Dynamic, &[None], vec![0]);
        let mut cx = Context::new(&mut cache, 1, device.clone());
        let forward = |layer: &Layer, x: Tensor<3>, _: &mut Context| {
            let y = layer.weight.val() * x;
            TRACKED.with_borrow_mut(|tracked| tracked.push(y.is_tracked()));
            y
        };
        let y = with_gradient_checkpointing(|| run_layer(&layer, x, &mut cx, forward));
        TRACKED.with_borrow(|tracked| assert_eq!(tracked, &[false]));
        let gradients = y.sum().backward();
        TRACKED.with_borrow(|tracked| assert_eq!(tracked, &[false, true]));
        let gradient = layer.weight.val().grad(&gradients).expect("gradient");
        assert_eq!(gradient.into_data().iter::<f32>().collect::<Vec<_>>(), [5.0, 7.0]);
    }
}
