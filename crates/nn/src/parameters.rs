//! Which parameter of a model is which tensor of its checkpoint.

use std::sync::Mutex;

use burn::module::ParamId;

use crate::weights::lock;

/// Where the values of a parameter lie within a tensor of the checkpoint: the value `[i, j, …]` of the parameter is the one
/// at `offset + i · strides[0] + j · strides[1] + …`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Name of the tensor.
    pub tensor: String,
    /// Shape of the tensor.
    pub shape: Vec<usize>,
    /// Place of the first value.
    pub offset: usize,
    /// Steps between values, one for each dimension of the parameter.
    pub strides: Vec<usize>,
}

impl Slot {
    /// All of the tensor `name`, as it is stored.
    pub fn whole(name: impl Into<String>, shape: &[usize]) -> Self {
        Self {
            tensor: name.into(),
            shape: shape.to_vec(),
            offset: 0,
            strides: row_major(shape),
        }
    }

    /// All of the tensor `name` `[columns, rows]`, as `[rows, columns]`.
    pub fn transposed(name: impl Into<String>, [rows, columns]: [usize; 2]) -> Self {
        Self {
            tensor: name.into(),
            shape: vec![columns, rows],
            offset: 0,
            strides: vec![1, rows],
        }
    }

    /// The part `index` of the tensor `name` along its first dimension.
    pub fn part(name: impl Into<String>, index: usize, shape: &[usize]) -> Self {
        let strides = row_major(shape);
        Self {
            tensor: name.into(),
            shape: shape.to_vec(),
            offset: index * strides.first().copied().unwrap_or(0),
            strides: strides.into_iter().skip(1).collect(),
        }
    }

    /// Whether a parameter of that `shape` is the whole tensor, value by value.
    pub fn is_whole(&self, shape: &[usize]) -> bool {
        let count = |shape: &[usize]| shape.iter().product::<usize>();
        self.offset == 0 && self.strides == row_major(shape) && count(shape) == count(&self.shape)
    }

    /// Calls `f` with the place of each value of a parameter of that `shape`, in order.
    fn each(&self, shape: &[usize], mut f: impl FnMut(usize)) {
        let Some((last, outer)) = shape.split_last() else {
            return f(self.offset);
        };
        let step = self.strides.last().copied().unwrap_or(1);
        let rows = outer.iter().product::<usize>();
        let mut index = vec![0; outer.len()];
        for _ in 0..rows {
            let start: usize = (index.iter().zip(&self.strides))
                .map(|(i, stride)| i * stride)
                .sum();
            (0..*last).for_each(|i| f(self.offset + start + i * step));
            for (i, size) in index.iter_mut().zip(outer).rev() {
                *i += 1;
                if *i < *size {
                    break;
                }
                *i = 0;
            }
        }
    }

    /// The values of a parameter of that `shape`, of those of the tensor; 0 where there are none.
    pub fn gather(&self, shape: &[usize], stored: &[f32]) -> Vec<f32> {
        let mut values = Vec::with_capacity(shape.iter().product());
        self.each(shape, |at| values.push(stored.get(at).copied().unwrap_or(0.0)));
        values
    }

    /// Puts the values of a parameter of that `shape` among those of the tensor.
    pub fn scatter(&self, shape: &[usize], values: &[f32], stored: &mut [f32]) {
        let mut values = values.iter();
        self.each(shape, |at| {
            if let (Some(place), Some(value)) = (stored.get_mut(at), values.next()) {
                *place = *value;
            }
        });
    }
}

/// The strides of values that stand one after the other.
fn row_major(shape: &[usize]) -> Vec<usize> {
    (0..shape.len())
        .map(|axis| shape[axis + 1..].iter().product())
        .collect()
}

/// A trainable tensor of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// How Burn knows it.
    pub id: ParamId,
    /// Its name: that of the tensor, and a number where it is one of several parts of a tensor.
    pub name: String,
    /// Its shape here.
    pub shape: Vec<usize>,
    /// Where it stands in the checkpoint.
    pub slot: Slot,
}

/// The parameters of a model. Given with [`LoadOptions::parameters`](crate::LoadOptions::parameters), it is filled while
/// the model loads. Matrices that stay packed are no parameters.
#[derive(Debug, Default)]
pub struct Parameters(Mutex<Vec<Parameter>>);

impl Parameters {
    /// All of them, in the order of loading.
    pub fn trainable(&self) -> Vec<Parameter> {
        lock(&self.0).clone()
    }

    /// Takes note of one.
    pub fn add(&self, parameter: Parameter) {
        lock(&self.0).push(parameter);
    }

    /// Says where a parameter lies.
    pub(crate) fn lies(&self, id: ParamId, slot: Slot) {
        let mut all = lock(&self.0);
        if let Some(parameter) = all.iter_mut().find(|parameter| parameter.id == id) {
            parameter.slot = slot;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots() {
        let stored: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let whole = Slot::whole("x", &[2, 3, 2]);
        assert!(whole.is_whole(&[2, 3, 2]));
        assert_eq!(whole.gather(&[2, 3, 2], &stored), stored);
        // The second of two matrices, transposed.
        let part = Slot {
            offset: 6,
            strides: vec![1, 2],
            ..whole
        };
        let own = part.gather(&[2, 3], &stored);
        assert!(!part.is_whole(&[2, 3]));
        assert_eq!(own, [6.0, 8.0, 10.0, 7.0, 9.0, 11.0]);
        let mut back = vec![0.0; 12];
        part.scatter(&[2, 3], &own, &mut back);
        assert_eq!(back[..6], [0.0; 6]);
        assert_eq!(back[6..], stored[6..]);
    }
}
