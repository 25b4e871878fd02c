//! Virtual tokens against PEFT, with and without padding; `fixtures/make.py` made them.

mod common;

use std::sync::Arc;

use burn::tensor::Device;
use common::{Model, Reference, adapter, base, cases, difference, tensor, values, with};
use oxiformers_models::nn::{Cache, CacheKind, LogitsFor};
use oxiformers_models::{AutoModelForCausalLM, CausalLM};

fn all() -> Vec<String> {
    cases(|name| {
        ["prompt-", "p_tuning-", "prefix-"]
            .iter()
            .any(|kind| name.starts_with(kind))
    })
}

fn load(name: &str) -> AutoModelForCausalLM {
    let (adapter, base_name) = adapter(name);
    let options = with([Arc::new(adapter)]);
    AutoModelForCausalLM::from_files(&base(&base_name), &options)
        .unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn logits_and_greedy_ids_equal_pefts() {
    assert_eq!(all().len(), 5);
    for name in all() {
        let reference = Reference::open(&name);
        let model = load(&name);
        let device = Device::flex();
        let model = Model::Causal(model);
        let found = difference(
            &values(model.logits(&reference, &device)),
            &reference.floats("logits"),
        );
        println!("{name:<24} {found:.1e}");
        assert!(found < 1e-4, "{name}: {found:e}");
        let Model::Causal(model) = model else { continue };
        let mut cache = model.new_cache(CacheKind::Dynamic, vec![0]);
        let mut next = vec![reference.ids("input_ids")[0][..5].to_vec()];
        let mut ids = Vec::new();
        for _ in 0..16 {
            let logits = values(model.forward(tensor(&next, &device), &mut cache, LogitsFor::Last));
            let best = (0..logits.len())
                .max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
                .expect("logits") as u32;
            ids.push(best);
            next = vec![vec![best]];
        }
        assert_eq!(cache.len(), 20, "{name}: virtual tokens are not counted");
        assert_eq!(ids, reference.ids("greedy_ids").concat(), "{name}");
    }
}

#[test]
fn padding_and_pieces_change_nothing() {
    for name in all() {
        let model = load(&name);
        let device = Device::flex();
        let ids: Vec<u32> = Reference::open(&name).ids("input_ids")[0].clone();
        let run = |rows: &[Vec<u32>], cache: &mut Cache| {
            let vocab = model.vocab_size();
            let logits = values(model.forward(tensor(rows, &device), cache, LogitsFor::Last));
            logits.chunks(vocab).map(<[f32]>::to_vec).collect::<Vec<_>>()
        };
        let alone = run(
            std::slice::from_ref(&ids),
            &mut model.new_cache(CacheKind::Dynamic, vec![0]),
        );
        let padded: Vec<u32> = [0, 0, 0].into_iter().chain(ids[..9].iter().copied()).collect();
        let short = run(
            &[ids[..9].to_vec()],
            &mut model.new_cache(CacheKind::Dynamic, vec![0]),
        );
        let both = run(
            &[padded, ids.clone()],
            &mut model.new_cache(CacheKind::Dynamic, vec![3, 0]),
        );
        assert!(
            difference(&both[0], &short[0]) < 1e-4 && difference(&both[1], &alone[0]) < 1e-4,
            "{name}"
        );
        // In pieces, and once more after some tokens were taken back.
        let mut cache = model.new_cache(CacheKind::Full, vec![0]);
        run(&[ids[..7].to_vec()], &mut cache);
        assert!(cache.truncate(4), "{name}");
        let pieces = run(&[ids[4..].to_vec()], &mut cache);
        assert!(difference(&pieces[0], &alone[0]) < 1e-4, "{name}");
        cache.clear();
        let again = run(std::slice::from_ref(&ids), &mut cache);
        assert!(difference(&again[0], &alone[0]) < 1e-4, "{name}");
    }
}
