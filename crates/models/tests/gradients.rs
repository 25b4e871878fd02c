//! The gradients of every architecture against PyTorch's, on tiny checkpoints with random weights.
//!
//! `fixtures/make_gradients.py` made the reference.

mod common;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use common::Reference;
use common::encoders::{batches, model, tensors, with_head};
use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::{
    Cache, CacheKind, CrossEntropyOptions, EncoderInputs, LoadOptions, LogitsFor, Parameters, cross_entropy,
    with_gradient_checkpointing,
};
use oxiformers_models::tasks::{
    DocumentQuestionAnswering, MaskedLM, MultipleChoice, NextSentencePrediction, PreTraining,
    QuestionAnswering, SequenceClassification, SpanLogits, TaskType, TokenClassification,
};
use oxiformers_models::{AutoModelFor, AutoModelForCausalLM, AutoModelForSeq2SeqLM, CausalLM, Seq2SeqLM};

/// Largest difference of a loss and of the numbers of a gradient, relative to the largest of them.
const TOLERANCE: f32 = 1e-3;
/// Gradients so much smaller than the model's largest are what rounding left of zero.
const NOTHING: f32 = 5e-4;

/// A model's parameters, which are told to whoever loads with these options.
fn tracked() -> (LoadOptions, Arc<Parameters>) {
    let parameters = Arc::new(Parameters::default());
    let options = LoadOptions {
        device: Device::flex().autodiff(),
        parameters: Some(parameters.clone()),
        ..LoadOptions::default()
    };
    (options, parameters)
}

/// The gradients of a module's parameters.
struct Found<'a> {
    gradients: &'a Gradients,
    values: BTreeMap<ParamId, Vec<f32>>,
}

impl ModuleVisitor for Found<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad(self.gradients) {
            let values = gradient.into_data().try_to_vec().expect("f32");
            self.values.insert(param.id, values);
        }
    }
}

/// The gradients of a loss, as a checkpoint would hold them.
fn gradients(
    loss: &Tensor<1>,
    parameters: &Parameters,
    visit: impl Fn(&mut Found),
) -> BTreeMap<String, Vec<f32>> {
    let gradients = loss.backward();
    let mut found = Found {
        gradients: &gradients,
        values: BTreeMap::new(),
    };
    visit(&mut found);
    let mut stored = BTreeMap::new();
    for parameter in parameters.trainable() {
        let slot = &parameter.slot;
        let len = slot.shape.iter().product();
        let stored: &mut Vec<f32> = stored
            .entry(slot.tensor.clone())
            .or_insert_with(|| vec![0.0; len]);
        if let Some(values) = found.values.remove(&parameter.id) {
            slot.scatter(&parameter.shape, &values, stored);
        }
    }
    stored
}

/// The largest relative difference, and which number it is of.
type Worst = (f32, String);

fn worse(a: Worst, b: Worst) -> Worst {
    // A NaN is worse than anything.
    if b.0 <= a.0 { a } else { b }
}

/// Holds a loss and its gradients to those of the reference.
fn compare(task: &str, reference: &Reference, loss: f32, ours: &BTreeMap<String, Vec<f32>>) -> Worst {
    let expected = reference.floats(&format!("{task}.loss"))[0];
    let mut worst = ((loss - expected).abs() / expected.abs(), "the loss".to_string());
    let prefix = format!("{task}:");
    let of_task = (reference.names().into_iter()).filter(|name| name.starts_with(&prefix));
    let theirs: BTreeMap<String, Expected> = of_task
        .map(|name| {
            (
                name[prefix.len()..].to_string(),
                Expected::new(&reference.floats(&name)),
            )
        })
        .collect();
    let of_model = theirs.values().map(Expected::largest).fold(0.0, f32::max);
    let mut own: Vec<&String> = ours.keys().filter(|name| !theirs.contains_key(*name)).collect();
    for (name, theirs) in &theirs {
        // Some that are tied to nothing are stored, and not used.
        if theirs.is_buffer || theirs.norm == 0.0 && !ours.contains_key(name) {
            continue;
        }
        // Tied parameters are stored under one of several names, chosen by chance.
        let found = ours.get(name).or_else(|| {
            let fits = |own: &&String| theirs.fits(&ours[*own]);
            own.iter().position(fits).map(|place| &ours[own.remove(place)])
        });
        let ours = found.unwrap_or_else(|| panic!("{task}: no gradient of {name}"));
        let scale = theirs.largest().max(NOTHING * of_model);
        for [place, value] in &theirs.places {
            let difference = (ours[*place as usize] - value).abs() / scale;
            worst = worse(worst, (difference, format!("{name}[{place}]")));
        }
        // A sum may be much smaller than what it is made of.
        let size = theirs.norm.max(NOTHING * of_model * (ours.len() as f32).sqrt());
        let norm = ours.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32;
        let sum = ours.iter().map(|x| f64::from(*x)).sum::<f64>() as f32;
        for (what, ours, expected) in [("norm", norm, theirs.norm), ("sum", sum, theirs.sum)] {
            let difference = (ours - expected).abs() / size;
            worst = worse(worst, (difference, format!("{what} of {name}")));
        }
    }
    for name in own {
        let zero = ours[name].iter().all(|x| *x == 0.0);
        assert!(zero, "{task}: {name} is no parameter of PyTorch's");
    }
    worst
}

/// What is known of a gradient.
struct Expected {
    is_buffer: bool,
    norm: f32,
    sum: f32,
    /// Places and the values there.
    places: Vec<[f32; 2]>,
}

impl Expected {
    fn new(values: &[f32]) -> Self {
        let [norm, sum, places @ ..] = values else {
            return Self {
                is_buffer: true,
                norm: 0.0,
                sum: 0.0,
                places: Vec::new(),
            };
        };
        Self {
            is_buffer: false,
            norm: *norm,
            sum: *sum,
            places: places.as_chunks().0.to_vec(),
        }
    }

    /// Whether these are the same numbers, but for a tenth.
    fn fits(&self, ours: &[f32]) -> bool {
        let near = |[place, value]: &[f32; 2]| {
            let own = ours.get(*place as usize);
            own.is_some_and(|own| (own - value).abs() < 0.1 * self.largest())
        };
        !self.is_buffer && self.places.iter().all(near)
    }

    fn largest(&self) -> f32 {
        self.places
            .iter()
            .fold(0.0, |most, [_, value]| most.max(value.abs()))
    }
}

fn ids(rows: &[Vec<i64>]) -> Tensor<2, Int> {
    let shape = [rows.len(), rows[0].len()];
    let ids: Vec<i32> = rows.iter().flatten().map(|id| *id as i32).collect();
    Tensor::from_data(TensorData::new(ids, shape), &Device::flex().autodiff())
}

fn mean(logits: Tensor<2>, labels: &[i64]) -> Tensor<1> {
    cross_entropy(logits, labels, CrossEntropyOptions::default()).expect("labels")
}

fn rows<const D: usize>(logits: Tensor<D>) -> Tensor<2> {
    let dims = logits.dims();
    let rows = dims[..D - 1].iter().product();
    logits.reshape([rows, dims[D - 1]])
}

/// Runs what `PARITY` names, or everything, and says what is beyond the tolerance.
fn check_all(folder: &str, mut each: impl FnMut(&Path, &Reference) -> Vec<(String, Worst)>) {
    let mut failures = Vec::new();
    for dir in common::fixtures(folder) {
        let name = dir.file_name().expect("name").to_string_lossy().into_owned();
        let wanted = std::env::var("PARITY").map_or(true, |only| name.contains(&only));
        if !wanted || !dir.join("gradients.safetensors").exists() {
            continue;
        }
        for (task, (worst, what)) in each(&dir, &Reference::open_file(&dir.join("gradients.safetensors"))) {
            println!("{name:<24} {task:<26} {worst:>9.2e}  {what}");
            if worst.is_nan() || worst > TOLERANCE {
                failures.push(format!("{name}: {task}: {worst:.2e} at {what}"));
            }
        }
    }
    assert!(failures.is_empty(), "beyond {TOLERANCE:e}: {failures:#?}");
}

#[test]
fn gradients_of_decoders() {
    check_all("", of_decoder);
}

fn of_decoder(dir: &Path, reference: &Reference) -> Vec<(String, Worst)> {
    let (options, parameters) = tracked();
    let files = ModelFiles::from_dir(dir).expect("fixture");
    let model = AutoModelForCausalLM::from_files(&files, &options).unwrap_or_else(|error| panic!("{error}"));
    let input_ids = reference.ids("CausalLM.input_ids");
    let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; input_ids.len()]);
    let logits = model.forward(ids(&input_ids), &mut cache, LogitsFor::All);
    // Each token is said by the one before it.
    let labels = reference.ids("CausalLM.labels");
    let next = labels
        .iter()
        .flat_map(|row| row[1..].iter().chain(&[-100]))
        .copied();
    let loss = mean(rows(logits), &next.collect::<Vec<_>>());
    let ours = gradients(&loss, &parameters, |found| model.decoder.visit(found));
    vec![(
        "CausalLM".to_string(),
        compare("CausalLM", reference, loss.into_scalar(), &ours),
    )]
}

#[test]
fn gradients_of_encoder_decoders() {
    check_all("seq2seq", of_encoder_decoder);
}

fn of_encoder_decoder(dir: &Path, reference: &Reference) -> Vec<(String, Worst)> {
    let (options, parameters) = tracked();
    let files = ModelFiles::from_dir(dir).expect("fixture");
    let model = AutoModelForSeq2SeqLM::from_files(&files, &options).unwrap_or_else(|error| panic!("{error}"));
    let inputs = Reference::open(dir);
    let source = inputs.ids("input_ids");
    let tokens: Vec<Range<usize>> = (inputs.ids("attention_mask").iter())
        .map(|row| 0..row.iter().filter(|m| **m == 1).count())
        .collect();
    let mut cache: Cache = model.new_cache(CacheKind::Dynamic, vec![0; source.len()]);
    Seq2SeqLM::encode(&model, ids(&source), tokens, &mut cache);
    let logits = model.forward(ids(&inputs.ids("decoder_input_ids")), &mut cache, LogitsFor::All);
    let loss = mean(rows(logits), &reference.ids("Seq2SeqLM.labels").concat());
    let ours = gradients(&loss, &parameters, |found| model.model.visit(found));
    vec![(
        "Seq2SeqLM".to_string(),
        compare("Seq2SeqLM", reference, loss.into_scalar(), &ours),
    )]
}

/// How a task's loss is made.
trait Loss {
    fn loss(self, labels: &dyn Fn(&str) -> Vec<i64>, inputs: &EncoderInputs) -> Tensor<1>;
}

impl Loss for Tensor<2> {
    fn loss(self, labels: &dyn Fn(&str) -> Vec<i64>, inputs: &EncoderInputs) -> Tensor<1> {
        let labels = labels("labels");
        if labels.len() == self.dims()[0] {
            return mean(self, &labels);
        }
        // Each token by itself is one of two, as a logit of the second.
        let [batch, seq] = self.dims();
        let device = self.device();
        let tensor =
            |values: Vec<f32>| Tensor::<2>::from_data(TensorData::new(values, [batch, seq]), &device);
        let labels = tensor(labels.iter().map(|label| *label as f32).collect());
        let mask = inputs
            .tokens
            .iter()
            .flat_map(|tokens| (0..seq).map(|i| f32::from(tokens.contains(&i))));
        let mask: Vec<f32> = mask.collect();
        let count: f32 = mask.iter().sum();
        let softplus = (self.clone().abs().neg().exp() + 1.0).log() + self.clone().clamp_min(0.0);
        ((softplus - self * labels) * tensor(mask)).sum() / count
    }
}

impl Loss for Tensor<3> {
    fn loss(self, labels: &dyn Fn(&str) -> Vec<i64>, _: &EncoderInputs) -> Tensor<1> {
        mean(rows(self), &labels("labels"))
    }
}

impl Loss for SpanLogits {
    fn loss(self, labels: &dyn Fn(&str) -> Vec<i64>, _: &EncoderInputs) -> Tensor<1> {
        (mean(self.start_logits, &labels("start")) + mean(self.end_logits, &labels("end"))) / 2.0
    }
}

fn of_head<T: TaskType<Logits: Loss>>(dir: &Path, reference: &Reference) -> Option<(String, Worst)> {
    let task = format!("{:?}", T::TASK);
    if !reference.contains(&format!("{task}.loss")) {
        return None;
    }
    let (options, parameters) = tracked();
    let files = model(dir, &with_head(&tensors(dir), &task));
    let model = AutoModelFor::<T>::from_files(&files, &options).unwrap_or_else(|error| panic!("{error}"));
    // The first two sequences, padded but where an answer might be in the padding.
    let whole = Reference::open(dir);
    let types = whole.ids("token_type_ids").iter().flatten().any(|id| *id > 0);
    let [(unpadded, _), (padded, _)] = batches(&whole, types);
    let mut inputs = if task.ends_with("QuestionAnswering") {
        unpadded
    } else {
        padded
    };
    inputs.input_ids.truncate(2);
    inputs.tokens.truncate(2);
    inputs.token_type_ids.truncate(2);
    inputs.bbox.truncate(2);
    inputs.table_ids.truncate(2);
    inputs.output_hidden_states = false;
    let logits = model.forward(&inputs).expect("forward").logits;
    let labels = |name: &str| reference.ids(&format!("{task}.{name}")).concat();
    let loss = logits.loss(&labels, &inputs);
    let ours = gradients(&loss, &parameters, |found| {
        model.encoder.visit(found);
        model.head.visit(found);
    });
    Some((task.clone(), compare(&task, reference, loss.into_scalar(), &ours)))
}

#[test]
fn gradients_of_encoders() {
    check_all("encoders", |dir, reference| {
        let tasks = [
            of_head::<MaskedLM>(dir, reference),
            of_head::<SequenceClassification>(dir, reference),
            of_head::<TokenClassification>(dir, reference),
            of_head::<QuestionAnswering>(dir, reference),
            of_head::<DocumentQuestionAnswering>(dir, reference),
            of_head::<MultipleChoice>(dir, reference),
            of_head::<NextSentencePrediction>(dir, reference),
            of_head::<PreTraining>(dir, reference),
        ];
        tasks.into_iter().flatten().collect()
    });
}

/// With layers that run once more in the backward pass, gradients are the same.
#[test]
fn gradients_with_checkpointing() {
    let of_encoder = |dir: &Path, reference: &Reference| {
        let head = of_head::<MaskedLM>(dir, reference);
        head.into_iter().collect::<Vec<_>>()
    };
    check_all("", |dir, reference| {
        with_gradient_checkpointing(|| of_decoder(dir, reference))
    });
    check_all("seq2seq", |dir, reference| {
        with_gradient_checkpointing(|| of_encoder_decoder(dir, reference))
    });
    check_all("encoders", |dir, reference| {
        with_gradient_checkpointing(|| of_encoder(dir, reference))
    });
}
