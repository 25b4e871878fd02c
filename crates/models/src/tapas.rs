//! TAPAS (Herzig et al., 2020): BERT that reads a question and a table. Each token has seven types, which say where in
//! the table it stands, and its position counts from the beginning of its cell.

use std::borrow::Cow;
use std::collections::HashMap;

use burn::module::Module;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use oxiformers_nn::encoder::{TABLE_IDS, run_layers};
use oxiformers_nn::linear::Matrix;
use oxiformers_nn::{
    Backbone, Embedding, Embeddings, EmbeddingsConfig, EncoderInputs, EncoderLayer, EncoderOutput, Error,
    Head, Linear, Result, Slot, Weights,
};
use serde::{Deserialize, Serialize};

use crate::bert::{self, Extended, Extends, Layer, pooled_head, pooler};
use crate::{EncoderArchitecture, Task};

/// Which of the types is a token's column.
const COLUMN: usize = 1;
/// Which of the types is a token's row.
const ROW: usize = 2;

/// The fields of `config.json`: BERT's with other defaults, and more.
pub type Config = Extended<Fields>;

/// The fields that BERT does not have.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Fields {
    pub type_vocab_sizes: Vec<usize>,
    pub reset_position_index_per_cell: bool,
    pub num_aggregation_labels: usize,
    pub temperature: f64,
    pub max_num_rows: usize,
    pub max_num_columns: usize,
    pub select_one_column: bool,
    pub allow_empty_column_selection: bool,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            type_vocab_sizes: vec![3, 256, 256, 2, 256, 256, 10],
            reset_position_index_per_cell: true,
            num_aggregation_labels: 0,
            temperature: 1.0,
            max_num_rows: 64,
            max_num_columns: 32,
            select_one_column: true,
            allow_empty_column_selection: false,
        }
    }
}

impl Extends for Fields {
    fn bert() -> bert::Config {
        bert::Config {
            max_position_embeddings: 1024,
            ..bert::Config::default()
        }
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

/// The types of all tokens, 0 where nothing is said.
fn table_ids(inputs: &EncoderInputs) -> Cow<'_, [Vec<[u32; TABLE_IDS]>]> {
    match inputs.table_ids.is_empty() {
        true => {
            let [batch, seq] = inputs.dims();
            Cow::Owned(vec![vec![[0; TABLE_IDS]; seq]; batch])
        }
        false => Cow::Borrowed(&inputs.table_ids),
    }
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
        let mut inputs = inputs.clone();
        inputs.table_ids = table_ids(&inputs).into_owned();
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

    /// Padding stands in the column of the question, which some models may choose.
    fn batch_group(&self, length: usize) -> usize {
        match self.own.allow_empty_column_selection {
            true => length,
            false => 0,
        }
    }

    /// None where positions count from the beginning of a cell, and those beyond the last are alike.
    fn max_position_embeddings(&self) -> Option<usize> {
        (!self.own.reset_position_index_per_cell).then_some(self.bert.max_position_embeddings)
    }
}

/// What makes an answer of a table: which cells it is made of, and what is to be done with them.
#[derive(Module, Debug)]
pub struct TableHead {
    output_weights: Matrix,
    output_bias: Matrix,
    column_output_weights: Matrix,
    column_output_bias: Matrix,
    aggregation: Option<Head>,
    #[module(skip)]
    own: Fields,
}

/// The answer to a question about a table.
#[derive(Debug, Clone)]
pub struct TableAnswer {
    /// `[batch, seq]`: the logits of the cells that the tokens are of; -10000 outside of the likeliest column.
    pub logits: Tensor<2>,
    /// `[batch, num_aggregation_labels]`: what to do with the cells, where the model was trained to.
    pub logits_aggregation: Option<Tensor<2>>,
}

/// Added to the logits of what is never chosen.
const NEVER: f32 = -10_000.0;

/// The cells that a batch of tokens is of.
struct Cells {
    /// Most cells of a row of the batch.
    count: usize,
    /// `[batch, cells, seq]`: the mean over the tokens of a cell.
    mean: Tensor<3>,
    /// `[batch, columns, cells]`: the mean over the cells of a column.
    columns: Tensor<3>,
    /// `[batch, columns, 1]`: what is added to the logits of columns.
    column_bias: Tensor<3>,
    /// `[batch, cells]`: the column of a cell.
    column_of: Tensor<2, Int>,
    /// `[batch, cells]`: the share of tokens of a cell that are not padding; 0 in column 0, which is never chosen.
    weight: Tensor<2>,
    /// `[batch, seq]`: the cell of a token.
    cell_of: Tensor<2, Int>,
}

impl Fields {
    fn cells(&self, inputs: &EncoderInputs, device: &Device) -> Cells {
        let [batch, seq] = inputs.dims();
        let limit = |id: u32, most: usize| (id as usize).min(most.saturating_sub(1));
        // By row of the batch: the cell of each token, and of each cell its column, tokens, and real tokens.
        let mut cell_of = Vec::with_capacity(batch * seq);
        let mut rows: Vec<Vec<(usize, usize, usize)>> = Vec::with_capacity(batch);
        for (row, tokens) in table_ids(inputs).iter().zip(&inputs.tokens) {
            let mut places = HashMap::new();
            let mut cells: Vec<(usize, usize, usize)> = Vec::new();
            for (at, ids) in row.iter().enumerate() {
                let column = limit(ids[COLUMN], self.max_num_columns);
                let place = *places
                    .entry((column, limit(ids[ROW], self.max_num_rows)))
                    .or_insert(cells.len());
                if place == cells.len() {
                    cells.push((column, 0, 0));
                }
                if let Some((_, all, real)) = cells.get_mut(place) {
                    *all += 1;
                    *real += usize::from(tokens.contains(&at));
                }
                cell_of.push(place);
            }
            rows.push(cells);
        }
        let count = rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = self.max_num_columns;
        let mut mean = vec![0f32; batch * count * seq];
        let mut columns = vec![0f32; batch * width * count];
        let mut column_bias = vec![0f32; batch * width];
        let (mut column_of, mut weight) = (vec![0i32; batch * count], vec![0f32; batch * count]);
        for (item, cells) in rows.iter().enumerate() {
            for at in 0..seq {
                let cell = cell_of[item * seq + at];
                mean[(item * count + cell) * seq + at] = 1.0 / cells[cell].1 as f32;
            }
            let mut sums = vec![0f32; width];
            let share = |(_, all, real): &(usize, usize, usize)| *real as f32 / *all as f32;
            for cell in cells {
                sums[cell.0] += share(cell);
            }
            for (at, cell) in cells.iter().enumerate() {
                let column = cell.0;
                columns[(item * width + column) * count + at] = share(cell) / (sums[column] + 1e-10);
                column_of[item * count + at] = column as i32;
                weight[item * count + at] = if column == 0 { 0.0 } else { share(cell) };
            }
            for (column, sum) in sums.iter().enumerate() {
                let never = match column {
                    0 => !self.allow_empty_column_selection,
                    _ => *sum < 0.5,
                };
                column_bias[item * width + column] = if never { NEVER } else { 0.0 };
            }
        }
        let cell_of: Vec<i32> = cell_of.into_iter().map(|cell| cell as i32).collect();
        let float = |values: Vec<f32>, shape: [usize; 3]| {
            Tensor::<3>::from_data(TensorData::new(values, shape), device)
        };
        Cells {
            count,
            mean: float(mean, [batch, count, seq]),
            columns: float(columns, [batch, width, count]),
            column_bias: float(column_bias, [batch, width, 1]),
            column_of: Tensor::from_data(TensorData::new(column_of, [batch, count]), device),
            weight: Tensor::from_data(TensorData::new(weight, [batch, count]), device),
            cell_of: Tensor::from_data(TensorData::new(cell_of, [batch, seq]), device),
        }
    }
}

impl Config {
    /// The head for questions about tables.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen, or a setting that no model has.
    pub fn table_head(&self, w: &Weights) -> Result<TableHead> {
        let (own, hidden) = (&self.own, self.bert.hidden_size);
        if !own.select_one_column {
            return Err(Error::config("select_one_column", "only true is supported"));
        }
        for (name, size) in [
            ("max_num_columns", own.max_num_columns),
            ("max_num_rows", own.max_num_rows),
        ] {
            if !(1..=1 << 12).contains(&size) {
                return Err(Error::config(
                    name,
                    format!("is {size}; it must be from 1 to 4096"),
                ));
            }
        }
        if !(own.temperature > 0.0 && own.temperature.is_finite()) {
            let message = format!("is {}; it must be above 0", own.temperature);
            return Err(Error::config("temperature", message));
        }
        let stored = |name: &str, shape: &[usize], width| -> Result<Matrix> {
            let mut view = w.view(name, shape)?;
            view.shape = vec![1, width];
            let strides = vec![width, 1];
            w.matrix_of(
                name,
                Slot {
                    strides,
                    ..Slot::whole(name, shape)
                },
                view,
            )
        };
        let aggregation = match own.num_aggregation_labels {
            0 => None,
            labels => {
                let output = Linear::load(&w.pp("aggregation_classifier"), hidden, labels, true)?;
                Some(pooler(&w.pp("tapas.pooler.dense"), hidden)?.output(output))
            }
        };
        Ok(TableHead {
            output_weights: stored("output_weights", &[hidden], hidden)?,
            output_bias: stored("output_bias", &[], 1)?,
            column_output_weights: stored("column_output_weights", &[hidden], hidden)?,
            column_output_bias: stored("column_output_bias", &[], 1)?,
            aggregation,
            own: own.clone(),
        })
    }
}

impl TableHead {
    /// The answer that hidden states `[batch, seq, hidden_size]` of a batch are.
    pub fn forward(&self, x: Tensor<3>, inputs: &EncoderInputs, device: &Device) -> TableAnswer {
        let [batch, _] = inputs.dims();
        let first = || Tensor::<1, Int>::zeros([1], device);
        let logits = |weights: &Matrix, bias: &Matrix| {
            weights.linear(x.clone(), None) + bias.rows(first()).unsqueeze::<3>()
        };
        let cells = self.own.cells(inputs, device);
        let of_columns = logits(&self.column_output_weights, &self.column_output_bias);
        let of_columns = cells.columns.matmul(cells.mean.clone().matmul(of_columns)) + cells.column_bias;
        // `[batch, 1]`.
        let chosen: Tensor<2, Int> = of_columns.argmax(1).squeeze_dim(2);
        let is_chosen: Tensor<2, Bool> = cells.column_of.equal(chosen.expand([batch, cells.count]));
        let may = cells.weight * is_chosen.float();
        let tokens = logits(&self.output_weights, &self.output_bias) / self.own.temperature;
        let of_cells: Tensor<2> = cells.mean.matmul(tokens).squeeze_dim(2);
        let of_cells = of_cells + (may.neg() + 1.0) * NEVER;
        let pooled = |head: &Head| head.forward(x.clone(), inputs).squeeze_dim(1);
        TableAnswer {
            logits: of_cells.gather(1, cells.cell_of),
            logits_aggregation: self.aggregation.as_ref().map(pooled),
        }
    }
}
