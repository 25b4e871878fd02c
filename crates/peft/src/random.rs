//! The numbers that PyTorch's generator gives, where a file relies on them.

/// The Mersenne Twister (Matsumoto and Nishimura, 1998), as `torch.Generator(device="cpu")` has it.
#[derive(Debug, Clone)]
pub(crate) struct Mt19937 {
    state: Vec<u32>,
    next: usize,
}

const LEN: usize = 624;
const AHEAD: usize = 397;

impl Mt19937 {
    /// Seeded as by `manual_seed`, which takes the lower half.
    pub fn new(seed: u64) -> Self {
        let mut state = vec![seed as u32; LEN];
        for i in 1..LEN {
            let last = state[i - 1];
            state[i] = 1_812_433_253u32
                .wrapping_mul(last ^ (last >> 30))
                .wrapping_add(i as u32);
        }
        Self { state, next: LEN }
    }

    fn bits(&mut self) -> u32 {
        if self.next == LEN {
            self.next = 0;
            for i in 0..LEN {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % LEN] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + AHEAD) % LEN] ^ (y >> 1) ^ odd;
            }
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// So many numbers from `from` to `to`, as `Tensor.uniform_` fills a tensor of f32.
    pub fn uniform(&mut self, count: usize, from: f32, to: f32) -> Vec<f32> {
        (0..count)
            .map(|_| {
                let part = (self.bits() & 0x00ff_ffff) as f32 / (1u32 << 24) as f32;
                part * (to - from) + from
            })
            .collect()
    }

    /// So many numbers around 0 with a standard deviation (Box and Muller, 1958).
    pub fn normal(&mut self, count: usize, std: f32) -> Vec<f32> {
        let pairs = (0..count.div_ceil(2)).flat_map(|_| {
            let [u, v] = [(); 2].map(|()| (f64::from(self.bits()) + 0.5) / (1u64 << 32) as f64);
            let (radius, angle) = ((-2.0 * u.ln()).sqrt(), std::f64::consts::TAU * v);
            [radius * angle.cos(), radius * angle.sin()].map(|x| x as f32 * std)
        });
        pairs.take(count).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn like_pytorchs() {
        // torch.empty(4).uniform_(-1, 1, generator=torch.Generator().manual_seed(5))
        let found = Mt19937::new(5).uniform(4, -1.0, 1.0);
        for (found, expected) in found
            .iter()
            .zip([0.660_503_75, -0.747_778_2, 0.814_939_4, 0.639_854_1])
        {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }
}
