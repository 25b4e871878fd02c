//! Greedy and beam search return what Transformers' do; drafts and batches change nothing.

use std::path::Path;

use futures::executor::block_on;
use oxiformers_generate::{Draft, FinishReason, GenerationConfig, Generator, Step};
use oxiformers_hub::ModelFiles;
use oxiformers_models::{AutoModelForCausalLM, AutoModelForSeq2SeqLM, CausalLM};
use oxiformers_nn::LoadOptions;
use serde_json::Value;

fn files(name: &str) -> ModelFiles {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../models/tests/fixtures")
        .join(name);
    ModelFiles::from_dir(&path).unwrap()
}

fn model(name: &str) -> AutoModelForCausalLM {
    AutoModelForCausalLM::from_files(&files(name), &LoadOptions::default()).unwrap()
}

fn seq2seq(name: &str) -> AutoModelForSeq2SeqLM {
    AutoModelForSeq2SeqLM::from_files(&files(&format!("seq2seq/{name}")), &LoadOptions::default()).unwrap()
}

fn config(json: Value) -> GenerationConfig {
    GenerationConfig::from_json(json.as_object().unwrap().clone(), "test").unwrap()
}

#[test]
fn sequences_and_scores() {
    let cases: [Vec<Value>; 2] = [
        include_str!("fixtures/search.json"),
        include_str!("fixtures/seq2seq.json"),
    ]
    .map(|json| serde_json::from_str(json).unwrap());
    let cases = cases.concat();
    let mut worst = 0f64;
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let model: Box<dyn CausalLM> = match case["model"].as_str().unwrap() {
            name if name.starts_with("seq2seq/") => Box::new(seq2seq(&name[8..])),
            name => Box::new(model(name)),
        };
        let prompts: Vec<Vec<u32>> = serde_json::from_value(case["prompts"].clone()).unwrap();
        let generator = Generator::new(&*model, config(case["config"].clone()));
        let results = block_on(generator.generate(&prompts)).unwrap();
        let expected = case["results"].as_array().unwrap();
        assert_eq!(results.len(), expected.len(), "{name}");
        for (index, (ours, theirs)) in results.iter().zip(expected).enumerate() {
            let ids: Vec<u32> = serde_json::from_value(theirs["ids"].clone()).unwrap();
            assert_eq!(ours.ids, ids, "{name}: sequence {index}");
            if let Some(score) = theirs["score"].as_f64() {
                // A negative length penalty makes scores large, and f32 has seven digits.
                let difference = (f64::from(ours.score.unwrap()) - score).abs() / score.abs().max(1.0);
                assert!(
                    difference < 1e-5,
                    "{name}: sequence {index}: {:?} instead of {score}",
                    ours.score
                );
                worst = worst.max(difference);
            }
        }
    }
    println!(
        "{} cases, largest relative difference of scores {worst:e}",
        cases.len()
    );
}

#[test]
fn drafts_change_nothing() {
    check_drafts(&model("llama"), &model("llama-linear"), &[5, 9, 5, 9, 5, 9, 7]);
}

/// Frequencies change after four tokens, within the answer: what was cached before runs again, once.
#[test]
fn longrope_switches_within_the_answer() {
    let model = model("phi3-longrope");
    check_drafts(&model, &model, &[5, 9]);
    check_past(&model, &[5, 9]);
    // A prompt in pieces has the frequencies of the whole from its first token on.
    let run = |chunk: usize| {
        let config = config(
            serde_json::json!({"max_new_tokens": 8, "prefill_chunk_size": chunk, "output_logits": true}),
        );
        let generated =
            block_on(Generator::new(&model, config).generate(&[vec![5, 9, 7, 30, 8, 2]])).unwrap();
        generated[0].logits[0].clone()
    };
    let (whole, pieces) = (run(100), run(2));
    assert!(whole.iter().zip(&pieces).all(|(a, b)| (a - b).abs() < 1e-5));
}

/// An encoder-decoder takes drafts of another one, which has read the same.
#[test]
fn drafts_change_nothing_after_an_encoder() {
    let prompt = [5, 9, 5, 9, 5, 9, 7];
    check_drafts(&seq2seq("bart"), &seq2seq("bart-scaled"), &prompt);
    let (bart, llama) = (seq2seq("bart"), model("llama"));
    let config = config(serde_json::json!({"decoder_start_token_id": 2}));
    let generator = Generator::new(&bart, config).with_draft(Draft::Assistant(&llama));
    let error = block_on(generator.generate(&[prompt.to_vec()])).unwrap_err();
    assert!(error.to_string().contains("encoder-decoder"), "{error}");
}

#[test]
fn sources_that_cannot_be_read() {
    let model = seq2seq("marian-separate");
    let generate = |source: Vec<u32>, config| block_on(Generator::new(&model, config).generate(&[source]));
    let start = config(serde_json::json!({"decoder_start_token_id": 79}));
    // Sources have a larger vocabulary than what is written.
    assert!(generate(vec![95], start.clone()).is_ok());
    let fails = |source: Vec<u32>, config, part: &str| {
        let error = generate(source, config).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    fails(vec![96], start.clone(), "the token 96");
    fails(vec![], start.clone(), "empty");
    fails(vec![1; 65], start, "65 tokens");
    fails(vec![5], GenerationConfig::default(), "decoder_start_token_id");
    let beyond = config(serde_json::json!({"decoder_start_token_id": 80}));
    fails(vec![5], beyond, "decoder_start_token_id");
}

fn check_drafts(model: &dyn CausalLM, assistant: &dyn CausalLM, prompt: &[u32]) {
    let prompt = vec![prompt.to_vec()];
    let greedy = config(serde_json::json!({
        "max_new_tokens": 40, "eos_token_id": [999], "decoder_start_token_id": 2, "no_repeat_ngram_size": 3,
    }));
    let plain = block_on(Generator::new(model, greedy.clone()).generate(&prompt)).unwrap();
    for draft in [
        Draft::PromptLookup,
        Draft::Assistant(assistant),
        Draft::Assistant(model),
    ] {
        for schedule in ["constant", "heuristic"] {
            let config = GenerationConfig {
                num_assistant_tokens: 5,
                num_assistant_tokens_schedule: schedule.into(),
                assistant_confidence_threshold: 0.0,
                ..greedy.clone()
            };
            let generator = Generator::new(model, config).with_draft(draft.clone());
            let mut generation = generator.start(&prompt, None).unwrap();
            let mut steps = 0;
            loop {
                match block_on(generation.step()).unwrap() {
                    Step::Tokens(tokens) => {
                        assert!(!tokens.is_empty());
                        steps += 1;
                    }
                    Step::Prompt { .. } => {}
                    Step::Done => break,
                }
            }
            assert_eq!(generation.finish()[0].ids, plain[0].ids);
            if let Draft::Assistant(same) = draft
                && std::ptr::addr_eq(same, model)
            {
                assert!(steps <= 40 / 5 + 2, "a perfect draft took {steps} steps");
            }
        }
    }
}

/// Drafted sampling has the distribution of plain sampling, seen in the second token.
#[test]
fn drafted_samples_are_distributed_alike() {
    let (model, assistant) = (model("llama"), model("llama-linear"));
    let prompt = vec![vec![5, 9, 7]];
    let runs = 400;
    let count = |draft: bool| {
        let mut counts = std::collections::BTreeMap::<u32, f64>::new();
        for seed in 0..runs {
            let config = config(serde_json::json!({
                "max_new_tokens": 3, "do_sample": true, "top_k": 3, "seed": seed, "assistant_confidence_threshold": 0.0,
            }));
            let mut generator = Generator::new(&model, config);
            if draft {
                generator = generator.with_draft(Draft::Assistant(&assistant));
            }
            *counts
                .entry(block_on(generator.generate(&prompt)).unwrap()[0].ids[1])
                .or_default() += 1.0;
        }
        counts
    };
    let (plain, drafted) = (count(false), count(true));
    for id in plain.keys().chain(drafted.keys()) {
        let of = |counts: &std::collections::BTreeMap<u32, f64>| {
            counts.get(id).copied().unwrap_or(0.0) / f64::from(runs)
        };
        // Four standard deviations of the difference of two shares.
        assert!(
            (of(&plain) - of(&drafted)).abs() < 4.0 * (0.5 / f64::from(runs)).sqrt(),
            "{plain:?} {drafted:?}"
        );
    }
}

#[test]
fn seeds_reproduce_and_rows_are_independent() {
    let model = model("llama");
    let prompts = vec![vec![5, 9, 7], vec![11, 12, 13, 14, 15]];
    let config = config(serde_json::json!({
        "max_new_tokens": 10, "do_sample": true, "seed": 3, "num_return_sequences": 2, "output_scores": true,
    }));
    let generator = Generator::new(&model, config);
    let both = block_on(generator.generate(&prompts)).unwrap();
    assert_eq!(both, block_on(generator.generate(&prompts)).unwrap());
    let first = block_on(generator.generate(&prompts[..1])).unwrap();
    assert_eq!(first[0].ids, both[0].ids);
    assert_eq!(first[1].ids, both[1].ids);
    assert_ne!(both[0].ids, both[1].ids);
    assert_eq!(both[0].scores.len(), 10);
    assert_eq!(both[0].finish_reason, FinishReason::Length);
}

/// Eight bits give the words of full precision, for all ways to decode and all kinds of layers; the small fixtures need
/// small blocks for that.
#[test]
fn quantized_caches() {
    let with_cache = |nbits: usize, more: Value| {
        let mut json = serde_json::json!({
            "max_new_tokens": 24, "eos_token_id": [999], "cache_implementation": "quantized",
            "cache_config": {"nbits": nbits, "q_group_size": 4, "residual_length": 1},
        });
        json.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        config(json)
    };
    let full = |more: Value| {
        let config = with_cache(8, more);
        GenerationConfig {
            cache_implementation: None,
            ..config
        }
    };
    let prompts = [vec![5, 9, 5, 9, 5, 9, 7], vec![11, 12, 13]];
    for name in ["llama", "mistral", "gemma3_text", "gpt_oss"] {
        let model = model(name);
        let assistant = self::model("llama-linear");
        let ids = |config: GenerationConfig, prompts: &[Vec<u32>], draft: Option<Draft>| {
            let mut generator = Generator::new(&model, config);
            if let Some(draft) = draft {
                generator = generator.with_draft(draft);
            }
            let results = block_on(generator.generate(prompts)).unwrap();
            results.into_iter().map(|result| result.ids).collect::<Vec<_>>()
        };
        let same = |a: &[Vec<u32>], b: &[Vec<u32>]| {
            let equal = |(a, b): (&Vec<u32>, &Vec<u32>)| a.iter().zip(b).take_while(|(a, b)| a == b).count();
            a.iter().zip(b).map(equal).sum::<usize>() as f64 / (24 * a.len()) as f64
        };
        let beams = serde_json::json!({"num_beams": 3, "num_return_sequences": 2});
        for more in [serde_json::json!({}), beams] {
            let expected = ids(full(more.clone()), &prompts, None);
            let ours = ids(with_cache(8, more.clone()), &prompts, None);
            let half = ids(with_cache(16, more.clone()), &prompts, None);
            println!("{name}: {} {}", same(&ours, &expected), same(&half, &expected));
            assert!(
                same(&ours, &expected) > 0.25,
                "{name}: {ours:?} instead of {expected:?}"
            );
            assert_eq!(half, expected, "{name}");
            for nbits in [2, 4] {
                assert!(
                    ids(with_cache(nbits, more.clone()), &prompts, None)
                        .iter()
                        .all(|ids| ids.len() == 24)
                );
            }
        }
        let expected = ids(full(serde_json::json!({})), &prompts[..1], None);
        for draft in [
            Draft::PromptLookup,
            Draft::Assistant(&assistant),
            Draft::Assistant(&model),
        ] {
            let more = serde_json::json!({"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.0});
            let ours = ids(with_cache(8, more), &prompts[..1], Some(draft));
            assert!(
                same(&ours, &expected) > 0.25,
                "{name}: {ours:?} instead of {expected:?}"
            );
        }
    }
}

/// A chat goes on from what is packed, but not in another precision.
#[test]
fn what_was_packed_is_not_run_again() {
    let model = model("llama");
    let config = |nbits: usize| {
        config(serde_json::json!({
            "max_new_tokens": 8, "cache_implementation": "quantized",
            "cache_config": {"nbits": nbits, "q_group_size": 4, "residual_length": 2},
        }))
    };
    let run = |nbits: usize, prompt: &[u32], past| {
        let generator = Generator::new(&model, config(nbits));
        let mut generation = generator.start(&[prompt.to_vec()], past).unwrap();
        let mut prompts = 0;
        loop {
            match block_on(generation.step()).unwrap() {
                Step::Prompt { .. } => prompts += 1,
                Step::Tokens(_) => {}
                Step::Done => break,
            }
        }
        assert_eq!(prompts, 0);
        generation.finish_with_cache()
    };
    let prompt = [5, 9, 7, 30, 2, 8, 60];
    let (first, past) = run(8, &prompt, None);
    let past = past.unwrap();
    assert_eq!(past.ids().len(), prompt.len() + 7);
    // In the middle of a block.
    let (again, _) = run(8, &prompt[..6], Some(past.clone()));
    assert_eq!(again[0].ids, run(8, &prompt[..6], None).0[0].ids);
    let longer: Vec<u32> = prompt
        .iter()
        .chain(&first[0].ids)
        .copied()
        .chain([50, 51])
        .collect();
    assert_eq!(
        run(4, &longer, Some(past.clone())).0,
        run(4, &longer, None).0,
        "another precision begins anew"
    );
    assert_eq!(run(8, &longer, Some(past)).0[0].ids.len(), 8);
}

#[test]
fn what_was_seen_is_not_run_again() {
    check_past(&model("llama"), &[5, 9, 7, 30]);
}

fn check_past(model: &AutoModelForCausalLM, prompt: &[u32]) {
    let config = config(serde_json::json!({"max_new_tokens": 8}));
    let generator = Generator::new(model, config);
    let run = |prompt: &[u32], past| {
        let mut generation = generator.start(&[prompt.to_vec()], past).unwrap();
        while block_on(generation.step()).unwrap() != Step::Done {}
        generation.finish_with_cache()
    };
    let (first, past) = run(prompt, None);
    let past = past.unwrap();
    assert_eq!(past.ids().len(), prompt.len() + 7);
    for keep in [0, 2, 8] {
        let mut longer: Vec<u32> = prompt
            .iter()
            .chain(&first[0].ids)
            .copied()
            .take(prompt.len() + keep)
            .collect();
        longer.extend([50, 51]);
        assert_eq!(run(&longer, Some(past.clone())).0, run(&longer, None).0);
    }
    assert_eq!(run(prompt, Some(past)).0, first);
}

#[test]
fn prompts_that_cannot_be_continued() {
    let model = model("llama");
    let generate = |prompt: Vec<u32>| {
        block_on(Generator::new(&model, GenerationConfig::default()).generate(&[prompt]))
            .unwrap_err()
            .to_string()
    };
    assert!(generate(vec![]).contains("empty"));
    assert!(generate(vec![96]).contains("the token 96"));
    assert!(generate(vec![1; 65]).contains("65 tokens"));
    // A prompt that fills the context has no room for more.
    let full =
        block_on(Generator::new(&model, GenerationConfig::default()).generate(&[vec![1; 64]])).unwrap();
    assert!(full[0].ids.is_empty());
}
