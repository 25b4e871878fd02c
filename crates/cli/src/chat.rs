//! `oxiformers chat`: talk to a model.

use std::io::{self, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use oxiformers::{Conversation, GenerationConfig, Message, block_on};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::args::ChatArgs;
use crate::{interrupt, session};

const HELP: &str = "\
/help               this list
/clear              forget the conversation
/system TEXT        tell the model about its part, and begin anew
/save FILE          write the conversation to a JSON file
/load FILE          go on with a conversation from a JSON file
/set NAME=VALUE     change a generation setting, such as temperature=0.2; /set alone lists them
/exit               leave (so does Ctrl-D)
Ctrl-C              stop the answer";

pub fn run(args: &ChatArgs) -> anyhow::Result<()> {
    let model = session::load(args.model.as_deref(), &args.run)?;
    if model.chat_template.is_none() {
        bail!(
            "{} has no chat template, so it cannot be talked to; it continues text: oxiformers generate",
            model.name
        );
    }
    let mut chat = Chat {
        config: args.sampling.apply(model.generation_config.clone())?,
        conversation: model.conversation(),
        system: args.system.clone(),
        stats: args.stats,
    };
    chat.begin();
    if io::stdin().is_terminal() {
        eprintln!(
            "{}\n/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.",
            model.name
        );
        return chat.interact();
    }
    let mut question = String::new();
    io::stdin()
        .read_to_string(&mut question)
        .context("standard input")?;
    if question.trim().is_empty() {
        bail!("there is nothing on standard input to answer");
    }
    chat.answer(question.trim())
}

struct Chat<'a> {
    config: GenerationConfig,
    conversation: Conversation<'a>,
    system: Option<String>,
    stats: bool,
}

impl Chat<'_> {
    fn begin(&mut self) {
        self.conversation.messages = self
            .system
            .iter()
            .map(|text| Message::system(text.as_str()))
            .collect();
    }

    fn interact(&mut self) -> anyhow::Result<()> {
        let mut editor = DefaultEditor::new()?;
        let history = history_file();
        if let Some(path) = &history {
            // There is none the first time.
            let _ = editor.load_history(path);
        }
        loop {
            let line = match editor.readline("> ") {
                Ok(line) => line,
                Err(ReadlineError::Interrupted) => continue,
                Err(ReadlineError::Eof) => break,
                Err(error) => return Err(error.into()),
            };
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            let _ = editor.add_history_entry(line);
            let done = match line.strip_prefix('/') {
                Some(command) => self.command(command),
                None => self.answer(line).map(|()| ControlFlow::Continue(())),
            };
            match done {
                Ok(ControlFlow::Break(())) => break,
                Ok(ControlFlow::Continue(())) => {}
                // A conversation goes on after what went wrong with one message.
                Err(error) => eprintln!("error: {error:#}"),
            }
        }
        if let Some(path) = history {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
            }
            editor
                .save_history(&path)
                .with_context(|| path.display().to_string())?;
        }
        Ok(())
    }

    fn command(&mut self, line: &str) -> anyhow::Result<ControlFlow<()>> {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        let file = || {
            if rest.is_empty() {
                bail!("/{name} needs the name of a file")
            } else {
                Ok(rest)
            }
        };
        match name {
            "help" => println!("{HELP}"),
            "clear" => self.begin(),
            "system" => {
                self.system = (!rest.is_empty()).then(|| rest.to_string());
                self.begin();
            }
            "save" => {
                let file = file()?;
                let text = serde_json::to_string_pretty(&self.conversation.messages)?;
                std::fs::write(file, text + "\n").with_context(|| file.to_string())?;
            }
            "load" => {
                let file = file()?;
                let text = std::fs::read_to_string(file).with_context(|| file.to_string())?;
                self.conversation.messages = serde_json::from_str(&text).with_context(|| file.to_string())?;
            }
            "set" => self.set(rest)?,
            "exit" | "quit" => return Ok(ControlFlow::Break(())),
            _ => bail!("there is no /{name}; /help lists the commands"),
        }
        Ok(ControlFlow::Continue(()))
    }

    fn set(&mut self, setting: &str) -> anyhow::Result<()> {
        if setting.is_empty() {
            for (name, value) in session::settings(&self.config)? {
                println!("{name}={value}");
            }
            return Ok(());
        }
        let config = session::set(&self.config, setting)?;
        config.validate()?;
        self.config = config;
        Ok(())
    }

    fn answer(&mut self, question: &str) -> anyhow::Result<()> {
        let before = self.conversation.messages.len();
        self.conversation.messages.push(Message::user(question));
        let begin = Instant::now();
        let mut first = None;
        let mut failed = None;
        let mut out = io::stdout().lock();
        interrupt::watch();
        let answer = block_on(self.conversation.answer(self.config.clone(), |tokens| {
            if !tokens.is_empty() {
                first.get_or_insert_with(|| begin.elapsed().as_secs_f64());
            }
            let write = tokens
                .iter()
                .try_for_each(|token| out.write_all(token.text.as_bytes()));
            failed = write.and_then(|()| out.flush()).err();
            if failed.is_some() || interrupt::happened() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        }));
        interrupt::unwatch();
        if let Some(error) = failed {
            return Err(error.into());
        }
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                // The question goes too, so that it can be asked in another way.
                self.conversation.messages.truncate(before);
                return Err(error.into());
            }
        };
        writeln!(out)?;
        if self.stats {
            let first = first.unwrap_or_default();
            let rest = begin.elapsed().as_secs_f64() - first;
            let tokens = answer.ids.len();
            eprintln!(
                "[{tokens} tokens, {:.1} tokens/s, first token after {first:.2} s]",
                tokens.saturating_sub(1) as f64 / rest.max(1e-9)
            );
        }
        Ok(())
    }
}

fn history_file() -> Option<PathBuf> {
    let folder = dirs::state_dir().or_else(dirs::data_local_dir)?;
    Some(folder.join("oxiformers").join("chat_history"))
}
