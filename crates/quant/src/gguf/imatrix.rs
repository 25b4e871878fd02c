//! Importance matrices: how much the columns of matrices matter, which is how large what they are multiplied with is.
//!
//! Files are those that llama.cpp's `llama-imatrix` writes: a GGUF with two tensors of f32 for each matrix, `NAME.in_sum2`
//! `[experts, columns]`, the sums of squared inputs, and `NAME.counts` `[experts, 1]`, how many there were.

use std::collections::HashMap;

use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::Checkpoint;

use super::Error;
use crate::to_f32;

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

/// The mean squared input of every column, by the names of GGUF's tensors.
#[derive(Debug, Clone, Default)]
pub struct ImportanceMatrix {
    /// `[experts, columns]`.
    entries: HashMap<String, Vec<f32>>,
    origin: String,
    dataset: Option<String>,
    chunks: Option<u32>,
}

impl ImportanceMatrix {
    /// An empty one; `origin` is where it comes from, as written files say.
    pub fn new(origin: &str) -> Self {
        Self {
            origin: origin.to_string(),
            ..Self::default()
        }
    }

    /// Reads a file of llama.cpp's.
    ///
    /// # Errors
    /// What is no such file, sums without counts, or numbers that are none.
    pub fn open(files: &ModelFiles) -> Result<Self, Error> {
        let checkpoint = Checkpoint::open(files)?;
        let failed = |reason: &str| Error::Importance {
            origin: checkpoint.name().to_string(),
            reason: reason.to_string(),
        };
        let metadata = checkpoint
            .gguf()
            .filter(|metadata| metadata.get_str("general.type") == Some("imatrix"))
            .ok_or_else(|| {
                failed(
                    "is no GGUF of the type `imatrix`, such as `llama-imatrix --output-format gguf` writes",
                )
            })?;
        let mut all = Self {
            entries: HashMap::new(),
            origin: checkpoint.name().to_string(),
            dataset: metadata
                .get_strings("imatrix.datasets")
                .and_then(|all| all.first())
                .cloned(),
            chunks: metadata
                .get_u64("imatrix.chunk_count")
                .and_then(|count| u32::try_from(count).ok()),
        };
        for info in checkpoint.tensors() {
            let Some(name) = info.name.strip_suffix(SUMS) else {
                continue;
            };
            let values = |ending: &str| {
                let name = format!("{name}{ending}");
                let view = checkpoint.tensor(&name)?;
                to_f32(&view).map_err(|reason| failed(&format!("`{name}` {reason}")))
            };
            let (sums, counts) = (values(SUMS)?, values(COUNTS)?);
            let columns = info.shape.last().copied().unwrap_or(0);
            if counts.len().checked_mul(columns) != Some(sums.len()) {
                let counts = counts.len();
                return Err(failed(&format!(
                    "`{name}{SUMS}` has the shape {:?}, with {counts} counts",
                    info.shape
                )));
            }
            all.add(name, &sums, &counts)
                .map_err(|reason| failed(&format!("`{name}` {reason}")))?;
        }
        if all.entries.is_empty() {
            return Err(failed("holds nothing about any tensor"));
        }
        Ok(all)
    }

    /// Adds a matrix, or several of the same name: sums of squared inputs `[experts, columns]`, and how many inputs each
    /// had. One without inputs counts the same everywhere.
    ///
    /// # Errors
    /// Sums that are negative or no numbers.
    pub fn add(&mut self, name: &str, sums: &[f32], counts: &[f32]) -> Result<(), String> {
        if let Some(bad) = sums
            .iter()
            .chain(counts)
            .find(|value| !(**value >= 0.0 && value.is_finite()))
        {
            return Err(format!("has the sum or count {bad}"));
        }
        let columns = sums.len() / counts.len().max(1);
        let means = sums
            .chunks_exact(columns.max(1))
            .zip(counts)
            .flat_map(|(sums, count)| {
                let mean = move |sum: &f32| if *count > 0.0 { sum / count } else { 1.0 };
                sums.iter().map(mean)
            });
        let means: Vec<f32> = means.collect();
        self.entries.insert(name.to_string(), means);
        Ok(())
    }

    /// The importance of the columns of a tensor `[.., rows, columns]`, matrix for matrix, if anything is known of it.
    ///
    /// # Errors
    /// Where it is known of another shape.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Option<&[f32]>, Error> {
        let Some(entry) = self.entries.get(name) else {
            return Ok(None);
        };
        let wanted = match shape {
            [matrices @ .., _, columns] => matrices.iter().product::<usize>() * columns,
            _ => 0,
        };
        if entry.len() != wanted {
            return Err(Error::Importance {
                origin: self.origin.clone(),
                reason: format!(
                    "has {} values for `{name}`, whose shape {shape:?} asks for {wanted}; it was made with another model",
                    entry.len()
                ),
            });
        }
        Ok(Some(entry))
    }

    /// Number of tensors that it knows of.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it knows nothing.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Where it comes from.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The text that it was made with, if that is known.
    pub fn dataset(&self) -> Option<&str> {
        self.dataset.as_deref()
    }

    /// Pieces of text that it was made with, if that is known.
    pub fn chunks(&self) -> Option<u32> {
        self.chunks
    }

    /// The same, made with so many pieces of a text.
    #[must_use]
    pub fn made_with(self, dataset: &str, chunks: usize) -> Self {
        Self {
            dataset: Some(dataset.to_string()),
            chunks: u32::try_from(chunks).ok(),
            ..self
        }
    }
}
