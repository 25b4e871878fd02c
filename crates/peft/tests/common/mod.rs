//! What the tests of adapters share.

// Each test uses some of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::module::{Module, ModuleVisitor};
use burn::tensor::{Device, Int, Tensor, TensorData};
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::{Checkpoint, DType};
use oxiformers_models::nn::{CacheKind, EncoderInputs, LoadOptions, LogitsFor};
use oxiformers_models::{
    AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, CausalLM, Seq2SeqLM,
};
use oxiformers_nn::weights::to_f32;
use oxiformers_peft::Adapter;
use safetensors::tensor::{Dtype, TensorView, serialize};

/// Where the fixtures are.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The fixtures of single adapters whose names `wanted` says yes to.
pub fn cases(wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let entries = std::fs::read_dir(root()).expect("fixtures");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("entry"))
        .filter(|entry| entry.path().join("adapter_model.safetensors").exists())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with("training") && wanted(name))
        .collect();
    names.sort();
    names
}

/// The files of a base model; of an encoder, those without heads.
pub fn base(name: &str) -> ModelFiles {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../models/tests/fixtures")
        .join(name);
    let files = ModelFiles::from_dir(&path).expect(name);
    if !name.starts_with("encoders/") {
        return files;
    }
    let checkpoint = Checkpoint::open(&files.named("base")).or_else(|_| {
        let bytes = std::fs::read(path.join("model.safetensors")).expect("weights");
        Checkpoint::open(&ModelFiles::from_memory(
            "base",
            [("model.safetensors".to_string(), bytes.into())],
        ))
    });
    let checkpoint = checkpoint.expect("base");
    let names = checkpoint
        .tensors()
        .map(|info| info.name.clone())
        .filter(|name| !name.contains('@'));
    let tensors: Vec<_> = names
        .map(|name| (name.clone(), checkpoint.tensor(&name).expect("tensor")))
        .collect();
    let views = tensors.iter().map(|(name, view)| {
        (
            name,
            TensorView::new(Dtype::F32, view.shape.clone(), &view.data).expect("view"),
        )
    });
    let weights = serialize(views, None).expect("weights");
    let config = std::fs::read(path.join("config.json")).expect("config");
    ModelFiles::from_memory(
        name,
        [
            ("config.json".to_string(), config.into()),
            ("model.safetensors".to_string(), weights.into()),
        ],
    )
}

/// A fixture's adapter, and the name of its base.
pub fn adapter(name: &str) -> (Adapter, String) {
    let files = ModelFiles::from_dir(&root().join(name)).expect(name);
    let adapter = Adapter::from_files(&files, name).unwrap_or_else(|error| panic!("{name}: {error}"));
    // The widest module of the tiny models that is adapted so.
    let adapter = adapter.with_widest(48);
    let base = adapter.config().base_model_name_or_path.clone().expect("base");
    (adapter, base)
}

/// Tensors of a `reference.safetensors`.
pub struct Reference(pub Checkpoint);

impl Reference {
    pub fn open(name: &str) -> Self {
        let path = root().join(name).join("reference.safetensors");
        let files = ModelFiles::from_file(&path).expect("reference");
        Self(Checkpoint::open(&files).expect("reference"))
    }

    pub fn contains(&self, name: &str) -> bool {
        self.0.info(name).is_some()
    }

    pub fn ids(&self, name: &str) -> Vec<Vec<u32>> {
        let view = self.0.tensor(name).expect(name);
        let ids = view
            .data
            .as_chunks()
            .0
            .iter()
            .map(|bytes| i64::from_le_bytes(*bytes) as u32);
        let ids: Vec<u32> = ids.collect();
        ids.chunks(*view.shape.last().expect("shape"))
            .map(<[u32]>::to_vec)
            .collect()
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        to_f32(&self.0.tensor(name).expect(name)).expect("floats")
    }

    /// All tensors of floats whose names begin so, by the rest of their names.
    pub fn with_prefix(&self, prefix: &str) -> BTreeMap<String, Vec<f32>> {
        let floats = self.0.tensors().filter(|info| info.dtype == DType::F32);
        let names = floats.filter_map(|info| Some((info.name.strip_prefix(prefix)?, &info.name)));
        names
            .map(|(short, name)| (short.to_string(), self.floats(name)))
            .collect()
    }
}

/// A model with adapters.
pub enum Model {
    Causal(AutoModelForCausalLM),
    Seq2Seq(AutoModelForSeq2SeqLM),
    Classifier(AutoModelForSequenceClassification),
}

impl Model {
    pub fn load(base_name: &str, options: &LoadOptions) -> Result<Self, oxiformers_models::Error> {
        Self::from_files(base_name, &base(base_name), options)
    }

    pub fn from_files(
        base_name: &str,
        files: &ModelFiles,
        options: &LoadOptions,
    ) -> Result<Self, oxiformers_models::Error> {
        Ok(if base_name.starts_with("encoders/") {
            Self::Classifier(AutoModelForSequenceClassification::from_files(files, options)?)
        } else if base_name.starts_with("seq2seq/") {
            Self::Seq2Seq(AutoModelForSeq2SeqLM::from_files(files, options)?)
        } else {
            Self::Causal(AutoModelForCausalLM::from_files(files, options)?)
        })
    }

    /// Visits its parameters.
    pub fn visit(&self, visitor: &mut impl ModuleVisitor) {
        match self {
            Self::Causal(model) => model.decoder.visit(visitor),
            Self::Seq2Seq(model) => model.model.visit(visitor),
            Self::Classifier(model) => {
                model.encoder.visit(visitor);
                model.head.visit(visitor);
            }
        }
    }

    /// Logits of a reference's inputs: `[rows, classes]`.
    pub fn logits(&self, reference: &Reference, device: &Device) -> Tensor<2> {
        let ids = reference.ids("input_ids");
        match self {
            Self::Causal(model) => {
                let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; ids.len()]);
                model
                    .forward(tensor(&ids, device), &mut cache, LogitsFor::All)
                    .flatten(0, 1)
            }
            Self::Seq2Seq(model) => {
                let targets = reference.ids("decoder_input_ids");
                let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; ids.len()]);
                let tokens = ids.iter().map(|row| 0..row.len()).collect();
                model.encode(tensor(&ids, device), tokens, &mut cache);
                model
                    .forward(tensor(&targets, device), &mut cache, LogitsFor::All)
                    .flatten(0, 1)
            }
            Self::Classifier(model) => {
                let inputs = EncoderInputs::padded(&ids, 0);
                model.forward(&inputs).expect("logits").logits
            }
        }
    }

    /// The loss that the reference has gradients of.
    pub fn loss(&self, reference: &Reference, device: &Device) -> Tensor<1> {
        let logits = self.logits(reference, device);
        let [rows, _] = logits.dims();
        let name = match self {
            Self::Classifier(_) => None,
            Self::Seq2Seq(_) => Some("decoder_input_ids"),
            Self::Causal(_) => Some("input_ids"),
        };
        // Which rows are judged, and by which class.
        let mut chosen: Vec<(usize, u32)> = Vec::new();
        match name {
            None => chosen.extend((0..rows).map(|row| (row, 1))),
            Some(name) => {
                for (text, ids) in reference.ids(name).iter().enumerate() {
                    let next = ids[1..].iter().enumerate();
                    chosen.extend(next.map(|(at, id)| (text * ids.len() + at, *id)));
                }
            }
        }
        let int = |values: Vec<i32>| {
            let count = values.len();
            Tensor::<1, Int>::from_data(TensorData::new(values, [count]), device)
        };
        let at = int(chosen.iter().map(|(row, _)| *row as i32).collect());
        let classes = int(chosen.iter().map(|(_, class)| *class as i32).collect());
        let log_probs = burn::tensor::activation::log_softmax(logits.select(0, at), 1);
        log_probs.gather(1, classes.unsqueeze_dim(1)).mean().neg()
    }
}

/// Options with adapters.
pub fn with(adapters: impl IntoIterator<Item = Arc<Adapter>>) -> LoadOptions {
    LoadOptions {
        adapters: adapters
            .into_iter()
            .map(|adapter| adapter as Arc<dyn oxiformers_nn::Adapter>)
            .collect(),
        ..LoadOptions::default()
    }
}

pub fn tensor(rows: &[Vec<u32>], device: &Device) -> Tensor<2, Int> {
    let flat: Vec<i32> = rows.iter().flatten().map(|id| *id as i32).collect();
    Tensor::from_data(TensorData::new(flat, [rows.len(), rows[0].len()]), device)
}

pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("f32")
}

/// The largest difference, as a part of the largest value if that is above 1.
pub fn difference(ours: &[f32], reference: &[f32]) -> f32 {
    assert_eq!(ours.len(), reference.len());
    let size = reference.iter().fold(1f32, |size, x| size.max(x.abs()));
    // A NaN must not hide behind `max`.
    let differences = ours.iter().zip(reference).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |worst, x| {
        if x.is_nan() {
            f32::INFINITY
        } else {
            worst.max(x / size)
        }
    })
}
