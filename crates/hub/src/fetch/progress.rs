use std::collections::HashMap;
use std::sync::Mutex;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// What happens during a fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Another process is fetching this file: waiting for it.
    Waiting {
        /// Name of the file.
        file: &'a str,
    },
    /// A transfer begins, or goes on where an earlier one ended.
    Start {
        /// Name of the file.
        file: &'a str,
        /// Bytes that are there already.
        at: u64,
        /// Bytes of the whole file, if the server said.
        total: Option<u64>,
    },
    /// More has come.
    Advance {
        /// Name of the file.
        file: &'a str,
        /// Bytes that are there now.
        at: u64,
    },
    /// The file is complete and verified.
    Done {
        /// Name of the file.
        file: &'a str,
    },
    /// One line that a person should read.
    Notice(&'a str),
}

/// Who is told how far a fetch is. Closures over an [`Event`] are one; so is [`Bars`].
pub trait Progress: Send + Sync {
    /// Something has happened.
    fn event(&self, event: Event<'_>);
}

impl<F: Fn(Event<'_>) + Send + Sync> Progress for F {
    fn event(&self, event: Event<'_>) {
        self(event);
    }
}

/// Says nothing: the default of the library.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _: Event<'_>) {}
}

/// Progress bars on the terminal's standard error; nothing where that is not a terminal.
#[derive(Debug, Default)]
pub struct Bars {
    all: MultiProgress,
    bars: Mutex<HashMap<String, ProgressBar>>,
}

impl Bars {
    /// No bars yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn bar(&self, file: &str) -> ProgressBar {
        let mut bars = self
            .bars
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        bars.entry(file.to_owned())
            .or_insert_with(|| {
                let bar = self.all.add(ProgressBar::no_length());
                bar.set_message(file.to_owned());
                bar
            })
            .clone()
    }
}

impl Progress for Bars {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Waiting { file } => self
                .bar(file)
                .set_message(format!("{file} (another process is fetching it)")),
            Event::Start { file, at, total } => {
                let bar = self.bar(file);
                let template = match total {
                    Some(total) => {
                        bar.set_length(total);
                        "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}"
                    }
                    None => "{msg} {spinner} {bytes} {bytes_per_sec}",
                };
                // The templates are constant: a failure would only cost the style.
                if let Ok(style) = ProgressStyle::with_template(template) {
                    bar.set_style(style);
                }
                bar.set_message(file.to_owned());
                bar.set_position(at);
                bar.reset_eta();
            }
            Event::Advance { file, at } => self.bar(file).set_position(at),
            Event::Done { file } => {
                self.bar(file).finish_and_clear();
                self.bars
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .remove(file);
            }
            Event::Notice(text) => {
                self.all.suspend(|| eprintln!("{text}"));
            }
        }
    }
}
