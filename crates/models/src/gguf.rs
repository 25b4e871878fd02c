//! GGUF files as Hugging Face checkpoints: the configuration from the metadata, and each tensor under the
//! name that the architecture's file asks for.
//!
//! Weights stay packed: all that is done to matrices is to reorder whole rows, which blocks never span.

use std::collections::HashMap;
use std::ops::Range;

use bytes::{Bytes, BytesMut};
use oxiformers_hub::checkpoint::gguf::Metadata;
use oxiformers_hub::checkpoint::{Checkpoint, DType, TensorView};
use oxiformers_nn::TensorSource;
use oxiformers_nn::weights::to_f32;
use serde_json::{Map, Value, json};

use crate::auto::AutoConfig;
use crate::error::{Error, Result};
use tables::{ARCHITECTURES, Arch, Name};

mod tables;

/// What the conversion to GGUF did to a tensor, and loading undoes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Change {
    /// Nothing.
    None,
    /// Rows of each head reordered from halves to neighbouring pairs.
    HalvesToPairs(Heads),
    /// Rows grouped by key/value head (its queries, its key, its value) reordered to all queries, all keys, all
    /// values.
    GroupsToStack,
    /// One added to every value.
    PlusOne,
    /// Rows cut into keys `[heads, latent, width]` (transposed) and values `[heads, width, latent]`.
    LatentApart,
}

/// Which heads a tensor's rows belong to.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Heads {
    Query,
    KeyValue,
}

/// The metadata below one architecture's name, with the tensors beside them.
struct Meta<'a> {
    metadata: &'a Metadata,
    checkpoint: &'a Checkpoint,
    /// `general.architecture`.
    architecture: &'a str,
    model: &'a str,
}

impl<'a> Meta<'a> {
    fn new(metadata: &'a Metadata, checkpoint: &'a Checkpoint, model: &'a str) -> Result<Self> {
        let key = "general.architecture";
        let architecture = metadata.get_str(key).ok_or_else(|| missing(model, key))?;
        Ok(Self {
            metadata,
            checkpoint,
            architecture,
            model,
        })
    }

    /// The table of this architecture; some names stand for two.
    fn arch(&self) -> Option<&'static Arch> {
        let name = match self.architecture {
            "llama" if self.u64("expert_count").unwrap_or(0) > 0 => "llama-experts",
            "falcon" if self.has("attn_norm_2.weight") => "falcon-two-norms",
            name => name,
        };
        ARCHITECTURES.iter().find(|arch| arch.name == name)
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn u64(&self, key: &str) -> Option<u64> {
        self.metadata.get_u64(&self.key(key))
    }

    fn need(&self, key: &str) -> Result<u64> {
        self.u64(key).ok_or_else(|| missing(self.model, &self.key(key)))
    }

    fn f64(&self, key: &str) -> Option<f64> {
        self.metadata.get_f64(&self.key(key))
    }

    fn bool(&self, key: &str) -> Option<bool> {
        self.metadata.get_bool(&self.key(key))
    }

    /// A number or truth value as JSON; null where there is none.
    fn value(&self, key: &str) -> Value {
        match (self.bool(key), self.u64(key)) {
            (Some(value), _) => json!(value),
            (_, Some(value)) => json!(value),
            _ => json!(self.f64(key)),
        }
    }

    /// Whether the first layer has the tensor.
    fn has(&self, part: &str) -> bool {
        self.checkpoint.info(&format!("blk.0.{part}")).is_some()
    }

    /// Rows of a tensor of the first layer.
    fn rows(&self, part: &str) -> Option<usize> {
        self.checkpoint
            .info(&format!("blk.0.{part}"))?
            .shape
            .first()
            .copied()
    }

    /// Query heads, and key/value heads.
    fn heads(&self) -> (usize, usize) {
        let heads = self.u64("attention.head_count").unwrap_or(0) as usize;
        let kv_heads = self
            .u64("attention.head_count_kv")
            .map_or(heads, |heads| heads as usize);
        (heads, kv_heads)
    }

    fn hidden_per_head(&self) -> u64 {
        self.u64("embedding_length").unwrap_or(0) / self.u64("attention.head_count").unwrap_or(1).max(1)
    }

    fn head_dim(&self) -> u64 {
        self.u64("attention.key_length")
            .unwrap_or_else(|| self.hidden_per_head())
    }

    /// Values of a tensor that the configuration needs.
    fn factors(&self, name: &str) -> Result<Option<Vec<f32>>> {
        if self.checkpoint.info(name).is_none() {
            return Ok(None);
        }
        let values = to_f32(&self.checkpoint.tensor(name)?);
        values.map(Some).map_err(|reason| Error::Config {
            model: self.model.to_string(),
            message: format!("the tensor `{name}` {reason}"),
        })
    }

    /// `rope_parameters`, without factors that are stored as tensors.
    fn rope_parameters(&self) -> Value {
        let mut rope = json!({
            "rope_type": "default",
            "rope_theta": self.f64("rope.freq_base").unwrap_or(10_000.0),
        });
        let head_dim = self.head_dim() as f64;
        if let Some(rotated) = self.u64("rope.dimension_count") {
            // Rounded up, so that the product with `head_dim` is not cut to one less.
            rope["partial_rotary_factor"] = json!((rotated as f64 / head_dim).next_up());
        }
        let original = self.u64("rope.scaling.original_context_length");
        match self.metadata.get_str(&self.key("rope.scaling.type")) {
            Some("linear") => {
                rope["rope_type"] = json!("linear");
                rope["factor"] = json!(self.f64("rope.scaling.factor"));
            }
            Some("yarn") => {
                rope["rope_type"] = json!("yarn");
                rope["factor"] = json!(self.f64("rope.scaling.factor"));
                rope["original_max_position_embeddings"] = json!(original);
                rope["beta_fast"] = json!(self.f64("rope.scaling.yarn_beta_fast"));
                rope["beta_slow"] = json!(self.f64("rope.scaling.yarn_beta_slow"));
                rope["attention_factor"] = json!(self.f64("rope.scaling.yarn_attn_factor"));
            }
            _ => {}
        }
        rope
    }

    /// `rope_parameters` where the frequencies are divided by factors that are stored as tensors, whatever rule
    /// they came from.
    fn stored_factors(&self) -> Result<Option<Value>> {
        let mut rope = self.rope_parameters();
        if let Some(factors) = self.factors("rope_freqs.weight")? {
            rope["attention_factor"] = json!(1.0);
            rope["short_factor"] = json!(factors);
            rope["long_factor"] = json!(factors);
        } else if let Some(long) = self.factors("rope_factors_long.weight")? {
            rope["attention_factor"] = json!(self.f64("rope.scaling.attn_factor"));
            rope["original_max_position_embeddings"] =
                json!(self.u64("rope.scaling.original_context_length"));
            rope["short_factor"] = json!(self.factors("rope_factors_short.weight")?);
            rope["long_factor"] = json!(long);
        } else {
            return Ok(None);
        }
        rope["rope_type"] = json!("longrope");
        Ok(Some(rope))
    }
}

fn missing(model: &str, key: &str) -> Error {
    Error::Config {
        model: model.to_string(),
        message: format!("the GGUF metadata lack `{key}`, or it has another type"),
    }
}

/// The `config.json` that a GGUF's metadata amount to.
///
/// # Errors
/// A key that is missing.
pub fn config(metadata: &Metadata, checkpoint: &Checkpoint, model: &str) -> Result<Value> {
    let meta = Meta::new(metadata, checkpoint, model)?;
    let mut config = Map::new();
    let Some(arch) = meta.arch() else {
        // Nobody knows it; the registry's error says so.
        config.insert("model_type".to_string(), json!(meta.architecture));
        return Ok(Value::Object(config));
    };
    for key in ["embedding_length", "block_count", "attention.head_count"] {
        meta.need(key)?;
    }
    let vocab = checkpoint
        .info("token_embd.weight")
        .and_then(|info| info.shape.first().copied());
    config.insert("model_type".to_string(), json!(arch.model_type));
    config.insert("vocab_size".to_string(), json!(vocab));
    config.insert("head_dim".to_string(), json!(meta.hidden_per_head()));
    config.insert("rope_parameters".to_string(), meta.rope_parameters());
    let tied = checkpoint.info("output.weight").is_none();
    config.insert("tie_word_embeddings".to_string(), json!(tied));
    for (field, key) in arch.fields.iter().copied().flatten() {
        // Zero is how a window is written that is none.
        match meta.value(key) {
            Value::Null => {}
            value if value == json!(0) && *key == "attention.sliding_window" => {}
            value => drop(config.insert(field.to_string(), value)),
        }
    }
    if let Value::Object(extra) = (arch.extra)(&meta) {
        config.extend(extra);
    }
    if let Some(rope) = meta.stored_factors()? {
        config.insert("rope_parameters".to_string(), rope);
    }
    for field in ["bos_token_id", "eos_token_id"] {
        if let Some(id) = metadata.get_u64(&format!("tokenizer.ggml.{field}")) {
            config.insert(field.to_string(), json!(id));
        }
    }
    Ok(without_nulls(Value::Object(config)))
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let kept = map.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(kept.map(|(key, value)| (key, without_nulls(value))).collect())
        }
        value => value,
    }
}

/// The tensors of a GGUF under Hugging Face names.
pub struct Source {
    checkpoint: Checkpoint,
    heads: (usize, usize),
    /// By Hugging Face names.
    names: HashMap<String, Stored>,
}

/// Where a tensor is stored, and how.
struct Stored {
    /// GGUF name.
    name: String,
    /// The rows that belong to it, where several tensors are stored as one.
    rows: Option<Range<usize>>,
    change: Change,
}

/// Tensors that the configuration is made of, or the tokenizer, or another that is named beside them.
const NO_PARAMETERS: &[&str] = &[
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
];

impl Source {
    /// Maps the names of a checkpoint.
    ///
    /// # Errors
    /// Where it is no GGUF of a known architecture.
    pub fn new(checkpoint: Checkpoint, config: &AutoConfig, model: &str) -> Result<Self> {
        let unknown = || Error::Unsupported {
            model: model.to_string(),
            model_type: config.model_type.clone(),
            supported: crate::registry::MODEL_TYPES.to_vec(),
        };
        let metadata = checkpoint.gguf().ok_or_else(unknown)?;
        let meta = Meta::new(metadata, &checkpoint, model)?;
        let arch = meta.arch().ok_or_else(unknown)?;
        let heads = meta.heads();
        let names = checkpoint
            .tensors()
            .map(|info| info.name.as_str())
            .filter(|name| !NO_PARAMETERS.contains(name) && !name.ends_with(".attn_v_b.weight"))
            .flat_map(|name| stored_as(arch, &meta, name))
            .collect();
        Ok(Self {
            checkpoint,
            heads,
            names,
        })
    }

    /// The names of all tensors in the order of `stored`, GGUF's names.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn names_in_order<'a>(&self, stored: impl Iterator<Item = &'a str>) -> Vec<String> {
        let mut by_stored: HashMap<&str, Vec<(usize, &String)>> = HashMap::new();
        for (name, place) in &self.names {
            let first = place.rows.as_ref().map_or(0, |rows| rows.start);
            by_stored.entry(&place.name).or_default().push((first, name));
        }
        let mut all = Vec::with_capacity(self.names.len());
        for name in stored {
            let mut names = by_stored.remove(name).unwrap_or_default();
            names.sort();
            all.extend(names.into_iter().map(|(_, name)| name.clone()));
        }
        all
    }

    fn joined_latent(&self, keys: &str) -> oxiformers_hub::Result<TensorView> {
        let view = self.checkpoint.tensor(keys)?;
        let values = self.checkpoint.tensor(&keys.replace("attn_k_b", "attn_v_b"))?;
        Ok(join_latent(&view, &values).unwrap_or(view))
    }
}

/// The tensors that are stored as `name`, by their Hugging Face names. One that no table knows keeps its name, and
/// is reported as left over.
fn stored_as(arch: &Arch, meta: &Meta, name: &str) -> Vec<(String, Stored)> {
    let stored = |part: &str, rows| Stored {
        name: name.to_string(),
        rows,
        change: change(arch, part),
    };
    if let Some(found) = hugging_face_name(arch, name) {
        return vec![(found, stored(name, None))];
    }
    // Some files hold queries, keys and values stacked where the checkpoint has them apart.
    let (heads, kv_heads) = meta.heads();
    let dim = meta.head_dim() as usize;
    let mut end = 0usize;
    let parts = [("attn_q", heads), ("attn_k", kv_heads), ("attn_v", kv_heads)].map(|(part, heads)| {
        let part = name.replace("attn_qkv", part);
        let start = end;
        end = end.saturating_add(heads.saturating_mul(dim));
        Some((hugging_face_name(arch, &part)?, stored(&part, Some(start..end))))
    });
    match parts {
        [Some(q), Some(k), Some(v)] if name.contains("attn_qkv") => vec![q, k, v],
        _ => vec![(name.to_string(), stored(name, None))],
    }
}

fn hugging_face_name(arch: &Arch, name: &str) -> Option<String> {
    match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((index, part)) => {
            let place = format!("{}.{index}", arch.layers);
            let mut tables = arch.block.iter();
            tables.find_map(|table| Some(format!("{place}.{}", find(table, part)?)))
        }
        None => find(arch.outer, name),
    }
}

fn find(table: &[Name], name: &str) -> Option<String> {
    if let Some((_, whole)) = table.iter().find(|(gguf, _)| *gguf == name) {
        return Some(whole.to_string());
    }
    let (stem, suffix) = name.rsplit_once('.')?;
    let (_, stem) = table.iter().find(|(gguf, _)| *gguf == stem)?;
    Some(format!("{stem}.{suffix}"))
}

fn change(arch: &Arch, name: &str) -> Change {
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let stem = stem.rsplit_once('.').map_or(stem, |(_, part)| part);
    let fits = |pattern: &str| match pattern.strip_prefix('*') {
        Some(end) => stem.ends_with(end),
        None => stem == pattern,
    };
    let found = arch.changes.iter().find(|(pattern, _)| fits(pattern));
    found.map_or(Change::None, |(_, change)| *change)
}

impl TensorSource for Source {
    fn origin(&self) -> String {
        self.checkpoint.name().to_string()
    }

    fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    fn contains(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    fn rows_are_outputs(&self) -> bool {
        true
    }

    fn tensor(&self, name: &str) -> oxiformers_hub::Result<TensorView> {
        let Some(stored) = self.names.get(name) else {
            return self.checkpoint.tensor(name);
        };
        if stored.change == Change::LatentApart {
            return self.joined_latent(&stored.name);
        }
        let (heads, kv_heads) = self.heads;
        let mut view = self.checkpoint.tensor(&stored.name)?;
        if let Some(rows) = &stored.rows {
            view = cut(view, rows.clone());
        }
        Ok(match stored.change {
            Change::HalvesToPairs(Heads::Query) => pairs_to_halves(view, heads),
            Change::HalvesToPairs(Heads::KeyValue) => pairs_to_halves(view, kv_heads),
            Change::GroupsToStack => stack_to_groups(view, heads, kv_heads),
            Change::PlusOne => minus_one(view),
            Change::LatentApart | Change::None => view,
        })
    }
}

/// Some rows of a matrix or vector; what does not have them stays, and the shape check of the loader finds it.
fn cut(view: TensorView, rows: Range<usize>) -> TensorView {
    let count = view.shape.first().copied().unwrap_or(0);
    if rows.end > count || rows.is_empty() {
        return view;
    }
    let row_bytes = view.data.len() / count;
    let mut shape = view.shape;
    shape[0] = rows.len();
    TensorView {
        data: view.data.slice(rows.start * row_bytes..rows.end * row_bytes),
        shape,
        ..view
    }
}

/// The rows of `view` in another order; `order` must name rows that it has.
fn reordered(view: TensorView, order: impl Iterator<Item = usize>) -> TensorView {
    let rows = view.shape.first().copied().unwrap_or(0).max(1);
    let row_bytes = view.data.len() / rows;
    let mut data = BytesMut::with_capacity(view.data.len());
    for row in order {
        data.extend_from_slice(&view.data[row * row_bytes..(row + 1) * row_bytes]);
    }
    TensorView {
        data: data.freeze(),
        ..view
    }
}

/// Undoes [`Change::HalvesToPairs`]: row `2i + j` of a head goes back to row `j · half + i`. Rows that are no such
/// heads stay, and the shape check of the loader finds them.
fn pairs_to_halves(view: TensorView, heads: usize) -> TensorView {
    let rows = view.shape.first().copied().unwrap_or(0);
    if heads == 0 || heads > rows || !rows.is_multiple_of(2 * heads) {
        return view;
    }
    let half = rows / heads / 2;
    let head = move |head: usize| (0..2).flat_map(move |j| (0..half).map(move |i| 2 * (head * half + i) + j));
    reordered(view, (0..heads).flat_map(head))
}

/// Undoes [`Change::GroupsToStack`]. Rows that are no such heads stay.
fn stack_to_groups(view: TensorView, heads: usize, kv_heads: usize) -> TensorView {
    let rows = view.shape.first().copied().unwrap_or(0);
    let all = heads.saturating_add(kv_heads.saturating_mul(2));
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || rows == 0 || !rows.is_multiple_of(all) {
        return view;
    }
    let (dim, each) = (rows / all, heads / kv_heads);
    let group = move |group: usize| {
        let queries = group * each..(group + 1) * each;
        queries.chain([heads + group, heads + kv_heads + group])
    };
    let order = (0..kv_heads)
        .flat_map(group)
        .flat_map(move |head| head * dim..(head + 1) * dim);
    reordered(view, order)
}

/// Undoes [`Change::PlusOne`]; such tensors are norms, which GGUF stores as f32.
fn minus_one(view: TensorView) -> TensorView {
    match to_f32(&view) {
        Ok(values) => f32_view(view.shape, values.iter().map(|v| v - 1.0)),
        Err(_) => view,
    }
}

/// Undoes [`Change::LatentApart`]: `[heads * (key width + value width), latent]`. `None` where the shapes do not
/// fit each other.
fn join_latent(keys: &TensorView, values: &TensorView) -> Option<TensorView> {
    let [heads, latent, key_width] = <[usize; 3]>::try_from(keys.shape.as_slice()).ok()?;
    let [value_heads, value_width, value_latent] = <[usize; 3]>::try_from(values.shape.as_slice()).ok()?;
    if (heads, latent) != (value_heads, value_latent) || heads * latent * key_width * value_width == 0 {
        return None;
    }
    let (keys, values) = (to_f32(keys).ok()?, to_f32(values).ok()?);
    let both = keys
        .chunks_exact(latent * key_width)
        .zip(values.chunks_exact(value_width * latent));
    let joined = both.flat_map(|(key, value)| {
        let columns = (0..key_width).flat_map(move |i| key.iter().skip(i).step_by(key_width));
        columns.chain(value).copied()
    });
    Some(f32_view(vec![heads * (key_width + value_width), latent], joined))
}

fn f32_view(shape: Vec<usize>, values: impl Iterator<Item = f32>) -> TensorView {
    TensorView {
        dtype: DType::F32,
        shape,
        data: Bytes::from(values.flat_map(f32::to_le_bytes).collect::<Vec<u8>>()),
    }
}
