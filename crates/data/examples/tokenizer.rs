//! Trains a tokenizer on files:
//!
//! ```sh
//! cargo run --release -p oxiformers-data --example tokenizer -- bpe 8192 out corpus.jsonl more/*.txt
//! ```

use std::path::Path;

use oxiformers_data::tasks::text;
use oxiformers_data::tokenizer::TokenizerTraining;
use oxiformers_data::{Error, Records, Result, SampleBy, find};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [algorithm, vocab_size, output, files @ ..] = arguments.as_slice() else {
        eprintln!("usage: tokenizer bpe|wordpiece|unigram VOCAB_SIZE FOLDER FILE…");
        std::process::exit(2);
    };
    let vocab_size = vocab_size.parse().map_err(|_| Error::Config {
        field: "vocab_size".to_string(),
        message: format!("is `{vocab_size}`, which is no number"),
    })?;
    let training = TokenizerTraining::new(algorithm.parse()?, vocab_size);
    let files = find(files, None)?;
    let records = files.iter().flat_map(|file| match file.records(SampleBy::Line) {
        Ok(records) => records,
        Err(error) => Box::new(std::iter::once(Err(error))) as Records,
    });
    let texts = records.map(|record| {
        let record = record?;
        let found = text(&record.value, "text");
        found
            .map(str::to_owned)
            .map_err(|message| record.place.bad(message))
    });
    let trained = training.train(texts)?;
    trained.save(Path::new(output))?;
    println!(
        "{output}: {} tokens from {} texts",
        trained.vocab_size, trained.texts
    );
    Ok(())
}
