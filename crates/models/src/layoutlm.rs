//! LayoutLM (Xu et al., 2020): BERT that knows where on a page each token stands.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use oxiformers_nn::encoder::run_layers;
use oxiformers_nn::{
    Backbone, Embedding, Embeddings, EncoderInputs, EncoderLayer, EncoderOutput, Error, Head, PositionCount,
    Result, Weights,
};
use serde::{Deserialize, Serialize};

use crate::bert::{self, Extended, Extends, Layer, pooled_head};
use crate::{EncoderArchitecture, Task};

/// The fields of `config.json`: BERT's, and more.
pub type Config = Extended<Fields>;

/// The fields that BERT does not have.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Fields {
    pub max_2d_position_embeddings: usize,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            max_2d_position_embeddings: 1024,
        }
    }
}

impl Extends for Fields {}

/// Embeddings of boxes on a page.
#[derive(Module, Debug)]
struct Places {
    x: Embedding,
    y: Embedding,
    height: Embedding,
    width: Embedding,
}

impl Places {
    /// `[batch, seq, hidden_size]`.
    fn forward(&self, inputs: &EncoderInputs, device: &Device) -> Result<Tensor<3>> {
        let ids = |table: &Embedding, of: &dyn Fn(&[u32; 4]) -> u32| -> Result<Tensor<3>> {
            let row = |row: &Vec<[u32; 4]>| row.iter().map(of).collect();
            let rows: Vec<Vec<u32>> = inputs.bbox.iter().map(row).collect();
            let ids = inputs.tensor("bbox", &rows, table.weight.shape()[0], device)?;
            Ok(table.forward(ids))
        };
        let place = |table: &Embedding, side: usize| ids(table, &|bbox| bbox[side]);
        let [left, upper, right, lower] = [0, 1, 2, 3];
        Ok(place(&self.x, left)?
            + place(&self.y, upper)?
            + place(&self.x, right)?
            + place(&self.y, lower)?
            + ids(&self.height, &|bbox| bbox[lower].saturating_sub(bbox[upper]))?
            + ids(&self.width, &|bbox| bbox[right].saturating_sub(bbox[left]))?)
    }
}

/// The encoder.
#[derive(Module, Debug)]
pub struct Model {
    /// What the tokens begin as, but for their places.
    pub embeddings: Embeddings,
    places: Places,
    layers: Vec<Layer>,
}

impl Backbone for Model {
    fn forward(&self, inputs: &EncoderInputs, device: &Device) -> Result<EncoderOutput> {
        let x = self.embeddings.sum(inputs, device)?;
        let boxed;
        let placed = if inputs.bbox.is_empty() {
            let [batch, seq] = inputs.dims();
            boxed = EncoderInputs {
                bbox: vec![vec![[0; 4]; seq]; batch],
                ..inputs.clone()
            };
            &boxed
        } else {
            inputs
        };
        let inside_out = |[left, upper, right, lower]: &[u32; 4]| right < left || lower < upper;
        if let Some(bbox) = placed.bbox.iter().flatten().find(|bbox| inside_out(bbox)) {
            let message = format!("holds {bbox:?}; boxes are [left, upper, right, lower]");
            return Err(Error::input("bbox", message));
        }
        let x = self.embeddings.norm(x + self.places.forward(placed, device)?);
        let cx = &mut inputs.context(device);
        Ok(run_layers(&self.layers, x, inputs, |_, layer, x| {
            layer.forward(x, cx)
        }))
    }
}

impl EncoderArchitecture for Config {
    type Model = Model;
    const BASE: &'static str = "layoutlm";
    const IGNORED: &'static [&'static str] = bert::IGNORED;

    fn load(&self, w: &Weights) -> Result<Model> {
        let (c, w) = (&self.bert, w.pp("layoutlm"));
        c.check()?;
        let at = w.pp("embeddings");
        let table = |name: &str| {
            let at = at.pp(format!("{name}_position_embeddings"));
            Embedding::load(&at, self.own.max_2d_position_embeddings, c.hidden_size)
        };
        let layers = (0..c.num_hidden_layers).map(|i| c.layer(&w.pp("encoder.layer").pp(i)));
        Ok(Model {
            embeddings: c.embeddings(&at, c.hidden_size, PositionCount::Plain)?,
            places: Places {
                x: table("x")?,
                y: table("y")?,
                height: table("h")?,
                width: table("w")?,
            },
            layers: layers.collect::<Result<_>>()?,
        })
    }

    fn head(&self, task: Task, w: &Weights, model: &Model, labels: usize) -> Result<Option<Head>> {
        let task = match task {
            Task::MaskedLM => {
                let table = &model.embeddings.word_embeddings;
                let head = self
                    .bert
                    .predictions(&w.pp("cls.predictions"), "LayerNorm", table);
                return head.map(Some);
            }
            Task::DocumentQuestionAnswering => Task::QuestionAnswering,
            Task::QuestionAnswering | Task::MultipleChoice => return Ok(None),
            task => task,
        };
        let place = w.pp("layoutlm.pooler.dense");
        pooled_head(task, w, &place, self.bert.hidden_size, labels)
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.bert.max_position_embeddings)
    }
}
