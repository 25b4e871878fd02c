//! Prints, as JSON, what the processor can do at most with one thread and with all: reading memory (GB/s),
//! multiplying and adding f32 (GFLOP/s) and int8 (GOP/s), and the same of matrix tiles (AMX) with bf16 and int8; 0 for
//! what it cannot do. `hardware [THREADS]`.

use std::sync::Barrier;
use std::time::Instant;

fn main() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(cores);
    let mut parts = Vec::new();
    for (suffix, threads) in [("_1", 1), ("", threads)] {
        parts.push(format!("\"memory{suffix}\": {:.2}", memory(threads)));
        parts.push(format!("\"f32{suffix}\": {:.1}", arithmetic(threads, f32_work)));
        parts.push(format!("\"int8{suffix}\": {:.1}", arithmetic(threads, int8_work)));
        parts.push(format!("\"tiles_bf16{suffix}\": {:.1}", arithmetic(threads, bf16_tiles)));
        parts.push(format!("\"tiles_int8{suffix}\": {:.1}", arithmetic(threads, int8_tiles)));
    }
    println!("{{{}, \"threads\": {threads}}}", parts.join(", "));
}

/// The best of some rounds of `work` on all threads at once, in units per second.
fn best<T: Send>(threads: usize, prepare: impl Fn() -> T + Sync, work: impl Fn(&T) -> f64 + Sync) -> f64 {
    const ROUNDS: usize = 7;
    let barrier = Barrier::new(threads);
    let rounds: Vec<Vec<(Instant, Instant, f64)>> = std::thread::scope(|scope| {
        let run = || {
            let state = prepare();
            (0..ROUNDS)
                .map(|_| {
                    barrier.wait();
                    let begin = Instant::now();
                    let units = work(&state);
                    (begin, Instant::now(), units)
                })
                .collect()
        };
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        handles.into_iter().map(|handle| handle.join().expect("a thread panicked")).collect()
    });
    (0..ROUNDS)
        .map(|round| {
            let runs = rounds.iter().map(|runs| runs[round]);
            let begin = runs.clone().map(|run| run.0).min().expect("a thread");
            let end = runs.clone().map(|run| run.1).max().expect("a thread");
            runs.map(|run| run.2).sum::<f64>() / end.duration_since(begin).as_secs_f64()
        })
        .fold(0.0, f64::max)
}

/// GB/s of reading what no cache holds.
fn memory(threads: usize) -> f64 {
    const WORDS: usize = 32 << 20;
    best(
        threads,
        || vec![1u64; WORDS],
        |words| {
            let mut sums = [0u64; 32];
            for chunk in words.as_chunks::<32>().0 {
                for (sum, word) in sums.iter_mut().zip(chunk) {
                    *sum = sum.wrapping_add(*word);
                }
            }
            std::hint::black_box(sums);
            (8 * WORDS) as f64 / 1e9
        },
    )
}

/// Billions of multiplications and additions per second.
fn arithmetic(threads: usize, work: fn(usize) -> f64) -> f64 {
    best(threads, || (), |()| work(20_000_000)) / 1e9
}

#[cfg(target_arch = "x86_64")]
fn f32_work(rounds: usize) -> f64 {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    fn wide(rounds: usize) {
        let mut sums = [_mm512_set1_ps(1.0); 12];
        let (a, b) = (std::hint::black_box(_mm512_set1_ps(0.999)), std::hint::black_box(_mm512_set1_ps(0.001)));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        std::hint::black_box(sums);
    }

    #[target_feature(enable = "avx2,fma")]
    fn narrow(rounds: usize) {
        let mut sums = [_mm256_set1_ps(1.0); 12];
        let (a, b) = (std::hint::black_box(_mm256_set1_ps(0.999)), std::hint::black_box(_mm256_set1_ps(0.001)));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        std::hint::black_box(sums);
    }

    if is_x86_feature_detected!("avx512f") {
        // SAFETY: just asked.
        unsafe { wide(rounds) };
        (rounds * 12 * 16 * 2) as f64
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: just asked.
        unsafe { narrow(rounds) };
        (rounds * 12 * 8 * 2) as f64
    } else {
        0.0
    }
}

#[cfg(target_arch = "x86_64")]
fn int8_work(rounds: usize) -> f64 {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn dots(rounds: usize) {
        let mut sums = [_mm512_set1_epi32(1); 12];
        let (a, b) = (std::hint::black_box(_mm512_set1_epi8(3)), std::hint::black_box(_mm512_set1_epi8(5)));
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        std::hint::black_box(sums);
    }

    if is_x86_feature_detected!("avx512vnni") {
        // SAFETY: just asked.
        unsafe { dots(rounds) };
        (rounds * 12 * 64 * 2) as f64
    } else {
        0.0
    }
}

/// Gives the process matrix tiles of 16 rows of 64 bytes, this thread for good; false where there are none.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn tiles() -> bool {
    use std::arch::asm;

    const TILES: u32 = 1 << 24 | 1 << 25 | 1 << 22;
    if std::arch::x86_64::__cpuid_count(7, 0).edx & TILES != TILES {
        return false;
    }
    #[repr(align(64))]
    struct Shapes([u8; 64]);
    let mut shapes = Shapes([0; 64]);
    shapes.0[0] = 1;
    for tile in 0..8 {
        shapes.0[16 + 2 * tile] = 64;
        shapes.0[48 + tile] = 16;
    }
    let result: isize;
    // SAFETY: the system call (arch_prctl) asks for the permission and touches no memory; then there are tiles, and the
    // shapes are as the processor wants them.
    unsafe {
        asm!("syscall", inlateout("rax") 158isize => result, in("rdi") 0x1023, in("rsi") 18, out("rcx") _,
            out("r11") _, options(nostack));
        if result == 0 {
            asm!("ldtilecfg [{shapes}]", "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                shapes = in(reg) &shapes, options(nostack));
        }
    }
    result == 0
}

/// Four products that do not wait for each other, again and again.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
macro_rules! tile_work {
    ($name:ident, $instruction:literal, $values:literal) => {
        fn $name(rounds: usize) -> f64 {
            if !tiles() {
                return 0.0;
            }
            // What is timed takes about as long as with vectors.
            let rounds = rounds / 8;
            for _ in 0..rounds {
                // SAFETY: this thread has tiles, and nothing else uses them.
                unsafe {
                    std::arch::asm!(
                        concat!($instruction, " tmm0, tmm4, tmm6"),
                        concat!($instruction, " tmm1, tmm4, tmm7"),
                        concat!($instruction, " tmm2, tmm5, tmm6"),
                        concat!($instruction, " tmm3, tmm5, tmm7"),
                        options(nostack, nomem, preserves_flags)
                    );
                }
            }
            (rounds * 4 * 16 * 16 * $values * 2) as f64
        }
    };
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
tile_work!(bf16_tiles, "tdpbf16ps", 32);
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
tile_work!(int8_tiles, "tdpbssd", 64);

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn bf16_tiles(_rounds: usize) -> f64 {
    0.0
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn int8_tiles(_rounds: usize) -> f64 {
    0.0
}

#[cfg(not(target_arch = "x86_64"))]
fn f32_work(_rounds: usize) -> f64 {
    0.0
}

#[cfg(not(target_arch = "x86_64"))]
fn int8_work(_rounds: usize) -> f64 {
    0.0
}
