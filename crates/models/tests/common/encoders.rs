//! What tests of encoders share.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::{Checkpoint, DType, TensorView};
use oxiformers_models::nn::EncoderInputs;

use super::Reference;

/// The tensors of a fixture, by their names.
pub fn tensors(dir: &Path) -> BTreeMap<String, TensorView> {
    let files = ModelFiles::from_file(&dir.join("model.safetensors")).expect("model");
    let checkpoint = Checkpoint::open(&files).expect("model");
    let tensor = |name: &str| checkpoint.tensor(name).expect("tensor");
    (checkpoint.tensors())
        .map(|info| (info.name.clone(), tensor(&info.name)))
        .collect()
}

/// A model of these tensors, in memory.
pub fn model(dir: &Path, tensors: &BTreeMap<String, TensorView>) -> ModelFiles {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, view) in tensors {
        let dtype = match view.dtype {
            DType::F32 => "F32",
            DType::I64 => "I64",
            dtype => panic!("{name}: {dtype:?}"),
        };
        let start = data.len();
        data.extend_from_slice(&view.data);
        let offsets = [start, data.len()];
        header.insert(
            name.clone(),
            serde_json::json!({"dtype": dtype, "shape": view.shape, "data_offsets": offsets}),
        );
    }
    let header = serde_json::to_vec(&header).expect("JSON");
    let bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
    let config = std::fs::read(dir.join("config.json")).expect("config.json");
    let files = [("config.json", config), ("model.safetensors", bytes)];
    let name = dir.file_name().expect("name").to_string_lossy();
    ModelFiles::from_memory(
        &name,
        files.map(|(name, bytes)| (name.to_string(), Bytes::from(bytes))),
    )
}

/// The tensors of the base model and of the head for a task, as a checkpoint of that model has them.
pub fn with_head(all: &BTreeMap<String, TensorView>, task: &str) -> BTreeMap<String, TensorView> {
    let own = |(name, view): (&String, &TensorView)| match name.split_once('@') {
        None => Some((name.clone(), view.clone())),
        Some((of, name)) => (of == task).then(|| (name.to_string(), view.clone())),
    };
    all.iter().filter_map(own).collect()
}

fn rows(rows: Vec<Vec<i64>>) -> Vec<Vec<u32>> {
    let row = |row: Vec<i64>| row.into_iter().map(|id| id as u32).collect();
    rows.into_iter().map(row).collect()
}

/// `N` numbers of each token of sequences of `seq`; nothing where the reference has none.
fn of_each_token<const N: usize>(reference: &Reference, name: &str, seq: usize) -> Vec<Vec<[u32; N]>> {
    let found = reference.contains(name).then(|| rows(reference.ids(name)));
    let tokens = found.unwrap_or_default().into_iter();
    let tokens: Vec<[u32; N]> = tokens.map(|ids| ids.try_into().expect(name)).collect();
    tokens.chunks(seq).map(<[_]>::to_vec).collect()
}

/// The batch without and with padding, with what its tensors are called at the end.
pub fn batches(reference: &Reference, types: bool) -> [(EncoderInputs, &'static str); 2] {
    let ids = |name| rows(reference.ids(name));
    let mask = ids("attention_mask");
    let whole: Vec<Vec<u32>> = mask.iter().map(|row| vec![1; row.len()]).collect();
    [("input_ids", whole, ""), ("padded_ids", mask, ".padded")].map(|(name, mask, what)| {
        let inputs = EncoderInputs::with_mask(ids(name), &mask).expect("mask");
        let token_type_ids = if types { ids("token_type_ids") } else { Vec::new() };
        let inputs = EncoderInputs {
            token_type_ids,
            bbox: of_each_token(reference, "bbox", inputs.dims()[1]),
            table_ids: of_each_token(reference, &format!("table_ids{what}"), inputs.dims()[1]),
            output_hidden_states: true,
            ..inputs
        };
        (inputs, what)
    })
}
