//! `table-question-answering`: which cells of a table answer a question, and what is to be done with them.

use std::collections::BTreeMap;
use std::fmt;

use oxiformers_hub::ModelFiles;
use oxiformers_models::AutoModelForTableQuestionAnswering;
use oxiformers_nn::{EncoderInputs, LoadOptions};
use oxiformers_processors::{Table, TableEncoding, Tokenizer};
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::Value;

use crate::texts::{TOKENS_AT_ONCE, Texts, in_batches, largest, rows_of};
use crate::{Error, OneOrMany, Pipeline, Result, Task};

/// Python's threshold for the probability of a cell.
const THRESHOLD: f64 = 0.5;

/// Answers questions about tables by choosing cells, and where the model was trained to, by what to do with them.
///
/// ```no_run
/// use oxiformers::tasks::TableQuestion;
/// use oxiformers::{FromPretrained, Pipeline, Table, TableQuestionAnswering, block_on};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let ask = TableQuestionAnswering::from_pretrained("google/tapas-base-finetuned-wtq")?;
/// let header = ["Repository", "Stars"].map(String::from).to_vec();
/// let rows = [["Transformers", "36542"], ["Datasets", "4512"]];
/// let table = Table::new(header, rows.map(|row| row.map(String::from).to_vec()).to_vec())?;
/// let question = TableQuestion::new(table, "How many stars does the transformers repository have?");
/// println!("{}", block_on(ask.run(&[question], &Default::default(), 1))?[0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TableQuestionAnswering {
    /// The network.
    pub model: AutoModelForTableQuestionAnswering,
    texts: Texts,
    /// What can be done with cells, in the order of the model's logits; empty where nothing is.
    aggregators: Vec<String>,
    /// Which of them does nothing.
    no_aggregation: Option<usize>,
}

/// Options of [`TableQuestionAnswering`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TableQuestionAnsweringOptions {
    /// Whether each of an input's questions may refer to the answer to the one before, as those of SQA do.
    pub sequential: bool,
    /// What becomes of tables that are too long for the model.
    pub truncation: TableTruncation,
}

/// What becomes of a table with more tokens than the model was made for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TableTruncation {
    /// It is an error.
    #[default]
    Refuse,
    /// It loses its last rows: `true` or `drop_rows_to_fit` as JSON.
    DropRowsToFit,
    /// It is read whole, which models can whose positions count within cells: `false` or `do_not_truncate` as JSON.
    DoNotTruncate,
}

impl<'de> Deserialize<'de> for TableTruncation {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let given = Value::deserialize(deserializer)?;
        match (&given, given.as_str()) {
            (Value::Null, _) => Ok(Self::Refuse),
            (Value::Bool(true), _) | (_, Some("drop_rows_to_fit")) => Ok(Self::DropRowsToFit),
            (Value::Bool(false), _) | (_, Some("do_not_truncate")) => Ok(Self::DoNotTruncate),
            _ => Err(de::Error::custom(format!(
                "truncation: is {given}; it is true, false, \"drop_rows_to_fit\" or \"do_not_truncate\""
            ))),
        }
    }
}

/// A table and what is asked about it. As JSON an object with `table`, see [`Table::from_json`], and `query`, a text or a
/// list of texts.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct TableQuestion {
    /// The table.
    pub table: Table,
    /// The question, or questions, each of which is answered.
    pub query: OneOrMany<String>,
}

impl TableQuestion {
    /// A question about a table.
    pub fn new(table: Table, query: impl Into<String>) -> Self {
        Self {
            table,
            query: OneOrMany::One(query.into()),
        }
    }
}

/// The answer to a question about a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableAnswer {
    /// The cells, with commas between them, behind what is to be done with them: `SUM > 1, 2`.
    pub answer: String,
    /// Row and column of each cell, counted from 0; the header is no row.
    pub coordinates: Vec<(usize, usize)>,
    /// What stands in the cells.
    pub cells: Vec<String>,
    /// What is to be done with them, where the model was trained to say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aggregator: Option<String>,
}

/// A question as the model reads it.
struct Row {
    input: usize,
    encoding: TableEncoding,
}

/// What the model makes of a question: the cells, and which aggregator.
struct Choice {
    cells: Vec<(usize, usize)>,
    aggregator: Option<usize>,
}

impl Pipeline for TableQuestionAnswering {
    const TASK: Task = Task::TableQuestionAnswering;
    type Input = TableQuestion;
    type Options = TableQuestionAnsweringOptions;
    type Output = OneOrMany<TableAnswer>;

    fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let model = AutoModelForTableQuestionAnswering::from_files(files, options)?;
        let (aggregators, no_aggregation) =
            aggregators(&model.config.json).map_err(|message| Error::Unsuited {
                model: files.describe("config.json"),
                message,
            })?;
        Ok(Self {
            texts: Texts::from_files(files, &model.config)?,
            model,
            aggregators,
            no_aggregation,
        })
    }

    async fn run(
        &self,
        inputs: &[TableQuestion],
        options: &TableQuestionAnsweringOptions,
        batch_size: usize,
    ) -> Result<Vec<OneOrMany<TableAnswer>>> {
        let mut asked = Vec::with_capacity(inputs.len());
        for (index, input) in inputs.iter().enumerate() {
            asked.push(self.read(index, input, options.truncation)?);
        }
        self.say_cut(&asked);
        let mut answers: Vec<Vec<TableAnswer>> = inputs.iter().map(|_| Vec::new()).collect();
        if options.sequential {
            // The first questions about all tables, then the second ones, which know the answers.
            let mut asked: Vec<_> = asked.into_iter().map(Vec::into_iter).collect();
            let mut before: Vec<Vec<(usize, usize)>> = vec![Vec::new(); inputs.len()];
            loop {
                let mut rows: Vec<Row> = asked.iter_mut().filter_map(Iterator::next).collect();
                if rows.is_empty() {
                    break;
                }
                for row in &mut rows {
                    row.encoding.follow(&before[row.input]);
                }
                for (row, choice) in rows.iter().zip(self.choose(&rows, batch_size).await?) {
                    answers[row.input].push(self.answer(&inputs[row.input].table, &choice));
                    before[row.input] = choice.cells;
                }
            }
        } else {
            let rows: Vec<Row> = asked.into_iter().flatten().collect();
            for (row, choice) in rows.iter().zip(self.choose(&rows, batch_size).await?) {
                answers[row.input].push(self.answer(&inputs[row.input].table, &choice));
            }
        }
        Ok(answers.into_iter().map(OneOrMany::of).collect())
    }
}

impl TableQuestionAnswering {
    fn tokenizer(&self) -> &Tokenizer {
        &self.texts.tokenizer
    }

    /// The rows of an input's questions.
    fn read(&self, index: usize, input: &TableQuestion, truncation: TableTruncation) -> Result<Vec<Row>> {
        let fail = |message: &str| Err(Error::input(index, message));
        if input.table.rows().is_empty() {
            return fail("`table` is empty");
        }
        match &input.query {
            OneOrMany::One(query) if query.is_empty() => return fail("`query` is empty"),
            OneOrMany::Many(queries) if queries.is_empty() => return fail("`query` is an empty list"),
            _ => {}
        }
        let length = match truncation {
            TableTruncation::DropRowsToFit => Some(self.texts.window.unwrap_or(usize::MAX)),
            _ => None,
        };
        let read = |query: &String| {
            let encoding = self.tokenizer().encode_table(query, &input.table, length);
            let encoding = encoding.map_err(|error| Error::input(index, error.to_string()))?;
            self.check(index, &encoding, truncation)?;
            Ok(Row {
                input: index,
                encoding,
            })
        };
        input.query.as_slice().iter().map(read).collect()
    }

    /// An error where the model cannot read this, or would have to be asked to.
    fn check(&self, index: usize, row: &TableEncoding, truncation: TableTruncation) -> Result<()> {
        let length = row.input_ids.len();
        if truncation == TableTruncation::Refuse
            && let Some(window) = self.texts.window.filter(|window| length > *window)
        {
            let message = format!(
                "has {length} tokens with its table, and {} is made for {window}; shorten it, or have the table cut with \
                 the option `truncation`: true",
                self.texts.name
            );
            return Err(Error::input(index, message));
        }
        let what_to_do = "shorten the table, or have it cut with the option `truncation`: true";
        self.texts.check_length(index, length, what_to_do)?;
        // Each type has a table of embeddings, and a long table may have more rows than there are.
        let names = ["segment", "column", "row", "", "rank", "rank", "relation"];
        let sizes = self.model.type_vocab_sizes();
        for ((at, name), size) in names.into_iter().enumerate().zip(sizes) {
            let most = row.token_type_ids.iter().map(|types| types[at]).max();
            if let Some(most) = most.filter(|most| *most as usize >= *size) {
                let message = format!(
                    "has the {name} {most} in its table, and {} knows those below {size}; shorten the table",
                    self.texts.name
                );
                return Err(Error::input(index, message));
            }
        }
        Ok(())
    }

    fn say_cut(&self, asked: &[Vec<Row>]) {
        let cut = |rows: &&Vec<Row>| rows.iter().any(|row| row.encoding.is_truncated);
        let shortened = asked.iter().filter(cut).count();
        if shortened > 0 {
            let (of, length) = (asked.len(), self.texts.window.unwrap_or_default());
            tracing::warn!("{shortened} of {of} tables were cut to {length} tokens");
        }
    }

    /// What the model chooses for each row.
    async fn choose(&self, rows: &[Row], batch_size: usize) -> Result<Vec<Choice>> {
        let forward = async |batch: &[usize]| {
            let rows = || batch.iter().map(|row| &rows[*row].encoding);
            let ids: Vec<Vec<u32>> = rows().map(|row| row.input_ids.clone()).collect();
            let pad = self.tokenizer().pad_token_id().unwrap_or(0);
            let mut inputs = EncoderInputs::padded(&ids, pad);
            let width = inputs.dims()[1];
            let types = |row: &TableEncoding| {
                let mut types = row.token_type_ids.clone();
                types.resize(width, Default::default());
                types
            };
            inputs.table_ids = rows().map(types).collect();
            let output = self.model.forward(&inputs)?;
            let logits = rows_of(output.logits).await?;
            let aggregators = match output.logits_aggregation {
                Some(logits) if !self.aggregators.is_empty() => {
                    let best = |logits: &Vec<f32>| largest(logits).map(|(best, _)| best);
                    rows_of(logits).await?.iter().map(best).collect()
                }
                _ => vec![None; batch.len()],
            };
            let choice = |((row, logits), aggregator): ((&TableEncoding, Vec<f32>), Option<usize>)| Choice {
                cells: row.answer(&logits, THRESHOLD),
                aggregator,
            };
            Ok(rows().zip(logits).zip(aggregators).map(choice).collect())
        };
        let shape = |row: &Row| self.texts.shape(row.encoding.input_ids.len());
        in_batches(rows, batch_size, TOKENS_AT_ONCE, shape, forward).await
    }

    fn answer(&self, table: &Table, choice: &Choice) -> TableAnswer {
        let cells: Vec<String> = (choice.cells.iter())
            .filter_map(|(row, column)| table.rows().get(*row)?.get(*column).cloned())
            .collect();
        let named = |aggregator: usize| self.aggregators.get(aggregator).map_or("", String::as_str);
        let prefix = match choice.aggregator {
            Some(aggregator) if self.no_aggregation != Some(aggregator) => {
                format!("{} > ", named(aggregator))
            }
            _ => String::new(),
        };
        TableAnswer {
            answer: prefix + &cells.join(", "),
            coordinates: choice.cells.clone(),
            cells,
            aggregator: (choice.aggregator.map(named))
                .filter(|name| !name.is_empty())
                .map(str::to_string),
        }
    }
}

/// What the configuration calls the things that can be done with cells, and which of them is nothing.
fn aggregators(config: &Value) -> Result<(Vec<String>, Option<usize>), String> {
    let field = |name: &str| config.get(name).filter(|value| !value.is_null());
    let number = |name: &str| match field(name) {
        None => Ok(None),
        Some(value) => match value.as_u64().and_then(|number| usize::try_from(number).ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(format!("`{name}` is {value}, which is no number")),
        },
    };
    let no_aggregation = number("no_aggregation_label_index")?;
    let count = number("num_aggregation_labels")?.unwrap_or(0);
    let Some(labels) = field("aggregation_labels").filter(|_| count > 0) else {
        return Ok((Vec::new(), no_aggregation));
    };
    let labels = BTreeMap::<usize, String>::deserialize(labels);
    let mut labels = labels.map_err(|error| format!("`aggregation_labels`: {error}"))?;
    if labels.is_empty() {
        return Ok((Vec::new(), no_aggregation));
    }
    let name = |id| {
        let missing = || format!("`aggregation_labels` has no {id}, but there are {count} of them");
        labels.remove(&id).ok_or_else(missing)
    };
    Ok(((0..count).map(name).collect::<Result<_, _>>()?, no_aggregation))
}

impl fmt::Display for TableAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.answer)
    }
}
