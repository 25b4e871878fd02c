//! The dynamic data type of 8 bits (Dettmers, 2016), as bitsandbytes has it: an exponent that takes as many bits as it
//! needs, and a fraction of what is left. Values come in blocks with a scale, their largest absolute value, each.

use std::sync::LazyLock;

/// Values that share a scale.
pub const BLOCK: usize = 256;

/// The 256 values of a code.
#[derive(Debug)]
pub struct DynamicMap {
    values: [f32; 256],
    /// Where a value is nearer to the next code than to this one.
    borders: [f32; 255],
    /// For each of equal parts of the range from -1 to 1, the code that its least value has.
    starts: Vec<u8>,
}

/// Equal parts of the range, each of which spans few codes.
const PARTS: usize = 4096;

/// Of values with a sign.
pub static SIGNED: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(true));
/// Of values that are never negative.
pub static UNSIGNED: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(false));

impl DynamicMap {
    fn new(signed: bool) -> Self {
        const EXPONENTS: i32 = 7;
        let mut values = vec![0.0f32, 1.0];
        for exponent in 0..EXPONENTS {
            let steps = 1usize << if signed { exponent } else { exponent + 1 };
            let scale = 10f64.powi(exponent - (EXPONENTS - 1)) as f32;
            for step in 0..steps {
                let border = |step: usize| linspace(step, steps);
                let mean = (border(step) + border(step + 1)) / 2.0;
                values.push(scale * mean);
                if signed {
                    values.push(-(scale * mean));
                }
            }
        }
        values.resize(256, 0.0);
        values.sort_by(f32::total_cmp);
        let values: [f32; 256] = std::array::from_fn(|i| values[i]);
        let borders = std::array::from_fn(|i| (values[i] + values[i + 1]) / 2.0);
        let mut map = Self {
            values,
            borders,
            starts: Vec::new(),
        };
        map.starts = (0..=PARTS)
            .map(|part| map.search(0, part as f32 / (PARTS / 2) as f32 - 1.0))
            .collect();
        map
    }

    /// The code from `from` on that is nearest to `x`.
    #[inline(always)]
    fn search(&self, from: u8, x: f32) -> u8 {
        let mut code = from;
        while code < 255 && x > self.borders[usize::from(code)] {
            code += 1;
        }
        code
    }

    /// The nearest code of a value between -1 and 1.
    #[inline(always)]
    pub fn nearest(&self, x: f32) -> u8 {
        let part = ((x + 1.0) * (PARTS / 2) as f32) as usize;
        // Rounding may have lifted `x` into the next part.
        let start = self.starts[part.saturating_sub(1).min(PARTS)];
        self.search(start, x)
    }

    /// The value of a code.
    #[inline(always)]
    pub fn value(&self, code: u8) -> f32 {
        self.values[usize::from(code)]
    }

    /// Codes of a block of values, and their scale.
    pub fn quantize(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let absmax = values.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let inverse = if absmax > 0.0 { 1.0 / absmax } else { 0.0 };
        for (code, x) in codes.iter_mut().zip(values) {
            *code = self.nearest(x * inverse);
        }
        absmax
    }
}

/// As `torch.linspace(0.1, 1, steps + 1)` rounds it, from both ends.
fn linspace(step: usize, steps: usize) -> f32 {
    let width = (1.0f32 - 0.1) / steps as f32;
    if step < steps.div_ceil(2) {
        0.1 + width * step as f32
    } else {
        1.0 - width * (steps - step) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_of_all_codes() {
        for map in [&*SIGNED, &*UNSIGNED] {
            for i in -20_000..=20_000i32 {
                let x = i as f32 / 20_000.0;
                let distance = |code: u8| (map.value(code) - x).abs();
                let best = (0..=255).map(distance).fold(f32::INFINITY, f32::min);
                assert!(distance(map.nearest(x)) <= best + 1e-6, "{x}");
            }
        }
    }

    #[test]
    fn a_block_of_zeros() {
        let mut codes = [7; 4];
        assert_eq!(SIGNED.quantize(&[0.0; 4], &mut codes), 0.0);
        assert!(codes.iter().all(|code| SIGNED.value(*code) == 0.0));
    }
}
