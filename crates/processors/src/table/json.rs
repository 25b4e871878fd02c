//! Tables as JSON: the shapes that Python makes data frames of.

use indexmap::IndexMap;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::Table;
use crate::{Error, Result};

impl Table {
    /// A table as columns, `{"name": [cells…]}`, or as records, `[{"name": cell}…]`, where a cell that is missing is
    /// empty. Numbers and truth values become the text that JSON writes for them, null an empty one.
    ///
    /// # Errors
    /// [`Error::Table`] where it has another shape, columns of different lengths, or a cell that holds more than a
    /// value; the message names the column and the row.
    pub fn from_json(json: &Value) -> Result<Self> {
        match json {
            Value::Object(columns) => Self::from_columns(columns),
            Value::Array(records) => Self::from_records(records),
            _ => Err(Error::Table(SHAPES.to_owned())),
        }
    }

    fn from_columns(columns: &Map<String, Value>) -> Result<Self> {
        let mut read: Vec<Vec<String>> = Vec::with_capacity(columns.len());
        for (name, cells) in columns {
            let cells = cells
                .as_array()
                .ok_or_else(|| Error::Table(format!("the column {name:?} is no list of cells; {SHAPES}")))?;
            if let Some(first) = read.first()
                && first.len() != cells.len()
            {
                let message = format!(
                    "the column {name:?} has {} cells, but the first has {}",
                    cells.len(),
                    first.len()
                );
                return Err(Error::Table(message));
            }
            let text = |(row, cell)| text(cell, row, name);
            read.push(cells.iter().enumerate().map(text).collect::<Result<_>>()?);
        }
        let height = read.first().map_or(0, Vec::len);
        let mut read: Vec<_> = read.into_iter().map(Vec::into_iter).collect();
        let row = |_| read.iter_mut().filter_map(Iterator::next).collect();
        let rows = (0..height).map(row).collect();
        Self::new(columns.keys().cloned().collect(), rows)
    }

    fn from_records(records: &[Value]) -> Result<Self> {
        let mut columns: IndexMap<&str, usize> = IndexMap::new();
        let mut rows: Vec<Vec<String>> = Vec::with_capacity(records.len());
        for (row, record) in records.iter().enumerate() {
            let record = record
                .as_object()
                .ok_or_else(|| Error::Table(format!("row {row} is no object; {SHAPES}")))?;
            let mut cells = vec![String::new(); columns.len()];
            for (name, cell) in record {
                let next = columns.len();
                let column = *columns.entry(name).or_insert(next);
                if column == cells.len() {
                    cells.push(String::new());
                }
                if let Some(place) = cells.get_mut(column) {
                    *place = text(cell, row, name)?;
                }
            }
            rows.push(cells);
        }
        // Columns that only later records have. A name of its own for each record would make a table of their square.
        if rows.len().saturating_mul(columns.len()) > MOST_CELLS {
            let (rows, columns) = (rows.len(), columns.len());
            let message = format!("{rows} records with {columns} different names are no table");
            return Err(Error::Table(message));
        }
        rows.iter_mut()
            .for_each(|row| row.resize(columns.len(), String::new()));
        Self::new(columns.into_keys().map(str::to_owned).collect(), rows)
    }
}

/// Cells that a table of records may have: far more than any model reads.
const MOST_CELLS: usize = 1 << 24;

const SHAPES: &str =
    "a table is an object of columns, {\"name\": [cells…]}, or a list of records, [{\"name\": cell}…]";

/// What a cell says.
fn text(cell: &Value, row: usize, column: &str) -> Result<String> {
    match cell {
        Value::String(text) => Ok(text.clone()),
        Value::Null => Ok(String::new()),
        Value::Number(_) | Value::Bool(_) => Ok(cell.to_string()),
        Value::Array(_) | Value::Object(_) => Err(Error::Table(format!(
            "row {row} has more than a value in the column {column:?}"
        ))),
    }
}

impl<'de> Deserialize<'de> for Table {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        Self::from_json(&Value::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn columns_and_records_are_the_same_table() {
        let columns = json!({"City": ["Oslo", "Rome"], "People": [709000, null], "Sea": [true, false]});
        let records =
            json!([{"City": "Oslo", "People": 709000, "Sea": true}, {"City": "Rome", "Sea": false}]);
        let table = Table::from_json(&columns).unwrap();
        assert_eq!(Table::from_json(&records).unwrap(), table);
        assert_eq!(table.header(), ["City", "People", "Sea"]);
        assert_eq!(table.rows(), [["Oslo", "709000", "true"], ["Rome", "", "false"]]);
        let late = json!([{"a": "1"}, {"b": 2.5, "a": "3"}]);
        assert_eq!(Table::from_json(&late).unwrap().rows(), [["1", ""], ["3", "2.5"]]);
    }

    #[test]
    fn what_is_no_table_is_named() {
        for (json, message) in [
            (json!("text"), "a table is"),
            (json!({}), "no columns"),
            (json!([]), "no columns"),
            (json!({"a": "b"}), "\"a\" is no list"),
            (json!({"a": ["1"], "b": []}), "\"b\" has 0 cells"),
            (json!([["a"]]), "row 0 is no object"),
            (json!([{"a": 1}, {"a": [2]}]), "row 1"),
            (json!({"a": [{"b": 1}]}), "column \"a\""),
        ] {
            let error = Table::from_json(&json).unwrap_err().to_string();
            assert!(error.contains(message), "{json}: {error}");
        }
    }
}
