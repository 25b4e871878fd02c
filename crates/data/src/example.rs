//! What a model is trained on: token ids and what belongs to them.

use std::borrow::Cow;

/// The values of one column of an example.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Token ids, classes, places, masks.
    Ints(Vec<i32>),
    /// Numbers to be predicted.
    Floats(Vec<f32>),
}

impl Values {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::Ints(values) => values.len(),
            Self::Floats(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One example: named columns, as Transformers names the arguments of models (`input_ids`, `labels`, …).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Example {
    columns: Vec<(Cow<'static, str>, Values)>,
}

impl Example {
    /// Adds a column of whole numbers.
    #[must_use]
    pub fn with(self, name: impl Into<Cow<'static, str>>, values: Vec<i32>) -> Self {
        self.with_values(name, Values::Ints(values))
    }

    /// Adds a column of token ids.
    #[must_use]
    pub fn with_ids(self, name: impl Into<Cow<'static, str>>, ids: &[u32]) -> Self {
        self.with(name, ids.iter().map(|id| *id as i32).collect())
    }

    /// Adds a column.
    #[must_use]
    pub fn with_values(mut self, name: impl Into<Cow<'static, str>>, values: Values) -> Self {
        self.columns.push((name.into(), values));
        self
    }

    /// A column of whole numbers.
    pub fn ints(&self, name: &str) -> Option<&[i32]> {
        match self.column(name)? {
            Values::Ints(values) => Some(values),
            Values::Floats(_) => None,
        }
    }

    /// A column of numbers.
    pub fn floats(&self, name: &str) -> Option<&[f32]> {
        match self.column(name)? {
            Values::Floats(values) => Some(values),
            Values::Ints(_) => None,
        }
    }

    /// Any column.
    pub fn column(&self, name: &str) -> Option<&Values> {
        let column = self.columns.iter().find(|(column, _)| column == name);
        column.map(|(_, values)| values)
    }

    /// All columns.
    pub fn columns(&self) -> impl Iterator<Item = (&str, &Values)> {
        self.columns.iter().map(|(name, values)| (name.as_ref(), values))
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.column("input_ids").map_or(0, Values::len)
    }
}
