//! What quantizing a model holds in memory: the result and about a matrix besides, whether it is loaded or written.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::safetensors::{MAX_SHARD_SIZE, Writer};
use oxiformers_hub::checkpoint::{DType, TensorInfo};
use oxiformers_models::memory::Memory;
use oxiformers_models::nn::quant::{MethodOptions, QuantizationConfig, Recipe};
use oxiformers_models::nn::{CacheKind, LoadOptions, LogitsFor, set_large_pages};
use oxiformers_models::quantize::{QuantizePlan, survey_as};
use oxiformers_models::{AutoConfig, AutoModelForCausalLM, CausalLM};

/// Knows how much is held, and how much was at most.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is the system's, but for the counting.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(held, Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time.
static TURN: Mutex<()> = Mutex::new(());

/// What `f` gives, what it leaves held, and the most that it held meanwhile.
fn measured<T>(f: impl FnOnce() -> T) -> (T, usize, usize) {
    let before = HELD.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let result = f();
    let held = HELD.load(Ordering::Relaxed).saturating_sub(before);
    (result, held, MOST.load(Ordering::Relaxed) - before)
}

const HIDDEN: usize = 256;
const INNER: usize = 768;
const LAYERS: usize = 12;
const VOCAB: usize = 512;
/// The largest matrix as f32.
const LARGEST: usize = 4 * HIDDEN * INNER;

/// A Llama of half floats.
fn model(folder: &Path) -> ModelFiles {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCAB, "tie_word_embeddings": true,
        "max_position_embeddings": 64,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut infos = vec![("model.embed_tokens".to_string(), vec![VOCAB, HIDDEN])];
    for layer in 0..LAYERS {
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        for name in ["q", "k", "v", "o"] {
            infos.push((at(&format!("self_attn.{name}_proj")), vec![HIDDEN, HIDDEN]));
        }
        infos.push((at("mlp.gate_proj"), vec![INNER, HIDDEN]));
        infos.push((at("mlp.up_proj"), vec![INNER, HIDDEN]));
        infos.push((at("mlp.down_proj"), vec![HIDDEN, INNER]));
        infos.push((at("input_layernorm"), vec![HIDDEN]));
        infos.push((at("post_attention_layernorm"), vec![HIDDEN]));
    }
    infos.push(("model.norm".to_string(), vec![HIDDEN]));
    let infos: Vec<_> = infos
        .into_iter()
        .map(|(name, shape)| TensorInfo {
            name: format!("{name}.weight"),
            dtype: DType::F16,
            shape,
        })
        .collect();
    let mut writer = Writer::create(folder, &infos, &[], MAX_SHARD_SIZE).unwrap();
    let mut state = 1u32;
    for info in &infos {
        let mut value = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Between -0.25 and 0.25, or so.
            (0x2000 | (state >> 16) as u16 & 0x8FFF).to_le_bytes()
        };
        let count: usize = info.shape.iter().product();
        let bytes: Vec<u8> = (0..count).flat_map(|_| value()).collect();
        writer.write_bytes(&info.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    ModelFiles::from_dir(folder).unwrap()
}

fn recipe(method: &str) -> Recipe {
    QuantizationConfig::named(method, &MethodOptions::default())
        .unwrap()
        .into()
}

#[test]
fn loading_holds_the_result_and_a_matrix() {
    let _turn = TURN.lock().unwrap();
    // What is counted is what the allocator gives.
    set_large_pages(false);
    let folder = tempfile::tempdir().unwrap();
    let files = model(folder.path());
    // What is made once and stays.
    drop(AutoModelForCausalLM::from_files(&files, &LoadOptions::default()).unwrap());
    for method in ["int8", "nf4", "fp4", "hqq", "w4a16", "bitnet"] {
        let options = LoadOptions {
            quantization: Some(Arc::new(recipe(method))),
            ..LoadOptions::default()
        };
        let (model, _, most) = measured(|| {
            let model = AutoModelForCausalLM::from_files(&files, &options).unwrap();
            let mut cache = model.new_cache(CacheKind::Dynamic, vec![0]);
            let ids = burn::tensor::Tensor::from_data([[1i32, 2]], &burn::tensor::Device::flex());
            model.forward(ids, &mut cache, LogitsFor::Last).into_data();
            model
        });
        let matrices = survey_as(&files, options.quantization.clone()).unwrap();
        let config = AutoConfig::from_files(&files).unwrap();
        let result = Memory::of(&files, &config, &matrices).unwrap().weights;
        println!("{method}: {most} bytes at most, the weights are {result}, a matrix {LARGEST}");
        // Besides: values, codes of each, and what regrouping needs.
        assert!(
            most < result * 11 / 10 + 5 * LARGEST,
            "{method}: {most} for {result}"
        );
        assert!(result < 4 * most, "{method}: the estimate");
        drop(model);
    }
}

#[test]
fn writing_holds_a_matrix() {
    let _turn = TURN.lock().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let files = model(folder.path());
    for method in ["int8", "nf4", "hqq", "w4a16", "fp8", "bitnet"] {
        let output = tempfile::tempdir().unwrap();
        let ((), held, most) = measured(|| {
            let plan = QuantizePlan::new(&files, recipe(method), None).unwrap();
            plan.write(output.path(), MAX_SHARD_SIZE, |_| true).unwrap();
        });
        println!("{method}: {most} bytes at most, a matrix {LARGEST}, left {held}");
        assert!(most < 5 * LARGEST, "{method}: {most}");
    }
}
