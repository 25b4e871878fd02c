//! `oxiformers tokenizer train`: a tokenizer from a corpus.

use indicatif::{ProgressBar, ProgressStyle};
use oxiformers_data::tasks::text;
use oxiformers_data::tokenizer::TokenizerTraining;
use oxiformers_data::{Error, Format, Records, SampleBy, find};

use crate::args::{TokenizerCommand, TokenizerTrainArgs};
use crate::interrupt;

pub fn run(command: &TokenizerCommand) -> anyhow::Result<()> {
    match command {
        TokenizerCommand::Train(args) => train(args),
    }
}

fn train(args: &TokenizerTrainArgs) -> anyhow::Result<()> {
    let training = TokenizerTraining {
        min_frequency: args.min_frequency,
        lowercase: !args.cased,
        special_tokens: args.special_tokens.clone(),
        extra_ids: args.extra_ids,
        model_max_length: args.model_max_length,
        ..TokenizerTraining::new(args.algorithm.parse()?, args.vocab_size)
    };
    let format = args.format.as_deref().map(str::parse::<Format>).transpose()?;
    let files = find(&args.files, format)?;
    let bar = ProgressBar::new_spinner().with_style(
        ProgressStyle::with_template("{spinner} {pos} texts, {per_sec}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    interrupt::watch();
    let records = files.iter().flat_map(|file| match file.records(SampleBy::Line) {
        Ok(records) => records,
        Err(error) => Box::new(std::iter::once(Err(error))) as Records,
    });
    let texts = records.map(|record| {
        if interrupt::happened() {
            return Err(Error::Interrupted);
        }
        let record = record?;
        bar.inc(1);
        let found = text(&record.value, &args.text_column);
        found
            .map(str::to_owned)
            .map_err(|message| record.place.bad(message))
    });
    let trained = training.train(texts)?;
    interrupt::unwatch();
    bar.finish_and_clear();
    trained.save(&args.output)?;
    println!(
        "{}: {} tokens from {} texts",
        args.output.display(),
        trained.vocab_size,
        trained.texts
    );
    Ok(())
}
