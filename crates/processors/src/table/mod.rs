//! Tables and questions about them, as TAPAS reads them (Herzig et al., 2020): the cells row by row behind the question,
//! and for each token its column and row, its rank among the numbers of the column, and how it compares with the
//! numbers of the question.

mod json;
mod numbers;

use std::collections::{BTreeMap, HashMap};

use numbers::{Value, column_values, common, values_of};

use crate::tokenizer::TokenizerConfig;
use crate::{Error, Result, Tokenizer};

/// A table of texts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table of the names of its columns and of its rows.
    ///
    /// # Errors
    /// [`Error::Table`] when there are no columns, or a row has more or fewer cells than there are.
    pub fn new(header: Vec<String>, rows: Vec<Vec<String>>) -> Result<Self> {
        let width = header.len();
        if width == 0 {
            return Err(Error::Table("it has no columns".to_owned()));
        }
        if let Some((at, row)) = rows.iter().enumerate().find(|(_, row)| row.len() != width) {
            let message = format!("row {at} has {} cells, but there are {width} columns", row.len());
            return Err(Error::Table(message));
        }
        Ok(Self { header, rows })
    }

    /// Names of the columns.
    pub fn header(&self) -> &[String] {
        &self.header
    }

    /// The rows, each with as many cells as there are columns.
    pub fn rows(&self) -> &[Vec<String>] {
        &self.rows
    }
}

/// A question and a table as a model reads them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableEncoding {
    /// Token ids: `[CLS] question [SEP] table`.
    pub input_ids: Vec<u32>,
    /// Of each token: 1 in the table, else 0; its column, counted from 1; its row, counted from 1, 0 in the header;
    /// 1 if it was a part of the [answer to the question before](Self::follow), else 0; the rank of its
    /// cell among the numbers or dates of its column, from 1 up, and from the other end, 0 for other cells; and
    /// 1 for equal + 2 for less + 4 for more, where a number or date of the question compares so with the cell.
    pub token_type_ids: Vec<[u32; 7]>,
    /// Whether words or rows of the table were left out.
    pub is_truncated: bool,
}

/// Which of the types says whether a token was a part of the answer before.
const PREVIOUS: usize = 3;

impl TableEncoding {
    /// Makes the question one that follows another, to which these cells were the answer.
    pub fn follow(&mut self, cells: &[(usize, usize)]) {
        for types in &mut self.token_type_ids {
            let [segment, column, row, ..] = *types;
            let place = (row as usize)
                .checked_sub(1)
                .zip((column as usize).checked_sub(1));
            types[PREVIOUS] = u32::from(segment == 1 && place.is_some_and(|place| cells.contains(&place)));
        }
    }

    /// The cells, as rows and columns counted from 0, whose tokens have a mean probability above `threshold` (Python
    /// has 0.5). `logits` are those of the tokens, as a model for questions about tables gives them.
    pub fn answer(&self, logits: &[f32], threshold: f64) -> Vec<(usize, usize)> {
        let mut cells: BTreeMap<(u32, u32), (f64, usize)> = BTreeMap::new();
        for ([segment, column, row, ..], logit) in self.token_type_ids.iter().zip(logits) {
            if *segment == 1 && *column > 0 && *row > 0 {
                let (sum, count) = cells.entry((row - 1, column - 1)).or_default();
                *sum += 1.0 / (1.0 + f64::from(-logit.max(-88.7)).exp());
                *count += 1;
            }
        }
        cells
            .into_iter()
            .filter(|(_, (sum, count))| sum / *count as f64 > threshold)
            .map(|((row, column), _)| (row as usize, column as usize))
            .collect()
    }
}

/// A token of the table: its id, column and row as the model counts them, and at which token of the cell its word
/// begins.
struct CellToken {
    id: u32,
    column: u32,
    row: u32,
    word: usize,
}

/// Settings of `tokenizer_config.json`.
struct Limits {
    columns: usize,
    rows: usize,
    /// Most tokens of a cell; none for as many as fit.
    cell: Option<usize>,
}

impl Limits {
    fn of(config: &TokenizerConfig) -> Self {
        let number = |name| {
            let number = config.setting(name).and_then(serde_json::Value::as_u64);
            number.and_then(|number| usize::try_from(number).ok())
        };
        let most = config.model_max_length.unwrap_or(512);
        Self {
            columns: number("max_column_id").unwrap_or(most),
            rows: number("max_row_id").unwrap_or(most),
            cell: number("cell_trim_length"),
        }
    }
}

impl Tokenizer {
    /// A question about a table for TAPAS. With a `max_length` (Python's default is the model's), cells lose their
    /// last words and then the table its last rows until all fits.
    ///
    /// # Errors
    /// [`Error::Table`] when the table has too many columns or rows, or the question and the header alone are
    /// longer than `max_length`; [`Error::NoToken`] when the tokenizer is not made for this.
    pub fn encode_table(
        &self,
        question: &str,
        table: &Table,
        max_length: Option<usize>,
    ) -> Result<TableEncoding> {
        let limits = Limits::of(self.config());
        let (mut rows, columns) = (table.rows.len(), table.header.len());
        let all_rows = rows;
        if columns >= limits.columns {
            let message = format!("it has {columns} columns, and fewer than {} fit", limits.columns);
            return Err(Error::Table(message));
        }
        if rows >= limits.rows {
            if max_length.is_none() {
                let message = format!("it has {rows} rows, and fewer than {} fit", limits.rows);
                return Err(Error::Table(message));
            }
            rows = limits.rows.saturating_sub(1);
        }
        let cls = self.cls_token_id().ok_or(Error::NoToken { role: "cls_token" })?;
        let sep = self.sep_token_id().ok_or(Error::NoToken { role: "sep_token" })?;
        let question_ids = self.question(question)?;
        let mut cells = self.cells(table)?;
        let all_cells = cells.len();
        if let Some(length) = max_length {
            let budget = length.saturating_sub(question_ids.len() + 2);
            let words = fit(&cells, &mut rows, budget, limits.cell);
            cells.retain(|token| token.row as usize <= rows && token.word < words);
        }
        let before = [&[cls][..], &question_ids, &[sep]].concat();
        let input_ids: Vec<u32> = before
            .iter()
            .copied()
            .chain(cells.iter().map(|token| token.id))
            .collect();
        if let Some(length) = max_length.filter(|length| input_ids.len() > *length) {
            let message = format!(
                "the question and the header have {} tokens, which is more than max_length, {length}",
                input_ids.len()
            );
            return Err(Error::Table(message));
        }
        let features = Features::of(question, table);
        let of_cell = |token: &CellToken| {
            let [rank, inverse, relations] = features.of_cell(token.column, token.row);
            [1, token.column, token.row, 0, rank, inverse, relations]
        };
        let of_question = before.iter().map(|_| [0; 7]);
        Ok(TableEncoding {
            token_type_ids: of_question.chain(cells.iter().map(of_cell)).collect(),
            is_truncated: rows < all_rows || cells.len() < all_cells,
            input_ids,
        })
    }

    fn question(&self, question: &str) -> Result<Vec<u32>> {
        let bound = |name| self.config().setting(name).and_then(serde_json::Value::as_u64);
        let ids = self.cell(question)?;
        let length = ids.len() as u64;
        let too_long = bound("max_question_length").is_some_and(|most| length > most);
        let too_short = bound("min_question_length").is_some_and(|least| length < least);
        match too_long || too_short {
            true => Err(Error::Table(format!(
                "the question has {length} tokens, which is outside of min_question_length and \
                 max_question_length in tokenizer_config.json"
            ))),
            false => Ok(ids),
        }
    }

    /// The tokens of a cell; one for cells that say nothing.
    fn cell(&self, text: &str) -> Result<Vec<u32>> {
        const EMPTY: &str = "[EMPTY]";
        if text.is_empty() || !says_nothing(text) {
            return self.encode(text, false);
        }
        let empty = self.token_to_id(EMPTY).ok_or(Error::NoToken { role: EMPTY })?;
        Ok(vec![empty])
    }

    /// The tokens of the table, row by row.
    fn cells(&self, table: &Table) -> Result<Vec<CellToken>> {
        let mut tokens = Vec::new();
        let strip = self.config().flag("strip_column_names").unwrap_or(false);
        for (row, cells) in std::iter::once(&table.header).chain(&table.rows).enumerate() {
            if strip && row == 0 {
                continue;
            }
            for (column, cell) in cells.iter().enumerate() {
                let mut word = 0;
                for (at, id) in self.cell(cell)?.into_iter().enumerate() {
                    if !self.id_to_token(id).is_some_and(|token| token.starts_with("##")) {
                        word = at;
                    }
                    tokens.push(CellToken {
                        id,
                        column: column as u32 + 1,
                        row: row as u32,
                        word,
                    });
                }
            }
        }
        Ok(tokens)
    }
}

/// Cells like `?` or `n/a`.
fn says_nothing(text: &str) -> bool {
    let text = text.to_lowercase();
    matches!(text.trim(), "n/a" | "nan") || !text.chars().any(char::is_alphanumeric)
}

/// How many rows fit into a budget of tokens, and how many tokens of each of their cells.
fn fit(cells: &[CellToken], rows: &mut usize, budget: usize, most: Option<usize>) -> usize {
    let mut longest = 0;
    let mut at = 0;
    let mut cell = None;
    for token in cells {
        at = if cell == Some((token.row, token.column)) {
            at + 1
        } else {
            1
        };
        cell = Some((token.row, token.column));
        longest = longest.max(at);
    }
    let longest = longest.min(most.unwrap_or(usize::MAX));
    // By row, how many tokens belong to words that begin at each place of a cell.
    let mut begins = vec![0usize; longest + 1];
    for token in cells.iter().filter(|token| token.row as usize <= *rows) {
        if let Some(count) = begins.get_mut(token.word) {
            *count += 1;
        }
    }
    loop {
        let mut cost = 0;
        let fitting = begins.iter().take_while(|count| {
            cost += **count;
            cost <= budget
        });
        let fitting = fitting.count().min(longest);
        // Either all words have to be cut alike, or none.
        if fitting == longest || most.is_none() && fitting > 0 {
            return fitting.max(1);
        }
        for token in cells.iter().filter(|token| token.row as usize == *rows) {
            if let Some(count) = begins.get_mut(token.word) {
                *count -= 1;
            }
        }
        *rows = rows.saturating_sub(1);
        if *rows == 0 {
            return 1;
        }
    }
}

/// What the numbers and dates of a table and of a question say.
#[derive(Default)]
struct Features {
    /// By column and row, both counted from 0: rank, rank from the other end, relations.
    cells: HashMap<(usize, usize), [u32; 3]>,
}

impl Features {
    fn of(question: &str, table: &Table) -> Self {
        let asked = values_of(question);
        let mut features = Self::default();
        for column in 0..table.header.len() {
            let texts = table
                .rows
                .iter()
                .map(|row| row.get(column).map_or("", String::as_str));
            let values = column_values(texts);
            let only = || values.iter().map(|(_, value)| value);
            if let Some(key) = common(only()) {
                let mut keys: Vec<Vec<f64>> = only().map(|value| value.key(&key)).collect();
                keys.sort_by(|one, other| one.partial_cmp(other).unwrap_or(std::cmp::Ordering::Equal));
                keys.dedup();
                for (row, value) in &values {
                    let own = value.key(&key);
                    let rank = keys.iter().position(|other| *other == own).unwrap_or(0);
                    let cell = features.cells.entry((column, *row)).or_default();
                    cell[0] = rank as u32 + 1;
                    cell[1] = (keys.len() - rank) as u32;
                }
            }
            for value in &asked {
                features.compare(value, column, &values);
            }
        }
        features
    }

    /// Notes how a number of the question compares with those of a column.
    fn compare(&mut self, asked: &Value, column: usize, values: &[(usize, Value)]) {
        use std::cmp::Ordering::{Equal, Greater, Less};
        let all = values.iter().map(|(_, value)| value).chain([asked]);
        let Some(key) = common(all) else { return };
        for (row, value) in values {
            let relation = match asked.key(&key).partial_cmp(&value.key(&key)) {
                Some(Equal) => 1,
                Some(Less) => 2,
                Some(Greater) => 4,
                None => 0,
            };
            self.cells.entry((column, *row)).or_default()[2] |= relation;
        }
    }

    /// Of a cell, counted as the model does.
    fn of_cell(&self, column: u32, row: u32) -> [u32; 3] {
        let place = (column as usize)
            .checked_sub(1)
            .zip((row as usize).checked_sub(1));
        place
            .and_then(|place| self.cells.get(&place))
            .copied()
            .unwrap_or_default()
    }
}
