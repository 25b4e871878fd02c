//! A hundred steps of training against Transformers' Trainer with PEFT; `fixtures/make.py` made the run.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use common::{Reference, adapter, base, tensor, values, with};
use oxiformers_models::nn::{CacheKind, LoadOptions, LogitsFor};
use oxiformers_models::{AutoModelForCausalLM, CausalLM};
use oxiformers_peft::{Adapter, AdapterConfig};
use oxiformers_train::clip::{clip_coefficient, norm};
use oxiformers_train::decay::decays;
use oxiformers_train::optim::{OptimizerConfig, Parameter, Step};
use oxiformers_train::schedule::{Schedule, ScheduleConfig, SchedulerType};

/// Shape, values and gradient of a parameter.
type Found = (ParamId, Vec<usize>, Vec<f32>, Vec<f32>);

/// Takes values and gradients out of a model.
struct Take<'a> {
    gradients: &'a Gradients,
    names: &'a HashMap<ParamId, String>,
    found: Vec<Found>,
}

impl ModuleVisitor for Take<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.names.contains_key(&param.id)
            && let Some(gradient) = param.val().grad(self.gradients)
        {
            let value = param.val();
            self.found.push((
                param.id,
                value.dims().to_vec(),
                values(value.inner()),
                values(gradient),
            ));
        }
    }
}

/// Puts values into a model.
struct Put<'a>(HashMap<ParamId, Vec<f32>>, &'a Device);

impl ModuleMapper for Put<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(values) = self.0.remove(&param.id) else {
            return param;
        };
        let device = self.1;
        param.map(|old| {
            let data = TensorData::new(values, old.dims());
            Tensor::from_data(data, device).require_grad()
        })
    }
}

/// The mean cross entropy of the next tokens.
fn loss(model: &AutoModelForCausalLM, ids: &[Vec<u32>], device: &Device) -> Tensor<1> {
    let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; ids.len()]);
    let logits = model
        .decoder
        .forward(tensor(ids, device), &mut cache, LogitsFor::All);
    let [batch, seq, vocab] = logits.dims();
    let logits = logits.narrow(1, 0, seq - 1).reshape([batch * (seq - 1), vocab]);
    let next: Vec<i32> = ids
        .iter()
        .flat_map(|row| row[1..].iter().map(|id| *id as i32))
        .collect();
    let count = next.len();
    let next = Tensor::<2, Int>::from_data(TensorData::new(next, [count, 1]), device);
    burn::tensor::activation::log_softmax(logits, 1)
        .gather(1, next)
        .mean()
        .neg()
}

#[test]
fn losses_and_adapter_equal_the_trainers() {
    let reference = Reference::open("training");
    let (start, base_name) = adapter("training");
    let start = Arc::new(start.trained());
    let device = Device::flex().autodiff();
    let options = LoadOptions {
        device: device.clone(),
        ..with([start.clone()])
    };
    let mut model = AutoModelForCausalLM::from_files(&base(&base_name), &options).expect("model");
    let names: HashMap<ParamId, String> = start.parameters().into_iter().collect();
    assert_eq!(names.len(), 28);

    let config = OptimizerConfig {
        weight_decay: 0.1,
        ..OptimizerConfig::default()
    };
    let mut optimizer = config.build().expect("optimizer");
    let schedule = ScheduleConfig {
        lr_scheduler_type: SchedulerType::Cosine,
        warmup_steps: 10,
        ..ScheduleConfig::default()
    };
    let schedule = Schedule::new(&schedule, 1e-2, 100).expect("schedule");
    let ids = reference.ids("ids");
    let mut worst = 0f32;
    for (step, expected) in reference.floats("losses").into_iter().enumerate() {
        let loss = loss(&model, &ids[step * 4..][..4], &device);
        let found = values(loss.clone().inner())[0];
        worst = worst.max((found - expected).abs() / expected);
        assert!(worst < 1e-3, "step {step}: {found} instead of {expected}");
        let gradients = loss.backward();
        let mut take = Take {
            gradients: &gradients,
            names: &names,
            found: Vec::new(),
        };
        model.decoder.visit(&mut take);
        let size = norm(take.found.iter().map(|(.., gradient)| gradient.as_slice()));
        let step = Step {
            lr: schedule.learning_rate(step),
            grad_scale: clip_coefficient(size, 1.0) as f32,
        };
        let mut updated = HashMap::new();
        for (id, shape, mut values, gradient) in take.found {
            let parameter = Parameter {
                name: &names[&id],
                shape: &shape,
                decays: decays(&names[&id]),
                embedding: false,
            };
            optimizer.update(parameter, &mut values, &gradient, step);
            updated.insert(id, values);
        }
        model.decoder = model.decoder.map(&mut Put(updated, &device));
    }
    println!("largest relative difference of the losses: {worst:.1e}");
    let mut last = HashMap::new();
    struct Read<'a>(&'a mut HashMap<ParamId, Vec<f32>>);
    impl ModuleVisitor for Read<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.insert(param.id, values(param.val().inner()));
        }
    }
    model.decoder.visit(&mut Read(&mut last));
    let by_name: HashMap<&str, &Vec<f32>> = names
        .iter()
        .map(|(id, name)| (name.as_str(), &last[id]))
        .collect();
    for (name, expected) in reference.with_prefix("final.base_model.model.") {
        let name = name.replace(".default", "");
        let size = expected.iter().fold(0f32, |size, x| size.max(x.abs()));
        let difference = by_name[name.as_str()]
            .iter()
            .zip(&expected)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(difference < 2e-2 * size, "`{name}`: {difference} of {size}");
    }
}

#[test]
fn a_fresh_adapter_begins_as_pefts_does() {
    let json = serde_json::json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear",
        "modules_to_save": ["embed_tokens"], "rank_pattern": {"down_proj": 6},
    });
    for (init, changes) in [
        (serde_json::json!(true), false),
        ("gaussian".into(), false),
        ("pissa".into(), false),
        ("olora".into(), false),
        (false.into(), true),
    ] {
        let mut json = json.clone();
        json["init_lora_weights"] = init.clone();
        let config = AdapterConfig::from_json(json, "test").expect("config");
        let fresh = Arc::new(Adapter::fresh(config, "fresh", 7).expect("adapter"));
        let device = Device::flex();
        let files = base("llama");
        let model = AutoModelForCausalLM::from_files(&files, &with([fresh.clone()])).expect("model");
        let plain = AutoModelForCausalLM::from_files(&files, &LoadOptions::default()).expect("model");
        // Seven linear layers in two layers, and a table.
        let names: Vec<String> = fresh.parameters().into_iter().map(|(_, name)| name).collect();
        assert_eq!(names.len(), 2 * 7 * 2 + 1, "{names:?}");
        assert!(names.contains(&"model.embed_tokens.weight".to_string()));
        assert!(!names.iter().any(|name| name.starts_with("lm_head")));
        let ids = vec![(3..15).collect::<Vec<u32>>()];
        let logits = |model: &AutoModelForCausalLM| {
            let mut cache = model.new_cache(CacheKind::Dynamic, vec![0]);
            values(model.forward(tensor(&ids, &device), &mut cache, LogitsFor::All))
        };
        let difference = common::difference(&logits(&model), &logits(&plain));
        assert_eq!(difference > 1e-4, changes, "{init}: {difference}");
    }
}
