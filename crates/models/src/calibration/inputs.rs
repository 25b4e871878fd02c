//! What the linear layers of a model layer are given.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::Tensor;
use oxiformers_nn::Observer;
use oxiformers_nn::quant::calibrate::Hessian;

/// Sums up the inputs of some linear layers; layers with the same inputs share what is known of them.
#[derive(Debug, Default)]
pub struct Inputs {
    /// Names of the weights; none for all.
    wanted: Option<BTreeSet<String>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What was seen, and the first weight that is multiplied with it.
    seen: Vec<(String, Option<Hessian>)>,
    /// Which of them belongs to a weight.
    of: BTreeMap<String, usize>,
    /// Names in the order in which they were first seen.
    order: Vec<String>,
    /// Inputs of the sequence that runs, by their values.
    recent: HashMap<(usize, u64), usize>,
    /// Weights whose inputs were another's for a while, and then no longer.
    alone: BTreeSet<String>,
    parted: bool,
}

impl Inputs {
    /// Notes which weights are multiplied in which order, and which of them with the same inputs.
    pub fn names() -> Self {
        Self::default()
    }

    /// Sums up what the weights `wanted` are multiplied with.
    pub fn sums(wanted: BTreeSet<String>) -> Self {
        Self {
            wanted: Some(wanted),
            state: Mutex::default(),
        }
    }

    /// Says that another sequence begins.
    pub fn begin(&self) {
        self.state().recent.clear();
    }

    /// Whether everything has to be seen once more, because what seemed to be the same was not; all is forgotten then.
    pub fn again(&self) -> bool {
        let mut state = self.state();
        let again = state.parted;
        if again {
            let alone = std::mem::take(&mut state.alone);
            *state = State {
                alone,
                ..State::default()
            };
        }
        again
    }

    /// The weights that were multiplied, first things first.
    pub fn order(&self) -> Vec<String> {
        self.state().order.clone()
    }

    /// The weights that were multiplied with the same inputs as `name`, itself included.
    pub fn together(&self, name: &str) -> Vec<String> {
        let state = self.state();
        let Some(index) = state.of.get(name) else {
            return Vec::new();
        };
        state
            .order
            .iter()
            .filter(|other| state.of.get(*other) == Some(index))
            .cloned()
            .collect()
    }

    /// Calls `f` with what is known of the inputs of a weight; `None` where it was never multiplied.
    pub fn with<T>(&self, name: &str, f: impl FnOnce(Option<&Hessian>) -> T) -> T {
        let state = self.state();
        let hessian = state.of.get(name).and_then(|index| state.seen[*index].1.as_ref());
        f(hessian)
    }

    /// Changes what is known of the inputs of a weight and of those that share them.
    pub fn change(&self, name: &str, f: impl FnOnce(&mut Hessian)) {
        let mut state = self.state();
        let index = state.of.get(name).copied();
        if let Some(hessian) = index.and_then(|index| state.seen[index].1.as_mut()) {
            f(hessian);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A sum is never left half-done but where a kernel panics, which ends calibration.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Inputs {
    fn observe(&self, name: &str, x: Tensor<2>) {
        if self.wanted.as_ref().is_some_and(|wanted| !wanted.contains(name)) {
            return;
        }
        let [rows, features] = x.dims();
        let data = x.into_data();
        let Ok(values) = data.as_slice::<f32>() else {
            return;
        };
        let mut hasher = DefaultHasher::new();
        hasher.write(data.bytes());
        let key = (features, hasher.finish());
        let mut state = self.state();
        let State {
            seen,
            of,
            order,
            recent,
            alone,
            parted,
        } = &mut *state;
        let known = of.get(name).copied();
        if known.is_none() {
            order.push(name.to_string());
        }
        let same = recent.get(&key).copied().filter(|_| !alone.contains(name));
        let index = match (known, same) {
            // The weight that came first adds for all.
            (Some(known), Some(same)) if known == same && seen[known].0 != name => return,
            (None, Some(same)) => {
                of.insert(name.to_string(), same);
                return;
            }
            (Some(known), _) if seen[known].0 == name => known,
            (Some(_), _) => {
                alone.insert(name.to_string());
                *parted = true;
                return;
            }
            (None, None) => {
                let hessian = self.wanted.is_some().then(|| Hessian::new(features));
                seen.push((name.to_string(), hessian));
                of.insert(name.to_string(), seen.len() - 1);
                seen.len() - 1
            }
        };
        recent.insert(key, index);
        if let Some(hessian) = seen[index].1.as_mut().filter(|_| rows > 0) {
            hessian.add(values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    fn x(values: [f32; 4]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values.to_vec(), [2, 2]), &Device::flex())
    }

    #[test]
    fn equal_inputs_are_summed_once() {
        let names = ["q", "k", "o"].map(str::to_string);
        let inputs = Inputs::sums(names.into_iter().collect());
        for values in [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]] {
            inputs.begin();
            inputs.observe("q", x(values));
            inputs.observe("router", x([0.0; 4]));
            inputs.observe("k", x(values));
            inputs.observe("o", x([1.0; 4]));
        }
        assert_eq!(inputs.order(), ["q", "k", "o"]);
        assert_eq!(inputs.together("k"), ["q", "k"]);
        inputs.with("k", |hessian| assert_eq!(hessian.unwrap().rows(), 4));
        inputs.with("router", |hessian| assert!(hessian.is_none()));
        assert!(!inputs.again());
        // From here on they differ.
        let pass = || {
            inputs.begin();
            inputs.observe("q", x([1.0; 4]));
            inputs.observe("k", x([1.0; 4]));
            inputs.begin();
            inputs.observe("q", x([1.0; 4]));
            inputs.observe("k", x([2.0; 4]));
        };
        pass();
        assert!(inputs.again());
        pass();
        assert!(!inputs.again());
        assert_eq!(inputs.together("k"), ["k"]);
        inputs.with("k", |hessian| {
            assert_eq!(hessian.unwrap().mean_squares(), [2.5, 2.5])
        });
    }
}
