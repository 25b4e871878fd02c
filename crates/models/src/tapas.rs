//! TAPAS (Herzig et al., 2020): BERT that reads a question and a table. Each token has seven types, which say where in
//! the table it stands, and its position counts from the beginning of its cell.

use std::collections::HashMap;

use burn::module::Module;
use burn::tensor::Device;
use oxiformers_nn::encoder::{TABLE_IDS, run_layers};
use oxiformers_nn::{
    Backbone, Embedding, Embeddings, EmbeddingsConfig, EncoderInputs, EncoderLayer, EncoderOutput, Error,
    Head, Result, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::bert::{self, Layer, pooled_head};
use crate::fields::over_defaults;
use crate::{EncoderArchitecture, Task};

/// Which of the types is a token's column.
const COLUMN: usize = 1;
/// Which of the types is a token's row.
const ROW: usize = 2;

/// The fields of `config.json`: BERT's with other defaults, and more.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(try_from = "Value")]
#[allow(missing_docs)]
pub struct Config {
    #[serde(flatten)]
    pub bert: bert::Config,
    #[serde(flatten)]
    pub own: Fields,
}

/// The fields that BERT does not have.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Fields {
    pub type_vocab_sizes: Vec<usize>,
    pub reset_position_index_per_cell: bool,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            type_vocab_sizes: vec![3, 256, 256, 2, 256, 256, 10],
            reset_position_index_per_cell: true,
        }
    }
}

impl TryFrom<Value> for Config {
    type Error = serde_json::Error;

    fn try_from(json: Value) -> serde_json::Result<Self> {
        let defaults = bert::Config {
            max_position_embeddings: 1024,
            ..bert::Config::default()
        };
        Ok(Self {
            own: serde_json::from_value(json.clone())?,
            bert: over_defaults(&defaults, json)?,
        })
    }
}

/// The encoder.
#[derive(Module, Debug)]
pub struct Model {
    /// What the tokens begin as, but for their types.
    pub embeddings: Embeddings,
    types: Vec<Embedding>,
    layers: Vec<Layer>,
    /// Positions that there are, where they count from the beginning of a cell.
    positions_of_cells: Option<usize>,
}

/// Positions within cells, those from `most` on alike.
fn positions(row: &[[u32; TABLE_IDS]], most: usize) -> Vec<u32> {
    let mut begins = HashMap::new();
    let position = |(place, ids): (usize, &[u32; TABLE_IDS])| {
        let begin = *begins.entry((ids[COLUMN], ids[ROW])).or_insert(place);
        (place - begin).min(most.saturating_sub(1)) as u32
    };
    row.iter().enumerate().map(position).collect()
}

impl Backbone for Model {
    fn forward(&self, inputs: &EncoderInputs, device: &Device) -> Result<EncoderOutput> {
        let [batch, seq] = inputs.dims();
        let mut inputs = inputs.clone();
        if inputs.table_ids.is_empty() {
            inputs.table_ids = vec![vec![[0; TABLE_IDS]; seq]; batch];
        }
        inputs.check("table_ids", &inputs.table_ids)?;
        if let (Some(most), true) = (self.positions_of_cells, inputs.position_ids.is_empty()) {
            inputs.position_ids = inputs.table_ids.iter().map(|row| positions(row, most)).collect();
        }
        let mut x = self.embeddings.sum(&inputs, device)?;
        for (index, table) in self.types.iter().enumerate() {
            let row = |row: &Vec<[u32; TABLE_IDS]>| row.iter().map(|ids| ids[index]).collect();
            let rows: Vec<Vec<u32>> = inputs.table_ids.iter().map(row).collect();
            x = x + table.forward(inputs.tensor("table_ids", &rows, table.weight.shape()[0], device)?);
        }
        let x = self.embeddings.norm(x);
        let cx = &mut inputs.context(device);
        Ok(run_layers(&self.layers, x, &inputs, |_, layer, x| {
            layer.forward(x, cx)
        }))
    }
}

impl EncoderArchitecture for Config {
    type Model = Model;
    const BASE: &'static str = "tapas";
    const IGNORED: &'static [&'static str] = bert::IGNORED;

    fn load(&self, w: &Weights) -> Result<Model> {
        let (c, own, w) = (&self.bert, &self.own, w.pp("tapas"));
        c.check()?;
        if own.type_vocab_sizes.len() != TABLE_IDS {
            let message = format!("names {} tables, not {TABLE_IDS}", own.type_vocab_sizes.len());
            return Err(Error::config("type_vocab_sizes", message));
        }
        let (at, hidden) = (w.pp("embeddings"), c.hidden_size);
        let embeddings = EmbeddingsConfig {
            max_position_embeddings: Some(c.max_position_embeddings),
            ..EmbeddingsConfig::new(c.vocab_size, hidden, c.layer_norm_eps)
        };
        let types = (own.type_vocab_sizes.iter().enumerate())
            .map(|(i, rows)| Embedding::load(&at.pp(format!("token_type_embeddings_{i}")), *rows, hidden));
        let layers = (0..c.num_hidden_layers).map(|i| c.layer(&w.pp("encoder.layer").pp(i)));
        Ok(Model {
            embeddings: Embeddings::load(&at, embeddings)?,
            types: types.collect::<Result<_>>()?,
            layers: layers.collect::<Result<_>>()?,
            positions_of_cells: own
                .reset_position_index_per_cell
                .then_some(c.max_position_embeddings),
        })
    }

    fn head(&self, task: Task, w: &Weights, model: &Model, labels: usize) -> Result<Option<Head>> {
        match task {
            Task::MaskedLM => {
                let table = &model.embeddings.word_embeddings;
                let head = self
                    .bert
                    .predictions(&w.pp("cls.predictions"), "LayerNorm", table);
                head.map(Some)
            }
            Task::Base | Task::SequenceClassification => pooled_head(
                task,
                w,
                &w.pp("tapas.pooler.dense"),
                self.bert.hidden_size,
                labels,
            ),
            _ => Ok(None),
        }
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.bert.max_position_embeddings)
    }
}
