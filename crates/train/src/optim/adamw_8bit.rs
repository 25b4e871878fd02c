//! AdamW whose moments take 8 bits each (Dettmers et al., 2022).

use std::collections::BTreeMap;

use super::adamw::{AdamW, Numbers};
use super::dynamic_map::{BLOCK, SIGNED, UNSIGNED};
use super::{Optimizer, Parameter, Shapes, State, Step, parallel, state};
use crate::Result;

/// Parameters with fewer values keep 32 bits.
const LEAST: usize = 4096;
/// Blocks that a task takes.
const BLOCKS: usize = 32;

/// AdamW as `bitsandbytes.optim.AdamW` with `optim_bits=8` computes it. As Transformers has it, tables of embeddings
/// keep moments of 32 bits, and so do parameters of fewer than 4096 values.
#[derive(Debug)]
pub struct AdamW8bit {
    /// Those with 32 bits.
    small: AdamW,
    moments: BTreeMap<String, Moments>,
}

/// What is remembered of a parameter: codes, and a scale for each block of them.
#[derive(Debug, Clone)]
struct Moments {
    step: u64,
    shape: Vec<usize>,
    state1: Vec<u8>,
    absmax1: Vec<f32>,
    state2: Vec<u8>,
    absmax2: Vec<f32>,
}

impl AdamW8bit {
    /// With the decays of the two means, what is added to the divisor, and the decay of weights.
    pub fn new(betas: [f64; 2], eps: f64, weight_decay: f64) -> Self {
        Self {
            small: AdamW::new(betas, eps, weight_decay),
            moments: BTreeMap::new(),
        }
    }
}

impl Optimizer for AdamW8bit {
    fn update(&mut self, parameter: Parameter<'_>, values: &mut [f32], grad: &[f32], step: Step) {
        if parameter.embedding || values.len() < LEAST {
            return self.small.update(parameter, values, grad, step);
        }
        let moments = self.moments.entry(parameter.name.to_string()).or_insert_with(|| {
            let blocks = values.len().div_ceil(BLOCK);
            Moments {
                step: 0,
                shape: parameter.shape.to_vec(),
                state1: vec![0; values.len()],
                absmax1: vec![0.0; blocks],
                state2: vec![0; values.len()],
                absmax2: vec![0.0; blocks],
            }
        });
        moments.step += 1;
        let numbers = self.small.numbers(parameter.decays, moments.step, step);
        const SIZE: usize = BLOCK * BLOCKS;
        let first = moments
            .state1
            .chunks_mut(SIZE)
            .zip(moments.absmax1.chunks_mut(BLOCKS));
        let second = moments
            .state2
            .chunks_mut(SIZE)
            .zip(moments.absmax2.chunks_mut(BLOCKS));
        let chunks = values
            .chunks_mut(SIZE)
            .zip(grad.chunks(SIZE))
            .zip(first.zip(second));
        parallel(chunks, |((x, grad), ((state1, absmax1), (state2, absmax2)))| {
            let blocks = (x.chunks_mut(BLOCK).zip(grad.chunks(BLOCK)))
                .zip(state1.chunks_mut(BLOCK).zip(absmax1))
                .zip(state2.chunks_mut(BLOCK).zip(absmax2));
            for (((x, grad), first), second) in blocks {
                update(x, grad, first, second, numbers);
            }
        });
    }

    fn state(&self) -> State {
        let mut all = self.small.state();
        for (name, moments) in &self.moments {
            let blocks = [moments.absmax1.len()];
            let mut save = |moment: &str, tensor| all.insert(format!("{name}.{moment}"), tensor);
            save("step", state::count(moments.step));
            save("state1", state::bytes(&moments.state1, &moments.shape));
            save("absmax1", state::floats(&moments.absmax1, &blocks));
            save("state2", state::bytes(&moments.state2, &moments.shape));
            save("absmax2", state::floats(&moments.absmax2, &blocks));
        }
        all
    }

    fn load_state(&mut self, all: &State, shapes: &Shapes) -> Result<()> {
        let is_small = |name: &String| {
            let parameter = name.rsplit_once('.').map_or("", |(parameter, _)| parameter);
            !all.contains_key(&format!("{parameter}.state1"))
        };
        let (small, packed): (State, State) = (all.iter())
            .map(|(name, tensor)| (name.clone(), tensor.clone()))
            .partition(|(name, _)| is_small(name));
        let known = ["step", "state1", "absmax1", "state2", "absmax2"];
        let moments = state::load(&packed, shapes, &known, |from| {
            let blocks = [from.shape.iter().product::<usize>().div_ceil(BLOCK)];
            Ok(Moments {
                step: from.count("step")?,
                shape: from.shape.to_vec(),
                state1: from.bytes("state1")?,
                absmax1: from.floats_of("absmax1", &blocks)?,
                state2: from.bytes("state2")?,
                absmax2: from.floats_of("absmax2", &blocks)?,
            })
        })?;
        self.small.load_state(&small, shapes)?;
        self.moments = moments;
        Ok(())
    }
}

/// One block: its moments are widened, used, and rounded again.
fn update(
    x: &mut [f32],
    grad: &[f32],
    (state1, absmax1): (&mut [u8], &mut f32),
    (state2, absmax2): (&mut [u8], &mut f32),
    numbers: Numbers,
) {
    let (mut m, mut v) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
    let (m, v) = (&mut m[..x.len()], &mut v[..x.len()]);
    for (m, code) in m.iter_mut().zip(&*state1) {
        *m = SIGNED.value(*code) * *absmax1;
    }
    for (v, code) in v.iter_mut().zip(&*state2) {
        *v = UNSIGNED.value(*code) * *absmax2;
    }
    numbers.update(x, grad, m, v);
    *absmax1 = SIGNED.quantize(m, state1);
    *absmax2 = UNSIGNED.quantize(v, state2);
}
