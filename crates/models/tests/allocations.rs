//! What a step of decoding asks the allocator for: a bound per layer, and the same from step to step.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Reference, tensor, values};
use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::{CacheKind, LoadOptions, LogitsFor};
use oxiformers_models::{AutoModelForCausalLM, CausalLM};

/// Counts what is asked for.
struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is the system's, but for the counting.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn counts() -> [usize; 2] {
    [&COUNT, &BYTES].map(|count| count.load(Ordering::Relaxed))
}

#[test]
fn steps_ask_for_little_and_always_the_same() {
    let dir = common::fixtures("")
        .into_iter()
        .find(|dir| dir.file_name().is_some_and(|name| name == "llama"))
        .expect("the fixture");
    let files = ModelFiles::from_dir(&dir).expect("a model");
    let model = AutoModelForCausalLM::from_files(&files, &LoadOptions::default()).expect("a model");
    let ids = Reference::open(&dir).ids("prompt_ids");
    let layers = 2;
    let mut cache = model.new_cache(CacheKind::Dynamic, vec![0]);
    values(model.forward(tensor(&ids, 0..ids[0].len()), &mut cache, LogitsFor::Last));
    let mut steps = Vec::new();
    for _ in 0..24 {
        let next = tensor(&[vec![1]], 0..1);
        let [count, bytes] = counts();
        let logits = model.forward(next, &mut cache, LogitsFor::Last);
        let [count_after, bytes_after] = counts();
        values(logits);
        steps.push([count_after - count, bytes_after - bytes]);
    }
    println!("allocations and bytes of each step: {steps:?}");
    // The cache takes room for more now and then.
    let mut of_a_step: Vec<usize> = steps.iter().map(|step| step[0]).collect();
    of_a_step.sort_unstable();
    let usual = of_a_step[of_a_step.len() / 2];
    println!("{} a layer", usual / layers);
    assert!(usual / layers < 150, "{usual} allocations for {layers} layers");
}
