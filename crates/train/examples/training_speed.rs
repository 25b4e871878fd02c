//! Steps of full fine-tuning per second, for `benchmarks/training.py`.
//!
//!     training_speed FOLDER TASK BATCH SEQ STEPS
//!
//! `FOLDER` holds a model; `TASK` is `CausalLM` or `SequenceClassification`. Token ids and labels are those of the Python
//! side. Prints a line of JSON: seconds of each step, the first of which warms up, and losses.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::{
    CacheKind, CrossEntropyOptions, EncoderInputs, LoadOptions, LogitsFor, cross_entropy,
};
use oxiformers_models::{AutoModelForCausalLM, AutoModelForSequenceClassification, CausalLM};
use oxiformers_train::OptimizerConfig;
use oxiformers_train::optim::{Optimizer, Parameter, Step};

/// That of the command, which keeps what a step frees for the next one.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Ids that look random: the same on the Python side.
fn id(step: usize, index: usize, most: usize) -> usize {
    (step * 7919 + index * 104_729 + index * index % 8191) % (most - 8) + 8
}

/// Changes parameters by their gradients.
struct Update<'a> {
    gradients: &'a Gradients,
    optimizer: &'a mut dyn Optimizer,
    names: &'a mut HashMap<ParamId, String>,
}

impl ModuleMapper for Update<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(gradient) = param.val().grad(self.gradients) else {
            return param;
        };
        let number = self.names.len();
        let name = self
            .names
            .entry(param.id)
            .or_insert_with(|| number.to_string())
            .clone();
        param.map(|tensor| {
            let shape = tensor.dims();
            let device = tensor.device();
            let mut values = tensor.inner().into_data();
            let gradient = gradient.into_data();
            let parameter = Parameter {
                name: &name,
                shape: &shape,
                decays: true,
                embedding: false,
            };
            let step = Step {
                lr: 1e-4,
                grad_scale: 1.0,
            };
            let gradient = gradient.as_slice().expect("f32");
            self.optimizer
                .update(parameter, values.as_mut_slice().expect("f32"), gradient, step);
            Tensor::from_data(values, &device).require_grad()
        })
    }
}

/// Computes a step's loss and changes the parameters.
type OneStep<'a> = dyn FnMut(usize, &mut dyn Optimizer, &mut HashMap<ParamId, String>) -> f32 + 'a;

fn main() {
    // As in the command.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: no other thread runs yet.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, 10_000) };
    let args: Vec<String> = std::env::args().collect();
    let number = |i: usize| args[i].parse::<usize>().expect("a number");
    let (batch, seq, steps) = (number(3), number(4), number(5));
    let files = ModelFiles::from_dir(args[1].as_ref()).expect("a model");
    let options = LoadOptions {
        device: Device::flex().autodiff(),
        parameters: Some(Arc::default()),
        ..LoadOptions::default()
    };
    let mut optimizer = OptimizerConfig::default().build().expect("an optimizer");
    let mut names = HashMap::new();
    let (mut seconds, mut losses) = (Vec::new(), Vec::new());
    let mut run = |step: &mut OneStep<'_>| {
        for i in 0..steps {
            let begin = Instant::now();
            losses.push(step(i, optimizer.as_mut(), &mut names));
            seconds.push(begin.elapsed().as_secs_f64());
        }
    };
    match args[2].as_str() {
        "CausalLM" => {
            let mut model = AutoModelForCausalLM::from_files(&files, &options).expect("a decoder");
            let vocab = model.vocab_size();
            run(&mut |step, optimizer, names| {
                let ids: Vec<i32> = (0..batch * seq).map(|i| id(step, i, vocab) as i32).collect();
                // Each token is said by the one before it.
                let next = |(place, _): (usize, &i32)| match place % seq {
                    last if last == seq - 1 => -100,
                    _ => i64::from(ids[place + 1]),
                };
                let labels: Vec<i64> = ids.iter().enumerate().map(next).collect();
                let input = Tensor::<2, Int>::from_data(TensorData::new(ids, [batch, seq]), &options.device);
                let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; batch]);
                let logits = model.forward(input, &mut cache, LogitsFor::All);
                drop(cache);
                let logits = logits.reshape([batch * seq, vocab]);
                let loss = cross_entropy(logits, &labels, CrossEntropyOptions::default()).expect("labels");
                let gradients = loss.backward();
                let mut update = Update {
                    gradients: &gradients,
                    optimizer,
                    names,
                };
                model.decoder = model.decoder.clone().map(&mut update);
                loss.into_scalar()
            });
        }
        "SequenceClassification" => {
            let model = AutoModelForSequenceClassification::from_files(&files, &options);
            let mut model = model.expect("an encoder");
            let vocab = model.config.json["vocab_size"].as_u64().expect("vocab_size") as usize;
            run(&mut |step, optimizer, names| {
                let row = |row: usize| (0..seq).map(|i| id(step, row * seq + i, vocab) as u32).collect();
                let rows: Vec<Vec<u32>> = (0..batch).map(row).collect();
                let labels: Vec<i64> = (0..batch).map(|row| ((row + step) % 2) as i64).collect();
                let logits = model
                    .forward(&EncoderInputs::padded(&rows, 0))
                    .expect("forward")
                    .logits;
                let loss = cross_entropy(logits, &labels, CrossEntropyOptions::default()).expect("labels");
                let gradients = loss.backward();
                let mut update = Update {
                    gradients: &gradients,
                    optimizer,
                    names,
                };
                model.encoder = model.encoder.clone().map(&mut update);
                model.head = model.head.clone().map(&mut update);
                loss.into_scalar()
            });
        }
        task => panic!("{task} is not timed"),
    }
    println!("{}", serde_json::json!({"seconds": seconds, "losses": losses}));
}
