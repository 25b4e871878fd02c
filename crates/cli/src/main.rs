//! The oxiformers command.

mod adapter;
mod args;
mod bench;
mod chat;
mod env;
mod generate;
mod hub;
mod inspect;
mod interrupt;
mod job;
mod perplexity;
mod pipeline;
mod quantize;
mod records;
mod session;
mod tokenizer;
mod train;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, Command};

/// Keeps what a step frees for the next one; the system's would give large pieces back and fetch them anew.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Lets the allocator keep freed pages for ten seconds instead of ten milliseconds: between two steps of training, the
/// system would take them away and clear them anew.
fn keep_freed_pages() {
    // `mi_option_purge_delay` of mimalloc.h, which the bindings do not name.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: no other thread runs yet.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, 10_000) };
}

fn main() -> ExitCode {
    keep_freed_pages();
    let cli = Cli::parse();
    // What hf_hub logs is said in our own words where it matters.
    let level = tracing_subscriber::EnvFilter::try_from_env("OXIFORMERS_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,hf_hub=off"));
    tracing_subscriber::fmt()
        .with_env_filter(level)
        .with_writer(std::io::stderr)
        .without_time()
        .init();
    interrupt::install();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough, as `head` does, is no failure.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", described(&error));
            ExitCode::FAILURE
        }
    }
}

/// What went wrong and why, but for what was said already: some errors tell their causes themselves.
fn described(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io =
        |cause: &(dyn std::error::Error + 'static)| cause.downcast_ref::<std::io::Error>().map(|e| e.kind());
    error
        .chain()
        .any(|cause| io(cause) == Some(std::io::ErrorKind::BrokenPipe))
}

fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Chat(args) => chat::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Pipeline(args) => pipeline::run(&args),
        Command::Perplexity(args) => perplexity::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Evaluate(args) => train::evaluate(&args),
        Command::Tokenizer(command) => tokenizer::run(&command),
        Command::Quantize(args) => quantize::run(&args),
        Command::Adapter(command) => adapter::run(&command),
        Command::Download(args) => hub::download(&args),
        Command::Cache(command) => hub::cache(&command),
        Command::Env(args) => env::run(&args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "oxiformers", &mut std::io::stdout());
            Ok(())
        }
    }
}
